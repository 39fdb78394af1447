//! Selecting a backend for a flow and connecting to it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use allocation::{
    AllocationTable, BackendIndex, Client, Decision, Excluded, FlowKey, Kept, LiveFacts, NoBackend,
    Selection, Timestamp,
};
use flow::preface::Routed;
use flow::{CloseReason, Input, Shot, Side, Tuning};
use rustix::io::Errno;
use uring::{EnterError, Op};

use super::Worker;
use super::slot::{FlowSlot, Sources, Syn, Target};
use crate::io::Io;
use crate::share::PoolShare;
use crate::stats::Shed;
use crate::tcp;
use crate::towards::{ANY_SOURCE, SocketError, Spent, Towards};

/// Connects of a flow to one backend from ports that are taken over: each may be in use after all.
const TAKEN_OVER_MAX: u8 = 4;

impl<I: Io> Worker<I> {
    /// Selects a backend that the flow has not tried and connects to it.
    pub(super) fn connect(&mut self, index: u32) -> Result<(), EnterError> {
        if let Some(failed) = self.flows.get_mut(index).and_then(|slot| slot.backend.take()) {
            self.ring.close(failed)?;
        }
        if !self.take_place(index) {
            return Ok(());
        }
        let Self { flows, listeners, now, .. } = self;
        let Some(slot) = flows.get_mut(index) else { return Ok(()) };
        let (listener, routed) = (slot.listener, Routed { route: slot.route, target: slot.target });
        let pool = &mut listeners[usize::from(listener)].targets[usize::from(routed.target)];
        let table = Arc::clone(pool.table());
        let tried = excluded(&table, &slot.tried);
        let key = if table.wants_key() { client_key(slot) } else { FlowKey::from_bits(0) };
        let (selection, kept) = pool.select(&table, key, &tried, now.timestamp(), || slot.client_address());
        self.note(listener, routed, &table, &tried, &selection, kept);
        let selection = match selection {
            Ok(selection) => selection,
            Err(NoBackend::AllFull) if self.wait_for_room(index) => return Ok(()),
            Err(why) => {
                self.leave_queue(index);
                if why == NoBackend::RequirementUnmet {
                    self.stats.listeners[usize::from(listener)].shed(Shed::Requirement);
                }
                self.followups.push_back(Input::NoBackend);
                return Ok(());
            }
        };
        self.leave_queue(index);
        let address = table.backend(selection.index).address;
        let (now, asked_micros) = (self.now.timestamp(), self.now.micros);
        let Some(slot) = self.flows.get_mut(index) else { return Ok(()) };
        let pool = &mut self.listeners[usize::from(listener)].targets[usize::from(routed.target)];
        if let Some(noted) = &mut slot.noted {
            noted.chosen(&table, &selection, kept, now);
        }
        slot.open = Some(selection.open);
        slot.asked_micros = asked_micros;
        slot.sources = pool.sources(&address);
        self.connect_to(index, address)
    }

    /// Connects to the backend that was selected, from the next source address.
    fn connect_to(&mut self, index: u32, address: SocketAddr) -> Result<(), EnterError> {
        match self.backend_socket(index, address) {
            Ok(socket) => {
                if let Some(slot) = self.flows.get_mut(index) {
                    slot.backend = Some(socket);
                }
                self.submit(index, Side::Backend, Op::Connect, |ring, socket, token| {
                    ring.connect(socket, &address, token)
                })
            }
            Err(NoSocket::ForThisBackend(shed)) => {
                self.count_failed_connect(index, Ok(shed));
                self.followups.push_back(Input::ConnectFailed);
                Ok(())
            }
            Err(NoSocket::AtAll(shed)) => {
                self.shed_connecting(index, shed);
                Ok(())
            }
        }
    }

