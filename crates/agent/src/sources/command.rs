//! A command that prints our JSON.
//!
//! It runs in a process group of its own, which is killed when it is late, says too much, or the agent ends: whatever it started
//! goes with it.

use std::process::Stdio;
use std::time::Duration;

use formats::{Document, TEXT_BYTES_MAX};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::time::timeout;

/// What is kept of its standard error, to say why it failed.
const COMPLAINT_BYTES_MAX: u64 = 1024;

/// Runs it once.
pub(super) async fn run(command: &str, within: Duration) -> Result<Document, String> {
    let mut process = Command::new("sh");
    process.args(["-c", command]).process_group(0).kill_on_drop(true);
    process.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = process.spawn().map_err(|error| format!("the command cannot be started: {error}"))?;
    // The group is killed when this goes out of scope, however that comes.
    let mut group = Group::of(child.id());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let ran = timeout(within, async {
        let limit = TEXT_BYTES_MAX as u64 + 1;
        let (said, complaint) = tokio::join!(read(stdout, limit), read(stderr, COMPLAINT_BYTES_MAX));
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
        Document::parse(&said).map_err(|error| format!("what the command printed {error}"))
    });
    let ran =
        ran.await.unwrap_or_else(|_| Err(format!("the command took longer than {within:?}: it was killed")));
    drop(group);
    ran
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

    async fn fails(command: &str, within: Duration) -> String {
        run(command, within).await.unwrap_err()
    }

    #[tokio::test]
    async fn what_it_prints_is_a_document() {
        let document = run(r#"echo '{"cpu": 0.5, "utilization": {"queue": 0.25}}'"#, WITHIN).await.unwrap();
        assert_eq!((document.cpu, document.utilization["queue"]), (Some(0.5), 0.25));
    }

    #[tokio::test]
    async fn why_it_failed_is_said() {
        assert_eq!(
            fails("echo no such queue >&2; exit 3", WITHIN).await,
            "the command ended with exit status: 3: no such queue"
        );
        assert!(
            fails("echo nonsense", WITHIN).await.starts_with("what the command printed is not as expected")
        );
        assert!(fails("yes", WITHIN).await.starts_with("the command printed more than 65536 bytes"));
        // Much on standard error alone does not block it for ever either.
        assert!(fails("yes >&2", WITHIN).await.starts_with("the command ended with "));
    }

    #[tokio::test]
    async fn one_that_is_late_is_killed_with_all_that_it_started() {
        let folder = std::env::temp_dir().join(format!("trimtab-command-{}", std::process::id()));
        let file = folder.display();
        let start = Instant::now();
        let why = fails(&format!("sleep 300 & echo $! > {file}; wait"), Duration::from_millis(300)).await;
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
