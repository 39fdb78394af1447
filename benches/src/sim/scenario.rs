//! What is simulated, and what must come out.

use allocation::Policy;

use super::balancer::Contender;
use super::metric::Metric;
use super::server::{Band, Change, Meter, Plan, Speed};
use super::world::{CLAMPED_MEAN, Setup, Work};

/// A scenario.
#[derive(Debug, Clone)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// For people.
    pub(crate) about: String,
    /// Its cases: name and setup.
    pub(crate) cases: Vec<(String, Setup)>,
    /// Who takes part.
    pub(crate) contenders: Vec<Contender>,
    /// What is shown of each; the first is also shown as a ratio.
    pub(crate) metrics: Vec<Metric>,
    /// What must come out.
    pub(crate) bounds: Vec<Bound>,
}

/// Something that must come out.
#[derive(Debug, Clone)]
pub(crate) struct Bound {
    /// In which cases.
    pub(crate) cases: Cases,
    /// Whose figure.
    pub(crate) of: Contender,
    /// Which.
    pub(crate) metric: Metric,
    /// What must hold.
    pub(crate) test: Test,
    /// What we would like beyond it.
    pub(crate) aim: Option<f64>,
}

/// Some of a scenario's cases, by place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cases(pub(crate) usize, pub(crate) usize);

/// What must hold of a figure's mean over seeds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Test {
    /// So many times the other's, at most (mean of the ratios seed by seed).
    Times(Contender, f64),
    /// As much as the other's, at most.
    NotMoreThan(Contender),
    AtMost(f64),
    AtLeast(f64),
}

const ALL: Cases = Cases(0, usize::MAX);
const ADAPTIVE: Contender = Contender::Trimtab(Policy::Adaptive);
const PREQUAL: Contender = Contender::Prequal(60);

fn times(metric: Metric, rival: Contender, most: f64) -> Bound {
    Bound { cases: ALL, of: ADAPTIVE, metric, test: Test::Times(rival, most), aim: None }
}

fn at_most(of: Contender, metric: Metric, most: f64) -> Bound {
    Bound { cases: ALL, of, metric, test: Test::AtMost(most), aim: None }
}

impl Bound {
    fn in_cases(self, from: usize, until: usize) -> Self {
        Self { cases: Cases(from, until), ..self }
    }
}

/// Every scenario. `seconds` is measured where the length is free.
pub(crate) fn all(seconds: Option<f64>) -> Vec<Scenario> {
    let mut scenarios =
        vec![pt20(), homogeneous(), stale(), lost(), ramp(), sinkhole(), overload(), join(), utilization()];
    let free = ["pt20", "homogeneous", "stale", "lost", "ramp", "sinkhole"];
    for scenario in scenarios.iter_mut().filter(|scenario| free.contains(&scenario.name)) {
        for (_, setup) in &mut scenario.cases {
            setup.seconds = seconds.unwrap_or(setup.seconds);
        }
    }
    scenarios
}

/// Twenty servers of four places, half of them half as fast; three of ten have a noisy neighbour. (After the testbed of
/// `prequal-rs`.) Nominal: 1500 flows a second.
fn pt20_setup(load: f64) -> Setup {
    let noisy = vec![Band { until: 0.5, range: (0.3, 0.7) }, Band { until: 1.0, range: (0.9, 1.3) }];
    let calm = vec![Band { until: 1.0, range: (1.2, 2.0) }];
    let plan = |number: usize| {
        let base = if number.is_multiple_of(2) { 0.5 } else { 1.0 };
        let bands = if [0, 3, 6, 11, 14, 17].contains(&number) { noisy.clone() } else { calm.clone() };
        let speed = Speed { base, bands, redraw: Some((0.7, 1.3)) };
        Plan { places: 4, speed, changes: Vec::new() }
    };
    Setup {
        plans: (0..20).map(plan).collect(),
        meter: Meter::Busy,
        load: vec![(0.0, 1500.0 * load)],
        prefill: 0,
        work: Work::ClampedNormal(0.040),
        balancers: 1,
        report_interval: 1.0,
        loss: 0.0,
        timeout: Some(10.0),
        warm_up: 3.0,
        seconds: 60.0,
    }
}

