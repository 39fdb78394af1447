//! The vocabulary that both halves of trimtab share, and the one value they share: the **allocation table**.
//!
//! ```text
//! control                                         dataplane
//! registry view -> policy -> AllocationTable      one Selector per worker
//!                 Publisher::publish  --swap-->   Reader::read, once per completion batch
//!                                                 AllocationTable::select -> Backend
//!            LiveFacts (flows open, failures) <-- OpenFlow guard, connect results
//! ```
//!
//! * A table is immutable. Membership ([`Members`]) is shared between generations; only weights and the sampling
//!   distribution are made anew when reports arrive.
//! * What the dataplane knows first (flows open, refused connects) lives in [`LiveFacts`], outside the swap, so that it
//!   is exact at every select and never lost by a rebuild.
//! * Nothing here reads a clock or a random source: [`Timestamp`] and seeds are arguments.
#![forbid(unsafe_code)]

mod affinity;
mod alias;
mod criteria;
mod decision;
mod id;
mod key;
mod live;
mod maglev;
mod policy;
mod probes;
mod publish;
mod select;
mod stride;
mod table;
pub mod telemetry;
mod time;

pub use affinity::{Affinity, Kept, ResourceTag};
pub use alias::AliasTable;
pub use criteria::{Considered, Criteria, Rule, Score};
pub use decision::{Decision, Look, Looks};
pub use id::{IdError, PoolName, ResourceId};
pub use key::{Client, FlowKey};
pub use live::{ConnectFailure, FlowTotals, LiveFacts, OpenFlow, Verdict};
pub use maglev::Maglev;
pub use policy::{Policy, UnknownPolicy};
pub use probes::{ProbeKnobs, ProbePool, SharedProbePool};
pub use publish::{Publisher, Reader};
pub use select::{Excluded, NoBackend, Selection, Selector};
pub use stride::Stride;
pub use table::{
    AllocationTable, Backend, BackendIndex, LeftOut, Members, Side, Split, SplitBy, TableSpec,
    WEIGHT_RATIO_MAX,
};
pub use time::Timestamp;
