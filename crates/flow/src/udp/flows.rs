//! The flows of one worker: found by tuple, ended by silence, by counts, by refusals; never more than a bound.
//!
//! ```text
//!          open                       requests reached: the tuple is free for a new flow
//! (none) ───────> named ──────────────────────────────────────────────────────> unnamed
//!                   │ idle, answered as often as it must be, refused, drained      │
//!                   └──────────────> ended <───────────────────────────────────────┘
//!                                      │ nothing of it is in flight
//!                                      └──> (slot is free, next generation)
//! ```
//!
//! Invariants: a tuple (or, behind a proxy, what it announces) names one flow at most; a flow keeps its slot until [`Flows::remove`]; an ended flow has no tuple and no
//! timer; there are never more than `flows_max` that are not ended.

use std::collections::HashMap;
use std::time::Duration;

use allocation::Timestamp;

use super::tuple::{Announced, Keyed, Tuple};
use crate::TimerWheel;

/// How long a backend must stay silent about a datagram until it is taken to have got it: an ICMP error comes within a round
/// trip, and services that never answer (logs, statistics) give no other sign.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(1);

/// How flows of a listener are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// How long a flow may go without a datagram in either direction.
    pub idle_timeout: Duration,
    /// Datagrams with which a backend answers each of the client's; when all are answered the flow is over. 0: nobody knows.
    pub responses: u32,
    /// Datagrams of a client that one flow carries; the next one is given to a new flow. 0: any number.
    pub requests: u32,
    /// Further backends that are tried when one refuses before it has answered.
    pub retries: u8,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { idle_timeout: Duration::from_secs(60), responses: 0, requests: 0, retries: 1 }
    }
}

/// As many flows as may be are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("as many UDP flows as may be are open")]
pub struct Full;

/// What an answer means to its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Answer {
    /// It is the first one from this backend.
    pub first: bool,
    /// All is answered: the flow is over.
    pub over: bool,
}

/// What a refusal (ICMP port unreachable) means to its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing has come from the backend yet: another one may be tried.
    Elsewhere,
    /// It is over.
    Over,
}

/// What a deadline means to its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// Nothing went either way for the idle timeout: it is over.
    Idle,
    /// Its backend has neither answered nor refused it: it was reached.
    NotRefused,
}

/// The flows of one worker. `T` is what the caller keeps of each.
#[derive(Debug)]
pub struct Flows<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    named: HashMap<Tuple, u32, Keyed>,
    /// Those whose client a proxy names.
    announced: HashMap<Announced, u32, Keyed>,
    wheel: TimerWheel,
    /// Flows that are not ended.
    open: usize,
    flows_max: usize,
    /// Kept for its memory.
    due: Vec<u32>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    flow: Option<Flow<T>>,
}

/// What a flow is found by.
#[derive(Debug, Clone)]
enum Name {
    Tuple(Tuple),
    /// On the heap: few flows come through a proxy, and the others should not be larger for them.
    Announced(Box<Announced>),
}

#[derive(Debug)]
struct Flow<T> {
    name: Name,
    named: bool,
    ended: bool,
    /// Datagrams of the client, and answers to them from the backend it has now.
    asked: u32,
    answered: u32,
    refusals: u8,
    /// When a datagram last went either way.
    moved: Timestamp,
    /// Until when the backend may still refuse; [`Timestamp::NEVER`] where nobody waits for that.
    refusable: Timestamp,
    armed_for: Timestamp,
    value: T,
}

impl<T> Flow<T> {
    fn deadline(&self, tuning: &Tuning) -> Timestamp {
        (self.moved + tuning.idle_timeout).min(self.refusable)
    }
}

