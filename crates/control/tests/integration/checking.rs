//! Active checks through all of control: a result is in the table, the answers, the metrics, and nobody is hurt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use api::v1::{CheckStatus, ListResourcesRequest, ResourceState};
use checks::{CheckConfig, Dialogue, Timing};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::harness::{PATIENCE, Reporter, Running, register_request};

/// A service that greets as FTP does, and is asked to stop greeting.
struct Ftp {
    address: std::net::SocketAddr,
    answers: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    quits: Arc<AtomicUsize>,
}

impl Ftp {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (answers, connections, quits) =
            (Arc::new(AtomicBool::new(true)), Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let ftp = Self { address, answers, connections, quits };
        let (answers, connections, quits) =
            (Arc::clone(&ftp.answers), Arc::clone(&ftp.connections), Arc::clone(&ftp.quits));
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                connections.fetch_add(1, Relaxed);
                let (answers, quits) = (Arc::clone(&answers), Arc::clone(&quits));
                tokio::spawn(async move {
                    while !answers.load(Relaxed) {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    stream.write_all(b"220 ready\r\n").await.unwrap();
                    let mut said = String::new();
                    stream.read_to_string(&mut said).await.expect("no reset");
                    quits.fetch_add(usize::from(said == "QUIT\r\n"), Relaxed);
                });
            }
        });
        ftp
    }
}

fn check(timeout: Duration) -> CheckConfig {
    let every = Duration::from_millis(20);
    let timing = Timing { interval: every, fast_interval: every, rise: 2, fall: 3 };
    CheckConfig {
        dialogue: Dialogue::Ftp,
        timing,
        timeout,
        address: None,
        port: None,
        tls: None,
        proxy: None,
    }
}

async fn status(running: &Running) -> (ResourceState, Option<CheckStatus>) {
    let all = running.admin().await.list_resources(ListResourcesRequest::default()).await.unwrap();
    let mut resources = all.into_inner().resources;
    let resource = resources.pop().expect("it has joined");
    (resource.state(), resource.check)
}

async fn until(
    running: &Running,
    what: &str,
    passes: impl Fn(ResourceState, &CheckStatus) -> bool,
) -> CheckStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (state, check) = status(running).await;
        match check {
            Some(check) if passes(state, &check) => return check,
            other => assert!(Instant::now() < deadline, "{what} did not come: {state:?}, {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_service_that_hangs_is_out_and_keeps_one_connection() {
    let ftp = Ftp::start().await;
    let running = Running::start_with(|config| {
        config.pools[0].check = Some(check(Duration::from_millis(100)));
        config.pools[0].config.checked = true;
    })
    .await;
    let mut request = register_request("ftp1", 1);
    request.resource.as_mut().unwrap().address = ftp.address.to_string();
    request.report_interval = Some(prost_types::Duration { seconds: 20, nanos: 0 });
    let mut client = running.registration().await;
    client.register(request).await.unwrap();
    let mut reporter = Reporter::open(&mut client, "ftp1", 1).await;
    reporter.send(0.1).await;
    until(&running, "a check that passes", |state, check| {
        state == ResourceState::Ready && check.state == "up"
    })
    .await;
    assert_eq!(running.publisher.current().eligible().len(), 1);

    ftp.answers.store(false, Relaxed);
    let down = until(&running, "down", |state, _| state == ResourceState::Down).await;
    assert_eq!((down.state.as_str(), down.result.as_str()), ("down", "timed_out"));
    running.table("a table without it", |table| table.eligible().is_empty()).await;
    let connections = ftp.connections.load(Relaxed);
    until(&running, "further failures", |_, check| check.failed_total >= down.failed_total + 3).await;
    assert_eq!(ftp.connections.load(Relaxed), connections, "it is not connected to again");
    reporter.send(0.1).await;

    ftp.answers.store(true, Relaxed);
    let up = until(&running, "up", |state, check| state == ResourceState::Ready && check.state == "up").await;
    assert!(up.in_a_row >= 2 && up.detail == "220 ready", "{up:?}");
    running.table("a table with it", |table| table.eligible().len() == 1).await;
    let (_, page) = running.get("/metrics").await;
    for series in [
        "trimtab_checks_total{pool=\"sql\",resource=\"ftp1\",result=\"timed_out\"}",
        "trimtab_resource_check_up{pool=\"sql\",resource=\"ftp1\"} 1",
        "trimtab_check_seconds_count{pool=\"sql\"}",
    ] {
        assert!(page.contains(series), "{series}\n{page}");
    }
    crate::operation::check_with_promtool(&page).await;
    // Every dialogue was ended by its goodbye; the last may be on its way.
    let (connections, quits) = (ftp.connections.load(Relaxed), ftp.quits.load(Relaxed));
    assert!(quits + 1 >= connections, "{quits} of {connections}");
}
