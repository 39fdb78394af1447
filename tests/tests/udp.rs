//! Datagrams through the binary: real resolvers and their clients, and a flood that fills the path.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use e2e::{
    Balancer, BalancerConfig, DnsKind, DnsServer, PATIENCE, POOL, Process, ZONE, dig, trimtab_command, until,
};
use rustix::process::Signal;

/// A listener of datagrams at the address of the one of connections.
fn with_datagrams(lines: &str) -> BalancerConfig {
    let mut config = BalancerConfig::default();
    config.further = format!(
        "[[listener]]\nbind = \"udp://{}\"\npool = \"{POOL}\"\n[listener.udp]\n{lines}\n",
        config.listener
    );
    config
}

/// What dnsperf counted: queries sent, answered, lost.
fn dnsperf(at: SocketAddr, seconds: &str) -> [u64; 3] {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let queries = folder.path().join("queries");
    std::fs::write(&queries, format!("ns1.{ZONE} A\ntaken.{ZONE} A\n{ZONE} SOA\n")).expect("our own folder");
    let output = Command::new("dnsperf")
        .args([
            "-s",
            &at.ip().to_string(),
            "-p",
            &at.port().to_string(),
            "-c",
            "40",
            "-q",
            "200",
            "-l",
            seconds,
        ])
        .arg("-d")
        .arg(&queries)
        .output()
        .unwrap_or_else(|error| panic!("dnsperf: {error}; run `cargo xtask install`"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |label: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(label));
        let number = line.and_then(|line| line.split_once(':')?.1.split_whitespace().next()?.parse().ok());
        number
            .unwrap_or_else(|| panic!("no {label:?} in {text}\n{}", String::from_utf8_lossy(&output.stderr)))
    };
    [count("Queries sent"), count("Queries completed"), count("Queries lost")]
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

#[test]
fn iperf3_goes_through_both_ways() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    let mut server = Command::new("setpriv");
    server.args([
        "--pdeathsig",
        "KILL",
        "--",
        "iperf3",
        "-s",
        "-B",
        "127.0.0.1",
        "-p",
        &port.port().to_string(),
    ]);
    let mut server = Process::start("iperf3", server.arg("--forceflush"));
    server.wait_for_line(PATIENCE, |line| line.contains("Server listening").then_some(()));
    // Its control connection and its datagrams share a port.
    let listen =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    let [tcp, udp] = ["tcp", "udp"].map(|scheme| format!("{scheme}://{listen}"));
    let to = port.to_string();
    let mut command = trimtab_command(&[
        "proxy",
        "--workers",
        "1",
        "--drain-timeout",
        "1s",
        "--listen",
        &tcp,
        "--listen",
        &udp,
        "--to",
        &to,
    ]);
    let mut proxy = Process::start("proxy", &mut command);
    proxy.wait_for_line(PATIENCE, |line| (line == "ready").then_some(()));
    for direction in [&[][..], &["-R"]] {
        let output = Command::new("iperf3")
            .args([
                "-c",
                "127.0.0.1",
                "-p",
                &listen.port().to_string(),
                "-u",
                "-b",
                "50M",
                "-t",
                "2",
                "-l",
                "1200",
                "-J",
            ])
            .args(direction)
            .output()
            .unwrap_or_else(|error| panic!("iperf3: {error}; run `cargo xtask install`"));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let sum = &report["end"]["sum"];
        let (packets, lost) =
            (sum["packets"].as_u64().unwrap_or(0), sum["lost_packets"].as_i64().unwrap_or(-1));
        println!("iperf3 {direction:?}: {packets} datagrams, {lost} lost");
        assert!(packets > 2_000 && (0..=(packets / 20) as i64).contains(&lost), "{report}");
    }
    proxy.signal(Signal::TERM);
    let (ended, _) = proxy.wait(Duration::from_secs(40));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}
