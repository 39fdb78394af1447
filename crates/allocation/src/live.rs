//! What the dataplane knows first about a backend: shared, exact, outside the table.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::Timestamp;

/// First pause after a backend failed; doubles with each further failure, up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause: a backend that came back is found again within it.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Flows in a row that the backend reset before it sent a byte, after which it counts as failed: without it, a
/// backend that fails at once looks idle and draws everything (the "sinkhole" of the Prequal paper, NSDI'24).
const FAST_RESETS_MAX: u32 = 5;
/// How long the one flow that tries a paused backend may take before another may try.
const PROBE_PATIENCE: Duration = Duration::from_secs(5);

/// Facts about one backend that all workers write and control reads. One for each registration, handed out by `Arc`:
/// it outlives every table, so open flows stay counted after their resource has left.
///
/// Behind an `Arc` it takes 192 bytes (with malloc's header), of which a selection looks at the first 64 alone: no two backends
/// share a cache line, and the count of references, which every flow changes as well, is beside the facts. The next 64 are
/// written once or twice in a flow's life. Alignment would put it on lines of its own, and what selections look at of a
/// pool of 10,000 would no longer fit a core's second-level cache.
#[derive(Debug, Default)]
#[repr(C)]
pub struct LiveFacts {
    flows_open: AtomicU32,
    /// Connects that failed in a row; 0: healthy, and then nothing else here is looked at.
    failures_in_a_row: AtomicU32,
    fast_resets_in_a_row: AtomicU32,
    /// What the last failure was: [`REFUSED`], [`TIMED_OUT`] or [`RESET`].
    failure: AtomicU32,
    paused_until_ms: AtomicU64,
    /// Peak-sensitive average of the time to the first byte: microseconds as `f32` bits, and the millisecond (low 32 bits) of
    /// its last change. 0: nothing was measured.
    latency: AtomicU64,
    flows_opened: AtomicU64,
    fast_resets: AtomicU64,
    connect_failures: AtomicU64,
    /// After its first byte.
    resets: AtomicU64,
    connect_micros: AtomicU64,
    first_bytes: AtomicU64,
    first_byte_micros: AtomicU64,
    bytes_to_client: AtomicU64,
    bytes_to_backend: AtomicU64,
    _apart: [u64; 8],
}

/// An `Arc` adds two counts of 8 bytes, malloc a header of 8.
const _: () = assert!(size_of::<LiveFacts>() + 16 + 8 == 192);

/// What failed last. Only refusal is certain knowledge; the others may be load.
const REFUSED: u32 = 0;
const TIMED_OUT: u32 = 1;
const RESET: u32 = 2;
/// Time constant of the average of latency (Finagle's and Linkerd's).
const LATENCY_OVER_MS: f32 = 10_000.0;

/// What was counted of one backend since its registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FlowTotals {
    /// Flows opened (connected).
    pub flows_opened: u64,
    /// Flows open now.
    pub flows_open: u64,
    /// Connects that failed.
    pub connect_failures: u64,
    /// Flows that the backend reset, before or after its first byte.
    pub resets: u64,
    /// Sum of the times that connects took, in microseconds.
    pub connect_micros: u64,
    /// Flows whose backend sent a first byte.
    pub first_bytes: u64,
    /// Sum of the times that those took from what the client said first (or from the connect, where the backend speaks
    /// first), in microseconds.
    pub first_byte_micros: u64,
    /// Bytes delivered to clients.
    pub bytes_to_client: u64,
    /// Bytes delivered to the backend.
    pub bytes_to_backend: u64,
}

impl std::ops::AddAssign for FlowTotals {
    fn add_assign(&mut self, other: Self) {
        self.flows_opened += other.flows_opened;
        self.flows_open += other.flows_open;
        self.connect_failures += other.connect_failures;
        self.resets += other.resets;
        self.connect_micros += other.connect_micros;
        self.first_bytes += other.first_bytes;
        self.first_byte_micros += other.first_byte_micros;
        self.bytes_to_client += other.bytes_to_client;
        self.bytes_to_backend += other.bytes_to_backend;
    }
}

/// Why a connect to a backend failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectFailure {
    /// It said no (`ECONNREFUSED`), or the network did (`EHOSTUNREACH`, `ENETUNREACH`).
    Refused,
    /// It did not answer within the connect timeout.
    TimedOut,
}

