//! What a resource says about itself when it joins, parsed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use allocation::{IdError, PoolName, ResourceId};

use crate::labels::{LABEL_BYTES_MAX, LabelsError, parse_labels};
use crate::{ENTRIES_MAX, KeyFault};

pub(crate) const VERSION_BYTES_MAX: usize = 64;
/// A registered weight further from 1 than this is a slip of the keyboard.
const WEIGHT_MAX: f64 = 1000.0;
const WEIGHT_MIN: f64 = 0.001;
const NOTIFY_URL_BYTES_MAX: usize = 512;
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(3600);
const INTERVAL_DEFAULT: Duration = Duration::from_secs(1);
/// A shorter lease would expire by one lost packet and its retransmission.
const LEASE_MIN: Duration = Duration::from_secs(3);
/// Nobody registers a resource again that does nothing but be fetched from: its exporter's restart must not cost it its place.
const PULLED_LEASE_MIN: Duration = Duration::from_secs(60);
/// Schedules may be rare. A longer gap than a month is taken for a month.
const PULLED_EVERY_MAX: Duration = Duration::from_secs(31 * 24 * 3600);
/// Reports in a row that may be missed.
const MISSED_MAX: u32 = 3;

/// A registration as it came, before it was looked at. The defaults are what an absent field stands for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RawRegistration {
    /// The resource's id.
    pub id: String,
    /// The pool it joins.
    pub pool: String,
    /// `ip:port` or `[ip6]:port`.
    pub address: String,
    /// Grows with every start of the resource.
    pub incarnation: u64,
    /// For people and for later requirements.
    pub labels: Vec<(String, String)>,
    /// Of what it serves.
    pub version: String,
    /// Most flows at once; 0: as the pool says.
    pub flows_max: u32,
    /// How much it can bear compared with its peers before any report says so; 0 stands for 1.
    pub weight: f64,
    /// How often it will report; `None` stands for 1 s.
    pub report_interval: Option<Duration>,
    /// Where it answers probes: `ip:port` or `[ip6]:port`; empty: nowhere.
    pub probe_address: String,
    /// Where notices are posted to: an `http` or `https` URL; empty: nowhere.
    pub notify_url: String,
    /// How often its utilization is fetched; `None`: it is not, the resource reports.
    pub pulled_every: Option<Duration>,
}

/// Who a registration belongs to, by the identity that made it: a name of its certificate, or its token's id. No secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner(Arc<str>);

impl Owner {
    /// The owner of this name.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A resource's registration. It can only be had from [`Registration::parse`], so every bound holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Registration {
    id: ResourceId,
    pool: PoolName,
    address: SocketAddr,
    incarnation: u64,
    labels: BTreeMap<String, String>,
    version: String,
    flows_max: u32,
    weight: f32,
    report_interval: Duration,
    probe_address: Option<SocketAddr>,
    notify_url: Option<Box<str>>,
    pulled_every: Option<Duration>,
    /// Whether it said how often it reports.
    reports: bool,
    owner: Option<Owner>,
}

