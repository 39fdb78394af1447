//! A flow against a shadow model, under every order of completions a seed can think of.
//!
//! The simulated kernel completes what the flow asked for in random order, in part, with failures, with too few buffers;
//! the two simulated peers write streams whose every byte is known by its place. After each step: bytes out are a prefix
//! of bytes in, FIN comes after the last byte, one send is in flight at most, nothing but releases follows the end. At
//! the end: every buffer is back.
//!
//! Whoever is not read is watched: at any time the watch may say that a peer has reset, whatever is still to be read from it.
//!
//! Some clients have a preface: the shell looks at their first bytes where the kernel keeps them and takes some off; of all
//! others each must arrive.
//!
//! What happens next is drawn from a seed (`tests/simulation.rs`) or from bytes that a fuzzer makes (`fuzz/`).

use std::collections::VecDeque;
use std::time::Duration;

use allocation::Timestamp;
use flow::{
    BufferId, Chunk, Chunks, CloseReason, FillEnd, Flow, Input, Inspection, Output, Outputs, RecvEnd, Shot,
    Side, Tuning,
};

const STEPS_MAX: usize = 20_000;
/// Buffers that are shared come first, then those for first ones: fewer than halves, so that some must wait.
const SHARED: u16 = 8;
const BUFFERS: u16 = 9;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Armed {
    No,
    Yes(Shot),
    Cancelling(Shot),
    AwaitingBuffers,
}

/// One peer and its socket.
struct Peer {
    /// How many bytes it will write, and how many of them the flow was given.
    writes: u64,
    read_by_flow: u64,
    /// It ends with RST instead of FIN.
    resets: bool,
    end_seen: bool,
    recv: Armed,
    /// What reached it.
    delivered: u64,
    fin_received: bool,
    sending: Option<Chunk>,
    /// A pipe that carries its bytes, and how many are in it.
    pipe: Option<u64>,
    poll_read: bool,
    poll_write: bool,
    watched: bool,
}

/// What of a client's first bytes is looked at.
#[derive(Clone, Copy)]
struct Preface {
    /// So many must be there.
    needs: u64,
    /// So many are taken off.
    takes: u64,
    /// So many have come, and had at the last look.
    there: u64,
    seen: u64,
}

/// Where decisions come from: bytes as long as there are some, then numbers from a seed, so that every flow ends.
#[derive(Debug)]
pub(crate) struct Entropy {
    bytes: std::collections::vec_deque::IntoIter<u8>,
    state: u64,
}

impl Entropy {
    /// All of it from this seed.
    pub(crate) fn of_seed(seed: u64) -> Self {
        Self { bytes: VecDeque::new().into_iter(), state: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1 }
    }

    /// From these bytes first.
    #[allow(dead_code, reason = "the fuzz target's alone")]
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        Self { bytes: bytes.iter().copied().collect::<VecDeque<u8>>().into_iter(), ..Self::of_seed(1) }
    }

    fn below(&mut self, bound: u64) -> u64 {
        // Small choices are most: a byte each, so that a changed byte changes one of them.
        let wanted = if bound <= 256 { 1 } else { 3 };
        if self.bytes.len() >= wanted {
            return self.bytes.by_ref().take(wanted).fold(0, |n, byte| n << 8 | u64::from(byte)) % bound;
        }
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % bound
    }
}

/// Everything around one flow.
pub(crate) struct World {
    seed: u64,
    entropy: Entropy,
    now: Timestamp,
    tuning: Tuning,
    flow: Flow,
    chunks: Chunks,
    peers: [Peer; 2],
    /// Until it is read.
    preface: Option<Preface>,
    /// Free buffers: shared, and for first ones.
    free: [VecDeque<BufferId>; 2],
    /// For each buffer that holds bytes: from whom, and the place of its first byte in that stream.
    holds: Vec<Option<(Side, u64)>>,
    connecting: bool,
    connect_cancelled: bool,
    /// It waits for room, until then.
    waiting: Option<Timestamp>,
    /// Until when it may wait altogether, from its first time on.
    waits_until: Option<Timestamp>,
    attempts: u32,
    closed: Option<CloseReason>,
    /// What the shell did at once and has still to tell.
    answers: VecDeque<Input>,
    spliced_bytes: u64,
    resets_told: u32,
    verbose: bool,
}

