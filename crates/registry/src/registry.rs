//! The registry: every resource by id, each in the slot of a pool.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use allocation::{AllocationTable, LiveFacts, Policy, PoolName, ResourceId, Timestamp, Verdict};
use dashmap::{DashMap, Entry as Place};

use crate::columns::Row;
use crate::policy::{self, Survey};
use crate::pool::Pool;
use crate::{
    Candidate, Explanation, LeftOut, Note, PoolStatus, Registration, ResourceState, ResourceStatus, Standing,
    StateCounts, Utilization,
};

/// A pool, by configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolConfig {
    /// Its name.
    pub name: PoolName,
    /// How it selects.
    pub policy: Policy,
    /// Most flows at once of a resource that states no limit of its own; 0: none.
    pub flows_max_default: u32,
}

/// Bounds of what the registry keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most resources in one pool.
    pub resources_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { resources_max: 10_000 }
    }
}

/// What a registry is made with.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Every pool there will be.
    pub pools: Vec<PoolConfig>,
    /// Bounds.
    pub limits: Limits,
    /// How long a resource that joins established ones takes to its full weight.
    pub slow_start: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { pools: Vec::new(), limits: Limits::default(), slow_start: Duration::from_secs(10) }
    }
}

/// Why there can be no such registry: the operator's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Two pools of one name.
    #[error("there are two pools named {0}; names are unique")]
    DuplicatePool(PoolName),
}

/// Whether a resource wants new flows, by its own report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Readiness {
    /// It does.
    #[default]
    Ready,
    /// Its own service does not answer.
    NotReady,
}

/// One report, parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Whose.
    pub id: ResourceId,
    /// Of which incarnation.
    pub incarnation: u64,
    /// Whether it wants new flows.
    pub readiness: Readiness,
    /// How busy it is.
    pub utilization: Utilization,
}

/// A registration that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registered {
    /// It expires when no report arrives for this long.
    pub lease: Duration,
    /// False: it was there already.
    pub created: bool,
}

/// Why a resource may not register.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The resource's fault, or its operator's.
    #[error("there is no pool {pool}; {}", list(known))]
    UnknownPool {
        /// The name it gave.
        pool: PoolName,
        /// The pools there are.
        known: Vec<PoolName>,
    },
    /// The resource's fault: it is out of date, or two share an id.
    #[error(
        "resource {id} is registered with incarnation {registered}, newer than {given}: \
         another process registered under this id"
    )]
    OlderIncarnation {
        /// Which resource.
        id: ResourceId,
        /// Its incarnation here.
        registered: u64,
        /// The one that was given.
        given: u64,
    },
    /// A bound of ours.
    #[error("pool {pool} has {max} resources, as many as it takes")]
    PoolFull {
        /// Which pool.
        pool: PoolName,
        /// How many it takes.
        max: usize,
    },
}

/// Why a report was not accepted. The lease is neither renewed nor cut.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// We do not know it: the balancer restarted, or its lease expired.
    #[error("resource {id} is not registered here: register again")]
    NotRegistered {
        /// Which one.
        id: ResourceId,
    },
    /// It was replaced, or it did not register this incarnation.
    #[error("resource {id} is registered with incarnation {registered}, not {given}")]
    OtherIncarnation {
        /// Which one.
        id: ResourceId,
        /// Its incarnation here.
        registered: u64,
        /// The report's.
        given: u64,
    },
}

/// Why a resource was not removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeregisterError {
    /// The one that leaves is not the one that is here.
    #[error("resource {id} is registered with incarnation {registered}, newer than {given}: it stays")]
    OlderIncarnation {
        /// Which one.
        id: ResourceId,
        /// Its incarnation here.
        registered: u64,
        /// The one that was given.
        given: u64,
    },
}

/// No resource has this id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no resource {0}")]
pub struct UnknownResource(
    /// The id.
    pub ResourceId,
);

/// No pool has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no pool {pool}; {}", list(known))]
pub struct UnknownPool {
    /// The name.
    pub pool: PoolName,
    /// The pools there are.
    pub known: Vec<PoolName>,
}

fn list(known: &[PoolName]) -> String {
    if known.is_empty() {
        return "there are none".to_owned();
    }
    let names: Vec<&str> = known.iter().map(PoolName::as_str).collect();
    format!("there are {}", names.join(", "))
}

