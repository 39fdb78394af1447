//! `cargo xtask`: what needs code to check or to install in this workspace.
#![forbid(unsafe_code)]

mod edges;
mod fuzz;
mod install;
mod metadata;
mod test;

use std::env;
use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask <command>

  test [step…]      everything that must pass before a change is taken: installs what is missing, then format,
                    lints, dependency edges, tests, doc tests, release build, end-to-end tests.
                    With steps named, only those: install format lints edges tests doctests fuzz build e2e
  install [group…]  missing Debian packages of the groups `test` (the default) and `bench`
  edges             which crate may import which
  fuzz [target] [--seconds N]
                    libFuzzer over one target or all, a minute each if nothing else is said
";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let rest = arguments.get(1..).unwrap_or_default();
    let result = match arguments.first().map(String::as_str) {
        Some("test") => test::run(rest),
        Some("install") => install::run(rest),
        Some("edges") => edges::run(),
        Some("fuzz") => fuzz::run(rest),
        Some("help" | "--help" | "-h") => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{USAGE}");
            // EX_USAGE of sysexits.h.
            return ExitCode::from(64);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
