//! Datagrams from clients: to the backend of their flow, or of a new one.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use allocation::{BackendIndex, ConnectFailure, FlowKey, LiveFacts, NoBackend, OpenFlow, Selection};
use flow::preface::Routed;
use flow::udp::{Cid, ServerIds, Train};
use flow::{CloseReason, Side};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use uring::{Completion, EnterError, Local, Part};

use super::super::accept::DoorAt;
use super::super::connect::{excluded, local_failure};
use super::super::noted::Noted;
use super::super::slot::Moved;
use super::proxied::{Told, client_of};
use super::sends::NONE;
use super::{
    KEPT_BYTES, KEPT_MAX, KEPT_PER_FLOW, KnownServers, Learned, UdpFlow, Unarmed, Worker, is_refusal, lock,
};
use crate::io::Io;
use crate::stats::{Dropped, Shed};

/// How datagrams came, and for whom.
#[derive(Debug, Clone)]
pub(super) struct Came {
    /// By which door.
    pub(super) at: DoorAt,
    /// Who sent them.
    pub(super) peer: SocketAddr,
    /// To which address, where the listener has many.
    pub(super) local: Option<Local>,
    /// What the proxy that sent them says, where the listener speaks the PROXY protocol.
    pub(super) told: Option<Arc<Told>>,
}

impl Came {
    /// Who the client is.
    fn client(&self) -> SocketAddr {
        client_of(self.told.as_deref(), self.peer)
    }
}

/// A backend for a flow, and a socket that is connected to it.
pub(super) struct Placed {
    pub(super) open: OpenFlow,
    pub(super) address: SocketAddr,
    pub(super) socket: OwnedFd,
    /// Of the listener's targets, the one whose backend it is.
    target: u16,
    /// The connection that it was found by.
    cid: Option<Cid>,
}

/// Why there is none.
pub(super) enum NotPlaced {
    /// Nobody is ready, or who was tried refused.
    NoBackend,
    /// Something of ours ran out.
    Local(Shed),
}

impl<I: Io> Worker<I> {
    pub(in super::super) fn datagrams_came(&mut self, completion: &Completion) -> Result<(), EnterError> {
        let at = DoorAt::of(completion.token);
        let index = usize::from(at.listener);
        if !completion.more {
            self.listeners[index].doors[usize::from(at.door)].armed = false;
            if !self.listeners[index].closing {
                self.udp.unarmed.push(Unarmed::Door(at));
            }
        }
        let Some(buffer) = completion.buffer.filter(|_| completion.result >= 0) else {
            self.release_of(completion);
            self.receive_failed(-completion.result);
            return Ok(());
        };
        let Some(datagrams) = self.ring.datagrams(buffer, completion.result) else {
            self.ring.release(buffer);
            self.dropped(index, Dropped::Malformed, 1);
            return Ok(());
        };
        let Some(udp) = &self.listeners[index].udp else {
            unreachable!("a listener of datagrams receives them");
        };
        let (local, proxy) = (datagrams.to.filter(|_| udp.is_wildcard()), udp.proxy);
        let part = Part { buffer, start: datagrams.start, length: datagrams.length };
        let mut came = Came { at, peer: datagrams.from, local, told: None };
        let Some(proxy) = proxy else {
            let train = Train::received(datagrams.length, datagrams.segment);
            return self.take_in(&came, train, part);
        };
        match self.take_header(&mut came, part, proxy) {
            // Such a listener receives no trains.
            Ok(Some(part)) => self.take_in(&came, Train::received(part.length, 0), part),
            Ok(None) => {
                self.ring.release(buffer);
                Ok(())
            }
            Err(why) => {
                self.ring.release(buffer);
                self.dropped(index, why, 1);
                Ok(())
            }
        }
    }

    fn take_in(&mut self, came: &Came, train: Train, part: Part) -> Result<(), EnterError> {
        match self.flow_of(came, train, part)? {
            Some(flow) => {
                if came.told.is_some() {
                    self.retold(flow, came);
                }
                self.asked(flow, train, Some(part));
            }
            None => self.ring.release(part.buffer),
        }
        Ok(())
    }

