//! The engine for where io_uring is denied: the ring's operations and completions, imitated with `epoll(7)` and system
//! calls that do not wait.
//!
//! Owns: one epoll instance, what is in flight, the receive buffers. Does not own the sockets until they are given to
//! [`Io::close`]. Every descriptor is registered once, edge-triggered for both directions, at its first operation that has to
//! wait; what epoll said of it is remembered until a system call finds it no longer true. Invariants:
//!
//! * whoever waits for an edge has seen its descriptor not ready before: a read or write that said `EAGAIN` or came short,
//!   or a registration, which epoll answers with an edge of its own where the descriptor is ready already;
//! * polls are registered anew, which makes epoll look: the splices between two of them tell this engine nothing;
//! * one descriptor makes so many system calls a turn and then waits for the next one: nobody starves the others;
//! * the loop sleeps in `epoll_wait` unless completions wait to be taken, or a descriptor is known to be ready for an
//!   operation that is there. Each such turn moves bytes or ends an operation.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};
use uring::{
    BufferPool, Completion, Datagrams, EnterError, Group, Lent, Local, Part, Setup, SetupError, Token, Wait,
};

use super::readiness::{Mix, Turn, accept, begin_connect, receive_datagrams, send_datagrams, send_headed};
use crate::io::Io;

/// Buffers that one multishot receive fills a turn: the kernel's own bound for a ring is 32, of which a half takes 8 at most.
const READS_A_TURN: usize = 8;
/// Events that are taken a turn; what is left is there at the next one.
const EVENTS: usize = 512;
/// Longest sleep. Nothing hangs on it: it keeps times within what a millisecond count can say.
const SLEEP_MAX: Duration = Duration::from_secs(3_600);

/// One worker's epoll instance.
pub(crate) struct Epoll {
    epoll: OwnedFd,
    pool: BufferPool,
    sources: HashMap<RawFd, Source, BuildHasherDefault<Mix>>,
    /// Whose operations are in flight on which descriptor.
    places: HashMap<Token, RawFd, BuildHasherDefault<Mix>>,
    /// Descriptors with an operation that can go on now.
    runnable: VecDeque<RawFd>,
    done: Vec<Completion>,
    events: Vec<epoll::Event>,
    enters: u64,
}

/// One descriptor: what is in flight on it, and what is known of it.
#[derive(Debug)]
struct Source {
    file: Lent,
    read: Option<Read>,
    write: Option<Write>,
    /// Who is told of an error.
    watch: Option<Token>,
    /// There may be something to read.
    readable: bool,
    /// The peer's FIN or an error has been seen: a short read is not yet the last one.
    ending: bool,
    /// A send found no room.
    blocked: bool,
    /// It is in `runnable`.
    queued: bool,
}

#[derive(Debug, Clone, Copy)]
enum Read {
    Accept(Token),
    Many(Token),
    Once(Token, Group),
    Datagrams { token: Token, connected: bool },
    Poll(Token),
}

#[derive(Debug, Clone, Copy)]
enum Write {
    Connect(Token),
    Send { token: Token, buffer: u16, start: u32, length: u32, sent: u32 },
    Poll(Token),
}

impl Source {
    const fn new(file: Lent) -> Self {
        Self {
            file,
            read: None,
            write: None,
            watch: None,
            readable: false,
            ending: false,
            blocked: false,
            queued: false,
        }
    }

    fn can_go_on(&self) -> bool {
        let reads = self.readable && !matches!(self.read, Some(Read::Poll(_)) | None);
        reads || (!self.blocked && matches!(self.write, Some(Write::Send { .. })))
    }
}

impl Epoll {
    fn complete(&mut self, token: Token, result: i32, more: bool) {
        self.done.push(Completion { token, result, more, buffer: None, socket: None });
    }

    fn failed(&mut self, token: Token, error: Errno) {
        self.complete(token, -error.raw_os_error(), false);
    }

