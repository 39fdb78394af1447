//! From nothing: a balancer that knows its zone and key, agents that know the domain, and clients that follow SRV.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use e2e::{
    Balancer, BalancerConfig, DnsKind, DnsServer, Manners, PATIENCE, POOL, Process, Service, SrvClients,
    ZONE, trimtab_command, until, within,
};
use rustix::process::Signal;

const SERVICE: &str = "_sql._tcp.example.test";
/// The TTL of what balancers publish here.
const TTL: Duration = Duration::from_secs(2);

/// Publishes itself as `name`, and its listener as a service.
fn balancer(server: &DnsServer, name: &str, further: &str) -> Balancer {
    let mut config = BalancerConfig::default();
    let listener = config.listener;
    let lines = format!(
        "owner = \"{name}\"\n{further}\n[[dns.service]]\nname = \"_sql._tcp\"\nlistener = \"tcp://{listener}\""
    );
    config.further = server.section(name, &lines);
    Balancer::start(config)
}

/// It is told the domain, and no balancer.
fn agent(dns: SocketAddr, service: &Service) -> Process {
    let (address, dns) = (service.address().to_string(), dns.to_string());
    let mut arguments = vec!["agent", "--pool", POOL, "--id", service.name(), "--address", &address];
    arguments.extend(["--discover", ZONE, "--dns", &dns]);
    Process::start(&format!("agent {}", service.name()), &mut trimtab_command(&arguments))
}

fn services() -> Vec<Service> {
    ["red", "green", "blue"].map(|name| Service::start(name, Manners::Good)).into()
}

fn wait_for_resources(balancer: &Balancer, count: usize) -> Duration {
    let what = format!("{count} resources are registered");
    within(PATIENCE, &what, || (balancer.resources().len() == count).then_some(())).1
}

fn published(balancer: &Balancer) -> bool {
    balancer.metrics().sum("trimtab_dns_published", &[]) == 1.0
}

#[test]
fn from_nothing() {
    let server = DnsServer::start(DnsKind::Bind);
    let services = services();
    // Agents first: they wait for a balancer that nobody has heard of.
    let mut agents: Vec<Process> = services.iter().map(|service| agent(server.address(), service)).collect();
    agents[0].wait_for_error_line(PATIENCE, |line| line.contains("DNS knows no balancer").then_some(()));
    let mut one = balancer(&server, "lb1", "");
    let took = wait_for_resources(&one, 3);
    println!("three agents registered {took:?} after the balancer's start");

    let clients = SrvClients::start(server.address(), SERVICE, 2);
    let mut seen = Vec::new();
    until("each serves some", || {
        seen.extend(clients.take().served);
        services.iter().all(|service| seen.iter().any(|(name, _)| name == service.name())).then_some(())
    });

    let two = balancer(&server, "lb2", "");
    until("it is in DNS", || published(&two).then_some(()));
    let took = wait_for_resources(&two, 3);
    println!("three agents registered with the second {took:?} after it was in DNS; the TTL is {TTL:?}");
    assert!(took < TTL + Duration::from_secs(3), "{took:?}");
    assert_eq!(one.resources().len(), 3, "with the first, too");
    until("reports say that there are two", || {
        (one.ask(&["explain", POOL])["balancers"].as_f64() == Some(2.0)).then_some(())
    });
    until("clients use both", || {
        let served = clients.take().served;
        [&one, &two]
            .iter()
            .all(|balancer| served.iter().any(|(_, at)| *at == balancer.listener()))
            .then_some(())
    });

    // Nobody told the first who stands in for it: it sees that in DNS.
    let second = format!("http://{}", two.control());
    until("the first knows of the second", || {
        let made = one.ask(&["notify", "unavailable", "--at", "+1h", "--for", "1m"]);
        let notice = one.ask(&["notify", "list"])["notices"][0].clone();
        one.admin(&["notify", "withdraw", made["notice"].as_str()?]);
        (notice["alternatives"][0].as_str()? == second).then_some(())
    });

    one.process().signal(Signal::TERM);
    for agent in &mut agents {
        agent.wait_for_error_line(PATIENCE, |line| {
            (line.contains("BALANCER_LEAVING") && line.contains(&second)).then_some(())
        });
    }
    let (ended, took) = one.process().wait(PATIENCE);
    println!("the first ended {took:?} after its agents were warned");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(server.dig(SERVICE, "SRV").len(), 1, "it is withdrawn");
    assert_eq!(server.dig("_trimtab._tcp.example.test", "SRV").len(), 1);
    // Clients went on, through all of it and after.
    let mut seen = clients.take();
    let since = Instant::now();
    until("the second serves all", || {
        let more = clients.take();
        seen.failed.extend(more.failed);
        seen.served.extend(more.served);
        (since.elapsed() > TTL && seen.served.len() > 50).then_some(())
    });
    println!("{} connections while the first left, {} failed", seen.served.len(), seen.failed.len());
    assert_eq!(seen.failed, [""; 0]);
    assert_eq!(two.resources().len(), 3);
    until("reports say that there is one", || {
        (two.ask(&["explain", POOL])["balancers"].as_f64() == Some(1.0)).then_some(())
    });
    drop(clients);
    for agent in &mut agents {
        agent.signal(Signal::TERM);
        assert_eq!(agent.wait(PATIENCE).0.code, Some(0));
    }
    assert_eq!(two.resources().len(), 0);
}

