//! What operators and their tools see: admin, health, reflection, HTTP.

use std::process::Stdio;
use std::time::Instant;

use crate::harness::{PATIENCE, Reporter, Running, config, register_request};
use api::v1::{
    DrainRequest, ExplainRequest, ListPoolsRequest, ListResourcesRequest, ReadyRequest, ResourceState,
};
use control::{Control, Phase, StartError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

#[tokio::test]
async fn an_operator_drains_readies_and_asks_why() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    for id in ["pg1", "pg2"] {
        client.register(register_request(id, 1)).await.unwrap();
    }
    let mut reporter = Reporter::open(&mut client, "pg1", 1).await;
    reporter.send(0.4).await;
    reporter.ack().await;
    let mut admin = running.admin().await;

    admin.drain(DrainRequest { id: "pg1".into() }).await.unwrap();
    running.table("the drain", |table| table.eligible().len() == 1).await;
    reporter.send(0.4).await;
    assert_eq!(reporter.ack().await.state(), ResourceState::Draining, "a report does not end a drain");
    client.register(register_request("pg1", 2)).await.unwrap();
    let explain = ExplainRequest { pool: "sql".into(), ..ExplainRequest::default() };
    let explained = admin.explain(explain.clone()).await.unwrap().into_inner();
    let out = &explained.candidates[1];
    assert_eq!(
        (out.id.as_str(), out.left_out.as_str()),
        ("pg1", "an operator drains it"),
        "nor a registration"
    );
    assert_eq!((explained.policy.as_str(), explained.candidates[0].id.as_str()), ("adaptive", "pg2"));

    admin.ready(ReadyRequest { id: "pg1".into() }).await.unwrap();
    let table = running.table("the end of the drain", |table| table.eligible().len() == 2).await;
    let pools = admin.list_pools(ListPoolsRequest {}).await.unwrap().into_inner().pools;
    assert_eq!(
        (pools[0].name.as_str(), pools[0].resources_ready, pools[1].name.as_str()),
        ("sql", 2, "xmpp")
    );
    assert!(pools[0].generation >= table.generation());
    assert_eq!(pools[0].listeners, ["tcp://127.0.0.1:5432"]);

    let list = ListResourcesRequest { pool: "sql".into() };
    let resources = admin.list_resources(list).await.unwrap().into_inner().resources;
    assert_eq!(resources.len(), 2);
    assert_eq!((resources[0].incarnation, resources[0].state()), (2, ResourceState::Ready));
    assert!(resources[0].report_age.is_none(), "the new incarnation has not reported");

    let unknown = admin.drain(DrainRequest { id: "pg9".into() }).await.unwrap_err();
    assert_eq!((unknown.code(), unknown.message()), (Code::NotFound, "there is no resource pg9"));
    let unknown =
        admin.explain(ExplainRequest { pool: "sqlx".into(), ..ExplainRequest::default() }).await.unwrap_err();
    assert_eq!(unknown.message(), "there is no pool sqlx; there are sql, xmpp");
}

#[tokio::test]
async fn health_and_readiness_follow_the_phase() {
    let running = Running::start().await;
    let mut health = HealthClient::new(running.channel().await);
    let mut status = async || {
        let response = health.check(HealthCheckRequest { service: String::new() }).await.unwrap();
        response.into_inner().status()
    };
    let deadline = Instant::now() + PATIENCE;
    while status().await != ServingStatus::Serving {
        assert!(Instant::now() < deadline, "it serves once it is ready");
    }
    assert_eq!(running.get("/readyz").await, ("HTTP/1.1 200 OK".to_owned(), "ready\n".to_owned()));
    assert_eq!(running.get("/livez").await.0, "HTTP/1.1 200 OK");

    running.phase.send(Phase::Draining).unwrap();
    let (line, body) = running.get("/readyz").await;
    assert_eq!((line.as_str(), body.as_str()), ("HTTP/1.1 503 Service Unavailable", "draining\n"));
    assert_eq!(running.get("/livez").await.0, "HTTP/1.1 200 OK", "it is alive while it drains");
    while status().await != ServingStatus::NotServing {
        assert!(Instant::now() < deadline, "it stops serving when it drains");
    }
}

