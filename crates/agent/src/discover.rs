//! Following balancers in DNS: which of those that SRV names this agent registers with.
//!
//! ```text
//! look --TTL--> look --TTL--> …      Choice: what DNS said + who answers -> with whom to be registered
//! ```
//!
//! * With every balancer of the lowest priority number. When none of those has answered for [`GONE_AFTER`], with those of
//!   the next number as well; no longer once one of the former answers again.
//! * What DNS does not name any more is left, but not before somebody that it does name answers.
//! * That DNS does not answer changes nothing; that it knows no balancer at all may be its mistake: who still answers is
//!   kept.
//!
//! Owns: that choice. Does not own: the questions (`discovery`), and the lives (`balancers`).

use std::convert::Infallible;
use std::time::Duration;

use discovery::{FindError, Finder, Found, Group, Target};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tracing::{debug, info, warn};

use crate::agent::Common;
use crate::backoff::Backoff;
use crate::balancers::{Balancer, Source};
use crate::said::Said;

/// How long none of a priority may answer before the next one is used. A balancer that restarts is back sooner, and an
/// agent that starts has registered by then.
const GONE_AFTER: Duration = Duration::from_secs(5);
/// How long one that DNS does not name any more is kept while nobody else answers.
const KEPT_AT_MOST: Duration = Duration::from_secs(10);
/// Balancers that an agent registers with; of more, each agent takes its own draw by weight (RFC 2782).
const BALANCERS_MAX: usize = 16;
/// How often it is looked who answers. A few comparisons.
const LOOK_AT_STATES_EVERY: Duration = Duration::from_millis(250);
/// Pauses after DNS did not answer.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Follows for ever.
pub(crate) async fn follow(finder: &Finder, common: &Common) -> Infallible {
    let mut choice = Choice::new(common.config.seed);
    let mut backoff = Backoff::new(PAUSE_FIRST, PAUSE_MAX, common.config.seed);
    let mut troubles = Said::default();
    let mut tick = interval(LOOK_AT_STATES_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next = Instant::now();
    loop {
        let look = look_at(next, finder);
        tokio::pin!(look);
        let answer = loop {
            tokio::select! {
                answer = &mut look => break answer,
                _ = tick.tick() => choose(&mut choice, common),
            }
        };
        let now = Instant::now();
        next = now
            + match answer {
                Ok(found) => {
                    troubles.forget();
                    backoff.reset();
                    let fresh_for = found.fresh_for;
                    choice.hear(found, now, &finder.name());
                    fresh_for
                }
                Err(error) => {
                    if troubles.is_new(&error.to_string()) {
                        warn!(%error, "looking for balancers; what is known of them stays");
                    } else {
                        debug!(%error, "still no answer");
                    }
                    backoff.pause().max(PAUSE_FIRST / 2)
                }
            };
        choose(&mut choice, common);
    }
}

async fn look_at(next: Instant, finder: &Finder) -> Result<Found, FindError> {
    sleep_until(next).await;
    finder.look().await
}

fn choose(choice: &mut Choice, common: &Common) {
    let balancers = &common.balancers;
    let found = |target: &Target| Balancer::found(target, common.config.transport.scheme());
    let answers = |target: &Target| found(target).is_some_and(|balancer| balancers.reports_to(&balancer));
    let wanted = choice.wanted(Instant::now(), answers);
    balancers.set_of(Source::Discovery, wanted.iter().filter_map(found).collect());
}

/// What DNS said, and what follows from it.
#[derive(Debug)]
struct Choice {
    seed: u64,
    groups: Vec<Group>,
    /// Since when none of a priority answers, for those in use.
    silent: Vec<(u16, Instant)>,
    /// In use, and not named by the last answer.
    left_out: Vec<LeftOut>,
    /// What was wanted last.
    used: Vec<Target>,
    /// Whether there was any answer, for the log.
    heard: bool,
}

#[derive(Debug)]
struct LeftOut {
    target: Target,
    since: Instant,
    /// The answer named nobody.
    by_none: bool,
}

impl Choice {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            groups: Vec::new(),
            silent: Vec::new(),
            left_out: Vec::new(),
            used: Vec::new(),
            heard: false,
        }
    }

    /// DNS answered.
    fn hear(&mut self, found: Found, now: Instant, name: &str) {
        let mut groups = found.groups;
        for target in groups.iter_mut().flat_map(|group| &mut group.targets) {
            // Its addresses could not be found out now: those from before are the best guess.
            if target.addresses.is_empty()
                && let Some(known) = self.all().find(|known| is_same(known, target))
            {
                target.addresses.clone_from(&known.addresses);
            }
        }
        let by_none = groups.is_empty();
        let is_named = |target: &Target| {
            groups.iter().flat_map(|group| &group.targets).any(|named| is_same(named, target))
        };
        self.left_out.retain(|left_out| !is_named(&left_out.target));
        for left_out in &mut self.left_out {
            left_out.by_none &= by_none;
        }
        for target in self.used.iter().filter(|used| !is_named(used)) {
            if !self.left_out.iter().any(|left_out| is_same(&left_out.target, target)) {
                self.left_out.push(LeftOut { target: target.clone(), since: now, by_none });
            }
        }
        if groups != self.groups || !self.heard {
            let shown: Vec<String> = groups.iter().map(shown).collect();
            match (by_none, self.heard) {
                (true, true) => warn!(name, "DNS knows no balancer any more; those that answer are kept"),
                (true, false) => info!(name, "DNS knows no balancer yet"),
                (false, _) => info!(name, found = shown.join("; "), "balancers in DNS"),
            }
        }
        self.groups = groups;
        self.heard = true;
    }

    /// With whom to be registered now. `answers`: who answers reports.
    fn wanted(&mut self, now: Instant, answers: impl Fn(&Target) -> bool) -> Vec<Target> {
        let mut wanted = Vec::new();
        let mut silent = Vec::new();
        for group in &self.groups {
            // A target without any address cannot be connected to.
            let known = group.targets.iter().filter(|target| !target.addresses.is_empty()).cloned();
            let known = Group { priority: group.priority, targets: known.collect() };
            let is_there = known.targets.iter().any(&answers);
            let room = BALANCERS_MAX.saturating_sub(wanted.len());
            wanted.extend(known.order(self.seed).into_iter().take(room));
            if is_there {
                break;
            }
            let before = self.silent.iter().find(|(priority, _)| *priority == group.priority);
            let since = before.map_or(now, |(_, since)| *since);
            silent.push((group.priority, since));
            if now - since < GONE_AFTER {
                break;
            }
        }
        self.silent = silent;
        let replaced = wanted.iter().any(&answers);
        self.left_out.retain(|left_out| match left_out.by_none {
            true => answers(&left_out.target),
            false => !replaced && now - left_out.since < KEPT_AT_MOST,
        });
        wanted.extend(self.left_out.iter().map(|left_out| left_out.target.clone()));
        self.used.clone_from(&wanted);
        wanted
    }

    fn all(&self) -> impl Iterator<Item = &Target> {
        self.groups.iter().flat_map(|group| &group.targets).chain(&self.used)
    }
}

