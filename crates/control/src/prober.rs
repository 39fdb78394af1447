//! Probes of the policy `prequal`: small datagrams to agents, as many as flows ask for, whose answers the workers choose among.
//!
//! * A worker never sends one and never waits for one. What was selected is seen here within [`TICK`], by the count of
//!   flows; the answers are in the pool for the flows after it (Prequal's asynchronous mode).
//! * Only a registered resource's own host is probed (`registry` sees to that), and only an answer from the address that was
//!   asked, with the number that was sent, counts.
//! * Bounds: probes for each flow and at once are the pool's; those on their way are at most [`ON_THEIR_WAY_MAX`].

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use allocation::{AllocationTable, BackendIndex, SharedProbePool, Timestamp};
use api::v1::{ProbeRequest, ProbeResponse};
use prost::Message;
use registry::ProbeTargets;
use tokio::net::UdpSocket;
use tokio::time::{MissedTickBehavior, interval};

use crate::{Phase, Shared, reached};

/// How often it looks whether flows were selected. Shorter than most flows.
const TICK: Duration = Duration::from_millis(2);
/// How often it looks who is there.
const TARGETS_EVERY: Duration = Duration::from_millis(100);
/// An answer that takes longer tells of a past that is over.
const ANSWER_WITHIN: Duration = Duration::from_millis(100);
/// Probes that wait for their answers.
const ON_THEIR_WAY_MAX: usize = 4_096;
/// Bytes of a probe; an agent answers nothing shorter than its answer.
const PROBE_BYTES: usize = 48;
/// Longest datagram that is looked at.
const ANSWER_BYTES_MAX: usize = 256;

/// Runs until it is aborted; ends at once where no pool probes.
pub(crate) async fn run(shared: Arc<Shared>) {
    let pools = (0..shared.pools.len()).filter_map(|place| Some((place, shared.registry.probes(place)?)));
    let mut pools: Vec<Probed> = pools.map(|(place, answers)| Probed::new(place, answers)).collect();
    if pools.is_empty() {
        return;
    }
    let Some(sockets) = Sockets::bind().await else { return };
    let mut terminated = std::pin::pin!(reached(shared.phase.clone(), Phase::Terminated));
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut on_their_way = OnTheirWay::default();
    let (mut v4, mut v6) = ([0; ANSWER_BYTES_MAX], [0; ANSWER_BYTES_MAX]);
    loop {
        tokio::select! {
            () = &mut terminated => return,
            _ = ticks.tick() => {
                let now = shared.clock.now();
                on_their_way.give_up(now);
                for pool in &mut pools {
                    pool.send(&shared, &sockets, &mut on_their_way, now);
                }
            }
            (length, from) = receive(sockets.v4.as_ref(), &mut v4) => {
                take_answer(&shared, &pools, &mut on_their_way, &v4[..length], from);
            }
            (length, from) = receive(sockets.v6.as_ref(), &mut v6) => {
                take_answer(&shared, &pools, &mut on_their_way, &v6[..length], from);
            }
        }
    }
}

async fn receive(socket: Option<&UdpSocket>, buffer: &mut [u8]) -> (usize, SocketAddr) {
    let Some(socket) = socket else { return std::future::pending().await };
    loop {
        // An error is a resource's ICMP refusal of an earlier probe: that probe times out by itself.
        if let Ok(received) = socket.recv_from(buffer).await {
            return received;
        }
        tokio::task::yield_now().await;
    }
}

fn take_answer(
    shared: &Shared,
    pools: &[Probed],
    on_their_way: &mut OnTheirWay,
    datagram: &[u8],
    from: SocketAddr,
) {
    let Ok(answer) = ProbeResponse::decode(datagram) else { return };
    let now = shared.clock.now();
    let Some(probe) = on_their_way.take(answer.nonce, from) else { return };
    shared.metrics.probe_answered();
    // `probe.pool` counts all pools, `pools` holds only those that probe.
    let Some(pool) = pools.iter().find(|pool| pool.place == probe.pool).filter(|_| answer.ready) else {
        return;
    };
    let took = u32::try_from(now.since(probe.sent).as_micros()).unwrap_or(u32::MAX);
    // Where the resource does not know how long it takes, the way there and back has to do.
    let latency = if answer.latency_micros == 0 { took } else { answer.latency_micros };
    let mut answers = pool.answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    answers.answer(probe.epoch, probe.index, answer.in_flight, latency, now);
}

