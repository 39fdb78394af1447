//! `bench reports`: what a report costs the balancer, and how soon one is seen by selections.
//!
//! ```text
//! rate     report streams (this process)   --gRPC-->  trimtab serve, alone on a processor     schedstat, /metrics
//! steady   report streams, one a connection   --gRPC-->  trimtab serve with a store    schedstat, smaps, /metrics
//! visible  report streams (this process)   --gRPC-->  control (in this process) -> Publisher  polled for the change
//! ```

mod rate;
mod steady;
mod streams;
mod visible;

use std::fmt::{self, Write as _};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use serde::Serialize;

use crate::process;

/// Reports a second that one processor must take in.
const RATE_GOAL: f64 = 50_000.0;
/// Up to how many resources a report must be visible in how many milliseconds (99th percentile).
const VISIBLE_GOALS: [(usize, f64); 2] = [(1_000, 5.0), (10_000, 25.0)];

/// What to measure.
#[derive(Debug, Args)]
pub struct ReportsArguments {
    /// Numbers of resources
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000])]
    resources: Vec<usize>,
    /// Seconds that reports are counted for
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Changes that are waited for
    #[arg(long, default_value_t = 400)]
    samples: usize,
    /// Measure the rate alone
    #[arg(long, conflicts_with = "visible")]
    rate: bool,
    /// Measure the time until a report is visible alone
    #[arg(long)]
    visible: bool,
    /// Instead, let the resources report once a second for so many seconds, each over a connection of its own, to a balancer
    /// with a store; a line a minute
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["rate", "visible"])]
    steady: Option<u64>,
    /// Processor for the balancer
    #[arg(long, default_value_t = 1)]
    proxy_cpu: usize,
    /// Processor for the resources
    #[arg(long, default_value_t = 0)]
    load_cpu: usize,
    /// Write everything measured here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    rates: Vec<rate::Rate>,
    visible: Vec<visible::Visible>,
    steady: Vec<steady::Steady>,
}

/// Measures; `say` gets a line for each step.
///
/// # Errors
/// When trimtab does not start or refuses reports.
pub fn run(arguments: &ReportsArguments, say: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let ReportsArguments { proxy_cpu, load_cpu, seconds, samples, .. } = *arguments;
    ensure!(proxy_cpu != load_cpu, "--proxy-cpu and --load-cpu are both {load_cpu}");
    for cpu in [proxy_cpu, load_cpu] {
        ensure!(process::may_use(cpu)?, "this process may not run on processor {cpu}");
    }
    ensure!(
        arguments.resources.iter().all(|n| (100..=100_000).contains(n)),
        "--resources takes 100 to 100000"
    );
    process::kill_all_on_panic();
    process::kill_all_on_signal().context("handling signals")?;
    process::raise_descriptor_limit().context("raising the limit of open files")?;
    process::pin_to(load_cpu).with_context(|| format!("running on processor {load_cpu} (--load-cpu)"))?;
    let mut report = Report { rates: Vec::new(), visible: Vec::new(), steady: Vec::new() };
    if let Some(seconds) = arguments.steady {
        for &resources in &arguments.resources {
            let steady = steady::measure(resources, seconds, proxy_cpu, say)
                .with_context(|| format!("{resources} resources that report once a second"))?;
            report.steady.push(steady);
        }
        return Ok(report);
    }
    for &resources in &arguments.resources {
        for content in streams::Content::ALL.into_iter().filter(|_| !arguments.visible) {
            let rate = rate::measure(resources, content, seconds, proxy_cpu)
                .with_context(|| format!("the rate with {resources} resources"))?;
            say(&format!("{rate}"));
            report.rates.push(rate);
        }
        if !arguments.rate {
            let visible = visible::measure(resources, samples, proxy_cpu)
                .with_context(|| format!("visibility with {resources} resources"))?;
            say(&format!("{visible}"));
            report.visible.push(visible);
        }
    }
    Ok(report)
}

impl Report {
    /// Tables to paste into a page.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a String takes all");
        text
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        if !self.rates.is_empty() {
            writeln!(
                text,
                "Reports folded in by `trimtab serve` on one processor (the resources are on another):\n"
            )?;
            writeln!(
                text,
                "| resources | report | accepted/s | balancer's processor | µs each | of that user | /s on one processor | goal |"
            )?;
            writeln!(text, "|--:|---|--:|--:|--:|--:|--:|---|")?;
        }
        for rate in &self.rates {
            writeln!(
                text,
                "| {} | {} | {:.0} | {:.0} % | {:.1} | {:.1} | **{:.0}** | ≥ {RATE_GOAL}: {} |",
                rate.resources,
                rate.content.about(),
                rate.accepted_per_second,
                rate.busy * 100.0,
                rate.cpu_micros,
                rate.user_micros,
                rate.per_processor(),
                verdict(rate.per_processor() >= RATE_GOAL)
            )?;
        }
        for steady in &self.steady {
            steady.write(text)?;
        }
        if !self.visible.is_empty() {
            writeln!(
                text,
                "\nFrom sending a report to its effect in the table that selections read, beside one report a second of every other resource:\n"
            )?;
            writeln!(
                text,
                "| resources | changes | p50 ms | p90 ms | p99 ms | max ms | ack p50 ms | ack p99 ms | goal |"
            )?;
            writeln!(text, "|--:|--:|--:|--:|--:|--:|--:|--:|---|")?;
        }
        for v in &self.visible {
            let goal = VISIBLE_GOALS.iter().find(|(most, _)| v.resources <= *most);
            let goal =
                goal.map(|(_, ms)| format!("p99 ≤ {ms}: {}", verdict(v.p99 <= *ms))).unwrap_or_default();
            writeln!(
                text,
                "| {} | {} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {goal} |",
                v.resources, v.samples, v.p50, v.p90, v.p99, v.max, v.ack_p50, v.ack_p99
            )?;
        }
        Ok(())
    }
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "**missed**" }
}
