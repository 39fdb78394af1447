//! A flow, a listener, and what belongs to them.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use allocation::{AllocationTable, LiveFacts, OpenFlow, Reader, Selector, Timestamp};
use flow::{Flow, Shot, Side};

use super::admit::{Admitted, Gate};
use super::noted::Noted;
use super::preface::{ClientPreface, Sorter, peer_address};
use super::queue::Queue;
use super::udp::UdpListener;
use super::{ListenerSetup, TargetSetup};
use crate::pipes::Pipe;
use crate::share::PoolShare;
use crate::stats::Shed;
use crate::towards::{Spent, Towards};

pub(super) struct Listener {
    /// One for each port.
    pub(super) doors: Box<[Door]>,
    pub(super) backlog: u16,
    /// It was cancelled, to close the socket.
    pub(super) closing: bool,
    /// What listeners of datagrams have beside it.
    pub(super) udp: Option<UdpListener>,
    /// Whom its flows are given to: the first is the default.
    pub(super) targets: Box<[Target]>,
    /// Who turns new flows away; `None`: nobody is.
    pub(super) gate: Option<Arc<Gate>>,
    /// What is asked of a flow before it is given to anybody; `None`: nothing.
    pub(super) sorter: Option<Box<Sorter>>,
}

/// Where connections come in: a port of a listener.
pub(super) struct Door {
    pub(super) port: u16,
    /// `None` once it is closed.
    pub(super) socket: Option<OwnedFd>,
    /// An accept or a receive is in flight.
    pub(super) armed: bool,
}

/// A pool that serves flows of a listener.
pub(super) struct Target {
    reader: Reader,
    /// The table of this batch.
    table: Arc<AllocationTable>,
    /// Whether `table` was read in this batch.
    table_read: bool,
    /// Its own: turns of one pool must not move those of another.
    pub(super) selector: Selector,
    pub(super) towards: Arc<Towards>,
    /// Which source address is next.
    source_turn: usize,
    /// Source addresses that have no port left.
    pub(super) spent: Spent,
    /// What it has in common with others of its pool.
    pub(super) share: Option<PoolShare>,
    pub(super) queue: Queue,
}

/// One flow and its sockets.
pub(super) struct FlowSlot {
    pub(super) flow: Flow,
    pub(super) listener: u16,
    /// Of the listener's targets.
    pub(super) target: u16,
    /// Which of the listener's routes it met, counted from 1; 0: none.
    pub(super) route: u16,
    /// Submissions whose last completion has not come: a bit for each operation, of which there is one at most.
    pub(super) in_flight: u16,
    /// By target: what is being sent found no room, and is sent again when there is.
    pub(super) awaits_room: [bool; 2],
    /// By side: its FIN was there, unread, when ours was sent. A reset takes nothing from what it has said.
    pub(super) said_all: [bool; 2],
    /// The backend has sent a byte.
    pub(super) answered: bool,
    pub(super) nodelay: Nodelay,
    /// Keepalive is on towards the backend.
    pub(super) settled: bool,
    /// The last connect failed for want of something of ours, not through the backend.
    pub(super) local_failure: Option<Shed>,
    /// The bound at which it ends.
    pub(super) shed: Option<Shed>,
    /// It is counted in its pool's budget.
    pub(super) has_place: bool,
    /// It is in its target's queue.
    pub(super) waits: bool,
    /// How long it was, in microseconds.
    pub(super) waited_micros: u64,
    pub(super) admitted: Admitted,
    /// For the access log, where there is one.
    pub(super) noted: Option<Box<Noted>>,
    pub(super) client: Option<OwnedFd>,
    pub(super) backend: Option<OwnedFd>,
    /// Of halves that are spliced, by source; few flows have any.
    pub(super) pipes: Option<Box<[Option<Pipe>; 2]>>,
    /// Counts the flow on its backend.
    pub(super) open: Option<OpenFlow>,
    /// Own addresses that are left to connect to this backend from.
    pub(super) sources: Sources,
    pub(super) syn: Syn,
    /// Backends whose connect failed, at most [`Excluded::MAX`].
    pub(super) tried: Vec<Arc<LiveFacts>>,
    /// What the timer is armed for; the flow's own deadline may have moved on since.
    pub(super) armed_for: Timestamp,
    pub(super) accepted_micros: u64,
    /// When the connect began; from then on, when the backend was last given reason to answer for the first time.
    pub(super) asked_micros: u64,
    /// Bytes delivered that its backend's count does not have yet.
    pub(super) moved: Moved,
    /// What the client sent before it was given to anybody, and what came of it; few listeners ask.
    pub(super) preface: Option<Box<ClientPreface>>,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moved {
    pub(super) to_client: u32,
    pub(super) to_backend: u32,
}

/// Source addresses that were not tried for a connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Sources {
    next: u8,
    pub(super) left: u8,
    /// Connects from ports that were taken over.
    pub(super) taken_over: u8,
}

impl Sources {
    /// The next of these.
    pub(super) fn take(&mut self, all: &[IpAddr]) -> Option<IpAddr> {
        self.left = self.left.checked_sub(1)?;
        let source = all.get(usize::from(self.next)).copied();
        self.next = if usize::from(self.next) + 1 < all.len() { self.next + 1 } else { 0 };
        source
    }

