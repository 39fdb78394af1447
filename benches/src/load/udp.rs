//! UDP clients and backends: each flow sends a request of one or more datagrams, waits for the answer of one or more, and
//! goes on. Lost ones are counted, and sent again after [`AGAIN_AFTER`].
//!
//! Trains leave in one call (`UDP_SEGMENT`) and are taken in as they come (`UDP_GRO`), so that the load costs less than what
//! it measures. Every datagram begins with a [`Header`].

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{UdpGroSegment, UdpGsoSegment};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

use super::{Counts, LoadError, PART_SHIFT, Pace, Scratch, TAG_UDP_BACKEND, TAG_UDP_CLIENT, Window};

/// After so long without its whole answer an operation counts as lost and is begun again. Longer than any queue here
/// takes to drain: 1,024 flows at 50,000 datagrams a second wait 20 ms.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
/// How often it is looked for lost ones.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// With no operation completed for so long, nothing will come any more.
const STALLED: Duration = Duration::from_secs(5);
/// Requests that are sent at first before answers are looked at: a burst of all would drown any socket.
const START_AT_ONCE: usize = 32;
/// Receives of a backend before others have their turn.
const RECEIVES_MAX: usize = 64;
/// What a socket of the load may hold: its own queues must not be where datagrams are lost.
const QUEUE_BYTES: usize = 4 << 20;

/// Datagrams that leave together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Train {
    /// How many, 1 or more.
    pub datagrams: usize,
    /// Bytes of each; [`Header::BYTES`] or more, [`Train::BYTES`] where there are several.
    pub bytes: usize,
}

impl Train {
    /// Bytes of a train's datagrams.
    pub const BYTES: usize = 1_200;

    /// One datagram.
    pub const fn single(bytes: usize) -> Self {
        Self { datagrams: 1, bytes }
    }

    /// Several in a row.
    pub const fn of(datagrams: usize) -> Self {
        Self { datagrams, bytes: Self::BYTES }
    }
}

/// What one kind of UDP client does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UdpShape {
    /// Flows at once: a socket each.
    pub flows: usize,
    /// What a client sends.
    pub request: Train,
    /// What a backend answers once it has the last datagram of a request.
    pub response: Train,
    /// When operations start.
    pub pace: Pace,
}

impl UdpShape {
    fn has_trains(&self) -> bool {
        self.request.datagrams.max(self.response.datagrams) > 1
    }
}

/// What every datagram begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    /// Of the operation.
    sequence: u64,
    /// The answer that the request's last datagram asks for; none in all others.
    answer: Option<Train>,
}

impl Header {
    const BYTES: usize = 16;

    fn write(self, to: &mut [u8]) {
        let Train { datagrams, bytes } = self.answer.unwrap_or(Train { datagrams: 0, bytes: 0 });
        to[..8].copy_from_slice(&self.sequence.to_le_bytes());
        to[8..12].copy_from_slice(&(datagrams as u32).to_le_bytes());
        to[12..Self::BYTES].copy_from_slice(&(bytes as u32).to_le_bytes());
    }

    fn read(from: &[u8]) -> Option<Self> {
        let (sequence, rest) = from.split_first_chunk()?;
        let (datagrams, rest) = rest.split_first_chunk()?;
        let (bytes, _) = rest.split_first_chunk()?;
        let sequence = u64::from_le_bytes(*sequence);
        let [datagrams, bytes] = [datagrams, bytes].map(|n| u32::from_le_bytes(*n) as usize);
        let answer = (datagrams > 0).then_some(Train { datagrams, bytes });
        Some(Self { sequence, answer })
    }
}

/// Puts a train with its headers where it is sent from; the last datagram asks for `answer`.
fn write_train(scratch: &mut Scratch, train: Train, sequence: u64, answer: Option<Train>) -> usize {
    for index in 0..train.datagrams {
        let answer = answer.filter(|_| index + 1 == train.datagrams);
        Header { sequence, answer }.write(&mut scratch.bytes[index * train.bytes..]);
    }
    train.datagrams * train.bytes
}

/// Trains out and in on this socket.
fn with_trains(socket: BorrowedFd<'_>) -> io::Result<()> {
    setsockopt(&socket, UdpGsoSegment, &(Train::BYTES as i32))?;
    setsockopt(&socket, UdpGroSegment, &true)?;
    Ok(())
}

fn socket(queue_bytes: usize) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    // Beyond the system's limit where that is allowed, else up to it.
    if sockopt::set_socket_recv_buffer_size_force(&socket, queue_bytes).is_err() {
        sockopt::set_socket_recv_buffer_size(&socket, queue_bytes)?;
    }
    Ok(socket)
}

