//! One cgroup, v2 or v1 or both at once (systemd's hybrid layout).
//!
//! ```text
//! /sys/fs/cgroup/PATH                v2, alone ("unified")
//! /sys/fs/cgroup/unified/PATH        v2 beside v1 ("hybrid")
//! /sys/fs/cgroup/CONTROLLER/PATH     v1: cpu, cpuacct, memory (or joined: cpu,cpuacct)
//! ```
//!
//! Every value is looked for in v2 first. Limits hold for all that is below them, so the least one on the way up to
//! the root counts.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::parse::{cpu_max, keyed, limit_bytes, quota_cpus};
use super::{CpuCounters, Fill, Snapshot, host, read_text};

/// The cgroup is in no hierarchy that is mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no cgroup {} under {}: give a path as in /proc/PID/cgroup, such as \
     /system.slice/postgresql.service",
    path.display(),
    root.display()
)]
pub struct NoSuchCgroup {
    /// The path that was asked for.
    pub path: PathBuf,
    /// Where it was looked for.
    pub root: PathBuf,
}

/// The folders of a cgroup that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    v2: Option<Place>,
    v1_cpu: Option<Place>,
    v1_cpuacct: Option<Place>,
    v1_memory: Option<Place>,
}

/// A cgroup's folder in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    mount: PathBuf,
    folder: PathBuf,
}

impl Cgroup {
    /// Looks for `path` in all hierarchies under `root` (`/sys/fs/cgroup`). It may be a cgroup's path or the path of
    /// one of its folders.
    ///
    /// # Errors
    /// When it is in none of them.
    pub fn find(path: &Path, root: &Path) -> Result<Self, NoSuchCgroup> {
        let unified = root.join("cgroup.controllers").exists();
        let inner = inner_path(path, root, unified);
        let place = |mounts: &[&str]| {
            mounts.iter().map(|mount| root.join(mount)).find_map(|mount| {
                let folder = mount.join(&inner);
                // Every cgroup of either version has this file: an ordinary folder does not.
                folder.join("cgroup.procs").exists().then_some(Place { mount, folder })
            })
        };
        let cgroup = Self {
            v2: place(if unified { &[""] } else { &["unified"] }),
            v1_cpu: place(&["cpu", "cpu,cpuacct", "cpuacct,cpu"]),
            v1_cpuacct: place(&["cpuacct", "cpu,cpuacct", "cpuacct,cpu"]),
            v1_memory: place(&["memory"]),
        };
        let found = [&cgroup.v2, &cgroup.v1_cpu, &cgroup.v1_cpuacct, &cgroup.v1_memory];
        if found.iter().all(|place| place.is_none()) {
            return Err(NoSuchCgroup { path: path.into(), root: root.into() });
        }
        Ok(cgroup)
    }

    pub(super) fn read(&self, proc: &Path, snapshot: &mut Snapshot) {
        snapshot.cpu = snapshot.keep("cpu", self.cpu(proc));
        match host::memory_and_swap_total(proc) {
            Ok((memory_total, swap_total)) => {
                snapshot.memory = snapshot.keep("memory", self.memory(memory_total));
                snapshot.swap = snapshot.keep("swap", self.swap(swap_total));
                snapshot.os_cache = snapshot.keep("os_cache", self.os_cache(memory_total));
            }
            Err(why) => {
                for dimension in ["memory", "swap", "os_cache"] {
                    snapshot.gap(dimension, &why);
                }
            }
        }
        match &self.v2 {
            Some(v2) => {
                host::read_pressure(&v2.folder, ["cpu.pressure", "memory.pressure", "io.pressure"], snapshot)
            }
            None => {
                for dimension in ["pressure_cpu", "pressure_memory", "pressure_io"] {
                    snapshot.gap(dimension, "only a cgroup of version 2 has pressure files");
                }
            }
        }
    }

    fn cpu(&self, proc: &Path) -> Result<CpuCounters, String> {
        let used = self.cpu_used()?;
        let online = host::cpus_online(proc)?;
        let v2 = self.v2.as_ref().and_then(|place| place.least(cpu_max_of));
        let v1 = self.v1_cpu.as_ref().and_then(|place| place.least(cfs_quota_of));
        let capacity_cpus = v2.into_iter().chain(v1).fold(online, f64::min);
        Ok(CpuCounters::Cgroup { used, capacity_cpus })
    }

    fn cpu_used(&self) -> Result<Duration, String> {
        // v1 first: in the hybrid layout its group is the one that the limits are on.
        if let Some(place) = &self.v1_cpuacct {
            let nanos = place.number("cpuacct.usage")?;
            return Ok(Duration::from_nanos(nanos));
        }
        let place = self.v2.as_ref().ok_or("neither cpu.stat (v2) nor cpuacct.usage (v1)")?;
        place.keyed("cpu.stat", &["usage_usec"]).map(Duration::from_micros)
    }

    fn memory(&self, host_total: u64) -> Result<Fill, String> {
        let (place, files) = self.memory_place()?;
        let usage = place.number(files.usage)?;
        let inactive = place.keyed("memory.stat", files.inactive_file)?;
        let limit = place.least(|folder| limit_of(folder, files.limit));
        let total = limit.map_or(host_total, |limit| limit.min(host_total));
        Ok(Fill { used: usage.saturating_sub(inactive), total })
    }

