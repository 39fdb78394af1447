//! trimtab's pure registry: who is registered, how busy each one says it is, and the policy that makes an allocation
//! table of it.
//!
//! ```text
//! Registration::parse, Utilization::parse      at the edge: every bound checked, every refusal says whose fault
//!        |
//! Registry::register / report / deregister / drain / ready      marks the pool dirty
//!        |
//! Registry::expire, Registry::rebuild          on the tick: policy::allocate -> AllocationTable
//! ```
//!
//! * It owns registrations, leases, utilization and weights. It does not own a clock ([`allocation::Timestamp`] is an
//!   argument), a socket, or the wire's types: the shell parses messages into the types here.
//! * Every resource is in one pool. What is kept of it goes when it deregisters or its lease expires; nothing grows
//!   with what a peer sends beyond the named bounds ([`Limits`], [`ENTRIES_MAX`], [`KEY_BYTES_MAX`]).
//! * Locks: an entry of the map first, then its pool, never the other way round, and never two pools.
#![forbid(unsafe_code)]

mod columns;
mod config;
pub mod criteria;
pub mod health;
pub mod history;
mod labels;
mod memory;
mod offer;
mod past;
pub mod policy;
mod pool;
mod registration;
mod registry;
mod requirement;
mod scores;
mod sides;
mod status;
mod utilization;
pub mod versions;

pub use config::{CRITERIA_MAX, Config, ConfigError, Knobs, Limits, PoolConfig, TABLES_MAX};
pub use criteria::{Criterion, CriterionError, Direction, Footprint};
pub use health::Checked;
pub use history::{Aggregate, Answer, Chunk, History};
pub use labels::{LABEL_BYTES_MAX, LabelsError, effective_labels, parse_labels};
pub use memory::{CheckTarget, Estimates, Kept, Remembered, VersionShareNow};
pub use offer::Offer;
pub use registration::{Owner, RawRegistration, Registration, RegistrationError};
pub use registry::{
    CapabilityError, DeregisterError, ProbeTargets, Readiness, Rebuilt, RegisterError, Registered, Registry,
    Renewal, Report, ReportError, ShareError, UnknownPool, UnknownResource,
};
pub use requirement::{Requirement, RequirementError, Requirements, Test};
pub use sides::VersionStatus;
pub use status::{
    Candidate, CandidateScore, Explanation, GuardStatus, LeftOut, Note, PoolStatus, ResourceState,
    ResourceStatus, Standing, StateCounts,
};
pub use utilization::{Field, KeyFault, RawUtilization, Utilization, UtilizationError};
pub use versions::{AbortConfig, Judge, SplitBy, SplitConfig, SplitError};

/// What a resource is and can do, by key.
pub type Labels = std::collections::BTreeMap<String, String>;

/// Most entries of a map that a resource sends: labels, dimensions, named metrics.
pub const ENTRIES_MAX: usize = 64;
/// Longest key of such a map, in bytes.
pub const KEY_BYTES_MAX: usize = 64;

/// Whether `key` may name a label, a dimension or a metric: 1 to [`KEY_BYTES_MAX`] characters of the alphabet of names.
fn key_fault(key: &str) -> Option<KeyFault> {
    if key.is_empty() {
        Some(KeyFault::Empty)
    } else if key.len() > KEY_BYTES_MAX {
        Some(KeyFault::TooLong { length: key.len() })
    } else {
        key.chars().find(|c| !is_key_character(*c)).map(|found| KeyFault::Character { found })
    }
}

fn is_key_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '/' | '-')
}
