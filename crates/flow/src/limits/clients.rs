//! Limits for each client, in a table of fixed size.
//!
//! ```text
//! client --hash, seeded--> a set of 7 entries, and one that is shared
//!   its own entry             found: count and bucket are its own
//!   an entry nobody misses    taken over: no flow open on it and its bucket full, so a new one would be the same
//!   neither                   the set's shared entry: all for whom there was no room have one limit together
//! ```
//!
//! That is why no flood of addresses can reset a client's count or bucket: an entry that still says anything is never given
//! away. What a flood from very many addresses can do is fill the table, and then newcomers share. The seed keeps others from
//! choosing addresses that meet in one set.
//!
//! An entry is found by loads alone, and who is turned away writes nothing: a flood from one address costs each worker three
//! cache lines that stay shared. Who is let in writes two words. A lock is taken only to take an entry over, which is once for a
//! client after it was idle; it orders those who take over, nobody else waits for it.

use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::sync::{Mutex, PoisonError};

use allocation::Client;

use super::rate::FullAt;
use super::{Rate, Refusal};

/// Entries of a set that belong to one client each.
const OWN: usize = 7;
/// The place of the one that is shared.
const SHARED: usize = OWN;
/// Sets: with 7 entries each, 57,344 clients in 1.6 MB.
const SETS: usize = 8_192;
/// Locks of those who take entries over.
const LOCKS: usize = 64;

/// An entry's word: how often a flow was opened on it or it was taken over (upper 39 bits), whether it is being taken over, and
/// flows open. It never has the same value twice while the number does not wrap, so a changed entry cannot be mistaken.
const FLOWS: u64 = (1 << 24) - 1;
const TAKEN: u64 = 1 << 24;
const CHANGE: u64 = 1 << 25;

/// Flows open and new flows a second of each client.
#[derive(Debug)]
pub struct Clients {
    flows_max: u64,
    rate: Rate,
    seed: u64,
    sets: Box<[Set]>,
    locks: Box<[Mutex<()>]>,
}

/// Where a flow is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientPlace(u32);

impl ClientPlace {
    /// Whether it is an entry that several clients share, because the table was full.
    pub fn is_shared(self) -> bool {
        self.0 as usize % (OWN + 1) == SHARED
    }
}

#[derive(Debug, Default)]
struct Set {
    /// Whose an entry is: [`Client::number`]; 0: nobody's yet.
    clients: [AtomicU64; OWN + 1],
    words: [AtomicU64; OWN + 1],
    full_at: [FullAt; OWN + 1],
}

impl Clients {
    /// At most so many flows of a client (0: any number), and new ones at this rate. The seed should be a secret.
    pub fn new(flows_max: u32, rate: Rate, seed: u64) -> Self {
        Self::with_sets(flows_max, rate, seed, SETS)
    }

    fn with_sets(flows_max: u32, rate: Rate, seed: u64, sets: usize) -> Self {
        let flows_max = if flows_max == 0 { FLOWS } else { u64::from(flows_max).min(FLOWS) };
        let locks = (0..LOCKS.min(sets)).map(|_| Mutex::default()).collect();
        Self { flows_max, rate, seed, sets: (0..sets).map(|_| Set::default()).collect(), locks }
    }

    /// Lets one of the client's flows in, who has a place until [`Clients::close`].
    ///
    /// # Errors
    /// What was reached.
    pub fn open(&self, client: Client, now_micros: u64) -> Result<ClientPlace, Refusal> {
        let set = (client.spread(self.seed) % self.sets.len() as u64) as usize;
        let place = |entry: usize| ClientPlace((set * (OWN + 1) + entry) as u32);
        if let Some(entry) = self.sets[set].entry_of(client)
            && self.open_at(set, entry, Some(client), now_micros)?
        {
            return Ok(place(entry));
        }
        // It has none, or one that is being taken over.
        self.open_anew(set, client, now_micros).map(place)
    }

    /// Gives a place back.
    pub fn close(&self, place: ClientPlace) {
        let (set, entry) = (place.0 as usize / (OWN + 1), place.0 as usize % (OWN + 1));
        let before = self.sets[set].words[entry].fetch_sub(1, Relaxed);
        debug_assert!(before & FLOWS > 0, "a place is given back once");
    }

    /// Gives a place back that was taken for nothing, and its part of the rate.
    pub fn take_back(&self, place: ClientPlace) {
        let (set, entry) = (place.0 as usize / (OWN + 1), place.0 as usize % (OWN + 1));
        // Before the place: until then nobody can take the entry over.
        self.sets[set].full_at[entry].give_back(self.rate);
        self.close(place);
    }

