//! Our own form: what somebody says about a resource's utilization, as JSON.
//!
//! ```json
//! {"cpu": 0.95, "memory": 0.2, "utilization": {"swap": 0.1}, "application": 0.9,
//!  "operations_per_second": 120.0, "errors_per_second": 0, "named_metrics": {"operations": 81234},
//!  "labels": {"role": "writer"}, "in_flight": 12, "latency_ms": 3.5}
//! ```
//!
//! One value out of bounds and the whole document is refused: half of what it says might mean something else.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::TEXT_BYTES_MAX;

/// Most entries of each of its maps; a balancer takes no more.
pub const ENTRIES_MAX: usize = 64;
/// Longest key of a label; a balancer takes no longer one.
const LABEL_KEY_BYTES_MAX: usize = 64;
/// Longest value of a label; a balancer takes no longer one.
const LABEL_BYTES_MAX: usize = 256;

/// What the document names; what it does not name is not known, or stays as it is known otherwise.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
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
    /// Labels that stand above those the resource was registered with: what it became since (`role`: `writer`).
    /// Keys of 1 to 64 characters of `[A-Za-z0-9._:/-]`, values of up to 256 bytes.
    pub labels: Option<BTreeMap<String, String>>,
    /// Requests that the application serves now, for probes; its own count is better than one of connections.
    pub in_flight: Option<u32>,
    /// How long one request takes lately, in milliseconds, for probes; 0 or more, 0 stands for not known.
    pub latency_ms: Option<f64>,
}

/// Why a document is none. Whatever writes it can mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// It is too long.
    #[error("is longer than {TEXT_BYTES_MAX} bytes")]
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

impl Document {
    /// Parses JSON.
    ///
    /// # Errors
    /// When it is not as documented.
    pub fn parse(text: &[u8]) -> Result<Self, DocumentError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(DocumentError::TooLong);
        }
        let parsed: Self = serde_json::from_slice(text)?;
        parsed.check()?;
        Ok(parsed)
    }

    /// Whether every value is in its range.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self) -> Result<(), DocumentError> {
        let positive = "a number of 0 or more";
        let unit = "a ratio from 0 to 1";
        let scalars = [
            ("cpu", self.cpu, f64::INFINITY, positive),
            ("memory", self.memory, 1.0, unit),
            ("application", self.application, f64::INFINITY, positive),
            ("operations_per_second", self.operations_per_second, f64::INFINITY, positive),
            ("errors_per_second", self.errors_per_second, f64::INFINITY, positive),
            ("latency_ms", self.latency_ms, f64::INFINITY, positive),
        ];
        for (key, value, most, range) in scalars {
            if let Some(value) = value {
                in_range(key, value, most, range)?;
            }
        }
        for (key, value) in &self.utilization {
            in_range(&format!("utilization.{key}"), *value, 1.0, unit)?;
        }
        for (key, map) in [("utilization", &self.utilization), ("named_metrics", &self.named_metrics)] {
            if map.len() > ENTRIES_MAX {
                return Err(DocumentError::TooMany { key, count: map.len() });
            }
        }
        self.labels.as_ref().map_or(Ok(()), labels_in_range)
    }

    /// What `above` names stands above what this one names.
    pub fn overlay(&mut self, above: Self) {
        self.cpu = above.cpu.or(self.cpu);
        self.memory = above.memory.or(self.memory);
        self.utilization.extend(above.utilization);
        self.application = above.application.or(self.application);
        self.operations_per_second = above.operations_per_second.or(self.operations_per_second);
        self.errors_per_second = above.errors_per_second.or(self.errors_per_second);
        self.named_metrics.extend(above.named_metrics);
        if let Some(labels) = above.labels {
            self.labels.get_or_insert_default().extend(labels);
        }
        self.in_flight = above.in_flight.or(self.in_flight);
        self.latency_ms = above.latency_ms.or(self.latency_ms);
    }

    /// Whether it names nothing at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn labels_in_range(labels: &BTreeMap<String, String>) -> Result<(), DocumentError> {
    if labels.len() > ENTRIES_MAX {
        return Err(DocumentError::TooMany { key: "labels", count: labels.len() });
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
        return Err(DocumentError::Label { key: key.clone(), takes });
    }
    Ok(())
}

/// NaN is in no range; JSON has none, other forms do.
fn in_range(key: &str, value: f64, most: f64, range: &'static str) -> Result<(), DocumentError> {
    if (0.0..=most).contains(&value) && value.is_finite() {
        Ok(())
    } else {
        Err(DocumentError::OutOfRange { key: key.into(), value, range })
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
        let parsed = Document::parse(text).unwrap();
        assert_eq!(parsed.cpu, Some(0.95));
        assert_eq!(parsed.utilization["swap"], 0.1);
        assert_eq!(parsed.errors_per_second, Some(0.0));
        assert_eq!(parsed.named_metrics["operations"], 81234.0);
        assert_eq!(parsed.labels.unwrap()["role"], "writer");
        assert_eq!((parsed.in_flight, parsed.latency_ms), (Some(12), Some(3.5)));
        assert_eq!(Document::parse(b"{}").unwrap(), Document::default());
    }

    #[test]
    fn what_is_not_as_documented_is_said() {
        let said = |text: &str| Document::parse(text.as_bytes()).unwrap_err().to_string();
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
    fn what_is_above_stands_above() {
        let document = |text: &str| Document::parse(text.as_bytes()).unwrap();
        let mut below = document(r#"{"cpu": 0.1, "memory": 0.2, "utilization": {"swap": 0.3, "mine": 0.4}}"#);
        below
            .overlay(document(r#"{"cpu": 0.9, "utilization": {"swap": 0.5}, "labels": {"role": "writer"}}"#));
        let expected = r#"{"cpu": 0.9, "memory": 0.2, "utilization": {"swap": 0.5, "mine": 0.4}, "labels": {"role": "writer"}}"#;
        assert_eq!(below, document(expected));
        assert!(Document::default().is_empty() && !below.is_empty());
    }
}
