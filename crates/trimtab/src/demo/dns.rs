//! The demo's DNS server: the primary of one zone, in memory, which takes updates that are signed (RFC 2136, RFC 8945).
//!
//! Owns: what an update needs and does here. Does not own: sockets, messages and look-ups, which are hickory-server's. Its
//! own updates come with SQLite of a version that cannot be linked beside the one that the registry's store has.
//! The serial number of the zone stands still: there is no secondary to tell.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use discovery::TsigKey;
use hickory_server::Server;
use hickory_server::dnssec::NxProofKind;
use hickory_server::net::runtime::TokioRuntimeProvider;
use hickory_server::proto::op::ResponseCode;
use hickory_server::proto::rr::rdata::{A, NS, SOA};
use hickory_server::proto::rr::{
    DNSClass, LowerName, Name, RData, Record, RecordSet, RecordType, RrKey, TSigResponseContext,
};
use hickory_server::server::{Request, RequestInfo};
use hickory_server::store::in_memory::InMemoryZoneHandler;
use hickory_server::zone_handler::{
    AuthLookup, AxfrPolicy, Catalog, LookupControlFlow, LookupOptions, Nsec3QueryInfo, UpdateRequest as _,
    ZoneHandler, ZoneType,
};
use tokio::net::{TcpListener, UdpSocket};

use crate::failure::Failure;

/// The demo's zone.
pub(super) const ZONE: &str = "demo.test";
/// What has not changed for so long may have.
const TTL_S: u32 = 60;
/// How long "there is none" holds: agents that start first find the balancer soon.
const NEGATIVE_TTL_S: u32 = 1;
/// A connection that asks nothing for so long is closed.
const TCP_TIMEOUT: Duration = Duration::from_secs(5);
/// Answers that wait for a connection to take them.
const ANSWERS_WAITING_MAX: usize = 8;
/// Sets of records that the zone may have.
const SETS_MAX: usize = 1000;

type Sets = BTreeMap<RrKey, Arc<RecordSet>>;

/// Serves the zone at `address`, for as long as this process runs.
pub(super) fn start(address: SocketAddr, key: &TsigKey) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        Failure::start(format!("the demo's DNS server cannot be started at {address}: {error}"))
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| failed(&error))?;
    let sockets = runtime.block_on(async {
        Ok::<_, std::io::Error>((UdpSocket::bind(address).await?, TcpListener::bind(address).await?))
    });
    let (udp, tcp) = sockets.map_err(|error| failed(&error))?;
    let zone = Zone::new(address, key.clone()).map_err(|error| failed(&error))?;
    let serve = move || {
        runtime.block_on(async {
            let mut catalog = Catalog::new();
            catalog.upsert(zone.origin().clone(), vec![Arc::new(zone)]);
            let mut server = Server::new(catalog);
            server.register_socket(udp);
            server.register_listener(tcp, TCP_TIMEOUT, ANSWERS_WAITING_MAX);
            if let Err(error) = server.block_until_done().await {
                tracing::warn!("the demo's DNS server ended: {error}");
            }
        });
    };
    thread::Builder::new().name("dns".into()).spawn(serve).map_err(|error| failed(&error))?;
    Ok(())
}

/// The zone: hickory's, and updates.
struct Zone {
    records: InMemoryZoneHandler<TokioRuntimeProvider>,
    key: TsigKey,
}

impl Zone {
    fn new(address: SocketAddr, key: TsigKey) -> Result<Self, Box<dyn std::error::Error>> {
        let origin = Name::from_ascii(format!("{ZONE}."))?;
        let host = Name::from_ascii("ns")?.append_domain(&origin)?;
        let mail = Name::from_ascii("hostmaster")?.append_domain(&origin)?;
        let mut records =
            InMemoryZoneHandler::empty(origin.clone(), ZoneType::Primary, AxfrPolicy::Deny, None);
        let soa = SOA::new(host.clone(), mail, 1, 3600, 600, 86_400, NEGATIVE_TTL_S);
        let mut first = vec![
            Record::from_rdata(origin.clone(), NEGATIVE_TTL_S, RData::SOA(soa)),
            Record::from_rdata(origin, TTL_S, RData::NS(NS(host.clone()))),
        ];
        if let std::net::IpAddr::V4(v4) = address.ip() {
            first.push(Record::from_rdata(host, TTL_S, RData::A(A(v4))));
        }
        for record in first {
            records.upsert_mut(record, 1);
        }
        Ok(Self { records, key })
    }

