//! One worker: a ring, its listeners, its flows.
//!
//! Owns every socket it accepted or opened until it gives it to the ring to close. Invariants:
//!
//! * a slot is freed when its flow is closed *and* nothing submitted for it is in flight (`FlowSlot::in_flight`);
//! * a buffer that a completion brought is released exactly once: by the flow's `Release`, or here when there is no flow
//!   for it;
//! * the loop never spins: it sleeps in `enter` unless completions are there, and what is out of resources waits for
//!   resources or a timer, not for its next turn.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use allocation::{
    AllocationTable, BackendIndex, ConnectFailure, Decision, Excluded, FlowKey, LiveFacts, NoBackend,
    OpenFlow, Reader, Selection, Selector, Timestamp,
};
use flow::{
    BufferId, Chunk, Chunks, CloseReason, Flow, Input, Output, Outputs, RecvEnd, Shot, Side, TimerWheel,
    Tuning,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};
use rustix::thread::{CpuSet, sched_setaffinity};
use uring::{BufferPool, Completion, EnterError, Group, Op, Ring, Setup, SetupError, Token, Wait};

use crate::clock::{Clock, Now};
use crate::listen;
use crate::pipes::{Pipe, Pipes};
use crate::run::{Orders, Shared};
use crate::slots::Slots;
use crate::stats::{ListenerStats, Shed, Stats, WorkerStats};

/// Bytes of a receive buffer: four pages, and a little more, so that an answer of 16 KiB does not look like a part of a
/// stream (see [`SPLICE_AFTER`]).
const BUFFER_BYTES: u32 = 16 * 1_024 + 64;
/// Reads in a row that fill their buffers before a half is spliced: 64 KiB in one go are a transfer, not an exchange.
const SPLICE_AFTER: u8 = 4;
/// Shared buffers at the start, and most. They serve exchanges, whose buffers come back at once, and what slow readers hold
/// beyond their first. Few at the start, because the kernel takes them in turn: with 256, each message of 512 busy flows came
/// to cold memory and cost 6 % more. A batch completes some 20 receives; where it is more, they grow.
const SHARED_AT_START: u32 = 64;
const SHARED_MAX: u32 = 1_024;
/// Where there is no buffer, so many more are made.
const BUFFERS_MORE: u32 = 64;
/// Submissions that are queued before they must be handed over within a batch.
const SUBMISSIONS: u32 = 1_024;
/// Bytes that a flow moves before they are added to its backend's count: that one is shared by all workers.
const MOVED_AT_MOST: u32 = 1 << 20;
/// How long accepting rests when the process is out of descriptors or the kernel out of memory.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// What a worker is started with.
pub(crate) struct WorkerSetup {
    pub(crate) worker: usize,
    /// The core it is pinned to.
    pub(crate) core: Option<usize>,
    pub(crate) clock: Clock,
    pub(crate) shared: Arc<Shared>,
    pub(crate) stats: Arc<WorkerStats>,
    pub(crate) buffer_bytes: Arc<Stats>,
    pub(crate) listeners: Vec<(OwnedFd, Reader)>,
    pub(crate) flows_max: u32,
    pub(crate) buffers_max: u32,
    pub(crate) keepalive: Option<Duration>,
    pub(crate) sources: Vec<IpAddr>,
    pub(crate) tuning: Tuning,
}

/// One worker, on its own thread.
pub(crate) struct Worker {
    worker: usize,
    ring: Ring,
    clock: Clock,
    now: Now,
    shared: Arc<Shared>,
    stats: Arc<WorkerStats>,
    listeners: Vec<Listener>,
    flows: Slots<FlowSlot>,
    chunks: Chunks,
    wheel: TimerWheel,
    tuning: Tuning,
    pipes: Pipes,
    flows_max: u32,
    keepalive: Option<Duration>,
    sources: Vec<IpAddr>,
    source_turn: usize,
    /// Receives that found no buffer, oldest first. At most two for each flow.
    buffer_waits: VecDeque<(u32, u32, Side)>,
    /// When to accept again after running out of something.
    accept_again: Option<Timestamp>,
    /// That accepting rests was said; once is enough until it works again.
    accept_warned: bool,
    /// When flows that are left are reset.
    drain_deadline: Option<Timestamp>,
    orders: Orders,
    /// Kept between steps for their memory.
    outputs: Outputs,
    followups: VecDeque<Input>,
    expired: Vec<u32>,
}

struct Listener {
    /// `None` once it is closed.
    socket: Option<OwnedFd>,
    armed: bool,
    reader: Reader,
    /// The table of this batch.
    table: Arc<AllocationTable>,
    /// Whether `table` was read in this batch.
    table_read: bool,
    /// Its own: turns of one pool must not move those of another.
    selector: Selector,
}

