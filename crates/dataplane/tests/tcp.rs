//! The conformance suite of TCP flows, once for every engine.
//!
//! `cargo test -p trimtab-dataplane --test tcp epoll::` runs one engine's.
#![allow(clippy::duplicate_mod, reason = "one suite, and each of its copies runs another engine")]

mod common;

#[path = "conformance/tcp.rs"]
mod epoll;
#[path = "conformance/tcp.rs"]
mod tokio_uring;
#[path = "conformance/tcp.rs"]
mod uring;
