//! The proxies: where they are, how each is configured to be at its best with as many workers as are asked for, and how it is started.

use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::{Serialize, Serializer};

use crate::case::Case;
use crate::process::ProcessTree;

/// How long a proxy may take until it accepts.
const READY: Duration = Duration::from_secs(15);

/// Who carries the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Proxy {
    /// Nobody: clients connect to the backends. What is left then is the load's own cost.
    Direct,
    /// HAProxy in TCP mode.
    Haproxy,
    /// nginx with its stream module.
    Nginx,
    /// Envoy's `tcp_proxy`.
    Envoy,
    /// trimtab.
    Trimtab,
    /// Another trimtab, where `TRIMTAB_BEFORE` says: what a change is compared with.
    Before,
    /// A ring that carries bytes and does nothing else: see [`crate::floor`].
    Floor,
}

impl Proxy {
    /// All, in the order of columns.
    pub const ALL: [Self; 7] =
        [Self::Direct, Self::Haproxy, Self::Nginx, Self::Envoy, Self::Trimtab, Self::Before, Self::Floor];
    /// Who takes part unless somebody else is asked for.
    pub const USUAL: [Self; 5] = [Self::Direct, Self::Haproxy, Self::Nginx, Self::Envoy, Self::Trimtab];

    /// As in arguments and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Envoy => "envoy",
            Self::Trimtab => "trimtab",
            Self::Before => "before",
            Self::Floor => "floor",
        }
    }

    /// Whether it can do what the case asks.
    pub fn carries(self, case: Case) -> bool {
        match self {
            // It proxies no UDP.
            Self::Haproxy => !case.has_udp(),
            // There is no proxy whose memory it could be.
            Self::Direct => case != Case::Idle,
            // Bulk is spliced, trains are kept together, and silence is for who is there for long: that is not the least.
            Self::Floor => !case.is_bulk() && !matches!(case, Case::UdpBulk | Case::Mixed | Case::Idle),
            Self::Nginx | Self::Envoy | Self::Trimtab | Self::Before => true,
        }
    }

    /// Whether goals are set by it.
    pub fn is_peer(self) -> bool {
        matches!(self, Self::Haproxy | Self::Nginx | Self::Envoy)
    }

    /// Whether trimtab is compared with it.
    pub fn is_compared(self) -> bool {
        self.is_peer() || matches!(self, Self::Before | Self::Floor)
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Proxy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A proxy that can be run here.
#[derive(Debug, Clone, Serialize)]
pub struct Installed {
    /// Which.
    pub proxy: Proxy,
    /// Its program; empty for [`Proxy::Direct`].
    #[serde(skip)]
    pub program: PathBuf,
    /// What it says of itself.
    pub version: String,
}

/// A proxy that is not installed.
#[derive(Debug, thiserror::Error)]
#[error("{proxy} is left out: {program} was not found; {remedy}")]
pub struct NotInstalled {
    proxy: Proxy,
    program: String,
    remedy: &'static str,
}

/// What a proxy shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where it connects to.
    pub backends: Vec<SocketAddr>,
    /// Long transfers: what a proxy offers for them is switched on.
    pub bulk: bool,
    /// It listens for UDP as well, on the same port, with the same backends.
    pub udp: bool,
    /// Workers, threads or processes: what a proxy runs several of.
    pub workers: usize,
}

/// How a proxy is started: its command line and its configuration file, if it has one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setup {
    /// Arguments; `FOLDER` stands for the temporary folder.
    pub arguments: Vec<String>,
    /// Name and content of the configuration file.
    pub file: Option<(&'static str, String)>,
}

