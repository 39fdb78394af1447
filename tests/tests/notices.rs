//! Notices, as operators make them and agents act on them: who stands in, the operator's command, what is posted, what is
//! withdrawn, and what shows who has not taken one.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use e2e::{Balancer, BalancerConfig, Clients, Manners, PATIENCE, POOL, Process, Service, ask, until};
use rustix::process::Signal;
use serde_json::Value;

/// Agents that say what they hear: a line of JSON for each notice.
fn listening(folder: &Path, name: &str) -> Vec<String> {
    let told = folder.join(name);
    [
        "--report-interval".into(),
        "200ms".into(),
        "--on-notice".into(),
        // One write a line: two notices may come at once.
        format!("printf '%s\\n' \"$(cat)\" >> {}", told.display()),
    ]
    .to_vec()
}

fn told(folder: &Path, name: &str) -> Vec<Value> {
    let lines = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    let parsed = |line: &str| serde_json::from_str(line).expect("a notice is JSON");
    lines.lines().filter(|line| !line.is_empty()).map(parsed).collect()
}

fn agent(balancer: &Balancer, service: &Service, flags: &[String]) -> Process {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    balancer.agent(service.name(), service.address(), &flags)
}

fn url(balancer: &Balancer) -> String {
    format!("http://{}", balancer.control())
}

/// The newest notice of a balancer.
fn newest(balancer: &Balancer) -> Value {
    balancer.ask(&["notify", "list"])["notices"][0].clone()
}

#[track_caller]
fn wait_until_taken(balancer: &Balancer, count: u64) {
    until("the notice is taken", || {
        let notice = newest(balancer);
        (notice["taken"] == count && notice["resources"] == count).then_some(())
    });
}

#[test]
fn agents_register_with_the_alternative_before_the_balancer_is_away_and_leave_it_when_it_is_back() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let first = Balancer::start(BalancerConfig::default());
    let second = Balancer::start(BalancerConfig::default());
    let services = [Service::start("one", Manners::Good), Service::start("two", Manners::Good)];
    let agents: Vec<_> = services
        .iter()
        .map(|service| agent(&first, service, &listening(folder.path(), service.name())))
        .collect();
    until("both are ready", || (first.ready_resources() == 2).then_some(()));

    let alternative = url(&second);
    let began = Instant::now();
    let made = first.ask(&[
        "notify",
        "unavailable",
        "--at",
        "+4s",
        "--for",
        "1s",
        "--alternative",
        &alternative,
        "--reason",
        "a kernel",
    ]);
    assert_eq!(made["resources"], 2);
    until("both are registered with the alternative", || (second.ready_resources() == 2).then_some(()));
    println!("registered with the alternative {:?} after the notice, 4 s ahead", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(4), "before it is away");
    wait_until_taken(&first, 2);
    for name in ["one", "two"] {
        let heard = told(folder.path(), name);
        assert_eq!(heard.len(), 1, "{heard:?}");
        assert_eq!(heard[0]["kind"], "balancer_unavailable");
        assert_eq!((&heard[0]["resource"], &heard[0]["reason"]), (&name.into(), &"a kernel".into()));
        assert_eq!(heard[0]["alternatives"], serde_json::json!([alternative]));
        assert_eq!(heard[0]["lasts_seconds"], 1.0);
        assert_eq!(heard[0]["id"], made["notice"]);
    }
    assert!(ask(second.listener()).is_ok());
    // It never went: once the time is over and it has answered for a while, the stand-in is left.
    until("the alternative is left", || second.resources().is_empty().then_some(()));
    assert_eq!(first.ready_resources(), 2);
    drop(agents);
}

#[test]
fn a_balancer_that_is_told_to_stop_names_who_stands_in() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let second = Balancer::start(BalancerConfig::default());
    let further = format!("[notices]\nalternatives = [\"{}\"]\n", url(&second));
    let config = BalancerConfig { further, ..BalancerConfig::default() };
    let mut first = Balancer::start(config);
    let service = Service::start("one", Manners::Good);
    let agent = agent(&first, &service, &listening(folder.path(), "one"));
    until("it is ready", || (first.ready_resources() == 1).then_some(()));
    // Somebody is connected, so that the balancer has time to say it.
    let open = e2e::connect(first.listener()).expect("it serves");
    assert_eq!(e2e::greet(&open).expect("its name"), "one");
    first.process().signal(Signal::TERM);
    until("the resource is with the other", || (second.ready_resources() == 1).then_some(()));
    assert_eq!(told(folder.path(), "one")[0]["kind"], "balancer_leaving");
    drop(open);
    first.process().wait(PATIENCE);
    let clients = Clients::start(second.listener(), 2, Duration::from_millis(5));
    let began = Instant::now();
    // Back, and after a while the resource is with it alone again.
    first.start_again();
    first.wait_until_ready();
    until("it is back", || (first.ready_resources() == 1).then_some(()));
    until("the stand-in is left", || second.resources().is_empty().then_some(()));
    assert!(began.elapsed() >= Duration::from_secs(9), "not before it was back for a while");
    drop(clients);
    drop(agent);
}

