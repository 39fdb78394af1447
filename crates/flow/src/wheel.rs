//! One deadline for each flow, in constant time (hierarchical timing wheel: Varghese and Lauck, SOSP 1987).
//!
//! Entries are flow slots; their links live in one array, so arming, moving and disarming allocate nothing. Deadlines
//! are rounded up to a [`TICK`]: a timer never fires early.

use std::time::Duration;

use allocation::Timestamp;

/// Grain of all flow timers. Connect and idle timeouts are a hundred milliseconds and more.
pub const TICK: Duration = Duration::from_millis(TICK_MS);

const TICK_MS: u64 = 16;
const SLOT_BITS: u32 = 6;
const SLOTS: usize = 1 << SLOT_BITS;
/// 64 slots to the power of 5, times 16 ms: 198 days; what is further off fires then, is found to be early and is armed
/// again.
const LEVELS: usize = 5;
const NONE: u32 = u32::MAX;
const UNARMED: u16 = u16::MAX;

/// The timers of one worker's flows, by flow slot.
#[derive(Debug)]
pub struct TimerWheel {
    /// The tick that was handled last.
    tick: u64,
    armed: usize,
    /// For each level, which slots have entries.
    occupied: [u64; LEVELS],
    heads: [u32; LEVELS * SLOTS],
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    next: u32,
    previous: u32,
    deadline_tick: u64,
    /// `level * SLOTS + slot`.
    place: u16,
}

const DISARMED: Entry = Entry { next: NONE, previous: NONE, deadline_tick: 0, place: UNARMED };

impl TimerWheel {
    /// An empty wheel that starts at `now`.
    pub fn new(now: Timestamp) -> Self {
        Self {
            tick: now.as_millis() / TICK_MS,
            armed: 0,
            occupied: [0; LEVELS],
            heads: [NONE; LEVELS * SLOTS],
            entries: Vec::new(),
        }
    }

    /// How many are armed.
    pub fn armed(&self) -> usize {
        self.armed
    }

    /// Arms `slot` for `deadline`, or moves it there. [`Timestamp::NEVER`] disarms it.
    pub fn arm(&mut self, slot: u32, deadline: Timestamp) {
        self.disarm(slot);
        if deadline == Timestamp::NEVER {
            return;
        }
        let index = slot as usize;
        if index >= self.entries.len() {
            self.entries.resize(index + 1, DISARMED);
        }
        let deadline_tick = deadline.as_millis().div_ceil(TICK_MS).max(self.tick + 1);
        self.insert(slot, deadline_tick);
        self.armed += 1;
    }

    /// Disarms `slot`; nothing happens if it was not armed.
    pub fn disarm(&mut self, slot: u32) {
        if self.entries.get(slot as usize).is_some_and(|e| e.place != UNARMED) {
            self.unlink(slot);
            self.armed -= 1;
        }
    }

    /// When to call [`TimerWheel::advance`] next: no later than the earliest deadline. `None` when nothing is armed.
    pub fn next_wake(&self) -> Option<Timestamp> {
        let mut earliest: Option<u64> = None;
        for level in 0..LEVELS {
            let occupied = self.occupied[level];
            if occupied == 0 {
                continue;
            }
            let shift = SLOT_BITS * level as u32;
            let now = self.tick >> shift;
            // Slots in the order in which they come up, the one after the current first.
            let ahead = occupied.rotate_right(((now + 1) % SLOTS as u64) as u32).trailing_zeros();
            let tick = (now + 1 + u64::from(ahead)) << shift;
            earliest = Some(earliest.map_or(tick, |e| e.min(tick)));
        }
        earliest.map(|tick| Timestamp::from_millis(tick * TICK_MS))
    }

    /// Moves on to `now` and puts the slots whose deadline has come into `expired`, disarmed.
    pub fn advance(&mut self, now: Timestamp, expired: &mut Vec<u32>) {
        let target = now.as_millis() / TICK_MS;
        while self.tick < target {
            if self.armed == 0 {
                self.tick = target;
                return;
            }
            // Jump over ticks at which nothing comes up.
            let next = self.next_wake().map_or(target, |wake| wake.as_millis() / TICK_MS);
            self.tick = next.min(target);
            self.turn(expired);
        }
    }

    /// Handles the current tick: brings coarser slots that begin now down, and expires the finest.
    fn turn(&mut self, expired: &mut Vec<u32>) {
        for level in (0..LEVELS).rev() {
            let shift = SLOT_BITS * level as u32;
            if self.tick & ((1 << shift) - 1) != 0 {
                continue;
            }
            let slot = ((self.tick >> shift) % SLOTS as u64) as usize;
            let mut entry = self.take(level, slot);
            while entry != NONE {
                let Entry { next, deadline_tick, .. } = self.entries[entry as usize];
                self.entries[entry as usize] = DISARMED;
                if deadline_tick <= self.tick {
                    self.armed -= 1;
                    expired.push(entry);
                } else {
                    self.insert(entry, deadline_tick);
                }
                entry = next;
            }
        }
    }

