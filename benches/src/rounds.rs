//! Interleaving: in each round every case is measured on every proxy, one right after the other, and each round starts
//! with another proxy. Machines drift; what is compared was measured within seconds of each other.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::case::{Case, Metric};
use crate::load::LoadError;
use crate::measure::{Conditions, MeasureError, Sample, measure};
use crate::peer::{Installed, Proxy};

/// What to run.
#[derive(Debug)]
pub struct Plan {
    /// The cases, in order.
    pub cases: Vec<Case>,
    /// The proxies, in column order.
    pub proxies: Vec<Installed>,
    /// How often.
    pub rounds: usize,
    /// How often a measurement is repeated that others disturbed.
    pub retries: usize,
    /// Given by hand; otherwise half of what the slowest proxy manages.
    pub rate: Option<f64>,
}

/// One sample.
#[derive(Debug)]
pub struct Measured {
    /// From 0.
    pub round: usize,
    /// On which load.
    pub case: Case,
    /// Of whom.
    pub proxy: Proxy,
    /// What was found.
    pub sample: Sample,
}

/// A measurement that brought no sample.
#[derive(Debug)]
pub struct Failure {
    /// From 0.
    pub round: usize,
    /// On which load.
    pub case: Case,
    /// Whose.
    pub proxy: Proxy,
    /// Why.
    pub error: String,
}

/// All that was measured.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The samples.
    pub measured: Vec<Measured>,
    /// What failed.
    pub failures: Vec<Failure>,
    /// The rate of the case that has one.
    pub rate: Option<f64>,
    /// It was ended before its time.
    pub interrupted: bool,
}

/// Where others used more than this share of a processor, a measurement is repeated.
pub const FOREIGN_MAX: f64 = 0.05;
/// Time to find out what a proxy manages, when a rate is to be set by it.
const CALIBRATION: Duration = Duration::from_millis(1000);

/// Runs the plan; `say` gets a line for each step.
pub fn run(plan: &Plan, conditions: &Conditions, say: &mut dyn FnMut(&str)) -> Outcome {
    let mut conditions = conditions.clone();
    let mut outcome = Outcome::default();
    if plan.cases.contains(&Case::Ping64x64AtRate) {
        conditions.rate = plan.rate.unwrap_or_else(|| half_of_the_slowest(plan, &conditions, say));
        outcome.rate = Some(conditions.rate);
    }
    for round in 0..plan.rounds {
        for &case in &plan.cases {
            for turn in 0..plan.proxies.len() {
                let installed = &plan.proxies[(turn + round) % plan.proxies.len()];
                if !installed.proxy.carries(case) {
                    continue;
                }
                if conditions.interrupted.load(Ordering::Relaxed) {
                    outcome.interrupted = true;
                    return outcome;
                }
                let result = undisturbed(installed, case, &conditions, plan.retries);
                let head =
                    format!("round {}/{} {:14} {:8}", round + 1, plan.rounds, case.name(), installed.proxy);
                keep(&mut outcome, round, case, installed.proxy, result, &head, say);
            }
        }
    }
    outcome
}

/// Measures, again where others were busy on the same processors; in the end what was least disturbed is taken.
fn undisturbed(
    installed: &Installed,
    case: Case,
    conditions: &Conditions,
    retries: usize,
) -> Result<Sample, MeasureError> {
    let noise = |sample: &Sample| sample.get(&Metric::ForeignBusy).copied().unwrap_or(0.0);
    let mut best = measure(installed, case, conditions)?;
    for _ in 0..retries {
        if noise(&best) <= FOREIGN_MAX {
            break;
        }
        let again = measure(installed, case, conditions)?;
        if noise(&again) < noise(&best) {
            best = again;
        }
    }
    Ok(best)
}

fn keep(
    outcome: &mut Outcome,
    round: usize,
    case: Case,
    proxy: Proxy,
    result: Result<Sample, MeasureError>,
    head: &str,
    say: &mut dyn FnMut(&str),
) {
    match result {
        Ok(sample) => {
            say(&format!("{head} {}", brief(case, &sample)));
            outcome.measured.push(Measured { round, case, proxy, sample });
        }
        Err(MeasureError::Load(LoadError::Interrupted)) => outcome.interrupted = true,
        Err(error) => {
            say(&format!("{head} FAILED: {error}"));
            outcome.failures.push(Failure { round, case, proxy, error: error.to_string() });
        }
    }
}

fn half_of_the_slowest(plan: &Plan, conditions: &Conditions, say: &mut dyn FnMut(&str)) -> f64 {
    let conditions = Conditions { window: CALIBRATION, warmup: CALIBRATION / 2, ..conditions.clone() };
    let mut slowest = f64::INFINITY;
    for installed in plan.proxies.iter().filter(|p| p.proxy != Proxy::Direct) {
        match measure(installed, Case::Ping64x64, &conditions) {
            Ok(sample) => slowest = slowest.min(sample[&Metric::OperationsPerSecond]),
            Err(error) => say(&format!("calibration {:8} FAILED: {error}", installed.proxy)),
        }
    }
    // Where nothing could be asked, anything is said: the rounds will fail and tell.
    let rate = if slowest.is_finite() { (slowest / 2.0 / 100.0).round().max(1.0) * 100.0 } else { 1000.0 };
    say(&format!("ping64x64@rate runs at {rate} op/s, half of what the slowest proxy manages"));
    rate
}

fn brief(case: Case, sample: &Sample) -> String {
    let shown = case.metrics().iter().chain(&[Metric::ProxyBusy, Metric::LoadBusy, Metric::ForeignBusy]);
    let mut parts: Vec<String> = shown
        .filter_map(|m| sample.get(m).map(|v| format!("{} {}", m.title(), crate::report::figure(*v))))
        .collect();
    let troubles = [Metric::Errors, Metric::Unfinished];
    parts.extend(
        troubles
            .iter()
            .filter_map(|m| sample.get(m).filter(|v| **v > 0.0).map(|v| format!("{} {v}", m.title()))),
    );
    parts.join(" · ")
}
