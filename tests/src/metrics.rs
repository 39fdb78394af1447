//! A scrape of `/metrics`, to ask for values.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use crate::get;

/// All series at one moment.
#[derive(Debug, Clone)]
pub struct Metrics {
    text: String,
    series: Vec<Series>,
}

#[derive(Debug, Clone)]
struct Series {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Scrapes.
    ///
    /// # Panics
    /// When nobody answers, or not with metrics.
    #[track_caller]
    pub fn scrape(http: SocketAddr) -> Self {
        let answer = get(http, "/metrics").unwrap_or_else(|error| panic!("http://{http}/metrics: {error}"));
        assert_eq!(answer.status, 200, "{}", answer.body);
        let lines = answer.body.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        let series =
            lines.map(|line| parse(line).unwrap_or_else(|| panic!("not a metric: {line}"))).collect();
        Self { text: answer.body, series }
    }

    /// As it was scraped.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Sum of all series of that name which have these labels; 0 when there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|series| series.value).sum()
    }

    /// Values of a label, over all series of that name.
    pub fn label_values(&self, name: &str, label: &str) -> BTreeSet<String> {
        self.matching(name, &[]).filter_map(|series| series.labels.get(label).cloned()).collect()
    }

    /// Flows that were given to a resource.
    pub fn opened(&self, resource: &str) -> u64 {
        // A count below 2^53: exact.
        self.sum("trimtab_resource_flows_opened_total", &[("resource", resource)]) as u64
    }

    fn matching<'s>(&'s self, name: &'s str, labels: &'s [(&str, &str)]) -> impl Iterator<Item = &'s Series> {
        self.series.iter().filter(move |series| {
            series.name == name
                && labels.iter().all(|(key, value)| series.labels.get(*key).is_some_and(|mine| mine == value))
        })
    }
}

/// `name{key="value",…} 12`, in which no label has a quote.
fn parse(line: &str) -> Option<Series> {
    let (what, value) = line.rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let Some((name, labels)) = what.split_once('{') else {
        return Some(Series { name: what.to_owned(), labels: BTreeMap::new(), value });
    };
    let labels = labels.strip_suffix("\"}")?.split("\",").map(|pair| {
        let (key, value) = pair.split_once("=\"")?;
        Some((key.to_owned(), value.to_owned()))
    });
    Some(Series { name: name.to_owned(), labels: labels.collect::<Option<_>>()?, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_text_format() {
        let series = parse("a_total{pool=\"sql\",resource=\"pg 1, {x}\"} 12").expect("a line");
        assert_eq!((series.name.as_str(), series.value), ("a_total", 12.0));
        assert_eq!(series.labels["resource"], "pg 1, {x}");
        assert_eq!(parse("up 1").expect("a line").labels.len(), 0);
        assert!(parse("nonsense").is_none() && parse("a{b} 1").is_none() && parse("a x").is_none());
    }
}
