//! Control's answers as people and scripts see them. The JSON keys are those of the fields here: stable.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use api::v1::{Candidate, ExplainResponse, PoolStatus, ResourceState, ResourceStatus};
use serde::Serialize;

use crate::output::{Table, printable};

/// Whether a resource gets new flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StateView {
    /// A state that this version does not know.
    Unknown,
    /// Yes.
    Ready,
    /// An operator drains it.
    Draining,
    /// It says no itself.
    NotReady,
    /// Connecting to it fails.
    Down,
}

impl StateView {
    fn of(wire: i32) -> Self {
        match ResourceState::try_from(wire) {
            Ok(ResourceState::Ready) => Self::Ready,
            Ok(ResourceState::Draining) => Self::Draining,
            Ok(ResourceState::NotReady) => Self::NotReady,
            Ok(ResourceState::Down) => Self::Down,
            Ok(ResourceState::Unspecified) | Err(_) => Self::Unknown,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::NotReady => "not ready",
            Self::Down => "down",
        }
    }
}

/// A resource, in `resources`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ResourceView {
    /// Its identity.
    pub id: String,
    /// The pool it joined.
    pub pool: String,
    /// Where it serves.
    pub address: String,
    /// Whether it gets new flows.
    pub state: StateView,
    /// The mean of its pool is 1.
    pub weight: f64,
    /// Its share of new flows, 0 to 1.
    pub share: f64,
    /// Flows open on it now.
    pub flows_open: u64,
    /// Flows given to it since it registered.
    pub flows_opened_total: u64,
    /// Connects to it that failed since it registered.
    pub connect_failures_total: u64,
    /// What it reported last, by dimension; ratios.
    pub utilization: BTreeMap<String, f64>,
    /// Age of that report; `null`: none yet.
    pub report_age_seconds: Option<f64>,
    /// Until its registration expires if it stays silent.
    pub lease_left_seconds: Option<f64>,
    /// Its reports that were refused.
    pub reports_refused_total: u64,
    /// What it is and can do.
    pub labels: BTreeMap<String, String>,
    /// The version of what it serves.
    pub version: String,
    /// Most flows it takes; 0: no limit.
    pub flows_max: u32,
    /// Grows with each of its starts.
    pub incarnation: u64,
}

impl From<ResourceStatus> for ResourceView {
    fn from(status: ResourceStatus) -> Self {
        let resource = status.resource.unwrap_or_default();
        Self {
            id: resource.id,
            pool: resource.pool,
            address: resource.address,
            state: StateView::of(status.state),
            weight: status.weight,
            share: status.share,
            flows_open: status.flows_open,
            flows_opened_total: status.flows_opened_total,
            connect_failures_total: status.connect_failures_total,
            utilization: sorted(status.utilization),
            report_age_seconds: seconds(status.report_age),
            lease_left_seconds: seconds(status.lease_left),
            reports_refused_total: status.reports_refused_total,
            labels: resource.labels.into_iter().collect(),
            version: resource.version,
            flows_max: resource.flows_max,
            incarnation: status.incarnation,
        }
    }
}

/// A pool, in `pools`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PoolView {
    /// Its name.
    pub name: String,
    /// How a resource is chosen.
    pub policy: String,
    /// Of its allocation table.
    pub generation: u64,
    /// Resources that get new flows.
    pub resources_ready: u32,
    /// Resources that an operator drains.
    pub resources_draining: u32,
    /// Resources that say they are not ready.
    pub resources_not_ready: u32,
    /// Resources that cannot be connected to.
    pub resources_down: u32,
    /// Flows open on all of them.
    pub flows_open: u64,
    /// Why weights are held; empty: they are not.
    pub guard: String,
    /// Who serves it.
    pub listeners: Vec<String>,
}

impl From<PoolStatus> for PoolView {
    fn from(status: PoolStatus) -> Self {
        Self {
            name: status.name,
            policy: status.policy,
            generation: status.generation,
            resources_ready: status.resources_ready,
            resources_draining: status.resources_draining,
            resources_not_ready: status.resources_not_ready,
            resources_down: status.resources_down,
            flows_open: status.flows_open,
            guard: status.guard,
            listeners: status.listeners,
        }
    }
}

/// Why the next flow of a pool would go where: `explain`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExplainView {
    /// The pool.
    pub pool: String,
    /// How a resource is chosen.
    pub policy: String,
    /// Of the table that was looked at.
    pub generation: u64,
    /// Why weights are held; empty: they are not.
    pub guard: String,
    /// Cheapest first, then those left out.
    pub candidates: Vec<CandidateView>,
}

