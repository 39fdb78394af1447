//! Floods, queues, affinity, and what is written down; and running out of what the kernel gives.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use e2e::{
    Backend, BalancerConfig, Lab, Namespace, PATIENCE, PgBench, Process, Proxy, SqlClient, connect,
    connect_from, greet, is_reset, until, within,
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

/// What is exhausted is there again; the proxy has so long to notice.
const RECOVERS_WITHIN: Duration = Duration::from_secs(1);
/// Who is not reset for so long was let in.
const LET_IN: Duration = Duration::from_millis(10);
/// A flood ends after so many connections at the latest.
const FLOOD_MAX: u32 = 30_000;

fn config(pool: &str, further: &str) -> BalancerConfig {
    BalancerConfig { pool: pool.to_owned(), further: further.to_owned(), ..BalancerConfig::default() }
}

/// An address of loopback that no server is at.
fn flooder(host: u8) -> IpAddr {
    [127, 254, 254, host].into()
}

#[test]
fn a_flood_from_one_address_fails_no_transaction_of_another() {
    let limits = "[listener.limits]\nflows_per_client = 30\nnew_flows_per_client_per_second = 50\n";
    let lab = Lab::start(2, config("", limits));
    let listener = lab.listener();
    let bench = PgBench::start(listener, &["-c", "8", "-j", "2", "-S", "-T", "4"]);
    until("pgbench is connected", || {
        (lab.balancer.metrics().sum("trimtab_flows_open", &[]) >= 8.0).then_some(())
    });

    let over = AtomicBool::new(false);
    let (offered, turned_away) = (AtomicU32::new(0), AtomicU32::new(0));
    let transactions = thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Relaxed) && offered.fetch_add(1, Relaxed) < FLOOD_MAX {
                    // A reset may come before the connect's end is seen.
                    let answer = connect_from(flooder(1), listener).and_then(|mut stream| {
                        // Who is let in does not wait to be served.
                        stream.set_read_timeout(Some(LET_IN))?;
                        stream.read(&mut [0])
                    });
                    turned_away.fetch_add(u32::from(is_reset(&answer)), Relaxed);
                }
            });
        }
        let transactions = bench.succeed(PATIENCE);
        over.store(true, Relaxed);
        transactions
    });
    let (offered, turned_away) = (offered.into_inner(), turned_away.into_inner());
    let metrics = lab.balancer.metrics();
    let shed = |reason| metrics.sum("trimtab_sheds_total", &[("reason", reason)]);
    let (flows, rate, gone) = (shed("client_flows"), shed("client_rate"), shed("client_gone"));
    println!(
        "{offered} connections in four seconds: {flows} beyond the flows of a client, {rate} too fast; \
         {transactions} transactions beside them, 0 failed"
    );
    assert!(offered > 2_000, "{offered} connections are no flood");
    assert!(flows + rate + gone >= f64::from(turned_away), "each is counted");
    assert!(
        f64::from(turned_away) >= 0.8 * f64::from(offered),
        "{turned_away} of {offered} were turned away"
    );

    // It is over for its address, too, once it is over.
    until("the address is served again", || {
        let stream = connect_from(flooder(1), listener).ok()?;
        SqlClient::over(stream).ok()
    });
    lab.stop();
}

#[test]
fn half_open_clients_hold_no_more_than_their_part() {
    let limits = "[listener.limits]\nflows_per_client = 5\n";
    let mut config = config("", limits);
    config.dataplane = "idle_timeout = \"1s\"".to_owned();
    let lab = Lab::start(1, config);
    let listener = lab.listener();
    // They say the beginning of a startup packet, and nothing more for ever.
    let half_open: Vec<_> = (0..5)
        .map(|_| {
            let mut stream = connect_from(flooder(2), listener).expect("a connection");
            stream.write_all(&[0, 0]).expect("two bytes");
            stream
        })
        .collect();
    until("they are open", || (lab.balancer.metrics().sum("trimtab_flows_open", &[]) == 5.0).then_some(()));
    let sixth = connect_from(flooder(2), listener).and_then(|mut stream| stream.read(&mut [0]));
    assert!(is_reset(&sixth), "{sixth:?}");
    // Others are served, and the five end by themselves.
    SqlClient::connect(listener).and_then(SqlClient::end).expect("another client");
    for mut stream in half_open {
        let end = stream.read(&mut [0]);
        assert!(is_reset(&end), "{end:?}");
    }
    let stream = connect_from(flooder(2), listener).expect("its part is free again");
    SqlClient::over(stream).expect("and served");
    lab.stop();
}

