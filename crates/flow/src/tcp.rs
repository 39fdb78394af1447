//! One TCP flow: two connections, two halves, one end.
//!
//! ```text
//!            NoBackend, last ConnectFailed, client Reset, Abort
//!          +-----------------------------------------------------------------+
//!          |                                                                 v
//!  Connecting --Connected--> Open --both halves passed their FIN---------> Closed
//!   |   ^  ^ |                |                                             ^  ^
//!   |   |  +-+                +--Reset / SendFailed / idle / Abort--> Dying-+  |
//!   |   |  ConnectFailed,        (one side is gone: what it sent before is     |
//!   |   |  retries left           still flushed to the other, for FLUSH at     |
//!   |   |                         most, then the other is reset)               |
//!   |   +----Room----+                                                         |
//!   +--Queued--> Waiting --too long, client gone, Abort------------------------+
//! ```
//!
//! A flow that waits has no backend and asks for none: whoever keeps the queue gives it its turn with [`Input::Room`]. Its
//! client is read as while connecting, into at most as many buffers.
//!
//! A flow that is to be selected by what its client sends first has a phase before: `Preface --Inspected(Done)--> Connecting`.
//! The client's bytes stay in the kernel meanwhile, so that a slow one holds nothing; its time is bounded from the accept on,
//! whatever it sends (`preface_timeout`).
//!
//! A **half** is one direction, named by its source:
//!
//! ```text
//!   Open --Eof--> Eof, bytes queued --queue empty--> Passed      (SHUT_WR on the target only when nothing is pending)
//! ```
//!
//! A half whose source is not read, because its target is slow, is **held back**. Nothing would tell of its source's reset
//! then, so the source is watched ([`Output::Watch`]) from the first time on that it is held back. Its FIN may wait: what came
//! before it does too.
//!
//! Invariants: bytes leave a half in the order in which they came; at most one send is in flight for each half; FIN is
//! passed on only after the last byte; every buffer handed in by [`Input::Received`] is handed back once by
//! [`Output::Release`]; after [`Output::Closed`] nothing but releases comes.

use std::time::Duration;

use allocation::Timestamp;

use crate::chunk::{BufferId, Chunk, ChunkQueue, Chunks};

/// A fill below it is short: below two pages splicing costs more than copying (HAProxy draws the line at 4 KiB).
const SHORT_FILL_BYTES: u32 = 8 * 1024;
/// After so many short fills in a row a half copies again.
const SHORT_FILLS_MAX: u8 = 4;

/// Reads in a row that leave half of their buffer free, after which a half receives until cancelled again.
const SMALL_READS: u8 = 8;

/// How long a flow waits before it looks at its preface again, when a poll said that there is more and there was not: at
/// least this, and then twice as long each time.
const PREFACE_REST: Duration = Duration::from_millis(20);

/// How long bytes that came before a reset may take to reach the other side, before it is reset too.
const FLUSH: Duration = Duration::from_secs(2);

/// The two sides of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// Who connected to a listener.
    Client,
    /// Whom the flow was given to.
    Backend,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Client, Self::Backend];

    /// The other one.
    pub const fn opposite(self) -> Self {
        match self {
            Self::Client => Self::Backend,
            Self::Backend => Self::Client,
        }
    }

    const fn index(self) -> usize {
        self as usize
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// No backend could be selected for [`Output::Connect`].
    NoBackend,
    /// Every backend has as many flows as it takes: instead of an answer to [`Output::Connect`], the flow waits for
    /// [`Input::Room`].
    Queued {
        /// No longer than until then.
        until: Timestamp,
    },
    /// It is the flow's turn.
    Room,
    /// The connect succeeded.
    Connected,
    /// The connect failed, timed out or was cancelled.
    ConnectFailed,
    /// Bytes came. `armed`: the receive stays armed (`IORING_CQE_F_MORE`).
    Received {
        /// From where.
        from: Side,
        /// The bytes; their buffer belongs to the flow until it releases it.
        chunk: Chunk,
        /// Whether the receive is still armed.
        armed: bool,
    },
    /// The receive ended without bytes.
    RecvEnded {
        /// On which side.
        from: Side,
        /// Why.
        why: RecvEnd,
    },
    /// The send in flight was taken by the kernel, at least in part.
    Sent {
        /// To where.
        to: Side,
        /// How many bytes; 1 or more.
        bytes: u32,
    },
    /// The send in flight failed: that side takes no more bytes.
    SendFailed {
        /// To where.
        to: Side,
    },
    /// Buffers are back for a receive that had found none ([`RecvEnd::NoBuffers`]).
    BuffersBack {
        /// On which side.
        from: Side,
    },
    /// There is no pipe for [`Output::Splice`]: the half goes on copying.
    SpliceRefused {
        /// Which half, by its source.
        from: Side,
    },
    /// [`Output::PollRead`]: the source has bytes, its end, or an error.
    Readable {
        /// On which side.
        from: Side,
    },
    /// [`Output::Watch`]: the source has sent RST, or there was an error that amounts to it, and no FIN before. What came before
    /// can still be received.
    Reset {
        /// By which side.
        from: Side,
    },
    /// [`Output::Inspect`] was done.
    Inspected(Inspection),
    /// [`Output::Fill`] was done.
    Filled {
        /// From where.
        from: Side,
        /// Bytes that are in the pipe now and were not before.
        bytes: u32,
        /// Why it stopped.
        end: FillEnd,
    },
    /// [`Output::PollWrite`]: the target takes bytes, or has an error.
    Writable {
        /// On which side.
        to: Side,
    },
    /// [`Output::Flush`] was done.
    Flushed {
        /// To where.
        to: Side,
        /// Bytes that left the pipe.
        bytes: u32,
        /// The target takes no more, for ever.
        failed: bool,
    },
    /// The moment of [`Flow::deadline`] has come.
    Deadline,
    /// [`Output::AskQuiet`]: neither side was sent a byte since then.
    Quiet {
        /// The later of the two.
        since: Timestamp,
    },
    /// Someone above wants it gone.
    Abort(CloseReason),
}

/// What a look at the client's first bytes found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inspection {
    /// More is needed, and a poll will tell when it is there.
    Incomplete,
    /// There is nothing that was not there before, whatever the poll said: FIN with bytes before it, or a receive buffer that
    /// takes no more.
    Unchanged,
    /// The preface is read: select.
    Done,
    /// It is not what the listener takes.
    Invalid,
    /// FIN, and no byte before it.
    Eof,
    /// RST, or an error that amounts to it.
    Reset,
}

/// Why filling a pipe stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FillEnd {
    /// The source has no more for now, or the pipe is full.
    Blocked,
    /// FIN.
    Eof,
    /// RST, or an error that amounts to it.
    Reset,
}

/// Why a receive ended without bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecvEnd {
    /// FIN: the side sends no more, and may still receive.
    Eof,
    /// RST, or an error that amounts to it.
    Reset,
    /// No buffer was free; the bytes wait in the kernel.
    NoBuffers,
    /// [`Output::CancelRecv`] took effect.
    Cancelled,
}