/// One flow and its sockets.
struct FlowSlot {
    flow: Flow,
    listener: u16,
    /// Submissions whose last completion has not come: a bit for each operation, of which there is one at most.
    in_flight: u16,
    /// The backend has sent a byte.
    answered: bool,
    nodelay: Nodelay,
    /// Keepalive is on towards the backend.
    settled: bool,
    /// The last connect failed for want of something of ours, not through the backend.
    local_failure: Option<Shed>,
    client: Option<OwnedFd>,
    backend: Option<OwnedFd>,
    /// Of halves that are spliced, by source; few flows have any.
    pipes: Option<Box<[Option<Pipe>; 2]>>,
    /// Counts the flow on its backend.
    open: Option<OpenFlow>,
    /// Backends whose connect failed, at most [`Excluded::MAX`].
    tried: Vec<Arc<LiveFacts>>,
    /// What the timer is armed for; the flow's own deadline may have moved on since.
    armed_for: Timestamp,
    accepted_micros: u64,
    /// When the connect began; from then on, when the backend was last given reason to answer for the first time.
    asked_micros: u64,
    /// Bytes delivered that its backend's count does not have yet.
    moved: Moved,
}

#[derive(Debug, Clone, Copy, Default)]
struct Moved {
    to_client: u32,
    to_backend: u32,
}

/// Whether Nagle's algorithm is off towards the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nodelay {
    NothingSent,
    SentOnce,
    Set,
}

impl Worker {
    /// Makes the ring, on the thread that will use it, and starts accepting.
    pub(crate) fn start(setup: WorkerSetup) -> Result<Self, SetupError> {
        if let Some(core) = setup.core {
            let mut cores = CpuSet::new();
            cores.set(core);
            if let Err(error) = sched_setaffinity(None, &cores) {
                tracing::warn!(worker = setup.worker, core, %error, "could not pin the worker to its core");
            }
        }
        let ring = make_ring(setup.buffers_max)?;
        let now = setup.clock.now();
        let listener = |(socket, mut reader): (OwnedFd, Reader)| {
            let table = Arc::clone(reader.read());
            let selector = Selector::new(seed(setup.worker));
            Listener { socket: Some(socket), armed: false, reader, table, table_read: false, selector }
        };
        setup.buffer_bytes.buffer_bytes.store(u64::from(BUFFER_BYTES), Relaxed);
        let mut worker = Self {
            worker: setup.worker,
            ring,
            clock: setup.clock,
            now,
            shared: setup.shared,
            stats: setup.stats,
            listeners: setup.listeners.into_iter().map(listener).collect(),
            flows: Slots::new(),
            chunks: Chunks::new(0),
            wheel: TimerWheel::new(now.timestamp()),
            tuning: Tuning { full_read_bytes: BUFFER_BYTES, splice_after: SPLICE_AFTER, ..setup.tuning },
            pipes: Pipes::default(),
            flows_max: setup.flows_max,
            keepalive: setup.keepalive,
            sources: setup.sources,
            source_turn: setup.worker,
            buffer_waits: VecDeque::new(),
            accept_again: None,
            accept_warned: false,
            drain_deadline: None,
            orders: Orders::default(),
            outputs: Outputs::new(),
            followups: VecDeque::new(),
            expired: Vec::new(),
        };
        worker.open_listeners().map_err(|source| SetupError::Other { step: "listen", source })?;
        Ok(worker)
    }

    fn open_listeners(&mut self) -> io::Result<()> {
        for listener in &self.listeners {
            listener.socket.as_ref().map_or(Ok(()), listen::start)?;
        }
        self.arm_accepts().map_err(io::Error::other)?;
        self.arm_bell().map_err(io::Error::other)?;
        self.ring.enter(Wait::No).map_err(io::Error::other)
    }

