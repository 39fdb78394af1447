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
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use allocation::{Reader, Timestamp};
use flow::{Chunks, Input, Outputs, Side, TimerWheel, Tuning};
use rustix::thread::{CpuSet, sched_setaffinity};
use uring::{Completion, EnterError, Group, Op, Setup, SetupError, Token, Wait};

use crate::access::AccessLog;
use crate::clock::{Clock, Now};
use crate::config::UdpConfig;
use crate::io::Io;
use crate::listen;
use crate::pipes::Pipes;
use crate::run::{Orders, Shared};
use crate::share::PoolShare;
use crate::slots::Slots;
use crate::stats::{Stats, WorkerStats};
use crate::towards::Towards;
use admit::Gate;
use peaks::Peaks;
use preface::Prefaces;
use queue::Room;
use shortages::Shortages;
use slot::{FlowSlot, Listener, Syn};
use udp::{Udp, UdpShared};

pub(crate) use preface::Sorter;

mod accept;
pub(crate) mod admit;
mod close;
mod connect;
mod inputs;
mod leave;
mod noted;
mod peaks;
mod perform;
mod preface;
pub(crate) mod queue;
mod shortages;
mod slot;
mod splice;
pub(crate) mod udp;
mod waits;

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
pub(crate) const SUBMISSIONS: u32 = 1_024;
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
    pub(crate) listeners: Vec<ListenerSetup>,
    pub(crate) flows_max: u32,
    pub(crate) buffers_max: u32,
    pub(crate) tuning: Tuning,
    pub(crate) access_log: Option<AccessLog>,
}

/// A listener, before it accepts.
pub(crate) struct ListenerSetup {
    /// One for each port.
    pub(crate) sockets: Vec<(u16, OwnedFd)>,
    pub(crate) backlog: u16,
    pub(crate) targets: Vec<TargetSetup>,
    /// Who turns new flows away; `None`: nobody is.
    pub(crate) gate: Option<Arc<Gate>>,
    /// Of a listener of datagrams: how, where it is bound, and what its workers share.
    pub(crate) udp: Option<(UdpConfig, SocketAddr, Arc<UdpShared>)>,
    pub(crate) sorter: Option<Sorter>,
}

/// A pool that serves a listener.
pub(crate) struct TargetSetup {
    pub(crate) reader: Reader,
    pub(crate) towards: Arc<Towards>,
    pub(crate) share: Option<PoolShare>,
}

/// One worker, on its own thread.
pub(crate) struct Worker<I> {
    worker: usize,
    ring: I,
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
    shortages: Shortages,
    peaks: Peaks,
    /// Receives that found no buffer, oldest first. At most two for each flow.
    buffer_waits: VecDeque<(u32, u32, Side)>,
    /// When to accept again after running out of something.
    accept_again: Option<Timestamp>,
    /// That accepting rests was said; once is enough until it works again.
    accept_warned: bool,
    /// When flows that are left are reset.
    drain_deadline: Option<Timestamp>,
    orders: Orders,
    /// Where queues are to be looked at.
    room: Room,
    access_log: Option<AccessLog>,
    /// Kept between steps for their memory.
    outputs: Outputs,
    followups: VecDeque<Input>,
    expired: Vec<u32>,
    udp: Udp,
    /// What clients send first is looked at here, and headers are made.
    prefaces: Prefaces,
}

