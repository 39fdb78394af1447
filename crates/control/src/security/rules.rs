//! Who may do what, by the names in its certificate: the operator's rules.
//!
//! A name is a subject alternative name (RFC 5280 §4.2.1.6) of a certificate that a trusted CA signed: a DNS name, or a
//! URI, as SPIFFE has it (`spiffe://trust-domain/path`, X509-SVID). The common name means nothing.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use allocation::{PoolName, ResourceId};
use ipnet::IpNet;

/// Longest name that is looked at; longer is no SPIFFE id (SPIFFE-ID §2.3) and no DNS name.
pub(super) const NAME_BYTES_MAX: usize = 2048;

/// What a peer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Role {
    /// It registers, reports and leaves.
    #[default]
    Resource,
    /// It asks and changes what operators do: the `AdminService`.
    Admin,
}

impl Role {
    /// Its name in configuration and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Resource => "resource",
            Self::Admin => "admin",
        }
    }
}

/// There is no such role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no role {0:?}; write \"resource\" or \"admin\"")]
pub struct UnknownRole(
    /// What was written.
    pub String,
);

impl FromStr for Role {
    type Err = UnknownRole;

    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        match text {
            "resource" => Ok(Self::Resource),
            "admin" => Ok(Self::Admin),
            _ => Err(UnknownRole(text.to_owned())),
        }
    }
}

/// One name of a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum San {
    /// In lower case: DNS knows no other.
    Dns(String),
    Uri(String),
}

impl fmt::Display for San {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Dns(name) | Self::Uri(name)) = self;
        f.write_str(name)
    }
}

/// Which names a rule is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SanPattern {
    /// `pg1.example.com`
    Dns(String),
    /// `*.example.com`: any one label, with what follows it.
    DnsBelow(String),
    /// `spiffe://example/sql/pg1`
    Uri(String),
    /// `spiffe://example/sql/*`: anything that begins so and goes on.
    UriBelow(String),
}

/// Why a pattern of names is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Nothing is there.
    #[error("is empty")]
    Empty,
    /// It is longer than any name.
    #[error("is longer than {NAME_BYTES_MAX} bytes")]
    Long,
    /// A star elsewhere, or one that would stand for every trust domain.
    #[error("has a * elsewhere than as a DNS name's first label or after a / of a URI's path")]
    Star,
    /// A character that no such name has.
    #[error("has a character that neither a DNS name nor a URI has")]
    Character,
}

impl FromStr for SanPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        match text.len() {
            0 => return Err(PatternError::Empty),
            1..=NAME_BYTES_MAX => {}
            _ => return Err(PatternError::Long),
        }
        if text.contains("://") { Self::parse_uri(text) } else { Self::parse_dns(text) }
    }
}

impl SanPattern {
    fn parse_uri(text: &str) -> Result<Self, PatternError> {
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(PatternError::Character);
        }
        let Some(prefix) = text.strip_suffix('*') else {
            return if text.contains('*') { Err(PatternError::Star) } else { Ok(Self::Uri(text.to_owned())) };
        };
        // scheme://domain/ at least: a star for the domain would let every authority in.
        let domain = prefix.split_once("://").map_or("", |(_, rest)| rest);
        let is_below_a_domain = domain.find('/').is_some_and(|slash| slash > 0) && domain.ends_with('/');
        if prefix.contains('*') || !is_below_a_domain {
            return Err(PatternError::Star);
        }
        Ok(Self::UriBelow(prefix.to_owned()))
    }

    fn parse_dns(text: &str) -> Result<Self, PatternError> {
        let (name, below) = match text.strip_prefix("*.") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        if name.contains('*') {
            return Err(PatternError::Star);
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if name.is_empty() || !name.chars().all(plain) {
            return Err(PatternError::Character);
        }
        let name = name.to_ascii_lowercase();
        Ok(if below { Self::DnsBelow(name) } else { Self::Dns(name) })
    }

    /// Whether it is for this name.
    pub(crate) fn matches(&self, san: &San) -> bool {
        match (self, san) {
            (Self::Dns(wanted), San::Dns(name)) => wanted == name,
            (Self::DnsBelow(parent), San::Dns(name)) => {
                name.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == parent)
            }
            (Self::Uri(wanted), San::Uri(name)) => wanted == name,
            (Self::UriBelow(prefix), San::Uri(name)) => {
                // What a path's dots would climb out of is not below it.
                name.strip_prefix(prefix).is_some_and(|rest| {
                    !rest.is_empty() && rest.split('/').all(|part| !matches!(part, "." | ".."))
                })
            }
            _ => false,
        }
    }
}

impl fmt::Display for SanPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) | Self::Uri(name) => f.write_str(name),
            Self::DnsBelow(name) => write!(f, "*.{name}"),
            Self::UriBelow(name) => write!(f, "{name}*"),
        }
    }
}

/// Which ids: `pg1`, or `pg-*` for all that begin so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdPattern {
    text: String,
    is_prefix: bool,
}

impl FromStr for IdPattern {
    type Err = allocation::IdError;

