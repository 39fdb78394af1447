//! What nobody should send, write or configure: each has a clear error, or an outcome that is counted.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use api::orca::OrcaLoadReport;
use api::v1::registration_service_client::RegistrationServiceClient;
use api::v1::report_response::Event;
use api::v1::{RegisterRequest, ReportRequest, Resource};
use e2e::{
    Backend, Balancer, BalancerConfig, Ended, PATIENCE, Process, connect, descriptors, is_reset, loopback,
    reset, trimtab, trimtab_command, until,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

/// Writes a configuration and runs `serve` and `check` with it: both must say the same, and end alike.
fn refused(text: &str) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("trimtab.toml");
    std::fs::write(&file, text).expect("a file in our own folder");
    let file = file.to_str().expect("a plain path");
    let checked = trimtab(&["check", "-c", file]);
    let served = trimtab(&["serve", "-c", file]);
    assert_eq!(served, checked, "both say the same");
    assert_eq!((served.code, served.stdout.as_str()), (Some(78), ""), "{}", served.stderr);
    served.stderr.replace(file, "FILE")
}

#[test]
fn a_malformed_configuration_says_every_error_and_binds_nothing() {
    // Held: were anything bound before all is parsed, that would fail with another error than the file's.
    let held = TcpListener::bind(loopback()).expect("a free address");
    let address = held.local_addr().expect("a bound socket has an address");
    let text = format!(
        "[control]\n\
         listen = \"{address}\"\n\
         lisen = \"127.0.0.1:7400\"\n\
         [http]\n\
         listen = \"127.0.0.1\"\n\
         [dataplane]\n\
         workers = -1\n\
         idle_timeout = \"1 fortnight\"\n\
         engine = \"epol\"\n\
         [[pool]]\n\
         name = \"sql\"\n\
         policy = \"adaptiv\"\n\
         [[listener]]\n\
         bind = \"tcp://{address}\"\n\
         pool = \"sqll\"\n\
         [[listener]]\n\
         pool = \"sql\"\n"
    );
    let said = refused(&text);
    println!("{said}");
    let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("FILE:")).collect();
    let hints = said.lines().filter(|line| line.trim_start().starts_with("hint: ")).count();
    assert_eq!(errors.len(), hints, "a hint for each:\n{said}");
    for (line, word) in [
        (3, "lisen"),
        (5, "127.0.0.1"),
        (7, "workers"),
        (8, "idle_timeout"),
        (9, "epol"),
        (12, "adaptiv"),
        (14, "taken"),
        (15, "sqll"),
        (16, "bind"),
    ] {
        let place = format!("FILE:{line}:");
        let found = errors.iter().any(|error| error.starts_with(&place) && error.contains(word));
        assert!(found, "line {line} says {word}:\n{said}");
    }
    for error in &errors {
        let column = error.split(':').nth(2).and_then(|column| column.parse::<usize>().ok());
        assert!(column.is_some_and(|column| column >= 1), "a column: {error}");
    }
    for meant in ["did you mean", "adaptive", "\"sql\""] {
        assert!(said.contains(meant), "{meant}:\n{said}");
    }
}

#[test]
fn a_file_that_is_no_toml_or_not_there() {
    let said = refused("[control\nlisten = 7400\n");
    assert!(said.starts_with("FILE:1:"), "{said}");
    let said = refused("");
    assert!(said.contains("listener") && said.contains("hint: "), "{said}");
    let missing = trimtab(&["serve", "-c", "/nowhere/trimtab.toml"]);
    assert_eq!(missing.code, Some(66), "{}", missing.stderr);
    assert!(missing.stderr.contains("/nowhere/trimtab.toml"), "{}", missing.stderr);
}

#[test]
fn a_port_in_use_says_which() {
    let held = TcpListener::bind(loopback()).expect("a free address");
    let address = held.local_addr().expect("a bound socket has an address");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("trimtab.toml");
    type Take = fn(&mut BalancerConfig, SocketAddr);
    let takes: [(&str, Take); 3] = [
        ("listener", |config, address| config.listener = address),
        ("control", |config, address| config.control = address),
        ("http", |config, address| config.http = address),
    ];
    for (what, take) in takes {
        let mut config = BalancerConfig::default();
        take(&mut config, address);
        std::fs::write(&file, config.text()).expect("a file in our own folder");
        let Ended { code, stdout, stderr } = trimtab(&["serve", "-c", file.to_str().expect("a plain path")]);
        assert_eq!((code, stdout.as_str()), (Some(71), ""), "{what}: {stderr}");
        let clear = |line: &str| {
            line.contains("error:") && line.contains(&address.to_string()) && line.contains(what)
        };
        assert!(stderr.lines().any(clear), "{what} in use: {stderr}");
        // Nothing is kept of what could be bound.
        for other in [config.listener, config.control, config.http] {
            assert!(other == address || TcpListener::bind(other).is_ok(), "{other} is free again");
        }
    }
    let proxied = trimtab(&["proxy", "--listen", &format!("tcp://{address}"), "--to", "127.0.0.1:1"]);
    assert_eq!(proxied.code, Some(71), "{}", proxied.stderr);
    assert!(proxied.stderr.contains(&address.to_string()), "{}", proxied.stderr);
}

