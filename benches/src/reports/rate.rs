//! Reports a second: as many as come back acked, and what each costs the balancer.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::streams::{self, Content, POOL, Stream};
use crate::measure::Folder;
use crate::peer::{self, Installed, Proxy};
use crate::process::{self, ProcessTree};
use crate::scrape::Page;

/// Reports of one stream are at least so far apart: the balancer takes 20 a second of each.
const GAP: Duration = Duration::from_millis(52);
/// Before reports are counted.
const WARMUP: Duration = Duration::from_secs(3);
/// What resources promise.
const INTERVAL: Duration = Duration::from_secs(10);

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct Rate {
    pub(super) resources: usize,
    pub(super) content: Content,
    /// As the resources saw it.
    pub(super) accepted_per_second: f64,
    /// Part of its processor that the balancer used.
    pub(super) busy: f64,
    /// Processor time for each report: of the balancer's threads and of the kernel's for packets.
    pub(super) cpu_micros: f64,
    /// Of that, in user mode.
    pub(super) user_micros: f64,
    /// As `/metrics` has it: `process_cpu_seconds_total` over `trimtab_reports_total{result="accepted"}`.
    metrics_cpu_micros: f64,
    /// Tables that were made, a second.
    pub(super) rebuilds_per_second: f64,
}

impl Rate {
    /// What a processor could take in that does nothing else.
    pub(super) fn per_processor(&self) -> f64 {
        1e6 / self.cpu_micros
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resources, content, accepted_per_second, busy, cpu_micros, user_micros, .. } = self;
        write!(
            f,
            "{resources} resources, {}: {accepted_per_second:.0} accepted/s at {:.0} % busy, {cpu_micros:.1} µs each ({user_micros:.1} user; {:.1} by /metrics): {:.0}/s on one processor",
            content.about(),
            busy * 100.0,
            self.metrics_cpu_micros,
            self.per_processor(),
        )
    }
}

/// Measures on a fresh `trimtab serve` on processor `cpu`.
pub(super) fn measure(resources: usize, content: Content, seconds: f64, cpu: usize) -> anyhow::Result<Rate> {
    let folder = Folder::new()?;
    let (control, http) = (peer::free_address()?, peer::free_address()?);
    let mut tree = serve(&folder.0, control, http, cpu)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let counted = runtime.block_on(count(&tree, control, http, resources, content, seconds, cpu));
    tree.check().context("trimtab")?;
    counted.with_context(|| format!("trimtab said: {}", tree.last_words()))
}

fn serve(folder: &Path, control: SocketAddr, http: SocketAddr, cpu: usize) -> anyhow::Result<ProcessTree> {
    serve_with(folder, control, http, cpu, "")
}

/// `trimtab serve` on processor `cpu`, with more in its configuration.
pub(super) fn serve_with(
    folder: &Path,
    control: SocketAddr,
    http: SocketAddr,
    cpu: usize,
    more: &str,
) -> anyhow::Result<ProcessTree> {
    let listen = peer::free_address()?;
    let file = folder.join("trimtab.toml");
    let text = format!(
        "{more}[control]\nlisten = \"{control}\"\n[http]\nlisten = \"{http}\"\n[dataplane]\nworkers = 1\n\
         [[pool]]\nname = \"{POOL}\"\n[[listener]]\nbind = \"tcp://{listen}\"\npool = \"{POOL}\"\n"
    );
    fs::write(&file, text)?;
    let mut command = Command::new(Installed::find(Proxy::Trimtab)?.program);
    // A line for each registration would be part of what is measured.
    command.args(["serve", "-c"]).arg(file).env("RUST_LOG", "warn");
    let mut tree = ProcessTree::spawn(&mut command, &[cpu], folder.join("trimtab.log"))?;
    peer::wait_until_it_accepts(&mut tree, control)?;
    tree.find_descendants()?;
    Ok(tree)
}

/// What was used and accepted until a moment.
struct Seen {
    acked: u64,
    cpu: Duration,
    user: f64,
    metrics: Metrics,
    at: Instant,
}

async fn count(
    tree: &ProcessTree,
    control: SocketAddr,
    http: SocketAddr,
    resources: usize,
    content: Content,
    seconds: f64,
    cpu: usize,
) -> anyhow::Result<Rate> {
    let streams = streams::open(control, 0..resources, content, INTERVAL).await?;
    let (acked, end) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let mut reporting = JoinSet::new();
    for stream in streams {
        reporting.spawn(report(stream, Arc::clone(&acked), Arc::clone(&end)));
    }
    let see = || -> anyhow::Result<Seen> {
        let metrics = Metrics::scrape(http)?;
        Ok(Seen {
            acked: acked.load(Relaxed),
            cpu: tree.cpu_time()? + process::softirq_thread_time(cpu)?,
            user: tree.user_seconds()?,
            metrics,
            at: Instant::now(),
        })
    };
    sleep(WARMUP).await;
    let before = see()?;
    sleep(Duration::from_secs_f64(seconds)).await;
    let after = see()?;
    end.store(true, Relaxed);
    while let Some(ended) = reporting.join_next().await {
        ended??;
    }
    let (reports, wall) = ((after.acked - before.acked) as f64, (after.at - before.at).as_secs_f64());
    let accepted = after.metrics.accepted - before.metrics.accepted;
    ensure!(reports > 0.0 && accepted > 0.0, "no report was accepted");
    let cpu_seconds = (after.cpu - before.cpu).as_secs_f64();
    Ok(Rate {
        resources,
        content,
        accepted_per_second: reports / wall,
        busy: cpu_seconds / wall,
        cpu_micros: cpu_seconds * 1e6 / reports,
        user_micros: (after.user - before.user) * 1e6 / reports,
        metrics_cpu_micros: (after.metrics.cpu - before.metrics.cpu) * 1e6 / accepted,
        rebuilds_per_second: (after.metrics.generation - before.metrics.generation) / wall,
    })
}

/// The next report as soon as the last is acked, but not sooner than the balancer allows.
async fn report(mut stream: Stream, acked: Arc<AtomicU64>, end: Arc<AtomicBool>) -> anyhow::Result<()> {
    while !end.load(Relaxed) {
        let next = Instant::now() + GAP;
        stream.send(true).await?;
        stream.ack().await?;
        acked.fetch_add(1, Relaxed);
        sleep_until(next).await;
    }
    Ok(())
}

/// What `/metrics` says.
struct Metrics {
    accepted: f64,
    cpu: f64,
    /// Of the pool's table.
    generation: f64,
}

impl Metrics {
    fn scrape(http: SocketAddr) -> anyhow::Result<Self> {
        let page = Page::get(http)?;
        Ok(Self {
            accepted: page.sum("trimtab_reports_total", "result=\"accepted\""),
            cpu: page.sum("process_cpu_seconds_total", ""),
            generation: page.sum("trimtab_table_generation", ""),
        })
    }
}
