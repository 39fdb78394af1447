//! What outlives a restart: one registry's news, given to the next.

use std::collections::BTreeMap;
use std::time::Duration;

use allocation::{AllocationTable, BackendIndex, LeftOut, Policy, Timestamp};
use registry::versions::{Measure, Reason};
use registry::{
    AbortConfig, Chunk, Config, Kept, PoolConfig, RawRegistration, RawUtilization, Readiness, Registration,
    Registry, Remembered, Report, ResourceState, SplitBy, SplitConfig, Utilization,
};

const LEASE: Duration = Duration::from_secs(3_600);
const ORIGIN: Duration = Duration::from_secs(1_790_000_000);

fn at(seconds: f64) -> Timestamp {
    Timestamp::from_millis((seconds * 1e3) as u64)
}

fn registration(id: &str, incarnation: u64) -> Registration {
    let raw = RawRegistration {
        id: id.into(),
        pool: "sql".into(),
        address: "10.0.0.1:5432".into(),
        incarnation,
        ..RawRegistration::default()
    };
    Registration::parse(raw).unwrap()
}

fn report(id: &str, cpu: f64, rate: f64) -> Report {
    let utilization = RawUtilization { cpu, rate, ..RawUtilization::default() };
    Report {
        id: id.parse().unwrap(),
        incarnation: 1,
        readiness: Readiness::Ready,
        utilization: Utilization::parse(utilization).unwrap(),
        balancers: 1,
        labels: None,
    }
}

/// Stretches of one history, by tier and start.
type Stretches = BTreeMap<(u64, u64), Vec<u8>>;

/// The newest of everything that a registry gives to be kept.
#[derive(Default)]
struct Store {
    resources: BTreeMap<String, (Kept, Stretches)>,
}

impl Store {
    fn take(&mut self, registry: &Registry) -> usize {
        let mut count = 0;
        let mut from = 0;
        while let Some(news) = registry.take_kept(0, from, 1) {
            for kept in news {
                count += 1;
                let place = self.resources.entry(kept.id.to_string());
                let (newest, chunks) = place.or_insert_with(|| (kept.clone(), BTreeMap::new()));
                for chunk in &kept.history {
                    chunks.insert((chunk.tier_ms, chunk.start_ms), chunk.buckets.clone());
                }
                *newest = kept;
            }
            from += 1;
        }
        count
    }

    fn restore(&self, registry: &Registry, now: Timestamp) {
        for (id, (kept, chunks)) in &self.resources {
            let chunk = |((tier_ms, start_ms), buckets): (&(u64, u64), &Vec<u8>)| Chunk {
                tier_ms: *tier_ms,
                start_ms: *start_ms,
                buckets: buckets.clone(),
            };
            let remembered = Remembered {
                registration: registration(id, kept.incarnation),
                ready: kept.ready,
                drained: false,
                estimates: Some(kept.estimates),
                history: chunks.iter().map(chunk).collect(),
            };
            assert_eq!(registry.restore(remembered, LEASE, now), Ok(0));
        }
    }
}

fn registry(pool: PoolConfig) -> Registry {
    Registry::new(Config { pools: vec![pool], ..Config::default() }).unwrap().with_origin(ORIGIN)
}

fn pool() -> PoolConfig {
    PoolConfig::new("sql".parse().unwrap(), Policy::Adaptive)
}

fn table(registry: &Registry, now: Timestamp) -> AllocationTable {
    let mut rebuilt = registry.rebuild(now);
    rebuilt.pop().expect("there is reason for a table").tables.remove(0)
}

/// A registry in which `strong` has earned more weight than `weak`, and what it gave to be kept.
fn after_ten_minutes() -> (Registry, Store) {
    let (before, mut store) = (registry(pool()), Store::default());
    for id in ["strong", "weak"] {
        before.register(registration(id, 1), at(0.0)).unwrap();
    }
    for second in 1..600 {
        before.report(report("strong", 0.5, 300.0), at(f64::from(second))).unwrap();
        before.report(report("weak", 0.5, 100.0), at(f64::from(second))).unwrap();
        assert_eq!(store.take(&before), 2);
        before.rebuild(at(f64::from(second)));
    }
    assert_eq!(store.take(&before), 0, "silence is no news");
    (before, store)
}

