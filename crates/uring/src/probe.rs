//! Does the ring really work here? Asked once, before an engine is chosen.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::buffers::Group;
use crate::ring::{Completion, EnterError, Ring, Setup, SetupError, Wait};
use crate::token::{Op, Token};

/// Why the ring cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// It could not be made.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// It could not be entered.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// The loopback connection of the probe could not be made.
    #[error("the io_uring probe could not open a loopback connection: {0}")]
    Socket(#[from] io::Error),
    /// An operation that the dataplane needs did not do what it should.
    #[error(
        "io_uring is there but {op:?} does not work here (result {result}); Linux 6.1 or newer is needed"
    )]
    Broken {
        /// The operation.
        op: Op,
        /// What it gave: 0 or more, or a negated errno.
        result: i32,
    },
    /// An operation that the dataplane needs did not finish.
    #[error("io_uring is there but {op:?} did not complete within a second")]
    Stuck {
        /// The operation.
        op: Op,
    },
}

/// Sends bytes around a loopback connection with the operations that the dataplane uses: multishot accept, connect,
/// multishot receive into provided buffers, send, cancel, close.
///
/// On a thread of its own: some time after a ring is gone the kernel interrupts the thread that had used it
/// (`io_ring_exit_work` adds task work with a signal), and the caller's system calls should not fail with `EINTR` for it.
///
/// # Panics
/// If the probe itself does, which is a bug.
pub fn probe() -> Result<(), ProbeError> {
    let thread = std::thread::Builder::new().name("probe".to_owned()).spawn(round_trip)?;
    thread.join().expect("the probe does not panic")
}

fn round_trip() -> Result<(), ProbeError> {
    let setup = Setup { submissions: 16, shared: 8, shared_max: 8, first_max: 8, buffer_bytes: 4_096 };
    let mut ring = Ring::new(setup)?;
    let mut seen = Vec::new();
    let listener = listen()?;
    let address: SocketAddr = listener.local_addr()?;
    ring.accept(listener.as_fd(), token(Op::Accept))?;

    let client = stream_socket()?;
    ring.connect(client.as_fd(), &address, token(Op::Connect))?;
    expect(&mut ring, &mut seen, Op::Connect, |c| c.result == 0)?;
    let accepted = expect(&mut ring, &mut seen, Op::Accept, |c| c.result >= 0 && c.more)?;
    let server = accepted.socket.ok_or(ProbeError::Broken { op: Op::Accept, result: accepted.result })?;

    let mut client = TcpStream::from(client);
    client.set_read_timeout(Some(Duration::from_secs(1)))?;
    ring.recv_many(server.as_fd(), token(Op::RecvClient))?;
    client.write_all(b"trim")?;
    let received =
        expect(&mut ring, &mut seen, Op::RecvClient, |c| c.result == 4 && c.more && c.buffer.is_some())?;
    let buffer = received.buffer.ok_or(ProbeError::Broken { op: Op::RecvClient, result: 4 })?;
    ring.send(server.as_fd(), buffer, 0, 4, token(Op::SendClient))?;
    expect(&mut ring, &mut seen, Op::SendClient, |c| c.result == 4)?;
    ring.pool_mut().release(buffer);
    let mut echo = [0; 4];
    client.read_exact(&mut echo)?;

    ring.cancel(token(Op::RecvClient))?;
    expect(&mut ring, &mut seen, Op::RecvClient, |c| !c.more)?;
    ring.pool_mut().grow(Group::First, 8);
    ring.recv_once(server.as_fd(), Group::First, token(Op::RecvClient))?;
    client.write_all(b"tab")?;
    expect(&mut ring, &mut seen, Op::RecvClient, |c| c.result == 3 && !c.more && c.buffer.is_some())?;
    ring.close(server)?;
    ring.enter(Wait::No)?;
    match client.read(&mut echo)? {
        0 => Ok(()),
        n => Err(ProbeError::Broken { op: Op::Close, result: n as i32 }),
    }
}

/// At some free port of the loopback network. On a host where clients just left in thousands, every port of 127.0.0.1 may
/// be waiting for late packets (TIME_WAIT): no reason not to start, for other addresses of the network have ports of their own.
fn listen() -> io::Result<TcpListener> {
    let [low, high, ..] = std::process::id().to_le_bytes();
    let addresses =
        [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0xfe, high, low), Ipv4Addr::new(127, 0xfd, low, high)];
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for address in addresses {
        match TcpListener::bind((address, 0)) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn token(op: Op) -> Token {
    Token::new(op, 0, 0)
}

/// Waits for the next completion of `op`, which must be `good`.
fn expect(
    ring: &mut Ring,
    seen: &mut Vec<Completion>,
    op: Op,
    good: impl Fn(&Completion) -> bool,
) -> Result<Completion, ProbeError> {
    for _ in 0..100 {
        ring.enter(Wait::For(Duration::from_millis(10)))?;
        ring.completions(seen);
        if let Some(place) = seen.iter().position(|c| c.token.op == op) {
            let completion = seen.remove(place);
            let result = completion.result;
            return if good(&completion) { Ok(completion) } else { Err(ProbeError::Broken { op, result }) };
        }
    }
    Err(ProbeError::Stuck { op })
}

fn stream_socket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_works_here() {
        probe().unwrap();
    }
}
