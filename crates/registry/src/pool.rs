//! One pool: the columns that the policy reads, with slots that do not move, and beside each slot what it does not read.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use allocation::{
    AllocationTable, Backend, BackendIndex, Criteria, LeftOut, LiveFacts, Maglev, Members, Policy, ProbePool,
    SharedProbePool, Side, Split, TableSpec, Timestamp,
};

use crate::columns::{Columns, Row, tick};
use crate::health::Checked;
use crate::history::Chunk;
use crate::past::{Arrivals, Past};
use crate::policy::{
    self, Estimator, Guard, Leases, Masks, RateUnit, Sample, Scratch, Survey, View, Weighed,
};
use crate::scores;
use crate::sides::Versions;
use crate::{Labels, PoolConfig, ProbeTargets, Readiness, Registration, Report, Requirements, ShareError};

/// Rebuilds of a pool are at least so far apart for each of its slots, and at least [`REBUILD_GAP_MIN`]: reports that come
/// together make one table. A rebuild takes some 15 ns for each, so that is one and a half hundredths of a processor at most,
/// and a report is in the table within 1 ms in a pool of 1,000, within 10 ms in one of 10,000.
const REBUILD_GAP_EACH: Duration = Duration::from_micros(1);
const REBUILD_GAP_MIN: Duration = Duration::from_millis(1);
/// Most balancers that a resource is believed to report to: a wrong count must not drown our own.
const BALANCERS_MAX: u32 = 64;
/// Quantised weights of `maglev` are powers of this (as log2; a step is 19 %).
const HASH_STEP_LOG2: f32 = 0.25;
/// A weight must be this part of a step away from where it was to take another: at a boundary it would go to and fro.
const HASH_HYSTERESIS: f32 = 0.75;
/// While weights move by themselves (slow start, steps), a table is made this often.
const MOVING_INTERVAL: Duration = Duration::from_secs(1);

/// Where a resource's labels and version put it in its pool: which tables it may be in, and the side of the split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fit {
    pub(crate) tables: u64,
    pub(crate) side: u8,
}

/// What a pool keeps of a resource beside its row.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) backend: Backend,
    pub(crate) estimator: Estimator,
    pub(crate) past: Past,
    pub(crate) probe: Option<SocketAddr>,
    pub(crate) incarnation: u64,
    /// Its own labels, where a report changed them and nobody has taken note yet.
    pub(crate) relabelled: Option<Labels>,
}

/// A pool's state; behind a lock of its own.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) config: PoolConfig,
    /// What the origin of timestamps is since 1970; zero: it is of no matter.
    pub(crate) origin: Duration,
    /// What the flows of each table require.
    pub(crate) requirements: Vec<Requirements>,
    pub(crate) columns: Columns,
    /// By slot, as `columns`.
    pub(crate) members: Vec<Option<Member>>,
    free: Vec<usize>,
    shared: Arc<Members>,
    /// Counts the changes of `shared`.
    epoch: u64,
    members_changed: bool,
    pub(crate) dirty: bool,
    moving: bool,
    pub(crate) generation: u64,
    rebuilt: Timestamp,
    pub(crate) unit: RateUnit,
    pub(crate) guard: Option<Guard>,
    pub(crate) balancers: f32,
    /// How many wanted more in the last table than their weight may grow.
    pub(crate) growth_held: u32,
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
    /// Of a split pool: the part of all flows that a unit of weight on each side gets.
    side_parts: Vec<f32>,
    /// No lease ends before it.
    pub(crate) earliest_lease: Timestamp,
    pub(crate) arrivals: Arrivals,
    pub(crate) versions: Option<Versions>,
    hashing: Vec<Hashing>,
    /// The answers of `prequal`, filled from outside.
    pub(crate) probes: Option<Arc<SharedProbePool>>,
}