    /// Works until drained or stopped.
    pub(crate) fn run(mut self) -> Result<(), EnterError> {
        let mut batch = Vec::with_capacity(SUBMISSIONS as usize);
        while !self.is_done() {
            self.ring.enter(self.wait())?;
            self.now = self.clock.now();
            self.ring.completions(&mut batch);
            self.begin_batch();
            self.stats.completions.add(batch.len() as u64);
            for completion in batch.drain(..) {
                self.step(completion)?;
            }
            self.expire()?;
            self.serve_buffer_waits()?;
            self.publish_stats();
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let leaving = self.orders.stop || self.orders.drain_within.is_some();
        leaving && self.flows.len() == 0 && self.listeners.iter().all(|listener| listener.socket.is_none())
    }

    fn wait(&self) -> Wait {
        let timers = [self.wheel.next_wake(), self.accept_again, self.drain_deadline];
        match timers.into_iter().flatten().min() {
            Some(at) => Wait::For(at.since(self.now.timestamp())),
            None => Wait::Forever,
        }
    }

    fn begin_batch(&mut self) {
        for listener in &mut self.listeners {
            listener.table_read = false;
        }
    }

    fn publish_stats(&mut self) {
        let pool = self.ring.pool();
        let both =
            |count: fn(&BufferPool, Group) -> u32| count(pool, Group::Shared) + count(pool, Group::First);
        self.stats.buffers.set(u64::from(both(BufferPool::buffers)));
        self.stats.buffers_in_use.set(u64::from(both(BufferPool::held)));
        self.stats.enters.set(self.ring.enters());
        self.stats.ejections_ignored.set(self.listeners.iter().map(|l| l.selector.panics()).sum());
        self.stats.completion_overflows.set(u64::from(self.ring.completion_overflows()));
    }

    // --- One completion ---------------------------------------------------------------------------------------------

    fn step(&mut self, completion: Completion) -> Result<(), EnterError> {
        match completion.token.op {
            Op::Accept => self.accepted(completion),
            Op::Wake => self.rung(),
            Op::Cancel | Op::Close => Ok(()), // There was nothing to cancel any more; a close that fails has closed.
            _ => self.step_flow(&completion),
        }
    }

    fn step_flow(&mut self, completion: &Completion) -> Result<(), EnterError> {
        let Token { op, slot: index, .. } = completion.token;
        let current = self.flows.generation(index).is_some_and(|g| completion.token.is_of(g));
        let Some(slot) = self.flows.get_mut(index).filter(|_| current) else {
            debug_assert!(false, "a slot outlives what is in flight for it: {completion:?}");
            if let Some(buffer) = completion.buffer {
                self.ring.pool().release(buffer);
            }
            return Ok(());
        };
        if !completion.more {
            slot.in_flight &= !bit(op);
        }
        let input = match op {
            Op::Connect => self.connect_input(index, completion.result),
            Op::RecvClient => self.recv_input(index, Side::Client, completion),
            Op::RecvBackend => self.recv_input(index, Side::Backend, completion),
            Op::SendClient => self.send_input(index, Side::Client, completion.result),
            Op::SendBackend => self.send_input(index, Side::Backend, completion.result),
            // However a poll ends, the splice that follows finds out what is the matter.
            Op::ReadableClient => Some(Input::Readable { from: Side::Client }),
            Op::ReadableBackend => Some(Input::Readable { from: Side::Backend }),
            Op::WritableClient => Some(Input::Writable { to: Side::Client }),
            Op::WritableBackend => Some(Input::Writable { to: Side::Backend }),
            Op::Accept | Op::Wake | Op::Cancel | Op::Close => None, // Not of a flow: `step` took them.
        };
        match input {
            Some(input) => self.drive(index, input),
            None => {
                self.free_if_over(index);
                Ok(())
            }
        }
    }

    fn recv_input(&mut self, index: u32, from: Side, completion: &Completion) -> Option<Input> {
        if completion.result > 0
            && let Some(buffer) = completion.buffer
        {
            if from == Side::Backend {
                self.first_answer(index);
            }
            let chunk = Chunk { buffer: BufferId(buffer), start: 0, length: completion.result as u32 };
            return Some(Input::Received { from, chunk, armed: completion.more });
        }
        if let Some(buffer) = completion.buffer {
            self.ring.pool().release(buffer);
        }
        let why = match -completion.result {
            0 => RecvEnd::Eof,
            e if e == Errno::NOBUFS.raw_os_error() => {
                self.stats.buffer_waits.add(1);
                let pool = self.ring.pool();
                if pool.free(Group::Shared) == 0 {
                    pool.grow(Group::Shared, pool.buffers(Group::Shared));
                }
                RecvEnd::NoBuffers
            }
            e if e == Errno::CANCELED.raw_os_error() => RecvEnd::Cancelled,
            // ECONNRESET, and what amounts to it: ETIMEDOUT (keepalive), EHOSTUNREACH, EPIPE.
            _ => RecvEnd::Reset,
        };
        Some(Input::RecvEnded { from, why })
    }

    fn first_answer(&mut self, index: u32) {
        if let Some(slot) = self.flows.get_mut(index)
            && !slot.answered
        {
            slot.answered = true;
            if let Some(open) = &slot.open {
                open.answered();
                let took = self.now.micros.saturating_sub(slot.asked_micros);
                open.first_byte_took(took, self.now.timestamp());
            }
        }
    }

    fn send_input(&mut self, index: u32, to: Side, result: i32) -> Option<Input> {
        if result <= 0 {
            return Some(Input::SendFailed { to });
        }
        self.count_bytes(index, to, result as u64);
        Some(Input::Sent { to, bytes: result as u32 })
    }

    fn count_bytes(&mut self, index: u32, to: Side, bytes: u64) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        let stats = &self.stats.listeners[usize::from(slot.listener)];
        // No completion and no splice is of 4 GiB.
        let moved = u32::try_from(bytes).unwrap_or(u32::MAX);
        match to {
            Side::Client => {
                stats.bytes_to_client.add(bytes);
                slot.moved.to_client = slot.moved.to_client.saturating_add(moved);
            }
            Side::Backend => {
                stats.bytes_to_backend.add(bytes);
                slot.moved.to_backend = slot.moved.to_backend.saturating_add(moved);
            }
        }
        if slot.moved.to_client.max(slot.moved.to_backend) >= MOVED_AT_MOST {
            slot.hand_over_moved();
        }
    }

    fn connect_input(&mut self, index: u32, result: i32) -> Option<Input> {
        let now = self.now;
        let stats = Arc::clone(&self.stats);
        let slot = self.flows.get_mut(index)?;
        let stats = &stats.listeners[usize::from(slot.listener)];
        if slot.flow.is_closed() {
            return None;
        }
        if result == 0 {
            let took = now.micros - slot.asked_micros;
            stats.connect_seconds.record(took);
            if let Some(open) = &slot.open {
                open.connected();
                open.connect_took(took);
            }
            slot.asked_micros = now.micros;
            slot.tried = Vec::new();
            slot.local_failure = None;
            return Some(Input::Connected);
        }
        stats.connect_retries.add(1);
        slot.local_failure = local_failure(-result);
        if let Some(open) = slot.open.take() {
            if slot.local_failure.is_none() {
                let cancelled = -result == Errno::CANCELED.raw_os_error();
                let failure = if cancelled { ConnectFailure::TimedOut } else { ConnectFailure::Refused };
                open.connect_failed(failure, now.timestamp());
            }
            slot.tried.push(Arc::clone(open.live()));
        }
        Some(Input::ConnectFailed)
    }

