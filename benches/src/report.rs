//! From samples to medians, ranges and ratios; as Markdown and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::case::{Case, Goal, Metric};
use crate::measure::Conditions;
use crate::peer::{self, Installed, Proxy, Setup, Task};
use crate::rounds::{FOREIGN_MAX, Outcome, Plan};

/// Everything there is to say about a run.
#[derive(Debug, Serialize)]
pub struct Report {
    environment: Environment,
    settings: Settings,
    proxies: Vec<ProxyReport>,
    cases: Vec<CaseReport>,
    failures: Vec<FailureReport>,
    /// The most that other processes used of either processor in any window, 0 to 1.
    foreign_busy_max: f64,
    /// False where others were busy too, something failed, or the run was cut short.
    fit_to_publish: bool,
}

#[derive(Debug, Serialize)]
struct Environment {
    kernel: String,
    processor: String,
    processors: usize,
    /// It decides how bulk is paced.
    congestion_control: String,
    load_average_after: String,
    measured_at_unix_seconds: u64,
}

#[derive(Debug, Serialize)]
struct Settings {
    rounds: usize,
    warmup_seconds: f64,
    window_seconds: f64,
    proxy_cpu: usize,
    load_cpu: usize,
    retries: usize,
    rate: Option<f64>,
    interrupted: bool,
}

#[derive(Debug, Serialize)]
struct ProxyReport {
    #[serde(flatten)]
    installed: Installed,
    setup: Setup,
    setup_bulk: Setup,
    setup_udp: Setup,
}

#[derive(Debug, Serialize)]
struct CaseReport {
    case: Case,
    about: &'static str,
    metrics: Vec<MetricReport>,
}

#[derive(Debug, Serialize)]
struct MetricReport {
    metric: Metric,
    title: &'static str,
    less_is_better: bool,
    /// Whether the table shows it.
    shown: bool,
    proxies: BTreeMap<Proxy, Summary>,
    /// trimtab's figure over a peer's: each round's ratio is taken within the round.
    trimtab_over: BTreeMap<Proxy, Summary>,
    /// The peer with the best median.
    best_peer: Option<Proxy>,
    goal: Option<GoalReport>,
}

#[derive(Debug, Serialize)]
struct GoalReport {
    what: String,
    reached: Option<bool>,
}

#[derive(Debug, Serialize)]
struct FailureReport {
    round: usize,
    case: Case,
    proxy: Proxy,
    error: String,
}

/// One figure over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// A quarter is at or below it.
    pub quartile_1: f64,
    /// A quarter is at or above it.
    pub quartile_3: f64,
    /// The largest.
    pub max: f64,
    /// All, in the order they were measured.
    pub rounds: Vec<f64>,
}

impl Summary {
    /// None without values.
    pub fn of(rounds: Vec<f64>) -> Option<Self> {
        let mut sorted = rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let (first, last) = (*sorted.first()?, *sorted.last()?);
        Some(Self {
            median: quantile(&sorted, 0.5),
            min: first,
            quartile_1: quantile(&sorted, 0.25),
            quartile_3: quantile(&sorted, 0.75),
            max: last,
            rounds,
        })
    }
}

impl Report {
    /// Puts together what a run brought.
    pub fn new(plan: &Plan, conditions: &Conditions, outcome: &Outcome) -> Self {
        let cases: Vec<CaseReport> = plan.cases.iter().map(|case| case_report(*case, outcome)).collect();
        let foreign = outcome.measured.iter().filter_map(|m| m.sample.get(&Metric::ForeignBusy));
        let foreign_busy_max = foreign.copied().fold(0.0, f64::max);
        let failures: Vec<FailureReport> = outcome
            .failures
            .iter()
            .map(|f| FailureReport { round: f.round, case: f.case, proxy: f.proxy, error: f.error.clone() })
            .collect();
        let settings = Settings {
            rounds: plan.rounds,
            warmup_seconds: conditions.warmup.as_secs_f64(),
            window_seconds: conditions.window.as_secs_f64(),
            proxy_cpu: conditions.proxy_cpu,
            load_cpu: conditions.load_cpu,
            retries: plan.retries,
            rate: outcome.rate,
            interrupted: outcome.interrupted,
        };
        Self {
            environment: environment(),
            settings,
            proxies: plan.proxies.iter().map(proxy_report).collect(),
            cases,
            fit_to_publish: foreign_busy_max <= FOREIGN_MAX && failures.is_empty() && !outcome.interrupted,
            failures,
            foreign_busy_max,
        }
    }