    /// The descriptor's source, registered.
    fn source(&mut self, file: BorrowedFd<'_>) -> Result<&mut Source, Errno> {
        match self.sources.entry(file.as_raw_fd()) {
            Entry::Occupied(there) => Ok(there.into_mut()),
            Entry::Vacant(place) => {
                epoll::add(&self.epoll, file, data(file), interest())?;
                Ok(place.insert(Source::new(Lent::new(file))))
            }
        }
    }

    fn read(&mut self, file: BorrowedFd<'_>, token: Token, read: Read) {
        match self.source(file) {
            Ok(source) => {
                debug_assert!(source.read.is_none(), "one read at a time: {:?}, {read:?}", source.read);
                source.read = Some(read);
                self.in_flight(file, token);
            }
            Err(error) => self.failed(token, error),
        }
    }

    fn write(&mut self, file: BorrowedFd<'_>, token: Token, write: Write) {
        match self.source(file) {
            Ok(source) => {
                debug_assert!(source.write.is_none(), "one write at a time: {:?}, {write:?}", source.write);
                source.write = Some(write);
                self.in_flight(file, token);
            }
            Err(error) => self.failed(token, error),
        }
    }

    fn in_flight(&mut self, file: BorrowedFd<'_>, token: Token) {
        self.places.insert(token, file.as_raw_fd());
        self.queue_if_ready(file.as_raw_fd());
    }

    fn queue_if_ready(&mut self, fd: RawFd) {
        if let Some(source) = self.sources.get_mut(&fd)
            && !source.queued
            && source.can_go_on()
        {
            source.queued = true;
            self.runnable.push_back(fd);
        }
    }

    /// Has epoll look at the descriptor now, whatever it has said before.
    fn look_again(&mut self, file: BorrowedFd<'_>, token: Token) -> bool {
        if !self.sources.contains_key(&file.as_raw_fd()) {
            return true; // It will be registered, which is a look.
        }
        match epoll::modify(&self.epoll, file, data(file), interest()) {
            Ok(()) => true,
            Err(error) => {
                self.failed(token, error);
                false
            }
        }
    }

    // --- What epoll says --------------------------------------------------------------------------------------------

