//! Figures of a run, and their means over seeds.

use std::fmt;

use serde::Serialize;

use super::world::{Run, Second};

/// A figure of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Metric {
    /// Mean latency.
    Mean,
    /// Latency that 99 % do not exceed.
    P99,
    /// Latency that 99.9 % do not exceed.
    P999,
    /// Part of the flows that were not answered.
    Failed,
    /// Standard deviation of a server's part of the new flows, over its mean, of the server where it is largest; in
    /// windows of [`WINDOW`] seconds between the two seconds.
    ShareSpread(usize, usize),
    /// Part of the new flows between the two seconds that the last server gets.
    LastShare(usize, usize),
    /// The most that the last server gets of one second's new flows, between the two seconds.
    LastShareMost(usize, usize),
    /// Flows of the server that has most, over the mean, at this second.
    HeldEvenness(usize),
    /// Utilization of the busiest server over the mean, between the two seconds.
    BusyEvenness(usize, usize),
}

/// Seconds.
pub(crate) const WINDOW: usize = 5;

impl Metric {
    /// Of a run. Sorts its latencies.
    pub(crate) fn of(self, run: &mut Run) -> f64 {
        let between = |from: usize, until: usize| run.seconds.get(from..until).unwrap_or_default();
        match self {
            Self::Mean => {
                let sum: f64 = run.latencies_us.iter().map(|us| f64::from(*us)).sum();
                sum * 1e-3 / run.latencies_us.len().max(1) as f64
            }
            Self::P99 => quantile_ms(&mut run.latencies_us, 0.99),
            Self::P999 => quantile_ms(&mut run.latencies_us, 0.999),
            Self::Failed => run.failed() as f64 / run.latencies_us.len().max(1) as f64,
            Self::ShareSpread(from, until) => share_spread(between(from, until)),
            Self::LastShare(from, until) => last_share(between(from, until)),
            Self::LastShareMost(from, until) => {
                between(from, until).chunks(1).map(last_share).fold(0.0, f64::max)
            }
            Self::HeldEvenness(second) => {
                let held = run.seconds.get(second).map_or(&[][..], |second| &second.held[..]);
                most_over_mean(&held.iter().map(|held| f64::from(*held)).collect::<Vec<_>>())
            }
            Self::BusyEvenness(from, until) => most_over_mean(&sums(between(from, until), |s| &s.busy[..])),
        }
    }

    /// Whether it is a latency, in ms.
    fn is_latency(self) -> bool {
        matches!(self, Self::Mean | Self::P99 | Self::P999)
    }

    /// A value of it, for people.
    pub(crate) fn show(self, value: f64) -> String {
        if self.is_latency() {
            return if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") };
        }
        match self {
            Self::Failed if value == 0.0 => "0".to_owned(),
            Self::Failed => format!("{:.3} %", value * 100.0),
            Self::LastShare(..) | Self::LastShareMost(..) | Self::ShareSpread(..) => {
                format!("{:.2} %", value * 100.0)
            }
            _ => format!("{value:.3}"),
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mean => f.write_str("mean, ms"),
            Self::P99 => f.write_str("p99, ms"),
            Self::P999 => f.write_str("p99.9, ms"),
            Self::Failed => f.write_str("failed"),
            Self::ShareSpread(from, until) => write!(f, "spread of shares, {from} to {until} s"),
            Self::LastShare(from, until) => write!(f, "newcomer's share, {from} to {until} s"),
            Self::LastShareMost(from, until) => {
                write!(f, "newcomer's largest share in a second, {from} to {until} s")
            }
            Self::HeldEvenness(second) => write!(f, "flows held, max/mean, at {second} s"),
            Self::BusyEvenness(from, until) => write!(f, "utilization, max/mean, {from} to {until} s"),
        }
    }
}

fn quantile_ms(latencies_us: &mut [u32], quantile: f64) -> f64 {
    if latencies_us.is_empty() {
        return 0.0;
    }
    let place = ((latencies_us.len() as f64 * quantile) as usize).min(latencies_us.len() - 1);
    f64::from(*latencies_us.select_nth_unstable(place).1) * 1e-3
}

/// By server, over the seconds.
fn sums<'a, T: Copy + Into<f64> + 'a>(seconds: &'a [Second], of: impl Fn(&'a Second) -> &'a [T]) -> Vec<f64> {
    let mut sums = vec![0.0; seconds.first().map_or(0, |second| of(second).len())];
    for second in seconds {
        for (sum, value) in sums.iter_mut().zip(of(second)) {
            *sum += (*value).into();
        }
    }
    sums
}

fn most_over_mean(values: &[f64]) -> f64 {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    values.iter().fold(0.0_f64, |most, value| most.max(*value)) / mean
}

fn last_share(seconds: &[Second]) -> f64 {
    let opened = sums(seconds, |second| &second.opened[..]);
    opened.last().map_or(0.0, |last| last / opened.iter().sum::<f64>())
}

fn share_spread(seconds: &[Second]) -> f64 {
    let windows: Vec<Vec<f64>> = seconds
        .chunks_exact(WINDOW)
        .map(|window| {
            let opened = sums(window, |second| &second.opened[..]);
            let all: f64 = opened.iter().sum();
            opened.iter().map(|opened| opened / all).collect()
        })
        .collect();
    let servers = windows.first().map_or(0, Vec::len);
    let spread = |server: usize| {
        let shares: Vec<f64> = windows.iter().map(|window| window[server]).collect();
        let summary = Summary::of(&shares);
        summary.deviation / summary.mean
    };
    (0..servers).map(spread).fold(0.0, f64::max)
}

/// One figure over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// Its mean.
    pub(crate) mean: f64,
    /// Half the width of the 95 % confidence interval of the mean (Student's t).
    pub(crate) half: f64,
    #[serde(skip)]
    deviation: f64,
}

/// Student's t for 95 %, two-sided, from one degree of freedom on.
const STUDENT: [f64; 19] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093,
];

impl Summary {
    /// Of one value for each seed.
    pub(crate) fn of(values: &[f64]) -> Self {
        let count = values.len().max(1) as f64;
        let mean = values.iter().sum::<f64>() / count;
        if values.len() < 2 {
            return Self { mean, half: 0.0, deviation: 0.0 };
        }
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let student = STUDENT.get(values.len() - 2).copied().unwrap_or(1.96);
        let deviation = variance.sqrt();
        Self { mean, half: student * deviation / count.sqrt(), deviation }
    }
}
