//! Plain TCP through the dataplane: every byte, every FIN, every reset, and nothing left behind.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread::scope;
use std::time::{Duration, Instant};

use e2e::{
    Backend, Balancer, BalancerConfig, Descriptors, PATIENCE, Proxy, check_stream, connect, descriptors,
    is_reset, listen, reset, resident_bytes, send_stream, settled_descriptors, until,
};

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;
/// Seeds of the two streams of a flow.
const TO_BACKEND: u64 = 1;
const TO_CLIENT: u64 = 2;

/// A proxy before a backend whose connections come out here.
struct Pair {
    proxy: Proxy,
    accepted: Receiver<TcpStream>,
    _backend: Backend,
}

impl Pair {
    fn start(further: &[&str]) -> Self {
        let (accepted, connections) = channel();
        let backend = Backend::start(move |stream| {
            // Nobody listens any more at the end of a test.
            let _ = accepted.send(stream);
        });
        let proxy = Proxy::start(&[backend.address()], further);
        Self { proxy, accepted: connections, _backend: backend }
    }

    /// Both ends of a new flow.
    fn flow(&self) -> (TcpStream, TcpStream) {
        let client = connect(self.proxy.listener()).expect("the proxy accepts");
        let backend = self.accepted.recv_timeout(PATIENCE).expect("the proxy connects");
        (client, backend)
    }

    /// The proxy must hold as many descriptors as before, and end well.
    fn stop(mut self, descriptors_at_start: Descriptors) {
        self.settle(descriptors_at_start);
        self.proxy.stop(PATIENCE);
    }

    fn settle(&mut self, at_start: Descriptors) {
        let proxy = self.proxy.process().id();
        until("all descriptors are closed", || (descriptors(proxy) == at_start).then_some(()));
    }
}

/// Reads until the other side's FIN.
fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A read that gives no byte: how the stream ended.
fn read_end(stream: &mut TcpStream) -> io::Result<usize> {
    stream.read(&mut [0; 16])
}

#[test]
fn a_gibibyte_each_way_at_once() {
    let mut pair = Pair::start(&[]);
    let at_start = settled_descriptors(pair.proxy.process().id());
    let (client, backend) = pair.flow();
    let start = Instant::now();
    scope(|threads| {
        for (stream, sent, received) in [(&client, TO_BACKEND, TO_CLIENT), (&backend, TO_CLIENT, TO_BACKEND)]
        {
            threads.spawn(move || {
                send_stream(&mut { stream }, sent, GIB).expect("all of it is taken");
                stream.shutdown(Shutdown::Write).expect("a FIN");
            });
            threads.spawn(move || {
                check_stream(&mut { stream }, received, GIB).expect("all of it comes");
                assert_eq!(read_end(&mut stream.try_clone().expect("a descriptor")).expect("a FIN"), 0);
            });
        }
    });
    let took = start.elapsed().as_secs_f64();
    println!("1 GiB each way at once, each byte compared: {took:.2} s, {:.2} GB/s", 2.0 * 1.074 / took);
    drop((client, backend));
    pair.stop(at_start);
}

#[test]
fn half_close_both_ways() {
    let mut pair = Pair::start(&[]);
    let at_start = settled_descriptors(pair.proxy.process().id());

    // The client is done first; what the backend says after that arrives whole.
    let (mut client, mut backend) = pair.flow();
    send_stream(&mut client, TO_BACKEND, MIB).expect("taken");
    client.shutdown(Shutdown::Write).expect("a FIN");
    check_stream(&mut backend, TO_BACKEND, MIB).expect("all of it comes");
    assert_eq!(read_end(&mut backend).expect("a FIN, after every byte"), 0);
    scope(|threads| {
        threads.spawn(|| {
            send_stream(&mut &backend, TO_CLIENT, 8 * MIB).expect("taken");
            backend.shutdown(Shutdown::Write).expect("a FIN");
        });
        check_stream(&mut client, TO_CLIENT, 8 * MIB).expect("all of it comes");
    });
    assert_eq!(read_end(&mut client).expect("a FIN, after every byte"), 0);

    // The backend is done first.
    let (mut client, mut backend) = pair.flow();
    backend.write_all(b"bye").expect("taken");
    backend.shutdown(Shutdown::Write).expect("a FIN");
    assert_eq!(read_all(&mut client).expect("a FIN"), b"bye");
    scope(|threads| {
        threads.spawn(|| {
            send_stream(&mut &client, TO_BACKEND, 8 * MIB).expect("taken");
            client.shutdown(Shutdown::Write).expect("a FIN");
        });
        check_stream(&mut backend, TO_BACKEND, 8 * MIB).expect("all of it comes");
    });
    assert_eq!(read_end(&mut backend).expect("a FIN, after every byte"), 0);

    // Neither says a word: an orderly end on both sides.
    let (mut client, mut backend) = pair.flow();
    client.shutdown(Shutdown::Write).expect("a FIN");
    assert_eq!(read_end(&mut backend).expect("a FIN"), 0);
    drop(backend);
    assert_eq!(read_end(&mut client).expect("a FIN"), 0);
    drop(client);

    // A FIN alone ends nothing: the other half stays open for as long as it is wanted.
    let (mut client, mut backend) = pair.flow();
    client.shutdown(Shutdown::Write).expect("a FIN");
    assert_eq!(read_end(&mut backend).expect("a FIN"), 0);
    client.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
    let waiting = read_end(&mut client).expect_err("nothing came");
    assert_eq!(waiting.kind(), io::ErrorKind::WouldBlock, "{waiting}");
    backend.write_all(b"still here").expect("taken");
    drop(backend);
    assert_eq!(read_all(&mut client).expect("a FIN"), b"still here");
    drop(client);
    pair.stop(at_start);
}

