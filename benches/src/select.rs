//! What trimtab does for each new flow, and for each new table, in nanoseconds of this thread's processor time.

use std::fmt::Write as _;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use allocation::{
    AllocationTable, Backend, Excluded, LiveFacts, Members, OpenFlow, Policy, PoolName, Selector, Timestamp,
};
use registry::{
    Config, Limits, PoolConfig, RawRegistration, RawUtilization, Readiness, Registration, Registry, Report,
    Utilization,
};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::report::{Summary, figure};

/// Pool sizes.
const SIZES: [usize; 5] = [10, 100, 1_000, 10_000, 100_000];
/// Batches of which each figure is the median; they are measured in turn over all figures.
const BATCHES: usize = 15;
/// How long a batch takes about: long against the clock's call and what is left of the others in the caches.
const BATCH: Duration = Duration::from_millis(20);
/// Any: the same in every run.
const SEED: u64 = 0x7269_6d74_6162;
/// Between two rebuilds of a registry.
const TICK: Duration = Duration::from_millis(100);
/// What the default policy may cost at each of the larger sizes, in ns.
const SELECT_GOALS_NS: [(usize, f64); 3] = [(1_000, 60.0), (10_000, 60.0), (100_000, 120.0)];
/// What a rebuild may cost at each of the larger sizes, in ns.
const REBUILD_GOALS_NS: [(usize, f64); 3] = [(1_000, 15_000.0), (10_000, 150_000.0), (100_000, 3_000_000.0)];

fn goal(goals: &[(usize, f64)], backends: usize) -> Option<f64> {
    goals.iter().find(|(size, _)| *size == backends).map(|(_, most)| *most)
}

/// One figure.
#[derive(Debug, Serialize)]
pub struct Micro {
    /// What was done.
    pub what: String,
    /// On how many backends.
    pub backends: usize,
    /// For one, in ns; the least is what it costs undisturbed.
    pub nanos: Summary,
    /// Most that it may cost (its least figure), where that is set.
    pub goal_ns: Option<f64>,
}

/// Measures all.
pub fn run() -> Vec<Micro> {
    let mut benches: Vec<Bench> = Vec::new();
    for backends in SIZES {
        let pool = Pool::new(backends);
        for policy in Policy::ALL {
            benches.push(select_bench(&pool, policy));
        }
        benches.push(rebuild_bench(&pool));
        benches.push(registry_bench(backends));
    }
    let mut batches: Vec<Vec<f64>> = benches.iter().map(|_| Vec::new()).collect();
    let counts: Vec<u32> = benches.iter_mut().map(Bench::calibrate).collect();
    for _ in 0..BATCHES {
        for ((bench, count), nanos) in benches.iter_mut().zip(&counts).zip(&mut batches) {
            // Brings back into the caches what the others' batches threw out.
            (bench.times)(count / 4);
            nanos.push((bench.times)(*count).as_nanos() as f64 / f64::from(*count));
        }
    }
    let micro = |(bench, nanos): (Bench, Vec<f64>)| {
        let nanos = Summary::of(nanos).expect("there is a batch");
        Micro { what: bench.what, backends: bench.backends, nanos, goal_ns: bench.goal_ns }
    };
    benches.into_iter().zip(batches).map(micro).collect()
}

/// A table of the figures.
pub fn markdown(micros: &[Micro]) -> String {
    let mut text = "| | backends | ns, least | ns, median | goal |\n|---|--:|--:|--:|--:|\n".to_owned();
    for micro in micros {
        let Micro { what, backends, nanos, goal_ns } = micro;
        let goal = goal_ns.map_or_else(String::new, |most| {
            let reached = if nanos.min <= most { "reached" } else { "**missed**" };
            format!("≤ {most}: {reached}")
        });
        let (least, median) = (figure(nanos.min), figure(nanos.median));
        writeln!(text, "| {what} | {backends} | {least} | {median} | {goal} |").expect("a String takes all");
    }
    text
}

/// Backends with unlike weights, each with about one flow open.
struct Pool {
    members: Arc<Members>,
    weights: Vec<f32>,
    held: Arc<Vec<OpenFlow>>,
}

impl Pool {
    fn new(backends: usize) -> Self {
        let backend = |n: usize| Backend {
            id: format!("resource-{n}").parse().expect("it is a name"),
            address: ([10, (n >> 16) as u8, (n >> 8) as u8, n as u8], 5432).into(),
            flows_max: 0,
            live: Arc::new(LiveFacts::default()),
        };
        let members = Arc::new(Members::new((0..backends).map(backend).collect()));
        // 0.5 to 2, spread by the golden ratio.
        let weights: Vec<f32> = (0..backends).map(|n| 0.5 + 1.5 * (n as f32 * 0.618_034).fract()).collect();
        let table = AllocationTable::new(1, Policy::Adaptive, Arc::clone(&members), weights.clone());
        let mut selector = Selector::new(SEED);
        let mut select =
            || selector.select(&table, &Excluded::none(), Timestamp::ZERO).expect("all are ready").open;
        let held = Arc::new((0..backends).map(|_| select()).collect());
        Self { members, weights, held }
    }
}

/// Something to do many times.
struct Bench {
    what: String,
    backends: usize,
    goal_ns: Option<f64>,
    /// Does it so many times, and says how long that took.
    times: Box<dyn FnMut(u32) -> Duration>,
}

