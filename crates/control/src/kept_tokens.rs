//! Tokens and the store: what changes in the book becomes rows, and rows become a book at the next start.
//!
//! ```text
//! create, revoke, a use   book, then the store's queue, under the book's lock; awaited
//! what was not written, a use that came to nothing, what expired   taken from the book every half second
//! ```
//!
//! * The lock keeps the store's order the book's. A use is on the disk before the registration that it lets in is asked for:
//!   one that is killed between has used the token, and comes again as the same resource, which is no further use.
//! * What fails is noted again by a task of its own: a caller that hangs up must not take that with it.
//! * Without a store all of this is the book alone. A hash is in no message.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use store::{OpenError, Store, StoreError, Tables, Token};
use tokio::task::JoinHandle;
use tonic::Status;

use crate::Shared;
use crate::keeper::written;
use crate::security::{Joining, Role, parse_network};
use crate::tokens::{TokenBook, TokenChange, TokenId, TokenRecord};

/// Changes that are made up for in one go.
pub(crate) const FLUSH_MAX: usize = 1_000;

/// Takes back what the store has.
pub(crate) fn load(store: &Store) -> Result<TokenBook, OpenError> {
    let mut records = Vec::new();
    for token in store.read(|tables| tables.tokens())? {
        let id = token.id.clone();
        match record(token) {
            Ok(record) => records.push(record),
            Err(error) => tracing::warn!(id, error, "a token of the store is left out; its rows are kept"),
        }
    }
    Ok(TokenBook::load(records))
}

fn record(token: Token) -> Result<TokenRecord, String> {
    let at = |ms| UNIX_EPOCH + Duration::from_millis(ms);
    let network = |text: &String| parse_network(text).ok_or_else(|| format!("its network {text:?} is none"));
    let pools = token.pools.iter().map(|pool| pool.parse().map_err(|error| format!("its pool {error}")));
    let used_by = token.used_by.iter().map(|id| id.parse().map_err(|error| format!("its use {error}")));
    Ok(TokenRecord {
        id: TokenId::parse(&token.id).ok_or("its id is none")?,
        hash: token.hash,
        role: match token.role {
            store::Role::Resource => Role::Resource,
            store::Role::Admin => Role::Admin,
        },
        pools: pools.collect::<Result<_, _>>()?,
        addresses: token.cidrs.iter().map(network).collect::<Result<_, _>>()?,
        created: at(token.created_ms),
        expires: at(token.expires_ms),
        uses_max: token.uses_max,
        used_by: used_by.collect::<Result<_, _>>()?,
        revoked: token.revoked,
    })
}

