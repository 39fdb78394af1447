//! `xds.service.orca.v3.OpenRcaService`: what gRPC clients and Envoy weigh by, out of band.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use api::orca::OrcaLoadReport;
use api::orca_service::OrcaLoadReportRequest;
use api::orca_service::open_rca_service_server::{OpenRcaService, OpenRcaServiceServer};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::Numbers;
use super::accept::{Acceptor, Placed};

/// Most streams at once in one connection: a client has one for each of its channels.
const STREAMS_MAX: u32 = 16;
/// What a caller that says nothing gets, and one that says less than our own interval: there is nothing new sooner.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(10);
/// Longest interval: a caller's typing error, rather.
const INTERVAL_MAX: Duration = Duration::from_secs(3600);
/// Reports that wait for a caller that does not read.
const WAITING_MAX: usize = 1;
/// How often a quiet connection is asked whether it lives, and how long it may take to say so.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));
/// After the server failed as a whole.
const AGAIN: Duration = Duration::from_secs(1);

/// Serves for ever.
pub(super) async fn serve(listener: TcpListener, numbers: Numbers, floor: Duration) -> Infallible {
    let acceptor = Arc::new(Acceptor::new(listener));
    loop {
        let served = Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .http2_keepalive_interval(Some(KEEPALIVE.0))
            .http2_keepalive_timeout(Some(KEEPALIVE.1))
            .add_service(OpenRcaServiceServer::new(Reporter { numbers: numbers.clone(), floor }))
            .serve_with_incoming(accepted(Arc::clone(&acceptor)));
        if let Err(error) = served.await {
            tracing::warn!(%error, "the ORCA server failed; it begins anew");
        }
        sleep(AGAIN).await;
    }
}

/// Connections, as the stream that the server wants. The task ends with its receiver.
fn accepted(acceptor: Arc<Acceptor>) -> ReceiverStream<Result<Placed, Infallible>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let connection = tokio::select! {
                connection = acceptor.accept() => connection,
                () = sender.closed() => return,
            };
            if sender.send(Ok(connection)).await.is_err() {
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
}

struct Reporter {
    numbers: Numbers,
    floor: Duration,
}

#[tonic::async_trait]
impl OpenRcaService for Reporter {
    type StreamCoreMetricsStream =
        Pin<Box<dyn tokio_stream::Stream<Item = Result<OrcaLoadReport, Status>> + Send>>;

    async fn stream_core_metrics(
        &self,
        request: Request<OrcaLoadReportRequest>,
    ) -> Result<Response<Self::StreamCoreMetricsStream>, Status> {
        let wanted = request.into_inner().report_interval.map(Duration::try_from).transpose();
        let wanted = wanted.map_err(|_| Status::invalid_argument("report_interval is negative"))?;
        let interval = wanted.unwrap_or(INTERVAL_DEFAULT).clamp(self.floor, INTERVAL_MAX.max(self.floor));
        let (reports, receiver) = mpsc::channel(WAITING_MAX);
        let mut numbers = self.numbers.clone();
        // Ends with the caller's stream, or with the agent.
        tokio::spawn(async move {
            loop {
                let Ok(report) = numbers.wait_for(Option::is_some).await.map(|report| report.clone()) else {
                    return;
                };
                if reports.send(Ok(report.unwrap_or_default())).await.is_err() {
                    return;
                }
                tokio::select! {
                    () = sleep(interval) => {}
                    () = reports.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
