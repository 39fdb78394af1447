//! Pulling: what a resource registered as its utilization script is executed, and what comes of it is a report.
//!
//! ```text
//! Register -> Script::parse -> Targets::judge -> Puller::follow -> a task for each script:
//!
//!    interval, schedule, flows, an administrator ──► permit ──► pin ──► execute ──► registry.report, Status
//!         ▲                                                                 │
//!         └────────── the next moment; after a failure a longer pause ◄─────┘
//! ```
//!
//! * It owns the tasks, the bound on how many execute at once (permits are given in the order they are asked for, so no
//!   script waits for one that came later), and what is known of each script. It does not own what a report means.
//! * A script that hangs holds one permit for two seconds and delays nobody else; a script that fails rests. A task ends with
//!   its registration.

mod execute;
mod script;
mod target;
mod timing;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use allocation::ResourceId;
use api::v1::{self, UtilizationScript};
use chrono::Utc;
use fetch::Tls;
use formats::agent_check::Wish;
use registry::{Labels, RawUtilization, Readiness, Registration, Renewal, Report, ReportError, Utilization};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use self::execute::{Executor, Harvest, PullError, WITHIN};
use self::script::Kind;
pub(crate) use self::script::{Script, ScriptError};
pub(crate) use self::target::TargetError;
use self::target::Targets;
pub use self::target::{Allowed, NotAllowed};
use self::timing::Timing;
use crate::metrics::{PullResult, PullSource};
use crate::{Shared, parse};

/// How long a registration waits for the script's first execution. Agents wait 2 s for the whole answer.
const FIRST_WITHIN: Duration = Duration::from_millis(1500);
/// How long an administrator waits: the queue, and one execution.
const ASKED_WITHIN: Duration = Duration::from_secs(10);
/// Administrators that wait for one script.
const ASKING_MAX: usize = 4;
/// How often flows are counted for scripts that go by them.
const FLOWS_LOOK: Duration = Duration::from_millis(250);
/// An ORCA server may send less often than it is asked to; gRPC's own do so every 30 s at least.
const STREAM_PATIENCE_MIN: Duration = Duration::from_secs(35);
/// Longest account of an execution.
const DETAIL_CHARS_MAX: usize = 256;
/// A stream is read no faster: the rest waits at the sender.
const STREAM_GAP: Duration = Duration::from_millis(100);

/// How utilization scripts are executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullConfig {
    /// Where they may point beside their resource's own address.
    pub allow: Vec<Allowed>,
    /// Most at once.
    pub at_once: usize,
    /// A PEM file of authorities that HTTPS believes beside the system's.
    pub ca: Option<PathBuf>,
}

impl Default for PullConfig {
    fn default() -> Self {
        Self { allow: Vec::new(), at_once: 64, ca: None }
    }
}

/// All scripts.
pub(crate) struct Puller {
    targets: Targets,
    permits: Semaphore,
    tls: Tls,
    scripts: Mutex<HashMap<ResourceId, Followed>>,
}

/// A script with its task. The task ends when this is dropped.
struct Followed {
    pulled: Arc<Pulled>,
    task: AbortHandle,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is known of one script.
struct Pulled {
    script: Script,
    /// As it came.
    wire: UtilizationScript,
    /// As it came last: what an agent-check asks for is on top of it.
    base: Mutex<Arc<Registration>>,
    /// What the resource says of itself on its stream, if it has one.
    says_ready: AtomicBool,
    status: Mutex<Known>,
    asking: mpsc::Sender<oneshot::Sender<v1::PullStatus>>,
}

/// What came of it so far.
#[derive(Debug, Clone, Default)]
struct Known {
    result: Option<PullResult>,
    detail: String,
    at: Option<Instant>,
    failures: u32,
    total: u64,
    /// What was logged of the failures in a row.
    said: String,
    /// By an agent-check.
    wants_flows: Option<bool>,
}

/// Why nothing can be executed for an administrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PullRefused {
    #[error("it has no utilization script: it reports by itself")]
    NoScript,
    #[error("{ASKING_MAX} others wait for this script already")]
    Busy,
    #[error("the script was not executed within {ASKED_WITHIN:?}")]
    Late,
}

