//! A datagram, and what comes back.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::text::{find, printable, shown};
use crate::{Failure, ProxyHeader};

/// Longest datagram that is looked at.
const DATAGRAM_BYTES_MAX: usize = 2048;

/// What is said and heard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Udp {
    /// The datagram.
    pub send: Vec<u8>,
    /// Must be in the answer. `None`: no answer is needed, and only a refusal of the kernel over there (ICMP) fails: all that a
    /// protocol can tell whose servers do not answer.
    pub expect: Option<Vec<u8>>,
}

/// Keeps to `limit` itself: where no answer is needed, silence until then passes. `proxy` comes before the datagram.
pub(crate) async fn ask(
    udp: &Udp,
    proxy: Option<ProxyHeader>,
    target: SocketAddr,
    limit: Duration,
) -> Result<String, Failure> {
    let exchange = async {
        let socket = connect(target).await?;
        socket.send(&headed(&socket, proxy, &udp.send)?).await?;
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        let length = receive(&socket, &mut buffer).await?;
        Ok::<_, io::Error>(buffer[..length].to_vec())
    };
    match (timeout(limit, exchange).await, &udp.expect) {
        (Ok(Ok(heard)), expect) => judge(&heard, expect.as_deref().unwrap_or_default()),
        (Ok(Err(why)), _) => Err(Failure::Connect(target, why)),
        (Err(_), None) => Ok("nothing refused the datagram".to_owned()),
        (Err(_), Some(_)) => Err(Failure::Late(target, limit)),
    }
}

/// A socket that hears of the other side's ICMP refusals.
pub(crate) async fn connect(target: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(target).await?;
    // The kernel gave us the very port that nobody listens on: we would answer ourselves.
    if socket.local_addr()? == target {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(socket)
}

/// A datagram with the header before it that its receiver wants.
pub(crate) fn headed(socket: &UdpSocket, proxy: Option<ProxyHeader>, datagram: &[u8]) -> io::Result<Vec<u8>> {
    let header = match proxy {
        Some(proxy) => proxy.datagram_bytes(socket.local_addr()?, socket.peer_addr()?),
        None => Vec::new(),
    };
    Ok([&header, datagram].concat())
}

/// The next datagram, or the refusal. `UdpSocket::recv` waits for the former alone: epoll has the latter as an error, not as
/// something to read.
pub(crate) async fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if ready.is_error() {
            if let Some(why) = socket.take_error()? {
                return Err(why);
            }
            // Taken by somebody else: wait for the next.
            let _ = socket.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
        match socket.try_recv(buffer) {
            Err(why) if why.kind() == io::ErrorKind::WouldBlock => {}
            received => return received,
        }
    }
}

fn judge(heard: &[u8], expect: &[u8]) -> Result<String, Failure> {
    if find(heard, expect).is_some() {
        return Ok(shown(heard));
    }
    let message = format!("{:?} is not in its answer: {}", shown(expect), shown(heard));
    Err(Failure::Answer(printable(&message)))
}
