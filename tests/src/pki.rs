//! Certificates as `trimtab pki` makes them, and those that it never would.

use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use time::{Duration, OffsetDateTime};

use crate::trimtab;

/// A CA in a folder of its own.
#[derive(Debug)]
pub struct Pki {
    folder: tempfile::TempDir,
}

impl Default for Pki {
    fn default() -> Self {
        Self::new()
    }
}

impl Pki {
    /// A new CA.
    ///
    /// # Panics
    /// When it cannot be made.
    #[track_caller]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let pki = Self { folder };
        pki.run(&["pki", "init", "--dir", &pki.dir()]);
        pki
    }

    fn dir(&self) -> String {
        plain(self.folder.path())
    }

    #[track_caller]
    fn run(&self, arguments: &[&str]) {
        let ended = trimtab(arguments);
        assert_eq!(ended.code, Some(0), "trimtab {arguments:?}: {}", ended.stderr);
    }

    /// A certificate with these further flags of `trimtab pki issue`; what is there under this name is replaced.
    ///
    /// # Panics
    /// When it cannot be made.
    #[track_caller]
    pub fn issue(&self, name: &str, flags: &[&str]) {
        let arguments = ["pki", "issue", "--force", "--dir", &self.dir(), "--name", name];
        self.run(&[&arguments, flags].concat());
    }

    /// A client's certificate of this URI that was valid until `seconds` from now: negative, it has expired.
    ///
    /// # Panics
    /// When it cannot be made.
    #[track_caller]
    pub fn issue_until(&self, name: &str, uri: &str, seconds: i64) {
        let text = |file: &str| std::fs::read_to_string(self.path(file)).expect("the CA was made");
        let ca_key = KeyPair::from_pem(&text("ca.key")).expect("the CA's key");
        let ca = Issuer::from_ca_cert_pem(&text("ca.pem"), ca_key).expect("the CA's certificate");
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.not_before = OffsetDateTime::now_utc() - Duration::days(1);
        params.not_after = OffsetDateTime::now_utc() + Duration::seconds(seconds);
        params.subject_alt_names = vec![SanType::URI(uri.try_into().expect("ASCII"))];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &ca).expect("a certificate");
        for (kind, pem) in [("key", key.serialize_pem()), ("pem", certificate.pem())] {
            std::fs::write(self.path(&format!("{name}.{kind}")), pem).expect("a file in our own folder");
        }
    }

    /// Where a file of it is.
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// The flags that show a certificate of it.
    pub fn shows(&self, name: &str) -> [String; 4] {
        let file = |kind: &str| plain(&self.path(&format!("{name}.{kind}")));
        ["--cert".into(), file("pem"), "--key".into(), file("key")]
    }

    /// The flags that trust it.
    pub fn trusted(&self) -> [String; 2] {
        ["--ca".into(), plain(&self.path("ca.pem"))]
    }
}

fn plain(path: &Path) -> String {
    path.to_str().expect("a plain path").to_owned()
}
