//! One table, one flow, one backend.
//!
//! `adaptive` and `least-connections` fill like water: the least cost `(flows open + 1) / weight` is where the surface
//! would be after this flow, and every backend whose level `flows open / weight` is below it may take the flow, in
//! proportion to its weight. Under load that is the backend of least cost, or one within a flow of it. With little to do it
//! is everybody, so that shares follow weights from the first flow on, whatever long flows are held meanwhile. (Plain least
//! cost gives all of them to the heaviest; HAProxy's `leastconn` gives idle servers equal shares whatever their weights.)

use crate::live::Verdict;
use crate::table::Candidate;
use crate::{AllocationTable, BackendIndex, OpenFlow, Policy, Timestamp};

/// Up to this many eligible backends `adaptive` looks at all of them; beyond, at [`SAMPLES`].
pub(crate) const SCAN_MAX: usize = 32;
/// Samples of `adaptive` in a large pool: more gain little and herd more (`d/n` of all arrivals go to the least busy).
const SAMPLES: usize = 4;

/// Backends that a flow has tried already, by address order of trying. Small and inline: a flow tries few.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Excluded {
    indexes: [u32; Self::MAX],
    count: u8,
}

impl Excluded {
    /// Most backends one flow can exclude; it cannot be retried more often.
    pub const MAX: usize = 8;

    /// None.
    pub const fn none() -> Self {
        Self { indexes: [0; Self::MAX], count: 0 }
    }

    /// Leaves out `index` as well.
    ///
    /// # Panics
    /// At the ninth.
    pub fn push(&mut self, index: BackendIndex) {
        self.indexes[usize::from(self.count)] = index.0;
        self.count += 1;
    }

    /// Whether `index` is left out.
    pub fn contains(&self, index: BackendIndex) -> bool {
        self.indexes[..usize::from(self.count)].contains(&index.0)
    }
}

/// A flow's backend.
#[derive(Debug)]
pub struct Selection {
    /// Which one.
    pub index: BackendIndex,
    /// Counts the flow on it, from now on.
    pub open: OpenFlow,
}

/// Why no backend could be selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoBackend {
    /// Nobody is in the pool, or nobody who wants flows.
    #[error("no resource of the pool is ready")]
    NoneReady,
    /// All that are ready have as many flows as they take.
    #[error("every ready resource has as many flows as it takes")]
    AllFull,
    /// All that are ready were tried for this flow already.
    #[error("every ready resource failed")]
    AllFailed,
}

/// What one worker keeps between selections: its random state and its turn.
#[derive(Debug, Clone)]
pub struct Selector {
    random: Random,
    turn: u32,
}

