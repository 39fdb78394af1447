//! The ring of one worker: queue submissions, enter once, take completions.

use std::io;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use crate::buffers::{BufferPool, Group};
use crate::datagrams::{
    CONTROL_BYTES, Control, Datagrams, Local, Messages, NAME_BYTES, Part, headed, headed_segment,
};
use crate::token::{Op, Token};

/// How large a ring is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// Submissions that fit before the queue must be handed to the kernel. A power of two.
    pub submissions: u32,
    /// Shared buffers that exist at the start.
    pub shared: u32,
    /// Most shared buffers; rounded up to a power of two, at most 16,384.
    pub shared_max: u32,
    /// Most first buffers; rounded up to a power of two, at most 32,768. None exists at the start.
    pub first_max: u32,
    /// Bytes of one buffer of these two.
    pub buffer_bytes: u32,
    /// Most buffers for datagrams; rounded up to a power of two, at most 8,192. None exists at the start.
    pub datagrams_max: u32,
    /// Bytes of one of those; see [`crate::DATAGRAM_OVERHEAD`].
    pub datagram_bytes: u32,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            submissions: 1_024,
            shared: 256,
            shared_max: 1_024,
            first_max: 8_192,
            buffer_bytes: 16 * 1_024,
            datagrams_max: 8,
            datagram_bytes: 64 * 1_024,
        }
    }
}

/// Why a ring could not be made: what the operator can change.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// `EPERM`.
    #[error(
        "io_uring is forbidden here: the sysctl kernel.io_uring_disabled is not 0, or a seccomp profile (Docker's \
         default one does) denies io_uring_setup; allow it for this process"
    )]
    Forbidden,
    /// `ENOSYS`.
    #[error("this kernel has no io_uring, or a sandbox hides it (gVisor and some container engines do)")]
    Missing,
    /// `EINVAL`.
    #[error(
        "this kernel's io_uring is too old ({step}: {source}); the engine uring needs Linux 6.1 or newer, tokio-uring 5.11"
    )]
    TooOld {
        /// What was refused.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// `ENOMEM`.
    #[error(
        "no memory for the ring ({step}: {source}); if `ulimit -l` (memlock) is small, raise it, else lower \
         buffers_max"
    )]
    Memory {
        /// What was refused.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Anything else.
    #[error("setting the engine up failed at {step}: {source}")]
    Other {
        /// What was refused.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl SetupError {
    /// What the kernel's answer at a step of the setup amounts to.
    pub fn at(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Forbidden,
            Some(libc::ENOSYS) => Self::Missing,
            Some(libc::EINVAL) => Self::TooOld { step, source },
            Some(libc::ENOMEM) => Self::Memory { step, source },
            _ => Self::Other { step, source },
        }
    }
}

/// The kernel refused to take submissions, or to wait: the engine is unusable.
#[derive(Debug, thiserror::Error)]
#[error("entering the kernel for completions failed: {0}")]
pub struct EnterError(#[from] io::Error);

/// An eventfd that gives 1 to each of so many reads, and makes none wait.
fn semaphore(reads: u32) -> Option<OwnedFd> {
    // SAFETY: eventfd(2) touches no memory of ours.
    let file = unsafe { libc::eventfd(reads, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK | libc::EFD_SEMAPHORE) };
    // SAFETY: it was just opened, and nobody else knows of it.
    (file >= 0).then(|| unsafe { OwnedFd::from_raw_fd(file) })
}

/// How long [`Ring::enter`] may wait for a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// At most this long.
    For(Duration),
    /// Until there is one.
    Forever,
}

/// Something that was submitted is done, or (multishot) has something to say.
#[derive(Debug)]
pub struct Completion {
    /// What it is about.
    pub token: Token,
    /// 0 or more, or a negated errno.
    pub result: i32,
    /// More completions of this submission will come.
    pub more: bool,
    /// The buffer that holds the received bytes; it is held until [`BufferPool::release`].
    pub buffer: Option<u16>,
    /// The accepted connection.
    pub socket: Option<OwnedFd>,
}

