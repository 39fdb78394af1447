//! What a balancer wants to stand in a zone, and the updates that make it so (RFC 2136).
//!
//! ```text
//! lb1.example.com.           TXT   "heritage=trimtab,owner=3f0c…"    whose name this is
//! lb1.example.com.           A     10.0.0.9
//! _trimtab._tcp.example.com. SRV   10 100 7400 lb1.example.com.       one of maybe several, each a balancer's own
//! ```
//!
//! Every update says first what must be so for it to be done at all, and the server does all of it or nothing. So two
//! balancers, or a balancer and a person, never overwrite each other:
//!
//! ```text
//!            all is as we left it       the name is free             the TXT is ours
//! Refresh ------- no ------------> Claim ------ no -------> Replace ------- no ------> somebody else's
//!    | yes                           | yes                     | yes
//!    v                               v                         v
//!  done                            done                       done
//! ```
//!
//! Of an SRV name only our own record is added or deleted, never the whole set.
//! Pure: no clock, no sockets, no randomness.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode, UpdateMessage as _};
use hickory_proto::rr::rdata::{A, AAAA, SRV, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::name::{Domain, NameError, ServiceName, shown};

/// Who a balancer is, across its restarts: what the TXT record beside its addresses says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner(String);

impl Owner {
    /// From a text of the operator's choice: 1 to 100 letters, digits and `._:/-`.
    pub fn parse(text: &str) -> Option<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._:/-".contains(c);
        ((1..=100).contains(&text.len()) && text.chars().all(plain)).then(|| Self(text.to_owned()))
    }

    /// From a text that is one.
    pub(crate) fn made(text: String) -> Self {
        Self(text)
    }

    fn text(&self) -> String {
        // As external-dns marks what is its own, so that people who know one know the other.
        format!("heritage=trimtab,owner={}", self.0)
    }
}

/// An SRV record's own part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// The service.
    pub service: ServiceName,
    /// The lowest is used first (RFC 2782).
    pub priority: u16,
    /// Share among those of the same priority (RFC 2782).
    pub weight: u16,
    /// The port at the host.
    pub port: u16,
}

/// A host name of ours, its addresses, and the services that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) name: Name,
    pub(crate) addresses: BTreeSet<IpAddr>,
    pub(crate) services: Vec<(Name, Service)>,
}

impl Host {
    pub(crate) fn new(name: Name, zone: &Domain, services: &[Service]) -> Result<Self, NameError> {
        let within = |service: &Service| Ok((service.service.within(zone)?, service.clone()));
        let services = services.iter().map(within).collect::<Result<_, NameError>>()?;
        Ok(Self { name, addresses: BTreeSet::new(), services })
    }
}

/// Which update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// All of ours is there as we left it: adds the SRV records, which changes nothing if they are there.
    Refresh,
    /// Nobody has the name: takes it.
    Claim,
    /// The name is ours: puts what we want in place of what we had.
    Replace,
}

/// What follows from an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    Done,
    Try(Step),
    /// Somebody else has the name.
    Owned,
    /// The answer is no answer to that: see its code.
    Failed,
}

impl Step {
    pub(crate) fn next(self, answer: ResponseCode) -> Next {
        // Servers differ in which of the two they say when a set that must exist is not there at all.
        let is_absent = matches!(answer, ResponseCode::NXRRSet | ResponseCode::NXDomain);
        match (self, answer) {
            (_, ResponseCode::NoError) => Next::Done,
            (Self::Refresh, _) if is_absent => Next::Try(Self::Claim),
            (Self::Claim, ResponseCode::YXDomain) => Next::Try(Self::Replace),
            (Self::Replace, _) if is_absent => Next::Owned,
            _ => Next::Failed,
        }
    }
}

/// What the updates of one zone have in common.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) zone: Domain,
    pub(crate) owner: Owner,
    pub(crate) ttl: Duration,
}

