//! Tokens: who may join or administer, by a secret of which only a salted hash is here.

use std::collections::HashMap;
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
    pub name: String,
    /// Of its hash.
    pub salt: Vec<u8>,
    /// Of the secret.
    pub hash: Vec<u8>,
    /// What it is good for.
    pub role: Role,
    /// The pool it is for; `None`: any.
    pub pool: Option<String>,
    /// Addresses that it is for; none: any.
    pub cidrs: Vec<String>,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Until when, in milliseconds since 1970; `None`: for ever.
    pub expires_ms: Option<u64>,
    /// How many times it may still be used; `None`: any number.
    pub uses_left: Option<u64>,
    /// An operator took it back.
    pub revoked: bool,
}

/// Without salt and hash: whoever has both can guess.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, role, pool, cidrs, created_ms, expires_ms, uses_left, revoked, .. } = self;
        f.debug_struct("Token")
            .field("name", name)
            .field("role", role)
            .field("pool", pool)
            .field("cidrs", cidrs)
            .field("created_ms", created_ms)
            .field("expires_ms", expires_ms)
            .field("uses_left", uses_left)
            .field("revoked", revoked)
            .finish_non_exhaustive()
    }
}

impl Tables<'_> {
    /// Keeps a new token.
    ///
    /// # Errors
    /// [`StoreError::Conflict`]: there is one of that name.
    pub fn insert_token(&self, token: &Token) -> Result<(), StoreError> {
        self.execute(
            "INSERT INTO tokens (name, salt, hash, role, pool, created_ms, expires_ms, uses_left, revoked)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
            params![
                token.name,
                token.salt,
                token.hash,
                token.role.name(),
                token.pool,
                token.created_ms as i64,
                token.expires_ms.map(|ms| ms as i64),
                token.uses_left.map(|uses| uses as i64),
                token.revoked,
            ],
        )?;
        for cidr in &token.cidrs {
            self.execute("INSERT INTO token_cidrs (token, cidr) VALUES (?1, ?2)", [&token.name, cidr])?;
        }
        Ok(())
    }

    /// Takes one use off a token. False: it has none left, is revoked, or is not there.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn use_token(&self, name: &str) -> Result<bool, StoreError> {
        let update = "UPDATE tokens SET uses_left = uses_left - 1
                      WHERE name = ?1 AND revoked = 0 AND (uses_left IS NULL OR uses_left > 0)";
        Ok(self.execute(update, [name])? > 0)
    }

    /// Takes a token back, for good. False: there is none of that name.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn revoke_token(&self, name: &str) -> Result<bool, StoreError> {
        Ok(self.execute("UPDATE tokens SET revoked = 1 WHERE name = ?1", [name])? > 0)
    }

    /// Forgets a token. True: there was one.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn delete_token(&self, name: &str) -> Result<bool, StoreError> {
        Ok(self.execute("DELETE FROM tokens WHERE name = ?1", [name])? > 0)
    }

    /// Every token, by name.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn tokens(&self) -> Result<Vec<Token>, StoreError> {
        let mut cidrs: HashMap<String, Vec<String>> = HashMap::new();
        let rows = self.all("SELECT token, cidr FROM token_cidrs ORDER BY token, cidr", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
        for (token, cidr) in rows {
            let of_token: &mut Vec<String> = cidrs.entry(token).or_default();
            of_token.push(cidr);
        }
        self.all(
            "SELECT name, salt, hash, role, pool, created_ms, expires_ms, uses_left, revoked FROM tokens ORDER BY name",
            [],
            |row| {
                let (name, role): (String, String) = (row.get(0)?, row.get(3)?);
                Ok(Token {
                    cidrs: cidrs.remove(&name).unwrap_or_default(),
                    name,
                    salt: row.get(1)?,
                    hash: row.get(2)?,
                    role: if role == Role::Admin.name() { Role::Admin } else { Role::Resource },
                    pool: row.get(4)?,
                    created_ms: row.get::<_, i64>(5)? as u64,
                    expires_ms: row.get::<_, Option<i64>>(6)?.map(|ms| ms as u64),
                    uses_left: row.get::<_, Option<i64>>(7)?.map(|uses| uses as u64),
                    revoked: row.get(8)?,
                })
            },
        )
    }
}
