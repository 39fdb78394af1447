//! An agent against a stand-in for the balancer's side of the protocol: what is sent, when, and what becomes of it when
//! the other side, or the service, misbehaves. The real balancer is in the end-to-end tests.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent::{Agent, AgentConfig, AgentError, AgentState, Retry, ServiceCheck, Source};
use api::v1::registration_service_server::{RegistrationService, RegistrationServiceServer};
use api::v1::report_response::Event;
use api::v1::{
    Ack, DeregisterRequest, DeregisterResponse, ProbeRequest, ProbeResponse, Readiness, RegisterRequest,
    RegisterResponse, ReportNow, ReportRequest, ReportResponse, Resource, ResourceState,
};
use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming};

/// For anything to happen. Nothing waits this long unless it fails.
const DEADLINE: Duration = Duration::from_secs(20);
const INTERVAL: Duration = Duration::from_millis(100);

/// What the balancer's side heard.
#[derive(Debug)]
enum Heard {
    Register(RegisterRequest),
    Report(ReportRequest),
    Deregister(DeregisterRequest),
}

/// What it does with a report.
#[derive(Debug, Clone, Default)]
enum Answer {
    #[default]
    Ack,
    Refuse(&'static str),
    Nothing,
    /// An ack, then so many requests for a report now.
    AskForMore(usize),
    EndStream(Code),
}

#[derive(Debug, Default)]
struct Manners {
    register: Option<(Code, &'static str)>,
    report: Answer,
}

#[derive(Clone)]
struct Double {
    heard: mpsc::UnboundedSender<Heard>,
    manners: Arc<Mutex<Manners>>,
}

#[tonic::async_trait]
impl RegistrationService for Double {
    type ReportStream = ReceiverStream<Result<ReportResponse, Status>>;

    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        self.heard.send(Heard::Register(request.into_inner())).ok();
        match self.manners.lock().unwrap().register {
            Some((code, message)) => Err(Status::new(code, message)),
            None => Ok(Response::new(RegisterResponse { created: true, ..Default::default() })),
        }
    }

