//! `[[dns]]`: where the balancer publishes itself.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use discovery::{Domain, HostLabel, NameError, Owner, ServiceName, TsigKey};
use toml::Spanned;

use super::reader::{Section, integer, text, texts};
use super::{ListenerConfig, or};
use crate::problem::{Problem, nearest};
use crate::units::{ListenAddress, duration_text, parse_address, parse_duration};

/// In the middle, so that others can be put before and behind.
const PRIORITY_DEFAULT: u16 = 10;
const WEIGHT_DEFAULT: u16 = 100;
const TTL_MAX: Duration = Duration::from_secs(24 * 3600);
/// More addresses of one host are a slip.
const ADDRESSES_MAX: usize = 16;
const SERVICES_MAX: usize = 64;

/// `[[dns]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct DnsConfig {
    /// The zone, as its primary has it.
    pub zone: Domain,
    /// The zone's primary.
    pub server: SocketAddr,
    /// Signs updates.
    pub key: TsigKey,
    /// Time to live of the records.
    pub ttl: Duration,
    /// Of the SRV records.
    pub priority: u16,
    /// Of the SRV records.
    pub weight: u16,
    /// This balancer's host name in the zone; `None`: the host's own.
    pub name: Option<HostLabel>,
    /// Who this balancer is across its restarts; `None`: from the machine and `control.listen`.
    pub owner: Option<Owner>,
    /// What others reach this host at; empty: found out.
    pub addresses: BTreeSet<IpAddr>,
    /// Where others reach control; `None`: at its own port.
    pub port: Option<u16>,
    /// Further services to publish.
    pub services: Vec<DnsServiceConfig>,
}

/// `[[dns.service]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsServiceConfig {
    /// The service.
    pub service: ServiceName,
    /// Where it is.
    pub at: ServiceAt,
}

/// Where a service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceAt {
    /// At a listener, by its place in the configuration.
    Listener(usize),
    /// At this port of the host.
    Port(u16),
}

/// `listeners` is `None` when they are not all known. So is what is given then, or when something is wrong.
pub(super) fn read(
    root: &mut Section<'_, '_>,
    listeners: Option<&[ListenerConfig]>,
) -> Option<Vec<DnsConfig>> {
    let mut entries = Some(Vec::new());
    let mut lines: HashMap<(Domain, SocketAddr), usize> = HashMap::new();
    let all = root.list("dns", |mut section| {
        let zone = section.required("zone", "\"example.com\"", text(domain));
        let server = section.required("server", "\"10.0.0.53:53\"", text(server));
        let key = section.required("key_file", "\"/etc/trimtab/tsig.key\"", text(key));
        if let (Some(zone), Some(server)) = (&zone, &server) {
            let line = section.reader().line(zone.span().start);
            let pair = (zone.get_ref().clone(), *server.get_ref());
            if let Some(first) = lines.insert(pair, line) {
                let message = "`dns.zone`: this zone at this server is there already";
                let hint = format!("the first is in line {first}; remove one of them");
                section.reader().report(zone.span().start, Problem::new(message, hint));
            }
        }
        let ttl = or(section.value("ttl", text(ttl)), discovery::TTL_DEFAULT);
        let priority = or(section.value("priority", integer(0..=u64::from(u16::MAX))), PRIORITY_DEFAULT);
        let weight = or(section.value("weight", integer(0..=u64::from(u16::MAX))), WEIGHT_DEFAULT);
        let name = section.value("name", text(host)).map(Spanned::into_inner);
        let owner = section.value("owner", text(owner)).map(Spanned::into_inner);
        let addresses = addresses(&mut section);
        let port = section.value("port", integer(1..=u64::from(u16::MAX))).map(Spanned::into_inner);
        let services = services(&mut section, listeners);
        section.finish(&[]);
        match (zone, server, key, services, &mut entries) {
            (Some(zone), Some(server), Some(key), Some(services), Some(entries)) => {
                let (zone, server, key) = (zone.into_inner(), server.into_inner(), key.into_inner());
                entries.push(DnsConfig {
                    zone,
                    server,
                    key,
                    ttl,
                    priority,
                    weight,
                    name,
                    owner,
                    addresses,
                    port,
                    services,
                });
            }
            _ => entries = None,
        }
    });
    entries.filter(|_| all)
}

fn services(
    section: &mut Section<'_, '_>,
    listeners: Option<&[ListenerConfig]>,
) -> Option<Vec<DnsServiceConfig>> {
    let mut services = Some(Vec::new());
    let all = section.list("service", |mut section| {
        let name = section.required("name", "\"_postgresql._tcp\"", text(service_name));
        let at = service_at(&mut section, listeners);
        match (name, at, &mut services) {
            (Some(name), Some(at), Some(services)) => {
                let at_most = services.len() < SERVICES_MAX;
                if at_most {
                    services.push(DnsServiceConfig { service: name.into_inner(), at });
                } else {
                    let message = format!("`dns.service`: there are more than {SERVICES_MAX}");
                    let hint = "publish some of them in another zone";
                    section.reader().report(name.span().start, Problem::new(message, hint));
                }
            }
            _ => services = None,
        }
        section.finish(&[]);
    });
    services.filter(|_| all)
}

