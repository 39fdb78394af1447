//! The balancer's configuration: one TOML file, parsed once into values that cannot be wrong.
//!
//! Owns: the keys, their defaults, and what may stand together. Every problem of a file is found in one pass, each with
//! its line, its column and what to write instead; nothing is bound before a file is clean.
//! Does not own: how TOML is read (module `reader`), what the values do.
//!
//! The annotated example of every key is `deploy/trimtab.example.toml`; a test keeps the two together.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use allocation::{Policy, PoolName};
use flow::preface::Route;
use flow::preface::proxy::Version;
use registry::{PoolConfig, Requirements};
use toml::Spanned;
use toml::de::DeTable;

use crate::problem::{Problem, nearest};
use crate::units::{ListenAddress, Transport, parse_address, parse_duration};
use reader::{Reader, Section, boolean, decimal, integer, text};

mod check;
mod dns;
mod limits;
mod notices;
mod pool;
mod provider;
mod pull;
mod reader;
mod routing;
mod security;
mod tcp;
mod udp;
mod upstream;

pub use notices::NoticesConfig;
pub use upstream::UpstreamConfig;

pub use dns::{DnsConfig, DnsServiceConfig, ServiceAt};

/// Where control listens unless told otherwise; the admin commands and agents look there too.
pub const CONTROL_LISTEN_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7400);
/// Where metrics, probes and status are served unless told otherwise.
pub const HTTP_LISTEN_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7480);
/// How long flows may go on after a SIGTERM unless told otherwise: what systemd and Kubernetes wait before they kill.
pub const DRAIN_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// What one buffer ring can hold.
const BUFFERS_MAX: u64 = 32_768;
/// A ring and a thread each; more than any machine has cores.
const WORKERS_MAX: u64 = 1024;
/// What the dataplane keeps for each flow; each costs a connect timeout, and the client has long gone by then.
const CONNECT_RETRIES_MAX: u64 = 7;

/// What `serve` runs with.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// gRPC: registration and administration.
    pub control: EndpointConfig,
    /// Executing utilization scripts.
    pub pull: control::PullConfig,
    /// Who may join, and how control proves who it is.
    pub security: control::SecurityConfig,
    /// Metrics and probes.
    pub http: EndpointConfig,
    /// Moving bytes.
    pub dataplane: DataplaneConfig,
    /// A sample of selections, for later looks.
    pub decisions: DecisionsConfig,
    /// A line for each flow; `None`: there is none.
    pub access_log: Option<dataplane::AccessLogConfig>,
    /// What resources are told when the balancer goes away.
    pub notices: NoticesConfig,
    /// The file that outlives the process; `None`: nothing does.
    pub store: Option<PathBuf>,
    /// At least one.
    pub pools: Vec<PoolConfig>,
    /// How the resources of each pool are connected to, in the order of `pools`.
    pub connecting: Vec<dataplane::Connecting>,
    /// How the flows of each pool are limited and kept together, in the order of `pools`.
    pub pool_knobs: Vec<dataplane::PoolKnobs>,
    /// How the resources of each pool are checked actively, if they are, in the order of `pools`.
    pub checks: Vec<Option<checks::CheckConfig>>,
    /// At least one, each of a pool in `pools`.
    pub listeners: Vec<ListenerConfig>,
    /// Balancers that this one is a resource of.
    pub upstreams: Vec<UpstreamConfig>,
    /// Orchestration layers whose resources join by themselves.
    pub providers: Vec<control::ProviderConfig>,
    /// Where the balancer publishes itself.
    pub dns: Vec<DnsConfig>,
}

/// `[control]` or `[http]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointConfig {
    /// Where it listens; port 0 takes any free port.
    pub listen: SocketAddr,
    /// Whether the operator accepts clear text beyond loopback.
    pub insecure: bool,
}

/// `[dataplane]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataplaneConfig {
    /// Worker threads; 0: one per core.
    pub workers: usize,
    /// What moves the bytes.
    pub engine: Engine,
    /// Most flows open at once; 0: from the descriptor limit.
    pub flows_max: u32,
    /// Receive buffers of each worker; 0: two for each flow.
    pub buffers_max: u32,
    /// Further backends to try after a failed connect.
    pub connect_retries: u8,
    /// How long a connect to a backend may take.
    pub connect_timeout: Duration,
    /// How long a client may take for what it sends first, where a listener reads it.
    pub preface_timeout: Duration,
    /// How long a flow may be silent; `None`: for ever.
    pub idle_timeout: Option<Duration>,
    /// Silence after which TCP keepalive probes a peer; `None`: never.
    pub keepalive: Option<Duration>,
    /// How long flows may go on after a SIGTERM.
    pub drain_timeout: Duration,
    /// Addresses to connect to backends from, in turn; empty: as the kernel routes.
    pub source_addresses: Vec<IpAddr>,
}

