//! Active checks: a service is asked in its own protocol whether it works.
//!
//! ```text
//! Schedule      when the next check is due, and what results in a row mean: rise, fall, jitter     pure
//! Check::begin  connect -> TLS -> the dialogue of its kind -> goodbye -> FIN, and theirs awaited
//!                          or where the dialogue asks for it (STARTTLS)
//! ```
//!
//! * It owns the dialogues: for each protocol a pure codec (bytes out, `parse` over bytes in) and a few lines that drive it over
//!   any stream. It does not own whom to check, how many at once, or what follows from a result.
//! * **A check does not hurt a server.** Every dialogue is one that a well-behaved client would have, to its end: it logs in
//!   where a server counts those who do not, says goodbye in the protocol's words, sends FIN and waits for the server's; it never
//!   leaves bytes unread behind, which the kernel would answer by a reset. A server that took the connection and does not
//!   answer in time is not connected to again: the dialogue that is open goes on as [`Waiting`], so a server that hangs finds
//!   one connection when it comes back, not hundreds that were given up.
//! * **Everything is bounded**: the time to an answer is the check's, a goodbye takes [`GOODBYE_WITHIN`], a dialogue takes
//!   [`TAKEN_BYTES_MAX`] bytes, what is kept of an answer is [`ANSWER_CHARS_MAX`] characters.
#![forbid(unsafe_code)]

mod command;
mod dns;
mod ftp;
mod grpc;
mod http1;
mod mysql;
mod postgresql;
mod redis;
mod reply;
mod schedule;
mod send_expect;
mod smtp;
mod text;
mod tls;
mod udp;
mod wire;
mod xmpp;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

pub use command::CommandLine;
pub use dns::{DnsName, DnsNameError, DnsQuery, Rcode, RecordType, Transport};
pub use grpc::Grpc;
pub use http1::{Http, Method, Statuses, StatusesError};
pub use mysql::MySql;
pub use postgresql::PostgreSql;
pub use schedule::{Change, Jitter, Schedule, Step, Timing};
pub use send_expect::SendExpect;
pub use smtp::Smtp;
pub use text::{EscapeError, unescape};
pub use tls::{Tls, TlsConfig, is_server_name};
pub use udp::Udp;
pub use wire::TAKEN_BYTES_MAX;
pub use xmpp::{StreamKind, Xmpp};

use tls::Later;
use wire::Wire;

/// How long a goodbye may take, once the answer is known.
pub const GOODBYE_WITHIN: Duration = Duration::from_millis(500);
/// Longest answer that is kept, in characters.
pub const ANSWER_CHARS_MAX: usize = 160;

/// What is said to a service, and what it must answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dialogue {
    /// Nothing: it takes the connection.
    Tcp,
    /// A TLS handshake.
    Tls,
    /// Some bytes, and what must come back.
    SendExpect(SendExpect),
    /// An HTTP/1.1 request (RFC 9112).
    Http(Http),
    /// `grpc.health.v1.Health/Check`.
    Grpc(Grpc),
    /// A session that begins and ends, or an SSLRequest.
    PostgreSql(PostgreSql),
    /// A session that begins and ends.
    MySql(MySql),
    /// PING and QUIT.
    Redis,
    /// A greeting, EHLO and QUIT (RFC 5321), with STARTTLS and EHLO again between them (RFC 3207).
    Smtp(Smtp),
    /// A greeting and QUIT (RFC 959), with AUTH TLS between them (RFC 4217).
    Ftp,
    /// A stream that is opened and closed (RFC 6120), with another before it that goes over to TLS.
    Xmpp(Xmpp),
    /// A query (RFC 1035).
    Dns(DnsQuery),
    /// A datagram.
    Udp(Udp),
    /// A program of the operator's.
    Command(CommandLine),
}

impl Dialogue {
    /// Every name of a kind.
    pub const KINDS: [&'static str; 14] = [
        "tcp",
        "tls",
        "send_expect",
        "http",
        "grpc",
        "postgresql",
        "mysql",
        "redis",
        "smtp",
        "ftp",
        "xmpp",
        "dns",
        "udp",
        "command",
    ];

