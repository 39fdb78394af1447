//! Providers, as far as no real orchestrator would go: an engine that never ends an answer, talks nonsense, or goes away.
//! What a real one does is in the end-to-end tests.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::v1::{DeregisterRequest, ReportRequest};
use control::{DockerConfig, DockerEndpoint, ProviderConfig, ProviderKind};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::harness::{PATIENCE, Running, register_request};

/// An engine with this script.
struct Engine {
    script: Arc<Mutex<Script>>,
    lines: broadcast::Sender<String>,
    serving: JoinHandle<()>,
    socket: PathBuf,
    _folder: TempDir,
}

#[derive(Default)]
struct Script {
    /// Ids of containers.
    containers: Vec<&'static str>,
    /// The list of containers never ends.
    endless: bool,
}

impl Engine {
    fn start(containers: &[&'static str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("docker.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let script = Arc::new(Mutex::new(Script { containers: containers.to_vec(), endless: false }));
        let (lines, _) = broadcast::channel(16);
        let (of_script, of_lines) = (Arc::clone(&script), lines.clone());
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A client that hangs up ends its own connection.
                tokio::spawn(serve(stream, Arc::clone(&of_script), of_lines.subscribe()));
            }
        });
        Self { script, lines, serving, socket, _folder: folder }
    }

    fn provider(&self, keep: Duration) -> ProviderConfig {
        ProviderConfig {
            name: "docker".into(),
            pools: Vec::new(),
            report_interval: Duration::from_millis(500),
            keep,
            kind: ProviderKind::Docker(DockerConfig {
                endpoint: DockerEndpoint::Unix(self.socket.clone()),
                address: None,
            }),
        }
    }
}

async fn serve(
    mut stream: UnixStream,
    script: Arc<Mutex<Script>>,
    mut lines: broadcast::Receiver<String>,
) -> std::io::Result<()> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).await?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    assert!(head.starts_with("GET "), "only that is ever asked: {head}");
    let path = head.split(' ').nth(1).unwrap().trim_start_matches("/v1.41");
    stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").await?;
    if path.starts_with("/events") {
        while let Ok(line) = lines.recv().await {
            stream.write_all(line.as_bytes()).await?;
        }
        return Ok(());
    }
    while path == "/containers/json" && script.lock().unwrap().endless {
        stream.write_all(&[b' '; 65_536]).await?;
    }
    let answer = answer(path, &script.lock().unwrap().containers);
    stream.write_all(answer.as_bytes()).await
}

fn answer(path: &str, containers: &[&str]) -> String {
    let labels = r#"{"trimtab.pool":"sql","trimtab.port":"5432"}"#;
    match path {
        "/version" => r#"{"ApiVersion":"1.41","MinAPIVersion":"1.12"}"#.into(),
        "/info" => r#"{"NCPU":2}"#.into(),
        "/containers/json" => {
            let listed = containers.iter().map(|id| format!(r#"{{"Id":"{id}","Labels":{labels}}}"#));
            format!("[{}]", listed.collect::<Vec<_>>().join(","))
        }
        _ if path.contains("/stats") => "{}".into(),
        _ => {
            let id = path.split('/').nth(2).unwrap_or_default();
            format!(
                r#"{{"Id":"{id}","Name":"/{id}","State":{{"Running":true,"StartedAt":"2026-11-25T00:00:00Z"}},
                "Config":{{"Labels":{labels}}},"HostConfig":{{}},
                "NetworkSettings":{{"Networks":{{"bridge":{{"IPAddress":"127.0.0.1"}}}}}}}}"#
            )
        }
    }
}

/// Waits until a series on the page is as wanted.
async fn metric(running: &Running, series: &str, wanted: impl Fn(f64) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, page) = running.get("/metrics").await;
        let value = page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
        if value.is_some_and(&wanted) {
            return;
        }
        assert!(Instant::now() < deadline, "{series} is {value:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_engine_that_stays_away_is_let_go_after_a_while() {
    let engine = Engine::start(&["aa", "bb"]);
    let keep = Duration::from_secs(4);
    let running = Running::start_with(|config| config.providers = vec![engine.provider(keep)]).await;
    running.table("both containers", |table| table.eligible().len() == 2).await;

    engine.serving.abort();
    // Ends what is being followed.
    drop(engine.lines);
    std::fs::remove_file(&engine.socket).unwrap();
    metric(&running, "trimtab_provider_up{provider=\"docker\"}", |up| up == 0.0).await;
    let away = Instant::now();
    running.table("nobody", |table| table.eligible().is_empty()).await;
    // A lease is 3 s: they were renewed meanwhile.
    let kept = away.elapsed();
    assert!(kept > keep - Duration::from_millis(500), "kept for {kept:?}");
    metric(&running, "trimtab_leases_expired_total", |expired| expired == 0.0).await;
    metric(&running, "trimtab_provider_resources{provider=\"docker\"}", |resources| resources == 0.0).await;
}

#[tokio::test]
async fn an_answer_without_an_end_is_cut() {
    let engine = Engine::start(&["aa"]);
    engine.script.lock().unwrap().endless = true;
    let provider = engine.provider(Duration::from_secs(60));
    let running = Running::start_with(|config| config.providers = vec![provider]).await;
    let series = "trimtab_provider_errors_total{provider=\"docker\",reason=\"answer\"}";
    metric(&running, series, |errors| errors >= 1.0).await;
    engine.script.lock().unwrap().endless = false;
    running.table("the container", |table| table.eligible().len() == 1).await;
}

#[tokio::test]
async fn what_is_no_event_has_everything_listed_anew() {
    let engine = Engine::start(&["aa"]);
    let provider = engine.provider(Duration::from_secs(60));
    let running = Running::start_with(|config| config.providers = vec![provider]).await;
    running.table("the first", |table| table.eligible().len() == 1).await;
    metric(&running, "trimtab_provider_up{provider=\"docker\"}", |up| up == 1.0).await;
    for (line, containers) in [("nonsense\n", vec!["aa", "bb", "cc"]), ("{\"Type\":7}\n", vec!["cc"])] {
        let count = containers.len();
        engine.script.lock().unwrap().containers = containers;
        engine.lines.send(line.to_owned()).unwrap();
        running.table(line, |table| table.eligible().len() == count).await;
    }
}

#[tokio::test]
async fn a_providers_ids_are_no_agents() {
    let engine = Engine::start(&["aa"]);
    let provider = engine.provider(Duration::from_secs(60));
    let running = Running::start_with(|config| config.providers = vec![provider]).await;
    running.table("the container", |table| table.eligible().len() == 1).await;
    let mut client = running.registration().await;

    let refused = client.register(register_request("docker:aa", u64::MAX)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("belong to the provider docker"), "{refused}");
    let request = DeregisterRequest { id: "docker:aa".into(), incarnation: u64::MAX };
    assert_eq!(client.deregister(request).await.unwrap_err().code(), Code::PermissionDenied);
    let (requests, receiver) = tokio::sync::mpsc::channel(1);
    requests.send(ReportRequest { id: "docker:aa".into(), ..ReportRequest::default() }).await.unwrap();
    let mut responses = client.report(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    assert_eq!(responses.message().await.unwrap_err().code(), Code::PermissionDenied);

    client.register(register_request("docker.aa", 1)).await.unwrap();
    running.table("both", |table| table.eligible().len() == 2).await;
}
