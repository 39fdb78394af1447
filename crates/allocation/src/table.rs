//! The allocation table: who may get the next flow of a pool, and with which weight.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use crate::affinity::ResourceTag;
use crate::key::stable_hash;
use crate::probes::SharedProbePool;
use crate::{AliasTable, Criteria, LiveFacts, Maglev, Policy, ResourceId, Stride};

/// A weight is never further than this factor from the mean, either way: one wrong report can neither starve a backend
/// nor flood it.
pub const WEIGHT_RATIO_MAX: f32 = 10.0;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BackendIndex(pub u32);

/// Who is in a pool. Made anew when one joins or leaves; shared by all the generations in between.
#[derive(Debug, Clone, Default)]
pub struct Members {
    epoch: u64,
    backends: Box<[Backend]>,
    candidates: Box<[Candidate]>,
    /// By tag, made when one is first looked for.
    tags: OnceLock<Box<[(ResourceTag, BackendIndex)]>>,
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
        Self { epoch: 0, backends: backends.into(), candidates, tags: OnceLock::new() }
    }

    /// Numbers them, so that who keeps a [`BackendIndex`] can tell whether it still means the same.
    pub fn with_epoch(self, epoch: u64) -> Self {
        Self { epoch, ..self }
    }

    /// The number they were given; 0: none.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// A hash of every id, the same in every process, for consistent hashing.
    pub fn hashes(&self) -> Vec<u64> {
        self.backends.iter().map(|backend| stable_hash(backend.id.as_str().as_bytes(), 0)).collect()
    }

    /// Where a resource is that may have been in another table. The first look sorts all of them, once for these members.
    pub fn position(&self, tag: ResourceTag) -> Option<BackendIndex> {
        let tags = self.tags.get_or_init(|| {
            let mut tags: Vec<_> = (0..)
                .zip(&self.backends)
                .map(|(n, backend)| (ResourceTag::of(&backend.id), BackendIndex(n)))
                .collect();
            tags.sort_unstable();
            tags.into()
        });
        let first = tags.partition_point(|(known, _)| *known < tag);
        tags.get(first).filter(|(known, _)| *known == tag).map(|(_, index)| *index)
    }

    /// All of them.
    pub fn backends(&self) -> &[Backend] {
        &self.backends
    }
}

/// Why a table leaves a backend out: it gets no new flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum LeftOut {
    /// It is not left out.
    #[default]
    Not,
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
    /// It does not meet what the flows of this table require.
    Requirement,
    /// It is of a version that flows of this table do not get.
    OtherVersion,
    /// It has no weight for another reason.
    NoWeight,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Not => "it is considered",
            Self::Draining => "an operator drains it",
            Self::NotReady => "it reports that it is not ready",
            Self::ChecksFail => "its checks fail",
            Self::Unproven => "it is remembered from before the restart and has not answered yet",
            Self::Expired => "its lease is over: no report came in time",
            Self::Requirement => "it does not meet the requirement",
            Self::OtherVersion => "it is of another version",
            Self::NoWeight => "it has no weight",
        })
    }
}

/// What an [`AllocationTable`] is made of. The defaults are those of a pool of which nothing special is known.
#[derive(Debug, Clone)]
pub struct TableSpec {
    /// Counts up with each table of the pool.
    pub generation: u64,
    /// How it selects.
    pub policy: Policy,
    /// Who is in the pool.
    pub members: Arc<Members>,
    /// One for each member; 0, below it or not finite leaves its backend out.
    pub weights: Vec<f32>,
    /// How many balancers share the pool: flows open elsewhere are taken to be like ours.
    pub balancers: f32,
    /// Ejections for time-outs ([`crate::Verdict::Ejected`]) are ignored: all are saturated, or nobody knows.
    pub ignore_time_outs: bool,
    /// Why, for each member with no weight; empty: nobody asks.
    pub left_out: Vec<LeftOut>,
    /// Nobody who is ready meets the requirement: what [`crate::NoBackend`] says when nobody is eligible.
    pub requirement_unmet: bool,
    /// For [`Policy::Criteria`].
    pub criteria: Criteria,
    /// For [`Policy::Maglev`], when one fits that was made before.
    pub maglev: Option<Arc<Maglev>>,
    /// For [`Policy::Maglev`]: a backend takes up to this many times its fair part of all open flows; 0: any number.
    pub bounded_load: f32,
    /// For [`Policy::Prequal`].
    pub probes: Option<Arc<SharedProbePool>>,
}

impl TableSpec {
    /// A table of these members and weights, with nothing special.
    pub fn new(generation: u64, policy: Policy, members: Arc<Members>, weights: Vec<f32>) -> Self {
        Self {
            generation,
            policy,
            members,
            weights,
            balancers: 1.0,
            ignore_time_outs: false,
            left_out: Vec::new(),
            requirement_unmet: false,
            criteria: Criteria::default(),
            maglev: None,
            bounded_load: 0.0,
            probes: None,
        }
    }
}