    /// Whether it can go over to TLS when it has begun in clear, or begin within TLS: [`TlsConfig::starttls`] says which. (Those of
    /// databases always go over.)
    pub const fn has_starttls(&self) -> bool {
        matches!(self, Self::Smtp(_) | Self::Ftp | Self::Xmpp(_))
    }

    /// The name of its kind, in the configuration and in output.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::SendExpect(_) => "send_expect",
            Self::Http(_) => "http",
            Self::Grpc(_) => "grpc",
            Self::PostgreSql(_) => "postgresql",
            Self::MySql(_) => "mysql",
            Self::Redis => "redis",
            Self::Smtp(_) => "smtp",
            Self::Ftp => "ftp",
            Self::Xmpp(_) => "xmpp",
            Self::Dns(_) => "dns",
            Self::Udp(_) => "udp",
            Self::Command(_) => "command",
        }
    }
}

/// A check, by configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckConfig {
    /// What is said.
    pub dialogue: Dialogue,
    /// When, and what results in a row mean.
    pub timing: Timing,
    /// From the connect to the answer.
    pub timeout: Duration,
    /// Asked instead of the resource's own address.
    pub address: Option<SocketAddr>,
    /// Asked instead of the resource's own port.
    pub port: Option<u16>,
    /// Whether it is spoken within TLS.
    pub tls: Option<TlsConfig>,
    /// What its connections and datagrams begin with, before everything else: where flows come with a PROXY header, a server
    /// takes nobody without one.
    pub proxy: Option<ProxyHeader>,
}

/// A PROXY header that says "this is the proxy's own" (proxy-protocol.txt, sections 2.1 and 2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyHeader {
    /// Version 1: `UNKNOWN`.
    V1,
    /// Version 2: the command `LOCAL`.
    V2,
}

impl ProxyHeader {
    const fn bytes(self) -> &'static [u8] {
        match self {
            Self::V1 => b"PROXY UNKNOWN\r\n",
            Self::V2 => b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
        }
    }

    /// Before a datagram; version 1 has none for them. It names the balancer as the client and not `LOCAL`, which means the same:
    /// Knot 3.2 drops a datagram that says so.
    fn datagram_bytes(self, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        if self == Self::V1 {
            return Vec::new();
        }
        let ports = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
        // A connected socket's are of one family.
        let addresses = [octets(source.ip()), octets(destination.ip()), ports].concat();
        let family = if source.is_ipv4() { 0x12 } else { 0x22 };
        [b"\r\n\r\n\0\r\nQUIT\n\x21", &[family, 0, addresses.len() as u8][..], &addresses].concat()
    }
}

/// Who is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The resource's id.
    pub resource: String,
    /// Its pool.
    pub pool: String,
    /// Where it serves.
    pub address: SocketAddr,
}

/// Why a check failed: always the fault of the service's side or its network, or of how the check was configured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// Nobody took the connection.
    #[error("cannot connect to {0}: {1}")]
    Connect(SocketAddr, io::Error),
    /// No answer in time.
    #[error("no answer from {0} within {1:?}")]
    Late(SocketAddr, Duration),
    /// The connection failed in the middle.
    #[error("the connection failed: {0}")]
    Broken(io::Error),
    /// It ended the connection before it had answered.
    #[error("it hung up before it had answered")]
    HungUp,
    /// It goes on and on.
    #[error("it said more than {TAKEN_BYTES_MAX} bytes")]
    TooLong,
    /// No TLS, or not with whom it should be.
    #[error("no TLS: {0}")]
    Tls(io::Error),
    /// It answered, and not well.
    #[error("{0}")]
    Answer(String),
    /// It answered in another protocol.
    #[error("what it says is no {0}: {1}")]
    Protocol(&'static str, String),
    /// The program cannot be run.
    #[error("{0} cannot be run: {1}")]
    Command(String, io::Error),
}

/// What a check came to, for a closed set of label values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It works.
    Passed,
    /// Nobody took the connection.
    Refused,
    /// No answer in time.
    TimedOut,
    /// Something came, and it was not what should have.
    Failed,
}

impl Verdict {
    /// Every verdict.
    pub const ALL: [Self; 4] = [Self::Passed, Self::Refused, Self::TimedOut, Self::Failed];

