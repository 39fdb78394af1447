//! Datagrams through the binary: real resolvers and their clients, and a flood that fills the path.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
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

/// A command that ends when the thread that starts it does.
fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]).args(arguments);
    command
}

/// What `dig +short` from this address says; empty: a refusal, or nothing.
fn dig_from(client: &str, at: SocketAddr) -> String {
    let (server, port) = (format!("@{}", at.ip()), at.port().to_string());
    let arguments = ["-b", client, &server, "-p", &port, "+short", "+time=2", "+tries=1", "www.example.test"];
    let output = command("dig", &arguments).output();
    let output = output.unwrap_or_else(|error| panic!("dig: {error}; run `cargo xtask install`"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| !line.starts_with(';')).collect()
}

/// Unbound, which takes nothing without a PROXY header, and answers this client and whoever is on the host itself.
fn unbound(folder: &Path, at: SocketAddr, client: &str) -> Process {
    let (ip, port, folder) = (at.ip(), at.port(), folder.display());
    let file = format!("{folder}/unbound.conf");
    let config = format!(
        "server:\n  interface: {ip}@{port}\n  proxy-protocol-port: {port}\n  access-control: 127.0.0.0/8 refuse\n  \
         access-control: 127.0.0.1/32 allow\n  access-control: {client}/32 allow\n  local-zone: \"example.test.\" static\n  \
         local-data: \"www.example.test. A 192.0.2.7\"\n  username: \"\"\n  chroot: \"\"\n  pidfile: \"\"\n  \
         directory: \"{folder}\"\n  use-syslog: no\n  num-threads: 1\n  do-daemonize: no\n  module-config: \"iterator\"\n\
         remote-control:\n  control-enable: no\n"
    );
    std::fs::write(&file, config).expect("our own folder");
    Process::start("unbound", &mut command("/usr/sbin/unbound", &["-d", "-c", &file]))
}

/// dnsdist before us, which asks us with PROXY headers.
fn dnsdist(folder: &Path, at: SocketAddr, us: SocketAddr) -> Process {
    let file = folder.join("dnsdist.conf");
    let config = format!(
        "setLocal(\"{at}\")\nsetACL({{\"127.0.0.0/8\"}})\nsetSecurityPollSuffix(\"\")\n\
         newServer({{address=\"{us}\", useProxyProtocol=true, checkName=\"www.example.test.\", checkInterval=1}})\n"
    );
    std::fs::write(&file, config).expect("our own folder");
    let file = file.to_str().expect("a plain path");
    Process::start("dnsdist", &mut command("dnsdist", &["--supervised", "--disable-syslog", "-C", file]))
}

#[test]
fn dnsdist_says_who_the_client_is_and_unbound_is_told() {
    const CLIENT: &str = "127.0.0.5";
    const OTHER: &str = "127.0.0.6";
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [direct, behind, front, resolver] = std::array::from_fn(|_| e2e::loopback());
    let _unbound = unbound(folder.path(), resolver, CLIENT);
    // Its check is let through as well: with a header that says that it is our own.
    let further = format!(
        "[[pool]]\nname = \"dns\"\nproxy_protocol = \"v2\"\n[pool.check]\nkind = \"dns\"\nname = \"www.example.test\"\n\
         [[listener]]\nbind = \"udp://{direct}\"\npool = \"dns\"\n[listener.udp]\nresponses = 1\n\
         [[listener]]\nbind = \"udp://{behind}\"\npool = \"dns\"\nproxy_protocol = \"v2\"\ntrusted = [\"127.0.0.1\"]\n\
         [listener.udp]\nresponses = 1\n"
    );
    let balancer = Balancer::start(BalancerConfig { further, ..BalancerConfig::default() });
    let _agent = balancer.agent_of("dns", "resolver", resolver, &["--no-check"]);
    until("the resource is ready", || (balancer.ready_resources() == 1).then_some(()));
    assert_eq!(dig_from(CLIENT, direct), "192.0.2.7");
    assert_eq!(dig_from(OTHER, direct), "", "Unbound sees who asks, and not us");

    let _dnsdist = dnsdist(folder.path(), front, behind);
    // It asks us first whether we live, with a header that says that it asks for itself.
    until("dnsdist serves", || (dig_from(CLIENT, front) == "192.0.2.7").then_some(()));
    assert_eq!(dig_from(OTHER, front), "", "through both");
    // Whoever comes past dnsdist is not heard.
    let past = |from: &str| {
        let socket = UdpSocket::bind((from, 0)).expect("a free port");
        socket.send_to(b"a question", behind).expect("room");
    };
    past(CLIENT);
    let dropped = |reason| {
        let labels = [("listener", format!("udp://{behind}")), ("reason", String::from(reason))];
        let labels = labels.each_ref().map(|(name, value)| (*name, value.as_str()));
        balancer.metrics().sum("trimtab_udp_dropped_total", &labels)
    };
    until("it is counted", || (dropped("proxy_untrusted") == 1.0).then_some(()));
    past("127.0.0.1");
    until("it is counted", || (dropped("proxy_missing") == 1.0).then_some(()));
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