/// How much a receive takes, and from which buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shot {
    /// Until cancelled, as many buffers as bytes come, of those that all flows share.
    Many,
    /// One buffer, for a half that holds none: of those that are kept so that each half can have one.
    First,
    /// One more buffer, of those that all flows share.
    Further,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Select a backend that this flow has not tried and connect to it; answer with [`Input::Connected`],
    /// [`Input::ConnectFailed`], [`Input::NoBackend`] or [`Input::Queued`].
    Connect,
    /// Cancel the connect in flight; it still ends with one of its answers.
    CancelConnect,
    /// Arm a receive.
    Recv {
        /// On which side.
        from: Side,
        /// How much of it, and whose buffers.
        shot: Shot,
    },
    /// Cancel the armed receive; it still ends with [`Input::RecvEnded`], maybe after more bytes.
    CancelRecv {
        /// On which side.
        from: Side,
    },
    /// Tell the flow with [`Input::BuffersBack`] when buffers are back.
    AwaitBuffers {
        /// For which side's receive.
        from: Side,
    },
    /// Send these bytes; answer with [`Input::Sent`] or [`Input::SendFailed`].
    Send {
        /// To where.
        to: Side,
        /// The bytes.
        chunk: Chunk,
    },
    /// Move this half's bytes in the kernel from now on: get a pipe for it. Without one, say
    /// [`Input::SpliceRefused`].
    Splice {
        /// Which half, by its source.
        from: Side,
    },
    /// The half copies again; its pipe is empty and free.
    Unsplice {
        /// Which half, by its source.
        from: Side,
    },
    /// Splice what the source has into the half's pipe, without waiting; answer with [`Input::Filled`].
    Fill {
        /// From where.
        from: Side,
    },
    /// Splice what is in the pipe to the target, without waiting; answer with [`Input::Flushed`].
    Flush {
        /// To where.
        to: Side,
    },
    /// Look at the client's first bytes; answer with [`Input::Inspected`].
    Inspect,
    /// Say [`Input::Readable`] when the source can be read.
    PollRead {
        /// On which side.
        from: Side,
    },
    /// Say [`Input::Writable`] when the target can be written.
    PollWrite {
        /// On which side.
        to: Side,
    },
    /// Say [`Input::Reset`] if the source resets, from now on until the end; nothing else reads from it for a while. Once said, it
    /// may be said again any number of times, and is to be done once.
    Watch {
        /// Which side.
        from: Side,
    },
    /// Say with [`Input::Quiet`] when TCP last sent a byte to either side. It goes on sending what it holds, megabytes of it, and
    /// says that there is room for more when a third of that has gone: a slow reader takes bytes long after the last that were given
    /// to it here.
    AskQuiet,
    /// Pass FIN on: `shutdown(SHUT_WR)`.
    Shutdown {
        /// To where.
        to: Side,
    },
    /// The buffer is free.
    Release(BufferId),
    /// The flow is over: close both sides.
    Closed {
        /// RST instead of FIN to the client.
        reset_client: bool,
        /// RST instead of FIN to the backend.
        reset_backend: bool,
        /// Why.
        reason: CloseReason,
    },
}

/// Outputs of one step, in the order in which they must be done. The shell keeps one and clears it.
pub type Outputs = Vec<Output>;

/// Why a flow ended. A closed set: each is a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CloseReason {
    /// Both sides sent FIN, and got the other's.
    Ended,
    /// The client reset it.
    ClientReset,
    /// The backend reset it.
    BackendReset,
    /// No backend was ready, or all that were tried failed.
    NoBackend,
    /// All connects that its retries allowed failed.
    ConnectFailed,
    /// Neither side sent a byte, nor was sent one, for the idle timeout.
    Idle,
    /// The drain deadline passed, or the process left at once.
    Drained,
    /// No descriptor, port or memory was left for its backend connection.
    Exhausted,
    /// Its pool had no room, and neither had its queue; or it waited there for too long.
    Shed,
    /// The client said that it has no more to say, before it had said anything, and while the flow waited.
    ClientLeft,
    /// What a client sends first did not come in time.
    PrefaceTimeout,
    /// What a client sent first is not what the listener takes.
    PrefaceInvalid,
    /// The client went before it sent anything: a health check of who is in front, mostly.
    PrefaceMissing,
}

impl CloseReason {
    /// All of them, in metric order.
    pub const ALL: [Self; 13] = [
        Self::Ended,
        Self::ClientReset,
        Self::BackendReset,
        Self::NoBackend,
        Self::ConnectFailed,
        Self::Idle,
        Self::Drained,
        Self::Exhausted,
        Self::Shed,
        Self::ClientLeft,
        Self::PrefaceTimeout,
        Self::PrefaceInvalid,
        Self::PrefaceMissing,
    ];

    /// Its metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::ClientReset => "client_reset",
            Self::BackendReset => "backend_reset",
            Self::NoBackend => "no_backend",
            Self::ConnectFailed => "connect_failed",
            Self::Idle => "idle",
            Self::Drained => "drained",
            Self::Exhausted => "exhausted",
            Self::Shed => "shed",
            Self::ClientLeft => "client_left",
            Self::PrefaceTimeout => "preface_timeout",
            Self::PrefaceInvalid => "preface_invalid",
            Self::PrefaceMissing => "preface_missing",
        }
    }
}

/// What a flow is tuned by: the same for all flows of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// How long the client may take for its preface, from the accept on.
    pub preface_timeout: Duration,
    /// How long one connect may take.
    pub connect_timeout: Duration,
    /// How long a flow may go without a byte; `None`: for ever.
    pub idle_timeout: Option<Duration>,
    /// How many further backends are tried when a connect fails.
    pub connect_retries: u8,
    /// At this many buffers waiting in a half, its source is no longer read.
    pub buffers_high: u16,
    /// At this many or fewer a half that is received from until cancelled is read again.
    pub buffers_low: u16,
    /// A read of at least this many bytes filled its buffer.
    pub full_read_bytes: u32,
    /// After this many reads in a row that filled their buffers, a half is spliced; 0: never.
    pub splice_after: u8,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            preface_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Some(Duration::from_secs(3_600)),
            connect_retries: 2,
            buffers_high: 8,
            buffers_low: 2,
            full_read_bytes: u32::MAX,
            splice_after: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// `rests`: the next look is so many doublings of [`PREFACE_REST`] after the accept; 0: a poll tells.
    Preface {
        rests: u8,
    },
    Connecting,
    Waiting,
    Open,
    /// One side is gone; `dead` is it.
    Dying {
        dead: Side,
    },
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recv {
    Idle,
    Armed,
    Cancelling,
    AwaitingBuffers,
    /// The half is spliced: its source is polled, not received from.
    Spliced,
    /// EOF or reset: nothing more comes.
    Ended,
}

/// How a half's bytes move.
///
/// ```text
///            splice_after full reads          receive cancelled, queue empty
///   Copying -------------------------> Leaving ------------------------------> Spliced
///      ^                                                                          |
///      +------- no pipe, or SHORT_FILLS_MAX short fills and an empty pipe --------+
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Copying {
        full_reads: u8,
    },
    /// What was received is still being sent; nothing more is received into buffers.
    Leaving,
    Spliced {
        short_fills: u8,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    /// The source sent FIN.
    Eof,
    /// FIN was passed on to the target.
    Passed,
}

/// How a half is received from.
///
/// Until cancelled (multishot) is cheapest, but takes as many buffers as bytes have come before the cancel: fine as long as
/// the target takes them. A half that has filled its queue once, or found no buffer, receives one buffer at a time, so that
/// its bound holds exactly; after [`SMALL_READS`] small reads in a row it is trusted again. Its first buffer comes from those
/// that are kept for first ones, of which it never holds two: so slow readers, who hold many, cannot take another half's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shots {
    Many,
    Once {
        small_reads: u8,
        /// The armed receive asked for a [`Shot::Further`] buffer.
        further: bool,
    },
}

impl Shots {
    const ONCE: Self = Self::Once { small_reads: 0, further: false };
}

/// One direction, kept at its source.
#[derive(Debug, Clone, Copy)]
struct Half {
    queue: ChunkQueue,
    recv: Recv,
    shots: Shots,
    end: End,
    mode: Mode,
    /// A send of the front chunk is in flight.
    sending: bool,
    /// Bytes in the pipe.
    pending: u32,
}

impl Half {
    const NEW: Self = Self {
        queue: ChunkQueue::EMPTY,
        recv: Recv::Idle,
        shots: Shots::Many,
        end: End::Open,
        mode: Mode::Copying { full_reads: 0 },
        sending: false,
        pending: 0,
    };

    /// Whether nothing of what was received is left to be passed on.
    fn is_flushed(&self) -> bool {
        self.queue.is_empty() && !self.sending && self.pending == 0
    }
}

/// One TCP flow. See the module's diagram.
#[derive(Debug, Clone)]
pub struct Flow {
    /// By source.
    halves: [Half; 2],
    /// When the connect began, a byte last moved, or one side died. While it waits: until when.
    since: Timestamp,
    phase: Phase,
    retries_left: u8,
    cancelling_connect: bool,
    /// A connect failed before: decides between the reasons `no_backend` and `connect_failed`.
    any_failed: bool,
}

