//! Control's only look at the clocks: the monotonic one, and once, at start, the one on the wall.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use allocation::Timestamp;

/// The process's monotonic clock, seen from its origin.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    origin: Instant,
    /// When the origin was, since 1970. Looked at once: a clock that is set while the process runs moves nothing in it.
    began: Duration,
}

impl Clock {
    pub(crate) fn new(origin: Instant) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { origin, began: since_1970.saturating_sub(origin.elapsed()) }
    }

    pub(crate) fn now(self) -> Timestamp {
        Timestamp::ZERO + self.origin.elapsed()
    }

    /// When timestamps began, since 1970.
    pub(crate) fn began(self) -> Duration {
        self.began
    }

    /// `timestamp` in milliseconds since 1970.
    pub(crate) fn unix_ms(self, timestamp: Timestamp) -> u64 {
        (timestamp + self.began).as_millis()
    }

    /// When `timestamp` is, for a timer; `None`: never.
    pub(crate) fn instant(self, timestamp: Timestamp) -> Option<Instant> {
        self.origin.checked_add(Duration::from_millis(timestamp.as_millis()))
    }
}
