//! What a resource was like until now: the history of its dimensions, what the hours ahead were like on earlier days, and
//! its state by each criterion.

use std::time::Duration;

use allocation::{Score, Timestamp};

use crate::criteria::{Criterion, Footprint};
use crate::history::{Aggregate, Chunk, History};
use crate::policy::Sample;
use crate::{PoolConfig, Utilization};

/// How often a forecast is made anew.
const FORECAST_EVERY: Duration = Duration::from_secs(30);
/// Flows open on average, in the history: what windows of other dimensions are corrected by.
pub(crate) const CONNECTIONS: &str = "connections";
/// How busy it is in all: what forecasts are of, and what spilling looks at.
pub(crate) const BUSY: &str = "utilization";

/// One resource's.
#[derive(Debug)]
pub(crate) struct Past {
    /// Its times are since 1970, so that it outlives the process and hours are those of the day; all others here are the
    /// process's.
    history: History,
    /// When the process's timestamps began, since 1970.
    origin: Duration,
    /// There are reports since stretches were given last.
    news: bool,
    /// Where each dimension of the last report was in the history, in the order of reports: mostly they are there again.
    places: Vec<u8>,
    bytes: usize,
    forecast: Option<f64>,
    forecast_at: Timestamp,
    /// In the order of the pool's criteria.
    pub(crate) criteria: Vec<CriterionState>,
    /// How busy it is, corrected by flows.
    pub(crate) busy: CriterionState,
}

/// One resource by one criterion.
#[derive(Debug, Clone, Default)]
pub(crate) struct CriterionState {
    pub(crate) footprint: Footprint,
    /// As of the newest sample; `None`: nothing was said of it.
    pub(crate) sampled: Option<Sampled>,
}

/// A value, and the flows that it is the value of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sampled {
    pub(crate) value: f64,
    /// Flows open when it was so: for a window, on average over it.
    pub(crate) flows: f64,
    /// A value over a window is so many times the value of a moment: for a total, its seconds.
    pub(crate) scale: f64,
    pub(crate) at: Timestamp,
}

impl Past {
    pub(crate) fn new(config: &PoolConfig, holds_for: Duration, origin: Duration) -> Self {
        let mut history = History::new(holds_for);
        for criterion in &config.criteria {
            history.prefer(criterion.metric());
        }
        for dimension in [BUSY, CONNECTIONS] {
            history.prefer(dimension);
        }
        Self {
            origin,
            news: false,
            bytes: 0,
            forecast: None,
            forecast_at: Timestamp::ZERO,
            places: Vec::new(),
            criteria: vec![CriterionState::default(); config.criteria.len()],
            busy: CriterionState::default(),
            history,
        }
    }

    pub(crate) fn set_holds_for(&mut self, holds_for: Duration) {
        self.history.set_holds_for(holds_for);
    }

    /// Memory of the history, in bytes, as of the last report.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How busy it will be by the hours ahead on earlier days, where the pool asks for it.
    pub(crate) fn forecast(&self) -> Option<f64> {
        self.forecast
    }

    /// Takes a report in. Without `room`, no dimension is begun that there is no history of yet. Gives how many were refused
    /// for want of it.
    pub(crate) fn record(
        &mut self,
        config: &PoolConfig,
        sample: &Sample,
        utilization: &Utilization,
        room: bool,
        now: Timestamp,
    ) -> u64 {
        let wall = now + self.origin;
        self.news = true;
        let flows = f64::from(sample.flows_open);
        let mut refused = 0;
        let mut turn = 0;
        each_dimension(sample, utilization, |dimension, value| {
            let known = room || self.history.latest(dimension).is_some();
            refused += u64::from(!known);
            if known {
                if turn == self.places.len() {
                    self.places.push(0);
                }
                self.history.record_near(&mut self.places[turn], dimension, value, wall);
                turn += 1;
            }
        });
        self.busy.footprint.observe(sample.busy, sample.flows_open, now);
        self.busy.sampled = Some(moment(sample.busy, flows, now));
        for (place, criterion) in config.criteria.iter().enumerate() {
            let Some((value, at)) = self.history.latest(criterion.metric()) else { continue };
            if at == wall {
                self.criteria[place].footprint.observe(value, sample.flows_open, now);
            }
            self.criteria[place].sampled =
                self.sample(criterion, moment(value, flows, self.since_origin(at)), now);
        }
        if let Some(ahead) = config.forecast
            && (now.since(self.forecast_at) >= FORECAST_EVERY || self.forecast_at == Timestamp::ZERO)
        {
            self.forecast = self.history.forecast(BUSY, wall, ahead);
            self.forecast_at = now;
        }
        self.bytes = self.history.bytes();
        refused
    }

    /// The stretches of history that changed since the last call; `None`: there was no report.
    pub(crate) fn take_chunks(&mut self) -> Option<Vec<Chunk>> {
        std::mem::take(&mut self.news).then(|| self.history.take_chunks())
    }