#[test]
fn who_did_not_take_a_notice_is_seen() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let balancer = Balancer::start(BalancerConfig::default());
    let services = ["deaf", "willing", "unable"].map(|name| Service::start(name, Manners::Good));
    let report = ["--report-interval".to_owned(), "200ms".to_owned()];
    let unable =
        [&report[..], &["--on-notice".into(), "echo no unit of that name >&2; exit 5".into()]].concat();
    let agents = [
        agent(&balancer, &services[0], &report),
        agent(&balancer, &services[1], &listening(folder.path(), "willing")),
        agent(&balancer, &services[2], &unable),
    ];
    until("all are ready", || (balancer.ready_resources() == 3).then_some(()));
    for name in ["deaf", "willing", "unable"] {
        balancer.ask(&["notify", "shed", name, "--flows", "7"]);
    }
    let outcome = |name: &str| -> Option<String> {
        let all = balancer.ask(&["notify", "list"]);
        let of = all["notices"].as_array()?.iter().find(|notice| notice["to"] == name)?.clone();
        match (of["taken"].as_u64()?, of["not_taken"][0]["state"].as_str()) {
            (1, None) => Some("taken".into()),
            (0, Some(state)) if state.starts_with("failed") => Some(state.to_owned()),
            _ => None,
        }
    };
    assert_eq!(until("the willing one acted", || outcome("willing")), "taken");
    assert_eq!(told(folder.path(), "willing")[0]["flows"], 7);
    let why = until("the unable one said why", || outcome("unable"));
    assert_eq!(why, "failed: the command ended with exit status: 5: no unit of that name");
    let why = until("the deaf one said why", || outcome("deaf"));
    assert!(why.starts_with("failed: there is no --on-notice command"), "{why}");
    assert_eq!(balancer.metrics().sum("trimtab_notices_not_taken", &[]), 2.0);
    let table = balancer.admin(&["notify", "list"]);
    assert!(table.contains("not taken by unable (failed: "), "{table}");
    // Nobody acts on what is withdrawn, and those who were told are told so.
    let shed = balancer.ask(&["notify", "list"])["notices"].clone();
    let of_willing = shed.as_array().expect("notices").iter().find(|notice| notice["to"] == "willing");
    let id = of_willing.expect("its notice")["notice"].as_str().expect("an id").to_owned();
    // Taken already: there is nothing to tell anybody but that it does not hold.
    balancer.admin(&["notify", "withdraw", &id]);
    until("it hears that", || {
        let heard = told(folder.path(), "willing");
        heard.iter().any(|notice| notice["kind"] == "withdrawn" && notice["withdraws"] == id).then_some(())
    });
    drop(agents);
}

#[test]
fn a_resource_that_is_told_to_shut_down_does_so_in_its_time() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let balancer = Balancer::start(BalancerConfig::default());
    let services = [Service::start("one", Manners::Good), Service::start("two", Manners::Good)];
    let mut agents: Vec<_> = services
        .iter()
        .map(|service| agent(&balancer, service, &listening(folder.path(), service.name())))
        .collect();
    until("both are ready", || (balancer.ready_resources() == 2).then_some(()));
    let clients = Clients::start(balancer.listener(), 2, Duration::from_millis(5));
    let began = Instant::now();
    balancer.admin(&["notify", "shutdown", "one", "--at", "+2s"]);
    let (ended, _) = agents[0].wait(PATIENCE);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(began.elapsed() >= Duration::from_millis(1_900), "in its time: {:?}", began.elapsed());
    assert_eq!(balancer.resources().keys().collect::<Vec<_>>(), ["two"], "it deregistered");
    assert_eq!(told(folder.path(), "one")[0]["kind"], "shut_down");
    assert!(told(folder.path(), "two").is_empty());
    let failed: Vec<_> = clients.since(began).into_iter().filter(|asked| asked.outcome.is_err()).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

