//! A program of the operator's: it is told whom to check, and its exit status says what came of it.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::text::shown;
use crate::{ANSWER_CHARS_MAX, Failure, Subject};

/// Most bytes of its output that are kept; the rest is read, so that it is not held up, and forgotten.
const KEPT_BYTES_MAX: usize = ANSWER_CHARS_MAX * 4;

/// How long its last words are read for, once it has ended.
const LAST_WORDS_WITHIN: Duration = Duration::from_millis(50);

/// A program and its arguments. In these `{address}` and `{port}` stand for those that are checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// The program: a path, or a name that is looked for in `PATH`.
    pub program: String,
    /// Its arguments; no shell reads them.
    pub arguments: Vec<String>,
}

impl CommandLine {
    /// Runs it to its end. When this is dropped before, it is killed with everything it started.
    pub(crate) async fn run(&self, subject: &Subject, target: SocketAddr) -> Result<String, Failure> {
        let failed = |why| Failure::Command(self.program.clone(), why);
        let (address, port) = (target.ip().to_string(), target.port().to_string());
        let argument = |text: &String| text.replace("{address}", &address).replace("{port}", &port);
        let mut child = Command::new(&self.program)
            .args(self.arguments.iter().map(argument))
            .env("TRIMTAB_ADDRESS", &address)
            .env("TRIMTAB_PORT", &port)
            .env("TRIMTAB_RESOURCE", &subject.resource)
            .env("TRIMTAB_POOL", &subject.pool)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // A group of its own, to end it with all that it started.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let mut said = Said { output: child.stdout.take(), kept: Vec::new() };
        let mut group = Group(child);
        let status = loop {
            tokio::select! {
                status = group.0.wait() => break status.map_err(failed)?,
                () = said.more() => {}
            }
        };
        // What it said last may be in the pipe still; what it left running may keep that open.
        let _ = timeout(LAST_WORDS_WITHIN, async {
            while said.output.is_some() {
                said.more().await
            }
        })
        .await;
        let said = shown(&said.kept);
        if status.success() {
            return Ok(if said.is_empty() { status.to_string() } else { said });
        }
        Err(Failure::Answer(format!("{status}: {said}")))
    }
}

/// A program with what it started; all of it is killed when this is dropped.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        // Without an id it was waited for, and its number may be another's.
        let id = self.0.id().and_then(|id| rustix::process::Pid::from_raw(id.cast_signed()));
        if let Some(id) = id {
            // Gone already: so much the better.
            let _ = rustix::process::kill_process_group(id, rustix::process::Signal::KILL);
        }
    }
}

/// The beginning of its output.
struct Said {
    /// `None`: it has ended.
    output: Option<ChildStdout>,
    kept: Vec<u8>,
}

impl Said {
    /// Takes what there is next; waits for ever where nothing comes any more.
    async fn more(&mut self) {
        let Some(output) = &mut self.output else { return std::future::pending().await };
        let mut piece = [0; 1024];
        match output.read(&mut piece).await {
            Ok(length @ 1..) => {
                let room = KEPT_BYTES_MAX - self.kept.len();
                self.kept.extend_from_slice(&piece[..length.min(room)]);
            }
            Ok(0) | Err(_) => self.output = None,
        }
    }
}
