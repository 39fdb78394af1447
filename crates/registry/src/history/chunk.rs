//! Histories in pieces that can be kept elsewhere: stretches of one tier's buckets, ten seconds, an hour of minutes or a day of
//! hours each, of all dimensions of a resource.
//!
//! ```text
//! stretch    dimension, dimension, …
//! dimension  length of its name (1 byte), name, first bucket (1), buckets (1), then for each average and maximum (2 bytes each,
//!            little endian: the upper half of an f32, as in memory)
//! ```
//!
//! Seconds are given with the open one, minutes and hours once they are over: what is open of those is made of the finer tier
//! when a history is restored. Buckets are counted from the origin of the timestamps that were recorded with, so histories
//! that outlive a process are recorded with an origin that does.

use allocation::Timestamp;

use super::{Bucket, DIMENSIONS_MAX, HOURS, History, MINUTES, Ring, SHAPES, Series, Shape};
use crate::KEY_BYTES_MAX;

/// Buckets in a stretch of each tier.
const LENGTHS: [u64; 3] = [10, 60, 24];
const SECONDS: usize = 0;

/// A stretch of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The width of its buckets, in milliseconds.
    pub tier_ms: u64,
    /// When its first bucket begins, in milliseconds since the origin of timestamps.
    pub start_ms: u64,
    /// Its buckets by dimension, in the form that this module describes.
    pub buckets: Vec<u8>,
}

impl Chunk {
    /// Each tier's width of a bucket and how far back it reaches, in milliseconds.
    pub fn tiers() -> [(u64, u64); 3] {
        SHAPES.map(|Shape { width_ms, length }| (width_ms, width_ms * length as u64))
    }
}

impl History {
    /// The stretches that have changed since the last call; a stretch is whole each time, and stands for the one of the same
    /// start that was given before.
    pub fn take_chunks(&mut self) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        for tier in [SECONDS, MINUTES, HOURS] {
            self.take_tier(tier, &mut chunks);
        }
        chunks
    }

    fn take_tier(&mut self, tier: usize, chunks: &mut Vec<Chunk>) {
        let rings = || self.series.iter().filter(|series| series.sampled).map(|series| &series.rings[tier]);
        let Some(open) = rings().map(|ring| ring.open).max() else { return };
        let first = rings().map(Ring::first).min().unwrap_or(open);
        let end = if tier == SECONDS { open + 1 } else { open };
        let length = LENGTHS[tier];
        let from = self.given[tier].max(first);
        for stretch in from / length..end.div_ceil(length) {
            let buckets = self.encode(tier, stretch * length, end.min((stretch + 1) * length));
            if !buckets.is_empty() {
                let tier_ms = SHAPES[tier].width_ms;
                chunks.push(Chunk { tier_ms, start_ms: stretch * length * tier_ms, buckets });
            }
        }
        // A second that is open will be given again.
        self.given[tier] = open;
    }

    fn encode(&self, tier: usize, start: u64, end: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for series in self.series.iter().filter(|series| series.sampled) {
            let ring = &series.rings[tier];
            let open = (tier == SECONDS && (start..end).contains(&ring.open))
                .then(|| (ring.open, ring.open_bucket()));
            let mut buckets =
                ring.range(start..end).chain(open).skip_while(|(_, bucket)| *bucket == Bucket::GAP);
            let Some((first, bucket)) = buckets.next() else { continue };
            let name = series.dimension.as_bytes();
            let length = name.len().min(KEY_BYTES_MAX);
            bytes.push(length as u8);
            bytes.extend_from_slice(&name[..length]);
            bytes.push((first - start) as u8);
            let count = bytes.len();
            bytes.push(0);
            for bucket in std::iter::once(bucket).chain(buckets.map(|(_, bucket)| bucket)) {
                bytes.extend_from_slice(&bucket.average.to_le_bytes());
                bytes.extend_from_slice(&bucket.maximum.to_le_bytes());
                bytes[count] += 1;
            }
        }
        bytes
    }

    /// Takes stretches back into a history that has recorded nothing yet; `now` is of the same origin as theirs. What is too old,
    /// or is said to be later than now, is left out. Gives how many could not be read.
    pub fn restore(&mut self, chunks: &[Chunk], now: Timestamp) -> usize {
        let mut unreadable = 0;
        let mut found: Vec<Found> = Vec::new();
        for chunk in chunks {
            let tier = SHAPES.iter().position(|shape| shape.width_ms == chunk.tier_ms);
            let read = tier.and_then(|tier| decode(tier, chunk, now, &mut found));
            unreadable += usize::from(read.is_none());
        }
        for found in found {
            self.given.iter_mut().zip(found.ends()).for_each(|(given, end)| *given = (*given).max(end));
            self.put(found);
        }
        unreadable
    }

    fn put(&mut self, mut found: Found) {
        let at = match self.find(&found.dimension) {
            Ok(at) => at,
            Err(_) if self.series.len() >= DIMENSIONS_MAX => return,
            Err(at) => {
                self.series.insert(at, Series::new(&found.dimension));
                at
            }
        };
        found.sort();
        found.roll_up(MINUTES);
        found.roll_up(HOURS);
        let series = &mut self.series[at];
        let Some((latest, latest_at)) = found.latest() else { return };
        (series.sampled, series.latest, series.latest_at) = (true, latest, latest_at);
        series.first_at = found.first_at();
        for (tier, (shape, rolled)) in SHAPES.iter().zip(found.tiers).enumerate() {
            series.rings[tier].fill(shape, rolled);
        }
    }
}

