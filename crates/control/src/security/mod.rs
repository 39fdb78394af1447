//! Who may join, and who may administer.
//!
//! ```text
//! connection: how many of this peer? -> TLS handshake -> names of its certificate -> Peer
//! call:       Peer + bearer token -> Caller -> role? -> registration: rate? pool? id? address? -> owner of the resource
//! ```
//!
//! * A caller is who its token says, else who its certificate says, else, in clear text, anyone. What a peer shows is
//!   always looked at: a wrong token is refused where none is needed.
//! * In clear text from loopback anyone may do anything, as on a machine of one operator. In clear text from elsewhere
//!   (`insecure = true`) a peer may register only the addresses it connects from, and those of `control.addresses`.
//! * A resource belongs to who registered it: see [`registry::Owner`].
//! * It owns the rules, the token book, limits of peers and the count of refusals. It does not own registrations
//!   (`registry`) or sockets (`guarded`).
//! * No secret is in any message, log line or `Debug` of this module.

mod guard;
mod limits;
mod refusal;
mod rules;
mod tls;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use allocation::ResourceId;
use ipnet::IpNet;
use registry::{Owner, Registration, Registry};
use tonic::{Request, Status};

pub(crate) use self::guard::Guard;
pub(crate) use self::limits::Open;
pub use self::limits::PeerLimits;
use self::limits::{Kind, PeerKey, Peers};
pub(crate) use self::refusal::{Reason, Refusal, Refusals};
pub use self::rules::{IdPattern, PatternError, PeerRule, Role, SanPattern, UnknownRole, parse_network};
pub(crate) use self::rules::{San, is_own_or_allowed};
pub(crate) use self::tls::{Certificate, Tls, parse as parse_certificate};
pub use self::tls::{TlsConfig, TlsError};
use crate::clock::Clock;
use crate::tokens::{TokenBook, TokenError, TokenId, Verified};

/// Connections beyond a peer's bound that are still told why their calls are refused; those beyond are closed.
const TOLD_MAX: u32 = 16;
/// What a refused registration waits for its answer. A connection has so many streams and a peer so many connections, so
/// a flood is held up at its source: it costs us what is answered, not what it would send. Agents wait for 2 s.
const PENALTY: Duration = Duration::from_secs(1);

/// Who may join and how much one peer may do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SecurityConfig {
    /// TLS of the control listener; `None`: clear text.
    pub tls: Option<TlsConfig>,
    /// What the holders of certificates may do; whoever none is for may nothing.
    pub peers: Vec<PeerRule>,
    /// Addresses that any peer may register though it does not connect from them.
    pub addresses: Vec<IpNet>,
    /// How much one peer may do.
    pub limits: PeerLimits,
}

/// Why a resource that was registered before a restart does not come back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotHis {
    /// For good.
    #[error("it joined by a token that was revoked, or is not known any more")]
    Token,
    /// As long as the configuration is as it is.
    #[error("no [[control.peer]] is for {0}, whose it is")]
    Peer(Owner),
}

impl SecurityConfig {
    /// Whose a remembered resource is now, that was this owner's: nobody could report for it, or end it, whose owner may not
    /// come any more. Where control is in clear text nobody shows certificates, and their names mean nothing.
    pub(crate) fn owner_now(&self, owner: Owner, tokens: &TokenBook) -> Result<Option<Owner>, NotHis> {
        if let Some(token) = TokenId::of_owner(&owner) {
            return if tokens.holds(&token) { Ok(Some(owner)) } else { Err(NotHis::Token) };
        }
        if self.tls.is_none() {
            return Ok(None);
        }
        let names = [San::Dns(owner.as_str().to_owned()), San::Uri(owner.as_str().to_owned())];
        let is_for = |rule: &PeerRule| names.iter().any(|name| rule.san.matches(name));
        if self.peers.iter().any(is_for) { Ok(Some(owner)) } else { Err(NotHis::Peer(owner)) }
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) is_encrypted: bool,
    /// One connection too many: it is only told so.
    pub(crate) is_crowd: bool,
    pub(crate) known: Option<Arc<Known>>,
}

/// Whom a verified certificate makes of its holder.
#[derive(Debug)]
pub(crate) struct Known {
    certificate: Certificate,
    /// Its name that the first rule is for.
    owner: Option<Owner>,
    /// Places of the rules that are for it.
    rules: Vec<usize>,
}

