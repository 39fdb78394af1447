//! From what the engine measured of a container to utilization.

use registry::RawUtilization;

use super::wire::{HostConfig, Stats};

/// What the kernel takes for `CpuPeriod` 0, in microseconds.
const PERIOD_DEFAULT: f64 = 100_000.0;

/// Processors that a container may use: its limit, or all of the host.
pub(super) fn processors(host: &HostConfig, of_host: u32) -> f64 {
    let all = f64::from(of_host.max(1));
    let limit = if host.nano_cpus > 0 {
        host.nano_cpus as f64 * 1e-9
    } else if host.cpu_quota > 0 {
        let period = if host.cpu_period > 0 { host.cpu_period as f64 } else { PERIOD_DEFAULT };
        host.cpu_quota as f64 / period
    } else {
        all
    };
    limit.min(all)
}

/// Utilization between two samples; `None`: there is nothing to tell from yet.
///
/// Processor time is divided by the host's time in the same samples, as `docker stats` does, and so needs no clock of
/// ours. Memory is without the cache of files that the kernel can take back at once, as `docker stats` shows it.
pub(super) fn utilization(before: &Stats, now: &Stats, processors: f64) -> Option<RawUtilization> {
    let used = now.cpu_stats.cpu_usage.total_usage.checked_sub(before.cpu_stats.cpu_usage.total_usage)?;
    let of_host = now.cpu_stats.system_cpu_usage.checked_sub(before.cpu_stats.system_cpu_usage)?;
    if of_host == 0 {
        return None;
    }
    let busy = used as f64 / of_host as f64 * f64::from(now.cpu_stats.online_cpus.max(1));
    Some(RawUtilization { cpu: busy / processors, memory: memory(now), ..RawUtilization::default() })
}

fn memory(stats: &Stats) -> f64 {
    let memory = &stats.memory_stats;
    if memory.limit == 0 {
        return 0.0;
    }
    // By control groups of version 1 and 2.
    let cache = ["total_inactive_file", "inactive_file"].iter().find_map(|key| memory.stats.get(*key));
    let used = memory.usage.saturating_sub(cache.copied().unwrap_or_default());
    (used as f64 / memory.limit as f64).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(used: u64, of_host: u64, memory: &str) -> Stats {
        let text = format!(
            r#"{{"cpu_stats":{{"cpu_usage":{{"total_usage":{used},"percpu_usage":[1,2]}},"system_cpu_usage":{of_host},
               "online_cpus":4}},"memory_stats":{memory},"networks":{{}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn processor_time_is_of_what_the_container_may_use() {
        let (before, now) = (stats(100, 10_000, "{}"), stats(1_100, 18_000, "{}"));
        // In the host's 8,000 ns over 4 processors, that is 2,000 ns, it used 1,000 ns: half a processor.
        let cpu = |processors| utilization(&before, &now, processors).unwrap().cpu;
        assert!((cpu(4.0) - 0.125).abs() < 1e-9);
        assert!((cpu(0.5) - 1.0).abs() < 1e-9);
        assert!(utilization(&now, &before, 4.0).is_none(), "the container was started again");
        assert!(utilization(&now, &now, 4.0).is_none(), "no time has passed");
    }

    #[test]
    fn memory_is_without_what_the_kernel_can_take_back() {
        let of = |memory: &str| utilization(&stats(0, 0, "{}"), &stats(1, 4, memory), 1.0).unwrap().memory;
        assert_eq!(
            of(r#"{"usage":600,"limit":1000,"stats":{"total_inactive_file":100,"inactive_file":7}}"#),
            0.5
        );
        assert_eq!(of(r#"{"usage":600,"limit":1000,"stats":{"inactive_file":350}}"#), 0.25);
        assert_eq!(of(r#"{"usage":5,"limit":0}"#), 0.0);
        assert_eq!(of(r#"{"usage":50,"limit":10,"stats":null}"#), 1.0);
    }

    #[test]
    fn a_limit_is_a_limit_however_it_was_given() {
        let host = |nano_cpus, cpu_quota, cpu_period| HostConfig {
            network_mode: String::new(),
            nano_cpus,
            cpu_quota,
            cpu_period,
        };
        assert_eq!(processors(&host(1_500_000_000, 0, 0), 4), 1.5);
        assert_eq!(processors(&host(0, 50_000, 0), 4), 0.5);
        assert_eq!(processors(&host(0, 50_000, 25_000), 4), 2.0);
        assert_eq!(processors(&host(0, -1, 0), 4), 4.0);
        assert_eq!(processors(&host(9_000_000_000, 0, 0), 4), 4.0, "more than there are");
        assert_eq!(processors(&host(0, 0, 0), 0), 1.0);
    }
}
