//! The conformance suite of what comes before a flow's bytes, once for every engine.
#![allow(clippy::duplicate_mod, reason = "one suite, and each of its copies runs another engine")]

mod common;

#[path = "conformance/preface.rs"]
mod epoll;
#[path = "conformance/preface.rs"]
mod tokio_uring;
#[path = "conformance/preface.rs"]
mod uring;
