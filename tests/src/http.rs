//! As much of an HTTP client as a probe needs.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A status and a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpAnswer {
    /// 200, 503, …
    pub status: u16,
    /// What came with it.
    pub body: String,
}

/// `GET path`, on a connection of its own.
///
/// # Errors
/// When nobody answers, or in something that is not HTTP.
pub fn get(address: SocketAddr, path: &str) -> io::Result<HttpAnswer> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let not_http = || io::Error::new(io::ErrorKind::InvalidData, format!("not as expected: {answer:?}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(not_http)?;
    let mut words = head.split(' ');
    let version = words.next().unwrap_or_default();
    let status = words.next().and_then(|status| status.parse().ok()).ok_or_else(not_http)?;
    if version != "HTTP/1.1" || head.to_ascii_lowercase().contains("transfer-encoding") {
        return Err(not_http());
    }
    Ok(HttpAnswer { status, body: body.to_owned() })
}
