//! Pipes for halves that are spliced, used again and again.
//!
//! `splice(2)` moves pages between a socket and a pipe without copying them. A pipe costs two descriptors and, while bytes
//! wait in it, their pages; so a worker has few, for the flows that move most.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use flow::FillEnd;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

/// Pipes of one worker. The kernel lets an unprivileged user have 64 MiB of large pipes
/// (`fs.pipe-user-pages-soft`): 64 of [`PIPE_BYTES`] over all workers; beyond, pipes get small.
pub(crate) const PIPES_MAX: usize = 32;
/// Asked for each: what one wake may move. `fs.pipe-max-size` allows this much by default.
const PIPE_BYTES: usize = 1 << 20;
/// Below it a pipe moves no more at once than a few buffers do, and is not worth having.
const PIPE_BYTES_MIN: usize = 256 << 10;

/// A worker's pipes that are not in use, and how many there are in all.
#[derive(Debug, Default)]
pub(crate) struct Pipes {
    free: Vec<Pipe>,
    made: usize,
}

/// A pipe and what is in it.
#[derive(Debug)]
pub(crate) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    bytes: usize,
    pending: usize,
}

impl Pipes {
    /// A pipe; `None` when all are in use or the kernel gives none that is large enough.
    pub(crate) fn take(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.free.pop() {
            return Some(pipe);
        }
        if self.made >= PIPES_MAX {
            return None;
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
        let bytes = fcntl_setpipe_size(&write, PIPE_BYTES).ok().filter(|bytes| *bytes >= PIPE_BYTES_MIN)?;
        self.made += 1;
        Some(Pipe { read, write, bytes, pending: 0 })
    }

    /// Closes those that are not in use.
    pub(crate) fn close_free(&mut self) {
        self.made -= self.free.len();
        self.free.clear();
    }

    /// Takes a pipe back. One with bytes in it is closed: they are of a flow that has ended.
    pub(crate) fn put(&mut self, pipe: Pipe) {
        if pipe.pending == 0 {
            self.free.push(pipe);
        } else {
            self.made -= 1;
        }
    }
}

impl Pipe {
    /// Moves what the socket has into the pipe, without waiting. The socket must not block (`O_NONBLOCK`).
    pub(crate) fn fill(&mut self, from: BorrowedFd<'_>) -> (u32, FillEnd) {
        let room = self.bytes.saturating_sub(self.pending);
        match splice(from, None, self.write.as_fd(), None, room, SpliceFlags::MOVE | SpliceFlags::NONBLOCK) {
            // Nothing was asked for: it is not the end.
            Ok(0) if room == 0 => (0, FillEnd::Blocked),
            Ok(0) => (0, FillEnd::Eof),
            Ok(bytes) => {
                self.pending += bytes;
                (bytes as u32, FillEnd::Blocked)
            }
            Err(Errno::AGAIN | Errno::INTR) => (0, FillEnd::Blocked),
            Err(_) => (0, FillEnd::Reset),
        }
    }

    /// Moves what is in the pipe to the socket, without waiting. Says how much, and whether the socket takes no more for
    /// ever.
    pub(crate) fn flush(&mut self, to: BorrowedFd<'_>) -> (u32, bool) {
        match splice(
            self.read.as_fd(),
            None,
            to,
            None,
            self.pending,
            SpliceFlags::MOVE | SpliceFlags::NONBLOCK,
        ) {
            Ok(bytes) => {
                self.pending -= bytes;
                (bytes as u32, false)
            }
            Err(Errno::AGAIN | Errno::INTR) => (0, false),
            Err(_) => (0, true),
        }
    }
}