#[test]
fn a_remembered_resource_has_its_weight_and_no_flow_before_it_answers() {
    let (before, store) = after_ten_minutes();
    let weight = |registry: &Registry, id: &str| {
        let all = registry.resources(None, at(1.0)).unwrap();
        all.iter().find(|status| status.registration.id().as_str() == id).unwrap().standing.weight
    };
    assert!(weight(&before, "strong") > 1.2, "{}", weight(&before, "strong"));

    let after = registry(pool()).with_origin(ORIGIN + Duration::from_secs(605));
    store.restore(&after, at(0.0));
    let first = table(&after, at(0.1));
    assert!(first.eligible().is_empty());
    assert_eq!(first.left_out(BackendIndex(0)), LeftOut::Unproven);
    let unconfirmed = after.unconfirmed();
    assert_eq!(unconfirmed.len(), 2);
    for of in &unconfirmed {
        assert!(after.checked(of, true, LEASE, at(0.2)));
        assert!(!after.checked(of, true, LEASE, at(0.2)), "only news is news");
    }
    let second = table(&after, at(0.5));
    assert_eq!(second.eligible().len(), 2);
    let ratio = |registry: &Registry| weight(registry, "strong") / weight(registry, "weak");
    assert!((ratio(&after) / ratio(&before) - 1.0).abs() < 0.02, "{} {}", ratio(&after), ratio(&before));
    let states = after.pools(at(0.5))[0].states;
    assert_eq!((states.of(ResourceState::Remembered), states.of(ResourceState::Ready)), (2, 0));

    // It goes on without agents, as long as it answers.
    assert!(after.expire(at(3_599.0)).is_empty());
    after.checked(&unconfirmed[0], true, LEASE, at(3_599.0));
    after.checked(&unconfirmed[1], false, LEASE, at(3_599.0));
    assert_eq!(table(&after, at(3_600.0)).eligible().len(), 1);
    assert_eq!(after.expire(at(3_601.0)).len(), 1, "the one that does not answer is forgotten");
    assert_eq!(after.expire(at(7_198.0)).len(), 0);
}

#[test]
fn a_report_or_a_registration_makes_it_one_like_any_other() {
    let (_, store) = after_ten_minutes();
    let after = registry(pool()).with_origin(ORIGIN + Duration::from_secs(605));
    store.restore(&after, at(0.0));
    let unconfirmed = after.unconfirmed();
    let registered = after.register(registration("strong", 1), at(1.0)).unwrap();
    assert!(!registered.created && !registered.changed, "the same process: nothing is to be written");
    assert!(after.report(report("weak", 0.5, 100.0), at(1.0)).is_ok());
    assert!(after.unconfirmed().is_empty());
    assert!(!after.checked(&unconfirmed[0], false, LEASE, at(1.1)), "what it says itself counts");
    assert_eq!(table(&after, at(1.2)).eligible().len(), 2);
    assert_eq!(after.pools(at(1.2))[0].states.of(ResourceState::Ready), 2);
    assert_eq!(after.expire(at(5.0)).len(), 2, "its lease is its own again");
}

#[test]
fn a_newer_process_in_its_place_starts_anew() {
    let (_, store) = after_ten_minutes();
    let after = registry(pool()).with_origin(ORIGIN + Duration::from_secs(605));
    store.restore(&after, at(0.0));
    let of = after.unconfirmed().remove(0);
    assert!(after.register(registration("strong", 2), at(1.0)).unwrap().created);
    assert!(!after.checked(&of, true, LEASE, at(1.1)), "the answer was of the process before");
    let older = after.register(registration("strong", 1), at(1.2));
    assert!(older.is_err(), "{older:?}");
}

#[test]
fn forecasts_go_by_the_hours_of_the_day() {
    let busy_at_noon = || PoolConfig { forecast: Some(Duration::from_secs(900)), ..pool() };
    let midnight = Duration::from_secs(1_790_000_000 / 86_400 * 86_400);
    let (before, mut store) = (registry(busy_at_noon()).with_origin(midnight), Store::default());
    before.register(registration("strong", 1), at(0.0)).unwrap();
    for minute in 0..22 * 60 {
        let cpu = if (12 * 60..13 * 60).contains(&minute) { 0.9 } else { 0.1 };
        before.report(report("strong", cpu, 1.0), at(f64::from(minute) * 60.0)).unwrap();
        store.take(&before);
    }
    // The next day at noon, by another process, which began at 11:59.
    let began = midnight + Duration::from_secs((24 + 12) * 3_600 - 60);
    let after = registry(busy_at_noon()).with_origin(began);
    store.restore(&after, at(0.0));
    after.report(report("strong", 0.1, 1.0), at(60.0)).unwrap();
    let explained = after.explain(&"sql".parse().unwrap(), 0, at(60.0)).unwrap();
    let forecast = explained.candidates[0].forecast.expect("there is a day before");
    assert!(forecast > 0.8, "{forecast}");
}

