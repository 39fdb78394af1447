//! trimtab's own registry and selection, as one balancer runs them. The only file here that knows their interface.

use std::sync::Arc;
use std::time::Duration;

use allocation::{AllocationTable, BackendIndex, Excluded, Members, OpenFlow, Policy, Selector, Timestamp};
use registry::{
    Config, PoolConfig, RawRegistration, RawUtilization, Readiness, Registration, Registry, Report,
    Utilization,
};

use super::balancer::{Balancer, Conditions, Ending, How, ServerReport};
use super::event::Time;
use super::random::Random;
use super::server::Server;

const POOL: &str = "sim";

/// One balancer.
pub(crate) struct Trimtab {
    registry: Registry,
    table: AllocationTable,
    selector: Selector,
    members: Arc<Members>,
    /// By backend index, the server's number.
    numbers: Vec<usize>,
    /// By server. Which of a server's flows ends is all the same to its facts.
    open: Vec<Vec<OpenFlow>>,
    rebuild_at: Timestamp,
    report_interval: Duration,
    balancers: u32,
    /// Flows since the last probes.
    selected: u64,
    random: Random,
}

impl Trimtab {
    pub(crate) fn new(policy: Policy, mut conditions: Conditions) -> Self {
        let mut pool = PoolConfig::new(POOL.parse().expect("it is a name"), policy);
        if policy == Policy::Criteria {
            pool.criteria = vec!["least(utilization)".parse().expect("it is a criterion")];
        }
        let config = Config { pools: vec![pool], ..Config::default() };
        let mut trimtab = Self {
            registry: Registry::new(config).expect("it has one pool"),
            table: AllocationTable::empty(policy),
            selector: Selector::new(conditions.random.next()),
            members: Arc::default(),
            numbers: Vec::new(),
            open: Vec::new(),
            rebuild_at: Timestamp::ZERO,
            report_interval: Duration::from_secs_f64(conditions.report_interval),
            balancers: conditions.balancers as u32,
            selected: 0,
            random: conditions.random,
        };
        for server in 0..conditions.servers {
            trimtab.join(server, Time::default());
        }
        trimtab
    }

    fn register(&mut self, server: usize, now: Timestamp) {
        let raw = RawRegistration {
            id: format!("s{server}"),
            pool: POOL.to_owned(),
            address: format!("127.0.{}.{}:5222", server >> 8, server & 255),
            report_interval: Some(self.report_interval),
            ..RawRegistration::default()
        };
        let registration = Registration::parse(raw).expect("it is in range");
        self.registry.register(registration, now).expect("there is room");
    }

    /// Sends the probes that the flows until now ask for, where the policy probes; they are answered at once.
    fn probe(&mut self, now: Timestamp, servers: &[Server]) {
        let Some(probes) = self.table.probes() else { return };
        let mut probes = probes.lock().expect("nobody panicked");
        for _ in 0..probes.wanted(std::mem::take(&mut self.selected), now) {
            let index = self.random.below(self.numbers.len());
            let (rif, latency) = servers[self.numbers[index]].probe();
            let micros = (latency * 1e6) as u32;
            probes.answer(self.members.epoch(), BackendIndex(index as u32), rif, micros, now);
        }
    }

    /// Publishes the next table if it is time for it.
    fn rebuild(&mut self, now: Timestamp) {
        if now < self.rebuild_at {
            return;
        }
        for rebuilt in self.registry.rebuild(now) {
            self.table = rebuilt.tables.into_iter().next().expect("a pool has a table");
        }
        self.rebuild_at = self.registry.next_deadline();
        if !Arc::ptr_eq(&self.members, self.table.members()) {
            self.members = Arc::clone(self.table.members());
            let number = |id: &str| id[1..].parse().expect("it is a number");
            self.numbers = self.members.backends().iter().map(|b| number(b.id.as_str())).collect();
        }
    }
}

fn timestamp(now: Time) -> Timestamp {
    Timestamp::from_millis(now.millis())
}

impl Balancer for Trimtab {
    fn select(&mut self, now: Time, servers: &[Server]) -> Option<usize> {
        let now = timestamp(now);
        self.rebuild(now);
        self.probe(now, servers);
        let selection = self.selector.select(&self.table, &Excluded::none(), now).ok()?;
        let server = self.numbers[selection.index.0 as usize];
        selection.open.connected();
        self.selected += 1;
        self.open[server].push(selection.open);
        Some(server)
    }

    fn done(&mut self, server: usize, now: Time, ending: &Ending) {
        let flow = self.open[server].pop().expect("it was opened");
        match ending.how {
            How::Answered => flow.answered(),
            How::Reset => flow.reset_before_answer(timestamp(now)),
            How::TimedOut => {}
        }
    }

    fn report(&mut self, server: usize, report: &ServerReport, now: Time) {
        let raw = RawUtilization {
            cpu: report.utilization,
            rate: report.rate.unwrap_or(0.0),
            errors: report.errors,
            ..RawUtilization::default()
        };
        let report = Report {
            id: format!("s{server}").parse().expect("it is a name"),
            incarnation: 0,
            readiness: Readiness::Ready,
            utilization: Utilization::parse(raw).expect("it is in range"),
            balancers: self.balancers,
            labels: None,
        };
        self.registry.report(report, timestamp(now)).expect("it is registered");
        self.rebuild_at = self.registry.next_deadline();
    }

    fn join(&mut self, server: usize, now: Time) {
        self.open.push(Vec::new());
        self.register(server, timestamp(now));
        self.rebuild_at = self.registry.next_deadline();
    }

    fn tick(&mut self, now: Time) {
        for server in 0..self.open.len() {
            self.register(server, timestamp(now));
        }
        self.rebuild_at = self.registry.next_deadline();
        self.rebuild(timestamp(now));
    }
}
