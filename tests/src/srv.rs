//! A client that follows SRV (RFC 2782), as XMPP, SIP and LDAP clients do: it asks DNS for each connection anew, and tries
//! targets by priority and weight until one takes the connection.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::{converse, dig, greet};

/// A connect to loopback takes no time, or it fails.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// One whole connection to a service; gives the name of who served it, and where.
///
/// # Errors
/// When no target took the connection, or it was not served to its end.
pub fn ask_srv(dns: SocketAddr, service: &str, dice: &mut u64) -> io::Result<(String, SocketAddr)> {
    let mut refused = io::Error::from(io::ErrorKind::NotFound);
    for (host, port) in targets(dns, service, dice) {
        for ip in dig(dns, &host, "A").iter().filter_map(|line| line.parse().ok()) {
            let target = SocketAddr::new(ip, port);
            match TcpStream::connect_timeout(&target, CONNECT_TIMEOUT) {
                Ok(stream) => {
                    let name = greet(&stream)?;
                    converse(&stream)?;
                    return Ok((name, target));
                }
                Err(error) => refused = error,
            }
        }
    }
    Err(refused)
}

/// In the order in which they are to be tried.
fn targets(dns: SocketAddr, service: &str, dice: &mut u64) -> Vec<(String, u16)> {
    let parsed = |line: &String| {
        let [priority, weight, port, host] = line.split(' ').collect::<Vec<_>>()[..] else { return None };
        let (priority, weight): (u16, u64) = (priority.parse().ok()?, weight.parse().ok()?);
        Some((priority, weight, host.to_owned(), port.parse::<u16>().ok()?))
    };
    let mut left: Vec<_> = dig(dns, service, "SRV").iter().filter_map(parsed).collect();
    let mut ordered = Vec::new();
    while let Some(priority) = left.iter().map(|target| target.0).min() {
        let sum: u64 = left.iter().filter(|target| target.0 == priority).map(|target| target.1).sum();
        // Numerical Recipes' generator: all that is needed is that both are drawn.
        *dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut drawn = (*dice >> 33) % (sum + 1);
        let place = left.iter().position(|target| {
            let here = target.0 == priority && target.1 >= drawn;
            if target.0 == priority && !here {
                drawn -= target.1;
            }
            here
        });
        let (_, _, host, port) = left.remove(place.expect("the drawn number is within the sum"));
        ordered.push((host, port));
    }
    ordered
}

/// What clients that follow SRV saw.
#[derive(Debug, Clone, Default)]
pub struct SrvSeen {
    /// Who served, and where they were reached, for each connection.
    pub served: Vec<(String, SocketAddr)>,
    /// What went wrong.
    pub failed: Vec<String>,
}

/// Clients that connect again and again, until this is dropped.
#[derive(Debug)]
pub struct SrvClients {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<SrvSeen>>,
    threads: Vec<JoinHandle<()>>,
}

impl SrvClients {
    /// Starts so many of `service`.
    pub fn start(dns: SocketAddr, service: &str, threads: u64) -> Self {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(SrvSeen::default())));
        let client = |number| {
            let (stop, seen, service) = (Arc::clone(&stop), Arc::clone(&seen), service.to_owned());
            std::thread::spawn(move || {
                let mut dice = number;
                while !stop.load(Relaxed) {
                    let asked = ask_srv(dns, &service, &mut dice);
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    match asked {
                        Ok(served) => seen.served.push(served),
                        Err(error) => seen.failed.push(error.to_string()),
                    }
                }
            })
        };
        let threads = (1..=threads).map(client).collect();
        Self { stop, seen, threads }
    }

    /// What they saw since this was asked last.
    pub fn take(&self) -> SrvSeen {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for SrvClients {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