    /// Its name in metrics and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Refused => "refused",
            Self::TimedOut => "timed_out",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What came of a check.
#[derive(Debug)]
pub struct Outcome {
    /// What the service said, or why that is not well.
    pub result: Result<String, Failure>,
    /// From the connect to the answer.
    pub took: Duration,
}

impl Outcome {
    /// In one word.
    pub fn verdict(&self) -> Verdict {
        match &self.result {
            Ok(_) => Verdict::Passed,
            Err(Failure::Connect(..)) => Verdict::Refused,
            Err(Failure::Late(..)) => Verdict::TimedOut,
            Err(_) => Verdict::Failed,
        }
    }

    /// In words: one printable line of at most [`ANSWER_CHARS_MAX`] characters.
    pub fn said(&self) -> String {
        match &self.result {
            Ok(said) => text::printable(said),
            Err(failure) => text::printable(&failure.to_string()),
        }
    }
}

/// A check that has begun.
pub enum Begun {
    /// It is over, and so is its connection.
    Ended(Outcome),
    /// Its time is over; the connection was taken, and the dialogue goes on if somebody waits for it.
    Late(Outcome, Waiting),
}

impl fmt::Debug for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended(outcome) => f.debug_tuple("Ended").field(outcome).finish(),
            Self::Late(outcome, _) => f.debug_tuple("Late").field(outcome).finish_non_exhaustive(),
        }
    }
}

/// A dialogue, with its connection.
type Talk = Pin<Box<dyn Future<Output = ()> + Send>>;
type Answer = oneshot::Receiver<Result<String, Failure>>;

/// A dialogue that has had no answer in time and is still open. Dropping it gives the connection up.
pub struct Waiting {
    /// `None`: it has ended.
    talk: Option<Talk>,
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waiting")
    }
}

impl Waiting {
    /// Returns when the dialogue has ended, its goodbye included. May be dropped and called again.
    pub async fn ended(&mut self) {
        if let Some(talk) = &mut self.talk {
            talk.await;
            self.talk = None;
        }
    }
}

/// A check that can be run.
#[derive(Debug)]
pub struct Check {
    config: CheckConfig,
    tls: Option<Arc<Tls>>,
}

impl Check {
    /// Reads what its configuration names.
    ///
    /// # Errors
    /// When the file of authorities has none.
    pub fn new(config: CheckConfig) -> Result<Self, fetch::CaError> {
        let implied = matches!(config.dialogue, Dialogue::Tls).then(TlsConfig::default);
        let tls = config.tls.clone().or(implied).map(Tls::new).transpose()?.map(Arc::new);
        Ok(Self { config, tls })
    }

    /// A check that connects and no more, within this time.
    pub fn of_connect(timeout: Duration) -> Self {
        let config = CheckConfig {
            dialogue: Dialogue::Tcp,
            timing: Timing::default(),
            timeout,
            address: None,
            port: None,
            tls: None,
            proxy: None,
        };
        Self { config, tls: None }
    }

    /// As configured.
    pub fn config(&self) -> &CheckConfig {
        &self.config
    }

    /// Where this resource is asked.
    pub fn target(&self, resource: SocketAddr) -> SocketAddr {
        let mut target = self.config.address.unwrap_or(resource);
        if let Some(port) = self.config.port {
            target.set_port(port);
        }
        target
    }