    fn swap(&self, host_total: u64) -> Result<Fill, String> {
        if host_total == 0 {
            return Ok(Fill { used: 0, total: 0 });
        }
        let (place, files) = self.memory_place()?;
        if files.v2 {
            let used = place.number("memory.swap.current")?;
            let limit = place.least(|folder| limit_of(folder, "memory.swap.max"));
            return Ok(Fill { used, total: limit.map_or(host_total, |limit| limit.min(host_total)) });
        }
        let used = place.keyed("memory.stat", &["total_swap", "swap"])?;
        // v1 limits memory and swap together; what is beyond the memory's limit can only be swap.
        let both = place.least(|folder| limit_of(folder, "memory.memsw.limit_in_bytes"));
        let memory = place.least(|folder| limit_of(folder, files.limit));
        let limit = both.zip(memory).map(|(both, memory)| both.saturating_sub(memory));
        Ok(Fill { used, total: limit.map_or(host_total, |limit| limit.min(host_total)) })
    }

    fn os_cache(&self, host_total: u64) -> Result<Fill, String> {
        let (place, files) = self.memory_place()?;
        let cached = place.keyed("memory.stat", files.cache)?;
        let shared = place.keyed("memory.stat", files.shared).unwrap_or(0);
        let limit = place.least(|folder| limit_of(folder, files.limit));
        let total = limit.map_or(host_total, |limit| limit.min(host_total));
        Ok(Fill { used: cached.saturating_sub(shared), total })
    }

    /// Where this cgroup's memory is accounted: v2 unless its memory controller is with v1.
    fn memory_place(&self) -> Result<(&Place, &'static MemoryFiles), String> {
        let v2 = self.v2.as_ref().filter(|place| place.folder.join(MEMORY_V2.usage).exists());
        match (v2, &self.v1_memory) {
            (Some(place), _) => Ok((place, &MEMORY_V2)),
            (None, Some(place)) => Ok((place, &MEMORY_V1)),
            (None, None) => Err("the memory controller is not enabled for the cgroup".into()),
        }
    }
}

/// The names that the two versions have for the same things; of several keys the first that is there counts.
struct MemoryFiles {
    v2: bool,
    usage: &'static str,
    limit: &'static str,
    inactive_file: &'static [&'static str],
    cache: &'static [&'static str],
    shared: &'static [&'static str],
}

const MEMORY_V2: MemoryFiles = MemoryFiles {
    v2: true,
    usage: "memory.current",
    limit: "memory.max",
    inactive_file: &["inactive_file"],
    cache: &["file"],
    shared: &["shmem"],
};

/// `total_` counts the groups below as well, as `usage_in_bytes` does; it is absent without `use_hierarchy`.
const MEMORY_V1: MemoryFiles = MemoryFiles {
    v2: false,
    usage: "memory.usage_in_bytes",
    limit: "memory.limit_in_bytes",
    inactive_file: &["total_inactive_file", "inactive_file"],
    cache: &["total_cache", "cache"],
    shared: &["total_shmem", "shmem"],
};

impl Place {
    fn number(&self, file: &str) -> Result<u64, String> {
        let path = self.folder.join(file);
        let unlike = |error| format!("{}: {error}", path.display());
        read_text(&path)?.trim().parse().map_err(unlike)
    }

    fn keyed(&self, file: &str, keys: &[&str]) -> Result<u64, String> {
        let path = self.folder.join(file);
        let text = read_text(&path)?;
        let found = keys.iter().find_map(|key| keyed(&text, key));
        found.ok_or_else(|| format!("{}: has no {}", path.display(), keys[0]))
    }

    /// The least limit from this group up to the root of its hierarchy.
    fn least<T: PartialOrd>(&self, limit: impl Fn(&Path) -> Option<T>) -> Option<T> {
        let up = self.folder.ancestors().take_while(|folder| folder.starts_with(&self.mount));
        up.filter_map(limit).reduce(|least, limit| if limit < least { limit } else { least })
    }
}

/// The cgroup's path inside its hierarchy, relative: without `root` and, below it, the mount of a hierarchy. `..` and
/// `.` are dropped: a cgroup's path has none.
fn inner_path(path: &Path, root: &Path, unified: bool) -> PathBuf {
    let names = |path: &Path| -> Vec<PathBuf> {
        path.components()
            .filter(|c| matches!(c, Component::Normal(_)))
            .map(|c| c.as_os_str().into())
            .collect()
    };
    match path.strip_prefix(root) {
        Ok(below) if unified => names(below).iter().collect(),
        Ok(below) => names(below).iter().skip(1).collect(),
        Err(_) => names(path).iter().collect(),
    }
}

fn limit_of(folder: &Path, file: &str) -> Option<u64> {
    limit_bytes(&std::fs::read_to_string(folder.join(file)).ok()?)
}

fn cpu_max_of(folder: &Path) -> Option<f64> {
    cpu_max(&std::fs::read_to_string(folder.join("cpu.max")).ok()?)
}

fn cfs_quota_of(folder: &Path) -> Option<f64> {
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).ok()?.trim().parse::<i64>().ok();
    let quota = u64::try_from(read("cpu.cfs_quota_us")?).ok()?;
    quota_cpus(quota, u64::try_from(read("cpu.cfs_period_us")?).ok()?)
}
