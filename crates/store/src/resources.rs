//! Resources: what each registered, with its addresses, labels and scripts.

use std::collections::HashMap;

use rusqlite::params;

use crate::history::{Chunk, Estimates};
use crate::{Labels, StoreError, Tables};

/// A registration as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// Its id.
    pub id: String,
    /// The pool it joined.
    pub pool: String,
    /// Grows with every start of the resource.
    pub incarnation: u64,
    /// Of what it serves.
    pub version: String,
    /// Most flows at once; 0: as the pool says.
    pub flows_max: u32,
    /// How much it can bear compared with its peers.
    pub weight: f64,
    /// How often it reports, in milliseconds.
    pub report_interval_ms: u64,
    /// `ip:port` where it serves.
    pub address: String,
    /// `ip:port` where it answers probes.
    pub probe_address: Option<String>,
    /// Its own.
    pub labels: Labels,
    /// What it registered to be asked and told by.
    pub scripts: Vec<Script>,
    /// When it registered, in milliseconds since 1970.
    pub registered_ms: u64,
    /// Whose it is; `None`: nobody's in particular.
    pub owner: Option<String>,
}

/// How a resource is asked for its utilization, or told of notices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// Which.
    pub kind: ScriptKind,
    /// As whoever executes it writes it; the store does not look into it.
    pub specification: Vec<u8>,
}

/// What a script is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScriptKind {
    /// To ask for utilization.
    Utilization,
    /// To tell of notices.
    Notification,
}

impl ScriptKind {
    const fn name(self) -> &'static str {
        match self {
            Self::Utilization => "utilization",
            Self::Notification => "notification",
        }
    }
}

/// A resource as it was when the balancer ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Remembered {
    /// What it registered.
    pub resource: Resource,
    /// Whether it wanted new flows, by its newest report.
    pub ready: bool,
    /// Whether an operator drained it.
    pub drained: bool,
    /// What its weight was made of; `None`: it never reported.
    pub estimates: Option<Estimates>,
    /// In the order of their times.
    pub history: Vec<Chunk>,
}

