//! Operations for a ring that somebody else drives: crate `tokio-uring`, which takes prepared entries of `io-uring` 0.6 that
//! complete once (`tokio_uring::UnsubmittedOneshot`).
//!
//! Owns: how such an operation is written down, and that what it points to lives as long as it. Does not own: the ring, nor
//! when an operation is handed to it.
//!
//! What makes it sound: an operation that points into a pool's memory comes with a [`Memory`] in [`Oneshot::memory`].
//! `tokio-uring` keeps what is stored with an operation until it is complete, also when its future is dropped, so the memory
//! stays mapped. That nobody reads what the kernel may write is the pool's doing, as with our own ring: a buffer that was
//! provided is not held until [`BufferPool::take`], and one that is being sent stays held until the completion.

use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring_06::opcode;
use io_uring_06::squeue::Flags;
use io_uring_06::types::Fd;

pub use io_uring_06::cqueue::Entry as Outcome;
pub use io_uring_06::squeue::Entry;

use crate::buffers::{BufferPool, Group, Memory};

/// An operation, and what must live until it is complete.
#[derive(Debug)]
pub struct Oneshot {
    /// What to submit.
    pub entry: Entry,
    /// To be stored with it.
    pub memory: Option<Memory>,
}

/// Receives once, into a provided buffer of the group; without one, `ENOBUFS`.
pub fn recv(pool: &BufferPool, socket: BorrowedFd<'_>, group: Group) -> Oneshot {
    let recv = opcode::Recv::new(fd(socket), std::ptr::null_mut(), pool.buffer_bytes(group));
    let entry = recv.buf_group(group.id()).build().flags(Flags::BUFFER_SELECT);
    Oneshot { entry, memory: Some(pool.memory()) }
}

/// Sends a part of a held buffer, which must stay held until the completion: as much as there is room for, `EAGAIN` where there
/// is none (see [`crate::Ring::send`]).
///
/// # Panics
/// If the buffer is not held.
pub fn send(pool: &BufferPool, socket: BorrowedFd<'_>, buffer: u16, start: u32, length: u32) -> Oneshot {
    let address = pool.held_bytes(buffer, start, length);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let entry = opcode::Send::new(fd(socket), address, length).flags(flags).build();
    Oneshot { entry, memory: Some(pool.memory()) }
}

/// Gives the kernel a row of free buffers of the group: the operation, its first buffer and how many. `None`: it has all.
/// If the operation fails, [`BufferPool::provide_failed`] takes them back.
pub fn provide(pool: &mut BufferPool, group: Group) -> Option<(Oneshot, u16, u16)> {
    let row = pool.next_provided(group)?;
    // Their distance as their length: the kernel takes the next buffer to be where the one before ends. Receives ask for no
    // more than a buffer has.
    let provide = opcode::ProvideBuffers::new(row.address, row.stride, row.count, group.id(), row.first);
    Some((Oneshot { entry: provide.build(), memory: Some(pool.memory()) }, row.first, row.count))
}

/// Completes when there is something to read, the end of the stream, or an error.
pub fn poll_readable(file: BorrowedFd<'_>) -> Oneshot {
    poll(file, libc::POLLIN | libc::POLLRDHUP)
}

/// Completes when there is room to write, or an error.
pub fn poll_writable(file: BorrowedFd<'_>) -> Oneshot {
    poll(file, libc::POLLOUT)
}

/// The buffer that a receive took.
pub fn buffer_of(outcome: &Outcome) -> Option<u16> {
    io_uring_06::cqueue::buffer_select(outcome.flags())
}

fn poll(file: BorrowedFd<'_>, events: libc::c_short) -> Oneshot {
    Oneshot { entry: opcode::PollAdd::new(fd(file), events as u32).build(), memory: None }
}

fn fd(file: BorrowedFd<'_>) -> Fd {
    Fd(file.as_raw_fd())
}