impl Plan {
    /// The update of this step. `stale` are SRV records that lead to our host and that we do not want any more.
    pub(crate) fn update(&self, id: u16, step: Step, host: &Host, stale: &[Record]) -> Message {
        let mut message = self.message(id);
        match step {
            Step::Refresh => {
                message.add_pre_requisite(self.must_be(&host.name, self.txt()));
                for kind in [RecordType::A, RecordType::AAAA] {
                    let ours: Vec<_> = addresses(host).filter(|data| data.record_type() == kind).collect();
                    if ours.is_empty() {
                        message.add_pre_requisite(unset(&host.name, kind, DNSClass::NONE));
                    }
                    message.add_pre_requisites(ours.into_iter().map(|data| self.must_be(&host.name, data)));
                }
            }
            Step::Claim => {
                message.add_pre_requisite(unset(&host.name, RecordType::ANY, DNSClass::NONE));
                message.add_update(self.record(&host.name, self.txt()));
                message.add_updates(addresses(host).map(|data| self.record(&host.name, data)));
            }
            Step::Replace => {
                message.add_pre_requisite(self.must_be(&host.name, self.txt()));
                for kind in [RecordType::A, RecordType::AAAA] {
                    message.add_update(unset(&host.name, kind, DNSClass::ANY));
                }
                message.add_updates(addresses(host).map(|data| self.record(&host.name, data)));
                // Its TTL may have changed.
                message.add_update(self.record(&host.name, self.txt()));
                message.add_updates(stale.iter().map(|record| delete(&record.name, record.data.clone())));
            }
        }
        message.add_updates(srvs(host).map(|(name, data)| self.record(name, data)));
        message
    }

    /// Takes all of a host's away, if it is ours.
    pub(crate) fn withdrawal(&self, id: u16, host: &Host, stale: &[Record]) -> Message {
        let mut message = self.message(id);
        message.add_pre_requisite(self.must_be(&host.name, self.txt()));
        message.add_updates(srvs(host).map(|(name, data)| delete(name, data)));
        message.add_updates(stale.iter().map(|record| delete(&record.name, record.data.clone())));
        message.add_update(unset(&host.name, RecordType::ANY, DNSClass::ANY));
        message
    }

    fn message(&self, id: u16) -> Message {
        let mut message = Message::new(id, MessageType::Query, OpCode::Update);
        message.add_zone(Query::query(self.zone.name().clone(), RecordType::SOA));
        message
    }

    fn txt(&self) -> RData {
        RData::TXT(TXT::new(vec![self.owner.text()]))
    }

    fn record(&self, name: &Name, data: RData) -> Record {
        let ttl_s = u32::try_from(self.ttl.as_secs()).unwrap_or(u32::MAX);
        Record::from_rdata(name.clone(), ttl_s, data)
    }

    /// A prerequisite: the set at `name` of this kind is made of this and its like (RFC 2136, section 2.4.2).
    fn must_be(&self, name: &Name, data: RData) -> Record {
        Record::from_rdata(name.clone(), 0, data)
    }
}

/// A question for all records of one kind at a name.
pub(crate) fn question(id: u16, name: &Name, kind: RecordType) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = false;
    message.add_query(Query::query(name.clone(), kind));
    message
}

/// SRV records among `answers` that lead to `host`, and that it does not have (any more).
pub(crate) fn stale(host: &Host, answers: &[Record]) -> Vec<Record> {
    let wanted: Vec<_> = srvs(host).collect();
    let leads_here = |record: &&Record| match &record.data {
        RData::SRV(srv) => {
            srv.target == host.name
                && !wanted.iter().any(|(name, data)| **name == record.name && *data == record.data)
        }
        _ => false,
    };
    answers.iter().filter(leads_here).cloned().collect()
}

/// Whose a name is, as far as its records say.
pub(crate) fn owner_in(answers: &[Record]) -> Option<String> {
    answers.iter().find_map(|record| {
        let RData::TXT(txt) = &record.data else { return None };
        let text: Vec<u8> = txt.txt_data.iter().flat_map(|part| part.iter().copied()).collect();
        let text = String::from_utf8(text).ok()?;
        Some(text.strip_prefix("heritage=trimtab,owner=")?.chars().take(100).collect())
    })
}

