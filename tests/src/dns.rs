//! DNS servers in temporary folders: BIND 9, Knot DNS and PowerDNS, each the primary of [`ZONE`] with a TSIG key that may
//! update it; and `dig`, to read back.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::{Namespace, PATIENCE, Process, until};

/// The zone that every server here has.
pub const ZONE: &str = "example.test";
/// The key's name.
const KEY: &str = "trimtab-key";
/// What a new zone has in it.
const ZONE_FILE: &str = "$ORIGIN example.test.\n$TTL 3600\n\
    @ SOA ns1 hostmaster 1 3600 600 86400 5\n@ NS ns1\nns1 A 127.0.0.1\ntaken A 192.0.2.7\n";
/// The schema that Debian's package of PowerDNS's backend brings.
const POWERDNS_SCHEMA: &str = "/usr/share/pdns-backend-sqlite3/schema/schema.sqlite3.sql";

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsKind {
    /// BIND 9, with a key of hmac-sha256.
    Bind,
    /// Knot DNS, with one of hmac-sha384.
    Knot,
    /// PowerDNS with SQLite, with one of hmac-sha512.
    PowerDns,
}

impl DnsKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bind, Self::Knot, Self::PowerDns];

    fn algorithm(self) -> &'static str {
        match self {
            Self::Bind => "hmac-sha256",
            Self::Knot => "hmac-sha384",
            Self::PowerDns => "hmac-sha512",
        }
    }
}

/// A server. It and its folder go when this is dropped.
#[derive(Debug)]
pub struct DnsServer {
    kind: DnsKind,
    address: SocketAddr,
    process: Option<Process>,
    folder: TempDir,
    /// Where it runs, if not where the test does.
    namespace: Option<Arc<Namespace>>,
}

impl DnsServer {
    /// Starts one with a new zone and a new key at an address of its own, and waits until it answers.
    ///
    /// # Panics
    /// When it is not installed or does not start.
    #[track_caller]
    pub fn start(kind: DnsKind) -> Self {
        Self::start_at(kind, address(kind), None)
    }

    /// Starts one in a network of its own, at an address that is there.
    ///
    /// # Panics
    /// As [`Self::start`].
    #[track_caller]
    pub fn start_in(kind: DnsKind, address: SocketAddr, namespace: Arc<Namespace>) -> Self {
        Self::start_at(kind, address, Some(namespace))
    }

    #[track_caller]
    fn start_at(kind: DnsKind, address: SocketAddr, namespace: Option<Arc<Namespace>>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut server = Self { kind, address, process: None, folder, namespace };
        server.write_key("key.conf", KEY);
        server.make_zone();
        server.start_again();
        server
    }

    /// Where it answers.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The key that may update the zone, as `tsig-keygen` prints it.
    pub fn key_file(&self) -> PathBuf {
        self.folder.path().join("key.conf")
    }

    /// A key of the same name with another secret.
    #[track_caller]
    pub fn key_file_with_another_secret(&self) -> PathBuf {
        self.write_key("other.conf", KEY)
    }

    /// A key that the server does not know.
    #[track_caller]
    pub fn key_file_of_another_name(&self) -> PathBuf {
        self.write_key("unknown.conf", "unknown-key")
    }

    /// The `[[dns]]` of a balancer that publishes here as `name`.
    pub fn section(&self, name: &str, further: &str) -> String {
        section(self.address, &self.key_file(), name, further)
    }

