//! From windows to tables: figures of each balancer, and ratios within rounds with how sure they are.

use std::fmt::{self, Write as _};
use std::net::SocketAddr;

use serde::Serialize;

use super::balancer::{self, Balancer, Places};
use super::random::Random;
use super::scenario::{BACKENDS, Scenario};
use super::window::{Machine, Window, at_quantile};
use crate::report::{Summary, figure};

/// What trimtab's 99th percentile may be of another's.
const GOALS: [(Balancer, f64); 2] =
    [(Balancer::HaproxyLeastconn, 0.75), (Balancer::HaproxyRoundrobinAgent, 0.5)];
/// How far throughputs may differ.
const THROUGHPUT_WITHIN: f64 = 0.02;
/// Draws for an interval of confidence.
const RESAMPLES: usize = 10_000;
/// Windows in which requests were sent or answered later than this by the harness say little about balancers.
pub(super) const LATE_MAX_MILLIS: f64 = 10.0;

/// Everything there is to say about a race.
#[derive(Debug, Serialize)]
pub struct Report {
    kernel: String,
    versions: Vec<String>,
    scenario: Scenario,
    nominal_rate: f64,
    mean_rate: f64,
    arrival_rate: f64,
    balancers: Vec<BalancerReport>,
    comparisons: Vec<Comparison>,
    verdicts: Vec<Verdict>,
    windows: Vec<Window>,
}

#[derive(Debug, Serialize)]
struct BalancerReport {
    balancer: Balancer,
    configuration: String,
    requests: usize,
    failed: usize,
    timed_out: usize,
    /// Of the windows' figures.
    mean: Summary,
    p50: Summary,
    p99: Summary,
    p999: Summary,
    throughput: Summary,
    /// Of all requests of all windows.
    pooled_p99: f64,
    pooled_p999: f64,
    /// Utilization of the busiest backend over the mean, averaged over windows.
    busiest_over_mean: f64,
    balancer_busy: f64,
}

/// trimtab's figure over another's, round by round.
#[derive(Debug, Serialize)]
struct Comparison {
    balancer: Balancer,
    over: Balancer,
    mean: Ratio,
    p99: Ratio,
    p999: Ratio,
    throughput: Ratio,
}

#[derive(Debug, Serialize)]
struct Ratio {
    rounds: Vec<f64>,
    median: f64,
    /// 95 %, of the median.
    interval: (f64, f64),
}

#[derive(Debug, Serialize)]
struct Verdict {
    what: String,
    median: f64,
    interval: (f64, f64),
    met: bool,
    /// The whole interval says the same.
    sure: bool,
}