/// An HTTP server that keeps what is posted and answers as it is told.
struct Hook {
    address: SocketAddr,
    posts: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Hook {
    /// Answers each post with the next of these statuses, and with the last one from then on.
    fn start(statuses: &'static [&'static str]) -> Self {
        Self::start_at(e2e::loopback(), statuses)
    }

    fn start_at(address: SocketAddr, statuses: &'static [&'static str]) -> Self {
        let listener = TcpListener::bind(address).expect("a free address");
        let posts = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&posts);
        std::thread::spawn(move || {
            for (n, stream) in listener.incoming().flatten().enumerate() {
                let status = statuses[n.min(statuses.len() - 1)];
                let mut reader = BufReader::new(&stream);
                let (mut head, mut length) = (String::new(), 0);
                while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).unwrap_or(0) > 0 {}
                for line in head.lines() {
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().expect("a length");
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).expect("the whole body");
                let body = serde_json::from_slice(&body).expect("an event is JSON");
                kept.lock().expect("nobody panics with it").push((head, body));
                let _ =
                    write!(&stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        });
        Self { address, posts }
    }

    fn posts(&self) -> Vec<(String, Value)> {
        self.posts.lock().expect("nobody panics with it").clone()
    }
}

#[test]
fn notices_are_posted_as_cloudevents_until_one_is_taken() {
    let hook = Hook::start(&["503 Busy", "302 Elsewhere", "204 Taken"]);
    let service = Service::start("one", Manners::Good);
    let control_pull = format!("allow = [\"{}\"]", hook.address.ip());
    let config = BalancerConfig { control_pull, ..BalancerConfig::default() };
    let balancer = Balancer::start(config);
    let script = format!("http://{}/notices?key=secret", hook.address);
    let agent = balancer.agent("one", service.address(), &["--notify-url", &script]);
    // Nobody may have a balancer post wherever he likes.
    let elsewhere = format!("http://{}/", e2e::loopback());
    let other = Service::start("two", Manners::Good);
    let rogue =
        balancer.agent("two", other.address(), &["--notify-url", &elsewhere, "--on-notice", "exit 1"]);
    until("both are ready", || (balancer.ready_resources() == 2).then_some(()));
    let made = balancer.ask(&["notify", "unavailable", "--at", "+1m", "--for", "10m"]);
    let id = made["notice"].as_str().expect("an id");
    // Refused twice: a resource is not deaf for that, and a redirect leads nobody astray.
    let posts =
        until("it is posted until it is taken", || Some(hook.posts()).filter(|posts| posts.len() == 3));
    let (head, event) = &posts[0];
    assert!(posts.iter().all(|(_, again)| again == event), "each time the same event: {posts:?}");
    assert!(head.starts_with("POST /notices?key=secret HTTP/1.1\r\n"), "{head}");
    assert!(head.to_ascii_lowercase().contains("content-type: application/cloudevents+json"), "{head}");
    assert_eq!((&event["specversion"], &event["subject"]), (&"1.0".into(), &"one".into()));
    assert_eq!(event["type"], "trimtab.notice.balancer_unavailable.v1");
    assert_eq!(event["id"], format!("{id}/one"));
    assert_eq!((&event["data"]["id"], &event["data"]["lasts_seconds"]), (&id.into(), &600.0.into()));
    let state = until("who is taken, and who is not", || {
        let notice = newest(&balancer);
        (notice["taken"] == 1).then(|| notice["not_taken"].clone())
    });
    assert_eq!(state[0]["id"], "two");
    let shown = until("it shows why", || {
        let state = newest(&balancer)["not_taken"][0]["state"].as_str()?.to_owned();
        (state != "told").then_some(state)
    });
    assert!(shown.starts_with("failed: the command ended with exit status: 1"), "{shown}");
    drop(agent);
    drop(rogue);
}

