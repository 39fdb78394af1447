//! Criteria: an ordered list of what the next flow's resource should have least or most of.
//!
//! ```text
//! least(memory)                                 by the newest report
//! most(operations, 1h, total, tolerance 20%)    over the last hour; all within 20 % of the best are as good
//! least(bandwidth_cost, spill 80%)              the cheapest, until they are 80 % busy
//! ```
//!
//! The rest is the mathematics of following such a list without herding. A report is old when it is used, and everyone
//! who reads it sees the same least one; so:
//!
//! * [`Footprint`] learns what a flow adds to a metric, and what was opened since the report is added to it.
//! * [`water_fill`] spreads the flows to come as water would fill the vessels, where many come for each report.
//! * [`survivors`] says which candidates a list leaves: bands of tolerance one after the other, never a weighted sum.
//!   `most` is a positive feedback (who has most operations gets more), so it keeps at least half of the candidates.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use allocation::Timestamp;

use crate::history::{Aggregate, WINDOW_MAX};
use crate::{KeyFault, key_fault};

/// Metrics that every resource has or may have; any other name is that of a dimension or a named metric of its reports.
pub const METRICS: [&str; 11] = [
    "cpu",
    "memory",
    "swap",
    "os_cache",
    "bandwidth",
    "bandwidth_cost",
    "operations",
    "errors",
    "connections",
    "utilization",
    "latency",
];

/// Of the best: who is as near is as good.
const TOLERANCE_DEFAULT_PERCENT: u8 = 10;
/// Where the best is next to nothing, tolerance is of this part of the candidates' mean instead.
const SCALE_FLOOR: f32 = 0.01;
/// How much of a wrong text an error repeats, in characters.
const QUOTED_MAX: usize = 64;
/// Units of windows, in milliseconds, the largest first.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Which end of a metric is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The smallest value.
    Least,
    /// The largest value.
    Most,
}

impl Direction {
    /// Its name in configuration and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Least => "least",
            Self::Most => "most",
        }
    }
}

/// One criterion. It can only be had by parsing, so its metric is a name and its numbers are in range.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Criterion {
    direction: Direction,
    metric: Arc<str>,
    window: Option<Duration>,
    aggregate: Aggregate,
    tolerance_percent: u8,
    spill_percent: Option<u8>,
}

/// Why a text is no criterion: the fault of whoever configured it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CriterionError {
    /// It is no `least(…)` or `most(…)`.
    #[error("{text:?} is no criterion: write least(METRIC) or most(METRIC), for example least(memory)")]
    Form {
        /// The text, shortened.
        text: String,
    },
    /// What stands first in the parentheses is no name.
    #[error("the metric of {text:?} {fault}; write for example least(memory) or most(operations, 1h)")]
    Metric {
        /// The text, shortened.
        text: String,
        /// What is wrong with it.
        fault: KeyFault,
    },
    /// An argument is nothing of what there may be.
    #[error(
        "{argument:?} says nothing about {metric}: write a window such as 10m, one of latest, average, maximum and \
         total, tolerance 10% or spill 80%, for example least({metric}, 10m, maximum)"
    )]
    Argument {
        /// The argument, shortened.
        argument: String,
        /// The metric.
        metric: String,
    },
    /// Two arguments say the same thing.
    #[error("the {what} of {metric} is given twice; write it once")]
    Twice {
        /// What.
        what: &'static str,
        /// The metric.
        metric: String,
    },
    /// A window of nothing, or of more than there is kept.
    #[error("the window {argument:?} is out of range: write 1ms to 30d, for example least({metric}, 10m)")]
    Window {
        /// The window, shortened.
        argument: String,
        /// The metric.
        metric: String,
    },
    /// A percentage that is none, or is out of range.
    #[error(
        "{what} is {argument:?}: write a whole percentage from {min}% to 100%, for example {what} {example}%"
    )]
    Percentage {
        /// Of what.
        what: &'static str,
        /// What was given, shortened.
        argument: String,
        /// The smallest there may be.
        min: u8,
        /// A usual one.
        example: u8,
    },
    /// An average, a maximum or a total of nothing.
    #[error("{aggregate} needs a window: write for example {direction}({metric}, 10m, {aggregate})", direction = .direction.name())]
    WindowNeeded {
        /// Which end is wanted.
        direction: Direction,
        /// Of what.
        metric: String,
        /// The aggregate.
        aggregate: Aggregate,
    },
    /// The newest sample has no window.
    #[error("latest takes no window: write {direction}({metric}) or {direction}({metric}, 10m)", direction = .direction.name())]
    WindowUnused {
        /// Which end is wanted.
        direction: Direction,
        /// Of what.
        metric: String,
    },
}