/// Whether a backend may be given a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Usable,
    /// It failed and its pause is over: one flow may try it (see [`LiveFacts::claim_probe`]).
    Probe,
    /// It could not be reached and its pause is not over.
    Paused,
    /// It timed out, and its pause is not over. Unlike a refused connect that may be load: where most of a pool is ejected, or
    /// all of it is saturated, that is ignored.
    Ejected,
    /// It reset flows before it answered, several in a row, and its pause is not over. Where most of a pool does, that is ignored;
    /// in a saturated pool it is not: a resource that fails at once would draw what the others cannot take.
    Resetting,
    /// It has as many flows as it takes.
    Full,
}

impl LiveFacts {
    /// Flows open now.
    pub fn flows_open(&self) -> u32 {
        self.flows_open.load(Relaxed)
    }

    /// Flows opened (connected) since registration.
    pub fn flows_opened(&self) -> u64 {
        self.flows_opened.load(Relaxed)
    }

    /// Connects that failed since registration.
    pub fn connect_failures(&self) -> u64 {
        self.connect_failures.load(Relaxed)
    }

    /// Flows that the backend reset before it sent a byte, since registration.
    pub fn fast_resets(&self) -> u64 {
        self.fast_resets.load(Relaxed)
    }

    /// Whether it failed and is being left alone, or tried one flow at a time.
    pub fn is_down(&self) -> bool {
        self.failures_in_a_row.load(Relaxed) > 0
    }

    /// Whether it reset its newest flows before it answered.
    pub fn is_resetting(&self) -> bool {
        self.fast_resets_in_a_row.load(Relaxed) > 0
    }

    /// Whether it may be given one more flow, when it takes `flows_max` (0: no limit).
    pub fn verdict(&self, flows_max: u32, now: Timestamp) -> Verdict {
        if flows_max != 0 && self.flows_open() >= flows_max {
            return Verdict::Full;
        }
        if self.failures_in_a_row.load(Relaxed) == 0 {
            return Verdict::Usable;
        }
        if now.as_millis() >= self.paused_until_ms.load(Relaxed) {
            return Verdict::Probe;
        }
        match self.failure.load(Relaxed) {
            TIMED_OUT => Verdict::Ejected,
            RESET => Verdict::Resetting,
            _ => Verdict::Paused,
        }
    }

    /// Peak-sensitive average of the time to the first byte, in microseconds, as of now: a slower answer counts at once, a faster
    /// one and silence bring it down within some ten seconds (Finagle's Peak EWMA). `None`: nothing was measured.
    pub fn latency_micros(&self, now: Timestamp) -> Option<f32> {
        let packed = self.latency.load(Relaxed);
        (packed != 0).then(|| f32::from_bits((packed >> 32) as u32) * decay(packed as u32, now))
    }

    /// All counts since registration.
    pub fn totals(&self) -> FlowTotals {
        FlowTotals {
            flows_opened: self.flows_opened(),
            flows_open: u64::from(self.flows_open()),
            connect_failures: self.connect_failures(),
            resets: self.resets.load(Relaxed) + self.fast_resets(),
            connect_micros: self.connect_micros.load(Relaxed),
            first_bytes: self.first_bytes.load(Relaxed),
            first_byte_micros: self.first_byte_micros.load(Relaxed),
            bytes_to_client: self.bytes_to_client.load(Relaxed),
            bytes_to_backend: self.bytes_to_backend.load(Relaxed),
        }
    }

    /// Two workers that measure at once may lose one of the two: it is an average.
    fn record_latency(&self, micros: f32, now: Timestamp) {
        let packed = self.latency.load(Relaxed);
        let before = f32::from_bits((packed >> 32) as u32);
        let kept = decay(packed as u32, now);
        let average =
            if packed == 0 || micros > before { micros } else { before * kept + micros * (1.0 - kept) };
        // At least one bit set: 0 stands for nothing measured.
        let low = (now.as_millis() as u32) | 1;
        self.latency.store(u64::from(average.to_bits()) << 32 | u64::from(low), Relaxed);
    }