/// Why a registration was refused. Always the fault of the resource that sent it (or of whoever configured it).
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RegistrationError {
    /// The id is no name.
    #[error("resource.id {0}")]
    Id(#[source] IdError),
    /// The pool is no name.
    #[error("resource.pool {0}")]
    Pool(#[source] IdError),
    /// The address does not parse.
    #[error("resource.address is not an ip:port or [ip6]:port; names are not resolved here")]
    Address,
    /// Nobody can connect to it.
    #[error("resource.address {0} is the unspecified address: say where the balancer can reach the resource")]
    AddressUnspecified(SocketAddr),
    /// Nobody can connect to it.
    #[error("resource.address {0} has port 0: say where the balancer can reach the resource")]
    PortZero(SocketAddr),
    /// More labels than [`ENTRIES_MAX`].
    #[error("resource.labels has {count} entries; it takes at most {ENTRIES_MAX}")]
    LabelCount {
        /// How many.
        count: usize,
    },
    /// A label's key is no name.
    #[error("a key of resource.labels {0}")]
    LabelKey(KeyFault),
    /// A label's value is too long.
    #[error("resource.labels[{key:?}] is {length} bytes long; a value takes at most {LABEL_BYTES_MAX}")]
    LabelValue {
        /// Its key.
        key: String,
        /// Its length in bytes.
        length: usize,
    },
    /// The version is too long.
    #[error("resource.version is {length} bytes long; it takes at most {VERSION_BYTES_MAX}")]
    Version {
        /// Its length in bytes.
        length: usize,
    },
    /// The weight is not finite, negative, too small or too large.
    #[error("resource.weight is {0:?}; it takes {WEIGHT_MIN} to {WEIGHT_MAX} (0 stands for 1)")]
    Weight(f64),
    /// The address for probes does not parse.
    #[error("resource.probe_address is not an ip:port or [ip6]:port; leave it empty to get no probes")]
    ProbeAddress,
    /// It is of another host: a resource must not have others probed.
    #[error("resource.probe_address {probe} is of another host than resource.address {address}")]
    ProbeElsewhere {
        /// Where it wants to be probed.
        probe: SocketAddr,
        /// Where it serves.
        address: SocketAddr,
    },
    /// Notices cannot be posted there.
    #[error("resource.notify_url is not an http:// or https:// URL of up to {NOTIFY_URL_BYTES_MAX} bytes")]
    NotifyUrl,
    /// The interval is out of its bounds.
    #[error("report_interval is {0:?}; it takes {INTERVAL_MIN:?} to {INTERVAL_MAX:?}")]
    ReportInterval(Duration),
}

impl Registration {
    /// Checks every field.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn parse(raw: RawRegistration) -> Result<Self, RegistrationError> {
        let id = raw.id.parse().map_err(RegistrationError::Id)?;
        let pool = raw.pool.parse().map_err(RegistrationError::Pool)?;
        let address = parse_address(&raw.address)?;
        let labels = parse_labels(raw.labels)?;
        if raw.version.len() > VERSION_BYTES_MAX {
            return Err(RegistrationError::Version { length: raw.version.len() });
        }
        let weight = if raw.weight == 0.0 { 1.0 } else { raw.weight };
        if !(WEIGHT_MIN..=WEIGHT_MAX).contains(&weight) {
            return Err(RegistrationError::Weight(raw.weight));
        }
        let report_interval = raw.report_interval.unwrap_or(INTERVAL_DEFAULT);
        if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&report_interval) {
            return Err(RegistrationError::ReportInterval(report_interval));
        }
        let probe_address = parse_probe_address(&raw.probe_address, address)?;
        let notify_url = parse_notify_url(raw.notify_url)?;
        Ok(Self {
            id,
            pool,
            address,
            incarnation: raw.incarnation,
            labels,
            version: raw.version,
            flows_max: raw.flows_max,
            weight: weight as f32,
            report_interval,
            probe_address,
            notify_url,
            pulled_every: raw.pulled_every.map(|every| every.min(PULLED_EVERY_MAX)),
            reports: raw.report_interval.is_some() || raw.pulled_every.is_none(),
            owner: None,
        })
    }

    /// The same, belonging to this identity: no other may replace it, report for it or end it.
    pub fn owned_by(self, owner: Option<Owner>) -> Self {
        Self { owner, ..self }
    }

    /// The same with another weight and limit of flows, as the resource asked for since: HAProxy's agent-check can.
    #[must_use]
    pub fn amended(&self, weight: f32, flows_max: u32) -> Self {
        let weight = weight.clamp(WEIGHT_MIN as f32, WEIGHT_MAX as f32);
        Self { weight, flows_max, ..self.clone() }
    }

    /// Which resource it is.
    pub fn id(&self) -> &ResourceId {
        &self.id
    }

    /// The pool it joins.
    pub fn pool(&self) -> &PoolName {
        &self.pool
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Grows with every start of the resource.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// What it is and can do.
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }

    /// The version of what it serves.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Most flows it takes at once; 0: it has no limit of its own.
    pub fn flows_max(&self) -> u32 {
        self.flows_max
    }

    /// How much it can bear compared with its peers, before any report says so.
    pub fn weight(&self) -> f32 {
        self.weight
    }

    /// How often it reports.
    pub fn report_interval(&self) -> Duration {
        self.report_interval
    }

    /// Where it answers probes, if it does.
    pub fn probe_address(&self) -> Option<SocketAddr> {
        self.probe_address
    }

    /// Where notices are posted to, if anywhere.
    pub fn notify_url(&self) -> Option<&str> {
        self.notify_url.as_deref()
    }

    /// How often its utilization is fetched; `None`: it is not.
    pub fn pulled_every(&self) -> Option<Duration> {
        self.pulled_every
    }

    /// Whose it is; `None`: nobody's in particular, as all are that came in clear text.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }

    /// How long it stays registered without a report.
    pub fn lease(&self) -> Duration {
        if self.reports {
            return (self.report_interval * MISSED_MAX).max(LEASE_MIN);
        }
        self.stale_after().max(PULLED_LEASE_MIN)
    }

    /// Age from which its last report no longer moves its weight.
    pub fn stale_after(&self) -> Duration {
        self.pulled_every.unwrap_or(self.report_interval) * MISSED_MAX
    }
}

