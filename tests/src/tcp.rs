//! Plain TCP: clients, and backends that do what a test says.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, SockRef, Socket, Type};

use crate::PATIENCE;

/// Longest queue of connections that nobody accepted yet: the kernel's own bound is the one that counts.
const BACKLOG: i32 = 8192;

/// Connects, and lets no read or write take for ever: a test that hangs must fail.
///
/// # Errors
/// As connect(2).
pub fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    bound(&stream)?;
    Ok(stream)
}

/// As [`connect`], from this address of our own.
///
/// # Errors
/// As bind(2) and connect(2).
pub fn connect_from(source: IpAddr, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    socket.connect_timeout(&address.into(), PATIENCE)?;
    let stream = socket.into();
    bound(&stream)?;
    Ok(stream)
}

/// Listens with a long queue.
///
/// # Panics
/// When it cannot.
#[track_caller]
pub fn listen(address: SocketAddr) -> TcpListener {
    let bind = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    bind().unwrap_or_else(|error: io::Error| panic!("cannot listen at {address}: {error}"))
}

/// Closes with RST instead of FIN.
///
/// # Panics
/// When the kernel refuses the option.
#[track_caller]
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("a socket takes SO_LINGER");
}

/// Whether an operation on a socket ended with ECONNRESET: that errno, and no other.
pub fn is_reset<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.raw_os_error() == Some(Errno::CONNRESET.raw_os_error()))
}

fn bound(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

/// A backend: each connection is given to a function, on a thread of its own.
#[derive(Debug)]
pub struct Backend {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Backend {
    /// Listens at a free address.
    ///
    /// # Panics
    /// When it cannot.
    #[track_caller]
    pub fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        Self::start_at(crate::loopback(), serve)
    }

    /// Listens at this address.
    ///
    /// # Panics
    /// When it cannot.
    #[track_caller]
    pub fn start_at(address: SocketAddr, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = listen(address);
        let address = listener.local_addr().expect("a bound socket has an address");
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, serve) = (stop.clone(), Arc::new(serve));
        let acceptor = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopped.load(Relaxed) {
                    break;
                }
                bound(&stream).expect("a socket takes timeouts");
                let serve = serve.clone();
                std::thread::spawn(move || serve(stream));
            }
        });
        Self { address, stop, acceptor: Some(acceptor) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        // Wakes the acceptor; that it fails means there is none to wake.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}
