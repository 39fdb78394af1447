//! What every engine must do with datagrams, tried over loopback with real sockets.
//!
//! Nothing here waits a fixed time for something to happen: conditions are polled until a deadline that is far longer
//! than a noisy machine needs. The engine is the module that this file is compiled as (see `tests/udp.rs`).

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use allocation::telemetry::{DataplaneView, ListenerSnapshot};
use allocation::{AllocationTable, Backend, LiveFacts, Members, Policy, Publisher};
use dataplane::{Config, Dataplane, Engine, ListenerConfig, ServerIdForm, ServerIdKeys, UdpConfig, aes128};

use crate::common::{PATIENCE, engine_of, eventually};

#[path = "udp_preface.rs"]
mod preface;

/// The engine under test.
fn engine() -> Engine {
    engine_of(module_path!())
}

/// An address that no other test has. Ports of UDP are used again at once: a late answer to one test's client would begin a flow
/// in another's proxy, and between two proxies before echo servers it would go to and fro for ever.
fn host() -> IpAddr {
    use std::sync::atomic::AtomicU8;
    static TESTS: AtomicU8 = AtomicU8::new(1);
    thread_local!(static HOST: IpAddr = {
        let [.., high, low] = std::process::id().to_be_bytes();
        let engine = Engine::ALL.iter().position(|one| *one == engine()).unwrap() as u8;
        IpAddr::from([127, 64 + 40 * engine + high % 40, low, TESTS.fetch_add(1, Ordering::Relaxed)])
    });
    HOST.with(|host| *host)
}

/// Any free port of it.
fn any() -> String {
    format!("{}:0", host())
}

/// A dataplane with one listener of datagrams, and the table it reads.
struct Proxy {
    dataplane: Dataplane,
    view: Arc<dyn DataplaneView>,
    address: SocketAddr,
    live: Vec<Arc<LiveFacts>>,
}

fn table(policy: Policy, backends: &[SocketAddr]) -> (AllocationTable, Vec<Arc<LiveFacts>>) {
    let live: Vec<_> = backends.iter().map(|_| Arc::new(LiveFacts::default())).collect();
    let backend = |(n, address): (usize, &SocketAddr)| Backend {
        id: format!("b{n}").parse().unwrap(),
        address: *address,
        flows_max: 0,
        live: Arc::clone(&live[n]),
    };
    let members = Members::new(backends.iter().enumerate().map(backend).collect());
    (AllocationTable::new(1, policy, Arc::new(members), vec![1.0; backends.len()]), live)
}

impl Proxy {
    fn to(backends: &[SocketAddr]) -> Self {
        Self::tuned(backends, |_| {})
    }

    fn tuned(backends: &[SocketAddr], tune: impl FnOnce(&mut UdpConfig)) -> Self {
        Self::at(&any(), Policy::RoundRobin, backends, 1, tune)
    }

    fn at(
        bind: &str,
        policy: Policy,
        backends: &[SocketAddr],
        workers: usize,
        tune: impl FnOnce(&mut UdpConfig),
    ) -> Self {
        let (table, live) = table(policy, backends);
        let mut udp = UdpConfig::default();
        tune(&mut udp);
        let pool = "test".parse().unwrap();
        let listener = ListenerConfig::udp(bind.parse().unwrap(), pool, Publisher::new(table), udp);
        let mut config = Config::new(vec![listener]);
        config.workers = workers;
        config.engine = Some(engine());
        let bound = dataplane::bind(config).unwrap();
        let address = bound.addresses()[0];
        let dataplane = bound.start().unwrap();
        Self { view: dataplane.view(), dataplane, address, live }
    }

    fn client(&self) -> UdpSocket {
        client_of(self.address)
    }

    fn snapshot(&self) -> ListenerSnapshot {
        self.view.listeners().remove(0)
    }

    fn closed(&self, reason: &str) -> u64 {
        self.snapshot().flows_closed.iter().find(|(label, _)| *label == reason).unwrap().1
    }

    fn shed(&self, reason: &str) -> u64 {
        self.snapshot().sheds.iter().find(|(label, _)| *label == reason).unwrap().1
    }

