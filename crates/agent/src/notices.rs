//! What an agent does about notices: registers with those who stand in, runs the operator's command, ends when told.
//!
//! ```text
//! a session hears it -> known already? its outcome is said again
//!                       new: acts, in a task of its own -> outcome -> the next report to that balancer says so
//! ```
//!
//! A balancer tells a notice until it is taken, so one that is left out here, because too many came at once, comes again.
//!
//! Owns: which notices are known, their outcomes, and who stands in for whom until when. Does not own: the registrations with
//! stand-ins (`balancers`), and the reports that say what became of a notice (`session`).

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use api::v1::notice::Kind;
use api::v1::{Notice, NoticeTaken};
use formats::notice::rfc3339;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, sleep_until};
use tracing::{debug, info, warn};

use crate::agent::Common;
use crate::balancers::{Balancer, BalancerId, Source};
use crate::command::{self, Output};

/// Notices that are remembered, so that none is acted on twice.
const KNOWN_MAX: usize = 256;
/// Notices that are acted on at once.
const ACTING_MAX: usize = 16;
/// Outcomes in one report: what a balancer takes.
const TAKEN_MAX: usize = 16;
/// Alternatives of a notice that are registered with.
const ALTERNATIVES_MAX: usize = 16;
/// How long the operator's command may take.
const COMMAND_WITHIN: Duration = Duration::from_secs(30);
/// Resources do not all register with a stand-in at once: spread over this time, or half of what is left.
const SPREAD_MAX: Duration = Duration::from_secs(30);
/// How long a stand-in may take to answer before the notice counts as one that could not be taken.
const STAND_IN_WITHIN: Duration = Duration::from_secs(10);
/// A stand-in is left once another balancer has answered for so long.
const STEADY: Duration = Duration::from_secs(10);
/// How often it is looked who answers. A few comparisons.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Before it ends at once, an agent has so long to say that it will.
const SAY_SO: Duration = Duration::from_millis(500);

/// An agent's notices.
#[derive(Debug)]
pub(crate) struct Notices {
    state: Mutex<State>,
    /// Counts outcomes.
    changed: watch::Sender<u64>,
    heard: mpsc::Sender<(BalancerId, Notice)>,
    queue: Mutex<Option<mpsc::Receiver<(BalancerId, Notice)>>>,
    /// When the agent is to end.
    end: watch::Sender<Option<Instant>>,
}

#[derive(Debug, Default)]
struct State {
    known: VecDeque<Known>,
    stand_ins: Vec<StandIn>,
}

#[derive(Debug)]
struct Known {
    id: String,
    by: BalancerId,
    outcome: Outcome,
    /// Whether the outcome is to be said in the next report.
    unsaid: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Acting,
    Taken,
    Failed(String),
}

/// Balancers that stand in for another.
#[derive(Debug)]
struct StandIn {
    notice: String,
    for_balancer: BalancerId,
    alternatives: Vec<Balancer>,
    /// Until when the other is away; `None`: until it answers in another session than the one in which it said so.
    away_until: Option<Instant>,
    said_in: Option<u64>,
    /// Since when somebody else has answered.
    steady_since: Option<Instant>,
}

impl Default for Notices {
    fn default() -> Self {
        let (heard, queue) = mpsc::channel(ACTING_MAX);
        Self {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
            heard,
            queue: Mutex::new(Some(queue)),
            end: watch::Sender::new(None),
        }
    }
}

impl Notices {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes when there is an outcome to say.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A balancer says this.
    pub(crate) fn hear(&self, by: BalancerId, notice: Notice) {
        if notice.id.is_empty() {
            // Of a balancer that only tells that it leaves.
            return log(&notice);
        }
        let mut state = self.state();
        if let Some(known) = state.known.iter_mut().find(|known| known.id == notice.id) {
            if known.outcome != Outcome::Acting {
                known.unsaid = true;
                self.changed.send_modify(|count| *count += 1);
            }
            // It said so again, in another session: it has not been away yet.
            for stand_in in state.stand_ins.iter_mut().filter(|stand_in| stand_in.notice == notice.id) {
                stand_in.said_in = None;
            }
            return;
        }
        let acting = Known { id: notice.id.clone(), by, outcome: Outcome::Acting, unsaid: false };
        log(&notice);
        if self.heard.try_send((by, notice)).is_err() {
            debug!("too many notices at once: it will be told again");
            return;
        }
        state.known.push_back(acting);
        if state.known.len() > KNOWN_MAX {
            state.known.pop_front();
        }
    }

