//! trimtab's control shell: gRPC services, the tick that rebuilds tables, metrics over HTTP.
//!
//! ```text
//! gRPC  RegistrationService, AdminService  -> registry::Registry       parsed at the first line of each handler
//! tick  Registry::expire, ::rebuild        -> allocation::Publisher    woken by changes and by the next deadline
//! HTTP  /metrics /livez /readyz            <- Registry, DataplaneView  read when asked
//! Checker  active checks of services       -> registry::Registry       rise, fall
//! Provider  an orchestrator's resources    -> registry::Registry       followed by its events
//! ```
//!
//! * It owns the sockets of control, the tick and the process's [`Phase`] as others see it. It does not own the
//!   dataplane, which it knows as an [`allocation::telemetry::DataplaneView`] only, and does not decide: that is
//!   `registry`.
//! * Everything a peer sends is bounded: connections, streams, messages, their size and rate, and how long someone may
//!   say nothing.
#![forbid(unsafe_code)]

mod admin;
mod beneath;
mod checker;
mod clock;
mod decision_log;
mod dns;
mod explain;
mod grpc;
mod guarded;
mod http;
mod keeper;
mod kept_tokens;
mod metrics;
mod notices;
mod offers;
mod parse;
mod prober;
mod provider;
mod pull;
mod registration;
mod remembered;
mod security;
mod tick;
mod token_calls;
pub mod tokens;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use allocation::Publisher;
use allocation::telemetry::DataplaneView;
use registry::{ConfigError, Limits, PoolConfig, Registry};
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot, watch};

use crate::beneath::Beneath;
use crate::checker::Checker;
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::notices::Notices;
use crate::security::{Security, Tls};

pub use crate::checker::CheckError;
pub use crate::notices::is_control_address;
pub use crate::notices::maintenance::{Maintenance, Schedule, ScheduleError};
pub use crate::notices::peers::Zone;
pub use crate::offers::Offers;
pub use crate::provider::{DockerConfig, DockerEndpoint, ProviderConfig, ProviderKind};
use crate::pull::Puller;
pub use crate::pull::{Allowed, NotAllowed, PullConfig};
use crate::remembered::Restored;
pub use crate::security::{
    IdPattern, PatternError, PeerLimits, PeerRule, Role, SanPattern, SecurityConfig, TlsConfig, TlsError,
    UnknownRole, parse_network,
};

/// Where the process is in its life. One for all of it: whoever changes it tells everyone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Sockets are bound; it does not accept flows yet.
    Starting,
    /// It accepts flows.
    Ready,
    /// It accepts none; open ones end by themselves until a deadline.
    Draining,
    /// All flows have ended, or the deadline has passed.
    Terminated,
}

impl Phase {
    /// Its name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Terminated => "terminated",
        }
    }
}

/// A pool, and where its tables go.
#[derive(Debug, Clone)]
pub struct Pool {
    /// How it allocates.
    pub config: PoolConfig,
    /// How its resources are checked actively; `None`: they are not.
    pub check: Option<checks::CheckConfig>,
    /// Where its tables are published: one for the pool's own requirement, then one for each of [`PoolConfig::tables`].
    pub publishers: Vec<Publisher>,
    /// The listeners that serve it, for people to read.
    pub listeners: Vec<String>,
}

/// Where the sample of selections is written, as JSON lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DecisionLog {
    /// Standard output.
    Stdout,
    /// A file, appended to.
    File(std::path::PathBuf),
}

/// What control is started with.
pub struct ControlConfig {
    /// Where gRPC is served.
    pub listen: SocketAddr,
    /// Where `/metrics`, `/livez` and `/readyz` are served.
    pub http: SocketAddr,
    /// Serve gRPC in clear text beyond loopback.
    pub insecure: bool,
    /// Who may join, by what, and how much one peer may do.
    pub security: SecurityConfig,
    /// The balancer's identity, new with every start of its process.
    pub balancer_id: String,
    /// The version of the program.
    pub version: String,
    /// Every pool there will be.
    pub pools: Vec<Pool>,
    /// The dataplane, as far as control sees it.
    pub dataplane: Arc<dyn DataplaneView>,
    /// The origin of the process's [`allocation::Timestamp`]s; the dataplane's must be the same.
    pub origin: Instant,
    /// Bounds of what is kept of resources.
    pub limits: Limits,
    /// Control addresses of the balancers that stand in for this one, where a notice names none.
    pub alternatives: Vec<String>,
    /// Where others are found that stand in for it, if [`ControlConfig::alternatives`] names none.
    pub zones: Vec<Zone>,
    /// Unavailability that comes by schedule.
    pub maintenance: Vec<Maintenance>,
    /// Where the sample of selections goes that the dataplane takes; `None`: nowhere.
    pub decision_log: Option<DecisionLog>,
    /// How utilization scripts are executed.
    pub pull: PullConfig,
    /// Orchestration layers whose resources join by themselves, each with another name.
    pub providers: Vec<ProviderConfig>,
    /// How publishing in DNS goes, to show it.
    pub dns: discovery::Statuses,
    /// What outlives this process; `None`: nothing does.
    pub store: Option<store::Store>,
}

