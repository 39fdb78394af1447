//! A sample of selections as JSON lines, for whoever wants to look at many of them afterwards. Off unless configured.
//!
//! Workers put the sample aside, bounded (see `dataplane`); it is fetched a few times a second and written here. A disk that is
//! slow or full costs log lines, which are counted, and never a flow.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api::v1;
use tokio::time::{MissedTickBehavior, interval};

use crate::explain::wire_decision;
use crate::{DecisionLog, Shared, StartError};

/// How often the sample is fetched: the workers keep some thousand for that long.
const FETCH_EVERY: Duration = Duration::from_millis(200);

/// Where lines go.
pub(crate) enum Writer {
    Stdout,
    File(File),
}

impl Writer {
    pub(crate) fn open(to: DecisionLog) -> Result<Self, StartError> {
        match to {
            DecisionLog::Stdout => Ok(Self::Stdout),
            DecisionLog::File(path) => match OpenOptions::new().create(true).append(true).open(&path) {
                Ok(file) => Ok(Self::File(file)),
                Err(source) => Err(StartError::DecisionLog { path, source }),
            },
        }
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().write_all(text.as_bytes()),
            Self::File(file) => file.write_all(text.as_bytes()),
        }
    }
}

/// Runs until it is aborted.
pub(crate) async fn run(mut writer: Writer, shared: Arc<Shared>) {
    let mut ticks = interval(FETCH_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let fetched = Arc::clone(&shared);
        // Writing may block; the runtime's threads must not.
        let written = tokio::task::spawn_blocking(move || {
            let (text, count, lost) = lines(&fetched);
            let result = if text.is_empty() { Ok(()) } else { writer.write(&text) };
            (writer, result, count, lost)
        });
        let Ok((back, result, count, lost)) = written.await else { return };
        writer = back;
        shared.metrics.decisions_logged(if result.is_ok() { count } else { 0 });
        shared.metrics.decisions_lost(if result.is_ok() { lost } else { lost + count });
        if let Err(error) = result {
            tracing::warn!(%error, "the decision log cannot be written; its lines are lost and counted");
        }
    }
}

fn lines(shared: &Shared) -> (String, u64, u64) {
    let (decisions, lost) = shared.dataplane.take_sampled_decisions();
    if decisions.is_empty() {
        return (String::new(), 0, lost);
    }
    let (now, listeners) = (shared.clock.now(), shared.dataplane.listeners());
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut text = String::new();
    for decision in &decisions {
        let at = wall.saturating_sub(now.since(decision.at));
        let pool = listeners.get(usize::from(decision.listener)).map_or("", |l| l.pool(decision.target));
        let wire = wire_decision(decision, &listeners, now);
        text.push_str(&line(at, pool, decision.table.policy().name(), &wire).to_string());
        text.push('\n');
    }
    (text, decisions.len() as u64, lost)
}

fn line(at: Duration, pool: &str, policy: &str, decision: &v1::Decision) -> serde_json::Value {
    let look = |look: &v1::Look| {
        // An infinite cost has no number in JSON.
        let cost = look.cost.is_finite().then_some(look.cost);
        serde_json::json!({
            "id": look.id, "flows_open": look.flows_open, "weight": look.weight, "cost": cost,
            "passed_over": look.passed_over,
        })
    };
    let left_out = |left: &v1::LeftOut| serde_json::json!({ "id": left.id, "why": left.why });
    serde_json::json!({
        "time": at.as_secs_f64(),
        "pool": pool,
        "policy": policy,
        "listener": decision.listener,
        "route": decision.route,
        "worker": decision.worker,
        "generation": decision.generation,
        "chosen": decision.chosen,
        "no_backend": decision.no_backend,
        "version": decision.version,
        "tried": decision.tried,
        "kept": decision.kept,
        "eligible": decision.eligible,
        "looks": decision.looks.iter().map(look).collect::<Vec<_>>(),
        "left_out": decision.left_out.iter().map(left_out).collect::<Vec<_>>(),
    })
}
