//! Active checks: who is checked, how many at once, and what follows from a result.
//!
//! ```text
//! a pool's members ──► a task for each ──► permit ──► Check::begin ──► Schedule ──► registry.checked, log, event
//!                        ▲                                │                │
//!                        │                      late: the open dialogue    │
//!                        └──── the next pause ◄───────────┴────────────────┘
//! ```
//!
//! * It owns the tasks, the bound on how many checks run at once, and what is known of each resource's checks. It does not own
//!   what is said (crate `checks`) or what a result means for new flows (`registry::health`).
//! * A task ends with its registration: a dialogue that goes on then is had to its end, and nothing follows from it.
//! * At most one connection of a check is open to a resource. Where one got no answer in time, the next checks wait with it, up
//!   to [`WAITS_MAX`]; they hold no permit, so servers that hang keep nobody else from being checked.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use allocation::ResourceId;
use api::v1;
use checks::{Begun, Change, Check, CheckConfig, Outcome, Schedule, Subject, Verdict, Waiting};
use registry::CheckTarget;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, sleep, sleep_until};

use crate::metrics::Text;
use crate::{Phase, Pool, Shared, parse, reached, remembered};

/// Checks that run at once; the others wait for their turn.
const AT_ONCE: usize = 256;
/// How often it is looked who has come and gone.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a dialogue without an answer is left open before it is given up and another begun: a server whose process was
/// replaced never answers it.
const WAITS_MAX: Duration = Duration::from_secs(30);
/// Upper bounds of the histogram of times, in seconds.
const BOUNDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// All checks.
pub(crate) struct Checker {
    permits: Semaphore,
    /// By the pool's place.
    pools: Vec<Option<PoolChecks>>,
    followed: Mutex<HashMap<ResourceId, Followed>>,
}

/// The check of one pool.
struct PoolChecks {
    check: Arc<Check>,
    took: Mutex<Took>,
}

/// How long checks took.
#[derive(Default)]
struct Took {
    /// By bound, the last above all of them.
    counts: [u64; BOUNDS.len() + 1],
    sum_seconds: f64,
}

/// A resource that is checked. Its task ends when this is dropped.
struct Followed {
    target: CheckTarget,
    known: Arc<Mutex<Known>>,
    _stays: oneshot::Sender<()>,
}

/// What came of a resource's checks so far.
#[derive(Debug, Clone, Default)]
struct Known {
    is_up: Option<bool>,
    /// Of the newest.
    verdict: Option<Verdict>,
    said: String,
    at: Option<Instant>,
    took: Duration,
    in_a_row: u32,
    /// By [`Verdict`].
    counts: [u64; Verdict::ALL.len()],
}

/// Why there is no such check: the operator's to mend.
#[derive(Debug, thiserror::Error)]
#[error("pool.check.tls.ca of pool {pool}: {why}")]
pub struct CheckError {
    pool: String,
    why: fetch::CaError,
}

impl Checker {
    /// Reads what the pools' checks name.
    pub(crate) fn new(pools: &[Pool]) -> Result<Self, CheckError> {
        let check = |pool: &Pool| {
            let wrong = |why| CheckError { pool: pool.config.name.to_string(), why };
            let check = pool.check.clone().map(Check::new).transpose().map_err(wrong)?;
            Ok(check.map(|check| PoolChecks { check: Arc::new(check), took: Mutex::default() }))
        };
        Ok(Self {
            permits: Semaphore::new(AT_ONCE),
            pools: pools.iter().map(check).collect::<Result<_, _>>()?,
            followed: Mutex::default(),
        })
    }

    /// The check of a pool, by its place.
    pub(crate) fn check(&self, pool: usize) -> Option<&Arc<Check>> {
        self.pools.get(pool)?.as_ref().map(|pool| &pool.check)
    }