    /// Tables to paste into a page.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        self.write_head(&mut text).expect("a String takes all");
        for case in &self.cases {
            self.write_case(&mut text, case).expect("a String takes all");
        }
        for failure in &self.failures {
            let FailureReport { round, case, proxy, error } = failure;
            writeln!(text, "Failed in round {}: {} on {proxy}: {error}\n", round + 1, case.name())
                .expect("a String takes all");
        }
        text
    }

    fn write_head(&self, text: &mut String) -> std::fmt::Result {
        let Environment { kernel, processor, processors, congestion_control, .. } = &self.environment;
        let Settings { rounds, window_seconds, warmup_seconds, proxy_cpu, load_cpu, .. } = self.settings;
        writeln!(
            text,
            "Linux {kernel} ({congestion_control}), {processor}, {processors} processors; proxies on {proxy_cpu}, load on {load_cpu}."
        )?;
        let versions: Vec<String> = self
            .proxies
            .iter()
            .filter(|p| p.installed.proxy != Proxy::Direct)
            .map(|p| p.installed.version.clone())
            .collect();
        writeln!(text, "{}.", versions.join("; "))?;
        writeln!(
            text,
            "{rounds} rounds of {window_seconds} s after {warmup_seconds} s of warm-up; median (least to largest).\n"
        )?;
        if !self.fit_to_publish {
            let percent = self.foreign_busy_max * 100.0;
            let cut = if self.settings.interrupted { ", the run was cut short" } else { "" };
            let failed = self.failures.len();
            writeln!(
                text,
                "**Not fit to publish**: others used up to {percent:.0} % of a processor, {failed} measurements failed{cut}.\n"
            )?;
        }
        Ok(())
    }

    fn write_case(&self, text: &mut String, case: &CaseReport) -> std::fmt::Result {
        let columns: Vec<Proxy> = self.proxies.iter().map(|p| p.installed.proxy).collect();
        let trimtab = columns.contains(&Proxy::Trimtab);
        let peers: Vec<Proxy> = columns.iter().copied().filter(|p| p.is_compared() && trimtab).collect();
        let rate = self.settings.rate.filter(|_| case.case == Case::Ping64x64AtRate);
        let rate = rate.map(|rate| format!(" ({rate} op/s)")).unwrap_or_default();
        writeln!(text, "### {}: {}{rate}\n", case.case.name(), case.about)?;
        let mut head: Vec<String> = vec![String::new()];
        head.extend(columns.iter().map(|p| p.to_string()));
        head.extend(peers.iter().map(|p| format!("/ {p}")));
        head.extend((!peers.is_empty()).then(|| "/ best peer".to_owned()));
        let goals = case.metrics.iter().any(|m| m.shown && m.goal.is_some()) && trimtab;
        head.extend(goals.then(|| "goal".to_owned()));
        writeln!(text, "| {} |", head.join(" | "))?;
        writeln!(text, "|---{}|", "|--:".repeat(head.len() - 1))?;
        for metric in case.metrics.iter().filter(|m| m.shown) {
            let mut row = vec![metric.title.to_owned()];
            row.extend(columns.iter().map(|p| metric.proxies.get(p).map(cell).unwrap_or_default()));
            row.extend(peers.iter().map(|p| metric.trimtab_over.get(p).map(cell_ratio).unwrap_or_default()));
            if !peers.is_empty() {
                let best = metric.best_peer.and_then(|p| metric.trimtab_over.get(&p));
                row.push(best.map(|s| format!("**{:.2}**", s.median)).unwrap_or_default());
            }
            if goals {
                row.push(metric.goal.as_ref().map(goal_cell).unwrap_or_default());
            }
            writeln!(text, "| {} |", row.join(" | "))?;
        }
        writeln!(text)
    }
}

/// A figure with three digits or so.
pub fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn cell(summary: &Summary) -> String {
    format!("{} ({}–{})", figure(summary.median), figure(summary.min), figure(summary.max))
}

fn cell_ratio(summary: &Summary) -> String {
    format!("{:.2} ({:.2}–{:.2})", summary.median, summary.min, summary.max)
}

fn goal_cell(goal: &GoalReport) -> String {
    let reached = match goal.reached {
        Some(true) => "reached",
        Some(false) => "**missed**",
        None => "not measured",
    };
    format!("{}: {reached}", goal.what)
}

fn case_report(case: Case, outcome: &Outcome) -> CaseReport {
    let mut metrics: Vec<Metric> = case.metrics().to_vec();
    for measured in outcome.measured.iter().filter(|m| m.case == case) {
        metrics.extend(measured.sample.keys());
    }
    let mut seen = std::collections::BTreeSet::new();
    metrics.retain(|m| seen.insert(*m));
    CaseReport {
        case,
        about: case.about(),
        metrics: metrics.into_iter().map(|m| metric_report(case, m, outcome)).collect(),
    }
}

