//! The versions of a split pool: what was counted of each, which share each has, and the tables of their sides.

use std::time::Duration;

use allocation::{FlowTotals, LeftOut, LiveFacts, TableSpec, Timestamp};

use crate::columns::Columns;
use crate::pool::Member;
use crate::versions::{Judge, Reason, SideTotals, SplitBy, SplitConfig, SplitError};

/// The totals of all sides are added up this often: it goes over the whole pool.
const OBSERVE_EVERY: Duration = Duration::from_millis(900);

/// A version beside the others.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionStatus {
    /// The version.
    pub version: String,
    /// It is what the others are compared with.
    pub baseline: bool,
    /// Its share of new flows as configured or set, 0 to 1.
    pub share_wanted: f64,
    /// In force: 0 once it is aborted.
    pub share: f64,
    /// Why it is aborted, if it is.
    pub aborted: Option<String>,
    /// Its resources.
    pub resources: u32,
    /// Those of them that may get new flows.
    pub resources_ready: u32,
    /// What was counted of it, with resources that have left since.
    pub totals: FlowTotals,
    /// Of the connects lately; `None` here and below: nothing to tell from.
    pub connect_failure_ratio: Option<f64>,
    /// Of the flows opened lately.
    pub reset_ratio: Option<f64>,
    /// Mean time of a connect lately.
    pub connect_seconds: Option<f64>,
    /// Mean time to the first byte lately.
    pub first_byte_seconds: Option<f64>,
    /// Mean of what its resources reported.
    pub utilization: Option<f64>,
    /// Utilization of one resource for each flow open on it, lately.
    pub utilization_per_flow: Option<f64>,
    /// How long it has been worse than the baseline, if it is.
    pub worse_for: Option<Duration>,
    /// By what it is worse now.
    pub worse_by: Vec<String>,
}

/// The split of one pool.
#[derive(Debug)]
pub(crate) struct Versions {
    judge: Judge,
    /// What was counted of resources that have left, by side.
    departed: Vec<FlowTotals>,
    observed: Timestamp,
    /// Aborts that nobody has been told of: version, why.
    aborts: Vec<(String, String)>,
}

impl Versions {
    pub(crate) fn new(config: SplitConfig) -> Self {
        Self {
            departed: vec![FlowTotals::default(); config.versions().len()],
            judge: Judge::new(config),
            observed: Timestamp::ZERO,
            aborts: Vec::new(),
        }
    }

    /// How many sides there are.
    pub(crate) fn count(&self) -> usize {
        self.departed.len()
    }

    pub(crate) fn by(&self) -> allocation::SplitBy {
        match self.judge.config().by() {
            SplitBy::Share => allocation::SplitBy::Share,
            SplitBy::Client => allocation::SplitBy::Client,
        }
    }

    pub(crate) fn side_of(&self, version: &str) -> usize {
        self.judge.config().side_of(version)
    }

    /// The version that a side is named after.
    pub(crate) fn name(&self, side: usize) -> &str {
        self.judge.config().versions().get(side).map_or("", |version| version.version.as_str())
    }

    /// A side's share in force.
    pub(crate) fn share(&self, side: usize) -> f32 {
        self.judge.shares().get(side).copied().unwrap_or(0.0)
    }

    /// The part of all flows that a unit of weight on each side gets, by the sums of weights. The flows of a side that has
    /// nobody go to the first that has somebody, as selections do it.
    pub(crate) fn parts(&self, weights: &[f32]) -> Vec<f32> {
        let mut shares = self.judge.shares();
        if let Some(first) = weights.iter().position(|weight| *weight > 0.0) {
            for (side, _) in weights.iter().enumerate().filter(|(_, weight)| **weight <= 0.0) {
                shares[first] += std::mem::take(&mut shares[side]);
            }
        }
        let part = |(share, weight): (&f32, &f32)| if *weight > 0.0 { share / weight } else { 0.0 };
        shares.iter().zip(weights).map(part).collect()
    }

    pub(crate) fn set_share(&mut self, version: &str, share: f32) -> Result<(), SplitError> {
        self.judge.set_share(version, share)
    }

    /// A version's share as set last, and why it is aborted; `None`: it is not in the split.
    pub(crate) fn setting(&self, version: &str) -> Option<(f32, Option<Reason>)> {
        let listed = self.judge.config().versions().iter().zip(self.judge.sides());
        let mut of_name = listed.filter(|(listed, _)| listed.version == version);
        of_name.next().map(|(listed, side)| (listed.share, side.aborted))
    }

    pub(crate) fn restore_abort(&mut self, version: &str, reason: Reason) {
        self.judge.restore_abort(version, reason);
    }

    /// A resource leaves its side; what was counted of it stays.
    pub(crate) fn depart(&mut self, side: usize, live: &LiveFacts) {
        if let Some(departed) = self.departed.get_mut(side) {
            *departed += FlowTotals { flows_open: 0, ..live.totals() };
        }
    }

