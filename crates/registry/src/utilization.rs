//! How busy a resource says it is, parsed.

use std::collections::BTreeMap;
use std::fmt;

use crate::{ENTRIES_MAX, KEY_BYTES_MAX, key_fault};

/// `cpu` and `application` may exceed 1 (more work than there is capacity for), but not without end.
const RATIO_MAX: f64 = 100.0;
const RATE_MAX: f64 = 1e12;
/// A ratio this little above 1 is 1, rounded by whoever divided.
const OVERSHOOT: f64 = 1e-6;
/// Dimensions whose level says how busy the resource is, beside `cpu`.
const BUSY: [&str; 4] = ["bandwidth", "pressure_cpu", "pressure_memory", "pressure_io"];
/// Below these levels memory and swap say nothing about load: a database with a warm cache fills its memory for ever,
/// and pages that were swapped out once stay out. Above, they count from 0 to 1.
const MEMORY_COUNTS_FROM: f64 = 0.9;
const SWAP_COUNTS_FROM: f64 = 0.5;

/// A utilization as it came, before it was looked at. Zeros stand for "not said", as on the wire.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RawUtilization {
    /// Ratio of the capacity of all its processors; may exceed 1.
    pub cpu: f64,
    /// Ratio.
    pub memory: f64,
    /// Ratio by the resource's own measure; above 0 it stands for all the others. May exceed 1.
    pub application: f64,
    /// Ratios by name: `swap`, `os_cache`, `bandwidth`, `pressure_cpu`, ….
    pub dimensions: Vec<(String, f64)>,
    /// Operations a second.
    pub rate: f64,
    /// Errors a second.
    pub errors: f64,
    /// Anything else by name, in its own unit.
    pub metrics: Vec<(String, f64)>,
}

/// A resource's utilization. It can only be had from [`Utilization::parse`], so everything in it is finite and in range.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Utilization {
    cpu: f64,
    memory: f64,
    application: Option<f64>,
    dimensions: BTreeMap<String, f64>,
    rate: Option<f64>,
    errors: f64,
    metrics: BTreeMap<String, f64>,
}

/// A field of a report, by its name on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Field {
    /// `cpu_utilization`.
    Cpu,
    /// `mem_utilization`.
    Memory,
    /// `application_utilization`.
    Application,
    /// `rps_fractional`.
    Rate,
    /// `eps`.
    Errors,
    /// The map `utilization`.
    Dimensions,
    /// An entry of it.
    Dimension(String),
    /// The map `named_metrics`.
    Metrics,
    /// An entry of it.
    Metric(String),
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu_utilization"),
            Self::Memory => f.write_str("mem_utilization"),
            Self::Application => f.write_str("application_utilization"),
            Self::Rate => f.write_str("rps_fractional"),
            Self::Errors => f.write_str("eps"),
            Self::Dimensions => f.write_str("utilization"),
            Self::Dimension(key) => write!(f, "utilization[{key:?}]"),
            Self::Metrics => f.write_str("named_metrics"),
            Self::Metric(key) => write!(f, "named_metrics[{key:?}]"),
        }
    }
}

/// Why a text is no key of a map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyFault {
    /// There is no character in it.
    #[error("is empty")]
    Empty,
    /// It has a character that keys may not have.
    #[error("has the character {found:?}; a key takes A-Z a-z 0-9 . _ : / -")]
    Character {
        /// The first such character.
        found: char,
    },
    /// It is longer than [`KEY_BYTES_MAX`].
    #[error("is {length} bytes long; a key takes at most {KEY_BYTES_MAX}")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
}

/// Why a utilization was refused. Always the fault of the resource that reported it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum UtilizationError {
    /// Not a number, or infinite.
    #[error("{field} is {value:?}; the resource must report a finite number")]
    NotFinite {
        /// Where.
        field: Field,
        /// What.
        value: f64,
    },
    /// Finite, but not a value the field can have.
    #[error("{field} is {value:?}; the resource must report 0 to {max}")]
    OutOfRange {
        /// Where.
        field: Field,
        /// What.
        value: f64,
        /// The largest value it takes.
        max: f64,
    },
    /// More entries than [`ENTRIES_MAX`].
    #[error("{field} has {count} entries; the resource may report at most {ENTRIES_MAX}")]
    TooManyEntries {
        /// Which map.
        field: Field,
        /// How many.
        count: usize,
    },
    /// A key is no name.
    #[error("a key of {field} {fault}")]
    Key {
        /// Which map.
        field: Field,
        /// What is wrong with it.
        fault: KeyFault,
    },
}

