//! Bearer tokens: who may join by one, until when, and how often it was used.
//!
//! ```text
//! create -> valid -- expires / is used up / is revoked --> refused for whoever joins anew
//! ```
//!
//! * It owns what is known of tokens, and decides; it is pure: time and randomness are arguments, and what is to be kept
//!   beyond the process is given out as changes ([`TokenBook::take_changes`]) and taken back at a start
//!   ([`TokenBook::load`]). A change says how something is now and not what was done, so that whoever could not write it
//!   may try again later, in any order.
//! * A token is `trimtab_ID_SECRET`: an id that may be shown, and 256 random bits that are printed once and not kept.
//!   What is kept is their SHA-256. That is enough here, where it would not be for a password: nobody can guess 256
//!   random bits, however cheap a guess is, and a slow hash would give every peer a way to keep our processor busy.
//! * The time bounds joining, not staying: what joined by a token goes on reporting when it expires, until its lease ends.
//!   Revoking ends that too.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use allocation::{PoolName, ResourceId};
use ipnet::IpNet;
use registry::Owner;
use subtle::ConstantTimeEq;

use crate::security::{Role, is_own_or_allowed};

/// Most tokens that are kept; those that can do nothing any more make room.
pub const TOKENS_MAX: usize = 10_000;
/// Most uses that a token may be limited to: who used it is remembered.
pub const USES_MAX: u32 = 10_000;
/// Most pools of one token, and most networks.
pub const ENTRIES_MAX: usize = 64;
/// Longest life.
pub const TTL_MAX: Duration = Duration::from_secs(10 * 365 * 86_400);

/// How long a token is shown that expired: whoever asks why nobody joins by it finds the answer.
const EXPIRED_KEPT: Duration = Duration::from_secs(86_400);
/// Most things to be undone that are noted for whoever keeps tokens; what is beyond stays written: a use too many, or a token
/// that nobody has.
const UNDONE_MAX: usize = 10_000;

const PREFIX: &str = "trimtab";
const OWNER_PREFIX: &str = "token:";
/// 48 bits: 10,000 tokens collide by chance once in some five million books; a collision is drawn again.
const ID_BYTES: usize = 6;
const SECRET_BYTES: usize = 32;
/// Random bytes that [`TokenBook::create`] makes a token of.
pub const SEED_BYTES: usize = ID_BYTES + SECRET_BYTES;

/// What a token is known by: 12 hexadecimal digits. No secret.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(String);

impl TokenId {
    /// Parses one.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (text.len() == 2 * ID_BYTES && text.bytes().all(digits)).then(|| Self(text.to_owned()))
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whose registrations are that were made with it.
    pub fn owner(&self) -> Owner {
        Owner::new(&format!("{OWNER_PREFIX}{}", self.0))
    }

    /// The token by which this owner's registrations were made; `None`: by none.
    pub(crate) fn of_owner(owner: &Owner) -> Option<Self> {
        Self::parse(owner.as_str().strip_prefix(OWNER_PREFIX)?)
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A token as its holder has it. It does not show itself in debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// For whoever asked for the token, once.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// All that is kept of a token.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenRecord {
    /// What it is known by.
    pub id: TokenId,
    /// SHA-256 of the secret.
    pub hash: [u8; 32],
    /// What its holder may be.
    pub role: Role,
    /// The pools that a resource may join by it.
    pub pools: Vec<PoolName>,
    /// Addresses that a resource may register though it does not connect from them.
    pub addresses: Vec<IpNet>,
    /// When it was made.
    pub created: SystemTime,
    /// Nobody joins by it from then on.
    pub expires: SystemTime,
    /// How many resources may join by it; `None`: any number.
    pub uses_max: Option<u32>,
    /// The resources that did; kept where there is a limit.
    pub used_by: BTreeSet<ResourceId>,
    /// Whether an administrator took it back.
    pub revoked: bool,
}

impl fmt::Debug for TokenRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not even the hash.
        f.debug_struct("TokenRecord").field("id", &self.id).field("role", &self.role).finish_non_exhaustive()
    }
}

