//! The life of an agent.
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

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use api::v1::DeregisterRequest;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, info, warn};

use crate::backoff::Backoff;
use crate::config::{AgentConfig, AgentError};
use crate::meter::{Meter, WINDOW_MIN};
use crate::said::Said;
use crate::service::{self, Service};
use crate::session::{self, Client, Ended, Session};

/// For taking leave; whoever stops the agent waits for it.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);
/// Longest time between two checks of the service, under long report intervals.
const CHECK_INTERVAL_MAX: Duration = Duration::from_secs(5);

/// What an agent does now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentState {
    /// It waits for its own service to answer; it is not registered.
    CheckingService,
    /// It connects to the balancer and registers; `attempt` counts from 1 since it last reported.
    Registering {
        /// Which attempt.
        attempt: u32,
    },
    /// It is registered, and its reports are answered.
    Reporting {
        /// When the first of them was.
        since: Instant,
    },
    /// Something went wrong; it tries again after a pause.
    Waiting {
        /// What, for people.
        why: String,
        /// How long.
        pause: Duration,
    },
    /// It left, or did what can be done for that: without a balancer its lease expires.
    Deregistered,
}

/// A sidecar: registers a resource, reports its utilization, and deregisters it.
#[derive(Debug)]
pub struct Agent {
    config: AgentConfig,
    state: watch::Sender<AgentState>,
}

/// Runs an agent until `shutdown` resolves, then deregisters.
///
/// # Errors
/// When the configuration makes no sense; see [`AgentError`].
pub async fn run(config: AgentConfig, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
    Agent::new(config)?.run(shutdown).await
}

impl Agent {
    /// An agent that does nothing yet.
    ///
    /// # Errors
    /// When the configuration makes no sense; see [`AgentError`].
    pub fn new(config: AgentConfig) -> Result<Self, AgentError> {
        config.validate()?;
        Ok(Self { config, state: watch::Sender::new(AgentState::CheckingService) })
    }

    /// Follows what it does.
    pub fn state(&self) -> watch::Receiver<AgentState> {
        self.state.subscribe()
    }

    /// Runs until `shutdown` resolves, then deregisters, which takes a second at most.
    ///
    /// # Errors
    /// When the service answers and its cgroup does not exist.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
        let (service_sender, service) = watch::channel(Service::Unknown);
        let mut life = Life {
            config: &self.config,
            state: &self.state,
            service,
            client: None,
            may_be_registered: false,
            attempt: 0,
            troubles: Said::default(),
        };
        let result = tokio::select! {
            ended = life.live() => ended.map(|never| match never {}),
            never = check_service(&self.config, service_sender) => match never? {},
            () = shutdown => Ok(()),
        };
        life.leave().await;
        self.state.send_replace(AgentState::Deregistered);
        result
    }
}

async fn check_service(
    config: &AgentConfig,
    found: watch::Sender<Service>,
) -> Result<Infallible, AgentError> {
    let Some((address, patience)) = config.service()? else {
        found.send_replace(Service::Answers);
        return std::future::pending().await;
    };
    Ok(service::check(address, patience, config.report_interval.min(CHECK_INTERVAL_MAX), found).await)
}

/// What a running agent keeps.
struct Life<'a> {
    config: &'a AgentConfig,
    state: &'a watch::Sender<AgentState>,
    service: watch::Receiver<Service>,
    /// Of the last session.
    client: Option<Client>,
    /// From before the first registration is sent: its answer may be lost.
    may_be_registered: bool,
    attempt: u32,
    /// What was logged since all was well.
    troubles: Said,
}

impl Life<'_> {
    async fn live(&mut self) -> Result<Infallible, AgentError> {
        self.wait_for_service().await;
        let mut meter = Meter::new(self.config, Instant::now().into_std())?;
        // So that the first report has rates in it.
        sleep(WINDOW_MIN).await;
        let retry = self.config.retry;
        let mut backoff = Backoff::new(retry.first, retry.cap, self.config.seed);
        loop {
            // Not before the service answers: from its registration on a resource may be given flows.
            self.wait_for_service().await;
            let (ended, was_heard) = self.session(&mut meter).await;
            if was_heard {
                backoff.reset();
                self.attempt = 0;
                self.troubles.forget();
            }
            let pause = match ended {
                Ended::Refused(_) => backoff.steady(retry.refused),
                Ended::NotRegistered | Ended::Lost(_) => backoff.pause(),
            };
            let why = self.log(ended);
            self.state.send_replace(AgentState::Waiting { why, pause });
            sleep(pause).await;
        }
    }

    async fn wait_for_service(&mut self) {
        if self.service.borrow_and_update().answers() {
            return;
        }
        self.state.send_replace(AgentState::CheckingService);
        loop {
            let service = self.service.borrow_and_update().clone();
            match &service {
                Service::Answers => break,
                Service::Unknown => {}
                Service::Silent(_) => {
                    let text = service.to_string();
                    if self.troubles.is_new(&text) {
                        warn!(
                            address = self.config.resource.address,
                            "not registered yet: the service {text}"
                        );
                    }
                }
            }
            if self.service.changed().await.is_err() {
                // The check ended, and with it the agent: its other half is about to drop this future.
                return std::future::pending().await;
            }
        }
        info!(address = self.config.resource.address, "the service answers");
    }

    /// One session from its start to its end. Also says whether any report was answered.
    async fn session(&mut self, meter: &mut Meter) -> (Ended, bool) {
        self.attempt = self.attempt.saturating_add(1);
        self.state.send_replace(AgentState::Registering { attempt: self.attempt });
        let mut client = match session::connect(self.config).await {
            Ok(client) => client,
            Err(ended) => return (ended, false),
        };
        self.client = Some(client.clone());
        self.may_be_registered = true;
        if let Err(ended) = session::register(&mut client, self.config).await {
            return (ended, false);
        }
        Session::report(&mut client, self.config, meter, &mut self.service, self.state).await
    }

    /// Says what ended a session: each message once until reports are answered again.
    fn log(&mut self, ended: Ended) -> String {
        let balancer = &self.config.balancer;
        match ended {
            Ended::NotRegistered => {
                info!(%balancer, "not registered there any more: registering again");
                "not registered any more".into()
            }
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
        let request =
            DeregisterRequest { id: self.config.resource.id.clone(), incarnation: self.config.incarnation };
        match timeout(LEAVE_PATIENCE, client.deregister(request)).await {
            Ok(Ok(_)) => info!(id = self.config.resource.id, "deregistered"),
            Ok(Err(status)) => warn!(why = status.message(), "not deregistered: the lease will expire"),
            Err(_) => warn!("not deregistered within {LEAVE_PATIENCE:?}: the lease will expire"),
        }
    }
}