    // --- Driving a flow ---------------------------------------------------------------------------------------------

    /// Gives the flow an input, does what it says, and so on until it has nothing more to say.
    fn drive(&mut self, index: u32, input: Input) -> Result<(), EnterError> {
        let now = self.now.timestamp();
        let mut next = Some(input);
        let mut outputs = std::mem::take(&mut self.outputs);
        while let Some(input) = next {
            let Some(slot) = self.flows.get_mut(index) else { break };
            slot.flow.handle(input, now, &self.tuning, &mut self.chunks, &mut outputs);
            for output in outputs.drain(..) {
                self.perform(index, output)?;
            }
            next = self.followups.pop_front();
        }
        self.outputs = outputs;
        self.follow_deadline(index);
        self.free_if_over(index);
        Ok(())
    }

    /// Arms the timer if the flow's deadline came nearer; if it moved away, the timer finds out when it fires.
    fn follow_deadline(&mut self, index: u32) {
        if let Some(slot) = self.flows.get_mut(index)
            && !slot.flow.is_closed()
        {
            let deadline = slot.flow.deadline(&self.tuning);
            if deadline < slot.armed_for {
                slot.armed_for = deadline;
                self.wheel.arm(index, deadline);
            }
        }
    }

    fn free_if_over(&mut self, index: u32) {
        let over = self.flows.get(index).is_some_and(|slot| slot.flow.is_closed() && slot.in_flight == 0);
        if over {
            self.flows.remove(index);
            if self.flows.len() == 0 {
                // A quiet worker holds nothing.
                self.pipes.close_free();
            }
            if self.accept_again.is_some() {
                // Descriptors came back: no need to wait for the timer.
                self.accept_again = Some(self.now.timestamp());
            }
        }
    }

    fn perform(&mut self, index: u32, output: Output) -> Result<(), EnterError> {
        match output {
            Output::Connect => self.connect(index),
            Output::CancelConnect => {
                let token = self.token(Op::Connect, index);
                self.ring.cancel(token)
            }
            Output::Recv { from, shot } => self.recv(index, from, shot),
            Output::CancelRecv { from } => {
                let token = self.token(recv_op(from), index);
                self.ring.cancel(token)
            }
            Output::AwaitBuffers { from } => {
                self.await_buffers(index, from);
                Ok(())
            }
            Output::Send { to, chunk: Chunk { buffer, start, length } } => {
                if to == Side::Backend {
                    self.before_send_to_backend(index);
                }
                self.submit(index, to, send_op(to), |ring, socket, token| {
                    ring.send(socket, buffer.0, start, length, token)
                })
            }
            Output::Splice { from } => {
                self.splice(index, from);
                Ok(())
            }
            Output::Unsplice { from } => {
                if let Some(pipe) = self.flows.get_mut(index).and_then(|slot| slot.pipe(from).take()) {
                    self.pipes.put(pipe);
                }
                Ok(())
            }
            Output::Fill { from } => {
                self.fill(index, from);
                Ok(())
            }
            Output::Flush { to } => {
                self.flush(index, to);
                Ok(())
            }
            Output::PollRead { from } => self.submit(index, from, readable_op(from), Ring::poll_readable),
            Output::PollWrite { to } => self.submit(index, to, writable_op(to), Ring::poll_writable),
            Output::Shutdown { to } => {
                if let Some(socket) = self.socket(index, to) {
                    // Fails when the peer has reset the connection, which its receive will say.
                    let _ = rustix::net::shutdown(socket, Shutdown::Write);
                }
                Ok(())
            }
            Output::Release(buffer) => {
                self.ring.pool().release(buffer.0);
                Ok(())
            }
            Output::Closed { reset_client, reset_backend, reason } => {
                self.closed(index, reset_client, reset_backend, reason)
            }
        }
    }

    fn recv(&mut self, index: u32, from: Side, shot: Shot) -> Result<(), EnterError> {
        let group = match shot {
            Shot::Many => return self.submit(index, from, recv_op(from), Ring::recv_many),
            Shot::First => Group::First,
            Shot::Further => Group::Shared,
        };
        let pool = self.ring.pool();
        if pool.free(group) == 0 {
            pool.grow(group, BUFFERS_MORE);
        }
        self.submit(index, from, recv_op(from), |ring, socket, token| ring.recv_once(socket, group, token))
    }