/// Who calls.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    ip: IpAddr,
    identity: Identity,
    key: PeerKey,
    limits: PeerLimits,
    /// It may also do what resources do, in nobody's name: an operator registers what has no agent, and ends anything.
    is_admin: bool,
}

#[derive(Debug, Clone)]
enum Identity {
    /// In clear text, with nothing to show.
    Anyone,
    Certificate(Arc<Known>),
    Token(Verified),
}

impl Caller {
    /// Whose its registrations are.
    pub(crate) fn owner(&self) -> Option<Owner> {
        self.identity.owner()
    }

    /// Whose a resource is to be said to be, for this caller to end it.
    pub(crate) fn ends(&self, id: &ResourceId, registry: &Registry) -> Option<Owner> {
        if self.is_admin { registry.owner(id).flatten() } else { self.owner() }
    }

    /// Whether it proved who it is.
    pub(crate) fn is_known(&self) -> bool {
        !matches!(self.identity, Identity::Anyone)
    }
}

impl Identity {
    fn owner(&self) -> Option<Owner> {
        match self {
            Self::Anyone => None,
            Self::Certificate(known) => known.owner.clone(),
            Self::Token(token) => Some(token.record.id.owner()),
        }
    }
}

/// What decides.
pub(crate) struct Security {
    rules: Vec<PeerRule>,
    addresses: Vec<IpNet>,
    limits: PeerLimits,
    tls: Option<Arc<Tls>>,
    tokens: Mutex<TokenBook>,
    peers: Peers,
    refusals: Refusals,
    clock: Clock,
}

impl Security {
    pub(crate) fn new(
        config: SecurityConfig,
        tls: Option<Arc<Tls>>,
        clock: Clock,
        tokens: TokenBook,
    ) -> Self {
        let SecurityConfig { tls: _, peers: rules, addresses, limits } = config;
        let (tokens, peers, refusals) = (Mutex::new(tokens), Peers::default(), Refusals::default());
        Self { rules, addresses, limits, tls, tokens, peers, refusals, clock }
    }

    pub(crate) fn tls(&self) -> Option<&Arc<Tls>> {
        self.tls.as_ref()
    }

    pub(crate) fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    pub(crate) fn tokens(&self) -> MutexGuard<'_, TokenBook> {
        // A panic under the lock is a fault of ours; the book is still the best there is.
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limits_of(&self, ip: IpAddr, is_encrypted: bool) -> PeerLimits {
        if ip.is_loopback() && !is_encrypted { self.limits.local() } else { self.limits }
    }

    /// Counts a connection of this peer: `None`, it has so many that it is not even told. True: it is only told.
    pub(crate) fn connected(&self, address: SocketAddr) -> Option<(Open, bool)> {
        let ip = address.ip().to_canonical();
        let limits = self.limits_of(ip, self.tls.is_some());
        let key = PeerKey::new(ip, None);
        let (rate, now) = (limits.registrations_per_second, self.clock.now());
        let open = |max| self.peers.open(&key, Kind::Connection, max, rate, now);
        // A handshake costs a signature, so new ones are limited as open ones are.
        let found = if self.peers.may_connect(&key, limits.connections, rate, now) {
            let within = open(limits.connections).map(|open| (open, false));
            within.or_else(|| open(limits.connections.saturating_add(TOLD_MAX)).map(|open| (open, true)))
        } else {
            None
        };
        if found.is_none() {
            let message = "it has, or makes, too many connections: this one was closed";
            self.refuse_peer(address, &Refusal::new(Reason::Connections, message));
        }
        found
    }

    /// Counts and logs the refusal of someone who has not got as far as a call.
    pub(crate) fn refuse_peer(&self, address: SocketAddr, refusal: &Refusal) {
        let ip = address.ip().to_canonical();
        let limits = self.limits_of(ip, self.tls.is_some());
        self.note(&PeerKey::new(ip, None), limits, ip, None, refusal);
    }

    /// What a verified certificate makes of its holder.
    pub(crate) fn know(&self, certificate: Certificate) -> Known {
        let matches = |rule: &PeerRule| certificate.names.iter().find(|name| rule.san.matches(name));
        let places = self.rules.iter().enumerate().filter(|(_, rule)| matches(rule).is_some());
        let rules: Vec<usize> = places.map(|(place, _)| place).collect();
        let owner = rules.first().and_then(|first| matches(&self.rules[*first]));
        let owner = owner.map(|name| Owner::new(&name.to_string()));
        Known { certificate, owner, rules }
    }

