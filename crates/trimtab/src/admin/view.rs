//! Control's answers as people and scripts see them. The JSON keys are those of the fields here: stable.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use api::v1::{
    Candidate, Capabilities, CheckStatus, Decision, ExplainResponse, ListVersionsResponse, PoolStatus,
    ResourceState, ResourceStatus, VersionStatus,
};
use serde::Serialize;

use super::ScriptView;
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
    /// From before a restart: while it answers when it is connected to.
    Remembered,
}

impl StateView {
    fn of(wire: i32) -> Self {
        match ResourceState::try_from(wire) {
            Ok(ResourceState::Ready) => Self::Ready,
            Ok(ResourceState::Draining) => Self::Draining,
            Ok(ResourceState::NotReady) => Self::NotReady,
            Ok(ResourceState::Down) => Self::Down,
            Ok(ResourceState::Remembered) => Self::Remembered,
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
            Self::Remembered => "remembered",
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
    /// What it is and can do, as it said last and with what operators entered.
    pub labels: BTreeMap<String, String>,
    /// The version of what it serves.
    pub version: String,
    /// Most flows it takes; 0: no limit.
    pub flows_max: u32,
    /// Grows with each of its starts.
    pub incarnation: u64,
    /// How its utilization is fetched, and what came of it; `null`: it reports.
    pub utilization_script: Option<ScriptView>,
    /// What came of the balancer's active checks of it; `null`: its pool has none.
    pub check: Option<CheckView>,
}

/// A resource's active checks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckView {
    /// What is spoken.
    pub kind: String,
    /// `up`, `down`, or `unknown` before the first result.
    pub state: String,
    /// Of the newest: `passed`, `refused`, `timed_out` or `failed`; empty: there is none.
    pub result: String,
    /// What the service said to it, or why that is not well.
    pub detail: String,
    /// Of the newest; `null`: there is none.
    pub age_seconds: Option<f64>,
    /// Results in a row like the newest.
    pub in_a_row: u32,
    /// How long the newest took.
    pub seconds: f64,
    /// Those that passed.
    pub passed_total: u64,
    /// Those that did not.
    pub failed_total: u64,
}

impl From<CheckStatus> for CheckView {
    fn from(status: CheckStatus) -> Self {
        Self {
            kind: status.kind,
            state: status.state,
            result: status.result,
            detail: status.detail,
            age_seconds: seconds(status.age),
            in_a_row: status.in_a_row,
            seconds: status.seconds,
            passed_total: status.passed_total,
            failed_total: status.failed_total,
        }
    }
}

impl From<ResourceStatus> for ResourceView {
    fn from(status: ResourceStatus) -> Self {
        let resource = status.resource.unwrap_or_default();
        Self {
            check: status.check.map(CheckView::from),
            utilization_script: resource.utilization_script.map(ScriptView::from),
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

impl CheckView {
    /// Its state; beside it, how many of the newest contradict it.
    fn word(&self) -> String {
        let contradicts = (self.state == "up") != (self.result == "passed");
        if contradicts && !self.result.is_empty() {
            return format!("{}, {} {}", self.state, self.in_a_row, self.result.replace('_', " "));
        }
        self.state.clone()
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
    /// Resources from before a restart that have not reported since; they get new flows if they answer.
    pub resources_remembered: u32,
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
            resources_remembered: status.resources_remembered,
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
    /// What the connection requires.
    pub requires: Vec<String>,
    /// Every set of requirements that a table is kept for.
    pub tables: Vec<String>,
    /// How the policy chooses, in words.
    pub rule: String,
    /// Who would get the next connection.
    pub next: String,
    /// Why nobody would; empty: somebody would.
    pub no_backend: String,
    /// Every guard, whether it holds or not.
    pub guards: Vec<GuardView>,
    /// How many balancers share the pool.
    pub balancers: f64,
    /// The last selections, newest first.
    pub last: Vec<DecisionView>,
}

/// A guard of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GuardView {
    /// Its name.
    pub name: String,
    /// Whether it does anything now.
    pub holds: bool,
    /// What it sees and does.
    pub detail: String,
}

/// One selection that was made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DecisionView {
    /// How long ago.
    pub age_seconds: Option<f64>,
    /// By which worker.
    pub worker: u32,
    /// Where the connection came in.
    pub listener: String,
    /// Which of the listener's routes the flow met, counted from 1; 0: none.
    pub route: u32,
    /// Of the table that it was made by.
    pub generation: u64,
    /// Who got the connection; empty: nobody.
    pub chosen: String,
    /// Why nobody did; empty: somebody did.
    pub no_backend: String,
    /// The side of a version split that it fell to.
    pub version: String,
    /// The client had been given it before: affinity decided, not the policy.
    pub kept: bool,
    /// Resources that were tried for it before.
    pub tried: u32,
    /// Resources that the table had for it.
    pub eligible: u32,
    /// Those that were looked at.
    pub looks: Vec<LookView>,
    /// Those that the table left out.
    pub left_out: Vec<LeftOutView>,
}

/// A resource that a selection looked at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LookView {
    /// Its identity.
    pub id: String,
    /// Open on it then.
    pub flows_open: u64,
    /// Its weight then.
    pub weight: f64,
    /// Its cost then.
    pub cost: f64,
    /// Why it could not be taken; empty: it could.
    pub passed_over: String,
}

/// A resource that a table left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOutView {
    /// Its identity.
    pub id: String,
    /// Why.
    pub why: String,
}

impl From<Decision> for DecisionView {
    fn from(decision: Decision) -> Self {
        let look = |look: api::v1::Look| LookView {
            id: look.id,
            flows_open: look.flows_open,
            weight: look.weight,
            cost: look.cost,
            passed_over: look.passed_over,
        };
        Self {
            age_seconds: seconds(decision.age),
            worker: decision.worker,
            listener: decision.listener,
            route: decision.route,
            generation: decision.generation,
            chosen: decision.chosen,
            no_backend: decision.no_backend,
            version: decision.version,
            kept: decision.kept,
            tried: decision.tried,
            eligible: decision.eligible,
            looks: decision.looks.into_iter().map(look).collect(),
            left_out: decision.left_out.into_iter().map(|l| LeftOutView { id: l.id, why: l.why }).collect(),
        }
    }
}

/// A version of a split pool, beside the others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VersionView {
    /// The version.
    pub version: String,
    /// What the others are compared with.
    pub baseline: bool,
    /// Configured or set, 0 to 1.
    pub share_wanted: f64,
    /// In force, 0 to 1.
    pub share: f64,
    /// Why its share was taken from it; empty: it was not.
    pub aborted: String,
    /// Resources that are registered.
    pub resources: u32,
    /// Those of them that get new flows.
    pub resources_ready: u32,
    /// Flows open now.
    pub flows_open: u64,
    /// Flows opened.
    pub flows_opened_total: u64,
    /// Connects that failed.
    pub connect_failures_total: u64,
    /// Flows that it reset.
    pub resets_total: u64,
    /// Bytes delivered to clients.
    pub bytes_to_client_total: u64,
    /// Bytes delivered to it.
    pub bytes_to_backend_total: u64,
    /// Of the connects lately; `null`: too few to tell.
    pub connect_failure_ratio: Option<f64>,
    /// Of the flows lately.
    pub reset_ratio: Option<f64>,
    /// Mean time of a connect lately.
    pub connect_seconds: Option<f64>,
    /// Mean time to the first byte lately.
    pub first_byte_seconds: Option<f64>,
    /// Mean of what its resources report.
    pub utilization: Option<f64>,
    /// The same for each flow open.
    pub utilization_per_flow: Option<f64>,
    /// How long it has been worse than the baseline; `null`: it is not.
    pub worse_for_seconds: Option<f64>,
    /// By what.
    pub worse_by: Vec<String>,
}

