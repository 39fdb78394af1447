//! Who is believed to be who they say: the system's authorities, and one's own.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::url::Host;

/// What `https` needs. Made when it is first needed: reading the system's authorities takes milliseconds.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    /// Believed beside the system's.
    own: Vec<CertificateDer<'static>>,
    config: Arc<OnceLock<Arc<ClientConfig>>>,
}

/// Why a file of authorities is none. Its owner's to mend.
#[derive(Debug, thiserror::Error)]
#[error("{} has no certificate authority: {why}", path.display())]
pub struct CaError {
    path: PathBuf,
    why: String,
}

impl Tls {
    /// With the authorities of a PEM file beside the system's.
    ///
    /// # Errors
    /// When the file cannot be read, or has no certificate in it.
    pub fn with_ca(path: &Path) -> Result<Self, CaError> {
        let wrong = |why: String| CaError { path: path.to_owned(), why };
        let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let own: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
        let own = own.map_err(|error| wrong(error.to_string()))?;
        if own.is_empty() {
            return Err(wrong("there is no BEGIN CERTIFICATE in it".to_owned()));
        }
        let mut roots = RootCertStore::empty();
        for certificate in &own {
            roots.add(certificate.clone()).map_err(|error| wrong(error.to_string()))?;
        }
        Ok(Self { own, config: Arc::default() })
    }

    pub(crate) async fn connect(&self, host: &Host, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let name = match host {
            Host::Ip(ip) => ServerName::from(*ip),
            Host::Name(name) => ServerName::try_from(name.clone()).map_err(io::Error::other)?,
        };
        TlsConnector::from(self.config()?).connect(name, stream).await
    }

    /// The same for who brings a stream of his own; made at the first call.
    ///
    /// # Errors
    /// When the provider of cryptography has no safe version of TLS: a fault of ours.
    pub fn config(&self) -> io::Result<Arc<ClientConfig>> {
        if let Some(config) = self.config.get() {
            return Ok(Arc::clone(config));
        }
        let mut roots = RootCertStore::empty();
        // What cannot be read there is not believed.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots.add_parsable_certificates(self.own.iter().cloned());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Arc::clone(self.config.get_or_init(|| Arc::new(config))))
    }
}
