//! The load: clients and the two backends, TCP and UDP, in one thread around one epoll.
//!
//! It must cost less than what it measures. So it is one thread (no wake-ups between clients and backends), edge
//! triggered (one receive and one send for a small message, nothing that ends in `EAGAIN`), and it discards bulk bytes in
//! the kernel (`MSG_TRUNC`). It checks that as many bytes arrive as were sent and no more; what they are is the
//! end-to-end tests' matter.

mod backends;
mod clients;
mod slots;
mod udp;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::event::epoll::{self, CreateFlags, Event, EventFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use backends::Backends;
use clients::Clients;
pub use udp::{Train, UdpShape};
use udp::{UdpBackends, UdpClients};

/// All that runs at once.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Mix {
    /// Kinds of TCP clients.
    pub tcp: Vec<Shape>,
    /// Kinds of UDP clients.
    pub udp: Vec<UdpShape>,
}

impl From<Shape> for Mix {
    fn from(shape: Shape) -> Self {
        Self { tcp: vec![shape], udp: Vec::new() }
    }
}

/// What one kind of TCP client does.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Client connections at once.
    pub connections: usize,
    /// Bytes of a request. 16 or more: its first say what the exchange is.
    pub request_bytes: usize,
    /// Bytes of a response. Not 0.
    pub response_bytes: usize,
    /// What a client does when it has its response.
    pub after: After,
    /// When operations start.
    pub pace: Pace,
}

/// What a client does when it has its response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The next request on the same connection.
    Again,
    /// Closes in good order and connects anew.
    Close,
    /// Resets (`SO_LINGER` 0) and connects anew.
    Reset,
    /// Nothing: it stays, idle.
    Hold,
}

/// When operations start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// When the one before is done. Hides waiting: a slow proxy is asked less.
    Closed,
    /// So many a second, at even distances, whether or not the ones before are done. An operation's latency counts from when
    /// it was due.
    Rate(f64),
}

/// Why a load could not go on.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The proxy (or the system) refuses; going on would measure errors.
    #[error("{errors} operations failed, the last with: {last}")]
    TooManyErrors {
        /// How many.
        errors: u64,
        /// The last one's reason.
        last: String,
    },
    /// No operation came to its end for 5 s: the proxy does not forward.
    #[error("no operation came to its end for 5 s ({errors} failed, the last with: {last})")]
    Stalled {
        /// How many had failed.
        errors: u64,
        /// The last one's reason.
        last: String,
    },
    /// Somebody asked us to stop.
    #[error("interrupted")]
    Interrupted,
    /// A system call of the load's own failed.
    #[error("the load generator failed: {0}")]
    System(#[from] io::Error),
}

/// What all clients and backends did between two moments.
#[derive(Debug)]
pub struct Windows {
    /// One for each kind of client: TCP, then UDP, in the order of the [`Mix`].
    pub parts: Vec<Window>,
    /// Payload bytes delivered to backends.
    pub backend_bytes: u64,
    /// Datagrams that clients and backends sent.
    pub datagrams_sent: u64,
    /// Datagrams that arrived at one of them.
    pub datagrams_received: u64,
}

/// What one kind of client did between two moments.
#[derive(Debug)]
pub struct Window {
    /// Operations that came to their end.
    pub operations: u64,
    /// Payload bytes delivered to clients.
    pub bytes: u64,
    /// Operations that failed.
    pub errors: u64,
    /// With a rate: operations that were due and not done at the end. They are in the latencies with what they have.
    pub unfinished: u64,
    /// In nanoseconds, 3 digits.
    pub latency: Histogram<u64>,
    /// How long it was.
    pub elapsed: Duration,
    began: Instant,
}

impl Window {
    fn new(began: Instant) -> Self {
        let latency =
            Histogram::new_with_bounds(100, 60_000_000_000, 3).expect("bounds and digits are in range");
        Self { operations: 0, bytes: 0, errors: 0, unfinished: 0, latency, elapsed: Duration::ZERO, began }
    }

    /// An operation that was due before the window counts, but its latency would hold the pause between the windows.
    fn record(&mut self, due: Instant, now: Instant) {
        self.operations += 1;
        if due >= self.began {
            self.latency.saturating_record((now - due).as_nanos() as u64);
        }
    }

    fn record_unfinished(&mut self, so_far: Duration) {
        self.unfinished += 1;
        self.latency.saturating_record(so_far.as_nanos() as u64);
    }
}

