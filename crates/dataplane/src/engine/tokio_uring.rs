//! The engine for kernels that have io_uring but no buffer rings (Linux 5.11 to 6.0), over crate `tokio-uring`.
//!
//! Owns: a `tokio-uring` runtime, the operations in flight on its ring, the receive buffers. Receives and sends go through
//! the ring, receives into buffers that were given to the kernel beforehand (`io_uring_prep_provide_buffers(3)`), so that an
//! idle flow holds none here either, on Linux 5.18 and newer; before, the kernel keeps one for each receive that waits.
//!
//! `tokio-uring` has operations that complete once and no way to cancel one: dropping its future lets it go on in the
//! kernel, holding its file. So nothing is dropped, and:
//!
//! * accepting and connecting are polls, whose outcome nobody needs: cancelled, they complete at once and what is left in
//!   the kernel ends with the socket. The accept (connect) itself is a system call that does not wait;
//! * a multishot receive is one receive after the other. It is submitted again at the next [`Io::enter`], so that the worker,
//!   who cancels in answer to bytes, finds it here and not in the kernel;
//! * a receive or send that is in the kernel when it is cancelled completes as if it had not been: with its bytes, or when
//!   its socket is closed. No byte is lost that way, and the worker counts on no more ([`Io::cancel`]);
//! * a socket that is closed with operations in the kernel is aborted first (`connect(AF_UNSPEC)`, RST, where its owner asked
//!   for RST by `SO_LINGER`; `shutdown(2)` else), which wakes them, and closed when the last has ended;
//! * who waits for room towards a peer that has sent its FIN, or for an error alone, does so in an epoll beside the ring, whose
//!   descriptor the ring polls.
//!
//! One future is polled for each [`Io::enter`]: it submits what is queued and waits for the first completion.

use std::collections::{HashMap, VecDeque};
use std::future::{Future, poll_fn};
use std::hash::BuildHasherDefault;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{Shutdown, sockopt};
use tokio_uring::{InFlightOneshot, OneshotOutputTransform, Runtime, UnsubmittedOneshot};
use uring::oneshot::{self, Oneshot, Outcome};
use uring::{
    BufferPool, Completion, Datagrams, EnterError, Group, Lent, Local, Memory, Part, Setup, SetupError,
    Token, Wait,
};

use super::aside::{Aside, For};
use super::readiness::{Mix, Turn, accept, begin_connect, receive_datagrams, send_datagrams, send_headed};
use crate::io::Io;

/// How long an enter that should not wait may take at most: `tokio-uring` hands operations over when its thread sleeps.
const HAND_OVER: Duration = Duration::from_millis(1);
/// Longest sleep. Nothing hangs on it: it keeps times within what the runtime's timer can say.
const SLEEP_MAX: Duration = Duration::from_secs(3_600);

/// One worker's runtime. It is dropped first: it cancels what is in flight and waits for it, and only then may the
/// operations and the buffers go.
pub(crate) struct TokioUring {
    runtime: Runtime,
    state: State,
}

struct State {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Operations that are to be submitted.
    queued: VecDeque<u32>,
    woken: Arc<Woken>,
    places: HashMap<Token, u32, BuildHasherDefault<Mix>>,
    /// Descriptors that the kernel has operations on.
    files: HashMap<RawFd, Busy, BuildHasherDefault<Mix>>,
    pool: BufferPool,
    done: Vec<Completion>,
    /// Who waits for what the ring's polls cannot: they end with a FIN that has come, and those that go on all the same
    /// (multishot) are not tokio-uring's.
    aside: Aside,
    /// It is being polled, which goes on from the first who waits there.
    aside_polled: bool,
    /// Operations submitted to the ring's queue, how many of them the kernel has for sure, and how many fit.
    submitted: u64,
    handed_over: u64,
    queue_size: u64,
    enters: u64,
}

/// A place for an operation, and its waker, which outlives it.
struct Slot {
    waker: Waker,
    operation: Option<Operation>,
}

struct Operation {
    /// Who is told. `None`: nobody, or nobody any more since it was cancelled.
    token: Option<Token>,
    /// `None`: it is about no descriptor.
    file: Option<Lent>,
    kind: Kind,
    cancelled: bool,
    /// Which submission it was, counted from 1.
    number: u64,
    /// It is in the kernel.
    flight: Option<InFlightOneshot<Option<Memory>, Plain>>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Accept,
    Connect,
    RecvMany,
    RecvOnce(Group),
    /// A poll, and then system calls that do not wait.
    Datagrams {
        connected: bool,
    },
    Send {
        buffer: u16,
        start: u32,
        length: u32,
    },
    Readable,
    Writable,
    /// A poll of [`State::aside`], again and again.
    Aside,
    /// Free buffers become the kernel's.
    Provide {
        first: u16,
        count: u16,
    },
}

