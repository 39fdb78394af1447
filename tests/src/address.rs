//! Loopback addresses that nobody else uses.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// Hosts that were given out by this process.
static HOSTS: AtomicU8 = AtomicU8::new(1);

/// A free port of an address of its own.
///
/// Of 127.0.0.0/8 the kernel takes 127.0.0.1 alone for outgoing connections. On another address nothing takes the port
/// while its owner is away, so that a killed process can be started again where it was, and nobody who connects there
/// meanwhile happens on the same source port and so talks to himself.
pub fn loopback() -> SocketAddr {
    let process = std::process::id().to_le_bytes();
    let host = HOSTS.fetch_add(1, Relaxed);
    assert!(host < u8::MAX, "one test process has 253 addresses");
    // 127.0.x.y is where people and the demo put services of their own.
    let ip = Ipv4Addr::new(127, process[1].max(1), process[0], host);
    let listener = TcpListener::bind((IpAddr::V4(ip), 0));
    let listener = listener.unwrap_or_else(|error| panic!("cannot bind {ip}: {error}"));
    listener.local_addr().expect("a bound socket has an address")
}
