//! Every engine with real servers and real clients, and which one is taken where io_uring is denied or old.

use std::fs;
use std::io::Read as _;
use std::net::{Shutdown, SocketAddr};
use std::process::Command;

use e2e::{
    Backend, Balancer, BalancerConfig, DnsKind, DnsServer, Docker, IMAGE, Manners, PATIENCE, PgBench,
    Postgres, Process, Proxy, Psql, Sandbox, Service, ZONE, ask, check_stream, connect, dig, dnsperf,
    loopback, send_stream, until,
};
use tempfile::TempDir;

const MIB: u64 = 1024 * 1024;
/// A value for Redis and a file for curl, of so many bytes: enough to be spliced.
const VALUE_BYTES: usize = 4 << 20;
const FILE_BYTES: u64 = 64 * MIB;

#[test]
fn uring_serves_real_clients() {
    serves_real_clients("uring");
}

#[test]
fn tokio_uring_serves_real_clients() {
    serves_real_clients("tokio-uring");
}

#[test]
fn epoll_serves_real_clients() {
    serves_real_clients("epoll");
}

fn serves_real_clients(engine: &str) {
    let postgres = Postgres::start();
    let mut proxy = start(engine, postgres.address());
    let mut psql = Psql::open(proxy.listener());
    assert_eq!(psql.ask("select 6 * 7", "answer"), "42");
    let length = psql.ask("select length(repeat('trimtab', 1000000))", "length");
    assert_eq!(length, "7000000");
    let bench = PgBench::start(proxy.listener(), &["-c", "4", "-t", "100"]);
    assert_eq!(bench.succeed(PATIENCE), 400);
    assert_eq!(psql.quit().code, Some(0));
    // A connection for each transaction.
    let bench = PgBench::start(proxy.listener(), &["-c", "4", "-t", "25", "-C", "-S"]);
    assert_eq!(bench.succeed(PATIENCE), 100);
    no_kernel_workers(&mut proxy);
    proxy.stop(PATIENCE);

    redis(engine);
    bulk(engine);
    half_close(engine);
    resolver(engine);
    iperf3(engine);
}

fn start(engine: &str, backend: SocketAddr) -> Proxy {
    Proxy::start(&[backend], &["--engine", engine, "--workers", "2"])
}

/// None of what it does goes to threads that the kernel makes for it.
fn no_kernel_workers(proxy: &mut Proxy) {
    let tasks = format!("/proc/{}/task", proxy.process().id());
    let names = fs::read_dir(tasks).expect("it runs").flatten();
    let names: Vec<_> = names.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok()).collect();
    assert!(!names.iter().any(|name| name.starts_with("iou-wrk")), "{names:?}");
}

/// A large value in and out, and many small ones in one go.
fn redis(engine: &str) {
    let address = loopback();
    let (ip, port) = (address.ip().to_string(), address.port().to_string());
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "redis-server", "--bind", &ip, "--port", &port]);
    let _server = Process::start("redis", command.args(["--save", "", "--appendonly", "no"]));
    until("redis answers", || connect(address).ok());
    let mut proxy = start(engine, address);
    let cli = |arguments: &[&str], stdin: &str| {
        let listener = proxy.listener();
        let mut command = Command::new("redis-cli");
        command.args(["-h", &listener.ip().to_string(), "-p", &listener.port().to_string()]).args(arguments);
        let mut process = Process::start("redis-cli", &mut command);
        process.write(stdin);
        process.close_stdin();
        let ended = process.wait(PATIENCE).0;
        assert_eq!(ended.code, Some(0), "redis-cli: {}{}", ended.stdout, ended.stderr);
        ended.stdout
    };
    let value = "trimtab ".repeat(VALUE_BYTES / 8);
    assert_eq!(cli(&["-x", "set", "large"], &value), "OK\n");
    assert!(cli(&["get", "large"], "").trim_end() == value.trim_end(), "the value is another one now");
    let commands: String = (0..2_000).map(|n| format!("incrby sum {n}\n")).collect();
    let answers = cli(&[], &commands);
    assert_eq!(answers.lines().last(), Some("1999000"), "in order, and each once");
    no_kernel_workers(&mut proxy);
    proxy.stop(PATIENCE);
}

/// A file, four times at once.
fn bulk(engine: &str) {
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("file");
    send_stream(&mut fs::File::create(&file).expect("our own folder"), 1, FILE_BYTES).expect("room for it");
    let address = loopback();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "busybox", "httpd", "-f", "-p", &address.to_string(), "-h"]);
    let _server = Process::start("httpd", command.arg(folder.path()));
    until("httpd answers", || connect(address).ok());
    let mut proxy = start(engine, address);
    let url = format!("http://{}/file", proxy.listener());
    let copies: Vec<_> = (0..4).map(|n| folder.path().join(format!("copy{n}"))).collect();
    let fetch = |copy: &std::path::PathBuf| {
        let mut command = Command::new("curl");
        Process::start("curl", command.args(["-sSf", "-o"]).arg(copy).arg(&url))
    };
    let running: Vec<_> = copies.iter().map(fetch).collect();
    for mut curl in running {
        let ended = curl.wait(PATIENCE).0;
        assert_eq!(ended.code, Some(0), "curl: {}", ended.stderr);
    }
    for copy in &copies {
        assert_eq!(fs::metadata(copy).expect("curl wrote it").len(), FILE_BYTES);
        let mut copy = fs::File::open(copy).expect("curl wrote it");
        check_stream(&mut copy, 1, FILE_BYTES).expect("the same bytes");
    }
    no_kernel_workers(&mut proxy);
    proxy.stop(PATIENCE);
}