    /// Who calls, if it has this role. Else what it is told, and whether only after a while: it comes too often.
    pub(crate) fn admit(
        &self,
        peer: &Peer,
        shown: Option<&[u8]>,
        role: Role,
    ) -> Result<Caller, (Status, bool)> {
        let ip = peer.address.ip().to_canonical();
        let limits = self.limits_of(ip, peer.is_encrypted);
        let unknown = PeerKey::new(ip, None);
        let identified = self.identify(peer, shown).map_err(|refusal| (unknown, None, refusal));
        let admitted = identified.and_then(|identity| {
            let (owner, key) = (identity.owner(), PeerKey::new(ip, identity.owner()));
            let mut caller = Caller { ip, identity, key, limits, is_admin: false };
            caller.is_admin = caller.is_known() && self.has_role(&caller, Role::Admin).is_ok();
            let has = if caller.is_admin { Ok(()) } else { self.has_role(&caller, role) };
            has.map_err(|refusal| (caller.key.clone(), owner, refusal)).map(|()| caller)
        });
        admitted.map_err(|(key, owner, refusal)| {
            self.note(&key, limits, ip, owner.as_ref(), &refusal);
            let rate = limits.registrations_per_second;
            (refusal.status(), !self.peers.may_register(&key, rate, self.clock.now()))
        })
    }

    fn identify(&self, peer: &Peer, shown: Option<&[u8]>) -> Result<Identity, Refusal> {
        if peer.is_crowd {
            let message = "too many connections from this address: close some, then connect anew";
            return Err(Refusal::new(Reason::Connections, message));
        }
        match (shown, &peer.known) {
            (Some(shown), _) => {
                let token = std::str::from_utf8(shown).ok().and_then(|text| text.strip_prefix("Bearer "));
                let verified = token.ok_or(TokenError::Unknown).and_then(|token| self.tokens().verify(token));
                verified.map(Identity::Token).map_err(refused_token)
            }
            (None, Some(known)) if known.rules.is_empty() => Err(Refusal::new(
                Reason::UnknownIdentity,
                format!("no [[control.peer]] of the balancer is for {}", names(&known.certificate)),
            )),
            (None, Some(known)) => Ok(Identity::Certificate(Arc::clone(known))),
            (None, None) if peer.is_encrypted => Err(Refusal::new(
                Reason::NoCredentials,
                "the balancer wants to know who this is: show a certificate (--cert, --key) or a token (--token-file)",
            )),
            (None, None) => Ok(Identity::Anyone),
        }
    }

    fn has_role(&self, caller: &Caller, role: Role) -> Result<(), Refusal> {
        let has = match &caller.identity {
            Identity::Anyone => true,
            Identity::Certificate(known) => known.rules.iter().any(|place| self.rules[*place].role == role),
            Identity::Token(token) => {
                if role == Role::Admin && token.is_expired(SystemTime::now()) {
                    return Err(refused_token(TokenError::Expired));
                }
                token.record.role == role
            }
        };
        if has {
            return Ok(());
        }
        let needed =
            format!("{} has not the role \"{}\", which this needs", name(&caller.identity), role.name());
        Err(Refusal::new(Reason::Role, needed))
    }

    /// Whether the caller may register now, as far as its rate goes. A refusal waits a little.
    pub(crate) async fn may_register_now(&self, caller: &Caller) -> Result<(), Status> {
        let rate = caller.limits.registrations_per_second;
        if self.peers.may_register(&caller.key, rate, self.clock.now()) {
            return Ok(());
        }
        let message = format!("more than {rate} registrations a second from this peer: try again later");
        let status = self.refuse(caller, &Refusal::new(Reason::RegistrationRate, message));
        tokio::time::sleep(PENALTY).await;
        Err(status)
    }

