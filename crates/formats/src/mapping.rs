//! What makes a [`Document`] of a page of metrics: a line for each dimension.
//!
//! ```text
//! # how busy this database is
//! cpu                     = 1 - sum(rate(node_cpu_seconds_total{mode="idle"})) / count(node_cpu_seconds_total{mode="idle"})
//! utilization.connections = sum(pg_stat_database_numbackends) / pg_settings_max_connections
//! operations_per_second   = sum(rate(pg_stat_database_xact_commit))
//! ```
//!
//! Keys are those of the JSON document: `cpu`, `memory`, `application`, `operations_per_second`, `errors_per_second`,
//! `utilization.NAME`, `named_metrics.NAME`. What a page does not have is left out; a page that has nothing of it is refused.

use std::time::Duration;

use crate::document::{Document, DocumentError, ENTRIES_MAX};
use crate::expression::{Counters, Expression, Scene};
use crate::prometheus::{self, TextError};

/// Longest mapping, in bytes.
pub const MAPPING_BYTES_MAX: usize = 16 * 1024;
/// A ratio so far outside its range is rounding (two counters are not read at the same instant); further, it is no ratio.
const OVERSHOOT: f64 = 0.1;
/// Longest name of a dimension or a metric; a balancer takes no longer one.
const NAME_BYTES_MAX: usize = 64;

/// What a document's keys are made of.
#[derive(Debug, Clone)]
pub struct Mapping {
    lines: Vec<(Key, Expression)>,
    /// The metrics that they look at: asked for each line of a page.
    names: Vec<String>,
}

/// What `rate` remembers from one page to the next.
#[derive(Debug, Clone, Default)]
pub struct Past {
    last: Option<(Counters, Duration)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    Cpu,
    Memory,
    Application,
    Operations,
    Errors,
    Dimension(String),
    Metric(String),
}

/// Why a text is no mapping. Its author's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    /// It is too long.
    #[error("the mapping is longer than {MAPPING_BYTES_MAX} bytes")]
    TooLong,
    /// It has no line.
    #[error("the mapping is empty; it takes lines such as: memory = 1 - available_bytes / total_bytes")]
    Empty,
    /// It has too many lines.
    #[error("the mapping has more than {ENTRIES_MAX} lines")]
    TooMany,
    /// A line is wrong.
    #[error("line {line} of the mapping: {why}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
}

/// Why a page gives no document.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// It is no page of metrics.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Several series where one is needed.
    #[error("the page has {count} series of {name}, and the mapping means one: use sum, max or a label")]
    Ambiguous {
        /// The metric.
        name: String,
        /// How many.
        count: usize,
    },
    /// A ratio that is none.
    #[error("{key} comes out as {value}; it takes {range}: scale it in the mapping")]
    OutOfRange {
        /// Which line.
        key: String,
        /// Its value.
        value: f64,
        /// What would do.
        range: &'static str,
    },
    /// None of the metrics that the mapping names is there.
    #[error("the page has none of the metrics that the mapping names: {names}")]
    Nothing {
        /// The first few of them.
        names: String,
    },
    /// What came out is no document.
    #[error(transparent)]
    Document(#[from] DocumentError),
}

