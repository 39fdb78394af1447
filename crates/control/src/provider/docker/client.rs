//! The Docker Engine API over HTTP/1.1: what is asked, and how much of an answer is taken.
//!
//! Owns: connections, time limits, sizes, the version that is spoken. Does not own: what answers mean.
//!
//! Only GET is ever sent: nothing at the engine is changed from here.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::wire::{Container, ContainerId, Info, Listed, Service, Stats, Task, Version};
use crate::provider::DockerEndpoint;

/// For one answer, from connecting to its last byte. An engine that starts containers is slow at times.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// For a list: 10,000 containers are some 10 MB.
const LIST_BYTES_MAX: usize = 32 << 20;
/// For one thing.
const ONE_BYTES_MAX: usize = 1 << 20;
/// What an engine says beside an error status.
const MESSAGE_CHARS_MAX: usize = 200;
/// The version of the API that this was written for and is tested with.
const API_VERSION: ApiVersion = ApiVersion(1, 41);

/// Why the engine did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DockerError {
    /// The operator's to mend, mostly.
    #[error("{endpoint} cannot be connected to: {source}{}", connect_hint(source))]
    Connect { endpoint: DockerEndpoint, source: io::Error },
    /// The engine's.
    #[error("{path} was not answered within {ANSWER_WITHIN:?}")]
    Late { path: String },
    #[error("{path}: {source}")]
    Http { path: String, source: hyper::Error },
    #[error("{path} was answered with {status}: {message}")]
    Status { path: String, status: StatusCode, message: String },
    #[error("the answer to {path} is larger than {max} bytes")]
    TooLarge { path: String, max: usize },
    #[error("the answer to {path} is not as the API describes it: {source}")]
    Answer { path: String, source: serde_json::Error },
    #[error("it speaks the API in versions {oldest:?} to {newest:?}, which are no versions")]
    Version { oldest: String, newest: String },
    #[error("the stream of events ended")]
    EventsEnded,
}

fn connect_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            ". Let the balancer's user in: Docker gives the socket to the group docker"
        }
        io::ErrorKind::NotFound => {
            ". Is the engine installed and running? provider.endpoint says where it is asked"
        }
        _ => "",
    }
}

impl DockerError {
    /// For metrics.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "connect",
            Self::Late { .. } => "timeout",
            Self::Http { .. } | Self::EventsEnded => "connection",
            Self::Status { .. } => "status",
            Self::TooLarge { .. } | Self::Answer { .. } | Self::Version { .. } => "answer",
        }
    }

    /// Whether the engine says that there is no such thing.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status: StatusCode::NOT_FOUND, .. })
    }
}

/// `1.41`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ApiVersion(u16, u16);

impl ApiVersion {
    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        Some(Self(major.parse().ok()?, minor.parse().ok()?))
    }
}

/// An engine, asked.
#[derive(Debug, Clone)]
pub(super) struct Client {
    endpoint: DockerEndpoint,
    /// `/v1.41`.
    prefix: String,
}

impl Client {
    /// Asks which versions the engine speaks, and takes the one nearest to ours.
    ///
    /// # Errors
    /// When it does not answer so.
    pub(super) async fn open(endpoint: &DockerEndpoint) -> Result<Self, DockerError> {
        let mut client = Self { endpoint: endpoint.clone(), prefix: String::new() };
        let version: Version = client.ask("/version", ONE_BYTES_MAX).await?;
        client.prefix = spoken(&version)?;
        Ok(client)
    }

    pub(super) async fn info(&self) -> Result<Info, DockerError> {
        self.ask("/info", ONE_BYTES_MAX).await
    }

    /// Containers that run, paused ones among them.
    pub(super) async fn containers(&self) -> Result<Vec<Listed>, DockerError> {
        self.ask("/containers/json", LIST_BYTES_MAX).await
    }

    pub(super) async fn container(&self, id: &ContainerId) -> Result<Container, DockerError> {
        self.ask(&format!("/containers/{}/json", id.as_str()), ONE_BYTES_MAX).await
    }

    pub(super) async fn services(&self) -> Result<Vec<Service>, DockerError> {
        self.ask("/services?status=false", LIST_BYTES_MAX).await
    }

    /// The tasks of one node.
    pub(super) async fn tasks(&self, node: &str) -> Result<Vec<Task>, DockerError> {
        let filters = serde_json::json!({ "node": [node] }).to_string();
        self.ask(&format!("/tasks?filters={}", encoded(&filters)), LIST_BYTES_MAX).await
    }

    /// One sample, at once: deltas are ours to make.
    pub(super) async fn stats(&self, id: &ContainerId) -> Result<Stats, DockerError> {
        self.ask(&format!("/containers/{}/stats?stream=false&one-shot=true", id.as_str()), ONE_BYTES_MAX)
            .await
    }

    /// The stream of events of these types and actions, from now on.
    pub(super) async fn events(&self, types: &[&str], actions: &[&str]) -> Result<Answer, DockerError> {
        let filters = serde_json::json!({ "type": types, "event": actions }).to_string();
        let path = format!("/events?filters={}", encoded(&filters));
        timeout(ANSWER_WITHIN, self.send(&path)).await.map_err(|_| DockerError::Late { path })?
    }

