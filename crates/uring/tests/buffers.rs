//! Buffers of a real ring: made by need, and given back.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use uring::{Completion, Group, Op, Ring, Setup, Token, Wait};

const RECV: Token = Token::new(Op::RecvClient, 0, 0);

/// Sends a byte, and gives the buffer that it was received into.
fn receive(ring: &mut Ring, writer: &mut UnixStream, seen: &mut Vec<Completion>) -> u16 {
    writer.write_all(b"x").unwrap();
    for _ in 0..1_000 {
        if let Some(completion) = seen.pop() {
            assert_eq!((completion.token.op, completion.result, completion.more), (Op::RecvClient, 1, true));
            return completion.buffer.unwrap();
        }
        ring.enter(Wait::For(Duration::from_millis(10))).unwrap();
        ring.completions(seen);
    }
    panic!("nothing was received");
}

#[test]
fn free_buffers_come_back_from_the_kernel_and_go() {
    let setup = Setup { submissions: 1_024, shared: 600, ..Setup::default() };
    let mut ring = Ring::new(setup).unwrap();
    let (reader, mut writer) = UnixStream::pair().unwrap();
    ring.recv_many(reader.as_fd(), RECV).unwrap();
    let mut seen = Vec::new();
    let held = receive(&mut ring, &mut writer, &mut seen);
    let mut looks = 0;
    while ring.pool().buffers(Group::Shared) > 8 + u32::from(held >= 8) {
        looks += 1;
        assert!(looks < 10, "{} are still there", ring.pool().buffers(Group::Shared));
        ring.shrink(Group::Shared, 8).unwrap();
        ring.enter(Wait::No).unwrap();
        ring.completions(&mut seen);
        assert!(seen.is_empty(), "what is withdrawn is nobody's to know");
        assert_eq!(ring.pool().bytes(held, 0, 1), b"x", "who holds one keeps it");
    }
    ring.pool_mut().release(held);
    assert_eq!((ring.pool().buffers(Group::Shared), ring.pool().free(Group::Shared)), (8, 8));
    // Those that stay serve on, in turn.
    for _ in 0..40 {
        let buffer = receive(&mut ring, &mut writer, &mut seen);
        assert!(buffer < 8);
        ring.pool_mut().release(buffer);
    }
    assert_eq!(ring.pool_mut().grow(Group::Shared, 100), 100);
    let mut buffers: Vec<u16> = (0..108).map(|_| receive(&mut ring, &mut writer, &mut seen)).collect();
    buffers.sort_unstable();
    assert_eq!(buffers, (0..108).collect::<Vec<_>>(), "each once");
}
