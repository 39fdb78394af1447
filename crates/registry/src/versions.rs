//! A version split: which part of new flows goes to which version of a service, and when a new version is given none
//! any more because it does worse.
//!
//! ```text
//! versions 1.9, 2.0=10%      a tenth of new flows to 2.0, the rest to 1.9, the baseline; others count as baseline
//! ```
//!
//! [`Judge`] is given each side's totals and compares a side with the baseline over the last `after`. A side is worse
//! in one respect if it is so by more than the margin *and* by more than three standard errors, which for failures come
//! from their number, for times and utilization from how much they vary within that time. It is aborted once it has
//! been worse for `after` without a break, and is so by the newest half of that time alone. That is a judgement by
//! data other than what made it worse first: a burst shorter than half of `after`, however bad, aborts nothing.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use allocation::Timestamp;

use crate::registration::VERSION_BYTES_MAX;

/// Most versions of one split.
pub const VERSIONS_MAX: usize = 8;

const AFTER_DEFAULT: Duration = Duration::from_secs(30);
/// The window is kept in about so many parts; the judge remembers no more than one more.
const PARTS: u32 = 32;
/// Parts with samples without which nothing is known of how much they vary.
const PARTS_MIN: u32 = 3;
/// Failures below this number are bad luck.
const FAILURES_MIN: u64 = 5;
/// Standard errors that are no chance.
const STANDARD_ERRORS: f64 = 3.0;
/// Seconds of latency that matter to nobody.
const LATENCY_FLOOR: f64 = 0.001;
/// Mean utilization below which a side is idle, and its utilization mostly its own.
const IDLE: f64 = 0.2;
/// What shares may exceed 1 by, in total: rounding.
const ROUNDING: f32 = 1e-5;

/// A version and its part of new flows.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionShare {
    /// As resources register it, or the beginning of that up to a dot.
    pub version: String,
    /// 0 to 1. The baseline's is what the others leave.
    pub share: f32,
}

/// What decides the side of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SplitBy {
    /// Each flow for itself.
    #[default]
    Share,
    /// The client's address: one client is on one side while shares stay.
    Client,
}

/// When a version is aborted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AbortConfig {
    /// Worse for so long without a break, and still so by the newest half of it. Zero: never; then it is still judged, over 30 s.
    pub after: Duration,
    /// Failures per flow by which it may exceed the baseline, 0 to 1.
    pub errors: f32,
    /// Part by which its mean times may exceed the baseline's.
    pub latency: f32,
    /// Part by which its utilization may exceed the baseline's.
    pub utilization: f32,
    /// Flows in the window, of each side, without which it is not judged; half as many in the newest half.
    pub flows_min: u32,
}

impl Default for AbortConfig {
    fn default() -> Self {
        Self { after: AFTER_DEFAULT, errors: 0.01, latency: 0.5, utilization: 0.5, flows_min: 50 }
    }
}

/// A version split. It can only be had from [`SplitConfig::parse`], so its shares add up.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitConfig {
    versions: Vec<VersionShare>,
    by: SplitBy,
    abort: AbortConfig,
}

/// Why there can be no such split: the fault of whoever configured it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SplitError {
    /// There is nothing to split between.
    #[error("a split has {count} versions; write the baseline and one to {} others, for example 1.9, 2.0=10%", VERSIONS_MAX - 1)]
    Count {
        /// How many.
        count: usize,
    },
    /// A version that no resource can have.
    #[error("{version:?} is no version: write 1 to {VERSION_BYTES_MAX} bytes without blanks, commas and =")]
    Version {
        /// It, shortened.
        version: String,
    },
    /// One version twice.
    #[error("the version {version} is there twice; write it once")]
    Duplicate {
        /// Which.
        version: String,
    },
    /// The first one has a share.
    #[error(
        "{version} stands first, so it is the baseline and gets what the others leave: write {version} alone"
    )]
    BaselineShare {
        /// The baseline.
        version: String,
    },
    /// A share that is none.
    #[error(
        "the share of {version} is {given:?}: write a percentage from 0% to 100%, for example {version}=10%"
    )]
    Share {
        /// Whose.
        version: String,
        /// What was given, shortened; empty: nothing.
        given: String,
    },
    /// The shares are more than everything.
    #[error("the shares of all but the baseline are {percent}% together; write at most 100%")]
    ShareSum {
        /// What they are.
        percent: f32,
    },
    /// A margin that is none.
    #[error("the margin of {what} is {given}; write a number from 0 to {max}")]
    Margin {
        /// Of what.
        what: &'static str,
        /// What was given.
        given: f32,
        /// The largest there may be.
        max: f32,
    },
    /// Shares are of versions in the split.
    #[error("{version:?} is not in the split; there are {known}")]
    UnknownVersion {
        /// It, shortened.
        version: String,
        /// Those that are.
        known: String,
    },
}

