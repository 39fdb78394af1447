//! Notices on the disk: what is read at start, and what is written since.
//!
//! ```text
//! made, withdrawn by an operator   book, then the store's queue, under one lock; awaited
//! told, taken, failed, posted      book alone; written by [`run`], all that came while the disk was busy in one go
//! ```
//!
//! The lock keeps the store's order the book's. Neither it nor the book's own is held while the disk is waited for. What could
//! not be written is marked again, and written with what comes next, or after [`AGAIN_AFTER`].
//! Owns: when it is written, and how it looks there. Does not own: what is to be written ([`super::book`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use allocation::ResourceId;
use store::{NoticeKind, NoticeOutcome, NoticeTarget, OpenError, Store, StoreError, Tables, Writer};
use tokio::time::sleep;
use tonic::Status;

use super::book::{Book, BookError, Change, Hook, Notice, Outcome, Remembered, Target, What};
use super::{Notices, is_control_address};
use crate::clock::Clock;
use crate::keeper::{not_kept, written};
use crate::{Phase, Shared, reached};

/// Outcomes that are written in one go: copied with the book locked, in a fraction of a millisecond.
const OUTCOMES_AT_ONCE: usize = 512;
/// After a write that failed.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// The book, with what the store remembers if there is one.
///
/// # Errors
/// If the store cannot be read.
pub(crate) fn restore(store: Option<&Store>, clock: Clock) -> Result<Book, OpenError> {
    let Some(store) = store else { return Ok(Book::default()) };
    let (notices, outcomes) = store.read(|tables| Ok((tables.notices()?, tables.notice_outcomes()?)))?;
    let mut of: HashMap<String, Vec<(ResourceId, Outcome)>> = HashMap::new();
    for row in outcomes {
        let Ok(id) = row.resource.parse() else { continue };
        of.entry(row.notice.clone()).or_default().push((id, outcome(row)));
    }
    let parsed = notices.into_iter().filter_map(|row| {
        let (id, made, withdrawn) = (row.id.clone(), time(row.created_ms), row.withdrawn);
        match notice(row) {
            Ok(notice) => {
                let outcomes = of.remove(&id).unwrap_or_default();
                Some(Remembered { notice, made, withdrawn, outcomes })
            }
            Err(why) => {
                tracing::warn!(notice = id, why, "a notice of the store is left out; its rows are kept");
                None
            }
        }
    });
    let book = Book::restored(parsed.collect(), clock.now(), SystemTime::now());
    let known = book.all().count();
    if known > 0 {
        tracing::info!(notices = known, "remembered what resources were told");
    }
    Ok(book)
}

/// Something that was asked to be written.
pub(crate) struct Writing {
    changes: Vec<Change>,
    answer: store::Answer<()>,
}

impl Notices {
    /// Changes the book, and asks for that to be written if there is a store.
    pub(super) fn change<T>(
        &self,
        writer: Option<&Writer>,
        change: impl FnOnce(&mut Book) -> Result<T, BookError>,
    ) -> Result<(T, Option<Writing>), BookError> {
        // Nobody else's write comes between: the answer is about this change.
        let order = writer.map(|writer| (self.order(), writer));
        let value = change(&mut self.lock())?;
        let writing = order.and_then(|(_order, writer)| self.write(writer));
        Ok((value, writing))
    }

    /// Asks for what is unsaved to be written; `order` must be held. `None`: nothing is.
    fn write(&self, writer: &Writer) -> Option<Writing> {
        let changes = self.lock().take_unsaved(OUTCOMES_AT_ONCE);
        if changes.is_empty() {
            return None;
        }
        let now_ms = millis(SystemTime::now());
        let rows = changes.clone();
        let answer = writer.run(move |tables| rows.into_iter().try_for_each(|row| put(tables, row, now_ms)));
        Some(Writing { changes, answer })
    }

    /// Waits for the disk; what it refused is written again later.
    async fn settle(&self, writing: Writing) -> Result<(), StoreError> {
        let outcome = written(writing.answer).await;
        if outcome.is_err() {
            self.lock().not_saved(writing.changes);
            self.unsaved.notify_one();
        }
        outcome
    }