/// What follows when an operation has left the kernel.
enum Next {
    /// It is submitted again.
    Again,
    /// It ends, and its completion was told already.
    Over,
    /// It ends with this result.
    End(i32),
}

/// A descriptor with operations in the kernel.
#[derive(Debug, Default)]
struct Busy {
    operations: u32,
    /// To be closed after the last of them.
    closing: Option<OwnedFd>,
}

/// The completion as it is.
struct Plain;

impl OneshotOutputTransform for Plain {
    type Output = Outcome;
    type StoredData = Option<Memory>;

    fn transform_oneshot_output(self, _: Option<Memory>, outcome: Outcome) -> Outcome {
        outcome
    }
}

/// Which operations may have completed, and whom to wake for them.
#[derive(Debug, Default)]
struct Woken(Mutex<Ready>);

#[derive(Debug, Default)]
struct Ready {
    slots: Vec<u32>,
    waiting: Option<Waker>,
}

struct SlotWaker {
    slot: u32,
    woken: Arc<Woken>,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        let waiting = {
            let mut ready = self.woken.lock();
            ready.slots.push(self.slot);
            ready.waiting.take()
        };
        if let Some(waiting) = waiting {
            waiting.wake();
        }
    }
}

impl Woken {
    fn lock(&self) -> MutexGuard<'_, Ready> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn queue(&mut self, token: Token, file: BorrowedFd<'_>, kind: Kind) {
        let file = Some(Lent::new(file));
        let slot = self.occupy(Operation {
            token: Some(token),
            file,
            kind,
            cancelled: false,
            number: 0,
            flight: None,
        });
        self.places.insert(token, slot);
        self.queued.push_back(slot);
    }

    fn occupy(&mut self, operation: Operation) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            let slot = self.slots.len() as u32;
            let waker = Waker::from(Arc::new(SlotWaker { slot, woken: Arc::clone(&self.woken) }));
            self.slots.push(Slot { waker, operation: None });
            slot
        });
        self.slots[slot as usize].operation = Some(operation);
        slot
    }

    fn complete(&mut self, token: Token, result: i32) {
        self.done.push(completion(token, result));
    }

    /// Submits what is queued and waits for a completion, `limit` at most.
    async fn turn(&mut self, limit: Option<Duration>) {
        self.provide();
        self.submit_queued();
        // The kernel gets nothing before the thread sleeps, which it does not while completions are there.
        let full = self.room() == 0;
        let sleep = if full { Some(HAND_OVER) } else { limit }.map(tokio::time::sleep);
        let mut sleep = std::pin::pin!(sleep);
        poll_fn(|context| {
            self.reap(context.waker());
            if !self.done.is_empty() && !full {
                return Poll::Ready(());
            }
            match sleep.as_mut().as_pin_mut() {
                Some(sleep) => sleep.poll(context),
                None => Poll::Pending,
            }
        })
        .await;
        if full {
            self.handed_over = self.submitted;
        }
    }

    /// Operations that still fit into the ring's queue. Beyond it, `tokio-uring` would hand over at once, and panic where the
    /// kernel has no memory for them at that moment.
    fn room(&self) -> u64 {
        self.queue_size.saturating_sub(self.submitted - self.handed_over)
    }

    // --- Submitting -------------------------------------------------------------------------------------------------

    /// Gives the kernel the buffers that came back, before the receives that may need them.
    fn provide(&mut self) {
        for group in [Group::Shared, Group::First] {
            while self.room() > 0
                && let Some((described, first, count)) = oneshot::provide(&mut self.pool, group)
            {
                let (kind, flight) = (Kind::Provide { first, count }, Some(submit(described)));
                self.submitted += 1;
                let number = self.submitted;
                let slot = self.occupy(Operation {
                    token: None,
                    file: None,
                    kind,
                    cancelled: false,
                    number,
                    flight,
                });
                self.woken.lock().slots.push(slot);
            }
        }
    }

    fn submit_queued(&mut self) {
        // Those that complete at once are queued again behind these.
        for _ in 0..self.queued.len() {
            if self.room() == 0 {
                break; // They are submitted at the next turn.
            }
            let Some(slot) = self.queued.pop_front() else { break };
            self.submit(slot);
        }
    }

    fn submit(&mut self, slot: u32) {
        let Some(operation) = &mut self.slots[slot as usize].operation else { return };
        if operation.cancelled {
            return self.end(slot, -Errno::CANCELED.raw_os_error());
        }
        let Some(file) = operation.file.as_ref().map(AsFd::as_fd) else { return };
        let described = match operation.kind {
            Kind::Accept | Kind::Datagrams { .. } | Kind::Readable | Kind::Aside => {
                oneshot::poll_readable(file)
            }
            Kind::Connect | Kind::Writable => oneshot::poll_writable(file),
            Kind::RecvMany => oneshot::recv(&self.pool, file, Group::Shared),
            Kind::RecvOnce(group) => oneshot::recv(&self.pool, file, group),
            Kind::Send { buffer, start, length } => oneshot::send(&self.pool, file, buffer, start, length),
            Kind::Provide { .. } => return, // It is submitted as it is made.
        };
        self.files.entry(file.as_raw_fd()).or_default().operations += 1;
        self.submitted += 1;
        operation.number = self.submitted;
        operation.flight = Some(submit(described));
        // Its first poll tells it whom to wake.
        self.woken.lock().slots.push(slot);
    }

    // --- Completing -------------------------------------------------------------------------------------------------

    /// Looks at every operation that may have completed; `waiting` is woken for the next.
    fn reap(&mut self, waiting: &Waker) {
        let ready = {
            let mut ready = self.woken.lock();
            ready.waiting = Some(waiting.clone());
            std::mem::take(&mut ready.slots)
        };
        for slot in ready {
            let Slot { waker, operation } = &mut self.slots[slot as usize];
            let Some(flight) = operation.as_mut().and_then(|operation| operation.flight.as_mut()) else {
                continue;
            };
            if let Poll::Ready(outcome) = Pin::new(flight).poll(&mut Context::from_waker(waker)) {
                self.landed(slot, &outcome);
            }
        }
    }

    /// An operation has left the kernel.
    fn landed(&mut self, slot: u32, outcome: &Outcome) {
        let Self { slots, pool, done, handed_over, aside, .. } = self;
        let Some(operation) = &mut slots[slot as usize].operation else { return };
        operation.flight = None;
        // All that was submitted before it went with it.
        *handed_over = operation.number.max(*handed_over);
        let fd = operation.file.as_ref().map(|file| file.as_fd().as_raw_fd());
        let result = outcome.result();
        let buffer = oneshot::buffer_of(outcome).filter(|buffer| pool.take(*buffer));
        let next = match (operation.token, operation.kind, &operation.file) {
            (_, Kind::Provide { first, count }, _) => {
                if result < 0 {
                    pool.provide_failed(first, count); // They are offered again at the next turn.
                }
                Next::Over
            }
            (_, Kind::Aside, _) => {
                aside.look(|token, result| done.push(completion(token, result)));
                Next::Again
            }
            (Some(token), Kind::Accept, Some(listener)) => match accept(listener, token, done) {
                Turn::Wait | Turn::More => Next::Again,
                Turn::Done { .. } => Next::Over,
            },
            (Some(token), Kind::Datagrams { connected }, Some(socket)) => {
                match receive_datagrams(socket, pool, token, connected, done) {
                    Turn::Wait | Turn::More => Next::Again,
                    Turn::Done { .. } => Next::Over,
                }
            }
            (Some(_), Kind::Connect, Some(socket)) => match sockopt::socket_error(socket) {
                Ok(Ok(())) => Next::End(0),
                Ok(Err(error)) | Err(error) => Next::End(-error.raw_os_error()),
            },
            (Some(token), Kind::RecvMany | Kind::RecvOnce(_), _) => {
                let many = matches!(operation.kind, Kind::RecvMany);
                let more = many && !operation.cancelled && result > 0;
                done.push(Completion { token, result, more, buffer, socket: None });
                if more { Next::Again } else { Next::Over }
            }
            (Some(_), Kind::Send { .. } | Kind::Readable | Kind::Writable, _) => Next::End(result),
            // It was cancelled, which its owner knows.
            (None, ..) | (_, Kind::Accept | Kind::Connect | Kind::Datagrams { .. }, None) => Next::Over,
        };
        match next {
            Next::Again => self.queued.push_back(slot),
            Next::Over => drop(self.forget(slot)),
            Next::End(result) => self.end(slot, result),
        }
        if let Some(fd) = fd {
            self.landed_on(fd);
        }
    }

    /// One operation fewer is in the kernel for the descriptor.
    fn landed_on(&mut self, fd: RawFd) {
        if let Some(busy) = self.files.get_mut(&fd) {
            busy.operations -= 1;
            if busy.operations == 0 {
                // Closes it, if it was to be closed.
                self.files.remove(&fd);
            }
        }
    }

    /// Waits beside the ring.
    fn wait_aside(&mut self, file: BorrowedFd<'_>, what: For, token: Token) {
        if let Err(error) = self.aside.wait(file, what, token) {
            return self.complete(token, -error.raw_os_error());
        }
        if !std::mem::replace(&mut self.aside_polled, true) {
            let slot = self.occupy(Operation {
                token: None,
                file: Some(Lent::new(self.aside.file())),
                kind: Kind::Aside,
                cancelled: false,
                number: 0,
                flight: None,
            });
            self.queued.push_back(slot);
        }
    }

    fn end(&mut self, slot: u32, result: i32) {
        if let Some(token) = self.forget(slot) {
            self.complete(token, result);
        }
    }

    fn forget(&mut self, slot: u32) -> Option<Token> {
        let token = self.slots[slot as usize].operation.take()?.token;
        self.free.push(slot);
        if let Some(token) = token {
            self.places.remove(&token);
        }
        token
    }
}

