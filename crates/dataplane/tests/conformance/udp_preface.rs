//! What comes before datagrams: PROXY headers in and out, routes, ranges of ports.

use std::os::fd::AsFd as _;

use dataplane::{Connecting, ListenerLimits, ProxyHeader, ProxyProtocol, Target};
use flow::preface::Route;
use flow::preface::proxy::{self, Accepts, Addresses, Header, Outgoing, Transport, Version, tlv};

use super::*;

/// A listener at any port, and its one backend.
fn listener(backend: SocketAddr) -> ListenerConfig {
    listener_of(Policy::First, &[backend])
}

fn listener_of(policy: Policy, backends: &[SocketAddr]) -> ListenerConfig {
    let table = Publisher::new(table(policy, backends).0);
    ListenerConfig::udp(any().parse().unwrap(), "default".parse().unwrap(), table, UdpConfig::default())
}

fn trusting(network: &str) -> Option<ProxyProtocol> {
    Some(ProxyProtocol { accepts: Accepts::V2, trusted: vec![network.parse().unwrap()] })
}

fn udp_of(listener: &mut ListenerConfig) -> &mut UdpConfig {
    match &mut listener.protocol {
        dataplane::Protocol::Udp(udp) => udp,
        dataplane::Protocol::Tcp => unreachable!("a listener of datagrams"),
    }
}

/// Another pool, and the route to it.
fn add_route(listener: &mut ListenerConfig, route: Route, backend: SocketAddr) {
    let table = Publisher::new(table(Policy::First, &[backend]).0);
    let pool = format!("pool{}", listener.targets.len()).parse().unwrap();
    let connecting = listener.targets[0].connecting.clone();
    listener.routes.push(Route { target: listener.targets.len() as u16, ..route });
    listener.targets.push(Target { pool, table, connecting, share: None });
}

fn from(network: &str) -> Route {
    Route { networks: vec![network.parse().unwrap()], ..Route::default() }
}

fn start(listener: ListenerConfig) -> Proxy {
    let mut config = Config::new(vec![listener]);
    config.workers = 1;
    config.engine = Some(engine());
    let bound = dataplane::bind(config).unwrap();
    let address = bound.addresses()[0];
    let dataplane = bound.start().unwrap();
    Proxy { view: dataplane.view(), dataplane, address, live: Vec::new() }
}

/// Accepts headers, and sends them.
fn both_ways(backend: SocketAddr) -> ListenerConfig {
    let mut listener = listener(backend);
    listener.proxy = trusting("127.0.0.0/8");
    listener.targets[0].connecting = sending();
    listener
}

fn sending() -> Connecting {
    Connecting { proxy: Some(Version::V2), ..Connecting::default() }
}

/// What a proxy sends for a client of its own.
fn headed(source: &str, passed_on: &[u8], payload: &[u8]) -> Vec<u8> {
    let (source, destination) = (source.parse().unwrap(), "198.51.100.1:53".parse().unwrap());
    let header = Outgoing {
        addresses: &Addresses::Inet { source, destination },
        transport: Transport::Datagram,
        passed_on,
        authority: None,
        unique_id: None,
    };
    let mut bytes = Vec::new();
    proxy::write_v2(&header, &mut bytes);
    bytes.extend_from_slice(payload);
    bytes
}

