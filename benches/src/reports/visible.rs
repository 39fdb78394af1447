//! From a report to the table that selections read: control in this process, its publisher polled.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use allocation::telemetry::{DataplaneView, EngineSnapshot, ListenerSnapshot};
use allocation::{AllocationTable, Decision, Policy, Publisher};
use anyhow::{Context, bail};
use control::{Control, ControlConfig, Phase, Pool};
use registry::{Limits, PoolConfig};
use serde::Serialize;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval_at};

use super::streams::{self, Content, POOL, Stream};
use crate::process;
use crate::race::at_quantile;

/// How often every other resource reports.
const INTERVAL: Duration = Duration::from_secs(1);
/// What resources promise whose readiness changes: they report when it does.
const INTERVAL_CHANGING: Duration = Duration::from_secs(60);
/// How many those are.
const CHANGING: usize = 20;
/// How often the table is looked at.
const POLL: Duration = Duration::from_micros(50);
/// Longest wait for a change.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between changes: one for each of so many, so that they meet every phase of the rebuilds.
const PAUSES: [u64; 5] = [23, 31, 37, 43, 29];
/// As `trimtab serve` has it.
const CONTROL_THREADS: usize = 2;

/// What was found, in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct Visible {
    pub(super) resources: usize,
    pub(super) samples: usize,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
    /// Until the report's ack.
    pub(super) ack_p50: f64,
    pub(super) ack_p99: f64,
    /// Reports a second of all others, as they were acked.
    background_per_second: f64,
}

impl fmt::Display for Visible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resources, samples, p50, p90, p99, max, ack_p50, ack_p99, background_per_second } = self;
        write!(
            f,
            "{resources} resources: visible after p50 {p50:.2}, p90 {p90:.2}, p99 {p99:.2}, max {max:.2} ms ({samples} changes); acked after p50 {ack_p50:.2}, p99 {ack_p99:.2} ms; {background_per_second:.0} other reports/s"
        )
    }
}

/// A dataplane that serves nobody.
struct Silent;

impl DataplaneView for Silent {
    fn listeners(&self) -> Vec<ListenerSnapshot> {
        Vec::new()
    }

    fn engine(&self) -> EngineSnapshot {
        EngineSnapshot::default()
    }

    fn decisions(&self, _last: usize) -> Vec<Decision> {
        Vec::new()
    }

    fn take_sampled_decisions(&self) -> (Vec<Decision>, u64) {
        (Vec::new(), 0)
    }
}

