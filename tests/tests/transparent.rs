//! Where connections to resources come from: the client's address, or several of ours. In networks of our own.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::{Metrics, Namespace, PATIENCE, Process, binary, connect, listen, reset, until};
use tempfile::TempDir;

/// The wires of docs/tcp.md, and how answers find the way back to the balancer.
const CLIENT: [&str; 2] = ["10.1.0.2", "fd00:1::2"];
const BALANCER: [&str; 2] = ["10.1.0.1", "fd00:1::1"];
const RESOURCE: [&str; 2] = ["10.2.0.2", "fd00:2::2"];
const RESOURCE_PORT: u16 = 5432;
const HTTP: &str = "127.0.0.1:7480";

/// A balancer in a network, and its agents.
struct Inside<'n> {
    network: &'n Namespace,
    _processes: Vec<Process>,
    _folder: TempDir,
}

fn file(folder: &TempDir, listeners: &str) -> PathBuf {
    let file = folder.path().join("trimtab.toml");
    let config = format!(
        "[control]\nlisten = \"127.0.0.1:7400\"\n[http]\nlisten = \"{HTTP}\"\n[dataplane]\nworkers = 1\n{listeners}"
    );
    std::fs::write(&file, config).expect("a file in our own folder");
    file
}

fn trimtab(network: &Namespace) -> Command {
    network.command(binary().to_str().expect("a plain path"))
}

impl<'n> Inside<'n> {
    /// Starts it, and an agent for each resource: its pool and its address.
    fn start(network: &'n Namespace, listeners: &str, resources: &[(&str, SocketAddr)]) -> Self {
        Self::start_with(network, listeners, resources, &[])
    }

    /// As [`Self::start`], with further flags for the agents.
    fn start_with(
        network: &'n Namespace,
        listeners: &str,
        resources: &[(&str, SocketAddr)],
        flags: &[&str],
    ) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = file(&folder, listeners);
        let mut balancer = Process::start("balancer", trimtab(network).arg("serve").arg("-c").arg(file));
        balancer.wait_for_line(PATIENCE, |line| (line == "ready").then_some(()));
        let mut processes = vec![balancer];
        for (place, (pool, address)) in resources.iter().enumerate() {
            let mut agent = trimtab(network);
            agent.args(["agent", "--pool", pool, "--address", &address.to_string(), "--id"]);
            agent.args([&format!("r{place}"), "--balancer", "http://127.0.0.1:7400"]).args(flags);
            processes.push(Process::start("agent", &mut agent));
        }
        let all = resources.len() as f64;
        let inside = Self { network, _processes: processes, _folder: folder };
        until("resources are ready", || {
            (inside.metric("trimtab_resources", &[("state", "ready")]) == all).then_some(())
        });
        inside
    }

    fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.network.inside(|| Metrics::scrape(HTTP.parse().expect("an address")).sum(name, labels))
    }

    fn sheds(&self, listener: SocketAddr, reason: &str) -> f64 {
        let listener = format!("tcp://{listener}");
        self.metric("trimtab_sheds_total", &[("listener", &listener), ("reason", reason)])
    }
}

/// Client, balancer and resource, each in a network of its own, in a row.
fn in_a_row() -> [Namespace; 3] {
    let [client, balancer, resource] = std::array::from_fn(|_| Namespace::new());
    balancer.wire("clients", &client, "wire");
    balancer.wire("resources", &resource, "wire");
    let address = |network: &Namespace, address: &str, device: &str| {
        // Nobody else can have them, so nobody need be asked.
        let (prefix, nodad): (_, &[&str]) =
            if address.contains(':') { ("64", &["nodad"]) } else { ("24", &[]) };
        network.ip(&[&["addr", "add", &format!("{address}/{prefix}"), "dev", device], nodad].concat());
    };
    for family in 0..2 {
        address(&client, CLIENT[family], "wire");
        address(&balancer, BALANCER[family], "clients");
        address(&resource, RESOURCE[family], "wire");
    }
    address(&balancer, "10.2.0.1", "resources");
    address(&balancer, "fd00:2::1", "resources");
    // The balancer is the way from the resources to the clients.
    resource.ip(&["route", "add", "default", "via", "10.2.0.1"]);
    resource.ip(&["-6", "route", "add", "default", "via", "fd00:2::1"]);
    [client, balancer, resource]
}

