//! The conformance suite of flows of datagrams, once for every engine.
//!
//! `cargo test -p trimtab-dataplane --test udp epoll::` runs one engine's.
#![allow(clippy::duplicate_mod, reason = "one suite, and each of its copies runs another engine")]

mod common;

#[path = "conformance/udp.rs"]
mod epoll;
#[path = "conformance/udp.rs"]
mod tokio_uring;
#[path = "conformance/udp.rs"]
mod uring;
