//! One bounded HTTP request: what is pulled from a resource, asked of a service beside an agent, or posted to a resource.
//!
//! * It owns a [`Url`] that can be asked, the connection, TLS (rustls, ring) and the bounds: 64 KiB in the time that is given
//!   (of a page of lines: 64 KiB of those that are wanted, and 1 MiB in all, of which the rest is not kept), `200` or nothing, no redirect followed, nothing decompressed (none is asked for, and one that comes is
//!   refused), no cookie, no proxy, one request for each connection.
//! * It does not own whom one may ask: the address is the caller's, and a name in the URL is never looked up here. So what was
//!   checked is what is connected to.
#![forbid(unsafe_code)]

mod tls;
mod url;

use std::net::SocketAddr;
use std::time::Duration;

use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HOST, LOCATION, USER_AGENT};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

pub use tls::{CaError, Tls};
pub use url::{Host, Url, UrlError};

/// Longest body that is taken, in bytes.
pub const BODY_BYTES_MAX: usize = 64 * 1024;
/// Longest page of lines that is looked through, in bytes. Exporters of databases say 90 to 200 kB; what is wanted of it is little.
pub const PAGE_BYTES_MAX: usize = 1024 * 1024;
/// Longest head of an answer, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// What we read: our document, or Prometheus' text.
const ACCEPTED: &str =
    "application/json, text/plain;version=0.0.4, application/openmetrics-text;version=1.0.0;q=0.5";

/// Why there is no answer, or none that is taken. The fault of whoever serves the URL, or of whoever named it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Nobody is there.
    #[error("cannot connect to {address}: {why}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// What the kernel says.
        why: std::io::Error,
    },
    /// It is not who it should be, or speaks no TLS.
    #[error("no TLS with {address}: {why}")]
    Tls {
        /// Where.
        address: SocketAddr,
        /// What is wrong.
        why: std::io::Error,
    },
    /// It speaks no HTTP, or hung up.
    #[error("no HTTP answer: {0}")]
    Http(#[from] hyper::Error),
    /// It wants us elsewhere.
    #[error("the answer is {status}, a redirect: redirects are not followed, name the place itself")]
    Redirect {
        /// Its status.
        status: u16,
    },
    /// Any other status than 200.
    #[error("the answer is {status}, not 200")]
    Status {
        /// Its status.
        status: u16,
    },
    /// What was posted was not taken.
    #[error("the answer is {status}, which is no success")]
    NotTaken {
        /// Its status.
        status: u16,
    },
    /// It is compressed.
    #[error("the answer is compressed though none was asked for; nothing is decompressed")]
    Compressed,
    /// It is too long.
    #[error("the answer is longer than {BODY_BYTES_MAX} bytes: it was cut off")]
    TooLong,
    /// It goes on and on.
    #[error("the page is longer than {PAGE_BYTES_MAX} bytes: it was cut off")]
    PageTooLong,
    /// It took too long.
    #[error("no whole answer within {0:?}")]
    Late(Duration),
}

impl FetchError {
    /// Whether something answered, and what it said is not taken; else nothing came of it.
    pub const fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Redirect { .. }
                | Self::Status { .. }
                | Self::NotTaken { .. }
                | Self::Compressed
                | Self::TooLong
                | Self::PageTooLong
        )
    }
}

/// What is taken of an answer.
#[derive(Clone, Copy)]
pub enum Take<'w> {
    /// All of it.
    Whole,
    /// The lines that are wanted; the others become empty, so that lines keep their numbers.
    Lines(&'w (dyn Fn(&[u8]) -> bool + Sync)),
}

/// Asks `url` at `address`, for `within` in all.
///
/// # Errors
/// See [`FetchError`].
pub async fn get(
    url: &Url,
    address: SocketAddr,
    tls: &Tls,
    take: Take<'_>,
    within: Duration,
) -> Result<Vec<u8>, FetchError> {
    let request = request(url, Method::GET).header(ACCEPT, ACCEPTED).body(Full::default());
    exchange(url, address, tls, within, request, async |response| body_of(response, take).await).await
}

/// Posts a body of this media type to `url` at `address`, for `within` in all. Any status of success (2xx) will do, and what
/// comes with it is not read.
///
/// # Errors
/// See [`FetchError`].
pub async fn post(
    url: &Url,
    address: SocketAddr,
    tls: &Tls,
    (media_type, body): (&str, Vec<u8>),
    within: Duration,
) -> Result<(), FetchError> {
    let request = request(url, Method::POST).header(CONTENT_TYPE, media_type).body(Full::from(body));
    exchange(url, address, tls, within, request, async |response: Response<Incoming>| {
        refuse_redirect(&response)?;
        match response.status() {
            status if status.is_success() => Ok(()),
            status => Err(FetchError::NotTaken { status: status.as_u16() }),
        }
    })
    .await
}

