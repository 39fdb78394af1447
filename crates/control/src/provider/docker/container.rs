//! What a container offers, by its labels and its state. Pure: from the engine's answer to an [`Offer`].
//!
//! ```text
//! trimtab.pool         the pool it joins; without it the container is none of ours
//! trimtab.port         where it serves; may be left out where the image exposes one TCP port
//! trimtab.network      whose address is taken, where it has several
//! trimtab.address      the address itself: of the host, for a published port
//! trimtab.version      of what it serves
//! trimtab.weight       compared with its peers, until reports say more
//! trimtab.flows_max    most flows at once
//! trimtab.label.KEY    what it is and can do
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::wire::{Container, Labels, Network};
use crate::provider::holder::Offer;

const PREFIX: &str = "trimtab.";
/// The label that makes a container ours.
pub(super) const POOL: &str = "trimtab.pool";
/// Keys that stand alone, for those who misspell one.
const KEYS: &str = "trimtab.pool, .port, .network, .address, .version, .weight, .flows_max and .label.KEY";
/// The network over which Swarm brings published ports in: nobody connects to a container's address there.
const INGRESS: &str = "ingress";
/// Which service a task's container is of.
pub(super) const SERVICE_ID: &str = "com.docker.swarm.service.id";
const SERVICE_NAME: &str = "com.docker.swarm.service.name";

/// What a container says of itself.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Offered {
    pub(super) offer: Offer,
    pub(super) health: Health,
    /// The signal that asks it to end, by its number.
    pub(super) stop_signal: u8,
}

/// Whether it can take flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Health {
    /// Its health check passes, or it has none.
    Ready,
    /// Its health check has not passed yet.
    Starting,
    /// Its health check fails.
    Unhealthy,
    Paused,
}

/// Why a container with our labels offers nothing: its operator's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum OfferError {
    #[error("there is no label {0}; there are {KEYS}")]
    UnknownLabel(String),
    #[error("trimtab.port is {0:?}; write a port from 1 to 65535")]
    Port(String),
    #[error("trimtab.port is missing, and the image exposes {0} TCP ports, not one: say where it serves")]
    NoPort(usize),
    #[error("trimtab.address is {0:?}, which is no IP address")]
    Address(String),
    #[error("it has no address in the network {name:?}; it has one in {}", list(has))]
    NotInNetwork { name: String, has: Vec<String> },
    #[error("it has no address of its own: attach it to a network, or give it trimtab.address")]
    NoAddress,
    #[error("it has addresses in {}: say with trimtab.network which is to be used", list(.0))]
    ManyNetworks(Vec<String>),
    #[error("it uses the host's network: say with provider.address or trimtab.address where the host is")]
    HostNetwork,
    #[error("the engine gives {text:?} as {field}, which is none")]
    Engine { field: &'static str, text: String },
    #[error("trimtab.weight is {0:?}; write a number such as 1.5")]
    Weight(String),
    #[error("trimtab.flows_max is {0:?}; write a whole number")]
    FlowsMax(String),
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// What a container offers; `None`: it is none of ours, or does not run. Its own labels stand above its service's.
///
/// # Errors
/// See [`OfferError`].
pub(super) fn offered(
    container: &Container,
    service: Option<&Labels>,
    host: Option<IpAddr>,
) -> Result<Option<Offered>, OfferError> {
    let mut labels = ours(service.into_iter().flatten());
    labels.extend(ours(&container.config.labels));
    let Some(pool) = labels.remove(POOL).filter(|_| container.state.running) else { return Ok(None) };
    let mut take = |key: &str| labels.remove(key).map(str::to_owned);
    let port = port(take("trimtab.port"), container)?;
    let address = address(take("trimtab.address"), take("trimtab.network"), container, host)?;
    let version = take("trimtab.version").unwrap_or_default();
    let weight = number(take("trimtab.weight"), OfferError::Weight)?;
    let flows_max = number(take("trimtab.flows_max"), OfferError::FlowsMax)?;
    let offer = Offer {
        name: container.name.trim_start_matches('/').to_owned(),
        pool: pool.to_owned(),
        address: SocketAddr::new(address, port),
        incarnation: incarnation(&container.state.started)?,
        labels: capabilities(labels, container)?,
        version,
        flows_max,
        weight,
    };
    Ok(Some(Offered { offer, health: health(container), stop_signal: signal(&container.config.stop_signal) }))
}

/// Whether these labels make a container ours.
pub(super) fn is_ours(labels: &Labels) -> bool {
    labels.contains_key(POOL)
}

/// Those labels of a service that concern its tasks here.
pub(super) fn ours<'l>(
    labels: impl IntoIterator<Item = (&'l String, &'l String)>,
) -> BTreeMap<&'l str, &'l str> {
    let named = labels.into_iter().filter(|(key, _)| key.starts_with(PREFIX));
    named.map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

fn port(label: Option<String>, container: &Container) -> Result<u16, OfferError> {
    if let Some(text) = label {
        return text.parse().ok().filter(|port| *port > 0).ok_or(OfferError::Port(text));
    }
    let tcp = |exposed: &String| exposed.strip_suffix("/tcp")?.parse().ok();
    let exposed: Vec<u16> = container.config.exposed.keys().filter_map(tcp).collect();
    match exposed[..] {
        [port] if port > 0 => Ok(port),
        _ => Err(OfferError::NoPort(exposed.len())),
    }
}

fn address(
    label: Option<String>,
    network: Option<String>,
    container: &Container,
    host: Option<IpAddr>,
) -> Result<IpAddr, OfferError> {
    if let Some(text) = label {
        return text.parse().map_err(|_| OfferError::Address(text));
    }
    if container.host.network_mode == "host" {
        return host.ok_or(OfferError::HostNetwork);
    }
    let of = |network: &Network| {
        let text = if network.ip.is_empty() { &network.ip6 } else { &network.ip };
        (!text.is_empty()).then(|| text.clone())
    };
    let networks = container.network.networks.iter().filter(|(name, _)| *name != INGRESS);
    let with_address: Vec<(String, String)> =
        networks.filter_map(|(name, network)| Some((name.clone(), of(network)?))).collect();
    let names = || with_address.iter().map(|(name, _)| name.clone()).collect();
    let text = match (network, &with_address[..]) {
        (Some(name), all) => match all.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => text,
            None => return Err(OfferError::NotInNetwork { name, has: names() }),
        },
        (None, [(_, text)]) => text,
        (None, []) => return Err(OfferError::NoAddress),
        (None, _) => return Err(OfferError::ManyNetworks(names())),
    };
    text.parse().map_err(|_| OfferError::Engine { field: "an address", text: text.clone() })
}

