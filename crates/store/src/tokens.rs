//! Tokens: who may join or administer, by a secret of which only a hash is here.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use rusqlite::params;

use crate::{StoreError, Tables};

/// What a token is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// To register and report.
    Resource,
    /// To administer.
    Admin,
}

impl Role {
    /// Its name in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Resource => "resource",
            Self::Admin => "admin",
        }
    }
}

/// A token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Unique; no secret.
    pub id: String,
    /// SHA-256 of the secret, which is random.
    pub hash: [u8; 32],
    /// What it is good for.
    pub role: Role,
    /// The pools it is for, sorted.
    pub pools: Vec<String>,
    /// Addresses that its holder may register besides its own, sorted.
    pub cidrs: Vec<String>,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Until when resources join by it, in milliseconds since 1970.
    pub expires_ms: u64,
    /// How many resources may; `None`: any number.
    pub uses_max: Option<u32>,
    /// The ids of those that did, where that is limited.
    pub used_by: BTreeSet<String>,
    /// An operator took it back.
    pub revoked: bool,
}

/// Without the hash.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).field("role", &self.role).finish_non_exhaustive()
    }
}

impl Tables<'_> {
    /// Keeps a token, in place of what was known of it; its uses are left alone.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn put_token(&self, token: &Token) -> Result<(), StoreError> {
        self.execute(
            "INSERT INTO tokens (id, hash, role, created_ms, expires_ms, uses_max, revoked)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
             ON CONFLICT (id) DO UPDATE SET hash = ?2, role = ?3, created_ms = ?4, expires_ms = ?5, uses_max = ?6,
             revoked = ?7",
            params![
                token.id,
                token.hash,
                token.role.name(),
                token.created_ms as i64,
                token.expires_ms as i64,
                token.uses_max,
                token.revoked,
            ],
        )?;
        for table in ["token_pools", "token_cidrs"] {
            self.execute(&format!("DELETE FROM {table} WHERE token = ?1"), [&token.id])?;
        }
        for pool in &token.pools {
            self.execute(
                "INSERT OR IGNORE INTO token_pools (token, pool) VALUES (?1, ?2)",
                [&token.id, pool],
            )?;
        }
        for cidr in &token.cidrs {
            self.execute(
                "INSERT OR IGNORE INTO token_cidrs (token, cidr) VALUES (?1, ?2)",
                [&token.id, cidr],
            )?;
        }
        Ok(())
    }

    /// Keeps that a resource joined by a token; once more changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Conflict`]: there is no such token.
    pub fn use_token(&self, id: &str, resource: &str) -> Result<(), StoreError> {
        self.execute("INSERT OR IGNORE INTO token_uses (token, resource) VALUES (?1, ?2)", [id, resource])?;
        Ok(())
    }

    /// Takes [`Self::use_token`] back.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn unuse_token(&self, id: &str, resource: &str) -> Result<(), StoreError> {
        self.execute("DELETE FROM token_uses WHERE token = ?1 AND resource = ?2", [id, resource])?;
        Ok(())
    }

    /// Forgets a token, with its uses. True: there was one.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn delete_token(&self, id: &str) -> Result<bool, StoreError> {
        Ok(self.execute("DELETE FROM tokens WHERE id = ?1", [id])? > 0)
    }

    /// Every token, by id.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn tokens(&self) -> Result<Vec<Token>, StoreError> {
        let mut pools = self.of_tokens("SELECT token, pool FROM token_pools ORDER BY token, pool")?;
        let mut cidrs = self.of_tokens("SELECT token, cidr FROM token_cidrs ORDER BY token, cidr")?;
        let mut uses = self.of_tokens("SELECT token, resource FROM token_uses")?;
        self.all(
            "SELECT id, hash, role, created_ms, expires_ms, uses_max, revoked FROM tokens ORDER BY id",
            [],
            |row| {
                let (id, role): (String, String) = (row.get(0)?, row.get(2)?);
                Ok(Token {
                    pools: pools.remove(&id).unwrap_or_default(),
                    cidrs: cidrs.remove(&id).unwrap_or_default(),
                    used_by: uses.remove(&id).unwrap_or_default().into_iter().collect(),
                    id,
                    hash: row.get(1)?,
                    role: if role == Role::Admin.name() { Role::Admin } else { Role::Resource },
                    created_ms: row.get::<_, i64>(3)? as u64,
                    expires_ms: row.get::<_, i64>(4)? as u64,
                    uses_max: row.get(5)?,
                    revoked: row.get(6)?,
                })
            },
        )
    }

    /// Pairs of a token and something of it.
    fn of_tokens(&self, select: &str) -> Result<HashMap<String, Vec<String>>, StoreError> {
        let mut all: HashMap<String, Vec<String>> = HashMap::new();
        for (token, what) in
            self.all(select, [], |row| Ok::<(String, String), _>((row.get(0)?, row.get(1)?)))?
        {
            all.entry(token).or_default().push(what);
        }
        Ok(all)
    }
}
