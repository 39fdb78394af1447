//! `trimtab pki`: a small CA and certificates, for a first set-up.
//!
//! Owns: what stands in such a certificate (RFC 5280), and that no key is ever readable by others or lost by accident.
//! Does not own: who may join with one (`[[control.peer]]`). An organisation that has a CA, or SPIFFE, uses that.
//!
//! Keys are ECDSA P-256. The CA may sign certificates of its own alone (path length 0). Files are written beside their
//! place and moved there, the key first, so that a balancer that reads them anew finds whole ones.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

use crate::cli::{PkiArgs, PkiCommand, PkiInitArgs, PkiIssueArgs};
use crate::failure::{Failure, read_file};
use crate::output::print;
use crate::problem::Problem;

/// Certificates are valid from so long ago on: clocks differ.
const SKEW: Duration = Duration::minutes(5);
const CA: &str = "ca";

/// `trimtab pki`.
///
/// # Errors
/// When files cannot be written, or would be overwritten.
pub fn run(args: &PkiArgs) -> Result<(), Failure> {
    match &args.command {
        PkiCommand::Init(args) => init(args),
        PkiCommand::Issue(args) => issue(args),
    }
}

fn init(args: &PkiInitArgs) -> Result<(), Failure> {
    std::fs::create_dir_all(&args.dir).map_err(|error| unwritten(&args.dir, &error))?;
    let files = Files::free(&args.dir, CA, args.force)?;
    let key = KeyPair::generate().map_err(fault)?;
    let mut params = validity(args.days);
    // With a part that no other has: of two CAs of one name, a peer could not say which one it lacks.
    let raw = key.public_key_raw();
    let part: String = raw[raw.len().saturating_sub(4)..].iter().map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name.push(DnType::CommonName, format!("{} {part}", args.name));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(fault)?;
    files.write(&key.serialize_pem(), &certificate.pem())
}

fn issue(args: &PkiIssueArgs) -> Result<(), Failure> {
    let names = names(args)?;
    if args.name == CA {
        return Err(usage("--name ca is the CA's own", "write another name"));
    }
    let files = Files::free(&args.dir, &args.name, args.force)?;
    let issuer = issuer(&args.dir)?;
    let key = KeyPair::generate().map_err(fault)?;
    let mut params = validity(args.days);
    params.distinguished_name.push(DnType::CommonName, args.name.as_str());
    params.subject_alt_names = names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match (args.client, args.server) {
        (true, false) => vec![ExtendedKeyUsagePurpose::ClientAuth],
        (false, true) => vec![ExtendedKeyUsagePurpose::ServerAuth],
        _ => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).map_err(fault)?;
    files.write(&key.serialize_pem(), &certificate.pem())
}

fn names(args: &PkiIssueArgs) -> Result<Vec<SanType>, Failure> {
    let text = |name: &String| {
        let plain = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
        let parsed = Ia5String::try_from(name.as_str()).ok().filter(|_| plain);
        parsed.ok_or_else(|| usage(&format!("{name:?} is no name"), "write ASCII without spaces"))
    };
    let mut names = Vec::new();
    for dns in &args.dns {
        names.push(SanType::DnsName(text(dns)?));
    }
    for uri in &args.uri {
        if !uri.contains("://") {
            return Err(usage(&format!("{uri:?} is no URI"), "write spiffe://DOMAIN/PATH"));
        }
        names.push(SanType::URI(text(uri)?));
    }
    names.extend(args.ip.iter().copied().map(SanType::IpAddress));
    if names.is_empty() {
        let hint = "add --dns NAME, --ip ADDRESS (what its clients connect to) or --uri spiffe://DOMAIN/PATH";
        return Err(usage("a certificate needs a name that others verify", hint));
    }
    Ok(names)
}

fn issuer(dir: &Path) -> Result<Issuer<'static, KeyPair>, Failure> {
    let [certificate, key] = [dir.join("ca.pem"), dir.join("ca.key")];
    let read = |file: &Path| read_file(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let hint = format!("`trimtab pki init --dir {}` makes a CA", dir.display());
    let unusable = |file: &Path, error: rcgen::Error| {
        usage(&format!("{} cannot be used: {error}", file.display()), &hint)
    };
    let pair = KeyPair::from_pem(&read(&key)?).map_err(|error| unusable(&key, error))?;
    Issuer::from_ca_cert_pem(&read(&certificate)?, pair).map_err(|error| unusable(&certificate, error))
}

fn validity(days: u16) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.not_before = now - SKEW;
    params.not_after = now + Duration::days(i64::from(days));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
}

/// A certificate and its key, where they will be.
struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

impl Files {
    /// Nothing is there yet, or it may go.
    fn free(dir: &Path, name: &str, force: bool) -> Result<Self, Failure> {
        let [certificate, key] = ["pem", "key"].map(|kind| dir.join(format!("{name}.{kind}")));
        for file in [&certificate, &key] {
            if !force && file.symlink_metadata().is_ok() {
                let hint = "take another --name or --dir, or add --force to replace it";
                return Err(usage(&format!("{} is there already", file.display()), hint));
            }
        }
        Ok(Self { certificate, key })
    }

