//! Child processes: their lines, their signals, their end.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Lines kept of each stream. A process that says more has its oldest lines forgotten.
const LINES_MAX: usize = 10_000;
/// Lines shown of a process when its test fails.
const LINES_SHOWN: usize = 40;

/// A running child. It is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Lines,
    stderr: Lines,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code; `None`: a signal killed it.
    pub code: Option<i32>,
    /// All of its stdout.
    pub stdout: String,
    /// All of its stderr.
    pub stderr: String,
}

impl Process {
    /// Starts it, with all streams piped.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn start(name: &str, command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start {name} ({command:?}): {error}"));
        let stdin = child.stdin.take();
        let stdout = Lines::of(child.stdout.take().expect("piped"));
        let stderr = Lines::of(child.stderr.take().expect("piped"));
        Self { name: name.to_owned(), child, stdin, stdout, stderr }
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of stdout that `find` takes, also among those that came before.
    ///
    /// # Panics
    /// When it ends or `limit` passes first.
    #[track_caller]
    pub fn wait_for_line<T>(&mut self, limit: Duration, find: impl Fn(&str) -> Option<T>) -> T {
        let found = self.stdout.find(limit, find);
        found.unwrap_or_else(|| {
            panic!("{} ended, or did not say what was awaited within {limit:?}", self.name)
        })
    }

    /// As [`Self::wait_for_line`], of stderr.
    ///
    /// # Panics
    /// As that.
    #[track_caller]
    pub fn wait_for_error_line<T>(&mut self, limit: Duration, find: impl Fn(&str) -> Option<T>) -> T {
        let found = self.stderr.find(limit, find);
        found.unwrap_or_else(|| {
            panic!("{} ended, or did not complain as was awaited within {limit:?}", self.name)
        })
    }

    /// What it said on stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Writes to its stdin.
    ///
    /// # Panics
    /// When it does not take it.
    #[track_caller]
    pub fn write(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        stdin.write_all(text.as_bytes()).unwrap_or_else(|error| panic!("{}: stdin: {error}", self.name));
    }

    /// Closes its stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal. A process that has ended already gets none.
    pub fn signal(&mut self, signal: Signal) {
        // Not yet waited for, its id is still its own.
        if matches!(self.child.try_wait(), Ok(None)) {
            send(self.id(), signal);
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it ends by itself, and says how and after how long.
    ///
    /// # Panics
    /// When it does not within `limit`.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> (Ended, Duration) {
        let start = Instant::now();
        let what = format!("the end of {}", self.name);
        let (status, _) = crate::within(limit, &what, || self.child.try_wait().expect("our own child"));
        let took = start.elapsed();
        let ended =
            Ended { code: status.code(), stdout: self.stdout.all(limit), stderr: self.stderr.all(limit) };
        (ended, took)
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        // It fails only when the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            for (stream, lines) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
                for line in lines.last(LINES_SHOWN) {
                    eprintln!("[{} {stream}] {line}", self.name);
                }
            }
        }
    }
}

/// Sends a signal to a process that the caller knows to be its own.
pub(crate) fn send(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // A process that is gone needs no signal.
    let _ = kill_process(pid.expect("an id that the kernel gave"), signal);
}

/// Open descriptors of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptors {
    /// Ends of pipes.
    pub pipes: usize,
    /// Sockets.
    pub sockets: usize,
    /// All others: rings, files.
    pub others: usize,
}

/// Counts the open descriptors of a process.
///
/// # Panics
/// When it is gone.
pub fn descriptors(pid: u32) -> Descriptors {
    let folder = fs::read_dir(format!("/proc/{pid}/fd"));
    let folder = folder.unwrap_or_else(|error| panic!("the descriptors of process {pid}: {error}"));
    let mut counted = Descriptors { pipes: 0, sockets: 0, others: 0 };
    // One that was closed since it was listed does not count.
    for target in folder.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()) {
        match target.as_os_str().to_string_lossy().split(':').next() {
            Some("pipe") => counted.pipes += 1,
            Some("socket") => counted.sockets += 1,
            _ => counted.others += 1,
        }
    }
    counted
}

/// What a process has open once that stays the same for a while: what a test asked it before may still be closing.
///
/// # Panics
/// When it is gone, or never comes to rest.
pub fn settled_descriptors(pid: u32) -> Descriptors {
    /// Looks in a row, some 10 ms apart, that must agree.
    const ALIKE: u32 = 10;
    let (mut last, mut alike) = (descriptors(pid), 0);
    crate::until("what a process has open stays the same", || {
        let now = descriptors(pid);
        alike = if now == last { alike + 1 } else { 0 };
        last = now;
        (alike == ALIKE).then_some(now)
    })
}

/// Resident memory of a process.
///
/// # Panics
/// When it is gone.
pub fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    let status = status.unwrap_or_else(|error| panic!("the status of process {pid}: {error}"));
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number of kB");
    kib * 1024
}

/// The processes whose parent is `pid`.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let is_child = |candidate: &u32| {
        let stat = fs::read_to_string(format!("/proc/{candidate}/stat")).unwrap_or_default();
        // The name, in parentheses, may hold anything; the parent is the second field after it.
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        after.split_ascii_whitespace().nth(1) == Some(&pid.to_string())
    };
    let all = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

/// What a process says, line by line, as it comes.
#[derive(Debug, Clone)]
struct Lines(Arc<(Mutex<Said>, Condvar)>);

#[derive(Debug, Default)]
struct Said {
    lines: VecDeque<String>,
    ended: bool,
}

impl Lines {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let lines = Self(Arc::default());
        let writer = lines.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(1..)) {
                let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
                line.clear();
                let (said, news) = &*writer.0;
                let mut said = said.lock().expect("no reader panics");
                if said.lines.len() == LINES_MAX {
                    said.lines.pop_front();
                }
                said.lines.push_back(text);
                news.notify_all();
            }
            let (said, news) = &*writer.0;
            said.lock().expect("no reader panics").ended = true;
            news.notify_all();
        });
        lines
    }

    fn find<T>(&self, limit: Duration, find: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (said, news) = &*self.0;
        let deadline = Instant::now() + limit;
        let mut said = said.lock().expect("no reader panics");
        loop {
            if let Some(found) = said.lines.iter().find_map(|line| find(line)) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if said.ended || left.is_zero() {
                return None;
            }
            said = news.wait_timeout(said, left).expect("no reader panics").0;
        }
    }

    /// All of them, once the stream has ended.
    fn all(&self, limit: Duration) -> String {
        let (said, news) = &*self.0;
        let said = said.lock().expect("no reader panics");
        drop(news.wait_timeout_while(said, limit, |said| !said.ended).expect("no reader panics"));
        self.text()
    }

    fn text(&self) -> String {
        let said = self.0.0.lock().expect("no reader panics");
        said.lines.iter().map(|line| format!("{line}\n")).collect()
    }

    fn last(&self, count: usize) -> Vec<String> {
        let said = self.0.0.lock().expect("no reader panics");
        said.lines.iter().skip(said.lines.len().saturating_sub(count)).cloned().collect()
    }
}
