//! What resources are told, and who has taken it. Pure: a notice, a resource and a moment in, what is to be told out.
//!
//! ```text
//! made --- at a stream's turn ---> told --- the resource says so ---> taken, or failed (told again on its next stream)
//!      \-- to its notify_url ----> posted (2xx) / tried again with a growing pause
//! ```
//!
//! A notice is told at least once, and again on each new stream until it was taken; its id lets a resource take it once.
//! One that is over is told to nobody any more, and stays to be looked at for [`LOOKED_AT_FOR`], or until [`NOTICES_MAX`] newer
//! ones have come.
//!
//! What a restart must not forget is marked as it changes, and had as [`Change`]s by whoever writes it ([`super::stored`]). That
//! the balancer leaves is not among it: that is over with the process.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use allocation::{PoolName, ResourceId, Timestamp};

/// Notices that are kept.
pub(crate) const NOTICES_MAX: usize = 64;
/// How long a notice without an end of its own is told to those who come.
const TOLD_FOR: Duration = Duration::from_secs(3600);
/// Longest time that a notice of an unavailability whose end is not known is told.
const OPEN_END_TOLD_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a notice that is over is kept.
const LOOKED_AT_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// Notices whose deletion is still to be written; beyond it, they come back with the next start, and go when they are old.
const REMOVED_MAX: usize = 1_024;
/// First and longest pause after a post that failed.
const POST_PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

/// What is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    /// The balancer stops for good.
    Leaving,
    /// The balancer is away; `None`: nobody knows how long.
    Unavailable {
        /// For how long.
        lasts: Option<Duration>,
    },
    /// The notice of this id does not hold any more.
    Withdrawn {
        /// Its id.
        notice: String,
    },
    /// The resource shall end.
    ShutDown,
    /// The resource shall move so many flows away.
    ShedFlows {
        /// How many.
        flows: u32,
    },
}

/// Whom it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    All,
    Pool(PoolName),
    Resource(ResourceId),
}

impl Target {
    pub(crate) fn is(&self, id: &ResourceId, pool: &PoolName) -> bool {
        match self {
            Self::All => true,
            Self::Pool(name) => name == pool,
            Self::Resource(name) => name == id,
        }
    }
}

/// One notice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Notice {
    /// Unique for all time.
    pub(crate) id: String,
    pub(crate) what: What,
    /// When it happens.
    pub(crate) at: SystemTime,
    /// Control addresses of the balancers that stand in.
    pub(crate) alternatives: Vec<String>,
    pub(crate) reason: String,
    pub(crate) target: Target,
}

impl Notice {
    /// Until when it is told to those who have not taken it.
    fn told_until(&self, made: SystemTime) -> SystemTime {
        let from = self.at.max(made);
        let open = match &self.what {
            What::Unavailable { lasts: Some(lasts) } => *lasts,
            What::Leaving | What::Unavailable { lasts: None } => OPEN_END_TOLD_FOR,
            What::Withdrawn { .. } | What::ShutDown | What::ShedFlows { .. } => TOLD_FOR,
        };
        from.checked_add(open).unwrap_or(from)
    }
}

/// What became of a notice at one resource.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Outcome {
    pub(crate) told: bool,
    pub(crate) taken: bool,
    /// Why not, as it said.
    pub(crate) failure: Option<String>,
    pub(crate) hook: Hook,
}

/// How far a resource's hook has come with a notice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Hook {
    /// Nothing was to be posted.
    #[default]
    None,
    /// It has not taken it.
    Waiting { attempts: u32, failure: String },
    /// It has.
    Taken,
}

/// A notice from before a restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remembered {
    pub(crate) notice: Notice,
    pub(crate) made: SystemTime,
    pub(crate) withdrawn: bool,
    pub(crate) outcomes: Vec<(ResourceId, Outcome)>,
}

/// What is to be written. Each says all that there is to say of its subject: writing it twice does no harm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// There is a notice, or it is withdrawn.
    Notice { notice: Notice, made: SystemTime, withdrawn: bool },
    /// Something became of the notice of this id at a resource.
    Outcome { notice: String, resource: ResourceId, outcome: Outcome },
    /// The notice of this id is not kept any more.
    Removed { notice: String },
}

