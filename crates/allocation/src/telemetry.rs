//! What the dataplane tells control about itself, as values: control reads them when something scrapes or asks.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::Decision;

/// Upper bounds, in seconds, of the buckets of connect times. From a loopback connect to the longest connect timeout
/// anyone should wait for.
pub const CONNECT_SECONDS: [f64; 15] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
/// Upper bounds, in seconds, of the buckets of a flow's length: from one short query to a day on XMPP.
pub const FLOW_SECONDS: [f64; 15] =
    [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 14_400.0, 86_400.0];

/// A counter with one writer: a worker. Everyone may read it.
///
/// A load and a store instead of an atomic addition: with one writer they count the same, and cost what a plain
/// addition costs.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning worker may call it; a second writer would lose counts (never memory safety).
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Sets a gauge.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// The count.
    pub fn read(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A histogram with one writer: a worker.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64; 15],
    /// Not cumulative; the last is for what is above all bounds.
    buckets: [Counter; 16],
    /// In microseconds.
    sum: Counter,
}

impl Histogram {
    /// An empty histogram with these upper bounds in seconds.
    pub fn new(bounds: &'static [f64; 15]) -> Self {
        Self { bounds, buckets: Default::default(), sum: Counter::default() }
    }

    /// Counts one value, in microseconds. Only the owning worker may call it.
    pub fn record(&self, micros: u64) {
        let seconds = micros as f64 * 1e-6;
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound).unwrap_or(self.bounds.len());
        self.buckets[bucket].add(1);
        self.sum.add(micros);
    }

    /// What was recorded.
    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            bounds: self.bounds,
            counts: self.buckets.iter().map(Counter::read).collect(),
            sum_seconds: self.sum.read() as f64 * 1e-6,
        }
    }
}

/// A histogram's values at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct HistogramSnapshot {
    /// Upper bounds of the buckets in seconds, ascending.
    pub bounds: &'static [f64],
    /// Values in each bucket, not cumulative; one more than `bounds`, for what is above them.
    pub counts: Vec<u64>,
    /// Sum of all values, in seconds.
    pub sum_seconds: f64,
}

impl HistogramSnapshot {
    /// Adds another worker's.
    ///
    /// # Panics
    /// If the bounds differ.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.bounds, other.bounds, "histograms of one metric have the same buckets");
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.sum_seconds += other.sum_seconds;
    }
}

/// A pool that serves flows of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetSnapshot {
    /// Its name.
    pub pool: String,
    /// Flows that the listener's routes gave to it.
    pub flows: u64,
}

/// One listener's counts, summed over the workers.
#[derive(Debug, Clone, PartialEq)]
pub struct ListenerSnapshot {
    /// `tcp://127.0.0.1:5432`, with the port that was really bound.
    pub name: String,
    /// `tcp`.
    pub protocol: &'static str,
    /// The pools that it serves. The first gets what no route gives to another one.
    pub targets: Vec<TargetSnapshot>,
    /// Whether it has routes: without them the targets' flows are not counted.
    pub has_routes: bool,
    /// Flows accepted from clients.
    pub flows_opened: u64,
    /// Flows open now.
    pub flows_open: u64,
    /// Bytes delivered to backends.
    pub bytes_to_backend: u64,
    /// Bytes delivered to clients.
    pub bytes_to_client: u64,
    /// Connects that failed and were tried on another backend.
    pub connect_retries: u64,
    /// Flows ended, by reason: a closed set of words.
    pub flows_closed: Vec<(&'static str, u64)>,
    /// Flows refused at a bound, by reason: a closed set of words.
    pub sheds: Vec<(&'static str, u64)>,
    /// Selections with affinity, by what it had to do with them: a closed set of words.
    pub affinity: Vec<(&'static str, u64)>,
    /// Flows that waited for room.
    pub flows_queued: u64,
    /// Flows that wait for room now.
    pub flows_waiting: u64,
    /// Time from the select to the established backend connection.
    pub connect_seconds: HistogramSnapshot,
    /// Time from accept to close.
    pub flow_seconds: HistogramSnapshot,
}

/// What the kernel refused connections to the resources of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionsRefused {
    /// The pool.
    pub pool: String,
    /// By option: a closed set of words.
    pub counts: Vec<(&'static str, u64)>,
}

impl ListenerSnapshot {
    /// The pool of a target; that of the first for one that there is not.
    pub fn pool(&self, target: u16) -> &str {
        let target = self.targets.get(usize::from(target)).or_else(|| self.targets.first());
        target.map_or("", |target| &target.pool)
    }
}

/// The engine that moves the bytes, and what it holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EngineSnapshot {
    /// `uring`, `tokio-uring` or `epoll`.
    pub engine: &'static str,
    /// Why it was taken: `configured`, `probed` (it is the best, and works), or what a better one lacks: `uring_forbidden`,
    /// `uring_missing`, `uring_too_old`, `uring_memory`, `uring_broken`, `uring_failed`.
    pub reason: &'static str,
    /// Worker threads.
    pub workers: usize,
    /// Receive buffers that exist, over all workers.
    pub buffers: u64,
    /// Receive buffers that hold bytes on their way.
    pub buffers_in_use: u64,
    /// Bytes of one buffer.
    pub buffer_bytes: u64,
    /// System calls made to submit and wait.
    pub enters: u64,
    /// Completions handled.
    pub completions: u64,
    /// Times that a receive found no buffer and had to wait.
    pub buffer_waits: u64,
    /// Bytes that were moved in the kernel, without passing through a buffer.
    pub spliced_bytes: u64,
    /// Completions that came when the completion queue was full (the kernel keeps them; the queue is too small).
    pub completion_overflows: u64,
    /// Selections that ignored ejections because most were ejected.
    pub ejections_ignored: u64,
    /// Lines written to the access log.
    pub access_log_written: u64,
    /// Lines that the access log lost.
    pub access_log_lost: u64,
}

/// How control looks at the dataplane without knowing it.
pub trait DataplaneView: Send + Sync {
    /// Every listener, in configuration order.
    fn listeners(&self) -> Vec<ListenerSnapshot>;
    /// The engine.
    fn engine(&self) -> EngineSnapshot;
    /// Options that connections to resources went without, by pool. None where there are no options.
    fn options_refused(&self) -> Vec<OptionsRefused> {
        Vec::new()
    }
    /// The newest selections, newest first, at most so many. Those by large tables are kept in smaller number.
    fn decisions(&self, last: usize) -> Vec<Decision>;
    /// The sampled selections since the last call, oldest first, and how many of them found no room and are lost.
    fn take_sampled_decisions(&self) -> (Vec<Decision>, u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_keeps_every_value() {
        let histogram = Histogram::new(&CONNECT_SECONDS);
        for micros in [0, 100, 101, 5_000_000, 5_000_001] {
            histogram.record(micros);
        }
        let mut all = histogram.snapshot();
        assert_eq!((all.counts[0], all.counts[1], all.counts[14], all.counts[15]), (2, 1, 1, 1));
        all.merge(&histogram.snapshot());
        assert_eq!(all.counts.iter().sum::<u64>(), 10);
        assert!((all.sum_seconds - 20.000_404).abs() < 1e-9);
    }
}
