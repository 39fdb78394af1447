//! The `trimtab` command: what `main` chooses from, as a library so that tests can reach it.
#![forbid(unsafe_code)]

pub mod admin;
pub mod check;
pub mod cli;
pub mod config;
pub mod demo;
pub mod failure;
pub mod life;
pub mod logging;
pub mod output;
pub mod pki;
pub mod problem;
pub mod proxy;
pub mod publishing;
pub mod register;
pub mod serve;
pub mod sidecar;
pub mod signals;
pub mod transport;
pub mod units;
mod upstream;

/// This host's name, or `host` where the kernel does not say.
pub(crate) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "host".to_owned() } else { name.to_owned() }
}