    async fn report(
        &self,
        request: Request<Streaming<ReportRequest>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let double = self.clone();
        tokio::spawn(async move {
            let mut reports = request.into_inner();
            while let Ok(Some(report)) = reports.message().await {
                let sequence = report.sequence;
                double.heard.send(Heard::Report(report)).ok();
                let answer = double.manners.lock().unwrap().report.clone();
                for response in answers(answer, sequence) {
                    let ends = response.is_err();
                    if sender.send(response).await.is_err() || ends {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn deregister(
        &self,
        request: Request<DeregisterRequest>,
    ) -> Result<Response<DeregisterResponse>, Status> {
        self.heard.send(Heard::Deregister(request.into_inner())).ok();
        Ok(Response::new(DeregisterResponse { removed: true }))
    }
}

fn answers(answer: Answer, sequence: u64) -> Vec<Result<ReportResponse, Status>> {
    let response = |event| Ok(ReportResponse { event: Some(event) });
    let ack = |refused: &str| {
        let state = ResourceState::Ready.into();
        Event::Ack(Ack { sequence, state, refused: refused.into(), ..Default::default() })
    };
    match answer {
        Answer::Ack => vec![response(ack(""))],
        Answer::Refuse(why) => vec![response(ack(why))],
        Answer::Nothing => Vec::new(),
        Answer::AskForMore(count) => {
            let asks = (0..count).map(|_| response(Event::ReportNow(ReportNow {})));
            std::iter::once(response(ack(""))).chain(asks).collect()
        }
        Answer::EndStream(code) => vec![Err(Status::new(code, "the double says so"))],
    }
}

/// A balancer's process: dropping it breaks every connection, as `kill -9` does.
struct Balancer {
    address: SocketAddr,
    heard: mpsc::UnboundedReceiver<Heard>,
    manners: Arc<Mutex<Manners>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Balancer {
    fn start(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let (sender, heard) = mpsc::unbounded_channel();
        let manners = Arc::new(Mutex::new(Manners::default()));
        let double = Double { heard: sender, manners: Arc::clone(&manners) };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
            let service = RegistrationServiceServer::new(double);
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await
        });
        Self { address, heard, manners, runtime: Some(runtime) }
    }

    fn any_port() -> Self {
        Self::start(([127, 0, 0, 1], 0).into())
    }

    fn manners(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.manners.lock().unwrap());
    }

    async fn hears(&mut self) -> Heard {
        timeout(DEADLINE, self.heard.recv()).await.expect("nothing was heard").expect("the double runs")
    }

    /// The next registration, whatever else is heard before.
    async fn hears_register(&mut self) -> RegisterRequest {
        let registration = async {
            loop {
                if let Heard::Register(request) = self.hears().await {
                    return request;
                }
            }
        };
        timeout(DEADLINE, registration).await.expect("no registration was heard")
    }

    /// The next leave, whatever else is heard before.
    async fn hears_deregister(&mut self) -> DeregisterRequest {
        let leave = async {
            loop {
                if let Heard::Deregister(request) = self.hears().await {
                    return request;
                }
            }
        };
        timeout(DEADLINE, leave).await.expect("no leave was heard")
    }

    /// The next report that fits, whatever else is heard before.
    async fn hears_report(&mut self, fits: impl Fn(&ReportRequest) -> bool) -> ReportRequest {
        let report = async {
            loop {
                match self.hears().await {
                    Heard::Report(report) if fits(&report) => return report,
                    _ => {}
                }
            }
        };
        timeout(DEADLINE, report).await.expect("no such report was heard")
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.runtime.take().expect("dropped once").shutdown_background();
    }
}

/// An agent that runs in its own task.
struct Running {
    state: watch::Receiver<AgentState>,
    shutdown: oneshot::Sender<()>,
    task: JoinHandle<Result<(), AgentError>>,
}

impl Running {
    fn start(config: AgentConfig) -> Self {
        Self::run(Agent::new(config).unwrap())
    }

    fn run(agent: Agent) -> Self {
        let state = agent.state();
        let (shutdown, stopped) = oneshot::channel();
        let task = tokio::spawn(agent.run(async { drop(stopped.await) }));
        Self { state, shutdown, task }
    }

    async fn reaches(&mut self, wanted: impl Fn(&AgentState) -> bool) -> AgentState {
        let reached = timeout(DEADLINE, self.state.wait_for(|state| wanted(state))).await;
        reached.expect("the agent never got there").expect("the agent runs").clone()
    }

    async fn stop(self) {
        self.shutdown.send(()).unwrap();
        timeout(DEADLINE, self.task).await.expect("it ends").unwrap().unwrap();
        assert_eq!(*self.state.borrow(), AgentState::Deregistered);
    }
}

fn service() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

fn config(balancer: SocketAddr, service: SocketAddr) -> AgentConfig {
    let resource =
        Resource { id: "pg1".into(), pool: "sql".into(), address: service.to_string(), ..Default::default() };
    let milliseconds = Duration::from_millis;
    let retry = Retry { first: milliseconds(20), cap: milliseconds(200), refused: milliseconds(200) };
    AgentConfig {
        report_interval: INTERVAL,
        retry,
        seed: 7,
        ..AgentConfig::new(vec![uri(balancer)], resource)
    }
}

fn uri(balancer: SocketAddr) -> tonic::transport::Uri {
    format!("http://{balancer}").parse().unwrap()
}

fn is_reporting(state: &AgentState) -> bool {
    matches!(state, AgentState::Reporting { .. })
}

/// Everything that is logged on this thread while the guard lives.
fn capture_log() -> (tracing::subscriber::DefaultGuard, impl Fn() -> String) {
    let text = Arc::new(Mutex::new(Vec::new()));
    let writer = Arc::clone(&text);
    let subscriber =
        tracing_subscriber::fmt().with_ansi(false).with_writer(move || Sink(Arc::clone(&writer))).finish();
    let guard = tracing::subscriber::set_default(subscriber);
    (guard, move || String::from_utf8(text.lock().unwrap().clone()).unwrap())
}

struct Sink(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn registers_reports_and_deregisters() {
    let mut balancer = Balancer::any_port();
    let service = service();
    let config = config(balancer.address, service.local_addr().unwrap());
    let incarnation = config.incarnation;
    assert!(incarnation > 1_700_000_000_000, "milliseconds since 1970: {incarnation}");
    let mut agent = Running::start(config);

    let Heard::Register(request) = balancer.hears().await else { panic!("it registers first") };
    assert_eq!(request.incarnation, incarnation);
    assert_eq!(request.report_interval, Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 }));
    let resource = request.resource.unwrap();
    assert_eq!((resource.id.as_str(), resource.pool.as_str()), ("pg1", "sql"));
    for sequence in 1..=3 {
        let Heard::Report(report) = balancer.hears().await else { panic!("then it reports") };
        assert_eq!((report.sequence, report.incarnation, report.id.as_str()), (sequence, incarnation, "pg1"));
        assert_eq!(report.readiness(), Readiness::Ready);
        let utilization = report.utilization.unwrap();
        assert!(utilization.mem_utilization > 0.0 && utilization.mem_utilization < 1.0);
        assert!(utilization.utilization.contains_key("swap"));
        assert!(
            utilization.named_metrics.contains_key("bandwidth_bytes_per_second"),
            "rates, in the first too"
        );
    }
    agent.reaches(is_reporting).await;

    agent.stop().await;
    loop {
        match balancer.hears().await {
            Heard::Deregister(request) => {
                assert_eq!((request.id.as_str(), request.incarnation), ("pg1", incarnation));
                break;
            }
            Heard::Report(report) => assert_eq!((report.balancers, report.labels), (1, None)),
            Heard::Register(request) => panic!("{request:?}"),
        }
    }
}

#[tokio::test]
async fn comes_back_after_the_balancer_was_killed() {
    let balancer = Balancer::any_port();
    let address = balancer.address;
    let service = service();
    let mut agent = Running::start(config(address, service.local_addr().unwrap()));
    agent.reaches(is_reporting).await;
    drop(balancer);
    // For a while: more than one attempt fails.
    agent.reaches(|state| matches!(state, AgentState::Registering { attempt } if *attempt > 3)).await;

    let mut balancer = Balancer::start(address);
    let back = Instant::now();
    balancer.hears_register().await;
    balancer.hears_report(|report| report.sequence == 1).await;
    assert!(back.elapsed() < Duration::from_secs(2), "{:?}", back.elapsed());
    agent.reaches(is_reporting).await;
    agent.stop().await;
}

#[tokio::test]
async fn registers_again_where_it_is_not_known_any_more() {
    let mut balancer = Balancer::any_port();
    let service = service();
    let mut agent = Running::start(config(balancer.address, service.local_addr().unwrap()));
    let first = balancer.hears_register().await;
    agent.reaches(is_reporting).await;
    balancer.manners(|manners| manners.report = Answer::EndStream(Code::NotFound));
    assert_eq!(balancer.hears_register().await.incarnation, first.incarnation);
    balancer.manners(|manners| manners.report = Answer::Ack);
    balancer.hears_report(|report| report.sequence == 1).await;
    balancer.hears_report(|report| report.sequence == 3).await;
    agent.reaches(is_reporting).await;
    agent.stop().await;
}

#[tokio::test]
async fn says_when_its_service_does_not_answer() {
    let mut balancer = Balancer::any_port();
    let reserved = service();
    let address = reserved.local_addr().unwrap();
    drop(reserved);
    let mut config = config(balancer.address, address);
    // Changes are reported at once: a long interval would not show a change within the deadline.
    config.report_interval = Duration::from_secs(1);
    let mut agent = Running::start(config);
    // It looked more than once and did not register.
    let looked = timeout(Duration::from_millis(1500), balancer.heard.recv()).await;
    assert!(looked.is_err(), "{looked:?}");
    assert_eq!(*agent.state.borrow(), AgentState::CheckingService);

    let listener = TcpListener::bind(address).unwrap();
    let Heard::Register(_) = balancer.hears().await else { panic!("it registers when the service answers") };
    balancer.hears_report(|report| report.readiness() == Readiness::Ready).await;
    drop(listener);
    balancer.hears_report(|report| report.readiness() == Readiness::NotReady).await;
    agent.reaches(is_reporting).await;
    let _listener = TcpListener::bind(address).unwrap();
    balancer.hears_report(|report| report.readiness() == Readiness::Ready).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_refused_report_is_logged_once_and_reporting_goes_on() {
    let (_guard, log) = capture_log();
    let mut balancer = Balancer::any_port();
    balancer.manners(|manners| manners.report = Answer::Refuse("cpu_utilization is NaN"));
    let service = service();
    let mut agent = Running::start(config(balancer.address, service.local_addr().unwrap()));
    balancer.hears_report(|report| report.sequence == 5).await;
    agent.reaches(is_reporting).await;
    agent.stop().await;
    let log = log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("refused a report")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("WARN") && lines[0].contains("cpu_utilization is NaN"), "{}", lines[0]);
}

#[tokio::test]
async fn a_refused_registration_is_an_error_that_is_logged_once_and_tried_again() {
    let (_guard, log) = capture_log();
    let mut balancer = Balancer::any_port();
    balancer.manners(|manners| manners.register = Some((Code::NotFound, "there is no pool `sql`")));
    let service = service();
    let mut agent = Running::start(config(balancer.address, service.local_addr().unwrap()));
    let waits = agent.reaches(|state| matches!(state, AgentState::Waiting { .. })).await;
    let AgentState::Waiting { why, pause } = waits else { unreachable!() };
    assert!(why.starts_with("there is no pool `sql`"), "{why}");
    assert!(pause >= Duration::from_millis(100), "not a quick retry: {pause:?}");
    for _ in 0..3 {
        balancer.hears_register().await;
    }
    balancer.manners(|manners| manners.register = None);
    agent.reaches(is_reporting).await;
    agent.stop().await;
    let log = log();
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{log}");
    assert!(errors[0].contains("there is no pool `sql`"), "{}", errors[0]);
}

#[tokio::test]
async fn a_balancer_that_falls_silent_is_left_and_tried_anew() {
    let mut balancer = Balancer::any_port();
    let service = service();
    let mut agent = Running::start(config(balancer.address, service.local_addr().unwrap()));
    agent.reaches(is_reporting).await;
    balancer.manners(|manners| manners.report = Answer::Nothing);
    let silent = Instant::now();
    let lost = agent.reaches(|state| matches!(state, AgentState::Waiting { .. })).await;
    assert!(silent.elapsed() >= Duration::from_millis(2800), "3 s of patience: {:?}", silent.elapsed());
    assert!(matches!(lost, AgentState::Waiting { why, .. } if why == "no ack for 3s"));
    balancer.manners(|manners| manners.report = Answer::Ack);
    balancer.hears_register().await;
    agent.reaches(is_reporting).await;
    agent.stop().await;
}

#[tokio::test]
async fn reports_when_asked_but_not_without_end() {
    let mut balancer = Balancer::any_port();
    balancer.manners(|manners| manners.report = Answer::AskForMore(10));
    let service = service();
    let mut config = config(balancer.address, service.local_addr().unwrap());
    config.report_interval = Duration::from_secs(600);
    let agent = Running::start(config);
    balancer.hears_report(|report| report.sequence == 1).await;
    let start = Instant::now();
    balancer.hears_report(|report| report.sequence == 6).await;
    // Each report is answered with ten demands for another: five of them, a tenth of a second apart.
    assert!(start.elapsed() >= Duration::from_millis(450), "{:?}", start.elapsed());
    agent.stop().await;
}

#[tokio::test]
async fn the_utilization_file_is_read_at_each_report() {
    let (_guard, log) = capture_log();
    let mut balancer = Balancer::any_port();
    let service = service();
    let file = TemporaryFile::new("utilization.json");
    let mut config = config(balancer.address, service.local_addr().unwrap());
    config.utilization_file = Some(file.0.clone());
    let agent = Running::start(config);
    let cpu = |report: &ReportRequest| report.utilization.as_ref().unwrap().cpu_utilization;
    balancer.hears_report(|report| cpu(report) != 7.5).await;
    file.holds(r#"{"cpu": 7.5, "utilization": {"swap": 0.25}}"#);
    let report = balancer.hears_report(|report| cpu(report) == 7.5).await;
    assert_eq!(report.utilization.unwrap().utilization["swap"], 0.25);
    file.holds("{");
    let sequence = balancer.hears_report(|report| cpu(report) != 7.5).await.sequence;
    balancer.hears_report(|report| report.sequence == sequence + 3).await;
    agent.stop().await;
    let log = log();
    assert_eq!(log.matches("the utilization file is ignored").count(), 1, "{log}");
}

#[tokio::test]
async fn labels_of_the_utilization_file_are_reported_soon() {
    let mut balancer = Balancer::any_port();
    let service = service();
    let file = TemporaryFile::new("labels.json");
    let mut config = config(balancer.address, service.local_addr().unwrap());
    let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    config.resource.labels = labels(&[("zone", "eu"), ("role", "reader")]);
    config.utilization_file = Some(file.0.clone());
    // What comes within the deadline comes ahead of the interval.
    config.report_interval = Duration::from_secs(600);
    let agent = Running::start(config);
    let resource = balancer.hears_register().await.resource.unwrap();
    assert_eq!(resource.labels, labels(&[("zone", "eu"), ("role", "reader")]));
    assert_eq!(balancer.hears_report(|report| report.sequence == 1).await.labels, None);

    let reported = |report: &ReportRequest| report.labels.clone().map(|labels| labels.entries);
    let writer = labels(&[("zone", "eu"), ("role", "writer")]);
    file.holds(r#"{"labels": {"role": "writer"}}"#);
    balancer.hears_report(|report| reported(report).as_ref() == Some(&writer)).await;
    // One that is wrong changes no label, and a registration has those of its time.
    file.holds(r#"{"labels": {"a key": ""}}"#);
    balancer.manners(|manners| manners.report = Answer::EndStream(Code::NotFound));
    file.holds(r#"{"labels": {"role": "writer", "fts": "true"}}"#);
    let full = labels(&[("zone", "eu"), ("role", "writer"), ("fts", "true")]);
    balancer.hears_report(|report| reported(report).as_ref() == Some(&full)).await;
    assert_eq!(balancer.hears_register().await.resource.unwrap().labels, full);
    balancer.manners(|manners| manners.report = Answer::Ack);
    balancer.hears_report(|report| reported(report).as_ref() == Some(&full)).await;

    file.holds("{}");
    let flags = labels(&[("zone", "eu"), ("role", "reader")]);
    balancer.hears_report(|report| reported(report).as_ref() == Some(&flags)).await;
    agent.stop().await;
}

#[tokio::test]
async fn each_balancer_has_a_registration_of_its_own_and_hears_how_many_there_are() {
    let mut first = Balancer::any_port();
    let reserved = TcpListener::bind("127.0.0.1:0").unwrap();
    let second_address = reserved.local_addr().unwrap();
    drop(reserved);
    let service = service();
    let mut config = config(first.address, service.local_addr().unwrap());
    config.balancers.push(uri(second_address));
    let agent = Running::start(config);
    // One that is away does not delay the other.
    let report = first.hears_report(|report| report.sequence == 3).await;
    assert_eq!(report.balancers, 1);

    let mut second = Balancer::start(second_address);
    second.hears_register().await;
    assert_eq!(second.hears_report(|report| report.sequence == 1).await.balancers, 2);
    first.hears_report(|report| report.balancers == 2).await;
    drop(second);
    first.hears_report(|report| report.balancers == 1).await;
    let mut second = Balancer::start(second_address);
    first.hears_report(|report| report.balancers == 2).await;

    agent.stop().await;
    for balancer in [&mut first, &mut second] {
        balancer.hears_deregister().await;
    }
}

#[tokio::test]
async fn a_balancer_that_hangs_delays_no_other_and_no_end_for_long() {
    let mut well = Balancer::any_port();
    // Connections are made in its backlog, and nobody ever reads from them.
    let hangs = TcpListener::bind("127.0.0.1:0").unwrap();
    let service = service();
    let mut config = config(well.address, service.local_addr().unwrap());
    config.balancers.insert(0, uri(hangs.local_addr().unwrap()));
    let agent = Agent::new(config).unwrap();
    let mut states = agent.states();
    let mut agent = Running::run(agent);
    well.hears_report(|report| report.sequence == 5).await;
    assert!(is_reporting(&states[1].1.borrow()), "{states:?}");
    let waits = agent.reaches(|state| matches!(state, AgentState::Waiting { .. })).await;
    assert!(matches!(&waits, AgentState::Waiting { why, .. } if why.contains("no answer")), "{waits:?}");
    agent.reaches(|state| matches!(state, AgentState::Registering { .. })).await;

    let start = Instant::now();
    agent.stop().await;
    assert!(start.elapsed() < Duration::from_secs(3), "a second, and a busy machine: {:?}", start.elapsed());
    well.hears_deregister().await;
    assert_eq!(*states[1].1.borrow_and_update(), AgentState::Deregistered);
}

#[tokio::test]
async fn probes_are_answered_with_what_the_service_has_now() {
    let (_guard, log) = capture_log();
    let mut balancer = Balancer::any_port();
    let listener = service();
    let service_address = listener.local_addr().unwrap();
    let file = TemporaryFile::new("probes.json");
    let mut config = config(balancer.address, service_address);
    config.utilization_file = Some(file.0.clone());
    let probe = free_udp_port();
    config.probe = Some(probe);
    let mut open: Vec<_> = (0..7)
        .map(|_| (std::net::TcpStream::connect(service_address).unwrap(), listener.accept().unwrap()))
        .collect();
    let agent = Running::start(config);
    let resource = balancer.hears_register().await.resource.unwrap();
    assert_eq!(resource.probe_address, probe.to_string());

    let mut prober = Prober::new(probe).await;
    // The agent's own check is there for a moment at each interval.
    let answer = prober.sees(|answer| answer.in_flight == 7 && answer.ready).await;
    assert!(answer.latency_micros > 0, "the check took some time: {answer:?}");
    open.truncate(3);
    prober.sees(|answer| answer.in_flight == 3).await;

    // Shorter than its answer: the next one is answered first.
    let short = ProbeRequest { nonce: u64::MAX, padding: Vec::new() }.encode_to_vec();
    prober.socket.send(&short).await.unwrap();
    prober.socket.send(&[]).await.unwrap();
    prober.socket.send(&[0xff; 48]).await.unwrap();
    let nonce = prober.ask().await;
    loop {
        let answered = prober.hears().await.nonce;
        assert!((1 << 40..=nonce).contains(&answered), "{answered:x} was not to be answered");
        if answered == nonce {
            break;
        }
    }

    file.holds(r#"{"in_flight": 12, "latency_ms": 3.5}"#);
    prober.sees(|answer| (answer.in_flight, answer.latency_micros) == (12, 3500)).await;
    drop(listener);
    prober.sees(|answer| !answer.ready).await;
    agent.stop().await;
    assert!(!log().contains("cannot be counted"), "{}", log());
}

#[tokio::test]
async fn a_flood_of_probes_starves_no_report() {
    let mut balancer = Balancer::any_port();
    let service = service();
    let mut config = config(balancer.address, service.local_addr().unwrap());
    let probe = free_udp_port();
    config.probe = Some(probe);
    let agent = Running::start(config);
    let first = balancer.hears_report(|_| true).await.sequence;
    let flooding = Arc::new(AtomicBool::new(true));
    let flood = std::thread::spawn({
        let flooding = Arc::clone(&flooding);
        move || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            let request = probe_request(1);
            let mut sent = 0_u64;
            while flooding.load(Ordering::Relaxed) {
                sent += u64::from(socket.send_to(&request, probe).is_ok());
            }
            sent
        }
    });
    let start = Instant::now();
    balancer.hears_report(|report| report.sequence >= first + 10).await;
    let took = start.elapsed();
    flooding.store(false, Ordering::Relaxed);
    let sent = flood.join().unwrap();
    assert!(took < Duration::from_secs(5), "ten reports, a tenth of a second apart, in {took:?}");
    assert!(sent > 10_000, "that is no flood: {sent}");
    // And it answers when it is over.
    Prober::new(probe).await.sees(|answer| answer.ready).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_address_for_probes_that_cannot_be_had_is_an_error_at_the_start() {
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut config = config(([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into());
    for wrong in ["127.0.0.1:0", "0.0.0.0:7500", "[::]:7500"].map(|wrong| wrong.parse().unwrap()) {
        config.probe = Some(wrong);
        assert_eq!(Agent::new(config.clone()).unwrap_err(), AgentError::Probe { found: wrong });
    }
    let address = taken.local_addr().unwrap();
    config.probe = Some(address);
    let error = agent::run(config.clone(), std::future::pending()).await.unwrap_err();
    assert!(matches!(&error, AgentError::ProbeBind { address: at, .. } if *at == address), "{error}");
    // Connections are counted at the resource's address, checked or not.
    config.check = ServiceCheck::None;
    config.resource.address = "db.example:5432".into();
    assert!(matches!(Agent::new(config), Err(AgentError::Address { .. })));
}

#[tokio::test]
async fn a_configuration_that_makes_no_sense_is_refused_at_once() {
    let good = config(([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into());
    let mut bad = good.clone();
    bad.resource.address = "localhost:5432".into();
    assert_eq!(Agent::new(bad).unwrap_err(), AgentError::Address { found: "localhost:5432".into() });
    let with_balancers = |urls: &[&str]| {
        let balancers = urls.iter().map(|url| url.parse().unwrap()).collect();
        Agent::new(AgentConfig { balancers, ..good.clone() })
    };
    assert!(matches!(with_balancers(&["ftp://127.0.0.1:7400"]), Err(AgentError::Balancer { .. })));
    assert_eq!(with_balancers(&[]).unwrap_err(), AgentError::NoBalancer);
    let twice = with_balancers(&["http://b.example", "http://c.example", "http://B.example:80/"]);
    assert_eq!(twice.unwrap_err(), AgentError::BalancerTwice { found: "http://B.example:80/".into() });
    assert_eq!(with_balancers(&["http://127.0.0.1:1", "http://127.0.0.1:2"]).unwrap().states().len(), 2);
    let bad = AgentConfig { report_interval: Duration::ZERO, ..good.clone() };
    assert_eq!(Agent::new(bad).unwrap_err(), AgentError::NoInterval);

    let check = ServiceCheck::None;
    let source = Source::Cgroup("/no/such/group".into());
    let error = agent::run(AgentConfig { check, source, ..good }, std::future::pending()).await.unwrap_err();
    assert!(error.to_string().starts_with("there is no cgroup /no/such/group under "), "{error}");
}

#[tokio::test]
async fn a_shutdown_before_anything_happened() {
    let nobody = service().local_addr().unwrap();
    let agent = Running::start(config(nobody, nobody));
    agent.stop().await;
}

fn free_udp_port() -> SocketAddr {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// As long as a balancer's: 48 bytes.
fn probe_request(nonce: u64) -> Vec<u8> {
    let request = ProbeRequest { nonce, padding: vec![0; 37] }.encode_to_vec();
    assert_eq!(request.len(), 48);
    request
}

/// A balancer's side of probes.
struct Prober {
    socket: tokio::net::UdpSocket,
    nonce: u64,
}

impl Prober {
    async fn new(agent: SocketAddr) -> Self {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(agent).await.unwrap();
        Self { socket, nonce: 1 << 40 }
    }

    async fn ask(&mut self) -> u64 {
        self.nonce += 1;
        self.socket.send(&probe_request(self.nonce)).await.unwrap();
        self.nonce
    }

    async fn hears(&self) -> ProbeResponse {
        let mut datagram = [0; 64];
        let length = timeout(DEADLINE, self.socket.recv(&mut datagram)).await.expect("no answer").unwrap();
        assert!(length <= 48, "{length}");
        ProbeResponse::decode(&datagram[..length]).unwrap()
    }

    /// Asks until an answer fits. An answer may be lost: then it asks again.
    async fn sees(&mut self, fits: impl Fn(&ProbeResponse) -> bool) -> ProbeResponse {
        let mut last = None;
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            let nonce = self.ask().await;
            let Ok(answer) = timeout(Duration::from_millis(500), self.hears()).await else { continue };
            if answer.nonce == nonce && fits(&answer) {
                return answer;
            }
            last = Some(answer);
            // The next reading is 20 ms away.
            tokio::task::yield_now().await;
        }
        panic!("no answer was such; the last one: {last:?}");
    }
}

struct TemporaryFile(PathBuf);

impl TemporaryFile {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("trimtab-agent-{}-{name}", std::process::id())))
    }

    /// All at once: a reader never sees half of it.
    fn holds(&self, text: &str) {
        let beside = self.0.with_extension("new");
        std::fs::write(&beside, text).unwrap();
        std::fs::rename(&beside, &self.0).unwrap();
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}
