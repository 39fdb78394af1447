//! A child process of the demo: another run of this same executable.

use std::ffi::OsString;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A running child. Its stdin is a pipe from us: it leaves when we do, however we end.
#[derive(Debug)]
pub(super) struct Process {
    /// What it is, for people.
    pub(super) name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    /// Whether its end was told already.
    ended: bool,
}

impl Process {
    /// Starts `trimtab ARGS`, with only warnings on our stderr.
    pub(super) fn start(name: impl Into<String>, args: &[OsString]) -> io::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--log-level", "warn"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C goes to us alone; we stop the children in order.
            .process_group(0)
            .spawn()?;
        let stdin = child.stdin.take();
        let (say, lines) = channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::Builder::new().name("child-output".into()).spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    // Nobody listens any more once it is up; its pipe must be emptied all the same.
                    let _ = say.send(line);
                }
            })?;
        }
        Ok(Self { name: name.into(), child, stdin, lines, ended: false })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it prints this line.
    pub(super) fn wait_for_line(&mut self, wanted: &str, within: Duration) -> Result<(), String> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line == wanted => return Ok(()),
                Ok(_) => {}
                Err(_) => {
                    let how = match self.child.try_wait() {
                        Ok(Some(status)) => format!("ended with {status}"),
                        _ => format!("did not say {wanted:?} within {within:?}"),
                    };
                    return Err(format!("{} {how}", self.name));
                }
            }
        }
    }

    /// Writes a line to its stdin.
    pub(super) fn tell(&mut self, line: &str) {
        if let Some(stdin) = &mut self.stdin {
            // If it is gone, that is seen and told elsewhere.
            let _ = writeln!(stdin, "{line}");
        }
    }

    /// How it ended, the first time this is asked after it did.
    pub(super) fn newly_ended(&mut self) -> Option<String> {
        if self.ended {
            return None;
        }
        let status = self.child.try_wait().ok().flatten()?;
        self.ended = true;
        Some(format!("{} (pid {}) ended: {status}", self.name, self.pid()))
    }

    /// Whether its end was seen by [`Self::newly_ended`].
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Asks it to leave, and kills it when it does not.
    pub(super) fn stop(&mut self, within: Duration) {
        if let (Ok(None), Some(pid)) = (self.child.try_wait(), Pid::from_raw(self.pid() as i32)) {
            // Not reaped yet, so the pid is still its own.
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + within;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                tracing::warn!("{} (pid {}) did not leave and is killed", self.name, self.pid());
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
