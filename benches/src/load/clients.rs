//! The clients: each connection is one small state machine that sends a request, receives the response, and goes on as
//! the shape says.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::slots::Slots;
use super::{
    After, EVERY_EDGE, Exchange, LoadError, Moved, PART_SHIFT, Pace, Scratch, Shape, TAG_CLIENT, TAG_MASK,
    Window,
};

/// Failed operations after which a measurement is given up: a proxy that refuses would otherwise be asked forever.
const ERRORS_MAX: u64 = 1000;
/// With no operation completed for so long, nothing will come any more.
const STALLED: Duration = Duration::from_secs(5);
/// Connections that [`After::Hold`] opens at the same time: below every listener's backlog.
const OPENING_MAX: usize = 64;
/// Source ports, below those that the system gives to others.
const SOURCE_PORT_FIRST: u16 = 10_000;
const SOURCE_PORTS: usize = 20_000;
/// Source addresses that may be in use by somebody in a row.
const SOURCE_TRIES: usize = 16;

#[derive(Debug)]
pub(super) struct Clients {
    shape: Shape,
    /// What its event keys carry.
    tag: u64,
    targets: Vec<SocketAddr>,
    /// Connections opened so far; the next goes to the target whose turn it is.
    opened: usize,
    /// Source addresses used so far.
    sources: usize,
    /// How many of [`After::Hold`] are still to be opened.
    to_hold: usize,
    held: usize,
    connections: Slots<Connection>,
    /// With a rate: connections that wait for an operation, the longest waiting first out last (any will do).
    resting: Vec<u64>,
    next_due: Instant,
    errors_in_all: u64,
    last_error: Option<io::Error>,
    last_progress: Instant,
    pub(super) window: Window,
}

#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    to_send: usize,
    to_receive: usize,
    /// When the operation was due: sent, or by the rate's clock.
    due: Instant,
}

/// How a connection stands after an event.
enum Standing {
    Busy,
    Done,
    Failed(io::Error),
}

impl Clients {
    pub(super) fn new(shape: &Shape, part: u64) -> Self {
        let now = Instant::now();
        Self {
            shape: shape.clone(),
            tag: TAG_CLIENT | part << PART_SHIFT,
            targets: Vec::new(),
            opened: 0,
            sources: 0,
            to_hold: 0,
            held: 0,
            connections: Slots::default(),
            resting: Vec::new(),
            next_due: now,
            errors_in_all: 0,
            last_error: None,
            last_progress: now,
            window: Window::new(now),
        }
    }

    /// Opens the connections of the shape; they go to `targets` in turn.
    pub(super) fn open(&mut self, epoll: BorrowedFd<'_>, targets: &[SocketAddr], scratch: &mut Scratch) {
        targets.clone_into(&mut self.targets);
        self.last_progress = Instant::now();
        self.next_due = self.last_progress;
        let now = match self.shape.after {
            After::Hold => self.shape.connections.min(OPENING_MAX),
            _ => self.shape.connections,
        };
        self.to_hold = self.shape.connections - now;
        for _ in 0..now {
            self.connect(epoll, scratch);
        }
    }

    /// Connections that did their exchange and stay open.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Counts from here on; what was due before is not in the latencies.
    pub(super) fn begin_window(&mut self) {
        let now = Instant::now();
        self.window = Window::new(now);
        self.next_due = now;
        self.last_progress = now;
    }

    /// Ends the window. With a rate, what is late by now counts with the latency it has so far.
    pub(super) fn end_window(&mut self) -> Window {
        let now = Instant::now();
        let mut window = std::mem::replace(&mut self.window, Window::new(now));
        window.elapsed = now - window.began;
        if let Pace::Rate(rate) = self.shape.pace {
            let began = window.began;
            let late: Vec<Instant> =
                self.connections.values().filter(|c| c.to_receive > 0).map(|c| c.due).collect();
            for due in late.into_iter().filter(|due| *due >= began) {
                window.record_unfinished(now - due);
            }
            while self.next_due < now {
                window.record_unfinished(now - self.next_due);
                self.next_due += super::period(rate);
            }
        }
        window
    }

