//! Registry view to allocation table. Pure: rows and a moment in, weights out.
//!
//! `adaptive` (and what `maglev` and `prequal` fall back on) gives each resource the weight `rate / utilization`, a ratio of two averages over the same time
//! ([`AVERAGED_OVER`]): what it does for each unit of its capacity. (gRPC's weighted round robin, gRFC A58, does the
//! same.) Taken plainly that ratio has two faults, because *we* decide the rate:
//!
//! * A resource that was busy for another reason got few flows, so its rate is low, so its ratio stays low when the
//!   reason has gone: its own background takes most of its (small) utilization. It would never come back.
//! * In an idle pool the ratio is that of two noises.
//!
//! So the rate enters with an exponent `c` between 0 and 1 (how far it is believed), relative to the resource's fair
//! share of its pool's rate, and the utilization with an exponent `h`, relative to the pool's mean:
//!
//! ```text
//! weight = registered * (rate / fair rate)^c / (utilization / mean utilization)^h
//! ```
//!
//! * `h` goes from 0 at utilizations below 5 % (noise) to 1 from 20 % on.
//! * `c` is high while utilization confirms the rate: less than the fair rate *and* busier than the mean, or more than
//!   the fair rate and less busy. Then utilization is what evens out, and shares follow capacity. Where utilization
//!   says the opposite, the rate is only what we gave: `c` is low and the weight goes back to the registered one within
//!   two or three averaging times, and not above it.
//! * From a utilization of 35 % on `c` is 1 whatever is confirmed (in between, from 15 % on): a resource that busy does
//!   something, and what it does for that is what it can do. Least cost leaves a slow resource less busy than a fast one,
//!   which is no reason to doubt that it is slow.
//! * `c` is lower where the rate is of few events: ten flows are no measurement.
//!
//! Then: within 0.1 to 10 x the mean, at most x or / 1.5 a second, mean 1, slow start.

use std::fmt;
use std::time::Duration;

use allocation::{Policy, Timestamp, WEIGHT_RATIO_MAX};

use crate::columns::{Columns, Row, tick};
use crate::{Estimates, Knobs};

/// Time constant of the averages of rates and utilization.
pub const AVERAGED_OVER: Duration = Duration::from_secs(3);
/// A slow start begins with this part of the weight.
pub const SLOW_START_FLOOR: f32 = 0.1;
/// Mean utilization of a pool above which weights are held: then everyone is busy, differences are noise, and moving
/// flows about only moves the queue.
pub const SATURATED_ABOVE: f32 = 0.9;

/// log2(1.5): the most a weight moves in a second, either way.
const STEP_PER_SECOND: f32 = 0.584_962_5;
/// How fast a weight grows that is beyond [`GROWTH_FREE_LOG2`]: by a factor of 2 in ten seconds.
const GROWTH_PER_SECOND: f32 = 0.1;
/// log2 of how many times its registered weight a resource may claim without that.
const GROWTH_FREE_LOG2: f32 = 1.0;
/// Time between two rebuilds that counts for a step: after a long quiet, a weight must not jump.
const STEP_TIME_MAX: Duration = Duration::from_secs(2);
/// Exponent of the rate where utilization contradicts it, and where it confirms it.
const BELIEF: (f32, f32) = (0.25, 0.9);
/// Utilization from which a rate begins to be believed whatever confirms it, and from which it is believed entirely.
const SURE: (f32, f32) = (0.15, 0.35);
/// How far from the pool's mean a utilization (as log2 of the ratio; 10 %) must be to confirm a rate fully.
const CONFIRMED_AT: f32 = 0.1375;
/// Events in the averaged time at which a rate is believed by half; so many at a utilization that is believed little, and
/// a quarter of it at one that is believed entirely.
const EVENTS_HALF: f32 = 20.0;
/// What a weight's distance from the registered one (as log2; 10 %) is short of: so much of it may be noise.
const NOISE: f32 = 0.1375;
/// Part of the fair rate (as log2: 0.7) at which being less busy is no reason for more than the registered weight.
const NO_MORE_BELOW: f32 = 0.5;
/// A rate of `r` a second is one of about `6 r` events: two averaging times.
const EVENTS_PER_RATE: f32 = 6.0;
/// log2 of [`WEIGHT_RATIO_MAX`].
const WEIGHT_RANGE_LOG2: f32 = std::f32::consts::LOG2_10;
/// Rates further from the fair one than this factor tell no more.
const RATE_RATIO_MAX_LOG2: f32 = 4.32;
/// Utilization below which `h` is 0, and from which it is 1.
const IDLE: (f32, f32) = (0.05, 0.20);
/// Below it a logarithm would make much of nothing.
const UTILIZATION_MIN: f64 = 0.01;
const RATE_MIN: f64 = 1e-6;
/// Flows opened a second, on average for each resource, from which that rate is used; below half of it, flows open is
/// used again. So it is where flows last longer than [`AVERAGED_OVER`] (twice that) on average: what keeps a resource busy
/// then is what it was given long ago.
const OPENED_RATE_MIN: f32 = 1.0;
/// How fast `utilization` moves weights: the part of the difference in a second.
const EVEN_OUT_PER_SECOND: f32 = 0.15;
/// No weight is farther from the mean, whatever a file says: registered weights are within a factor of a million.
const RESTORED_LOG2_MAX: f32 = 20.0;
/// log2 distance from its target at which a weight has arrived: 1 %.
const ARRIVED: f32 = 0.0144;

