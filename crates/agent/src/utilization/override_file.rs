//! What somebody else says about the utilization, in a file: it stands above what was measured.
//!
//! ```json
//! {"cpu": 0.95, "memory": 0.2, "utilization": {"swap": 0.1}, "application": 0.9,
//!  "operations_per_second": 120.0, "errors_per_second": 0, "named_metrics": {"operations": 81234},
//!  "labels": {"role": "writer"}, "in_flight": 12, "latency_ms": 3.5}
//! ```
//!
//! One value out of bounds and the whole file is refused: half of what it says might mean something else.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 64 * 1024;
/// Most entries of each of its maps; a balancer takes no more.
pub(crate) const ENTRIES_MAX: usize = 64;
/// Longest key of a label; a balancer takes no longer one.
const LABEL_KEY_BYTES_MAX: usize = 64;
/// Longest value of a label; a balancer takes no longer one.
const LABEL_BYTES_MAX: usize = 256;

/// What the file names; the rest stays as measured.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// CPU, a ratio; 0 or more, may exceed 1.
    pub cpu: Option<f64>,
    /// Memory, a ratio from 0 to 1.
    pub memory: Option<f64>,
    /// Further dimensions by name, ratios from 0 to 1: `swap`, `os_cache`, `bandwidth`, `pressure_cpu`, or one's own.
    #[serde(default)]
    pub utilization: BTreeMap<String, f64>,
    /// How busy the application says it is, a ratio of 0 or more; above 0 it stands for all the others.
    pub application: Option<f64>,
    /// Operations (requests, queries) a second; 0 or more.
    pub operations_per_second: Option<f64>,
    /// Errors a second; 0 or more.
    pub errors_per_second: Option<f64>,
    /// Further metrics by name, any finite number: `operations` (a running total), or one's own.
    #[serde(default)]
    pub named_metrics: BTreeMap<String, f64>,
    /// Labels that stand above those the agent was started with: what the resource became since (`role`: `writer`).
    /// Keys of 1 to 64 characters of `[A-Za-z0-9._:/-]`, values of up to 256 bytes.
    pub labels: Option<BTreeMap<String, String>>,
    /// Requests that the application serves now, for probes; its own count is better than one of connections.
    pub in_flight: Option<u32>,
    /// How long one request takes lately, in milliseconds, for probes; 0 or more, 0 stands for not known.
    pub latency_ms: Option<f64>,
}

/// Why the file is ignored. The operator, or whatever writes it, can mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverrideError {
    /// It is there and cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    /// It is too long.
    #[error("is longer than {FILE_BYTES_MAX} bytes")]
    TooLong,
    /// It is not JSON of this form.
    #[error("is not as expected: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A value is outside its range.
    #[error("{key} is {value}; it takes {range}")]
    OutOfRange {
        /// The key.
        key: String,
        /// Its value.
        value: f64,
        /// What would do.
        range: &'static str,
    },
    /// A label is none that a balancer takes.
    #[error("labels has {key:?}; {takes}")]
    Label {
        /// The key.
        key: String,
        /// What would do.
        takes: &'static str,
    },
    /// A map has too many entries.
    #[error("{key} has {count} entries; it takes at most {ENTRIES_MAX}")]
    TooMany {
        /// The key.
        key: &'static str,
        /// How many it has.
        count: usize,
    },
}

impl Override {
    /// Reads the file; one that is not there overrides nothing.
    ///
    /// # Errors
    /// When it is there and is not as documented.
    pub fn read(path: &Path) -> Result<Self, OverrideError> {
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error.into()),
        };
        let mut text = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(OverrideError::TooLong);
        }
        Self::parse(&text)
    }

    /// Parses the file's content.
    ///
    /// # Errors
    /// When it is not as documented.
    pub fn parse(text: &[u8]) -> Result<Self, OverrideError> {
        let parsed: Self = serde_json::from_slice(text)?;
        let positive = "a number of 0 or more";
        let unit = "a ratio from 0 to 1";
        let scalars = [
            ("cpu", parsed.cpu, f64::INFINITY, positive),
            ("memory", parsed.memory, 1.0, unit),
            ("application", parsed.application, f64::INFINITY, positive),
            ("operations_per_second", parsed.operations_per_second, f64::INFINITY, positive),
            ("errors_per_second", parsed.errors_per_second, f64::INFINITY, positive),
            ("latency_ms", parsed.latency_ms, f64::INFINITY, positive),
        ];
        for (key, value, most, range) in scalars {
            if let Some(value) = value {
                in_range(key, value, most, range)?;
            }
        }
        for (key, value) in &parsed.utilization {
            in_range(&format!("utilization.{key}"), *value, 1.0, unit)?;
        }
        for (key, map) in [("utilization", &parsed.utilization), ("named_metrics", &parsed.named_metrics)] {
            if map.len() > ENTRIES_MAX {
                return Err(OverrideError::TooMany { key, count: map.len() });
            }
        }
        if let Some(labels) = &parsed.labels {
            labels_in_range(labels)?;
        }
        Ok(parsed)
    }
}

