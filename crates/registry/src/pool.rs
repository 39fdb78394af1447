//! One pool: the columns that the policy reads, with slots that do not move, and beside each slot what it does not read.

use std::sync::Arc;
use std::time::Duration;

use allocation::{AllocationTable, Backend, LiveFacts, Members, Policy, Timestamp};

use crate::columns::{Columns, Row, tick};
use crate::policy::{self, Estimator, Leases, Masks, RateUnit, Sample, Scratch, Survey, View};
use crate::{Registration, Utilization};

/// Rebuilds of a pool are at least this far apart: reports that come together make one table.
const REBUILD_GAP: Duration = Duration::from_millis(5);
/// The same for a pool of more than [`LARGE`].
const REBUILD_GAP_LARGE: Duration = Duration::from_millis(10);
const LARGE: usize = 1_000;
/// While weights move by themselves (slow start, steps), a table is made this often.
const MOVING_INTERVAL: Duration = Duration::from_secs(1);

/// What a pool keeps of a resource beside its row.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) backend: Backend,
    pub(crate) estimator: Estimator,
}

/// A pool's state; behind a lock of its own.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) policy: Policy,
    flows_max_default: u32,
    slow_start: Duration,
    pub(crate) columns: Columns,
    /// By slot, as `columns`.
    pub(crate) members: Vec<Option<Member>>,
    free: Vec<usize>,
    shared: Arc<Members>,
    members_changed: bool,
    dirty: bool,
    moving: bool,
    pub(crate) generation: u64,
    rebuilt: Timestamp,
    pub(crate) unit: RateUnit,
    /// Where newcomers start, above their registered weight (as log2).
    level: f32,
    /// When the first of its members is past its own start, and a newcomer has to start slowly beside it. As of the
    /// last table.
    established: Timestamp,
    /// End of the last slow start.
    slow_until: Timestamp,
    scratch: Scratch,
    /// Sum of the published weights.
    weights: f32,
    /// No lease ends before it.
    earliest_lease: Timestamp,
}

impl Pool {
    pub(crate) fn new(policy: Policy, flows_max_default: u32, slow_start: Duration) -> Self {
        Self {
            policy,
            flows_max_default,
            slow_start,
            columns: Columns::default(),
            members: Vec::new(),
            free: Vec::new(),
            shared: Arc::default(),
            members_changed: false,
            dirty: false,
            moving: false,
            generation: 0,
            rebuilt: Timestamp::ZERO,
            unit: RateUnit::default(),
            level: 0.0,
            established: Timestamp::NEVER,
            slow_until: Timestamp::ZERO,
            scratch: Scratch::default(),
            weights: 0.0,
            earliest_lease: Timestamp::NEVER,
        }
    }

    /// How many are in it.
    pub(crate) fn len(&self) -> usize {
        self.columns.len() - self.free.len()
    }

    pub(crate) fn slow_start(&self) -> Duration {
        self.slow_start
    }

    /// Takes a slot for a registration.
    pub(crate) fn join(&mut self, registration: &Registration, drained: bool, now: Timestamp) -> usize {
        let (row, member) = self.fresh(registration, drained, now);
        if let Some(slot) = self.free.pop() {
            self.columns.set(slot, row);
            self.members[slot] = Some(member);
            return slot;
        }
        self.columns.push(row);
        self.members.push(Some(member));
        self.columns.len() - 1
    }

    /// Starts a slot anew: another process answers there, so nothing that was learned of the old one holds.
    pub(crate) fn replace(
        &mut self,
        slot: usize,
        registration: &Registration,
        drained: bool,
        now: Timestamp,
    ) {
        let (row, member) = self.fresh(registration, drained, now);
        self.columns.set(slot, row);
        self.members[slot] = Some(member);
    }