/// One version's side of a split.
#[derive(Debug)]
pub struct Side {
    /// The version.
    pub version: String,
    /// Its part of new flows, 0 to 1.
    pub share: f32,
    /// Who serves it.
    pub table: AllocationTable,
}

/// By what flows are divided between versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SplitBy {
    /// At random, by share.
    #[default]
    Share,
    /// By the client's address: the same client gets the same version for as long as shares stay.
    Client,
}

/// The sides of a pool whose new flows are divided between versions before they are balanced.
#[derive(Debug)]
pub struct Split {
    /// By what.
    pub by: SplitBy,
    /// The baseline first.
    pub sides: Vec<Side>,
}

impl Split {
    /// The side of a flow, by a number that is even over all of `u32`.
    pub(crate) fn side(&self, number: u32) -> usize {
        let sum: f32 = self.sides.iter().map(|side| side.share).sum();
        let mut left = number as f32 / u32::MAX as f32 * sum;
        for (place, side) in self.sides.iter().enumerate() {
            left -= side.share;
            if left < 0.0 && side.share > 0.0 {
                return place;
            }
        }
        // Rounding, or no share at all: the baseline.
        self.sides.iter().rposition(|side| side.share > 0.0).unwrap_or(0)
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
    balancers: f32,
    ignore_time_outs: bool,
    requirement_unmet: bool,
    left_out: Box<[LeftOut]>,
    /// Empty where the policy does not sample.
    alias: AliasTable,
    /// Over `eligible`; empty where the policy takes no turns by weight.
    stride: Stride,
    criteria: Criteria,
    maglev: Option<Arc<Maglev>>,
    bounded_load: f32,
    probes: Option<Arc<SharedProbePool>>,
    split: Option<Split>,
}

impl AllocationTable {
    /// A table of `members` with a weight for each; a weight of 0, below it or not finite leaves its backend out.
    ///
    /// # Panics
    /// If there are more or fewer weights than members.
    pub fn new(generation: u64, policy: Policy, members: Arc<Members>, weights: Vec<f32>) -> Self {
        Self::build(TableSpec::new(generation, policy, members, weights))
    }

    /// The table of a specification.
    ///
    /// # Panics
    /// If there are more or fewer weights than members.
    pub fn build(spec: TableSpec) -> Self {
        let TableSpec { generation, policy, members, mut weights, .. } = spec;
        assert_eq!(members.backends.len(), weights.len(), "one weight for each member");
        let mut eligible = Vec::with_capacity(weights.len());
        for (index, weight) in (0..).zip(&mut weights) {
            if weight.is_finite() && *weight > 0.0 {
                eligible.push(BackendIndex(index));
            } else {
                *weight = 0.0;
            }
        }
        if policy == Policy::First {
            eligible.sort_unstable_by(|a, b| {
                let id = |index: &BackendIndex| &members.backends[index.0 as usize].id;
                id(a).cmp(id(b))
            });
        }
        let alias =
            if samples(policy, eligible.len()) { AliasTable::new(&weights) } else { AliasTable::default() };
        let stride = match policy {
            Policy::WeightedRoundRobin | Policy::Utilization => {
                let of = |index: &BackendIndex| weights[index.0 as usize];
                Stride::new(&eligible.iter().map(of).collect::<Vec<_>>())
            }
            _ => Stride::default(),
        };
        let maglev = (policy == Policy::Maglev)
            .then(|| spec.maglev.unwrap_or_else(|| Arc::new(Maglev::new(&members.hashes(), &weights))));
        let steps = weights.iter().map(|weight| weight.recip()).collect();
        Self {
            generation,
            policy,
            members,
            weights: weights.into(),
            steps,
            eligible: eligible.into(),
            balancers: if spec.balancers >= 1.0 { spec.balancers } else { 1.0 },
            ignore_time_outs: spec.ignore_time_outs,
            requirement_unmet: spec.requirement_unmet,
            left_out: spec.left_out.into(),
            alias,
            stride,
            criteria: spec.criteria,
            maglev,
            bounded_load: spec.bounded_load,
            probes: spec.probes,
            split: None,
        }
    }

