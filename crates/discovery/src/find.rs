//! Finding balancers: SRV (RFC 2782) with the addresses of its targets.
//!
//! Owns: the questions, their bounds, how long an answer holds, and the order of targets. Does not own: who asks again
//! when, and what is done with what was found.

use std::net::SocketAddr;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::name::{Domain, NameError, ServiceName, shown};

/// An answer holds at least this long: a TTL of 0 must not become a storm of questions.
const FRESH_MIN: Duration = Duration::from_secs(1);
/// And at most this long: whoever made a TTL of a day did not think of balancers that come and go.
const FRESH_MAX: Duration = Duration::from_secs(30);
/// How long "there is none" holds, unless its TTL is shorter: the first balancer should be found soon.
const NONE_FRESH_MAX: Duration = Duration::from_secs(5);
/// Targets that are looked at; the rest is left out. A zone with more balancers than this has another problem.
const TARGETS_MAX: usize = 64;
/// Addresses of a target that are looked at.
const ADDRESSES_MAX: usize = 8;
/// For one question to one server.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Questions to each server.
const TRIES: usize = 2;
/// For all of it: a resolver with several dead servers must end, too.
const LOOK_WITHIN: Duration = Duration::from_secs(10);

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// By priority, the lowest first; empty: DNS says that there is none.
    pub groups: Vec<Group>,
    /// How long this holds.
    pub fresh_for: Duration,
}

/// Targets of one priority: they stand in for each other, by weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// As in SRV: the lowest is used first.
    pub priority: u16,
    /// At least one.
    pub targets: Vec<Target>,
}

/// One target of an SRV record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its name, without the dot at the end.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Share among its group.
    pub weight: u16,
    /// Where it is; empty: that could not be found out now.
    pub addresses: Vec<SocketAddr>,
}

/// Why nothing was found out: DNS did not answer the question. What was known before is still the best guess.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// The host's, or its operator's.
    #[error(
        "the system's resolver cannot be used: {why}; see /etc/resolv.conf, or name a DNS server with --dns"
    )]
    System {
        /// What is wrong.
        why: String,
    },
    /// The network's, or the server's.
    #[error("DNS does not answer for {name}: {why}")]
    NoAnswer {
        /// The question's name.
        name: String,
        /// What happened.
        why: String,
    },
}

/// Looks for one service in one domain.
#[derive(Debug, Clone)]
pub struct Finder {
    name: Name,
    server: Option<SocketAddr>,
}

impl Finder {
    /// Of `service` in `domain`, by this server or by the system's resolver.
    ///
    /// # Errors
    /// When the name of both is too long.
    pub fn new(
        service: &ServiceName,
        domain: &Domain,
        server: Option<SocketAddr>,
    ) -> Result<Self, NameError> {
        Ok(Self { name: service.within(domain)?, server })
    }

    /// What is looked up.
    pub fn name(&self) -> String {
        shown(&self.name)
    }

    /// Asks now; some seconds at most.
    ///
    /// # Errors
    /// When there was no answer. That there is no such service is one: [`Found`] without groups.
    pub async fn look(&self) -> Result<Found, FindError> {
        // Made anew each time: what is in /etc/resolv.conf changes with the network that a host is in.
        let resolver = resolver(self.server)?;
        match timeout(LOOK_WITHIN, self.look_with(&resolver)).await {
            Ok(found) => found,
            Err(_) => Err(self.no_answer(format!("nothing came within {LOOK_WITHIN:?}"))),
        }
    }

    async fn look_with(&self, resolver: &TokioResolver) -> Result<Found, FindError> {
        let answer = match resolver.lookup(self.name.clone(), RecordType::SRV).await {
            Ok(answer) => answer,
            Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
                let ttl = none.negative_ttl.map_or(NONE_FRESH_MAX, |ttl| Duration::from_secs(ttl.into()));
                return Ok(Found { groups: Vec::new(), fresh_for: ttl.clamp(FRESH_MIN, NONE_FRESH_MAX) });
            }
            Err(error) => return Err(self.no_answer(error.to_string())),
        };
        let mut ttl_s = u32::MAX;
        let mut targets = Vec::new();
        for record in answer.answers() {
            let RData::SRV(srv) = &record.data else { continue };
            ttl_s = ttl_s.min(record.ttl);
            // "." says that the service is decidedly not there (RFC 2782).
            if !srv.target.is_root() && targets.len() < TARGETS_MAX {
                targets.push(srv.clone());
            }
        }
        let (addresses, addresses_ttl) =
            resolve(resolver, targets.iter().map(|srv| srv.target.clone())).await;
        let found = targets.into_iter().zip(addresses).map(|(srv, ips)| {
            let addresses = ips.into_iter().map(|ip| SocketAddr::new(ip, srv.port)).collect();
            let host = shown(&srv.target).to_ascii_lowercase();
            (srv.priority, Target { host, port: srv.port, weight: srv.weight, addresses })
        });
        let fresh_for = Duration::from_secs(ttl_s.into()).min(addresses_ttl).clamp(FRESH_MIN, FRESH_MAX);
        Ok(Found { groups: grouped(found), fresh_for })
    }

    fn no_answer(&self, why: String) -> FindError {
        FindError::NoAnswer { name: self.name(), why }
    }
}

