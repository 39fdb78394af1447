//! `[[dns]]` becomes what is published: with the ports that were really bound, and the addresses that lead there.

use std::net::SocketAddr;

use discovery::{
    Addresses, Finder, HostLabel, Owner, Publication, Publisher, Service, ServiceName, Statuses,
};
use tokio::runtime::Runtime;

use crate::config::{Config, DnsConfig, ServiceAt};
use crate::failure::Failure;
use crate::host_name;

/// What is published where: of control, and of the listeners at `listeners`, in the configuration's order.
///
/// # Errors
/// When a name in DNS would be too long.
pub fn publications(
    config: &Config,
    listeners: &[SocketAddr],
    control: SocketAddr,
) -> Result<Vec<Publication>, Failure> {
    let mut reasons = Vec::new();
    let mut publications = Vec::new();
    for dns in &config.dns {
        match publication(config, dns, listeners, control) {
            Ok(publication) => publications.push(publication),
            Err(error) => reasons.push(format!("dns: a name in {} {error}; shorten dns.name", dns.zone)),
        }
    }
    if reasons.is_empty() { Ok(publications) } else { Err(Failure::Start(reasons)) }
}

fn publication(
    config: &Config,
    dns: &DnsConfig,
    listeners: &[SocketAddr],
    control: SocketAddr,
) -> Result<Publication, discovery::NameError> {
    let label = label(dns);
    // As it is configured: with port 0 each start would be somebody else.
    let owner = dns.owner.clone();
    let owner =
        owner.unwrap_or_else(|| Owner::of_this_machine(&host_name(), &config.control.listen.to_string()));
    let reached = |bound: SocketAddr| match dns.addresses.is_empty() {
        true => Addresses::of_bound(bound.ip()),
        false => Addresses::Fixed(dns.addresses.clone()),
    };
    let of_control = |service: ServiceName, port: u16| {
        let DnsConfig { priority, weight, .. } = *dns;
        (reached(control), Service { service, priority, weight, port })
    };
    let services = dns.services.iter().map(|service| match service.at {
        ServiceAt::Port(port) => of_control(service.service.clone(), port),
        ServiceAt::Listener(place) => {
            let bound = listeners[place];
            let (_, published) = of_control(service.service.clone(), bound.port());
            (reached(bound), published)
        }
    });
    Publication::new(
        dns.zone.clone(),
        dns.server,
        dns.key.clone(),
        owner,
        dns.ttl,
        &label,
        of_control(ServiceName::control(), dns.port.unwrap_or_else(|| control.port())),
        services,
    )
}

/// Where others may be published that stand in for this balancer.
pub fn zones(config: &Config) -> Vec<control::Zone> {
    let zone = |dns: &DnsConfig| {
        // A name that is too long is said where it is published.
        let finder = Finder::new(&ServiceName::control(), &dns.zone, Some(dns.server)).ok()?;
        Some(control::Zone { finder, own: format!("{}.{}", label(dns), dns.zone) })
    };
    config.dns.iter().filter_map(zone).collect()
}

/// This balancer's host name in the zone.
fn label(dns: &DnsConfig) -> HostLabel {
    dns.name.clone().unwrap_or_else(|| HostLabel::of_host(&host_name()))
}

/// Starts publishing.
pub fn start(runtime: &Runtime, publications: Vec<Publication>, statuses: &Statuses) -> Publisher {
    let _within = runtime.enter();
    Publisher::start(publications, statuses)
}