impl World {
    /// A flow that was just accepted. `seed` is what failures are called by.
    pub(crate) fn new(seed: u64, mut entropy: Entropy, verbose: bool) -> Self {
        let mut below = |bound: u64| entropy.below(bound);
        let high = 1 + below(6) as u16;
        let tuning = Tuning {
            preface_timeout: Duration::from_secs(1 + below(5)),
            connect_timeout: Duration::from_secs(1 + below(5)),
            idle_timeout: (below(4) > 0).then(|| Duration::from_secs(1 + below(100))),
            connect_retries: below(4) as u8,
            buffers_high: high,
            buffers_low: below(u64::from(high)) as u16,
            full_read_bytes: 300,
            splice_after: below(4) as u8,
        };
        let mut peer = || Peer {
            writes: [0, 1, 50, 3_000, 60_000][below(5) as usize],
            read_by_flow: 0,
            resets: below(4) == 0,
            end_seen: false,
            recv: Armed::No,
            delivered: 0,
            fin_received: false,
            sending: None,
            pipe: None,
            poll_read: false,
            poll_write: false,
            watched: false,
        };
        let peers = [peer(), peer()];
        let needs = below(80);
        let preface = (below(3) == 0).then(|| Preface { needs, takes: below(needs + 1), there: 0, seen: 0 });
        let mut out = Outputs::new();
        let accept = if preface.is_some() { Flow::accepted_with_preface } else { Flow::accepted };
        let flow = accept(Timestamp::ZERO, &tuning, &mut out);
        let mut world = Self {
            seed,
            entropy,
            now: Timestamp::ZERO,
            tuning,
            flow,
            chunks: Chunks::new(BUFFERS),
            peers,
            preface,
            free: [(0..SHARED).map(BufferId).collect(), (SHARED..BUFFERS).map(BufferId).collect()],
            holds: vec![None; usize::from(BUFFERS)],
            connecting: false,
            connect_cancelled: false,
            waiting: None,
            waits_until: None,
            attempts: 0,
            closed: None,
            answers: VecDeque::new(),
            spliced_bytes: 0,
            resets_told: 0,
            verbose,
        };
        world.obey(&out);
        world
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.entropy.below(bound)
    }

    fn give(&mut self, input: Input) {
        let mut out = Outputs::new();
        self.flow.handle(input, self.now, &self.tuning, &mut self.chunks, &mut out);
        if self.verbose {
            println!("{:>8} ms  {input:?}\n             -> {out:?}", self.now.as_millis());
        }
        self.obey(&out);
        if let Some(answer) = self.answers.pop_front() {
            self.give(answer);
        }
    }