impl Default for DataplaneConfig {
    fn default() -> Self {
        Self {
            workers: 0,
            engine: Engine::Auto,
            flows_max: 0,
            buffers_max: 0,
            connect_retries: 2,
            connect_timeout: Duration::from_secs(5),
            preface_timeout: Duration::from_secs(5),
            idle_timeout: Some(Duration::from_secs(3600)),
            keepalive: Some(Duration::from_secs(60)),
            drain_timeout: DRAIN_TIMEOUT_DEFAULT,
            source_addresses: Vec::new(),
        }
    }
}

/// What moves the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// The best that works here.
    #[default]
    Auto,
    /// This one, or refuse to start.
    Named(dataplane::Engine),
}

impl Engine {
    /// The one that was named.
    pub const fn named(self) -> Option<dataplane::Engine> {
        match self {
            Self::Auto => None,
            Self::Named(engine) => Some(engine),
        }
    }
}

impl FromStr for Engine {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let named = dataplane::Engine::ALL.into_iter().find(|engine| engine.name() == text);
        named.map(Self::Named).ok_or_else(|| {
            let names = dataplane::Engine::ALL.map(|engine| format!("\"{engine}\"")).join(", ");
            Problem::new(format!("there is no engine {text:?}"), format!("write \"auto\" or one of {names}"))
        })
    }
}

/// `[decisions]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DecisionsConfig {
    /// Where the sample is written; `None`: nowhere.
    pub log: Option<control::DecisionLog>,
    /// The part of selections that is written, 0 to 1.
    pub sample: f64,
}

/// `[[listener]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerConfig {
    /// Where flows are accepted.
    pub bind: ListenAddress,
    /// The last port of a range that begins with that of `bind`.
    pub last_port: Option<u16>,
    /// What every connection begins with, and from whom.
    pub proxy_protocol: Option<dataplane::ProxyProtocol>,
    /// Which flows go to another pool, in order.
    pub routes: Vec<Route>,
    /// The pools that routes name beside `pool`: target 1 and on.
    pub further: Vec<PoolName>,
    /// Who gets what no route takes.
    pub pool: PoolName,
    /// What a resource must meet beyond the pool's own requirement.
    pub requires: Requirements,
    /// How TCP behaves towards clients.
    pub tcp: dataplane::ListenerTcp,
    /// How many flows it takes, and how fast.
    pub limits: dataplane::ListenerLimits,
    /// How flows are kept; of listeners of datagrams.
    pub udp: dataplane::UdpConfig,
}

/// One problem of a configuration file, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub hint: String,
}

/// Every problem of a configuration file, by place. The operator's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration has {} errors", .0.len())]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl ConfigErrors {
    /// `FILE:LINE:COL: error: …` and a hint for each, as compilers do: editors jump to it.
    pub fn render(&self, file: &str) -> String {
        let mut out = String::new();
        for ConfigError { line, column, message, hint } in &self.0 {
            let _ = writeln!(out, "{file}:{line}:{column}: error: {message}\n  hint: {hint}");
        }
        out
    }
}

impl ListenerConfig {
    /// The pools that its flows go to, the default one first.
    pub fn pools(&self) -> impl Iterator<Item = &PoolName> {
        std::iter::once(&self.pool).chain(&self.further)
    }
}