    /// With a rate, starts what is due; returns whether the caller must come back at once rather than sleep.
    pub(super) fn start_due(&mut self, epoll: BorrowedFd<'_>, now: Instant, scratch: &mut Scratch) -> bool {
        let Pace::Rate(rate) = self.shape.pace else { return false };
        while self.next_due <= now {
            let Some(key) = self.resting.pop() else { break };
            self.begin(epoll, key, self.next_due, scratch);
            self.next_due += super::period(rate);
        }
        true
    }

    pub(super) fn ready(
        &mut self,
        epoll: BorrowedFd<'_>,
        key: u64,
        flags: EventFlags,
        scratch: &mut Scratch,
    ) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let standing = connection.advance(flags, scratch, &self.shape, &mut self.window.bytes);
        match standing {
            Standing::Busy => {}
            Standing::Done => self.done(epoll, key, scratch),
            Standing::Failed(error) => self.failed(epoll, key, error, scratch),
        }
    }

    /// Whether going on makes sense.
    pub(super) fn check(&self, now: Instant) -> Result<(), LoadError> {
        let last = || self.last_error.as_ref().map_or_else(|| "none".to_owned(), io::Error::to_string);
        if self.errors_in_all > ERRORS_MAX {
            return Err(LoadError::TooManyErrors { errors: self.errors_in_all, last: last() });
        }
        if now.saturating_duration_since(self.last_progress) > STALLED {
            return Err(LoadError::Stalled { errors: self.errors_in_all, last: last() });
        }
        Ok(())
    }

    fn connect(&mut self, epoll: BorrowedFd<'_>, scratch: &mut Scratch) {
        let target = self.targets[self.opened % self.targets.len()];
        self.opened += 1;
        let due = Instant::now();
        let key = match self.next_socket(target) {
            Ok(socket) => self.connections.insert(Connection { socket, to_send: 0, to_receive: 0, due }),
            Err(error) => return self.count_error(error),
        };
        let socket = self.connections.get_mut(key).expect("it was inserted above").socket.as_fd();
        match epoll::add(epoll, socket, EventData::new_u64(self.tag | key), EVERY_EDGE) {
            Ok(()) if matches!(self.shape.pace, Pace::Rate(_)) => self.resting.push(key),
            Ok(()) => self.begin(epoll, key, due, scratch),
            Err(error) => self.failed(epoll, key, error.into(), scratch),
        }
    }

    fn next_socket(&mut self, target: SocketAddr) -> io::Result<OwnedFd> {
        let mut result = Err(io::ErrorKind::AddrInUse.into());
        for _ in 0..SOURCE_TRIES {
            result = open_socket(source(self.part(), self.sources), target);
            self.sources += 1;
            if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::AddrInUse) {
                break;
            }
        }
        result
    }

    fn part(&self) -> usize {
        ((self.tag & !TAG_MASK) >> PART_SHIFT) as usize
    }

    /// Starts an operation on a connection that has none.
    fn begin(&mut self, epoll: BorrowedFd<'_>, key: u64, due: Instant, scratch: &mut Scratch) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.due = due;
        connection.to_send = self.shape.request_bytes;
        connection.to_receive = self.shape.response_bytes;
        // Nearly always it can be sent at once: the peer's last bytes came after it had read ours. On loopback even
        // the handshake is over by now.
        if let Standing::Failed(error) = connection.send(scratch, &self.shape) {
            self.failed(epoll, key, error, scratch);
        }
    }

    fn done(&mut self, epoll: BorrowedFd<'_>, key: u64, scratch: &mut Scratch) {
        let now = Instant::now();
        self.last_progress = now;
        if let Some(connection) = self.connections.get_mut(key) {
            self.window.record(connection.due, now);
        }
        match (self.shape.after, self.shape.pace) {
            (After::Again, Pace::Closed) => self.begin(epoll, key, now, scratch),
            (After::Again, Pace::Rate(_)) => self.resting.push(key),
            (After::Hold, _) => {
                self.held += 1;
                self.open_next_to_hold(epoll, scratch);
            }
            (After::Close, _) => {
                self.connections.remove(key);
                self.connect(epoll, scratch);
            }
            (After::Reset, _) => {
                if let Some(connection) = self.connections.remove(key)
                    && let Err(error) = sockopt::set_socket_linger(&connection.socket, Some(Duration::ZERO))
                {
                    self.count_error(error.into());
                }
                self.connect(epoll, scratch);
            }
        }
    }

    fn failed(&mut self, epoll: BorrowedFd<'_>, key: u64, error: io::Error, scratch: &mut Scratch) {
        let was_held = self.shape.after == After::Hold
            && self.connections.get_mut(key).is_some_and(|c| c.to_send == 0 && c.to_receive == 0);
        self.connections.remove(key);
        self.resting.retain(|resting| *resting != key);
        self.count_error(error);
        if was_held {
            self.held -= 1;
        }
        // `check` ends the run where this goes on failing.
        if self.errors_in_all <= ERRORS_MAX {
            self.connect(epoll, scratch);
        }
    }

    fn open_next_to_hold(&mut self, epoll: BorrowedFd<'_>, scratch: &mut Scratch) {
        if self.to_hold > 0 {
            self.to_hold -= 1;
            self.connect(epoll, scratch);
        }
    }

    fn count_error(&mut self, error: io::Error) {
        self.errors_in_all += 1;
        self.window.errors += 1;
        self.last_error = Some(error);
    }
}

