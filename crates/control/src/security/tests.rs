use std::time::Instant;

use registry::{Config, Limits, PoolConfig, RawRegistration};
use tonic::Code;

use super::rules::San;
use super::*;
use crate::tokens::{NewToken, SEED_BYTES};

struct Lab {
    security: Security,
    registry: Registry,
}

impl Lab {
    fn new(config: SecurityConfig) -> Self {
        let pool = |name: &str| PoolConfig::new(name.parse().unwrap(), allocation::Policy::Adaptive);
        let pools = vec![pool("sql"), pool("web")];
        let registry = Registry::new(Config { pools, limits: Limits::default() }).unwrap();
        Self {
            security: Security::new(config, None, Clock::new(Instant::now()), TokenBook::default()),
            registry,
        }
    }

    fn token(&self, uses_max: Option<u32>, ttl: Duration, seed: u8) -> String {
        let pools = vec!["sql".parse().unwrap()];
        let new = NewToken { role: Role::Resource, pools, addresses: vec![], ttl, uses_max };
        let made = self.security.tokens().create(new, &[seed; SEED_BYTES], SystemTime::now());
        made.unwrap().1.reveal().to_owned()
    }

    fn caller(&self, peer: &Peer, token: Option<&str>) -> Result<Caller, Status> {
        let shown = token.map(|token| format!("Bearer {token}"));
        let shown = shown.as_ref().map(|shown| shown.as_bytes());
        self.security.admit(peer, shown, Role::Resource).map_err(|(status, _)| status)
    }

    /// Registers, as the service does.
    fn register(&self, caller: &Caller, id: &str, pool: &str, address: &str) -> Result<(), Status> {
        let raw = RawRegistration {
            id: id.into(),
            pool: pool.into(),
            address: address.into(),
            ..RawRegistration::default()
        };
        let registration = Registration::parse(raw).unwrap();
        let joining = self.security.may_register(caller, &registration, &self.registry)?;
        let registered =
            self.registry.register(registration.owned_by(joining.owner()), allocation::Timestamp::ZERO);
        registered.map_err(|error| Status::aborted(error.to_string()))?;
        joining.joined();
        Ok(())
    }
}

fn clear(from: &str) -> Peer {
    let address = SocketAddr::new(from.parse().unwrap(), 40_000);
    Peer { address, is_encrypted: false, is_crowd: false, known: None }
}

fn rule(san: &str, pools: &[&str], ids: &[&str]) -> PeerRule {
    PeerRule {
        san: san.parse().unwrap(),
        role: Role::Resource,
        pools: pools.iter().map(|pool| pool.parse().unwrap()).collect(),
        addresses: vec![],
        ids: ids.iter().map(|id| id.parse().unwrap()).collect(),
    }
}

fn holder(lab: &Lab, from: &str, names: &[&str]) -> Peer {
    let san = |name: &&str| {
        if name.contains("://") { San::Uri((*name).into()) } else { San::Dns((*name).into()) }
    };
    let certificate = Certificate { names: names.iter().map(san).collect(), not_after: i64::MAX };
    Peer { is_encrypted: true, known: Some(Arc::new(lab.security.know(certificate))), ..clear(from) }
}

#[test]
fn in_clear_text_loopback_may_all_and_others_their_own_address() {
    let lab = Lab::new(SecurityConfig {
        addresses: vec!["10.1.0.0/16".parse().unwrap()],
        ..SecurityConfig::default()
    });
    let local = lab.caller(&clear("127.0.0.1"), None).unwrap();
    lab.register(&local, "a", "sql", "198.51.100.7:1").unwrap();
    let other = lab.caller(&clear("192.0.2.1"), None).unwrap();
    lab.register(&other, "b", "sql", "192.0.2.1:1").unwrap();
    lab.register(&other, "c", "sql", "10.1.2.3:1").unwrap();
    for address in ["192.0.2.2:1", "127.0.0.1:1", "10.2.0.1:1"] {
        let refused = lab.register(&other, "d", "sql", address).unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{address}");
    }
    assert!(lab.registry.owner(&"a".parse().unwrap()) == Some(None), "nobody's");
}