impl<I: Io> Worker<I> {
    /// Makes the ring, on the thread that will use it, and starts accepting.
    pub(crate) fn start(setup: WorkerSetup) -> Result<Self, SetupError> {
        if let Some(core) = setup.core {
            let mut cores = CpuSet::new();
            cores.set(core);
            if let Err(error) = sched_setaffinity(None, &cores) {
                tracing::warn!(worker = setup.worker, core, %error, "could not pin the worker to its core");
            }
        }
        let any_udp = setup.listeners.iter().any(|listener| listener.udp.is_some());
        let ring: I = make_ring(setup.buffers_max, if any_udp { udp::DATAGRAMS_MAX } else { 0 })?;
        let now = setup.clock.now();
        // One retry: nobody resends what UDP loses, and a datagram that kills a backend should not go through all of them.
        let retries = setup.tuning.connect_retries.min(1);
        let seed = || seed(setup.worker);
        let listener = |listener| Listener::new(listener, setup.worker, retries, seed);
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
            shortages: Shortages::default(),
            peaks: Peaks::default(),
            buffer_waits: VecDeque::new(),
            accept_again: None,
            accept_warned: false,
            drain_deadline: None,
            orders: Orders::default(),
            room: Room::default(),
            access_log: setup.access_log,
            outputs: Outputs::new(),
            followups: VecDeque::new(),
            expired: Vec::new(),
            udp: Udp::new(setup.worker, now.timestamp(), seed(), setup.flows_max),
            prefaces: Prefaces::new(seed()),
        };
        worker.open_listeners().map_err(|source| SetupError::Other { step: "listen", source })?;
        Ok(worker)
    }

    fn open_listeners(&mut self) -> io::Result<()> {
        for listener in self.listeners.iter().filter(|listener| listener.udp.is_none()) {
            for socket in listener.doors.iter().filter_map(|door| door.socket.as_ref()) {
                listen::start(socket, listener.backlog)?;
            }
        }
        self.start_udp();
        self.finish_datagrams().map_err(io::Error::other)?;
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
            self.finish_datagrams()?;
            self.expire()?;
            self.serve_buffer_waits()?;
            self.serve_queues()?;
            self.give_back_buffers()?;
            self.publish_stats();
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let leaving = self.orders.stop || self.orders.drain_within.is_some();
        leaving
            && self.flows.len() == 0
            && self.udp.is_empty()
            && self.listeners.iter().all(Listener::is_closed)
    }

    fn wait(&self) -> Wait {
        let own = [self.accept_again, self.drain_deadline, self.peaks.next_wake()];
        let timers = [self.wheel.next_wake(), self.udp.next_wake()];
        match timers.into_iter().chain(own).flatten().min() {
            Some(at) => Wait::For(at.since(self.now.timestamp())),
            None => Wait::Forever,
        }
    }

    fn begin_batch(&mut self) {
        self.shortages.next_batch();
        for listener in &mut self.listeners {
            listener.begin_batch();
        }
    }

    fn publish_stats(&mut self) {
        let all = |count: fn(&I, Group) -> u32| -> u32 {
            Group::ALL.into_iter().map(|group| count(&self.ring, group)).sum()
        };
        self.stats.buffers.set(u64::from(all(I::buffers)));
        self.stats.buffers_in_use.set(u64::from(all(I::buffers_held)));
        self.stats.enters.set(self.ring.enters());
        self.stats
            .ejections_ignored
            .set(self.listeners.iter().flat_map(|l| &l.targets).map(|t| t.selector.panics()).sum());
        self.stats.completion_overflows.set(u64::from(self.ring.completion_overflows()));
    }

    // --- One completion ---------------------------------------------------------------------------------------------

    fn step(&mut self, completion: Completion) -> Result<(), EnterError> {
        match completion.token.op {
            Op::Accept => self.accepted(completion),
            Op::Wake => self.rung(),
            Op::Datagrams => self.datagrams_came(&completion),
            Op::Answers => self.answers_came(&completion),
            Op::SendDatagrams => self.sent(&completion),
            // There was nothing to cancel any more; a close that fails has closed; buffers are the ring's to withdraw.
            Op::Cancel | Op::Close | Op::Withdraw => Ok(()),
            _ => self.step_flow(&completion),
        }
    }

    fn step_flow(&mut self, completion: &Completion) -> Result<(), EnterError> {
        let Token { op, slot: index, .. } = completion.token;
        let current = self.flows.generation(index).is_some_and(|g| completion.token.is_of(g));
        let Some(slot) = self.flows.get_mut(index).filter(|_| current) else {
            debug_assert!(false, "a slot outlives what is in flight for it: {completion:?}");
            if let Some(buffer) = completion.buffer {
                self.ring.release(buffer);
            }
            return Ok(());
        };
        if !completion.more {
            slot.in_flight &= !bit(op);
        }
        let input = match op {
            Op::Connect => self.connect_input(index, completion.result)?,
            Op::RecvClient => self.recv_input(index, Side::Client, completion),
            Op::RecvBackend => self.recv_input(index, Side::Backend, completion),
            Op::SendClient => self.send_input(index, Side::Client, completion.result)?,
            Op::SendBackend => {
                if slot.syn != Syn::Plain {
                    self.syn_is_sent(index)?;
                }
                self.send_input(index, Side::Backend, completion.result)?
            }
            Op::ReadableBackend if slot.asks_for_tls() => self.tls_answered(index, completion.result)?,
            // However a poll ends, the look or splice that follows finds out what is the matter.
            Op::ReadableClient => Some(Input::Readable { from: Side::Client }),
            Op::ReadableBackend => Some(Input::Readable { from: Side::Backend }),
            Op::WritableClient => self.writable_input(index, Side::Client, completion)?,
            Op::WritableBackend => self.writable_input(index, Side::Backend, completion)?,
            Op::WatchClient => self.watch_input(index, Side::Client, completion.result),
            Op::WatchBackend => self.watch_input(index, Side::Backend, completion.result),
            Op::Accept
            | Op::Wake
            | Op::Cancel
            | Op::Close
            | Op::Datagrams
            | Op::Answers
            | Op::SendDatagrams
            | Op::Withdraw => None, // Not of a flow: `step` took them.
        };
        match input {
            Some(input) => self.drive(index, input),
            None => {
                self.free_if_over(index);
                Ok(())
            }
        }
    }

    // --- Driving a flow ---------------------------------------------------------------------------------------------

    /// Gives the flow an input, does what it says, and so on until it has nothing more to say.
    fn drive(&mut self, index: u32, input: Input) -> Result<(), EnterError> {
        debug_assert!(self.followups.is_empty(), "they are another flow's");
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
}

