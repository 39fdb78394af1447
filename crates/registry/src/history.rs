//! What a resource reported in the past: per dimension the newest sample, and averages and maxima of the last ten
//! minutes by the second, of the last day by the minute, and of the last thirty days by the hour.
//!
//! * A sample holds until the next one, but no longer than a resource may be silent (`holds_for`): whoever reports
//!   every ten seconds has no gaps in its seconds. Time that no sample holds for is a gap, and counts for nothing.
//! * Memory: a bucket is 4 bytes (two bfloat16, right to 0.4 %), so a full series is 2760 buckets or 11 kB; the rings
//!   grow with what there is to keep, and a resource has at most [`DIMENSIONS_MAX`] series.
//! * Time: recording is a few operations, plus one for each bucket since the sample before, of which there are never
//!   more than the rings hold. What a query costs is said at [`History::query`].
//! * Buckets begin at multiples of their width since the origin of [`Timestamp`]. Who wants hours of the day that
//!   outlive a restart sets that origin so.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use allocation::Timestamp;

mod chunk;

pub use chunk::Chunk;

/// Most dimensions of one resource that have a history.
pub const DIMENSIONS_MAX: usize = 24;
/// The longest window there is an answer for; a longer one is answered for this one.
pub const WINDOW_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Values beyond it are kept as this one: the sum of a bucket must stay finite.
const VALUE_MAX: f64 = 1e30;
const DAY_MS: u64 = 24 * 3_600_000;
/// Days that a forecast looks back, and what each counts compared with the one after it.
const FORECAST_DAYS: u64 = 30;
const FORECAST_DECAY: f64 = 0.8;
/// Windows of one series whose sums are kept until the next bucket.
const CACHED_MAX: usize = 4;
/// A ring grows by this part of what it has, at least by [`GROWTH_MIN`] buckets, and never beyond its length.
const GROWTH_DIVISOR: usize = 4;
const GROWTH_MIN: usize = 16;

/// A ring's buckets.
struct Shape {
    width_ms: u64,
    length: usize,
}

/// Places in [`SHAPES`].
const MINUTES: usize = 1;
const HOURS: usize = 2;
const SHAPES: [Shape; 3] = [
    Shape { width_ms: 1000, length: 600 },
    Shape { width_ms: 60_000, length: 1440 },
    Shape { width_ms: 3_600_000, length: 720 },
];

/// What is asked of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Aggregate {
    /// The newest sample, whatever the window.
    Latest,
    /// The mean over the time that samples hold for.
    Average,
    /// The largest.
    Maximum,
    /// The average times the seconds it covers: of a rate, how many there were.
    Total,
}

impl Aggregate {
    /// Every aggregate.
    pub const ALL: [Self; 4] = [Self::Latest, Self::Average, Self::Maximum, Self::Total];

    /// Its name in configuration and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Latest => "latest",
            Self::Average => "average",
            Self::Maximum => "maximum",
            Self::Total => "total",
        }
    }
}

impl fmt::Display for Aggregate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What was asked of a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer {
    /// In the dimension's unit; a total is in that unit times seconds.
    pub value: f64,
    /// Since the newest sample.
    pub age_of_newest: Duration,
    /// The time within the window that samples hold for, to a bucket.
    pub covered: Duration,
}

/// The histories of one resource's dimensions.
#[derive(Debug, Clone)]
pub struct History {
    holds_for: Duration,
    /// Sorted by name.
    series: Vec<Series>,
    /// The bucket of each tier from which on stretches are to be given again.
    given: [u64; 3],
}

impl History {
    /// Nothing yet. `holds_for`: how long a resource may be silent before its last sample no longer stands for it; that
    /// is [`crate::Registration::stale_after`].
    pub fn new(holds_for: Duration) -> Self {
        Self { holds_for, series: Vec::new(), given: [0; 3] }
    }

    /// Amends how long a sample holds from now on.
    pub fn set_holds_for(&mut self, holds_for: Duration) {
        self.holds_for = holds_for;
    }