    /// Takes the right to try a backend whose pause is over. One caller gets it; the others see it paused again until
    /// the result is known, or [`PROBE_PATIENCE`] has passed.
    pub fn claim_probe(&self, now: Timestamp) -> bool {
        let seen = self.paused_until_ms.load(Relaxed);
        let until = (now + PROBE_PATIENCE).as_millis();
        now.as_millis() >= seen
            && self.paused_until_ms.compare_exchange(seen, until, Relaxed, Relaxed).is_ok()
    }

    /// Counts a flow from its selection on; it is counted as long as the guard lives.
    pub fn open_flow(self: &Arc<Self>) -> OpenFlow {
        self.flows_open.fetch_add(1, Relaxed);
        OpenFlow { live: Arc::clone(self) }
    }

    fn pause(&self, failure: u32, now: Timestamp) {
        self.failure.store(failure, Relaxed);
        let failures = self.failures_in_a_row.fetch_add(1, Relaxed);
        let pause = PAUSE_FIRST.saturating_mul(1 << failures.min(5)).min(PAUSE_MAX);
        self.paused_until_ms.store((now + pause).as_millis(), Relaxed);
    }
}

/// What is left of an average after the time since it changed.
fn decay(changed_ms: u32, now: Timestamp) -> f32 {
    let elapsed = (now.as_millis() as u32).wrapping_sub(changed_ms);
    // A worker whose clock is a little behind sees a change in the future: none has passed.
    let elapsed = if elapsed > u32::MAX / 2 { 0 } else { elapsed };
    (-(elapsed as f32) / LATENCY_OVER_MS).exp()
}

/// One flow, counted on its backend. Dropping it is the only way to uncount it.
#[derive(Debug)]
pub struct OpenFlow {
    live: Arc<LiveFacts>,
}

impl OpenFlow {
    /// The backend accepted the connection.
    pub fn connected(&self) {
        self.opened();
        self.reached();
    }

    /// The flow is given to the backend, which says nothing to that (UDP).
    pub fn opened(&self) {
        self.live.flows_opened.fetch_add(1, Relaxed);
    }

    /// The backend can be reached.
    pub fn reached(&self) {
        // A load first: writing the line on every connect would bounce it between the workers.
        let by_connects = self.live.fast_resets_in_a_row.load(Relaxed) < FAST_RESETS_MAX;
        if by_connects && self.live.failures_in_a_row.load(Relaxed) != 0 {
            self.live.failures_in_a_row.store(0, Relaxed);
        }
    }

    /// The backend sent its first byte, or ended in good order: it works.
    pub fn answered(&self) {
        if self.live.fast_resets_in_a_row.load(Relaxed) != 0 {
            self.live.fast_resets_in_a_row.store(0, Relaxed);
            self.live.failures_in_a_row.store(0, Relaxed);
        }
    }

    /// The backend reset the connection before it sent a byte.
    pub fn reset_before_answer(&self, now: Timestamp) {
        self.live.fast_resets.fetch_add(1, Relaxed);
        if self.live.fast_resets_in_a_row.fetch_add(1, Relaxed) + 1 >= FAST_RESETS_MAX {
            self.live.pause(RESET, now);
        }
    }

    /// How long the connect took.
    pub fn connect_took(&self, micros: u64) {
        self.live.connect_micros.fetch_add(micros, Relaxed);
    }

    /// How long the backend took to its first byte: from what the client said first, or from the connect where the backend
    /// speaks first.
    pub fn first_byte_took(&self, micros: u64, now: Timestamp) {
        self.live.first_bytes.fetch_add(1, Relaxed);
        self.live.first_byte_micros.fetch_add(micros, Relaxed);
        self.live.record_latency(micros as f32, now);
    }

    /// The backend reset the connection after it had sent something.
    pub fn reset_after_answer(&self) {
        self.live.resets.fetch_add(1, Relaxed);
    }

    /// Bytes delivered, since the last call.
    pub fn moved_bytes(&self, to_client: u64, to_backend: u64) {
        self.live.bytes_to_client.fetch_add(to_client, Relaxed);
        self.live.bytes_to_backend.fetch_add(to_backend, Relaxed);
    }

    /// The facts of the backend it is on.
    pub fn live(&self) -> &Arc<LiveFacts> {
        &self.live
    }

    /// The connect failed: the backend is left alone for a growing while.
    pub fn connect_failed(&self, failure: ConnectFailure, now: Timestamp) {
        let failure = match failure {
            ConnectFailure::Refused => REFUSED,
            ConnectFailure::TimedOut => TIMED_OUT,
        };
        self.live.connect_failures.fetch_add(1, Relaxed);
        self.live.pause(failure, now);
    }
}