    fn dropped(&self, reason: &str) -> u64 {
        self.snapshot().datagrams_dropped.iter().find(|(label, _)| *label == reason).unwrap().1
    }

    /// Ends, and asserts that nothing is left: no flow counted, no buffer held.
    fn finish(self) {
        self.dataplane.stop();
        eventually("workers end", || self.dataplane.is_finished());
        let snapshot = self.snapshot();
        assert_eq!(snapshot.flows_open, 0, "{snapshot:?}");
        assert_eq!(self.view.engine().buffers_in_use, 0);
        for live in &self.live {
            assert_eq!(live.flows_open(), 0, "flows counted on a backend after their end");
        }
        self.dataplane.join().unwrap();
    }
}

fn client_of(address: SocketAddr) -> UdpSocket {
    let socket = match address {
        SocketAddr::V4(_) => UdpSocket::bind(any()).unwrap(),
        SocketAddr::V6(_) => UdpSocket::bind("[::1]:0").unwrap(),
    };
    socket.connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A server that answers each datagram by `answer`, until the process ends.
fn server_at(bind: &str, answer: impl Fn(&UdpSocket, &[u8], SocketAddr) + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind(bind).unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = vec![0; 70_000];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            answer(&socket, &buffer[..length], from);
        }
    });
    address
}

fn echo(socket: &UdpSocket, datagram: &[u8], from: SocketAddr) {
    let _ = socket.send_to(datagram, from);
}

/// A server that answers with its name.
fn named(name: &'static str) -> SocketAddr {
    server_at(&any(), move |socket, _, from| {
        let _ = socket.send_to(name.as_bytes(), from);
    })
}

/// An address where nothing listens.
fn refusing() -> SocketAddr {
    UdpSocket::bind(any()).unwrap().local_addr().unwrap()
}

fn ask(client: &UdpSocket, datagram: &[u8]) -> Vec<u8> {
    client.send(datagram).unwrap();
    let mut answer = vec![0; 70_000];
    let length = client.recv(&mut answer).unwrap();
    answer.truncate(length);
    answer
}

#[test]
fn datagrams_go_both_ways_as_they_are() {
    let proxy = Proxy::to(&[server_at(&any(), echo)]);
    let client = proxy.client();
    // Empty ones end a multishot receive; 65,507 is the most that IPv4 carries.
    for length in [1, 0, 1_200, 0, 0, 9_000, 65_507, 3] {
        let datagram: Vec<u8> = (0..length).map(|n| n as u8).collect();
        assert_eq!(ask(&client, &datagram), datagram, "{length} bytes");
    }
    eventually("all are counted", || proxy.snapshot().datagrams_to_client == 8);
    let counts = proxy.snapshot();
    assert_eq!((counts.protocol, counts.flows_opened, counts.flows_open), ("udp", 1, 1));
    assert_eq!((counts.datagrams_to_backend, counts.datagrams_to_client), (8, 8));
    assert_eq!((counts.bytes_to_backend, counts.bytes_to_client), (75_711, 75_711));
    assert_eq!((proxy.live[0].flows_open(), proxy.live[0].flows_opened()), (1, 1));
    assert!(proxy.live[0].totals().first_bytes == 1, "its first answer was timed");
    proxy.finish();
}

#[test]
fn ipv6_on_both_sides_and_mixed() {
    let (v6, v4) = (server_at("[::1]:0", echo), server_at(&any(), echo));
    for bind in ["[::1]:0", &any()] {
        let proxy = Proxy::at(bind, Policy::RoundRobin, &[v6, v4], 1, |_| {});
        for _ in 0..2 {
            assert_eq!(ask(&proxy.client(), b"six"), b"six");
        }
        assert_eq!((proxy.live[0].flows_opened(), proxy.live[1].flows_opened()), (1, 1));
        proxy.finish();
    }
}

#[test]
fn a_flow_keeps_its_backend_and_flows_are_balanced() {
    let proxy = Proxy::to(&[named("a"), named("b")]);
    let clients: Vec<_> = (0..10).map(|_| proxy.client()).collect();
    let mut counts = [0; 2];
    for client in &clients {
        let first = ask(client, b"who?");
        for _ in 0..5 {
            assert_eq!(ask(client, b"who?"), first);
        }
        counts[usize::from(first == b"b")] += 1;
    }
    assert_eq!(counts, [5, 5]);
    proxy.finish();
}