impl Installed {
    /// Looks for a proxy: on `PATH` and in the system's folders; Envoy also in `target/venv`; trimtab where
    /// `TRIMTAB_BIN` says or beside this program.
    pub fn find(proxy: Proxy) -> Result<Self, NotInstalled> {
        let peer_hint = "`cargo xtask install bench` installs it";
        let (name, version_flag, remedy) = match proxy {
            Proxy::Direct => return Ok(Self { proxy, program: PathBuf::new(), version: String::new() }),
            Proxy::Floor => ("bench", "--version", "it is this program"),
            Proxy::Haproxy => ("haproxy", "-v", peer_hint),
            Proxy::Nginx => ("nginx", "-v", peer_hint),
            Proxy::Envoy => ("envoy", "--version", peer_hint),
            Proxy::Trimtab => {
                ("trimtab", "--version", "`cargo build --release -p trimtab` builds it, or set TRIMTAB_BIN")
            }
            Proxy::Before => ("trimtab", "--version", "set TRIMTAB_BEFORE"),
        };
        let missing = |program: &str| NotInstalled { proxy, program: program.to_owned(), remedy };
        let program =
            candidates(proxy, name).into_iter().find(|p| p.is_file()).ok_or_else(|| missing(name))?;
        if proxy == Proxy::Nginx && !Path::new(NGINX_STREAM).exists() {
            return Err(missing(NGINX_STREAM));
        }
        let version = version(&program, version_flag);
        Ok(Self { proxy, program, version })
    }

    /// Starts it on these processors with its files in `folder`, and waits until it accepts.
    pub fn start(&self, task: &Task, folder: &Path, cpus: &[usize]) -> io::Result<ProcessTree> {
        let setup = setup(self.proxy, task);
        if let Some((name, content)) = &setup.file {
            fs::write(folder.join(name), content)?;
        }
        let folder_text = folder.to_string_lossy();
        let mut command = Command::new(&self.program);
        command.args(setup.arguments.iter().map(|a| a.replace("FOLDER", &folder_text))).current_dir(folder);
        let log = folder.join(format!("{}.log", self.proxy));
        let mut tree = ProcessTree::spawn(&mut command, cpus, log)?;
        wait_until_it_accepts(&mut tree, task.listen)?;
        tree.find_descendants()?;
        Ok(tree)
    }
}

/// A loopback address with a port that was free a moment ago.
pub fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// The command line and configuration of a proxy for a task.
pub fn setup(proxy: Proxy, task: &Task) -> Setup {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect();
    match proxy {
        Proxy::Direct => Setup { arguments: Vec::new(), file: None },
        Proxy::Haproxy => Setup {
            arguments: words("-db -f FOLDER/haproxy.cfg"),
            file: Some(("haproxy.cfg", haproxy(task))),
        },
        Proxy::Nginx => {
            let arguments = words("-p FOLDER -c FOLDER/nginx.conf -e FOLDER/nginx.log");
            Setup { arguments, file: Some(("nginx.conf", nginx(task))) }
        }
        Proxy::Envoy => {
            let workers = task.workers;
            let flags = format!(
                "--concurrency {workers} --disable-hot-restart --log-level error -c FOLDER/envoy.json"
            );
            Setup { arguments: words(&flags), file: Some(("envoy.json", envoy(task))) }
        }
        Proxy::Trimtab | Proxy::Before => {
            let mut arguments: Vec<String> = words(&format!("proxy --workers {} --listen", task.workers));
            arguments.push(format!("tcp://{}", task.listen));
            if task.udp {
                arguments.extend(["--listen".to_owned(), format!("udp://{}", task.listen)]);
            }
            arguments.extend(task.backends.iter().flat_map(|b| ["--to".to_owned(), b.to_string()]));
            Setup { arguments, file: None }
        }
        Proxy::Floor => {
            let mut arguments: Vec<String> = words(&format!("floor --listen {}", task.listen));
            arguments.extend(task.backends.iter().flat_map(|b| ["--to".to_owned(), b.to_string()]));
            arguments.extend(task.udp.then(|| "--udp".to_owned()));
            Setup { arguments, file: None }
        }
    }
}

/// Where Debian's `libnginx-mod-stream` puts the module.
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// Splicing where the transfers are long, as its manual advises; nothing logged, nothing inspected.
fn haproxy(task: &Task) -> String {
    let splice = if task.bulk { "    option splice-auto\n" } else { "" };
    let mut text = format!(
        "global
    nbthread {}
    maxconn 4096
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
{splice}frontend in
    bind {} backlog 4096
    default_backend out
backend out
    balance roundrobin
",
        task.workers, task.listen
    );
    for (index, backend) in task.backends.iter().enumerate() {
        writeln!(text, "    server b{index} {backend}").expect("a String takes all");
    }
    text
}

