//! Utilization that the balancer fetches: from real exporters, HAProxy's agent-check, an ORCA server that is none of ours; and
//! from resources that mean harm.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use e2e::{
    Backend, Balancer, BalancerConfig, Ended, Exporter, Manners, MariaDb, POOL, Postgres, Process,
    PythonOrca, Service, SqlClient, Text, ask, trimtab, until, write_utilization, write_whole,
};
use serde_json::Value;

/// `trimtab register`, whatever comes of it.
fn try_register(balancer: &Balancer, id: &str, address: SocketAddr, flags: &[&str]) -> Ended {
    let (control, address) = (format!("http://{}", balancer.control()), address.to_string());
    let line = ["register", "--control", &control, "--pool", POOL, "--id", id, "--address", &address];
    trimtab(&[&line, flags].concat())
}

/// `trimtab register`, which must succeed; gives what it printed.
#[track_caller]
fn register(balancer: &Balancer, id: &str, address: SocketAddr, flags: &[&str]) -> String {
    let ended = try_register(balancer, id, address, flags);
    assert_eq!(ended.code, Some(0), "register {id}: {}", ended.stderr);
    ended.stdout
}

/// A value of a resource by its path in `trimtab resources -o json`.
fn of(balancer: &Balancer, id: &str, path: &str) -> Value {
    let resources = balancer.resources();
    resources.get(id).and_then(|resource| resource.pointer(path)).cloned().unwrap_or(Value::Null)
}

fn number(balancer: &Balancer, id: &str, path: &str) -> f64 {
    of(balancer, id, path).as_f64().unwrap_or(f64::NAN)
}

/// What `explain` notes about a resource.
fn notes(balancer: &Balancer, id: &str) -> String {
    let explained = balancer.ask(&["explain", POOL]);
    let candidates = explained["candidates"].as_array().expect("candidates").clone();
    candidates
        .iter()
        .find(|candidate| candidate["id"] == id)
        .map(|c| c["notes"].to_string())
        .unwrap_or_default()
}

fn pulls(balancer: &Balancer, source: &str, result: &str) -> f64 {
    balancer.metrics().sum("trimtab_reports_total", &[("source", source), ("result", result)])
}

#[test]
fn node_exporter_by_its_recipe() {
    let exporter = Exporter::node();
    let balancer = Balancer::start(BalancerConfig::default());
    let url = format!("http://{}/metrics", exporter.address());
    let flags = ["--script", &url, "--script-recipe", "node_exporter", "--script-interval", "1s"];
    let said = register(&balancer, "host", exporter.address(), &flags);
    assert!(said.contains("host registered") && said.contains("utilization script: accepted"), "{said}");

    let memory =
        exporter.value("node_memory_MemAvailable_bytes") / exporter.value("node_memory_MemTotal_bytes");
    let pulled = number(&balancer, "host", "/utilization/memory");
    assert!((pulled - (1.0 - memory)).abs() < 0.2, "{pulled} is not near 1 - {memory}");
    let cache = number(&balancer, "host", "/utilization/os_cache");
    assert!((0.0..=1.0).contains(&cache), "{cache}");
    // Rates need two pages.
    for dimension in ["cpu", "pressure_cpu", "pressure_io", "pressure_memory"] {
        until(&format!("{dimension} is known"), || {
            let value = number(&balancer, "host", &format!("/utilization/{dimension}"));
            (value >= 0.0 && (dimension != "cpu" || value > 0.0)).then_some(())
        });
    }
    until("it is fetched again and again", || (pulls(&balancer, "http", "accepted") >= 4.0).then_some(()));
    assert!(number(&balancer, "host", "/lease_left_seconds") > 50.0, "each renews the lease");
    assert!(number(&balancer, "host", "/report_age_seconds") < 30.0);
    assert_eq!(pulls(&balancer, "push", "accepted"), 0.0);
    assert!(notes(&balancer, "host").contains("utilization script (http): accepted"));
}

