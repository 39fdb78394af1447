//! Writing Prometheus' text format 0.0.4: for series that come and go, and histograms that were counted elsewhere.

use std::fmt::Write;

/// A page in the making.
#[derive(Debug, Default)]
pub struct Exposition(String);

impl Exposition {
    /// Begins a family; all its samples must follow before the next.
    pub fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {}", help.replace('\\', "\\\\").replace('\n', "\\n"));
        let _ = writeln!(self.0, "# TYPE {name} {kind}");
    }

    /// One series of the family that was begun.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        self.labels(labels, None);
        let _ = writeln!(self.0, " {}", number(value));
    }

    /// All samples of one histogram of the family that was begun: upper bounds in ascending order, how many fell below each and
    /// above the last, and their sum.
    pub fn histogram(
        &mut self,
        name: &str,
        labels: &[(&str, &str)],
        (bounds, counts, sum): (&[f64], &[u64], f64),
    ) {
        let mut below = 0;
        let bounds = bounds.iter().copied().chain([f64::INFINITY]);
        for (bound, count) in bounds.zip(counts) {
            below += count;
            let _ = write!(self.0, "{name}_bucket");
            self.labels(labels, Some(bound));
            let _ = writeln!(self.0, " {below}");
        }
        let _ = write!(self.0, "{name}_sum");
        self.labels(labels, None);
        let _ = writeln!(self.0, " {}", number(sum));
        let _ = write!(self.0, "{name}_count");
        self.labels(labels, None);
        let _ = writeln!(self.0, " {below}");
    }

    /// The page.
    pub fn into_string(self) -> String {
        self.0
    }

    fn labels(&mut self, labels: &[(&str, &str)], bound: Option<f64>) {
        if labels.is_empty() && bound.is_none() {
            return;
        }
        let mut separator = '{';
        for (name, value) in labels {
            let _ = write!(self.0, "{separator}{name}=\"");
            self.escaped(value);
            self.0.push('"');
            separator = ',';
        }
        if let Some(bound) = bound {
            let _ = write!(self.0, "{separator}le=\"{}\"", number(bound));
        }
        self.0.push('}');
    }

    fn escaped(&mut self, value: &str) {
        for c in value.chars() {
            match c {
                '\\' => self.0.push_str("\\\\"),
                '"' => self.0.push_str("\\\""),
                '\n' => self.0.push_str("\\n"),
                c => self.0.push(c),
            }
        }
    }
}

fn number(value: f64) -> String {
    if value == f64::INFINITY {
        "+Inf".to_owned()
    } else if value == f64::NEG_INFINITY {
        "-Inf".to_owned()
    } else {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut text = Exposition::default();
        text.family("a", "gauge", "Back\\slash\nand line.");
        text.sample("a", &[("x", "q\"b\\n\nend"), ("y", "plain")], 0.5);
        text.sample("a", &[], f64::INFINITY);
        assert_eq!(
            text.into_string(),
            "# HELP a Back\\\\slash\\nand line.\n# TYPE a gauge\na{x=\"q\\\"b\\\\n\\nend\",y=\"plain\"} 0.5\na +Inf\n"
        );
    }

    #[test]
    fn a_histogram_is_cumulative_and_exact() {
        let mut text = Exposition::default();
        text.histogram("s", &[("l", "x")], (&[0.1, 1.0], &[2, 0, 3], 12.25));
        assert_eq!(
            text.into_string(),
            "s_bucket{l=\"x\",le=\"0.1\"} 2\ns_bucket{l=\"x\",le=\"1\"} 2\ns_bucket{l=\"x\",le=\"+Inf\"} 5\n\
             s_sum{l=\"x\"} 12.25\ns_count{l=\"x\"} 5\n"
        );
    }
}