fn metric_report(case: Case, metric: Metric, outcome: &Outcome) -> MetricReport {
    let values = |proxy: Proxy| -> BTreeMap<usize, f64> {
        let of_proxy = outcome.measured.iter().filter(|m| m.case == case && m.proxy == proxy);
        of_proxy.filter_map(|m| m.sample.get(&metric).map(|v| (m.round, *v))).collect()
    };
    let summary = |proxy| Summary::of(values(proxy).into_values().collect());
    let proxies: BTreeMap<Proxy, Summary> =
        Proxy::ALL.into_iter().filter_map(|p| Some((p, summary(p)?))).collect();
    let ours = values(Proxy::Trimtab);
    let ratios = |peer| {
        let theirs = values(peer);
        Summary::of(
            ours.iter()
                .filter_map(|(round, v)| Some(v / theirs.get(round)?))
                .filter(|r| r.is_finite())
                .collect(),
        )
    };
    let trimtab_over: BTreeMap<Proxy, Summary> =
        Proxy::ALL.into_iter().filter(|p| p.is_compared()).filter_map(|p| Some((p, ratios(p)?))).collect();
    let better = |a: &&Proxy, b: &&Proxy| {
        let order = proxies[a].median.total_cmp(&proxies[b].median);
        if metric.less_is_better() { order } else { order.reverse() }
    };
    let best_peer = proxies.keys().filter(|p| p.is_peer()).min_by(better).copied();
    let over_best = best_peer.and_then(|p| trimtab_over.get(&p)).map(|s| s.median);
    let goal = case.goal(metric).map(|goal| match goal {
        Goal::OfBestPeer(most) => {
            GoalReport { what: format!("≤ {most} of best"), reached: over_best.map(|r| r <= most) }
        }
        Goal::AtMost(most) => GoalReport {
            what: format!("≤ {most}"),
            reached: proxies.get(&Proxy::Trimtab).map(|s| s.median <= most),
        },
    });
    let shown = case.metrics().contains(&metric);
    let (title, less_is_better) = (metric.title(), metric.less_is_better());
    MetricReport { metric, title, less_is_better, shown, proxies, trimtab_over, best_peer, goal }
}

fn proxy_report(installed: &Installed) -> ProxyReport {
    let any = |last: u8, port: u16| SocketAddr::from(([127, 0, 0, last], port));
    let task = |bulk, udp| Task {
        listen: any(1, 10_000),
        backends: vec![any(1, 10_001), any(2, 10_002)],
        bulk,
        udp: udp && installed.proxy.carries(Case::Udp64),
        workers: 1,
    };
    ProxyReport {
        installed: installed.clone(),
        setup: peer::setup(installed.proxy, &task(false, false)),
        setup_bulk: peer::setup(installed.proxy, &task(true, false)),
        setup_udp: peer::setup(installed.proxy, &task(false, true)),
    }
}

fn environment() -> Environment {
    let read = |path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or(": unknown processor");
    Environment {
        kernel: read("/proc/sys/kernel/osrelease"),
        processor: model.trim_start_matches(['\t', ' ', ':']).to_owned(),
        // Not `available_parallelism`: this thread is pinned to one of them.
        processors: cpuinfo.lines().filter(|l| l.starts_with("processor")).count(),
        congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control"),
        load_average_after: read("/proc/loadavg"),
        measured_at_unix_seconds: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
    }
}

/// Between the neighbours where it falls between two.
fn quantile(sorted: &[f64], at: f64) -> f64 {
    let place = at * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Sample;
    use crate::rounds::Measured;

    fn outcome(figures: &[(Proxy, &[f64])]) -> Outcome {
        let mut outcome = Outcome::default();
        for (proxy, values) in figures {
            for (round, value) in values.iter().enumerate() {
                let sample =
                    Sample::from([(Metric::CpuPerOperation, *value), (Metric::OperationsPerSecond, *value)]);
                outcome.measured.push(Measured { round, case: Case::Ping64x64, proxy: *proxy, sample });
            }
        }
        outcome
    }

    #[test]
    fn summaries_interpolate() {
        let got = Summary::of(vec![4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!(
            (got.min, got.quartile_1, got.median, got.quartile_3, got.max),
            (1.0, 1.75, 2.5, 3.25, 4.0)
        );
        assert_eq!(got.rounds, [4.0, 1.0, 2.0, 3.0]);
        assert_eq!(Summary::of(vec![]), None);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine is twice as slow in the second round: a ratio of medians would not be 0.5 everywhere.
        let outcome = outcome(&[
            (Proxy::Haproxy, &[10.0, 20.0, 12.0]),
            (Proxy::Nginx, &[9.0, 30.0, 40.0]),
            (Proxy::Trimtab, &[5.0, 10.0, 6.0]),
        ]);
        let cpu = metric_report(Case::Ping64x64, Metric::CpuPerOperation, &outcome);
        assert_eq!(cpu.trimtab_over[&Proxy::Haproxy].rounds, [0.5, 0.5, 0.5]);
        assert_eq!(cpu.best_peer, Some(Proxy::Haproxy));
        assert_eq!(cpu.goal.unwrap().reached, Some(true));
        let throughput = metric_report(Case::Ping64x64, Metric::OperationsPerSecond, &outcome);
        assert_eq!(throughput.best_peer, Some(Proxy::Nginx), "more is better there");
    }

    #[test]
    fn a_goal_without_peers_is_not_measured() {
        let outcome = outcome(&[(Proxy::Trimtab, &[5.0])]);
        let cpu = metric_report(Case::Ping64x64, Metric::CpuPerOperation, &outcome);
        assert_eq!((cpu.best_peer, cpu.goal.unwrap().reached), (None, None));
    }
}
