//! The command line: names, defaults and help. What the commands do is in their modules.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use allocation::{Policy, ResourceId};
use clap::builder::ArgPredicate;
use clap::{Args, Parser, Subcommand, ValueEnum};

pub use numbers::NumbersArgs;
pub use script::{ScriptArgs, read_mapping};

use crate::config::{Engine, above_zero, parse_policy, zero_disables};
use crate::problem::Problem;
use crate::transport::TransportArgs;
use crate::units::{ListenAddress, parse_address, parse_bandwidth, parse_duration};

pub mod notify;
mod numbers;
mod script;

const EXAMPLES: &str = "\
Try it:
  trimtab demo

Exit codes:
  0    done; after SIGTERM or SIGINT: drained
  1    the balancer answered no (no such resource or pool, …)
  64   the command line is wrong
  66   a file cannot be read
  69   the balancer does not answer
  70   a fault of trimtab itself: please report it
  71   the system refuses (address in use, io_uring denied, no permission)
  74   the output cannot be written
  78   the configuration file is wrong
  130  left at once at a second SIGINT; 143: at a second SIGTERM";

/// An L4 load balancer that nobody configures twice: resources register themselves, report how busy they are, and
/// get new connections by it.
#[derive(Debug, Parser)]
#[command(name = "trimtab", version, after_help = EXAMPLES, max_term_width = 110)]
pub struct Cli {
    /// What to say on stderr: error, warn, info, debug, trace, or by module: info,dataplane=debug.
    #[arg(
        long,
        global = true,
        help_heading = "Log",
        env = "RUST_LOG",
        default_value = "info",
        value_name = "LEVEL",
        hide_env_values = true
    )]
    pub log_level: String,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
#[allow(
    clippy::large_enum_variant,
    reason = "there is one, for as long as it takes to call a function with it"
)]
pub enum Command {
    /// Balance to addresses given here, without a configuration file or control.
    Proxy(ProxyArgs),
    /// Run the balancer. SIGTERM drains; a second one leaves now.
    Serve(ServeArgs),
    /// Say everything that is wrong with a configuration file (exit 78), and bind nothing.
    Check(CheckArgs),
    /// Run beside a resource: register it, report its host's utilization, deregister it at SIGTERM.
    Agent(Box<AgentArgs>),
    /// List the resources that are registered, and what they get.
    Resources(ResourcesArgs),
    /// List the pools.
    Pools(AdminArgs),
    /// Say why the next connection of a pool would go where, and why the last ones went where they went.
    Explain(ExplainArgs),
    /// Compare the versions of a pool that is split between versions, or set one's share.
    Versions(VersionsArgs),
    /// List the capabilities that operators entered, or set them for a resource, whether it has joined or not.
    Capabilities(CapabilitiesArgs),
    /// Give a resource no new connections; open ones end by themselves.
    Drain(ResourceArgs),
    /// End a drain.
    Ready(ResourceArgs),
    /// Tell resources something: that the balancer will be away, to shut down, to move connections away.
    Notify(notify::NotifyArgs),
    /// Execute a resource's utilization script now, and say what came of it.
    Pull(ResourceArgs),
    /// Register a resource that has no agent: the balancer fetches its utilization by a script.
    Register(RegisterArgs),
    /// Remove a resource.
    Deregister(ResourceArgs),
    /// Say how publishing in DNS goes: zone, server, state, and what is wrong.
    Dns(AdminArgs),
    /// Make, list or revoke bearer tokens, by which resources join and administrators come.
    Token(TokenArgs),
    /// Make a small CA and certificates for a first set-up.
    Pki(PkiArgs),
    /// Run a balancer, three services with agents and a gentle load on this machine; prints what to try.
    Demo(DemoArgs),
    /// One of the demo's services.
    #[command(hide = true)]
    DemoService(DemoServiceArgs),
}

