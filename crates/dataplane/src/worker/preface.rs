//! What comes before a flow's bytes: a client's PROXY header and TLS hello, and what a backend is sent first.
//!
//! Owns: looking at the client's first bytes where the kernel keeps them, taking off what is for us, and greeting a backend.
//! Does not own: what the bytes mean (`flow::preface`).
//!
//! Invariants:
//!
//! * what is not for us stays in the kernel: the flow receives it as if nobody had looked;
//! * a poll comes back only for more bytes than were seen (`SO_RCVLOWAT`), and the flow rests where it does so all the same;
//! * a backend's greeting is sent on a fresh socket, whose buffer is empty: if it does not fit, the connect has failed.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use allocation::ConnectFailure;
use flow::preface::proxy::{self, Addresses, Outgoing, Transport, Version};
use flow::preface::{DENIED, Facts, GRANTED, Look, PREFACE_MAX, Preface, Routed, Routes, SSL_REQUEST, Wants};
use flow::{CloseReason, Input, Inspection, Side};
use ipnet::IpNet;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send, sockopt};
use uring::{EnterError, Op};

use super::Worker;
use super::inputs::failure_of;
use super::slot::FlowSlot;
use crate::config::ListenerConfig;
use crate::io::Io;
use crate::stats::Shed;

/// What is looked at first: most hellos and all headers in use are shorter.
const LOOK_AT_FIRST: usize = 4_096;

/// What a listener asks of a flow before it gives it to anybody.
pub(crate) struct Sorter {
    wants: Wants,
    /// Who may send a PROXY header.
    trusted: Vec<IpNet>,
    routes: Routes,
}

/// What is to be done with a new connection.
pub(super) enum Sorted {
    /// It goes there.
    To(Routed),
    /// Its first bytes must be read before.
    Reading(Box<ClientPreface>),
    /// It does not come in.
    Not(Shed),
}

/// What a client sends first, and what came of it. Kept as long as its flow.
pub(super) struct ClientPreface {
    reading: Preface,
    /// A header says who the client is.
    names_client: bool,
    /// The port it came in by.
    port: u16,
    /// So many bytes were there at the last look.
    seen: Option<usize>,
    /// So many are needed.
    need: usize,
    /// As the proxy in front of us says.
    pub(super) addresses: Addresses,
    /// Of its header.
    tlvs: Box<[u8]>,
    /// The name that the client asks for.
    server_name: Option<Box<str>>,
    /// The client was promised TLS, with PostgreSQL's request.
    pub(super) tls_asked: bool,
    /// The backend was asked for it, and has not answered.
    pub(super) asking: bool,
}

/// One worker's memory for prefaces.
pub(super) struct Prefaces {
    /// Made when it is first needed.
    peeked: Vec<u8>,
    scratch: Vec<u8>,
    /// What a backend is sent first.
    greeting: Vec<u8>,
    /// Together they are a flow's unique id.
    seed: u64,
    ids: u64,
}

impl Sorter {
    /// `None`: nothing is asked.
    pub(crate) fn new(config: &ListenerConfig) -> Option<Self> {
        let routes = Routes::new(config.routes.clone());
        if routes.is_empty() && config.proxy.is_none() {
            return None;
        }
        let proxy = config.proxy.as_ref();
        let wants = Wants { proxy: proxy.map(|proxy| proxy.accepts), hello: routes.want_hello() };
        let trusted = proxy.map(|proxy| proxy.trusted.clone()).unwrap_or_default();
        Some(Self { wants, trusted, routes })
    }

    pub(super) fn sort(&self, client: &OwnedFd, port: u16) -> Sorted {
        if self.names_client() && !peer_address(client.as_fd()).is_some_and(|peer| self.trusts(peer)) {
            return Sorted::Not(Shed::ProxyUntrusted);
        }
        if !self.wants.nothing() {
            return Sorted::Reading(Box::new(ClientPreface {
                reading: Preface::new(self.wants),
                names_client: self.names_client(),
                port,
                seen: None,
                need: 1,
                addresses: Addresses::Own,
                tlvs: Box::default(),
                server_name: None,
                tls_asked: false,
                asking: false,
            }));
        }
        let client = self.client_if_wanted(|| peer_address(client.as_fd()));
        Sorted::To(self.routes.select(&Facts { client, port, hello: None }))
    }

    /// Whether headers say who clients are.
    pub(super) fn names_client(&self) -> bool {
        self.wants.proxy.is_some()
    }

    /// Whether a header from there is believed.
    pub(super) fn trusts(&self, peer: SocketAddr) -> bool {
        let peer = peer.ip().to_canonical();
        self.trusted.iter().any(|network| network.contains(&peer))
    }

    /// Where a flow goes of which nothing more will be known.
    pub(super) fn route(&self, client: SocketAddr, port: u16) -> Routed {
        self.routes.select(&Facts { client: Some(client.ip()), port, hello: None })
    }

    fn client_if_wanted(&self, client: impl FnOnce() -> Option<SocketAddr>) -> Option<IpAddr> {
        if self.routes.want_client() { client().map(|address| address.ip()) } else { None }
    }
}