    /// Makes sure that there is a place for `dimension`, whichever reports first: criteria need theirs. False: there
    /// are [`DIMENSIONS_MAX`] preferred ones already.
    ///
    /// In a full history it takes the place of the dimension that is not preferred and whose newest sample is oldest.
    pub fn prefer(&mut self, dimension: &str) -> bool {
        let at = match self.find(dimension) {
            Ok(at) => at,
            Err(_) if self.series.len() >= DIMENSIONS_MAX => {
                let evictable = self.series.iter().enumerate().filter(|(_, series)| !series.preferred);
                let Some((evicted, _)) = evictable.min_by_key(|(_, series)| series.latest_at) else {
                    return false;
                };
                self.series.remove(evicted);
                let at = self.find(dimension).unwrap_or_else(|at| at);
                self.series.insert(at, Series::new(dimension));
                at
            }
            Err(at) => {
                self.series.insert(at, Series::new(dimension));
                at
            }
        };
        self.series[at].preferred = true;
        true
    }

    /// Takes a sample in. False: it was not kept, because it is not finite, or because there are [`DIMENSIONS_MAX`]
    /// other dimensions. A sample that is older than the newest counts as of the same moment.
    pub fn record(&mut self, dimension: &str, value: f64, now: Timestamp) -> bool {
        self.record_near(&mut 0, dimension, value, now)
    }

    /// [`Self::record`] for who records the same dimensions in the same order each time: `near` is where this one was, and
    /// becomes where it is. A wrong place costs a search.
    pub(crate) fn record_near(&mut self, near: &mut u8, dimension: &str, value: f64, now: Timestamp) -> bool {
        if !value.is_finite() {
            return false;
        }
        let known = self.series.get(usize::from(*near)).is_some_and(|series| *series.dimension == *dimension);
        if !known {
            let at = match self.find(dimension) {
                Ok(at) => at,
                Err(_) if self.series.len() >= DIMENSIONS_MAX => return false,
                Err(at) => {
                    self.series.insert(at, Series::new(dimension));
                    at
                }
            };
            *near = at as u8;
        }
        let value = value.clamp(-VALUE_MAX, VALUE_MAX) as f32;
        self.series[usize::from(*near)].record(value, now, self.holds_for);
        true
    }

    /// What `dimension` was over the last `window`, by the finest ring that covers it: seconds up to 10 minutes,
    /// minutes up to 24 hours, else hours. The window is made up to whole buckets, and the one that is not over yet is
    /// part of it. `None`: there is no sample in it.
    ///
    /// It goes over every bucket of the window, up to 1440; see [`Self::query_cached`].
    pub fn query(
        &self,
        dimension: &str,
        window: Duration,
        aggregate: Aggregate,
        now: Timestamp,
    ) -> Option<Answer> {
        let series = &self.series[self.find(dimension).ok()?];
        let scope = series.scope(window, now)?;
        let closed = series.rings[scope.ring].closed(scope.buckets.clone());
        series.answer(&scope, closed, aggregate, self.holds_for)
    }

    /// [`Self::query`] for who asks the same at each rebuild: it goes over the buckets once for each new bucket (of
    /// `1h`, 60 of them a minute), and else takes the sums it kept, of up to four windows of a dimension.
    pub fn query_cached(
        &mut self,
        dimension: &str,
        window: Duration,
        aggregate: Aggregate,
        now: Timestamp,
    ) -> Option<Answer> {
        let at = self.find(dimension).ok()?;
        let series = &mut self.series[at];
        let scope = series.scope(window, now)?;
        let closed = series.closed_cached(&scope);
        series.answer(&scope, closed, aggregate, self.holds_for)
    }

