//! Active checks with the real servers: who hangs gets no connections until he answers again, and no server is hurt.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;

use e2e::{
    Balancer, BalancerConfig, DnsKind, DnsServer, MariaDb, Metrics, Pki, Postgres, Process, Server,
    SqlClient, ZONE, connect, until,
};
use rustix::process::Signal;
use serde_json::Value;

/// What all checks here have: results come soon, and a busy machine does not fail them.
const TIMING: &str = "interval = \"400ms\"\nfast_interval = \"200ms\"\ntimeout = \"1s\"\nrise = 2\nfall = 2";
/// Connections through the balancer while a server hangs.
const CONNECTIONS: usize = 8;

/// A server of any kind.
enum Any {
    Postgres(Postgres),
    MariaDb(MariaDb),
    Dns(DnsServer),
    Server(Server),
}

impl Any {
    fn address(&self) -> SocketAddr {
        match self {
            Self::Postgres(server) => server.address(),
            Self::MariaDb(server) => server.address(),
            Self::Dns(server) => server.address(),
            Self::Server(server) => server.address(),
        }
    }

    fn freeze(&mut self) {
        match self {
            Self::Postgres(server) => drop(server.freeze()),
            Self::MariaDb(server) => server.freeze(),
            Self::Dns(server) => server.freeze(),
            Self::Server(server) => server.freeze(),
        }
    }

    fn thaw(&mut self) {
        match self {
            Self::Postgres(server) => server.thaw(),
            Self::MariaDb(server) => server.thaw(),
            Self::Dns(server) => server.thaw(),
            Self::Server(server) => server.thaw(),
        }
    }
}

/// A pool of two servers of one kind, each of which has an agent.
struct Pool {
    kind: &'static str,
    listener: SocketAddr,
    servers: [Any; 2],
    agents: Vec<Process>,
    ask: fn(SocketAddr) -> bool,
}

/// A kind of check: its name, its keys, a server of it, and how a client sees that one answers.
type Kind = (&'static str, String, fn() -> Any, fn(SocketAddr) -> bool);

fn kinds() -> Vec<Kind> {
    let own = |lines: &str| lines.to_owned();
    vec![
        (
            "postgresql",
            own("user = \"postgres\""),
            || Any::Postgres(Postgres::start()),
            |at| SqlClient::connect(at).is_ok_and(|client| client.end().is_ok()),
        ),
        (
            "mysql",
            own("user = \"root\""),
            || Any::MariaDb(MariaDb::start()),
            |at| mariadb(at, "select 1").is_some(),
        ),
        ("redis", own(""), || Any::Server(Server::redis()), |at| says(at, b"PING\r\n", "+PONG")),
        ("smtp", own(""), || Any::Server(Server::smtp(None)), |at| says(at, b"QUIT\r\n", "220 ")),
        ("ftp", own(""), || Any::Server(Server::ftp(None)), |at| says(at, b"QUIT\r\n", "220")),
        (
            "xmpp",
            own("domain = \"example.test\""),
            || Any::Server(Server::prosody(None)),
            |at| {
                let opening = "<?xml version='1.0'?><stream:stream to='example.test' xmlns='jabber:client' \
                           xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>\n</stream:stream>";
                says(at, opening.as_bytes(), "<?xml")
            },
        ),
        (
            "dns",
            format!("name = \"{ZONE}\""),
            || Any::Dns(DnsServer::start(DnsKind::Bind)),
            |at| {
                let dig = Command::new("dig")
                    .args([
                        &format!("@{}", at.ip()),
                        "-p",
                        &at.port().to_string(),
                        "+tcp",
                        "+short",
                        ZONE,
                        "SOA",
                    ])
                    .output()
                    .expect("dig is installed");
                String::from_utf8_lossy(&dig.stdout).contains("hostmaster")
            },
        ),
        (
            "http",
            own("path = \"/healthz\"\nexpect = \"well\""),
            || Any::Server(Server::nginx(None)),
            |at| says(at, b"GET / HTTP/1.0\r\n\r\n", "HTTP/1.1 200"),
        ),
        (
            "send_expect",
            own("send = 'PING\\r\\n'\nexpect = '+PONG\\r\\n'\ngoodbye = 'QUIT\\r\\n'"),
            || Any::Server(Server::redis()),
            |at| says(at, b"PING\r\n", "+PONG"),
        ),
    ]
}

/// Whether what comes first begins so.
fn says(at: SocketAddr, text: &[u8], begins: &str) -> bool {
    let Ok(mut stream) = connect(at) else { return false };
    let mut said = vec![0; begins.len()];
    let heard = stream.write_all(text).and_then(|()| stream.read_exact(&mut said));
    heard.is_ok() && said == begins.as_bytes()
}

/// What the client of MariaDB prints; `None`: it failed.
fn mariadb(at: SocketAddr, statement: &str) -> Option<String> {
    let (host, port) = (at.ip().to_string(), at.port().to_string());
    let output = Command::new("mariadb")
        .args(["--no-defaults", "-u", "root", "-h", &host, "-P", &port, "-N", "-B", "-e", statement])
        .output()
        .expect("mariadb is installed by `cargo xtask install`");
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn check(kind: &str, lines: &str) -> String {
    format!("[pool.check]\nkind = \"{kind}\"\n{TIMING}\n{lines}")
}

fn id(kind: &str, place: usize) -> String {
    format!("{kind}-{place}")
}

/// Waits until these resources are in `state`, all of them.
#[track_caller]
fn wait_for(balancer: &Balancer, ids: &[String], state: &str) -> serde_json::Map<String, Value> {
    let mut last = String::new();
    until(&format!("{ids:?} are {state}"), || {
        let resources = balancer.resources();
        let wrong =
            ids.iter().find(|id| resources.get(*id).is_none_or(|resource| resource["state"] != state));
        last = wrong.map(|id| format!("{id}: {:?}", resources.get(id))).unwrap_or_default();
        wrong.is_none().then_some(resources)
    })
}

/// A server that starts beside others, in a thread that stays: processes end with the thread that started them.
struct Starting {
    started: mpsc::Receiver<Any>,
    _stays: mpsc::Sender<()>,
}

impl Starting {
    fn begin(start: fn() -> Any) -> Self {
        let (tell, started) = mpsc::channel();
        let (stays, gone) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            // A test that has ended needs none.
            let _ = tell.send(start());
            let _ = gone.recv();
        });
        Self { started, _stays: stays }
    }

    fn server(&self) -> Any {
        self.started.recv().expect("it starts")
    }
}