    /// The flow that the datagram belongs to; `None`: it gets none, which is counted.
    pub(super) fn flow_of(
        &mut self,
        came: &Came,
        train: Train,
        part: Part,
    ) -> Result<Option<u32>, EnterError> {
        let tuple = self.tuple_of(came);
        let found = match came.announced(tuple) {
            None => self.udp.flows.find(&tuple),
            Some(announced) => self.udp.flows.find_announced(&announced),
        };
        match found {
            Some(flow) => Ok(Some(flow)),
            None => self.open_udp(came, train, part),
        }
    }

    /// What the client says goes to its backend.
    pub(super) fn asked(&mut self, flow: u32, train: Train, part: Option<Part>) {
        let Some(listener) = self.udp.flows.get(flow).map(|flow| usize::from(flow.listener)) else { return };
        let Some(udp) = &self.listeners[listener].udp else { return };
        let retries = udp.tuning.retries;
        let number = self.udp.flows.requests(flow);
        self.udp.flows.asked(flow, train.datagrams(), self.now.timestamp(), &udp.tuning);
        if let Some(part) = part.filter(|_| retries > 0) {
            self.keep(flow, number, train, part);
        }
        self.queue_datagrams(flow, Side::Backend, train, part);
    }

    fn open_udp(&mut self, came: &Came, train: Train, part: Part) -> Result<Option<u32>, EnterError> {
        let (listener, client) = (usize::from(came.at.listener), came.client());
        if self.leaving() {
            self.dropped(listener, Dropped::Draining, train.datagrams());
            return Ok(None);
        }
        let Some(udp) = &self.listeners[listener].udp else { return Ok(None) };
        let (tuning, shared, flows_max) = (udp.tuning, Arc::clone(&udp.shared), udp.flows_max);
        let stats = Arc::clone(&self.stats);
        let stats = &stats.listeners[listener];
        let admitted = match self.admit(listener, || Some(client)) {
            Ok(admitted) => admitted,
            Err(shed) => {
                stats.shed(shed);
                return Ok(None);
            }
        };
        let of_listener = shared.flows_open.fetch_add(1, Relaxed);
        let give_back = |worker: &Self| {
            shared.flows_open.fetch_sub(1, Relaxed);
            worker.dismiss(listener as u16, admitted);
        };
        if flows_max != 0 && of_listener >= flows_max {
            give_back(self);
            stats.shed(Shed::Flows);
            return Ok(None);
        }
        stats.opened.add(1);
        let routed = self.listeners[listener].sorter.as_ref().map_or(Routed::DEFAULT, |sorter| {
            sorter.route(client, self.listeners[listener].doors[usize::from(came.at.door)].port)
        });
        let mut tried = Vec::new();
        let mut noted = self.access_log.as_ref().map(|_| Noted::new(Some(client)));
        let packet = Some(part);
        let placed =
            match self.place((listener, routed), client, &mut tried, tuning.retries, packet, &mut noted) {
                Ok(placed) => placed,
                Err(why) => {
                    give_back(self);
                    let (reason, shed) = match why {
                        NotPlaced::NoBackend => (CloseReason::NoBackend, None),
                        NotPlaced::Local(shed) => {
                            stats.shed(shed);
                            (CloseReason::Exhausted, Some(shed))
                        }
                    };
                    stats.closed(reason);
                    self.log_udp(noted, (listener as u16, routed.target), self.now.micros, reason, shed);
                    return Ok(None);
                }
            };
        // A connection that moved stays on its backend, whatever the route of its new address.
        let routed = if placed.target == routed.target {
            routed
        } else {
            Routed { target: placed.target, ..Routed::DEFAULT }
        };
        if let Some(count) = stats.routed.get(usize::from(routed.target)) {
            count.add(1);
        }
        placed.open.opened();
        let heading = self.heading(came, routed.target);
        let id = self.udp.next_id;
        self.udp.next_id += 1;
        let flow = UdpFlow {
            listener: listener as u16,
            door: came.at.door,
            routed,
            admitted,
            noted,
            peer: came.peer,
            told: came.told.clone(),
            heading,
            local: came.local,
            socket: Some(placed.socket),
            open: Some(placed.open),
            address: placed.address,
            tried,
            attempt: 0,
            receiving: false,
            receiving_trains: false,
            receiving_attempt: 0,
            trains: false,
            trains_wanted: false,
            no_trains: [false; 2],
            burst: (0, 0),
            kept: Vec::new(),
            resent_below: 0,
            building: [NONE; 2],
            answered: false,
            opened_micros: self.now.micros,
            asked_micros: self.now.micros,
            moved: Moved::default(),
            cid: placed.cid,
            cids_learned: 0,
            id,
        };
        if let Some(cid) = placed.cid {
            // The connection moves on with its client: the end of the flow that it came by does not end it.
            let live = Arc::clone(flow.live());
            let learned = Learned { address: flow.address, live, target: flow.routed.target };
            lock(&shared.cids).learn(cid, learned, id);
        }
        let now = self.now.timestamp();
        // The table takes as many as `flows_max`, which was asked above.
        let tuple = self.tuple_of(came);
        let opened = match came.announced(tuple) {
            None => self.udp.flows.open(tuple, flow, now, &tuning),
            Some(announced) => self.udp.flows.open_announced(announced, flow, now, &tuning),
        };
        let Ok(index) = opened else {
            give_back(self);
            stats.shed(Shed::Flows);
            stats.closed(CloseReason::Exhausted);
            return Ok(None);
        };
        self.arm_flow(index)?;
        Ok(Some(index))
    }

