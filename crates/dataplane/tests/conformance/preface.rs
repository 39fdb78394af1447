//! What comes before a flow's bytes, over loopback with real sockets: PROXY headers in and out, routes, slow and bad clients.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use allocation::telemetry::{DataplaneView, ListenerSnapshot};
use allocation::{AllocationTable, Backend, LiveFacts, Members, Policy, PoolName, Publisher};
use dataplane::{Config, Connecting, Dataplane, Engine, ListenerConfig, ProxyProtocol, Target};
use flow::preface::proxy::{self, Accepts, Addresses, Header, Outgoing, Transport, Version, tlv};
use flow::preface::{GSSENC_REQUEST, Progress, Route, SSL_REQUEST};

use crate::common::{PATIENCE, engine_of, eventually};

/// The engine under test: the module that this file is compiled as (see `tests/preface.rs`).
fn engine() -> Engine {
    engine_of(module_path!())
}

struct Proxy {
    dataplane: Dataplane,
    view: Arc<dyn DataplaneView>,
    address: SocketAddr,
}

fn table(backends: &[SocketAddr]) -> Publisher {
    let backend = |(n, address): (usize, &SocketAddr)| Backend {
        id: format!("b{n}").parse().unwrap(),
        address: *address,
        flows_max: 0,
        live: Arc::new(LiveFacts::default()),
    };
    let members = Members::new(backends.iter().enumerate().map(backend).collect());
    Publisher::new(AllocationTable::new(1, Policy::First, Arc::new(members), vec![1.0; backends.len()]))
}

fn pool(name: &str) -> PoolName {
    name.parse().unwrap()
}

fn listener(bind: &str, backends: &[SocketAddr]) -> ListenerConfig {
    ListenerConfig::new(bind.parse().unwrap(), pool("default"), table(backends))
}

fn trusting(accepts: Accepts) -> Option<ProxyProtocol> {
    Some(ProxyProtocol { accepts, trusted: vec!["127.0.0.0/8".parse().unwrap()] })
}

/// The route's target is its place among the further pools, from 1.
fn with_routes(mut listener: ListenerConfig, routes: Vec<(Route, SocketAddr)>) -> ListenerConfig {
    for (n, (route, backend)) in (1..).zip(routes) {
        let connecting = Connecting::default();
        let target =
            Target { pool: pool(&format!("pool{n}")), table: table(&[backend]), connecting, share: None };
        listener.targets.push(target);
        listener.routes.push(Route { target: n, ..route });
    }
    listener
}

fn by_name(name: &str) -> Route {
    Route { names: vec![name.parse().unwrap()], ..Route::default() }
}

impl Proxy {
    fn start(listener: ListenerConfig) -> Self {
        Self::tuned(listener, |_| {})
    }

    fn tuned(listener: ListenerConfig, tune: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new(vec![listener]);
        config.workers = 1;
        config.engine = Some(engine());
        tune(&mut config);
        let bound = dataplane::bind(config).unwrap();
        let address = bound.addresses()[0];
        let dataplane = bound.start().unwrap();
        Self { view: dataplane.view(), dataplane, address }
    }

