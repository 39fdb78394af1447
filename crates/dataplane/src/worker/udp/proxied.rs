//! The PROXY protocol before datagrams: whose those are that a proxy sends, and what backends are told before each.
//!
//! Owns: taking a header off, for whom a proxy speaks where it says so once, the bytes that go out. Does not own: what a header
//! means (`flow::preface::proxy`), whom to believe (`Sorter`).
//!
//! Invariants:
//!
//! * whoever is not trusted is not read; a header is passed on to nobody as if it were the client's bytes;
//! * a flow's datagrams all have one client: another one that a header names has a flow of its own;
//! * what a header says beside that (its TLVs) goes out before that datagram and those after it.

use std::net::SocketAddr;
use std::sync::Arc;

use flow::preface::proxy::{self, Addresses, Outgoing, Transport, Version};
use flow::udp::{Announced, Speakers, Tuple};
use uring::Part;

use super::clients::Came;
use super::{UdpFlow, Worker, ip_of};
use crate::config::ProxyHeader;
use crate::io::Io;
use crate::stats::Dropped;

/// What a header says.
#[derive(Debug)]
pub(super) struct Told {
    addresses: Addresses,
    tlvs: Box<[u8]>,
}

/// What a backend is sent before each datagram of a flow.
#[derive(Debug)]
pub(super) struct Heading {
    unique_id: String,
    /// Sends that are under way keep theirs when it changes.
    pub(super) bytes: Arc<[u8]>,
}

/// Who the client is: as the proxy in front says, or whoever sends.
pub(super) fn client_of(told: Option<&Told>, peer: SocketAddr) -> SocketAddr {
    told.and_then(|told| told.addresses.source()).unwrap_or(peer)
}

impl Came {
    /// What names its flow, where a header does.
    pub(super) fn announced(&self, tuple: Tuple) -> Option<Announced> {
        match self.told.as_deref()?.addresses {
            Addresses::Inet { source, destination } => Some(Announced::new(tuple, source, destination)),
            Addresses::Own | Addresses::Unix(_) => None,
        }
    }
}

impl<I: Io> Worker<I> {
    /// Takes the header off that a datagram begins with, or finds out who it is of without one. `None`: nothing is to be passed
    /// on, the proxy only said for whom it speaks.
    pub(super) fn take_header(
        &mut self,
        came: &mut Came,
        part: Part,
        proxy: ProxyHeader,
    ) -> Result<Option<Part>, Dropped> {
        let listener = usize::from(came.at.listener);
        if !self.listeners[listener].sorter.as_ref().is_some_and(|sorter| sorter.trusts(came.peer)) {
            return Err(Dropped::ProxyUntrusted);
        }
        let tuple = self.tuple_of(came);
        let header = match proxy::read_datagram(self.ring.bytes(part.buffer, part.start, part.length)) {
            Ok(header) => header,
            Err(error) => {
                tracing::debug!(proxy = %came.peer, %error, "a datagram is dropped for its PROXY header");
                return Err(Dropped::ProxyInvalid);
            }
        };
        let Some(header) = header else {
            let speakers = self.listeners[listener].udp.as_mut().and_then(|udp| udp.speakers.as_mut());
            let said = speakers.and_then(|speakers| speakers.said(&tuple, self.now.timestamp()));
            came.told = Some(said.ok_or(Dropped::ProxyMissing)?);
            return Ok(Some(part));
        };
        let taken = header.length as u32;
        let mut told = Told { addresses: header.addresses.clone(), tlvs: Box::default() };
        // Of a flow that is there, what is known is not copied again.
        let flow = match told.addresses {
            Addresses::Inet { source, destination } => {
                self.udp.flows.find_announced(&Announced::new(tuple, source, destination))
            }
            Addresses::Own | Addresses::Unix(_) => self.udp.flows.find(&tuple),
        };
        let known = flow
            .and_then(|flow| self.udp.flows.get(flow)?.told.as_ref())
            .filter(|known| *known.tlvs == *header.tlv_bytes() && known.addresses == told.addresses);
        let told = match known {
            Some(known) => Arc::clone(known),
            None => {
                told.tlvs = header.tlv_bytes().into();
                Arc::new(told)
            }
        };
        let first = proxy == ProxyHeader::First;
        if first {
            self.remember_speaker(listener, tuple, &told);
        }
        came.told = Some(told);
        // Where each datagram has its header, this is an empty one of the client (RFC 868 asks for the time with one).
        let alone = first && part.length == taken;
        Ok((!alone).then_some(Part { start: part.start + taken, length: part.length - taken, ..part }))
    }

