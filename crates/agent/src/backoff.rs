//! How long to wait before the next try: exponential, with full jitter.
//!
//! After a balancer's restart hundreds of agents try at once; full jitter spreads them over the whole pause rather than
//! in waves (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).

use std::time::Duration;

/// Least pause: however the dice fall, no loop without a breath.
const PAUSE_MIN: Duration = Duration::from_millis(10);

/// Pauses between tries, from a seed.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    cap: Duration,
    failures: u32,
    random: Random,
}

impl Backoff {
    /// Pauses up to `first`, then up to twice that, and so on up to `cap`.
    pub(crate) fn new(first: Duration, cap: Duration, seed: u64) -> Self {
        Self { first, cap, failures: 0, random: Random(seed) }
    }

    /// The pause after one more failure.
    pub(crate) fn pause(&mut self) -> Duration {
        let doublings = self.failures.min(31);
        self.failures = self.failures.saturating_add(1);
        let most = self.first.saturating_mul(1 << doublings).min(self.cap);
        most.mul_f64(self.random.unit()).max(PAUSE_MIN)
    }

    /// A pause that does not grow: half of `length` to all of it.
    pub(crate) fn steady(&mut self, length: Duration) -> Duration {
        length.mul_f64(0.5 + self.random.unit() / 2.0).max(PAUSE_MIN)
    }

    /// It worked: the next failure is a first one again.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). Not for secrets.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    /// 0 up to but not 1.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FIRST: Duration = Duration::from_millis(100);
    const CAP: Duration = Duration::from_secs(2);

    proptest! {
        #[test]
        fn pauses_stay_under_their_doubling_bound(seed: u64, failures in 1_u32..100) {
            let mut backoff = Backoff::new(FIRST, CAP, seed);
            for failure in 0..failures {
                let most = FIRST.saturating_mul(1 << failure.min(20)).min(CAP);
                let pause = backoff.pause();
                prop_assert!(pause >= PAUSE_MIN && pause <= most, "{pause:?} after {failure} failures");
            }
            backoff.reset();
            prop_assert!(backoff.pause() <= FIRST);
            let steady = backoff.steady(CAP);
            prop_assert!(steady >= CAP / 2 && steady <= CAP);
        }
    }

    #[test]
    fn pauses_use_their_whole_range_and_differ_by_seed() {
        let late = |seed| {
            let mut backoff = Backoff::new(FIRST, CAP, seed);
            std::iter::repeat_with(|| backoff.pause()).nth(10).expect("it never ends")
        };
        let pauses: Vec<Duration> = (0..1000).map(late).collect();
        let mean = pauses.iter().sum::<Duration>() / 1000;
        assert!(mean > CAP * 45 / 100 && mean < CAP * 55 / 100, "{mean:?}");
        assert!(pauses.iter().any(|p| *p < CAP / 10) && pauses.iter().any(|p| *p > CAP * 9 / 10));
    }
}
