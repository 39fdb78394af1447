//! The dataplane: moves the bytes of flows between clients and backends.
//!
//! One [`Worker`](worker) thread and [`Engine`] for each core, each with its own `SO_REUSEPORT` listening sockets; nothing
//! is shared on a byte's path. A worker's loop has four steps, one system call a turn (with the engine `uring`):
//!
//! ```text
//! reap    take the completions of the last enter
//! step    each completion -> flow::Input -> flow::Output -> queued submissions
//! select  (within step) a backend for each new flow, from one table per batch
//! submit  io_uring_enter: hand over what is queued, sleep until a completion or the next deadline
//! ```
//!
//! Owns: sockets, rings, buffers, timers, counters. Does not own: who is in a pool and with which weight
//! ([`allocation::AllocationTable`], read), when a half closes (`flow`), how the ring works (`uring`).
//!
//! ```no_run
//! # use allocation::{AllocationTable, Policy, Publisher};
//! let table = Publisher::new(AllocationTable::empty(Policy::Adaptive));
//! let (bind, pool) = ("127.0.0.1:5432".parse().unwrap(), "sql".parse().unwrap());
//! let listener = dataplane::ListenerConfig::new(bind, pool, table);
//! let bound = dataplane::bind(dataplane::Config::new(vec![listener])).unwrap();
//! let running = bound.start().unwrap();
//! running.drain(std::time::Duration::from_secs(30));
//! running.join().unwrap();
//! ```
#![forbid(unsafe_code)]

mod access;
mod clock;
mod config;
mod decisions;
mod engine;
mod io;
mod listen;
mod pipes;
mod run;
mod share;
mod slots;
mod stats;
mod tcp;
mod towards;
mod worker;

pub use access::{AccessLogConfig, AccessLogFormat, AccessLogTo};
pub use config::{
    CONFIGS, Cipher, Config, Connecting, Limits, ListenerConfig, ListenerLimits, NONCE_MIN, PLAINTEXT_MAX,
    Protocol, ProxyHeader, ProxyProtocol, ServerIdForm, ServerIdKeys, Target, Timeouts, UdpConfig, aes128,
};
pub use engine::{Engine, ProbeError};
pub use run::{Bound, Dataplane, StartError, WorkerFailed, bind};
pub use share::{PoolKnobs, PoolShare, QueueKnobs};
pub use tcp::{KeepaliveOptions, Knob, ListenerTcp, Refused, TcpOptions};
