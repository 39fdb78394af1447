//! `bench workers`: what a second worker adds, on two processors that also have to make the load.
//!
//! A processor that makes load beside one that runs a proxy cannot say what two workers can do: the load would be the
//! bottleneck. So every processor gets the same mix, a load of its own and a worker. With one processor a load and one
//! worker share it; with two, two loads and two workers share two. Whatever the second worker costs, locks, cache lines that
//! wander, connections that land on the other processor's worker, is missing from twice the throughput.
//!
//! So is what the machine loses as soon as both of its processors work: caches, interrupts from one to the other, the clock. To tell
//! them apart two *processes* of one worker each run as well, with the same connections from either load to either: these share nothing.

use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::case::Case;
use crate::load::{Load, LoadError, Windows};
use crate::measure::{Conditions, Folder, MeasureError};
use crate::peer::{self, Installed, Proxy, Task};
use crate::process;
use crate::report::{Summary, figure};

/// What `bench workers` takes.
#[derive(Debug, Args)]
pub struct WorkersArguments {
    /// Cases; those of TCP that are no matter of time or memory are meant for it
    #[arg(long, value_delimiter = ',', default_values_t = ["ping64x64".to_owned(), "connect-close".to_owned()])]
    pub cases: Vec<String>,
    /// Who takes part; those that are not installed are left out
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Proxy::Haproxy, Proxy::Nginx, Proxy::Envoy, Proxy::Trimtab])]
    pub proxies: Vec<Proxy>,
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub rounds: u16,
    /// Length of a measurement in seconds
    #[arg(long, default_value_t = 2.0, value_parser = crate::seconds)]
    pub seconds: f64,
    /// The two processors
    #[arg(long, value_delimiter = ',', num_args = 2, default_values_t = [0, 1])]
    pub cpus: Vec<usize>,
    /// Write everything measured here
    #[arg(long, value_name = "FILE")]
    pub json: Option<std::path::PathBuf>,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct WorkersReport {
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    case: Case,
    proxy: Proxy,
    /// Operations a second, one worker and its load on one processor.
    one: Summary,
    /// Operations a second, two of both on two processors.
    two: Summary,
    /// Operations a second, two processes of one worker each.
    apart: Summary,
    /// Of throughput, within a round.
    two_over_one: Summary,
    /// Of throughput, within a round: what sharing a process costs.
    two_over_apart: Summary,
    /// Of the proxy's processor time for an operation, within a round.
    cost_two_over_one: Summary,
}

#[derive(Debug, Clone, Copy)]
struct Found {
    operations_per_second: f64,
    cpu_per_operation: f64,
}

/// Measures each proxy with one worker and with two, one right after the other.
pub fn run(
    arguments: &WorkersArguments,
    conditions: &Conditions,
    say: &mut dyn FnMut(&str),
) -> Result<WorkersReport, MeasureError> {
    let mut cases = Vec::new();
    for text in &arguments.cases {
        cases.extend(Case::named(text).map_err(|error| MeasureError::Harness(io::Error::other(error)))?);
    }
    let mut installed = Vec::new();
    for proxy in &arguments.proxies {
        match Installed::find(*proxy) {
            Ok(found) => installed.push(found),
            Err(missing) => say(&missing.to_string()),
        }
    }
    let mut found: Vec<(Case, Proxy, [Found; 3])> = Vec::new();
    for round in 0..arguments.rounds {
        for &case in &cases {
            for turn in 0..installed.len() {
                let installed = &installed[(turn + usize::from(round)) % installed.len()];
                if !installed.proxy.carries(case) {
                    continue;
                }
                let one = measure(installed, case, &arguments.cpus[1..], false, conditions)?;
                let two = measure(installed, case, &arguments.cpus, false, conditions)?;
                let apart = measure(installed, case, &arguments.cpus, true, conditions)?;
                say(&format!(
                    "round {}/{} {:14} {:8} one {} op/s, two {} op/s, apart {} op/s, x {:.2} of one, x {:.2} of apart, cost x {:.2}",
                    round + 1,
                    arguments.rounds,
                    case.name(),
                    installed.proxy,
                    figure(one.operations_per_second),
                    figure(two.operations_per_second),
                    figure(apart.operations_per_second),
                    two.operations_per_second / one.operations_per_second,
                    two.operations_per_second / apart.operations_per_second,
                    two.cpu_per_operation / one.cpu_per_operation
                ));
                found.push((case, installed.proxy, [one, two, apart]));
            }
        }
    }
    let rows = cases.iter().flat_map(|case| installed.iter().map(move |i| (*case, i.proxy)));
    Ok(WorkersReport { rows: rows.filter_map(|(case, proxy)| row(case, proxy, &found)).collect() })
}

