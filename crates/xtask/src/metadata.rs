//! What `cargo metadata` says about the workspace.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Root of the workspace.
pub(crate) fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("crates/xtask is two folders below the root").to_path_buf()
}

/// Every package of the dependency graph.
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    pub(crate) target_folder: PathBuf,
    /// Normal and build dependencies, by package id.
    graph: HashMap<String, Vec<String>>,
}

/// One package.
pub(crate) struct Package {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) is_member: bool,
    /// Source files of its libraries and binaries.
    pub(crate) roots: Vec<PathBuf>,
    pub(crate) dependencies: Vec<Dependency>,
}

/// A dependency as its manifest names it.
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// `normal`, `build` or `dev`.
    pub(crate) kind: String,
}

impl Metadata {
    pub(crate) fn read() -> Result<Self> {
        let mut command = cargo();
        command.args(["metadata", "--format-version", "1"]).current_dir(root()).stderr(Stdio::inherit());
        let output = command.output().context("cannot run cargo metadata")?;
        if !output.status.success() {
            bail!("cargo metadata failed: {}", output.status);
        }
        let json: Value = serde_json::from_slice(&output.stdout).context("cargo metadata is not JSON")?;
        let members: HashSet<&str> = array(&json["workspace_members"]).filter_map(Value::as_str).collect();
        let packages = array(&json["packages"]).map(|package| read_package(package, &members)).collect();
        let graph = array(&json["resolve"]["nodes"])
            .map(|node| {
                (
                    text(&node["id"]),
                    array(&node["deps"]).filter(|d| ships(d)).map(|d| text(&d["pkg"])).collect(),
                )
            })
            .collect();
        Ok(Self { packages, target_folder: text(&json["target_directory"]).into(), graph })
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| package.is_member)
    }

    /// The shortest way from `from` to a package named `to` over normal and build dependencies, by name, both ends
    /// included.
    pub(crate) fn way(&self, from: &Package, to: &str) -> Option<Vec<&str>> {
        let names: HashMap<&str, &str> =
            self.packages.iter().map(|p| (p.id.as_str(), p.name.as_str())).collect();
        let mut came_from: HashMap<&str, &str> = HashMap::new();
        let mut queue = std::collections::VecDeque::from([from.id.as_str()]);
        while let Some(id) = queue.pop_front() {
            if names.get(id) == Some(&to) && id != from.id {
                let mut way = vec![names[id]];
                let mut at = id;
                while let Some(previous) = came_from.get(at) {
                    way.push(names[previous]);
                    at = previous;
                }
                way.reverse();
                return Some(way);
            }
            for next in self.graph.get(id).into_iter().flatten() {
                if next != &from.id && !came_from.contains_key(next.as_str()) {
                    came_from.insert(next, id);
                    queue.push_back(next);
                }
            }
        }
        None
    }
}

/// Whether a resolved dependency is more than a dev-dependency.
fn ships(dependency: &Value) -> bool {
    array(&dependency["dep_kinds"]).any(|kind| kind["kind"].as_str() != Some("dev"))
}

fn read_package(package: &Value, members: &HashSet<&str>) -> Package {
    let id = text(&package["id"]);
    let code =
        |target: &&Value| array(&target["kind"]).any(|kind| matches!(kind.as_str(), Some("lib" | "bin")));
    Package {
        name: text(&package["name"]),
        is_member: members.contains(id.as_str()),
        roots: array(&package["targets"]).filter(code).map(|t| text(&t["src_path"]).into()).collect(),
        dependencies: array(&package["dependencies"])
            .map(|dependency| Dependency {
                name: text(&dependency["name"]),
                kind: dependency["kind"].as_str().unwrap_or("normal").to_owned(),
            })
            .collect(),
        id,
    }
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