/// Why the weights of a pool are held where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// Fewer than half of those who have ever reported did so lately: the report plane is at fault, not they.
    StaleReports,
    /// Mean utilization is above [`SATURATED_ABOVE`].
    FleetSaturated,
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StaleReports => "stale reports",
            Self::FleetSaturated => "fleet saturated",
        })
    }
}

/// What the rate of a weight counts. One for all of a pool at a time, so that weights compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RateUnit {
    /// Operations a second, by the resources' own reports; used where every one reports them.
    Operations,
    /// Flows opened a second, by our own count.
    FlowsOpened,
    /// Flows open, by our own count: for long flows, of which few are opened.
    #[default]
    FlowsOpen,
}

impl RateUnit {
    /// Its name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Operations => "operations",
            Self::FlowsOpened => "flows opened",
            Self::FlowsOpen => "flows open",
        }
    }
}

impl fmt::Display for RateUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One report, and our own counts at its arrival.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) busy: f64,
    pub(crate) operations: Option<f64>,
    pub(crate) errors: f64,
    /// An error for each operation counts as so much utilization.
    pub(crate) error_penalty: f64,
    pub(crate) flows_opened: u64,
    pub(crate) fast_resets: u64,
    pub(crate) flows_open: u32,
    /// Time to the first byte by our own measure, where there is any.
    pub(crate) latency_seconds: Option<f64>,
}

/// The averages of one resource's reports.
#[derive(Debug, Clone)]
pub(crate) struct Estimator {
    sampled: Timestamp,
    flows_opened: u64,
    fast_resets: u64,
    /// Averages; the first three in each [`RateUnit`].
    operations: f64,
    opened: f64,
    open: f64,
    errors: f64,
    utilization: f64,
    seeded: bool,
}

impl Estimator {
    pub(crate) fn new(now: Timestamp) -> Self {
        Self {
            sampled: now,
            flows_opened: 0,
            fast_resets: 0,
            operations: 0.0,
            opened: 0.0,
            open: 0.0,
            errors: 0.0,
            utilization: 0.0,
            seeded: false,
        }
    }

    /// Averages the sample in, and writes what the policy needs of it into the row.
    pub(crate) fn record(&mut self, sample: &Sample, now: Timestamp, row: &mut Row) {
        let elapsed = now.since(self.sampled).as_secs_f64();
        row.carries_operations |= sample.operations.is_some();
        if self.seeded && elapsed == 0.0 {
            return;
        }
        // The first report may follow the registration at once: one flow in a millisecond is no thousand a second.
        let counted_over = if self.seeded { elapsed } else { elapsed.max(1.0) };
        let alpha = if self.seeded { -(-elapsed / AVERAGED_OVER.as_secs_f64()).exp_m1() } else { 1.0 };
        let per_second = |now: u64, before: u64| now.saturating_sub(before) as f64 / counted_over;
        // A flow that the backend resets before it answers is an error, whoever counts it.
        let errors = sample.errors + per_second(sample.fast_resets, self.fast_resets);
        let average = |mean: &mut f64, value: f64| *mean += alpha * (value - *mean);
        average(&mut self.operations, sample.operations.unwrap_or(0.0));
        average(&mut self.opened, per_second(sample.flows_opened, self.flows_opened));
        average(&mut self.open, f64::from(sample.flows_open));
        average(&mut self.errors, errors);
        // More than ten times its capacity is no more than ten times.
        average(&mut self.utilization, sample.busy.min(10.0));
        (self.sampled, self.seeded) = (now, true);
        (self.flows_opened, self.fast_resets) = (sample.flows_opened, sample.fast_resets);
        self.write(sample.error_penalty, row);
    }

    /// Its averages, for a restart.
    pub(crate) fn estimates(&self, row: &Row) -> Estimates {
        Estimates {
            operations: row.carries_operations.then_some(self.operations),
            flows_opened: self.opened,
            flows_open: self.open,
            errors: self.errors,
            utilization: self.utilization,
            log_weight: row.log_weight,
        }
    }

