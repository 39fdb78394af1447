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

mod alias;
mod id;
mod live;
mod publish;
mod select;
mod table;
pub mod telemetry;
mod time;

pub use alias::AliasTable;
pub use id::{IdError, PoolName, ResourceId};
pub use live::{ConnectFailure, LiveFacts, OpenFlow, Verdict};
pub use publish::{Publisher, Reader};
pub use select::{Excluded, NoBackend, Selection, Selector};
pub use table::{AllocationTable, Backend, BackendIndex, Members, Policy, UnknownPolicy, WEIGHT_RATIO_MAX};
pub use time::Timestamp;
