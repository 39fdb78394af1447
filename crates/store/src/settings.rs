//! What administrators changed while the balancer ran: capabilities of resources, shares of versions.

use std::collections::BTreeMap;

use rusqlite::params;

use crate::{Labels, StoreError, Tables};

/// A version of a pool's split, as it was set or aborted at run time.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionSetting {
    /// The pool.
    pub pool: String,
    /// The version.
    pub version: String,
    /// Its share in the configuration when this was set, 0 to 1: where the file says something else later, the file holds.
    pub configured: f64,
    /// Its share, 0 to 1.
    pub share: f64,
    /// In what it was worse, its value and the baseline's; `None`: it is not aborted.
    pub aborted: Option<(String, f64, f64)>,
}

impl Tables<'_> {
    /// Keeps what an administrator entered for a resource, whether it has joined or not; all of it, in place of what was
    /// kept. Nothing: it is forgotten.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn put_capabilities(&self, id: &str, labels: &Labels) -> Result<(), StoreError> {
        self.execute("DELETE FROM capabilities WHERE id = ?1", [id])?;
        for (key, value) in labels {
            let insert = "INSERT INTO capabilities (id, key, value) VALUES (?1, ?2, ?3)";
            self.execute(insert, params![id, key, value])?;
        }
        Ok(())
    }

    /// What administrators entered, by resource.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn capabilities(&self) -> Result<BTreeMap<String, Labels>, StoreError> {
        let mut capabilities: BTreeMap<String, Labels> = BTreeMap::new();
        let rows = self.all("SELECT id, key, value FROM capabilities", [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
        for (id, key, value) in rows {
            capabilities.entry(id).or_default().insert(key, value);
        }
        Ok(capabilities)
    }

    /// Keeps a version's share.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn put_version(&self, setting: &VersionSetting) -> Result<(), StoreError> {
        let aborted = setting.aborted.as_ref();
        self.execute(
            "INSERT OR REPLACE INTO version_settings
             (pool, version, configured, share, abort_measure, abort_value, abort_baseline)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![
                setting.pool,
                setting.version,
                setting.configured,
                setting.share,
                aborted.map(|(measure, _, _)| measure),
                aborted.map(|(_, value, _)| value),
                aborted.map(|(_, _, baseline)| baseline),
            ],
        )?;
        Ok(())
    }

    /// Forgets what was set for a version. True: there was something.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn delete_version(&self, pool: &str, version: &str) -> Result<bool, StoreError> {
        let delete = "DELETE FROM version_settings WHERE pool = ?1 AND version = ?2";
        Ok(self.execute(delete, [pool, version])? > 0)
    }

    /// Every version that was set or aborted.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn versions(&self) -> Result<Vec<VersionSetting>, StoreError> {
        self.all(
            "SELECT pool, version, configured, share, abort_measure, abort_value, abort_baseline
             FROM version_settings ORDER BY pool, version",
            [],
            |row| {
                let measure: Option<String> = row.get(4)?;
                let (value, baseline): (Option<f64>, Option<f64>) = (row.get(5)?, row.get(6)?);
                Ok(VersionSetting {
                    pool: row.get(0)?,
                    version: row.get(1)?,
                    configured: row.get(2)?,
                    share: row.get(3)?,
                    aborted: measure.map(|m| (m, value.unwrap_or_default(), baseline.unwrap_or_default())),
                })
            },
        )
    }
}