    /// Who asks, as far as the signature says (RFC 8945, section 5.2), and what the answer is signed with.
    fn authorize(
        &self,
        request: &Request,
        now: u64,
    ) -> (Result<(), ResponseCode>, Option<TSigResponseContext>) {
        let Some(signature) = request.signature() else { return (Err(ResponseCode::Refused), None) };
        let (id, signer) = (request.metadata.id, self.key.signer());
        if signature.name != *signer.signer_name() || signature.data.algorithm != *signer.algorithm() {
            let context = TSigResponseContext::unknown_key(id, now, signature.name.clone());
            return (Err(ResponseCode::NotAuth), Some(context));
        }
        let Ok((mac, _, range)) = signer.verify_message_byte(request.as_slice(), None, true) else {
            let context = TSigResponseContext::bad_signature(id, now, signer.clone());
            return (Err(ResponseCode::NotAuth), Some(context));
        };
        let is_in_time = range.contains(&now);
        let context = TSigResponseContext::new(id, now, signer.clone(), mac, None);
        (if is_in_time { Ok(()) } else { Err(ResponseCode::NotAuth) }, Some(context))
    }
}

/// Whether all is as the update needs it (RFC 2136, section 3.2).
fn check(sets: &Sets, prerequisites: &[Record], origin: &LowerName) -> Result<(), ResponseCode> {
    let mut must_be: BTreeMap<RrKey, Vec<&Record>> = BTreeMap::new();
    for record in prerequisites {
        let name = LowerName::from(&record.name);
        if !origin.zone_of(&name) {
            return Err(ResponseCode::NotZone);
        }
        let kind = record.record_type();
        let has_name = || sets.keys().any(|key| key.name == name);
        let key = RrKey::new(name.clone(), kind);
        match (record.dns_class, kind) {
            (DNSClass::ANY, RecordType::ANY) if !has_name() => return Err(ResponseCode::NXDomain),
            (DNSClass::NONE, RecordType::ANY) if has_name() => return Err(ResponseCode::YXDomain),
            (DNSClass::ANY | DNSClass::NONE, RecordType::ANY) => {}
            (DNSClass::ANY, _) if !sets.contains_key(&key) => return Err(ResponseCode::NXRRSet),
            (DNSClass::NONE, _) if sets.contains_key(&key) => return Err(ResponseCode::YXRRSet),
            (DNSClass::ANY | DNSClass::NONE, _) => {}
            (DNSClass::IN, _) => must_be.entry(key).or_default().push(record),
            _ => return Err(ResponseCode::FormErr),
        }
    }
    for (key, wanted) in must_be {
        let there: Vec<&Record> =
            sets.get(&key).map(|set| set.records_without_rrsigs().collect()).unwrap_or_default();
        let is_in = |one: &Record, all: &[&Record]| all.iter().any(|other| other.data == one.data);
        if !there.iter().all(|one| is_in(one, &wanted)) || !wanted.iter().all(|one| is_in(one, &there)) {
            return Err(ResponseCode::NXRRSet);
        }
    }
    Ok(())
}

/// Whether the update is one for this zone (RFC 2136, section 3.4.1): all of it, before any of it is done.
fn scan(updates: &[Record], origin: &LowerName, sets: usize) -> Result<(), ResponseCode> {
    for record in updates {
        if !origin.zone_of(&LowerName::from(&record.name)) {
            return Err(ResponseCode::NotZone);
        }
        // What the zone itself stands on is not for others to change here.
        let is_base = matches!(record.record_type(), RecordType::SOA | RecordType::NS);
        if is_base || !matches!(record.dns_class, DNSClass::IN | DNSClass::ANY | DNSClass::NONE) {
            return Err(ResponseCode::Refused);
        }
    }
    if sets + updates.len() > SETS_MAX { Err(ResponseCode::Refused) } else { Ok(()) }
}

/// Does what the update says (RFC 2136, section 3.4.2). Whether anything changed.
fn apply(sets: &mut Sets, updates: &[Record], origin: &LowerName) -> bool {
    let mut changed = false;
    for record in updates {
        let (name, kind) = (LowerName::from(&record.name), record.record_type());
        let key = RrKey::new(name.clone(), kind);
        match record.dns_class {
            DNSClass::ANY => {
                let before = sets.len();
                sets.retain(|key, _| {
                    let is_base =
                        key.name == *origin && matches!(key.record_type, RecordType::SOA | RecordType::NS);
                    is_base || key.name != name || (kind != RecordType::ANY && key.record_type != kind)
                });
                changed |= sets.len() != before;
            }
            DNSClass::NONE => {
                if let Some(set) = sets.get_mut(&key) {
                    changed |= Arc::make_mut(set).remove(record, 1);
                    if set.is_empty() {
                        sets.remove(&key);
                    }
                }
            }
            _ => {
                let new = || Arc::new(RecordSet::new(record.name.clone(), kind, 1));
                changed |= Arc::make_mut(sets.entry(key).or_insert_with(new)).insert(record.clone(), 1);
            }
        }
    }
    changed
}