    /// A first segment is never held back; from the second on, Nagle's algorithm must be off. A flow of one request is
    /// spared the system call. (Client sockets inherit the option.)
    fn before_send_to_backend(&mut self, index: u32) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        slot.nodelay = match (slot.nodelay, &slot.backend) {
            (Nodelay::NothingSent, _) => {
                slot.asked_micros = self.now.micros;
                Nodelay::SentOnce
            }
            (Nodelay::SentOnce, Some(socket)) => {
                // If it fails, the flow is slower and still right.
                let _ = sockopt::set_tcp_nodelay(socket, true);
                Nodelay::Set
            }
            (state, _) => state,
        };
    }

    /// The flow has lived for longer than a short one does: from now on a dead backend host must be noticed.
    /// (Client sockets inherit keepalive.)
    fn settle(&mut self, index: u32) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        if let (Some(idle), Some(socket), false, true) =
            (self.keepalive, &slot.backend, slot.settled, slot.flow.is_open())
        {
            slot.settled = true;
            // If one fails, a dead host is noticed late, by the idle timeout.
            let _ = sockopt::set_socket_keepalive(socket, true);
            let _ = sockopt::set_tcp_keepidle(socket, idle);
            let _ = sockopt::set_tcp_keepintvl(socket, listen::probe_interval(idle));
        }
    }

    fn submit(
        &mut self,
        index: u32,
        side: Side,
        op: Op,
        queue: impl FnOnce(&mut Ring, BorrowedFd<'_>, Token) -> Result<(), EnterError>,
    ) -> Result<(), EnterError> {
        let token = self.token(op, index);
        let Some(slot) = self.flows.get_mut(index) else { return Ok(()) };
        let socket = match side {
            Side::Client => &slot.client,
            Side::Backend => &slot.backend,
        };
        let Some(socket) = socket else { return Ok(()) };
        debug_assert_eq!(slot.in_flight & bit(op), 0, "one {op:?} at a time");
        slot.in_flight |= bit(op);
        queue(&mut self.ring, socket.as_fd(), token)
    }

    fn socket(&self, index: u32, side: Side) -> Option<BorrowedFd<'_>> {
        let slot = self.flows.get(index)?;
        match side {
            Side::Client => slot.client.as_ref(),
            Side::Backend => slot.backend.as_ref(),
        }
        .map(AsFd::as_fd)
    }

    fn token(&self, op: Op, index: u32) -> Token {
        Token::new(op, index, self.flows.generation(index).unwrap_or_default())
    }

    fn listener_stats(&self, index: u32) -> Option<&ListenerStats> {
        let slot = self.flows.get(index)?;
        Some(&self.stats.listeners[usize::from(slot.listener)])
    }

    // --- Connecting -------------------------------------------------------------------------------------------------

    /// Selects a backend that the flow has not tried and connects to it.
    fn connect(&mut self, index: u32) -> Result<(), EnterError> {
        let Self { flows, listeners, now, ring, .. } = self;
        let Some(slot) = flows.get_mut(index) else { return Ok(()) };
        if let Some(failed) = slot.backend.take() {
            ring.close(failed)?;
        }
        let listener = slot.listener;
        let accepted_by = &mut listeners[usize::from(listener)];
        let table = Arc::clone(accepted_by.table());
        let tried = excluded(&table, &slot.tried);
        let key = if table.wants_key() { client_key(slot.client.as_ref()) } else { FlowKey::from_bits(0) };
        let selection = accepted_by.selector.select_for(&table, key, &tried, now.timestamp());
        self.note(listener, &table, &tried, &selection);
        let (chosen, open) = match selection {
            Ok(Selection { index: chosen, open, .. }) => (chosen, open),
            Err(why) => {
                if why == NoBackend::RequirementUnmet {
                    self.stats.listeners[usize::from(listener)].shed(Shed::Requirement);
                }
                self.followups.push_back(Input::NoBackend);
                return Ok(());
            }
        };
        let address = table.backend(chosen).address;
        let asked_micros = self.now.micros;
        let Some(slot) = self.flows.get_mut(index) else { return Ok(()) };
        slot.open = Some(open);
        slot.asked_micros = asked_micros;
        match self.backend_socket(&address) {
            Ok(socket) => {
                if let Some(slot) = self.flows.get_mut(index) {
                    slot.backend = Some(socket);
                }
                self.submit(index, Side::Backend, Op::Connect, |ring, socket, token| {
                    ring.connect(socket, &address, token)
                })
            }
            Err(error) => {
                self.shed_connecting(index, local_failure(error.raw_os_error()).unwrap_or(Shed::Memory));
                Ok(())
            }
        }
    }

    /// Keeps the selection for whoever asks why.
    fn note(
        &self,
        listener: u16,
        table: &Arc<AllocationTable>,
        tried: &Excluded,
        selection: &Result<Selection, NoBackend>,
    ) {
        let (chosen, side) = match selection {
            Ok(selection) => (Ok(selection.index), selection.side),
            Err(why) => (Err(*why), 0),
        };
        let now = self.now.timestamp();
        let looked_at = table.side(usize::from(side));
        let selector = &self.listeners[usize::from(listener)].selector;
        self.stats.decisions.note(|| Decision {
            at: now,
            worker: self.worker as u16,
            listener,
            table: Arc::clone(table),
            side,
            chosen,
            tried: tried.count(),
            looks: selector.looks(looked_at, chosen.ok(), tried, now),
        });
    }

    fn shed_connecting(&mut self, index: u32, shed: Shed) {
        if let Some(stats) = self.listener_stats(index) {
            stats.shed(shed);
        }
        self.followups.push_back(Input::Abort(CloseReason::Exhausted));
    }

    fn backend_socket(&mut self, address: &SocketAddr) -> rustix::io::Result<OwnedFd> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        if let Some(source) = self.next_source(address) {
            let _ = uring::bind_address_no_port(socket.as_fd());
            rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
        }
        Ok(socket)
    }

    /// The next source address of the backend's family.
    fn next_source(&mut self, address: &SocketAddr) -> Option<IpAddr> {
        let fitting = self.sources.iter().filter(|source| source.is_ipv4() == address.is_ipv4());
        let count = fitting.clone().count();
        if count == 0 {
            return None;
        }
        self.source_turn = self.source_turn.wrapping_add(1);
        fitting.copied().nth(self.source_turn % count)
    }

    // --- Splicing ---------------------------------------------------------------------------------------------------

    fn splice(&mut self, index: u32, from: Side) {
        // splice(2) waits on a blocking socket whatever its flags say.
        let nonblocking = Side::BOTH.into_iter().all(|side| {
            self.socket(index, side).is_some_and(|socket| rustix::io::ioctl_fionbio(socket, true).is_ok())
        });
        let pipe = if nonblocking { self.pipes.take() } else { None };
        match (self.flows.get_mut(index), pipe) {
            (Some(slot), Some(pipe)) => *slot.pipe(from) = Some(pipe),
            _ => self.followups.push_back(Input::SpliceRefused { from }),
        }
    }

    fn fill(&mut self, index: u32, from: Side) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        let (socket, pipe) = slot.socket_and_pipe(from, from);
        // No pipe: it was refused a moment ago, and the flow is told so next.
        if let (Some(socket), Some(pipe)) = (socket, pipe) {
            let (bytes, end) = pipe.fill(socket);
            self.followups.push_back(Input::Filled { from, bytes, end });
            if from == Side::Backend && bytes > 0 {
                self.first_answer(index);
            }
        }
    }

    fn flush(&mut self, index: u32, to: Side) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        let (socket, pipe) = slot.socket_and_pipe(to, to.opposite());
        if let (Some(socket), Some(pipe)) = (socket, pipe) {
            let (bytes, failed) = pipe.flush(socket);
            self.followups.push_back(Input::Flushed { to, bytes, failed });
            self.stats.spliced_bytes.add(u64::from(bytes));
            self.count_bytes(index, to, u64::from(bytes));
        }
    }

    // --- Closing ----------------------------------------------------------------------------------------------------

    fn closed(
        &mut self,
        index: u32,
        reset_client: bool,
        reset_backend: bool,
        reason: CloseReason,
    ) -> Result<(), EnterError> {
        self.wheel.disarm(index);
        let now = self.now;
        let Some(slot) = self.flows.get_mut(index) else { return Ok(()) };
        let stats = &self.stats.listeners[usize::from(slot.listener)];
        if reason == CloseReason::ConnectFailed
            && let Some(shed) = slot.local_failure
        {
            stats.shed(shed);
        }
        stats.closed(reason);
        stats.flow_seconds.record(now.micros - slot.accepted_micros);
        slot.hand_over_moved();
        if let Some(open) = slot.open.take()
            && reason == CloseReason::BackendReset
        {
            if slot.answered { open.reset_after_answer() } else { open.reset_before_answer(now.timestamp()) }
        }
        slot.tried = Vec::new();
        for pipe in slot.pipes.take().into_iter().flat_map(|pipes| *pipes).flatten() {
            self.pipes.put(pipe);
        }
        self.shared.flows_open.fetch_sub(1, Relaxed);
        let in_flight = slot.in_flight;
        let sockets = [(slot.client.take(), reset_client), (slot.backend.take(), reset_backend)];
        // What is in flight keeps its file open and would delay the FIN or RST. One by one, which the kernel finds at
        // once; to cancel all of a descriptor it would look at every flow's.
        for op in FLOW_OPS.into_iter().filter(|op| in_flight & bit(*op) != 0) {
            let token = self.token(op, index);
            self.ring.cancel(token)?;
        }
        for (socket, reset) in sockets {
            let Some(socket) = socket else { continue };
            if reset {
                // Without it close sends FIN, and the peer would take a torn stream for a whole one.
                let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
            }
            self.ring.close(socket)?;
        }
        Ok(())
    }

    // --- Accepting --------------------------------------------------------------------------------------------------

    fn arm_accepts(&mut self) -> Result<(), EnterError> {
        self.accept_again = None;
        for index in 0..self.listeners.len() {
            self.arm_accept(index)?;
        }
        Ok(())
    }

    fn arm_accept(&mut self, index: usize) -> Result<(), EnterError> {
        let listener = &mut self.listeners[index];
        match &listener.socket {
            Some(socket) if !listener.armed => {
                listener.armed = true;
                self.ring.accept(socket.as_fd(), Token::new(Op::Accept, index as u32, 0))
            }
            _ => Ok(()),
        }
    }

    fn accepted(&mut self, completion: Completion) -> Result<(), EnterError> {
        let index = completion.token.slot as usize;
        if let Some(socket) = completion.socket {
            self.accept_warned = false;
            self.open_flow(index, socket)?;
        }
        if completion.more {
            return Ok(());
        }
        self.listeners[index].armed = false;
        if self.leaving() {
            return self.close_listener(index);
        }
        match local_failure(-completion.result) {
            Some(_) => {
                // The connections wait in the kernel's queue. Accepting at once would fail at once, for ever.
                self.accept_again = Some(self.now.timestamp() + ACCEPT_REST);
                if !std::mem::replace(&mut self.accept_warned, true) {
                    let error = io::Error::from_raw_os_error(-completion.result);
                    tracing::warn!(%error, "cannot accept; connections wait in the kernel until something is free");
                }
                Ok(())
            }
            None => self.arm_accept(index),
        }
    }

    fn open_flow(&mut self, listener: usize, client: OwnedFd) -> Result<(), EnterError> {
        let stats = &self.stats.listeners[listener];
        if self.shared.flows_open.fetch_add(1, Relaxed) >= self.flows_max {
            self.shared.flows_open.fetch_sub(1, Relaxed);
            stats.shed(Shed::Flows);
            let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO));
            return self.ring.close(client);
        }
        stats.opened.add(1);
        let now = self.now.timestamp();
        let mut outputs = std::mem::take(&mut self.outputs);
        let flow = Flow::accepted(now, &self.tuning, &mut outputs);
        let index = self.flows.insert(FlowSlot {
            flow,
            listener: listener as u16,
            in_flight: 0,
            answered: false,
            nodelay: Nodelay::NothingSent,
            settled: false,
            local_failure: None,
            client: Some(client),
            backend: None,
            pipes: None,
            open: None,
            tried: Vec::new(),
            armed_for: Timestamp::NEVER,
            accepted_micros: self.now.micros,
            asked_micros: self.now.micros,
            moved: Moved::default(),
        });
        for output in outputs.drain(..) {
            self.perform(index, output)?;
        }
        self.outputs = outputs;
        self.follow_deadline(index);
        match self.followups.pop_front() {
            Some(input) => self.drive(index, input),
            None => Ok(()),
        }
    }

    // --- Timers and waiting -----------------------------------------------------------------------------------------

    fn expire(&mut self) -> Result<(), EnterError> {
        let now = self.now.timestamp();
        let mut expired = std::mem::take(&mut self.expired);
        self.wheel.advance(now, &mut expired);
        for index in expired.drain(..) {
            if let Some(slot) = self.flows.get_mut(index) {
                slot.armed_for = Timestamp::NEVER;
                self.settle(index);
                self.drive(index, Input::Deadline)?;
            }
        }
        self.expired = expired;
        if self.accept_again.is_some_and(|at| at <= now) {
            self.arm_accepts()?;
        }
        if self.drain_deadline.is_some_and(|at| at <= now) {
            self.drain_deadline = None;
            self.abort_all()?;
        }
        Ok(())
    }

    fn await_buffers(&mut self, index: u32, from: Side) {
        let flows = &self.flows;
        // Flows that ended while they waited leave their entry behind; there are two for each flow at most that are not.
        if self.buffer_waits.len() > 2 * flows.len() + 64 {
            self.buffer_waits.retain(|(index, generation, _)| flows.generation(*index) == Some(*generation));
        }
        let generation = flows.generation(index).unwrap_or_default();
        self.buffer_waits.push_back((index, generation, from));
    }

    /// Lets receives that found no buffer try again: with new buffers while there may be more, else as buffers return.
    fn serve_buffer_waits(&mut self) -> Result<(), EnterError> {
        if self.buffer_waits.is_empty() {
            return Ok(());
        }
        let pool = self.ring.pool();
        let mut may_try = pool.free(Group::First) as usize;
        if may_try < self.buffer_waits.len() {
            may_try += pool.grow(Group::First, BUFFERS_MORE) as usize;
        }
        for _ in 0..may_try.min(self.buffer_waits.len()) {
            let Some((index, generation, from)) = self.buffer_waits.pop_front() else { break };
            if self.flows.generation(index) == Some(generation) {
                self.drive(index, Input::BuffersBack { from })?;
            }
        }
        Ok(())
    }

    // --- Leaving ----------------------------------------------------------------------------------------------------

    fn arm_bell(&mut self) -> Result<(), EnterError> {
        self.ring.poll_readable(self.shared.bell(self.worker).as_fd(), Token::new(Op::Wake, 0, 0))
    }

    fn rung(&mut self) -> Result<(), EnterError> {
        let mut count = [0; 8];
        // Nonblocking; nothing to read means that an earlier ring was answered already.
        let _ = rustix::io::read(self.shared.bell(self.worker), &mut count);
        let orders = self.shared.orders();
        let was_leaving = self.leaving();
        if self.orders.drain_within != orders.drain_within {
            self.drain_deadline = orders.drain_within.map(|within| self.now.timestamp() + within);
        }
        self.orders = orders;
        if self.leaving() && !was_leaving {
            self.stop_accepting()?;
        }
        if orders.stop {
            self.abort_all()?;
        }
        self.arm_bell()
    }

    fn leaving(&self) -> bool {
        self.orders.stop || self.orders.drain_within.is_some()
    }

    fn stop_accepting(&mut self) -> Result<(), EnterError> {
        self.accept_again = None;
        for index in 0..self.listeners.len() {
            if self.listeners[index].armed {
                // Its last completion closes the listener.
                self.ring.cancel(Token::new(Op::Accept, index as u32, 0))?;
            } else {
                self.close_listener(index)?;
            }
        }
        Ok(())
    }

    /// Serves the connections that the kernel has already accepted, then closes: closing first would reset them.
    fn close_listener(&mut self, index: usize) -> Result<(), EnterError> {
        let Some(socket) = self.listeners[index].socket.take() else { return Ok(()) };
        if !self.orders.stop {
            while let Ok(client) = rustix::net::accept_with(&socket, SocketFlags::CLOEXEC) {
                self.open_flow(index, client)?;
            }
        }
        self.ring.close(socket)
    }

    fn abort_all(&mut self) -> Result<(), EnterError> {
        for index in self.flows.indexes() {
            self.drive(index, Input::Abort(CloseReason::Drained))?;
        }
        Ok(())
    }
}

