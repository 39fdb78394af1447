//! The agent's numbers, served to others: to gRPC clients and Envoy (ORCA), to HAProxy (agent-check), to Prometheus.
//!
//! * Each serves on a port of its own, to whoever reaches it: numbers, no secrets. Connections are bounded in number and time.
//! * What is served is measured once at each report interval, with everything above it that reports have, too. It does not depend
//!   on any balancer: without one, the numbers are there all the same.

mod accept;
mod agent_check;
mod metrics;
mod orca;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use api::orca::OrcaLoadReport;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::agent::Common;
use crate::config::AgentError;
use crate::meter::{Meter, WINDOW_MIN};
use crate::service::Service;

/// Where the agent serves its numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServeConfig {
    /// ORCA's `OpenRcaService` (gRPC, clear text).
    pub orca: Option<SocketAddr>,
    /// HAProxy's agent-check.
    pub agent_check: Option<SocketAddr>,
    /// `/metrics` in Prometheus' text format.
    pub metrics: Option<SocketAddr>,
}

/// Sockets that are bound, before anything is served.
#[derive(Debug)]
pub(crate) struct Servers {
    orca: Option<TcpListener>,
    agent_check: Option<TcpListener>,
    metrics: Option<TcpListener>,
}

/// What is served: `None` until something was measured.
type Numbers = watch::Receiver<Option<OrcaLoadReport>>;

impl Servers {
    pub(crate) async fn bind(config: &ServeConfig) -> Result<Self, AgentError> {
        Ok(Self {
            orca: bind("ORCA", config.orca).await?,
            agent_check: bind("agent-check", config.agent_check).await?,
            metrics: bind("metrics", config.metrics).await?,
        })
    }

    /// Serves for ever; where it cannot measure, says why.
    pub(crate) async fn run(self, common: &Arc<Common>) -> AgentError {
        if self.orca.is_none() && self.agent_check.is_none() && self.metrics.is_none() {
            return std::future::pending().await;
        }
        let (sender, numbers) = watch::channel(None);
        tokio::select! {
            error = measure(common, sender) => match error { Err(error) => error, Ok(never) => match never {} },
            never = serve_orca(self.orca, numbers.clone(), common) => match never {},
            never = serve_agent_check(self.agent_check, numbers.clone(), common) => match never {},
            never = serve_metrics(self.metrics, numbers.clone(), common) => match never {},
        }
    }
}

async fn bind(what: &'static str, address: Option<SocketAddr>) -> Result<Option<TcpListener>, AgentError> {
    let Some(address) = address else { return Ok(None) };
    let bound = TcpListener::bind(address).await;
    bound.map(Some).map_err(|error| AgentError::ServeBind { what, address, why: error.to_string() })
}

/// Measures at each report interval. Its meter is its own, as each life's is.
async fn measure(
    common: &Common,
    numbers: watch::Sender<Option<OrcaLoadReport>>,
) -> Result<Infallible, AgentError> {
    // Its cgroup may be there only once the service is.
    let mut service = common.service.clone();
    if service.wait_for(Service::answers).await.is_err() {
        std::future::pending().await
    }
    let mut meter = Meter::new(&common.config, Instant::now().into_std(), false)?;
    let interval = common.config.report_interval.max(WINDOW_MIN);
    sleep(WINDOW_MIN).await;
    loop {
        let over = common.file.read();
        numbers.send_replace(Some(meter.report(Instant::now().into_std(), &over)));
        sleep(interval).await;
    }
}

async fn serve_orca(listener: Option<TcpListener>, numbers: Numbers, common: &Common) -> Infallible {
    match listener {
        Some(listener) => orca::serve(listener, numbers, common.config.report_interval).await,
        None => std::future::pending().await,
    }
}

async fn serve_agent_check(
    listener: Option<TcpListener>,
    numbers: Numbers,
    common: &Arc<Common>,
) -> Infallible {
    match listener {
        Some(listener) => agent_check::serve(listener, numbers, common).await,
        None => std::future::pending().await,
    }
}

async fn serve_metrics(listener: Option<TcpListener>, numbers: Numbers, common: &Arc<Common>) -> Infallible {
    match listener {
        Some(listener) => metrics::serve(listener, numbers, common).await,
        None => std::future::pending().await,
    }
}