impl Bench {
    /// How many make a batch.
    fn calibrate(&mut self) -> u32 {
        let mut count = 1;
        while (self.times)(count) < BATCH {
            count *= 2;
        }
        count
    }
}

/// One selection and the end of its flow.
fn select_bench(pool: &Pool, policy: Policy) -> Bench {
    let table = AllocationTable::new(1, policy, Arc::clone(&pool.members), pool.weights.clone());
    let backends = pool.weights.len();
    let held = Arc::clone(&pool.held);
    let mut selector = Selector::new(SEED);
    let times = move |count| {
        let began = thread_time();
        for _ in 0..count {
            let selection = selector.select(black_box(&table), &Excluded::none(), Timestamp::ZERO);
            drop(black_box(selection));
        }
        let took = thread_time() - began;
        black_box(&held);
        took
    };
    let goal_ns = goal(&SELECT_GOALS_NS, backends).filter(|_| policy == Policy::default());
    Bench { what: format!("select, {policy}"), backends, goal_ns, times: Box::new(times) }
}

/// What the registry does on its tick when a tenth of a pool has reported since the last one: survey, weights, table; and the
/// end of the table before. The reports themselves are not in it.
fn registry_bench(backends: usize) -> Bench {
    let registry = full_registry(backends);
    let mut now = Timestamp::ZERO;
    let mut reporter = 0;
    let mut rebuild_once = move || {
        now = now + TICK;
        for _ in 0..backends.div_ceil(10) {
            reporter = (reporter + 1) % backends;
            registry.report(report(reporter, now), now).expect("it is registered");
        }
        let began = thread_time();
        let tables = registry.rebuild(now);
        assert_eq!(tables.len(), 1, "a report makes its pool's table anew");
        drop(black_box(tables));
        thread_time() - began
    };
    // A second of reports first: averages and weights are on their way then, as they are in a pool that works.
    for _ in 0..10 {
        rebuild_once();
    }
    let times = move |count| (0..count).map(|_| rebuild_once()).sum();
    let goal_ns = goal(&REBUILD_GOALS_NS, backends);
    Bench { what: "registry rebuild, adaptive".to_owned(), backends, goal_ns, times: Box::new(times) }
}

fn full_registry(backends: usize) -> Registry {
    let pool = PoolConfig::new(pool_name(), Policy::Adaptive);
    let limits = Limits { resources_max: backends, ..Limits::default() };
    let registry = Registry::new(Config { pools: vec![pool], limits }).expect("it has one pool");
    for n in 0..backends {
        let raw = RawRegistration {
            id: format!("resource-{n}"),
            pool: pool_name().to_string(),
            address: format!("10.{}.{}.{}:5432", n >> 16, (n >> 8) & 255, n & 255),
            incarnation: 1,
            ..RawRegistration::default()
        };
        let registration = Registration::parse(raw).expect("it is in range");
        registry.register(registration, Timestamp::ZERO).expect("there is room");
    }
    registry
}

/// Busy by 20 % to 80 %, each resource in its own way.
fn report(n: usize, now: Timestamp) -> Report {
    let wave = (n as f64 * 0.618_034 + now.as_millis() as f64 * 1e-4).fract();
    let raw =
        RawUtilization { cpu: 0.2 + 0.6 * wave, rate: 50.0 + 100.0 * wave, ..RawUtilization::default() };
    Report {
        id: format!("resource-{n}").parse().expect("it is a name"),
        incarnation: 1,
        readiness: Readiness::Ready,
        utilization: Utilization::parse(raw).expect("it is in range"),
        balancers: 1,
        labels: None,
    }
}

fn pool_name() -> PoolName {
    "bench".parse().expect("it is a name")
}

/// A new table for the same members with other weights, and the end of the one before.
fn rebuild_bench(pool: &Pool) -> Bench {
    let (members, weights) = (Arc::clone(&pool.members), pool.weights.clone());
    let backends = weights.len();
    let times = move |count| {
        let began = thread_time();
        for generation in 0..count {
            let weights = black_box(&weights).clone();
            let table =
                AllocationTable::new(generation.into(), Policy::Adaptive, Arc::clone(&members), weights);
            drop(black_box(table));
        }
        thread_time() - began
    };
    let goal_ns = goal(&REBUILD_GOALS_NS, backends);
    Bench { what: "table rebuild, adaptive".to_owned(), backends, goal_ns, times: Box::new(times) }
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bench_does_its_work() {
        let pool = Pool::new(10);
        assert_eq!(pool.members.backends().iter().map(|b| b.live.flows_open()).sum::<u32>(), 10);
        for mut bench in Policy::ALL.map(|p| select_bench(&pool, p)).into_iter().chain([rebuild_bench(&pool)])
        {
            let (one, many) = ((bench.times)(100), (bench.times)(100_000));
            assert!(many > one, "{}: {one:?} for 100, {many:?} for 100,000", bench.what);
        }
        let mut registry = registry_bench(10);
        assert!((registry.times)(100) > (registry.times)(1));
        let flows: u32 = pool.members.backends().iter().map(|b| b.live.flows_open()).sum();
        assert_eq!(flows, 10, "a bench leaves no flow behind");
    }
}