    /// Takes back what was given before a restart, and what follows from it. Gives how many stretches could not be read.
    pub(crate) fn restore(&mut self, config: &PoolConfig, chunks: &[Chunk], now: Timestamp) -> usize {
        let wall = now + self.origin;
        let unreadable = self.history.restore(chunks, wall);
        let flows = self.history.latest(CONNECTIONS).map_or(0.0, |(flows, _)| flows);
        for (place, criterion) in config.criteria.iter().enumerate() {
            if let Some((value, at)) = self.history.latest(criterion.metric()) {
                self.criteria[place].sampled =
                    self.sample(criterion, moment(value, flows, self.since_origin(at)), now);
            }
        }
        if let Some((busy, at)) = self.history.latest(BUSY) {
            self.busy.sampled = Some(moment(busy, flows, self.since_origin(at)));
        }
        if let Some(ahead) = config.forecast {
            self.forecast = self.history.forecast(BUSY, wall, ahead);
        }
        self.bytes = self.history.bytes();
        unreadable
    }

    /// A time of the history as one of the process; one from before its start is its origin.
    fn since_origin(&self, wall: Timestamp) -> Timestamp {
        Timestamp::ZERO + wall.since(Timestamp::ZERO + self.origin)
    }

    /// What a criterion compares, as of now.
    fn sample(&mut self, criterion: &Criterion, moment: Sampled, now: Timestamp) -> Option<Sampled> {
        let (Some(window), aggregate) = (criterion.window(), criterion.aggregate()) else {
            return Some(moment);
        };
        if aggregate == Aggregate::Latest {
            return Some(moment);
        }
        let wall = now + self.origin;
        let answer = self.history.query_cached(criterion.metric(), window, aggregate, wall)?;
        let over = self.history.query_cached(CONNECTIONS, window, Aggregate::Average, wall);
        let scale = if aggregate == Aggregate::Total { answer.covered.as_secs_f64() } else { 1.0 };
        Some(Sampled {
            value: answer.value,
            flows: over.map_or(moment.flows, |over| over.value),
            scale,
            ..moment
        })
    }
}

fn moment(value: f64, flows: f64, at: Timestamp) -> Sampled {
    Sampled { value, flows, scale: 1.0, at }
}

impl Sampled {
    /// As a score that follows the flows, of a resource of which one flow adds so much to the value of a moment at each of
    /// `balancers`.
    pub(crate) fn score(&self, per_flow: f64, balancers: f64) -> Score {
        let slope = per_flow * balancers * self.scale;
        Score { base: (self.value - slope * self.flows) as f32, per_flow: slope as f32 }
    }
}

/// Everything of a report by its name in criteria and histories.
fn each_dimension(sample: &Sample, utilization: &Utilization, mut each: impl FnMut(&str, f64)) {
    each(BUSY, sample.busy);
    each(CONNECTIONS, f64::from(sample.flows_open));
    each("cpu", utilization.cpu());
    each("memory", utilization.memory());
    if let Some(application) = utilization.application() {
        each("application", application);
    }
    if let Some(operations) = sample.operations {
        each("operations", operations);
    }
    each("errors", sample.errors);
    if let Some(seconds) = sample.latency_seconds {
        each("latency", seconds);
    }
    let named = utilization.dimensions().iter().chain(utilization.metrics());
    for (dimension, value) in named {
        // The running total of operations is reported by name; the rate above is what windows are made of.
        if !matches!(
            dimension.as_str(),
            BUSY | CONNECTIONS | "cpu" | "memory" | "application" | "operations" | "errors" | "latency"
        ) {
            each(dimension, *value);
        }
    }
}

/// Flows opened a second over the whole pool, and how many are expected between two reports of one resource.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Arrivals {
    opened: u64,
    at: Timestamp,
    per_second: f64,
    interval: f64,
}

/// Time constant of the rate of arrivals.
const ARRIVALS_OVER: f64 = 3.0;

impl Arrivals {
    /// Looks at how many flows were opened until now.
    pub(crate) fn observe(&mut self, opened: u64, interval: Duration, now: Timestamp) {
        let elapsed = now.since(self.at).as_secs_f64();
        self.interval = interval.as_secs_f64();
        if elapsed < 0.1 {
            return;
        }
        let rate = opened.saturating_sub(self.opened) as f64 / elapsed;
        let alpha = if self.at == Timestamp::ZERO { 0.0 } else { -(-elapsed / ARRIVALS_OVER).exp_m1() };
        self.per_second += alpha * (rate - self.per_second);
        (self.opened, self.at) = (opened, now);
    }

    /// Flows that come until a resource reports again; at least one.
    pub(crate) fn expected(&self) -> f64 {
        (self.per_second * self.interval).max(1.0)
    }
}
