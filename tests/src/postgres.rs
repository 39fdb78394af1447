//! PostgreSQL servers in temporary folders, and `pgbench`.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::process::{children, send};
use crate::trimtab::target_folder;
use crate::{PATIENCE, Process, SqlClient, until};

/// Where Debian has the programs of a server.
const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";
/// Whom a server runs as where we are root: it refuses root.
const USER: &str = "postgres";
/// Counts up with what is in the template.
const TEMPLATE_VERSION: u32 = 1;
/// What each server runs with: nothing here is kept, and the machine is small.
const SETTINGS: [&str; 9] = [
    "fsync=off",
    "full_page_writes=off",
    "synchronous_commit=off",
    "shared_buffers=16MB",
    "max_connections=200",
    "autovacuum=off",
    "max_wal_senders=0",
    "wal_level=minimal",
    "log_min_messages=fatal",
];
/// How long an immediate shutdown may take.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);

/// A running server with pgbench's tables. It and its folder go when this is dropped.
#[derive(Debug)]
pub struct Postgres {
    address: SocketAddr,
    process: Process,
    _folder: TempDir,
}

impl Postgres {
    /// Starts one at an address of its own.
    ///
    /// # Panics
    /// When PostgreSQL is not installed or does not start.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// As [`Self::start`], with TLS of this certificate and key (PEM).
    ///
    /// # Panics
    /// As that.
    #[track_caller]
    pub fn start_with_tls(certificate: &str, key: &str) -> Self {
        Self::start_with(Some((certificate, key)))
    }

    #[track_caller]
    fn start_with(tls: Option<(&str, &str)>) -> Self {
        let template = template();
        let folder = folder();
        let data = folder.path().join("data");
        copy(&template, &data);
        if let Some((certificate, key)) = tls {
            for (name, text) in [("server.crt", certificate), ("server.key", key)] {
                let file = data.join(name);
                fs::write(&file, text).expect("our own folder");
                // It refuses a key that others may read.
                fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("our own file");
            }
        }
        own(folder.path());
        let address = crate::loopback();
        let process = serve(&data, address, if tls.is_some() { &["ssl=on"] } else { &[] });
        let mut server = Self { address, process, _folder: folder };
        server.wait_until_ready();
        server
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The id of its first process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.process.stderr()
    }

    /// Sessions that clients ever had, by its own count.
    ///
    /// # Panics
    /// When it does not answer.
    #[track_caller]
    pub fn sessions(&self) -> u64 {
        let count = SqlClient::connect(self.address)
            .and_then(|mut client| {
                client.query("select sessions from pg_stat_database where datname = 'postgres'")
            })
            .unwrap_or_else(|error| panic!("the server at {}: {error}", self.address));
        count.parse().expect("a count")
    }

    /// `kill -9` of all its processes, as when its machine loses power.
    pub fn kill(&mut self) {
        let children = self.freeze();
        self.process.kill();
        for child in children {
            send(child, Signal::KILL);
        }
    }

    /// Stops all its processes where they are; gives its children.
    pub fn freeze(&mut self) -> Vec<u32> {
        // First the one that would start further ones.
        self.process.signal(Signal::STOP);
        let children = children(self.process.id());
        for child in &children {
            send(*child, Signal::STOP);
        }
        children
    }

    /// Lets it go on.
    pub fn thaw(&mut self) {
        for child in children(self.process.id()) {
            send(child, Signal::CONT);
        }
        self.process.signal(Signal::CONT);
    }

