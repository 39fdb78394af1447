//! The table of UDP flows against a shadow model that is too simple to be wrong, over operations that a seed chooses.
//!
//! `SIM_SEED=17 cargo test -p trimtab-flow --test udp` runs one seed and prints its steps.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use allocation::Timestamp;
use flow::TICK;
use flow::udp::{Announced, Expiry, Flows, Refusal, Tuning, Tuple};

const SEEDS: u64 = 2_000;
const STEPS: u64 = 400;
const CLIENTS: u64 = 12;

/// A flow as anyone would write it down.
#[derive(Debug, Clone)]
struct Shadow {
    client: u64,
    /// Changes with a refusal only.
    backend: u64,
    named: bool,
    asked: u32,
    answered: u32,
    refusals: u8,
    moved: u64,
    doubted_until: Option<u64>,
}

struct World {
    seed: u64,
    random: u64,
    now: u64,
    tuning: Tuning,
    flows_max: usize,
    flows: Flows<u64>,
    shadows: BTreeMap<u32, Shadow>,
    /// Ended, not yet removed.
    ended: BTreeSet<u32>,
    backends: u64,
    seen: Seen,
    verbose: bool,
}

#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    full: u64,
    idle: u64,
    over: u64,
    elsewhere: u64,
    refused: u64,
    unnamed: u64,
    believed: u64,
}