/// Measures with control's threads on processor `cpu`.
pub(super) fn measure(resources: usize, samples: usize, cpu: usize) -> anyhow::Result<Visible> {
    let publisher = Publisher::new(AllocationTable::empty(Policy::Adaptive));
    let (phase, watched) = watch::channel(Phase::Ready);
    let (bound, wait) = mpsc::channel();
    let served = {
        let publisher = publisher.clone();
        thread::spawn(move || serve(publisher, watched, &bound, cpu))
    };
    let Ok(control) = wait.recv() else {
        return Err(joined(served).err().unwrap_or_else(|| anyhow::anyhow!("control ended")));
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let measured = with_background(&runtime, control, &publisher, resources, samples);
    phase.send_replace(Phase::Terminated);
    runtime.shutdown_background();
    joined(served)?;
    measured
}

fn joined(served: thread::JoinHandle<anyhow::Result<()>>) -> anyhow::Result<()> {
    served.join().unwrap_or_else(|_| bail!("control panicked"))
}

/// Control, on threads of its own on processor `cpu`.
fn serve(
    publisher: Publisher,
    phase: watch::Receiver<Phase>,
    bound: &mpsc::Sender<SocketAddr>,
    cpu: usize,
) -> anyhow::Result<()> {
    // Threads that this one makes run where it does.
    process::pin_to(cpu)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(CONTROL_THREADS).enable_all().build()?;
    let name = POOL.parse().context("the pool's name")?;
    let config = ControlConfig {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        http: SocketAddr::from(([127, 0, 0, 1], 0)),
        insecure: false,
        security: control::SecurityConfig::default(),
        balancer_id: "bench".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pools: vec![Pool {
            config: PoolConfig::new(name, Policy::Adaptive),
            check: None,
            publishers: vec![publisher],
            listeners: Vec::new(),
        }],
        dataplane: Arc::new(Silent),
        origin: Instant::now(),
        limits: Limits { resources_max: 100_000, ..Limits::default() },
        alternatives: Vec::new(),
        zones: Vec::new(),
        maintenance: Vec::new(),
        decision_log: None,
        pull: control::PullConfig::default(),
        providers: Vec::new(),
        dns: Default::default(),
        store: None,
    };
    runtime.block_on(async {
        let control = Control::bind(config).await?;
        // The receiver waits for it.
        let _ = bound.send(control.control_address());
        tokio::spawn(control.run(phase)).await??;
        Ok(())
    })
}

fn with_background(
    runtime: &Runtime,
    control: SocketAddr,
    publisher: &Publisher,
    resources: usize,
    samples: usize,
) -> anyhow::Result<Visible> {
    let acked = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let others = resources.saturating_sub(CHANGING);
    let streams = runtime.block_on(streams::open(control, 0..others, Content::Agent, INTERVAL))?;
    for (place, stream) in streams.into_iter().enumerate() {
        let phase = INTERVAL.mul_f64(place as f64 / others as f64);
        runtime.spawn(report(stream, phase, Arc::clone(&acked)));
    }
    let changing =
        runtime.block_on(streams::open(control, others..resources, Content::Agent, INTERVAL_CHANGING))?;
    thread::sleep(2 * INTERVAL);
    let before = (acked.load(std::sync::atomic::Ordering::Relaxed), Instant::now());
    let (mut seen, mut acks) = changes(runtime, publisher, changing, samples)?;
    let reports = acked.load(std::sync::atomic::Ordering::Relaxed) - before.0;
    seen.sort_by(f64::total_cmp);
    acks.sort_by(f64::total_cmp);
    Ok(Visible {
        resources,
        samples: seen.len(),
        p50: at_quantile(&seen, 0.5),
        p90: at_quantile(&seen, 0.9),
        p99: at_quantile(&seen, 0.99),
        max: at_quantile(&seen, 1.0),
        ack_p50: at_quantile(&acks, 0.5),
        ack_p99: at_quantile(&acks, 0.99),
        background_per_second: reports as f64 / before.1.elapsed().as_secs_f64(),
    })
}

/// Each interval, for as long as the balancer takes it.
async fn report(mut stream: Stream, phase: Duration, acked: Arc<std::sync::atomic::AtomicU64>) {
    let mut ticks = interval_at(tokio::time::Instant::now() + phase, INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if stream.send(true).await.is_err() || stream.ack().await.is_err() {
            return;
        }
        acked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Changes a resource's readiness again and again, and waits for the table to show it. Gives milliseconds: until it was
/// visible, and until the ack.
fn changes(
    runtime: &Runtime,
    publisher: &Publisher,
    mut changing: Vec<Stream>,
    samples: usize,
) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let (mut seen, mut acks) = (Vec::with_capacity(samples), Vec::with_capacity(samples));
    let mut ready = vec![true; changing.len()];
    let mut place = Place::default();
    for sample in 0..samples {
        let which = sample % changing.len();
        let wanted = !ready[which];
        let mut stream = changing.swap_remove(which);
        let id = stream.id().to_owned();
        let begun = Instant::now();
        let acked = runtime.spawn(async move {
            let sent = stream.send(wanted).await;
            let acked = match sent {
                Ok(()) => stream.ack().await,
                failed => failed,
            };
            acked.map(|()| (stream, begun.elapsed()))
        });
        while place.gets_flows(publisher, &id) != Some(wanted) {
            if begun.elapsed() > PATIENCE {
                bail!("a change of {id} is not visible after {PATIENCE:?}");
            }
            thread::sleep(POLL);
        }
        seen.push(begun.elapsed().as_secs_f64() * 1e3);
        let (stream, ack) = runtime.block_on(acked)??;
        acks.push(ack.as_secs_f64() * 1e3);
        // Back to its place: the last one took it.
        changing.push(stream);
        let last = changing.len() - 1;
        changing.swap(which, last);
        ready[which] = wanted;
        thread::sleep(Duration::from_millis(PAUSES[sample % PAUSES.len()]));
    }
    Ok((seen, acks))
}

/// Where resources are in tables of one membership.
#[derive(Default)]
struct Place {
    epoch: Option<u64>,
    indexes: std::collections::HashMap<String, usize>,
}

impl Place {
    /// Whether the newest table gives it flows; `None`: it is not in it.
    fn gets_flows(&mut self, publisher: &Publisher, id: &str) -> Option<bool> {
        let table = publisher.current();
        let members = table.members();
        if self.epoch != Some(members.epoch()) {
            let backends = members.backends().iter().enumerate();
            self.indexes = backends.map(|(index, backend)| (backend.id.as_str().to_owned(), index)).collect();
            self.epoch = Some(members.epoch());
        }
        let weight = table.weights().get(*self.indexes.get(id)?)?;
        Some(*weight > 0.0)
    }
}
