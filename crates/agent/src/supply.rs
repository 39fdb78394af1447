//! Utilization that is told rather than measured: of a resource that is no host, such as a pool behind another balancer.
//!
//! Owns: what is told, and that readiness and labels follow it at once. Does not own: who tells, and how often.

use std::collections::HashMap;
use std::convert::Infallible;

use api::orca::OrcaLoadReport;
use tokio::sync::watch;

use crate::file::UtilizationFile;
use crate::service::Service;

/// What a resource is now, by whoever registers it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Supplied {
    /// Whether it wants new flows; until it first does, it is not registered.
    pub ready: bool,
    /// How busy it is.
    pub utilization: OrcaLoadReport,
    /// All of its labels.
    pub labels: HashMap<String, String>,
    /// The version of what it serves; a change registers it anew, in place.
    pub version: String,
    /// Balancers beneath it, itself among them; empty: it is no balancer.
    pub beneath: Vec<String>,
}

/// Passes on what is told, for ever.
pub(crate) async fn follow(
    mut supply: watch::Receiver<Supplied>,
    file: &UtilizationFile,
    found: watch::Sender<Service>,
) -> Infallible {
    loop {
        {
            let now = supply.borrow_and_update();
            let service =
                if now.ready { Service::Answers } else { Service::Silent("nothing is behind it".into()) };
            file.supply_labels(&now.labels);
            found.send_if_modified(|was| {
                let changed = *was != service;
                *was = service;
                changed
            });
        }
        if supply.changed().await.is_err() {
            // Nobody tells any more: what was told last stands until the agent ends.
            std::future::pending::<()>().await;
        }
    }
}