    fn obey(&mut self, out: &Outputs) {
        let seed = self.seed;
        for output in out {
            let over = self.closed.is_some();
            assert!(!over || matches!(output, Output::Release(_)), "seed {seed}: {output:?} after the end");
            match *output {
                Output::Inspect => self.inspect(),
                Output::Connect => {
                    assert!(self.preface.is_none(), "seed {seed}: a connect before the preface is read");
                    assert!(!self.connecting, "seed {seed}: two connects at once");
                    assert!(self.waiting.is_none(), "seed {seed}: it did not wait for its turn");
                    self.attempts += 1;
                    assert!(self.attempts <= u32::from(self.tuning.connect_retries) + 1, "seed {seed}");
                    (self.connecting, self.connect_cancelled) = (true, false);
                }
                Output::CancelConnect => {
                    assert!(self.connecting && !self.connect_cancelled, "seed {seed}: nothing to cancel");
                    self.connect_cancelled = true;
                }
                Output::Recv { from, shot } => {
                    assert!(self.preface.is_none(), "seed {seed}: a receive before the preface is read");
                    let peer = &mut self.peers[from as usize];
                    assert_eq!(peer.recv, Armed::No, "seed {seed}: two receives at once on {from:?}");
                    assert!(!peer.end_seen, "seed {seed}: receive after the end on {from:?}");
                    peer.recv = Armed::Yes(shot);
                }
                Output::CancelRecv { from } => {
                    let peer = &mut self.peers[from as usize];
                    let Armed::Yes(shot) = peer.recv else {
                        panic!("seed {seed}: no receive to cancel on {from:?}");
                    };
                    peer.recv = Armed::Cancelling(shot);
                }
                Output::AwaitBuffers { from } => {
                    let peer = &mut self.peers[from as usize];
                    assert_eq!(peer.recv, Armed::No, "seed {seed}");
                    peer.recv = Armed::AwaitingBuffers;
                }
                Output::Send { to, chunk } => self.send(to, chunk),
                Output::Splice { from } => {
                    let peer = &self.peers[from as usize];
                    assert_eq!(peer.recv, Armed::No, "seed {seed}: spliced while receiving from {from:?}");
                    assert!(peer.pipe.is_none(), "seed {seed}: two pipes for {from:?}");
                    let target = &self.peers[from.opposite() as usize];
                    assert!(target.sending.is_none(), "seed {seed}: spliced during a send");
                    assert_eq!(
                        target.delivered, peer.read_by_flow,
                        "seed {seed}: spliced before queued bytes"
                    );
                    if self.below(3) == 0 {
                        self.answers.push_back(Input::SpliceRefused { from });
                    } else {
                        self.peers[from as usize].pipe = Some(0);
                    }
                }
                Output::Unsplice { from } => {
                    let pipe = self.peers[from as usize].pipe.take();
                    assert_eq!(pipe, Some(0), "seed {seed}: a pipe given up with bytes in it");
                }
                Output::Fill { from } => self.fill(from),
                Output::Flush { to } => self.flush(to),
                Output::PollRead { from } => {
                    let peer = &mut self.peers[from as usize];
                    let polled = peer.pipe.is_some() || self.preface.is_some() && from == Side::Client;
                    assert!(!peer.poll_read && polled, "seed {seed}: two polls of {from:?}");
                    peer.poll_read = true;
                }
                Output::PollWrite { to } => {
                    let peer = &mut self.peers[to as usize];
                    assert!(!peer.poll_write, "seed {seed}: two polls of {to:?}");
                    peer.poll_write = true;
                }
                Output::Watch { from } => {
                    let peer = &mut self.peers[from as usize];
                    let is_read = matches!(peer.recv, Armed::Yes(_) | Armed::Cancelling(_)) || peer.poll_read;
                    assert!(!is_read && !peer.end_seen, "seed {seed}: {from:?} is watched and read");
                    peer.watched = true;
                }
                Output::AskQuiet => {
                    // Now and then the kernel has sent what it held meanwhile.
                    let ago = if self.below(2) == 0 { self.below(120_000) } else { u64::MAX };
                    let since = Timestamp::from_millis(self.now.as_millis().saturating_sub(ago));
                    self.answers.push_back(Input::Quiet { since });
                }
                Output::Shutdown { to } => {
                    let source = &self.peers[to.opposite() as usize];
                    assert_eq!(source.pipe.unwrap_or(0), 0, "seed {seed}: FIN before what is in the pipe");
                    assert!(source.end_seen && !source.resets, "seed {seed}: a FIN nobody sent");
                    let (written, peer) = (source.writes, &mut self.peers[to as usize]);
                    assert_eq!(peer.delivered, written, "seed {seed}: FIN before the last byte to {to:?}");
                    assert!(peer.sending.is_none(), "seed {seed}: FIN during a send to {to:?}");
                    assert!(!peer.fin_received, "seed {seed}: two FINs to {to:?}");
                    peer.fin_received = true;
                }
                Output::Release(buffer) => {
                    let held = self.holds[usize::from(buffer.0)].take();
                    assert!(held.is_some(), "seed {seed}: {buffer:?} released twice");
                    for peer in &self.peers {
                        let sending = peer.sending.is_some_and(|c| c.buffer == buffer);
                        assert!(!sending, "seed {seed}: {buffer:?} released while the kernel reads it");
                    }
                    self.free[usize::from(buffer.0 >= SHARED)].push_back(buffer);
                }
                Output::Closed { reset_client, reset_backend, reason } => {
                    self.closed = Some(reason);
                    let orderly = reason == CloseReason::Ended;
                    // Whoever did not end it by itself learns of it by a reset.
                    assert_eq!(reset_client, !orderly && reason != CloseReason::ClientReset, "seed {seed}");
                    assert_eq!(reset_backend, !orderly && reason != CloseReason::BackendReset, "seed {seed}");
                    if orderly {
                        for side in Side::BOTH {
                            let wrote = self.peers[side.opposite() as usize].writes;
                            let got = self.peers[side as usize].delivered;
                            assert_eq!(wrote, got, "seed {seed}: bytes lost on the way to {side:?}");
                        }
                    }
                }
            }
        }
        // What makes first buffers enough for everybody: no half ever holds two.
        for side in Side::BOTH {
            let first = self.holds[usize::from(SHARED)..].iter().flatten().filter(|(from, _)| *from == side);
            assert!(first.count() <= 1, "seed {seed}: {side:?} holds two first buffers");
        }
    }

