//! The addresses by which others reach this host.
//!
//! Not all that it has: those of container bridges and tunnels lead nowhere for others. Taken are the addresses of the one
//! interface that leads to the DNS server, or, where that is this host itself, of the one that leads out.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Where no packet is ever sent (RFC 5737 and RFC 3849): the kernel only says which way it would go.
const OUT: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 9),
];

/// What is published of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addresses {
    /// These, as somebody said.
    Fixed(BTreeSet<IpAddr>),
    /// Those that the host has, looked at again and again.
    Auto {
        /// Whether IPv6 addresses are served, too.
        v6: bool,
    },
}

impl Addresses {
    /// What is reachable of a socket that is bound here: an address that stands for all of them is found out.
    pub fn of_bound(ip: IpAddr) -> Self {
        if ip.is_unspecified() {
            Self::Auto { v6: ip.is_ipv6() }
        } else {
            Self::Fixed([ip.to_canonical()].into())
        }
    }

    /// The addresses now; a system call or two.
    pub(crate) fn now(&self, server: SocketAddr) -> BTreeSet<IpAddr> {
        match self {
            Self::Fixed(addresses) => addresses.clone(),
            Self::Auto { v6 } => {
                let mut found = of_this_host(server);
                found.retain(|address| *v6 || address.is_ipv4());
                found
            }
        }
    }
}

fn of_this_host(server: SocketAddr) -> BTreeSet<IpAddr> {
    let Ok(interfaces) = if_addrs::get_if_addrs() else { return BTreeSet::new() };
    let out = || OUT.into_iter().find_map(source);
    let Some(source) = source(server).filter(|source| !source.is_loopback()).or_else(out) else {
        return BTreeSet::new();
    };
    let Some(leading) = interfaces.iter().find(|interface| interface.ip() == source) else {
        return BTreeSet::new();
    };
    let same = interfaces.iter().filter(|interface| interface.name == leading.name);
    same.map(if_addrs::Interface::ip).filter(is_for_others).collect()
}

/// The address that a packet to `target` would come from. Nothing is sent.
fn source(target: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr =
        if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(target).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn is_for_others(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_socket_is_reached_at() {
        let fixed = |text: &str| Addresses::Fixed([text.parse().unwrap()].into());
        assert_eq!(Addresses::of_bound("10.0.0.9".parse().unwrap()), fixed("10.0.0.9"));
        assert_eq!(Addresses::of_bound("::ffff:10.0.0.9".parse().unwrap()), fixed("10.0.0.9"));
        assert_eq!(Addresses::of_bound("0.0.0.0".parse().unwrap()), Addresses::Auto { v6: false });
        assert_eq!(Addresses::of_bound("::".parse().unwrap()), Addresses::Auto { v6: true });
    }

    #[test]
    fn this_host_has_only_addresses_that_it_has() {
        let server = "127.0.0.1:53".parse().unwrap();
        let all: BTreeSet<IpAddr> =
            if_addrs::get_if_addrs().unwrap().iter().map(if_addrs::Interface::ip).collect();
        let found = Addresses::Auto { v6: true }.now(server);
        assert!(found.is_subset(&all), "{found:?} {all:?}");
        assert!(found.iter().all(|address| !address.is_loopback()), "{found:?}");
        assert!(Addresses::Auto { v6: false }.now(server).iter().all(IpAddr::is_ipv4));
    }
}