#[test]
fn a_hook_where_no_script_may_point_hears_nothing() {
    let hook = Hook::start(&["202 Taken"]);
    let numbers = e2e::Text::http(r#"{"cpu": 0.3}"#);
    let control_pull = format!("allow = [\"{}\"]", numbers.address().ip());
    let config = BalancerConfig { control_pull, ..BalancerConfig::default() };
    let balancer = Balancer::start(config);
    let service = Service::start("lone", Manners::Good);
    let control = url(&balancer);
    let address = service.address().to_string();
    let script = format!("http://{}/", numbers.address());
    let notify = format!("http://{}/", hook.address);
    let registered = e2e::trimtab(&[
        "register",
        "--pool",
        POOL,
        "--id",
        "lone",
        "--address",
        &address,
        "--script",
        &script,
        "--script-interval",
        "1s",
        "--notify-url",
        &notify,
        "--control",
        &control,
    ]);
    assert_eq!(registered.code, Some(0), "{}", registered.stderr);
    until("it is ready", || (balancer.ready_resources() == 1).then_some(()));
    balancer.admin(&["notify", "unavailable", "--at", "+1m", "--for", "10m"]);
    // The hook is on another address than the resource, and nothing allows that.
    let state = until("it is refused", || {
        let state = newest(&balancer)["not_taken"][0]["state"].as_str()?.to_owned();
        state.starts_with("webhook: ").then_some(state)
    });
    assert!(state.contains("points at"), "{state}");
    assert!(hook.posts().is_empty());
}

/// A balancer with a store, in a folder.
fn with_store(folder: &Path) -> BalancerConfig {
    let further = format!("[store]\npath = {:?}\n", folder.join("trimtab.db"));
    BalancerConfig { further, ..BalancerConfig::default() }
}

/// What is listed, by the notice's id.
fn listed(balancer: &Balancer, id: &Value) -> Value {
    let all = balancer.ask(&["notify", "list"])["notices"].clone();
    let of_id = all.as_array().expect("notices").iter().find(|notice| notice["notice"] == *id);
    of_id.unwrap_or_else(|| panic!("{id} is not in {all}")).clone()
}

fn kill_and_start(balancer: &mut Balancer) {
    balancer.process().kill();
    balancer.start_again();
    balancer.wait_until_ready();
}

#[test]
fn what_was_not_taken_is_told_again_after_a_kill() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut balancer = Balancer::start(with_store(folder.path()));
    let services = [Service::start("willing", Manners::Good), Service::start("deaf", Manners::Good)];
    let willing = agent(&balancer, &services[0], &listening(folder.path(), "willing"));
    let mut flags = listening(folder.path(), "deaf");
    // Its lease outlasts what follows.
    flags[1] = "30s".into();
    let mut deaf = agent(&balancer, &services[1], &flags);
    until("both are ready", || (balancer.ready_resources() == 2).then_some(()));
    deaf.signal(Signal::STOP);

    let away =
        balancer.ask(&["notify", "unavailable", "--at", "+1h", "--for", "10m", "--reason", "a kernel"]);
    let held = balancer.ask(&["notify", "unavailable", "--at", "+2h", "--for", "10m"]);
    let (away, withdrawn) = (&away["notice"], &held["notice"]);
    let taken = |id: &Value| (listed(&balancer, id)["taken"] == 1).then_some(());
    until("the willing one has taken both", || taken(away).and_then(|()| taken(withdrawn)));
    balancer.admin(&["notify", "withdraw", withdrawn.as_str().expect("an id")]);
    // The willing one hears that as well, so that nothing is on its way.
    until("that is heard", || (told(folder.path(), "willing").len() == 3).then_some(()));
    until("that is taken", || (newest(&balancer)["taken"] == 1).then_some(()));
    // Who took what is written at once, but nobody waits for it.
    let written = || {
        let file = rusqlite::Connection::open(folder.path().join("trimtab.db")).expect("a SQLite file");
        file.busy_timeout(PATIENCE).expect("a number");
        let count = "SELECT count(*) FROM notice_outcomes WHERE taken";
        let taken: i64 = file.query_row(count, [], |row| row.get(0)).expect("a table");
        (taken == 3).then_some(())
    };
    until("it is on the disk", written);
    let before = [listed(&balancer, away), listed(&balancer, withdrawn)];
    assert_eq!(before[0]["not_taken"][0]["id"], "deaf", "{before:?}");

    kill_and_start(&mut balancer);
    for was in &before {
        let is = listed(&balancer, &was["notice"]);
        for what in ["kind", "at", "lasts_seconds", "to", "reason", "withdrawn", "resources", "taken"] {
            assert_eq!(is[what], was[what], "{what}: {is} {was}");
        }
        assert_eq!(is["not_taken"][0]["id"], "deaf", "{is}");
        assert!(is["age_seconds"].as_f64() >= was["age_seconds"].as_f64(), "{is} {was}");
    }
    until("the willing one is back", || (balancer.resources()["willing"]["state"] == "ready").then_some(()));
    deaf.signal(Signal::CONT);
    until("the other has taken it as well", || (listed(&balancer, away)["taken"] == 2).then_some(()));
    let heard = |name: &str, id: &Value| told(folder.path(), name).iter().filter(|n| n["id"] == *id).count();
    assert_eq!(heard("deaf", away), 1, "the same notice, once");
    // By now it has heard everything that it will.
    let shed = balancer.ask(&["notify", "shed", "willing", "--flows", "1"]);
    until("it is told anew", || (heard("willing", &shed["notice"]) == 1).then_some(()));
    assert_eq!((heard("willing", away), heard("willing", withdrawn)), (1, 1), "it does not act again");
    assert_eq!(listed(&balancer, withdrawn)["withdrawn"], true);
    let withdrawn = withdrawn.as_str().expect("an id");
    let again = e2e::trimtab(&["notify", "withdraw", withdrawn, "--control", &url(&balancer)]);
    assert!(again.code != Some(0) && again.stderr.contains("does not hold any more"), "{}", again.stderr);
    assert_ne!(shed["notice"], *away);
    drop(willing);
    drop(deaf);
}