impl SplitConfig {
    /// Parses `1.9`, `2.0=10%`, …: the baseline first.
    ///
    /// # Errors
    /// The first fault found.
    pub fn parse<T: AsRef<str>>(texts: &[T], by: SplitBy, abort: AbortConfig) -> Result<Self, SplitError> {
        if !(2..=VERSIONS_MAX).contains(&texts.len()) {
            return Err(SplitError::Count { count: texts.len() });
        }
        for (what, given, max) in [
            ("errors", abort.errors, 1.0),
            ("latency", abort.latency, 1000.0),
            ("utilization", abort.utilization, 1000.0),
        ] {
            if !(0.0..=max).contains(&given) {
                return Err(SplitError::Margin { what, given, max });
            }
        }
        let mut versions: Vec<VersionShare> = Vec::with_capacity(texts.len());
        for text in texts {
            let parsed = parse_version(text.as_ref(), versions.is_empty())?;
            if versions.iter().any(|other| other.version == parsed.version) {
                return Err(SplitError::Duplicate { version: parsed.version });
            }
            versions.push(parsed);
        }
        let mut split = Self { versions, by, abort };
        split.give_the_rest()?;
        Ok(split)
    }

    /// The versions and their shares, the baseline first.
    pub fn versions(&self) -> &[VersionShare] {
        &self.versions
    }

    /// What decides the side of a flow.
    pub fn by(&self) -> SplitBy {
        self.by
    }

    /// When a version is aborted.
    pub fn abort(&self) -> &AbortConfig {
        &self.abort
    }

    /// The side that a resource of this version is on: that of the same version, else of the longest that it continues
    /// after a dot (2.0.1 is on the side of 2.0 rather than of 2), else the baseline, 0.
    pub fn side_of(&self, version: &str) -> usize {
        let continues = |listed: &str| {
            version.strip_prefix(listed).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let matching = self.versions.iter().enumerate().filter(|(_, listed)| continues(&listed.version));
        matching.max_by_key(|(_, listed)| listed.version.len()).map_or(0, |(side, _)| side)
    }

    fn give_the_rest(&mut self) -> Result<(), SplitError> {
        let given: f32 = self.versions[1..].iter().map(|version| version.share).sum();
        if given > 1.0 + ROUNDING {
            // As it was written, without what a binary fraction makes of it.
            return Err(SplitError::ShareSum { percent: (given * 1e5).round() / 1e3 });
        }
        self.versions[0].share = (1.0 - given).max(0.0);
        Ok(())
    }
}

fn parse_version(text: &str, baseline: bool) -> Result<VersionShare, SplitError> {
    let (version, share) = match text.split_once('=') {
        Some((version, share)) => (version.trim(), Some(share.trim())),
        None => (text.trim(), None),
    };
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, ',' | '=');
    if version.is_empty() || version.len() > VERSION_BYTES_MAX || version.contains(odd) {
        return Err(SplitError::Version { version: shortened(version) });
    }
    let version = version.to_owned();
    if baseline {
        return match share {
            Some(_) => Err(SplitError::BaselineShare { version }),
            None => Ok(VersionShare { version, share: 0.0 }),
        };
    }
    let given = share.unwrap_or_default();
    let plain = |number: &&str| number.chars().all(|c| c.is_ascii_digit() || c == '.');
    let percent = given.strip_suffix('%').filter(plain).and_then(|number| number.parse::<f32>().ok());
    match percent {
        Some(percent) if (0.0..=100.0).contains(&percent) => {
            Ok(VersionShare { version, share: percent / 100.0 })
        }
        _ => Err(SplitError::Share { version, given: shortened(given) }),
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(VERSION_BYTES_MAX).collect()
}

/// The counts of all resources of one side; all but the last four since ever, and growing.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SideTotals {
    /// Flows that were connected.
    pub flows_opened: u64,
    /// Connects that failed.
    pub connect_failures: u64,
    /// Flows that the backend reset.
    pub resets: u64,
    /// Time that connecting took, in microseconds, of all flows opened.
    pub connect_micros: u64,
    /// Time to the backend's first byte, in microseconds, of all flows that had one.
    pub first_byte_micros: u64,
    /// Flows that had a first byte.
    pub first_bytes: u64,
    /// Bytes from clients to backends.
    pub bytes_to_backends: u64,
    /// Bytes from backends to clients.
    pub bytes_to_clients: u64,
    /// Flows open now.
    pub flows_open: u64,
    /// The mean of its resources' utilization now; `None`: nobody reported.
    pub utilization: Option<f64>,
    /// How many resources it has now.
    pub resources: u32,
    /// How many of them get new flows now.
    pub ready: u32,
}

/// One respect in which sides are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Connects that failed, for each that was tried.
    ConnectFailures,
    /// Flows that the backend reset, for each that was opened.
    Resets,
    /// Mean seconds to connect.
    ConnectTime,
    /// Mean seconds to the first byte.
    FirstByteTime,
    /// Mean utilization; the baseline's is that of as many flows for each resource, where the side has more.
    Utilization,
}