    /// No port was left: connects to the same backend from another source address, or from a port that rests. False: that is not
    /// to be tried.
    pub(super) fn connect_from_another(&mut self, index: u32) -> Result<bool, EnterError> {
        let Some(slot) = self.flows.get_mut(index) else { return Ok(false) };
        let target = &mut self.listeners[usize::from(slot.listener)].targets[usize::from(slot.target)];
        let selected = slot.open.as_ref().and_then(|open| target.address_of(open.live()));
        let Some(address) = selected else { return Ok(false) };
        // Of a client there is one address, and it is nobody else's.
        if target.towards.is_transparent() {
            return Ok(false);
        }
        // A port that was taken over in vain was one of many.
        if slot.sources.taken_over == 0 {
            if slot.sources.left == 0 {
                target.towards.note_ports_out(address);
            }
            let bound = slot.backend.as_ref().and_then(|socket| rustix::net::getsockname(socket).ok());
            let bound = bound.and_then(|bound| SocketAddr::try_from(bound).ok());
            let source = bound.map(|bound| bound.ip()).filter(|ip| !ip.is_unspecified());
            target.spent.note(address, source.unwrap_or(ANY_SOURCE), self.now.timestamp());
        }
        if !slot.flow.awaits_connect() {
            return Ok(false);
        }
        if let Some(failed) = slot.backend.take() {
            self.ring.close(failed)?;
        }
        self.connect_to(index, address)?;
        Ok(true)
    }

    /// Keeps the selection for whoever asks why.
    pub(super) fn note(
        &self,
        listener: u16,
        routed: Routed,
        table: &Arc<AllocationTable>,
        tried: &Excluded,
        selection: &Result<Selection, NoBackend>,
        kept: Option<Kept>,
    ) {
        if let Some(kept) = kept {
            self.stats.listeners[usize::from(listener)].kept(kept);
        }
        let (chosen, side) = match selection {
            Ok(selection) => (Ok(selection.index), selection.side),
            Err(why) => (Err(*why), 0),
        };
        let now = self.now.timestamp();
        let looked_at = table.side(usize::from(side));
        let selector = &self.listeners[usize::from(listener)].targets[usize::from(routed.target)].selector;
        self.stats.decisions.note(|| Decision {
            at: now,
            worker: self.worker as u16,
            listener,
            target: routed.target,
            route: routed.route,
            table: Arc::clone(table),
            side,
            chosen,
            kept: kept == Some(Kept::Same),
            tried: tried.count(),
            looks: selector.looks(looked_at, chosen.ok(), tried, now),
        });
    }

    pub(super) fn shed_connecting(&mut self, index: u32, shed: Shed) {
        if let Some(stats) = self.listener_stats(index) {
            stats.shed(shed);
        }
        if let Some(slot) = self.flows.get_mut(index) {
            slot.local_failure = Some(shed);
        }
        self.followups.push_back(Input::Abort(CloseReason::Exhausted));
    }