#[test]
fn a_reset_on_one_side_resets_the_other() {
    let mut pair = Pair::start(&[]);
    let at_start = settled_descriptors(pair.proxy.process().id());
    let exchange = |client: &mut TcpStream, backend: &mut TcpStream| {
        client.write_all(b"ping").expect("taken");
        backend.read_exact(&mut [0; 4]).expect("it comes");
        backend.write_all(b"pong").expect("taken");
        client.read_exact(&mut [0; 4]).expect("it comes");
    };

    let (mut client, mut backend) = pair.flow();
    exchange(&mut client, &mut backend);
    reset(client);
    let end = read_end(&mut backend);
    assert!(is_reset(&end), "the client reset it: {end:?}");

    let (mut client, mut backend) = pair.flow();
    exchange(&mut client, &mut backend);
    reset(backend);
    let end = read_end(&mut client);
    assert!(is_reset(&end), "the backend reset it: {end:?}");

    // Before anybody said a word.
    let (client, mut backend) = pair.flow();
    reset(client);
    let end = read_end(&mut backend);
    assert!(is_reset(&end), "the client reset it at once: {end:?}");
    let (mut client, backend) = pair.flow();
    reset(backend);
    let end = read_end(&mut client);
    assert!(is_reset(&end), "the backend reset it at once: {end:?}");

    // After one side's FIN.
    let (mut client, mut backend) = pair.flow();
    client.shutdown(Shutdown::Write).expect("a FIN");
    assert_eq!(read_end(&mut backend).expect("a FIN"), 0);
    reset(backend);
    let end = read_end(&mut client);
    assert!(is_reset(&end), "the backend reset it after the client's FIN: {end:?}");
    let (client, mut backend) = pair.flow();
    client.shutdown(Shutdown::Write).expect("a FIN");
    assert_eq!(read_end(&mut backend).expect("a FIN"), 0);
    reset(client);
    let write = || backend.write_all(b"x").err();
    let error = until("a write shows the reset", write);
    let code = error.raw_os_error();
    let (reset_code, pipe_code) =
        (rustix::io::Errno::CONNRESET.raw_os_error(), rustix::io::Errno::PIPE.raw_os_error());
    assert!(code == Some(reset_code) || code == Some(pipe_code), "{error}");

    // A client that goes away with bytes unread: its kernel resets, and the backend is told so.
    let (client, mut backend) = pair.flow();
    backend.write_all(b"unread").expect("taken");
    until("the bytes are there", || {
        let mut peeked = [0; 6];
        (client.peek(&mut peeked).expect("it comes") == 6).then_some(())
    });
    drop(client);
    let end = read_end(&mut backend);
    assert!(is_reset(&end), "the client did not want what came: {end:?}");

    // An orderly end stays one.
    let (mut client, mut backend) = pair.flow();
    exchange(&mut client, &mut backend);
    drop(client);
    assert_eq!(read_end(&mut backend).expect("a FIN"), 0);
    drop(backend);
    pair.stop(at_start);
}

#[test]
fn what_was_sent_before_a_reset_of_the_other_half_arrives() {
    let mut pair = Pair::start(&[]);
    let at_start = settled_descriptors(pair.proxy.process().id());
    // The server speaks first, as FTP and SMTP do.
    let (mut client, mut backend) = pair.flow();
    backend.write_all(b"220 ready\r\n").expect("taken");
    let mut greeting = [0; 11];
    client.read_exact(&mut greeting).expect("it comes");
    assert_eq!(&greeting, b"220 ready\r\n");
    client.write_all(b"QUIT\r\n").expect("taken");
    client.shutdown(Shutdown::Write).expect("a FIN");
    assert_eq!(read_all(&mut backend).expect("a FIN"), b"QUIT\r\n");
    backend.write_all(b"221 bye\r\n").expect("taken");
    drop(backend);
    assert_eq!(read_all(&mut client).expect("a FIN"), b"221 bye\r\n");
    drop(client);
    pair.stop(at_start);
}