impl Measure {
    /// Every measure.
    pub const ALL: [Self; 5] =
        [Self::ConnectFailures, Self::Resets, Self::ConnectTime, Self::FirstByteTime, Self::Utilization];

    /// Its name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ConnectFailures => "connect failures",
            Self::Resets => "resets",
            Self::ConnectTime => "connect time",
            Self::FirstByteTime => "first byte time",
            Self::Utilization => "utilization",
        }
    }
}

/// That a side is worse, and in what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reason {
    /// In what.
    pub measure: Measure,
    /// The side's value, a ratio or in seconds.
    pub value: f64,
    /// What it is compared with.
    pub baseline: f64,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, value, baseline) = (self.measure.name(), self.value, self.baseline);
        match self.measure {
            Measure::ConnectTime | Measure::FirstByteTime => {
                write!(f, "{name} {:.1} ms, baseline {:.1} ms", value * 1e3, baseline * 1e3)
            }
            _ => write!(f, "{name} {:.1} %, baseline {:.1} %", value * 1e2, baseline * 1e2),
        }
    }
}

/// What a side did in the window; `None`: nothing to tell it from.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SideRatios {
    /// Flows opened.
    pub flows: u64,
    /// Connects that failed, for each that was tried.
    pub connect_failures: Option<f64>,
    /// Flows that the backend reset, for each that was opened.
    pub resets: Option<f64>,
    /// Mean seconds to connect.
    pub connect_seconds: Option<f64>,
    /// Mean seconds to the first byte.
    pub first_byte_seconds: Option<f64>,
    /// Utilization of one resource, for each flow open on it.
    pub utilization_per_flow: Option<f64>,
}

/// How a side stands.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SideStatus {
    /// What it did in the window.
    pub ratios: SideRatios,
    /// In what it is worse than the baseline now.
    pub worse_by: Vec<Reason>,
    /// Since when it is, without a break.
    pub worse_since: Option<Timestamp>,
    /// Why it gets no new flows.
    pub aborted: Option<Reason>,
}

/// Compares the sides of a split, and aborts.
#[derive(Debug, Clone)]
pub struct Judge {
    config: SplitConfig,
    previous: Vec<SideTotals>,
    /// The open part, and the closed ones, the oldest first.
    open: Part,
    parts: VecDeque<Part>,
    /// Connect failures and resets for each flow of the baseline, when it last had flows enough.
    baseline_known: Option<[f64; 2]>,
    sides: Vec<SideStatus>,
}

/// What each side did between two moments.
#[derive(Debug, Clone)]
struct Part {
    began: Timestamp,
    sides: Vec<Deltas>,
}

impl Judge {
    /// Nothing is known yet.
    pub fn new(config: SplitConfig) -> Self {
        let sides = config.versions.len();
        Self {
            previous: Vec::new(),
            open: Part { began: Timestamp::ZERO, sides: vec![Deltas::default(); sides] },
            parts: VecDeque::new(),
            baseline_known: None,
            sides: vec![SideStatus::default(); sides],
            config,
        }
    }

    /// Takes in the totals of each side, in the split's order, and returns the sides that were aborted by it. To be
    /// called at least ten times within `after`, best once a second. O(sides); memory stays the same.
    ///
    /// What a side did since the last call is passed over if its resources changed or a total went backwards: a
    /// resource that came or went took its past with it.
    pub fn observe(&mut self, now: Timestamp, totals: &[SideTotals]) -> Vec<usize> {
        let sides = self.sides.len();
        if totals.len() != sides || self.previous.len() != sides {
            self.open.began = now;
            self.previous = if totals.len() == sides { totals.to_vec() } else { Vec::new() };
            return Vec::new();
        }
        for ((delta, before), after) in self.open.sides.iter_mut().zip(&self.previous).zip(totals) {
            delta.add(before, after);
        }
        self.previous = totals.to_vec();
        self.trim(now);
        let windows = self.windows(Timestamp::ZERO);
        if now.since(self.open.began) >= self.window() / PARTS {
            let next = Part { began: now, sides: vec![Deltas::default(); sides] };
            self.parts.push_back(std::mem::replace(&mut self.open, next));
        }
        self.judge(now, &windows);
        self.abort(now)
    }

    /// The shares in force, the baseline first: what was aborted has 0, and the baseline its part.
    pub fn shares(&self) -> Vec<f32> {
        let in_force = |(version, side): (&VersionShare, &SideStatus)| match side.aborted {
            Some(_) => 0.0,
            None => version.share,
        };
        let mut shares: Vec<f32> = self.config.versions.iter().zip(&self.sides).map(in_force).collect();
        shares[0] = (1.0 - shares[1..].iter().sum::<f32>()).max(0.0);
        shares
    }

