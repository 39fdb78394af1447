//! One table, one flow, one backend.
//!
//! `adaptive` and `least-connections` take the backend of least cost `(flows open x balancers + 1) / weight`: the one that is soonest
//! through with its flows and this one. Three things are added to that.
//!
//! * Those whose cost is about the same (within a tenth, and within a flow) share the flows by weight, so that weights a
//!   hundredth apart do not decide.
//! * In a pool with next to nothing to do, least cost would give everything to the heaviest, and no share would follow any
//!   weight. There it fills like water: every backend whose level `flows open x balancers / weight` is below the surface (the least
//!   cost) may take the flow, in proportion to its weight. (HAProxy's `leastconn` gives idle servers equal shares whatever
//!   their weights.)
//! * A backend far below all others (it has just joined those that hold long flows) would get every new flow until it is
//!   level. All such together get as much as if three samples
//!   were looked at.
//!
//! Whatever the policy, a backend that is full or paused is passed over, and so is one that is ejected (time-outs, resets),
//! unless more than half of those looked at are: then it is not they who are at fault, and ejections are ignored for this flow.
//! Time-outs alone are ignored in a saturated pool too.

use std::hint::select_unpredictable;

use crate::affinity::{Affinity, Kept, ResourceTag};
use crate::criteria::{CONSIDERED_MAX, Considered};
use crate::decision::{Look, Looks};
use crate::key::mix;
use crate::live::Verdict;
use crate::table::Candidate;
use crate::{AllocationTable, BackendIndex, Client, FlowKey, OpenFlow, Policy, SplitBy, Timestamp};

/// Up to this many eligible backends `adaptive` and `criteria` look at all of them; beyond, at [`SAMPLES`] or
/// [`CRITERIA_SAMPLES`].
pub(crate) const SCAN_MAX: usize = CONSIDERED_MAX;
/// Samples of `adaptive` in a large pool: more gain little and herd more (`d/n` of all arrivals go to the least busy).
const SAMPLES: usize = 4;
/// Costs within this factor of the least are about the same.
const ABOUT: f32 = 1.1;
/// Flows that a backend would have by its weight, from which on having fewer may be a rush.
const RUSH_FLOWS: f32 = 50.0;
/// All that rush together get as much as if so many samples were looked at: three times their part of the weights, about.
const RUSH_SAMPLES: i32 = 3;
/// Part of these flows up to which it is one.
const RUSH_BELOW: f32 = 0.98;
/// Samples of `criteria` in a large pool: several criteria need more of a choice.
const CRITERIA_SAMPLES: usize = 16;
/// Choices of a key that are looked at before affinity is given up for this flow.
const KEY_CHOICES: u32 = 16;
/// Backends whose flows stand for all of a large pool's, to tell a bounded load.
const LOAD_SAMPLES: usize = 8;
/// Flows on a resource up to which affinity keeps its clients whatever the others have: so few are no load, and one client
/// with several flows would be sent about for being alone.
const KEPT_FLOWS_MIN: u32 = 16;
/// Every so many flows, `most(…)` gives one to anybody: who has had nothing yet must be able to get something.
const EXPLORE_EVERY: u32 = 20;
/// A latency that was never measured, on a backend that has flows: worse than any that was.
const LATENCY_UNKNOWN_MICROS: f32 = 1e12;
/// Backends of a large pool that are counted to tell whether most are ejected.
const EJECTED_SEEN_MAX: usize = 256;
/// Apart from the key's other use.
const SPLIT_SALT: u64 = 0x7370_6c69_7400_0000;

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

    /// How many are left out.
    pub fn count(&self) -> u8 {
        self.count
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
    /// On which side of the table's split it is; 0 where there is none.
    pub side: u16,
}

/// Why no backend could be selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoBackend {
    /// Nobody is in the pool, or nobody who wants flows.
    #[error("no resource of the pool is ready")]
    NoneReady,
    /// Somebody is ready, but nobody who meets what the flow requires.
    #[error("no ready resource of the pool meets the requirement")]
    RequirementUnmet,
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
    /// Selections in which ejections were ignored because most were ejected.
    panics: u64,
    /// What the last selection looked at, where it did not look at all.
    sampled: Sampled,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sampled {
    indexes: [BackendIndex; CRITERIA_SAMPLES],
    count: usize,
}

impl Sampled {
    fn set(&mut self, indexes: &[BackendIndex]) {
        self.count = indexes.len();
        self.indexes[..indexes.len()].copy_from_slice(indexes);
    }
}