    async fn ask<T: DeserializeOwned>(&self, path: &str, bytes_max: usize) -> Result<T, DockerError> {
        let asked = async {
            let answer = self.send(path).await?;
            let body = answer.collect(path, bytes_max).await?;
            serde_json::from_slice(&body)
                .map_err(|source| DockerError::Answer { path: path.to_owned(), source })
        };
        timeout(ANSWER_WITHIN, asked).await.map_err(|_| DockerError::Late { path: path.to_owned() })?
    }

    /// Sends a request on a connection of its own, and gives the answer if it is a good one.
    async fn send(&self, path: &str) -> Result<Answer, DockerError> {
        let connect = |source| DockerError::Connect { endpoint: self.endpoint.clone(), source };
        let answer = match &self.endpoint {
            DockerEndpoint::Unix(file) => {
                let stream = UnixStream::connect(file).await.map_err(connect)?;
                self.send_on(stream, path).await?
            }
            DockerEndpoint::Tcp(address) => {
                let stream = TcpStream::connect(address).await.map_err(connect)?;
                self.send_on(stream, path).await?
            }
        };
        if answer.status.is_success() {
            return Ok(answer);
        }
        let status = answer.status;
        let body = answer.collect(path, ONE_BYTES_MAX).await?;
        Err(DockerError::Status { path: path.to_owned(), status, message: message(&body) })
    }

    async fn send_on(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        path: &str,
    ) -> Result<Answer, DockerError> {
        let http = |source| DockerError::Http { path: path.to_owned(), source };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // What goes wrong is told to whoever waits for the answer.
            let _ = connection.await;
        });
        let mut request = Request::new(Empty::<Bytes>::new());
        let uri = format!("{}{path}", self.prefix);
        *request.uri_mut() = uri.parse().unwrap_or_default();
        request.headers_mut().insert(http::header::HOST, http::HeaderValue::from_static("docker"));
        let response = sender.send_request(request).await.map_err(http)?;
        Ok(Answer { status: response.status(), body: response.into_body(), _driver: driver })
    }
}

/// The head of an answer, and its body as it comes. The connection is closed when it is dropped.
#[derive(Debug)]
pub(super) struct Answer {
    status: StatusCode,
    body: Incoming,
    _driver: JoinSet<()>,
}

impl Answer {
    /// The next piece of the body; `None`: it has ended.
    pub(super) async fn piece(&mut self) -> Option<Result<Bytes, hyper::Error>> {
        loop {
            match self.body.frame().await? {
                // Trailers say nothing here.
                Ok(frame) => match frame.into_data() {
                    Ok(data) => return Some(Ok(data)),
                    Err(_) => continue,
                },
                Err(error) => return Some(Err(error)),
            }
        }
    }

    async fn collect(self, path: &str, max: usize) -> Result<Bytes, DockerError> {
        let collected = Limited::new(self.body, max).collect().await;
        collected.map(|body| body.to_bytes()).map_err(|error| match error.downcast::<hyper::Error>() {
            Ok(source) => DockerError::Http { path: path.to_owned(), source: *source },
            Err(error) => {
                debug_assert!(error.is::<LengthLimitError>(), "the only other error of a limited body");
                DockerError::TooLarge { path: path.to_owned(), max }
            }
        })
    }
}

/// The prefix of all paths: our version, or the engine's nearest to it.
fn spoken(version: &Version) -> Result<String, DockerError> {
    let wrong = || DockerError::Version { oldest: version.oldest.clone(), newest: version.newest.clone() };
    let newest = ApiVersion::parse(&version.newest).ok_or_else(wrong)?;
    let oldest = if version.oldest.is_empty() { Some(newest) } else { ApiVersion::parse(&version.oldest) };
    let ApiVersion(major, minor) = API_VERSION.min(newest).max(oldest.ok_or_else(wrong)?);
    Ok(format!("/v{major}.{minor}"))
}

/// The engine's own words on one line: `{"message": "…"}`.
fn message(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Said {
        message: String,
    }
    let said = serde_json::from_slice::<Said>(body)
        .map_or_else(|_| String::from_utf8_lossy(body).into_owned(), |said| said.message);
    said.chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS_MAX).collect()
}

/// For the query of a URI (RFC 3986, 2.1): everything but letters and digits is escaped.
fn encoded(text: &str) -> String {
    let escape = |byte: u8| match byte.is_ascii_alphanumeric() {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_nearest_to_ours_is_spoken() {
        let spoken = |oldest: &str, newest: &str| {
            spoken(&Version { oldest: oldest.into(), newest: newest.into() })
                .map_err(|error| error.to_string())
        };
        assert_eq!(spoken("1.12", "1.41").unwrap(), "/v1.41");
        assert_eq!(spoken("1.44", "1.52").unwrap(), "/v1.44", "Docker 29 knows nothing older");
        assert_eq!(spoken("1.12", "1.40").unwrap(), "/v1.40");
        assert_eq!(spoken("", "1.9").unwrap(), "/v1.9", "numbers, not texts");
        assert!(spoken("1.12", "new").unwrap_err().contains("no versions"));
    }

    #[test]
    fn what_an_engine_says_is_one_short_line() {
        assert_eq!(message(br#"{"message":"No such container: x"}"#), "No such container: x");
        assert_eq!(message(b"page\r\nnot found"), "pagenot found");
        assert_eq!(message("x".repeat(5_000).as_bytes()).len(), MESSAGE_CHARS_MAX);
    }

    #[test]
    fn filters_can_stand_in_a_query() {
        assert_eq!(encoded(r#"{"a":["b c"]}"#), "%7B%22a%22%3A%5B%22b%20c%22%5D%7D");
    }
}