/// Why control cannot start: the operator's to mend.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Clear text beyond loopback was not asked for.
    #[error(
        "control.listen {address} is not a loopback address: anyone who reaches it could register and drain resources. \
         Listen on 127.0.0.1 or [::1], give it certificates in [control.tls], or set control.insecure = true if the \
         network is trusted"
    )]
    Insecure {
        /// The address.
        address: SocketAddr,
    },
    /// Its certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The socket cannot be bound.
    #[error("{key} cannot listen on {address}: {source}. {}", bind_hint(source))]
    Bind {
        /// `control.listen` or `http.listen`.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The pools are no pools.
    #[error(transparent)]
    Pools(#[from] ConfigError),
    /// The authorities of utilization scripts cannot be read.
    #[error("control.pull.ca: {0}")]
    PullCa(#[from] fetch::CaError),
    /// The authorities of a check cannot be read.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// The decision log cannot be written.
    #[error("decisions.log cannot be opened at {}: {source}", path.display())]
    DecisionLog {
        /// Where.
        path: std::path::PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] store::OpenError),
    /// The kernel gives no thread for the store.
    #[error("the thread that writes the store cannot be started: {0}")]
    StoreThread(std::io::Error),
}

fn bind_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "Another process listens there (`ss -ltnp` says which): stop it, or take another port"
        }
        std::io::ErrorKind::AddrNotAvailable => "No interface of this host has that address",
        std::io::ErrorKind::PermissionDenied => {
            "Ports below 1024 need CAP_NET_BIND_SERVICE: take a higher one"
        }
        _ => "Check the address",
    }
}

/// Why control ended before it was told to: a fault of ours, or of the machine.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The gRPC server failed.
    #[error("the gRPC server failed: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// The kernel gave no thread for the tick.
    #[error("the thread that makes tables cannot be started: {0}")]
    Tick(#[from] std::io::Error),
}

/// What the parts of control share.
struct Shared {
    registry: Registry,
    security: Arc<Security>,
    clock: Clock,
    pools: Vec<Pool>,
    /// Draws for explanations: no flow follows from it.
    selector: std::sync::Mutex<allocation::Selector>,
    balancer_id: String,
    /// Something changed that a table may follow from.
    changed: Notify,
    metrics: Metrics,
    notices: Notices,
    beneath: Beneath,
    puller: Puller,
    checker: Checker,
    dataplane: Arc<dyn DataplaneView>,
    phase: watch::Receiver<Phase>,
    /// Ids that agents may not use.
    reserved: provider::Reserved,
    dns: discovery::Statuses,
    /// What is told to the store, if there is one.
    keeper: Option<keeper::Keeper>,
}

/// Control with its sockets bound, before it serves.
pub struct Control {
    config: ControlConfig,
    registry: Registry,
    tls: Option<Arc<Tls>>,
    grpc: TcpListener,
    http: TcpListener,
    grpc_address: SocketAddr,
    http_address: SocketAddr,
    decision_log: Option<decision_log::Writer>,
    offers: Option<oneshot::Sender<Offers>>,
    fetch_tls: fetch::Tls,
    clock: Clock,
    remembered: Restored,
    notices: notices::book::Book,
    checker: Checker,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("grpc", &self.grpc_address).field("http", &self.http_address).finish()
    }
}

impl Control {
    /// Binds both sockets, and takes back what the store remembers: who answers is in the published tables then.
    ///
    /// # Errors
    /// See [`StartError`]; nothing stays bound then.
    pub async fn bind(mut config: ControlConfig) -> Result<Self, StartError> {
        if !config.listen.ip().to_canonical().is_loopback() && config.security.tls.is_none() {
            if !config.insecure {
                return Err(StartError::Insecure { address: config.listen });
            }
            tracing::warn!(
                address = %config.listen,
                "control listens beyond loopback in clear text: anyone who reaches it can register and drain resources"
            );
        }
        let admins = |rule: &PeerRule| rule.role == Role::Admin;
        if config.security.tls.is_some() && !config.security.peers.iter().any(admins) {
            tracing::warn!(
                "no [[control.peer]] has role = \"admin\": nobody can administer this balancer or make tokens"
            );
        }
        let tls = config.security.tls.clone().map(Tls::load).transpose()?.map(Arc::new);
        let registry = Registry::new(registry::Config {
            pools: config.pools.iter().map(|pool| pool.config.clone()).collect(),
            limits: config.limits,
        })?;
        let clock = Clock::new(config.origin);
        let registry = registry.with_origin(clock.began());
        let decision_log = config.decision_log.clone().map(decision_log::Writer::open).transpose()?;
        let fetch_tls = config.pull.ca.as_deref().map(fetch::Tls::with_ca).transpose()?.unwrap_or_default();
        let checker = Checker::new(&config.pools)?;
        let (grpc, grpc_address) = bind("control.listen", config.listen).await?;
        let (http, http_address) = bind("http.listen", config.http).await?;
        let notices = notices::stored::restore(config.store.as_ref(), clock)?;
        let remembered = match config.store.take() {
            Some(store) => {
                remembered::restore(store, &registry, &config.pools, &checker, clock, &config.security)
                    .await?
            }
            None => Restored::default(),
        };
        Ok(Self {
            config,
            registry,
            tls,
            grpc,
            http,
            grpc_address,
            http_address,
            decision_log,
            offers: None,
            fetch_tls,
            clock,
            remembered,
            notices,
            checker,
        })
    }