/// A ring and its buffers, for one thread.
pub struct Ring {
    ring: ManuallyDrop<IoUring>,
    pool: ManuallyDrop<BufferPool>,
    /// Addresses of queued connects. The kernel copies them when it consumes the submission.
    addresses: Box<[libc::sockaddr_storage]>,
    addresses_used: usize,
    /// What queued sends of datagrams point to.
    messages: Messages,
    /// What receives of datagrams ask for: room for an address and control messages. The kernel copies it with each.
    receive_form: Box<libc::msghdr>,
    /// Submissions whose last completion has not come (those that complete silently are not counted).
    in_flight: usize,
    enters: u64,
}

/// Free buffers that one [`Ring::shrink`] takes from the kernel at most: what comes meanwhile waits for them.
const WITHDRAWN_AT_ONCE: u32 = 512;

impl Ring {
    /// Makes the ring. It must be used on the thread that made it: the kernel checks (`IORING_SETUP_SINGLE_ISSUER`).
    pub fn new(setup: Setup) -> Result<Self, SetupError> {
        let mut builder = IoUring::builder();
        builder
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_clamp()
            .setup_cqsize(setup.submissions * 4);
        let ring = builder.build(setup.submissions).map_err(SetupError::at("io_uring_setup"))?;
        let mut pool = BufferPool::new(&setup).map_err(SetupError::at("reserving memory for buffers"))?;
        for (address, entries, group) in pool.registrations() {
            // SAFETY: the address is that of a mapping of `entries` buffer ring entries, page-aligned, which this struct
            // keeps until after the ring is gone (see `Drop`).
            unsafe { ring.submitter().register_buf_ring_with_flags(address, entries, group, 0) }
                .map_err(SetupError::at("io_uring_register_buf_ring"))?;
        }
        pool.grow(Group::Shared, setup.shared);
        // SAFETY: sockaddr_storage is a C struct of integers, for which all zeroes is a value (AF_UNSPEC).
        let zeroed: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        // SAFETY: msghdr is a C struct of integers and pointers, for which all zeroes is a value.
        let mut receive_form: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        receive_form.msg_namelen = NAME_BYTES as libc::socklen_t;
        receive_form.msg_controllen = CONTROL_BYTES as _;
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            pool: ManuallyDrop::new(pool),
            addresses: vec![zeroed; setup.submissions as usize].into(),
            addresses_used: 0,
            messages: Messages::new(),
            receive_form,
            in_flight: 0,
            enters: 0,
        })
    }

    /// The receive buffers.
    pub fn pool(&self) -> &BufferPool {
        &self.pool
    }

    /// The receive buffers, to make more of them and to give them back.
    pub fn pool_mut(&mut self) -> &mut BufferPool {
        &mut self.pool
    }

    /// As [`BufferPool::shrink`], and has some of the free buffers back from the kernel, which takes them in turn: those that
    /// stay are offered again, the others go. To be called again while there are too many.
    ///
    /// Nothing else gets a buffer out of a ring that the kernel is taking from. So each is received into: eight bytes of an eventfd.
    pub fn shrink(&mut self, group: Group, keep: u32) -> Result<(), EnterError> {
        if self.pool.shrink(group, keep) == 0 {
            return Ok(());
        }
        let count = self.pool.free(group).min(WITHDRAWN_AT_ONCE);
        // Without a descriptor left, or with nothing to take, another time will do.
        let Some(source) = (count > 0).then(|| semaphore(count)).flatten() else { return Ok(()) };
        for _ in 0..count {
            let read = opcode::Read::new(Fd(source.as_raw_fd()), std::ptr::null_mut(), 8);
            let read = read.buf_group(group.id()).build().flags(squeue::Flags::BUFFER_SELECT);
            self.push(&read, Token::new(Op::Withdraw, 0, 0))?;
        }
        self.close(source)
    }

    /// Submissions whose last completion has not come.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// System calls made to enter.
    pub fn enters(&self) -> u64 {
        self.enters
    }

    /// Completions that found the queue full. They are not lost (the kernel keeps them), but slow: the queue is too
    /// small.
    pub fn completion_overflows(&mut self) -> u32 {
        self.ring.completion().overflow()
    }

    /// Accepts connections until cancelled or failed; each successful completion carries a socket.
    pub fn accept(&mut self, listener: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        let entry = opcode::AcceptMulti::new(fd(listener)).flags(libc::SOCK_CLOEXEC).build();
        self.push(&entry, token)
    }

    /// Connects; the result is 0 or a negated errno.
    pub fn connect(
        &mut self,
        socket: BorrowedFd<'_>,
        address: &SocketAddr,
        token: Token,
    ) -> Result<(), EnterError> {
        self.make_room()?;
        if self.addresses_used == self.addresses.len() {
            self.submit()?;
        }
        let place = &mut self.addresses[self.addresses_used];
        self.addresses_used += 1;
        let length = write_address(place, address);
        let entry = opcode::Connect::new(fd(socket), std::ptr::from_ref(place).cast(), length).build();
        self.push(&entry, token)
    }

    /// Receives until cancelled, failed, at the end of the stream (result 0), or without a buffer of [`Group::Shared`]
    /// (`ENOBUFS`). Each completion with bytes carries a buffer; how many come at once is up to the kernel.
    pub fn recv_many(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.push(&opcode::RecvMulti::new(fd(socket), Group::Shared.id()).build(), token)
    }

    /// Receives once, into one buffer of the group; without one when bytes come, `ENOBUFS`.
    pub fn recv_once(
        &mut self,
        socket: BorrowedFd<'_>,
        group: Group,
        token: Token,
    ) -> Result<(), EnterError> {
        let recv = opcode::Recv::new(fd(socket), std::ptr::null_mut(), self.pool.buffer_bytes(group));
        let recv = recv.buf_group(group.id()).build().flags(squeue::Flags::BUFFER_SELECT);
        self.push(&recv, token)
    }

    /// Sends a part of a held buffer, as much of it as there is room for; `EAGAIN` where there is none. The buffer must stay
    /// held until the completion.
    ///
    /// It does not wait for room: the kernel would wait as [`Self::poll_writable`] does, be woken again and again by a FIN that
    /// the peer sent long ago, and after 128 times hand the operation to a thread of its own.
    ///
    /// # Panics
    /// If the buffer is not held.
    pub fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: u16,
        start: u32,
        length: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        let address = self.pool.held_bytes(buffer, start, length);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        self.push(&opcode::Send::new(fd(socket), address, length).flags(flags).build(), token)
    }

    /// Receives datagrams with who sent them, to where, and in trains, until cancelled, failed, or without a buffer of
    /// [`Group::Datagrams`] (`ENOBUFS`). It also ends with an empty datagram, which the completion carries like any other.
    pub fn recv_datagrams(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        let form = std::ptr::from_ref(&*self.receive_form);
        self.push(&opcode::RecvMsgMulti::new(fd(socket), form, Group::Datagrams.id()).build(), token)
    }

    /// Receives single datagrams of a connected socket, payload alone; ends like [`Ring::recv_datagrams`]. On a socket that
    /// receives trains their parts could not be told apart.
    pub fn recv_connected(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.push(&opcode::RecvMulti::new(fd(socket), Group::Datagrams.id()).build(), token)
    }

    /// What a completion of [`Ring::recv_datagrams`] with this result left in a held buffer. `None`: the datagram did not fit,
    /// or does not come from an internet address.
    pub fn datagrams(&self, buffer: u16, result: i32) -> Option<Datagrams> {
        self.pool.datagrams(buffer, result)
    }

    /// Sends the parts as one datagram, or as a train of datagrams of `segment` bytes each (0: one). To `to`, where the socket
    /// is not connected, and from `from`, where it is bound to any address. At once or not at all: without room in the socket's
    /// send buffer the result is `EAGAIN`. The buffers must stay held until the completion.
    ///
    /// # Panics
    /// If a buffer is not held.
    pub fn send_datagrams(
        &mut self,
        socket: BorrowedFd<'_>,
        (to, from): (Option<&SocketAddr>, Option<Local>),
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        // Before anything is kept for it: handing the queue over forgets what was kept.
        self.make_room()?;
        if self.messages.is_full(parts.len()) {
            self.submit()?;
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let Self { pool, messages, .. } = self;
        let bytes = |part: &Part| (pool.held_bytes(part.buffer, part.start, part.length), part.length);
        let entry = match parts {
            [] | [_] if segment == 0 && from.is_none() => {
                let (address, length) = parts.first().map_or((std::ptr::null(), 0), bytes);
                let send = opcode::Send::new(fd(socket), address, length).flags(flags);
                match to.map(|to| messages.address(to)) {
                    Some((address, length)) => send.dest_addr(address).dest_addr_len(length).build(),
                    None => send.build(),
                }
            }
            _ => {
                let message = messages.message(to, Control::new(segment, from), parts.iter().map(bytes));
                opcode::SendMsg::new(fd(socket), message).flags(flags as u32).build()
            }
        };
        self.push(&entry, token)
    }

    /// As [`Ring::send_datagrams`] on a connected socket, with `header` before each of the datagrams. It is copied.
    ///
    /// # Panics
    /// If a buffer is not held, or the header is longer than a datagram.
    pub fn send_headed(
        &mut self,
        socket: BorrowedFd<'_>,
        header: &[u8],
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        self.make_room()?;
        let pieces = headed(parts, segment).count();
        while self.messages.is_full(pieces) || self.messages.is_full_of_prefixes(header.len()) {
            self.submit()?;
        }
        let Self { pool, messages, .. } = self;
        let header_at = messages.prefix(header);
        let pieces = headed(parts, segment).map(|piece| match piece {
            Some(part) => (pool.held_bytes(part.buffer, part.start, part.length), part.length),
            None => header_at,
        });
        let control = Control::new(headed_segment(segment, header), None);
        let message = messages.message(None, control, pieces);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        self.push(&opcode::SendMsg::new(fd(socket), message).flags(flags as u32).build(), token)
    }

    /// One completion when there is something to read, the end of the stream, or an error.
    pub fn poll_readable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.poll(file, libc::POLLIN | libc::POLLRDHUP, token)
    }

    /// One completion when there is room to write, an error, or the peer's FIN: the kernel adds `POLLRDHUP` to what is waited
    /// for (`IO_POLL_UNMASK` in io_uring/poll.c), and a FIN that has come stays. See [`Self::poll_room`].
    pub fn poll_writable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.poll(file, libc::POLLOUT, token)
    }

    /// As [`Self::poll_writable`] where the peer has sent its FIN: completions whenever something changes, until cancelled. The
    /// first says how it is now.
    pub fn poll_room(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.push(&opcode::PollAdd::new(fd(file), libc::POLLOUT as u32).multi(true).build(), token)
    }

    /// Completes with `POLLERR` in its result when the connection has an error: it was reset, or is taken for dead. Before that it
    /// may complete with other events (the peer's FIN, and that both have sent one), each time that something changes; until
    /// cancelled. The error is left to the next receive or send.
    pub fn poll_error(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        // Errors and hang-ups are always told; what may be read or written is no reason to wake anybody here.
        self.push(&opcode::PollAdd::new(fd(file), 0).multi(true).build(), token)
    }

    fn poll(&mut self, file: BorrowedFd<'_>, events: libc::c_short, token: Token) -> Result<(), EnterError> {
        self.push(&opcode::PollAdd::new(fd(file), events as u32).build(), token)
    }

    /// Cancels what was submitted with `target`. That still completes, with `ECANCELED` or as if never cancelled.
    pub fn cancel(&mut self, target: Token) -> Result<(), EnterError> {
        let cancel = opcode::AsyncCancel::new(target.encode()).build();
        self.push_silent(cancel, Token::new(Op::Cancel, target.slot, target.generation))
    }

    /// Closes the descriptor after all that is queued for it. What is in flight keeps its file open: cancel it first.
    pub fn close(&mut self, file: OwnedFd) -> Result<(), EnterError> {
        let close = opcode::Close::new(Fd(file.into_raw_fd())).build();
        self.push_silent(close, Token::new(Op::Close, 0, 0))
    }

    /// Hands all that is queued to the kernel and waits for a completion. One system call.
    pub fn enter(&mut self, wait: Wait) -> Result<(), EnterError> {
        self.enters += 1;
        let want = usize::from(wait != Wait::No);
        let result = match wait {
            Wait::For(limit) => {
                let limit = Timespec::from(limit);
                self.ring.submitter().submit_with_args(want, &SubmitArgs::new().timespec(&limit))
            }
            Wait::No | Wait::Forever => self.ring.submitter().submit_and_wait(want),
        };
        self.entered(result)
    }

    /// Takes the completions that are there.
    pub fn completions(&mut self, into: &mut Vec<Completion>) {
        let pool = &mut self.pool;
        let in_flight = &mut self.in_flight;
        into.extend(self.ring.completion().filter_map(|entry| {
            let token = Token::decode(entry.user_data())?;
            let more = cqueue::more(entry.flags());
            // Silent operations complete only when they fail, and were not counted.
            if !more && !matches!(token.op, Op::Cancel | Op::Close) {
                *in_flight -= 1;
            }
            let buffer = cqueue::buffer_select(entry.flags()).filter(|buffer| pool.take(*buffer));
            if token.op == Op::Withdraw {
                buffer.into_iter().for_each(|buffer| pool.release(buffer));
                return None;
            }
            let accepted = token.op == Op::Accept && entry.result() >= 0;
            // SAFETY: a non-negative result of an accept is a descriptor that the kernel has just opened for us and told
            // nobody else; each completion is taken from the queue once, so it has one owner.
            let socket = accepted.then(|| unsafe { OwnedFd::from_raw_fd(entry.result()) });
            Some(Completion { token, result: entry.result(), more, buffer, socket })
        }));
    }

    fn push(&mut self, entry: &squeue::Entry, token: Token) -> Result<(), EnterError> {
        self.queue(&entry.clone().user_data(token.encode()))?;
        self.in_flight += 1;
        Ok(())
    }

    fn push_silent(&mut self, entry: squeue::Entry, token: Token) -> Result<(), EnterError> {
        self.queue(&entry.user_data(token.encode()).flags(squeue::Flags::SKIP_SUCCESS))
    }

    fn queue(&mut self, entry: &squeue::Entry) -> Result<(), EnterError> {
        loop {
            // SAFETY: what the entry points to lives until the kernel is done with it: socket addresses in
            // `self.addresses` and messages in `self.messages` until the queue is next handed over (who keeps one there
            // made room in the queue first), buffer memory in `self.pool` as long as the ring.
            // Its descriptor is borrowed or owned by the caller now, and is closed only through this same queue.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Makes sure that the next entry fits without handing the queue over.
    fn make_room(&mut self) -> Result<(), EnterError> {
        while self.ring.submission().is_full() {
            self.submit()?;
        }
        Ok(())
    }

    /// Hands over what is queued, without waiting: the queue is full.
    fn submit(&mut self) -> Result<(), EnterError> {
        self.enters += 1;
        let result = self.ring.submit();
        self.entered(result)
    }

    fn entered(&mut self, result: io::Result<usize>) -> Result<(), EnterError> {
        let done = match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // A signal; the time is up; the kernel wants its completions taken first; it is short of memory for a
                // moment. In all of these the caller takes completions and comes back.
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(EnterError(error)),
            },
        };
        // With SUBMIT_ALL the kernel consumes the whole queue unless it was interrupted before.
        if self.ring.submission().is_empty() {
            self.addresses_used = 0;
            self.messages.clear();
        }
        done
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Cancels everything and waits for it, a second at most.
        let mut rest = Vec::new();
        let _ = self.ring.submitter().register_sync_cancel(None, CancelBuilder::any());
        for _ in 0..100 {
            if self.in_flight == 0 || self.enter(Wait::For(Duration::from_millis(10))).is_err() {
                break;
            }
            self.completions(&mut rest);
            rest.clear();
        }
        let quiet = self.in_flight == 0;
        // SAFETY: `drop` runs once and neither field is used after it.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
        if quiet {
            // SAFETY: as above; and the kernel has no operation left that could touch the buffers, else they leak.
            unsafe { ManuallyDrop::drop(&mut self.pool) };
        }
    }
}

fn fd(file: BorrowedFd<'_>) -> Fd {
    Fd(file.as_raw_fd())
}

/// Writes `address` in the kernel's form; returns its length.
pub(crate) fn write_address(place: &mut libc::sockaddr_storage, address: &SocketAddr) -> libc::socklen_t {
    match address {
        SocketAddr::V4(v4) => {
            let value = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is made to hold any socket address: large enough and aligned for it.
            unsafe { std::ptr::from_mut(place).cast::<libc::sockaddr_in>().write(value) };
            size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(v6) => {
            let value = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { std::ptr::from_mut(place).cast::<libc::sockaddr_in6>().write(value) };
            size_of::<libc::sockaddr_in6>() as libc::socklen_t
        }
    }
}