    /// The next of these after all were tried, for a connect from a port that is taken over.
    pub(super) fn take_over(&mut self, all: &[IpAddr]) -> Option<IpAddr> {
        let place = (usize::from(self.next) + usize::from(self.taken_over)).checked_rem(all.len());
        self.taken_over += 1;
        all.get(place?).copied()
    }
}

/// What became of the SYN towards the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Syn {
    /// Connecting sends it.
    Plain,
    /// It goes with the first bytes (`TCP_FASTOPEN_CONNECT`). The receive that waits for that: the kernel refuses one before.
    Unsent(Option<Shot>),
    /// It has gone with the first bytes, and the backend has not answered.
    Sent,
}

/// Whether Nagle's algorithm is off towards the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nodelay {
    NothingSent,
    SentOnce,
    Set,
}

impl Listener {
    /// `seed` gives another one each time; `udp_retries`: further backends that are tried when one refuses datagrams.
    pub(super) fn new(setup: ListenerSetup, worker: usize, udp_retries: u8, seed: impl Fn() -> u64) -> Self {
        let targets = setup.targets.len();
        let proxy = setup.sorter.as_ref().is_some_and(Sorter::names_client);
        let udp = |(config, address, shared)| {
            UdpListener::new(&config, address, udp_retries, shared, targets, proxy)
        };
        let door = |(port, socket)| Door { port, socket: Some(socket), armed: false };
        let target = |target| Target::new(target, worker, seed());
        Self {
            doors: setup.sockets.into_iter().map(door).collect(),
            backlog: setup.backlog,
            targets: setup.targets.into_iter().map(target).collect(),
            gate: setup.gate,
            sorter: setup.sorter.map(Box::new),
            closing: false,
            udp: setup.udp.map(udp),
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.doors.iter().all(|door| door.socket.is_none())
    }

    /// At the beginning of a batch: tables are read again when they are asked for.
    pub(super) fn begin_batch(&mut self) {
        for target in &mut self.targets {
            target.table_read = false;
        }
    }
}

impl Target {
    /// Workers begin with different source addresses.
    pub(super) fn new(setup: TargetSetup, worker: usize, seed: u64) -> Self {
        let TargetSetup { mut reader, towards, share } = setup;
        let table = Arc::clone(reader.read());
        let (selector, spent) = (Selector::new(seed), Spent::default());
        let queue = Queue::default();
        Self { reader, table, table_read: false, selector, towards, source_turn: worker, spent, share, queue }
    }

    /// The source addresses for a backend: each once, beginning with the next in turn.
    pub(super) fn sources(&mut self, backend: &SocketAddr) -> Sources {
        let count = self.towards.sources(backend).len();
        self.source_turn = self.source_turn.wrapping_add(1);
        // There are a few dozens at most.
        Sources { next: (self.source_turn % count.max(1)) as u8, left: count as u8, taken_over: 0 }
    }

    /// The pool's table, read once per batch.
    pub(super) fn table(&mut self) -> &Arc<AllocationTable> {
        if !self.table_read {
            self.table_read = true;
            let newest = self.reader.read();
            if !Arc::ptr_eq(newest, &self.table) {
                self.table = Arc::clone(newest);
            }
        }
        &self.table
    }
}

impl FlowSlot {
    pub(super) fn socket(&self, side: Side) -> Option<BorrowedFd<'_>> {
        match side {
            Side::Client => self.client.as_ref(),
            Side::Backend => self.backend.as_ref(),
        }
        .map(AsFd::as_fd)
    }

    /// Who the client is: as the proxy in front of us says, or whoever connected. `None`: it is gone already.
    pub(super) fn client_address(&self) -> Option<SocketAddr> {
        let told = self.preface.as_ref().and_then(|preface| preface.addresses.source());
        told.or_else(|| peer_address(self.client.as_ref()?.as_fd()))
    }

    /// Whether the client was promised TLS, so that a backend must be asked for it.
    pub(super) fn must_ask_for_tls(&self) -> bool {
        self.preface.as_ref().is_some_and(|preface| preface.tls_asked)
    }

    /// Whether a backend was asked for TLS and has not answered.
    pub(super) fn asks_for_tls(&self) -> bool {
        self.preface.as_ref().is_some_and(|preface| preface.asking)
    }

    /// Adds what was delivered to the backend's count.
    pub(super) fn hand_over_moved(&mut self) {
        let moved = std::mem::take(&mut self.moved);
        let Moved { to_client, to_backend } = moved;
        if let Some(noted) = &mut self.noted {
            noted.moved(moved);
        }
        if let Some(open) = self.open.as_ref().filter(|_| to_client | to_backend != 0) {
            open.moved_bytes(u64::from(to_client), u64::from(to_backend));
        }
    }

    pub(super) fn pipe(&mut self, from: Side) -> &mut Option<Pipe> {
        &mut self.pipes.get_or_insert_default()[from as usize]
    }

    /// A side's socket and the pipe of the half whose source is `from`.
    pub(super) fn socket_and_pipe(
        &mut self,
        side: Side,
        from: Side,
    ) -> (Option<BorrowedFd<'_>>, Option<&mut Pipe>) {
        let socket = match side {
            Side::Client => &self.client,
            Side::Backend => &self.backend,
        };
        let pipe = self.pipes.as_mut().and_then(|pipes| pipes[from as usize].as_mut());
        (socket.as_ref().map(AsFd::as_fd), pipe)
    }
}