impl Utilization {
    /// Checks every number.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn parse(raw: RawUtilization) -> Result<Self, UtilizationError> {
        let application = ranged(Field::Application, raw.application, RATIO_MAX)?;
        let rate = ranged(Field::Rate, raw.rate, RATE_MAX)?;
        Ok(Self {
            cpu: ranged(Field::Cpu, raw.cpu, RATIO_MAX)?,
            memory: ranged(Field::Memory, raw.memory, 1.0)?,
            application: (application > 0.0).then_some(application),
            dimensions: parse_map(raw.dimensions, Field::Dimensions, |key, value| {
                ranged(Field::Dimension(key.to_owned()), value, 1.0)
            })?,
            rate: (rate > 0.0).then_some(rate),
            errors: ranged(Field::Errors, raw.errors, RATE_MAX)?,
            metrics: parse_map(raw.metrics, Field::Metrics, |key, value| {
                finite(|| Field::Metric(key.to_owned()), value)
            })?,
        })
    }

    /// Ratio of the capacity of all its processors.
    pub fn cpu(&self) -> f64 {
        self.cpu
    }

    /// Ratio.
    pub fn memory(&self) -> f64 {
        self.memory
    }

    /// Ratio by the resource's own measure, where it has one.
    pub fn application(&self) -> Option<f64> {
        self.application
    }

    /// Ratios by name.
    pub fn dimensions(&self) -> &BTreeMap<String, f64> {
        &self.dimensions
    }

    /// Operations a second, where there are any.
    pub fn rate(&self) -> Option<f64> {
        self.rate
    }

    /// Errors a second.
    pub fn errors(&self) -> f64 {
        self.errors
    }

    /// Anything else by name.
    pub fn metrics(&self) -> &BTreeMap<String, f64> {
        &self.metrics
    }

    /// Every ratio by its name in output: the dimensions, and `cpu`, `memory` and `application`. Sorted.
    pub fn ratios(&self) -> BTreeMap<String, f64> {
        let mut all = self.dimensions.clone();
        all.insert("cpu".into(), self.cpu);
        all.insert("memory".into(), self.memory);
        if let Some(application) = self.application {
            all.insert("application".into(), application);
        }
        all
    }

    /// How busy it is, in one number: its own measure where it has one, else the busiest of its processors, network
    /// and pressure stalls, with memory and swap only when they get short. `os_cache` never counts: cache gives way.
    pub fn busy(&self) -> f64 {
        if let Some(application) = self.application {
            return application;
        }
        let level = |key: &str| self.dimensions.get(key).copied().unwrap_or(0.0);
        let above = |value: f64, from: f64| ((value - from) / (1.0 - from)).max(0.0);
        BUSY.into_iter()
            .map(level)
            .chain([above(self.memory, MEMORY_COUNTS_FROM), above(level("swap"), SWAP_COUNTS_FROM)])
            .fold(self.cpu, f64::max)
    }
}

fn finite(field: impl FnOnce() -> Field, value: f64) -> Result<f64, UtilizationError> {
    if value.is_finite() { Ok(value) } else { Err(UtilizationError::NotFinite { field: field(), value }) }
}

fn ranged(field: Field, value: f64, max: f64) -> Result<f64, UtilizationError> {
    if !value.is_finite() {
        return Err(UtilizationError::NotFinite { field, value });
    }
    if !(0.0..=max + OVERSHOOT).contains(&value) {
        return Err(UtilizationError::OutOfRange { field, value, max });
    }
    // `+ 0.0` makes zero of a negative zero.
    Ok(value.min(max) + 0.0)
}