/// Clients and backends of one measurement.
pub struct Load {
    epoll: OwnedFd,
    scratch: Scratch,
    backends: Backends,
    udp_backends: UdpBackends,
    clients: Vec<Clients>,
    udp_clients: Vec<UdpClients>,
    before: Counts,
    interrupted: Arc<AtomicBool>,
}

/// What is counted for ever, and taken as differences.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    backend_bytes: u64,
    datagrams_sent: u64,
    datagrams_received: u64,
}

/// Event keys carry whose they are above the 56 bits that [`slots::Slots`] uses: the kind of socket in the upper four, the
/// kind of client in the lower four.
const TAG_CLIENT: u64 = 0;
const TAG_BACKEND: u64 = 1 << 60;
const TAG_LISTENER: u64 = 2 << 60;
const TAG_UDP_CLIENT: u64 = 3 << 60;
const TAG_UDP_BACKEND: u64 = 4 << 60;
const TAG_MASK: u64 = 0xf << 60;
const PART_SHIFT: u32 = 56;
const KEY_MASK: u64 = (1 << PART_SHIFT) - 1;
/// One registration for a connection's whole life.
const EVERY_EDGE: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET);
/// Events taken at once: all connections of the largest case that has them busy.
const EVENTS_MAX: usize = 512;
/// How long the load sleeps at most before it looks whether it was asked to stop.
const SLEEP_MAX: Duration = Duration::from_millis(100);

impl Load {
    /// Starts the backends; no client yet. Ends early with [`LoadError::Interrupted`] once `interrupted` is set.
    pub fn new(mix: &Mix, interrupted: Arc<AtomicBool>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let backends = Backends::listen(epoll.as_fd())?;
        let udp_backends = UdpBackends::bind(epoll.as_fd(), backends.addresses(), &mix.udp)?;
        let mut load = Self {
            epoll,
            scratch: Scratch::new(),
            backends,
            udp_backends,
            clients: Vec::new(),
            udp_clients: Vec::new(),
            before: Counts::default(),
            interrupted,
        };
        load.reshape(mix);
        Ok(load)
    }

    /// Where the backends listen, for TCP and for UDP.
    pub fn backends(&self) -> &[SocketAddr] {
        self.backends.addresses()
    }

    /// Closes all clients' sockets; those of the next [`Load::open`] are of this mix. The backends stay as they are.
    pub fn reshape(&mut self, mix: &Mix) {
        self.clients = (0..).zip(&mix.tcp).map(|(part, shape)| Clients::new(shape, part)).collect();
        let parts = self.clients.len() as u64..;
        self.udp_clients = parts.zip(&mix.udp).map(|(part, shape)| UdpClients::new(shape, part)).collect();
    }

    /// Opens the clients' connections, to `targets` in turn: one proxy, or the backends themselves.
    pub fn open(&mut self, targets: &[SocketAddr]) -> io::Result<()> {
        for clients in &mut self.clients {
            clients.open(self.epoll.as_fd(), targets, &mut self.scratch);
        }
        for clients in &mut self.udp_clients {
            clients.open(self.epoll.as_fd(), targets, &mut self.scratch)?;
        }
        Ok(())
    }

    /// Lets the load run for so long.
    pub fn run(&mut self, time: Duration) -> Result<(), LoadError> {
        let end = Instant::now() + time;
        self.run_until(end, |_| false)
    }

    /// With [`After::Hold`]: runs until all connections are open and did their exchange.
    pub fn run_until_held(&mut self, connections: usize, patience: Duration) -> Result<(), LoadError> {
        let end = Instant::now() + patience;
        let held = |clients: &[Clients]| clients.iter().map(Clients::held).sum::<usize>();
        self.run_until(end, |clients| held(clients) >= connections)?;
        match held(&self.clients) {
            held if held >= connections => Ok(()),
            held => {
                Err(LoadError::Stalled { errors: 0, last: format!("{held} of {connections} flows are open") })
            }
        }
    }

    /// Counts from here on.
    pub fn begin_window(&mut self) {
        self.before = self.counts();
        self.clients.iter_mut().for_each(Clients::begin_window);
        self.udp_clients.iter_mut().for_each(UdpClients::begin_window);
    }