/// Larger buffers where the transfers are long (it has no splice for TCP to TCP); nothing logged.
fn nginx(task: &Task) -> String {
    let buffer = if task.bulk { "64k" } else { "16k" };
    // A queue for each worker, as its manual advises; one alone needs none.
    let reuseport = if task.workers > 1 { " reuseport" } else { "" };
    let udp = if task.udp { nginx_udp(task.listen) } else { String::new() };
    let servers: String = task.backends.iter().map(|b| format!("        server {b};\n")).collect();
    format!(
        "load_module {NGINX_STREAM};
daemon off;
pid nginx.pid;
error_log nginx.log crit;
worker_processes {};
worker_rlimit_nofile 20000;
events {{
    use epoll;
    worker_connections 16384;
    multi_accept on;
}}
stream {{
    access_log off;
    tcp_nodelay on;
    upstream out {{
{servers}    }}
    server {{
        listen {} backlog=4096{reuseport};
        proxy_pass out;
        proxy_connect_timeout 5s;
        proxy_timeout 1h;
        proxy_buffer_size {buffer};
    }}
{udp}}}
",
        task.workers, task.listen
    )
}

/// What a UDP listener may hold (the kernel gives at most `net.core.rmem_max`): by default 277 small datagrams, fewer than
/// there are flows.
const UDP_QUEUE_BYTES: u32 = 1 << 20;

/// A session stays until it is silent: nginx cannot know how many answers come.
fn nginx_udp(listen: SocketAddr) -> String {
    format!(
        "    server {{
        listen {listen} udp reuseport rcvbuf={UDP_QUEUE_BYTES};
        proxy_pass out;
        proxy_timeout 60s;
    }}
"
    )
}

/// Limits lifted (1,024 connections to a cluster otherwise); no access log, no admin, no tracing.
fn envoy(task: &Task) -> String {
    let address = |a: &SocketAddr| serde_json::json!({"socket_address": {"address": a.ip().to_string(), "port_value": a.port()}});
    let endpoints: Vec<_> =
        task.backends.iter().map(|b| serde_json::json!({"endpoint": {"address": address(b)}})).collect();
    let mut configuration = serde_json::json!({
        "static_resources": {
            "listeners": [{
                "name": "in",
                "address": address(&task.listen),
                "enable_reuse_port": task.workers > 1,
                "tcp_backlog_size": 4096,
                "filter_chains": [{"filters": [{
                    "name": "envoy.filters.network.tcp_proxy",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                        "stat_prefix": "in",
                        "cluster": "out",
                        "idle_timeout": "3600s",
                    },
                }]}],
            }],
            "clusters": [{
                "name": "out",
                "type": "STATIC",
                "connect_timeout": "5s",
                "lb_policy": "ROUND_ROBIN",
                "circuit_breakers": {"thresholds": [{
                    "max_connections": 16384, "max_pending_requests": 16384, "max_requests": 16384,
                }]},
                "load_assignment": {"cluster_name": "out", "endpoints": [{"lb_endpoints": endpoints}]},
            }],
        },
    });
    if task.udp {
        let listeners = configuration.pointer_mut("/static_resources/listeners");
        let listeners = listeners.and_then(serde_json::Value::as_array_mut).expect("it is written above");
        listeners.push(envoy_udp(task.listen));
    }
    format!("{configuration:#}\n")
}

/// Sessions, datagrams taken in as they come (GRO) on both sides.
fn envoy_udp(listen: SocketAddr) -> serde_json::Value {
    let udp = "type.googleapis.com/envoy.extensions.filters.udp.udp_proxy.v3";
    serde_json::json!({
        "name": "in-udp",
        "address": {"socket_address": {
            "protocol": "UDP", "address": listen.ip().to_string(), "port_value": listen.port(),
        }},
        // SOL_SOCKET, SO_RCVBUF
        "socket_options": [{"level": 1, "name": 8, "int_value": UDP_QUEUE_BYTES, "state": "STATE_PREBIND"}],
        "udp_listener_config": {"downstream_socket_config": {"prefer_gro": true}},
        "listener_filters": [{
            "name": "envoy.filters.udp_listener.udp_proxy",
            "typed_config": {
                "@type": format!("{udp}.UdpProxyConfig"),
                "stat_prefix": "in-udp",
                "idle_timeout": "60s",
                "upstream_socket_config": {"prefer_gro": true},
                "matcher": {"on_no_match": {"action": {
                    "name": "route",
                    "typed_config": {"@type": format!("{udp}.Route"), "cluster": "out"},
                }}},
            },
        }],
    })
}

