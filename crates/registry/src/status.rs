//! What an operator is told: values, made when asked for.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use allocation::{Policy, PoolName, ResourceId};

use crate::policy::{Guard, RateUnit};
use crate::{Labels, Registration, Requirements, Utilization};

/// Whether a resource gets new flows, and if not, why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceState {
    /// It does.
    Ready,
    /// An operator drains it.
    Draining,
    /// It says itself that it is not ready.
    NotReady,
    /// Its active checks fail, or flows to it do: then it is tried again with a growing pause.
    Down,
    /// It is from before a restart of the balancer and has not reported since. It gets new flows while its service answers.
    Remembered,
}

impl ResourceState {
    /// Every state.
    pub const ALL: [Self; 5] = [Self::Ready, Self::Draining, Self::NotReady, Self::Down, Self::Remembered];

    /// Its name in metrics and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::NotReady => "not_ready",
            Self::Down => "down",
            Self::Remembered => "remembered",
        }
    }
}

impl fmt::Display for ResourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The balancer's view of a resource, short: what a report is answered with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    /// Whether it gets new flows.
    pub state: ResourceState,
    /// Its weight; the mean of its pool is 1. 0: it gets none.
    pub weight: f64,
    /// Its share of its pool's weight, 0 to 1.
    pub share: f64,
    /// Flows open on it.
    pub flows_open: u32,
}

/// Everything about a resource.
#[derive(Debug, Clone, PartialEq)]
pub struct ResourceStatus {
    /// What it registered.
    pub registration: Arc<Registration>,
    /// In force: what it said last, with what an administrator entered.
    pub labels: Arc<Labels>,
    /// Short.
    pub standing: Standing,
    /// Flows opened to it since its registration.
    pub flows_opened: u64,
    /// Connects to it that failed since its registration.
    pub connect_failures: u64,
    /// Of its newest accepted report; `None`: there is none.
    pub report_age: Option<Duration>,
    /// Of its newest accepted report.
    pub utilization: Option<Arc<Utilization>>,
    /// Until its registration expires.
    pub lease_left: Duration,
    /// Reports that were refused since its registration.
    pub reports_refused: u64,
}

/// How many resources of a pool are in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StateCounts([u32; 5]);

impl StateCounts {
    /// One more.
    pub(crate) fn count(&mut self, state: ResourceState) {
        self.0[state as usize] += 1;
    }

    /// How many are in `state`.
    pub fn of(&self, state: ResourceState) -> u32 {
        self.0[state as usize]
    }
}

/// A pool, summed up.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolStatus {
    /// Its name.
    pub name: PoolName,
    /// How it selects.
    pub policy: Policy,
    /// Of its newest table.
    pub generation: u64,
    /// Its resources by state.
    pub states: StateCounts,
    /// Flows open on all of them.
    pub flows_open: u64,
    /// Why its weights are held, if they are.
    pub guard: Option<Guard>,
    /// Every guard, whether it holds or not.
    pub guards: Vec<GuardStatus>,
    /// How many balancers share it, by the reports of its resources.
    pub balancers: f64,
}

/// What keeps a pool from being led astray.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardStatus {
    /// Its name, one of [`GuardStatus::NAMES`].
    pub name: &'static str,
    /// Whether it does anything now.
    pub holds: bool,
    /// What it sees and what it does.
    pub detail: String,
}

impl GuardStatus {
    /// The names of all guards: label values of a metric.
    pub const NAMES: [&'static str; 6] =
        ["stale_reports", "fleet_saturated", "ejections_ignored", "sinkhole", "slow_start", "share_growth"];
}

/// Why a resource is not considered for the next flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeftOut {
    /// An operator drains it.
    Draining,
    /// It says itself that it is not ready.
    NotReady,
    /// Its active checks fail.
    ChecksFail,
    /// It is remembered from before a restart, and has not answered yet.
    Unproven,
    /// Its lease is over.
    Expired,
    /// It does not meet what the flow requires.
    Requirement {
        /// The first requirement that it does not meet.
        unmet: String,
    },
    /// Its version's share of new flows is 0.
    Aborted {
        /// The version.
        version: String,
    },
    /// It timed out or reset flows, and its pause is not over.
    Ejected,
    /// Connecting to it failed, and its pause is not over.
    Paused,
    /// It has as many flows as it takes.
    Full {
        /// How many.
        flows_max: u32,
    },
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Draining => f.write_str("an operator drains it"),
            Self::NotReady => f.write_str("it reports that it is not ready"),
            Self::ChecksFail => f.write_str("its checks fail"),
            Self::Unproven => {
                f.write_str("it is remembered from before the restart and has not answered yet")
            }
            Self::Expired => f.write_str("its lease is over: no report came in time"),
            Self::Requirement { unmet } => write!(f, "it does not meet {unmet}"),
            Self::Aborted { version } => write!(f, "version {version} has no share of new flows"),
            Self::Ejected => f.write_str("it timed out or reset flows; it is left alone for a while"),
            Self::Paused => f.write_str("connecting to it failed; it is left alone for a while"),
            Self::Full { flows_max } => write!(f, "it has as many flows as it takes ({flows_max})"),
        }
    }
}

