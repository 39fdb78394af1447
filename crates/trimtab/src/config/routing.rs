//! `[[listener]]`'s PROXY protocol, ports and routes: which pool a flow goes to, and who its client is.

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use allocation::PoolName;
use dataplane::ProxyProtocol;
use flow::preface::proxy::{Accepts, Version};
use flow::preface::{Route, Routes, ServerName};
use ipnet::IpNet;
use registry::PoolConfig;
use toml::Spanned;

use super::reader::{Section, text, texts};
use super::{or, pool_name, unknown_pool};
use crate::problem::Problem;
use crate::units::{ListenAddress, Transport};

/// Most ports of one listener: each is a socket of each worker.
const PORTS_MAX: u16 = 1_024;
/// Most names, protocols or networks of one route.
const VALUES_MAX: usize = 1_000;

/// Where a listener accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bind {
    pub(super) address: ListenAddress,
    pub(super) last_port: Option<u16>,
}

impl Bind {
    /// Its addresses.
    pub(super) fn addresses(self) -> impl Iterator<Item = ListenAddress> {
        let first = self.address.address;
        let last = self.last_port.unwrap_or_else(|| first.port());
        (first.port()..=last).map(move |port| self.address.at(SocketAddr::new(first.ip(), port)))
    }
}

/// `tcp://ip:port` or `tcp://ip:first-last`, or the same with `udp`.
pub(super) fn bind(text: &str) -> Result<Bind, Problem> {
    let whole = || text.parse().map(|address| Bind { address, last_port: None });
    let Some((first, last)) = text.rsplit_once('-').filter(|(first, _)| first.contains("://")) else {
        return whole();
    };
    let address: ListenAddress = first.parse()?;
    let last: u16 = last.parse().map_err(|_| {
        Problem::new(format!("{last:?} is not a port"), format!("write \"{first}-LAST\" with the last port"))
    })?;
    let first_port = address.address.port();
    if first_port == 0 || last <= first_port {
        return Err(Problem::new(
            format!("{text:?} is no range of ports"),
            "write the lower port first, from 1 on: \"tcp://0.0.0.0:5000-5010\"",
        ));
    }
    if last - first_port >= PORTS_MAX {
        let message = format!("{text:?} is a range of {} ports", u32::from(last - first_port) + 1);
        return Err(Problem::new(message, format!("a listener takes {PORTS_MAX}: use several")));
    }
    Ok(Bind { address, last_port: Some(last) })
}

/// `pool.proxy_protocol`.
pub(super) fn outgoing(text: &str) -> Result<Option<Version>, Problem> {
    match text {
        "off" => Ok(None),
        "v1" => Ok(Some(Version::V1)),
        "v2" => Ok(Some(Version::V2)),
        _ => Err(Problem::new(
            format!("there is no PROXY protocol {text:?}"),
            "write \"off\", \"v1\" or \"v2\": what the resources expect",
        )),
    }
}

/// A listener of datagrams gives them to a pool whose header has none.
pub(super) fn no_datagrams(key: &str, pool: &PoolName, without: &[&PoolName]) -> Option<Problem> {
    without.contains(&pool).then(|| {
        Problem::new(
            format!(
                "`{key}`: the pool {:?} has proxy_protocol = \"v1\", which has no datagrams",
                pool.as_str()
            ),
            "write \"v2\" there, or give datagrams a pool of their own",
        )
    })
}

fn incoming(text: &str) -> Result<Option<Accepts>, Problem> {
    match text {
        "off" => Ok(None),
        "v1" => Ok(Some(Accepts::V1)),
        "v2" => Ok(Some(Accepts::V2)),
        "any" => Ok(Some(Accepts::Any)),
        _ => Err(Problem::new(
            format!("there is no PROXY protocol {text:?}"),
            "write \"off\", \"v1\", \"v2\", or \"any\" for both",
        )),
    }
}

