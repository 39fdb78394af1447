//! The simulator against queueing theory, and against itself.

use allocation::Policy;

use super::balancer::Contender;
use super::metric::Metric;
use super::scenario;
use super::server::{Change, Meter, Plan, Speed};
use super::world::{Run, Setup, Work, run};

/// Servers with one place, services of 100 ms on average, at 0.9 of what they can do.
fn queues(servers: usize, seconds: f64) -> Setup {
    Setup {
        plans: vec![Plan { places: 1, speed: Speed::steady(1.0), changes: Vec::new() }; servers],
        meter: Meter::Busy,
        load: vec![(0.0, 9.0 * servers as f64)],
        prefill: 0,
        work: Work::Exponential(0.1),
        balancers: 1,
        report_interval: 1.0,
        loss: 0.0,
        timeout: None,
        warm_up: 30.0,
        seconds,
    }
}

/// Mean latency over the mean service.
fn mean(setup: &Setup, contender: Contender) -> f64 {
    Metric::Mean.of(&mut run(setup, contender, 1)) / 100.0
}

#[test]
fn a_queue_is_as_long_as_theory_says() {
    // 1 / (1 - 0.9).
    let random = mean(&queues(64, 300.0), Contender::Random);
    assert!((9.0..11.0).contains(&random), "M/M/1: {random}");
    // The sum of 0.9^(2^i - 2): 2.61 for infinitely many servers.
    let p2c = mean(&queues(64, 100.0), Contender::P2c);
    assert!((2.5..2.9).contains(&p2c), "two choices: {p2c}");
}

/// A run with everything that can end a flow.
fn mixed(contender: Contender, seed: u64) -> (Setup, Run) {
    let mut setup =
        Setup { timeout: Some(0.5), balancers: 2, loss: 0.2, seconds: 10.0, warm_up: 0.0, ..queues(8, 0.0) };
    setup.plans[3].changes.push((2.0, Change::Fail));
    setup.plans[7].changes.push((3.0, Change::Join));
    let result = run(&setup, contender, seed);
    (setup, result)
}

#[test]
fn every_flow_ends_once() {
    for contender in Contender::all() {
        let (_, run) = mixed(contender, 7);
        let opened: u64 = run.seconds.iter().flat_map(|second| &second.opened).map(|n| u64::from(*n)).sum();
        let ended = run.answered + run.failed();
        assert_eq!(run.latencies_us.len() as u64, ended, "{contender}");
        assert!(opened + run.refused == ended && opened > 500, "{contender}: {opened} opened, {ended} ended");
    }
}

#[test]
fn all_policies_see_the_same_arrivals() {
    let count = |contender| mixed(contender, 7).1.latencies_us.len();
    let counts: Vec<usize> = Contender::all().into_iter().map(count).collect();
    assert!(counts.iter().all(|n| *n == counts[0]), "{counts:?}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for contender in Contender::all() {
        assert_eq!(mixed(contender, 3).1, mixed(contender, 3).1, "{contender}");
    }
    let adaptive = Contender::Trimtab(Policy::Adaptive);
    assert_ne!(mixed(adaptive, 3).1, mixed(adaptive, 4).1);
}

#[test]
fn every_scenario_speaks_of_those_who_take_part() {
    for scenario in scenario::all(None) {
        for bound in &scenario.bounds {
            assert!(scenario.contenders.contains(&bound.of), "{}: {bound:?}", scenario.name);
            assert!(scenario.metrics.contains(&bound.metric), "{}: {bound:?}", scenario.name);
        }
    }
}

#[test]
fn every_name_of_a_policy_parses() {
    for contender in Contender::all() {
        assert_eq!(contender.to_string().parse(), Ok(contender));
    }
}
