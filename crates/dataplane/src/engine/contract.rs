//! The contract of [`Io`], engine by engine, where the worker's conformance suite meets it by chance at most.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use uring::{Completion, Group, Op, Ring, Setup, Token, Wait};

use super::{Epoll, TokioUring};
use crate::io::Io;

const PATIENCE: Duration = Duration::from_secs(20);
const BUFFER_BYTES: u32 = 4_096;

/// An engine and its completions that nobody has asked for yet.
struct Bench<I> {
    io: I,
    seen: Vec<Completion>,
}

impl<I: Io> Bench<I> {
    fn new() -> Self {
        let setup = Setup {
            submissions: 64,
            shared: 8,
            shared_max: 8,
            first_max: 8,
            buffer_bytes: BUFFER_BYTES,
            ..Setup::default()
        };
        Self { io: I::start(setup).unwrap(), seen: Vec::new() }
    }

    fn turn(&mut self) {
        self.io.enter(Wait::For(Duration::from_millis(5))).unwrap();
        self.io.completions(&mut self.seen);
    }

    fn find(&mut self, op: Op) -> Option<Completion> {
        let place = self.seen.iter().position(|completion| completion.token.op == op)?;
        Some(self.seen.remove(place))
    }

    /// The next completion of the operation.
    #[track_caller]
    fn next(&mut self, op: Op) -> Completion {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(completion) = self.find(op) {
                return completion;
            }
            assert!(Instant::now() < deadline, "{op:?} does not complete");
            self.turn();
        }
    }

    /// The operation does not complete while the engine has every reason to.
    #[track_caller]
    fn nothing(&mut self, op: Op) {
        for _ in 0..5 {
            self.turn();
        }
        assert!(self.find(op).is_none(), "{op:?} completed");
    }
}

fn token(op: Op) -> Token {
    Token::new(op, 1, 1)
}

/// Two ends of a connection: the engine's and the peer's.
fn pair() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    (listener.accept().unwrap().0.into(), peer)
}

fn cancelled_polls_and_accepts_end_at_once<I: Io>() {
    let mut bench = Bench::<I>::new();
    let (ours, mut peer) = pair();
    bench.io.poll_readable(ours.as_fd(), token(Op::ReadableClient)).unwrap();
    bench.nothing(Op::ReadableClient);
    bench.io.cancel(token(Op::ReadableClient)).unwrap();
    assert_eq!(bench.next(Op::ReadableClient).result, -Errno::CANCELED.raw_os_error());
    // It is gone: what comes now is for the next one, and cancelling again is nothing.
    bench.io.cancel(token(Op::ReadableClient)).unwrap();
    peer.write_all(b"x").unwrap();
    bench.nothing(Op::ReadableClient);
    bench.io.poll_readable(ours.as_fd(), token(Op::ReadableClient)).unwrap();
    assert!(bench.next(Op::ReadableClient).result > 0);

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    bench.io.accept(listener.as_fd(), token(Op::Accept)).unwrap();
    bench.nothing(Op::Accept);
    bench.io.cancel(token(Op::Accept)).unwrap();
    let ended = bench.next(Op::Accept);
    assert!(!ended.more && ended.socket.is_none());
    // Nobody is accepted behind the owner's back.
    let _waiting = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    bench.nothing(Op::Accept);
    bench.io.accept(listener.as_fd(), token(Op::Accept)).unwrap();
    assert!(bench.next(Op::Accept).socket.is_some());
}

fn a_cancelled_connect_ends_at_once<I: Io>() {
    let mut bench = Bench::<I>::new();
    // A listener whose queue is full drops SYNs.
    let full = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&full, &"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap()).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let address = rustix::net::getsockname(&full).unwrap().try_into().unwrap();
    let socket = || rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    let fill: Vec<_> = (0..4).map(|_| socket()).collect();
    for socket in &fill {
        rustix::io::ioctl_fionbio(socket, true).unwrap();
        let _ = rustix::net::connect(socket, &address);
    }
    let ours = socket();
    bench.io.connect(ours.as_fd(), &address, token(Op::Connect)).unwrap();
    bench.nothing(Op::Connect);
    bench.io.cancel(token(Op::Connect)).unwrap();
    assert_eq!(bench.next(Op::Connect).result, -Errno::CANCELED.raw_os_error());
    bench.io.close(ours).unwrap();
}