impl Config {
    /// Parses a file's bytes.
    ///
    /// # Errors
    /// Every problem at once.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigErrors> {
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let valid = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
                let (line, column) = reader::place(&valid, valid.len());
                let (message, hint) = ("this is not UTF-8 text".into(), "save the file as UTF-8".into());
                return Err(ConfigErrors(vec![ConfigError { line, column, message, hint }]));
            }
        };
        let (document, syntax_errors) = DeTable::parse_recoverable(text);
        let mut reader = Reader::new(text, &syntax_errors);
        let config = Self::read(&mut reader, document.get_ref());
        let errors = reader.into_errors();
        match config {
            Some(config) if errors.is_empty() => Ok(config),
            _ => Err(ConfigErrors(errors)),
        }
    }

    /// The place of the table that serves a listener, among those of one of its pools: the pool's own comes first.
    pub fn table_of(&self, pool: &PoolName, listener: &ListenerConfig) -> usize {
        let pool = self.pools.iter().find(|known| known.name == *pool);
        let place =
            pool.and_then(|pool| pool.tables.iter().position(|requires| *requires == listener.requires));
        place.map_or(0, |place| place + 1)
    }

    /// `None` when something that has no default is missing or wrong.
    fn read<'t>(reader: &mut Reader<'t>, table: &'t DeTable<'t>) -> Option<Self> {
        let broken = reader.is_broken();
        let mut root = reader.root(table);
        let mut bound = Bound::default();
        let mut control = root.section("control");
        let pull = pull::read(control.section("pull"));
        let security = security::read(&mut control);
        let clear = if security.has_tls { ClearText::No } else { ClearText::OrTls };
        let control = read_endpoint(control, CONTROL_LISTEN_DEFAULT, clear, &[], &mut bound);
        let http =
            read_endpoint(root.section("http"), HTTP_LISTEN_DEFAULT, ClearText::Always, &["tls"], &mut bound);
        let dataplane = read_dataplane(root.section("dataplane"));
        let decisions = read_decisions(root.section("decisions"));
        let notices = notices::read(&mut root);
        let store = read_store(root.section("store"));
        let access_log = limits::access_log(root.section("access_log"));
        let (pools, told) = pool::read(&mut root).unzip();
        let known = pools.as_deref().filter(|_| !broken);
        let told: Option<Vec<pool::Told>> = told;
        let v1 = pool::with_header_of(Version::V1, known, told.as_deref());
        let listeners = read_listeners(&mut root, known, &v1, &mut bound);
        let upstreams = upstream::read(&mut root, listeners.as_deref().filter(|_| !broken));
        let providers = provider::read(&mut root, known);
        let dns = dns::read(&mut root, listeners.as_deref());
        for (at, pool) in security.named {
            if let Some(problem) = known.and_then(|known| unknown_pool("control.peer.pools", &pool, known)) {
                root.reader().report(at, problem);
            }
        }
        let both = pools.zip(listeners).map(|(mut pools, listeners)| {
            pool::add_tables(&mut pools, &listeners);
            (pools, listeners)
        });
        if let Some(problem) = both.as_ref().and_then(|(pools, _)| pool::too_many_tables(pools)) {
            root.reader().report(0, problem);
        }
        root.finish(&[]);
        let (pools, listeners) = both?;
        let (told, checks): (Vec<_>, _) = told?.into_iter().unzip();
        let (connecting, pool_knobs) = told.into_iter().unzip();
        Some(Self {
            control,
            security: security.config,
            pull,
            http,
            dataplane,
            decisions,
            access_log,
            notices,
            store,
            pools,
            connecting,
            pool_knobs,
            checks,
            listeners,
            upstreams,
            providers,
            dns: dns?,
        })
    }
}

/// Addresses that the file gave to something, and where.
#[derive(Default)]
struct Bound(HashMap<(Transport, SocketAddr), (String, usize)>);

impl Bound {
    /// Gives the address to `owner`, or reports who has it. Port 0 is a free port each time.
    fn claim(&mut self, reader: &mut Reader<'_>, owner: &str, claimed: ListenAddress, at: usize) {
        let ListenAddress { transport, address } = claimed;
        if address.port() == 0 {
            return;
        }
        match self.0.get(&(transport, address)) {
            Some((other, line)) => {
                let hint = format!("`{other}` has it (line {line}); give one of them another port");
                reader.report(at, Problem::new(format!("`{owner}`: {address} is taken already"), hint));
            }
            None => {
                let line = reader.line(at);
                self.0.insert((transport, address), (owner.to_owned(), line));
            }
        }
    }
}

/// What an endpoint speaks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ClearText {
    /// TLS.
    No,
    /// Clear text, as it has no TLS.
    OrTls,
    /// Nothing else.
    Always,
}

/// `[control]` and `[http]` share these keys; they differ in their defaults.
fn read_endpoint(
    mut section: Section<'_, '_>,
    default: SocketAddr,
    clear: ClearText,
    later: &[&str],
    bound: &mut Bound,
) -> EndpointConfig {
    let name = section.path().to_owned();
    let insecure = section.value("insecure", boolean).is_some_and(Spanned::into_inner);
    let listen = section.value("listen", text(parse_address));
    let address = listen.as_ref().map_or(default, |listen| *listen.get_ref());
    if let Some(listen) = listen {
        let at = listen.span().start;
        let owner = format!("{name}.listen");
        if !address.ip().is_loopback() && !insecure && clear != ClearText::No {
            let or_tls =
                if clear == ClearText::OrTls { ", give it certificates in [control.tls]" } else { "" };
            let problem = Problem::new(
                format!("`{owner}`: {address} is open to other hosts, in clear text and to anyone"),
                format!(
                    "write \"127.0.0.1:{}\"{or_tls}, or add insecure = true to [{name}] if the network is trusted",
                    address.port()
                ),
            );
            section.reader().report(at, problem);
        }
        bound.claim(section.reader(), &owner, ListenAddress { transport: Transport::Tcp, address }, at);
    }
    section.finish(later);
    EndpointConfig { listen: address, insecure }
}

