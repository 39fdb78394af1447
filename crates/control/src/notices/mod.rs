//! Notices: what resources are told, by which ways, and who has taken it.
//!
//! Owns: the balancer's notices ([`book`]), and that all ways learn of a new one. Does not own: the ways (`registration` for
//! streams, [`webhook`]), and what a resource makes of it.

pub(crate) mod book;
pub(crate) mod maintenance;
pub(crate) mod peers;
pub(crate) mod stored;
pub(crate) mod webhook;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use allocation::{PoolName, ResourceId};
use api::v1;
use api::v1::notice::Kind;

use self::book::{Book, BookError, Kept, Notice, Target, What};
use self::stored::Writing;
use crate::Shared;
use crate::clock::Clock;
use crate::parse::{self, MessageError};
use store::Writer;
use tokio::sync::{Notify, watch};

/// Most alternatives of a notice.
const ALTERNATIVES_MAX: usize = 16;
const ALTERNATIVE_BYTES_MAX: usize = 256;
const REASON_BYTES_MAX: usize = 512;
/// What a resource may say of why it did not take a notice.
const FAILURE_BYTES_MAX: usize = 256;
/// What a resource may take in one report.
const TAKEN_MAX: usize = 16;
/// Resources that have not taken a notice, as a list shows them.
const NOT_TAKEN_LISTED_MAX: usize = 100;
/// Furthest a notice may be ahead, and longest it may last.
const AHEAD_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// A balancer's notices.
pub(crate) struct Notices {
    book: Mutex<Book>,
    /// Held by who asks for changes to be written, so that they are written in their order. Taken before the book's.
    order: Mutex<()>,
    /// There may be something to be written.
    unsaved: Notify,
    /// Counts changes that someone may have to be told of.
    changed: watch::Sender<u64>,
    /// The balancer, by which ids are unique for all time.
    balancer_id: String,
    made: AtomicU64,
    /// Named where a notice of an unavailability names none.
    alternatives: Vec<String>,
    /// And where these are none either: who is in DNS beside this one.
    found: Mutex<Vec<String>>,
    clock: Clock,
}

