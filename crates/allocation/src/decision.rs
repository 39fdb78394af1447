//! One selection as it was made, for whoever asks afterwards.

use std::sync::Arc;

use crate::{AllocationTable, BackendIndex, NoBackend, Timestamp, Verdict};

/// One backend that a selection looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Which.
    pub index: BackendIndex,
    /// Flows open on it before this one.
    pub flows_open: u32,
    /// Whether it could be used.
    pub verdict: Verdict,
    /// This flow had tried it before.
    pub tried: bool,
}

/// The backends that a selection looked at, at most [`Looks::MAX`] of them, without a heap.
#[derive(Debug, Clone, Copy)]
pub struct Looks {
    looks: [Look; Self::MAX],
    count: u8,
}

impl Looks {
    /// Most that are kept of one selection.
    pub const MAX: usize = 16;

    /// None yet.
    pub const fn none() -> Self {
        let nothing = Look { index: BackendIndex(0), flows_open: 0, verdict: Verdict::Usable, tried: false };
        Self { looks: [nothing; Self::MAX], count: 0 }
    }

    pub(crate) fn push(&mut self, look: Look) {
        let known = self.as_slice().iter().any(|known| known.index == look.index);
        if !known && let Some(place) = self.looks.get_mut(usize::from(self.count)) {
            *place = look;
            self.count += 1;
        }
    }

    /// All of them.
    pub fn as_slice(&self) -> &[Look] {
        &self.looks[..usize::from(self.count)]
    }
}

/// One selection.
#[derive(Debug, Clone)]
pub struct Decision {
    /// When.
    pub at: Timestamp,
    /// By which worker.
    pub worker: u16,
    /// For which listener, in configuration order.
    pub listener: u16,
    /// To which of its targets its routes gave the flow; 0 is the default.
    pub target: u16,
    /// Which of the listener's routes it met, counted from 1; 0: none.
    pub route: u16,
    /// By which table. It is kept alive by this.
    pub table: Arc<AllocationTable>,
    /// On which side of its split.
    pub side: u16,
    /// What came of it.
    pub chosen: Result<BackendIndex, NoBackend>,
    /// It was chosen because the client had been given it before.
    pub kept: bool,
    /// Backends that the flow had tried before.
    pub tried: u8,
    /// Those it looked at.
    pub looks: Looks,
}
