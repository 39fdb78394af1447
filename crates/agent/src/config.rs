//! What an agent is told.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api::v1;
use tokio::sync::watch;
use tonic::transport::Uri;

use crate::serve::ServeConfig;
use crate::sources::NumberSource;
use crate::supply::Supplied;
use crate::transport::Transport;
use crate::utilization::{NoSuchCgroup, Roots, Source};

/// Where a URL without a port leads.
pub(crate) const HTTP_PORT: u16 = 80;
const HTTPS_PORT: u16 = 443;

/// What an agent is told. [`AgentConfig::new`] fills in what it can.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The balancers' control addresses, `https://host:port` or `http://host:port`: none twice, and at least one unless they
    /// are discovered. The resource is registered with each of them, and a balancer that is away changes nothing for the
    /// others.
    pub balancers: Vec<Uri>,
    /// Where further balancers are found: with every one of the lowest priority number the resource is registered as well.
    pub discover: Option<discovery::Finder>,
    /// How to reach them, and what to show them.
    pub transport: Transport,
    /// Who registers: identity, pool, address and what it can bear.
    pub resource: v1::Resource,
    /// Orders the starts of this resource: a higher one replaces a lower one. Milliseconds since 1970 at the start.
    pub incarnation: u64,
    /// How often to report. The balancer takes 100 ms to 1 h.
    pub report_interval: Duration,
    /// What is measured.
    pub source: Source,
    /// In place of what is measured and checked: what is told of the resource. [`AgentConfig::source`], [`AgentConfig::check`]
    /// and the utilization file count for nothing then.
    pub supply: Option<watch::Receiver<Supplied>>,
    /// Where the kernel's files are.
    pub roots: Roots,
    /// A JSON file whose values stand above the measured ones (see [`crate::utilization::Override`]); read at each
    /// report, and when its labels may have changed. It need not be there.
    pub utilization_file: Option<PathBuf>,
    /// Capacity of the network in bits a second; unset: the fastest interface's speed.
    pub bandwidth_capacity_bps: Option<u64>,
    /// What traffic through this resource costs, in currency per GB.
    pub bandwidth_cost: Option<f64>,
    /// How to find out whether the resource's own service answers.
    pub check: ServiceCheck,
    /// Where to answer a balancer's probes, by UDP; an address of the resource's host, neither unspecified nor of port 0.
    /// It stands for the resource's `probe_address`. Unset: they are not answered here.
    pub probe: Option<SocketAddr>,
    /// Where the service's own numbers come from; they stand above the measured ones, a later one above an earlier one, and
    /// below the utilization file.
    pub sources: Vec<NumberSource>,
    /// A command of the shell that is run at each notice of a balancer, with the notice as JSON on its standard input.
    pub on_notice: Option<String>,
    /// Where the numbers are served to others.
    pub serve: ServeConfig,
    /// How to try again.
    pub retry: Retry,
    /// Decides all that is random: the jitter of pauses. Agents that start at once should differ in it.
    pub seed: u64,
}

/// How to find out whether the resource's own service answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceCheck {
    /// A TCP connection to the resource's address, closed at once with nothing sent, at each report interval.
    Tcp {
        /// How long it may take.
        timeout: Duration,
    },
    /// Not at all: it is taken to answer.
    None,
}

/// How to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Longest pause after the first failure; doubles with each further one.
    pub first: Duration,
    /// Longest pause after any number of failures: agents are back within it when their balancer is.
    pub cap: Duration,
    /// Pause after a balancer answered and said no: an operator has to change something first.
    pub refused: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(100),
            cap: Duration::from_secs(2),
            refused: Duration::from_secs(5),
        }
    }
}