#[test]
fn an_answer_comes_from_the_address_that_was_asked() {
    let backend = server_at(&any(), echo);
    for (bind, asked) in [("0.0.0.0:0", "127.0.0.7"), ("0.0.0.0:0", "127.0.0.1"), ("[::]:0", "::1")] {
        let proxy = Proxy::at(bind, Policy::RoundRobin, &[backend], 1, |_| {});
        let asked = SocketAddr::new(asked.parse::<IpAddr>().unwrap(), proxy.address.port());
        // Connected: what comes from another address is not received.
        assert_eq!(ask(&client_of(asked), b"here"), b"here");
        proxy.finish();
    }
    // One client, two addresses of ours: two flows.
    let proxy = Proxy::at("0.0.0.0:0", Policy::RoundRobin, &[backend], 1, |_| {});
    let client = UdpSocket::bind(any()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    for asked in ["127.0.0.2", "127.0.0.3"] {
        let asked: SocketAddr = (asked.parse::<IpAddr>().unwrap(), proxy.address.port()).into();
        client.send_to(b"x", asked).unwrap();
        assert_eq!(client.recv_from(&mut [0; 8]).unwrap(), (1, asked));
    }
    assert_eq!(proxy.snapshot().flows_open, 2);
    proxy.finish();
}

#[test]
fn trains_of_unlike_sizes_arrive_datagram_by_datagram() {
    // Bursts each way: what came together goes out together, and must come apart again as it was.
    let sizes = [1_200, 1_200, 1_200, 300, 1_200, 64, 64, 64, 0, 64, 1_400, 1_400, 1, 1, 1, 900];
    let (tell, seen) = std::sync::mpsc::channel();
    let backend = server_at(&any(), move |socket, datagram, from| {
        tell.send(datagram.to_vec()).unwrap();
        if datagram == b"go" {
            for (n, size) in sizes.iter().cycle().take(64).enumerate() {
                socket.send_to(&vec![n as u8; *size], from).unwrap();
            }
        }
    });
    let proxy = Proxy::to(&[backend]);
    let client = proxy.client();
    for round in 0..20_u8 {
        for (n, size) in sizes.iter().enumerate() {
            client.send(&vec![round ^ n as u8; *size]).unwrap();
        }
        for (n, size) in sizes.iter().enumerate() {
            assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), vec![round ^ n as u8; *size], "datagram {n}");
        }
    }
    for _ in 0..10 {
        client.send(b"go").unwrap();
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), b"go");
        let mut answer = vec![0; 2_000];
        for (n, size) in sizes.iter().cycle().take(64).enumerate() {
            let length = client.recv(&mut answer).unwrap();
            assert_eq!(answer[..length], vec![n as u8; *size], "answer {n}");
        }
    }
    proxy.finish();
}

#[test]
fn a_refused_datagram_is_given_to_another_backend() {
    let proxy = Proxy::to(&[refusing(), named("alive")]);
    for _ in 0..6 {
        let client = proxy.client();
        assert_eq!(ask(&client, b"first"), b"alive");
        assert_eq!(ask(&client, b"second"), b"alive", "and it stays there");
    }
    let failures = proxy.live[0].connect_failures();
    assert!((1..=3).contains(&failures), "a backend that refuses is left alone: {failures} flows tried it");
    assert_eq!(proxy.live[1].connect_failures(), 0);
    assert_eq!(proxy.snapshot().connect_retries, failures);
    proxy.finish();
}

#[test]
fn nobody_to_give_it_to_ends_the_flow() {
    let proxy = Proxy::to(&[refusing(), refusing(), refusing()]);
    proxy.client().send(b"anyone?").unwrap();
    eventually("two were tried", || proxy.closed("connect_failed") == 1);
    let failures: u64 = proxy.live.iter().map(|live| live.connect_failures()).sum();
    assert_eq!(failures, 2, "one retry");
    proxy.finish();
    let proxy = Proxy::to(&[]);
    proxy.client().send(b"anyone?").unwrap();
    eventually("no backend", || proxy.closed("no_backend") == 1);
    proxy.finish();
}