/// A resource: what it does with each connection.
fn serve(network: &Namespace, address: SocketAddr, each: fn(TcpStream)) {
    network.inside(|| {
        let listener = listen(address);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                std::thread::spawn(move || each(stream));
            }
        });
    });
}

/// Says who the connection is from, and says back what it says.
fn tell_peer(mut stream: TcpStream) {
    let peer = stream.peer_addr().expect("it is connected");
    // A client that is gone is its own affair.
    let _ = writeln!(stream, "{}", peer.ip());
    let back = stream.try_clone().expect("a descriptor");
    let _ = std::io::copy(&mut BufReader::new(back), &mut stream);
}

/// Who the resource says that a connection is from, and a megabyte there and back.
fn ask(network: &Namespace, listener: SocketAddr) -> IpAddr {
    network.inside(|| {
        let stream = connect(listener).expect("the balancer listens");
        let mut lines = BufReader::new(stream.try_clone().expect("a descriptor"));
        let mut who = String::new();
        lines.read_line(&mut who).expect("the resource says who we are");
        let sent: Vec<u8> = (0..1 << 20).map(|place: u32| (place % 251) as u8).collect();
        let mut back = vec![0; sent.len()];
        std::thread::scope(|scope| {
            scope.spawn(|| (&stream).write_all(&sent).expect("the flow goes on"));
            lines.read_exact(&mut back).expect("all of it comes back");
        });
        assert!(back == sent, "bytes were changed on their way");
        who.trim().parse().expect("an address")
    })
}

#[test]
fn resources_see_the_clients_own_addresses() {
    let [client, balancer, resource] = in_a_row();
    // As docs/tcp.md has them. Answers to a client's address belong to a socket of ours: deliver them here. By nftables,
    // which looks for that socket, and (IPv6, to show it) by the interface they come from.
    balancer.shell(
        "nft -f - <<'END'\n\
         table ip trimtab {\n\
           chain answers {\n\
             type filter hook prerouting priority mangle; policy accept;\n\
             meta l4proto tcp socket transparent 1 meta mark set 1 accept\n\
           }\n\
         }\n\
         END\n\
         ip rule add fwmark 1 lookup 100\n\
         ip route add local default dev lo table 100\n\
         ip -6 rule add iif resources lookup 100\n\
         ip -6 route add local default dev lo table 100",
    );
    let listener = |family: usize, port| SocketAddr::new(BALANCER[family].parse().expect("one"), port);
    let backend = |family: usize| SocketAddr::new(RESOURCE[family].parse().expect("one"), RESOURCE_PORT);
    let [v4, v6] = [listener(0, 5432), listener(1, 5432)];
    let crossed = listener(0, 5433);
    let config = format!(
        "[[pool]]\nname = \"four\"\ntransparent = true\n[[pool]]\nname = \"six\"\ntransparent = true\n\
         [[listener]]\nbind = \"tcp://{v4}\"\npool = \"four\"\n\
         [[listener]]\nbind = \"tcp://{v6}\"\npool = \"six\"\n\
         [[listener]]\nbind = \"tcp://{crossed}\"\npool = \"six\"\n"
    );
    (0..2).for_each(|family| serve(&resource, backend(family), tell_peer));
    let inside = Inside::start(&balancer, &config, &[("four", backend(0)), ("six", backend(1))]);
    for (family, listener) in [v4, v6].into_iter().enumerate() {
        for _ in 0..3 {
            assert_eq!(ask(&client, listener).to_string(), CLIENT[family]);
        }
    }
    // From an address of ours a client would be taken for us: one who has no IPv6 address is refused instead.
    let refused = client.inside(|| connect(crossed).and_then(|mut stream| stream.read(&mut [0])));
    assert!(e2e::is_reset(&refused), "{refused:?}");
    until("that is counted", || (inside.sheds(crossed, "source") == 1.0).then_some(()));
}