#[tokio::test]
async fn reflection_lists_the_services() {
    let running = Running::start().await;
    let mut client = ServerReflectionClient::new(running.channel().await);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("no list but {answer:?}");
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in
        ["trimtab.control.v1.RegistrationService", "trimtab.control.v1.AdminService", "grpc.health.v1.Health"]
    {
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
}

#[tokio::test]
async fn the_metrics_are_all_there_and_go_with_their_resource() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    client.register(register_request("pg1", 1)).await.unwrap();
    let mut reporter = Reporter::open(&mut client, "pg1", 1).await;
    reporter.send(0.25).await;
    reporter.ack().await;
    running.table("a weight", |table| table.eligible().len() == 1).await;
    let (line, page) = running.get("/metrics").await;
    assert_eq!(line, "HTTP/1.1 200 OK");
    for sample in [
        "trimtab_flows_opened_total{listener=\"tcp://127.0.0.1:5432\",protocol=\"tcp\"} 17\n",
        "trimtab_flows_closed_total{listener=\"tcp://127.0.0.1:5432\",reason=\"done\"} 14\n",
        "trimtab_bytes_total{listener=\"tcp://127.0.0.1:5432\",direction=\"to_client\"} 2000\n",
        "trimtab_sheds_total{listener=\"tcp://127.0.0.1:5432\",reason=\"no_backend\"} 2\n",
        "trimtab_affinity_total{listener=\"tcp://127.0.0.1:5432\",result=\"kept\"} 5\n",
        "trimtab_flows_queued_total{listener=\"tcp://127.0.0.1:5432\"} 6\n",
        "trimtab_flows_waiting{listener=\"tcp://127.0.0.1:5432\"} 1\n",
        "trimtab_access_log_lost_total 0\n",
        "trimtab_connect_seconds_bucket{listener=\"tcp://127.0.0.1:5432\",le=\"0.0001\"} 1\n",
        "trimtab_connect_seconds_count{listener=\"tcp://127.0.0.1:5432\"} 16\n",
        "trimtab_flow_seconds_sum{listener=\"tcp://127.0.0.1:5432\"} 12.5\n",
        "trimtab_resources{pool=\"sql\",state=\"ready\"} 1\n",
        "trimtab_resource_weight{pool=\"sql\",resource=\"pg1\"} 1\n",
        "trimtab_resource_flows_open{pool=\"sql\",resource=\"pg1\"} 0\n",
        "trimtab_resource_flows_opened_total{pool=\"sql\",resource=\"pg1\"} 0\n",
        "trimtab_resource_utilization_ratio{pool=\"sql\",resource=\"pg1\",dimension=\"cpu\"} 0.25\n",
        "trimtab_resource_report_age_seconds{pool=\"sql\",resource=\"pg1\"} ",
        "trimtab_reports_total{source=\"push\",result=\"accepted\"} 1\n",
        "trimtab_table_generation{pool=\"sql\"} ",
        "trimtab_engine_info{engine=\"uring\",reason=\"probed\"} 1\n",
        "trimtab_build_info{version=\"0.1.0\"} 1\n",
        "process_open_fds ",
        "process_resident_memory_bytes ",
        "process_cpu_seconds_total ",
    ] {
        assert!(page.contains(sample), "{sample:?} is not in\n{page}");
    }
    check_with_promtool(&page).await;

    client.deregister(api::v1::DeregisterRequest { id: "pg1".into(), incarnation: 1 }).await.unwrap();
    let (_, page) = running.get("/metrics").await;
    assert!(!page.contains("pg1"), "what is gone leaves nothing behind:\n{page}");
    assert!(page.contains("trimtab_resources{pool=\"sql\",state=\"ready\"} 0\n"));
}

/// Where Prometheus's own checker is installed, it must find nothing.
pub(crate) async fn check_with_promtool(page: &str) {
    let promtool = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("promtool is not installed (Debian package prometheus): its check is left out");
        return;
    };
    std::io::Write::write_all(&mut promtool.stdin.take().unwrap(), page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.is_empty(), "promtool says {said}\nof\n{page}");
}

#[tokio::test]
async fn http_answers_only_what_it_knows() {
    let running = Running::start().await;
    assert_eq!(running.get("/").await.0, "HTTP/1.1 404 Not Found");
    let post = "POST /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(running.request(post).await.0, "HTTP/1.1 405 Method Not Allowed");
    let long = format!("GET /livez HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(100_000));
    let mut stream = TcpStream::connect(running.http).await.unwrap();
    // It may hang up before all of it is written.
    let _ = stream.write_all(long.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(running.get("/livez").await.0, "HTTP/1.1 200 OK");
}

#[tokio::test]
async fn who_connects_and_says_nothing_is_hung_up_on() {
    let running = Running::start().await;
    let hung_up_on = async |address| {
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut nothing = Vec::new();
        tokio::time::timeout(2 * PATIENCE, silent.read_to_end(&mut nothing)).await.is_ok()
    };
    let (http, control) = tokio::join!(hung_up_on(running.http), hung_up_on(running.control));
    assert!(http && control, "a silent connection is held (http {http}, control {control})");
}

#[tokio::test]
async fn control_refuses_what_would_be_unsafe_or_cannot_be() {
    let (mut open, _) = config();
    open.listen = "0.0.0.0:0".parse().unwrap();
    let error = Control::bind(open).await.unwrap_err();
    assert!(matches!(error, StartError::Insecure { .. }), "{error}");
    assert!(error.to_string().contains("control.insecure"), "it says what to do: {error}");

    let (mut said, _) = config();
    (said.listen, said.insecure) = ("0.0.0.0:0".parse().unwrap(), true);
    Control::bind(said).await.expect("if it is said, it is done");

    let (first, _) = config();
    let first = Control::bind(first).await.unwrap();
    let (mut second, _) = config();
    second.http = first.http_address();
    let error = Control::bind(second).await.unwrap_err().to_string();
    assert!(error.contains(&first.http_address().to_string()) && error.contains("http.listen"), "{error}");
}