/// A pool's next table, to be published.
#[derive(Debug)]
pub struct Rebuilt {
    /// The pool's place in [`Config::pools`].
    pub pool: usize,
    /// The table.
    pub table: AllocationTable,
}

/// A resource's entry; what a rebuild needs is in its pool.
#[derive(Debug)]
struct Entry {
    registration: Arc<Registration>,
    pool: usize,
    slot: usize,
    live: Arc<LiveFacts>,
    utilization: Option<Arc<Utilization>>,
    reports_refused: u64,
}

/// All pools and all resources. Every method may be called from any thread.
#[derive(Debug)]
pub struct Registry {
    config: Config,
    pools: Vec<Mutex<Pool>>,
    pools_by_name: HashMap<PoolName, usize>,
    resources: DashMap<ResourceId, Entry>,
}

impl Registry {
    /// A registry with these pools and nobody in them.
    ///
    /// # Errors
    /// If two pools have one name.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let mut pools_by_name = HashMap::new();
        let mut pools = Vec::new();
        for (index, pool) in config.pools.iter().enumerate() {
            if pools_by_name.insert(pool.name.clone(), index).is_some() {
                return Err(ConfigError::DuplicatePool(pool.name.clone()));
            }
            pools.push(Mutex::new(Pool::new(pool.policy, pool.flows_max_default, config.slow_start)));
        }
        Ok(Self { config, pools, pools_by_name, resources: DashMap::new() })
    }

    /// Joins a pool, or renews what is there.
    ///
    /// A newer incarnation, or another address or pool, makes the registration anew, with everything learned forgotten;
    /// an operator's drain stays. The same incarnation with other limits or labels is amended in place.
    ///
    /// # Errors
    /// See [`RegisterError`]; nothing has changed then.
    pub fn register(&self, registration: Registration, now: Timestamp) -> Result<Registered, RegisterError> {
        let Some(&pool) = self.pools_by_name.get(registration.pool()) else {
            return Err(RegisterError::UnknownPool {
                pool: registration.pool().clone(),
                known: self.pool_names(),
            });
        };
        let lease = registration.lease();
        let registration = Arc::new(registration);
        match self.resources.entry(registration.id().clone()) {
            Place::Vacant(place) => {
                place.insert(self.join(pool, registration, false, now)?);
                Ok(Registered { lease, created: true })
            }
            Place::Occupied(mut place) => {
                let entry = place.get_mut();
                let (old, new) = (entry.registration.incarnation(), registration.incarnation());
                if new < old {
                    return Err(RegisterError::OlderIncarnation {
                        id: registration.id().clone(),
                        registered: old,
                        given: new,
                    });
                }
                let same_place = entry.pool == pool && entry.registration.address() == registration.address();
                if new == old && same_place {
                    self.amend(entry, registration, now);
                    return Ok(Registered { lease, created: false });
                }
                self.replace(entry, pool, registration, now)?;
                Ok(Registered { lease, created: true })
            }
        }
    }

    fn join(
        &self,
        index: usize,
        registration: Arc<Registration>,
        drained: bool,
        now: Timestamp,
    ) -> Result<Entry, RegisterError> {
        let mut pool = self.lock(index);
        let max = self.config.limits.resources_max;
        if pool.len() >= max {
            return Err(RegisterError::PoolFull { pool: registration.pool().clone(), max });
        }
        let slot = pool.join(&registration, drained, now);
        let live = Arc::clone(&pool.member(slot).backend.live);
        Ok(Entry { registration, pool: index, slot, live, utilization: None, reports_refused: 0 })
    }

    fn amend(&self, entry: &mut Entry, registration: Arc<Registration>, now: Timestamp) {
        let mut pool = self.lock(entry.pool);
        if entry.registration == registration {
            pool.renew(entry.slot, registration.lease(), now);
        } else {
            pool.amend(entry.slot, &registration, now);
            entry.registration = registration;
        }
    }

    fn replace(
        &self,
        entry: &mut Entry,
        index: usize,
        registration: Arc<Registration>,
        now: Timestamp,
    ) -> Result<(), RegisterError> {
        let mut old = self.lock(entry.pool);
        let drained = old.columns.drained[entry.slot];
        if entry.pool == index {
            old.replace(entry.slot, &registration, drained, now);
            let live = Arc::clone(&old.member(entry.slot).backend.live);
            let slot = entry.slot;
            *entry = Entry { registration, pool: index, slot, live, utilization: None, reports_refused: 0 };
            return Ok(());
        }
        drop(old);
        // Never two pools locked at once; the entry is ours all the while, so nobody sees it in neither or in both.
        let joined = self.join(index, registration, drained, now)?;
        self.lock(entry.pool).leave(entry.slot);
        *entry = joined;
        Ok(())
    }

    /// Records a report and renews the lease.
    ///
    /// # Errors
    /// See [`ReportError`]; nothing has changed then.
    pub fn report(&self, report: Report, now: Timestamp) -> Result<Standing, ReportError> {
        let Some(mut entry) = self.resources.get_mut(&report.id) else {
            return Err(ReportError::NotRegistered { id: report.id });
        };
        let registered = entry.registration.incarnation();
        if registered != report.incarnation {
            return Err(ReportError::OtherIncarnation {
                id: report.id,
                registered,
                given: report.incarnation,
            });
        }
        let mut pool = self.lock(entry.pool);
        pool.report(entry.slot, report.readiness == Readiness::Ready, &report.utilization, now);
        pool.renew(entry.slot, entry.registration.lease(), now);
        entry.utilization = Some(Arc::new(report.utilization));
        Ok(standing(&pool, &entry))
    }

    /// Counts a report that did not parse, and gives the resource's standing. The lease is neither renewed nor cut.
    ///
    /// # Errors
    /// As for a report that does parse.
    pub fn report_refused(&self, id: &ResourceId, incarnation: u64) -> Result<Standing, ReportError> {
        let Some(mut entry) = self.resources.get_mut(id) else {
            return Err(ReportError::NotRegistered { id: id.clone() });
        };
        let registered = entry.registration.incarnation();
        if registered != incarnation {
            return Err(ReportError::OtherIncarnation { id: id.clone(), registered, given: incarnation });
        }
        entry.reports_refused += 1;
        Ok(standing(&self.lock(entry.pool), &entry))
    }

    /// What a report would be answered with now.
    ///
    /// # Errors
    /// As for a report.
    pub fn standing(&self, id: &ResourceId, incarnation: u64) -> Result<Standing, ReportError> {
        let Some(entry) = self.resources.get(id) else {
            return Err(ReportError::NotRegistered { id: id.clone() });
        };
        let registered = entry.registration.incarnation();
        if registered != incarnation {
            return Err(ReportError::OtherIncarnation { id: id.clone(), registered, given: incarnation });
        }
        Ok(standing(&self.lock(entry.pool), &entry))
    }

    /// Removes a resource and everything kept of it. True: it was there.
    ///
    /// # Errors
    /// If a newer incarnation is registered.
    pub fn deregister(&self, id: &ResourceId, incarnation: u64) -> Result<bool, DeregisterError> {
        let Place::Occupied(place) = self.resources.entry(id.clone()) else {
            return Ok(false);
        };
        let registered = place.get().registration.incarnation();
        if incarnation < registered {
            return Err(DeregisterError::OlderIncarnation { id: id.clone(), registered, given: incarnation });
        }
        self.lock(place.get().pool).leave(place.get().slot);
        place.remove();
        Ok(true)
    }

    /// No new flows for it from the next table on. Gives the flows open on it.
    ///
    /// # Errors
    /// If there is no such resource.
    pub fn drain(&self, id: &ResourceId) -> Result<u32, UnknownResource> {
        self.set_drained(id, true)
    }

    /// Ends a drain. Gives the flows open on it.
    ///
    /// # Errors
    /// If there is no such resource.
    pub fn ready(&self, id: &ResourceId) -> Result<u32, UnknownResource> {
        self.set_drained(id, false)
    }

    fn set_drained(&self, id: &ResourceId, drained: bool) -> Result<u32, UnknownResource> {
        let Some(entry) = self.resources.get(id) else {
            return Err(UnknownResource(id.clone()));
        };
        self.lock(entry.pool).set_drained(entry.slot, drained);
        Ok(entry.live.flows_open())
    }

    /// Removes every resource whose lease is over, and everything kept of it.
    pub fn expire(&self, now: Timestamp) -> Vec<Arc<Registration>> {
        let mut expired = Vec::new();
        for index in 0..self.pools.len() {
            let ids: Vec<ResourceId> = {
                let mut pool = self.lock(index);
                let slots = pool.expired(now);
                slots.into_iter().map(|slot| pool.member(slot).backend.id.clone()).collect()
            };
            for id in ids {
                // Between the two locks it may have reported or left: look again.
                let Place::Occupied(place) = self.resources.entry(id) else { continue };
                let mut pool = self.lock(place.get().pool);
                if pool.columns.lease_until[place.get().slot] <= now {
                    pool.leave(place.get().slot);
                    expired.push(place.remove().registration);
                }
            }
        }
        expired
    }

    /// The next table of every pool that has reason for one. Tables of a pool come in the order of their generations,
    /// so one caller must do all the rebuilding and publishing.
    pub fn rebuild(&self, now: Timestamp) -> Vec<Rebuilt> {
        let rebuild = |pool: usize| self.lock(pool).rebuild(now).map(|table| Rebuilt { pool, table });
        (0..self.pools.len()).filter_map(rebuild).collect()
    }

    /// When [`Registry::expire`] or [`Registry::rebuild`] will have something to do, if nothing else happens.
    pub fn next_deadline(&self) -> Timestamp {
        (0..self.pools.len()).map(|index| self.lock(index).deadline()).min().unwrap_or(Timestamp::NEVER)
    }

    /// How many resources there are.
    pub fn len(&self) -> usize {
        self.resources.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// How many resources the pools keep rows of: always [`Registry::len`].
    pub fn rows(&self) -> usize {
        (0..self.pools.len()).map(|index| self.lock(index).len()).sum()
    }

    /// The names of all pools, sorted.
    pub fn pool_names(&self) -> Vec<PoolName> {
        let mut names: Vec<PoolName> = self.pools_by_name.keys().cloned().collect();
        names.sort();
        names
    }

    /// Every resource, sorted by pool and id; of one pool where it is given.
    ///
    /// # Errors
    /// If there is no such pool.
    pub fn resources(
        &self,
        pool: Option<&PoolName>,
        now: Timestamp,
    ) -> Result<Vec<ResourceStatus>, UnknownPool> {
        let only = pool.map(|name| self.index(name)).transpose()?;
        let mut all: Vec<ResourceStatus> = self
            .resources
            .iter()
            .filter(|entry| only.is_none_or(|only| entry.pool == only))
            .map(|entry| resource_status(&self.lock(entry.pool), &entry, now))
            .collect();
        all.sort_by(|a, b| {
            let key = |status: &ResourceStatus| {
                (status.registration.pool().clone(), status.registration.id().clone())
            };
            key(a).cmp(&key(b))
        });
        Ok(all)
    }

    /// Every pool, sorted by name.
    pub fn pools(&self, now: Timestamp) -> Vec<PoolStatus> {
        let mut all: Vec<PoolStatus> =
            (0..self.pools.len()).map(|index| self.pool_status(index, now)).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn pool_status(&self, index: usize, now: Timestamp) -> PoolStatus {
        let pool = self.lock(index);
        let mut states = StateCounts::default();
        let mut flows_open = 0;
        for (slot, member) in pool.members.iter().enumerate() {
            if let Some(member) = member {
                states.count(state_of(&pool.columns.row(slot), &member.backend.live));
                flows_open += u64::from(member.backend.live.flows_open());
            }
        }
        PoolStatus {
            name: self.config.pools[index].name.clone(),
            policy: pool.policy,
            generation: pool.generation,
            states,
            flows_open,
            guard: guard(&pool, &pool.survey(now)),
        }
    }

    /// Why the next flow of a pool would go where.
    ///
    /// # Errors
    /// If there is no such pool.
    pub fn explain(&self, name: &PoolName, now: Timestamp) -> Result<Explanation, UnknownPool> {
        let index = self.index(name)?;
        let (survey, policy, generation, unit) = {
            let pool = self.lock(index);
            (pool.survey(now), pool.policy, pool.generation, pool.unit)
        };
        let of_pool = self.resources.iter().filter(|entry| entry.pool == index);
        let mut candidates: Vec<Candidate> =
            of_pool.map(|entry| candidate(&self.lock(index), &entry, &survey, now)).collect();
        candidates.sort_by(|a, b| {
            let key = |c: &Candidate| (c.left_out.is_some(), c.cost);
            let ((out_a, cost_a), (out_b, cost_b)) = (key(a), key(b));
            out_a.cmp(&out_b).then(cost_a.total_cmp(&cost_b)).then_with(|| a.id.cmp(&b.id))
        });
        let guard = guard(&self.lock(index), &survey);
        Ok(Explanation { pool: name.clone(), policy, generation, guard, unit, candidates })
    }

    fn index(&self, name: &PoolName) -> Result<usize, UnknownPool> {
        let unknown = || UnknownPool { pool: name.clone(), known: self.pool_names() };
        self.pools_by_name.get(name).copied().ok_or_else(unknown)
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, Pool> {
        // A panic under the lock is a fault of ours; what is in the pool is still the best there is.
        self.pools[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reports move weights under `adaptive` alone, so nothing is held elsewhere.
fn guard(pool: &Pool, survey: &Survey) -> Option<policy::Guard> {
    survey.guard.filter(|_| pool.policy == Policy::Adaptive)
}

fn state_of(row: &Row, live: &LiveFacts) -> ResourceState {
    if row.drained {
        ResourceState::Draining
    } else if !row.ready {
        ResourceState::NotReady
    } else if live.is_down() {
        ResourceState::Down
    } else {
        ResourceState::Ready
    }
}

fn standing(pool: &Pool, entry: &Entry) -> Standing {
    let row = &pool.columns.row(entry.slot);
    Standing {
        state: state_of(row, &entry.live),
        weight: f64::from(row.weight),
        share: pool.share(entry.slot),
        flows_open: entry.live.flows_open(),
    }
}

fn report_age(row: &Row, now: Timestamp) -> Option<Duration> {
    (row.reported != Timestamp::NEVER).then(|| now.since(row.reported))
}

fn resource_status(pool: &Pool, entry: &Entry, now: Timestamp) -> ResourceStatus {
    let row = &pool.columns.row(entry.slot);
    ResourceStatus {
        registration: Arc::clone(&entry.registration),
        standing: standing(pool, entry),
        flows_opened: entry.live.flows_opened(),
        connect_failures: entry.live.connect_failures(),
        report_age: report_age(row, now),
        utilization: entry.utilization.clone(),
        lease_left: row.lease_until.since(now),
        reports_refused: entry.reports_refused,
    }
}

fn candidate(pool: &Pool, entry: &Entry, survey: &Survey, now: Timestamp) -> Candidate {
    let row = &pool.columns.row(entry.slot);
    let standing = standing(pool, entry);
    let flows_max = pool.member(entry.slot).backend.flows_max;
    let left_out = if row.drained {
        Some(LeftOut::Draining)
    } else if !row.ready {
        Some(LeftOut::NotReady)
    } else if row.lease_until <= now {
        Some(LeftOut::Expired)
    } else {
        match entry.live.verdict(flows_max, now) {
            Verdict::Usable | Verdict::Probe => None,
            Verdict::Paused => Some(LeftOut::Paused),
            Verdict::Full => Some(LeftOut::Full { flows_max }),
        }
    };
    Candidate {
        id: entry.registration.id().clone(),
        address: entry.registration.address(),
        cost: (f64::from(standing.flows_open) + 1.0) / standing.weight,
        standing,
        left_out,
        utilization_ewma: f64::from(row.utilization),
        rate_ewma: f64::from(row.rate(pool.unit)),
        report_age: report_age(row, now),
        slow_start: f64::from(row.slow_start(pool.slow_start(), now)),
        notes: notes(pool, row, survey, now),
        utilization: entry.utilization.clone(),
    }
}

fn notes(pool: &Pool, row: &Row, survey: &Survey, now: Timestamp) -> Vec<Note> {
    let mut notes = Vec::new();
    if pool.policy != Policy::Adaptive {
        notes.push(Note::Registered);
    } else if row.reported == Timestamp::NEVER {
        notes.push(Note::NeverReported);
    } else if row.is_stale(now) {
        notes.push(Note::Stale);
    } else if let Some(guard) = survey.guard {
        notes.push(Note::Held(guard));
    } else if survey.utilization_belief(row.utilization) == 0.0 {
        notes.push(Note::Idle);
    }
    if row.slow_start(pool.slow_start(), now) < 1.0 {
        notes.push(Note::SlowStart);
    }
    notes
}
