//! `/metrics`, `/livez` and `/readyz`, over HTTP/1.1.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use allocation::telemetry::EngineSnapshot;
use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::guarded::{Acceptor, Guarded};
use crate::{Phase, Shared};

/// Most connections at once. Few scrape, and a page of metrics can be large.
const CONNECTIONS_MAX: usize = 32;
/// The head of a request must have come by then; a connection that is quiet for as long is closed.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// A connection ends after this time, so that nobody keeps a place for good.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);
/// What the answer on its way may take then.
const GRACE: Duration = Duration::from_secs(10);

/// Serves until the task is aborted.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let acceptor = Acceptor::new(listener, CONNECTIONS_MAX, HEAD_WITHIN);
    loop {
        let connection = acceptor.accept().await;
        tokio::spawn(serve_connection(connection, Arc::clone(&shared)));
    }
}

async fn serve_connection(connection: Guarded, shared: Arc<Shared>) {
    let service = service_fn(move |request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(answer(&request, shared).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(connection), service);
    let mut serving = std::pin::pin!(serving);
    // Errors are the peer's: it hung up, said nothing, or spoke no HTTP. There is nobody to tell.
    if tokio::time::timeout(CONNECTION_AGE_MAX, serving.as_mut()).await.is_err() {
        serving.as_mut().graceful_shutdown();
        let _ = tokio::time::timeout(GRACE, serving).await;
    }
}

async fn answer(request: &Request<Incoming>, shared: Arc<Shared>) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/livez" | "/readyz") {
        return text(StatusCode::NOT_FOUND, "there are /metrics, /livez and /readyz\n".to_owned());
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n".to_owned());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/metrics" => metrics(shared).await,
        "/readyz" => readiness(*shared.phase.borrow(), request.uri().query(), &shared),
        _ => text(StatusCode::OK, "alive\n".to_owned()),
    }
}

async fn metrics(shared: Arc<Shared>) -> Response<Full<Bytes>> {
    // With 10,000 resources a page takes some milliseconds: not on a thread that acks reports.
    let Ok(page) = tokio::task::spawn_blocking(move || shared.metrics.render(&shared)).await else {
        return text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be rendered\n".to_owned());
    };
    let mut response = Response::new(Full::from(page));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    response
}

/// With `?verbose` also what else is looked after, none of which changes the status.
fn readiness(phase: Phase, query: Option<&str>, shared: &Shared) -> Response<Full<Bytes>> {
    let status = if phase == Phase::Ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let more = if query == Some("verbose") {
        let EngineSnapshot { engine, reason, workers, .. } = shared.dataplane.engine();
        format!("engine {engine} ({reason}), {workers} workers\n") + &crate::dns::lines(&shared.dns.now())
    } else {
        String::new()
    };
    text(status, format!("{}\n{more}", phase.name()))
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
