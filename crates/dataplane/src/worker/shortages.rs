//! Whether a worker has too few buffers that many receives share.
//!
//! Each has its price: with too few, receives find none and have to be made anew, one at a time; with too many, the kernel,
//! which takes them in turn, comes to cold memory each time. So they grow by need and not by a single burst.

/// After so many more batches in which a receive found no buffer than in which all did, there are too few.
const BATCHES_MAX: u8 = 8;

/// Batches that ran short lately.
#[derive(Debug, Default)]
pub(super) struct Shortages {
    /// A receive of this batch found no buffer.
    short: bool,
    /// Batches that ran short, less those that did not, from 0 up.
    lately: u8,
}

impl Shortages {
    /// A receive found no buffer; `free` are by now. Returns whether there must be more.
    ///
    /// Where some are free, sends of the same batch gave them back: that is of no account once, as when many flows begin
    /// together, but what happens batch after batch will go on.
    pub(super) fn found_none(&mut self, free: u32) -> bool {
        let first = !std::mem::replace(&mut self.short, true);
        let grow = free == 0 || (first && self.lately >= BATCHES_MAX);
        if grow {
            self.lately = 0;
        }
        grow
    }

    /// The next batch begins.
    pub(super) fn next_batch(&mut self) {
        self.lately = if std::mem::take(&mut self.short) {
            self.lately.saturating_add(1)
        } else {
            self.lately.saturating_sub(1)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One batch in which `waits` receives find none while others are free; how often buffers grow.
    fn batch(shortages: &mut Shortages, waits: u32) -> usize {
        let grown = (0..waits).filter(|_| shortages.found_none(30)).count();
        shortages.next_batch();
        grown
    }

    #[test]
    fn a_burst_is_no_reason() {
        let mut shortages = Shortages::default();
        assert_eq!(batch(&mut shortages, 500), 0);
        // Every other batch, for ever: as many that had enough.
        assert_eq!((0..1_000).map(|n| batch(&mut shortages, n % 2)).sum::<usize>(), 0);
    }

    #[test]
    fn batch_after_batch_is_one_and_once() {
        let mut shortages = Shortages::default();
        let grown: Vec<usize> = (0..20).map(|_| batch(&mut shortages, 40)).collect();
        assert_eq!(grown.iter().sum::<usize>(), 2, "{grown:?}");
        assert_eq!(grown.iter().position(|grown| *grown == 1), Some(8), "{grown:?}");
    }

    #[test]
    fn none_at_all_is_one_at_once() {
        let mut shortages = Shortages::default();
        assert!(shortages.found_none(0));
        assert!(!shortages.found_none(64), "there are some now");
    }
}