impl Listener {
    /// The pool's table, read once per batch.
    fn table(&mut self) -> &Arc<AllocationTable> {
        if !self.table_read {
            self.table_read = true;
            let newest = self.reader.read();
            if !Arc::ptr_eq(newest, &self.table) {
                self.table = Arc::clone(newest);
            }
        }
        &self.table
    }
}

impl FlowSlot {
    /// Adds what was delivered to the backend's count.
    fn hand_over_moved(&mut self) {
        let Moved { to_client, to_backend } = std::mem::take(&mut self.moved);
        if let Some(open) = self.open.as_ref().filter(|_| to_client | to_backend != 0) {
            open.moved_bytes(u64::from(to_client), u64::from(to_backend));
        }
    }

    fn pipe(&mut self, from: Side) -> &mut Option<Pipe> {
        &mut self.pipes.get_or_insert_default()[from as usize]
    }

    /// A side's socket and the pipe of the half whose source is `from`.
    fn socket_and_pipe(&mut self, side: Side, from: Side) -> (Option<BorrowedFd<'_>>, Option<&mut Pipe>) {
        let socket = match side {
            Side::Client => &self.client,
            Side::Backend => &self.backend,
        };
        let pipe = self.pipes.as_mut().and_then(|pipes| pipes[from as usize].as_mut());
        (socket.as_ref().map(AsFd::as_fd), pipe)
    }
}