fn addresses(host: &Host) -> impl Iterator<Item = RData> {
    host.addresses.iter().map(|address| match address {
        IpAddr::V4(v4) => RData::A(A(*v4)),
        IpAddr::V6(v6) => RData::AAAA(AAAA(*v6)),
    })
}

fn srvs(host: &Host) -> impl Iterator<Item = (&Name, RData)> {
    host.services.iter().map(|(name, service)| {
        let Service { priority, weight, port, .. } = *service;
        (name, RData::SRV(SRV::new(priority, weight, port, host.name.clone())))
    })
}

/// A record without data: what it means depends on its class and where it stands (RFC 2136, sections 2.4 and 2.5).
fn unset(name: &Name, kind: RecordType, class: DNSClass) -> Record {
    let mut record = Record::update0(name.clone(), 0, kind).into_record_of_rdata();
    record.dns_class = class;
    record
}

/// Deletes one record of a set (RFC 2136, section 2.5.4).
fn delete(name: &Name, data: RData) -> Record {
    let mut record = Record::from_rdata(name.clone(), 0, data);
    record.dns_class = DNSClass::NONE;
    record
}

/// One line for each thing an update needs and does, as `nsupdate` has them: for tests and the log.
pub(crate) fn lines(message: &Message) -> Vec<String> {
    let data = |record: &Record| match &record.data {
        RData::Update0(_) => String::new(),
        data => format!(" {data}"),
    };
    let prerequisites = message.prerequisites().iter().map(|record| {
        let what = match (record.dns_class, record.record_type()) {
            (DNSClass::NONE, RecordType::ANY) => "nxdomain".to_owned(),
            (DNSClass::NONE, kind) => format!("nxrrset {kind}"),
            (_, kind) => format!("yxrrset {kind}"),
        };
        format!("prereq {what} {}{}", shown(&record.name), data(record))
    });
    let updates = message.updates().iter().map(|record| {
        let (name, kind) = (shown(&record.name), record.record_type());
        match record.dns_class {
            DNSClass::IN => format!("add {name} {} {kind}{}", record.ttl, data(record)),
            _ => format!("delete {name} {kind}{}", data(record)),
        }
    });
    prerequisites.chain(updates).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> (Plan, Host) {
        let zone: Domain = "example.com".parse().unwrap();
        let service =
            |name: &str, port| Service { service: name.parse().unwrap(), priority: 10, weight: 100, port };
        let services = [service("_trimtab._tcp", 7400), service("_postgresql._tcp", 5432)];
        let mut host = Host::new(Name::from_ascii("lb1.example.com.").unwrap(), &zone, &services).unwrap();
        host.addresses = ["10.0.0.9", "10.0.0.10"].map(|text| text.parse().unwrap()).into();
        let owner = Owner::parse("me").unwrap();
        (Plan { zone, owner, ttl: Duration::from_secs(10) }, host)
    }

    const TXT_DATA: &str = "heritage=trimtab,owner=me";

    #[test]
    fn updates_say_what_must_be_so_and_never_touch_a_whole_set_of_srv() {
        let (plan, host) = plan();
        let text = |step| lines(&plan.update(1, step, &host, &[])).join("\n");
        let srv = "add _trimtab._tcp.example.com 10 SRV 10 100 7400 lb1.example.com.\n\
                   add _postgresql._tcp.example.com 10 SRV 10 100 5432 lb1.example.com.";
        assert_eq!(
            text(Step::Claim),
            format!(
                "prereq nxdomain lb1.example.com\nadd lb1.example.com 10 TXT {TXT_DATA}\n\
                 add lb1.example.com 10 A 10.0.0.9\nadd lb1.example.com 10 A 10.0.0.10\n{srv}"
            )
        );
        assert_eq!(
            text(Step::Refresh),
            format!(
                "prereq yxrrset TXT lb1.example.com {TXT_DATA}\nprereq yxrrset A lb1.example.com 10.0.0.9\n\
                 prereq yxrrset A lb1.example.com 10.0.0.10\nprereq nxrrset AAAA lb1.example.com\n{srv}"
            )
        );
        assert_eq!(
            text(Step::Replace),
            format!(
                "prereq yxrrset TXT lb1.example.com {TXT_DATA}\ndelete lb1.example.com A\n\
                 delete lb1.example.com AAAA\nadd lb1.example.com 10 A 10.0.0.9\n\
                 add lb1.example.com 10 A 10.0.0.10\nadd lb1.example.com 10 TXT {TXT_DATA}\n{srv}"
            )
        );
        assert_eq!(
            lines(&plan.withdrawal(1, &host, &[])).join("\n"),
            format!(
                "prereq yxrrset TXT lb1.example.com {TXT_DATA}\n\
                 delete _trimtab._tcp.example.com SRV 10 100 7400 lb1.example.com.\n\
                 delete _postgresql._tcp.example.com SRV 10 100 5432 lb1.example.com.\ndelete lb1.example.com ANY"
            )
        );
    }

    #[test]
    fn messages_survive_the_wire() {
        let (plan, host) = plan();
        for step in [Step::Refresh, Step::Claim, Step::Replace] {
            let message = plan.update(7, step, &host, &[]);
            let bytes = message.to_vec().unwrap();
            let read = Message::from_vec(&bytes).unwrap();
            assert_eq!((read.metadata.id, read.metadata.op_code), (7, OpCode::Update));
            assert_eq!(lines(&read), lines(&message));
            // With a signature by hmac-sha512 it still goes into a datagram of RFC 1035.
            assert!(bytes.len() + 160 <= 512, "{step:?}: {}", bytes.len());
        }
    }

    #[test]
    fn only_ours_is_stale() {
        let (plan, host) = plan();
        let srv = |priority, port, target: &str| {
            let target = Name::from_ascii(target).unwrap();
            let name = Name::from_ascii("_trimtab._tcp.example.com.").unwrap();
            Record::from_rdata(name, 10, RData::SRV(SRV::new(priority, 100, port, target)))
        };
        let before = srv(20, 7400, "LB1.example.com.");
        let answers = [srv(10, 7400, "lb1.example.com."), before.clone(), srv(20, 7400, "lb2.example.com.")];
        assert_eq!(stale(&host, &answers), [before]);
        let update = lines(&plan.update(1, Step::Replace, &host, &stale(&host, &answers)));
        let deleted = "delete _trimtab._tcp.example.com SRV 20 100 7400 LB1.example.com.";
        assert!(update.iter().any(|line| line == deleted), "{update:?}");
    }

    #[test]
    fn answers_lead_on() {
        use ResponseCode::{NXDomain, NXRRSet, NoError, Refused, YXDomain};
        for (step, answer, next) in [
            (Step::Refresh, NoError, Next::Done),
            (Step::Refresh, NXRRSet, Next::Try(Step::Claim)),
            (Step::Refresh, NXDomain, Next::Try(Step::Claim)),
            (Step::Claim, NoError, Next::Done),
            (Step::Claim, YXDomain, Next::Try(Step::Replace)),
            (Step::Replace, NXRRSet, Next::Owned),
            (Step::Replace, Refused, Next::Failed),
            (Step::Refresh, YXDomain, Next::Failed),
            (Step::Claim, NXDomain, Next::Failed),
        ] {
            assert_eq!(step.next(answer), next, "{step:?} {answer:?}");
        }
    }

    #[test]
    fn owners() {
        let (plan, host) = plan();
        assert_eq!(owner_in(plan.update(1, Step::Claim, &host, &[]).updates()).as_deref(), Some("me"));
        assert_eq!(owner_in(&[]), None);
        for text in ["", "a b", "a\"b", "ä", &"x".repeat(101)] {
            assert_eq!(Owner::parse(text), None, "{text}");
        }
    }
}