impl TokenRecord {
    /// In a word: `valid`, `expired`, `used up` or `revoked`.
    pub fn state(&self, now: SystemTime) -> &'static str {
        if self.revoked {
            "revoked"
        } else if self.is_expired(now) {
            "expired"
        } else if self.is_used_up() {
            "used up"
        } else {
            "valid"
        }
    }

    fn is_expired(&self, now: SystemTime) -> bool {
        self.expires <= now
    }

    /// Whether there is no more reason to show it.
    fn is_over(&self, now: SystemTime) -> bool {
        self.expires + EXPIRED_KEPT <= now
    }

    fn is_used_up(&self) -> bool {
        self.uses_max.is_some_and(|max| self.used_by.len() >= max as usize)
    }

    /// Whether a peer at `from` may register `address` with it.
    pub(crate) fn has_address(&self, from: IpAddr, address: IpAddr) -> bool {
        is_own_or_allowed(from, address, &self.addresses)
    }
}

/// What a token is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewToken {
    /// What its holder may be.
    pub role: Role,
    /// The pools that a resource may join.
    pub pools: Vec<PoolName>,
    /// Addresses it may register besides its own.
    pub addresses: Vec<IpNet>,
    /// How long resources may join by it.
    pub ttl: Duration,
    /// How many may; `None`: any number.
    pub uses_max: Option<u32>,
}

/// Why a token was not made: whoever asked for it can mend it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    /// A resource joins some pool.
    #[error("a token for resources needs a pool that they may join")]
    NoPool,
    /// An administrator joins none.
    #[error("a token for administrators takes neither pools, addresses nor a number of uses")]
    AdminJoins,
    /// Not a time that is anything.
    #[error("the time of a token is 1 s to {} days", TTL_MAX.as_secs() / 86_400)]
    Ttl,
    /// Not a number that is anything.
    #[error("the uses of a token are 1 to {USES_MAX}")]
    Uses,
    /// More than [`ENTRIES_MAX`].
    #[error("a token takes at most {ENTRIES_MAX} pools and {ENTRIES_MAX} networks")]
    Entries,
    /// More than [`TOKENS_MAX`].
    #[error("there are {TOKENS_MAX} tokens that may be used, as many as are kept: revoke some")]
    Full,
    /// By chance, or the randomness is none.
    #[error("a token of this id is there already: try again")]
    Collision,
}

/// Why a token is not taken: its holder's fault, or whoever gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is no token, or none of ours.
    #[error("the token is not known here")]
    Unknown,
    /// An administrator took it back.
    #[error("the token was revoked")]
    Revoked,
    /// Its time is over.
    #[error("the token has expired: ask for a new one")]
    Expired,
    /// As many joined by it as may.
    #[error("the token is used up: as many resources joined by it as may")]
    UsedUp,
}

/// A token that was shown, and is one of ours and not revoked.
#[derive(Debug, Clone)]
pub struct Verified {
    /// What was known of it then.
    pub record: Arc<TokenRecord>,
    revoked: Arc<AtomicBool>,
}

impl Verified {
    /// Whether it was revoked since.
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Relaxed)
    }

    /// Whether nobody may join by it any more.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.record.is_expired(now)
    }
}

#[derive(Debug)]
struct Kept {
    record: Arc<TokenRecord>,
    revoked: Arc<AtomicBool>,
    /// Uses that are counted and may come to nothing, with how many registrations are under way for each.
    joining: BTreeMap<ResourceId, u32>,
}

impl Kept {
    fn new(record: TokenRecord) -> Self {
        let revoked = Arc::new(AtomicBool::new(record.revoked));
        Self { revoked, record: Arc::new(record), joining: BTreeMap::new() }
    }
}

/// What is to be written down of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenChange {
    /// It is this, but for its uses.
    Put(Arc<TokenRecord>),
    /// It is kept no longer, nor are its uses.
    Remove(TokenId),
    /// A resource joined by it.
    Use(TokenId, ResourceId),
    /// A resource did not.
    Unuse(TokenId, ResourceId),
}

