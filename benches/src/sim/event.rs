//! Simulated time, and what will happen in it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A moment: nanoseconds since the start of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Time(pub(crate) u64);

impl Time {
    /// After everything.
    pub(crate) const NEVER: Self = Self(u64::MAX);

    /// So many seconds after the start, or as long as that.
    pub(crate) fn from_seconds(seconds: f64) -> Self {
        Self((seconds * 1e9) as u64)
    }

    /// Whole milliseconds since the start: the product's grain.
    pub(crate) fn millis(self) -> u64 {
        self.0 / 1_000_000
    }

    /// Later by so many seconds.
    pub(crate) fn after(self, seconds: f64) -> Self {
        Self(self.0.saturating_add((seconds * 1e9) as u64))
    }

    /// Seconds since `earlier`; 0 if it is not earlier.
    pub(crate) fn since(self, earlier: Self) -> f64 {
        self.0.saturating_sub(earlier.0) as f64 * 1e-9
    }
}

/// Something that happens at a known moment. Arrivals and deadlines come in order anyway and are not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Event {
    /// A server has finished the work of a flow.
    Served { server: u32, flow: u32 },
    /// A server's speed is drawn anew.
    Redraw { server: u32 },
    /// A server reports.
    Report { server: u32 },
    /// A server's change of the scenario is due.
    Change { server: u32, change: u32 },
    /// A second is over.
    Second,
}

/// What will happen, soonest first; what comes at the same moment, in the order it was planned.
#[derive(Debug, Default)]
pub(crate) struct Agenda {
    heap: BinaryHeap<Reverse<(Time, u64, Event)>>,
    planned: u64,
}

impl Agenda {
    /// Plans an event.
    pub(crate) fn plan(&mut self, at: Time, event: Event) {
        self.planned += 1;
        self.heap.push(Reverse((at, self.planned, event)));
    }

    /// When the next one is due.
    pub(crate) fn next_at(&self) -> Time {
        self.heap.peek().map_or(Time::NEVER, |Reverse((at, ..))| *at)
    }

    /// The next one.
    pub(crate) fn pop(&mut self) -> Option<(Time, Event)> {
        self.heap.pop().map(|Reverse((at, _, event))| (at, event))
    }
}
