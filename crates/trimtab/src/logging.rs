//! The log goes to stderr; stdout is for what scripts read.

use std::io::IsTerminal as _;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::failure::Failure;
use crate::problem::Problem;

/// Starts logging what `levels` lets through. `Targets` rather than `EnvFilter`: it knows levels and modules, which is
/// enough, and does not bring a regular expression engine into every process.
///
/// # Errors
/// When `levels` is not a filter.
pub fn start(levels: &str) -> Result<(), Failure> {
    let levels: Targets = levels.parse().map_err(|_| {
        Failure::Usage(Problem::new(
            format!("{levels:?} is not a log level"),
            "write error, warn, info, debug or trace in --log-level or RUST_LOG, or `info,dataplane=debug`",
        ))
    })?;
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let to_stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colour);
    tracing_subscriber::registry().with(to_stderr).with(levels).init();
    Ok(())
}