    /// With averages from before a restart; the row counts as one whose reports have ended, so its weight stays.
    pub(crate) fn restored(estimates: &Estimates, error_penalty: f64, now: Timestamp, row: &mut Row) -> Self {
        let rate = |value: f64| if value.is_finite() { value.max(0.0) } else { 0.0 };
        let estimator = Self {
            operations: rate(estimates.operations.unwrap_or(0.0)),
            opened: rate(estimates.flows_opened),
            open: rate(estimates.flows_open),
            errors: rate(estimates.errors),
            utilization: rate(estimates.utilization).min(10.0),
            seeded: true,
            ..Self::new(now)
        };
        row.carries_operations = estimates.operations.is_some();
        if estimates.log_weight.is_finite() {
            row.log_weight = estimates.log_weight.clamp(-RESTORED_LOG2_MAX, RESTORED_LOG2_MAX);
        }
        row.fresh_until = 1;
        estimator.write(error_penalty, row);
        estimator
    }

    fn write(&self, error_penalty: f64, row: &mut Row) {
        let log = |value: f64, least: f64| value.max(least).log2() as f32;
        let attempts = if self.operations > 0.0 { self.operations } else { self.opened };
        // gRFC A58's error penalty; with 1, who fails everything counts as fully busy on top.
        let failed = if self.errors > 0.0 { (self.errors / attempts.max(self.errors)).min(1.0) } else { 0.0 };
        let utilization = self.utilization + failed * error_penalty;
        row.utilization = utilization as f32;
        row.log_utilization = log(utilization, UTILIZATION_MIN);
        (row.operations, row.log_operations) = (self.operations as f32, log(self.operations, RATE_MIN));
        (row.flows_opened, row.log_flows_opened) = (self.opened as f32, log(self.opened, RATE_MIN));
        (row.flows_open, row.log_flows_open) = (self.open as f32, log(self.open, RATE_MIN));
    }
}

impl Row {
    /// Its averaged rate.
    pub(crate) fn rate(&self, unit: RateUnit) -> f32 {
        match unit {
            RateUnit::Operations => self.operations,
            RateUnit::FlowsOpened => self.flows_opened,
            RateUnit::FlowsOpen => self.flows_open,
        }
    }

    /// The part of its weight that it gets, while it starts.
    pub(crate) fn slow_start(&self, knobs: &Knobs, now: Timestamp) -> f32 {
        if now >= self.slow_until || knobs.slow_start.is_zero() {
            return 1.0;
        }
        let part = now.since(self.joined).as_secs_f32() / knobs.slow_start.as_secs_f32();
        // gRFC A100 and Envoy have the same formula.
        part.powf(knobs.slow_start_aggression.recip()).clamp(SLOW_START_FLOOR, 1.0)
    }
}

impl Columns {
    /// Averaged rates and their logarithms.
    fn rates(&self, unit: RateUnit) -> (&[f32], &[f32]) {
        match unit {
            RateUnit::Operations => (&self.operations, &self.log_operations),
            RateUnit::FlowsOpened => (&self.flows_opened, &self.log_flows_opened),
            RateUnit::FlowsOpen => (&self.flows_open, &self.log_flows_open),
        }
    }
}

/// Who takes part in what, by slot: 1 or 0, to be multiplied with. Kept between rebuilds for its memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Masks {
    /// Gets flows.
    eligible: Vec<f32>,
    /// Gets flows and reports.
    fresh: Vec<f32>,
    /// Gets flows, and its weight may move: its reports have not ended.
    free: Vec<f32>,
}

/// A pool in numbers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Survey {
    pub(crate) guard: Option<Guard>,
    pub(crate) unit: RateUnit,
    eligible: f32,
    /// Of those who report.
    mean_utilization: f32,
    log_mean_utilization: f32,
    mean_rate: f32,
    /// log2 of the rate for each unit of registered weight.
    log_fair_rate: f32,
}

