//! Which workspace crate may import which, and what some may never import: the table of ARCHITECTURE.md, checked.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::metadata::{Metadata, Package};

/// What a crate may import.
struct Rule {
    package: &'static str,
    /// Workspace crates it may name, for any purpose, tests too.
    may: &'static [&'static str],
    /// Crates that may not be anywhere below it (tests apart).
    never: &'static [&'static str],
}

/// A new crate needs a line here: who may import whom is decided, not grown.
const RULES: &[Rule] = &[
    Rule {
        package: "trimtab-allocation",
        may: &[],
        never: &["tokio", "tonic", "io-uring", "tokio-uring", "libc", "rustix"],
    },
    Rule {
        package: "trimtab-flow",
        may: &["trimtab-allocation"],
        never: &["tokio", "tonic", "io-uring", "tokio-uring", "libc", "rustix", "rand", "socket2"],
    },
    Rule { package: "trimtab-uring", may: &[], never: &["tokio", "tonic"] },
    Rule {
        package: "trimtab-dataplane",
        may: &["trimtab-flow", "trimtab-uring", "trimtab-allocation"],
        never: &["tonic"],
    },
    Rule {
        package: "trimtab-registry",
        may: &["trimtab-allocation"],
        never: &["tokio", "tonic", "io-uring"],
    },
    // Forms of others, read and written: pure, and so shared by the two shells.
    Rule {
        package: "trimtab-formats",
        may: &[],
        never: &["tokio", "tonic", "io-uring", "tokio-uring", "libc", "rustix"],
    },
    // A bounded GET, which both shells need.
    Rule { package: "trimtab-fetch", may: &[], never: &["tonic", "io-uring", "openssl", "aws-lc-rs"] },
    // Dialogues with services, which know nothing of what follows from them.
    Rule {
        package: "trimtab-checks",
        may: &["trimtab-fetch"],
        never: &["tonic", "io-uring", "openssl", "aws-lc-rs"],
    },
    Rule { package: "trimtab-store", may: &[], never: &["tonic", "io-uring"] },
    Rule { package: "trimtab-discovery", may: &[], never: &["tonic", "io-uring"] },
    Rule { package: "trimtab-api", may: &[], never: &["io-uring"] },
    Rule {
        package: "trimtab-control",
        may: &[
            "trimtab-checks",
            "trimtab-registry",
            "trimtab-store",
            "trimtab-discovery",
            "trimtab-api",
            "trimtab-allocation",
            "trimtab-fetch",
            "trimtab-formats",
        ],
        never: &["io-uring"],
    },
    Rule {
        package: "trimtab-agent",
        may: &["trimtab-api", "trimtab-discovery", "trimtab-fetch", "trimtab-formats"],
        never: &["io-uring"],
    },
    Rule {
        package: "trimtab",
        may: &[
            "trimtab-agent",
            "trimtab-allocation",
            "trimtab-api",
            "trimtab-checks",
            "trimtab-control",
            "trimtab-dataplane",
            "trimtab-discovery",
            "trimtab-fetch",
            "trimtab-flow",
            "trimtab-formats",
            "trimtab-registry",
            "trimtab-store",
            "trimtab-uring",
        ],
        never: &["openssl", "aws-lc-rs"],
    },
    Rule { package: "xtask", may: &[], never: &["tokio", "tonic"] },
    // It drives the binary from outside; the wire's types are how a resource would.
    Rule { package: "e2e", may: &["trimtab-api"], never: &["io-uring"] },
    // It drives the binary as clients and resources do (a soak with what the end-to-end tests are made of), and times control
    // with nothing between. Its floor is the least that can be done over uring.
    Rule {
        package: "benches",
        may: &[
            "trimtab-allocation",
            "trimtab-api",
            "trimtab-control",
            "trimtab-flow",
            "trimtab-registry",
            "trimtab-uring",
            "e2e",
        ],
        never: &[],
    },
];

/// The one crate that may name `io-uring`, and have unsafe code.
const UNSAFE_CRATE: &str = "trimtab-uring";

/// The one crate that may name `tokio-uring`, in a fallback engine.
const FALLBACK_CRATE: &str = "trimtab-dataplane";