impl AgentConfig {
    /// An agent of this host for `resource` and these balancers, with a report each second and a check of the resource's
    /// address.
    pub fn new(balancers: Vec<Uri>, resource: v1::Resource) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            balancers,
            discover: None,
            transport: Transport::default(),
            resource,
            incarnation: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
            report_interval: Duration::from_secs(1),
            source: Source::Host,
            supply: None,
            roots: Roots::default(),
            utilization_file: None,
            bandwidth_capacity_bps: None,
            bandwidth_cost: None,
            check: ServiceCheck::Tcp { timeout: Duration::from_secs(1) },
            probe: None,
            sources: Vec::new(),
            on_notice: None,
            serve: ServeConfig::default(),
            retry: Retry::default(),
            seed: u64::from(since_1970.subsec_nanos()) ^ (u64::from(std::process::id()) << 32),
        }
    }

    /// Where the service is, for those who have to know.
    pub(crate) fn address(&self) -> Result<SocketAddr, AgentError> {
        let found = &self.resource.address;
        found.parse().map_err(|_| AgentError::Address { found: found.clone() })
    }

    /// A balancer that a notice names, if this agent may register there.
    pub(crate) fn alternative(&self, text: &str) -> Result<Uri, String> {
        let uri: Uri = text.parse().map_err(|_| "it is no URL".to_owned())?;
        let only = Self { balancers: vec![uri.clone()], ..self.clone() };
        only.validate_balancers().map_err(|error| error.to_string())?;
        Ok(uri)
    }

    pub(crate) fn validate(&self) -> Result<(), AgentError> {
        if self.check != ServiceCheck::None || self.probe.is_some() {
            self.address()?;
        }
        match self.probe {
            Some(found) if found.port() == 0 || found.ip().is_unspecified() => {
                return Err(AgentError::Probe { found });
            }
            _ => {}
        }
        self.validate_balancers()?;
        if self.report_interval.is_zero() {
            return Err(AgentError::NoInterval);
        }
        match self.bandwidth_cost {
            Some(cost) if !cost.is_finite() || cost < 0.0 => Err(AgentError::BandwidthCost { found: cost }),
            _ => Ok(()),
        }
    }

    fn validate_balancers(&self) -> Result<(), AgentError> {
        if self.balancers.is_empty() && self.discover.is_none() {
            return Err(AgentError::NoBalancer);
        }
        let mut seen = HashSet::new();
        for balancer in &self.balancers {
            let found = || balancer.to_string();
            let (port, host) = match (balancer.scheme_str(), balancer.host()) {
                (Some("http"), Some(host)) => (HTTP_PORT, host),
                (Some("https"), Some(host)) => (HTTPS_PORT, host),
                _ => return Err(AgentError::Balancer { found: found() }),
            };
            // Who gives certificates means them to be used.
            if port == HTTP_PORT && self.transport.wants_tls() {
                return Err(AgentError::ClearText { found: found() });
            }
            // Two registrations of one resource at one balancer would take turns at being its only stream of reports.
            if !seen.insert((host.to_ascii_lowercase(), balancer.port_u16().unwrap_or(port))) {
                return Err(AgentError::BalancerTwice { found: found() });
            }
        }
        Ok(())
    }
}

/// Why an agent does not run: what it was told makes no sense, and only whoever told it can mend that. Whatever a
/// balancer, the network or the service does is waited out instead.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The resource's address cannot be connected to.
    #[error("the address {found:?} is not ip:port or [ip6]:port, such as 10.0.0.1:5432")]
    Address {
        /// What it is.
        found: String,
    },
    /// There is nobody to register with.
    #[error("no balancer is named")]
    NoBalancer,
    /// One balancer is named more than once.
    #[error("the balancer {found} is named twice")]
    BalancerTwice {
        /// What it is.
        found: String,
    },
    /// A balancer's address is none.
    #[error("the balancer {found:?} is not https://host:port or http://host:port")]
    Balancer {
        /// What it is.
        found: String,
    },
    /// There are certificates, and the balancer is to be reached without.
    #[error("the balancer {found} is clear text, and certificates are given: write https://")]
    ClearText {
        /// What it is.
        found: String,
    },
    /// The address for probes is none that a balancer could send to.
    #[error("the address for probes {found} is not one to send to; name an address of this host and a port")]
    Probe {
        /// What it is.
        found: SocketAddr,
    },
    /// The system does not give the address for probes: it is in use, or not of this host.
    #[error("cannot answer probes at {address}: {why}")]
    ProbeBind {
        /// What it is.
        address: SocketAddr,
        /// What the system says.
        why: String,
    },
    /// The system does not give an address that the numbers are to be served at.
    #[error("cannot serve {what} at {address}: {why}")]
    ServeBind {
        /// `ORCA`, `agent-check` or `metrics`.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// What the system says.
        why: String,
    },
    /// A report interval of nothing.
    #[error("the report interval is 0; the balancer takes 100 ms to 1 h")]
    NoInterval,
    /// A cost that is no amount.
    #[error("the bandwidth cost is {found}; it takes a number of 0 or more")]
    BandwidthCost {
        /// What it is.
        found: f64,
    },
    /// The service answers, and its cgroup is not there.
    #[error(transparent)]
    NoSuchCgroup(#[from] NoSuchCgroup),
}
