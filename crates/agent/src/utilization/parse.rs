//! The kernel's few text formats. Missing and malformed are one: the value is not known.

/// A value of a `key value` or `key: value kB` file (`/proc/meminfo`, `cpu.stat`, `memory.stat`), in the file's unit.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let name = words.next().map(|word| word.trim_end_matches(':'));
        if name == Some(key) {
            return words.next()?.parse().ok();
        }
    }
    None
}

/// A value of `/proc/meminfo`, in bytes (the file says kB and means KiB).
pub(super) fn meminfo_bytes(text: &str, key: &str) -> Option<u64> {
    keyed(text, key).map(|kib| kib.saturating_mul(1024))
}

/// The `some avg10` of a pressure file, as a ratio.
pub(super) fn pressure_some(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let avg10 = some.split_ascii_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
    avg10.parse::<f64>().ok().filter(|percent| percent.is_finite()).map(|percent| percent / 100.0)
}

/// A cgroup's limit in bytes: `max`, and v1's largest page-aligned number, are no limit.
pub(super) fn limit_bytes(text: &str) -> Option<u64> {
    let bytes: u64 = text.trim().parse().ok()?;
    // v1 writes PAGE_COUNTER_MAX, `i64::MAX` rounded down to a page; a page is 64 KiB at most.
    (bytes < i64::MAX as u64 - 65_536).then_some(bytes)
}

/// CPUs that `cpu.max` (`quota period` in microseconds, or `max period`) allows; `None`: no limit.
pub(super) fn cpu_max(text: &str) -> Option<f64> {
    let mut words = text.split_ascii_whitespace();
    let quota: u64 = words.next()?.parse().ok()?;
    let period: u64 = words.next()?.parse().ok()?;
    quota_cpus(quota, period)
}

/// CPUs of a quota in a period, both in microseconds.
pub(super) fn quota_cpus(quota: u64, period: u64) -> Option<f64> {
    (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_files() {
        let text =
            "MemTotal:       24684096 kB\nHugePages_Total:       0\nusage_usec 99877546\nbroken x\nlonely\n";
        assert_eq!(meminfo_bytes(text, "MemTotal"), Some(24_684_096 * 1024));
        assert_eq!(keyed(text, "HugePages_Total"), Some(0));
        assert_eq!(keyed(text, "usage_usec"), Some(99_877_546));
        for missing in ["Mem", "broken", "lonely", "absent"] {
            assert_eq!(keyed(text, missing), None, "{missing}");
        }
    }

    #[test]
    fn pressure_files() {
        assert_eq!(pressure_some("some avg10=12.50 avg60=0.70 avg300=0.33 total=4207545\n"), Some(0.125));
        assert_eq!(pressure_some("full avg10=1.00 avg60=0.70 avg300=0.33 total=1\n"), None);
        assert_eq!(pressure_some("some avg10=NaN"), None);
        assert_eq!(pressure_some("some avg60=1"), None);
    }

    #[test]
    fn limits() {
        assert_eq!(limit_bytes("536870912\n"), Some(536_870_912));
        assert_eq!(limit_bytes("max\n"), None);
        assert_eq!(limit_bytes("9223372036854771712\n"), None);
        assert_eq!(cpu_max("150000 100000\n"), Some(1.5));
        assert_eq!(cpu_max("max 100000\n"), None);
        assert_eq!(cpu_max("100000 0\n"), None);
        assert_eq!(cpu_max(""), None);
    }
}
