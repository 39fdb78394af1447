//! How busy a host, or a cgroup of it, is: raw counters in, ratios out.
//!
//! Owns: reading `/proc`, `/sys/fs/cgroup` and `/sys/class/net` ([`Snapshot::read`]) and the arithmetic between two
//! snapshots ([`Utilization::between`], pure). Does not own: when to read, what to log, and the wire.
//!
//! A file that is missing or unreadable makes its dimension absent ([`None`]), never an error: kernels, containers and
//! sandboxes differ in what they show, and a report with some dimensions is worth more than none. The snapshot says
//! which ones are absent and why ([`Snapshot::gaps`]).

mod cgroup;
mod host;
mod override_file;
mod parse;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use cgroup::{Cgroup, NoSuchCgroup};
pub use override_file::{Override, OverrideError, read_override};

/// Most that a CPU ratio can say. A cgroup may burst over its quota and clocks differ a little; more than ten times
/// its capacity is a counter that jumped.
const CPU_RATIO_MAX: f64 = 10.0;

/// Where the kernel's files are; other places in tests and where a container mounts its host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// Stands for `/proc`.
    pub proc: PathBuf,
    /// Stands for `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
    /// Stands for `/sys/class/net`.
    pub net: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { proc: "/proc".into(), cgroup: "/sys/fs/cgroup".into(), net: "/sys/class/net".into() }
    }
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The whole host.
    Host,
    /// One cgroup (v1 or v2): a path inside the hierarchy (`/system.slice/postgresql.service`) or one in the file
    /// system (`/sys/fs/cgroup/system.slice/postgresql.service`). Network bandwidth is the host's all the same:
    /// cgroups do not count bytes.
    Cgroup(PathBuf),
}

/// A part of a snapshot that could not be read, and so a dimension that is absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The dimension, by its name in a report.
    pub dimension: &'static str,
    /// What is missing, for people.
    pub why: String,
}

/// Raw counters and gauges of one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// CPU time.
    pub cpu: Option<CpuCounters>,
    /// Memory, bytes.
    pub memory: Option<Fill>,
    /// Swap, bytes. A host without swap has a `total` of 0.
    pub swap: Option<Fill>,
    /// The page cache that the kernel could give back, bytes.
    pub os_cache: Option<Fill>,
    /// Bytes through each network interface that counts (see [`Interface`]).
    pub interfaces: Option<Vec<Interface>>,
    /// Pressure stall, ratio of the last ten seconds in which some task waited for a CPU.
    pub pressure_cpu: Option<f64>,
    /// The same, for memory.
    pub pressure_memory: Option<f64>,
    /// The same, for I/O.
    pub pressure_io: Option<f64>,
    /// What is absent, and why.
    pub gaps: Vec<Gap>,
}

/// CPU time that only grows, and what there is of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CpuCounters {
    /// Of a host, in clock ticks. The ratio needs no clock of ours: idle and busy ticks are its time.
    Host {
        /// Ticks in which a CPU worked, or the hypervisor worked for somebody else (steal): not to be had either way.
        busy: u64,
        /// All ticks.
        total: u64,
    },
    /// Of a cgroup.
    Cgroup {
        /// CPU time used.
        used: Duration,
        /// CPUs it may use: its quota, or the host's CPUs.
        capacity_cpus: f64,
    },
}

/// Something that has a size and is partly full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// Bytes in use.
    pub used: u64,
    /// Bytes there are.
    pub total: u64,
}

/// A network interface that counts: not the loopback, up, and a physical one where the host has any (a bridge and its
/// ports would count the same bytes again).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name, such as `eth0`.
    pub name: String,
    /// Bytes received since it came up.
    pub received: u64,
    /// Bytes sent since it came up.
    pub sent: u64,
    /// Its speed in bits a second, where it knows.
    pub speed_bps: Option<u64>,
}

impl Snapshot {
    /// Reads everything that `source` has. Never fails: what is not there is in [`Snapshot::gaps`].
    pub fn read(source: &MeterSource, roots: &Roots) -> Self {
        let mut snapshot = Self::default();
        match source {
            MeterSource::Host => host::read(&roots.proc, &mut snapshot),
            MeterSource::Cgroup(cgroup) => cgroup.read(&roots.proc, &mut snapshot),
        }
        host::read_interfaces(&roots.proc, &roots.net, &mut snapshot);
        snapshot
    }

    fn gap(&mut self, dimension: &'static str, why: impl Into<String>) {
        self.gaps.push(Gap { dimension, why: why.into() });
    }

    /// Keeps the value of a reading, or says why there is none.
    fn keep<T>(&mut self, dimension: &'static str, reading: Result<T, String>) -> Option<T> {
        reading.map_err(|why| self.gap(dimension, why)).ok()
    }
}

/// A [`Source`] that was looked up and is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeterSource {
    /// The whole host.
    Host,
    /// A cgroup that exists.
    Cgroup(Cgroup),
}

