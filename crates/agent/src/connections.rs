//! How many TCP connections are established to an address of this host, asked of the kernel.
//!
//! Two ways: `sock_diag` (netlink), where the kernel picks the connections of one port and state itself; and, where that
//! is denied or not built in, `/proc/net/tcp` and `tcp6`, where it writes a line of text for every connection of the
//! host. Both walk the kernel's whole table of connections, in the network namespace of this process. With ten thousand
//! of them that takes some ten milliseconds the one way and several times as long the other.
//!
//! Counted are ESTABLISHED ones at the local address exactly, an IPv4 one also where a listener of IPv6 took it
//! (`::ffff:10.0.0.1`). So those count that wait in the listener's backlog, and those do not that the client has closed
//! (CLOSE_WAIT). `/proc` is read in pieces: while others open and close connections it may show one twice or not at all.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// The kernel answers while it is asked; this is for whatever only looks like one.
const PATIENCE: Duration = Duration::from_secs(1);
/// As much as the kernel puts into one datagram of an answer, at most.
const BUFFER_BYTES: usize = 32 * 1024;

// <linux/netlink.h>, <linux/sock_diag.h>, <linux/inet_diag.h>, <net/tcp_states.h>
const HEADER_BYTES: usize = 16;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const REQUEST_BYTES: usize = HEADER_BYTES + 56;
const MESSAGE_BYTES: usize = HEADER_BYTES + 72;
const IPPROTO_TCP: u8 = 6;
const TCP_ESTABLISHED: u8 = 1;

/// Counts the connections of one address, again and again.
#[derive(Debug)]
pub(crate) struct Connections {
    address: SocketAddr,
    buffer: Vec<u8>,
}

impl Connections {
    /// Of this address, which nothing is asked about yet.
    pub(crate) fn of(address: SocketAddr) -> Self {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        Self { address, buffer: vec![0; BUFFER_BYTES] }
    }

    /// How many there are now. `proc` stands for `/proc`.
    ///
    /// # Errors
    /// When the kernel shows them in neither way; says why.
    pub(crate) fn count(&mut self, proc: &Path) -> Result<u32, String> {
        self.ask_sock_diag().or_else(|diag| {
            self.read_proc(proc)
                .map_err(|files| format!("sock_diag: {diag}; {}/net/tcp: {files}", proc.display()))
        })
    }

