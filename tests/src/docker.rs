//! A real Docker Engine, in namespaces of its own.
//!
//! A first process holds the process, mount and network namespaces; when it ends, the kernel ends the engine, containerd,
//! every container and every mount and interface with it, also when this process is killed. What no namespace holds are
//! empty control groups, and the folder: those of runs that were killed are removed by the next one.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tempfile::TempDir;

use crate::{Ended, PATIENCE, Process, until, within};

/// What folders and control groups of this fixture begin with; the id of the process that made them follows.
const PREFIX: &str = "trimtab-e2e-docker-";
/// Where control groups are, of both versions.
const CGROUPS: &str = "/sys/fs/cgroup";
/// The one image: busybox, and a service that says its host's name and then each byte back.
pub const IMAGE: &str = "greeter:e2e";
/// Where that service listens in its container.
pub const IMAGE_PORT: u16 = 8080;

/// Engines that this process has started.
static ENGINES: AtomicU8 = AtomicU8::new(0);

/// A running engine with [`IMAGE`] in it.
#[derive(Debug)]
pub struct Docker {
    /// Its further arguments.
    arguments: Vec<String>,
    engine: Mutex<Option<Process>>,
    namespaces: Process,
    /// The first process in the namespaces, as we see it.
    first: u32,
    network: File,
    cgroup: String,
    folder: TempDir,
}

impl Docker {
    /// Starts an engine with these further arguments; `greeter` is the image's service.
    ///
    /// # Panics
    /// When it does not start: it needs root, and Debian's docker.io and busybox-static.
    #[track_caller]
    pub fn start(greeter: &str, arguments: &[&str]) -> Self {
        remove_leftovers();
        let name = format!("{PREFIX}{}-{}", std::process::id(), ENGINES.fetch_add(1, Relaxed));
        let folder =
            tempfile::Builder::new().prefix(&format!("{name}-")).tempdir().expect("a temporary folder");
        // Whatever has a fixed place below /run is the namespaces' own.
        let script =
            "mount -t tmpfs tmpfs /run && ip link set lo up && echo ready && exec tini -s -- sleep infinity";
        let mut namespaces = Process::start(
            "namespaces",
            Command::new("setpriv")
                .args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--net", "--pid"])
                .args(["--fork", "--kill-child=KILL", "--mount-proc", "sh", "-c", script]),
        );
        namespaces.wait_for_line(PATIENCE, |line| (line == "ready").then_some(()));
        let first = crate::process::children(namespaces.id())[0];
        let network = File::open(format!("/proc/{first}/ns/net")).expect("its network namespace");
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let docker =
            Self { arguments, engine: Mutex::default(), namespaces, first, network, cgroup: name, folder };
        docker.start_engine();
        docker.import_image(greeter);
        docker
    }