#[test]
fn the_next_priority_takes_over_and_gives_back() {
    let server = DnsServer::start(DnsKind::Bind);
    let service = Service::start("red", Manners::Good);
    let mut first = balancer(&server, "lb1", "priority = 10");
    let second = balancer(&server, "lb2", "priority = 20");
    until("both are in DNS", || (published(&first) && published(&second)).then_some(()));
    let mut agent = agent(server.address(), &service);
    wait_for_resources(&first, 1);
    assert_eq!(second.resources().len(), 0, "the next priority is the alternative");

    // No farewell: its records stay in DNS.
    first.process().signal(Signal::KILL);
    first.process().wait(PATIENCE);
    let took = wait_for_resources(&second, 1);
    println!("registered with the next priority {took:?} after the first was killed");
    first.start_again();
    first.wait_until_ready();
    let took = wait_for_resources(&first, 1);
    println!("registered with the first again {took:?} after it was ready");
    let took = wait_for_resources(&second, 0);
    println!("left the next priority {took:?} later");
    agent.signal(Signal::TERM);
    assert_eq!(agent.wait(PATIENCE).0.code, Some(0));
    wait_for_resources(&first, 0);
}

#[test]
fn dns_that_is_away_or_empty_changes_nothing() {
    let mut server = DnsServer::start(DnsKind::Knot);
    let service = Service::start("red", Manners::Good);
    let balancer = balancer(&server, "lb1", "");
    let mut agent = agent(server.address(), &service);
    wait_for_resources(&balancer, 1);
    let incarnation = balancer.resources()["red"]["incarnation"].clone();

    server.stop();
    agent.wait_for_error_line(PATIENCE, |line| line.contains("what is known of them stays").then_some(()));
    assert_eq!(balancer.resources()["red"]["state"], "ready");
    // It comes back without the zone's records, and the balancer cannot put them there.
    server.lose_zone_and_key();
    server.start_again();
    agent.wait_for_error_line(PATIENCE, |line| line.contains("DNS knows no balancer").then_some(()));
    let since = Instant::now();
    until("some more empty answers", || (since.elapsed() > 2 * TTL).then_some(()));
    assert_eq!(server.dig(SERVICE, "SRV"), [""; 0]);
    assert_eq!(balancer.resources()["red"]["state"], "ready");
    assert_eq!(balancer.resources()["red"]["incarnation"], incarnation);
    let log = agent.stderr();
    assert_eq!(log.matches(" registered ").count(), 1, "one registration through all of it: {log}");
    assert!(!log.contains("deregistered"), "{log}");
}

#[test]
fn a_balancer_by_flag_and_by_dns_is_one() {
    let server = DnsServer::start(DnsKind::PowerDns);
    let service = Service::start("red", Manners::Good);
    let balancer = balancer(&server, "lb1", "");
    until("it is in DNS", || published(&balancer).then_some(()));
    let dns = server.address().to_string();
    let mut agent = balancer.agent("red", service.address(), &["--discover", ZONE, "--dns", &dns]);
    agent.wait_for_error_line(PATIENCE, |line| line.contains("balancers in DNS").then_some(()));
    wait_for_resources(&balancer, 1);
    assert_eq!(balancer.ask(&["explain", POOL])["balancers"].as_f64(), Some(1.0));
    agent.signal(Signal::TERM);
    let (ended, _) = agent.wait(PATIENCE);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches(" registered ").count(), 1, "{}", ended.stderr);
}
