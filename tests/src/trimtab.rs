//! The binary under test: balancer, proxy, agents, and the commands that ask.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::{Ended, HttpAnswer, Metrics, PATIENCE, Process, get};

/// Where cargo puts what it builds.
#[track_caller]
pub(crate) fn target_folder() -> PathBuf {
    // target/PROFILE/deps/TEST, or target/PROFILE/bench
    let program = std::env::current_exe().expect("a running program has a path");
    let mut folders = program.ancestors().skip(1).skip_while(|folder| folder.ends_with("deps"));
    folders.nth(1).expect("cargo puts programs below target").to_owned()
}

/// The binary under test: `TRIMTAB_BIN`, or the release build.
///
/// # Panics
/// When it is not built.
#[track_caller]
pub fn binary() -> PathBuf {
    let named = std::env::var_os("TRIMTAB_BIN").map(PathBuf::from);
    let binary = named.unwrap_or_else(|| target_folder().join("release/trimtab"));
    assert!(
        binary.exists(),
        "{} is missing: run `cargo build --release -p trimtab`, or name another binary in TRIMTAB_BIN",
        binary.display()
    );
    binary
}

/// A `trimtab` command. It ends when the thread that starts it does.
///
/// # Panics
/// When the binary is not built.
#[track_caller]
pub fn trimtab_command(arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(binary()).args(arguments);
    for variable in
        ["RUST_LOG", "TRIMTAB_CONTROL", "TRIMTAB_CA", "TRIMTAB_CERT", "TRIMTAB_KEY", "TRIMTAB_TOKEN"]
    {
        command.env_remove(variable);
    }
    command
}

/// Runs a `trimtab` command to its end.
///
/// # Panics
/// When it does not end.
#[track_caller]
pub fn trimtab(arguments: &[&str]) -> Ended {
    let name = format!("trimtab {}", arguments.join(" "));
    let mut process = Process::start(&name, &mut trimtab_command(arguments));
    process.close_stdin();
    process.wait(PATIENCE).0
}

/// What a balancer is configured with. No resource is ever in it.
#[derive(Debug, Clone)]
pub struct BalancerConfig {
    /// Where control listens.
    pub control: SocketAddr,
    /// Lines of `[control.pull]`.
    pub control_pull: String,
    /// Where metrics are.
    pub http: SocketAddr,
    /// Where clients connect.
    pub listener: SocketAddr,
    /// Lines of `[dataplane]`.
    pub dataplane: String,
    /// Lines of the `[[pool]]`.
    pub pool: String,
    /// Further sections: pools, listeners, `[decisions]`.
    pub further: String,
}

impl Default for BalancerConfig {
    fn default() -> Self {
        let [control, http, listener] = std::array::from_fn(|_| crate::loopback());
        let [control_pull, dataplane, pool, further] = std::array::from_fn(|_| String::new());
        Self { control, control_pull, http, listener, dataplane, pool, further }
    }
}

impl BalancerConfig {
    /// As a file.
    pub fn text(&self) -> String {
        let Self { control, control_pull, http, listener, dataplane, pool, further } = self;
        let mut text = format!("[control]\nlisten = \"{control}\"\n[http]\nlisten = \"{http}\"\n");
        let _ = writeln!(text, "[control.pull]\n{control_pull}");
        let _ = write!(text, "[dataplane]\n{dataplane}\n[[pool]]\nname = \"{}\"\n{pool}\n", crate::POOL);
        text.push_str(&listener_section(*listener, crate::POOL, ""));
        text.push_str(further);
        text
    }

    /// Adds a listener of the pool that requires something; gives its address.
    pub fn add_listener(&mut self, requires: &str) -> SocketAddr {
        let listener = crate::loopback();
        self.further += &listener_section(listener, crate::POOL, &format!("requires = [\"{requires}\"]"));
        listener
    }

    /// Adds a pool with these lines, and a listener of it; gives the listener's address.
    pub fn add_pool(&mut self, name: &str, lines: &str) -> SocketAddr {
        let listener = crate::loopback();
        let _ = writeln!(self.further, "[[pool]]\nname = \"{name}\"\n{lines}");
        self.further += &listener_section(listener, name, "");
        listener
    }
}

fn listener_section(listener: SocketAddr, pool: &str, lines: &str) -> String {
    format!("[[listener]]\nbind = \"tcp://{listener}\"\npool = \"{pool}\"\n{lines}\n")
}

/// A running `trimtab serve`.
#[derive(Debug)]
pub struct Balancer {
    config: BalancerConfig,
    file: PathBuf,
    _folder: TempDir,
    process: Process,
}