    /// Starts the engine, which must not run, and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn start_engine(&self) {
        let mut engine = self.engine.lock().expect("no holder panics");
        assert!(engine.is_none(), "the engine runs");
        let folder = self.folder.path().display();
        let mut command = self.within_namespaces();
        command.arg("dockerd").args([
            &format!("--data-root={folder}/data"),
            &format!("--exec-root={folder}/exec"),
            &format!("--pidfile={folder}/pid"),
            &format!("--host=unix://{folder}/docker.sock"),
            &format!("--cgroup-parent=/{}", self.cgroup),
            // Nothing is to be translated: whoever connects is on the engine's own network.
            "--iptables=false",
            "--ip6tables=false",
            "--ip-masq=false",
            "--userland-proxy=false",
            "--storage-driver=vfs",
        ]);
        *engine = Some(Process::start("dockerd", command.args(&self.arguments)));
        until("the engine answers", || (self.ask(&["version"]).code == Some(0)).then_some(()));
    }

    /// `kill -9` of the engine; containers run on where it was started with `--live-restore`.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn kill_engine(&self) {
        let file = self.folder.path().join("pid");
        let pid = fs::read_to_string(&file).expect("a running engine has a pid file");
        self.kill_within(pid.trim());
        let mut engine = self.engine.lock().expect("no holder panics").take().expect("the engine runs");
        engine.wait(PATIENCE);
        // It would take another process with that id for itself.
        fs::remove_file(file).expect("our own file");
    }

    /// `kill -9` of a container's process, behind the engine's back.
    ///
    /// # Panics
    /// When there is no such container.
    #[track_caller]
    pub fn kill_process_of(&self, container: &str) {
        let pid = self.run(&format!("inspect --format {{{{.State.Pid}}}} {container}"));
        self.kill_within(pid.trim());
    }

    /// Kills by an id within the namespace, and waits until it is gone: a signal is sent sooner than it works.
    #[track_caller]
    fn kill_within(&self, pid: &str) {
        let kill = |signal: &str| {
            let mut command = self.within_namespaces();
            let killed = command.args(["busybox", "kill", signal, pid]).stderr(Stdio::null()).status();
            killed.expect("nsenter is installed").success()
        };
        assert!(kill("-9"), "there is no process {pid}");
        until(&format!("process {pid} is gone"), || (!kill("-0")).then_some(()));
    }

    /// What `provider.endpoint` takes.
    pub fn endpoint(&self) -> String {
        format!("unix://{}/docker.sock", self.folder.path().display())
    }

    /// Runs `docker` with these words, which must succeed; gives what it printed.
    ///
    /// # Panics
    /// When it does not succeed.
    #[track_caller]
    pub fn run(&self, words: &str) -> String {
        self.run_with(&words.split_ascii_whitespace().collect::<Vec<_>>())
    }

    /// As [`Docker::run`], word by word.
    ///
    /// # Panics
    /// As that.
    #[track_caller]
    pub fn run_with(&self, arguments: &[&str]) -> String {
        let ended = self.ask(arguments);
        assert_eq!(ended.code, Some(0), "docker {arguments:?}: {}{}", ended.stdout, ended.stderr);
        ended.stdout
    }

    #[track_caller]
    fn ask(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new("/usr/bin/docker");
        command.arg("--host").arg(self.endpoint()).args(arguments).env_remove("DOCKER_CONTEXT");
        let mut process = Process::start("docker", &mut command);
        process.close_stdin();
        process.wait(PATIENCE).0
    }

    /// Names of running containers that begin with this, sorted.
    ///
    /// # Panics
    /// When the engine does not answer.
    #[track_caller]
    pub fn containers(&self, prefix: &str) -> Vec<String> {
        let names = self.run("ps --format {{.Names}}");
        let mut names: Vec<String> =
            names.lines().filter(|name| name.starts_with(prefix)).map(str::to_owned).collect();
        names.sort();
        names
    }

    /// Runs `scenario` in the engine's network, on a thread of its own. What it starts is there, too.
    ///
    /// # Panics
    /// When it does.
    pub fn inside<T: Send>(&self, scenario: impl FnOnce() -> T + Send) -> T {
        let enter = || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(self.network.as_fd(), kind)
                .expect("root may enter a network namespace");
            scenario()
        };
        let ended = std::thread::scope(|scope| scope.spawn(enter).join());
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn within_namespaces(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "nsenter", "--target", &self.first.to_string()]);
        command.args(["--mount", "--net", "--pid", "--"]);
        command
    }

    /// There is no registry to pull from: the image is made of what is here.
    #[track_caller]
    fn import_image(&self, greeter: &str) {
        let root = self.folder.path().join("image");
        fs::create_dir_all(root.join("bin")).expect("our own folder");
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        for command in ["sh", "sleep", "test", "touch", "rm"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(command)).expect("our own folder");
        }
        fs::copy(greeter, root.join("bin/greeter")).expect("cargo built it");
        // For health checks: `docker exec NAME touch /well`, and `rm /well`.
        let well = root.join("bin/well");
        fs::write(&well, "#!/bin/sh\ntest -e /well\n").expect("our own folder");
        fs::set_permissions(&well, fs::Permissions::from_mode(0o755)).expect("our own file");
        for library in libraries(greeter) {
            let target = root.join(library.trim_start_matches('/'));
            fs::create_dir_all(target.parent().expect("it is in a folder")).expect("our own folder");
            fs::copy(&library, target).expect("a library that is loaded");
        }
        let archive = self.folder.path().join("image.tar");
        let archived = Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&root).arg(".").status();
        assert!(archived.expect("tar is installed").success());
        let (cmd, expose) =
            (format!("CMD [\"/bin/greeter\", \"{IMAGE_PORT}\"]"), format!("EXPOSE {IMAGE_PORT}"));
        let archive = archive.to_str().expect("a plain path");
        self.run_with(&["import", "--change", &cmd, "--change", &expose, archive, IMAGE]);
    }
}

/// What a program is loaded with, its loader among it.
#[track_caller]
fn libraries(program: &str) -> Vec<String> {
    let listed = Command::new("ldd").arg(program).output().expect("ldd is part of libc");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    text.split_ascii_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect()
}

impl Drop for Docker {
    fn drop(&mut self) {
        // The first process takes all others in its namespace with it.
        self.namespaces.signal(Signal::KILL);
        self.namespaces.kill();
        let gone = || (!Path::new(&format!("/proc/{}", self.first)).exists()).then_some(());
        if !std::thread::panicking() {
            within(PATIENCE, "the namespaces are empty", gone);
            within(PATIENCE, "its control groups are removed", || remove_cgroups(&self.cgroup).then_some(()));
        } else {
            remove_cgroups(&self.cgroup);
        }
    }
}

/// Removes what runs left behind that were killed before they could.
fn remove_leftovers() {
    let of_the_dead = |name: &str| {
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()).unwrap_or_default();
        !process.is_empty() && !Path::new("/proc").join(process).exists()
    };
    for path in children_named(Path::new(CGROUPS), 2) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if of_the_dead(&name) {
            remove_cgroups(&name);
        }
    }
    for path in children_named(&std::env::temp_dir(), 1) {
        if of_the_dead(&path.file_name().unwrap_or_default().to_string_lossy()) {
            // Another run may be at it, too.
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// Folders of ours so many levels below `root`, or fewer.
fn children_named(root: &Path, levels: u8) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)) {
            found.push(path);
        } else if levels > 1 {
            found.extend(children_named(&path, levels - 1));
        }
    }
    found
}

/// Removes the groups of one run, in every hierarchy. False: some are still in use.
fn remove_cgroups(name: &str) -> bool {
    let mine = children_named(Path::new(CGROUPS), 2).into_iter();
    let mine = mine.filter(|path| path.file_name().is_some_and(|file| file.to_string_lossy() == name));
    // All of them, also after one that is in use.
    mine.filter(|path| !remove_groups(path)).count() == 0
}

fn remove_groups(group: &Path) -> bool {
    for child in fs::read_dir(group).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if child.is_dir() {
            remove_groups(&child);
        }
    }
    fs::remove_dir(group).is_ok()
}