#[test]
fn more_clients_than_places_wait_and_none_fails() {
    let pool = "flows_max_per_resource = 2\n[pool.queue]\ndeadline = \"20s\"";
    let lab = Lab::start(2, config(pool, ""));
    // A thread for each: one that connects waits, and could not end what its other clients have begun.
    let transactions =
        PgBench::start(lab.listener(), &["-c", "20", "-j", "20", "-C", "-S", "-t", "10"]).succeed(PATIENCE);
    let metrics = lab.balancer.metrics();
    let waited = metrics.sum("trimtab_flows_queued_total", &[]);
    println!("{transactions} transactions by 20 clients at 4 places; {waited} of their connections waited");
    assert_eq!(transactions, 200);
    assert!(waited >= 16.0, "{waited} waited");
    assert_eq!(metrics.sum("trimtab_sheds_total", &[]), 0.0);
    assert_eq!(metrics.sum("trimtab_flows_waiting", &[]), 0.0);
    lab.stop();
}

#[test]
fn a_client_is_kept_and_the_log_says_so() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let log = folder.path().join("access.log");
    let further = format!("[access_log]\npath = \"{}\"\n", log.display());
    let lab = Lab::start(3, config("affinity = \"client\"", &further));
    let server = || {
        let mut client = SqlClient::connect(lab.listener()).expect("a connection");
        let server = client.server().expect("an answer");
        client.end().expect("an end");
        server
    };
    let first = server();
    for _ in 0..20 {
        assert_eq!(server(), first);
    }
    let name = lab.name_of(&first).to_owned();
    let explained = lab.balancer.admin(&["explain", e2e::POOL, "--last", "1"]);
    assert!(explained.contains(&format!(" -> {name}, kept by affinity")), "{explained}");

    let lines = until("a line for each connection", || {
        let text = std::fs::read_to_string(&log).ok()?;
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
            .collect();
        (lines.len() == 21).then_some(lines)
    });
    // Lines of different workers may be in another order.
    assert_eq!(lines.iter().filter(|line| line["affinity"] == "new").count(), 1);
    assert_eq!(lines.iter().filter(|line| line["affinity"] == "kept").count(), 20);
    for line in &lines {
        assert_eq!(line["resource"], name.as_str(), "{line}");
        assert_eq!(line["end"], "ended", "{line}");
        assert!(line["bytes_to_client"].as_u64() > Some(100), "{line}");
        assert!(line["first_byte_seconds"].as_f64() <= line["seconds"].as_f64(), "{line}");
    }
    let metrics = lab.balancer.metrics();
    assert_eq!(metrics.sum("trimtab_affinity_total", &[("result", "kept")]), 20.0);
    assert_eq!(metrics.sum("trimtab_access_log_lines_total", &[]), 21.0);
    assert_eq!(metrics.sum("trimtab_access_log_lost_total", &[]), 0.0);
    // Where it leaves, the client moves and is kept there.
    lab.balancer.admin(&["drain", &name]);
    let second = until("another serves it", || Some(server()).filter(|server| *server != first));
    lab.balancer.admin(&["ready", &name]);
    until("it is back", || (lab.balancer.ready_resources() == 3).then_some(()));
    for _ in 0..20 {
        assert_eq!(server(), second);
    }
    lab.stop();
}

