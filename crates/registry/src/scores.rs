//! From what resources reported to what the policy `criteria` compares for each flow.

use allocation::{Criteria, LiveFacts, Rule, Score};

use crate::criteria::{Criterion, Direction, water_fill};
use crate::past::{CriterionState, Past};
use crate::pool::Member;

/// Tolerance is relative to the best score, or to this part of the mean where the best is nearer to 0.
const SCALE_FLOOR: f32 = 0.01;
/// Part of all flows that goes to everyone alike when flows are divided like water: nobody is forgotten.
const EXPLORED: f32 = 0.05;
/// Before anything is learned, a flow is taken to add as much as if at least so many made up the whole value.
pub(crate) const FLOWS_ASSUMED: f64 = 50.0;
/// A flow adds at least this part of the mean score: where nothing is known of it, what was opened must count all the same.
const PER_FLOW_MIN: f32 = 1e-4;

/// One resource, as criteria look at it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    past: &'a Past,
    live: &'a LiveFacts,
}

impl<'a> Subject<'a> {
    pub(crate) fn of(member: &'a Member) -> Self {
        Self { past: &member.past, live: &member.backend.live }
    }
}

/// Scores of all resources by all criteria. `weights` are those of the resources (0: left out); they become the parts of the
/// flows that are expected until the next reports.
pub(crate) fn criteria(
    config: &[Criterion],
    subjects: &[Subject<'_>],
    balancers: f32,
    gates: Vec<f32>,
    arrivals: f64,
    weights: &mut [f32],
) -> Criteria {
    let mut scores = Vec::with_capacity(config.len() * subjects.len());
    let mut rules = Vec::with_capacity(config.len());
    for (place, criterion) in config.iter().enumerate() {
        let most = criterion.direction() == Direction::Most;
        let of = |subject: &Subject<'_>| subject.past.criteria[place].clone();
        let from = scores.len();
        scores.extend(score_all(subjects, of, most, balancers));
        let sum: f32 = scores[from..]
            .iter()
            .zip(subjects)
            .map(|(s, subject)| s.at(subject.live.flows_open()).abs())
            .sum();
        let scale_floor = SCALE_FLOOR * sum / subjects.len().max(1) as f32;
        rules.push(Rule { most, tolerance: criterion.tolerance(), scale_floor, spill: criterion.spill() });
    }
    let spills = rules.iter().any(|rule| rule.spill.is_some());
    let busy = |subject: &Subject<'_>| subject.past.busy.clone();
    let utilization = if spills { score_all(subjects, busy, false, balancers) } else { Vec::new() };
    if rules.first().is_some_and(|rule| !rule.most && rule.spill.is_none()) {
        divide(&scores[..subjects.len()], subjects, arrivals as f32, weights);
    }
    Criteria::new(rules, scores, utilization, gates)
}

/// By one criterion. Who has said nothing of it is taken to be like the mean.
fn score_all(
    subjects: &[Subject<'_>],
    of: impl Fn(&Subject<'_>) -> CriterionState,
    most: bool,
    balancers: f32,
) -> Vec<Score> {
    let states: Vec<CriterionState> = subjects.iter().map(of).collect();
    let (mut known, mut values, mut flows) = (0.0_f64, 0.0, 0.0);
    for sampled in states.iter().filter_map(|state| state.sampled) {
        known += 1.0;
        values += (sampled.value / sampled.scale.max(f64::MIN_POSITIVE)).abs();
        flows += sampled.flows;
    }
    // Where few flows are open, most of the value is not theirs.
    let prior = if known > 0.0 { values / known / (flows / known).max(FLOWS_ASSUMED) } else { 0.0 };
    let score = |state: &CriterionState| {
        let sampled = state.sampled?;
        let per_flow = f64::from(state.footprint.per_flow(prior as f32));
        let score = sampled.score(per_flow, f64::from(balancers));
        // Of the most, too, what was opened since makes it less wanted: else all flows between two reports went to one.
        Some(if most {
            Score { base: -(sampled.value + f64::from(score.per_flow) * sampled.flows) as f32, ..score }
        } else {
            score
        })
    };
    let scores: Vec<Option<Score>> = states.iter().map(score).collect();
    let mean = |part: fn(&Score) -> f32| {
        let sum: f32 = scores.iter().flatten().map(part).sum();
        if known > 0.0 { sum / known as f32 } else { 0.0 }
    };
    let usual = Score { base: mean(|score| score.base), per_flow: mean(|score| score.per_flow) };
    scores.into_iter().map(|score| score.unwrap_or(usual)).collect()
}

/// Divides the flows that are expected until the next reports like water: those of the least score get the first of them.
fn divide(scores: &[Score], subjects: &[Subject<'_>], arrivals: f32, weights: &mut [f32]) {
    let now: Vec<f32> =
        scores.iter().zip(subjects).map(|(s, subject)| s.at(subject.live.flows_open())).collect();
    let mean = now.iter().map(|score| score.abs()).sum::<f32>() / now.len().max(1) as f32;
    let floor = (mean * PER_FLOW_MIN).max(f32::MIN_POSITIVE);
    let capacities: Vec<f32> = scores.iter().map(|score| score.per_flow.max(floor).recip()).collect();
    let level = |((score, capacity), weight): ((&f32, &f32), &f32)| {
        if *weight > 0.0 { score * capacity } else { f32::INFINITY }
    };
    let levels: Vec<f32> = now.iter().zip(&capacities).zip(weights.iter()).map(level).collect();
    let eligible = weights.iter().filter(|weight| **weight > 0.0).count() as f32;
    let mut parts = Vec::new();
    water_fill(&levels, &capacities, arrivals, EXPLORED, &mut parts);
    for (weight, part) in weights.iter_mut().zip(parts) {
        if *weight > 0.0 {
            *weight = (part * eligible).max(f32::MIN_POSITIVE);
        }
    }
}