    /// Divides flows between versions before it balances. Its own weights stay what `explain` shows of the whole.
    ///
    /// # Panics
    /// If a side has other members.
    pub fn with_split(mut self, split: Split) -> Self {
        let same = |side: &Side| Arc::ptr_eq(&side.table.members, &self.members);
        assert!(split.sides.iter().all(same), "indexes of a side are indexes of the whole");
        self.split = (!split.sides.is_empty()).then_some(split);
        self
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

    /// Backends that may get flows, in index order (for [`Policy::First`], in order of their ids).
    pub fn eligible(&self) -> &[BackendIndex] {
        &self.eligible
    }

    /// How many balancers share the pool; at least 1.
    pub fn balancers(&self) -> f32 {
        self.balancers
    }

    /// Why a backend is left out, where that was noted.
    pub fn left_out(&self, index: BackendIndex) -> LeftOut {
        match self.left_out.get(index.0 as usize) {
            Some(why) => *why,
            None if self.weights[index.0 as usize] > 0.0 => LeftOut::Not,
            None => LeftOut::NoWeight,
        }
    }

    /// Whether nobody who is ready meets the requirement.
    pub fn is_requirement_unmet(&self) -> bool {
        self.requirement_unmet
    }

    /// Whether ejections for time-outs are ignored.
    pub fn ignores_time_outs(&self) -> bool {
        self.ignore_time_outs
    }

    /// Whether a selection depends on who the client is: only then it is worth asking the kernel.
    pub fn wants_key(&self) -> bool {
        self.policy == Policy::Maglev || self.split.as_ref().is_some_and(|split| split.by == SplitBy::Client)
    }

    /// The sampling distribution; empty where the policy does not sample.
    pub fn alias(&self) -> &AliasTable {
        &self.alias
    }

    /// Whose turn it is, over [`AllocationTable::eligible`]; empty where the policy takes no turns by weight.
    pub(crate) fn stride(&self) -> &Stride {
        &self.stride
    }

    /// The scores of [`Policy::Criteria`].
    pub fn criteria(&self) -> &Criteria {
        &self.criteria
    }

    /// The look-up table of [`Policy::Maglev`].
    pub fn maglev(&self) -> Option<&Arc<Maglev>> {
        self.maglev.as_ref()
    }

    pub(crate) fn bounded_load(&self) -> f32 {
        self.bounded_load
    }

    /// The answers of [`Policy::Prequal`].
    pub fn probes(&self) -> Option<&Arc<SharedProbePool>> {
        self.probes.as_ref()
    }

    /// The versions that flows are divided between, if they are.
    pub fn split(&self) -> Option<&Split> {
        self.split.as_ref()
    }

    /// The table of a side of the split; this table where it is not split or there is no such side.
    pub fn side(&self, side: usize) -> &Self {
        self.split.as_ref().and_then(|split| split.sides.get(side)).map_or(self, |side| &side.table)
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

    /// 1 / weight.
    pub(crate) fn step(&self, index: BackendIndex) -> f32 {
        self.steps[index.0 as usize]
    }

    /// Where the water stands at a backend with so many of our flows open, and by how much one more raises it.
    pub(crate) fn level(&self, index: BackendIndex, open: u32) -> (f32, f32) {
        let step = self.steps[index.0 as usize];
        (open as f32 * self.balancers * step, step)
    }

    /// Whether so few of our flows are open on `backends` of them that a cost says little: fewer than one for each. Cost is
    /// then hardly more than 1 / weight, and the least of it would go to the largest weight alone. Who is thought a little
    /// slower would get nothing to show the contrary with, and be thought slower for that.
    pub(crate) fn is_idle(&self, open: u32, backends: usize) -> bool {
        (open as f32 * self.balancers) < backends as f32
    }

    /// What selection compares, with so many flows open on the backend: for policies that count flows, those it would have at
    /// all balancers, over its weight. By Little's law that is proportional to the time it needs to drain them. For
    /// `peak-ewma`, seconds of latency times flows; for those that take turns, 1 / weight. Infinite for a backend that is left
    /// out.
    pub fn cost(&self, index: BackendIndex, flows_open: u32, now: crate::Timestamp) -> f32 {
        let weight = self.weights[index.0 as usize];
        let open = flows_open as f32;
        match self.policy {
            _ if weight <= 0.0 => f32::INFINITY,
            Policy::PeakEwma => {
                let micros = self.backend(index).live.latency_micros(now).unwrap_or(0.0);
                micros * 1e-6 * (open + 1.0)
            }
            Policy::WeightedRoundRobin
            | Policy::Utilization
            | Policy::RoundRobin
            | Policy::Random
            | Policy::Maglev => weight.recip(),
            Policy::Criteria if !self.criteria.rules().is_empty() => {
                self.criteria.score(0, index).at(flows_open)
            }
            _ => (open * self.balancers + 1.0) / weight,
        }
    }
}

/// Whether a table of so many eligible backends needs a sampling distribution.
fn samples(policy: Policy, eligible: usize) -> bool {
    match policy {
        Policy::Adaptive | Policy::Criteria => eligible > crate::select::SCAN_MAX,
        Policy::P2c | Policy::PeakEwma | Policy::Prequal => eligible > 0,
        _ => false,
    }
}