    fn write_in_order(&self, writer: &Writer) -> Option<Writing> {
        let _order = self.order();
        self.write(writer)
    }
}

/// Waits until what an operator asked for is on the disk.
///
/// # Errors
/// What he is told if it is not: it is in force, and a restart would forget it.
pub(crate) async fn settled(shared: &Arc<Shared>, writing: Option<Writing>) -> Result<(), Status> {
    let Some(writing) = writing else { return Ok(()) };
    let shared = Arc::clone(shared);
    // An operator who hangs up does not end it: what failed has to be marked again.
    let settling = tokio::spawn(async move { shared.notices.settle(writing).await });
    let outcome = settling.await.unwrap_or(Err(StoreError::Closed));
    outcome.map_err(|error| not_kept(&error))
}

/// Writes what becomes of notices, until it is aborted.
pub(crate) async fn run(shared: Arc<Shared>) {
    let Some(keeper) = &shared.keeper else { return };
    let notices = &shared.notices;
    let mut terminated = std::pin::pin!(reached(shared.phase.clone(), Phase::Terminated));
    loop {
        let Some(writing) = notices.write_in_order(keeper.writer()) else {
            tokio::select! {
                () = &mut terminated => return,
                () = notices.unsaved.notified() => continue,
            }
        };
        if notices.settle(writing).await.is_err() {
            sleep(AGAIN_AFTER).await;
        }
    }
}

/// Asks for all that is unsaved to be written, at the end of the process.
pub(crate) fn finish(notices: &Notices, writer: &Writer) {
    while notices.write_in_order(writer).is_some() {}
}

fn put(tables: &Tables<'_>, change: Change, now_ms: u64) -> Result<(), StoreError> {
    match change {
        Change::Notice { notice, made, withdrawn } => match row(notice, made, withdrawn) {
            Some(row) => tables.put_notice(&row),
            None => Ok(()),
        },
        Change::Outcome { notice, resource, outcome } => {
            tables.put_notice_outcome(&outcome_row(notice, &resource, outcome, now_ms)).map(|_| ())
        }
        Change::Removed { notice } => tables.delete_notice(&notice).map(|_| ()),
    }
}

/// `None`: this is over with the process.
fn row(notice: Notice, made: SystemTime, withdrawn: bool) -> Option<store::Notice> {
    let (kind, lasts, flows, withdraws) = match notice.what {
        What::Leaving => return None,
        What::Unavailable { lasts } => (NoticeKind::Unavailable, lasts, 0, None),
        What::Withdrawn { notice } => (NoticeKind::Withdrawn, None, 0, Some(notice)),
        What::ShutDown => (NoticeKind::ShutDown, None, 0, None),
        What::ShedFlows { flows } => (NoticeKind::ShedFlows, None, flows, None),
    };
    Some(store::Notice {
        id: notice.id,
        kind,
        target: match notice.target {
            Target::All => NoticeTarget::All,
            Target::Pool(pool) => NoticeTarget::Pool(pool.to_string()),
            Target::Resource(id) => NoticeTarget::Resource(id.to_string()),
        },
        at_ms: millis(notice.at),
        // A span that is shorter is no span above zero.
        lasts_ms: lasts.map(|lasts| u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX).max(1)),
        flows,
        alternatives: notice.alternatives,
        reason: notice.reason,
        withdraws,
        created_ms: millis(made),
        withdrawn,
    })
}

/// What the store has is parsed as what an operator says.
fn notice(row: store::Notice) -> Result<Notice, String> {
    let what = match row.kind {
        NoticeKind::Unavailable => What::Unavailable { lasts: row.lasts_ms.map(Duration::from_millis) },
        NoticeKind::Withdrawn => What::Withdrawn { notice: row.withdraws.ok_or("it withdraws nothing")? },
        NoticeKind::ShutDown => What::ShutDown,
        NoticeKind::ShedFlows => What::ShedFlows { flows: row.flows },
    };
    let target = match row.target {
        NoticeTarget::All => Target::All,
        NoticeTarget::Pool(pool) => Target::Pool(pool.parse().map_err(|_| "its pool is no name")?),
        NoticeTarget::Resource(id) => Target::Resource(id.parse().map_err(|_| "its resource is no id")?),
    };
    if let Some(wrong) = row.alternatives.iter().find(|alternative| !is_control_address(alternative)) {
        return Err(format!("the alternative {wrong:?} is no control address"));
    }
    let (at, alternatives) = (time(row.at_ms), row.alternatives);
    Ok(Notice { id: row.id, what, at, alternatives, reason: row.reason, target })
}

