//! The two services behind every proxy: each answers a request of a known length with a response of a known length.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::slots::Slots;
use super::{EVERY_EDGE, Exchange, Moved, Scratch, TAG_BACKEND, TAG_LISTENER};

/// As long as the system allows: 3,000 flows are opened in one go.
const BACKLOG: i32 = 4096;

#[derive(Debug)]
pub(super) struct Backends {
    listeners: Vec<OwnedFd>,
    addresses: Vec<SocketAddr>,
    connections: Slots<Connection>,
    /// Payload bytes that arrived from clients.
    pub(super) bytes_received: u64,
}

#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    /// Known once the first request begins.
    exchange: Option<Exchange>,
    /// Of the request that is arriving.
    received: usize,
    /// Of all responses that are due.
    to_send: usize,
}

impl Backends {
    /// Two listeners on two loopback addresses, at ports that were free.
    pub(super) fn listen(epoll: BorrowedFd<'_>) -> io::Result<Self> {
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        for (index, last) in (0_u64..).zip([1, 2]) {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
            rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, last), 0))?;
            rustix::net::listen(&socket, BACKLOG)?;
            addresses.push(SocketAddr::try_from(rustix::net::getsockname(&socket)?)?);
            epoll::add(epoll, &socket, EventData::new_u64(TAG_LISTENER | index), EventFlags::IN)?;
            listeners.push(socket);
        }
        Ok(Self { listeners, addresses, connections: Slots::default(), bytes_received: 0 })
    }

    pub(super) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Takes all connections that wait at a listener.
    pub(super) fn accept(&mut self, epoll: BorrowedFd<'_>, index: usize) -> io::Result<()> {
        loop {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = match rustix::net::accept_with(&self.listeners[index], flags) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return Ok(()),
                // Reset by the client before we came to it.
                Err(Errno::CONNABORTED | Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            sockopt::set_tcp_nodelay(&socket, true)?;
            let key = self.connections.insert(Connection { socket, exchange: None, received: 0, to_send: 0 });
            let connection = self.connections.get_mut(key).expect("it was inserted above");
            let data = EventData::new_u64(TAG_BACKEND | key);
            epoll::add(epoll, connection.socket.as_fd(), data, EVERY_EDGE)?;
        }
    }

    /// Reads what came, answers what is complete; closes the connection when its client has.
    pub(super) fn ready(&mut self, key: u64, flags: EventFlags, scratch: &mut Scratch) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let mut open = true;
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            let ended = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
            let Moved { bytes, end } = connection.receive(scratch, ended);
            self.bytes_received += bytes as u64;
            connection.received += bytes;
            if let Some(Exchange { request_bytes, response_bytes }) = connection.exchange {
                connection.to_send += connection.received / request_bytes * response_bytes;
                connection.received %= request_bytes;
            }
            open = end.is_none();
        }
        if open && connection.to_send > 0 {
            let Moved { bytes, end } = scratch.send_all(connection.socket.as_fd(), connection.to_send);
            connection.to_send -= bytes;
            open = end.is_none();
        }
        if !open {
            self.connections.remove(key);
        }
    }
}

impl Connection {
    /// Receives all there is; the first bytes say what the exchange is, all others are as good as any.
    fn receive(&mut self, scratch: &mut Scratch, ended: bool) -> Moved {
        let mut first = 0;
        let exchange = match self.exchange {
            Some(exchange) => exchange,
            None => {
                first = match scratch.receive_once(self.socket.as_fd()) {
                    Ok(received) => received,
                    Err(end) => return Moved { bytes: 0, end },
                };
                let Some(exchange) = Exchange::read(&scratch.bytes[..first]) else {
                    return Moved { bytes: first, end: Some(io::ErrorKind::InvalidData.into()) };
                };
                self.exchange = Some(exchange);
                if first < scratch.bytes.len() && !ended {
                    return Moved { bytes: first, end: None };
                }
                exchange
            }
        };
        let bulk = exchange.request_bytes > scratch.bytes.len();
        let rest = scratch.receive_all(self.socket.as_fd(), bulk, ended);
        Moved { bytes: first + rest.bytes, end: rest.end }
    }
}
