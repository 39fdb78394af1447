//! Answers to probes, and the choice among them: the policy `prequal`.
//!
//! ```text
//! control: wanted(flows, now) -> so many probes to random resources -> answer(…)      dataplane: choose(…)
//! ```
//!
//! The rule is that of Prequal (B. Wydrowski et al., NSDI'24, arXiv 2312.10172): a small pool of the newest answers; *cold* are
//! those whose requests in flight are at most the [`ProbeKnobs::quantile`] of all in the pool; the cold one of least latency
//! is taken, or, if none is cold, the one of fewest requests in flight. An answer counts one request more each time it is
//! used, is used up after a few, and ages. It must be fed by probes for single flows, not by periodic reports: on those it
//! herds.
//!
//! Ours beside the paper's: an answer takes the place of the former one about the same backend. Of few backends, answers come
//! in bursts; a burst of one backend's would otherwise drive out all that is known of the others.

use std::sync::Mutex;
use std::time::Duration;

use crate::select::Random;
use crate::{BackendIndex, Timestamp};

/// Knobs of Prequal, under the paper's names and defaults, but for the quantile: 0.6 instead of 0.84, which herds onto few
/// backends under high load (prequal-rs found it, and so did our simulation).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProbeKnobs {
    /// `m`: most answers kept.
    pub pool_size: usize,
    /// Age from which an answer is dropped.
    pub age_max: Duration,
    /// `r_probe`: probes for each new flow.
    pub per_flow: f64,
    /// `r_remove`: answers dropped for each new flow, in turn the oldest and the worst.
    pub remove_per_flow: f64,
    /// `delta`: how much faster answers come than they are used up.
    pub delta: f64,
    /// `Q_RIF`: up to this quantile of requests in flight an answer is cold.
    pub quantile: f64,
}

impl Default for ProbeKnobs {
    fn default() -> Self {
        Self {
            pool_size: 16,
            age_max: Duration::from_secs(1),
            per_flow: 3.0,
            remove_per_flow: 1.0,
            delta: 1.0,
            quantile: 0.6,
        }
    }
}

/// With fewer answers than this there is nothing to choose among.
const OCCUPANCY_MIN: usize = 2;
/// A pool that nobody uses is kept filled with one probe in this time, so that the first flow finds answers.
const IDLE_GAP: Duration = Duration::from_millis(100);
/// Most probes asked for at once: a flood of flows must not become a flood of probes.
const WANTED_MAX: usize = 64;

#[derive(Debug, Clone, Copy)]
struct Answer {
    index: BackendIndex,
    /// Requests in flight, and those that were added by its own use.
    in_flight: u32,
    latency_micros: u32,
    at: Timestamp,
    uses: u32,
    uses_max: u32,
}

/// The pool of answers of one allocation table's members.
#[derive(Debug)]
pub struct ProbePool {
    knobs: ProbeKnobs,
    /// Of the members that indexes mean; answers about others are dropped.
    epoch: u64,
    backends: usize,
    answers: Vec<Answer>,
    random: Random,
    /// Parts of a probe and of a removal that are owed.
    probes_owed: f64,
    removals_owed: f64,
    remove_oldest: bool,
    probed_at: Timestamp,
}

impl ProbePool {
    /// An empty pool.
    pub fn new(knobs: ProbeKnobs, seed: u64) -> Self {
        Self {
            knobs,
            epoch: 0,
            backends: 0,
            answers: Vec::with_capacity(knobs.pool_size),
            random: Random::new(seed),
            probes_owed: 0.0,
            removals_owed: 0.0,
            remove_oldest: true,
            probed_at: Timestamp::ZERO,
        }
    }

    /// Says that indexes are of other members from now on. Answers about the old ones go.
    pub fn renumber(&mut self, epoch: u64, backends: usize) {
        if self.epoch != epoch {
            (self.epoch, self.backends) = (epoch, backends);
            self.answers.clear();
        }
    }

    /// How many probes to send now, when so many flows were selected since the last call.
    pub fn wanted(&mut self, flows: u64, now: Timestamp) -> usize {
        self.probes_owed += flows as f64 * self.knobs.per_flow;
        if self.probes_owed < 1.0 && now >= self.probed_at + IDLE_GAP {
            self.probes_owed = 1.0;
        }
        let wanted = (self.probes_owed as usize).min(WANTED_MAX);
        // What is beyond the bound is not owed for later: the pool is full long before.
        self.probes_owed = if wanted == WANTED_MAX { 0.0 } else { self.probes_owed - wanted as f64 };
        if wanted > 0 {
            self.probed_at = now;
        }
        wanted
    }