fn steady(servers: usize, places: u32) -> Vec<Plan> {
    vec![Plan { places, speed: Speed::steady(1.0), changes: Vec::new() }; servers]
}

fn pt20() -> Scenario {
    let mut cases = Vec::new();
    for load in [0.9, 1.1] {
        for balancers in [1, 4] {
            for report_interval in [0.1, 1.0] {
                let name = format!("load {load}, {balancers} balancer(s), reports every {report_interval} s");
                cases.push((name, Setup { balancers, report_interval, ..pt20_setup(load) }));
            }
        }
    }
    let leastconn = Bound { aim: Some(0.70), ..times(Metric::P99, Contender::LeastConn, 0.80) };
    Scenario {
        name: "pt20",
        about: "20 servers with 4 places, half of them half as fast, 6 with noisy neighbours; speeds change each \
                second; flows of 43 ms of work on average, 10 s timeout."
            .to_owned(),
        cases,
        contenders: Contender::all(),
        metrics: vec![Metric::P99, Metric::P999, Metric::Mean, Metric::Failed],
        bounds: vec![
            leastconn,
            times(Metric::P99, Contender::P2c, 0.65),
            times(Metric::P99, Contender::PeakEwma, 0.90),
            times(Metric::P99, Contender::A58, 0.45),
            times(Metric::P99, PREQUAL, 1.10),
            times(Metric::P999, Contender::LeastConn, 0.85),
        ],
    }
}

fn homogeneous() -> Scenario {
    let setup = Setup {
        plans: steady(20, 4),
        load: vec![(0.0, 1800.0)],
        work: Work::Exponential(0.040),
        timeout: None,
        ..pt20_setup(1.0)
    };
    let cases =
        [1, 4].map(|balancers| (format!("{balancers} balancer(s)"), Setup { balancers, ..setup.clone() }));
    Scenario {
        name: "homogeneous",
        about: "20 equal servers with 4 places, exponential work of 40 ms, at 0.9 of what they can do: nothing to \
                learn, and nothing may be lost."
            .to_owned(),
        cases: cases.into(),
        contenders: Contender::all(),
        metrics: vec![Metric::Mean, Metric::P99, Metric::P999],
        bounds: vec![
            times(Metric::Mean, Contender::LeastConn, 1.05).in_cases(0, 1),
            times(Metric::Mean, Contender::LeastConn, 1.25).in_cases(1, 2),
            times(Metric::P99, Contender::LeastConn, 1.10),
        ],
    }
}

fn stale() -> Scenario {
    let setup = Setup {
        plans: steady(16, 1),
        load: vec![(0.0, 144.0)],
        work: Work::Exponential(0.100),
        timeout: None,
        warm_up: 30.0,
        seconds: 600.0,
        ..pt20_setup(1.0)
    };
    let cases = [1, 5, 20, 100].map(|age| {
        let report_interval = 0.1 * f64::from(age);
        (format!("reports every {age} services"), Setup { report_interval, ..setup.clone() })
    });
    Scenario {
        name: "stale",
        about: "16 servers with one place, exponential work of 100 ms, at 0.9 of what they can do."
            .to_owned(),
        cases: cases.into(),
        contenders: Contender::all(),
        metrics: vec![Metric::Mean, Metric::P99],
        bounds: vec![
            times(Metric::Mean, Contender::ExactJsq, 2.0),
            times(Metric::Mean, Contender::Random, 0.4),
        ],
    }
}

