//! Whether a resource gets new flows: one rule over all that is known of it, whoever knows it.
//!
//! `docs/health.md` has the rule as a table for people. A test reads that table and walks every combination of facts by both.

use allocation::{LiveFacts, Timestamp, Verdict};

use crate::ResourceState;

/// What a resource says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Said {
    /// It wants new flows.
    Ready,
    /// It does not: its own service does not answer, or it leaves.
    NotReady,
    /// Nothing since the balancer's restart; before, it was ready.
    Silent,
}

/// What asking its service came to: the pool's active checks, or for a resource that is only remembered, connecting to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Checked {
    /// There is no check, or no result yet.
    #[default]
    Unknown,
    /// It works.
    Passes,
    /// It does not.
    Fails,
}

/// What the flows given to it came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flows {
    /// Nothing speaks against it.
    Work,
    /// Connects to it failed or timed out, or it reset flows before it answered, and its pause is not over.
    Rest,
    /// The same, and its pause is over: one flow may try it.
    Due,
}

impl Flows {
    /// Of what the dataplane knows.
    pub fn of(live: &LiveFacts, now: Timestamp) -> Self {
        // A limit of flows is no matter of health.
        match live.verdict(0, now) {
            Verdict::Usable | Verdict::Full => Self::Work,
            Verdict::Probe => Self::Due,
            Verdict::Paused | Verdict::Ejected | Verdict::Resetting => Self::Rest,
        }
    }
}

/// All that is known of a resource's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Facts {
    /// An operator drains it.
    pub drained: bool,
    /// Its lease is not over.
    pub lease_holds: bool,
    /// By itself.
    pub said: Said,
    /// By asking its service.
    pub checked: Checked,
    /// By its flows.
    pub flows: Flows,
}

/// Why a resource gets no new flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Against {
    /// An operator drains it.
    Operator,
    /// Its lease is over.
    Lease,
    /// It says so itself.
    Itself,
    /// Its checks fail.
    Checks,
    /// It is only remembered, and nobody has found out yet whether it is still there.
    Unproven,
    /// Its flows failed.
    Flows,
}

/// Which new flows a resource gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NewFlows {
    /// Its share.
    All,
    /// One, to see whether it works again.
    One,
    /// None.
    None(Against),
}

/// What follows from the facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Health {
    /// Its state, as everybody is shown it.
    pub state: ResourceState,
    /// What it gets.
    pub new_flows: NewFlows,
}

/// The rule. Whoever knows more certainly comes first: an operator, the lease, the resource itself, its checks, its flows.
///
/// What only flows say is overruled where more than half of those looked at are said to be at fault, or all of a saturated fleet
/// time out ([`allocation::Selector`]): then it is not they. Checks are not overruled.
pub const fn judge(facts: Facts) -> Health {
    let Facts { drained, lease_holds, said, checked, flows } = facts;
    if drained {
        return Health::none(ResourceState::Draining, Against::Operator);
    }
    if !lease_holds {
        return Health::none(ResourceState::Down, Against::Lease);
    }
    let up = match said {
        Said::NotReady => return Health::none(ResourceState::NotReady, Against::Itself),
        Said::Ready => ResourceState::Ready,
        Said::Silent => ResourceState::Remembered,
    };
    match (checked, said, flows) {
        (Checked::Fails, ..) => Health::none(ResourceState::Down, Against::Checks),
        (Checked::Unknown, Said::Silent, _) => Health::none(up, Against::Unproven),
        (_, _, Flows::Rest) => Health::none(ResourceState::Down, Against::Flows),
        // Its service works; only a flow can tell that flows do.
        (Checked::Passes, _, Flows::Due) => Health { state: up, new_flows: NewFlows::One },
        (Checked::Unknown, _, Flows::Due) => Health { state: ResourceState::Down, new_flows: NewFlows::One },
        (_, _, Flows::Work) => Health { state: up, new_flows: NewFlows::All },
    }
}

impl Health {
    const fn none(state: ResourceState, against: Against) -> Self {
        Self { state, new_flows: NewFlows::None(against) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of the table in `docs/health.md`: five facts, a state, and what the resource gets.
    fn rows() -> Vec<[String; 7]> {
        let page = include_str!("../../../docs/health.md");
        let table = page.split("| operator |").nth(1).expect("the page has the table");
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        let cells = |line: &str| {
            let cells: Vec<String> =
                line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
            cells.try_into().unwrap_or_else(|cells| panic!("seven cells: {cells:?}"))
        };
        rows.map(cells).collect()
    }

    fn words(facts: Facts) -> [&'static str; 5] {
        [
            if facts.drained { "drains it" } else { "does nothing" },
            if facts.lease_holds { "holds" } else { "is over" },
            match facts.said {
                Said::Ready => "is ready",
                Said::NotReady => "is not ready",
                Said::Silent => "is silent since a restart",
            },
            match facts.checked {
                Checked::Unknown => "no result",
                Checked::Passes => "pass",
                Checked::Fails => "fail",
            },
            match facts.flows {
                Flows::Work => "work",
                Flows::Rest => "failed, its pause lasts",
                Flows::Due => "failed, its pause is over",
            },
        ]
    }

    fn gets(new_flows: NewFlows) -> &'static str {
        match new_flows {
            NewFlows::All => "its share",
            NewFlows::One => "one, to see",
            NewFlows::None(Against::Operator) => "none: drained",
            NewFlows::None(Against::Lease) => "none: expired",
            NewFlows::None(Against::Itself) => "none: not ready",
            NewFlows::None(Against::Checks) => "none: checks fail",
            NewFlows::None(Against::Unproven) => "none: unproven",
            NewFlows::None(Against::Flows) => "none: flows failed",
        }
    }

    fn every() -> impl Iterator<Item = Facts> {
        let bools = [false, true];
        bools.into_iter().flat_map(move |drained| {
            bools.into_iter().flat_map(move |lease_holds| {
                [Said::Ready, Said::NotReady, Said::Silent].into_iter().flat_map(move |said| {
                    [Checked::Unknown, Checked::Passes, Checked::Fails].into_iter().flat_map(move |checked| {
                        [Flows::Work, Flows::Rest, Flows::Due].into_iter().map(move |flows| Facts {
                            drained,
                            lease_holds,
                            said,
                            checked,
                            flows,
                        })
                    })
                })
            })
        })
    }

    #[test]
    fn the_rule_is_the_table_of_the_manual() {
        let rows = rows();
        let mut used = vec![false; rows.len()];
        assert_eq!(every().count(), 2 * 2 * 3 * 3 * 3);
        for facts in every() {
            let words = words(facts);
            let fits =
                |cell: &String, word: &str| cell.is_empty() || cell.split(" or ").any(|one| one == word);
            let place =
                rows.iter().position(|row| row.iter().zip(words).all(|(cell, word)| fits(cell, word)));
            let place = place.unwrap_or_else(|| panic!("no row for {facts:?}"));
            used[place] = true;
            let health = judge(facts);
            let said = [health.state.name(), gets(health.new_flows)];
            assert_eq!(rows[place][5..], said, "{facts:?}, row {}", place + 1);
        }
        assert!(used.iter().all(|used| *used), "a row that is never reached: {used:?}");
    }

    #[test]
    fn only_drains_stand_above_a_check_that_fails() {
        for facts in every().filter(|facts| facts.checked == Checked::Fails) {
            assert!(matches!(judge(facts).new_flows, NewFlows::None(_)), "{facts:?}");
        }
    }
}