fn row(case: Case, proxy: Proxy, found: &[(Case, Proxy, [Found; 3])]) -> Option<Row> {
    let of_row = || found.iter().filter(|(c, p, _)| (*c, *p) == (case, proxy));
    let summary = |value: fn(&[Found; 3]) -> f64| Summary::of(of_row().map(|(.., f)| value(f)).collect());
    Some(Row {
        case,
        proxy,
        one: summary(|[one, ..]| one.operations_per_second)?,
        two: summary(|[_, two, _]| two.operations_per_second)?,
        apart: summary(|[.., apart]| apart.operations_per_second)?,
        two_over_one: summary(|[one, two, _]| two.operations_per_second / one.operations_per_second)?,
        two_over_apart: summary(|[_, two, apart]| two.operations_per_second / apart.operations_per_second)?,
        cost_two_over_one: summary(|[one, two, _]| two.cpu_per_operation / one.cpu_per_operation)?,
    })
}

/// A worker and a load on each of the processors; `apart`: each worker is a process of its own.
fn measure(
    installed: &Installed,
    case: Case,
    cpus: &[usize],
    apart: bool,
    conditions: &Conditions,
) -> Result<Found, MeasureError> {
    let mix = case.mix(conditions.rate);
    let new = || Load::new(&mix, Arc::clone(&conditions.interrupted));
    let loads: Result<Vec<Load>, io::Error> = cpus.iter().map(|_| new()).collect();
    let loads = loads.map_err(MeasureError::Harness)?;
    // Whoever's client it was: every backend answers as it is asked.
    let backends: Vec<SocketAddr> = loads.iter().flat_map(Load::backends).copied().collect();
    let mut started = Vec::new();
    for cpus in cpus.chunks(if apart { 1 } else { cpus.len() }) {
        let folder = Folder::new().map_err(MeasureError::Harness)?;
        let listen = peer::free_address().map_err(MeasureError::Harness)?;
        let (bulk, udp, workers) = (case.is_bulk(), case.has_udp(), cpus.len());
        let task = Task { listen, backends: backends.clone(), bulk, udp, workers };
        let tree = installed.start(&task, &folder.0, cpus).map_err(MeasureError::Proxy)?;
        started.push((listen, tree, folder));
    }
    let listen: Vec<SocketAddr> = started.iter().map(|(listen, ..)| *listen).collect();
    let cpu_time = || -> Result<Duration, MeasureError> {
        started.iter().map(|(_, tree, _)| tree.cpu_time().map_err(MeasureError::Proxy)).sum()
    };
    let barrier = Arc::new(Barrier::new(loads.len() + 1));
    let threads: Vec<_> = loads
        .into_iter()
        .zip(cpus.iter().copied())
        .map(|(load, cpu)| {
            let (barrier, conditions, listen) = (Arc::clone(&barrier), conditions.clone(), listen.clone());
            std::thread::spawn(move || one_load(load, cpu, &listen, &barrier, &conditions))
        })
        .collect();
    barrier.wait();
    let before = cpu_time();
    barrier.wait();
    let after = cpu_time();
    let mut operations_per_second = 0.0;
    let mut operations = 0;
    for thread in threads {
        let windows =
            thread.join().map_err(|_| MeasureError::Harness(io::Error::other("a load panicked")))??;
        for part in &windows.parts {
            operations += part.operations;
            operations_per_second += part.operations as f64 / part.elapsed.as_secs_f64();
        }
    }
    let used = after? - before?;
    Ok(Found { operations_per_second, cpu_per_operation: used.as_secs_f64() * 1e6 / operations as f64 })
}

fn one_load(
    mut load: Load,
    cpu: usize,
    listen: &[SocketAddr],
    barrier: &Barrier,
    conditions: &Conditions,
) -> Result<Windows, MeasureError> {
    // Whatever happens, everybody meets at the barrier twice.
    let warm = warm_up(&mut load, cpu, listen, conditions.warmup);
    barrier.wait();
    load.begin_window();
    let ran = warm.and_then(|()| load.run(conditions.window));
    let windows = load.end_window();
    barrier.wait();
    ran?;
    Ok(windows)
}

fn warm_up(load: &mut Load, cpu: usize, listen: &[SocketAddr], time: Duration) -> Result<(), LoadError> {
    process::pin_to(cpu)?;
    load.open(listen)?;
    load.run(time)
}

impl WorkersReport {
    /// The table.
    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "| case | proxy | op/s, one | op/s, two | op/s, two processes | two over one | two over two processes | \
             cost of an operation, two over one |\n|---|---|--:|--:|--:|--:|--:|--:|\n",
        );
        for row in &self.rows {
            let ratio = |s: &Summary| format!("{:.2} ({:.2}–{:.2})", s.median, s.min, s.max);
            writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} |",
                row.case.name(),
                row.proxy,
                figure(row.one.median),
                figure(row.two.median),
                figure(row.apart.median),
                ratio(&row.two_over_one),
                ratio(&row.two_over_apart),
                ratio(&row.cost_two_over_one)
            )
            .expect("a String takes all");
        }
        text
    }
}