impl Pool {
    pub(crate) fn new(config: PoolConfig) -> Self {
        let requirements: Vec<_> = (0..=config.tables.len()).map(|table| config.requirement(table)).collect();
        // Every balancer process draws alike; what is drawn rounds a count of uses, which hurts nobody.
        let probe_pool = || Arc::new(Mutex::new(ProbePool::new(config.knobs.probes, 1)));
        let versions = config.split.clone().map(Versions::new);
        let sides = versions.as_ref().map_or(1, Versions::count);
        Self {
            hashing: (0..requirements.len() * sides).map(|_| Hashing::default()).collect(),
            versions,
            probes: (config.policy == Policy::Prequal).then(probe_pool),
            requirements,
            config,
            origin: Duration::ZERO,
            columns: Columns::default(),
            members: Vec::new(),
            free: Vec::new(),
            shared: Arc::default(),
            epoch: 0,
            members_changed: false,
            dirty: false,
            moving: false,
            generation: 0,
            rebuilt: Timestamp::ZERO,
            unit: RateUnit::default(),
            guard: None,
            balancers: 1.0,
            growth_held: 0,
            level: 0.0,
            established: Timestamp::NEVER,
            slow_until: Timestamp::ZERO,
            scratch: Scratch::default(),
            weights: 0.0,
            side_parts: Vec::new(),
            earliest_lease: Timestamp::NEVER,
            arrivals: Arrivals::default(),
        }
    }

    /// How many are in it.
    pub(crate) fn len(&self) -> usize {
        self.columns.len() - self.free.len()
    }

    pub(crate) fn policy(&self) -> Policy {
        self.config.policy
    }

    /// Where these labels and this version put a resource.
    pub(crate) fn fit(&self, labels: &BTreeMap<String, String>, version: &str) -> Fit {
        let meets = |(table, requirements): (usize, &Requirements)| {
            u64::from(requirements.met_by(labels, version)) << table
        };
        let tables = self.requirements.iter().enumerate().map(meets).fold(0, |all, bit| all | bit);
        let side = self.versions.as_ref().map_or(0, |versions| versions.side_of(version));
        Fit { tables, side: side as u8 }
    }

    /// Takes a slot for a registration.
    pub(crate) fn join(
        &mut self,
        registration: &Registration,
        fit: Fit,
        drained: bool,
        now: Timestamp,
    ) -> usize {
        let (row, member) = self.fresh(registration, fit, drained, now);
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
        fit: Fit,
        drained: bool,
        now: Timestamp,
    ) {
        self.depart(slot);
        let (row, member) = self.fresh(registration, fit, drained, now);
        self.columns.set(slot, row);
        self.members[slot] = Some(member);
    }

