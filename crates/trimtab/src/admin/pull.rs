//! `trimtab pull ID`, and utilization scripts in output.

use std::collections::BTreeMap;
use std::time::Duration;

use api::v1::utilization_script::Kind;
use api::v1::{PullRequest, UtilizationScript};
use serde::Serialize;

use super::{Admin, ask, show};
use crate::cli::ResourceArgs;
use crate::failure::Failure;
use crate::register::PullView;

/// A resource's utilization script.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScriptView {
    /// `http`, `orca` or `agent-check`.
    pub kind: &'static str,
    /// Whom it asks; a query is not shown.
    pub target: String,
    /// How often; `null`: by its schedule alone, or by default.
    pub interval_seconds: Option<f64>,
    /// As cron has it, in UTC; empty: none.
    pub schedule: String,
    /// After so many flows; 0: not so.
    pub after_flows: u64,
    /// What came of it.
    #[serde(flatten)]
    pub pull: PullView,
}

impl From<UtilizationScript> for ScriptView {
    fn from(script: UtilizationScript) -> Self {
        let (kind, target) = match script.kind {
            Some(Kind::Http(http)) => ("http", http.url),
            Some(Kind::Orca(orca)) => ("orca", orca.address),
            Some(Kind::AgentCheck(check)) => ("agent-check", check.address),
            None => ("", String::new()),
        };
        let interval = script.interval.and_then(|interval| Duration::try_from(interval).ok());
        Self {
            kind,
            target,
            interval_seconds: interval.map(|interval| interval.as_secs_f64()),
            schedule: script.schedule,
            after_flows: script.after_flows,
            pull: script.status.unwrap_or_default().into(),
        }
    }
}

#[derive(Serialize)]
struct Pulled {
    id: String,
    pull: PullView,
    utilization: BTreeMap<String, f64>,
}

/// `trimtab pull ID`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn pull(args: &ResourceArgs) -> Result<(), Failure> {
    let pulled = ask(async {
        let mut admin = Admin::connect(&args.admin).await?;
        let answer = admin.client.pull(PullRequest { id: args.id.clone() }).await;
        let answer = answer.map_err(|status| admin.failure(&status))?.into_inner();
        Ok(Pulled {
            id: args.id.clone(),
            pull: answer.status.unwrap_or_default().into(),
            utilization: answer.utilization.into_iter().collect(),
        })
    })?;
    show(args.admin.output, &pulled, |pulled| {
        let mut text = format!("{}: {}\n", pulled.id, pulled.pull.in_words());
        for (dimension, value) in &pulled.utilization {
            text += &format!("  {} {value:.3}\n", crate::output::printable(dimension));
        }
        text
    })
}