    /// Ends it, and waits until it has.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::TERM);
            process.wait(PATIENCE);
        }
    }

    /// Starts it again where it was, and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn start_again(&mut self) {
        assert!(self.process.is_none(), "it still runs");
        let folder = self.folder.path().to_str().expect("a plain path");
        let program = match self.kind {
            DnsKind::Bind => "/usr/sbin/named",
            DnsKind::Knot => "/usr/sbin/knotd",
            DnsKind::PowerDns => "/usr/sbin/pdns_server",
        };
        let mut command = self.command(program);
        match self.kind {
            DnsKind::Bind => command.args(["-g", "-n", "1", "-c", &format!("{folder}/named.conf")]),
            DnsKind::Knot => command.args(["-c", &format!("{folder}/knot.conf")]),
            DnsKind::PowerDns => {
                command.args([&format!("--config-dir={folder}"), "--guardian=no", "--daemon=no"])
            }
        };
        self.process = Some(Process::start(&format!("{:?}", self.kind), &mut command));
        until(&format!("{:?} answers", self.kind), || {
            self.dig(ZONE, "SOA").iter().any(|line| line.contains("hostmaster")).then_some(())
        });
    }

    /// Stops it where it is: the kernel still takes what comes for it.
    pub fn freeze(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::STOP);
        }
    }

    /// Lets it go on.
    pub fn thaw(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::CONT);
        }
    }

    /// Puts the zone back to what it was at first, as after a restore from an old backup. Only while it is stopped.
    ///
    /// # Panics
    /// When it runs.
    #[track_caller]
    pub fn lose_zone(&mut self) {
        assert!(self.process.is_none(), "it still runs");
        self.make_zone();
    }

    /// As [`Self::lose_zone`], and with a new key of the same name: who has the old one cannot put anything there.
    ///
    /// # Panics
    /// When it runs.
    #[track_caller]
    pub fn lose_zone_and_key(&mut self) {
        self.write_key("key.conf", KEY);
        self.lose_zone();
    }

    /// What `dig +short` says, sorted; empty: nothing, or no answer.
    #[track_caller]
    pub fn dig(&self, name: &str, kind: &str) -> Vec<String> {
        dig_by(self.command("dig"), self.address, name, kind)
    }

    /// A command where it runs, which ends when the thread that starts it does.
    fn command(&self, program: &str) -> Command {
        match &self.namespace {
            Some(namespace) => namespace.command(program),
            None => {
                let mut command = Command::new("setpriv");
                command.args(["--pdeathsig", "KILL", "--", program]);
                command
            }
        }
    }

    /// The zone's serial number.
    ///
    /// # Panics
    /// When it does not say.
    #[track_caller]
    pub fn serial(&self) -> u64 {
        let soa = self.dig(ZONE, "SOA");
        let serial = soa.first().and_then(|line| line.split(' ').nth(2)?.parse().ok());
        serial.unwrap_or_else(|| panic!("no serial number in {soa:?}"))
    }

    #[track_caller]
    fn write_key(&self, file: &str, name: &str) -> PathBuf {
        let printed = run(Command::new("/usr/sbin/tsig-keygen").args(["-a", self.kind.algorithm(), name]));
        let file = self.folder.path().join(file);
        fs::write(&file, printed).expect("a file in our own folder");
        file
    }

    /// The folder's configuration and a new zone.
    #[track_caller]
    fn make_zone(&self) {
        match self.kind {
            DnsKind::Bind => self.make_bind(),
            DnsKind::Knot => self.make_knot(),
            DnsKind::PowerDns => self.make_powerdns(),
        }
    }

    fn make_bind(&self) {
        let folder = self.folder.path().display();
        let (ip, port) = (self.address.ip(), self.address.port());
        drop(fs::remove_file(self.folder.path().join("zone.db.jnl")));
        self.write("zone.db", ZONE_FILE);
        self.write(
            "named.conf",
            &format!(
                "options {{ directory \"{folder}\"; listen-on port {port} {{ {ip}; }}; listen-on-v6 {{ none; }};\n\
                 pid-file \"{folder}/named.pid\"; session-keyfile \"{folder}/session.key\";\n\
                 managed-keys-directory \"{folder}\"; recursion no; notify no; dnssec-validation no; }};\n\
                 controls {{ }};\ninclude \"{folder}/key.conf\";\n\
                 zone \"{ZONE}\" {{ type primary; file \"{folder}/zone.db\";\n\
                 update-policy {{ grant {KEY} zonesub ANY; }}; }};\n"
            ),
        );
    }

    fn make_knot(&self) {
        let folder = self.folder.path().display();
        let (ip, port) = (self.address.ip(), self.address.port());
        drop(fs::remove_dir_all(self.folder.path().join("db")));
        fs::create_dir(self.folder.path().join("db")).expect("a folder in our own folder");
        self.write("zone.db", ZONE_FILE);
        let (algorithm, secret) = (self.kind.algorithm(), self.secret());
        self.write(
            "knot.conf",
            &format!(
                "server:\n  rundir: {folder}\n  listen: {ip}@{port}\n  udp-workers: 1\n  tcp-workers: 1\n\
                 log:\n  - target: stderr\n    any: info\ndatabase:\n  storage: {folder}/db\n\
                 key:\n  - id: {KEY}\n    algorithm: {algorithm}\n    secret: {secret}\n\
                 acl:\n  - id: update\n    key: {KEY}\n    action: update\n\
                 zone:\n  - domain: {ZONE}\n    storage: {folder}\n    file: zone.db\n    acl: update\n"
            ),
        );
    }

    #[track_caller]
    fn make_powerdns(&self) {
        let folder = self.folder.path().display();
        let (ip, port) = (self.address.ip(), self.address.port());
        self.write(
            "pdns.conf",
            &format!(
                "launch=gsqlite3\ngsqlite3-database={folder}/pdns.db\ngsqlite3-pragma-synchronous=0\n\
                 socket-dir={folder}\nlocal-address={ip}\nlocal-port={port}\ndnsupdate=yes\n\
                 allow-dnsupdate-from=127.0.0.0/8\ncache-ttl=0\nquery-cache-ttl=0\nnegquery-cache-ttl=0\n\
                 zone-cache-refresh-interval=0\nreceiver-threads=1\ndistributor-threads=1\n"
            ),
        );
        drop(fs::remove_file(self.folder.path().join("pdns.db")));
        let schema = fs::File::open(POWERDNS_SCHEMA);
        let schema =
            schema.unwrap_or_else(|error| panic!("{POWERDNS_SCHEMA}: {error}; run `cargo xtask install`"));
        run(Command::new("sqlite3").arg(self.folder.path().join("pdns.db")).stdin(schema));
        self.write("zone.db", ZONE_FILE);
        let zone_file = self.folder.path().join("zone.db");
        let zone_file = zone_file.to_str().expect("a plain path");
        for arguments in [
            &["load-zone", ZONE, zone_file][..],
            &["import-tsig-key", KEY, self.kind.algorithm(), &self.secret()],
            &["set-meta", ZONE, "TSIG-ALLOW-DNSUPDATE", KEY],
        ] {
            run(Command::new("pdnsutil").arg(format!("--config-dir={folder}")).args(arguments));
        }
    }

    fn secret(&self) -> String {
        let key = fs::read_to_string(self.key_file()).expect("our own key");
        key.split('"').nth(3).expect("the secret is the second text in quotes").to_owned()
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.folder.path().join(file), text).expect("a file in our own folder");
    }
}