/// Only its form: who posts there checks where it leads.
fn parse_notify_url(url: String) -> Result<Option<Box<str>>, RegistrationError> {
    if url.is_empty() {
        return Ok(None);
    }
    let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let is_url = host.is_some_and(|host| !host.is_empty() && !host.starts_with('/'));
    if url.len() > NOTIFY_URL_BYTES_MAX || !is_url || !url.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(RegistrationError::NotifyUrl);
    }
    Ok(Some(url.into()))
}

fn parse_probe_address(text: &str, address: SocketAddr) -> Result<Option<SocketAddr>, RegistrationError> {
    if text.is_empty() {
        return Ok(None);
    }
    let probe: SocketAddr = text.parse().map_err(|_| RegistrationError::ProbeAddress)?;
    if probe.port() == 0 {
        return Err(RegistrationError::ProbeAddress);
    }
    if probe.ip().to_canonical() != address.ip().to_canonical() {
        return Err(RegistrationError::ProbeElsewhere { probe, address });
    }
    Ok(Some(probe))
}

fn parse_address(text: &str) -> Result<SocketAddr, RegistrationError> {
    let address: SocketAddr = text.parse().map_err(|_| RegistrationError::Address)?;
    if address.ip().to_canonical().is_unspecified() {
        return Err(RegistrationError::AddressUnspecified(address));
    }
    if address.port() == 0 {
        return Err(RegistrationError::PortZero(address));
    }
    Ok(address)
}