impl Flow {
    /// A client was accepted: reads it and asks for a backend at once. What the client says before the backend is there
    /// waits, in bounded memory.
    pub fn accepted(now: Timestamp, tuning: &Tuning, out: &mut Outputs) -> Self {
        let mut flow = Self::new(Phase::Connecting, now, tuning);
        flow.begin(now, out);
        flow
    }

    /// A client was accepted whose first bytes decide where it goes. They are in the kernel's hands until they have.
    pub fn accepted_with_preface(now: Timestamp, tuning: &Tuning, out: &mut Outputs) -> Self {
        out.push(Output::PollRead { from: Side::Client });
        Self::new(Phase::Preface { rests: 0 }, now, tuning)
    }

    const fn new(phase: Phase, now: Timestamp, tuning: &Tuning) -> Self {
        Self {
            halves: [Half::NEW; 2],
            since: now,
            phase,
            retries_left: tuning.connect_retries,
            cancelling_connect: false,
            any_failed: false,
        }
    }

    fn begin(&mut self, now: Timestamp, out: &mut Outputs) {
        self.phase = Phase::Connecting;
        self.since = now;
        // The connect first: on loopback and in a rack it is done before the client's bytes are looked at.
        out.push(Output::Connect);
        self.arm(Side::Client, out);
    }

    /// Whether [`Output::Closed`] was given.
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Whether a connect is under way and may go on: it has not taken too long.
    pub fn awaits_connect(&self) -> bool {
        self.phase == Phase::Connecting && !self.cancelling_connect
    }

    /// Whether a backend is connected and neither side is gone.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Buffers that wait in the half whose source is `from`.
    pub fn buffers_held(&self, from: Side) -> u16 {
        self.halves[from.index()].queue.count()
    }

    /// When [`Input::Deadline`] is due. It moves with every byte; a timer that fires before it just looks again.
    pub fn deadline(&self, tuning: &Tuning) -> Timestamp {
        match self.phase {
            Phase::Preface { rests: 0 } => self.since + tuning.preface_timeout,
            Phase::Preface { rests } => self.since + preface_rest(rests).min(tuning.preface_timeout),
            Phase::Connecting if self.cancelling_connect => Timestamp::NEVER,
            Phase::Connecting => self.since + tuning.connect_timeout,
            Phase::Waiting => self.since,
            Phase::Open => tuning.idle_timeout.map_or(Timestamp::NEVER, |idle| self.since + idle),
            Phase::Dying { .. } => self.since + FLUSH,
            Phase::Closed => Timestamp::NEVER,
        }
    }

    /// One step.
    pub fn handle(
        &mut self,
        input: Input,
        now: Timestamp,
        tuning: &Tuning,
        chunks: &mut Chunks,
        out: &mut Outputs,
    ) {
        if self.phase == Phase::Closed {
            // Completions that were on their way: their buffers go back, nothing else can matter.
            match input {
                Input::Received { chunk, .. } => out.push(Output::Release(chunk.buffer)),
                Input::Sent { to, .. } | Input::SendFailed { to } => self.drop_sending(to, chunks, out),
                _ => {}
            }
            return;
        }
        match input {
            Input::NoBackend => {
                let reason =
                    if self.any_failed { CloseReason::ConnectFailed } else { CloseReason::NoBackend };
                self.close(reason, chunks, out);
            }
            Input::Queued { until } => {
                debug_assert_eq!(self.phase, Phase::Connecting, "a backend was asked for");
                (self.phase, self.since) = (Phase::Waiting, until);
                if self.is_client_gone() {
                    self.close(CloseReason::ClientLeft, chunks, out);
                }
            }
            Input::Room => {
                if self.phase == Phase::Waiting {
                    (self.phase, self.since) = (Phase::Connecting, now);
                    out.push(Output::Connect);
                }
            }
            Input::Connected => self.connected(now, tuning, chunks, out),
            Input::ConnectFailed => self.connect_failed(now, chunks, out),
            Input::Received { from, chunk, armed } => {
                self.received(from, chunk, armed, now, tuning, chunks, out);
            }
            Input::RecvEnded { from, why } => self.recv_ended(from, why, now, tuning, chunks, out),
            Input::Sent { to, bytes } => self.sent(to, bytes, now, tuning, chunks, out),
            Input::SendFailed { to } => self.send_failed(to, now, chunks, out),
            Input::BuffersBack { from } => {
                let half = &mut self.halves[from.index()];
                if half.recv == Recv::AwaitingBuffers {
                    half.recv = Recv::Idle;
                    self.read_on(from, tuning, out);
                }
            }
            Input::SpliceRefused { from } => {
                self.copy_again(from);
                self.read_on(from, tuning, out);
            }
            Input::Readable { .. } if matches!(self.phase, Phase::Preface { .. }) => {
                out.push(Output::Inspect)
            }
            Input::Readable { from } => {
                if self.is_read(from) {
                    out.push(Output::Fill { from });
                }
            }
            Input::Reset { from } => self.was_reset(from, now, chunks, out),
            Input::Inspected(found) => self.inspected(found, now, chunks, out),
            Input::Filled { from, bytes, end } => self.filled(from, bytes, end, now, tuning, chunks, out),
            Input::Writable { to } => {
                if self.halves[to.opposite().index()].pending > 0 {
                    out.push(Output::Flush { to });
                }
            }
            Input::Flushed { to, bytes, failed } => self.flushed(to, bytes, failed, now, tuning, chunks, out),
            Input::Deadline => self.deadline_passed(now, tuning, chunks, out),
            Input::Quiet { since } => {
                if self.phase == Phase::Open {
                    self.since = self.since.max(since);
                    if now >= self.deadline(tuning) {
                        self.close(CloseReason::Idle, chunks, out);
                    }
                }
            }
            Input::Abort(reason) => self.close(reason, chunks, out),
        }
    }

    fn inspected(&mut self, found: Inspection, now: Timestamp, chunks: &mut Chunks, out: &mut Outputs) {
        debug_assert!(matches!(self.phase, Phase::Preface { .. }), "a look was asked for");
        match found {
            Inspection::Incomplete => {
                self.phase = Phase::Preface { rests: 0 };
                out.push(Output::PollRead { from: Side::Client });
            }
            Inspection::Unchanged => {
                let waited = now.since(self.since);
                let rests = (1..u8::MAX).find(|rests| preface_rest(*rests) > waited).unwrap_or(u8::MAX);
                self.phase = Phase::Preface { rests };
            }
            Inspection::Done => self.begin(now, out),
            Inspection::Invalid => self.close(CloseReason::PrefaceInvalid, chunks, out),
            Inspection::Eof => self.close(CloseReason::PrefaceMissing, chunks, out),
            Inspection::Reset => self.close(CloseReason::ClientReset, chunks, out),
        }
    }

    fn connected(&mut self, now: Timestamp, tuning: &Tuning, chunks: &Chunks, out: &mut Outputs) {
        debug_assert_eq!(self.phase, Phase::Connecting, "a connect was in flight");
        self.phase = Phase::Open;
        self.since = now;
        self.arm(Side::Backend, out);
        // What the client said meanwhile, and its FIN.
        self.send_next(Side::Client, chunks, out);
        self.pass_fin(Side::Client, out);
        self.read_on(Side::Client, tuning, out);
    }

    fn connect_failed(&mut self, now: Timestamp, chunks: &mut Chunks, out: &mut Outputs) {
        debug_assert_eq!(self.phase, Phase::Connecting, "a connect was in flight");
        self.any_failed = true;
        self.cancelling_connect = false;
        if self.retries_left == 0 {
            self.close(CloseReason::ConnectFailed, chunks, out);
            return;
        }
        self.retries_left -= 1;
        self.since = now;
        out.push(Output::Connect);
    }