    /// Gives a version another share, and takes back that it was aborted; it is judged anew from then on.
    ///
    /// # Errors
    /// If it is not in the split, is the baseline, or the share is not 0 to what others leave. Nothing changed then.
    pub fn set_share(&mut self, version: &str, share: f32) -> Result<(), SplitError> {
        let Some(side) = self.config.versions.iter().position(|listed| listed.version == version) else {
            let known: Vec<&str> = self.config.versions.iter().map(|v| v.version.as_str()).collect();
            return Err(SplitError::UnknownVersion { version: shortened(version), known: known.join(", ") });
        };
        if side == 0 {
            return Err(SplitError::BaselineShare { version: version.to_owned() });
        }
        if !(0.0..=1.0).contains(&share) {
            return Err(SplitError::Share { version: version.to_owned(), given: share.to_string() });
        }
        let mut config = self.config.clone();
        config.versions[side].share = share;
        config.give_the_rest()?;
        self.config = config;
        self.sides[side] = SideStatus { ratios: self.sides[side].ratios, ..SideStatus::default() };
        for part in self.parts.iter_mut().chain([&mut self.open]) {
            part.sides[side] = Deltas::default();
        }
        Ok(())
    }

    /// Gives a side none of the new flows, as it was before a restart. The baseline cannot be aborted.
    pub fn restore_abort(&mut self, version: &str, reason: Reason) {
        let versions = self.config.versions.iter().zip(&mut self.sides).skip(1);
        for (_, side) in versions.filter(|(listed, _)| listed.version == version) {
            side.aborted = Some(reason);
        }
    }

    /// How each side stands, the baseline first.
    pub fn sides(&self) -> &[SideStatus] {
        &self.sides
    }

    /// The split, with shares as set last.
    pub fn config(&self) -> &SplitConfig {
        &self.config
    }

    fn window(&self) -> Duration {
        if self.config.abort.after.is_zero() { AFTER_DEFAULT } else { self.config.abort.after }
    }

    /// Forgets parts that are not wholly within the window.
    fn trim(&mut self, now: Timestamp) {
        let window = self.window();
        while self.parts.front().is_some_and(|part| now.since(part.began) > window) {
            self.parts.pop_front();
        }
    }

    /// What each side did in the parts that began at `from` or later.
    fn windows(&self, from: Timestamp) -> Vec<Window> {
        let mut windows = vec![Window::default(); self.sides.len()];
        for part in self.parts.iter().chain([&self.open]).filter(|part| part.began >= from) {
            for (window, deltas) in windows.iter_mut().zip(&part.sides) {
                window.add(deltas);
            }
        }
        windows
    }

    fn judge(&mut self, now: Timestamp, windows: &[Window]) {
        let abort = self.config.abort;
        let baseline = &windows[0];
        if baseline.all.attempts() >= u64::from(abort.flows_min) {
            self.baseline_known = Some(baseline.failures().map(Failures::ratio));
        }
        for (side, (status, window)) in self.sides.iter_mut().zip(windows).enumerate() {
            status.ratios = window.ratios();
            if side > 0 {
                status.worse_by = worse_by(&abort, window, baseline, self.baseline_known);
                status.worse_since = (!status.worse_by.is_empty()).then(|| status.worse_since.unwrap_or(now));
            }
        }
    }

    /// Aborts the sides that have been worse long enough.
    fn abort(&mut self, now: Timestamp) -> Vec<usize> {
        let abort = self.config.abort;
        let due = |status: &SideStatus| {
            status.aborted.is_none()
                && status.worse_since.is_some_and(|since| now.since(since) >= abort.after)
        };
        if abort.after.is_zero() || !self.sides.iter().any(due) {
            return Vec::new();
        }
        let half_ago = now.as_millis().saturating_sub(abort.after.as_millis() as u64 / 2);
        let newest = self.windows(Timestamp::from_millis(half_ago));
        let halved = AbortConfig { flows_min: abort.flows_min.div_ceil(2), ..abort };
        let mut aborted = Vec::new();
        for (side, status) in self.sides.iter_mut().enumerate().filter(|(_, status)| due(status)) {
            let still = worse_by(&halved, &newest[side], &newest[0], self.baseline_known);
            let confirmed = |reason: &&Reason| still.iter().any(|other| other.measure == reason.measure);
            if let Some(reason) = status.worse_by.iter().find(confirmed) {
                status.aborted = Some(*reason);
                aborted.push(side);
            }
        }
        aborted
    }
}

