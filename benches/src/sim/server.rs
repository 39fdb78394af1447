//! A server: a queue, a few places to serve in, a speed that changes, and what its sidecar measures.

use std::collections::VecDeque;

use super::balancer::ServerReport;
use super::event::Time;
use super::random::{Random, Stream};

/// How fast a server is, over time.
#[derive(Debug, Clone)]
pub(crate) struct Speed {
    /// What everything else is multiplied with.
    pub(crate) base: f64,
    /// Where the other factor is drawn from: the first band whose probability (counted up) is not reached.
    pub(crate) bands: Vec<Band>,
    /// Bounds of the time between two draws, in seconds; none: it is drawn once.
    pub(crate) redraw: Option<(f64, f64)>,
}

/// A range of speeds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Band {
    /// Probability of this one and all before it.
    pub(crate) until: f64,
    /// Evenly between these.
    pub(crate) range: (f64, f64),
}

impl Speed {
    /// Always the same.
    pub(crate) fn steady(base: f64) -> Self {
        Self { base, bands: vec![Band { until: 1.0, range: (1.0, 1.0) }], redraw: None }
    }

    fn draw(&self, random: &mut Random) -> f64 {
        let place = random.unit();
        let factor = random.unit();
        let band = self.bands.iter().find(|band| place < band.until).or_else(|| self.bands.last());
        band.map_or(self.base, |band| self.base * (band.range.0 + (band.range.1 - band.range.0) * factor))
    }
}

/// What a server's utilization is measured in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Meter {
    /// Part of its places that were busy: at most 1.
    Busy,
    /// Work done, over what it is allotted (1 for each place): above 1 where it may use what others leave.
    Allotment,
    /// So much for itself, and so much for each flow open: long flows.
    Flows { base: f64, each: f64 },
}

/// Something that changes in a scenario.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Change {
    /// It is so many times as fast.
    Faster(f64),
    /// From now on it resets every connection.
    Fail,
    /// It joins; until then nobody knows it.
    Join,
}

/// What a server is made with.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Flows served at once.
    pub(crate) places: u32,
    /// How fast.
    pub(crate) speed: Speed,
    /// What happens to it, by seconds.
    pub(crate) changes: Vec<(f64, Change)>,
}

impl Plan {
    /// Joins later than all others.
    pub(crate) fn joins(&self) -> bool {
        self.changes.iter().any(|(_, change)| *change == Change::Join)
    }
}

/// Completions that a server remembers for those who probe it.
const REMEMBERED: usize = 64;
/// Of them, of how many (those of the nearest RIF) the median is taken.
const NEAREST: usize = 9;

/// A server at work.
#[derive(Debug)]
pub(crate) struct Server {
    plan: Plan,
    meter: Meter,
    random: Random,
    speed: f64,
    faster: f64,
    /// It resets every connection.
    pub(crate) failing: bool,
    /// Served at the moment, dead ones too.
    in_service: u32,
    /// Waiting, dead ones too.
    waiting: VecDeque<u32>,
    /// In it whose client is still there.
    alive: u32,
    changed: Time,
    /// Place-seconds busy since the start.
    busy: f64,
    /// Work done since the start.
    work: f64,
    completed: u64,
    errors: u64,
    last: (Time, f64, f64, u64, u64),
    /// RIF at arrival and latency in seconds, of the last completions.
    remembered: VecDeque<(u32, f32)>,
}

impl Server {
    pub(crate) fn new(plan: Plan, meter: Meter, seed: u64, number: usize) -> Self {
        let mut random = Random::new(seed, Stream::Speed(number));
        let speed = plan.speed.draw(&mut random);
        Self {
            plan,
            meter,
            random,
            speed,
            faster: 1.0,
            failing: false,
            in_service: 0,
            waiting: VecDeque::new(),
            alive: 0,
            changed: Time::default(),
            busy: 0.0,
            work: 0.0,
            completed: 0,
            errors: 0,
            last: (Time::default(), 0.0, 0.0, 0, 0),
            remembered: VecDeque::with_capacity(REMEMBERED),
        }
    }

    /// Flows in it: waiting or in service.
    pub(crate) fn rif(&self) -> u32 {
        self.alive
    }