    fn fresh(&mut self, registration: &Registration, drained: bool, now: Timestamp) -> (Row, Member) {
        self.dirty = true;
        self.members_changed = true;
        let lease_until = now + registration.lease();
        self.earliest_lease = self.earliest_lease.min(lease_until);
        let slow = !self.slow_start.is_zero() && now >= self.established;
        let slow_until = if slow { now + self.slow_start } else { Timestamp::ZERO };
        self.slow_until = self.slow_until.max(slow_until);
        let log_registered = registration.weight().log2();
        let row = Row {
            wanted: !drained,
            occupied: true,
            ready: true,
            drained,
            carries_operations: false,
            lease_until,
            joined: now,
            slow_until,
            reported: Timestamp::NEVER,
            fresh_until: 0,
            stale_after_ms: stale_after_ms(registration),
            registered: registration.weight(),
            log_registered,
            utilization: 0.0,
            log_utilization: 0.0,
            operations: 0.0,
            log_operations: 0.0,
            flows_opened: 0.0,
            log_flows_opened: 0.0,
            flows_open: 0.0,
            log_flows_open: 0.0,
            log_weight: log_registered + self.level,
            weight: 0.0,
        };
        let member =
            Member { backend: self.backend(registration, Arc::default()), estimator: Estimator::new(now) };
        (row, member)
    }

    fn backend(&self, registration: &Registration, live: Arc<LiveFacts>) -> Backend {
        let own = registration.flows_max();
        Backend {
            id: registration.id().clone(),
            address: registration.address(),
            flows_max: if own == 0 { self.flows_max_default } else { own },
            live,
        }
    }

    /// The same process says something else of itself: what was learned of it holds.
    pub(crate) fn amend(&mut self, slot: usize, registration: &Registration, now: Timestamp) {
        self.columns.registered[slot] = registration.weight();
        self.columns.log_registered[slot] = registration.weight().log2();
        self.columns.stale_after_ms[slot] = stale_after_ms(registration);
        let live = Arc::clone(&self.member(slot).backend.live);
        let backend = self.backend(registration, live);
        self.member_mut(slot).backend = backend;
        self.members_changed = true;
        self.dirty = true;
        self.renew(slot, registration.lease(), now);
    }

    pub(crate) fn renew(&mut self, slot: usize, lease: Duration, now: Timestamp) {
        let until = now + lease;
        self.columns.lease_until[slot] = until;
        // An amended registration may have a shorter lease than before.
        self.earliest_lease = self.earliest_lease.min(until);
    }

    /// Gives a slot back. The rest of the vectors goes too, once nobody is behind it.
    pub(crate) fn leave(&mut self, slot: usize) {
        self.columns.occupied[slot] = false;
        self.columns.weight[slot] = 0.0;
        self.columns.decide(slot);
        self.members[slot] = None;
        self.free.push(slot);
        self.members_changed = true;
        self.dirty = true;
        if self.len() == 0 {
            self.columns = Columns::default();
            self.members = Vec::new();
            self.free = Vec::new();
            self.scratch = Scratch::default();
        }
    }

    /// Records a report and what the dataplane counted until now.
    pub(crate) fn report(&mut self, slot: usize, ready: bool, utilization: &Utilization, now: Timestamp) {
        let Some(member) = self.members[slot].as_mut() else { return };
        let live = &member.backend.live;
        let sample = Sample {
            busy: utilization.busy(),
            operations: utilization.rate(),
            errors: utilization.errors(),
            flows_opened: live.flows_opened(),
            fast_resets: live.fast_resets(),
            flows_open: live.flows_open(),
        };
        let mut row = self.columns.row(slot);
        member.estimator.record(&sample, now, &mut row);
        row.reported = now;
        row.fresh_until = tick(now + Duration::from_millis(u64::from(row.stale_after_ms))).max(1);
        row.ready = ready;
        self.columns.set(slot, row);
        self.columns.decide(slot);
        self.dirty = true;
    }

    pub(crate) fn set_drained(&mut self, slot: usize, drained: bool) {
        self.dirty |= self.columns.drained[slot] != drained;
        self.columns.drained[slot] = drained;
        self.columns.decide(slot);
    }