impl World {
    fn new(seed: u64, verbose: bool) -> Self {
        let mut world = Self {
            seed,
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            now: 0,
            tuning: Tuning::default(),
            flows_max: 0,
            flows: Flows::new(Timestamp::ZERO, seed, 0),
            shadows: BTreeMap::new(),
            ended: BTreeSet::new(),
            backends: 0,
            seen: Seen::default(),
            verbose,
        };
        world.tuning = Tuning {
            idle_timeout: Duration::from_millis(50 + world.below(5_000)),
            responses: world.below(4).saturating_sub(1) as u32,
            requests: world.below(5).saturating_sub(2) as u32,
            retries: world.below(3) as u8,
        };
        world.flows_max = 1 + world.below(CLIENTS + 4) as usize;
        world.flows = Flows::new(Timestamp::ZERO, seed, world.flows_max);
        world
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % bound
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.now)
    }

    fn tuple(client: u64) -> Tuple {
        let address = std::net::SocketAddr::from(([192, 0, 2, (client % 3) as u8], 1_000 + client as u16));
        Tuple::new((client % 2) as u16, address, None)
    }

    /// Some come through a proxy, which has one socket for all of them.
    fn announced(client: u64) -> Option<Announced> {
        let at = |host: u8| std::net::SocketAddr::from(([192, 0, 2, host], 1_000 + client as u16));
        (client % 4 == 3).then(|| Announced::new(Self::tuple(CLIENTS), at(1), at(2)))
    }

    fn find(&self, client: u64) -> Option<u32> {
        match Self::announced(client) {
            Some(announced) => self.flows.find_announced(&announced),
            None => self.flows.find(&Self::tuple(client)),
        }
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.verbose {
            println!("{:>6} ms  {}", self.now, what());
        }
    }

    fn client_sends(&mut self) {
        let client = self.below(CLIENTS);
        let datagrams = 1 + self.below(3) as u32;
        let named = self.shadows.iter().find(|(_, s)| s.named && s.client == client).map(|(index, _)| *index);
        let found = self.find(client);
        assert_eq!(found, named, "seed {}: client {client} has another flow", self.seed);
        self.say(|| format!("client {client} sends {datagrams} to {found:?}"));
        let index = match found {
            Some(index) => index,
            None => {
                let full = self.shadows.len() >= self.flows_max;
                let now = self.now();
                let opened = match Self::announced(client) {
                    Some(announced) => self.flows.open_announced(announced, client, now, &self.tuning),
                    None => self.flows.open(Self::tuple(client), client, now, &self.tuning),
                };
                assert_eq!(opened.is_err(), full, "seed {}: the bound is {}", self.seed, self.flows_max);
                let Ok(index) = opened else {
                    self.seen.full += 1;
                    return;
                };
                assert!(
                    !self.shadows.contains_key(&index) && !self.ended.contains(&index),
                    "seed {}",
                    self.seed
                );
                self.backends += 1;
                let shadow = Shadow {
                    client,
                    backend: self.backends,
                    named: true,
                    asked: 0,
                    answered: 0,
                    refusals: 0,
                    moved: self.now,
                    doubted_until: Some(self.now + 1_000),
                };
                self.shadows.insert(index, shadow);
                index
            }
        };
        self.flows.asked(index, datagrams, self.now(), &self.tuning);
        let (requests, now) = (self.tuning.requests, self.now);
        let shadow = self.shadows.get_mut(&index).unwrap();
        shadow.asked += datagrams;
        shadow.moved = now;
        if requests != 0 && shadow.asked >= requests {
            self.seen.unnamed += u64::from(shadow.named);
            shadow.named = false;
        }
        assert_eq!(self.flows.requests(index), shadow.asked);
    }

    fn place(&mut self, index: u32) {
        self.flows.placed(index, self.now(), &self.tuning);
        self.shadows.get_mut(&index).unwrap().doubted_until = Some(self.now + 1_000);
    }

    fn some_flow(&mut self) -> Option<u32> {
        let count = self.shadows.len() as u64;
        if count == 0 {
            return None;
        }
        let nth = self.below(count) as usize;
        self.shadows.keys().nth(nth).copied()
    }

    fn backend_answers(&mut self) {
        let Some(index) = self.some_flow() else { return };
        let datagrams = 1 + self.below(2) as u32;
        let answer = self.flows.answered(index, datagrams, self.now(), &self.tuning);
        let Tuning { responses, requests, .. } = self.tuning;
        let now = self.now;
        let shadow = self.shadows.get_mut(&index).unwrap();
        assert_eq!(answer.first, shadow.answered == 0, "seed {}", self.seed);
        shadow.answered += datagrams;
        shadow.moved = now;
        shadow.doubted_until = None;
        let over = responses != 0 && shadow.answered >= requests.max(shadow.asked) * responses;
        assert_eq!(answer.over, over, "seed {}: {shadow:?}", self.seed);
        self.say(|| format!("flow {index} is answered: {answer:?}"));
        if over {
            self.seen.over += 1;
            self.end(index);
        }
    }

    fn backend_refuses(&mut self) {
        let Some(index) = self.some_flow() else { return };
        let refusal = self.flows.refused(index, &self.tuning);
        let shadow = self.shadows.get_mut(&index).unwrap();
        let may_retry = shadow.answered == 0 && shadow.refusals < self.tuning.retries;
        assert_eq!(refusal == Refusal::Elsewhere, may_retry, "seed {}: {shadow:?}", self.seed);
        self.say(|| format!("flow {index} is refused: {refusal:?}"));
        if may_retry {
            self.seen.elsewhere += 1;
            let shadow = self.shadows.get_mut(&index).unwrap();
            shadow.refusals += 1;
            self.backends += 1;
            shadow.backend = self.backends;
            self.place(index);
        } else {
            self.seen.refused += 1;
            self.end(index);
        }
    }

    fn end(&mut self, index: u32) {
        assert!(self.flows.end(index), "seed {}", self.seed);
        assert!(!self.flows.end(index), "seed {}: it ends once", self.seed);
        self.shadows.remove(&index);
        if self.below(2) == 0 {
            self.free(index);
        } else {
            // Something of it is in flight.
            self.ended.insert(index);
        }
    }

    fn free(&mut self, index: u32) {
        let generation = self.flows.generation(index);
        assert!(self.flows.remove(index).is_some(), "seed {}", self.seed);
        assert_ne!(self.flows.generation(index), generation, "seed {}", self.seed);
    }

    fn pass_time(&mut self) {
        let span = if self.below(10) == 0 { 8_000 } else { 300 };
        self.now += self.below(span);
        let mut expired = Vec::new();
        let tuning = self.tuning;
        self.flows.expire(self.now(), |_| &tuning, &mut expired);
        let idle_ms = self.tuning.idle_timeout.as_millis() as u64;
        for (index, expiry) in expired {
            let shadow =
                self.shadows.get_mut(&index).unwrap_or_else(|| panic!("seed {}: {index}", self.seed));
            match expiry {
                Expiry::NotRefused => {
                    let until = shadow.doubted_until.take();
                    assert!(until.is_some_and(|at| at <= self.now), "seed {}: believed early", self.seed);
                    self.seen.believed += 1;
                }
                Expiry::Idle => {
                    assert!(shadow.moved + idle_ms <= self.now, "seed {}: {shadow:?} ended early", self.seed);
                    self.seen.idle += 1;
                    self.end(index);
                }
            }
        }
        let late = |at: u64| at + 2 * TICK.as_millis() as u64 <= self.now;
        for (index, shadow) in &self.shadows {
            assert!(!late(shadow.moved + idle_ms), "seed {}: {index} {shadow:?} should be over", self.seed);
            assert!(!shadow.doubted_until.is_some_and(late), "seed {}: {index} {shadow:?}", self.seed);
        }
    }

    fn run(mut self) -> Seen {
        for _ in 0..STEPS {
            match self.below(10) {
                0..=3 => self.client_sends(),
                4..=6 => self.backend_answers(),
                7 => self.backend_refuses(),
                8 => self.pass_time(),
                _ => {
                    if let Some(index) = self.ended.pop_first() {
                        self.free(index);
                    }
                }
            }
            assert_eq!(self.flows.open_count(), self.shadows.len(), "seed {}", self.seed);
            assert_eq!(self.flows.len(), self.shadows.len() + self.ended.len(), "seed {}", self.seed);
            for (index, shadow) in &self.shadows {
                assert_eq!(self.flows.get(*index), Some(&shadow.client), "seed {}", self.seed);
                assert!(self.flows.is_open(*index));
            }
        }
        assert_eq!(self.flows.indexes(), self.shadows.keys().copied().collect::<Vec<_>>());
        // Silence ends everything.
        self.now += 100_000;
        let (mut expired, tuning) = (Vec::new(), self.tuning);
        self.flows.expire(self.now(), |_| &tuning, &mut expired);
        expired.retain(|(_, expiry)| *expiry == Expiry::Idle);
        assert_eq!(expired.len(), self.shadows.len(), "seed {}", self.seed);
        for (index, _) in expired {
            self.flows.end(index);
            self.flows.remove(index);
        }
        for index in std::mem::take(&mut self.ended) {
            self.free(index);
        }
        assert!(self.flows.is_empty() && self.flows.next_wake().is_none(), "seed {}", self.seed);
        self.seen
    }
}

