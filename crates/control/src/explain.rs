//! `AdminService.Explain`: why the next flow of a pool would go where, and why the last ones went where they went.

use std::net::IpAddr;

use allocation::telemetry::ListenerSnapshot;
use allocation::{
    AllocationTable, BackendIndex, Decision, Excluded, FlowKey, LeftOut, Look, PoolName, Timestamp, Verdict,
};
use api::v1;
use registry::{Candidate, Explanation, Requirements};
use tonic::Status;

use crate::Shared;
use crate::admin::unknown_pool;
use crate::parse::{self, MessageError};

/// Most past selections in one answer, and most resources that were left out of each.
const LAST_MAX: usize = 64;
const LEFT_OUT_MAX: usize = 32;

/// What is asked.
pub(crate) struct Question {
    pool: PoolName,
    client: Option<IpAddr>,
    requires: Requirements,
    last: usize,
}

impl Question {
    pub(crate) fn parse(request: v1::ExplainRequest) -> Result<Self, MessageError> {
        let client = match request.client.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| MessageError::Client(text.to_owned()))?),
        };
        Ok(Self {
            pool: parse::pool_name(&request.pool)?,
            client,
            requires: Requirements::from_texts(&request.requires)?,
            last: (request.last as usize).min(LAST_MAX),
        })
    }
}

/// The answer.
///
/// # Errors
/// If there is no such pool, or no table for what is required.
pub(crate) fn answer(shared: &Shared, question: &Question) -> Result<v1::ExplainResponse, Status> {
    let now = shared.clock.now();
    let place = shared.pools.iter().position(|pool| pool.config.name == question.pool);
    let table = place.map_or(Ok(0), |place| table_of(shared, place, &question.requires))?;
    let explanation = shared.registry.explain(&question.pool, table, now).map_err(unknown_pool)?;
    let mut response = wire(&explanation);
    for (candidate, known) in response.candidates.iter_mut().zip(&explanation.candidates) {
        candidate.notes.extend(shared.puller.note(&known.id));
        candidate.check = shared.checker.status(&known.id);
        let Some(note) = shared.checker.note(&known.id) else { continue };
        if known.left_out == Some(registry::LeftOut::ChecksFail) {
            candidate.left_out = note;
        } else {
            candidate.notes.push(note);
        }
    }
    if let Some(publisher) = place.and_then(|place| shared.pools[place].publishers.get(table)) {
        foretell(shared, &publisher.current(), question, now, &mut response);
    }
    if question.last > 0 {
        let listeners = shared.dataplane.listeners();
        // Those of other pools are sorted out here, so all that are kept are asked for.
        let decisions = shared.dataplane.decisions(usize::MAX).into_iter();
        let of_pool = |decision: &Decision| {
            listeners
                .get(usize::from(decision.listener))
                .is_some_and(|l| l.pool(decision.target) == question.pool.as_str())
        };
        let last = decisions.filter(of_pool).take(question.last);
        response.last = last.map(|decision| wire_decision(&decision, &listeners, now)).collect();
    }
    Ok(response)
}

/// The table for what the flow requires beyond the pool's own requirement.
fn table_of(shared: &Shared, place: usize, requires: &Requirements) -> Result<usize, Status> {
    let config = &shared.pools[place].config;
    if requires.is_empty() {
        return Ok(0);
    }
    let known = config.tables.iter().position(|known| known == requires);
    known.map(|place| place + 1).ok_or_else(|| {
        let tables: Vec<String> = config.tables.iter().map(ToString::to_string).collect();
        let there_are =
            if tables.is_empty() { "none requires anything".to_owned() } else { tables.join("; ") };
        Status::not_found(format!("no listener of pool {} requires {requires}: {there_are}", config.name))
    })
}

/// Who would get the next flow.
fn foretell(
    shared: &Shared,
    table: &AllocationTable,
    question: &Question,
    now: Timestamp,
    response: &mut v1::ExplainResponse,
) {
    let mut selector = shared.selector.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let key = question.client.map_or(FlowKey::from_bits(0), FlowKey::of_client);
    match selector.peek(table, key, &Excluded::none(), now) {
        Ok((index, _)) => response.next = table.backend(index).id.to_string(),
        Err(why) => response.no_backend = why.to_string(),
    }
}