    /// Takes an answer in. `epoch` is that of the members that `index` is of.
    pub fn answer(
        &mut self,
        epoch: u64,
        index: BackendIndex,
        in_flight: u32,
        latency_micros: u32,
        now: Timestamp,
    ) {
        if epoch != self.epoch {
            return;
        }
        let uses_max = self.uses_max();
        let answer = Answer { index, in_flight, latency_micros, at: now, uses: 0, uses_max };
        if let Some(former) = self.answers.iter_mut().find(|former| former.index == index) {
            *former = answer;
            return;
        }
        if self.answers.len() >= self.knobs.pool_size
            && let Some(oldest) = self.oldest()
        {
            self.answers.swap_remove(oldest);
        }
        self.answers.push(answer);
    }

    /// The backend for one flow, and what its answer said (requests in flight, latency in microseconds); `None`: there are too
    /// few usable answers.
    pub fn choose(
        &mut self,
        epoch: u64,
        now: Timestamp,
        mut usable: impl FnMut(BackendIndex) -> bool,
    ) -> Option<(BackendIndex, u32, u32)> {
        if epoch != self.epoch {
            return None;
        }
        let age_max = self.knobs.age_max;
        self.answers.retain(|a| a.uses < a.uses_max && now.since(a.at) <= age_max);
        // Others stay: they serve flows that require something else, or fall to another side of a split.
        let usable: Vec<Answer> = self.answers.iter().copied().filter(|a| usable(a.index)).collect();
        if usable.len() < OCCUPANCY_MIN {
            return None;
        }
        let threshold = self.threshold(&usable);
        let cold = |a: &&Answer| a.in_flight <= threshold;
        let best = usable.iter().filter(cold).min_by_key(|a| (a.latency_micros, a.in_flight));
        let best = *best.or_else(|| usable.iter().min_by_key(|a| a.in_flight))?;
        if let Some(answer) = self.answers.iter_mut().find(|answer| answer.index == best.index) {
            answer.in_flight = answer.in_flight.saturating_add(1);
            answer.uses = answer.uses.saturating_add(1);
        }
        self.remove();
        Some((best.index, best.in_flight, best.latency_micros))
    }

    /// Answers that could be used now.
    pub fn occupancy(&self) -> usize {
        self.answers.len()
    }

    /// Requests in flight up to which an answer is cold.
    fn threshold(&self, answers: &[Answer]) -> u32 {
        let mut all: Vec<u32> = answers.iter().map(|a| a.in_flight).collect();
        all.sort_unstable();
        let place = (self.knobs.quantile.clamp(0.0, 1.0) * (all.len() - 1) as f64) as usize;
        all[place]
    }

    fn oldest(&self) -> Option<usize> {
        (0..self.answers.len()).min_by_key(|place| self.answers[*place].at)
    }

    /// Hot with the most in flight, else cold with the most latency.
    fn worst(&self) -> Option<usize> {
        if self.answers.is_empty() {
            return None;
        }
        let threshold = self.threshold(&self.answers);
        let key = |place: &usize| {
            let answer = &self.answers[*place];
            let hot = answer.in_flight > threshold;
            (hot, if hot { answer.in_flight } else { answer.latency_micros })
        };
        (0..self.answers.len()).max_by_key(key)
    }

    fn remove(&mut self) {
        self.removals_owed += self.knobs.remove_per_flow;
        while self.removals_owed >= 1.0 {
            self.removals_owed -= 1.0;
            if self.answers.len() <= self.knobs.pool_size / 2 {
                // New answers are late: those that are left are better than none.
                return;
            }
            let place = if self.remove_oldest { self.oldest() } else { self.worst() };
            self.remove_oldest = !self.remove_oldest;
            let Some(place) = place else { return };
            self.answers.swap_remove(place);
        }
    }

    /// The paper's `b_reuse`, its fraction rounded at random.
    fn uses_max(&mut self) -> u32 {
        let ProbeKnobs { pool_size, per_flow, remove_per_flow, delta, .. } = self.knobs;
        if self.backends <= pool_size / 2 {
            // All are known all the time. Late answers must not make those that are used the unknown ones: they count their
            // own uses, and age.
            return u32::MAX;
        }
        let fresh =
            (1.0 - pool_size as f64 / self.backends.max(1) as f64).max(0.0) * per_flow - remove_per_flow;
        let uses = if fresh > 0.0 { ((1.0 + delta) / fresh).clamp(1.0, 32.0) } else { 32.0 };
        let whole = uses as u32;
        whole + u32::from(f64::from(self.random.unit()) < uses - f64::from(whole))
    }
}

