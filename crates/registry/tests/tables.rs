//! From reports to tables: requirements, versions, histories, criteria and the policies that are not the default, each by
//! what its table says.

use std::time::Duration;

use allocation::{
    AllocationTable, BackendIndex, Excluded, FlowKey, LeftOut, NoBackend, Policy, Selector, Timestamp,
};
use registry::{
    AbortConfig, Config, Labels, Limits, PoolConfig, RawRegistration, RawUtilization, Readiness,
    Registration, Registry, Report, Requirements, ResourceState, SplitBy, SplitConfig, Utilization,
};

/// One pool, with a clock.
struct Lab {
    registry: Registry,
    now: Timestamp,
    tables: Vec<AllocationTable>,
}

#[derive(Default, Clone)]
struct Says {
    cpu: f64,
    memory: f64,
    rate: f64,
    price: f64,
    balancers: u32,
    labels: Option<Labels>,
}

fn labels(all: &[(&str, &str)]) -> Labels {
    all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

impl Lab {
    fn new(policy: Policy, change: impl FnOnce(&mut PoolConfig)) -> Self {
        let mut pool = PoolConfig::new("p".parse().unwrap(), policy);
        pool.knobs.slow_start = Duration::ZERO;
        change(&mut pool);
        let registry = Registry::new(Config { pools: vec![pool], limits: Limits::default() }).unwrap();
        let mut lab = Self { registry, now: Timestamp::from_millis(1_000), tables: Vec::new() };
        lab.rebuild();
        lab
    }

    fn join(&mut self, id: &str, version: &str, own: &[(&str, &str)]) {
        let raw = RawRegistration {
            id: id.into(),
            pool: "p".into(),
            address: format!("10.0.0.{}:1", 1 + self.registry.len()),
            labels: own.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            version: version.into(),
            report_interval: Some(Duration::from_secs(1)),
            ..RawRegistration::default()
        };
        self.registry.register(Registration::parse(raw).unwrap(), self.now).unwrap();
        self.rebuild();
    }

    fn report(&mut self, id: &str, says: &Says) {
        let metrics = if says.price > 0.0 { vec![("bandwidth_cost".into(), says.price)] } else { vec![] };
        let raw = RawUtilization {
            cpu: says.cpu,
            memory: says.memory,
            rate: says.rate,
            metrics,
            ..RawUtilization::default()
        };
        let report = Report {
            id: id.parse().unwrap(),
            incarnation: 0,
            readiness: Readiness::Ready,
            utilization: Utilization::parse(raw).unwrap(),
            balancers: says.balancers,
            labels: says.labels.clone(),
        };
        self.registry.report(report, self.now).unwrap();
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    fn rebuild(&mut self) {
        self.now = self.now + Duration::from_millis(10);
        for rebuilt in self.registry.rebuild(self.now) {
            self.tables = rebuilt.tables;
        }
    }

    /// A second of reports, one from each.
    fn second(&mut self, all: &[(&str, Says)]) {
        self.pass(Duration::from_secs(1));
        all.iter().for_each(|(id, says)| self.report(id, says));
        self.rebuild();
    }

    fn index(&self, id: &str) -> BackendIndex {
        let place = self.tables[0].members().backends().iter().position(|b| b.id.as_str() == id);
        BackendIndex(place.expect("it has joined") as u32)
    }

    fn weight(&self, table: usize, id: &str) -> f32 {
        self.tables[table].weights()[self.index(id).0 as usize]
    }

    /// How many of so many flows each gets, none of which ends meanwhile.
    fn flows(&self, count: usize) -> Vec<(String, usize)> {
        let table = &self.tables[0];
        let mut selector = Selector::new(7);
        let held: Vec<_> =
            (0..count).map(|_| selector.select(table, &Excluded::none(), self.now).unwrap()).collect();
        let of = |index: u32| held.iter().filter(|selection| selection.index.0 == index).count();
        (0_u32..).zip(table.members().backends()).map(|(i, b)| (b.id.to_string(), of(i))).collect()
    }
}

fn writers(pool: &mut PoolConfig) {
    pool.tables = vec![Requirements::from_texts(["role=writer"]).unwrap()];
}

#[test]
fn a_promoted_replica_moves_within_one_report() {
    let mut lab = Lab::new(Policy::Adaptive, writers);
    lab.join("pg1", "15", &[("role", "writer")]);
    lab.join("pg2", "15", &[("role", "reader")]);
    assert_eq!((lab.weight(1, "pg1") > 0.0, lab.weight(1, "pg2")), (true, 0.0));
    assert!(lab.weight(0, "pg2") > 0.0, "the plain listener's table has everyone");
    assert_eq!(lab.tables[1].left_out(lab.index("pg2")), LeftOut::Requirement);
    let reader = Says { labels: Some(labels(&[("role", "reader")])), ..Says::default() };
    let writer = Says { labels: Some(labels(&[("role", "writer")])), ..Says::default() };
    lab.second(&[("pg1", reader.clone()), ("pg2", writer)]);
    assert_eq!((lab.weight(1, "pg1"), lab.weight(1, "pg2") > 0.0), (0.0, true));
    lab.second(&[("pg1", Says::default()), ("pg2", reader)]);
    assert_eq!(lab.weight(1, "pg1"), 0.0, "a report without labels leaves them as they were");
    let why = Selector::new(1).select(&lab.tables[1], &Excluded::none(), lab.now).unwrap_err();
    assert_eq!(why, NoBackend::RequirementUnmet, "nobody writes now, though both are ready");
    let explained = lab.registry.explain(&"p".parse().unwrap(), 1, lab.now).unwrap();
    let unmet = explained.candidates[0].left_out.as_ref().expect("left out").to_string();
    assert_eq!(unmet, "it does not meet role=writer");
}

#[test]
fn an_administrators_word_stands_above_a_resources_own_before_it_joins_and_after() {
    let mut lab = Lab::new(Policy::Adaptive, writers);
    let id = "pg1".parse().unwrap();
    let (set, joined) = lab.registry.set_capabilities(&id, &labels(&[("role", "writer")]), &[]).unwrap();
    assert_eq!((set.len(), joined), (1, false));
    lab.join("pg1", "15", &[("role", "reader")]);
    assert!(lab.weight(1, "pg1") > 0.0);
    let (set, joined) = lab.registry.set_capabilities(&id, &Labels::new(), &["role".to_owned()]).unwrap();
    assert_eq!((set.len(), joined), (0, true));
    lab.rebuild();
    assert_eq!(lab.weight(1, "pg1"), 0.0, "its own label counts again");
    assert!(lab.registry.capabilities().is_empty());
}

#[test]
fn a_pool_that_requires_leaves_others_out_of_every_table() {
    let mut lab =
        Lab::new(Policy::Adaptive, |pool| pool.requires = Requirements::from_texts(["version>=2"]).unwrap());
    lab.join("old", "1.9", &[]);
    lab.join("new", "2.0", &[]);
    assert_eq!((lab.weight(0, "old"), lab.weight(0, "new")), (0.0, 1.0));
}

#[test]
fn the_balancers_that_share_a_pool_are_counted_by_reports() {
    let mut lab = Lab::new(Policy::Adaptive, |_| {});
    lab.join("a", "", &[]);
    lab.join("b", "", &[]);
    assert_eq!(lab.tables[0].balancers(), 1.0);
    let says = |balancers| Says { cpu: 0.5, balancers, ..Says::default() };
    lab.second(&[("a", says(4)), ("b", says(4))]);
    assert_eq!(lab.tables[0].balancers(), 4.0);
    lab.second(&[("a", says(0)), ("b", says(4_000_000_000))]);
    let drowned = lab.tables[0].balancers();
    assert!(drowned <= 33.0, "a wrong count is bounded: {drowned}");
}

#[test]
fn weighted_round_robin_is_a58() {
    let mut lab = Lab::new(Policy::WeightedRoundRobin, |pool| {
        pool.knobs.blackout = Duration::from_secs(5);
        pool.knobs.weight_expiration = Duration::from_secs(20);
    });
    for id in ["a", "b", "c"] {
        lab.join(id, "", &[]);
    }
    let says = |rate, cpu| Says { rate, cpu, ..Says::default() };
    // 300 and 100 operations for each unit of utilization; the third reports no operations and takes the mean.
    let reports = [("a", says(150.0, 0.5)), ("b", says(50.0, 0.5)), ("c", says(0.0, 0.5))];
    for second in 0..5 {
        lab.second(&reports);
        assert_eq!(lab.weight(0, "a"), 1.0, "blackout, second {second}");
    }
    lab.second(&reports);
    let weights = ["a", "b", "c"].map(|id| lab.weight(0, id));
    for (got, want) in weights.iter().zip([1.5, 0.5, 1.0]) {
        assert!((got - want).abs() < 0.01, "{weights:?}");
    }
    // Silence: leases are not what is tested here, so they are renewed by reports of nothing.
    for _ in 0..3 {
        lab.second(&[("a", says(0.0, 0.5)), ("b", says(0.0, 0.5)), ("c", says(0.0, 0.5))]);
    }
    assert_eq!(lab.weight(0, "a"), 1.0, "who no longer reports a rate is like the others");
}

#[test]
fn criteria_do_not_herd_between_reports() {
    let mut lab = Lab::new(Policy::Criteria, |pool| pool.criteria = vec!["least(memory)".parse().unwrap()]);
    for id in ["a", "b", "c", "d"] {
        lab.join(id, "", &[]);
    }
    let says = |memory| Says { memory, ..Says::default() };
    let reports = [("a", says(0.30)), ("b", says(0.40)), ("c", says(0.40)), ("d", says(0.90))];
    lab.second(&reports);
    let flows = lab.flows(60);
    let of = |id: &str| flows.iter().find(|(other, _)| other == id).unwrap().1;
    assert!(of("a") > of("b") && of("b") > of("d"), "{flows:?}");
    assert!(of("a") < 45, "not all of them between two reports: {flows:?}");
    assert!(of("d") < 5, "the one that is nearly full is left alone: {flows:?}");
    // The explanation has the score and what a flow adds.
    let explained = lab.registry.explain(&"p".parse().unwrap(), 0, lab.now).unwrap();
    let score = &explained.candidates.iter().find(|c| c.id.as_str() == "a").unwrap().scores[0];
    assert_eq!(score.criterion, "least(memory)");
    assert!((score.value - 0.30).abs() < 1e-6 && score.per_flow > 0.0 && score.age.is_some());
}

#[test]
fn a_cheap_tier_is_used_until_it_is_busy() {
    let mut lab = Lab::new(Policy::Criteria, |pool| {
        pool.criteria = vec!["least(bandwidth_cost, spill 80%)".parse().unwrap()];
    });
    for id in ["cheap", "dear"] {
        lab.join(id, "", &[]);
    }
    let says = |cpu, price| Says { cpu, price, ..Says::default() };
    lab.second(&[("cheap", says(0.3, 0.01)), ("dear", says(0.1, 0.09))]);
    let few = lab.flows(1);
    assert_eq!(few.iter().find(|(id, _)| id == "cheap").unwrap().1, 1);
    lab.second(&[("cheap", says(0.9, 0.01)), ("dear", says(0.1, 0.09))]);
    let more = lab.flows(4);
    assert_eq!(more.iter().find(|(id, _)| id == "dear").unwrap().1, 4, "the cheap one is full: {more:?}");
}

#[test]
fn windows_look_back() {
    let mut lab = Lab::new(Policy::Criteria, |pool| {
        pool.criteria = vec!["most(operations, 1m, total)".parse().unwrap()];
    });
    for id in ["a", "b"] {
        lab.join(id, "", &[]);
    }
    let says = |rate| Says { rate, cpu: 0.1, ..Says::default() };
    for _ in 0..20 {
        lab.second(&[("a", says(100.0)), ("b", says(10.0))]);
    }
    // The newest report says the opposite; the minute does not.
    lab.second(&[("a", says(5.0)), ("b", says(10.0))]);
    let explained = lab.registry.explain(&"p".parse().unwrap(), 0, lab.now).unwrap();
    let total = |id: &str| explained.candidates.iter().find(|c| c.id.as_str() == id).unwrap().scores[0].value;
    assert!(total("a") > 1_500.0 && total("b") < 300.0, "{} and {}", total("a"), total("b"));
    let flows = lab.flows(1);
    assert_eq!(flows.iter().find(|(id, _)| id == "a").unwrap().1, 1);
}

#[test]
fn a_resource_that_is_hot_at_this_hour_every_day_is_avoided_before_it_is() {
    let mut lab = Lab::new(Policy::Adaptive, |pool| pool.forecast = Some(Duration::from_secs(1_800)));
    for id in ["night", "calm"] {
        lab.join(id, "", &[]);
    }
    let hour = Duration::from_secs(3_600);
    let says = |cpu| Says { cpu, rate: 100.0, ..Says::default() };
    // Two days of a report a minute (the lease is long over in between, but nobody asks for it to expire): hot from two to
    // three each night.
    for minute in 0..(48 * 60) {
        lab.pass(Duration::from_secs(60));
        let hot = lab.now.as_millis() / hour.as_millis() as u64 % 24 == 2;
        lab.report("night", &says(if hot { 0.9 } else { 0.3 }));
        lab.report("calm", &says(0.3));
        if minute % 10 == 0 {
            lab.rebuild();
        }
    }
    // Up to a quarter of an hour before two on the third night: nothing is hot yet.
    while lab.now.as_millis() / 1_000 % 86_400 < 7_200 - 900 || lab.now.as_millis() / 86_400_000 < 2 {
        lab.pass(Duration::from_secs(30));
        lab.report("night", &says(0.3));
        lab.report("calm", &says(0.3));
        lab.rebuild();
    }
    for _ in 0..20 {
        lab.second(&[("night", says(0.3)), ("calm", says(0.3))]);
    }
    let explained = lab.registry.explain(&"p".parse().unwrap(), 0, lab.now).unwrap();
    let forecast = |id: &str| explained.candidates.iter().find(|c| c.id.as_str() == id).unwrap().forecast;
    assert!(forecast("night").is_some_and(|busy| busy > 0.45), "{:?}", forecast("night"));
    assert!(forecast("calm").is_some_and(|busy| busy < 0.35), "{:?}", forecast("calm"));
    let (night, calm) = (lab.weight(0, "night"), lab.weight(0, "calm"));
    assert!(night < 0.9 * calm, "{night} against {calm}, a quarter of an hour before it gets hot");
}

#[test]
fn histories_are_bounded_and_freed() {
    let mut lab = Lab::new(Policy::Adaptive, |_| {});
    lab.join("a", "", &[]);
    for _ in 0..600 {
        lab.second(&[("a", Says { cpu: 0.5, rate: 10.0, ..Says::default() })]);
    }
    let (bytes, refused) = lab.registry.history_usage();
    assert!(bytes > 1_000 && bytes < 100_000 && refused == 0, "{bytes} bytes");
    lab.registry.deregister(&"a".parse().unwrap(), 0).unwrap();
    assert_eq!(lab.registry.history_usage().0, 0, "freed with its resource");
    // At the bound, nothing new is begun, and reports go on.
    let pool = PoolConfig::new("p".parse().unwrap(), Policy::Adaptive);
    let limits = Limits { history_bytes_max: 0, ..Limits::default() };
    lab.registry = Registry::new(Config { pools: vec![pool], limits }).unwrap();
    lab.join("b", "", &[]);
    lab.second(&[("b", Says { cpu: 0.5, ..Says::default() })]);
    let (bytes, refused) = lab.registry.history_usage();
    assert!(bytes < 4_096 && refused > 0, "{bytes} bytes, {refused} refused");
}

#[test]
fn small_moves_of_weight_move_no_keys() {
    let mut lab = Lab::new(Policy::Maglev, |_| {});
    for id in ["a", "b", "c", "d"] {
        lab.join(id, "", &[]);
    }
    let homes = |lab: &Lab| -> Vec<u32> {
        let key = |n: u8| FlowKey::of_client([10, 0, 0, n].into());
        let mut selector = Selector::new(1);
        (0..200)
            .map(|n| selector.select_for(&lab.tables[0], key(n), &Excluded::none(), lab.now).unwrap().index.0)
            .collect()
    };
    let before = homes(&lab);
    for second in 0..30 {
        let noise =
            |n: i32| Says { cpu: 0.50 + 0.01 * f64::from((second + n) % 5), rate: 100.0, ..Says::default() };
        lab.second(&[("a", noise(0)), ("b", noise(1)), ("c", noise(2)), ("d", noise(3))]);
    }
    assert_eq!(homes(&lab), before);
    // Half as strong: some of its keys move, few of the others'.
    for _ in 0..60 {
        let strong = Says { cpu: 0.45, rate: 100.0, ..Says::default() };
        let weak = Says { cpu: 0.9, rate: 100.0, ..Says::default() };
        lab.second(&[("a", weak), ("b", strong.clone()), ("c", strong.clone()), ("d", strong)]);
    }
    let after = homes(&lab);
    let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
    let a = lab.index("a").0;
    let of_a = |homes: &[u32]| homes.iter().filter(|home| **home == a).count();
    assert!(of_a(&after) < of_a(&before), "{} of {} keys stayed", of_a(&after), of_a(&before));
    assert!((1..80).contains(&moved), "{moved} of 200 keys moved");
}

fn split(pool: &mut PoolConfig) {
    let abort = AbortConfig { after: Duration::from_secs(10), flows_min: 20, ..AbortConfig::default() };
    pool.split = Some(SplitConfig::parse(&["1", "2=20%"], SplitBy::Share, abort).unwrap());
}

/// A second of 100 flows, of which those to version 2 are reset after their first byte if it is bad.
fn split_second(lab: &mut Lab, selector: &mut Selector, bad: bool) -> f64 {
    let mut new = 0;
    for _ in 0..100 {
        let selection = selector.select(&lab.tables[0], &Excluded::none(), lab.now).unwrap();
        let version_2 = lab.tables[0].backend(selection.index).id.as_str() == "new";
        new += u32::from(version_2);
        selection.open.connected();
        selection.open.answered();
        selection.open.first_byte_took(1_000, lab.now);
        if version_2 && bad {
            selection.open.reset_after_answer();
        }
    }
    let says = Says { cpu: 0.3, ..Says::default() };
    lab.second(&[("old1", says.clone()), ("old2", says.clone()), ("new", says)]);
    f64::from(new) / 100.0
}

#[test]
fn a_bad_version_is_aborted_and_a_good_one_is_not() {
    for bad in [false, true] {
        let mut lab = Lab::new(Policy::Adaptive, split);
        for (id, version) in [("old1", "1"), ("old2", "1.2"), ("new", "2.0")] {
            lab.join(id, version, &[]);
        }
        let mut selector = Selector::new(3);
        let shares: Vec<f64> = (0..40).map(|_| split_second(&mut lab, &mut selector, bad)).collect();
        let early = shares[..8].iter().sum::<f64>() / 8.0;
        let late = shares[30..].iter().sum::<f64>() / 10.0;
        assert!((early - 0.2).abs() < 0.08, "a fifth to the new one, though it is a third of them: {early}");
        let versions = lab.registry.versions(&"p".parse().unwrap(), lab.now).unwrap();
        assert_eq!(versions.iter().map(|v| v.version.as_str()).collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!((versions[0].resources, versions[1].resources_ready), (2, 1));
        let aborts = lab.registry.take_aborts();
        if bad {
            assert_eq!(late, 0.0, "it was worse for so long");
            let why = versions[1].aborted.clone().expect("aborted");
            assert!(why.contains("resets"), "{why}");
            assert_eq!((aborts.len(), aborts[0].1.as_str()), (1, "2"));
            assert!(versions[1].totals.resets > 50 && versions[1].share == 0.0);
            let explained = lab.registry.explain(&"p".parse().unwrap(), 0, lab.now).unwrap();
            let left_out = explained.candidates.iter().find(|c| c.id.as_str() == "new").unwrap();
            assert_eq!(
                left_out.left_out.as_ref().unwrap().to_string(),
                "version 2 has no share of new flows"
            );
            // An operator gives it another chance.
            lab.registry.set_version_share(&"p".parse().unwrap(), "2", 0.5).unwrap();
            lab.rebuild();
            assert!(split_second(&mut lab, &mut selector, false) > 0.3);
        } else {
            assert!((late - 0.2).abs() < 0.06 && aborts.is_empty(), "{late}, {aborts:?}");
        }
    }
}

#[test]
fn what_a_version_did_stays_counted_when_its_resource_leaves() {
    let mut lab = Lab::new(Policy::Adaptive, split);
    for (id, version) in [("old1", "1"), ("old2", "1"), ("new", "2")] {
        lab.join(id, version, &[]);
    }
    let mut selector = Selector::new(3);
    for _ in 0..5 {
        split_second(&mut lab, &mut selector, false);
    }
    let opened = |lab: &Lab| -> u64 {
        let versions = lab.registry.versions(&"p".parse().unwrap(), lab.now).unwrap();
        versions.iter().map(|version| version.totals.flows_opened).sum()
    };
    assert_eq!(opened(&lab), 500);
    lab.registry.deregister(&"new".parse().unwrap(), 0).unwrap();
    lab.rebuild();
    assert_eq!(opened(&lab), 500);
    let all = lab.flows(20);
    assert_eq!(
        all.iter().map(|(_, n)| n).sum::<usize>(),
        20,
        "the baseline serves those of the missing version"
    );
    let states = lab.registry.pools(lab.now)[0].states;
    assert_eq!(states.of(ResourceState::Ready), 2);
}
