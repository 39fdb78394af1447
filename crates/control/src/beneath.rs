//! Balancers that are resources of this one, and those below them: so that flows never go round in a circle.
//!
//! ```text
//! a balancer registers, and says who is beneath it: itself, and whoever said so to it
//!   this balancer among them?  yes: refused, and its registration ends
//!                              no:  they are beneath this one as well, from now on
//! ```
//!
//! Two balancers that register with each other at the same moment are both let in, and learn of each other by their next
//! reports: then both are refused, and the first to try again is let in.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use allocation::ResourceId;
use registry::Registry;

/// Balancers that one may name.
pub(crate) const BENEATH_MAX: usize = 64;
const ID_BYTES_MAX: usize = 256;

/// Who is beneath this balancer.
#[derive(Debug, Default)]
pub(crate) struct Beneath {
    /// By the resource that said so.
    said: Mutex<HashMap<ResourceId, Vec<String>>>,
    /// Whether anybody did: asked at every report, which must not wait for the lock.
    any: AtomicBool,
}

/// Why a balancer may not be a resource of this one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BeneathError {
    #[error(
        "this balancer ({0}) is a resource of the one that registers, directly or through others: flows would go round \
         in a circle. Take [[upstream]] out of one of the two configurations"
    )]
    Circle(String),
    #[error(
        "more than {BENEATH_MAX} balancers are beneath the one that registers, or one's name is longer than {ID_BYTES_MAX} bytes"
    )]
    TooMany,
}

impl Beneath {
    /// What a resource says of itself; nothing, of one that is no balancer.
    pub(crate) fn say(
        &self,
        id: &ResourceId,
        beneath: Vec<String>,
        this_balancer: &str,
    ) -> Result<(), BeneathError> {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if beneath.iter().any(|balancer| balancer == this_balancer) {
            said.remove(id);
            return Err(BeneathError::Circle(this_balancer.to_owned()));
        }
        if beneath.len() > BENEATH_MAX || beneath.iter().any(|balancer| balancer.len() > ID_BYTES_MAX) {
            return Err(BeneathError::TooMany);
        }
        if beneath.is_empty() {
            said.remove(id);
        } else if said.get(id) != Some(&beneath) {
            said.insert(id.clone(), beneath);
        }
        self.any.store(!said.is_empty(), Relaxed);
        Ok(())
    }

    /// Whether anybody said anything: most balancers have no other beneath them.
    pub(crate) fn is_empty(&self) -> bool {
        !self.any.load(Relaxed)
    }

    /// All of them and this one, sorted.
    pub(crate) fn all(&self, this_balancer: &str, registry: &Registry) -> Vec<String> {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.retain(|id, _| registry.pool_of(id).is_some());
        let mut all: BTreeSet<&str> = said.values().flatten().map(String::as_str).collect();
        all.insert(this_balancer);
        all.into_iter().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(of: &[&str]) -> Vec<String> {
        of.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_circle_is_refused_however_long() {
        let (a, b): (ResourceId, ResourceId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let beneath = Beneath::default();
        beneath.say(&a, names(&["A", "C"]), "this").unwrap();
        let error = beneath.say(&b, names(&["B", "D", "this"]), "this").unwrap_err();
        assert_eq!(error, BeneathError::Circle("this".into()));
        assert!(!beneath.is_empty());
        beneath.say(&a, Vec::new(), "this").unwrap();
        assert!(beneath.is_empty());
        let many: Vec<String> = (0..65).map(|n| n.to_string()).collect();
        assert_eq!(beneath.say(&a, many, "this"), Err(BeneathError::TooMany));
    }

    #[test]
    fn who_has_left_is_not_beneath() {
        let config = registry::Config {
            pools: vec![registry::PoolConfig::new("sql".parse().unwrap(), allocation::Policy::Adaptive)],
            ..registry::Config::default()
        };
        let registry = Registry::new(config).unwrap();
        let raw = registry::RawRegistration {
            id: "a".into(),
            pool: "sql".into(),
            address: "10.0.0.1:1".into(),
            ..registry::RawRegistration::default()
        };
        let registration = registry::Registration::parse(raw).unwrap();
        registry.register(registration, allocation::Timestamp::ZERO).unwrap();
        let beneath = Beneath::default();
        beneath.say(&"a".parse().unwrap(), names(&["A", "C"]), "this").unwrap();
        beneath.say(&"b".parse().unwrap(), names(&["B"]), "this").unwrap();
        assert_eq!(beneath.all("this", &registry), ["A", "C", "this"]);
    }
}
