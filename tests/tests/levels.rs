//! Balancers behind balancers: a parent that knows two resources, each of which is a balancer with three of its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use e2e::{
    Balancer, BalancerConfig, Clients, Manners, PATIENCE, POOL, Process, Service, ask, until, within,
    write_utilization, write_whole,
};
use rustix::process::Signal;

/// From the moment a child's resources are busy until it gets less than half of what its sister gets.
const BUSY_WITHIN: Duration = Duration::from_secs(10);
/// Shares are looked at over so long, and so many connections.
const WINDOW: Duration = Duration::from_secs(1);
const CONNECTIONS_MIN: usize = 40;

/// A balancer below, and what is behind it.
struct Child {
    balancer: Balancer,
    services: Vec<Service>,
    agents: Vec<Process>,
    files: Vec<PathBuf>,
}

/// A configuration whose balancer is the resource `id` of the others.
fn beneath(parents: &[SocketAddr], id: &str) -> BalancerConfig {
    let mut config = BalancerConfig::default();
    let parents: Vec<String> = parents.iter().map(|parent| format!("\"http://{parent}\"")).collect();
    config.further = format!(
        "[[upstream]]\nbalancer = [{}]\nid = \"{id}\"\nreport_interval = \"200ms\"\n",
        parents.join(", ")
    );
    config
}

impl Child {
    fn start(parent: &Balancer, name: &str, folder: &Path) -> Self {
        let balancer = Balancer::start(beneath(&[parent.control()], name));
        let names: Vec<String> = (1..=3).map(|n| format!("{name}-{n}")).collect();
        let services: Vec<Service> = names.iter().map(|name| Service::start(name, Manners::Good)).collect();
        let files: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
        let agent = |(service, file): (&Service, &PathBuf)| {
            write_utilization(file, 0.2);
            let file = file.to_str().expect("a plain path");
            let flags = ["--utilization-file", file, "--report-interval", "200ms", "--label", "tls"];
            balancer.agent(service.name(), service.address(), &flags)
        };
        let agents = services.iter().zip(&files).map(agent).collect();
        Self { balancer, services, agents, files }
    }

    fn busy(&self, cpu: f64) {
        self.files.iter().for_each(|file| write_utilization(file, cpu));
    }
}

/// How many of these connections each child served.
fn by_child(asked: &[e2e::Asked]) -> BTreeMap<String, f64> {
    let mut counts = BTreeMap::new();
    for asked in asked {
        let name = asked.outcome.as_ref().expect("every connection is served");
        let (child, _) = name.rsplit_once('-').expect("services are named for their child");
        *counts.entry(child.to_owned()).or_default() += 1.0;
    }
    counts
}

/// The first child's connections of the last window over the second's.
fn ratio(clients: &Clients) -> Option<f64> {
    let since = Instant::now().checked_sub(WINDOW)?;
    let asked = clients.since(since);
    let counts = by_child(&asked);
    let count = |name: &str| counts.get(name).copied().unwrap_or(0.0);
    (asked.len() >= CONNECTIONS_MIN && count("b") > 0.0).then(|| count("a") / count("b"))
}

#[test]
fn a_busy_child_gets_less_and_a_dead_ones_traffic_moves() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let parent = Balancer::start(BalancerConfig::default());
    let mut a = Child::start(&parent, "a", folder.path());
    let b = Child::start(&parent, "b", folder.path());
    until("both children are ready", || (parent.ready_resources() == 2).then_some(()));
    // What is common to all of a child's resources is the child's; their number is nowhere.
    until("the child has what its resources have", || {
        (parent.resources()["a"]["labels"]["tls"] == "true").then_some(())
    });
    let resources = parent.resources();
    assert_eq!(resources.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(resources["a"]["address"], a.balancer.listener().to_string());

    let clients = Clients::start(parent.listener(), 4, Duration::from_millis(5));
    until("both get about as much", || ratio(&clients).filter(|ratio| (0.7..1.4).contains(ratio)));
    a.busy(0.95);
    let (got, took) =
        within(BUSY_WITHIN, "the busy one gets less", || ratio(&clients).filter(|ratio| *ratio < 0.5));
    println!("busy: {got:.2} of the other's connections, {:.1} s after", took.as_secs_f64());
    a.busy(0.2);
    until("it gets its part again", || ratio(&clients).filter(|ratio| *ratio > 0.7));

    // From one moment to the next: nobody says goodbye.
    a.balancer.process().signal(Signal::KILL);
    let killed = Instant::now();
    until("nothing goes to the dead one", || {
        let since = Instant::now().checked_sub(WINDOW)?;
        let asked: Vec<_> = clients.since(since).into_iter().filter(|asked| asked.outcome.is_ok()).collect();
        let counts = by_child(&asked);
        (since > killed && asked.len() >= CONNECTIONS_MIN && !counts.contains_key("a")).then_some(())
    });
    let failed: Vec<_> = clients.since(killed).into_iter().filter(|asked| asked.outcome.is_err()).collect();
    // A connection that was through the child when it was killed is lost with it; each of four clients has one at most.
    assert!(failed.len() <= 4, "{failed:?}");
    drop(clients);
    a.agents.clear();
    assert_eq!(b.services.len(), 3);
}