/// A notice, and how far it has come.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) notice: Notice,
    pub(crate) made: SystemTime,
    told_until: SystemTime,
    pub(crate) withdrawn: bool,
    /// By a stream or a post.
    told: HashSet<ResourceId>,
    taken: HashSet<ResourceId>,
    /// Why not, by those that said so.
    failed: HashMap<ResourceId, String>,
    /// Those that go on.
    posts: HashMap<ResourceId, Post>,
    /// Those that were taken.
    posted: HashSet<ResourceId>,
    /// Whether a restart must not forget it.
    is_saved: bool,
    /// What is to be written of it: itself, and what became of it where.
    unsaved: bool,
    unsaved_outcomes: HashSet<ResourceId>,
}

/// Attempts to post one notice to one resource.
#[derive(Debug, Clone)]
struct Post {
    attempts: u32,
    next: Timestamp,
    failure: String,
    under_way: bool,
}

impl Kept {
    fn new(notice: Notice, made: SystemTime, is_saved: bool) -> Self {
        Self {
            told_until: notice.told_until(made),
            notice,
            made,
            withdrawn: false,
            told: HashSet::new(),
            taken: HashSet::new(),
            failed: HashMap::new(),
            posts: HashMap::new(),
            posted: HashSet::new(),
            is_saved,
            unsaved: is_saved,
            unsaved_outcomes: HashSet::new(),
        }
    }

    fn restored(remembered: Remembered, now: Timestamp) -> Self {
        let Remembered { notice, made, withdrawn, outcomes } = remembered;
        let mut kept = Self { withdrawn, unsaved: false, ..Self::new(notice, made, true) };
        for (id, Outcome { told, taken, failure, hook }) in outcomes {
            if told {
                kept.told.insert(id.clone());
            }
            if taken {
                kept.taken.insert(id.clone());
            }
            if let Some(why) = failure {
                kept.failed.insert(id.clone(), why);
            }
            match hook {
                Hook::None => {}
                // At once: the pause was spent with the restart.
                Hook::Waiting { attempts, failure } => {
                    kept.posts.insert(id, Post { attempts, next: now, failure, under_way: false });
                }
                Hook::Taken => drop(kept.posted.insert(id)),
            }
        }
        kept
    }

    fn outcome(&self, id: &ResourceId) -> Outcome {
        let hook = match self.posts.get(id) {
            Some(post) => Hook::Waiting { attempts: post.attempts, failure: post.failure.clone() },
            None if self.posted.contains(id) => Hook::Taken,
            None => Hook::None,
        };
        Outcome {
            told: self.told.contains(id),
            taken: self.taken.contains(id),
            failure: self.failed.get(id).cloned(),
            hook,
        }
    }

    /// Something became of it there.
    fn mark(&mut self, id: &ResourceId) {
        if self.is_saved {
            self.unsaved_outcomes.insert(id.clone());
        }
    }

    /// It was not written: what is known of it at resources cannot have been either.
    fn mark_all(&mut self) {
        let known = self.told.iter().chain(&self.taken).chain(self.failed.keys()).chain(self.posts.keys());
        self.unsaved_outcomes = known.chain(&self.posted).cloned().collect();
        self.unsaved = true;
    }

    fn holds(&self, now: SystemTime) -> bool {
        !self.withdrawn && now < self.told_until
    }

    /// What became of it at a resource that has not taken it, in words.
    pub(crate) fn state(&self, id: &ResourceId) -> String {
        if let Some(why) = self.failed.get(id) {
            return format!("failed: {why}");
        }
        match self.posts.get(id) {
            Some(post) if post.attempts > 0 => {
                format!("webhook: {} ({} attempts)", post.failure, post.attempts)
            }
            _ if self.told.contains(id) => "told".to_owned(),
            _ => "not connected".to_owned(),
        }
    }

    /// By the resource itself or by its hook; and where there is a hook, not only by the resource itself.
    pub(crate) fn is_taken(&self, id: &ResourceId) -> bool {
        self.taken.contains(id) && !self.posts.contains_key(id)
    }
}

/// The administrator's fault, or a bound of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BookError {
    #[error("{NOTICES_MAX} notices hold already, as many as are kept: withdraw some (`trimtab notify list`)")]
    Full,
    #[error("there is no notice {0}: `trimtab notify list` shows those that are kept")]
    Unknown(String),
    #[error("the notice {0} does not hold any more")]
    Over(String),
}

