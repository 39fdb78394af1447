//! Who gets a connection: requirements, versions, balancers, policies, criteria, probes and guards, as an operator
//! configures them and as clients see them; and what explains it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use e2e::{
    Balancer, BalancerConfig, Clients, Lab, Manners, PATIENCE, POOL, Postgres, Process, Psql, Service,
    SqlClient, ask, ask_from, connect, greet, is_reset, trimtab, until, within, write_utilization,
    write_whole,
};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// Agents report each second; a change of labels comes within two reports, and an agent may start a little late.
const TWO_REPORTS: Duration = Duration::from_secs(2 + 2);
/// Standard deviations that no share is away from what it should be by chance (1 in 500,000).
const DEVIATIONS: f64 = 5.0;

/// Services of these names.
fn services<const N: usize>(names: [&str; N]) -> [Service; N] {
    names.map(|name| Service::start(name, Manners::Good))
}

/// Flags of an agent whose host is as busy as this, whatever else this machine does.
fn as_busy(cpu: f64, folder: &Path, name: &str) -> [String; 2] {
    let file = folder.join(name);
    write_utilization(&file, cpu);
    ["--utilization-file".into(), file.to_str().expect("a plain path").to_owned()]
}

/// An agent for each service, under its name, with these flags.
fn agents(balancer: &Balancer, services: &[Service], flags: impl Fn(usize) -> Vec<String>) -> Vec<Process> {
    let agent = |(n, service): (usize, &Service)| {
        let flags = flags(n);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        balancer.agent(service.name(), service.address(), &flags)
    };
    let agents = services.iter().enumerate().map(agent).collect();
    wait_until_ready(balancer, services.len());
    agents
}

#[track_caller]
fn wait_until_ready(balancer: &Balancer, count: usize) {
    until(&format!("{count} resources are ready"), || (balancer.ready_resources() == count).then_some(()));
}

/// Who served so many connections, one after the other; each must be served.
#[track_caller]
fn served(listener: SocketAddr, count: usize) -> BTreeMap<String, usize> {
    let mut by_name = BTreeMap::new();
    for n in 0..count {
        let name = ask(listener).unwrap_or_else(|error| panic!("connection {n} of {count}: {error}"));
        *by_name.entry(name).or_default() += 1;
    }
    by_name
}

#[track_caller]
fn assert_all_served_by(listener: SocketAddr, count: usize, name: &str) {
    assert_eq!(served(listener, count), BTreeMap::from([(name.to_owned(), count)]));
}

/// The value of every entry of a list by the entry's id.
fn by_id(list: &Value) -> BTreeMap<String, &Value> {
    let entries = list.as_array().expect("a list").iter();
    entries.map(|entry| (entry["id"].as_str().expect("an id").to_owned(), entry)).collect()
}

/// A guard of the pool, as `explain` and the metrics have it: they must agree.
fn guard_holds(balancer: &Balancer, name: &str) -> Option<bool> {
    let metric = balancer.metrics().sum("trimtab_guard_active", &[("pool", POOL), ("guard", name)]) == 1.0;
    let explained = balancer.ask(&["explain", POOL]);
    let guards = explained["guards"].as_array().expect("a list of guards");
    let guard = guards.iter().find(|guard| guard["name"] == name).expect("this guard");
    (guard["holds"] == metric).then_some(metric)
}

#[track_caller]
fn assert_share(what: &str, count: usize, of: usize, share: f64) {
    let expected = of as f64 * share;
    let deviation = (expected * (1.0 - share)).sqrt();
    println!("{what}: {count} of {of}");
    assert!(
        (count as f64 - expected).abs() <= DEVIATIONS * deviation,
        "{what}: {count} of {of}, not {share}"
    );
}

/// 127.0.0.2, 127.0.0.3, …
fn client(n: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, 2 + n).into()
}