    /// What `dimension` will be on average from `now` to `ahead` from now (at most a day), if it is as at that time of
    /// the last thirty days: their mean, where each day counts 0.8 times as much as the one after it. `None`: there
    /// is nothing of that time of any day.
    ///
    /// It goes over the buckets of that time: with `ahead` of an hour, 61 minutes and 60 hours.
    pub fn forecast(&self, dimension: &str, now: Timestamp, ahead: Duration) -> Option<f64> {
        let series = &self.series[self.find(dimension).ok()?];
        let ahead_ms = millis(ahead).clamp(1, DAY_MS);
        let (mut sum, mut weights, mut weight) = (0.0, 0.0, 1.0);
        for day in 1..=FORECAST_DAYS {
            let Some(from) = now.as_millis().checked_sub(day * DAY_MS) else { break };
            let span = from..from.saturating_add(ahead_ms);
            // Minutes reach one day back.
            let by_minutes = (day == 1).then(|| series.mean_of(MINUTES, span.clone())).flatten();
            if let Some(mean) = by_minutes.or_else(|| series.mean_of(HOURS, span)) {
                sum += weight * mean;
                weights += weight;
            }
            weight *= FORECAST_DECAY;
        }
        (weights > 0.0).then(|| sum / weights)
    }

    /// The newest sample of `dimension`, and when it came.
    pub fn latest(&self, dimension: &str) -> Option<(f64, Timestamp)> {
        let series = &self.series[self.find(dimension).ok()?];
        series.sampled.then(|| (f64::from(series.latest), series.latest_at))
    }

    /// The dimensions it has a place for, sorted.
    pub fn dimensions(&self) -> impl Iterator<Item = &str> {
        self.series.iter().map(|series| &*series.dimension)
    }

    /// The memory it takes, in bytes.
    pub fn bytes(&self) -> usize {
        let spare = (self.series.capacity() - self.series.len()) * size_of::<Series>();
        size_of::<Self>() + spare + self.series.iter().map(Series::bytes).sum::<usize>()
    }

    fn find(&self, dimension: &str) -> Result<usize, usize> {
        self.series.binary_search_by(|series| (*series.dimension).cmp(dimension))
    }
}

/// The buckets of a window.
struct Scope {
    ring: usize,
    /// From the window's first to the one before that of `now`.
    buckets: Range<u64>,
    /// How many it would be if time had begun early enough.
    length: u64,
    now_ms: u64,
}

/// One dimension.
#[derive(Debug, Clone)]
struct Series {
    dimension: Arc<str>,
    preferred: bool,
    /// Whether there was a sample; without one the next three say nothing.
    sampled: bool,
    latest: f32,
    latest_at: Timestamp,
    first_at: Timestamp,
    rings: [Ring; 3],
    cached: Vec<Cached>,
    /// The place in `cached` that gives way next.
    cached_next: usize,
}

impl Series {
    fn new(dimension: &str) -> Self {
        Self {
            dimension: dimension.into(),
            preferred: false,
            sampled: false,
            latest: 0.0,
            latest_at: Timestamp::ZERO,
            first_at: Timestamp::ZERO,
            rings: Default::default(),
            cached: Vec::new(),
            cached_next: 0,
        }
    }

    fn record(&mut self, value: f32, now: Timestamp, holds_for: Duration) {
        if !self.sampled {
            (self.sampled, self.first_at) = (true, now);
            self.latest_at = now;
        }
        let now = now.max(self.latest_at);
        let held = (now.since(self.latest_at) <= holds_for).then_some(self.latest);
        // By constants: a division by a number from memory is the slowest there is.
        let ms = now.as_millis();
        let indexes = [ms / SHAPES[0].width_ms, ms / SHAPES[MINUTES].width_ms, ms / SHAPES[HOURS].width_ms];
        for ((ring, shape), index) in self.rings.iter_mut().zip(&SHAPES).zip(indexes) {
            ring.record(shape, index, value, held);
        }
        (self.latest, self.latest_at) = (value, now);
    }

    fn scope(&self, window: Duration, now: Timestamp) -> Option<Scope> {
        if !self.sampled {
            return None;
        }
        let window_ms = millis(window).max(1);
        let covers = |shape: &Shape| window_ms <= shape.width_ms * shape.length as u64;
        let ring = SHAPES.iter().position(covers).unwrap_or(HOURS);
        let shape = &SHAPES[ring];
        let length = window_ms.div_ceil(shape.width_ms).min(shape.length as u64);
        let now_ms = now.max(self.latest_at).as_millis();
        let current = now_ms / shape.width_ms;
        Some(Scope { ring, buckets: current.saturating_sub(length)..current, length, now_ms })
    }