impl Puller {
    /// `ours`: where this balancer listens itself.
    pub(crate) fn new(config: PullConfig, tls: Tls, ours: Vec<SocketAddr>) -> Self {
        Self {
            targets: Targets::new(config.allow, ours),
            permits: Semaphore::new(config.at_once.max(1)),
            tls,
            scripts: Mutex::default(),
        }
    }

    fn scripts(&self) -> MutexGuard<'_, HashMap<ResourceId, Followed>> {
        self.scripts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pulled(&self, id: &ResourceId) -> Option<Arc<Pulled>> {
        self.scripts().get(id).map(|followed| Arc::clone(&followed.pulled))
    }

    /// Whether a script may point where it does, as far as that is known without looking a name up.
    pub(crate) fn judge(&self, registration: &Registration, script: &Script) -> Result<(), TargetError> {
        let (host, port) = script.kind.target();
        self.targets.judge(registration.address().ip(), host, port)
    }

    /// The address that may be asked for a URL of a resource, by the same rules as for its script, and how HTTPS is spoken.
    pub(crate) async fn pin_url(
        &self,
        registration: &Registration,
        url: &fetch::Url,
        within: Duration,
    ) -> Result<(SocketAddr, &Tls), TargetError> {
        let resource = registration.address().ip();
        let address = self.targets.pin(resource, url.host(), url.port(), within).await?;
        Ok((address, &self.tls))
    }

    /// Follows the script of a resource that has just registered, and gives what came of its first execution; `None`: it was
    /// followed already. A resource without one is followed no longer.
    pub(crate) async fn follow(
        shared: &Arc<Shared>,
        registration: Registration,
        script: Option<(Script, UtilizationScript)>,
    ) -> Option<v1::PullStatus> {
        let puller = &shared.puller;
        let Some((script, wire)) = script else {
            puller.scripts().remove(registration.id());
            return None;
        };
        let first = puller.start(shared, registration, script, wire)?;
        let answered = timeout(FIRST_WITHIN, first).await;
        let late = || v1::PullStatus {
            detail: format!("not executed within {FIRST_WITHIN:?} yet: it goes on"),
            ..v1::PullStatus::default()
        };
        Some(answered.map_or_else(|_| late(), |status| status.unwrap_or_else(|_| late())))
    }

    /// `None`: it is followed already.
    fn start(
        &self,
        shared: &Arc<Shared>,
        registration: Registration,
        script: Script,
        wire: UtilizationScript,
    ) -> Option<oneshot::Receiver<v1::PullStatus>> {
        let mut scripts = self.scripts();
        let id = registration.id().clone();
        let registration = Arc::new(registration);
        if let Some(Followed { pulled, .. }) = scripts.get(&id) {
            let mut base = pulled.base();
            let same = base.incarnation() == registration.incarnation()
                && base.address() == registration.address()
                && base.pool() == registration.pool();
            if same && pulled.wire == wire {
                *base = registration;
                return None;
            }
        }
        let (asking, asked) = mpsc::channel(ASKING_MAX);
        let (answer, first) = oneshot::channel();
        let pulled = Arc::new(Pulled {
            script,
            wire,
            base: Mutex::new(registration),
            says_ready: AtomicBool::new(true),
            status: Mutex::default(),
            asking,
        });
        let follower = Follower::new(Arc::clone(shared), Arc::clone(&pulled), id.clone());
        let task = tokio::spawn(follower.run(asked, answer)).abort_handle();
        scripts.insert(id, Followed { pulled, task });
        Some(first)
    }

    /// The registration has ended, unless it was made anew meanwhile.
    pub(crate) fn forget(&self, registry: &registry::Registry, id: &ResourceId) {
        let mut scripts = self.scripts();
        if registry.registered(id).is_none() {
            scripts.remove(id);
        }
    }

    /// Executes a script now.
    pub(crate) async fn ask(&self, id: &ResourceId) -> Result<v1::PullStatus, PullRefused> {
        let pulled = self.pulled(id).ok_or(PullRefused::NoScript)?;
        let (answer, answered) = oneshot::channel();
        pulled.asking.try_send(answer).map_err(|_| PullRefused::Busy)?;
        let answered = timeout(ASKED_WITHIN, answered).await.map_err(|_| PullRefused::Late)?;
        answered.map_err(|_| PullRefused::NoScript)
    }

