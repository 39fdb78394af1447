//! What one provider has registered: by its key at the orchestrator, with what it last said.
//!
//! Owns: the way into the registry, the bounds, the lease while the orchestrator cannot be reached, the provider's
//! metrics. Does not own: what a resource is, which is the provider's to say.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use allocation::PoolName;
use registry::{
    RawRegistration, RawUtilization, Readiness, RegisterError, Registration, RegistrationError, Report,
    Utilization,
};

use super::ProviderConfig;
use crate::Shared;
use crate::metrics::{ProviderMetrics, ReportResult};

/// Most resources of one provider: far more than one engine runs, and a bound on what it can make us keep.
const RESOURCES_MAX: usize = 10_000;

/// A resource that an orchestrator offers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Offer {
    /// Unique at the orchestrator; the id is made of it.
    pub(super) name: String,
    pub(super) pool: String,
    pub(super) address: SocketAddr,
    /// Grows with every start.
    pub(super) incarnation: u64,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) version: String,
    /// 0: as the pool says.
    pub(super) flows_max: u32,
    /// 0 stands for 1.
    pub(super) weight: f64,
}

/// Why an offer is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum HoldError {
    /// The operator did not allow it.
    #[error("provider.pools does not have {0}")]
    Pool(PoolName),
    /// A bound of ours.
    #[error("this provider has {RESOURCES_MAX} resources, as many as it may")]
    Full,
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    #[error(transparent)]
    Register(#[from] RegisterError),
}

/// One provider's resources. Every method may be called from any task.
pub(super) struct Holder {
    shared: Arc<Shared>,
    name: String,
    pools: Vec<PoolName>,
    pub(super) report_interval: Duration,
    keep: Duration,
    pub(super) metrics: ProviderMetrics,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: HashMap<String, Held>,
    connection: Connection,
}

/// Whether the orchestrator is being followed.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Connection {
    #[default]
    New,
    Up,
    DownSince(Instant),
}

struct Held {
    registration: Registration,
    readiness: Readiness,
    /// The newest there is.
    utilization: Utilization,
}

impl Holder {
    pub(super) fn new(shared: Arc<Shared>, config: &ProviderConfig) -> Self {
        let metrics = shared.metrics.provider(&config.name);
        Self {
            shared,
            name: config.name.clone(),
            pools: config.pools.clone(),
            report_interval: config.report_interval,
            keep: config.keep,
            metrics,
            state: Mutex::default(),
        }
    }

    /// Registers what is offered under this key, or amends what is there.
    ///
    /// # Errors
    /// See [`HoldError`]; what was held under the key before is given up then.
    pub(super) fn hold(&self, key: &str, offer: Offer, readiness: Readiness) -> Result<(), HoldError> {
        let held = self.take(key, offer, readiness);
        if held.is_err() {
            self.release(key, "it is not offered any more");
        }
        held
    }

    fn take(&self, key: &str, offer: Offer, readiness: Readiness) -> Result<(), HoldError> {
        let registration = self.parse(offer)?;
        let mut state = self.lock();
        let is_full = state.held.len() >= RESOURCES_MAX;
        match state.held.get_mut(key) {
            Some(held) if held.registration.id() == registration.id() => {
                if held.registration != registration {
                    let next = Held { registration, readiness, utilization: held.utilization.clone() };
                    self.register(&next)?;
                    held.registration = next.registration;
                }
                if held.readiness != readiness {
                    held.readiness = readiness;
                    self.report(held);
                }
                return Ok(());
            }
            // Renamed.
            Some(_) => self.remove(&mut state, key, "it has another name now"),
            None if is_full => return Err(HoldError::Full),
            None => {}
        }
        let held = Held { registration, readiness, utilization: Utilization::default() };
        self.register(&held)?;
        let (id, pool, address) =
            (held.registration.id(), held.registration.pool(), held.registration.address());
        tracing::info!(resource = %id, %pool, %address, "registered");
        state.held.insert(key.to_owned(), held);
        self.metrics.resources(state.held.len());
        Ok(())
    }

    fn parse(&self, offer: Offer) -> Result<Registration, HoldError> {
        let mut labels = offer.labels;
        labels.insert("provider".to_owned(), self.name.clone());
        let registration = Registration::parse(RawRegistration {
            id: format!("{}:{}", self.name, offer.name),
            pool: offer.pool,
            address: offer.address.to_string(),
            incarnation: offer.incarnation,
            labels: labels.into_iter().collect(),
            version: offer.version,
            flows_max: offer.flows_max,
            weight: offer.weight,
            report_interval: Some(self.report_interval),
            ..RawRegistration::default()
        })?;
        if !self.pools.is_empty() && !self.pools.contains(registration.pool()) {
            return Err(HoldError::Pool(registration.pool().clone()));
        }
        Ok(registration)
    }

