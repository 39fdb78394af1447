//! What happened: who came and went, what operators did. The newest [`EVENTS_MAX`] are kept.

use rusqlite::params;

use crate::{StoreError, Tables};

/// Events that are kept; the oldest go.
pub const EVENTS_MAX: u64 = 10_000;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// A resource joined, or another process in its place.
    Registered,
    /// A resource left.
    Deregistered,
    /// A resource's lease ended without a report.
    Expired,
    /// An operator drained a resource.
    Drained,
    /// An operator ended a drain.
    Undrained,
    /// An operator entered capabilities.
    Capabilities,
    /// An operator set a version's share.
    VersionShare,
    /// A version was given no new flows any more, for being worse.
    VersionAborted,
    /// A resource's active checks began to fail.
    ChecksFail,
    /// A resource's active checks began to pass.
    ChecksPass,
}

impl EventKind {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::Registered,
        Self::Deregistered,
        Self::Expired,
        Self::Drained,
        Self::Undrained,
        Self::Capabilities,
        Self::VersionShare,
        Self::VersionAborted,
        Self::ChecksFail,
        Self::ChecksPass,
    ];

    /// Its name in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Deregistered => "deregistered",
            Self::Expired => "expired",
            Self::Drained => "drained",
            Self::Undrained => "undrained",
            Self::Capabilities => "capabilities",
            Self::VersionShare => "version_share",
            Self::VersionAborted => "version_aborted",
            Self::ChecksFail => "checks_fail",
            Self::ChecksPass => "checks_pass",
        }
    }
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// What.
    pub kind: EventKind,
    /// To which resource.
    pub resource: Option<String>,
    /// In which pool.
    pub pool: Option<String>,
    /// In words; never a secret.
    pub detail: String,
}

impl Tables<'_> {
    /// Keeps an event, and forgets the one that is [`EVENTS_MAX`] older.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn add_event(&self, event: &Event) -> Result<(), StoreError> {
        let number: Option<i64> = self.first(
            "INSERT INTO events (at_ms, kind, resource, pool, detail) VALUES (?1, ?2, ?3, ?4, ?5) RETURNING number",
            params![event.at_ms as i64, event.kind.name(), event.resource, event.pool, event.detail],
            |row| row.get(0),
        )?;
        let oldest = number.unwrap_or_default() - EVENTS_MAX as i64;
        self.execute("DELETE FROM events WHERE number <= ?1", [oldest])?;
        Ok(())
    }

    /// The newest `most` events, the newest first. Those of a kind that this version does not know are left out.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn newest_events(&self, most: u32) -> Result<Vec<Event>, StoreError> {
        let select = "SELECT at_ms, kind, resource, pool, detail FROM events ORDER BY number DESC LIMIT ?1";
        let rows = self.all(select, [most], |row| {
            let name: String = row.get(1)?;
            let Some(kind) = EventKind::ALL.into_iter().find(|kind| kind.name() == name) else {
                return Ok(None);
            };
            let at_ms = row.get::<_, i64>(0)? as u64;
            Ok(Some(Event { at_ms, kind, resource: row.get(2)?, pool: row.get(3)?, detail: row.get(4)? }))
        })?;
        Ok(rows.into_iter().flatten().collect())
    }
}
