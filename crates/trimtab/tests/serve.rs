//! `trimtab serve` with an agent, from its start to its end, and the commands that ask it.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};

use rustix::process::Signal;
use support::{PATIENCE, Running, echo_service, echoes, eventually, listening};

mod support;

/// A balancer with the pool `sql`, everything on free ports.
struct Balancer {
    running: Running,
    lines: Vec<String>,
    _folder: tempfile::TempDir,
}

impl Balancer {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("trimtab.toml");
        let config = "[control]\nlisten = \"127.0.0.1:0\"\n[http]\nlisten = \"127.0.0.1:0\"\n[dataplane]\nworkers = 1\n\
                      [[pool]]\nname = \"sql\"\n[[listener]]\nbind = \"tcp://127.0.0.1:0\"\npool = \"sql\"\n";
        std::fs::write(&file, config).expect("a writable folder");
        let mut running = Running::start(&["serve", "-c", file.to_str().expect("UTF-8")]);
        let lines = running.until_ready();
        Self { running, lines, _folder: folder }
    }

    fn connect(&self) -> std::io::Result<TcpStream> {
        TcpStream::connect(listening(&self.lines[0]))
    }

    fn control(&self) -> &str {
        self.lines[1].strip_prefix("control ").expect(&self.lines[1])
    }

    /// Status line and body.
    fn http(&self, path: &str) -> (String, String) {
        let address = self.lines[2].strip_prefix("http http://").expect(&self.lines[2]);
        let mut stream = TcpStream::connect(address).expect("http listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout above zero");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("it reads");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("UTF-8");
        let (head, body) = text.split_once("\r\n\r\n").expect("HTTP");
        (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
    }

    fn ask(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_trimtab"))
            .args(args)
            .args(["--control", self.control()])
            .output()
            .expect("the command was built")
    }

    fn json(&self, args: &[&str]) -> serde_json::Value {
        let output = self.ask(&[args, &["-o", "json"]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn agent(&self, id: &str, address: &str) -> Running {
        Running::start(&[
            "agent",
            "--pool",
            "sql",
            "--id",
            id,
            "--address",
            address,
            "--balancer",
            self.control(),
            "--report-interval",
            "100ms",
            "--label",
            "zone=a",
            "--version-of-service",
            "15.4",
        ])
    }

    fn states(&self) -> Vec<(String, String)> {
        let resources = self.json(&["resources"]);
        let text = |value: &serde_json::Value| value.as_str().expect("a text").to_owned();
        let all = resources["resources"].as_array().expect("a list");
        all.iter().map(|resource| (text(&resource["id"]), text(&resource["state"]))).collect()
    }
}

#[test]
fn a_resource_joins_serves_is_drained_and_leaves() {
    let balancer = Balancer::start();
    assert_eq!(balancer.lines.len(), 3);
    assert!(balancer.lines[0].ends_with(" pool=sql"), "{:?}", balancer.lines);
    assert_eq!(balancer.http("/readyz"), ("HTTP/1.1 200 OK".into(), "ready\n".into()));

    let mut agent = balancer.agent("pg1", &echo_service().to_string());
    let state = |state: &str| vec![("pg1".to_owned(), state.to_owned())];
    eventually("it is registered", || balancer.states() == state("ready"));
    eventually("it gets flows", || balancer.connect().is_ok_and(|stream| echoes(&stream)));

    let resource = &balancer.json(&["resources", "--pool", "sql"])["resources"][0];
    assert_eq!((&resource["labels"]["zone"], &resource["version"]), (&"a".into(), &"15.4".into()));
    assert_eq!(resource["share"], 1.0);
    let pool = &balancer.json(&["pools"])["pools"][0];
    assert_eq!(
        (&pool["name"], &pool["policy"], &pool["resources_ready"]),
        (&"sql".into(), &"adaptive".into(), &1.into())
    );
    let listener = balancer.lines[0].trim_start_matches("listening ").trim_end_matches(" pool=sql");
    assert_eq!(pool["listeners"], serde_json::json!([listener]));
    assert_eq!(balancer.json(&["explain", "sql"])["candidates"][0]["id"], "pg1");
    assert!(balancer.http("/metrics").1.contains("trimtab_flows_opened_total{"));

    assert_eq!(balancer.json(&["drain", "pg1"])["state"], "draining");
    assert_eq!(balancer.states(), state("draining"));
    eventually("it gets no flows", || !balancer.connect().is_ok_and(|stream| echoes(&stream)));
    balancer.json(&["ready", "pg1"]);
    eventually("it gets flows again", || balancer.connect().is_ok_and(|stream| echoes(&stream)));

    agent.signal(Signal::TERM);
    assert_eq!(agent.wait(), 0);
    assert_eq!(balancer.states(), vec![]);
}

#[test]
fn an_unknown_name_is_answered_with_1() {
    let balancer = Balancer::start();
    for args in [["drain", "nobody"], ["ready", "nobody"], ["explain", "nothing"]] {
        let output = balancer.ask(&args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains(args[1]), "{args:?}: {said}");
    }
    // What answers there speaks HTTP/1.1 and is no control.
    let http = balancer.lines[2].strip_prefix("http ").expect("an address");
    let output = Command::new(env!("CARGO_BIN_EXE_trimtab")).args(["pools", "--control", http]).output();
    assert_eq!(output.expect("the command was built").status.code(), Some(69));
}

#[test]
fn it_says_that_it_drains_and_ends_with_its_flows() {
    let mut balancer = Balancer::start();
    let _agent = balancer.agent("pg1", &echo_service().to_string());
    let mut open = None;
    eventually("it gets flows", || {
        open = balancer.connect().ok().filter(echoes);
        open.is_some()
    });
    balancer.running.signal(Signal::TERM);
    eventually("it is not ready", || balancer.http("/readyz").0.contains("503"));
    eventually("nothing new is accepted", || balancer.connect().is_err());
    assert!(open.as_ref().is_some_and(echoes), "open flows go on");
    assert!(!balancer.running.has_ended());
    drop(open);
    assert_eq!(balancer.running.wait(), 0);
}

#[test]
fn every_address_in_use_is_said_with_its_key() {
    let taken: Vec<_> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    let address = |index: usize| taken[index].local_addr().expect("its address");
    let folder = tempfile::tempdir().expect("a temporary folder");
    for listener in [address(0).to_string(), "127.0.0.1:0".into()] {
        let file = folder.path().join("trimtab.toml");
        let config = format!(
            "[control]\nlisten = \"{}\"\n[http]\nlisten = \"{}\"\n[[pool]]\nname = \"sql\"\n\
             [[listener]]\nbind = \"tcp://{listener}\"\npool = \"sql\"\n",
            address(1),
            address(2)
        );
        std::fs::write(&file, config).expect("a writable folder");
        let mut serve = Running::start(&["serve", "-c", file.to_str().expect("UTF-8")]);
        assert_eq!(serve.wait(), 71);
        let said = serve.stderr();
        let listener_taken = !listener.ends_with(":0");
        assert_eq!(
            said.contains(&format!("listener.bind: cannot listen on tcp://{listener}")),
            listener_taken,
            "{said}"
        );
        for (key, index) in [("control.listen", 1), ("http.listen", 2)] {
            assert!(said.contains(&format!("{key} cannot listen on {}", address(index))), "{said}");
        }
        let errors = said.lines().filter(|line| line.starts_with("trimtab: error")).count();
        assert_eq!(errors, 2 + usize::from(listener_taken), "{said}");
    }
}
