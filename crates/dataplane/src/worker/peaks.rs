//! Buffers that a peak needed are given back when it is over.
//!
//! Besides the memory, fewer buffers are warmer: the kernel takes them in turn.

use std::time::Duration;

use allocation::Timestamp;
use uring::{EnterError, Group};

use super::{BUFFERS_MORE, SHARED_AT_START, Worker, udp};
use crate::io::Io;

/// How long a peak is remembered.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// When to look at it next.
#[derive(Debug, Default)]
pub(super) struct Peaks {
    look_at: Option<Timestamp>,
}

impl Peaks {
    /// When the worker must be awake for it; never while there are few buffers.
    pub(super) fn next_wake(&self) -> Option<Timestamp> {
        self.look_at
    }
}

/// So many buffers are never too many.
fn always(group: Group) -> u32 {
    match group {
        Group::Shared => SHARED_AT_START,
        Group::First => BUFFERS_MORE,
        Group::Datagrams => udp::DATAGRAMS_AT_START,
    }
}

/// How many are enough where so many were held at once: twice as many, for what is received while they are sent.
fn enough(most_held: u32, always: u32) -> u32 {
    most_held.saturating_mul(2).next_power_of_two().max(always)
}

impl<I: Io> Worker<I> {
    pub(super) fn give_back_buffers(&mut self) -> Result<(), EnterError> {
        let now = self.now.timestamp();
        if self.peaks.look_at.is_some_and(|at| at > now) {
            return Ok(());
        }
        let due = self.peaks.look_at.take().is_some();
        for group in Group::ALL {
            if self.ring.buffers(group) <= always(group) {
                continue;
            }
            self.peaks.look_at = Some(now + LOOK_EVERY);
            let enough = enough(self.ring.most_held(group), always(group));
            if due && enough < self.ring.buffers(group) {
                self.ring.shrink(group, enough)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enough_is_twice_what_was_needed_and_never_less_than_always() {
        assert_eq!([0, 3, 32, 33, 200].map(|held| enough(held, 64)), [64, 64, 64, 128, 512]);
    }
}