fn closing_after_a_cancel_reaches_the_peer<I: Io>() {
    for reset in [false, true] {
        let mut bench = Bench::<I>::new();
        bench.io.grow(Group::First, 8);
        let (ours, mut peer) = pair();
        bench.io.recv_once(ours.as_fd(), Group::First, token(Op::RecvClient)).unwrap();
        bench.nothing(Op::RecvClient);
        bench.io.cancel(token(Op::RecvClient)).unwrap();
        if reset {
            sockopt::set_socket_linger(&ours, Some(Duration::ZERO)).unwrap();
        }
        bench.io.close(ours).unwrap();
        let ended = bench.next(Op::RecvClient);
        assert!(!ended.more && ended.result <= 0, "{ended:?}");
        ended.buffer.into_iter().for_each(|buffer| bench.io.release(buffer));
        let read = peer.read(&mut [0; 1]).map_err(|error| error.kind());
        let wanted = if reset { Err(std::io::ErrorKind::ConnectionReset) } else { Ok(0) };
        assert_eq!(read, wanted, "a reset where it was asked for, FIN else");
        assert_eq!(bench.io.buffers_held(Group::First), 0);
    }
}

fn a_send_goes_out_whole_however_slowly_it_is_read<I: Io>() {
    let mut bench = Bench::<I>::new();
    bench.io.grow(Group::First, 8);
    let (ours, mut peer) = pair();
    let content: Vec<u8> = (0..BUFFER_BYTES).map(|n| n as u8).collect();
    peer.write_all(&content).unwrap();
    bench.io.poll_readable(ours.as_fd(), token(Op::ReadableClient)).unwrap();
    bench.next(Op::ReadableClient);
    bench.io.recv_once(ours.as_fd(), Group::First, token(Op::RecvClient)).unwrap();
    let received = bench.next(Op::RecvClient);
    let (buffer, length) = (received.buffer.unwrap(), received.result as u32);
    let mut sent = 0;
    // Until the kernel takes no more, which is soon.
    sockopt::set_socket_send_buffer_size(&ours, 16 * 1_024).unwrap();
    sockopt::set_socket_recv_buffer_size(&peer, 16 * 1_024).unwrap();
    let no_room = -Errno::AGAIN.raw_os_error();
    let mut start = 0;
    let waits = loop {
        bench.io.send(ours.as_fd(), buffer, start, length - start, token(Op::SendClient)).unwrap();
        bench.turn();
        match bench.find(Op::SendClient) {
            Some(done) if done.result == no_room => break false,
            Some(done) => {
                sent += usize::try_from(done.result).unwrap();
                start = (start + done.result as u32) % length;
            }
            None => break true,
        }
    };
    bench.nothing(Op::SendClient);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        peer.read_to_end(&mut all).unwrap();
        all
    });
    let end = sent + (length - start) as usize;
    if waits {
        sent += usize::try_from(bench.next(Op::SendClient).result).unwrap();
    }
    // One that does not wait says when there is room, for the rest.
    while sent < end {
        bench.io.poll_writable(ours.as_fd(), token(Op::WritableClient)).unwrap();
        bench.next(Op::WritableClient);
        let left = (end - sent) as u32;
        bench.io.send(ours.as_fd(), buffer, length - left, left, token(Op::SendClient)).unwrap();
        match bench.next(Op::SendClient).result {
            result if result == no_room => {}
            result => sent += usize::try_from(result).unwrap(),
        }
    }
    bench.io.release(buffer);
    bench.io.close(ours).unwrap();
    bench.turn();
    let all = reader.join().unwrap();
    assert_eq!(all.len(), sent);
    let whole = all.chunks(length as usize).all(|chunk| chunk == &content[..chunk.len()]);
    assert!(whole, "bytes are missing between two sends, or there twice");
}