/// One resource as `explain` sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CandidateView {
    /// Its identity.
    pub id: String,
    /// Where it serves.
    pub address: String,
    /// Whether it gets new flows.
    pub state: StateView,
    /// Why it is not considered; empty: it is.
    pub left_out: String,
    /// The mean of the pool is 1.
    pub weight: f64,
    /// Its share of new flows, 0 to 1.
    pub share: f64,
    /// Flows open on it now.
    pub flows_open: u64,
    /// `(flows_open + 1) / weight`: what selection compares.
    pub cost: f64,
    /// Smoothed utilization that the weight was made of.
    pub utilization_ewma: f64,
    /// Smoothed rate that the weight was made of.
    pub rate_ewma: f64,
    /// What `rate_ewma` counts.
    pub rate_unit: String,
    /// Age of the newest report; `null`: none yet.
    pub report_age_seconds: Option<f64>,
    /// Share of its weight that it gets while it warms up; 1: all.
    pub slow_start: f64,
    /// In words.
    pub notes: Vec<String>,
    /// The newest report, by dimension; ratios.
    pub utilization: BTreeMap<String, f64>,
}

impl From<ExplainResponse> for ExplainView {
    fn from(answer: ExplainResponse) -> Self {
        Self {
            pool: answer.pool,
            policy: answer.policy,
            generation: answer.generation,
            guard: answer.guard,
            candidates: answer.candidates.into_iter().map(CandidateView::from).collect(),
        }
    }
}

impl From<Candidate> for CandidateView {
    fn from(candidate: Candidate) -> Self {
        Self {
            id: candidate.id,
            address: candidate.address,
            state: StateView::of(candidate.state),
            left_out: candidate.left_out,
            weight: candidate.weight,
            share: candidate.share,
            flows_open: candidate.flows_open,
            cost: candidate.cost,
            utilization_ewma: candidate.utilization_ewma,
            rate_ewma: candidate.rate_ewma,
            rate_unit: candidate.rate_unit,
            report_age_seconds: seconds(candidate.report_age),
            slow_start: candidate.slow_start,
            notes: candidate.notes,
            utilization: sorted(candidate.utilization),
        }
    }
}

/// `resources`, for people.
pub(super) fn resources_table(resources: &[ResourceView]) -> String {
    if resources.is_empty() {
        return "no resources are registered; `trimtab agent --pool POOL --address IP:PORT` beside one joins it\n"
            .to_owned();
    }
    let mut table = Table::new(&[
        "POOL", "ID", "ADDRESS", "STATE", ">WEIGHT", ">SHARE", ">OPEN", ">OPENED", ">FAILED", ">CPU",
        ">MEMORY", ">REPORT",
    ]);
    for resource in resources {
        table.row([
            resource.pool.clone(),
            resource.id.clone(),
            resource.address.clone(),
            resource.state.word().to_owned(),
            format!("{:.2}", resource.weight),
            percent(Some(resource.share)),
            resource.flows_open.to_string(),
            resource.flows_opened_total.to_string(),
            resource.connect_failures_total.to_string(),
            percent(resource.utilization.get("cpu").copied()),
            percent(resource.utilization.get("memory").copied()),
            age(resource.report_age_seconds),
        ]);
    }
    table.render()
}

/// `pools`, for people.
pub(super) fn pools_table(pools: &[PoolView]) -> String {
    let mut table = Table::new(&[
        "POOL",
        "POLICY",
        ">READY",
        ">DRAINING",
        ">NOT READY",
        ">DOWN",
        ">OPEN",
        ">GENERATION",
        "LISTENERS",
        "GUARD",
    ]);
    for pool in pools {
        table.row([
            pool.name.clone(),
            pool.policy.clone(),
            pool.resources_ready.to_string(),
            pool.resources_draining.to_string(),
            pool.resources_not_ready.to_string(),
            pool.resources_down.to_string(),
            pool.flows_open.to_string(),
            pool.generation.to_string(),
            if pool.listeners.is_empty() { "-".to_owned() } else { pool.listeners.join(" ") },
            if pool.guard.is_empty() { "-".to_owned() } else { pool.guard.clone() },
        ]);
    }
    table.render()
}

