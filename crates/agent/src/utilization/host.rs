//! A whole host, from `/proc` and `/sys/class/net`.

use std::path::Path;

use procfs::net::InterfaceDeviceStatus;
use procfs::{CpuTime, FromBufRead, FromBufReadSI, KernelStats};

use super::parse::{meminfo_bytes, pressure_some};
use super::{CpuCounters, Fill, Interface, Snapshot, read_text};

pub(super) fn read(proc: &Path, snapshot: &mut Snapshot) {
    let cpu = read_stat(proc).map(|stat| cpu_counters(&stat.total));
    snapshot.cpu = snapshot.keep("cpu", cpu);
    match read_text(&proc.join("meminfo")) {
        Ok(meminfo) => {
            snapshot.memory = snapshot.keep("memory", memory(&meminfo));
            snapshot.swap = snapshot.keep("swap", swap(&meminfo));
            snapshot.os_cache = snapshot.keep("os_cache", os_cache(&meminfo));
        }
        Err(why) => {
            for dimension in ["memory", "swap", "os_cache"] {
                snapshot.gap(dimension, &why);
            }
        }
    }
    read_pressure(&proc.join("pressure"), ["cpu", "memory", "io"], snapshot);
}

/// CPUs that are online; what a cgroup without a quota may use.
pub(super) fn cpus_online(proc: &Path) -> Result<f64, String> {
    match read_stat(proc)?.cpu_time.len() {
        0 => Err(format!("{}: names no cpu", proc.join("stat").display())),
        cpus => Ok(cpus as f64),
    }
}

/// Total memory and total swap, bytes.
pub(super) fn memory_and_swap_total(proc: &Path) -> Result<(u64, u64), String> {
    let path = proc.join("meminfo");
    let meminfo = read_text(&path)?;
    let missing = || format!("{}: no MemTotal", path.display());
    let total = meminfo_bytes(&meminfo, "MemTotal").ok_or_else(missing)?;
    Ok((total, meminfo_bytes(&meminfo, "SwapTotal").unwrap_or(0)))
}

/// Reads the pressure of cpu, memory and io from three files of `folder`. A kernel without PSI, or one that has it
/// switched off, has no such files, or refuses to read them.
pub(super) fn read_pressure(folder: &Path, files: [&str; 3], snapshot: &mut Snapshot) {
    let read = |file: &str| {
        let path = folder.join(file);
        let unlike = || format!("{}: has no `some avg10`", path.display());
        read_text(&path).and_then(|text| pressure_some(&text).ok_or_else(unlike))
    };
    snapshot.pressure_cpu = snapshot.keep("pressure_cpu", read(files[0]));
    snapshot.pressure_memory = snapshot.keep("pressure_memory", read(files[1]));
    snapshot.pressure_io = snapshot.keep("pressure_io", read(files[2]));
}

/// Reads the interfaces that count; see [`Interface`].
pub(super) fn read_interfaces(proc: &Path, net: &Path, snapshot: &mut Snapshot) {
    let path = proc.join("net/dev");
    let status = read_text(&path).and_then(|text| {
        InterfaceDeviceStatus::from_buf_read(text.as_bytes())
            .map_err(|error| format!("{}: {error}", path.display()))
    });
    let Some(status) = snapshot.keep("bandwidth", status) else { return };
    let mut all: Vec<(bool, Interface)> = Vec::new();
    for (name, counters) in status.0 {
        let folder = net.join(&name);
        if name == "lo" || !is_up(&folder) {
            continue;
        }
        let physical = folder.join("device").exists();
        let speed_bps = speed_bps(&folder);
        let interface =
            Interface { name, received: counters.recv_bytes, sent: counters.sent_bytes, speed_bps };
        all.push((physical, interface));
    }
    let any_physical = all.iter().any(|(physical, _)| *physical);
    let mut counting: Vec<Interface> =
        all.into_iter().filter(|(physical, _)| *physical || !any_physical).map(|(_, i)| i).collect();
    counting.sort_by(|a, b| a.name.cmp(&b.name));
    snapshot.interfaces = Some(counting);
}

fn read_stat(proc: &Path) -> Result<KernelStats, String> {
    let path = proc.join("stat");
    let text = read_text(&path)?;
    KernelStats::from_buf_read(text.as_bytes(), procfs::current_system_info())
        .map_err(|error| format!("{}: {error}", path.display()))
}

/// `guest` and `guest_nice` are part of `user` and `nice`. Waiting for I/O is not work: the CPU would take more.
fn cpu_counters(time: &CpuTime) -> CpuCounters {
    let sum = |ticks: &[Option<u64>]| ticks.iter().flatten().fold(0_u64, |sum, n| sum.saturating_add(*n));
    let idle = sum(&[Some(time.idle), time.iowait]);
    let busy =
        sum(&[Some(time.user), Some(time.nice), Some(time.system), time.irq, time.softirq, time.steal]);
    CpuCounters::Host { busy, total: busy.saturating_add(idle) }
}

fn memory(meminfo: &str) -> Result<Fill, String> {
    let total = need(meminfo, "MemTotal")?;
    // Kernels before 3.14, and some sandboxes, give no estimate of what is available: free plus caches is near it.
    let estimate = || {
        let cached = meminfo_bytes(meminfo, "Cached").unwrap_or(0);
        need(meminfo, "MemFree").map(|free| free.saturating_add(cached))
    };
    let available = meminfo_bytes(meminfo, "MemAvailable").map_or_else(estimate, Ok)?;
    Ok(Fill { used: total.saturating_sub(available), total })
}

fn swap(meminfo: &str) -> Result<Fill, String> {
    let total = need(meminfo, "SwapTotal")?;
    Ok(Fill { used: total.saturating_sub(need(meminfo, "SwapFree")?), total })
}

fn os_cache(meminfo: &str) -> Result<Fill, String> {
    let total = need(meminfo, "MemTotal")?;
    let cached = need(meminfo, "Cached")?.saturating_add(meminfo_bytes(meminfo, "Buffers").unwrap_or(0));
    // Shared memory lives in the page cache and cannot be given back.
    let shared = meminfo_bytes(meminfo, "Shmem").unwrap_or(0);
    Ok(Fill { used: cached.saturating_sub(shared), total })
}

fn need(meminfo: &str, key: &str) -> Result<u64, String> {
    meminfo_bytes(meminfo, key).ok_or_else(|| format!("meminfo: has no {key}"))
}

/// Up, or `unknown`: many virtual interfaces say so while they work. Without its folder (a sandbox shows no `/sys`)
/// the interface is listed in `/proc/net/dev` all the same, and counts.
fn is_up(folder: &Path) -> bool {
    match std::fs::read_to_string(folder.join("operstate")) {
        Ok(state) => matches!(state.trim(), "up" | "unknown"),
        Err(_) => true,
    }
}

/// Mbit/s in the file; -1, or an error on reading, where the interface does not know.
fn speed_bps(folder: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(folder.join("speed")).ok()?;
    let mbit: u64 = text.trim().parse().ok()?;
    (mbit > 0 && mbit < u64::from(u32::MAX)).then(|| mbit * 1_000_000)
}