/// In what a side is worse than the baseline.
fn worse_by(abort: &AbortConfig, side: &Window, baseline: &Window, known: Option<[f64; 2]>) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let flows_min = u64::from(abort.flows_min.max(1));
    let failures = side.failures().into_iter().zip(baseline.failures()).enumerate();
    for (n, (own, base)) in failures {
        // A baseline that has few flows now, but was known with enough of them, stands as it was.
        let reference = match known {
            _ if base.of >= flows_min => Some((base.ratio(), base.of)),
            known => known.map(|ratios| (ratios[n], flows_min)),
        };
        let Some((ratio, of)) = reference else { continue };
        if own.of >= flows_min && own.worse_than(ratio, of, f64::from(abort.errors)) {
            let measure = if n == 0 { Measure::ConnectFailures } else { Measure::Resets };
            reasons.push(Reason { measure, value: own.ratio(), baseline: ratio });
        }
    }
    if side.all.flows_opened < flows_min || baseline.all.flows_opened < flows_min {
        return reasons;
    }
    let mut compare = |measure, own: Option<Mean>, base: Option<Mean>, margin: f32, floor: f64| {
        if let (Some(own), Some(base)) = (own, base)
            && own.worse_than(&base, f64::from(margin), floor)
        {
            reasons.push(Reason { measure, value: own.mean, baseline: base.mean });
        }
    };
    let mean = Moments::mean;
    compare(Measure::ConnectTime, mean(&side.connect), mean(&baseline.connect), abort.latency, LATENCY_FLOOR);
    if side.all.first_bytes >= flows_min && baseline.all.first_bytes >= flows_min {
        let (own, base) = (mean(&side.first_byte), mean(&baseline.first_byte));
        compare(Measure::FirstByteTime, own, base, abort.latency, LATENCY_FLOOR);
    }
    // A side with fewer flows on each resource is not expected to be less busy: what is not of flows stays.
    let scale = match (side.flows_for_each(), baseline.flows_for_each()) {
        (Some(own), Some(base)) if base > 0.0 => (own / base).max(1.0),
        _ => return reasons,
    };
    let own = mean(&side.utilization).filter(|own| own.mean >= IDLE);
    let base =
        mean(&baseline.utilization).map(|base| Mean { mean: base.mean * scale, error: base.error * scale });
    compare(Measure::Utilization, own, base, abort.utilization, 0.0);
    reasons
}

/// What a side did in a part.
#[derive(Debug, Clone, Copy, Default)]
struct Deltas {
    flows_opened: u64,
    connect_failures: u64,
    resets: u64,
    connect_micros: u64,
    first_byte_micros: u64,
    first_bytes: u64,
    /// Sums over the moments at which utilization was known, and their number.
    utilization: f64,
    flows_for_each: f64,
    moments: u64,
}

impl Deltas {
    fn add(&mut self, before: &SideTotals, after: &SideTotals) {
        let pairs = [
            (before.flows_opened, after.flows_opened, &mut self.flows_opened),
            (before.connect_failures, after.connect_failures, &mut self.connect_failures),
            (before.resets, after.resets, &mut self.resets),
            (before.connect_micros, after.connect_micros, &mut self.connect_micros),
            (before.first_byte_micros, after.first_byte_micros, &mut self.first_byte_micros),
            (before.first_bytes, after.first_bytes, &mut self.first_bytes),
        ];
        let backwards = pairs.iter().any(|(before, after, _)| after < before);
        if !backwards && before.resources == after.resources {
            for (before, after, sum) in pairs {
                *sum = sum.saturating_add(after - before);
            }
        }
        if let Some(utilization) = after.utilization.filter(|u| u.is_finite() && *u >= 0.0)
            && after.resources > 0
        {
            self.utilization += utilization;
            self.flows_for_each += after.flows_open as f64 / f64::from(after.resources);
            self.moments += 1;
        }
    }

    fn attempts(&self) -> u64 {
        self.flows_opened.saturating_add(self.connect_failures)
    }
}

/// What a side did in the window, and how much that varied between its parts.
#[derive(Debug, Clone, Default)]
struct Window {
    all: Deltas,
    connect: Moments,
    first_byte: Moments,
    utilization: Moments,
}

impl Window {
    fn add(&mut self, part: &Deltas) {
        let all = &mut self.all;
        all.flows_opened = all.flows_opened.saturating_add(part.flows_opened);
        all.connect_failures = all.connect_failures.saturating_add(part.connect_failures);
        all.resets = all.resets.saturating_add(part.resets);
        all.first_bytes = all.first_bytes.saturating_add(part.first_bytes);
        all.flows_for_each += part.flows_for_each;
        all.moments += part.moments;
        self.connect.add(part.connect_micros as f64 / 1e6, part.flows_opened);
        self.first_byte.add(part.first_byte_micros as f64 / 1e6, part.first_bytes);
        self.utilization.add(part.utilization, part.moments);
    }

    fn failures(&self) -> [Failures; 2] {
        [
            Failures { count: self.all.connect_failures, of: self.all.attempts() },
            Failures { count: self.all.resets, of: self.all.flows_opened },
        ]
    }

    /// Flows open on each resource, on average.
    fn flows_for_each(&self) -> Option<f64> {
        (self.all.moments > 0).then(|| self.all.flows_for_each / self.all.moments as f64)
    }

