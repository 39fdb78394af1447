//! HTTP/1.1 (RFC 9110, RFC 9112): one request, and its answer to the end.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use http::header::{ACCEPT_ENCODING, CONNECTION, HOST, USER_AGENT};
use http::{HeaderValue, Request, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;

use crate::text::{find, printable, shown};
use crate::wire::Wire;
use crate::{Failure, TAKEN_BYTES_MAX};

/// Most ranges of statuses.
const RANGES_MAX: usize = 16;
/// Longest head of an answer, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// How.
    pub method: Method,
    /// For what: a path and perhaps a query.
    pub path: Uri,
    /// The `Host`; `None`: the resource's address.
    pub host: Option<HeaderValue>,
    /// What the status must be.
    pub statuses: Statuses,
    /// Must be in the body; empty: the body does not matter.
    pub expect: Vec<u8>,
}

/// A method that changes nothing (RFC 9110 §9.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Method {
    /// `GET`.
    #[default]
    Get,
    /// `HEAD`.
    Head,
    /// `OPTIONS`.
    Options,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 3] = [Self::Get, Self::Head, Self::Options];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Options => "OPTIONS",
        }
    }
}

/// Statuses that are well: `200`, `200-399`, `200,204,300-399`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statuses(Vec<RangeInclusive<u16>>);

impl Default for Statuses {
    fn default() -> Self {
        Self(vec![200..=399])
    }
}

impl Statuses {
    fn contain(&self, status: u16) -> bool {
        self.0.iter().any(|range| range.contains(&status))
    }
}

impl fmt::Display for Statuses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, range) in self.0.iter().enumerate() {
            f.write_str(if place == 0 { "" } else { "," })?;
            match (range.start(), range.end()) {
                (start, end) if start == end => write!(f, "{start}")?,
                (start, end) => write!(f, "{start}-{end}")?,
            }
        }
        Ok(())
    }
}

/// Why a text names no statuses: the operator's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no statuses from 100 to 599")]
pub struct StatusesError(
    /// What was written.
    pub String,
);

impl FromStr for Statuses {
    type Err = StatusesError;

    fn from_str(text: &str) -> Result<Self, StatusesError> {
        let wrong = || StatusesError(text.to_owned());
        let number = |text: &str| text.trim().parse::<u16>().ok().filter(|n| (100..=599).contains(n));
        let range = |part: &str| {
            let (start, end) = part.split_once('-').unwrap_or((part, part));
            let (start, end) = (number(start)?, number(end)?);
            (start <= end).then_some(start..=end)
        };
        let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
        ranges.filter(|ranges| ranges.len() <= RANGES_MAX).map(Self).ok_or_else(wrong)
    }
}

impl Http {
    pub(crate) async fn ask(
        &self,
        wire: Wire,
        address: SocketAddr,
        said: impl FnOnce(Result<String, Failure>),
    ) {
        let (Some(io), Some(request)) = (wire.into_bounded(), self.request(address)) else {
            return said(Err(Failure::HungUp));
        };
        let builder = hyper::client::conn::http1::Builder::new().max_buf_size(HEAD_BYTES_MAX).clone();
        let (mut sender, connection) = match builder.handshake(TokioIo::new(io)).await {
            Ok(both) => both,
            Err(error) => return said(Err(no_http(&error))),
        };
        let mut connection = std::pin::pin!(connection);
        let mut answer = std::pin::pin!(async {
            let response = sender.send_request(request).await;
            self.judge(response.map_err(|error| no_http(&error))?).await
        });
        let mut open = true;
        let result = loop {
            tokio::select! {
                answered = &mut answer => break answered,
                // It hung up: what it sent before is there.
                _ = &mut connection, if open => open = false,
            }
        };
        said(result);
        if open {
            // `Connection: close` was asked for: the server ends it, and so does hyper.
            let _ = connection.await;
        }
    }

    fn request(&self, address: SocketAddr) -> Option<Request<Empty<Bytes>>> {
        let own = || HeaderValue::from_str(&address.to_string()).ok();
        let request = Request::builder()
            .method(self.method.name())
            .uri(self.path.clone())
            .header(HOST, self.host.clone().or_else(own)?)
            .header(USER_AGENT, concat!("trimtab/", env!("CARGO_PKG_VERSION")))
            .header(ACCEPT_ENCODING, "identity")
            .header(CONNECTION, "close");
        request.body(Empty::new()).ok()
    }

    async fn judge(&self, response: http::Response<Incoming>) -> Result<String, Failure> {
        let status = response.status();
        let mut body = response.into_body();
        let mut kept = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|error| no_http(&error))?.into_data() else { continue };
            if kept.len() + data.len() > TAKEN_BYTES_MAX {
                return Err(Failure::TooLong);
            }
            kept.extend_from_slice(&data);
        }
        if !self.statuses.contain(status.as_u16()) {
            return Err(Failure::Answer(format!("status {status}, not {}", self.statuses)));
        }
        if find(&kept, &self.expect).is_none() {
            let message = format!("status {status}, without {:?} in its body", shown(&self.expect));
            return Err(Failure::Answer(printable(&message)));
        }
        Ok(format!("status {status}"))
    }
}

fn no_http(error: &hyper::Error) -> Failure {
    if error.is_incomplete_message() {
        return Failure::HungUp;
    }
    Failure::Protocol("HTTP answer", printable(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        let all: Statuses = "200, 204,300-399".parse().unwrap();
        assert_eq!(all.to_string(), "200,204,300-399");
        assert!(all.contain(204) && all.contain(399) && !all.contain(201) && !all.contain(400));
        for wrong in ["", "99", "600", "200-", "300-200", "ok", "200;204"] {
            assert!(wrong.parse::<Statuses>().is_err(), "{wrong}");
        }
    }
}
