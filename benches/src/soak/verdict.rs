//! What a scenario found: checks that held or did not, figures, samples.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write as _};

use serde::Serialize;

use super::subject::Sample;

/// Samples in a printed table; all are in the JSON.
const ROWS_MAX: usize = 20;
const MEBI: f64 = 1_048_576.0;

/// The outcome of one scenario.
#[derive(Debug, Serialize)]
pub struct Report {
    scenario: &'static str,
    engine: String,
    seconds: f64,
    checks: Vec<Check>,
    /// What was measured and is not judged.
    figures: BTreeMap<String, f64>,
    /// What went wrong, the first of each kind.
    faults: Vec<String>,
    samples: Vec<Sample>,
}

/// One thing that must be so.
#[derive(Debug, Serialize)]
struct Check {
    what: String,
    found: String,
    wanted: String,
    held: bool,
}

impl Report {
    pub(super) fn new(scenario: &'static str, engine: String) -> Self {
        Self {
            scenario,
            engine,
            seconds: 0.0,
            checks: Vec::new(),
            figures: BTreeMap::new(),
            faults: Vec::new(),
            samples: Vec::new(),
        }
    }

    /// Says how long it took.
    pub(super) fn took(&mut self, seconds: f64) {
        self.seconds = seconds;
    }

    /// Keeps what is judged, with the judgement.
    pub(super) fn check(&mut self, what: &str, found: impl Display, wanted: impl Display, held: bool) {
        let (found, wanted) = (found.to_string(), wanted.to_string());
        self.checks.push(Check { what: what.to_owned(), found, wanted, held });
    }

    /// It must be this.
    pub(super) fn equal<T: Display + PartialEq>(&mut self, what: &str, found: T, wanted: T) {
        let held = found == wanted;
        self.check(what, found, wanted, held);
    }

    /// It may be this at most, in this unit.
    pub(super) fn at_most(&mut self, what: &str, found: f64, limit: f64, unit: &str) {
        self.check(what, format!("{found:.2} {unit}"), format!("≤ {limit:.2} {unit}"), found <= limit);
    }

    /// It must be this at least, in this unit.
    pub(super) fn at_least(&mut self, what: &str, found: f64, limit: f64, unit: &str) {
        self.check(what, format!("{found:.2} {unit}"), format!("≥ {limit:.2} {unit}"), found >= limit);
    }

    /// Keeps a figure.
    pub(super) fn figure(&mut self, what: impl Into<String>, value: f64) {
        self.figures.insert(what.into(), value);
    }

    /// Keeps what went wrong; checks judge it.
    pub(super) fn faults(&mut self, faults: impl IntoIterator<Item = String>) {
        self.faults.extend(faults);
    }

    /// Keeps samples.
    pub(super) fn samples(&mut self, samples: Vec<Sample>) {
        self.samples.extend(samples);
    }

    /// Checks that did not hold.
    pub fn failed(&self) -> usize {
        self.checks.iter().filter(|check| !check.held).count()
    }

    /// Tables for people.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a String takes all");
        text
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        writeln!(text, "{}, engine {}, {:.0} s:\n", self.scenario, self.engine, self.seconds)?;
        if !self.samples.is_empty() {
            writeln!(
                text,
                "| s | RSS MiB | PSS MiB | private MiB | sockets | pipes | others | threads | iou-wrk | buffers in use / made | flows | overflows | processor |"
            )?;
            writeln!(text, "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
            let step = self.samples.len().div_ceil(ROWS_MAX).max(1);
            for sample in self.samples.iter().step_by(step) {
                sample.row(text)?;
            }
            writeln!(text)?;
        }
        for (what, value) in &self.figures {
            writeln!(text, "* {what}: {value:.2}")?;
        }
        writeln!(text, "\n| check | found | wanted | |\n|---|--:|--:|---|")?;
        for Check { what, found, wanted, held } in &self.checks {
            writeln!(
                text,
                "| {what} | {found} | {wanted} | {} |",
                if *held { "held" } else { "**FAILED**" }
            )?;
        }
        for fault in &self.faults {
            writeln!(text, "\n    {fault}")?;
        }
        Ok(())
    }
}

impl Sample {
    fn row(&self, text: &mut String) -> fmt::Result {
        writeln!(
            text,
            "| {:.0} | {:.2} | {:.2} | {:.2} | {} | {} | {} | {} | {} | {} / {} | {} | {} | {:.0} % |",
            self.at_seconds,
            self.rss_bytes as f64 / MEBI,
            self.pss_bytes as f64 / MEBI,
            self.private_bytes as f64 / MEBI,
            self.sockets,
            self.pipes,
            self.other_descriptors,
            self.threads,
            self.io_workers,
            self.buffers_in_use,
            self.buffers,
            self.flows_open,
            self.completion_overflows,
            self.busy * 100.0,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_does_not_hold_shows_and_counts() {
        let mut report = Report::new("mixed", "uring".to_owned());
        report.equal("pipes", 0, 0);
        report.at_most("memory", 2.5, 2.0, "MiB");
        report.at_least("exchanges", 2.5, 2.0, "");
        assert_eq!(report.failed(), 1);
        let text = report.markdown();
        assert!(text.contains("| memory | 2.50 MiB | ≤ 2.00 MiB | **FAILED** |"), "{text}");
    }
}