    /// Whether the caller may register this. A token's use is counted by it.
    ///
    /// # Errors
    /// What it is told.
    pub(crate) fn may_register(
        &self,
        caller: &Caller,
        registration: &Registration,
        registry: &Registry,
    ) -> Result<Joining<'_>, Status> {
        // The registry looks again under its lock; what is said of a resource beside it is not another's to say either.
        if let Some(owner) = other_owner(caller, registration.id(), registry) {
            let id = registration.id();
            let message =
                format!("resource {id} is registered by {owner}: nobody else may register under its id");
            return Err(self.refuse(caller, &Refusal::new(Reason::Id, message)));
        }
        let allowed = match &caller.identity {
            Identity::Anyone => self.anyone_may_register(caller, registration).map(|()| None),
            Identity::Certificate(known) => self.rules_allow(known, caller.ip, registration).map(|()| None),
            Identity::Token(token) => self.token_allows(token, caller.ip, registration, registry),
        };
        let (token, owner) = match allowed {
            Ok(token) => (token, caller.owner()),
            // In nobody's name: the resource's own agent takes it over when it comes.
            Err(_) if caller.is_admin => (None, None),
            Err(refusal) => return Err(self.refuse(caller, &refusal)),
        };
        let used = token.map(|token| (token.record.id.clone(), registration.id().clone()));
        Ok(Joining { security: self, owner, used })
    }

    fn anyone_may_register(&self, caller: &Caller, registration: &Registration) -> Result<(), Refusal> {
        let address = registration.address().ip();
        if caller.ip.is_loopback() || is_own_or_allowed(caller.ip, address, &self.addresses) {
            return Ok(());
        }
        Err(other_address(caller.ip, address, "control.addresses"))
    }

    fn rules_allow(&self, known: &Known, from: IpAddr, registration: &Registration) -> Result<(), Refusal> {
        let who = names(&known.certificate);
        let rules = known.rules.iter().map(|place| &self.rules[*place]);
        let of_pool: Vec<&PeerRule> = rules.filter(|rule| rule.pools.contains(registration.pool())).collect();
        if of_pool.is_empty() {
            let message = format!("{who} may not join the pool {}", registration.pool());
            return Err(Refusal::new(Reason::Pool, message));
        }
        let of_id: Vec<_> = of_pool.into_iter().filter(|rule| rule.has_id(registration.id())).collect();
        if of_id.is_empty() {
            let message = format!("{who} may not have the id {}", registration.id());
            return Err(Refusal::new(Reason::Id, message));
        }
        let address = registration.address().ip();
        let allowed = |nets: &[IpNet]| is_own_or_allowed(from, address, nets);
        if allowed(&self.addresses) || of_id.iter().any(|rule| allowed(&rule.addresses)) {
            return Ok(());
        }
        Err(other_address(from, address, "its [[control.peer]]"))
    }

    /// Gives the token if its use was counted now.
    fn token_allows<'t>(
        &self,
        token: &'t Verified,
        from: IpAddr,
        registration: &Registration,
        registry: &Registry,
    ) -> Result<Option<&'t Verified>, Refusal> {
        let record = &token.record;
        if !record.pools.contains(registration.pool()) {
            let message = format!("the token {} is not for the pool {}", record.id, registration.pool());
            return Err(Refusal::new(Reason::Pool, message));
        }
        let address = registration.address().ip();
        if !record.has_address(from, address) && !is_own_or_allowed(from, address, &self.addresses) {
            return Err(other_address(from, address, "the token"));
        }
        let now = SystemTime::now();
        // What is here by this token stays here when its time is over.
        if token.is_expired(now) && registry.owner(registration.id()) == Some(Some(record.id.owner())) {
            return Ok(None);
        }
        let counted = self.tokens().join(&record.id, registration.id(), now).map_err(refused_token)?;
        Ok(counted.then_some(token))
    }

    /// Whether the caller may report for this resource: it is its own, or nobody's.
    pub(crate) fn may_report(
        &self,
        caller: &Caller,
        id: &ResourceId,
        registry: &Registry,
    ) -> Result<(), Status> {
        let Some(owner) = other_owner(caller, id, registry) else { return Ok(()) };
        let message = format!("resource {id} is registered by {owner}: nobody else may report for it");
        Err(self.refuse(caller, &Refusal::new(Reason::Id, message)))
    }

    /// Whether what the caller showed when it came still holds. One whose certificate ends may come back with the next.
    pub(crate) fn still_holds(&self, caller: &Caller) -> Result<(), Status> {
        match &caller.identity {
            Identity::Token(token) if token.is_revoked() => {
                Err(self.refuse(caller, &refused_token(TokenError::Revoked)))
            }
            Identity::Certificate(known) if known.certificate.not_after < unix_seconds(SystemTime::now()) => {
                let refusal =
                    Refusal::new(Reason::CertificateExpired, "the certificate has expired meanwhile");
                self.refuse(caller, &refusal);
                Err(Status::unavailable(
                    "the certificate has expired meanwhile: connect anew with the next one",
                ))
            }
            _ => Ok(()),
        }
    }

    /// Counts a stream of reports.
    pub(crate) fn stream(&self, caller: &Caller) -> Result<Open, Status> {
        let max = caller.limits.streams;
        let (rate, now) = (caller.limits.registrations_per_second, self.clock.now());
        self.peers.open(&caller.key, Kind::Stream, max, rate, now).ok_or_else(|| {
            let message = format!("this peer has {max} streams of reports, as many as it may");
            self.refuse(caller, &Refusal::new(Reason::Streams, message))
        })
    }

    /// Counts and logs a refusal, and says it to the caller.
    pub(crate) fn refuse(&self, caller: &Caller, refusal: &Refusal) -> Status {
        let owner = caller.owner();
        self.note(&caller.key, caller.limits, caller.ip, owner.as_ref(), refusal);
        refusal.status()
    }

    fn note(&self, key: &PeerKey, limits: PeerLimits, ip: IpAddr, who: Option<&Owner>, refusal: &Refusal) {
        self.refusals.count(refusal.reason);
        let worth = self.peers.is_worth_a_line(
            key,
            limits.registrations_per_second,
            refusal.reason,
            self.clock.now(),
        );
        if let Some(unlogged) = worth {
            let who = who.map_or("unknown", Owner::as_str);
            let (reason, why) = (refusal.reason.name(), refusal.message.as_str());
            tracing::warn!(peer = %ip, who, reason, why, unlogged, "refused");
        }
    }
}

