//! Which balancers an agent has: a set that changes while it runs, with one life for each.
//!
//! ```text
//! flags ----------+            +-> Life: registers, reports … until told to stop, then deregisters
//! discovery ------+-- add ---->|
//! (who else says) +-- remove --+-> stop, when nobody names it any more
//! ```
//!
//! Owns: who names a balancer, that two names of one balancer are one life, starting and ending lives, and what each is
//! doing. Does not own: what happens in a life (`life`), and who says which balancers there are. Whoever does is a
//! [`Source`]: what one source adds, another does not take away.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tonic::transport::Uri;

use crate::agent::{AgentState, Common};
use crate::config::{AgentError, HTTP_PORT};
use crate::life::Life;

/// Who says that a balancer is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// Whoever started the agent.
    Flag,
    /// DNS.
    Discovery,
    /// A balancer's notice that it will be away.
    Notice,
}

/// A balancer's control.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Balancer {
    /// Its name, for TLS and for people.
    pub(crate) uri: Uri,
    /// Where it is; empty: where its name leads.
    pub(crate) addresses: Vec<SocketAddr>,
}

impl Balancer {
    /// By a URL that somebody wrote.
    pub(crate) fn named(uri: Uri) -> Self {
        Self { uri, addresses: Vec::new() }
    }

    /// By what DNS says. The one place where that becomes a URL. `None`: no URL can have such a host.
    pub(crate) fn found(target: &discovery::Target, scheme: &str) -> Option<Self> {
        let uri = format!("{scheme}://{}:{}", target.host, target.port).parse().ok()?;
        Some(Self { uri, addresses: target.addresses.clone() })
    }

    /// Two registrations of one resource at one balancer would take turns at being its only stream of reports.
    fn is_same(&self, other: &Self) -> bool {
        let name = |balancer: &Self| {
            let host = balancer.uri.host().unwrap_or_default().trim_end_matches('.').to_ascii_lowercase();
            (host, balancer.uri.port_u16().unwrap_or(HTTP_PORT))
        };
        let address = |balancer: &Self| -> Option<SocketAddr> {
            let (host, port) = name(balancer);
            let ip = host.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
            Some(SocketAddr::new(ip, port))
        };
        let leads = |one: &Self, to: &Self| address(to).is_some_and(|to| one.addresses.contains(&to));
        name(self) == name(other) || leads(self, other) || leads(other, self)
    }
}

/// One of an agent's balancers; not used again for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct BalancerId(u64);

