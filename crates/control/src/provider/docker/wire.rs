//! What the Docker Engine API answers, as far as it is read here (API 1.41, docs.docker.com/reference/api/engine).
//!
//! Everything the engine may leave out or say as `null` is optional or has a default: another version of it must not
//! make all of an answer unreadable.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Deserializer};

/// Labels of a container or a service.
pub(super) type Labels = BTreeMap<String, String>;

/// A container's id: hexadecimal, so that it can stand in a path.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct ContainerId(String);

impl ContainerId {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// As people know it.
    pub(super) fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl TryFrom<String> for ContainerId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let good = (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if good { Ok(Self(text)) } else { Err("a container's id is 1 to 64 hexadecimal digits") }
    }
}

/// `GET /version`.
#[derive(Debug, Deserialize)]
pub(super) struct Version {
    #[serde(rename = "ApiVersion")]
    pub(super) newest: String,
    #[serde(rename = "MinAPIVersion", default)]
    pub(super) oldest: String,
}

/// `GET /info`.
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    #[serde(rename = "NCPU", default)]
    pub(super) cpus: u32,
    #[serde(rename = "Swarm", default, deserialize_with = "or_default")]
    pub(super) swarm: Swarm,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Swarm {
    #[serde(rename = "NodeID", default)]
    pub(super) node: String,
    /// Whether this node is a manager.
    #[serde(rename = "ControlAvailable", default)]
    pub(super) manages: bool,
}

/// One of `GET /containers/json`.
#[derive(Debug, Deserialize)]
pub(super) struct Listed {
    #[serde(rename = "Id")]
    pub(super) id: ContainerId,
    #[serde(rename = "Labels", default, deserialize_with = "or_default")]
    pub(super) labels: Labels,
}

/// `GET /containers/{id}/json`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Container {
    #[serde(rename = "Id")]
    pub(super) id: ContainerId,
    /// With a slash in front.
    #[serde(rename = "Name", default)]
    pub(super) name: String,
    #[serde(rename = "State")]
    pub(super) state: State,
    #[serde(rename = "Config")]
    pub(super) config: ContainerConfig,
    #[serde(rename = "HostConfig")]
    pub(super) host: HostConfig,
    #[serde(rename = "NetworkSettings", default, deserialize_with = "or_default")]
    pub(super) network: NetworkSettings,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct State {
    #[serde(rename = "Running", default)]
    pub(super) running: bool,
    #[serde(rename = "Paused", default)]
    pub(super) paused: bool,
    /// RFC 3339, in UTC, to the nanosecond.
    #[serde(rename = "StartedAt", default)]
    pub(super) started: String,
    #[serde(rename = "Health", default)]
    pub(super) health: Option<Health>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Health {
    /// `none`, `starting`, `healthy` or `unhealthy`.
    #[serde(rename = "Status", default)]
    pub(super) status: String,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct ContainerConfig {
    #[serde(rename = "Labels", default, deserialize_with = "or_default")]
    pub(super) labels: Labels,
    /// A name or a number; empty: SIGTERM.
    #[serde(rename = "StopSignal", default, deserialize_with = "or_default")]
    pub(super) stop_signal: String,
    /// By `80/tcp`.
    #[serde(rename = "ExposedPorts", default, deserialize_with = "or_default")]
    pub(super) exposed: BTreeMap<String, serde::de::IgnoredAny>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct HostConfig {
    /// `host`, `default`, `bridge`, the name of a network, ….
    #[serde(rename = "NetworkMode", default)]
    pub(super) network_mode: String,
    /// Billionths of a processor; 0: no limit.
    #[serde(rename = "NanoCpus", default)]
    pub(super) nano_cpus: i64,
    /// Microseconds in each period; 0: no limit.
    #[serde(rename = "CpuQuota", default)]
    pub(super) cpu_quota: i64,
    /// Microseconds; 0: 100,000.
    #[serde(rename = "CpuPeriod", default)]
    pub(super) cpu_period: i64,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct NetworkSettings {
    /// By name.
    #[serde(rename = "Networks", default, deserialize_with = "or_default")]
    pub(super) networks: BTreeMap<String, Network>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Network {
    /// Empty: it has none.
    #[serde(rename = "IPAddress", default)]
    pub(super) ip: String,
    /// Empty: it has none.
    #[serde(rename = "GlobalIPv6Address", default)]
    pub(super) ip6: String,
}

/// One of `GET /services`.
#[derive(Debug, Deserialize)]
pub(super) struct Service {
    #[serde(rename = "ID")]
    pub(super) id: String,
    #[serde(rename = "Spec")]
    pub(super) spec: ServiceSpec,
    #[serde(rename = "UpdateStatus", default, deserialize_with = "or_default")]
    pub(super) update: UpdateStatus,
}

#[derive(Debug, Deserialize)]
pub(super) struct ServiceSpec {
    #[serde(rename = "Labels", default, deserialize_with = "or_default")]
    pub(super) labels: Labels,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct UpdateStatus {
    /// `updating`, `completed`, `rollback_started`, ….
    #[serde(rename = "State", default)]
    pub(super) state: String,
}

/// One of `GET /tasks`.
#[derive(Debug, Deserialize)]
pub(super) struct Task {
    /// `running`, `shutdown`, `remove`, ….
    #[serde(rename = "DesiredState", default)]
    pub(super) desired: String,
    #[serde(rename = "Status", default, deserialize_with = "or_default")]
    pub(super) status: TaskStatus,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct TaskStatus {
    #[serde(rename = "ContainerStatus", default, deserialize_with = "or_default")]
    pub(super) container: ContainerStatus,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct ContainerStatus {
    /// Empty before there is one.
    #[serde(rename = "ContainerID", default)]
    pub(super) id: String,
}

/// One line of `GET /events`.
#[derive(Debug, Deserialize)]
pub(super) struct Event {
    /// `container`, `service`, ….
    #[serde(rename = "Type", default)]
    pub(super) kind: String,
    #[serde(rename = "Action", default)]
    pub(super) action: String,
    #[serde(rename = "Actor", default, deserialize_with = "or_default")]
    pub(super) actor: Actor,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Actor {
    #[serde(rename = "ID", default)]
    pub(super) id: String,
    /// A container's labels are among them.
    #[serde(rename = "Attributes", default, deserialize_with = "or_default")]
    pub(super) attributes: Labels,
}

/// `GET /containers/{id}/stats`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Stats {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) cpu_stats: CpuStats,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) memory_stats: MemoryStats,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct CpuStats {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) cpu_usage: CpuUsage,
    /// Nanoseconds of all processors together since the host started.
    #[serde(default)]
    pub(super) system_cpu_usage: u64,
    #[serde(default)]
    pub(super) online_cpus: u32,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct CpuUsage {
    /// Nanoseconds.
    #[serde(default)]
    pub(super) total_usage: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct MemoryStats {
    /// Bytes, the cache of files included.
    #[serde(default)]
    pub(super) usage: u64,
    /// Bytes; the host's memory where the container has no limit.
    #[serde(default)]
    pub(super) limit: u64,
    /// As the kernel's memory.stat.
    #[serde(default, deserialize_with = "or_default")]
    pub(super) stats: HashMap<String, u64>,
}

/// `null` stands for nothing.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