impl From<VersionStatus> for VersionView {
    fn from(status: VersionStatus) -> Self {
        let known = |value: f64| (value >= 0.0).then_some(value);
        Self {
            version: status.version,
            baseline: status.baseline,
            share_wanted: status.share_wanted,
            share: status.share,
            aborted: status.aborted,
            resources: status.resources,
            resources_ready: status.resources_ready,
            flows_open: status.flows_open,
            flows_opened_total: status.flows_opened_total,
            connect_failures_total: status.connect_failures_total,
            resets_total: status.resets_total,
            bytes_to_client_total: status.bytes_to_client_total,
            bytes_to_backend_total: status.bytes_to_backend_total,
            connect_failure_ratio: known(status.connect_failure_ratio),
            reset_ratio: known(status.reset_ratio),
            connect_seconds: known(status.connect_seconds),
            first_byte_seconds: known(status.first_byte_seconds),
            utilization: known(status.utilization),
            utilization_per_flow: known(status.utilization_per_flow),
            worse_for_seconds: seconds(status.worse_for),
            worse_by: status.worse_by,
        }
    }
}

/// `versions`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VersionsView {
    /// The pool.
    pub pool: String,
    /// By what new flows are divided: `share` or `client`.
    pub by: String,
    /// The baseline first; empty: the pool is not split.
    pub versions: Vec<VersionView>,
}