impl BalancerId {
    pub(crate) fn is_first(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

#[derive(Debug)]
struct Entry {
    id: BalancerId,
    balancer: Balancer,
    sources: BTreeSet<Source>,
    state: watch::Sender<AgentState>,
    stop: watch::Sender<bool>,
    /// Whether there is a life.
    lives: bool,
    /// Whether an operator drains the resource there.
    drains: bool,
    /// How often it began to answer reports.
    sessions: u64,
}

impl Entry {
    fn reports(&self) -> bool {
        matches!(*self.state.borrow(), AgentState::Reporting { .. })
    }
}

/// The balancers of one agent.
#[derive(Debug, Default)]
pub(crate) struct Balancers {
    set: Mutex<Set>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Set {
    entries: Vec<Entry>,
    next: u64,
}

/// Lives, by the balancers that they are with.
pub(crate) type Lives = JoinSet<(BalancerId, Result<(), AgentError>)>;

impl Balancers {
    /// `source` says that this is a balancer. Its life begins soon, if it has none.
    pub(crate) fn add(&self, balancer: Balancer, source: Source) {
        let mut set = self.set();
        if let Some(entry) = set.entries.iter_mut().find(|entry| entry.balancer.is_same(&balancer)) {
            entry.sources.insert(source);
            if !balancer.addresses.is_empty() {
                entry.balancer.addresses = balancer.addresses;
            }
            return;
        }
        let id = BalancerId(set.next);
        set.next += 1;
        set.entries.push(Entry {
            id,
            balancer,
            sources: [source].into(),
            state: watch::Sender::new(AgentState::CheckingService),
            stop: watch::Sender::new(false),
            lives: false,
            drains: false,
            sessions: 0,
        });
        drop(set);
        self.changed.notify_one();
    }

    /// `source` does not say so any more. If nobody does, its life ends: it deregisters.
    pub(crate) fn remove(&self, balancer: &Balancer, source: Source) {
        let mut set = self.set();
        for entry in set.entries.iter_mut().filter(|entry| entry.balancer.is_same(balancer)) {
            if entry.sources.remove(&source) && entry.sources.is_empty() {
                entry.stop.send_replace(true);
            }
        }
        // One that has no life yet gets none.
        set.entries.retain(|entry| entry.lives || !entry.sources.is_empty());
    }

    /// From now on `source` names these and no others.
    pub(crate) fn set_of(&self, source: Source, wanted: Vec<Balancer>) {
        let is_other = |entry: &&Entry| {
            entry.sources.contains(&source) && !wanted.iter().any(|wanted| wanted.is_same(&entry.balancer))
        };
        let others: Vec<Balancer> =
            self.set().entries.iter().filter(is_other).map(|entry| entry.balancer.clone()).collect();
        // New ones first: a resource should not be without any between the two.
        for balancer in wanted {
            self.add(balancer, source);
        }
        for balancer in others {
            self.remove(&balancer, source);
        }
    }

    /// Whether a balancer answers reports now.
    pub(crate) fn reports_to(&self, balancer: &Balancer) -> bool {
        let set = self.set();
        set.entries.iter().any(|entry| entry.balancer.is_same(balancer) && entry.reports())
    }

    /// The session in which this balancer answers reports now, counted from 1; `None`: it does not.
    pub(crate) fn session_with(&self, id: BalancerId) -> Option<u64> {
        let set = self.set();
        let entry = set.entries.iter().find(|entry| entry.id == id && entry.reports());
        entry.map(|entry| entry.sessions)
    }

    /// Whether a balancer answers reports that not only this source names.
    pub(crate) fn others_than(&self, source: Source) -> bool {
        let others = |entry: &&Entry| entry.sources.iter().any(|named| *named != source);
        self.set().entries.iter().filter(others).any(Entry::reports)
    }

    /// With the addresses that are known now.
    pub(crate) fn addressed(&self, id: BalancerId, uri: &Uri) -> Balancer {
        let set = self.set();
        let addresses = set.entries.iter().find(|entry| entry.id == id);
        let addresses = addresses.map(|entry| entry.balancer.addresses.clone()).unwrap_or_default();
        Balancer { uri: uri.clone(), addresses }
    }

    pub(crate) fn set_state(&self, id: BalancerId, state: AgentState) {
        if let Some(entry) = self.set().entries.iter_mut().find(|entry| entry.id == id) {
            entry.sessions += u64::from(matches!(state, AgentState::Reporting { .. }));
            entry.state.send_replace(state);
        }
    }

    /// A balancer's view of the resource: whether an operator drains it there.
    pub(crate) fn set_drains(&self, id: BalancerId, drains: bool) {
        if let Some(entry) = self.set().entries.iter_mut().find(|entry| entry.id == id) {
            entry.drains = drains;
        }
    }

    /// Whether an operator drains the resource at any of them.
    pub(crate) fn any_drains(&self) -> bool {
        self.set().entries.iter().any(|entry| entry.drains)
    }

    /// How many answer reports now.
    pub(crate) fn reporting(&self) -> usize {
        self.set().entries.iter().filter(|entry| entry.reports()).count()
    }

    /// How many balancers a report to this one says there are: those that answer now, and the one it goes to, which
    /// may not have had its first one yet.
    pub(crate) fn counted(&self, id: BalancerId) -> u32 {
        let count = self.set().entries.iter().filter(|entry| entry.id == id || entry.reports()).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// What it does with each, in the order in which they came.
    pub(crate) fn states(&self) -> Vec<(Uri, watch::Receiver<AgentState>)> {
        let set = self.set();
        let state = |entry: &Entry| (entry.balancer.uri.clone(), entry.state.subscribe());
        set.entries.iter().map(state).collect()
    }

    /// Starts lives as balancers come, and forgets those that ended as they should. The error of the first life that
    /// ends by one ends this.
    pub(crate) async fn live(common: &Arc<Common>, lives: &mut Lives) -> AgentError {
        let balancers = &common.balancers;
        loop {
            balancers.start_new(common, lives);
            let ended = tokio::select! {
                Some(ended) = lives.join_next() => ended,
                () = balancers.changed.notified() => continue,
            };
            match unless_panicked(ended) {
                Some((_, Err(error))) => return error,
                Some((id, Ok(()))) => balancers.ended(id),
                None => {}
            }
        }
    }

    /// Tells all lives to take leave, and waits for them: a second at most.
    pub(crate) async fn end(&self, lives: &mut Lives) {
        for entry in &self.set().entries {
            entry.stop.send_replace(true);
            if !entry.lives {
                // There is nobody to say so: it ended before it began.
                entry.state.send_replace(AgentState::Deregistered);
            }
        }
        while let Some(ended) = lives.join_next().await {
            // The first error said it all.
            drop(unless_panicked(ended));
        }
    }

    fn start_new(&self, common: &Arc<Common>, lives: &mut Lives) {
        for entry in self.set().entries.iter_mut().filter(|entry| !entry.lives) {
            entry.lives = true;
            let (id, stop) = (entry.id, entry.stop.subscribe());
            let life = Life::new(Arc::clone(common), id, entry.balancer.uri.clone());
            lives.spawn(async move { (id, life.run(stop).await) });
        }
    }

    /// A life ended because it was told to. If somebody named its balancer again meanwhile, another begins.
    fn ended(&self, id: BalancerId) {
        let mut set = self.set();
        if let Some(entry) = set.entries.iter_mut().find(|entry| entry.id == id) {
            entry.lives = false;
            entry.stop.send_replace(false);
        }
        set.entries.retain(|entry| entry.lives || !entry.sources.is_empty());
    }

    fn set(&self) -> MutexGuard<'_, Set> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A panic of a life is the agent's own, as if there were no tasks. `None`: the runtime ends.
fn unless_panicked<T>(ended: Result<T, tokio::task::JoinError>) -> Option<T> {
    match ended {
        Ok(result) => Some(result),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(uri: &str) -> Balancer {
        Balancer::named(uri.parse().unwrap())
    }

    fn found(host: &str, address: &str) -> Balancer {
        let addresses = vec![address.parse().unwrap()];
        let target = discovery::Target { host: host.into(), port: 7400, weight: 1, addresses };
        Balancer::found(&target, "http").unwrap()
    }

    fn uris(balancers: &Balancers) -> Vec<String> {
        balancers.states().into_iter().map(|(uri, _)| uri.to_string()).collect()
    }

    #[test]
    fn one_balancer_by_two_names_is_one() {
        let balancers = Balancers::default();
        balancers.add(named("http://10.0.0.9:7400"), Source::Flag);
        balancers.add(found("lb1.example.com", "10.0.0.9:7400"), Source::Discovery);
        balancers.add(named("http://lb2.example.com:7400"), Source::Flag);
        balancers.add(found("LB2.example.com", "10.0.0.8:7400"), Source::Discovery);
        balancers.add(found("lb3.example.com", "[2001:db8::3]:7400"), Source::Discovery);
        balancers.add(named("http://[2001:db8::3]:7400"), Source::Flag);
        assert_eq!(
            uris(&balancers),
            ["http://10.0.0.9:7400/", "http://lb2.example.com:7400/", "http://lb3.example.com:7400/"]
        );
        // What one source adds, another does not take away.
        balancers.set_of(Source::Discovery, vec![found("lb4.example.com", "10.0.0.4:7400")]);
        assert_eq!(uris(&balancers).len(), 4);
        balancers.set_of(Source::Discovery, Vec::new());
        assert_eq!(uris(&balancers).len(), 3);
        balancers.remove(&named("http://10.0.0.9:7400"), Source::Flag);
        assert_eq!(uris(&balancers), ["http://lb2.example.com:7400/", "http://lb3.example.com:7400/"]);
    }

    #[test]
    fn those_that_answer_are_counted_and_the_one_that_is_told() {
        let balancers = Balancers::default();
        for host in ["a", "b", "c"] {
            balancers.add(named(&format!("http://{host}:7400")), Source::Flag);
        }
        let [a, b] = [BalancerId(0), BalancerId(1)];
        assert_eq!(balancers.counted(a), 1);
        balancers.set_state(b, AgentState::Reporting { since: tokio::time::Instant::now() });
        assert_eq!((balancers.counted(a), balancers.counted(b)), (2, 1));
        assert!(
            balancers.reports_to(&named("http://b:7400")) && !balancers.reports_to(&named("http://a:7400"))
        );
    }
}