#[test]
fn who_hangs_gets_no_connections_until_he_answers_again() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = folder.path().join("trimtab.db");
    let further = format!("[store]\npath = \"{}\"\n", store.display());
    let mut config = BalancerConfig { further, ..BalancerConfig::default() };
    let kinds = kinds();
    let listeners: Vec<SocketAddr> =
        kinds.iter().map(|(kind, lines, ..)| config.add_pool(kind, &check(kind, lines))).collect();
    let starting: Vec<[Starting; 2]> =
        kinds.iter().map(|(_, _, start, _)| [(); 2].map(|()| Starting::begin(*start))).collect();
    let servers: Vec<[Any; 2]> = starting.iter().map(|pair| pair.each_ref().map(Starting::server)).collect();
    let balancer = Balancer::start(config);
    let mut pools: Vec<Pool> = Vec::new();
    for (((kind, _, _, ask), listener), servers) in kinds.into_iter().zip(listeners).zip(servers) {
        let agent = |(place, server): (usize, &Any)| {
            balancer.agent_of(kind, &id(kind, place), server.address(), &["--report-interval", "1s"])
        };
        let agents = servers.iter().enumerate().map(agent).collect();
        pools.push(Pool { kind, listener, servers, agents, ask });
    }
    let ids = |place: usize| -> Vec<String> { pools.iter().map(|pool| id(pool.kind, place)).collect() };
    let (hanging, others) = (ids(0), ids(1));
    let is_up = |resource: &Value| resource["check"]["state"] == "up";
    for ids in [&hanging, &others] {
        until("all checks pass", || {
            let resources = wait_for(&balancer, ids, "ready");
            ids.iter().all(|id| is_up(&resources[id])).then_some(())
        });
    }

    pools.iter_mut().for_each(|pool| pool.servers[0].freeze());
    let resources = wait_for(&balancer, &hanging, "down");
    for id in &hanging {
        let check = &resources[id]["check"];
        assert_eq!(
            (&check["state"], &check["result"]),
            (&"down".into(), &"timed_out".into()),
            "{id}: {check}"
        );
        assert!(check["in_a_row"].as_u64() >= Some(2), "{id}: {check}");
    }
    for pool in &pools {
        let before = balancer.metrics().opened(&id(pool.kind, 0));
        for connection in 0..CONNECTIONS {
            assert!((pool.ask)(pool.listener), "{}: connection {connection} was lost", pool.kind);
        }
        assert_eq!(balancer.metrics().opened(&id(pool.kind, 0)), before, "{}", pool.kind);
    }
    shown(&balancer, &pools[2]);

    pools.iter_mut().for_each(|pool| pool.servers[0].thaw());
    let resources = wait_for(&balancer, &hanging, "ready");
    assert!(hanging.iter().all(|id| is_up(&resources[id])));
    for pool in &mut pools {
        assert!((pool.ask)(pool.listener), "{}", pool.kind);
        if let Any::Postgres(server) = &pool.servers[0] {
            // While it started, the fixture itself was refused.
            let failures = server.log().lines().filter(|line| is_failure(line)).count();
            assert_eq!(failures, 0, "a check hurts nobody: {}", server.log());
        }
        for agent in &mut pool.agents {
            agent.signal(Signal::TERM);
        }
    }
    events(&store, &hanging);
}