    /// A sign of life of a resource whose utilization is pulled; `None`: it is not.
    pub(crate) fn renewal(
        &self,
        id: &ResourceId,
        incarnation: u64,
        readiness: Readiness,
        labels: Option<Labels>,
    ) -> Option<Renewal> {
        let pulled = self.pulled(id)?;
        let says_ready = readiness == Readiness::Ready;
        pulled.says_ready.store(says_ready, Relaxed);
        let ready = says_ready && pulled.status().wants_flows.unwrap_or(true);
        let readiness = if ready { Readiness::Ready } else { Readiness::NotReady };
        Some(Renewal { id: id.clone(), incarnation, readiness, labels })
    }

    /// A resource's script with what came of it.
    pub(crate) fn script(&self, id: &ResourceId) -> Option<UtilizationScript> {
        let pulled = self.pulled(id)?;
        let mut wire = pulled.wire.clone();
        wire.status = Some(pulled.wire_status());
        hide_query(&mut wire, &pulled.script.kind);
        Some(wire)
    }

    /// The same in words, for explanations.
    pub(crate) fn note(&self, id: &ResourceId) -> Option<String> {
        let pulled = self.pulled(id)?;
        let (kind, known) = (pulled.script.kind.name(), pulled.status().clone());
        let age = known.at.map_or(0.0, |at| at.elapsed().as_secs_f64());
        Some(match known.result {
            None => format!("utilization script ({kind}): not executed yet"),
            Some(PullResult::Accepted) if known.detail.is_empty() => {
                format!("utilization script ({kind}): accepted {age:.1}s ago")
            }
            Some(PullResult::Accepted) => {
                format!("utilization script ({kind}): accepted {age:.1}s ago: {}", known.detail)
            }
            Some(result) => format!(
                "utilization script ({kind}): {} {} times in a row, last {age:.1}s ago: {}",
                result.name(),
                known.failures,
                known.detail
            ),
        })
    }
}

/// The values that a report may have; its labels stand above the registered ones.
fn parse_report(
    base: &Registration,
    utilization: RawUtilization,
    labels: Option<Labels>,
) -> Result<(Utilization, Option<Labels>), PullError> {
    let utilization = Utilization::parse(utilization)?;
    let labels = labels.map(|above| {
        let mut all = base.labels().clone();
        all.extend(above);
        registry::parse_labels(all.into_iter().collect())
    });
    Ok((utilization, labels.transpose()?))
}

/// There may be a secret in it.
fn hide_query(wire: &mut UtilizationScript, kind: &Kind) {
    if let (Some(v1::utilization_script::Kind::Http(http)), Kind::Http { url, .. }) = (&mut wire.kind, kind) {
        http.url = url.to_string();
    }
    if let Some(v1::utilization_script::Kind::AgentCheck(check)) = &mut wire.kind
        && !check.send.is_empty()
    {
        check.send = "…".to_owned();
    }
}

impl Pulled {
    fn base(&self) -> MutexGuard<'_, Arc<Registration>> {
        self.base.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> MutexGuard<'_, Known> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wire_status(&self) -> v1::PullStatus {
        let known = self.status().clone();
        v1::PullStatus {
            result: known.result.map(|result| result.name().to_owned()).unwrap_or_default(),
            detail: known.detail,
            age: known.at.map(|at| parse::wire_duration(at.elapsed())),
            failures_in_a_row: known.failures,
            executions_total: known.total,
        }
    }
}

/// The registration is gone: nothing is left to follow.
struct Gone;

/// The task of one script.
struct Follower {
    shared: Arc<Shared>,
    pulled: Arc<Pulled>,
    id: ResourceId,
    executor: Executor,
    timing: Timing,
    /// The script's address, once it is known.
    pinned: Option<SocketAddr>,
}