#[test]
fn a_missing_capability_is_said_before_anything_starts() {
    let network = Namespace::new();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (pool, tcp) in [("transparent = true", ""), ("", "[pool.tcp]\nmark = 7"), ("", "")] {
        let listener = match (pool, tcp) {
            ("", "") => "[listener.tcp]\nmark = 7\n",
            _ => "",
        };
        let config = format!(
            "[[pool]]\nname = \"sql\"\n{pool}\n{tcp}\n\
             [[listener]]\nbind = \"tcp://127.0.0.1:0\"\npool = \"sql\"\n{listener}"
        );
        let file = file(&folder, &config);
        let mut command = network.command("setpriv");
        command
            .args(["--bounding-set", "-net_admin,-net_raw", "--inh-caps", "-net_admin,-net_raw", "--"])
            .arg(binary());
        let (ended, _) = Process::start("balancer", command.arg("serve").arg("-c").arg(file)).wait(PATIENCE);
        assert_eq!(ended.code, Some(71), "{config}: {}", ended.stderr);
        let said =
            "this needs CAP_NET_RAW or CAP_NET_ADMIN: grant one (systemd: AmbientCapabilities=CAP_NET_RAW;";
        assert!(ended.stderr.contains(said), "{}", ended.stderr);
    }
}

/// Accepts for ever, greets each with a byte and keeps it open.
fn greet_and_keep(network: &Namespace, address: SocketAddr) {
    network.inside(|| {
        let listener: TcpListener = listen(address);
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for mut stream in listener.incoming().map_while(Result::ok) {
                let _ = stream.write_all(b"!");
                kept.push(stream);
            }
        });
    });
}

/// Ports that the network is given, for each pair of a source and a destination address.
const PORTS: usize = 200;

/// A flow that was greeted by a resource; `None`: it was reset.
fn greeted(listener: SocketAddr) -> Option<TcpStream> {
    let greeted = connect(listener).and_then(|mut stream| Ok((stream.read(&mut [0])?, stream)));
    match greeted {
        Ok((1, stream)) => Some(stream),
        // A reset can overtake the end of the connect.
        other => {
            assert!(e2e::is_reset(&other), "{other:?}");
            None
        }
    }
}

#[test]
fn each_source_address_brings_its_ports_and_without_any_left_flows_are_shed_until_some_are_back() {
    let network = Namespace::new();
    network.shell("echo 20000 20199 > /proc/sys/net/ipv4/ip_local_port_range");
    let backends: [SocketAddr; 2] =
        ["127.0.0.1:5000", "127.0.0.2:5000"].map(|text| text.parse().expect("one"));
    let config = "[[pool]]\nname = \"one\"\nsource_addresses = [\"127.1.0.1\"]\n\
                  [[pool]]\nname = \"three\"\nsource_addresses = [\"127.1.0.2\", \"127.1.0.3\", \"127.1.0.4\"]\n\
                  [[listener]]\nbind = \"tcp://0.0.0.0:7001\"\npool = \"one\"\n\
                  [[listener]]\nbind = \"tcp://0.0.0.0:7003\"\npool = \"three\"\n";
    backends.iter().for_each(|address| greet_and_keep(&network, *address));
    let inside = Inside::start(&network, config, &[("one", backends[0]), ("three", backends[1])]);
    for (port, sources) in [(7001, 1), (7003, 3)] {
        let all = SocketAddr::from(([0, 0, 0, 0], port));
        // Clients need ports too: fewer than there are for each address that they connect to.
        let to = |flow: usize| SocketAddr::from(([127, 3, 0, (flow / 150) as u8 + 1], port));
        let mut flows: Vec<_> =
            network.inside(|| (0..).map_while(|flow| greeted(to(flow))).take(sources * PORTS + 1).collect());
        // Ports that something listens at are nobody's; there are a few of those.
        let ports = (sources * (PORTS - 5))..=(sources * PORTS);
        assert!(ports.contains(&flows.len()), "{} flows at once from {sources} addresses", flows.len());
        until("that is counted", || (inside.sheds(all, "ports") == 1.0).then_some(()));
        // It looks at nothing while ports are out: a flood of clients costs it little.
        let enters = inside.metric("trimtab_enters_total", &[]);
        // Where something listens at another address of ours, a port may be found by number after all.
        let more: Vec<_> = (0..20).filter_map(|_| network.inside(|| greeted(to(flows.len())))).collect();
        assert!(flows.len() + more.len() <= sources * PORTS, "{} and {} flows", flows.len(), more.len());
        let refused = (21 - more.len()) as f64;
        until("each of the others is counted", || (inside.sheds(all, "ports") == refused).then_some(()));
        let turns = inside.metric("trimtab_enters_total", &[]) - enters;
        assert!(turns < 400.0, "{turns} turns of the loop for 20 clients that were refused");
        reset(flows.remove(0));
        drop(until("a port is back", || network.inside(|| greeted(to(flows.len())))));
    }
}