/// Something that shaped a weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Note {
    /// The policy does not look at reports.
    Registered,
    /// No report yet.
    NeverReported,
    /// Remembered from before a restart: the weight stays where it was.
    Remembered,
    /// No report for three intervals: the weight stays where it is.
    Stale,
    /// The pool's weights are held.
    Held(Guard),
    /// Too little utilization to tell anything from.
    Idle,
    /// It gets only a part of its weight yet.
    SlowStart,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registered => f.write_str("the policy takes the registered weight"),
            Self::NeverReported => f.write_str("no report yet: registered weight"),
            Self::Remembered => f.write_str("remembered from before the restart: weight held"),
            Self::Stale => f.write_str("no report for three intervals: weight held"),
            Self::Held(guard) => write!(f, "{guard}: weight held"),
            Self::Idle => f.write_str("utilization idle: weight held near its registered value"),
            Self::SlowStart => f.write_str("slow start: part of its weight"),
        }
    }
}

/// One resource in an [`Explanation`].
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Which one.
    pub id: ResourceId,
    /// Where it serves.
    pub address: SocketAddr,
    /// Short.
    pub standing: Standing,
    /// Why it is not considered, if it is not.
    pub left_out: Option<LeftOut>,
    /// What selection compares; infinite without a weight.
    pub cost: f64,
    /// Averaged, with the error penalty.
    pub utilization_ewma: f64,
    /// Averaged, in the unit of the explanation.
    pub rate_ewma: f64,
    /// Of its newest accepted report; `None`: there is none.
    pub report_age: Option<Duration>,
    /// The part of its weight that it gets while it starts, 0.1 to 1.
    pub slow_start: f64,
    /// What shaped its weight.
    pub notes: Vec<Note>,
    /// Of its newest accepted report.
    pub utilization: Option<Arc<Utilization>>,
    /// The version of what it serves.
    pub version: String,
    /// The side of the pool's split that it is on; `None`: the pool is not split.
    pub side: Option<String>,
    /// In force.
    pub labels: Arc<Labels>,
    /// To how many balancers it reports.
    pub balancers: u32,
    /// Peak-sensitive average of the time to its first byte; `None`: not measured.
    pub latency: Option<Duration>,
    /// By each of the pool's criteria.
    pub scores: Vec<CandidateScore>,
    /// How busy it will be, by the hours ahead on earlier days; `None`: nothing tells.
    pub forecast: Option<f64>,
}

/// A candidate by one criterion.
#[derive(Debug, Clone, PartialEq)]
pub struct CandidateScore {
    /// As configured.
    pub criterion: String,
    /// As of its newest sample.
    pub value: f64,
    /// What one more flow adds, as far as was learned.
    pub per_flow: f64,
    /// Of its newest sample; `None`: there is none, and the mean of the others stands for it.
    pub age: Option<Duration>,
}

/// Why the next flow of a pool would go where.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// Which pool.
    pub pool: PoolName,
    /// How it selects.
    pub policy: Policy,
    /// Of its newest table.
    pub generation: u64,
    /// Why its weights are held, if they are.
    pub guard: Option<Guard>,
    /// What its rates count.
    pub unit: RateUnit,
    /// Cheapest first, then those left out.
    pub candidates: Vec<Candidate>,
    /// What the flow requires.
    pub requires: Requirements,
    /// Every set of requirements that a table is kept for, in the order of the tables.
    pub tables: Vec<Requirements>,
    /// Every guard, whether it holds or not.
    pub guards: Vec<GuardStatus>,
    /// How many balancers share the pool, by the reports of its resources.
    pub balancers: f64,
}