impl From<LabelsError> for RegistrationError {
    fn from(error: LabelsError) -> Self {
        match error {
            LabelsError::Count { count } => Self::LabelCount { count },
            LabelsError::Key(fault) => Self::LabelKey(fault),
            LabelsError::Value { key, length } => Self::LabelValue { key, length },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn raw() -> RawRegistration {
        RawRegistration {
            id: "pg1".into(),
            pool: "sql".into(),
            address: "10.0.0.1:5432".into(),
            incarnation: 1,
            ..RawRegistration::default()
        }
    }

    #[test]
    fn defaults_stand_for_the_usual() {
        let parsed = Registration::parse(raw()).unwrap();
        assert_eq!((parsed.weight(), parsed.report_interval()), (1.0, Duration::from_secs(1)));
        assert_eq!(parsed.lease(), Duration::from_secs(3));
        let slow = RawRegistration { report_interval: Some(Duration::from_secs(10)), ..raw() };
        assert_eq!(Registration::parse(slow).unwrap().lease(), Duration::from_secs(30));
        let pulled = RawRegistration { pulled_every: Some(Duration::from_secs(10)), ..raw() };
        let pulled_parsed = Registration::parse(pulled.clone()).unwrap();
        assert_eq!(
            (pulled_parsed.lease(), pulled_parsed.stale_after()),
            (Duration::from_secs(60), Duration::from_secs(30))
        );
        let both = RawRegistration { report_interval: Some(Duration::from_secs(2)), ..pulled };
        let both = Registration::parse(both).unwrap();
        assert_eq!((both.lease(), both.stale_after()), (Duration::from_secs(6), Duration::from_secs(30)));
        assert_eq!((both.amended(0.5, 7).weight(), both.amended(0.5, 7).flows_max()), (0.5, 7));
        let quick = RawRegistration { report_interval: Some(Duration::from_millis(100)), ..raw() };
        assert_eq!(Registration::parse(quick).unwrap().lease(), Duration::from_secs(3));
    }

    #[test]
    fn every_bound_is_checked() {
        use RegistrationError as E;
        let refused = |change: fn(&mut RawRegistration)| {
            let mut raw = raw();
            change(&mut raw);
            Registration::parse(raw).unwrap_err()
        };
        assert!(matches!(refused(|r| r.id = "a b".into()), E::Id(_)));
        assert!(matches!(refused(|r| r.pool = String::new()), E::Pool(_)));
        assert_eq!(refused(|r| r.address = "db.example:5432".into()), E::Address);
        assert!(matches!(refused(|r| r.address = "0.0.0.0:5432".into()), E::AddressUnspecified(_)));
        assert!(matches!(refused(|r| r.address = "[::]:5432".into()), E::AddressUnspecified(_)));
        assert!(matches!(refused(|r| r.address = "[::ffff:0.0.0.0]:5432".into()), E::AddressUnspecified(_)));
        assert!(matches!(refused(|r| r.address = "10.0.0.1:0".into()), E::PortZero(_)));
        assert_eq!(refused(|r| r.probe_address = "10.0.0.1".into()), E::ProbeAddress);
        let elsewhere = refused(|r| r.probe_address = "10.0.0.2:9".into());
        assert!(matches!(elsewhere, E::ProbeElsewhere { .. }), "others must not be probed in its name");
        assert!(matches!(refused(|r| r.weight = f64::NAN), E::Weight(_)));
        assert!(matches!(refused(|r| r.weight = -1.0), E::Weight(_)));
        assert!(matches!(refused(|r| r.weight = 1000.1), E::Weight(_)));
        assert!(matches!(refused(|r| r.version = "x".repeat(65)), E::Version { length: 65 }));
        assert!(matches!(refused(|r| r.report_interval = Some(Duration::ZERO)), E::ReportInterval(_)));
        assert!(matches!(refused(|r| r.labels = vec![("k".into(), "x".repeat(257))]), E::LabelValue { .. }));
        assert!(matches!(
            refused(|r| r.labels = vec![(String::new(), "v".into())]),
            E::LabelKey(KeyFault::Empty)
        ));
        let many =
            |r: &mut RawRegistration| r.labels = (0..65).map(|n| (format!("k{n}"), String::new())).collect();
        assert_eq!(refused(many), E::LabelCount { count: 65 });
    }

    proptest! {
        #[test]
        fn whatever_parses_is_within_its_bounds(weight in any::<f64>(), ms in 0_u64..8_000_000, address in "\\PC{0,24}") {
            let raw = RawRegistration { weight, address, report_interval: Some(Duration::from_millis(ms)), ..raw() };
            if let Ok(parsed) = Registration::parse(raw) {
                prop_assert!(parsed.weight() > 0.0 && parsed.weight() <= 1000.0);
                prop_assert!(parsed.lease() >= Duration::from_secs(3) && parsed.lease() <= 3 * INTERVAL_MAX);
                prop_assert!(parsed.address().port() != 0);
            }
        }
    }
}