#[test]
fn a_backend_that_dies_is_replaced_with_the_next_datagram() {
    let mortal = UdpSocket::bind(any()).unwrap();
    mortal.set_read_timeout(Some(PATIENCE)).unwrap();
    let proxy = Proxy::to(&[mortal.local_addr().unwrap(), named("heir")]);
    // One of two clients comes to it.
    let mut clients = [proxy.client(), proxy.client()];
    for (n, client) in clients.iter().enumerate() {
        client.send(&[n as u8]).unwrap();
    }
    let mut buffer = [0; 16];
    let (length, from) = mortal.recv_from(&mut buffer).unwrap();
    mortal.send_to(&buffer[..length], from).unwrap();
    clients.swap(0, usize::from(buffer[0]));
    let [client, _other] = clients;
    assert_eq!(client.recv(&mut buffer).unwrap(), 1);
    drop(mortal);
    client.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    // What it refuses is lost, as UDP may lose it; the flow is over, and the next datagram has a new one.
    let deadline = Instant::now() + PATIENCE;
    loop {
        client.send(b"still there?").unwrap();
        match client.recv(&mut buffer) {
            Ok(length) => break assert_eq!(&buffer[..length], b"heir"),
            Err(error) => assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)),
        }
        assert!(Instant::now() < deadline, "nobody took over");
    }
    assert_eq!(proxy.closed("backend_reset"), 1);
    proxy.finish();
}

#[test]
fn silence_ends_a_flow() {
    let proxy = Proxy::tuned(&[server_at(&any(), echo)], |udp| {
        udp.idle_timeout = Duration::from_millis(100);
    });
    let client = proxy.client();
    assert_eq!(ask(&client, b"1"), b"1");
    eventually("it is over", || proxy.closed("idle") == 1);
    assert_eq!(ask(&client, b"2"), b"2");
    assert_eq!(proxy.snapshot().flows_opened, 2);
    proxy.finish();
}

#[test]
fn a_flow_that_is_answered_is_over() {
    let proxy = Proxy::tuned(&[named("a"), named("b")], |udp| udp.responses = 1);
    let client = proxy.client();
    let answers: Vec<_> = (0..4).map(|_| ask(&client, b"query")).collect();
    assert!(
        answers[0] != answers[1] && answers[..2] == answers[2..],
        "each query is a flow of its own: {answers:?}"
    );
    eventually("all are over", || proxy.closed("ended") == 4);
    proxy.finish();
    // Two questions before the first answer: one flow, which ends with the second answer.
    let slow = server_at(&any(), {
        let waiting = std::cell::RefCell::new(Vec::new());
        move |socket, datagram, from| {
            waiting.borrow_mut().push((datagram.to_vec(), from));
            if waiting.borrow().len() == 2 {
                for (datagram, from) in waiting.borrow_mut().drain(..) {
                    socket.send_to(&datagram, from).unwrap();
                }
            }
        }
    });
    let proxy = Proxy::tuned(&[slow], |udp| udp.responses = 1);
    let client = proxy.client();
    client.send(b"1").unwrap();
    assert_eq!(ask(&client, b"2"), b"1");
    assert_eq!(client.recv(&mut [0; 8]).unwrap(), 1);
    eventually("it is over", || proxy.closed("ended") == 1);
    assert_eq!(proxy.snapshot().flows_opened, 1);
    proxy.finish();
}

#[test]
fn a_query_that_comes_with_the_answer_before_it_is_answered() {
    // Several outstanding on one socket, each answer followed by the next query at once: what dnsperf does.
    let proxy = Proxy::tuned(&[server_at(&any(), echo)], |udp| udp.responses = 1);
    let clients: Vec<_> = (0..8).map(|_| proxy.client()).collect();
    for client in &clients {
        (0..5).for_each(|_| assert_eq!(client.send(b"query").unwrap(), 5));
    }
    for _ in 0..400 {
        for client in &clients {
            client.recv(&mut [0; 8]).expect("every query is answered");
            client.send(b"query").unwrap();
        }
    }
    proxy.finish();
}

