//! TLS of a check: who is believed, and by what name.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::Failure;
use crate::wire::{Duplex, Wire};

/// How TLS is spoken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// The name that is asked for and that the certificate must have; `None`: the address.
    pub server_name: Option<String>,
    /// Whether the certificate must be of an authority that is believed. A check that only asks whether a service works, over a
    /// network that is trusted, may do without.
    pub verify: bool,
    /// A PEM file of authorities that are believed beside the system's.
    pub ca: Option<PathBuf>,
    /// Whether it is asked for in the protocol, where that has a word for it ([`crate::Dialogue::has_starttls`]), and does not begin
    /// at once.
    pub starttls: bool,
}

impl Default for TlsConfig {
    fn default() -> Self {
        Self { server_name: None, verify: true, ca: None, starttls: false }
    }
}

/// TLS that begins when both have said so in clear (STARTTLS).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Later<'a> {
    pub(crate) tls: &'a Tls,
    pub(crate) target: IpAddr,
}

impl Later<'_> {
    /// The server has said yes.
    pub(crate) async fn begin(self, wire: &mut Wire) -> Result<(), Failure> {
        // In clear nothing more may be said, not even goodbye.
        wire.part_with(b"");
        wire.secure(self.tls, self.target, false).await
    }
}

/// Whether TLS can ask for a server by this name: a DNS name or an address.
pub fn is_server_name(text: &str) -> bool {
    ServerName::try_from(text).is_ok()
}

/// The same, ready to use.
#[derive(Debug)]
pub struct Tls {
    server_name: Option<ServerName<'static>>,
    verify: bool,
    believed: fetch::Tls,
    unverified: OnceLock<Arc<ClientConfig>>,
}

impl Tls {
    /// Reads the authorities.
    ///
    /// # Errors
    /// When their file has none.
    pub fn new(config: TlsConfig) -> Result<Self, fetch::CaError> {
        let TlsConfig { server_name, verify, ca, starttls: _ } = config;
        Ok(Self {
            server_name: server_name.and_then(|name| ServerName::try_from(name).ok()),
            verify,
            believed: ca.as_deref().map(fetch::Tls::with_ca).transpose()?.unwrap_or_default(),
            unverified: OnceLock::new(),
        })
    }

    pub(crate) async fn connect(
        &self,
        io: Box<dyn Duplex>,
        target: IpAddr,
        h2: bool,
    ) -> io::Result<TlsStream<Box<dyn Duplex>>> {
        let mut config = if self.verify { self.believed.config()? } else { self.unverified()? };
        if h2 {
            Arc::make_mut(&mut config).alpn_protocols = vec![b"h2".to_vec()];
        }
        let name = self.server_name.clone().unwrap_or_else(|| ServerName::from(target));
        TlsConnector::from(config).connect(name, io).await
    }

    fn unverified(&self) -> io::Result<Arc<ClientConfig>> {
        if let Some(config) = self.unverified.get() {
            return Ok(Arc::clone(config));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
            .with_no_client_auth();
        Ok(Arc::clone(self.unverified.get_or_init(|| Arc::new(config))))
    }
}

/// Believes every certificate; the handshake must still be signed by its key.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
