//! What the end-to-end tests are made of: the release binary, PostgreSQL, agents, clients, and what they measured.
//!
//! Each test starts what it needs and ends it, also when it panics: every fixture ends its processes and removes its
//! folder when it is dropped, and every process ends by itself when this one is killed. Nothing here sleeps in the hope
//! that something has happened by then: [`until`] waits for a condition, and says what it waited for when it gives up.
//!
//! The scenarios are in `tests/tests`, one file for each group. They need PostgreSQL 15, promtool and Docker's engine (`cargo
//! xtask install` brings them), and `cargo build --release -p trimtab`. What is missing fails the test and says so.
#![forbid(unsafe_code)]

mod address;
mod busy;
mod dns;
mod docker;
mod http;
mod lab;
mod metrics;
mod namespace;
mod pattern;
mod pki;
mod postgres;
mod process;
mod sandbox;
mod servers;
mod service;
mod sources;
mod sql;
mod srv;
mod tcp;
mod trimtab;
mod wait;

pub use address::loopback;
pub use busy::{Cgroup, write_utilization, write_whole};
pub use dns::{DnsKind, DnsServer, ZONE, dig, dnsperf, section as dns_section};
pub use docker::{Docker, IMAGE, IMAGE_PORT};
pub use http::{HttpAnswer, get};
pub use lab::{Lab, Member, POOL};
pub use metrics::Metrics;
pub use namespace::Namespace;
pub use pattern::{check_stream, fill_block, first_wrong, send_stream};
pub use pki::Pki;
pub use postgres::{PgBench, Postgres};
pub use process::{Descriptors, Ended, Process, descriptors, resident_bytes, settled_descriptors};
pub use sandbox::Sandbox;
pub use servers::Server;
pub use service::{Asked, Clients, Manners, Service, ask, ask_from, converse, greet};
pub use sources::{Exporter, MariaDb, PythonOrca, Text, read_head, wheel};
pub use sql::{Attempt, Load, Psql, SqlClient, SqlError};
pub use srv::{SrvClients, SrvSeen, ask_srv};
pub use tcp::{Backend, connect, connect_from, is_reset, listen, reset};
pub use trimtab::{Balancer, BalancerConfig, Proxy, binary, trimtab, trimtab_command};
pub use wait::{PATIENCE, until, within};