impl Ring {
    /// The oldest bucket there is.
    fn first(&self) -> u64 {
        self.open - self.buckets.len() as u64
    }

    fn open_bucket(&self) -> Bucket {
        Bucket::new(self.open_average() as f32, self.maximum)
    }

    /// With these, of which the last becomes the open one.
    fn fill(&mut self, shape: &Shape, mut rolled: Vec<Rolled>) {
        let Some(open) = rolled.pop() else { return };
        let (average, maximum) = open.bucket.get().unwrap_or_default();
        *self = Self {
            open: open.index,
            count: open.samples,
            sum: average * open.samples as f32,
            maximum,
            ..Self::default()
        };
        let mut next = rolled.first().map_or(open.index, |first| first.index);
        for Rolled { index, bucket, .. } in rolled {
            for _ in next..index {
                self.push(shape, Bucket::GAP);
            }
            self.push(shape, bucket);
            next = index + 1;
        }
        for _ in next..open.index {
            self.push(shape, Bucket::GAP);
        }
    }
}

/// A bucket that was read or made of finer ones.
#[derive(Debug, Clone, Copy)]
struct Rolled {
    index: u64,
    bucket: Bucket,
    /// How many it stands for, beside those that come to it.
    samples: u32,
}

/// One dimension, as it is found in stretches.
struct Found {
    dimension: String,
    tiers: [Vec<Rolled>; 3],
}

impl Found {
    /// What need not be given again: for each tier, the last bucket of seconds, and the one after the last of the others.
    fn ends(&self) -> [u64; 3] {
        let last = |tier: usize| self.tiers[tier].iter().map(|rolled| rolled.index).max();
        [last(SECONDS).unwrap_or(0), last(MINUTES).map_or(0, |m| m + 1), last(HOURS).map_or(0, |h| h + 1)]
    }

    fn sort(&mut self) {
        for tier in &mut self.tiers {
            tier.sort_by_key(|rolled| rolled.index);
            tier.dedup_by_key(|rolled| rolled.index);
        }
    }

    /// Makes the newest buckets of a tier, which were not given yet, of the finer one.
    fn roll_up(&mut self, tier: usize) {
        let (finer, coarser) = self.tiers.split_at_mut(tier);
        let (finer, coarser) = (&finer[tier - 1], &mut coarser[0]);
        let ratio = SHAPES[tier].width_ms / SHAPES[tier - 1].width_ms;
        let from = coarser.last().map_or(0, |last| last.index + 1);
        let news = finer.iter().filter(|rolled| rolled.index / ratio >= from);
        for group in news.collect::<Vec<_>>().chunk_by(|a, b| a.index / ratio == b.index / ratio) {
            let values = || group.iter().filter_map(|rolled| rolled.bucket.get());
            let count = values().count();
            if count == 0 {
                continue;
            }
            let average = values().map(|(average, _)| f64::from(average)).sum::<f64>() / count as f64;
            let maximum = values().map(|(_, maximum)| maximum).fold(f32::NEG_INFINITY, f32::max);
            let samples = group.iter().map(|rolled| rolled.samples).sum();
            let index = group[0].index / ratio;
            coarser.push(Rolled { index, bucket: Bucket::new(average as f32, maximum), samples });
        }
    }

    /// The newest sample there is, as of the end of its bucket.
    fn latest(&self) -> Option<(f32, Timestamp)> {
        let last = |tier: usize| {
            let last =
                self.tiers[tier].iter().rev().find_map(|rolled| Some((rolled.index, rolled.bucket.get()?.0)));
            last.map(|(index, value)| (value, Timestamp::from_millis(index * SHAPES[tier].width_ms)))
        };
        [SECONDS, MINUTES, HOURS].into_iter().find_map(last)
    }

