//! Random operations against the registry and a plain model of it, step by step. `SIM_SEED=n` replays one seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use allocation::{AllocationTable, LiveFacts, OpenFlow, Policy, Timestamp};
use registry::{
    Config, Limits, PoolConfig, RawRegistration, RawUtilization, Readiness, RegisterError, Registration,
    Registry, Report, ReportError, ResourceState, Utilization,
};

const SEEDS: u64 = 240;
const STEPS: u32 = 600;
const POOLS: [(&str, Policy); 3] =
    [("a", Policy::Adaptive), ("b", Policy::LeastConnections), ("c", Policy::RoundRobin)];
const IDS: u64 = 12;
const RESOURCES_MAX: usize = 6;

/// What the model knows of a resource.
#[derive(Debug, Clone, PartialEq)]
struct Expected {
    pool: usize,
    incarnation: u64,
    address: String,
    interval: Duration,
    weight: f32,
    lease_until: Timestamp,
    ready: bool,
    drained: bool,
    reported: Option<Timestamp>,
    refused: u64,
}

struct Simulation {
    random: u64,
    now: Timestamp,
    registry: Registry,
    model: BTreeMap<String, Expected>,
    tables: Vec<AllocationTable>,
    flows: Vec<OpenFlow>,
}

fn lease(interval: Duration) -> Duration {
    (interval * 3).max(Duration::from_secs(3))
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let pools =
            POOLS.iter().map(|(name, policy)| PoolConfig::new(name.parse().unwrap(), *policy)).collect();
        let limits = Limits { resources_max: RESOURCES_MAX, ..Limits::default() };
        let registry = Registry::new(Config { pools, limits }).unwrap();
        Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            now: Timestamp::from_millis(1),
            registry,
            model: BTreeMap::new(),
            tables: POOLS.iter().map(|(_, policy)| AllocationTable::empty(*policy)).collect(),
            flows: Vec::new(),
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 16) % end
    }

    fn id(&mut self) -> String {
        format!("r{}", self.below(IDS))
    }

    fn step(&mut self) {
        match self.below(100) {
            0..20 => self.register(),
            20..55 => self.report(),
            55..60 => self.bad_report(),
            60..64 => self.deregister(),
            64..70 => self.set_drained(),
            70..80 => self.touch_flows(),
            80..97 => self.advance(),
            _ => self.rush(),
        }
        self.tick();
        self.check();
    }

    fn register(&mut self) {
        let id = self.id();
        let incarnation = 1 + self.below(4);
        let pool = self.below(POOLS.len() as u64 + 1) as usize;
        let address = format!("10.0.0.{}:1", 1 + self.below(2));
        let interval = Duration::from_millis([100, 500, 1_000, 5_000][self.below(4) as usize]);
        let weight = [1.0, 1.0, 2.0, 30.0][self.below(4) as usize];
        let raw = RawRegistration {
            id: id.clone(),
            pool: POOLS.get(pool).map_or("nowhere", |(name, _)| name).to_owned(),
            address: address.clone(),
            incarnation,
            weight,
            report_interval: Some(interval),
            ..RawRegistration::default()
        };
        let result = self.registry.register(Registration::parse(raw).unwrap(), self.now);
        let wanted = Expected {
            pool,
            incarnation,
            address,
            interval,
            weight: weight as f32,
            lease_until: self.now + lease(interval),
            ready: true,
            drained: false,
            reported: None,
            refused: 0,
        };
        let in_pool = self.model.values().filter(|expected| expected.pool == pool).count();
        let old = self.model.get(&id).cloned();
        match (result, old) {
            (Err(RegisterError::UnknownPool { known, .. }), _) => {
                assert_eq!((pool, known.len()), (POOLS.len(), POOLS.len()));
            }
            (Err(RegisterError::OlderIncarnation { registered, given, .. }), Some(old)) => {
                assert_eq!((registered, given), (old.incarnation, incarnation));
                assert!(given < registered);
            }
            (Err(RegisterError::PoolFull { .. }), old) => {
                assert_eq!(in_pool, RESOURCES_MAX);
                assert!(old.is_none_or(|old| old.pool != pool));
            }
            (Ok(registered), None) => {
                assert!(registered.created && in_pool < RESOURCES_MAX && pool < POOLS.len());
                self.model.insert(id, wanted);
            }
            (Ok(registered), Some(old)) => {
                assert!(incarnation >= old.incarnation && pool < POOLS.len());
                let same = (old.incarnation, old.pool, &old.address) == (incarnation, pool, &wanted.address);
                assert_eq!(registered.created, !same);
                let new = if same {
                    Expected { interval, weight: wanted.weight, lease_until: wanted.lease_until, ..old }
                } else {
                    Expected { drained: old.drained, ..wanted }
                };
                self.model.insert(id, new);
            }
            (result, old) => panic!("{result:?} for {old:?}"),
        }
    }

    fn report(&mut self) {
        let id = self.id();
        let known = self.model.get(&id).map_or(1, |expected| expected.incarnation);
        let incarnation = if self.below(10) == 0 { known + self.below(3) - 1 } else { known };
        let readiness = if self.below(8) == 0 { Readiness::NotReady } else { Readiness::Ready };
        let raw = RawUtilization {
            cpu: self.below(1_200) as f64 / 1_000.0,
            rate: [0.0, 100.0, 1e12][self.below(3) as usize],
            errors: [0.0, 0.0, 1e12][self.below(3) as usize],
            ..RawUtilization::default()
        };
        let report = Report {
            id: id.parse().unwrap(),
            incarnation,
            readiness,
            utilization: Utilization::parse(raw).unwrap(),
            balancers: 1,
            labels: None,
        };
        match (self.registry.report(report, self.now), self.model.get_mut(&id)) {
            (Err(ReportError::NotRegistered { .. }), None) => {}
            (Err(ReportError::OtherIncarnation { registered, given, .. }), Some(expected)) => {
                assert_eq!((registered, given), (expected.incarnation, incarnation));
                assert_ne!(registered, given);
            }
            (Ok(_), Some(expected)) => {
                assert_eq!(expected.incarnation, incarnation);
                expected.ready = readiness == Readiness::Ready;
                expected.reported = Some(self.now);
                expected.lease_until = self.now + lease(expected.interval);
            }
            (result, expected) => panic!("{result:?} for {expected:?}"),
        }
    }

    fn bad_report(&mut self) {
        let id = self.id();
        let raw = RawUtilization { cpu: f64::NAN, ..RawUtilization::default() };
        assert!(Utilization::parse(raw).is_err());
        let incarnation = self.model.get(&id).map_or(1, |expected| expected.incarnation);
        let counted = self.registry.report_refused(&id.parse().unwrap(), incarnation, self.now);
        assert_eq!(counted.is_ok(), self.model.contains_key(&id));
        if let Some(expected) = self.model.get_mut(&id) {
            expected.refused += 1;
        }
    }

    fn deregister(&mut self) {
        let id = self.id();
        let incarnation = self.below(5);
        let result = self.registry.deregister(&id.parse().unwrap(), incarnation);
        match self.model.get(&id) {
            None => assert_eq!(result, Ok(false)),
            Some(expected) if incarnation < expected.incarnation => assert!(result.is_err()),
            Some(_) => {
                assert_eq!(result, Ok(true));
                self.model.remove(&id);
            }
        }
    }

    fn set_drained(&mut self) {
        let id = self.id();
        let drained = self.below(2) == 0;
        let name = id.parse().unwrap();
        let result = if drained { self.registry.drain(&name) } else { self.registry.ready(&name) };
        assert_eq!(result.is_ok(), self.model.contains_key(&id));
        if let Some(expected) = self.model.get_mut(&id) {
            expected.drained = drained;
        }
    }

    /// Flows come and go, so that rates have values.
    fn touch_flows(&mut self) {
        let table = self.below(POOLS.len() as u64) as usize;
        let backends = self.tables[table].members().backends().len() as u64;
        if backends > 0 && self.below(3) > 0 {
            let index = self.below(backends) as usize;
            let live = Arc::clone(&self.tables[table].members().backends()[index].live);
            let flow = live.open_flow();
            flow.connected();
            self.flows.push(flow);
        } else if !self.flows.is_empty() {
            let which = self.below(self.flows.len() as u64) as usize;
            self.flows.swap_remove(which);
        }
    }

    fn advance(&mut self) {
        let ms = [1, 7, 100, 400, 2_000][self.below(5) as usize];
        self.now = self.now + Duration::from_millis(ms);
        self.expire();
    }

    /// Long enough that every lease ends.
    fn rush(&mut self) {
        if self.below(4) == 0 {
            self.now = self.now + Duration::from_secs(60);
            self.expire();
            assert!(self.model.is_empty());
        }
    }

    fn expire(&mut self) {
        let mut gone: Vec<String> =
            self.registry.expire(self.now).iter().map(|registration| registration.id().to_string()).collect();
        gone.sort();
        let now = self.now;
        let expected: Vec<String> = self
            .model
            .iter()
            .filter(|(_, expected)| expected.lease_until <= now)
            .map(|(id, _)| id.clone())
            .collect();
        assert_eq!(gone, expected, "leases end exactly when they should");
        self.model.retain(|_, expected| expected.lease_until > now);
    }

    /// As the shell's: rebuilds when it is time, which is at once when nothing was rebuilt lately.
    fn tick(&mut self) {
        let due = self.registry.next_deadline();
        // Half of the time it is late, and changes come together.
        if due > self.now && self.below(2) == 0 {
            return;
        }
        self.now = self.now.max(due.min(self.now + Duration::from_millis(10)));
        self.expire();
        for rebuilt in self.registry.rebuild(self.now) {
            let last = &self.tables[rebuilt.pool];
            assert_eq!(rebuilt.tables[0].generation(), last.generation() + 1, "generations grow by one");
            self.check_table(rebuilt.pool, &rebuilt.tables[0]);
            self.tables[rebuilt.pool] = rebuilt.tables.into_iter().next().unwrap();
        }
    }

    /// A table made just now says exactly what the model says.
    fn check_table(&self, pool: usize, table: &AllocationTable) {
        let expected: BTreeMap<&String, &Expected> =
            self.model.iter().filter(|(_, expected)| expected.pool == pool).collect();
        let mut members: Vec<&str> =
            table.members().backends().iter().map(|backend| backend.id.as_str()).collect();
        members.sort_unstable();
        let ids: Vec<&str> = expected.keys().map(|id| id.as_str()).collect();
        assert_eq!(members, ids, "members of pool {pool}");
        let (mut sum, mut eligible) = (0.0, 0);
        for (backend, &weight) in table.members().backends().iter().zip(table.weights()) {
            let expected = expected[&backend.id.as_str().to_owned()];
            assert_eq!(backend.address.to_string(), expected.address);
            let takes = expected.ready && !expected.drained && expected.lease_until > self.now;
            assert!(weight.is_finite() && weight >= 0.0);
            assert_eq!(weight > 0.0, takes, "{} at {:?}: {expected:?}", backend.id, self.now);
            sum += weight;
            eligible += u32::from(takes);
        }
        assert_eq!(table.eligible().len() as u32, eligible);
        if eligible > 0 {
            let mean = sum / eligible as f32;
            assert!((mean - 1.0).abs() < 1e-3, "the mean weight is {mean}");
            // Slow start takes up to a tenth of a weight, and gives the others up to ten times theirs.
            let bounds = if POOLS[pool].1 == Policy::Adaptive { 0.0099..=100.1 } else { 1e-4..=1e4 };
            assert!(table.weights().iter().all(|weight| *weight == 0.0 || bounds.contains(weight)));
        }
    }

    /// The registry says what the model says, at any time.
    fn check(&self) {
        assert_eq!(self.registry.len(), self.model.len());
        assert_eq!(self.registry.rows(), self.model.len(), "one row for each, in one pool");
        let statuses = self.registry.resources(None, self.now).unwrap();
        assert_eq!(statuses.len(), self.model.len());
        for status in &statuses {
            let expected = &self.model[status.registration.id().as_str()];
            assert_eq!(status.registration.incarnation(), expected.incarnation);
            assert_eq!(status.registration.pool().as_str(), POOLS[expected.pool].0);
            assert_eq!(status.registration.weight(), expected.weight);
            assert_eq!(status.lease_left, expected.lease_until.since(self.now));
            assert_eq!(status.reports_refused, expected.refused);
            assert_eq!(status.report_age, expected.reported.map(|at| self.now.since(at)));
            let state = match (expected.drained, expected.ready) {
                (true, _) => ResourceState::Draining,
                (false, false) => ResourceState::NotReady,
                (false, true) => ResourceState::Ready,
            };
            assert_eq!(status.standing.state, state);
        }
    }

    fn check_explanations(&self) {
        for (pool, (name, _)) in POOLS.iter().enumerate() {
            let explained = self.registry.explain(&name.parse().unwrap(), 0, self.now).unwrap();
            let in_pool = self.model.values().filter(|expected| expected.pool == pool).count();
            assert_eq!(explained.candidates.len(), in_pool);
            let considered =
                explained.candidates.iter().take_while(|candidate| candidate.left_out.is_none()).count();
            assert!(explained.candidates[considered..].iter().all(|candidate| candidate.left_out.is_some()));
        }
    }

    fn finish(mut self) {
        // What is open stays counted on the facts it was opened on, whatever became of the resource since.
        self.now = self.now + Duration::from_secs(60);
        self.expire();
        assert!(self.registry.is_empty() && self.registry.rows() == 0, "nothing is left over");
        let flows = std::mem::take(&mut self.flows);
        drop(flows);
        for table in &self.tables {
            assert!(table.members().backends().iter().all(|backend| backend.live.flows_open() == 0));
        }
    }
}