    fn send(&mut self, to: Side, chunk: Chunk) {
        let seed = self.seed;
        let (from, place) = self.holds[usize::from(chunk.buffer.0)].expect("the buffer holds bytes");
        let peer = &mut self.peers[to as usize];
        assert!(peer.sending.is_none(), "seed {seed}: two sends at once to {to:?}");
        assert!(!peer.fin_received, "seed {seed}: bytes after FIN to {to:?}");
        assert_eq!(from, to.opposite(), "seed {seed}: bytes sent back");
        let first = place + u64::from(chunk.start);
        assert_eq!(first, peer.delivered, "seed {seed}: bytes to {to:?} out of order");
        assert!(chunk.length > 0, "seed {seed}: an empty send");
        peer.sending = Some(chunk);
    }

    fn inspect(&mut self) {
        let invalid = self.below(60) == 0;
        let mut preface = self.preface.expect("no look after the last");
        let client = &mut self.peers[Side::Client as usize];
        let at_end = preface.there == client.writes;
        let found = match () {
            () if invalid => Inspection::Invalid,
            () if at_end && client.resets => Inspection::Reset,
            () if client.writes == 0 => Inspection::Eof,
            () if preface.there >= preface.needs => Inspection::Done,
            () if preface.there == preface.seen => Inspection::Unchanged,
            () => Inspection::Incomplete,
        };
        preface.seen = preface.there;
        self.preface = Some(preface);
        if found == Inspection::Done {
            self.preface = None;
            // What is taken off has arrived where it should.
            client.read_by_flow = preface.takes;
            self.peers[Side::Backend as usize].delivered = preface.takes;
        }
        self.answers.push_back(Input::Inspected(found));
    }

    fn fill(&mut self, from: Side) {
        let room = 1 + self.below(20_000);
        let peer = &mut self.peers[from as usize];
        // Refused a moment ago: the shell has no pipe and does nothing.
        let Some(held) = peer.pipe else { return };
        let bytes = (peer.writes - peer.read_by_flow).min(room);
        peer.read_by_flow += bytes;
        peer.pipe = Some(held + bytes);
        let at_end = peer.read_by_flow == peer.writes;
        let (resets, see_end) = (peer.resets, self.below(2) == 0);
        let end = match () {
            () if !at_end || !see_end => FillEnd::Blocked,
            () if resets => FillEnd::Reset,
            () => FillEnd::Eof,
        };
        self.peers[from as usize].end_seen |= end != FillEnd::Blocked;
        self.answers.push_back(Input::Filled { from, bytes: bytes as u32, end });
    }

    fn flush(&mut self, to: Side) {
        let seed = self.seed;
        let (all, room) = (self.below(2) == 0, self.below(20_000));
        let held = self.peers[to.opposite() as usize].pipe.expect("a pipe to flush");
        let peer = &mut self.peers[to as usize];
        assert!(held > 0 && peer.sending.is_none() && !peer.fin_received, "seed {seed}");
        let failed = peer.end_seen && peer.resets;
        let bytes = if failed {
            0
        } else if all {
            held
        } else {
            held.min(room)
        };
        peer.delivered += bytes;
        self.spliced_bytes += bytes;
        self.peers[to.opposite() as usize].pipe = Some(held - bytes);
        self.answers.push_back(Input::Flushed { to, bytes: bytes as u32, failed });
    }