/// The client is done first and reads on, as `nc -N` and `rsync` do.
fn half_close(engine: &str) {
    let backend = Backend::start(|mut stream| {
        check_stream(&mut stream, 1, MIB).expect("all of it comes");
        assert_eq!(stream.read(&mut [0; 1]).expect("a FIN"), 0);
        send_stream(&mut stream, 2, 8 * MIB).expect("taken");
    });
    let proxy = start(engine, backend.address());
    let mut client = connect(proxy.listener()).expect("the proxy accepts");
    send_stream(&mut client, 1, MIB).expect("taken");
    client.shutdown(Shutdown::Write).expect("a FIN");
    check_stream(&mut client, 2, 8 * MIB).expect("all of it comes");
    assert_eq!(client.read(&mut [0; 1]).expect("a FIN"), 0);
    drop(client);
    proxy.stop(PATIENCE);
}

/// Connections and datagrams at one address.
fn start_both(engine: &str, backend: SocketAddr, further: &[&str]) -> Proxy {
    let at = loopback();
    let udp = format!("udp://{at}");
    let mut arguments = vec!["--engine", engine, "--workers", "1", "--listen", &udp];
    arguments.extend(further);
    Proxy::start_at(at, &[backend], &arguments)
}

/// Queries over both protocols, and as many as a resolver manages.
fn resolver(engine: &str) {
    let server = DnsServer::start(DnsKind::Bind);
    let mut proxy = start_both(engine, server.address(), &["--udp-responses", "1", "--drain-timeout", "1s"]);
    let at = proxy.listener();
    assert_eq!(dig(at, &format!("taken.{ZONE}"), "A"), ["192.0.2.7"]);
    // BIND's own socket may overflow where the machine is busy with something else.
    let [sent, completed, lost] = dnsperf(at, "2");
    println!("dnsperf, {engine}: {sent} sent, {completed} answered, {lost} lost");
    assert!(completed > 1_000 && lost * 1_000 <= sent, "{sent} sent, {completed} answered, {lost} lost");
    no_kernel_workers(&mut proxy);
    proxy.stop(PATIENCE);
}

/// Its control connection and its datagrams share a port.
fn iperf3(engine: &str) {
    let address = loopback();
    let (ip, port) = (address.ip().to_string(), address.port().to_string());
    let mut server = Command::new("setpriv");
    server.args(["--pdeathsig", "KILL", "--", "iperf3", "-s", "-B", &ip, "-p", &port, "--forceflush"]);
    let mut server = Process::start("iperf3", &mut server);
    server.wait_for_line(PATIENCE, |line| line.contains("Server listening").then_some(()));
    let mut proxy = start_both(engine, address, &["--drain-timeout", "1s"]);
    let at = proxy.listener();
    let (ip, port) = (at.ip().to_string(), at.port().to_string());
    let run = |arguments: &[&str]| -> serde_json::Value {
        let mut command = Command::new("iperf3");
        command.args(["-c", &ip, "-p", &port, "-J"]).args(arguments);
        let output = command.output();
        let output = output.unwrap_or_else(|error| panic!("iperf3: {error}; run `cargo xtask install`"));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!(
                "{error}: {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )
        })
    };
    for direction in [&[][..], &["-R"]] {
        let report = run(&[&["-u", "-b", "50M", "-t", "2", "-l", "1200"], direction].concat());
        let sum = &report["end"]["sum"];
        let packets = sum["packets"].as_u64().unwrap_or(0);
        let lost = sum["lost_packets"].as_i64().unwrap_or(-1);
        println!("iperf3, {engine}, datagrams {direction:?}: {packets}, {lost} lost");
        assert!(packets > 2_000 && (0..=(packets / 20) as i64).contains(&lost), "{report}");
        // Its end is told on another connection: what is still on its way then, iperf3 does not count.
        let report = run(&[&["-n", "256M", "-P", "4"], direction].concat());
        let received = report["end"]["sum_received"]["bytes"].as_u64().unwrap_or(0);
        println!("iperf3, {engine}, bytes {direction:?}: {received}");
        assert!(received >= 128 * MIB, "{report}");
    }
    no_kernel_workers(&mut proxy);
    proxy.stop(PATIENCE);
}

