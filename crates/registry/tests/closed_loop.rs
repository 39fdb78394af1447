//! The adaptive policy in a closed loop: what it allocates is what the resources get to do, and what they do is what
//! they report. Simulated time, seeded; a minute takes milliseconds.
//!
//! Each host's utilization is `base + antagonist(t) + per_flow * (flows a second, or flows open)`, with 3 % of noise,
//! reported each second at a phase of its own.

use std::cell::RefCell;

use allocation::{AllocationTable, Excluded, OpenFlow, Policy, Selector, Timestamp};
use registry::{
    Config, PoolConfig, RawRegistration, RawUtilization, Readiness, Registration, Registry, Report,
    Utilization,
};

const STEP_MS: u64 = 5;

#[derive(Clone, Copy)]
struct Host {
    base: f64,
    per_flow: f64,
    /// Utilization by others, between the two seconds.
    antagonist: (f64, u64, u64),
}

impl Host {
    const fn new(base: f64, per_flow: f64) -> Self {
        Self { base, per_flow, antagonist: (0.0, 0, 0) }
    }

    const fn burning(self, amount: f64, from: u64, until: u64) -> Self {
        Self { antagonist: (amount, from, until), ..self }
    }
}

#[derive(Clone, Copy)]
enum Load {
    /// So many flows a second, each over at once.
    Short(u64),
    /// So many flows at all times, each as long (in seconds, on average) as this.
    Held(usize, u64),
    /// So many clients that open a flow, hold it for so many milliseconds on average, and rest for as many on average.
    Clients(usize, u64, u64),
}

/// One second of a run, by host.
struct Second {
    weights: Vec<f64>,
    /// Part of the flows that were opened in it.
    opened: Vec<f64>,
    utilization: Vec<f64>,
}

struct World {
    hosts: Vec<Host>,
    registry: Registry,
    table: AllocationTable,
    selector: Selector,
    random: RefCell<u64>,
    /// Open flows: host, end.
    flows: Vec<(usize, u64, OpenFlow)>,
    /// When each client that rests opens its next one.
    resting: Vec<u64>,
    opened_in_second: Vec<u64>,
    opened_since_report: Vec<u64>,
    reported_at: Vec<u64>,
    utilization: Vec<f64>,
}

impl World {
    fn new(hosts: &[Host], seed: u64) -> Self {
        let pool = PoolConfig::new("p".parse().unwrap(), Policy::Adaptive);
        let registry = Registry::new(Config { pools: vec![pool], ..Config::default() }).unwrap();
        for n in 0..hosts.len() {
            let raw = RawRegistration {
                id: format!("h{n}"),
                pool: "p".into(),
                address: format!("10.0.0.{}:1", n + 1),
                ..RawRegistration::default()
            };
            registry.register(Registration::parse(raw).unwrap(), Timestamp::ZERO).unwrap();
        }
        let table = registry.rebuild(Timestamp::ZERO).remove(0).tables.remove(0);
        let count = hosts.len();
        Self {
            hosts: hosts.to_vec(),
            registry,
            table,
            selector: Selector::new(seed),
            random: RefCell::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            flows: Vec::new(),
            resting: Vec::new(),
            opened_in_second: vec![0; count],
            opened_since_report: vec![0; count],
            reported_at: vec![0; count],
            utilization: vec![0.0; count],
        }
    }

