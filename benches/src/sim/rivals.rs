//! Policies of others, from their sources and papers, to compare with.

use super::balancer::{Balancer, Conditions, Ending, How, ServerReport};
use super::event::Time;
use super::random::Random;
use super::server::Server;

/// Each in turn, from a random one on.
pub(crate) struct RoundRobin {
    servers: usize,
    turn: usize,
}

impl RoundRobin {
    pub(crate) fn new(mut conditions: Conditions) -> Self {
        Self { servers: conditions.servers, turn: conditions.random.below(conditions.servers) }
    }
}

impl Balancer for RoundRobin {
    fn select(&mut self, _now: Time, _servers: &[Server]) -> Option<usize> {
        self.turn = (self.turn + 1) % self.servers;
        Some(self.turn)
    }

    fn done(&mut self, _server: usize, _now: Time, _ending: &Ending) {}

    fn report(&mut self, _server: usize, _report: &ServerReport, _now: Time) {}

    fn join(&mut self, _server: usize, _now: Time) {
        self.servers += 1;
    }
}

/// Any, alike.
pub(crate) struct AnyOne {
    servers: usize,
    random: Random,
}

impl AnyOne {
    pub(crate) fn new(conditions: Conditions) -> Self {
        Self { servers: conditions.servers, random: conditions.random }
    }
}

impl Balancer for AnyOne {
    fn select(&mut self, _now: Time, _servers: &[Server]) -> Option<usize> {
        Some(self.random.below(self.servers))
    }

    fn done(&mut self, _server: usize, _now: Time, _ending: &Ending) {}

    fn report(&mut self, _server: usize, _report: &ServerReport, _now: Time) {}

    fn join(&mut self, _server: usize, _now: Time) {
        self.servers += 1;
    }
}

/// `HAProxy`'s `leastconn` (`lb_fwlc.c`), all weights alike: key `(inflight + 1) * 256 / weight`, but 0 without any in
/// flight; among equals, who was chosen longest ago.
pub(crate) struct LeastConn {
    inflight: Vec<u32>,
    chosen: Vec<u64>,
    choices: u64,
}

impl LeastConn {
    pub(crate) fn new(conditions: &Conditions) -> Self {
        Self { inflight: vec![0; conditions.servers], chosen: vec![0; conditions.servers], choices: 0 }
    }
}

impl Balancer for LeastConn {
    fn select(&mut self, _now: Time, _servers: &[Server]) -> Option<usize> {
        let key = |inflight: u32| if inflight == 0 { 0 } else { (inflight + 1) * 256 };
        let least = (0..self.inflight.len()).min_by_key(|n| (key(self.inflight[*n]), self.chosen[*n]))?;
        self.choices += 1;
        self.chosen[least] = self.choices;
        self.inflight[least] += 1;
        Some(least)
    }

    fn done(&mut self, server: usize, _now: Time, _ending: &Ending) {
        self.inflight[server] -= 1;
    }

    fn report(&mut self, _server: usize, _report: &ServerReport, _now: Time) {}

    fn join(&mut self, _server: usize, _now: Time) {
        self.inflight.push(0);
        self.chosen.push(self.choices);
    }
}

/// Two different servers, alike.
fn two(random: &mut Random, servers: usize) -> (usize, usize) {
    let first = random.below(servers);
    let second = random.below(servers.max(2) - 1);
    (first, if second >= first && servers > 1 { second + 1 } else { second })
}

/// The less busy of two, by the balancer's own flows.
pub(crate) struct P2c {
    inflight: Vec<u32>,
    random: Random,
}

impl P2c {
    pub(crate) fn new(conditions: Conditions) -> Self {
        Self { inflight: vec![0; conditions.servers], random: conditions.random }
    }
}

impl Balancer for P2c {
    fn select(&mut self, _now: Time, _servers: &[Server]) -> Option<usize> {
        let (a, b) = two(&mut self.random, self.inflight.len());
        let chosen = if self.inflight[b] < self.inflight[a] { b } else { a };
        self.inflight[chosen] += 1;
        Some(chosen)
    }

    fn done(&mut self, server: usize, _now: Time, _ending: &Ending) {
        self.inflight[server] -= 1;
    }

    fn report(&mut self, _server: usize, _report: &ServerReport, _now: Time) {}

    fn join(&mut self, _server: usize, _now: Time) {
        self.inflight.push(0);
    }
}

/// Two choices by `cost * (pending + 1)`, where the cost jumps to a latency above it and decays to one below it.
pub(crate) struct PeakEwma {
    peers: Vec<Peak>,
    random: Random,
}