#[test]
fn it_recovers_from_having_no_descriptors() {
    let backend = Backend::start(|mut stream| {
        let _ = stream.write_all(b"here\n");
        // Until the client ends.
        let _ = stream.read(&mut [0]);
    });
    let mut proxy = Proxy::start(&[backend.address()], &[]);
    let listener = proxy.listener();
    let exchange = || {
        let stream = connect(listener)?;
        greet(&stream)
    };
    drop(exchange());
    let pid = Pid::from_raw(proxy.process().id() as i32);
    let limit = |current| {
        let hard = rustix::process::getrlimit(Resource::Nofile).maximum;
        prlimit(pid, Resource::Nofile, Rlimit { current, maximum: hard }).expect("our own process")
    };
    let before = limit(Some(3));
    // The accept was armed before and goes on; there is no socket to connect to the backend with.
    for _ in 0..50 {
        let shed = exchange();
        assert!(is_reset(&shed), "{shed:?}");
    }
    limit(before.current);
    let ((), took) = within(RECOVERS_WITHIN, "a connection is served", || exchange().ok().map(drop));
    println!("a connection was served {took:?} after there were descriptors again");
    proxy.stop(PATIENCE);
}

#[test]
fn it_recovers_from_having_no_ports() {
    let network = Namespace::new();
    let set = "echo 20000 20009 > /proc/sys/net/ipv4/ip_local_port_range";
    assert!(network.command("sh").args(["-c", set]).status().expect("a shell").success());
    let address = |host: u8, port: u16| SocketAddr::from(([127, 0, 0, host], port));
    let greeter = env!("CARGO_BIN_EXE_greeter");
    let _service = Process::start("greeter", network.command(greeter).arg("7001"));
    // Clients have ten ports for each of the two listeners, the proxy has ten for the one resource.
    let listeners = [address(1, 7002), address(2, 7002)];
    let mut command = network.command(e2e::binary().to_str().expect("a plain path"));
    command.args(["proxy", "--to", &address(1, 7001).to_string(), "--workers", "1"]);
    for listener in listeners {
        command.args(["--listen", &format!("tcp://{listener}")]);
    }
    let mut proxy = Process::start("proxy", &mut command);
    proxy.wait_for_line(PATIENCE, |line| (line == "ready").then_some(()));
    let mut crowd = Crowd::start(&network, &listeners);
    until("the service is there", || (crowd.says("open") == "served").then_some(()));
    assert_eq!(crowd.says("close"), "closed");

    let outcomes: Vec<_> = (0..15).map(|_| crowd.says("open")).collect();
    let served = outcomes.iter().filter(|outcome| *outcome == "served").count();
    assert!(
        outcomes.iter().all(|outcome| outcome == "served" || outcome == "ConnectionReset"),
        "{outcomes:?}"
    );
    assert!((5..=10).contains(&served), "ten ports: {outcomes:?}");
    for _ in 0..served {
        assert_eq!(crowd.says("close"), "closed");
    }
    for n in 0..5 {
        let ((), took) = within(RECOVERS_WITHIN, "a connection is served again", || {
            (crowd.says("open") == "served").then_some(())
        });
        println!("connection {n} was served {took:?} after there were ports again");
    }
    assert!(proxy.is_running());
}

/// `crowd`, and how many things it was told.
struct Crowd(Process, u32);

impl Crowd {
    fn start(network: &Namespace, listeners: &[SocketAddr]) -> Self {
        let mut command: Command = network.command(env!("CARGO_BIN_EXE_crowd"));
        command.args(listeners.iter().map(ToString::to_string));
        Self(Process::start("crowd", &mut command), 0)
    }

    /// Tells it to do something, and gives what came of it.
    fn says(&mut self, what: &str) -> String {
        self.1 += 1;
        let name = format!("n{}", self.1);
        self.0.write(&format!("{what} {name}\n"));
        self.0.wait_for_line(PATIENCE, |line| Some(line.strip_prefix(&format!("{name} "))?.to_owned()))
    }
}
