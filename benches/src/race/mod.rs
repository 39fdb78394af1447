//! `bench race`: how long clients wait behind trimtab and behind HAProxy, where backends are unequal and some of them
//! are slowed down now and then.
//!
//! ```text
//! load (this process)  --one connection per request-->  balancer  -->  ten backends (one process)
//!   arrivals and work of a seed                        alone in its     slots, a queue, an antagonist of the same seed
//!                                                      window           | each second: gRPC reports / agent-check weights
//! ```
//!
//! * A round has one window for each balancer, one right after the other, and all windows of a round have the same
//!   arrivals, the same work and the same antagonist. Balancer and backends are started for a window and killed after it.
//! * The load is open: a request starts when it is due, whatever became of those before it, and its latency counts from
//!   when it was due. Failures and time-outs count as the whole time-out.

mod backends;
mod balancer;
mod link;
mod load;
mod random;
pub(crate) use random::Random;
mod report;
mod scenario;
mod window;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;

pub use backends::{BackendsArguments, serve};
pub use balancer::Balancer;
pub use report::Report;
pub use scenario::{Scenario, WorkShape};
pub(crate) use window::at_quantile;
pub use window::{Machine, Window};

use crate::process;

/// What to race.
#[derive(Debug, Args)]
pub struct RaceArguments {
    /// Who takes part, in this order
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = Balancer::DEFAULT)]
    balancers: Vec<Balancer>,
    /// Rounds: one window for each balancer
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Length of a window in seconds
    #[arg(long, default_value_t = 20.0, value_parser = number(1.0, 600.0))]
    seconds: f64,
    /// Length of the warm-up before each in seconds
    #[arg(long, default_value_t = 10.0, value_parser = number(1.0, 600.0))]
    warmup: f64,
    /// Part of the mean capacity that the antagonist leaves
    #[arg(long, default_value_t = 0.85, value_parser = number(0.05, 2.0))]
    load: f64,
    /// Requests that a backend serves at once
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1000))]
    slots: u16,
    /// Mean milliseconds of a request on an undisturbed backend of full speed
    #[arg(long, default_value_t = 40.0, value_parser = number(1.0, 10_000.0))]
    work: f64,
    /// How the work of requests is distributed
    #[arg(long, value_enum, default_value_t = WorkShape::Exponential)]
    shape: WorkShape,
    /// Speed of the slow half, the fast half having 1
    #[arg(long, default_value_t = 0.5, value_parser = number(0.05, 1.0))]
    slow: f64,
    /// No antagonist
    #[arg(long)]
    calm: bool,
    /// Seconds that the antagonist stays with some backends before it moves to others: at least, at most
    #[arg(long, num_args = 2, default_values_t = [1.0, 2.0], value_parser = number(0.1, 600.0))]
    holds: Vec<f64>,
    /// The first round's seed; each round adds one
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Times that a window is repeated in which the harness itself was late
    #[arg(long, default_value_t = 2)]
    retries: u16,
    /// Processor for the balancers
    #[arg(long, default_value_t = 1)]
    proxy_cpu: usize,
    /// Processor for clients and backends
    #[arg(long, default_value_t = 0)]
    load_cpu: usize,
    /// Write everything measured here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the tables here as well
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
}

impl RaceArguments {
    fn scenario(&self) -> Scenario {
        let (least, most) = match self.holds[..] {
            [one, other] => (one.min(other), one.max(other)),
            _ => (1.0, 2.0),
        };
        Scenario {
            slots: self.slots.into(),
            mean_work: self.work / 1e3,
            shape: self.shape,
            slow: self.slow,
            antagonist: !self.calm,
            holds: (least, most),
            load: self.load,
            warmup: self.warmup,
            window: self.seconds,
        }
    }
}

/// Runs all rounds; `say` gets a line for each window.
///
/// # Errors
/// When a program is missing, or a window fails for another reason than its balancer's quality.
pub fn run(arguments: &RaceArguments, say: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let RaceArguments { proxy_cpu, load_cpu, .. } = *arguments;
    ensure!(
        proxy_cpu != load_cpu,
        "the load must not run on the processor of what it measures: --proxy-cpu and --load-cpu are both {load_cpu}"
    );
    let mut seen = std::collections::BTreeSet::new();
    let balancers: Vec<Balancer> = arguments.balancers.iter().copied().filter(|b| seen.insert(*b)).collect();
    if balancers.is_empty() {
        bail!("there is nobody to race");
    }
    let machine = Machine::find(&balancers, proxy_cpu, load_cpu)?;
    process::kill_all_on_panic();
    process::kill_all_on_signal().context("handling signals")?;
    process::raise_descriptor_limit().context("raising the limit of open files")?;
    process::pin_to(load_cpu).with_context(|| format!("running on processor {load_cpu} (--load-cpu)"))?;
    let scenario = arguments.scenario();
    let mut windows = Vec::new();
    for round in 0..usize::from(arguments.rounds) {
        let seed = arguments.seed + round as u64;
        for &balancer in &balancers {
            let window = undisturbed(&machine, balancer, &scenario, seed, arguments.retries)
                .with_context(|| format!("round {}, {balancer}", round + 1))?;
            say(&format!("round {}/{} {balancer:26} {}", round + 1, arguments.rounds, window.brief()));
            windows.push(window);
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    Ok(Report::new(&scenario, &balancers, &machine, windows))
}

/// Runs a window, again where the harness was late; in the end the least late is taken.
fn undisturbed(
    machine: &Machine,
    balancer: Balancer,
    scenario: &Scenario,
    seed: u64,
    retries: u16,
) -> anyhow::Result<Window> {
    let mut best = window::run(machine, balancer, scenario, seed)?;
    for _ in 0..retries {
        if best.late() <= report::LATE_MAX_MILLIS {
            break;
        }
        let again = window::run(machine, balancer, scenario, seed)?;
        if again.late() < best.late() {
            best = again;
        }
    }
    Ok(best)
}

/// A number within bounds.
fn number(least: f64, most: f64) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(format!("it takes {least} to {most}")),
    }
}
