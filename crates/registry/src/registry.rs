//! The registry: every resource by id, each in the slot of a pool.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use allocation::{
    AllocationTable, Backend, BackendIndex, LiveFacts, PoolName, ResourceId, SharedProbePool, Timestamp,
    Verdict,
};
use dashmap::{DashMap, Entry as Place};

use crate::columns::Row;
use crate::criteria::Criterion;
use crate::health::{self, Flows};
use crate::past::CriterionState;
use crate::policy::{self, Survey};
use crate::pool::{Member, Pool};
use crate::scores::FLOWS_ASSUMED;
use crate::{
    Candidate, CandidateScore, Config, ConfigError, ENTRIES_MAX, Explanation, GuardStatus, Labels, LeftOut,
    Note, Owner, PoolStatus, Registration, ResourceState, ResourceStatus, Standing, StateCounts, Utilization,
    VersionStatus, effective_labels,
};

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
    /// To how many balancers the resource reports, this one among them; 0 stands for 1.
    pub balancers: u32,
    /// All of its labels from now on; `None`: as they were.
    pub labels: Option<Labels>,
}

/// A sign of life without utilization, of a resource whose utilization is fetched.
#[derive(Debug, Clone, PartialEq)]
pub struct Renewal {
    /// Whose.
    pub id: ResourceId,
    /// Of which incarnation.
    pub incarnation: u64,
    /// Whether it wants new flows.
    pub readiness: Readiness,
    /// All of its labels from now on; `None`: as they were.
    pub labels: Option<Labels>,
}

/// A registration that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registered {
    /// It expires when no report arrives for this long.
    pub lease: Duration,
    /// False: it was there already.
    pub created: bool,
    /// False: it was there already, and said the same.
    pub changed: bool,
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
    /// The resource's fault: it took another's id.
    #[error("resource {id} is registered by {owner}: nobody else may register under its id")]
    OtherOwner {
        /// Which resource.
        id: ResourceId,
        /// Whose it is.
        owner: Owner,
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
    /// It is another's.
    #[error("resource {id} is registered by {owner}: nobody else may deregister it")]
    OtherOwner {
        /// Which one.
        id: ResourceId,
        /// Whose it is.
        owner: Owner,
    },
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

/// Why a version's share was not set: the administrator's to mend.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ShareError {
    /// There is no such pool.
    #[error(transparent)]
    UnknownPool(#[from] UnknownPool),
    /// The pool has no split.
    #[error("the pool is not split between versions: give it [pool.split] in the configuration")]
    NotSplit,
    /// The split refuses it.
    #[error(transparent)]
    Split(#[from] crate::SplitError),
}

fn list(known: &[PoolName]) -> String {
    if known.is_empty() {
        return "there are none".to_owned();
    }
    let names: Vec<&str> = known.iter().map(PoolName::as_str).collect();
    format!("there are {}", names.join(", "))
}

/// A pool's next tables, to be published.
#[derive(Debug)]
pub struct Rebuilt {
    /// The pool's place in [`Config::pools`].
    pub pool: usize,
    /// One for each set of requirements: the pool's own, then [`PoolConfig::tables`] in their order.
    pub tables: Vec<AllocationTable>,
}

/// Where the resources of a pool answer probes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeTargets {
    /// Of the members that indexes mean.
    pub epoch: u64,
    /// Those that answer any.
    pub addresses: Vec<(BackendIndex, SocketAddr)>,
    /// Flows opened to all of the pool's resources that are registered now.
    pub flows_opened: u64,
}

/// Why capabilities were not set: the administrator's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// More labels than [`ENTRIES_MAX`].
    #[error("the resource would have {count} labels set; it takes at most {ENTRIES_MAX}: remove some")]
    Labels {
        /// How many there would be.
        count: usize,
    },
    /// A bound of ours.
    #[error(
        "labels are set for {max} resources, as many as the balancer keeps: remove those of resources that are gone"
    )]
    Resources {
        /// How many.
        max: usize,
    },
}

