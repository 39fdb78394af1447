//! `trimtab check`: is this file a configuration?

use std::path::Path;

use crate::cli::CheckArgs;
use crate::config::Config;
use crate::failure::{Failure, read_file};
use crate::output::print;

/// Says that a file is fine, or everything that is wrong with it.
///
/// # Errors
/// When it cannot be read, or is wrong.
pub fn run(args: &CheckArgs) -> Result<(), Failure> {
    let config = load(&args.config)?;
    let count = |count: usize, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
    print(&format!(
        "{}: ok ({}, {})\n",
        args.config.display(),
        count(config.listeners.len(), "listener"),
        count(config.pools.len(), "pool")
    ))
}

/// Reads and parses a configuration file.
///
/// # Errors
/// When it cannot be read, or is wrong.
pub fn load(file: &Path) -> Result<Config, Failure> {
    let bytes = read_file(file)?;
    Config::parse(&bytes).map_err(|errors| Failure::Config { file: file.to_owned(), errors })
}
