//! Where utilization comes from beside our agents: exporters, MariaDB, pages and lines that a test writes.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::trimtab::target_folder;
use crate::{Backend, Process, connect, until};

/// Starts a program that ends when the thread that starts it does, with the last argument being where it serves.
#[track_caller]
fn start(name: &str, command: &mut Command) -> Process {
    let mut whole = Command::new("setpriv");
    whole.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        whole.env(key, value.unwrap_or_default());
    }
    Process::start(name, &mut whole)
}

/// A Prometheus exporter of Debian's, whose metrics are at `/metrics`.
#[derive(Debug)]
pub struct Exporter {
    address: SocketAddr,
    _process: Process,
}

impl Exporter {
    /// node_exporter, of this host.
    ///
    /// # Panics
    /// When it is not installed or does not start.
    #[track_caller]
    pub fn node() -> Self {
        Self::start("prometheus-node-exporter", "")
    }

    /// postgres_exporter, of this server.
    ///
    /// # Panics
    /// As [`Self::node`].
    #[track_caller]
    pub fn postgres(server: SocketAddr) -> Self {
        let source = format!("postgresql://postgres@{server}/postgres?sslmode=disable");
        Self::start("prometheus-postgres-exporter", &source)
    }

    /// mysqld_exporter, of this server.
    ///
    /// # Panics
    /// As [`Self::node`].
    #[track_caller]
    pub fn mysqld(server: SocketAddr) -> Self {
        Self::start("prometheus-mysqld-exporter", &format!("root@({server})/"))
    }

    #[track_caller]
    fn start(program: &str, source: &str) -> Self {
        let address = crate::loopback();
        let mut command = Command::new(program);
        command.arg(format!("--web.listen-address={address}")).env("DATA_SOURCE_NAME", source);
        let process = start(program, &mut command);
        until(&format!("{program} answers"), || connect(address).ok());
        Self { address, _process: process }
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The value of a series of its page that begins so.
    ///
    /// # Panics
    /// When it does not answer, or has no such series.
    #[track_caller]
    pub fn value(&self, series: &str) -> f64 {
        // Of HTTP 1.0, whose answers are not cut into chunks.
        let mut stream = connect(self.address).expect("an exporter answers");
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it takes a request");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("it answers");
        let line = page.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("{series}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a value")
    }
}

/// A MariaDB server in a temporary folder, which root may use from anywhere without a password.
#[derive(Debug)]
pub struct MariaDb {
    address: SocketAddr,
    // Before the folder: it writes there.
    process: Process,
    _folder: TempDir,
}

impl MariaDb {
    /// Starts one.
    ///
    /// # Panics
    /// When it is not installed or does not start.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts one with these further arguments.
    ///
    /// # Panics
    /// As [`Self::start`].
    #[track_caller]
    pub fn start_with(further: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let data = format!("--datadir={}/data", folder.path().display());
        let made = Command::new("mariadb-install-db")
            .args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"])
            .args(["--user=root", &data])
            // Each removes what it finds of others where its temporary tables are: one that starts beside it would end.
            .env("TMPDIR", folder.path())
            .output()
            .expect("mariadb-install-db is installed by `cargo xtask install`");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let address = crate::loopback();
        let grant = folder.path().join("grant.sql");
        std::fs::write(&grant, "create user root@'%';\ngrant all on *.* to root@'%';\n")
            .expect("our own folder");
        let mut command = Command::new("mariadbd");
        command.args([
            "--no-defaults",
            "--user=root",
            "--skip-log-bin",
            "--innodb-buffer-pool-size=16M",
            &data,
        ]);
        command.args(further).arg(format!("--tmpdir={}", folder.path().display()));
        command.arg(format!("--bind-address={}", address.ip())).arg(format!("--port={}", address.port()));
        command.arg(format!("--socket={}/socket", folder.path().display()));
        command.arg(format!("--init-file={}", grant.display()));
        let process = start("mariadbd", &mut command);
        until("MariaDB answers", || connect(address).ok());
        Self { address, process, _folder: folder }
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops it where it is: the kernel still takes connections for it.
    pub fn freeze(&mut self) {
        self.process.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn thaw(&mut self) {
        self.process.signal(Signal::CONT);
    }
}

/// Something that answers every connection with the text of the moment, once the client has said something where it is HTTP.
#[derive(Debug)]
pub struct Text {
    text: Arc<Mutex<String>>,
    backend: Backend,
}

impl Text {
    /// An HTTP server: each request is answered by 200 and the text.
    ///
    /// # Panics
    /// When it cannot listen.
    #[track_caller]
    pub fn http(text: &str) -> Self {
        Self::start(text, |stream, text| {
            if read_head(stream) {
                let length = text.len();
                let head =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
                let _ = stream.write_all((head + text).as_bytes());
            }
        })
    }

    /// An agent-check as HAProxy's manual has it: a connection is answered by one line, and closed.
    ///
    /// # Panics
    /// When it cannot listen.
    #[track_caller]
    pub fn agent_check(line: &str) -> Self {
        Self::start(line, |stream, line| {
            let _ = stream.write_all(format!("{line}\r\n").as_bytes());
        })
    }

    #[track_caller]
    fn start(text: &str, answer: impl Fn(&mut TcpStream, &str) + Send + Sync + 'static) -> Self {
        let text = Arc::new(Mutex::new(text.to_owned()));
        let now = Arc::clone(&text);
        let backend = Backend::start(move |mut stream| {
            let text = now.lock().unwrap_or_else(PoisonError::into_inner).clone();
            answer(&mut stream, &text);
        });
        Self { text, backend }
    }

    /// Says this from now on.
    pub fn say(&self, text: &str) {
        text.clone_into(&mut self.text.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.backend.address()
    }
}

/// Reads a request's head; false: the client went.
pub fn read_head(stream: &mut TcpStream) -> bool {
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        match stream.read(&mut piece) {
            Ok(0) | Err(_) => return false,
            Ok(length) => head.extend_from_slice(&piece[..length]),
        }
    }
    true
}

/// A program that a Python wheel of `cargo xtask install` brought.
///
/// # Panics
/// When it is not there.
#[track_caller]
pub fn wheel(program: &str) -> PathBuf {
    let target = target_folder();
    let root = target.ancestors().find(|folder| folder.join("venv").exists());
    let found = root.map(|root| root.join("venv/bin").join(program)).filter(|path| path.exists());
    found.unwrap_or_else(|| panic!("{program} is missing: run `cargo xtask install`"))
}

/// An ORCA server that is none of ours: grpcio, with the descriptors of xds-protos.
#[derive(Debug)]
pub struct PythonOrca {
    address: SocketAddr,
    process: Process,
}

impl PythonOrca {
    /// Starts it; it reports this CPU utilization and 100 requests a second.
    ///
    /// # Panics
    /// When Python or its wheels are not installed.
    #[track_caller]
    pub fn start(cpu: f64) -> Self {
        let address = crate::loopback();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/orca_server.py");
        let mut command = Command::new(wheel("python"));
        command.arg(script).arg(address.to_string()).arg(cpu.to_string());
        let mut process = start("orca_server.py", &mut command);
        process.wait_for_line(crate::PATIENCE, |line| (line == "ready").then_some(()));
        Self { address, process }
    }

    /// Reports this from now on.
    ///
    /// # Panics
    /// When it has ended.
    #[track_caller]
    pub fn say(&mut self, cpu: f64) {
        self.process.write(&format!("{cpu}\n"));
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