#[test]
fn requests_are_balanced_one_by_one() {
    let proxy = Proxy::tuned(&[named("a"), named("b")], |udp| (udp.requests, udp.responses) = (1, 1));
    let client = proxy.client();
    // A burst: nobody waits for an answer, and still each goes to the next backend.
    (0..8).for_each(|_| assert_eq!(client.send(b"query").unwrap(), 5));
    let mut counts = [0; 2];
    for _ in 0..8 {
        let mut answer = [0; 8];
        client.recv(&mut answer).unwrap();
        counts[usize::from(answer[0] == b'b')] += 1;
    }
    assert_eq!(counts, [4, 4]);
    eventually("all are over", || proxy.closed("ended") == 8);
    proxy.finish();
}

#[test]
fn new_flows_are_shed_at_the_bound_and_old_ones_go_on() {
    let proxy = Proxy::tuned(&[server_at(&any(), echo)], |udp| {
        udp.flows_max = 10;
        udp.idle_timeout = Duration::from_secs(3);
    });
    let clients: Vec<_> = (0..10).map(|_| proxy.client()).collect();
    clients.iter().for_each(|client| assert_eq!(ask(client, b"in"), b"in"));
    let late = proxy.client();
    late.send(b"out").unwrap();
    eventually("it is shed", || proxy.shed("flows") == 1);
    clients.iter().for_each(|client| assert_eq!(ask(client, b"still"), b"still"));
    drop(clients);
    late.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let deadline = Instant::now() + PATIENCE;
    // There is room as soon as flows are over.
    while late.send(b"in").is_err() || late.recv(&mut [0; 8]).is_err() {
        assert!(Instant::now() < deadline, "no room came back");
    }
    proxy.finish();
}

#[test]
fn thousands_of_flows_pass_through_a_bounded_table() {
    let proxy = Proxy::tuned(&[server_at(&any(), echo)], |udp| {
        udp.flows_max = 500;
        udp.idle_timeout = Duration::from_millis(200);
    });
    let mut sent = 0;
    while proxy.snapshot().flows_opened < 3_000 || proxy.shed("flows") < 100 {
        assert!(sent < 2_000_000, "{:?}", proxy.snapshot());
        for _ in 0..200 {
            let client = proxy.client();
            client.send(b"x").unwrap();
            sent += 1;
        }
        assert!(proxy.snapshot().flows_open <= 500);
    }
    eventually("all end", || proxy.snapshot().flows_open == 0);
    assert_eq!(ask(&proxy.client(), b"after"), b"after");
    proxy.finish();
}

#[test]
fn open_flows_go_on_while_it_drains_and_new_ones_are_refused() {
    let proxy = Proxy::tuned(&[server_at(&any(), echo)], |udp| {
        udp.idle_timeout = Duration::from_millis(1_500);
    });
    let client = proxy.client();
    assert_eq!(ask(&client, b"before"), b"before");
    proxy.dataplane.drain(PATIENCE);
    let late = proxy.client();
    eventually("new flows are dropped", || {
        late.send(b"late").unwrap();
        proxy.dropped("draining") > 0
    });
    assert_eq!(ask(&client, b"during"), b"during");
    eventually("its last flow was silent long enough", || proxy.dataplane.is_finished());
    assert_eq!(proxy.closed("idle"), 1);
    proxy.finish();
    // At its deadline it does not wait any longer.
    let proxy = Proxy::to(&[server_at(&any(), echo)]);
    assert_eq!(ask(&proxy.client(), b"x"), b"x");
    proxy.dataplane.drain(Duration::from_millis(50));
    eventually("it ends", || proxy.dataplane.is_finished());
    assert_eq!(proxy.closed("drained"), 1);
    proxy.finish();
}