#[test]
fn the_registry_does_what_the_model_does() {
    let seeds = match std::env::var("SIM_SEED") {
        Ok(seed) => seed.parse().map(|seed| seed..seed + 1).expect("SIM_SEED is a number"),
        Err(_) => 0..SEEDS,
    };
    for seed in seeds {
        let run = std::panic::catch_unwind(|| {
            let mut simulation = Simulation::new(seed);
            for step in 0..STEPS {
                simulation.step();
                if step % 16 == 0 {
                    simulation.check_explanations();
                }
            }
            simulation.finish();
        });
        if let Err(panic) = run {
            eprintln!("replay with SIM_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_new_incarnation_starts_with_new_facts() {
    let simulation = Simulation::new(0);
    let register = |incarnation| {
        let raw = RawRegistration {
            id: "r0".into(),
            pool: "a".into(),
            address: "10.0.0.1:1".into(),
            incarnation,
            ..RawRegistration::default()
        };
        Registration::parse(raw).unwrap()
    };
    let live_of =
        |table: &AllocationTable| -> Arc<LiveFacts> { Arc::clone(&table.members().backends()[0].live) };
    simulation.registry.register(register(1), simulation.now).unwrap();
    let first = live_of(&simulation.registry.rebuild(simulation.now)[0].tables[0]);
    let flow = first.open_flow();
    first.open_flow().connect_failed(allocation::ConnectFailure::Refused, simulation.now);
    assert!(first.is_down());
    simulation.registry.register(register(2), simulation.now).unwrap();
    let later = simulation.now + Duration::from_millis(5);
    let second = live_of(&simulation.registry.rebuild(later)[0].tables[0]);
    assert!(!Arc::ptr_eq(&first, &second) && !second.is_down(), "a dead process's failures do not stick");
    assert_eq!((first.flows_open(), second.flows_open()), (1, 0), "its open flows stay its own");
    drop(flow);
    assert_eq!(first.flows_open(), 0);
}