#[test]
fn where_io_uring_is_denied_epoll_serves_and_says_why() {
    for (sandbox, reason, says) in [
        (
            Sandbox::Forbids,
            "uring_forbidden",
            "io_uring is forbidden here: the sysctl kernel.io_uring_disabled",
        ),
        (Sandbox::Hides, "uring_missing", "this kernel has no io_uring, or a sandbox hides it"),
    ] {
        auto_takes("epoll", reason, says, sandbox);
        for named in ["uring", "tokio-uring"] {
            refused(named, says, sandbox);
        }
        // What is named and works is taken, whatever else does not.
        let config =
            BalancerConfig { dataplane: "engine = \"epoll\"".to_owned(), ..BalancerConfig::default() };
        let balancer = Balancer::start_by(config, |arguments| sandbox.command(arguments));
        assert_eq!(engine_of(&balancer, "epoll", "configured"), 1.0);
    }
}

#[test]
fn on_an_old_kernel_tokio_uring_serves_and_says_why() {
    let says = "this kernel's io_uring is too old (io_uring_register_buf_ring";
    auto_takes("tokio-uring", "uring_too_old", says, Sandbox::IsOld);
    refused("uring", says, Sandbox::IsOld);
}

#[test]
fn without_memory_for_a_ring_in_each_worker_another_engine_serves() {
    // None at all, and enough for one worker but not for eight.
    for bytes in [0, 256 << 10] {
        let config = BalancerConfig { dataplane: "workers = 8".to_owned(), ..BalancerConfig::default() };
        let sandbox = Sandbox::LocksAtMost(bytes);
        let balancer = Balancer::start_by(config, |arguments| sandbox.command(arguments));
        let memory = ["tokio-uring", "epoll"].map(|engine| engine_of(&balancer, engine, "uring_memory"));
        // Linux 5.12 to 6.13 or so do not count rings: then the best one works.
        let uncounted = engine_of(&balancer, "uring", "probed");
        assert_eq!(memory.iter().sum::<f64>() + uncounted, 1.0, "with {bytes} bytes");
        serves(&balancer);
    }
}

fn engine_of(balancer: &Balancer, engine: &str, reason: &str) -> f64 {
    balancer.metrics().sum("trimtab_engine_info", &[("engine", engine), ("reason", reason)])
}

/// The engine "auto" ends on this one, serves with it, and says so everywhere.
fn auto_takes(engine: &str, reason: &str, says: &str, sandbox: Sandbox) {
    let mut balancer = Balancer::start_by(BalancerConfig::default(), |arguments| sandbox.command(arguments));
    assert_eq!(engine_of(&balancer, engine, reason), 1.0);
    let ready = balancer.probe("/readyz?verbose").expect("an answer");
    assert!(ready.body.contains(&format!("engine {engine} ({reason})")), "{}", ready.body);
    balancer.process().wait_for_error_line(PATIENCE, |line| line.contains(says).then_some(()));
    serves(&balancer);
}

fn serves(balancer: &Balancer) {
    let service = Service::start("one", Manners::Good);
    let _agent = balancer.agent("one", service.address(), &["--report-interval", "100ms"]);
    until("it is ready", || (balancer.ready_resources() == 1).then_some(()));
    assert_eq!(ask(balancer.listener()).expect("it serves"), "one");
}

/// A named engine that cannot run is an error that says what to change.
fn refused(engine: &str, says: &str, sandbox: Sandbox) {
    let mut command = sandbox.command(&["proxy", "--listen", "tcp://127.0.0.1:0", "--to", "127.0.0.1:9"]);
    let mut process = Process::start("proxy", command.args(["--engine", engine]));
    process.close_stdin();
    let ended = process.wait(PATIENCE).0;
    assert_eq!(ended.code, Some(71), "{}", ended.stderr);
    let begins = format!("the engine {engine} cannot run here: {says}");
    assert!(ended.stderr.contains(&begins), "{}", ended.stderr);
    assert!(ended.stderr.contains("or write engine = \"auto\""), "{}", ended.stderr);
}

/// The profile of `deploy/` in a real container: the best engine runs, and what a container must not do it still may not.
#[test]
fn in_a_container_with_our_profile_uring_serves() {
    let profile = concat!("seccomp=", env!("CARGO_MANIFEST_DIR"), "/../deploy/seccomp-io_uring.json");
    let docker = Docker::start(env!("CARGO_BIN_EXE_greeter"), &[]);
    // The image has no C library of the right version: the binary runs in the host's files.
    let host = ["--volume", "/:/host:ro", "--entrypoint", "/bin/busybox", IMAGE, "chroot", "/host"];
    let binary = e2e::binary();
    let binary = binary.canonicalize().expect("it is built");
    let proxy = [binary.to_str().expect("a plain path"), "proxy", "--listen", "tcp://0.0.0.0:7000"];
    let told = ["--to", "127.0.0.1:9", "--engine", "uring"];
    let run = ["run", "--detach", "--name", "lb", "--security-opt", profile];
    docker.run_with(&[&run[..], &host, &proxy, &told].concat());
    until("the proxy in the container is ready", || {
        let said = docker.run("logs lb");
        assert!(!docker.containers("lb").is_empty(), "it ended: {said}");
        said.contains("ready").then_some(())
    });
    let try_it = "busybox unshare -U busybox true && echo made || echo refused";
    let made = docker.run_with(&["exec", "lb", "/bin/sh", "-c", &format!("PATH=/bin; {try_it}")]);
    assert_eq!(made.trim(), "refused", "a new user namespace");
}
