//! Datagrams through a real ring, over loopback.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use uring::{
    Completion, DATAGRAM_OVERHEAD, Group, Local, Op, Part, Ring, Setup, Token, Wait, receive_destination,
    receive_trains,
};

const RECV: Token = Token::new(Op::Datagrams, 0, 0);
const SEND: Token = Token::new(Op::SendDatagrams, 0, 0);

fn ring() -> Ring {
    let setup = Setup {
        submissions: 16,
        datagrams_max: 8,
        datagram_bytes: 65_536 + DATAGRAM_OVERHEAD,
        ..Setup::default()
    };
    let mut ring = Ring::new(setup).unwrap();
    assert_eq!(ring.pool_mut().grow(Group::Datagrams, 8), 8);
    ring
}

fn next(ring: &mut Ring, seen: &mut Vec<Completion>, op: Op) -> Completion {
    for _ in 0..1_000 {
        if let Some(place) = seen.iter().position(|c| c.token.op == op) {
            return seen.remove(place);
        }
        ring.enter(Wait::For(Duration::from_millis(10))).unwrap();
        ring.completions(seen);
    }
    panic!("no completion of {op:?}");
}

fn socket(bind: &str) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind(bind).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

#[test]
fn a_train_is_received_at_once_and_goes_out_at_once() {
    for bind in ["127.0.0.1:0", "[::1]:0"] {
        let (mut ring, mut seen) = (ring(), Vec::new());
        let ((ours, at), (theirs, client)) = (socket(bind), socket(bind));
        receive_trains(ours.as_fd()).unwrap();
        ring.recv_datagrams(ours.as_fd(), RECV).unwrap();
        theirs.send_to(b"one", at).unwrap();
        let one = next(&mut ring, &mut seen, Op::Datagrams);
        let first = ring.datagrams(one.buffer.unwrap(), one.result).unwrap();
        assert_eq!((first.from, first.segment, first.length, one.more), (client, 0, 3, true));
        let buffer = one.buffer.unwrap();
        assert_eq!(ring.pool().bytes(buffer, first.start, first.length), b"one");
        // Back as a train of three: the buffer twice, and its first byte.
        let part = |length| Part { buffer, start: first.start, length };
        let parts = [part(3), part(3), part(1)];
        ring.send_datagrams(ours.as_fd(), (Some(&client), None), &parts, 3, SEND).unwrap();
        assert_eq!(next(&mut ring, &mut seen, Op::SendDatagrams).result, 7);
        let mut back = [0; 10];
        for expected in [&b"one"[..], b"one", b"o"] {
            let length = theirs.recv(&mut back).unwrap();
            assert_eq!(&back[..length], expected);
        }
        // To itself, so that what it sends is received as a train.
        ring.send_datagrams(ours.as_fd(), (Some(&at), None), &parts, 3, SEND).unwrap();
        let train = next(&mut ring, &mut seen, Op::Datagrams);
        let train = ring.datagrams(train.buffer.unwrap(), train.result).unwrap();
        assert_eq!((train.segment, train.length), (3, 7));
    }
}

#[test]
fn every_datagram_of_a_train_has_its_header() {
    let (mut ring, mut seen) = (ring(), Vec::new());
    let ((ours, at), (theirs, _)) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
    ring.recv_datagrams(ours.as_fd(), RECV).unwrap();
    theirs.send_to(b"abcdefgh", at).unwrap();
    let eight = next(&mut ring, &mut seen, Op::Datagrams);
    let (buffer, datagram) =
        (eight.buffer.unwrap(), ring.datagrams(eight.buffer.unwrap(), eight.result).unwrap());
    let part = |from, length| Part { buffer, start: datagram.start + from, length };
    let (out, _) = socket("127.0.0.1:0");
    out.connect(theirs.local_addr().unwrap()).unwrap();
    let parts = [part(0, 6), part(6, 2)];
    let mut expect = |parts: &[Part], segment, expected: &[&[u8]]| {
        // Not kept by us: it is copied.
        let header = b"head:".to_vec();
        ring.send_headed(out.as_fd(), &header, parts, segment, SEND).unwrap();
        drop(header);
        let length: usize = expected.iter().map(|one| one.len()).sum();
        assert_eq!(next(&mut ring, &mut seen, Op::SendDatagrams).result as usize, length);
        let mut back = [0; 20];
        for expected in expected {
            let length = theirs.recv(&mut back).unwrap();
            assert_eq!(&back[..length], *expected);
        }
    };
    expect(&parts, 3, &[b"head:abc", b"head:def", b"head:gh"]);
    expect(&parts[..1], 0, &[b"head:abcdef"]);
    expect(&[], 0, &[b"head:"]);
    expect(&[part(0, 0)], 0, &[b"head:"]);
    // More headers than are kept until the kernel has read them.
    for n in 0..10_u8 {
        ring.send_headed(out.as_fd(), &[n; 8_000], &parts[..1], 0, SEND).unwrap();
    }
    for n in 0..10_u8 {
        assert_eq!(next(&mut ring, &mut seen, Op::SendDatagrams).result, 8_006);
        let mut back = vec![0; 9_000];
        let length = theirs.recv(&mut back).unwrap();
        assert_eq!((&back[..8_000], &back[8_000..length]), (&[n; 8_000][..], &b"abcdef"[..]));
    }
}

