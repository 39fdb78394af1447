//! trimtab in DNS: publishing a balancer, and finding one.
//!
//! ```text
//! balancer  Publication -> plan (what should stand there) -> exchange (signed, UDP or TCP) -> the zone's primary
//! agent     any resolver -> Finder (SRV, addresses) -> Found: groups by priority
//! ```
//!
//! * [`Publisher`] keeps `_trimtab._tcp.ZONE` SRV, further services' SRV and the balancer's A and AAAA in zones, by dynamic
//!   updates (RFC 2136) with a TSIG key (RFC 8945). Balancers never overwrite each other's records.
//! * [`Finder`] looks SRV up (RFC 2782), with the addresses of the targets, and says for how long that holds.
//! * It owns no policy: who registers with whom is the agent's to decide, what is published the configuration's.
#![forbid(unsafe_code)]

mod addresses;
mod error;
mod exchange;
mod find;
mod key;
mod name;
mod owner;
mod plan;
mod publish;
mod status;

pub use crate::addresses::Addresses;
pub use crate::error::UpdateError;
pub use crate::find::{FindError, Finder, Found, Group, Target};
pub use crate::key::{KeyError, TsigKey};
pub use crate::name::{Domain, HostLabel, NameError, ServiceName};
pub use crate::plan::{Owner, Service};
pub use crate::publish::{Publication, Publisher, TTL_DEFAULT, WITHDRAW_WITHIN};
pub use crate::status::{PublishState, Status, Statuses};
