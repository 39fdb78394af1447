//! Selecting a backend for a flow and connecting to it.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use allocation::{
    AllocationTable, BackendIndex, Decision, Excluded, FlowKey, LiveFacts, NoBackend, Selection,
};
use flow::{CloseReason, Input, Side};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use uring::{EnterError, Op};

use super::Worker;
use crate::io::Io;
use crate::stats::Shed;

impl<I: Io> Worker<I> {
    /// Selects a backend that the flow has not tried and connects to it.
    pub(super) fn connect(&mut self, index: u32) -> Result<(), EnterError> {
        let Self { flows, listeners, now, ring, .. } = self;
        let Some(slot) = flows.get_mut(index) else { return Ok(()) };
        if let Some(failed) = slot.backend.take() {
            ring.close(failed)?;
        }
        let (listener, target) = (slot.listener, slot.target);
        let pool = &mut listeners[usize::from(listener)].targets[usize::from(target)];
        let table = Arc::clone(pool.table());
        let tried = excluded(&table, &slot.tried);
        let key = if table.wants_key() { client_key(slot.client.as_ref()) } else { FlowKey::from_bits(0) };
        let selection = pool.selector.select_for(&table, key, &tried, now.timestamp());
        self.note(listener, target, &table, &tried, &selection);
        let (chosen, open) = match selection {
            Ok(Selection { index: chosen, open, .. }) => (chosen, open),
            Err(why) => {
                if why == NoBackend::RequirementUnmet {
                    self.stats.listeners[usize::from(listener)].shed(Shed::Requirement);
                }
                self.followups.push_back(Input::NoBackend);
                return Ok(());
            }
        };
        let address = table.backend(chosen).address;
        let asked_micros = self.now.micros;
        let Some(slot) = self.flows.get_mut(index) else { return Ok(()) };
        slot.open = Some(open);
        slot.asked_micros = asked_micros;
        match self.backend_socket(&address) {
            Ok(socket) => {
                if let Some(slot) = self.flows.get_mut(index) {
                    slot.backend = Some(socket);
                }
                self.submit(index, Side::Backend, Op::Connect, |ring, socket, token| {
                    ring.connect(socket, &address, token)
                })
            }
            Err(error) => {
                self.shed_connecting(index, local_failure(error.raw_os_error()).unwrap_or(Shed::Memory));
                Ok(())
            }
        }
    }

    /// Keeps the selection for whoever asks why.
    pub(super) fn note(
        &self,
        listener: u16,
        target: u16,
        table: &Arc<AllocationTable>,
        tried: &Excluded,
        selection: &Result<Selection, NoBackend>,
    ) {
        let (chosen, side) = match selection {
            Ok(selection) => (Ok(selection.index), selection.side),
            Err(why) => (Err(*why), 0),
        };
        let now = self.now.timestamp();
        let looked_at = table.side(usize::from(side));
        let selector = &self.listeners[usize::from(listener)].targets[usize::from(target)].selector;
        self.stats.decisions.note(|| Decision {
            at: now,
            worker: self.worker as u16,
            listener,
            table: Arc::clone(table),
            side,
            chosen,
            tried: tried.count(),
            looks: selector.looks(looked_at, chosen.ok(), tried, now),
        });
    }

    pub(super) fn shed_connecting(&mut self, index: u32, shed: Shed) {
        if let Some(stats) = self.listener_stats(index) {
            stats.shed(shed);
        }
        self.followups.push_back(Input::Abort(CloseReason::Exhausted));
    }

    pub(super) fn backend_socket(&mut self, address: &SocketAddr) -> rustix::io::Result<OwnedFd> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        if let Some(source) = self.next_source(address) {
            let _ = uring::bind_address_no_port(socket.as_fd());
            rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
        }
        Ok(socket)
    }

    /// The next source address of the backend's family.
    pub(super) fn next_source(&mut self, address: &SocketAddr) -> Option<IpAddr> {
        let fitting = self.sources.iter().filter(|source| source.is_ipv4() == address.is_ipv4());
        let count = fitting.clone().count();
        if count == 0 {
            return None;
        }
        self.source_turn = self.source_turn.wrapping_add(1);
        fitting.copied().nth(self.source_turn % count)
    }
}

/// Who the client is. One whose connection is gone already is nobody in particular.
pub(super) fn client_key(client: Option<&OwnedFd>) -> FlowKey {
    let address = client.and_then(|client| rustix::net::getpeername(client).ok().flatten());
    let address = address.and_then(|address| SocketAddr::try_from(address).ok());
    address.map_or(FlowKey::from_bits(0), |address| FlowKey::of_client(address.ip()))
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
