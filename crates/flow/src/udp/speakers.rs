//! For whom a proxy speaks, where it says so with the first datagram alone.
//!
//! Such a proxy has a socket for each of its clients: what comes from there without a header is of the client that was named
//! last. This is kept apart from flows, because a flow may end (its backend refused, all was answered) while its client goes on.

use std::collections::HashMap;
use std::time::Duration;

use allocation::Timestamp;

use super::tuple::{Keyed, Tuple};

/// What was said from each address and port, at most so many. Nothing is forgotten while it is used at least once in `keep`;
/// what is not used for twice as long is.
#[derive(Debug)]
pub struct Speakers<T> {
    /// Used since `turned`.
    young: HashMap<Tuple, T, Keyed>,
    /// Used in the `keep` before it.
    old: HashMap<Tuple, T, Keyed>,
    turned: Timestamp,
    keep: Duration,
    speakers_max: usize,
}

impl<T: Clone> Speakers<T> {
    /// None yet; `seed` keys their hash.
    pub fn new(now: Timestamp, seed: u64, keep: Duration, speakers_max: usize) -> Self {
        let empty = || HashMap::with_hasher(Keyed::new(seed));
        Self { young: empty(), old: empty(), turned: now, keep, speakers_max }
    }

    /// How many are known.
    pub fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `said` is what holds from there from now on. False at the bound: it is not kept.
    pub fn say(&mut self, from: Tuple, said: T, now: Timestamp) -> bool {
        self.turn(now);
        self.old.remove(&from);
        if self.len() >= self.speakers_max && !self.young.contains_key(&from) {
            return false;
        }
        self.young.insert(from, said);
        true
    }

    /// What was said from there last, if it is not forgotten.
    pub fn said(&mut self, from: &Tuple, now: Timestamp) -> Option<T> {
        self.turn(now);
        if let Some(said) = self.young.get(from) {
            return Some(said.clone());
        }
        let said = self.old.remove(from)?;
        self.young.insert(*from, said.clone());
        Some(said)
    }

    /// Forgets what was not used, a whole stretch of time at once: nobody needs a timer.
    fn turn(&mut self, now: Timestamp) {
        let since = now.since(self.turned);
        if since < self.keep {
            return;
        }
        self.turned = now;
        std::mem::swap(&mut self.young, &mut self.old);
        self.young.clear();
        if since >= self.keep.saturating_mul(2) {
            self.old.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(port: u16) -> Tuple {
        Tuple::new(0, ([10, 0, 0, 1], port).into(), None)
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    #[test]
    fn the_last_word_counts_until_nobody_uses_it() {
        let mut speakers = Speakers::new(at(0), 1, Duration::from_secs(10), 100);
        assert_eq!(speakers.said(&from(1), at(0)), None);
        assert!(speakers.say(from(1), "a", at(0)) && speakers.say(from(2), "b", at(0)));
        assert!(speakers.say(from(1), "c", at(9)));
        for now in [9, 18, 27, 36] {
            assert_eq!(speakers.said(&from(1), at(now)), Some("c"), "after {now} seconds");
        }
        assert_eq!(speakers.said(&from(2), at(36)), None, "it was silent");
        assert_eq!(speakers.said(&from(1), at(57)), None, "for twice as long");
        assert!(speakers.is_empty());
    }

    #[test]
    fn they_are_bounded() {
        let mut speakers = Speakers::new(at(0), 1, Duration::from_secs(10), 2);
        assert!(speakers.say(from(1), 1, at(0)) && speakers.say(from(2), 2, at(0)));
        assert!(!speakers.say(from(3), 3, at(11)), "those before are still known");
        assert!(speakers.say(from(2), 4, at(11)), "a known one may say something else");
        assert_eq!((speakers.said(&from(2), at(11)), speakers.len()), (Some(4), 2));
        assert!(speakers.say(from(3), 3, at(22)), "and then they are not");
        assert_eq!(speakers.said(&from(1), at(22)), None);
    }
}