impl Criterion {
    /// Which end of the metric is wanted.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// One of [`METRICS`], or the key of a dimension or a named metric.
    pub fn metric(&self) -> &Arc<str> {
        &self.metric
    }

    /// Over which time; `None`: by the newest sample.
    pub fn window(&self) -> Option<Duration> {
        self.window
    }

    /// Of that time.
    pub fn aggregate(&self) -> Aggregate {
        self.aggregate
    }

    /// Who is so near the best, as a ratio of the best, is as good. 0 to 1.
    pub fn tolerance(&self) -> f32 {
        f32::from(self.tolerance_percent) / 100.0
    }

    /// The utilization above which a resource no longer counts, 0.01 to 1, where the metric is a price.
    pub fn spill(&self) -> Option<f32> {
        self.spill_percent.map(|percent| f32::from(percent) / 100.0)
    }

    /// What [`survivors`] looks at: the value of the metric, or NaN where the resource has spilled. A utilization that
    /// is not known (NaN) does not spill.
    pub fn score(&self, value: f32, projected_utilization: f32) -> f32 {
        match self.spill() {
            Some(spill) if projected_utilization > spill => f32::NAN,
            _ => value,
        }
    }

    /// How much worse than `best` one may be and still be as good. `mean`: of the candidates' absolute scores.
    pub fn band(&self, best: f32, mean: f32) -> f32 {
        self.tolerance() * best.abs().max(SCALE_FLOOR * mean)
    }
}

impl FromStr for Criterion {
    type Err = CriterionError;

    fn from_str(text: &str) -> Result<Self, CriterionError> {
        let trimmed = text.trim();
        let form = || CriterionError::Form { text: quoted(trimmed) };
        let (word, inside) =
            trimmed.strip_suffix(')').and_then(|text| text.split_once('(')).ok_or_else(form)?;
        let direction = match word.trim() {
            "least" => Direction::Least,
            "most" => Direction::Most,
            _ => return Err(form()),
        };
        let mut arguments = inside.split(',').map(str::trim);
        let metric = arguments.next().unwrap_or_default();
        if let Some(fault) = key_fault(metric) {
            return Err(CriterionError::Metric { text: quoted(trimmed), fault });
        }
        let mut given = Arguments::default();
        for argument in arguments {
            given.take(argument, metric)?;
        }
        given.criterion(direction, metric)
    }
}

impl fmt::Display for Criterion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({}", self.direction.name(), self.metric)?;
        if let Some(window) = self.window {
            let millis = window.as_millis() as u64;
            let unit = UNITS.into_iter().find(|(_, unit)| millis.is_multiple_of(*unit));
            let (name, unit) = unit.unwrap_or(("ms", 1));
            write!(f, ", {}{name}", millis / unit)?;
            if self.aggregate != Aggregate::Average {
                write!(f, ", {}", self.aggregate)?;
            }
        }
        if self.tolerance_percent != TOLERANCE_DEFAULT_PERCENT {
            write!(f, ", tolerance {}%", self.tolerance_percent)?;
        }
        if let Some(spill) = self.spill_percent {
            write!(f, ", spill {spill}%")?;
        }
        f.write_str(")")
    }
}

/// The arguments so far.
#[derive(Default)]
struct Arguments {
    window: Option<Duration>,
    aggregate: Option<Aggregate>,
    tolerance: Option<u8>,
    spill: Option<u8>,
}