impl<T> Flows<T> {
    /// None yet, and at most `flows_max`; `seed` keys the table's hash.
    pub fn new(now: Timestamp, seed: u64, flows_max: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            named: HashMap::with_hasher(Keyed::new(seed)),
            announced: HashMap::with_hasher(Keyed::new(seed)),
            wheel: TimerWheel::new(now),
            open: 0,
            flows_max,
            due: Vec::new(),
        }
    }

    /// How many are not ended.
    pub fn open_count(&self) -> usize {
        self.open
    }

    /// How many slots are in use: those that are open, and those that ended and of which something is in flight.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether no slot is in use.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The flow that this datagram of a client belongs to.
    pub fn find(&self, tuple: &Tuple) -> Option<u32> {
        self.named.get(tuple).copied()
    }

    /// The flow that this datagram of a proxy's client belongs to.
    pub fn find_announced(&self, announced: &Announced) -> Option<u32> {
        self.announced.get(announced).copied()
    }

    /// Opens a flow, which the tuple names from now on.
    ///
    /// # Errors
    /// [`Full`] at the bound.
    pub fn open(&mut self, tuple: Tuple, value: T, now: Timestamp, tuning: &Tuning) -> Result<u32, Full> {
        self.open_as(Name::Tuple(tuple), value, now, tuning)
    }

    /// The same for a flow whose client a proxy names.
    ///
    /// # Errors
    /// [`Full`] at the bound.
    pub fn open_announced(
        &mut self,
        announced: Announced,
        value: T,
        now: Timestamp,
        tuning: &Tuning,
    ) -> Result<u32, Full> {
        self.open_as(Name::Announced(Box::new(announced)), value, now, tuning)
    }

    fn open_as(&mut self, name: Name, value: T, now: Timestamp, tuning: &Tuning) -> Result<u32, Full> {
        if self.open >= self.flows_max {
            return Err(Full);
        }
        let flow = Flow {
            name: name.clone(),
            named: true,
            ended: false,
            asked: 0,
            answered: 0,
            refusals: 0,
            moved: now,
            refusable: now + REFUSAL_PATIENCE,
            armed_for: Timestamp::NEVER,
            value,
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize].flow = Some(flow);
                index
            }
            None => {
                self.slots.push(Slot { generation: 0, flow: Some(flow) });
                (self.slots.len() - 1) as u32
            }
        };
        let before = match name {
            Name::Tuple(tuple) => self.named.insert(tuple, index),
            Name::Announced(announced) => self.announced.insert(*announced, index),
        };
        if let Some(before) = before {
            // The caller did not look. The older flow goes on without a name.
            if let Some(flow) = self.flow_mut(before) {
                flow.named = false;
            }
        }
        self.open += 1;
        self.follow_deadline(index, tuning);
        Ok(index)
    }

    /// The flow has another backend than at first.
    pub fn placed(&mut self, index: u32, now: Timestamp, tuning: &Tuning) {
        if let Some(flow) = self.open_mut(index) {
            flow.answered = 0;
            flow.refusable = now + REFUSAL_PATIENCE;
            self.follow_deadline(index, tuning);
        }
    }

    /// The client sent so many datagrams, which are on their way to the backend. With the last one that the flow carries it
    /// gives its name up.
    pub fn asked(&mut self, index: u32, datagrams: u32, now: Timestamp, tuning: &Tuning) {
        let Some(flow) = self.open_mut(index) else { return };
        flow.asked = flow.asked.saturating_add(datagrams);
        flow.moved = now;
        if tuning.requests != 0 && flow.asked >= tuning.requests {
            self.unname(index);
        }
    }

    /// The backend sent so many datagrams.
    pub fn answered(&mut self, index: u32, datagrams: u32, now: Timestamp, tuning: &Tuning) -> Answer {
        let Some(flow) = self.open_mut(index) else { return Answer::default() };
        let first = flow.answered == 0;
        flow.answered = flow.answered.saturating_add(datagrams);
        flow.moved = now;
        flow.refusable = Timestamp::NEVER;
        // Where a flow carries a number of requests, answers to the first ones alone do not end it.
        let all = tuning.requests.max(flow.asked).saturating_mul(tuning.responses);
        Answer { first, over: tuning.responses != 0 && flow.answered >= all }
    }

    /// The backend refused a datagram.
    pub fn refused(&mut self, index: u32, tuning: &Tuning) -> Refusal {
        match self.open_mut(index) {
            Some(flow) if flow.answered == 0 && flow.refusals < tuning.retries => {
                flow.refusals += 1;
                Refusal::Elsewhere
            }
            _ => Refusal::Over,
        }
    }

    /// The flow gives its tuple up: the next datagram from there begins another one.
    pub fn unname(&mut self, index: u32) {
        if let Some(flow) = self.open_mut(index).filter(|flow| flow.named) {
            flow.named = false;
            match flow.name.clone() {
                Name::Tuple(tuple) => self.named.remove(&tuple),
                Name::Announced(announced) => self.announced.remove(&*announced),
            };
        }
    }

    /// The flow is over; its slot stays until [`Flows::remove`]. False where it was over already.
    pub fn end(&mut self, index: u32) -> bool {
        self.unname(index);
        let Some(flow) = self.open_mut(index) else { return false };
        flow.ended = true;
        self.wheel.disarm(index);
        self.open -= 1;
        true
    }

    /// Frees the slot of an ended flow. Tokens of it no longer match.
    ///
    /// # Panics
    /// If it is not ended.
    pub fn remove(&mut self, index: u32) -> Option<T> {
        let slot = self.slots.get_mut(index as usize)?;
        let flow = slot.flow.take()?;
        assert!(flow.ended, "flow {index} is not over");
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        Some(flow.value)
    }

    /// The slot's generation: how often it was freed.
    pub fn generation(&self, index: u32) -> Option<u32> {
        self.slots.get(index as usize).map(|slot| slot.generation)
    }

    /// What the caller keeps of a flow, also of an ended one.
    pub fn get(&self, index: u32) -> Option<&T> {
        Some(&self.slots.get(index as usize)?.flow.as_ref()?.value)
    }

    /// See [`Flows::get`].
    pub fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.flow_mut(index).map(|flow| &mut flow.value)
    }

    /// Whether it is there and not ended.
    pub fn is_open(&self, index: u32) -> bool {
        self.slots.get(index as usize).and_then(|slot| slot.flow.as_ref()).is_some_and(|flow| !flow.ended)
    }

    /// Datagrams that the client of a flow sent so far.
    pub fn requests(&self, index: u32) -> u32 {
        self.slots.get(index as usize).and_then(|slot| slot.flow.as_ref()).map_or(0, |flow| flow.asked)
    }

    /// The numbers of those that are not ended.
    pub fn indexes(&self) -> Vec<u32> {
        (0..self.slots.len() as u32).filter(|index| self.is_open(*index)).collect()
    }

    /// When to call [`Flows::expire`] next.
    pub fn next_wake(&self) -> Option<Timestamp> {
        self.wheel.next_wake()
    }

    /// Puts those whose deadline has come into `expired`. The caller ends those that are idle.
    pub fn expire<'a>(
        &mut self,
        now: Timestamp,
        tuning: impl Fn(&T) -> &'a Tuning,
        expired: &mut Vec<(u32, Expiry)>,
    ) {
        let mut due = std::mem::take(&mut self.due);
        self.wheel.advance(now, &mut due);
        for index in due.drain(..) {
            let Some(flow) = self.open_mut(index) else { continue };
            flow.armed_for = Timestamp::NEVER;
            let tuning = tuning(&flow.value);
            if flow.refusable <= now {
                flow.refusable = Timestamp::NEVER;
                expired.push((index, Expiry::NotRefused));
            }
            if flow.moved + tuning.idle_timeout <= now {
                expired.push((index, Expiry::Idle));
            } else {
                self.follow_deadline(index, tuning);
            }
        }
        self.due = due;
    }

    /// Arms the timer if the deadline came nearer. If it moved away, as it does with every datagram, the timer finds out when
    /// it fires.
    fn follow_deadline(&mut self, index: u32, tuning: &Tuning) {
        let Some(flow) = self.open_mut(index) else { return };
        let deadline = flow.deadline(tuning);
        if deadline < flow.armed_for {
            flow.armed_for = deadline;
            self.wheel.arm(index, deadline);
        }
    }

    fn flow_mut(&mut self, index: u32) -> Option<&mut Flow<T>> {
        self.slots.get_mut(index as usize)?.flow.as_mut()
    }

    fn open_mut(&mut self, index: u32) -> Option<&mut Flow<T>> {
        self.flow_mut(index).filter(|flow| !flow.ended)
    }
}