fn labels_in_range(labels: &BTreeMap<String, String>) -> Result<(), OverrideError> {
    if labels.len() > ENTRIES_MAX {
        return Err(OverrideError::TooMany { key: "labels", count: labels.len() });
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '/' | '-');
    for (key, value) in labels {
        let takes = if !(1..=LABEL_KEY_BYTES_MAX).contains(&key.len()) || !key.chars().all(plain) {
            "a key takes 1 to 64 characters of A-Z a-z 0-9 . _ : / -"
        } else if value.len() > LABEL_BYTES_MAX {
            "its value takes up to 256 bytes"
        } else {
            continue;
        };
        return Err(OverrideError::Label { key: key.clone(), takes });
    }
    Ok(())
}

/// JSON has neither NaN nor infinity, so a value that was parsed is finite.
fn in_range(key: &str, value: f64, most: f64, range: &'static str) -> Result<(), OverrideError> {
    if (0.0..=most).contains(&value) {
        Ok(())
    } else {
        Err(OverrideError::OutOfRange { key: key.into(), value, range })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_example() {
        let text = br#"{"cpu": 0.95, "memory": 0.2, "utilization": {"swap": 0.1}, "application": 0.9,
            "operations_per_second": 120.0, "errors_per_second": 0, "named_metrics": {"operations": 81234},
            "labels": {"role": "writer"}, "in_flight": 12, "latency_ms": 3.5}"#;
        let parsed = Override::parse(text).unwrap();
        assert_eq!(parsed.cpu, Some(0.95));
        assert_eq!(parsed.utilization["swap"], 0.1);
        assert_eq!(parsed.errors_per_second, Some(0.0));
        assert_eq!(parsed.named_metrics["operations"], 81234.0);
        assert_eq!(parsed.labels.unwrap()["role"], "writer");
        assert_eq!((parsed.in_flight, parsed.latency_ms), (Some(12), Some(3.5)));
        assert_eq!(Override::parse(b"{}").unwrap(), Override::default());
    }

    #[test]
    fn what_is_not_as_documented_is_said() {
        let said = |text: &str| Override::parse(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(said(r#"{"memory": 1.5}"#), "memory is 1.5; it takes a ratio from 0 to 1");
        assert_eq!(said(r#"{"cpu": -1}"#), "cpu is -1; it takes a number of 0 or more");
        assert_eq!(
            said(r#"{"utilization": {"swap": 7}}"#),
            "utilization.swap is 7; it takes a ratio from 0 to 1"
        );
        assert!(said(r#"{"cpus": 0.5}"#).contains("unknown field `cpus`"));
        assert_eq!(said(r#"{"latency_ms": -1}"#), "latency_ms is -1; it takes a number of 0 or more");
        for wrong in ["-1", "1.5", "4294967296", "\"many\""] {
            assert!(
                said(&format!("{{\"in_flight\": {wrong}}}")).starts_with("is not as expected"),
                "{wrong}"
            );
        }
        assert!(
            said(r#"{"labels": {"a key": ""}}"#).starts_with("labels has \"a key\"; a key takes 1 to 64")
        );
        assert!(said(r#"{"labels": {"": ""}}"#).starts_with("labels has \"\"; a key takes 1 to 64"));
        let long = "x".repeat(257);
        assert_eq!(
            said(&format!(r#"{{"labels": {{"k": "{long}"}}}}"#)),
            "labels has \"k\"; its value takes up to 256 bytes"
        );
        let labels: Vec<String> = (0..65).map(|n| format!("\"k{n}\": \"\"")).collect();
        let labels = format!("{{\"labels\": {{{}}}}}", labels.join(","));
        assert_eq!(said(&labels), "labels has 65 entries; it takes at most 64");
        assert!(said(r#"{"cpu": 1e999}"#).starts_with("is not as expected"));
        assert!(said("").starts_with("is not as expected"));
        let many: Vec<String> = (0..65).map(|n| format!("\"k{n}\": 0.5")).collect();
        let many = format!("{{\"utilization\": {{{}}}}}", many.join(","));
        assert_eq!(said(&many), "utilization has 65 entries; it takes at most 64");
    }

    #[test]
    fn a_file_that_is_not_there_overrides_nothing() {
        assert_eq!(Override::read(Path::new("/nonexistent/utilization.json")).unwrap(), Override::default());
    }
}
