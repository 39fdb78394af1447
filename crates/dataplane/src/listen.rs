//! Listening sockets: one for each worker and listener, all on the same port.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use crate::tcp::{ListenError, ListenerTcp, listening_socket};

/// Opens `workers` listening sockets on one address. With port 0 all get the port that the first was given.
pub(crate) fn listen(
    bind: SocketAddr,
    workers: usize,
    tcp: &ListenerTcp,
    keepalive: Option<Duration>,
) -> Result<(SocketAddr, Vec<OwnedFd>), ListenError> {
    let open = |bind, shared| open(bind, tcp, keepalive, shared);
    if bind.port() != 0 {
        // A port that somebody else holds with SO_REUSEPORT as well would be shared with them without a word, and only a
        // listening socket notices one that listens already: ask for the port without sharing first.
        open(bind, false)?.listen(1)?;
    }
    // One socket alone is found faster than a group of one.
    let shared = workers > 1;
    let first = open(bind, shared)?;
    let address = first.local_addr()?.as_socket().unwrap_or(bind);
    let mut sockets = vec![OwnedFd::from(first)];
    for _ in 1..workers {
        sockets.push(open(address, true)?.into());
    }
    Ok((address, sockets))
}

/// Opens `workers` sockets for datagrams on one address; see [`listen`]. `trains`: they receive trains where the kernel has them.
pub(crate) fn listen_udp(
    bind: SocketAddr,
    workers: usize,
    trains: bool,
) -> io::Result<(SocketAddr, Vec<OwnedFd>)> {
    let shared = workers > 1;
    if shared && bind.port() != 0 {
        // Sockets that share a port share it with anybody of the same user who asks for that: look whether it is free first.
        open_udp(bind, trains, false)?;
    }
    let first = open_udp(bind, trains, shared)?;
    let address = first.local_addr()?.as_socket().unwrap_or(bind);
    let mut sockets = vec![OwnedFd::from(first)];
    for _ in 1..workers {
        sockets.push(open_udp(address, trains, true)?.into());
    }
    Ok((address, sockets))
}

/// Bytes that wait in a listening socket while its worker is busy, or on their way out: it serves all flows. The kernel gives at
/// most `net.core.rmem_max` and `wmem_max`, unless the process may administer the network.
const DATAGRAM_BUFFER: usize = 4 << 20;

/// Lets a socket keep so many bytes, or as many as the kernel allows.
pub(crate) fn enlarge_receive_buffer(socket: BorrowedFd<'_>, bytes: usize) {
    let _ = sockopt::set_socket_recv_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, bytes));
}

fn open_udp(bind: SocketAddr, trains: bool, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(bind), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(shared)?;
    if bind.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if bind.ip().is_unspecified() {
        uring::receive_destination(socket.as_fd(), bind.is_ipv6())?;
    }
    if trains {
        // Where the kernel has none, datagrams come one by one.
        let _ = uring::receive_trains(socket.as_fd());
    }
    // Smaller buffers lose datagrams earlier; that is all.
    enlarge_receive_buffer(socket.as_fd(), DATAGRAM_BUFFER);
    let _ = sockopt::set_socket_send_buffer_size_force(&socket, DATAGRAM_BUFFER)
        .or_else(|_| sockopt::set_socket_send_buffer_size(&socket, DATAGRAM_BUFFER));
    socket.bind(&bind.into())?;
    Ok(socket)
}

/// Starts accepting. Bound sockets refuse connections until then.
pub(crate) fn start(socket: &OwnedFd, backlog: u16) -> io::Result<()> {
    rustix::net::listen(socket, backlog.into())?;
    Ok(())
}

fn open(
    bind: SocketAddr,
    tcp: &ListenerTcp,
    keepalive: Option<Duration>,
    shared: bool,
) -> Result<Socket, ListenError> {
    let socket = listening_socket(bind, tcp, keepalive)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    if bind.is_ipv6() {
        // `[::]` and `0.0.0.0` are two listeners, whatever net.ipv6.bindv6only says.
        socket.set_only_v6(true)?;
    }
    // Drained of waiting connections with plain accepts when the worker stops: these must not block.
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit it, as they do keepalive: no system call for each connection.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&bind.into())?;
    Ok(socket)
}