    fn followed(&self) -> MutexGuard<'_, HashMap<ResourceId, Followed>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, id: &ResourceId) -> Option<(&CheckConfig, Known)> {
        let followed = self.followed();
        let followed = followed.get(id)?;
        let known = lock(&followed.known).clone();
        Some((self.check(followed.target.pool)?.config(), known))
    }

    /// What came of a resource's checks; `None`: it has none.
    pub(crate) fn status(&self, id: &ResourceId) -> Option<v1::CheckStatus> {
        let (config, known) = self.known(id)?;
        let passed = known.counts[Verdict::Passed as usize];
        Some(v1::CheckStatus {
            kind: config.dialogue.kind().to_owned(),
            state: known.state().to_owned(),
            result: known.verdict.map(|verdict| verdict.name().to_owned()).unwrap_or_default(),
            detail: known.said,
            age: known.at.map(|at| parse::wire_duration(at.elapsed())),
            in_a_row: known.in_a_row,
            seconds: known.took.as_secs_f64(),
            passed_total: passed,
            failed_total: known.counts.iter().sum::<u64>() - passed,
        })
    }

    /// The same in words, for explanations.
    pub(crate) fn note(&self, id: &ResourceId) -> Option<String> {
        let (config, known) = self.known(id)?;
        let kind = config.dialogue.kind();
        let (Some(verdict), Some(at)) = (known.verdict, known.at) else {
            return Some(format!("check ({kind}): no result yet"));
        };
        let (age, times) = (at.elapsed().as_secs_f64(), known.in_a_row);
        Some(format!("check ({kind}): {verdict} {times} times in a row, last {age:.1}s ago: {}", known.said))
    }

    /// Follows who has come, and leaves who has gone.
    fn follow(shared: &Arc<Shared>, place: usize) {
        let checker = &shared.checker;
        let targets = shared.registry.check_targets(place);
        let mut followed = checker.followed();
        let ids: HashSet<&ResourceId> = targets.iter().map(|target| &target.id).collect();
        followed.retain(|id, followed| followed.target.pool != place || ids.contains(id));
        for target in &targets {
            if followed.get(&target.id).is_some_and(|followed| followed.target == *target) {
                continue;
            }
            let (stays, gone) = oneshot::channel();
            let known = Arc::new(Mutex::new(Known::default()));
            let follower = Follower::new(shared, target.clone(), Arc::clone(&known));
            drop(tokio::spawn(follower.run(gone)));
            followed.insert(target.id.clone(), Followed { target: target.clone(), known, _stays: stays });
        }
    }

    /// Writes the series of checks.
    pub(crate) fn write(&self, text: &mut Text, pools: &[Pool]) {
        let checked = || pools.iter().zip(&self.pools).filter_map(|(pool, of)| Some((pool, of.as_ref()?)));
        if checked().next().is_none() {
            return;
        }
        let all: Vec<(String, String, Known)> = {
            let followed = self.followed();
            let mut all: Vec<_> = followed.values().collect();
            all.sort_by(|a, b| a.target.id.cmp(&b.target.id));
            let name = |of: &Followed| pools[of.target.pool].config.name.to_string();
            all.iter().map(|of| (name(of), of.target.id.to_string(), lock(&of.known).clone())).collect()
        };
        let total = "trimtab_checks_total";
        text.family(total, "counter", "Active checks of a resource, by what they came to.");
        for (pool, resource, known) in &all {
            for (verdict, count) in Verdict::ALL.iter().zip(known.counts) {
                let labels = [("pool", pool.as_str()), ("resource", resource), ("result", verdict.name())];
                text.sample(total, &labels, count as f64);
            }
        }
        let up = "trimtab_resource_check_up";
        text.family(up, "gauge", "Whether a resource's active checks pass; none before the first result.");
        for (pool, resource, known) in &all {
            if let Some(is_up) = known.is_up {
                let labels = [("pool", pool.as_str()), ("resource", resource.as_str())];
                text.sample(up, &labels, f64::from(u8::from(is_up)));
            }
        }
        let seconds = "trimtab_check_seconds";
        text.family(seconds, "histogram", "Time from the connect of an active check to the answer.");
        for (pool, of) in checked() {
            let took = of.took.lock().unwrap_or_else(PoisonError::into_inner);
            let counted = (&BOUNDS[..], &took.counts[..], took.sum_seconds);
            text.histogram(seconds, &[("pool", pool.config.name.as_str())], counted);
        }
    }
}

impl PoolChecks {
    fn took(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let mut all = self.took.lock().unwrap_or_else(PoisonError::into_inner);
        all.counts[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        all.sum_seconds += seconds;
    }
}

impl Known {
    fn state(&self) -> &'static str {
        match self.is_up {
            None => "unknown",
            Some(true) => "up",
            Some(false) => "down",
        }
    }
}

fn lock(known: &Mutex<Known>) -> MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sees who comes and goes, until it is aborted; ends at once where no pool is checked.
pub(crate) async fn run(shared: Arc<Shared>) {
    let places = (0..shared.pools.len()).filter(|place| shared.checker.check(*place).is_some());
    // Epochs of members begin at 1.
    let mut pools: Vec<(usize, u64)> = places.map(|place| (place, 0)).collect();
    if pools.is_empty() {
        return;
    }
    let mut terminated = std::pin::pin!(reached(shared.phase.clone(), Phase::Terminated));
    loop {
        for (place, seen) in &mut pools {
            let epoch = shared.pools[*place].publishers[0].current().members().epoch();
            if epoch != *seen {
                *seen = epoch;
                Checker::follow(&shared, *place);
            }
        }
        tokio::select! {
            () = &mut terminated => break,
            () = sleep(LOOK_EVERY) => {}
        }
    }
    // Every task ends: nobody is checked by a balancer that has gone.
    shared.checker.followed().clear();
}

