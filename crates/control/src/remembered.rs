//! What is remembered from before a restart: taken back at start, and connected to before it gets any flow.
//!
//! * Where the pool has an active check, that is what it is asked; once at start here, and then as every other (`checker`).
//! * A remembered resource that answers gets flows until it reports, however long that takes, and is connected to again every
//!   [`AGAIN_AFTER`]; the dataplane sees by itself when it fails between. One that does not answer gets none, is tried again
//!   with a growing pause, and is forgotten when it has not answered for [`LEASE`].
//! * Bounds: [`AT_ONCE`] connections at a time, each for [`CONNECT_WITHIN`]; at start no more than [`FIRST_ROUND`] in all.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use allocation::ResourceId;
use api::v1::{RegisterRequest, Resource, UtilizationScript};
use checks::{Begun, Check, Subject, Verdict};
use prost::Message as _;
use registry::versions::{Measure, Reason};
use registry::{CheckTarget, Chunk, Owner, Registration, Registry, Remembered};
use store::{Contents, ScriptKind, Store, VersionSetting};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::checker::Checker;
use crate::clock::Clock;
use crate::keeper::Keeper;
use crate::pull::{Puller, Script};
use crate::security::{NotHis, SecurityConfig};
use crate::tokens::TokenBook;
use crate::{Pool, Shared, StartError, kept_tokens, parse};

/// How long a resource that neither answers nor reports is remembered: a host that is being mended comes back within it.
pub(crate) const LEASE: Duration = Duration::from_secs(3600);
const CONNECT_WITHIN: Duration = Duration::from_secs(1);
const AT_ONCE: usize = 256;
/// At start flows wait in the listeners' backlogs for so long at most: resources that are there answer in less.
const FIRST_ROUND: Duration = Duration::from_millis(500);
/// Between two connections to one that answers.
const AGAIN_AFTER: Duration = Duration::from_secs(30);
/// After the first failure; doubled with each, up to [`AGAIN_AFTER`].
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How often it is looked who is due.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Shares that differ by less are the same, rounded.
const SAME_SHARE: f64 = 1e-4;

/// What was before.
#[derive(Default)]
pub(crate) struct Restored {
    pub(crate) keeper: Option<Keeper>,
    /// Utilization scripts that are to be followed again.
    pub(crate) followed: Vec<Followed>,
    pub(crate) tokens: TokenBook,
}

/// Takes back what the store remembers, connects to who is in it, and publishes the first tables.
///
/// # Errors
/// If the store cannot be read, or the kernel gives no thread for it.
pub(crate) async fn restore(
    store: Store,
    registry: &Registry,
    pools: &[Pool],
    checker: &Checker,
    clock: Clock,
    security: &SecurityConfig,
) -> Result<Restored, StartError> {
    let Contents { resources, capabilities, versions } = store.load()?;
    let tokens = kept_tokens::load(&store)?;
    let path = store.path().display().to_string();
    let keeper = Keeper::new(store.start().map_err(StartError::StoreThread)?, clock);
    for (id, labels) in capabilities {
        let restored = id
            .parse::<ResourceId>()
            .map_err(|error| error.to_string())
            .and_then(|id| registry.restore_capabilities(&id, &labels).map_err(|error| error.to_string()));
        if let Err(error) = restored {
            tracing::warn!(id, error, "capabilities of the store are left out");
        }
    }
    for setting in versions {
        restore_version(registry, &setting);
    }
    let (stored, mut restored, mut followed) = (resources.len(), 0, Vec::new());
    for remembered in resources {
        let id = remembered.resource.id.clone();
        let owner = remembered.resource.owner.as_deref().map(Owner::new);
        let owner = match owner.map(|owner| security.owner_now(owner, &tokens)).transpose() {
            Ok(owner) => owner.flatten(),
            Err(why) => {
                tracing::warn!(id, %why, "a resource of the store is left out");
                if let (NotHis::Token, Ok(id)) = (why, id.parse()) {
                    keeper.forget(id);
                }
                continue;
            }
        };
        match restore_resource(registry, remembered, owner, clock) {
            Ok(script) => {
                restored += 1;
                followed.extend(script);
            }
            Err(error) => tracing::warn!(id, error, "a resource of the store is left out; its rows are kept"),
        }
    }
    let mut probes = Probes::default();
    // What is not over by then goes on when control runs.
    let _ =
        timeout(FIRST_ROUND, probes.round(registry, (checker, pools), registry.unconfirmed(), clock, || ()))
            .await;
    for rebuilt in registry.rebuild(clock.now()) {
        for (publisher, table) in pools[rebuilt.pool].publishers.iter().zip(rebuilt.tables) {
            publisher.publish(table);
        }
    }
    tracing::info!(
        store = path,
        stored,
        restored,
        answering = probes.answering(),
        "remembered what was before"
    );
    Ok(Restored { keeper: Some(keeper), followed, tokens })
}

