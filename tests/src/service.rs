//! A small TCP service that says who it is, with good manners or bad ones, and clients that ask it.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{Backend, connect, connect_from, reset};

/// How a service treats its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Manners {
    /// It says its name, and then each byte back.
    Good,
    /// It accepts and resets.
    ResetsAtOnce,
    /// It says its name, and resets at the client's first byte.
    ResetsLater,
}

/// A service with a name.
#[derive(Debug)]
pub struct Service {
    name: String,
    manners: Arc<AtomicU8>,
    backend: Backend,
}

impl Service {
    /// Starts it at a free address.
    ///
    /// # Panics
    /// When it cannot listen.
    #[track_caller]
    pub fn start(name: &str, manners: Manners) -> Self {
        let manners = Arc::new(AtomicU8::new(manners as u8));
        let (said, now) = (format!("{name}\n"), Arc::clone(&manners));
        let backend = Backend::start(move |stream| {
            let manners = now.load(Relaxed);
            if manners == Manners::ResetsAtOnce as u8 {
                return reset(stream);
            }
            // A client that is gone is not the service's fault.
            let _ = serve(stream, &said, manners == Manners::ResetsLater as u8);
        });
        Self { name: name.to_owned(), manners, backend }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.backend.address()
    }

    /// Changes how it treats connections from now on.
    pub fn behave(&self, manners: Manners) {
        self.manners.store(manners as u8, Relaxed);
    }
}

fn serve(mut stream: TcpStream, name: &str, resets: bool) -> io::Result<()> {
    stream.write_all(name.as_bytes())?;
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        if resets {
            reset(stream);
            return Ok(());
        }
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// Connects, and reads who serves.
///
/// # Errors
/// When the connection is refused, reset or ended.
pub fn greet(stream: &TcpStream) -> io::Result<String> {
    // Nothing comes after the name until it is asked for, so nothing is lost with the buffer.
    let mut name = String::new();
    match BufReader::new(stream).read_line(&mut name)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(name.trim_end().to_owned()),
    }
}

/// Sends a byte, which must come back.
///
/// # Errors
/// When it does not.
pub fn converse(mut stream: &TcpStream) -> io::Result<()> {
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])
}

/// One whole connection; gives the name of who served it.
///
/// # Errors
/// When it was not served to its end.
pub fn ask(listener: SocketAddr) -> io::Result<String> {
    // Not bound before it connects: then a port is taken for this pair of addresses alone, of which there are always some,
    // while a bound one must be free for all (`ip_local_port_range` and TIME_WAIT of earlier tests).
    talk(&connect(listener)?)
}

/// As [`ask`], from this address.
///
/// # Errors
/// As that.
pub fn ask_from(source: IpAddr, listener: SocketAddr) -> io::Result<String> {
    talk(&connect_from(source, listener)?)
}

fn talk(stream: &TcpStream) -> io::Result<String> {
    let name = greet(stream)?;
    converse(stream)?;
    Ok(name)
}

/// One connection of [`Clients`].
#[derive(Debug, Clone)]
pub struct Asked {
    /// When it began.
    pub began: Instant,
    /// Who served it, or why nobody did.
    pub outcome: Result<String, io::ErrorKind>,
}

/// Clients that connect again and again, until this is dropped.
#[derive(Debug)]
pub struct Clients {
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// Starts so many, each with a pause between its connections.
    pub fn start(listener: SocketAddr, threads: usize, pause: Duration) -> Self {
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let client = |_| {
            let (stop, asked) = (Arc::clone(&stop), Arc::clone(&asked));
            std::thread::spawn(move || {
                while !stop.load(Relaxed) {
                    let began = Instant::now();
                    let outcome = ask(listener).map_err(|error| error.kind());
                    asked.lock().unwrap_or_else(PoisonError::into_inner).push(Asked { began, outcome });
                    std::thread::sleep(pause);
                }
            })
        };
        let threads = (0..threads).map(client).collect();
        Self { stop, asked, threads }
    }

    /// What became of those that began at `since` or later and are over.
    pub fn since(&self, since: Instant) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|asked| asked.began >= since).cloned().collect()
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