fn outcome_row(notice: String, resource: &ResourceId, outcome: Outcome, changed_ms: u64) -> NoticeOutcome {
    let (hook, attempts, hook_failure) = match outcome.hook {
        Hook::None => (store::Hook::None, 0, String::new()),
        Hook::Waiting { attempts, failure } => (store::Hook::Waiting, attempts, failure),
        Hook::Taken => (store::Hook::Taken, 0, String::new()),
    };
    NoticeOutcome {
        notice,
        resource: resource.to_string(),
        told: outcome.told,
        taken: outcome.taken,
        failure: outcome.failure,
        hook,
        attempts,
        hook_failure,
        changed_ms,
    }
}

fn outcome(row: NoticeOutcome) -> Outcome {
    let hook = match row.hook {
        store::Hook::None => Hook::None,
        store::Hook::Waiting => Hook::Waiting { attempts: row.attempts, failure: row.hook_failure },
        store::Hook::Taken => Hook::Taken,
    };
    Outcome { told: row.told, taken: row.taken, failure: row.failure, hook }
}

/// To a millisecond, as the store has it: a notice is the same before and after a restart.
pub(super) fn whole_millis(time_of: SystemTime) -> SystemTime {
    time(millis(time_of))
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn time(ms: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_millis(ms)).unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_notice_is_the_same_after_the_store() {
        let at = time(1_798_135_200_123);
        let all = [
            (What::Unavailable { lasts: Some(Duration::from_secs(600)) }, Target::All),
            (What::Unavailable { lasts: None }, Target::Pool("sql".parse().unwrap())),
            (What::Withdrawn { notice: "b/notice-1".into() }, Target::All),
            (What::ShutDown, Target::Resource("pg1".parse().unwrap())),
            (What::ShedFlows { flows: 7 }, Target::Resource("pg1".parse().unwrap())),
        ];
        for (what, target) in all {
            let alternatives = vec!["http://b2:7400".to_owned()];
            let made =
                Notice { id: "b/notice-2".into(), what, at, alternatives, reason: "why".into(), target };
            let stored = row(made.clone(), at, false).unwrap();
            assert_eq!(notice(stored), Ok(made));
        }
        for outcome_of in [
            Outcome::default(),
            Outcome { told: true, failure: Some("exit 1".into()), ..Outcome::default() },
            Outcome {
                told: true,
                taken: true,
                failure: None,
                hook: Hook::Waiting { attempts: 3, failure: "503".into() },
            },
            Outcome { told: true, taken: true, failure: None, hook: Hook::Taken },
        ] {
            let id = "pg1".parse().unwrap();
            assert_eq!(outcome(outcome_row("n".into(), &id, outcome_of.clone(), 1)), outcome_of);
        }
    }

    #[test]
    fn what_is_in_the_store_is_parsed() {
        let good = store::Notice {
            id: "n".into(),
            kind: NoticeKind::ShutDown,
            target: NoticeTarget::All,
            at_ms: 1,
            lasts_ms: None,
            flows: 0,
            alternatives: Vec::new(),
            reason: String::new(),
            withdraws: None,
            created_ms: 1,
            withdrawn: false,
        };
        assert!(notice(good.clone()).is_ok());
        for wrong in [
            store::Notice { target: NoticeTarget::Pool("a b".into()), ..good.clone() },
            store::Notice { target: NoticeTarget::Resource(String::new()), ..good.clone() },
            store::Notice { kind: NoticeKind::Withdrawn, ..good.clone() },
            store::Notice { alternatives: vec!["b2".into()], ..good.clone() },
        ] {
            assert!(notice(wrong.clone()).is_err(), "{wrong:?}");
        }
        assert_eq!(time(u64::MAX).max(UNIX_EPOCH), time(u64::MAX), "no time is too far for it");
    }
}
