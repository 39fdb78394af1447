//! A real cgroup with a real quota, kept busy. Needs leave to make cgroups (root, as a rule); without it there is
//! nothing to see, and the test says so.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use agent::utilization::{MeterSource, Roots, Snapshot, Source, Utilization};

const DEADLINE: Duration = Duration::from_secs(20);

/// A group of its own, with a quota of half a CPU; removed at the end.
struct Group {
    folders: Vec<PathBuf>,
    name: String,
    burner: Option<Child>,
}

impl Group {
    fn make(root: &Path) -> io::Result<Self> {
        let name = format!("trimtab-test-{}", std::process::id());
        let mut group = Self { folders: Vec::new(), name, burner: None };
        // Version 1 has a folder for each controller, or one for both; version 2 one for all.
        let mounts = ["cpu", "cpuacct"].map(|mount| root.join(mount));
        let mounts = if mounts.iter().all(|m| m.exists()) { mounts.to_vec() } else { vec![root.to_owned()] };
        for mount in mounts {
            let folder = mount.join(&group.name);
            fs::create_dir(&folder)?;
            group.folders.push(folder);
        }
        fs::write(group.folders[0].join("cpu.cfs_quota_us"), "50000")
            .or_else(|_| fs::write(group.folders[0].join("cpu.max"), "50000 100000"))?;
        Ok(group)
    }

    /// One process in it that does nothing but work.
    fn burn(&mut self) {
        let script = "read go; while :; do :; done";
        let stdin = std::process::Stdio::piped();
        let mut child = Command::new("sh").args(["-c", script]).stdin(stdin).spawn().unwrap();
        for folder in &self.folders {
            fs::write(folder.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        drop(child.stdin.take());
        self.burner = Some(child);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(mut burner) = self.burner.take() {
            burner.kill().ok();
            burner.wait().ok();
        }
        for folder in &self.folders {
            // The kernel lets go of a group a moment after its last process.
            let deadline = Instant::now() + DEADLINE;
            while fs::remove_dir(folder).is_err() && Instant::now() < deadline {
                std::thread::yield_now();
            }
        }
    }
}

#[test]
fn a_cgroup_that_uses_up_its_quota_is_fully_utilized() {
    let roots = Roots::default();
    let mut group = match Group::make(&roots.cgroup) {
        Ok(group) => group,
        // Without root, or in a container, nobody may; whatever else is wrong must be seen.
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
            eprintln!("no leave to make a cgroup with a quota here: not checked ({error})");
            return;
        }
        Err(error) => panic!("cannot make a cgroup with a quota: {error}"),
    };
    let source = MeterSource::find(&Source::Cgroup(format!("/{}", group.name).into()), &roots).unwrap();
    let start = Instant::now();
    let idle = Snapshot::read(&source, &roots);
    group.burn();
    // Over half a second at least: five periods of its quota.
    let deadline = start + DEADLINE;
    loop {
        let elapsed = start.elapsed();
        let now = Snapshot::read(&source, &roots);
        let cpu = Utilization::between(&idle, &now, elapsed, None).cpu.unwrap();
        // Each period's quota may be used up at its start: over a part of one, a group uses up to a whole CPU, and
        // over half a second the quotas of the six periods it touches, where it is entitled to five.
        if elapsed > Duration::from_millis(500) {
            assert!(cpu < 1.5, "more than its quota: {cpu} over {elapsed:?}");
            if cpu > 0.7 {
                return;
            }
        }
        assert!(Instant::now() < deadline, "a loop in half a CPU uses {cpu} of it");
        std::thread::sleep(Duration::from_millis(20));
    }
}