    fn fresh(
        &mut self,
        registration: &Registration,
        fit: Fit,
        drained: bool,
        now: Timestamp,
    ) -> (Row, Member) {
        self.dirty = true;
        self.members_changed = true;
        let lease_until = now + registration.lease();
        self.earliest_lease = self.earliest_lease.min(lease_until);
        let window = self.config.knobs.slow_start;
        let slow = !window.is_zero() && now >= self.established;
        let slow_until = if slow { now + window } else { Timestamp::ZERO };
        self.slow_until = self.slow_until.max(slow_until);
        let log_registered = registration.weight().log2();
        let row = Row {
            wanted: !drained && fit.tables & 1 == 1,
            occupied: true,
            ready: true,
            drained,
            remembered: false,
            checked: Checked::Unknown,
            carries_operations: false,
            tables: fit.tables,
            side: fit.side,
            balancers: 1.0,
            reported_weight: 0.0,
            weighted_since: Timestamp::NEVER,
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
        let member = Member {
            backend: self.backend(registration, Arc::default()),
            estimator: Estimator::new(now),
            past: Past::new(&self.config, registration.stale_after(), self.origin),
            probe: registration.probe_address(),
            incarnation: registration.incarnation(),
            relabelled: None,
        };
        (row, member)
    }

    fn backend(&self, registration: &Registration, live: Arc<LiveFacts>) -> Backend {
        let own = registration.flows_max();
        Backend {
            id: registration.id().clone(),
            address: registration.address(),
            flows_max: if own == 0 { self.config.flows_max_default } else { own },
            live,
        }
    }

    /// It meets other requirements than before, or is of another version.
    pub(crate) fn refit(&mut self, slot: usize, fit: Fit) {
        if self.columns.side[slot] != fit.side {
            self.depart(slot);
        }
        self.dirty |= (self.columns.tables[slot], self.columns.side[slot]) != (fit.tables, fit.side);
        (self.columns.tables[slot], self.columns.side[slot]) = (fit.tables, fit.side);
        self.columns.decide(slot);
    }

    /// Where the members answer probes, by backend index of the newest table.
    pub(crate) fn probe_targets(&self) -> ProbeTargets {
        let probes = self.members.iter().flatten().enumerate();
        let addresses =
            probes.filter_map(|(index, member)| Some((BackendIndex(index as u32), member.probe?)));
        let opened = self.members.iter().flatten().map(|member| member.backend.live.flows_opened()).sum();
        ProbeTargets { epoch: self.shared.epoch(), addresses: addresses.collect(), flows_opened: opened }
    }

    /// An administrator sets a version's share.
    pub(crate) fn set_version_share(&mut self, version: &str, share: f32) -> Result<(), ShareError> {
        let versions = self.versions.as_mut().ok_or(ShareError::NotSplit)?;
        versions.set_share(version, share)?;
        self.dirty = true;
        Ok(())
    }

    /// What was counted of the slot's resource stays with its version.
    fn depart(&mut self, slot: usize) {
        if let (Some(versions), Some(member)) = (&mut self.versions, &self.members[slot]) {
            versions.depart(usize::from(self.columns.side[slot]), &member.backend.live);
        }
    }

    /// The same process says something else of itself: what was learned of it holds.
    pub(crate) fn amend(&mut self, slot: usize, registration: &Registration, now: Timestamp) {
        self.columns.registered[slot] = registration.weight();
        self.columns.log_registered[slot] = registration.weight().log2();
        self.columns.stale_after_ms[slot] = stale_after_ms(registration);
        let live = Arc::clone(&self.member(slot).backend.live);
        let backend = self.backend(registration, live);
        let member = self.member_mut(slot);
        member.backend = backend;
        member.past.set_holds_for(registration.stale_after());
        member.probe = registration.probe_address();
        self.members_changed = true;
        self.dirty = true;
        self.renew(slot, registration.lease(), now);
        self.confirm(slot);
    }

    /// It is not only remembered: it has said something itself.
    pub(crate) fn confirm(&mut self, slot: usize) {
        if self.columns.remembered[slot] {
            self.columns.remembered[slot] = false;
            if !self.config.checked {
                // Nobody would ask again.
                self.columns.checked[slot] = Checked::Unknown;
            }
            self.columns.decide(slot);
            self.dirty = true;
        }
    }

    /// Takes note of what asking a resource's service came to. True: whether it gets flows may have changed.
    pub(crate) fn checked(&mut self, slot: usize, passes: bool) -> bool {
        let checked = if passes { Checked::Passes } else { Checked::Fails };
        let changed = self.columns.checked[slot] != checked;
        self.columns.checked[slot] = checked;
        self.columns.decide(slot);
        self.dirty |= changed;
        changed
    }

    /// Gives a slot the history that was kept of it; gives how many stretches could not be read.
    pub(crate) fn restore_history(&mut self, slot: usize, chunks: &[Chunk], now: Timestamp) -> usize {
        let member = self.members[slot].as_mut();
        member.map_or(0, |member| member.past.restore(&self.config, chunks, now))
    }

    /// A report changed its own labels.
    pub(crate) fn relabelled(&mut self, slot: usize, labels: Labels) {
        self.member_mut(slot).relabelled = Some(labels);
    }

    pub(crate) fn renew(&mut self, slot: usize, lease: Duration, now: Timestamp) {
        let until = now + lease;
        self.columns.lease_until[slot] = until;
        // An amended registration may have a shorter lease than before.
        self.earliest_lease = self.earliest_lease.min(until);
    }

    /// Gives a slot back. The rest of the vectors goes too, once nobody is behind it.
    pub(crate) fn leave(&mut self, slot: usize) {
        self.depart(slot);
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
    /// Gives how many dimensions got no history for want of `room`.
    pub(crate) fn report(&mut self, slot: usize, report: &Report, room: bool, now: Timestamp) -> u64 {
        let Some(member) = self.members[slot].as_mut() else { return 0 };
        let utilization = &report.utilization;
        let live = &member.backend.live;
        let sample = Sample {
            busy: utilization.busy(),
            operations: utilization.rate(),
            errors: utilization.errors(),
            error_penalty: f64::from(self.config.knobs.error_penalty),
            flows_opened: live.flows_opened(),
            fast_resets: live.fast_resets(),
            flows_open: live.flows_open(),
            latency_seconds: live.latency_micros(now).map(|micros| f64::from(micros) * 1e-6),
        };
        let mut row = self.columns.row(slot);
        member.estimator.record(&sample, now, &mut row);
        let refused = member.past.record(&self.config, &sample, utilization, room, now);
        if let Some(forecast) = member.past.forecast() {
            let busy = row.utilization.max(forecast as f32);
            (row.utilization, row.log_utilization) =
                (busy, busy.max(f32::MIN_POSITIVE).log2().max(row.log_utilization));
        }
        row.reported_weight = reported_weight(&sample);
        row.weighted_since = match row.weighted_since {
            _ if row.reported_weight <= 0.0 => Timestamp::NEVER,
            // After so long without a report the blackout begins anew.
            since
                if since == Timestamp::NEVER
                    || now.since(row.reported) >= self.config.knobs.weight_expiration =>
            {
                now
            }
            since => since,
        };
        row.balancers = report.balancers.clamp(1, BALANCERS_MAX) as f32;
        row.reported = now;
        row.fresh_until = tick(now + Duration::from_millis(u64::from(row.stale_after_ms))).max(1);
        row.ready = report.readiness == Readiness::Ready;
        if row.remembered {
            row.remembered = false;
            // In a pool without checks nobody would ask again.
            row.checked = if self.config.checked { row.checked } else { Checked::Unknown };
        }
        self.columns.set(slot, row);
        self.columns.decide(slot);
        self.dirty = true;
        refused
    }

    /// What a resource says of itself between reports.
    pub(crate) fn set_ready(&mut self, slot: usize, ready: bool) {
        if self.columns.ready[slot] != ready {
            self.columns.ready[slot] = ready;
            self.columns.decide(slot);
            self.dirty = true;
        }
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

    pub(crate) fn member_mut(&mut self, slot: usize) -> &mut Member {
        self.members[slot].as_mut().expect("the map of resources names occupied slots only")
    }

    /// The part of the pool's new flows that goes to the slot.
    pub(crate) fn share(&self, slot: usize) -> f64 {
        if self.versions.is_some() {
            let part = self.side_parts.get(usize::from(self.columns.side[slot])).copied().unwrap_or(0.0);
            return f64::from(self.columns.weight[slot] * part);
        }
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
        let slots = u32::try_from(self.columns.len() * self.requirements.len()).unwrap_or(u32::MAX);
        let gap = REBUILD_GAP_EACH.saturating_mul(slots).max(REBUILD_GAP_MIN);
        match (self.dirty, self.moving) {
            (true, _) if self.generation == 0 => Timestamp::ZERO,
            (true, _) => self.rebuilt + gap,
            (false, true) => self.rebuilt + MOVING_INTERVAL,
            (false, false) => Timestamp::NEVER,
        }
    }

    /// The next tables, if there is reason for them and the last are long enough ago: one for each set of requirements, in
    /// their order.
    pub(crate) fn rebuild(&mut self, now: Timestamp) -> Option<Vec<AllocationTable>> {
        if now < self.rebuild_at() {
            return None;
        }
        if self.members_changed {
            self.share_members();
        }
        self.generation += 1;
        let leases = self.leases(now);
        if let Some(versions) = &mut self.versions {
            versions.observe(&self.columns, &self.members, now);
        }
        let view = View {
            columns: &mut self.columns,
            scratch: &mut self.scratch,
            policy: self.config.policy,
            knobs: &self.config.knobs,
            unit: self.unit,
            before: self.rebuilt,
            level: self.level,
            slow_until: self.slow_until,
        };
        let weighed = policy::weigh(view, leases);
        self.unit = weighed.unit;
        self.guard = weighed.guard;
        self.level = weighed.level;
        self.weights = weighed.eligible;
        self.balancers = weighed.balancers;
        self.growth_held = weighed.held;
        // Sides are judged, and the flood of arrivals is measured, as time passes.
        self.moving = weighed.moving || self.versions.is_some() || self.policy() == Policy::Criteria;
        self.dirty = false;
        self.rebuilt = now;
        if self.policy() == Policy::Criteria {
            self.watch_arrivals(now);
        }
        let tables: Vec<_> =
            (0..self.requirements.len()).map(|table| self.table(table, &weighed, now)).collect();
        if self.policy() == Policy::Criteria {
            self.take_over_weights(&tables[0]);
        }
        if let Some(versions) = &self.versions {
            let mut weights = vec![0.0; versions.count()];
            for (weight, side) in self.columns.weight.iter().zip(&self.columns.side) {
                weights[usize::from(*side)] += weight;
            }
            self.side_parts = versions.parts(&weights);
        }
        Some(tables)
    }

    /// One table of the newest weights.
    fn table(&mut self, table: usize, weighed: &Weighed, now: Timestamp) -> AllocationTable {
        let spec = self.spec(table, weighed, now);
        let Some(versions) = &self.versions else {
            return AllocationTable::build(self.hashed(table, spec));
        };
        let (by, sides) = (versions.by(), versions.sides(&spec, &self.compact(&self.columns.side)));
        let count = sides.len();
        let build = |(place, (version, share, spec)): (usize, (String, f32, TableSpec))| {
            let spec = self.hashed(table * count + place, spec);
            Side { version, share, table: AllocationTable::build(spec) }
        };
        let sides: Vec<Side> = sides.into_iter().enumerate().map(build).collect();
        // The whole selects nothing itself: any look-up table will do, and none has to be made.
        let maglev = sides.first().and_then(|side| side.table.maglev().cloned());
        AllocationTable::build(TableSpec { maglev, ..spec }).with_split(Split { by, sides })
    }

    fn spec(&self, table: usize, weighed: &Weighed, now: Timestamp) -> TableSpec {
        let mut weights = weighed.weights.clone();
        if table > 0 {
            for (weight, tables) in weights.iter_mut().zip(&self.columns.tables) {
                *weight *= (tables >> table & 1) as f32;
            }
        }
        let left_out = self.left_out(&weights, table, now);
        let mut weights = if self.is_compact() { weights } else { self.compact(&weights) };
        let requirement_unmet = weights.iter().all(|weight| *weight <= 0.0) && self.somebody_is_ready(now);
        let criteria = match self.policy() {
            Policy::Criteria => self.scored(&mut weights, now),
            _ => Criteria::default(),
        };
        TableSpec {
            balancers: weighed.balancers,
            ignore_time_outs: weighed.guard.is_some(),
            left_out,
            requirement_unmet,
            criteria,
            bounded_load: self.config.knobs.bounded_load,
            probes: self.probes.clone(),
            ..TableSpec::new(self.generation, self.policy(), Arc::clone(&self.shared), weights)
        }
    }

    fn watch_arrivals(&mut self, now: Timestamp) {
        let opened = self.members.iter().flatten().map(|member| member.backend.live.flows_opened()).sum();
        let silent = |(ms, occupied): (&u32, &bool)| if *occupied { u64::from(*ms) } else { 0 };
        let intervals: u64 = self.columns.stale_after_ms.iter().zip(&self.columns.occupied).map(silent).sum();
        // It is stale after three intervals.
        let interval = Duration::from_millis(intervals / 3 / self.len().max(1) as u64);
        self.arrivals.observe(opened, interval, now);
    }

    /// Shares as the table divides expected flows, for whoever asks.
    fn take_over_weights(&mut self, table: &AllocationTable) {
        let mut published = table.weights().iter();
        for (weight, occupied) in self.columns.weight.iter_mut().zip(&self.columns.occupied) {
            *weight = if *occupied { published.next().copied().unwrap_or(0.0) } else { 0.0 };
        }
    }

    /// Why each member is left out that has no weight, by backend index; empty where nobody is.
    fn left_out(&self, weights: &[f32], table: usize, now: Timestamp) -> Vec<LeftOut> {
        if weights.iter().all(|weight| *weight > 0.0) {
            return Vec::new();
        }
        let why = |(slot, weight): (usize, &f32)| match weight {
            weight if *weight > 0.0 => LeftOut::Not,
            _ => self.columns.left_out(slot, table, now),
        };
        self.compact(&weights.iter().enumerate().map(why).collect::<Vec<_>>())
    }

    /// Whether every slot is occupied, so that slots are backend indexes.
    fn is_compact(&self) -> bool {
        self.free.is_empty()
    }

    /// Values by backend index, of values by slot.
    fn compact<T: Copy>(&self, values: &[T]) -> Vec<T> {
        let occupied = values.iter().zip(&self.columns.occupied);
        occupied.filter(|(_, occupied)| **occupied).map(|(value, _)| *value).collect()
    }

    /// Whether only requirements keep everyone out.
    fn somebody_is_ready(&self, now: Timestamp) -> bool {
        let columns = &self.columns;
        (0..columns.len()).any(|slot| columns.occupied[slot] && columns.is_against(slot, now).is_none())
    }

    /// Gives `maglev` the look-up table that was made for the same weights, if it was.
    fn hashed(&mut self, place: usize, spec: TableSpec) -> TableSpec {
        if spec.policy != Policy::Maglev {
            return spec;
        }
        let maglev = Some(self.hashing[place].of(&spec.members, &spec.weights));
        TableSpec { maglev, ..spec }
    }

    /// Scores for `criteria`, and weights that divide the flows expected until the next reports like water.
    fn scored(&self, weights: &mut [f32], now: Timestamp) -> Criteria {
        let pasts: Vec<scores::Subject<'_>> =
            self.members.iter().flatten().map(scores::Subject::of).collect();
        let slots = (0..self.columns.len()).filter(|slot| self.columns.occupied[*slot]);
        let gate = |slot: usize| self.columns.row(slot).slow_start(&self.config.knobs, now);
        let gates = if now < self.slow_until { slots.map(gate).collect() } else { Vec::new() };
        let arrivals = self.arrivals.expected() * f64::from(self.balancers);
        scores::criteria(&self.config.criteria, &pasts, self.balancers, gates, arrivals, weights)
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
        let backends = occupied.map(|member| member.backend.clone()).collect();
        self.epoch += 1;
        self.shared = Arc::new(Members::new(backends).with_epoch(self.epoch));
        if let Some(probes) = &self.probes {
            let mut probes = probes.lock().unwrap_or_else(PoisonError::into_inner);
            probes.renumber(self.epoch, self.shared.backends().len());
        }
        let joined = self.columns.joined.iter().zip(&self.columns.occupied);
        let first = joined.filter(|(_, occupied)| **occupied).map(|(joined, _)| *joined).min();
        self.established = first.map_or(Timestamp::NEVER, |first| first + self.config.knobs.slow_start);
        self.members_changed = false;
    }
}

fn stale_after_ms(registration: &Registration) -> u32 {
    u32::try_from(registration.stale_after().as_millis()).unwrap_or(u32::MAX)
}

/// gRFC A58: operations for each unit of utilization, with the error penalty. Where a resource reports no operations, 0: it
/// takes the mean weight.
fn reported_weight(sample: &Sample) -> f32 {
    let Some(operations) = sample.operations.filter(|operations| *operations > 0.0) else { return 0.0 };
    if sample.busy <= 0.0 {
        return 0.0;
    }
    (operations / (sample.busy + sample.errors / operations * sample.error_penalty)) as f32
}

/// The look-up table of `maglev` of one allocation table, kept for as long as its quantised weights and members stay.
#[derive(Debug, Default)]
struct Hashing {
    epoch: u64,
    /// Of [`HASH_STEP_LOG2`]; `None`: left out.
    steps: Vec<Option<i32>>,
    maglev: Option<Arc<Maglev>>,
}

impl Hashing {
    fn of(&mut self, members: &Members, weights: &[f32]) -> Arc<Maglev> {
        let same_members = self.epoch == members.epoch() && self.steps.len() == weights.len();
        let step = |(place, weight): (usize, &f32)| {
            (*weight > 0.0).then(|| {
                let at = weight.log2() / HASH_STEP_LOG2;
                match self.steps.get(place).copied().flatten().filter(|_| same_members) {
                    Some(before) if (at - before as f32).abs() < HASH_HYSTERESIS => before,
                    _ => at.round() as i32,
                }
            })
        };
        let steps: Vec<Option<i32>> = weights.iter().enumerate().map(step).collect();
        if let Some(maglev) = self.maglev.as_ref().filter(|_| same_members && steps == self.steps) {
            return Arc::clone(maglev);
        }
        let quantised = |step: &Option<i32>| step.map_or(0.0, |step| (step as f32 * HASH_STEP_LOG2).exp2());
        let weights: Vec<f32> = steps.iter().map(quantised).collect();
        let maglev = Arc::new(Maglev::new(&members.hashes(), &weights));
        (self.epoch, self.steps, self.maglev) = (members.epoch(), steps, Some(Arc::clone(&maglev)));
        maglev
    }
}
