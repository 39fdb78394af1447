//! A token bucket in one number.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Of a microsecond: so that a million a second is kept to 3 % and a thousand to a part in 30,000.
const TICKS_PER_MICRO: u64 = 16;
const TICKS_PER_SECOND: u64 = TICKS_PER_MICRO * 1_000_000;

/// So many a second for long, and as many at once.
///
/// The bucket is kept as the moment at which it will be full again (the generic cell rate algorithm, ITU-T I.371, whose
/// "theoretical arrival time" that is): a bucket of `n` tokens that fills in a second is full when the moment has come, and
/// empty when it is a second away. One number is enough, and refilling needs no timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Ticks that one token takes to come; 0: no limit.
    interval: u64,
    /// Ticks that all tokens take to come.
    span: u64,
}

/// When a bucket is full again, in ticks on the process's clock.
#[derive(Debug, Default)]
pub(super) struct FullAt(AtomicU64);

impl Rate {
    /// No limit.
    pub const NONE: Self = Self { interval: 0, span: 0 };
    /// Most that is kept apart from no limit.
    pub const PER_SECOND_MAX: u32 = 1_000_000;

    /// So many a second (and at once); 0: no limit; more than [`Rate::PER_SECOND_MAX`]: that many.
    pub fn per_second(flows: u32) -> Self {
        if flows == 0 {
            return Self::NONE;
        }
        let flows = u64::from(flows.min(Self::PER_SECOND_MAX));
        let interval = (TICKS_PER_SECOND + flows / 2) / flows;
        Self { interval, span: interval * flows }
    }

    /// Whether it limits anything.
    pub fn is_limited(self) -> bool {
        self.interval > 0
    }
}

impl FullAt {
    /// Starts full.
    pub(super) fn reset(&self, now_micros: u64) {
        self.0.store(ticks(now_micros), Relaxed);
    }

    pub(super) fn is_full(&self, now_micros: u64) -> bool {
        self.0.load(Relaxed) <= ticks(now_micros)
    }

    /// Whether a token is there; takes none.
    pub(super) fn has_token(&self, rate: Rate, now_micros: u64) -> bool {
        after_one(self.0.load(Relaxed), rate, ticks(now_micros)).is_some()
    }

    /// Takes a token, if there is one. Tries again only when another worker has taken one meanwhile.
    pub(super) fn take(&self, rate: Rate, now_micros: u64) -> bool {
        let now = ticks(now_micros);
        rate.interval == 0 || self.0.fetch_update(Relaxed, Relaxed, |at| after_one(at, rate, now)).is_ok()
    }

    /// Puts a token back that was taken for nothing.
    pub(super) fn give_back(&self, rate: Rate) {
        self.0.fetch_sub(rate.interval, Relaxed);
    }
}

/// When the bucket is full again with one token less; `None`: it is empty.
fn after_one(full_at: u64, rate: Rate, now: u64) -> Option<u64> {
    if rate.interval == 0 {
        return Some(full_at);
    }
    let after = full_at.max(now) + rate.interval;
    (after - now <= rate.span).then_some(after)
}

fn ticks(micros: u64) -> u64 {
    // 2^60 microseconds are 36,000 years.
    micros * TICKS_PER_MICRO
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bucket as people draw it: it fills at each look and cannot run over.
    struct Naive {
        /// In ticks of filling.
        level: u64,
        at_micros: u64,
    }

    impl Naive {
        fn take(&mut self, rate: Rate, now: u64) -> bool {
            self.level = (self.level + (now - self.at_micros) * TICKS_PER_MICRO).min(rate.span);
            self.at_micros = now;
            let there = self.level >= rate.interval;
            self.level -= if there { rate.interval } else { 0 };
            there
        }
    }

    proptest! {
        #[test]
        fn it_is_a_token_bucket(
            per_second in prop_oneof![1_u32..20, 1_u32..20_000],
            gaps in prop::collection::vec((0_u64..4, 0_u64..3_000_000), 1..400),
        ) {
            let (rate, bucket) = (Rate::per_second(per_second), FullAt::default());
            let mut now = 5_000_000;
            bucket.reset(now);
            let mut naive = Naive { level: rate.span, at_micros: now };
            for (kind, gap) in gaps {
                now += match kind { 0 => 0, 1 => gap % 1_000, 2 => gap % 100_000, _ => gap };
                let there = bucket.has_token(rate, now);
                prop_assert_eq!(there, bucket.take(rate, now));
                prop_assert_eq!(there, naive.take(rate, now));
            }
        }

        #[test]
        fn no_second_has_more_than_two_bursts(per_second in 1_u32..2_000_000, gaps in prop::collection::vec(0_u64..5_000, 1..2_000)) {
            let (rate, bucket) = (Rate::per_second(per_second), FullAt::default());
            let limit = f64::from(per_second.min(Rate::PER_SECOND_MAX));
            let (mut now, mut taken) = (0, 0_u32);
            for gap in gaps {
                now += gap;
                taken += u32::from(bucket.take(rate, now));
                prop_assert!(f64::from(taken) <= limit + now as f64 * 1e-6 * limit * 1.04 + 1.0);
            }
        }
    }

    #[test]
    fn a_second_of_rest_is_a_whole_burst() {
        for per_second in [1, 3, 7, 1_000, 99_999, 1_000_000] {
            let (rate, bucket) = (Rate::per_second(per_second), FullAt::default());
            let burst = |now| (0..2_000_000).take_while(|_| bucket.take(rate, now)).count() as u32;
            assert_eq!(burst(0), per_second);
            assert_eq!(burst(0), 0);
            let again = burst(1_050_000);
            assert_eq!(again, per_second, "after a second and what rounding may cost");
        }
        assert!((0..1_000).all(|_| FullAt::default().take(Rate::NONE, 0)));
    }

    #[test]
    fn a_worker_that_looked_at_the_clock_earlier_gives_nothing_away() {
        let (rate, bucket) = (Rate::per_second(10), FullAt::default());
        assert!((0..10).all(|_| bucket.take(rate, 2_000_000)));
        assert!(!bucket.take(rate, 1_900_000));
        assert!(bucket.take(rate, 2_100_000) && !bucket.take(rate, 2_100_000));
    }
}
