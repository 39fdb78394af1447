//! What happens in a window, all of it known from a seed before it begins: speeds, arrivals, work.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::random::Random;

/// Backends: the first half at full speed, the others slower.
pub(super) const BACKENDS: usize = 10;
/// How many the antagonist slows down at a time.
const VICTIMS: (usize, usize) = (2, 3);
/// The part of their speed that they lose.
const LOSS: (f64, f64) = (0.5, 0.7);
/// A normal distribution with a deviation as large as its mean, cut off at zero, has this mean in terms of the former.
const TRUNCATED_MEAN: f64 = 1.287_600;
/// No request is less work than this part of the mean: there is no such request.
const WORK_MIN: f64 = 0.001;
/// The antagonist goes on for so long after the last arrival, while what is left is served.
const AFTERMATH_SECONDS: f64 = 15.0;

/// How the work of requests is distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum WorkShape {
    /// Exponentially.
    Exponential,
    /// Normally, with a deviation as large as the mean, cut off at zero.
    TruncatedNormal,
}

/// The numbers of a race.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scenario {
    /// Requests that a backend serves at once; the others queue, first in, first out.
    pub slots: usize,
    /// Seconds of a request at speed 1, on average.
    pub mean_work: f64,
    /// Of the work.
    pub shape: WorkShape,
    /// Speed of the slow half.
    pub slow: f64,
    /// Whether there is an antagonist.
    pub antagonist: bool,
    /// Seconds, at least and at most, that it stays with some backends before it moves to others.
    pub holds: (f64, f64),
    /// Part of the mean capacity that arrivals ask for.
    pub load: f64,
    /// Seconds before the window.
    pub warmup: f64,
    /// Seconds of the window.
    pub window: f64,
}

/// A request to come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrival {
    /// Seconds after the start of the warm-up.
    pub(super) due: f64,
    /// Seconds at speed 1.
    pub(super) work: f64,
}

impl Scenario {
    /// The speed of a backend that nobody disturbs.
    pub(super) fn speed(&self, backend: usize) -> f64 {
        if backend < BACKENDS / 2 { 1.0 } else { self.slow }
    }

    /// Requests a second that all backends could serve, undisturbed.
    pub fn nominal_rate(&self) -> f64 {
        let speeds: f64 = (0..BACKENDS).map(|backend| self.speed(backend)).sum();
        speeds * self.slots as f64 / self.mean_work
    }

    /// Requests a second that they could serve with what the antagonist leaves, on average.
    pub fn mean_rate(&self) -> f64 {
        let middle = |(least, most): (f64, f64)| f64::midpoint(least, most);
        let slowed = middle((VICTIMS.0 as f64, VICTIMS.1 as f64)) / BACKENDS as f64;
        let lost = if self.antagonist { slowed * middle(LOSS) } else { 0.0 };
        self.nominal_rate() * (1.0 - lost)
    }

    /// Requests a second that come.
    pub fn arrival_rate(&self) -> f64 {
        self.load * self.mean_rate()
    }

    /// Everything that comes in warm-up and window.
    pub(super) fn arrivals(&self, seed: u64) -> Vec<Arrival> {
        let (mut gaps, mut works) = (Random::new(seed, 1), Random::new(seed, 2));
        let mut arrivals = Vec::new();
        let mut due = 0.0;
        loop {
            due += gaps.exponential() / self.arrival_rate();
            if due >= self.warmup + self.window {
                return arrivals;
            }
            arrivals.push(Arrival { due, work: self.mean_work * self.relative_work(&mut works) });
        }
    }

    /// Of mean 1.
    fn relative_work(&self, random: &mut Random) -> f64 {
        let work = match self.shape {
            WorkShape::Exponential => random.exponential(),
            WorkShape::TruncatedNormal => loop {
                let drawn = 1.0 + random.normal();
                if drawn >= 0.0 {
                    break drawn / TRUNCATED_MEAN;
                }
            },
        };
        work.max(WORK_MIN)
    }

    /// Every backend's speed at every time.
    pub(super) fn speeds(&self, seed: u64) -> Speeds {
        let base: [f64; BACKENDS] = std::array::from_fn(|backend| self.speed(backend));
        let mut segments = Vec::new();
        let mut random = Random::new(seed, 3);
        let mut until = 0.0;
        while self.antagonist && until < self.warmup + self.window + AFTERMATH_SECONDS {
            until += random.between(self.holds.0, self.holds.1);
            segments.push(Segment { until, speeds: slowed(base, &mut random) });
        }
        Speeds { base, segments }
    }
}

