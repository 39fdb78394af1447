use super::*;
use proptest::prelude::*;
use std::path::PathBuf;

const SECOND: Duration = Duration::from_secs(1);

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

/// Two recorded moments of a host with two CPUs: `before`, then a loop on one of them for three seconds. Swap and
/// traffic are written in by hand.
fn host_roots(moment: &str) -> Roots {
    let proc = fixture("host").join(moment).join("proc");
    Roots { proc, cgroup: fixture("nothing"), net: fixture("host/net") }
}

fn between(source: &Source, before: &Roots, after: &Roots, elapsed: Duration) -> (Utilization, Vec<Gap>) {
    let snapshot = |roots| Snapshot::read(&MeterSource::find(source, roots).unwrap(), roots);
    let after = snapshot(after);
    (Utilization::between(&snapshot(before), &after, elapsed, None), after.gaps)
}

fn near(got: Option<f64>, want: f64) {
    let got = got.unwrap_or_else(|| panic!("absent instead of {want}"));
    assert!((got - want).abs() < 1e-6, "{got} instead of {want}");
}

#[test]
fn a_host() {
    let (got, gaps) = between(&Source::Host, &host_roots("before"), &host_roots("after"), SECOND);
    // Ticks from the two `cpu` lines: 545 user and 59 system of 605.
    near(got.cpu, 604.0 / 605.0);
    near(got.memory, 1.0 - 24_019_980.0 / 24_684_096.0);
    near(got.swap, 524_287.0 / 2_097_148.0);
    near(got.os_cache, (1_180_428.0 + 5_756.0 - 8_788.0) / 24_684_096.0);
    // 12.5 MB received in a second is 100 Mbit/s of the 1000 that eth0 has; the others are down.
    near(got.bandwidth, 0.1);
    near(got.bandwidth_bytes_per_second, 12_500_000.0);
    near(got.pressure_cpu, 0.1268);
    near(got.pressure_memory, 0.0);
    near(got.pressure_io, 0.0004);
    assert_eq!(gaps, []);
}

#[test]
fn a_stated_capacity_stands_above_the_detected_one() {
    let read = |moment| Snapshot::read(&MeterSource::Host, &host_roots(moment));
    let got = Utilization::between(&read("before"), &read("after"), SECOND, Some(200_000_000));
    near(got.bandwidth, 0.5);
    let got = Utilization::between(&read("before"), &read("after"), SECOND, Some(1));
    near(got.bandwidth, 1.0);
}

#[test]
fn a_cgroup_of_version_2_with_limits_above_it() {
    let roots = |moment: &str| Roots { cgroup: fixture("v2").join(moment), ..host_roots(moment) };
    let source = Source::Cgroup("/db.slice/pg.service".into());
    let (got, gaps) = between(&source, &roots("before"), &roots("after"), SECOND);
    // 1.2 s of CPU in a second, with a quota of 1.5 CPUs.
    near(got.cpu, 0.8);
    // Its own memory.max is `max`; the slice's 512 MiB bind. Inactive file pages are free for the asking.
    near(got.memory, 0.5);
    near(got.swap, 0.25);
    near(got.os_cache, 0.25);
    near(got.pressure_cpu, 0.4);
    near(got.pressure_memory, 0.005);
    near(got.pressure_io, 0.0225);
    assert_eq!(gaps, []);

    let by_folder = Source::Cgroup(fixture("v2/after/db.slice/pg.service"));
    let after = roots("after");
    assert_eq!(MeterSource::find(&by_folder, &after), MeterSource::find(&source, &after));
}

#[test]
fn a_cgroup_of_version_1() {
    let roots = |moment: &str| Roots { cgroup: fixture("v1").join(moment), ..host_roots(moment) };
    let source = Source::Cgroup("pg".into());
    let (got, gaps) = between(&source, &roots("before"), &roots("after"), SECOND);
    // 0.4 s of CPU in a second, with a quota of half a CPU.
    near(got.cpu, 0.8);
    near(got.memory, 0.5);
    near(got.swap, 0.25);
    near(got.os_cache, 0.25);
    assert_eq!(got.pressure_cpu, None);
    let absent: Vec<&str> = gaps.iter().map(|gap| gap.dimension).collect();
    assert_eq!(absent, ["pressure_cpu", "pressure_memory", "pressure_io"]);

    let by_folder = Source::Cgroup(fixture("v1/after/memory/pg"));
    let after = roots("after");
    assert_eq!(MeterSource::find(&by_folder, &after), MeterSource::find(&source, &after));
}

#[test]
fn a_cgroup_that_is_not_there() {
    let roots = Roots { cgroup: fixture("v2/after"), ..host_roots("after") };
    let error = MeterSource::find(&Source::Cgroup("/db.slice/mysql.service".into()), &roots).unwrap_err();
    assert!(error.to_string().starts_with("there is no cgroup /db.slice/mysql.service under "), "{error}");
}

