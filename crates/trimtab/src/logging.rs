//! The log goes to stderr; stdout is for what scripts read.

use std::io::IsTerminal as _;

use tracing_subscriber::filter::{LevelFilter, Targets};
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
    let levels = quieted(levels);
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let to_stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colour);
    tracing_subscriber::registry().with(to_stderr).with(levels).init();
    Ok(())
}

/// Libraries that say for each DNS query what we say once. Whoever names one in the filter hears it.
const CHATTY: [&str; 3] = ["hickory_net", "hickory_resolver", "hickory_server"];

fn quieted(levels: Targets) -> Targets {
    let named: Vec<String> = levels.iter().map(|(target, _)| target.to_owned()).collect();
    let chatty = CHATTY.into_iter().filter(|chatty| !named.iter().any(|named| named.starts_with(chatty)));
    levels.with_targets(chatty.map(|target| (target, LevelFilter::ERROR)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn libraries_are_quiet_unless_they_are_named() {
        let levels = quieted("debug".parse().unwrap());
        assert!(levels.would_enable("discovery::publish", &Level::DEBUG));
        assert!(!levels.would_enable("hickory_server::server", &Level::WARN));
        let levels = quieted("info,hickory_server=debug".parse().unwrap());
        assert!(levels.would_enable("hickory_server::server", &Level::DEBUG));
        assert!(!levels.would_enable("hickory_resolver", &Level::INFO));
    }
}