fn local(payload: &[u8]) -> Vec<u8> {
    [&b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"[..], payload].concat()
}

fn read(datagram: &[u8]) -> (Header<'_>, &[u8]) {
    let header = proxy::read_datagram(datagram).unwrap().expect("every datagram has a header");
    let payload = &datagram[header.length..];
    (header, payload)
}

/// A server that hands over what it gets, and answers with it.
fn telling() -> (SocketAddr, std::sync::mpsc::Receiver<Vec<u8>>) {
    let (tell, told) = std::sync::mpsc::channel();
    let server = server_at(&any(), move |socket, datagram, from| {
        let _ = tell.send(datagram.to_vec());
        let _ = socket.send_to(datagram, from);
    });
    (server, told)
}

fn receive(client: &UdpSocket) -> Vec<u8> {
    let mut answer = vec![0; 70_000];
    let length = client.recv(&mut answer).unwrap();
    answer.truncate(length);
    answer
}

#[test]
fn each_client_of_a_proxy_s_socket_has_a_flow_and_is_named_to_the_backend() {
    let (backend, _told) = telling();
    let proxy = start(both_ways(backend));
    let front = proxy.client();
    let id = |datagram: &[u8]| read(datagram).0.tlv(tlv::UNIQUE_ID).unwrap().to_vec();
    let mut ids = Vec::new();
    for round in 0..3 {
        for source in ["192.0.2.1:1000", "192.0.2.2:1000", "192.0.2.1:1001"] {
            let payload = format!("{source} {round}");
            let seen = ask(&front, &headed(source, &[], payload.as_bytes()));
            let (header, rest) = read(&seen);
            assert_eq!(rest, payload.as_bytes());
            assert_eq!(header.transport, Transport::Datagram);
            let (source, destination) = (source.parse().unwrap(), "198.51.100.1:53".parse().unwrap());
            assert_eq!(header.addresses, Addresses::Inet { source, destination });
            assert!(header.tlv(tlv::CRC32C).is_some());
            ids.push(id(&seen));
        }
    }
    assert_eq!(ids[..3], ids[3..6], "a flow keeps its id");
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
    assert_eq!(proxy.snapshot().flows_opened, 3);
    // What is told beside goes on, as it is with each datagram.
    let last = |seen: &[u8]| read(seen).0.tlv(0xE0).map(<[u8]>::to_vec);
    for value in [&b"one"[..], b"two", b"two"] {
        let tlvs = [&[0xE0, 0, 3][..], value].concat();
        let seen = ask(&front, &headed("192.0.2.1:1000", &tlvs, b"x"));
        assert_eq!((last(&seen).as_deref(), id(&seen)), (Some(value), ids[0].clone()));
    }
    // The proxy's own datagrams have its address.
    let seen = ask(&front, &local(b"health"));
    let (header, rest) = read(&seen);
    let own = Addresses::Inet { source: front.local_addr().unwrap(), destination: proxy.address };
    assert_eq!((header.addresses, rest), (own, &b"health"[..]));
    // An empty datagram is one.
    assert_eq!(read(&ask(&front, &headed("192.0.2.1:1000", &[], b""))).1, b"");
    assert_eq!(proxy.snapshot().flows_opened, 4);
    eventually("payload is counted, and no header", || proxy.snapshot().datagrams_to_backend == 14);
    assert_eq!(proxy.snapshot().bytes_to_backend, 9 * 16 + 3 + 6);
    proxy.finish();
}

#[test]
fn what_has_no_right_header_is_dropped_and_counted() {
    let (backend, told) = telling();
    let proxy = start(both_ways(backend));
    let front = proxy.client();
    let mut wrong_sum = headed("192.0.2.1:1000", &[], b"x");
    let last = wrong_sum.len() - 2;
    wrong_sum[last] ^= 1;
    let whole = headed("192.0.2.1:1000", &[], b"");
    for bad in [&wrong_sum[..], &whole[..whole.len() - 1], &whole[..12], b"\r\n\r\n\0\r\nQUIT\n\x21\x13\0\0"]
    {
        front.send(bad).unwrap();
    }
    eventually("four are wrong", || proxy.dropped("proxy_invalid") == 4);
    for bare in [&b"bare"[..], b"", &whole[..11], b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nx"] {
        front.send(bare).unwrap();
    }
    eventually("four have none", || proxy.dropped("proxy_missing") == 4);
    // Also after one that had one.
    let seen = ask(&front, &headed("192.0.2.1:1000", &[], b"good"));
    assert_eq!(read(&seen).1, b"good");
    front.send(b"bare").unwrap();
    eventually("and one more", || proxy.dropped("proxy_missing") == 5);
    assert_eq!(read(&told.recv_timeout(PATIENCE).unwrap()).1, b"good");
    assert!(told.try_recv().is_err(), "nothing else was passed on");
    assert_eq!(proxy.snapshot().flows_opened, 1);
    proxy.finish();
    let mut distrusting = listener(backend);
    distrusting.proxy = trusting("192.0.2.0/24");
    let proxy = start(distrusting);
    proxy.client().send(&headed("192.0.2.1:1000", &[], b"liar")).unwrap();
    eventually("it is counted apart", || proxy.dropped("proxy_untrusted") == 1);
    assert_eq!(proxy.snapshot().flows_opened, 0);
    proxy.finish();
}

#[test]
fn a_proxy_may_say_once_for_whom_it_speaks() {
    let (backend, _told) = telling();
    let mut config = both_ways(backend);
    // With its answer a flow is over, and its client goes on.
    *udp_of(&mut config) =
        UdpConfig { responses: 1, proxy_header: ProxyHeader::First, ..UdpConfig::default() };
    let proxy = start(config);
    let source = |datagram: &[u8]| read(datagram).0.addresses.source().unwrap().to_string();
    let front = proxy.client();
    front.send(b"who").unwrap();
    eventually("nobody knows", || proxy.dropped("proxy_missing") == 1);
    assert_eq!(source(&ask(&front, &headed("192.0.2.1:1000", &[], b"first"))), "192.0.2.1:1000");
    for _ in 0..3 {
        let seen = ask(&front, b"more");
        assert_eq!((source(&seen).as_str(), read(&seen).1), ("192.0.2.1:1000", &b"more"[..]));
    }
    // A header alone is no datagram of the client.
    front.send(&headed("192.0.2.2:1000", &[], b"")).unwrap();
    let seen = ask(&front, b"another");
    assert_eq!((source(&seen).as_str(), read(&seen).1), ("192.0.2.2:1000", &b"another"[..]));
    let other = proxy.client();
    front.send(&local(b"own")).unwrap();
    assert_eq!(source(&receive(&front)), front.local_addr().unwrap().to_string());
    assert_eq!(source(&ask(&front, b"own")), front.local_addr().unwrap().to_string());
    other.send(b"who").unwrap();
    eventually("each of its ports is another", || proxy.dropped("proxy_missing") == 2);
    proxy.finish();
}

#[test]
fn each_datagram_of_a_train_goes_out_with_its_header() {
    let (backend, told) = telling();
    let mut config = listener(backend);
    config.targets[0].connecting = sending();
    let proxy = start(config);
    let client = proxy.client();
    let sizes = [1_200, 1_200, 1_200, 300, 1_200, 64, 64, 64, 0, 64, 1_400, 1_400, 1, 1, 1, 900];
    let own = Addresses::Inet { source: client.local_addr().unwrap(), destination: proxy.address };
    for round in 0..20_u8 {
        for (n, size) in sizes.iter().enumerate() {
            client.send(&vec![round ^ n as u8; *size]).unwrap();
        }
        for (n, size) in sizes.iter().enumerate() {
            let seen = told.recv_timeout(PATIENCE).unwrap();
            let (header, payload) = read(&seen);
            assert_eq!(
                (&header.addresses, payload),
                (&own, &vec![round ^ n as u8; *size][..]),
                "datagram {n}"
            );
        }
    }
    // What came as a train goes out as one; not the longest, which has no room for headers.
    for datagrams in [10_u8, 54] {
        let train: Vec<u8> = (0..datagrams).flat_map(|n| [n; 1_200]).chain([7; 5]).collect();
        uring::send_message(client.as_fd(), (None, None), [&train[..]].into_iter(), 1_200).unwrap();
        for n in 0..datagrams {
            assert_eq!(read(&told.recv_timeout(PATIENCE).unwrap()).1, [n; 1_200]);
        }
        assert_eq!(read(&told.recv_timeout(PATIENCE).unwrap()).1, [7; 5]);
    }
    assert_eq!(proxy.snapshot().datagrams_dropped.iter().map(|(_, n)| n).sum::<u64>(), 0);
    proxy.finish();
}

#[test]
fn what_is_too_long_with_its_header_is_dropped_and_counted() {
    let (backend, told) = telling();
    let mut config = listener(backend);
    config.targets[0].connecting = sending();
    let proxy = start(config);
    let client = proxy.client();
    client.send(b"x").unwrap();
    let seen = told.recv_timeout(PATIENCE).unwrap();
    let room = 65_507 - read(&seen).0.length;
    client.send(&vec![7; room]).unwrap();
    assert_eq!(read(&told.recv_timeout(PATIENCE).unwrap()).1.len(), room);
    client.send(&vec![7; room + 1]).unwrap();
    eventually("it is counted", || proxy.dropped("too_large") == 1);
    client.send(b"y").unwrap();
    assert_eq!(read(&told.recv_timeout(PATIENCE).unwrap()).1, b"y");
    proxy.finish();
}

#[test]
fn what_was_refused_goes_to_another_backend_with_its_header() {
    let (backend, told) = telling();
    let mut config = listener_of(Policy::RoundRobin, &[refusing(), backend]);
    config.proxy = trusting("127.0.0.0/8");
    config.targets[0].connecting = sending();
    let proxy = start(config);
    for n in 0..4_u16 {
        // One socket for all of them: only what is announced tells them apart.
        let front = proxy.client();
        for payload in [&b"first"[..], b"second", b"third"] {
            front.send(&headed(&format!("192.0.2.1:{}", 1_000 + n), &[], payload)).unwrap();
        }
        let mut payloads = Vec::new();
        for _ in 0..3 {
            let seen = told.recv_timeout(PATIENCE).unwrap();
            let (header, payload) = read(&seen);
            assert_eq!(header.addresses.source().unwrap().port(), 1_000 + n);
            payloads.push(payload.to_vec());
        }
        payloads.sort();
        assert_eq!(payloads, [&b"first"[..], b"second", b"third"]);
    }
    assert!(proxy.snapshot().connect_retries > 0);
    proxy.finish();
}

#[test]
fn the_address_in_a_header_counts_for_routes_limits_and_affinity() {
    let backends: Vec<SocketAddr> = ["a", "b", "c", "d", "e"].into_iter().map(named).collect();
    let mut config = listener_of(Policy::Maglev, &backends);
    config.proxy = trusting("127.0.0.0/8");
    config.limits = ListenerLimits { flows_per_client: 2, ..ListenerLimits::default() };
    add_route(&mut config, from("192.0.2.0/24"), named("inside"));
    let proxy = start(config);
    let fronts = [proxy.client(), proxy.client()];
    // The same client is the same one through whichever of the proxy's sockets, and its port is no matter.
    let mut all = Vec::new();
    for n in 1..20 {
        let [one, two] = std::array::from_fn(|port| {
            ask(&fronts[port], &headed(&format!("203.0.113.{n}:{}", 1_000 + port), &[], b"who?"))
        });
        assert_eq!(one, two);
        all.push(one);
    }
    all.sort();
    all.dedup();
    assert!(all.len() >= 3, "and they are spread: {all:?}");
    assert_eq!(ask(&fronts[0], &headed("192.0.2.7:1", &[], b"who?")), b"inside");
    fronts[0].send(&headed("203.0.113.1:5", &[], b"one too many")).unwrap();
    eventually("it is turned away", || proxy.shed("client_flows") == 1);
    let flows: Vec<u64> = proxy.snapshot().targets.iter().map(|target| target.flows).collect();
    assert_eq!(flows, [38, 1]);
    proxy.finish();
}

#[test]
fn a_range_of_ports_is_one_listener_and_a_port_selects() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("access.log");
    // Three ports in a row of an address that nobody else has.
    let first = loop {
        let port = UdpSocket::bind(any()).unwrap().local_addr().unwrap().port();
        if port < 65_000 && (port..=port + 2).all(|port| UdpSocket::bind((host(), port)).is_ok()) {
            break port;
        }
    };
    let mut listener = listener(named("default"));
    (listener.bind, listener.last_port) = ((host(), first).into(), Some(first + 2));
    add_route(
        &mut listener,
        Route { ports: Some(first + 1..=first + 2), ..Route::default() },
        named("upper"),
    );
    let mut config = Config::new(vec![listener]);
    (config.workers, config.engine) = (1, Some(engine()));
    let to = dataplane::AccessLogTo::File(file.clone());
    config.access_log = Some(dataplane::AccessLogConfig { to, format: dataplane::AccessLogFormat::Json });
    let dataplane = dataplane::bind(config).unwrap().start().unwrap();
    let view = dataplane.view();
    let client = UdpSocket::bind(any()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    for _ in 0..2 {
        for (port, want) in [(first, "default"), (first + 1, "upper"), (first + 2, "upper")] {
            let asked = SocketAddr::from((host(), port));
            client.send_to(b"who?", asked).unwrap();
            let mut answer = [0; 16];
            let (length, from) = client.recv_from(&mut answer).unwrap();
            assert_eq!(
                (&answer[..length], from),
                (want.as_bytes(), asked),
                "answers leave from the port that was asked"
            );
        }
    }
    let snapshot = view.listeners().remove(0);
    assert_eq!(snapshot.name, format!("udp://{}:{first}-{}", host(), first + 2));
    assert_eq!(snapshot.flows_opened, 3, "each port is another flow");
    assert_eq!(snapshot.targets.iter().map(|target| target.flows).collect::<Vec<_>>(), [1, 2]);
    let mut routes: Vec<u16> = view.decisions(9).iter().map(|decision| decision.route).collect();
    routes.sort_unstable();
    assert_eq!(routes, [0, 1, 1]);
    dataplane.drain(Duration::from_millis(20));
    eventually("workers end", || dataplane.is_finished());
    dataplane.join().unwrap();
    let lines = std::fs::read_to_string(&file).unwrap();
    assert_eq!(lines.matches("\"pool\":\"pool1\",\"route\":1").count(), 2, "{lines}");
}

#[test]
fn a_quic_client_that_moves_to_another_route_stays_on_its_backend() {
    let mut config = listener(quic_server(1));
    config.bind = "0.0.0.0:0".parse().unwrap();
    udp_of(&mut config).quic = true;
    add_route(&mut config, from("127.9.0.0/16"), quic_server(2));
    let proxy = start(config);
    let from = |ip: [u8; 4]| {
        let client = UdpSocket::bind((IpAddr::from(ip), 0)).unwrap();
        client.connect((host(), proxy.address.port())).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    };
    let [inside, outside, stranger] = [[127, 9, 0, 1], [127, 8, 0, 1], [127, 8, 0, 2]].map(from);
    let answer = ask(&inside, &long_header(&[9; 8], &[1; 4]));
    let cid = answer[11..19].to_vec();
    assert_eq!(cid[0], 2, "by its network");
    assert_eq!(ask(&outside, &[&[0x40], &cid[..], b"1-rtt"].concat()), [2], "by its connection");
    assert_eq!(ask(&stranger, &[0x40; 20]), [1]);
    assert_eq!(proxy.snapshot().targets.iter().map(|target| target.flows).collect::<Vec<_>>(), [1, 2]);
    proxy.finish();
}