const fn completion(token: Token, result: i32) -> Completion {
    Completion { token, result, more: false, buffer: None, socket: None }
}

/// Hands an operation to the runtime's ring; the kernel gets it when the thread sleeps.
fn submit(operation: Oneshot) -> InFlightOneshot<Option<Memory>, Plain> {
    UnsubmittedOneshot::new(operation.memory, Plain, operation.entry).submit()
}

/// Ends what is in the kernel on a descriptor: nothing else does, short of bytes.
fn wake(file: &OwnedFd) {
    let wants_reset = matches!(sockopt::socket_linger(file), Ok(Some(Duration::ZERO)));
    // Of a TCP connection alone does this send RST and wake who waits.
    let is_stream = sockopt::socket_type(file) == Ok(rustix::net::SocketType::STREAM);
    if !(wants_reset && is_stream && rustix::net::connect_unspec(file).is_ok()) {
        // Fails on what is no socket or not connected; then nothing waits on it, or it was woken before.
        let _ = rustix::net::shutdown(file, Shutdown::Both);
    }
}

impl Io for TokioUring {
    fn start(setup: Setup) -> Result<Self, SetupError> {
        let mut ring = tokio_uring::uring_builder();
        ring.setup_clamp().setup_cqsize(setup.submissions * 4);
        let mut builder = tokio_uring::builder();
        builder.entries(setup.submissions).uring_builder(&ring);
        let runtime = Runtime::new(&builder).map_err(SetupError::at("io_uring_setup"))?;
        let pool = BufferPool::listed(&setup).map_err(SetupError::at("reserving memory for buffers"))?;
        let aside = Aside::new().map_err(|error| SetupError::at("epoll_create1")(error.into()))?;
        let state = State {
            slots: Vec::new(),
            free: Vec::new(),
            queued: VecDeque::new(),
            woken: Arc::default(),
            places: HashMap::default(),
            files: HashMap::default(),
            pool,
            done: Vec::new(),
            aside,
            aside_polled: false,
            submitted: 0,
            handed_over: 0,
            queue_size: u64::from(setup.submissions),
            enters: 0,
        };
        Ok(Self { runtime, state })
    }