/// Sums up a pool. `before` is the unit it was weighed in so far.
pub(crate) fn survey(columns: &Columns, masks: &mut Masks, before: RateUnit, leases: Leases) -> Survey {
    let counts = fill(masks, columns, leases);
    let mut survey = Survey { unit: before, eligible: counts.eligible as f32, ..Survey::default() };
    if counts.fresh < counts.stale {
        survey.guard = Some(Guard::StaleReports);
    }
    if counts.fresh == 0 {
        return survey;
    }
    let count = counts.fresh as f32;
    let sum = |values: &[f32]| sum_of(&masks.fresh, values);
    let opened = sum(&columns.flows_opened);
    let opened_min = if before == RateUnit::FlowsOpened { OPENED_RATE_MIN / 2.0 } else { OPENED_RATE_MIN };
    let operations = if counts.carry == counts.fresh { sum(&columns.operations) } else { 0.0 };
    let open = sum(&columns.flows_open);
    let lasting_max = AVERAGED_OVER.as_secs_f32() * if before == RateUnit::FlowsOpened { 2.0 } else { 1.0 };
    let (unit, rate) = if operations > 0.0 {
        (RateUnit::Operations, operations)
    } else if opened >= opened_min * count && open <= lasting_max * opened {
        (RateUnit::FlowsOpened, opened)
    } else {
        (RateUnit::FlowsOpen, open)
    };
    let (utilization, registered) = (sum(&columns.utilization) / count, sum(&columns.registered));
    survey.unit = unit;
    survey.mean_rate = rate / count;
    survey.log_fair_rate = (rate / registered).max(RATE_MIN as f32).log2();
    survey.mean_utilization = utilization;
    survey.log_mean_utilization = utilization.max(UTILIZATION_MIN as f32).log2();
    if survey.guard.is_none() && utilization > SATURATED_ABOVE {
        survey.guard = Some(Guard::FleetSaturated);
    }
    survey
}

/// How many take part in what.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    eligible: u32,
    fresh: u32,
    stale: u32,
    /// Of the fresh ones, who report a rate of operations.
    carry: u32,
}

fn fill(masks: &mut Masks, columns: &Columns, leases: Leases) -> Counts {
    let Masks { eligible, fresh, free } = masks;
    for mask in [&mut *eligible, &mut *fresh, &mut *free] {
        mask.resize(columns.len(), 0.0);
    }
    for (eligible, wanted) in eligible.iter_mut().zip(&columns.wanted) {
        *eligible = f32::from(u8::from(*wanted));
    }
    if let Leases::SomeOver(now) = leases {
        for (eligible, _) in eligible.iter_mut().zip(&columns.lease_until).filter(|(_, until)| **until <= now)
        {
            *eligible = 0.0;
        }
    }
    let tick = tick(leases.now());
    let masks = eligible.iter().zip(fresh.iter_mut()).zip(free.iter_mut());
    for (((eligible, fresh), free), fresh_until) in masks.zip(&columns.fresh_until) {
        *fresh = if tick <= *fresh_until { *eligible } else { 0.0 };
        *free = if *fresh_until == 0 { *eligible } else { *fresh };
    }
    let carry: u32 = fresh
        .iter()
        .zip(&columns.carries_operations)
        .map(|(fresh, carries)| u32::from((*fresh > 0.0) & carries))
        .sum();
    // Whole numbers below 2^24: exact.
    let (eligible, fresh, free) = (total(eligible) as u32, total(fresh) as u32, total(free) as u32);
    Counts { eligible, fresh, stale: eligible - free, carry }
}

/// The moment, and whether a lease is over that nobody has looked at yet. Mostly none is: those are removed first.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Leases {
    AllHold(Timestamp),
    SomeOver(Timestamp),
}

impl Leases {
    fn now(self) -> Timestamp {
        match self {
            Self::AllHold(now) | Self::SomeOver(now) => now,
        }
    }
}

impl Survey {
    /// Of those who report, averaged.
    pub(crate) fn mean_utilization(&self) -> f32 {
        self.mean_utilization
    }

    /// `h`: how far a utilization is believed.
    pub(crate) fn utilization_belief(&self, utilization: f32) -> f32 {
        within((utilization.max(self.mean_utilization) - IDLE.0) / (IDLE.1 - IDLE.0), 0.0, 1.0)
    }

    /// log2 of the weight that each should have, on a level that all of a pool share. Who has never reported should
    /// have its registered one.
    fn targets(&self, columns: &Columns, masks: &Masks, targets: &mut Vec<f32>) {
        let (rates, log_rates) = columns.rates(self.unit);
        // Without any rate, all are alike in it.
        let rated = f32::from(u8::from(self.mean_rate > 0.0));
        let numbers =
            rates.iter().zip(log_rates).zip(columns.utilization.iter().zip(&columns.log_utilization));
        let registered = columns.log_registered.iter().zip(&masks.fresh);
        targets.resize(columns.len(), 0.0);
        for ((((rate, log_rate), (utilization, log_utilization)), (log_registered, fresh)), target) in
            numbers.zip(registered).zip(targets)
        {
            let more = (log_rate - log_registered - self.log_fair_rate) * rated;
            let busier =
                self.utilization_belief(*utilization) * (log_utilization - self.log_mean_utilization);
            *target = log_registered + fresh * offset(more, busier, *rate, *utilization);
        }
    }
}