    fn from_str(text: &str) -> Result<Self, allocation::IdError> {
        let prefix = text.strip_suffix('*');
        let plain = prefix.unwrap_or(text);
        // `*` alone is all of them.
        if prefix.is_none() || !plain.is_empty() {
            plain.parse::<ResourceId>()?;
        }
        Ok(Self { text: plain.to_owned(), is_prefix: prefix.is_some() })
    }
}

impl IdPattern {
    fn matches(&self, id: &ResourceId) -> bool {
        if self.is_prefix { id.as_str().starts_with(&self.text) } else { id.as_str() == self.text }
    }
}

/// What the peers of a name may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerRule {
    /// Whom it is for.
    pub san: SanPattern,
    /// What they may be.
    pub role: Role,
    /// The pools that a resource may join.
    pub pools: Vec<PoolName>,
    /// Addresses that a resource may register though it does not connect from them.
    pub addresses: Vec<IpNet>,
    /// The ids that it may have; empty: any that is not somebody else's.
    pub ids: Vec<IdPattern>,
}

impl PeerRule {
    pub(crate) fn has_id(&self, id: &ResourceId) -> bool {
        self.ids.is_empty() || self.ids.iter().any(|pattern| pattern.matches(id))
    }
}

/// A network, or one address.
pub fn parse_network(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// Whether a peer at `from` may register `address`: its own, or one that is allowed. All of loopback is one host.
pub(crate) fn is_own_or_allowed(from: IpAddr, address: IpAddr, allowed: &[IpNet]) -> bool {
    let (from, address) = (from.to_canonical(), address.to_canonical());
    from == address
        || (from.is_loopback() && address.is_loopback())
        || allowed.iter().any(|net| net.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn san(text: &str) -> San {
        if text.contains("://") { San::Uri(text.into()) } else { San::Dns(text.into()) }
    }

    #[test]
    fn names_and_patterns() {
        for (pattern, yes, no) in [
            ("pg1.example.com", &["pg1.example.com"][..], &["pg2.example.com", "x.pg1.example.com"][..]),
            ("PG1.example.com", &["pg1.example.com"], &["spiffe://pg1.example.com"]),
            (
                "*.example.com",
                &["a.example.com"],
                &["example.com", ".example.com", "a.b.example.com", "aexample.com"],
            ),
            ("spiffe://example/sql/pg1", &["spiffe://example/sql/pg1"], &["spiffe://example/sql/pg12"]),
            (
                "spiffe://example/sql/*",
                &["spiffe://example/sql/pg1", "spiffe://example/sql/eu/pg1"],
                &[
                    "spiffe://example/sql/",
                    "spiffe://example/sql",
                    "spiffe://example/sqlx",
                    "spiffe://other/sql/pg1",
                    "spiffe://example/sql/../web/1",
                ],
            ),
        ] {
            let parsed: SanPattern = pattern.parse().unwrap();
            for name in yes {
                assert!(parsed.matches(&san(name)), "{pattern} {name}");
            }
            for name in no {
                assert!(!parsed.matches(&san(name)), "{pattern} {name}");
            }
        }
        use PatternError as E;
        for (text, why) in [
            ("", E::Empty),
            ("*", E::Star),
            ("spiffe://*", E::Star),
            ("spiffe://example*", E::Star),
            ("spiffe://*/x", E::Star),
            ("spiffe:///x*", E::Star),
            ("spiffe:///*", E::Star),
            ("a.*.b", E::Star),
            ("*.", E::Character),
            ("a b", E::Character),
            ("spiffe://example/ä", E::Character),
            ("pg1.example.com/24", E::Character),
        ] {
            assert_eq!(text.parse::<SanPattern>(), Err(why), "{text}");
        }
        assert_eq!("x".repeat(NAME_BYTES_MAX + 1).parse::<SanPattern>(), Err(E::Long));
    }

    #[test]
    fn own_addresses_and_others() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let net = ["10.0.0.0/8".parse().unwrap()];
        assert!(is_own_or_allowed(ip("192.0.2.1"), ip("192.0.2.1"), &[]));
        assert!(is_own_or_allowed(ip("::ffff:192.0.2.1"), ip("192.0.2.1"), &[]));
        assert!(is_own_or_allowed(ip("127.0.0.1"), ip("127.9.9.9"), &[]), "one host");
        assert!(!is_own_or_allowed(ip("127.0.0.1"), ip("10.0.0.1"), &[]));
        assert!(!is_own_or_allowed(ip("192.0.2.1"), ip("127.0.0.1"), &[]), "ours is not theirs");
        assert!(is_own_or_allowed(ip("192.0.2.1"), ip("10.9.9.9"), &net));
        assert!(is_own_or_allowed(ip("192.0.2.1"), ip("::ffff:10.9.9.9"), &net));
        assert!(!is_own_or_allowed(ip("192.0.2.1"), ip("11.0.0.1"), &net));
    }

    #[test]
    fn ids() {
        let matches =
            |pattern: &str, id: &str| pattern.parse::<IdPattern>().unwrap().matches(&id.parse().unwrap());
        assert!(matches("pg1", "pg1") && !matches("pg1", "pg12"));
        assert!(matches("pg-*", "pg-1") && !matches("pg-*", "pg1"));
        assert!(matches("*", "anything"));
        for text in ["", "a b", "*x"] {
            assert!(text.parse::<IdPattern>().is_err(), "{text}");
        }
    }
}
