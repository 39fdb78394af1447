//! What this balancer's pools offer together, for whoever registers it with another balancer.

use std::sync::Arc;

use allocation::PoolName;
use registry::Offer;
use tokio::sync::watch;

use crate::{Phase, Shared};

/// A view of the pools of a running control. Cheap to clone.
#[derive(Clone)]
pub struct Offers {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Offers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offers").field("balancer", &self.shared.balancer_id).finish_non_exhaustive()
    }
}

impl Offers {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// What the resources offer that get flows from one of a pool's tables, by its place: the pool's own, then one for each of
    /// [`registry::PoolConfig::tables`]. Nothing, of a pool that there is not.
    pub fn of(&self, pool: &PoolName, table: usize) -> Offer {
        self.shared.registry.offer(pool, table, self.shared.clock.now()).unwrap_or_default()
    }

    /// This balancer, and every balancer that is a resource of its pools, directly or through others.
    pub fn beneath(&self) -> Vec<String> {
        self.shared.beneath.all(&self.shared.balancer_id, &self.shared.registry)
    }

    /// Where the process is in its life.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.shared.phase.clone()
    }
}
