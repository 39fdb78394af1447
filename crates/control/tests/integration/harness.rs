//! A running control on loopback, and what its tests do with it again and again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use allocation::telemetry::{
    CONNECT_SECONDS, DataplaneView, EngineSnapshot, FLOW_SECONDS, HistogramSnapshot, ListenerSnapshot,
    TargetSnapshot,
};
use allocation::{AllocationTable, Decision, Policy, Publisher};
use api::orca::OrcaLoadReport;
use api::v1::admin_service_client::AdminServiceClient;
use api::v1::registration_service_client::RegistrationServiceClient;
use api::v1::report_response::Event;
use api::v1::{RegisterRequest, ReportRequest, ReportResponse, Resource};
use control::{Control, ControlConfig, Phase, Pool};
use registry::{Limits, PoolConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Longest wait for anything that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A dataplane that has served a little.
pub(crate) struct FakeDataplane;

impl DataplaneView for FakeDataplane {
    fn listeners(&self) -> Vec<ListenerSnapshot> {
        let histogram =
            |bounds: &'static [f64; 15]| HistogramSnapshot { bounds, counts: vec![1; 16], sum_seconds: 12.5 };
        vec![ListenerSnapshot {
            name: "tcp://127.0.0.1:5432".into(),
            protocol: "tcp",
            targets: vec![TargetSnapshot { pool: "sql".into(), flows: 17 }],
            has_routes: true,
            flows_opened: 17,
            flows_open: 3,
            bytes_to_backend: 1_000,
            bytes_to_client: 2_000,
            connect_retries: 1,
            flows_closed: vec![("done", 14)],
            sheds: vec![("no_backend", 2)],
            affinity: vec![("kept", 5)],
            flows_queued: 6,
            flows_waiting: 1,
            connect_seconds: histogram(&CONNECT_SECONDS),
            flow_seconds: histogram(&FLOW_SECONDS),
        }]
    }

    fn engine(&self) -> EngineSnapshot {
        EngineSnapshot { engine: "uring", reason: "probed", workers: 1, ..EngineSnapshot::default() }
    }

    fn decisions(&self, _last: usize) -> Vec<Decision> {
        Vec::new()
    }

    fn take_sampled_decisions(&self) -> (Vec<Decision>, u64) {
        (Vec::new(), 0)
    }
}

pub(crate) fn config() -> (ControlConfig, Publisher) {
    let publisher = Publisher::new(AllocationTable::empty(Policy::Adaptive));
    let pool = |name: &str, publisher: &Publisher| Pool {
        config: PoolConfig::new(name.parse().unwrap(), Policy::Adaptive),
        check: None,
        publishers: vec![publisher.clone()],
        listeners: vec!["tcp://127.0.0.1:5432".into()],
    };
    let other = Publisher::new(AllocationTable::empty(Policy::Adaptive));
    let config = ControlConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        http: "127.0.0.1:0".parse().unwrap(),
        insecure: false,
        security: control::SecurityConfig::default(),
        balancer_id: "b-1".into(),
        version: "0.1.0".into(),
        pools: vec![pool("sql", &publisher), pool("xmpp", &other)],
        dataplane: Arc::new(FakeDataplane),
        origin: Instant::now(),
        limits: Limits { resources_max: 100, ..Limits::default() },
        alternatives: Vec::new(),
        zones: Vec::new(),
        maintenance: Vec::new(),
        decision_log: None,
        pull: control::PullConfig::default(),
        providers: Vec::new(),
        dns: Default::default(),
        store: None,
    };
    (config, publisher)
}

pub(crate) struct Running {
    pub(crate) publisher: Publisher,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) control: std::net::SocketAddr,
    pub(crate) http: std::net::SocketAddr,
    pub(crate) serving: JoinHandle<Result<(), control::RunError>>,
}

impl Running {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    /// With another configuration than [`config`]'s.
    pub(crate) async fn start_with(change: impl FnOnce(&mut ControlConfig)) -> Self {
        let (mut config, publisher) = config();
        change(&mut config);
        let bound = Control::bind(config).await.unwrap();
        let (control, http) = (bound.control_address(), bound.http_address());
        let (phase, watched) = watch::channel(Phase::Ready);
        let serving = tokio::spawn(bound.run(watched));
        Self { publisher, phase, control, http, serving }
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.control)).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn registration(&self) -> RegistrationServiceClient<Channel> {
        RegistrationServiceClient::new(self.channel().await).max_encoding_message_size(64 << 20)
    }

    pub(crate) async fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel().await)
    }

    /// Waits until the published table passes.
    pub(crate) async fn table(
        &self,
        what: &str,
        passes: impl Fn(&AllocationTable) -> bool,
    ) -> Arc<AllocationTable> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let table = self.publisher.current();
            if passes(&table) {
                return table;
            }
            assert!(Instant::now() < deadline, "{what} did not come: {table:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The status line and the body of a GET.
    pub(crate) async fn get(&self, path: &str) -> (String, String) {
        self.request(&format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await
    }

    pub(crate) async fn request(&self, request: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.http).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
    }
}

pub(crate) fn register_request(id: &str, incarnation: u64) -> RegisterRequest {
    RegisterRequest {
        resource: Some(Resource {
            id: id.into(),
            pool: "sql".into(),
            address: "127.0.0.1:5433".into(),
            ..Resource::default()
        }),
        incarnation,
        ..RegisterRequest::default()
    }
}

/// A report stream from the resource's side.
pub(crate) struct Reporter {
    id: String,
    incarnation: u64,
    sequence: u64,
    requests: mpsc::Sender<ReportRequest>,
    responses: Streaming<ReportResponse>,
}

impl Reporter {
    pub(crate) async fn open(
        client: &mut RegistrationServiceClient<Channel>,
        id: &str,
        incarnation: u64,
    ) -> Self {
        let (requests, receiver) = mpsc::channel(16);
        let responses = client.report(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { id: id.into(), incarnation, sequence: 0, requests, responses }
    }

    pub(crate) async fn send(&mut self, cpu: f64) {
        self.sequence += 1;
        let report = ReportRequest {
            id: self.id.clone(),
            incarnation: self.incarnation,
            sequence: self.sequence,
            readiness: 0,
            utilization: Some(OrcaLoadReport { cpu_utilization: cpu, ..OrcaLoadReport::default() }),
            ..ReportRequest::default()
        };
        self.send_raw(report).await;
    }

    pub(crate) async fn send_raw(&mut self, report: ReportRequest) {
        self.requests.send(report).await.unwrap();
    }

    /// The next event, or how the stream ended.
    pub(crate) async fn event(&mut self) -> Result<Option<Event>, Status> {
        let message =
            tokio::time::timeout(PATIENCE, self.responses.message()).await.expect("an event in time");
        message.map(|response| response.and_then(|response| response.event))
    }

    pub(crate) async fn ack(&mut self) -> api::v1::Ack {
        match self.event().await {
            Ok(Some(Event::Ack(ack))) => ack,
            other => panic!("no ack but {other:?}"),
        }
    }
}