    /// Opens a flow on an entry; `false`: it is no longer `client`'s.
    fn open_at(
        &self,
        set: usize,
        entry: usize,
        client: Option<Client>,
        now_micros: u64,
    ) -> Result<bool, Refusal> {
        let Set { clients, words, full_at } = &self.sets[set];
        let (word, full_at) = (&words[entry], &full_at[entry]);
        let mut seen = word.load(Acquire);
        loop {
            let whose = clients[entry].load(Relaxed);
            if seen & TAKEN != 0 || client.is_some_and(|client| client.number() != whose) {
                return Ok(false);
            }
            if seen & FLOWS >= self.flows_max {
                return Err(Refusal::Flows);
            }
            if !full_at.has_token(self.rate, now_micros) {
                let now = word.load(Acquire);
                if now == seen {
                    return Err(Refusal::Rate);
                }
                seen = now;
                continue;
            }
            // Acquire: whoever had the entry before is done with it. The word tells whether all that was read above is of now.
            match word.compare_exchange_weak(seen, seen.wrapping_add(CHANGE) + 1, Acquire, Acquire) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        // From here on nobody takes the entry over. Another worker may have taken the last token meanwhile.
        if full_at.take(self.rate, now_micros) {
            return Ok(true);
        }
        word.fetch_sub(1, Relaxed);
        Err(Refusal::Rate)
    }

    /// Opens a flow of a client that has no entry: on one that nobody misses, which becomes the client's; else on the shared
    /// one. Or on the client's, if another worker made it one meanwhile.
    fn open_anew(&self, set: usize, client: Client, now_micros: u64) -> Result<usize, Refusal> {
        let turn = self.locks[set % self.locks.len()].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = self.sets[set].entry_of(client) {
            // Nobody takes it over while the lock is held.
            return self.open_at(set, entry, Some(client), now_micros).map(|_| entry);
        }
        if let Some(entry) = self.take_over(set, client, now_micros) {
            return Ok(entry);
        }
        drop(turn);
        self.open_at(set, SHARED, None, now_micros).map(|_| SHARED)
    }

    /// Makes an entry that nobody misses the client's, with this flow open on it. The set's lock is held.
    fn take_over(&self, set: usize, client: Client, now_micros: u64) -> Option<usize> {
        let Set { clients, words, full_at } = &self.sets[set];
        for entry in 0..OWN {
            let seen = words[entry].load(Acquire);
            let idle = seen & FLOWS == 0 && full_at[entry].is_full(now_micros);
            let taken = seen.wrapping_add(CHANGE) | TAKEN;
            if !idle || words[entry].compare_exchange(seen, taken, Acquire, Relaxed).is_err() {
                continue;
            }
            clients[entry].store(client.number(), Relaxed);
            full_at[entry].reset(now_micros);
            full_at[entry].take(self.rate, now_micros);
            words[entry].store(seen.wrapping_add(2 * CHANGE) + 1, Release);
            return Some(entry);
        }
        None
    }
}

impl Set {
    fn entry_of(&self, client: Client) -> Option<usize> {
        (0..OWN).find(|entry| self.clients[*entry].load(Relaxed) == client.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn client(n: u32) -> Client {
        Client::at(std::net::IpAddr::from(n.to_be_bytes()))
    }

    /// Everybody's count and bucket, in a map that grows.
    struct Naive {
        flows_max: u64,
        per_second: u32,
        rate: Rate,
        all: HashMap<u32, (u64, FullAt)>,
    }

    impl Naive {
        fn open(&mut self, n: u32, now: u64) -> Result<(), Refusal> {
            let fresh = || {
                let full = FullAt::default();
                full.reset(now);
                (0, full)
            };
            let (open, full_at) = self.all.entry(n).or_insert_with(fresh);
            if self.flows_max > 0 && *open >= self.flows_max {
                return Err(Refusal::Flows);
            }
            if self.per_second > 0 && !full_at.take(self.rate, now) {
                return Err(Refusal::Rate);
            }
            *open += 1;
            Ok(())
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Open(u32),
        Close(prop::sample::Index),
        TakeBack(prop::sample::Index),
        Pass(u64),
    }

    fn steps(clients: u32) -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..clients).prop_map(Step::Open),
            2 => any::<prop::sample::Index>().prop_map(Step::Close),
            1 => any::<prop::sample::Index>().prop_map(Step::TakeBack),
            1 => prop_oneof![0_u64..100_000, 0_u64..2_000_000].prop_map(Step::Pass),
        ];
        prop::collection::vec(step, 1..400)
    }