/// `explain`, for people.
pub(super) fn explain_text(explained: &ExplainView) -> String {
    let mut out = format!(
        "pool {}: policy {}, generation {}\n",
        printable(&explained.pool),
        printable(&explained.policy),
        explained.generation
    );
    if !explained.guard.is_empty() {
        let _ = writeln!(out, "weights are held: {}", printable(&explained.guard));
    }
    let (left_out, considered): (Vec<_>, Vec<_>) =
        explained.candidates.iter().partition(|candidate| !candidate.left_out.is_empty());
    if explained.candidates.is_empty() {
        out.push_str("no resource has joined it: the next connection would be reset\n");
        return out;
    }
    if considered.is_empty() {
        out.push_str("nobody is considered: the next connection would be reset\n");
    } else {
        out.push_str("\nconsidered, cheapest first; cost = (open + 1) / weight\n");
        let mut table = Table::new(&[
            "ID",
            "ADDRESS",
            ">COST",
            ">OPEN",
            ">WEIGHT",
            ">SHARE",
            ">UTILIZATION",
            ">RATE",
            "OF",
            ">START",
            ">REPORT",
            "NOTES",
        ]);
        for candidate in considered {
            table.row([
                candidate.id.clone(),
                candidate.address.clone(),
                format!("{:.2}", candidate.cost),
                candidate.flows_open.to_string(),
                format!("{:.2}", candidate.weight),
                percent(Some(candidate.share)),
                percent(Some(candidate.utilization_ewma)),
                format!("{:.1}/s", candidate.rate_ewma),
                candidate.rate_unit.clone(),
                percent(Some(candidate.slow_start)),
                age(candidate.report_age_seconds),
                candidate.notes.join("; "),
            ]);
        }
        out.push_str(&table.render());
    }
    if !left_out.is_empty() {
        out.push_str("\nleft out\n");
        let mut table = Table::new(&["ID", "ADDRESS", "STATE", ">OPEN", "WHY"]);
        for candidate in left_out {
            table.row([
                candidate.id.clone(),
                candidate.address.clone(),
                candidate.state.word().to_owned(),
                candidate.flows_open.to_string(),
                candidate.left_out.clone(),
            ]);
        }
        out.push_str(&table.render());
    }
    out
}

fn percent(ratio: Option<f64>) -> String {
    match ratio {
        Some(ratio) if ratio.is_finite() => format!("{:.0}%", ratio * 100.0),
        _ => "-".to_owned(),
    }
}

fn age(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.1}s"))
}

fn seconds(duration: Option<prost_types::Duration>) -> Option<f64> {
    duration.map(|duration| duration.seconds as f64 + f64::from(duration.nanos) * 1e-9)
}

fn sorted(map: HashMap<String, f64>) -> BTreeMap<String, f64> {
    map.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource() -> ResourceView {
        ResourceStatus {
            resource: Some(api::v1::Resource {
                id: "pg1".into(),
                pool: "sql".into(),
                address: "10.0.0.1:5432".into(),
                version: "15.4".into(),
                ..Default::default()
            }),
            incarnation: 7,
            state: ResourceState::NotReady as i32,
            weight: 1.25,
            share: 0.333,
            flows_open: 12,
            flows_opened_total: 3456,
            report_age: Some(prost_types::Duration { seconds: 1, nanos: 250_000_000 }),
            utilization: HashMap::from([("cpu".into(), 0.5)]),
            ..Default::default()
        }
        .into()
    }

    #[test]
    fn resources_for_people() {
        assert_eq!(
            resources_table(&[resource()]),
            "POOL  ID   ADDRESS        STATE      WEIGHT  SHARE  OPEN  OPENED  FAILED  CPU  MEMORY  REPORT\n\
             sql   pg1  10.0.0.1:5432  not ready    1.25    33%    12    3456       0  50%       -    1.2s\n"
        );
        assert!(resources_table(&[]).starts_with("no resources are registered"));
    }

    #[test]
    fn resources_for_scripts() {
        let json = serde_json::to_value(resource()).unwrap();
        let expected = serde_json::json!({
            "id": "pg1", "pool": "sql", "address": "10.0.0.1:5432", "state": "not_ready", "weight": 1.25,
            "share": 0.333, "flows_open": 12, "flows_opened_total": 3456, "connect_failures_total": 0,
            "utilization": {"cpu": 0.5}, "report_age_seconds": 1.25, "lease_left_seconds": null,
            "reports_refused_total": 0, "labels": {}, "version": "15.4", "flows_max": 0, "incarnation": 7
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn explanations_tell_who_is_left_out() {
        let candidate = |id: &str, left_out: &str| Candidate {
            id: id.into(),
            address: "10.0.0.1:1".into(),
            left_out: left_out.into(),
            weight: 1.0,
            cost: 2.0,
            flows_open: 1,
            share: 1.0,
            slow_start: 1.0,
            ..Default::default()
        };
        let explained = ExplainView::from(ExplainResponse {
            pool: "sql".into(),
            policy: "adaptive".into(),
            generation: 3,
            guard: "stale reports".into(),
            candidates: vec![candidate("a", ""), candidate("b", "draining")],
            ..ExplainResponse::default()
        });
        let text = explain_text(&explained);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "pool sql: policy adaptive, generation 3");
        assert_eq!(lines[1], "weights are held: stale reports");
        assert!(lines[5].starts_with("a   10.0.0.1:1  2.00     1    1.00   100%"), "{text}");
        assert_eq!(lines[9], "b   10.0.0.1:1  unknown     1  draining");
    }
}