/// `cargo xtask edges`.
pub(crate) fn run() -> Result<()> {
    let metadata = Metadata::read()?;
    let mut wrong = Vec::new();
    let mut crates = 0;
    for package in metadata.members() {
        crates += 1;
        check_imports(&metadata, package, &mut wrong);
        check_unsafe(package, &mut wrong)?;
    }
    if wrong.is_empty() {
        println!("{crates} crates import only what they may, and only {UNSAFE_CRATE} has unsafe code");
        return Ok(());
    }
    for line in &wrong {
        eprintln!("  {line}");
    }
    bail!(
        "{} forbidden dependency edges or missing guards; the rules are in crates/xtask/src/edges.rs",
        wrong.len()
    )
}

fn check_imports(metadata: &Metadata, package: &Package, wrong: &mut Vec<String>) {
    let Some(rule) = RULES.iter().find(|rule| rule.package == package.name) else {
        wrong.push(format!("{} has no rule: say what it may import", package.name));
        return;
    };
    for dependency in &package.dependencies {
        let name = dependency.name.as_str();
        let is_member = metadata.members().any(|member| member.name == name);
        // A crate may name itself, for tests with other features.
        if is_member && name != package.name && !rule.may.contains(&name) {
            wrong.push(format!("{} may not import {name} ({} dependency)", package.name, dependency.kind));
        }
        if name == "io-uring" && package.name != UNSAFE_CRATE {
            wrong.push(format!("{} imports io-uring: only {UNSAFE_CRATE} may", package.name));
        }
        if name == "tokio-uring" && package.name != FALLBACK_CRATE {
            wrong.push(format!("{} imports tokio-uring: only {FALLBACK_CRATE} may", package.name));
        }
    }
    for never in rule.never {
        if let Some(way) = metadata.way(package, never) {
            wrong.push(format!("{} must be free of {never}, but: {}", package.name, way.join(" -> ")));
        }
    }
}

fn check_unsafe(package: &Package, wrong: &mut Vec<String>) -> Result<()> {
    if package.name == UNSAFE_CRATE {
        return Ok(());
    }
    for root in &package.roots {
        let text = fs::read_to_string(root).with_context(|| format!("cannot read {}", root.display()))?;
        if !text.lines().any(|line| line.trim() == "#![forbid(unsafe_code)]") {
            let shown = root.strip_prefix(crate::metadata::root()).unwrap_or(root);
            wrong.push(format!("{} lacks #![forbid(unsafe_code)]", shown.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_member_has_one_rule_and_no_rule_allows_a_cycle() {
        for rule in RULES {
            assert_eq!(
                RULES.iter().filter(|other| other.package == rule.package).count(),
                1,
                "{}",
                rule.package
            );
            for may in rule.may {
                let back = RULES
                    .iter()
                    .find(|other| other.package == *may)
                    .expect("rules name crates that have rules");
                assert!(!back.may.contains(&rule.package), "{} <-> {may}", rule.package);
            }
        }
    }

    #[test]
    fn a_way_is_found_and_a_missing_guard_too() {
        let metadata = Metadata::read().unwrap();
        let package = |name: &str| metadata.members().find(|package| package.name == name).unwrap();
        let way = metadata.way(package("trimtab-agent"), "h2").expect("tonic is built on h2");
        assert_eq!((way[0], *way.last().unwrap()), ("trimtab-agent", "h2"));
        assert!(way.len() > 2, "{way:?}");
        assert_eq!(metadata.way(package("xtask"), "tokio"), None);

        let mut wrong = Vec::new();
        let unguarded = Package { name: "e2e".into(), ..copy(package("trimtab-uring")) };
        check_unsafe(&unguarded, &mut wrong).unwrap();
        assert_eq!(wrong.len(), 1, "{wrong:?}");

        // The agent's dependencies under a pure crate's rule: tokio and tonic, and the wire.
        let mut wrong = Vec::new();
        let impure = Package { name: "trimtab-allocation".into(), ..copy(package("trimtab-agent")) };
        check_imports(&metadata, &impure, &mut wrong);
        assert!(
            wrong
                .iter()
                .any(|line| line == "trimtab-allocation may not import trimtab-api (normal dependency)")
        );
        assert!(wrong.iter().any(|line| line.contains("must be free of tokio, but: ")), "{wrong:?}");
    }

    fn copy(package: &Package) -> Package {
        let dependency = |d: &crate::metadata::Dependency| crate::metadata::Dependency {
            name: d.name.clone(),
            kind: d.kind.clone(),
        };
        Package {
            id: package.id.clone(),
            name: package.name.clone(),
            is_member: true,
            roots: package.roots.clone(),
            dependencies: package.dependencies.iter().map(dependency).collect(),
        }
    }
}
