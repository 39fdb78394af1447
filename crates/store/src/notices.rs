//! Notices to resources, and what became of each.

use rusqlite::{Row, params};

use crate::{StoreError, Tables};

/// What is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoticeKind {
    /// The balancer is away.
    Unavailable,
    /// Another notice does not hold any more.
    Withdrawn,
    /// The resource shall end.
    ShutDown,
    /// The resource shall move flows away.
    ShedFlows,
}

impl NoticeKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Unavailable, Self::Withdrawn, Self::ShutDown, Self::ShedFlows];

    /// Its name in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unavailable => "balancer_unavailable",
            Self::Withdrawn => "withdrawn",
            Self::ShutDown => "shut_down",
            Self::ShedFlows => "shed_flows",
        }
    }
}

/// Whom a notice is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoticeTarget {
    /// All resources.
    All,
    /// Those of a pool.
    Pool(String),
    /// One.
    Resource(String),
}

/// A notice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Unique for all time.
    pub id: String,
    /// What is told.
    pub kind: NoticeKind,
    /// Whom.
    pub target: NoticeTarget,
    /// When it happens, in milliseconds since 1970.
    pub at_ms: u64,
    /// For how long, in milliseconds.
    pub lasts_ms: Option<u64>,
    /// How many flows are to be moved.
    pub flows: u32,
    /// Control addresses of those that stand in.
    pub alternatives: Vec<String>,
    /// Why, for people.
    pub reason: String,
    /// The id of the notice that it withdraws.
    pub withdraws: Option<String>,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Whether it was withdrawn.
    pub withdrawn: bool,
}

/// How far a resource's hook (its `notify_url`) has come with a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Nothing was to be posted.
    None,
    /// It has not taken the notice.
    Waiting,
    /// It has.
    Taken,
}

impl Hook {
    /// Every state.
    pub const ALL: [Self; 3] = [Self::None, Self::Waiting, Self::Taken];

    /// Its name in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Waiting => "waiting",
            Self::Taken => "taken",
        }
    }
}

/// What became of a notice at one resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoticeOutcome {
    /// The notice, by its id.
    pub notice: String,
    /// By its id; it need not be kept any more.
    pub resource: String,
    /// Whether it was told.
    pub told: bool,
    /// Whether it has said that it acts on it.
    pub taken: bool,
    /// Why it could not act, as it said.
    pub failure: Option<String>,
    /// What its hook did.
    pub hook: Hook,
    /// Posts that failed.
    pub attempts: u32,
    /// Why the last post failed.
    pub hook_failure: String,
    /// Since when, in milliseconds since 1970.
    pub changed_ms: u64,
}

impl Tables<'_> {
    /// Keeps a notice; of one that is kept already, whether it is withdrawn.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn put_notice(&self, notice: &Notice) -> Result<(), StoreError> {
        let (target, name) = match &notice.target {
            NoticeTarget::All => ("all", None),
            NoticeTarget::Pool(pool) => ("pool", Some(pool)),
            NoticeTarget::Resource(id) => ("resource", Some(id)),
        };
        self.execute(
            "INSERT INTO notices (id, kind, target, target_name, at_ms, lasts_ms, flows, alternatives, reason,
                                  withdraws, created_ms, withdrawn)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
             ON CONFLICT (id) DO UPDATE SET withdrawn = excluded.withdrawn",
            params![
                notice.id,
                notice.kind.name(),
                target,
                name,
                notice.at_ms as i64,
                notice.lasts_ms.map(|lasts| lasts as i64),
                notice.flows,
                notice.alternatives.join("\n"),
                notice.reason,
                notice.withdraws,
                notice.created_ms as i64,
                notice.withdrawn,
            ],
        )?;
        Ok(())
    }

    /// Keeps what became of a notice at a resource, in place of what was known. False: there is no such notice.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn put_notice_outcome(&self, outcome: &NoticeOutcome) -> Result<bool, StoreError> {
        let put = self.execute(
            "INSERT OR REPLACE INTO notice_outcomes
                 (notice, resource, told, taken, failure, hook, attempts, hook_failure, changed_ms)
             SELECT number, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9 FROM notices WHERE id = ?1",
            params![
                outcome.notice,
                outcome.resource,
                outcome.told,
                outcome.taken,
                outcome.failure,
                outcome.hook.name(),
                outcome.attempts,
                outcome.hook_failure,
                outcome.changed_ms as i64,
            ],
        )?;
        Ok(put > 0)
    }

    /// Forgets a notice, and what became of it. True: there was one.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn delete_notice(&self, id: &str) -> Result<bool, StoreError> {
        Ok(self.execute("DELETE FROM notices WHERE id = ?1", [id])? > 0)
    }

    /// Every notice, in the order in which they were kept.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn notices(&self) -> Result<Vec<Notice>, StoreError> {
        self.all(
            "SELECT id, kind, target, target_name, at_ms, lasts_ms, flows, alternatives, reason, withdraws,
                    created_ms, withdrawn
             FROM notices ORDER BY number",
            [],
            read_notice,
        )
    }

    /// What became of every notice.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn notice_outcomes(&self) -> Result<Vec<NoticeOutcome>, StoreError> {
        self.all(
            "SELECT id, resource, told, taken, failure, hook, attempts, hook_failure, changed_ms
             FROM notice_outcomes JOIN notices ON number = notice ORDER BY notice, resource",
            [],
            read_outcome,
        )
    }
}

fn read_notice(row: &Row<'_>) -> rusqlite::Result<Notice> {
    let kind: String = row.get(1)?;
    let target: String = row.get(2)?;
    let name: Option<String> = row.get(3)?;
    let alternatives: String = row.get(7)?;
    Ok(Notice {
        id: row.get(0)?,
        // The table takes no other.
        kind: NoticeKind::ALL
            .into_iter()
            .find(|known| known.name() == kind)
            .unwrap_or(NoticeKind::Unavailable),
        target: match (target.as_str(), name) {
            ("pool", Some(pool)) => NoticeTarget::Pool(pool),
            ("resource", Some(id)) => NoticeTarget::Resource(id),
            _ => NoticeTarget::All,
        },
        at_ms: row.get::<_, i64>(4)? as u64,
        lasts_ms: row.get::<_, Option<i64>>(5)?.map(|lasts| lasts as u64),
        flows: row.get(6)?,
        alternatives: alternatives.lines().map(str::to_owned).collect(),
        reason: row.get(8)?,
        withdraws: row.get(9)?,
        created_ms: row.get::<_, i64>(10)? as u64,
        withdrawn: row.get(11)?,
    })
}

fn read_outcome(row: &Row<'_>) -> rusqlite::Result<NoticeOutcome> {
    let hook: String = row.get(5)?;
    Ok(NoticeOutcome {
        notice: row.get(0)?,
        resource: row.get(1)?,
        told: row.get(2)?,
        taken: row.get(3)?,
        failure: row.get(4)?,
        // The table takes no other.
        hook: Hook::ALL.into_iter().find(|known| known.name() == hook).unwrap_or(Hook::None),
        attempts: row.get(6)?,
        hook_failure: row.get(7)?,
        changed_ms: row.get::<_, i64>(8)? as u64,
    })
}
