//! Small exchanges on flows that stay open, whose time is taken: how others fare beside what a scenario does.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use super::client::{begin, connect};
use super::order::{Fault, Manner, Order, Pace, receive, send};

/// Flows that ping.
const FLOWS: u64 = 20;
/// Between two pings of a flow.
const EVERY: Duration = Duration::from_millis(50);
/// Longest wait for an answer, and for a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of a ping and of its answer.
const BYTES: u64 = 64;
/// Ids of pings are no others.
static NEXT_ID: AtomicU64 = AtomicU64::new(1 << 50);

/// What pings found.
pub(super) struct Pings {
    /// In microseconds.
    pub(super) latency: Histogram<u64>,
    pub(super) faults: Vec<Fault>,
}

impl Pings {
    pub(super) fn millis(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1e3
    }
}

/// Pings for so long.
pub(super) async fn ping(target: SocketAddr, length: Duration) -> Pings {
    let mut flows = JoinSet::new();
    for n in 0..FLOWS {
        // Evenly apart, not all at once.
        let first = tokio::time::Instant::now() + EVERY.mul_f64(n as f64 / FLOWS as f64);
        let rounds = (length.as_millis() / EVERY.as_millis()).max(1) as u32;
        flows.spawn(one(target, first, rounds));
    }
    let latency = Histogram::new_with_max(60_000_000, 3).expect("bounds and digits are in range");
    let mut pings = Pings { latency, faults: Vec::new() };
    while let Some(flow) = flows.join_next().await {
        let (times, outcome) = flow.expect("a ping does not panic");
        times.iter().for_each(|time| pings.latency.saturating_record(time.as_micros() as u64));
        pings.faults.extend(outcome.err());
    }
    pings
}

async fn one(
    target: SocketAddr,
    first: tokio::time::Instant,
    rounds: u32,
) -> (Vec<Duration>, Result<(), Fault>) {
    let mut times = Vec::with_capacity(rounds as usize);
    let outcome = exchange(target, first, rounds, &mut times).await;
    (times, outcome)
}

async fn exchange(
    target: SocketAddr,
    first: tokio::time::Instant,
    rounds: u32,
    times: &mut Vec<Duration>,
) -> Result<(), Fault> {
    let id = NEXT_ID.fetch_add(1, Relaxed);
    let order = Order { id, manner: Manner::Exchange, up: BYTES, down: BYTES, rounds, pace: Pace::FREE };
    let beginning = async {
        let stream = connect(target).await?;
        begin(&stream, &order).await?;
        Ok::<_, Fault>(stream)
    };
    let stream = timeout(PATIENCE, beginning).await.unwrap_or(Err(Fault::TooLong))?;
    for round in 0..u64::from(rounds) {
        sleep_until(first + EVERY * round as u32).await;
        let asked = Instant::now();
        let part = round * BYTES..(round + 1) * BYTES;
        let answered = async {
            send(&stream, order.up_seed(), part.clone()).await?;
            receive(&stream, order.down_seed(), part.clone(), Pace::FREE).await
        };
        timeout(PATIENCE, answered).await.unwrap_or(Err(Fault::TooLong))?;
        times.push(asked.elapsed());
    }
    Ok(())
}