impl Mapping {
    /// Parses lines of `key = expression`; `#` begins a comment line.
    ///
    /// # Errors
    /// The first line that is wrong.
    pub fn parse(text: &str) -> Result<Self, MappingError> {
        if text.len() > MAPPING_BYTES_MAX {
            return Err(MappingError::TooLong);
        }
        let mut lines: Vec<(Key, Expression)> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |why: String| MappingError::Line { line: index + 1, why };
            let (key, expression) =
                line.split_once('=').ok_or_else(|| wrong("it has no `=`: key = expression".to_owned()))?;
            let key = Key::parse(key.trim()).map_err(wrong)?;
            if lines.iter().any(|(other, _)| *other == key) {
                return Err(wrong(format!("{} is there already", key.name())));
            }
            if lines.len() == ENTRIES_MAX {
                return Err(MappingError::TooMany);
            }
            lines.push((key, Expression::parse(expression).map_err(wrong)?));
        }
        if lines.is_empty() {
            return Err(MappingError::Empty);
        }
        let mut names = Vec::new();
        for (_, expression) in &lines {
            collect(expression, &mut names);
        }
        Ok(Self { lines, names })
    }

    /// The document of a page that came at `at`, on any clock that does not go back. `past` is what it was at the last page.
    ///
    /// # Errors
    /// See [`PageError`].
    pub fn apply(&self, page: &[u8], at: Duration, past: &mut Past) -> Result<Document, PageError> {
        let samples = prometheus::parse(page, |name| self.names.iter().any(|known| known == name))?;
        if samples.is_empty() {
            let first = &self.names[..self.names.len().min(3)];
            return Err(PageError::Nothing { names: first.join(", ") });
        }
        let mut counters = Counters::new();
        let before = past.last.as_ref().map(|(counters, then)| (counters, at.saturating_sub(*then)));
        let before = before.filter(|(_, elapsed)| !elapsed.is_zero());
        let mut scene = Scene { samples: &samples, before, counters: &mut counters };
        let mut document = Document::default();
        for (key, expression) in &self.lines {
            let value = expression.value(&mut scene);
            let value = value.map_err(|two| PageError::Ambiguous { name: two.name, count: two.count })?;
            if let Some(value) = value {
                key.set(&mut document, value)?;
            }
        }
        past.last = Some((counters, at));
        document.check()?;
        Ok(document)
    }

    /// Whether it looks at this line of a page: a sample of a metric that it names, or none at all, which is worth an error.
    pub fn wants(&self, line: &[u8]) -> bool {
        let end = line.iter().position(|byte| !prometheus::is_name(char::from(*byte))).unwrap_or(line.len());
        let (name, rest) = line.split_at(end);
        if name.is_empty() {
            return rest.first().is_some_and(|first| !matches!(first, b'#' | b'\r' | b'\n' | b' ' | b'\t'));
        }
        self.names.iter().any(|known| known.as_bytes() == name)
    }
}

fn collect(expression: &Expression, names: &mut Vec<String>) {
    match expression {
        Expression::Number(_) => {}
        Expression::Vector(_, vector) => {
            if !names.contains(&vector.name) {
                names.push(vector.name.clone());
            }
        }
        Expression::Binary(_, left, right) => {
            collect(left, names);
            collect(right, names);
        }
    }
}

