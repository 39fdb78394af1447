//! Resources that register and report over real streams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use api::orca::OrcaLoadReport;
use api::v1::registration_service_client::RegistrationServiceClient;
use api::v1::report_response::Event;
use api::v1::{Readiness, RegisterRequest, ReportRequest, ReportResponse, Resource};
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// Report streams of a connection; the balancer takes 64 streams, and registrations need some.
const STREAMS_PER_CONNECTION: usize = 56;
/// Streams that are opened at a time.
const OPENED_AT_ONCE: usize = 64;
const INCARNATION: u64 = 1;
/// The pool's name.
pub(super) const POOL: &str = "reports";

/// What a report says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Content {
    /// Utilization and rate alone.
    Bare,
    /// What `trimtab agent` measures of a Linux host.
    Agent,
}

impl Content {
    pub(super) const ALL: [Self; 2] = [Self::Bare, Self::Agent];

    pub(super) fn about(self) -> &'static str {
        match self {
            Self::Bare => "cpu and rate",
            Self::Agent => "as an agent's (10 figures)",
        }
    }

    fn utilization(self, busy: f64) -> OrcaLoadReport {
        let mut report = OrcaLoadReport {
            cpu_utilization: busy,
            rps_fractional: 1_000.0 * busy,
            ..OrcaLoadReport::default()
        };
        if self == Self::Agent {
            report.mem_utilization = 0.5;
            let names = ["bandwidth", "os_cache", "pressure_cpu", "pressure_io", "pressure_memory", "swap"];
            report.utilization = names.into_iter().map(|name| (name.to_owned(), 0.5 * busy)).collect();
            report.named_metrics = ["bandwidth_bytes_per_second", "bandwidth_cost"]
                .map(|name| (name.to_owned(), 3.0 * busy))
                .into();
        }
        report
    }
}

/// A registered resource's stream.
#[derive(Debug)]
pub(super) struct Stream {
    id: String,
    sequence: u64,
    content: Content,
    requests: mpsc::Sender<ReportRequest>,
    answers: Streaming<ReportResponse>,
}

impl Stream {
    /// The resource's id.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Sends a report.
    pub(super) async fn send(&mut self, ready: bool) -> anyhow::Result<()> {
        self.sequence += 1;
        // Reports differ, as reports do.
        let busy = 0.3 + (self.sequence % 7) as f64 * 0.05;
        let readiness = if ready { Readiness::Ready } else { Readiness::NotReady };
        let request = ReportRequest {
            id: self.id.clone(),
            incarnation: INCARNATION,
            sequence: self.sequence,
            readiness: readiness.into(),
            utilization: Some(self.content.utilization(busy)),
            ..ReportRequest::default()
        };
        self.requests.send(request).await.context("the stream ended")
    }

    /// Waits for the ack of the last report.
    pub(super) async fn ack(&mut self) -> anyhow::Result<()> {
        loop {
            let answer = self.answers.message().await?.context("the stream ended")?;
            if let Some(Event::Ack(ack)) = answer.event {
                ensure!(ack.refused.is_empty(), "a report was refused: {}", ack.refused);
                if ack.sequence == self.sequence {
                    return Ok(());
                }
            }
        }
    }
}

/// Registers resources `from` to `until` and opens a stream for each, over as many connections as that takes. Each has
/// reported once then.
pub(super) async fn open(
    control: SocketAddr,
    ids: std::ops::Range<usize>,
    content: Content,
    interval: Duration,
) -> anyhow::Result<Vec<Stream>> {
    open_over(control, ids, content, interval, STREAMS_PER_CONNECTION).await
}

/// The same with so many streams in each connection; 1 is as agents do it.
pub(super) async fn open_over(
    control: SocketAddr,
    ids: std::ops::Range<usize>,
    content: Content,
    interval: Duration,
    streams_per_connection: usize,
) -> anyhow::Result<Vec<Stream>> {
    let at_once = Arc::new(Semaphore::new(OPENED_AT_ONCE));
    let mut opening = JoinSet::new();
    let all: Vec<usize> = ids.collect();
    for chunk in all.chunks(streams_per_connection) {
        let channel = Endpoint::from_shared(format!("http://{control}"))?.connect().await?;
        let client = RegistrationServiceClient::new(channel);
        for &number in chunk {
            let (client, at_once) = (client.clone(), Arc::clone(&at_once));
            opening.spawn(async move {
                let _turn = at_once.acquire().await?;
                open_one(client, number, content, interval).await
            });
        }
    }
    let mut streams = Vec::with_capacity(all.len());
    while let Some(opened) = opening.join_next().await {
        streams.push(opened??);
    }
    if streams.is_empty() {
        bail!("there are no resources");
    }
    Ok(streams)
}

async fn open_one(
    mut client: RegistrationServiceClient<Channel>,
    number: usize,
    content: Content,
    interval: Duration,
) -> anyhow::Result<Stream> {
    let id = format!("resource-{number:06}");
    let [_, second, third, fourth] = (number as u32 + 1).to_be_bytes();
    let resource = Resource {
        id: id.clone(),
        pool: POOL.to_owned(),
        address: format!("10.{second}.{third}.{fourth}:80"),
        ..Resource::default()
    };
    let report_interval = interval.try_into().ok();
    client
        .register(RegisterRequest {
            resource: Some(resource),
            incarnation: INCARNATION,
            report_interval,
            ..RegisterRequest::default()
        })
        .await?;
    let (requests, receiver) = mpsc::channel(4);
    let answers = client.report(ReceiverStream::new(receiver)).await?.into_inner();
    let mut stream = Stream { id, sequence: 0, content, requests, answers };
    stream.send(true).await?;
    stream.ack().await?;
    Ok(stream)
}