fn is_same(a: &Target, b: &Target) -> bool {
    (&a.host, a.port) == (&b.host, b.port)
}

/// `priority 10: lb1.example.com:7400, lb2.example.com:7400`
fn shown(group: &Group) -> String {
    let targets: Vec<String> =
        group.targets.iter().map(|target| format!("{}:{}", target.host, target.port)).collect();
    format!("priority {}: {}", group.priority, targets.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(host: &str) -> Target {
        let port = 7400;
        Target { host: host.into(), port, weight: 1, addresses: vec![([127, 0, 0, 1], port).into()] }
    }

    fn found(groups: &[(u16, &[&str])]) -> Found {
        let group = |(priority, hosts): &(u16, &[&str])| Group {
            priority: *priority,
            targets: hosts.iter().map(|host| target(host)).collect(),
        };
        Found { groups: groups.iter().map(group).collect(), fresh_for: Duration::from_secs(1) }
    }

    /// A choice, the time, and who answers.
    struct Case {
        choice: Choice,
        now: Instant,
        answering: Vec<&'static str>,
    }

    impl Case {
        fn new() -> Self {
            Self { choice: Choice::new(1), now: Instant::now(), answering: Vec::new() }
        }

        fn hear(&mut self, groups: &[(u16, &[&str])]) {
            self.choice.hear(found(groups), self.now, "test");
        }

        fn wanted_after(&mut self, seconds: u64) -> Vec<String> {
            self.now += Duration::from_secs(seconds);
            let answering = self.answering.clone();
            let wanted = self.choice.wanted(self.now, |target| answering.contains(&target.host.as_str()));
            let mut hosts: Vec<_> = wanted.into_iter().map(|target| target.host).collect();
            hosts.sort();
            hosts
        }
    }

    #[test]
    fn all_of_the_lowest_number_and_the_next_when_those_are_gone() {
        let mut case = Case::new();
        case.hear(&[(10, &["a", "b"]), (20, &["c"]), (30, &["d"])]);
        assert_eq!(case.wanted_after(0), ["a", "b"]);
        assert_eq!(case.wanted_after(4), ["a", "b"]);
        assert_eq!(case.wanted_after(1), ["a", "b", "c"]);
        case.answering = vec!["c"];
        assert_eq!(case.wanted_after(60), ["a", "b", "c"]);
        // One of them is back, which is enough.
        case.answering = vec!["b", "c"];
        assert_eq!(case.wanted_after(1), ["a", "b"]);
        // Gone again: the patience begins anew.
        case.answering = vec![];
        assert_eq!(case.wanted_after(1), ["a", "b"]);
        assert_eq!(case.wanted_after(5), ["a", "b", "c"]);
        assert_eq!(case.wanted_after(5), ["a", "b", "c", "d"]);
    }

    #[test]
    fn one_that_is_left_out_goes_when_another_is_there() {
        let mut case = Case::new();
        case.hear(&[(10, &["a"])]);
        case.answering = vec!["a"];
        assert_eq!(case.wanted_after(0), ["a"]);
        case.hear(&[(10, &["b"])]);
        assert_eq!(case.wanted_after(0), ["a", "b"], "b does not answer yet");
        case.answering = vec!["a", "b"];
        assert_eq!(case.wanted_after(1), ["b"]);
        // Nobody comes in its place: it is left all the same, in the end.
        case.hear(&[(10, &["c"])]);
        case.answering = vec!["b"];
        assert_eq!(case.wanted_after(9), ["b", "c"]);
        assert_eq!(case.wanted_after(1), ["c"]);
    }

    #[test]
    fn an_empty_answer_takes_away_only_who_does_not_answer() {
        let mut case = Case::new();
        case.hear(&[(10, &["a", "b"])]);
        case.answering = vec!["a"];
        assert_eq!(case.wanted_after(0), ["a", "b"]);
        case.hear(&[]);
        assert_eq!(case.wanted_after(3600), ["a"]);
        case.hear(&[]);
        assert_eq!(case.wanted_after(3600), ["a"]);
        // It is named again, and then by a good answer no more.
        case.hear(&[(10, &["a", "c"])]);
        case.answering = vec!["a", "c"];
        assert_eq!(case.wanted_after(0), ["a", "c"]);
        case.hear(&[(10, &["c"])]);
        assert_eq!(case.wanted_after(0), ["c"]);
    }

    #[test]
    fn addresses_that_cannot_be_found_out_now_stay() {
        let mut case = Case::new();
        case.hear(&[(10, &["a"])]);
        assert_eq!(case.wanted_after(0), ["a"]);
        let mut unresolved = found(&[(10, &["a", "b"])]);
        unresolved.groups[0].targets.iter_mut().for_each(|target| target.addresses.clear());
        case.choice.hear(unresolved, case.now, "test");
        assert_eq!(case.wanted_after(0), ["a"], "where b is nobody knows");
        assert_eq!(case.choice.used[0].addresses, target("a").addresses);
    }

    #[test]
    fn each_agent_draws_its_own_of_many() {
        let hosts: Vec<String> = (0..40).map(|host| format!("lb{host}")).collect();
        let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
        let drawn = |seed| {
            let mut case = Case { choice: Choice::new(seed), ..Case::new() };
            case.hear(&[(10, &hosts)]);
            assert_eq!(case.wanted_after(0), case.wanted_after(0), "it stays with them");
            case.wanted_after(0)
        };
        assert_eq!(drawn(1).len(), BALANCERS_MAX);
        assert_ne!(drawn(1), drawn(2));
    }
}
