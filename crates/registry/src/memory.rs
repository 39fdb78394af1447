//! What outlives a restart: given to whoever keeps it, and taken back. The registry keeps nothing itself; a store does.
//!
//! A resource that is taken back is *remembered*: it has its weight, its history and an operator's drain, and gets no flow
//! until its service answers ([`Registry::checked`]). Its first registration or report makes it one like any
//! other. One that neither answers nor reports leaves as its lease ends, like any other.

use std::net::SocketAddr;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use allocation::{PoolName, ResourceId, Timestamp};
use dashmap::Entry as Place;

use crate::history::Chunk;
use crate::policy::Estimator;
use crate::pool::{Member, Pool};
use crate::versions::Reason;
use crate::{CapabilityError, Labels, RegisterError, Registration, Registry, ShareError};

/// Averages over a resource's reports, and the weight that was made of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimates {
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
    /// Its weight as log2; the mean of its pool is 0.
    pub log_weight: f32,
}

/// What is new of a resource that reported.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// Which one.
    pub id: ResourceId,
    /// Its incarnation.
    pub incarnation: u64,
    /// Whether it wants new flows, by its newest report.
    pub ready: bool,
    /// When that came.
    pub reported: Timestamp,
    /// Its own labels, where a report changed them.
    pub labels: Option<Labels>,
    /// As of its newest report.
    pub estimates: Estimates,
    /// Stretches that changed, in times since 1970.
    pub history: Vec<Chunk>,
}

/// A resource from before a restart.
#[derive(Debug, Clone, PartialEq)]
pub struct Remembered {
    /// As it registered.
    pub registration: Registration,
    /// Whether it wanted new flows, by its newest report.
    pub ready: bool,
    /// Whether an operator drained it.
    pub drained: bool,
    /// `None`: it had never reported.
    pub estimates: Option<Estimates>,
    /// In times since 1970.
    pub history: Vec<Chunk>,
}

/// A resource whose service is to be asked whether it works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckTarget {
    /// Which one.
    pub id: ResourceId,
    /// Its incarnation.
    pub incarnation: u64,
    /// Where it serves.
    pub address: SocketAddr,
    /// Its pool's place in [`crate::Config::pools`].
    pub pool: usize,
}

/// A version's share as it is set now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VersionShareNow {
    /// In the configuration, 0 to 1.
    pub configured: f32,
    /// As set last, 0 to 1.
    pub share: f32,
    /// Why it gets no new flows.
    pub aborted: Option<Reason>,
}

impl Registry {
    /// With the time since 1970 at which timestamps began: histories then outlive the process, and forecasts go by the
    /// hours of the day (UTC). To be called before anyone registers.
    #[must_use]
    pub fn with_origin(self, origin: Duration) -> Self {
        for pool in &self.pools {
            pool.lock().unwrap_or_else(PoisonError::into_inner).origin = origin;
        }
        self
    }

    /// What is new of the resources that have reported since they were looked at last, among `most` of a pool from place `from`
    /// on, so that a large pool is not locked for long. `None`: there is no such place.
    pub fn take_kept(&self, pool: usize, from: usize, most: usize) -> Option<Vec<Kept>> {
        let mut pool = self.pools.get(pool).map(|_| self.lock(pool))?;
        let end = pool.members.len().min(from.saturating_add(most));
        (from < end).then(|| (from..end).filter_map(|slot| take_kept(&mut pool, slot)).collect())
    }

    /// Takes a resource back, for at most `lease` without an answer or a report. Gives how many stretches of its history could
    /// not be read. One that is here already is left as it is.
    ///
    /// # Errors
    /// As for a registration.
    pub fn restore(
        &self,
        remembered: Remembered,
        lease: Duration,
        now: Timestamp,
    ) -> Result<usize, RegisterError> {
        let Remembered { registration, ready, drained, estimates, history } = remembered;
        let Some(&index) = self.pools_by_name.get(registration.pool()) else {
            return Err(RegisterError::UnknownPool {
                pool: registration.pool().clone(),
                known: self.pool_names(),
            });
        };
        let Place::Vacant(place) = self.resources.entry(registration.id().clone()) else { return Ok(0) };
        let entry = self.join(index, registration.into(), drained, now)?;
        let mut pool = self.lock(index);
        let (slot, error_penalty) = (entry.slot, f64::from(pool.config.knobs.error_penalty));
        let mut row = pool.columns.row(slot);
        (row.remembered, row.ready) = (true, ready);
        // It is no newcomer.
        row.slow_until = Timestamp::ZERO;
        row.lease_until = now + lease;
        pool.earliest_lease = pool.earliest_lease.min(row.lease_until);
        if let Some(estimates) = &estimates {
            pool.member_mut(slot).estimator = Estimator::restored(estimates, error_penalty, now, &mut row);
        }
        pool.columns.set(slot, row);
        pool.columns.decide(slot);
        let room = self.history_bytes.load(Relaxed) < self.config.limits.history_bytes_max;
        let unreadable = if room { pool.restore_history(slot, &history, now) } else { 0 };
        self.history_bytes.fetch_add(pool.member(slot).past.bytes(), Relaxed);
        drop(pool);
        place.insert(entry);
        Ok(unreadable)
    }