    #[expect(clippy::too_many_arguments, reason = "a step's context, passed through by the one caller")]
    fn received(
        &mut self,
        from: Side,
        chunk: Chunk,
        armed: bool,
        now: Timestamp,
        tuning: &Tuning,
        chunks: &mut Chunks,
        out: &mut Outputs,
    ) {
        let half = &mut self.halves[from.index()];
        if !armed {
            half.recv = Recv::Idle;
        }
        if let Phase::Dying { dead } = self.phase {
            if dead != from {
                // Nobody is left to take it.
                out.push(Output::Release(chunk.buffer));
                return;
            }
        } else if self.phase != Phase::Waiting {
            self.since = now;
        }
        half.queue.push(chunks, chunk);
        if let Mode::Copying { full_reads } = half.mode {
            let full = chunk.length >= tuning.full_read_bytes;
            let full_reads = if full { full_reads.saturating_add(1) } else { 0 };
            let enough = tuning.splice_after > 0 && full_reads >= tuning.splice_after;
            let enough = enough && self.phase == Phase::Open;
            half.mode = if enough { Mode::Leaving } else { Mode::Copying { full_reads } };
        }
        if let Shots::Once { small_reads, further } = half.shots {
            let small = chunk.length < tuning.full_read_bytes / 2 && half.queue.count() == 1;
            let small_reads = if small { small_reads + 1 } else { 0 };
            let trusted = small_reads >= SMALL_READS;
            half.shots = if trusted { Shots::Many } else { Shots::Once { small_reads, further } };
        }
        let full_queue = half.queue.count() >= tuning.buffers_high;
        if full_queue && half.shots == Shots::Many {
            half.shots = Shots::ONCE;
        }
        if half.recv == Recv::Armed && (full_queue || half.mode == Mode::Leaving) {
            half.recv = Recv::Cancelling;
            out.push(Output::CancelRecv { from });
        }
        self.send_next(from, chunks, out);
        self.read_on(from, tuning, out);
    }

    fn recv_ended(
        &mut self,
        from: Side,
        why: RecvEnd,
        now: Timestamp,
        tuning: &Tuning,
        chunks: &mut Chunks,
        out: &mut Outputs,
    ) {
        let half = &mut self.halves[from.index()];
        match why {
            RecvEnd::Cancelled => {
                half.recv = Recv::Idle;
                self.read_on(from, tuning, out);
            }
            RecvEnd::NoBuffers if half.mode == Mode::Leaving || half.shots == Shots::Many => {
                half.shots = Shots::ONCE;
                half.recv = Recv::Idle;
                self.read_on(from, tuning, out);
            }
            // What it has queued will bring it back here.
            RecvEnd::NoBuffers if !half.queue.is_empty() => {
                half.recv = Recv::Idle;
                self.hold_back(from, out);
            }
            // It asked for a further buffer and holds none any more: it may have a first one.
            RecvEnd::NoBuffers if matches!(half.shots, Shots::Once { further: true, .. }) => {
                half.recv = Recv::Idle;
                self.read_on(from, tuning, out);
            }
            RecvEnd::NoBuffers => {
                half.recv = Recv::AwaitingBuffers;
                out.push(Output::AwaitBuffers { from });
                self.hold_back(from, out);
            }
            RecvEnd::Eof | RecvEnd::Reset => {
                half.recv = Recv::Ended;
                match self.phase {
                    // Its last bytes are in; how it ended no longer matters.
                    Phase::Dying { dead } if dead == from => self.finish_dying(dead, chunks, out),
                    Phase::Dying { .. } | Phase::Closed | Phase::Preface { .. } => {}
                    Phase::Connecting | Phase::Waiting if why == RecvEnd::Reset => {
                        self.close(CloseReason::ClientReset, chunks, out);
                    }
                    Phase::Waiting => {
                        half.end = End::Eof;
                        if self.is_client_gone() {
                            self.close(CloseReason::ClientLeft, chunks, out);
                        }
                    }
                    Phase::Connecting | Phase::Open if why == RecvEnd::Eof => {
                        half.end = End::Eof;
                        self.since = now;
                        self.pass_fin(from, out);
                        self.close_if_ended(chunks, out);
                    }
                    Phase::Connecting | Phase::Open => self.die(from, now, chunks, out),
                }
            }
        }
    }

    fn sent(
        &mut self,
        to: Side,
        bytes: u32,
        now: Timestamp,
        tuning: &Tuning,
        chunks: &mut Chunks,
        out: &mut Outputs,
    ) {
        let from = to.opposite();
        let half = &mut self.halves[from.index()];
        debug_assert!(half.sending, "a send was in flight");
        half.sending = false;
        if let Phase::Dying { dead } = self.phase {
            if dead == to {
                self.drop_queue(from, chunks, out);
                return;
            }
        } else {
            self.since = now;
        }
        if let Some(buffer) = half.queue.consume(chunks, bytes) {
            out.push(Output::Release(buffer));
        }
        self.send_next(from, chunks, out);
        if let Phase::Dying { dead } = self.phase {
            self.read_on(from, tuning, out);
            self.finish_dying(dead, chunks, out);
            return;
        }
        self.pass_fin(from, out);
        self.read_on(from, tuning, out);
        self.close_if_ended(chunks, out);
    }

    fn send_failed(&mut self, to: Side, now: Timestamp, chunks: &mut Chunks, out: &mut Outputs) {
        let from = to.opposite();
        self.halves[from.index()].sending = false;
        match self.phase {
            // The survivor has gone as well.
            Phase::Dying { dead } if dead != to => self.close(reset_by(dead), chunks, out),
            Phase::Dying { .. } => self.drop_queue(from, chunks, out),
            _ => self.die(to, now, chunks, out),
        }
    }

    /// `from` sent RST while it was held back, or the receive that is armed again is about to say so too.
    fn was_reset(&mut self, from: Side, now: Timestamp, chunks: &mut Chunks, out: &mut Outputs) {
        match self.phase {
            Phase::Connecting | Phase::Waiting => self.close(CloseReason::ClientReset, chunks, out),
            Phase::Open => self.die(from, now, chunks, out),
            Phase::Preface { .. } | Phase::Dying { .. } | Phase::Closed => {}
        }
    }

    /// `dead` sent RST, or takes no more bytes. What it sent before still goes to the other side, then that is reset.
    fn die(&mut self, dead: Side, now: Timestamp, chunks: &mut Chunks, out: &mut Outputs) {
        self.phase = Phase::Dying { dead };
        self.since = now;
        let survivor = dead.opposite();
        self.drop_queue(survivor, chunks, out);
        let half = &mut self.halves[survivor.index()];
        if half.recv == Recv::Armed {
            half.recv = Recv::Cancelling;
            out.push(Output::CancelRecv { from: survivor });
        }
        self.finish_dying(dead, chunks, out);
    }

    /// Closes once all that `dead` sent has been passed on.
    fn finish_dying(&mut self, dead: Side, chunks: &mut Chunks, out: &mut Outputs) {
        let half = &self.halves[dead.index()];
        if half.recv == Recv::Ended && half.is_flushed() {
            self.close(reset_by(dead), chunks, out);
        }
    }

    fn deadline_passed(&mut self, now: Timestamp, tuning: &Tuning, chunks: &mut Chunks, out: &mut Outputs) {
        if now < self.deadline(tuning) {
            return;
        }
        match self.phase {
            Phase::Preface { .. } if now >= self.since + tuning.preface_timeout => {
                self.close(CloseReason::PrefaceTimeout, chunks, out);
            }
            Phase::Preface { .. } => out.push(Output::Inspect),
            Phase::Connecting => {
                self.cancelling_connect = true;
                out.push(Output::CancelConnect);
            }
            Phase::Waiting => self.close(CloseReason::Shed, chunks, out),
            Phase::Open => out.push(Output::AskQuiet),
            Phase::Dying { dead } => self.close(reset_by(dead), chunks, out),
            Phase::Closed => {}
        }
    }