impl MeterSource {
    /// Looks `source` up.
    ///
    /// # Errors
    /// When there is no such cgroup.
    pub fn find(source: &Source, roots: &Roots) -> Result<Self, NoSuchCgroup> {
        match source {
            Source::Host => Ok(Self::Host),
            Source::Cgroup(path) => Cgroup::find(path, &roots.cgroup).map(Self::Cgroup),
        }
    }
}

/// How busy, by dimension. Ratios are finite and from 0 to 1 (`cpu` may exceed 1); absent is not known.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Utilization {
    /// CPU, a ratio of the capacity (all CPUs of the host, or the quota of the cgroup). 0 or more; may exceed 1.
    pub cpu: Option<f64>,
    /// Memory that is not to be had without pushing something out.
    pub memory: Option<f64>,
    /// Swap in use; 0 where there is no swap.
    pub swap: Option<f64>,
    /// Page cache, as a ratio of the memory.
    pub os_cache: Option<f64>,
    /// The busier direction of the busiest interface, as a ratio of the capacity.
    pub bandwidth: Option<f64>,
    /// The same in bytes a second, whether or not the capacity is known.
    pub bandwidth_bytes_per_second: Option<f64>,
    /// Some task waited for a CPU.
    pub pressure_cpu: Option<f64>,
    /// Some task waited for memory.
    pub pressure_memory: Option<f64>,
    /// Some task waited for I/O.
    pub pressure_io: Option<f64>,
}

impl Utilization {
    /// What happened between two snapshots that were taken `elapsed` apart. Gauges are taken from `after`.
    ///
    /// `bandwidth_capacity_bps` is the network capacity in bits a second where it was stated; else the fastest
    /// interface's speed is. Counters that went backwards (they do: a CPU went offline, an interface came up anew)
    /// count as not having moved. With no time between the snapshots there are no rates.
    pub fn between(
        before: &Snapshot,
        after: &Snapshot,
        elapsed: Duration,
        bandwidth_capacity_bps: Option<u64>,
    ) -> Self {
        let rate = busiest_bytes_per_second(before, after, elapsed);
        let capacity = bandwidth_capacity_bps.or_else(|| fastest_bps(after));
        Self {
            cpu: cpu_ratio(before.cpu, after.cpu, elapsed),
            memory: after.memory.map(Fill::ratio),
            swap: after.swap.map(Fill::ratio),
            os_cache: after.os_cache.map(Fill::ratio),
            bandwidth: rate.zip(capacity).and_then(|(rate, bps)| ratio(rate * 8.0, bps as f64)).map(to_unit),
            bandwidth_bytes_per_second: rate,
            pressure_cpu: after.pressure_cpu.map(to_unit),
            pressure_memory: after.pressure_memory.map(to_unit),
            pressure_io: after.pressure_io.map(to_unit),
        }
    }
}

impl Fill {
    /// The used part, 0 to 1; 0 of nothing.
    fn ratio(self) -> f64 {
        to_unit(ratio(self.used as f64, self.total as f64).unwrap_or(0.0))
    }
}

/// The speed of the fastest interface that knows its own, in bits a second.
pub(crate) fn fastest_bps(snapshot: &Snapshot) -> Option<u64> {
    snapshot.interfaces.as_ref()?.iter().filter_map(|interface| interface.speed_bps).max()
}

fn cpu_ratio(before: Option<CpuCounters>, after: Option<CpuCounters>, elapsed: Duration) -> Option<f64> {
    let cpu = match (before?, after?) {
        (CpuCounters::Host { busy, total }, CpuCounters::Host { busy: busy_after, total: total_after }) => {
            ratio(busy_after.saturating_sub(busy) as f64, total_after.saturating_sub(total) as f64)?.min(1.0)
        }
        (CpuCounters::Cgroup { used, .. }, CpuCounters::Cgroup { used: used_after, capacity_cpus }) => {
            let used = used_after.saturating_sub(used).as_secs_f64();
            ratio(used, elapsed.as_secs_f64() * capacity_cpus)?
        }
        _ => return None,
    };
    Some(cpu.clamp(0.0, CPU_RATIO_MAX))
}

fn busiest_bytes_per_second(before: &Snapshot, after: &Snapshot, elapsed: Duration) -> Option<f64> {
    let before = before.interfaces.as_ref()?;
    let mut busiest = 0;
    for interface in after.interfaces.as_ref()? {
        // One that just appeared has no rate yet.
        if let Some(was) = before.iter().find(|was| was.name == interface.name) {
            let received = interface.received.saturating_sub(was.received);
            let sent = interface.sent.saturating_sub(was.sent);
            busiest = busiest.max(received).max(sent);
        }
    }
    ratio(busiest as f64, elapsed.as_secs_f64())
}

/// `None` where it is no finite number of 0 or more.
fn ratio(part: f64, whole: f64) -> Option<f64> {
    let ratio = part / whole;
    (whole > 0.0 && ratio.is_finite() && ratio >= 0.0).then_some(ratio)
}

fn to_unit(ratio: f64) -> f64 {
    if ratio.is_finite() { ratio.clamp(0.0, 1.0) } else { 0.0 }
}

/// Reads a file as text, and says which one where it cannot.
fn read_text(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests;