/// A socket for datagrams has its port alone on all of the host, so whoever sends us datagrams from ever new addresses uses ports up.
#[test]
fn datagrams_leave_the_host_ports() {
    let network = Namespace::new();
    network.shell("echo 20000 20199 > /proc/sys/net/ipv4/ip_local_port_range");
    let (listener, backend): (SocketAddr, SocketAddr) =
        ("127.0.0.1:7001".parse().expect("one"), "127.0.0.1:5000".parse().expect("one"));
    let config =
        format!("[[pool]]\nname = \"dns\"\n[[listener]]\nbind = \"udp://{listener}\"\npool = \"dns\"\n");
    let _inside = Inside::start_with(&network, &config, &[("dns", backend)], &["--no-check"]);
    network.inside(|| {
        let server = UdpSocket::bind(backend).expect("nobody has it");
        let clients: Vec<_> = (0..PORTS as u16)
            .map(|n| {
                UdpSocket::bind(SocketAddr::from(([127, 2, 0, n as u8], 30_000))).expect("nobody has it")
            })
            .collect();
        for client in &clients {
            client.send_to(b"?", listener).expect("it is sent");
        }
        server.set_nonblocking(true).expect("it is allowed");
        let shed = || {
            let listener = format!("udp://{listener}");
            Metrics::scrape(HTTP.parse().expect("an address"))
                .sum("trimtab_sheds_total", &[("listener", &listener), ("reason", "ports")])
        };
        let mut heard = 0.0;
        until("everybody is served or turned away", || {
            while server.recv(&mut [0]).is_ok() {
                heard += 1.0;
            }
            (heard + shed() == PORTS as f64).then_some(())
        });
        assert!(heard > PORTS as f64 / 2.0, "{heard} of {PORTS} were served");
        // As a resolver would.
        let others: Vec<_> = (0..PORTS / 10)
            .map(|_| {
                let other = UdpSocket::bind("0.0.0.0:0").expect("there are ports left");
                other.connect("127.0.0.53:53").map(|()| other)
            })
            .collect();
        assert!(others.iter().all(Result::is_ok), "{others:?}");
    });
}

/// Answers a byte and closes when it is told that no more comes.
fn answer_one(mut stream: TcpStream) {
    let mut byte = [0];
    if let Ok(1) = stream.read(&mut byte) {
        let _ = stream.write_all(&byte);
        let _ = stream.read(&mut byte);
    }
}

/// A client that closes first leaves the balancer's port towards the resource resting for a minute. There is no wait for it.
#[test]
fn ports_that_rest_are_taken_over() {
    let network = Namespace::new();
    // As between hosts: by default the kernel takes them over by itself, but on loopback only.
    network.shell("echo 0 > /proc/sys/net/ipv4/tcp_tw_reuse");
    network.shell("echo 20000 20199 > /proc/sys/net/ipv4/ip_local_port_range");
    network.shell("echo 20180-20189 > /proc/sys/net/ipv4/ip_local_reserved_ports");
    let backends: [SocketAddr; 3] =
        ["127.0.0.1:5000", "127.0.0.2:5000", "[::1]:5000"].map(|text| text.parse().expect("one"));
    let config = "[[pool]]\nname = \"one\"\n\
                  [[pool]]\nname = \"two\"\nsource_addresses = [\"127.1.0.2\", \"127.1.0.3\"]\n\
                  [[pool]]\nname = \"six\"\n\
                  [[listener]]\nbind = \"tcp://0.0.0.0:7001\"\npool = \"one\"\n\
                  [[listener]]\nbind = \"tcp://0.0.0.0:7002\"\npool = \"two\"\n\
                  [[listener]]\nbind = \"tcp://0.0.0.0:7003\"\npool = \"six\"\n";
    backends.iter().for_each(|address| serve(&network, *address, answer_one));
    let pools = ["one", "two", "six"];
    let resources: Vec<_> = pools.into_iter().zip(backends).collect();
    // The agents' own looks at the resources would find no port: they are on the balancer's host here.
    let inside = Inside::start_with(&network, config, &resources, &["--no-check"]);
    for port in 7001..=7003 {
        for flow in 0..5 * PORTS {
            let (to, from) =
                (SocketAddr::from(([127, 0, 0, 1], port)), [127, 2, (flow / 100) as u8, (flow % 100) as u8]);
            let said = network.inside(|| {
                let client = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
                // Their ports rest too, on addresses of their own: that shall be in nobody's way.
                client.set_reuse_address(true)?;
                client.bind(&SocketAddr::from((from, 0)).into())?;
                client.connect(&to.into())?;
                let mut client = TcpStream::from(client);
                client.write_all(b"!")?;
                client.read_exact(&mut [0])
            });
            said.unwrap_or_else(|error| panic!("flow {flow} to port {port}: {error}"));
        }
        assert_eq!(inside.sheds(SocketAddr::from(([0, 0, 0, 0], port)), "ports"), 0.0);
    }
}