impl Arguments {
    fn take(&mut self, argument: &str, metric: &str) -> Result<(), CriterionError> {
        let mut words = argument.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("tolerance"), Some(percent), None) => {
                put(&mut self.tolerance, parse_percent("tolerance", percent, 0, 10)?, "tolerance", metric)
            }
            (Some("spill"), Some(percent), None) => {
                put(&mut self.spill, parse_percent("spill", percent, 1, 80)?, "spill", metric)
            }
            (Some(word), None, _) if word.starts_with(|c: char| c.is_ascii_digit()) => {
                put(&mut self.window, parse_window(word, metric)?, "window", metric)
            }
            (Some(word), None, _) => {
                let found = Aggregate::ALL.into_iter().find(|aggregate| aggregate.name() == word);
                put(&mut self.aggregate, found.ok_or_else(|| unknown(argument, metric))?, "aggregate", metric)
            }
            _ => Err(unknown(argument, metric)),
        }
    }

    fn criterion(self, direction: Direction, metric: &str) -> Result<Criterion, CriterionError> {
        let aggregate = match (self.aggregate, self.window) {
            (None, None) => Aggregate::Latest,
            (None, Some(_)) => Aggregate::Average,
            (Some(Aggregate::Latest), Some(_)) => {
                return Err(CriterionError::WindowUnused { direction, metric: metric.to_owned() });
            }
            (Some(aggregate), None) if aggregate != Aggregate::Latest => {
                return Err(CriterionError::WindowNeeded { direction, metric: metric.to_owned(), aggregate });
            }
            (Some(aggregate), _) => aggregate,
        };
        Ok(Criterion {
            direction,
            metric: metric.into(),
            window: self.window,
            aggregate,
            tolerance_percent: self.tolerance.unwrap_or(TOLERANCE_DEFAULT_PERCENT),
            spill_percent: self.spill,
        })
    }
}

fn put<T>(place: &mut Option<T>, value: T, what: &'static str, metric: &str) -> Result<(), CriterionError> {
    match place.replace(value) {
        Some(_) => Err(CriterionError::Twice { what, metric: metric.to_owned() }),
        None => Ok(()),
    }
}

fn unknown(argument: &str, metric: &str) -> CriterionError {
    CriterionError::Argument { argument: quoted(argument), metric: metric.to_owned() }
}

fn parse_window(word: &str, metric: &str) -> Result<Duration, CriterionError> {
    let digits = word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len());
    let (number, unit) = word.split_at(digits);
    let Some((_, unit)) = UNITS.into_iter().find(|(name, _)| *name == unit) else {
        return Err(unknown(word, metric));
    };
    // More digits than a number has are out of range too.
    let millis = number.parse::<u64>().unwrap_or(u64::MAX).saturating_mul(unit);
    let window = Duration::from_millis(millis);
    if window.is_zero() || window > WINDOW_MAX {
        return Err(CriterionError::Window { argument: quoted(word), metric: metric.to_owned() });
    }
    Ok(window)
}

fn parse_percent(what: &'static str, text: &str, min: u8, example: u8) -> Result<u8, CriterionError> {
    let digits = text.strip_suffix('%').filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    match digits.and_then(|digits| digits.parse().ok()) {
        Some(percent) if (min..=100).contains(&percent) => Ok(percent),
        _ => Err(CriterionError::Percentage { what, argument: quoted(text), min, example }),
    }
}

fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// What one open flow adds to a metric of one resource, learned from its reports: a regression of the metric's steps on
/// those of the flows open, through the origin, in which steps count less the older they are.
///
/// It starts at a prior and leaves it as there is evidence, so it is never wilder than the prior times 10 or tamer
/// than a tenth of it. Of a metric that flows do not move it comes down to that tenth.
#[derive(Debug, Clone, Copy, Default)]
pub struct Footprint {
    last: Option<(Timestamp, f64, u32)>,
    /// Sums of step of metric times step of flows, and of step of flows squared.
    metric_by_flows: f64,
    flows_squared: f64,
}

impl Footprint {
    /// Time constant of the regression. Long: steps of long flows are rare.
    const AVERAGED_OVER: Duration = Duration::from_secs(600);
    /// Squared steps of flows at which evidence counts as much as the prior.
    const PRIOR_STRENGTH: f64 = 4.0;
    /// How far from its prior it goes, either way.
    const RANGE: f64 = 10.0;
    /// Keeps products finite.
    const METRIC_MAX: f64 = 1e30;

    /// Takes in a report: the metric, and the flows that were open when it was measured. A metric that is not finite is
    /// passed over.
    pub fn observe(&mut self, metric: f64, flows_open: u32, now: Timestamp) {
        if !metric.is_finite() {
            return;
        }
        let metric = metric.clamp(-Self::METRIC_MAX, Self::METRIC_MAX);
        if let Some((before, metric_before, flows_before)) = self.last
            && flows_before != flows_open
        {
            let decay = (-now.since(before).as_secs_f64() / Self::AVERAGED_OVER.as_secs_f64()).exp();
            let step = f64::from(flows_open) - f64::from(flows_before);
            self.metric_by_flows = decay * self.metric_by_flows + step * (metric - metric_before);
            self.flows_squared = decay * self.flows_squared + step * step;
        }
        // A step without a change of flows is the metric's own: it is left out, and so is its time.
        self.last = Some((now, metric, flows_open));
    }