#[tonic::async_trait]
impl ZoneHandler for Zone {
    async fn update(
        &self,
        request: &Request,
        now: u64,
    ) -> (Result<bool, ResponseCode>, Option<TSigResponseContext>) {
        let (authorized, context) = self.authorize(request, now);
        let origin = self.records.origin();
        let mut sets = self.records.records_mut().await;
        let done = authorized
            .and_then(|()| check(&sets, request.prerequisites(), origin))
            .and_then(|()| scan(request.updates(), origin, sets.len()))
            .map(|()| apply(&mut sets, request.updates(), origin));
        (done, context)
    }

    fn zone_type(&self) -> ZoneType {
        self.records.zone_type()
    }

    fn axfr_policy(&self) -> AxfrPolicy {
        self.records.axfr_policy()
    }

    fn origin(&self) -> &LowerName {
        self.records.origin()
    }

    async fn lookup(
        &self,
        name: &LowerName,
        kind: RecordType,
        info: Option<&RequestInfo<'_>>,
        options: LookupOptions,
    ) -> LookupControlFlow<AuthLookup> {
        self.records.lookup(name, kind, info, options).await
    }

    async fn search(
        &self,
        request: &Request,
        options: LookupOptions,
    ) -> (LookupControlFlow<AuthLookup>, Option<TSigResponseContext>) {
        self.records.search(request, options).await
    }

    async fn nsec_records(&self, name: &LowerName, options: LookupOptions) -> LookupControlFlow<AuthLookup> {
        self.records.nsec_records(name, options).await
    }

    async fn nsec3_records(
        &self,
        info: Nsec3QueryInfo<'_>,
        options: LookupOptions,
    ) -> LookupControlFlow<AuthLookup> {
        self.records.nsec3_records(info, options).await
    }

    fn nx_proof_kind(&self) -> Option<&NxProofKind> {
        self.records.nx_proof_kind()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(class: DNSClass, name: &str, data: RData) -> Record {
        let mut record = Record::from_rdata(Name::from_ascii(format!("{name}.{ZONE}.")).unwrap(), 0, data);
        record.dns_class = class;
        record
    }

    fn a(last: u8) -> RData {
        RData::A(A([127, 0, 0, last].into()))
    }

    #[test]
    fn an_update_needs_what_it_says_and_does_what_it_says() {
        let origin = LowerName::from(Name::from_ascii(format!("{ZONE}.")).unwrap());
        let mut sets = Sets::new();
        let any = || RData::Update0(RecordType::ANY);
        let is_free = [record(DNSClass::NONE, "lb1", any())];
        assert_eq!(check(&sets, &is_free, &origin), Ok(()));
        assert!(apply(
            &mut sets,
            &[record(DNSClass::IN, "lb1", a(1)), record(DNSClass::IN, "lb1", a(2))],
            &origin
        ));
        assert!(!apply(&mut sets, &[record(DNSClass::IN, "LB1", a(1))], &origin), "it is there");
        assert_eq!(check(&sets, &is_free, &origin), Err(ResponseCode::YXDomain));

        // All of a set, or none.
        let [one, two, three] = [1, 2, 3].map(|last| record(DNSClass::IN, "lb1", a(last)));
        assert_eq!(check(&sets, &[one.clone(), two.clone()], &origin), Ok(()));
        assert_eq!(check(&sets, std::slice::from_ref(&one), &origin), Err(ResponseCode::NXRRSet));
        assert_eq!(check(&sets, &[one, two, three], &origin), Err(ResponseCode::NXRRSet));

        // One of a set, and then all of a name.
        assert!(apply(&mut sets, &[record(DNSClass::NONE, "lb1", a(1))], &origin));
        assert_eq!(check(&sets, &[record(DNSClass::IN, "lb1", a(2))], &origin), Ok(()));
        assert!(apply(&mut sets, &[record(DNSClass::ANY, "lb1", any())], &origin));
        assert!(sets.is_empty());

        let elsewhere = Record::from_rdata(Name::from_ascii("lb1.example.com.").unwrap(), 0, a(1));
        assert_eq!(check(&sets, std::slice::from_ref(&elsewhere), &origin), Err(ResponseCode::NotZone));
        assert_eq!(scan(&[elsewhere], &origin, 0), Err(ResponseCode::NotZone));
        assert_eq!(scan(&is_free, &origin, SETS_MAX), Err(ResponseCode::Refused));
    }
}
