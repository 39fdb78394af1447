//! Who stands in for this balancer where nobody said so: the others that DNS names beside it.
//!
//! Owns: looking them up, and their control addresses. Does not own: which notices name them ([`super`]).

use std::sync::Arc;
use std::time::Duration;

use discovery::{Finder, Found};

use super::ALTERNATIVES_MAX;
use crate::{Phase, Shared, reached};

/// Between two looks, at least and at most.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));

/// A zone in which this balancer is published, and others may be.
#[derive(Debug, Clone)]
pub struct Zone {
    /// Asks for the balancers there.
    pub finder: Finder,
    /// The target of this one's own record, without the dot at the end.
    pub own: String,
}

/// Looks for others until the process drains. What was found last stands when DNS does not answer.
pub(crate) async fn run(shared: Arc<Shared>, zones: Vec<Zone>, scheme: &'static str) {
    if zones.is_empty() {
        return;
    }
    let mut found = vec![Vec::new(); zones.len()];
    loop {
        let mut pause = PAUSE.1;
        for (zone, found) in zones.iter().zip(&mut found) {
            match zone.finder.look().await {
                Ok(answer) => {
                    pause = pause.min(answer.fresh_for);
                    *found = others(&answer, &zone.own, scheme);
                }
                Err(error) => {
                    tracing::debug!(%error, "looking for who stands in; what is known of them stays")
                }
            }
        }
        let mut all: Vec<String> = Vec::new();
        for other in found.iter().flatten() {
            if !all.contains(other) && all.len() < ALTERNATIVES_MAX {
                all.push(other.clone());
            }
        }
        shared.notices.found(all);
        tokio::select! {
            () = tokio::time::sleep(pause.clamp(PAUSE.0, PAUSE.1)) => {}
            () = reached(shared.phase.clone(), Phase::Draining) => return,
        }
    }
}

/// The control addresses of the others, the lowest priority number first. In clear text by address, for whoever hears of them
/// may ask another DNS; by name where a certificate has to have it.
fn others(answer: &Found, own: &str, scheme: &str) -> Vec<String> {
    let targets = answer.groups.iter().flat_map(|group| &group.targets);
    let others = targets.filter(|target| !target.host.eq_ignore_ascii_case(own));
    others
        .filter_map(|target| match (scheme, target.addresses.first()) {
            ("http", address) => Some(format!("http://{}", address?)),
            _ => Some(format!("{scheme}://{}:{}", target.host, target.port)),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use discovery::{Group, Target};

    #[test]
    fn those_who_are_not_itself_stand_in() {
        let target = |host: &str, address: &str| Target {
            host: host.into(),
            port: 7400,
            weight: 1,
            addresses: address.parse().into_iter().collect(),
        };
        let first = Group {
            priority: 10,
            targets: vec![
                target("LB1.example.com", "10.0.0.1:7400"),
                target("lb2.example.com", "10.0.0.2:7400"),
            ],
        };
        let second = Group {
            priority: 20,
            targets: vec![target("lb3.example.com", "-"), target("lb4.example.com", "[2001:db8::4]:7400")],
        };
        let found = Found { groups: vec![first, second], fresh_for: Duration::ZERO };
        assert_eq!(
            others(&found, "lb1.example.com", "http"),
            ["http://10.0.0.2:7400", "http://[2001:db8::4]:7400"]
        );
        assert_eq!(
            others(&found, "lb2.example.com", "https"),
            ["https://LB1.example.com:7400", "https://lb3.example.com:7400", "https://lb4.example.com:7400"]
        );
    }
}