    /// What happened since [`Load::begin_window`].
    pub fn end_window(&mut self) -> Windows {
        let mut parts: Vec<Window> = self.clients.iter_mut().map(Clients::end_window).collect();
        parts.extend(self.udp_clients.iter_mut().map(UdpClients::end_window));
        let (now, before) = (self.counts(), self.before);
        Windows {
            parts,
            backend_bytes: now.backend_bytes - before.backend_bytes,
            datagrams_sent: now.datagrams_sent - before.datagrams_sent,
            datagrams_received: now.datagrams_received - before.datagrams_received,
        }
    }

    fn counts(&self) -> Counts {
        let mut counts = self.udp_backends.counts;
        counts.backend_bytes += self.backends.bytes_received;
        for clients in &self.udp_clients {
            counts.datagrams_sent += clients.counts.datagrams_sent;
            counts.datagrams_received += clients.counts.datagrams_received;
        }
        counts
    }

    fn run_until(&mut self, end: Instant, done: impl Fn(&[Clients]) -> bool) -> Result<(), LoadError> {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        loop {
            let now = Instant::now();
            if now >= end || done(&self.clients) {
                return Ok(());
            }
            if self.interrupted.load(Ordering::Relaxed) {
                return Err(LoadError::Interrupted);
            }
            let mut sleep = SLEEP_MAX.min(end - now);
            for clients in &mut self.clients {
                clients.check(now)?;
                // With a rate it never sleeps: it has a processor of its own, and timers would add their slack to the
                // latency.
                if clients.start_due(self.epoll.as_fd(), now, &mut self.scratch) {
                    sleep = Duration::ZERO;
                }
            }
            for clients in &mut self.udp_clients {
                clients.check(now)?;
                clients.send_again(now, &mut self.scratch);
                if clients.start_due(now, &mut self.scratch) {
                    sleep = Duration::ZERO;
                }
            }
            self.poll(&mut events, sleep)?;
        }
    }

    fn poll(&mut self, events: &mut Vec<Event>, sleep: Duration) -> io::Result<()> {
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(sleep.subsec_nanos()) };
        events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let Self { epoll, scratch, backends, udp_backends, clients, udp_clients, .. } = self;
        let epoll = epoll.as_fd();
        for event in events.iter() {
            let (data, flags) = (event.data.u64(), event.flags);
            let (key, part) = (data & KEY_MASK, ((data & !TAG_MASK) >> PART_SHIFT) as usize);
            match data & TAG_MASK {
                TAG_CLIENT => clients[part].ready(epoll, key, flags, scratch),
                TAG_BACKEND => backends.ready(key, flags, scratch),
                TAG_UDP_CLIENT => udp_clients[part - clients.len()].ready(key, scratch),
                TAG_UDP_BACKEND => udp_backends.ready(key as usize, scratch)?,
                _ => backends.accept(epoll, key as usize)?,
            }
        }
        Ok(())
    }
}

/// How far operations at a rate are apart.
fn period(rate: f64) -> Duration {
    Duration::from_secs_f64(1.0 / rate)
}

/// Bytes to send and a place to receive, shared by all connections: nobody looks at what is in them, but for the first few,
/// which are written just before they are sent.
#[derive(Debug)]
struct Scratch {
    bytes: Box<[u8]>,
}

/// What a TCP connection exchanges, over and over: its first request begins with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Exchange {
    request_bytes: usize,
    response_bytes: usize,
}

impl Exchange {
    const BYTES: usize = 16;

    fn write(self, to: &mut [u8]) {
        to[..8].copy_from_slice(&(self.request_bytes as u64).to_le_bytes());
        to[8..Self::BYTES].copy_from_slice(&(self.response_bytes as u64).to_le_bytes());
    }

    /// None where it is too short or makes no sense.
    fn read(from: &[u8]) -> Option<Self> {
        let (request, rest) = from.split_first_chunk()?;
        let (response, _) = rest.split_first_chunk()?;
        let [request_bytes, response_bytes] =
            [request, response].map(|bytes| u64::from_le_bytes(*bytes) as usize);
        (request_bytes > 0).then_some(Self { request_bytes, response_bytes })
    }
}

/// What a receive or send brought.
struct Moved {
    bytes: usize,
    /// Why no more will come or go.
    end: Option<io::Error>,
}

impl Scratch {
    /// Big enough that a bulk transfer takes few calls, small enough to stay in a core's second-level cache.
    const BYTES: usize = 256 * 1024;

    fn new() -> Self {
        Self { bytes: vec![0x55; Self::BYTES].into() }
    }

