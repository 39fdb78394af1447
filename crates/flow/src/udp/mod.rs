//! UDP pseudo-connections: which datagrams belong together, how long, and on which backend. No byte is moved here.
//!
//! ```text
//! datagram from a client ── Tuple ──> Flows: known ──> its backend
//!  of a proxy's client ── Announced ────┤
//!                                       └─ new ──> (QUIC: Cids, ServerIds) ──> select ──> Flows::open
//! datagram from a backend ── its socket ──> Flows::answered ──> the client; over when all is answered
//! ICMP port unreachable ──> Flows::refused ──> another backend, once, or the end
//! ```
//!
//! Owns: the table of flows with its bound, one deadline for each, the counts that end one early, and which datagrams go out
//! together ([`Train`]). Does not own: sockets, buffers, what a backend is (`T` is the caller's).

mod cids;
mod flows;
mod quic;
mod quic_lb;
mod speakers;
mod train;
mod tuple;

pub use cids::Cids;
pub use flows::{Answer, Expiry, Flows, Full, Refusal, Tuning};
pub use quic::{CID_MAX, Cid, Header, ServerIdForm, ServerIds, source_cid};
pub use quic_lb::{CONFIGS, Cipher, NONCE_MIN, PLAINTEXT_MAX, ServerIdKeys};
pub use speakers::Speakers;
pub use train::{SEGMENTS_MAX, TRAIN_BYTES_MAX, Train};
pub use tuple::{Announced, Tuple};
