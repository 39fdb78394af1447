//! A proxy as a process tree: started on one processor, accounted for, and gone at the end whatever happens.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Signal};
use rustix::thread::CpuSet;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Every process of every tree that runs: the panic hook has nothing else to go by.
static RUNNING: Mutex<Vec<i32>> = Mutex::new(Vec::new());
/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_secs(5);

/// A process and its descendants. Dropping it kills them.
#[derive(Debug)]
pub struct ProcessTree {
    child: Child,
    /// The process itself first.
    pids: Vec<i32>,
    log: PathBuf,
}

/// Memory of a process tree, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Resident, shared pages counted in each process.
    pub rss: u64,
    /// Resident, shared pages divided among those that share them.
    pub pss: u64,
    /// Written to and not shared.
    pub private_dirty: u64,
}

impl ProcessTree {
    /// Starts `command` on these processors alone, with its output in `log`.
    pub fn spawn(command: &mut Command, cpus: &[usize], log: PathBuf) -> io::Result<Self> {
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut only = CpuSet::new();
        cpus.iter().for_each(|cpu| only.set(*cpu));
        // A child starts with the affinity of the thread that started it: no helper program is needed.
        let mine = rustix::thread::sched_getaffinity(None)?;
        rustix::thread::sched_setaffinity(None, &only)?;
        let child = command.spawn();
        rustix::thread::sched_setaffinity(None, &mine)?;
        let child = child?;
        let pids = vec![child.id() as i32];
        running(|all| all.extend(&pids));
        Ok(Self { child, pids, log })
    }

    /// Looks for descendants; call it once the process is ready.
    pub fn find_descendants(&mut self) -> io::Result<()> {
        let parents = parents()?;
        let mut tree = vec![self.child.id() as i32];
        let mut looked_at = 0;
        while let Some(&parent) = tree.get(looked_at) {
            tree.extend(parents.iter().filter(|(_, p)| **p == parent).map(|(pid, _)| *pid));
            looked_at += 1;
        }
        running(|all| all.extend(tree.iter().filter(|pid| !self.pids.contains(pid))));
        self.pids = tree;
        Ok(())
    }

    /// An error if the process has ended: with what it said.
    pub fn check(&mut self) -> io::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(io::Error::other(format!("it ended with {status}: {}", self.last_words()))),
        }
    }

    /// The end of its output.
    pub fn last_words(&self) -> String {
        let said = fs::read(&self.log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(5)..].join(" | ")
    }

    /// Processor time of all threads of all processes so far (`schedstat`: nanoseconds that the scheduler counted, and
    /// not ticks). io_uring's kernel threads are threads of their process and are in it.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        self.pids.iter().map(|pid| cpu_time_of(*pid)).sum()
    }

    /// How many threads have a name that begins so. The kernel's threads that work for a process are among its own.
    pub fn threads_named(&self, beginning: &str) -> io::Result<usize> {
        let mut count = 0;
        for pid in &self.pids {
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                // A thread may end between the listing and the look.
                let name = fs::read_to_string(task?.path().join("comm")).unwrap_or_default();
                count += usize::from(name.starts_with(beginning));
            }
        }
        Ok(count)
    }

    /// Processor time in user mode so far, in seconds, by the clock's ticks of 10 ms (`/proc/PID/stat`).
    pub fn user_seconds(&self) -> io::Result<f64> {
        let mut ticks = 0;
        for pid in &self.pids {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
            // pid (name) state …: the twelfth after the name.
            let rest = stat.rsplit(") ").next().unwrap_or_default();
            ticks += rest.split(' ').nth(11).and_then(|ticks| ticks.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(ticks as f64 / 100.0)
    }

    /// Memory now.
    pub fn memory(&self) -> io::Result<Memory> {
        let mut sum = Memory { rss: 0, pss: 0, private_dirty: 0 };
        for pid in &self.pids {
            let memory = memory_of(*pid)?;
            sum.rss += memory.rss;
            sum.pss += memory.pss;
            sum.private_dirty += memory.private_dirty;
        }
        Ok(sum)
    }

    /// Open descriptors now.
    pub fn descriptors(&self) -> io::Result<usize> {
        let count = |pid: &i32| fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count);
        self.pids.iter().map(count).sum()
    }

    fn kill(&mut self) {
        // Found again: a master may have replaced its worker.
        if self.find_descendants().is_err() {
            eprintln!("bench: /proc cannot be read; killing what was known");
        }
        // Parents first, or they would replace what is killed.
        for pid in &self.pids {
            kill_one(*pid);
        }
        let reaped = self.child.wait();
        let deadline = Instant::now() + GONE;
        let alive = |pid: &i32| Path::new(&format!("/proc/{pid}/stat")).exists();
        while self.pids.iter().any(alive) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        if reaped.is_err() || self.pids.iter().any(alive) {
            eprintln!("bench: a killed process of {:?} is still there", self.pids);
        }
        running(|all| all.retain(|pid| !self.pids.contains(pid)));
    }
}

impl Drop for ProcessTree {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Processor time of all threads of a process so far, as [`ProcessTree::cpu_time`].
pub fn cpu_time_of(pid: i32) -> io::Result<Duration> {
    let mut nanos = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the listing and the look: what it used is lost, and little.
        let Ok(line) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        nanos += nanos_on_cpu(&line)?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// Memory of a process now.
pub fn memory_of(pid: i32) -> io::Result<Memory> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    Ok(Memory {
        rss: field_bytes(&rollup, "Rss:")?,
        pss: field_bytes(&rollup, "Pss:")?,
        private_dirty: field_bytes(&rollup, "Private_Dirty:")?,
    })
}

/// Lets a panic kill what was started: release builds abort, and nothing is dropped then.
pub fn kill_all_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        if let Ok(all) = RUNNING.try_lock() {
            all.iter().for_each(|pid| kill_one(*pid));
        }
    }));
}