#[test]
fn a_token_that_is_shown_is_looked_at_where_none_is_needed() {
    let lab = Lab::new(SecurityConfig::default());
    assert_eq!(lab.caller(&clear("127.0.0.1"), Some("wrong")).unwrap_err().code(), Code::Unauthenticated);
    let token = lab.token(None, Duration::from_secs(60), 1);
    let caller = lab.caller(&clear("127.0.0.1"), Some(&token)).unwrap();
    assert_eq!(lab.register(&caller, "a", "web", "127.0.0.1:1").unwrap_err().code(), Code::PermissionDenied);
    lab.register(&caller, "a", "sql", "127.0.0.1:1").unwrap();
    // Without it, it is another's.
    let anyone = lab.caller(&clear("127.0.0.1"), None).unwrap();
    let id = "a".parse().unwrap();
    assert!(lab.security.may_report(&caller, &id, &lab.registry).is_ok());
    let refused = lab.security.may_report(&anyone, &id, &lab.registry).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

#[test]
fn a_use_that_came_to_nothing_is_none() {
    let lab = Lab::new(SecurityConfig::default());
    let (one, two) =
        (lab.token(Some(1), Duration::from_secs(60), 1), lab.token(None, Duration::from_secs(60), 2));
    let (one, two) = [one, two].map(|token| lab.caller(&clear("127.0.0.1"), Some(&token)).unwrap()).into();
    lab.register(&two, "taken", "sql", "127.0.0.1:1").unwrap();
    let taken = lab.register(&one, "taken", "sql", "127.0.0.1:1").unwrap_err();
    assert_eq!(taken.code(), Code::PermissionDenied);
    // Allowed, and then not made.
    let raw = RawRegistration {
        id: "full".into(),
        pool: "sql".into(),
        address: "127.0.0.1:1".into(),
        ..RawRegistration::default()
    };
    let registration = Registration::parse(raw).unwrap();
    drop(lab.security.may_register(&one, &registration, &lab.registry).unwrap());
    lab.register(&one, "free", "sql", "127.0.0.1:1").unwrap();
    let refused = lab.register(&one, "other", "sql", "127.0.0.1:1").unwrap_err();
    assert_eq!(refused.message(), "the token is used up: as many resources joined by it as may");
}

#[test]
fn what_joined_by_a_token_stays_when_its_time_is_over() {
    let lab = Lab::new(SecurityConfig::default());
    let token = lab.token(None, Duration::from_secs(1), 1);
    let caller = lab.caller(&clear("127.0.0.1"), Some(&token)).unwrap();
    lab.register(&caller, "a", "sql", "127.0.0.1:1").unwrap();
    let Identity::Token(verified) = &caller.identity else { panic!("{caller:?}") };
    while !verified.is_expired(SystemTime::now()) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let caller = lab.caller(&clear("127.0.0.1"), Some(&token)).unwrap();
    lab.register(&caller, "a", "sql", "127.0.0.1:1").unwrap();
    assert!(lab.security.still_holds(&caller).is_ok());
    let late = lab.register(&caller, "b", "sql", "127.0.0.1:1").unwrap_err();
    assert_eq!(late.code(), Code::Unauthenticated);
}

#[test]
fn the_first_rule_names_the_owner_and_any_rule_allows() {
    let lab = Lab::new(SecurityConfig {
        peers: vec![
            rule("spiffe://example/sql/*", &["sql"], &["pg-*"]),
            rule("pg1.example.com", &["sql", "web"], &["web-1"]),
        ],
        ..SecurityConfig::default()
    });
    let both = holder(&lab, "192.0.2.1", &["pg1.example.com", "spiffe://example/sql/1"]);
    let both = lab.caller(&both, None).unwrap();
    assert_eq!(both.owner(), Some(Owner::new("spiffe://example/sql/1")));
    lab.register(&both, "pg-1", "sql", "192.0.2.1:1").unwrap();
    lab.register(&both, "web-1", "web", "192.0.2.1:2").unwrap();
    for (id, pool, address, why) in [
        ("pg-2", "web", "192.0.2.1:1", "may not have the id pg-2"),
        ("other", "sql", "192.0.2.1:1", "may not have the id other"),
        ("pg-2", "sql", "192.0.2.2:1", "is not this peer's"),
    ] {
        let refused = lab.register(&both, id, pool, address).unwrap_err();
        assert!(refused.message().contains(why), "{refused}");
    }
    let nobody = lab.caller(&holder(&lab, "192.0.2.1", &["pg2.example.com"]), None).unwrap_err();
    assert_eq!(nobody.code(), Code::PermissionDenied);
    let bare = Peer { is_encrypted: true, ..clear("192.0.2.1") };
    assert_eq!(lab.caller(&bare, None).unwrap_err().code(), Code::Unauthenticated);
}

#[test]
fn a_peer_with_too_many_connections_is_told_and_then_not_even_that() {
    let limits = PeerLimits { connections: 2, ..PeerLimits::default() };
    let lab = Lab::new(SecurityConfig { limits, ..SecurityConfig::default() });
    let from = |ip: &str| lab.security.connected(SocketAddr::new(ip.parse().unwrap(), 1));
    let open: Vec<_> = (0..2 + TOLD_MAX).map(|_| from("192.0.2.1").expect("it is counted")).collect();
    let told = open.iter().filter(|(_, is_crowd)| *is_crowd).count();
    assert_eq!(told, TOLD_MAX as usize);
    assert!(from("192.0.2.1").is_none());
    assert!(from("192.0.2.2").is_some(), "another peer");
    drop(open);
    // Twenty new ones at once; the one that was refused counts too.
    assert!(from("192.0.2.1").is_some_and(|(_, is_crowd)| !is_crowd));
    assert!(from("192.0.2.1").is_none(), "too many new ones");
    let crowd = Peer { is_crowd: true, ..clear("192.0.2.1") };
    assert_eq!(lab.caller(&crowd, None).unwrap_err().code(), Code::ResourceExhausted);
}

#[test]
fn who_is_refused_too_often_waits() {
    let limits = PeerLimits { registrations_per_second: 1, ..PeerLimits::default() };
    let lab = Lab::new(SecurityConfig { limits, ..SecurityConfig::default() });
    let peer = clear("192.0.2.1");
    let waits = || lab.security.admit(&peer, Some(b"Bearer x"), Role::Resource).unwrap_err().1;
    let at_once = (0..100).filter(|_| !waits()).count();
    assert!((10..=20).contains(&at_once), "{at_once}: ten, and what a slow machine's time brings");
}

#[test]
fn an_administrator_registers_in_nobodys_name_and_ends_anybodys() {
    let admin = PeerRule { role: Role::Admin, ..rule("admin.example.com", &[], &[]) };
    let peers = vec![admin, rule("pg1.example.com", &["sql"], &[])];
    let lab = Lab::new(SecurityConfig { peers, ..SecurityConfig::default() });
    let admin = lab.caller(&holder(&lab, "192.0.2.1", &["admin.example.com"]), None).unwrap();
    let pg1 = lab.caller(&holder(&lab, "192.0.2.2", &["pg1.example.com"]), None).unwrap();
    let id = "pg1".parse().unwrap();
    lab.register(&admin, "pg1", "sql", "192.0.2.2:1").unwrap();
    assert_eq!(lab.registry.owner(&id), Some(None));
    lab.register(&pg1, "pg1", "sql", "192.0.2.2:1").unwrap();
    assert_eq!(lab.registry.owner(&id), Some(pg1.owner()), "its own agent took it over");
    assert!(lab.register(&admin, "pg1", "sql", "192.0.2.3:1").is_err(), "it is somebody's now");
    let ended = lab.registry.deregister_by(admin.ends(&id, &lab.registry).as_ref(), &id, u64::MAX);
    assert_eq!(ended, Ok(true));
}

#[test]
fn what_is_remembered_is_its_owners_who_may_still_come() {
    let tls =
        TlsConfig { cert: "c".into(), key: "k".into(), client_ca: "ca".into(), require_certificate: false };
    let peers = vec![rule("spiffe://example/sql/*", &["sql"], &[]), rule("*.example.com", &["sql"], &[])];
    let config = SecurityConfig { tls: Some(tls), peers, ..SecurityConfig::default() };
    let lab = Lab::new(SecurityConfig::default());
    lab.token(None, Duration::from_secs(60), 1);
    let mut book = lab.security.tokens();
    let token = book.list()[0].id.clone();
    for name in ["spiffe://example/sql/1", "pg1.example.com"] {
        let owner = Owner::new(name);
        assert_eq!(config.owner_now(owner.clone(), &book), Ok(Some(owner.clone())));
        // Nobody could show it there.
        assert_eq!(SecurityConfig::default().owner_now(owner, &book), Ok(None));
    }
    let gone = Owner::new("spiffe://example/web/1");
    assert_eq!(config.owner_now(gone.clone(), &book), Err(NotHis::Peer(gone)));
    assert_eq!(SecurityConfig::default().owner_now(token.owner(), &book), Ok(Some(token.owner())));
    book.revoke(&token);
    assert_eq!(SecurityConfig::default().owner_now(token.owner(), &book), Err(NotHis::Token));
    let unknown = Owner::new("token:ffffffffffff");
    assert_eq!(config.owner_now(unknown, &book), Err(NotHis::Token));
}
