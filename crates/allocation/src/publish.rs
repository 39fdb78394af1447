//! One writer swaps a table in; readers see it at their next look.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use crate::AllocationTable;

/// The writing end of one pool's table. Cloning gives another handle to the same pool.
#[derive(Debug, Clone)]
pub struct Publisher {
    shared: Arc<ArcSwap<AllocationTable>>,
    told: Arc<Told>,
}

/// Who is told of a new table.
#[derive(Default)]
struct Told(Mutex<Vec<Box<dyn Fn() + Send + Sync>>>);

impl Publisher {
    /// A pool that starts with this table.
    pub fn new(table: AllocationTable) -> Self {
        Self { shared: Arc::new(ArcSwap::from_pointee(table)), told: Arc::default() }
    }

    /// Swaps the table in: one atomic store, no reader waits.
    pub fn publish(&self, table: AllocationTable) {
        self.shared.store(Arc::new(table));
        self.told.0.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|tell| tell());
    }

    /// Calls `tell` after each table that is published from now on, on the publishing thread: it must be short. For who sleeps
    /// until there is a new table; who looks at tables as flows come needs none.
    pub fn on_publish(&self, tell: impl Fn() + Send + Sync + 'static) {
        self.told.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(tell));
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

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Told")
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
        let told = Arc::new(Mutex::new(Vec::new()));
        let (seen, same) = (Arc::clone(&told), publisher.clone());
        publisher.on_publish(move || seen.lock().unwrap().push(same.current().generation()));
        publisher.clone().publish(table(2));
        assert_eq!(*told.lock().unwrap(), [2], "told of it once it is there");
        assert_eq!(reader.read().generation(), 2);
        assert_eq!(publisher.current().generation(), 2);
    }
}
