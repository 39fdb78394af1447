//! How much one peer may do: registrations a second, streams, connections.
//!
//! A peer is an address (an IPv6 /64, which is what one host is given) with who it proved to be. What is kept of peers is
//! bounded: at the bound, peers that are at rest are forgotten, and if none is, the newcomers share one entry.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use allocation::Timestamp;
use registry::Owner;

use super::refusal::Reason;

/// Most peers that something is kept of; some 200 bytes each.
const PEERS_MAX: usize = 20_000;
/// A look for peers at rest goes through all of them, so it is not done for each newcomer.
const PURGE_EVERY: Duration = Duration::from_secs(1);
/// A burst is what so many seconds bring.
const BURST_SECONDS: u64 = 10;
/// All of this host's programs that speak clear text are one peer: it may have every connection that there may be.
const LOCAL_FACTOR: u32 = 40;
/// A peer's refusals are logged so often, once for each reason; the others are counted.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// How much one peer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLimits {
    /// Registrations a second that it may make for long; ten times as many at once.
    pub registrations_per_second: u32,
    /// Streams of reports at once.
    pub streams: u32,
    /// Connections at once, and new ones a second for long; ten times as many new ones at once.
    pub connections: u32,
}

impl Default for PeerLimits {
    fn default() -> Self {
        Self { registrations_per_second: 200, streams: 4_096, connections: 256 }
    }
}

impl PeerLimits {
    /// For clear text on loopback.
    pub(super) fn local(self) -> Self {
        let times = |limit: u32| limit.saturating_mul(LOCAL_FACTOR);
        Self {
            registrations_per_second: times(self.registrations_per_second),
            streams: times(self.streams),
            connections: times(self.connections),
        }
    }
}

/// Who is counted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct PeerKey {
    ip: IpAddr,
    owner: Option<Owner>,
}

impl PeerKey {
    pub(crate) fn new(ip: IpAddr, owner: Option<Owner>) -> Self {
        Self { ip: network(ip), owner }
    }

    /// What newcomers share when there is no room.
    fn others() -> Self {
        Self { ip: IpAddr::V6(Ipv6Addr::UNSPECIFIED), owner: None }
    }
}

/// What one host is given: an address, or a /64 (RFC 4291 §2.5.1).
fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

/// A bucket of registrations, full at first, that fills with time.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// In thousandths: what one millisecond at one a second brings.
    left: u64,
    at: Timestamp,
}

impl Bucket {
    fn full(rate: u32, now: Timestamp) -> Self {
        Self { left: Self::size(rate), at: now }
    }

    fn size(rate: u32) -> u64 {
        u64::from(rate) * BURST_SECONDS * 1_000
    }

    fn fill(&mut self, rate: u32, now: Timestamp) {
        let elapsed = now.as_millis().saturating_sub(self.at.as_millis());
        let brought = elapsed.saturating_mul(u64::from(rate));
        self.left = self.left.saturating_add(brought).min(Self::size(rate));
        self.at = now;
    }

    fn take(&mut self, rate: u32, now: Timestamp) -> bool {
        self.fill(rate, now);
        let left = self.left.checked_sub(1_000);
        self.left = left.unwrap_or(self.left);
        left.is_some()
    }
}

#[derive(Debug)]
struct State {
    rate: u32,
    registrations: Bucket,
    /// `None`: there was none yet.
    new_connections: Option<Bucket>,
    streams: u32,
    connections: u32,
    logged: Option<Timestamp>,
    /// The reasons that were, since then: a bit each.
    reasons: u32,
    unlogged: u64,
}

impl State {
    fn is_at_rest(&mut self, now: Timestamp) -> bool {
        self.registrations.fill(self.rate, now);
        let quiet = self.logged.is_none_or(|at| now.since(at) >= LOG_EVERY);
        // What it has left of new connections fills as fast as a burst's seconds pass.
        let rested = self
            .new_connections
            .is_none_or(|bucket| now.since(bucket.at) >= Duration::from_secs(BURST_SECONDS));
        self.streams == 0
            && self.connections == 0
            && quiet
            && rested
            && self.registrations.left == Bucket::size(self.rate)
    }
}

#[derive(Debug, Default)]
struct Table {
    peers: HashMap<PeerKey, State>,
    purged: Option<Timestamp>,
}

/// What every peer does now.
#[derive(Debug, Default)]
pub(crate) struct Peers(Arc<Mutex<Table>>);

/// What a peer has open, counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Open {
    table: Arc<Mutex<Table>>,
    key: PeerKey,
    of: Kind,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Connection,
    Stream,
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(state) = lock(&self.table).peers.get_mut(&self.key) {
            let count = counter(state, self.of);
            *count = count.saturating_sub(1);
        }
    }
}

