//! What outlives a balancer that is killed, and what it refuses to begin with.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::orca::OrcaLoadReport;
use api::v1::admin_service_client::AdminServiceClient;
use api::v1::registration_service_client::RegistrationServiceClient;
use api::v1::{DeregisterRequest, ListResourcesRequest, RegisterRequest, ReportRequest, Resource};
use e2e::{Balancer, BalancerConfig, Clients, Ended, Manners, POOL, Process, Service, ask, trimtab, until};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// How often the balancer is killed.
const ROUNDS: usize = 20;
/// Registrations that are begun in a second.
const RATE: u32 = 1_000;
/// Connections that they come by.
const CONNECTIONS: u32 = 4;
/// Longest answer to a list: tens of thousands of resources.
const LIST_BYTES_MAX: usize = 64 << 20;

/// A balancer with a store in a folder of its own.
struct Lab {
    balancer: Balancer,
    store: PathBuf,
    _folder: TempDir,
}

impl Lab {
    fn start(change: impl FnOnce(&mut BalancerConfig)) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = folder.path().join("trimtab.db");
        let mut config = BalancerConfig::default();
        change(&mut config);
        config.further += &format!("[store]\npath = {store:?}\n");
        Self { balancer: Balancer::start(config), store, _folder: folder }
    }

    /// `kill -9`, and another start on what is left; waits until it is ready.
    fn kill_and_start(&mut self) -> Duration {
        self.balancer.process().kill();
        self.start_again()
    }

    fn start_again(&mut self) -> Duration {
        let began = Instant::now();
        self.balancer.start_again();
        self.balancer.wait_until_ready();
        began.elapsed()
    }

    fn control(&self) -> String {
        format!("http://{}", self.balancer.control())
    }

    /// As any program sees the file.
    fn count(&self, table: &str) -> i64 {
        let file = rusqlite::Connection::open(&self.store).expect("a SQLite file");
        file.busy_timeout(e2e::PATIENCE).expect("a number");
        file.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).expect("a table")
    }

    fn states(&self) -> BTreeMap<String, String> {
        let state = |resource: &serde_json::Value| resource["state"].as_str().expect("a state").to_owned();
        self.balancer.resources().iter().map(|(id, resource)| (id.clone(), state(resource))).collect()
    }

    /// The candidate of the pool's explanation.
    fn candidate(&self, id: &str) -> serde_json::Value {
        let explained = self.balancer.ask(&["explain", POOL]);
        let candidates = explained["candidates"].as_array().expect("candidates");
        let of_id = candidates.iter().find(|candidate| candidate["id"] == id);
        of_id.unwrap_or_else(|| panic!("{id} is not in {explained}")).clone()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("an event loop")
}

fn register_request(id: &str, address: SocketAddr) -> RegisterRequest {
    let resource =
        Resource { id: id.into(), pool: POOL.into(), address: address.to_string(), ..Resource::default() };
    // Nobody reports: a lease of three hours outlasts the test.
    let report_interval = Some(prost_types::Duration { seconds: 3_600, nanos: 0 });
    RegisterRequest {
        resource: Some(resource),
        incarnation: 1,
        report_interval,
        ..RegisterRequest::default()
    }
}

async fn registered(control: &str) -> BTreeSet<String> {
    let client = AdminServiceClient::connect(control.to_owned()).await.expect("control answers");
    let mut client = client.max_decoding_message_size(LIST_BYTES_MAX);
    let request = ListResourcesRequest { pool: String::new() };
    let listed = client.list_resources(request).await.expect("a list").into_inner();
    listed.resources.into_iter().filter_map(|status| status.resource).map(|resource| resource.id).collect()
}

/// What was sent and what was answered in one round.
#[derive(Default)]
struct Round {
    sent: Mutex<HashSet<String>>,
    acknowledged: Mutex<Vec<String>>,
    count: AtomicU64,
    stop: AtomicBool,
}

/// Registers at a steady rate until the balancer is gone; each call is on its own, so that a slow one delays no other.
async fn register_until_killed(
    channel: Channel,
    connection: u32,
    round: usize,
    address: SocketAddr,
    what: Arc<Round>,
) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) * CONNECTIONS / RATE);
    for n in 0_u32.. {
        ticks.tick().await;
        if what.stop.load(Relaxed) {
            return;
        }
        let id = format!("r{round}-{connection}-{n}");
        what.sent.lock().unwrap().insert(id.clone());
        let (mut client, what) = (RegistrationServiceClient::new(channel.clone()), Arc::clone(&what));
        tokio::spawn(async move {
            match client.register(register_request(&id, address)).await {
                Ok(_) => {
                    what.acknowledged.lock().unwrap().push(id);
                    what.count.fetch_add(1, Relaxed);
                }
                Err(_) => what.stop.store(true, Relaxed),
            }
        });
    }
}