impl Drop for OpenFlow {
    fn drop(&mut self) {
        self.live.flows_open.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn a_guard_counts_its_flow_until_dropped() {
        let live = Arc::new(LiveFacts::default());
        let (a, b) = (live.open_flow(), live.open_flow());
        assert_eq!(live.flows_open(), 2);
        assert_eq!(live.verdict(2, at(0)), Verdict::Full);
        drop(a);
        b.connect_failed(ConnectFailure::Refused, at(0));
        drop(b);
        assert_eq!(live.flows_open(), 0);
    }

    #[test]
    fn a_refused_connect_pauses_and_one_flow_probes() {
        let live = Arc::new(LiveFacts::default());
        live.open_flow().connect_failed(ConnectFailure::Refused, at(0));
        assert_eq!(live.verdict(0, at(999)), Verdict::Paused);
        assert_eq!(live.verdict(0, at(1_000)), Verdict::Probe);
        assert!(live.claim_probe(at(1_000)));
        assert!(!live.claim_probe(at(1_000)), "only one flow tries");
        assert_eq!(live.verdict(0, at(1_000)), Verdict::Paused);
        live.open_flow().connect_failed(ConnectFailure::TimedOut, at(1_010));
        assert_eq!(live.verdict(0, at(3_009)), Verdict::Ejected, "the second pause is twice as long");
        assert_eq!(live.verdict(0, at(3_010)), Verdict::Probe);
        assert!(live.claim_probe(at(3_010)));
        live.open_flow().connected();
        assert_eq!(live.verdict(0, at(3_010)), Verdict::Usable);
    }

    #[test]
    fn pauses_are_bounded() {
        let live = Arc::new(LiveFacts::default());
        for _ in 0..100 {
            live.open_flow().connect_failed(ConnectFailure::Refused, at(0));
        }
        assert_eq!(live.verdict(0, at(30_000)), Verdict::Probe);
    }

    #[test]
    fn a_backend_that_accepts_and_resets_is_paused() {
        let live = Arc::new(LiveFacts::default());
        for n in 1..=5 {
            assert_eq!(live.verdict(0, at(0)), Verdict::Usable, "before reset {n}");
            let flow = live.open_flow();
            flow.connected();
            flow.reset_before_answer(at(0));
        }
        assert_eq!(live.verdict(0, at(0)), Verdict::Resetting);
        // Accepting alone does not clear it: that is all a sinkhole ever does. An answer does.
        let flow = live.open_flow();
        flow.connected();
        assert!(live.is_down());
        flow.answered();
        assert_eq!(live.verdict(0, at(0)), Verdict::Usable);
    }

    #[test]
    fn latency_rises_at_once_and_falls_slowly() {
        let live = Arc::new(LiveFacts::default());
        assert_eq!(live.latency_micros(at(5)), None);
        let flow = live.open_flow();
        flow.first_byte_took(1_000, at(0));
        flow.first_byte_took(9_000, at(10));
        assert!(live.latency_micros(at(10)).is_some_and(|micros| micros > 8_990.0));
        flow.first_byte_took(1_000, at(20));
        let after = live.latency_micros(at(20)).unwrap();
        assert!((8_900.0..9_000.0).contains(&after), "{after}");
        let silent = live.latency_micros(at(30_020)).unwrap();
        assert!((silent / after - (-3.0_f32).exp()).abs() < 1e-3, "{silent}");
    }

    #[test]
    fn totals_are_sums_since_registration() {
        let live = Arc::new(LiveFacts::default());
        let flow = live.open_flow();
        flow.connected();
        flow.connect_took(150);
        flow.first_byte_took(900, at(1));
        flow.moved_bytes(10, 20);
        flow.moved_bytes(1, 2);
        flow.reset_after_answer();
        flow.reset_before_answer(at(2));
        let mut sum = live.totals();
        sum += live.totals();
        let expected = FlowTotals {
            flows_opened: 2,
            flows_open: 2,
            connect_failures: 0,
            resets: 4,
            connect_micros: 300,
            first_bytes: 2,
            first_byte_micros: 1_800,
            bytes_to_client: 22,
            bytes_to_backend: 44,
        };
        assert_eq!(sum, expected);
    }
}
