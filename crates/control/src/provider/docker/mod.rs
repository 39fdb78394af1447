//! The Docker Engine, alone or a node of a swarm: its containers become resources.
//!
//! ```text
//! subscribe to events -> list services and containers (closes the gap) -> Session: four things wake it
//!     event    a container starts, is asked to end, ends, changes its health; a service changes
//!     answer   what was asked of the engine: a container, its statistics, services, tasks
//!     tick     statistics of every container, and a ping
//!     look     after a service changed: which tasks does the swarm want ended?
//! ```
//!
//! * It owns what is known of each container. It does not own what labels mean (`container`), the wire (`client`, `wire`,
//!   `events`), nor registrations (`holder`).
//! * What must be quick asks nothing: a container that is asked to end gets no new flows by its event alone.
//! * At most [`CALLS_MAX`] calls at once, one of a kind for each container; each is bounded in time and size.

mod client;
mod container;
mod events;
mod usage;
mod wire;

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use registry::Readiness;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, sleep_until};

use self::client::{Client, DockerError};
use self::container::{Health, Offered, is_ours, offered, ours, signal};
use self::events::{Events, Next};
use self::wire::{Container, ContainerId, Event, Info, Labels, Service, Stats, Task};
use super::holder::Holder;
use super::{DockerConfig, Provider};

/// Calls to the engine at once.
const CALLS_MAX: usize = 8;
/// Containers of ours that are followed. More of them are not, and that is said.
const CONTAINERS_MAX: usize = 10_000;
/// Services of ours whose labels are kept.
const SERVICES_MAX: usize = 10_000;
/// After a service changed: looks at its tasks, in milliseconds from the change. A manager decides within a few, and the
/// container is asked to end 100 ms to 3 s later; the far ones are for a manager that is busy.
const LOOKS_AT_MS: [u64; 8] = [0, 10, 30, 70, 150, 400, 1_000, 2_000];
/// Between two looks while a rolling update goes on: nothing announces its steps.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const SIGKILL: u8 = 9;

/// One engine. What is known of its containers outlives a connection.
pub(super) struct Docker {
    config: DockerConfig,
    known: HashMap<ContainerId, Known>,
}

impl Docker {
    pub(super) fn new(config: DockerConfig) -> Self {
        Self { config, known: HashMap::new() }
    }
}

impl Provider for Docker {
    type Error = DockerError;

    async fn follow(&mut self, holder: &Holder) -> DockerError {
        let error = match self.session(holder).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        holder.metrics.failed(error.reason());
        error
    }
}

impl Docker {
    async fn session(&mut self, holder: &Holder) -> Result<Infallible, DockerError> {
        let client = Client::open(&self.config.endpoint).await?;
        let info = client.info().await?;
        let events = Events::subscribe(&client).await?;
        for known in self.known.values_mut() {
            known.forget_calls();
        }
        let mut session = Session {
            holder,
            host: self.config.address,
            info,
            known: &mut self.known,
            services: HashMap::new(),
            updating: HashSet::new(),
            looks: Looks::default(),
            calls: Calls::new(client),
            serial: 0,
        };
        if session.info.swarm.manages {
            let services = session.calls.client.services().await?;
            session.take_services(services);
        }
        let listed = session.calls.client.containers().await?;
        session.take_list(listed);
        holder.up();
        session.run(events).await
    }
}

/// What is known of a container that is ours, or may be.
#[derive(Default)]
struct Known {
    /// The call that will tell, by its serial: an older answer than the newest call's is not taken.
    asked: Option<u64>,
    /// Something happened since that call.
    ask_again: bool,
    sampling: bool,
    /// The newest sample of its statistics.
    sample: Option<Stats>,
    processors: f64,
    /// The start of its that is known.
    incarnation: u64,
    /// Its health allows flows.
    fit: bool,
    /// It was asked to end, or will be.
    leaving: bool,
    stop_signal: Option<u8>,
    /// What was last said of it in the log.
    complaint: String,
}

impl Known {
    /// Calls end with their session.
    fn forget_calls(&mut self) {
        (self.asked, self.ask_again, self.sampling) = (None, false, false);
    }

    fn readiness(&self) -> Readiness {
        if self.fit && !self.leaving { Readiness::Ready } else { Readiness::NotReady }
    }

