//! One measurement: a fresh proxy, fresh backends, a warm-up, a window.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::case::{Case, Metric};
use crate::load::{After, Load, LoadError, Shape, Window, Windows};
use crate::peer::{self, Installed, Proxy, Task};
use crate::process::{self, Memory, ProcessTree};

/// What one measurement found.
pub type Sample = BTreeMap<Metric, f64>;

/// How to measure.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// Before the window.
    pub warmup: Duration,
    /// The window.
    pub window: Duration,
    /// The processor of the proxy.
    pub proxy_cpu: usize,
    /// The processor of clients and backends.
    pub load_cpu: usize,
    /// Operations a second where a case has a rate.
    pub rate: f64,
    /// Set when somebody wants it to end.
    pub interrupted: Arc<AtomicBool>,
}

/// Why there is no sample.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The proxy did not start, ended, or cannot be accounted for.
    #[error("the proxy failed: {0}")]
    Proxy(#[source] io::Error),
    /// The load did not get through.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// More datagrams were lost than a figure may stand on.
    #[error("{:.1} % of the datagrams were lost, and {:.0} % may be", share * 100.0, LOST_MAX * 100.0)]
    Lost {
        /// How much of all.
        share: f64,
    },
    /// trimtab does nothing that the kernel needs a thread for.
    #[error("the kernel started {threads} iou-wrk threads for it")]
    IoWorkers {
        /// How many.
        threads: usize,
    },
    /// The harness itself failed: no folder, no `/proc`.
    #[error("the harness failed: {0}")]
    Harness(#[source] io::Error),
}

/// With more datagrams lost than this share, a proxy did not do what the others did.
const LOST_MAX: f64 = 0.01;
/// Flows that warm a proxy up before idle memory is taken: what it makes once is made by then.
const IDLE_WARMUP_FLOWS: usize = 64;
/// How long 3,000 flows may take to open.
const IDLE_PATIENCE: Duration = Duration::from_secs(30);
/// Memory counts as settled when it stays for so long, and is taken as it is after [`SETTLE_MAX`].
const SETTLE: Duration = Duration::from_millis(250);
const SETTLE_MAX: Duration = Duration::from_secs(3);

/// Measures `case` on a proxy that is started for it and killed after it.
pub fn measure(installed: &Installed, case: Case, conditions: &Conditions) -> Result<Sample, MeasureError> {
    let folder = Folder::new().map_err(MeasureError::Harness)?;
    let mix = case.mix(conditions.rate);
    let mut load = Load::new(&mix, Arc::clone(&conditions.interrupted)).map_err(MeasureError::Harness)?;
    let mut proxy = None;
    let mut targets = load.backends().to_vec();
    if installed.proxy != Proxy::Direct {
        let listen = peer::free_address().map_err(MeasureError::Harness)?;
        let task = Task { listen, backends: targets, bulk: case.is_bulk(), udp: case.has_udp(), workers: 1 };
        let started =
            installed.start(&task, &folder.0, &[conditions.proxy_cpu]).map_err(MeasureError::Proxy)?;
        proxy = Some(started);
        targets = vec![listen];
    }
    let held = mix.tcp.iter().find(|shape| shape.after == After::Hold);
    let sample = match (&proxy, held) {
        (Some(tree), Some(shape)) => idle(tree, shape, load, &targets, conditions),
        (None, Some(_)) => Ok(Sample::new()),
        _ => busy(proxy.as_ref(), &mut load, &targets, conditions),
    };
    let sample = sample.and_then(|sample| acceptable(installed.proxy, sample));
    match (sample, proxy.as_mut().map(ProcessTree::check)) {
        (_, Some(Err(ended))) => Err(MeasureError::Proxy(ended)),
        (Err(error @ (MeasureError::Proxy(_) | MeasureError::Load(_))), Some(Ok(())))
            if !matches!(error, MeasureError::Load(LoadError::Interrupted)) =>
        {
            let said = proxy.as_ref().map(ProcessTree::last_words).unwrap_or_default();
            Err(MeasureError::Proxy(io::Error::other(format!("{error}; its output ends: {said:?}"))))
        }
        (sample, _) => sample,
    }
}

/// Refuses a figure that does not stand for what it says.
fn acceptable(proxy: Proxy, sample: Sample) -> Result<Sample, MeasureError> {
    let of = |metric| sample.get(&metric).copied().unwrap_or(0.0);
    let (share, threads) = (of(Metric::Lost), of(Metric::IoWorkers) as usize);
    if share > LOST_MAX {
        return Err(MeasureError::Lost { share });
    }
    if matches!(proxy, Proxy::Trimtab | Proxy::Before) && threads > 0 {
        return Err(MeasureError::IoWorkers { threads });
    }
    Ok(sample)
}

/// What was used of both processors until a moment. To the proxy and the load belongs what the kernel's threads for soft
/// interrupts used of their processors: nobody else makes packets there.
struct Used {
    proxy: Duration,
    load: Duration,
    proxy_processor: Duration,
    load_processor: Duration,
    at: Instant,
}

fn busy(
    proxy: Option<&ProcessTree>,
    load: &mut Load,
    targets: &[std::net::SocketAddr],
    conditions: &Conditions,
) -> Result<Sample, MeasureError> {
    load.open(targets).map_err(MeasureError::Harness)?;
    load.run(conditions.warmup)?;
    let before = used(proxy, conditions)?;
    load.begin_window();
    load.run(conditions.window)?;
    let windows = load.end_window();
    let after = used(proxy, conditions)?;
    let mut sample = sample(proxy.is_some(), &windows, &before, &after);
    if let Some(tree) = proxy {
        let threads = tree.threads_named("iou-wrk").map_err(MeasureError::Proxy)?;
        sample.insert(Metric::IoWorkers, threads as f64);
    }
    Ok(sample)
}

fn used(proxy: Option<&ProcessTree>, conditions: &Conditions) -> Result<Used, MeasureError> {
    let softirqs = |cpu| process::softirq_thread_time(cpu).map_err(MeasureError::Harness);
    let proxy_used = match proxy {
        Some(tree) => tree.cpu_time().map_err(MeasureError::Proxy)? + softirqs(conditions.proxy_cpu)?,
        None => Duration::ZERO,
    };
    let processor = |cpu| process::processor_busy(cpu).map_err(MeasureError::Harness);
    Ok(Used {
        proxy: proxy_used,
        load: thread_cpu_time() + softirqs(conditions.load_cpu)?,
        proxy_processor: processor(conditions.proxy_cpu)?,
        load_processor: processor(conditions.load_cpu)?,
        at: Instant::now(),
    })
}

fn sample(with_proxy: bool, windows: &Windows, before: &Used, after: &Used) -> Sample {
    let wall = (after.at - before.at).as_secs_f64();
    let proxy = (after.proxy - before.proxy).as_secs_f64();
    let load = (after.load - before.load).as_secs_f64();
    let foreign =
        |after: Duration, before: Duration, ours: f64| after.saturating_sub(before).as_secs_f64() - ours;
    let foreign_proxy = foreign(after.proxy_processor, before.proxy_processor, proxy);
    let foreign_load = foreign(after.load_processor, before.load_processor, load);
    let parts = &windows.parts;
    let sum = |of: fn(&Window) -> u64| parts.iter().map(of).sum::<u64>();
    let operations = sum(|part| part.operations) as f64;
    let megabytes = (windows.backend_bytes + sum(|part| part.bytes)) as f64 / 1e6;
    // Of one kind of client: where kinds run side by side the first is the one that waiting hurts.
    let micros = |part: usize, quantile| {
        parts.get(part).map_or(0.0, |part| part.latency.value_at_quantile(quantile) as f64 / 1e3)
    };
    let elapsed = parts.first().map_or(wall, |part| part.elapsed.as_secs_f64());
    let mut sample = Sample::from([
        (Metric::OperationsPerSecond, operations / elapsed),
        (Metric::MegabytesPerSecond, megabytes / elapsed),
        (Metric::LatencyP50, micros(0, 0.5)),
        (Metric::LatencyP99, micros(0, 0.99)),
        (Metric::LatencyP999, micros(0, 0.999)),
        (Metric::LoadBusy, load / wall),
        (Metric::ForeignBusy, foreign_proxy.max(foreign_load).max(0.0) / wall),
        (Metric::Errors, sum(|part| part.errors) as f64),
        (Metric::Unfinished, sum(|part| part.unfinished) as f64),
    ]);
    if with_proxy {
        sample.insert(Metric::CpuPerOperation, proxy * 1e6 / operations);
        sample.insert(Metric::CpuPerMegabyte, proxy * 1e6 / megabytes);
        sample.insert(Metric::CpuPerSecond, proxy * 1e3 / wall);
        sample.insert(Metric::ProxyBusy, proxy / wall);
    }
    let Windows { datagrams_sent, datagrams_received, .. } = *windows;
    if datagrams_sent > 0 {
        // What is under way at the window's ends is in one of the two counts: as many at both, or nearly.
        let lost = datagrams_sent.saturating_sub(datagrams_received) as f64;
        sample.insert(Metric::Lost, lost / datagrams_sent as f64);
        sample.insert(Metric::UdpLatencyP99, micros(parts.len() - 1, 0.99));
        if with_proxy {
            sample.insert(Metric::CpuPerDatagram, proxy * 1e6 / datagrams_received as f64);
        }
    }
    sample
}

/// Memory of silent flows: first a few flows that come and go, then all of them at once.
fn idle(
    tree: &ProcessTree,
    shape: &Shape,
    mut load: Load,
    targets: &[std::net::SocketAddr],
    conditions: &Conditions,
) -> Result<Sample, MeasureError> {
    let few = Shape { connections: IDLE_WARMUP_FLOWS, after: After::Close, ..shape.clone() };
    load.reshape(&few.into());
    load.open(targets).map_err(MeasureError::Harness)?;
    load.run(conditions.warmup)?;
    load.reshape(&shape.clone().into());
    let before = settled_memory(tree, &mut load)?;
    load.open(targets).map_err(MeasureError::Harness)?;
    load.run_until_held(shape.connections, IDLE_PATIENCE)?;
    let after = settled_memory(tree, &mut load)?;
    // They must still be open, or their memory was not measured.
    load.run_until_held(shape.connections, Duration::ZERO)?;
    let flows = shape.connections as f64;
    let per_flow = |before: u64, after: u64| (after as f64 - before as f64) / flows / 1e3;
    Ok(Sample::from([
        (Metric::RssPerFlow, per_flow(before.rss, after.rss)),
        (Metric::PssPerFlow, per_flow(before.pss, after.pss)),
        (Metric::PrivateDirtyPerFlow, per_flow(before.private_dirty, after.private_dirty)),
        (Metric::RssBefore, before.rss as f64 / 1e3),
        (Metric::Errors, 0.0),
    ]))
}

/// Lets the load run (it must see closes and ends) until the proxy's memory stays as it is.
fn settled_memory(tree: &ProcessTree, load: &mut Load) -> Result<Memory, MeasureError> {
    let deadline = Instant::now() + SETTLE_MAX;
    let mut seen = tree.memory().map_err(MeasureError::Proxy)?;
    loop {
        load.run(SETTLE)?;
        let now = tree.memory().map_err(MeasureError::Proxy)?;
        if now == seen || Instant::now() > deadline {
            return Ok(now);
        }
        seen = now;
    }
}

fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A temporary folder, gone when dropped.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> io::Result<Self> {
        let base = std::env::temp_dir();
        for attempt in 0..100 {
            let folder = base.join(format!("trimtab-bench-{}-{attempt}", std::process::id()));
            match fs::create_dir(&folder) {
                Ok(()) => return Ok(Self(folder)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other(format!("{} is full of old bench folders", base.display())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder) {
        eprintln!("bench: {} is left: {error}", folder.display());
    }
}
