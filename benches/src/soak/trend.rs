//! Whether a series of samples grows.

use serde::Serialize;

/// The slope of a series by Theil and Sen: the median of the slopes of all pairs, which a few odd samples do not move.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Trend {
    /// Of the series' unit, an hour.
    pub(super) per_hour: f64,
    /// Where the true slope is with 95 % (P. K. Sen, 1968), an hour.
    pub(super) low: f64,
    pub(super) high: f64,
}

const SECONDS_PER_HOUR: f64 = 3_600.0;
/// Of the normal distribution, for 95 %.
const DEVIATIONS: f64 = 1.96;

impl Trend {
    /// Of pairs of seconds and values; `None` with fewer than eight.
    pub(super) fn of(series: &[(f64, f64)]) -> Option<Self> {
        let n = series.len();
        if n < 8 {
            return None;
        }
        let mut slopes = Vec::with_capacity(n * (n - 1) / 2);
        for (place, (at, value)) in series.iter().enumerate() {
            slopes.extend(series[..place].iter().map(|(before, old)| (value - old) / (at - before)));
        }
        slopes.sort_by(f64::total_cmp);
        let (n, pairs) = (n as f64, slopes.len() as f64);
        // The variance of Kendall's statistic under "no trend".
        let spread = DEVIATIONS * (n * (n - 1.0) * (2.0 * n + 5.0) / 18.0).sqrt();
        let ranked = |rank: f64| slopes[(rank.max(0.0) as usize).min(slopes.len() - 1)] * SECONDS_PER_HOUR;
        Some(Self {
            per_hour: ranked(pairs / 2.0),
            low: ranked((pairs - spread) / 2.0),
            high: ranked((pairs + spread) / 2.0),
        })
    }

    /// Whether it stays below `limit` an hour, or cannot be told from no growth at all.
    pub(super) fn is_flat(&self, limit: f64) -> bool {
        self.per_hour <= limit || self.low <= 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(value: impl Fn(usize) -> f64) -> Vec<(f64, f64)> {
        (0..100).map(|n| (n as f64 * 10.0, value(n))).collect()
    }

    /// Plus and minus, without a direction.
    fn noise(n: usize) -> f64 {
        [3.0, -5.0, 1.0, 4.0, -2.0, -1.0, 2.0][n % 7]
    }

    #[test]
    fn a_slope_is_found_in_noise() {
        let trend = Trend::of(&series(|n| 100.0 + n as f64 + noise(n))).unwrap();
        assert!((355.0..=365.0).contains(&trend.per_hour), "one in 10 s is 360 an hour: {trend:?}");
        assert!(trend.low <= trend.per_hour && trend.per_hour <= trend.high);
        assert!(!trend.is_flat(300.0) && trend.is_flat(400.0));
    }

    #[test]
    fn noise_and_one_step_back_are_flat() {
        let trend = Trend::of(&series(noise)).unwrap();
        assert!(trend.low <= 0.0 && trend.is_flat(0.0), "{trend:?}");
        let odd = Trend::of(&series(|n| if n == 50 { 1e9 } else { 7.0 })).unwrap();
        assert_eq!(odd.per_hour, 0.0);
    }

    #[test]
    fn a_few_samples_say_nothing() {
        assert_eq!(Trend::of(&[(0.0, 1.0); 7]), None);
    }
}
