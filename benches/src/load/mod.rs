//! The load: clients and the two backends, in one thread around one epoll.
//!
//! It must cost less than what it measures. So it is one thread (no wake-ups between clients and backends), edge
//! triggered (one receive and one send for a small message, nothing that ends in `EAGAIN`), and it discards bulk bytes in
//! the kernel (`MSG_TRUNC`). It checks that as many bytes arrive as were sent and no more; what they are is the
//! end-to-end tests' matter.

mod backends;
mod clients;
mod slots;

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

/// What the load looks like.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Client connections at once.
    pub connections: usize,
    /// Bytes of a request. Not 0.
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

/// What happened between two moments.
#[derive(Debug)]
pub struct Window {
    /// Operations that came to their end.
    pub operations: u64,
    /// Payload bytes delivered, both ways.
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
    events: Vec<Event>,
    scratch: Scratch,
    backends: Backends,
    clients: Clients,
    backend_bytes_before: u64,
    interrupted: Arc<AtomicBool>,
}

/// Event keys carry their kind above the 56 bits that [`slots::Slots`] uses.
const TAG_CLIENT: u64 = 0;
const TAG_BACKEND: u64 = 1 << 56;
const TAG_LISTENER: u64 = 2 << 56;
const TAG_MASK: u64 = 0xff << 56;
/// One registration for a connection's whole life.
const EVERY_EDGE: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET);
/// Events taken at once: all connections of the largest case that has them busy.
const EVENTS_MAX: usize = 512;
/// How long the load sleeps at most before it looks whether it was asked to stop.
const SLEEP_MAX: Duration = Duration::from_millis(100);

impl Load {
    /// Starts the backends; no client yet. Ends early with [`LoadError::Interrupted`] once `interrupted` is set.
    pub fn new(shape: &Shape, interrupted: Arc<AtomicBool>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let backends = Backends::listen(epoll.as_fd(), shape)?;
        let clients = Clients::new(shape);
        let events = Vec::with_capacity(EVENTS_MAX);
        let scratch = Scratch::new();
        Ok(Self { epoll, events, scratch, backends, clients, backend_bytes_before: 0, interrupted })
    }

    /// Where the backends listen.
    pub fn backends(&self) -> &[SocketAddr] {
        self.backends.addresses()
    }

    /// Closes all client connections; those of the next [`Load::open`] are of this shape. The backends stay as they are:
    /// requests and responses must be as long as before.
    pub fn reshape(&mut self, shape: &Shape) {
        self.clients = Clients::new(shape);
    }

    /// Opens the clients' connections, to `targets` in turn: one proxy, or the backends themselves.
    pub fn open(&mut self, targets: &[SocketAddr]) {
        self.clients.open(self.epoll.as_fd(), targets, &mut self.scratch);
    }

    /// Lets the load run for so long.
    pub fn run(&mut self, time: Duration) -> Result<(), LoadError> {
        let end = Instant::now() + time;
        self.run_until(end, |_| false)
    }

    /// With [`After::Hold`]: runs until all connections are open and did their exchange.
    pub fn run_until_held(&mut self, connections: usize, patience: Duration) -> Result<(), LoadError> {
        let end = Instant::now() + patience;
        self.run_until(end, |clients| clients.held() >= connections)?;
        match self.clients.held() {
            held if held >= connections => Ok(()),
            held => {
                Err(LoadError::Stalled { errors: 0, last: format!("{held} of {connections} flows are open") })
            }
        }
    }

    /// Counts from here on.
    pub fn begin_window(&mut self) {
        self.backend_bytes_before = self.backends.bytes_received;
        self.clients.begin_window();
    }

    /// What happened since [`Load::begin_window`].
    pub fn end_window(&mut self) -> Window {
        let mut window = self.clients.end_window();
        window.bytes += self.backends.bytes_received - self.backend_bytes_before;
        window
    }

