//! A balancer as a resource of others: each of its listeners joins a pool there, and reports what its own pool has left.
//!
//! ```text
//! registry --Offers--> what the pool's resources offer together --Supplied--> an agent for each listener --gRPC--> above
//! ```
//!
//! The balancer above sees one resource. How many are behind it, and how large they are, it learns as of any other: by what
//! the resource does for its utilization.
//!
//! Owns: the agents, and what they are told. Does not own: what is offered (`registry`), and that nothing goes round in a
//! circle (`control::beneath`).

use std::net::SocketAddr;
use std::time::Duration;

use agent::{AgentConfig, Supplied};
use allocation::PoolName;
use api::orca::OrcaLoadReport;
use api::v1::Resource;
use control::{Offers, Phase};
use registry::Offer;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::config::{Config, UpstreamConfig};
use crate::failure::Failure;
use crate::host_name;
use crate::sidecar::default_id;

/// How often the pools are looked at; a pool that nobody is left in says so within this time.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// What agents may take for leaving before the listeners stop accepting.
const LEAVE_WITHIN: Duration = Duration::from_millis(500);
/// Entries of a map that a resource may send; some are left for what an operator above adds.
const LABELS_MAX: usize = 48;

/// One listener that is registered with one set of balancers.
#[derive(Debug)]
struct Link {
    pool: PoolName,
    table: usize,
    agent: AgentConfig,
}

/// Every agent of the balancer.
#[derive(Debug, Default)]
pub(crate) struct Upstreams {
    running: Vec<JoinHandle<()>>,
}

impl Upstreams {
    /// Starts an agent for each listener of each `[[upstream]]`, as soon as control runs. `bound` is where the listeners are
    /// bound, in their order.
    ///
    /// # Errors
    /// When a balancer's address makes no sense.
    pub(crate) fn start(
        config: &Config,
        bound: &[SocketAddr],
        offers: oneshot::Receiver<Offers>,
        runtime: &Handle,
    ) -> Result<Self, Failure> {
        let mut links = Vec::new();
        for upstream in &config.upstreams {
            links.extend(self::links(config, upstream, bound)?);
        }
        if links.is_empty() {
            return Ok(Self::default());
        }
        let running = runtime.spawn(async move {
            // Control did not start: the process is about to end.
            let Ok(offers) = offers.await else { return };
            let mut links: tokio::task::JoinSet<()> =
                links.into_iter().map(|link| run(link, offers.clone())).collect();
            while links.join_next().await.is_some() {}
        });
        Ok(Self { running: vec![running] })
    }

    /// Waits until the agents have left, for a bounded time. The phase told them to.
    pub(crate) fn leave(&mut self, runtime: &Handle) {
        let running = std::mem::take(&mut self.running);
        runtime.block_on(async {
            let all = async {
                for agent in running {
                    // A panic was said where it was.
                    let _ = agent.await;
                }
            };
            if tokio::time::timeout(LEAVE_WITHIN, all).await.is_err() {
                tracing::warn!("not all balancers above have answered the leave: their leases will expire");
            }
        });
    }
}

fn links(config: &Config, upstream: &UpstreamConfig, bound: &[SocketAddr]) -> Result<Vec<Link>, Failure> {
    let mut balancers = Vec::new();
    for balancer in &upstream.balancers {
        let parsed = balancer.parse();
        balancers
            .push(parsed.map_err(|error| Failure::start(format!("upstream.balancer {balancer}: {error}")))?);
    }
    let listeners = config.listeners.iter().zip(bound);
    let meant =
        listeners.filter(|(listener, _)| upstream.listener.is_none_or(|wanted| wanted == listener.bind));
    let mut links = Vec::new();
    for (listener, bound) in meant {
        let address = upstream.address.unwrap_or(*bound);
        let id = upstream.id.as_ref().map_or_else(|| default_id(&host_name(), address), ToString::to_string);
        let resource = Resource {
            id,
            pool: upstream.pool.as_ref().unwrap_or(&listener.pool).to_string(),
            address: address.to_string(),
            ..Resource::default()
        };
        let mut agent = AgentConfig::new(balancers.clone(), resource);
        agent.transport = upstream.transport.clone();
        agent.report_interval = upstream.report_interval;
        links.push(Link {
            pool: listener.pool.clone(),
            table: config.table_of(&listener.pool, listener),
            agent,
        });
    }
    Ok(links)
}

/// Registers one listener for as long as the balancer takes flows.
async fn run(link: Link, offers: Offers) {
    let Link { pool, table, mut agent } = link;
    let mut phase = offers.phase();
    let look = || supplied(&offers.of(&pool, table), offers.beneath());
    let (tell, told) = watch::channel(look());
    agent.supply = Some(told);
    let id = agent.resource.id.clone();
    let mut left = phase.clone();
    let registered = agent::run(agent, async move {
        // The error says that the process ends.
        let _ = left.wait_for(|phase| *phase >= Phase::Draining).await;
    });
    let looking = async {
        while *phase.borrow_and_update() < Phase::Draining {
            tell.send_if_modified(|was| {
                let now = look();
                let changed = *was != now;
                *was = now;
                changed
            });
            tokio::time::sleep(LOOK_EVERY).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = registered => {
            if let Err(error) = ended {
                tracing::error!(resource = id, %error, "this balancer is not registered with another");
            }
        }
        () = looking => {}
    }
}

/// A pool's offer, as a resource says it.
fn supplied(offer: &Offer, beneath: Vec<String>) -> Supplied {
    let busy = offer.busy.unwrap_or(0.0);
    let mut utilization = OrcaLoadReport {
        application_utilization: busy,
        rps_fractional: offer.operations.unwrap_or(0.0),
        eps: offer.errors,
        ..OrcaLoadReport::default()
    };
    for (dimension, value) in &offer.dimensions {
        match dimension.as_str() {
            "cpu" => utilization.cpu_utilization = *value,
            "memory" => utilization.mem_utilization = *value,
            // What a resource says of itself as a whole is in `busy` already.
            "application" => {}
            _ => drop(utilization.utilization.insert(dimension.clone(), *value)),
        }
    }
    let labels = offer.labels.iter().take(LABELS_MAX).map(|(key, value)| (key.clone(), value.clone()));
    Supplied {
        ready: offer.resources > 0,
        utilization,
        labels: labels.collect(),
        version: offer.version.clone().unwrap_or_default(),
        beneath,
    }
}
