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
/// Behind an `Arc` it takes 128 bytes (with malloc's header), and only the first 64 are ever written: no two backends share
/// a cache line, and the count of references, which every flow changes as well, is beside the facts. Alignment would
/// put it on a line of its own, and a pool of 10,000 would no longer fit a core's second-level cache.
#[derive(Debug, Default)]
#[repr(C)]
pub struct LiveFacts {
    flows_open: AtomicU32,
    /// Connects that failed in a row; 0: healthy, and then nothing else here is looked at.
    failures_in_a_row: AtomicU32,
    fast_resets_in_a_row: AtomicU32,
    paused_until_ms: AtomicU64,
    flows_opened: AtomicU64,
    connect_failures: AtomicU64,
    fast_resets: AtomicU64,
    _apart: [u64; 7],
}

/// An `Arc` adds two counts of 8 bytes, malloc a header of 8.
const _: () = assert!(size_of::<LiveFacts>() + 16 + 8 == 128);

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
    /// It failed and its pause is not over.
    Paused,
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

    /// Whether it may be given one more flow, when it takes `flows_max` (0: no limit).
    pub fn verdict(&self, flows_max: u32, now: Timestamp) -> Verdict {
        if flows_max != 0 && self.flows_open() >= flows_max {
            return Verdict::Full;
        }
        if self.failures_in_a_row.load(Relaxed) == 0 {
            return Verdict::Usable;
        }
        if now.as_millis() >= self.paused_until_ms.load(Relaxed) { Verdict::Probe } else { Verdict::Paused }
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

    fn pause(&self, now: Timestamp) {
        let failures = self.failures_in_a_row.fetch_add(1, Relaxed);
        let pause = PAUSE_FIRST.saturating_mul(1 << failures.min(5)).min(PAUSE_MAX);
        self.paused_until_ms.store((now + pause).as_millis(), Relaxed);
    }
}

/// One flow, counted on its backend. Dropping it is the only way to uncount it.
#[derive(Debug)]
pub struct OpenFlow {
    live: Arc<LiveFacts>,
}

impl OpenFlow {
    /// The backend accepted the connection.
    pub fn connected(&self) {
        self.live.flows_opened.fetch_add(1, Relaxed);
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
            self.live.pause(now);
        }
    }

    /// The facts of the backend it is on.
    pub fn live(&self) -> &Arc<LiveFacts> {
        &self.live
    }

    /// The connect failed: the backend is left alone for a growing while.
    pub fn connect_failed(&self, failure: ConnectFailure, now: Timestamp) {
        let _ = failure; // Both are counted alike today; the reason is kept at the call for the flow's own metric.
        self.live.connect_failures.fetch_add(1, Relaxed);
        self.live.pause(now);
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
        assert_eq!(live.verdict(0, at(3_009)), Verdict::Paused, "the second pause is twice as long");
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
        assert_eq!(live.verdict(0, at(0)), Verdict::Paused);
        // Accepting alone does not clear it: that is all a sinkhole ever does. An answer does.
        let flow = live.open_flow();
        flow.connected();
        assert!(live.is_down());
        flow.answered();
        assert_eq!(live.verdict(0, at(0)), Verdict::Usable);
    }
}
