//! UDP: datagrams of clients to backends and back.
//!
//! ```text
//! listening socket ── multishot recvmsg ──> clients.rs: flow by tuple, or a new one ──┐
//!                      (proxied.rs: whose, where a PROXY header says so)              ├─> sends.rs: trains, one send each
//! socket of a flow ── multishot recv ─────> backends.rs: answers, refusals ───────────┘     at the end of the batch
//! ```
//!
//! Each flow has a connected socket towards its backend: the kernel finds the flow of an answer, drops what is from anybody
//! else, keeps the route, and says when the backend refuses (ICMP). Invariants beside those of the worker:
//!
//! * nothing is queued for longer than a batch: a datagram goes out at once or is dropped and counted, so datagrams of a flow
//!   keep their order and a slow receiver holds no buffers;
//! * a flow's slot is freed when it is over and its receive has completed;
//! * what was sent before a flow moved to another backend ([`UdpFlow::attempt`]) says nothing about the other one.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use allocation::{LiveFacts, Members, OpenFlow, Timestamp};
use flow::CloseReason;
use flow::preface::Routed;
use flow::udp::{Cid, Cids, Expiry, Flows, ServerIdForm, ServerIdKeys, ServerIds, Speakers, Tuning};
use rustix::io::Errno;
use uring::{Completion, EnterError, Group, Local, Op, Token};

use super::accept::DoorAt;
use super::admit::Admitted;
use super::noted::Noted;
use super::shortages::Shortages;
use super::slot::Moved;
use super::{ACCEPT_REST, Worker};
use crate::config::{ProxyHeader, UdpConfig};
use crate::io::Io;
use crate::listen;
use crate::stats::Dropped;
use proxied::{Heading, Told};
use sends::Sends;

mod backends;
mod clients;
mod proxied;
mod sends;

/// Buffers for datagrams at the start, and most. What one batch receives is in them, and what it sends.
pub(super) const DATAGRAMS_AT_START: u32 = 64;
pub(super) const DATAGRAMS_MAX: u32 = 1_024;
/// Bytes of one: the largest datagram or train, and what the kernel puts before it.
pub(super) const DATAGRAM_BYTES: u32 = 65_536 + uring::DATAGRAM_OVERHEAD;
/// Most bytes of datagrams that are kept until their flow's backend answers or does not refuse, so that they can be sent to
/// another one. Those beyond it cannot.
const KEPT_MAX: usize = 16 << 20;
/// Longest datagram that is kept: what fits an Ethernet frame. And most of one flow.
const KEPT_BYTES: u32 = 1_472;
const KEPT_PER_FLOW: usize = 8;
/// Answers of a flow within a batch after which its socket receives trains: a transfer, not an exchange.
const TRAINS_AFTER: u8 = 8;
/// Bytes that wait in the socket of a flow that receives trains.
const TRANSFER_BUFFER: usize = 1 << 20;
/// IDs of its connection that a flow may learn: a server chooses one with a retry and one with its handshake.
const CIDS_PER_FLOW: u8 = 4;

/// What all workers share of a UDP listener.
#[derive(Debug)]
pub(crate) struct UdpShared {
    flows_open: AtomicU32,
    /// A migrating client comes to any worker. Locked when a flow begins or a server chooses an ID, not for each datagram.
    cids: Mutex<Cids<Learned>>,
}

impl UdpShared {
    pub(crate) fn new(seed: u64, cids_max: usize) -> Self {
        Self { flows_open: AtomicU32::new(0), cids: Mutex::new(Cids::new(seed, cids_max)) }
    }
}

/// A backend that outlives its place in tables.
#[derive(Debug, Clone)]
pub(crate) struct Learned {
    address: SocketAddr,
    live: Arc<LiveFacts>,
    /// Of the listener's targets, the one whose it is.
    target: u16,
}