impl Selector {
    /// The seed decides all that is random here. Give each worker another: with the same, they pick in step.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let turn = random.next() as u32;
        Self { random, turn, panics: 0, sampled: Sampled::default() }
    }

    /// How many selections ignored ejections because most of those looked at were ejected.
    pub fn panics(&self) -> u64 {
        self.panics
    }

    /// Selects a backend for one flow of nobody in particular; see [`Selector::select_for`].
    ///
    /// # Errors
    /// See [`NoBackend`].
    pub fn select(
        &mut self,
        table: &AllocationTable,
        tried: &Excluded,
        now: Timestamp,
    ) -> Result<Selection, NoBackend> {
        let key =
            if table.wants_key() { FlowKey::from_bits(self.random.next()) } else { FlowKey::from_bits(0) };
        self.select_for(table, key, tried, now)
    }

    /// Selects a backend for one flow of the client of `key` and counts the flow on it. The key matters where
    /// [`AllocationTable::wants_key`].
    ///
    /// Those in `tried` are left out; they are indexes of this same table (a flow that finds a new table between two
    /// tries starts with none). A backend that failed and is paused is left alone while another can serve; where none
    /// can, any paused one is tried all the same: the client has nothing to lose, and a pool that comes back serves at
    /// once. Where the side of a split that a flow falls to has nobody, another side serves it.
    ///
    /// # Errors
    /// See [`NoBackend`].
    pub fn select_for(
        &mut self,
        table: &AllocationTable,
        key: FlowKey,
        tried: &Excluded,
        now: Timestamp,
    ) -> Result<Selection, NoBackend> {
        let (index, side) = self.decide(table, key, tried, now, true)?;
        // Not by the backend itself: that is a cache miss more, in a large pool.
        Ok(Selection { index, open: table.candidate(index).live.open_flow(), side })
    }

    /// As [`Selector::select_for`], but a client that was given a resource before is given it again, while that can be used, has
    /// room, and is within the bounded load (of [`crate::TableSpec::bounded_load`], whatever the policy). Otherwise the policy
    /// selects, and the client is kept there from now on. A kept flow is on the side of a split that its resource is on.
    ///
    /// # Errors
    /// See [`NoBackend`].
    pub fn select_kept(
        &mut self,
        table: &AllocationTable,
        affinity: &Affinity,
        client: Client,
        key: FlowKey,
        tried: &Excluded,
        now: Timestamp,
    ) -> Result<(Selection, Kept), NoBackend> {
        let known = affinity.resource_of(client, now);
        if let Some(tag) = known
            && let Some(index) = table.members().position(tag)
            && let Some(side) = self.still_takes(table, index, tried, now)
        {
            affinity.keep(client, tag, now);
            self.sampled.set(&[index]);
            let open = table.candidate(index).live.open_flow();
            return Ok((Selection { index, open, side }, Kept::Same));
        }
        let selection = self.select_for(table, key, tried, now)?;
        affinity.keep(client, ResourceTag::of(&table.backend(selection.index).id), now);
        Ok((selection, if known.is_some() { Kept::Moved } else { Kept::New }))
    }

    /// Whether a backend takes a flow more of a client that it has served, and on which side.
    fn still_takes(
        &mut self,
        whole: &AllocationTable,
        index: BackendIndex,
        tried: &Excluded,
        now: Timestamp,
    ) -> Option<u16> {
        let on = |table: &AllocationTable| table.weights()[index.0 as usize] > 0.0;
        let side = match whole.split() {
            Some(split) => split.sides.iter().position(|side| side.share > 0.0 && on(&side.table))?,
            None if on(whole) => 0,
            None => return None,
        };
        let table = whole.side(side);
        let mut view = View::new(table, tried, now);
        let (verdict, open) = view.usable(index)?;
        if table.bounded_load() > 0.0 && open >= KEPT_FLOWS_MIN {
            let most = (table.bounded_load() * view.weight(index) * self.mean_level(&view)).ceil();
            if open as f32 + 1.0 > most {
                return None;
            }
        }
        (verdict != Verdict::Probe || table.candidate(index).live.claim_probe(now)).then_some(side as u16)
    }

    /// What [`Selector::select_for`] would select, and on which side: no flow is opened, and no right to try a failed backend
    /// is taken.
    ///
    /// # Errors
    /// See [`NoBackend`].
    pub fn peek(
        &mut self,
        table: &AllocationTable,
        key: FlowKey,
        tried: &Excluded,
        now: Timestamp,
    ) -> Result<(BackendIndex, u16), NoBackend> {
        self.decide(table, key, tried, now, false)
    }

    fn decide(
        &mut self,
        table: &AllocationTable,
        key: FlowKey,
        tried: &Excluded,
        now: Timestamp,
        claims: bool,
    ) -> Result<(BackendIndex, u16), NoBackend> {
        let Some(split) = table.split() else {
            return self.decide_in(table, key, tried, now, claims).map(|index| (index, 0));
        };
        let bits = match split.by {
            SplitBy::Share => self.random.next(),
            SplitBy::Client => mix(key.bits() ^ SPLIT_SALT),
        };
        let first = split.side((bits >> 32) as u32);
        let others = (0..split.sides.len()).filter(|side| *side != first);
        let mut failed = NoBackend::NoneReady;
        for side in std::iter::once(first).chain(others) {
            match self.decide_in(&split.sides[side].table, key, tried, now, claims) {
                Ok(index) => return Ok((index, side as u16)),
                Err(NoBackend::NoneReady) => {}
                Err(why) => failed = why,
            }
        }
        Err(failed)
    }

    /// Decides by a table that is not split.
    fn decide_in(
        &mut self,
        table: &AllocationTable,
        key: FlowKey,
        tried: &Excluded,
        now: Timestamp,
        claims: bool,
    ) -> Result<BackendIndex, NoBackend> {
        let eligible = table.eligible();
        // What an earlier selection drew are indexes of its table, which may be larger than this one.
        self.sampled.count = 0;
        if eligible.is_empty() {
            let unmet = table.is_requirement_unmet();
            return Err(if unmet { NoBackend::RequirementUnmet } else { NoBackend::NoneReady });
        }
        let mut view = View::new(table, tried, now);
        // A probe that another worker claims first leaves its backend paused: look again, at most once for each.
        for _ in 0..=eligible.len() {
            let mut chosen = self.choose(&mut view, key);
            if view.seems_ejected() && self.most_are_ejected(&view) {
                self.panics += 1;
                view.ignore_ejections = true;
                chosen = self.choose(&mut view, key);
            }
            let Some((index, verdict)) = chosen else {
                return self.last_resort(&mut view);
            };
            let live = &table.candidate(index).live;
            if verdict != Verdict::Probe || !claims || live.claim_probe(now) {
                return Ok(index);
            }
            view.full = 0;
        }
        Err(NoBackend::AllFailed)
    }

    /// Of all, or in a large pool of a stretch of it.
    fn most_are_ejected(&mut self, view: &View<'_>) -> bool {
        let eligible = view.table.eligible();
        let start = self.random.below(eligible.len() as u32) as usize;
        let seen = eligible.iter().cycle().skip(start).take(eligible.len().min(EJECTED_SEEN_MAX));
        let ejected = seen
            .filter(|index| {
                let Candidate { live, flows_max } = view.table.candidate(**index);
                matches!(live.verdict(*flows_max, view.now), Verdict::Ejected | Verdict::Resetting)
            })
            .count();
        ejected * 2 > eligible.len().min(EJECTED_SEEN_MAX)
    }

    fn choose(&mut self, view: &mut View<'_>, key: FlowKey) -> Option<(BackendIndex, Verdict)> {
        match view.table.policy() {
            Policy::Adaptive if !view.table.alias().is_empty() => {
                self.least_cost_of_samples(view).or_else(|| self.least_cost_of_all(view))
            }
            Policy::Adaptive | Policy::LeastConnections => self.least_cost_of_all(view),
            Policy::P2c => self.better_of_two(view, flows_by_weight),
            Policy::PeakEwma => self.better_of_two(view, latency_by_flows),
            Policy::WeightedRoundRobin | Policy::Utilization => self.next_in_weighted_turn(view),
            Policy::RoundRobin => self.next_in_turn(view),
            Policy::Random => self.any(view),
            Policy::First => self.first(view),
            Policy::Maglev => self.by_key(view, key),
            Policy::Prequal => self.by_probes(view),
            Policy::Criteria => self.by_criteria(view),
        }
    }

    /// What the last selection looked at, as it was before the flow was counted: the samples of a large pool, else the first
    /// of all, and always the chosen one. A second look, so that selecting itself pays nothing for it.
    pub fn looks(
        &self,
        table: &AllocationTable,
        chosen: Option<BackendIndex>,
        tried: &Excluded,
        now: Timestamp,
    ) -> Looks {
        let mut looks = Looks::none();
        let mut look = |index: BackendIndex| {
            let Candidate { live, flows_max } = table.candidate(index);
            let own = u32::from(chosen == Some(index));
            let flows_open = live.flows_open().saturating_sub(own);
            // A limit is met by the flow that this selection opened itself.
            let limit = if own == 1 { 0 } else { *flows_max };
            looks.push(Look {
                index,
                flows_open,
                verdict: live.verdict(limit, now),
                tried: tried.contains(index),
            });
        };
        chosen.into_iter().for_each(&mut look);
        let sampled = &self.sampled.indexes[..self.sampled.count];
        let seen = if sampled.is_empty() { table.eligible() } else { sampled };
        seen.iter().take(Looks::MAX).copied().for_each(&mut look);
        looks
    }

    /// Any of those that are paused.
    fn last_resort(&mut self, view: &mut View<'_>) -> Result<BackendIndex, NoBackend> {
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
            Some(index) => Ok(index),
            None if view.full > 0 => Err(NoBackend::AllFull),
            None => Err(NoBackend::AllFailed),
        }
    }

    /// One of a few, by the same rule as [`Self::least_cost_of_all`], where it cannot come to a rush.
    fn least_cost_of_samples(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        // All draws before the first look: looks are cache misses, and they overlap where none waits for another. For
        // the same reason nothing here branches on what a look finds.
        let alias = view.table.alias();
        let samples: [BackendIndex; SAMPLES] =
            std::array::from_fn(|_| BackendIndex(alias.draw(self.random.next())));
        self.sampled.set(&samples);
        let mut least = f32::INFINITY;
        let mut flows = 0;
        let mut probes = 0_u32;
        let mut levels = [f32::INFINITY; SAMPLES];
        let mut costs = [f32::INFINITY; SAMPLES];
        for (place, index) in samples.into_iter().enumerate() {
            let Some((verdict, open)) = view.usable(index) else { continue };
            probes |= u32::from(verdict == Verdict::Probe) << place;
            let (level, step) = view.table.level(index, open);
            flows += open;
            (levels[place], costs[place]) = (level, level + step);
            least = least.min(level + step);
        }
        // Not a branch: which way it went would be known only when all looks are done.
        let about = select_unpredictable(view.table.is_idle(flows, SAMPLES), f32::INFINITY, least * ABOUT);
        // The infinite levels of those that are not usable are below nothing.
        let below = |place: usize| u32::from((levels[place] < least) & (costs[place] < about)) << place;
        let below = (0..SAMPLES).fold(0, |all, place| all | below(place));
        if below == 0 {
            return None;
        }
        // Samples come in proportion to weight, so the first that may take the flow is the right one.
        let place = below.trailing_zeros() as usize;
        let verdict = if probes >> place & 1 == 1 { Verdict::Probe } else { Verdict::Usable };
        Some((samples[place], verdict))
    }

    fn least_cost_of_all(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        let eligible = view.table.eligible();
        self.sampled.count = 0;
        let mut pool = Seen::default();
        for &index in eligible {
            if let Some((verdict, open)) = view.usable(index) {
                pool.see(view.table, index, verdict, open);
            }
        }
        let best = pool.best?;
        if pool.is_rush(view.weight(best.0)) {
            let others = pool.without_rush(view);
            // So often are all samples among the others.
            if self.random.unit() < (others.weights / pool.weights).powi(RUSH_SAMPLES) {
                return others.best.or(pool.best);
            }
        }
        let idle = view.table.is_idle(pool.flows, eligible.len());
        let about = if idle { f32::INFINITY } else { pool.least * ABOUT };
        let mut chosen = None;
        let mut weights = 0.0_f32;
        for &index in eligible {
            let Some((verdict, open)) = view.usable(index) else { continue };
            let (level, step) = view.table.level(index, open);
            if level < pool.least && level + step < about {
                let weight = view.weight(index);
                // Weighted reservoir of one (Chao, 1982).
                weights += weight;
                if self.random.unit() * weights < weight {
                    chosen = Some((index, verdict));
                }
            }
        }
        // Other workers may have opened flows since the first pass, so that nobody is below any more.
        chosen.or(pool.best)
    }

    /// The one of less cost of two samples in proportion to weight; `cost` is given the backend and its flows open.
    fn better_of_two(
        &mut self,
        view: &mut View<'_>,
        cost: fn(&View<'_>, BackendIndex, u32) -> f32,
    ) -> Option<(BackendIndex, Verdict)> {
        let alias = view.table.alias();
        let first = BackendIndex(alias.draw(self.random.next()));
        let mut second = first;
        // Where one has nearly all the weight, it may be drawn again and again: then it is the choice.
        for _ in 0..SAMPLES {
            second = BackendIndex(alias.draw(self.random.next()));
            if second != first {
                break;
            }
        }
        self.sampled.set(&[first, second]);
        let mut look =
            |index| view.usable(index).map(|(verdict, open)| (cost(view, index, open), index, verdict));
        let (a, b) = (look(first), look(second));
        let better = match (a, b) {
            (Some(a), Some(b)) => Some(if b.0 < a.0 { b } else { a }),
            (a, b) => a.or(b),
        };
        better.map(|(_, index, verdict)| (index, verdict)).or_else(|| self.least_cost_of_all(view))
    }

    fn next_in_weighted_turn(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        let (eligible, stride) = (view.table.eligible(), view.table.stride());
        self.sampled.count = 0;
        for _ in 0..eligible.len().min(SCAN_MAX) {
            let index = eligible[stride.pick(&mut self.turn) as usize];
            if let Some((verdict, _)) = view.usable(index) {
                return Some((index, verdict));
            }
        }
        self.least_cost_of_all(view)
    }

    /// In the order of the table, which is that of their ids.
    fn first(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        self.sampled.count = 0;
        let eligible = view.table.eligible().iter().copied();
        eligible.into_iter().find_map(|index| view.usable(index).map(|(verdict, _)| (index, verdict)))
    }

    /// The first choice of the key that can be used and is within the bounded load.
    fn by_key(&mut self, view: &mut View<'_>, key: FlowKey) -> Option<(BackendIndex, Verdict)> {
        let maglev = view.table.maglev().filter(|maglev| !maglev.is_empty())?;
        let mut stand_in = None;
        let mut mean = None;
        let mut sampled = Sampled::default();
        for attempt in 0..KEY_CHOICES {
            let index = BackendIndex(maglev.index(key.bits(), attempt));
            if sampled.indexes[..sampled.count].contains(&index) {
                continue;
            }
            sampled.indexes[sampled.count] = index;
            sampled.count += 1;
            let weight = view.weight(index);
            // The look-up table may be a little older than the weights.
            let Some((verdict, open)) = view.usable(index).filter(|_| weight > 0.0) else { continue };
            if view.table.bounded_load() > 0.0 {
                let mean = *mean.get_or_insert_with(|| self.mean_level(view));
                let most = (view.table.bounded_load() * weight * mean).ceil();
                if open as f32 + 1.0 > most {
                    stand_in = stand_in.or(Some((index, verdict)));
                    continue;
                }
            }
            self.sampled = sampled;
            return Some((index, verdict));
        }
        self.sampled = sampled;
        stand_in.or_else(|| self.least_cost_of_all(view))
    }

    /// Flows open for each unit of weight, with this one: of the whole pool where it is small, else as a few show it.
    fn mean_level(&mut self, view: &View<'_>) -> f32 {
        let eligible = view.table.eligible();
        let (mut open, mut weights) = (1.0_f32, 0.0_f32);
        let mut add = |index: BackendIndex| {
            open += view.table.candidate(index).live.flows_open() as f32;
            weights += view.weight(index);
        };
        if eligible.len() <= SCAN_MAX {
            eligible.iter().copied().for_each(add);
        } else {
            (0..LOAD_SAMPLES).for_each(|_| add(eligible[self.random.below(eligible.len() as u32) as usize]));
        }
        open / weights.max(f32::MIN_POSITIVE)
    }

    /// By the answers to probes; without enough of them, the better of two by flows and weight.
    fn by_probes(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        let epoch = view.table.members().epoch();
        let now = view.now;
        let chosen = view.table.probes().and_then(|probes| {
            let mut probes = probes.try_lock().ok()?;
            let usable = |index: BackendIndex| view.weight(index) > 0.0 && view.usable(index).is_some();
            probes.choose(epoch, now, usable)
        });
        if let Some((index, ..)) = chosen
            && let Some((verdict, _)) = view.usable(index)
        {
            self.sampled.set(&[index]);
            return Some((index, verdict));
        }
        self.better_of_two(view, flows_by_weight)
    }

    /// In turn among those that meet the criteria.
    fn by_criteria(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        let table = view.table;
        let mut left = Considered::default();
        let mut gated = Considered::default();
        let mut consider = |index: BackendIndex, random: &mut Random| {
            let Some((_, open)) = view.usable(index) else { return };
            let gate = table.criteria().gate(index);
            let passes = gate >= 1.0 || random.unit() < gate;
            if passes { left.push(index, open) } else { gated.push(index, open) }
        };
        if table.alias().is_empty() {
            self.sampled.count = 0;
            table.eligible().iter().take(SCAN_MAX).for_each(|index| consider(*index, &mut self.random));
        } else {
            let draw = |random: &mut Random| BackendIndex(table.alias().draw(random.next()));
            let mut samples: [BackendIndex; CRITERIA_SAMPLES] =
                std::array::from_fn(|_| draw(&mut self.random));
            samples.sort_unstable();
            self.sampled.set(&samples);
            let mut before = None;
            for index in samples.into_iter().filter(|index| before.replace(*index) != Some(*index)) {
                consider(index, &mut self.random);
            }
        }
        if left.as_slice().is_empty() {
            left = gated;
        }
        let explores = table.criteria().rules().first().is_some_and(|rule| rule.most)
            && self.random.below(EXPLORE_EVERY) == 0;
        if !explores {
            table.criteria().keep_best(&mut left);
        }
        // The next after the last chosen, in the order of indexes.
        let after = |(index, _): &&(BackendIndex, u32)| index.0 >= self.turn;
        let next = left.as_slice().iter().find(after).or_else(|| left.as_slice().first());
        let Some(&(index, _)) = next else { return self.least_cost_of_all(view) };
        self.turn = index.0 + 1;
        view.usable(index).map(|(verdict, _)| (index, verdict))
    }

    fn next_in_turn(&mut self, view: &mut View<'_>) -> Option<(BackendIndex, Verdict)> {
        let eligible = view.table.eligible();
        self.sampled.count = 0;
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
        self.sampled.count = 0;
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

/// What a pass over the usable backends found.
#[derive(Debug)]
struct Seen {
    /// Of all costs.
    least: f32,
    /// Whose it is.
    best: Option<(BackendIndex, Verdict)>,
    /// Flows open on it.
    best_open: u32,
    /// Flows open on all.
    flows: u32,
    /// Sum of all weights.
    weights: f32,
}

impl Default for Seen {
    fn default() -> Self {
        Self { least: f32::INFINITY, best: None, best_open: 0, flows: 0, weights: 0.0 }
    }
}

impl Seen {
    fn see(&mut self, table: &AllocationTable, index: BackendIndex, verdict: Verdict, open: u32) {
        let (level, step) = table.level(index, open);
        self.flows += open;
        self.weights += table.weights()[index.0 as usize];
        if level + step < self.least {
            (self.least, self.best, self.best_open) = (level + step, Some((index, verdict)), open);
        }
    }

    /// Whether one of this weight with so many flows is so far below the others that it would get every flow for a while.
    fn is_far_below(&self, weight: f32, open: u32) -> bool {
        let level = self.flows as f32 * weight / self.weights;
        level >= RUSH_FLOWS && ((open + 1) as f32) < RUSH_BELOW * level
    }

    /// Whether the best is.
    fn is_rush(&self, weight: f32) -> bool {
        self.is_far_below(weight, self.best_open)
    }

    /// The same without those that are far below.
    fn without_rush(&self, view: &mut View<'_>) -> Self {
        let mut others = Self::default();
        for &index in view.table.eligible() {
            let Some((verdict, open)) = view.usable(index) else { continue };
            if !self.is_far_below(view.weight(index), open) {
                others.see(view.table, index, verdict, open);
            }
        }
        others
    }
}

/// What `p2c` compares.
fn flows_by_weight(view: &View<'_>, index: BackendIndex, open: u32) -> f32 {
    (open as f32 * view.table.balancers() + 1.0) * view.table.step(index)
}

/// What `peak-ewma` compares. One that was never measured is tried by one flow at a time.
fn latency_by_flows(view: &View<'_>, index: BackendIndex, open: u32) -> f32 {
    let unknown = if open == 0 { 0.0 } else { LATENCY_UNKNOWN_MICROS };
    view.table.candidate(index).live.latency_micros(view.now).unwrap_or(unknown) * (open as f32 + 1.0)
}

/// A table seen by one flow.
struct View<'a> {
    table: &'a AllocationTable,
    tried: &'a Excluded,
    now: Timestamp,
    /// All are saturated, or nobody knows.
    ignore_time_outs: bool,
    /// Most are ejected.
    ignore_ejections: bool,
    /// How many looks there were, and how many found a backend ejected.
    looks: u32,
    ejected: u32,
    /// How many looks found a backend full.
    full: u32,
}

impl<'a> View<'a> {
    fn new(table: &'a AllocationTable, tried: &'a Excluded, now: Timestamp) -> Self {
        let ignore_time_outs = table.ignores_time_outs();
        Self { table, tried, now, ignore_time_outs, ignore_ejections: false, looks: 0, ejected: 0, full: 0 }
    }

    /// More than half of those looked at are ejected: worth a look at the others.
    fn seems_ejected(&self) -> bool {
        !self.ignore_ejections && self.ejected * 2 > self.looks
    }

    /// The verdict and the flows open, where this flow may use the backend.
    ///
    /// Made part of each loop that looks: a call for each look keeps the processor from beginning the next one.
    #[inline(always)]
    fn usable(&mut self, index: BackendIndex) -> Option<(Verdict, u32)> {
        let Candidate { live, flows_max } = self.table.candidate(index);
        // Mostly there is no limit, nothing has failed, and nobody was tried.
        if *flows_max == 0 && !live.is_down() && self.tried.count == 0 {
            self.looks += 1;
            return Some((Verdict::Usable, live.flows_open()));
        }
        self.usable_by_verdict(index)
    }

    #[inline(never)]
    fn usable_by_verdict(&mut self, index: BackendIndex) -> Option<(Verdict, u32)> {
        let Candidate { live, flows_max } = self.table.candidate(index);
        self.looks += 1;
        match live.verdict(*flows_max, self.now) {
            _ if self.tried.contains(index) => None,
            verdict @ (Verdict::Usable | Verdict::Probe) => Some((verdict, live.flows_open())),
            Verdict::Ejected if self.ignore_time_outs => Some((Verdict::Usable, live.flows_open())),
            Verdict::Ejected | Verdict::Resetting if self.ignore_ejections => {
                Some((Verdict::Usable, live.flows_open()))
            }
            Verdict::Ejected | Verdict::Resetting => {
                self.ejected += 1;
                None
            }
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
    pub(crate) fn unit(&mut self) -> f32 {
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

    #[test]
    fn a_client_is_kept_where_it_was() {
        let table = table(Policy::RoundRobin, &[1.0; 4]);
        let affinity = Affinity::new(std::time::Duration::from_secs(60), 1);
        let mut selector = Selector::new(1);
        let mut select = |table: &AllocationTable, client: u8, tried: &[u32], now| {
            let client = Client::at([10, 0, 0, client].into());
            let mut excluded = Excluded::none();
            tried.iter().for_each(|index| excluded.push(BackendIndex(*index)));
            let key = FlowKey::from_bits(0);
            let (selection, kept) = selector
                .select_kept(table, &affinity, client, key, &excluded, Timestamp::from_millis(now))
                .unwrap();
            (table.backend(selection.index).id.to_string(), kept)
        };
        let first: Vec<_> = (0..8).map(|n| select(&table, n, &[], 0)).collect();
        assert!(first.iter().all(|(_, kept)| *kept == Kept::New));
        // Another table: one has left, so that indexes are others.
        let members = Members::new(table.members().backends()[1..].to_vec());
        let smaller = AllocationTable::new(2, Policy::RoundRobin, Arc::new(members), vec![1.0; 3]);
        for (n, (id, _)) in (0..8).zip(&first) {
            let (now, kept) = select(&smaller, n, &[], 10_000);
            let stays = id != "b0";
            assert_eq!((stays, kept), (now == *id, if stays { Kept::Same } else { Kept::Moved }), "{n}");
        }
        // Who was moved stays where it is now; a failed connect moves it again; after the time nobody knows it.
        let moved = (0..8).find(|n| first[usize::from(*n)].0 == "b0").unwrap();
        let (at, _) = select(&table, moved, &[], 20_000);
        assert_eq!(select(&table, moved, &[], 70_000), (at.clone(), Kept::Same), "each flow renews it");
        let index: u32 = at[1..].parse().unwrap();
        let (elsewhere, kept) = select(&table, moved, &[index], 70_000);
        assert_eq!((elsewhere != at, kept), (true, Kept::Moved));
        assert_eq!(select(&table, moved, &[], 70_000), (elsewhere, Kept::Same));
        assert_eq!(select(&table, moved, &[], 131_000).1, Kept::New);
    }

    #[test]
    fn affinity_keeps_within_the_load_and_the_limit_of_a_resource() {
        let spec = |bounded_load, flows_max| {
            let full = with_limits(Policy::LeastConnections, &[1.0; 4], flows_max);
            let members = Arc::clone(full.members());
            let spec = crate::TableSpec::new(1, Policy::LeastConnections, members, vec![1.0; 4]);
            AllocationTable::build(crate::TableSpec { bounded_load, ..spec })
        };
        for (bounded_load, flows_max, want) in [(0.0, 0, 100), (1.25, 0, KEPT_FLOWS_MIN), (1.25, 5, 5)] {
            let (table, affinity) =
                (spec(bounded_load, flows_max), Affinity::new(std::time::Duration::from_secs(60), 1));
            let mut selector = Selector::new(1);
            let client = Client::at([10, 0, 0, 1].into());
            let mut held = Vec::new();
            let mut select = || {
                let key = FlowKey::from_bits(0);
                selector.select_kept(&table, &affinity, client, key, &Excluded::none(), NOW).unwrap()
            };
            let mut kept = 0;
            for n in 0..100 {
                let (selection, how) = select();
                assert_eq!(how == Kept::New, n == 0);
                held.push(selection);
                if how == Kept::Moved {
                    break;
                }
                kept += 1;
            }
            assert_eq!(kept, want, "bounded_load {bounded_load}, flows_max {flows_max}");
        }
    }

    #[test]
    fn what_was_drawn_from_one_table_is_not_looked_for_in_another() {
        let empty = AllocationTable::empty(Policy::P2c);
        for policy in Policy::ALL {
            let mut selector = Selector::new(1);
            let chosen = selector.select(&table(Policy::P2c, &[1.0; 9]), &Excluded::none(), NOW).unwrap();
            let small = table(policy, &[0.0]);
            for table in [&empty, &small] {
                assert!(selector.select(table, &Excluded::none(), NOW).is_err());
                assert!(
                    selector.looks(table, None, &Excluded::none(), NOW).as_slice().is_empty(),
                    "{policy}"
                );
            }
            drop(chosen);
        }
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
    fn least_cost_gets_the_flow_where_there_is_work() {
        for policy in [Policy::Adaptive, Policy::LeastConnections] {
            // Costs: 2 / 1, 3 / 4, 1 / 1: the second has two flows open and is the best all the same.
            let table = table(policy, &[1.0, 4.0, 1.0]);
            let _held: Vec<_> = [0, 1, 1].map(|n| table.backend(BackendIndex(n)).live.open_flow()).into();
            assert_shares(&shares(&table, 1_000, false), &[0.0, 1.0, 0.0]);
        }
    }

    #[test]
    fn costs_that_are_about_the_same_share() {
        let table = table(Policy::Adaptive, &[1.0, 1.05, 2.0]);
        // Costs: 3 / 1, 3 / 1.05, 7 / 2.
        let held = [(0, 2), (1, 2), (2, 6)];
        let _held: Vec<_> = held
            .into_iter()
            .flat_map(|(n, count)| vec![BackendIndex(n); count])
            .map(|index| table.backend(index).live.open_flow())
            .collect();
        assert_shares(&shares(&table, 20_000, false), &[0.488, 0.512, 0.0]);
    }

    #[test]
    fn a_newcomer_beside_long_flows_does_not_get_every_flow() {
        let mut weights = vec![1.0; 10];
        weights.push(0.1);
        let table = table(Policy::Adaptive, &weights);
        let hold = |n| (0..1_000).map(move |_| BackendIndex(n));
        let _held: Vec<_> =
            (0..10).flat_map(hold).map(|index| table.backend(index).live.open_flow()).collect();
        let share = shares(&table, 20_000, false)[10];
        assert!((0.02..0.04).contains(&share), "{share} instead of three times 0.1 / 10.1");
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

    fn spec(policy: Policy, weights: &[f32]) -> crate::TableSpec {
        let plain = table(policy, weights);
        crate::TableSpec::new(1, policy, Arc::clone(plain.members()), weights.to_vec())
    }

    fn pick(table: &AllocationTable, selector: &mut Selector) -> u32 {
        selector.select(table, &Excluded::none(), NOW).unwrap().index.0
    }

    #[test]
    fn other_balancers_flows_count_as_ours_do() {
        // Two open at weight 4 against none at weight 1: alone, the heavy one is below the surface; with three balancers
        // it has six.
        for (balancers, heavy) in [(1.0, true), (4.0, false)] {
            let table = AllocationTable::build(crate::TableSpec {
                balancers,
                ..spec(Policy::LeastConnections, &[4.0, 1.0])
            });
            let _held: Vec<_> = (0..2).map(|_| table.backend(BackendIndex(0)).live.open_flow()).collect();
            let mut selector = Selector::new(3);
            let got = (0..200).filter(|_| pick(&table, &mut selector) == 0).count();
            assert_eq!(got > 0, heavy, "{balancers} balancers: {got} of 200");
        }
    }

    #[test]
    fn the_better_of_two_is_chosen() {
        let two = table(Policy::P2c, &[1.0, 1.0]);
        let _busy = two.backend(BackendIndex(0)).live.open_flow();
        let mut selector = Selector::new(1);
        // With two backends, both are drawn nearly always.
        let idle = (0..1_000).filter(|_| pick(&two, &mut selector) == 1).count();
        assert!(idle > 950, "{idle} of 1,000");
        let slow = table(Policy::PeakEwma, &[1.0, 1.0]);
        for (index, micros) in [(0, 1_000), (1, 9_000)] {
            slow.backend(BackendIndex(index)).live.open_flow().first_byte_took(micros, NOW);
        }
        let fast = (0..1_000).filter(|_| pick(&slow, &mut selector) == 0).count();
        assert!(fast > 950, "{fast} of 1,000");
        let _five: Vec<_> = (0..9).map(|_| slow.backend(BackendIndex(0)).live.open_flow()).collect();
        let fast = (0..1_000).filter(|_| pick(&slow, &mut selector) == 0).count();
        assert!(fast < 50, "ten at 1 ms are worse than one at 9 ms: {fast} of 1,000");
    }

    #[test]
    fn weighted_turns_are_smooth() {
        for policy in [Policy::WeightedRoundRobin, Policy::Utilization] {
            let got = shares(&table(policy, &[1.0, 2.0, 0.0, 3.0]), 600, true);
            for (got, want) in got.iter().zip([1.0 / 6.0, 2.0 / 6.0, 0.0, 0.5]) {
                assert!((got - want).abs() < 0.01, "{policy}: {got} instead of {want}");
            }
        }
    }

    #[test]
    fn the_first_takes_all_until_it_is_full() {
        let table = with_limits(Policy::First, &[1.0; 3], 2);
        let mut selector = Selector::new(9);
        let held: Vec<_> = (0..5).map(|_| selector.select(&table, &Excluded::none(), NOW).unwrap()).collect();
        let order: Vec<u32> = held.iter().map(|selection| selection.index.0).collect();
        assert_eq!(order, [0, 0, 1, 1, 2]);
    }

    #[test]
    fn a_client_keeps_its_backend_and_the_load_is_bounded() {
        let free = AllocationTable::build(spec(Policy::Maglev, &[1.0; 5]));
        let bounded = AllocationTable::build(crate::TableSpec {
            bounded_load: 1.25,
            ..spec(Policy::Maglev, &[1.0; 5])
        });
        assert!(free.wants_key());
        let key = FlowKey::of_client([10, 0, 0, 7].into());
        let (mut one, mut other) = (Selector::new(1), Selector::new(2));
        let of =
            |selector: &mut Selector, table| selector.select_for(table, key, &Excluded::none(), NOW).unwrap();
        let home = of(&mut one, &free).index;
        for _ in 0..100 {
            assert_eq!(of(&mut other, &free).index, home, "every worker and balancer finds the same");
        }
        // One client with a hundred flows: without a bound all on one, with it at most 1.25 times the mean.
        let held: Vec<_> = (0..100).map(|_| of(&mut one, &bounded)).collect();
        let most = bounded.members().backends().iter().map(|b| b.live.flows_open()).max().unwrap();
        assert!((20..=26).contains(&most), "{most} of 100 on one of five");
        drop(held);
        free.backend(home).live.open_flow().connect_failed(ConnectFailure::Refused, NOW);
        let away = of(&mut one, &free).index;
        assert_ne!(away, home);
        assert_eq!(of(&mut other, &free).index, away, "and the same second choice");
        assert_eq!(of(&mut one, &AllocationTable::build(spec(Policy::Maglev, &[1.0; 5]))).index, home);
    }

    #[test]
    fn criteria_take_turns_among_those_that_meet_them() {
        let rule = crate::Rule { most: false, tolerance: 0.1, scale_floor: 0.01, spill: None };
        let score = |base: f32| crate::Score { base, per_flow: 0.0 };
        for count in [4, 200] {
            let scores = (0..count).map(|n| score(if n % 4 == 0 { 0.2 } else { 0.9 })).collect();
            let criteria = crate::Criteria::new(vec![rule], scores, vec![], vec![]);
            let table = AllocationTable::build(crate::TableSpec {
                criteria,
                ..spec(Policy::Criteria, &vec![1.0; count])
            });
            let got = shares(&table, 4_000, false);
            let met: f64 = got.iter().step_by(4).sum();
            assert!(met > 0.97, "{count}: {met} of the flows went to who meets the criterion");
            let most = got.iter().copied().fold(0.0, f64::max);
            assert!(most < 2.5 * 4.0 / count as f64, "{count}: {most} went to one");
        }
        // A gate: considered for a tenth of the flows only.
        let criteria = crate::Criteria::new(vec![rule], vec![score(0.1), score(0.9)], vec![], vec![0.1, 1.0]);
        let table =
            AllocationTable::build(crate::TableSpec { criteria, ..spec(Policy::Criteria, &[1.0, 1.0]) });
        let got = shares(&table, 4_000, false);
        assert!((got[0] - 0.1).abs() < 0.02, "{got:?}");
    }

    #[test]
    fn probes_decide_where_there_are_answers() {
        let probes = Arc::new(std::sync::Mutex::new(crate::ProbePool::new(crate::ProbeKnobs::default(), 1)));
        let table = AllocationTable::build(crate::TableSpec {
            probes: Some(Arc::clone(&probes)),
            ..spec(Policy::Prequal, &[1.0; 20])
        });
        let mut selector = Selector::new(4);
        assert!(pick(&table, &mut selector) < 20, "without an answer, by flows");
        let mut pool = probes.lock().unwrap();
        pool.renumber(table.members().epoch(), 20);
        for n in 0..16 {
            pool.answer(table.members().epoch(), BackendIndex(n), 3, 1_000 - n * 10, NOW);
        }
        drop(pool);
        assert_eq!(pick(&table, &mut selector), 15, "the fastest of the cold");
        let _locked = probes.lock().unwrap();
        assert!(pick(&table, &mut selector) < 20, "nobody waits for the lock");
    }

    #[test]
    fn versions_are_divided_first() {
        let whole = spec(Policy::RoundRobin, &[1.0; 4]);
        let side = |version: &str, share, weights: [f32; 4]| crate::Side {
            version: version.into(),
            share,
            table: AllocationTable::new(1, Policy::RoundRobin, Arc::clone(&whole.members), weights.to_vec()),
        };
        let split = |by, new: [f32; 4]| crate::Split {
            by,
            sides: vec![side("1", 0.9, [1.0, 1.0, 1.0, 0.0]), side("2", 0.1, new)],
        };
        let only_last = [0.0, 0.0, 0.0, 1.0];
        let table = AllocationTable::build(whole.clone()).with_split(split(SplitBy::Share, only_last));
        assert!((shares(&table, 20_000, false)[3] - 0.1).abs() < 0.01, "one of four, a tenth of the flows");
        let by_client = AllocationTable::build(whole.clone()).with_split(split(SplitBy::Client, only_last));
        let mut selector = Selector::new(1);
        let mut side_of = |n: u16| {
            let key = FlowKey::of_client([10, 0, (n >> 8) as u8, n as u8].into());
            let of = |selector: &mut Selector| {
                selector.select_for(&by_client, key, &Excluded::none(), NOW).unwrap().side
            };
            let side = of(&mut selector);
            assert!((0..20).all(|_| of(&mut selector) == side), "a client stays with its version");
            side
        };
        let new = (0..2_000).filter(|n| side_of(*n) == 1).count();
        assert!((150..250).contains(&new), "{new} of 2,000 clients");
        // Nobody serves the new version: the old one does.
        let table = AllocationTable::build(whole.clone()).with_split(split(SplitBy::Share, [0.0; 4]));
        assert_eq!(shares(&table, 500, false)[3], 0.0);
    }

    #[test]
    fn ejections_are_ignored_where_most_are_ejected() {
        for policy in Policy::ALL.into_iter().filter(|policy| *policy != Policy::Maglev) {
            let table = table(policy, &[1.0; 4]);
            let eject = |index| {
                let live = &table.backend(BackendIndex(index)).live;
                live.open_flow().connect_failed(ConnectFailure::TimedOut, NOW);
            };
            eject(0);
            let mut selector = Selector::new(5);
            let got = |selector: &mut Selector| (0..200).filter(|_| pick(&table, selector) == 0).count();
            assert_eq!(got(&mut selector), 0, "{policy}: one of four stays ejected");
            assert_eq!(selector.panics(), 0);
            eject(1);
            eject(2);
            assert!(got(&mut selector) > 0, "{policy}: three of four are not all at fault");
            assert!(selector.panics() > 0);
        }
    }

    #[test]
    fn refusals_are_certain_however_many_there_are() {
        for policy in Policy::ALL.into_iter().filter(|policy| *policy != Policy::Maglev) {
            let table = table(policy, &[1.0; 4]);
            for index in 0..3 {
                let live = &table.backend(BackendIndex(index)).live;
                live.open_flow().connect_failed(ConnectFailure::Refused, NOW);
            }
            let mut selector = Selector::new(5);
            assert!(
                (0..50).all(|_| pick(&table, &mut selector) == 3),
                "{policy}: the one that takes connections"
            );
            let live = &table.backend(BackendIndex(3)).live;
            live.open_flow().connect_failed(ConnectFailure::Refused, NOW);
            assert!(
                (0..50).any(|_| pick(&table, &mut selector) != 3),
                "{policy}: with nobody left, any is tried"
            );
        }
    }

    #[test]
    fn in_a_saturated_pool_time_outs_eject_nobody_and_resets_do() {
        let table = AllocationTable::build(crate::TableSpec {
            ignore_time_outs: true,
            ..spec(Policy::RoundRobin, &[1.0; 4])
        });
        let live = |index| &table.backend(BackendIndex(index)).live;
        live(0).open_flow().connect_failed(ConnectFailure::TimedOut, NOW);
        for _ in 0..5 {
            live(1).open_flow().reset_before_answer(NOW);
        }
        let mut selector = Selector::new(5);
        let mut counts = [0; 4];
        (0..300).for_each(|_| counts[pick(&table, &mut selector) as usize] += 1);
        assert!(counts[0] > 90 && counts[1] == 0, "{counts:?}");
    }

    #[test]
    fn a_requirement_that_nobody_meets_is_told_apart() {
        let none = AllocationTable::build(crate::TableSpec {
            requirement_unmet: true,
            ..spec(Policy::Adaptive, &[0.0, 0.0])
        });
        let why = Selector::new(1).select(&none, &Excluded::none(), NOW).unwrap_err();
        assert_eq!(why, NoBackend::RequirementUnmet);
    }

    #[test]
    fn looks_are_as_before_the_flow() {
        let table = with_limits(Policy::Adaptive, &[1.0, 1.0, 0.0], 1);
        let _full = table.backend(BackendIndex(1)).live.open_flow();
        let mut selector = Selector::new(1);
        let chosen = selector.select(&table, &Excluded::none(), NOW).unwrap();
        let looks = selector.looks(&table, Some(chosen.index), &Excluded::none(), NOW);
        let seen: Vec<_> = looks.as_slice().iter().map(|l| (l.index.0, l.flows_open, l.verdict)).collect();
        assert_eq!(seen, [(0, 0, Verdict::Usable), (1, 1, Verdict::Full)]);
        let large = self::table(Policy::Adaptive, &[1.0; 100]);
        let chosen = selector.select(&large, &Excluded::none(), NOW).unwrap();
        let looks = selector.looks(&large, Some(chosen.index), &Excluded::none(), NOW);
        assert!((1..=SAMPLES).contains(&looks.as_slice().len()));
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
