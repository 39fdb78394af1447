//! The way to a balancer: TLS or clear text, and what is shown there.
//!
//! Owns: reading certificates and tokens, anew for each connection, and what a failed connection means. Does not own:
//! which balancers there are, and when to connect.
//!
//! The balancer's certificate is verified against `ca`, else against the roots of the system (rustls-native-certs: where
//! an operator's own CA is put for all programs of a host). A token is never sent in clear text to another host.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};
use tonic::{Request, Status};

/// Largest file of certificates: all the roots of a system take 250 kB.
const PEM_BYTES_MAX: u64 = 4 << 20;
/// Largest file of a token, which takes 85 bytes.
const TOKEN_BYTES_MAX: u64 = 4096;

/// How to reach a balancer, and what to show it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transport {
    /// The CAs that the balancer's certificate may be of, PEM; `None`: those of the system.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key, PEM; `None`: we have none.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that the balancer's certificate must have; `None`: the host of its URL.
    pub server_name: Option<String>,
    /// The bearer token.
    pub token: TokenSource,
}

/// Where a bearer token is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum TokenSource {
    /// There is none.
    #[default]
    None,
    /// In a file, which is read anew for each connection.
    File(PathBuf),
    /// Here.
    Given(Token),
}

/// A bearer token. It does not show itself in debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token, without the white space around it.
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// A file of ours cannot be read.
    #[error("cannot read {}: {why}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// What the system says.
        why: String,
    },
    /// What is to be a token has characters that no token has, or none.
    #[error("there is no token in {0}")]
    NoToken(String),
    /// Everybody on the way could read it.
    #[error("a token is not sent in clear text to another host: use https://, or a balancer on loopback")]
    TokenInClear,
    /// There are certificates, and the balancer is to be reached without: also one that another named.
    #[error("the balancer {0} is clear text, and certificates are given")]
    ClearText(Uri),
    /// The certificates are none, or the URL has no name to verify.
    #[error("{0}")]
    Certificates(String),
    /// Nobody answers, or not one we trust, or one that does not trust us.
    #[error("{0}")]
    Connect(String),
}

/// A connection that shows the token with each call.
pub type Connection = InterceptedService<Channel, Credentials>;