fn restore_version(registry: &Registry, setting: &VersionSetting) {
    let VersionSetting { pool, version, configured, share, aborted } = setting;
    let Ok(name) = pool.parse() else { return };
    let now = registry.version_share(&name, version);
    if !now.is_some_and(|now| (f64::from(now.configured) - configured).abs() < SAME_SHARE) {
        tracing::info!(pool, version, "the configuration has another share than when one was set: it holds");
        return;
    }
    let reason = aborted.as_ref().and_then(|(measure, value, baseline)| {
        let measure = Measure::ALL.into_iter().find(|known| known.name() == measure)?;
        Some(Reason { measure, value: *value, baseline: *baseline })
    });
    if let Err(error) = registry.restore_version(&name, version, *share as f32, reason) {
        tracing::warn!(pool, version, %error, "the share that was set is not in force again");
    }
}

/// A resource whose utilization script is to be followed again.
pub(crate) type Followed = (Registration, Script, UtilizationScript);

fn restore_resource(
    registry: &Registry,
    remembered: store::Remembered,
    owner: Option<Owner>,
    clock: Clock,
) -> Result<Option<Followed>, String> {
    let store::Remembered { resource, ready, drained, estimates, history } = remembered;
    // What was let in by its message is let in by it again, or not at all.
    let (registration, script) =
        parse::registration(request(resource)?).map_err(|error| error.to_string())?;
    let registration = registration.owned_by(owner);
    let followed = script.map(|(script, wire)| (registration.clone(), script, wire));
    let id = registration.id().clone();
    let estimates = estimates.map(|estimates| registry::Estimates {
        operations: estimates.operations,
        flows_opened: estimates.flows_opened,
        flows_open: estimates.flows_open,
        errors: estimates.errors,
        utilization: estimates.utilization,
        log_weight: estimates.log_weight as f32,
    });
    let chunk = |store::Chunk { tier_ms, start_ms, buckets }| Chunk { tier_ms, start_ms, buckets };
    let history = history.into_iter().map(chunk).collect();
    let remembered = Remembered { registration, ready, drained, estimates, history };
    let unreadable = registry.restore(remembered, LEASE, clock.now()).map_err(|error| error.to_string())?;
    if unreadable > 0 {
        tracing::warn!(resource = %id, unreadable, "parts of its history cannot be read and are left out");
    }
    Ok(followed)
}

/// The message that a row came from.
fn request(row: store::Resource) -> Result<RegisterRequest, String> {
    let (mut utilization_script, mut notify_url) = (None, String::new());
    for store::Script { kind, specification } in row.scripts {
        match kind {
            ScriptKind::Utilization => {
                let wire = UtilizationScript::decode(specification.as_slice());
                utilization_script = Some(wire.map_err(|error| error.to_string())?);
            }
            ScriptKind::Notification => {
                notify_url = String::from_utf8(specification).map_err(|error| error.to_string())?;
            }
        }
    }
    let resource = Resource {
        id: row.id,
        pool: row.pool,
        address: row.address,
        labels: row.labels.into_iter().collect(),
        version: row.version,
        flows_max: row.flows_max,
        weight: row.weight,
        probe_address: row.probe_address.unwrap_or_default(),
        utilization_script,
        notify_url,
    };
    let report_interval = Some(parse::wire_duration(Duration::from_millis(row.report_interval_ms)));
    Ok(RegisterRequest {
        resource: Some(resource),
        incarnation: row.incarnation,
        report_interval,
        ..RegisterRequest::default()
    })
}

