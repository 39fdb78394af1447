//! Which resource a client was given last: a table of fixed size that all workers share.
//!
//! ```text
//! client --hash, seeded--> a set of 8 entries: (resource, second of its last flow), checked against the client's number
//! ```
//!
//! An entry is two words that are read and written without a lock. What two writers leave of each other fits no client, because
//! one word is the client's number mixed with the other (after Hyatt and Mann, "A lock-less transposition table", ICGA 2002):
//! then an entry is lost, and its client is selected for once more. Where a set is full, the entry that was not used for longest
//! goes: with more clients than entries, those that come seldom are not kept.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::key::{mix, stable_hash};
use crate::{Client, ResourceId, Timestamp};

/// 65,536 clients in 1 MiB.
const SETS: usize = 8_192;
const WAYS: usize = 8;
/// Bits of a value that are its second: eight years. The others are the resource's.
const SECOND_BITS: u32 = 28;
const SECONDS: u64 = (1 << SECOND_BITS) - 1;

/// A resource by its id, whatever table or registration it is in. Two of a pool of 10,000 have the same with a probability of
/// 0.1 %; then the clients of one are taken for the other's at their next flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceTag(u64);

impl ResourceTag {
    /// The tag of a resource, the same in every process.
    pub fn of(id: &ResourceId) -> Self {
        Self((stable_hash(id.as_str().as_bytes(), 0) >> SECOND_BITS).max(1))
    }
}

/// What affinity had to do with a selection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// The client was given the resource it had.
    Same,
    /// It had another, which could not be used, had no room or too much load.
    Moved,
    /// It was not known, or not any more.
    New,
}

impl Kept {
    /// All of them, in metric order.
    pub const ALL: [Self; 3] = [Self::Same, Self::Moved, Self::New];

    /// Its metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Same => "kept",
            Self::Moved => "moved",
            Self::New => "new",
        }
    }
}

/// The clients of one pool and their resources.
#[derive(Debug)]
pub struct Affinity {
    keeps_seconds: u64,
    seed: u64,
    sets: Box<[Set]>,
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Set([Entry; WAYS]);

#[derive(Debug, Default)]
struct Entry {
    /// A resource and the second of the client's last flow; 0: nobody's.
    value: AtomicU64,
    check: AtomicU64,
}

impl Affinity {
    /// Keeps a client's resource for so long after its last flow began, in whole seconds. The seed keeps others from choosing
    /// addresses that meet in one set.
    pub fn new(keeps: Duration, seed: u64) -> Self {
        Self::with_sets(keeps, seed, SETS)
    }

    fn with_sets(keeps: Duration, seed: u64, sets: usize) -> Self {
        let keeps_seconds = keeps.as_secs().min(SECONDS / 2);
        Self { keeps_seconds, seed, sets: (0..sets).map(|_| Set::default()).collect() }
    }

    /// The resource that the client was given last, if that is not too long ago.
    pub fn resource_of(&self, client: Client, now: Timestamp) -> Option<ResourceTag> {
        let values = self.set(client).iter().map(|entry| entry.value_for(client));
        let value = values.into_iter().find(|value| *value != 0)?;
        (!self.is_over(value, second(now))).then_some(ResourceTag(value >> SECOND_BITS))
    }

    /// The client is given this resource.
    pub fn keep(&self, client: Client, resource: ResourceTag, now: Timestamp) {
        let now = second(now);
        let value = resource.0 << SECOND_BITS | now;
        let set = self.set(client);
        if let Some(entry) = set.iter().find(|entry| entry.value_for(client) != 0) {
            // At most one write a second of a client that stays: the line is read by all workers.
            if entry.value.load(Relaxed) != value {
                entry.write(client, value);
            }
            return;
        }
        // Nobody's is older than any other.
        let age = |entry: &&Entry| match entry.value.load(Relaxed) {
            0 => u64::MAX,
            value => now.saturating_sub(value & SECONDS),
        };
        if let Some(entry) = set.iter().max_by_key(age) {
            entry.write(client, value);
        }
    }

    fn is_over(&self, value: u64, now: u64) -> bool {
        now.saturating_sub(value & SECONDS) > self.keeps_seconds
    }

    fn set(&self, client: Client) -> &[Entry; WAYS] {
        &self.sets[(client.spread(self.seed) % self.sets.len() as u64) as usize].0
    }
}

impl Entry {
    /// Its value, if it is this client's; else 0.
    fn value_for(&self, client: Client) -> u64 {
        let value = self.value.load(Relaxed);
        let is_its = value != 0 && self.check.load(Relaxed) == client.number() ^ mix(value);
        if is_its { value } else { 0 }
    }

    fn write(&self, client: Client, value: u64) {
        self.check.store(client.number() ^ mix(value), Relaxed);
        self.value.store(value, Relaxed);
    }
}

fn second(now: Timestamp) -> u64 {
    (now.as_millis() / 1_000).min(SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn client(n: u32) -> Client {
        Client::at(std::net::IpAddr::from(n.to_be_bytes()))
    }

    fn tag(n: u32) -> ResourceTag {
        ResourceTag::of(&format!("r{n}").parse().unwrap())
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    proptest! {
        /// While all fit, it is a map whose entries end; when they do not, it forgets and never invents.
        #[test]
        fn it_is_a_map_that_forgets(
            seed: u64,
            clients in 1_u32..20,
            steps in prop::collection::vec((0_u32..20, 0_u32..5, 0_u64..8), 1..300),
        ) {
            let affinity = Affinity::with_sets(Duration::from_secs(20), seed, 1);
            let mut map: HashMap<u32, (u32, u64)> = HashMap::new();
            let mut now = 0;
            for (n, resource, passes) in steps {
                now += passes;
                let n = n % clients;
                let known = map.get(&n).filter(|(_, last)| now - last <= 20).map(|(resource, _)| tag(*resource));
                let got = affinity.resource_of(client(n), at(now));
                if clients <= WAYS as u32 {
                    prop_assert_eq!(got, known);
                } else {
                    prop_assert!(got.is_none() || got == known);
                }
                affinity.keep(client(n), tag(resource), at(now));
                map.insert(n, (resource, now));
                prop_assert_eq!(affinity.resource_of(client(n), at(now)), Some(tag(resource)));
            }
        }
    }

    #[test]
    fn whoever_was_away_longest_makes_room() {
        let affinity = Affinity::with_sets(Duration::from_secs(1_000), 1, 1);
        (0..8).for_each(|n| affinity.keep(client(n), tag(n), at(u64::from(n))));
        affinity.keep(client(0), tag(0), at(8));
        affinity.keep(client(9), tag(9), at(9));
        let known = |n| affinity.resource_of(client(n), at(9)).is_some();
        assert_eq!((known(0), known(1), known(2), known(9)), (true, false, true, true));
    }

    #[test]
    fn workers_that_write_at_once_never_mix_clients_up() {
        let affinity = Affinity::with_sets(Duration::from_secs(1_000), 1, 1);
        std::thread::scope(|scope| {
            for thread in 0..4_u32 {
                let affinity = &affinity;
                scope.spawn(move || {
                    for n in 0..50_000_u32 {
                        let who = n.wrapping_mul(7 + thread) % 11;
                        if let Some(found) = affinity.resource_of(client(who), at(1)) {
                            assert_eq!(found, tag(who), "another client's resource");
                        }
                        affinity.keep(client(who), tag(who), at(1));
                    }
                });
            }
        });
    }
}