/// `proxy`.
#[derive(Debug, Args)]
pub struct ProxyArgs {
    /// Where to accept: tcp://IP:PORT or udp://IP:PORT. Repeat it for more.
    #[arg(long, required = true, value_name = "tcp://IP:PORT")]
    pub listen: Vec<ListenAddress>,
    /// Where to connect: IP:PORT. Repeat it for more.
    #[arg(long, required = true, value_name = "IP:PORT", value_parser = parse_backend)]
    pub to: Vec<SocketAddr>,
    /// How a backend is chosen: adaptive, least-connections, p2c, peak-ewma, weighted-round-robin, round-robin, random, first,
    /// utilization, maglev. (Without reports, adaptive, weighted-round-robin and utilization know of no weights.)
    #[arg(long, default_value = "adaptive", value_parser = parse_policy)]
    pub policy: Policy,
    /// Worker threads; 0: one per core.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub workers: u16,
    /// What moves the bytes: auto (the best that works here), uring, tokio-uring, epoll.
    #[arg(long, default_value = "auto")]
    pub engine: Engine,
    /// Most connections open at once; 0: as many as the descriptor limit allows.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub flows_max: u32,
    /// How long one connect may take.
    #[arg(long, default_value = "5s", value_name = "TIME", value_parser = above_zero)]
    pub connect_timeout: Duration,
    /// End a connection after so much silence; 0s: never.
    #[arg(long, default_value = "1h", value_name = "TIME", value_parser = parse_zero_disables)]
    pub idle_timeout: ZeroDisables,
    /// End a flow of datagrams after so much silence.
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = above_zero)]
    pub udp_idle_timeout: Duration,
    /// Answers to one datagram, after which a flow of datagrams is over (DNS: 1); 0: nobody knows.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub udp_responses: u32,
    /// How long open connections may go on after SIGTERM.
    #[arg(long, default_value = "30s", value_name = "TIME", value_parser = parse_duration)]
    pub drain_timeout: Duration,
    /// Leave when stdin ends.
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// A duration of which `0s` means never. (clap would take a plain `Option` for an optional flag.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroDisables(pub Option<Duration>);

/// `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The configuration file; `trimtab check` says what is wrong with it.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
    /// Leave when stdin ends.
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The configuration file.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
}

