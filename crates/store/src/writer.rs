//! The thread that writes, and the handle by which others have it write.
//!
//! ```text
//! run, register ----> urgent, at most QUEUE_MAX -----+
//!                                                    +--> one transaction --> commit, flushed --> every answer
//! keep (history) ---> background, BACKGROUND_MAX ----+    (a savepoint for each change)
//! ```
//!
//! While one group is flushed the next one gathers: the slower the disk, the larger the groups. What was asked first is done
//! first, but for history, which waits for everything else.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::oneshot;

use crate::history::Kept;
use crate::{Store, StoreError, Tables};

/// Changes that may wait; more are refused.
pub const QUEUE_MAX: usize = 8_192;
/// Batches of history that may wait; more are dropped, and made up for by the next that are not.
const BACKGROUND_MAX: usize = 128;
/// Changes in one transaction.
const GROUP_MAX: usize = 1_024;
/// Batches of history in one transaction: so long do changes that come meanwhile wait.
const BACKGROUND_IN_GROUP: usize = 8;

/// Has the store written. Cheap to clone; when the last one goes, what waits is written and the file is closed.
#[derive(Debug, Clone)]
pub struct Writer(Arc<Handle>);

/// What an asked-for change gives, once it is on the disk. It may be awaited, or had by
/// [`blocking_recv`](oneshot::Receiver::blocking_recv); an answer that nobody waits for changes nothing.
pub type Answer<T> = oneshot::Receiver<Result<T, StoreError>>;

/// What the writer did so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Transactions that are on the disk.
    pub commits: u64,
    /// The time they took, in microseconds.
    pub commit_micros: u64,
    /// Changes that are on the disk.
    pub changes: u64,
    /// Changes that failed, or were undone with their transaction.
    pub changes_failed: u64,
    /// Changes that found the queue full.
    pub changes_refused: u64,
    /// Batches of history that found the queue full or were not written.
    pub history_dropped: u64,
    /// Changes and batches that wait now.
    pub waiting: u64,
    /// Whether the newest transaction failed.
    pub failing: bool,
}

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    news: Condvar,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    commits: AtomicU64,
    commit_micros: AtomicU64,
    changes: AtomicU64,
    changes_failed: AtomicU64,
    changes_refused: AtomicU64,
    history_dropped: AtomicU64,
    failing: AtomicBool,
}

#[derive(Default)]
struct Queue {
    urgent: VecDeque<Box<dyn Task>>,
    background: VecDeque<Vec<Kept>>,
    closed: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (urgent, background) = (self.urgent.len(), self.background.len());
        f.debug_struct("Queue")
            .field("urgent", &urgent)
            .field("background", &background)
            .finish_non_exhaustive()
    }
}

/// A change, and who waits for it.
trait Task: Send {
    fn apply(&mut self, tables: &Tables<'_>) -> Result<(), StoreError>;
    fn answer(self: Box<Self>, outcome: Result<(), StoreError>);
}

struct Change<T, F> {
    change: Option<F>,
    value: Option<T>,
    answer: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Task for Change<T, F>
where
    T: Send,
    F: FnOnce(&Tables<'_>) -> Result<T, StoreError> + Send,
{
    fn apply(&mut self, tables: &Tables<'_>) -> Result<(), StoreError> {
        let change = self.change.take().ok_or(StoreError::Closed)?;
        self.value = Some(change(tables)?);
        Ok(())
    }

    fn answer(self: Box<Self>, outcome: Result<(), StoreError>) {
        let Self { value, answer, .. } = *self;
        // Who hung up does not want to know.
        let _ = answer.send(outcome.and_then(|()| value.ok_or(StoreError::Closed)));
    }
}

impl Store {
    /// Starts the thread that writes.
    ///
    /// # Errors
    /// If the kernel gives no thread.
    pub fn start(self) -> io::Result<Writer> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("store".to_owned());
        let thread = thread.spawn(move || {
            let mut store = self;
            of_thread.write(&mut store.connection);
        })?;
        Ok(Writer(Arc::new(Handle { shared, thread: Mutex::new(Some(thread)) })))
    }
}

impl Writer {
    /// Has `change` done in a transaction, with others that come meanwhile. It never waits: the answer comes when it is on the
    /// disk, or was undone. Changes are done in the order in which they are asked for.
    pub fn run<T, F>(&self, change: F) -> Answer<T>
    where
        T: Send + 'static,
        F: FnOnce(&Tables<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let shared = &self.0.shared;
        let mut queue = lock(&shared.queue);
        let waiting = queue.urgent.len();
        if waiting >= QUEUE_MAX {
            shared.counts.changes_refused.fetch_add(1, Relaxed);
            let _ = answer.send(Err(StoreError::QueueFull { waiting }));
            return answered;
        }
        queue.urgent.push_back(Box::new(Change { change: Some(change), value: None, answer }));
        drop(queue);
        shared.news.notify_one();
        answered
    }