#[test]
fn nothing_to_read_is_nothing_known() {
    let roots = Roots { proc: fixture("nothing"), cgroup: fixture("nothing"), net: fixture("nothing") };
    let (got, gaps) = between(&Source::Host, &roots, &roots, SECOND);
    assert_eq!(got, Utilization::default());
    let absent: Vec<&str> = gaps.iter().map(|gap| gap.dimension).collect();
    let all =
        ["cpu", "memory", "swap", "os_cache", "pressure_cpu", "pressure_memory", "pressure_io", "bandwidth"];
    assert_eq!(absent, all);
}

#[test]
fn no_time_between_two_snapshots_is_no_rate() {
    let (got, _) = between(&Source::Host, &host_roots("after"), &host_roots("after"), Duration::ZERO);
    assert_eq!(got.cpu, None);
    assert_eq!(got.bandwidth, None);
    assert!(got.memory.is_some());
}

/// The kernel this runs on, whatever it is.
#[test]
fn the_real_host() {
    let read = || Snapshot::read(&MeterSource::Host, &Roots::default());
    let before = read();
    // Ticks are 10 ms: spin until the kernel has counted some of it, at most as long as any scheduler could need.
    let spun_enough = |now: &Snapshot| match (before.cpu, now.cpu) {
        (Some(CpuCounters::Host { busy, .. }), Some(CpuCounters::Host { busy: now, .. })) => now >= busy + 5,
        _ => true,
    };
    let after = std::iter::repeat_with(read).take(1_000_000).find(spun_enough).unwrap();
    let got = Utilization::between(&before, &after, SECOND, None);
    let cpu = got.cpu.expect("/proc/stat is everywhere");
    assert!(cpu > 0.0 && cpu <= 1.0, "{cpu}");
    let memory = got.memory.expect("/proc/meminfo is everywhere");
    assert!(memory > 0.0 && memory < 1.0, "{memory}");
    assert!(got.swap.is_some() && got.os_cache.is_some());
}

/// The root group of every hierarchy, which is there wherever cgroups are mounted. What it shows differs (a v2 root
/// has no memory.current), but something always is there, and it is in range.
#[test]
fn the_real_root_cgroup() {
    let roots = Roots::default();
    let Ok(source) = MeterSource::find(&Source::Cgroup("/".into()), &roots) else {
        assert!(!roots.cgroup.join("cgroup.procs").exists(), "a mounted v2 root was not found");
        return;
    };
    let before = Snapshot::read(&source, &roots);
    let after = Snapshot::read(&source, &roots);
    let got = Utilization::between(&before, &after, SECOND, None);
    let cpu = got.cpu.expect("every root cgroup counts CPU time");
    assert!((0.0..=CPU_RATIO_MAX).contains(&cpu), "{cpu}");
}

fn fill() -> impl Strategy<Value = Option<Fill>> {
    prop::option::of((any::<u64>(), any::<u64>()).prop_map(|(used, total)| Fill { used, total }))
}

prop_compose! {
    fn snapshot()(
        host in any::<bool>(),
        busy: u64,
        total: u64,
        capacity_cpus in prop_oneof![Just(0.0), Just(f64::NAN), 0.01..256.0],
        fills in (fill(), fill(), fill()),
        traffic in prop::collection::vec((0_u8..3, any::<u64>(), any::<u64>(), any::<Option<u64>>()), 0..4),
        pressure in any::<[Option<f64>; 3]>(),
    ) -> Snapshot {
        let used = Duration::from_nanos(busy);
        let interface = |(name, received, sent, speed_bps): (u8, u64, u64, Option<u64>)| Interface {
            name: format!("eth{name}"), received, sent, speed_bps,
        };
        Snapshot {
            cpu: Some(if host {
                CpuCounters::Host { busy, total }
            } else {
                CpuCounters::Cgroup { used, capacity_cpus }
            }),
            memory: fills.0,
            swap: fills.1,
            os_cache: fills.2,
            interfaces: Some(traffic.into_iter().map(interface).collect()),
            pressure_cpu: pressure[0],
            pressure_memory: pressure[1],
            pressure_io: pressure[2],
            gaps: Vec::new(),
        }
    }
}

proptest! {
    #[test]
    fn whatever_the_kernel_says_is_reported_in_range(
        before in snapshot(),
        after in snapshot(),
        elapsed_ns: u64,
        stated: Option<u64>,
    ) {
        let got = Utilization::between(&before, &after, Duration::from_nanos(elapsed_ns), stated);
        let unit = [
            got.memory, got.swap, got.os_cache, got.bandwidth,
            got.pressure_cpu, got.pressure_memory, got.pressure_io,
        ];
        for value in unit.into_iter().flatten() {
            prop_assert!((0.0..=1.0).contains(&value), "{value}");
        }
        for value in [got.cpu, got.bandwidth_bytes_per_second].into_iter().flatten() {
            prop_assert!(value.is_finite() && value >= 0.0, "{value}");
        }
    }
}
