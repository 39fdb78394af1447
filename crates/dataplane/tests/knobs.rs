//! Knobs of TCP, read back from the sockets of a running dataplane, and refused.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use allocation::{AllocationTable, Backend, LiveFacts, Members, Policy, Publisher};
use dataplane::{
    Config, Connecting, Dataplane, KeepaliveOptions, ListenerConfig, ListenerTcp, StartError, TcpOptions,
};
use rustix::net::sockopt;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

const PATIENCE: Duration = Duration::from_secs(20);

fn config(backend: SocketAddr, tcp: ListenerTcp, connecting: Connecting) -> Config {
    let live = Arc::new(LiveFacts::default());
    let members =
        Members::new(vec![Backend { id: "b".parse().unwrap(), address: backend, flows_max: 0, live }]);
    let table = AllocationTable::new(1, Policy::RoundRobin, Arc::new(members), vec![1.0]);
    let bind = "127.0.0.1:0".parse().unwrap();
    let mut listener = ListenerConfig::new(bind, "test".parse().unwrap(), Publisher::new(table));
    listener.tcp = tcp;
    listener.targets[0].connecting = connecting;
    let mut config = Config::new(vec![listener]);
    config.workers = 1;
    config
}

fn start(config: Config) -> Dataplane {
    dataplane::bind(config).unwrap().start().unwrap()
}

fn options(options: TcpOptions) -> (ListenerTcp, Connecting) {
    let tcp = ListenerTcp { options: options.clone(), ..ListenerTcp::default() };
    (tcp, Connecting { options, ..Connecting::default() })
}

/// Echoes to the end of each connection, one after the other.
fn echo(listener: Socket) -> SocketAddr {
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let stream = TcpStream::from(stream);
            let _ = std::io::copy(&mut &stream, &mut &stream);
        }
    });
    address
}

fn listener(protocol: Protocol) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(protocol))?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    socket.listen(16)?;
    Ok(socket)
}

fn plain_echo() -> SocketAddr {
    echo(listener(Protocol::TCP).unwrap())
}

/// A descriptor of this process's socket that is connected so: the dataplane's, of which the test has none.
fn socket_of(is: impl Fn(SocketAddr, SocketAddr) -> bool) -> Option<OwnedFd> {
    let this = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let numbers = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut sockets = numbers.filter_map(|fd| pidfd_getfd(&this, fd, PidfdGetfdFlags::empty()).ok());
    sockets.find(|socket| {
        let address = |address: rustix::io::Result<rustix::net::SocketAddrAny>| {
            address.ok().and_then(|address| SocketAddr::try_from(address).ok())
        };
        let local = address(rustix::net::getsockname(socket));
        let peer =
            address(rustix::net::getpeername(socket).and_then(|peer| peer.ok_or(rustix::io::Errno::NOTCONN)));
        local.zip(peer).is_some_and(|(local, peer)| is(local, peer))
    })
}

fn eventually<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "did not happen within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn exchange(stream: &TcpStream, bytes: &[u8]) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| (&mut &*stream).write_all(bytes).unwrap());
        let mut back = vec![0; bytes.len()];
        (&mut &*stream).read_exact(&mut back).unwrap();
        assert!(back == bytes, "bytes were changed on their way");
    });
}

fn all() -> TcpOptions {
    TcpOptions {
        keepalive: KeepaliveOptions {
            time: Some(Duration::from_secs(77)),
            interval: Some(Duration::from_secs(11)),
            probes: Some(3),
        },
        user_timeout: Some(Duration::from_millis(12_345)),
        receive_buffer: Some(32_768),
        send_buffer: Some(49_152),
        mark: None,
        congestion: Some("reno".to_owned()),
        dscp: Some(10),
        mptcp: false,
    }
}

fn is_as_asked(socket: impl AsFd) {
    // The kernel doubles buffers for its own needs.
    assert_eq!(sockopt::socket_recv_buffer_size(&socket).unwrap(), 2 * 32_768);
    assert_eq!(sockopt::socket_send_buffer_size(&socket).unwrap(), 2 * 49_152);
    assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), 12_345);
    assert_eq!(sockopt::tcp_congestion(&socket).unwrap(), "reno");
    assert_eq!(sockopt::ip_tos(&socket).unwrap(), 10 << 2);
}