/// Whether PostgreSQL complains of a client.
fn is_failure(line: &str) -> bool {
    line.contains("FATAL") && !line.contains("the database system is starting up")
}

/// What people and machines see of one that is down.
fn shown(balancer: &Balancer, pool: &Pool) {
    let explained = balancer.admin(&["explain", pool.kind]);
    assert!(explained.contains(&format!("check ({}): timed_out ", pool.kind)), "{explained}");
    assert!(explained.contains("no answer from "), "{explained}");
    let metrics: Metrics = balancer.metrics();
    let down = id(pool.kind, 0);
    let labels = [("pool", pool.kind), ("resource", down.as_str())];
    assert_eq!(metrics.sum("trimtab_resource_check_up", &labels), 0.0);
    let timed_out = [labels[0], labels[1], ("result", "timed_out")];
    assert!(metrics.sum("trimtab_checks_total", &timed_out) >= 2.0, "{}", metrics.text());
    assert!(metrics.sum("trimtab_check_seconds_count", &[labels[0]]) >= 4.0);
    assert_eq!(metrics.sum("trimtab_resources", &[labels[0], ("state", "down")]), 1.0);
}

/// What is kept of it.
fn events(store: &Path, hanging: &[String]) {
    let store = rusqlite::Connection::open(store).expect("the store is there");
    for (id, kind) in hanging.iter().flat_map(|id| [(id, "checks_fail"), (id, "checks_pass")]) {
        until(&format!("{id} has an event {kind}"), || {
            let count = "select count(*) from events where resource = ?1 and kind = ?2";
            let count: i64 = store.query_row(count, [id.as_str(), kind], |row| row.get(0)).ok()?;
            (count > 0).then_some(())
        });
    }
}

#[test]
fn two_hundred_checks_and_a_hang_are_no_aborted_connects() {
    let mut server = MariaDb::start_with(&["--performance-schema=ON", "--max-connect-errors=3"]);
    let mut config = BalancerConfig::default();
    let timing = "interval = \"50ms\"\nfast_interval = \"50ms\"\ntimeout = \"500ms\"";
    config.pool = format!("[pool.check]\nkind = \"mysql\"\nuser = \"root\"\n{timing}");
    config.add_pool("rude", &format!("[pool.check]\nkind = \"tcp\"\n{timing}"));
    let balancer = Balancer::start(config);
    let _agent = balancer.agent("maria", server.address(), &["--no-check"]);
    let address = server.address();
    let aborted = |name: &str| -> u64 {
        let text = mariadb(address, &format!("show global status like '{name}'"));
        text.and_then(|text| text.split_whitespace().last()?.parse().ok()).expect("a count")
    };
    let passed =
        || balancer.resources().get("maria").and_then(|maria| maria["check"]["passed_total"].as_u64());
    until("it is checked", || passed().filter(|count| *count > 0));
    let before = (aborted("Aborted_connects"), aborted("Aborted_clients"));
    let first = passed().unwrap_or_default();
    until("200 checks", || passed().filter(|count| *count >= first + 200));
    // A server that hangs keeps one connection, and answers it when it can.
    server.freeze();
    wait_for(&balancer, &["maria".to_owned()], "down");
    let failed = || balancer.resources()["maria"]["check"]["failed_total"].as_u64();
    until("20 checks have failed", || failed().filter(|count| *count >= 20));
    server.thaw();
    wait_for(&balancer, &["maria".to_owned()], "ready");
    assert_eq!((aborted("Aborted_connects"), aborted("Aborted_clients")), before);
    let blocked = "select count(*) from performance_schema.host_cache where sum_connect_errors > 0";
    assert_eq!(mariadb(server.address(), blocked).as_deref().map(str::trim), Some("0"));

    // The measure measures: a check that only connects is counted against us.
    let _rude = balancer.agent_of("rude", "rude", server.address(), &["--no-check"]);
    until("connects are counted", || (aborted("Aborted_connects") > before.0).then_some(()));
}

