//! `cargo xtask fuzz`: libFuzzer over the targets of `fuzz/`, on the stable toolchain.
//!
//! The coverage counters are the compiler's own pass; the sanitizers would need a nightly one, and what they find is
//! excluded here by `forbid(unsafe_code)` in what is fuzzed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::metadata::root;

/// In `fuzz/Cargo.toml` as well.
const TARGETS: [&str; 6] = ["flow", "proxy", "hello", "preface", "quic", "datagrams"];
/// Of a run by hand, for each target.
const SECONDS: u64 = 60;
/// Of a step of `cargo xtask test`.
const SMOKE_SECONDS: u64 = 3;
/// Longest input. What is read is bounded far below.
const INPUT_MAX: usize = 8_192;

const COVERAGE: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1";

/// `cargo xtask fuzz [TARGET] [--seconds N]`.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let mut seconds = SECONDS;
    let mut targets = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--seconds" => {
                let value = rest.next().context("--seconds needs a number")?;
                seconds = value.parse().with_context(|| format!("{value} is not a number of seconds"))?;
            }
            target if TARGETS.contains(&target) => targets.push(target),
            other => bail!("there is no target {other}; there are: {}", TARGETS.join(" ")),
        }
    }
    if targets.is_empty() {
        targets.extend(TARGETS);
    }
    build()?;
    targets.iter().try_for_each(|target| fuzz(target, seconds, None))
}

/// A little of each, the same each time.
pub(crate) fn smoke() -> Result<()> {
    build()?;
    TARGETS.iter().try_for_each(|target| fuzz(target, SMOKE_SECONDS, Some(1)))
}

fn folder() -> PathBuf {
    root().join("fuzz")
}

fn target_folder() -> PathBuf {
    root().join("target/fuzz")
}

/// For a named platform, so that the counters are not in build scripts, which have nobody to count for.
fn host() -> Result<String> {
    let said = Command::new("rustc").arg("-vV").output().context("cannot run rustc")?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say its host")?.to_owned())
}

fn build() -> Result<()> {
    let mut cargo = crate::metadata::cargo();
    cargo.args(["build", "--release", "--bins", "--locked", "--target", &host()?]);
    cargo.current_dir(folder()).env("RUSTFLAGS", COVERAGE).env("CARGO_TARGET_DIR", target_folder());
    succeed(&mut cargo, "the build of the targets")
}

fn fuzz(target: &str, seconds: u64, seed: Option<u64>) -> Result<()> {
    let (kept, artifacts) = (folder().join("corpus").join(target), folder().join("artifacts").join(target));
    // New inputs go to the first folder: what is in the tree stays as it is.
    let found = target_folder().join("corpus").join(target);
    for folder in [&kept, &artifacts, &found] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let mut command = Command::new(target_folder().join(host()?).join("release").join(target));
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={INPUT_MAX}"));
    command.args(["-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1", "-verbosity=0"]);
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    match seed {
        Some(seed) => {
            command.arg(format!("-seed={seed}"));
            // Nothing of other runs: the same each time.
            let scratch = target_folder().join("smoke").join(target);
            let _ = fs::remove_dir_all(&scratch);
            fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
            command.arg(scratch);
        }
        None => {
            command.arg(found);
        }
    }
    command.arg(kept);
    println!("$ fuzz {target} for {seconds} s");
    let hint = format!("target {target}; its input is in {}", artifacts.display());
    succeed(&mut command, &hint)
}

fn succeed(command: &mut Command, what: &str) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    if status.success() { Ok(()) } else { bail!("{what} failed with {status}") }
}