/// How far (as log2) a weight should be from the registered one, of a resource that gets `more` than its fair rate and
/// is `busier` than the mean (both as log2, both may be negative).
fn offset(more: f32, busier: f32, rate: f32, utilization: f32) -> f32 {
    let more = within(more, -RATE_RATIO_MAX_LOG2, RATE_RATIO_MAX_LOG2);
    // 1: utilization contradicts the rate (gets less, and is not busier); 0: it confirms it.
    let against = if more > 0.0 { busier } else { -busier };
    let contradiction = within(1.0 + against * (1.0 / CONFIRMED_AT), 0.0, 1.0);
    let sure = within((utilization - SURE.0) * (1.0 / (SURE.1 - SURE.0)), 0.0, 1.0);
    let believed = BELIEF.1 - (BELIEF.1 - BELIEF.0) * contradiction;
    let believed = believed + (1.0 - believed) * sure;
    let events = EVENTS_PER_RATE * rate;
    let belief = believed * events / (events + EVENTS_HALF * (1.0 - 0.75 * sure));
    // Who gets less than its fair rate and is less busy for it has shown no more than that: what others do there is the
    // same with few flows. (A newcomer beside those that hold long flows is the case in point.)
    let gets_enough = within(1.0 + more * (1.0 / NO_MORE_BELOW), 0.0, 1.0);
    let most = within(-busier * gets_enough, 0.0, WEIGHT_RANGE_LOG2);
    let most = if more < 0.0 { most } else { WEIGHT_RANGE_LOG2 };
    let offset = within(belief * more - busier, -WEIGHT_RANGE_LOG2, most);
    // Equal resources never look quite equal, and least cost makes much of little.
    offset - within(offset, -NOISE, NOISE)
}

/// Memory of an allocation, kept for the next: a fresh half of a megabyte each time would cost more in page faults than
/// the arithmetic in it.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    masks: Masks,
    targets: Vec<f32>,
}

/// What [`weigh`] reads, and the columns whose weights it moves.
#[derive(Debug)]
pub(crate) struct View<'a> {
    pub(crate) columns: &'a mut Columns,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) policy: Policy,
    pub(crate) knobs: &'a Knobs,
    pub(crate) unit: RateUnit,
    /// Where newcomers start, above their registered weight (as log2); from the last allocation.
    pub(crate) level: f32,
    /// When the pool was allocated last.
    pub(crate) before: Timestamp,
    /// Nobody starts slowly any more from then on.
    pub(crate) slow_until: Timestamp,
}

/// The weights of a pool and what was found on the way.
#[derive(Debug)]
pub(crate) struct Weighed {
    /// By slot; 0: gets no new flows. The mean of the others is 1.
    pub(crate) weights: Vec<f32>,
    pub(crate) unit: RateUnit,
    pub(crate) level: f32,
    /// How many have a weight, which is the sum of all.
    pub(crate) eligible: f32,
    pub(crate) guard: Option<Guard>,
    /// How many balancers share the pool, by its resources' reports.
    pub(crate) balancers: f32,
    /// Weights will go on moving without another report.
    pub(crate) moving: bool,
    /// How many want more than their weight may grow.
    pub(crate) held: u32,
}

/// Weighs the resources.
pub(crate) fn weigh(view: View<'_>, leases: Leases) -> Weighed {
    let View { columns, scratch: Scratch { masks, targets }, policy, knobs, .. } = view;
    let now = leases.now();
    let survey = survey(columns, masks, view.unit, leases);
    let eligible = &masks.eligible;
    let elapsed = now.since(view.before).min(STEP_TIME_MAX);
    let (mut moving, mut level, mut held) = (false, view.level, 0);
    let mut weights: Vec<f32> = match policy {
        Policy::Adaptive | Policy::Maglev | Policy::Prequal => {
            if survey.guard.is_none() {
                survey.targets(columns, masks, targets);
                let fixed = (masks.free.as_slice(), columns.log_registered.as_slice());
                let stepped = step(&mut columns.log_weight, targets, fixed, (level, elapsed));
                Stepped { moving, level, held } = stepped;
            }
            learned(columns, masks, &survey, &mut level)
        }
        Policy::Utilization => {
            if survey.guard.is_none() {
                moving = survey.even_out(columns, masks, elapsed);
            }
            learned(columns, masks, &survey, &mut level)
        }
        Policy::WeightedRoundRobin => {
            moving = true;
            by_newest_report(columns, eligible, knobs, now)
        }
        Policy::LeastConnections | Policy::P2c | Policy::PeakEwma | Policy::Criteria => {
            columns.registered.iter().zip(eligible).map(|(weight, mask)| weight * mask).collect()
        }
        Policy::RoundRobin | Policy::Random | Policy::First => eligible.clone(),
    };
    let starts = !matches!(policy, Policy::RoundRobin | Policy::Random | Policy::First);
    if now < view.slow_until && starts {
        moving = true;
        for (slot, weight) in weights.iter_mut().enumerate() {
            *weight *= columns.row(slot).slow_start(knobs, now);
        }
    }
    let sum = sum_of(eligible, &weights);
    let to_mean_one = if sum > 0.0 { survey.eligible / sum } else { 0.0 };
    for weight in &mut weights {
        *weight *= to_mean_one;
    }
    columns.weight.copy_from_slice(&weights);
    let balancers =
        if survey.eligible > 0.0 { sum_of(eligible, &columns.balancers) / survey.eligible } else { 1.0 };
    Weighed {
        weights,
        unit: survey.unit,
        level,
        eligible: survey.eligible,
        guard: survey.guard,
        balancers,
        moving,
        held,
    }
}