    /// 0 to 1.
    fn unit(&self) -> f64 {
        let mut x = self.random.borrow_mut();
        *x ^= *x << 13;
        *x ^= *x >> 7;
        *x ^= *x << 17;
        (*x >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn run(hosts: &[Host], load: Load, seconds: u64, seed: u64) -> Vec<Second> {
        let mut world = Self::new(hosts, seed);
        let mut history = Vec::new();
        let phases: Vec<u64> =
            hosts.iter().map(|_| (world.unit() * 1000.0) as u64 / STEP_MS * STEP_MS).collect();
        for now in (0..seconds * 1000).step_by(STEP_MS as usize) {
            world.arrive(load, now);
            for (host, phase) in phases.iter().enumerate() {
                if now > 0 && now % 1000 == *phase {
                    world.report(host, load, now);
                }
            }
            for rebuilt in world.registry.rebuild(Timestamp::from_millis(now)) {
                world.table = rebuilt.tables.into_iter().next().unwrap();
            }
            if now % 1000 == 1000 - STEP_MS {
                history.push(world.second());
            }
        }
        history
    }

    fn arrive(&mut self, load: Load, now: u64) {
        self.flows.retain(|(_, end, _)| *end > now);
        match load {
            Load::Short(a_second) => {
                // Uniform around the mean: arrivals are not a clock.
                let mean = (a_second * STEP_MS) as f64 / 1000.0;
                let count = (mean * 2.0 * self.unit() + self.unit()) as u64;
                for _ in 0..count {
                    self.open(now, now);
                }
            }
            Load::Held(count, length) => {
                while self.flows.len() < count {
                    let lasts = -(1.0 - self.unit()).ln() * length as f64 * 1000.0;
                    self.open(now, now + 1 + lasts as u64);
                }
            }
            Load::Clients(count, holds, rests) => {
                let around = |mean: u64, unit: f64| (mean as f64 * 2.0 * unit) as u64;
                while self.flows.len() + self.resting.len() < count {
                    let until = now + around(rests, self.unit());
                    self.resting.push(until);
                }
                let resting = self.resting.len();
                self.resting.retain(|until| *until > now);
                for _ in self.resting.len()..resting {
                    let lasts = around(holds, self.unit());
                    self.open(now, now + 1 + lasts);
                }
            }
        }
    }

    fn open(&mut self, now: u64, end: u64) {
        let selection =
            self.selector.select(&self.table, &Excluded::none(), Timestamp::from_millis(now)).unwrap();
        let id = self.table.backend(selection.index).id.as_str();
        let host: usize = id[1..].parse().unwrap();
        selection.open.connected();
        selection.open.answered();
        self.opened_in_second[host] += 1;
        self.opened_since_report[host] += 1;
        if end > now {
            self.flows.push((host, end, selection.open));
        }
    }

    fn report(&mut self, index: usize, load: Load, now: u64) {
        let host = self.hosts[index];
        let interval = (now - self.reported_at[index]) as f64 / 1000.0;
        let flows = match load {
            Load::Short(_) | Load::Clients(..) => self.opened_since_report[index] as f64 / interval,
            Load::Held(..) => self.flows.iter().filter(|(host, ..)| *host == index).count() as f64,
        };
        self.opened_since_report[index] = 0;
        self.reported_at[index] = now;
        let (amount, from, until) = host.antagonist;
        let burnt = if (from..until).contains(&(now / 1000)) { amount } else { 0.0 };
        let noise = 1.0 + 0.06 * (self.unit() - 0.5) + 0.06 * (self.unit() - 0.5);
        let cpu = ((host.base + burnt + host.per_flow * flows) * noise).clamp(0.0, 1.0);
        self.utilization[index] = cpu;
        let report = Report {
            id: format!("h{index}").parse().unwrap(),
            incarnation: 0,
            readiness: Readiness::Ready,
            utilization: Utilization::parse(RawUtilization { cpu, ..RawUtilization::default() }).unwrap(),
            balancers: 1,
            labels: None,
        };
        self.registry.report(report, Timestamp::from_millis(now)).unwrap();
    }

    fn second(&mut self) -> Second {
        let mut weights = vec![0.0; self.hosts.len()];
        for (backend, weight) in self.table.members().backends().iter().zip(self.table.weights()) {
            weights[backend.id.as_str()[1..].parse::<usize>().unwrap()] = f64::from(*weight);
        }
        let all: u64 = self.opened_in_second.iter().sum();
        let opened = self.opened_in_second.iter().map(|n| *n as f64 / all.max(1) as f64).collect();
        self.opened_in_second.fill(0);
        Second { weights, opened, utilization: self.utilization.clone() }
    }
}

/// A host's part of the pool's weight in a second.
fn share(second: &Second, host: usize) -> f64 {
    second.weights[host] / second.weights.iter().sum::<f64>()
}

/// Mean over the seconds.
fn mean(history: &[Second], of: impl Fn(&Second) -> f64) -> f64 {
    history.iter().map(of).sum::<f64>() / history.len() as f64
}

/// Standard deviation over the mean.
fn spread(history: &[Second], of: impl Fn(&Second) -> f64) -> f64 {
    let middle = mean(history, &of);
    mean(history, |second| (of(second) - middle).powi(2)).sqrt() / middle
}

/// What a busy host must see: its share well down within 5 s of the start (at second 30), and back within 15 s of the
/// end (at second 60).
fn assert_falls_and_comes_back(name: &str, hosts: &[Host], load: Load) {
    for seed in 1..=5 {
        let history = World::run(hosts, load, 120, seed);
        let before = mean(&history[20..30], |s| s.weights[0] / s.weights[1]);
        assert!((0.8..1.25).contains(&before), "{name}, seed {seed}: {before} of its peer's weight before");
        let during = mean(&history[35..60], |s| s.weights[0] / s.weights[1]);
        assert!(during < 0.4, "{name}, seed {seed}: {during} of its peer's weight while busy");
        let five_in = history[34].weights[0] / history[34].weights[1];
        assert!(five_in < 0.5, "{name}, seed {seed}: {five_in} of its peer's weight 5 s in");
        let back = history[75].weights[0] / history[75].weights[1];
        assert!(back > 0.75, "{name}, seed {seed}: {back} of its peer's weight 15 s after");
        let after = mean(&history[90..], |s| s.weights[0] / s.weights[1]);
        assert!(
            (0.85..1.18).contains(&after),
            "{name}, seed {seed}: {after} of its peer's weight in the end"
        );
        if let Load::Short(_) = load {
            let opened = mean(&history[35..60], |s| s.opened[0] / s.opened[1]);
            assert!(opened < 0.45, "{name}, seed {seed}: {opened} of its peer's flows while busy");
            let opened = mean(&history[75..], |s| s.opened[0] / s.opened[1]);
            assert!((0.8..1.25).contains(&opened), "{name}, seed {seed}: {opened} of its peer's flows after");
        }
    }
}

#[test]
fn a_busy_host_gets_fewer_short_flows_and_gets_them_back() {
    // What the host does beside our flows is most of its utilization: the hard case, for then a low rate looks like a
    // low capacity for ever.
    let idle = Host::new(0.13, 0.001);
    let hosts = [idle.burning(0.75, 30, 60), idle, idle];
    assert_falls_and_comes_back("mostly background", &hosts, Load::Short(200));
    // Our flows are most of it.
    let idle = Host::new(0.05, 0.003);
    let hosts = [idle.burning(0.7, 30, 60), idle, idle];
    assert_falls_and_comes_back("mostly flows", &hosts, Load::Short(200));
    // Nearly nothing runs there.
    let idle = Host::new(0.02, 0.0001);
    let hosts = [idle.burning(0.9, 30, 60), idle, idle];
    assert_falls_and_comes_back("nearly idle", &hosts, Load::Short(200));
}

#[test]
fn a_busy_host_gets_fewer_long_flows_and_gets_them_back() {
    let idle = Host::new(0.13, 0.007);
    let hosts = [idle.burning(0.75, 30, 60), idle, idle];
    assert_falls_and_comes_back("ten seconds each", &hosts, Load::Held(30, 10));
    assert_falls_and_comes_back("for ever", &hosts, Load::Held(30, 100_000));
}

#[test]
fn a_host_whose_utilization_its_flows_hardly_move_gets_them_back() {
    // All say the same whatever they get, and a few clients keep the pool neither idle nor busy. What a host was given while
    // it was busy must not be taken for what it can do: a host that got half of its peers' flows did so for ever. (From
    // 35 % on it is what it can do, as far as anyone can tell.)
    for (base, least) in [(0.1, 0.85), (0.2, 0.85), (0.25, 0.6), (0.3, 0.5)] {
        let idle = Host::new(base, 0.0);
        let hosts = [idle.burning(0.75, 30, 60), idle, idle];
        for seed in 1..=5 {
            let history = World::run(&hosts, Load::Clients(4, 8, 15), 120, seed);
            let opened = mean(&history[85..], |s| 2.0 * s.opened[0] / (s.opened[1] + s.opened[2]));
            assert!(opened > least, "at {base}, seed {seed}: {opened} of its peers' flows after");
        }
    }
}

#[test]
fn shares_settle_near_capacity_and_stay() {
    // Half as fast as its two peers: a fifth is its capacity; a third would be what everyone gets.
    let fast = Host::new(0.05, 0.005);
    let slow = Host::new(0.05, 0.010);
    for seed in 1..=5 {
        let history = World::run(&[slow, fast, fast], Load::Short(200), 180, seed);
        let settled = &history[120..];
        let (got, spread) = (mean(settled, |s| share(s, 0)), spread(settled, |s| share(s, 0)));
        assert!((0.18..0.25).contains(&got), "seed {seed}: a share of {got} for a fifth of the capacity");
        assert!(spread < 0.10, "seed {seed}: the share varies by {spread}");
        let evenness = mean(settled, |s| s.utilization[0] / s.utilization[1]);
        assert!(evenness < 1.3, "seed {seed}: {evenness} times its peer's utilization");
    }
    let (fast, slow) = (Host::new(0.05, 0.02), Host::new(0.05, 0.04));
    for seed in 1..=3 {
        let history = World::run(&[slow, fast, fast], Load::Held(30, 20), 300, seed);
        let got = mean(&history[240..], |s| share(s, 0));
        assert!(
            (0.17..0.28).contains(&got),
            "seed {seed}, held flows: a share of {got} for a fifth of the capacity"
        );
    }
}

#[test]
fn equal_hosts_get_equal_shares() {
    for (host, load) in [
        (Host::new(0.13, 0.001), Load::Short(200)),
        (Host::new(0.02, 0.0001), Load::Short(5)),
        (Host::new(0.2, 0.01), Load::Held(30, 10)),
    ] {
        for seed in 1..=3 {
            let history = World::run(&[host; 3], load, 120, seed);
            for n in 0..3 {
                let (got, spread) =
                    (mean(&history[60..], |s| share(s, n)), spread(&history[60..], |s| share(s, n)));
                assert!((0.29..0.38).contains(&got), "seed {seed}: host {n} has a share of {got}");
                assert!(spread < 0.10, "seed {seed}: host {n}'s share varies by {spread}");
            }
        }
    }
}

#[test]
fn a_saturated_pool_is_held() {
    // More is asked than all can do: everyone is at 1, whatever they get.
    let host = Host::new(0.2, 0.05);
    let history = World::run(&[host, host, host], Load::Short(300), 120, 1);
    for n in 0..3 {
        let spread = spread(&history[60..], |s| share(s, n));
        assert!(spread < 0.10, "host {n}'s share varies by {spread}");
    }
}

#[test]
fn a_burning_pool_of_one_still_serves() {
    let history = World::run(&[Host::new(0.1, 0.001).burning(0.9, 10, 20)], Load::Short(100), 40, 1);
    assert!(history.iter().all(|second| second.weights == [1.0]));
}