/// A health service of tonic's, which says of itself what a test wants.
struct Grpc {
    address: SocketAddr,
    reporter: tonic_health::server::HealthReporter,
    runtime: tokio::runtime::Runtime,
}

impl Grpc {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let address = e2e::loopback();
        let (reporter, service) = tonic_health::server::health_reporter();
        let serve = tonic::transport::Server::builder().add_service(service).serve(address);
        runtime.spawn(serve);
        let grpc = Self { address, reporter, runtime };
        grpc.say(tonic_health::ServingStatus::Serving);
        until("the gRPC server listens", || connect(address).ok());
        grpc
    }

    fn say(&self, status: tonic_health::ServingStatus) {
        self.runtime.block_on(self.reporter.set_service_status("sql", status));
    }
}

#[test]
fn what_a_service_or_a_program_says_counts() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let flag = folder.path().join("well");
    std::fs::write(&flag, "").expect("our own folder");
    let pki = Pki::new();
    pki.issue("web", &["--dns", "web.example.com"]);
    let (certificate, key) = (pki.path("web.pem"), pki.path("web.key"));
    let mut tls = Server::nginx(Some((&certificate, &key)));
    let grpc = Grpc::start();
    let mut config = BalancerConfig { pool: check("grpc", "service = \"sql\""), ..BalancerConfig::default() };
    let script = "if [ -e \"$1.hang\" ]; then sleep 60; fi; echo $2 is well; test -e \"$1\"";
    let command = format!("command = ['sh', '-c', '{script}', 'sh', '{}', '{{address}}']", flag.display());
    config.add_pool("command", &check("command", &command));
    let ca = pki.path("ca.pem");
    let believed = format!("[pool.check.tls]\nserver_name = \"web.example.com\"\nca = \"{}\"", ca.display());
    config.add_pool("tls", &check("tls", &believed));
    config.add_pool("stranger", &check("tls", "[pool.check.tls]\nserver_name = \"web.example.com\""));
    config.add_pool("https", &check("http", "[pool.check.tls]\nverify = false"));
    let balancer = Balancer::start(config);
    let _agents = [
        balancer.agent("grpc", grpc.address, &[]),
        balancer.agent_of("command", "command", grpc.address, &[]),
        balancer.agent_of("tls", "tls", tls.address(), &[]),
        balancer.agent_of("https", "https", tls.address(), &[]),
        balancer.agent_of("stranger", "stranger", tls.address(), &[]),
    ];
    let state = |id: &str, state: &str| wait_for(&balancer, &[id.to_owned()], state)[id]["check"].clone();
    for id in ["grpc", "command", "tls", "https"] {
        until(&format!("{id} is up"), || (state(id, "ready")["state"] == "up").then_some(()));
    }
    assert_eq!(state("command", "ready")["detail"], format!("{} is well", grpc.address.ip()));
    assert_eq!(state("https", "ready")["detail"], "status 200 OK");
    // Nobody has spoken for it yet: its first result counts alone.
    assert!(
        state("stranger", "down")["detail"].as_str().is_some_and(|detail| detail.starts_with("no TLS: "))
    );

    grpc.say(tonic_health::ServingStatus::NotServing);
    assert_eq!(state("grpc", "down")["detail"], "NOT_SERVING");
    std::fs::remove_file(&flag).expect("our own file");
    assert_eq!(state("command", "down")["result"], "failed");
    tls.freeze();
    for id in ["tls", "https"] {
        assert_eq!(state(id, "down")["result"], "timed_out");
    }

    grpc.say(tonic_health::ServingStatus::Serving);
    std::fs::write(&flag, "").expect("our own folder");
    tls.thaw();
    for id in ["grpc", "command", "tls", "https"] {
        assert_eq!(state(id, "ready")["state"], "up");
    }

    // A program that hangs is ended, with what it has started.
    let hang = folder.path().join("well.hang");
    std::fs::write(&hang, "").expect("our own folder");
    assert_eq!(state("command", "down")["result"], "timed_out");
    std::fs::remove_file(&hang).expect("our own file");
    state("command", "ready");
    until("nothing is left of it", || (sleepers(&flag) == 0).then_some(()));
}

