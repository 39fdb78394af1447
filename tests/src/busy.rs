//! Making the host of a resource busy: for real, in a cgroup, or by the agent's test hook.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Process;
use crate::postgres::is_root;

const MOUNT: &str = "/sys/fs/cgroup";
/// By version: no more than one CPU; and that, whatever else runs here.
const CPU_SETTINGS: [(&str, &str); 4] = [
    ("cpu.max", "100000 100000"),
    ("cpu.weight", "10000"),
    ("cpu.cfs_quota_us", "100000"),
    ("cpu.shares", "100000"),
];
/// How long a group's last processes may take to leave it.
const LEAVE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// Writes what an agent shall say of its host's CPU, and that nothing else is scarce: this machine may be short of
/// anything while tests run. In one step: the agent never reads half of it.
///
/// # Panics
/// When the file cannot be written.
#[track_caller]
pub fn write_utilization(file: &Path, cpu: f64) {
    let calm = r#"{"pressure_cpu": 0, "pressure_memory": 0, "pressure_io": 0, "swap": 0}"#;
    write_whole(file, &format!(r#"{{"cpu": {cpu}, "memory": 0.2, "utilization": {calm}}}"#));
}

/// Writes a file in one step: nobody ever reads half of it.
///
/// # Panics
/// When the file cannot be written.
#[track_caller]
pub fn write_whole(file: &Path, text: &str) {
    let new = file.with_extension("new");
    fs::write(&new, text).expect("a file in our own folder");
    fs::rename(&new, file).expect("a file in our own folder");
}

/// A control group of one CPU, of whichever version this host has. It goes when this is dropped.
#[derive(Debug)]
pub struct Cgroup {
    path: String,
    /// One in each hierarchy.
    folders: Vec<PathBuf>,
    burner: Option<Process>,
}

impl Cgroup {
    /// Makes one.
    ///
    /// # Panics
    /// When that is not allowed here: it needs root and a writable `/sys/fs/cgroup`.
    #[track_caller]
    pub fn new(name: &str) -> Self {
        assert!(is_root(), "this test makes control groups: run it as root (in a container: --privileged)");
        let path = format!("/trimtab-e2e-{}-{name}", std::process::id());
        let unified = Path::new(MOUNT).join("cgroup.controllers").exists();
        let hierarchies: &[&str] = if unified { &[""] } else { &["cpu", "cpuacct"] };
        let mut group = Self { path, folders: Vec::new(), burner: None };
        for hierarchy in hierarchies {
            let folder = Path::new(MOUNT).join(hierarchy).join(&group.path[1..]);
            fs::create_dir(&folder).unwrap_or_else(|error| {
                panic!(
                    "cannot make a control group: {}: {error}\n\
                     this test needs a writable cgroup v2, or v1 with cpu and cpuacct",
                    folder.display()
                )
            });
            group.folders.push(folder);
        }
        group.give_one_cpu();
        group
    }

    /// Its path, as `trimtab agent --cgroup` takes it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Moves a process into it; the children it starts from now on are born there.
    ///
    /// # Panics
    /// When the kernel refuses.
    #[track_caller]
    pub fn add(&self, pid: u32) {
        for folder in &self.folders {
            let file = folder.join("cgroup.procs");
            fs::write(&file, pid.to_string()).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        }
    }

    /// Burns all the CPU it may have.
    #[track_caller]
    pub fn burn(&mut self) {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "sh", "-c", "while :; do :; done"]);
        let burner = Process::start("burner", &mut command);
        self.add(burner.id());
        self.burner = Some(burner);
    }

    /// Ends that.
    pub fn rest(&mut self) {
        self.burner = None;
    }

    /// The burner takes all of that, and no more of the machine. Where the controller is not handed down (v2) the group
    /// may use the whole machine, and the burner takes one CPU of it.
    fn give_one_cpu(&self) {
        for folder in &self.folders {
            for (file, text) in CPU_SETTINGS {
                let file = folder.join(file);
                if file.exists() {
                    fs::write(&file, text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
                }
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.rest();
        for folder in &self.folders {
            let deadline = std::time::Instant::now() + LEAVE_PATIENCE;
            while fs::remove_dir(folder).is_err() && std::time::Instant::now() < deadline {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}
