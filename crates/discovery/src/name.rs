//! Domain names as an operator writes them.
//!
//! Owns: which names are good ones, and how they are shown: without the dot at the end. Does not own: what stands at them.

use std::fmt;
use std::str::FromStr;

use hickory_proto::rr::Name;

/// Longest label (RFC 1035, section 2.3.4).
const LABEL_BYTES_MAX: usize = 63;
/// Longest service label with its underscore (RFC 6335, section 5.1: 15 characters).
const SERVICE_BYTES_MAX: usize = 16;

/// Why a text is no name. Whoever wrote it has to mend it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is no domain.
    #[error(
        "is no domain name: labels of letters, digits and -, with dots between them, such as example.com"
    )]
    Domain,
    /// It is no host label.
    #[error("is no host name: letters, digits and -, such as lb1")]
    Host,
    /// It is no service.
    #[error("is no service: two labels with underscores, such as _postgresql._tcp")]
    Service,
    /// Names made of it would be longer than DNS has them.
    #[error("is too long: a name in DNS has 253 characters at most")]
    TooLong,
}

/// A domain or zone: `example.com`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Domain(Name);

impl Domain {
    pub(crate) fn name(&self) -> &Name {
        &self.0
    }
}

impl FromStr for Domain {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if !text.split('.').all(|label| is_label(label, "_")) {
            return Err(NameError::Domain);
        }
        absolute(text).map(Self)
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.0))
    }
}

/// A host's name within a zone: `lb1`, or `lb1.eu`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostLabel(String);

impl HostLabel {
    /// The first label of this host's own name, with what names may not have replaced.
    pub fn of_host(host: &str) -> Self {
        let first = host.split('.').next().unwrap_or_default();
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let label: String = first.chars().take(LABEL_BYTES_MAX).map(plain).collect();
        let label = label.trim_matches('-');
        Self(if label.is_empty() { "trimtab".to_owned() } else { label.to_owned() })
    }

    /// It, in that zone.
    ///
    /// # Errors
    /// When the two together are too long.
    pub(crate) fn within(&self, zone: &Domain) -> Result<Name, NameError> {
        absolute(&format!("{}.{zone}", self.0))
    }

    /// A host of this one's: `postgresql.lb1`.
    ///
    /// # Errors
    /// When that is too long.
    pub(crate) fn child(&self, label: &str) -> Result<Self, NameError> {
        format!("{label}.{}", self.0).parse()
    }
}

impl FromStr for HostLabel {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.split('.').all(|label| is_label(label, "")) {
            true => Ok(Self(text.to_ascii_lowercase())),
            false => Err(NameError::Host),
        }
    }
}

impl fmt::Display for HostLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A service and its transport as SRV names them (RFC 2782): `_postgresql._tcp`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName(String);

impl ServiceName {
    /// A balancer's control.
    pub fn control() -> Self {
        Self("_trimtab._tcp".to_owned())
    }

    /// It, in that domain.
    ///
    /// # Errors
    /// When the two together are too long.
    pub(crate) fn within(&self, domain: &Domain) -> Result<Name, NameError> {
        absolute(&format!("{}.{domain}", self.0))
    }

    /// `postgresql` of `_postgresql._tcp`.
    pub(crate) fn bare(&self) -> &str {
        self.0.trim_start_matches('_').split('.').next().unwrap_or_default()
    }
}

impl FromStr for ServiceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let service = text.strip_suffix("._tcp").or_else(|| text.strip_suffix("._udp"));
        let label = service.filter(|service| service.len() <= SERVICE_BYTES_MAX);
        match label.and_then(|service| service.strip_prefix('_')) {
            Some(label) if is_label(label, "") => Ok(Self(text.to_ascii_lowercase())),
            _ => Err(NameError::Service),
        }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Letters, digits and inner hyphens (RFC 1123, section 2.1), and these.
fn is_label(label: &str, further: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || further.contains(c);
    (1..=LABEL_BYTES_MAX).contains(&label.len())
        && label.chars().all(plain)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

fn absolute(text: &str) -> Result<Name, NameError> {
    Name::from_ascii(format!("{text}.")).map_err(|_| NameError::TooLong)
}

/// For people and scripts: without the dot at the end.
pub(crate) fn shown(name: &Name) -> String {
    let text = name.to_ascii();
    match text.strip_suffix('.') {
        Some(bare) if !bare.is_empty() => bare.to_owned(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_people_write_them() {
        for text in ["example.com", "example.com.", "a-b.c", "_sub.example.com", "localdomain"] {
            let domain: Domain = text.parse().unwrap();
            assert_eq!(domain.to_string(), text.trim_end_matches('.'));
        }
        let long = "a.".repeat(128);
        for text in ["", ".", "a..b", "-a.b", "a b", "ä.de", "a/b", "*.example.com", &long] {
            assert!(text.parse::<Domain>().is_err(), "{text}");
        }
        for text in ["lb1", "LB1", "lb-1.eu"] {
            assert_eq!(text.parse::<HostLabel>().unwrap().to_string(), text.to_ascii_lowercase());
        }
        for text in ["", "lb_1", "lb1.", "-"] {
            assert_eq!(text.parse::<HostLabel>(), Err(NameError::Host), "{text}");
        }
        for text in ["_postgresql._tcp", "_xmpp-client._tcp", "_sip._udp"] {
            assert_eq!(text.parse::<ServiceName>().unwrap().to_string(), text);
        }
        for text in
            ["postgresql", "_postgresql", "_a.b._tcp", "_a._sctp", "__a._tcp", "_sixteen-letters-x._tcp"]
        {
            assert_eq!(text.parse::<ServiceName>(), Err(NameError::Service), "{text}");
        }
    }

    #[test]
    fn a_host_s_own_name_becomes_a_label() {
        for (host, label) in
            [("web1.example.com", "web1"), ("My_Host", "my-host"), ("ü", "trimtab"), ("", "trimtab")]
        {
            assert_eq!(HostLabel::of_host(host).to_string(), label);
            label.parse::<HostLabel>().unwrap();
        }
    }

    #[test]
    fn names_within_a_zone() {
        let zone: Domain = "example.com".parse().unwrap();
        let host: HostLabel = "lb1".parse().unwrap();
        assert_eq!(shown(&host.within(&zone).unwrap()), "lb1.example.com");
        let service: ServiceName = "_postgresql._tcp".parse().unwrap();
        assert_eq!(shown(&service.within(&zone).unwrap()), "_postgresql._tcp.example.com");
        assert_eq!(host.child(service.bare()).unwrap().to_string(), "postgresql.lb1");
        let long: Domain = ["a"; 126].join(".").parse().unwrap();
        assert_eq!(host.within(&long), Err(NameError::TooLong));
    }
}
