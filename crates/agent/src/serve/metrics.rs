//! `/metrics`: the agent's numbers in Prometheus' text format, over HTTP/1.1.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use api::orca::OrcaLoadReport;
use formats::Exposition;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};

use super::Numbers;
use super::accept::{Acceptor, Placed};
use crate::agent::Common;

/// The head of a request must have come by then.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// A connection ends after this time, so that nobody keeps a place for good.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);

/// Serves for ever.
pub(super) async fn serve(listener: TcpListener, numbers: Numbers, common: &Arc<Common>) -> Infallible {
    let acceptor = Acceptor::new(listener);
    loop {
        let connection = acceptor.accept().await;
        tokio::spawn(serve_connection(connection, numbers.clone(), Arc::clone(common)));
    }
}

async fn serve_connection(connection: Placed, numbers: Numbers, common: Arc<Common>) {
    let service = service_fn(|request| {
        let answer = answer(&request, &numbers, &common);
        async move { Ok::<_, Infallible>(answer) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(connection), service);
    // Errors are the peer's: there is nobody to tell.
    let _ = timeout(CONNECTION_AGE_MAX, serving).await;
}

fn answer(request: &Request<Incoming>, numbers: &Numbers, common: &Common) -> Response<Full<Bytes>> {
    let (status, body, kind) = if request.uri().path() != "/metrics" {
        (StatusCode::NOT_FOUND, "there is /metrics\n".to_owned(), "text/plain; charset=utf-8")
    } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
        (StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n".to_owned(), "text/plain; charset=utf-8")
    } else {
        let page = page(numbers.borrow().as_ref(), common);
        (StatusCode::OK, page, "text/plain; version=0.0.4; charset=utf-8")
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn page(report: Option<&OrcaLoadReport>, common: &Common) -> String {
    let mut text = Exposition::default();
    let truth = |is: bool| if is { 1.0 } else { 0.0 };
    let mut gauge = |name: &str, help: &str, value: f64| {
        text.family(name, "gauge", help);
        text.sample(name, &[], value);
    };
    let answers = common.service.borrow().answers();
    gauge("trimtab_agent_service_up", "Whether the resource's own service answers.", truth(answers));
    let draining = truth(common.balancers.any_drains());
    gauge("trimtab_agent_draining", "Whether an operator drains the resource at a balancer.", draining);
    let reporting = common.balancers.reporting() as f64;
    gauge("trimtab_agent_balancers_reporting", "Balancers that answer the agent's reports.", reporting);
    write_sources(&mut text, common);
    if let Some(report) = report {
        write_report(&mut text, report);
    }
    text.into_string()
}

fn write_sources(text: &mut Exposition, common: &Common) {
    let name = "trimtab_agent_source_up";
    text.family(name, "gauge", "Whether the service's own numbers from a source are fresh, and so reported.");
    for (source, age) in common.sources.ages(Instant::now()) {
        text.sample(name, &[("source", source)], if age.is_some() { 1.0 } else { 0.0 });
    }
}

fn write_report(text: &mut Exposition, report: &OrcaLoadReport) {
    let name = "trimtab_agent_utilization_ratio";
    text.family(name, "gauge", "How busy the resource is, by dimension, as reported.");
    let own = [("cpu", report.cpu_utilization), ("memory", report.mem_utilization)];
    let application = Some(("application", report.application_utilization)).filter(|(_, value)| *value > 0.0);
    let further = report.utilization.iter().map(|(key, value)| (key.as_str(), *value));
    for (dimension, value) in own.into_iter().chain(application).chain(further) {
        text.sample(name, &[("dimension", dimension)], value);
    }
    for (name, help, value) in [
        (
            "trimtab_agent_operations_per_second",
            "Operations a second, where they are known.",
            report.rps_fractional,
        ),
        ("trimtab_agent_errors_per_second", "Errors a second, where they are known.", report.eps),
    ] {
        text.family(name, "gauge", help);
        text.sample(name, &[], value);
    }
    let name = "trimtab_agent_metric";
    text.family(name, "gauge", "Further numbers as reported, by name.");
    for (key, value) in &report.named_metrics {
        text.sample(name, &[("name", key)], *value);
    }
}