    /// What is to be said to this balancer; it counts as said.
    pub(crate) fn take(&self, balancer: BalancerId) -> Vec<NoticeTaken> {
        let mut state = self.state();
        let unsaid = state.known.iter_mut().filter(|known| known.unsaid && known.by == balancer);
        unsaid
            .take(TAKEN_MAX)
            .map(|known| {
                known.unsaid = false;
                let failure = match &known.outcome {
                    Outcome::Failed(why) => why.clone(),
                    Outcome::Acting | Outcome::Taken => String::new(),
                };
                NoticeTaken { id: known.id.clone(), failure }
            })
            .collect()
    }

    /// The report that was to say this was not sent.
    pub(crate) fn put_back(&self, taken: &[NoticeTaken]) {
        for known in &mut self.state().known {
            known.unsaid |= taken.iter().any(|taken| taken.id == known.id);
        }
    }

    fn became(&self, id: &str, outcome: Outcome) {
        let mut state = self.state();
        if let Some(known) = state.known.iter_mut().find(|known| known.id == id) {
            (known.outcome, known.unsaid) = (outcome, true);
        }
        drop(state);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Resolves when the agent is to end.
    pub(crate) async fn told_to_end(&self) {
        let mut end = self.end.subscribe();
        loop {
            let at = *end.borrow_and_update();
            tokio::select! {
                () = async { match at { Some(at) => sleep_until(at).await, None => std::future::pending().await } } => {
                    info!("a balancer told this resource to shut down");
                    return;
                }
                // The sender is ours.
                _ = end.changed() => {}
            }
        }
    }
}

/// Acts on what is heard, for ever.
pub(crate) async fn act(common: &Arc<Common>) -> Infallible {
    let queue = common.notices.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(mut queue) = queue else { return std::future::pending().await };
    let mut acting = JoinSet::new();
    let mut look = interval(LOOK_EVERY);
    loop {
        tokio::select! {
            Some((by, notice)) = queue.recv(), if acting.len() < ACTING_MAX => {
                let common = Arc::clone(common);
                acting.spawn(async move {
                    let outcome = match act_on(&common, by, &notice).await {
                        Ok(()) => Outcome::Taken,
                        Err(why) => {
                            warn!(notice = notice.id, why, "a notice could not be acted on");
                            Outcome::Failed(why)
                        }
                    };
                    common.notices.became(&notice.id, outcome);
                });
            }
            Some(_) = acting.join_next() => {}
            _ = look.tick() => common.leave_stand_ins(Instant::now()),
        }
    }
}

/// Does what the notice asks for.
///
/// # Errors
/// Why it could not be done, in words.
async fn act_on(common: &Common, by: BalancerId, notice: &Notice) -> Result<(), String> {
    let at = moment(notice);
    let asked = async {
        match notice.kind() {
            Kind::BalancerLeaving | Kind::BalancerUnavailable if !notice.alternatives.is_empty() => {
                common.register_with_stand_ins(by, notice, at).await
            }
            Kind::Withdrawn => {
                common.forget_stand_ins(&notice.withdraws);
                Ok(())
            }
            Kind::ShutDown => {
                common.notices.end.send_replace(Some(at.max(Instant::now() + SAY_SO)));
                Ok(())
            }
            _ => Ok(()),
        }
    };
    let (asked, ran) = tokio::join!(asked, run_command(common, notice));
    ran.and(asked)
}

async fn run_command(common: &Common, notice: &Notice) -> Result<(), String> {
    let Some(command) = &common.config.on_notice else {
        return match notice.kind() {
            Kind::ShedFlows => Err("there is no --on-notice command: nobody here can move flows away".into()),
            _ => Ok(()),
        };
    };
    let told = document(notice, &common.config.resource.id).to_json();
    command::run(command, &told, Output::Ignored, COMMAND_WITHIN).await.map(|_| ())
}

impl Common {
    /// Registers with those who stand in, before the moment if it is ahead.
    async fn register_with_stand_ins(
        &self,
        by: BalancerId,
        notice: &Notice,
        at: Instant,
    ) -> Result<(), String> {
        let mut alternatives = Vec::new();
        for alternative in notice.alternatives.iter().take(ALTERNATIVES_MAX) {
            match self.config.alternative(alternative) {
                Ok(uri) => alternatives.push(Balancer::named(uri)),
                Err(why) => warn!(alternative, why, "no balancer to register with"),
            }
        }
        if alternatives.is_empty() {
            return Err("none of its alternatives is a balancer that this agent may register with".into());
        }
        let left = at.saturating_duration_since(Instant::now());
        sleep(self.spread(notice, (left / 2).min(SPREAD_MAX))).await;
        let lasts = notice.lasts.and_then(|lasts| Duration::try_from(lasts).ok());
        let away_until = match notice.kind() {
            Kind::BalancerUnavailable => lasts.and_then(|lasts| at.checked_add(lasts)),
            _ => None,
        };
        self.notices.state().stand_ins.push(StandIn {
            notice: notice.id.clone(),
            for_balancer: by,
            alternatives: alternatives.clone(),
            away_until,
            said_in: self.balancers.session_with(by),
            steady_since: None,
        });
        self.name_stand_ins();
        let patience = at.max(Instant::now() + STAND_IN_WITHIN);
        while !alternatives.iter().any(|alternative| self.balancers.reports_to(alternative)) {
            if Instant::now() >= patience {
                return Err("registered with no alternative in time; it goes on trying".into());
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// A part of `most` that differs between agents and notices.
    fn spread(&self, notice: &Notice, most: Duration) -> Duration {
        use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
        let part = BuildHasherDefault::<DefaultHasher>::default().hash_one((self.config.seed, &notice.id));
        most.mul_f64(part as f64 / u64::MAX as f64)
    }

    fn forget_stand_ins(&self, notice: &str) {
        self.notices.state().stand_ins.retain(|stand_in| stand_in.notice != notice);
        self.name_stand_ins();
    }

    /// Leaves those whose time is over. Called often.
    fn leave_stand_ins(&self, now: Instant) {
        let mut state = self.notices.state();
        if state.stand_ins.is_empty() {
            return;
        }
        let before = state.stand_ins.len();
        state.stand_ins.retain_mut(|stand_in| {
            let session = self.balancers.session_with(stand_in.for_balancer);
            let others = self.balancers.others_than(Source::Notice);
            !stand_in.is_over(session, others, now)
        });
        let left = state.stand_ins.len() < before;
        drop(state);
        if left {
            self.name_stand_ins();
        }
    }

    fn name_stand_ins(&self) {
        let wanted = self.notices.state().stand_ins.iter().flat_map(|s| s.alternatives.clone()).collect();
        self.balancers.set_of(Source::Notice, wanted);
    }
}

impl StandIn {
    /// Whether it is needed no longer. `session`: the one in which the other answers now; `others`: somebody answers who does not
    /// only stand in.
    fn is_over(&mut self, session: Option<u64>, others: bool, now: Instant) -> bool {
        let is_back = match (self.away_until, session) {
            (Some(until), _) => now >= until,
            (None, Some(session)) => *self.said_in.get_or_insert(session) != session,
            // It is away; whoever else was named may do meanwhile.
            (None, None) => true,
        };
        if !is_back || !others {
            self.steady_since = None;
            return false;
        }
        now >= *self.steady_since.get_or_insert(now) + STEADY
    }
}

/// When it happens, on the monotonic clock; what is past is now.
fn moment(notice: &Notice) -> Instant {
    let at = notice.at.and_then(|at| SystemTime::try_from(at).ok());
    let ahead = at.and_then(|at| at.duration_since(SystemTime::now()).ok()).unwrap_or_default();
    let now = Instant::now();
    now.checked_add(ahead).unwrap_or(now)
}

/// For the operator's command.
fn document<'a>(notice: &'a Notice, resource: &'a str) -> formats::notice::Notice<'a> {
    formats::notice::Notice {
        id: &notice.id,
        kind: match notice.kind() {
            Kind::Unspecified => "unknown",
            Kind::BalancerLeaving => "balancer_leaving",
            Kind::BalancerUnavailable => "balancer_unavailable",
            Kind::Withdrawn => "withdrawn",
            Kind::ShutDown => "shut_down",
            Kind::ShedFlows => "shed_flows",
        },
        resource,
        at: notice.at.and_then(|at| SystemTime::try_from(at).ok()).map(rfc3339),
        lasts_seconds: notice.lasts.and_then(|l| Duration::try_from(l).ok()).map(|l| l.as_secs_f64()),
        alternatives: &notice.alternatives,
        reason: &notice.reason,
        flows: (notice.flows > 0).then_some(notice.flows),
        withdraws: &notice.withdraws,
    }
}

fn log(notice: &Notice) {
    let at = notice.at.and_then(|at| SystemTime::try_from(at).ok()).map(rfc3339);
    let alternatives =
        notice.alternatives.iter().take(ALTERNATIVES_MAX).cloned().collect::<Vec<_>>().join(" ");
    let kind = notice.kind().as_str_name().trim_start_matches("KIND_");
    info!(kind, at, alternatives, reason = notice.reason, notice = notice.id, "notice from the balancer");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stand_in(away_until: Option<Instant>) -> StandIn {
        StandIn {
            notice: "1".into(),
            for_balancer: BalancerId::default(),
            alternatives: Vec::new(),
            away_until,
            said_in: Some(1),
            steady_since: None,
        }
    }

    #[tokio::test]
    async fn a_stand_in_is_left_once_somebody_has_answered_for_a_while() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut planned = stand_in(Some(at(60)));
        // It answers while it only will be away.
        assert!(!planned.is_over(Some(1), true, at(1)) && !planned.is_over(Some(1), true, at(30)));
        assert!(!planned.is_over(None, false, at(61)));
        assert!(!planned.is_over(Some(2), true, at(70)));
        assert!(!planned.is_over(None, false, at(75)), "not steady");
        assert!(!planned.is_over(Some(3), true, at(80)) && planned.is_over(Some(3), true, at(90)));

        let mut leaving = stand_in(None);
        let drains = [at(0), at(30)].map(|now| leaving.is_over(Some(1), true, now));
        assert_eq!(drains, [false; 2], "it still drains");
        assert!(!leaving.is_over(None, false, at(31)) && !leaving.is_over(Some(2), true, at(100)));
        assert!(leaving.is_over(Some(2), true, at(110)));
        // It was back before anybody looked; and it was not away at all, but the connection was.
        let mut quick = stand_in(None);
        assert!(!quick.is_over(Some(2), true, at(0)) && quick.is_over(Some(2), true, at(10)));
        let mut again = StandIn { said_in: None, ..stand_in(None) };
        assert!(!again.is_over(Some(2), true, at(0)) && !again.is_over(Some(2), true, at(10)));
    }

    #[tokio::test]
    async fn a_notice_is_acted_on_once_and_its_outcome_said_each_time_it_is_told() {
        let notices = Notices::default();
        let by = BalancerId::default();
        let notice = Notice { id: "1".into(), ..Notice::default() };
        notices.hear(by, notice.clone());
        notices.hear(by, notice.clone());
        assert!(notices.take(by).is_empty(), "it is acted on");
        notices.became("1", Outcome::Failed("no".into()));
        let taken = notices.take(by);
        assert_eq!(taken, [NoticeTaken { id: "1".into(), failure: "no".into() }]);
        assert!(notices.take(by).is_empty());
        notices.put_back(&taken);
        assert_eq!(notices.take(by).len(), 1);
        notices.hear(by, notice);
        assert_eq!(notices.take(by).len(), 1);
        let queued = notices.queue.lock().unwrap().as_mut().unwrap().try_recv();
        assert!(queued.is_ok(), "it was acted on once");
        assert!(notices.queue.lock().unwrap().as_mut().unwrap().try_recv().is_err());
    }
}