fn is_kept_alive(socket: impl AsFd) -> bool {
    sockopt::socket_keepalive(&socket).unwrap()
        && sockopt::tcp_keepidle(&socket).unwrap() == Duration::from_secs(77)
        && sockopt::tcp_keepintvl(&socket).unwrap() == Duration::from_secs(11)
        && sockopt::tcp_keepcnt(&socket).unwrap() == 3
}

#[test]
fn both_sides_have_what_was_asked_for() {
    let backend = plain_echo();
    let (tcp, connecting) = options(all());
    let tcp = ListenerTcp { backlog: 17, defer_accept_seconds: 3, ..tcp };
    let mut config = config(backend, tcp, connecting);
    // Keepalive is set when a flow outlives it.
    config.timeouts.connect = Duration::from_millis(50);
    let proxy = start(config);
    let client = TcpStream::connect(proxy.addresses()[0]).unwrap();
    exchange(&client, b"ping");
    let ours = client.local_addr().unwrap();
    let accepted = socket_of(|_, peer| peer == ours).unwrap();
    is_as_asked(&accepted);
    assert!(is_kept_alive(&accepted));
    let connected = socket_of(|_, peer| peer == backend).unwrap();
    is_as_asked(&connected);
    eventually("keepalive towards the backend", || is_kept_alive(&connected).then_some(()));
    assert_eq!(refused(&proxy), []);
    drop((accepted, connected, client));
    proxy.stop();
    proxy.join().unwrap();
}

fn refused(proxy: &Dataplane) -> Vec<(&'static str, u64)> {
    let counts = proxy.view().options_refused().remove(0).counts;
    counts.into_iter().filter(|(_, count)| *count > 0).collect()
}

#[test]
fn what_a_listener_cannot_have_is_said_before_anything_starts() {
    let has = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap();
    let options = |change: fn(&mut TcpOptions)| {
        let mut tcp = ListenerTcp::default();
        change(&mut tcp.options);
        tcp
    };
    let wrong = [
        (
            options(|o| o.congestion = Some("nonesuch".to_owned())),
            format!(
                "tcp.congestion = \"nonesuch\": this kernel does not have it (No such file or directory (os error 2)); it has {}",
                has.trim()
            ),
        ),
        (
            options(|o| o.receive_buffer = Some(1 << 30)),
            "tcp.receive_buffer = 1073741824: it was cut to ".to_owned(),
        ),
        (
            options(|o| o.send_buffer = Some(1 << 30)),
            "tcp.send_buffer = 1073741824: it was cut to ".to_owned(),
        ),
        (
            ListenerTcp { backlog: u16::MAX, ..ListenerTcp::default() },
            "tcp.backlog = 65535: it would be cut: the sysctl net.core.somaxconn is ".to_owned(),
        ),
    ];
    for (tcp, said) in wrong {
        let config = config("127.0.0.1:1".parse().unwrap(), tcp, Connecting::default());
        let errors = dataplane::bind(config).unwrap_err();
        assert!(matches!(errors[..], [StartError::Listener { .. }]), "{errors:?}");
        let error = errors[0].to_string();
        assert!(error.starts_with("listener tcp://127.0.0.1:0: ") && error.contains(&said), "{error}");
    }
}

