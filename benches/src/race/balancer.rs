//! The balancers: how each is configured and started.

use std::fmt::{self, Write as _};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use clap::ValueEnum;
use serde::{Serialize, Serializer};

use super::backends::POOL;
use crate::peer::{self, Installed, Proxy};
use crate::process::ProcessTree;

/// Who balances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Balancer {
    /// trimtab, policy `adaptive`.
    TrimtabAdaptive,
    /// trimtab, policy `least-connections`.
    TrimtabLeastConnections,
    /// trimtab, policy `weighted-round-robin`.
    TrimtabWeightedRoundRobin,
    /// trimtab, policy `peak-ewma`.
    TrimtabPeakEwma,
    /// trimtab, policy `p2c`.
    TrimtabP2c,
    /// HAProxy, `balance leastconn`.
    HaproxyLeastconn,
    /// HAProxy, `balance random(2)`.
    HaproxyRandom2,
    /// HAProxy, `balance roundrobin` with weights by agent checks each second.
    HaproxyRoundrobinAgent,
    /// HAProxy, `balance leastconn` with weights by agent checks each second.
    HaproxyLeastconnAgent,
    /// HAProxy, `balance leastconn` with static weights of somebody who knows which half is slow (but no antagonist).
    HaproxyLeastconnKnown,
}

impl Balancer {
    /// Who is compared unless something else is asked for.
    pub const DEFAULT: [Self; 4] =
        [Self::TrimtabAdaptive, Self::HaproxyLeastconn, Self::HaproxyRandom2, Self::HaproxyRoundrobinAgent];

    /// As in arguments and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::TrimtabAdaptive => "trimtab-adaptive",
            Self::TrimtabLeastConnections => "trimtab-least-connections",
            Self::TrimtabWeightedRoundRobin => "trimtab-weighted-round-robin",
            Self::TrimtabPeakEwma => "trimtab-peak-ewma",
            Self::TrimtabP2c => "trimtab-p2c",
            Self::HaproxyLeastconn => "haproxy-leastconn",
            Self::HaproxyRandom2 => "haproxy-random2",
            Self::HaproxyRoundrobinAgent => "haproxy-roundrobin-agent",
            Self::HaproxyLeastconnAgent => "haproxy-leastconn-agent",
            Self::HaproxyLeastconnKnown => "haproxy-leastconn-known",
        }
    }

    /// Whose program it is.
    pub fn proxy(self) -> Proxy {
        if self.policy().is_some() { Proxy::Trimtab } else { Proxy::Haproxy }
    }

    /// trimtab's policy.
    fn policy(self) -> Option<&'static str> {
        self.name().strip_prefix("trimtab-")
    }

    fn has_agent_checks(self) -> bool {
        matches!(self, Self::HaproxyRoundrobinAgent | Self::HaproxyLeastconnAgent)
    }

    /// HAProxy's algorithm.
    fn algorithm(self) -> &'static str {
        match self {
            Self::HaproxyRandom2 => "random(2)",
            Self::HaproxyRoundrobinAgent => "roundrobin",
            _ => "leastconn",
        }
    }
}

impl fmt::Display for Balancer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Balancer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// Where everybody is.
#[derive(Debug, Clone)]
pub(super) struct Places {
    pub(super) listen: SocketAddr,
    pub(super) control: SocketAddr,
    pub(super) http: SocketAddr,
    pub(super) backends: Vec<SocketAddr>,
    pub(super) agents: Vec<SocketAddr>,
    /// The speed of each that is not disturbed, relative to the fastest.
    pub(super) speeds: Vec<f64>,
}

/// The configuration file.
pub(super) fn configuration(balancer: Balancer, places: &Places) -> String {
    match balancer.policy() {
        Some(policy) => trimtab(policy, places),
        None => haproxy(balancer, places),
    }
}

/// Starts it on processor `cpu`, and waits until it accepts.
pub(super) fn start(
    balancer: Balancer,
    installed: &Installed,
    places: &Places,
    folder: &Path,
    cpu: usize,
) -> io::Result<ProcessTree> {
    let file = folder.join("balancer.conf");
    fs::write(&file, configuration(balancer, places))?;
    let mut command = Command::new(&installed.program);
    match installed.proxy {
        Proxy::Trimtab => command.args(["serve", "-c"]),
        _ => command.args(["-db", "-f"]),
    };
    command.arg(&file).current_dir(folder);
    let mut tree = ProcessTree::spawn(&mut command, &[cpu], folder.join("balancer.log"))?;
    peer::wait_until_it_accepts(&mut tree, places.listen)?;
    tree.find_descendants()?;
    Ok(tree)
}

fn trimtab(policy: &str, places: &Places) -> String {
    let Places { listen, control, http, .. } = places;
    format!(
        "[control]
listen = \"{control}\"
[http]
listen = \"{http}\"
[dataplane]
workers = 1
[[pool]]
name = \"{POOL}\"
policy = \"{policy}\"
[[listener]]
bind = \"tcp://{listen}\"
pool = \"{POOL}\"
"
    )
}

/// As in its manual's examples: one thread, health checks, no limits of connections that would queue.
fn haproxy(balancer: Balancer, places: &Places) -> String {
    let mut text = format!(
        "global
    nbthread 1
    maxconn 8000
defaults
    mode tcp
    timeout connect 5s
    timeout client 1m
    timeout server 1m
frontend in
    bind {}
    default_backend out
backend out
    balance {}
",
        places.listen,
        balancer.algorithm()
    );
    for (index, (address, agent)) in places.backends.iter().zip(&places.agents).enumerate() {
        let known = balancer == Balancer::HaproxyLeastconnKnown;
        let weight = if known { (places.speeds[index] * 100.0).round() } else { 100.0 };
        write!(text, "    server b{index} {address} check weight {weight}").expect("a String takes all");
        if balancer.has_agent_checks() {
            let (ip, port) = (agent.ip(), agent.port());
            write!(text, " agent-check agent-addr {ip} agent-port {port} agent-inter 1s")
                .expect("a String takes all");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Places {
            listen: address(1),
            control: address(2),
            http: address(3),
            backends: vec![address(10), address(11)],
            agents: vec![address(20), address(21)],
            speeds: vec![1.0, 0.5],
        }
    }

    #[test]
    fn names_are_what_arguments_take() {
        for balancer in Balancer::value_variants() {
            let value = balancer.to_possible_value().unwrap();
            assert_eq!(value.get_name(), balancer.name());
        }
    }

    #[test]
    fn each_haproxy_has_its_algorithm_and_only_some_have_agents() {
        let text = |balancer| configuration(balancer, &places());
        assert!(text(Balancer::HaproxyLeastconn).contains("balance leastconn"));
        assert!(text(Balancer::HaproxyRandom2).contains("balance random(2)"));
        let agents = text(Balancer::HaproxyRoundrobinAgent);
        assert!(agents.contains("balance roundrobin") && agents.contains("agent-port 21 agent-inter 1s"));
        assert!(!text(Balancer::HaproxyLeastconn).contains("agent"));
        assert!(text(Balancer::HaproxyLeastconnKnown).contains("127.0.0.1:11 check weight 50"));
    }

    #[test]
    fn trimtab_is_told_its_policy_and_no_backend() {
        let text = configuration(Balancer::TrimtabWeightedRoundRobin, &places());
        assert!(text.contains("policy = \"weighted-round-robin\"") && text.contains("tcp://127.0.0.1:1\""));
        assert!(!text.contains("127.0.0.1:10"));
    }
}