    /// Where gRPC is served, with the port that was really bound.
    pub fn control_address(&self) -> SocketAddr {
        self.grpc_address
    }

    /// `https`, where gRPC is served with TLS, else `http`.
    pub fn control_scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Where HTTP is served, with the port that was really bound.
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// What the pools offer, from when it runs.
    pub fn offers(&mut self) -> oneshot::Receiver<Offers> {
        let (sender, receiver) = oneshot::channel();
        self.offers = Some(sender);
        receiver
    }

    /// Serves until the phase is [`Phase::Terminated`], or nobody is left to change it.
    ///
    /// # Errors
    /// See [`RunError`].
    pub async fn run(self, phase: watch::Receiver<Phase>) -> Result<(), RunError> {
        let scheme = self.control_scheme();
        let config = self.config;
        let clock = self.clock;
        let named = !config.alternatives.is_empty();
        let Restored { keeper, followed, tokens } = self.remembered;
        let shared = Arc::new(Shared {
            registry: self.registry,
            security: Arc::new(Security::new(config.security, self.tls, clock, tokens)),
            clock,
            notices: Notices::new(self.notices, &config.balancer_id, config.alternatives, clock),
            pools: config.pools,
            selector: std::sync::Mutex::new(allocation::Selector::new(0)),
            beneath: Beneath::default(),
            balancer_id: config.balancer_id,
            changed: Notify::new(),
            metrics: Metrics::new(&config.version),
            puller: Puller::new(config.pull, self.fetch_tls, vec![self.grpc_address, self.http_address]),
            checker: self.checker,
            dataplane: config.dataplane,
            phase: phase.clone(),
            reserved: provider::Reserved::of(&config.providers),
            dns: config.dns,
            keeper,
        });
        tick::start(Arc::clone(&shared))?;
        if let Some(offers) = self.offers {
            // Who asked may have gone.
            let _ = offers.send(Offers::new(Arc::clone(&shared)));
        }
        let http = tokio::spawn(http::serve(self.http, Arc::clone(&shared)));
        let leave = tokio::spawn(tell_of_leave(Arc::clone(&shared)));
        let maintenance = tokio::spawn(notices::maintenance::run(Arc::clone(&shared), config.maintenance));
        let zones = if named { Vec::new() } else { config.zones };
        let peers = tokio::spawn(notices::peers::run(Arc::clone(&shared), zones, scheme));
        let webhook = tokio::spawn(notices::webhook::run(Arc::clone(&shared)));
        let telling = tokio::spawn(notices::stored::run(Arc::clone(&shared)));
        let prober = tokio::spawn(prober::run(Arc::clone(&shared)));
        let checker = tokio::spawn(checker::run(Arc::clone(&shared)));
        let log =
            self.decision_log.map(|writer| tokio::spawn(decision_log::run(writer, Arc::clone(&shared))));
        let keeping = tokio::spawn(keeper::run(Arc::clone(&shared)));
        let remembering = tokio::spawn(remembered::run(Arc::clone(&shared)));
        remembered::follow(&shared, followed);
        let providers: Vec<_> = config
            .providers
            .into_iter()
            .map(|of| tokio::spawn(provider::run(Arc::clone(&shared), of)))
            .collect();
        let served = grpc::serve(self.grpc, Arc::clone(&shared)).await;
        for task in [http, prober, checker, leave, maintenance, peers, webhook, telling, keeping, remembering]
            .into_iter()
            .chain(log)
            .chain(providers)
        {
            task.abort();
        }
        keeper::finish(&shared).await;
        served
    }
}

async fn tell_of_leave(shared: Arc<Shared>) {
    reached(shared.phase.clone(), Phase::Draining).await;
    shared.notices.leave();
}

async fn bind(key: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Bind { key, address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Returns once the phase is at least `wanted`, or nobody is left to change it.
async fn reached(mut phase: watch::Receiver<Phase>, wanted: Phase) {
    // The error says that the sender is gone: the process ends.
    let _ = phase.wait_for(|now| *now >= wanted).await;
}