/// One pool that probes.
struct Probed {
    place: usize,
    answers: Arc<SharedProbePool>,
    targets: ProbeTargets,
    targets_at: Timestamp,
    /// Flows that were opened until the last look.
    opened: u64,
    /// Whose turn it is: everyone is probed alike, and no two flows' probes go to the same.
    turn: usize,
    nonce: u64,
}

impl Probed {
    fn new(place: usize, answers: Arc<SharedProbePool>) -> Self {
        let targets = ProbeTargets { epoch: 0, addresses: Vec::new(), flows_opened: 0 };
        let nonce = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), place);
        Self { place, answers, targets, targets_at: Timestamp::ZERO, opened: 0, turn: 0, nonce }
    }

    fn send(&mut self, shared: &Shared, sockets: &Sockets, on_their_way: &mut OnTheirWay, now: Timestamp) {
        let flows = self.flows(shared, now);
        let wanted = {
            let mut answers = self.answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            answers.wanted(flows, now)
        };
        // One flow asks each resource once at most; several flows may ask the same one.
        let most =
            usize::try_from(flows.max(1)).unwrap_or(usize::MAX).saturating_mul(self.targets.addresses.len());
        for _ in 0..wanted.min(most) {
            // A stride that is prime to most counts: neighbours are not probed together.
            self.turn = self.turn.wrapping_add(7_919);
            let (index, address) = self.targets.addresses[self.turn % self.targets.addresses.len()];
            self.nonce =
                self.nonce.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let probe = Probe { pool: self.place, epoch: self.targets.epoch, index, address, sent: now };
            if on_their_way.probes.len() < ON_THEIR_WAY_MAX && sockets.send(address, self.nonce) {
                on_their_way.probes.insert(self.nonce, probe);
                shared.metrics.probe_sent();
            }
        }
    }

    /// Flows opened since the last look.
    fn flows(&mut self, shared: &Shared, now: Timestamp) -> u64 {
        let table = shared.pools[self.place].publishers[0].current();
        // Answers about former members are of no use: who has joined or left is known at once.
        let stale =
            now.since(self.targets_at) >= TARGETS_EVERY || table.members().epoch() != self.targets.epoch;
        let Some(targets) = stale.then(|| shared.registry.probe_targets(self.place)).flatten() else {
            return self.recount(&table);
        };
        (self.targets, self.targets_at) = (targets, now);
        let flows = self.targets.flows_opened.saturating_sub(self.opened);
        self.opened = self.targets.flows_opened;
        flows
    }

    fn recount(&mut self, table: &AllocationTable) -> u64 {
        let opened: u64 = table.members().backends().iter().map(|backend| backend.live.flows_opened()).sum();
        let flows = opened.saturating_sub(self.opened);
        self.opened = opened;
        flows
    }
}

#[derive(Debug, Clone, Copy)]
struct Probe {
    pool: usize,
    epoch: u64,
    index: BackendIndex,
    address: SocketAddr,
    sent: Timestamp,
}

#[derive(Default)]
struct OnTheirWay {
    probes: HashMap<u64, Probe>,
}

impl OnTheirWay {
    fn take(&mut self, nonce: u64, from: SocketAddr) -> Option<Probe> {
        let asked = self.probes.get(&nonce).is_some_and(|probe| probe.address == from);
        asked.then(|| self.probes.remove(&nonce)).flatten()
    }

    fn give_up(&mut self, now: Timestamp) {
        self.probes.retain(|_, probe| now.since(probe.sent) < ANSWER_WITHIN);
    }
}

struct Sockets {
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
}

impl Sockets {
    async fn bind() -> Option<Self> {
        let bind = |address: IpAddr| UdpSocket::bind((address, 0));
        let sockets = Self {
            v4: bind(Ipv4Addr::UNSPECIFIED.into()).await.ok(),
            v6: bind(Ipv6Addr::UNSPECIFIED.into()).await.ok(),
        };
        if sockets.v4.is_none() && sockets.v6.is_none() {
            tracing::warn!("no socket for probes: the policy prequal goes by flows open");
            return None;
        }
        Some(sockets)
    }

    /// False: it could not be sent now, and that one probe is left out.
    fn send(&self, to: SocketAddr, nonce: u64) -> bool {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        let mut request = ProbeRequest { nonce, padding: Vec::new() };
        // Two bytes are the key and the length of the padding itself.
        request.padding = vec![0; PROBE_BYTES.saturating_sub(request.encoded_len() + 2)];
        socket.as_ref().is_some_and(|socket| socket.try_send_to(&request.encode_to_vec(), to).is_ok())
    }
}