    fn run_until(&mut self, end: Instant, done: impl Fn(&Clients) -> bool) -> Result<(), LoadError> {
        loop {
            let now = Instant::now();
            if now >= end || done(&self.clients) {
                return Ok(());
            }
            if self.interrupted.load(Ordering::Relaxed) {
                return Err(LoadError::Interrupted);
            }
            self.clients.check(now)?;
            // With a rate it never sleeps: it has a processor of its own, and timers would add their slack to the latency.
            let spins = self.clients.start_due(self.epoll.as_fd(), now, &mut self.scratch);
            let sleep = if spins { Duration::ZERO } else { SLEEP_MAX.min(end - now) };
            self.poll(sleep)?;
        }
    }

    fn poll(&mut self, sleep: Duration) -> io::Result<()> {
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(sleep.subsec_nanos()) };
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            let (data, flags) = (event.data.u64(), event.flags);
            let key = data & !TAG_MASK;
            match data & TAG_MASK {
                TAG_CLIENT => self.clients.ready(self.epoll.as_fd(), key, flags, &mut self.scratch),
                TAG_BACKEND => self.backends.ready(key, flags, &mut self.scratch),
                _ => self.backends.accept(self.epoll.as_fd(), key as usize)?,
            }
        }
        self.events = events;
        Ok(())
    }
}

/// Bytes to send and a place to receive, shared by all connections: nobody looks at what is in them.
#[derive(Debug)]
struct Scratch {
    bytes: Box<[u8]>,
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

    fn load(shape: &Shape) -> Load {
        let mut load = Load::new(shape, Arc::default()).unwrap();
        let backends = load.backends().to_vec();
        load.open(&backends);
        load
    }

    fn shape(after: After, pace: Pace) -> Shape {
        Shape { connections: 8, request_bytes: 64, response_bytes: 16 * 1024, after, pace }
    }

    fn window(load: &mut Load, millis: u64) -> Window {
        load.run(Duration::from_millis(20)).unwrap();
        load.begin_window();
        load.run(Duration::from_millis(millis)).unwrap();
        load.end_window()
    }

    #[test]
    fn closed_loop_counts_what_it_moves() {
        for after in [After::Again, After::Close, After::Reset] {
            let got = window(&mut load(&shape(after, Pace::Closed)), 100);
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
        let got = window(&mut load(&shape(After::Again, Pace::Rate(1000.0))), 500);
        assert!((490..=510).contains(&(got.operations + got.unfinished)), "{got:?}");
        assert_eq!(got.errors, 0);
    }

    #[test]
    fn a_rate_that_cannot_be_kept_shows_in_the_latency() {
        let got = window(&mut load(&shape(After::Again, Pace::Rate(10_000_000.0))), 100);
        assert!(got.unfinished > 0, "{got:?}");
        assert!(
            got.latency.value_at_quantile(0.9) > 20_000_000,
            "what is not done after 100 ms is late: {got:?}"
        );
    }

    #[test]
    fn bulk_is_counted_in_bytes() {
        let bulk = Shape { connections: 2, request_bytes: 16 << 20, ..shape(After::Again, Pace::Closed) };
        let got = window(&mut load(&bulk), 200);
        assert!(got.bytes > 32 << 20 && got.errors == 0, "{got:?}");
    }

    #[test]
    fn holds_what_it_opened() {
        let hold = Shape { connections: 200, ..shape(After::Hold, Pace::Closed) };
        let mut load = load(&hold);
        load.run_until_held(200, Duration::from_secs(10)).unwrap();
        assert_eq!(load.clients.held(), 200);
    }

    #[test]
    fn nobody_there_is_an_error_and_soon() {
        let mut load = Load::new(&shape(After::Again, Pace::Closed), Arc::default()).unwrap();
        let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        load.open(&[gone]);
        let error = load.run(Duration::from_secs(30)).unwrap_err();
        assert!(matches!(error, LoadError::TooManyErrors { .. }), "{error}");
    }

    #[test]
    fn stops_when_asked() {
        let asked = Arc::new(AtomicBool::new(true));
        let mut load = Load::new(&shape(After::Again, Pace::Closed), asked).unwrap();
        assert!(matches!(load.run(Duration::from_secs(30)), Err(LoadError::Interrupted)));
    }
}