fn counter(state: &mut State, of: Kind) -> &mut u32 {
    match of {
        Kind::Connection => &mut state.connections,
        Kind::Stream => &mut state.streams,
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    // A panic under the lock is a fault of ours; the counts are still the best there are.
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Peers {
    /// Whether a peer may make one more registration now.
    pub(crate) fn may_register(&self, key: &PeerKey, rate: u32, now: Timestamp) -> bool {
        let mut table = lock(&self.0);
        let (_, state) = table.of(key, rate, now);
        state.registrations.take(rate, now)
    }

    /// Whether a peer may make one more connection now, at this rate of new ones.
    pub(crate) fn may_connect(&self, key: &PeerKey, new_rate: u32, rate: u32, now: Timestamp) -> bool {
        let mut table = lock(&self.0);
        let (_, state) = table.of(key, rate, now);
        let bucket = state.new_connections.get_or_insert_with(|| Bucket::full(new_rate, now));
        bucket.take(new_rate, now)
    }

    /// Counts a connection or a stream, unless there are `max` already.
    pub(crate) fn open(&self, key: &PeerKey, of: Kind, max: u32, rate: u32, now: Timestamp) -> Option<Open> {
        let mut table = lock(&self.0);
        let (key, state) = table.of(key, rate, now);
        let count = counter(state, of);
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(Open { table: Arc::clone(&self.0), key, of })
    }

    /// Whether a refusal of this peer is worth a line in the log now, and how many since the last line were not.
    pub(crate) fn is_worth_a_line(
        &self,
        key: &PeerKey,
        rate: u32,
        reason: Reason,
        now: Timestamp,
    ) -> Option<u64> {
        let mut table = lock(&self.0);
        let (_, state) = table.of(key, rate, now);
        if state.logged.is_none_or(|at| now.since(at) >= LOG_EVERY) {
            (state.logged, state.reasons) = (Some(now), 0);
        }
        let bit = 1 << reason as u32;
        if state.reasons & bit != 0 {
            state.unlogged += 1;
            return None;
        }
        state.reasons |= bit;
        Some(std::mem::take(&mut state.unlogged))
    }
}

impl Table {
    fn of(&mut self, key: &PeerKey, rate: u32, now: Timestamp) -> (PeerKey, &mut State) {
        if self.peers.len() >= PEERS_MAX
            && !self.peers.contains_key(key)
            && self.purged.is_none_or(|at| now.since(at) >= PURGE_EVERY)
        {
            self.purged = Some(now);
            self.peers.retain(|_, state| !state.is_at_rest(now));
        }
        let has_place = self.peers.len() < PEERS_MAX || self.peers.contains_key(key);
        let key = if has_place { key.clone() } else { PeerKey::others() };
        let state = self.peers.entry(key.clone()).or_insert_with(|| State {
            rate,
            registrations: Bucket::full(rate, now),
            new_connections: None,
            streams: 0,
            connections: 0,
            logged: None,
            reasons: 0,
            unlogged: 0,
        });
        (key, state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> PeerKey {
        PeerKey::new(text.parse().unwrap(), None)
    }

    #[test]
    fn a_flood_of_one_peer_is_not_anothers() {
        let at = Timestamp::from_millis;
        let peers = Peers::default();
        let (flooding, other) = (key("192.0.2.1"), key("192.0.2.2"));
        let second =
            |from: u64| (0..10_000).filter(|n| peers.may_register(&flooding, 200, at(from + n / 10))).count();
        assert_eq!(second(0), 2_000 + 199, "the burst, and what a second brings");
        assert!((200..=201).contains(&second(1_000)), "a flood stays at the rate");
        assert!(peers.may_register(&other, 200, at(2_000)));
        let named = PeerKey::new("192.0.2.1".parse().unwrap(), Some(Owner::new("a")));
        assert!(peers.may_register(&named, 200, at(2_000)), "who proves a name is counted by it");
    }

    #[test]
    fn a_network_of_ipv6_is_one_peer() {
        assert_eq!(key("2001:db8::1"), key("2001:db8::ffff:1"));
        assert_ne!(key("2001:db8::1"), key("2001:db8:0:1::1"));
        assert_eq!(key("::ffff:192.0.2.1"), key("192.0.2.1"));
    }

    #[test]
    fn what_is_open_is_counted_until_it_is_dropped() {
        let now = Timestamp::from_millis(1);
        let peers = Peers::default();
        let open = |of| peers.open(&key("192.0.2.1"), of, 2, 1, now);
        let first = open(Kind::Stream).unwrap();
        let second = open(Kind::Stream).unwrap();
        assert!(open(Kind::Stream).is_none());
        let connection = open(Kind::Connection);
        assert!(connection.is_some(), "each by itself");
        drop(first);
        assert!(open(Kind::Stream).is_some());
        drop(second);
    }

    #[test]
    fn peers_without_number_take_no_memory_without_number() {
        let at = Timestamp::from_millis;
        let peers = Peers::default();
        let nth = |n: u32| PeerKey::new(std::net::Ipv4Addr::from_bits(n).into(), None);
        for n in 1..=30_000 {
            peers.may_register(&nth(n), 1, at(0));
        }
        assert!(lock(&peers.0).peers.len() <= PEERS_MAX + 1);
        let shared = peers.open(&nth(40_000), Kind::Stream, 1, 1, at(0));
        assert!(shared.is_some());
        assert!(peers.open(&nth(40_001), Kind::Stream, 1, 1, at(0)).is_none(), "the newcomers share");
        // Long after, they are at rest.
        assert!(peers.open(&nth(40_001), Kind::Stream, 1, 1, at(3_600_000)).is_some());
        assert!(lock(&peers.0).peers.len() <= 2);
    }

    #[test]
    fn one_line_in_ten_seconds() {
        let at = Timestamp::from_millis;
        let peers = Peers::default();
        let worth = |reason, ms| peers.is_worth_a_line(&key("192.0.2.1"), 1, reason, at(ms));
        assert_eq!(worth(Reason::Pool, 0), Some(0));
        assert_eq!((worth(Reason::Pool, 1), worth(Reason::Pool, 9_999)), (None, None));
        assert_eq!(worth(Reason::Connections, 9_999), Some(2), "another reason is news");
        assert_eq!(worth(Reason::Pool, 10_000), Some(0));
    }
}
