//! `cargo xtask test`: everything that must pass, one step after the other, until the first that does not.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::metadata::{Metadata, cargo, root};
use crate::{edges, fuzz, install};

/// One thing that must pass.
struct Step {
    name: &'static str,
    what: &'static str,
    run: fn() -> Result<()>,
}

const STEPS: &[Step] = &[
    Step { name: "install", what: "servers and tools that the tests need", run: || install::run(&[]) },
    Step { name: "format", what: "rustfmt", run: || run_cargo(&["fmt", "--all", "--check"]) },
    Step {
        name: "lints",
        what: "clippy, warnings are errors",
        run: || run_cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    },
    Step { name: "edges", what: "which crate may import which", run: edges::run },
    Step { name: "tests", what: "unit, property, simulation and integration tests", run: tests },
    Step {
        name: "doctests",
        what: "examples in the documentation",
        run: || run_cargo(&["test", "--doc", "--workspace", "--quiet"]),
    },
    Step { name: "fuzz", what: "each fuzz target for a few seconds", run: fuzz::smoke },
    Step {
        name: "build",
        what: "the release binary",
        run: || run_cargo(&["build", "--release", "--package", "trimtab"]),
    },
    Step { name: "e2e", what: "the release binary against real servers", run: end_to_end },
];

/// Runs the steps that are named, or all.
pub(crate) fn run(names: &[String]) -> Result<()> {
    for name in names {
        if !STEPS.iter().any(|step| step.name == name) {
            let known: Vec<&str> = STEPS.iter().map(|step| step.name).collect();
            bail!("there is no step {name}; there are: {}", known.join(" "));
        }
    }
    let chosen: Vec<&Step> =
        STEPS.iter().filter(|step| names.is_empty() || names.iter().any(|name| name == step.name)).collect();
    let start = Instant::now();
    for (index, step) in chosen.iter().enumerate() {
        println!("\n== {}/{} {}: {}", index + 1, chosen.len(), step.name, step.what);
        let step_start = Instant::now();
        (step.run)().with_context(|| format!("step `{}` failed (again: cargo xtask test {0})", step.name))?;
        println!("== {} took {:.1} s", step.name, step_start.elapsed().as_secs_f64());
    }
    println!("\n== all {} steps passed in {:.0} s", chosen.len(), start.elapsed().as_secs_f64());
    Ok(())
}

fn tests() -> Result<()> {
    if has_nextest() {
        run_cargo(&["nextest", "run", "--no-fail-fast", "--workspace", "--exclude", "e2e"])
    } else {
        run_cargo(&["test", "--no-fail-fast", "--workspace", "--exclude", "e2e", "--all-targets"])
    }
}

/// One test at a time: each starts servers of its own and measures time.
fn end_to_end() -> Result<()> {
    let binary = Metadata::read()?.target_folder.join("release/trimtab");
    let mut command = cargo();
    if has_nextest() {
        command.args(["nextest", "run", "--no-fail-fast", "--package", "e2e", "--test-threads", "1"]);
    } else {
        command.args(["test", "--no-fail-fast", "--package", "e2e", "--", "--test-threads=1"]);
    }
    // A binary that was named before stays: a packaged one can be tested.
    if std::env::var_os("TRIMTAB_BIN").is_none() {
        command.env("TRIMTAB_BIN", binary);
    }
    succeed(&mut command)
}

fn has_nextest() -> bool {
    let version = cargo().args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

fn run_cargo(arguments: &[&str]) -> Result<()> {
    succeed(cargo().args(arguments))
}

fn succeed(command: &mut Command) -> Result<()> {
    let arguments: Vec<String> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let shown = format!("cargo {}", arguments.join(" "));
    println!("$ {shown}");
    let status = command.current_dir(root()).status().with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}