/// Who the client is. One whose connection is gone already is nobody in particular.
fn client_key(client: Option<&OwnedFd>) -> FlowKey {
    let address = client.and_then(|client| rustix::net::getpeername(client).ok().flatten());
    let address = address.and_then(|address| SocketAddr::try_from(address).ok());
    address.map_or(FlowKey::from_bits(0), |address| FlowKey::of_client(address.ip()))
}

/// The backends of this table that a flow has tried. Looked for by identity, because a table that was published between
/// two tries may have other indexes; only flows with a failed connect look.
fn excluded(table: &AllocationTable, tried: &[Arc<LiveFacts>]) -> Excluded {
    let mut excluded = Excluded::none();
    if tried.is_empty() {
        return excluded;
    }
    for (index, backend) in (0..).zip(table.members().backends()) {
        if tried.iter().any(|live| Arc::ptr_eq(live, &backend.live)) {
            excluded.push(BackendIndex(index));
        }
    }
    excluded
}

fn make_ring(buffers_max: u32) -> Result<Ring, SetupError> {
    let mut buffers_max = buffers_max;
    loop {
        let setup = Setup {
            submissions: SUBMISSIONS,
            shared: SHARED_AT_START,
            shared_max: SHARED_MAX,
            first_max: buffers_max,
            buffer_bytes: BUFFER_BYTES,
        };
        match Ring::new(setup) {
            // The buffer ring itself counts against RLIMIT_MEMLOCK: a smaller one works, with fewer buffers at most.
            Err(SetupError::Memory { step, source }) if buffers_max > BUFFERS_MORE => {
                tracing::warn!(buffers_max, step, %source, "not enough locked memory; trying with half the buffers");
                buffers_max /= 2;
            }
            result => return result,
        }
    }
}