impl Follower {
    fn new(shared: Arc<Shared>, pulled: Arc<Pulled>, id: ResourceId) -> Self {
        let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), id.as_str());
        let timing = Timing::new(Instant::now(), 0, seed);
        Self { shared, pulled, id, executor: Executor::new(), timing, pinned: None }
    }

    async fn run(
        mut self,
        mut asked: mpsc::Receiver<oneshot::Sender<v1::PullStatus>>,
        first: oneshot::Sender<v1::PullStatus>,
    ) {
        let mut answer = Some(first);
        loop {
            if self.execute().await.is_err() {
                break;
            }
            if let Some(answer) = answer.take() {
                // Whoever asked may have gone.
                let _ = answer.send(self.pulled.wire_status());
            }
            match self.wait(&mut asked).await {
                Ok(asker) => answer = asker,
                Err(Gone) => break,
            }
        }
        self.shared.puller.forget(&self.shared.registry, &self.id);
    }

    /// Returns when the script is to be executed, with whoever asked for it.
    async fn wait(
        &mut self,
        asked: &mut mpsc::Receiver<oneshot::Sender<v1::PullStatus>>,
    ) -> Result<Option<oneshot::Sender<v1::PullStatus>>, Gone> {
        let pulled = Arc::clone(&self.pulled);
        let when = &pulled.script.when;
        loop {
            let (at, is_due) = self.timing.next(Instant::now(), when.until_scheduled(Utc::now()));
            let look = if when.after_flows > 0 { FLOWS_LOOK } else { Duration::from_secs(3600) };
            tokio::select! {
                () = sleep_until(at) => {
                    if is_due {
                        return Ok(None);
                    }
                }
                () = sleep(look) => {
                    let flows = self.flows()?;
                    if self.timing.is_due_by_flows(when, Instant::now(), flows) {
                        return Ok(None);
                    }
                }
                asker = asked.recv() => return Ok(asker),
                harvest = self.executor.next_of_stream(self.pinned) => {
                    self.take(harvest)?;
                    sleep(STREAM_GAP).await;
                }
            }
        }
    }

    /// Flows given to the resource so far.
    fn flows(&self) -> Result<u64, Gone> {
        let (registration, flows) = self.shared.registry.registered(&self.id).ok_or(Gone)?;
        let is_ours = registration.incarnation() == self.pulled.base().incarnation();
        if is_ours { Ok(flows) } else { Err(Gone) }
    }

    async fn execute(&mut self) -> Result<(), Gone> {
        // Nobody closes the semaphore.
        let shared = Arc::clone(&self.shared);
        let permit = shared.puller.permits.acquire().await;
        let harvest = self.ask().await;
        drop(permit);
        self.take(harvest)
    }

    async fn ask(&mut self) -> Result<Harvest, PullError> {
        let pulled = Arc::clone(&self.pulled);
        let kind = &pulled.script.kind;
        let puller = &self.shared.puller;
        let address = match self.pinned {
            Some(address) => address,
            None => {
                let (host, port) = kind.target();
                let resource = pulled.base().address().ip();
                let pinned = puller.targets.pin(resource, host, port, WITHIN).await?;
                *self.pinned.insert(pinned)
            }
        };
        let interval = pulled.script.when.every(Utc::now());
        self.executor.execute(kind, address, interval, &puller.tls).await
    }

    /// What came is made a report, or a failure, and the next moment follows from it.
    fn take(&mut self, harvest: Result<Harvest, PullError>) -> Result<(), Gone> {
        let flows = self.flows()?;
        let pulled = Arc::clone(&self.pulled);
        let when = &pulled.script.when;
        let reported = match harvest {
            Ok(harvest) => self.report(harvest)?,
            Err(error) => Err(error),
        };
        let now = Instant::now();
        match &reported {
            Ok(_) => {
                self.timing.accepted(when, now, flows);
                match when.interval {
                    Some(interval) if self.executor.has_stream() => {
                        self.timing.streams(now, (interval * 3).max(STREAM_PATIENCE_MIN));
                    }
                    // Between scheduled looks nothing is held open.
                    _ => self.executor.close_stream(),
                }
            }
            Err(_) => {
                self.executor.close_stream();
                self.timing.failed(when, now, flows);
            }
        }
        self.note(reported);
        Ok(())
    }

    /// Gives the registry what was harvested; what is noteworthy about it.
    fn report(&self, harvest: Harvest) -> Result<Result<String, PullError>, Gone> {
        let base = Arc::clone(&self.pulled.base());
        match harvest {
            Harvest::Wish(wish) => self.follow_wish(&base, &wish).map(Ok),
            Harvest::Utilization { utilization, labels } => {
                self.report_utilization(&base, utilization, labels)
            }
        }
    }

    fn report_utilization(
        &self,
        base: &Registration,
        utilization: RawUtilization,
        labels: Option<Labels>,
    ) -> Result<Result<String, PullError>, Gone> {
        let registry = &self.shared.registry;
        let (utilization, labels) = match parse_report(base, utilization, labels) {
            Ok(parsed) => parsed,
            Err(error) => {
                registry
                    .report_refused(&self.id, base.incarnation(), self.shared.clock.now())
                    .map_err(|_: ReportError| Gone)?;
                return Ok(Err(error));
            }
        };
        let report = Report {
            id: self.id.clone(),
            incarnation: base.incarnation(),
            readiness: self.readiness(true),
            utilization,
            balancers: 0,
            labels,
        };
        registry.report(report, self.shared.clock.now()).map_err(|_: ReportError| Gone)?;
        self.shared.changed.notify_one();
        Ok(Ok(String::new()))
    }

    /// What an agent-check wants takes effect; gives it in words.
    fn follow_wish(&self, base: &Registration, wish: &Wish) -> Result<String, Gone> {
        self.pulled.status().wants_flows = Some(wish.is_ready());
        self.amend(base, wish.weight_of(base.weight()), wish.maxconn.unwrap_or_else(|| base.flows_max()));
        let renewal = Renewal {
            id: self.id.clone(),
            incarnation: base.incarnation(),
            readiness: self.readiness(wish.is_ready()),
            labels: None,
        };
        let now = self.shared.clock.now();
        self.shared.registry.renew(renewal, now).map_err(|_: ReportError| Gone)?;
        self.shared.changed.notify_one();
        Ok(wish.to_string())
    }

    /// It is ready where both say so: what was pulled, and the resource on its stream, if it has one.
    fn readiness(&self, pulled: bool) -> Readiness {
        let ready = pulled && self.pulled.says_ready.load(Relaxed);
        if ready { Readiness::Ready } else { Readiness::NotReady }
    }

    /// Registers the weight and the limit that an agent-check asks for, where they are not in force.
    fn amend(&self, base: &Registration, weight: f32, flows_max: u32) {
        let amended = base.amended(weight, flows_max);
        let is_in_force =
            |now: &Registration| now.weight() == amended.weight() && now.flows_max() == amended.flows_max();
        let registry = &self.shared.registry;
        let in_force = registry.registered(&self.id);
        if in_force.is_some_and(|(now, _)| now.incarnation() == base.incarnation() && !is_in_force(&now)) {
            // Refused only where the registration was replaced at this moment: the report will find out.
            drop(registry.register(amended, self.shared.clock.now()));
        }
    }

    /// Counts, keeps and says what came of an execution; each failure once until one is accepted.
    fn note(&self, reported: Result<String, PullError>) {
        let (result, detail) = match reported {
            Ok(detail) => (PullResult::Accepted, detail),
            Err(error) if error.is_refusal() => (PullResult::Refused, error.to_string()),
            Err(error) => (PullResult::Failed, error.to_string()),
        };
        // A peer's own words may be in it.
        let detail: String = detail.chars().filter(|c| !c.is_control()).take(DETAIL_CHARS_MAX).collect();
        let kind = &self.pulled.script.kind;
        let source = match kind {
            Kind::Http { .. } => PullSource::Http,
            Kind::Orca { .. } => PullSource::Orca,
            Kind::AgentCheck { .. } => PullSource::AgentCheck,
        };
        self.shared.metrics.pulled(source, result);
        let mut known = self.pulled.status();
        let is_news = result != PullResult::Accepted && known.said != detail;
        let is_over = result == PullResult::Accepted && !known.said.is_empty();
        known.said = if result == PullResult::Accepted { String::new() } else { detail.clone() };
        (known.result, known.at, known.failures) =
            (Some(result), Some(Instant::now()), self.timing.failures());
        known.total += 1;
        known.detail = detail;
        if is_news {
            tracing::warn!(
                resource = %self.id, script = kind.name(), why = known.detail,
                "the utilization script gave no report; it is tried again"
            );
        } else if is_over {
            tracing::info!(resource = %self.id, script = kind.name(), "the utilization script gives reports again");
        }
    }
}