    /// Whether this signal asks it to end. A reload by SIGHUP must not cost it its flows.
    fn is_ended_by(&self, sent: u8) -> bool {
        sent == SIGKILL || sent == self.stop_signal.unwrap_or_else(|| signal(""))
    }
}

/// When to look at tasks.
#[derive(Default)]
struct Looks {
    /// The change that is followed up, and how many looks it had.
    follow_up: Option<(Instant, usize)>,
    looking: bool,
    last: Option<Instant>,
}

impl Looks {
    fn begin(&mut self) {
        self.follow_up = Some((Instant::now(), 0));
    }

    fn next(&self, updating: bool) -> Option<Instant> {
        if self.looking {
            return None;
        }
        let follow_up = self.follow_up.map(|(since, had)| since + Duration::from_millis(LOOKS_AT_MS[had]));
        let next = self.last.map_or_else(Instant::now, |last| last + LOOK_EVERY);
        follow_up.or_else(|| updating.then_some(next))
    }

    fn begun(&mut self) {
        self.looking = true;
        self.last = Some(Instant::now());
        self.follow_up = self.follow_up.take().and_then(|(since, had)| {
            let next = had + 1;
            (next < LOOKS_AT_MS.len()).then_some((since, next))
        });
    }
}

/// Calls on their way.
struct Calls {
    client: Client,
    places: Arc<Semaphore>,
    running: JoinSet<Done>,
    /// One call for services at a time; true inside: another must follow it.
    services: Option<bool>,
    pinging: bool,
}

/// What a call brought.
enum Done {
    Container(ContainerId, u64, Result<Container, DockerError>),
    Stats(ContainerId, Result<Stats, DockerError>),
    Services(Result<Vec<Service>, DockerError>),
    Tasks(Result<Vec<Task>, DockerError>),
    Ping(Result<Info, DockerError>),
}

impl Calls {
    fn new(client: Client) -> Self {
        Self {
            client,
            places: Arc::new(Semaphore::new(CALLS_MAX)),
            running: JoinSet::new(),
            services: None,
            pinging: false,
        }
    }

    /// Makes a call once there is a place for it.
    fn start<F>(&mut self, call: impl FnOnce(Client) -> F + Send + 'static)
    where
        F: Future<Output = Done> + Send,
    {
        let (client, places) = (self.client.clone(), Arc::clone(&self.places));
        self.running.spawn(async move {
            // Nobody closes the semaphore.
            let _place = places.acquire().await;
            call(client).await
        });
    }

    /// Makes a call at once, beside those that wait: there is one of its kind at a time, and it must not stand behind
    /// statistics.
    fn start_now<F>(&mut self, call: impl FnOnce(Client) -> F + Send + 'static)
    where
        F: Future<Output = Done> + Send + 'static,
    {
        self.running.spawn(call(self.client.clone()));
    }

    fn ask_for_services(&mut self) {
        if let Some(again) = &mut self.services {
            *again = true;
            return;
        }
        self.services = Some(false);
        self.start_now(|client| async move { Done::Services(client.services().await) });
    }

    fn ping(&mut self) {
        if !std::mem::replace(&mut self.pinging, true) {
            self.start_now(|client| async move { Done::Ping(client.info().await) });
        }
    }
}

/// One connection's time.
struct Session<'d> {
    holder: &'d Holder,
    host: Option<IpAddr>,
    info: Info,
    known: &'d mut HashMap<ContainerId, Known>,
    /// Labels of services with any of ours, by id.
    services: HashMap<String, Labels>,
    /// Services in a rolling update.
    updating: HashSet<String>,
    looks: Looks,
    calls: Calls,
    serial: u64,
}

impl Session<'_> {
    async fn run(mut self, mut events: Events) -> Result<Infallible, DockerError> {
        let mut ticks = ticks(self.holder.report_interval);
        loop {
            let look = self.looks.next(!self.updating.is_empty());
            tokio::select! {
                biased;
                next = events.next() => match next {
                    Next::Event(event) => self.take_event(&event),
                    Next::Lost => self.relist("events were lost").await?,
                    Next::Ended(error) => return Err(error),
                },
                () = sleep_until(look.unwrap_or_else(Instant::now)), if look.is_some() => self.look_at_tasks(),
                Some(done) = self.calls.running.join_next() => if let Ok(done) = done {
                    self.take_answer(done).await?;
                },
                _ = ticks.tick() => self.tick(),
            }
        }
    }