#[test]
fn ipv6_clients_and_backends() {
    for (clients, backends) in [("[::1]", "[::1]"), ("[::1]", "127.0.0.1"), ("127.0.0.1", "[::1]")] {
        let free = |host: &str| format!("{host}:0").parse().expect("an address");
        let backend = Backend::start_at(free(backends), |mut stream| {
            send_stream(&mut stream, TO_CLIENT, MIB).expect("taken");
        });
        let proxy = Proxy::start_at(free(clients), &[backend.address()], &[]);
        let mut client = connect(proxy.listener()).expect("the proxy accepts");
        check_stream(&mut client, TO_CLIENT, MIB).expect("all of it comes");
        assert_eq!(read_end(&mut client).expect("a FIN"), 0);
        drop(client);
        proxy.stop(PATIENCE);
    }
}

#[test]
fn a_backend_that_refuses_is_passed_over_or_the_client_is_reset() {
    let dead = [e2e::loopback(), e2e::loopback()];
    let alive = Backend::start(|mut stream| {
        // A client that is gone needs no answer.
        let _ = stream.write_all(b"hello");
    });
    let some_dead = Proxy::start(&[dead[0], dead[1], alive.address()], &["--policy", "round-robin"]);
    for _ in 0..30 {
        let mut client = connect(some_dead.listener()).expect("the proxy accepts");
        assert_eq!(read_all(&mut client).expect("another backend answers"), b"hello");
    }
    some_dead.stop(PATIENCE);

    let all_dead = Proxy::start(&dead, &[]);
    let start = Instant::now();
    // The reset may come before the client has looked whether it is connected.
    let end = connect(all_dead.listener()).and_then(|mut client| read_end(&mut client));
    assert!(is_reset(&end), "nobody can serve it: {end:?}");
    assert!(start.elapsed() < Duration::from_secs(2), "at once, not after {:?}", start.elapsed());
    all_dead.stop(PATIENCE);
}

#[test]
fn a_slow_reader_holds_back_a_fast_writer_in_bounded_memory() {
    /// Flows each way.
    const FLOWS: usize = 50;
    /// What `--flows-max` allows: two buffers of 16 KiB for each flow, in a ring whose size is a power of two; and the
    /// 1,024 that a worker's exchanges share.
    const FLOWS_MAX: usize = 128;
    const BUFFERS_BYTES: u64 = (2 * FLOWS_MAX as u64 + 1_024) * 16 * 1024;
    /// Resident memory that may be added: the buffers, and 2 KiB for each flow.
    const MEMORY_MAX: u64 = BUFFERS_BYTES + 2 * FLOWS as u64 * 2 * 1024;
    /// Nothing taken for so long: the writer is held back.
    const QUIET: Duration = Duration::from_millis(300);

    let mut pair = Pair::start(&["--workers", "1", "--flows-max", &FLOWS_MAX.to_string()]);
    let proxy = pair.proxy.process().id();
    let at_start = settled_descriptors(proxy);
    // Once through, so that memory that stays after the first flow does not count.
    drop(pair.flow());
    pair.settle(at_start);
    let memory_at_start = resident_bytes(proxy);
    let flows: Vec<_> = (0..2 * FLOWS).map(|_| pair.flow()).collect();
    // Half of them are written to by their clients, half by their backends; nobody reads.
    let sides = |n: usize| if n < FLOWS { (&flows[n].0, &flows[n].1) } else { (&flows[n].1, &flows[n].0) };
    let mut sent = vec![0_u64; flows.len()];
    let block = [7; 64 * 1024];
    for n in 0..flows.len() {
        sides(n).0.set_nonblocking(true).expect("a socket can");
    }
    let mut last_taken = Instant::now();
    while last_taken.elapsed() < QUIET {
        for (n, sent) in sent.iter_mut().enumerate() {
            match { sides(n).0 }.write(&block) {
                Ok(bytes) => {
                    *sent += bytes as u64;
                    last_taken = Instant::now();
                }
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}"),
            }
        }
        assert!(sent.iter().all(|sent| *sent < GIB), "nothing holds the writer back");
    }
    let added = resident_bytes(proxy).saturating_sub(memory_at_start);
    println!(
        "{} writers were held back after {} MiB in all (kernel buffers); the proxy's memory grew by {} KiB",
        flows.len(),
        sent.iter().sum::<u64>() / MIB,
        added / 1024
    );
    assert!(added <= MEMORY_MAX, "{added} bytes");

    // They hold back themselves, and nobody else.
    let (mut client, mut backend) = pair.flow();
    client.write_all(b"ping").expect("taken");
    backend.read_exact(&mut [0; 4]).expect("another flow goes on");
    backend.write_all(b"pong").expect("taken");
    client.read_exact(&mut [0; 4]).expect("another flow goes on");
    drop((client, backend));

    // Then they read: everything is there.
    for (n, sent) in sent.iter().enumerate() {
        let (writer, mut reader) = sides(n);
        writer.shutdown(Shutdown::Write).expect("a FIN");
        let received = io::copy(&mut reader, &mut io::sink()).expect("a FIN at the end");
        assert_eq!(received, *sent);
    }
    drop(flows);
    pair.settle(at_start);
    pair.proxy.stop(PATIENCE);
}