    /// Receives all there is. A short read means that there is no more for now (and a new edge will come), unless the
    /// event said that the peer has `ended`: then the end is read as well.
    fn receive_all(&mut self, socket: BorrowedFd<'_>, discard: bool, ended: bool) -> Moved {
        let flags = if discard { RecvFlags::TRUNC } else { RecvFlags::empty() };
        let mut bytes = 0;
        let end = loop {
            match rustix::net::recv(socket, &mut *self.bytes, flags) {
                Ok((0, _)) => break Some(io::ErrorKind::UnexpectedEof.into()),
                Ok((received, _)) => {
                    bytes += received;
                    if received < self.bytes.len() && !ended {
                        break None;
                    }
                }
                Err(Errno::AGAIN) => break None,
                Err(Errno::INTR) => {}
                Err(error) => break Some(error.into()),
            }
        };
        Moved { bytes, end }
    }

    /// Receives once. The error is the end; none where there is nothing for now.
    fn receive_once(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Option<io::Error>> {
        match rustix::net::recv(socket, &mut *self.bytes, RecvFlags::empty()) {
            Ok((0, _)) => Err(Some(io::ErrorKind::UnexpectedEof.into())),
            Ok((received, _)) => Ok(received),
            Err(Errno::AGAIN | Errno::INTR) => Err(None),
            Err(error) => Err(Some(error.into())),
        }
    }

    /// Sends up to `count` bytes, as many as the socket takes now.
    fn send_all(&self, socket: BorrowedFd<'_>, count: usize) -> Moved {
        let mut bytes = 0;
        let end = loop {
            if bytes == count {
                break None;
            }
            let chunk = &self.bytes[..(count - bytes).min(self.bytes.len())];
            match rustix::net::send(socket, chunk, SendFlags::NOSIGNAL) {
                Ok(sent) => bytes += sent,
                Err(Errno::AGAIN) => break None,
                Err(Errno::INTR) => {}
                Err(error) => break Some(error.into()),
            }
        };
        Moved { bytes, end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(mix: impl Into<Mix>) -> Load {
        let mut load = Load::new(&mix.into(), Arc::default()).unwrap();
        let backends = load.backends().to_vec();
        load.open(&backends).unwrap();
        load
    }

    fn shape(after: After, pace: Pace) -> Shape {
        Shape { connections: 8, request_bytes: 64, response_bytes: 16 * 1024, after, pace }
    }

    fn windows(load: &mut Load, millis: u64) -> Windows {
        load.run(Duration::from_millis(20)).unwrap();
        load.begin_window();
        load.run(Duration::from_millis(millis)).unwrap();
        load.end_window()
    }

    /// Of a load of one kind; with the bytes that backends got.
    fn window(load: &mut Load, millis: u64) -> Window {
        let mut got = windows(load, millis);
        let mut part = got.parts.remove(0);
        part.bytes += got.backend_bytes;
        part
    }

    #[test]
    fn closed_loop_counts_what_it_moves() {
        for after in [After::Again, After::Close, After::Reset] {
            let got = window(&mut load(shape(after, Pace::Closed)), 100);
            assert!(got.operations > 100 && got.errors == 0, "{after:?}: {got:?}");
            // Up to 8 exchanges are cut at each end of the window.
            let exchanges = got.bytes as f64 / f64::from(64 + 16 * 1024);
            assert!((exchanges - got.operations as f64).abs() <= 16.0, "{after:?}: {exchanges} {got:?}");
            assert!(
                got.latency.len() <= got.operations && got.latency.len() + 8 >= got.operations,
                "{after:?}"
            );
        }
    }

    #[test]
    fn a_rate_is_kept_and_counts_from_when_it_was_due() {
        let got = window(&mut load(shape(After::Again, Pace::Rate(1000.0))), 500);
        // A machine that is busy makes the window longer, and more is due in it.
        let (came, due) = (got.operations + got.unfinished, got.elapsed.as_millis() as u64);
        assert!(came.abs_diff(due) <= 10, "{came} operations in {due} ms");
        assert_eq!(got.errors, 0);
    }

    #[test]
    fn a_rate_that_cannot_be_kept_shows_in_the_latency() {
        let got = window(&mut load(shape(After::Again, Pace::Rate(10_000_000.0))), 100);
        assert!(got.unfinished > 0, "{got:?}");
        assert!(
            got.latency.value_at_quantile(0.9) > 20_000_000,
            "what is not done after 100 ms is late: {got:?}"
        );
    }

    #[test]
    fn bulk_is_counted_in_bytes() {
        let bulk = Shape { connections: 2, request_bytes: 16 << 20, ..shape(After::Again, Pace::Closed) };
        let got = window(&mut load(bulk), 200);
        assert!(got.bytes > 32 << 20 && got.errors == 0, "{got:?}");
    }

    fn udp(flows: usize, request: Train, response: Train, pace: Pace) -> UdpShape {
        UdpShape { flows, request, response, pace }
    }

    #[test]
    fn datagrams_are_answered_and_none_is_lost() {
        let single = Train::single(64);
        let echo = udp(64, single, single, Pace::Closed);
        let mut load = load(Mix { tcp: Vec::new(), udp: vec![echo] });
        let got = windows(&mut load, 100);
        let part = &got.parts[0];
        assert!(part.operations > 100 && part.errors == 0, "{got:?}");
        // Two datagrams an operation; what is under way at either end of the window is in one of the counts.
        assert!(got.datagrams_received.abs_diff(part.operations * 2) <= 128, "{got:?}");
        assert!(got.datagrams_sent.abs_diff(got.datagrams_received) <= 128, "{got:?}");
        assert_eq!(part.bytes + got.backend_bytes, got.datagrams_received * 64);
    }

    #[test]
    fn trains_are_counted_datagram_by_datagram() {
        let (single, train) = (Train::single(64), Train::of(16));
        let up = udp(2, train, single, Pace::Closed);
        let down = udp(2, single, train, Pace::Closed);
        let got = windows(&mut load(Mix { tcp: Vec::new(), udp: vec![up, down] }), 100);
        for part in &got.parts {
            assert!(part.operations > 50 && part.errors == 0, "{got:?}");
        }
        let operations: u64 = got.parts.iter().map(|part| part.operations).sum();
        assert!(got.datagrams_received.abs_diff(operations * 17) <= 4 * 17 * 2, "{got:?}");
    }

    #[test]
    fn nobody_who_answers_is_an_error() {
        let shape = udp(2, Train::single(64), Train::single(64), Pace::Closed);
        let mut load = Load::new(&Mix { tcp: Vec::new(), udp: vec![shape] }, Arc::default()).unwrap();
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        load.open(&[silent.local_addr().unwrap()]).unwrap();
        let error = load.run(Duration::from_secs(30)).unwrap_err();
        assert!(matches!(error, LoadError::Stalled { .. }), "{error}");
    }

    #[test]
    fn kinds_run_side_by_side_and_keep_their_rates() {
        let rate = |connections, response_bytes, after, rate| Shape {
            connections,
            response_bytes,
            pace: Pace::Rate(rate),
            ..shape(after, Pace::Closed)
        };
        let tcp = vec![rate(8, 64, After::Again, 500.0), rate(4, 1 << 20, After::Close, 50.0)];
        let single = Train::single(64);
        let got = windows(&mut load(Mix { tcp, udp: vec![udp(8, single, single, Pace::Rate(500.0))] }), 500);
        let done: Vec<u64> = got.parts.iter().map(|part| part.operations + part.unfinished).collect();
        assert!((240..=260).contains(&done[0]) && (240..=260).contains(&done[2]), "{done:?}");
        assert!((23..=27).contains(&done[1]), "{done:?}");
        let megabytes = got.parts[1].bytes as f64 / f64::from(1 << 20);
        assert!(
            (megabytes - got.parts[1].operations as f64).abs() < 5.0,
            "each got what it asked for: {got:?}"
        );
    }

    #[test]
    fn holds_what_it_opened() {
        let hold = Shape { connections: 200, ..shape(After::Hold, Pace::Closed) };
        let mut load = load(hold);
        load.run_until_held(200, Duration::from_secs(10)).unwrap();
        assert_eq!(load.clients[0].held(), 200);
    }

    #[test]
    fn nobody_there_is_an_error_and_soon() {
        let mut load = Load::new(&shape(After::Again, Pace::Closed).into(), Arc::default()).unwrap();
        let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        load.open(&[gone]).unwrap();
        let error = load.run(Duration::from_secs(30)).unwrap_err();
        assert!(matches!(error, LoadError::TooManyErrors { .. }), "{error}");
    }

    #[test]
    fn stops_when_asked() {
        let asked = Arc::new(AtomicBool::new(true));
        let mut load = Load::new(&shape(After::Again, Pace::Closed).into(), asked).unwrap();
        assert!(matches!(load.run(Duration::from_secs(30)), Err(LoadError::Interrupted)));
    }
}