fn read_dataplane(mut section: Section<'_, '_>) -> DataplaneConfig {
    let default = DataplaneConfig::default();
    let read = DataplaneConfig {
        workers: or(section.value("workers", integer(0..=WORKERS_MAX)), default.workers),
        engine: or(section.value("engine", text(Engine::from_str)), default.engine),
        flows_max: or(section.value("flows_max", integer(0..=u64::from(u32::MAX))), default.flows_max),
        buffers_max: or(section.value("buffers_max", integer(0..=BUFFERS_MAX)), default.buffers_max),
        connect_retries: or(
            section.value("connect_retries", integer(0..=CONNECT_RETRIES_MAX)),
            default.connect_retries,
        ),
        connect_timeout: or(section.value("connect_timeout", text(above_zero)), default.connect_timeout),
        preface_timeout: or(section.value("preface_timeout", text(above_zero)), default.preface_timeout),
        idle_timeout: or(section.value("idle_timeout", text(zero_disables)), default.idle_timeout),
        keepalive: or(section.value("keepalive", text(keepalive)), default.keepalive),
        drain_timeout: or(section.value("drain_timeout", text(parse_duration)), default.drain_timeout),
        source_addresses: tcp::source_addresses(&mut section),
    };
    section.finish(&[]);
    read
}

fn read_decisions(mut section: Section<'_, '_>) -> DecisionsConfig {
    let log = section.value("log", text(decision_log)).and_then(Spanned::into_inner);
    let sample = or(section.value("sample", decimal(0.0..=1.0)), 0.01);
    section.finish(&[]);
    DecisionsConfig { sample: if log.is_some() { sample } else { 0.0 }, log }
}

fn read_store(mut section: Section<'_, '_>) -> Option<PathBuf> {
    let path = section.value("path", text(store_path)).and_then(Spanned::into_inner);
    section.finish(&[]);
    path
}

fn store_path(text: &str) -> Result<Option<PathBuf>, Problem> {
    match text {
        "" => Ok(None),
        folder if folder.ends_with('/') => Err(Problem::new(
            format!("{folder:?} is a folder"),
            format!("name a file in it: \"{folder}trimtab.db\""),
        )),
        path => Ok(Some(path.into())),
    }
}

fn decision_log(text: &str) -> Result<Option<control::DecisionLog>, Problem> {
    Ok(match text {
        "" => None,
        "-" => Some(control::DecisionLog::Stdout),
        path => Some(control::DecisionLog::File(path.into())),
    })
}

/// An address of this host, without a port.
fn parse_source_address(text: &str) -> Result<IpAddr, Problem> {
    let hint = "write addresses of this host without a port: [\"10.0.0.9\", \"10.0.0.10\"]";
    match text.parse::<IpAddr>() {
        Ok(address) if address.is_unspecified() => {
            Err(Problem::new(format!("{address} stands for any address, not for one"), hint))
        }
        Ok(address) => Ok(address),
        Err(_) => Err(Problem::new(format!("{text:?} is not an IP address"), hint)),
    }
}