    fn insert(&mut self, slot: u32, deadline_tick: u64) {
        let ahead = deadline_tick - self.tick;
        let level = ((63 - ahead.leading_zeros()) / SLOT_BITS).min(LEVELS as u32 - 1) as usize;
        let shift = SLOT_BITS * level as u32;
        // The farthest place of the coarsest level stands for all that is beyond it.
        let horizon = self.tick + ((SLOTS as u64 - 1) << shift);
        let place_tick = deadline_tick.min(horizon) >> shift;
        let place = level * SLOTS + (place_tick % SLOTS as u64) as usize;
        let head = self.heads[place];
        self.entries[slot as usize] =
            Entry { next: head, previous: NONE, deadline_tick, place: place as u16 };
        if head != NONE {
            self.entries[head as usize].previous = slot;
        }
        self.heads[place] = slot;
        self.occupied[level] |= 1 << (place % SLOTS);
    }

    fn unlink(&mut self, slot: u32) {
        let Entry { next, previous, place, .. } = self.entries[slot as usize];
        if next != NONE {
            self.entries[next as usize].previous = previous;
        }
        if previous != NONE {
            self.entries[previous as usize].next = next;
        } else {
            let place = usize::from(place);
            self.heads[place] = next;
            if next == NONE {
                self.occupied[place / SLOTS] &= !(1 << (place % SLOTS));
            }
        }
        self.entries[slot as usize] = DISARMED;
    }

    fn take(&mut self, level: usize, slot: usize) -> u32 {
        self.occupied[level] &= !(1 << slot);
        std::mem::replace(&mut self.heads[level * SLOTS + slot], NONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn at(ms: u64) -> Timestamp {
        Timestamp::from_millis(ms)
    }

    #[test]
    fn fires_once_and_never_early() {
        let mut wheel = TimerWheel::new(at(1_000));
        wheel.arm(3, at(6_000));
        let mut expired = Vec::new();
        wheel.advance(at(5_999), &mut expired);
        assert_eq!((expired.len(), wheel.armed()), (0, 1));
        wheel.advance(at(6_016), &mut expired);
        assert_eq!((expired.as_slice(), wheel.armed()), (&[3][..], 0));
        assert_eq!(wheel.next_wake(), None);
    }

    #[test]
    fn never_is_disarmed() {
        let mut wheel = TimerWheel::new(at(0));
        wheel.arm(0, at(50));
        wheel.arm(0, Timestamp::NEVER);
        assert_eq!(wheel.armed(), 0);
        wheel.disarm(17);
    }

    #[derive(Debug, Clone)]
    enum Op {
        Arm(u32, u64),
        Disarm(u32),
        Pass(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        // Milliseconds across all levels, with the short ones that are common.
        let span = prop_oneof![0..100_u64, 0..10_000_u64, 0..10_000_000_u64, 0..100_000_000_000_u64];
        prop_oneof![
            (0..40_u32, span.clone()).prop_map(|(slot, ms)| Op::Arm(slot, ms)),
            (0..40_u32).prop_map(Op::Disarm),
            span.prop_map(Op::Pass),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_map(start in 0..1_000_000_u64, ops in prop::collection::vec(op(), 1..120)) {
            let mut wheel = TimerWheel::new(at(start));
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            let mut now = start;
            for op in ops {
                match op {
                    Op::Arm(slot, ms) => {
                        wheel.arm(slot, at(now + ms));
                        model.insert(slot, now + ms);
                    }
                    Op::Disarm(slot) => {
                        wheel.disarm(slot);
                        model.remove(&slot);
                    }
                    Op::Pass(ms) => {
                        if let (Some(wake), Some(first)) = (wheel.next_wake(), model.values().min()) {
                            prop_assert!(wake.as_millis() <= first.div_ceil(TICK_MS).max(now / TICK_MS + 1) * TICK_MS);
                        }
                        now += ms;
                        let mut expired = Vec::new();
                        wheel.advance(at(now), &mut expired);
                        for slot in expired {
                            let deadline = model.remove(&slot).expect("it was armed");
                            prop_assert!(deadline <= now, "early by {}", deadline - now);
                        }
                        let late = model.values().filter(|d| **d + 2 * TICK_MS <= now).count();
                        prop_assert_eq!(late, 0, "everything due has fired");
                    }
                }
                prop_assert_eq!(wheel.armed(), model.len());
            }
        }
    }
}