fn lost() -> Scenario {
    let case = |loss: f64, balancers| {
        let name = format!("{:.0} % lost, {balancers} balancer(s)", loss * 100.0);
        (name, Setup { loss, balancers, ..pt20_setup(0.9) })
    };
    Scenario {
        name: "lost",
        about: "pt20 at load 0.9 with reports every second, of which many do not arrive (leases are renewed all the \
                same)."
            .to_owned(),
        cases: vec![case(1.0, 1), case(1.0, 4), case(0.5, 1), case(0.5, 4)],
        contenders: vec![ADAPTIVE, Contender::LeastConn, Contender::P2c, Contender::A58],
        metrics: vec![Metric::P99, Metric::P999, Metric::Mean, Metric::Failed],
        bounds: vec![
            times(Metric::P99, Contender::LeastConn, 1.05).in_cases(0, 2),
            times(Metric::P99, Contender::LeastConn, 1.10).in_cases(2, 4),
        ],
    }
}

fn ramp() -> Scenario {
    // What a server is allotted is 1 for each place. Three of ten are on machines that are full, so that this is about
    // all they get; the others use what their neighbours leave.
    let plan = |number: usize| {
        let full = number % 10 < 3;
        let range = if full { (0.8, 1.1) } else { (2.0, 4.0) };
        let speed = Speed { base: 1.0, bands: vec![Band { until: 1.0, range }], redraw: Some((0.7, 1.3)) };
        Plan { places: 2, speed, changes: Vec::new() }
    };
    let mean = 0.080;
    let setup = Setup {
        plans: (0..100).map(plan).collect(),
        meter: Meter::Allotment,
        work: Work::ClampedNormal(mean / CLAMPED_MEAN),
        balancers: 4,
        timeout: Some(5.0),
        seconds: 80.0,
        ..pt20_setup(1.0)
    };
    let cases = (0..9).map(|k| {
        let level = 0.75 * (10.0_f64 / 9.0).powi(k);
        (format!("{level:.2}"), Setup { load: vec![(0.0, level * 200.0 / mean)], ..setup.clone() })
    });
    let failing = Bound {
        cases: Cases(3, 9),
        of: Contender::A58,
        metric: Metric::Failed,
        test: Test::AtLeast(1e-4),
        aim: None,
    };
    let no_worse = Bound { test: Test::NotMoreThan(PREQUAL), ..at_most(ADAPTIVE, Metric::Failed, 0.0) };
    Scenario {
        name: "ramp",
        about: "100 servers, 4 balancers, load in parts of what all servers are allotted; 30 of them get no more than \
                that, the others find 2 to 4 times as much. Utilization is of the allotment. 5 s deadline."
            .to_owned(),
        cases: cases.collect(),
        contenders: vec![ADAPTIVE, Contender::LeastConn, Contender::P2c, Contender::A58, PREQUAL],
        metrics: vec![Metric::Failed, Metric::P99, Metric::P999],
        bounds: vec![
            at_most(ADAPTIVE, Metric::Failed, 0.0).in_cases(0, 6),
            no_worse.in_cases(6, 9),
            failing,
        ],
    }
}

fn sinkhole() -> Scenario {
    let mut setup = pt20_setup(0.7);
    for plan in &mut setup.plans[4..6] {
        plan.changes.push((5.0, Change::Fail));
    }
    let cases =
        [1, 4].map(|balancers| (format!("{balancers} balancer(s)"), Setup { balancers, ..setup.clone() }));
    let rivals = [Contender::RoundRobin, Contender::LeastConn, Contender::P2c, Contender::A58, PREQUAL];
    Scenario {
        name: "sinkhole",
        about: "pt20 at load 0.7; from second 5 on two servers accept and reset every connection, and report that they \
                are idle."
            .to_owned(),
        cases: cases.into(),
        contenders: [ADAPTIVE].into_iter().chain(rivals).collect(),
        metrics: vec![Metric::Failed, Metric::P99],
        bounds: vec![times(Metric::Failed, Contender::RoundRobin, 0.15)],
    }
}