impl From<ListVersionsResponse> for VersionsView {
    fn from(answer: ListVersionsResponse) -> Self {
        let versions = answer.versions.into_iter().map(VersionView::from).collect();
        Self { pool: answer.pool, by: answer.by, versions }
    }
}

/// What an operator entered of a resource.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CapabilitiesView {
    /// Its identity.
    pub id: String,
    /// What was entered.
    pub labels: BTreeMap<String, String>,
    /// Whether it has joined.
    pub joined: bool,
}

impl From<Capabilities> for CapabilitiesView {
    fn from(of: Capabilities) -> Self {
        Self { id: of.id, labels: of.labels.into_iter().collect(), joined: of.joined }
    }
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
    /// `(flows_open x balancers + 1) / weight`: what selection compares under the default policy.
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
    /// The version of what it serves.
    pub version: String,
    /// The side of the pool's split that it is on; empty: there is none.
    pub side: String,
    /// What it is and can do, with what operators entered.
    pub labels: BTreeMap<String, String>,
    /// To how many balancers it reports.
    pub balancers: u32,
    /// Smoothed time to its first byte; 0: not measured.
    pub latency_seconds: f64,
    /// By each criterion of the pool.
    pub scores: Vec<ScoreView>,
    /// Utilization that its history foretells; `null`: none.
    pub forecast: Option<f64>,
    /// What came of the balancer's active checks of it; `null`: its pool has none.
    pub check: Option<CheckView>,
}

/// A resource by one criterion.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoreView {
    /// As configured.
    pub criterion: String,
    /// As of its newest sample; `null`: there is none.
    pub value: Option<f64>,
    /// What one more flow adds, as far as was learned.
    pub per_flow: Option<f64>,
    /// Of the newest sample.
    pub age_seconds: Option<f64>,
}