    /// Draws the speed anew; gives when it will be next, in seconds.
    pub(crate) fn redraw(&mut self) -> Option<f64> {
        self.speed = self.plan.speed.draw(&mut self.random);
        self.next_redraw()
    }

    /// Seconds to the next draw of the speed.
    pub(crate) fn next_redraw(&mut self) -> Option<f64> {
        let bounds = self.plan.speed.redraw?;
        Some(self.random.between(bounds))
    }

    /// A change of its plan: when, and what.
    pub(crate) fn change(&self, number: usize) -> (f64, Change) {
        self.plan.changes[number]
    }

    /// How many changes there will be.
    pub(crate) fn changes(&self) -> usize {
        self.plan.changes.len()
    }

    pub(crate) fn be_faster(&mut self, factor: f64) {
        self.faster *= factor;
    }

    /// Place-seconds busy until now.
    pub(crate) fn busy_until(&mut self, now: Time) -> f64 {
        self.busy += f64::from(self.in_service) * now.since(self.changed);
        self.changed = now;
        self.busy
    }

    /// Flows served at once.
    pub(crate) fn places(&self) -> u32 {
        self.plan.places
    }

    /// A flow comes in; true: it is to be served at once, see [`Self::serve`].
    pub(crate) fn arrive(&mut self, flow: u32) -> bool {
        self.alive += 1;
        if self.in_service < self.plan.places {
            return true;
        }
        self.waiting.push_back(flow);
        false
    }

    /// A connection that it resets.
    pub(crate) fn reset(&mut self) {
        self.errors += 1;
    }

    /// Starts to serve `work` seconds of work; gives how long it will take. A service keeps the speed it began with.
    pub(crate) fn serve(&mut self, work: f64, now: Time) -> f64 {
        self.busy_until(now);
        self.in_service += 1;
        work / (self.speed * self.faster)
    }

    /// A flow has been served, whether its client is still there or not.
    pub(crate) fn served(&mut self, work: f64, now: Time) {
        self.busy_until(now);
        self.in_service -= 1;
        self.work += work;
    }

    /// Its client got the answer.
    pub(crate) fn answered(&mut self, rif_at_arrival: u32, latency: f64) {
        self.alive -= 1;
        self.completed += 1;
        if self.remembered.len() == REMEMBERED {
            self.remembered.pop_front();
        }
        self.remembered.push_back((rif_at_arrival, latency as f32));
    }

    /// A client went away.
    pub(crate) fn abandoned(&mut self) {
        self.alive -= 1;
    }

    /// Who waits longest, if there is a place.
    pub(crate) fn next_waiting(&mut self) -> Option<u32> {
        if self.in_service < self.plan.places { self.waiting.pop_front() } else { None }
    }

    /// What a probe is answered with: RIF, and the median latency (in seconds) of recent flows that found about as
    /// many in the server as there are now.
    pub(crate) fn probe(&self) -> (u32, f32) {
        let mut near: Vec<(u32, f32)> =
            self.remembered.iter().rev().map(|(rif, latency)| (rif.abs_diff(self.alive), *latency)).collect();
        near.sort_by_key(|(distance, _)| *distance);
        near.truncate(NEAREST);
        near.sort_by(|a, b| a.1.total_cmp(&b.1));
        (self.alive, near.get(near.len() / 2).map_or(0.0, |(_, latency)| *latency))
    }

    /// What has been measured since the last report.
    pub(crate) fn report(&mut self, now: Time) -> ServerReport {
        let busy = self.busy_until(now);
        let (at, busy_then, work_then, completed_then, errors_then) = self.last;
        self.last = (now, busy, self.work, self.completed, self.errors);
        let interval = now.since(at).max(1e-3);
        let allotted = f64::from(self.plan.places) * interval;
        let utilization = match self.meter {
            Meter::Busy => (busy - busy_then) / allotted,
            Meter::Allotment => (self.work - work_then) / allotted,
            Meter::Flows { base, each } => base + each * f64::from(self.alive),
        };
        let rate = (self.completed - completed_then) as f64 / interval;
        let rate = (!matches!(self.meter, Meter::Flows { .. })).then_some(rate);
        // A sinkhole answers its sidecar's questions as it answers its clients: it counts nothing.
        let errors = if self.failing { 0.0 } else { (self.errors - errors_then) as f64 / interval };
        ServerReport { utilization, rate, errors }
    }
}