    /// Runs it once. Returns within the check's time-out and [`GOODBYE_WITHIN`].
    pub async fn begin(&self, subject: &Subject) -> Begun {
        let (begun, target) = (Instant::now(), self.target(subject.address));
        let limit = self.config.timeout;
        let late = || Failure::Late(target, limit);
        let ended = |result| Begun::Ended(Outcome { result, took: begun.elapsed() });
        let proxy = self.config.proxy;
        let once = match &self.config.dialogue {
            Dialogue::Dns(query) if query.transport == Transport::Udp => {
                Some(timeout(limit, dns::ask_udp(query, proxy, target, limit)).await)
            }
            // Silence may be its answer: it keeps the time itself.
            Dialogue::Udp(udp) => Some(Ok(udp::ask(udp, proxy, target, limit).await)),
            Dialogue::Command(command) => Some(timeout(limit, command.run(subject, target)).await),
            _ => None,
        };
        if let Some(result) = once {
            return ended(result.unwrap_or_else(|_| Err(late())));
        }
        let stream = match timeout(limit, TcpStream::connect(target)).await {
            // The kernel gave us the very port that nobody listens on: we have connected to ourselves.
            Ok(Ok(stream)) if stream.local_addr().is_ok_and(|local| local == target) => {
                return ended(Err(Failure::Connect(target, io::ErrorKind::ConnectionRefused.into())));
            }
            Ok(Ok(stream)) => stream,
            Ok(Err(why)) => return ended(Err(Failure::Connect(target, why))),
            Err(_) => return ended(Err(late())),
        };
        let (mut talk, mut answer) = self.talk(stream, subject, target);
        let left = limit.saturating_sub(begun.elapsed());
        let answered = timeout(left, async {
            tokio::select! {
                biased;
                answered = &mut answer => (answered, false),
                () = &mut talk => ((&mut answer).await, true),
            }
        });
        match answered.await {
            // The dialogue always says what came of it before it ends.
            Ok((answered, is_over)) => {
                let outcome =
                    Outcome { result: answered.unwrap_or(Err(Failure::HungUp)), took: begun.elapsed() };
                // What is not over by then is dropped with its connection.
                if !is_over {
                    let _ = timeout(GOODBYE_WITHIN, &mut talk).await;
                }
                Begun::Ended(outcome)
            }
            Err(_) => {
                let outcome = Outcome { result: Err(late()), took: begun.elapsed() };
                Begun::Late(outcome, Waiting { talk: Some(talk) })
            }
        }
    }

    /// The dialogue over a connection, and where its answer comes.
    fn talk(&self, stream: TcpStream, subject: &Subject, target: SocketAddr) -> (Talk, Answer) {
        let (say, answer) = oneshot::channel();
        let (dialogue, tls) = (self.config.dialogue.clone(), self.tls.clone());
        let proxy = self.config.proxy;
        let starttls = dialogue.has_starttls() && self.config.tls.as_ref().is_some_and(|tls| tls.starttls);
        let host = subject.address;
        let talk = Box::pin(async move {
            // The other end of the channel may have gone: nobody waits any more.
            let said = |result| drop(say.send(result));
            let local = stream.local_addr();
            let mut wire = Wire::new(stream);
            if let Some(proxy) = proxy
                && let Err(failure) = wire.say(proxy.bytes()).await
            {
                return said(Err(failure));
            }
            let tls_first = !starttls && !matches!(dialogue, Dialogue::PostgreSql(_) | Dialogue::MySql(_));
            if let Some(tls) = tls.as_deref().filter(|_| tls_first) {
                let h2 = matches!(dialogue, Dialogue::Grpc(_));
                if let Err(failure) = wire.secure(tls, target.ip(), h2).await {
                    return said(Err(failure));
                }
            }
            let later = tls.as_deref().filter(|_| starttls).map(|tls| Later { tls, target: target.ip() });
            let result = match &dialogue {
                // These two bring a client of their own, which says goodbye itself.
                Dialogue::Http(http) => return http.ask(wire, host, said).await,
                Dialogue::Grpc(grpc) => return grpc.ask(wire, host, tls.is_some(), said).await,
                Dialogue::Dns(query) => dns::ask_tcp(query, &mut wire).await,
                // Datagrams and programs have no connection and do not come here.
                Dialogue::Tcp | Dialogue::Udp(_) | Dialogue::Command(_) => {
                    Ok("it took the connection".to_owned())
                }
                Dialogue::Tls => Ok("the TLS handshake went well".to_owned()),
                Dialogue::SendExpect(texts) => send_expect::ask(texts, &mut wire).await,
                Dialogue::PostgreSql(of) => postgresql::ask(of, &mut wire, tls.as_deref(), target.ip()).await,
                Dialogue::MySql(of) => mysql::ask(of, &mut wire, tls.as_deref(), target.ip()).await,
                Dialogue::Redis => redis::ask(&mut wire).await,
                Dialogue::Smtp(smtp) => smtp::ask(smtp, &mut wire, local.ok().map(|at| at.ip()), later).await,
                Dialogue::Ftp => ftp::ask(&mut wire, later).await,
                Dialogue::Xmpp(xmpp) => xmpp::ask(xmpp, &mut wire, later).await,
            };
            // The answer does not wait for the goodbye.
            said(result);
            wire.leave().await;
        });
        (talk, answer)
    }
}

#[cfg(test)]
mod tests;