#[test]
fn a_client_keeps_its_backend_over_a_restart() {
    let backends: Vec<SocketAddr> = ["a", "b", "c", "d", "e"].into_iter().map(named).collect();
    let mut port = any();
    let mut answers: Vec<Vec<Vec<u8>>> = Vec::new();
    for workers in [1, 2] {
        let proxy = Proxy::at(&port, Policy::Maglev, &backends, workers, |_| {});
        port = proxy.address.to_string();
        let clients = (1..30).map(|n| {
            let socket = UdpSocket::bind(format!("127.0.1.{n}:0")).unwrap();
            socket.connect(proxy.address).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        });
        answers.push(clients.map(|client| ask(&client, b"who?")).collect());
        proxy.finish();
    }
    assert_eq!(answers[0], answers[1]);
    let mut all = answers.remove(0);
    all.sort();
    all.dedup();
    assert!(all.len() >= 4, "and they are spread: {all:?}");
}

/// What a QUIC server answers a client's first packet with: a long header with an ID that it chose.
fn long_header(destination: &[u8], source: &[u8]) -> Vec<u8> {
    let mut packet = vec![0xc0, 0, 0, 0, 1, destination.len() as u8];
    packet.extend(destination);
    packet.push(source.len() as u8);
    packet.extend(source);
    packet.extend([0; 1_100]);
    packet
}

/// Answers handshakes with an ID of its own, and everything else with its name.
fn quic_server(name: u8) -> SocketAddr {
    let count = AtomicUsize::new(0);
    server_at(&any(), move |socket, packet, from| {
        if packet[0] & 0x80 != 0 {
            let n = count.fetch_add(1, Ordering::Relaxed) as u8;
            socket.send_to(&long_header(&[1; 4], &[name, n, 3, 4, 5, 6, 7, 8]), from).unwrap();
        } else {
            socket.send_to(&[name], from).unwrap();
        }
    })
}

#[test]
fn a_quic_client_that_moves_stays_on_its_backend() {
    let backends: Vec<_> = (0..4).map(quic_server).collect();
    // Two workers: a client that moves may come to the other one.
    let proxy = Proxy::at(&any(), Policy::RoundRobin, &backends, 2, |udp| udp.quic = true);
    // All stay, so that nobody comes from a port where another one's flow is still known.
    let mut clients = Vec::new();
    for n in 0..12_u8 {
        let client = proxy.client();
        let answer = ask(&client, &long_header(&[n; 8], &[1; 4]));
        let cid = answer[11..19].to_vec();
        let name = cid[0];
        for _ in 0..5 {
            // From another port each time: its NAT forgot it.
            let moved = proxy.client();
            assert_eq!(ask(&moved, &[&[0x40], &cid[..], b"1-rtt"].concat()), [name]);
            clients.push(moved);
        }
        clients.push(client);
    }
    proxy.finish();
}

#[test]
fn a_quic_client_that_moves_under_a_new_id_is_found_by_the_server_id() {
    let backends: Vec<_> = (0..4).map(quic_server).collect();
    let proxy = Proxy::at(&any(), Policy::RoundRobin, &backends, 1, |udp| {
        udp.quic = true;
        udp.quic_server_id = Some(ServerIdForm::Ipv4Port);
    });
    // All stay, so that nobody comes from a port where another one's flow is still known.
    let mut clients = Vec::new();
    for (name, backend) in backends.iter().enumerate() {
        for nonce in 0..5_u8 {
            let port = backend.port().to_be_bytes();
            let IpAddr::V4(ip) = backend.ip() else { unreachable!() };
            let packet = [&[0x40, 0x07][..], &ip.octets(), &port, &[nonce; 10]].concat();
            let client = proxy.client();
            assert_eq!(ask(&client, &packet), [name as u8]);
            clients.push(client);
        }
    }
    // An id that nobody has is no reason not to serve.
    assert_eq!(ask(&proxy.client(), &[0x40, 0x07, 10, 9, 8, 7, 1, 1, 5, 5]).len(), 1);
    proxy.finish();
}

