//! Starting the command, reading what it says, and stopping it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Nothing here takes a tenth of it on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A running command; killed when dropped.
pub(crate) struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_trimtab"))
            .args(args)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command was built");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, stdout }
    }

    /// What it prints up to `ready`, without that line.
    pub(crate) fn until_ready(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            let read = self.stdout.read_line(&mut line).expect("UTF-8");
            if read == 0 {
                panic!("it ended before it was ready: {}", self.stderr());
            }
            if line == "ready\n" {
                return lines;
            }
            lines.push(line.trim_end().to_owned());
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a pid");
        kill_process(pid, signal).expect("it is our child");
    }

    /// Its exit code, when it ends in time.
    pub(crate) fn wait(&mut self) -> i32 {
        let mut code = None;
        eventually("it ends", || {
            code = self.child.try_wait().expect("it is our child");
            code.is_some()
        });
        code.and_then(|status| status.code()).expect("it ended by itself")
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_some()
    }

    /// All of its stderr, once it has ended.
    pub(crate) fn stderr(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut text).expect("UTF-8");
        }
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a condition holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A service that echoes, on a free port, until the test process ends.
pub(crate) fn echo_service() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut writer = &stream;
                let _ = std::io::copy(&mut &stream, &mut writer);
            });
        }
    });
    address
}

/// Sends bytes and takes them back.
pub(crate) fn echoes(mut stream: &TcpStream) -> bool {
    let mut back = [0; 4];
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout above zero");
    stream.write_all(b"ping").and_then(|()| stream.read_exact(&mut back)).is_ok() && &back == b"ping"
}

/// The address in `listening tcp://… pool=…`.
pub(crate) fn listening(line: &str) -> SocketAddr {
    let rest = line.strip_prefix("listening tcp://").expect(line);
    rest.split(' ').next().and_then(|address| address.parse().ok()).expect(line)
}
