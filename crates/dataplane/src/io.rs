//! What a worker asks of an engine: the ring's operations and completions, whoever provides them.
//!
//! [`uring::Ring`] is the product. The other engines imitate it, operation for operation and completion for completion, so
//! that everything above (flows, limits, logs) is written once and one conformance suite holds for all of them.
//!
//! The contract, beyond what [`uring::Ring`] documents for each operation:
//!
//! * every operation completes: with [`Completion::more`] any number of times, and once without it, also when cancelled;
//! * nothing is sure to happen before [`Io::enter`] hands it over, and completions are seen only by [`Io::completions`];
//! * cancelling what has completed is no error and completes nothing;
//! * what is cancelled may still take its time: a receive or a send that the kernel has completes with its next bytes, or
//!   when its socket is closed, where an engine cannot take it back;
//! * a descriptor that is closed with [`Io::close`] has nothing in flight but what was cancelled before, in that order;
//! * a descriptor that had an operation is closed with [`Io::close`] and in no other way.

use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};

use uring::{Completion, Datagrams, EnterError, Group, Local, Part, Ring, Setup, SetupError, Token, Wait};

/// One worker's engine: submissions, completions, and the buffers that receives take.
pub(crate) trait Io: Sized {
    /// Makes it, on the thread that will use it.
    fn start(setup: Setup) -> Result<Self, SetupError>;

