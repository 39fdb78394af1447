//! One writer swaps a table in; readers see it at their next look.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::AllocationTable;

/// The writing end of one pool's table. Cloning gives another handle to the same pool.
#[derive(Debug, Clone)]
pub struct Publisher {
    shared: Arc<ArcSwap<AllocationTable>>,
}

impl Publisher {
    /// A pool that starts with this table.
    pub fn new(table: AllocationTable) -> Self {
        Self { shared: Arc::new(ArcSwap::from_pointee(table)) }
    }

    /// Swaps the table in: one atomic store, no reader waits.
    pub fn publish(&self, table: AllocationTable) {
        self.shared.store(Arc::new(table));
    }

    /// The table that readers see now.
    pub fn current(&self) -> Arc<AllocationTable> {
        self.shared.load_full()
    }

    /// A reading end for one worker.
    pub fn reader(&self) -> Reader {
        Reader { cache: arc_swap::Cache::new(Arc::clone(&self.shared)) }
    }
}

/// The reading end of one pool's table, one for each worker.
///
/// A reader that sleeps keeps the table it saw last alive until its next [`Reader::read`]; so nothing may hang on a
/// table being dropped.
#[derive(Debug)]
pub struct Reader {
    cache: arc_swap::Cache<Arc<ArcSwap<AllocationTable>>, Arc<AllocationTable>>,
}

impl Clone for Reader {
    fn clone(&self) -> Self {
        Self { cache: self.cache.clone() }
    }
}

impl Reader {
    /// The newest table: one atomic load when nothing changed. Call it once per completion batch and keep the
    /// reference, so that a batch sees one generation.
    pub fn read(&mut self) -> &Arc<AllocationTable> {
        self.cache.load()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Members, Policy};

    #[test]
    fn a_reader_sees_the_newest_generation() {
        let table = |generation| {
            AllocationTable::new(generation, Policy::Adaptive, Arc::new(Members::default()), Vec::new())
        };
        let publisher = Publisher::new(table(1));
        let mut reader = publisher.reader();
        assert_eq!(reader.read().generation(), 1);
        publisher.publish(table(2));
        assert_eq!(reader.read().generation(), 2);
        assert_eq!(publisher.current().generation(), 2);
    }
}