#[test]
fn an_empty_datagram_is_one_and_ends_the_receive() {
    let (mut ring, mut seen) = (ring(), Vec::new());
    let ((ours, at), (theirs, client)) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
    ring.recv_datagrams(ours.as_fd(), RECV).unwrap();
    theirs.send_to(b"", at).unwrap();
    let empty = next(&mut ring, &mut seen, Op::Datagrams);
    let datagram = ring.datagrams(empty.buffer.unwrap(), empty.result).unwrap();
    assert_eq!((datagram.from, datagram.length, empty.more), (client, 0, false));
    ring.send_datagrams(ours.as_fd(), (Some(&client), None), &[], 0, SEND).unwrap();
    assert_eq!(next(&mut ring, &mut seen, Op::SendDatagrams).result, 0);
    assert_eq!(theirs.recv(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn an_answer_leaves_from_the_address_that_was_asked() {
    for (bind, asked) in [("0.0.0.0:0", "127.0.0.5"), ("[::]:0", "::1")] {
        let (mut ring, mut seen) = (ring(), Vec::new());
        let (ours, at) = socket(bind);
        receive_destination(ours.as_fd(), at.is_ipv6()).unwrap();
        ring.recv_datagrams(ours.as_fd(), RECV).unwrap();
        let asked = SocketAddr::new(asked.parse().unwrap(), at.port());
        let (theirs, _) = socket(if at.is_ipv6() { "[::1]:0" } else { "127.0.0.1:0" });
        // Connected: an answer from anywhere else is not received.
        theirs.connect(asked).unwrap();
        theirs.send(b"?").unwrap();
        let question = next(&mut ring, &mut seen, Op::Datagrams);
        let buffer = question.buffer.unwrap();
        let datagram = ring.datagrams(buffer, question.result).unwrap();
        assert_eq!(datagram.to.map(|to| to.ip), Some(asked.ip()));
        let part = Part { buffer, start: datagram.start, length: datagram.length };
        let route: (_, Option<Local>) = (Some(&datagram.from), datagram.to);
        ring.send_datagrams(ours.as_fd(), route, &[part], 0, SEND).unwrap();
        assert_eq!(next(&mut ring, &mut seen, Op::SendDatagrams).result, 1);
        assert_eq!(theirs.recv(&mut [0; 8]).unwrap(), 1);
    }
}

#[test]
fn sends_beyond_the_queue_keep_what_they_point_to() {
    // More than the submission queue (16) and the kept messages take at once.
    let (mut ring, mut seen) = (ring(), Vec::new());
    let ((ours, at), (theirs, client)) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
    ring.recv_datagrams(ours.as_fd(), RECV).unwrap();
    theirs.send_to(b"abcdefghij", at).unwrap();
    let ten = next(&mut ring, &mut seen, Op::Datagrams);
    let (buffer, datagram) = (ten.buffer.unwrap(), ring.datagrams(ten.buffer.unwrap(), ten.result).unwrap());
    for n in 0..100_u32 {
        let part = |start| Part { buffer, start: datagram.start + start, length: 1 };
        let parts = [part(n % 10), part((n + 1) % 10)];
        ring.send_datagrams(ours.as_fd(), (Some(&client), None), &parts, 1, SEND).unwrap();
        ring.connect(ours.as_fd(), &client, Token::new(Op::Connect, 0, 0)).unwrap();
    }
    ring.enter(Wait::No).unwrap();
    for n in 0..200_u32 {
        let mut byte = [0; 2];
        assert_eq!(theirs.recv(&mut byte).unwrap(), 1, "datagram {n}");
        assert_eq!(byte[0], b'a' + ((n / 2 + n % 2) % 10) as u8, "datagram {n}");
    }
}