    /// Takes back what an administrator entered for a resource.
    ///
    /// # Errors
    /// See [`CapabilityError`].
    pub fn restore_capabilities(&self, id: &ResourceId, labels: &Labels) -> Result<(), CapabilityError> {
        self.set_capabilities(id, labels, &[]).map(|_| ())
    }

    /// Whether it is here, remembered or by itself.
    pub fn is_registered(&self, id: &ResourceId) -> bool {
        self.resources.contains_key(id)
    }

    /// The resources that are only remembered: to be connected to.
    pub fn unconfirmed(&self) -> Vec<CheckTarget> {
        let remembered = |pool: &Pool, slot: usize| pool.columns.remembered[slot];
        (0..self.pools.len()).flat_map(|index| self.targets(index, remembered)).collect()
    }

    /// Every resource of a pool, by the pool's place in [`crate::Config::pools`]; empty where there is no such pool.
    pub fn check_targets(&self, pool: usize) -> Vec<CheckTarget> {
        if pool < self.pools.len() { self.targets(pool, |_, _| true) } else { Vec::new() }
    }

    fn targets(&self, index: usize, wanted: impl Fn(&Pool, usize) -> bool) -> Vec<CheckTarget> {
        let pool = self.lock(index);
        let members = pool.members.iter().enumerate();
        let target = |(slot, member): (usize, &Option<Member>)| {
            let member = member.as_ref().filter(|_| wanted(&pool, slot))?;
            let (id, address) = (member.backend.id.clone(), member.backend.address);
            Some(CheckTarget { id, incarnation: member.incarnation, address, pool: index })
        };
        members.filter_map(target).collect()
    }

    /// Takes note of what asking a resource's service came to. One that is only remembered stays for another `lease` where it
    /// passes. True: that is news. In a pool without checks, who has said something itself meanwhile is left alone; nothing that
    /// concerns a former incarnation counts.
    pub fn checked(&self, of: &CheckTarget, passes: bool, lease: Duration, now: Timestamp) -> bool {
        let Some(entry) = self.resources.get(&of.id) else { return false };
        let mut pool = self.lock(entry.pool);
        let slot = entry.slot;
        let remembered = pool.columns.remembered[slot];
        let is_another = entry.pool != of.pool || entry.registration.incarnation() != of.incarnation;
        if is_another || !(remembered || pool.config.checked) {
            return false;
        }
        if passes && remembered {
            pool.renew(slot, lease, now);
        }
        pool.checked(slot, passes)
    }

    /// A version's share as it is set now; `None`: there is no such version.
    pub fn version_share(&self, pool: &PoolName, version: &str) -> Option<VersionShareNow> {
        let index = self.index(pool).ok()?;
        let configured = self.config.pools[index].split.as_ref()?.versions();
        let configured = configured.iter().find(|listed| listed.version == version)?.share;
        let (share, aborted) = self.lock(index).versions.as_ref()?.setting(version)?;
        Some(VersionShareNow { configured, share, aborted })
    }

    /// Sets a version's share, and that it was aborted, as before a restart.
    ///
    /// # Errors
    /// See [`ShareError`].
    pub fn restore_version(
        &self,
        pool: &PoolName,
        version: &str,
        share: f32,
        aborted: Option<Reason>,
    ) -> Result<(), ShareError> {
        self.set_version_share(pool, version, share)?;
        if let (Some(reason), Some(versions)) = (aborted, &mut self.lock(self.index(pool)?).versions) {
            versions.restore_abort(version, reason);
        }
        Ok(())
    }
}

fn take_kept(pool: &mut Pool, slot: usize) -> Option<Kept> {
    let row = pool.columns.row(slot);
    let member = pool.members[slot].as_mut()?;
    let history = member.past.take_chunks();
    let is_news = history.is_some() || (member.relabelled.is_some() && row.reported != Timestamp::NEVER);
    if !is_news {
        return None;
    }
    let history = history.unwrap_or_default();
    Some(Kept {
        id: member.backend.id.clone(),
        incarnation: member.incarnation,
        ready: row.ready,
        reported: row.reported,
        labels: member.relabelled.take(),
        estimates: member.estimator.estimates(&row),
        history,
    })
}