impl Key {
    fn parse(text: &str) -> Result<Self, String> {
        let name = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '/' | '-');
            if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(plain) {
                Ok(name.to_owned())
            } else {
                Err(format!("{name:?} is no name: 1 to 64 characters of A-Z a-z 0-9 . _ : / -"))
            }
        };
        match (text, text.split_once('.')) {
            ("cpu", _) => Ok(Self::Cpu),
            ("memory", _) => Ok(Self::Memory),
            ("application", _) => Ok(Self::Application),
            ("operations_per_second", _) => Ok(Self::Operations),
            ("errors_per_second", _) => Ok(Self::Errors),
            (_, Some(("utilization", dimension))) => Ok(Self::Dimension(name(dimension)?)),
            (_, Some(("named_metrics", metric))) => Ok(Self::Metric(name(metric)?)),
            _ => Err(format!(
                "there is no key {text:?}; there are cpu, memory, application, operations_per_second, \
                 errors_per_second, utilization.NAME and named_metrics.NAME"
            )),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Cpu => "cpu".into(),
            Self::Memory => "memory".into(),
            Self::Application => "application".into(),
            Self::Operations => "operations_per_second".into(),
            Self::Errors => "errors_per_second".into(),
            Self::Dimension(name) => format!("utilization.{name}"),
            Self::Metric(name) => format!("named_metrics.{name}"),
        }
    }

    fn set(&self, document: &mut Document, value: f64) -> Result<(), PageError> {
        let most = match self {
            Self::Memory | Self::Dimension(_) => 1.0,
            _ => f64::INFINITY,
        };
        let least = if matches!(self, Self::Metric(_)) { f64::NEG_INFINITY } else { 0.0 };
        if value < least - OVERSHOOT || value > most + OVERSHOOT {
            let range = if most == 1.0 { "a ratio from 0 to 1" } else { "a number of 0 or more" };
            return Err(PageError::OutOfRange { key: self.name(), value, range });
        }
        let value = value.clamp(least, most);
        match self {
            Self::Cpu => document.cpu = Some(value),
            Self::Memory => document.memory = Some(value),
            Self::Application => document.application = Some(value),
            Self::Operations => document.operations_per_second = Some(value),
            Self::Errors => document.errors_per_second = Some(value),
            Self::Dimension(name) => drop(document.utilization.insert(name.clone(), value)),
            Self::Metric(name) => drop(document.named_metrics.insert(name.clone(), value)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn value(expression: &str, page: &str) -> Result<Option<f64>, String> {
        let mapping =
            Mapping::parse(&format!("named_metrics.x = {expression}")).map_err(|e| e.to_string())?;
        let document = mapping.apply(page.as_bytes(), SECOND, &mut Past::default());
        Ok(document.map_err(|e| e.to_string())?.named_metrics.get("x").copied())
    }

    #[test]
    fn arithmetic_folds_and_matchers() {
        let page = "a{d=\"x\"} 1\na{d=\"y\"} 2\na{d=\"lo\",e=\"1\"} 9\nb 4\nzero 0\n";
        for (expression, expected) in [
            ("b", 4.0),
            ("1 - b / 8", 0.5),
            ("-b + 10", 6.0),
            ("2 * (b - 1) * 1e1", 60.0),
            ("b*0.5", 2.0),
            ("sum(a)", 12.0),
            ("count(a)", 3.0),
            ("avg(a)", 4.0),
            ("min(a)", 1.0),
            ("max( a )", 9.0),
            ("a{d=\"y\"}", 2.0),
            ("sum(a{d!=\"lo\"})", 3.0),
            ("sum(a{d=~\"x|y\"})", 3.0),
            ("sum(a{d!~\"l.*\",}) / sum(a)", 0.25),
            ("a{e=\"1\"}", 9.0),
            ("sum(a > 1)", 11.0),
            ("max(a > 1) - b", 5.0),
        ] {
            assert_eq!(value(expression, page), Ok(Some(expected)), "{expression}");
        }
        // What is not there, and what cannot be divided, is left out.
        for absent in
            ["max(a > 9) + b", "b / zero", "b + nothing", "0 * sum(nothing) + b", "sum(a{d=\"z\"}) + b"]
        {
            assert_eq!(value(absent, page), Ok(None), "{absent}");
        }
        let several = value("a", page).unwrap_err();
        assert_eq!(several, "the page has 3 series of a, and the mapping means one: use sum, max or a label");
        let nothing = value("nothing", page).unwrap_err();
        assert_eq!(nothing, "the page has none of the metrics that the mapping names: nothing");
    }

    #[test]
    fn a_rate_needs_two_pages_and_survives_a_reset() {
        let mapping = Mapping::parse("operations_per_second = sum(rate(c))\ncpu = g").unwrap();
        let mut past = Past::default();
        let mut at = |seconds: u64, page: &str| {
            let document = mapping.apply(page.as_bytes(), Duration::from_secs(seconds), &mut past);
            document.unwrap().operations_per_second
        };
        assert_eq!(at(10, "c{l=\"a\"} 100\nc{l=\"b\"} 5\ng 0"), None);
        assert_eq!(at(12, "c{l=\"a\"} 120\nc{l=\"b\"} 5\ng 0"), Some(10.0));
        // Began anew at 0; the other series is new and has no rate yet.
        assert_eq!(at(14, "c{l=\"a\"} 8\nc{l=\"new\"} 1000\ng 0"), Some(4.0));
        assert_eq!(at(14, "c{l=\"a\"} 9\ng 0"), None, "no time has passed");
        assert_eq!(at(15, "g 0"), None);
    }

    #[test]
    fn lines_of_other_metrics_are_not_wanted() {
        let mapping = Mapping::parse("cpu = a / b_total").unwrap();
        for line in ["a 1", "a{x=\"y\"} 1", "b_total 3", "<html>", "{\"cpu\": 1}"] {
            assert!(mapping.wants(line.as_bytes()), "{line}");
        }
        for line in ["", "\n", "ab 1", "b 1", "# TYPE a gauge", "b_total_x 1", " \n"] {
            assert!(!mapping.wants(line.as_bytes()), "{line}");
        }
    }

    #[test]
    fn ratios_are_ratios() {
        let memory = |page: &str| {
            let mapping = Mapping::parse("memory = m").unwrap();
            mapping.apply(page.as_bytes(), SECOND, &mut Past::default()).map(|document| document.memory)
        };
        assert_eq!(memory("m 1.05").unwrap(), Some(1.0));
        assert_eq!(memory("m -0.01").unwrap(), Some(0.0));
        let percent = memory("m 75").unwrap_err().to_string();
        assert_eq!(percent, "memory comes out as 75; it takes a ratio from 0 to 1: scale it in the mapping");
    }

    #[test]
    fn what_is_no_mapping_is_said() {
        let said = |text: &str| Mapping::parse(text).unwrap_err().to_string();
        assert!(said("# nothing\n").starts_with("the mapping is empty"));
        assert!(said("cpus = a").contains("line 1 of the mapping: there is no key \"cpus\""));
        assert_eq!(said("\ncpu"), "line 2 of the mapping: it has no `=`: key = expression");
        assert_eq!(said("cpu = a\ncpu = b"), "line 2 of the mapping: cpu is there already");
        assert!(said("utilization. = a").contains("is no name"));
        for (expression, why) in [
            ("", "at its end: a number, a metric or a parenthesis is expected"),
            ("a +", "at its end: a number, a metric or a parenthesis is expected"),
            ("(a", "at its end: ')' is expected"),
            ("a b", "at 4: an operator or the end is expected, not 'b'"),
            ("sum(sum(a))", "there is no sum(); there are sum, count, avg, min, max and rate"),
            ("irate(a)", "there is no irate(); there are sum, count, avg, min, max and rate"),
            ("a{b~\"c\"}", "at 5: =, !=, =~ or !~ is expected, not '~'"),
            ("a{b=\"c}", "at 7: a closing quote is expected, not 'c'"),
        ] {
            assert_eq!(said(&format!("cpu = {expression}")), format!("line 1 of the mapping: {why}"));
        }
        assert!(said("cpu = a{b=~\"(\"}").contains("the pattern \"(\""));
        assert!(said(&format!("cpu = {}a", "(".repeat(100))).contains("nested deeper than 32"));
        assert!(said(&format!("cpu = a{{b=~\"{}\"}}", "(a{1000}){1000}")).contains("the pattern"));
        assert_eq!(said(&" ".repeat(MAPPING_BYTES_MAX + 1)), "the mapping is longer than 16384 bytes");
        let many: String = (0..65).map(|n| format!("utilization.u{n} = a\n")).collect();
        assert_eq!(said(&many), "the mapping has more than 64 lines");
    }

    proptest! {
        #[test]
        fn nothing_panics(expression in "[a(){}=~!\"\\\\+*/.e0-9 ,-]{0,40}", page in "[a{}=\"0-9 \\n]{0,40}") {
            if let Ok(mapping) = Mapping::parse(&format!("cpu = {expression}")) {
                let mut past = Past::default();
                let _ = mapping.apply(page.as_bytes(), SECOND, &mut past);
                let _ = mapping.apply(page.as_bytes(), 2 * SECOND, &mut past);
            }
        }
    }
}
