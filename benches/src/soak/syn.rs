//! A flood of SYNs from addresses that nobody has: the connections they begin never get further.
//!
//! The addresses are routed to loopback, where nobody takes them: the kernel under test answers, and its answer is lost. It
//! takes a network of its own ([`super::namespace`]).

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use socket2::{Domain, Protocol, Socket, Type};

use super::namespace;
use crate::race::Random;

/// Where they say they come from: 10.66.0.0/16.
const NETWORK: &str = "10.66.0.0/16";
/// SYNs in one go; then a rest, to keep to the rate.
const AT_ONCE: u32 = 50;
/// The IP header and the TCP header, without options.
const BYTES: usize = 40;
const IP_BYTES: usize = 20;
/// `IPPROTO_RAW`: the packet has its IP header already (raw(7)).
const RAW: i32 = 255;

/// SYNs that are being sent.
pub(super) struct SynFlood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<u64>>,
}

impl SynFlood {
    /// Sends so many a second to `target`.
    ///
    /// # Errors
    /// When there may be no raw socket, or the addresses cannot be routed.
    pub(super) fn start(target: SocketAddr, per_second: u32) -> anyhow::Result<Self> {
        let SocketAddr::V4(target) = target else { bail!("SYNs are for IPv4") };
        namespace::ip(&["route", "replace", NETWORK, "dev", "lo"])?;
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW)));
        let socket = socket.context("a raw socket takes root")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || flood(&socket, target, per_second, &stopped));
        Ok(Self { stop, thread })
    }

    /// Ends it; gives how many were sent.
    pub(super) fn end(self) -> anyhow::Result<u64> {
        self.stop.store(true, Relaxed);
        self.thread.join().expect("sending does not panic").context("sending SYNs")
    }
}

fn flood(socket: &Socket, target: SocketAddrV4, per_second: u32, stopped: &AtomicBool) -> io::Result<u64> {
    let mut random = Random::new(1, 0);
    let rest = Duration::from_secs(1) * AT_ONCE / per_second;
    let (mut sent, mut due) = (0, Instant::now());
    while !stopped.load(Relaxed) {
        for _ in 0..AT_ONCE {
            let bits = random.next();
            let [a, b, c, d, ..] = bits.to_le_bytes();
            let source = SocketAddrV4::new(Ipv4Addr::new(10, 66, a, b), u16::from_le_bytes([c, d]) | 1_024);
            match socket.send_to(&syn(source, target, (bits >> 32) as u32), &SocketAddr::V4(target).into()) {
                Ok(_) => sent += 1,
                // A full queue loses one of a flood.
                Err(error) if error.kind() == io::ErrorKind::OutOfMemory => {}
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
        }
        due += rest;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(sent)
}

/// A whole packet (RFC 791, RFC 9293). Its length and the IP header's checksum are the kernel's to fill in.
fn syn(source: SocketAddrV4, target: SocketAddrV4, sequence: u32) -> [u8; BYTES] {
    let mut packet = [0; BYTES];
    packet[0] = 0x45; // version 4, a header of five words
    packet[8] = 64; // time to live
    packet[9] = 6; // TCP
    packet[12..16].copy_from_slice(&source.ip().octets());
    packet[16..20].copy_from_slice(&target.ip().octets());
    let tcp = &mut packet[IP_BYTES..];
    tcp[0..2].copy_from_slice(&source.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&target.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    tcp[12] = 5 << 4; // a header of five words
    tcp[13] = 0x02; // SYN
    tcp[14..16].copy_from_slice(&u16::MAX.to_be_bytes()); // window
    let checksum = checksum(&packet);
    packet[IP_BYTES + 16..IP_BYTES + 18].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// TCP's, over the addresses, the protocol, the length and the header (RFC 9293, 3.1).
fn checksum(packet: &[u8; BYTES]) -> u16 {
    let words = packet[12..].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum: u32 = words.sum::<u32>() + 6 + (BYTES - IP_BYTES) as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_with_its_checksum_sums_up_to_nothing() {
        let packet = syn("10.66.1.2:40000".parse().unwrap(), "127.1.2.3:5432".parse().unwrap(), 0x0102_0304);
        assert_eq!(checksum(&packet), 0);
        assert_eq!((packet[33], &packet[22..24]), (0x02, &5432_u16.to_be_bytes()[..]));
    }
}
