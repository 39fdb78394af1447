//! A utilization script, parsed: what is executed and when.

use std::time::Duration;

use api::v1::http_script::Mapping as WireMapping;
use api::v1::utilization_script::Kind as WireKind;
use api::v1::{self, UtilizationScript};
use chrono::{DateTime, Utc};
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use fetch::{Host, Url, UrlError};
use formats::{Mapping, MappingError, RECIPES, recipe};

const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(3600);
/// Out-of-band ORCA's usual interval (gRPC A51, A58).
const INTERVAL_DEFAULT: Duration = Duration::from_secs(10);
const SCHEDULE_BYTES_MAX: usize = 128;
const SEND_BYTES_MAX: usize = 256;
/// Occurrences of a schedule that its longest gap is looked for among: two of a weekly pattern's days, and then some.
const OCCURRENCES_LOOKED_AT: usize = 10;

/// What is executed and when.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) kind: Kind,
    pub(crate) when: When,
}

/// What is executed.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Http {
        url: Url,
        /// `None`: our own JSON.
        mapping: Option<Mapping>,
    },
    Orca {
        host: Host,
        port: u16,
    },
    AgentCheck {
        host: Host,
        port: u16,
        send: String,
    },
}

/// When it is executed.
#[derive(Debug, Clone)]
pub(crate) struct When {
    pub(crate) interval: Option<Duration>,
    pub(crate) schedule: Option<Box<Cron>>,
    /// 0: not by flows.
    pub(crate) after_flows: u64,
}

/// Why a script is none. Always the fault of the resource that sent it, or of whoever configured it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum ScriptError {
    #[error("utilization_script is empty: say http, orca or agent_check")]
    NoKind,
    #[error("utilization_script.http: {0}")]
    Url(#[from] UrlError),
    #[error("utilization_script.http.recipe: there is no recipe {0:?}; there are {list}", list = recipes())]
    Recipe(String),
    #[error("utilization_script.http.lines: {0}")]
    Mapping(#[from] MappingError),
    #[error("utilization_script.{0}.address is not host:port or [ip6]:port")]
    Address(&'static str),
    #[error("utilization_script.agent_check.send is longer than {SEND_BYTES_MAX} bytes")]
    Send,
    #[error("utilization_script.interval is not from {INTERVAL_MIN:?} to {INTERVAL_MAX:?}")]
    Interval,
    #[error("utilization_script.schedule is no pattern such as `*/5 * * * *` (UTC): {0}")]
    Schedule(String),
}

fn recipes() -> String {
    RECIPES.map(|(name, _)| name).join(", ")
}

impl Script {
    pub(crate) fn parse(wire: &UtilizationScript, now: DateTime<Utc>) -> Result<Self, ScriptError> {
        let kind = Kind::parse(wire.kind.as_ref().ok_or(ScriptError::NoKind)?)?;
        let schedule = match wire.schedule.as_str() {
            "" => None,
            text => Some(Box::new(parse_schedule(text, now)?)),
        };
        let interval = match wire.interval {
            Some(interval) => {
                let interval = Duration::try_from(interval).map_err(|_| ScriptError::Interval)?;
                if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
                    return Err(ScriptError::Interval);
                }
                Some(interval)
            }
            None if schedule.is_some() => None,
            None => Some(INTERVAL_DEFAULT),
        };
        Ok(Self { kind, when: When { interval, schedule, after_flows: wire.after_flows } })
    }
}

impl Kind {
    fn parse(wire: &WireKind) -> Result<Self, ScriptError> {
        match wire {
            WireKind::Http(http) => {
                let mapping = match &http.mapping {
                    None => None,
                    Some(WireMapping::Lines(lines)) => Some(Mapping::parse(lines)?),
                    Some(WireMapping::Recipe(name)) => Some(
                        recipe(name).ok_or_else(|| ScriptError::Recipe(name.chars().take(64).collect()))?,
                    ),
                };
                Ok(Self::Http { url: http.url.parse()?, mapping })
            }
            WireKind::Orca(v1::OrcaScript { address }) => {
                let (host, port) = host_and_port(address).ok_or(ScriptError::Address("orca"))?;
                Ok(Self::Orca { host, port })
            }
            WireKind::AgentCheck(v1::AgentCheckScript { address, send }) => {
                let (host, port) = host_and_port(address).ok_or(ScriptError::Address("agent_check"))?;
                if send.len() > SEND_BYTES_MAX {
                    return Err(ScriptError::Send);
                }
                Ok(Self::AgentCheck { host, port, send: send.clone() })
            }
        }
    }

    /// Its name in metrics and output.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Http { .. } => "http",
            Self::Orca { .. } => "orca",
            Self::AgentCheck { .. } => "agent-check",
        }
    }

    /// Whom it asks.
    pub(crate) fn target(&self) -> (&Host, u16) {
        match self {
            Self::Http { url, .. } => (url.host(), url.port()),
            Self::Orca { host, port } | Self::AgentCheck { host, port, .. } => (host, *port),
        }
    }
}