/// What of ours ran out, if that is why a call failed with this errno.
fn local_failure(errno: i32) -> Option<Shed> {
    let is = |error: Errno| error.raw_os_error() == errno;
    if is(Errno::MFILE) || is(Errno::NFILE) {
        Some(Shed::Descriptors)
    } else if is(Errno::ADDRNOTAVAIL) {
        Some(Shed::Ports)
    } else if is(Errno::NOBUFS) || is(Errno::NOMEM) {
        Some(Shed::Memory)
    } else {
        None
    }
}

/// The operations of flows.
const FLOW_OPS: [Op; 9] = [
    Op::Connect,
    Op::RecvClient,
    Op::RecvBackend,
    Op::SendClient,
    Op::SendBackend,
    Op::ReadableClient,
    Op::ReadableBackend,
    Op::WritableClient,
    Op::WritableBackend,
];

const fn bit(op: Op) -> u16 {
    1 << op as u8
}

const fn recv_op(from: Side) -> Op {
    match from {
        Side::Client => Op::RecvClient,
        Side::Backend => Op::RecvBackend,
    }
}

const fn readable_op(from: Side) -> Op {
    match from {
        Side::Client => Op::ReadableClient,
        Side::Backend => Op::ReadableBackend,
    }
}

const fn writable_op(to: Side) -> Op {
    match to {
        Side::Client => Op::WritableClient,
        Side::Backend => Op::WritableBackend,
    }
}

const fn send_op(to: Side) -> Op {
    match to {
        Side::Client => Op::SendClient,
        Side::Backend => Op::SendBackend,
    }
}

/// Different for each worker of each process: workers that drew alike would select alike.
fn seed(worker: usize) -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_usize(worker);
    hasher.finish()
}
