//! Control's only look at the monotonic clock.

use std::time::{Duration, Instant};

use allocation::Timestamp;

/// The process's monotonic clock, seen from its origin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    origin: Instant,
}

impl Clock {
    pub(crate) fn new(origin: Instant) -> Self {
        Self { origin }
    }

    pub(crate) fn now(self) -> Timestamp {
        Timestamp::ZERO + self.origin.elapsed()
    }

    /// When `timestamp` is, for a timer; `None`: never.
    pub(crate) fn instant(self, timestamp: Timestamp) -> Option<Instant> {
        self.origin.checked_add(Duration::from_millis(timestamp.as_millis()))
    }
}