#[test]
fn an_agent_says_what_is_wrong_with_it() {
    for (arguments, word) in [
        (["--pool", "sql", "--address", "0.0.0.0:5432"], "0.0.0.0"),
        (["--pool", "sql", "--address", "10.0.0.1:0"], "port 0"),
        (["--pool", "sql", "--address", "example"], "example"),
        (["--pool", "s q l", "--address", "10.0.0.1:1"], "pool"),
    ] {
        let ended = trimtab(&[&["agent"], &arguments[..]].concat());
        assert_eq!(ended.code, Some(64), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(word), "{arguments:?}: {}", ended.stderr);
    }

    // The balancer may get the pool later: the agent says what is wrong, once, and stays.
    let backend = Backend::start(drop);
    let balancer = Balancer::start(BalancerConfig::default());
    let (control, address) = (format!("http://{}", balancer.control()), backend.address().to_string());
    let arguments = ["agent", "--pool", "nosql", "--address", &address, "--balancer", &control];
    let mut agent = Process::start("agent", &mut trimtab_command(&arguments));
    let said = agent.wait_for_error_line(PATIENCE, |line| line.contains("nosql").then(|| line.to_owned()));
    println!("{said}");
    assert!(said.contains("ERROR") && said.contains("no pool"), "{said}");
    assert!(agent.is_running());
    assert!(balancer.resources().is_empty());
}

/// A resource that is told to the balancer by hand.
fn registration(id: &str, address: &str) -> RegisterRequest {
    let resource =
        Resource { id: id.into(), pool: e2e::POOL.into(), address: address.into(), ..Resource::default() };
    RegisterRequest { resource: Some(resource), incarnation: 1, ..RegisterRequest::default() }
}

fn report(id: &str, sequence: u64, cpu: f64) -> ReportRequest {
    let utilization = OrcaLoadReport { cpu_utilization: cpu, ..OrcaLoadReport::default() };
    ReportRequest {
        id: id.into(),
        incarnation: 1,
        sequence,
        utilization: Some(utilization),
        ..ReportRequest::default()
    }
}

#[tokio::test]
async fn messages_that_make_no_sense_are_refused_with_a_reason() {
    let balancer = Balancer::start(BalancerConfig::default());
    let control = format!("http://{}", balancer.control());
    let mut client = RegistrationServiceClient::connect(control).await.expect("control answers");

    for (id, address, word) in [
        ("pg1", "0.0.0.0:5432", "0.0.0.0"),
        ("pg1", "10.0.0.1:0", "port"),
        ("pg1", "", "address"),
        ("", "10.0.0.1:1", "id"),
        ("a b", "10.0.0.1:1", "id"),
    ] {
        let status = client.register(registration(id, address)).await.expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{id:?} {address:?}: {status}");
        assert!(status.message().contains(word), "{id:?} {address:?}: {status}");
    }
    let mut unknown = registration("pg1", "10.0.0.1:1");
    unknown.resource.as_mut().expect("set above").pool = "nosql".into();
    let status = client.register(unknown).await.expect_err("refused");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("nosql"), "{status}");

    let mut huge = registration("pg1", "10.0.0.1:1");
    huge.resource.as_mut().expect("set above").version = "x".repeat(10_000_000);
    let status = client.register(huge).await.expect_err("10 MB are too much");
    println!("10 MB: {status}");
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status}");
    assert!(balancer.resources().is_empty());

    client.register(registration("pg1", "10.0.0.1:1")).await.expect("a good one, on the same connection");
    let (reports, stream) = tokio::sync::mpsc::channel(4);
    reports.send(report("pg1", 1, f64::NAN)).await.expect("room");
    let mut events = client.report(ReceiverStream::new(stream)).await.expect("a stream").into_inner();
    for (sequence, cpu, good) in
        [(1, f64::NAN, false), (2, -1.0, false), (3, f64::INFINITY, false), (4, 0.5, true)]
    {
        if sequence > 1 {
            reports.send(report("pg1", sequence, cpu)).await.expect("room");
        }
        let event = events.message().await.expect("the stream goes on").expect("an ack");
        let Some(Event::Ack(ack)) = event.event else { panic!("not an ack: {event:?}") };
        println!("cpu {cpu}: {:?}", ack.refused);
        assert_eq!((ack.sequence, ack.refused.is_empty()), (sequence, good), "{ack:?}");
        assert!(good || ack.refused.contains("cpu"), "{ack:?}");
    }
    let metrics = balancer.metrics();
    assert_eq!(metrics.sum("trimtab_reports_total", &[("result", "refused")]), 3.0);
    assert_eq!(metrics.sum("trimtab_reports_total", &[("result", "accepted")]), 1.0);
    assert_eq!(balancer.resources()["pg1"]["utilization"]["cpu"], 0.5);
}