/// `agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// The pool to join, by its name in the balancer's configuration.
    #[arg(long)]
    pub pool: String,
    /// Where the resource serves: IP:PORT, as the balancer reaches it.
    #[arg(long, value_name = "IP:PORT", value_parser = parse_backend)]
    pub address: SocketAddr,
    /// The balancer's control address: https://HOST:PORT, or http:// for clear text. Repeat it to register with several balancers; one that is
    /// away delays no other.
    #[arg(
        long,
        value_name = "URL",
        default_value = "http://127.0.0.1:7400",
        default_value_if("discover", ArgPredicate::IsPresent, None::<&str>),
        value_parser = parse_control
    )]
    pub balancer: Vec<String>,
    /// Find balancers in DNS: those that _trimtab._tcp.DOMAIN SRV names. Those of the lowest priority number are registered
    /// with, and the next when all of those are gone. Changes are noticed within the records' TTL.
    #[arg(long, value_name = "DOMAIN", value_parser = parse_domain)]
    pub discover: Option<discovery::Domain>,
    /// Ask this DNS server for --discover. [default: as /etc/resolv.conf says]
    #[arg(long, value_name = "IP:PORT", value_parser = parse_backend, requires = "discover")]
    pub dns: Option<SocketAddr>,
    /// The resource's identity, unique within the balancer. [default: host name and address]
    #[arg(long, value_parser = parse_id)]
    pub id: Option<ResourceId>,
    /// How often to report; 100ms to 1h.
    #[arg(long, default_value = "1s", value_name = "TIME", value_parser = parse_report_interval)]
    pub report_interval: Duration,
    /// Report this cgroup's utilization instead of the host's: /system.slice/postgresql.service.
    #[arg(long, value_name = "CGROUP")]
    pub cgroup: Option<PathBuf>,
    /// Read utilization from this JSON file at each report; what it has stands before what is measured.
    ///
    /// All keys: {"cpu": 0.95, "memory": 0.2, "utilization": {"swap": 0.1}, "application": 0.9,
    /// "operations_per_second": 120, "errors_per_second": 0, "named_metrics": {"operations": 81234},
    /// "labels": {"role": "writer"}, "in_flight": 12, "latency_ms": 3.5}. Its labels stand before those of --label, and
    /// a change of them is reported at once. in_flight and latency_ms are for --probe. Replace it by a rename.
    #[arg(long, value_name = "FILE")]
    pub utilization_file: Option<PathBuf>,
    /// Answer the balancer's probes (UDP) at this address of this host: how many connections the service has now, and
    /// how long it takes. The policy `prequal` asks for single connections.
    ///
    /// Connections are those that the kernel has established to --address, unless the utilization file has in_flight;
    /// the time is that of connecting there, unless it has latency_ms. Open the port to the balancers alone.
    #[arg(long, value_name = "IP:PORT", value_parser = parse_backend)]
    pub probe: Option<SocketAddr>,
    /// Run this command (by /bin/sh) at each notice of a balancer, with the notice as JSON on its standard input; at most 30s.
    #[arg(long, value_name = "COMMAND")]
    pub on_notice: Option<String>,
    /// Have notices posted to this URL as well, as CloudEvents 1.0 (structured JSON).
    #[arg(long, value_name = "URL", default_value = "", hide_default_value = true)]
    pub notify_url: String,
    /// The network's capacity in bits a second: 100M, 1G. [default: what the interface says]
    #[arg(long, value_name = "BITS", value_parser = parse_bandwidth)]
    pub bandwidth: Option<u64>,
    /// What a gigabyte of traffic costs here, in any currency that the resources of a pool share.
    #[arg(long, value_name = "COST", value_parser = parse_cost)]
    pub bandwidth_cost: Option<f64>,
    /// What the resource is or can do: KEY=VALUE, or KEY for KEY=true. Repeat it for more.
    #[arg(long, value_name = "KEY[=VALUE]", value_parser = parse_label)]
    pub label: Vec<(String, String)>,
    /// The version of the service, for people and for requirements.
    #[arg(long, value_name = "VERSION", default_value = "", hide_default_value = true)]
    pub version_of_service: String,
    /// Most connections that it takes from one balancer at once; 0: no limit.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub flows_max: u32,
    /// What it can bear, compared with the others of its pool, before its reports say so. Above 0, up to 1000.
    #[arg(long, default_value_t = 1.0, value_name = "N", value_parser = parse_weight)]
    pub weight: f64,
    /// How the balancers are reached, and what they are shown.
    #[command(flatten)]
    pub transport: TransportArgs,
    /// Do not check that the service answers at its address.
    #[arg(long)]
    pub no_check: bool,
    /// The service's own numbers, and whom they are served to.
    #[command(flatten)]
    pub numbers: NumbersArgs,
    /// Have the balancer fetch the utilization; the agent then says only whether the service answers.
    #[command(flatten)]
    pub script: ScriptArgs,
    /// Leave when stdin ends.
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// `register`.
#[derive(Debug, Args)]
pub struct RegisterArgs {
    /// The pool to join, by its name in the balancer's configuration.
    #[arg(long)]
    pub pool: String,
    /// Where the resource serves: IP:PORT, as the balancer reaches it.
    #[arg(long, value_name = "IP:PORT", value_parser = parse_backend)]
    pub address: SocketAddr,
    /// The resource's identity, unique within the balancer. [default: host name and address]
    #[arg(long, value_parser = parse_id)]
    pub id: Option<ResourceId>,
    /// What the resource is or can do: KEY=VALUE, or KEY for KEY=true. Repeat it for more.
    #[arg(long, value_name = "KEY[=VALUE]", value_parser = parse_label)]
    pub label: Vec<(String, String)>,
    /// The version of the service, for people and for requirements.
    #[arg(long, value_name = "VERSION", default_value = "", hide_default_value = true)]
    pub version_of_service: String,
    /// Most connections that it takes from one balancer at once; 0: no limit.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub flows_max: u32,
    /// What it can bear, compared with the others of its pool, before any report says so. Above 0, up to 1000.
    #[arg(long, default_value_t = 1.0, value_name = "N", value_parser = parse_weight)]
    pub weight: f64,
    /// Have notices posted to this URL, as CloudEvents 1.0 (structured JSON).
    #[arg(long, value_name = "URL", default_value = "", hide_default_value = true)]
    pub notify_url: String,
    /// How its utilization is fetched.
    #[command(flatten)]
    pub script: ScriptArgs,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// What all commands that ask a balancer take.
#[derive(Debug, Args)]
pub struct AdminArgs {
    /// The balancer's control address.
    #[arg(
        long,
        env = "TRIMTAB_CONTROL",
        default_value = "http://127.0.0.1:7400",
        value_name = "URL",
        value_parser = parse_control
    )]
    pub control: String,
    /// How it is reached, and what it is shown.
    #[command(flatten)]
    pub transport: TransportArgs,
    /// For people or for scripts.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Aligned columns.
    Table,
    /// One JSON document with stable keys.
    Json,
}