/// Nothing stands for 0, and so for the default.
fn number<T: std::str::FromStr + Default>(
    label: Option<String>,
    wrong: fn(String) -> OfferError,
) -> Result<T, OfferError> {
    label.map_or_else(|| Ok(T::default()), |text| text.parse().map_err(|_| wrong(text)))
}

/// What is left of our labels, and where the container is from.
fn capabilities(
    labels: BTreeMap<&str, &str>,
    container: &Container,
) -> Result<BTreeMap<String, String>, OfferError> {
    let mut found = BTreeMap::new();
    found.insert("container".to_owned(), container.id.short().to_owned());
    if let Some(service) = container.config.labels.get(SERVICE_NAME) {
        found.insert("service".to_owned(), service.clone());
    }
    for (key, value) in labels {
        let Some(name) = key.strip_prefix("trimtab.label.") else {
            return Err(OfferError::UnknownLabel(key.to_owned()));
        };
        found.insert(name.to_owned(), value.to_owned());
    }
    Ok(found)
}

fn health(container: &Container) -> Health {
    if container.state.paused {
        return Health::Paused;
    }
    match container.state.health.as_ref().map(|health| health.status.as_str()) {
        Some("starting") => Health::Starting,
        Some("unhealthy") => Health::Unhealthy,
        _ => Health::Ready,
    }
}

/// A signal by its number; SIGTERM where the image names none, or one that is not known here.
pub(super) fn signal(text: &str) -> u8 {
    let name = text.strip_prefix("SIG").unwrap_or(text);
    match name {
        "HUP" => 1,
        "INT" => 2,
        "QUIT" => 3,
        "ABRT" => 6,
        "KILL" => 9,
        "USR1" => 10,
        "USR2" => 12,
        "PWR" => 30,
        "RTMIN+3" => 37,
        "WINCH" => 28,
        number => number.parse().unwrap_or(15),
    }
}

