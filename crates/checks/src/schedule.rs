//! When a resource is checked next, and what the results in a row mean. Pure: it is told results and gives pauses.
//!
//! ```text
//!              passed                   `fall` failed in a row
//! Unknown ───────────────► Up ─────────────────────────────────► Down
//!    │                      ▲                                     │
//!    │ failed               └─────────────────────────────────────┘
//!    └──────────────────────────────────► Down      `rise` passed in a row
//! ```
//!
//! The first result counts alone: before it, only the resource itself speaks for it. A result that contradicts the state is followed
//! by the fast interval, until there are enough in a row or they stop.

use std::time::Duration;

/// When to check, and how many results in a row change the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// From the beginning of a check to that of the next.
    pub interval: Duration,
    /// The same while results contradict the state.
    pub fast_interval: Duration,
    /// Checks that must pass in a row for a resource that is down to be up.
    pub rise: u32,
    /// Checks that must fail in a row for one that is up to be down.
    pub fall: u32,
}

impl Default for Timing {
    fn default() -> Self {
        Self { interval: Duration::from_secs(2), fast_interval: Duration::from_millis(500), rise: 2, fall: 3 }
    }
}

/// A new state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It works.
    Up,
    /// It does not.
    Down,
}

/// What follows from a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The state, if it is another than before.
    pub change: Option<Change>,
    /// From the beginning of this check to that of the next.
    pub pause: Duration,
}

/// The checks of one resource.
#[derive(Debug, Clone)]
pub struct Schedule {
    timing: Timing,
    /// `None`: there was no result yet.
    is_up: Option<bool>,
    passed: bool,
    in_a_row: u32,
    jitter: Jitter,
}

impl Schedule {
    /// Of a resource of which nothing is known; it is due now. The seed should be another for each.
    pub fn new(timing: Timing, seed: u64) -> Self {
        Self { timing, is_up: None, passed: false, in_a_row: 0, jitter: Jitter::new(seed) }
    }

    /// Takes a result.
    pub fn record(&mut self, passed: bool) -> Step {
        self.in_a_row = if passed == self.passed { self.in_a_row.saturating_add(1) } else { 1 };
        self.passed = passed;
        let needed = match self.is_up {
            None => 1,
            Some(_) if passed => self.timing.rise,
            Some(_) => self.timing.fall,
        };
        let contradicts = self.is_up != Some(passed);
        let change = (contradicts && self.in_a_row >= needed).then(|| {
            self.is_up = Some(passed);
            if passed { Change::Up } else { Change::Down }
        });
        let is_sure = !contradicts || change.is_some();
        let pause = if is_sure { self.timing.interval } else { self.timing.fast_interval };
        Step { change, pause: self.jitter.about(pause) }
    }

    /// Whether it is up; `None`: there was no result yet.
    pub fn is_up(&self) -> Option<bool> {
        self.is_up
    }

    /// How many results like the newest came in a row.
    pub fn in_a_row(&self) -> u32 {
        self.in_a_row
    }

    /// A pause that ends the wait for a late answer: the next check is worth making at once, and not by all at the same moment.
    pub fn soon(&mut self) -> Duration {
        self.jitter.about(self.timing.fast_interval / 10)
    }
}

/// Numbers for pauses: those that began together do not come back together. An LCG (Knuth's MMIX); not for secrets.
#[derive(Debug, Clone)]
pub struct Jitter(u64);

impl Jitter {
    /// Each seed has its own numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // The upper bits are the better ones.
        self.0 >> 11
    }

    /// 0 to 1.
    pub fn part(&mut self) -> f64 {
        self.draw() as f64 / (1_u64 << 53) as f64
    }

    /// Within a tenth of `pause`.
    pub fn about(&mut self, pause: Duration) -> Duration {
        pause.mul_f64(0.9 + self.part() / 5.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TIMING: Timing =
        Timing { interval: Duration::from_secs(10), fast_interval: Duration::from_secs(1), rise: 2, fall: 3 };

    fn changes(results: &[bool]) -> Vec<(usize, Change)> {
        let mut schedule = Schedule::new(TIMING, 1);
        let step = |(place, passed): (usize, &bool)| Some((place, schedule.record(*passed).change?));
        results.iter().enumerate().filter_map(step).collect()
    }

    #[test]
    fn rise_and_fall() {
        use Change::{Down, Up};
        assert_eq!(changes(&[true, false, false, true, false, false, false]), [(0, Up), (6, Down)]);
        assert_eq!(changes(&[false, true, false, true, true, true]), [(0, Down), (4, Up)]);
    }

    #[test]
    fn the_fast_interval_follows_what_contradicts() {
        let mut schedule = Schedule::new(TIMING, 7);
        let is_fast = |step: Step| step.pause < Duration::from_secs(2);
        assert!(!is_fast(schedule.record(true)));
        assert!(is_fast(schedule.record(false)));
        assert!(is_fast(schedule.record(false)));
        assert!(!is_fast(schedule.record(true)), "it is as it was");
        for fast in [true, true, false, false] {
            assert_eq!(is_fast(schedule.record(false)), fast);
        }
        assert!(is_fast(schedule.record(true)) && !is_fast(schedule.record(true)));
        assert_eq!(schedule.in_a_row(), 2);
        assert!(schedule.soon() <= Duration::from_millis(110));
    }

    proptest! {
        #[test]
        fn pauses_are_about_what_was_asked_for(seed: u64, results in prop::collection::vec(any::<bool>(), 1..50)) {
            let mut schedule = Schedule::new(TIMING, seed);
            for passed in results {
                let pause = schedule.record(passed).pause.as_secs_f64();
                prop_assert!((0.9..=1.1).contains(&pause) || (9.0..=11.0).contains(&pause), "{pause}");
            }
        }

        #[test]
        fn the_state_is_that_of_the_last_long_enough_run(results in prop::collection::vec(any::<bool>(), 1..60)) {
            // A model too simple to be wrong: look back over all results each time.
            let mut schedule = Schedule::new(TIMING, 3);
            let mut up = None;
            for end in 1..=results.len() {
                schedule.record(results[end - 1]);
                let last = results[end - 1];
                let run = results[..end].iter().rev().take_while(|passed| **passed == last).count();
                let needed = match up { None => 1, Some(_) if last => 2, Some(_) => 3 };
                if up != Some(last) && run >= needed {
                    up = Some(last);
                }
                prop_assert_eq!(schedule.is_up(), up);
            }
        }
    }
}