    fn accept(&mut self, listener: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.state.queue(token, listener, Kind::Accept);
        Ok(())
    }

    fn connect(
        &mut self,
        socket: BorrowedFd<'_>,
        address: &SocketAddr,
        token: Token,
    ) -> Result<(), EnterError> {
        match begin_connect(socket, address) {
            Ok(()) => self.state.queue(token, socket, Kind::Connect),
            Err(error) => self.state.complete(token, -error.raw_os_error()),
        }
        Ok(())
    }

    fn recv_many(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.state.queue(token, socket, Kind::RecvMany);
        Ok(())
    }

    fn recv_once(&mut self, socket: BorrowedFd<'_>, group: Group, token: Token) -> Result<(), EnterError> {
        self.state.queue(token, socket, Kind::RecvOnce(group));
        Ok(())
    }

    fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: u16,
        start: u32,
        length: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        self.state.queue(token, socket, Kind::Send { buffer, start, length });
        Ok(())
    }

    fn recv_datagrams(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.state.queue(token, socket, Kind::Datagrams { connected: false });
        Ok(())
    }

    fn recv_connected(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.state.queue(token, socket, Kind::Datagrams { connected: true });
        Ok(())
    }

    fn datagrams(&self, buffer: u16, result: i32) -> Option<Datagrams> {
        self.state.pool.datagrams(buffer, result)
    }

    fn bytes(&self, buffer: u16, start: u32, length: u32) -> &[u8] {
        self.state.pool.bytes(buffer, start, length)
    }

    fn send_datagrams(
        &mut self,
        socket: BorrowedFd<'_>,
        route: (Option<&SocketAddr>, Option<Local>),
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        let result = send_datagrams(&self.state.pool, socket, route, parts, segment);
        self.state.complete(token, result);
        Ok(())
    }

    fn send_headed(
        &mut self,
        socket: BorrowedFd<'_>,
        header: &[u8],
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        let result = send_headed(&self.state.pool, socket, header, parts, segment);
        self.state.complete(token, result);
        Ok(())
    }

    fn poll_readable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.state.queue(token, file, Kind::Readable);
        Ok(())
    }

    fn poll_writable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.state.queue(token, file, Kind::Writable);
        Ok(())
    }

    fn poll_room(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.state.wait_aside(file, For::Room, token);
        Ok(())
    }

    fn poll_error(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.state.wait_aside(file, For::Error, token);
        Ok(())
    }

    fn cancel(&mut self, target: Token) -> Result<(), EnterError> {
        let state = &mut self.state;
        if state.aside.cancel(target) {
            state.complete(target, -Errno::CANCELED.raw_os_error());
            return Ok(());
        }
        let Some(slot) = state.places.get(&target).copied() else { return Ok(()) };
        let Some(operation) = &mut state.slots[slot as usize].operation else { return Ok(()) };
        operation.cancelled = true;
        let polls = !matches!(
            operation.kind,
            Kind::RecvMany | Kind::RecvOnce(_) | Kind::Send { .. } | Kind::Provide { .. }
        );
        if operation.flight.is_some() && polls {
            if let (Kind::Connect, Some(socket)) = (operation.kind, &operation.file) {
                // It gives its port back now; the poll ends with it.
                let _ = rustix::net::connect_unspec(socket);
            }
            operation.token = None;
            state.places.remove(&target);
            state.complete(target, -Errno::CANCELED.raw_os_error());
        }
        Ok(())
    }

    fn close(&mut self, file: OwnedFd) -> Result<(), EnterError> {
        match self.state.files.get_mut(&file.as_raw_fd()) {
            Some(busy) => {
                wake(&file);
                busy.closing = Some(file);
            }
            None => drop(file),
        }
        Ok(())
    }

    fn enter(&mut self, wait: Wait) -> Result<(), EnterError> {
        self.state.enters += 1;
        let limit = match wait {
            Wait::No => Some(HAND_OVER),
            Wait::For(limit) => Some(limit.min(SLEEP_MAX)),
            Wait::Forever => None,
        };
        self.runtime.block_on(self.state.turn(limit));
        Ok(())
    }

    fn completions(&mut self, into: &mut Vec<Completion>) {
        into.append(&mut self.state.done);
    }

    fn enters(&self) -> u64 {
        self.state.enters
    }

    fn completion_overflows(&mut self) -> u32 {
        0
    }

    fn buffers(&self, group: Group) -> u32 {
        self.state.pool.buffers(group)
    }

    fn buffers_held(&self, group: Group) -> u32 {
        self.state.pool.held(group)
    }

    fn buffers_free(&self, group: Group) -> u32 {
        self.state.pool.free(group)
    }

    fn grow(&mut self, group: Group, more: u32) -> u32 {
        self.state.pool.grow(group, more)
    }

    fn shrink(&mut self, group: Group, keep: u32) -> Result<(), EnterError> {
        self.state.pool.shrink(group, keep);
        Ok(())
    }

    fn most_held(&mut self, group: Group) -> u32 {
        self.state.pool.most_held(group)
    }

    fn release(&mut self, buffer: u16) {
        self.state.pool.release(buffer);
    }
}
