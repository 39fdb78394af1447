//! Notices to resources that want them posted: CloudEvents 1.0 in structured JSON, at least once.
//!
//! Owns: which posts run, and how many at once. Does not own: what is to be posted and when to try again ([`super::book`]),
//! where one may post (`pull`: the rules of utilization scripts).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use allocation::PoolName;
use formats::notice::{EVENT_TYPE, Event, rfc3339};
use registry::Registration;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep_until};

use super::book::{Notice, What};
use crate::{Phase, Shared, reached};

/// What one post may take, with looking its host up.
const WITHIN: Duration = Duration::from_secs(2);
/// Posts at once.
const AT_ONCE: usize = 16;
/// Resources that come later are looked for so often, while a notice holds.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Posts what is to be posted, for ever.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut changed = shared.notices.changes();
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let ended = Arc::new(Notify::new());
    loop {
        let wall = SystemTime::now();
        let holds = shared.notices.lock().holds_any(wall);
        if holds {
            for registration in shared.registry.notified() {
                start(&shared, &registration, &permits, &ended);
            }
        }
        let next = Instant::now() + LOOK_EVERY;
        let next = shared.notices.next_post().map_or(next, |due| next.min(due.into()));
        tokio::select! {
            changed = changed.changed() => if changed.is_err() { return },
            () = ended.notified() => {}
            () = sleep_until(next), if holds => {}
            () = reached(shared.phase.clone(), Phase::Terminated) => return,
        }
    }
}

/// Starts the posts that are due to one resource.
fn start(
    shared: &Arc<Shared>,
    registration: &Arc<Registration>,
    permits: &Arc<Semaphore>,
    ended: &Arc<Notify>,
) {
    let pool: &PoolName = registration.pool();
    for notice in shared.notices.post(registration.id(), pool) {
        let (shared, registration) = (Arc::clone(shared), Arc::clone(registration));
        let (permits, ended) = (Arc::clone(permits), Arc::clone(ended));
        // Each is under way once, and those that wait for a permit are as many as notices times resources at most.
        tokio::spawn(async move {
            // The semaphore is never closed.
            let Ok(_permit) = permits.acquire().await else { return };
            let failure = post(&shared, &registration, &notice).await.err();
            shared.metrics.notice_posted(failure.is_none());
            if let Some(why) = &failure {
                tracing::debug!(resource = %registration.id(), notice = notice.id, why, "a notice was not taken");
            }
            shared.notices.posted(registration.id(), &notice.id, failure);
            ended.notify_one();
        });
    }
}

/// One try.
///
/// # Errors
/// Why it was not taken, in words.
async fn post(shared: &Shared, registration: &Registration, notice: &Notice) -> Result<(), String> {
    let url = registration.notify_url().unwrap_or_default();
    let url: fetch::Url = url.parse().map_err(|error: fetch::UrlError| error.to_string())?;
    let pinned = shared.puller.pin_url(registration, &url, WITHIN).await;
    let (address, tls) = pinned.map_err(|error| error.to_string())?;
    // After a restart the balancer has another id, and the event must not: source and id tell it from others.
    let made_by = notice.id.rsplit_once("/notice-").map_or(shared.balancer_id.as_str(), |(by, _)| by);
    let event = Event::new(made_by, document(notice, registration.id().as_str()), notice.at);
    let posted = fetch::post(&url, address, tls, (EVENT_TYPE, event.to_json()), WITHIN).await;
    posted.map_err(|error| error.to_string())
}

/// For programs that are no agents.
fn document<'a>(notice: &'a Notice, resource: &'a str) -> formats::notice::Notice<'a> {
    let (kind, lasts, flows, withdraws) = match &notice.what {
        What::Leaving => ("balancer_leaving", None, None, ""),
        What::Unavailable { lasts } => ("balancer_unavailable", *lasts, None, ""),
        What::Withdrawn { notice } => ("withdrawn", None, None, notice.as_str()),
        What::ShutDown => ("shut_down", None, None, ""),
        What::ShedFlows { flows } => ("shed_flows", None, Some(*flows), ""),
    };
    formats::notice::Notice {
        id: &notice.id,
        kind,
        resource,
        at: Some(rfc3339(notice.at)),
        lasts_seconds: lasts.map(|lasts| lasts.as_secs_f64()),
        alternatives: &notice.alternatives,
        reason: &notice.reason,
        flows,
        withdraws,
    }
}