/// Shows a token with each call, if there is one.
#[derive(Clone)]
pub struct Credentials(Option<MetadataValue<Ascii>>);

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl Transport {
    /// Whether anything of it makes sense with TLS alone.
    pub fn wants_tls(&self) -> bool {
        self.ca.is_some() || self.identity.is_some() || self.server_name.is_some()
    }

    /// The scheme of a balancer of which only host and port are known, as one found by DNS: `https` if anything here
    /// makes sense with TLS alone, else `http`.
    pub fn scheme(&self) -> &'static str {
        if self.wants_tls() { "https" } else { "http" }
    }

    /// Connects to where its name leads, within `patience`; `with` sets what else the endpoint needs.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub async fn connect(
        &self,
        balancer: &Uri,
        patience: Duration,
        with: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Connection, TransportError> {
        self.connect_to(balancer, &[], patience, with).await
    }

    /// As [`Self::connect`], to the first of these addresses that takes a connection: DNS said where it is, maybe another
    /// DNS than this host's. None: to where its name leads.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub async fn connect_to(
        &self,
        balancer: &Uri,
        addresses: &[SocketAddr],
        patience: Duration,
        with: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Connection, TransportError> {
        let is_tls = balancer.scheme_str() == Some("https");
        if self.wants_tls() && !is_tls {
            return Err(TransportError::ClearText(balancer.clone()));
        }
        let credentials = self.credentials().await?;
        if credentials.0.is_some() && !is_tls && !is_loopback(balancer, addresses) {
            return Err(TransportError::TokenInClear);
        }
        let mut endpoint = with(Endpoint::from(balancer.clone()).connect_timeout(patience).tcp_nodelay(true));
        if is_tls {
            let tls = self.tls(balancer, patience).await?;
            endpoint =
                endpoint.tls_config(tls).map_err(|error| TransportError::Certificates(chain(&error)))?;
        }
        let connecting = async {
            match addresses {
                [] => endpoint.connect().await,
                _ => endpoint.connect_with_connector(to_one_of(addresses.to_vec(), patience)).await,
            }
        };
        match timeout(patience, connecting).await {
            Ok(Ok(channel)) => Ok(InterceptedService::new(channel, credentials)),
            Ok(Err(error)) => Err(TransportError::Connect(chain(&error))),
            Err(_) => Err(TransportError::Connect(format!("no connection within {patience:?}"))),
        }
    }

    async fn tls(&self, balancer: &Uri, patience: Duration) -> Result<ClientTlsConfig, TransportError> {
        let host = balancer.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let name = self.server_name.as_deref().unwrap_or(host);
        let tls = ClientTlsConfig::new().domain_name(name).timeout(patience);
        let tls = match &self.ca {
            Some(ca) => tls.ca_certificate(Certificate::from_pem(read(ca, PEM_BYTES_MAX).await?)),
            None => tls.with_native_roots(),
        };
        let Some((cert, key)) = &self.identity else { return Ok(tls) };
        let identity = Identity::from_pem(read(cert, PEM_BYTES_MAX).await?, read(key, PEM_BYTES_MAX).await?);
        Ok(tls.identity(identity))
    }

    async fn credentials(&self) -> Result<Credentials, TransportError> {
        let (token, place) = match &self.token {
            TokenSource::None => return Ok(Credentials(None)),
            TokenSource::Given(token) => (token.clone(), "TRIMTAB_TOKEN".to_owned()),
            TokenSource::File(path) => {
                let bytes = read(path, TOKEN_BYTES_MAX).await?;
                (Token::new(&String::from_utf8_lossy(&bytes)), path.display().to_string())
            }
        };
        let plain = token.0.bytes().all(|byte| byte.is_ascii_graphic());
        let value = MetadataValue::try_from(format!("Bearer {}", token.0)).ok();
        let Some(mut value) = value.filter(|_| plain && !token.0.is_empty()) else {
            return Err(TransportError::NoToken(place));
        };
        // Neither in logs of HTTP/2 nor in its compression tables.
        value.set_sensitive(true);
        Ok(Credentials(Some(value)))
    }
}

/// A connector to the first of these that takes a connection.
fn to_one_of(
    addresses: Vec<SocketAddr>,
    patience: Duration,
) -> impl tower::Service<Uri, Response = TokioIo<TcpStream>, Error = io::Error, Future: Send> + Send + 'static
{
    tower::service_fn(move |_: Uri| {
        let addresses = addresses.clone();
        async move {
            let patience = patience / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
            let mut refused = io::Error::from(io::ErrorKind::AddrNotAvailable);
            for address in addresses {
                match timeout(patience, TcpStream::connect(address)).await {
                    Ok(Ok(stream)) => {
                        stream.set_nodelay(true)?;
                        return Ok(TokioIo::new(stream));
                    }
                    Ok(Err(error)) => refused = error,
                    Err(_) => refused = io::ErrorKind::TimedOut.into(),
                }
            }
            Err(refused)
        }
    })
}

async fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, TransportError> {
    let unreadable = |why: String| TransportError::Unreadable { path: path.to_owned(), why };
    let size = tokio::fs::metadata(path).await.map_err(|error| unreadable(error.to_string()))?.len();
    if size > bytes_max {
        return Err(unreadable(format!("it has {size} bytes, more than the {bytes_max} that it may")));
    }
    tokio::fs::read(path).await.map_err(|error| unreadable(error.to_string()))
}

fn is_loopback(balancer: &Uri, addresses: &[SocketAddr]) -> bool {
    if !addresses.is_empty() {
        return addresses.iter().all(|address| address.ip().to_canonical().is_loopback());
    }
    let host = balancer.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// An error with its causes; transport errors say little without. What TLS says in its own words is explained.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Many only repeat their cause.
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    let mut said = text.as_str();
    // Which layer passed it on helps nobody.
    while let Some(rest) = LAYERS.into_iter().find_map(|layer| said.strip_prefix(layer)) {
        said = rest;
    }
    match hint(said) {
        Some(hint) => format!("{said} ({hint})"),
        None => said.to_owned(),
    }
}

