//! Publishing a balancer: one task for each zone at each server, which keeps its records there until it is told to stop.
//!
//! ```text
//! start -> make it so -> Published -- refresh, or the addresses changed --> make it so …
//!              |  ^
//!    failed ---+  +--- after a pause (backoff)          stop -> withdraw, 2 s at most -> Withdrawn
//! ```
//!
//! Owns: when what is done, and the statuses. Does not own: what is in an update (`plan`) and how it travels
//! (`exchange`). Nothing here can stop or delay the balancer: tasks only write their status, and withdrawing is bounded.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{Record, RecordType};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::addresses::Addresses;
use crate::error::UpdateError;
use crate::exchange::Link;
use crate::key::TsigKey;
use crate::name::{Domain, HostLabel, NameError, shown};
use crate::plan::{self, Host, Next, Owner, Plan, Service, Step};
use crate::status::{PublishState, Status, Statuses};

/// Time to live of records unless told otherwise: how long others may go on with what was true before.
pub const TTL_DEFAULT: Duration = Duration::from_secs(10);
/// How often records are looked after: each TTL, within these. A server that lost its zone has it back by then.
const REFRESH_MIN: Duration = Duration::from_secs(2);
const REFRESH_MAX: Duration = Duration::from_secs(60);
/// Longest pause after the first failure; doubles with each further one.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
/// Longest pause: a server that is back has our records within it.
const PAUSE_MAX: Duration = Duration::from_secs(10);
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// How often the host's addresses are looked at: a few system calls.
const ADDRESSES_EVERY: Duration = Duration::from_secs(2);
/// What taking the records away may take. It goes on beside the drain, and the process may wait as long for it.
pub const WITHDRAW_WITHIN: Duration = Duration::from_secs(2);
/// Steps for one host in one go: from the first to the last and once around, if another hand is in it.
const STEPS_MAX: u32 = 4;

/// What is published in one zone at one server.
#[derive(Debug, Clone)]
pub struct Publication {
    server: SocketAddr,
    key: TsigKey,
    plan: Plan,
    /// The balancer's own comes first.
    hosts: Vec<(Host, Addresses)>,
}

impl Publication {
    /// Of `control`, and of `services`: each with where it is reached. Those that are reached at other addresses than
    /// control get a host name of their own, `postgresql.lb1` beside `lb1`: what has addresses in DNS is a name.
    ///
    /// # Errors
    /// When a name would be too long.
    #[allow(
        clippy::too_many_arguments,
        reason = "each is a key of the configuration, and they go nowhere else together"
    )]
    pub fn new(
        zone: Domain,
        server: SocketAddr,
        key: TsigKey,
        owner: Owner,
        ttl: Duration,
        label: &HostLabel,
        control: (Addresses, Service),
        services: impl IntoIterator<Item = (Addresses, Service)>,
    ) -> Result<Self, NameError> {
        let mut groups: Vec<(Addresses, Vec<Service>)> = vec![(control.0, vec![control.1])];
        for (addresses, service) in services {
            match groups.iter_mut().find(|(same, _)| *same == addresses) {
                Some((_, group)) => group.push(service),
                None => groups.push((addresses, vec![service])),
            }
        }
        let mut hosts: Vec<(Host, Addresses)> = Vec::new();
        for (addresses, services) in groups {
            let mut name = label.within(&zone)?;
            let bare = services[0].service.bare().to_owned();
            for further in 1.. {
                if !hosts.iter().any(|(host, _)| host.name == name) {
                    break;
                }
                let child = if further == 1 { bare.clone() } else { format!("{bare}-{further}") };
                name = label.child(&child)?.within(&zone)?;
            }
            hosts.push((Host::new(name, &zone, &services)?, addresses));
        }
        Ok(Self { server, key, plan: Plan { zone, owner, ttl }, hosts })
    }

    /// The balancer's host name.
    pub fn name(&self) -> String {
        shown(&self.hosts[0].0.name)
    }
}

