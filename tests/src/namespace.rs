//! A network of its own, where addresses can come and go.

use std::process::Command;

use crate::{PATIENCE, Process};

/// A network namespace with nothing but loopback in it. It goes with its last process.
#[derive(Debug)]
pub struct Namespace {
    holder: Process,
}

impl Namespace {
    /// Makes one.
    ///
    /// # Panics
    /// When the kernel does not allow it: that takes root.
    #[track_caller]
    pub fn new() -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--"]);
        command.args(["sh", "-c", "ip link set lo up && echo ready && exec sleep infinity"]);
        let mut holder = Process::start("network namespace", &mut command);
        holder.wait_for_line(PATIENCE, |line| (line == "ready").then_some(()));
        Self { holder }
    }

    /// A command that runs there, and ends when the thread that starts it does.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--net", "--"]);
        command.args(["setpriv", "--pdeathsig", "KILL", "--", program]);
        command
    }

    /// Runs `ip ARGUMENTS` there.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ip(&self, arguments: &[&str]) {
        let status = self.command("ip").args(arguments).status().expect("iproute2 is installed");
        assert!(status.success(), "ip {arguments:?}: {status}");
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}