#[derive(Debug, Clone, Copy, Default)]
struct Peak {
    pending: u32,
    /// In seconds.
    cost: f64,
    stamp: Time,
}

/// Finagle's and linkerd's time constant, in seconds.
const PEAK_DECAY: f64 = 10.0;
/// Finagle's load of someone who has work but has never answered.
const PEAK_PENALTY: f64 = (1_u64 << 47) as f64;

impl Peak {
    /// A round trip of 0 only lets it decay.
    fn observe(&mut self, rtt: f64, now: Time) {
        let keep = (-now.since(self.stamp) / PEAK_DECAY).exp();
        self.stamp = now;
        self.cost = if rtt > self.cost { rtt } else { self.cost * keep + rtt * (1.0 - keep) };
    }

    fn load(&mut self, now: Time) -> f64 {
        self.observe(0.0, now);
        if self.cost == 0.0 && self.pending > 0 {
            return PEAK_PENALTY + f64::from(self.pending);
        }
        self.cost * f64::from(self.pending + 1)
    }
}

impl PeakEwma {
    pub(crate) fn new(conditions: Conditions) -> Self {
        Self { peers: vec![Peak::default(); conditions.servers], random: conditions.random }
    }
}

impl Balancer for PeakEwma {
    fn select(&mut self, now: Time, _servers: &[Server]) -> Option<usize> {
        let (a, b) = two(&mut self.random, self.peers.len());
        let chosen = if self.peers[b].load(now) < self.peers[a].load(now) { b } else { a };
        self.peers[chosen].pending += 1;
        Some(chosen)
    }

    fn done(&mut self, server: usize, now: Time, ending: &Ending) {
        self.peers[server].pending -= 1;
        self.peers[server].observe(ending.latency, now);
    }

    fn report(&mut self, _server: usize, _report: &ServerReport, _now: Time) {}

    fn join(&mut self, _server: usize, _now: Time) {
        self.peers.push(Peak::default());
    }
}

/// gRPC's weighted round robin (gRFC A58) with its static stride scheduler.
pub(crate) struct A58 {
    servers: Vec<Weighed>,
    strides: Vec<u32>,
    sequence: u32,
    updated: Option<Time>,
}

#[derive(Debug, Clone, Copy)]
struct Weighed {
    weight: f64,
    updated: Time,
    non_empty_since: Option<Time>,
}

/// Seconds. gRPC's default is 10, in which it is plain round robin: as long as our warm-ups, so it would be measured by
/// what that left behind.
const BLACKOUT: f64 = 1.0;
/// Seconds without a report after which a weight is forgotten: gRPC's default.
const EXPIRATION: f64 = 180.0;
/// Seconds between two schedulers: gRPC's default.
const UPDATE_PERIOD: f64 = 1.0;
/// gRPC's default penalty of an error.
const ERROR_PENALTY: f64 = 1.0;

impl Weighed {
    const NEW: Self = Self { weight: 0.0, updated: Time(0), non_empty_since: None };

    /// 0: not known.
    fn usable(&mut self, now: Time) -> f64 {
        if now.since(self.updated) >= EXPIRATION {
            self.non_empty_since = None;
        }
        match self.non_empty_since {
            Some(since) if now.since(since) >= BLACKOUT => self.weight,
            _ => 0.0,
        }
    }
}

impl A58 {
    pub(crate) fn new(mut conditions: Conditions) -> Self {
        let sequence = conditions.random.next() as u32;
        Self { servers: vec![Weighed::NEW; conditions.servers], strides: Vec::new(), sequence, updated: None }
    }

    /// The scheduler's whole weights, at most 65535. One that is not known gets the mean; without two that are, all
    /// are alike.
    fn reschedule(&mut self, now: Time) {
        const MOST: f64 = 65_535.0;
        let weights: Vec<f64> = self.servers.iter_mut().map(|server| server.usable(now)).collect();
        let known = weights.iter().filter(|weight| **weight > 0.0).count();
        self.updated = Some(now);
        if known < 2 {
            self.strides = vec![MOST as u32; weights.len()];
            return;
        }
        let mean = weights.iter().sum::<f64>() / known as f64;
        let most = weights.iter().fold(0.0_f64, |most, weight| most.max(*weight)).min(10.0 * mean);
        let scale = MOST / most;
        let floor = ((mean * scale).round() * 0.01).round().max(1.0);
        let stride = |weight: &f64| match *weight {
            0.0 => (mean * scale).round() as u32,
            weight => (weight.min(most) * scale).round().max(floor) as u32,
        };
        self.strides = weights.iter().map(stride).collect();
    }
}