/// What every request has.
fn request(url: &Url, method: Method) -> http::request::Builder {
    Request::builder()
        .method(method)
        .uri(url.path_and_query())
        .header(HOST, url.authority())
        .header(USER_AGENT, concat!("trimtab/", env!("CARGO_PKG_VERSION")))
        .header(ACCEPT_ENCODING, "identity")
        .header(http::header::CONNECTION, "close")
}

async fn exchange<T>(
    url: &Url,
    address: SocketAddr,
    tls: &Tls,
    within: Duration,
    request: http::Result<Request<Full<Bytes>>>,
    answer: impl AsyncFnOnce(Response<Incoming>) -> Result<T, FetchError>,
) -> Result<T, FetchError> {
    // Its parts were checked when the URL was parsed.
    let Ok(request) = request else { return Err(FetchError::Status { status: 0 }) };
    let answered = tokio::time::timeout(within, async {
        let stream = TcpStream::connect(address).await.map_err(|why| FetchError::Connect { address, why })?;
        if !url.is_tls() {
            return ask(request, stream, answer).await;
        }
        let secured = tls.connect(url.host(), stream).await;
        ask(request, secured.map_err(|why| FetchError::Tls { address, why })?, answer).await
    });
    answered.await.map_err(|_| FetchError::Late(within))?
}

async fn ask<T>(
    request: Request<Full<Bytes>>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    answer: impl AsyncFnOnce(Response<Incoming>) -> Result<T, FetchError>,
) -> Result<T, FetchError> {
    let (mut sender, connection) =
        http1::Builder::new().max_buf_size(HEAD_BYTES_MAX).handshake(TokioIo::new(stream)).await?;
    let answer = async {
        let response = sender.send_request(request).await?;
        answer(response).await
    };
    // Both in this task: when it is dropped, at the end of its time, the connection goes with it.
    let mut answer = std::pin::pin!(answer);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        answered = &mut answer => answered,
        // The peer hung up: what it sent before is there.
        _ = &mut connection => answer.await,
    }
}

fn refuse_redirect(response: &Response<Incoming>) -> Result<(), FetchError> {
    let status = response.status();
    if status.is_redirection() && response.headers().contains_key(LOCATION) {
        return Err(FetchError::Redirect { status: status.as_u16() });
    }
    Ok(())
}

async fn body_of(response: Response<Incoming>, take: Take<'_>) -> Result<Vec<u8>, FetchError> {
    refuse_redirect(&response)?;
    let status = response.status();
    if status != StatusCode::OK {
        return Err(FetchError::Status { status: status.as_u16() });
    }
    let encoding = response.headers().get(CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| encoding != "identity") {
        return Err(FetchError::Compressed);
    }
    let mut body = response.into_body();
    let mut taken = Taken { take, line: Vec::new(), kept: Vec::new(), seen: 0 };
    // What it announces need not be waited for.
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    taken.fits(announced)?;
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            taken.add(&data)?;
        }
    }
    taken.end()
}

/// What was taken so far.
struct Taken<'w> {
    take: Take<'w>,
    /// The line that has not ended yet.
    line: Vec<u8>,
    kept: Vec<u8>,
    seen: usize,
}

impl Taken<'_> {
    /// Whether so many bytes may come in all.
    fn fits(&self, bytes: usize) -> Result<(), FetchError> {
        match self.take {
            Take::Whole if bytes > BODY_BYTES_MAX => Err(FetchError::TooLong),
            Take::Lines(_) if bytes > PAGE_BYTES_MAX => Err(FetchError::PageTooLong),
            _ => Ok(()),
        }
    }

    fn add(&mut self, data: &[u8]) -> Result<(), FetchError> {
        self.seen = self.seen.saturating_add(data.len());
        self.fits(self.seen)?;
        if matches!(self.take, Take::Whole) {
            self.kept.extend_from_slice(data);
            return Ok(());
        }
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + piece.len() > BODY_BYTES_MAX {
                return Err(FetchError::TooLong);
            }
            self.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                self.end_line()?;
            }
        }
        Ok(())
    }

    fn end_line(&mut self) -> Result<(), FetchError> {
        let line = std::mem::take(&mut self.line);
        match self.take {
            Take::Lines(wanted) if !wanted(&line) => self.kept.push(b'\n'),
            _ => self.kept.extend_from_slice(&line),
        }
        if self.kept.len() > BODY_BYTES_MAX { Err(FetchError::TooLong) } else { Ok(()) }
    }

    fn end(mut self) -> Result<Vec<u8>, FetchError> {
        if !self.line.is_empty() {
            self.end_line()?;
        }
        Ok(self.kept)
    }
}

#[cfg(test)]
mod tests;