    fn backend_socket(&mut self, index: u32, address: SocketAddr) -> Result<OwnedFd, NoSocket> {
        let now = self.now.timestamp();
        let Some(slot) = self.flows.get_mut(index) else { return Err(NoSocket::AtAll(Shed::Memory)) };
        let Target { towards, spent, .. } =
            &mut self.listeners[usize::from(slot.listener)].targets[usize::from(slot.target)];
        let mut source = next_source(&mut slot.sources, towards, spent, address, now)?;
        let socket = towards.socket(address.ip())?;
        loop {
            let (from, bound) = match source {
                Source::Routed => break,
                Source::Client => {
                    bind_as(&socket, slot.client_address(), &address)?;
                    break;
                }
                Source::Ours(from) => {
                    let _ = uring::bind_address_no_port(socket.as_fd());
                    (from, rustix::net::bind(&socket, &SocketAddr::new(from, 0)))
                }
                Source::Resting(from) => match spent.bind_to_resting(&socket, from) {
                    Ok(false) => return Err(NoSocket::ForThisBackend(Shed::Ports)),
                    bound => (from, bound.map(drop)),
                },
            };
            match bound {
                Ok(()) => break,
                // It is no longer an address of this host, or has no port left for anybody.
                Err(Errno::ADDRNOTAVAIL | Errno::ADDRINUSE) => {
                    spent.note(address, from, now);
                    source = next_source(&mut slot.sources, towards, spent, address, now)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        // What a backend is sent first is sent on a connection that is there.
        let greeted = towards.proxy().is_some() || slot.must_ask_for_tls();
        slot.syn = match towards.fast_open() && !greeted {
            true => send_syn_with_bytes(&socket, slot.client.as_ref(), towards, &self.tuning),
            false => Syn::Plain,
        };
        Ok(socket)
    }

    // --- Bytes with the SYN -----------------------------------------------------------------------------------------

    /// Keeps a receive back until there is a connection to receive from. False: there is.
    pub(super) fn recv_waits(&mut self, index: u32, shot: Shot) -> bool {
        match self.flows.get_mut(index) {
            Some(FlowSlot { syn: Syn::Unsent(waiting), .. }) => {
                *waiting = Some(shot);
                true
            }
            _ => false,
        }
    }

    pub(super) fn take_waiting_recv(&mut self, index: u32) -> Option<Shot> {
        match self.flows.get_mut(index) {
            Some(FlowSlot { syn: Syn::Unsent(waiting), .. }) => waiting.take(),
            _ => None,
        }
    }

    /// Bytes were sent, and with the first of them the SYN.
    pub(super) fn syn_is_sent(&mut self, index: u32) -> Result<(), EnterError> {
        let Some(slot) = self.flows.get_mut(index) else { return Ok(()) };
        let Syn::Unsent(waiting) = slot.syn else { return Ok(()) };
        slot.syn = Syn::Sent;
        match waiting.filter(|_| !slot.flow.is_closed()) {
            Some(shot) => self.recv(index, Side::Backend, shot),
            None => Ok(()),
        }
    }
}

impl Target {
    /// Where a backend of the pool is.
    fn address_of(&mut self, live: &Arc<LiveFacts>) -> Option<SocketAddr> {
        let backends = self.table().members().backends();
        backends.iter().find(|backend| Arc::ptr_eq(&backend.live, live)).map(|backend| backend.address)
    }

    /// A backend has answered to a SYN with bytes: it may be silent for longer from now on.
    pub(super) fn connected_early(&self, backend: Option<&OwnedFd>) {
        let Some(socket) = backend else { return };
        let set = tcp::set_user_timeout(socket, self.towards.user_timeout());
        set.unwrap_or_else(|refused| self.towards.note(&refused));
    }
}

/// Why there is no socket to connect with.
enum NoSocket {
    /// Another backend may do.
    ForThisBackend(Shed),
    /// No other would.
    AtAll(Shed),
}

impl From<Errno> for NoSocket {
    fn from(errno: Errno) -> Self {
        Self::AtAll(local_failure(errno.raw_os_error()).unwrap_or(Shed::Memory))
    }
}

impl From<SocketError> for NoSocket {
    fn from(error: SocketError) -> Self {
        match error {
            SocketError::Refused(_) => Self::ForThisBackend(Shed::Source),
            SocketError::Io(errno) => errno.into(),
        }
    }
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// From an address and a port of the kernel's choice.
    Routed,
    /// From the client's address.
    Client,
    /// From an address of ours, and a port of the kernel's choice.
    Ours(IpAddr),
    /// From there, and a port that may rest from a connection that is over.
    Resting(IpAddr),
}

/// The next source that had ports left for a backend when it was last tried; then a few times one whose ports rest.
fn next_source(
    left: &mut Sources,
    towards: &Towards,
    spent: &Spent,
    backend: SocketAddr,
    now: Timestamp,
) -> Result<Source, NoSocket> {
    if towards.is_transparent() {
        return Ok(Source::Client);
    }
    let sources = towards.sources(&backend);
    if sources.is_empty() && !spent.rests(backend, ANY_SOURCE, now) {
        return Ok(Source::Routed);
    }
    while let Some(source) = left.take(sources) {
        if !spent.rests(backend, source, now) {
            return Ok(Source::Ours(source));
        }
    }
    if left.taken_over >= TAKEN_OVER_MAX {
        return Err(NoSocket::ForThisBackend(Shed::Ports));
    }
    let unspecified = match backend {
        SocketAddr::V4(_) => ANY_SOURCE,
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    Ok(Source::Resting(left.take_over(sources).unwrap_or(unspecified)))
}

/// Where the client's first bytes are there already: a server that speaks first must not be kept waiting for them.
fn send_syn_with_bytes(
    socket: &OwnedFd,
    client: Option<&OwnedFd>,
    towards: &Towards,
    tuning: &Tuning,
) -> Syn {
    let bytes = client.and_then(|client| rustix::io::ioctl_fionread(client).ok());
    if bytes.is_none_or(|bytes| bytes == 0) {
        return Syn::Plain;
    }
    if let Err(refused) = towards.set_fast_open(socket) {
        towards.note(&refused);
        return Syn::Plain;
    }
    // The connect "succeeds" at once: the kernel must give up in its stead.
    tcp::set_user_timeout(socket, tuning.connect_timeout).unwrap_or_else(|refused| towards.note(&refused));
    Syn::Unsent(None)
}

/// Gives a socket the client's address, with a port that is free towards the backend. From an address of ours it would be
/// taken for somebody else; so where the client has none of the backend's family, or is gone, it is not connected.
fn bind_as(socket: &OwnedFd, client: Option<SocketAddr>, backend: &SocketAddr) -> Result<(), NoSocket> {
    let fitting = client.filter(|client| client.is_ipv4() == backend.is_ipv4());
    let Some(mut address) = fitting else { return Err(NoSocket::ForThisBackend(Shed::Source)) };
    address.set_port(0);
    let _ = uring::bind_address_no_port(socket.as_fd());
    rustix::net::bind(socket, &address).map_err(|_| NoSocket::ForThisBackend(Shed::Source))
}

/// Who the client is. One whose connection is gone already is nobody in particular.
fn client_key(slot: &FlowSlot) -> FlowKey {
    slot.client_address().map_or(FlowKey::from_bits(0), |address| FlowKey::of_client(address.ip()))
}

impl Target {
    /// Selects by affinity where there is some and the client is known, else by the policy.
    pub(super) fn select(
        &mut self,
        table: &AllocationTable,
        key: FlowKey,
        tried: &Excluded,
        now: Timestamp,
        peer: impl FnOnce() -> Option<SocketAddr>,
    ) -> (Result<Selection, NoBackend>, Option<Kept>) {
        if let Some(affinity) = self.share.as_ref().and_then(PoolShare::affinity)
            && let Some(peer) = peer()
        {
            let client = Client::at(peer.ip());
            return match self.selector.select_kept(table, affinity, client, key, tried, now) {
                Ok((selection, kept)) => (Ok(selection), Some(kept)),
                Err(why) => (Err(why), None),
            };
        }
        (self.selector.select_for(table, key, tried, now), None)
    }
}

/// The backends of this table that a flow has tried. Looked for by identity, because a table that was published between
/// two tries may have other indexes; only flows with a failed connect look.
pub(super) fn excluded(table: &AllocationTable, tried: &[Arc<LiveFacts>]) -> Excluded {
    let mut excluded = Excluded::none();
    if tried.is_empty() {
        return excluded;
    }
    for (index, backend) in (0..).zip(table.members().backends()) {
        if tried.iter().any(|live| Arc::ptr_eq(live, &backend.live)) {
            excluded.push(BackendIndex(index));
        }
    }
    excluded
}

/// What of ours ran out, if that is why a call failed with this errno.
pub(super) fn local_failure(errno: i32) -> Option<Shed> {
    let is = |error: Errno| error.raw_os_error() == errno;
    if is(Errno::MFILE) || is(Errno::NFILE) {
        Some(Shed::Descriptors)
    } else if is(Errno::ADDRNOTAVAIL) {
        Some(Shed::Ports)
    } else if is(Errno::NOBUFS) || is(Errno::NOMEM) {
        Some(Shed::Memory)
    } else {
        None
    }
}