#[test]
fn a_promoted_replica_gets_the_writers_connections() {
    let mut config = BalancerConfig::default();
    let writers = config.add_listener("role=writer");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files = ["pg1", "pg2"].map(|name| folder.path().join(name));
    let say =
        |n: usize, role: &str| write_whole(&files[n], &format!(r#"{{"labels": {{"role": "{role}"}}}}"#));
    let mut lab = Lab::start(0, config);
    for (n, role) in ["writer", "reader"].into_iter().enumerate() {
        say(n, role);
        lab.join(Postgres::start(), &["--utilization-file", files[n].to_str().expect("a plain path")]);
    }
    lab.wait_until_ready(2);
    let server = |listener| -> Option<String> {
        let mut session = SqlClient::connect(listener).ok()?;
        let server = session.server().ok()?;
        session.end().ok()?;
        Some(lab.name_of(&server).to_owned())
    };
    for n in 0..10 {
        assert_eq!(server(writers).as_deref(), Some("pg1"), "connection {n}");
    }
    let mut readers = BTreeSet::new();
    until("everybody serves where nothing is required", || {
        readers.insert(server(lab.listener()).expect("somebody serves"));
        (readers.len() == 2).then_some(())
    });
    let mut open = Psql::open(writers);
    assert_eq!(lab.name_of(&open.ask("host(inet_server_addr())", "before")), "pg1");

    say(0, "reader");
    say(1, "writer");
    // For a moment both may be writers, or nobody.
    let ((), took) = within(TWO_REPORTS, "the promoted one gets all writers", || {
        (0..20).all(|_| server(writers).as_deref() == Some("pg2")).then_some(())
    });
    println!("promoted: 20 connections in a row {took:?} after its file changed");
    assert_eq!(open.ask("1 + 1", "after"), "2", "an open connection stays where it is");
    assert_eq!(lab.balancer.resources()["pg2"]["labels"]["role"], "writer");
    open.quit();
    lab.stop();
}

#[test]
fn an_administrator_says_what_a_resource_can_do_before_it_joins() {
    let mut config = BalancerConfig::default();
    let writers = config.add_listener("role=writer");
    let tls = config.add_listener("tls");
    let balancer = Balancer::start(config);
    let set = |arguments: &[&str]| balancer.ask(&[&["capabilities"], arguments].concat());

    let entered = set(&["late", "role=writer"]);
    let expected = serde_json::json!([{"id": "late", "labels": {"role": "writer"}, "joined": false}]);
    assert_eq!(entered["capabilities"], expected);
    assert_eq!(set(&[])["capabilities"], expected);

    let services = services(["late", "other"]);
    let own = ["--label", "tls", "--label", "role=reader"];
    let flags = |n: usize| if n == 1 { own.map(String::from).to_vec() } else { Vec::new() };
    let mut agents = agents(&balancer, &services, flags);
    assert_all_served_by(writers, 10, "late");
    assert_all_served_by(tls, 10, "other");
    assert_eq!(set(&[])["capabilities"][0]["joined"], true);

    // What a resource has by itself is taken away, and given back.
    set(&["other", "tls=false"]);
    until("nobody has tls", || is_reset(&ask(tls)).then_some(()));
    assert_eq!(balancer.resources()["other"]["labels"]["tls"], "false", "what is in force is shown");
    let explained = balancer.ask(&["explain", POOL, "--requires", "tls"]);
    assert_eq!(by_id(&explained["candidates"])["other"]["labels"]["tls"], "false");
    set(&["late", "tls"]);
    until("the other one got it", || ask(tls).ok());
    assert_all_served_by(tls, 10, "late");
    set(&["other", "--remove", "tls"]);
    until("both have tls", || (ask(tls).ok()? == "other").then_some(()));

    // It survives the resource.
    agents[0].signal(Signal::TERM);
    agents[0].wait(PATIENCE);
    until("no writer is left", || is_reset(&ask(writers)).then_some(()));
    agents[0] = balancer.agent("late", services[0].address(), &[]);
    until("the writer is back", || ask(writers).ok());
    assert_all_served_by(writers, 10, "late");
    let expected =
        serde_json::json!([{"id": "late", "labels": {"role": "writer", "tls": "true"}, "joined": true}]);
    assert_eq!(set(&[])["capabilities"], expected);
}

#[test]
fn a_requirement_that_nobody_meets_resets_and_says_who_lacks_what() {
    let mut config = BalancerConfig::default();
    let writers = config.add_listener("role=writer");
    let balancer = Balancer::start(config);
    let services = services(["a", "b"]);
    let label = ["--label", "role=reader"].map(String::from);
    let _agents = agents(&balancer, &services, |n| if n == 0 { label.to_vec() } else { Vec::new() });

    for _ in 0..3 {
        let answer = ask(writers);
        assert!(is_reset(&answer), "{answer:?}");
    }
    served(balancer.listener(), 3);
    let sheds = |listener: SocketAddr, reason: &str| {
        let listener = format!("tcp://{listener}");
        balancer.metrics().sum("trimtab_sheds_total", &[("listener", &listener), ("reason", reason)])
    };
    until("they are counted", || (sheds(writers, "requirement") == 3.0).then_some(()));
    assert_eq!(sheds(writers, "no_backend"), 0.0);
    assert_eq!(sheds(balancer.listener(), "requirement"), 0.0);

    let question = ["explain", POOL, "--requires", "role=writer"];
    let text = balancer.admin(&question);
    let reset = "the next connection would be reset: no ready resource of the pool meets the requirement";
    assert!(text.contains(reset), "{text}");
    let lacks = |id: &str| {
        text.lines().any(|line| line.starts_with(id) && line.ends_with("it does not meet role=writer"))
    };
    assert!(lacks("a ") && lacks("b "), "{text}");
    let explained = balancer.ask(&question);
    assert_eq!(
        (explained["next"].as_str(), &explained["requires"]),
        (Some(""), &"role=writer".split(' ').collect())
    );
    assert_eq!(by_id(&explained["candidates"])["a"]["labels"]["role"], "reader");
    let all = balancer.ask(&["explain", POOL]);
    assert!(all["candidates"].as_array().expect("a list").iter().all(|c| c["left_out"] == ""), "{all:#}");

    // Nobody listens for that.
    let control = format!("http://{}", balancer.control());
    let unknown = trimtab(&["explain", POOL, "--requires", "role=reader", "--control", &control]);
    assert_eq!(unknown.code, Some(1));
    assert!(unknown.stderr.contains("no listener of pool sql requires role=reader: "), "{}", unknown.stderr);

    balancer.admin(&["capabilities", "b", "role=writer"]);
    until("an administrator makes one a writer", || ask(writers).ok());
    assert_all_served_by(writers, 10, "b");
}

#[test]
fn versions_share_connections_at_random_or_by_client() {
    let lines = "[pool.split]\nversions = [\"1\", \"2=20%\"]\nabort_after = \"0s\"\n";
    let mut config = BalancerConfig { pool: lines.into(), ..Default::default() };
    let by_client = config.add_pool("sticky", &format!("{lines}by = \"client\"\n"));
    let balancer = Balancer::start(config);
    // 1.3 and 2.0.1 are on the sides of 1 and 2.
    let services = services(["v1a", "v1b", "v2"]);
    let versions = ["1", "1.3", "2.0.1"];
    let flags = |n: usize| vec!["--version-of-service".to_owned(), versions[n].to_owned()];
    let _agents = agents(&balancer, &services, flags);
    let sticky = |(service, version): (&Service, &str)| {
        let id = format!("sticky-{}", service.name());
        balancer.agent_of("sticky", &id, service.address(), &["--version-of-service", version])
    };
    let _sticky: Vec<_> = services.iter().zip(versions).map(sticky).collect();
    wait_until_ready(&balancer, 6);

    let by_name = served(balancer.listener(), 1_000);
    let of = |name: &str| by_name.get(name).copied().unwrap_or(0);
    assert_share("version 2 at random", of("v2"), 1_000, 0.2);
    assert!(of("v1a") > 100 && of("v1b") > 100, "both of version 1 serve: {by_name:?}");
    let resources = balancer.resources();
    let share = |id: &str| resources[id]["share"].as_f64().expect("a number");
    assert!((share("v2") - 0.2).abs() < 1e-3, "{resources:#?}");
    assert!((share("v1a") + share("v1b") - 0.8).abs() < 1e-3, "{resources:#?}");
    let metrics = balancer.metrics();
    let version = |name: &str, version: &str| metrics.sum(name, &[("pool", POOL), ("version", version)]);
    assert_eq!(version("trimtab_version_flows_opened_total", "2"), of("v2") as f64);
    assert!((version("trimtab_version_share_ratio", "2") - 0.2).abs() < 1e-6);

    let version_of = |n: u8| ask_from(client(n), by_client).expect("everybody is served").starts_with("v2");
    let first: Vec<bool> = (0..200).map(version_of).collect();
    assert_share("clients of version 2", first.iter().filter(|second| **second).count(), 200, 0.2);
    for round in 0..2 {
        assert_eq!((0..200).map(version_of).collect::<Vec<_>>(), first, "round {round}");
    }
    let answer = balancer.ask(&["versions", "sticky"]);
    assert_eq!(
        (answer["by"].as_str(), answer["versions"][1]["resources"].as_u64()),
        (Some("client"), Some(1))
    );
}

#[test]
fn a_bad_version_is_aborted_by_itself_and_given_another_chance() {
    let lines = "[pool.split]\nversions = [\"1\", \"2=20%\"]\nabort_after = \"3s\"\nabort_flows_min = 10\n";
    let mut config = BalancerConfig { pool: lines.into(), ..Default::default() };
    let later_listener = config.add_pool("later", lines);
    let balancer = Balancer::start(config);
    // One resets as soon as it has accepted, the other after it has answered.
    let good = Service::start("v1", Manners::Good);
    let at_once = Service::start("v2", Manners::ResetsAtOnce);
    let later = Service::start("v2", Manners::ResetsLater);
    let mut agents = Vec::new();
    for (pool, bad) in [(POOL, &at_once), ("later", &later)] {
        for (service, version) in [(&good, "1"), (bad, "2")] {
            let id = format!("{pool}-{}", service.name());
            // An agent that sees its check reset, which is up to chance, reports that it is not ready.
            let flags = ["--version-of-service", version, "--no-check"];
            agents.push(balancer.agent_of(pool, &id, service.address(), &flags));
        }
    }
    wait_until_ready(&balancer, 4);

    for (pool, listener, bad) in [(POOL, balancer.listener(), &at_once), ("later", later_listener, &later)] {
        let clients = Clients::start(listener, 4, Duration::from_millis(10));
        let version_2 = || balancer.ask(&["versions", pool])["versions"][1].clone();
        let why = |version: &Value| version["aborted"].as_str().expect("a text").to_owned();
        let labels = [("pool", pool), ("version", "2")];
        let metric = |name: &str| balancer.metrics().sum(name, &labels);
        // It is looked at each second, once there are connections enough to tell: some 5 s where nothing else runs.
        let ((), took) = within(PATIENCE, "version 2 is aborted", || {
            (metric("trimtab_version_aborted") == 1.0).then_some(())
        });
        let aborted = version_2();
        println!("{pool}: aborted {took:?} after the first connection: {}", why(&aborted));
        assert!(took > Duration::from_secs(3), "not before abort_after");
        assert!(why(&aborted).starts_with("resets "), "{aborted:#}");
        assert_eq!((&aborted["share"], aborted["baseline"].as_bool()), (&0.0.into(), Some(false)));
        let text = balancer.admin(&["versions", pool]);
        assert!(text.contains("2 was aborted: resets "), "{text}");

        // From a table or two later on nobody notices any more.
        let generation = || balancer.ask(&["explain", pool])["generation"].as_u64().expect("a number");
        let seen = generation();
        until("the tables are new", || (generation() >= seen + 2).then_some(()));
        let settled = Instant::now();
        let after =
            until("50 more connections", || Some(clients.since(settled)).filter(|asked| asked.len() >= 50));
        assert!(after.iter().all(|asked| asked.outcome.as_deref() == Ok("v1")), "{after:?}");
        assert_eq!(balancer.resources()[&format!("{pool}-v2")]["share"], 0.0);

        // It was mended.
        bad.behave(Manners::Good);
        let answer = balancer.ask(&["versions", pool, "--set", "2=20%"]);
        assert_eq!(answer["versions"][1]["aborted"], "");
        let set = Instant::now();
        until("version 2 serves 20 connections", || {
            let since = clients.since(set);
            (since.iter().filter(|asked| asked.outcome.as_deref() == Ok("v2")).count() >= 20).then_some(())
        });
        let version = version_2();
        assert_eq!((why(&version).as_str(), metric("trimtab_version_aborted")), ("", 0.0));
        assert!((version["share"].as_f64().expect("a number") - 0.2).abs() < 1e-6, "{version:#}");
    }
    assert_eq!(balancer.metrics().sum("trimtab_version_aborts_total", &[]), 2.0);
}

#[test]
fn balancers_know_how_many_they_are() {
    let mut balancers =
        [Balancer::start(BalancerConfig::default()), Balancer::start(BalancerConfig::default())];
    let services = services(["a", "b"]);
    let second = format!("http://{}", balancers[1].control());
    let flags = |_| vec!["--balancer".to_owned(), second.clone()];
    let mut agents = agents(&balancers[0], &services, flags);
    wait_until_ready(&balancers[1], 2);
    let count = |balancer: &Balancer| {
        let metric = balancer.metrics().sum("trimtab_pool_balancers", &[("pool", POOL)]);
        let explained = balancer.ask(&["explain", POOL]);
        (explained["balancers"] == metric).then_some(metric)
    };
    for balancer in &balancers {
        until("both are known", || (count(balancer)? == 2.0).then_some(()));
        let explained = balancer.ask(&["explain", POOL]);
        let of = |candidate: &Value| candidate["balancers"].as_u64().expect("a number");
        assert!(
            explained["candidates"].as_array().expect("a list").iter().all(|c| of(c) == 2),
            "{explained:#}"
        );
        served(balancer.listener(), 10);
    }

    balancers[0].process().signal(Signal::TERM);
    assert_eq!(balancers[0].process().wait(PATIENCE).0.code, Some(0));
    let left = &balancers[1];
    until("one is left", || (count(left)? == 1.0).then_some(()));
    served(left.listener(), 10);
    balancers[0].start_again();
    balancers[0].wait_until_ready();
    for balancer in &balancers {
        until("both are known again", || (count(balancer)? == 2.0).then_some(()));
    }
    for agent in &mut agents {
        agent.signal(Signal::TERM);
        let (ended, _) = agent.wait(PATIENCE);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
    for balancer in &balancers {
        until("they left both", || balancer.resources().is_empty().then_some(()));
    }
}

/// Every policy of the design, by its name in a configuration.
const POLICIES: [&str; 12] = [
    "adaptive",
    "least-connections",
    "p2c",
    "peak-ewma",
    "weighted-round-robin",
    "round-robin",
    "random",
    "first",
    "utilization",
    "maglev",
    "prequal",
    "criteria",
];

#[test]
fn every_policy_serves_and_outlives_its_resources() {
    let mut config = BalancerConfig::default();
    let listeners = POLICIES.map(|policy| {
        let criteria = if policy == "criteria" { "criteria = [\"least(memory)\"]\n" } else { "" };
        config.add_pool(policy, &format!("policy = \"{policy}\"\n{criteria}"))
    });
    let balancer = Balancer::start(config);
    let services = services(["1", "2", "3"]);
    let agent = |policy: &str, service: &Service| {
        let (id, probe) = (format!("{policy}-{}", service.name()), e2e::loopback().port());
        let probe = SocketAddr::new(service.address().ip(), probe).to_string();
        let further: &[&str] = if policy == "prequal" { &["--probe", &probe] } else { &[] };
        balancer.agent_of(policy, &id, service.address(), further)
    };
    let mut agents: Vec<Process> =
        POLICIES.iter().flat_map(|policy| services.iter().map(|service| agent(policy, service))).collect();
    wait_until_ready(&balancer, agents.len());

    let serve = |listener| move || (0..200).map(|n| ask_from(client(n), listener)).collect::<Vec<_>>();
    let answers: Vec<Vec<_>> = std::thread::scope(|threads| {
        let asking = listeners.map(|listener| threads.spawn(serve(listener)));
        asking.into_iter().map(|asking| asking.join().expect("clients do not panic")).collect()
    });
    let by_measure = |policy: &str| matches!(policy, "peak-ewma" | "prequal" | "criteria");
    let metrics = balancer.metrics();
    for (policy, answers) in POLICIES.iter().zip(&answers) {
        let mut by_name: BTreeMap<&str, u64> = BTreeMap::new();
        for (n, answer) in answers.iter().enumerate() {
            let name = answer.as_ref().unwrap_or_else(|error| panic!("{policy}, connection {n}: {error}"));
            *by_name.entry(name).or_default() += 1;
        }
        println!("{policy}: {by_name:?}");
        for service in &services {
            let asked = by_name.get(service.name()).copied().unwrap_or(0);
            assert_eq!(metrics.opened(&format!("{policy}-{}", service.name())), asked, "{policy}");
            // A third is 67; where one is measured to be slower or busier it may get none for a while.
            let least = match *policy {
                "first" => u64::from(service.name() == "1") * 200,
                policy if by_measure(policy) => 0,
                _ => 20,
            };
            assert!(asked >= least, "{policy} gave {} {asked} of 200", service.name());
        }
    }
    // Not prequal: of an idle pool it takes the one whose host answers fastest, and may well do so for ever.
    for (policy, listener) in
        POLICIES.iter().zip(listeners).filter(|(policy, _)| matches!(**policy, "peak-ewma" | "criteria"))
    {
        let mut left: Vec<&str> = services.iter().map(Service::name).collect();
        until(&format!("{policy} gives to everybody in the end"), || {
            let served = ask(listener).expect("somebody serves");
            left.retain(|name| *name != served);
            left.is_empty().then_some(())
        });
    }

    // With nobody left it goes on, and says so to each client.
    for agent in &mut agents {
        agent.signal(Signal::TERM);
    }
    until("all have left", || balancer.resources().is_empty().then_some(()));
    for (policy, listener) in POLICIES.iter().zip(listeners) {
        until(&format!("{policy} has nobody"), || is_reset(&ask(listener)).then_some(()));
    }
    let _again = agent("p2c", &services[0]);
    until("a resource comes back", || ask(listeners[2]).ok());
}

#[test]
fn pools_that_are_used_in_turn_each_take_their_own_turns() {
    // Clients that open a pair of connections each time, as of FTP or of a reader and a writer; one worker for both.
    for policy in ["round-robin", "weighted-round-robin", "criteria"] {
        let criteria =
            if policy == "criteria" { "criteria = [\"least(memory, tolerance 100%)\"]\n" } else { "" };
        let lines = format!("policy = \"{policy}\"\n{criteria}slow_start = \"0s\"\n");
        let mut config =
            BalancerConfig { dataplane: "workers = 1".into(), pool: lines.clone(), ..Default::default() };
        let other = config.add_pool("other", &lines);
        let balancer = Balancer::start(config);
        let services = services(["a", "b"]);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let flags = |n: usize| as_busy(0.1, folder.path(), services[n].name()).to_vec();
        let _agents = agents(&balancer, &services, flags);
        let joins = |(n, service): (usize, &Service)| {
            let flags = flags(n);
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            balancer.agent_of("other", &format!("other-{}", service.name()), service.address(), &flags)
        };
        let _others: Vec<_> = services.iter().enumerate().map(joins).collect();
        wait_until_ready(&balancer, 4);
        let mut by_pool = [BTreeMap::new(), BTreeMap::new()];
        for _ in 0..40 {
            for (by_name, listener) in by_pool.iter_mut().zip([balancer.listener(), other]) {
                *by_name.entry(ask(listener).expect("somebody serves")).or_insert(0) += 1;
            }
        }
        println!("{policy}: {by_pool:?}");
        assert!(by_pool.iter().all(|by_name| by_name.values().all(|n| (15..=25).contains(n))), "{by_pool:?}");
    }
}

#[test]
fn an_empty_pool_is_not_looked_at_by_what_was_drawn_before() {
    // One worker selects for all of them, and keeps what it drew last.
    let mut config = BalancerConfig {
        dataplane: "workers = 1".into(),
        pool: "policy = \"p2c\"".into(),
        ..Default::default()
    };
    let empty = config.add_pool("empty", "policy = \"p2c\"");
    let balancer = Balancer::start(config);
    let services = services(["a", "b", "c"]);
    let mut agents = agents(&balancer, &services, |_| Vec::new());
    served(balancer.listener(), 10);
    assert!(is_reset(&ask(empty)));
    served(balancer.listener(), 10);
    for agent in &mut agents {
        agent.signal(Signal::TERM);
    }
    until("all have left", || balancer.resources().is_empty().then_some(()));
    until("nobody serves", || is_reset(&ask(balancer.listener())).then_some(()));
    let last = balancer.ask(&["explain", POOL, "--last", "1"])["last"][0].clone();
    assert_eq!(last["no_backend"], "no resource of the pool is ready", "{last:#}");
    assert_eq!(last["looks"], serde_json::json!([]));
    agents[0] = balancer.agent("a", services[0].address(), &[]);
    until("one comes back", || ask(balancer.listener()).ok());
}

#[test]
fn maglev_keeps_a_client_on_its_resource_across_a_restart() {
    // Bounded load moves a client whose last connection is not quite over.
    let lines = "policy = \"maglev\"\nbounded_load = 0\nslow_start = \"0s\"\n";
    let mut balancer = Balancer::start(BalancerConfig { pool: lines.into(), ..Default::default() });
    let services = services(["a", "b", "c"]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("idle");
    write_whole(&file, r#"{"application": 0.01}"#);
    let file = file.to_str().expect("a plain path").to_owned();
    let _agents = agents(&balancer, &services, |_| vec!["--utilization-file".into(), file.clone()]);
    let listener = balancer.listener();
    let all = || (0..60).map(|n| ask_from(client(n), listener).expect("somebody serves")).collect::<Vec<_>>();

    let before = all();
    let used: BTreeSet<&String> = before.iter().collect();
    assert_eq!(used.len(), 3, "60 clients are on all three: {before:?}");
    assert_eq!(all(), before);
    for n in 0..5 {
        let explained = balancer.ask(&["explain", POOL, "--client", &client(n).to_string()]);
        assert_eq!(explained["next"], before[usize::from(n)].as_str(), "client {n}");
    }
    balancer.process().kill();
    balancer.start_again();
    balancer.wait_until_ready();
    wait_until_ready(&balancer, 3);
    assert_eq!(all(), before, "after a restart");
}

#[test]
fn criteria_avoid_who_is_short_of_memory() {
    let lines = "policy = \"criteria\"\ncriteria = [\"least(memory)\"]\n";
    let balancer = Balancer::start(BalancerConfig { pool: lines.into(), ..Default::default() });
    let services = services(["full", "b", "c"]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let memory = [0.9, 0.2, 0.2];
    let flags = |n: usize| {
        let file = folder.path().join(services[n].name());
        write_whole(&file, &format!(r#"{{"memory": {}, "application": 0.1}}"#, memory[n]));
        vec!["--utilization-file".into(), file.to_str().expect("a plain path").to_owned()]
    };
    let _agents = agents(&balancer, &services, flags);
    let explained = until("all have reported", || {
        let explained = balancer.ask(&["explain", POOL]);
        let all = explained["candidates"].as_array()?.iter().all(|c| c["scores"][0]["value"].is_number());
        all.then_some(explained)
    });
    let candidates = by_id(&explained["candidates"]);
    let score = &candidates["full"]["scores"][0];
    assert_eq!(score["criterion"], "least(memory)");
    assert!((score["value"].as_f64().expect("a number") - 0.9).abs() < 1e-6, "{score:#}");
    let by_name = served(balancer.listener(), 300);
    println!("{by_name:?}");
    assert!(by_name.get("full").copied().unwrap_or(0) <= 15, "{by_name:?}");
    assert!(by_name["b"] > 75 && by_name["c"] > 75, "{by_name:?}");
}

/// Agents that answer probes with so many requests in flight.
fn probed(
    balancer: &Balancer,
    services: &[Service],
    in_flight: &[u32],
    versions: &[&str],
) -> (Vec<Process>, TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let flags = |n: usize| {
        let file = folder.path().join(services[n].name());
        let text = format!(r#"{{"in_flight": {}, "latency_ms": 1, "application": 0.1}}"#, in_flight[n]);
        write_whole(&file, &text);
        let probe = SocketAddr::new(services[n].address().ip(), e2e::loopback().port());
        let file = file.to_str().expect("a plain path").to_owned();
        let version = ["--version-of-service".into(), versions[n].to_owned()];
        [&["--utilization-file".into(), file, "--probe".into(), probe.to_string()], &version[..]].concat()
    };
    let agents = agents(balancer, services, flags);
    until("probes are answered", || {
        served(balancer.listener(), 10);
        (probes(balancer, "answered") >= 50.0).then_some(())
    });
    (agents, folder)
}

fn probes(balancer: &Balancer, result: &str) -> f64 {
    balancer.metrics().sum("trimtab_probes_total", &[("result", result)])
}

#[test]
fn prequal_avoids_who_has_much_in_flight() {
    let pool = "policy = \"prequal\"".to_owned();
    // Stands before the pool that probes, so that the two places of that one differ.
    let dataplane = "[[pool]]\nname = \"unprobed\"".to_owned();
    let balancer = Balancer::start(BalancerConfig { pool, dataplane, ..Default::default() });
    let services = services(["hot", "b", "c"]);
    let _agents = probed(&balancer, &services, &[500, 1, 1], &["", "", ""]);
    let before = probes(&balancer, "answered");
    let by_name = served(balancer.listener(), 300);
    println!(
        "{by_name:?}; {} of {} probes were answered",
        probes(&balancer, "answered"),
        probes(&balancer, "sent")
    );
    assert!(by_name.get("hot").copied().unwrap_or(0) <= 30, "{by_name:?}");
    assert!(probes(&balancer, "answered") > before);
}

#[test]
fn prequal_avoids_them_on_both_sides_of_a_split() {
    let pool =
        "policy = \"prequal\"\n[pool.split]\nversions = [\"1\", \"2=50%\"]\nabort_after = \"0s\"\n".into();
    let balancer = Balancer::start(BalancerConfig { pool, ..Default::default() });
    let services = services(["hot-1", "1", "hot-2", "2"]);
    let _agents = probed(&balancer, &services, &[500, 1, 500, 1], &["1", "1", "2", "2"]);
    let by_name = served(balancer.listener(), 400);
    println!("{by_name:?}");
    let of = |name: &str| by_name.get(name).copied().unwrap_or(0);
    assert!(of("hot-1") + of("hot-2") <= 40, "{by_name:?}");
    assert_share("side 2", of("hot-2") + of("2"), 400, 0.5);
}

#[test]
fn selections_are_explained_and_logged() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let log = folder.path().join("decisions.jsonl");
    let mut config = BalancerConfig::default();
    let writers = config.add_listener("role=writer");
    config.further += &format!("[decisions]\nlog = \"{}\"\nsample = 1.0\n", log.display());
    let balancer = Balancer::start(config);
    let services = services(["a", "b", "c"]);
    let _agents = agents(&balancer, &services, |_| Vec::new());

    // Moments are told apart by the millisecond.
    let mut streams = Vec::new();
    let mut chosen = Vec::new();
    for _ in 0..8 {
        let before = Instant::now();
        let stream = connect(balancer.listener()).expect("it accepts");
        chosen.push(greet(&stream).expect("somebody serves"));
        streams.push(stream);
        until("the millisecond is over", || (before.elapsed() > Duration::from_millis(3)).then_some(()));
    }
    let explained = balancer.ask(&["explain", POOL, "--client", "127.0.0.2", "--last", "5"]);
    let names: Vec<&str> = services.iter().map(Service::name).collect();
    assert!(names.contains(&explained["next"].as_str().expect("a text")), "{explained:#}");
    let guards: Vec<_> =
        explained["guards"].as_array().expect("a list").iter().map(|guard| guard["name"].clone()).collect();
    let expected =
        ["stale_reports", "fleet_saturated", "ejections_ignored", "sinkhole", "slow_start", "share_growth"];
    assert_eq!(guards, expected);
    let last = explained["last"].as_array().expect("a list");
    let made: Vec<_> = last.iter().map(|decision| decision["chosen"].as_str().expect("a text")).collect();
    let newest: Vec<_> = chosen.iter().rev().take(5).map(String::as_str).collect();
    assert_eq!(made, newest, "newest first, and those that got the connections");
    for decision in last {
        assert_eq!(decision["listener"], format!("tcp://{}", balancer.listener()));
        assert_eq!(decision["eligible"], 3);
        let looks = by_id(&decision["looks"]);
        assert_eq!(looks.keys().map(String::as_str).collect::<Vec<_>>(), names, "{decision:#}");
        let cost = |look: &Value| look["cost"].as_f64().expect("a number");
        assert!(looks.values().all(|look| cost(look) > 0.0), "{decision:#}");
    }
    // All of the eight are open.
    let open: u64 = by_id(&last[0]["looks"]).values().map(|look| look["flows_open"].as_u64().unwrap()).sum();
    assert_eq!(open, 7, "as it was before the newest: {:#}", last[0]);

    for _ in 0..92 {
        chosen.push(ask(balancer.listener()).expect("somebody serves"));
    }
    assert!(is_reset(&ask(writers)));
    let log_metric =
        |result| balancer.metrics().sum("trimtab_decisions_logged_total", &[("result", result)]) as usize;
    let lines: Vec<Value> = until("there is a line for each connection", || {
        // What is just being written may be there in part.
        let text = fs::read_to_string(&log).ok().filter(|text| text.ends_with('\n'))?;
        let lines = text.lines().map(|line| serde_json::from_str(line).expect("each line is JSON"));
        let lines: Vec<Value> = lines.collect();
        // A worker does not wait for the log: that it was just being fetched is counted.
        (lines.len() + log_metric("lost") >= 101).then_some(lines)
    });
    until("the lines are counted", || (log_metric("written") == lines.len()).then_some(()));
    let lost = 101 - lines.len();
    assert!(lost <= 2 && log_metric("lost") == lost, "{lost} lines are lost");
    let tally = |names: &mut dyn Iterator<Item = &str>| {
        let mut by_name: BTreeMap<String, usize> = BTreeMap::new();
        names.for_each(|name| *by_name.entry(name.to_owned()).or_default() += 1);
        by_name
    };
    let logged =
        lines.iter().map(|line| line["chosen"].as_str().expect("a text")).filter(|id| !id.is_empty());
    let (logged, made) = (tally(&mut { logged }), tally(&mut chosen.iter().map(String::as_str)));
    assert!(lost > 0 || logged == made, "{logged:?} are not {made:?}");
    let refused: Vec<_> = lines.iter().filter(|line| line["chosen"] == "").collect();
    assert!(lost > 0 || refused.len() == 1, "{refused:?}");
    for line in refused {
        assert_eq!(line["no_backend"], "no ready resource of the pool meets the requirement");
        assert_eq!(line["left_out"].as_array().map(Vec::len), Some(3), "{line:#}");
    }
    let times: Vec<f64> = lines.iter().map(|line| line["time"].as_f64().expect("seconds")).collect();
    assert!(times.is_sorted_by(|a, b| *a <= *b + 0.01), "{times:?}");
    for line in &lines {
        assert_eq!((line["pool"].as_str(), line["policy"].as_str()), (Some(POOL), Some("adaptive")));
    }
}

#[test]
fn who_accepts_and_resets_does_not_draw_everything() {
    let balancer = Balancer::start(BalancerConfig::default());
    let services = services(["sink", "b", "c"]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    // Its agent may notice by itself: here it does not.
    let flags =
        |n: usize| [&["--no-check".into()], &as_busy(0.1, folder.path(), services[n].name())[..]].concat();
    let _agents = agents(&balancer, &services, flags);
    served(balancer.listener(), 30);
    assert_eq!(guard_holds(&balancer, "sinkhole"), Some(false));

    services[0].behave(Manners::ResetsAtOnce);
    let began = Instant::now();
    let clients = Clients::start(balancer.listener(), 2, Duration::from_millis(5));
    let ((), took) = within(Duration::from_secs(10), "resets are noticed", || {
        (guard_holds(&balancer, "sinkhole")?).then_some(())
    });
    // Five in a row are left alone for a second; then one connection at a time tries again, each time after a pause
    // twice as long.
    until("it is left alone", || {
        let explained = balancer.ask(&["explain", POOL]);
        let candidates = by_id(&explained["candidates"]);
        let why = candidates["sink"]["left_out"].as_str().expect("a text");
        why.contains("reset flows").then_some(())
    });
    println!("the guard held {took:?} after it began, and it was left alone after {:?}", began.elapsed());
    let settled = Instant::now();
    let asked =
        until("200 more connections", || Some(clients.since(settled)).filter(|asked| asked.len() >= 200));
    let failed = asked.iter().filter(|asked| asked.outcome.is_err()).count();
    println!("{failed} of {} connections failed", asked.len());
    assert!(failed * 50 <= asked.len(), "{failed} of {} failed", asked.len());
    assert_eq!(guard_holds(&balancer, "sinkhole"), Some(true), "it has not answered since");

    // It comes back by itself.
    services[0].behave(Manners::Good);
    until("it answers again", || {
        clients.since(settled).iter().any(|asked| asked.outcome.as_deref() == Ok("sink")).then_some(())
    });
    until("the guard is over", || (!guard_holds(&balancer, "sinkhole")?).then_some(()));
}

#[test]
fn a_saturated_pool_is_held_and_does_not_pour_into_a_sinkhole() {
    let balancer = Balancer::start(BalancerConfig::default());
    let services = services(["resets", "b", "c"]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let flags =
        |n: usize| [&["--no-check".into()], &as_busy(0.97, folder.path(), services[n].name())[..]].concat();
    let _agents = agents(&balancer, &services, flags);
    until("all are saturated", || (guard_holds(&balancer, "fleet_saturated")?).then_some(()));
    services[0].behave(Manners::ResetsAtOnce);
    let failed = (0..200).filter(|_| ask(balancer.listener()).is_err()).count();
    println!("{failed} of 200 connections failed");
    // Five in a row eject it, whatever its load; time-outs would not.
    assert!((5..40).contains(&failed), "{failed} of 200 failed");
    assert_eq!(guard_holds(&balancer, "sinkhole"), Some(true));
    assert_eq!(guard_holds(&balancer, "ejections_ignored"), Some(false), "one of three is not most");
}