fn make_ring<I: Io>(buffers_max: u32, datagrams_max: u32) -> Result<I, SetupError> {
    let mut buffers_max = buffers_max;
    loop {
        let setup = Setup {
            submissions: SUBMISSIONS,
            shared: SHARED_AT_START,
            shared_max: SHARED_MAX,
            first_max: buffers_max,
            buffer_bytes: BUFFER_BYTES,
            datagrams_max,
            datagram_bytes: udp::DATAGRAM_BYTES,
        };
        match I::start(setup) {
            // The buffer ring itself counts against RLIMIT_MEMLOCK: a smaller one works, with fewer buffers at most.
            Err(SetupError::Memory { step, source }) if buffers_max > BUFFERS_MORE => {
                tracing::warn!(buffers_max, step, %source, "not enough locked memory; trying with half the buffers");
                buffers_max /= 2;
            }
            result => return result,
        }
    }
}

/// The operations of flows.
const FLOW_OPS: [Op; 11] = [
    Op::Connect,
    Op::RecvClient,
    Op::RecvBackend,
    Op::SendClient,
    Op::SendBackend,
    Op::ReadableClient,
    Op::ReadableBackend,
    Op::WritableClient,
    Op::WritableBackend,
    Op::WatchClient,
    Op::WatchBackend,
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

const fn watch_op(from: Side) -> Op {
    match from {
        Side::Client => Op::WatchClient,
        Side::Backend => Op::WatchBackend,
    }
}

const fn send_op(to: Side) -> Op {
    match to {
        Side::Client => Op::SendClient,
        Side::Backend => Op::SendBackend,
    }
}

/// Different for each worker of each process: workers that drew alike would select alike.
pub(crate) fn seed(worker: usize) -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_usize(worker);
    hasher.finish()
}
