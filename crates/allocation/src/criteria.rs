//! What the policy `criteria` compares for each flow: scores that follow the flows opened since they were reported.

use crate::BackendIndex;

/// One criterion, as a selection needs it. Scores are made so that less is better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// As configured it is `most(…)`: it keeps at least half of those it is asked about, so that nobody gets more than twice its
    /// share for having had the most before.
    pub most: bool,
    /// Relative width of the band in which scores count as alike; 0.1 is 10 %.
    pub tolerance: f32,
    /// The band is relative to the best score, or to this where the best is nearer to 0.
    pub scale_floor: f32,
    /// Utilization from which a backend does not count as being in its tier, for a criterion that is a price.
    pub spill: Option<f32>,
}

/// A score that follows our own flows: `base + per_flow x flows open`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    /// As reported, less what the flows add that were open then.
    pub base: f32,
    /// What one flow adds.
    pub per_flow: f32,
}

impl Score {
    /// With so many flows open.
    pub fn at(self, flows_open: u32) -> f32 {
        self.base + self.per_flow * flows_open as f32
    }
}

/// The scores of all backends by all criteria.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Criteria {
    rules: Box<[Rule]>,
    /// By rule, then by backend.
    scores: Box<[Score]>,
    /// Projected utilization by backend; empty where no rule spills.
    utilization: Box<[Score]>,
    /// Part of the flows that a backend is considered for, by backend: less than 1 while it starts slowly. Empty: all of them.
    gates: Box<[f32]>,
}

/// Most backends that are compared for one flow.
pub(crate) const CONSIDERED_MAX: usize = 32;

impl Criteria {
    /// # Panics
    /// If there is not one score for each rule and backend, or `utilization` and `gates` have another number of backends.
    pub fn new(rules: Vec<Rule>, scores: Vec<Score>, utilization: Vec<Score>, gates: Vec<f32>) -> Self {
        let backends = if rules.is_empty() { 0 } else { scores.len() / rules.len() };
        assert_eq!(scores.len(), backends * rules.len(), "one score for each rule and backend");
        assert!(utilization.is_empty() || utilization.len() == backends, "one utilization for each backend");
        assert!(gates.is_empty() || gates.len() == backends, "one gate for each backend");
        Self {
            rules: rules.into(),
            scores: scores.into(),
            utilization: utilization.into(),
            gates: gates.into(),
        }
    }

    /// The criteria in their order.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// A backend's score by a rule.
    ///
    /// # Panics
    /// If there is no such rule or backend.
    pub fn score(&self, rule: usize, index: BackendIndex) -> Score {
        let backends = self.scores.len() / self.rules.len();
        self.scores[rule * backends + index.0 as usize]
    }

    /// Part of the flows that the backend is considered for.
    pub(crate) fn gate(&self, index: BackendIndex) -> f32 {
        self.gates.get(index.0 as usize).copied().unwrap_or(1.0)
    }

    /// Of these backends with these flows open, keeps those that meet the criteria: of each criterion in its order, those
    /// within its tolerance of the best that is left. The order stays; at least one is left where there was one.
    pub fn keep_best(&self, left: &mut Considered) {
        for (place, rule) in self.rules.iter().enumerate() {
            if left.count <= 1 {
                return;
            }
            self.keep(place, rule, left);
        }
    }

    fn keep(&self, place: usize, rule: &Rule, left: &mut Considered) {
        let mut scores = [0.0_f32; CONSIDERED_MAX];
        let mut best = f32::INFINITY;
        for (score, &(index, open)) in scores.iter_mut().zip(&left.backends[..left.count]) {
            *score = self.score(place, index).at(open);
            if let (Some(spill), Some(utilization)) = (rule.spill, self.utilization.get(index.0 as usize))
                && utilization.at(open) > spill
            {
                // Out of its tier. Where all are, they are compared by price again, all alike in this.
                *score = f32::INFINITY;
            }
            best = best.min(*score);
        }
        if best == f32::INFINITY {
            return;
        }
        let mut most = best + rule.tolerance * best.abs().max(rule.scale_floor);
        if rule.most {
            let mut sorted = scores;
            let sorted = &mut sorted[..left.count];
            sorted.sort_unstable_by(f32::total_cmp);
            most = most.max(sorted[left.count.div_ceil(2) - 1]);
        }
        let mut kept = 0;
        for (from, score) in scores.iter().enumerate().take(left.count) {
            if *score <= most {
                left.backends[kept] = left.backends[from];
                kept += 1;
            }
        }
        left.count = kept;
    }
}

