//! A discrete-event simulation of allocation policies: trimtab's own code, and others' policies beside it.
//!
//! ```text
//! scenario: fleet, load, bounds -> world: arrivals -> balancer::Balancer (trimtab | rivals | prequal) -> server
//!                                         reports  <-                                                   |
//! metric: figures of a run -> report: means over seeds, ratios, reached or missed <---------------------+
//! ```
//!
//! * Each policy runs alone. With one seed, all of them see the same arrivals, work, speeds, report phases and losses.
//! * Flows arrive whether earlier ones have ended or not; latency counts from arrival. There is no network: a flow is in
//!   its server at once, and so is a report in its balancers.
//! * A service keeps the speed that it began with.

mod balancer;
mod event;
mod metric;
mod prequal;
mod random;
mod report;
mod rivals;
mod scenario;
mod server;
#[cfg(test)]
mod tests;
mod trimtab;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use balancer::Contender;
pub use report::Report;
use report::{Figures, ScenarioReport};
use scenario::Scenario;

/// What to simulate.
#[derive(Debug, Clone)]
pub struct Options {
    /// Scenarios by name; empty: all.
    pub scenarios: Vec<String>,
    /// Policies by name; empty: all.
    pub policies: Vec<String>,
    /// Seeds, from 1 on.
    pub seeds: u64,
    /// Seconds that are measured, in scenarios whose length is free; none: as each says.
    pub seconds: Option<f64>,
    /// Runs at a time.
    pub jobs: usize,
}

/// Simulates everything; says through `progress` what is done.
///
/// # Errors
/// A name that is not known, and those that are.
pub fn run(options: &Options, progress: &mut dyn FnMut(&str)) -> Result<Report, String> {
    let mut scenarios = scenario::all(options.seconds);
    let known: Vec<&str> = scenarios.iter().map(|scenario| scenario.name).collect();
    if let Some(name) = options.scenarios.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(format!("there is no scenario {name:?}; there are {}", known.join(", ")));
    }
    scenarios.retain(|s| options.scenarios.is_empty() || options.scenarios.iter().any(|name| name == s.name));
    let wanted: Vec<Contender> =
        options.policies.iter().map(|name| name.parse()).collect::<Result<_, _>>()?;
    let mut reports = Vec::new();
    for scenario in &scenarios {
        let takes_part = |contender: &Contender| wanted.is_empty() || wanted.contains(contender);
        let contenders: Vec<Contender> = scenario.contenders.iter().copied().filter(takes_part).collect();
        if contenders.is_empty() {
            continue;
        }
        let figures = simulate(scenario, &contenders, options);
        reports.push(ScenarioReport::new(scenario, &contenders, &figures));
        progress(scenario.name);
    }
    Ok(Report::new(options.seeds, reports))
}

/// All of a scenario's runs, some at a time. The order in which they end changes nothing.
fn simulate(scenario: &Scenario, contenders: &[Contender], options: &Options) -> Figures {
    let (cases, policies, metrics) = (scenario.cases.len(), contenders.len(), scenario.metrics.len());
    let seeds = options.seeds as usize;
    let next = AtomicUsize::new(0);
    let figures = Mutex::new(vec![vec![vec![vec![0.0; seeds]; metrics]; policies]; cases]);
    let work = || {
        loop {
            let task = next.fetch_add(1, Relaxed);
            if task >= cases * policies * seeds {
                return;
            }
            let (case, policy, seed) = (task / seeds / policies, task / seeds % policies, task % seeds);
            let mut run = world::run(&scenario.cases[case].1, contenders[policy], seed as u64 + 1);
            let values: Vec<f64> = scenario.metrics.iter().map(|metric| metric.of(&mut run)).collect();
            let mut figures = figures.lock().expect("nobody panics with it");
            for (by_seed, value) in figures[case][policy].iter_mut().zip(values) {
                by_seed[seed] = value;
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(work);
        }
    });
    figures.into_inner().expect("nobody panics with it")
}