    /// Copies what the client says before its backend is known to be there.
    fn keep(&mut self, index: u32, number: u32, train: Train, part: Part) {
        let Self { ring, udp, .. } = self;
        let Some(flow) = udp.flows.get_mut(index).filter(|flow| !flow.answered && flow.attempt == 0) else {
            return;
        };
        let mut start = part.start;
        let header = flow.heading.as_ref().map_or(&[][..], |heading| &heading.bytes);
        for (number, length) in (number..).zip(train.lengths()) {
            let bytes = header.len() + length as usize;
            let fits = length <= KEPT_BYTES && udp.kept_bytes + bytes <= KEPT_MAX;
            // In one row: whatever is sent again is sent up to a number.
            let next = flow.kept.last().map_or(0, |(last, _)| last + 1);
            if !fits || number != next || flow.kept.len() >= KEPT_PER_FLOW {
                return;
            }
            udp.kept_bytes += bytes;
            let payload = ring.bytes(part.buffer, start, length);
            let datagram = if header.is_empty() { payload.into() } else { [header, payload].concat().into() };
            flow.kept.push((number, datagram));
            start += length;
        }
    }

    /// A backend that was not tried, and a socket connected to it. A QUIC connection goes to the backend it is with.
    pub(super) fn place(
        &mut self,
        (listener, routed): (usize, Routed),
        client: SocketAddr,
        tried: &mut Vec<Arc<LiveFacts>>,
        retries: u8,
        packet: Option<Part>,
        noted: &mut Option<Box<Noted>>,
    ) -> Result<Placed, NotPlaced> {
        if let Some((learned, cid)) = packet.and_then(|part| self.quic_backend(listener, routed.target, part))
            && let Ok(socket) = self.datagram_socket(listener, learned.target, &learned.address)
        {
            self.note_learned(listener, &learned, noted);
            let Learned { address, live, target } = learned;
            return Ok(Placed { open: live.open_flow(), address, socket, target, cid });
        }
        loop {
            let (open, address) = self.select_for(listener, routed, client, tried, noted)?;
            let errno = match self.datagram_socket(listener, routed.target, &address) {
                Ok(socket) => return Ok(Placed { open, address, socket, target: routed.target, cid: None }),
                Err(error) => error.raw_os_error(),
            };
            if !is_refusal(errno) {
                // Without a free port, connect(2) says EAGAIN.
                let ports = errno == Errno::AGAIN.raw_os_error();
                let shed = if ports { Shed::Ports } else { local_failure(errno).unwrap_or(Shed::Memory) };
                return Err(NotPlaced::Local(shed));
            }
            open.connect_failed(ConnectFailure::Refused, self.now.timestamp());
            tried.push(Arc::clone(open.live()));
            self.stats.listeners[listener].connect_retries.add(1);
            if tried.len() > usize::from(retries) {
                return Err(NotPlaced::NoBackend);
            }
        }
    }

