//! Control over real connections on loopback. One binary: linking tonic once is enough.
#![forbid(unsafe_code)]

mod allocation;
mod checking;
mod harness;
mod keeper;
mod notices;
mod operation;
mod provider;
mod registration;