    /// Judges by what was counted until now, now and then.
    pub(crate) fn observe(&mut self, columns: &Columns, members: &[Option<Member>], now: Timestamp) {
        if now.since(self.observed) < OBSERVE_EVERY && self.observed != Timestamp::ZERO {
            return;
        }
        self.observed = now;
        let totals: Vec<SideTotals> =
            (0..self.count()).map(|side| self.tally(side, columns, members, now).totals()).collect();
        for side in self.judge.observe(now, &totals) {
            let why = self.judge.sides()[side].aborted.map(|reason| reason.to_string());
            self.aborts.push((self.name(side).to_owned(), why.unwrap_or_default()));
        }
    }

    fn tally(&self, side: usize, columns: &Columns, members: &[Option<Member>], now: Timestamp) -> Tally {
        let mut tally = Tally { flows: self.departed[side], ..Tally::default() };
        for (slot, member) in members.iter().enumerate() {
            if let Some(member) = member.as_ref().filter(|_| usize::from(columns.side[slot]) == side) {
                tally.flows += member.backend.live.totals();
                tally.resources += 1;
                tally.ready += u32::from(columns.wanted[slot] && columns.lease_until[slot] > now);
                if columns.reported[slot] != Timestamp::NEVER {
                    tally.reporting += 1;
                    tally.utilization += f64::from(columns.utilization[slot]);
                }
            }
        }
        tally
    }

    /// Every side with its share and what its table is made of: the whole's, less those of other versions. `sides` is by
    /// backend index.
    pub(crate) fn sides(&self, whole: &TableSpec, sides: &[u8]) -> Vec<(String, f32, TableSpec)> {
        let shares = self.judge.shares();
        let spec = |side: usize| {
            let mut spec = whole.clone();
            spec.left_out.resize(sides.len(), LeftOut::Not);
            for (index, _) in sides.iter().enumerate().filter(|(_, other)| usize::from(**other) != side) {
                spec.weights[index] = 0.0;
                if let Some(why @ LeftOut::Not) = spec.left_out.get_mut(index) {
                    *why = LeftOut::OtherVersion;
                }
            }
            spec
        };
        (0..self.count()).map(|side| (self.name(side).to_owned(), shares[side], spec(side))).collect()
    }

    pub(crate) fn take_aborts(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.aborts)
    }

    pub(crate) fn status(
        &self,
        columns: &Columns,
        members: &[Option<Member>],
        now: Timestamp,
    ) -> Vec<VersionStatus> {
        let shares = self.judge.shares();
        let configured = self.judge.config().versions().iter().zip(self.judge.sides()).enumerate();
        let status = configured.map(|(place, (configured, side))| {
            let tally = self.tally(place, columns, members, now);
            VersionStatus {
                version: configured.version.clone(),
                baseline: place == 0,
                share_wanted: f64::from(configured.share),
                share: f64::from(shares[place]),
                aborted: side.aborted.map(|reason| reason.to_string()),
                resources: tally.resources,
                resources_ready: tally.ready,
                totals: tally.flows,
                connect_failure_ratio: side.ratios.connect_failures,
                reset_ratio: side.ratios.resets,
                connect_seconds: side.ratios.connect_seconds,
                first_byte_seconds: side.ratios.first_byte_seconds,
                utilization: tally.mean_utilization(),
                utilization_per_flow: side.ratios.utilization_per_flow,
                worse_for: side.worse_since.map(|since| now.since(since)),
                worse_by: side.worse_by.iter().map(ToString::to_string).collect(),
            }
        });
        status.collect()
    }
}

/// One side, added up.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    flows: FlowTotals,
    resources: u32,
    ready: u32,
    reporting: u32,
    utilization: f64,
}

impl Tally {
    fn mean_utilization(&self) -> Option<f64> {
        (self.reporting > 0).then(|| self.utilization / f64::from(self.reporting))
    }

    fn totals(&self) -> SideTotals {
        let flows = &self.flows;
        SideTotals {
            flows_opened: flows.flows_opened,
            connect_failures: flows.connect_failures,
            resets: flows.resets,
            connect_micros: flows.connect_micros,
            first_byte_micros: flows.first_byte_micros,
            first_bytes: flows.first_bytes,
            bytes_to_backends: flows.bytes_to_backend,
            bytes_to_clients: flows.bytes_to_client,
            flows_open: flows.flows_open,
            utilization: self.mean_utilization(),
            resources: self.resources,
            ready: self.ready,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::versions::AbortConfig;

    #[test]
    fn shares_are_divided_within_a_side_and_those_of_nobody_go_to_another() {
        let config = SplitConfig::parse(&["1", "2=20%"], SplitBy::Share, AbortConfig::default()).unwrap();
        let versions = Versions::new(config);
        assert_eq!(versions.parts(&[4.0, 0.5]), [0.2, 0.4]);
        assert_eq!(versions.parts(&[2.0, 0.0]), [0.5, 0.0]);
        assert_eq!(versions.parts(&[0.0, 2.0]), [0.0, 0.5]);
        assert_eq!(versions.parts(&[0.0, 0.0]), [0.0, 0.0]);
    }
}