#[test]
fn five_thousand_flows_at_once_leave_nothing_behind() {
    const FLOWS: usize = 5_000;
    /// Two for each flow, and what the test itself has.
    const DESCRIPTORS: u64 = 2 * FLOWS as u64 + 100;

    allow_descriptors(DESCRIPTORS);
    let mut balancer = Balancer::start(BalancerConfig::default());
    let listener = listen(e2e::loopback());
    let address = listener.local_addr().expect("a bound socket has an address");
    // Unchecked: a check would be one more connection to accept.
    let agent = balancer.agent("echo", address, &["--no-check"]);
    until("it is registered", || (balancer.ready_resources() == 1).then_some(()));
    let process = balancer.process().id();
    let round = |count: usize| {
        let mut flows = VecDeque::new();
        for n in 0..count {
            let client = connect(balancer.listener()).expect("the balancer accepts");
            let (backend, _) = listener.accept().expect("the balancer connects");
            backend.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            flows.push_back((n as u64, client, backend));
        }
        flows
    };
    drop(round(10));
    let idle = || {
        let metrics = balancer.metrics();
        [("trimtab_flows_open", "flows"), ("trimtab_buffers_in_use", "buffers")]
            .map(|(name, what)| (what, metrics.sum(name, &[]) as u64))
    };
    until("the first flows are gone", || (idle() == [("flows", 0), ("buffers", 0)]).then_some(()));
    let (descriptors_at_start, memory_at_start) = (settled_descriptors(process), resident_bytes(process));

    let start = Instant::now();
    let mut flows = round(FLOWS);
    println!("{FLOWS} flows opened one by one in {:.2} s", start.elapsed().as_secs_f64());
    assert_eq!(balancer.metrics().sum("trimtab_flows_open", &[]) as usize, FLOWS);
    let memory_open = resident_bytes(process);
    for (n, client, _) in &mut flows {
        client.write_all(&n.to_le_bytes()).expect("taken");
    }
    // Which backend connection is whose is not known: each echoes what comes.
    for (_, _, backend) in &mut flows {
        let mut bytes = [0; 8];
        backend.read_exact(&mut bytes).expect("it comes");
        backend.write_all(&bytes).expect("taken");
    }
    for (n, client, _) in &mut flows {
        let mut bytes = [0; 8];
        client.read_exact(&mut bytes).expect("it comes back");
        assert_eq!(u64::from_le_bytes(bytes), *n, "each flow gets its own bytes");
    }
    let memory_busy = resident_bytes(process);
    println!(
        "all {FLOWS} open: {} sockets; memory per idle flow {} bytes, after each echoed {} bytes",
        descriptors(process).sockets,
        (memory_open - memory_at_start.min(memory_open)) / FLOWS as u64,
        (memory_busy - memory_at_start.min(memory_busy)) / FLOWS as u64
    );
    // Half of them end with the client's FIN first, half with the backend's.
    for (n, client, backend) in flows {
        if n % 2 == 0 { drop((client, backend)) } else { drop((backend, client)) }
    }
    until("flows and buffers are as at the start", || {
        (idle() == [("flows", 0), ("buffers", 0)]).then_some(())
    });
    until("descriptors are as at the start", || (descriptors(process) == descriptors_at_start).then_some(()));
    let metrics = balancer.metrics();
    assert_eq!(metrics.sum("trimtab_flows_opened_total", &[]) as usize, FLOWS + 10);
    assert_eq!(metrics.sum("trimtab_flows_closed_total", &[]) as usize, FLOWS + 10);
    assert_eq!(metrics.sum("trimtab_sheds_total", &[]), 0.0);
    drop(agent);
}

/// Raises the soft limit, or says what is needed.
fn allow_descriptors(count: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= count) {
        return;
    }
    let raised = Rlimit { current: Some(count), maximum: limit.maximum };
    let result = setrlimit(Resource::Nofile, raised);
    result.unwrap_or_else(|error| panic!("this test needs {count} descriptors (ulimit -n): {error}"));
}
