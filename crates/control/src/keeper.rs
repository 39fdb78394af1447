//! What the store is told: changes of the registry in their order, and once in a while what resources reported.
//!
//! ```text
//! register, deregister, drain, capabilities, version   registry, then the store's queue, under one lock; awaited
//! expire, abort                                        the same, not awaited; what fails is tried again
//! reports                                              registry alone; collected here every [`KEEP_EVERY`]
//! ```
//!
//! * The lock keeps the store's order the registry's: without it a lease that ends while its resource registers anew could
//!   take the new row. It is held for a look-up and an entry in a queue, never while the disk is waited for, and never by a
//!   report.
//! * Nobody hears that something was done before it is on the disk. Where it cannot be written, a registration is undone and
//!   refused; what an operator asked for is in force, and he is told that a restart would forget it.
//! * Without a store all of this is the registry alone.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use allocation::{PoolName, ResourceId, Timestamp};
use api::v1::UtilizationScript;
use prost::Message as _;
use registry::{
    CapabilityError, Chunk, DeregisterError, Labels, Owner, RegisterError, Registered, Registration,
    ShareError, UnknownResource,
};
use store::{Event, EventKind, Script, ScriptKind, StoreError, Tables, VersionSetting, Writer};
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tonic::Status;

use crate::clock::Clock;
use crate::kept_tokens::FLUSH_MAX;
use crate::{Phase, Shared, reached};

/// How often what was reported is given to the store; with the time to write it, less than a second is lost at worst.
const KEEP_EVERY: Duration = Duration::from_millis(500);
/// Resources that are looked at in one go: a fraction of a millisecond, in which their pool takes no report.
const SLICE: usize = 128;
/// Longest wait for the disk. An agent waits 2 s for an answer.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// How often history that is too old is removed.
const PRUNE_EVERY: Duration = Duration::from_secs(60);
/// A stretch of history is at most so many of its buckets.
const STRETCH_MAX: u64 = 60;
/// Resources whose rows are still to be deleted; beyond it, those of a resource that left come back with the next start, and go
/// if they do not answer.
const FORGETTING_MAX: usize = 100_000;

/// The store, as control tells it.
pub(crate) struct Keeper {
    writer: Writer,
    clock: Clock,
    state: Mutex<State>,
}

/// What is not known to be on the disk.
#[derive(Default)]
struct State {
    /// Registrations that are being written or failed to be: the next one of that id is written even if it says nothing new.
    unsure: HashMap<ResourceId, u64>,
    tickets: u64,
    /// Resources that have left, and whose rows are not deleted yet.
    forgetting: HashSet<ResourceId>,
    deleting: Vec<(ResourceId, store::Answer<()>)>,
}

impl Keeper {
    pub(crate) fn new(writer: Writer, clock: Clock) -> Self {
        Self { writer, clock, state: Mutex::default() }
    }

    pub(crate) fn stats(&self) -> store::Stats {
        self.writer.stats()
    }