fn polls_look_at_what_is_there<I: Io>() {
    let mut bench = Bench::<I>::new();
    let (ours, mut peer) = pair();
    peer.write_all(b"trim").unwrap();
    // Bytes that are left are news each time, and bytes that somebody else has read are none.
    for _ in 0..3 {
        bench.io.poll_readable(ours.as_fd(), token(Op::ReadableClient)).unwrap();
        assert!(bench.next(Op::ReadableClient).result > 0);
    }
    rustix::net::recv(&ours, &mut [0; 16][..], rustix::net::RecvFlags::DONTWAIT).unwrap();
    bench.io.poll_readable(ours.as_fd(), token(Op::ReadableClient)).unwrap();
    bench.io.poll_writable(ours.as_fd(), token(Op::WritableClient)).unwrap();
    assert!(bench.next(Op::WritableClient).result > 0);
    bench.nothing(Op::ReadableClient);
    drop(peer);
    assert!(bench.next(Op::ReadableClient).result > 0, "an end is news too");
}

fn errors_are_waited_for_alone<I: Io>() {
    let is_error = |completion: &Completion| {
        let events = u16::try_from(completion.result).map(PollFlags::from_bits_retain);
        events.is_ok_and(|events| events.contains(PollFlags::ERR))
    };
    // Bytes and FIN are none: neither the peer's, nor one of each side, nor with bytes that nobody has read.
    for both in [false, true] {
        let mut bench = Bench::<I>::new();
        bench.io.grow(Group::First, 8);
        let (ours, mut peer) = pair();
        bench.io.poll_error(ours.as_fd(), token(Op::WatchClient)).unwrap();
        bench.nothing(Op::WatchClient);
        peer.write_all(b"trim").unwrap();
        bench.nothing(Op::WatchClient);
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        if both {
            rustix::net::shutdown(&ours, rustix::net::Shutdown::Write).unwrap();
        }
        (0..10).for_each(|_| bench.turn());
        let told: Vec<_> = std::mem::take(&mut bench.seen);
        assert!(told.len() <= 4 && told.iter().all(|c| c.more && !is_error(c)), "{told:?}");
        if both {
            bench.io.cancel(token(Op::WatchClient)).unwrap();
            let ended = bench.next(Op::WatchClient);
            assert_eq!((ended.result, ended.more), (-Errno::CANCELED.raw_os_error(), false));
            bench.io.close(ours).unwrap();
            continue;
        }
        sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
        drop(peer);
        while !is_error(&bench.next(Op::WatchClient)) {}
        // It took nothing away: the bytes are there. (After them the kernel tells of the FIN, which came first.)
        bench.io.recv_once(ours.as_fd(), Group::First, token(Op::RecvClient)).unwrap();
        let received = bench.next(Op::RecvClient);
        assert_eq!(received.result, 4);
        bench.io.release(received.buffer.unwrap());
        bench.io.cancel(token(Op::WatchClient)).unwrap();
        bench.io.close(ours).unwrap();
    }
    // One that was there before is told at once, beside other polls, and to the receive that follows.
    let mut bench = Bench::<I>::new();
    let (ours, peer) = pair();
    sockopt::set_socket_linger(&peer, Some(Duration::ZERO)).unwrap();
    drop(peer);
    bench.io.poll_room(ours.as_fd(), token(Op::WritableClient)).unwrap();
    bench.io.poll_error(ours.as_fd(), token(Op::WatchClient)).unwrap();
    assert!(is_error(&bench.next(Op::WatchClient)));
    assert!(bench.next(Op::WritableClient).result > 0);
    bench.io.grow(Group::First, 8);
    bench.io.recv_once(ours.as_fd(), Group::First, token(Op::RecvClient)).unwrap();
    assert_eq!(bench.next(Op::RecvClient).result, -Errno::CONNRESET.raw_os_error());
}