#[test]
fn first_bytes_go_with_the_syn_and_servers_may_speak_first_all_the_same() {
    let network = Namespace::new();
    network.shell("echo 3 > /proc/sys/net/ipv4/tcp_fastopen");
    let backend: SocketAddr = "127.0.0.1:5000".parse().expect("one");
    // socat: it takes bytes with a SYN. The first listener says what it hears, the second speaks first.
    let options = "reuseaddr,fork,setsockopt-listen=6:23:16";
    let socat = |address: String, run: &str| {
        let mut command = network.command("socat");
        Process::start("socat", command.args([&format!("TCP4-LISTEN:{address},{options}"), run]))
    };
    let mut echo = socat("5000,bind=127.0.0.1".to_owned(), "SYSTEM:cat");
    let _greeter = socat("5001,bind=127.0.0.1".to_owned(), "SYSTEM:echo hello; cat");
    let greeter: SocketAddr = "127.0.0.1:5001".parse().expect("one");
    for address in [backend, greeter] {
        network.inside(|| until("socat listens", || TcpStream::connect(address).ok()));
    }
    // Accepted when its bytes are there: then they can go on with the SYN.
    let config = "[[pool]]\nname = \"echo\"\n[pool.tcp]\nfast_open = true\n\
                  [[pool]]\nname = \"greet\"\n[pool.tcp]\nfast_open = true\n\
                  [[listener]]\nbind = \"tcp://127.0.0.1:7001\"\npool = \"echo\"\n\
                  [listener.tcp]\ndefer_accept = \"5s\"\n\
                  [[listener]]\nbind = \"tcp://127.0.0.1:7002\"\npool = \"greet\"\n";
    let inside = Inside::start(&network, config, &[("echo", backend), ("greet", greeter)]);
    let [to_echo, to_greeter] = [7001, 7002].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let sent_with_syn = || {
        let line =
            network.inside(|| std::fs::read_to_string("/proc/thread-self/net/netstat").expect("it is there"));
        let mut lines = line.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let place = names.split(' ').position(|name| name == "TCPFastOpenActive").expect("a counter");
        values.split(' ').nth(place).and_then(|value| value.parse::<u64>().ok()).expect("a number")
    };
    for _ in 0..3 {
        network.inside(|| {
            let mut client = connect(to_echo).expect("the balancer listens");
            client.write_all(b"ping").expect("it takes bytes");
            let mut back = [0; 4];
            client.read_exact(&mut back).expect("the echo");
            assert_eq!(&back, b"ping");
            client.shutdown(std::net::Shutdown::Write).expect("it is open");
            assert_eq!(client.read(&mut back).expect("its end"), 0);
        });
        network.inside(|| {
            let client = connect(to_greeter).expect("the balancer listens");
            let mut line = String::new();
            BufReader::new(client).read_line(&mut line).expect("the greeting");
            assert_eq!(line, "hello\n");
        });
    }
    // The first brought the cookie for the others.
    assert_eq!(sent_with_syn(), 2);
    // Bytes that went with a SYN cannot be sent to another resource: such a flow is reset.
    echo.kill();
    let refused = network.inside(|| {
        let mut client = connect(to_echo).expect("the balancer listens");
        client.write_all(b"ping").expect("it takes bytes");
        client.read(&mut [0])
    });
    assert!(e2e::is_reset(&refused), "{refused:?}");
    let closed = |reason| inside.metric("trimtab_flows_closed_total", &[("reason", reason)]);
    until("its end is counted", || (closed("backend_reset") == 1.0).then_some(()));
}