    /// Sends the oldest waiting bytes of `from`'s half, if nothing of it is in flight and someone is there to take them.
    fn send_next(&mut self, from: Side, chunks: &Chunks, out: &mut Outputs) {
        let half = &mut self.halves[from.index()];
        if half.sending || matches!(self.phase, Phase::Connecting | Phase::Waiting) {
            return;
        }
        if let Some(chunk) = half.queue.front(chunks) {
            half.sending = true;
            out.push(Output::Send { to: from.opposite(), chunk });
        }
    }

    /// Passes `from`'s FIN on, if it came and nothing is left before it. The second FIN needs no shutdown of its own:
    /// the close that follows it sends it.
    fn pass_fin(&mut self, from: Side, out: &mut Outputs) {
        let other_passed = self.halves[from.opposite().index()].end == End::Passed;
        let half = &mut self.halves[from.index()];
        if half.end == End::Eof && half.is_flushed() && self.phase == Phase::Open {
            half.end = End::Passed;
            if !other_passed {
                out.push(Output::Shutdown { to: from.opposite() });
            }
        }
    }

    fn close_if_ended(&mut self, chunks: &mut Chunks, out: &mut Outputs) {
        if self.halves.iter().all(|half| half.end == End::Passed) {
            self.close(CloseReason::Ended, chunks, out);
        }
    }

    /// Whether nobody can want an answer any more: the client sent nothing, and sends nothing more. One that sent something
    /// first may well wait for what is said to that.
    fn is_client_gone(&self) -> bool {
        let half = &self.halves[Side::Client.index()];
        half.end == End::Eof && half.queue.is_empty()
    }

    /// Whether bytes from this side are still wanted.
    fn is_read(&self, from: Side) -> bool {
        match self.phase {
            Phase::Preface { .. } => false,
            Phase::Connecting | Phase::Waiting => from == Side::Client,
            Phase::Open => true,
            Phase::Dying { dead } => from == dead,
            Phase::Closed => false,
        }
    }

    /// Reads `from` again if it can be read and its half has room; or goes over to splicing once nothing is queued.
    fn read_on(&mut self, from: Side, tuning: &Tuning, out: &mut Outputs) {
        let wanted = self.is_read(from);
        let half = &mut self.halves[from.index()];
        if !wanted || half.recv != Recv::Idle {
            return;
        }
        if half.mode == Mode::Leaving {
            if half.is_flushed() {
                half.mode = Mode::Spliced { short_fills: 0 };
                half.recv = Recv::Spliced;
                out.extend([Output::Splice { from }, Output::Fill { from }]);
            } else {
                self.hold_back(from, out);
            }
            return;
        }
        let room = match half.shots {
            Shots::Many => half.queue.count() <= tuning.buffers_low,
            Shots::Once { .. } => half.queue.count() < tuning.buffers_high,
        };
        if room {
            self.arm(from, out);
        } else {
            self.hold_back(from, out);
        }
    }