/// Lets SIGINT and SIGTERM kill what was started, and end this process: for commands that have nothing to say half-way.
pub fn kill_all_on_signal() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            running(|all| all.iter().for_each(|pid| kill_one(*pid)));
            eprintln!("bench: interrupted");
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

/// Lets this thread run on `cpu` alone.
pub fn pin_to(cpu: usize) -> io::Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &only)?)
}

/// Whether this process may run on `cpu`.
pub fn may_use(cpu: usize) -> io::Result<bool> {
    Ok(cpu < CpuSet::MAX_CPU && rustix::thread::sched_getaffinity(None)?.is_set(cpu))
}

/// Lets this process and its children open as many files as the system lets them: an idle flow takes two here, and two
/// in the proxy.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(rustix::process::setrlimit(Resource::Nofile, limit)?)
}

/// Busy time of one processor since the system started, whoever used it, in ticks of 10 ms (`/proc/stat`). Time that the host
/// took away (steal) counts as busy: it was not ours.
pub fn processor_busy(cpu: usize) -> io::Result<Duration> {
    let stat = fs::read_to_string("/proc/stat")?;
    let name = format!("cpu{cpu}");
    let line = stat.lines().find(|l| l.split_ascii_whitespace().next() == Some(&name));
    let line = line.ok_or_else(|| io::Error::other(format!("there is no processor {cpu}")))?;
    let ticks: Vec<u64> = line.split_ascii_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is in user.
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|place| ticks.get(*place)).sum();
    Ok(Duration::from_millis(busy * 10))
}

/// Processor time of the kernel's thread for soft interrupts of one processor. Where packets come faster than the one whom
/// they interrupt may be held up, the kernel moves their handling there, away from the account of whoever caused it.
/// Zero where that thread cannot be seen (a process namespace).
pub fn softirq_thread_time(cpu: usize) -> io::Result<Duration> {
    let name = format!("ksoftirqd/{cpu}");
    for entry in fs::read_dir("/proc")? {
        let folder = entry?.path();
        // Most of /proc is no process, and processes end.
        if fs::read_to_string(folder.join("comm")).is_ok_and(|comm| comm.trim_end() == name) {
            return nanos_on_cpu(&fs::read_to_string(folder.join("schedstat"))?).map(Duration::from_nanos);
        }
    }
    Ok(Duration::ZERO)
}

/// The first number of a `schedstat` file.
fn nanos_on_cpu(schedstat: &str) -> io::Result<u64> {
    let first = schedstat.split_ascii_whitespace().next().and_then(|number| number.parse().ok());
    first.ok_or_else(|| io::Error::other("schedstat has no number"))
}

fn running(change: impl FnOnce(&mut Vec<i32>)) {
    change(&mut RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
}

fn kill_one(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// The parent of every process.
fn parents() -> io::Result<BTreeMap<i32, i32>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // pid (name) state ppid …; the name may hold anything, also parentheses.
        let parent =
            stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)).and_then(|p| p.parse().ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    Ok(parents)
}

fn field_bytes(rollup: &str, name: &str) -> io::Result<u64> {
    let kilobytes = rollup
        .lines()
        .find_map(|l| l.strip_prefix(name))
        .and_then(|rest| rest.trim().strip_suffix("kB").and_then(|number| number.trim().parse::<u64>().ok()));
    kilobytes.map(|kb| kb * 1024).ok_or_else(|| io::Error::other(format!("smaps_rollup has no {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_accounted_for_and_killed_whole() {
        let log = std::env::temp_dir().join(format!("trimtab-bench-test-{}.log", std::process::id()));
        let script = "sh -c 'while :; do :; done' & echo started; wait";
        let cpu = (0..64).find(|c| rustix::thread::sched_getaffinity(None).unwrap().is_set(*c)).unwrap();
        let mut tree =
            ProcessTree::spawn(Command::new("sh").args(["-c", script]), &[cpu], log.clone()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while tree.pids.len() < 2 || tree.cpu_time().unwrap() < Duration::from_millis(20) {
            assert!(Instant::now() < deadline, "the child shell never burned: {tree:?}");
            tree.find_descendants().unwrap();
        }
        assert_eq!(tree.last_words(), "started");
        assert_eq!((tree.threads_named("sh").unwrap(), tree.threads_named("iou-wrk").unwrap()), (2, 0));
        let memory = tree.memory().unwrap();
        assert!(
            memory.rss > memory.pss && memory.pss > memory.private_dirty && memory.private_dirty > 0,
            "{memory:?}"
        );
        tree.check().unwrap();
        let pids = tree.pids.clone();
        drop(tree);
        assert!(pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()), "{pids:?} are left");
        fs::remove_file(log).unwrap();
    }

    #[test]
    fn a_process_that_ends_is_reported_with_its_last_words() {
        let log = std::env::temp_dir().join(format!("trimtab-bench-test2-{}.log", std::process::id()));
        let cpu = (0..64).find(|c| rustix::thread::sched_getaffinity(None).unwrap().is_set(*c)).unwrap();
        let mut tree = ProcessTree::spawn(
            Command::new("sh").args(["-c", "echo no such file; exit 3"]),
            &[cpu],
            log.clone(),
        )
        .unwrap();
        tree.child.wait().unwrap();
        let error = tree.check().unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("no such file"), "{error}");
        fs::remove_file(log).unwrap();
    }
}