fn slowed(base: [f64; BACKENDS], random: &mut Random) -> [f64; BACKENDS] {
    let mut speeds = base;
    let mut victims = VICTIMS.0 + random.below(VICTIMS.1 - VICTIMS.0 + 1);
    while victims > 0 {
        let victim = random.below(BACKENDS);
        if speeds[victim] == base[victim] {
            speeds[victim] *= 1.0 - random.between(LOSS.0, LOSS.1);
            victims -= 1;
        }
    }
    speeds
}

#[derive(Debug, Clone)]
struct Segment {
    until: f64,
    speeds: [f64; BACKENDS],
}

/// Every backend's speed at every time, in steps.
#[derive(Debug, Clone)]
pub(super) struct Speeds {
    base: [f64; BACKENDS],
    segments: Vec<Segment>,
}

impl Speeds {
    /// When work that a slot begins at `start` is done, through all changes of speed.
    pub(super) fn finish(&self, backend: usize, start: f64, work: f64) -> f64 {
        let mut left = work;
        let mut at = start;
        let first = self.segments.partition_point(|segment| segment.until <= start);
        for segment in &self.segments[first..] {
            let speed = segment.speeds[backend];
            if at + left / speed <= segment.until {
                return at + left / speed;
            }
            left -= (segment.until - at) * speed;
            at = segment.until;
        }
        at + left / self.base[backend]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario() -> Scenario {
        Scenario {
            slots: 4,
            mean_work: 0.04,
            shape: WorkShape::Exponential,
            slow: 0.5,
            antagonist: true,
            holds: (1.0, 2.0),
            load: 0.8,
            warmup: 10.0,
            window: 200.0,
        }
    }

    #[test]
    fn a_seed_decides_everything_and_another_seed_otherwise() {
        let dues = |seed| scenario().arrivals(seed).iter().map(|a| (a.due, a.work)).collect::<Vec<_>>();
        assert_eq!(dues(1), dues(1));
        assert_ne!(dues(1)[..10], dues(2)[..10]);
        let first = |seed| scenario().speeds(seed).segments[0].speeds;
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn arrivals_have_the_rate_and_the_work_that_was_asked_for() {
        for shape in [WorkShape::Exponential, WorkShape::TruncatedNormal] {
            let scenario = Scenario { shape, ..scenario() };
            let arrivals = scenario.arrivals(3);
            let rate = arrivals.len() as f64 / 210.0;
            assert!((rate / scenario.arrival_rate() - 1.0).abs() < 0.02, "{rate} arrivals a second");
            let work = arrivals.iter().map(|a| a.work).sum::<f64>() / arrivals.len() as f64;
            assert!((work / 0.04 - 1.0).abs() < 0.02, "{shape:?}: mean work {work}");
        }
    }

    #[test]
    fn the_antagonist_takes_what_the_mean_rate_says() {
        let scenario = scenario();
        assert_eq!(scenario.nominal_rate(), 750.0);
        let speeds = scenario.speeds(5);
        let (mut from, mut given) = (0.0, 0.0);
        for segment in &speeds.segments {
            let slowed = (0..BACKENDS).filter(|b| segment.speeds[*b] < speeds.base[*b]).count();
            assert!((2..=3).contains(&slowed));
            given += (segment.until - from) * segment.speeds.iter().sum::<f64>() * 100.0;
            from = segment.until;
        }
        let mean = given / from;
        assert!((mean / scenario.mean_rate() - 1.0).abs() < 0.03, "{mean} against {}", scenario.mean_rate());
    }

    #[test]
    fn work_goes_on_at_another_speed_when_the_speed_changes() {
        let speeds = |until, speed| Segment { until, speeds: [speed; BACKENDS] };
        let speeds = Speeds { base: [1.0; BACKENDS], segments: vec![speeds(1.0, 0.5), speeds(2.0, 0.25)] };
        assert_eq!(speeds.finish(0, 0.0, 0.25), 0.5);
        assert_eq!(speeds.finish(0, 0.5, 0.5), 2.0);
        assert_eq!(speeds.finish(0, 0.0, 1.0), 2.25);
        assert_eq!(speeds.finish(0, 7.0, 1.0), 8.0);
    }
}
