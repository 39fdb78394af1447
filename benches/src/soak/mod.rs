//! `bench soak`: whether trimtab stays right, bounded and alive under load that lasts or that hurts.
//!
//! ```text
//! clients (this process)  -->  trimtab serve (its own process)  -->  backends (this process)
//!     an order first, then bytes that both know       |                 do as ordered; have bad moods
//!                            /proc and /metrics, looked at while it runs and when all is over
//! ```
//!
//! Owns the scenarios and their verdicts: a check that does not hold makes the command fail. Does not own how fast trimtab is
//! (the other commands do) nor single behaviours (the end-to-end tests do). What is needed to start and stop things is the
//! end-to-end tests' own (`e2e`): it panics when something cannot be started at all, and what it started ends with this
//! process.

mod backend;
mod client;
mod exhaustion;
mod flood;
mod half_open;
mod mixed;
mod namespace;
mod order;
mod ping;
mod slow_readers;
mod subject;
mod syn;
mod trend;
mod udp_flows;
mod verdict;

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};

use crate::process;

pub use verdict::Report;

/// What to run.
#[derive(Debug, Args)]
pub struct SoakArguments {
    /// What happens to it
    scenario: Scenario,
    /// What moves the bytes
    #[arg(long, default_value = "uring", value_parser = ["auto", "uring", "tokio-uring", "epoll"])]
    engine: String,
    /// Length; 300 for mixed, less for the others
    #[arg(long, value_parser = clap::value_parser!(u64).range(5..=86_400))]
    seconds: Option<u64>,
    /// Connections a second of mixed
    #[arg(long, default_value_t = 60.0)]
    rate: f64,
    /// Flows at once of slow-readers
    #[arg(long, value_parser = clap::value_parser!(u32).range(10..=9_000))]
    flows: Option<u32>,
    /// Worker threads of trimtab
    #[arg(long, default_value_t = 1)]
    workers: u16,
    /// What happens when, and to which connection, is the same with the same seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write everything found here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// This process has a network of its own already
    #[arg(long, hide = true)]
    in_namespace: bool,
}

/// What happens to trimtab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// All kinds of connections at a moderate rate, backends that fail and come back; then silence, and nothing may be left
    Mixed,
    /// Thousands of flows whose readers take a few bytes a second while their writers push
    SlowReaders,
    /// A hundred thousand UDP clients, in and out of a smaller table
    UdpFlows,
    /// Connections and SYNs as fast as they go, beside pgbench
    Flood,
    /// No descriptors left, no local ports left; then there are again
    Exhaustion,
    /// Clients that say nothing, and flows of which one side never ends
    HalfOpen,
}

impl Scenario {
    /// Whether it changes or fills the network: it gets one of its own.
    fn needs_namespace(self) -> bool {
        matches!(self, Self::Flood | Self::Exhaustion)
    }
}

/// The outcome of the command.
pub enum Outcome {
    /// The scenario ran here.
    Report(Box<Report>),
    /// It ran in a process with a network of its own, which said everything; whether all checks held.
    Elsewhere(bool),
}

/// Runs a scenario; `say` gets a line now and then.
///
/// # Errors
/// When something that the scenario needs cannot be had.
pub fn run(arguments: &SoakArguments, say: &mut dyn FnMut(&str)) -> anyhow::Result<Outcome> {
    if arguments.scenario.needs_namespace() && !arguments.in_namespace {
        return namespace::run_again_inside().map(Outcome::Elsewhere);
    }
    process::raise_descriptor_limit().context("raising the limit of open files")?;
    let report = match arguments.scenario {
        Scenario::Mixed => mixed::run(arguments, say),
        Scenario::SlowReaders => slow_readers::run(arguments, say),
        Scenario::UdpFlows => udp_flows::run(arguments, say),
        Scenario::Flood => flood::run(arguments, say),
        Scenario::Exhaustion => exhaustion::run(arguments, say),
        Scenario::HalfOpen => half_open::run(arguments, say),
    };
    report.map(|report| Outcome::Report(Box::new(report)))
}

/// For clients and backends: one thread, as the load must cost less than what is tested; and one of its own, as backends must
/// go on while this one judges.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().build().context("an event loop")
}