    fn take_event(&mut self, event: &Event) {
        let Event { kind, action, actor } = event;
        match kind.as_str() {
            "container" => {
                self.holder.metrics.event("container");
                if let Ok(id) = ContainerId::try_from(actor.id.clone()) {
                    self.take_container_event(id, action, &actor.attributes);
                }
            }
            "network" => {
                self.holder.metrics.event("network");
                let container = actor.attributes.get("container").cloned().map(ContainerId::try_from);
                if let Some(Ok(id)) = container
                    && self.known.contains_key(&id)
                {
                    self.ask(id);
                }
            }
            "service" => {
                self.holder.metrics.event("service");
                self.heard_as_manager();
                self.take_service_event(&actor.id, action, &actor.attributes);
            }
            "node" => {
                self.holder.metrics.event("node");
                self.heard_as_manager();
                self.look();
            }
            // Not asked for.
            _ => {}
        }
    }

    fn take_container_event(&mut self, id: ContainerId, action: &str, attributes: &Labels) {
        match action.split(':').next().unwrap_or_default() {
            "kill" => {
                let sent = attributes.get("signal").map_or(0, |sent| signal(sent));
                if self.known.get(&id).is_some_and(|known| known.is_ended_by(sent)) {
                    self.leave(&id, "it is asked to end");
                }
            }
            "die" | "destroy" => self.forget(&id, "its container has ended"),
            "pause" => {
                if let Some(known) = self.known.get_mut(&id) {
                    known.fit = false;
                    self.holder.set_readiness(id.as_str(), known.readiness(), "its container is paused");
                }
            }
            "start" if self.may_be_ours(attributes) => {
                self.ask(id);
                // A task that starts may be a step of an update that ends another.
                self.look();
            }
            _ if self.known.contains_key(&id) => self.ask(id),
            _ => {}
        }
    }

    fn take_service_event(&mut self, id: &str, action: &str, attributes: &Labels) {
        match attributes.get("updatestate.new").map(String::as_str) {
            Some("updating" | "rollback_started") => {
                self.updating.insert(id.to_owned());
            }
            Some(_) => {
                self.updating.remove(id);
            }
            None => {}
        }
        self.look();
        if action == "remove" {
            // Its tasks are ended one by one; until then their labels stand.
            self.updating.remove(id);
        } else if self.info.swarm.manages {
            self.calls.ask_for_services();
        }
    }

    /// Whether a container with these labels has to be looked at.
    fn may_be_ours(&self, labels: &Labels) -> bool {
        is_ours(labels) || labels.get(container::SERVICE_ID).is_some_and(|id| self.services.contains_key(id))
    }

    /// Asks the engine what a container is now.
    fn ask(&mut self, id: ContainerId) {
        if !self.known.contains_key(&id) && self.known.len() >= CONTAINERS_MAX {
            self.holder.metrics.failed("bound");
            tracing::warn!(
                container = id.short(),
                "not followed: {CONTAINERS_MAX} containers are, as many as may be"
            );
            return;
        }
        let known = self.known.entry(id.clone()).or_default();
        if known.asked.is_some() {
            known.ask_again = true;
            return;
        }
        self.serial += 1;
        let serial = self.serial;
        known.asked = Some(serial);
        self.calls.start(move |client| async move {
            let answer = client.container(&id).await;
            Done::Container(id, serial, answer)
        });
    }

    async fn take_answer(&mut self, done: Done) -> Result<(), DockerError> {
        match done {
            Done::Container(id, serial, answer) => self.take_container(id, serial, answer),
            Done::Stats(id, answer) => self.take_stats(&id, answer),
            Done::Services(answer) => {
                if self.calls.services.take() == Some(true) {
                    self.calls.ask_for_services();
                }
                if self.take_services(answer?) {
                    self.relist("labels of services changed").await?;
                }
            }
            Done::Tasks(answer) => {
                self.looks.looking = false;
                self.take_tasks(&answer?);
            }
            // An engine that does not answer this does not follow its containers either.
            Done::Ping(answer) => {
                self.calls.pinging = false;
                let managed = std::mem::replace(&mut self.info, answer?).swarm.manages;
                if self.info.swarm.manages && !managed {
                    self.calls.ask_for_services();
                }
            }
        }
        Ok(())
    }