#[test]
fn checks_go_over_to_tls_where_a_server_asks_for_it() {
    let pki = Pki::new();
    pki.issue("service", &["--dns", "service.example.com"]);
    let (certificate, key) = (pki.path("service.pem"), pki.path("service.key"));
    let tls = Some((certificate.as_path(), key.as_path()));
    let servers = [
        ("smtp", "", Server::smtp(tls)),
        ("ftp", "", Server::ftp(tls)),
        ("xmpp", "domain = \"example.test\"\n", Server::prosody(tls)),
    ];
    let believed = format!(
        "[pool.check.tls]\nstarttls = true\nserver_name = \"service.example.com\"\nca = \"{}\"",
        pki.path("ca.pem").display()
    );
    let mut config = BalancerConfig::default();
    for (kind, lines, _) in &servers {
        config.add_pool(kind, &check(kind, &format!("{lines}{believed}")));
        // Of nobody that we believe; and who begins with TLS is not understood.
        let stranger = "[pool.check.tls]\nstarttls = true\nserver_name = \"service.example.com\"";
        config.add_pool(&format!("{kind}-stranger"), &check(kind, &format!("{lines}{stranger}")));
        config.add_pool(
            &format!("{kind}-at-once"),
            &check(kind, &format!("{lines}[pool.check.tls]\nverify = false")),
        );
    }
    let balancer = Balancer::start(config);
    let ids = |kind: &str| [kind.to_owned(), format!("{kind}-stranger"), format!("{kind}-at-once")];
    let _agents: Vec<_> = servers
        .iter()
        .flat_map(|(kind, _, server)| ids(kind).map(|id| balancer.agent_of(&id, &id, server.address(), &[])))
        .collect();
    for (kind, _, _) in &servers {
        let [believed, stranger, at_once] = ids(kind);
        wait_for(&balancer, std::slice::from_ref(&believed), "ready");
        until(&format!("{kind} is up"), || {
            (balancer.resources()[&believed]["check"]["state"] == "up").then_some(())
        });
        let resources = wait_for(&balancer, &[stranger.clone(), at_once.clone()], "down");
        for id in [stranger, at_once] {
            let detail = &resources[&id]["check"]["detail"];
            let is_of_tls = detail.as_str().is_some_and(|detail| detail.starts_with("no TLS: "));
            let is_late = resources[&id]["check"]["result"] == "timed_out";
            assert!(is_of_tls || (is_late && id.ends_with("at-once")), "{id}: {detail}");
        }
    }
    // Again and again, and by nobody else's mistake: it is well for as long as we look.
    let passed = |kind: &str| balancer.resources()[kind]["check"]["passed_total"].as_u64();
    for (kind, _, _) in &servers {
        until(&format!("{kind} passes"), || passed(kind).filter(|count| *count >= 10));
        assert_eq!(balancer.resources()[*kind]["check"]["failed_total"], 0, "{kind}");
    }
}

/// Shells of the check that are left.
fn sleepers(flag: &Path) -> usize {
    let flag = flag.to_str().expect("a plain path");
    let is_left = |entry: &std::fs::DirEntry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(flag) && line.starts_with(b"sh\0")
    };
    std::fs::read_dir("/proc").expect("/proc is mounted").flatten().filter(is_left).count()
}