#[test]
fn flows_are_what_the_model_says() {
    if let Some(seed) = std::env::var("SIM_SEED").ok().and_then(|s| s.parse().ok()) {
        println!("{:?}", World::new(seed, true).run());
        return;
    }
    let mut all = Seen::default();
    for seed in 0..SEEDS {
        let seen = World::new(seed, false).run();
        all.full += seen.full;
        all.idle += seen.idle;
        all.over += seen.over;
        all.elsewhere += seen.elsewhere;
        all.refused += seen.refused;
        all.unnamed += seen.unnamed;
        all.believed += seen.believed;
    }
    let counts = [all.full, all.idle, all.over, all.elsewhere, all.refused, all.unnamed, all.believed];
    assert!(counts.into_iter().all(|count| count > SEEDS / 10), "the sweep gets everywhere: {all:?}");
}

#[test]
fn a_hundred_thousand_flows_pass_through_a_bounded_table() {
    let tuning = Tuning { idle_timeout: Duration::from_secs(10), ..Tuning::default() };
    let mut flows = Flows::new(Timestamp::ZERO, 9, 1_000);
    let (mut now, mut opened, mut shed) = (0, 0, 0);
    for n in 0..100_000_u32 {
        let [a, b, c, d] = n.to_be_bytes();
        let client = std::net::SocketAddr::from(([10, b, c, d], 4_000 + u16::from(a)));
        match flows.open(Tuple::new(0, client, None), (), Timestamp::from_millis(now), &tuning) {
            Ok(_) => opened += 1,
            Err(_) => shed += 1,
        }
        now += 5;
        let mut expired = Vec::new();
        flows.expire(Timestamp::from_millis(now), |()| &tuning, &mut expired);
        for (index, _) in expired.into_iter().filter(|(_, why)| *why == Expiry::Idle) {
            flows.end(index);
            flows.remove(index);
        }
        assert!(flows.open_count() <= 1_000);
    }
    // 1,000 every ten seconds, of 2,000 that come: half.
    assert!((45_000..=55_000).contains(&opened) && opened + shed == 100_000, "{opened} opened, {shed} shed");
}