fn wire(explanation: &Explanation) -> v1::ExplainResponse {
    let guards = explanation.guards.iter().map(|guard| v1::GuardStatus {
        name: guard.name.to_owned(),
        holds: guard.holds,
        detail: guard.detail.clone(),
    });
    let unit = explanation.unit.name();
    v1::ExplainResponse {
        pool: explanation.pool.to_string(),
        policy: explanation.policy.to_string(),
        generation: explanation.generation,
        guard: explanation.guard.map(|guard| guard.to_string()).unwrap_or_default(),
        candidates: explanation.candidates.iter().map(|c| wire_candidate(c, unit)).collect(),
        requires: explanation.requires.iter().map(ToString::to_string).collect(),
        tables: explanation.tables.iter().map(ToString::to_string).collect(),
        rule: explanation.policy.rule().to_owned(),
        next: String::new(),
        no_backend: String::new(),
        guards: guards.collect(),
        last: Vec::new(),
        balancers: explanation.balancers,
    }
}

fn wire_candidate(candidate: &Candidate, rate_unit: &str) -> v1::Candidate {
    let scores = candidate.scores.iter().map(|score| v1::Score {
        criterion: score.criterion.clone(),
        value: score.value,
        per_flow: score.per_flow,
        age: score.age.map(parse::wire_duration),
    });
    v1::Candidate {
        id: candidate.id.to_string(),
        address: candidate.address.to_string(),
        state: parse::state(candidate.standing.state).into(),
        left_out: candidate.left_out.as_ref().map(ToString::to_string).unwrap_or_default(),
        weight: candidate.standing.weight,
        share: candidate.standing.share,
        flows_open: u64::from(candidate.standing.flows_open),
        cost: candidate.cost,
        utilization_ewma: candidate.utilization_ewma,
        rate_ewma: candidate.rate_ewma,
        rate_unit: rate_unit.to_owned(),
        report_age: candidate.report_age.map(parse::wire_duration),
        slow_start: candidate.slow_start,
        notes: candidate.notes.iter().map(ToString::to_string).collect(),
        utilization: parse::ratios(candidate.utilization.as_deref()),
        version: candidate.version.clone(),
        side: candidate.side.clone().unwrap_or_default(),
        labels: candidate.labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        balancers: candidate.balancers,
        latency_seconds: candidate.latency.map_or(0.0, |latency| latency.as_secs_f64()),
        scores: scores.collect(),
        forecast: candidate.forecast.unwrap_or(-1.0),
        check: None,
    }
}

/// One past selection. Costs are made of the table and the flows that it saw; latency is that of now.
pub(crate) fn wire_decision(
    decision: &Decision,
    listeners: &[ListenerSnapshot],
    now: Timestamp,
) -> v1::Decision {
    let table = decision.table.side(usize::from(decision.side));
    let id = |index: BackendIndex| table.backend(index).id.to_string();
    let look = |look: &Look| v1::Look {
        id: id(look.index),
        flows_open: u64::from(look.flows_open),
        weight: f64::from(table.weights()[look.index.0 as usize]),
        cost: f64::from(table.cost(look.index, look.flows_open, decision.at)),
        passed_over: passed_over(look).to_owned(),
    };
    let members = 0..table.weights().len() as u32;
    let left_out = members
        .map(|index| (BackendIndex(index), table.left_out(BackendIndex(index))))
        .filter(|(_, why)| *why != LeftOut::Not)
        .take(LEFT_OUT_MAX)
        .map(|(index, why)| v1::LeftOut { id: id(index), why: why.to_string() });
    let side = decision.table.split().and_then(|split| split.sides.get(usize::from(decision.side)));
    v1::Decision {
        age: Some(parse::wire_duration(now.since(decision.at))),
        worker: u32::from(decision.worker),
        listener: listeners.get(usize::from(decision.listener)).map(|l| l.name.clone()).unwrap_or_default(),
        generation: table.generation(),
        chosen: decision.chosen.map(id).unwrap_or_default(),
        no_backend: decision.chosen.err().map(|why| why.to_string()).unwrap_or_default(),
        version: side.map(|side| side.version.clone()).unwrap_or_default(),
        tried: u32::from(decision.tried),
        kept: decision.kept,
        eligible: table.eligible().len() as u32,
        looks: decision.looks.as_slice().iter().map(look).collect(),
        left_out: left_out.collect(),
        route: u32::from(decision.route),
    }
}

fn passed_over(look: &Look) -> &'static str {
    match look.verdict {
        _ if look.tried => "this flow had tried it",
        Verdict::Usable | Verdict::Probe => "",
        Verdict::Paused => "connecting to it failed",
        Verdict::Ejected => "it timed out",
        Verdict::Resetting => "it reset flows before it answered",
        Verdict::Full => "it had as many flows as it takes",
    }
}
