//! Prequal (Wydrowski et al., NSDI'24): probes, and the hot-cold rule.

use std::collections::VecDeque;

use super::balancer::{Balancer, Conditions, Ending, ServerReport};
use super::event::Time;
use super::random::Random;
use super::server::Server;

/// Most answers in the pool.
const POOL: usize = 16;
/// Seconds after which an answer is too old.
const AGE_MAX: f64 = 1.0;
/// Probes for each flow.
const PROBES: usize = 3;
/// Answers removed for each flow.
const REMOVED: usize = 1;
/// The paper's δ.
const DELTA: f64 = 1.0;
/// Fewer answers than this: any server.
const OCCUPANCY_MIN: usize = 2;
/// Seconds that an answer takes.
const PROBE_TIME: f64 = 0.001;
/// RIFs of which the quantile is taken.
const RECENT: usize = 128;

#[derive(Debug, Clone, Copy)]
struct Answer {
    server: usize,
    rif: u32,
    latency: f32,
    arrived: Time,
    uses: u32,
}

/// One client of Prequal's asynchronous mode.
pub(crate) struct Prequal {
    quantile: f64,
    servers: usize,
    random: Random,
    pool: VecDeque<Answer>,
    on_the_way: VecDeque<Answer>,
    recent: VecDeque<u32>,
    sorted: Vec<u32>,
    remove_oldest: bool,
}

impl Prequal {
    pub(crate) fn new(quantile: f64, conditions: Conditions) -> Self {
        Self {
            quantile,
            servers: conditions.servers,
            random: conditions.random,
            pool: VecDeque::with_capacity(POOL + 1),
            on_the_way: VecDeque::new(),
            recent: VecDeque::with_capacity(RECENT),
            sorted: Vec::with_capacity(RECENT),
            remove_oldest: true,
        }
    }

    fn receive(&mut self, now: Time) {
        while self.on_the_way.front().is_some_and(|answer| answer.arrived <= now) {
            let Some(answer) = self.on_the_way.pop_front() else { return };
            if self.pool.len() == POOL {
                self.pool.pop_front();
            }
            self.pool.push_back(answer);
            if self.recent.len() == RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back(answer.rif);
        }
    }

    /// How often an answer may be used, rounded at random.
    fn uses_max(&mut self) -> u32 {
        let spare = (1.0 - POOL as f64 / self.servers as f64) * PROBES as f64 - REMOVED as f64;
        let uses = if spare > 0.0 { ((1.0 + DELTA) / spare).clamp(1.0, 1e3) } else { 1.0 };
        uses as u32 + u32::from(self.random.unit() < uses.fract())
    }

    /// The RIF above which a server is hot.
    fn threshold(&mut self) -> u32 {
        self.sorted.clear();
        self.sorted.extend(&self.recent);
        let place = ((self.sorted.len() as f64 * self.quantile) as usize).min(self.sorted.len() - 1);
        *self.sorted.select_nth_unstable(place).1
    }

    /// Place in the pool of the cold one of least latency, or else of the one of least RIF.
    fn best(&self, threshold: u32) -> Option<usize> {
        let places = || (0..self.pool.len()).map(|place| (place, &self.pool[place]));
        let cold = places().filter(|(_, answer)| answer.rif <= threshold);
        let coldest = cold.min_by(|(_, a), (_, b)| a.latency.total_cmp(&b.latency));
        coldest.or_else(|| places().min_by_key(|(_, answer)| answer.rif)).map(|(place, _)| place)
    }

    /// Removes the oldest and the worst in turn.
    fn remove_one(&mut self, threshold: u32) {
        self.remove_oldest = !self.remove_oldest;
        if self.remove_oldest {
            self.pool.pop_front();
            return;
        }
        let places = || (0..self.pool.len()).map(|place| (place, &self.pool[place]));
        let hot = places().filter(|(_, answer)| answer.rif > threshold);
        let hottest = hot.max_by_key(|(_, answer)| answer.rif);
        let worst = hottest.or_else(|| places().max_by(|(_, a), (_, b)| a.latency.total_cmp(&b.latency)));
        if let Some((place, _)) = worst {
            self.pool.remove(place);
        }
    }

    fn probe(&mut self, now: Time, servers: &[Server]) {
        let mut asked = [usize::MAX; PROBES];
        for place in 0..PROBES.min(self.servers) {
            let mut server = self.random.below(self.servers);
            while asked.contains(&server) {
                server = self.random.below(self.servers);
            }
            asked[place] = server;
            let (rif, latency) = servers[server].probe();
            let arrived = now.after(PROBE_TIME);
            self.on_the_way.push_back(Answer { server, rif, latency, arrived, uses: 0 });
        }
    }
}

impl Balancer for Prequal {
    fn select(&mut self, now: Time, servers: &[Server]) -> Option<usize> {
        self.receive(now);
        self.pool.retain(|answer| now.since(answer.arrived) <= AGE_MAX);
        let chosen = if self.pool.len() < OCCUPANCY_MIN {
            self.random.below(self.servers)
        } else {
            let threshold = self.threshold();
            let place = self.best(threshold)?;
            let server = self.pool[place].server;
            self.pool[place].uses += 1;
            if self.pool[place].uses >= self.uses_max() {
                self.pool.remove(place);
            }
            for answer in self.pool.iter_mut().filter(|answer| answer.server == server) {
                answer.rif += 1;
            }
            for _ in 0..REMOVED {
                self.remove_one(threshold);
            }
            server
        };
        self.probe(now, servers);
        Some(chosen)
    }

    fn done(&mut self, _server: usize, _now: Time, _ending: &Ending) {}

    fn report(&mut self, _server: usize, _report: &ServerReport, _now: Time) {}

    fn join(&mut self, _server: usize, _now: Time) {
        self.servers += 1;
    }
}