    /// Nothing reads from this side until its target has taken something.
    fn hold_back(&self, from: Side, out: &mut Outputs) {
        // A flow that dies does so for [`FLUSH`] at most.
        if !matches!(self.phase, Phase::Dying { .. }) {
            out.push(Output::Watch { from });
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a step's context, passed through by the one caller")]
    fn filled(
        &mut self,
        from: Side,
        bytes: u32,
        end: FillEnd,
        now: Timestamp,
        tuning: &Tuning,
        chunks: &mut Chunks,
        out: &mut Outputs,
    ) {
        let half = &mut self.halves[from.index()];
        half.pending += bytes;
        if let Mode::Spliced { short_fills } = &mut half.mode {
            *short_fills = if bytes < SHORT_FILL_BYTES { *short_fills + 1 } else { 0 };
        }
        match end {
            FillEnd::Blocked => {}
            FillEnd::Eof => {
                half.recv = Recv::Ended;
                half.end = End::Eof;
            }
            FillEnd::Reset => half.recv = Recv::Ended,
        }
        let pending = half.pending;
        if self.phase == Phase::Open {
            if bytes > 0 || end == FillEnd::Eof {
                self.since = now;
            }
            if end == FillEnd::Reset {
                self.die(from, now, chunks, out);
            }
        }
        if pending > 0 && !self.is_closed() {
            out.push(Output::Flush { to: from.opposite() });
        } else {
            self.pipe_empty(from, tuning, chunks, out);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a step's context, passed through by the one caller")]
    fn flushed(
        &mut self,
        to: Side,
        bytes: u32,
        failed: bool,
        now: Timestamp,
        tuning: &Tuning,
        chunks: &mut Chunks,
        out: &mut Outputs,
    ) {
        let from = to.opposite();
        let half = &mut self.halves[from.index()];
        debug_assert!(bytes <= half.pending, "no more leaves a pipe than went in");
        half.pending = half.pending.saturating_sub(bytes);
        if failed {
            self.send_failed(to, now, chunks, out);
            return;
        }
        let blocked = half.pending > 0;
        if bytes > 0 && self.phase == Phase::Open {
            self.since = now;
        }
        if blocked {
            out.push(Output::PollWrite { to });
            if self.halves[from.index()].recv != Recv::Ended {
                self.hold_back(from, out);
            }
        } else {
            self.pipe_empty(from, tuning, chunks, out);
        }
    }

    /// A spliced half has passed on all it has: it ends, copies again, or waits for more.
    fn pipe_empty(&mut self, from: Side, tuning: &Tuning, chunks: &mut Chunks, out: &mut Outputs) {
        let half = &self.halves[from.index()];
        match (self.phase, half.recv, half.mode) {
            (Phase::Closed, ..) => {}
            (Phase::Dying { dead }, Recv::Ended, _) if dead == from => self.finish_dying(dead, chunks, out),
            (_, Recv::Ended, _) => {
                self.pass_fin(from, out);
                self.close_if_ended(chunks, out);
            }
            (_, _, Mode::Spliced { short_fills: SHORT_FILLS_MAX.. }) => {
                self.copy_again(from);
                out.push(Output::Unsplice { from });
                self.read_on(from, tuning, out);
            }
            _ if self.is_read(from) => out.push(Output::PollRead { from }),
            _ => {}
        }
    }

    fn copy_again(&mut self, from: Side) {
        let half = &mut self.halves[from.index()];
        half.mode = Mode::Copying { full_reads: 0 };
        if half.recv == Recv::Spliced {
            half.recv = Recv::Idle;
        }
    }

    fn arm(&mut self, from: Side, out: &mut Outputs) {
        let half = &mut self.halves[from.index()];
        half.recv = Recv::Armed;
        let shot = match &mut half.shots {
            Shots::Many => Shot::Many,
            Shots::Once { further, .. } => {
                *further = !half.queue.is_empty();
                if *further { Shot::Further } else { Shot::First }
            }
        };
        out.push(Output::Recv { from, shot });
    }

    fn close(&mut self, reason: CloseReason, chunks: &mut Chunks, out: &mut Outputs) {
        for side in Side::BOTH {
            self.drop_queue(side, chunks, out);
        }
        self.phase = Phase::Closed;
        // Who has gone already needs no RST: its socket is dead, and closing it says nothing.
        let orderly = reason == CloseReason::Ended;
        let reset_client = !orderly && reason != CloseReason::ClientReset;
        let reset_backend = !orderly && reason != CloseReason::BackendReset;
        out.push(Output::Closed { reset_client, reset_backend, reason });
    }

    /// Releases what waits in `from`'s half, all but what the kernel is sending.
    fn drop_queue(&mut self, from: Side, chunks: &mut Chunks, out: &mut Outputs) {
        let half = &mut self.halves[from.index()];
        let in_flight = if half.sending { half.queue.front(chunks) } else { None };
        if in_flight.is_some() {
            half.queue.pop(chunks);
        }
        while let Some(buffer) = half.queue.pop(chunks) {
            out.push(Output::Release(buffer));
        }
        if let Some(chunk) = in_flight {
            half.queue.push(chunks, chunk);
        }
        // The shell throws a pipe with bytes in it away.
        half.pending = 0;
    }

    /// The flow is closed and the kernel gave the last send's buffer back.
    fn drop_sending(&mut self, to: Side, chunks: &mut Chunks, out: &mut Outputs) {
        let from = to.opposite();
        self.halves[from.index()].sending = false;
        self.drop_queue(from, chunks, out);
    }
}

/// How long after the accept the look after so many rests is due; at least one.
fn preface_rest(rests: u8) -> Duration {
    PREFACE_REST.saturating_mul(1_u32.checked_shl(u32::from(rests - 1)).unwrap_or(u32::MAX))
}

const fn reset_by(side: Side) -> CloseReason {
    match side {
        Side::Client => CloseReason::ClientReset,
        Side::Backend => CloseReason::BackendReset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Side::{Backend, Client};

    const NOW: Timestamp = Timestamp::ZERO;

    struct Bench {
        flow: Flow,
        chunks: Chunks,
        tuning: Tuning,
        first: Outputs,
    }

    impl Bench {
        fn accepted() -> Self {
            let tuning = Tuning::default();
            let mut first = Outputs::new();
            let flow = Flow::accepted(NOW, &tuning, &mut first);
            Self { flow, chunks: Chunks::new(64), tuning, first }
        }

        fn open() -> Self {
            let mut bench = Self::accepted();
            assert_eq!(bench.step(Input::Connected), [Output::Recv { from: Backend, shot: Shot::Many }]);
            bench
        }

        fn step(&mut self, input: Input) -> Outputs {
            self.step_at(input, NOW)
        }

        fn step_at(&mut self, input: Input, now: Timestamp) -> Outputs {
            let mut out = Outputs::new();
            self.flow.handle(input, now, &self.tuning, &mut self.chunks, &mut out);
            out
        }
    }

    fn chunk(buffer: u16) -> Chunk {
        Chunk { buffer: BufferId(buffer), start: 0, length: 100 }
    }

    fn received(from: Side, buffer: u16) -> Input {
        Input::Received { from, chunk: chunk(buffer), armed: true }
    }

    fn closed(reason: CloseReason) -> Output {
        let (reset_client, reset_backend) = match reason {
            CloseReason::Ended => (false, false),
            CloseReason::ClientReset => (false, true),
            CloseReason::BackendReset => (true, false),
            _ => (true, true),
        };
        Output::Closed { reset_client, reset_backend, reason }
    }

    #[test]
    fn reads_the_client_while_it_connects() {
        let mut b = Bench::accepted();
        assert_eq!(b.first, [Output::Connect, Output::Recv { from: Client, shot: Shot::Many }]);
        assert_eq!(b.step(received(Client, 0)), []);
        assert_eq!(b.step(Input::RecvEnded { from: Client, why: RecvEnd::Eof }), []);
        let out = b.step(Input::Connected);
        assert_eq!(
            out,
            [Output::Recv { from: Backend, shot: Shot::Many }, Output::Send { to: Backend, chunk: chunk(0) }]
        );
        let out = b.step(Input::Sent { to: Backend, bytes: 100 });
        assert_eq!(out, [Output::Release(BufferId(0)), Output::Shutdown { to: Backend }]);
    }

    fn with_preface() -> Bench {
        let mut bench = Bench::accepted();
        bench.first.clear();
        bench.flow = Flow::accepted_with_preface(NOW, &bench.tuning, &mut bench.first);
        bench
    }

    const READABLE: Input = Input::Readable { from: Client };

    #[test]
    fn a_preface_is_looked_at_until_it_is_whole() {
        let mut b = with_preface();
        let poll = Output::PollRead { from: Client };
        assert_eq!(b.first, [poll]);
        assert_eq!(b.step(READABLE), [Output::Inspect]);
        assert_eq!(b.step(Input::Inspected(Inspection::Incomplete)), [poll]);
        let later = NOW + Duration::from_secs(4);
        assert_eq!(b.step_at(READABLE, later), [Output::Inspect]);
        let out = b.step_at(Input::Inspected(Inspection::Done), later);
        assert_eq!(out, [Output::Connect, Output::Recv { from: Client, shot: Shot::Many }]);
        assert_eq!(b.flow.deadline(&b.tuning), later + b.tuning.connect_timeout, "a time of its own");
    }

    #[test]
    fn a_preface_has_its_time_from_the_accept_on() {
        let mut b = with_preface();
        let end = NOW + b.tuning.preface_timeout;
        for millis in [1_000, 4_999] {
            assert_eq!(b.flow.deadline(&b.tuning), end);
            let now = Timestamp::from_millis(millis);
            assert_eq!(b.step_at(Input::Deadline, now), [], "too early: it looks again");
            b.step_at(READABLE, now);
            b.step_at(Input::Inspected(Inspection::Incomplete), now);
        }
        assert_eq!(b.step_at(Input::Deadline, end), [closed(CloseReason::PrefaceTimeout)]);
    }

    #[test]
    fn a_poll_that_brings_nothing_new_is_not_asked_again_at_once() {
        let mut b = with_preface();
        b.step(READABLE);
        b.step(Input::Inspected(Inspection::Unchanged));
        let mut looks = Vec::new();
        loop {
            let now = b.flow.deadline(&b.tuning);
            looks.push(now.as_millis());
            let out = b.step_at(Input::Deadline, now);
            if out != [Output::Inspect] {
                assert_eq!(out, [closed(CloseReason::PrefaceTimeout)]);
                break;
            }
            assert_eq!(b.step_at(Input::Inspected(Inspection::Unchanged), now), []);
        }
        assert_eq!(looks, [20, 40, 80, 160, 320, 640, 1_280, 2_560, 5_000]);
    }

    #[test]
    fn a_bad_preface_ends_the_flow() {
        for (found, reason) in [
            (Inspection::Invalid, CloseReason::PrefaceInvalid),
            (Inspection::Eof, CloseReason::PrefaceMissing),
            (Inspection::Reset, CloseReason::ClientReset),
        ] {
            let mut b = with_preface();
            b.step(READABLE);
            assert_eq!(b.step(Input::Inspected(found)), [closed(reason)]);
        }
    }

    #[test]
    fn half_close_goes_both_ways_before_it_ends() {
        let mut b = Bench::open();
        let eof = |from| Input::RecvEnded { from, why: RecvEnd::Eof };
        assert_eq!(b.step(eof(Client)), [Output::Shutdown { to: Backend }]);
        let out = b.step(received(Backend, 1));
        assert_eq!(out, [Output::Send { to: Client, chunk: chunk(1) }]);
        assert_eq!(b.step(eof(Backend)), [], "the byte goes first");
        let out = b.step(Input::Sent { to: Client, bytes: 100 });
        assert_eq!(out, [Output::Release(BufferId(1)), closed(CloseReason::Ended)]);
    }

    #[test]
    fn a_partial_send_goes_on_where_it_stopped() {
        let mut b = Bench::open();
        b.step(received(Client, 0));
        let out = b.step(Input::Sent { to: Backend, bytes: 30 });
        let rest = Chunk { buffer: BufferId(0), start: 30, length: 70 };
        assert_eq!(out, [Output::Send { to: Backend, chunk: rest }]);
    }

    #[test]
    fn a_slow_reader_holds_a_fast_writer_back() {
        let mut b = Bench::open();
        for n in 0..7 {
            b.step(received(Client, n));
        }
        assert_eq!(b.step(received(Client, 7)), [Output::CancelRecv { from: Client }]);
        // A multishot receive may have had more bytes on their way.
        b.step(received(Client, 8));
        let out = b.step(Input::RecvEnded { from: Client, why: RecvEnd::Cancelled });
        assert_eq!(out, [Output::Watch { from: Client }], "nothing else tells of its reset now");
        b.step(Input::Sent { to: Backend, bytes: 100 });
        // From now on, one buffer at a time: the bound holds exactly.
        let out = b.step(Input::Sent { to: Backend, bytes: 100 });
        assert_eq!(
            out.last(),
            Some(&Output::Recv { from: Client, shot: Shot::Further }),
            "one place is free: {out:?}"
        );
        let one = Input::Received { from: Client, chunk: chunk(9), armed: false };
        assert_eq!(b.step(one), [Output::Watch { from: Client }], "it is taken");
    }

    #[test]
    fn a_reset_by_whom_is_held_back_ends_the_flow() {
        let held_back = || {
            let mut b = Bench::open();
            (0..8).for_each(|n| drop(b.step(received(Client, n))));
            b.step(Input::RecvEnded { from: Client, why: RecvEnd::Cancelled });
            b
        };
        // The backend takes nothing: it is reset when it had its time.
        let mut b = held_back();
        assert_eq!(b.step(Input::Reset { from: Client }), [Output::CancelRecv { from: Backend }]);
        let deadline = b.flow.deadline(&b.tuning);
        assert_eq!(deadline, NOW + FLUSH);
        assert_eq!(b.step_at(Input::Deadline, deadline).last(), Some(&closed(CloseReason::ClientReset)));
        // It reads on: it gets all that came before the reset, also what the kernel still had.
        let mut b = held_back();
        b.step(Input::Reset { from: Client });
        let out = b.step(Input::Sent { to: Backend, bytes: 100 });
        assert_eq!(out.last(), Some(&Output::Recv { from: Client, shot: Shot::Further }));
        assert_eq!(b.step(Input::Reset { from: Client }), [], "it is known");
        assert_eq!(b.step(Input::Received { from: Client, chunk: chunk(9), armed: false }), []);
        for _ in 0..7 {
            b.step(Input::Sent { to: Backend, bytes: 100 });
        }
        b.step(Input::RecvEnded { from: Client, why: RecvEnd::Reset });
        let out = b.step(Input::Sent { to: Backend, bytes: 100 });
        assert_eq!(out.last(), Some(&closed(CloseReason::ClientReset)));
    }

    #[test]
    fn a_client_that_resets_while_it_waits_held_back_leaves() {
        let mut b = waiting();
        (0..8).for_each(|n| drop(b.step(received(Client, n))));
        let out = b.step(Input::RecvEnded { from: Client, why: RecvEnd::Cancelled });
        assert_eq!(out, [Output::Watch { from: Client }]);
        assert_eq!(b.step(Input::Reset { from: Client }).last(), Some(&closed(CloseReason::ClientReset)));
    }

    #[test]
    fn small_reads_bring_trust_back() {
        let mut b = Bench::open();
        b.tuning.full_read_bytes = 16_384;
        let out = b.step(Input::RecvEnded { from: Client, why: RecvEnd::NoBuffers });
        assert_eq!(out, [Output::Recv { from: Client, shot: Shot::First }], "of the other group");
        for n in 1..=SMALL_READS {
            let out = b.step(Input::Received { from: Client, chunk: chunk(0), armed: false });
            let shot = if n < SMALL_READS { Shot::Further } else { Shot::Many };
            assert_eq!(out.last(), Some(&Output::Recv { from: Client, shot }), "after {n} small reads");
            b.step(Input::Sent { to: Backend, bytes: 100 });
        }
    }

    #[test]
    fn a_reset_is_passed_on_after_the_bytes_before_it() {
        let mut b = Bench::open();
        b.step(received(Backend, 0));
        let out = b.step(Input::RecvEnded { from: Backend, why: RecvEnd::Reset });
        assert_eq!(out, [Output::CancelRecv { from: Client }]);
        let out = b.step(Input::Sent { to: Client, bytes: 100 });
        assert_eq!(out, [Output::Release(BufferId(0)), closed(CloseReason::BackendReset)]);
    }

    #[test]
    fn a_reader_that_takes_nothing_does_not_delay_a_reset_for_ever() {
        let mut b = Bench::open();
        b.step(received(Backend, 0));
        b.step(Input::RecvEnded { from: Backend, why: RecvEnd::Reset });
        let deadline = b.flow.deadline(&b.tuning);
        assert_eq!(deadline, NOW + FLUSH);
        assert_eq!(b.step_at(Input::Deadline, deadline), [closed(CloseReason::BackendReset)]);
        assert_eq!(b.step(Input::SendFailed { to: Client }), [Output::Release(BufferId(0))]);
    }

    #[test]
    fn what_a_backend_said_before_it_closed_on_us_reaches_the_client() {
        // The backend answers and closes with our bytes unread: our send fails first, its answer is still on its way.
        let mut b = Bench::open();
        b.step(received(Client, 0));
        let out = b.step(Input::SendFailed { to: Backend });
        assert_eq!(out, [Output::Release(BufferId(0)), Output::CancelRecv { from: Client }]);
        assert_eq!(b.step(received(Backend, 1)), [Output::Send { to: Client, chunk: chunk(1) }]);
        assert_eq!(b.step(Input::RecvEnded { from: Backend, why: RecvEnd::Eof }), []);
        let out = b.step(Input::Sent { to: Client, bytes: 100 });
        assert_eq!(out, [Output::Release(BufferId(1)), closed(CloseReason::BackendReset)]);
    }

    #[test]
    fn connects_are_retried_then_the_client_is_reset() {
        let mut b = Bench::accepted();
        assert_eq!(b.step(Input::ConnectFailed), [Output::Connect]);
        assert_eq!(b.step(Input::ConnectFailed), [Output::Connect]);
        assert_eq!(b.step(Input::ConnectFailed), [closed(CloseReason::ConnectFailed)]);
        let mut b = Bench::accepted();
        assert_eq!(b.step(Input::NoBackend), [closed(CloseReason::NoBackend)]);
        let mut b = Bench::accepted();
        b.step(Input::ConnectFailed);
        assert_eq!(b.step(Input::NoBackend), [closed(CloseReason::ConnectFailed)]);
    }

    #[test]
    fn a_connect_that_takes_too_long_is_cancelled_and_retried() {
        let mut b = Bench::accepted();
        let deadline = b.flow.deadline(&b.tuning);
        assert_eq!(deadline, NOW + b.tuning.connect_timeout);
        assert_eq!(b.step_at(Input::Deadline, NOW), [], "too early: it looks again");
        assert_eq!(b.step_at(Input::Deadline, deadline), [Output::CancelConnect]);
        assert_eq!(b.flow.deadline(&b.tuning), Timestamp::NEVER, "the cancel's own completion ends it");
        assert_eq!(b.step_at(Input::ConnectFailed, deadline), [Output::Connect]);
        assert_eq!(b.flow.deadline(&b.tuning), deadline + b.tuning.connect_timeout);
    }

    const UNTIL: Timestamp = Timestamp::from_millis(5_000);

    fn waiting() -> Bench {
        let mut b = Bench::accepted();
        assert_eq!(b.step(Input::Queued { until: UNTIL }), []);
        b
    }

    #[test]
    fn a_flow_waits_for_room_with_what_its_client_said() {
        let mut b = waiting();
        let later = NOW + Duration::from_secs(1);
        assert_eq!(b.step_at(received(Client, 0), later), []);
        assert_eq!(b.step_at(Input::RecvEnded { from: Client, why: RecvEnd::Eof }, later), []);
        assert_eq!(b.flow.deadline(&b.tuning), UNTIL, "what the client says does not buy time");
        assert_eq!(b.step_at(Input::Room, later), [Output::Connect]);
        assert_eq!(b.flow.deadline(&b.tuning), later + b.tuning.connect_timeout);
        // Another was faster: it waits on.
        assert_eq!(b.step_at(Input::Queued { until: UNTIL }, later), []);
        assert_eq!(b.step_at(Input::Room, later), [Output::Connect]);
        let out = b.step_at(Input::Connected, later);
        assert_eq!(out.last(), Some(&Output::Send { to: Backend, chunk: chunk(0) }));
        assert_eq!(b.step_at(Input::Room, later), [], "a turn that comes too late is none");
    }

    #[test]
    fn a_flow_waits_no_longer_than_it_may() {
        let mut b = waiting();
        b.step(received(Client, 0));
        assert_eq!(b.step(Input::Deadline), [], "too early");
        let out = b.step_at(Input::Deadline, UNTIL);
        assert_eq!(out, [Output::Release(BufferId(0)), closed(CloseReason::Shed)]);
    }

    #[test]
    fn a_client_that_goes_away_waits_no_longer() {
        let end = |why| Input::RecvEnded { from: Client, why };
        assert_eq!(waiting().step(end(RecvEnd::Reset)), [closed(CloseReason::ClientReset)]);
        assert_eq!(waiting().step(end(RecvEnd::Eof)), [closed(CloseReason::ClientLeft)]);
        let mut b = Bench::accepted();
        assert_eq!(b.step(end(RecvEnd::Eof)), []);
        assert_eq!(b.step(Input::Queued { until: UNTIL }), [closed(CloseReason::ClientLeft)]);
        let mut b = waiting();
        b.step(received(Client, 0));
        assert_eq!(b.step(end(RecvEnd::Eof)), [], "it asked for something");
        assert_eq!(b.step(Input::Room), [Output::Connect]);
        assert_eq!(b.step(Input::NoBackend).last(), Some(&closed(CloseReason::NoBackend)));
    }

    #[test]
    fn an_idle_flow_is_closed() {
        let mut b = Bench::open();
        let byte_at = NOW + Duration::from_secs(10);
        b.step_at(received(Client, 0), byte_at);
        let deadline = b.flow.deadline(&b.tuning);
        assert_eq!(deadline, byte_at + Duration::from_secs(3_600));
        assert_eq!(b.step_at(Input::Deadline, deadline), [Output::AskQuiet]);
        let out = b.step_at(Input::Quiet { since: NOW }, deadline);
        assert_eq!(out.last(), Some(&closed(CloseReason::Idle)));
    }

    #[test]
    fn a_flow_whose_reader_takes_what_the_kernel_holds_is_not_idle() {
        let mut b = Bench::open();
        let mut deadline = b.flow.deadline(&b.tuning);
        for _ in 0..3 {
            assert_eq!(b.step_at(Input::Deadline, deadline), [Output::AskQuiet]);
            let since = Timestamp::from_millis(deadline.as_millis() - 5_000);
            assert_eq!(b.step_at(Input::Quiet { since }, deadline), []);
            assert_eq!(b.flow.deadline(&b.tuning), since + Duration::from_secs(3_600));
            deadline = b.flow.deadline(&b.tuning);
        }
        assert_eq!(b.step_at(Input::Deadline, deadline), [Output::AskQuiet]);
        let since = Timestamp::from_millis(deadline.as_millis() - 3_600_000);
        assert_eq!(b.step_at(Input::Quiet { since }, deadline).last(), Some(&closed(CloseReason::Idle)));
    }

    #[test]
    fn without_buffers_it_waits_for_them() {
        let mut b = Bench::open();
        let none = Input::RecvEnded { from: Client, why: RecvEnd::NoBuffers };
        let recv = |shot| Output::Recv { from: Client, shot };
        assert_eq!(b.step(none), [recv(Shot::First)], "of the other group first");
        let watch = Output::Watch { from: Client };
        assert_eq!(b.step(none), [Output::AwaitBuffers { from: Client }, watch]);
        assert_eq!(b.step(Input::BuffersBack { from: Client }), [recv(Shot::First)]);
        assert_eq!(b.step(Input::BuffersBack { from: Client }), [], "it is armed");
        // With something queued it asks for further ones, and does not wait for them.
        let one = Input::Received { from: Client, chunk: chunk(0), armed: false };
        assert_eq!(b.step(one).last(), Some(&recv(Shot::Further)));
        assert_eq!(b.step(none), [watch]);
        assert_eq!(b.step(Input::Sent { to: Backend, bytes: 100 }).last(), Some(&recv(Shot::First)));
        // And if it holds none any more when it is told that there is none, it may have a first one.
        assert_eq!(b.step(one).last(), Some(&recv(Shot::Further)));
        b.step(Input::Sent { to: Backend, bytes: 100 });
        assert_eq!(b.step(none), [recv(Shot::First)]);
    }

    #[test]
    fn after_the_end_only_buffers_come_back() {
        let mut b = Bench::open();
        b.step(received(Client, 0));
        let out = b.step(Input::Abort(CloseReason::Drained));
        assert_eq!(out, [closed(CloseReason::Drained)], "buffer 0 is with the kernel");
        assert_eq!(b.step(received(Backend, 5)), [Output::Release(BufferId(5))]);
        assert_eq!(b.step(Input::RecvEnded { from: Backend, why: RecvEnd::Eof }), []);
        assert_eq!(b.step(Input::Sent { to: Backend, bytes: 100 }), [Output::Release(BufferId(0))]);
    }

    /// An open flow whose client has just become fast enough to be spliced.
    fn spliced() -> Bench {
        let mut b = Bench::open();
        (b.tuning.full_read_bytes, b.tuning.splice_after) = (100, 2);
        b.step(received(Client, 0));
        let out = b.step(received(Client, 1));
        assert_eq!(out, [Output::CancelRecv { from: Client }]);
        b.step(Input::RecvEnded { from: Client, why: RecvEnd::Cancelled });
        b.step(Input::Sent { to: Backend, bytes: 100 });
        let out = b.step(Input::Sent { to: Backend, bytes: 100 });
        let want =
            [Output::Release(BufferId(1)), Output::Splice { from: Client }, Output::Fill { from: Client }];
        assert_eq!(out, want, "only once all that was received is sent");
        b
    }

    fn filled(bytes: u32, end: FillEnd) -> Input {
        Input::Filled { from: Client, bytes, end }
    }

    #[test]
    fn a_fast_half_is_spliced_and_its_fin_follows_its_last_byte() {
        let mut b = spliced();
        assert_eq!(b.step(filled(1_000_000, FillEnd::Blocked)), [Output::Flush { to: Backend }]);
        let out = b.step(Input::Flushed { to: Backend, bytes: 400_000, failed: false });
        assert_eq!(out, [Output::PollWrite { to: Backend }, Output::Watch { from: Client }]);
        assert_eq!(b.step(Input::Writable { to: Backend }), [Output::Flush { to: Backend }]);
        let out = b.step(Input::Flushed { to: Backend, bytes: 600_000, failed: false });
        assert_eq!(out, [Output::PollRead { from: Client }]);
        assert_eq!(b.step(Input::Readable { from: Client }), [Output::Fill { from: Client }]);
        assert_eq!(b.step(filled(10, FillEnd::Eof)), [Output::Flush { to: Backend }]);
        let out = b.step(Input::Flushed { to: Backend, bytes: 10, failed: false });
        assert_eq!(out, [Output::Shutdown { to: Backend }]);
    }

    #[test]
    fn a_half_that_gets_slow_copies_again() {
        let mut b = spliced();
        for n in 1..=4 {
            b.step(filled(100, FillEnd::Blocked));
            let out = b.step(Input::Flushed { to: Backend, bytes: 100, failed: false });
            let again = [Output::Unsplice { from: Client }, Output::Recv { from: Client, shot: Shot::Many }];
            let want: &[Output] = if n < 4 { &[Output::PollRead { from: Client }] } else { &again };
            assert_eq!(out, want, "after {n} short fills");
            b.step(Input::Readable { from: Client });
        }
    }

    #[test]
    fn without_a_pipe_it_goes_on_copying() {
        let mut b = spliced();
        assert_eq!(
            b.step(Input::SpliceRefused { from: Client }),
            [Output::Recv { from: Client, shot: Shot::Many }]
        );
        assert_eq!(b.step(received(Client, 3)), [Output::Send { to: Backend, chunk: chunk(3) }]);
    }

    #[test]
    fn a_spliced_half_passes_a_reset_on_after_what_is_in_the_pipe() {
        let mut b = spliced();
        assert_eq!(b.step(filled(50_000, FillEnd::Reset)).last(), Some(&Output::Flush { to: Backend }));
        let out = b.step(Input::Flushed { to: Backend, bytes: 50_000, failed: false });
        assert_eq!(out, [closed(CloseReason::ClientReset)]);
    }

    #[test]
    fn a_flow_is_small() {
        assert!(size_of::<Flow>() <= 56, "{}: thousands are idle at once", size_of::<Flow>());
    }
}