    /// In the metric's unit per flow, from a tenth of `prior` to ten times it. The prior is the pool's mean metric by
    /// its mean flows open; one that is negative or not finite stands for 0, and so does the answer then.
    pub fn per_flow(&self, prior: f32) -> f32 {
        if !(prior.is_finite() && prior > 0.0) {
            return 0.0;
        }
        let prior = f64::from(prior);
        let learned = (self.metric_by_flows + Self::PRIOR_STRENGTH * prior)
            / (self.flows_squared + Self::PRIOR_STRENGTH);
        let clamped = learned.clamp(prior / Self::RANGE, prior * Self::RANGE);
        clamped.min(f64::from(f32::MAX)) as f32
    }
}

/// Spreads flows to come over resources as water fills vessels: with the level `L` at which
/// `sum(max(0, capacity * L - level)) = arrivals`, each one's probability is its part of that sum. (Basic Load
/// Interpretation, Dahlin 2000, with capacities.)
///
/// * `levels`: the load that each has, in the unit of `arrivals`; infinite or NaN: it is left out.
/// * `capacities`: one for each; left out where it is not above 0.
/// * `arrivals`: what comes until the next report. At 0 all of it is for the least `level / capacity` (for those that
///   are equal by capacity); the more comes, the nearer all are to their part of the capacity.
/// * `floor`: the part of all probability, 0 to 1, that goes by capacity alone, so that nobody is forgotten.
/// * `out`: as many probabilities, whose sum is 1; all 0 if everyone is left out.
///
/// O(n log n). Missing capacities leave out.
pub fn water_fill(levels: &[f32], capacities: &[f32], arrivals: f32, floor: f32, out: &mut Vec<f32>) {
    out.clear();
    out.resize(levels.len(), 0.0);
    let mut vessels: Vec<Vessel> =
        levels.iter().zip(capacities).enumerate().filter_map(|(n, (q, w))| Vessel::new(n, *q, *w)).collect();
    vessels.sort_unstable_by(|a, b| a.bottom.total_cmp(&b.bottom).then(a.place.cmp(&b.place)));
    let Some(lowest) = vessels.first().map(|vessel| vessel.bottom) else { return };
    for vessel in &mut vessels {
        // Heights above the lowest bottom: they are small where levels are large and near each other.
        vessel.bottom -= lowest;
    }
    let surface = surface(&vessels, if arrivals > 0.0 { f64::from(arrivals) } else { 0.0 });
    let filled = |vessel: &Vessel| match surface {
        Some(surface) => vessel.capacity * (surface - vessel.bottom).max(0.0),
        None => vessel.capacity,
    };
    let water: f64 = vessels.iter().map(filled).sum();
    let capacity: f64 = vessels.iter().map(|vessel| vessel.capacity).sum();
    let floor = if floor > 0.0 { f64::from(floor.min(1.0)) } else { 0.0 };
    for vessel in &vessels {
        let share = (1.0 - floor) * filled(vessel) / water + floor * vessel.capacity / capacity;
        out[vessel.place] = share as f32;
    }
}

/// A resource in [`water_fill`].
struct Vessel {
    place: usize,
    capacity: f64,
    /// Where its water begins: its level by its capacity.
    bottom: f64,
}

impl Vessel {
    fn new(place: usize, level: f32, capacity: f32) -> Option<Self> {
        let (finite, has_capacity) = (level.is_finite(), capacity.is_finite() && capacity > 0.0);
        let capacity = f64::from(capacity);
        (finite && has_capacity).then(|| Self { place, capacity, bottom: f64::from(level) / capacity })
    }
}

/// How high `arrivals` stand in vessels that are sorted by their bottoms, the first of which is 0; always above 0.
/// `None`: without end.
fn surface(vessels: &[Vessel], arrivals: f64) -> Option<f64> {
    // With no water at all the lowest ones still share what comes next: a film on their bottoms.
    const FILM: f64 = 1e-9;
    if arrivals.is_infinite() {
        return None;
    }
    let (mut capacity, mut below, mut height) = (0.0, 0.0, 0.0);
    for (n, vessel) in vessels.iter().enumerate() {
        capacity += vessel.capacity;
        below += vessel.capacity * vessel.bottom;
        height = (arrivals + below) / capacity;
        if vessels.get(n + 1).is_none_or(|next| next.bottom >= height) {
            break;
        }
    }
    Some(height.max(FILM))
}

