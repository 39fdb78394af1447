//! The names of the policies: how a backend is chosen for a flow.

use std::fmt;
use std::str::FromStr;

/// How a backend is chosen for a flow. What "weight" means differs: *learned* from reports, or *registered* by the resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Policy {
    /// Least `(flows open x balancers + 1) / weight` among four samples in proportion to weight (among all, up to 32), with
    /// weights learned from reports.
    #[default]
    Adaptive,
    /// The same among all, with registered weights: `leastconn` of HAProxy without its tie of all idle servers.
    LeastConnections,
    /// The better of two by flows open and registered weight (M. Mitzenmacher, 1996).
    P2c,
    /// The better of two by flows open times the peak-sensitive average of the time to the first byte (Finagle, Linkerd).
    PeakEwma,
    /// In turn, in proportion to weights from reports, as gRPC's `weighted_round_robin` (gRFC A58).
    WeightedRoundRobin,
    /// Each in turn.
    RoundRobin,
    /// Any, alike.
    Random,
    /// The first by id that has room: the others stay idle.
    First,
    /// In turn, in proportion to weights that a feedback loop moves until utilization is even.
    Utilization,
    /// By a hash of the client's address, in proportion to weight, with bounded load: the same client, the same backend.
    Maglev,
    /// By answers to probes sent for single connections (Prequal, NSDI'24).
    Prequal,
    /// By an ordered list of criteria, then in turn among those that meet them.
    Criteria,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 12] = [
        Self::Adaptive,
        Self::LeastConnections,
        Self::P2c,
        Self::PeakEwma,
        Self::WeightedRoundRobin,
        Self::RoundRobin,
        Self::Random,
        Self::First,
        Self::Utilization,
        Self::Maglev,
        Self::Prequal,
        Self::Criteria,
    ];

    /// Its name in configuration, on the command line and in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Adaptive => "adaptive",
            Self::LeastConnections => "least-connections",
            Self::P2c => "p2c",
            Self::PeakEwma => "peak-ewma",
            Self::WeightedRoundRobin => "weighted-round-robin",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::First => "first",
            Self::Utilization => "utilization",
            Self::Maglev => "maglev",
            Self::Prequal => "prequal",
            Self::Criteria => "criteria",
        }
    }

    /// What it compares or follows, in one line, for `explain`.
    pub const fn rule(self) -> &'static str {
        match self {
            Self::Adaptive => {
                "least (flows open x balancers + 1) / learned weight, of 4 samples (of all, up to 32)"
            }
            Self::LeastConnections => "least (flows open x balancers + 1) / registered weight, of all",
            Self::P2c => "the less (flows open x balancers + 1) / registered weight of 2 samples",
            Self::PeakEwma => "the less latency x (flows open + 1) of 2 samples",
            Self::WeightedRoundRobin => "in turn, in proportion to rate / utilization",
            Self::RoundRobin => "each in turn",
            Self::Random => "any, alike",
            Self::First => "the first by id that has room",
            Self::Utilization => "in turn, in proportion to weights that even out utilization",
            Self::Maglev => "by the client's address, in proportion to weight, with bounded load",
            Self::Prequal => {
                "of 16 probed: least latency among those with few requests in flight, else fewest in flight"
            }
            Self::Criteria => "by the criteria in their order, then in turn among those that meet them",
        }
    }

    /// Whether weights learned from reports decide: then reports that are missing or wrong have to be guarded against.
    pub const fn learns(self) -> bool {
        matches!(
            self,
            Self::Adaptive
                | Self::WeightedRoundRobin
                | Self::Utilization
                | Self::Maglev
                | Self::Prequal
                | Self::Criteria
        )
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no policy {0:?}; there are adaptive, least-connections, p2c, peak-ewma, weighted-round-robin, round-robin, \
     random, first, utilization, maglev, prequal and criteria"
)]
pub struct UnknownPolicy(
    /// The text.
    pub String,
);

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.into_iter().find(|p| p.name() == text).ok_or_else(|| UnknownPolicy(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_is_found_by_its_name() {
        for policy in Policy::ALL {
            assert_eq!(policy.name().parse(), Ok(policy));
        }
        let unknown = "leastconn".parse::<Policy>().unwrap_err().to_string();
        assert!(Policy::ALL.iter().all(|policy| unknown.contains(policy.name())), "{unknown}");
    }
}
