//! What all listeners and workers that serve one pool share: its budget, its queue's length, its clients' resources.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst, fence};
use std::time::Duration;

use allocation::Affinity;
use flow::limits::Budget;

/// Workers that can be told apart: more than any machine has cores.
const WORKERS_MAX: usize = 1_024;
const BITS: usize = u64::BITS as usize;

/// How a pool's flows are limited and kept together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolKnobs {
    /// Flows open at once, over all resources and workers; 0: any number.
    pub flows_max: u32,
    /// Where flows wait when there is no room; `None`: they are reset.
    pub queue: Option<QueueKnobs>,
    /// How long after its last flow began a client is given the same resource again; `None`: it is not.
    pub affinity: Option<Duration>,
}

/// A queue in front of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueKnobs {
    /// Flows that wait at once, over all workers.
    pub length: u32,
    /// How long after it was accepted a flow may still be waiting.
    pub deadline: Duration,
}

/// One pool's. Cloning gives another handle: each target of a pool has one.
#[derive(Debug, Clone)]
pub struct PoolShare(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    knobs: PoolKnobs,
    budget: Budget,
    queued: Budget,
    /// A bit for each worker that has flows waiting.
    waiting: [AtomicU64; WORKERS_MAX / BITS],
    affinity: Option<Affinity>,
}

impl PoolShare {
    /// Nothing is open and nobody waits. `seed` should be a secret: it keeps others from choosing client addresses that are
    /// kept in one place. `None`: there is nothing to share.
    pub fn new(knobs: PoolKnobs, seed: u64) -> Option<Self> {
        if knobs == PoolKnobs::default() {
            return None;
        }
        Some(Self(Arc::new(Inner {
            knobs,
            budget: Budget::new(knobs.flows_max),
            queued: Budget::new(knobs.queue.map_or(0, |queue| queue.length)),
            waiting: std::array::from_fn(|_| AtomicU64::new(0)),
            affinity: knobs.affinity.map(|keeps| Affinity::new(keeps, seed)),
        })))
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Flows open in the pool.
    pub(crate) fn budget(&self) -> &Budget {
        &self.0.budget
    }

    pub(crate) fn queue(&self) -> Option<QueueKnobs> {
        self.0.knobs.queue.filter(|queue| queue.length > 0)
    }

    /// Flows that wait.
    pub(crate) fn queued(&self) -> &Budget {
        &self.0.queued
    }

    pub(crate) fn affinity(&self) -> Option<&Affinity> {
        self.0.affinity.as_ref()
    }

    /// Says that a worker has flows waiting. Whoever says so looks for room once more afterwards: either it finds what was
    /// given back before, or who gives it back finds the worker here.
    pub(crate) fn wait(&self, worker: usize) {
        let worker = worker % WORKERS_MAX;
        self.0.waiting[worker / BITS].fetch_or(1 << (worker % BITS), Relaxed);
        fence(SeqCst);
    }

    /// Says that a worker has none waiting any more.
    pub(crate) fn wait_no_more(&self, worker: usize) {
        let worker = worker % WORKERS_MAX;
        self.0.waiting[worker / BITS].fetch_and(!(1 << (worker % BITS)), Relaxed);
    }

    /// Room was made, or may have been: calls `ring` for each worker that has flows waiting.
    pub(crate) fn room(&self, mut ring: impl FnMut(usize)) {
        fence(SeqCst);
        for (word, bits) in self.0.waiting.iter().enumerate() {
            let mut bits = bits.load(Relaxed);
            while bits != 0 {
                ring(word * BITS + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_told_to_those_who_wait() {
        let queue = Some(QueueKnobs { length: 10, deadline: Duration::from_secs(1) });
        let share = PoolShare::new(PoolKnobs { queue, ..PoolKnobs::default() }, 1).unwrap();
        let waiting = || {
            let mut all = Vec::new();
            share.room(|worker| all.push(worker));
            all
        };
        [0, 63, 64, 200].into_iter().for_each(|worker| share.wait(worker));
        assert_eq!(waiting(), [0, 63, 64, 200]);
        share.wait_no_more(63);
        share.wait(0);
        assert_eq!(waiting(), [0, 64, 200]);
        assert!(PoolShare::new(PoolKnobs::default(), 1).is_none());
    }
}