#[test]
fn killed_in_the_middle_of_registrations_twenty_times_it_forgets_none_that_was_acknowledged() {
    let mut lab = Lab::start(|_| ());
    // Nobody serves there: this is about what is remembered.
    let address = e2e::loopback();
    let runtime = runtime();
    let control = lab.control();
    let (mut sent, mut acknowledged) = (BTreeSet::new(), BTreeSet::new());
    let (mut rates, mut starts) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let what = Arc::new(Round::default());
        runtime.block_on(async {
            for connection in 0..CONNECTIONS {
                let channel = Channel::from_shared(control.clone()).expect("a URI").connect().await;
                let channel = channel.expect("control answers");
                tokio::spawn(register_until_killed(channel, connection, round, address, Arc::clone(&what)));
            }
        });
        let began = Instant::now();
        // Another moment each time: early and late in what the disk does.
        let enough = 100 + 37 * round as u64 % 400;
        until("registrations are acknowledged", || (what.count.load(Relaxed) >= enough).then_some(()));
        rates.push(what.count.load(Relaxed) as f64 / began.elapsed().as_secs_f64());
        lab.balancer.process().kill();
        what.stop.store(true, Relaxed);
        starts.push(lab.start_again());
        sent.extend(what.sent.lock().unwrap().iter().cloned());
        acknowledged.extend(what.acknowledged.lock().unwrap().iter().cloned());
        let there = runtime.block_on(registered(&control));
        let lost: Vec<_> = acknowledged.difference(&there).collect();
        assert!(
            lost.is_empty(),
            "round {round}: {} of {} are lost: {lost:?}",
            lost.len(),
            acknowledged.len()
        );
        let invented: Vec<_> = there.difference(&sent).collect();
        assert!(invented.is_empty(), "round {round}: nobody registered {invented:?}");
    }
    let slowest = starts.iter().max().expect("rounds");
    let rate = rates.iter().sum::<f64>() / rates.len() as f64;
    println!(
        "killed {ROUNDS} times at {rate:.0} registrations a second: {} acknowledged, 0 lost; slowest start {slowest:?}",
        acknowledged.len()
    );
    let whole = rusqlite::Connection::open(&lab.store).expect("a SQLite file");
    let check: String = whole.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("an answer");
    assert_eq!(check, "ok");
}

#[test]
fn resources_whose_agents_never_come_back_are_served_if_they_answer() {
    let mut lab = Lab::start(|_| ());
    let names = ["one", "two", "gone"];
    let mut services: Vec<Service> = names.iter().map(|name| Service::start(name, Manners::Good)).collect();
    let agents: Vec<Process> =
        services.iter().map(|service| lab.balancer.agent(service.name(), service.address(), &[])).collect();
    until("all are ready", || (lab.balancer.ready_resources() == 3).then_some(()));
    lab.balancer.admin(&["drain", "two"]);
    lab.balancer.admin(&["capabilities", "not-here-yet", "zone=b"]);
    lab.balancer.process().kill();
    // Agents are killed and cannot say goodbye; one service ends with its host.
    drop(agents);
    services.pop();
    lab.start_again();

    let asked = ask(lab.balancer.listener()).expect("a connection right after the start");
    assert_eq!(asked, "one");
    let state = |state: &str| state.to_owned();
    let expected = [("gone", state("down")), ("one", state("remembered")), ("two", state("draining"))];
    assert_eq!(lab.states(), expected.map(|(id, state)| (id.to_owned(), state)).into());
    let gone = lab.candidate("gone");
    let why = gone["left_out"].as_str().expect("a reason");
    assert!(why.contains("its checks fail"), "{why}");
    assert_eq!(lab.balancer.metrics().sum("trimtab_resources", &[("state", "remembered")]), 1.0);
    assert_eq!(lab.balancer.ask(&["pools"])["pools"][0]["resources_remembered"], 1);
    assert_eq!(lab.balancer.ask(&["capabilities"])["capabilities"][0]["id"], "not-here-yet");

    // An operator's change holds for one that is only remembered, too; and one whose service comes back is found.
    lab.balancer.admin(&["ready", "two"]);
    let mut seen = BTreeSet::new();
    until("both that answer are served", || {
        seen.insert(ask(lab.balancer.listener()).expect("a connection"));
        (seen == BTreeSet::from(["one".to_owned(), "two".to_owned()])).then_some(())
    });
    let address = gone["address"].as_str().expect("an address").parse().expect("an address");
    let _back = e2e::Backend::start_at(address, drop);
    until("it is connected to again", || {
        lab.candidate("gone")["left_out"].as_str()?.is_empty().then_some(())
    });
}

