//! The pure TCP flow: what to receive, send, shut and close, and when. It moves no byte, opens no socket, reads no clock.
//!
//! ```text
//! completion -> Input -> Flow::handle(now) -> Outputs -> submissions
//!                           |
//!                           +-- Chunks: which received buffer belongs to which half, in order
//! TimerWheel: the flow's one deadline (connect, idle, flush)
//! limits: who is let in at all, over all workers
//! ```
//!
//! The shell (crate `dataplane`) turns completions into [`Input`]s and does what the [`Output`]s say. Everything that can
//! go wrong with an order of events can be tried here without a kernel: see the simulation in `tests/`.
#![forbid(unsafe_code)]

mod chunk;
pub mod limits;
pub mod preface;
mod tcp;
mod wheel;

pub use chunk::{BufferId, Chunk, Chunks};
pub use tcp::{CloseReason, FillEnd, Flow, Input, Inspection, Output, Outputs, RecvEnd, Shot, Side, Tuning};
pub use wheel::{TICK, TimerWheel};