/// `listener.proxy_protocol` with `listener.trusted`.
pub(super) fn proxy_protocol(section: &mut Section<'_, '_>, is_udp: bool) -> Option<ProxyProtocol> {
    let accepts = section.value("proxy_protocol", text(incoming));
    if let Some(accepts) =
        accepts.as_ref().filter(|accepts| *accepts.get_ref() == Some(Accepts::V1) && is_udp)
    {
        let problem = Problem::new(
            "`listener.proxy_protocol`: version 1 has no datagrams",
            "write \"v2\", which the proxies in front must send",
        );
        section.reader().report(accepts.span().start, problem);
    }
    let at = accepts.as_ref().map(|accepts| accepts.span().start);
    let accepts = or(accepts, None);
    let has_trusted = section.has("trusted");
    let trusted = section.value("trusted", texts(network));
    match (accepts, trusted) {
        (None, Some(trusted)) if !trusted.get_ref().is_empty() => {
            let problem = Problem::new(
                "`listener.trusted`: nobody is asked for a PROXY header",
                "add proxy_protocol = \"any\" (or \"v1\", \"v2\"), or remove it",
            );
            section.reader().report(trusted.span().start, problem);
            None
        }
        (None, _) => None,
        (Some(accepts), Some(trusted)) if !trusted.get_ref().is_empty() => {
            Some(ProxyProtocol { accepts, trusted: trusted.into_inner() })
        }
        (Some(_), None) if has_trusted => None, // Reported.
        (Some(_), _) => {
            let problem = Problem::new(
                "`listener.proxy_protocol`: nobody is trusted with a header, so every client would be refused",
                "add trusted = [\"10.0.0.0/8\"] with the networks of the proxies in front",
            );
            section.reader().report(at.unwrap_or_default(), problem);
            None
        }
    }
}

/// `[[listener.route]]`: the routes, and the pools that they name, of which a route's target is one, counted from 1.
pub(super) fn routes(
    section: &mut Section<'_, '_>,
    bind: Option<Bind>,
    pool: Option<&PoolName>,
    pools: Option<&[PoolConfig]>,
    without_datagrams: &[&PoolName],
) -> Option<(Vec<Route>, Vec<PoolName>)> {
    let mut routes = Vec::new();
    let mut further: Vec<PoolName> = Vec::new();
    let mut complete = true;
    let all = section.list("route", |mut section| {
        let to = section.required("pool", "\"sql\"", text(pool_name));
        let route = route(&mut section, bind);
        if let (Some(to), Some(pools)) = (&to, pools)
            && let Some(problem) = unknown_pool("listener.route.pool", to.get_ref(), pools)
        {
            section.reader().report(to.span().start, problem);
        }
        if let Some(to) = &to
            && let Some(problem) = no_datagrams("listener.route.pool", to.get_ref(), without_datagrams)
        {
            section.reader().report(to.span().start, problem);
        }
        match to.map(Spanned::into_inner) {
            Some(to) => routes.push(Route { target: target(&to, pool, &mut further), ..route }),
            None => complete = false,
        }
        if routes.len() == Routes::MAX + 1 {
            let message = format!("this is the listener's {}th route", routes.len());
            section.report(Problem::new(message, format!("a listener takes {}: use several", Routes::MAX)));
        }
        section.finish(&[]);
    });
    (all && complete && routes.len() <= Routes::MAX).then_some((routes, further))
}

/// The place of a pool among a listener's targets: its own is 0.
fn target(to: &PoolName, own: Option<&PoolName>, further: &mut Vec<PoolName>) -> u16 {
    if Some(to) == own {
        return 0;
    }
    let place = further.iter().position(|known| known == to).unwrap_or_else(|| {
        further.push(to.clone());
        further.len() - 1
    });
    // There are at most as many as routes.
    u16::try_from(place + 1).unwrap_or(u16::MAX)
}