#[test]
fn shares_and_aborts_of_versions_are_taken_back() {
    let split = SplitConfig::parse(&["1", "2=20%"], SplitBy::Share, AbortConfig::default()).unwrap();
    let after = registry(PoolConfig { split: Some(split), ..pool() });
    let name = "sql".parse().unwrap();
    let now = after.version_share(&name, "2").unwrap();
    assert_eq!((now.configured, now.share, now.aborted), (0.2, 0.2, None));
    assert_eq!(after.version_share(&name, "3"), None);
    let reason = Reason { measure: Measure::Resets, value: 0.5, baseline: 0.01 };
    after.restore_version(&name, "2", 0.4, Some(reason)).unwrap();
    let now = after.version_share(&name, "2").unwrap();
    assert_eq!((now.configured, now.share, now.aborted), (0.2, 0.4, Some(reason)));
    let versions = after.versions(&name, at(1.0)).unwrap();
    assert_eq!((versions[1].share, versions[0].share), (0.0, 1.0));
    assert!(after.take_aborts().is_empty(), "it is no news");
    after.set_version_share(&name, "2", 0.1).unwrap();
    assert_eq!(after.version_share(&name, "2").unwrap().aborted, None);
}

#[test]
fn checks_take_a_resource_out_and_bring_it_back() {
    let registry = registry(PoolConfig { checked: true, ..pool() });
    for id in ["a", "b"] {
        registry.register(registration(id, 1), at(0.0)).unwrap();
    }
    assert_eq!(table(&registry, at(0.1)).eligible().len(), 2, "before the first check it serves on its word");
    let targets = registry.check_targets(0);
    assert_eq!(targets.len(), 2);
    let of = |id: &str| targets.iter().find(|target| target.id.as_str() == id).unwrap();
    assert!(registry.checked(of("a"), false, LEASE, at(0.2)));
    assert!(!registry.checked(of("a"), false, LEASE, at(0.2)), "only news is news");
    let without = table(&registry, at(0.3));
    assert_eq!((without.eligible().len(), without.left_out(BackendIndex(0))), (1, LeftOut::ChecksFail));
    assert_eq!(registry.pools(at(0.3))[0].states.of(ResourceState::Down), 1);
    let explained = registry.explain(&"sql".parse().unwrap(), 0, at(0.3)).unwrap();
    assert_eq!(explained.candidates[1].left_out, Some(registry::LeftOut::ChecksFail));
    // Its own report does not overrule what was seen.
    registry.report(report("a", 0.1, 100.0), at(0.4)).unwrap();
    assert_eq!(table(&registry, at(0.5)).eligible().len(), 1);
    assert!(registry.checked(of("a"), true, LEASE, at(0.6)));
    assert_eq!(table(&registry, at(0.7)).eligible().len(), 2);
    // Nor does a check overrule what it says.
    let unready = Report { readiness: Readiness::NotReady, ..report("a", 0.1, 100.0) };
    registry.report(unready, at(0.8)).unwrap();
    assert_eq!(table(&registry, at(0.9)).eligible().len(), 1);
    // A check that passes keeps nobody in who has stopped reporting.
    registry.checked(of("a"), true, LEASE, at(3.0));
    assert_eq!(registry.expire(at(10.0)).len(), 2);
    assert!(registry.check_targets(0).is_empty());
    assert!(!registry.checked(of("a"), true, LEASE, at(10.0)));
}

#[test]
fn all_that_fail_their_checks_are_left_out() {
    let registry = registry(PoolConfig { checked: true, ..pool() });
    for id in ["a", "b"] {
        registry.register(registration(id, 1), at(0.0)).unwrap();
    }
    for target in registry.check_targets(0) {
        registry.checked(&target, false, LEASE, at(0.1));
    }
    assert!(table(&registry, at(0.2)).eligible().is_empty(), "checks are not overruled");
}

#[test]
fn a_check_stays_with_the_process_that_it_was_of() {
    let registry = registry(PoolConfig { checked: true, ..pool() });
    registry.register(registration("a", 1), at(0.0)).unwrap();
    let old = registry.check_targets(0).remove(0);
    registry.checked(&old, false, LEASE, at(0.1));
    registry.register(registration("a", 2), at(0.2)).unwrap();
    assert_eq!(table(&registry, at(0.3)).eligible().len(), 1, "another process starts anew");
    assert!(!registry.checked(&old, false, LEASE, at(0.4)));
}

#[test]
fn a_remembered_resource_of_a_checked_pool_keeps_what_its_check_found() {
    let (_, store) = after_ten_minutes();
    let after =
        registry(PoolConfig { checked: true, ..pool() }).with_origin(ORIGIN + Duration::from_secs(605));
    store.restore(&after, at(0.0));
    assert!(table(&after, at(0.1)).eligible().is_empty());
    for target in after.check_targets(0) {
        assert!(after.checked(&target, target.id.as_str() == "strong", LEASE, at(0.2)));
    }
    assert_eq!(table(&after, at(0.3)).eligible().len(), 1);
    assert_eq!(after.pools(at(0.3))[0].states.of(ResourceState::Down), 1);
    for id in ["strong", "weak"] {
        after.report(report(id, 0.5, 100.0), at(0.4)).unwrap();
    }
    assert_eq!(table(&after, at(0.5)).eligible().len(), 1, "a report does not say that the service works");
}
