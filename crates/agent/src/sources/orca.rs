//! The service's own ORCA stream, out of band (`xds.service.orca.v3`).

use std::time::Duration;

use api::orca::OrcaLoadReport;
use api::orca_service::OrcaLoadReportRequest;
use api::orca_service::open_rca_service_client::OpenRcaServiceClient;
use formats::{Document, DocumentError};
use tokio::time::timeout;
use tonic::transport::Endpoint;

/// For connecting, and for the answer to the call.
const CALL_PATIENCE: Duration = Duration::from_secs(2);
/// A server may send less often than it is asked to; gRPC's own do so every 30 s at least.
pub(super) const SILENCE_MIN: Duration = Duration::from_secs(35);
/// Largest message that is taken.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Gives every report to `take` until the stream ends; says why it did.
pub(super) async fn follow(
    address: &str,
    interval: Duration,
    patience: Duration,
    mut take: impl FnMut(Document),
) -> Result<(), String> {
    let said = |why: &dyn std::fmt::Display| format!("OpenRcaService at {address}: {why}");
    let late = || format!("OpenRcaService at {address}: no answer within {CALL_PATIENCE:?}");
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| said(&error))?;
    let channel = timeout(CALL_PATIENCE, endpoint.connect()).await.map_err(|_| late())?;
    let channel = channel.map_err(|error| said(&innermost(&error)))?;
    let mut client = OpenRcaServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let request = OrcaLoadReportRequest {
        report_interval: prost_types::Duration::try_from(interval).ok(),
        request_cost_names: Vec::new(),
    };
    let stream = timeout(CALL_PATIENCE, client.stream_core_metrics(request)).await.map_err(|_| late())?;
    let mut stream = stream.map_err(|status| said(&status.message()))?.into_inner();
    loop {
        let message = timeout(patience, stream.message()).await;
        let message = message.map_err(|_| said(&format!("nothing came for {patience:?}")))?;
        match message.map_err(|status| said(&status.message()))? {
            Some(report) => take(document(report).map_err(|error| said(&error))?),
            None => return Err(said(&"the stream ended")),
        }
    }
}

/// On the wire 0 stands for "not said".
fn document(report: OrcaLoadReport) -> Result<Document, DocumentError> {
    let said = |value: f64| (value != 0.0).then_some(value);
    let document = Document {
        cpu: said(report.cpu_utilization),
        memory: said(report.mem_utilization),
        utilization: report.utilization,
        application: said(report.application_utilization),
        operations_per_second: said(report.rps_fractional),
        errors_per_second: said(report.eps),
        named_metrics: report.named_metrics,
        ..Document::default()
    };
    document.check()?;
    Ok(document)
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string()
}
