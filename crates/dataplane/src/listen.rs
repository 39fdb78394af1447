//! Listening sockets: one for each worker and listener, all on the same port.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use std::time::Duration;

use socket2::{Domain, Socket};

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
    let socket = listening_socket(Domain::for_address(bind), tcp, keepalive)?;
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