    #[track_caller]
    fn wait_until_ready(&mut self) {
        let address = self.address;
        until("PostgreSQL answers", || {
            assert!(self.process.is_running(), "PostgreSQL ended: {}", self.process.stderr());
            SqlClient::connect(address).ok()?.end().ok()
        });
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Immediate shutdown: its children go, too. They may be frozen.
        self.process.signal(Signal::QUIT);
        self.thaw();
        let deadline = std::time::Instant::now() + SHUTDOWN_PATIENCE;
        while self.process.is_running() {
            if std::time::Instant::now() >= deadline {
                self.kill();
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[track_caller]
fn serve(data: &Path, address: SocketAddr, further: &[&str]) -> Process {
    let mut command = as_owner(&program("postgres"));
    command.arg("-D").arg(data);
    let sockets = format!("unix_socket_directories={}", data.display());
    let listen = format!("listen_addresses={}", address.ip());
    let port = format!("port={}", address.port());
    let own = [sockets.as_str(), &listen, &port];
    for setting in SETTINGS.iter().chain(&own).chain(further) {
        command.args(["-c", setting]);
    }
    Process::start("postgres", &mut command)
}

/// A data folder with pgbench's tables, made once for all tests and kept among what cargo builds.
#[track_caller]
fn template() -> PathBuf {
    static ONE_MAKES_IT: Mutex<()> = Mutex::new(());
    let _guard = ONE_MAKES_IT.lock();
    let version = output(Command::new(program("postgres")).arg("--version"));
    let version = version.trim().rsplit(' ').find(|word| word.starts_with("15")).unwrap_or("15").to_owned();
    let version: String = version.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '.').collect();
    let owner = if is_root() { "root" } else { "user" };
    let parent = target_folder().join("e2e");
    let template = parent.join(format!("postgres-{version}-{owner}-{TEMPLATE_VERSION}"));
    if template.exists() {
        return template;
    }
    let folder = folder();
    own(folder.path());
    let data = folder.path().join("data");
    output(as_owner(&program("initdb")).arg("-D").arg(&data).args([
        "-A",
        "trust",
        "-U",
        "postgres",
        "--no-sync",
        "--no-locale",
        "-E",
        "UTF8",
    ]));
    let address = crate::loopback();
    let process = serve(&data, address, &[]);
    let mut server = Postgres { address, process, _folder: folder };
    server.wait_until_ready();
    let port = address.port().to_string();
    let host = address.ip().to_string();
    output(
        Command::new("pgbench")
            .args(["-q", "-i", "-s", "1", "-h", &host, "-p", &port, "-U", "postgres", "postgres"]),
    );
    // A smart shutdown: the copies need no recovery.
    server.process.signal(Signal::TERM);
    let (ended, _) = server.process.wait(PATIENCE);
    assert_eq!(ended.code, Some(0), "PostgreSQL: {}", ended.stderr);
    fs::create_dir_all(&parent).unwrap_or_else(|error| panic!("cannot create {}: {error}", parent.display()));
    let making = parent.join(format!("making-{}", std::process::id()));
    copy(&data, &making);
    if let Err(error) = fs::rename(&making, &template) {
        // Another test process was faster.
        let _ = fs::remove_dir_all(&making);
        assert!(template.exists(), "cannot create {}: {error}", template.display());
    }
    template
}

#[track_caller]
fn folder() -> TempDir {
    tempfile::Builder::new().prefix("trimtab-e2e-").tempdir().expect("a temporary folder")
}

#[track_caller]
fn copy(from: &Path, to: &Path) {
    output(Command::new("cp").args(["-r", "--reflink=auto"]).arg(from).arg(to));
    output(Command::new("chmod").args(["-R", "go="]).arg(to));
}

/// Gives a folder to whoever the server runs as.
#[track_caller]
fn own(folder: &Path) {
    if is_root() {
        output(Command::new("chown").args(["-R", USER]).arg(folder));
    }
}

/// A command as the server's user, which ends when the thread that starts it does.
fn as_owner(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    if is_root() {
        command.args(["--reuid", USER, "--regid", USER, "--init-groups"]);
    }
    command.args(["--pdeathsig", "QUIT", "--"]).arg(program).current_dir("/");
    command
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

#[track_caller]
fn program(name: &str) -> PathBuf {
    let program = Path::new(PROGRAMS).join(name);
    assert!(program.exists(), "{} is missing: run `cargo xtask install`", program.display());
    program
}

/// Runs a command to its end.
#[track_caller]
fn output(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => panic!("{command:?}: not installed: run `cargo xtask install`"),
        _ => panic!("{command:?}: {error}"),
    });
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}: {stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A running `pgbench`.
#[derive(Debug)]
pub struct PgBench(Process);

impl PgBench {
    /// Starts it against `address`, with these further arguments.
    ///
    /// # Panics
    /// When it is not installed.
    #[track_caller]
    pub fn start(address: SocketAddr, arguments: &[&str]) -> Self {
        let mut command = Command::new("setpriv");
        // Without a vacuum first: it would go to whichever server answers.
        command.args(["--pdeathsig", "KILL", "--", "pgbench", "-n", "-U", "postgres"]);
        command.args(["-h", &address.ip().to_string(), "-p", &address.port().to_string()]);
        command.args(arguments).arg("postgres");
        Self(Process::start("pgbench", &mut command))
    }

    /// Waits for its end; gives how many transactions it made.
    ///
    /// # Panics
    /// When one of them failed, or it does not end within `limit`.
    #[track_caller]
    pub fn succeed(self, limit: Duration) -> u64 {
        self.finish(limit).unwrap_or_else(|said| panic!("pgbench: {said}"))
    }

    /// Waits for its end; gives how many transactions it made.
    ///
    /// # Errors
    /// What it said, when one of them failed.
    ///
    /// # Panics
    /// When it does not end within `limit`.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> Result<u64, String> {
        let (ended, _) = self.0.wait(limit);
        let failed = number_after(&ended.stdout, "number of failed transactions: ");
        let processed = number_after(&ended.stdout, "number of transactions actually processed: ");
        match (ended.code, failed, processed) {
            (Some(0), Some(0), Some(processed)) => Ok(processed),
            _ => Err(format!("{}{}", ended.stdout, ended.stderr)),
        }
    }
}

fn number_after(text: &str, label: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(label))?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pgbench_prints() {
        let text =
            "number of transactions actually processed: 300/300\nnumber of failed transactions: 2 (0.1%)\n";
        assert_eq!(number_after(text, "number of transactions actually processed: "), Some(300));
        assert_eq!(number_after(text, "number of failed transactions: "), Some(2));
        assert_eq!(number_after(text, "tps = "), None);
    }
}