    fn closed_cached(&mut self, scope: &Scope) -> Sums {
        let ring = &self.rings[scope.ring];
        let same = |c: &&mut Cached| c.ring == scope.ring && c.length == scope.length;
        if let Some(cached) = self.cached.iter_mut().find(same) {
            if cached.end != scope.buckets.end || cached.open != ring.open {
                cached.sums = ring.closed(scope.buckets.clone());
                (cached.end, cached.open) = (scope.buckets.end, ring.open);
            }
            return cached.sums;
        }
        let sums = ring.closed(scope.buckets.clone());
        let new =
            Cached { ring: scope.ring, length: scope.length, end: scope.buckets.end, open: ring.open, sums };
        if self.cached.len() < CACHED_MAX {
            self.cached.push(new);
        } else {
            self.cached[self.cached_next] = new;
            self.cached_next = (self.cached_next + 1) % CACHED_MAX;
        }
        sums
    }

    /// `closed`: the sums of the scope's closed buckets.
    fn answer(
        &self,
        scope: &Scope,
        closed: Sums,
        aggregate: Aggregate,
        holds_for: Duration,
    ) -> Option<Answer> {
        let age_of_newest = Duration::from_millis(scope.now_ms - self.latest_at.as_millis());
        let width_ms = SHAPES[scope.ring].width_ms;
        let ring = &self.rings[scope.ring];
        let (mut sum, mut covered_ms) = (closed.sum * width_ms as f64, u64::from(closed.count) * width_ms);
        let mut maximum = f64::from(closed.maximum);
        if ring.open >= scope.buckets.start {
            let open_ms = (scope.now_ms - ring.open * width_ms).clamp(1, width_ms);
            sum += ring.open_average() * open_ms as f64;
            covered_ms += open_ms;
            maximum = maximum.max(f64::from(ring.maximum));
        }
        if age_of_newest <= holds_for {
            let from_ms = ((ring.open + 1) * width_ms).max(scope.buckets.start * width_ms);
            let held_ms = scope.now_ms.saturating_sub(from_ms);
            sum += f64::from(self.latest) * held_ms as f64;
            covered_ms += held_ms;
            maximum = if held_ms > 0 { maximum.max(f64::from(self.latest)) } else { maximum };
        }
        let average = sum / covered_ms as f64;
        // Its first bucket began before its first sample.
        let covered = Duration::from_millis(covered_ms.min(scope.now_ms - self.first_at.as_millis()));
        let value = match aggregate {
            Aggregate::Latest => f64::from(self.latest),
            _ if covered_ms == 0 => return None,
            Aggregate::Average => average,
            Aggregate::Maximum => maximum,
            Aggregate::Total => average * covered.as_secs_f64(),
        };
        Some(Answer { value, age_of_newest, covered })
    }

    /// The mean of the buckets that meet a span of milliseconds, each as long as it does; `None`: all of it is a gap.
    fn mean_of(&self, ring: usize, span: Range<u64>) -> Option<f64> {
        let width_ms = SHAPES[ring].width_ms;
        let ring = &self.rings[ring];
        let (first, end) = (span.start / width_ms, span.end.div_ceil(width_ms));
        let (mut sum, mut weights) = (0.0, 0.0);
        let mut add = |index: u64, average: f64| {
            let (from, to) = (span.start.max(index * width_ms), span.end.min((index + 1) * width_ms));
            let weight = to.saturating_sub(from) as f64;
            sum += weight * average;
            weights += weight;
        };
        for (index, bucket) in ring.range(first..end) {
            if let Some((average, _)) = bucket.get() {
                add(index, f64::from(average));
            }
        }
        if ring.count > 0 && (first..end).contains(&ring.open) {
            add(ring.open, ring.open_average());
        }
        (weights > 0.0).then(|| sum / weights)
    }