/// What a listener of datagrams has beside its socket and targets.
pub(super) struct UdpListener {
    tuning: Tuning,
    flows_max: u32,
    /// Where it is bound. To every address of the host: answers must say which one they are from.
    bound: IpAddr,
    /// The number of its first door among those of all listeners of datagrams; see [`Tuple`].
    ///
    /// [`Tuple`]: flow::udp::Tuple
    first_door: u16,
    /// Which datagrams say whose they are; `None`: they are of whoever sent them.
    proxy: Option<ProxyHeader>,
    /// For whom proxies speak, where not every datagram says it. Made when the first one does.
    speakers: Option<Speakers<Arc<Told>>>,
    quic: bool,
    /// By target.
    server_ids: Box<[KnownServers]>,
    shared: Arc<UdpShared>,
}

/// Server ids of a pool's members, read once for each membership.
struct KnownServers {
    form: ServerIdForm,
    keys: Option<Arc<ServerIdKeys>>,
    of: Option<(Arc<Members>, ServerIds<u32>)>,
}

impl UdpListener {
    /// `targets`: how many the listener has; `proxy`: it speaks the PROXY protocol.
    pub(super) fn new(
        config: &UdpConfig,
        address: SocketAddr,
        retries: u8,
        shared: Arc<UdpShared>,
        targets: usize,
        proxy: bool,
    ) -> Self {
        let known =
            |form| (0..targets).map(move |_| KnownServers { form, keys: config.quic_keys.clone(), of: None });
        Self {
            tuning: Tuning {
                idle_timeout: config.idle_timeout,
                responses: config.responses,
                requests: config.requests,
                retries,
            },
            flows_max: config.flows_max,
            bound: address.ip(),
            first_door: 0,
            proxy: proxy.then_some(config.proxy_header),
            speakers: None,
            quic: config.quic,
            server_ids: config.quic_server_id.into_iter().flat_map(known).collect(),
            shared,
        }
    }

    fn is_wildcard(&self) -> bool {
        self.bound.is_unspecified()
    }
}

/// One flow.
struct UdpFlow {
    listener: u16,
    /// The door that the client came by, and that its answers leave by.
    door: u16,
    routed: Routed,
    /// Its place behind the listener's limits.
    admitted: Admitted,
    /// For the access log, where there is one.
    noted: Option<Box<Noted>>,
    /// Who sends its datagrams and is sent the answers: the client, or a proxy.
    peer: SocketAddr,
    /// What the proxy says of it.
    told: Option<Arc<Told>>,
    /// What its backend is sent before each datagram.
    heading: Option<Box<Heading>>,
    /// The address that the peer asked, where the listener has many.
    local: Option<Local>,
    /// Connected to the backend.
    socket: Option<OwnedFd>,
    /// Counts the flow on its backend.
    open: Option<OpenFlow>,
    address: SocketAddr,
    /// Backends that refused it.
    tried: Vec<Arc<LiveFacts>>,
    /// Counts the backends it was given.
    attempt: u8,
    /// A receive is in flight, and of which form and attempt it is.
    receiving: bool,
    receiving_trains: bool,
    receiving_attempt: u8,
    /// The socket receives trains, or is to.
    trains: bool,
    trains_wanted: bool,
    /// Trains towards a side were refused: its datagrams are longer than the path takes in one piece.
    no_trains: [bool; 2],
    /// Answers in the batch of that number.
    burst: (u32, u8),
    /// What it said first, as the backend is sent it, each with the number of the datagram, until the backend is known to be
    /// there.
    kept: Vec<(u32, Box<[u8]>)>,
    /// Datagrams below this number were sent to another backend than at first.
    resent_below: u32,
    /// Sends that are being put together, by the side they go to.
    building: [u32; 2],
    answered: bool,
    opened_micros: u64,
    asked_micros: u64,
    moved: Moved,
    /// Of its QUIC connection, and how many there were.
    cid: Option<Cid>,
    cids_learned: u8,
    /// Different for each flow of the process.
    id: u64,
}