/// More than the balancer holds of a flow, and no more than its receive buffer takes beside that.
const DOWNLOAD: usize = 2 << 20;

/// Sends a download, and has nothing more to do with it.
fn send_and_close(mut stream: TcpStream) {
    // An agent that only looks whether we are here does not read it.
    let _ = stream.write_all(&vec![7; DOWNLOAD]);
}

/// Whether the network has a connection from this port or to it in one of these states (of `proc_net_tcp(5)`).
fn has_connection(network: &Namespace, port: u16, from_it: bool, states: &[&str]) -> bool {
    let table = network.inside(|| std::fs::read_to_string("/proc/thread-self/net/tcp").expect("it is there"));
    let port = format!(":{port:04X}");
    table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>()).any(|fields| {
        let address = fields[if from_it { 1 } else { 2 }];
        address.ends_with(&port) && states.contains(&fields[3])
    })
}

/// A server that has closed is forgotten by its kernel after a while (`tcp_fin_timeout`), and then answers a keepalive, or the FIN
/// that its client sends late, by RST. What it said may not have been read by then.
#[test]
fn a_slow_download_is_whole_though_its_server_is_long_forgotten() {
    const FIN_WAITS: [&str; 2] = ["04", "05"];
    const ENDING: [&str; 2] = ["08", "09"];
    let network = Namespace::new();
    network.shell("echo 1 > /proc/sys/net/ipv4/tcp_fin_timeout");
    let pool = |name: &str, keepalive: &str| {
        format!(
            "[[pool]]\nname = \"{name}\"\n[pool.tcp]\nkeepalive = \"{keepalive}\"\nreceive_buffer = 1048576\n"
        )
    };
    let listener = |port: u16, pool: &str| {
        format!(
            "[[listener]]\nbind = \"tcp://127.0.0.1:{port}\"\npool = \"{pool}\"\n[listener.tcp]\nsend_buffer = 65536\n"
        )
    };
    let config =
        [pool("asks", "1s"), pool("trusts", "0s"), listener(7001, "asks"), listener(7002, "trusts")].concat();
    let servers = [5001, 5002].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    servers.iter().for_each(|server| serve(&network, *server, send_and_close));
    let inside = Inside::start(&network, &config, &[("asks", servers[0]), ("trusts", servers[1])]);
    for (port, server, says_fin) in [(7001, servers[0], false), (7002, servers[1], true)] {
        let balancer = SocketAddr::from(([127, 0, 0, 1], port));
        let mut client = network.inside(|| {
            let client =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("one");
            client.set_recv_buffer_size(32 << 10).expect("it is allowed");
            client.connect(&balancer.into()).expect("the balancer listens");
            TcpStream::from(client)
        });
        client.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        let port = server.port();
        until("all is said", || has_connection(&network, port, true, &FIN_WAITS).then_some(()));
        until("it is forgotten", || (!has_connection(&network, port, true, &FIN_WAITS)).then_some(()));
        if says_fin {
            client.shutdown(std::net::Shutdown::Write).expect("it is open");
        }
        until("we are told", || (!has_connection(&network, port, false, &ENDING)).then_some(()));
        // For longer than what came before a reset has.
        let told = Instant::now();
        let open = || inside.metric("trimtab_flows_open", &[("listener", &format!("tcp://{balancer}"))]);
        until("that time is over", || {
            assert_eq!(open(), 1.0);
            (told.elapsed() > Duration::from_millis(2_500)).then_some(())
        });
        let mut all = Vec::new();
        client.read_to_end(&mut all).expect("it ends in order");
        assert_eq!(all.len(), DOWNLOAD);
    }
}