    fn happened(&mut self, event: &epoll::Event) {
        let fd = event.data.u64() as RawFd;
        let flags = event.flags;
        let Some(source) = self.sources.get_mut(&fd) else { return };
        let ending = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        let readable = ending || flags.contains(EventFlags::IN);
        let writable = flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR);
        source.ending |= ending;
        source.readable |= readable;
        source.blocked &= !writable;
        let result = i32::try_from(flags.bits() & 0xffff).unwrap_or_default();
        let read = source.read.take_if(|read| readable && matches!(read, Read::Poll(_)));
        let write =
            source.write.take_if(|write| writable && matches!(write, Write::Poll(_) | Write::Connect(_)));
        let watch = source.watch.take_if(|_| flags.contains(EventFlags::ERR));
        if let Some(token) = watch {
            self.places.remove(&token);
            self.complete(token, result, false);
        }
        if let Some(Read::Poll(token)) = read {
            self.places.remove(&token);
            self.complete(token, result, false);
        }
        match write {
            Some(Write::Poll(token)) => {
                self.places.remove(&token);
                self.complete(token, result, false);
            }
            Some(Write::Connect(token)) => self.connected(fd, token),
            _ => {}
        }
        self.queue_if_ready(fd);
    }

    /// A connect is over: the socket says how.
    fn connected(&mut self, fd: RawFd, token: Token) {
        self.places.remove(&token);
        let Some(source) = self.sources.get(&fd) else { return };
        match sockopt::socket_error(&source.file) {
            Ok(Ok(())) => self.complete(token, 0, false),
            Ok(Err(error)) | Err(error) => self.failed(token, error),
        }
    }

    // --- Going on with what is in flight ----------------------------------------------------------------------------

    fn run(&mut self, fd: RawFd) {
        let Some(source) = self.sources.get_mut(&fd) else { return };
        source.queued = false;
        if source.readable {
            self.run_read(fd);
        }
        self.run_write(fd);
        self.queue_if_ready(fd);
    }

    fn run_read(&mut self, fd: RawFd) {
        let Self { sources, places, pool, done, .. } = self;
        let Some(source) = sources.get_mut(&fd) else { return };
        let (token, turn) = match source.read {
            Some(Read::Accept(token)) => (token, accept(&source.file, token, done)),
            Some(Read::Once(token, group)) => {
                (token, receive(&source.file, source.ending, pool, group, token, false, done))
            }
            Some(Read::Datagrams { token, connected }) => {
                (token, receive_datagrams(&source.file, pool, token, connected, done))
            }
            Some(Read::Many(token)) => {
                let mut turn = Turn::More;
                for _ in 0..READS_A_TURN {
                    turn = receive(&source.file, source.ending, pool, Group::Shared, token, true, done);
                    if !matches!(turn, Turn::More) {
                        break;
                    }
                }
                (token, turn)
            }
            Some(Read::Poll(_)) | None => return,
        };
        match turn {
            Turn::More => {}
            Turn::Wait => source.readable = false,
            Turn::Done { drained } => {
                source.readable &= !drained;
                source.read = None;
                places.remove(&token);
            }
        }
    }

    fn run_write(&mut self, fd: RawFd) {
        let Self { sources, places, pool, done, .. } = self;
        let Some(source) = sources.get_mut(&fd) else { return };
        let Some(Write::Send { token, buffer, start, length, sent }) = &mut source.write else { return };
        if source.blocked {
            return;
        }
        let bytes = pool.bytes(*buffer, *start + *sent, *length - *sent);
        let result = match rustix::net::send(&source.file, bytes, SEND) {
            Ok(n) if n as u32 == *length - *sent => *length as i32,
            Ok(n) => {
                // It took what it had room for, and epoll says when there is room again.
                *sent += n as u32;
                source.blocked = true;
                return;
            }
            Err(Errno::INTR) => return,
            Err(Errno::AGAIN) => {
                source.blocked = true;
                return;
            }
            // Also after a part of it: the socket says so once, and a receive after that would take a reset for the end.
            Err(error) => -error.raw_os_error(),
        };
        let token = *token;
        source.write = None;
        places.remove(&token);
        done.push(Completion { token, result, more: false, buffer: None, socket: None });
    }

    // --- Ending -----------------------------------------------------------------------------------------------------

    fn cancel_read(&mut self, read: Read) {
        let token = read.token();
        self.places.remove(&token);
        self.failed(token, Errno::CANCELED);
    }

    fn cancel_watch(&mut self, token: Token) {
        self.places.remove(&token);
        self.failed(token, Errno::CANCELED);
    }

    fn cancel_write(&mut self, write: Write) {
        let (token, sent) = match write {
            Write::Connect(token) | Write::Poll(token) => (token, 0),
            Write::Send { token, sent, .. } => (token, sent),
        };
        self.places.remove(&token);
        if sent > 0 {
            return self.complete(token, sent as i32, false);
        }
        self.failed(token, Errno::CANCELED);
    }
}

/// Receives into one buffer. `stays`: the receive goes on after bytes.
fn receive(
    socket: &Lent,
    ending: bool,
    pool: &mut BufferPool,
    group: Group,
    token: Token,
    stays: bool,
    done: &mut Vec<Completion>,
) -> Turn {
    let mut complete = |result, more, buffer| {
        done.push(Completion { token, result, more, buffer, socket: None });
    };
    let Some(buffer) = pool.take_free(group) else {
        complete(-Errno::NOBUFS.raw_os_error(), false, None);
        return Turn::Done { drained: false };
    };
    let room = pool.bytes_mut(buffer);
    let size = room.len();
    let received = rustix::net::recv(socket, room, RecvFlags::DONTWAIT).map(|(_, bytes)| bytes);
    if let Ok(bytes @ 1..) = received {
        complete(bytes as i32, stays, Some(buffer));
        // A stream that gave less than it was asked for has no more, unless its end comes next.
        let drained = bytes < size && !ending;
        return match (stays, drained) {
            (false, _) => Turn::Done { drained },
            (true, true) => Turn::Wait,
            (true, false) => Turn::More,
        };
    }
    pool.release(buffer);
    match received {
        Err(Errno::AGAIN) => Turn::Wait,
        Err(Errno::INTR) => Turn::More,
        Err(error) => {
            complete(-error.raw_os_error(), false, None);
            Turn::Done { drained: false }
        }
        Ok(_) => {
            complete(0, false, None);
            Turn::Done { drained: false }
        }
    }
}