#[test]
fn what_stays_within_the_host_is_not_paced() {
    let system = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap();
    let system = system.trim();
    let within = if system.starts_with("bbr") { "reno" } else { system };
    let backend = plain_echo();
    let congestion = |bind: &str, options: TcpOptions| {
        let (tcp, connecting) = self::options(options);
        let mut config = config(backend, tcp, connecting);
        config.listeners[0].bind = bind.parse().unwrap();
        let proxy = start(config);
        let client = TcpStream::connect(("127.0.0.1", proxy.addresses()[0].port())).unwrap();
        exchange(&client, b"ping");
        let ours = client.local_addr().unwrap();
        let sides = [socket_of(|_, peer| peer == ours), socket_of(|_, peer| peer == backend)];
        let names = sides.map(|socket| sockopt::tcp_congestion(socket.unwrap()).unwrap());
        drop(client);
        proxy.stop();
        proxy.join().unwrap();
        names
    };
    assert_eq!(congestion("127.0.0.1:0", TcpOptions::default()), [within; 2]);
    assert_eq!(
        congestion("0.0.0.0:0", TcpOptions::default()),
        [system, within],
        "clients may be far away, and the listener is not told"
    );
    let chosen = TcpOptions { congestion: Some(system.to_owned()), ..TcpOptions::default() };
    assert_eq!(congestion("127.0.0.1:0", chosen), [system; 2], "who names one has it");
}

#[test]
fn a_flow_goes_without_what_its_backend_s_socket_cannot_have() {
    let (_, connecting) =
        options(TcpOptions { congestion: Some("nonesuch".to_owned()), ..TcpOptions::default() });
    let proxy = start(config(plain_echo(), ListenerTcp::default(), connecting));
    for flows in 1..=2 {
        exchange(&TcpStream::connect(proxy.addresses()[0]).unwrap(), b"ping");
        assert_eq!(refused(&proxy), [("congestion", flows)]);
    }
    proxy.stop();
    proxy.join().unwrap();
}

#[test]
fn a_pool_s_source_addresses_take_turns() {
    let sources = vec!["127.0.0.7".parse().unwrap(), "127.0.0.8".parse().unwrap()];
    let connecting = Connecting { sources, ..Connecting::default() };
    let backend = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = backend.local_addr().unwrap();
    let proxy = start(config(address, ListenerTcp::default(), connecting));
    let mut from = Vec::new();
    let clients: Vec<_> = (0..4).map(|_| TcpStream::connect(proxy.addresses()[0]).unwrap()).collect();
    for _ in &clients {
        from.push(backend.accept().unwrap().1.ip().to_string());
    }
    from.sort();
    assert_eq!(from, ["127.0.0.7", "127.0.0.7", "127.0.0.8", "127.0.0.8"]);
    proxy.stop();
    proxy.join().unwrap();
}

#[test]
fn multipath_tcp_on_both_sides_where_the_kernel_has_it() {
    let (tcp, connecting) = options(TcpOptions { mptcp: true, ..TcpOptions::default() });
    let Ok(backend) = listener(Protocol::MPTCP) else {
        let errors = dataplane::bind(config("127.0.0.1:1".parse().unwrap(), tcp, connecting)).unwrap_err();
        assert!(errors[0].to_string().contains("tcp.mptcp = true: this kernel does not do it here"));
        return;
    };
    let proxy = start(config(echo(backend), tcp, connecting));
    let front = proxy.addresses()[0];
    let connect = |protocol| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(protocol)).unwrap();
        socket.connect(&front.into()).unwrap();
        TcpStream::from(socket)
    };
    // More than what is spliced: 64 KiB in one go.
    let bulk: Vec<u8> = (0..4 << 20).map(|place: u32| (place % 251) as u8).collect();
    for protocol in [Protocol::MPTCP, Protocol::TCP] {
        let client = connect(protocol);
        exchange(&client, b"ping");
        exchange(&client, &bulk);
        exchange(&client, b"pong");
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!((&client).read(&mut [0]).unwrap(), 0, "its end comes back");
    }
    assert_eq!(refused(&proxy), []);
    let client = connect(Protocol::MPTCP);
    exchange(&client, b"ping");
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let closed = |reason| {
        let counts = proxy.view().listeners().remove(0).flows_closed;
        counts.into_iter().find(|(label, _)| *label == reason).unwrap().1
    };
    eventually("the flows end", || (closed("ended") == 2 && closed("client_reset") == 1).then_some(()));
    proxy.stop();
    proxy.join().unwrap();
}