impl Report {
    /// Puts together what the windows brought.
    pub fn new(scenario: &Scenario, balancers: &[Balancer], machine: &Machine, windows: Vec<Window>) -> Self {
        let of = |balancer| windows.iter().filter(|w| w.balancer == balancer).collect::<Vec<_>>();
        let reports = balancers.iter().filter_map(|b| balancer_report(*b, &of(*b), scenario)).collect();
        let leader = balancers.first().copied().unwrap_or(Balancer::TrimtabAdaptive);
        let comparisons: Vec<Comparison> =
            balancers[1..].iter().map(|other| comparison(leader, *other, &of(leader), &of(*other))).collect();
        let verdicts = comparisons.iter().flat_map(verdicts).collect();
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            kernel: kernel.trim().to_owned(),
            versions: machine.installed.iter().map(|installed| installed.version.clone()).collect(),
            scenario: scenario.clone(),
            nominal_rate: scenario.nominal_rate(),
            mean_rate: scenario.mean_rate(),
            arrival_rate: scenario.arrival_rate(),
            balancers: reports,
            comparisons,
            verdicts,
            windows,
        }
    }

    /// Tables to paste into a page.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a String takes all");
        text
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        self.write_head(text)?;
        writeln!(
            text,
            "| | mean ms | p50 ms | p99 ms | p99.9 ms | p99 of all | p99.9 of all | answers/s | failed | timed out | busiest backend / mean | balancer's processor |"
        )?;
        writeln!(text, "|---{}|", "|--:".repeat(11))?;
        for b in &self.balancers {
            writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {:.2} | {:.1} % |",
                b.balancer,
                cell(&b.mean),
                cell(&b.p50),
                cell(&b.p99),
                cell(&b.p999),
                figure(b.pooled_p99),
                figure(b.pooled_p999),
                cell(&b.throughput),
                b.failed,
                b.timed_out,
                b.busiest_over_mean,
                b.balancer_busy * 100.0
            )?;
        }
        self.write_comparisons(text)?;
        self.write_configurations(text)
    }

    fn write_head(&self, text: &mut String) -> fmt::Result {
        let Scenario { slots, mean_work, slow, load, warmup, window, .. } = &self.scenario;
        let (least, most) = self.scenario.holds;
        let antagonist = match self.scenario.antagonist {
            true => {
                format!("2 or 3 of them lose 50 to 70 % of their speed, others after {least} to {most} s")
            }
            false => "no antagonist".to_owned(),
        };
        let rounds = self.balancers.first().map_or(0, |b| b.p99.rounds.len());
        writeln!(text, "Linux {}; {}.", self.kernel, self.versions.join("; "))?;
        writeln!(
            text,
            "{BACKENDS} backends of {slots} slots, half of them at speed {slow}; work {:?}, mean {:.0} ms; {antagonist}. Nominal capacity {:.0}/s, mean capacity beside the antagonist {:.0}/s, load {load} of the latter: {:.0} requests/s, one connection each.",
            self.scenario.shape,
            mean_work * 1e3,
            self.nominal_rate,
            self.mean_rate,
            self.arrival_rate
        )?;
        writeln!(
            text,
            "{rounds} rounds of {window} s after {warmup} s of warm-up; median of the windows (least to largest).\n"
        )?;
        let late = |w: &&Window| w.late() > LATE_MAX_MILLIS;
        let disturbed = self.windows.iter().filter(late).count();
        if disturbed > 0 {
            writeln!(
                text,
                "**Disturbed**: in {disturbed} of {} windows the harness itself was more than {LATE_MAX_MILLIS} ms late (p99).\n",
                self.windows.len()
            )?;
        }
        Ok(())
    }

    fn write_comparisons(&self, text: &mut String) -> fmt::Result {
        let Some(leader) = self.comparisons.first().map(|c| c.balancer) else { return Ok(()) };
        writeln!(text, "\n{leader} over the others: median of the rounds' ratios [95 % of the median]\n")?;
        writeln!(text, "| over | mean | p99 | p99.9 | throughput | p99 by round |")?;
        writeln!(text, "|---|--:|--:|--:|--:|---|")?;
        for c in &self.comparisons {
            let rounds: Vec<String> = c.p99.rounds.iter().map(|ratio| format!("{ratio:.2}")).collect();
            writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} |",
                c.over,
                c.mean,
                c.p99,
                c.p999,
                c.throughput,
                rounds.join(" ")
            )?;
        }
        if !self.verdicts.is_empty() {
            writeln!(text)?;
        }
        for verdict in &self.verdicts {
            let Verdict { what, median, interval, met, sure } = verdict;
            let says = if *met { "met" } else { "**missed**" };
            let how = if *sure { "" } else { ", but the interval reaches over the bound" };
            writeln!(text, "* {what}: {says} ({median:.3} [{:.3}, {:.3}]{how})", interval.0, interval.1)?;
        }
        Ok(())
    }

    fn write_configurations(&self, text: &mut String) -> fmt::Result {
        writeln!(
            text,
            "\nAgent checks answer `round(100 * w / mean w) %`, 1 to 256, with w = (requests/s averaged over 3 s) / (busy part of the slots averaged over 3 s), from the same readings as trimtab's reports, each second.\n"
        )?;
        for b in &self.balancers {
            // Servers differ by their numbers only.
            let shown: Vec<&str> = b
                .configuration
                .lines()
                .filter(|line| !line.contains("server b") || line.contains("b0 "))
                .collect();
            writeln!(
                text,
                "<details><summary>{}</summary>\n\n```\n{}\n```\n</details>\n",
                b.balancer,
                shown.join("\n")
            )?;
        }
        Ok(())
    }
}

fn cell(summary: &Summary) -> String {
    format!("{} ({}–{})", figure(summary.median), figure(summary.min), figure(summary.max))
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (least, most) = self.interval;
        write!(f, "{:.2} [{least:.2}, {most:.2}]", self.median)
    }
}

fn balancer_report(balancer: Balancer, windows: &[&Window], scenario: &Scenario) -> Option<BalancerReport> {
    let summary = |value: fn(&Window) -> f64| Summary::of(windows.iter().map(|w| value(w)).collect());
    let mut pooled: Vec<f64> = windows.iter().flat_map(|w| w.latencies.iter().copied()).collect();
    pooled.sort_by(f64::total_cmp);
    let mean_of = |value: &dyn Fn(&Window) -> f64| {
        windows.iter().map(|w| value(w)).sum::<f64>() / windows.len().max(1) as f64
    };
    let uneven = |w: &Window| {
        let mean = w.backend_busy.iter().sum::<f64>() / w.backend_busy.len().max(1) as f64;
        w.backend_busy.iter().copied().fold(0.0, f64::max) / mean
    };
    Some(BalancerReport {
        balancer,
        configuration: balancer::configuration(balancer, &example(scenario)),
        requests: windows.iter().map(|w| w.requests).sum(),
        failed: windows.iter().map(|w| w.failed).sum(),
        timed_out: windows.iter().map(|w| w.timed_out).sum(),
        mean: summary(|w| w.mean)?,
        p50: summary(|w| w.p50)?,
        p99: summary(|w| w.p99)?,
        p999: summary(|w| w.p999)?,
        throughput: summary(|w| w.throughput)?,
        pooled_p99: at_quantile(&pooled, 0.99),
        pooled_p999: at_quantile(&pooled, 0.999),
        busiest_over_mean: mean_of(&uneven),
        balancer_busy: mean_of(&|w| w.balancer_busy),
    })
}

