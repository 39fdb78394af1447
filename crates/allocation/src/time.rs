//! Time as a value: the cores are handed it, they never ask for it.

use std::ops::Add;
use std::time::Duration;

/// A moment on the process's monotonic clock, in milliseconds since an origin that the process chose at its start.
///
/// Milliseconds in 64 bits rather than `std::time::Instant`: it fits an atomic, a simulation can make one from nothing,
/// and no timer here needs a finer grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The origin.
    pub const ZERO: Self = Self(0);
    /// Later than any moment: a deadline that never comes.
    pub const NEVER: Self = Self(u64::MAX);

    /// The moment `millis` after the origin.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the origin.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero if it is not after it.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adding_saturates_at_never() {
        assert_eq!(Timestamp::from_millis(5) + Duration::MAX, Timestamp::NEVER);
        assert_eq!(Timestamp::from_millis(5) + Duration::from_millis(7), Timestamp::from_millis(12));
    }

    #[test]
    fn since_an_earlier_moment_is_never_negative() {
        assert_eq!(Timestamp::from_millis(5).since(Timestamp::from_millis(9)), Duration::ZERO);
        assert_eq!(Timestamp::from_millis(9).since(Timestamp::from_millis(5)), Duration::from_millis(4));
    }
}
