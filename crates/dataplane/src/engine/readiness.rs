//! What the two engines that wait for readiness have in common: system calls that do not wait.

use std::hash::Hasher;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags};
use uring::{BufferPool, Completion, Group, Lent, Local, Part, Token};

/// Connections that one listener accepts a turn.
const ACCEPTS_A_TURN: usize = 64;

/// What became of an operation's turn.
pub(super) enum Turn {
    /// It has completed. `drained`: and took the last that there was to read.
    Done { drained: bool },
    /// It must wait for an edge.
    Wait,
    /// It could go on, after the others.
    More,
}

/// Accepts what waits, up to a turn's worth.
pub(super) fn accept(listener: &Lent, token: Token, done: &mut Vec<Completion>) -> Turn {
    for _ in 0..ACCEPTS_A_TURN {
        match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => {
                let result = socket.as_raw_fd();
                done.push(Completion { token, result, more: true, buffer: None, socket: Some(socket) });
            }
            Err(Errno::AGAIN) => return Turn::Wait,
            // Of one connection, which is gone: the others are still there.
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => {
                let result = -error.raw_os_error();
                done.push(Completion { token, result, more: false, buffer: None, socket: None });
                return Turn::Done { drained: false };
            }
        }
    }
    Turn::More
}

/// Datagrams, or trains of them, that one socket receives a turn: the kernel's own bound for a multishot receive.
const DATAGRAMS_A_TURN: usize = 32;

/// Receives what waits, up to a turn's worth. `connected`: payload alone.
pub(super) fn receive_datagrams(
    socket: &Lent,
    pool: &mut BufferPool,
    token: Token,
    connected: bool,
    done: &mut Vec<Completion>,
) -> Turn {
    for _ in 0..DATAGRAMS_A_TURN {
        let mut complete = |result, more, buffer| {
            done.push(Completion { token, result, more, buffer, socket: None });
        };
        let Some(buffer) = pool.take_free(Group::Datagrams) else {
            complete(-Errno::NOBUFS.raw_os_error(), false, None);
            return Turn::Done { drained: false };
        };
        let room = pool.bytes_mut(buffer);
        let received = if connected {
            rustix::net::recv(socket, room, RecvFlags::DONTWAIT).map(|(_, bytes)| bytes as i32)
        } else {
            uring::receive_message(socket.as_fd(), room)
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
        };
        match received {
            Ok(result) => complete(result, true, Some(buffer)),
            Err(error) => {
                pool.release(buffer);
                match error {
                    Errno::AGAIN => return Turn::Wait,
                    Errno::INTR => {}
                    _ => {
                        complete(-error.raw_os_error(), false, None);
                        return Turn::Done { drained: false };
                    }
                }
            }
        }
    }
    Turn::More
}

/// Sends datagrams, at once or not at all; gives the result of the completion.
pub(super) fn send_datagrams(
    pool: &BufferPool,
    socket: BorrowedFd<'_>,
    route: (Option<&SocketAddr>, Option<Local>),
    parts: &[Part],
    segment: u32,
) -> i32 {
    let bytes = parts.iter().map(|part| pool.bytes(part.buffer, part.start, part.length));
    result_of(uring::send_message(socket, route, bytes, segment))
}

/// The same on a connected socket, with `header` before each datagram.
pub(super) fn send_headed(
    pool: &BufferPool,
    socket: BorrowedFd<'_>,
    header: &[u8],
    parts: &[Part],
    segment: u32,
) -> i32 {
    let bytes = |part: Part| pool.bytes(part.buffer, part.start, part.length);
    result_of(uring::send_headed_message(socket, header, parts, segment, bytes))
}

fn result_of(sent: std::io::Result<usize>) -> i32 {
    match sent {
        Ok(sent) => sent as i32,
        Err(error) => -error.raw_os_error().unwrap_or_else(|| Errno::IO.raw_os_error()),
    }
}

/// Begins a connect. It is over when the socket can be written to, and `SO_ERROR` says how it ended.
pub(super) fn begin_connect(socket: BorrowedFd<'_>, address: &SocketAddr) -> Result<(), Errno> {
    rustix::io::ioctl_fionbio(socket, true)?;
    match rustix::net::connect(socket, address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Hashes descriptors and tokens, which no peer chooses: one multiplication for each number (Knuth, TAOCP 3, 6.4).
#[derive(Debug, Default)]
pub(super) struct Mix(u64);

impl Mix {
    fn add(&mut self, number: u64) {
        // 2^64 over the golden ratio. The high bits are the good ones, and hash tables look at both ends.
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.add(u64::from(*byte)));
    }

    fn write_u32(&mut self, number: u32) {
        self.add(u64::from(number));
    }

    fn write_i32(&mut self, number: i32) {
        self.add(number as u64);
    }

    fn write_isize(&mut self, number: isize) {
        self.add(number as u64);
    }
}