impl Balancer for A58 {
    fn select(&mut self, now: Time, _servers: &[Server]) -> Option<usize> {
        const MOST: u64 = 65_535;
        if self.updated.is_none_or(|updated| now.since(updated) >= UPDATE_PERIOD) {
            self.reschedule(now);
        }
        let count = self.strides.len() as u64;
        loop {
            let sequence = u64::from(self.sequence);
            self.sequence = self.sequence.wrapping_add(1);
            let (index, generation) = (sequence % count, sequence / count);
            let weight = u64::from(self.strides[index as usize]);
            if (weight * generation + index * (MOST / 2)) % MOST >= MOST - weight {
                return Some(index as usize);
            }
        }
    }

    fn done(&mut self, _server: usize, _now: Time, _ending: &Ending) {}

    fn report(&mut self, server: usize, report: &ServerReport, now: Time) {
        let rate = report.rate.unwrap_or(0.0);
        let penalty =
            if report.utilization > 0.0 && rate > 0.0 { report.errors / rate * ERROR_PENALTY } else { 0.0 };
        let utilization = report.utilization + penalty;
        if rate <= 0.0 || utilization <= 0.0 {
            return;
        }
        let server = &mut self.servers[server];
        server.non_empty_since.get_or_insert(now);
        (server.weight, server.updated) = (rate / utilization, now);
    }

    fn join(&mut self, _server: usize, _now: Time) {
        self.servers.push(Weighed::NEW);
        self.updated = None;
    }
}

/// C3 (NSDI'15): least `R - 1/µ + q³/µ`, with what each answer says of its server.
pub(crate) struct C3 {
    peers: Vec<C3Peer>,
    balancers: f64,
    random: Random,
}

#[derive(Debug, Clone, Copy, Default)]
struct C3Peer {
    outstanding: u32,
    known: bool,
    response: f64,
    service: f64,
    queue: f64,
}

/// Elasticsearch's part of a new value in an average.
const C3_ALPHA: f64 = 0.3;

impl C3Peer {
    fn rank(&self, balancers: f64) -> f64 {
        let queue = 1.0 + f64::from(self.outstanding) * balancers + self.queue;
        self.response - self.service + queue.powi(3) * self.service
    }
}

impl C3 {
    pub(crate) fn new(conditions: Conditions) -> Self {
        let peers = vec![C3Peer::default(); conditions.servers];
        Self { peers, balancers: conditions.balancers as f64, random: conditions.random }
    }
}

impl Balancer for C3 {
    fn select(&mut self, _now: Time, _servers: &[Server]) -> Option<usize> {
        let first = self.random.below(self.peers.len());
        let places = (first..self.peers.len()).chain(0..first);
        let rank = |n: usize| self.peers[n].rank(self.balancers);
        let chosen = places.min_by(|a, b| rank(*a).total_cmp(&rank(*b)))?;
        self.peers[chosen].outstanding += 1;
        Some(chosen)
    }

    fn done(&mut self, server: usize, _now: Time, ending: &Ending) {
        let peer = &mut self.peers[server];
        peer.outstanding -= 1;
        if ending.how == How::TimedOut {
            return;
        }
        let alpha = if peer.known { C3_ALPHA } else { 1.0 };
        peer.known = true;
        let average = |mean: &mut f64, value: f64| *mean += alpha * (value - *mean);
        average(&mut peer.response, ending.latency);
        average(&mut peer.service, ending.service);
        average(&mut peer.queue, f64::from(ending.queue));
    }

    fn report(&mut self, _server: usize, _report: &ServerReport, _now: Time) {}

    fn join(&mut self, _server: usize, _now: Time) {
        self.peers.push(C3Peer::default());
    }
}

/// The shortest queue, known exactly: what nobody can do, to compare with.
pub(crate) struct ExactJsq {
    joined: usize,
    random: Random,
}

impl ExactJsq {
    pub(crate) fn new(conditions: Conditions) -> Self {
        Self { joined: conditions.servers, random: conditions.random }
    }
}

impl Balancer for ExactJsq {
    fn select(&mut self, _now: Time, servers: &[Server]) -> Option<usize> {
        let first = self.random.below(self.joined);
        (first..self.joined).chain(0..first).min_by_key(|n| servers[*n].rif())
    }

    fn done(&mut self, _server: usize, _now: Time, _ending: &Ending) {}

    fn report(&mut self, _server: usize, _report: &ServerReport, _now: Time) {}

    fn join(&mut self, _server: usize, _now: Time) {
        self.joined += 1;
    }
}