#[test]
fn clients_do_not_notice_a_restart_once_it_is_over() {
    let mut lab = Lab::start(|_| ());
    let services: Vec<Service> =
        ["one", "two", "three"].map(|name| Service::start(name, Manners::Good)).into();
    let _agents: Vec<Process> =
        services.iter().map(|service| lab.balancer.agent(service.name(), service.address(), &[])).collect();
    until("all are ready", || (lab.balancer.ready_resources() == 3).then_some(()));
    let clients = Clients::start(lab.balancer.listener(), 4, Duration::from_millis(5));
    until("they are served", || {
        (clients.since(Instant::now() - Duration::from_secs(1)).len() > 50).then_some(())
    });
    for _ in 0..3 {
        let took = lab.kill_and_start();
        let ready = Instant::now();
        until("agents are back", || (lab.balancer.ready_resources() == 3).then_some(()));
        until("clients have come", || (clients.since(ready).len() > 100).then_some(()));
        let failed: Vec<_> =
            clients.since(ready).into_iter().filter(|asked| asked.outcome.is_err()).collect();
        assert!(failed.is_empty(), "{failed:?}");
        println!("ready {took:?} after the start, agents back {:?} later, 0 failed", ready.elapsed());
    }
    assert_eq!(lab.count("resources"), 3, "nobody registered twice");
}

/// Reports operations until this is dropped.
struct Reporter {
    _requests: mpsc::Sender<ReportRequest>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn reporter(control: &str, id: &'static str, address: SocketAddr, operations: f64) -> Reporter {
    let mut client = RegistrationServiceClient::connect(control.to_owned()).await.expect("control answers");
    client.register(register_request(id, address)).await.expect("it registers");
    let (requests, receiver) = mpsc::channel(1);
    let reports = requests.clone();
    let task = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        for sequence in 1.. {
            ticks.tick().await;
            let utilization = OrcaLoadReport {
                cpu_utilization: 0.5,
                rps_fractional: operations,
                ..OrcaLoadReport::default()
            };
            let report = ReportRequest {
                id: id.into(),
                incarnation: 1,
                sequence,
                utilization: Some(utilization),
                ..ReportRequest::default()
            };
            if reports.send(report).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        // The answer to the call comes with the first ack.
        let Ok(answer) = client.report(ReceiverStream::new(receiver)).await else { return };
        let mut acks = answer.into_inner();
        while let Ok(Some(_)) = acks.message().await {}
    });
    Reporter { _requests: requests, task }
}

#[test]
fn history_survives_and_decides_before_anyone_reports() {
    let mut lab = Lab::start(|config| {
        config.pool = "policy = \"criteria\"\ncriteria = [\"most(operations, 1h, total)\"]".into();
    });
    let services = ["busy", "idle"].map(|name| Service::start(name, Manners::Good));
    let runtime = runtime();
    let reporters = runtime.block_on(async {
        let control = lab.control();
        [
            reporter(&control, "busy", services[0].address(), 100.0).await,
            reporter(&control, "idle", services[1].address(), 1.0).await,
        ]
    });
    let total = |lab: &Lab, id: &str| lab.candidate(id)["scores"][0]["value"].as_f64();
    until("there are four seconds of history", || (total(&lab, "busy")? > 400.0).then_some(()));
    let before = [total(&lab, "busy").expect("a score"), total(&lab, "idle").expect("a score")];
    // At any moment no more than the last second is lost: at 100 a second, 100.
    lab.balancer.process().kill();
    drop(reporters);
    lab.start_again();
    let after = [total(&lab, "busy").expect("a score"), total(&lab, "idle").expect("a score")];
    println!("operations over the last hour: {before:?} before kill -9, {after:?} after it");
    assert!(after[0] >= before[0] - 100.0 && after[0] < before[0] + 400.0, "{before:?} {after:?}");
    assert!(after[1] >= before[1] - 2.0, "{before:?} {after:?}");
    // Without history they would be alike, and get ten each; flows that are under way may send one to the other.
    let busy = (0..20).filter(|_| ask(lab.balancer.listener()).expect("a connection") == "busy").count();
    assert!(busy > 15, "{busy} of 20");
}

