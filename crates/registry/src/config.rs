//! What a registry is made with: pools, how each allocates, and bounds.

use std::time::Duration;

use allocation::{Policy, PoolName, ProbeKnobs};

use crate::{Criterion, Requirements, SplitConfig};

/// Most sets of requirements that one pool keeps tables for: one bit each.
pub const TABLES_MAX: usize = 64;
/// Most criteria of one pool.
pub const CRITERIA_MAX: usize = 8;

/// Knobs of the policies, under the field's names and with its defaults. Which policy looks at which is said at each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Knobs {
    /// How long a resource that joins established ones takes to its full weight (Envoy's slow start; all policies that weigh).
    pub slow_start: Duration,
    /// `a` in `weight x (time / window)^(1/a)`: above 1 it gets its weight sooner.
    pub slow_start_aggression: f32,
    /// `weighted-round-robin`: reports count only when they have come for so long (gRFC A58 `blackout_period`).
    pub blackout: Duration,
    /// `weighted-round-robin`: a weight is forgotten when no report came for so long (gRFC A58 `weight_expiration_period`).
    pub weight_expiration: Duration,
    /// Errors per operation count as so much utilization (gRFC A58 `error_utilization_penalty`; all policies that learn).
    pub error_penalty: f32,
    /// `maglev`: a resource takes up to this many times its fair part of the open flows (HAProxy's `hash-balance-factor`,
    /// where it is a percentage); 0: any number.
    pub bounded_load: f32,
    /// `prequal`.
    pub probes: ProbeKnobs,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            slow_start: Duration::from_secs(10),
            slow_start_aggression: 1.0,
            blackout: Duration::from_secs(10),
            weight_expiration: Duration::from_secs(180),
            error_penalty: 1.0,
            bounded_load: 1.25,
            probes: ProbeKnobs::default(),
        }
    }
}

/// A pool, by configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolConfig {
    /// Its name.
    pub name: PoolName,
    /// How it selects.
    pub policy: Policy,
    /// Most flows at once of a resource that states no limit of its own; 0: none.
    pub flows_max_default: u32,
    /// Of its policy.
    pub knobs: Knobs,
    /// What a resource must meet to get any flow of the pool.
    pub requires: Requirements,
    /// Further sets, each on top of the pool's own, that a table of its own is kept for: those of listeners. Table 0 is of the
    /// pool's own requirement, table `n` of the `n - 1`-th of these.
    pub tables: Vec<Requirements>,
    /// For [`Policy::Criteria`], in their order.
    pub criteria: Vec<Criterion>,
    /// Versions that new flows are divided between.
    pub split: Option<SplitConfig>,
    /// Whether somebody checks its resources actively, and says what came of it ([`crate::Registry::checked`]).
    pub checked: bool,
    /// How far ahead to look for hours in which a resource was busy on earlier days; `None`: not at all.
    pub forecast: Option<Duration>,
}

impl PoolConfig {
    /// A pool with every default.
    pub fn new(name: PoolName, policy: Policy) -> Self {
        Self {
            name,
            policy,
            flows_max_default: 0,
            knobs: Knobs::default(),
            requires: Requirements::default(),
            tables: Vec::new(),
            criteria: Vec::new(),
            split: None,
            checked: false,
            forecast: None,
        }
    }
}

/// Bounds of what the registry keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most resources in one pool.
    pub resources_max: usize,
    /// Most resources that an administrator may have entered capabilities for.
    pub capabilities_max: usize,
    /// Most bytes of history over all resources; at the bound no new dimension is begun.
    pub history_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { resources_max: 10_000, capabilities_max: 10_000, history_bytes_max: 1 << 30 }
    }
}

/// What a registry is made with.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Config {
    /// Every pool there will be.
    pub pools: Vec<PoolConfig>,
    /// Bounds.
    pub limits: Limits,
}

/// Why there can be no such registry: the operator's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Two pools of one name.
    #[error("there are two pools named {0}; names are unique")]
    DuplicatePool(PoolName),
    /// More sets of requirements than [`TABLES_MAX`].
    #[error(
        "the listeners of pool {pool} have {count} different requirements; a pool takes at most {TABLES_MAX}"
    )]
    Tables {
        /// Which pool.
        pool: PoolName,
        /// How many, with the pool's own.
        count: usize,
    },
    /// The policy `criteria` without any, or with more than [`CRITERIA_MAX`].
    #[error("pool {pool} has {count} criteria; the policy \"criteria\" takes 1 to {CRITERIA_MAX}")]
    Criteria {
        /// Which pool.
        pool: PoolName,
        /// How many.
        count: usize,
    },
}

impl PoolConfig {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let count = self.tables.len() + 1;
        if count > TABLES_MAX {
            return Err(ConfigError::Tables { pool: self.name.clone(), count });
        }
        let count = self.criteria.len();
        if count > CRITERIA_MAX || (self.policy == Policy::Criteria && count == 0) {
            return Err(ConfigError::Criteria { pool: self.name.clone(), count });
        }
        Ok(())
    }

    /// What the flows of a table require in all.
    pub(crate) fn requirement(&self, table: usize) -> Requirements {
        match table.checked_sub(1).and_then(|extra| self.tables.get(extra)) {
            Some(extra) => self.requires.and(extra),
            None => self.requires.clone(),
        }
    }
}