    /// For the access log: whom a QUIC connection is with.
    fn note_learned(&mut self, listener: usize, learned: &Learned, noted: &mut Option<Box<Noted>>) {
        let Some(noted) = noted else { return };
        let table = Arc::clone(self.listeners[listener].targets[usize::from(learned.target)].table());
        let mut members = (0..).zip(table.members().backends());
        if let Some((index, _)) = members.find(|(_, backend)| Arc::ptr_eq(&backend.live, &learned.live)) {
            noted.given_to(&table, BackendIndex(index), None, self.now.timestamp());
        }
    }

    fn select_for(
        &mut self,
        listener: usize,
        routed: Routed,
        client: SocketAddr,
        tried: &[Arc<LiveFacts>],
        noted: &mut Option<Box<Noted>>,
    ) -> Result<(OpenFlow, SocketAddr), NotPlaced> {
        let now = self.now.timestamp();
        let target = &mut self.listeners[listener].targets[usize::from(routed.target)];
        let table = Arc::clone(target.table());
        let tried = excluded(&table, tried);
        let key = if table.wants_key() { FlowKey::of_client(client.ip()) } else { FlowKey::from_bits(0) };
        let (selection, kept) = target.select(&table, key, &tried, now, || Some(client));
        self.note(listener as u16, routed, &table, &tried, &selection, kept);
        if let (Some(noted), Ok(selection)) = (noted, &selection) {
            noted.chosen(&table, selection, kept, now);
        }
        match selection {
            Ok(Selection { index, open, .. }) => Ok((open, table.backend(index).address)),
            Err(why) => {
                if why == NoBackend::RequirementUnmet {
                    self.stats.listeners[listener].shed(Shed::Requirement);
                }
                Err(NotPlaced::NoBackend)
            }
        }
    }

    /// The backend that a packet's connection is with: by the server id in its ID, or by an ID that the backend was seen to
    /// choose.
    ///
    /// IDs that a backend chose are followed wherever they come from; whoever writes a server id himself stays within his route.
    fn quic_backend(&mut self, listener: usize, target: u16, part: Part) -> Option<(Learned, Option<Cid>)> {
        let Self { listeners, ring, .. } = self;
        let listener = &mut listeners[listener];
        let udp = listener.udp.as_mut().filter(|udp| udp.quic)?;
        let packet = ring.bytes(part.buffer, part.start, part.length);
        if let Some(KnownServers { form, keys, of: known }) = udp.server_ids.get_mut(usize::from(target)) {
            let table = Arc::clone(listener.targets[usize::from(target)].table());
            let members = table.members();
            // Read once for each membership: whoever sends packets from ever new addresses must not make us look at all.
            if !known.as_ref().is_some_and(|(of, _)| Arc::ptr_eq(of, members)) {
                let backends = (0..).zip(members.backends());
                let backends = backends.map(|(index, backend)| (index, backend.id.as_str(), backend.address));
                *known = Some((Arc::clone(members), ServerIds::new(*form, keys.clone(), backends)));
            }
            let found = known.as_ref().and_then(|(_, ids)| ids.find(packet));
            if let Some(backend) = found.and_then(|index| members.backends().get(index as usize)) {
                let (address, live) = (backend.address, Arc::clone(&backend.live));
                return Some((Learned { address, live, target }, None));
            }
        }
        let (cid, learned) = lock(&udp.shared.cids).find(packet)?;
        Some((learned, Some(cid)))
    }

    fn datagram_socket(
        &mut self,
        listener: usize,
        target: u16,
        address: &SocketAddr,
    ) -> rustix::io::Result<OwnedFd> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        let target = &mut self.listeners[listener].targets[usize::from(target)];
        if let Some(ports) = target.towards.datagram_ports() {
            // An older kernel gives all of them.
            let _ = uring::local_ports(socket.as_fd(), ports);
        }
        if let Some(source) = target.sources(address).take(target.towards.sources(address)) {
            let _ = uring::bind_address_no_port(socket.as_fd());
            rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
        }
        rustix::net::connect(&socket, address)?;
        Ok(socket)
    }
}

impl UdpFlow {
    fn live(&self) -> &Arc<LiveFacts> {
        match &self.open {
            Some(open) => open.live(),
            None => unreachable!("a flow that is being opened has a backend"),
        }
    }
}