fn candidates(proxy: Proxy, name: &str) -> Vec<PathBuf> {
    let beside =
        std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_owned)).unwrap_or_default();
    let named = |variable| std::env::var_os(variable).map(PathBuf::from);
    match proxy {
        Proxy::Trimtab => return vec![named("TRIMTAB_BIN").unwrap_or_else(|| beside.join(name))],
        Proxy::Before => return named("TRIMTAB_BEFORE").into_iter().collect(),
        Proxy::Floor => return std::env::current_exe().into_iter().collect(),
        _ => {}
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    let mut found: Vec<PathBuf> = folders.into_iter().map(|folder| folder.join(name)).collect();
    if proxy == Proxy::Envoy {
        // The wheel's own program rather than its Python wrapper: a wrapper would be measured with it.
        let venv = beside.join("../venv/lib");
        let pythons = fs::read_dir(venv).into_iter().flatten().flatten().map(|e| e.path());
        found.splice(0..0, pythons.map(|python| python.join("site-packages/envoy/_bin/envoy")));
    }
    found
}

/// The first line with a digit of what a program says about its version.
fn version(program: &Path, flag: &str) -> String {
    let Ok(said) = Command::new(program).arg(flag).stdin(Stdio::null()).output() else {
        return "unknown".to_owned();
    };
    let said = [said.stdout, said.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let line = said.lines().find(|l| l.contains(|c: char| c.is_ascii_digit())).unwrap_or("unknown");
    // Envoy says `…/envoy  version: commit/version/state/kind/library`.
    match line.split_once("envoy  version: ") {
        Some((_, rest)) => format!("Envoy {}", rest.split('/').nth(1).unwrap_or(rest)),
        None => line.trim().to_owned(),
    }
}

/// Waits until somebody accepts at `listen`, for as long as the process lives.
pub(crate) fn wait_until_it_accepts(tree: &mut ProcessTree, listen: SocketAddr) -> io::Result<()> {
    let deadline = Instant::now() + READY;
    loop {
        tree.check()?;
        match TcpStream::connect_timeout(&listen, Duration::from_secs(1)) {
            Ok(_) => return Ok(()),
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => {
                let said = tree.last_words();
                return Err(io::Error::other(format!(
                    "it does not accept at {listen}: {error}; it said: {said}"
                )));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(bulk: bool) -> Task {
        let backends = vec!["127.0.0.1:2".parse().unwrap(), "127.0.0.2:3".parse().unwrap()];
        Task { listen: "127.0.0.1:1".parse().unwrap(), backends, bulk, udp: false, workers: 1 }
    }

    #[test]
    fn udp_is_set_up_where_it_is_asked_for() {
        for proxy in Proxy::ALL.into_iter().filter(|p| p.is_peer() || *p == Proxy::Trimtab) {
            let text = |udp| {
                let setup = setup(proxy, &Task { udp, ..task(false) });
                setup.file.map_or_else(|| setup.arguments.join(" "), |(_, content)| content)
            };
            let asked = text(true) != text(false) && text(true).to_lowercase().contains("udp");
            assert_eq!(asked, proxy.carries(Case::Udp64), "{proxy}");
        }
    }

    #[test]
    fn every_setup_has_all_addresses() {
        for proxy in Proxy::ALL.into_iter().filter(|p| *p != Proxy::Direct) {
            let setup = setup(proxy, &task(false));
            let text = setup.file.map_or_else(|| setup.arguments.join(" "), |(_, content)| content);
            let parts = if proxy == Proxy::Envoy {
                ["127.0.0.1", "127.0.0.2", "port_value"]
            } else {
                ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.2:3"]
            };
            assert!(parts.iter().all(|part| text.contains(part)), "{proxy}: {text}");
        }
    }

    #[test]
    fn only_bulk_is_set_up_for_bulk() {
        assert!(haproxy(&task(true)).contains("splice-auto") && !haproxy(&task(false)).contains("splice"));
        assert!(nginx(&task(true)).contains("proxy_buffer_size 64k") && nginx(&task(false)).contains("16k"));
    }
}