impl UdpFlow {
    /// Nothing will be sent to another backend. Gives the bytes that were kept for it.
    fn forget_kept(&mut self) -> usize {
        std::mem::take(&mut self.kept).iter().map(|(_, datagram)| datagram.len()).sum()
    }

    fn hand_over_moved(&mut self) {
        let moved = std::mem::take(&mut self.moved);
        let Moved { to_client, to_backend } = moved;
        if let Some(noted) = &mut self.noted {
            noted.moved(moved);
        }
        if let Some(open) = self.open.as_ref().filter(|_| to_client | to_backend != 0) {
            open.moved_bytes(u64::from(to_client), u64::from(to_backend));
        }
    }
}

/// A receive that has ended and is to begin again.
enum Unarmed {
    Door(DoorAt),
    Flow(u32, u32),
}

/// The UDP part of a worker.
pub(super) struct Udp {
    flows: Flows<UdpFlow>,
    sends: Sends,
    unarmed: Vec<Unarmed>,
    /// Flows that end with this batch.
    over: Vec<(u32, u32, CloseReason)>,
    expired: Vec<(u32, Expiry)>,
    kept_bytes: usize,
    batch: u32,
    shortages: Shortages,
    next_id: u64,
    /// When to receive again after the kernel ran out of something.
    rest_until: Option<Timestamp>,
}

impl Udp {
    pub(super) fn new(worker: usize, now: Timestamp, seed: u64, flows_max: u32) -> Self {
        Self {
            flows: Flows::new(now, seed, flows_max as usize),
            sends: Sends::default(),
            unarmed: Vec::new(),
            over: Vec::new(),
            expired: Vec::new(),
            kept_bytes: 0,
            batch: 0,
            shortages: Shortages::default(),
            next_id: (worker as u64) << 48,
            rest_until: None,
        }
    }

    /// Whether nothing of it is left: no flow, no send on its way.
    pub(super) fn is_empty(&self) -> bool {
        self.flows.is_empty() && self.sends.is_empty()
    }

    /// When it wants to be woken.
    pub(super) fn next_wake(&self) -> Option<Timestamp> {
        let rest = self.rest_until.filter(|_| !self.unarmed.is_empty());
        [self.flows.next_wake(), rest].into_iter().flatten().min()
    }
}

impl<I: Io> Worker<I> {
    pub(super) fn start_udp(&mut self) {
        let mut doors = 0_u16;
        for (index, listener) in (0..).zip(&mut self.listeners) {
            let Some(udp) = &mut listener.udp else { continue };
            udp.first_door = doors;
            doors = doors.wrapping_add(listener.doors.len() as u16);
            let at = (0..listener.doors.len() as u16).map(|door| DoorAt { listener: index, door });
            self.udp.unarmed.extend(at.map(Unarmed::Door));
        }
        if !self.udp.unarmed.is_empty() {
            self.ring.grow(Group::Datagrams, DATAGRAMS_AT_START);
        }
    }

    /// The end of a batch: sends what was put together, ends what is over, receives again.
    pub(super) fn finish_datagrams(&mut self) -> Result<(), EnterError> {
        self.udp.batch = self.udp.batch.wrapping_add(1);
        self.udp.shortages.next_batch();
        self.send_queued()?;
        while let Some((index, generation, reason)) = self.udp.over.pop() {
            if self.udp.flows.generation(index) == Some(generation) {
                self.end_udp(index, reason)?;
            }
        }
        self.close_udp_listeners()?;
        if self.udp.unarmed.is_empty() { Ok(()) } else { self.arm_receives() }
    }