/// All but its uses.
fn row(record: &TokenRecord) -> Token {
    let ms = |at: SystemTime| {
        u64::try_from(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
    };
    Token {
        id: record.id.to_string(),
        hash: record.hash,
        role: match record.role {
            Role::Resource => store::Role::Resource,
            Role::Admin => store::Role::Admin,
        },
        pools: record.pools.iter().map(ToString::to_string).collect(),
        cidrs: record.addresses.iter().map(ToString::to_string).collect(),
        created_ms: ms(record.created),
        expires_ms: ms(record.expires),
        uses_max: record.uses_max,
        used_by: std::collections::BTreeSet::new(),
        revoked: record.revoked,
    }
}

fn apply(tables: &Tables<'_>, change: &TokenChange) -> Result<(), StoreError> {
    match change {
        TokenChange::Put(record) => tables.put_token(&row(record)),
        TokenChange::Remove(id) => tables.delete_token(id.as_str()).map(|_| ()),
        TokenChange::Use(id, resource) => tables.use_token(id.as_str(), resource.as_str()),
        TokenChange::Unuse(id, resource) => tables.unuse_token(id.as_str(), resource.as_str()),
    }
}

/// A change on its way to the disk.
pub(crate) struct Writing(JoinHandle<Result<(), StoreError>>);

impl Writing {
    /// Waits for the disk.
    pub(crate) async fn written(self) -> Result<(), StoreError> {
        // The task fails where the process ends.
        self.0.await.unwrap_or(Err(StoreError::Closed))
    }
}

impl Shared {
    /// Asks for what was taken from this book, still locked, to be written; `None`: there is nothing, or no store.
    pub(crate) fn write_tokens(
        &self,
        _order: &mut TokenBook,
        changes: impl IntoIterator<Item = TokenChange>,
    ) -> Option<Writing> {
        let keeper = self.keeper.as_ref()?;
        let changes: Vec<TokenChange> = changes.into_iter().collect();
        if changes.is_empty() {
            return None;
        }
        let again = changes.clone();
        let answer =
            keeper.writer().run(move |tables| changes.iter().try_for_each(|change| apply(tables, change)));
        let security = Arc::clone(&self.security);
        Some(Writing(tokio::spawn(async move {
            let outcome = written(answer).await;
            if outcome.is_err() {
                security.tokens().note_again(again);
            }
            outcome
        })))
    }

    /// Has the use of a token written that lets a resource in, and returns when it is on the disk.
    pub(crate) async fn keep_use(&self, joining: &Joining<'_>) -> Result<(), Status> {
        let Some((token, resource)) = joining.used() else { return Ok(()) };
        let writing = {
            let mut book = self.security.tokens();
            let change = book.take_use(token, resource);
            self.write_tokens(&mut book, change)
        };
        let Some(writing) = writing else { return Ok(()) };
        writing.written().await.map_err(|error| {
            Status::unavailable(format!("the balancer cannot remember that the token was used: {error}"))
        })
    }

    /// Writes what is not written yet; does not wait.
    pub(crate) fn flush_tokens(&self, most: usize) {
        let mut book = self.security.tokens();
        let changes = book.take_changes(most);
        drop(self.write_tokens(&mut book, changes));
    }

    /// Drops tokens that expired long ago and by which nothing is here.
    pub(crate) fn prune_tokens(&self, now: SystemTime) {
        if !self.security.tokens().may_prune(now) {
            return;
        }
        // Nobody joins by an expired token meanwhile.
        let owners = self.registry.owners();
        let pruned = self.security.tokens().prune(now, |owner| owners.contains(owner));
        tracing::debug!(pruned, "expired tokens are forgotten");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokens::{NewToken, SEED_BYTES};

    #[test]
    fn a_book_comes_back_from_rows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trimtab.db");
        let store = Store::open(&path).unwrap();
        let mut book = load(&store).unwrap();
        assert!(book.is_kept() && book.list().is_empty());
        let new = |seed: u8, uses_max| {
            let new = NewToken {
                role: Role::Resource,
                pools: vec!["sql".parse().unwrap()],
                addresses: vec!["10.0.0.0/8".parse().unwrap()],
                ttl: Duration::from_secs(60),
                uses_max,
            };
            (new, [seed; SEED_BYTES])
        };
        let now = UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        let mut create = |seed, uses| {
            let (new, seed) = new(seed, uses);
            book.create(new, &seed, now).unwrap()
        };
        let (once, secret) = create(1, Some(1));
        let (revoked, _) = create(2, None);
        let pg1 = "pg1".parse().unwrap();
        book.join(&once, &pg1, now).unwrap();
        book.joined(&once, &pg1);
        book.revoke(&revoked);
        let changes = book.take_changes(usize::MAX);
        assert_eq!(changes.len(), 3);
        let writer = store.start().unwrap();
        let write = |changes: Vec<TokenChange>| {
            let answer =
                writer.run(move |tables| changes.iter().try_for_each(|change| apply(tables, change)));
            answer.blocking_recv().unwrap().unwrap();
        };
        write(changes);
        let listed = book.list();
        // What cannot be read is left out by itself.
        let broken = Token { id: "of another form".into(), ..row(&listed[0]) };
        writer.run(move |tables| tables.put_token(&broken)).blocking_recv().unwrap().unwrap();
        drop(writer);

        let mut again = load(&Store::open(&path).unwrap()).unwrap();
        assert_eq!(again.list(), listed);
        assert_eq!(again.verify(secret.reveal()).unwrap().record.id, once);
        assert!(again.holds(&once) && !again.holds(&revoked));
        assert!(again.join(&once, &"pg2".parse().unwrap(), now).is_err(), "used up");
        assert_eq!(again.join(&once, &pg1, now), Ok(false), "who joined may come again");
        assert!(again.take_changes(1).is_empty());
    }
}
