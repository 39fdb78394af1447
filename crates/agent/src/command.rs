//! A command of the shell: what it is told on its standard input, what it prints, and how it ended.
//!
//! It runs in a process group of its own, which is killed when it is late, says too much, or the agent ends: whatever it started
//! goes with it.
//!
//! Owns: its bounds. Does not own: what it is for.

use std::process::Stdio;
use std::time::Duration;

use formats::TEXT_BYTES_MAX;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{ChildStdin, Command};
use tokio::time::timeout;

/// What is kept of its standard error, to say why it failed.
const COMPLAINT_BYTES_MAX: u64 = 1024;

/// What becomes of what it prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// It is given back.
    Wanted,
    /// It goes nowhere.
    Ignored,
}

/// Runs it once, with `input` on its standard input.
///
/// # Errors
/// Why it did not do what it should, in words: its author's to mend.
pub(crate) async fn run(
    command: &str,
    input: &[u8],
    output: Output,
    within: Duration,
) -> Result<Vec<u8>, String> {
    let mut process = Command::new("sh");
    process.args(["-c", command]).process_group(0).kill_on_drop(true);
    let stdin = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
    let stdout = if output == Output::Wanted { Stdio::piped() } else { Stdio::null() };
    process.stdin(stdin).stdout(stdout).stderr(Stdio::piped());
    let mut child = process.spawn().map_err(|error| format!("the command cannot be started: {error}"))?;
    // The group is killed when this goes out of scope, however that comes.
    let mut group = Group::of(child.id());
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let ran = timeout(within, async {
        let limit = TEXT_BYTES_MAX as u64 + 1;
        let told = tell(stdin, input);
        let ((), said, complaint) =
            tokio::join!(told, read(stdout, limit), read(stderr, COMPLAINT_BYTES_MAX));
        if said.len() as u64 == limit {
            return Err(format!("the command printed more than {TEXT_BYTES_MAX} bytes: it was killed"));
        }
        let status = child.wait().await.map_err(|error| format!("the command: {error}"))?;
        group.has_ended();
        if !status.success() {
            let complaint = String::from_utf8_lossy(&complaint);
            let first = complaint.lines().next().unwrap_or_default();
            return Err(format!("the command ended with {status}: {first}"));
        }
        Ok(said)
    });
    let ran =
        ran.await.unwrap_or_else(|_| Err(format!("the command took longer than {within:?}: it was killed")));
    drop(group);
    ran
}

async fn tell(pipe: Option<ChildStdin>, input: &[u8]) {
    if let Some(mut pipe) = pipe {
        // It need not read what it is told.
        let _ = pipe.write_all(input).await;
    }
}

async fn read(pipe: Option<impl AsyncRead + Unpin>, limit: u64) -> Vec<u8> {
    let mut said = Vec::new();
    if let Some(pipe) = pipe {
        // What could be read before an error is what there is.
        let _ = pipe.take(limit).read_to_end(&mut said).await;
    }
    said
}

/// A process group of ours. Nothing of it outlives this, unless its leader ended by itself.
struct Group(Option<Pid>);

impl Group {
    fn of(leader: Option<u32>) -> Self {
        Self(leader.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw))
    }

    /// Its leader was waited for: from now on the id may be another's.
    fn has_ended(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Its leader was not waited for yet, so the id is still its own. A group that is gone needs no signal.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const WITHIN: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn it_is_told_and_need_not_listen() {
        let said = run("cat", b"{\"kind\":\"x\"}", Output::Wanted, WITHIN).await.unwrap();
        assert_eq!(said, b"{\"kind\":\"x\"}");
        let deaf = run("exit 0", &[b'x'; 1 << 20], Output::Wanted, WITHIN).await;
        assert_eq!(deaf, Ok(Vec::new()));
        // What nobody wants may be as long as it likes.
        let chatty = run("head -c 1000000 /dev/zero", b"", Output::Ignored, WITHIN).await;
        assert_eq!(chatty, Ok(Vec::new()));
    }

    #[tokio::test]
    async fn one_that_is_late_is_killed_with_all_that_it_started() {
        let folder = std::env::temp_dir().join(format!("trimtab-command-{}", std::process::id()));
        let file = folder.display();
        let start = Instant::now();
        let command = format!("sleep 300 & echo $! > {file}; wait");
        let why = run(&command, b"", Output::Wanted, Duration::from_millis(300)).await.unwrap_err();
        assert_eq!(why, "the command took longer than 300ms: it was killed");
        assert!(start.elapsed() < WITHIN);
        let sleeper: u32 = std::fs::read_to_string(&folder).unwrap().trim().parse().unwrap();
        std::fs::remove_file(&folder).unwrap();
        // Killed, and perhaps not yet reaped by its new parent.
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{sleeper}/stat")).unwrap_or_default();
            stat.rsplit_once(')').is_none_or(|(_, after)| after.trim_start().starts_with('Z'))
        };
        while !gone() {
            assert!(start.elapsed() < WITHIN, "the child of the command lives on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
