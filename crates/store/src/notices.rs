//! Notices to resources, and what became of each.

use rusqlite::{Row, params};

use crate::{StoreError, Tables};

/// What became of a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoticeState {
    /// It has not reached its resource.
    Waiting,
    /// It has.
    Delivered,
    /// The resource has said that it acts on it.
    Taken,
    /// It is not tried any more.
    Failed,
}

impl NoticeState {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Waiting, Self::Delivered, Self::Taken, Self::Failed];

    /// Its name in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Delivered => "delivered",
            Self::Taken => "taken",
            Self::Failed => "failed",
        }
    }
}

/// A notice to one resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Unique.
    pub id: String,
    /// To whom.
    pub resource: String,
    /// In the words of whoever sends it.
    pub kind: String,
    /// JSON.
    pub payload: String,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// What became of it.
    pub state: NoticeState,
    /// Since when, in milliseconds since 1970.
    pub changed_ms: u64,
}

const SELECT: &str = "SELECT notices.id, resources.id, notices.kind, payload, created_ms, state, changed_ms
                      FROM notices JOIN resources ON resources.key = resource";

impl Tables<'_> {
    /// Keeps a new notice.
    ///
    /// # Errors
    /// [`StoreError::Missing`]: its resource is not kept. [`StoreError::Conflict`]: there is one of that id.
    pub fn insert_notice(&self, notice: &Notice) -> Result<(), StoreError> {
        let missing = || StoreError::Missing(format!("resource {}", notice.resource));
        let key = self.key_of(&notice.resource)?.ok_or_else(missing)?;
        self.execute(
            "INSERT INTO notices (id, resource, kind, payload, created_ms, state, changed_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![
                notice.id,
                key,
                notice.kind,
                notice.payload,
                notice.created_ms as i64,
                notice.state.name(),
                notice.changed_ms as i64,
            ],
        )?;
        Ok(())
    }

    /// Amends what became of a notice. False: there is none of that id.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn set_notice_state(&self, id: &str, state: NoticeState, now_ms: u64) -> Result<bool, StoreError> {
        let update = "UPDATE notices SET state = ?2, changed_ms = ?3 WHERE id = ?1";
        Ok(self.execute(update, params![id, state.name(), now_ms as i64])? > 0)
    }

    /// Forgets a notice. True: there was one.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn delete_notice(&self, id: &str) -> Result<bool, StoreError> {
        Ok(self.execute("DELETE FROM notices WHERE id = ?1", [id])? > 0)
    }

    /// Forgets notices that are neither waiting nor changed since then. Gives how many.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn prune_notices(&self, before_ms: u64) -> Result<usize, StoreError> {
        self.execute("DELETE FROM notices WHERE state <> 'waiting' AND changed_ms < ?1", [before_ms as i64])
    }

    /// Every notice, the oldest first; of one resource where it is given.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn notices(&self, resource: Option<&str>) -> Result<Vec<Notice>, StoreError> {
        let sql = format!("{SELECT} WHERE ?1 IS NULL OR resources.id = ?1 ORDER BY created_ms, notices.id");
        self.all(&sql, [resource], read)
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<Notice> {
    let state: String = row.get(5)?;
    Ok(Notice {
        id: row.get(0)?,
        resource: row.get(1)?,
        kind: row.get(2)?,
        payload: row.get(3)?,
        created_ms: row.get::<_, i64>(4)? as u64,
        // The table takes no other.
        state: NoticeState::ALL
            .into_iter()
            .find(|known| known.name() == state)
            .unwrap_or(NoticeState::Waiting),
        changed_ms: row.get::<_, i64>(6)? as u64,
    })
}
