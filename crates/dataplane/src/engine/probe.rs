//! Does an engine really work here? Asked once, before one is chosen.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use uring::{Completion, EnterError, Group, Op, Setup, SetupError, Token, Wait};

use crate::io::Io;

/// Why an engine cannot be used.
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
    #[error("the probe could not open a loopback connection: {0}")]
    Socket(#[from] io::Error),
    /// An operation that the dataplane needs did not do what it should.
    #[error("it is there but {op:?} does not work here (result {result})")]
    Broken {
        /// The operation.
        op: Op,
        /// What it gave: 0 or more, or a negated errno.
        result: i32,
    },
    /// An operation that the dataplane needs did not finish.
    #[error("it is there but {op:?} did not complete within a second")]
    Stuck {
        /// The operation.
        op: Op,
    },
}

/// Sends bytes around a loopback connection with the operations that the dataplane uses: multishot accept, connect,
/// multishot receive, send, cancel, single receive, both polls, close.
///
/// On a thread of its own: some time after a ring is gone the kernel interrupts the thread that had used it
/// (`io_ring_exit_work` adds task work with a signal), and the caller's system calls should not fail with `EINTR` for it.
pub(super) fn probe<I: Io>(setup: Setup) -> Result<(), ProbeError> {
    let thread =
        std::thread::Builder::new().name("probe".to_owned()).spawn(move || round_trip::<I>(setup))?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the probe panicked, which is a bug").into()))
}

fn round_trip<I: Io>(setup: Setup) -> Result<(), ProbeError> {
    let mut io = I::start(setup)?;
    let mut seen = Vec::new();
    let listener = listen()?;
    listener.set_nonblocking(true)?;
    let address: SocketAddr = listener.local_addr()?;
    io.accept(listener.as_fd(), token(Op::Accept))?;

    let client = stream_socket()?;
    io.connect(client.as_fd(), &address, token(Op::Connect))?;
    expect(&mut io, &mut seen, Op::Connect, |c| c.result == 0)?;
    let accepted = expect(&mut io, &mut seen, Op::Accept, |c| c.result >= 0 && c.more)?;
    let server = accepted.socket.ok_or(ProbeError::Broken { op: Op::Accept, result: accepted.result })?;
    io.poll_writable(client.as_fd(), token(Op::WritableBackend))?;
    expect(&mut io, &mut seen, Op::WritableBackend, |c| c.result > 0)?;

    let mut client = TcpStream::from(client);
    client.set_nonblocking(false)?;
    client.set_read_timeout(Some(Duration::from_secs(1)))?;
    io.recv_many(server.as_fd(), token(Op::RecvClient))?;
    client.write_all(b"trim")?;
    let received =
        expect(&mut io, &mut seen, Op::RecvClient, |c| c.result == 4 && c.more && c.buffer.is_some())?;
    let buffer = received.buffer.ok_or(ProbeError::Broken { op: Op::RecvClient, result: 4 })?;
    io.send(server.as_fd(), buffer, 0, 4, token(Op::SendClient))?;
    expect(&mut io, &mut seen, Op::SendClient, |c| c.result == 4)?;
    io.release(buffer);
    let mut echo = [0; 4];
    client.read_exact(&mut echo)?;

    // Cancelled, it ends, at the latest with the next bytes.
    io.cancel(token(Op::RecvClient))?;
    io.enter(Wait::No)?;
    client.write_all(b"tab")?;
    let ended = expect(&mut io, &mut seen, Op::RecvClient, |c| !c.more)?;
    match ended.buffer {
        Some(buffer) => io.release(buffer),
        None => receive_once(&mut io, &mut seen, &server)?,
    }
    io.poll_readable(server.as_fd(), token(Op::ReadableClient))?;
    client.write_all(b"tab")?;
    expect(&mut io, &mut seen, Op::ReadableClient, |c| c.result > 0)?;
    receive_once(&mut io, &mut seen, &server)?;
    io.close(server)?;
    io.enter(Wait::No)?;
    match client.read(&mut echo)? {
        0 => Ok(()),
        n => Err(ProbeError::Broken { op: Op::Close, result: n as i32 }),
    }
}

/// Three bytes that are there, by a single receive.
fn receive_once<I: Io>(io: &mut I, seen: &mut Vec<Completion>, server: &OwnedFd) -> Result<(), ProbeError> {
    io.grow(Group::First, 8);
    io.recv_once(server.as_fd(), Group::First, token(Op::RecvClient))?;
    let once = expect(io, seen, Op::RecvClient, |c| c.result == 3 && !c.more && c.buffer.is_some())?;
    once.buffer.into_iter().for_each(|buffer| io.release(buffer));
    Ok(())
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
fn expect<I: Io>(
    io: &mut I,
    seen: &mut Vec<Completion>,
    op: Op,
    good: impl Fn(&Completion) -> bool,
) -> Result<Completion, ProbeError> {
    for _ in 0..100 {
        if let Some(place) = seen.iter().position(|c| c.token.op == op) {
            let completion = seen.remove(place);
            let result = completion.result;
            return if good(&completion) { Ok(completion) } else { Err(ProbeError::Broken { op, result }) };
        }
        io.enter(Wait::For(Duration::from_millis(10)))?;
        io.completions(seen);
    }
    Err(ProbeError::Stuck { op })
}

fn stream_socket() -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    Ok(socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}