impl From<ExplainResponse> for ExplainView {
    fn from(answer: ExplainResponse) -> Self {
        Self {
            pool: answer.pool,
            policy: answer.policy,
            generation: answer.generation,
            guard: answer.guard,
            candidates: answer.candidates.into_iter().map(CandidateView::from).collect(),
            requires: answer.requires,
            tables: answer.tables,
            rule: answer.rule,
            next: answer.next,
            no_backend: answer.no_backend,
            guards: answer
                .guards
                .into_iter()
                .map(|guard| GuardView { name: guard.name, holds: guard.holds, detail: guard.detail })
                .collect(),
            balancers: answer.balancers,
            last: answer.last.into_iter().map(DecisionView::from).collect(),
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
            version: candidate.version,
            side: candidate.side,
            labels: candidate.labels.into_iter().collect(),
            balancers: candidate.balancers,
            latency_seconds: candidate.latency_seconds,
            scores: candidate
                .scores
                .into_iter()
                .map(|score| ScoreView {
                    value: Some(score.value).filter(|value| value.is_finite()),
                    per_flow: Some(score.per_flow).filter(|value| value.is_finite()),
                    age_seconds: seconds(score.age),
                    criterion: score.criterion,
                })
                .collect(),
            forecast: (candidate.forecast >= 0.0).then_some(candidate.forecast),
            check: candidate.check.map(CheckView::from),
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
        "POOL", "ID", "ADDRESS", "STATE", "CHECK", ">WEIGHT", ">SHARE", ">OPEN", ">OPENED", ">FAILED",
        ">CPU", ">MEMORY", ">REPORT",
    ]);
    for resource in resources {
        table.row([
            resource.pool.clone(),
            resource.id.clone(),
            resource.address.clone(),
            resource.state.word().to_owned(),
            resource.check.as_ref().map_or_else(|| "-".to_owned(), CheckView::word),
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
        ">REMEMBERED",
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
            pool.resources_remembered.to_string(),
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
    if !explained.rule.is_empty() {
        let _ =
            writeln!(out, "{}; {:.1} balancers", printable(&explained.rule), explained.balancers.max(1.0));
    }
    if !explained.requires.is_empty() {
        let _ = writeln!(out, "requires {}", printable(&explained.requires.join(", ")));
    }
    if !explained.guard.is_empty() {
        let _ = writeln!(out, "weights are held: {}", printable(&explained.guard));
    }
    for guard in explained.guards.iter().filter(|guard| guard.holds) {
        let _ = writeln!(out, "guard {}: {}", printable(&guard.name), printable(&guard.detail));
    }
    if !explained.next.is_empty() {
        let _ = writeln!(out, "the next connection would go to {}", printable(&explained.next));
    } else if !explained.no_backend.is_empty() {
        let _ = writeln!(out, "the next connection would be reset: {}", printable(&explained.no_backend));
    }
    let (left_out, considered): (Vec<_>, Vec<_>) =
        explained.candidates.iter().partition(|candidate| !candidate.left_out.is_empty());
    if explained.candidates.is_empty() {
        out.push_str("no resource has joined it: the next connection would be reset\n");
    } else if considered.is_empty() {
        out.push_str("nobody is considered: the next connection would be reset\n");
    } else {
        out.push_str("\nconsidered, cheapest first; cost = (open x balancers + 1) / weight\n");
        out.push_str(&considered_table(&considered));
        out.push_str(&scores_table(&considered));
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
    if !explained.last.is_empty() {
        out.push_str("\nlast selections, newest first\n");
        explained.last.iter().for_each(|decision| out.push_str(&decision_text(decision)));
    }
    out
}

fn considered_table(considered: &[&CandidateView]) -> String {
    let split = considered.iter().any(|candidate| !candidate.side.is_empty());
    let mut table = Table::new(&[
        "ID",
        "ADDRESS",
        ">COST",
        ">OPEN",
        ">WEIGHT",
        ">SHARE",
        ">UTILIZATION",
        ">FORECAST",
        ">RATE",
        "OF",
        ">LATENCY",
        ">START",
        ">REPORT",
        "NOTES",
    ]);
    for candidate in considered {
        let mut notes = candidate.notes.clone();
        if split {
            notes.insert(0, format!("version {} on side {}", candidate.version, candidate.side));
        }
        table.row([
            candidate.id.clone(),
            candidate.address.clone(),
            format!("{:.2}", candidate.cost),
            candidate.flows_open.to_string(),
            format!("{:.2}", candidate.weight),
            percent(Some(candidate.share)),
            percent(Some(candidate.utilization_ewma)),
            percent(candidate.forecast),
            format!("{:.1}/s", candidate.rate_ewma),
            candidate.rate_unit.clone(),
            millis(Some(candidate.latency_seconds).filter(|seconds| *seconds > 0.0)),
            percent(Some(candidate.slow_start)),
            age(candidate.report_age_seconds),
            notes.join("; "),
        ]);
    }
    table.render()
}

/// Each criterion's scores; nothing where the pool has none.
fn scores_table(considered: &[&CandidateView]) -> String {
    if considered.iter().all(|candidate| candidate.scores.is_empty()) {
        return String::new();
    }
    let mut table = Table::new(&["ID", "CRITERION", ">VALUE", ">PER FLOW", ">SAMPLE"]);
    for candidate in considered {
        for score in &candidate.scores {
            let number =
                |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
            table.row([
                candidate.id.clone(),
                score.criterion.clone(),
                number(score.value),
                number(score.per_flow),
                age(score.age_seconds),
            ]);
        }
    }
    format!("\ncriteria, in their order\n{}", table.render())
}

fn decision_text(decision: &DecisionView) -> String {
    let to = if decision.chosen.is_empty() { &decision.no_backend } else { &decision.chosen };
    let mut out = format!(
        "{} ago, {}, generation {}, {} eligible",
        age(decision.age_seconds),
        printable(&decision.listener),
        decision.generation,
        decision.eligible
    );
    if decision.route > 0 {
        let _ = write!(out, ", route {}", decision.route);
    }
    if !decision.version.is_empty() {
        let _ = write!(out, ", version {}", printable(&decision.version));
    }
    if decision.tried > 0 {
        let _ = write!(out, ", {} tried before", decision.tried);
    }
    let _ = writeln!(out, " -> {}{}", printable(to), if decision.kept { ", kept by affinity" } else { "" });
    for look in &decision.looks {
        let _ = write!(
            out,
            "    {}  open {}  weight {:.2}  cost {:.3}",
            printable(&look.id),
            look.flows_open,
            look.weight,
            look.cost
        );
        if look.passed_over.is_empty() {
            out.push('\n');
        } else {
            let _ = writeln!(out, "  passed over: {}", printable(&look.passed_over));
        }
    }
    for left in &decision.left_out {
        let _ = writeln!(out, "    {}  left out: {}", printable(&left.id), printable(&left.why));
    }
    out
}

/// `versions`, for people.
pub(super) fn versions_table(versions: &VersionsView) -> String {
    if versions.versions.is_empty() {
        return format!(
            "pool {} is not split between versions; [pool.split] does it\n",
            printable(&versions.pool)
        );
    }
    let mut table = Table::new(&[
        "VERSION",
        "STATE",
        ">SHARE",
        ">READY",
        ">OPEN",
        ">OPENED",
        ">FAILED",
        ">RESET",
        ">CONNECT",
        ">FIRST BYTE",
        ">TO CLIENT",
        ">TO BACKEND",
        ">UTILIZATION",
        ">PER FLOW",
    ]);
    for version in &versions.versions {
        let state = match version {
            VersionView { aborted, .. } if !aborted.is_empty() => "aborted".to_owned(),
            VersionView { baseline: true, .. } => "baseline".to_owned(),
            VersionView { worse_for_seconds: Some(seconds), .. } => format!("worse for {seconds:.0}s"),
            _ => "compared".to_owned(),
        };
        let rate =
            |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |r| format!("{:.2}%", r * 100.0));
        table.row([
            version.version.clone(),
            state,
            percent(Some(version.share)),
            format!("{}/{}", version.resources_ready, version.resources),
            version.flows_open.to_string(),
            version.flows_opened_total.to_string(),
            rate(version.connect_failure_ratio),
            rate(version.reset_ratio),
            millis(version.connect_seconds),
            millis(version.first_byte_seconds),
            version.bytes_to_client_total.to_string(),
            version.bytes_to_backend_total.to_string(),
            percent(version.utilization),
            rate(version.utilization_per_flow),
        ]);
    }
    let mut out = format!(
        "pool {}, new connections divided by {}\n",
        printable(&versions.pool),
        printable(&versions.by)
    );
    out.push_str(&table.render());
    for version in &versions.versions {
        let name = printable(&version.version);
        if !version.aborted.is_empty() {
            let _ = writeln!(out, "{name} was aborted: {}", printable(&version.aborted));
            let _ = writeln!(
                out,
                "  give it a share again: trimtab versions {} --set {name}=N%",
                printable(&versions.pool)
            );
        } else if !version.worse_by.is_empty() {
            let _ = writeln!(out, "{name} is worse: {}", printable(&version.worse_by.join("; ")));
        }
    }
    out
}

/// `capabilities`, for people.
pub(super) fn capabilities_table(all: &[CapabilitiesView]) -> String {
    if all.is_empty() {
        return "nothing was entered; `trimtab capabilities ID LABEL…` does it, before or after a resource joins\n".to_owned();
    }
    let mut table = Table::new(&["ID", "JOINED", "LABELS"]);
    for of in all {
        let labels: Vec<_> = of.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        table.row([of.id.clone(), if of.joined { "yes" } else { "no" }.to_owned(), labels.join(" ")]);
    }
    table.render()
}

fn millis(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{:.2}ms", seconds * 1e3))
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

pub(super) fn seconds(duration: Option<prost_types::Duration>) -> Option<f64> {
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
            check: Some(CheckStatus {
                kind: "tcp".into(),
                state: "up".into(),
                result: "refused".into(),
                detail: "no".into(),
                in_a_row: 2,
                passed_total: 7,
                failed_total: 2,
                ..Default::default()
            }),
            ..Default::default()
        }
        .into()
    }

    #[test]
    fn resources_for_people() {
        assert_eq!(
            resources_table(&[resource()]),
            "POOL  ID   ADDRESS        STATE      CHECK          WEIGHT  SHARE  OPEN  OPENED  FAILED  CPU  MEMORY  REPORT\n\
             sql   pg1  10.0.0.1:5432  not ready  up, 2 refused    1.25    33%    12    3456       0  50%       -    1.2s\n"
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
            "reports_refused_total": 0, "labels": {}, "version": "15.4", "flows_max": 0, "incarnation": 7,
            "utilization_script": null, "check": {
                "kind": "tcp", "state": "up", "result": "refused", "detail": "no", "age_seconds": null,
                "in_a_row": 2, "seconds": 0.0, "passed_total": 7, "failed_total": 2
            }
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