/// What a change is of. A token comes before its uses: they refer to it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Token(TokenId),
    Use(TokenId, ResourceId),
}

/// Every token.
#[derive(Debug, Default)]
pub struct TokenBook {
    tokens: BTreeMap<TokenId, Kept>,
    /// What [`Self::take_changes`] has not given out yet; `None`: nobody keeps it.
    changed: Option<BTreeSet<What>>,
}

impl TokenBook {
    /// A book with what was kept of an earlier one; no more than [`TOKENS_MAX`]. From now on it notes what changes, for
    /// whoever keeps it to take; a default one, which nobody keeps, does not.
    pub fn load(records: Vec<TokenRecord>) -> Self {
        let kept = records.into_iter().take(TOKENS_MAX).map(|record| (record.id.clone(), Kept::new(record)));
        Self { tokens: kept.collect(), changed: Some(BTreeSet::new()) }
    }

    /// Whether its tokens outlive it.
    pub fn is_kept(&self) -> bool {
        self.changed.is_some()
    }

    /// At most `most` of what has changed and is not taken yet, for whoever keeps it.
    pub fn take_changes(&mut self, most: usize) -> Vec<TokenChange> {
        let Some(changed) = &mut self.changed else { return vec![] };
        let taken: Vec<What> = std::iter::from_fn(|| changed.pop_first()).take(most).collect();
        taken.into_iter().filter_map(|what| self.change(what)).collect()
    }

    /// How a token is now, to be written at once, whether or not that is noted; `None`: nobody keeps it.
    pub fn take_token(&mut self, id: &TokenId) -> Option<TokenChange> {
        self.take(What::Token(id.clone()))
    }

    /// The same of a use.
    pub fn take_use(&mut self, id: &TokenId, resource: &ResourceId) -> Option<TokenChange> {
        self.take(What::Use(id.clone(), resource.clone()))
    }

    fn take(&mut self, what: What) -> Option<TokenChange> {
        self.changed.as_mut()?.remove(&what);
        self.change(what)
    }

    /// How it is now. The uses of a token that is gone went with it.
    fn change(&self, what: What) -> Option<TokenChange> {
        match what {
            What::Token(id) => Some(match self.tokens.get(&id) {
                Some(kept) => TokenChange::Put(Arc::clone(&kept.record)),
                None => TokenChange::Remove(id),
            }),
            What::Use(id, resource) => match self.tokens.get(&id)?.record.used_by.contains(&resource) {
                true => Some(TokenChange::Use(id, resource)),
                false => Some(TokenChange::Unuse(id, resource)),
            },
        }
    }

    /// What was taken is not written: it is given out again, as it is then.
    pub fn note_again(&mut self, changes: Vec<TokenChange>) {
        for change in changes {
            self.note(match change {
                TokenChange::Put(record) => What::Token(record.id.clone()),
                TokenChange::Remove(id) => What::Token(id),
                TokenChange::Use(id, resource) | TokenChange::Unuse(id, resource) => What::Use(id, resource),
            });
        }
    }

    fn note(&mut self, what: What) {
        let is_there = match &what {
            What::Token(id) => self.tokens.contains_key(id),
            What::Use(id, resource) => {
                self.tokens.get(id).is_some_and(|kept| kept.record.used_by.contains(resource))
            }
        };
        if let Some(changed) = &mut self.changed
            && (is_there || changed.len() < UNDONE_MAX)
        {
            changed.insert(what);
        }
    }