    fn bytes(&self) -> usize {
        let rings =
            self.rings.iter().map(|ring| ring.buckets.capacity() * size_of::<Bucket>()).sum::<usize>();
        size_of::<Self>() + self.dimension.len() + self.cached.capacity() * size_of::<Cached>() + rings
    }
}

/// The sums of a window's closed buckets, right until the window moves or another bucket is closed.
#[derive(Debug, Clone)]
struct Cached {
    ring: usize,
    length: u64,
    end: u64,
    open: u64,
    sums: Sums,
}

/// Sums over buckets that are not gaps.
#[derive(Debug, Clone, Copy)]
struct Sums {
    sum: f64,
    count: u32,
    maximum: f32,
}

impl Sums {
    const NONE: Self = Self { sum: 0.0, count: 0, maximum: f32::NEG_INFINITY };
}

/// Buckets of one width: closed ones, one after the other without holes, and the open one after them.
#[derive(Debug, Clone, Default)]
struct Ring {
    buckets: VecDeque<Bucket>,
    /// Which multiple of the width the open bucket begins at.
    open: u64,
    /// Of the open bucket's samples; it has at least one once there was any.
    count: u32,
    sum: f32,
    maximum: f32,
}

impl Ring {
    /// `held`: what the buckets between are; `None`: gaps. An `index` before the open one counts as that.
    fn record(&mut self, shape: &Shape, index: u64, value: f32, held: Option<f32>) {
        if self.count == 0 {
            (self.open, self.maximum) = (index, value);
        } else if index > self.open {
            self.close(shape, index, held);
            self.maximum = value;
        }
        self.count = self.count.saturating_add(1);
        self.sum += value;
        self.maximum = self.maximum.max(value);
    }

    fn close(&mut self, shape: &Shape, index: u64, held: Option<f32>) {
        let missing = index - self.open - 1;
        let length = shape.length as u64;
        if missing >= length && held.is_none() {
            // All of it is too old, and gaps at the end need no memory.
            self.buckets = VecDeque::new();
        } else {
            self.push(shape, Bucket::new(self.open_average() as f32, self.maximum));
            let between = held.map_or(Bucket::GAP, |value| Bucket::new(value, value));
            for _ in 0..missing.min(length) {
                self.push(shape, between);
            }
        }
        (self.open, self.count, self.sum) = (index, 0, 0.0);
    }

    fn push(&mut self, shape: &Shape, bucket: Bucket) {
        let length = self.buckets.len();
        if length == shape.length {
            self.buckets.pop_front();
        } else if length == self.buckets.capacity() {
            let growth = (length / GROWTH_DIVISOR).max(GROWTH_MIN);
            self.buckets.reserve_exact(growth.min(shape.length - length));
        }
        self.buckets.push_back(bucket);
    }

    fn open_average(&self) -> f64 {
        f64::from(self.sum) / f64::from(self.count.max(1))
    }

    /// The closed buckets of these that there are.
    fn range(&self, indexes: Range<u64>) -> impl Iterator<Item = (u64, Bucket)> {
        let first = self.open - self.buckets.len() as u64;
        let start = indexes.start.clamp(first, self.open);
        let end = indexes.end.clamp(start, self.open);
        let buckets = self.buckets.range((start - first) as usize..(end - first) as usize);
        (start..end).zip(buckets.copied())
    }

    fn closed(&self, indexes: Range<u64>) -> Sums {
        let sampled = self.range(indexes).filter_map(|(_, bucket)| bucket.get());
        sampled.fold(Sums::NONE, |sums, (average, maximum)| Sums {
            sum: sums.sum + f64::from(average),
            count: sums.count + 1,
            maximum: sums.maximum.max(maximum),
        })
    }
}

/// Average and maximum, each the upper half of an `f32`. NaN: nothing holds here.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bucket {
    average: u16,
    maximum: u16,
}

impl Bucket {
    const GAP: Self = Self { average: 0x7fc0, maximum: 0x7fc0 };

