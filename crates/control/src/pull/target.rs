//! Whom a utilization script may ask: the resource's own registered address, and what the operator allows.
//!
//! A script is a stranger's wish that we connect somewhere. So, whatever the operator allows: never a link-local address (there
//! clouds serve their machines' credentials), nor one that is no host's, nor our own control or HTTP. A name is looked up
//! once; its address is judged like any other and is what is connected to from then on, so that a name whose address
//! changes (DNS rebinding) leads nowhere new.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use fetch::Host;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Services of clouds to their machines that are not on link-local addresses: Alibaba's, Azure's, and AWS's over IPv6.
const METADATA: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// An entry of `control.pull.allow`: where scripts may point beside their resource's own address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// Addresses of a network, or one address.
    Network {
        /// Its first address.
        first: IpAddr,
        /// Bits that are the same in all of its addresses.
        prefix: u8,
    },
    /// A name, whatever address it has.
    Name(String),
}

/// Why a text is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a network (10.0.0.0/8), an address nor a host name")]
pub struct NotAllowed(String);

impl FromStr for Allowed {
    type Err = NotAllowed;

    fn from_str(text: &str) -> Result<Self, NotAllowed> {
        let wrong = || NotAllowed(text.to_owned());
        if let Some((first, prefix)) = text.split_once('/') {
            let first: IpAddr = first.parse().map_err(|_| wrong())?;
            let prefix = prefix.parse().map_err(|_| wrong())?;
            let most = if first.is_ipv4() { 32 } else { 128 };
            return if prefix <= most { Ok(Self::Network { first, prefix }) } else { Err(wrong()) };
        }
        match Host::parse(text) {
            Some(Host::Ip(first)) => {
                Ok(Self::Network { first, prefix: if first.is_ipv4() { 32 } else { 128 } })
            }
            Some(Host::Name(name)) => Ok(Self::Name(name)),
            None => Err(wrong()),
        }
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network { first, prefix } => write!(f, "{first}/{prefix}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl Allowed {
    fn has(&self, ip: IpAddr) -> bool {
        let Self::Network { first, prefix } = self else { return false };
        match (first, ip) {
            (IpAddr::V4(first), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(*prefix)).unwrap_or(0);
                first.to_bits() & mask == ip.to_bits() & mask
            }
            (IpAddr::V6(first), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(*prefix)).unwrap_or(0);
                first.to_bits() & mask == ip.to_bits() & mask
            }
            _ => false,
        }
    }
}

/// Why nothing is asked there. The fault of whoever wrote the script, unless an operator wants to allow it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TargetError {
    #[error(
        "the utilization script points at {0}, another host than the resource's own {1}: register the address that it \
         serves at, or have the operator allow it in control.pull.allow"
    )]
    Elsewhere(IpAddr, IpAddr),
    #[error("the utilization script points at {0}: link-local and metadata addresses are never asked")]
    Metadata(IpAddr),
    #[error("the utilization script points at {0}, which is no host's address")]
    NoHost(IpAddr),
    #[error("the utilization script points at {0}, which is this balancer's own")]
    Ours(SocketAddr),
    #[error("the utilization script names {0}, and no address of it can be found: {1}")]
    Unresolved(String, String),
}

/// What is decided by, for all scripts.
#[derive(Debug)]
pub(crate) struct Targets {
    allow: Vec<Allowed>,
    /// Where control and HTTP listen.
    ours: Vec<SocketAddr>,
    /// Looking a name up holds one of the few threads for work that blocks, however long the resolver takes.
    lookups: Arc<Semaphore>,
}

impl Targets {
    pub(crate) fn new(allow: Vec<Allowed>, ours: Vec<SocketAddr>) -> Self {
        Self { allow, ours, lookups: Arc::new(Semaphore::new(1)) }
    }

    /// What can be said of a script before anything is looked up.
    pub(crate) fn judge(&self, resource: IpAddr, host: &Host, port: u16) -> Result<(), TargetError> {
        match host {
            Host::Ip(ip) => self.judge_address(resource, host, SocketAddr::new(*ip, port)),
            // Its address is judged once it is known.
            Host::Name(_) => Ok(()),
        }
    }

