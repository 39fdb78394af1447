//! trimtab's store: what the balancer remembers across restarts, in one SQLite file.
//!
//! ```text
//! Store::open      locked, checked, migrated; or refused with what to do         once, before anything is served
//! Store::load      Contents: resources with their history, capabilities, settings   once
//! Store::start     Writer, and the thread that writes
//! Writer::run      a change -> bounded queue -> that thread -> one transaction for all that wait -> its answer
//! ```
//!
//! * It owns the file: its schema and its migrations, who may open it, when what was changed is on the disk. It does not own
//!   what the rows mean: it takes and gives plain values, and `control` parses them as it parses the wire.
//! * What a [`Writer`] has answered is on the disk (SQLite's WAL with `synchronous = FULL`): neither `kill -9` nor a power cut
//!   takes it back. Changes that come together are committed together, so that one flush of the disk does for all.
//! * A disk that is full, slow or broken never stalls a caller: the queues have bounds, at which a change is refused and
//!   history is dropped; both are counted ([`Stats`]).
//! * Times are milliseconds since 1970-01-01 (UTC), as the wall clock had them.
#![forbid(unsafe_code)]

mod error;
mod events;
mod history;
mod notices;
mod open;
mod resources;
mod schema;
mod settings;
mod tables;
mod tokens;
mod writer;

pub use error::{OpenError, StoreError};
pub use events::{EVENTS_MAX, Event, EventKind};
pub use history::{Chunk, Estimates, Kept};
pub use notices::{Hook, Notice, NoticeKind, NoticeOutcome, NoticeTarget};
pub use open::{Contents, Store};
pub use resources::{Remembered, Resource, Script, ScriptKind};
pub use schema::{APPLICATION_ID, VERSION};
pub use settings::VersionSetting;
pub use tables::Tables;
pub use tokens::{Role, Token};
pub use writer::{Answer, QUEUE_MAX, Stats, Writer};

/// What a resource is and can do, by key.
pub type Labels = std::collections::BTreeMap<String, String>;