/// Tasks that publish.
#[derive(Debug)]
pub struct Publisher {
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Publisher {
    /// Starts a task for each publication, on the runtime of the caller.
    pub fn start(publications: Vec<Publication>, statuses: &Statuses) -> Self {
        let stop = watch::Sender::new(false);
        let mut tasks = JoinSet::new();
        for publication in publications {
            let task = Task::new(publication, statuses.clone());
            tasks.spawn(task.run(stop.subscribe()));
        }
        Self { stop, tasks }
    }

    /// Tells all to take their records away. Returns at once.
    pub fn withdraw(&self) {
        self.stop.send_replace(true);
    }

    /// Resolves when all have, or after [`WITHDRAW_WITHIN`].
    pub async fn withdrawn(mut self) {
        self.withdraw();
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // Each limits itself, too; this is for a clock that jumped.
        drop(timeout(WITHDRAW_WITHIN + Duration::from_millis(100), ended).await);
    }
}

struct Task {
    publication: Publication,
    link: Link,
    statuses: Statuses,
    place: usize,
    /// Where the next update of each host begins.
    steps: Vec<Step>,
    failures: u32,
    /// Whether a claim may have reached the server.
    may_be_there: bool,
}

impl Task {
    fn new(publication: Publication, statuses: Statuses) -> Self {
        let place = statuses.add(Status {
            zone: publication.plan.zone.to_string(),
            server: publication.server,
            name: publication.name(),
            state: PublishState::Starting,
            last_error: String::new(),
            confirmed: None,
            updates: std::collections::BTreeMap::new(),
        });
        let steps = vec![Step::Claim; publication.hosts.len()];
        let link = Link::new(publication.server);
        Self { publication, link, statuses, place, steps, failures: 0, may_be_there: false }
    }

    async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut look = interval(ADDRESSES_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.take_addresses();
        loop {
            // An update that is on its way when it is told to stop is not waited for.
            let made = tokio::select! {
                made = self.make_it_so() => made,
                () = stopped(&mut stop) => break,
            };
            let next = Instant::now() + self.note(made);
            tokio::select! {
                () = sleep_until(next) => {}
                () = self.addresses_change(&mut look) => {}
                () = stopped(&mut stop) => break,
            }
        }
        self.withdraw().await;
    }

    /// Resolves when the host's addresses are others than before.
    async fn addresses_change(&mut self, look: &mut tokio::time::Interval) {
        loop {
            look.tick().await;
            if self.take_addresses() {
                return;
            }
        }
    }

    /// Whether they changed. A host that has lost all of them keeps what it had in DNS: it will hardly get through to
    /// change it, and has nothing better to say.
    fn take_addresses(&mut self) -> bool {
        let server = self.link.server();
        let mut changed = false;
        for (host, addresses) in &mut self.publication.hosts {
            let now = addresses.now(server);
            if !now.is_empty() && now != host.addresses {
                if !host.addresses.is_empty() {
                    info!(name = shown(&host.name), ?now, "this host's addresses changed");
                }
                warn_of_loopback(host, &now, server);
                host.addresses = now;
                changed = true;
            }
        }
        changed
    }

    async fn make_it_so(&mut self) -> Result<(), UpdateError> {
        for index in 0..self.publication.hosts.len() {
            self.make_host_so(index).await?;
        }
        Ok(())
    }

    async fn make_host_so(&mut self, index: usize) -> Result<(), UpdateError> {
        let host = self.publication.hosts[index].0.clone();
        if host.addresses.is_empty() {
            return Err(UpdateError::NoAddress);
        }
        let mut step = std::mem::replace(&mut self.steps[index], Step::Claim);
        for _ in 0..STEPS_MAX {
            let stale = if step == Step::Replace { self.stale(&host).await } else { Vec::new() };
            self.may_be_there |= step != Step::Refresh;
            let update = self.publication.plan.update(new_id(), step, &host, &stale);
            let code = self.update(update).await?;
            match step.next(code) {
                Next::Done => {
                    self.steps[index] = Step::Refresh;
                    return Ok(());
                }
                Next::Try(next) => step = next,
                Next::Owned => return Err(self.owned(&host).await),
                Next::Failed => return Err(self.error(code)),
            }
        }
        Err(UpdateError::Other { code: "something else at each step: others change the same name".into() })
    }

    async fn update(&mut self, update: Message) -> Result<ResponseCode, UpdateError> {
        debug!(server = %self.link.server(), update = ?plan::lines(&update), "sending an update");
        let answer = self.link.ask(update, Some(&self.publication.key)).await?;
        Ok(answer.metadata.response_code)
    }

    /// Records that lead to our host and should not: from before a change of the configuration. Best effort: without
    /// an answer they stay.
    async fn stale(&mut self, host: &Host) -> Vec<Record> {
        let names: BTreeSet<_> = host.services.iter().map(|(name, _)| name.clone()).collect();
        let mut found = Vec::new();
        for name in names {
            if let Ok(answer) = self.link.ask(plan::question(new_id(), &name, RecordType::SRV), None).await {
                found.extend(plan::stale(host, &answer.answers));
            }
        }
        found
    }