impl When {
    /// How often it is executed at least, where nothing fails.
    pub(crate) fn every(&self, now: DateTime<Utc>) -> Duration {
        if let Some(interval) = self.interval {
            return interval;
        }
        let Some(schedule) = &self.schedule else { return INTERVAL_DEFAULT };
        let mut before = now;
        let mut longest = INTERVAL_MIN;
        for next in schedule.iter_after(now).take(OCCURRENCES_LOOKED_AT) {
            longest = longest.max((next - before).to_std().unwrap_or_default());
            before = next;
        }
        longest
    }

    /// How long until the schedule's next moment; `None`: there is none.
    pub(crate) fn until_scheduled(&self, now: DateTime<Utc>) -> Option<Duration> {
        let next = self.schedule.as_ref()?.find_next_occurrence(&now, false).ok()?;
        Some((next - now).to_std().unwrap_or_default())
    }
}

fn parse_schedule(text: &str, now: DateTime<Utc>) -> Result<Cron, ScriptError> {
    if text.len() > SCHEDULE_BYTES_MAX {
        return Err(ScriptError::Schedule(format!("it is longer than {SCHEDULE_BYTES_MAX} bytes")));
    }
    let wrong = |error: croner::errors::CronError| ScriptError::Schedule(error.to_string());
    let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
    let schedule = parser.parse(text).map_err(wrong)?;
    // One that never comes (30 February) would keep nobody registered.
    schedule.find_next_occurrence(&now, false).map_err(wrong)?;
    Ok(schedule)
}

fn host_and_port(text: &str) -> Option<(Host, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    // An IPv6 address without brackets is cut in its middle.
    if host.contains(':') && !host.starts_with('[') {
        return None;
    }
    Some((Host::parse(host)?, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn http(url: &str, mapping: Option<WireMapping>) -> UtilizationScript {
        let kind = Some(WireKind::Http(v1::HttpScript { url: url.into(), mapping }));
        UtilizationScript { kind, ..UtilizationScript::default() }
    }

    fn parse(wire: &UtilizationScript) -> Result<Script, ScriptError> {
        Script::parse(wire, DateTime::UNIX_EPOCH)
    }

    #[test]
    fn when() {
        let plain = http("http://10.0.0.1/", None);
        let every = |wire: &UtilizationScript| parse(wire).unwrap().when.every(DateTime::UNIX_EPOCH);
        assert_eq!(every(&plain), Duration::from_secs(10));
        let interval = Some(prost_types::Duration { seconds: 2, nanos: 0 });
        assert_eq!(every(&UtilizationScript { interval, ..plain.clone() }), Duration::from_secs(2));
        let scheduled = |schedule: &str| UtilizationScript { schedule: schedule.into(), ..plain.clone() };
        assert_eq!(every(&scheduled("*/5 * * * *")), Duration::from_secs(300));
        assert_eq!(every(&scheduled("*/2 * * * * *")), Duration::from_secs(2));
        // Hourly by day: the night is the longest gap.
        assert_eq!(every(&scheduled("0 8,9,20 * * *")), Duration::from_secs(12 * 3600));
        let script = parse(&scheduled("0 8 * * *")).unwrap();
        assert_eq!(script.when.until_scheduled(DateTime::UNIX_EPOCH), Some(Duration::from_secs(8 * 3600)));
        assert_eq!(script.when.interval, None);
    }

    #[test]
    fn what_is_no_script_is_said() {
        let said = |wire: &UtilizationScript| parse(wire).unwrap_err().to_string();
        assert!(said(&UtilizationScript::default()).starts_with("utilization_script is empty"));
        assert!(said(&http("gopher://a", None)).contains("not of the form http://"));
        let recipe = said(&http("http://a/", Some(WireMapping::Recipe("nginx".into()))));
        assert!(recipe.ends_with("there are node_exporter, postgres_exporter, mysqld_exporter"), "{recipe}");
        assert!(said(&http("http://a/", Some(WireMapping::Lines("cpus = a".into())))).contains("line 1"));
        let plain = http("http://10.0.0.1/", None);
        for (seconds, nanos) in [(0, 999_999_999), (3601, 0), (-1, 0), (0, 0)] {
            let interval = Some(prost_types::Duration { seconds, nanos });
            assert!(said(&UtilizationScript { interval, ..plain.clone() }).contains("interval is not from"));
        }
        let begun = Instant::now();
        for schedule in ["x", "* * *", "61 * * * *", "0 0 30 2 *", "* * * * * * 2030", &"*".repeat(129)] {
            let wire = UtilizationScript { schedule: schedule.into(), ..plain.clone() };
            assert!(said(&wire).contains("schedule is no pattern"), "{schedule}");
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "a schedule that never comes is found out soon");
        for address in ["10.0.0.1", "10.0.0.1:0", "::1:9000", "[::1]", ":80", "a b:80"] {
            let kind = Some(WireKind::Orca(v1::OrcaScript { address: address.into() }));
            let wire = UtilizationScript { kind, ..UtilizationScript::default() };
            assert_eq!(
                said(&wire),
                "utilization_script.orca.address is not host:port or [ip6]:port",
                "{address}"
            );
        }
    }
}
