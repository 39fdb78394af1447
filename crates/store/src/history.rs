//! What resources reported: averages that weights are made of, and roll-ups over time.
//!
//! A row of `history` is a stretch of one tier's buckets of all dimensions of a resource: ten seconds, an hour of minutes, a
//! day of hours. What is in it is the registry's; a row of each bucket of each dimension would be a hundred thousand rows a
//! second with 10,000 resources, instead of ten thousand that are overwritten in place.

use std::collections::HashMap;

use rusqlite::params;

use crate::{StoreError, Tables};

/// A stretch of history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The width of its buckets, in milliseconds.
    pub tier_ms: u64,
    /// When its first bucket begins, in milliseconds since 1970.
    pub start_ms: u64,
    /// Its buckets, by dimension, as the registry writes them.
    pub buckets: Vec<u8>,
}

/// What a resource's weight is made of: averages over its reports.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimates {
    /// When the newest report came, in milliseconds since 1970.
    pub reported_ms: u64,
    /// Operations a second; `None`: it never reported any.
    pub operations: Option<f64>,
    /// Flows opened a second.
    pub flows_opened: f64,
    /// Flows open.
    pub flows_open: f64,
    /// Errors a second.
    pub errors: f64,
    /// Ratio.
    pub utilization: f64,
    /// Its weight as log2, where the mean of its pool is 0.
    pub log_weight: f64,
}

/// What is kept of a resource's newest reports.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// Whose.
    pub id: String,
    /// Of which incarnation; another's is not kept.
    pub incarnation: u64,
    /// Whether it wants new flows.
    pub ready: bool,
    /// As of the newest report.
    pub estimates: Estimates,
    /// Those that changed.
    pub history: Vec<Chunk>,
}

impl Tables<'_> {
    /// Keeps what a resource reported; of one that is not kept, or of another incarnation, nothing.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn keep(&self, kept: &Kept) -> Result<(), StoreError> {
        let Some(key) = self.key_of_incarnation(&kept.id, kept.incarnation)? else { return Ok(()) };
        self.execute(
            "UPDATE resources SET ready = ?2 WHERE key = ?1 AND ready <> ?2",
            params![key, kept.ready],
        )?;
        let estimates = &kept.estimates;
        self.execute(
            "INSERT OR REPLACE INTO estimates
             (resource, reported_ms, operations, flows_opened, flows_open, errors, utilization, log_weight)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                key,
                estimates.reported_ms as i64,
                estimates.operations,
                estimates.flows_opened,
                estimates.flows_open,
                estimates.errors,
                estimates.utilization,
                estimates.log_weight,
            ],
        )?;
        for chunk in &kept.history {
            self.execute(
                "INSERT INTO history (tier_ms, start_ms, resource, buckets) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT DO UPDATE SET buckets = excluded.buckets",
                params![chunk.tier_ms as i64, chunk.start_ms as i64, key, chunk.buckets],
            )?;
        }
        Ok(())
    }

    /// Forgets the stretches of a tier that begin before `start_ms`. Gives how many.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn prune_history(&self, tier_ms: u64, start_ms: u64) -> Result<usize, StoreError> {
        let delete = "DELETE FROM history WHERE tier_ms = ?1 AND start_ms < ?2";
        self.execute(delete, params![tier_ms as i64, start_ms as i64])
    }

    pub(crate) fn estimates(&self) -> Result<HashMap<i64, Estimates>, StoreError> {
        let rows = self.all(
            "SELECT resource, reported_ms, operations, flows_opened, flows_open, errors, utilization, log_weight
             FROM estimates",
            [],
            |row| {
                let estimates = Estimates {
                    reported_ms: row.get::<_, i64>(1)? as u64,
                    operations: row.get(2)?,
                    flows_opened: row.get(3)?,
                    flows_open: row.get(4)?,
                    errors: row.get(5)?,
                    utilization: row.get(6)?,
                    log_weight: row.get(7)?,
                };
                Ok((row.get(0)?, estimates))
            },
        )?;
        Ok(rows.into_iter().collect())
    }

    pub(crate) fn history(&self) -> Result<HashMap<i64, Vec<Chunk>>, StoreError> {
        let mut history: HashMap<i64, Vec<Chunk>> = HashMap::new();
        let rows = self.all(
            "SELECT resource, tier_ms, start_ms, buckets FROM history ORDER BY tier_ms, start_ms",
            [],
            |row| {
                let chunk = Chunk {
                    tier_ms: row.get::<_, i64>(1)? as u64,
                    start_ms: row.get::<_, i64>(2)? as u64,
                    buckets: row.get(3)?,
                };
                Ok((row.get(0)?, chunk))
            },
        )?;
        for (key, chunk) in rows {
            history.entry(key).or_default().push(chunk);
        }
        Ok(history)
    }
}