    fn complete_poll(&mut self, side: Side, write: bool) -> bool {
        let peer = &mut self.peers[side as usize];
        let poll = if write { &mut peer.poll_write } else { &mut peer.poll_read };
        if !std::mem::take(poll) {
            return false;
        }
        let more = self.below(40);
        if let Some(preface) = &mut self.preface {
            // Now and then a poll tells of nothing.
            preface.there = (preface.there + more).min(self.peers[Side::Client as usize].writes);
        }
        // After the end the shell cancels polls and tells nobody.
        if self.closed.is_none() {
            self.give(if write { Input::Writable { to: side } } else { Input::Readable { from: side } });
        }
        true
    }

    /// One thing that can happen next, chosen by the seed. False when nothing can.
    fn step(&mut self) -> bool {
        let start = self.below(14);
        (0..14).any(|n| match (start + n) % 14 {
            13 if self.closed.is_none() => self.tell_reset(),
            12 if self.waiting.is_some() && self.closed.is_none() => self.room(),
            10 => self.complete_poll(Side::Client, false) || self.complete_poll(Side::Backend, true),
            11 => self.complete_poll(Side::Backend, false) || self.complete_poll(Side::Client, true),
            0 if self.connecting => self.complete_connect(),
            1 | 2 => self.receive(Side::Client),
            3 | 4 => self.receive(Side::Backend),
            5 => self.complete_send(Side::Client),
            6 => self.complete_send(Side::Backend),
            7 => self.buffers_back(),
            8 if self.closed.is_none() => self.pass_time(),
            9 if self.closed.is_none() && self.below(500) == 0 => {
                self.give(Input::Abort(CloseReason::Drained));
                true
            }
            _ => false,
        })
    }

    /// Whoever is watched may have reset.
    fn tell_reset(&mut self) -> bool {
        let has_reset = |side: &Side| self.peers[*side as usize].watched && self.peers[*side as usize].resets;
        let Some(from) = Side::BOTH.into_iter().find(has_reset).filter(|_| self.below(8) == 0) else {
            return false;
        };
        self.resets_told += 1;
        self.give(Input::Reset { from });
        true
    }

    /// Nobody who may still send is left alone: it is read, or a poll or a watch tells of its end.
    fn check_watched(&self) {
        let seed = self.seed;
        let sides: &[Side] = match () {
            () if self.closed.is_some() || self.preface.is_some() => &[],
            () if self.flow.is_open() => &Side::BOTH,
            () if self.waiting.is_some() || self.connecting => &[Side::Client],
            () => &[], // It dies.
        };
        for side in sides {
            let peer = &self.peers[*side as usize];
            let is_read = matches!(peer.recv, Armed::Yes(_) | Armed::Cancelling(_)) || peer.poll_read;
            assert!(is_read || peer.watched || peer.end_seen, "seed {seed}: nobody looks after {side:?}");
        }
    }

    fn complete_connect(&mut self) -> bool {
        self.connecting = false;
        if self.closed.is_none() && !self.connect_cancelled && self.below(6) == 0 {
            let soon = self.now + Duration::from_millis(1 + self.below(2_000));
            let until = *self.waits_until.get_or_insert(soon);
            // Before an answer it was no attempt.
            self.attempts -= 1;
            self.waiting = Some(until);
            self.give(Input::Queued { until });
            return true;
        }
        let answer = match self.below(10) {
            0 if !self.connect_cancelled => Input::NoBackend,
            1 | 2 => Input::ConnectFailed,
            _ if self.connect_cancelled && self.below(4) > 0 => Input::ConnectFailed,
            _ if self.closed.is_some() => return true, // The shell closes the socket and tells nobody.
            _ => Input::Connected,
        };
        self.give(answer);
        true
    }

    fn room(&mut self) -> bool {
        if self.below(3) > 0 {
            return false;
        }
        self.waiting = None;
        self.give(Input::Room);
        assert!(self.connecting, "seed {}: a turn that was not taken", self.seed);
        true
    }