#[test]
fn postgres_exporter_by_its_recipe_beside_an_agent_that_says_only_whether_it_answers() {
    let mut postgres = Postgres::start();
    let exporter = Exporter::postgres(postgres.address());
    // The exporter has an address of its own here.
    let balancer = Balancer::start(BalancerConfig {
        control_pull: format!("allow = [\"{}\"]", exporter.address().ip()),
        ..BalancerConfig::default()
    });
    let url = format!("http://{}/metrics", exporter.address());
    let flags = ["--script", &url, "--script-recipe", "postgres_exporter", "--script-interval", "1s"];
    let _agent = balancer.agent("pg", postgres.address(), &flags);
    let connections = || number(&balancer, "pg", "/utilization/connections");
    let few = until("connections are known", || Some(connections()).filter(|few| few.is_finite()));
    assert!(few < 0.1, "{few}");
    let open: Vec<SqlClient> =
        (0..40).map(|_| SqlClient::connect(postgres.address()).expect("a session")).collect();
    // 40 of 200.
    until("40 connections show", || (connections() >= 0.2).then_some(()));
    until("transactions a second show", || {
        let explained = balancer.ask(&["explain", POOL]);
        (explained["candidates"][0]["rate_ewma"].as_f64()? > 0.0).then_some(())
    });
    assert!(of(&balancer, "pg", "/utilization/cpu") == 0.0, "the agent reports no utilization of its own");
    drop(open);
    until("they are gone", || (connections() < 0.1).then_some(()));

    // What the agent says of the service counts, whatever the exporter says.
    postgres.freeze();
    postgres.kill();
    until("it is not ready", || (of(&balancer, "pg", "/state") == "not_ready").then_some(()));
}

#[test]
fn mysqld_exporter_by_its_recipe() {
    let maria = MariaDb::start();
    let exporter = Exporter::mysqld(maria.address());
    let balancer = Balancer::start(BalancerConfig::default());
    let url = format!("http://{}/metrics", exporter.address());
    let flags = ["--script", &url, "--script-recipe", "mysqld_exporter", "--script-interval", "1s"];
    let said = register(&balancer, "maria", exporter.address(), &flags);
    assert!(said.contains("utilization script: accepted"), "{said}");
    let connections = number(&balancer, "maria", "/utilization/connections");
    // Of 151 by default; the exporter's own is one.
    assert!(connections > 0.0 && connections < 0.1, "{connections}");
    until("questions a second show", || {
        let explained = balancer.ask(&["explain", POOL]);
        (explained["candidates"][0]["rate_ewma"].as_f64()? > 0.0).then_some(())
    });
}

#[test]
fn agent_check_and_all_its_words() {
    let check = Text::agent_check("up ready 100%");
    let other = Service::start("other", Manners::Good);
    let balancer = Balancer::start(BalancerConfig::default());
    let script = format!("agent-check://{}", check.address());
    register(&balancer, "checked", check.address(), &["--script", &script, "--script-interval", "1s"]);
    // Calm, whatever else runs on this machine: weights of a saturated pool are held.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let calm = folder.path().join("calm");
    write_utilization(&calm, 0.3);
    let calm = calm.to_str().expect("a plain path");
    let _agent = balancer.agent("other", other.address(), &["--utilization-file", calm]);
    until("both are there", || (balancer.ready_resources() == 2).then_some(()));

    let says = |line: &str, what: &str, path: &str, holds: &dyn Fn(&Value) -> bool| {
        check.say(line);
        balancer.admin(&["pull", "checked"]);
        until(&format!("{line:?}: {what}"), || holds(&of(&balancer, "checked", path)).then_some(()));
    };
    let is = |wanted: &'static str| move |state: &Value| state == wanted;
    says("25%", "a quarter of its weight", "/share", &|share| share.as_f64().is_some_and(|s| s < 0.35));
    says("weight:3", "three times its weight", "/share", &|share| share.as_f64().is_some_and(|s| s > 0.55));
    says("drain", "no new flows", "/state", &is("not_ready"));
    says("up", "up does not end a drain", "/state", &is("not_ready"));
    says("ready", "ready does", "/state", &is("ready"));
    says("maint", "no new flows", "/state", &is("not_ready"));
    says("ready", "again", "/state", &is("ready"));
    for word in ["down", "fail", "stopped"] {
        says(&format!("{word}\t#disk is full"), "no new flows", "/state", &is("not_ready"));
        assert!(notes(&balancer, "checked").contains("#disk is full"));
        says("ready", "ready does not heal", "/state", &is("not_ready"));
        says("up,100%", "up does", "/state", &is("ready"));
    }
    says("0%", "a weight of nothing", "/state", &is("not_ready"));
    says("100% maxconn:1", "back", "/state", &is("ready"));
    says("up", "its limit", "/flows_max", &|limit| limit == 1);

    check.say("HTTP/1.1 200 OK");
    let said = balancer.admin(&["pull", "checked"]);
    assert!(said.contains("refused: agent-check: \"HTTP/1.1\" is none of"), "{said}");
    assert_eq!(of(&balancer, "checked", "/state"), "ready", "it changes nothing");
}