/// The listeners, or `None` when one has no usable address or pool. `pools` is `None` when they are not all known; `v1` are those
/// whose resources are sent a header of version 1.
fn read_listeners(
    root: &mut Section<'_, '_>,
    pools: Option<&[PoolConfig]>,
    v1: &[&PoolName],
    bound: &mut Bound,
) -> Option<Vec<ListenerConfig>> {
    let mut listeners = Some(Vec::new());
    let mut any = false;
    let all = root.list("listener", |mut section| {
        any = true;
        let bind = section.required("bind", "\"tcp://0.0.0.0:5432\"", text(routing::bind));
        let pool = section.required("pool", "\"sql\"", text(pool_name));
        let requires = pool::requirements(&mut section);
        let tcp = tcp::read_listener(section.section("tcp"));
        let limits = limits::of_listener(section.section("limits"));
        let is_udp = bind.as_ref().map(|bind| bind.get_ref().address.transport == Transport::Udp);
        if is_udp == Some(true) {
            udp::refuse_what_is_of_tcp(&mut section);
        }
        let proxy_protocol = routing::proxy_protocol(&mut section, is_udp == Some(true));
        let speaks_proxy = section.has("proxy_protocol");
        let udp = udp::read(section.section("udp"), is_udp, speaks_proxy);
        if let Some(bind) = &bind {
            for address in bind.get_ref().addresses() {
                bound.claim(section.reader(), "listener.bind", address, bind.span().start);
            }
        }
        if let (Some(pool), Some(pools)) = (&pool, pools)
            && let Some(problem) = unknown_pool("listener.pool", pool.get_ref(), pools)
        {
            section.reader().report(pool.span().start, problem);
        }
        let at = bind.as_ref().map(|bind| *bind.get_ref());
        let without_datagrams = if is_udp == Some(true) { v1 } else { &[] };
        if let Some(pool) = &pool
            && let Some(problem) = routing::no_datagrams("listener.pool", pool.get_ref(), without_datagrams)
        {
            section.reader().report(pool.span().start, problem);
        }
        let own = pool.as_ref().map(Spanned::get_ref);
        let routes = routing::routes(&mut section, at, own, pools, without_datagrams);
        match (at, pool, routes, &mut listeners) {
            (Some(bind), Some(pool), Some((routes, further)), Some(listeners)) => {
                listeners.push(ListenerConfig {
                    bind: bind.address,
                    last_port: bind.last_port,
                    proxy_protocol,
                    routes,
                    further,
                    pool: pool.into_inner(),
                    requires,
                    tcp,
                    limits,
                    udp,
                });
            }
            _ => listeners = None,
        }
        section.finish(&["tls"]);
    });
    if !any && all && !root.reader().is_broken() {
        let hint =
            "add [[pool]] with a name, and [[listener]] with bind = \"tcp://0.0.0.0:5432\" and that pool";
        root.reader().report(0, Problem::new("there is no listener, so nothing would be balanced", hint));
    }
    listeners.filter(|_| all)
}

fn unknown_pool(key: &str, pool: &PoolName, pools: &[PoolConfig]) -> Option<Problem> {
    let names = || pools.iter().map(|known| known.name.as_str());
    if names().any(|name| name == pool.as_str()) {
        return None;
    }
    let hint = match nearest(pool.as_str(), names()) {
        Some(meant) => format!("did you mean \"{meant}\"?"),
        None => format!("add [[pool]] with name = \"{pool}\""),
    };
    Some(Problem::new(format!("`{key}`: there is no pool {:?}", pool.as_str()), hint))
}

fn or<T>(value: Option<Spanned<T>>, default: T) -> T {
    value.map_or(default, Spanned::into_inner)
}

fn pool_name(text: &str) -> Result<PoolName, Problem> {
    text.parse().map_err(|error: allocation::IdError| {
        Problem::new(format!("{text:?} is not a name: it {error}"), "write a short name, as \"sql\"")
    })
}

/// Parses the name of a policy; the command line takes the same ones.
///
/// # Errors
/// When there is none of that name.
pub fn parse_policy(text: &str) -> Result<Policy, Problem> {
    text.parse().map_err(|_| {
        let names: Vec<_> = Policy::ALL.iter().map(|policy| policy.name()).collect();
        let hint = match nearest(text, names.iter().copied()) {
            Some(meant) => format!("did you mean \"{meant}\"?"),
            None => format!("there are {}", names.join(", ")),
        };
        Problem::new(format!("there is no policy {text:?}"), hint)
    })
}

/// Parses a duration that may not be zero.
///
/// # Errors
/// When it is zero or no duration.
pub fn above_zero(text: &str) -> Result<Duration, Problem> {
    match parse_duration(text)? {
        Duration::ZERO => Err(Problem::new(format!("{text:?} leaves no time"), "write at least \"1ms\"")),
        duration => Ok(duration),
    }
}

/// Parses a duration of which zero means never.
///
/// # Errors
/// When it is no duration.
pub fn zero_disables(text: &str) -> Result<Option<Duration>, Problem> {
    parse_duration(text).map(|duration| (!duration.is_zero()).then_some(duration))
}

/// TCP keepalive counts in whole seconds.
fn keepalive(text: &str) -> Result<Option<Duration>, Problem> {
    match zero_disables(text)? {
        Some(duration) if duration.subsec_millis() != 0 => Err(Problem::new(
            format!("{text:?} is not in whole seconds"),
            "write \"60s\"; \"0s\" switches keepalive off",
        )),
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests;