impl ClientPreface {
    /// Whether a header is to say who the client is.
    pub(super) fn names_client(&self) -> bool {
        self.names_client
    }

    /// Whether there is anything to remember once the flow has its target.
    fn says_nothing(&self) -> bool {
        self.addresses == Addresses::Own
            && self.tlvs.is_empty()
            && self.server_name.is_none()
            && !self.tls_asked
    }
}

impl Prefaces {
    pub(super) const fn new(seed: u64) -> Self {
        Self { peeked: Vec::new(), scratch: Vec::new(), greeting: Vec::new(), seed, ids: 0 }
    }

    /// In text, because people read it in logs.
    pub(super) fn unique_id(&mut self) -> String {
        self.ids += 1;
        format!("{:016x}{:016x}", self.seed, self.ids)
    }
}

impl<I: Io> Worker<I> {
    /// Looks at the client's first bytes and tells the flow what it found.
    pub(super) fn inspect(&mut self, index: u32) {
        let Self { flows, listeners, prefaces, stats, .. } = self;
        let Some(slot) = flows.get_mut(index) else { return };
        let listener = usize::from(slot.listener);
        let found = match &listeners[listener].sorter {
            Some(sorter) => look(slot, sorter, prefaces),
            None => Inspection::Done, // It was there when the flow was accepted.
        };
        if found == Inspection::Done {
            if let Some(routed) = stats.listeners[listener].routed.get(usize::from(slot.target)) {
                routed.add(1);
            }
            let named = slot.preface.as_ref().is_some_and(|preface| preface.names_client);
            slot.preface.take_if(|preface| preface.says_nothing());
            if named && let Err(shed) = self.identify(index) {
                self.stats.listeners[listener].shed(shed);
                self.followups.push_back(Input::Abort(CloseReason::Shed));
                return;
            }
        }
        self.followups.push_back(Input::Inspected(found));
    }

    /// The client's header says who it is: its own limits hold from now on.
    fn identify(&mut self, index: u32) -> Result<(), Shed> {
        let Self { flows, listeners, now, .. } = self;
        let Some(slot) = flows.get_mut(index) else { return Ok(()) };
        let client = slot.client_address();
        if let Some(noted) = &mut slot.noted {
            noted.is_of(client);
        }
        match &listeners[usize::from(slot.listener)].gate {
            Some(gate) => gate.identify(&mut slot.admitted, client, now.micros),
            None => Ok(()),
        }
    }

    /// A backend is connected: it is sent its PROXY header, and asked for TLS where the client was promised it.
    pub(super) fn greet(&mut self, index: u32) -> Result<Option<Input>, EnterError> {
        let Self { flows, listeners, prefaces, .. } = self;
        let Some(slot) = flows.get_mut(index) else { return Ok(None) };
        let target = &listeners[usize::from(slot.listener)].targets[usize::from(slot.target)];
        let (proxy, tls_asked) = (target.towards.proxy(), slot.must_ask_for_tls());
        if proxy.is_none() && !tls_asked {
            return Ok(self.connected(index));
        }
        prefaces.greeting.clear();
        if let Some(version) = proxy {
            write_header(slot, version, prefaces);
        }
        if tls_asked {
            prefaces.greeting.extend_from_slice(&SSL_REQUEST);
        }
        let sent = slot.backend.as_ref().is_some_and(|backend| {
            // Before: the client's first bytes follow at once, and must not wait until this is acknowledged.
            let _ = sockopt::set_tcp_nodelay(backend, true);
            send_whole(backend.as_fd(), &prefaces.greeting)
        });
        if !sent {
            self.count_failed_connect(index, Err(ConnectFailure::Refused));
            return Ok(Some(Input::ConnectFailed));
        }
        if let (true, Some(preface)) = (tls_asked, &mut slot.preface) {
            preface.asking = true;
            self.submit(index, Side::Backend, Op::ReadableBackend, I::poll_readable)?;
            return Ok(None);
        }
        Ok(self.connected(index))
    }

    /// The backend answered [`SSL_REQUEST`], or the wait for it was cancelled.
    pub(super) fn tls_answered(&mut self, index: u32, result: i32) -> Result<Option<Input>, EnterError> {
        let Some(slot) = self.flows.get_mut(index).filter(|slot| !slot.flow.is_closed()) else {
            return Ok(None);
        };
        let mut answer = [0];
        let read = match &slot.backend {
            // One byte and no more: what follows is the client's.
            Some(backend) if result >= 0 => {
                recv(backend, &mut answer[..], RecvFlags::DONTWAIT).map(|(n, _)| n)
            }
            _ => Err(Errno::CANCELED),
        };
        if read == Err(Errno::AGAIN) {
            self.submit(index, Side::Backend, Op::ReadableBackend, I::poll_readable)?;
            return Ok(None);
        }
        if let Some(preface) = &mut slot.preface {
            preface.asking = false;
        }
        let why = match (read, answer[0]) {
            (Ok(1), GRANTED) => return Ok(self.connected(index)),
            // It works, but without TLS: another one may have it.
            (Ok(1), DENIED) => Ok(Shed::TlsDenied),
            _ => Err(failure_of(result)),
        };
        self.count_failed_connect(index, why);
        Ok(Some(Input::ConnectFailed))
    }
}