    fn arm_receives(&mut self) -> Result<(), EnterError> {
        // Without a buffer they would end at once. Buffers come back with the sends that are on their way.
        if self.ring.buffers_free(Group::Datagrams) == 0
            || self.udp.rest_until.is_some_and(|at| at > self.now.timestamp())
        {
            return Ok(());
        }
        self.udp.rest_until = None;
        let mut unarmed = std::mem::take(&mut self.udp.unarmed);
        for receive in unarmed.drain(..) {
            match receive {
                Unarmed::Door(at) => self.arm_door(at)?,
                Unarmed::Flow(index, generation) if self.udp.flows.generation(index) == Some(generation) => {
                    self.arm_flow(index)?;
                }
                Unarmed::Flow(..) => {}
            }
        }
        self.udp.unarmed = unarmed;
        Ok(())
    }

    fn arm_door(&mut self, at: DoorAt) -> Result<(), EnterError> {
        let door = &mut self.listeners[usize::from(at.listener)].doors[usize::from(at.door)];
        match &door.socket {
            Some(socket) if !door.armed => {
                door.armed = true;
                self.ring.recv_datagrams(socket.as_fd(), at.token_for(Op::Datagrams))
            }
            _ => Ok(()),
        }
    }

    fn arm_flow(&mut self, index: u32) -> Result<(), EnterError> {
        let token = self.udp_token(Op::Answers, index);
        let Some(flow) = self.udp.flows.get_mut(index) else { return Ok(()) };
        let Some(socket) = flow.socket.as_ref().filter(|_| !flow.receiving) else { return Ok(()) };
        if flow.trains_wanted && !flow.trains {
            flow.trains = uring::receive_trains(socket.as_fd()).is_ok();
            // A transfer fills the usual 208 KiB while the worker is busy elsewhere.
            listen::enlarge_receive_buffer(socket.as_fd(), TRANSFER_BUFFER);
            // Where the kernel has none, it is not asked again.
            flow.trains_wanted = flow.trains;
        }
        flow.receiving = true;
        flow.receiving_trains = flow.trains;
        flow.receiving_attempt = flow.attempt;
        if flow.trains {
            self.ring.recv_datagrams(socket.as_fd(), token)
        } else {
            self.ring.recv_connected(socket.as_fd(), token)
        }
    }

    fn udp_token(&self, op: Op, index: u32) -> Token {
        Token::new(op, index, self.udp.flows.generation(index).unwrap_or_default())
    }

    /// A receive ended for want of something.
    fn receive_failed(&mut self, errno: i32) {
        if errno == Errno::NOBUFS.raw_os_error() {
            self.stats.buffer_waits.add(1);
            if self.udp.shortages.found_none(self.ring.buffers_free(Group::Datagrams)) {
                let double = self.ring.buffers(Group::Datagrams);
                self.ring.grow(Group::Datagrams, double);
            }
        } else if errno != Errno::CANCELED.raw_os_error() {
            // Receiving at once would fail at once, for ever.
            self.udp.rest_until = Some(self.now.timestamp() + ACCEPT_REST);
        }
    }

    fn release_of(&mut self, completion: &Completion) {
        if let Some(buffer) = completion.buffer {
            self.ring.release(buffer);
        }
    }

    fn dropped(&self, listener: usize, why: Dropped, datagrams: u32) {
        self.stats.listeners[listener].dropped(why, datagrams);
    }

    // --- The end of flows -------------------------------------------------------------------------------------------

    /// The flow ends with this batch, after what is queued for its sides. What its client says from now on, in the same batch
    /// too, is of another flow: its answers would find nobody here.
    fn over(&mut self, index: u32, reason: CloseReason) {
        self.udp.flows.unname(index);
        let generation = self.udp.flows.generation(index).unwrap_or_default();
        self.udp.over.push((index, generation, reason));
    }