    fn write(&self, key: &str, certificate: &str) -> Result<(), Failure> {
        replace(&self.key, key, 0o600)?;
        replace(&self.certificate, certificate, 0o644)?;
        print(&format!("{}\n{}\n", self.certificate.display(), self.key.display()))
    }
}

/// Writes a file of its own and moves it into its place. It never has a wider mode than it should, not for a moment.
fn replace(file: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let new = file.with_extension(format!("new-{}", std::process::id()));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&new)
        .and_then(|mut open| open.write_all(text.as_bytes()).and_then(|()| open.sync_all()))
        .and_then(|()| std::fs::rename(&new, file));
    written.map_err(|error| {
        // It may not even be there.
        let _ = std::fs::remove_file(&new);
        unwritten(file, &error)
    })
}

fn unwritten(file: &Path, error: &io::Error) -> Failure {
    Failure::Output(io::Error::new(error.kind(), format!("{}: {error}", file.display())))
}

fn usage(message: &str, hint: &str) -> Failure {
    Failure::Usage(Problem::new(message, hint))
}

fn fault(error: rcgen::Error) -> Failure {
    Failure::Fault(error.into())
}

/// Parses the name of a certificate's files.
pub(crate) fn parse_name(text: &str) -> Result<String, Problem> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=64).contains(&text.len()) && text.chars().all(plain) && !text.starts_with('.') {
        return Ok(text.to_owned());
    }
    let hint = "write 1 to 64 of A-Z a-z 0-9 . _ -, as pg1; its files are NAME.pem and NAME.key";
    Err(Problem::new(format!("{text:?} is not a name"), hint))
}

/// Parses an address of a certificate.
pub(crate) fn parse_ip(text: &str) -> Result<IpAddr, Problem> {
    let hint = "write an address without a port, as 10.0.0.9";
    text.parse().map_err(|_| Problem::new(format!("{text:?} is not an IP address"), hint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn issue_args(dir: &Path, name: &str) -> PkiIssueArgs {
        PkiIssueArgs {
            dir: dir.to_owned(),
            name: name.to_owned(),
            dns: vec!["pg1.example.com".into()],
            ip: vec!["127.0.0.1".parse().unwrap()],
            uri: vec!["spiffe://example/sql/pg1".into()],
            days: 1,
            client: false,
            server: false,
            force: false,
        }
    }

    #[test]
    fn nothing_is_overwritten_and_keys_are_their_owners() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("new/pki");
        let ca = PkiInitArgs { dir: dir.clone(), name: "test".into(), days: 1, force: false };
        assert_eq!(issue(&issue_args(&dir, "pg1")).unwrap_err().code(), 66, "there is no CA");
        init(&ca).unwrap();
        issue(&issue_args(&dir, "pg1")).unwrap();
        let mode = |file: &str| std::fs::metadata(dir.join(file)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("ca.key"), mode("pg1.key"), mode("pg1.pem")), (0o600, 0o600, 0o644));

        let before = std::fs::read(dir.join("pg1.pem")).unwrap();
        for refused in [init(&ca), issue(&issue_args(&dir, "pg1")), issue(&issue_args(&dir, "ca"))] {
            assert_eq!(refused.unwrap_err().code(), 64);
        }
        assert_eq!(std::fs::read(dir.join("pg1.pem")).unwrap(), before);
        issue(&PkiIssueArgs { force: true, ..issue_args(&dir, "pg1") }).unwrap();
        assert_ne!(std::fs::read(dir.join("pg1.pem")).unwrap(), before);
        assert_eq!(mode("pg1.key"), 0o600);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 4, "nothing is left beside them");
    }

    #[test]
    fn a_certificate_needs_names() {
        let folder = tempfile::tempdir().unwrap();
        init(&PkiInitArgs { dir: folder.path().into(), name: "test".into(), days: 1, force: false }).unwrap();
        let none = PkiIssueArgs { dns: vec![], ip: vec![], uri: vec![], ..issue_args(folder.path(), "a") };
        assert_eq!(issue(&none).unwrap_err().code(), 64);
        for wrong in ["", "a b", "ä.example"] {
            let wrong = PkiIssueArgs { dns: vec![wrong.into()], ..issue_args(folder.path(), "a") };
            assert_eq!(issue(&wrong).unwrap_err().code(), 64);
        }
        let wrong = PkiIssueArgs { uri: vec!["example/sql".into()], ..issue_args(folder.path(), "a") };
        assert_eq!(issue(&wrong).unwrap_err().code(), 64);
        assert!(parse_name("../x").is_err() && parse_name(".x").is_err() && parse_name("").is_err());
        assert!(parse_name("pg-1.eu").is_ok());
    }
}