    /// Makes a token of [`SEED_BYTES`] random bytes. The secret is not kept.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub fn create(
        &mut self,
        new: NewToken,
        seed: &[u8; SEED_BYTES],
        now: SystemTime,
    ) -> Result<(TokenId, Secret), CreateError> {
        check(&new)?;
        self.make_room(now)?;
        let (id, secret) = seed.split_at(ID_BYTES);
        let id = TokenId(hex(id));
        if self.tokens.contains_key(&id) {
            return Err(CreateError::Collision);
        }
        let secret = hex(secret);
        let record = TokenRecord {
            id: id.clone(),
            hash: hash(&secret),
            role: new.role,
            pools: new.pools,
            addresses: new.addresses,
            created: now,
            expires: now + new.ttl,
            uses_max: new.uses_max,
            used_by: BTreeSet::new(),
            revoked: false,
        };
        self.tokens.insert(id.clone(), Kept::new(record));
        self.note(What::Token(id.clone()));
        let secret = Secret(format!("{PREFIX}_{id}_{secret}"));
        Ok((id, secret))
    }

    /// Drops what can do nothing any more, if there is no room.
    fn make_room(&mut self, now: SystemTime) -> Result<(), CreateError> {
        if self.tokens.len() < TOKENS_MAX {
            return Ok(());
        }
        self.retain(|record| !record.revoked && !record.is_expired(now));
        if self.tokens.len() < TOKENS_MAX { Ok(()) } else { Err(CreateError::Full) }
    }

    /// Whether [`Self::prune`] may find something.
    pub fn may_prune(&self, now: SystemTime) -> bool {
        self.tokens.values().any(|kept| kept.record.is_over(now))
    }

    /// Drops what expired a day ago or more, and by which nothing is registered any more; gives how many those were.
    pub fn prune(&mut self, now: SystemTime, is_owner: impl Fn(&Owner) -> bool) -> usize {
        let before = self.tokens.len();
        self.retain(|record| !record.is_over(now) || is_owner(&record.id.owner()));
        before - self.tokens.len()
    }

    fn retain(&mut self, stays: impl Fn(&TokenRecord) -> bool) {
        let leave = self.tokens.values().filter(|kept| !stays(&kept.record));
        let leave: Vec<TokenId> = leave.map(|kept| kept.record.id.clone()).collect();
        for id in leave {
            self.forget(&id);
        }
    }

    /// Drops a token: nobody has it.
    pub fn forget(&mut self, id: &TokenId) {
        if self.tokens.remove(id).is_some() {
            self.note(What::Token(id.clone()));
        }
    }

    /// Looks a token up that somebody shows. An expired one is given too: what joined by it may go on.
    ///
    /// # Errors
    /// [`TokenError::Unknown`] and [`TokenError::Revoked`].
    pub fn verify(&self, shown: &str) -> Result<Verified, TokenError> {
        let mut parts = shown.split('_');
        let (Some(PREFIX), Some(id), Some(secret), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::Unknown);
        };
        let kept = TokenId::parse(id).and_then(|id| self.tokens.get(&id)).ok_or(TokenError::Unknown)?;
        // In constant time, though of a hash: how far it fits is nobody's business.
        if !bool::from(hash(secret).ct_eq(&kept.record.hash)) {
            return Err(TokenError::Unknown);
        }
        if kept.record.revoked {
            return Err(TokenError::Revoked);
        }
        Ok(Verified { record: Arc::clone(&kept.record), revoked: Arc::clone(&kept.revoked) })
    }

    /// Counts a resource that joins. True: it is not known yet to have joined by this token, and [`Self::joined`] or
    /// [`Self::unjoin`] is to follow. A resource that comes again is no further use.
    ///
    /// # Errors
    /// When it may not.
    pub fn join(&mut self, id: &TokenId, resource: &ResourceId, now: SystemTime) -> Result<bool, TokenError> {
        let kept = self.tokens.get_mut(id).ok_or(TokenError::Unknown)?;
        let record = &kept.record;
        if record.revoked {
            return Err(TokenError::Revoked);
        }
        if record.is_expired(now) {
            return Err(TokenError::Expired);
        }
        let is_counted = record.used_by.contains(resource);
        if record.uses_max.is_none() || is_counted && !kept.joining.contains_key(resource) {
            return Ok(false);
        }
        if !is_counted {
            if record.is_used_up() {
                return Err(TokenError::UsedUp);
            }
            Arc::make_mut(&mut kept.record).used_by.insert(resource.clone());
        }
        *kept.joining.entry(resource.clone()).or_default() += 1;
        self.note(What::Use(id.clone(), resource.clone()));
        Ok(true)
    }

    /// The resource did join.
    pub fn joined(&mut self, id: &TokenId, resource: &ResourceId) {
        if let Some(kept) = self.tokens.get_mut(id) {
            kept.joining.remove(resource);
        }
    }

    /// Takes [`Self::join`] back: the resource did not join after all, by this registration. It did if another was made
    /// meanwhile.
    pub fn unjoin(&mut self, id: &TokenId, resource: &ResourceId) {
        let Some(kept) = self.tokens.get_mut(id) else { return };
        let Some(others) = kept.joining.get_mut(resource) else { return };
        *others -= 1;
        if *others == 0 {
            kept.joining.remove(resource);
            Arc::make_mut(&mut kept.record).used_by.remove(resource);
            self.note(What::Use(id.clone(), resource.clone()));
        }
    }

    /// Takes a token back: nobody joins, reports or leaves by it any more. False: there is none of this id.
    pub fn revoke(&mut self, id: &TokenId) -> bool {
        let Some(kept) = self.tokens.get_mut(id) else { return false };
        kept.revoked.store(true, Relaxed);
        Arc::make_mut(&mut kept.record).revoked = true;
        self.note(What::Token(id.clone()));
        true
    }

    /// Whether what joined by a token may stay: it is one of ours, and not revoked.
    pub fn holds(&self, id: &TokenId) -> bool {
        self.tokens.get(id).is_some_and(|kept| !kept.record.revoked)
    }

    /// All of them, by id.
    pub fn list(&self) -> Vec<Arc<TokenRecord>> {
        self.tokens.values().map(|kept| Arc::clone(&kept.record)).collect()
    }
}

