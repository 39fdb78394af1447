//! The thread that writes: it gathers records, formats them, and is the only one that waits for the log's reader.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering::Relaxed, Ordering::SeqCst, fence};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::{AccessLogConfig, AccessLogFormat, AccessLogTo, END_PATIENCE, Names, Record, State, line};
use crate::clock::Clock;

/// How long records are gathered before they are written together: a wake and a write for each line would cost more than the
/// line.
const GATHER: Duration = Duration::from_millis(50);
/// How often a log that cannot be written is tried again, and how often it is seen whether the file was renamed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Records that are formatted before they are written.
const BATCH: usize = 512;

pub(super) struct Writer {
    format: AccessLogFormat,
    names: Names,
    rings: Vec<Receiver<Record>>,
    clock: Clock,
    state: Arc<State>,
    out: Out,
    /// Lines whose loss was said in the log.
    lost_said: u64,
    /// Lines of flows that are formatted and not written yet.
    pending: u64,
    /// Kept for its memory.
    text: String,
}

/// What became of a turn.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Wrote,
    NothingThere,
    /// The log takes no more for now.
    Stuck,
    /// All workers have gone, and nothing is left.
    Ended,
}

/// What was found in the rings.
struct Gathered {
    /// All workers have gone.
    ended: bool,
    /// A ring had a batch or more: it is not gathered for.
    more: bool,
}

impl Writer {
    pub(super) fn open(
        config: &AccessLogConfig,
        names: Names,
        rings: Vec<Receiver<Record>>,
        clock: Clock,
        state: Arc<State>,
    ) -> io::Result<Self> {
        let out = Out::open(config.to.clone())?;
        Ok(Self {
            format: config.format,
            names,
            rings,
            clock,
            state,
            out,
            lost_said: 0,
            pending: 0,
            text: String::new(),
        })
    }

    pub(super) fn run(mut self) {
        let mut give_up = None;
        loop {
            match self.turn() {
                Turn::Wrote => thread::park_timeout(GATHER),
                Turn::NothingThere => self.sleep(),
                Turn::Ended => return,
                Turn::Stuck => {
                    if self.state.workers.load(Relaxed) == 0 {
                        // Nobody waits for longer than that.
                        let at = *give_up.get_or_insert_with(|| Instant::now() + END_PATIENCE);
                        if Instant::now() >= at {
                            return;
                        }
                    }
                    self.out.wait();
                }
            }
        }
    }

    /// Writes what is there, if the log takes it.
    fn turn(&mut self) -> Turn {
        loop {
            if !self.flush() {
                return Turn::Stuck;
            }
            let Gathered { ended, more } = self.gather();
            if self.text.is_empty() {
                return if ended { Turn::Ended } else { Turn::NothingThere };
            }
            self.out.push(self.text.as_bytes());
            self.text.clear();
            if !more {
                return if self.flush() { Turn::Wrote } else { Turn::Stuck };
            }
        }
    }

    /// Writes what is pending; `false`: the log takes no more.
    fn flush(&mut self) -> bool {
        let done = self.out.flush();
        if done {
            self.state.written.fetch_add(std::mem::take(&mut self.pending), Relaxed);
        }
        done
    }

    /// Formats what is in the rings, up to a batch of each.
    fn gather(&mut self) -> Gathered {
        let (now, wall) = (self.clock.now(), SystemTime::now());
        let (mut ended, mut more) = (true, false);
        for ring in &self.rings {
            for n in 1..=BATCH {
                match ring.try_recv() {
                    Ok(record) => {
                        let ago = Duration::from_micros(now.micros.saturating_sub(record.ended_micros));
                        line::flow(&mut self.text, self.format, &self.names, wall - ago, &record);
                        self.pending += 1;
                        ended = false;
                        more |= n == BATCH;
                    }
                    Err(TryRecvError::Empty) => {
                        ended = false;
                        break;
                    }
                    Err(TryRecvError::Disconnected) => break,
                }
            }
        }
        let lost = self.state.lost();
        if lost > self.lost_said && (self.pending > 0 || ended) {
            line::lost(&mut self.text, self.format, wall, lost - self.lost_said);
            self.lost_said = lost;
        }
        Gathered { ended, more }
    }

    /// Sleeps until a record comes.
    fn sleep(&mut self) {
        self.state.asleep.store(true, Relaxed);
        // See `State::wake`.
        fence(SeqCst);
        if self.turn() == Turn::NothingThere {
            thread::park();
        }
        self.state.asleep.store(false, Relaxed);
    }
}