    /// An IPv4 address may be that of a socket of either family.
    fn families(&self) -> &'static [AddressFamily] {
        if self.address.is_ipv4() {
            &[AddressFamily::INET, AddressFamily::INET6]
        } else {
            &[AddressFamily::INET6]
        }
    }

    /// A socket for each count: what is left of an answer that broke off is never taken for the next one.
    fn ask_sock_diag(&mut self) -> io::Result<u32> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(netlink::SOCK_DIAG))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        let mut count = 0;
        for family in self.families() {
            // An unbound netlink socket speaks to the kernel.
            send(&socket, &request(*family, self.address.port()), SendFlags::empty())?;
            let mut is_done = false;
            while !is_done {
                let (_, length) = recv(&socket, self.buffer.as_mut_slice(), RecvFlags::TRUNC)?;
                let datagram =
                    self.buffer.get(..length).ok_or_else(|| broken("longer than the kernel's longest"))?;
                is_done = count_matches(datagram, self.address, &mut count)?;
            }
        }
        Ok(count)
    }

    fn read_proc(&self, proc: &Path) -> io::Result<u32> {
        let mut count = 0_u32;
        for family in self.families() {
            let name = if *family == AddressFamily::INET { "tcp" } else { "tcp6" };
            let file = match File::open(proc.join("net").join(name)) {
                // A kernel without IPv6 has no sockets of it.
                Err(error) if error.kind() == io::ErrorKind::NotFound && name == "tcp6" => continue,
                opened => opened?,
            };
            let mut file = BufReader::new(file);
            let mut line = String::new();
            while file.read_line(&mut line)? > 0 {
                count += u32::from(established_at(&line) == Some(self.address));
                line.clear();
            }
        }
        Ok(count)
    }
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`: all established connections of this family at this local port.
fn request(family: AddressFamily, port: u16) -> [u8; REQUEST_BYTES] {
    let mut request = [0; REQUEST_BYTES];
    request[..4].copy_from_slice(&(REQUEST_BYTES as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    let body = &mut request[HEADER_BYTES..];
    // AF_INET is 2 and AF_INET6 is 10: one byte holds them.
    body[0] = family.as_raw() as u8;
    body[1] = IPPROTO_TCP;
    body[4..8].copy_from_slice(&(1_u32 << TCP_ESTABLISHED).to_ne_bytes());
    body[8..10].copy_from_slice(&port.to_be_bytes());
    request
}

/// Adds the connections of `address` in one datagram of an answer. True: it was the last.
fn count_matches(datagram: &[u8], address: SocketAddr, count: &mut u32) -> io::Result<bool> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let header = rest.first_chunk::<HEADER_BYTES>().ok_or_else(|| broken("a header that is cut off"))?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let message =
            rest.get(..length.max(HEADER_BYTES)).ok_or_else(|| broken("a message that is cut off"))?;
        match u16::from_ne_bytes([header[4], header[5]]) {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let errno = message
                    .get(HEADER_BYTES..)
                    .and_then(<[u8]>::first_chunk)
                    .ok_or_else(|| broken("no errno"))?;
                return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(*errno).saturating_neg()));
            }
            _ => *count += u32::from(local_address(message) == Some(address)),
        }
        // Messages begin at multiples of 4 bytes.
        rest = rest.get(message.len().next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The local address of a `struct inet_diag_msg`.
fn local_address(message: &[u8]) -> Option<SocketAddr> {
    let body = message.get(HEADER_BYTES..MESSAGE_BYTES)?;
    let port = u16::from_be_bytes([body[4], body[5]]);
    let ip: IpAddr = if AddressFamily::from_raw(body[0].into()) == AddressFamily::INET {
        body[8..].first_chunk::<4>().copied()?.into()
    } else {
        body[8..].first_chunk::<16>().copied()?.into()
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

/// The local address of a line of `/proc/net/tcp` or `tcp6`, where it is of an established connection.
fn established_at(line: &str) -> Option<SocketAddr> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (ip, port) = words.next()?.split_once(':')?;
    let state = words.nth(1)?;
    if u8::from_str_radix(state, 16) != Ok(TCP_ESTABLISHED) {
        return None;
    }
    // Words of 32 bits as they lie in memory, written as numbers of this machine.
    let mut bytes = [0; 16];
    for (index, word) in ip.as_bytes().chunks(8).enumerate() {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.get_mut(index * 4..index * 4 + 4)?.copy_from_slice(&word.to_ne_bytes());
    }
    let ip: IpAddr = match ip.len() {
        8 => (*bytes.first_chunk::<4>()?).into(),
        32 => bytes.into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), u16::from_str_radix(port, 16).ok()?))
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    /// Waits until both ways give `count`: other tests' connections disturb a reading of `/proc`.
    #[track_caller]
    fn both_ways_give(address: SocketAddr, count: u32) {
        let mut connections = Connections::of(address);
        let start = Instant::now();
        loop {
            let diag = connections.ask_sock_diag().unwrap();
            let files = connections.read_proc(Path::new("/proc")).unwrap();
            if [diag, files] == [count; 2] {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "{diag} and {files} instead of {count}");
            std::thread::yield_now();
        }
    }

    /// Connections of a listener to `to`, at which they are counted; both ends stay open.
    fn connect(listener: &TcpListener, to: SocketAddr, count: usize) -> Vec<(TcpStream, TcpStream)> {
        let pair = |_| (TcpStream::connect(to).unwrap(), listener.accept().unwrap().0);
        (0..count).map(pair).collect()
    }

    #[test]
    fn the_kernel_says_the_same_in_both_ways() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        both_ways_give(address, 0);
        // More than one datagram of an answer holds.
        let mut open = connect(&listener, address, 400);
        both_ways_give(address, 400);
        let waits_in_the_backlog = TcpStream::connect(address).unwrap();
        both_ways_give(address, 401);
        drop(waits_in_the_backlog);
        open.truncate(3);
        both_ways_give(address, 3);
        // The same port at another address is another service.
        let other = TcpListener::bind(("127.0.0.2", address.port())).unwrap();
        let _others = connect(&other, other.local_addr().unwrap(), 2);
        both_ways_give(address, 3);
    }

    #[test]
    fn a_listener_of_both_families() {
        let Ok(listener) = TcpListener::bind("[::]:0") else {
            eprintln!("no IPv6 here: not checked");
            return;
        };
        let port = listener.local_addr().unwrap().port();
        let address = |ip: &str| SocketAddr::new(ip.parse().unwrap(), port);
        let _v4 = connect(&listener, address("127.0.0.1"), 2);
        let _v6 = connect(&listener, address("::1"), 3);
        both_ways_give(address("127.0.0.1"), 2);
        both_ways_give(address("::ffff:127.0.0.1"), 2);
        both_ways_give(address("::1"), 3);
    }

    #[test]
    fn what_is_no_answer_is_an_error_and_never_a_panic() {
        let address = ([127, 0, 0, 1], 80).into();
        let message = |kind: u16, body: &[u8]| {
            let length = (HEADER_BYTES + body.len()) as u32;
            [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], body].concat()
        };
        let mut count = 0;
        assert!(count_matches(&message(NLMSG_DONE, &[0; 4]), address, &mut count).unwrap());
        let denied = message(NLMSG_ERROR, &(-1_i32).to_ne_bytes());
        let error = count_matches(&denied, address, &mut count).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(!count_matches(&message(SOCK_DIAG_BY_FAMILY, &[]), address, &mut count).unwrap());
        for length in 1..denied.len() {
            assert!(count_matches(&denied[..length], address, &mut count).is_err(), "{length}");
        }
        // A length of 0 still moves on.
        assert!(!count_matches(&[0; 64], address, &mut count).unwrap());
        for line in ["", "sl local", "0: 0100007F:0050 0:0", "0: 01:0050 0:0 01", "0: xxxxxxxx:0050 0:0 01"] {
            assert_eq!(established_at(line), None, "{line}");
        }
        assert_eq!(count, 0);
        let error = Connections::of(address).read_proc(Path::new("/nonexistent")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
