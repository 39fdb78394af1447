//! Datagrams through the binary: real resolvers and their clients, and a flood that fills the path.

use std::net::UdpSocket;
use std::process::Command;
use std::thread;

use e2e::{Balancer, BalancerConfig, DnsKind, DnsServer, PATIENCE, POOL, Process, ZONE, dig, dnsperf, until};

/// A listener of datagrams at the address of the one of connections.
fn with_datagrams(lines: &str) -> BalancerConfig {
    let mut config = BalancerConfig::default();
    config.further = format!(
        "[[listener]]\nbind = \"udp://{}\"\npool = \"{POOL}\"\n[listener.udp]\n{lines}\n",
        config.listener
    );
    config
}

#[test]
fn resolvers_are_balanced_and_one_that_dies_is_missed_by_nobody() {
    let mut servers = [DnsServer::start(DnsKind::Bind), DnsServer::start(DnsKind::Bind)];
    let balancer = Balancer::start(with_datagrams("responses = 1\nidle_timeout = \"10s\""));
    let agents = ["ns-a", "ns-b"].map(String::from);
    let _agents: Vec<Process> =
        agents.iter().zip(&servers).map(|(id, server)| balancer.agent(id, server.address(), &[])).collect();
    until("both are ready", || (balancer.ready_resources() == 2).then_some(()));
    let at = balancer.listener();

    // One address, both protocols: what dig does over either.
    assert_eq!(dig(at, &format!("taken.{ZONE}"), "A"), ["192.0.2.7"]);
    let tcp = Command::new("dig")
        .args([
            &format!("@{}", at.ip()),
            "-p",
            &at.port().to_string(),
            "+tcp",
            "+short",
            &format!("ns1.{ZONE}"),
        ])
        .output()
        .expect("dig is installed");
    assert_eq!(String::from_utf8_lossy(&tcp.stdout).trim(), "127.0.0.1");

    // BIND's own socket may overflow where the machine is busy with something else.
    let [sent, completed, lost] = dnsperf(at, "3");
    println!("dnsperf: {sent} sent, {completed} answered, {lost} lost");
    assert!(completed > 1_000 && lost * 1_000 <= sent, "{sent} sent, {completed} answered, {lost} lost");
    let metrics = balancer.metrics();
    let udp = format!("udp://{at}");
    let datagrams = |direction| {
        metrics.sum("trimtab_udp_datagrams_total", &[("listener", &udp), ("direction", direction)]) as u64
    };
    assert!(datagrams("to_client") >= completed && datagrams("to_backend") >= sent);
    assert!(agents.iter().all(|id| metrics.opened(id) > 100), "both serve");
    until("flows are over with their answers", || {
        (balancer.metrics().sum("trimtab_flows_open", &[("listener", &udp)]) == 0.0).then_some(())
    });

    // Its port refuses: whoever is sent there is answered by the other one.
    servers[0].stop();
    let [sent, completed, lost] = dnsperf(at, "2");
    println!("with one of them dead: {sent} sent, {completed} answered, {lost} lost");
    assert!(completed > 500 && lost * 1_000 <= sent, "{sent} sent, {completed} answered, {lost} lost");
}

#[test]
fn a_service_without_connections_registers_and_is_served() {
    let service = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let address = service.local_addr().expect("it is bound");
    thread::spawn(move || {
        let mut datagram = [0; 2_000];
        while let Ok((length, from)) = service.recv_from(&mut datagram) {
            let _ = service.send_to(&datagram[..length], from);
        }
    });
    let balancer = Balancer::start(with_datagrams(""));
    // Nothing accepts connections there, so nothing can be asked whether it lives.
    let _agent = balancer.agent("echo", address, &["--no-check"]);
    until("it is ready", || (balancer.ready_resources() == 1).then_some(()));
    let client = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    client.connect(balancer.listener()).expect("a route");
    client.set_read_timeout(Some(PATIENCE)).expect("a time");
    for length in [0, 1, 1_400] {
        client.send(&vec![7; length]).expect("room");
        assert_eq!(client.recv(&mut [0; 2_000]).expect("an answer"), length);
    }
    let explained = balancer.admin(&["explain", POOL]);
    assert!(explained.contains("echo"), "{explained}");
}