impl Selector {
    /// The seed decides all that is random here. Give each worker another: with the same, they pick in step.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let turn = random.next() as u32;
        Self { random, turn }
    }

    /// Selects a backend for one flow and counts the flow on it.
    ///
    /// Those in `tried` are left out; they are indexes of this same table (a flow that finds a new table between two
    /// tries starts with none). A backend that failed and is paused is left alone while another can serve; where none
    /// can, any paused one is tried all the same: the client has nothing to lose, and a pool that comes back serves at
    /// once.
    pub fn select(
        &mut self,
        table: &AllocationTable,
        tried: &Excluded,
        now: Timestamp,
    ) -> Result<Selection, NoBackend> {
        let eligible = table.eligible();
        if eligible.is_empty() {
            return Err(NoBackend::NoneReady);
        }
        // A probe that another worker claims first leaves its backend paused: look again, at most once for each.
        for _ in 0..=eligible.len() {
            let mut view = View { table, tried, now, full: 0 };
            let chosen = match table.policy() {
                Policy::Adaptive if !table.alias().is_empty() => {
                    self.below_surface_of_samples(&mut view).or_else(|| self.below_surface_of_all(&mut view))
                }
                Policy::Adaptive | Policy::LeastConnections => self.below_surface_of_all(&mut view),
                Policy::RoundRobin => self.next_in_turn(&mut view),
                Policy::Random => self.any(&mut view),
            };
            let Some((index, verdict)) = chosen else {
                return self.last_resort(&mut view);
            };
            let live = &table.candidate(index).live;
            if verdict == Verdict::Usable || live.claim_probe(now) {
                return Ok(Selection { index, open: live.open_flow() });
            }
        }
        Err(NoBackend::AllFailed)
    }

    /// Any of those that are paused.
    fn last_resort(&mut self, view: &mut View<'_>) -> Result<Selection, NoBackend> {
        let mut chosen = None;
        let mut seen = 0;
        for &index in view.table.eligible() {
            let backend = view.table.backend(index);
            let paused = backend.live.verdict(backend.flows_max, view.now) != Verdict::Full;
            if paused && !view.tried.contains(index) {
                seen += 1;
                if self.random.below(seen) == 0 {
                    chosen = Some(index);
                }
            }
        }
        match chosen {
            Some(index) => Ok(Selection { index, open: view.table.backend(index).live.open_flow() }),
            None if view.full > 0 => Err(NoBackend::AllFull),
            None => Err(NoBackend::AllFailed),
        }
    }

    /// One of a few, by the same rule as [`Self::below_surface_of_all`].
    fn below_surface_of_samples(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        // All draws before the first look: looks are cache misses, and they overlap where none waits for another. For
        // the same reason nothing here branches on what a look finds.
        let alias = view.table.alias();
        let samples: [BackendIndex; SAMPLES] =
            std::array::from_fn(|_| BackendIndex(alias.draw(self.random.next())));
        let mut surface = f32::INFINITY;
        let mut probes = 0_u32;
        let mut levels = [f32::INFINITY; SAMPLES];
        for (place, index) in samples.into_iter().enumerate() {
            let Some((verdict, open)) = view.usable(index) else { continue };
            probes |= u32::from(verdict == Verdict::Probe) << place;
            let step = view.table.step(index);
            levels[place] = open as f32 * step;
            surface = surface.min(levels[place] + step);
        }
        let below = |place: usize| u32::from(levels[place] < surface) << place;
        let below = (0..SAMPLES).fold(0, |all, place| all | below(place));
        if below == 0 {
            return None;
        }
        // Samples come in proportion to weight, so the first that may take the flow is the right one.
        let place = below.trailing_zeros() as usize;
        let verdict = if probes >> place & 1 == 1 { Verdict::Probe } else { Verdict::Usable };
        Some((samples[place], verdict))
    }

    fn below_surface_of_all(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        let eligible = view.table.eligible();
        let mut surface = f32::INFINITY;
        for &index in eligible {
            if let Some((_, open)) = view.usable(index) {
                let step = view.table.step(index);
                surface = surface.min(open as f32 * step + step);
            }
        }
        let mut chosen = None;
        let mut stand_in = None;
        let mut weights = 0.0_f32;
        for &index in eligible {
            let Some((verdict, open)) = view.usable(index) else { continue };
            // Other workers may have opened flows since the first pass, so that nobody is below any more.
            stand_in = stand_in.or(Some((index, verdict)));
            if open as f32 * view.table.step(index) < surface {
                let weight = view.weight(index);
                // Weighted reservoir of one (Chao, 1982).
                weights += weight;
                if self.random.unit() * weights < weight {
                    chosen = Some((index, verdict));
                }
            }
        }
        chosen.or(stand_in)
    }

    fn next_in_turn(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        let eligible = view.table.eligible();
        for step in 0..eligible.len() {
            let place = (self.turn as usize + step) % eligible.len();
            if let Some((verdict, _)) = view.usable(eligible[place]) {
                self.turn = (place + 1) as u32;
                return Some((eligible[place], verdict));
            }
        }
        None
    }

    fn any(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        let eligible = view.table.eligible();
        for _ in 0..SAMPLES {
            let index = eligible[self.random.below(eligible.len() as u32) as usize];
            if let Some((verdict, _)) = view.usable(index) {
                return Some((index, verdict));
            }
        }
        // Most are unusable: choose among the rest in one pass.
        let mut chosen = None;
        let mut seen = 0;
        for &index in eligible {
            if let Some((verdict, _)) = view.usable(index) {
                seen += 1;
                if self.random.below(seen) == 0 {
                    chosen = Some((index, verdict));
                }
            }
        }
        chosen
    }
}