impl Tables<'_> {
    /// Keeps a registration, in place of an older one of that id. What was kept of another incarnation, or at another
    /// address or in another pool, goes, but for an operator's drain.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn put_resource(&self, resource: &Resource) -> Result<(), StoreError> {
        let key = match self.key_of(&resource.id)? {
            Some(key) => {
                self.forget_another(key, resource)?;
                self.update(key, resource)?;
                for table in ["addresses", "labels", "scripts"] {
                    self.execute(&format!("DELETE FROM {table} WHERE resource = ?1"), [key])?;
                }
                key
            }
            None => self.insert(resource)?,
        };
        let address = "INSERT INTO addresses (resource, kind, address) VALUES (?1, ?2, ?3)";
        self.execute(address, params![key, "service", resource.address])?;
        if let Some(probe) = &resource.probe_address {
            self.execute(address, params![key, "probe", probe])?;
        }
        self.put_labels(key, &resource.labels)?;
        for script in &resource.scripts {
            let insert = "INSERT INTO scripts (resource, kind, specification) VALUES (?1, ?2, ?3)";
            self.execute(insert, params![key, script.kind.name(), script.specification])?;
        }
        Ok(())
    }

    fn forget_another(&self, key: i64, resource: &Resource) -> Result<(), StoreError> {
        let same = self.first(
            "SELECT 1 FROM resources JOIN addresses ON resource = key AND kind = 'service'
             WHERE key = ?1 AND incarnation = ?2 AND pool = ?3 AND address = ?4",
            params![key, resource.incarnation as i64, resource.pool, resource.address],
            |_| Ok(()),
        )?;
        if same.is_none() {
            for table in ["history", "estimates"] {
                self.execute(&format!("DELETE FROM {table} WHERE resource = ?1"), [key])?;
            }
            self.execute("UPDATE resources SET ready = 1 WHERE key = ?1", [key])?;
        }
        Ok(())
    }

    fn update(&self, key: i64, resource: &Resource) -> Result<(), StoreError> {
        self.execute(
            "UPDATE resources SET pool = ?2, incarnation = ?3, version = ?4, flows_max = ?5, weight = ?6,
             report_interval_ms = ?7, registered_ms = ?8, owner = ?9 WHERE key = ?1",
            params![
                key,
                resource.pool,
                resource.incarnation as i64,
                resource.version,
                resource.flows_max,
                resource.weight,
                resource.report_interval_ms as i64,
                resource.registered_ms as i64,
                resource.owner,
            ],
        )?;
        Ok(())
    }

    fn insert(&self, resource: &Resource) -> Result<i64, StoreError> {
        let key = self.first(
            "INSERT INTO resources
             (id, pool, incarnation, version, flows_max, weight, report_interval_ms, ready, drained, registered_ms,
              owner)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 1, 0, ?8, ?9) RETURNING key",
            params![
                resource.id,
                resource.pool,
                resource.incarnation as i64,
                resource.version,
                resource.flows_max,
                resource.weight,
                resource.report_interval_ms as i64,
                resource.registered_ms as i64,
                resource.owner,
            ],
            |row| row.get(0),
        )?;
        key.ok_or_else(|| StoreError::Fault("an insert gave no key".into()))
    }

    fn put_labels(&self, key: i64, labels: &Labels) -> Result<(), StoreError> {
        for (name, value) in labels {
            let insert = "INSERT INTO labels (resource, key, value) VALUES (?1, ?2, ?3)";
            self.execute(insert, params![key, name, value])?;
        }
        Ok(())
    }

    /// Amends a resource's own labels. One that is not kept, or of another incarnation, is left alone.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn set_labels(&self, id: &str, incarnation: u64, labels: &Labels) -> Result<(), StoreError> {
        let Some(key) = self.key_of_incarnation(id, incarnation)? else { return Ok(()) };
        self.execute("DELETE FROM labels WHERE resource = ?1", [key])?;
        self.put_labels(key, labels)
    }

    pub(crate) fn key_of_incarnation(&self, id: &str, incarnation: u64) -> Result<Option<i64>, StoreError> {
        self.first(
            "SELECT key FROM resources WHERE id = ?1 AND incarnation = ?2",
            params![id, incarnation as i64],
            |row| row.get(0),
        )
    }

    /// Forgets a resource: every row of it, history included. True: it was there.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn delete_resource(&self, id: &str) -> Result<bool, StoreError> {
        Ok(self.execute("DELETE FROM resources WHERE id = ?1", [id])? > 0)
    }

    /// Keeps whether an operator drains a resource.
    ///
    /// # Errors
    /// [`StoreError::Missing`]: it is not kept.
    pub fn set_drained(&self, id: &str, drained: bool) -> Result<(), StoreError> {
        match self.execute("UPDATE resources SET drained = ?2 WHERE id = ?1", params![id, drained])? {
            0 => Err(StoreError::Missing(format!("resource {id}"))),
            _ => Ok(()),
        }
    }

    /// Every resource, by id.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn resources(&self) -> Result<Vec<Remembered>, StoreError> {
        let mut parts = self.parts()?;
        let estimates = self.estimates()?;
        let mut history = self.history()?;
        let rows = self.all(
            "SELECT key, id, pool, incarnation, version, flows_max, weight, report_interval_ms, ready, drained,
             registered_ms, owner FROM resources ORDER BY id",
            [],
            |row| {
                let key: i64 = row.get(0)?;
                let Parts { address, probe_address, labels, scripts } = parts.remove(&key).unwrap_or_default();
                let resource = Resource {
                    id: row.get(1)?,
                    pool: row.get(2)?,
                    incarnation: row.get::<_, i64>(3)? as u64,
                    version: row.get(4)?,
                    flows_max: row.get(5)?,
                    weight: row.get(6)?,
                    report_interval_ms: row.get::<_, i64>(7)? as u64,
                    address,
                    probe_address,
                    labels,
                    scripts,
                    registered_ms: row.get::<_, i64>(10)? as u64,
                    owner: row.get(11)?,
                };
                Ok(Remembered {
                    resource,
                    ready: row.get(8)?,
                    drained: row.get(9)?,
                    estimates: estimates.get(&key).cloned(),
                    history: history.remove(&key).unwrap_or_default(),
                })
            },
        )?;
        Ok(rows)
    }

    fn parts(&self) -> Result<HashMap<i64, Parts>, StoreError> {
        type Three = (i64, String, String);
        let three = |row: &rusqlite::Row<'_>| Ok::<Three, _>((row.get(0)?, row.get(1)?, row.get(2)?));
        let mut parts: HashMap<i64, Parts> = HashMap::new();
        for (key, kind, address) in self.all("SELECT resource, kind, address FROM addresses", [], three)? {
            let parts = parts.entry(key).or_default();
            if kind == "probe" {
                parts.probe_address = Some(address);
            } else {
                parts.address = address;
            }
        }
        for (key, label, value) in self.all("SELECT resource, key, value FROM labels", [], three)? {
            parts.entry(key).or_default().labels.insert(label, value);
        }
        let scripts = self.all("SELECT resource, kind, specification FROM scripts", [], |row| {
            Ok::<(i64, String, Vec<u8>), _>((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
        for (key, kind, specification) in scripts {
            let notification = kind == ScriptKind::Notification.name();
            let kind = if notification { ScriptKind::Notification } else { ScriptKind::Utilization };
            parts.entry(key).or_default().scripts.push(Script { kind, specification });
        }
        Ok(parts)
    }
}

/// What is in tables of its own.
#[derive(Debug, Default)]
struct Parts {
    address: String,
    probe_address: Option<String>,
    labels: Labels,
    scripts: Vec<Script>,
}
