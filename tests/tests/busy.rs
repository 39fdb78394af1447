//! A busy host gets fewer new connections, and its share comes back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use e2e::{BalancerConfig, Cgroup, Lab, Load, PATIENCE, Postgres, write_utilization};

/// From the moment a host is busy until it gets less than half of what each of its peers gets.
const BUSY_WITHIN: Duration = Duration::from_secs(5);
/// From the moment it is calm until its share is near its peers' again.
const BACK_WITHIN: Duration = Duration::from_secs(30);
/// Shares are looked at over so long.
const WINDOW: Duration = Duration::from_secs(1);
/// What a share is compared with: `visibly lower` and `back`.
const LOWER: f64 = 0.5;
const BACK: f64 = 0.75;
/// Connections in a window below which a share is no measurement.
const CONNECTIONS_MIN: usize = 40;

/// Share of the first instance in the new connections of the last window, over its peers' mean.
fn share_of_first(lab: &Lab, load: &Load) -> Option<f64> {
    let since = Instant::now().checked_sub(WINDOW)?;
    let mut by_server: BTreeMap<String, f64> = BTreeMap::new();
    let attempts = load.since(since);
    for attempt in &attempts {
        *by_server.entry(attempt.outcome.clone().ok()?).or_default() += 1.0;
    }
    let count = |member: usize| {
        let ip = lab.members[member].postgres.address().ip().to_string();
        by_server.get(&ip).copied().unwrap_or(0.0)
    };
    let peers = lab.members.len() - 1;
    let peers_mean = (1..=peers).map(count).sum::<f64>() / peers as f64;
    (attempts.len() >= CONNECTIONS_MIN && peers_mean > 0.0).then(|| count(0) / peers_mean)
}

/// Weight of the first instance over its peers' mean, as the balancer has it.
fn weight_of_first(lab: &Lab) -> f64 {
    let resources = lab.balancer.resources();
    let weight = |name: &String| resources[name]["weight"].as_f64().expect("a weight");
    let weights: Vec<f64> = lab.names().iter().map(weight).collect();
    let peers = &weights[1..];
    weights[0] * peers.len() as f64 / peers.iter().sum::<f64>()
}

/// Waits until the share is as wanted, over a whole window; and the weight, too: a share alone can be so by chance.
#[track_caller]
fn wait_for_share(lab: &Lab, load: &Load, what: &str, limit: Duration, wanted: impl Fn(f64) -> bool) {
    let begin = Instant::now();
    let (share, took) = e2e::within(limit, what, || {
        let share = share_of_first(lab, load)?;
        let is_so = begin.elapsed() >= WINDOW && wanted(share) && wanted(weight_of_first(lab));
        is_so.then_some(share)
    });
    println!("{what}: {share:.2} of its peers' connections, {:.1} s after", took.as_secs_f64());
}

/// What all of these scenarios show, whatever makes the first one busy and calm.
fn show(lab: Lab, mut busy: impl FnMut(), mut calm: impl FnMut()) {
    // Each connection costs an instance some 3 ms of CPU. They rest as long, so that the load alone makes nobody busy.
    let load = Load::start(lab.listener(), 4, Duration::from_millis(15));
    wait_for_share(&lab, &load, "all alike", PATIENCE, |share| (BACK..1.0 / BACK).contains(&share));
    busy();
    wait_for_share(&lab, &load, "busy", BUSY_WITHIN, |share| share < LOWER);
    calm();
    wait_for_share(&lab, &load, "calm again", BACK_WITHIN, |share| share >= BACK);
    let attempts = load.stop();
    let failed: Vec<_> = attempts.iter().filter(|attempt| attempt.outcome.is_err()).collect();
    assert!(failed.is_empty(), "{failed:?}");
    println!("{} connections, 0 failed", attempts.len());
    lab.stop();
}

#[test]
fn a_report_that_says_busy_moves_connections_away() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files: Vec<_> = (1..=3).map(|n| folder.path().join(format!("pg{n}.json"))).collect();
    let mut lab = Lab::start(0, BalancerConfig::default());
    for file in &files {
        write_utilization(file, 0.2);
        lab.join(Postgres::start(), &["--utilization-file", file.to_str().expect("a plain path")]);
    }
    lab.wait_until_ready(3);
    show(lab, || write_utilization(&files[0], 0.95), || write_utilization(&files[0], 0.2));
}

#[test]
fn real_cpu_burn_in_its_cgroup_moves_connections_away() {
    let mut groups: Vec<Cgroup> = (1..=3).map(|n| Cgroup::new(&format!("pg{n}"))).collect();
    let mut lab = Lab::start(0, BalancerConfig::default());
    for group in &groups {
        let postgres = Postgres::start();
        group.add(postgres.id());
        lab.join(postgres, &["--cgroup", group.path()]);
    }
    lab.wait_until_ready(3);
    let first = std::cell::RefCell::new(&mut groups[0]);
    show(lab, || first.borrow_mut().burn(), || first.borrow_mut().rest());
}