/// Reads on until more bytes are needed.
fn look(slot: &mut FlowSlot, sorter: &Sorter, prefaces: &mut Prefaces) -> Inspection {
    let (Some(client), Some(preface)) = (&slot.client, &mut slot.preface) else { return Inspection::Reset };
    let client = client.as_fd();
    prefaces.peeked.resize(PREFACE_MAX, 0);
    loop {
        let window = &mut prefaces.peeked[..preface.need.clamp(LOOK_AT_FIRST, PREFACE_MAX)];
        let there = if preface.reading.needs_nothing() {
            0
        } else {
            match recv(client, &mut *window, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Inspection::Eof,
                Ok((there, _)) => there,
                Err(Errno::AGAIN | Errno::INTR) => 0,
                Err(_) => return Inspection::Reset,
            }
        };
        match preface.reading.look(&window[..there], &mut prefaces.scratch) {
            Ok(Look::More(need)) => {
                let unchanged = preface.seen.replace(there) == Some(there);
                preface.need = need;
                // If it fails, polls come back early, and the flow rests in between.
                let _ = uring::set_receive_low_water(client, u32::try_from(need).unwrap_or(u32::MAX));
                return if unchanged { Inspection::Unchanged } else { Inspection::Incomplete };
            }
            Ok(Look::Proxied(header)) => {
                (preface.addresses, preface.tlvs) = (header.addresses.clone(), header.tlv_bytes().into());
                let length = header.length;
                if !take(client, &mut prefaces.peeked[..length]) {
                    return Inspection::Reset;
                }
            }
            Ok(Look::Answer { take: bytes, answer }) => {
                if !take(client, &mut prefaces.peeked[..bytes]) || !send_whole(client, &[answer]) {
                    return Inspection::Reset;
                }
            }
            Ok(Look::Done { hello, tls_asked }) => {
                let told = preface.addresses.source();
                let from = sorter.client_if_wanted(|| told.or_else(|| peer_address(client)));
                let facts = Facts { client: from, port: preface.port, hello: hello.as_ref() };
                Routed { route: slot.route, target: slot.target } = sorter.routes.select(&facts);
                preface.server_name = hello.and_then(|hello| hello.server_name).map(Into::into);
                preface.tls_asked = tls_asked;
                let _ = uring::set_receive_low_water(client, 1);
                return Inspection::Done;
            }
            Err(error) => {
                tracing::debug!(client = ?peer_address(client), %error, "refused for what it sent first");
                return Inspection::Invalid;
            }
        }
        // Something was taken off: what is left is looked at anew.
        (preface.seen, preface.need) = (None, 1);
    }
}

/// Appends the header that the backend is sent.
fn write_header(slot: &FlowSlot, version: Version, prefaces: &mut Prefaces) {
    let preface = slot.preface.as_deref();
    let addresses = match preface.map(|preface| &preface.addresses) {
        Some(told @ (Addresses::Inet { .. } | Addresses::Unix(_))) => told.clone(),
        _ => own_addresses(slot),
    };
    match version {
        Version::V1 => proxy::write_v1(&addresses, &mut prefaces.greeting),
        Version::V2 => {
            let id = prefaces.unique_id();
            let name = preface.and_then(|preface| preface.server_name.as_deref());
            let header = Outgoing {
                addresses: &addresses,
                transport: Transport::Stream,
                passed_on: preface.map_or(&[], |preface| &preface.tlvs),
                authority: name.map(str::as_bytes),
                unique_id: Some(id.as_bytes()),
            };
            proxy::write_v2(&header, &mut prefaces.greeting);
        }
    }
}

/// Of the client's connection to us.
fn own_addresses(slot: &FlowSlot) -> Addresses {
    let client = slot.client.as_ref().map(AsFd::as_fd);
    let local = |client: BorrowedFd<'_>| SocketAddr::try_from(rustix::net::getsockname(client).ok()?).ok();
    match (client.and_then(peer_address), client.and_then(local)) {
        (Some(source), Some(destination)) => Addresses::between(source, destination),
        _ => Addresses::Own, // It is gone already.
    }
}

/// `None`: the connection is gone already.
pub(super) fn peer_address(socket: BorrowedFd<'_>) -> Option<SocketAddr> {
    rustix::net::getpeername(socket).ok().flatten().and_then(|address| SocketAddr::try_from(address).ok())
}

/// Takes bytes off that were seen there.
fn take(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> bool {
    let length = bytes.len();
    recv(socket, bytes, RecvFlags::DONTWAIT).is_ok_and(|(taken, _)| taken == length)
}

fn send_whole(socket: BorrowedFd<'_>, bytes: &[u8]) -> bool {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    send(socket, bytes, flags).is_ok_and(|sent| sent == bytes.len())
}