    fn end_udp(&mut self, index: u32, reason: CloseReason) -> Result<(), EnterError> {
        if !self.udp.flows.end(index) {
            return Ok(());
        }
        let token = self.udp_token(Op::Answers, index);
        let Some(flow) = self.udp.flows.get_mut(index) else { return Ok(()) };
        let stats = &self.stats.listeners[usize::from(flow.listener)];
        stats.closed(reason);
        stats.flow_seconds.record(self.now.micros - flow.opened_micros);
        flow.hand_over_moved();
        let (noted, of_listener, opened_micros) = (flow.noted.take(), flow.listener, flow.opened_micros);
        let target = flow.routed.target;
        flow.open = None;
        flow.tried = Vec::new();
        self.udp.kept_bytes -= flow.forget_kept();
        let admitted = flow.admitted;
        if let Some(udp) = &self.listeners[usize::from(of_listener)].udp {
            udp.shared.flows_open.fetch_sub(1, Relaxed);
            if let Some(cid) = flow.cid.take() {
                lock(&udp.shared.cids).forget(&cid, flow.id);
            }
        }
        let (receiving, socket) = (flow.receiving, flow.socket.take());
        self.dismiss(of_listener, admitted);
        self.log_udp(noted, (of_listener, target), opened_micros, reason, None);
        if receiving {
            self.ring.cancel(token)?;
        }
        if let Some(socket) = socket {
            self.ring.close(socket)?;
        }
        if !receiving {
            self.udp.flows.remove(index);
        }
        Ok(())
    }

    pub(super) fn expire_udp(&mut self) -> Result<(), EnterError> {
        let now = self.now.timestamp();
        let mut expired = std::mem::take(&mut self.udp.expired);
        let listeners = &self.listeners;
        let tuning = |flow: &UdpFlow| match &listeners[usize::from(flow.listener)].udp {
            Some(udp) => &udp.tuning,
            None => unreachable!("flows of datagrams are of listeners of datagrams"),
        };
        self.udp.flows.expire(now, tuning, &mut expired);
        for (index, expiry) in expired.drain(..) {
            match expiry {
                Expiry::Idle => self.end_udp(index, CloseReason::Idle)?,
                Expiry::NotRefused => {
                    if let Some(flow) = self.udp.flows.get_mut(index) {
                        self.udp.kept_bytes -= flow.forget_kept();
                        flow.open.iter().for_each(OpenFlow::reached);
                    }
                }
            }
        }
        self.udp.expired = expired;
        Ok(())
    }

    pub(super) fn end_all_udp(&mut self, reason: CloseReason) {
        for index in self.udp.flows.indexes() {
            self.over(index, reason);
        }
    }

    /// While it drains, a listener is needed for what clients of open flows still say.
    fn close_udp_listeners(&mut self) -> Result<(), EnterError> {
        if !self.leaving() || !self.udp.is_empty() {
            return Ok(());
        }
        for (index, listener) in (0..).zip(&mut self.listeners) {
            if listener.udp.is_none() || listener.is_closed() {
                continue;
            }
            let cancelled = std::mem::replace(&mut listener.closing, true);
            for (number, door) in (0..).zip(&mut listener.doors) {
                if !door.armed {
                    door.socket.take().map_or(Ok(()), |socket| self.ring.close(socket))?;
                } else if !cancelled {
                    // Its last completion comes back here.
                    let at = DoorAt { listener: index, door: number };
                    self.ring.cancel(at.token_for(Op::Datagrams))?;
                }
            }
        }
        Ok(())
    }
}

fn lock(cids: &Mutex<Cids<Learned>>) -> std::sync::MutexGuard<'_, Cids<Learned>> {
    // Whoever panicked with it left a map that is whole: each change of it is one call.
    cids.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Whether a send or receive failed because the backend, or the network for it, said no (`icmp(7)`).
fn is_refusal(errno: i32) -> bool {
    [Errno::CONNREFUSED, Errno::HOSTUNREACH, Errno::NETUNREACH, Errno::NOPROTOOPT, Errno::HOSTDOWN]
        .iter()
        .any(|refusal| refusal.raw_os_error() == errno)
}

/// The address without what it is bound to.
fn ip_of(local: Option<Local>) -> Option<IpAddr> {
    local.map(|local| local.ip)
}