    async fn owned(&mut self, host: &Host) -> UpdateError {
        let answer = self.link.ask(plan::question(new_id(), &host.name, RecordType::TXT), None).await;
        let owner = answer.ok().and_then(|answer| plan::owner_in(&answer.answers));
        UpdateError::Owned { name: shown(&host.name), owner }
    }

    fn error(&self, code: ResponseCode) -> UpdateError {
        UpdateError::of(code, &self.publication.plan.zone.to_string(), &self.publication.key.name())
    }

    /// Writes how it went; gives the pause until the next time.
    fn note(&mut self, made: Result<(), UpdateError>) -> Duration {
        let label = made.as_ref().map_or_else(UpdateError::label, |()| "ok");
        let (zone, server) = (self.publication.plan.zone.to_string(), self.link.server());
        let error = made.err().map(|error| error.to_string()).unwrap_or_default();
        let mut was = String::new();
        let mut is_first = false;
        self.statuses.change(self.place, |status| {
            *status.updates.entry(label).or_default() += 1;
            is_first = status.state != PublishState::Published;
            was = std::mem::replace(&mut status.last_error, error.clone());
            if error.is_empty() {
                status.state = PublishState::Published;
                status.confirmed = Some(std::time::Instant::now());
            } else {
                status.state = PublishState::Failing;
            }
        });
        if error.is_empty() {
            if is_first {
                info!(zone, %server, name = self.publication.name(), "published in DNS");
            }
            self.failures = 0;
            return self.publication.plan.ttl.clamp(REFRESH_MIN, REFRESH_MAX);
        }
        if was != error {
            warn!(zone, %server, error, "not published in DNS; trying again until it is");
        }
        let most = PAUSE_FIRST.saturating_mul(1 << self.failures.min(16)).min(PAUSE_MAX);
        self.failures += 1;
        // Balancers that lost their server at once do not come back at once.
        most.mul_f64(0.5 + f64::from(new_id()) / f64::from(u16::MAX) / 2.0).max(PAUSE_MIN)
    }

    async fn withdraw(mut self) {
        if !self.may_be_there {
            return;
        }
        let (zone, server) = (self.publication.plan.zone.to_string(), self.link.server());
        let ended = match timeout(WITHDRAW_WITHIN, self.withdraw_all()).await {
            Ok(ended) => ended,
            Err(_) => Err(UpdateError::Silent { server }),
        };
        let label = ended.as_ref().map_or_else(UpdateError::label, |()| "ok");
        self.statuses.change(self.place, |status| {
            *status.updates.entry(label).or_default() += 1;
            match &ended {
                Ok(()) => status.state = PublishState::Withdrawn,
                Err(error) => (status.state, status.last_error) = (PublishState::Failing, error.to_string()),
            }
        });
        match ended {
            Ok(()) => info!(zone, %server, "withdrawn from DNS"),
            Err(error) => warn!(
                zone, %server, %error,
                "not withdrawn from DNS: the records stay until this balancer is started again, or somebody removes them"
            ),
        }
    }

    async fn withdraw_all(&mut self) -> Result<(), UpdateError> {
        for index in 0..self.publication.hosts.len() {
            let host = self.publication.hosts[index].0.clone();
            let update = self.publication.plan.withdrawal(new_id(), &host, &[]);
            match self.update(update).await? {
                // Not there, or not ours (any more): either way nothing is left of us.
                ResponseCode::NoError | ResponseCode::NXRRSet | ResponseCode::NXDomain => {}
                code => return Err(self.error(code)),
            }
        }
        Ok(())
    }
}

/// Not where the DNS server is on loopback, too: then all of it is meant for this host.
fn warn_of_loopback(host: &Host, addresses: &BTreeSet<IpAddr>, server: SocketAddr) {
    if addresses.iter().any(IpAddr::is_loopback) && !server.ip().is_loopback() {
        let name = shown(&host.name);
        warn!(
            name,
            "a loopback address is published: only this host can use it; listen elsewhere or set dns.addresses"
        );
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // Without a sender there is no process any more either.
    drop(stop.wait_for(|stop| *stop).await);
}

/// Sixteen bits that nobody else can guess.
fn new_id() -> u16 {
    Message::query().metadata.id
}