/// All notices of a balancer.
#[derive(Debug, Default)]
pub(crate) struct Book {
    /// Oldest first.
    kept: Vec<Kept>,
    /// Whether somebody writes what changes.
    has_store: bool,
    /// Those that are gone, and still to be deleted.
    removed: Vec<String>,
}

impl Book {
    /// With what a store remembers, oldest first; what changes from then on is to be written there.
    pub(crate) fn restored(remembered: Vec<Remembered>, now: Timestamp, wall: SystemTime) -> Self {
        let kept = remembered.into_iter().map(|remembered| Kept::restored(remembered, now)).collect();
        let mut book = Self { kept, has_store: true, removed: Vec::new() };
        book.forget_old(wall);
        while book.kept.len() > NOTICES_MAX {
            book.remove(book.kept.iter().position(|kept| !kept.holds(wall)).unwrap_or(0));
        }
        book
    }

    /// Keeps a notice, in place of the oldest that is over if there are too many.
    pub(crate) fn add(&mut self, notice: Notice, wall: SystemTime) -> Result<(), BookError> {
        if self.kept.len() >= NOTICES_MAX {
            let over = self.kept.iter().position(|kept| !kept.holds(wall)).ok_or(BookError::Full)?;
            self.remove(over);
        }
        let is_saved = self.has_store && notice.what != What::Leaving;
        self.kept.push(Kept::new(notice, wall, is_saved));
        Ok(())
    }

    fn remove(&mut self, place: usize) {
        let gone = self.kept.remove(place);
        if gone.is_saved && self.removed.len() < REMOVED_MAX {
            self.removed.push(gone.notice.id);
        }
    }

    /// Forgets what has been over for long.
    pub(crate) fn forget_old(&mut self, wall: SystemTime) {
        let is_old =
            |kept: &Kept| kept.told_until.checked_add(LOOKED_AT_FOR).is_some_and(|until| until <= wall);
        while let Some(old) = self.kept.iter().position(is_old) {
            self.remove(old);
        }
    }

    /// Whether this unavailability is known, whatever became of it: a schedule comes to it again after a restart.
    pub(crate) fn has_announced(&self, at: SystemTime, lasts: Duration, reason: &str) -> bool {
        let what = What::Unavailable { lasts: Some(lasts) };
        let same = |notice: &Notice| {
            notice.at == at && notice.what == what && notice.target == Target::All && notice.reason == reason
        };
        self.kept.iter().any(|kept| same(&kept.notice))
    }

    /// Whether there is anything to be written.
    pub(crate) fn is_unsaved(&self) -> bool {
        !self.removed.is_empty()
            || self.kept.iter().any(|kept| kept.unsaved || !kept.unsaved_outcomes.is_empty())
    }

    /// What is to be written, in this order: every notice, and what became of them at so many resources at most.
    pub(crate) fn take_unsaved(&mut self, outcomes_max: usize) -> Vec<Change> {
        let removed = self.removed.drain(..).map(|notice| Change::Removed { notice });
        let mut changes: Vec<Change> = removed.collect();
        for kept in self.kept.iter_mut().filter(|kept| kept.unsaved) {
            kept.unsaved = false;
            let (notice, made, withdrawn) = (kept.notice.clone(), kept.made, kept.withdrawn);
            changes.push(Change::Notice { notice, made, withdrawn });
        }
        let mut left = outcomes_max;
        for kept in &mut self.kept {
            let some: Vec<ResourceId> = kept.unsaved_outcomes.iter().take(left).cloned().collect();
            left -= some.len();
            for resource in some {
                kept.unsaved_outcomes.remove(&resource);
                let (notice, outcome) = (kept.notice.id.clone(), kept.outcome(&resource));
                changes.push(Change::Outcome { notice, resource, outcome });
            }
        }
        changes
    }