/// Bytes of one datagram in what a receive brought: a train's, or all of it.
fn stride(trains: bool, received: usize) -> usize {
    if trains { Train::BYTES } else { received.max(1) }
}

/// One socket at each backend's address.
#[derive(Debug)]
pub(super) struct UdpBackends {
    sockets: Vec<OwnedFd>,
    trains: bool,
    pub(super) counts: Counts,
}

impl UdpBackends {
    /// Binds where the backends listen for TCP, if there are UDP clients.
    pub(super) fn bind(
        epoll: BorrowedFd<'_>,
        addresses: &[SocketAddr],
        shapes: &[UdpShape],
    ) -> io::Result<Self> {
        let trains = shapes.iter().any(UdpShape::has_trains);
        let mut sockets = Vec::new();
        for (index, address) in (0_u64..).zip(addresses).filter(|_| !shapes.is_empty()) {
            let socket = socket(QUEUE_BYTES)?;
            rustix::net::bind(&socket, address)?;
            if trains {
                with_trains(socket.as_fd())?;
            }
            epoll::add(epoll, &socket, EventData::new_u64(TAG_UDP_BACKEND | index), EventFlags::IN)?;
            sockets.push(socket);
        }
        Ok(Self { sockets, trains, counts: Counts::default() })
    }