fn overload() -> Scenario {
    let setup = Setup {
        plans: steady(20, 4),
        load: vec![(0.0, 1400.0), (30.0, 2600.0), (90.0, 1400.0)],
        work: Work::Exponential(0.040),
        warm_up: 5.0,
        seconds: 165.0,
        ..pt20_setup(1.0)
    };
    let cases =
        [1, 4].map(|balancers| (format!("{balancers} balancer(s)"), Setup { balancers, ..setup.clone() }));
    // Ten seconds of timeout after its end the queues are gone.
    let (during, after) = (Metric::ShareSpread(30, 90), Metric::ShareSpread(105, 165));
    Scenario {
        name: "overload",
        about: "20 equal servers with 4 places at 0.7 of what they can do; from second 30 to 90 at 1.3. 10 s timeout."
            .to_owned(),
        cases: cases.into(),
        contenders: vec![ADAPTIVE, Contender::LeastConn, Contender::P2c, Contender::A58, PREQUAL],
        metrics: vec![during, after, Metric::Failed],
        bounds: vec![at_most(ADAPTIVE, during, 0.10), at_most(ADAPTIVE, after, 0.10)],
    }
}

fn join() -> Scenario {
    // So that any number of flows is served at once.
    let place = Plan { places: u32::MAX, speed: Speed::steady(1.0), changes: Vec::new() };
    let mut plans = vec![place.clone(); 20];
    plans.push(Plan { changes: vec![(20.0, Change::Join)], ..place });
    let setup = Setup {
        plans,
        meter: Meter::Flows { base: 0.05, each: 0.0001 },
        load: vec![(0.0, 100_000.0 / 60.0)],
        prefill: 100_000,
        work: Work::Exponential(60.0),
        timeout: None,
        warm_up: 0.0,
        seconds: 150.0,
        ..pt20_setup(1.0)
    };
    let cases =
        [1, 4].map(|balancers| (format!("{balancers} balancer(s)"), Setup { balancers, ..setup.clone() }));
    // One of four samples among 21 is the newcomer; its slow start begins with a tenth of its weight.
    let (first, most) = (Metric::LastShare(20, 21), Metric::LastShareMost(20, 80));
    let held = Metric::HeldEvenness(80);
    Scenario {
        name: "join",
        about: "20 servers hold 100,000 flows of 60 s on average (an hour, scaled down); at second 20 one joins. \
                A server is busy by 0.05 and 0.0001 for each flow."
            .to_owned(),
        cases: cases.into(),
        contenders: vec![ADAPTIVE, Contender::Trimtab(Policy::LeastConnections), Contender::LeastConn, Contender::P2c],
        metrics: vec![first, most, held],
        bounds: vec![
            at_most(ADAPTIVE, first, 4.0 * 0.1 / 20.1),
            at_most(ADAPTIVE, most, 4.0 / 21.0),
            at_most(ADAPTIVE, held, 1.10),
        ],
    }
}

fn utilization() -> Scenario {
    let mut plans = steady(20, 4);
    for plan in &mut plans[..10] {
        plan.changes.push((30.0, Change::Faster(2.0)));
    }
    let setup = Setup {
        plans,
        load: vec![(0.0, 9600.0)],
        work: Work::Exponential(0.005),
        warm_up: 3.0,
        seconds: 87.0,
        ..pt20_setup(1.0)
    };
    let own = Policy::ALL.into_iter().find(|policy| policy.name() == "utilization");
    let of = Contender::Trimtab(own.unwrap_or(Policy::Adaptive));
    let cases =
        [1, 4].map(|balancers| (format!("{balancers} balancer(s)"), Setup { balancers, ..setup.clone() }));
    let even = Metric::BusyEvenness(60, 90);
    let note = if own.is_some() {
        ""
    } else {
        " There is no policy `utilization` yet: `adaptive` stands in for it."
    };
    Scenario {
        name: "utilization",
        about: format!(
            "20 equal servers with 4 places at 0.6 of what they can do; at second 30 half of them become twice as \
             fast.{note}"
        ),
        cases: cases.into(),
        contenders: vec![of, Contender::LeastConn, Contender::A58, PREQUAL],
        metrics: vec![even, Metric::P99],
        bounds: vec![at_most(of, even, 1.05)],
    }
}
