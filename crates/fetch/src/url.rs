//! A URL that can be asked.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use http::Uri;

/// Longest URL, in bytes.
const URL_BYTES_MAX: usize = 2048;

/// `http://host[:port][/path][?query]` or `https://…`. What it shows of itself has no query: there may be a secret in it.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    uri: Uri,
    host: Host,
    is_tls: bool,
}

/// Whom a URL names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// An address.
    Ip(IpAddr),
    /// A name, in lower case.
    Name(String),
}

impl Host {
    /// An address, or a name of letters, digits, dots and hyphens.
    pub fn parse(text: &str) -> Option<Self> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return Some(Self::Ip(ip.to_canonical()));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        // What resolvers take for an address (`127.1`, `0x7f000001`, `2130706433`) is no name.
        let last = text.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
        let is_name = (1..=253).contains(&text.len())
            && text.chars().all(plain)
            && last.starts_with(|c: char| c.is_ascii_alphabetic());
        is_name.then(|| Self::Name(text.trim_end_matches('.').to_ascii_lowercase()))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Ip(ip) => ip.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Why a text is no URL that can be asked. Its author's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It is too long.
    #[error("the URL is longer than {URL_BYTES_MAX} bytes")]
    TooLong,
    /// It is none.
    #[error("the URL is not of the form http://host:port/path or https://host:port/path")]
    Malformed,
    /// It has a user or a password.
    #[error("the URL has a user or a password in it; it takes none")]
    UserInfo,
    /// Its port is 0.
    #[error("the URL has port 0")]
    PortZero,
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        if text.len() > URL_BYTES_MAX {
            return Err(UrlError::TooLong);
        }
        let uri: Uri = text.parse().map_err(|_| UrlError::Malformed)?;
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(UrlError::Malformed),
        };
        let authority = uri.authority().ok_or(UrlError::Malformed)?;
        if authority.as_str().contains('@') {
            return Err(UrlError::UserInfo);
        }
        let host = Host::parse(authority.host()).ok_or(UrlError::Malformed)?;
        // `Authority` takes `host:` and `host:99999` as having no port.
        let has_port = authority.as_str().len() > authority.host().len();
        match authority.port_u16() {
            Some(0) => return Err(UrlError::PortZero),
            None if has_port => return Err(UrlError::Malformed),
            _ => {}
        }
        Ok(Self { uri, host, is_tls })
    }
}

impl Url {
    /// Whom it names.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its port, or its scheme's.
    pub fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(if self.is_tls { 443 } else { 80 })
    }

    /// Whether it is `https`.
    pub fn is_tls(&self) -> bool {
        self.is_tls
    }

    /// All of it, with its query: for whoever asks, not for people.
    pub fn expose(&self) -> String {
        self.uri.to_string()
    }

    pub(crate) fn authority(&self) -> &str {
        self.uri.authority().map_or("", http::uri::Authority::as_str)
    }

    pub(crate) fn path_and_query(&self) -> &str {
        self.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_tls { "https" } else { "http" };
        let query = if self.uri.query().is_some() { "?…" } else { "" };
        write!(f, "{scheme}://{}{}{query}", self.authority(), self.uri.path())
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_asked() {
        for (text, host, port) in [
            ("http://10.0.0.1:9100/metrics", "10.0.0.1", 9100),
            ("http://[::1]:9100", "[::1]", 9100),
            ("http://[::ffff:10.0.0.1]/", "10.0.0.1", 80),
            ("https://DB1.Example./x?collect[]=cpu", "db1.example", 443),
        ] {
            let url: Url = text.parse().unwrap();
            assert_eq!((url.host().to_string().as_str(), url.port()), (host, port));
            assert_eq!(url.is_tls(), text.starts_with("https"));
        }
        let secret: Url = "http://a/x?token=12345".parse().unwrap();
        assert_eq!(format!("{secret} {secret:?}"), "http://a/x?… http://a/x?…");
        assert_eq!(secret.path_and_query(), "/x?token=12345");
    }

    #[test]
    fn what_cannot() {
        for text in [
            "",
            "a",
            "/metrics",
            "ftp://a",
            "file:///etc/passwd",
            "http://",
            "http:///x",
            "http://a:b/",
            "http://a:99999/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f000001/",
            "http://a b/",
            "http://a\r\nX: y/",
            "http://[fe80::1%25eth0]/",
        ] {
            assert_eq!(text.parse::<Url>(), Err(UrlError::Malformed), "{text}");
        }
        assert_eq!("http://u:p@a/".parse::<Url>(), Err(UrlError::UserInfo));
        assert_eq!("http://a:0/".parse::<Url>(), Err(UrlError::PortZero));
        assert_eq!(format!("http://a/{}", "x".repeat(2048)).parse::<Url>(), Err(UrlError::TooLong));
    }
}