impl Balancer {
    /// Starts it, and waits until it says that it is ready.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn start(config: BalancerConfig) -> Self {
        Self::start_by(config, trimtab_command)
    }

    /// Starts it by a command of its own making, of which it gets the arguments.
    ///
    /// # Panics
    /// When it does not get ready.
    #[track_caller]
    pub fn start_by(config: BalancerConfig, command: impl FnOnce(&[&str]) -> Command) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("trimtab.toml");
        std::fs::write(&file, config.text()).expect("a file in our own folder");
        let process = serve(&file, command);
        let mut balancer = Self { config, file, _folder: folder, process };
        balancer.wait_until_ready();
        balancer
    }

    /// Starts it again after it ended; does not wait until it is ready.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn start_again(&mut self) {
        assert!(!self.process.is_running(), "it still runs");
        self.process = serve(&self.file, trimtab_command);
    }

    /// Waits until it says that it is ready.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn wait_until_ready(&mut self) {
        self.process.wait_for_line(PATIENCE, |line| (line == "ready").then_some(()));
    }

    /// What it was configured with.
    pub fn config(&self) -> &BalancerConfig {
        &self.config
    }

    /// Where clients connect.
    pub fn listener(&self) -> SocketAddr {
        self.config.listener
    }

    /// Where control listens.
    pub fn control(&self) -> SocketAddr {
        self.config.control
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its metrics now.
    ///
    /// # Panics
    /// When it does not answer.
    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        Metrics::scrape(self.config.http)
    }

    /// What a probe of `path` gets; `None`: no answer.
    pub fn probe(&self, path: &str) -> Option<HttpAnswer> {
        get(self.config.http, path).ok()
    }

    /// Runs an admin command against it, which must succeed; gives what it printed.
    ///
    /// # Panics
    /// When it does not succeed.
    #[track_caller]
    pub fn admin(&self, arguments: &[&str]) -> String {
        let control = format!("http://{}", self.config.control);
        let ended = trimtab(&[arguments, &["--control", &control]].concat());
        assert_eq!(ended.code, Some(0), "trimtab {arguments:?}: {}", ended.stderr);
        ended.stdout
    }

    /// What an admin command answers to scripts.
    ///
    /// # Panics
    /// When it does not succeed, or not with JSON.
    #[track_caller]
    pub fn ask(&self, arguments: &[&str]) -> serde_json::Value {
        let text = self.admin(&[arguments, &["-o", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("trimtab {arguments:?}: {error}: {text}"))
    }

    /// `trimtab resources -o json`, by id.
    ///
    /// # Panics
    /// When it does not answer so.
    #[track_caller]
    pub fn resources(&self) -> serde_json::Map<String, serde_json::Value> {
        let resources = self.ask(&["resources"]);
        let list = resources["resources"].as_array().expect("a list of resources");
        let by_id =
            |resource: &serde_json::Value| Some((resource["id"].as_str()?.to_owned(), resource.clone()));
        list.iter().map(|resource| by_id(resource).expect("a resource has an id")).collect()
    }

    /// How many resources get new flows.
    #[track_caller]
    pub fn ready_resources(&self) -> usize {
        self.resources().values().filter(|resource| resource["state"] == "ready").count()
    }

    /// Starts an agent that registers `address` as `id`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn agent(&self, id: &str, address: SocketAddr, further: &[&str]) -> Process {
        self.agent_of(crate::POOL, id, address, further)
    }

    /// As [`Self::agent`], in this pool.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn agent_of(&self, pool: &str, id: &str, address: SocketAddr, further: &[&str]) -> Process {
        let (balancer, address) = (format!("http://{}", self.config.control), address.to_string());
        let arguments = ["agent", "--pool", pool, "--id", id, "--address", &address, "--balancer", &balancer];
        Process::start(&format!("agent {id}"), &mut trimtab_command(&[&arguments, further].concat()))
    }
}

#[track_caller]
fn serve(file: &Path, command: impl FnOnce(&[&str]) -> Command) -> Process {
    let file = file.to_str().expect("a plain path");
    Process::start("balancer", &mut command(&["serve", "-c", file]))
}

/// A running `trimtab proxy`.
#[derive(Debug)]
pub struct Proxy {
    process: Process,
    listener: SocketAddr,
}

impl Proxy {
    /// Starts it with these backends and further arguments, at any free port.
    ///
    /// # Panics
    /// When it does not get ready.
    #[track_caller]
    pub fn start(backends: &[SocketAddr], further: &[&str]) -> Self {
        Self::start_at(SocketAddr::new(crate::loopback().ip(), 0), backends, further)
    }

    /// Starts it at this address.
    ///
    /// # Panics
    /// When it does not get ready.
    #[track_caller]
    pub fn start_at(listen: SocketAddr, backends: &[SocketAddr], further: &[&str]) -> Self {
        let listen = format!("tcp://{listen}");
        let mut command = trimtab_command(&["proxy", "--listen", &listen]);
        for backend in backends {
            command.args(["--to", &backend.to_string()]);
        }
        let mut process = Process::start("proxy", command.args(further));
        let listener = process.wait_for_line(PATIENCE, |line| {
            line.strip_prefix("listening tcp://")?.split(' ').next()?.parse().ok()
        });
        process.wait_for_line(PATIENCE, |line| (line == "ready").then_some(()));
        Self { process, listener }
    }

    /// Where clients connect.
    pub fn listener(&self) -> SocketAddr {
        self.listener
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Ends it as an operator does.
    ///
    /// # Panics
    /// When it does not end well within `limit`.
    #[track_caller]
    pub fn stop(mut self, limit: Duration) {
        self.process.signal(Signal::TERM);
        let (ended, _) = self.process.wait(limit);
        assert_eq!(ended.code, Some(0), "proxy: {}", ended.stderr);
    }
}