/// A resource's entry; what a rebuild needs is in its pool.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) registration: Arc<Registration>,
    /// Its own, by its registration or its newest report that had any.
    pub(crate) own_labels: Labels,
    /// In force: its own with an administrator's on top.
    pub(crate) labels: Arc<Labels>,
    pub(crate) pool: usize,
    pub(crate) slot: usize,
    pub(crate) live: Arc<LiveFacts>,
    pub(crate) utilization: Option<Arc<Utilization>>,
    pub(crate) reports_refused: u64,
}

/// All pools and all resources. Every method may be called from any thread.
#[derive(Debug)]
pub struct Registry {
    pub(crate) config: Config,
    pub(crate) pools: Vec<Mutex<Pool>>,
    pub(crate) pools_by_name: HashMap<PoolName, usize>,
    pub(crate) resources: DashMap<ResourceId, Entry>,
    /// Labels that an administrator entered, whether the resource is here or not.
    pub(crate) capabilities: Mutex<BTreeMap<ResourceId, Labels>>,
    /// Bytes of history over all resources.
    pub(crate) history_bytes: AtomicUsize,
    /// Series that were not begun for want of room.
    history_refused: AtomicU64,
}

impl Registry {
    /// A registry with these pools and nobody in them.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let mut pools_by_name = HashMap::new();
        let mut pools = Vec::new();
        for (index, pool) in config.pools.iter().enumerate() {
            if pools_by_name.insert(pool.name.clone(), index).is_some() {
                return Err(ConfigError::DuplicatePool(pool.name.clone()));
            }
            pool.check()?;
            pools.push(Mutex::new(Pool::new(pool.clone())));
        }
        Ok(Self {
            config,
            pools,
            pools_by_name,
            resources: DashMap::new(),
            capabilities: Mutex::default(),
            history_bytes: AtomicUsize::new(0),
            history_refused: AtomicU64::new(0),
        })
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
                Ok(Registered { lease, created: true, changed: true })
            }
            Place::Occupied(mut place) => {
                let entry = place.get_mut();
                if let Some(owner) = other_owner(&entry.registration, registration.owner()) {
                    return Err(RegisterError::OtherOwner { id: registration.id().clone(), owner });
                }
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
                    let changed = entry.registration != registration;
                    self.amend(entry, registration, now);
                    return Ok(Registered { lease, created: false, changed });
                }
                self.replace(entry, pool, registration, now)?;
                Ok(Registered { lease, created: true, changed: true })
            }
        }
    }

    pub(crate) fn join(
        &self,
        index: usize,
        registration: Arc<Registration>,
        drained: bool,
        now: Timestamp,
    ) -> Result<Entry, RegisterError> {
        let labels = self.in_force(registration.id(), registration.labels());
        let mut pool = self.lock(index);
        let max = self.config.limits.resources_max;
        if pool.len() >= max {
            return Err(RegisterError::PoolFull { pool: registration.pool().clone(), max });
        }
        let fit = pool.fit(&labels, registration.version());
        let slot = pool.join(&registration, fit, drained, now);
        Ok(entry(registration, labels, index, slot, &pool))
    }

    fn amend(&self, entry: &mut Entry, registration: Arc<Registration>, now: Timestamp) {
        let labels = self.in_force(registration.id(), registration.labels());
        let mut pool = self.lock(entry.pool);
        if entry.registration == registration {
            pool.renew(entry.slot, registration.lease(), now);
            pool.confirm(entry.slot);
        } else {
            pool.amend(entry.slot, &registration, now);
            let fit = pool.fit(&labels, registration.version());
            pool.refit(entry.slot, fit);
            (entry.own_labels, entry.labels) = (registration.labels().clone(), labels);
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
        let labels = self.in_force(registration.id(), registration.labels());
        let mut old = self.lock(entry.pool);
        let drained = old.columns.drained[entry.slot];
        if entry.pool == index {
            let fit = old.fit(&labels, registration.version());
            self.forget(&old, entry.slot);
            old.replace(entry.slot, &registration, fit, drained, now);
            *entry = self::entry(registration, labels, index, entry.slot, &old);
            return Ok(());
        }
        drop(old);
        // Never two pools locked at once; the entry is ours all the while, so nobody sees it in neither or in both.
        let joined = self.join(index, registration, drained, now)?;
        self.leave(entry);
        *entry = joined;
        Ok(())
    }

    /// Gives an entry's slot back, and all that was kept in it.
    fn leave(&self, entry: &Entry) {
        let mut pool = self.lock(entry.pool);
        self.forget(&pool, entry.slot);
        pool.leave(entry.slot);
    }

    /// The slot's history is about to go.
    fn forget(&self, pool: &Pool, slot: usize) {
        self.history_bytes.fetch_sub(pool.member(slot).past.bytes(), Relaxed);
    }

    /// A resource's own labels with an administrator's on top.
    fn in_force(&self, id: &ResourceId, own: &Labels) -> Arc<Labels> {
        let capabilities = self.capabilities.lock().unwrap_or_else(PoisonError::into_inner);
        match capabilities.get(id) {
            Some(administrator) => Arc::new(effective_labels(own, administrator)),
            None => Arc::new(own.clone()),
        }
    }

    /// Sets labels of a resource, whether it has joined or not; they stand above its own from the next table on. Gives all
    /// that are set, and whether it has joined.
    ///
    /// # Errors
    /// See [`CapabilityError`]; nothing has changed then.
    pub fn set_capabilities(
        &self,
        id: &ResourceId,
        set: &Labels,
        remove: &[String],
    ) -> Result<(Labels, bool), CapabilityError> {
        let mut entry = self.resources.get_mut(id);
        let labels = {
            let mut all = self.capabilities.lock().unwrap_or_else(PoisonError::into_inner);
            let mut labels = all.get(id).cloned().unwrap_or_default();
            labels.retain(|key, _| !remove.contains(key));
            labels.extend(set.iter().map(|(key, value)| (key.clone(), value.clone())));
            if labels.len() > ENTRIES_MAX {
                return Err(CapabilityError::Labels { count: labels.len() });
            }
            let max = self.config.limits.capabilities_max;
            if labels.is_empty() {
                all.remove(id);
            } else if all.len() >= max && !all.contains_key(id) {
                return Err(CapabilityError::Resources { max });
            } else {
                all.insert(id.clone(), labels.clone());
            }
            labels
        };
        if let Some(entry) = &mut entry {
            self.refit(entry);
        }
        Ok((labels, entry.is_some()))
    }

    /// What an administrator entered, and whether the resource has joined; sorted by id.
    pub fn capabilities(&self) -> Vec<(ResourceId, Labels, bool)> {
        let all = self.capabilities.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.into_iter()
            .map(|(id, labels)| {
                let joined = self.resources.contains_key(&id);
                (id, labels, joined)
            })
            .collect()
    }

    /// Puts a resource where its labels say.
    fn refit(&self, entry: &mut Entry) {
        entry.labels = self.in_force(entry.registration.id(), &entry.own_labels);
        let mut pool = self.lock(entry.pool);
        let fit = pool.fit(&entry.labels, entry.registration.version());
        pool.refit(entry.slot, fit);
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
        if let Some(labels) = report.labels.as_ref().filter(|labels| **labels != entry.own_labels) {
            entry.own_labels = labels.clone();
            self.refit(&mut entry);
            self.lock(entry.pool).relabelled(entry.slot, labels.clone());
        }
        let mut pool = self.lock(entry.pool);
        let before = pool.member(entry.slot).past.bytes();
        let room = self.history_bytes.load(Relaxed) < self.config.limits.history_bytes_max;
        let refused = pool.report(entry.slot, &report, room, now);
        if refused > 0 {
            self.history_refused.fetch_add(refused, Relaxed);
        }
        self.history_bytes.fetch_add(pool.member(entry.slot).past.bytes().wrapping_sub(before), Relaxed);
        pool.renew(entry.slot, entry.registration.lease(), now);
        entry.utilization = Some(Arc::new(report.utilization));
        Ok(standing(&pool, &entry, now))
    }

    /// Renews the lease of a resource whose utilization comes otherwise, and takes in what else it says.
    ///
    /// # Errors
    /// See [`ReportError`]; nothing has changed then.
    pub fn renew(&self, renewal: Renewal, now: Timestamp) -> Result<Standing, ReportError> {
        let Some(mut entry) = self.resources.get_mut(&renewal.id) else {
            return Err(ReportError::NotRegistered { id: renewal.id });
        };
        let registered = entry.registration.incarnation();
        if registered != renewal.incarnation {
            return Err(ReportError::OtherIncarnation {
                id: renewal.id,
                registered,
                given: renewal.incarnation,
            });
        }
        if let Some(labels) = renewal.labels.filter(|labels| *labels != entry.own_labels) {
            entry.own_labels = labels.clone();
            self.refit(&mut entry);
            self.lock(entry.pool).relabelled(entry.slot, labels);
        }
        let mut pool = self.lock(entry.pool);
        pool.confirm(entry.slot);
        pool.set_ready(entry.slot, renewal.readiness == Readiness::Ready);
        pool.renew(entry.slot, entry.registration.lease(), now);
        Ok(standing(&pool, &entry, now))
    }

    /// A resource's registration, and the flows that were opened to it since.
    pub fn registered(&self, id: &ResourceId) -> Option<(Arc<Registration>, u64)> {
        let entry = self.resources.get(id)?;
        Some((Arc::clone(&entry.registration), entry.live.flows_opened()))
    }

    /// Of its newest accepted report, by dimension.
    pub fn utilization(&self, id: &ResourceId) -> Option<Arc<Utilization>> {
        self.resources.get(id)?.utilization.clone()
    }

    /// Counts a report that did not parse, and gives the resource's standing. The lease is neither renewed nor cut.
    ///
    /// # Errors
    /// As for a report that does parse.
    pub fn report_refused(
        &self,
        id: &ResourceId,
        incarnation: u64,
        now: Timestamp,
    ) -> Result<Standing, ReportError> {
        let Some(mut entry) = self.resources.get_mut(id) else {
            return Err(ReportError::NotRegistered { id: id.clone() });
        };
        let registered = entry.registration.incarnation();
        if registered != incarnation {
            return Err(ReportError::OtherIncarnation { id: id.clone(), registered, given: incarnation });
        }
        entry.reports_refused += 1;
        Ok(standing(&self.lock(entry.pool), &entry, now))
    }

    /// What a report would be answered with now.
    ///
    /// # Errors
    /// As for a report.
    pub fn standing(
        &self,
        id: &ResourceId,
        incarnation: u64,
        now: Timestamp,
    ) -> Result<Standing, ReportError> {
        let Some(entry) = self.resources.get(id) else {
            return Err(ReportError::NotRegistered { id: id.clone() });
        };
        let registered = entry.registration.incarnation();
        if registered != incarnation {
            return Err(ReportError::OtherIncarnation { id: id.clone(), registered, given: incarnation });
        }
        Ok(standing(&self.lock(entry.pool), &entry, now))
    }

    /// Whose a resource is: `None`, there is no such resource; `Some(None)`, nobody's in particular.
    pub fn owner(&self, id: &ResourceId) -> Option<Option<Owner>> {
        self.resources.get(id).map(|entry| entry.registration.owner().cloned())
    }

    /// Everyone to whom something belongs.
    pub fn owners(&self) -> HashSet<Owner> {
        self.resources.iter().filter_map(|entry| entry.registration.owner().cloned()).collect()
    }

    /// Every registration of this owner, in no order.
    pub fn owned_by(&self, owner: &Owner) -> Vec<Arc<Registration>> {
        let of_owner = self.resources.iter().filter(|entry| entry.registration.owner() == Some(owner));
        of_owner.map(|entry| Arc::clone(&entry.registration)).collect()
    }

    /// Removes a resource that is nobody's in particular, and everything kept of it. True: it was there.
    ///
    /// # Errors
    /// If a newer incarnation is registered, or it is somebody's.
    pub fn deregister(&self, id: &ResourceId, incarnation: u64) -> Result<bool, DeregisterError> {
        self.deregister_by(None, id, incarnation)
    }

    /// Removes a resource in the name of this identity, and everything kept of it. True: it was there.
    ///
    /// # Errors
    /// If a newer incarnation is registered, or it is somebody else's.
    pub fn deregister_by(
        &self,
        owner: Option<&Owner>,
        id: &ResourceId,
        incarnation: u64,
    ) -> Result<bool, DeregisterError> {
        let Place::Occupied(place) = self.resources.entry(id.clone()) else {
            return Ok(false);
        };
        if let Some(owner) = other_owner(&place.get().registration, owner) {
            return Err(DeregisterError::OtherOwner { id: id.clone(), owner });
        }
        let registered = place.get().registration.incarnation();
        if incarnation < registered {
            return Err(DeregisterError::OlderIncarnation { id: id.clone(), registered, given: incarnation });
        }
        self.leave(place.get());
        place.remove();
        Ok(true)
    }

    /// Removes a resource, whoever's it is, unless a newer incarnation is registered. True: it was there.
    pub fn remove(&self, id: &ResourceId, incarnation: u64) -> bool {
        let owner = self.registered(id).and_then(|(registration, _)| registration.owner().cloned());
        self.deregister_by(owner.as_ref(), id, incarnation).unwrap_or(false)
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
                let over = self.lock(place.get().pool).columns.lease_until[place.get().slot] <= now;
                if over {
                    self.leave(place.get());
                    expired.push(place.remove().registration);
                }
            }
        }
        expired
    }

    /// The next table of every pool that has reason for one. Tables of a pool come in the order of their generations,
    /// so one caller must do all the rebuilding and publishing.
    pub fn rebuild(&self, now: Timestamp) -> Vec<Rebuilt> {
        let rebuild = |pool: usize| self.lock(pool).rebuild(now).map(|tables| Rebuilt { pool, tables });
        (0..self.pools.len()).filter_map(rebuild).collect()
    }

    /// When [`Registry::expire`] or [`Registry::rebuild`] will have something to do, if nothing else happens.
    pub fn next_deadline(&self) -> Timestamp {
        (0..self.pools.len()).map(|index| self.lock(index).deadline()).min().unwrap_or(Timestamp::NEVER)
    }

    /// Every resource and its pool, in no order.
    pub fn names(&self) -> Vec<(ResourceId, PoolName)> {
        let name = |entry: dashmap::mapref::multiple::RefMulti<'_, ResourceId, Entry>| {
            (entry.key().clone(), entry.registration.pool().clone())
        };
        self.resources.iter().map(name).collect()
    }

    /// The pool of a resource, and where notices to it are posted, for each that has them posted.
    pub fn notified(&self) -> Vec<Arc<Registration>> {
        let posted = self.resources.iter().filter(|entry| entry.registration.notify_url().is_some());
        posted.map(|entry| Arc::clone(&entry.registration)).collect()
    }

    /// The pool of a resource.
    pub fn pool_of(&self, id: &ResourceId) -> Option<PoolName> {
        self.resources.get(id).map(|entry| entry.registration.pool().clone())
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
        let survey = pool.survey(now);
        let mut states = StateCounts::default();
        let mut flows_open = 0;
        for (slot, member) in pool.members.iter().enumerate() {
            if let Some(member) = member {
                states.count(state_of(&pool, slot, &member.backend.live, now));
                flows_open += u64::from(member.backend.live.flows_open());
            }
        }
        PoolStatus {
            name: self.config.pools[index].name.clone(),
            policy: pool.policy(),
            generation: pool.generation,
            states,
            flows_open,
            guard: guard(&pool, &survey),
            guards: guards(&pool, &survey, now),
            balancers: f64::from(pool.balancers),
        }
    }

    /// Why the next flow of a pool would go where, when it requires what the table (a place in [`Rebuilt::tables`]) is for.
    ///
    /// # Errors
    /// If there is no such pool.
    pub fn explain(&self, name: &PoolName, table: usize, now: Timestamp) -> Result<Explanation, UnknownPool> {
        let index = self.index(name)?;
        let (survey, policy, generation, unit, tables) = {
            let pool = self.lock(index);
            (pool.survey(now), pool.policy(), pool.generation, pool.unit, pool.requirements.clone())
        };
        let of_pool = self.resources.iter().filter(|entry| entry.pool == index);
        let mut candidates: Vec<Candidate> =
            of_pool.map(|entry| candidate(&self.lock(index), &entry, &survey, table, now)).collect();
        candidates.sort_by(|a, b| {
            let key = |c: &Candidate| (c.left_out.is_some(), c.cost);
            let ((out_a, cost_a), (out_b, cost_b)) = (key(a), key(b));
            out_a.cmp(&out_b).then(cost_a.total_cmp(&cost_b)).then_with(|| a.id.cmp(&b.id))
        });
        let pool = self.lock(index);
        Ok(Explanation {
            pool: name.clone(),
            policy,
            generation,
            guard: guard(&pool, &survey),
            unit,
            candidates,
            requires: tables.get(table).cloned().unwrap_or_default(),
            tables,
            guards: guards(&pool, &survey, now),
            balancers: f64::from(pool.balancers),
        })
    }

    /// The versions of a pool side by side; empty where it is not split.
    ///
    /// # Errors
    /// If there is no such pool.
    pub fn versions(&self, name: &PoolName, now: Timestamp) -> Result<Vec<VersionStatus>, UnknownPool> {
        let pool = self.lock(self.index(name)?);
        let versions = pool.versions.as_ref();
        Ok(versions.map(|versions| versions.status(&pool.columns, &pool.members, now)).unwrap_or_default())
    }

    /// Sets a version's share of new flows (0 to 1), which also ends its abort.
    ///
    /// # Errors
    /// See [`ShareError`]; nothing has changed then.
    pub fn set_version_share(&self, name: &PoolName, version: &str, share: f32) -> Result<(), ShareError> {
        let mut pool = self.lock(self.index(name)?);
        pool.set_version_share(version, share)
    }

    /// Every version that was aborted since the last call: pool, version, why.
    pub fn take_aborts(&self) -> Vec<(PoolName, String, String)> {
        let mut all = Vec::new();
        for (index, pool) in self.config.pools.iter().enumerate().filter(|(_, pool)| pool.split.is_some()) {
            if let Some(versions) = &mut self.lock(index).versions {
                let of_pool = |(version, why)| (pool.name.clone(), version, why);
                all.extend(versions.take_aborts().into_iter().map(of_pool));
            }
        }
        all
    }

    /// The probe answers of a pool whose policy is `prequal`, by the pool's place in [`Config::pools`].
    pub fn probes(&self, pool: usize) -> Option<Arc<SharedProbePool>> {
        self.pools.get(pool).and_then(|_| self.lock(pool).probes.clone())
    }

    /// Where the resources of such a pool answer probes; `None`: there is no such pool.
    pub fn probe_targets(&self, pool: usize) -> Option<ProbeTargets> {
        self.pools.get(pool).map(|_| self.lock(pool).probe_targets())
    }

    /// Memory of all histories, in bytes, and how many samples were not kept for want of room.
    pub fn history_usage(&self) -> (usize, u64) {
        (self.history_bytes.load(Relaxed), self.history_refused.load(Relaxed))
    }

    pub(crate) fn index(&self, name: &PoolName) -> Result<usize, UnknownPool> {
        let unknown = || UnknownPool { pool: name.clone(), known: self.pool_names() };
        self.pools_by_name.get(name).copied().ok_or_else(unknown)
    }

    pub(crate) fn lock(&self, index: usize) -> MutexGuard<'_, Pool> {
        // A panic under the lock is a fault of ours; what is in the pool is still the best there is.
        self.pools[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who owns a registration, if that is neither nobody nor the one who asks.
fn other_owner(registration: &Registration, asks: Option<&Owner>) -> Option<Owner> {
    registration.owner().filter(|owner| Some(*owner) != asks).cloned()
}

/// Where reports move no weights, nothing is held.
fn guard(pool: &Pool, survey: &Survey) -> Option<policy::Guard> {
    survey.guard.filter(|_| pool.policy().learns())
}

/// Every guard of a pool, and what it sees.
fn guards(pool: &Pool, survey: &Survey, now: Timestamp) -> Vec<GuardStatus> {
    let mut seen = Seen::default();
    for (slot, member) in pool.members.iter().enumerate() {
        if let Some(member) = member.as_ref().filter(|_| pool.columns.wanted[slot]) {
            seen.look(pool, slot, &member.backend, now);
        }
    }
    let Seen { eligible, fresh, stale, ejected, resetting, starting } = seen;
    let held = |wanted: policy::Guard| survey.guard == Some(wanted);
    let utilization = survey.mean_utilization() * 100.0;
    let saturated = policy::SATURATED_ABOVE * 100.0;
    let status = |name, holds, detail| GuardStatus { name, holds, detail };
    vec![
        status(
            "stale_reports",
            held(policy::Guard::StaleReports),
            format!(
                "{fresh} of {} that ever reported do so lately; below half, weights are held and time-outs eject nobody",
                fresh + stale
            ),
        ),
        status(
            "fleet_saturated",
            held(policy::Guard::FleetSaturated),
            format!(
                "mean utilization {utilization:.0}%; above {saturated:.0}%, weights are held and time-outs eject nobody"
            ),
        ),
        status(
            "ejections_ignored",
            ejected * 2 > eligible,
            format!(
                "{ejected} of {eligible} are ejected after time-outs or resets; above half, all are tried again"
            ),
        ),
        status(
            "sinkhole",
            resetting > 0,
            format!(
                "{resetting} of {eligible} reset flows before they answered; failures count as utilization, five in a \
                 row eject"
            ),
        ),
        status(
            "slow_start",
            starting > 0,
            format!(
                "{starting} of {eligible} have joined within {:?} and get a part of their weight",
                pool.config.knobs.slow_start
            ),
        ),
        status(
            "share_growth",
            pool.growth_held > 0,
            format!(
                "{} of {eligible} ask for more than twice their registered share faster than it may grow",
                pool.growth_held
            ),
        ),
    ]
}

#[derive(Default)]
struct Seen {
    eligible: usize,
    fresh: usize,
    stale: usize,
    ejected: usize,
    resetting: usize,
    starting: usize,
}

impl Seen {
    fn look(&mut self, pool: &Pool, slot: usize, backend: &Backend, now: Timestamp) {
        let row = pool.columns.row(slot);
        let stale = row.is_stale(now);
        self.eligible += 1;
        self.stale += usize::from(stale);
        self.fresh += usize::from(!stale && row.reported != Timestamp::NEVER);
        let verdict = backend.live.verdict(0, now);
        self.ejected += usize::from(matches!(verdict, Verdict::Ejected | Verdict::Resetting));
        self.resetting += usize::from(backend.live.is_resetting());
        self.starting += usize::from(row.slow_start(&pool.config.knobs, now) < 1.0);
    }
}

fn state_of(pool: &Pool, slot: usize, live: &LiveFacts, now: Timestamp) -> ResourceState {
    health::judge(pool.columns.facts_with(slot, Flows::of(live, now), now)).state
}

fn entry(registration: Arc<Registration>, labels: Arc<Labels>, pool: usize, slot: usize, of: &Pool) -> Entry {
    let live = Arc::clone(&of.member(slot).backend.live);
    let own_labels = registration.labels().clone();
    Entry { registration, own_labels, labels, pool, slot, live, utilization: None, reports_refused: 0 }
}

fn standing(pool: &Pool, entry: &Entry, now: Timestamp) -> Standing {
    let row = &pool.columns.row(entry.slot);
    Standing {
        state: state_of(pool, entry.slot, &entry.live, now),
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
        labels: Arc::clone(&entry.labels),
        standing: standing(pool, entry, now),
        flows_opened: entry.live.flows_opened(),
        connect_failures: entry.live.connect_failures(),
        report_age: report_age(row, now),
        utilization: entry.utilization.clone(),
        lease_left: row.lease_until.since(now),
        reports_refused: entry.reports_refused,
    }
}

fn candidate(pool: &Pool, entry: &Entry, survey: &Survey, table: usize, now: Timestamp) -> Candidate {
    let row = &pool.columns.row(entry.slot);
    let standing = standing(pool, entry, now);
    let member = pool.member(entry.slot);
    let cost = (f64::from(standing.flows_open) * f64::from(pool.balancers) + 1.0) / standing.weight;
    let latency = entry.live.latency_micros(now);
    Candidate {
        id: entry.registration.id().clone(),
        address: entry.registration.address(),
        cost,
        standing,
        left_out: left_out(pool, entry, table, now),
        utilization_ewma: f64::from(row.utilization),
        rate_ewma: f64::from(row.rate(pool.unit)),
        report_age: report_age(row, now),
        slow_start: f64::from(row.slow_start(&pool.config.knobs, now)),
        notes: notes(pool, row, survey, now),
        utilization: entry.utilization.clone(),
        version: entry.registration.version().to_owned(),
        side: pool.versions.as_ref().map(|versions| versions.name(usize::from(row.side)).to_owned()),
        labels: Arc::clone(&entry.labels),
        balancers: row.balancers as u32,
        latency: latency.map(|micros| Duration::from_secs_f64(f64::from(micros.max(0.0)) * 1e-6)),
        scores: candidate_scores(pool, member, now),
        forecast: member.past.forecast(),
    }
}

fn candidate_scores(pool: &Pool, member: &Member, now: Timestamp) -> Vec<CandidateScore> {
    let states = pool.config.criteria.iter().zip(&member.past.criteria);
    let score = |(criterion, state): (&Criterion, &CriterionState)| {
        let value = state.sampled.map_or(f64::NAN, |sampled| sampled.value);
        let flows = state.sampled.map_or(1.0, |sampled| sampled.flows);
        CandidateScore {
            criterion: criterion.to_string(),
            value,
            per_flow: f64::from(state.footprint.per_flow((value.abs() / flows.max(FLOWS_ASSUMED)) as f32)),
            age: state.sampled.map(|sampled| now.since(sampled.at)),
        }
    };
    states.map(score).collect()
}

pub(crate) fn left_out(pool: &Pool, entry: &Entry, table: usize, now: Timestamp) -> Option<LeftOut> {
    let flows_max = pool.member(entry.slot).backend.flows_max;
    match pool.columns.left_out(entry.slot, table, now) {
        allocation::LeftOut::Draining => return Some(LeftOut::Draining),
        allocation::LeftOut::NotReady => return Some(LeftOut::NotReady),
        allocation::LeftOut::ChecksFail => return Some(LeftOut::ChecksFail),
        allocation::LeftOut::Unproven => return Some(LeftOut::Unproven),
        allocation::LeftOut::Expired => return Some(LeftOut::Expired),
        allocation::LeftOut::Requirement => {
            let requirements = &pool.requirements[table.min(pool.requirements.len() - 1)];
            let unmet = requirements.unmet_by(&entry.labels, entry.registration.version());
            let unmet = unmet.map_or_else(|| requirements.to_string(), ToString::to_string);
            return Some(LeftOut::Requirement { unmet });
        }
        _ => {}
    }
    if let Some(versions) = &pool.versions {
        let side = usize::from(pool.columns.side[entry.slot]);
        if versions.share(side) <= 0.0 {
            return Some(LeftOut::Aborted { version: versions.name(side).to_owned() });
        }
    }
    match entry.live.verdict(flows_max, now) {
        Verdict::Usable | Verdict::Probe => None,
        // As its tables do.
        Verdict::Ejected if pool.guard.is_some() => None,
        Verdict::Paused => Some(LeftOut::Paused),
        Verdict::Ejected | Verdict::Resetting => Some(LeftOut::Ejected),
        Verdict::Full => Some(LeftOut::Full { flows_max }),
    }
}

fn notes(pool: &Pool, row: &Row, survey: &Survey, now: Timestamp) -> Vec<Note> {
    let mut notes = Vec::new();
    if !pool.policy().learns() {
        notes.push(Note::Registered);
    } else if row.remembered && row.fresh_until > 0 {
        notes.push(Note::Remembered);
    } else if row.reported == Timestamp::NEVER {
        notes.push(Note::NeverReported);
    } else if row.is_stale(now) {
        notes.push(Note::Stale);
    } else if let Some(guard) = survey.guard {
        notes.push(Note::Held(guard));
    } else if survey.utilization_belief(row.utilization) == 0.0 {
        notes.push(Note::Idle);
    }
    if row.slow_start(&pool.config.knobs, now) < 1.0 {
        notes.push(Note::SlowStart);
    }
    notes
}
