//! One listener's limits, and one pool's.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::rate::FullAt;
use super::{Rate, Refusal};

/// Flows open and new flows a second of one listener, over all workers.
#[derive(Debug)]
pub struct Meter {
    flows: Budget,
    rate: Rate,
    full_at: FullAt,
}

impl Meter {
    /// At most so many flows open (0: any number), and new ones at this rate.
    pub fn new(flows_max: u32, rate: Rate) -> Self {
        Self { flows: Budget::new(flows_max), rate, full_at: FullAt::default() }
    }

    /// Lets one in, who has a place until [`Meter::close`].
    ///
    /// # Errors
    /// What was reached.
    pub fn open(&self, now_micros: u64) -> Result<(), Refusal> {
        if !self.flows.open() {
            return Err(Refusal::Flows);
        }
        if self.full_at.take(self.rate, now_micros) {
            return Ok(());
        }
        self.flows.close();
        Err(Refusal::Rate)
    }

    /// Gives a place back.
    pub fn close(&self) {
        self.flows.close();
    }
}

/// A count with a bound, shared by all workers.
#[derive(Debug, Default)]
pub struct Budget {
    open: AtomicU32,
    /// 0: none.
    max: u32,
}

impl Budget {
    /// At most so many at once; 0: any number.
    pub const fn new(max: u32) -> Self {
        Self { open: AtomicU32::new(0), max }
    }

    /// Takes a place; `false`: there is none.
    pub fn open(&self) -> bool {
        // Not an addition that is taken back: others would see a place less for a moment, and turn one away for it.
        let more = |open: u32| (self.max == 0 || open < self.max).then_some(open + 1);
        self.open.fetch_update(Relaxed, Relaxed, more).is_ok()
    }

    /// Gives a place back.
    pub fn close(&self) {
        let before = self.open.fetch_sub(1, Relaxed);
        debug_assert!(before > 0, "a place is given back once");
    }

    /// Places taken.
    pub fn taken(&self) -> u32 {
        self.open.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_a_refusal_leaves_no_trace() {
        let meter = Meter::new(3, Rate::per_second(2));
        assert_eq!([meter.open(0), meter.open(0), meter.open(0)], [Ok(()), Ok(()), Err(Refusal::Rate)]);
        assert_eq!(meter.open(500_000), Ok(()));
        assert_eq!(meter.open(5_000_000), Err(Refusal::Flows));
        meter.close();
        assert_eq!([meter.open(5_000_000), meter.open(5_000_000)], [Ok(()), Err(Refusal::Flows)]);
        let open = Meter::new(0, Rate::NONE);
        assert!((0..1_000).all(|_| open.open(0).is_ok()));
    }

    #[test]
    fn workers_together_never_pass_a_limit() {
        let meter = Meter::new(500, Rate::per_second(700));
        let open = || (0..1_000).filter(|_| meter.open(1).is_ok()).count();
        let all: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(all, 500);
        (0..500).for_each(|_| meter.close());
        assert_eq!(meter.flows.taken(), 0);
        assert_eq!((0..1_000).filter(|_| meter.open(1).is_ok()).count(), 200);
    }
}
