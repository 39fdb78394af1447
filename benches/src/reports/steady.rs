//! A balancer in its daily life: every resource reports once a second, for many minutes. What it costs, and whether anything
//! grows.

use std::fmt::{self, Write as _};
use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::rate;
use super::streams::{self, Content, Stream};
use crate::measure::Folder;
use crate::peer;
use crate::process::{self, ProcessTree};
use crate::scrape::Page;

/// As `trimtab agent` does unless it is told otherwise.
const INTERVAL: Duration = Duration::from_secs(1);
/// Resources that join before the next ones do.
const JOIN_AT_ONCE: usize = 500;
/// A row of the table.
const ROW: Duration = Duration::from_secs(60);

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct Steady {
    resources: usize,
    rows: Vec<Row>,
}

/// A minute.
#[derive(Debug, Serialize)]
struct Row {
    /// Since the first report of all.
    until_seconds: f64,
    reports_per_second: f64,
    /// Of one processor.
    busy: f64,
    rss_bytes: u64,
    private_bytes: u64,
    descriptors: usize,
    /// By `/metrics`.
    history_bytes: f64,
    store_bytes: u64,
    /// Reports whose ack came later than the next was due.
    late: u64,
}

/// Lets `resources` report to a fresh balancer on processor `cpu` for `seconds`; `say` gets a line for each minute.
pub(super) fn measure(
    resources: usize,
    seconds: u64,
    cpu: usize,
    say: &mut dyn FnMut(&str),
) -> anyhow::Result<Steady> {
    ensure!(seconds >= ROW.as_secs(), "--steady takes at least {} s", ROW.as_secs());
    let folder = Folder::new()?;
    let (control, http) = (peer::free_address()?, peer::free_address()?);
    let store = folder.0.join("trimtab.db");
    let more = format!("[store]\npath = \"{}\"\n", store.display());
    let mut tree = rate::serve_with(&folder.0, control, http, cpu, &more)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let watched = Watched { tree: &tree, http, store: &store, cpu };
    let rows = runtime.block_on(watch(watched, control, resources, seconds, say));
    tree.check().context("trimtab")?;
    let rows = rows.with_context(|| format!("trimtab said: {}", tree.last_words()))?;
    Ok(Steady { resources, rows })
}

/// What is looked at.
struct Watched<'a> {
    tree: &'a ProcessTree,
    http: SocketAddr,
    store: &'a std::path::Path,
    cpu: usize,
}

async fn watch(
    watched: Watched<'_>,
    control: SocketAddr,
    resources: usize,
    seconds: u64,
    say: &mut dyn FnMut(&str),
) -> anyhow::Result<Vec<Row>> {
    let (acked, late) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut reporting = JoinSet::new();
    // Those that have joined report while others join: a lease is no longer than three reports.
    for from in (0..resources).step_by(JOIN_AT_ONCE) {
        let some = from..(from + JOIN_AT_ONCE).min(resources);
        let streams = streams::open_over(control, some, Content::Agent, INTERVAL, 1).await?;
        let now = Instant::now();
        for (place, stream) in streams.into_iter().enumerate() {
            // Spread over the interval, as agents that started at different times are.
            let first = now + INTERVAL.mul_f64(place as f64 / JOIN_AT_ONCE as f64);
            reporting.spawn(report(stream, first, Arc::clone(&acked), Arc::clone(&late)));
        }
    }
    let begin = Instant::now();
    acked.store(0, Relaxed);
    late.store(0, Relaxed);
    let cpu = |watched: &Watched<'_>| -> anyhow::Result<Duration> {
        Ok(watched.tree.cpu_time()? + process::softirq_thread_time(watched.cpu)?)
    };
    let mut rows = Vec::new();
    let (mut cpu_before, mut acked_before, mut late_before) = (cpu(&watched)?, 0, 0);
    for minute in 1..=u32::try_from(seconds / ROW.as_secs())? {
        tokio::select! {
            () = sleep_until(begin + ROW * minute) => {}
            Some(ended) = reporting.join_next() => ended??,
        }
        let memory = watched.tree.memory()?;
        let (cpu_now, acked_now, late_now) = (cpu(&watched)?, acked.load(Relaxed), late.load(Relaxed));
        let page = Page::get(watched.http)?;
        let row = Row {
            until_seconds: begin.elapsed().as_secs_f64(),
            reports_per_second: (acked_now - acked_before) as f64 / ROW.as_secs_f64(),
            busy: (cpu_now - cpu_before).as_secs_f64() / ROW.as_secs_f64(),
            rss_bytes: memory.rss,
            private_bytes: memory.private_dirty,
            descriptors: watched.tree.descriptors()?,
            history_bytes: page.sum("trimtab_history_bytes", ""),
            store_bytes: store_bytes(watched.store),
            late: late_now - late_before,
        };
        (cpu_before, acked_before, late_before) = (cpu_now, acked_now, late_now);
        let mut line = String::new();
        row.write(&mut line)?;
        say(line.trim_end());
        rows.push(row);
    }
    Ok(rows)
}

/// One report each interval, whatever became of the last.
async fn report(
    mut stream: Stream,
    first: Instant,
    acked: Arc<AtomicU64>,
    late: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    let mut next = first;
    loop {
        sleep_until(next).await;
        stream.send(true).await?;
        stream.ack().await?;
        acked.fetch_add(1, Relaxed);
        next += INTERVAL;
        if next < Instant::now() {
            late.fetch_add(1, Relaxed);
            next = Instant::now();
        }
    }
}

/// The file and what SQLite keeps beside it.
fn store_bytes(path: &std::path::Path) -> u64 {
    let name = path.display();
    let files = [format!("{name}"), format!("{name}-wal"), format!("{name}-shm")];
    files.iter().filter_map(|file| fs::metadata(file).ok()).map(|file| file.len()).sum()
}

impl Row {
    fn write(&self, text: &mut String) -> fmt::Result {
        let mebi = |bytes: f64| bytes / f64::from(1 << 20);
        writeln!(
            text,
            "| {:.0} | {:.0} | {:.0} % | {:.1} | {:.1} | {} | {:.1} | {:.1} | {} |",
            self.until_seconds / 60.0,
            self.reports_per_second,
            self.busy * 100.0,
            mebi(self.rss_bytes as f64),
            mebi(self.private_bytes as f64),
            self.descriptors,
            mebi(self.history_bytes),
            mebi(self.store_bytes as f64),
            self.late,
        )
    }
}

impl Steady {
    pub(super) fn write(&self, text: &mut String) -> fmt::Result {
        writeln!(
            text,
            "{} resources, each over a connection of its own, report once a second to `trimtab serve` with a store:\n",
            self.resources
        )?;
        writeln!(
            text,
            "| minute | reports/s | of a processor | RSS, MiB | private, MiB | descriptors | history, MiB | store, MiB | late acks |"
        )?;
        writeln!(text, "|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
        self.rows.iter().try_for_each(|row| row.write(text))?;
        writeln!(text)
    }
}