    /// When its oldest bucket begins, as the finest tier that has the beginning of it says: a minute that was made of its last
    /// ten seconds began with these.
    fn first_at(&self) -> Timestamp {
        let mut first = None;
        for (tier, shape) in SHAPES.iter().enumerate().rev() {
            let begins_ms = self.tiers[tier].first().map(|rolled| rolled.index * shape.width_ms);
            let coarser_ms = SHAPES.get(tier + 1).map_or(u64::MAX, |coarser| coarser.width_ms);
            first = match (first, begins_ms) {
                (Some(first), Some(begins)) if begins >= first + coarser_ms => Some(first),
                (first, begins) => begins.or(first),
            };
        }
        Timestamp::from_millis(first.unwrap_or(0))
    }
}

/// Adds what is in a stretch. `None`: it is not of the form.
fn decode(tier: usize, chunk: &Chunk, now: Timestamp, found: &mut Vec<Found>) -> Option<()> {
    let shape = &SHAPES[tier];
    let current = now.as_millis() / shape.width_ms;
    let start = chunk.start_ms / shape.width_ms;
    // Beside the open one.
    let oldest = current.saturating_sub(shape.length as u64);
    let mut rest = chunk.buckets.as_slice();
    while let Some((&length, after)) = rest.split_first() {
        let (name, after) = after.split_at_checked(usize::from(length))?;
        let name = std::str::from_utf8(name).ok().filter(|name| crate::key_fault(name).is_none())?;
        let (&[first, count], after) = after.split_first_chunk::<2>()?;
        let (buckets, after) = after.split_at_checked(usize::from(count) * 4)?;
        rest = after;
        let place = found.iter().position(|known| known.dimension == name).unwrap_or_else(|| {
            found.push(Found { dimension: name.to_owned(), tiers: Default::default() });
            found.len() - 1
        });
        for (offset, bytes) in buckets.chunks_exact(4).enumerate() {
            let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            let bucket = Bucket { average: half(0), maximum: half(2) };
            let index = start.checked_add(u64::from(first) + offset as u64)?;
            let finite =
                bucket.get().is_some_and(|(average, maximum)| average.is_finite() && maximum.is_finite());
            if finite && (oldest..=current).contains(&index) {
                let samples = (shape.width_ms / SHAPES[SECONDS].width_ms) as u32;
                found[place].tiers[tier].push(Rolled { index, bucket, samples });
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::history::{Aggregate, WINDOW_MAX};

    const HOLDS: Duration = Duration::from_secs(3);

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    /// What a store would have: the newest of each stretch.
    #[derive(Default)]
    struct Kept(BTreeMap<(u64, u64), Vec<u8>>);

    impl Kept {
        fn take(&mut self, history: &mut History) -> usize {
            let chunks = history.take_chunks();
            let count = chunks.len();
            for chunk in chunks {
                self.0.insert((chunk.tier_ms, chunk.start_ms), chunk.buckets);
            }
            count
        }

        fn restore(&self, now: Timestamp) -> History {
            let chunk = |((tier_ms, start_ms), buckets): (&(u64, u64), &Vec<u8>)| Chunk {
                tier_ms: *tier_ms,
                start_ms: *start_ms,
                buckets: buckets.clone(),
            };
            let mut history = History::new(HOLDS);
            history.prefer("cpu");
            assert_eq!(history.restore(&self.0.iter().map(chunk).collect::<Vec<_>>(), now), 0);
            history
        }
    }

    fn averages(history: &History, now: Timestamp) -> Vec<Option<(f64, f64)>> {
        let windows = [10, 300, 600, 3_600, 24 * 3_600, 30 * 24 * 3_600].map(Duration::from_secs);
        let ask = |window, aggregate| history.query("cpu", window, aggregate, now).map(|answer| answer.value);
        windows.map(|window| ask(window, Aggregate::Average).zip(ask(window, Aggregate::Maximum))).to_vec()
    }

    #[test]
    fn a_day_of_reports_is_what_it_was_after_a_restart() {
        let (mut history, mut kept) = (History::new(HOLDS), Kept::default());
        let begin = 1_790_000_000_000;
        let mut now = at(begin);
        for second in 0..26 * 3_600_u64 {
            now = at(begin + second * 1_000);
            let value = 0.5 + 0.4 * (second as f64 / 5_000.0).sin();
            history.record("cpu", value, now);
            history.record("operations", 10.0 + (second % 7) as f64, now);
            let chunks = kept.take(&mut history);
            assert!((1..=4).contains(&chunks), "a second costs {chunks} stretches");
        }
        let restored = kept.restore(now);
        for (was, is) in averages(&history, now).into_iter().zip(averages(&restored, now)) {
            let (was, is) = (was.unwrap(), is.unwrap());
            assert!((was.0 - is.0).abs() < 0.005 && (was.1 - is.1).abs() < 0.005, "{was:?} {is:?}");
        }
        assert_eq!(restored.latest("cpu").map(|(_, at)| at), Some(now));
        let forecast = |history: &History| history.forecast("cpu", now, Duration::from_secs(3_600)).unwrap();
        assert!((forecast(&history) - forecast(&restored)).abs() < 0.005, "the same hour of the day before");
        // It goes on where it was: what is given next continues the stretches.
        let mut restored = restored;
        for second in 1..=120 {
            restored.record("cpu", 0.9, at(now.as_millis() + second * 1_000));
            kept.take(&mut restored);
        }
        let later = at(now.as_millis() + 120_000);
        let again = kept.restore(later);
        let total = |history: &History| history.query("cpu", WINDOW_MAX, Aggregate::Total, later).unwrap();
        assert!((total(&restored).value / total(&again).value - 1.0).abs() < 0.01);
    }

    #[test]
    fn a_restart_leaves_a_gap_of_its_length_and_a_clock_set_back_no_future() {
        let (mut history, mut kept) = (History::new(HOLDS), Kept::default());
        for second in 0..60 {
            history.record("cpu", 0.5, at(1_000_000 + second * 1_000));
        }
        kept.take(&mut history);
        let mut restored = kept.restore(at(1_360_000));
        restored.record("cpu", 0.9, at(1_360_000));
        let answer =
            restored.query("cpu", Duration::from_secs(600), Aggregate::Average, at(1_360_500)).unwrap();
        assert!((answer.value - 0.5).abs() < 0.02, "{answer:?}");
        assert!(answer.covered < Duration::from_secs(62), "{answer:?}");
        let early = kept.restore(at(1_030_000));
        assert_eq!(early.latest("cpu").map(|(_, at)| at.as_millis()), Some(1_030_000));
        assert_eq!(kept.restore(at(500_000)).latest("cpu"), None);
    }

    #[test]
    fn a_short_history_covers_no_more_after_a_restart() {
        let (mut history, mut kept) = (History::new(HOLDS), Kept::default());
        for second in 0..5 {
            history.record("cpu", 10.0, at(7_250_000 + second * 1_000));
        }
        kept.take(&mut history);
        let total = |history: &History| {
            history.query("cpu", Duration::from_secs(3_600), Aggregate::Total, at(7_254_000)).unwrap().value
        };
        let restored = kept.restore(at(7_254_000));
        assert!((total(&history) - total(&restored)).abs() < 1.0, "{} {}", total(&history), total(&restored));
    }

    #[test]
    fn silence_is_not_given_again() {
        let mut history = History::new(HOLDS);
        assert_eq!(history.take_chunks(), []);
        history.record("cpu", 0.5, at(5_000));
        assert_eq!(history.take_chunks().len(), 1);
        history.record("cpu", 0.5, at(65_000));
        let chunks = history.take_chunks();
        let tiers: Vec<_> = chunks.iter().map(|chunk| (chunk.tier_ms, chunk.start_ms)).collect();
        assert_eq!(tiers, [(1_000, 0), (1_000, 60_000), (60_000, 0)], "gaps between need no stretch");
    }

    proptest! {
        #[test]
        fn whatever_a_file_says_is_read_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..200), tier in 0_usize..4, start in any::<u64>(), now in any::<u32>(),
        ) {
            let tier_ms = [1_000, 60_000, 3_600_000, 7][tier];
            let mut history = History::new(HOLDS);
            history.restore(&[Chunk { tier_ms, start_ms: start, buckets: bytes }], at(u64::from(now)));
            prop_assert!(history.bytes() < 2_000_000);
            let _ = history.query("cpu", WINDOW_MAX, Aggregate::Average, at(u64::from(now)));
        }

        #[test]
        fn what_was_given_is_what_was_recorded(
            ops in prop::collection::vec((0_u64..30_000, 0.0_f64..1.0, any::<bool>()), 1..120),
        ) {
            let (mut history, mut kept) = (History::new(HOLDS), Kept::default());
            let mut now = 1_000_000;
            for (gap, value, take) in ops {
                now += gap;
                history.record("cpu", value, at(now));
                if take {
                    kept.take(&mut history);
                }
            }
            kept.take(&mut history);
            let restored = kept.restore(at(now));
            let window = Duration::from_secs(600);
            let ask = |history: &History, aggregate| history.query("cpu", window, aggregate, at(now)).unwrap().value;
            let (was, is) = (ask(&history, Aggregate::Maximum), ask(&restored, Aggregate::Maximum));
            prop_assert!((was - is).abs() <= 0.005, "{} {}", was, is);
        }
    }
}