/// A registration that is allowed and not made yet.
pub(crate) struct Joining<'a> {
    security: &'a Security,
    owner: Option<Owner>,
    /// The use of a token that was counted for it.
    used: Option<(TokenId, ResourceId)>,
}

impl Joining<'_> {
    /// Whose it will be.
    pub(crate) fn owner(&self) -> Option<Owner> {
        self.owner.clone()
    }

    /// The use of a token that was counted for it, by this resource.
    pub(crate) fn used(&self) -> Option<(&TokenId, &ResourceId)> {
        self.used.as_ref().map(|(token, resource)| (token, resource))
    }

    /// It was made.
    pub(crate) fn joined(mut self) {
        if let Some((token, resource)) = self.used.take() {
            self.security.tokens().joined(&token, &resource);
        }
    }
}

impl Drop for Joining<'_> {
    fn drop(&mut self) {
        if let Some((token, resource)) = self.used.take() {
            self.security.tokens().unjoin(&token, &resource);
        }
    }
}

/// Who called, as the [`Guard`] before the service found.
pub(crate) fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::internal("the call came past the check of who makes it"))
}

/// Whose a resource is, if it is somebody's and not the caller's.
fn other_owner(caller: &Caller, id: &ResourceId, registry: &Registry) -> Option<Owner> {
    registry.owner(id).flatten().filter(|owner| Some(owner) != caller.owner().as_ref())
}

fn refused_token(error: TokenError) -> Refusal {
    let reason = match error {
        TokenError::Unknown => Reason::Token,
        TokenError::Revoked => Reason::TokenRevoked,
        TokenError::Expired => Reason::TokenExpired,
        TokenError::UsedUp => Reason::TokenUsedUp,
    };
    Refusal::new(reason, error.to_string())
}

fn other_address(from: IpAddr, address: IpAddr, allowed_by: &str) -> Refusal {
    let message = format!(
        "the address {address} is not this peer's, which connects from {from}, and {allowed_by} does not allow it"
    );
    Refusal::new(Reason::Address, message)
}

fn names(certificate: &Certificate) -> String {
    let all: Vec<String> = certificate.names.iter().take(4).map(ToString::to_string).collect();
    if all.is_empty() { "a certificate without a DNS name or a URI".to_owned() } else { all.join(", ") }
}

fn name(identity: &Identity) -> String {
    match identity {
        Identity::Anyone => "anyone".to_owned(),
        Identity::Certificate(known) => names(&known.certificate),
        Identity::Token(token) => format!("the token {}", token.record.id),
    }
}

fn unix_seconds(now: SystemTime) -> i64 {
    let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
