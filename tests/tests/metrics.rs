//! `/metrics` as Prometheus' own linter sees it, and the names that tools may rely on.

use std::io::ErrorKind;
use std::process::Command;
use std::time::Duration;

use e2e::{BalancerConfig, Lab, PATIENCE, PgBench, Process};

/// Families of the design, and labels of each.
const FAMILIES: &[(&str, &str, &[&str])] = &[
    ("trimtab_flows_opened_total", "counter", &["listener", "protocol"]),
    ("trimtab_resource_flows_opened_total", "counter", &["pool", "resource"]),
    ("trimtab_resource_flows_open", "gauge", &["pool", "resource"]),
    ("trimtab_flows_closed_total", "counter", &["listener", "reason"]),
    ("trimtab_bytes_total", "counter", &["listener", "direction"]),
    ("trimtab_connect_seconds", "histogram", &[]),
    ("trimtab_flow_seconds", "histogram", &[]),
    ("trimtab_resources", "gauge", &["pool", "state"]),
    ("trimtab_resource_weight", "gauge", &["pool", "resource"]),
    ("trimtab_resource_utilization_ratio", "gauge", &["pool", "resource", "dimension"]),
    ("trimtab_resource_report_age_seconds", "gauge", &["pool", "resource"]),
    ("trimtab_reports_total", "counter", &["source", "result"]),
    ("trimtab_table_generation", "gauge", &["pool"]),
    ("trimtab_sheds_total", "counter", &["listener", "reason"]),
    ("trimtab_affinity_total", "counter", &["listener", "result"]),
    ("trimtab_flows_queued_total", "counter", &["listener"]),
    ("trimtab_flows_waiting", "gauge", &["listener"]),
    ("trimtab_access_log_lines_total", "counter", &[]),
    ("trimtab_access_log_lost_total", "counter", &[]),
    ("trimtab_engine_info", "gauge", &["engine", "reason"]),
    ("trimtab_build_info", "gauge", &["version"]),
];

#[test]
fn promtool_finds_nothing_and_every_name_is_there() {
    let lab = Lab::start(2, BalancerConfig::default());
    let transactions = PgBench::start(lab.listener(), &["-c", "4", "-C", "-S", "-t", "25"]).succeed(PATIENCE);
    assert_eq!(transactions, 100);
    // One connection more, in which pgbench looks at the tables.
    let connections = 101.0;
    let metrics = e2e::until("all flows are closed and counted", || {
        let metrics = lab.balancer.metrics();
        (metrics.sum("trimtab_flows_closed_total", &[]) == connections).then_some(metrics)
    });

    let mut command = Command::new("promtool");
    let found = Command::new("promtool").arg("--version").output();
    let missing = found.is_err_and(|error| error.kind() == ErrorKind::NotFound);
    assert!(!missing, "promtool is missing: run `cargo xtask install` (Debian package prometheus)");
    let mut promtool = Process::start("promtool", command.args(["check", "metrics"]));
    promtool.write(metrics.text());
    promtool.close_stdin();
    let (ended, _) = promtool.wait(PATIENCE);
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (Some(0), "", ""));

    for (name, kind, labels) in FAMILIES {
        assert!(metrics.text().contains(&format!("# TYPE {name} {kind}\n")), "{name} is a {kind}");
        assert!(metrics.text().contains(&format!("# HELP {name} ")), "{name} is explained");
        for label in *labels {
            assert!(!metrics.label_values(name, label).is_empty(), "{name} has the label {label}");
        }
    }

    // What they say of these hundred connections.
    let sum = |name: &str, labels: &[(&str, &str)]| metrics.sum(name, labels);
    assert_eq!(sum("trimtab_flows_opened_total", &[("protocol", "tcp")]), connections);
    assert_eq!(sum("trimtab_resource_flows_opened_total", &[("pool", e2e::POOL)]), connections);
    assert_eq!(sum("trimtab_resource_flows_open", &[]), 0.0);
    assert_eq!(sum("trimtab_flows_closed_total", &[("reason", "ended")]), connections);
    assert_eq!(sum("trimtab_connect_seconds_count", &[]), connections);
    assert_eq!(sum("trimtab_flow_seconds_count", &[]), connections);
    assert_eq!(sum("trimtab_resources", &[("state", "ready")]), 2.0);
    assert_eq!(sum("trimtab_engine_info", &[("engine", "uring")]), 1.0);
    assert_eq!(sum("trimtab_sheds_total", &[]), 0.0);
    for direction in ["to_backend", "to_client"] {
        assert!(sum("trimtab_bytes_total", &[("direction", direction)]) > 1000.0, "{direction}");
    }
    for name in lab.names() {
        let of = [("resource", name.as_str())];
        assert!(sum("trimtab_resource_report_age_seconds", &of) < 5.0);
        let cpu = sum("trimtab_resource_utilization_ratio", &[of[0], ("dimension", "cpu")]);
        assert!((0.0..=1.0).contains(&cpu), "{cpu}");
    }
    assert!((sum("trimtab_resource_weight", &[]) / 2.0 - 1.0).abs() < 0.01, "the mean weight is 1");
    // A closed set: no client's address is a label.
    let labels = metrics.label_values("trimtab_flows_opened_total", "listener");
    assert_eq!(labels.into_iter().collect::<Vec<_>>(), [format!("tcp://{}", lab.listener())]);

    let generation = metrics.sum("trimtab_table_generation", &[]);
    e2e::within(Duration::from_secs(10), "reports go on being counted", || {
        let later = lab.balancer.metrics();
        let more = later.sum("trimtab_reports_total", &[("result", "accepted")])
            > sum("trimtab_reports_total", &[("result", "accepted")]);
        (more && later.sum("trimtab_table_generation", &[]) >= generation).then_some(())
    });
    lab.stop();
}
