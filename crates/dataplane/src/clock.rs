//! The dataplane's only look at the time.

use std::time::Instant;

use allocation::Timestamp;

/// The process's monotonic clock, as seen from one origin by all workers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    origin: Instant,
}

/// One look at the clock, taken once per batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) micros: u64,
}

impl Now {
    pub(crate) fn timestamp(self) -> Timestamp {
        Timestamp::from_millis(self.micros / 1_000)
    }
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { origin: Instant::now() }
    }

    pub(crate) fn origin(self) -> Instant {
        self.origin
    }

    pub(crate) fn now(self) -> Now {
        Now { micros: self.origin.elapsed().as_micros() as u64 }
    }
}
