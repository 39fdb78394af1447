//! From runs to means, ratios and verdicts; as Markdown and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use super::balancer::Contender;
use super::metric::{Metric, Summary};
use super::scenario::{Bound, Scenario, Test};

/// Everything that came out.
#[derive(Debug, Serialize)]
pub struct Report {
    seeds: u64,
    scenarios: Vec<ScenarioReport>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ScenarioReport {
    name: &'static str,
    about: String,
    metrics: Vec<String>,
    rows: Vec<Row>,
    verdicts: Vec<Verdict>,
}

/// One policy in one case.
#[derive(Debug, Serialize)]
struct Row {
    case: String,
    policy: String,
    figures: Vec<Shown>,
    /// The subject's first figure over this policy's, of the mean of the ratios seed by seed.
    subject_over_it: Option<Summary>,
}

#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    summary: Summary,
    by_seed: Vec<f64>,
    #[serde(skip)]
    text: String,
}

#[derive(Debug, Serialize)]
struct Verdict {
    case: String,
    figure: String,
    bound: String,
    measured: String,
    reached: bool,
    aim_reached: Option<bool>,
}

/// What each policy gave in each case: by case, by policy, by metric, by seed.
pub(crate) type Figures = Vec<Vec<Vec<Vec<f64>>>>;

impl Report {
    /// Of these scenarios.
    pub(crate) fn new(seeds: u64, scenarios: Vec<ScenarioReport>) -> Self {
        Self { seeds, scenarios }
    }

    /// Bounds that were missed.
    pub fn missed(&self) -> usize {
        self.scenarios.iter().flat_map(|scenario| &scenario.verdicts).filter(|v| !v.reached).count()
    }

    /// All tables.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "Means over {} seeds ± half of the 95 % confidence interval. A failed flow counts as one that took as long \
             as the timeout. The last column is the first figure of the first policy over that of this one.\n",
            self.seeds
        );
        for scenario in &self.scenarios {
            scenario.write(&mut text);
        }
        text
    }
}

impl ScenarioReport {
    /// From the figures of a scenario.
    pub(crate) fn new(scenario: &Scenario, contenders: &[Contender], figures: &Figures) -> Self {
        let mut rows = Vec::new();
        for ((case, _), by_policy) in scenario.cases.iter().zip(figures) {
            let subject = &by_policy[0][0];
            for (place, (contender, by_metric)) in contenders.iter().zip(by_policy).enumerate() {
                let shown = |(metric, by_seed): (&Metric, &Vec<f64>)| {
                    let summary = Summary::of(by_seed);
                    let text = format!("{} ± {}", metric.show(summary.mean), metric.show(summary.half));
                    Shown { summary, by_seed: by_seed.clone(), text }
                };
                rows.push(Row {
                    case: case.clone(),
                    policy: contender.to_string(),
                    figures: scenario.metrics.iter().zip(by_metric).map(shown).collect(),
                    subject_over_it: (place > 0).then(|| Summary::of(&ratios(subject, &by_metric[0]))),
                });
            }
        }
        let mut verdicts = Vec::new();
        for bound in &scenario.bounds {
            let cases = scenario.cases.iter().zip(figures).enumerate();
            for (_, ((case, _), by_policy)) in
                cases.filter(|(place, _)| (bound.cases.0..bound.cases.1).contains(place))
            {
                verdicts.extend(judge(bound, scenario, case, contenders, by_policy));
            }
        }
        let metrics = scenario.metrics.iter().map(Metric::to_string).collect();
        Self { name: scenario.name, about: scenario.about.clone(), metrics, rows, verdicts }
    }

    fn write(&self, text: &mut String) {
        let heads = self.metrics.join(" | ");
        let rules = "--:|".repeat(self.metrics.len());
        let mut line = |line: String| writeln!(text, "{line}").expect("a String takes all");
        line(format!("\n### {}\n\n{}\n", self.name, self.about));
        line(format!("| case | policy | {heads} | ratio |\n|---|---|{rules}--:|"));
        let mut before = "";
        for row in &self.rows {
            let case = if row.case == before { "" } else { &row.case };
            before = &row.case;
            let figures: Vec<&str> = row.figures.iter().map(|shown| shown.text.as_str()).collect();
            let ratio = row.subject_over_it.map_or_else(String::new, show_ratio);
            line(format!("| {case} | {} | {} | {ratio} |", row.policy, figures.join(" | ")));
        }
        line("\n| bound | case | measured | |\n|---|---|--:|---|".to_owned());
        for verdict in &self.verdicts {
            let reached = match (verdict.reached, verdict.aim_reached) {
                (true, None | Some(true)) => "reached",
                (true, Some(false)) => "reached, not the aim",
                (false, _) => "**missed**",
            };
            let Verdict { case, figure, bound, measured, .. } = verdict;
            line(format!("| {figure} {bound} | {case} | {measured} | {reached} |"));
        }
    }
}

fn show_ratio(summary: Summary) -> String {
    if summary.mean.is_finite() {
        format!("{:.3} ± {:.3}", summary.mean, summary.half)
    } else {
        String::new()
    }
}

/// Seed by seed.
fn ratios(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect()
}

/// None where not everyone it speaks of took part.
fn judge(
    bound: &Bound,
    scenario: &Scenario,
    case: &str,
    contenders: &[Contender],
    by_policy: &[Vec<Vec<f64>>],
) -> Option<Verdict> {
    let metric = scenario.metrics.iter().position(|metric| *metric == bound.metric)?;
    let of = |contender| Some(&by_policy[contenders.iter().position(|c| *c == contender)?][metric]);
    let ours = of(bound.of)?;
    let show = |summary: Summary| {
        format!("{} ± {}", bound.metric.show(summary.mean), bound.metric.show(summary.half))
    };
    let own = Summary::of(ours);
    let (text, measured, figure, reached) = match bound.test {
        Test::Times(rival, most) => {
            let ratio = Summary::of(&ratios(ours, of(rival)?));
            (format!("≤ {most} x {rival}"), show_ratio(ratio), ratio.mean, ratio.mean <= most)
        }
        Test::NotMoreThan(rival) => {
            let theirs = Summary::of(of(rival)?);
            let measured = format!("{}, {rival} {}", show(own), show(theirs));
            (format!("≤ {rival}"), measured, own.mean, own.mean <= theirs.mean)
        }
        Test::AtMost(most) => {
            (format!("≤ {}", bound.metric.show(most)), show(own), own.mean, own.mean <= most)
        }
        Test::AtLeast(least) => {
            (format!("≥ {}", bound.metric.show(least)), show(own), own.mean, own.mean >= least)
        }
    };
    Some(Verdict {
        case: case.to_owned(),
        figure: format!("{}: {}", bound.of, bound.metric),
        bound: bound.aim.map_or_else(|| text.clone(), |aim| format!("{text} (aim {aim})")),
        measured,
        reached,
        aim_reached: bound.aim.map(|aim| figure <= aim),
    })
}