/// Backends that are compared for one flow, with the flows open on each; on the stack.
#[derive(Debug, Clone)]
pub struct Considered {
    backends: [(BackendIndex, u32); CONSIDERED_MAX],
    count: usize,
}

impl Default for Considered {
    fn default() -> Self {
        Self { backends: [(BackendIndex(0), 0); CONSIDERED_MAX], count: 0 }
    }
}

impl Considered {
    /// One more, while there is room for it.
    pub fn push(&mut self, index: BackendIndex, flows_open: u32) {
        if let Some(place) = self.backends.get_mut(self.count) {
            *place = (index, flows_open);
            self.count += 1;
        }
    }

    /// Those that are left.
    pub fn as_slice(&self) -> &[(BackendIndex, u32)] {
        &self.backends[..self.count]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> Rule {
        Rule { most: false, tolerance: 0.1, scale_floor: 0.01, spill: None }
    }

    fn fixed(scores: &[f32]) -> Vec<Score> {
        scores.iter().map(|base| Score { base: *base, per_flow: 0.0 }).collect()
    }

    fn kept(criteria: &Criteria, open: &[u32]) -> Vec<u32> {
        let mut left = Considered::default();
        (0..).zip(open).for_each(|(index, open)| left.push(BackendIndex(index), *open));
        criteria.keep_best(&mut left);
        left.as_slice().iter().map(|(index, _)| index.0).collect()
    }

    #[test]
    fn criteria_apply_in_their_order_within_tolerance() {
        let mut scores = fixed(&[0.50, 0.52, 0.54, 0.80]);
        scores.extend(fixed(&[3.0, 1.0, 1.05, 0.1]));
        let criteria = Criteria::new(vec![rule(), rule()], scores, vec![], vec![]);
        assert_eq!(kept(&criteria, &[0; 4]), [1, 2], "the last is best by the second alone");
    }

    #[test]
    fn scores_follow_flows() {
        let scores = vec![Score { base: 0.2, per_flow: 0.05 }, Score { base: 0.3, per_flow: 0.05 }];
        let criteria = Criteria::new(vec![rule()], scores, vec![], vec![]);
        assert_eq!(kept(&criteria, &[0, 0]), [0]);
        assert_eq!(kept(&criteria, &[4, 0]), [1]);
    }

    #[test]
    fn most_keeps_half() {
        let most = Rule { most: true, ..rule() };
        let criteria = Criteria::new(vec![most], fixed(&[-9.0, -1.0, -2.0, -3.0, 0.0]), vec![], vec![]);
        assert_eq!(kept(&criteria, &[0; 5]), [0, 2, 3]);
    }

    #[test]
    fn a_cheap_tier_spills_when_it_is_full() {
        let price = Rule { spill: Some(0.8), tolerance: 0.0, ..rule() };
        let busy = |base| Score { base, per_flow: 0.1 };
        let utilization = vec![busy(0.5), busy(0.5), busy(0.0)];
        let criteria = Criteria::new(vec![price], fixed(&[1.0, 1.0, 9.0]), utilization, vec![]);
        assert_eq!(kept(&criteria, &[0, 0, 0]), [0, 1]);
        assert_eq!(kept(&criteria, &[4, 0, 0]), [1]);
        assert_eq!(kept(&criteria, &[4, 4, 0]), [2], "the dear one takes the rest");
        assert_eq!(kept(&criteria, &[4, 4, 9]), [0, 1, 2], "all are full");
    }
}