/// BIND listens only at addresses that an interface really has, which of loopback is one.
#[track_caller]
fn address(kind: DnsKind) -> SocketAddr {
    if kind != DnsKind::Bind {
        return crate::loopback();
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address")
}

/// The `[[dns]]` of a balancer that publishes in [`ZONE`] at `server` as `name`.
pub fn section(server: SocketAddr, key_file: &Path, name: &str, further: &str) -> String {
    format!(
        "[[dns]]\nzone = \"{ZONE}\"\nserver = \"{server}\"\nkey_file = \"{}\"\nname = \"{name}\"\nttl = \"2s\"\n{further}\n",
        key_file.display()
    )
}

/// What `dig +short` says, sorted; empty: nothing, or no answer.
///
/// # Panics
/// When dig is not installed.
#[track_caller]
pub fn dig(server: SocketAddr, name: &str, kind: &str) -> Vec<String> {
    dig_by(Command::new("dig"), server, name, kind)
}

#[track_caller]
fn dig_by(mut dig: Command, server: SocketAddr, name: &str, kind: &str) -> Vec<String> {
    let (at, port) = (format!("@{}", server.ip()), server.port().to_string());
    let output = dig
        .args([&at, "-p", &port, "+short", "+time=1", "+tries=1", name, kind])
        .output()
        .expect("dig is installed (`cargo xtask install`)");
    let text = String::from_utf8_lossy(&output.stdout);
    // A comment says why there is no answer.
    let mut lines: Vec<String> =
        text.lines().filter(|line| !line.starts_with(';')).map(str::to_owned).collect();
    lines.sort();
    lines
}

/// What dnsperf counted: queries sent, answered, lost; with at most 200 at once from 40 sockets.
///
/// # Panics
/// When dnsperf is not installed, or counts nothing.
#[track_caller]
pub fn dnsperf(at: SocketAddr, seconds: &str) -> [u64; 3] {
    let folder = TempDir::new().expect("a temporary folder");
    let queries = folder.path().join("queries");
    fs::write(&queries, format!("ns1.{ZONE} A\ntaken.{ZONE} A\n{ZONE} SOA\n")).expect("our own folder");
    let (ip, port) = (at.ip().to_string(), at.port().to_string());
    let mut command = Command::new("dnsperf");
    command.args(["-s", &ip, "-p", &port, "-c", "40", "-q", "200", "-l", seconds, "-d"]).arg(&queries);
    let text = run(&mut command);
    let count = |label: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(label));
        let number = line.and_then(|line| line.split_once(':')?.1.split_whitespace().next()?.parse().ok());
        number.unwrap_or_else(|| panic!("no {label:?} in {text}"))
    };
    [count("Queries sent"), count("Queries completed"), count("Queries lost")]
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.stderr(Stdio::piped()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}; run `cargo xtask install`"));
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