    fn ratios(&self) -> SideRatios {
        let [connect_failures, resets] =
            self.failures().map(|failures| (failures.of > 0).then(|| failures.ratio()));
        SideRatios {
            flows: self.all.flows_opened,
            connect_failures,
            resets,
            connect_seconds: self.connect.ratio(),
            first_byte_seconds: self.first_byte.ratio(),
            utilization_per_flow: (self.all.flows_for_each > 0.0)
                .then(|| self.utilization.sum / self.all.flows_for_each),
        }
    }
}

/// So many of so many.
#[derive(Debug, Clone, Copy)]
struct Failures {
    count: u64,
    of: u64,
}

impl Failures {
    fn ratio(self) -> f64 {
        self.count as f64 / self.of.max(1) as f64
    }

    /// By more than a margin, and more than chance. `ratio` is the other's, of so many.
    fn worse_than(self, ratio: f64, of: u64, margin: f64) -> bool {
        let (own, base) = (self.of as f64, of as f64);
        // A flow may be reset later than it was opened, so there may be more resets than flows.
        let pooled = ((self.count as f64 + ratio * base) / (own + base)).min(1.0);
        let error = (pooled * (1.0 - pooled) * (1.0 / own + 1.0 / base)).sqrt();
        let by = self.ratio() - ratio;
        self.count >= FAILURES_MIN && by > margin && by > STANDARD_ERRORS * error
    }
}

/// A sum of values that came in parts, and how much the parts' means vary.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    sum: f64,
    number: f64,
    /// Sums over the parts, of the number squared, and that times the mean and times the mean squared.
    squares: [f64; 3],
    parts: u32,
}

/// A mean, and its standard error.
#[derive(Debug, Clone, Copy)]
struct Mean {
    mean: f64,
    error: f64,
}

impl Moments {
    fn add(&mut self, sum: f64, number: u64) {
        if number == 0 {
            return;
        }
        let number = number as f64;
        self.sum += sum;
        self.number += number;
        let [n, s, q] = &mut self.squares;
        (*n, *s, *q) = (*n + number * number, *s + number * sum, *q + sum * sum);
        self.parts += 1;
    }

    fn ratio(&self) -> Option<f64> {
        (self.number > 0.0).then(|| self.sum / self.number)
    }

    /// `None`: there are too few parts to say how much they vary.
    fn mean(&self) -> Option<Mean> {
        if self.parts < PARTS_MIN {
            return None;
        }
        let mean = self.ratio()?;
        // Of a ratio of sums: each part's distance from it, weighted by the number in the part.
        let [n, s, q] = self.squares;
        let distances = (q - 2.0 * mean * s + mean * mean * n).max(0.0);
        let parts = f64::from(self.parts);
        Some(Mean { mean, error: (distances * parts / (parts - 1.0)).sqrt() / self.number })
    }
}