/// The weights that were moved so far, around their mean and within their bounds.
fn learned(columns: &mut Columns, masks: &Masks, survey: &Survey, level: &mut f32) -> Vec<f32> {
    let eligible = &masks.eligible;
    *level -= centre(&mut columns.log_weight, eligible, survey.eligible);
    let mut weights: Vec<f32> =
        columns.log_weight.iter().zip(eligible).map(|(log, mask)| exp2(*log) * mask).collect();
    clamp_to_mean(&mut weights, survey.eligible);
    weights
}

/// gRFC A58: rate / utilization of the newest report, while there is one; the mean of the others for whoever has none; all
/// alike (by registered weight) where fewer than two have one.
fn by_newest_report(columns: &Columns, eligible: &[f32], knobs: &Knobs, now: Timestamp) -> Vec<f32> {
    let counts = |slot: usize| {
        let (since, reported) = (columns.weighted_since[slot], columns.reported[slot]);
        since != Timestamp::NEVER
            && now.since(since) >= knobs.blackout
            && now.since(reported) < knobs.weight_expiration
    };
    let mut weights: Vec<f32> = (0..columns.len())
        .map(|slot| if counts(slot) { columns.reported_weight[slot] * eligible[slot] } else { 0.0 })
        .collect();
    let known = weights.iter().filter(|weight| **weight > 0.0).count();
    if known < 2 {
        return columns.registered.iter().zip(eligible).map(|(weight, mask)| weight * mask).collect();
    }
    let mean = total(&weights) / known as f32;
    for (weight, eligible) in weights.iter_mut().zip(eligible) {
        if *weight == 0.0 {
            *weight = mean * eligible;
        }
    }
    weights
}

impl Survey {
    /// One step of the feedback of `utilization` (Dropbox's Robinhood has the same setpoint, the mean of the pool): who is
    /// busier than the mean gets less, who is less busy gets more, until all are alike. Gives whether they are not yet.
    ///
    /// Utilization follows weight in proportion, so in logarithms this is an integrator around a gain of 1: the error falls
    /// by [`EVEN_OUT_PER_SECOND`], slowly against the three seconds of the average and the second of a report.
    fn even_out(&self, columns: &mut Columns, masks: &Masks, elapsed: Duration) -> bool {
        let gain = EVEN_OUT_PER_SECOND * elapsed.as_secs_f32();
        let most = STEP_PER_SECOND * elapsed.as_secs_f32();
        let numbers = columns.log_utilization.iter().zip(&columns.utilization).zip(&masks.fresh);
        let mut moving = false;
        for (weight, ((log_utilization, utilization), fresh)) in columns.log_weight.iter_mut().zip(numbers) {
            let busier = (log_utilization - self.log_mean_utilization) * fresh;
            let believed = self.utilization_belief(*utilization) * busier;
            moving |= believed.abs() > ARRIVED;
            *weight -= within(gain * believed, -most, most);
        }
        moving
    }
}

