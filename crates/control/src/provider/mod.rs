//! Providers: orchestration layers that start and end resources, register them and report for them.
//!
//! ```text
//! orchestrator -> Provider::follow -> Holder -> registry::Registry      as an agent would: parsed registrations, reports
//!                   (one module each)    \----- renewed while the orchestrator cannot be reached
//! ```
//!
//! * It owns the trait, who is followed, and what happens while one cannot be reached. It does not own what a provider has
//!   registered (`holder`) nor how an orchestrator is spoken to (`docker`).
//! * A provider owns the ids that begin with its name and a colon: no agent may register, report for or deregister
//!   one, so neither can take the other's resource over.

mod docker;
mod holder;

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use allocation::{PoolName, ResourceId};
use tonic::Status;

use self::docker::Docker;
use self::holder::Holder;
use crate::Shared;

/// Waits between two attempts to reach an orchestrator: from the first, doubled up to the second, which is short because a
/// refused connect costs next to nothing, and what comes or goes meanwhile is not seen. Without jitter: an
/// orchestrator has few balancers, and they did not all lose it in the same millisecond.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// An orchestration layer whose resources join by themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProviderConfig {
    /// What its resources' ids begin with (before a colon), and what metrics call it. Different for each.
    pub name: String,
    /// The pools that its resources may join; empty: every one.
    pub pools: Vec<PoolName>,
    /// How often each resource's utilization is read.
    pub report_interval: Duration,
    /// How long its resources are kept while it cannot be reached.
    pub keep: Duration,
    /// Which one it is.
    pub kind: ProviderKind,
}

/// Which orchestration layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProviderKind {
    /// One Docker Engine, alone or a node of a swarm.
    Docker(DockerConfig),
}

/// A Docker Engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DockerConfig {
    /// Where its API is.
    pub endpoint: DockerEndpoint,
    /// The host's address, for containers that use the host's network.
    pub address: Option<IpAddr>,
}

/// Where a Docker Engine answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DockerEndpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP, in clear text.
    Tcp(SocketAddr),
}

impl std::fmt::Display for DockerEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// An orchestration layer, followed.
trait Provider: Send {
    /// Why it cannot be followed any more.
    type Error: std::error::Error + Send;

    /// Registers what there is, and from then on what comes and goes, until the connection fails. It may be called again.
    fn follow(&mut self, holder: &Holder) -> impl Future<Output = Self::Error> + Send;
}

/// The providers' names, which no agent's id may begin with.
#[derive(Debug, Default)]
pub(crate) struct Reserved(Vec<String>);

impl Reserved {
    pub(crate) fn of(providers: &[ProviderConfig]) -> Self {
        Self(providers.iter().map(|provider| provider.name.clone()).collect())
    }

    /// Refuses a peer that speaks for a provider's resource.
    ///
    /// # Errors
    /// What the peer is to be told.
    pub(crate) fn refuse(&self, id: &ResourceId) -> Result<(), Status> {
        let Some((name, _)) = id.as_str().split_once(':') else { return Ok(()) };
        if self.0.iter().any(|reserved| reserved == name) {
            return Err(Status::permission_denied(format!(
                "ids that begin with {name}: belong to the provider {name} of this balancer: take another id"
            )));
        }
        Ok(())
    }
}

/// Follows one orchestration layer until the task is aborted.
pub(crate) async fn run(shared: Arc<Shared>, config: ProviderConfig) {
    let holder = Holder::new(shared, &config);
    match config.kind {
        ProviderKind::Docker(docker) => supervise(Docker::new(docker), &holder).await,
    }
}

async fn supervise(mut provider: impl Provider, holder: &Holder) {
    let followed = async {
        let mut wait = RETRY.0;
        loop {
            let error = provider.follow(holder).await;
            if holder.lost(&error) {
                wait = RETRY.0;
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY.1);
        }
    };
    // Beside it, and not within: an orchestrator that hangs must not let leases end.
    tokio::join!(followed, holder.renew());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_with_a_providers_name_is_its_own() {
        let reserved = Reserved(vec!["docker".into(), "rack2".into()]);
        let refused = |id: &str| reserved.refuse(&id.parse().unwrap()).is_err();
        assert!(refused("docker:web.1") && refused("rack2:") && refused("docker:a:b"));
        assert!(
            !refused("docker") && !refused("docker.web") && !refused("dock:web") && !refused("web:docker")
        );
        assert!(Reserved::default().refuse(&"docker:web.1".parse().unwrap()).is_ok());
    }
}