/// `resources`.
#[derive(Debug, Args)]
pub struct ResourcesArgs {
    /// Only this pool.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub pool: String,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The pool.
    pub pool: String,
    /// For a connection of this client.
    #[arg(long, value_name = "IP")]
    pub client: Option<std::net::IpAddr>,
    /// For a connection that requires this, as a listener of the pool does: role=writer, tls, version>=2. Repeat it for more.
    #[arg(long, value_name = "REQUIREMENT")]
    pub requires: Vec<String>,
    /// Show so many of the last selections as well.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub last: u32,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `versions`.
#[derive(Debug, Args)]
pub struct VersionsArgs {
    /// The pool.
    pub pool: String,
    /// Give a version this share of new connections: VERSION=PERCENT%. It also ends its abort.
    #[arg(long, value_name = "VERSION=N%", value_parser = parse_share)]
    pub set: Option<(String, f64)>,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `capabilities`.
#[derive(Debug, Args)]
pub struct CapabilitiesArgs {
    /// The resource, by its id; without one, all are listed.
    pub id: Option<String>,
    /// Labels to set, KEY or KEY=VALUE; KEY=false takes away one that the resource has by itself.
    #[arg(value_parser = parse_label, requires = "id", value_name = "LABEL")]
    pub labels: Vec<(String, String)>,
    /// Labels that were set here and are to be removed again.
    #[arg(long, value_name = "KEY", requires = "id")]
    pub remove: Vec<String>,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `drain` and `ready`.
#[derive(Debug, Args)]
pub struct ResourceArgs {
    /// The resource, by its id.
    pub id: String,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// What to do with tokens.
    #[command(subcommand)]
    pub command: TokenCommand,
}

/// What to do with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make one, and print it: once, for nobody keeps it.
    Create(TokenCreateArgs),
    /// List them, without their secrets.
    List(AdminArgs),
    /// Take one back: what joined by it may not report any more.
    Revoke(TokenRevokeArgs),
}

/// `token create`.
#[derive(Debug, Args)]
pub struct TokenCreateArgs {
    /// A pool that a resource may join by it. Repeat it for more.
    #[arg(long)]
    pub pool: Vec<String>,
    /// How long resources may join by it; what joined by then stays.
    #[arg(long, default_value = "1h", value_name = "TIME", value_parser = above_zero)]
    pub ttl: Duration,
    /// How many resources may join by it; 0: any number.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub uses: u32,
    /// A network whose addresses a resource may register though it does not connect from them. Repeat it for more.
    #[arg(long, value_name = "CIDR")]
    pub address: Vec<String>,
    /// What its holder may be: resource or admin.
    #[arg(long, default_value = "resource", value_name = "ROLE", value_parser = ["resource", "admin"])]
    pub role: String,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `token revoke`.
#[derive(Debug, Args)]
pub struct TokenRevokeArgs {
    /// The token, by its id: the 12 digits that `token list` shows, and that stand second in the token.
    pub id: String,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `pki`.
#[derive(Debug, Args)]
pub struct PkiArgs {
    /// What to make.
    #[command(subcommand)]
    pub command: PkiCommand,
}

/// What `pki` makes.
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make a CA: ca.pem, for everybody, and ca.key, for nobody but who signs with it.
    Init(PkiInitArgs),
    /// Make a key and a certificate that the CA signs: NAME.pem and NAME.key.
    Issue(PkiIssueArgs),
}

/// `pki init`.
#[derive(Debug, Args)]
pub struct PkiInitArgs {
    /// The folder; it is made if it is not there.
    #[arg(long, value_name = "FOLDER")]
    pub dir: PathBuf,
    /// What the CA is called, for people.
    #[arg(long, default_value = "trimtab CA")]
    pub name: String,
    /// For how many days it is valid.
    #[arg(long, default_value_t = 3650, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub days: u16,
    /// Replace what is there. What the old CA signed is worth nothing then.
    #[arg(long)]
    pub force: bool,
}

/// `pki issue`.
#[derive(Debug, Args)]
pub struct PkiIssueArgs {
    /// The folder with the CA.
    #[arg(long, value_name = "FOLDER")]
    pub dir: PathBuf,
    /// What its files are called.
    #[arg(long, value_parser = crate::pki::parse_name)]
    pub name: String,
    /// A DNS name of its holder. Repeat it for more.
    #[arg(long, value_name = "NAME")]
    pub dns: Vec<String>,
    /// An IP address of its holder. Repeat it for more.
    #[arg(long, value_name = "IP", value_parser = crate::pki::parse_ip)]
    pub ip: Vec<std::net::IpAddr>,
    /// A URI of its holder: spiffe://DOMAIN/PATH. Repeat it for more.
    #[arg(long, value_name = "URI")]
    pub uri: Vec<String>,
    /// For how many days it is valid.
    #[arg(long, default_value_t = 365, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub days: u16,
    /// For a client (an agent, an administrator) alone. [default: for clients and servers]
    #[arg(long, conflicts_with = "server")]
    pub client: bool,
    /// For a server (a balancer) alone.
    #[arg(long)]
    pub server: bool,
    /// Replace what is there.
    #[arg(long)]
    pub force: bool,
}

/// `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Make this service's machine busy for a while: red, green or blue.
    #[arg(long, value_name = "NAME", value_parser = ["red", "green", "blue"])]
    pub stress: Option<String>,
    /// How long it is busy, in seconds. It begins after 5 s.
    #[arg(long, default_value_t = 15, value_name = "N")]
    pub stress_seconds: u64,
    /// End by itself after so many seconds. [default: at Ctrl-C]
    #[arg(long, value_name = "N")]
    pub seconds: Option<u64>,
}

/// `demo-service`.
#[derive(Debug, Args)]
pub struct DemoServiceArgs {
    /// What it calls itself.
    pub name: String,
    /// Where it serves.
    pub address: SocketAddr,
    /// CPU time to burn for each line.
    #[arg(long, default_value = "1ms", value_name = "TIME", value_parser = parse_duration)]
    pub work: Duration,
    /// Where to write how busy it is, for its agent.
    #[arg(long, value_name = "FILE")]
    pub utilization_file: Option<PathBuf>,
    /// Take `busy` and `calm` from stdin, and leave when it ends.
    #[arg(long)]
    pub with_parent: bool,
}

fn parse_share(text: &str) -> Result<(String, f64), Problem> {
    let hint = "write VERSION=PERCENT%, as 2.0=10%";
    let parsed = text.rsplit_once('=').and_then(|(version, percent)| {
        let percent: f64 = percent.strip_suffix('%')?.parse().ok()?;
        (!version.is_empty() && (0.0..=100.0).contains(&percent))
            .then(|| (version.to_owned(), percent / 100.0))
    });
    parsed.ok_or_else(|| Problem::new(format!("{text:?} is not a version's share"), hint))
}

fn parse_zero_disables(text: &str) -> Result<ZeroDisables, Problem> {
    zero_disables(text).map(ZeroDisables)
}

fn parse_backend(text: &str) -> Result<SocketAddr, Problem> {
    let address = parse_address(text)?;
    if address.port() == 0 {
        return Err(Problem::new(
            format!("nothing can connect to port 0 of {text:?}"),
            "write the real port",
        ));
    }
    if address.ip().is_unspecified() {
        return Err(Problem::new(
            format!("{text:?} means every address of this host, not one to connect to"),
            "write the address that others reach it at",
        ));
    }
    Ok(address)
}

/// `https://host:port` or `http://host:port`; without a scheme, it is `http`.
pub(crate) fn parse_control(text: &str) -> Result<String, Problem> {
    let hint = "write https://HOST:PORT, or http://HOST:PORT as http://127.0.0.1:7400";
    let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
    let rest = rest.trim_end_matches('/');
    let port = rest.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then_some(port));
    let is_address = port.is_some_and(|port| port.parse::<u16>().is_ok_and(|port| port != 0));
    let url = format!("{scheme}://{rest}");
    if !matches!(scheme, "http" | "https")
        || !is_address
        || rest.contains(['/', '@', '?', '#'])
        || url.parse::<tonic::transport::Uri>().is_err()
    {
        return Err(Problem::new(format!("{text:?} is not a control address"), hint));
    }
    Ok(url)
}

fn parse_domain(text: &str) -> Result<discovery::Domain, Problem> {
    text.parse().map_err(|error| Problem::new(format!("{text:?} {error}"), "write a domain, as example.com"))
}

pub(crate) fn parse_id(text: &str) -> Result<ResourceId, Problem> {
    text.parse().map_err(|error| Problem::new(format!("{text:?} {error}"), "write a short name, as pg-1"))
}

pub(crate) fn parse_report_interval(text: &str) -> Result<Duration, Problem> {
    let interval = parse_duration(text)?;
    if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&interval) {
        return Err(Problem::new(format!("{text:?} is out of range"), "write 100ms to 1h"));
    }
    Ok(interval)
}