    fn remember_speaker(&mut self, listener: usize, tuple: Tuple, told: &Arc<Told>) {
        let (now, flows_max) = (self.now.timestamp(), self.flows_max as usize);
        let Some(udp) = &mut self.listeners[listener].udp else { return };
        let keep = udp.tuning.idle_timeout;
        let speakers = udp
            .speakers
            .get_or_insert_with(|| Speakers::new(now, super::super::seed(self.worker), keep, flows_max));
        // At the bound, what comes from there without a header is dropped.
        speakers.say(tuple, Arc::clone(told), now);
    }

    /// The name of a flow by its peer alone.
    pub(super) fn tuple_of(&self, came: &Came) -> Tuple {
        let udp = self.listeners[usize::from(came.at.listener)].udp.as_ref();
        let door = udp.map_or(0, |udp| udp.first_door.wrapping_add(came.at.door));
        Tuple::new(door, came.peer, ip_of(came.local))
    }

    /// What the backends of a new flow are sent before each datagram, if they are.
    pub(super) fn heading(&mut self, came: &Came, target: u16) -> Option<Box<Heading>> {
        let listener = &self.listeners[usize::from(came.at.listener)];
        if listener.targets[usize::from(target)].towards.proxy() != Some(Version::V2) {
            return None;
        }
        let unique_id = self.prefaces.unique_id();
        let bytes = self.heading_bytes(came, &unique_id);
        Some(Box::new(Heading { unique_id, bytes }))
    }

    /// A later datagram of a flow says the same client, and something else beside.
    pub(super) fn retold(&mut self, index: u32, came: &Came) {
        let Some(flow) = self.udp.flows.get_mut(index) else { return };
        let changed = match (&flow.told, &came.told) {
            (Some(before), Some(now)) => !Arc::ptr_eq(before, now),
            _ => false,
        };
        if !changed {
            return;
        }
        flow.told.clone_from(&came.told);
        if let Some(mut heading) = flow.heading.take() {
            heading.bytes = self.heading_bytes(came, &heading.unique_id);
            if let Some(flow) = self.udp.flows.get_mut(index) {
                flow.heading = Some(heading);
            }
        }
    }

    fn heading_bytes(&self, came: &Came, unique_id: &str) -> Arc<[u8]> {
        let listener = &self.listeners[usize::from(came.at.listener)];
        let told = came.told.as_deref();
        let own;
        let addresses = match told.map(|told| &told.addresses) {
            Some(told @ (Addresses::Inet { .. } | Addresses::Unix(_))) => told,
            _ => {
                let bound = listener.udp.as_ref().map_or_else(|| came.peer.ip(), |udp| udp.bound);
                let asked = ip_of(came.local).unwrap_or(bound);
                let port = listener.doors[usize::from(came.at.door)].port;
                own = Addresses::between(came.peer, SocketAddr::new(asked, port));
                &own
            }
        };
        let header = Outgoing {
            addresses,
            // What carries it: servers drop datagrams that say they are a stream.
            transport: Transport::Datagram,
            passed_on: told.map_or(&[], |told| &told.tlvs),
            authority: None,
            unique_id: Some(unique_id.as_bytes()),
        };
        let mut bytes = Vec::new();
        proxy::write_v2(&header, &mut bytes);
        bytes.into()
    }
}

impl UdpFlow {
    /// Who the client is: as the proxy in front says, or whoever sends.
    pub(super) fn client(&self) -> SocketAddr {
        client_of(self.told.as_deref(), self.peer)
    }

    /// How its datagrams come.
    pub(super) fn came(&self) -> Came {
        let at = super::DoorAt { listener: self.listener, door: self.door };
        Came { at, peer: self.peer, local: self.local, told: self.told.clone() }
    }
}