fn route(section: &mut Section<'_, '_>, bind: Option<Bind>) -> Route {
    let any = ["sni", "alpn", "from", "ports"].iter().any(|key| section.has(key));
    let names = or(section.value("sni", bounded(texts(server_name))), Vec::new());
    let protocols = or(section.value("alpn", bounded(texts(protocol))), Vec::new());
    if bind.is_some_and(|bind| bind.address.transport == Transport::Udp) {
        for key in ["sni", "alpn"] {
            if !section.has(key) {
                continue;
            }
            section.report(Problem::new(
                format!("`listener.route.{key}` is read from TLS over TCP: datagrams are routed by `from` and `ports`"),
                "remove it, or write the listener's bind = \"tcp://…\"",
            ));
        }
    }
    let networks = or(section.value("from", bounded(texts(network))), Vec::new());
    let ports = section.value("ports", text(ports));
    if let (Some(ports), Some(bind)) = (&ports, bind) {
        let first = bind.address.address.port();
        let last = bind.last_port.unwrap_or(first);
        if *ports.get_ref().start() < first || *ports.get_ref().end() > last {
            let message = "`listener.route.ports`: the listener does not have all of these ports";
            let hint = format!(
                "it has {}",
                if first == last { format!("{first} alone") } else { format!("{first}-{last}") }
            );
            section.reader().report(ports.span().start, Problem::new(message, hint));
        }
    }
    let ports = ports.map(Spanned::into_inner);
    if !any {
        section.report(Problem::new(
            "`listener.route` has no condition: every flow would go by it",
            "add sni, alpn, from or ports, or remove it and name its pool as the listener's",
        ));
    }
    Route { names, protocols, networks, ports, target: 0 }
}

/// A list that says something, and not without end.
fn bounded<'t, T>(
    parse: impl FnOnce(&toml::de::DeValue<'t>) -> Result<Vec<T>, Problem>,
) -> impl FnOnce(&toml::de::DeValue<'t>) -> Result<Vec<T>, Problem> {
    move |value| match parse(value)? {
        empty if empty.is_empty() => Err(Problem::new(
            "the list is empty, so nobody would meet it",
            "remove the key, or name one at least",
        )),
        long if long.len() > VALUES_MAX => Err(Problem::new(
            format!("this is a list of {}", long.len()),
            format!("a route takes {VALUES_MAX}: use several"),
        )),
        fine => Ok(fine),
    }
}

fn server_name(text: &str) -> Result<ServerName, Problem> {
    text.parse().map_err(|error: flow::preface::NameError| {
        Problem::new(
            format!("{text:?} is not a server name: {error}"),
            "write names as clients ask for them: \"db.example.com\", \"*.example.com\"",
        )
    })
}

fn protocol(text: &str) -> Result<Box<[u8]>, Problem> {
    if (1..=255).contains(&text.len()) {
        return Ok(text.as_bytes().into());
    }
    Err(Problem::new(
        format!("a protocol of {} bytes", text.len()),
        "write protocols as they are registered for ALPN: \"h2\", \"postgresql\"",
    ))
}

/// A network, or an address alone.
fn network(text: &str) -> Result<IpNet, Problem> {
    let alone = || text.parse::<std::net::IpAddr>().ok().map(IpNet::from);
    let network: Option<IpNet> = text.parse().ok().or_else(alone);
    network.map(|network| network.trunc()).ok_or_else(|| {
        Problem::new(
            format!("{text:?} is not a network"),
            "write networks or addresses: \"10.0.0.0/8\", \"2001:db8::/32\", \"192.0.2.7\"",
        )
    })
}

/// `5000` or `5000-5004`.
fn ports(text: &str) -> Result<RangeInclusive<u16>, Problem> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok(first..=last),
        _ => Err(Problem::new(
            format!("{text:?} is no range of ports"),
            "write a port or the first and the last: \"5000\", \"5000-5004\"",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_of_one_address() {
        let one = bind("tcp://0.0.0.0:5000").unwrap();
        assert_eq!((one.last_port, one.addresses().count()), (None, 1));
        let range = bind("tcp://[::1]:5000-5010").unwrap();
        assert_eq!((range.last_port, range.addresses().count()), (Some(5_010), 11));
        assert_eq!(range.addresses().last(), "tcp://[::1]:5010".parse().ok());
        let datagrams = bind("udp://0.0.0.0:5000-5001").unwrap();
        assert_eq!(datagrams.addresses().last(), "udp://0.0.0.0:5001".parse().ok());
        for wrong in [
            "tcp://0.0.0.0:0-5",
            "tcp://0.0.0.0:5-5",
            "tcp://0.0.0.0:6-5",
            "tcp://0.0.0.0:5-x",
            "tcp://0.0.0.0:5-",
            "tcp://0.0.0.0:1-65536",
            "tcp://0.0.0.0:1-1025",
            "0.0.0.0:1-5",
        ] {
            assert!(bind(wrong).is_err(), "{wrong}");
        }
    }
}