#[test]
fn agent_check_of_socat() {
    let address = e2e::loopback();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let answer = folder.path().join("answer.sh");
    write_whole(&answer, "read word\necho \"down #$word\"\n");
    let listen = format!("TCP-LISTEN:{},bind={},fork,reuseaddr", address.port(), address.ip());
    let program = format!("EXEC:sh {}", answer.display());
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "socat", &listen, &program]);
    let _socat = Process::start("socat", &mut command);
    until("socat answers", || e2e::connect(address).ok());
    let balancer = Balancer::start(BalancerConfig::default());
    let script = format!("agent-check://{address}");
    let said = register(&balancer, "a", address, &["--script", &script, "--script-send", "hello"]);
    assert!(said.contains("utilization script: accepted: down ready #hello"), "{said}");
    assert_eq!(of(&balancer, "a", "/state"), "not_ready");
}

#[test]
fn orca_of_grpcio() {
    let mut orca = PythonOrca::start(0.75);
    let balancer = Balancer::start(BalancerConfig::default());
    let script = format!("orca://{}", orca.address());
    let said = register(&balancer, "py", orca.address(), &["--script", &script, "--script-interval", "1s"]);
    assert!(said.contains("utilization script: accepted"), "{said}");
    let value = |dimension: &str| number(&balancer, "py", &format!("/utilization/{dimension}"));
    assert_eq!([value("cpu"), value("memory"), value("queue")], [0.75, 0.25, 0.5]);
    orca.say(0.5);
    until("the stream goes on", || (value("cpu") == 0.5).then_some(()));
    until("many came by it", || (pulls(&balancer, "orca", "accepted") >= 4.0).then_some(()));
    orca.process().kill();
    until("its end is noticed", || notes(&balancer, "py").contains("(orca): failed").then_some(()));
    assert!(pulls(&balancer, "orca", "failed") >= 1.0);
}

