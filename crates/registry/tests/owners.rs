//! A resource's id belongs to the identity that registered it first, for as long as it is registered.

use allocation::{Policy, Timestamp};
use registry::{
    Config, DeregisterError, Limits, Owner, PoolConfig, RawRegistration, RegisterError, Registration,
    Registry,
};

fn registry() -> Registry {
    let pools = vec![PoolConfig::new("sql".parse().unwrap(), Policy::Adaptive)];
    Registry::new(Config { pools, limits: Limits::default() }).unwrap()
}

fn of(owner: Option<&str>, incarnation: u64) -> Registration {
    let raw = RawRegistration {
        id: "pg1".into(),
        pool: "sql".into(),
        address: "10.0.0.1:5432".into(),
        incarnation,
        ..RawRegistration::default()
    };
    Registration::parse(raw).unwrap().owned_by(owner.map(Owner::new))
}

#[test]
fn nobody_else_takes_or_ends_it() {
    let registry = registry();
    let now = Timestamp::from_millis(1);
    let id = "pg1".parse().unwrap();
    let a = Owner::new("spiffe://example/a");
    assert!(registry.register(of(Some(a.as_str()), 1), now).unwrap().created);
    assert!(!registry.register(of(Some(a.as_str()), 1), now).unwrap().created, "its own renews");

    // Newer or not, with a name or without.
    for thief in [of(Some("spiffe://example/b"), 2), of(Some("spiffe://example/b"), 1), of(None, 9)] {
        let error = registry.register(thief, now).unwrap_err();
        assert_eq!(error, RegisterError::OtherOwner { id: "pg1".parse().unwrap(), owner: a.clone() });
    }
    let b = Owner::new("spiffe://example/b");
    for thief in [None, Some(&b)] {
        let error = registry.deregister_by(thief, &id, 9).unwrap_err();
        assert!(matches!(error, DeregisterError::OtherOwner { .. }), "{error}");
    }
    assert_eq!(registry.owner(&id), Some(Some(a.clone())));

    assert_eq!(registry.deregister_by(Some(&a), &id, 1), Ok(true));
    assert_eq!(registry.owner(&id), None);
    assert!(registry.register(of(Some(b.as_str()), 1), now).unwrap().created, "it is free again");
}

#[test]
fn what_is_nobodys_may_be_taken() {
    let registry = registry();
    let now = Timestamp::from_millis(1);
    let id = "pg1".parse().unwrap();
    registry.register(of(None, 1), now).unwrap();
    assert_eq!(registry.owner(&id), Some(None));
    let a = Owner::new("a");
    assert!(!registry.register(of(Some("a"), 1), now).unwrap().created, "adopted in place");
    assert_eq!(registry.owner(&id), Some(Some(a)));
}