const LAYERS: [&str; 3] = ["transport error: ", "tcp connect error: ", "connection error: "];

const OTHER_CA: &str =
    "the balancer's certificate is of a CA that is not trusted here: --ca names the file of the right one";

/// By rustls's words: the layers between pass on nothing else.
fn hint(text: &str) -> Option<&'static str> {
    let hints = [
        ("received fatal alert: UnknownCA", "the balancer does not trust the CA of --cert"),
        // Another CA of the same name.
        ("received fatal alert: DecryptError", "the balancer does not trust the CA of --cert"),
        ("received fatal alert: CertificateExpired", "the certificate of --cert has expired"),
        ("received fatal alert: CertificateRequired", "the balancer wants a certificate: --cert and --key"),
        ("received fatal alert", "the balancer refuses the certificate of --cert"),
        ("invalid peer certificate: UnknownIssuer", OTHER_CA),
        ("invalid peer certificate: BadSignature", OTHER_CA),
        (
            "invalid peer certificate: certificate not valid for name",
            "the balancer's certificate is for another name: --server-name says which one to expect",
        ),
        ("invalid peer certificate: certificate expired", "the balancer's certificate has expired"),
        ("frame with invalid size", "what answers there may speak TLS: is it https://?"),
        ("received corrupt message", "what answers there speaks no TLS: is it http://?"),
    ];
    hints.into_iter().find(|(words, _)| text.contains(words)).map(|(_, hint)| hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_token_does_not_leave_the_host_in_clear_text() {
        let token = TokenSource::Given(Token::new(" trimtab_0_secret\n"));
        let transport = Transport { token, ..Transport::default() };
        for url in ["http://192.0.2.1:7400", "http://balancer.example:7400", "http://[2001:db8::1]:7400"] {
            let refused = transport.connect(&url.parse().unwrap(), PATIENCE, |e| e).await.unwrap_err();
            assert!(matches!(refused, TransportError::TokenInClear), "{url}: {refused}");
        }
        // Nobody is there: it got as far as to try.
        for url in ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"] {
            let refused = transport.connect(&url.parse().unwrap(), PATIENCE, |e| e).await.unwrap_err();
            assert!(matches!(refused, TransportError::Connect(_)), "{url}: {refused}");
        }
    }

    #[tokio::test]
    async fn who_has_certificates_speaks_no_clear_text() {
        let transport = Transport { ca: Some("ca.pem".into()), ..Transport::default() };
        let url = "http://127.0.0.1:1".parse().unwrap();
        let refused = transport.connect(&url, PATIENCE, |e| e).await.unwrap_err();
        assert!(matches!(refused, TransportError::ClearText(_)), "{refused}");
    }

    #[tokio::test]
    async fn nothing_shows_the_token() {
        let token = TokenSource::Given(Token::new("trimtab_0_secret"));
        let transport = Transport { token, ..Transport::default() };
        let credentials = transport.credentials().await.unwrap();
        let shown = format!("{transport:?} {credentials:?} {:?}", credentials.0);
        assert!(!shown.contains("secret"), "{shown}");
    }

    #[tokio::test]
    async fn what_cannot_be_a_token_is_not_one() {
        for text in ["", "  \n", "two words", "line\nline", "ä"] {
            let token = TokenSource::Given(Token::new(text));
            let refused = Transport { token, ..Transport::default() }.credentials().await.unwrap_err();
            assert!(matches!(refused, TransportError::NoToken(_)), "{text:?}: {refused}");
        }
        let token = TokenSource::File("/nowhere/token".into());
        let refused = Transport { token, ..Transport::default() }.credentials().await.unwrap_err();
        assert_eq!(refused.to_string(), "cannot read /nowhere/token: No such file or directory (os error 2)");
    }
}