/// Moves the weights (as logarithms) towards their targets. Gives whether some have not arrived, and the level.
///
/// Targets compare with each other only. The level is how far the weights that may move are above their targets on
/// average: with it added, a pool's weights move against each other and not all in one direction.
///
/// Beyond twice its registered weight (in the pool's scale) a weight grows by [`GROWTH_PER_SECOND`] only: a resource's own
/// claim must not win it half a pool within seconds. How many are held by that is given too.
fn step(
    weights: &mut [f32],
    targets: &mut [f32],
    (free, log_registered): (&[f32], &[f32]),
    (level, elapsed): (f32, Duration),
) -> Stepped {
    let count = total(free);
    if count == 0.0 {
        return Stepped { moving: false, level, held: 0 };
    }
    // Weights have a mean of 0, as logarithms.
    let free_of = GROWTH_FREE_LOG2 - sum_of(free, log_registered) / count;
    let growth = GROWTH_PER_SECOND * elapsed.as_secs_f32() - level;
    let mut held = 0.0;
    // Mostly nobody claims as much, and two looks say so.
    if extremes(weights, |weight| weight).1 > extremes(log_registered, |registered| registered).0 + free_of {
        let all = weights.iter().zip(targets.iter_mut()).zip(free.iter().zip(log_registered));
        for ((weight, target), (free, registered)) in all {
            // The claim itself is cut, and before the level is found: else the others would fall in its place.
            let most = if *weight > registered + free_of { weight + growth } else { f32::INFINITY };
            held += if *target > most + ARRIVED { *free } else { 0.0 };
            *target = if *target > most { most } else { *target };
        }
    }
    let level = (sum_of(free, weights) - sum_of(free, targets)) / count;
    let most = STEP_PER_SECOND * elapsed.as_secs_f32();
    for ((weight, target), free) in weights.iter_mut().zip(targets.iter_mut()).zip(free) {
        let distance = (*target + level - *weight) * free;
        let moved = within(distance, -most, most);
        *weight += moved;
        // From here on, what is left of the way.
        *target = distance - moved;
    }
    let (back, ahead) = extremes(targets, |left| left);
    Stepped { moving: back < -ARRIVED || ahead > ARRIVED, level, held: held as u32 }
}

/// What became of a step.
#[derive(Debug, Clone, Copy, Default)]
struct Stepped {
    /// Some have not arrived.
    moving: bool,
    level: f32,
    /// How many want more than they may grow.
    held: u32,
}

/// Takes the mean of all weights (as logarithms) to 0; gives how far it was.
fn centre(weights: &mut [f32], eligible: &[f32], count: f32) -> f32 {
    let mean = sum_of(eligible, weights) / count.max(1.0);
    for (weight, eligible) in weights.iter_mut().zip(eligible) {
        *weight -= mean * eligible;
    }
    mean
}

/// Keeps all weights above 0 within [`WEIGHT_RATIO_MAX`] of their mean, either way. Clamping moves the mean, so it is
/// looked at again, a few times; mostly there is nothing to clamp, and one look says so.
fn clamp_to_mean(weights: &mut [f32], eligible: f32) {
    for _ in 0..8 {
        let mean = total(weights) / eligible.max(1.0);
        let (low, high) = (mean / WEIGHT_RATIO_MAX, mean * WEIGHT_RATIO_MAX);
        let slack = 0.001 * mean;
        let (least, most) = extremes(weights, |weight| if weight > 0.0 { weight } else { mean });
        if least >= low - slack && most <= high + slack {
            return;
        }
        for weight in weights.iter_mut().filter(|weight| **weight > 0.0) {
            *weight = within(*weight, low, high);
        }
    }
}

/// `f32::clamp` without its look at the bounds, which keeps a loop from being made wide.
fn within(value: f32, low: f32, high: f32) -> f32 {
    let value = if value < low { low } else { value };
    if value > high { high } else { value }
}

/// The sum of the products.
fn sum_of(masks: &[f32], values: &[f32]) -> f32 {
    let (mask_lanes, mask_rest) = masks.as_chunks::<8>();
    let (value_lanes, value_rest) = values.as_chunks::<8>();
    let mut lanes = [0.0_f32; 8];
    for (masks, values) in mask_lanes.iter().zip(value_lanes) {
        for ((lane, mask), value) in lanes.iter_mut().zip(masks).zip(values) {
            *lane += mask * value;
        }
    }
    lanes.iter().sum::<f32>()
        + mask_rest.iter().zip(value_rest).map(|(mask, value)| mask * value).sum::<f32>()
}