/// Which candidates a list of criteria leaves, sorted: the specification of selection by criteria.
///
/// `scores[k][i]` is [`Criterion::score`] of criterion `k` and candidate `i`. One criterion after the other:
///
/// * Those of whom nothing is known (not finite) go, unless that is everyone who is left: then it decides nothing.
/// * Of the others stay those who are within [`Criterion::band`] of the best.
/// * All `most` of a list together keep at least half (rounded up) of those that the first of them finds known, and
///   whoever is equal to the last of these: with `n` candidates nobody gets more than 2/n by having much.
pub fn survivors(criteria: &[Criterion], scores: &[Vec<f32>]) -> Vec<usize> {
    let candidates = scores.iter().map(Vec::len).min().unwrap_or(0);
    let mut left: Vec<usize> = (0..candidates).collect();
    let mut kept_by_most = None;
    for (criterion, scores) in criteria.iter().zip(scores) {
        let known: Vec<usize> = left.iter().copied().filter(|i| scores[*i].is_finite()).collect();
        if known.is_empty() {
            continue;
        }
        // Better is less from here on.
        let sign = if criterion.direction == Direction::Least { 1.0 } else { -1.0 };
        let cost = |i: &usize| sign * scores[*i];
        let best = known.iter().map(cost).fold(f32::INFINITY, f32::min);
        let mean = known.iter().map(|i| scores[*i].abs() / known.len() as f32).sum();
        let mut limit = best + criterion.band(best, mean);
        if criterion.direction == Direction::Most {
            let kept = *kept_by_most.get_or_insert_with(|| known.len().div_ceil(2));
            limit = limit.max(nth_cost(&known, kept, cost));
        }
        left = known.into_iter().filter(|i| cost(i) <= limit).collect();
    }
    left
}