/// Where lines go, and those that are on their way there.
struct Out {
    to: AccessLogTo,
    file: Option<File>,
    /// Whole lines, but for the first, of which a part may be written.
    pending: Vec<u8>,
    /// The first byte of `pending` that is not written.
    start: usize,
    /// When the file was last looked at by its name, or opening or writing it last failed.
    looked: Instant,
    /// It is tried again when it is next looked at.
    failed: bool,
    /// That it failed was said, and that it works again was not.
    warned: bool,
}

impl Out {
    fn open(to: AccessLogTo) -> io::Result<Self> {
        let file = match &to {
            // A descriptor of our own: `Stdout`'s lock would be held while nobody reads, and others print as well.
            AccessLogTo::Stdout => Some(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
            AccessLogTo::File(path) => match open(path) {
                Err(error) if is_unread_fifo(path, &error) => None,
                file => Some(file?),
            },
        };
        Ok(Self {
            to,
            file,
            pending: Vec::new(),
            start: 0,
            looked: Instant::now(),
            failed: false,
            warned: false,
        })
    }

    fn push(&mut self, lines: &[u8]) {
        self.pending.extend_from_slice(lines);
    }

    /// Writes what is pending; `false`: some of it is left, and what comes after must wait.
    fn flush(&mut self) -> bool {
        if self.start == self.pending.len() {
            return true;
        }
        if self.looked.elapsed() >= LOOK_EVERY {
            self.looked = Instant::now();
            self.look();
        } else if self.failed || self.file.is_none() {
            return false;
        }
        let Some(file) = &mut self.file else { return false };
        while self.start < self.pending.len() {
            match file.write(&self.pending[self.start..]) {
                Ok(bytes) if bytes > 0 => self.start += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                result => {
                    let error = result.err().unwrap_or_else(|| ErrorKind::WriteZero.into());
                    self.fail(&error);
                    return false;
                }
            }
        }
        self.pending.clear();
        self.start = 0;
        if std::mem::take(&mut self.warned) {
            tracing::info!("the access log can be written again");
        }
        true
    }

    /// Says it once, until it works again.
    fn fail(&mut self, error: &io::Error) {
        (self.looked, self.failed) = (Instant::now(), true);
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(%error, to = ?self.to, "the access log cannot be written; lines wait, and are lost and counted beyond that");
        }
    }

    /// Opens the file if it is not open, or another has its name: then the one before was renamed (logrotate), and who looks
    /// for the log looks by name.
    fn look(&mut self) {
        let AccessLogTo::File(path) = &self.to else {
            self.failed = false;
            return;
        };
        let of = |metadata: &std::fs::Metadata| (metadata.dev(), metadata.ino());
        let named = std::fs::metadata(path).ok().map(|metadata| of(&metadata));
        let open_now = self.file.as_ref().and_then(|file| file.metadata().ok()).map(|metadata| of(&metadata));
        if open_now.is_some() && open_now == named && !self.failed {
            return;
        }
        match open(path) {
            Ok(file) => {
                // Who reads from here on did not read the beginning. A full disk has the same file before and after.
                let is_fifo = file.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo());
                if is_fifo || open_now != named {
                    self.begin_line();
                }
                self.file = Some(file);
                self.failed = false;
            }
            Err(error) if is_unread_fifo(path, &error) => self.file = None,
            Err(error) => {
                let error = io::Error::new(error.kind(), format!("{}: {error}", path.display()));
                self.fail(&error);
            }
        }
    }

    /// A line of which a part went to another file begins anew here.
    fn begin_line(&mut self) {
        let before = &self.pending[..self.start];
        self.start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    }

    /// Waits until it may be worth trying again.
    fn wait(&self) {
        match &self.file {
            Some(file) if !self.failed => {
                let timeout = Timespec { tv_sec: LOOK_EVERY.as_secs() as i64, tv_nsec: 0 };
                let mut fds = [PollFd::new(file, PollFlags::OUT)];
                if poll(&mut fds, Some(&timeout)).is_err() {
                    thread::park_timeout(GATHER);
                }
            }
            _ => thread::park_timeout(LOOK_EVERY),
        }
    }
}

/// For appending. A FIFO is not waited for: that would be for ever, if nobody reads it.
fn open(path: &Path) -> io::Result<File> {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(nonblocking).open(path)
}

/// ENXIO: nobody has the FIFO open for reading (fifo(7)).
fn is_unread_fifo(path: &Path, error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error())
        && std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}
