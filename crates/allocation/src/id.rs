//! Names of pools and resources, parsed once at the edge.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longest name of a pool or resource, in bytes. They become metric labels and table columns.
pub(crate) const NAME_BYTES_MAX: usize = 128;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdError {
    /// There is no character in it.
    #[error("is empty; it takes 1 to {NAME_BYTES_MAX} characters of A-Z a-z 0-9 . _ : / -")]
    Empty,
    /// It has a character that names may not have.
    #[error("has the character {found:?}; a name takes A-Z a-z 0-9 . _ : / -")]
    Character {
        /// The first such character.
        found: char,
    },
    /// It is longer than [`NAME_BYTES_MAX`].
    #[error("is {length} bytes long; a name takes at most {NAME_BYTES_MAX}")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
}

fn parse_name(text: &str) -> Result<Arc<str>, IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if text.len() > NAME_BYTES_MAX {
        return Err(IdError::TooLong { length: text.len() });
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | ':' | '/' | '-');
    match text.chars().find(|c| !allowed(*c)) {
        Some(found) => Err(IdError::Character { found }),
        None => Ok(Arc::from(text)),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_name(text).map(Self)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

name! {
    /// The name of a pool: resources that can stand in for each other.
    PoolName
}
name! {
    /// The identity of a resource, unique within a balancer.
    ResourceId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_plain() {
        assert_eq!("pg-1.example:5432/a_b".parse::<ResourceId>().unwrap().as_str(), "pg-1.example:5432/a_b");
        assert_eq!("".parse::<PoolName>(), Err(IdError::Empty));
        assert_eq!("a b".parse::<PoolName>(), Err(IdError::Character { found: ' ' }));
        assert_eq!("pg\n".parse::<PoolName>(), Err(IdError::Character { found: '\n' }));
        assert_eq!("x".repeat(129).parse::<PoolName>(), Err(IdError::TooLong { length: 129 }));
        assert!("x".repeat(128).parse::<PoolName>().is_ok());
    }
}
