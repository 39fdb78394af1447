//! How publishing goes, for whoever asks: one entry for each zone at each server.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Where publishing in one zone at one server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishState {
    /// It has not succeeded yet, and not failed either.
    Starting,
    /// The records were there when it was looked last.
    Published,
    /// The last try failed. What was published before may still be there.
    Failing,
    /// The balancer leaves, and its records are gone.
    Withdrawn,
}

impl PublishState {
    /// Its name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Published => "published",
            Self::Failing => "failing",
            Self::Withdrawn => "withdrawn",
        }
    }
}

/// How publishing in one zone at one server goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The zone.
    pub zone: String,
    /// The server.
    pub server: SocketAddr,
    /// The balancer's host name there.
    pub name: String,
    /// How it goes.
    pub state: PublishState,
    /// Why the last try failed; empty: it did not.
    pub last_error: String,
    /// When the records were seen to be there last; `None`: never.
    pub confirmed: Option<Instant>,
    /// Tries by their result: `ok`, or what [`crate::UpdateError::label`] says.
    pub updates: BTreeMap<&'static str, u64>,
}

/// The statuses of all servers; clones see the same.
#[derive(Debug, Clone, Default)]
pub struct Statuses(Arc<Mutex<Vec<Status>>>);

impl Statuses {
    /// All of them as they are now, in the order of the configuration.
    pub fn now(&self) -> Vec<Status> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds one; gives its place.
    pub(crate) fn add(&self, status: Status) -> usize {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(status);
        all.len() - 1
    }

    pub(crate) fn change(&self, place: usize, change: impl FnOnce(&mut Status)) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(status) = all.get_mut(place) {
            change(status);
        }
    }
}