fn parse_cost(text: &str) -> Result<f64, Problem> {
    let cost = text.parse::<f64>().ok().filter(|cost| cost.is_finite() && *cost >= 0.0);
    cost.ok_or_else(|| Problem::new(format!("{text:?} is not a cost"), "write a number from 0 up, as 0.05"))
}

fn parse_weight(text: &str) -> Result<f64, Problem> {
    let weight = text.parse::<f64>().ok().filter(|weight| *weight > 0.0 && *weight <= 1000.0);
    weight
        .ok_or_else(|| Problem::new(format!("{text:?} is not a weight"), "write a number above 0 up to 1000"))
}

/// `KEY=VALUE`; `KEY` alone means `KEY=true`.
fn parse_label(text: &str) -> Result<(String, String), Problem> {
    let (key, value) = text.split_once('=').unwrap_or((text, "true"));
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '/' | '-');
    if (1..=64).contains(&key.len()) && key.chars().all(plain) && value.len() <= 256 {
        return Ok((key.into(), value.into()));
    }
    Err(Problem::new(
        format!("{text:?} is not a label"),
        "write KEY=VALUE or KEY: the key of up to 64 of A-Z a-z 0-9 . _ : / -, the value of up to 256 bytes",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DRAIN_TIMEOUT_DEFAULT;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let parsed =
            Cli::try_parse_from(["trimtab", "proxy", "--listen", "tcp://127.0.0.1:0", "--to", "127.0.0.1:1"]);
        let Ok(Cli { command: Command::Proxy(proxy), .. }) = parsed else { panic!("{parsed:?}") };
        assert_eq!(proxy.drain_timeout, DRAIN_TIMEOUT_DEFAULT);
        assert_eq!(proxy.idle_timeout.0, Some(Duration::from_secs(3600)));
    }

    #[test]
    fn control_addresses() {
        for (text, url) in [
            ("http://127.0.0.1:7400", "http://127.0.0.1:7400"),
            ("balancer.example:7400/", "http://balancer.example:7400"),
            ("[::1]:7400", "http://[::1]:7400"),
            ("https://a:7400", "https://a:7400"),
        ] {
            assert_eq!(parse_control(text).as_deref(), Ok(url), "{text}");
        }
        for text in [
            "",
            "127.0.0.1",
            "http://",
            ":7400",
            "http://a:0",
            "ftp://a:7400",
            "https://a",
            "http://a:7400/x",
            "a b:1",
            "::1:x",
        ] {
            assert!(parse_control(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_control_is_shown() {
        let agent = |flags: &[&str]| {
            let line = ["trimtab", "agent", "--pool", "sql", "--address", "10.0.0.1:5432"];
            Cli::try_parse_from(line.iter().chain(flags))
        };
        let full =
            agent(&["--ca", "ca", "--cert", "c", "--key", "k", "--server-name", "b", "--token-file", "t"]);
        let Ok(Cli { command: Command::Agent(full), .. }) = full else { panic!("{full:?}") };
        let transport = full.transport.transport();
        assert_eq!(transport.scheme(), "https");
        assert_eq!(transport.identity, Some(("c".into(), "k".into())));
        assert_eq!(transport.token, agent::TokenSource::File("t".into()));
        for half in [["--cert", "c"], ["--key", "k"]] {
            assert!(agent(&half).is_err(), "{half:?}");
        }
        // On the command line everybody could read it.
        assert!(agent(&["--token", "secret"]).is_err());
    }

    #[test]
    fn what_no_resource_can_have_is_refused() {
        for wrong in [
            ["--address", "0.0.0.0:5432"],
            ["--address", "10.0.0.1:0"],
            ["--weight", "NaN"],
            ["--weight", "0"],
            ["--report-interval", "10ms"],
            ["--label", "=value"],
            ["--label", "a key"],
            ["--label", ""],
            ["--probe", "0.0.0.0:7500"],
            ["--probe", "[::]:7500"],
            ["--probe", "10.0.0.1:0"],
            ["--probe", "7500"],
            ["--balancer", "10.0.0.9"],
            ["--bandwidth", "fast"],
            ["--bandwidth-cost", "nan"],
            ["--id", "a b"],
        ] {
            let mut line = vec!["trimtab", "agent", "--pool", "sql"];
            if wrong[0] != "--address" {
                line.extend(["--address", "10.0.0.1:5432"]);
            }
            line.extend(wrong);
            let error = Cli::try_parse_from(&line).expect_err(wrong[1]);
            assert_eq!(error.kind(), clap::error::ErrorKind::ValueValidation, "{wrong:?}");
        }
    }

    #[test]
    fn labels_and_balancers_and_where_probes_are_answered() {
        let agent = |flags: &[&str]| {
            let line = ["trimtab", "agent", "--pool", "sql", "--address", "10.0.0.1:5432"];
            let parsed = Cli::try_parse_from(line.iter().chain(flags));
            let Ok(Cli { command: Command::Agent(agent), .. }) = parsed else { panic!("{parsed:?}") };
            agent
        };
        let bare = agent(&[]);
        assert_eq!(bare.balancer, ["http://127.0.0.1:7400"]);
        assert_eq!(bare.probe, None);
        let flags =
            ["--balancer", "b1:7400", "--balancer", "http://b2:7400", "--label", "fts", "--label", "role="];
        let full = agent(&[&flags[..], &["--label", "zone=eu=1", "--probe", "10.0.0.1:7500"]].concat());
        assert_eq!(full.balancer, ["http://b1:7400", "http://b2:7400"]);
        let labels = [("fts", "true"), ("role", ""), ("zone", "eu=1")].map(|(k, v)| (k.into(), v.into()));
        assert_eq!(full.label, labels);
        assert_eq!(full.probe, Some(([10, 0, 0, 1], 7500).into()));
    }
}