/// The `n`th least cost, or the largest if there are fewer. `candidates` is not empty, and `n` is not 0.
fn nth_cost(candidates: &[usize], n: usize, cost: impl Fn(&usize) -> f32) -> f32 {
    let mut costs: Vec<f32> = candidates.iter().map(cost).collect();
    costs.sort_unstable_by(|a, b| a.partial_cmp(b).unwrap_or(Ordering::Equal));
    costs[n.min(costs.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn criterion(text: &str) -> Criterion {
        text.parse().unwrap()
    }

    #[test]
    fn defaults_depend_on_the_window() {
        let plain = criterion("least(memory)");
        assert_eq!((plain.window(), plain.aggregate()), (None, Aggregate::Latest));
        assert_eq!((plain.tolerance(), plain.spill(), plain.direction()), (0.1, None, Direction::Least));
        let windowed = criterion(" most( operations , 60m )");
        assert_eq!(windowed.aggregate(), Aggregate::Average);
        assert_eq!(windowed.to_string(), "most(operations, 1h)");
        let full = criterion("most(queue.length, spill 80%, total, tolerance 0%, 90s)");
        assert_eq!(full.to_string(), "most(queue.length, 90s, total, tolerance 0%, spill 80%)");
        assert_eq!((full.tolerance(), full.spill()), (0.0, Some(0.8)));
        assert_eq!(criterion("least(cpu, latest)"), criterion("least(cpu)"));
        assert_eq!(criterion("least(cpu, 10m, average)"), criterion("least(cpu, 10m)"));
    }

    #[test]
    fn errors_say_what_to_write() {
        let error = |text: &str| text.parse::<Criterion>().unwrap_err();
        assert_eq!(
            error("memory").to_string(),
            "\"memory\" is no criterion: write least(METRIC) or most(METRIC), for example least(memory)"
        );
        assert!(matches!(error("best(cpu)"), CriterionError::Form { .. }));
        assert!(matches!(error("least()"), CriterionError::Metric { fault: KeyFault::Empty, .. }));
        assert!(matches!(error("least(a b)"), CriterionError::Metric { .. }));
        assert_eq!(
            error("most(operations, total)").to_string(),
            "total needs a window: write for example most(operations, 10m, total)"
        );
        assert!(matches!(error("least(cpu, 10m, latest)"), CriterionError::WindowUnused { .. }));
        for text in ["least(cpu, 0s)", "least(cpu, 31d)", "least(cpu, 99999999999999999999999d)"] {
            assert!(matches!(error(text), CriterionError::Window { .. }), "{text}");
        }
        for text in ["least(cpu, spill 0%)", "least(cpu, tolerance 101%)", "least(cpu, tolerance 5)"] {
            assert!(matches!(error(text), CriterionError::Percentage { .. }), "{text}");
        }
        for text in
            ["least(cpu, 10)", "least(cpu, 10w)", "least(cpu,)", "least(cpu, sum)", "least(cpu, spill)"]
        {
            assert!(matches!(error(text), CriterionError::Argument { .. }), "{text}");
        }
        assert!(matches!(error("least(cpu, 1m, 2m)"), CriterionError::Twice { what: "window", .. }));
    }

    #[test]
    fn a_footprint_is_learned() {
        let mut footprint = Footprint::default();
        assert_eq!(footprint.per_flow(2.0), 2.0, "nothing is known yet");
        let mut flows = 100;
        for n in 0..200_u32 {
            flows = flows + 3 * (n % 2) - (n % 2) * 2 + n % 3;
            footprint.observe(
                500.0 + 7.0 * f64::from(flows),
                flows,
                Timestamp::from_millis(u64::from(n) * 1000),
            );
        }
        assert!((footprint.per_flow(2.0) - 7.0).abs() < 0.1, "{}", footprint.per_flow(2.0));
        assert_eq!(footprint.per_flow(0.1), 1.0, "not more than ten times the prior");
        assert_eq!(footprint.per_flow(100.0), 10.0, "not less than a tenth of it");
    }

    #[test]
    fn of_what_flows_do_not_move_the_footprint_comes_down() {
        let mut footprint = Footprint::default();
        for n in 0..400_u32 {
            let (flows, noise) = (50 + n % 5, f64::from((n * 7919) % 101) / 100.0 - 0.5);
            footprint.observe(1000.0 + noise, flows, Timestamp::from_millis(u64::from(n) * 1000));
        }
        assert_eq!(footprint.per_flow(20.0), 2.0);
        // The metric's own drift, while flows stay, says nothing.
        let mut footprint = Footprint::default();
        for n in 0..100 {
            footprint.observe(f64::from(n), 50, Timestamp::from_millis(u64::from(n as u32) * 1000));
        }
        assert_eq!(footprint.per_flow(20.0), 20.0);
    }

    fn fill(levels: &[f32], capacities: &[f32], arrivals: f32, floor: f32) -> Vec<f32> {
        let mut out = vec![9.0; 3];
        water_fill(levels, capacities, arrivals, floor, &mut out);
        out
    }

    #[test]
    fn water_fills_the_lowest_first() {
        let near =
            |a: Vec<f32>, b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5) && a.len() == b.len();
        let ones = [1.0; 3];
        assert!(near(fill(&[0.0, 2.0, 4.0], &ones, 2.0, 0.0), &[1.0, 0.0, 0.0]));
        assert!(near(fill(&[0.0, 2.0, 4.0], &ones, 4.0, 0.0), &[0.75, 0.25, 0.0]));
        assert!(near(fill(&[0.0, 2.0, 4.0], &ones, f32::INFINITY, 0.0), &[1.0 / 3.0; 3]));
        assert!(near(fill(&[1e6, 1e6, 1e6 + 4.0], &ones, 0.0, 0.0), &[0.5, 0.5, 0.0]));
        assert!(near(fill(&[2.0, 4.0, 9.0], &[1.0, 2.0, 1.0], 3.0, 0.0), &[1.0 / 3.0, 2.0 / 3.0, 0.0]));
        assert!(near(fill(&[f32::INFINITY, f32::NAN, 7.0], &ones, 1.0, 0.5), &[0.0, 0.0, 1.0]));
        assert!(near(fill(&[0.0, 9.0, 9.0], &ones, 1.0, 0.3), &[0.8, 0.1, 0.1]));
        assert!(near(fill(&[1.0, 2.0], &[0.0, f32::NAN], 1.0, 0.0), &[0.0, 0.0]));
        assert!(fill(&[], &[], 1.0, 0.0).is_empty());
        assert!(near(fill(&[0.0, 1.0], &[1.0, 1.0], f32::NAN, f32::NAN), &[1.0, 0.0]));
    }

    #[test]
    fn criteria_decide_one_after_the_other() {
        let list = [criterion("least(errors)"), criterion("least(memory, tolerance 0%)")];
        let scores = [vec![1.05, 1.0, 2.0, 1.1], vec![0.5, 0.6, 0.1, 0.7]];
        assert_eq!(survivors(&list, &scores), [0], "2 has least memory, but too many errors");
        assert_eq!(survivors(&list[..1], &scores[..1]), [0, 1, 3]);
        let unknown = [vec![f32::NAN; 4], vec![0.5, 0.6, f32::NAN, 0.5]];
        assert_eq!(survivors(&list, &unknown), [0, 3]);
        assert_eq!(survivors(&list, &[vec![], vec![]]), [0_usize; 0]);
        // Next to nothing is within the tolerance of nothing.
        assert_eq!(survivors(&list[..1], &[vec![0.0, 1e-4, 0.5]]), [0, 1]);
    }

    #[test]
    fn most_keeps_half() {
        let list = [criterion("most(operations)"), criterion("most(memory)"), criterion("least(cpu)")];
        let scores = [
            vec![100.0, 50.0, 40.0, 30.0, 20.0],
            vec![1.0, 2.0, 9.0, 9.0, 9.0],
            vec![0.9, 0.2, 0.9, 0.1, 0.1],
        ];
        assert_eq!(survivors(&list[..1], &scores[..1]), [0, 1, 2]);
        assert_eq!(survivors(&list[..2], &scores[..2]), [0, 1, 2], "both together keep half");
        assert_eq!(survivors(&list, &scores), [1], "least may leave one");
        assert_eq!(survivors(&list[..1], &[vec![5.0, 1.0, 1.0, 1.0]]), [0, 1, 2, 3], "equals stay together");
    }

    #[test]
    fn who_is_too_busy_is_not_in_its_tier() {
        let tiers = criterion("least(bandwidth_cost, spill 80%)");
        let prices = [1.0, 1.0, 5.0, 9.0];
        let left = |busy: [f32; 4]| {
            let scores = prices.iter().zip(busy).map(|(price, busy)| tiers.score(*price, busy)).collect();
            survivors(std::slice::from_ref(&tiers), &[scores])
        };
        assert_eq!(left([0.1, 0.8, 0.0, 0.0]), [0, 1]);
        assert_eq!(left([0.9, 0.8, 0.0, 0.0]), [1]);
        assert_eq!(left([0.9, 0.81, f32::NAN, 0.0]), [2]);
        assert_eq!(left([0.9; 4]), [0, 1, 2, 3], "where everyone is busy the price decides nothing");
    }

    fn text() -> impl Strategy<Value = String> {
        let argument = prop_oneof![
            "[0-9]{1,4}(ms|s|m|h|d)",
            "(latest|average|maximum|total)",
            "tolerance [0-9]{1,3}%",
            "spill [0-9]{1,3}%",
        ];
        let good = ("(least|most)", "[a-z_./:-]{1,8}", prop::collection::vec(argument, 0..4)).prop_map(
            |(word, metric, arguments)| format!("{word}({})", [vec![metric], arguments].concat().join(", ")),
        );
        prop_oneof![4 => good, 1 => "(least|most)\\(\\PC{0,16}\\)", 1 => "\\PC{0,16}"]
    }

    /// Levels and as many capacities.
    fn vessels() -> impl Strategy<Value = Vec<(f32, f32)>> {
        prop::collection::vec((prop_oneof![0.0_f32..1000.0, Just(f32::INFINITY)], 0.1_f32..10.0), 1..40)
    }

    proptest! {
        #[test]
        fn what_parses_displays_as_what_parses_the_same(text in text()) {
            match text.parse::<Criterion>() {
                Ok(parsed) => prop_assert_eq!(parsed.to_string().parse::<Criterion>(), Ok(parsed)),
                Err(error) => prop_assert!(error.to_string().len() < 600),
            }
        }

        #[test]
        fn a_footprint_is_within_its_range(
            reports in prop::collection::vec((any::<f64>(), any::<u32>(), 0_u64..1 << 40), 0..20), prior in any::<f32>(),
        ) {
            let mut footprint = Footprint::default();
            for (metric, flows, at) in reports {
                footprint.observe(metric, flows, Timestamp::from_millis(at));
            }
            let learned = footprint.per_flow(prior);
            prop_assert!(learned.is_finite() && learned >= 0.0);
            if prior.is_normal() && prior > 0.0 {
                prop_assert!(learned >= prior * 0.0999 && f64::from(learned) <= f64::from(prior) * 10.001);
            }
        }

        #[test]
        fn probabilities_sum_to_one_and_follow_levels(
            vessels in vessels(), arrivals in prop_oneof![0.0_f32..1e5, Just(0.0), Just(f32::INFINITY)], floor in 0.0_f32..1.0,
        ) {
            let (levels, capacities): (Vec<_>, Vec<_>) = vessels.into_iter().unzip();
            let shares = fill(&levels, &capacities, arrivals, floor);
            let all: f32 = shares.iter().sum();
            let expected = if levels.iter().any(|level| level.is_finite()) { 1.0 } else { 0.0 };
            prop_assert!((all - expected).abs() < 1e-4);
            let capacity: f32 = levels.iter().zip(&capacities).filter(|(q, _)| q.is_finite()).map(|(_, w)| w).sum();
            for (i, share) in shares.iter().enumerate() {
                prop_assert!(*share >= 0.0);
                prop_assert!(levels[i].is_finite() || *share == 0.0);
                if levels[i].is_finite() {
                    prop_assert!(*share >= 0.999 * floor * capacities[i] / capacity);
                }
                for (j, other) in shares.iter().enumerate() {
                    // A lower surface, by its own capacity, never gets less by capacity.
                    let lower = levels[i] / capacities[i] <= levels[j] / capacities[j];
                    prop_assert!(!lower || share / capacities[i] >= other / capacities[j] - 1e-4);
                }
            }
        }

        #[test]
        fn more_load_never_gets_more(vessels in vessels(), arrivals in 0.1_f32..1e4, more in 0.0_f32..500.0) {
            let (mut levels, capacities): (Vec<_>, Vec<_>) = vessels.into_iter().unzip();
            let before = fill(&levels, &capacities, arrivals, 0.1)[0];
            levels[0] += more;
            prop_assert!(fill(&levels, &capacities, arrivals, 0.1)[0] <= before + 1e-5);
        }

        #[test]
        fn few_arrivals_go_to_the_least_and_many_by_capacity(vessels in vessels()) {
            let (levels, capacities): (Vec<_>, Vec<_>) = vessels.into_iter().unzip();
            let ratio = |i: &usize| levels[*i] / capacities[*i];
            let least = (0..levels.len()).min_by(|a, b| ratio(a).total_cmp(&ratio(b))).unwrap();
            let second = (0..levels.len()).filter(|i| *i != least).map(|i| ratio(&i)).fold(f32::INFINITY, f32::min);
            if ratio(&least).is_finite() && second > ratio(&least) * 1.001 + 0.001 {
                prop_assert!(fill(&levels, &capacities, 1e-6, 0.0)[least] > 0.999);
                prop_assert!(fill(&levels, &capacities, 0.0, 0.0)[least] > 0.999);
            }
            let known = levels.iter().zip(&capacities).filter(|(q, _)| q.is_finite());
            let capacity: f32 = known.map(|(_, w)| w).sum();
            for (i, share) in fill(&levels, &capacities, 1e9, 0.0).into_iter().enumerate() {
                let fair = if levels[i].is_finite() { capacities[i] / capacity } else { 0.0 };
                prop_assert!((share - fair).abs() < 1e-3);
            }
        }

        #[test]
        fn someone_always_survives_and_most_keeps_half(
            scores in prop::collection::vec((0.0_f32..10.0, prop_oneof![0.0_f32..10.0, Just(f32::NAN)]), 1..30),
            first in "(least|most)", second in "(least|most)",
        ) {
            let list = [criterion(&format!("{first}(a)")), criterion(&format!("{second}(b)"))];
            let (a, b): (Vec<_>, Vec<_>) = scores.into_iter().unzip();
            let by_first = survivors(&list[..1], std::slice::from_ref(&a));
            let both = survivors(&list, &[a.clone(), b]);
            prop_assert!(!both.is_empty() && both.is_sorted());
            prop_assert!(both.iter().all(|i| by_first.contains(i)));
            let better = |x: f32, y: f32| if first == "least" { x <= y } else { x >= y };
            let best = |i: &usize| a.iter().all(|other| better(a[*i], *other));
            prop_assert!(by_first.iter().any(best));
            prop_assert!(first == "least" || by_first.len() >= a.len().div_ceil(2));
        }
    }
}
