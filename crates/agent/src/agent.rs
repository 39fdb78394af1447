//! An agent: one resource, registered with each of its balancers.
//!
//! ```text
//!                      +-> Life (balancer 1): its session, its meter, its pauses
//! Agent --- Balancers -+-> Life (balancer 2)
//!                      +-> one check of the service, one utilization file, one answerer of probes: for all lives
//! ```
//!
//! Owns: what the lives share ([`Common`]), and their common start and end. Does not own: what happens with one balancer
//! (`life`), and which balancers there are (`balancers`). Each life is a task of its own: a balancer that hangs, refuses or is away delays no other, and at the end
//! all take leave at once.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::Uri;

use crate::balancers::{Balancer, Balancers, Source};
use crate::config::{AgentConfig, AgentError, ServiceCheck};
use crate::discover;
use crate::file::UtilizationFile;
use crate::notices::{self, Notices};
use crate::probe;
use crate::serve;
use crate::service::{self, ConnectTime, Service};
use crate::sources::Sources;
use crate::supply;

/// Longest time between two checks of the service, under long report intervals.
const CHECK_INTERVAL_MAX: Duration = Duration::from_secs(5);

/// What an agent does now, with one of its balancers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentState {
    /// It waits for its own service to answer; it is not registered.
    CheckingService,
    /// It connects to the balancer and registers; `attempt` counts from 1 since it last reported.
    Registering {
        /// Which attempt.
        attempt: u32,
    },
    /// It is registered, and its reports are answered.
    Reporting {
        /// When the first of them was.
        since: Instant,
    },
    /// Something went wrong; it tries again after a pause.
    Waiting {
        /// What, for people.
        why: String,
        /// How long.
        pause: Duration,
    },
    /// It left, or did what can be done for that: without a balancer its lease expires.
    Deregistered,
}

/// A sidecar: registers a resource, reports its utilization, and deregisters it.
#[derive(Debug)]
pub struct Agent {
    config: AgentConfig,
    balancers: Balancers,
}

/// Runs an agent until `shutdown` resolves, then deregisters.
///
/// # Errors
/// When the configuration makes no sense; see [`AgentError`].
pub async fn run(config: AgentConfig, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
    Agent::new(config)?.run(shutdown).await
}

impl Agent {
    /// An agent that does nothing yet.
    ///
    /// # Errors
    /// When the configuration makes no sense; see [`AgentError`].
    pub fn new(mut config: AgentConfig) -> Result<Self, AgentError> {
        config.validate()?;
        if let Some(probe) = config.probe {
            config.resource.probe_address = probe.to_string();
        }
        let balancers = Balancers::default();
        for balancer in &config.balancers {
            balancers.add(Balancer::named(balancer.clone()), Source::Flag);
        }
        Ok(Self { balancers, config })
    }

    /// Follows what it does with the first of its balancers that were named: most agents have one. For one that has none,
    /// because it discovers them, this never changes.
    pub fn state(&self) -> watch::Receiver<AgentState> {
        let first = self.states().into_iter().next().map(|(_, state)| state);
        first.unwrap_or_else(|| watch::Sender::new(AgentState::CheckingService).subscribe())
    }

    /// Follows what it does with each of its balancers that were named, in their order.
    pub fn states(&self) -> Vec<(Uri, watch::Receiver<AgentState>)> {
        self.balancers.states()
    }

    /// Runs until `shutdown` resolves, then deregisters everywhere, which takes a second at most.
    ///
    /// # Errors
    /// When the address for probes cannot be had, or the service answers and its cgroup does not exist.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
        let (service_sender, service) = watch::channel(Service::Unknown);
        let sources = Arc::new(Sources::new(&self.config.sources));
        let file = UtilizationFile::new(&self.config, Arc::clone(&sources));
        let connect_time = ConnectTime::default();
        let common = Arc::new(Common {
            config: self.config,
            file,
            sources,
            service,
            connect_time,
            balancers: self.balancers,
            notices: Notices::default(),
        });
        // Before anybody is told of it.
        let probes = bind_probes(&common.config).await?;
        let servers = serve::Servers::bind(&common.config.serve).await?;
        let mut lives = JoinSet::new();
        let result = tokio::select! {
            error = Balancers::live(&common, &mut lives) => Err(error),
            never = discover_balancers(&common) => match never {},
            never = check_service(&common, service_sender) => match never? {},
            never = answer_probes(probes, &common) => match never {},
            never = common.file.watch() => match never {},
            never = common.sources.follow(&common.config) => match never {},
            error = servers.run(&common) => Err(error),
            never = notices::act(&common) => match never {},
            () = common.notices.told_to_end() => Ok(()),
            () = shutdown => Ok(()),
        };
        common.balancers.end(&mut lives).await;
        result
    }
}

/// What the lives of one agent share.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) config: AgentConfig,
    pub(crate) file: UtilizationFile,
    pub(crate) sources: Arc<Sources>,
    pub(crate) service: watch::Receiver<Service>,
    pub(crate) connect_time: ConnectTime,
    pub(crate) balancers: Balancers,
    pub(crate) notices: Notices,
}

async fn check_service(common: &Common, found: watch::Sender<Service>) -> Result<Infallible, AgentError> {
    let config = &common.config;
    if let Some(supply) = &config.supply {
        return Ok(supply::follow(supply.clone(), &common.file, found).await);
    }
    let ServiceCheck::Tcp { timeout: patience } = config.check else {
        found.send_replace(Service::Answers);
        return std::future::pending().await;
    };
    let interval = config.report_interval.min(CHECK_INTERVAL_MAX);
    Ok(service::check(config.address()?, patience, interval, found, &common.connect_time).await)
}

/// Where probes are answered, and of what.
async fn bind_probes(config: &AgentConfig) -> Result<Option<(UdpSocket, SocketAddr)>, AgentError> {
    let Some(address) = config.probe else { return Ok(None) };
    match UdpSocket::bind(address).await {
        Ok(socket) => Ok(Some((socket, config.address()?))),
        Err(error) => Err(AgentError::ProbeBind { address, why: error.to_string() }),
    }
}

async fn answer_probes(probes: Option<(UdpSocket, SocketAddr)>, common: &Arc<Common>) -> Infallible {
    match probes {
        Some((socket, service)) => probe::answer(socket, service, Arc::clone(common)).await,
        None => std::future::pending().await,
    }
}

async fn discover_balancers(common: &Common) -> Infallible {
    match &common.config.discover {
        Some(finder) => discover::follow(finder, common).await,
        None => std::future::pending().await,
    }
}