    fn receive(&mut self, from: Side) -> bool {
        let closed = self.closed.is_some();
        let cancel_done = self.below(2) == 0;
        let still_armed = self.below(10) > 0;
        let take = 1 + self.below(900);
        let peer = &mut self.peers[from as usize];
        let (cancelling, shot) = match peer.recv {
            Armed::Yes(shot) => (false, shot),
            Armed::Cancelling(shot) => (true, shot),
            Armed::No | Armed::AwaitingBuffers => return false,
        };
        // After the end the shell cancels everything.
        if (closed || cancelling) && cancel_done {
            peer.recv = Armed::No;
            self.give(Input::RecvEnded { from, why: RecvEnd::Cancelled });
            return true;
        }
        let left = peer.writes - peer.read_by_flow;
        if left == 0 {
            peer.recv = Armed::No;
            peer.end_seen = true;
            let why = if peer.resets { RecvEnd::Reset } else { RecvEnd::Eof };
            self.give(Input::RecvEnded { from, why });
            return true;
        }
        let Some(buffer) = self.free[usize::from(shot == Shot::First)].pop_front() else {
            peer.recv = Armed::No;
            self.give(Input::RecvEnded { from, why: RecvEnd::NoBuffers });
            return true;
        };
        let length = take.min(left);
        self.holds[usize::from(buffer.0)] = Some((from, peer.read_by_flow));
        peer.read_by_flow += length;
        let armed = still_armed && shot == Shot::Many;
        if !armed {
            peer.recv = Armed::No;
        }
        let chunk = Chunk { buffer, start: 0, length: length as u32 };
        self.give(Input::Received { from, chunk, armed });
        true
    }

    fn complete_send(&mut self, to: Side) -> bool {
        let Some(chunk) = self.peers[to as usize].sending.take() else { return false };
        let partial = self.below(u64::from(chunk.length)) as u32 + 1;
        let bytes = if self.below(3) == 0 { partial } else { chunk.length };
        let peer = &mut self.peers[to as usize];
        let gone = peer.end_seen && peer.resets;
        if gone {
            self.give(Input::SendFailed { to });
        } else {
            peer.delivered += u64::from(bytes);
            self.give(Input::Sent { to, bytes });
        }
        true
    }

    fn buffers_back(&mut self) -> bool {
        let waiting = Side::BOTH.into_iter().find(|s| self.peers[*s as usize].recv == Armed::AwaitingBuffers);
        let Some(from) = waiting.filter(|_| !self.free[1].is_empty()) else { return false };
        self.peers[from as usize].recv = Armed::No;
        self.give(Input::BuffersBack { from });
        true
    }

    fn pass_time(&mut self) -> bool {
        let deadline = self.flow.deadline(&self.tuning);
        // Now and then both peers fall silent for a while.
        let span = if self.below(40) == 0 { 120_000 } else { 400 };
        self.now = self.now + Duration::from_millis(self.below(span));
        if let Some(until) = self.waiting {
            assert_eq!(deadline, until, "seed {}: it waits for another time", self.seed);
        }
        if self.now >= deadline {
            self.give(Input::Deadline);
            let waits = self.waiting.is_some() && self.closed.is_none();
            assert!(!waits, "seed {}: it waits for longer than it may", self.seed);
        }
        true
    }

    /// To its end: why it ended, how many bytes were spliced, and how often a watch told of a reset.
    pub(crate) fn run(mut self) -> (CloseReason, u64, u32) {
        for _ in 0..STEPS_MAX {
            if !self.step() {
                break;
            }
            self.check_watched();
        }
        let seed = self.seed;
        let reason = self.closed.unwrap_or_else(|| panic!("seed {seed}: the flow never ended"));
        assert!(self.flow.is_closed());
        let free: usize = self.free.iter().map(VecDeque::len).sum();
        assert_eq!(free, usize::from(BUFFERS), "seed {seed}: buffers leaked");
        assert_eq!(self.flow.deadline(&self.tuning), Timestamp::NEVER, "seed {seed}");
        (reason, self.spliced_bytes, self.resets_told)
    }
}