    fn register(&self, held: &Held) -> Result<(), RegisterError> {
        let (shared, registration) = (&self.shared, &held.registration);
        let register = || shared.registry.register(registration.clone(), shared.clock.now());
        let registered = match register() {
            // The id is ours, so the clock that incarnations are read from was set back.
            Err(RegisterError::OlderIncarnation { .. }) => {
                let _ = shared.registry.deregister(registration.id(), u64::MAX);
                register()?
            }
            other => other?,
        };
        if registered.created {
            shared.metrics.registered();
            if held.readiness != Readiness::Ready {
                self.report(held);
            }
            shared.changed.notify_one();
        }
        Ok(())
    }

    /// Whether something is held under this key.
    pub(super) fn holds(&self, key: &str) -> bool {
        self.lock().held.contains_key(key)
    }

    /// Says whether it wants new flows, if it is held and that is news.
    pub(super) fn set_readiness(&self, key: &str, readiness: Readiness, why: &'static str) {
        let mut state = self.lock();
        let Some(held) = state.held.get_mut(key).filter(|held| held.readiness != readiness) else { return };
        held.readiness = readiness;
        self.report(held);
        tracing::info!(resource = %held.registration.id(), readiness = ?readiness, why, "readiness changed");
    }

    /// Reports how busy it is. Numbers that no report may have are counted, and leave things as they were.
    pub(super) fn set_utilization(&self, key: &str, raw: RawUtilization) {
        let mut state = self.lock();
        let Some(held) = state.held.get_mut(key) else { return };
        match Utilization::parse(raw) {
            Ok(utilization) => {
                held.utilization = utilization;
                self.report(held);
            }
            Err(error) => {
                self.metrics.reported(ReportResult::Refused);
                tracing::debug!(resource = %held.registration.id(), %error, "report refused");
            }
        }
    }

    fn report(&self, held: &Held) {
        let report = Report {
            id: held.registration.id().clone(),
            incarnation: held.registration.incarnation(),
            readiness: held.readiness,
            utilization: held.utilization.clone(),
            balancers: 0,
            labels: None,
        };
        let reported = self.shared.registry.report(report, self.shared.clock.now());
        // Whose lease has ended is registered again by the next renewal.
        self.metrics.reported(if reported.is_ok() { ReportResult::Accepted } else { ReportResult::Unknown });
        self.shared.changed.notify_one();
    }

    /// Deregisters what is held under this key, if anything is. Open flows are left alone.
    pub(super) fn release(&self, key: &str, why: &'static str) {
        self.remove(&mut self.lock(), key, why);
    }

    /// Deregisters what is held under other keys than these.
    pub(super) fn retain(&self, keys: &HashSet<String>) {
        let mut state = self.lock();
        let gone: Vec<String> = state.held.keys().filter(|key| !keys.contains(*key)).cloned().collect();
        for key in gone {
            self.remove(&mut state, &key, "it is gone");
        }
    }

    fn remove(&self, state: &mut State, key: &str, why: &'static str) {
        let Some(held) = state.held.remove(key) else { return };
        // It only fails for an older incarnation, and ours is the newest.
        let _ = self.shared.registry.deregister(held.registration.id(), held.registration.incarnation());
        self.shared.changed.notify_one();
        self.metrics.resources(state.held.len());
        tracing::info!(resource = %held.registration.id(), why, "deregistered");
    }

    /// All there is at the orchestrator is known, and followed.
    pub(super) fn up(&self) {
        let mut state = self.lock();
        state.connection = Connection::Up;
        self.metrics.up(true);
        tracing::info!(provider = %self.name, resources = state.held.len(), "provider is followed");
    }

    /// It cannot be followed. True: it was until now.
    pub(super) fn lost(&self, error: &(impl std::error::Error + ?Sized)) -> bool {
        let mut state = self.lock();
        self.metrics.up(false);
        let was_up = state.connection == Connection::Up;
        if let Connection::DownSince(_) = state.connection {
            tracing::debug!(provider = %self.name, %error, "provider still cannot be followed");
            return false;
        }
        state.connection = Connection::DownSince(Instant::now());
        tracing::warn!(
            provider = %self.name, %error, resources = state.held.len(), keep = ?self.keep,
            "provider cannot be followed; its resources are kept meanwhile, and it is tried again"
        );
        was_up
    }

    /// Renews all leases, again and again. What cannot be reached for too long is let go.
    pub(super) async fn renew(&self) {
        let mut ticks = tokio::time::interval(self.report_interval);
        loop {
            ticks.tick().await;
            self.renew_once(Instant::now());
        }
    }

    fn renew_once(&self, now: Instant) {
        let mut state = self.lock();
        if let Connection::DownSince(since) = state.connection
            && now.saturating_duration_since(since) >= self.keep
        {
            let keys: Vec<String> = state.held.keys().cloned().collect();
            for key in keys {
                self.remove(&mut state, &key, "its provider cannot be reached for too long");
            }
        }
        for held in state.held.values() {
            // The same registration renews the lease and leaves the report's age: weights know how old their facts are.
            if let Err(error) = self.register(held) {
                tracing::debug!(resource = %held.registration.id(), %error, "lease not renewed");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is behind it is changed in whole steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
