//! What a policy sees and does, whoever wrote it.

use std::fmt;
use std::str::FromStr;

use allocation::Policy;

use super::event::Time;
use super::random::Random;
use super::server::Server;
use super::{prequal, rivals, trimtab};

/// What a server's sidecar has measured since its last report.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct ServerReport {
    /// Ratio of what the server is allotted.
    pub(crate) utilization: f64,
    /// Operations completed a second; none where the load is of long flows.
    pub(crate) rate: Option<f64>,
    /// Errors a second.
    pub(crate) errors: f64,
}

/// How a flow ended, as its balancer and its server saw it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ending {
    /// Why.
    pub(crate) how: How,
    /// Since its arrival, in seconds.
    pub(crate) latency: f64,
    /// Time in service, in seconds; 0 if it was not served.
    pub(crate) service: f64,
    /// Flows in the server after it.
    pub(crate) queue: u32,
}

/// Why a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// It was answered.
    Answered,
    /// The client went away at its deadline.
    TimedOut,
    /// The server accepted the connection and reset it.
    Reset,
}

/// A policy at one balancer.
pub(crate) trait Balancer {
    /// Chooses a server for a flow that arrives now. Only policies that ask servers look at `servers`.
    fn select(&mut self, now: Time, servers: &[Server]) -> Option<usize>;

    /// A flow that [`Self::select`] placed has ended.
    fn done(&mut self, server: usize, now: Time, ending: &Ending);

    /// A report has arrived.
    fn report(&mut self, server: usize, report: &ServerReport, now: Time);

    /// A server joins; they do so in the order of their numbers.
    fn join(&mut self, server: usize, now: Time);

    /// Once a second: leases are renewed whatever becomes of reports.
    fn tick(&mut self, _now: Time) {}
}

/// Who can take part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Contender {
    /// trimtab's own code.
    Trimtab(Policy),
    /// Each in turn.
    RoundRobin,
    /// Any.
    Random,
    /// `HAProxy`'s `leastconn`.
    LeastConn,
    /// The less busy of two, by own flows.
    P2c,
    /// The same by peak-EWMA latency times own flows (Finagle, tower).
    PeakEwma,
    /// gRPC's weighted round robin (gRFC A58).
    A58,
    /// C3 (NSDI'15).
    C3,
    /// Prequal (NSDI'24), its RIF quantile in hundredths.
    Prequal(u8),
    /// Join the shortest queue, knowing all of them exactly.
    ExactJsq,
}

/// What a balancer is made with.
#[derive(Debug, Clone)]
pub(crate) struct Conditions {
    /// Servers that are there from the start.
    pub(crate) servers: usize,
    /// How many balancers share the servers.
    pub(crate) balancers: usize,
    /// Time between two reports of a server, in seconds.
    pub(crate) report_interval: f64,
    /// Draws of this balancer.
    pub(crate) random: Random,
}

impl Contender {
    /// Everyone there is.
    pub(crate) fn all() -> Vec<Self> {
        let rivals = [
            Self::RoundRobin,
            Self::Random,
            Self::LeastConn,
            Self::P2c,
            Self::PeakEwma,
            Self::A58,
            Self::C3,
            Self::Prequal(60),
            Self::Prequal(84),
            Self::ExactJsq,
        ];
        Policy::ALL.into_iter().map(Self::Trimtab).chain(rivals).collect()
    }

    /// One balancer of this policy.
    pub(crate) fn balancer(self, conditions: Conditions) -> Box<dyn Balancer> {
        match self {
            Self::Trimtab(policy) => Box::new(trimtab::Trimtab::new(policy, conditions)),
            Self::RoundRobin => Box::new(rivals::RoundRobin::new(conditions)),
            Self::Random => Box::new(rivals::AnyOne::new(conditions)),
            Self::LeastConn => Box::new(rivals::LeastConn::new(&conditions)),
            Self::P2c => Box::new(rivals::P2c::new(conditions)),
            Self::PeakEwma => Box::new(rivals::PeakEwma::new(conditions)),
            Self::A58 => Box::new(rivals::A58::new(conditions)),
            Self::C3 => Box::new(rivals::C3::new(conditions)),
            Self::Prequal(quantile) => {
                Box::new(prequal::Prequal::new(f64::from(quantile) / 100.0, conditions))
            }
            Self::ExactJsq => Box::new(rivals::ExactJsq::new(conditions)),
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Trimtab(policy) => return write!(f, "trimtab-{policy}"),
            Self::Prequal(quantile) => return write!(f, "prequal-0.{quantile}"),
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::LeastConn => "leastconn",
            Self::P2c => "p2c",
            Self::PeakEwma => "p2c-peak-ewma",
            Self::A58 => "a58-wrr",
            Self::C3 => "c3",
            Self::ExactJsq => "exact-jsq",
        };
        f.write_str(name)
    }
}

impl FromStr for Contender {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::all().into_iter().find(|contender| contender.to_string() == text).ok_or_else(|| {
            let known: Vec<String> = Self::all().iter().map(Self::to_string).collect();
            format!("there is no policy {text:?}; there are {}", known.join(", "))
        })
    }
}
