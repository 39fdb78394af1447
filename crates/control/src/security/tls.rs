//! TLS of the control listener: what it shows, whom it trusts, and what a client's certificate says.
//!
//! rustls with ring, TLS 1.3 and 1.2 with its default suites. No session is resumed: a client proves its certificate
//! anew with each connection, so one that has expired ends there.
//!
//! Files are looked at twice a second and read when they changed. What cannot be used is said once, and what was loaded
//! before stays.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::rules::{NAME_BYTES_MAX, San};

/// How often the files are looked at. A change is read when two looks saw the same: a key is written beside its
/// certificate, not with it.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Names of one certificate that are looked at; SPIFFE has one.
const NAMES_MAX: usize = 32;
/// Largest PEM file: all the roots of a system take 250 kB.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// `[control.tls]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// The balancer's certificate and those between it and its CA, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The CAs whose certificates peers may show, PEM.
    pub client_ca: PathBuf,
    /// Whether a peer without a certificate gets no further than the handshake. Else it may show a token.
    pub require_certificate: bool,
}

/// Why TLS cannot be served: the operator's to mend.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("control.tls.{key} cannot be read from {}: {why}", path.display())]
    Unreadable {
        /// Which key of the configuration.
        key: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        why: String,
    },
    /// A file has not what it should have.
    #[error("control.tls.{key}: {} has no {what} in PEM", path.display())]
    Empty {
        /// Which key of the configuration.
        key: &'static str,
        /// Which file.
        path: PathBuf,
        /// `certificate` or `private key`.
        what: &'static str,
    },
    /// They do not go together.
    #[error("control.tls: {} and {} cannot be used: {source}", cert.display(), key.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What rustls said.
        source: rustls::Error,
    },
    /// The CAs are none.
    #[error("control.tls.client_ca: {} cannot be used: {why}", path.display())]
    ClientCa {
        /// Which file.
        path: PathBuf,
        /// What rustls said.
        why: String,
    },
}

/// What files hold now, without reading them.
type Fingerprint = Vec<Option<(u64, u64, i64, i64, i64, i64)>>;

/// TLS as it is now.
pub(crate) struct Tls {
    config: TlsConfig,
    current: RwLock<Arc<ServerConfig>>,
    loaded: AtomicU64,
    failed: AtomicU64,
    /// Seconds since 1970.
    not_after: AtomicI64,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Tls {
    pub(crate) fn load(config: TlsConfig) -> Result<Self, TlsError> {
        let (current, not_after) = load(&config)?;
        Ok(Self {
            config,
            current: RwLock::new(current),
            loaded: AtomicU64::new(1),
            failed: AtomicU64::new(0),
            not_after: AtomicI64::new(not_after),
        })
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// How often the files were read, and how often in vain.
    pub(crate) fn reloads(&self) -> (u64, u64) {
        (self.loaded.load(Relaxed), self.failed.load(Relaxed))
    }

    /// When the balancer's certificate ends, in seconds since 1970.
    pub(crate) fn not_after(&self) -> i64 {
        self.not_after.load(Relaxed)
    }

    /// Looks at the files for ever, on a thread where they may block.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut used = self.look().await;
        let mut last = used.clone();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.look().await;
            let is_settled = now == last;
            last = now;
            if is_settled && last != used {
                used = last.clone();
                let tls = Arc::clone(&self);
                // It ends with the process at the latest.
                let _ = tokio::task::spawn_blocking(move || tls.reload()).await;
            }
        }
    }

    async fn look(self: &Arc<Self>) -> Fingerprint {
        let tls = Arc::clone(self);
        tokio::task::spawn_blocking(move || tls.fingerprint()).await.unwrap_or_default()
    }

    fn fingerprint(&self) -> Fingerprint {
        let of = |path: &PathBuf| {
            let file = std::fs::metadata(path).ok()?;
            Some((file.ino(), file.size(), file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()))
        };
        let TlsConfig { cert, key, client_ca, .. } = &self.config;
        [cert, key, client_ca].into_iter().map(of).collect()
    }

    fn reload(&self) {
        match load(&self.config) {
            Ok((config, not_after)) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = config;
                self.not_after.store(not_after, Relaxed);
                self.loaded.fetch_add(1, Relaxed);
                tracing::info!(
                    cert = %self.config.cert.display(), not_after_unix_s = not_after,
                    "control's certificates were read anew; new connections get them"
                );
            }
            Err(error) => {
                self.failed.fetch_add(1, Relaxed);
                tracing::error!(%error, "control's certificates changed and cannot be used; those before stay");
            }
        }
    }
}

fn load(config: &TlsConfig) -> Result<(Arc<ServerConfig>, i64), TlsError> {
    let chain = certificates("cert", &config.cert)?;
    let not_after = chain.first().and_then(|first| parse(first)).map_or(0, |first| first.not_after);
    let key = PrivateKeyDer::from_pem_slice(&read("key", &config.key)?).map_err(|_| TlsError::Empty {
        key: "key",
        path: config.key.clone(),
        what: "private key",
    })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pair = |source| TlsError::Pair { cert: config.cert.clone(), key: config.key.clone(), source };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(pair)?;
    let verifier = verifier(config, provider)?;
    let builder = builder.with_client_cert_verifier(verifier);
    let mut server = builder.with_single_cert(chain, key).map_err(pair)?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok((Arc::new(server), not_after))
}

fn verifier(
    config: &TlsConfig,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let path = &config.client_ca;
    let unusable = |why: &dyn fmt::Display| TlsError::ClientCa { path: path.clone(), why: why.to_string() };
    let mut roots = RootCertStore::empty();
    for root in certificates("client_ca", path)? {
        roots.add(root).map_err(|error| unusable(&error))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let verifier = if config.require_certificate { verifier } else { verifier.allow_unauthenticated() };
    verifier.build().map_err(|error| unusable(&error))
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(key, path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        _ => Err(TlsError::Empty { key, path: path.to_owned(), what: "certificate" }),
    }
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable = |why: String| TlsError::Unreadable { key, path: path.to_owned(), why };
    let size = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if size > FILE_BYTES_MAX {
        return Err(unreadable(format!("it has {size} bytes, more than any certificates take")));
    }
    std::fs::read(path).map_err(|error| unreadable(error.to_string()))
}

/// What a verified certificate says of whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// URIs and DNS names, in the certificate's order.
    pub(crate) names: Vec<San>,
    /// Seconds since 1970.
    pub(crate) not_after: i64,
}

/// Reads a certificate; `None`: it is none that can be read.
pub(crate) fn parse(der: &[u8]) -> Option<Certificate> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let not_after = certificate.validity().not_after.timestamp();
    let names = certificate.subject_alternative_name().ok()?;
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) if name.len() <= NAME_BYTES_MAX => {
            Some(San::Dns(name.to_ascii_lowercase()))
        }
        GeneralName::URI(uri) if uri.len() <= NAME_BYTES_MAX => Some(San::Uri((*uri).to_owned())),
        _ => None,
    };
    let names = names.iter().flat_map(|names| &names.value.general_names).filter_map(name);
    Some(Certificate { names: names.take(NAMES_MAX).collect(), not_after })
}
