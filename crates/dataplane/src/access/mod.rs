//! The access log: one line for each flow, at its end.
//!
//! ```text
//! worker: Record --try_send--> its ring (bounded) --+
//! worker: Record --try_send--> its ring (bounded) --+--> one thread: formats, writes, opens anew after a rotation
//!                   | full                          |
//!                   +--> counted as lost -----------+--> said in the log once it is written again
//! ```
//!
//! Owns: what is known of a flow at its end, the rings, the thread that writes. Does not own: when a flow ends.
//!
//! A worker never waits here: a ring that is full costs the line, which is counted. Whoever reads the log slowly, or not at all,
//! or has filled the disk, stops the writing thread alone. While it cannot write, what is in the rings waits ([`RING_RECORDS`]
//! for each worker) and the rest is lost.

mod line;
mod writer;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst, fence};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::Duration;

use allocation::{Kept, Policy, ResourceId};

use crate::clock::Clock;
use writer::Writer;

/// Records that wait for the writer, of one worker: at a line of some 400 bytes, what a disk takes in a blink.
const RING_RECORDS: usize = 4_096;
/// How long the writer may take at the end to write what is left.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Where the access log goes and what its lines look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLogConfig {
    /// Where to.
    pub to: AccessLogTo,
    /// What a line looks like.
    pub format: AccessLogFormat,
}

/// Where the access log goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogTo {
    /// Standard output.
    Stdout,
    /// Appended to a file, which is made if it is not there, or written to a FIFO.
    File(PathBuf),
}

/// What a line of the access log looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccessLogFormat {
    /// A JSON object.
    #[default]
    Json,
    /// Words with spaces between them, for people.
    Line,
}

/// What moved the bytes of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

/// All that is said of a flow.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// When it ended, on the process's clock.
    pub(crate) ended_micros: u64,
    pub(crate) worker: u16,
    pub(crate) listener: u16,
    /// Of the listener's targets; 0: the default.
    pub(crate) target: u16,
    pub(crate) protocol: Protocol,
    /// `None`: it had gone before anybody asked.
    pub(crate) client: Option<SocketAddr>,
    /// The last that was selected.
    pub(crate) chosen: Option<Chosen>,
    /// Connects that failed before.
    pub(crate) retries: u8,
    pub(crate) to_backend: u64,
    pub(crate) to_client: u64,
    /// Micros that it waited for room; 0: it did not.
    pub(crate) queue_micros: u64,
    pub(crate) connect_micros: Option<u64>,
    /// From the first byte to the backend (or the connect, if the backend spoke first).
    pub(crate) first_byte_micros: Option<u64>,
    pub(crate) total_micros: u64,
    /// How it ended: a close reason's label.
    pub(crate) end: &'static str,
    /// The bound at which it ended, if it did at one: a shed's label.
    pub(crate) shed: Option<&'static str>,
}

/// A flow's backend, and why it is that one.
#[derive(Debug, Clone)]
pub(crate) struct Chosen {
    pub(crate) id: ResourceId,
    pub(crate) address: SocketAddr,
    pub(crate) policy: Policy,
    /// `None`: there is no affinity.
    pub(crate) kept: Option<Kept>,
    pub(crate) generation: u64,
    /// What the policy compared, as it was before the flow was counted.
    pub(crate) cost: f32,
}

/// A listener's name and those of its pools, by target.
pub(crate) type Names = Vec<(String, Vec<String>)>;

/// One worker's end.
#[derive(Debug)]
pub(crate) struct AccessLog {
    /// Always there, until it is dropped.
    ring: Option<SyncSender<Record>>,
    state: Arc<State>,
}

/// What the workers, the writer and whoever counts share.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// The writer waits to be woken.
    asleep: AtomicBool,
    writer: OnceLock<Thread>,
    /// Ends of workers that are not dropped yet.
    workers: AtomicUsize,
    /// Lines that found no room, or that were cut off by a file's end.
    lost: AtomicU64,
    written: AtomicU64,
}

/// The writer's thread. Dropping it does not end it: it ends when every worker's end is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    ended: Receiver<()>,
}

impl AccessLog {
    /// Hands a record over, or counts it as lost. Never waits; a system call only where the writer has to be woken, which it has
    /// not for as long as there is something to write.
    pub(crate) fn write(&self, record: Record) {
        if self.ring.as_ref().is_some_and(|ring| ring.try_send(record).is_ok()) {
            self.state.wake();
        } else {
            self.state.lost.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for AccessLog {
    /// The writer sees that its last worker has gone.
    fn drop(&mut self) {
        self.ring = None;
        self.state.workers.fetch_sub(1, Relaxed);
        if let Some(writer) = self.state.writer.get() {
            writer.unpark();
        }
    }
}

impl State {
    /// Lines lost since the start.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Relaxed)
    }

    /// Lines written since the start.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    fn wake(&self) {
        // Either the writer sees the record when it looks once more before it sleeps, or this sees that it sleeps.
        fence(SeqCst);
        if self.asleep.load(Relaxed)
            && self.asleep.swap(false, Relaxed)
            && let Some(writer) = self.writer.get()
        {
            writer.unpark();
        }
    }
}

impl Running {
    /// Waits for what is left to be written, but no longer than [`END_PATIENCE`]: somebody who does not read must not keep the
    /// process.
    pub(crate) fn end(self) {
        if self.ended.recv_timeout(END_PATIENCE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(
                "the access log was not written to its end: whoever reads it does not, or its disk is full"
            );
        }
    }
}

/// Opens the log and starts the thread that writes it. One end for each worker.
///
/// # Errors
/// When the file cannot be opened, or there is no thread.
pub(crate) fn start(
    config: &AccessLogConfig,
    names: Names,
    workers: usize,
    clock: Clock,
    state: &Arc<State>,
) -> io::Result<(Vec<AccessLog>, Running)> {
    let (logs, rings): (Vec<_>, Vec<_>) = (0..workers)
        .map(|_| {
            let (ring, records) = sync_channel(RING_RECORDS);
            state.workers.fetch_add(1, Relaxed);
            (AccessLog { ring: Some(ring), state: Arc::clone(state) }, records)
        })
        .unzip();
    let writer = Writer::open(config, names, rings, clock, Arc::clone(state))?;
    let (ending, ended) = channel();
    let thread = std::thread::Builder::new().name("access-log".to_owned()).spawn(move || {
        writer.run();
        drop(ending);
    })?;
    // Set once: the state belongs to this dataplane.
    let _ = state.writer.set(thread.thread().clone());
    // It may have gone to sleep before there was anybody to wake it by name.
    thread.thread().unpark();
    Ok((logs, Running { ended }))
}