/// Why a notice was not made: the fault of whoever asked for it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoticeError {
    #[error("notice is missing")]
    NoNotice,
    #[error(
        "a notice of kind {0} cannot be asked for; KIND_BALANCER_UNAVAILABLE, KIND_SHUT_DOWN and KIND_SHED_FLOWS can"
    )]
    Kind(i32),
    #[error("at is no time, or more than a year ahead")]
    At,
    #[error("lasts is no span above zero, or longer than a year")]
    Lasts,
    #[error("flows is 0: say how many flows are to be moved")]
    NoFlows,
    #[error("a notice names at most {ALTERNATIVES_MAX} alternatives of up to {ALTERNATIVE_BYTES_MAX} bytes")]
    Alternatives,
    #[error("the alternative {0:?} is not http://host:port or https://host:port")]
    Alternative(String),
    #[error("reason takes at most {REASON_BYTES_MAX} bytes")]
    Reason,
    #[error("a notice is for a resource or for a pool, not for both")]
    Target,
    #[error("a resource or a pool has to be named: nobody tells all resources to shut down or to shed flows")]
    NoTarget,
    #[error(transparent)]
    Name(#[from] MessageError),
    #[error(transparent)]
    Book(#[from] BookError),
}

impl Notices {
    pub(crate) fn new(book: Book, balancer_id: &str, alternatives: Vec<String>, clock: Clock) -> Self {
        Self {
            book: Mutex::new(book),
            order: Mutex::default(),
            unsaved: Notify::new(),
            changed: watch::Sender::new(0),
            balancer_id: balancer_id.to_owned(),
            made: AtomicU64::new(0),
            alternatives,
            found: Mutex::default(),
            clock,
        }
    }

    /// Who stands in where nobody said so.
    fn found(&self, others: Vec<String>) {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = others;
    }

    /// Who stands in for this balancer, unless a notice names others.
    fn alternatives(&self) -> Vec<String> {
        if !self.alternatives.is_empty() {
            return self.alternatives.clone();
        }
        self.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self) -> MutexGuard<'_, ()> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the book back after something became of a notice.
    fn unlock(&self, book: MutexGuard<'_, Book>) {
        let is_unsaved = book.is_unsaved();
        drop(book);
        if is_unsaved {
            self.unsaved.notify_one();
        }
    }

    /// Changes when there may be something to tell.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn next_id(&self) -> String {
        format!("{}/notice-{}", self.balancer_id, self.made.fetch_add(1, Relaxed) + 1)
    }

    /// Without waiting for the disk.
    fn add(&self, notice: Notice) -> Result<(), BookError> {
        say(&notice);
        let mut book = self.lock();
        book.add(notice, SystemTime::now())?;
        self.unlock(book);
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    /// Forgets what has been over for long.
    pub(crate) fn forget_old(&self) {
        let mut book = self.lock();
        book.forget_old(SystemTime::now());
        self.unlock(book);
    }

    /// The balancer stops, now.
    pub(crate) fn leave(&self) {
        let notice = Notice {
            id: self.next_id(),
            what: What::Leaving,
            at: SystemTime::now(),
            alternatives: self.alternatives(),
            reason: "the balancer stops: it takes no new flows, open ones may end".into(),
            target: Target::All,
        };
        if let Err(error) = self.add(notice) {
            tracing::warn!(%error, "resources are not told that the balancer leaves");
        }
    }

    /// The balancer will be away. `None`: that is known.
    pub(crate) fn announce(
        &self,
        at: SystemTime,
        lasts: Duration,
        alternatives: &[String],
        reason: &str,
    ) -> Result<Option<String>, NoticeError> {
        let at = stored::whole_millis(at);
        if self.lock().has_announced(at, lasts, reason) {
            return Ok(None);
        }
        let alternatives = if alternatives.is_empty() { self.alternatives() } else { alternatives.to_vec() };
        let notice = Notice {
            id: self.next_id(),
            what: What::Unavailable { lasts: Some(lasts) },
            at,
            alternatives,
            reason: reason.to_owned(),
            target: Target::All,
        };
        let id = notice.id.clone();
        self.add(notice)?;
        Ok(Some(id))
    }

    /// What an operator asked for; gives its id, whom it is for, and what he waits for.
    pub(crate) fn ask(
        &self,
        request: v1::NotifyRequest,
        writer: Option<&Writer>,
    ) -> Result<(String, Target, Option<Writing>), NoticeError> {
        let mut notice = parse_request(request)?;
        notice.id = self.next_id();
        if matches!(notice.what, What::Unavailable { .. }) && notice.alternatives.is_empty() {
            notice.alternatives = self.alternatives();
        }
        let (id, target) = (notice.id.clone(), notice.target.clone());
        say(&notice);
        let ((), writing) = self.change(writer, |book| book.add(notice, SystemTime::now()))?;
        self.changed.send_modify(|count| *count += 1);
        Ok((id, target, writing))
    }

    /// Withdraws a notice; gives what the operator waits for.
    pub(crate) fn withdraw(&self, id: &str, writer: Option<&Writer>) -> Result<Option<Writing>, BookError> {
        let now = SystemTime::now();
        let ((), writing) = self.change(writer, |book| {
            let withdrawn = book.withdraw(id, now)?;
            let what = What::Withdrawn { notice: withdrawn.id.clone() };
            let back = Notice { id: self.next_id(), what, at: stored::whole_millis(now), ..withdrawn };
            say(&back);
            book.add(back, now)
        })?;
        self.changed.send_modify(|count| *count += 1);
        Ok(writing)
    }

    /// What a stream of this resource has to say that it has not said yet.
    pub(crate) fn tell(
        &self,
        id: &ResourceId,
        pool: &PoolName,
        said: &mut HashSet<String>,
    ) -> Vec<v1::Notice> {
        let mut book = self.lock();
        let tell = book.tell(id, pool, said, SystemTime::now());
        self.unlock(book);
        tell.iter().map(wire).collect()
    }

    /// What a resource did about notices. Gives how many it took, and how many it could not.
    pub(crate) fn took(&self, id: &ResourceId, taken: Vec<v1::NoticeTaken>) -> (u64, u64) {
        let mut book = self.lock();
        let mut counts = (0, 0);
        for v1::NoticeTaken { id: notice, failure } in taken.into_iter().take(TAKEN_MAX) {
            let failure = (!failure.is_empty()).then(|| shortened(failure, FAILURE_BYTES_MAX));
            if let Some(why) = &failure {
                tracing::warn!(resource = %id, notice, why, "a resource could not act on a notice");
            }
            let failed = failure.is_some();
            if book.took(id, &notice, failure) {
                if failed { counts.1 += 1 } else { counts.0 += 1 }
            }
        }
        self.unlock(book);
        counts
    }

    /// All that are kept, and who of those registered has not taken them.
    pub(crate) fn list(&self, shared: &Shared) -> Vec<v1::NoticeStatus> {
        let resources = shared.registry.names();
        let now = SystemTime::now();
        let book = self.lock();
        book.all().map(|kept| status(kept, &resources, now)).collect()
    }

    /// Notices that are to be posted to this resource now.
    fn post(&self, id: &ResourceId, pool: &PoolName) -> Vec<Notice> {
        let mut book = self.lock();
        let due = book.post(id, pool, self.clock.now(), SystemTime::now());
        self.unlock(book);
        due
    }

    /// What became of a post.
    fn posted(&self, id: &ResourceId, notice: &str, failure: Option<String>) {
        let failure = failure.map(|why| shortened(why, FAILURE_BYTES_MAX));
        let mut book = self.lock();
        book.posted(id, notice, failure, self.clock.now());
        self.unlock(book);
    }

    /// When the next post is due that waits after a failure; `None`: none does.
    fn next_post(&self) -> Option<std::time::Instant> {
        let next = self.lock().next_post(SystemTime::now())?;
        self.clock.instant(next)
    }

    /// How many times a notice that holds is not taken by a resource that it is for.
    pub(crate) fn not_taken(&self, shared: &Shared) -> usize {
        let wall = SystemTime::now();
        if !self.lock().holds_any(wall) {
            return 0;
        }
        let resources = shared.registry.names();
        self.lock().not_taken(resources.iter().map(|(id, pool)| (id, pool)), wall)
    }
}

fn say(notice: &Notice) {
    tracing::info!(
        notice = notice.id, what = ?notice.what, target = ?notice.target,
        alternatives = ?notice.alternatives, reason = notice.reason, "a notice to resources"
    );
}

fn status(kept: &Kept, resources: &[(ResourceId, PoolName)], now: SystemTime) -> v1::NoticeStatus {
    let target = &kept.notice.target;
    let meant: Vec<_> = resources.iter().filter(|(id, pool)| target.is(id, pool)).map(|(id, _)| id).collect();
    let mut not_taken: Vec<_> = meant.iter().filter(|id| !kept.is_taken(id)).collect();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let taken = count(meant.len() - not_taken.len());
    not_taken.sort();
    let not_taken = not_taken
        .into_iter()
        .take(NOT_TAKEN_LISTED_MAX)
        .map(|id| v1::NotTaken { id: id.to_string(), state: kept.state(id) });
    let (pool, resource) = match target {
        Target::All => (String::new(), String::new()),
        Target::Pool(pool) => (pool.to_string(), String::new()),
        Target::Resource(id) => (String::new(), id.to_string()),
    };
    v1::NoticeStatus {
        notice: Some(wire(&kept.notice)),
        resource,
        pool,
        age: Some(parse::wire_duration(now.duration_since(kept.made).unwrap_or_default())),
        withdrawn: kept.withdrawn,
        resources: count(meant.len()),
        taken,
        not_taken: not_taken.collect(),
    }
}

/// As resources are told it.
pub(crate) fn wire(notice: &Notice) -> v1::Notice {
    let (kind, lasts, flows, withdraws) = match &notice.what {
        What::Leaving => (Kind::BalancerLeaving, None, 0, ""),
        What::Unavailable { lasts } => (Kind::BalancerUnavailable, *lasts, 0, ""),
        What::Withdrawn { notice } => (Kind::Withdrawn, None, 0, notice.as_str()),
        What::ShutDown => (Kind::ShutDown, None, 0, ""),
        What::ShedFlows { flows } => (Kind::ShedFlows, None, *flows, ""),
    };
    v1::Notice {
        kind: kind.into(),
        at: Some(notice.at.into()),
        alternatives: notice.alternatives.clone(),
        reason: notice.reason.clone(),
        id: notice.id.clone(),
        lasts: lasts.map(parse::wire_duration),
        flows,
        withdraws: withdraws.to_owned(),
    }
}

fn parse_request(request: v1::NotifyRequest) -> Result<Notice, NoticeError> {
    let notice = request.notice.ok_or(NoticeError::NoNotice)?;
    let what = match Kind::try_from(notice.kind) {
        Ok(Kind::BalancerUnavailable) => {
            What::Unavailable { lasts: notice.lasts.map(parse_lasts).transpose()? }
        }
        Ok(Kind::ShutDown) => What::ShutDown,
        Ok(Kind::ShedFlows) if notice.flows == 0 => return Err(NoticeError::NoFlows),
        Ok(Kind::ShedFlows) => What::ShedFlows { flows: notice.flows },
        _ => return Err(NoticeError::Kind(notice.kind)),
    };
    let target = match (request.resource.as_str(), request.pool.as_str()) {
        ("", "") if matches!(what, What::Unavailable { .. }) => Target::All,
        ("", "") => return Err(NoticeError::NoTarget),
        (id, "") => Target::Resource(parse::resource_id(id)?),
        ("", pool) => Target::Pool(parse::pool_name(pool)?),
        _ => return Err(NoticeError::Target),
    };
    if notice.reason.len() > REASON_BYTES_MAX {
        return Err(NoticeError::Reason);
    }
    check_alternatives(&notice.alternatives)?;
    Ok(Notice {
        id: String::new(),
        what,
        at: stored::whole_millis(notice.at.map_or_else(|| Ok(SystemTime::now()), parse_at)?),
        alternatives: notice.alternatives,
        reason: notice.reason,
        target,
    })
}

fn parse_at(at: prost_types::Timestamp) -> Result<SystemTime, NoticeError> {
    let at = SystemTime::try_from(at).map_err(|_| NoticeError::At)?;
    let latest = SystemTime::now() + AHEAD_MAX;
    if at < UNIX_EPOCH || at > latest { Err(NoticeError::At) } else { Ok(at) }
}

fn parse_lasts(lasts: prost_types::Duration) -> Result<Duration, NoticeError> {
    match Duration::try_from(lasts) {
        Ok(lasts) if !lasts.is_zero() && lasts <= AHEAD_MAX => Ok(lasts),
        _ => Err(NoticeError::Lasts),
    }
}

fn check_alternatives(alternatives: &[String]) -> Result<(), NoticeError> {
    let fits = |alternative: &String| alternative.len() <= ALTERNATIVE_BYTES_MAX;
    if alternatives.len() > ALTERNATIVES_MAX || !alternatives.iter().all(fits) {
        return Err(NoticeError::Alternatives);
    }
    match alternatives.iter().find(|alternative| !is_control_address(alternative)) {
        Some(wrong) => Err(NoticeError::Alternative(wrong.clone())),
        None => Ok(()),
    }
}

/// Whether an agent could register there.
pub fn is_control_address(text: &str) -> bool {
    let Ok(uri) = text.parse::<http::Uri>() else { return false };
    let scheme = matches!(uri.scheme_str(), Some("http" | "https"));
    let bare = matches!(uri.path_and_query().map(http::uri::PathAndQuery::as_str), None | Some("/" | ""));
    scheme
        && bare
        && uri.host().is_some_and(|host| !host.is_empty())
        && uri.port_u16().is_some_and(|port| port != 0)
}

fn shortened(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(notice: v1::Notice, resource: &str, pool: &str) -> v1::NotifyRequest {
        v1::NotifyRequest { notice: Some(notice), resource: resource.into(), pool: pool.into() }
    }

    fn of(kind: Kind) -> v1::Notice {
        v1::Notice { kind: kind.into(), ..v1::Notice::default() }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let seconds = |seconds| prost_types::Duration { seconds, nanos: 0 };
        let unavailable = of(Kind::BalancerUnavailable);
        for (request, why) in [
            (v1::NotifyRequest::default(), "notice is missing"),
            (request(of(Kind::BalancerLeaving), "", ""), "of kind 1 cannot be asked for"),
            (
                request(v1::Notice { lasts: Some(seconds(0)), ..unavailable.clone() }, "", ""),
                "lasts is no span",
            ),
            (
                request(v1::Notice { lasts: Some(seconds(-1)), ..unavailable.clone() }, "", ""),
                "lasts is no span",
            ),
            (
                request(
                    v1::Notice {
                        at: Some(prost_types::Timestamp { seconds: i64::MAX, nanos: 0 }),
                        ..unavailable.clone()
                    },
                    "",
                    "",
                ),
                "at is no time",
            ),
            (request(of(Kind::ShedFlows), "a", ""), "flows is 0"),
            (request(of(Kind::ShutDown), "", ""), "has to be named"),
            (request(of(Kind::ShutDown), "a", "sql"), "not for both"),
            (request(of(Kind::ShutDown), "a b", ""), "id "),
            (
                request(v1::Notice { alternatives: vec!["b:1".into()], ..unavailable.clone() }, "", ""),
                "\"b:1\" is not http://host:port",
            ),
            (
                request(
                    v1::Notice { alternatives: vec!["http://b:1".into(); 17], ..unavailable.clone() },
                    "",
                    "",
                ),
                "at most 16 alternatives",
            ),
            (request(v1::Notice { reason: "x".repeat(513), ..unavailable }, "", ""), "reason takes at most"),
        ] {
            let error = parse_request(request).expect_err(why).to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn control_addresses() {
        for good in ["http://b2:7400", "https://[::1]:7400", "http://10.0.0.1:7400/"] {
            assert!(is_control_address(good), "{good}");
        }
        for bad in
            ["", "b2:7400", "http://b2", "ftp://b2:1", "http://b2:0", "http://b2:7400/x", "http://:7400"]
        {
            assert!(!is_control_address(bad), "{bad}");
        }
    }

    #[test]
    fn a_long_failure_is_cut_at_a_character() {
        assert_eq!(shortened("äöü".into(), 5), "äö");
        assert_eq!(shortened("abc".into(), 5), "abc");
    }
}
