//! The allocation table: who may get the next flow of a pool, and with which weight.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use crate::{AliasTable, LiveFacts, ResourceId};

/// A weight is never further than this factor from the mean, either way: one wrong report can neither starve a backend
/// nor flood it.
pub const WEIGHT_RATIO_MAX: f32 = 10.0;

/// How a backend is chosen for a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Policy {
    /// Least `(flows open + 1) / weight` among four samples in proportion to weight, with weights from reports.
    #[default]
    Adaptive,
    /// Least `(flows open + 1) / weight` among all, with registered weights.
    LeastConnections,
    /// Each in turn.
    RoundRobin,
    /// Any, alike.
    Random,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 4] = [Self::Adaptive, Self::LeastConnections, Self::RoundRobin, Self::Random];

    /// Its name in configuration, on the command line and in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Adaptive => "adaptive",
            Self::LeastConnections => "least-connections",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no policy {0:?}; there are adaptive, least-connections, round-robin and random")]
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

/// A resource as the dataplane sees it.
#[derive(Debug, Clone)]
pub struct Backend {
    /// Which resource it is.
    pub id: ResourceId,
    /// Where to connect.
    pub address: SocketAddr,
    /// Most flows at once; 0: no limit.
    pub flows_max: u32,
    /// What the dataplane knows of it.
    pub live: Arc<LiveFacts>,
}

/// A backend's place in [`Members`]. It means something only together with the table it was selected from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendIndex(pub u32);

/// Who is in a pool. Made anew when one joins or leaves; shared by all the generations in between.
#[derive(Debug, Clone, Default)]
pub struct Members {
    backends: Box<[Backend]>,
    candidates: Box<[Candidate]>,
}

/// What a selection looks at of a backend, in a quarter of its size: in a large pool each look is a cache miss.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) live: Arc<LiveFacts>,
    pub(crate) flows_max: u32,
}

impl Members {
    /// These backends, in this order.
    pub fn new(backends: Vec<Backend>) -> Self {
        let candidates = backends
            .iter()
            .map(|b| Candidate { live: Arc::clone(&b.live), flows_max: b.flows_max })
            .collect();
        Self { backends: backends.into(), candidates }
    }

    /// All of them.
    pub fn backends(&self) -> &[Backend] {
        &self.backends
    }
}

/// One generation of a pool's allocation: immutable, shared by all workers.
#[derive(Debug)]
pub struct AllocationTable {
    generation: u64,
    policy: Policy,
    members: Arc<Members>,
    /// By backend index. 0: gets no new flows (draining, not ready, lease expired).
    weights: Box<[f32]>,
    /// 1 / weight: by how much one flow raises a backend's level. Selection multiplies where it would divide.
    steps: Box<[f32]>,
    /// Backends of weight above 0, in order.
    eligible: Box<[BackendIndex]>,
    alias: AliasTable,
}

impl AllocationTable {
    /// A table of `members` with a weight for each; a weight of 0, below it or not finite leaves its backend out.
    ///
    /// # Panics
    /// If there are more or fewer weights than members.
    pub fn new(generation: u64, policy: Policy, members: Arc<Members>, weights: Vec<f32>) -> Self {
        assert_eq!(members.backends.len(), weights.len(), "one weight for each member");
        let mut weights = weights;
        let mut eligible = Vec::with_capacity(weights.len());
        for (index, weight) in (0..).zip(&mut weights) {
            if weight.is_finite() && *weight > 0.0 {
                eligible.push(BackendIndex(index));
            } else {
                *weight = 0.0;
            }
        }
        // Only the adaptive policy samples by weight, and only where it does not look at everyone anyway.
        let samples = policy == Policy::Adaptive && eligible.len() > crate::select::SCAN_MAX;
        let alias = if samples { AliasTable::new(&weights) } else { AliasTable::default() };
        let steps = weights.iter().map(|weight| weight.recip()).collect();
        Self { generation, policy, members, weights: weights.into(), steps, eligible: eligible.into(), alias }
    }

    /// A pool nobody has joined.
    pub fn empty(policy: Policy) -> Self {
        Self::new(0, policy, Arc::new(Members::default()), Vec::new())
    }

    /// Counts up with each table of the pool.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How this table selects.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Who is in the pool.
    pub fn members(&self) -> &Arc<Members> {
        &self.members
    }

    /// Weights by backend index; 0: left out.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Backends that may get flows, in index order.
    pub fn eligible(&self) -> &[BackendIndex] {
        &self.eligible
    }

    /// The sampling distribution; empty where the policy does not sample.
    pub fn alias(&self) -> &AliasTable {
        &self.alias
    }

    /// The backend at `index`.
    ///
    /// # Panics
    /// If `index` is of another table.
    pub fn backend(&self, index: BackendIndex) -> &Backend {
        &self.members.backends[index.0 as usize]
    }

    pub(crate) fn candidate(&self, index: BackendIndex) -> &Candidate {
        &self.members.candidates[index.0 as usize]
    }

    pub(crate) fn step(&self, index: BackendIndex) -> f32 {
        self.steps[index.0 as usize]
    }

    /// What selection compares: the flows a backend would have, over its weight. By Little's law this is
    /// proportional to the time it needs to drain them. Infinite for a backend that is left out.
    pub fn cost(&self, index: BackendIndex) -> f32 {
        (self.backend(index).live.flows_open() as f32 + 1.0) / self.weights[index.0 as usize]
    }
}
