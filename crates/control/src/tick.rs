//! The tick: leases end and tables are made, when there is reason to and no sooner.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::{Phase, Shared, reached};

/// Longest sleep: what a far deadline is cut to.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

/// Two looks are at least so far apart: thousands of reports a second must not wake the tick thousands of times.
const LOOK_GAP: Duration = Duration::from_micros(500);

/// Runs until the process ends, on a thread of its own: in a flood of reports, tables must not wait behind all of them.
///
/// # Errors
/// If the thread or its event loop cannot be had.
pub(crate) fn start(shared: Arc<Shared>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let thread = std::thread::Builder::new().name("tick".to_owned());
    thread.spawn(move || runtime.block_on(run(shared))).map(|_| ())
}

async fn run(shared: Arc<Shared>) {
    let mut terminated = std::pin::pin!(reached(shared.phase.clone(), Phase::Terminated));
    loop {
        let looked = Instant::now();
        step(&shared);
        let farthest = looked + SLEEP_MAX;
        let deadline = shared.clock.instant(shared.registry.next_deadline()).map(Instant::from_std);
        tokio::select! {
            () = &mut terminated => return,
            // A change that comes meanwhile is not lost: it is kept for the next wait.
            () = shared.changed.notified() => sleep_until(looked + LOOK_GAP).await,
            () = sleep_until(deadline.map_or(farthest, |at| at.min(farthest))) => {}
        }
    }
}

fn step(shared: &Shared) {
    let now = shared.clock.now();
    for gone in shared.expire(now) {
        tracing::warn!(
            resource = %gone.id(), pool = %gone.pool(), lease = ?gone.lease(),
            "no report within the lease: the resource gets no new flows until it registers again"
        );
        shared.puller.forget(&shared.registry, gone.id());
        shared.metrics.expired();
    }
    for rebuilt in shared.registry.rebuild(now) {
        let publishers = &shared.pools[rebuilt.pool].publishers;
        for (publisher, table) in publishers.iter().zip(rebuilt.tables) {
            publisher.publish(table);
        }
    }
    for (pool, version, why) in shared.registry.take_aborts() {
        tracing::warn!(%pool, version, why, "the version is worse than the baseline: it gets no new flows");
        shared.metrics.version_aborted();
        shared.keep_abort(&pool, &version, &why);
    }
}