    fn new(average: f32, maximum: f32) -> Self {
        Self { average: upper_half(average), maximum: upper_half(maximum) }
    }

    fn get(self) -> Option<(f32, f32)> {
        let whole = |half: u16| f32::from_bits(u32::from(half) << 16);
        (self != Self::GAP).then(|| (whole(self.average), whole(self.maximum)))
    }
}

/// To the nearest, and of two as near to the even one: sums of many must not drift. `value` is within [`VALUE_MAX`].
fn upper_half(value: f32) -> u16 {
    let bits = value.to_bits();
    let odd = (bits >> 16) & 1;
    ((bits + 0x7fff + odd) >> 16) as u16
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: u64 = 3_600_000;
    const MINUTE: u64 = 60_000;

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 0.01 * a.abs().max(b.abs()).max(1e-3)
    }

    #[test]
    fn a_rate_over_a_window_is_a_number_of_operations() {
        let mut history = History::new(secs(3));
        for second in 0..=3600 {
            assert!(history.record("operations", 50.0, at(second * 1000)));
        }
        let now = at(HOUR);
        let answer = history.query("operations", secs(3600), Aggregate::Total, now).unwrap();
        assert!(close(answer.value, 180_000.0), "{answer:?}");
        assert_eq!((answer.age_of_newest, answer.covered), (Duration::ZERO, secs(3600)));
        let answer = history.query("operations", secs(60), Aggregate::Total, now).unwrap();
        assert!(close(answer.value, 3000.0), "{answer:?}");
        assert!(history.query("other", secs(60), Aggregate::Average, now).is_none());
    }

    #[test]
    fn a_sample_holds_until_the_next_but_not_for_ever() {
        let mut history = History::new(secs(30));
        for n in 0..30 {
            history.record("cpu", 0.5, at(n * 10_000));
        }
        let silent_since = 290_000;
        let covered = |now| {
            let answer = history.query("cpu", secs(300), Aggregate::Average, at(now)).unwrap();
            assert!(close(answer.value, 0.5));
            answer.covered
        };
        assert_eq!(covered(silent_since + 10_000), secs(300), "ten seconds between reports are no gap");
        // The bucket of the last sample, and what is left of the window before it.
        assert_eq!(covered(silent_since + 100_000), secs(201));
        assert!(history.query("cpu", secs(300), Aggregate::Average, at(silent_since + 400_000)).is_none());
        let latest = history.query("cpu", secs(300), Aggregate::Latest, at(silent_since + 400_000)).unwrap();
        assert_eq!((latest.value, latest.age_of_newest), (0.5, secs(400)));
    }

    #[test]
    fn what_is_not_finite_is_not_kept_and_what_is_huge_stays_finite() {
        let mut history = History::new(secs(3));
        assert!(!history.record("m", f64::NAN, at(0)));
        assert!(!history.record("m", f64::INFINITY, at(0)));
        assert!(history.latest("m").is_none());
        for n in 0..100 {
            assert!(history.record("m", if n % 2 == 0 { 1e300 } else { -1e300 }, at(n * 100)));
        }
        let answer = history.query("m", secs(5), Aggregate::Average, at(9900)).unwrap();
        assert!(answer.value.is_finite());
        // Late by a thread's turn: of the same moment.
        assert!(history.record("m", 2.0, at(5000)));
        assert_eq!(history.latest("m"), Some((2.0, at(9900))));
    }

    #[test]
    fn memory_is_bounded_and_follows_what_there_is() {
        let mut history = History::new(secs(3 * 3600));
        history.record("d00", 1.0, at(0));
        assert!(history.bytes() < 2500, "{}", history.bytes());
        for hour in 0..800 {
            for n in 0..30 {
                history.record(&format!("d{n:02}"), 1.0, at(hour * HOUR));
            }
        }
        assert_eq!(history.dimensions().count(), DIMENSIONS_MAX);
        assert!(history.bytes() <= DIMENSIONS_MAX * 11_500, "{}", history.bytes());
        assert!(!history.record("late", 1.0, at(800 * HOUR)));
        // A gap longer than everything gives the memory back.
        history.record("d00", 1.0, at(3000 * HOUR));
        assert!(history.bytes() < DIMENSIONS_MAX * 11_500 - 10_000, "{}", history.bytes());
    }

    #[test]
    fn preferred_dimensions_have_a_place() {
        let mut history = History::new(secs(3));
        for n in 0..DIMENSIONS_MAX as u64 {
            history.record(&format!("d{n:02}"), 1.0, at(1000 - n));
        }
        assert!(history.prefer("cost") && history.prefer("d05") && history.prefer("d23"));
        let names: Vec<_> = history.dimensions().collect();
        assert_eq!(names.len(), DIMENSIONS_MAX);
        assert!(
            names.is_sorted() && names.contains(&"cost") && names.contains(&"d23") && !names.contains(&"d22")
        );
        assert!(
            history.query("cost", secs(9), Aggregate::Latest, at(0)).is_none(),
            "nothing was reported yet"
        );
        for n in 0..DIMENSIONS_MAX - 3 {
            assert!(history.prefer(&format!("p{n:02}")));
        }
        assert!(!history.prefer("one too many"));
        assert!(history.record("cost", 1.0, at(2000)));
    }

    #[test]
    fn a_resource_that_is_hot_every_night_at_two_is_forecast_so() {
        let mut history = History::new(secs(1800));
        let forecast = |history: &History, minutes: u64, ahead| {
            history.forecast("cpu", at(30 * DAY_MS + minutes * MINUTE), secs(ahead)).unwrap()
        };
        for sample in 0..30 * 24 * 12 {
            let now = sample * 5 * MINUTE;
            let hot = (now / HOUR) % 24 == 2;
            history.record("cpu", if hot { 0.9 } else { 0.1 }, at(now));
            if now < DAY_MS {
                assert!(history.forecast("cpu", at(now), secs(3600)).is_none(), "there is no earlier day");
            }
        }
        assert!(close(forecast(&history, 120, 3600), 0.9));
        assert!(close(forecast(&history, 60, 3600), 0.1));
        assert!((forecast(&history, 90, 3600) - 0.5).abs() < 0.02);
        assert!(close(forecast(&history, 12 * 60, 3600), 0.1));
        assert!((forecast(&history, 0, 24 * 3600) - 0.8 / 24.0 - 0.1).abs() < 0.01);
        // It has been cool for five nights: newer days count more, older ones still count.
        for sample in 0..5 * 24 * 12 {
            history.record("cpu", 0.1, at(30 * DAY_MS + sample * 5 * MINUTE));
        }
        let later = history.forecast("cpu", at(35 * DAY_MS + 120 * MINUTE), secs(3600)).unwrap();
        assert!((0.3..0.4).contains(&later), "0.8^5 of the weight is of hot nights: {later}");
    }

    #[test]
    fn a_forecast_lasts_over_a_day_without_samples() {
        let mut history = History::new(secs(180));
        for minute in 0..24 * 60 {
            history.record("cpu", 0.7, at(minute * MINUTE));
        }
        let now = at(2 * DAY_MS + 12 * HOUR);
        assert!(
            close(history.forecast("cpu", now, secs(600)).unwrap(), 0.7),
            "from the hours of two days ago"
        );
    }

    /// The same by every sample there was: buckets by index, none ever forgotten.
    struct Model {
        samples: Vec<(u64, f64)>,
        holds_ms: u64,
    }

    impl Model {
        fn bucket(&self, width: u64, index: u64, now: u64) -> Option<(f64, f64, u64)> {
            let of = |n: &&(u64, f64)| n.0 / width == index;
            let own: Vec<f64> = self.samples.iter().filter(of).map(|s| s.1).collect();
            let until_now = (now - index * width).min(width);
            if !own.is_empty() {
                let maximum = own.iter().copied().fold(f64::MIN, f64::max);
                return Some((own.iter().sum::<f64>() / own.len() as f64, maximum, until_now.max(1)));
            }
            let next = self.samples.iter().position(|s| s.0 / width > index).unwrap_or(self.samples.len());
            let (held_at, value) = *self.samples[..next].last()?;
            let held_to = self.samples.get(next).map_or(now, |s| s.0);
            (held_to - held_at <= self.holds_ms && until_now > 0).then_some((value, value, until_now))
        }

        fn query(&self, window: u64, now: u64) -> Option<(f64, f64, u64)> {
            let width = match window {
                0..=600_000 => 1000,
                600_001..=86_400_000 => MINUTE,
                _ => HOUR,
            };
            let current = now / width;
            let first =
                current.saturating_sub(window.max(1).div_ceil(width).min(720.max(86_400_000 / width)));
            let buckets: Vec<_> = (first..=current).filter_map(|i| self.bucket(width, i, now)).collect();
            let covered: u64 = buckets.iter().map(|b| b.2).sum();
            let average = buckets.iter().map(|b| b.0 * b.2 as f64).sum::<f64>() / covered as f64;
            let maximum = buckets.iter().map(|b| b.1).fold(f64::MIN, f64::max);
            (covered > 0).then(|| (average, maximum, covered.min(now - self.samples[0].0)))
        }
    }

    /// From a burst within a second to days of silence.
    fn gap() -> impl Strategy<Value = u64> {
        prop_oneof![
            6 => 1_u64..2500,
            4 => 2500_u64..200_000,
            2 => 200_000_u64..2 * HOUR,
            1 => 2 * HOUR..40 * 24 * HOUR,
        ]
    }

    fn window() -> impl Strategy<Value = u64> {
        prop_oneof![0_u64..20_000, 20_000_u64..600_001, 600_001_u64..4 * HOUR, DAY_MS..3 * DAY_MS]
    }

    proptest! {
        #[test]
        fn it_answers_as_one_who_forgets_nothing(
            ops in prop::collection::vec((gap(), 0.0_f64..100.0, window(), 0_u64..9000), 1..40),
            holds_ms in prop_oneof![Just(3000_u64), Just(30_000), Just(3 * HOUR)],
        ) {
            let mut history = History::new(Duration::from_millis(holds_ms));
            let mut model = Model { samples: Vec::new(), holds_ms };
            let mut now = 0;
            for (gap, value, window, later) in ops {
                now += gap;
                history.record("cpu", value, at(now));
                model.samples.push((now, value));
                let (asked, window_of) = (at(now + later), Duration::from_millis(window));
                let expected = model.query(window, now + later);
                let average = history.query("cpu", window_of, Aggregate::Average, asked);
                prop_assert_eq!(expected.is_some(), average.is_some());
                for aggregate in [Aggregate::Average, Aggregate::Maximum, Aggregate::Total, Aggregate::Latest] {
                    let plain = history.query("cpu", window_of, aggregate, asked);
                    prop_assert_eq!(plain, history.query_cached("cpu", window_of, aggregate, asked));
                    prop_assert_eq!(plain, history.query_cached("cpu", window_of, aggregate, asked));
                }
                let Some((mean, maximum, covered)) = expected else { continue };
                let average = average.unwrap();
                prop_assert!(close(average.value, mean), "{} {mean}", average.value);
                prop_assert_eq!(average.covered, Duration::from_millis(covered));
                prop_assert_eq!(average.age_of_newest, Duration::from_millis(later));
                let found = history.query("cpu", window_of, Aggregate::Maximum, asked).unwrap().value;
                prop_assert!(close(found, maximum), "{found} {maximum}");
                prop_assert!(history.bytes() < 13_000);
            }
        }

        #[test]
        fn halves_are_near_and_ordered(a in -1e30_f32..1e30, b in -1e3_f32..1e3) {
            for value in [a, b] {
                let kept = Bucket::new(value, value).get().unwrap().0;
                prop_assert!((kept - value).abs() <= value.abs() / 256.0 + 1e-38);
            }
            let (low, high) = (a.min(b), a.max(b));
            let bucket = Bucket::new(low, high).get().unwrap();
            prop_assert!(bucket.0 <= bucket.1);
        }
    }
}