    proptest! {
        /// With room for everybody, it does what a map that grows does.
        #[test]
        fn it_limits_each_client(flows_max in 0_u32..5, per_second in 0_u32..6, seed: u64, steps in steps(6)) {
            let rate = Rate::per_second(per_second);
            let table = Clients::with_sets(flows_max, rate, seed, 4);
            let mut naive = Naive { flows_max: u64::from(flows_max), per_second, rate, all: HashMap::new() };
            let mut open = Vec::new();
            let mut now = 1;
            for step in steps {
                match step {
                    Step::Open(n) => {
                        let place = table.open(client(n), now);
                        prop_assert_eq!(place.map(|_| ()), naive.open(n, now));
                        open.extend(place.ok().map(|place| (n, place)));
                    }
                    Step::Close(at) if !open.is_empty() => {
                        let (n, place) = open.swap_remove(at.index(open.len()));
                        table.close(place);
                        naive.all.get_mut(&n).unwrap().0 -= 1;
                    }
                    Step::TakeBack(at) if !open.is_empty() => {
                        let (n, place) = open.swap_remove(at.index(open.len()));
                        table.take_back(place);
                        let (count, full_at) = naive.all.get_mut(&n).unwrap();
                        *count -= 1;
                        full_at.give_back(rate);
                    }
                    Step::Pass(micros) => now += micros,
                    _ => {}
                }
            }
        }

        /// However many addresses come, nobody is let in whom a table without bounds would turn away.
        #[test]
        fn a_flood_of_addresses_resets_nobody(flows_max in 1_u32..4, per_second in 1_u32..5, seed: u64, steps in steps(60)) {
            let rate = Rate::per_second(per_second);
            let table = Clients::with_sets(flows_max, rate, seed, 1);
            let mut naive = Naive { flows_max: u64::from(flows_max), per_second, rate, all: HashMap::new() };
            let mut open = Vec::new();
            let mut now = 1;
            for step in steps {
                match step {
                    Step::Open(n) => {
                        let Ok(place) = table.open(client(n), now) else { continue };
                        let shared = place.is_shared();
                        // A shared entry may let one in where its own would not: that is what it is there for, and it has
                        // one limit for all.
                        let allowed = shared || naive.open(n, now).is_ok();
                        prop_assert!(allowed, "client {} at {}", n, now);
                        open.push((n, place));
                    }
                    Step::Close(at) | Step::TakeBack(at) if !open.is_empty() => {
                        let (n, place) = open.swap_remove(at.index(open.len()));
                        table.close(place);
                        if !place.is_shared() {
                            naive.all.get_mut(&n).unwrap().0 -= 1;
                        }
                    }
                    Step::Pass(micros) => now += micros,
                    _ => {}
                }
                let own = open.iter().filter(|(_, place)| !place.is_shared()).count();
                let shared = open.len() - own;
                prop_assert!(shared <= flows_max as usize && own <= OWN * flows_max as usize);
            }
        }
    }

    #[test]
    fn those_without_room_share_one_limit_until_somebody_is_idle() {
        let table = Clients::with_sets(2, Rate::NONE, 7, 1);
        let own: Vec<_> = (0..7).map(|n| table.open(client(n), 0).unwrap()).collect();
        let shared = [table.open(client(100), 0).unwrap(), table.open(client(101), 0).unwrap()];
        assert!(own.iter().all(|place| !place.is_shared()) && shared.iter().all(|place| place.is_shared()));
        assert_eq!(table.open(client(102), 0), Err(Refusal::Flows));
        assert!(table.open(client(3), 0).is_ok(), "who has an entry keeps it");
        table.close(own[5]);
        let newcomer = table.open(client(102), 0).unwrap();
        assert_eq!(newcomer, own[5], "whose flows have ended makes room");
    }

    #[test]
    fn workers_together_never_pass_a_client_s_limit() {
        let table = Clients::with_sets(300, Rate::per_second(400), 7, 2);
        let opened = |_| {
            // Twenty clients in fourteen entries of their own: they are taken over under way.
            let all =
                (0..40_000).map(|n| client(n % 20)).filter_map(|c| table.open(c, 9).ok().map(|p| (c, p)));
            all.collect::<Vec<_>>()
        };
        let opened = &opened;
        let all: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || opened(n))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let mut places: HashMap<u32, Vec<Client>> = HashMap::new();
        for (client, place) in &all {
            places.entry(place.0).or_default().push(*client);
        }
        for (place, clients) in &places {
            assert_eq!(clients.len(), 300, "of {place}");
            let one = clients.iter().all(|client| *client == clients[0]);
            assert!(one || ClientPlace(*place).is_shared(), "an entry of two clients");
        }
        all.iter().for_each(|(_, place)| table.close(*place));
        let left =
            table.sets.iter().flat_map(|set| &set.words).map(|word| word.load(Relaxed) & FLOWS).sum::<u64>();
        assert_eq!(left, 0);
    }

    /// Entries change hands all the time, and every flow is counted where it was opened.
    #[test]
    fn entries_that_change_hands_lose_no_count() {
        let table = Clients::with_sets(1, Rate::NONE, 7, 1);
        std::thread::scope(|scope| {
            for thread in 0..4_u32 {
                let table = &table;
                scope.spawn(move || {
                    for n in 0..20_000_u32 {
                        if let Ok(place) = table.open(client(n.wrapping_mul(7 + thread) % 11), 0) {
                            table.close(place);
                        }
                    }
                });
            }
        });
        let set = &table.sets[0];
        assert!(set.words.iter().all(|word| word.load(Relaxed) & (FLOWS | TAKEN) == 0));
        let mut owners: Vec<_> = set.clients.iter().map(|c| c.load(Relaxed)).filter(|c| *c != 0).collect();
        let count = owners.len();
        owners.sort_unstable();
        owners.dedup();
        assert_eq!(owners.len(), count, "a client has one entry");
    }
}
