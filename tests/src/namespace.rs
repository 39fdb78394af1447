//! A network of its own, where addresses can come and go.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

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

    /// Runs a line of a shell there.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn shell(&self, line: &str) {
        let status = self.command("sh").args(["-ec", line]).status().expect("a shell");
        assert!(status.success(), "{line}: {status}");
    }

    /// Runs a function there, on a thread of its own. Its sockets stay there, and so do threads that it starts.
    ///
    /// # Panics
    /// As it does.
    #[track_caller]
    pub fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        let network = File::open(format!("/proc/{}/ns/net", self.holder.id())).expect("the holder lives");
        let enter_and_run = || {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).expect("root may");
            run()
        };
        let ended = std::thread::scope(|scope| scope.spawn(enter_and_run).join());
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Joins it with another by a wire, which has this name here and that one there. Both ends are up.
    ///
    /// # Panics
    /// When the kernel has no veth.
    #[track_caller]
    pub fn wire(&self, here: &str, other: &Self, there: &str) {
        let holder = other.holder.id().to_string();
        self.ip(&["link", "add", here, "type", "veth", "peer", "name", there, "netns", &holder]);
        self.ip(&["link", "set", here, "up"]);
        other.ip(&["link", "set", there, "up"]);
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}