    fn client(&self) -> TcpStream {
        connect(self.address)
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

    fn finish(self) {
        eventually("flows end", || self.snapshot().flows_open == 0);
        eventually("buffers return", || self.view.engine().buffers_in_use == 0);
        self.dataplane.drain(PATIENCE);
        eventually("workers end", || self.dataplane.is_finished());
        self.dataplane.join().unwrap();
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

fn server(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let serve = Arc::clone(&serve);
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Says its name, then what it is sent, from the first byte on.
fn named(name: &'static str) -> SocketAddr {
    server(move |mut stream| {
        let _ = stream.write_all(name.as_bytes());
        let mut buffer = [0; 16_384];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..n]).is_err() {
                return;
            }
        }
    })
}

fn read_all(mut stream: TcpStream) -> Vec<u8> {
    stream.shutdown(Shutdown::Write).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}

fn is_reset(mut stream: TcpStream) -> bool {
    let mut byte = [0];
    matches!(stream.read(&mut byte), Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

fn read_header(bytes: &[u8]) -> Header<'_> {
    match proxy::read(bytes, Accepts::Any) {
        Ok(Progress::Done(header)) => header,
        other => panic!("{other:?} of {bytes:?}"),
    }
}

fn header_of(source: &str, passed_on: &[u8]) -> Vec<u8> {
    let addresses =
        Addresses::Inet { source: source.parse().unwrap(), destination: "198.51.100.9:443".parse().unwrap() };
    let mut out = Vec::new();
    let outgoing = Outgoing {
        addresses: &addresses,
        transport: Transport::Stream,
        passed_on,
        authority: None,
        unique_id: None,
    };
    proxy::write_v2(&outgoing, &mut out);
    out
}

fn hello_with(name: &str, protocol: Option<&str>) -> Vec<u8> {
    let vector = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
    let sni = vector(&[&[0][..], &vector(name.as_bytes())].concat());
    let mut extensions = [&[0, 0][..], &vector(&sni)].concat();
    if let Some(protocol) = protocol {
        let list = [&[protocol.len() as u8][..], protocol.as_bytes()].concat();
        extensions.extend([&[0, 16][..], &vector(&vector(&list))].concat());
    }
    let body = [&[3, 3][..], &[7; 32], &[0], &[0, 2, 0x13, 1], &[1, 0], &vector(&extensions)].concat();
    let message = [&[1, 0][..], &vector(&body)].concat();
    [&[22, 3, 1][..], &vector(&message)].concat()
}

#[test]
fn a_header_comes_off_and_goes_on_in_both_versions() {
    let echo = named("");
    for (accepts, out, came) in [
        (Accepts::V2, Version::V1, header_of("192.0.2.7:1000", &[])),
        (Accepts::V1, Version::V2, b"PROXY TCP4 192.0.2.7 198.51.100.9 1000 443\r\n".to_vec()),
        (Accepts::Any, Version::V2, header_of("192.0.2.7:1000", &[tlv::SSL, 0, 5, 1, 0, 0, 0, 0])),
    ] {
        let mut listener = listener("127.0.0.1:0", &[echo]);
        listener.proxy = trusting(accepts);
        listener.targets[0].connecting.proxy = Some(out);
        let proxy = Proxy::start(listener);
        // In two parts, and then with bytes behind it.
        for at in [1, came.len() - 1, came.len()] {
            let mut client = proxy.client();
            client.write_all(&came[..at]).unwrap();
            thread::yield_now();
            client.write_all(&[&came[at..], b"and more"].concat()).unwrap();
            let got = read_all(client);
            let header = read_header(&got);
            assert_eq!(header.version, out);
            let destination = "198.51.100.9:443".parse().unwrap();
            let want = Addresses::Inet { source: "192.0.2.7:1000".parse().unwrap(), destination };
            assert_eq!(header.addresses, want);
            assert_eq!(&got[header.length..], b"and more");
            assert_eq!(header.tlv(tlv::UNIQUE_ID).is_some(), out == Version::V2);
            assert_eq!(header.tlv(tlv::SSL).is_some(), accepts == Accepts::Any, "what came is passed on");
        }
        assert_eq!(proxy.closed("ended"), 3);
        proxy.finish();
    }
}

#[test]
fn a_server_that_speaks_first_is_heard_behind_a_proxy() {
    let mut listener = listener("127.0.0.1:0", &[named("220 hello")]);
    listener.proxy = trusting(Accepts::Any);
    let proxy = Proxy::start(listener);
    let mut client = proxy.client();
    client.write_all(&header_of("192.0.2.7:1000", &[])).unwrap();
    let mut greeting = [0; 9];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"220 hello");
    drop(client);
    proxy.finish();
}

#[test]
fn without_a_header_a_client_is_its_own() {
    let mut listener = listener("127.0.0.1:0", &[named("")]);
    listener.targets[0].connecting.proxy = Some(Version::V2);
    let proxy = Proxy::start(listener);
    let mut client = proxy.client();
    client.write_all(b"x").unwrap();
    let own = client.local_addr().unwrap();
    let got = read_all(client);
    let header = read_header(&got);
    assert_eq!(header.addresses, Addresses::Inet { source: own, destination: proxy.address });
    assert_eq!(&got[header.length..], b"x");
    let id = header.tlv(tlv::UNIQUE_ID).unwrap();
    assert!(id.len() == 32 && id.iter().all(u8::is_ascii_hexdigit));
    assert!(header.tlv(tlv::CRC32C).is_some() && header.tlv(tlv::AUTHORITY).is_none());
    proxy.finish();
}

#[test]
fn the_address_in_a_header_counts_for_routes() {
    let mut listener = listener("127.0.0.1:0", &[named("default")]);
    listener.proxy = trusting(Accepts::Any);
    let route = Route { networks: vec!["192.0.2.0/24".parse().unwrap()], ..Route::default() };
    let proxy = Proxy::start(with_routes(listener, vec![(route, named("one"))]));
    for (source, want) in [("192.0.2.7:1", "one"), ("203.0.113.7:1", "default")] {
        let mut client = proxy.client();
        client.write_all(&header_of(source, &[])).unwrap();
        assert_eq!(read_all(client), want.as_bytes());
    }
    // A proxy's own connection has its own address.
    let mut client = proxy.client();
    client.write_all(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0").unwrap();
    assert_eq!(read_all(client), b"default");
    let flows: Vec<u64> = proxy.snapshot().targets.iter().map(|target| target.flows).collect();
    assert_eq!(flows, [2, 1]);
    proxy.finish();
}

#[test]
fn whoever_is_not_trusted_or_has_no_header_is_refused() {
    let backend = named("never");
    let mut distrusting = listener("127.0.0.1:0", &[backend]);
    distrusting.proxy =
        Some(ProxyProtocol { accepts: Accepts::Any, trusted: vec!["192.0.2.0/24".parse().unwrap()] });
    let proxy = Proxy::start(distrusting);
    assert!(is_reset(proxy.client()));
    assert_eq!(proxy.shed("proxy_untrusted"), 1);
    proxy.finish();
    let mut strict = listener("127.0.0.1:0", &[backend]);
    strict.proxy = trusting(Accepts::V2);
    let proxy = Proxy::start(strict);
    for bad in [&b"GET / HTTP/1.0\r\n\r\n"[..], b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x11\x11\0\0"] {
        let mut client = proxy.client();
        client.write_all(bad).unwrap();
        assert!(is_reset(client), "{bad:?}");
    }
    assert_eq!(proxy.closed("preface_invalid"), 3);
    // A check of whoever is in front, by connecting alone.
    drop(proxy.client());
    eventually("it is counted apart", || proxy.closed("preface_missing") == 1);
    proxy.finish();
}

#[test]
fn a_client_that_does_not_go_on_is_ended_in_time() {
    let mut listener = listener("127.0.0.1:0", &[named("never")]);
    listener.proxy = trusting(Accepts::Any);
    let proxy = Proxy::tuned(listener, |config| config.timeouts.preface = Duration::from_millis(400));
    let silent = proxy.client();
    let mut half_open = proxy.client();
    half_open.write_all(b"PROXY").unwrap();
    half_open.shutdown(Shutdown::Write).unwrap();
    let mut dripping = proxy.client();
    // Longer than it has time, whatever comes.
    let line = b"PROXY UNKNOWN and so on and so on and so on and so on and so on and so on";
    let started = Instant::now();
    let dripped = line.iter().take_while(|byte| {
        thread::sleep(Duration::from_millis(10));
        dripping.write_all(&[**byte]).is_ok()
    });
    let dripped = dripped.count();
    assert!(dripped < line.len() || started.elapsed() > Duration::from_millis(400));
    assert!(is_reset(silent) && is_reset(half_open));
    eventually("all three are ended", || proxy.closed("preface_timeout") == 3);
    proxy.finish();
}

#[test]
fn the_name_and_the_protocol_select() {
    let h2 = Route { protocols: vec![(*b"h2").into()], ..Route::default() };
    let routes = vec![
        (by_name("one.example.com"), named("one")),
        (by_name("*.example.com"), named("star")),
        (h2, named("h2")),
    ];
    let proxy = Proxy::start(with_routes(listener("127.0.0.1:0", &[named("default")]), routes));
    for (hello, want) in [
        (hello_with("one.example.com", None), "one"),
        (hello_with("TWO.example.com", None), "star"),
        (hello_with("other.test", Some("h2")), "h2"),
        (hello_with("other.test", Some("h3")), "default"),
        (b"SSH-2.0-x".to_vec(), "default"),
    ] {
        // Byte by byte, each in a segment of its own.
        let mut client = proxy.client();
        for byte in &hello {
            client.write_all(&[*byte]).unwrap();
        }
        client.write_all(b" and what follows").unwrap();
        let got = read_all(client);
        assert_eq!(got, [want.as_bytes(), &hello, b" and what follows"].concat(), "{want}");
    }
    let mut liar = proxy.client();
    liar.write_all(b"\x16\x03\x01\0\x04\x02\0\0\0").unwrap();
    assert!(is_reset(liar));
    assert_eq!(proxy.closed("preface_invalid"), 1);
    let mut routes: Vec<u16> = proxy.view.decisions(9).iter().map(|decision| decision.route).collect();
    routes.sort_unstable();
    assert_eq!(routes, [0, 0, 1, 2, 3]);
    proxy.finish();
}

#[test]
fn a_hello_of_sixteen_kilobytes_with_a_header_before_it_is_read() {
    let mut listener = listener("127.0.0.1:0", &[named("default")]);
    listener.proxy = trusting(Accepts::Any);
    listener.targets[0].connecting.proxy = Some(Version::V2);
    let proxy = Proxy::start(with_routes(listener, vec![(by_name("big.example.com"), named("big"))]));
    let small = hello_with("big.example.com", None);
    // Its extensions grow by one of padding, and all lengths around them.
    let padding = 15_000_usize;
    let grown = |at: usize| {
        let old = u16::from_be_bytes([small[at], small[at + 1]]) as usize;
        ((old + padding + 4) as u16).to_be_bytes()
    };
    let extensions_at = 5 + 4 + 2 + 32 + 1 + 4 + 2;
    let mut big = small.clone();
    for at in [3, 7, extensions_at] {
        big[at..at + 2].copy_from_slice(&grown(at));
    }
    big.extend([&[0, 21][..], &(padding as u16).to_be_bytes(), &vec![0; padding]].concat());
    let mut client = proxy.client();
    client.write_all(&header_of("192.0.2.7:1000", &[])).unwrap();
    for part in big.chunks(1_000) {
        client.write_all(part).unwrap();
    }
    assert_eq!(read_all(client), [b"big", &big[..]].concat());
    proxy.finish();
}

/// A server of PostgreSQL as far as it matters: answers a request for TLS, then says its name and echoes.
fn sql(name: &'static str, answer: u8) -> SocketAddr {
    server(move |mut stream| {
        let mut request = [0; 8];
        if stream.read_exact(&mut request).is_ok() && request == SSL_REQUEST {
            let _ = stream.write_all(&[answer]);
            let _ = stream.write_all(name.as_bytes());
            let mut buffer = [0; 4_096];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                let _ = stream.write_all(&buffer[..n]);
            }
        }
    })
}

#[test]
fn a_client_of_postgresql_is_routed_by_the_name_in_its_hello() {
    let routes = vec![(by_name("one.db"), sql("one", b'S')), (by_name("bare.db"), sql("bare", b'N'))];
    let proxy = Proxy::start(with_routes(listener("127.0.0.1:0", &[sql("default", b'S')]), routes));
    for (gss_first, name) in [(false, "one"), (true, "one"), (false, "default")] {
        let mut client = proxy.client();
        let mut answer = [0];
        if gss_first {
            client.write_all(&GSSENC_REQUEST).unwrap();
            client.read_exact(&mut answer).unwrap();
            assert_eq!(answer, *b"N");
        }
        client.write_all(&SSL_REQUEST).unwrap();
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, *b"S");
        let hello = hello_with(&format!("{name}.db"), None);
        client.write_all(&hello).unwrap();
        assert_eq!(
            read_all(client),
            [name.as_bytes(), &hello].concat(),
            "the backend's own S is not passed on"
        );
    }
    // A backend without TLS: the client was promised it.
    let mut client = proxy.client();
    client.write_all(&SSL_REQUEST).unwrap();
    client.read_exact(&mut [0]).unwrap();
    client.write_all(&hello_with("bare.db", None)).unwrap();
    assert!(is_reset(client));
    assert_eq!((proxy.shed("tls_denied"), proxy.closed("connect_failed")), (1, 1));
    // Clear text behind a request for TLS.
    let mut client = proxy.client();
    client.write_all(&[&SSL_REQUEST[..], b"x"].concat()).unwrap();
    assert!(is_reset(client));
    proxy.finish();
}