    /// For whatever else is kept: notices, and tokens (`kept_tokens`).
    pub(crate) fn writer(&self) -> &Writer {
        &self.writer
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is left half-done by a panic under it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn event(
        &self,
        kind: EventKind,
        resource: Option<&ResourceId>,
        pool: Option<&PoolName>,
        detail: String,
    ) -> Event {
        Event {
            at_ms: self.clock.unix_ms(self.clock.now()),
            kind,
            resource: resource.map(ToString::to_string),
            pool: pool.map(ToString::to_string),
            detail,
        }
    }

    /// Asks for what was changed to be written; the lock must be held.
    fn write(
        &self,
        event: Option<Event>,
        change: impl FnOnce(&Tables<'_>) -> Result<(), StoreError> + Send + 'static,
    ) -> store::Answer<()> {
        self.writer.run(move |tables| {
            change(tables)?;
            event.map_or(Ok(()), |event| tables.add_event(&event))
        })
    }

    fn delete(&self, id: &ResourceId, event: Option<Event>) -> store::Answer<()> {
        let id = id.to_string();
        self.write(event, move |tables| tables.delete_resource(&id).map(|_| ()))
    }

    /// Has the rows of a resource deleted that does not come back from them.
    pub(crate) fn forget(&self, id: ResourceId) {
        self.state().forget_later(id);
    }

    /// Looks at what was asked to be deleted, and asks again for what was not.
    fn forget_again(&self, registry: &registry::Registry) {
        let mut state = self.state();
        let deleting = std::mem::take(&mut state.deleting);
        for (id, mut answer) in deleting {
            match answer.try_recv() {
                Ok(Ok(())) => {}
                Err(TryRecvError::Empty) => state.deleting.push((id, answer)),
                Ok(Err(_)) | Err(TryRecvError::Closed) => state.forget_later(id),
            }
        }
        let forgetting = std::mem::take(&mut state.forgetting);
        for id in forgetting.into_iter().filter(|id| !registry.is_registered(id)) {
            let answer = self.delete(&id, None);
            state.deleting.push((id, answer));
        }
    }
}

impl State {
    fn is_forgetting(&self, id: &ResourceId) -> bool {
        self.forgetting.contains(id) || self.deleting.iter().any(|(other, _)| other == id)
    }

    fn forget_later(&mut self, id: ResourceId) {
        if self.forgetting.len() < FORGETTING_MAX {
            self.forgetting.insert(id);
        }
    }
}

/// Waits for the disk.
pub(crate) async fn written(answer: store::Answer<()>) -> Result<(), StoreError> {
    match timeout(PATIENCE, answer).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err(StoreError::Closed),
        Err(_) => Err(StoreError::Disk(format!("the disk has not answered for {PATIENCE:?}"))),
    }
}

/// What an operator is told whose change is in force and nowhere else.
pub(crate) fn not_kept(error: &StoreError) -> Status {
    Status::unavailable(format!("it is done, but a restart would forget it: {error}"))
}

impl Shared {
    /// Registers, and returns when that is on the disk.
    pub(crate) async fn register(
        &self,
        registration: Registration,
        script: Option<&UtilizationScript>,
        refused: impl Fn(RegisterError) -> Status,
    ) -> Result<Registered, Status> {
        let now = self.clock.now();
        let Some(keeper) = &self.keeper else {
            let registered = self.registry.register(registration, now).map_err(&refused)?;
            self.changed.notify_one();
            return Ok(registered);
        };
        let id = registration.id().clone();
        let (incarnation, row) =
            (registration.incarnation(), row(&registration, script, self.clock.unix_ms(now)));
        let (registered, pending) = {
            let mut state = keeper.state();
            let (pool, address) = (registration.pool().clone(), registration.address());
            let registered = self.registry.register(registration, now).map_err(&refused)?;
            let pending = (registered.changed || state.unsure.contains_key(&id)).then(|| {
                state.tickets += 1;
                let ticket = state.tickets;
                state.unsure.insert(id.clone(), ticket);
                let event = registered.created.then(|| {
                    keeper.event(EventKind::Registered, Some(&id), Some(&pool), address.to_string())
                });
                (ticket, keeper.write(event, move |tables| tables.put_resource(&row)))
            });
            (registered, pending)
        };
        self.changed.notify_one();
        let Some((ticket, answer)) = pending else { return Ok(registered) };
        let outcome = written(answer).await;
        let mut state = keeper.state();
        let newest = state.unsure.get(&id) == Some(&ticket);
        match outcome {
            Ok(()) => {
                if newest {
                    state.unsure.remove(&id);
                }
                Ok(registered)
            }
            Err(error) => {
                if newest && registered.created {
                    // Nobody heard of it. If it comes to the disk after all, the next start will see whether it answers.
                    self.registry.remove(&id, incarnation);
                    state.unsure.remove(&id);
                    self.changed.notify_one();
                }
                Err(Status::unavailable(format!("the balancer cannot remember the resource: {error}")))
            }
        }
    }

