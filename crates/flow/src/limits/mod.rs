//! How many flows there may be, and how many new ones a second: counts that all workers share without a lock.
//!
//! ```text
//! Meter      one listener:  flows open (a count) and new flows a second (a Rate over one atomic)
//! Clients    many clients:  the same two for each, in a table of fixed size
//! Budget     one pool:      flows open over all its resources
//! ```
//!
//! Owns: who is let in. Does not own: what is done with whom it turns away, the clock (`now` is an argument, in microseconds
//! on the process's clock). Whoever is let in has a place and gives it back once.
//!
//! Exactness: counts are exact. Rates are exact for the `now` that callers bring: workers look at the clock once in a batch, so
//! a burst may be let in earlier or later by the length of a batch. What is turned away leaves no trace.

mod clients;
mod meter;
mod rate;

pub use clients::{ClientPlace, Clients};
pub use meter::{Budget, Meter};
pub use rate::Rate;

/// What was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// As many flows are open as may be.
    Flows,
    /// New flows come too fast.
    Rate,
}
