//! Prometheus' text format 0.0.4 and OpenMetrics 1.0, as far as values are concerned.
//!
//! Sources: the Prometheus documentation, "Exposition formats"; OpenMetrics 1.0, "Text format". Comments (`# HELP`,
//! `# TYPE`, `# EOF`), timestamps and exemplars are passed over; every other line must be a sample, or the page is refused
//! with its line: a page of HTML is no page of metrics.

use std::borrow::Cow;

use crate::TEXT_BYTES_MAX;

/// Most labels of one sample.
const LABELS_MAX: usize = 64;

/// Pairs of names and values, in their order.
pub type Labels<'t> = Vec<(&'t str, Cow<'t, str>)>;

/// One series at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample<'t> {
    /// Its metric: `node_cpu_seconds_total`.
    pub name: &'t str,
    /// Its labels, as they stand.
    pub labels: Labels<'t>,
    /// May be infinite, or no number.
    pub value: f64,
}

impl Sample<'_> {
    /// The value of a label; empty where it has none, as in PromQL.
    pub fn label(&self, name: &str) -> &str {
        self.labels.iter().find(|(key, _)| *key == name).map_or("", |(_, value)| value)
    }
}

/// Why a text is no page of metrics. Always the fault of whoever served it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// It is too long.
    #[error("the page is longer than {TEXT_BYTES_MAX} bytes")]
    TooLong,
    /// It is no text.
    #[error("the page is not UTF-8")]
    NotUtf8,
    /// A line is none of the format.
    #[error("line {line} of the page is no metric: {why}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        why: &'static str,
    },
}

/// The samples of the metrics that are `wanted`, in their order.
///
/// # Errors
/// When any line is none of the format.
pub fn parse(page: &[u8], mut wanted: impl FnMut(&str) -> bool) -> Result<Vec<Sample<'_>>, TextError> {
    if page.len() > TEXT_BYTES_MAX {
        return Err(TextError::TooLong);
    }
    let page = std::str::from_utf8(page).map_err(|_| TextError::NotUtf8)?;
    let mut samples = Vec::new();
    for (index, line) in page.lines().enumerate() {
        let line = line.trim_matches([' ', '\t', '\r']);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let sample = sample(line).map_err(|why| TextError::Line { line: index + 1, why })?;
        if wanted(sample.name) {
            samples.push(sample);
        }
    }
    Ok(samples)
}

/// `name{key="value",…} 12.5 [timestamp] [# exemplar]`
fn sample(line: &str) -> Result<Sample<'_>, &'static str> {
    let end = line.find(|c| !is_name(c)).ok_or("it has no value")?;
    let (name, rest) = line.split_at(end);
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err("it does not begin with a name");
    }
    let (labels, rest) = match rest.trim_start_matches([' ', '\t']).strip_prefix('{') {
        Some(inside) => labels(inside)?,
        None if rest.starts_with([' ', '\t']) => (Vec::new(), rest),
        None => return Err("after its name comes neither a label nor a space"),
    };
    let mut words = rest.split_ascii_whitespace();
    let value = words.next().ok_or("it has no value")?;
    let value = number(value).ok_or("its value is no number")?;
    match words.next() {
        None => {}
        Some(word) if word.starts_with('#') => {}
        Some(time) => {
            number(time).ok_or("its timestamp is no number")?;
            if words.next().is_some_and(|word| !word.starts_with('#')) {
                return Err("something follows its timestamp");
            }
        }
    }
    Ok(Sample { name, labels, value })
}