    /// Deregisters, and returns when every row is gone. True: it was there.
    pub(crate) async fn deregister(
        &self,
        owner: Option<&Owner>,
        id: &ResourceId,
        incarnation: u64,
        refused: impl Fn(DeregisterError) -> Status,
    ) -> Result<bool, Status> {
        let Some(keeper) = &self.keeper else {
            let removed = self.registry.deregister_by(owner, id, incarnation).map_err(&refused)?;
            self.changed.notify_one();
            return Ok(removed);
        };
        let (removed, answer) = {
            let mut state = keeper.state();
            let removed = self.registry.deregister_by(owner, id, incarnation).map_err(&refused)?;
            state.unsure.remove(id);
            if !removed && !state.is_forgetting(id) {
                return Ok(false);
            }
            let event = removed.then(|| keeper.event(EventKind::Deregistered, Some(id), None, String::new()));
            (removed, keeper.delete(id, event))
        };
        self.changed.notify_one();
        match written(answer).await {
            Ok(()) => Ok(removed),
            Err(error) => {
                keeper.state().forget_later(id.clone());
                Err(Status::unavailable(format!("it gets no new flows; its rows are deleted later: {error}")))
            }
        }
    }

    /// Removes a resource that must not stay; its rows go when the disk lets them.
    pub(crate) fn remove(&self, id: &ResourceId, incarnation: u64, why: &str) {
        let mut state = self.keeper.as_ref().map(Keeper::state);
        // A newer incarnation than this stays.
        let removed = self.registry.remove(id, incarnation);
        if let (Some(keeper), Some(state), true) = (&self.keeper, &mut state, removed) {
            let event = keeper.event(EventKind::Deregistered, Some(id), None, why.to_owned());
            let answer = keeper.delete(id, Some(event));
            state.deleting.push((id.clone(), answer));
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Ends the leases that are over.
    pub(crate) fn expire(&self, now: Timestamp) -> Vec<Arc<Registration>> {
        let Some(keeper) = &self.keeper else { return self.registry.expire(now) };
        let mut state = keeper.state();
        let expired = self.registry.expire(now);
        for gone in &expired {
            let lease = format!("no report for {:?}", gone.lease());
            let event = keeper.event(EventKind::Expired, Some(gone.id()), Some(gone.pool()), lease);
            state.unsure.remove(gone.id());
            let answer = keeper.delete(gone.id(), Some(event));
            state.deleting.push((gone.id().clone(), answer));
        }
        expired
    }

    /// Drains a resource, or ends that; gives the flows open on it. The outer error: it is done, but not kept.
    pub(crate) async fn set_drained(
        &self,
        id: &ResourceId,
        drained: bool,
    ) -> Result<Result<u32, UnknownResource>, Status> {
        let set = || if drained { self.registry.drain(id) } else { self.registry.ready(id) };
        let kind = if drained { EventKind::Drained } else { EventKind::Undrained };
        let of = id.to_string();
        self.change(set, |keeper, _| {
            let event = keeper.event(kind, Some(id), None, String::new());
            Some((event, Box::new(move |tables: &Tables<'_>| tables.set_drained(&of, drained))))
        })
        .await
    }

    /// Sets capabilities; gives all that are set, and whether the resource has joined. The outer error: as above.
    pub(crate) async fn set_capabilities(
        &self,
        id: &ResourceId,
        set: &Labels,
        remove: &[String],
    ) -> Result<Result<(Labels, bool), CapabilityError>, Status> {
        let of = id.to_string();
        self.change(
            || self.registry.set_capabilities(id, set, remove),
            |keeper, (labels, _)| {
                let event = keeper.event(EventKind::Capabilities, Some(id), None, format!("{labels:?}"));
                let labels = labels.clone();
                Some((event, Box::new(move |tables: &Tables<'_>| tables.put_capabilities(&of, &labels))))
            },
        )
        .await
    }

    /// Sets a version's share. The outer error: as above.
    pub(crate) async fn set_version_share(
        &self,
        pool: &PoolName,
        version: &str,
        share: f32,
    ) -> Result<Result<(), ShareError>, Status> {
        self.change(
            || self.registry.set_version_share(pool, version, share),
            |keeper, ()| {
                let setting = self.version_setting(pool, version)?;
                let event =
                    keeper.event(EventKind::VersionShare, None, Some(pool), format!("{version}={share}"));
                Some((event, Box::new(move |tables: &Tables<'_>| tables.put_version(&setting))))
            },
        )
        .await
    }

    /// A version was aborted. A failure to keep that is said by the store; a restart judges the version anew then.
    pub(crate) fn keep_abort(&self, pool: &PoolName, version: &str, why: &str) {
        let Some(keeper) = &self.keeper else { return };
        let _order = keeper.state();
        if let Some(setting) = self.version_setting(pool, version) {
            let event =
                keeper.event(EventKind::VersionAborted, None, Some(pool), format!("{version}: {why}"));
            drop(keeper.write(Some(event), move |tables| tables.put_version(&setting)));
        }
    }

    /// What a resource's checks found is an event; nothing waits for it.
    pub(crate) fn keep_check(&self, id: &ResourceId, pool: &str, passes: bool, said: &str) {
        let Some(keeper) = &self.keeper else { return };
        let kind = if passes { EventKind::ChecksPass } else { EventKind::ChecksFail };
        let mut event = keeper.event(kind, Some(id), None, said.to_owned());
        event.pool = Some(pool.to_owned());
        drop(keeper.write(Some(event), |_| Ok(())));
    }

    fn version_setting(&self, pool: &PoolName, version: &str) -> Option<VersionSetting> {
        let now = self.registry.version_share(pool, version)?;
        let aborted =
            now.aborted.map(|reason| (reason.measure.name().to_owned(), reason.value, reason.baseline));
        Some(VersionSetting {
            pool: pool.to_string(),
            version: version.to_owned(),
            configured: f64::from(now.configured),
            share: f64::from(now.share),
            aborted,
        })
    }

    /// Changes the registry, has it written if that was accepted, and waits for the disk.
    async fn change<T, E>(
        &self,
        change: impl FnOnce() -> Result<T, E>,
        kept: impl FnOnce(&Keeper, &T) -> Option<(Event, Kept)>,
    ) -> Result<Result<T, E>, Status> {
        let Some(keeper) = &self.keeper else {
            let changed = change();
            self.changed.notify_one();
            return Ok(changed);
        };
        let (changed, answer) = {
            let _order = keeper.state();
            let changed = change();
            let kept = changed.as_ref().ok().and_then(|value| kept(keeper, value));
            let answer = kept.map(|(event, write)| keeper.write(Some(event), write));
            (changed, answer)
        };
        self.changed.notify_one();
        if let Some(answer) = answer {
            written(answer).await.map_err(|error| not_kept(&error))?;
        }
        Ok(changed)
    }
}

type Kept = Box<dyn FnOnce(&Tables<'_>) -> Result<(), StoreError> + Send>;

/// Keeps what is reported, until it is aborted.
pub(crate) async fn run(shared: Arc<Shared>) {
    let Some(keeper) = &shared.keeper else { return };
    let mut ticks = interval(KEEP_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pruned = Instant::now();
    let mut terminated = std::pin::pin!(reached(shared.phase.clone(), Phase::Terminated));
    loop {
        tokio::select! {
            () = &mut terminated => return,
            _ = ticks.tick() => {}
        }
        keep(&shared, keeper).await;
        keeper.forget_again(&shared.registry);
        shared.flush_tokens(FLUSH_MAX);
        if pruned.elapsed() >= PRUNE_EVERY {
            pruned = Instant::now();
            prune(keeper);
            shared.prune_tokens(SystemTime::now());
            shared.notices.forget_old();
        }
    }
}

/// Keeps what there is at the end of the process.
pub(crate) async fn finish(shared: &Shared) {
    let Some(keeper) = &shared.keeper else { return };
    keep(shared, keeper).await;
    shared.flush_tokens(usize::MAX);
    crate::notices::stored::finish(&shared.notices, keeper.writer());
    // History is written after all that was asked for before; the second transaction begins when the first is over.
    for _ in 0..2 {
        if let Err(error) = written(keeper.writer().run(|_| Ok(()))).await {
            tracing::warn!(%error, "what was reported last is not kept");
            return;
        }
    }
}

/// Gives the store what was reported since the last time.
async fn keep(shared: &Shared, keeper: &Keeper) {
    for pool in 0..shared.pools.len() {
        let mut from = 0;
        loop {
            {
                // The order: a resource that leaves now must not be written after it is deleted.
                let _order = keeper.state();
                let Some(news) = shared.registry.take_kept(pool, from, SLICE) else { break };
                let labels = news.iter().filter_map(|kept| Some((kept, kept.labels.clone()?)));
                for (kept, labels) in labels {
                    let (id, incarnation) = (kept.id.to_string(), kept.incarnation);
                    drop(keeper.writer().run(move |tables| tables.set_labels(&id, incarnation, &labels)));
                }
                let batch: Vec<store::Kept> =
                    news.into_iter().map(|kept| reported(kept, keeper.clock)).collect();
                if !batch.is_empty() {
                    keeper.writer().keep(batch);
                }
            }
            from += SLICE;
            tokio::task::yield_now().await;
        }
    }
}

fn prune(keeper: &Keeper) {
    let now_ms = keeper.clock.unix_ms(keeper.clock.now());
    drop(keeper.writer().run(move |tables| {
        for (tier_ms, reach_ms) in Chunk::tiers() {
            tables.prune_history(tier_ms, now_ms.saturating_sub(reach_ms + STRETCH_MAX * tier_ms))?;
        }
        Ok(())
    }));
}

fn reported(kept: registry::Kept, clock: Clock) -> store::Kept {
    let estimates = &kept.estimates;
    let chunk = |Chunk { tier_ms, start_ms, buckets }| store::Chunk { tier_ms, start_ms, buckets };
    store::Kept {
        id: kept.id.to_string(),
        incarnation: kept.incarnation,
        ready: kept.ready,
        estimates: store::Estimates {
            reported_ms: clock.unix_ms(kept.reported),
            operations: estimates.operations,
            flows_opened: estimates.flows_opened,
            flows_open: estimates.flows_open,
            errors: estimates.errors,
            utilization: estimates.utilization,
            log_weight: f64::from(estimates.log_weight),
        },
        history: kept.history.into_iter().map(chunk).collect(),
    }
}

fn row(
    registration: &Registration,
    script: Option<&UtilizationScript>,
    registered_ms: u64,
) -> store::Resource {
    let utilization =
        script.map(|wire| Script { kind: ScriptKind::Utilization, specification: wire.encode_to_vec() });
    let notification = registration
        .notify_url()
        .map(|url| Script { kind: ScriptKind::Notification, specification: url.as_bytes().to_vec() });
    store::Resource {
        id: registration.id().to_string(),
        pool: registration.pool().to_string(),
        incarnation: registration.incarnation(),
        version: registration.version().to_owned(),
        flows_max: registration.flows_max(),
        weight: f64::from(registration.weight()),
        report_interval_ms: u64::try_from(registration.report_interval().as_millis()).unwrap_or(u64::MAX),
        address: registration.address().to_string(),
        probe_address: registration.probe_address().map(|address| address.to_string()),
        labels: registration.labels().clone(),
        scripts: utilization.into_iter().chain(notification).collect(),
        registered_ms,
        owner: registration.owner().map(ToString::to_string),
    }
}
