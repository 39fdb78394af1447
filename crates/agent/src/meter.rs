//! Measures at each report, and says once what cannot be measured.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use api::orca::OrcaLoadReport;
use tracing::info;

use crate::config::AgentConfig;
use crate::utilization::{MeterSource, NoSuchCgroup, Override, Roots, Snapshot, Utilization, fastest_bps};

/// Least time between two snapshots that rates are taken from: the kernel counts CPU time in ticks of 10 ms at most,
/// so this is good to a tenth.
pub(crate) const WINDOW_MIN: Duration = Duration::from_millis(100);

/// Reads the utilization of one source over time.
#[derive(Debug)]
pub(crate) struct Meter {
    source: MeterSource,
    roots: Roots,
    bandwidth_capacity_bps: Option<u64>,
    bandwidth_cost: Option<f64>,
    before: Snapshot,
    before_at: Instant,
    measured: Utilization,
    /// Whether it says what is absent.
    speaks: bool,
    /// Dimensions whose absence was said.
    said_absent: HashSet<&'static str>,
}

impl Meter {
    /// Takes the first snapshot. One of several meters of one agent `speaks`: it says what is absent, for all.
    pub(crate) fn new(config: &AgentConfig, now: Instant, speaks: bool) -> Result<Self, NoSuchCgroup> {
        let source = MeterSource::find(&config.source, &config.roots)?;
        let before = Snapshot::read(&source, &config.roots);
        let mut meter = Self {
            source,
            roots: config.roots.clone(),
            bandwidth_capacity_bps: config.bandwidth_capacity_bps,
            bandwidth_cost: config.bandwidth_cost,
            before,
            before_at: now,
            measured: Utilization::default(),
            speaks,
            said_absent: HashSet::new(),
        };
        meter.say_what_is_absent();
        Ok(meter)
    }

    /// The utilization since the last call, as a report, with `over` above what was measured. Called again within [`WINDOW_MIN`] it repeats the last one.
    pub(crate) fn report(&mut self, now: Instant, over: &Override) -> OrcaLoadReport {
        let elapsed = now.saturating_duration_since(self.before_at);
        if elapsed >= WINDOW_MIN {
            let after = Snapshot::read(&self.source, &self.roots);
            self.measured = Utilization::between(&self.before, &after, elapsed, self.bandwidth_capacity_bps);
            self.before = after;
            self.before_at = now;
            self.say_what_is_absent();
        }
        to_orca(&self.measured, over, self.bandwidth_cost)
    }

    fn say_what_is_absent(&mut self) {
        if !self.speaks {
            return;
        }
        for gap in &self.before.gaps {
            if self.said_absent.insert(gap.dimension) {
                info!(dimension = gap.dimension, why = gap.why, "not measured: reports go without it");
            }
        }
        let measures_traffic = self.before.interfaces.is_some();
        let capacity = self.bandwidth_capacity_bps.or_else(|| fastest_bps(&self.before));
        if measures_traffic && capacity.is_none() && self.said_absent.insert("bandwidth") {
            let why = "no interface knows its speed: state the capacity to have it reported";
            info!(dimension = "bandwidth", why, "not measured: reports go without it");
        }
    }
}

/// The report's form of what was measured and what stands above it. Keys as documented in
/// `proto/xds/data/orca/v3/orca_load_report.proto`.
fn to_orca(measured: &Utilization, over: &Override, bandwidth_cost: Option<f64>) -> OrcaLoadReport {
    let mut report = OrcaLoadReport {
        cpu_utilization: over.cpu.or(measured.cpu).unwrap_or_default(),
        mem_utilization: over.memory.or(measured.memory).unwrap_or_default(),
        application_utilization: over.application.unwrap_or_default(),
        rps_fractional: over.operations_per_second.unwrap_or_default(),
        eps: over.errors_per_second.unwrap_or_default(),
        ..OrcaLoadReport::default()
    };
    let dimensions = [
        ("swap", measured.swap),
        ("os_cache", measured.os_cache),
        ("bandwidth", measured.bandwidth),
        ("pressure_cpu", measured.pressure_cpu),
        ("pressure_memory", measured.pressure_memory),
        ("pressure_io", measured.pressure_io),
    ];
    for (key, value) in dimensions {
        report.utilization.extend(value.map(|value| (key.to_owned(), value)));
    }
    report.utilization.extend(over.utilization.iter().map(|(key, value)| (key.clone(), *value)));
    let metrics = [
        ("bandwidth_bytes_per_second", measured.bandwidth_bytes_per_second),
        ("bandwidth_cost", bandwidth_cost),
    ];
    for (key, value) in metrics {
        report.named_metrics.extend(value.map(|value| (key.to_owned(), value)));
    }
    report.named_metrics.extend(over.named_metrics.iter().map(|(key, value)| (key.clone(), *value)));
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_file_names_stands_above_what_was_measured() {
        let measured = Utilization {
            cpu: Some(0.1),
            memory: Some(0.2),
            swap: Some(0.3),
            pressure_io: Some(0.4),
            bandwidth_bytes_per_second: Some(5.0),
            ..Utilization::default()
        };
        let over =
            br#"{"cpu": 0.95, "utilization": {"swap": 0.5, "mine": 0.6}, "operations_per_second": 7.5}"#;
        let report = to_orca(&measured, &Override::parse(over).unwrap(), Some(0.09));
        assert_eq!(report.cpu_utilization, 0.95);
        assert_eq!(report.mem_utilization, 0.2);
        assert_eq!(report.rps_fractional, 7.5);
        let utilization = [("swap", 0.5), ("mine", 0.6), ("pressure_io", 0.4)];
        assert_eq!(report.utilization, utilization.map(|(k, v)| (k.to_owned(), v)).into());
        let metrics = [("bandwidth_bytes_per_second", 5.0), ("bandwidth_cost", 0.09)];
        assert_eq!(report.named_metrics, metrics.map(|(k, v)| (k.to_owned(), v)).into());
    }
}