/// Pairs up to the closing brace, and what follows it.
fn labels(mut rest: &str) -> Result<(Labels<'_>, &str), &'static str> {
    let mut labels = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if let Some(after) = rest.strip_prefix('}') {
            return Ok((labels, after));
        }
        let end = rest.find(|c| !is_name(c)).ok_or("its labels do not end")?;
        let (key, after) = rest.split_at(end);
        let value = after.trim_start_matches([' ', '\t']).strip_prefix('=').ok_or("a label has no value")?;
        let value = value.trim_start_matches([' ', '\t']).strip_prefix('"').ok_or("a label is not quoted")?;
        let (value, after) = quoted(value).ok_or("a quote does not end")?;
        if key.is_empty() || labels.len() == LABELS_MAX {
            return Err("a label has no name, or there are too many");
        }
        labels.push((key, value));
        rest = after;
    }
}

/// The text up to the closing quote, with `\\`, `\"` and `\n` resolved, and what follows the quote.
pub(crate) fn quoted(text: &str) -> Option<(Cow<'_, str>, &str)> {
    let plain = text.find(['"', '\\'])?;
    if text[plain..].starts_with('"') {
        return Some((Cow::Borrowed(&text[..plain]), &text[plain + 1..]));
    }
    let mut value = text[..plain].to_owned();
    let mut chars = text[plain..].char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((Cow::Owned(value), &text[plain + at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            c => value.push(c),
        }
    }
    None
}

/// `12.5`, `1e9`, `+Inf`, `NaN`.
fn number(text: &str) -> Option<f64> {
    text.parse().ok()
}

/// Letters of names of metrics and labels; `:` is of recording rules.
pub(crate) fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | ':')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_formats() {
        let page = concat!(
            "# HELP a_total With \"quotes\".\n# TYPE a_total counter\n",
            "a_total{method=\"post\",code=\"200\",} 1027 1395066363000\n",
            "a_total { path = \"C:\\\\DIR\\\\\", error = \"say \\\"no\\\"\\nnow\" } 3 # {trace_id=\"x\"} 0.67\r\n",
            "inf +Inf\nnone NaN 1.5 # {} 1\nneg -1.5e-3\n\n# EOF\n",
        );
        let samples = parse(page.as_bytes(), |name| name != "neg").unwrap();
        assert_eq!(samples.len(), 4);
        assert_eq!((samples[0].name, samples[0].value, samples[0].label("code")), ("a_total", 1027.0, "200"));
        assert_eq!((samples[0].label("nothing"), samples[0].labels.len()), ("", 2));
        assert_eq!(samples[1].label("path"), "C:\\DIR\\");
        assert_eq!(samples[1].label("error"), "say \"no\"\nnow");
        assert!(samples[2].value.is_infinite() && samples[3].value.is_nan());
    }

    #[test]
    fn what_is_no_page_is_said_with_its_line() {
        let said = |page: &str| parse(page.as_bytes(), |_| true).unwrap_err().to_string();
        assert_eq!(said("a 1\n<html>"), "line 2 of the page is no metric: it does not begin with a name");
        for (page, why) in [
            ("a", "it has no value"),
            ("a{b=\"c\"}", "it has no value"),
            ("a x", "its value is no number"),
            ("a 1 x", "its timestamp is no number"),
            ("a 1 2 3", "something follows its timestamp"),
            ("a{b=\"c} 1", "a quote does not end"),
            ("a{b} 1", "a label has no value"),
            ("a{b=c} 1", "a label is not quoted"),
            ("a{b", "its labels do not end"),
            ("1a 1", "it does not begin with a name"),
            ("a-b 1", "after its name comes neither a label nor a space"),
            ("{\"cpu\": 1}", "it does not begin with a name"),
        ] {
            assert_eq!(said(page), format!("line 1 of the page is no metric: {why}"), "{page}");
        }
        assert_eq!(parse(&[b'\n'; TEXT_BYTES_MAX + 1], |_| true), Err(TextError::TooLong));
        assert_eq!(parse(&[0xff], |_| true), Err(TextError::NotUtf8));
    }

    proptest! {
        #[test]
        fn nothing_panics(page in "[a{}=\",\\\\ #1\\n\\PC]{0,48}") {
            let _ = parse(page.as_bytes(), |_| true);
        }
    }
}