/// `listener = "tcp://…"` or `port = 5432`, one of the two.
fn service_at(section: &mut Section<'_, '_>, listeners: Option<&[ListenerConfig]>) -> Option<ServiceAt> {
    let listener = section.value("listener", text(str::parse::<ListenAddress>));
    let port = section.value("port", integer(1..=u64::from(u16::MAX)));
    match (listener, port) {
        (Some(listener), None) => {
            let found = listeners?.iter().position(|known| known.bind == *listener.get_ref());
            if found.is_none() {
                let problem = unknown_listener(listener.get_ref(), listeners?);
                section.reader().report(listener.span().start, problem);
            }
            found.map(ServiceAt::Listener)
        }
        (None, Some(port)) => Some(ServiceAt::Port(port.into_inner())),
        (Some(_), Some(port)) => {
            let message = "`dns.service.port` and `dns.service.listener` say the same thing twice";
            section.reader().report(port.span().start, Problem::new(message, "remove one of them"));
            None
        }
        (None, None) => {
            // One that is there and wrong was reported already.
            if !section.has("listener") && !section.has("port") {
                let message = "`dns.service.listener` is missing";
                let hint = "add listener = \"tcp://0.0.0.0:5432\", the bind of a listener, or port = 5432";
                section.report(Problem::new(message, hint));
            }
            None
        }
    }
}

fn unknown_listener(listener: &ListenAddress, listeners: &[ListenerConfig]) -> Problem {
    let known: Vec<String> = listeners.iter().map(|listener| listener.bind.to_string()).collect();
    let written = listener.to_string();
    let hint = match nearest(&written, known.iter().map(String::as_str)) {
        Some(meant) => format!("did you mean \"{meant}\"?"),
        None => format!("write the `bind` of a listener: {}", known.join(", ")),
    };
    Problem::new(format!("`dns.service.listener`: no listener is bound to {written:?}"), hint)
}

fn addresses(section: &mut Section<'_, '_>) -> BTreeSet<IpAddr> {
    let Some(addresses) = section.value("addresses", texts(address)) else { return BTreeSet::new() };
    if addresses.get_ref().len() > ADDRESSES_MAX {
        let message = format!("`dns.addresses` has more than {ADDRESSES_MAX} entries");
        let hint = "write those that clients should use";
        section.reader().report(addresses.span().start, Problem::new(message, hint));
    }
    addresses.into_inner().into_iter().collect()
}

fn address(text: &str) -> Result<IpAddr, Problem> {
    let hint = "write addresses without a port that others reach this host at: [\"10.0.0.9\"]; without the key they are \
                found out";
    match text.parse::<IpAddr>() {
        Ok(address) if address.is_unspecified() || address.is_multicast() => {
            Err(Problem::new(format!("{address} is not the address of one host"), hint))
        }
        Ok(address) => Ok(address.to_canonical()),
        Err(_) => Err(Problem::new(format!("{text:?} is not an IP address"), hint)),
    }
}

fn server(text: &str) -> Result<SocketAddr, Problem> {
    let address = parse_address(text)?;
    if address.port() == 0 || address.ip().is_unspecified() {
        let hint = "write the address of the zone's primary: \"10.0.0.53:53\"";
        return Err(Problem::new(format!("{text:?} is not one server's address"), hint));
    }
    Ok(address)
}

fn key(text: &str) -> Result<TsigKey, Problem> {
    let hint = "`tsig-keygen NAME` prints a key; save it there, readable for trimtab alone";
    TsigKey::read(Path::new(text)).map_err(|error| Problem::new(error.to_string(), hint))
}

fn ttl(text: &str) -> Result<Duration, Problem> {
    let ttl = parse_duration(text)?;
    if ttl.subsec_nanos() != 0 || !(Duration::from_secs(1)..=TTL_MAX).contains(&ttl) {
        let range = format!("write whole seconds from \"1s\" to {:?}", duration_text(TTL_MAX));
        return Err(Problem::new(format!("{text:?} is not a time to live"), range));
    }
    Ok(ttl)
}

fn named<T>(text: &str, parsed: Result<T, NameError>, example: &str) -> Result<T, Problem> {
    parsed.map_err(|error| Problem::new(format!("{text:?} {error}"), format!("write \"{example}\"")))
}

fn domain(text: &str) -> Result<Domain, Problem> {
    named(text, text.parse(), "example.com")
}

fn host(text: &str) -> Result<HostLabel, Problem> {
    named(text, text.parse(), "lb1")
}

fn service_name(text: &str) -> Result<ServiceName, Problem> {
    named(text, text.parse(), "_postgresql._tcp")
}

fn owner(text: &str) -> Result<Owner, Problem> {
    let hint =
        "write 1 to 100 letters, digits or . _ : / -, the same at every start of this balancer: \"lb-1\"";
    Owner::parse(text).ok_or_else(|| Problem::new(format!("{text:?} is not an owner"), hint))
}