    /// The address to ask, looked up where the script names a host.
    pub(crate) async fn pin(
        &self,
        resource: IpAddr,
        host: &Host,
        port: u16,
        within: Duration,
    ) -> Result<SocketAddr, TargetError> {
        let name = match host {
            Host::Ip(ip) => {
                let address = SocketAddr::new(*ip, port);
                return self.judge_address(resource, host, address).map(|()| address);
            }
            Host::Name(name) => name.clone(),
        };
        let unresolved = |why: String| TargetError::Unresolved(name.clone(), why);
        let found = timeout(within, self.look_up(name.clone(), port)).await;
        let found = found.map_err(|_| unresolved(format!("no answer within {within:?}")))?;
        let found = found.map_err(|error| unresolved(error.to_string()))?;
        // The first that may be asked; or why the first may not.
        let mut refused = None;
        for address in found {
            let address = SocketAddr::new(address.ip().to_canonical(), port);
            match self.judge_address(resource, host, address) {
                Ok(()) => return Ok(address),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Err(refused.unwrap_or_else(|| unresolved("it has none".to_owned())))
    }

    async fn look_up(&self, name: String, port: u16) -> std::io::Result<Vec<SocketAddr>> {
        let Ok(permit) = Arc::clone(&self.lookups).acquire_owned().await else { return Ok(Vec::new()) };
        // In a task that keeps the permit as long as the thread is held, also when nobody waits any more.
        let looking = tokio::spawn(async move {
            let found = tokio::net::lookup_host((name, port)).await.map(|all| all.take(16).collect());
            drop(permit);
            found
        });
        looking.await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
    }

    fn judge_address(&self, resource: IpAddr, host: &Host, address: SocketAddr) -> Result<(), TargetError> {
        let ip = address.ip().to_canonical();
        if is_link_local(ip) || METADATA.contains(&ip) {
            return Err(TargetError::Metadata(ip));
        }
        let is_broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
        if ip.is_unspecified() || ip.is_multicast() || is_broadcast {
            return Err(TargetError::NoHost(ip));
        }
        if self.ours.iter().any(|own| is_ours(*own, SocketAddr::new(ip, address.port()))) {
            return Err(TargetError::Ours(address));
        }
        let named =
            |allowed: &Allowed| matches!((allowed, host), (Allowed::Name(a), Host::Name(b)) if a == b);
        let allowed = |entry: &Allowed| entry.has(ip) || named(entry);
        let resource = resource.to_canonical();
        if ip == resource || self.allow.iter().any(allowed) {
            return Ok(());
        }
        Err(TargetError::Elsewhere(ip, resource))
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn is_ours(own: SocketAddr, address: SocketAddr) -> bool {
    own.port() == address.port()
        && (own.ip().to_canonical() == address.ip()
            || own.ip().to_canonical().is_unspecified() && is_of_this_host(address.ip()))
}

/// Only an address of this host can be bound.
fn is_of_this_host(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITHIN: Duration = Duration::from_secs(5);

    fn targets(allow: &[&str], ours: &[&str]) -> Targets {
        let allow = allow.iter().map(|text| text.parse().unwrap()).collect();
        Targets::new(allow, ours.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn judge(targets: &Targets, resource: &str, host: &str, port: u16) -> Result<(), TargetError> {
        targets.judge(resource.parse().unwrap(), &Host::parse(host).unwrap(), port)
    }

    #[test]
    fn its_own_address_and_what_is_allowed_and_nothing_else() {
        let targets = targets(&["10.1.0.0/16", "fd00:1::/64", "192.0.2.7"], &["127.0.0.1:7400"]);
        let judge = |resource: &str, host: &str| judge(&targets, resource, host, 9100);
        assert_eq!(judge("10.0.0.1", "10.0.0.1"), Ok(()));
        assert_eq!(judge("::ffff:10.0.0.1", "10.0.0.1"), Ok(()));
        assert_eq!(judge("10.0.0.1", "[::ffff:10.0.0.1]"), Ok(()));
        for allowed in ["10.1.255.255", "[fd00:1::9]", "192.0.2.7"] {
            assert_eq!(judge("10.0.0.1", allowed), Ok(()), "{allowed}");
        }
        for refused in ["10.0.0.2", "10.2.0.0", "[fd00:2::9]", "192.0.2.8", "127.0.0.1", "[::1]"] {
            assert!(matches!(judge("10.0.0.1", refused), Err(TargetError::Elsewhere(..))), "{refused}");
        }
        assert_eq!(judge("10.0.0.1", "db1.example"), Ok(()), "its address is judged when it is known");
    }

    #[test]
    fn what_is_never_asked_whatever_is_allowed() {
        let targets = targets(&["0.0.0.0/0", "::/0"], &["127.0.0.1:7400", "0.0.0.0:7480"]);
        for metadata in
            ["169.254.169.254", "[fe80::1]", "100.100.100.200", "[fd00:ec2::254]", "[::ffff:169.254.169.254]"]
        {
            assert!(matches!(judge(&targets, "10.0.0.1", metadata, 80), Err(TargetError::Metadata(_))));
            let own = metadata.trim_matches(['[', ']']);
            assert!(matches!(judge(&targets, own, metadata, 80), Err(TargetError::Metadata(_))), "{own}");
        }
        for none in ["0.0.0.0", "[::]", "224.0.0.1", "255.255.255.255", "[ff02::1]"] {
            assert!(matches!(judge(&targets, "10.0.0.1", none, 80), Err(TargetError::NoHost(_))), "{none}");
        }
        for ours in
            [("127.0.0.1", 7400), ("127.0.0.1", 7480), ("127.0.0.2", 7480), ("[::ffff:127.0.0.1]", 7400)]
        {
            assert!(
                matches!(judge(&targets, "127.0.0.1", ours.0, ours.1), Err(TargetError::Ours(_))),
                "{ours:?}"
            );
        }
        assert_eq!(judge(&targets, "127.0.0.1", "127.0.0.2", 7400), Ok(()), "only 127.0.0.1 is ours there");
        assert_eq!(judge(&targets, "192.0.2.1", "192.0.2.1", 7480), Ok(()), "not of this host");
    }

    #[tokio::test]
    async fn a_name_is_looked_up_and_its_address_judged() {
        let name = Host::parse("localhost").unwrap();
        let pin = async |targets: &Targets, resource: &str, port| {
            targets.pin(resource.parse().unwrap(), &name, port, WITHIN).await
        };
        let strict = targets(&[], &["127.0.0.1:7400"]);
        assert_eq!(pin(&strict, "127.0.0.1", 9100).await, Ok("127.0.0.1:9100".parse().unwrap()));
        assert!(matches!(pin(&strict, "10.0.0.1", 9100).await, Err(TargetError::Elsewhere(..))));
        let by_name = targets(&["localhost"], &["127.0.0.1:7400", "[::1]:7400"]);
        assert!(pin(&by_name, "10.0.0.1", 9100).await.unwrap().ip().is_loopback());
        assert!(matches!(pin(&by_name, "10.0.0.1", 7400).await, Err(TargetError::Ours(_))));
        let nobody = Host::parse("nobody.invalid").unwrap();
        let error = strict.pin("10.0.0.1".parse().unwrap(), &nobody, 1, WITHIN).await.unwrap_err();
        assert!(matches!(error, TargetError::Unresolved(..)), "{error}");
    }

    #[test]
    fn what_may_be_allowed() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.1", "10.0.0.1/32"),
            ("::/0", "::/0"),
            ("Exporter.Example.", "exporter.example"),
        ] {
            assert_eq!(text.parse::<Allowed>().unwrap().to_string(), shown);
        }
        for text in ["", "10.0.0.0/33", "::/129", "10.0.0.0/x", "a b", "http://a", "*"] {
            assert!(text.parse::<Allowed>().is_err(), "{text}");
        }
    }
}