fn resolver(server: Option<SocketAddr>) -> Result<TokioResolver, FindError> {
    let system = |error: NetError| FindError::System { why: error.to_string() };
    let mut builder = match server {
        Some(server) => {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                connection.port = server.port();
                connection
            });
            let server = NameServerConfig::new(server.ip(), true, connections.into());
            let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
            let provider = TokioRuntimeProvider::default();
            TokioResolver::builder_with_config(config, provider).with_options(ResolverOpts::default())
        }
        None => TokioResolver::builder_tokio().map_err(system)?,
    };
    let options = builder.options_mut();
    options.timeout = ANSWER_WITHIN;
    options.attempts = TRIES;
    // It is made for one look.
    options.cache_size = 0;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    builder.build().map_err(system)
}

/// The addresses of each, all asked for at once, and the shortest of their TTLs.
async fn resolve(
    resolver: &TokioResolver,
    names: impl Iterator<Item = Name>,
) -> (Vec<Vec<std::net::IpAddr>>, Duration) {
    let mut questions = JoinSet::new();
    let mut found = Vec::new();
    for (place, name) in names.enumerate() {
        let resolver = resolver.clone();
        found.push(Vec::new());
        questions.spawn(async move { (place, resolver.lookup_ip(name).await) });
    }
    let mut ttl_s = u32::MAX;
    while let Some(answered) = questions.join_next().await {
        // Without an answer its addresses are unknown, not gone.
        let Ok((place, Ok(answer))) = answered else { continue };
        let records = answer.as_lookup().answers();
        ttl_s = records.iter().map(|record| record.ttl).fold(ttl_s, u32::min);
        found[place] = answer.iter().take(ADDRESSES_MAX).collect();
    }
    (found, Duration::from_secs(ttl_s.into()))
}

/// Each priority once, in order; each target once, however often it is listed.
fn grouped(found: impl Iterator<Item = (u16, Target)>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut found: Vec<_> = found.collect();
    found.sort_by(|(p, a), (q, b)| (p, &a.host, a.port).cmp(&(q, &b.host, b.port)));
    let mut seen = std::collections::HashSet::new();
    for (priority, target) in found {
        if !seen.insert((target.host.clone(), target.port)) {
            continue;
        }
        match groups.last_mut().filter(|group| group.priority == priority) {
            Some(group) => group.targets.push(target),
            None => groups.push(Group { priority, targets: vec![target] }),
        }
    }
    groups
}

impl Group {
    /// Its targets in the order in which one client should try them (RFC 2782): drawn one by one by weight, those of
    /// weight 0 with a small chance only.
    pub fn order(mut self, seed: u64) -> Vec<Target> {
        let mut dice = seed;
        let mut ordered = Vec::with_capacity(self.targets.len());
        // Those of weight 0 first, so that they are drawn by a 0 alone.
        self.targets.sort_by_key(|target| target.weight > 0);
        while !self.targets.is_empty() {
            let sum: u64 = self.targets.iter().map(|target| u64::from(target.weight)).sum();
            let drawn = next(&mut dice) % (sum + 1);
            let mut running = 0;
            let place = self.targets.iter().position(|target| {
                running += u64::from(target.weight);
                running >= drawn
            });
            ordered.push(self.targets.remove(place.unwrap_or(0)));
        }
        ordered
    }
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). Not for secrets.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(host: &str, weight: u16) -> Target {
        Target { host: host.into(), port: 7400, weight, addresses: Vec::new() }
    }

    #[test]
    fn groups_are_by_priority_and_have_each_target_once() {
        let found = [(20, target("c", 1)), (10, target("b", 1)), (10, target("a", 1)), (20, target("a", 1))];
        let groups = grouped(found.into_iter());
        let shown: Vec<_> = groups
            .iter()
            .map(|group| {
                let hosts: Vec<_> = group.targets.iter().map(|target| target.host.as_str()).collect();
                (group.priority, hosts)
            })
            .collect();
        assert_eq!(shown, [(10, vec!["a", "b"]), (20, vec!["c"])]);
    }

    #[test]
    fn the_first_is_drawn_by_weight_and_nobody_is_lost() {
        let group = Group { priority: 0, targets: vec![target("a", 10), target("b", 30), target("zero", 0)] };
        let rounds = 8_000;
        let mut first = std::collections::HashMap::new();
        for seed in 0..rounds {
            let order = group.clone().order(seed);
            assert_eq!(order.len(), 3);
            *first.entry(order[0].host.clone()).or_insert(0_u32) += 1;
        }
        let share = |host: &str| f64::from(first.get(host).copied().unwrap_or(0)) / rounds as f64;
        assert!((share("b") - 30.0 / 41.0).abs() < 0.03, "{first:?}");
        assert!((share("a") - 10.0 / 41.0).abs() < 0.03, "{first:?}");
        assert!((0.005..0.06).contains(&share("zero")), "{first:?}");
        let zeros = Group { priority: 0, targets: vec![target("a", 0), target("b", 0)] };
        assert_eq!(zeros.order(1).len(), 2);
    }
}