    fn take_container(&mut self, id: ContainerId, serial: u64, answer: Result<Container, DockerError>) {
        let Some(known) = self.known.get_mut(&id).filter(|known| known.asked == Some(serial)) else { return };
        known.asked = None;
        let again = std::mem::take(&mut known.ask_again);
        match answer {
            Ok(container) => self.apply(&id, &container),
            Err(error) if error.is_not_found() => self.forget(&id, "its container is gone"),
            Err(error) => {
                self.holder.metrics.failed(error.reason());
                tracing::warn!(container = id.short(), %error, "the engine does not describe a container; asked again");
                known.ask_again = true;
            }
        }
        if again && self.known.contains_key(&id) {
            self.ask(id);
        }
    }

    /// Registers what a container offers, or gives it up.
    fn apply(&mut self, id: &ContainerId, container: &Container) {
        let service = container.config.labels.get(container::SERVICE_ID).and_then(|id| self.services.get(id));
        let found = offered(container, service, self.host);
        let Some(known) = self.known.get_mut(id) else { return };
        match found {
            Ok(Some(Offered { offer, health, stop_signal })) => {
                if known.incarnation != 0 && known.incarnation != offer.incarnation {
                    *known = Known { complaint: std::mem::take(&mut known.complaint), ..Known::default() };
                }
                known.incarnation = offer.incarnation;
                known.processors = usage::processors(&container.host, self.info.cpus);
                known.stop_signal = Some(stop_signal);
                known.fit = health == Health::Ready;
                if health == Health::Starting && !self.holder.holds(id.as_str()) {
                    return complain(known, container, "its health check has not passed yet");
                }
                if let Err(error) = self.holder.hold(id.as_str(), offer, known.readiness()) {
                    self.holder.metrics.failed("refused");
                    complain(known, container, &error.to_string());
                    return;
                }
                known.complaint.clear();
                if known.sample.is_none() {
                    // The first of two, so that the next tick has something to report.
                    self.sample(id.clone());
                }
            }
            Ok(None) => self.forget(id, "its container offers nothing any more"),
            Err(error) => {
                self.holder.metrics.failed("labels");
                complain(known, container, &error.to_string());
                self.holder.release(id.as_str(), "its container cannot be used as it is");
            }
        }
    }

    /// No new flows from now on.
    fn leave(&mut self, id: &ContainerId, why: &'static str) {
        if let Some(known) = self.known.get_mut(id) {
            known.leaving = true;
            self.holder.set_readiness(id.as_str(), Readiness::NotReady, why);
        }
    }

    fn forget(&mut self, id: &ContainerId, why: &'static str) {
        self.known.remove(id);
        self.holder.release(id.as_str(), why);
    }

    /// Takes in the labels of services. True: some of ours changed.
    fn take_services(&mut self, services: Vec<Service>) -> bool {
        self.updating = services
            .iter()
            .filter(|service| matches!(service.update.state.as_str(), "updating" | "rollback_started"))
            .map(|service| service.id.clone())
            .collect();
        let mine = services.into_iter().filter(|service| is_ours(&service.spec.labels)).take(SERVICES_MAX);
        let only_ours = |labels: &Labels| {
            ours(labels).into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
        };
        let now: HashMap<String, Labels> =
            mine.map(|service| (service.id, only_ours(&service.spec.labels))).collect();
        let changed = now != self.services;
        self.services = now;
        changed
    }

    /// Everything anew, because something was missed.
    async fn relist(&mut self, why: &'static str) -> Result<(), DockerError> {
        tracing::debug!(why, "listing all containers");
        self.holder.metrics.event("listing");
        let listed = self.calls.client.containers().await?;
        self.take_list(listed);
        Ok(())
    }

    fn take_list(&mut self, listed: Vec<wire::Listed>) {
        let mine = listed.into_iter().filter(|container| self.may_be_ours(&container.labels));
        let ids: HashSet<ContainerId> = mine.map(|container| container.id).collect();
        self.known.retain(|id, _| ids.contains(id));
        self.holder.retain(&ids.iter().map(|id| id.as_str().to_owned()).collect());
        for id in ids {
            self.ask(id);
        }
    }

