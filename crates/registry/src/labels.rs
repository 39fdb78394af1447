//! Labels: what a resource is and can do, as `key=value`. This module owns their bounds, whoever they come from: the
//! resource's registration or an administrator.

use std::collections::BTreeMap;

use crate::{ENTRIES_MAX, KeyFault, key_fault};

/// Longest value of a label, in bytes.
pub const LABEL_BYTES_MAX: usize = 256;

/// Why labels were refused. The fault of whoever wrote them; the message is to follow a name such as `resource.labels`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelsError {
    /// More labels than [`ENTRIES_MAX`].
    #[error("has {count} entries; it takes at most {ENTRIES_MAX}")]
    Count {
        /// How many.
        count: usize,
    },
    /// A key is no name.
    #[error("has a key that {0}")]
    Key(#[source] KeyFault),
    /// A value is too long.
    #[error("has a value of {length} bytes for the key {key:?}; a value takes at most {LABEL_BYTES_MAX}")]
    Value {
        /// Its key.
        key: String,
        /// Its length in bytes.
        length: usize,
    },
}

/// Labels within their bounds: at most [`ENTRIES_MAX`], keys of the alphabet of names, values of at most
/// [`LABEL_BYTES_MAX`] bytes. Of two with one key the later stands.
///
/// # Errors
/// The first fault found.
pub fn parse_labels(labels: Vec<(String, String)>) -> Result<BTreeMap<String, String>, LabelsError> {
    if labels.len() > ENTRIES_MAX {
        return Err(LabelsError::Count { count: labels.len() });
    }
    for (key, value) in &labels {
        if let Some(fault) = key_fault(key) {
            return Err(LabelsError::Key(fault));
        }
        if value.len() > LABEL_BYTES_MAX {
            return Err(LabelsError::Value { key: key.clone(), length: value.len() });
        }
    }
    Ok(labels.into_iter().collect())
}

/// The labels in force: the resource's own, with an administrator's on top. An administrator takes a capability away
/// with the value `false`. At most twice [`ENTRIES_MAX`], if both are within it.
pub fn effective_labels(
    own: &BTreeMap<String, String>,
    administrator: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut labels = own.clone();
    labels.extend(administrator.iter().map(|(key, value)| (key.clone(), value.clone())));
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
        entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_bound_is_checked() {
        let many = (0..65).map(|n| (format!("k{n}"), String::new())).collect();
        assert_eq!(parse_labels(many), Err(LabelsError::Count { count: 65 }));
        let key = parse_labels(vec![("a b".into(), String::new())]).unwrap_err();
        assert_eq!(
            key.to_string(),
            "has a key that has the character ' '; a key takes A-Z a-z 0-9 . _ : / -"
        );
        let long = parse_labels(vec![("k".into(), "x".repeat(257))]);
        assert_eq!(long, Err(LabelsError::Value { key: "k".into(), length: 257 }));
        assert_eq!(parse_labels(vec![("k".into(), "x".repeat(256))]).unwrap().len(), 1);
    }

    #[test]
    fn an_administrators_label_stands_above_the_resources_own() {
        let own = labels(&[("role", "writer"), ("tls", "true")]);
        let over = labels(&[("role", "reader"), ("zone", "b")]);
        assert_eq!(
            effective_labels(&own, &over),
            labels(&[("role", "reader"), ("tls", "true"), ("zone", "b")])
        );
        assert_eq!(effective_labels(&own, &BTreeMap::new()), own);
    }
}