    /// # Panics
    /// If nobody has the slot: the map of resources names occupied slots only.
    pub(crate) fn member(&self, slot: usize) -> &Member {
        self.members[slot].as_ref().expect("the map of resources names occupied slots only")
    }

    fn member_mut(&mut self, slot: usize) -> &mut Member {
        self.members[slot].as_mut().expect("the map of resources names occupied slots only")
    }

    /// The part of the pool's new flows that goes to the slot.
    pub(crate) fn share(&self, slot: usize) -> f64 {
        if self.weights > 0.0 { f64::from(self.columns.weight[slot]) / f64::from(self.weights) } else { 0.0 }
    }

    /// Slots whose lease is over.
    pub(crate) fn expired(&mut self, now: Timestamp) -> Vec<usize> {
        if now < self.earliest_lease {
            return Vec::new();
        }
        let mut expired = Vec::new();
        self.earliest_lease = Timestamp::NEVER;
        let leases = self.columns.lease_until.iter().zip(&self.columns.occupied).enumerate();
        for (slot, (&lease_until, _)) in leases.filter(|(_, (_, occupied))| **occupied) {
            if lease_until <= now {
                expired.push(slot);
            } else {
                self.earliest_lease = self.earliest_lease.min(lease_until);
            }
        }
        expired
    }

    /// When there will be something to do, as far as is known now.
    pub(crate) fn deadline(&self) -> Timestamp {
        self.rebuild_at().min(self.earliest_lease)
    }

    fn rebuild_at(&self) -> Timestamp {
        let gap = if self.columns.len() > LARGE { REBUILD_GAP_LARGE } else { REBUILD_GAP };
        match (self.dirty, self.moving) {
            (true, _) if self.generation == 0 => Timestamp::ZERO,
            (true, _) => self.rebuilt + gap,
            (false, true) => self.rebuilt + MOVING_INTERVAL,
            (false, false) => Timestamp::NEVER,
        }
    }

    /// The next table, if there is reason for one and the last is long enough ago.
    pub(crate) fn rebuild(&mut self, now: Timestamp) -> Option<AllocationTable> {
        if now < self.rebuild_at() {
            return None;
        }
        if self.members_changed {
            self.share_members();
        }
        self.generation += 1;
        let leases = self.leases(now);
        let view = View {
            columns: &mut self.columns,
            scratch: &mut self.scratch,
            members: &self.shared,
            policy: self.policy,
            generation: self.generation,
            unit: self.unit,
            before: self.rebuilt,
            level: self.level,
            slow_start: self.slow_start,
            slow_until: self.slow_until,
        };
        let allocation = policy::allocate(view, leases);
        self.unit = allocation.unit;
        self.level = allocation.level;
        self.weights = allocation.weights;
        self.moving = allocation.moving;
        self.dirty = false;
        self.rebuilt = now;
        Some(allocation.table)
    }

    /// The pool in numbers, for whoever asks.
    pub(crate) fn survey(&self, now: Timestamp) -> Survey {
        policy::survey(&self.columns, &mut Masks::default(), self.unit, self.leases(now))
    }

    fn leases(&self, now: Timestamp) -> Leases {
        if now < self.earliest_lease { Leases::AllHold(now) } else { Leases::SomeOver(now) }
    }

    fn share_members(&mut self) {
        let occupied = self.members.iter().flatten();
        self.shared = Arc::new(Members::new(occupied.map(|member| member.backend.clone()).collect()));
        let joined = self.columns.joined.iter().zip(&self.columns.occupied);
        let first = joined.filter(|(_, occupied)| **occupied).map(|(joined, _)| *joined).min();
        self.established = first.map_or(Timestamp::NEVER, |first| first + self.slow_start);
        self.members_changed = false;
    }
}

fn stale_after_ms(registration: &Registration) -> u32 {
    u32::try_from(registration.stale_after().as_millis()).unwrap_or(u32::MAX)
}
