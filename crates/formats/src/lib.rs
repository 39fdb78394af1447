//! The forms in which utilization comes from elsewhere, and goes elsewhere: text in, values out, and back.
//!
//! * It owns our JSON document ([`Document`]), Prometheus' text format ([`prometheus`]), what makes a document of it
//!   ([`Mapping`], with built-in recipes), HAProxy's agent-check line ([`agent_check`]), and notices as JSON ([`notice`]). It does not own how a text was
//!   had, a clock, or what a balancer makes of a value.
//! * Every text here may be a stranger's: it is bounded in size and count, and what is wrong with it is an error that says
//!   where and what would do, never a panic.
#![forbid(unsafe_code)]

pub mod agent_check;
mod document;
mod exposition;
mod expression;
mod mapping;
pub mod notice;
pub mod prometheus;
mod recipes;

pub use document::{Document, DocumentError, ENTRIES_MAX};
pub use exposition::Exposition;
pub use mapping::{MAPPING_BYTES_MAX, Mapping, MappingError, PageError, Past};
pub use recipes::{RECIPES, recipe};

/// Largest text that is taken from anybody, in bytes.
pub const TEXT_BYTES_MAX: usize = 64 * 1024;