    /// Reads what came and answers what is complete.
    pub(super) fn ready(&mut self, index: usize, scratch: &mut Scratch) -> io::Result<()> {
        for _ in 0..RECEIVES_MAX {
            let socket = &self.sockets[index];
            let (received, from) =
                match rustix::net::recvfrom(socket, &mut *scratch.bytes, RecvFlags::empty()) {
                    Ok((received, _, Some(from))) => (received, from),
                    // An answer's flow is gone (ECONNREFUSED): its client was closed.
                    Ok(_) | Err(Errno::INTR | Errno::CONNREFUSED) => continue,
                    Err(Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                };
            self.counts.backend_bytes += received as u64;
            let mut asked = None;
            for datagram in scratch.bytes[..received].chunks(stride(self.trains, received)) {
                self.counts.datagrams_received += 1;
                asked = Header::read(datagram).filter(|header| header.answer.is_some()).or(asked);
            }
            let Some(Header { sequence, answer: Some(answer) }) = asked else { continue };
            let bytes = write_train(scratch, answer, sequence, None);
            self.counts.datagrams_sent += answer.datagrams as u64;
            match rustix::net::sendto(socket, &scratch.bytes[..bytes], SendFlags::empty(), &from) {
                // What cannot be sent is lost, and counted so.
                Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR | Errno::CONNREFUSED) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The flows of one shape.
#[derive(Debug)]
pub(super) struct UdpClients {
    shape: UdpShape,
    tag: u64,
    flows: Vec<Flow>,
    /// Flows that have not begun yet.
    to_start: usize,
    /// With a rate: flows that wait for an operation.
    resting: Vec<usize>,
    next_due: Instant,
    looked: Instant,
    last_progress: Instant,
    last_error: Option<io::Error>,
    window: Window,
    pub(super) counts: Counts,
}

#[derive(Debug)]
struct Flow {
    socket: OwnedFd,
    sequence: u64,
    /// Datagrams of the answer that have not come; 0: nothing is asked.
    awaited: usize,
    due: Instant,
    sent: Instant,
}

impl UdpClients {
    pub(super) fn new(shape: &UdpShape, part: u64) -> Self {
        let now = Instant::now();
        Self {
            shape: *shape,
            tag: TAG_UDP_CLIENT | part << PART_SHIFT,
            flows: Vec::new(),
            to_start: 0,
            resting: Vec::new(),
            next_due: now,
            looked: now,
            last_progress: now,
            last_error: None,
            window: Window::new(now),
            counts: Counts::default(),
        }
    }

    pub(super) fn open(
        &mut self,
        epoll: BorrowedFd<'_>,
        targets: &[SocketAddr],
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        let now = Instant::now();
        for key in 0..self.shape.flows {
            let socket = socket(QUEUE_BYTES)?;
            rustix::net::connect(&socket, &targets[key % targets.len()])?;
            if self.shape.has_trains() {
                with_trains(socket.as_fd())?;
            }
            let data = EventData::new_u64(self.tag | key as u64);
            epoll::add(epoll, &socket, data, EventFlags::IN | EventFlags::ET)?;
            self.flows.push(Flow { socket, sequence: 0, awaited: 0, due: now, sent: now });
        }
        (self.next_due, self.last_progress) = (now, now);
        match self.shape.pace {
            Pace::Rate(_) => self.resting.extend(0..self.shape.flows),
            Pace::Closed => {
                self.to_start = self.shape.flows;
                self.start_more(now, scratch);
            }
        }
        Ok(())
    }

    /// Begins the next flows; the rest follow with answers or the clock.
    fn start_more(&mut self, now: Instant, scratch: &mut Scratch) {
        for _ in 0..START_AT_ONCE.min(self.to_start) {
            self.to_start -= 1;
            self.begin(self.to_start, now, scratch);
        }
    }

    pub(super) fn begin_window(&mut self) {
        let now = Instant::now();
        self.window = Window::new(now);
        (self.next_due, self.last_progress) = (now, now);
    }

    pub(super) fn end_window(&mut self) -> Window {
        let now = Instant::now();
        let mut window = std::mem::replace(&mut self.window, Window::new(now));
        window.elapsed = now - window.began;
        if let Pace::Rate(rate) = self.shape.pace {
            let began = window.began;
            for flow in self.flows.iter().filter(|flow| flow.awaited > 0 && flow.due >= began) {
                window.record_unfinished(now - flow.due);
            }
            while self.next_due < now {
                window.record_unfinished(now - self.next_due);
                self.next_due += super::period(rate);
            }
        }
        window
    }

    /// With a rate, starts what is due; returns whether the caller must come back at once rather than sleep.
    pub(super) fn start_due(&mut self, now: Instant, scratch: &mut Scratch) -> bool {
        let Pace::Rate(rate) = self.shape.pace else {
            if self.to_start > 0 {
                self.start_more(now, scratch);
            }
            return self.to_start > 0;
        };
        while self.next_due <= now {
            let Some(key) = self.resting.pop() else { break };
            self.begin(key, self.next_due, scratch);
            self.next_due += super::period(rate);
        }
        true
    }

    /// Begins operations again that were lost on the way. Their latency goes on counting from when they were due.
    pub(super) fn send_again(&mut self, now: Instant, scratch: &mut Scratch) {
        if now < self.looked + LOOK_EVERY {
            return;
        }
        self.looked = now;
        for key in 0..self.flows.len() {
            let Flow { awaited, sent, due, .. } = self.flows[key];
            if awaited > 0 && now >= sent + AGAIN_AFTER {
                self.begin(key, due, scratch);
            }
        }
    }

    /// Whether going on makes sense.
    pub(super) fn check(&self, now: Instant) -> Result<(), LoadError> {
        if self.flows.is_empty() || now.saturating_duration_since(self.last_progress) <= STALLED {
            return Ok(());
        }
        let last = self.last_error.as_ref().map_or_else(|| "none".to_owned(), io::Error::to_string);
        Err(LoadError::Stalled { errors: self.window.errors, last })
    }

    pub(super) fn ready(&mut self, key: u64, scratch: &mut Scratch) {
        let key = key as usize;
        let trains = self.shape.has_trains();
        // Until this answer is whole: what comes after it has an edge of its own.
        loop {
            let flow = &mut self.flows[key];
            let received = match rustix::net::recv(&flow.socket, &mut *scratch.bytes, RecvFlags::empty()) {
                Ok((received, _)) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return,
                Err(error) => return self.failed(error.into()),
            };
            self.window.bytes += received as u64;
            let mut of_this = 0;
            for datagram in scratch.bytes[..received].chunks(stride(trains, received)) {
                self.counts.datagrams_received += 1;
                of_this += usize::from(Header::read(datagram).is_some_and(|h| h.sequence == flow.sequence));
            }
            // Those of an operation that was begun again came late.
            if of_this == 0 || flow.awaited == 0 {
                continue;
            }
            flow.awaited = flow.awaited.saturating_sub(of_this);
            if flow.awaited == 0 {
                return self.done(key, scratch);
            }
        }
    }

    fn done(&mut self, key: usize, scratch: &mut Scratch) {
        let now = Instant::now();
        self.last_progress = now;
        self.window.record(self.flows[key].due, now);
        match self.shape.pace {
            Pace::Closed => self.begin(key, now, scratch),
            Pace::Rate(_) => self.resting.push(key),
        }
    }

    fn begin(&mut self, key: usize, due: Instant, scratch: &mut Scratch) {
        let UdpShape { request, response, .. } = self.shape;
        let flow = &mut self.flows[key];
        flow.sequence += 1;
        flow.awaited = response.datagrams;
        flow.due = due;
        flow.sent = Instant::now();
        let bytes = write_train(scratch, request, flow.sequence, Some(response));
        self.counts.datagrams_sent += request.datagrams as u64;
        let sent = rustix::net::send(&flow.socket, &scratch.bytes[..bytes], SendFlags::empty());
        if let Err(error) = sent {
            // It counts as lost and is sent again.
            self.failed(error.into());
        }
    }

    fn failed(&mut self, error: io::Error) {
        self.window.errors += 1;
        self.last_error = Some(error);
    }
}