/// Addresses to show a configuration with.
fn example(scenario: &Scenario) -> Places {
    let address = |port: usize| SocketAddr::from(([127, 0, 0, 1], port as u16));
    Places {
        listen: address(10_000),
        control: address(7400),
        http: address(7480),
        backends: (0..BACKENDS).map(|b| address(10_100 + b)).collect(),
        agents: (0..BACKENDS).map(|b| address(10_200 + b)).collect(),
        speeds: (0..BACKENDS).map(|b| scenario.speed(b)).collect(),
    }
}

fn comparison(balancer: Balancer, over: Balancer, ours: &[&Window], theirs: &[&Window]) -> Comparison {
    let ratio = |value: fn(&Window) -> f64| {
        Ratio::of(ours.iter().zip(theirs).map(|(ours, theirs)| value(ours) / value(theirs)).collect())
    };
    let [mean, p99, p999, throughput] =
        [ratio(|w| w.mean), ratio(|w| w.p99), ratio(|w| w.p999), ratio(|w| w.throughput)];
    Comparison { balancer, over, mean, p99, p999, throughput }
}

impl Ratio {
    fn of(rounds: Vec<f64>) -> Self {
        let interval = interval_of_median(&rounds);
        Self { median: median(rounds.clone()), interval, rounds }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// 95 % of the medians of as many values drawn from these with replacement (bootstrap).
fn interval_of_median(values: &[f64]) -> (f64, f64) {
    let mut random = Random::new(0, 4);
    let drawn = |random: &mut Random| values[random.below(values.len())];
    let mut medians: Vec<f64> =
        (0..RESAMPLES).map(|_| median(values.iter().map(|_| drawn(&mut random)).collect())).collect();
    medians.sort_by(f64::total_cmp);
    (at_quantile(&medians, 0.025), at_quantile(&medians, 0.975))
}

/// What is asked of trimtab's default policy; nothing is of others.
fn verdicts(comparison: &Comparison) -> Vec<Verdict> {
    let Comparison { balancer, over, p99, throughput, .. } = comparison;
    let mut verdicts = Vec::new();
    if *balancer != Balancer::TrimtabAdaptive {
        return verdicts;
    }
    if let Some((_, most)) = GOALS.iter().find(|(goal, _)| goal == over) {
        let met = p99.median <= *most;
        verdicts.push(Verdict {
            what: format!("p99 at most {most} of {over}"),
            median: p99.median,
            interval: p99.interval,
            met,
            sure: if met { p99.interval.1 <= *most } else { p99.interval.0 > *most },
        });
        let within = |ratio: f64| (ratio - 1.0).abs() <= THROUGHPUT_WITHIN;
        let met = within(throughput.median);
        let ends = (within(throughput.interval.0), within(throughput.interval.1));
        verdicts.push(Verdict {
            what: format!("throughput within {:.0} % of {over}", THROUGHPUT_WITHIN * 100.0),
            median: throughput.median,
            interval: throughput.interval,
            met,
            sure: if met { ends == (true, true) } else { ends == (false, false) },
        });
    }
    verdicts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_holds_the_median_and_narrows_where_rounds_agree() {
        let wide = Ratio::of(vec![0.4, 0.9, 0.6, 0.7, 0.5]);
        let narrow = Ratio::of(vec![0.60, 0.61, 0.59, 0.60, 0.62]);
        assert!(wide.interval.0 <= wide.median && wide.median <= wide.interval.1);
        assert!(narrow.interval.1 - narrow.interval.0 < wide.interval.1 - wide.interval.0);
        assert_eq!(median(vec![3.0, 1.0, 2.0, 4.0]), 2.5);
    }

    #[test]
    fn a_verdict_is_sure_only_if_the_whole_interval_is_on_one_side() {
        let ratio = |median, interval| Ratio { rounds: Vec::new(), median, interval };
        let compare = |p99, throughput| Comparison {
            balancer: Balancer::TrimtabAdaptive,
            over: Balancer::HaproxyLeastconn,
            mean: ratio(1.0, (1.0, 1.0)),
            p99,
            p999: ratio(1.0, (1.0, 1.0)),
            throughput,
        };
        let says = |comparison: &Comparison| {
            verdicts(comparison).iter().map(|v| (v.met, v.sure)).collect::<Vec<_>>()
        };
        let good = compare(ratio(0.7, (0.6, 0.74)), ratio(1.0, (0.99, 1.01)));
        assert_eq!(says(&good), [(true, true), (true, true)]);
        let unsure = compare(ratio(0.7, (0.6, 0.8)), ratio(1.0, (0.9, 1.01)));
        assert_eq!(says(&unsure), [(true, false), (true, false)]);
        let bad = compare(ratio(0.9, (0.8, 1.0)), ratio(1.1, (1.05, 1.2)));
        assert_eq!(says(&bad), [(false, true), (false, true)]);
    }
}