#[test]
fn a_child_that_stops_or_has_nobody_left_is_left_out_before_a_connection_fails() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let parent = Balancer::start(BalancerConfig::default());
    let mut a = Child::start(&parent, "a", folder.path());
    let mut b = Child::start(&parent, "b", folder.path());
    until("both children are ready", || (parent.ready_resources() == 2).then_some(()));
    let clients = Clients::start(parent.listener(), 4, Duration::from_millis(5));
    until("both serve", || ratio(&clients));

    // The last resource of a child leaves: the child says so, and keeps its lease.
    let began = Instant::now();
    for agent in &mut b.agents {
        agent.signal(Signal::TERM);
    }
    until("the child without resources is not ready", || {
        (parent.resources()["b"]["state"] == "not_ready").then_some(())
    });
    // For a moment the parent did not know; whoever was sent there then was refused by the child, for it had nobody.
    let refused = |asked: &e2e::Asked| asked.outcome.is_err();
    let until_known = clients.since(began).iter().filter(|asked| refused(asked)).count();
    println!("{until_known} connections were refused until the parent knew");
    b.agents = b
        .services
        .iter()
        .map(|service| b.balancer.agent(service.name(), service.address(), &["--report-interval", "200ms"]))
        .collect();
    until("it is ready again", || (parent.resources()["b"]["state"] == "ready").then_some(()));

    let began = Instant::now();
    a.balancer.process().signal(Signal::TERM);
    a.balancer.process().wait(PATIENCE);
    until("it has left", || (!parent.resources().contains_key("a")).then_some(()));
    let failed: Vec<_> = clients.since(began).into_iter().filter(|asked| asked.outcome.is_err()).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn capabilities_and_the_version_of_what_is_behind_it_are_the_childs() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut config = BalancerConfig::default();
    let writers = config.add_listener("role=writer");
    let parent = Balancer::start(config);
    let child = Balancer::start(beneath(&[parent.control()], "child"));
    let services = [Service::start("one", Manners::Good), Service::start("two", Manners::Good)];
    let file = folder.path().join("two");
    write_whole(&file, r#"{"labels": {"role": "reader"}}"#);
    let file = file.to_str().expect("a plain path");
    let flags = ["--report-interval", "200ms", "--version-of-service", "15"];
    let one = child.agent("one", services[0].address(), &[&flags[..], &["--label", "role=writer"]].concat());
    let two =
        child.agent("two", services[1].address(), &[&flags[..], &["--utilization-file", file]].concat());
    until("the child serves", || ask(parent.listener()).ok());
    until("it has the version of both", || (parent.resources()["child"]["version"] == "15").then_some(()));
    // One of two is a writer: not everyone who is sent there would get one.
    until("it is no writer", || {
        let child = &parent.resources()["child"];
        (child["labels"].get("role").is_none() && child["state"] == "ready").then_some(())
    });
    assert!(ask(writers).is_err());
    write_whole(Path::new(file), r#"{"labels": {"role": "writer"}}"#);
    until("both are writers, and so is it", || ask(writers).ok());
    drop((one, two));
}

#[test]
fn a_circle_is_refused() {
    // Each is a resource of the other, by configuration; and a third is one of its own.
    let [first, second] = [(); 2].map(|()| BalancerConfig::default());
    let above = |mut config: BalancerConfig, parent: SocketAddr, id: &str| {
        config.further += &beneath(&[parent], id).further;
        Balancer::start(config)
    };
    let (first_control, second_control) = (first.control, second.control);
    let mut first = above(first, second_control, "first");
    let service = Service::start("service", Manners::Good);
    let agent = first.agent("service", service.address(), &["--report-interval", "200ms"]);
    until("the first has somebody", || (first.ready_resources() == 1).then_some(()));
    let mut second = above(second, first_control, "second");
    until("the second has the first", || (second.ready_resources() == 1).then_some(()));
    // Only now is there something behind the second that it could offer to the first.
    let refused = |line: &str| line.contains("go round in a circle").then_some(());
    second.process().wait_for_error_line(PATIENCE, refused);
    assert!(!first.resources().contains_key("second"));
    assert_eq!(ask(second.listener()).expect("through both"), "service");
    assert!(first.process().is_running() && second.process().is_running());
    drop(agent);

    let own = BalancerConfig::default();
    let control = own.control;
    let mut own = above(own, control, "own");
    let agent = own.agent("service", service.address(), &["--report-interval", "200ms"]);
    own.process().wait_for_error_line(PATIENCE, refused);
    assert_eq!(own.resources().keys().collect::<Vec<_>>(), ["service"], "of pool {POOL}");
    drop(agent);
}
