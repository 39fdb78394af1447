//! A network of its own for the whole command: other ports, other limits, and nobody else's connections.

use std::process::Command;

use anyhow::{Context, ensure};

/// Runs this command again, with the same arguments, where only loopback is; gives whether it succeeded.
pub(super) fn run_again_inside() -> anyhow::Result<bool> {
    let program = std::env::current_exe().context("a running program has a path")?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--"]);
    command.args(["sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]);
    command.arg(program).args(std::env::args_os().skip(1)).arg("--in-namespace");
    let status = command.status().context("setpriv and unshare of util-linux are needed, and root")?;
    // What went wrong, it has said itself.
    ensure!(status.code().is_some(), "killed: {status}");
    Ok(status.success())
}

/// Sets a variable of this network.
pub(super) fn set(variable: &str, value: &str) -> anyhow::Result<()> {
    std::fs::write(format!("/proc/sys/{}", variable.replace('.', "/")), value)
        .with_context(|| format!("setting {variable} to {value}"))
}

/// Runs `ip ARGUMENTS` in this network.
pub(super) fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let status = Command::new("ip").args(arguments).status().context("iproute2 is needed")?;
    ensure!(status.success(), "ip {}: {status}", arguments.join(" "));
    Ok(())
}
