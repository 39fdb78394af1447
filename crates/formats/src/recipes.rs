//! Mappings for exporters that many run: what they call things is theirs, and checked against real ones in `tests/`.

use crate::mapping::Mapping;

/// The names of all recipes, with their mappings.
pub const RECIPES: [(&str, &str); 3] = [
    ("node_exporter", NODE_EXPORTER),
    ("postgres_exporter", POSTGRES_EXPORTER),
    ("mysqld_exporter", MYSQLD_EXPORTER),
];

/// Collectors: cpu, meminfo, netdev, netclass, pressure. Waiting for a disk leaves the processor free. An
/// interface that does not know its speed says a negative one.
const NODE_EXPORTER: &str = r#"
cpu = 1 - sum(rate(node_cpu_seconds_total{mode=~"idle|iowait"})) / count(node_cpu_seconds_total{mode="idle"})
memory = 1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes
utilization.swap = 1 - node_memory_SwapFree_bytes / node_memory_SwapTotal_bytes
utilization.os_cache = (node_memory_Cached_bytes + node_memory_Buffers_bytes) / node_memory_MemTotal_bytes
utilization.bandwidth = max(rate(node_network_transmit_bytes_total{device!="lo"})) / max(node_network_speed_bytes{device!="lo"} > 0)
utilization.pressure_cpu = rate(node_pressure_cpu_waiting_seconds_total)
utilization.pressure_memory = rate(node_pressure_memory_waiting_seconds_total)
utilization.pressure_io = rate(node_pressure_io_waiting_seconds_total)
named_metrics.bandwidth_bytes_per_second = max(rate(node_network_transmit_bytes_total{device!="lo"}))
"#;

const POSTGRES_EXPORTER: &str = r#"
utilization.connections = sum(pg_stat_database_numbackends) / pg_settings_max_connections
operations_per_second = sum(rate(pg_stat_database_xact_commit)) + sum(rate(pg_stat_database_xact_rollback))
errors_per_second = sum(rate(pg_stat_database_deadlocks))
named_metrics.operations = sum(pg_stat_database_xact_commit) + sum(pg_stat_database_xact_rollback)
"#;

const MYSQLD_EXPORTER: &str = r#"
utilization.connections = mysql_global_status_threads_connected / mysql_global_variables_max_connections
operations_per_second = rate(mysql_global_status_questions)
errors_per_second = sum(rate(mysql_global_status_connection_errors_total))
named_metrics.operations = mysql_global_status_questions
named_metrics.threads_running = mysql_global_status_threads_running
"#;

/// The built-in mapping of that name.
pub fn recipe(name: &str) -> Option<Mapping> {
    let (_, text) = RECIPES.into_iter().find(|(known, _)| *known == name)?;
    // A test parses them all.
    Mapping::parse(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_a_mapping() {
        for (name, text) in RECIPES {
            Mapping::parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(recipe(name).is_some());
        }
        assert!(recipe("nginx").is_none());
    }
}