/// The task of one resource.
struct Follower {
    shared: Arc<Shared>,
    target: CheckTarget,
    subject: Subject,
    known: Arc<Mutex<Known>>,
    schedule: Schedule,
}

impl Follower {
    fn new(shared: &Arc<Shared>, target: CheckTarget, known: Arc<Mutex<Known>>) -> Self {
        let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), target.id.as_str());
        let timing = shared.checker.check(target.pool).map(|check| check.config().timing);
        let subject = Subject {
            resource: target.id.to_string(),
            pool: shared.pools[target.pool].config.name.to_string(),
            address: target.address,
        };
        let schedule = Schedule::new(timing.unwrap_or_default(), seed);
        Self { shared: Arc::clone(shared), target, subject, known, schedule }
    }

    async fn run(mut self, mut gone: oneshot::Receiver<()>) {
        let shared = Arc::clone(&self.shared);
        let Some(check) = shared.checker.check(self.target.pool) else { return };
        loop {
            let permit = tokio::select! {
                permit = shared.checker.permits.acquire() => permit,
                _ = &mut gone => return,
            };
            let began = Instant::now();
            let begun = check.begin(&self.subject).await;
            drop(permit);
            if gone.try_recv() != Err(oneshot::error::TryRecvError::Empty) {
                return;
            }
            let next = match begun {
                Begun::Ended(outcome) => began + self.take(&outcome),
                Begun::Late(outcome, waiting) => {
                    let next = began + self.take(&outcome);
                    let limit = check.config().timeout;
                    tokio::select! {
                        next = self.wait_out(outcome, waiting, next, limit) => next,
                        _ = &mut gone => return,
                    }
                }
            };
            tokio::select! {
                () = sleep_until(next) => {}
                _ = &mut gone => return,
            }
        }
    }

    /// Waits with a dialogue that got no answer in time. A check that is due meanwhile, the first one at `next`, has none either
    /// when its own time is over. Gives when to begin another.
    async fn wait_out(
        &mut self,
        late: Outcome,
        mut waiting: Waiting,
        next: Instant,
        limit: Duration,
    ) -> Instant {
        let mut due = next.max(Instant::now());
        let given_up = due + WAITS_MAX;
        loop {
            tokio::select! {
                () = waiting.ended() => return Instant::now() + self.schedule.soon(),
                () = sleep_until(due + limit) => {}
            }
            due = (due + self.take(&late)).max(Instant::now());
            if due >= given_up {
                return due;
            }
        }
    }

    /// What follows from a result; gives the pause until the next check.
    fn take(&mut self, outcome: &Outcome) -> Duration {
        let (verdict, said) = (outcome.verdict(), outcome.said());
        let passed = verdict == Verdict::Passed;
        let step = self.schedule.record(passed);
        let shared = &self.shared;
        if let Some(Some(pool)) = shared.checker.pools.get(self.target.pool) {
            pool.took(outcome.took);
        }
        {
            let mut known = lock(&self.known);
            known.counts[verdict as usize] += 1;
            (known.is_up, known.in_a_row) = (self.schedule.is_up(), self.schedule.in_a_row());
            (known.verdict, known.at, known.took) = (Some(verdict), Some(Instant::now()), outcome.took);
            known.said.clone_from(&said);
        }
        let is_up = self.schedule.is_up() == Some(true);
        if shared.registry.checked(&self.target, is_up, remembered::LEASE, shared.clock.now()) {
            shared.changed.notify_one();
        }
        if let Some(change) = step.change {
            self.tell(change, verdict, &said);
        }
        step.pause
    }

    fn tell(&self, change: Change, verdict: Verdict, said: &str) {
        let Self { target, subject, .. } = self;
        let times = self.schedule.in_a_row();
        match change {
            Change::Up => tracing::info!(
                resource = %target.id, pool = subject.pool, times, said, "its checks pass: it gets new flows"
            ),
            Change::Down => tracing::warn!(
                resource = %target.id, pool = subject.pool, times, result = verdict.name(), said,
                "its checks fail: it gets no new flows"
            ),
        }
        self.shared.keep_check(&target.id, &subject.pool, change == Change::Up, said);
    }
}
