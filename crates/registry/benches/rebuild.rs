//! How long a pool's next table takes to make: `cargo bench -p trimtab-registry`. The budget is 150 us at 10,000
//! resources.
#![expect(
    clippy::disallowed_methods,
    reason = "what is measured is time; the crate itself never reads a clock"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use allocation::{Policy, Timestamp};
use registry::{
    Config, PoolConfig, RawRegistration, RawUtilization, Readiness, Registration, Registry, Report,
    Utilization,
};

const ROUNDS: usize = 400;

fn main() {
    println!(
        "{:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "resources", "least us", "median us", "p90 us", "report ns", "keep us", "slice us"
    );
    for count in [100, 1_000, 10_000] {
        let registry = registry_of(count);
        let (mut rebuilds, mut reports) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let now = Timestamp::from_millis(5_000 + 20 * round as u64);
            // A few reports between two tables, as in operation.
            let each = 50;
            let batch: Vec<Report> =
                (0..each).map(|n| report((round * each + n * 7) % count, round)).collect();
            let start = Instant::now();
            for report in batch {
                black_box(registry.report(report, now)).expect("registered");
            }
            reports.push(start.elapsed() / each as u32);
            let start = Instant::now();
            let tables = black_box(registry.rebuild(now));
            rebuilds.push(start.elapsed());
            assert_eq!(tables.len(), 1);
        }
        rebuilds.sort_unstable();
        reports.sort_unstable();
        let micros = |d: Duration| d.as_secs_f64() * 1e6;
        let at = |part: usize| micros(rebuilds[(ROUNDS - 1) * part / 100]);
        let report = micros(reports[ROUNDS / 2]) * 1e3;
        let [all, slice] = keep(&registry, count).map(micros);
        let (least, median, p90) = (at(0), at(50), at(90));
        println!(
            "{count:>10} {least:>10.1} {median:>10.1} {p90:>10.1} {report:>10.0} {all:>10.0} {slice:>10.1}"
        );
    }
}

/// What a store is given once all have reported; and the longest look at 128 of them, in which their pool is locked.
fn keep(registry: &Registry, count: usize) -> [Duration; 2] {
    for second in 0..10 {
        let now = Timestamp::from_millis(20_000 + 1_000 * second);
        (0..count).for_each(|n| drop(registry.report(report(n, 1), now)));
        if second < 9 {
            let _ = take(registry);
        }
    }
    take(registry)
}

fn take(registry: &Registry) -> [Duration; 2] {
    let (began, mut longest) = (Instant::now(), Duration::ZERO);
    for from in (0..).step_by(128) {
        let start = Instant::now();
        if black_box(registry.take_kept(0, from, 128)).is_none() {
            break;
        }
        longest = longest.max(start.elapsed());
    }
    [began.elapsed(), longest]
}

fn registry_of(count: usize) -> Registry {
    let pool = PoolConfig::new("sql".parse().expect("a name"), Policy::Adaptive);
    let registry = Registry::new(Config { pools: vec![pool], ..Config::default() }).expect("one pool");
    for n in 0..count {
        let raw = RawRegistration {
            id: format!("pg{n}"),
            pool: "sql".into(),
            address: format!("10.{}.{}.{}:5432", n >> 16, (n >> 8) & 255, n & 255),
            incarnation: 1,
            report_interval: Some(Duration::from_secs(60)),
            ..RawRegistration::default()
        };
        registry.register(Registration::parse(raw).expect("valid"), Timestamp::ZERO).expect("room");
    }
    for n in 0..count {
        registry.report(report(n, 0), Timestamp::from_millis(1_000)).expect("registered");
    }
    registry.rebuild(Timestamp::from_millis(4_000));
    registry
}

fn report(n: usize, round: usize) -> Report {
    let raw = RawUtilization {
        cpu: 0.2 + 0.5 * ((n * 31 + round) % 100) as f64 / 100.0,
        memory: 0.4,
        rate: 100.0 + (n % 50) as f64,
        ..RawUtilization::default()
    };
    Report {
        id: format!("pg{n}").parse().expect("a name"),
        incarnation: 1,
        readiness: Readiness::Ready,
        utilization: Utilization::parse(raw).expect("valid"),
        balancers: 1,
        labels: None,
    }
}