#[test]
fn that_a_balancer_leaves_is_over_with_its_process() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut balancer = Balancer::start(with_store(folder.path()));
    let service = Service::start("one", Manners::Good);
    let agent = agent(&balancer, &service, &listening(folder.path(), "one"));
    until("it is ready", || (balancer.ready_resources() == 1).then_some(()));
    let open = e2e::connect(balancer.listener()).expect("it serves");
    assert_eq!(e2e::greet(&open).expect("its name"), "one");
    balancer.process().signal(Signal::TERM);
    until("it is told", || (told(folder.path(), "one").len() == 1).then_some(()));
    assert_eq!(told(folder.path(), "one")[0]["kind"], "balancer_leaving");
    drop(open);
    balancer.process().wait(PATIENCE);
    balancer.start_again();
    balancer.wait_until_ready();
    assert_eq!(balancer.ask(&["notify", "list"])["notices"], serde_json::json!([]));
    until("it is back", || (balancer.resources()["one"]["state"] == "ready").then_some(()));
    // A notice of now comes after all that it would be told from before.
    balancer.admin(&["notify", "shed", "one", "--flows", "1"]);
    wait_until_taken(&balancer, 1);
    let kinds: Vec<_> = told(folder.path(), "one").iter().map(|notice| notice["kind"].clone()).collect();
    assert_eq!(kinds, ["balancer_leaving", "shed_flows"]);
    drop(agent);
}

#[test]
fn posts_go_on_after_a_kill() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let address = e2e::loopback();
    let control_pull = format!("allow = [\"{}\"]", address.ip());
    let mut balancer = Balancer::start(BalancerConfig { control_pull, ..with_store(folder.path()) });
    let service = Service::start("one", Manners::Good);
    let notify = format!("http://{address}/");
    // Nobody is there yet.
    let agent = balancer.agent("one", service.address(), &["--notify-url", &notify]);
    until("it is ready", || (balancer.ready_resources() == 1).then_some(()));
    let made = balancer.ask(&["notify", "unavailable", "--at", "+1h", "--for", "10m"]);
    let state = |balancer: &Balancer| newest(balancer)["not_taken"][0]["state"].as_str().map(str::to_owned);
    until("a post has failed", || state(&balancer).filter(|state| state.starts_with("webhook: ")));
    kill_and_start(&mut balancer);
    let hook = Hook::start_at(address, &["204 Taken"]);
    let posts = until("it is posted", || Some(hook.posts()).filter(|posts| !posts.is_empty()));
    assert_eq!(posts[0].1["data"]["id"], made["notice"]);
    let (id, source) = (made["notice"].as_str().expect("an id"), posts[0].1["source"].as_str());
    let by = source.and_then(|source| source.strip_prefix("/trimtab/")).expect("a source");
    assert!(id.starts_with(&format!("{by}/notice-")), "another event than before: {by}, {id}");
    until("it counts as taken", || (newest(&balancer)["taken"] == 1).then_some(()));
    drop(agent);
}