impl Connection {
    fn advance(
        &mut self,
        flags: EventFlags,
        scratch: &mut Scratch,
        shape: &Shape,
        bytes_received: &mut u64,
    ) -> Standing {
        let ended = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        if self.to_send > 0
            && flags.contains(EventFlags::OUT)
            && let Standing::Failed(error) = self.send(scratch, shape)
        {
            return Standing::Failed(error);
        }
        if !(ended || flags.contains(EventFlags::IN)) {
            return Standing::Busy;
        }
        let bulk = shape.response_bytes > scratch.bytes.len();
        let Moved { bytes, end } = scratch.receive_all(self.socket.as_fd(), bulk, ended);
        *bytes_received += bytes as u64;
        if bytes > self.to_receive {
            return Standing::Failed(io::Error::other("more bytes came than the backend sent"));
        }
        let completes = self.to_receive > 0 && bytes == self.to_receive;
        self.to_receive -= bytes;
        match end {
            _ if completes && self.to_send == 0 => Standing::Done,
            Some(error) => Standing::Failed(error),
            None => Standing::Busy,
        }
    }

    fn send(&mut self, scratch: &mut Scratch, shape: &Shape) -> Standing {
        if self.to_send == shape.request_bytes {
            let Shape { request_bytes, response_bytes, .. } = *shape;
            Exchange { request_bytes, response_bytes }.write(&mut scratch.bytes);
        }
        let Moved { bytes, end } = scratch.send_all(self.socket.as_fd(), self.to_send);
        self.to_send -= bytes;
        match end {
            Some(error) => Standing::Failed(error),
            None => Standing::Busy,
        }
    }
}

/// A socket that is connecting, or has already.
fn open_socket(source: SocketAddrV4, target: SocketAddr) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &source)?;
    match rustix::net::connect(&socket, &target) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// The address of the n-th connection. Chosen here, because tens of thousands of closed connections a few seconds old
/// (`TIME_WAIT`) would make the system's search for a free port slow, and in the end fail.
/// Each kind of client has a network of its own.
fn source(part: usize, n: usize) -> SocketAddrV4 {
    let (port, address) = (n % SOURCE_PORTS, n / SOURCE_PORTS % 65_536);
    SocketAddrV4::new(
        Ipv4Addr::new(127, 100 + part as u8, (address >> 8) as u8, address as u8),
        SOURCE_PORT_FIRST + port as u16,
    )
}
