//! What an agent serves to others, and what it takes from its service: a real HAProxy and a real Envoy weigh by our numbers; a
//! real exporter, a command and an ORCA server that is none of ours are where they come from.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e::{
    Balancer, BalancerConfig, Exporter, Manners, PATIENCE, Postgres, Process, PythonOrca, Service, SqlClient,
    Text, ask, connect, get, until, wheel, write_utilization, write_whole,
};
use rustix::process::Signal;
use tempfile::TempDir;

/// Starts a server that ends when the thread that starts it does.
#[track_caller]
fn server(name: &str, program: &Path, arguments: &[&str]) -> Process {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(arguments);
    Process::start(name, &mut command)
}

/// A value of a resource by its path in `trimtab resources -o json`.
fn number(balancer: &Balancer, id: &str, path: &str) -> f64 {
    let resources = balancer.resources();
    resources.get(id).and_then(|resource| resource.pointer(path)?.as_f64()).unwrap_or(f64::NAN)
}

/// One answer of an agent-check.
fn line_of(address: SocketAddr) -> Option<String> {
    let mut line = String::new();
    connect(address).ok()?.read_to_string(&mut line).ok()?;
    Some(line)
}

/// What HAProxy says of a server: operational state, administrative state and current weight.
fn haproxy_server(socket: &Path, name: &str) -> Option<(u32, u32, u32)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.write_all(b"show servers state pool\n").ok()?;
    let mut state = String::new();
    stream.read_to_string(&mut state).ok()?;
    // be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight …
    let line = state.lines().find(|line| line.split(' ').nth(3) == Some(name))?;
    let field = |n: usize| line.split(' ').nth(n)?.parse().ok();
    Some((field(5)?, field(6)?, field(7)?))
}

#[test]
fn haproxy_weighs_by_what_agents_answer() {
    let folder = TempDir::new().expect("a temporary folder");
    let balancer = Balancer::start(BalancerConfig::default());
    let names = ["cool", "hot"];
    let mut services: Vec<Service> = names.iter().map(|name| Service::start(name, Manners::Good)).collect();
    let files = names.map(|name| folder.path().join(name));
    let checks = names.map(|_| e2e::loopback());
    write_utilization(&files[0], 0.2);
    write_utilization(&files[1], 0.9);
    let agents: Vec<Process> = (0..2)
        .map(|n| {
            let (check, file) = (checks[n].to_string(), files[n].to_str().expect("a plain path"));
            let flags =
                ["--serve-agent-check", &check, "--utilization-file", file, "--report-interval", "100ms"];
            balancer.agent(names[n], services[n].address(), &flags)
        })
        .collect();
    for (check, line) in checks.iter().zip(["up ready 80%\n", "up ready 10%\n"]) {
        until(line, || (line_of(*check).as_deref() == Some(line)).then_some(()));
    }

    let (listener, socket) = (e2e::loopback(), folder.path().join("haproxy.sock"));
    let mut config = format!(
        "global\n  stats socket {} mode 600 level admin\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client \
         30s\n  timeout server 30s\nlisten pool\n  bind {listener}\n  balance roundrobin\n",
        socket.display()
    );
    for (n, service) in services.iter().enumerate() {
        let (address, check) = (service.address(), checks[n]);
        config += &format!(
            "  server {} {address} weight 100 check inter 1s agent-check agent-addr {} agent-port {} agent-inter 100ms\n",
            names[n],
            check.ip(),
            check.port()
        );
    }
    let file = folder.path().join("haproxy.cfg");
    write_whole(&file, &config);
    let file = file.to_str().expect("a plain path");
    let _haproxy = server("haproxy", Path::new("/usr/sbin/haproxy"), &["-db", "-f", file]);
    let weight = |name: &str, wanted: u32| {
        until(&format!("HAProxy gives {name} a weight of {wanted}"), || {
            haproxy_server(&socket, name).filter(|(_, _, weight)| *weight == wanted)
        })
    };
    weight("cool", 80);
    weight("hot", 10);

    let served = || {
        let mut served: HashMap<String, usize> = HashMap::new();
        (0..90).for_each(|_| *served.entry(ask(listener).expect("it is served")).or_default() += 1);
        names.map(|name| served.get(name).copied().unwrap_or_default())
    };
    let [cool, hot] = served();
    println!("of 90 connections through HAProxy: {cool} to the cool one, {hot} to the hot one");
    assert!(cool >= 4 * hot && hot > 0, "{cool} and {hot}");

    // The other way round.
    write_utilization(&files[0], 0.95);
    write_utilization(&files[1], 0.05);
    weight("cool", 5);
    weight("hot", 95);
    let [cool, hot] = served();
    assert!(hot >= 4 * cool, "{cool} and {hot}");

    // An operator drains it at our balancer: HAProxy gives it no new connection either.
    balancer.admin(&["drain", "hot"]);
    until("HAProxy drains it", || haproxy_server(&socket, "hot").filter(|(_, admin, _)| *admin != 0));
    assert_eq!(served(), [90, 0]);
    balancer.admin(&["ready", "hot"]);
    until("HAProxy ends the drain", || haproxy_server(&socket, "hot").filter(|(_, admin, _)| *admin == 0));

    // Its service ends: down, by the agent's word.
    let gone = services.pop().expect("the hot one");
    drop(gone);
    until("the agent says so", || line_of(checks[1]).filter(|line| line.starts_with("down ")));
    until("HAProxy takes it out", || haproxy_server(&socket, "hot").filter(|(state, ..)| *state == 0));
    drop(agents);
}