impl Io for Epoll {
    fn start(setup: Setup) -> Result<Self, SetupError> {
        let at = |step| move |source| SetupError::Other { step, source };
        let epoll =
            epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| at("epoll_create1")(error.into()))?;
        let pool = BufferPool::listed(&setup).map_err(at("reserving memory for buffers"))?;
        Ok(Self {
            epoll,
            pool,
            sources: HashMap::default(),
            places: HashMap::default(),
            runnable: VecDeque::new(),
            done: Vec::new(),
            events: Vec::with_capacity(EVENTS),
            enters: 0,
        })
    }

    fn accept(&mut self, listener: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.read(listener, token, Read::Accept(token));
        Ok(())
    }

    fn connect(
        &mut self,
        socket: BorrowedFd<'_>,
        address: &SocketAddr,
        token: Token,
    ) -> Result<(), EnterError> {
        // Registered only after it has begun: epoll takes a socket that does neither connect nor listen for one that hung up.
        match begin_connect(socket, address) {
            Ok(()) => self.write(socket, token, Write::Connect(token)),
            Err(error) => self.failed(token, error),
        }
        Ok(())
    }

    fn recv_many(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.read(socket, token, Read::Many(token));
        Ok(())
    }

    fn recv_once(&mut self, socket: BorrowedFd<'_>, group: Group, token: Token) -> Result<(), EnterError> {
        self.read(socket, token, Read::Once(token, group));
        Ok(())
    }

    fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: u16,
        start: u32,
        length: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        let fd = socket.as_raw_fd();
        self.write(socket, token, Write::Send { token, buffer, start, length, sent: 0 });
        // At once: most sends find room, and nothing is gained by letting the bytes wait for the end of the batch.
        self.run_write(fd);
        Ok(())
    }

    fn recv_datagrams(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.read(socket, token, Read::Datagrams { token, connected: false });
        Ok(())
    }

    fn recv_connected(&mut self, socket: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        self.read(socket, token, Read::Datagrams { token, connected: true });
        Ok(())
    }

    fn datagrams(&self, buffer: u16, result: i32) -> Option<Datagrams> {
        self.pool.datagrams(buffer, result)
    }

    fn bytes(&self, buffer: u16, start: u32, length: u32) -> &[u8] {
        self.pool.bytes(buffer, start, length)
    }

    fn send_datagrams(
        &mut self,
        socket: BorrowedFd<'_>,
        route: (Option<&SocketAddr>, Option<Local>),
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        let result = send_datagrams(&self.pool, socket, route, parts, segment);
        self.complete(token, result, false);
        Ok(())
    }

    fn send_headed(
        &mut self,
        socket: BorrowedFd<'_>,
        header: &[u8],
        parts: &[Part],
        segment: u32,
        token: Token,
    ) -> Result<(), EnterError> {
        let result = send_headed(&self.pool, socket, header, parts, segment);
        self.complete(token, result, false);
        Ok(())
    }

    fn poll_readable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        if self.look_again(file, token) {
            self.read(file, token, Read::Poll(token));
        }
        Ok(())
    }

    fn poll_writable(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        if self.look_again(file, token) {
            self.write(file, token, Write::Poll(token));
        }
        Ok(())
    }

    fn poll_error(&mut self, file: BorrowedFd<'_>, token: Token) -> Result<(), EnterError> {
        if self.look_again(file, token) {
            match self.source(file) {
                Ok(source) => {
                    source.watch = Some(token);
                    self.in_flight(file, token);
                }
                Err(error) => self.failed(token, error),
            }
        }
        Ok(())
    }

    fn cancel(&mut self, target: Token) -> Result<(), EnterError> {
        let Some(source) = self.places.get(&target).and_then(|fd| self.sources.get_mut(fd)) else {
            return Ok(()); // It has completed.
        };
        let read = source.read.take_if(|read| read.token() == target);
        let write = source.write.take_if(|write| write.token() == target);
        let watch = source.watch.take_if(|watch| *watch == target);
        if let Some(token) = watch {
            self.cancel_watch(token);
        }
        if let Some(read) = read {
            self.cancel_read(read);
        }
        if let Some(write) = write {
            self.cancel_write(write);
        }
        Ok(())
    }

    fn close(&mut self, file: OwnedFd) -> Result<(), EnterError> {
        // Closing its only descriptor takes a file out of epoll.
        if let Some(Source { read, write, watch, .. }) = self.sources.remove(&file.as_raw_fd()) {
            watch.into_iter().for_each(|token| self.cancel_watch(token));
            read.into_iter().for_each(|read| self.cancel_read(read));
            write.into_iter().for_each(|write| self.cancel_write(write));
        }
        drop(file);
        Ok(())
    }

    fn enter(&mut self, wait: Wait) -> Result<(), EnterError> {
        self.enters += 1;
        let limit = match wait {
            _ if !self.done.is_empty() || !self.runnable.is_empty() => Some(Duration::ZERO),
            Wait::No => Some(Duration::ZERO),
            Wait::For(limit) => Some(limit.min(SLEEP_MAX)),
            Wait::Forever => None,
        };
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut events = std::mem::take(&mut self.events);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(EnterError::from(std::io::Error::from(error))),
        }
        for event in events.drain(..) {
            self.happened(&event);
        }
        self.events = events;
        // Those that are queued meanwhile have had their turn.
        for _ in 0..self.runnable.len() {
            let Some(fd) = self.runnable.pop_front() else { break };
            self.run(fd);
        }
        Ok(())
    }

    fn completions(&mut self, into: &mut Vec<Completion>) {
        into.append(&mut self.done);
    }

    fn enters(&self) -> u64 {
        self.enters
    }

    fn completion_overflows(&mut self) -> u32 {
        0
    }

    fn buffers(&self, group: Group) -> u32 {
        self.pool.buffers(group)
    }

    fn buffers_held(&self, group: Group) -> u32 {
        self.pool.held(group)
    }

    fn buffers_free(&self, group: Group) -> u32 {
        self.pool.free(group)
    }

    fn grow(&mut self, group: Group, more: u32) -> u32 {
        self.pool.grow(group, more)
    }

    fn shrink(&mut self, group: Group, keep: u32) -> Result<(), EnterError> {
        self.pool.shrink(group, keep);
        Ok(())
    }

    fn most_held(&mut self, group: Group) -> u32 {
        self.pool.most_held(group)
    }

    fn release(&mut self, buffer: u16) {
        self.pool.release(buffer);
    }
}

impl Read {
    const fn token(&self) -> Token {
        match self {
            Self::Accept(token)
            | Self::Many(token)
            | Self::Once(token, _)
            | Self::Datagrams { token, .. }
            | Self::Poll(token) => *token,
        }
    }
}

impl Write {
    const fn token(&self) -> Token {
        match self {
            Self::Connect(token) | Self::Send { token, .. } | Self::Poll(token) => *token,
        }
    }
}

const SEND: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);

const fn interest() -> EventFlags {
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET)
}

fn data(file: BorrowedFd<'_>) -> EventData {
    EventData::new_u64(file.as_raw_fd() as u64)
}