#[test]
fn a_server_id_that_is_encrypted_is_found_with_its_key() {
    let backends: Vec<_> = (0..4).map(quic_server).collect();
    let key = [0x5a; 16];
    let proxy = Proxy::at(&any(), Policy::RoundRobin, &backends, 1, |udp| {
        let mut keys = ServerIdKeys::new(10);
        assert!(keys.insert(2, key, aes128(key)));
        udp.quic = true;
        udp.quic_server_id = Some(ServerIdForm::Ipv4Port);
        udp.quic_keys = Some(Arc::new(keys));
    });
    let cipher = aes128(key);
    // As above: all stay.
    let mut clients = Vec::new();
    for (name, backend) in backends.iter().enumerate() {
        for nonce in 0..5_u8 {
            let port = backend.port().to_be_bytes();
            let IpAddr::V4(ip) = backend.ip() else { unreachable!() };
            let mut block = [0; 16];
            block.copy_from_slice(&[&ip.octets()[..], &port, &[nonce; 10]].concat());
            cipher.encrypt(&mut block);
            let client = proxy.client();
            assert_eq!(ask(&client, &[&[0x40, 0x50][..], &block].concat()), [name as u8]);
            clients.push(client);
        }
    }
    proxy.finish();
}

#[test]
fn tcp_and_udp_share_a_port_and_a_taken_one_is_said() {
    // An address of its own, where nobody has that port for TCP.
    let [.., a, b] = std::process::id().to_be_bytes();
    let holder = UdpSocket::bind((IpAddr::from([127, 91, a, b]), 0)).unwrap();
    let (table, _) = table(Policy::RoundRobin, &[]);
    let publisher = Publisher::new(table);
    let address = holder.local_addr().unwrap();
    let config = |workers| {
        let udp = ListenerConfig::udp(address, "p".parse().unwrap(), publisher.clone(), UdpConfig::default());
        let tcp = ListenerConfig::new(address, "p".parse().unwrap(), publisher.clone());
        let mut config = Config::new(vec![tcp, udp]);
        config.workers = workers;
        config.engine = Some(engine());
        config
    };
    for workers in [1, 2] {
        let errors = dataplane::bind(config(workers)).unwrap_err();
        let text = errors[0].to_string();
        assert!(
            errors.len() == 1 && text.contains(&format!("udp://{address}: the port is in use")),
            "{text}"
        );
    }
    drop(holder);
    for workers in [1, 2] {
        let running = dataplane::bind(config(workers)).unwrap().start().unwrap();
        assert_eq!(running.addresses(), [address, address]);
        running.stop();
        running.join().unwrap();
    }
}

#[test]
fn each_flow_has_a_line_in_the_access_log_and_counts_for_its_clients_limits() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("access.log");
    let (table, _) = table(Policy::RoundRobin, &[refusing(), server_at(&any(), echo)]);
    let udp = UdpConfig { responses: 1, ..UdpConfig::default() };
    let mut listener =
        ListenerConfig::udp(any().parse().unwrap(), "p".parse().unwrap(), Publisher::new(table), udp);
    listener.limits.new_flows_per_client_per_second = 1;
    let mut config = Config::new(vec![listener]);
    config.workers = 1;
    config.engine = Some(engine());
    let to = dataplane::AccessLogTo::File(file.clone());
    config.access_log = Some(dataplane::AccessLogConfig { to, format: dataplane::AccessLogFormat::Json });
    let bound = dataplane::bind(config).unwrap();
    let address = bound.addresses()[0];
    let dataplane = bound.start().unwrap();
    let view = dataplane.view();
    let client = client_of(address);
    assert_eq!(ask(&client, b"hello"), b"hello", "the one that refuses is passed over");
    let lines = || std::fs::read_to_string(&file).unwrap_or_default();
    eventually("the line is written", || lines().contains('\n'));
    let line = lines();
    for part in [
        "\"protocol\":\"udp\"".to_owned(),
        format!("\"client\":\"{}\"", client.local_addr().unwrap()),
        "\"resource\":\"b1\"".to_owned(),
        "\"end\":\"ended\"".to_owned(),
    ] {
        assert!(line.contains(&part), "{part} in {line}");
    }
    // A second flow within the second is one too many, and has no line.
    client.send(b"again").unwrap();
    let shed = || view.listeners()[0].sheds.iter().find(|(label, _)| *label == "client_rate").unwrap().1;
    eventually("it is turned away", || shed() == 1);
    dataplane.stop();
    dataplane.join().unwrap();
    assert_eq!(lines().lines().count(), 1, "{}", lines());
}