    /// Has history written, when nothing else waits. False: too much waits; it is dropped and counted.
    pub fn keep(&self, batch: Vec<Kept>) -> bool {
        let shared = &self.0.shared;
        let mut queue = lock(&shared.queue);
        if queue.background.len() >= BACKGROUND_MAX {
            shared.counts.history_dropped.fetch_add(1, Relaxed);
            return false;
        }
        queue.background.push_back(batch);
        drop(queue);
        shared.news.notify_one();
        true
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        let counts = &self.0.shared.counts;
        let queue = lock(&self.0.shared.queue);
        Stats {
            commits: counts.commits.load(Relaxed),
            commit_micros: counts.commit_micros.load(Relaxed),
            changes: counts.changes.load(Relaxed),
            changes_failed: counts.changes_failed.load(Relaxed),
            changes_refused: counts.changes_refused.load(Relaxed),
            history_dropped: counts.history_dropped.load(Relaxed),
            waiting: (queue.urgent.len() + queue.background.len()) as u64,
            failing: counts.failing.load(Relaxed),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.news.notify_one();
        if let Some(thread) = lock(&self.thread).take() {
            // It failed only if a change panicked, which was said then.
            let _ = thread.join();
        }
    }
}

/// What is done in one transaction.
struct Group {
    tasks: Vec<Box<dyn Task>>,
    history: Vec<Vec<Kept>>,
}

impl Shared {
    /// Writes until nobody can ask any more.
    fn write(&self, connection: &mut Connection) {
        while let Some(mut group) = self.next() {
            let began = Instant::now();
            let done = transact(connection, &mut group);
            self.counts.commit_micros.fetch_add(began.elapsed().as_micros() as u64, Relaxed);
            self.count(&group, &done);
            let outcomes = done.unwrap_or_else(|error| Done {
                outcomes: group.tasks.iter().map(|_| Err(error.clone())).collect(),
                history_failed: 0,
            });
            for (task, outcome) in group.tasks.into_iter().zip(outcomes.outcomes) {
                task.answer(outcome);
            }
        }
        // What the log holds goes into the file: the next start finds it short.
        let _ = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
    }

    fn count(&self, group: &Group, done: &Result<Done, StoreError>) {
        let counts = &self.counts;
        let (asked, history) = (group.tasks.len() as u64, group.history.len() as u64);
        let (failed, history_failed) = match done {
            Ok(done) => {
                counts.commits.fetch_add(1, Relaxed);
                (done.outcomes.iter().filter(|outcome| outcome.is_err()).count() as u64, done.history_failed)
            }
            Err(_) => (asked, history),
        };
        counts.changes.fetch_add(asked - failed, Relaxed);
        counts.changes_failed.fetch_add(failed, Relaxed);
        counts.history_dropped.fetch_add(history_failed, Relaxed);
        // Said once for each time that it begins and ends.
        match (counts.failing.swap(done.is_err(), Relaxed), done) {
            (false, Err(error)) => {
                tracing::error!(%error, "the store is not written; registrations are refused until it is");
            }
            (true, Ok(_)) => tracing::info!("the store is written again"),
            _ => {}
        }
    }

    fn next(&self) -> Option<Group> {
        let mut queue = lock(&self.queue);
        while queue.urgent.is_empty() && queue.background.is_empty() {
            if queue.closed {
                return None;
            }
            queue = self.news.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let (urgent, background) = (queue.urgent.len(), queue.background.len());
        Some(Group {
            tasks: queue.urgent.drain(..urgent.min(GROUP_MAX)).collect(),
            history: queue.background.drain(..background.min(BACKGROUND_IN_GROUP)).collect(),
        })
    }
}

/// What became of each change, and how many batches of history were not kept.
struct Done {
    outcomes: Vec<Result<(), StoreError>>,
    history_failed: u64,
}

/// Does a group in one transaction.
///
/// # Errors
/// Of the transaction as a whole: nothing of it is kept then.
fn transact(connection: &mut Connection, group: &mut Group) -> Result<Done, StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut outcomes = Vec::with_capacity(group.tasks.len());
    for task in &mut group.tasks {
        outcomes.push(within_savepoint(&transaction, |tables| task.apply(tables))?);
    }
    let mut history_failed = 0;
    for batch in &group.history {
        let keep = |tables: &Tables<'_>| batch.iter().try_for_each(|kept| tables.keep(kept));
        history_failed += u64::from(within_savepoint(&transaction, keep)?.is_err());
    }
    transaction.commit()?;
    Ok(Done { outcomes, history_failed })
}

/// Does one change, or undoes it alone.
///
/// # Errors
/// If the whole transaction cannot go on: the disk is full or broken.
fn within_savepoint(
    connection: &Connection,
    change: impl FnOnce(&Tables<'_>) -> Result<(), StoreError>,
) -> Result<Result<(), StoreError>, StoreError> {
    connection.prepare_cached("SAVEPOINT change")?.execute([])?;
    let outcome = change(&Tables::of(connection));
    match &outcome {
        Ok(()) => {}
        Err(error @ (StoreError::Full | StoreError::Disk(_) | StoreError::Corrupt(_))) => {
            return Err(error.clone());
        }
        Err(_) => {
            connection.prepare_cached("ROLLBACK TO change")?.execute([])?;
        }
    }
    connection.prepare_cached("RELEASE change")?.execute([])?;
    Ok(outcome)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that panics is done under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
