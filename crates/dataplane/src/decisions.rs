//! The newest selections of one worker, kept for `explain`, and a sample of them for the decision log.
//!
//! A worker never waits here: where control is looking, that one selection is not kept. What is kept is bounded in number
//! and in the tables it keeps alive.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use allocation::Decision;

/// Most selections that are kept.
const KEPT_MAX: usize = 64;
/// Most backends of all the tables that they keep alive, each counted anew: a table takes some 25 bytes for each.
const BACKENDS_MAX: usize = 100_000;
/// Sampled selections that wait for the log, which takes them a few times a second.
const SAMPLED_MAX: usize = 1_024;

#[derive(Debug, Default)]
struct Kept {
    newest: VecDeque<Decision>,
    backends: usize,
    sampled: Vec<Decision>,
    /// Parts of a selection that the sample is owed.
    owed: f64,
}

/// One worker's.
#[derive(Debug)]
pub(crate) struct Decisions {
    kept: Mutex<Kept>,
    sample: f64,
    /// Selections that were not kept because somebody was looking.
    missed: AtomicU64,
    /// Of the sample.
    lost: AtomicU64,
}

impl Decisions {
    /// `sample`: the part of selections that the log gets, 0 to 1.
    pub(crate) fn new(sample: f64) -> Self {
        Self { kept: Mutex::default(), sample, missed: AtomicU64::new(0), lost: AtomicU64::new(0) }
    }

    /// Keeps what `decision` gives, unless somebody is looking right now.
    pub(crate) fn note(&self, decision: impl FnOnce() -> Decision) {
        let Ok(mut kept) = self.kept.try_lock() else {
            self.missed.fetch_add(1, Relaxed);
            return;
        };
        let decision = decision();
        let missed = self.missed.swap(0, Relaxed) as f64 * self.sample;
        if missed > 0.0 {
            // What the sample would have had of them is lost to it.
            let owed = kept.owed + missed;
            self.lost.fetch_add(owed as u64, Relaxed);
            kept.owed = owed.fract();
        }
        kept.owed += self.sample;
        if kept.owed >= 1.0 {
            kept.owed -= 1.0;
            if kept.sampled.len() < SAMPLED_MAX {
                kept.sampled.push(decision.clone());
            } else {
                self.lost.fetch_add(1, Relaxed);
            }
        }
        kept.backends += backends(&decision);
        kept.newest.push_back(decision);
        while kept.newest.len() > 1 && (kept.newest.len() > KEPT_MAX || kept.backends > BACKENDS_MAX) {
            if let Some(oldest) = kept.newest.pop_front() {
                kept.backends -= backends(&oldest);
            }
        }
    }

    /// The newest selections, oldest first.
    pub(crate) fn newest(&self) -> Vec<Decision> {
        let kept = self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        kept.newest.iter().cloned().collect()
    }

    /// The sample since the last call, and how many did not fit.
    pub(crate) fn take_sampled(&self) -> (Vec<Decision>, u64) {
        let mut kept = self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (std::mem::take(&mut kept.sampled), self.lost.swap(0, Relaxed))
    }
}

fn backends(decision: &Decision) -> usize {
    decision.table.weights().len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use allocation::{AllocationTable, LiveFacts, Looks, Members, NoBackend, Policy, Timestamp};
    use std::sync::Arc;

    fn decision(at: u64, backends: usize) -> Decision {
        let backend = |n: usize| allocation::Backend {
            id: format!("b{n}").parse().unwrap(),
            address: ([127, 0, 0, 1], 1).into(),
            flows_max: 0,
            live: Arc::new(LiveFacts::default()),
        };
        let members = Arc::new(Members::new((0..backends).map(backend).collect()));
        let table = AllocationTable::new(1, Policy::Adaptive, members, vec![1.0; backends]);
        Decision {
            at: Timestamp::from_millis(at),
            worker: 0,
            listener: 0,
            target: 0,
            route: 0,
            table: Arc::new(table),
            side: 0,
            chosen: Err(NoBackend::AllFull),
            kept: false,
            tried: 0,
            looks: Looks::none(),
        }
    }

    #[test]
    fn the_newest_are_kept_within_bounds() {
        let decisions = Decisions::new(0.0);
        (0..100).for_each(|at| decisions.note(|| decision(at, 3)));
        let newest = decisions.newest();
        assert_eq!((newest.len(), newest[63].at.as_millis()), (KEPT_MAX, 99));
        (0..3).for_each(|at| decisions.note(|| decision(at, 60_000)));
        assert_eq!(decisions.newest().len(), 1, "large tables are kept for fewer");
        assert!(decisions.take_sampled().0.is_empty());
    }

    #[test]
    fn what_is_missed_while_somebody_looks_is_counted() {
        let decisions = Decisions::new(0.5);
        let looking = decisions.kept.lock().unwrap();
        (0..7).for_each(|at| decisions.note(|| decision(at, 1)));
        drop(looking);
        decisions.note(|| decision(7, 1));
        // Half of eight: three and a half were missed.
        let (sampled, lost) = decisions.take_sampled();
        assert_eq!((sampled.len(), lost, decisions.newest().len()), (1, 3, 1));
    }

    #[test]
    fn the_sample_is_of_its_size_and_bounded() {
        let decisions = Decisions::new(0.25);
        let shared = decision(0, 1);
        (0..8_000).for_each(|_| decisions.note(|| shared.clone()));
        let (sampled, lost) = decisions.take_sampled();
        assert_eq!((sampled.len(), lost), (SAMPLED_MAX, 2_000 - SAMPLED_MAX as u64));
        assert_eq!(decisions.take_sampled().1, 0);
    }
}