/// A pool that control fills and all workers use. A worker that finds it locked takes another way for that one flow: nobody waits.
pub type SharedProbePool = Mutex<ProbePool>;

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(knobs: ProbeKnobs) -> ProbePool {
        let mut pool = ProbePool::new(knobs, 1);
        pool.renumber(1, 100);
        pool
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn the_fastest_of_the_cold_is_chosen() {
        let mut pool = pool(ProbeKnobs { remove_per_flow: 0.0, ..ProbeKnobs::default() });
        for (index, in_flight, latency) in [(0, 1, 900), (1, 2, 300), (2, 3, 500), (3, 50, 10)] {
            pool.answer(1, BackendIndex(index), in_flight, latency, at(0));
        }
        // The quantile of 1, 2, 3 and 50 is 2: the fast one with 50 is hot.
        assert_eq!(pool.choose(1, at(1), |_| true), Some((BackendIndex(1), 2, 300)));
        let none_but = |wanted: u32| move |index: BackendIndex| index.0 == wanted;
        assert_eq!(pool.choose(1, at(1), none_but(3)), None, "one answer is no choice");
    }

    #[test]
    fn what_one_flow_may_not_use_another_may() {
        let mut pool = ProbePool::new(ProbeKnobs { remove_per_flow: 0.0, ..ProbeKnobs::default() }, 1);
        pool.renumber(1, 4);
        // Two sides of a split: 0 and 1, 2 and 3.
        for (index, in_flight) in [(0, 500), (1, 1), (2, 1), (3, 500)] {
            pool.answer(1, BackendIndex(index), in_flight, 10, at(0));
        }
        let mut chosen = |side: u32| pool.choose(1, at(1), |index| index.0 / 2 == side).map(|c| c.0.0);
        for flow in 0..10 {
            assert_eq!((chosen(0), chosen(1)), (Some(1), Some(2)), "flow {flow}");
        }
    }

    /// Of few as of more backends than answers are kept of.
    #[test]
    fn answers_outlast_a_burst_that_probes_cannot_keep_up_with() {
        for backends in [3, 24] {
            let mut pool = ProbePool::new(ProbeKnobs::default(), 1);
            pool.renumber(1, backends);
            for n in 0..backends.max(16) {
                let index = (n % backends) as u32;
                pool.answer(1, BackendIndex(index), if index.is_multiple_of(3) { 500 } else { 1 }, 10, at(0));
            }
            let chosen: Vec<u32> =
                (0..200).filter_map(|_| Some(pool.choose(1, at(5), |_| true)?.0.0)).collect();
            assert!(chosen.len() == 200 && pool.occupancy() >= 2, "{} left", pool.occupancy());
            assert!(chosen.iter().all(|index| index % 3 != 0), "{chosen:?}");
        }
    }

    #[test]
    fn many_answers_of_one_leave_what_is_known_of_the_others() {
        let mut pool = ProbePool::new(ProbeKnobs::default(), 1);
        pool.renumber(1, 4);
        (0..4).for_each(|index| {
            pool.answer(1, BackendIndex(index), if index == 3 { 500 } else { 1 }, 10, at(0))
        });
        (0..64).for_each(|_| pool.answer(1, BackendIndex(3), 400, 10, at(5)));
        assert_eq!(pool.occupancy(), 4);
        let side = |index: BackendIndex| index.0 >= 2;
        for _ in 0..50 {
            assert_eq!(pool.choose(1, at(6), side).map(|chosen| chosen.0), Some(BackendIndex(2)));
        }
    }

    #[test]
    fn answers_are_used_up_and_age() {
        let mut pool = pool(ProbeKnobs { per_flow: 100.0, remove_per_flow: 0.0, ..ProbeKnobs::default() });
        (0..2).for_each(|index| pool.answer(1, BackendIndex(index), 0, 10 + index, at(0)));
        assert_eq!(pool.choose(1, at(10), |_| true).map(|chosen| chosen.0), Some(BackendIndex(0)));
        assert_eq!(
            pool.choose(1, at(10), |_| true),
            None,
            "its one use is over, and one answer is no choice"
        );
        (0..2).for_each(|index| pool.answer(1, BackendIndex(index), 0, 10, at(20)));
        assert!(pool.choose(1, at(1_021), |_| true).is_none(), "older than a second");
    }

    #[test]
    fn answers_about_former_members_are_dropped() {
        let mut pool = pool(ProbeKnobs::default());
        (0..4).for_each(|index| pool.answer(1, BackendIndex(index), 0, 10, at(0)));
        pool.renumber(2, 3);
        assert_eq!(pool.occupancy(), 0);
        pool.answer(1, BackendIndex(3), 0, 10, at(0));
        assert_eq!((pool.occupancy(), pool.choose(1, at(0), |_| true)), (0, None));
    }

    #[test]
    fn probes_follow_flows_within_a_bound() {
        let mut pool = pool(ProbeKnobs::default());
        assert_eq!(pool.wanted(0, at(100)), 1, "kept warm");
        assert_eq!(pool.wanted(0, at(150)), 0);
        assert_eq!(pool.wanted(5, at(150)), 15);
        assert_eq!(pool.wanted(1_000_000, at(151)), WANTED_MAX);
        assert_eq!(pool.wanted(0, at(152)), 0, "the flood is not owed for later");
        for n in 0..1_000_u32 {
            pool.answer(1, BackendIndex(n % 100), n, n, at(200));
        }
        assert_eq!(pool.occupancy(), 16);
    }
}