/// `2026-11-25T00:34:07.197100692Z` in nanoseconds since 1970: it grows with every start of the container.
fn incarnation(started: &str) -> Result<u64, OfferError> {
    rfc3339_nanos(started).ok_or_else(|| OfferError::Engine { field: "a start", text: started.to_owned() })
}

/// RFC 3339 as Go writes times in UTC; `None`: it is not that, or before 1970.
fn rfc3339_nanos(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let [year, month, day] = numbers(date, '-')?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, ""));
    let [hour, minute, second] = numbers(time, ':')?;
    let in_range = (1970..=2500).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60
        && fraction.len() <= 9
        && fraction.bytes().all(|byte| byte.is_ascii_digit());
    if !in_range {
        return None;
    }
    // Days from the civil date (H. Hinnant, "chrono-compatible low-level date algorithms"): years begin in March.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    let nanos: u64 = format!("{fraction:0<9}").parse().ok()?;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

fn numbers(text: &str, separator: char) -> Option<[u64; 3]> {
    let mut parts = text.split(separator).map(|part| part.parse().ok());
    let found = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container as the engine describes it (API 1.41), with these labels, networks and health.
    fn container(labels: &str, networks: &str, more: &str) -> Container {
        let text = format!(
            r#"{{"Id":"a36012d8b113fe51","Name":"/web.1.ze7s10","State":{{"Running":true,"Paused":false,
            "StartedAt":"2026-11-25T00:34:07.197100692Z"{more}}},"Config":{{"Labels":{labels},
            "ExposedPorts":{{"8080/tcp":{{}},"53/udp":{{}}}}}},"HostConfig":{{"NetworkMode":"default","NanoCpus":0}},
            "NetworkSettings":{{"Networks":{networks}}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    const ONE: &str =
        r#"{"web-net":{"IPAddress":"172.17.0.2","GlobalIPv6Address":""},"ingress":{"IPAddress":"10.0.0.9"}}"#;
    const TWO: &str =
        r#"{"a":{"IPAddress":"172.17.0.2"},"b":{"IPAddress":"172.18.0.2"},"c":{"IPAddress":""}}"#;

    fn offer(labels: &str, networks: &str) -> Result<Offer, OfferError> {
        let found = offered(&container(labels, networks, ""), None, None)?;
        Ok(found.expect("it is ours").offer)
    }

    #[test]
    fn a_container_with_a_pool_offers_the_port_that_it_exposes() {
        let found = offer(r#"{"trimtab.pool":"web"}"#, ONE).unwrap();
        assert_eq!((found.name.as_str(), found.pool.as_str()), ("web.1.ze7s10", "web"));
        assert_eq!(found.address.to_string(), "172.17.0.2:8080");
        assert_eq!(found.incarnation, 1_795_566_847_197_100_692);
        assert_eq!(found.labels["container"], "a36012d8b113");
        assert_eq!((found.weight, found.flows_max, found.version.as_str()), (0.0, 0, ""));
    }

    #[test]
    fn every_label_is_taken() {
        let labels = r#"{"trimtab.pool":"web","trimtab.port":"81","trimtab.network":"b","trimtab.version":"2.0",
            "trimtab.weight":"1.5","trimtab.flows_max":"7","trimtab.label.tls":"true","other":"x",
            "com.docker.swarm.service.name":"web"}"#;
        let found = offer(labels, TWO).unwrap();
        assert_eq!(found.address.to_string(), "172.18.0.2:81");
        assert_eq!((found.weight, found.flows_max, found.version.as_str()), (1.5, 7, "2.0"));
        let names: Vec<&str> = found.labels.keys().map(String::as_str).collect();
        assert_eq!(names, ["container", "service", "tls"]);
    }

    #[test]
    fn a_containers_label_stands_above_its_services() {
        let service: Labels = [(POOL, "web"), ("trimtab.port", "80"), ("trimtab.label.role", "reader")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let task = container(r#"{"trimtab.label.role":"writer"}"#, ONE, "");
        let found = offered(&task, Some(&service), None).unwrap().expect("its service makes it ours").offer;
        assert_eq!((found.address.port(), found.labels["role"].as_str()), (80, "writer"));
    }

    #[test]
    fn others_and_those_that_do_not_run_offer_nothing() {
        let none =
            |labels: &str, more: &str| offered(&container(labels, ONE, more), None, None).unwrap().is_none();
        assert!(none("{}", "") && none("null", "") && none(r#"{"trimtab.port":"1"}"#, ""));
        let mut ended = container(r#"{"trimtab.pool":"web"}"#, ONE, "");
        ended.state.running = false;
        assert!(offered(&ended, None, None).unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_to_write() {
        use OfferError as E;
        let refused = |more: &str, networks: &str| {
            offer(&format!(r#"{{"trimtab.pool":"web"{more}}}"#), networks).unwrap_err()
        };
        assert_eq!(refused(r#","trimtab.prot":"80""#, ONE), E::UnknownLabel("trimtab.prot".into()));
        assert_eq!(refused(r#","trimtab.port":"0""#, ONE), E::Port("0".into()));
        assert_eq!(refused(r#","trimtab.port":"70000""#, ONE), E::Port("70000".into()));
        assert_eq!(refused("", TWO), E::ManyNetworks(vec!["a".into(), "b".into()]));
        assert_eq!(refused("", "null"), E::NoAddress);
        assert_eq!(refused(r#","trimtab.address":"host""#, ONE), E::Address("host".into()));
        assert_eq!(refused(r#","trimtab.weight":"much""#, ONE), E::Weight("much".into()));
        assert_eq!(refused(r#","trimtab.flows_max":"-1""#, ONE), E::FlowsMax("-1".into()));
        let elsewhere = refused(r#","trimtab.network":"c""#, TWO);
        assert_eq!(elsewhere.to_string(), "it has no address in the network \"c\"; it has one in a, b");
    }

    #[test]
    fn a_container_on_the_hosts_network_has_the_hosts_address() {
        let mut on_host =
            container(r#"{"trimtab.pool":"web","trimtab.port":"81"}"#, r#"{"host":{"IPAddress":""}}"#, "");
        on_host.host.network_mode = "host".into();
        assert_eq!(offered(&on_host, None, None), Err(OfferError::HostNetwork));
        let found = offered(&on_host, None, Some("10.0.0.7".parse().unwrap())).unwrap().unwrap();
        assert_eq!(found.offer.address.to_string(), "10.0.0.7:81");
    }

    #[test]
    fn health_is_what_the_engine_says() {
        let health = |more: &str| {
            let found = offered(&container(r#"{"trimtab.pool":"web"}"#, ONE, more), None, None);
            found.unwrap().unwrap().health
        };
        assert_eq!(health(""), Health::Ready);
        assert_eq!(health(r#","Health":null"#), Health::Ready);
        assert_eq!(health(r#","Health":{"Status":"none"}"#), Health::Ready);
        assert_eq!(health(r#","Health":{"Status":"starting"}"#), Health::Starting);
        assert_eq!(health(r#","Health":{"Status":"healthy"}"#), Health::Ready);
        assert_eq!(health(r#","Health":{"Status":"unhealthy"}"#), Health::Unhealthy);
    }

    #[test]
    fn signals_have_names_and_numbers() {
        let all =
            ["", "SIGTERM", "TERM", "15", "SIGQUIT", "SIGKILL", "9", "SIGWINCH", "SIGRTMIN+3", "nonsense"];
        assert_eq!(all.map(signal), [15, 15, 15, 15, 3, 9, 9, 28, 37, 15]);
    }

    #[test]
    fn times_are_nanoseconds_since_1970() {
        assert_eq!(rfc3339_nanos("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(rfc3339_nanos("2000-02-29T12:00:00.5Z"), Some(951_825_600_500_000_000));
        assert_eq!(rfc3339_nanos("2026-11-25T00:34:07.197100692Z"), Some(1_795_566_847_197_100_692));
        for wrong in
            ["", "0001-01-01T00:00:00Z", "2026-11-25", "2026-13-01T00:00:00Z", "2026-11-25T00:34:07+01:00"]
        {
            assert_eq!(rfc3339_nanos(wrong), None, "{wrong}");
        }
        assert!(rfc3339_nanos("2026-11-25T00:34:07.1234567890Z").is_none());
    }
}