impl Mean {
    /// By more than a part of the other, more than `floor`, and more than chance.
    fn worse_than(&self, base: &Self, margin: f64, floor: f64) -> bool {
        let by = self.mean - base.mean;
        by > margin * base.mean + floor && by > STANDARD_ERRORS * self.error.hypot(base.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(texts: &[&str]) -> Result<SplitConfig, SplitError> {
        SplitConfig::parse(texts, SplitBy::Share, AbortConfig::default())
    }

    #[test]
    fn the_baseline_gets_what_the_others_leave() {
        let parsed = split(&["1.9", "2.0 = 10%", "2.1=0.5%"]).unwrap();
        let shares: Vec<f32> = parsed.versions().iter().map(|v| v.share).collect();
        assert!((shares[0] - 0.895).abs() < 1e-6 && shares[1..] == [0.1, 0.005]);
        assert_eq!(split(&["1", "2=70%", "3=30%"]).unwrap().versions()[0].share, 0.0);
    }

    #[test]
    fn errors_say_what_to_write() {
        let error = |texts: &[&str]| split(texts).unwrap_err();
        assert_eq!(error(&["1.9"]), SplitError::Count { count: 1 });
        assert_eq!(
            error(&["1.9=90%", "2.0=10%"]).to_string(),
            "1.9 stands first, so it is the baseline and gets what the others leave: write 1.9 alone"
        );
        assert_eq!(
            error(&["1.9", "2.0"]).to_string(),
            "the share of 2.0 is \"\": write a percentage from 0% to 100%, for example 2.0=10%"
        );
        for share in ["10", "-1%", "NaN%", "101%", "%", "1e1%", "inf%"] {
            assert!(matches!(error(&["1.9", &format!("2.0={share}")]), SplitError::Share { .. }), "{share}");
        }
        assert!(matches!(error(&["1.9", "2.0=60%", "2.1=41%"]), SplitError::ShareSum { .. }));
        assert_eq!(error(&["1.9", "1.9=1%"]), SplitError::Duplicate { version: "1.9".into() });
        assert!(matches!(error(&["", "1.9=1%"]), SplitError::Version { .. }));
        let margin = AbortConfig { errors: f32::NAN, ..AbortConfig::default() };
        let refused = SplitConfig::parse(&["1", "2=1%"], SplitBy::Client, margin);
        assert!(matches!(refused, Err(SplitError::Margin { what: "errors", .. })));
    }

    #[test]
    fn a_version_is_on_the_side_it_continues() {
        let split = split(&["1.9", "2=10%", "2.0=10%"]).unwrap();
        for (version, side) in
            [("1.9", 0), ("2.0", 2), ("2.0.1", 2), ("2.01", 1), ("2.1", 1), ("2", 1), ("20", 0), ("", 0)]
        {
            assert_eq!(split.side_of(version), side, "{version}");
        }
    }

    /// SplitMix64.
    struct Seeded(u64);

    impl Seeded {
        fn unit(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    /// How a version behaves.
    #[derive(Clone, Copy)]
    struct Behaviour {
        flows: u64,
        fails: f64,
        resets: f64,
        /// Mean of an exponential time to connect and to the first byte, in microseconds.
        micros: f64,
        utilization: f64,
    }

    const GOOD: Behaviour =
        Behaviour { flows: 100, fails: 0.002, resets: 0.005, micros: 20_000.0, utilization: 0.5 };

    /// Lets a second pass.
    fn pass(totals: &mut SideTotals, behaviour: &Behaviour, seeded: &mut Seeded) {
        for _ in 0..behaviour.flows {
            if seeded.unit() < behaviour.fails {
                totals.connect_failures += 1;
                continue;
            }
            totals.flows_opened += 1;
            totals.connect_micros += (-behaviour.micros * (1.0 - seeded.unit()).ln()) as u64;
            totals.first_byte_micros += (-behaviour.micros * (1.0 - seeded.unit()).ln()) as u64;
            totals.first_bytes += 1;
            totals.resets += u64::from(seeded.unit() < behaviour.resets);
        }
        totals.utilization = Some(behaviour.utilization * (0.9 + 0.2 * seeded.unit()));
        (totals.flows_open, totals.resources, totals.ready) = (behaviour.flows * 10, 4, 4);
    }

    /// A judge and what it is told, second by second.
    struct Run {
        judge: Judge,
        totals: Vec<SideTotals>,
        seeded: Seeded,
        second: u64,
    }

    impl Run {
        fn new(seed: u64) -> Self {
            let config = split(&["1.9", "2.0=20%"]).unwrap();
            let sides = config.versions().len();
            let totals = vec![SideTotals::default(); sides];
            Self { judge: Judge::new(config), totals, seeded: Seeded(seed), second: 0 }
        }

        /// The second at which the new version was aborted.
        fn go(&mut self, seconds: u64, baseline: Behaviour, new: Behaviour) -> Option<u64> {
            for _ in 0..seconds {
                self.second += 1;
                for (totals, behaviour) in self.totals.iter_mut().zip([baseline, new]) {
                    pass(totals, &behaviour, &mut self.seeded);
                }
                let now = Timestamp::from_millis(self.second * 1000);
                if self.judge.observe(now, &self.totals).contains(&1) {
                    return Some(self.second);
                }
            }
            None
        }
    }

    fn canary(behaviour: Behaviour) -> Behaviour {
        Behaviour { flows: behaviour.flows / 5, ..behaviour }
    }

    #[test]
    fn a_version_as_good_is_not_aborted_whatever_the_noise() {
        for seed in 0..20 {
            let mut run = Run::new(seed);
            assert_eq!(run.go(900, GOOD, canary(GOOD)), None, "seed {seed}");
            let few = Behaviour { flows: 2, ..GOOD };
            assert_eq!(run.go(900, GOOD, few), None, "seed {seed}");
            assert_eq!(run.judge.shares(), [0.8, 0.2]);
            assert!(run.judge.parts.len() <= PARTS as usize + 1);
        }
    }

    #[test]
    fn a_worse_version_is_aborted_after_the_time_and_not_before() {
        let good = canary(GOOD);
        for (bad, measure) in [
            (Behaviour { fails: 0.1, ..good }, Measure::ConnectFailures),
            (Behaviour { fails: 1.0, ..good }, Measure::ConnectFailures),
            (Behaviour { resets: 0.1, ..good }, Measure::Resets),
            (Behaviour { micros: 60_000.0, ..good }, Measure::ConnectTime),
            (Behaviour { utilization: 0.95, ..good }, Measure::Utilization),
        ] {
            for seed in 0..5 {
                let mut run = Run::new(seed);
                assert_eq!(run.go(120, GOOD, good), None);
                let aborted = run.go(300, GOOD, bad).unwrap_or_else(|| panic!("{measure:?} {seed}"));
                assert!((150..=195).contains(&aborted), "{measure:?} at {aborted}");
                let status = &run.judge.sides()[1];
                let since = status.worse_since.unwrap();
                assert_eq!(Timestamp::from_millis(aborted * 1000).since(since), Duration::from_secs(30));
                let reason = status.aborted.unwrap();
                assert_eq!(reason.measure, measure);
                assert!(reason.value > reason.baseline && reason.to_string().contains(measure.name()));
                assert_eq!(run.judge.shares(), [1.0, 0.0]);
                // It stays so, whatever it does, until someone says otherwise.
                assert_eq!(run.go(120, GOOD, good), None);
                assert_eq!(run.judge.shares(), [1.0, 0.0]);
                run.judge.set_share("2.0", 0.5).unwrap();
                assert_eq!(run.judge.shares(), [0.5, 0.5]);
                assert_eq!(run.go(120, GOOD, good), None);
            }
        }
    }

    #[test]
    fn one_burst_aborts_nothing() {
        for seed in 0..10 {
            let mut run = Run::new(seed);
            let good = canary(GOOD);
            assert_eq!(run.go(100, GOOD, good), None);
            assert_eq!(run.go(5, GOOD, Behaviour { fails: 1.0, micros: 1e6, ..good }), None);
            assert!(!run.judge.sides()[1].worse_by.is_empty());
            assert_eq!(run.go(200, GOOD, good), None, "seed {seed}");
        }
    }

    #[test]
    fn few_flows_never_judge_and_a_silent_baseline_is_remembered() {
        let bad = Behaviour { flows: 1, fails: 0.5, ..GOOD };
        let mut run = Run::new(1);
        assert_eq!(run.go(600, GOOD, bad), None, "thirty flows are not fifty");
        // Nobody knows the baseline.
        let (silent, bad) = (Behaviour { flows: 0, ..GOOD }, Behaviour { fails: 0.5, ..GOOD });
        let mut run = Run::new(2);
        assert_eq!(run.go(300, silent, bad), None);
        // It was known good.
        let mut run = Run::new(3);
        assert_eq!(run.go(100, GOOD, GOOD), None);
        assert_eq!(run.go(100, silent, GOOD), None);
        assert!(run.go(100, silent, bad).is_some());
    }

    #[test]
    fn an_idle_canary_is_not_taken_for_a_busy_one() {
        // A tenth of the flows on each resource, and half the utilization: most of it is not of flows.
        let mut run = Run::new(4);
        let idle = Behaviour { flows: 10, utilization: 0.25, ..GOOD };
        assert_eq!(run.go(300, GOOD, idle), None);
        assert!(
            run.judge.sides()[1].ratios.utilization_per_flow
                > run.judge.sides()[0].ratios.utilization_per_flow
        );
    }

    #[test]
    fn resources_that_come_and_go_make_no_nonsense() {
        let mut run = Run::new(5);
        let good = canary(GOOD);
        for round in 0..60 {
            assert_eq!(run.go(7, GOOD, good), None, "round {round}");
            // One leaves with most of the good flows; the next time one comes with a past of failures.
            let totals = &mut run.totals[1];
            if round % 2 == 0 {
                totals.flows_opened /= 3;
                totals.connect_micros /= 50;
            } else {
                totals.connect_failures += 500;
                let now = Timestamp::from_millis(run.second * 1000 + 1);
                let mut changed = run.totals.clone();
                changed[1].resources = 5;
                assert!(run.judge.observe(now, &changed).is_empty());
            }
            let ratios = run.judge.sides()[1].ratios;
            assert!(ratios.connect_failures.is_none_or(|ratio| ratio < 0.1), "{ratios:?}");
        }
        assert!(run.judge.observe(Timestamp::ZERO, &[]).is_empty());
    }

    #[test]
    fn never_means_never_and_shares_are_checked() {
        let abort = AbortConfig { after: Duration::ZERO, ..AbortConfig::default() };
        let config = SplitConfig::parse(&["1", "2=20%", "3=50%"], SplitBy::Share, abort).unwrap();
        let mut judge = Judge::new(config);
        let mut totals = [SideTotals::default(); 3];
        for second in 0..300 {
            totals[0].flows_opened += 10;
            totals[1].connect_failures += 10;
            assert!(judge.observe(Timestamp::from_millis(second * 1000), &totals).is_empty());
        }
        assert_eq!(judge.sides()[1].worse_by[0].measure, Measure::ConnectFailures);
        assert!(matches!(judge.set_share("2", 0.6), Err(SplitError::ShareSum { .. })));
        assert!(matches!(judge.set_share("2", f32::NAN), Err(SplitError::Share { .. })));
        assert!(matches!(judge.set_share("1", 0.1), Err(SplitError::BaselineShare { .. })));
        assert_eq!(
            judge.set_share("9", 0.1).unwrap_err().to_string(),
            "\"9\" is not in the split; there are 1, 2, 3"
        );
        judge.set_share("2", 0.5).unwrap();
        assert_eq!(judge.shares(), [0.0, 0.5, 0.5]);
    }
}