#[test]
fn a_backend_that_does_not_answer_a_request_for_tls_is_given_up_in_time() {
    let mute = server(|stream| {
        let mut bytes = Vec::new();
        let _ = (&stream).read_to_end(&mut bytes);
    });
    let proxy = Proxy::tuned(
        with_routes(listener("127.0.0.1:0", &[mute]), vec![(by_name("one.db"), mute)]),
        |config| {
            config.timeouts.connect = Duration::from_millis(100);
            config.limits.connect_retries = 0;
        },
    );
    let mut client = proxy.client();
    client.write_all(&SSL_REQUEST).unwrap();
    client.read_exact(&mut [0]).unwrap();
    client.write_all(&hello_with("one.db", None)).unwrap();
    assert!(is_reset(client));
    assert_eq!(proxy.closed("connect_failed"), 1);
    proxy.finish();
}

#[test]
fn a_range_of_ports_is_one_listener() {
    // Three free ports in a row, at an address of this process alone: nobody else takes one of them meanwhile.
    let [.., high, low] = std::process::id().to_be_bytes();
    let host = std::net::Ipv4Addr::new(127, 112, high, low);
    let (first, config) = loop {
        let probe = TcpListener::bind((host, 0)).unwrap().local_addr().unwrap().port();
        if probe > 65_000 {
            continue;
        }
        let mut config = listener(&format!("{host}:{probe}"), &[named("default")]);
        config.last_port = Some(probe + 2);
        let upper = Route { ports: Some(probe + 1..=probe + 2), ..Route::default() };
        let config = with_routes(config, vec![(upper, named("upper"))]);
        if (probe..=probe + 2).all(|port| TcpListener::bind((host, port)).is_ok()) {
            break (probe, config);
        }
    };
    let proxy = Proxy::start(config);
    assert_eq!(proxy.snapshot().name, format!("tcp://{host}:{first}-{}", first + 2));
    for (port, want) in [(first, "default"), (first + 1, "upper"), (first + 2, "upper")] {
        assert_eq!(read_all(connect(SocketAddr::from((host, port)))), want.as_bytes());
    }
    assert_eq!(proxy.snapshot().flows_opened, 3);
    proxy.finish();
}
