//! What is noted of a flow while it goes, for its line in the access log. Nothing, where there is none.

use std::net::SocketAddr;

use allocation::{AllocationTable, BackendIndex, Kept, Selection};
use flow::CloseReason;

use super::Worker;
use super::slot::Moved;
use crate::access::{Chosen, Protocol, Record};
use crate::io::Io;
use crate::stats::Shed;

/// Beside the slot, on the heap: with the log off a flow has a pointer more.
#[derive(Debug, Default)]
pub(super) struct Noted {
    client: Option<SocketAddr>,
    chosen: Option<Chosen>,
    connects: u8,
    to_client: u64,
    to_backend: u64,
    connect_micros: Option<u64>,
    first_byte_micros: Option<u64>,
}

impl Noted {
    pub(super) fn new(client: Option<SocketAddr>) -> Box<Self> {
        Box::new(Self { client, ..Self::default() })
    }

    /// A header says who the client is.
    pub(super) fn is_of(&mut self, client: Option<SocketAddr>) {
        self.client = client;
    }

    pub(super) fn chosen(
        &mut self,
        table: &AllocationTable,
        selection: &Selection,
        kept: Option<Kept>,
        now: allocation::Timestamp,
    ) {
        self.given_to(table.side(usize::from(selection.side)), selection.index, kept, now);
    }

    /// The flow was given to this backend, which may not have been selected: a QUIC connection knows whom it is with.
    pub(super) fn given_to(
        &mut self,
        table: &AllocationTable,
        index: BackendIndex,
        kept: Option<Kept>,
        now: allocation::Timestamp,
    ) {
        let backend = table.backend(index);
        self.connects = self.connects.saturating_add(1);
        self.chosen = Some(Chosen {
            id: backend.id.clone(),
            address: backend.address,
            policy: table.policy(),
            kept,
            generation: table.generation(),
            cost: table.cost(index, backend.live.flows_open().saturating_sub(1), now),
        });
    }

    pub(super) fn connected(&mut self, took_micros: u64) {
        self.connect_micros = Some(took_micros);
    }

    pub(super) fn first_byte(&mut self, took_micros: u64) {
        self.first_byte_micros = Some(took_micros);
    }

    pub(super) fn moved(&mut self, moved: Moved) {
        self.to_client += u64::from(moved.to_client);
        self.to_backend += u64::from(moved.to_backend);
    }
}

/// What the line of a flow says beside what was noted while it went.
struct Ended {
    listener: u16,
    target: u16,
    protocol: Protocol,
    began_micros: u64,
    queue_micros: u64,
    reason: CloseReason,
    /// The bound at which it ended.
    shed: Option<Shed>,
}

impl<I: Io> Worker<I> {
    /// Hands the line of a flow that has ended to the log. `shed`: the bound at which it ended.
    pub(super) fn log(&mut self, index: u32, reason: CloseReason, shed: Option<Shed>) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        let ended = Ended {
            listener: slot.listener,
            target: slot.target,
            protocol: Protocol::Tcp,
            began_micros: slot.accepted_micros,
            queue_micros: slot.waited_micros,
            reason,
            shed,
        };
        let noted = slot.noted.take();
        self.write_line(noted, ended);
    }

    /// The same for a flow of datagrams, which waits for nobody.
    pub(super) fn log_udp(
        &self,
        noted: Option<Box<Noted>>,
        (listener, target): (u16, u16),
        began_micros: u64,
        reason: CloseReason,
        shed: Option<Shed>,
    ) {
        let (protocol, queue_micros) = (Protocol::Udp, 0);
        self.write_line(
            noted,
            Ended { listener, target, protocol, began_micros, queue_micros, reason, shed },
        );
    }

    fn write_line(&self, noted: Option<Box<Noted>>, ended: Ended) {
        let (Some(log), Some(noted)) = (&self.access_log, noted) else { return };
        let Noted { client, chosen, connects, to_client, to_backend, connect_micros, first_byte_micros } =
            *noted;
        log.write(Record {
            ended_micros: self.now.micros,
            worker: self.worker as u16,
            listener: ended.listener,
            target: ended.target,
            protocol: ended.protocol,
            client,
            chosen,
            retries: connects.saturating_sub(1),
            to_backend,
            to_client,
            queue_micros: ended.queue_micros,
            connect_micros,
            first_byte_micros,
            total_micros: self.now.micros.saturating_sub(ended.began_micros),
            end: ended.reason.label(),
            shed: ended.shed.map(Shed::label),
        });
    }
}