/// Follows the utilization scripts of those that are remembered, as when they registered.
pub(crate) fn follow(shared: &Arc<Shared>, all: Vec<Followed>) {
    for (registration, script, wire) in all {
        let id = registration.id().clone();
        match shared.puller.judge(&registration, &script) {
            // Each waits for its first answer: none must wait for another's.
            Ok(()) => drop(tokio::spawn({
                let shared = Arc::clone(shared);
                async move { Puller::follow(&shared, registration, Some((script, wire))).await }
            })),
            Err(error) => {
                tracing::warn!(resource = %id, %error, "its utilization script is not followed again")
            }
        }
    }
}

/// Connects to those that are only remembered and not checked otherwise, until there is none.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut probes = Probes::default();
    loop {
        let mut unconfirmed = shared.registry.unconfirmed();
        unconfirmed.retain(|of| shared.checker.check(of.pool).is_none());
        if unconfirmed.is_empty() {
            return;
        }
        let asking = (&shared.checker, shared.pools.as_slice());
        probes
            .round(&shared.registry, asking, unconfirmed, shared.clock, || shared.changed.notify_one())
            .await;
        sleep(LOOK_EVERY).await;
    }
}

/// When each is to be connected to.
#[derive(Default)]
struct Probes {
    due: HashMap<ResourceId, Due>,
}

struct Due {
    at: Instant,
    failures: u32,
}

impl Probes {
    /// Asks all of these that are due: by their pool's check, or by connecting to them.
    async fn round(
        &mut self,
        registry: &Registry,
        (checker, pools): (&Checker, &[Pool]),
        all: Vec<CheckTarget>,
        clock: Clock,
        changed: impl Fn(),
    ) {
        let now = Instant::now();
        let is_due = |of: &CheckTarget| self.due.get(&of.id).is_none_or(|due| due.at <= now);
        let mut queue: VecDeque<CheckTarget> = all.into_iter().filter(is_due).collect();
        let connect = Arc::new(Check::of_connect(CONNECT_WITHIN));
        let mut asking = JoinSet::new();
        loop {
            while let Some(of) = (asking.len() < AT_ONCE).then(|| queue.pop_front()).flatten() {
                let check = Arc::clone(checker.check(of.pool).unwrap_or(&connect));
                let pool = pools[of.pool].config.name.to_string();
                asking.spawn(async move {
                    let subject = Subject { resource: of.id.to_string(), pool, address: of.address };
                    let begun = check.begin(&subject).await;
                    let passed =
                        matches!(begun, Begun::Ended(outcome) if outcome.verdict() == Verdict::Passed);
                    (of, passed)
                });
            }
            let Some(joined) = asking.join_next().await else { return };
            // Nothing in it panics.
            let Ok((of, answers)) = joined else { continue };
            if registry.checked(&of, answers, LEASE, clock.now()) {
                tracing::info!(resource = %of.id, address = %of.address, answers, "a remembered resource was asked");
                changed();
            }
            self.note(of.id, answers);
        }
    }

    fn note(&mut self, id: ResourceId, answers: bool) {
        let due = self.due.entry(id).or_insert_with(|| Due { at: Instant::now(), failures: 0 });
        due.failures = if answers { 0 } else { due.failures.saturating_add(1) };
        let doubled = RETRY_AFTER.saturating_mul(1 << due.failures.saturating_sub(1).min(10));
        due.at = Instant::now() + if answers { AGAIN_AFTER } else { doubled.min(AGAIN_AFTER) };
    }

    /// How many answered at the last look.
    fn answering(&self) -> usize {
        self.due.values().filter(|due| due.failures == 0).count()
    }
}