fn parse_map(
    entries: Vec<(String, f64)>,
    field: Field,
    parse: impl Fn(&str, f64) -> Result<f64, UtilizationError>,
) -> Result<BTreeMap<String, f64>, UtilizationError> {
    if entries.len() > ENTRIES_MAX {
        return Err(UtilizationError::TooManyEntries { field, count: entries.len() });
    }
    let mut parsed = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        if let Some(fault) = key_fault(&key) {
            return Err(UtilizationError::Key { field, fault });
        }
        let value = parse(&key, value)?;
        parsed.push((key, value));
    }
    // Mostly sorted already, as the wire's map is: then it is made at once and nothing is searched for.
    Ok(parsed.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_error_names_the_field_and_the_value() {
        let nan = RawUtilization { cpu: f64::NAN, ..RawUtilization::default() };
        assert_eq!(
            Utilization::parse(nan).unwrap_err().to_string(),
            "cpu_utilization is NaN; the resource must report a finite number"
        );
        let map = RawUtilization { dimensions: vec![("swap".into(), 1.5)], ..RawUtilization::default() };
        assert_eq!(
            Utilization::parse(map).unwrap_err().to_string(),
            "utilization[\"swap\"] is 1.5; the resource must report 0 to 1"
        );
        let many = RawUtilization {
            metrics: (0..65).map(|n| (format!("m{n}"), 0.0)).collect(),
            ..RawUtilization::default()
        };
        assert_eq!(
            Utilization::parse(many).unwrap_err(),
            UtilizationError::TooManyEntries { field: Field::Metrics, count: 65 }
        );
    }

    #[test]
    fn a_rounded_one_is_one() {
        let raw = RawUtilization { memory: 1.0 + 1e-7, ..RawUtilization::default() };
        assert_eq!(Utilization::parse(raw).unwrap().memory(), 1.0);
        let raw = RawUtilization { memory: 1.01, ..RawUtilization::default() };
        assert!(Utilization::parse(raw).is_err());
    }

    #[test]
    fn busy_is_the_scarcest_and_not_the_fullest() {
        let busy = |cpu, memory, dimensions: &[(&str, f64)]| {
            let dimensions = dimensions.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect();
            Utilization::parse(RawUtilization { cpu, memory, dimensions, ..RawUtilization::default() })
                .unwrap()
                .busy()
        };
        assert_eq!(busy(0.2, 0.89, &[("os_cache", 0.9), ("swap", 0.4)]), 0.2, "a warm cache is not load");
        assert!((busy(0.2, 0.95, &[]) - 0.5).abs() < 1e-9);
        assert_eq!(busy(0.2, 0.5, &[("bandwidth", 0.7)]), 0.7);
        assert_eq!(busy(0.2, 0.5, &[("pressure_io", 0.6), ("mystery", 0.9)]), 0.6);
        assert_eq!(busy(0.2, 0.5, &[("swap", 1.0)]), 1.0);
        let own = RawUtilization { cpu: 0.9, application: 0.3, ..RawUtilization::default() };
        assert_eq!(Utilization::parse(own).unwrap().busy(), 0.3, "its own measure stands for the others");
    }

    /// Usual, odd and impossible numbers alike.
    fn number() -> impl Strategy<Value = f64> {
        prop_oneof![0.0_f64..1.5, any::<f64>(), Just(f64::NAN), Just(f64::INFINITY), Just(-0.0), Just(1e300)]
    }

    proptest! {
        #[test]
        fn whatever_parses_is_finite_and_in_range(
            cpu in number(), memory in number(), application in number(), rate in number(), errors in number(),
            dimensions in prop::collection::vec(("[a-z\u{e9} ]{0,4}", number()), 0..4),
            metrics in prop::collection::vec(("[a-z]{1,70}", number()), 0..4),
        ) {
            let raw = RawUtilization { cpu, memory, application, dimensions, rate, errors, metrics };
            let wrong = !(0.0..=100.0 + OVERSHOOT).contains(&raw.cpu)
                || !(0.0..=1.0 + OVERSHOOT).contains(&raw.memory)
                || raw.metrics.iter().any(|(_, value)| !value.is_finite());
            match Utilization::parse(raw) {
                Err(error) => prop_assert!(error.to_string().len() < 200),
                Ok(parsed) => {
                    prop_assert!(!wrong);
                    prop_assert!((0.0..=100.0).contains(&parsed.busy()) && parsed.busy().is_sign_positive());
                    prop_assert!(parsed.ratios().values().all(|v| (0.0..=100.0).contains(v)));
                    prop_assert!(parsed.rate().is_none_or(|r| r > 0.0 && r <= RATE_MAX));
                    prop_assert!(parsed.dimensions().keys().all(|k| (1..=64).contains(&k.len())));
                }
            }
        }
    }
}