#[test]
fn what_is_no_grpc_or_http_hurts_nobody() {
    let mut balancer = Balancer::start(BalancerConfig::default());
    let at_start = descriptors(balancer.process().id());
    let config = balancer.config().clone();
    let garbage: Vec<u8> = (0..=u8::MAX).cycle().take(1_000_000).collect();
    for address in [config.control, config.http] {
        for bytes in [&garbage[..], b"", b"GET / HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0; 9]]
        {
            let mut stream = connect(address).expect("it listens");
            // It may hang up before all is written.
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
    assert_eq!(balancer.probe("/readyz").map(|answer| answer.status), Some(200));
    assert!(balancer.resources().is_empty());
    let process = balancer.process().id();
    until("their descriptors are closed", || {
        (descriptors(process).sockets <= at_start.sockets).then_some(())
    });
}

/// Flows that ended for a reason.
fn closed(balancer: &Balancer, reason: &str) -> f64 {
    balancer.metrics().sum("trimtab_flows_closed_total", &[("reason", reason)])
}

#[test]
fn silent_clients_and_bad_backends_are_counted() {
    let mut balancer =
        Balancer::start(BalancerConfig { dataplane: "idle_timeout = \"1s\"".into(), ..Default::default() });

    // Nobody is there.
    let end = connect(balancer.listener()).and_then(|mut client| client.read(&mut [0]));
    assert!(is_reset(&end), "{end:?}");
    until("it is counted", || (closed(&balancer, "no_backend") == 1.0).then_some(()));

    // A client that says nothing, to a backend that says nothing.
    let silent = Backend::start(|mut stream: TcpStream| {
        // Until it is ended.
        let _ = stream.read(&mut [0]);
    });
    let agent = balancer.agent("silent", silent.address(), &[]);
    until("it is registered", || (balancer.ready_resources() == 1).then_some(()));
    let start = Instant::now();
    let mut client = connect(balancer.listener()).expect("the balancer accepts");
    let end = client.read(&mut [0]);
    let took = start.elapsed();
    println!("a silent client is ended after {took:?}: {end:?}");
    assert!(matches!(end, Ok(0)) || is_reset(&end), "{end:?}");
    assert!((Duration::from_secs(1)..Duration::from_secs(3)).contains(&took), "{took:?}");
    until("it is counted", || (closed(&balancer, "idle") == 1.0).then_some(()));
    drop((agent, silent));
    until("it is gone", || balancer.resources().is_empty().then_some(()));

    // A backend that accepts and resets.
    let resetting = Backend::start(reset);
    let mut agent = balancer.agent("resetting", resetting.address(), &[]);
    until("it is registered", || (balancer.ready_resources() == 1).then_some(()));
    let end = connect(balancer.listener()).and_then(|mut client| client.read(&mut [0]));
    assert!(is_reset(&end), "{end:?}");
    until("it is counted", || (closed(&balancer, "backend_reset") >= 1.0).then_some(()));
    agent.signal(rustix::process::Signal::TERM);
    assert_eq!(agent.wait(PATIENCE).0.code, Some(0));
    until("it left", || balancer.resources().is_empty().then_some(()));
    assert!(balancer.process().is_running());
}

#[test]
fn a_service_that_stops_gets_no_connections_and_keeps_its_registration() {
    let balancer = Balancer::start(BalancerConfig::default());
    let backend = Backend::start(|mut stream: TcpStream| {
        let _ = stream.write_all(b"hello");
    });
    let address = backend.address();
    let _agent = balancer.agent("one", address, &[]);
    until("it is registered", || (balancer.ready_resources() == 1).then_some(()));
    drop(backend);
    until("the balancer knows", || {
        let resources = balancer.resources();
        let state = &resources.get("one")?["state"];
        (state == "not_ready" || state == "down").then_some(())
    });
    let end = connect(balancer.listener()).and_then(|mut client| client.read(&mut [0]));
    assert!(is_reset(&end), "{end:?}");
}