#[test]
fn leaving_takes_every_row() {
    let lab = Lab::start(|_| ());
    let services = ["stays", "leaves"].map(|name| Service::start(name, Manners::Good));
    let runtime = runtime();
    let control = lab.control();
    let reporters = runtime.block_on(async {
        [
            reporter(&control, "stays", services[0].address(), 5.0).await,
            reporter(&control, "leaves", services[1].address(), 5.0).await,
        ]
    });
    until("both have history", || {
        (lab.count("(SELECT DISTINCT resource FROM history)") == 2 && lab.count("estimates") == 2)
            .then_some(())
    });
    drop(reporters);
    let request = DeregisterRequest { id: "leaves".into(), incarnation: 1 };
    let removed = runtime.block_on(async {
        let mut client = RegistrationServiceClient::connect(control).await.expect("control answers");
        client.deregister(request).await.expect("it leaves").into_inner().removed
    });
    assert!(removed);
    // It is answered when the rows are gone, and nothing that was under way brings them back.
    for _ in 0..5 {
        for table in ["resources", "addresses", "estimates", "(SELECT DISTINCT resource FROM history)"] {
            assert_eq!(lab.count(table), 1, "{table}");
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// Tries to start a balancer on this file, which must be refused; gives what it says.
fn refused(store: &Path) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("trimtab.toml");
    let config =
        BalancerConfig { further: format!("[store]\npath = {store:?}\n"), ..BalancerConfig::default() };
    std::fs::write(&file, config.text()).expect("a file in our own folder");
    let Ended { code, stderr, stdout } = trimtab(&["serve", "-c", file.to_str().expect("a plain path")]);
    assert_eq!(code, Some(71), "EX_OSERR: {stdout}{stderr}");
    assert!(!stdout.contains("ready"), "{stdout}");
    stderr
}

#[test]
fn a_store_that_cannot_be_trusted_is_refused_with_what_to_do() {
    let mut lab = Lab::start(|_| ());
    let said = refused(&lab.store);
    assert!(said.contains("belongs to another balancer that runs now"), "{said}");
    assert!(said.contains("stop the other, or give this one a path of its own"), "{said}");
    let service = Service::start("one", Manners::Good);
    let agent = lab.balancer.agent("one", service.address(), &[]);
    until("it is ready", || (lab.balancer.ready_resources() == 1).then_some(()));
    lab.balancer.process().kill();
    drop(agent);
    let folder = lab.store.parent().expect("a folder");
    // With what is in the log, as a backup has it.
    rusqlite::Connection::open(&lab.store)
        .and_then(|file| file.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())))
        .expect("a SQLite file");
    let whole = std::fs::read(&lab.store).expect("a file");

    let newer = folder.join("newer.db");
    std::fs::write(&newer, &whole).expect("a file");
    let connection = rusqlite::Connection::open(&newer).expect("a SQLite file");
    connection.pragma_update(None, "user_version", 1_000).expect("a number");
    drop(connection);
    let said = refused(&newer);
    assert!(said.contains("is of a newer version of trimtab (its layout is 1000"), "{said}");
    assert!(said.contains("Run that version again"), "{said}");

    let corrupt = folder.join("corrupt.db");
    let mut bytes = whole.clone();
    bytes[4096..8192].fill(0xA5);
    std::fs::write(&corrupt, &bytes).expect("a file");
    let said = refused(&corrupt);
    assert!(said.contains("is damaged, and is left as it is") && said.contains("Restore a backup"), "{said}");
    assert_eq!(std::fs::read(&corrupt).expect("a file"), bytes);

    let foreign = folder.join("foreign.db");
    std::fs::write(&foreign, "dear diary").expect("a file");
    let said = refused(&foreign);
    assert!(said.contains("is no store of trimtab, and is left as it is"), "{said}");
    assert_eq!(std::fs::read(&foreign).expect("a file"), b"dear diary");

    let said = refused(&folder.join("no/such/folder/trimtab.db"));
    assert!(said.contains("The folder must exist"), "{said}");

    lab.start_again();
    assert_eq!(ask(lab.balancer.listener()).expect("a connection"), "one");
}