const ENVOY: &str = r#"
admin: { address: { socket_address: { address: IP, port_value: ADMIN } } }
static_resources:
  listeners:
  - address: { socket_address: { address: IP, port_value: LISTENER } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config: { virtual_hosts: [ { name: all, domains: ["*"], routes: [ { match: { prefix: "/" }, route: { cluster: pool } } ] } ] }
          http_filters:
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
  clusters:
  - name: pool
    connect_timeout: 1s
    type: STATIC
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.client_side_weighted_round_robin
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin
            enable_oob_load_report: true
            oob_reporting_period: 1s
            oob_reporting_config: { port_value: ORCA }
            blackout_period: 0s
            weight_update_period: 1s
            weight_expiration_period: 60s
    load_assignment:
      cluster_name: pool
      endpoints: [ { lb_endpoints: [ ENDPOINTS ] } ]
"#;

/// A counter of Envoy's.
fn envoy_stat(admin: SocketAddr, name: &str) -> f64 {
    // Few enough that they come in one chunk; Envoy speaks no HTTP 1.0.
    let request =
        format!("GET /stats?filter=lb_orca_oob HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    if let Ok(mut stream) = connect(admin)
        && stream.write_all(request.as_bytes()).is_ok()
    {
        // What came before an error is what there is.
        let _ = stream.read_to_string(&mut answer);
    }
    let line = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")?.parse().ok());
    line.unwrap_or_default()
}

#[test]
fn envoy_weighs_by_the_agents_orca_service() {
    let folder = TempDir::new().expect("a temporary folder");
    let balancer = Balancer::start(BalancerConfig::default());
    let names = ["cool", "hot"];
    let pages: Vec<Text> = names.iter().map(|name| Text::http(name)).collect();
    let files = names.map(|name| folder.path().join(name));
    // Envoy asks all hosts at one port, each at its own address.
    let port = e2e::loopback().port();
    // 1,000 requests a second each: a weight is requests by utilization, so without them Envoy has none.
    let write = |n: usize, busy: f64| {
        write_whole(&files[n], &format!(r#"{{"application": {busy}, "operations_per_second": 1000}}"#));
    };
    write(0, 0.1);
    write(1, 0.8);
    let _agents: Vec<Process> = (0..2)
        .map(|n| {
            let orca = SocketAddr::new(pages[n].address().ip(), port).to_string();
            let file = files[n].to_str().expect("a plain path");
            let flags = ["--serve-orca", &orca, "--utilization-file", file];
            balancer.agent(names[n], pages[n].address(), &flags)
        })
        .collect();

    let (listener, admin) = (e2e::loopback(), e2e::loopback());
    let endpoint = |page: &Text| {
        let (ip, port) = (page.address().ip(), page.address().port());
        format!(
            "{{ endpoint: {{ address: {{ socket_address: {{ address: {ip}, port_value: {port} }} }} }} }}"
        )
    };
    let endpoints: Vec<String> = pages.iter().map(endpoint).collect();
    let config = ENVOY
        .replacen("IP", &admin.ip().to_string(), 1)
        .replacen("ADMIN", &admin.port().to_string(), 1)
        .replacen("IP", &listener.ip().to_string(), 1)
        .replacen("LISTENER", &listener.port().to_string(), 1)
        .replacen("ORCA", &port.to_string(), 1)
        .replacen("ENDPOINTS", &endpoints.join(", "), 1);
    let file = folder.path().join("envoy.yaml");
    write_whole(&file, &config);
    let file = file.to_str().expect("a plain path");
    let flags = ["-c", file, "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning"];
    let _envoy = server("envoy", &wheel("envoy"), &flags);
    until("Envoy hears reports from both", || {
        let sessions = envoy_stat(admin, "cluster.pool.lb_orca_oob.active_sessions");
        let heard = envoy_stat(admin, "cluster.pool.lb_orca_oob.reports_received");
        (sessions >= 2.0 && heard >= 4.0).then_some(())
    });
    let served = || {
        let mut served: HashMap<String, usize> = HashMap::new();
        (0..90).for_each(|_| *served.entry(get(listener, "/").expect("it is served").body).or_default() += 1);
        names.map(|name| served.get(name).copied().unwrap_or_default())
    };
    let [cool, hot] = until("requests go to the less utilized", || {
        Some(served()).filter(|[cool, hot]| *cool >= 4 * *hot && *hot > 0)
    });
    println!("of 90 requests through Envoy: {cool} to the cool one, {hot} to the hot one");
    write(0, 0.8);
    write(1, 0.1);
    let [cool, hot] =
        until("and shift with the reports", || Some(served()).filter(|[cool, hot]| *hot >= 4 * *cool));
    println!("after their utilization was exchanged: {cool} and {hot}");
    assert_eq!(envoy_stat(admin, "cluster.pool.lb_orca_oob.report_errors"), 0.0);
}

#[test]
fn metrics_that_promtool_takes() {
    let service = Service::start("a", Manners::Good);
    let balancer = Balancer::start(BalancerConfig::default());
    let metrics = e2e::loopback();
    let source = r#"echo '{"utilization": {"queue": 0.25}, "named_metrics": {"jobs": 7}}'"#;
    let flags = ["--metrics", &metrics.to_string(), "--from-command", source];
    let _agent = balancer.agent("a", service.address(), &flags);
    let page = until("the command's numbers are on the page", || {
        let answer = get(metrics, "/metrics").ok().filter(|answer| answer.status == 200)?;
        answer
            .body
            .contains("trimtab_agent_utilization_ratio{dimension=\"queue\"} 0.25\n")
            .then_some(answer.body)
    });
    for line in [
        "trimtab_agent_service_up 1\n",
        "trimtab_agent_draining 0\n",
        "trimtab_agent_source_up{source=\"command\"} 1\n",
        "trimtab_agent_utilization_ratio{dimension=\"cpu\"} ",
        "trimtab_agent_metric{name=\"jobs\"} 7\n",
    ] {
        assert!(page.contains(line), "{line}\n{page}");
    }
    until("a balancer hears it", || {
        let page = get(metrics, "/metrics").ok()?.body;
        page.contains("trimtab_agent_balancers_reporting 1\n").then_some(())
    });
    let mut promtool = server("promtool", Path::new("/usr/bin/promtool"), &["check", "metrics"]);
    promtool.write(&page);
    promtool.close_stdin();
    let (ended, _) = promtool.wait(PATIENCE);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{}", ended.stdout);
    assert_eq!(get(metrics, "/").expect("an answer").status, 404);
}

#[test]
fn a_services_own_numbers_from_a_page_a_command_and_an_orca_stream() {
    let folder = TempDir::new().expect("a temporary folder");
    let postgres = Postgres::start();
    let exporter = Exporter::postgres(postgres.address());
    let mut orca = PythonOrca::start(0.5);
    let balancer = Balancer::start(BalancerConfig::default());
    let (page, stream) = (format!("http://{}/metrics", exporter.address()), orca.address().to_string());
    let queue = folder.path().join("queue");
    write_whole(&queue, r#"{"utilization": {"queue": 0.125}}"#);
    let command = format!("cat {}", queue.display());
    let flags = ["--from-prometheus", &page, "--recipe", "postgres_exporter", "--from-orca", &stream];
    let flags = [&flags[..], &["--from-command", &command, "--from-command-timeout", "1s"]].concat();
    let mut agent = balancer.agent("pg", postgres.address(), &flags);
    let value = |dimension: &str| number(&balancer, "pg", &format!("/utilization/{dimension}"));

    until("the page's connections are reported", || (value("connections") > 0.0).then_some(()));
    let open: Vec<SqlClient> =
        (0..40).map(|_| SqlClient::connect(postgres.address()).expect("a session")).collect();
    until("40 of 200 connections", || (value("connections") >= 0.2).then_some(()));
    drop(open);
    // The ORCA stream has a `queue` of 0.5; the command stands above it.
    until("the command's queue is reported", || (value("queue") == 0.125).then_some(()));
    until("the stream's cpu is reported", || (value("cpu") == 0.5).then_some(()));
    orca.say(0.75);
    until("and followed", || (value("cpu") == 0.75).then_some(()));

    // A command that hangs is killed, said once, and its numbers go: the stream's stand again.
    write_whole(&queue, "");
    std::fs::remove_file(&queue).expect("our own file");
    let fifo = Command::new("mkfifo").arg(&queue).status().expect("mkfifo is there");
    assert!(fifo.success());
    until("what the command said is dropped", || (value("queue") == 0.5).then_some(()));
    let late = "the command took longer than 1s: it was killed";
    agent.wait_for_error_line(PATIENCE, |line| line.contains(late).then_some(()));

    // The stream ends: nothing stands above the host's own cpu any more.
    orca.process().kill();
    until("the stream's numbers are dropped", || value("queue").is_nan().then_some(()));
    assert_ne!(value("cpu"), 0.75);
    agent.signal(Signal::TERM);
    let (ended, _) = agent.wait(PATIENCE);
    assert_eq!(ended.code, Some(0));
    let said = ended.stderr.lines().filter(|line| line.contains(late)).count();
    assert_eq!(said, 1, "once: {}", ended.stderr);
}

#[test]
fn an_address_that_is_taken_is_said_at_once() {
    let service = Service::start("a", Manners::Good);
    let balancer = Balancer::start(BalancerConfig::default());
    let taken = service.address().to_string();
    for flag in ["--serve-orca", "--serve-agent-check", "--metrics"] {
        let mut agent = balancer.agent("a", service.address(), &[flag, &taken]);
        let (ended, took) = agent.wait(PATIENCE);
        assert_eq!(ended.code, Some(71), "{flag}: {}", ended.stderr);
        assert!(ended.stderr.contains(&format!("at {taken}: Address already in use")), "{}", ended.stderr);
        assert!(took < Duration::from_secs(20));
    }
    assert!(balancer.resources().is_empty(), "it did not register");
}