/// Room towards a peer that has sent its FIN, which is no news.
fn room_is_waited_for_after_a_fin<I: Io>() {
    let mut bench = Bench::<I>::new();
    let (ours, mut peer) = pair();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    rustix::io::ioctl_fionbio(&ours, true).unwrap();
    let mut sent = 0;
    while let Ok(bytes) = rustix::net::send(&ours, &[7; 64 * 1_024], rustix::net::SendFlags::NOSIGNAL) {
        sent += bytes;
    }
    bench.io.poll_room(ours.as_fd(), token(Op::WritableClient)).unwrap();
    (0..10).for_each(|_| bench.turn());
    let has_room = |completion: &Completion| completion.result & i32::from(PollFlags::OUT.bits()) != 0;
    let told = std::mem::take(&mut bench.seen);
    assert!(told.len() <= 2 && told.iter().all(|c| c.more && !has_room(c)), "{told:?}");
    peer.read_exact(&mut vec![0; sent]).unwrap();
    while !has_room(&bench.next(Op::WritableClient)) {}
}

fn without_a_buffer_a_receive_says_so_and_loses_nothing<I: Io>() {
    let mut bench = Bench::<I>::new();
    let (ours, mut peer) = pair();
    peer.write_all(b"trim").unwrap();
    bench.io.recv_once(ours.as_fd(), Group::First, token(Op::RecvClient)).unwrap();
    assert_eq!(bench.next(Op::RecvClient).result, -Errno::NOBUFS.raw_os_error());
    assert_eq!(bench.io.grow(Group::First, 1), 1);
    bench.io.recv_once(ours.as_fd(), Group::First, token(Op::RecvClient)).unwrap();
    let received = bench.next(Op::RecvClient);
    assert_eq!((received.result, received.more), (4, false));
    // The end comes after the bytes, to a receive that has a buffer again.
    bench.io.release(received.buffer.unwrap());
    drop(peer);
    bench.io.recv_many(ours.as_fd(), token(Op::RecvClient)).unwrap();
    let ended = bench.next(Op::RecvClient);
    assert_eq!((ended.result, ended.more), (0, false));
}

fn more_operations_than_fit_in_a_queue_all_complete<I: Io>() {
    let mut bench = Bench::<I>::new();
    let pairs: Vec<_> = (0..100).map(|_| pair()).collect();
    for (slot, (ours, _)) in (0..).zip(&pairs) {
        bench.io.poll_readable(ours.as_fd(), Token::new(Op::ReadableClient, slot, 1)).unwrap();
        bench.io.poll_writable(ours.as_fd(), Token::new(Op::WritableClient, slot, 1)).unwrap();
    }
    let mut writable: Vec<_> = pairs.iter().map(|_| bench.next(Op::WritableClient).token.slot).collect();
    writable.sort_unstable();
    assert_eq!(writable, (0..100).collect::<Vec<_>>());
    bench.nothing(Op::ReadableClient);
    pairs.iter().for_each(|(_, peer)| { peer }.write_all(b"x").unwrap());
    for _ in &pairs {
        assert!(bench.next(Op::ReadableClient).result > 0);
    }
}

macro_rules! contract {
    ($($engine:ident: $type:ty),*) => {
        $(mod $engine {
            contract!(@each $type:
                cancelled_polls_and_accepts_end_at_once,
                a_cancelled_connect_ends_at_once,
                closing_after_a_cancel_reaches_the_peer,
                a_send_goes_out_whole_however_slowly_it_is_read,
                polls_look_at_what_is_there,
                errors_are_waited_for_alone,
                room_is_waited_for_after_a_fin,
                more_operations_than_fit_in_a_queue_all_complete,
                without_a_buffer_a_receive_says_so_and_loses_nothing
            );
        })*
    };
    (@each $type:ty: $($test:ident),*) => {
        $(#[test]
        fn $test() {
            super::$test::<$type>();
        })*
    };
}

contract!(on_uring: super::Ring, on_tokio_uring: super::TokioUring, on_epoll: super::Epoll);