#[test]
fn by_schedule_by_flows_and_when_an_administrator_asks() {
    let service = Service::start("flows", Manners::Good);
    let pages: [Text; 2] =
        std::array::from_fn(|_| Text::http(r#"{"cpu": 0.5, "labels": {"role": "writer"}}"#));
    let balancer = Balancer::start(BalancerConfig {
        control_pull: format!("allow = [\"{}\"]", pages[1].address().ip()),
        ..BalancerConfig::default()
    });
    let [scheduled, by_flows] = [0, 1].map(|n| format!("http://{}/", pages[n].address()));
    let flags = ["--script", &scheduled, "--script-schedule", "*/2 * * * * *"];
    register(&balancer, "scheduled", pages[0].address(), &flags);
    balancer.admin(&["drain", "scheduled"]);
    let flags = ["--script", &by_flows, "--script-interval", "1h", "--script-after-flows", "10"];
    register(&balancer, "by-flows", service.address(), &flags);
    let total = |id: &str| {
        let script = |resource: &Value| resource["utilization_script"]["executions_total"].as_u64();
        script(&balancer.resources()[id]).expect("a count")
    };
    assert_eq!(total("by-flows"), 1, "within registration");
    assert_eq!(of(&balancer, "by-flows", "/labels/role"), "writer");
    until("the schedule is followed", || (total("scheduled") >= 3).then_some(()));

    let flows =
        |count: usize| (0..count).for_each(|_| assert_eq!(ask(balancer.listener()).unwrap(), "flows"));
    flows(9);
    pages[1].say(r#"{"cpu": 0.9}"#);
    let said = balancer.admin(&["pull", "by-flows"]);
    assert!(said.contains("by-flows: accepted") && said.contains("cpu 0.900"), "{said}");
    assert_eq!(total("by-flows"), 2, "an administrator asked");
    flows(10);
    until("ten flows bring it about", || (total("by-flows") == 3).then_some(()));

    // The same again renews, and executes nothing.
    let again = register(&balancer, "by-flows", service.address(), &flags);
    assert!(again.contains("was registered already"), "{again}");
    assert_eq!(total("by-flows"), 3);
    let none = trimtab(&["pull", "nobody", "--control", &format!("http://{}", balancer.control())]);
    assert_eq!((none.code, none.stderr.contains("there is no resource nobody")), (Some(1), true));
    assert_eq!(balancer.admin(&["deregister", "by-flows"]), "by-flows is deregistered\n");
    assert!(!balancer.resources().contains_key("by-flows"));
}

#[test]
fn a_mapping_of_ones_own_and_a_script_that_fails_for_a_while() {
    let page = Text::http("queue_length{queue=\"a\"} 30\nqueue_length{queue=\"b\"} 20\nqueue_max 100\n");
    let balancer = Balancer::start(BalancerConfig::default());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mapping = folder.path().join("mapping");
    write_whole(&mapping, "# how full it is\nutilization.queue = sum(queue_length) / queue_max\n");
    let url = format!("http://{}/metrics?token=secret", page.address());
    let file = mapping.to_str().expect("a plain path");
    let flags = ["--script", &url, "--script-mapping", file, "--script-interval", "1s"];
    register(&balancer, "q", page.address(), &flags);
    assert_eq!(number(&balancer, "q", "/utilization/queue"), 0.5);

    page.say("<html>We are sorry.</html>");
    until("it is named in explain", || {
        notes(&balancer, "q").contains("refused 2 times in a row").then_some(())
    });
    assert!(notes(&balancer, "q").contains("line 1 of the page is no metric"));
    assert!(pulls(&balancer, "http", "refused") >= 2.0);
    assert_eq!(of(&balancer, "q", "/state"), "ready", "its lease goes on for a minute");
    page.say("queue_length 10\nqueue_max 100\n");
    until("it is fetched again", || (number(&balancer, "q", "/utilization/queue") == 0.1).then_some(()));
    let all = balancer.ask(&["resources"]).to_string() + &balancer.ask(&["explain", POOL]).to_string();
    assert!(!all.contains("secret"), "{all}");
}

/// A server that answers by the path that is asked for, in ways that no exporter should.
struct Villain {
    backend: Backend,
    /// Requests that it got.
    asked: Arc<AtomicUsize>,
    /// Bytes that anybody took of its endless answers.
    given: Arc<AtomicU64>,
}

impl Villain {
    fn start(elsewhere: SocketAddr) -> Self {
        let (asked, given) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let (count, bytes) = (Arc::clone(&asked), Arc::clone(&given));
        let backend = Backend::start(move |mut stream| {
            let mut request = [0; 64];
            let Ok(length) = stream.read(&mut request) else { return };
            count.fetch_add(1, Relaxed);
            let request = String::from_utf8_lossy(&request[..length]).into_owned();
            let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
            let mut say = |text: &str| stream.write_all(text.as_bytes());
            let _ = match path.as_str() {
                "/redirect" => say(&format!(
                    "HTTP/1.1 302 Found\r\nLocation: http://{elsewhere}/\r\nContent-Length: 0\r\n\r\n"
                )),
                "/gigabyte" => say("HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n"),
                "/gzip" => say("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"),
                _ => say("HTTP/1.1 200 OK\r\n\r\n"),
            };
            if path == "/slow" {
                // A byte now and then, for as long as anybody listens.
                while stream.write_all(b"\n").is_ok() {
                    std::thread::sleep(Duration::from_millis(100));
                }
            } else if path == "/endless" || path == "/gigabyte" {
                let line = b"metric_that_nobody_wants{of=\"nothing\"} 1\n".repeat(250);
                while stream.write_all(&line).is_ok() {
                    bytes.fetch_add(line.len() as u64, Relaxed);
                }
            }
        });
        Self { backend, asked, given }
    }
}

#[test]
fn a_malicious_resource_is_refused_or_cut_and_disturbs_nobody() {
    let secret = Text::http(r#"{"cpu": 0.1}"#);
    let villain = Villain::start(secret.address());
    let at = villain.backend.address();
    let good = Text::http(r#"{"cpu": 0.5}"#);
    let balancer =
        Balancer::start(BalancerConfig { control_pull: "at_once = 4".into(), ..BalancerConfig::default() });
    let good_script = format!("http://{}/", good.address());
    register(&balancer, "good", good.address(), &["--script", &good_script, "--script-interval", "1s"]);

    // Refused with the registration: nothing is asked there at all.
    let [control, http] = [balancer.control(), balancer.config().http];
    for (url, address, why) in [
        ("http://169.254.169.254/latest/meta-data/".to_owned(), at, "link-local and metadata addresses"),
        ("http://[::ffff:169.254.169.254]/".to_owned(), at, "link-local and metadata addresses"),
        (
            "http://169.254.169.254/".to_owned(),
            "169.254.169.254:80".parse().unwrap(),
            "link-local and metadata",
        ),
        (format!("http://{control}/"), control, "which is this balancer's own"),
        (format!("http://{http}/metrics"), http, "which is this balancer's own"),
        (format!("orca://{control}"), control, "which is this balancer's own"),
        (format!("http://{}/", secret.address()), at, "another host than the resource's own"),
        (format!("agent-check://{}", secret.address()), at, "another host than the resource's own"),
        ("http://2130706433/".to_owned(), at, "the URL is not of the form"),
        ("http://a@127.0.0.1/".to_owned(), at, "a user or a password"),
        ("file:///etc/passwd".to_owned(), at, "is no utilization script"),
    ] {
        let ended = try_register(&balancer, "bad", address, &["--script", &url]);
        assert!(ended.stderr.contains(why), "{url}: {ended:?}");
        assert_ne!(ended.code, Some(0), "{url}");
    }
    assert_eq!(balancer.resources().len(), 1);

    // A name is looked up, and its address judged; it is registered, and gets no report.
    let named = format!("http://localhost:{}/", control.port());
    let said = register(&balancer, "named", at, &["--script", &named]);
    assert!(said.contains("utilization script: refused") && said.contains("another host"), "{said}");

    // What answers badly is cut.
    let before = (pulls(&balancer, "http", "accepted"), Instant::now());
    let paths = [
        ("redirect", "redirects are not followed"),
        ("gigabyte", "the answer is longer than 65536 bytes: it was cut off"),
        ("gzip", "nothing is decompressed"),
        ("endless", "the answer is longer than 65536 bytes: it was cut off"),
        ("slow", "no whole answer within 2s"),
    ];
    for (path, _) in paths {
        let url = format!("http://{at}/{path}");
        register(&balancer, path, at, &["--script", &url, "--script-interval", "1s"]);
    }
    // It speaks neither of these.
    for (id, script) in [("h2", format!("orca://{at}")), ("line", format!("agent-check://{at}"))] {
        register(&balancer, id, at, &["--script", &script]);
        until(&format!("{id} fails"), || {
            notes(&balancer, id).contains("failed 1 times in a row").then_some(())
        });
    }
    // More slow ones than may be executed at once.
    for n in 0..6 {
        let url = format!("http://{at}/slow");
        register(&balancer, &format!("slow{n}"), at, &["--script", &url, "--script-interval", "1s"]);
    }
    for (path, why) in paths {
        until(&format!("{path}: {why}"), || notes(&balancer, path).contains(why).then_some(()));
    }
    until("an endless page of metrics is cut, too", || {
        let url = format!("http://{at}/endless");
        let flags = ["--script", &url, "--script-recipe", "node_exporter"];
        let said = register(&balancer, &format!("page{}", villain.asked.load(Relaxed)), at, &flags);
        said.contains("the page is longer than 1048576 bytes").then_some(())
    });
    // Each was asked a few times, and each time at most some socket buffers more than a page were taken.
    let (asked, given) = (villain.asked.load(Relaxed), villain.given.load(Relaxed));
    assert!(given < asked as u64 * (32 << 20), "{given} bytes in {asked} answers");
    assert!(pulls(&balancer, "http", "accepted") > before.0);

    // The good one goes on: it waits for its turn behind slow ones for seconds at most, and is never starved.
    for _ in 0..3 {
        let count = pulls(&balancer, "http", "accepted");
        until("the good one's script is executed", || {
            (pulls(&balancer, "http", "accepted") > count).then_some(())
        });
    }
    let age = number(&balancer, "good", "/report_age_seconds");
    assert!(age < 30.0, "{age} s, after {:?}", before.1.elapsed());
    assert!(pulls(&balancer, "http", "refused") >= 4.0 && pulls(&balancer, "http", "failed") >= 1.0);
}