    /// These could not be written: they are to be written again, as they are by then.
    pub(crate) fn not_saved(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Notice { notice, .. } => {
                    if let Some(kept) = self.kept.iter_mut().find(|kept| kept.notice.id == notice.id) {
                        kept.mark_all();
                    }
                }
                Change::Outcome { notice, resource, .. } => {
                    if let Some(kept) = self.kept.iter_mut().find(|kept| kept.notice.id == notice) {
                        kept.mark(&resource);
                    }
                }
                Change::Removed { notice } if self.removed.len() < REMOVED_MAX => self.removed.push(notice),
                Change::Removed { .. } => {}
            }
        }
    }

    /// Ends a notice, and gives the one that says so to those who were told.
    pub(crate) fn withdraw(&mut self, id: &str, wall: SystemTime) -> Result<Notice, BookError> {
        let kept = self.kept.iter_mut().find(|kept| kept.notice.id == id);
        let kept = kept.ok_or_else(|| BookError::Unknown(id.to_owned()))?;
        if !kept.holds(wall) {
            return Err(BookError::Over(id.to_owned()));
        }
        kept.withdrawn = true;
        kept.unsaved = kept.is_saved;
        Ok(kept.notice.clone())
    }

    /// What a stream of this resource has to say that it has not said yet (`said`), oldest first; it counts as told.
    pub(crate) fn tell(
        &mut self,
        id: &ResourceId,
        pool: &PoolName,
        said: &mut HashSet<String>,
        wall: SystemTime,
    ) -> Vec<Notice> {
        let mut tell = Vec::new();
        for place in 0..self.kept.len() {
            let kept = &self.kept[place];
            let due = kept.holds(wall)
                && kept.notice.target.is(id, pool)
                && !kept.taken.contains(id)
                && !said.contains(&kept.notice.id)
                && self.concerns(&kept.notice, id);
            if due {
                let kept = &mut self.kept[place];
                said.insert(kept.notice.id.clone());
                if kept.told.insert(id.clone()) {
                    kept.mark(id);
                }
                tell.push(kept.notice.clone());
            }
        }
        said.retain(|known| self.kept.iter().any(|kept| kept.notice.id == *known));
        tell
    }

    /// Who never heard of a notice need not hear that it is withdrawn.
    fn concerns(&self, notice: &Notice, id: &ResourceId) -> bool {
        let What::Withdrawn { notice: withdrawn } = &notice.what else { return true };
        self.kept.iter().any(|kept| kept.notice.id == *withdrawn && kept.told.contains(id))
    }

    /// A resource says what it did. Notices that it was not told are not its business.
    pub(crate) fn took(&mut self, id: &ResourceId, notice: &str, failure: Option<String>) -> bool {
        let told = self.kept.iter_mut().find(|kept| kept.notice.id == notice && kept.told.contains(id));
        let Some(kept) = told else { return false };
        match failure {
            Some(why) => drop(kept.failed.insert(id.clone(), why)),
            None => {
                kept.failed.remove(id);
                kept.taken.insert(id.clone());
            }
        }
        kept.mark(id);
        true
    }

    /// Whether there is anything to post or to tell at all: asked before resources are looked at.
    pub(crate) fn holds_any(&self, wall: SystemTime) -> bool {
        self.kept.iter().any(|kept| kept.holds(wall))
    }

    /// Notices that are to be posted to this resource now; each counts as under way until [`Self::posted`].
    pub(crate) fn post(
        &mut self,
        id: &ResourceId,
        pool: &PoolName,
        now: Timestamp,
        wall: SystemTime,
    ) -> Vec<Notice> {
        let mut due = Vec::new();
        for place in 0..self.kept.len() {
            let kept = &self.kept[place];
            let wanted = kept.holds(wall)
                && kept.notice.target.is(id, pool)
                && !kept.posted.contains(id)
                && self.concerns(&kept.notice, id);
            if !wanted {
                continue;
            }
            let kept = &mut self.kept[place];
            let is_new = !kept.posts.contains_key(id);
            let post = kept.posts.entry(id.clone()).or_insert_with(|| Post {
                attempts: 0,
                next: now,
                failure: String::new(),
                under_way: false,
            });
            if !post.under_way && post.next <= now {
                post.under_way = true;
                kept.told.insert(id.clone());
                due.push(kept.notice.clone());
            }
            if is_new {
                kept.mark(id);
            }
        }
        due
    }

    /// What became of a post. After a failure it is due again, after a pause that doubles.
    pub(crate) fn posted(&mut self, id: &ResourceId, notice: &str, failure: Option<String>, now: Timestamp) {
        let Some(kept) = self.kept.iter_mut().find(|kept| kept.notice.id == notice) else { return };
        let Some(why) = failure else {
            kept.posts.remove(id);
            kept.posted.insert(id.clone());
            // A hook speaks for the resource, unless that said itself that it could not.
            if !kept.failed.contains_key(id) {
                kept.taken.insert(id.clone());
            }
            kept.mark(id);
            return;
        };
        if let Some(post) = kept.posts.get_mut(id) {
            let pause = POST_PAUSE.0.saturating_mul(1 << post.attempts.min(16)).min(POST_PAUSE.1);
            *post = Post {
                attempts: post.attempts.saturating_add(1),
                next: now + pause,
                failure: why,
                under_way: false,
            };
            kept.mark(id);
        }
    }

    /// When the next post is due that waits after a failure; `None`: none does.
    pub(crate) fn next_post(&self, wall: SystemTime) -> Option<Timestamp> {
        let waiting = self.kept.iter().filter(|kept| kept.holds(wall)).flat_map(|kept| kept.posts.values());
        waiting.filter(|post| !post.under_way).map(|post| post.next).min()
    }

    /// Newest first.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Kept> {
        self.kept.iter().rev()
    }

    /// How many of these resources have not taken a notice that holds, over all notices.
    pub(crate) fn not_taken<'a>(
        &self,
        resources: impl Iterator<Item = (&'a ResourceId, &'a PoolName)> + Clone,
        wall: SystemTime,
    ) -> usize {
        let holding = self.kept.iter().filter(|kept| kept.holds(wall));
        holding
            .map(|kept| {
                let for_it = resources.clone().filter(|(id, pool)| kept.notice.target.is(id, pool));
                for_it.filter(|(id, _)| self.concerns(&kept.notice, id) && !kept.is_taken(id)).count()
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: SystemTime = SystemTime::UNIX_EPOCH;

    fn at(seconds: u64) -> (Timestamp, SystemTime) {
        (Timestamp::from_millis(seconds * 1000), START + Duration::from_secs(seconds))
    }

    fn notice(id: &str, what: What, target: Target) -> Notice {
        Notice {
            id: id.to_owned(),
            what,
            at: at(100).1,
            alternatives: Vec::new(),
            reason: String::new(),
            target,
        }
    }

    fn away(id: &str) -> Notice {
        let lasts = Some(Duration::from_secs(50));
        notice(id, What::Unavailable { lasts }, Target::All)
    }

    fn names() -> (ResourceId, ResourceId, PoolName) {
        ("a".parse().unwrap(), "b".parse().unwrap(), "sql".parse().unwrap())
    }

    fn ids(notices: &[Notice]) -> Vec<&str> {
        notices.iter().map(|notice| notice.id.as_str()).collect()
    }

    #[test]
    fn it_is_told_once_on_a_stream_and_again_on_the_next_until_it_was_taken() {
        let (a, _, pool) = names();
        let mut book = Book::default();
        book.add(away("1"), at(0).1).unwrap();
        let mut said = HashSet::new();
        assert_eq!(ids(&book.tell(&a, &pool, &mut said, at(1).1)), ["1"]);
        assert!(book.tell(&a, &pool, &mut said, at(2).1).is_empty());
        let mut next = HashSet::new();
        assert_eq!(ids(&book.tell(&a, &pool, &mut next, at(3).1)), ["1"]);
        assert!(book.took(&a, "1", Some("exit 1".into())));
        assert_eq!(book.all().next().unwrap().state(&a), "failed: exit 1");
        assert_eq!(ids(&book.tell(&a, &pool, &mut HashSet::new(), at(4).1)), ["1"]);
        assert!(book.took(&a, "1", None));
        assert!(book.tell(&a, &pool, &mut HashSet::new(), at(5).1).is_empty());
    }

    #[test]
    fn it_is_told_until_it_is_over() {
        let (a, b, pool) = names();
        let mut book = Book::default();
        book.add(away("1"), at(0).1).unwrap();
        assert_eq!(book.tell(&a, &pool, &mut HashSet::new(), at(149).1).len(), 1);
        assert!(book.tell(&b, &pool, &mut HashSet::new(), at(150).1).is_empty());
        assert_eq!(book.not_taken([(&a, &pool), (&b, &pool)].into_iter(), at(149).1), 2);
        assert_eq!(book.not_taken([(&a, &pool), (&b, &pool)].into_iter(), at(150).1), 0);
        assert_eq!(book.withdraw("1", at(150).1), Err(BookError::Over("1".into())));
    }

    #[test]
    fn targets() {
        let (a, b, pool) = names();
        let mut book = Book::default();
        let other: PoolName = "web".parse().unwrap();
        book.add(notice("a", What::ShutDown, Target::Resource(a.clone())), at(0).1).unwrap();
        book.add(notice("web", What::ShutDown, Target::Pool(other.clone())), at(0).1).unwrap();
        assert_eq!(ids(&book.tell(&a, &pool, &mut HashSet::new(), at(1).1)), ["a"]);
        assert!(book.tell(&b, &pool, &mut HashSet::new(), at(1).1).is_empty());
        assert_eq!(ids(&book.tell(&b, &other, &mut HashSet::new(), at(1).1)), ["web"]);
        assert!(!book.took(&b, "a", None), "it was not told");
    }

    #[test]
    fn a_withdrawal_is_told_to_those_who_were_told() {
        let (a, b, pool) = names();
        let mut book = Book::default();
        book.add(away("1"), at(0).1).unwrap();
        let mut said = HashSet::new();
        book.tell(&a, &pool, &mut said, at(1).1);
        let withdrawn = book.withdraw("1", at(2).1).unwrap();
        let back =
            Notice { id: "2".into(), what: What::Withdrawn { notice: withdrawn.id.clone() }, ..withdrawn };
        book.add(back, at(2).1).unwrap();
        assert_eq!(ids(&book.tell(&a, &pool, &mut said, at(3).1)), ["2"]);
        assert!(book.tell(&b, &pool, &mut HashSet::new(), at(3).1).is_empty());
        assert_eq!(book.withdraw("1", at(3).1), Err(BookError::Over("1".into())));
        assert_eq!(book.withdraw("3", at(3).1), Err(BookError::Unknown("3".into())));
    }

    #[test]
    fn the_book_is_bounded_and_forgets_what_is_over_first() {
        let mut book = Book::default();
        book.add(notice("kept", What::Leaving, Target::All), at(0).1).unwrap();
        for n in 1..NOTICES_MAX {
            book.add(away(&n.to_string()), at(0).1).unwrap();
        }
        assert_eq!(book.add(away("more"), at(1).1), Err(BookError::Full));
        book.add(away("later"), at(150).1).unwrap();
        let ids: Vec<&str> = book.all().map(|kept| kept.notice.id.as_str()).collect();
        assert_eq!(ids.len(), NOTICES_MAX);
        assert!(ids.contains(&"kept") && ids.contains(&"later") && !ids.contains(&"1"));
    }

    #[test]
    fn posts_are_tried_again_with_a_growing_pause_until_one_is_taken() {
        let (a, _, pool) = names();
        let mut book = Book::default();
        book.add(away("1"), at(0).1).unwrap();
        let mut now = at(0);
        let mut tried = Vec::new();
        for _ in 0..4 {
            assert_eq!(ids(&book.post(&a, &pool, now.0, now.1)), ["1"]);
            assert!(book.post(&a, &pool, now.0, now.1).is_empty(), "one at a time");
            book.posted(&a, "1", Some("503".into()), now.0);
            tried.push(now.0.as_millis());
            let next = book.next_post(now.1).unwrap();
            assert!(book.post(&a, &pool, now.0, now.1).is_empty());
            now = (next, START + Duration::from_millis(next.as_millis()));
        }
        assert_eq!(tried, [0, 500, 1_500, 3_500]);
        assert_eq!(book.all().next().unwrap().state(&a), "webhook: 503 (4 attempts)");
        book.post(&a, &pool, now.0, now.1);
        book.posted(&a, "1", None, now.0);
        assert!(book.all().next().unwrap().is_taken(&a));
        assert_eq!(book.next_post(now.1), None);
        assert!(
            book.tell(&a, &pool, &mut HashSet::new(), now.1).is_empty(),
            "what was posted need not be told"
        );
        assert!(book.post(&a, &pool, now.0, now.1).is_empty());
    }

    #[test]
    fn who_has_a_hook_has_taken_a_notice_when_both_have() {
        let (a, _, pool) = names();
        let mut book = Book::default();
        book.add(away("1"), at(0).1).unwrap();
        book.tell(&a, &pool, &mut HashSet::new(), at(0).1);
        assert!(book.took(&a, "1", None));
        assert_eq!(ids(&book.post(&a, &pool, at(0).0, at(0).1)), ["1"], "the hook hears it all the same");
        assert!(!book.all().next().unwrap().is_taken(&a));
        book.posted(&a, "1", None, at(0).0);
        assert!(book.all().next().unwrap().is_taken(&a));
    }
    /// What a store would have of it.
    fn remembered(changes: Vec<Change>, all: &mut Vec<Remembered>) {
        for change in changes {
            match change {
                Change::Notice { notice, made, withdrawn } => {
                    match all.iter_mut().find(|known| known.notice.id == notice.id) {
                        Some(known) => known.withdrawn = withdrawn,
                        None => all.push(Remembered { notice, made, withdrawn, outcomes: Vec::new() }),
                    }
                }
                Change::Outcome { notice, resource, outcome } => {
                    let known = all.iter_mut().find(|known| known.notice.id == notice).unwrap();
                    known.outcomes.retain(|(id, _)| *id != resource);
                    known.outcomes.push((resource, outcome));
                }
                Change::Removed { notice } => all.retain(|known| known.notice.id != notice),
            }
        }
    }

    #[test]
    fn what_holds_is_told_again_after_a_restart_to_those_who_have_not_taken_it() {
        let (a, b, pool) = names();
        let mut book = Book::restored(Vec::new(), at(0).0, at(0).1);
        book.add(away("1"), at(0).1).unwrap();
        book.add(away("2"), at(0).1).unwrap();
        book.add(notice("leaving", What::Leaving, Target::All), at(0).1).unwrap();
        assert_eq!(book.tell(&a, &pool, &mut HashSet::new(), at(1).1).len(), 3);
        assert_eq!(book.tell(&b, &pool, &mut HashSet::new(), at(1).1).len(), 3);
        assert!(book.took(&a, "1", None) && book.took(&b, "1", Some("exit 1".into())));
        assert!(book.took(&a, "leaving", None));
        book.withdraw("2", at(2).1).unwrap();
        let back = notice("3", What::Withdrawn { notice: "2".into() }, Target::All);
        book.add(back, at(2).1).unwrap();
        assert!(book.is_unsaved());
        let mut all = Vec::new();
        // A few outcomes at a time, and nothing is written twice.
        while book.is_unsaved() {
            remembered(book.take_unsaved(1), &mut all);
        }
        assert!(book.take_unsaved(9).is_empty());
        assert_eq!(all.iter().map(|known| known.notice.id.as_str()).collect::<Vec<_>>(), ["1", "2", "3"]);

        let mut again = Book::restored(all, at(0).0, at(10).1);
        assert!(!again.is_unsaved(), "that much is on the disk");
        assert_eq!(ids(&again.tell(&a, &pool, &mut HashSet::new(), at(11).1)), ["3"], "it has taken 1");
        assert_eq!(ids(&again.tell(&b, &pool, &mut HashSet::new(), at(11).1)), ["1", "3"]);
        let first = again.all().last().unwrap();
        assert!(first.is_taken(&a) && !first.is_taken(&b));
        assert_eq!((first.state(&b), first.made), ("failed: exit 1".into(), at(0).1));
        assert_eq!(again.withdraw("2", at(11).1), Err(BookError::Over("2".into())));
        let c = "c".parse().unwrap();
        assert_eq!(
            ids(&again.tell(&c, &pool, &mut HashSet::new(), at(11).1)),
            ["1"],
            "it never heard of 2, and need not hear that it is withdrawn"
        );
        assert!(again.tell(&b, &pool, &mut HashSet::new(), at(150).1).iter().all(|notice| notice.id != "1"));
    }

    #[test]
    fn posts_go_on_after_a_restart_until_one_is_taken() {
        let (a, b, pool) = names();
        let mut book = Book::restored(Vec::new(), at(0).0, at(0).1);
        book.add(away("1"), at(0).1).unwrap();
        book.tell(&a, &pool, &mut HashSet::new(), at(0).1);
        assert!(book.took(&a, "1", None));
        for id in [&a, &b] {
            assert_eq!(book.post(id, &pool, at(0).0, at(0).1).len(), 1);
        }
        book.posted(&a, "1", Some("503".into()), at(0).0);
        book.posted(&b, "1", None, at(0).0);
        let mut all = Vec::new();
        remembered(book.take_unsaved(9), &mut all);
        let mut again = Book::restored(all, at(0).0, at(20).1);
        let kept = again.all().next().unwrap();
        assert!(!kept.is_taken(&a), "its hook has not");
        assert!(kept.is_taken(&b));
        assert_eq!(kept.state(&a), "webhook: 503 (1 attempts)");
        assert!(again.post(&b, &pool, at(0).0, at(20).1).is_empty());
        assert_eq!(ids(&again.post(&a, &pool, at(0).0, at(20).1)), ["1"]);
        again.posted(&a, "1", None, at(0).0);
        assert!(again.all().next().unwrap().is_taken(&a));
    }

    #[test]
    fn what_could_not_be_written_is_written_again_as_it_is_by_then() {
        let (a, b, pool) = names();
        let mut book = Book::restored(Vec::new(), at(0).0, at(0).1);
        book.add(away("1"), at(0).1).unwrap();
        let lost = book.take_unsaved(9);
        assert_eq!(lost.len(), 1);
        // This came to the disk before that was known to have failed: there was no notice that it could belong to.
        book.tell(&a, &pool, &mut HashSet::new(), at(1).1);
        let in_vain = book.take_unsaved(9);
        assert!(matches!(&in_vain[..], [Change::Outcome { .. }]));
        book.withdraw("1", at(2).1).unwrap();
        book.not_saved(lost);
        let mut all = Vec::new();
        remembered(book.take_unsaved(9), &mut all);
        assert!(all[0].withdrawn && all[0].outcomes[0].0 == a);
        book.tell(&b, &pool, &mut HashSet::new(), at(3).1);
        assert!(book.take_unsaved(9).is_empty(), "it is withdrawn");
    }

    #[test]
    fn what_is_pushed_out_or_long_over_is_deleted() {
        let mut book = Book::restored(Vec::new(), at(0).0, at(0).1);
        for n in 0..NOTICES_MAX {
            book.add(away(&n.to_string()), at(0).1).unwrap();
        }
        let mut all = Vec::new();
        remembered(book.take_unsaved(9), &mut all);
        assert_eq!(all.len(), NOTICES_MAX);
        book.add(away("later"), at(150).1).unwrap();
        remembered(book.take_unsaved(9), &mut all);
        assert!(all.len() == NOTICES_MAX && all.iter().all(|known| known.notice.id != "0"));
        book.forget_old(at(149).1 + LOOKED_AT_FOR);
        assert!(!book.is_unsaved());
        let over = at(150).1 + LOOKED_AT_FOR;
        let mut again = Book::restored(all.clone(), at(0).0, over);
        assert_eq!(again.all().count(), 1, "the later one is told until later");
        remembered(again.take_unsaved(9), &mut all);
        assert_eq!(all.len(), 1);
        // A file may have more than a book.
        let many = vec![all[0].clone(); NOTICES_MAX + 3];
        let mut again = Book::restored(many, at(0).0, at(151).1);
        assert_eq!((again.all().count(), again.take_unsaved(9).len()), (NOTICES_MAX, 3));
    }

    #[test]
    fn a_schedule_does_not_announce_twice() {
        let mut book = Book::default();
        let lasts = Duration::from_secs(50);
        assert!(!book.has_announced(at(100).1, lasts, ""));
        book.add(away("1"), at(0).1).unwrap();
        book.withdraw("1", at(1).1).unwrap();
        assert!(book.has_announced(at(100).1, lasts, ""), "and not again what was withdrawn");
        assert!(!book.has_announced(at(101).1, lasts, ""));
        assert!(!book.has_announced(at(100).1, lasts, "another"));
        assert!(!book.is_unsaved(), "nobody writes it");
    }
}
