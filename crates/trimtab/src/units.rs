//! Values with a unit, as people write them in the configuration and on the command line.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use crate::problem::Problem;

/// Longest duration anyone can mean here; keeps sums of them far from overflow.
const DURATION_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Units of durations, in milliseconds, the largest first.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Parses `250ms`, `5s`, `10m`, `1h`, `1d`; zero is `0s`.
///
/// # Errors
/// When it has no number or no unit, or is longer than a year.
pub fn parse_duration(text: &str) -> Result<Duration, Problem> {
    let problem = || {
        Problem::new(
            format!("{text:?} is not a duration"),
            "write a whole number with its unit: \"250ms\", \"5s\", \"10m\", \"1h\" or \"1d\"",
        )
    };
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(problem)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| problem())?;
    let (_, millis) = UNITS.into_iter().find(|(name, _)| *name == unit).ok_or_else(problem)?;
    let duration = Duration::from_millis(number.saturating_mul(millis));
    if duration > DURATION_MAX {
        return Err(Problem::new(format!("{text:?} is longer than a year"), "write at most \"365d\""));
    }
    Ok(duration)
}

/// A duration as [`parse_duration`] takes it, in the largest unit that it is a whole number of: `90s`, `1d`, `0s`.
pub fn duration_text(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let whole = UNITS.into_iter().find(|(_, of)| millis != 0 && millis.is_multiple_of(*of));
    whole.map_or_else(|| "0s".to_owned(), |(name, of)| format!("{}{name}", millis / of))
}

/// Parses a bandwidth in bits a second: `1000000`, `100M`, `1G`, `2.5G` (decimal, as network speeds are).
///
/// # Errors
/// When it is not a positive number with an optional `k`, `M`, `G` or `T`.
pub fn parse_bandwidth(text: &str) -> Result<u64, Problem> {
    let problem = || {
        Problem::new(
            format!("{text:?} is not a bandwidth"),
            "write bits a second, with k, M, G or T if you like: 100M, 1G, 2.5G",
        )
    };
    let (number, factor) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1e3),
        Some(b'M') => (&text[..text.len() - 1], 1e6),
        Some(b'G') => (&text[..text.len() - 1], 1e9),
        Some(b'T') => (&text[..text.len() - 1], 1e12),
        _ => (text, 1.0),
    };
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(problem());
    }
    let bits = number.parse::<f64>().map_err(|_| problem())? * factor;
    // Above 1 Pbit/s it is a slip, and f64 is exact far beyond it.
    if !(1.0..=1e15).contains(&bits) {
        return Err(problem());
    }
    Ok(bits as u64)
}

/// Parses `ip:port` or `[ip6]:port` (names are not resolved: a balancer must come up without DNS).
///
/// # Errors
/// When it is anything else.
pub fn parse_address(text: &str) -> Result<SocketAddr, Problem> {
    text.parse().map_err(|_| {
        let hint = if text.starts_with(':') && text[1..].parse::<u16>().is_ok() {
            format!(
                "write \"0.0.0.0{text}\" for every IPv4 address or \"127.0.0.1{text}\" for this host alone"
            )
        } else if text.parse::<std::net::IpAddr>().is_ok() {
            "the port is missing: write \"127.0.0.1:5432\" or \"[::1]:5432\"".to_owned()
        } else if text.starts_with("localhost:") {
            format!("names are not resolved here: write \"127.0.0.1{}\"", &text["localhost".len()..])
        } else {
            "write an IP address and a port: \"127.0.0.1:5432\" or \"[::1]:5432\"".to_owned()
        };
        Problem::new(format!("{text:?} is not an address"), hint)
    })
}

/// What a listener accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Where flows are accepted: `tcp://ip:port` or `udp://ip:port`. Port 0 takes any free port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenAddress {
    /// What is accepted there.
    pub transport: Transport,
    /// Where.
    pub address: SocketAddr,
}

impl ListenAddress {
    /// The same listener at the address that was really bound.
    pub const fn at(self, address: SocketAddr) -> Self {
        Self { transport: self.transport, address }
    }
}

impl FromStr for ListenAddress {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let Some((scheme, address)) = text.split_once("://") else {
            return Err(Problem::new(
                format!("{text:?} does not say its protocol"),
                format!("write \"tcp://{text}\" or \"udp://{text}\""),
            ));
        };
        let transport = match scheme {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            _ => {
                return Err(Problem::new(
                    format!("{text:?}: there is no protocol {scheme:?}"),
                    format!("write \"tcp://{address}\" or \"udp://{address}\""),
                ));
            }
        };
        Ok(Self { transport, address: parse_address(address)? })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.transport, self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [
            ("0s", 0),
            ("250ms", 250),
            ("5s", 5000),
            ("10m", 600_000),
            ("1h", 3_600_000),
            ("365d", 31_536_000_000),
        ] {
            assert_eq!(parse_duration(text).map(|d| d.as_millis()), Ok(millis), "{text}");
            let duration = Duration::from_millis(u64::try_from(millis).expect("a few"));
            assert_eq!(duration_text(duration), text);
        }
        for text in [
            "",
            "5",
            "s",
            "-5s",
            "5 s",
            "1.5s",
            "5sec",
            "366d",
            "99999999999999999999s",
            "9999999999999999999s",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bandwidths() {
        for (text, bits) in [
            ("1", 1),
            ("64k", 64_000),
            ("100M", 100_000_000),
            ("2.5G", 2_500_000_000),
            ("1T", 1_000_000_000_000),
        ] {
            assert_eq!(parse_bandwidth(text), Ok(bits), "{text}");
        }
        for text in ["", "G", "0", "-1G", "1GB", "inf", "nan", "1e30", "+5"] {
            assert!(parse_bandwidth(text).is_err(), "{text}");
        }
    }

    #[test]
    fn listen_addresses_say_what_to_write() {
        for text in ["tcp://[::1]:5432", "udp://127.0.0.1:53"] {
            assert_eq!(text.parse::<ListenAddress>().map(|a| a.to_string()), Ok(text.into()));
        }
        for (text, hint) in [
            ("127.0.0.1:5432", "write \"tcp://127.0.0.1:5432\" or \"udp://127.0.0.1:5432\""),
            ("udp://127.0.0.1", "the port is missing: write \"127.0.0.1:5432\" or \"[::1]:5432\""),
            ("http://127.0.0.1:80", "write \"tcp://127.0.0.1:80\" or \"udp://127.0.0.1:80\""),
            (
                "tcp://:5432",
                "write \"0.0.0.0:5432\" for every IPv4 address or \"127.0.0.1:5432\" for this host alone",
            ),
            ("tcp://127.0.0.1", "the port is missing: write \"127.0.0.1:5432\" or \"[::1]:5432\""),
            ("tcp://localhost:80", "names are not resolved here: write \"127.0.0.1:80\""),
            ("tcp://a:99999", "write an IP address and a port: \"127.0.0.1:5432\" or \"[::1]:5432\""),
        ] {
            assert_eq!(text.parse::<ListenAddress>().unwrap_err().hint, hint, "{text}");
        }
    }
}
