//! An agent's life with one balancer.
//!
//! ```text
//!                    +--------------------------- answers ------------------------+
//!                    v                                                            |
//! CheckingService -> Registering -> Reporting --- lost / not registered ---> Waiting -> (service?) -> Registering …
//!                    |                                                            ^
//!                    +---------------- refused / unreachable ---------------------+
//!
//! any of them -- shutdown --> Deregistered
//! ```
//!
//! A balancer's absence is waited out, however long it lasts; so is its refusal. Only what makes no sense here ends
//! an agent ([`AgentError`]).
//!
//! Each life measures for itself: a balancer's reports then cover all time without a gap, over windows of its own
//! interval. From a shared sampler each would see only the slice since somebody else's report, the shorter the more
//! balancers there are. A look at the kernel's files takes a fraction of a millisecond.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use api::v1::DeregisterRequest;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Uri;
use tracing::{debug, error, info, warn};

use crate::agent::{AgentState, Common};
use crate::backoff::Backoff;
use crate::balancers::BalancerId;
use crate::config::AgentError;
use crate::meter::{Meter, WINDOW_MIN};
use crate::said::Said;
use crate::service::Service;
use crate::session::{self, Client, Ended, Session};

/// For taking leave; whoever stops the agent waits for it.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);

/// What a life with one balancer keeps.
pub(crate) struct Life {
    common: Arc<Common>,
    /// Which of the agent's balancers it is.
    id: BalancerId,
    balancer: Uri,
    service: watch::Receiver<Service>,
    /// Of the last session.
    client: Option<Client>,
    /// From before the first registration is sent: its answer may be lost.
    may_be_registered: bool,
    attempt: u32,
    /// What was logged since all was well.
    troubles: Said,
}

impl Life {
    /// With this one of the agent's balancers.
    pub(crate) fn new(common: Arc<Common>, id: BalancerId, balancer: Uri) -> Self {
        Self {
            id,
            balancer,
            service: common.service.clone(),
            client: None,
            may_be_registered: false,
            attempt: 0,
            troubles: Said::default(),
            common,
        }
    }

    /// Until told to stop, then deregisters.
    pub(crate) async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<(), AgentError> {
        // Without a sender there is no agent any more either.
        let stopped = async { drop(stop.wait_for(|stop| *stop).await) };
        let ended = tokio::select! {
            ended = self.live() => ended.map(|never| match never {}),
            () = stopped => Ok(()),
        };
        self.leave().await;
        self.set_state(AgentState::Deregistered);
        ended
    }

    fn set_state(&self, state: AgentState) {
        self.common.balancers.set_state(self.id, state);
    }

    async fn live(&mut self) -> Result<Infallible, AgentError> {
        self.wait_for_service().await;
        // All meters lack the same: the first life says it for all.
        let mut meter = Meter::new(&self.common.config, Instant::now().into_std(), self.id.is_first())?;
        // So that the first report has rates in it.
        sleep(WINDOW_MIN).await;
        let retry = self.common.config.retry;
        // Balancers that went at once are not tried at once.
        let seed = self.common.config.seed.wrapping_add(self.id.number());
        let mut backoff = Backoff::new(retry.first, retry.cap, seed);
        loop {
            // Not before the service answers: from its registration on a resource may be given flows.
            self.wait_for_service().await;
            let (ended, was_heard) = self.session(&mut meter).await;
            self.common.balancers.set_drains(self.id, false);
            if was_heard {
                backoff.reset();
                self.attempt = 0;
                self.troubles.forget();
            }
            let pause = match ended {
                Ended::Refused(_) => backoff.steady(retry.refused),
                Ended::NotRegistered | Ended::Amended | Ended::Lost(_) => backoff.pause(),
            };
            let why = self.log(ended);
            self.set_state(AgentState::Waiting { why, pause });
            sleep(pause).await;
        }
    }

    async fn wait_for_service(&mut self) {
        if self.service.borrow_and_update().answers() {
            return;
        }
        self.set_state(AgentState::CheckingService);
        if self.service.wait_for(Service::answers).await.is_err() {
            // The check ended, and with it the agent: this life is about to be told to stop.
            std::future::pending().await
        }
    }

    /// One session from its start to its end. Also says whether any report was answered.
    async fn session(&mut self, meter: &mut Meter) -> (Ended, bool) {
        self.attempt = self.attempt.saturating_add(1);
        self.set_state(AgentState::Registering { attempt: self.attempt });
        let balancer = self.common.balancers.addressed(self.id, &self.balancer);
        let mut client = match session::connect(&self.common.config.transport, &balancer).await {
            Ok(client) => client,
            Err(ended) => return (ended, false),
        };
        self.client = Some(client.clone());
        self.may_be_registered = true;
        let version = match session::register(&mut client, &self.common).await {
            Ok(version) => version,
            Err(ended) => return (ended, false),
        };
        Session::report(&mut client, &self.common, self.id, version, meter, &mut self.service).await
    }

    /// Says what ended a session: each message once until reports are answered again.
    fn log(&mut self, ended: Ended) -> String {
        let balancer = &self.balancer;
        match ended {
            Ended::NotRegistered => {
                info!(%balancer, "not registered there any more: registering again");
                "not registered any more".into()
            }
            Ended::Amended => "another version".into(),
            Ended::Refused(why) => {
                if self.troubles.is_new(&why) {
                    error!(%balancer, why, "the balancer refuses this resource; trying again now and then");
                }
                why
            }
            Ended::Lost(why) => {
                if self.troubles.is_new(&why) {
                    warn!(%balancer, why, "no connection to the balancer; trying again until there is one");
                } else {
                    debug!(%balancer, why, attempt = self.attempt, "still no connection");
                }
                why
            }
        }
    }

    async fn leave(&mut self) {
        if !self.may_be_registered {
            return;
        }
        let Some(mut client) = self.client.take() else { return };
        let balancer = &self.balancer;
        let config = &self.common.config;
        let request = DeregisterRequest { id: config.resource.id.clone(), incarnation: config.incarnation };
        match timeout(LEAVE_PATIENCE, client.deregister(request)).await {
            Ok(Ok(_)) => info!(%balancer, id = config.resource.id, "deregistered"),
            Ok(Err(status)) => {
                warn!(%balancer, why = status.message(), "not deregistered: the lease will expire");
            }
            Err(_) => {
                warn!(%balancer, "not deregistered within {LEAVE_PATIENCE:?}: the lease will expire");
            }
        }
    }
}