    /// A swarm may be about to end tasks.
    fn look(&mut self) {
        if self.info.swarm.manages {
            self.looks.begin();
        }
    }

    /// Only managers hear of services and nodes: one that did not know itself to be a manager has become one.
    fn heard_as_manager(&mut self) {
        if !self.info.swarm.manages {
            self.calls.ping();
        }
    }

    fn look_at_tasks(&mut self) {
        self.looks.begun();
        let node = self.info.swarm.node.clone();
        self.calls.start_now(|client| async move { Done::Tasks(client.tasks(&node).await) });
    }

    fn take_tasks(&mut self, tasks: &[Task]) {
        let ended = tasks.iter().filter(|task| matches!(task.desired.as_str(), "shutdown" | "remove"));
        for task in ended {
            if let Ok(id) = ContainerId::try_from(task.status.container.id.clone()) {
                self.leave(&id, "the swarm wants its task ended");
            }
        }
    }

    /// Statistics of all that is held; and what failed is asked again.
    fn tick(&mut self) {
        self.calls.ping();
        let again: Vec<ContainerId> = self
            .known
            .iter_mut()
            .filter_map(|(id, known)| {
                let failed = known.asked.is_none() && std::mem::take(&mut known.ask_again);
                failed.then(|| id.clone())
            })
            .collect();
        for id in again {
            self.ask(id);
        }
        let held: Vec<ContainerId> =
            self.known.keys().filter(|id| self.holder.holds(id.as_str())).cloned().collect();
        for id in held {
            self.sample(id);
        }
    }

    /// Asks for a container's statistics, unless that is on its way.
    fn sample(&mut self, id: ContainerId) {
        let Some(known) = self.known.get_mut(&id).filter(|known| !known.sampling) else { return };
        known.sampling = true;
        self.calls.start(move |client| async move {
            let answer = client.stats(&id).await;
            Done::Stats(id, answer)
        });
    }

    fn take_stats(&mut self, id: &ContainerId, answer: Result<Stats, DockerError>) {
        let Some(known) = self.known.get_mut(id) else { return };
        known.sampling = false;
        match answer {
            Ok(now) => {
                let before = known.sample.replace(now.clone());
                if let Some(raw) =
                    before.and_then(|before| usage::utilization(&before, &now, known.processors))
                {
                    self.holder.set_utilization(id.as_str(), raw);
                }
            }
            // It has ended, and its event comes.
            Err(error) if error.is_not_found() => {}
            Err(error) => {
                self.holder.metrics.failed(error.reason());
                tracing::debug!(container = id.short(), %error, "no statistics of a container");
            }
        }
    }
}

fn complain(known: &mut Known, container: &Container, complaint: &str) {
    if known.complaint == complaint {
        return;
    }
    known.complaint = complaint.to_owned();
    let name = container.name.trim_start_matches('/');
    tracing::warn!(container = name, "not registered: {complaint}");
}

fn ticks(every: Duration) -> Interval {
    let mut ticks = tokio::time::interval(every);
    // After a pause one tick is as good as all that were missed.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ends_a_container_takes_it_out() {
        let known = |stop: &str| Known { stop_signal: Some(signal(stop)), ..Known::default() };
        assert!(known("").is_ended_by(15) && known("").is_ended_by(9) && !known("").is_ended_by(1));
        let nginx = known("SIGQUIT");
        assert!(nginx.is_ended_by(3) && nginx.is_ended_by(9) && !nginx.is_ended_by(15));
        assert!(Known::default().is_ended_by(15), "also before the engine has described it");
    }

    #[tokio::test(start_paused = true)]
    async fn looks_follow_a_change_and_end() {
        let mut looks = Looks::default();
        assert_eq!(looks.next(false), None);
        looks.begin();
        let start = Instant::now();
        for at in LOOKS_AT_MS {
            assert_eq!(looks.next(false), Some(start + Duration::from_millis(at)));
            looks.begun();
            assert_eq!(looks.next(true), None, "one look at a time");
            looks.looking = false;
        }
        assert_eq!(looks.next(false), None);
        assert_eq!(looks.next(true), Some(start + LOOK_EVERY), "an update goes on");
        tokio::time::advance(LOOK_EVERY / 2).await;
        assert_eq!(looks.next(true), Some(start + LOOK_EVERY), "whatever else happens meanwhile");
    }
}
