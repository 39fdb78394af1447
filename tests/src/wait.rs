//! Waiting for a condition, with a deadline.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long to wait for what has no time of its own to keep. Long: the machine may be busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Waits until `look` gives a value, and gives it.
///
/// # Panics
/// When it does not within [`PATIENCE`].
#[track_caller]
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    within(PATIENCE, what, look).0
}

/// Waits until `look` gives a value; gives it and how long that took.
///
/// # Panics
/// When it does not within `limit`.
#[track_caller]
pub fn within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> (T, Duration) {
    let start = Instant::now();
    loop {
        if let Some(value) = look() {
            return (value, start.elapsed());
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        sleep(LOOK_EVERY);
    }
}
