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
use crate::load::{After, Load, LoadError, Shape, Window};
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
    /// The harness itself failed: no folder, no `/proc`.
    #[error("the harness failed: {0}")]
    Harness(#[source] io::Error),
}

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
    let shape = case.shape(conditions.rate);
    let mut load = Load::new(&shape, Arc::clone(&conditions.interrupted)).map_err(MeasureError::Harness)?;
    let mut proxy = None;
    let mut targets = load.backends().to_vec();
    if installed.proxy != Proxy::Direct {
        let listen = peer::free_address().map_err(MeasureError::Harness)?;
        let task = Task { listen, backends: targets, bulk: case.is_bulk() };
        let started = installed.start(&task, &folder.0, conditions.proxy_cpu).map_err(MeasureError::Proxy)?;
        proxy = Some(started);
        targets = vec![listen];
    }
    let sample = match (&proxy, shape.after) {
        (Some(tree), After::Hold) => idle(tree, &shape, load, &targets, conditions),
        (None, After::Hold) => Ok(Sample::new()),
        _ => busy(proxy.as_ref(), &mut load, &targets, conditions),
    };
    match (sample, proxy.as_mut().map(ProcessTree::check)) {
        (_, Some(Err(ended))) => Err(MeasureError::Proxy(ended)),
        (Err(error), Some(Ok(()))) if !matches!(error, MeasureError::Load(LoadError::Interrupted)) => {
            let said = proxy.as_ref().map(ProcessTree::last_words).unwrap_or_default();
            Err(MeasureError::Proxy(io::Error::other(format!("{error}; its output ends: {said:?}"))))
        }
        (sample, _) => sample,
    }
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
    load.open(targets);
    load.run(conditions.warmup)?;
    let before = used(proxy, conditions)?;
    load.begin_window();
    load.run(conditions.window)?;
    let window = load.end_window();
    let after = used(proxy, conditions)?;
    Ok(sample(proxy.is_some(), &window, &before, &after))
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

fn sample(with_proxy: bool, window: &Window, before: &Used, after: &Used) -> Sample {
    let wall = (after.at - before.at).as_secs_f64();
    let proxy = (after.proxy - before.proxy).as_secs_f64();
    let load = (after.load - before.load).as_secs_f64();
    let foreign =
        |after: Duration, before: Duration, ours: f64| after.saturating_sub(before).as_secs_f64() - ours;
    let foreign_proxy = foreign(after.proxy_processor, before.proxy_processor, proxy);
    let foreign_load = foreign(after.load_processor, before.load_processor, load);
    let operations = window.operations as f64;
    let megabytes = window.bytes as f64 / 1e6;
    let micros = |quantile| window.latency.value_at_quantile(quantile) as f64 / 1e3;
    let elapsed = window.elapsed.as_secs_f64();
    let mut sample = Sample::from([
        (Metric::OperationsPerSecond, operations / elapsed),
        (Metric::MegabytesPerSecond, megabytes / elapsed),
        (Metric::LatencyP50, micros(0.5)),
        (Metric::LatencyP99, micros(0.99)),
        (Metric::LatencyP999, micros(0.999)),
        (Metric::LoadBusy, load / wall),
        (Metric::ForeignBusy, foreign_proxy.max(foreign_load).max(0.0) / wall),
        (Metric::Errors, window.errors as f64),
        (Metric::Unfinished, window.unfinished as f64),
    ]);
    if with_proxy {
        sample.insert(Metric::CpuPerOperation, proxy * 1e6 / operations);
        sample.insert(Metric::CpuPerMegabyte, proxy * 1e6 / megabytes);
        sample.insert(Metric::ProxyBusy, proxy / wall);
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
    load.reshape(&few);
    load.open(targets);
    load.run(conditions.warmup)?;
    load.reshape(shape);
    let before = settled_memory(tree, &mut load)?;
    load.open(targets);
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
