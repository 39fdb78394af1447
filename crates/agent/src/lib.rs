//! trimtab's sidecar: it stands beside a service, registers it with one or more balancers, reports how busy its host or
//! cgroup is, and deregisters it at the end.
//!
//! Owns: reading utilization ([`utilization`]), and an agent's life ([`Agent`]): waiting for its own service, trying
//! again, reporting, answering probes, taking the service's own numbers and serving all of them to others, taking leave. Does not own: the command line, signals, and what a balancer makes of a report.
//!
//! ```no_run
//! # async fn example() -> Result<(), agent::AgentError> {
//! let resource = api::v1::Resource {
//!     id: "pg1".into(),
//!     pool: "sql".into(),
//!     address: "10.0.0.1:5432".into(),
//!     ..Default::default()
//! };
//! let balancers = vec!["http://10.0.0.9:7400".parse().expect("a URI")];
//! let shutdown = async { drop(tokio::signal::ctrl_c().await) };
//! agent::run(agent::AgentConfig::new(balancers, resource), shutdown).await
//! # }
//! ```
#![forbid(unsafe_code)]

mod agent;
mod backoff;
mod balancers;
mod command;
mod config;
mod connections;
mod discover;
mod file;
mod life;
mod meter;
mod notices;
mod probe;
mod said;
mod serve;
mod service;
mod session;
mod sources;
mod supply;
pub mod transport;
pub mod utilization;

pub use crate::agent::{Agent, AgentState, run};
pub use crate::config::{AgentConfig, AgentError, Retry, ServiceCheck};
pub use crate::serve::ServeConfig;
pub use crate::sources::NumberSource;
pub use crate::supply::Supplied;
pub use crate::transport::{Token, TokenSource, Transport};
pub use crate::utilization::{Roots, Source};