/// The sum, in eight lanes: whether the order of a floating-point sum is free, the compiler cannot know.
fn total(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut lanes = [0.0_f32; 8];
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += value;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

/// The least and the greatest of all values, as `seen`; infinities where there is none.
fn extremes(values: &[f32], seen: impl Fn(f32) -> f32) -> (f32, f32) {
    let (chunks, rest) = values.as_chunks::<8>();
    let (mut least, mut most) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
    for chunk in chunks {
        let chunk = chunk.map(&seen);
        for (least, value) in least.iter_mut().zip(&chunk) {
            *least = if value < least { *value } else { *least };
        }
        for (most, value) in most.iter_mut().zip(&chunk) {
            *most = if value > most { *value } else { *most };
        }
    }
    let rest = || rest.iter().map(|value| seen(*value));
    (rest().chain(least).fold(f32::INFINITY, f32::min), rest().chain(most).fold(f32::NEG_INFINITY, f32::max))
}

/// 2 to the power of `x`, to six digits, for `x` within +-60: a polynomial on the fraction (minimax, Cephes' `exp2f`),
/// the whole part straight into the exponent. A library's `exp2` is called once for each number; this is made wide.
fn exp2(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it leaves the nearest whole number in the low bits of the mantissa.
    const WHOLE: f32 = 12_582_912.0;
    let x = within(x, -60.0, 60.0);
    let shifted = x + WHOLE;
    let f = x - (shifted - WHOLE);
    let power = 1.535_336_2e-4_f32;
    let power = power * f + 1.339_887_4e-3;
    let power = power * f + 9.618_437e-3;
    let power = power * f + 5.550_332_5e-2;
    let power = power * f + 2.402_264_7e-1;
    let power = power * f + 6.931_472e-1;
    let power = power * f + 1.0;
    power * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn powers_of_two_are_right_to_six_digits(x in -60.0_f32..60.0) {
            prop_assert!((exp2(x) / x.exp2() - 1.0).abs() < 1e-6, "{} is not {}", exp2(x), x.exp2());
        }

        #[test]
        fn clamped_weights_are_within_ten_of_their_mean(weights in prop::collection::vec(
            prop_oneof![Just(0.0_f32), 1e-3_f32..1e3], 1..300))
        {
            let mut weights = weights;
            let zeros = weights.iter().filter(|weight| **weight == 0.0).count();
            let eligible = weights.len() - zeros;
            prop_assume!(eligible > 0);
            clamp_to_mean(&mut weights, eligible as f32);
            let mean = weights.iter().sum::<f32>() / eligible as f32;
            for weight in weights.iter().filter(|weight| **weight > 0.0) {
                prop_assert!(*weight < 10.2 * mean && *weight > mean / 10.2, "{weight} of mean {mean}");
            }
            prop_assert_eq!(weights.iter().filter(|weight| **weight == 0.0).count(), zeros);
        }
    }

    #[test]
    fn a_rate_is_believed_as_far_as_there_is_reason() {
        // Gets half of what is fair and is less busy for it, but busy: it is slow.
        let slow = offset(-1.0, -0.5, 50.0, 0.4);
        assert!((-0.4..-0.3).contains(&slow), "{slow}");
        // Gets half and is nearly idle: what it can do is not known.
        assert_eq!(offset(-1.0, -0.5, 50.0, 0.1), 0.0);
        // Gets half and is busier: others keep it busy, whatever its utilization.
        let burning = offset(-1.0, 0.5, 50.0, 0.1);
        assert!((-1.3..-1.1).contains(&burning), "{burning}");
        // A newcomer: next to nothing, and next to idle.
        assert_eq!(offset(-4.0, -3.0, 100.0, 0.06), 0.0);
        // Nearly equal.
        assert_eq!(offset(0.1, 0.02, 1_000.0, 0.7), 0.0);
    }

    #[test]
    fn sums_take_every_value() {
        let values: Vec<f32> = (0..19).map(|n| n as f32).collect();
        assert_eq!(sum_of(&[1.0; 19], &values), 171.0);
        assert_eq!(total(&values), 171.0);
        assert_eq!(sum_of(&[], &[]), 0.0);
        assert_eq!(extremes(&values, |value| -value), (-18.0, 0.0));
        assert_eq!(extremes(&values[..3], |value| value + 1.0), (1.0, 3.0));
    }

    #[test]
    fn a_claim_beyond_twice_the_registered_weight_grows_slowly() {
        let (free, registered) = ([1.0; 4], [0.0, 1.0, 0.0, -1.0]);
        let mut weights = [0.0, 1.0, 0.0, -1.0];
        let mut level = 0.0;
        let mut second = |weights: &mut [f32; 4], claim: f32| {
            let mut targets = [claim, 1.0, 0.0, -1.0];
            let stepped = step(weights, &mut targets, (&free, &registered), (level, Duration::from_secs(1)));
            level = stepped.level - centre(weights, &free, 4.0);
            stepped
        };
        let mut held = 0;
        for _ in 0..4 {
            held = second(&mut weights, 6.0).held;
        }
        let after_four = weights[0];
        assert!(after_four > 1.0 && held == 1, "twice as much within four seconds: {weights:?}");
        for _ in 0..10 {
            held = second(&mut weights, 6.0).held;
        }
        let grown = weights[0] - after_four;
        assert!((0.5..1.1).contains(&grown) && held == 1, "and again in ten more: {weights:?}");
        assert!((weights[1] - weights[2] - 1.0).abs() < 0.1, "the others stay among themselves: {weights:?}");
        // What falls, falls as fast as ever, and nobody is held.
        let before = weights[0];
        assert_eq!(second(&mut weights, -2.0).held, 0);
        assert!(weights[0] < before - 0.4, "{weights:?}");
    }
}
