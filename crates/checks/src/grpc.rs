//! `grpc.health.v1.Health/Check` (the gRPC Health Checking Protocol) over HTTP/2, as gRPC's "gRPC over HTTP2" has it.

use std::net::SocketAddr;

use http::header::{CONTENT_TYPE, TE, USER_AGENT};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::text::printable;
use crate::wire::Wire;
use crate::{Failure, TAKEN_BYTES_MAX};

const METHOD: &str = "/grpc.health.v1.Health/Check";

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grpc {
    /// The service; empty: the server as a whole.
    pub service: String,
    /// The `:authority`; `None`: the resource's address.
    pub authority: Option<String>,
}

impl Grpc {
    pub(crate) async fn ask(
        &self,
        wire: Wire,
        address: SocketAddr,
        is_tls: bool,
        said: impl FnOnce(Result<String, Failure>),
    ) {
        let (Some(io), Some(request)) = (wire.into_bounded(), self.request(address, is_tls)) else {
            return said(Err(Failure::HungUp));
        };
        let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        let (mut sender, connection) = match builder.handshake(TokioIo::new(io)).await {
            Ok(both) => both,
            Err(error) => return said(Err(no_grpc(&error))),
        };
        let mut connection = std::pin::pin!(connection);
        let mut answer = std::pin::pin!(async {
            let response = sender.send_request(request).await;
            let judged = judge(response.map_err(|error| no_grpc(&error))?).await;
            // With the last sender gone the connection says GOAWAY, and ends.
            drop(sender);
            judged
        });
        let mut open = true;
        let result = loop {
            tokio::select! {
                answered = &mut answer => break answered,
                _ = &mut connection, if open => open = false,
            }
        };
        said(result);
        if open {
            let _ = connection.await;
        }
    }

    fn request(&self, address: SocketAddr, is_tls: bool) -> Option<Request<Full<Bytes>>> {
        let authority = self.authority.clone().unwrap_or_else(|| address.to_string());
        let scheme = if is_tls { "https" } else { "http" };
        let uri = http::Uri::builder().scheme(scheme).authority(authority).path_and_query(METHOD).build();
        let request = Request::post(uri.ok()?)
            .header(CONTENT_TYPE, "application/grpc")
            .header(TE, "trailers")
            .header(USER_AGENT, concat!("trimtab/", env!("CARGO_PKG_VERSION")));
        request.body(Full::from(message(&self.service))).ok()
    }
}

/// A HealthCheckRequest, behind the prefix of a gRPC message: not compressed, its length.
fn message(service: &str) -> Vec<u8> {
    let mut body = Vec::new();
    if !service.is_empty() {
        // Field 1, length-delimited.
        body.push(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            body.push(length as u8 | 0x80);
            length >>= 7;
        }
        body.push(length as u8);
        body.extend_from_slice(service.as_bytes());
    }
    let mut message = vec![0];
    message.extend_from_slice(&(body.len() as u32).to_be_bytes());
    message.extend_from_slice(&body);
    message
}

async fn judge(response: http::Response<Incoming>) -> Result<String, Failure> {
    let (head, mut body) = response.into_parts();
    if head.status != http::StatusCode::OK {
        return Err(Failure::Protocol("gRPC", format!("status {}", head.status)));
    }
    let mut data = Vec::new();
    // An error that comes at once has its status in the head ("Trailers-Only").
    let mut trailers = head.headers;
    while let Some(frame) = body.frame().await {
        match frame.map_err(|error| no_grpc(&error))?.into_data() {
            Ok(piece) if data.len() + piece.len() > TAKEN_BYTES_MAX => return Err(Failure::TooLong),
            Ok(piece) => data.extend_from_slice(&piece),
            Err(frame) => trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    grpc_status(&trailers)?;
    serving(&data)
}

fn grpc_status(trailers: &HeaderMap) -> Result<(), Failure> {
    let text = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        Some("0") => Ok(()),
        Some("5") => Err(Failure::Answer("it does not know the service".to_owned())),
        Some("12") => Err(Failure::Answer("it has no grpc.health.v1".to_owned())),
        Some(code) => {
            let message = text("grpc-message").unwrap_or_default();
            Err(Failure::Answer(printable(&format!("gRPC status {code}: {message}"))))
        }
        None => Err(Failure::Protocol("gRPC", "no grpc-status".to_owned())),
    }
}

/// HealthCheckResponse: field 1 is the status.
fn serving(data: &[u8]) -> Result<String, Failure> {
    let wrong = || Failure::Protocol("HealthCheckResponse", format!("{} bytes", data.len()));
    let (prefix, body) = data.split_at_checked(5).ok_or_else(wrong)?;
    if prefix[0] != 0
        || body.len() != u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize
    {
        return Err(wrong());
    }
    let status = match body {
        [] => 0,
        [0x08, status, ..] if *status < 0x80 => *status,
        _ => return Err(wrong()),
    };
    match status {
        1 => Ok("SERVING".to_owned()),
        2 => Err(Failure::Answer("NOT_SERVING".to_owned())),
        3 => Err(Failure::Answer("SERVICE_UNKNOWN".to_owned())),
        other => Err(Failure::Answer(format!("serving status {other}"))),
    }
}

fn no_grpc(error: &hyper::Error) -> Failure {
    let mut last: &dyn std::error::Error = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    Failure::Protocol("gRPC", printable(&last.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages() {
        assert_eq!(message(""), [0, 0, 0, 0, 0]);
        assert_eq!(message("sql"), b"\0\0\0\0\x05\x0a\x03sql");
        assert_eq!(message(&"x".repeat(200))[5..8], [0x0a, 0xc8, 0x01]);
        assert_eq!(serving(b"\0\0\0\0\x02\x08\x01").unwrap(), "SERVING");
        for (wrong, says) in [
            (&b"\0\0\0\0\x02\x08\x02"[..], "NOT_SERVING"),
            (b"\0\0\0\0\0", "serving status 0"),
            (b"\0\0\0\0\x03\x08\x01", "no HealthCheckResponse"),
            (b"\x01\0\0\0\x02\x08\x01", "no HealthCheckResponse"),
            (b"", "no HealthCheckResponse"),
        ] {
            let failure = serving(wrong).unwrap_err().to_string();
            assert!(failure.contains(says), "{failure}");
        }
    }

    #[test]
    fn statuses() {
        let of = |code: &'static str| {
            HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.parse().unwrap())])
        };
        assert!(grpc_status(&of("0")).is_ok());
        assert!(grpc_status(&of("12")).unwrap_err().to_string().contains("grpc.health.v1"));
        assert!(grpc_status(&HeaderMap::new()).is_err());
    }
}