fn check(new: &NewToken) -> Result<(), CreateError> {
    match new.role {
        Role::Resource if new.pools.is_empty() => return Err(CreateError::NoPool),
        Role::Admin if !new.pools.is_empty() || !new.addresses.is_empty() || new.uses_max.is_some() => {
            return Err(CreateError::AdminJoins);
        }
        _ => {}
    }
    if !(Duration::from_secs(1)..=TTL_MAX).contains(&new.ttl) {
        return Err(CreateError::Ttl);
    }
    if new.uses_max.is_some_and(|uses| !(1..=USES_MAX).contains(&uses)) {
        return Err(CreateError::Uses);
    }
    if new.pools.len() > ENTRIES_MAX || new.addresses.len() > ENTRIES_MAX {
        return Err(CreateError::Entries);
    }
    Ok(())
}

fn hash(secret: &str) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, secret.as_bytes());
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    fn for_sql(uses_max: Option<u32>) -> NewToken {
        let pools = vec!["sql".parse().unwrap()];
        NewToken { role: Role::Resource, pools, addresses: vec![], ttl: Duration::from_secs(60), uses_max }
    }

    fn id(text: &str) -> ResourceId {
        text.parse().unwrap()
    }

    #[test]
    fn a_token_is_what_it_was_made_of_and_nothing_near() {
        let mut book = TokenBook::default();
        let (token, secret) = book.create(for_sql(None), &[7; SEED_BYTES], at(0)).unwrap();
        assert_eq!(token.as_str(), "070707070707");
        let text = secret.reveal();
        assert_eq!(text.len(), "trimtab_".len() + 12 + 1 + 64);
        assert_eq!(book.verify(text).unwrap().record.id, token);
        let changed = text.strip_suffix('7').unwrap().to_owned() + "8";
        for wrong in [
            "",
            "trimtab",
            &text[..text.len() - 1],
            &changed,
            &format!("{text}_"),
            &text.to_uppercase(),
            "x_y_z",
        ] {
            assert_eq!(book.verify(wrong).unwrap_err(), TokenError::Unknown, "{wrong}");
        }
        assert_eq!(book.create(for_sql(None), &[7; SEED_BYTES], at(0)).unwrap_err(), CreateError::Collision);
    }

    #[test]
    fn nothing_shows_the_secret() {
        let mut book = TokenBook::default();
        let (_, secret) = book.create(for_sql(None), &[0xab; SEED_BYTES], at(0)).unwrap();
        let hashed = hex(&hash(&hex(&[0xab; SECRET_BYTES])));
        for shown in
            [format!("{secret:?}"), format!("{book:?}"), format!("{:?}", book.verify(secret.reveal()))]
        {
            assert!(!shown.contains("abababababababab"), "{shown}");
            assert!(!shown.contains(&hashed) && !shown.contains("hash"), "{shown}");
        }
    }

    #[test]
    fn uses_are_resources_and_time_ends_joining() {
        let mut book = TokenBook::default();
        let (token, secret) = book.create(for_sql(Some(2)), &[1; SEED_BYTES], at(0)).unwrap();
        assert_eq!(book.join(&token, &id("a"), at(0)), Ok(true));
        book.joined(&token, &id("a"));
        assert_eq!(book.join(&token, &id("a"), at(1)), Ok(false), "the same again");
        assert_eq!(book.join(&token, &id("b"), at(1)), Ok(true));
        assert_eq!(book.join(&token, &id("c"), at(1)), Err(TokenError::UsedUp));
        assert_eq!(book.join(&token, &id("a"), at(1)), Ok(false), "who joined may come again");
        book.unjoin(&token, &id("b"));
        assert_eq!(book.join(&token, &id("c"), at(59)), Ok(true));
        assert_eq!(book.list()[0].state(at(59)), "used up");
        assert_eq!(book.join(&token, &id("a"), at(60)), Err(TokenError::Expired));
        assert!(book.verify(secret.reveal()).unwrap().is_expired(at(60)), "what joined by it is still known");
        assert_eq!(book.list()[0].state(at(60)), "expired");
    }

    #[test]
    fn revoking_is_seen_by_who_holds_it() {
        let mut book = TokenBook::default();
        let (token, secret) = book.create(for_sql(None), &[1; SEED_BYTES], at(0)).unwrap();
        let held = book.verify(secret.reveal()).unwrap();
        assert!(!held.is_revoked());
        assert!(book.revoke(&token));
        assert!(held.is_revoked());
        assert_eq!(book.verify(secret.reveal()).unwrap_err(), TokenError::Revoked);
        assert_eq!(book.join(&token, &id("a"), at(0)), Err(TokenError::Revoked));
        assert!(!book.revoke(&TokenId::parse("ffffffffffff").unwrap()));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let mut book = TokenBook::default();
        let admin = NewToken { role: Role::Admin, pools: vec![], ..for_sql(None) };
        for (new, error) in [
            (NewToken { pools: vec![], ..for_sql(None) }, CreateError::NoPool),
            (NewToken { uses_max: Some(1), ..admin.clone() }, CreateError::AdminJoins),
            (NewToken { role: Role::Admin, ..for_sql(None) }, CreateError::AdminJoins),
            (NewToken { ttl: Duration::ZERO, ..admin.clone() }, CreateError::Ttl),
            (NewToken { ttl: TTL_MAX + Duration::from_secs(1), ..admin.clone() }, CreateError::Ttl),
            (for_sql(Some(0)), CreateError::Uses),
            (for_sql(Some(USES_MAX + 1)), CreateError::Uses),
            (
                NewToken { pools: vec!["p".parse().unwrap(); ENTRIES_MAX + 1], ..for_sql(None) },
                CreateError::Entries,
            ),
        ] {
            assert_eq!(book.create(new, &[1; SEED_BYTES], at(0)).unwrap_err(), error);
        }
        assert!(book.create(admin, &[1; SEED_BYTES], at(0)).is_ok());
    }

    #[test]
    fn what_is_kept_comes_back_and_the_dead_make_room() {
        let seed = |n: usize| {
            let mut seed = [0; SEED_BYTES];
            seed[..8].copy_from_slice(&(n as u64).to_le_bytes());
            seed
        };
        let mut book = TokenBook::load(vec![]);
        for n in 0..TOKENS_MAX {
            book.create(for_sql(Some(1)), &seed(n), at(0)).unwrap();
        }
        assert_eq!(book.create(for_sql(None), &seed(TOKENS_MAX), at(1)).unwrap_err(), CreateError::Full);
        let first = book.take_changes(1);
        let changes = [first, book.take_changes(usize::MAX)].concat();
        let records = changes.into_iter().map(|change| match change {
            TokenChange::Put(record) => TokenRecord::clone(&record),
            other => panic!("{other:?}"),
        });
        let records: Vec<TokenRecord> = records.collect();
        assert_eq!(records.len(), TOKENS_MAX);
        assert!(book.take_changes(usize::MAX).is_empty());

        let mut again = TokenBook::load(records);
        assert!(again.take_changes(usize::MAX).is_empty());
        again.create(for_sql(None), &seed(TOKENS_MAX), at(60)).unwrap();
        let changes = again.take_changes(usize::MAX);
        assert_eq!(changes.len(), TOKENS_MAX + 1);
        assert_eq!(changes.iter().filter(|change| matches!(change, TokenChange::Put(_))).count(), 1);
    }
    #[test]
    fn a_change_that_was_not_written_is_given_out_again_as_it_is_then() {
        let mut book = TokenBook::load(vec![]);
        let (token, _) = book.create(for_sql(Some(1)), &[1; SEED_BYTES], at(0)).unwrap();
        let put = |book: &TokenBook| TokenChange::Put(Arc::clone(&book.list()[0]));
        assert_eq!(book.take_token(&token), Some(put(&book)));
        assert!(book.take_changes(9).is_empty(), "it is taken");
        assert!(book.join(&token, &id("a"), at(1)).unwrap());
        let used = TokenChange::Use(token.clone(), id("a"));
        assert_eq!(book.take_use(&token, &id("a")), Some(used.clone()));
        book.note_again(vec![used, put(&book)]);
        book.unjoin(&token, &id("a"));
        assert_eq!(book.take_changes(9), [put(&book), TokenChange::Unuse(token.clone(), id("a"))]);
        book.forget(&token);
        book.note_again(vec![TokenChange::Use(token.clone(), id("a"))]);
        assert_eq!(book.take_changes(9), [TokenChange::Remove(token)]);
        let mut of_nobody = TokenBook::default();
        let (token, _) = of_nobody.create(for_sql(Some(1)), &[1; SEED_BYTES], at(0)).unwrap();
        assert_eq!((of_nobody.is_kept(), of_nobody.take_token(&token)), (false, None));
        assert!(of_nobody.take_changes(9).is_empty());
    }

    #[test]
    fn of_two_registrations_of_a_resource_one_makes_the_use() {
        let mut book = TokenBook::default();
        let (token, _) = book.create(for_sql(Some(1)), &[1; SEED_BYTES], at(0)).unwrap();
        for _ in 0..2 {
            assert_eq!(book.join(&token, &id("a"), at(0)), Ok(true), "neither is made yet");
        }
        book.unjoin(&token, &id("a"));
        assert_eq!(book.join(&token, &id("b"), at(0)), Err(TokenError::UsedUp));
        book.joined(&token, &id("a"));
        book.unjoin(&token, &id("a"));
        assert_eq!(book.join(&token, &id("a"), at(0)), Ok(false));
        assert_eq!(book.list()[0].state(at(0)), "used up");
    }

    #[test]
    fn what_expired_is_dropped_when_nothing_is_there_by_it() {
        let mut book = TokenBook::load(vec![]);
        let (token, secret) = book.create(for_sql(None), &[1; SEED_BYTES], at(0)).unwrap();
        assert_eq!(TokenId::of_owner(&token.owner()), Some(token.clone()));
        let over = at(60) + EXPIRED_KEPT;
        assert!(!book.may_prune(over - Duration::from_secs(1)) && book.may_prune(over));
        assert_eq!(book.prune(over, |owner| *owner == token.owner()), 0);
        assert!(book.verify(secret.reveal()).is_ok());
        assert_eq!(book.prune(over, |_| false), 1);
        assert_eq!(book.verify(secret.reveal()).unwrap_err(), TokenError::Unknown);
        assert_eq!(book.take_changes(9), [TokenChange::Remove(token)]);
    }
}