/// A table seen by one flow.
struct View<'a> {
    table: &'a AllocationTable,
    tried: &'a Excluded,
    now: Timestamp,
    /// How many looks found a backend full, in this pass.
    full: u32,
}

impl View<'_> {
    /// The verdict and the flows open, where this flow may use the backend.
    fn usable(&mut self, index: BackendIndex) -> Option<(Verdict, u32)> {
        let Candidate { live, flows_max } = self.table.candidate(index);
        match live.verdict(*flows_max, self.now) {
            _ if self.tried.contains(index) => None,
            verdict @ (Verdict::Usable | Verdict::Probe) => Some((verdict, live.flows_open())),
            Verdict::Paused => None,
            Verdict::Full => {
                self.full += 1;
                None
            }
        }
    }

    fn weight(&self, index: BackendIndex) -> f32 {
        self.table.weights()[index.0 as usize]
    }
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): one addition and three multiplications a number, passes BigCrush,
/// any seed will do. Not for secrets.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 to `bound` - 1 (Lemire's multiplication; its bias of at most `bound`/2^32 does not matter here).
    fn below(&mut self, bound: u32) -> u32 {
        (((self.next() >> 32) * u64::from(bound)) >> 32) as u32
    }

    /// 0 up to but not 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 * (1.0 / 16_777_216.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backend, ConnectFailure, LiveFacts, Members};
    use proptest::prelude::*;
    use std::sync::Arc;

    const NOW: Timestamp = Timestamp::ZERO;

    fn table(policy: Policy, weights: &[f32]) -> AllocationTable {
        with_limits(policy, weights, 0)
    }

    fn with_limits(policy: Policy, weights: &[f32], flows_max: u32) -> AllocationTable {
        let backend = |n: usize| Backend {
            id: format!("b{n}").parse().unwrap(),
            address: ([127, 0, 0, 1], 1000 + n as u16).into(),
            flows_max,
            live: Arc::new(LiveFacts::default()),
        };
        let members = Members::new((0..weights.len()).map(backend).collect());
        AllocationTable::new(1, policy, Arc::new(members), weights.to_vec())
    }

    /// Selects `flows` one after the other; each is over before the next (idle) or none ends (held).
    fn shares(table: &AllocationTable, flows: u32, hold: bool) -> Vec<f64> {
        let mut selector = Selector::new(42);
        let mut counts = vec![0_u32; table.weights().len()];
        let mut held = Vec::new();
        for _ in 0..flows {
            let selection = selector.select(table, &Excluded::none(), NOW).unwrap();
            counts[selection.index.0 as usize] += 1;
            if hold {
                held.push(selection);
            }
        }
        counts.iter().map(|c| f64::from(*c) / f64::from(flows)).collect()
    }

    fn assert_shares(got: &[f64], want: &[f64]) {
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 0.02, "shares {got:?} instead of {want:?}");
        }
    }

    #[test]
    fn idle_backends_share_by_weight() {
        for policy in [Policy::Adaptive, Policy::LeastConnections] {
            assert_shares(&shares(&table(policy, &[1.0, 3.0, 4.0]), 20_000, false), &[0.125, 0.375, 0.5]);
        }
    }

    #[test]
    fn busy_backends_share_by_weight() {
        for policy in [Policy::Adaptive, Policy::LeastConnections] {
            assert_shares(&shares(&table(policy, &[1.0, 3.0, 4.0]), 4_000, true), &[0.125, 0.375, 0.5]);
        }
    }

    #[test]
    fn short_flows_beside_long_ones_share_by_weight() {
        for policy in [Policy::Adaptive, Policy::LeastConnections] {
            // Weights as reports leave them: never quite alike. Everyone holds a long flow.
            let table = table(policy, &[1.0, 1.04, 0.96]);
            let _held: Vec<_> = (0..3).map(|n| table.backend(BackendIndex(n)).live.open_flow()).collect();
            assert_shares(&shares(&table, 20_000, false), &[0.333, 0.347, 0.32]);
        }
    }

    #[test]
    fn round_robin_and_random_do_not_weigh() {
        for policy in [Policy::RoundRobin, Policy::Random] {
            assert_shares(&shares(&table(policy, &[1.0, 9.0]), 20_000, false), &[0.5, 0.5]);
        }
    }

    #[test]
    fn a_large_pool_shares_by_weight() {
        let mut weights = vec![1.0; 1_000];
        weights.extend([4.0; 250]);
        for hold in [false, true] {
            let got = shares(&table(Policy::Adaptive, &weights), 40_000, hold);
            assert!((got[1_000..].iter().sum::<f64>() - 0.5).abs() < 0.02, "held {hold}");
        }
    }

    #[test]
    fn a_stalled_backend_gets_less_in_a_large_pool() {
        let table = table(Policy::Adaptive, &[1.0; 100]);
        let _stalled: Vec<_> = (0..50).map(|_| table.backend(BackendIndex(7)).live.open_flow()).collect();
        assert_eq!(shares(&table, 10_000, false)[7], 0.0);
    }

    #[test]
    fn what_is_left_out_and_why() {
        fn select(table: &AllocationTable, tried: &Excluded) -> Result<BackendIndex, NoBackend> {
            Selector::new(1).select(table, tried, NOW).map(|s| s.index)
        }
        for policy in Policy::ALL {
            let none = Excluded::none();
            assert_eq!(select(&table(policy, &[]), &none), Err(NoBackend::NoneReady));
            assert_eq!(select(&table(policy, &[0.0, f32::NAN]), &none), Err(NoBackend::NoneReady));
            let mut tried = Excluded::none();
            tried.push(BackendIndex(0));
            assert_eq!(select(&table(policy, &[1.0, 1.0]), &tried), Ok(BackendIndex(1)));
            tried.push(BackendIndex(1));
            assert_eq!(select(&table(policy, &[1.0, 1.0]), &tried), Err(NoBackend::AllFailed));
            let full = with_limits(policy, &[1.0], 1);
            let _one = full.backend(BackendIndex(0)).live.open_flow();
            assert_eq!(select(&full, &none), Err(NoBackend::AllFull));
        }
    }

    #[test]
    fn a_failed_backend_rests_and_then_one_flow_tries_it() {
        for policy in Policy::ALL {
            let table = table(policy, &[1.0, 1.0]);
            let failing = Arc::clone(&table.backend(BackendIndex(0)).live);
            failing.open_flow().connect_failed(ConnectFailure::Refused, NOW);
            let mut selector = Selector::new(3);
            for _ in 0..100 {
                let chosen = selector.select(&table, &Excluded::none(), NOW).unwrap();
                assert_eq!(chosen.index, BackendIndex(1), "{policy}");
            }
            let mut other = Excluded::none();
            other.push(BackendIndex(1));
            let last_resort = selector.select(&table, &other, NOW).unwrap();
            assert_eq!(last_resort.index, BackendIndex(0), "{policy}: better than nobody");
            let later = Timestamp::from_millis(1_000);
            let held: Vec<_> =
                (0..100).map(|_| selector.select(&table, &Excluded::none(), later).unwrap()).collect();
            let tries = held.iter().filter(|s| s.index == BackendIndex(0)).count();
            assert_eq!(tries, 1, "{policy}: one flow tries, the others do not wait for it");
        }
    }

    proptest! {
        #[test]
        fn only_eligible_backends_are_selected(
            weights in prop::collection::vec(prop_oneof![Just(0.0_f32), 0.1_f32..10.0], 1..80),
            seed: u64,
            policy in prop::sample::select(&Policy::ALL),
        ) {
            let table = table(policy, &weights);
            let mut selector = Selector::new(seed);
            for _ in 0..50 {
                match selector.select(&table, &Excluded::none(), NOW) {
                    Ok(chosen) => prop_assert!(weights[chosen.index.0 as usize] > 0.0),
                    Err(why) => prop_assert!(why == NoBackend::NoneReady && table.eligible().is_empty()),
                }
            }
            prop_assert!(table.members().backends().iter().all(|b| b.live.flows_open() == 0));
        }
    }
}