    /// Accepts connections until cancelled or failed; each successful completion carries a socket.
    fn accept(&mut self, listener: BorrowedFd<'_>, token: Token) -> Result<(), EnterError>;

    /// Connects; the result is 0 or a negated errno.
    fn connect(
        &mut self,
        socket: BorrowedFd<'_>,
        address: &SocketAddr,
        token: Token,
    ) -> Result<(), EnterError>;

    /// Receives until cancelled, failed, at the end of the stream (result 0), or without a buffer of [`Group::Shared`]
    /// (`ENOBUFS`).
    fn recv_many(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError>;

    /// Receives once, into one buffer of the group; without one when bytes come, `ENOBUFS`.
    fn recv_once(&mut self, socket: BorrowedFd<'_>, group: Group, token: Token) -> Result<(), EnterError>;

    /// Sends a part of a held buffer, as much of it as there is room for; `EAGAIN` where there is none. (An engine may as well
    /// wait for room and send all of it.)
    fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: u16,
        start: u32,
        length: u32,
        token: Token,
    ) -> Result<(), EnterError>;

    /// Receives datagrams, with who sent them, until cancelled, failed, or without a buffer of [`Group::Datagrams`]; an empty one
    /// may end it too. See [`Io::datagrams`].
    fn recv_datagrams(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError>;

    /// The same on a connected socket that receives no trains: buffers hold the payload alone.
    fn recv_connected(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError>;

    /// What a completion of [`Io::recv_datagrams`] left in a held buffer.
    fn datagrams(&self, buffer: u16, result: i32) -> Option<Datagrams>;

    /// The bytes of a held buffer.
    fn bytes(&self, buffer: u16, start: u32, length: u32) -> &[u8];

    /// Sends the parts as one datagram, or as a train of datagrams of `segment` bytes each (0: one), at once or not at all
    /// (`EAGAIN`), to and from these addresses.
    fn send_datagrams(
        &mut self,
        socket: BorrowedFd<'_>,
        route: (Option<&SocketAddr>, Option<Local>),
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError>;

    /// The same on a connected socket, with `header` before each of the datagrams: the engine keeps a copy as long as it needs it.
    fn send_headed(
        &mut self,
        socket: BorrowedFd<'_>,
        header: &[u8],
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError>;

    /// One completion when there is something to read, the end of the stream, or an error.
    fn poll_readable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError>;

    /// One completion when there is room to write, or an error; or at once with `POLLRDHUP` alone, where an engine cannot
    /// wait for one without the other: then [`Self::poll_room`] waits.
    fn poll_writable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError>;

    /// As [`Self::poll_writable`], for a socket whose peer has sent its FIN. It may complete more than once, also in vain,
    /// until it is cancelled.
    fn poll_room(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.poll_writable(file, token)
    }

    /// Completes with `POLLERR` in its result when the connection has an error: RST, or what amounts to it. It may complete with
    /// other events before, also more than once, and goes on until it is cancelled or says that it does not. The error stays the
    /// socket's: a receive or send is still told.
    fn poll_error(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError>;

    /// Cancels what was submitted with `target`. That still completes, with `ECANCELED` or as if never cancelled.
    fn cancel(&mut self, target: Token) -> Result<(), EnterError>;

    /// Closes the descriptor after all that is queued for it.
    fn close(&mut self, file: OwnedFd) -> Result<(), EnterError>;

    /// Hands over what is queued and waits for a completion.
    fn enter(&mut self, wait: Wait) -> Result<(), EnterError>;

    /// Takes the completions that are there.
    fn completions(&mut self, into: &mut Vec<Completion>);

    /// System calls made to enter.
    fn enters(&self) -> u64;

    /// Completions that found the queue full.
    fn completion_overflows(&mut self) -> u32;

    /// Buffers of the group that there are.
    fn buffers(&self, group: Group) -> u32;

    /// How many of them hold bytes on their way.
    fn buffers_held(&self, group: Group) -> u32;

    /// How many wait for bytes.
    fn buffers_free(&self, group: Group) -> u32;

    /// Makes up to `more` further buffers; returns how many.
    fn grow(&mut self, group: Group, more: u32) -> u32;

    /// Has no more than `keep` buffers of the group from now on, as those beyond come back; to be called again while there are more.
    fn shrink(&mut self, group: Group, keep: u32) -> Result<(), EnterError>;

    /// Most buffers of the group that were held at once since the last call.
    fn most_held(&mut self, group: Group) -> u32;

    /// Gives a held buffer back.
    fn release(&mut self, buffer: u16);
}

impl Io for Ring {
    fn start(setup: Setup) -> Result<Self, SetupError> {
        Self::new(setup)
    }

    fn accept(&mut self, listener: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.accept(listener, token)
    }

    fn connect(
        &mut self,
        socket: BorrowedFd<'_>,
        address: &SocketAddr,
        token: Token,
    ) -> Result<(), EnterError> {
        self.connect(socket, address, token)
    }

    fn recv_many(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.recv_many(socket, token)
    }

    fn recv_once(&mut self, socket: BorrowedFd<'_>, group: Group, token: Token) -> Result<(), EnterError> {
        self.recv_once(socket, group, token)
    }

    fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: u16,
        start: u32,
        length: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        self.send(socket, buffer, start, length, token)
    }

    fn recv_datagrams(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.recv_datagrams(socket, token)
    }

    fn recv_connected(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.recv_connected(socket, token)
    }

    fn datagrams(&self, buffer: u16, result: i32) -> Option<Datagrams> {
        self.datagrams(buffer, result)
    }

    fn bytes(&self, buffer: u16, start: u32, length: u32) -> &[u8] {
        self.pool().bytes(buffer, start, length)
    }

    fn send_datagrams(
        &mut self,
        socket: BorrowedFd<'_>,
        route: (Option<&SocketAddr>, Option<Local>),
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        self.send_datagrams(socket, route, parts, segment, token)
    }

    fn send_headed(
        &mut self,
        socket: BorrowedFd<'_>,
        header: &[u8],
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        self.send_headed(socket, header, parts, segment, token)
    }

    fn poll_readable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.poll_readable(file, token)
    }

    fn poll_writable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.poll_writable(file, token)
    }

    fn poll_room(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.poll_room(file, token)
    }

    fn poll_error(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.poll_error(file, token)
    }

    fn cancel(&mut self, target: Token) -> Result<(), EnterError> {
        self.cancel(target)
    }

    fn close(&mut self, file: OwnedFd) -> Result<(), EnterError> {
        self.close(file)
    }

    fn enter(&mut self, wait: Wait) -> Result<(), EnterError> {
        self.enter(wait)
    }

    fn completions(&mut self, into: &mut Vec<Completion>) {
        self.completions(into);
    }

    fn enters(&self) -> u64 {
        self.enters()
    }

    fn completion_overflows(&mut self) -> u32 {
        self.completion_overflows()
    }

    fn buffers(&self, group: Group) -> u32 {
        self.pool().buffers(group)
    }

    fn buffers_held(&self, group: Group) -> u32 {
        self.pool().held(group)
    }

    fn buffers_free(&self, group: Group) -> u32 {
        self.pool().free(group)
    }

    fn grow(&mut self, group: Group, more: u32) -> u32 {
        self.pool_mut().grow(group, more)
    }

    fn shrink(&mut self, group: Group, keep: u32) -> Result<(), EnterError> {
        self.shrink(group, keep)
    }

    fn most_held(&mut self, group: Group) -> u32 {
        self.pool_mut().most_held(group)
    }

    fn release(&mut self, buffer: u16) {
        self.pool_mut().release(buffer);
    }
}
