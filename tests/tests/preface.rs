//! Who the client is and what it asks for, with real proxies, servers and clients: HAProxy, MariaDB, OpenSSL, PostgreSQL.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e::{
    Balancer, BalancerConfig, Ended, MariaDb, PATIENCE, Postgres, Process, connect, connect_from, until,
};
use tempfile::TempDir;

/// Whom clients connect as: not as whatever is between.
const CLIENT: &str = "127.0.0.5";
const TRUSTING: &str = "proxy_protocol = \"any\"\ntrusted = [\"127.0.0.1\"]\n";

/// A command that ends when the thread that starts it does.
fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]).args(arguments);
    command
}

fn run(program: &str, arguments: &[&str]) -> Ended {
    let mut process = Process::start(program, &mut command(program, arguments));
    process.close_stdin();
    process.wait(PATIENCE).0
}

fn haproxy(folder: &TempDir, name: &str, sections: &str) -> Process {
    let file = folder.path().join(name);
    let defaults = "defaults\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n";
    std::fs::write(&file, format!("{defaults}{sections}")).expect("our own folder");
    Process::start(
        "haproxy",
        &mut command("/usr/sbin/haproxy", &["-db", "-f", file.to_str().expect("a plain path")]),
    )
}

/// A balancer with this pool and listener, and a resource in it.
fn balancer(pool: &str, listener: &str, resource: SocketAddr) -> (Balancer, SocketAddr, Process) {
    let mut config = BalancerConfig::default();
    let address = e2e::loopback();
    config.further = format!(
        "[[pool]]\nname = \"behind\"\n{pool}\n[[listener]]\nbind = \"tcp://{address}\"\npool = \"behind\"\n{listener}\n"
    );
    let balancer = Balancer::start(config);
    let agent = balancer.agent_of("behind", "one", resource, &[]);
    until("the resource is ready", || (balancer.ready_resources() == 1).then_some(()));
    (balancer, address, agent)
}

fn http_get(from: &str, address: SocketAddr) -> String {
    let from: IpAddr = from.parse().expect("an address");
    let mut stream = connect_from(from, address).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time");
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("it is taken");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned()).unwrap_or_default()
}

#[test]
fn haproxy_tells_us_who_the_client_is_and_we_tell_haproxy() {
    let folder = TempDir::new().expect("a temporary folder");
    let [front_v1, front_v2, behind] = std::array::from_fn(|_| e2e::loopback());
    let says =
        "http-request return status 200 content-type text/plain lf-string \"%[src] %[fc_pp_unique_id]\"";
    let _behind = haproxy(
        &folder,
        "behind.cfg",
        &format!("frontend behind\n  mode http\n  bind {behind} accept-proxy\n  {says}\n"),
    );
    until("HAProxy listens", || connect(behind).ok());
    for out in ["v1", "v2"] {
        let pool = format!("proxy_protocol = \"{out}\"\n");
        let (balancer, address, _agent) = balancer(&pool, TRUSTING, behind);
        let listen = |name: &str, bind: SocketAddr, send: &str| {
            format!(
                "listen {name}\n  mode tcp\n  bind {bind}\n  unique-id-format %rt-of-haproxy\n  server s {address} {send}\n"
            )
        };
        let _front = haproxy(
            &folder,
            "front.cfg",
            &(listen("one", front_v1, "send-proxy")
                + &listen("two", front_v2, "send-proxy-v2 proxy-v2-options crc32c,unique-id")),
        );
        until("HAProxy listens", || connect(front_v1).and_then(|_| connect(front_v2)).ok());
        let (first, second) = (http_get(CLIENT, front_v1), http_get(CLIENT, front_v2));
        let id = |answer: &str| answer.strip_prefix(CLIENT).map(|id| id.trim().to_owned());
        let (first_id, second_id) = (id(&first).expect(&first), id(&second).expect(&second));
        // In v2 it is passed on, and made where there is none; v1 has no place for it.
        assert_eq!(first_id.len(), if out == "v2" { 32 } else { 0 }, "{first}");
        assert_eq!(second_id.ends_with("-of-haproxy"), out == "v2", "{second}");
        // Who is not a trusted proxy is not heard.
        let refused = connect_from(CLIENT.parse().expect("an address"), address).and_then(|mut stream| {
            stream.write_all(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET / HTTP/1.0\r\n\r\n")?;
            stream.read(&mut [0])
        });
        assert!(refused.is_err(), "{refused:?}");
        until("it is counted", || {
            let sheds = balancer.metrics().sum("trimtab_sheds_total", &[("reason", "proxy_untrusted")]);
            (sheds >= 1.0).then_some(())
        });
    }
}

#[test]
fn mariadb_sees_the_client_through_us() {
    let server = MariaDb::start_with(&["--proxy-protocol-networks=127.0.0.0/8", "--skip-name-resolve"]);
    let (_balancer, address, _agent) = balancer("proxy_protocol = \"v2\"\n", "", server.address());
    // Its own client cannot choose its address.
    let from_there = bytewise(CLIENT, address);
    let address = from_there.address();
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let query =
        "select substring_index(host, ':', 1) from information_schema.processlist where id = connection_id()";
    let arguments =
        ["--no-defaults", "-N", "-u", "root", "-h", &host, "-P", &port, "--protocol=TCP", "-e", query];
    let ended = run("mariadb", &arguments);
    assert_eq!(ended.stdout.trim(), CLIENT, "{}", ended.stderr);
}

/// A self-signed certificate for a name, and its key, as PEM.
fn certificate(name: &str) -> (String, String) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
    (made.cert.pem(), made.signing_key.serialize_pem())
}

fn tls_server(folder: &Path, name: &str, protocol: &str) -> (SocketAddr, Process) {
    let (certificate, key) = certificate(name);
    let (cert_file, key_file) = (folder.join(format!("{name}.crt")), folder.join(format!("{name}.key")));
    std::fs::write(&cert_file, certificate).expect("our own folder");
    std::fs::write(&key_file, key).expect("our own folder");
    let (cert_file, key_file) = (cert_file.display().to_string(), key_file.display().to_string());
    let address = e2e::loopback();
    let accept = address.to_string();
    let arguments =
        ["s_server", "-quiet", "-accept", &accept, "-cert", &cert_file, "-key", &key_file, "-alpn", protocol];
    let process = Process::start("s_server", &mut command("openssl", &arguments));
    until("s_server listens", || connect(address).ok());
    (address, process)
}

/// Passes bytes on, of what the client says first each in a segment of its own.
fn bytewise(from: &str, to: SocketAddr) -> e2e::Backend {
    let from: IpAddr = from.parse().expect("an address");
    e2e::Backend::start(move |mut client| {
        let Ok(mut server) = connect_from(from, to) else { return };
        let _ = server.set_nodelay(true);
        let (Ok(mut from_server), Ok(mut to_client)) = (server.try_clone(), client.try_clone()) else {
            return;
        };
        let back = std::thread::spawn(move || std::io::copy(&mut from_server, &mut to_client));
        let mut byte = [0];
        let mut written = 0;
        while let Ok(1) = client.read(&mut byte) {
            if server.write_all(&byte).is_err() {
                break;
            }
            written += 1;
            if written % 100 == 0 {
                // So that segments are read apart, at least some of them.
                std::thread::yield_now();
            }
        }
        let _ = server.shutdown(std::net::Shutdown::Write);
        let _ = back.join();
    })
}

#[test]
fn tls_clients_are_routed_by_name_and_protocol() {
    let folder = TempDir::new().expect("a temporary folder");
    let names = ["default.test", "one.example", "h2.test"];
    let servers = names.map(|name| tls_server(folder.path(), name, "h2,http/1.1"));
    let mut config = BalancerConfig::default();
    let address = e2e::loopback();
    for pool in ["p0", "p1", "p2"] {
        config.further += &format!("[[pool]]\nname = \"{pool}\"\n");
    }
    config.further += &format!(
        "[[listener]]\nbind = \"tcp://{address}\"\npool = \"p0\"\n\
         [[listener.route]]\npool = \"p1\"\nsni = [\"*.example\"]\n[[listener.route]]\npool = \"p2\"\nalpn = [\"h2\"]\n"
    );
    let balancer = Balancer::start(config);
    let _agents: Vec<Process> =
        (0..3).map(|n| balancer.agent_of(&format!("p{n}"), names[n], servers[n].0, &[])).collect();
    until("the resources are ready", || (balancer.ready_resources() == 3).then_some(()));
    let slowly = bytewise("127.0.0.1", address);
    for (to, name, protocol, wanted) in [
        (address, "other.test", "http/1.1", "default.test"),
        (address, "ONE.example", "h2", "one.example"),
        (slowly.address(), "two.example", "h2", "one.example"),
        (slowly.address(), "other.test", "h2", "h2.test"),
    ] {
        let to = to.to_string();
        let arguments = ["s_client", "-connect", &to, "-servername", name, "-alpn", protocol];
        let ended = run("openssl", &arguments);
        let certificate = Path::new(folder.path()).join(format!("{wanted}.crt"));
        let wanted_pem = std::fs::read_to_string(certificate).expect("our own file").replace("\r\n", "\n");
        assert!(
            ended.stdout.contains(wanted_pem.trim()),
            "{name} {protocol}: {}{}",
            ended.stdout,
            ended.stderr
        );
    }
    let flows = |pool| balancer.metrics().sum("trimtab_route_flows_total", &[("pool", pool)]);
    assert_eq!([flows("p0"), flows("p1"), flows("p2")], [1.0, 2.0, 1.0]);
    let explained = balancer.admin(&["explain", "p1", "--last", "2"]);
    assert!(explained.contains("route 1"), "{explained}");
}

#[test]
fn psql_is_routed_by_the_name_it_asks_for_and_tls_stays_end_to_end() {
    let servers = ["one.db", "two.db"].map(|name| {
        let (certificate, key) = certificate(name);
        let server = Postgres::start_with_tls(&certificate, &key);
        (certificate, server)
    });
    let mut config = BalancerConfig::default();
    let address = e2e::loopback();
    config.further = format!(
        "[[pool]]\nname = \"p0\"\n[[pool]]\nname = \"p1\"\n[[listener]]\nbind = \"tcp://{address}\"\npool = \"p0\"\n\
         [[listener.route]]\npool = \"p1\"\nsni = [\"two.db\"]\n"
    );
    let balancer = Balancer::start(config);
    let _agents: Vec<Process> = (0..2)
        .map(|n| balancer.agent_of(&format!("p{n}"), &format!("r{n}"), servers[n].1.address(), &[]))
        .collect();
    until("the resources are ready", || (balancer.ready_resources() == 2).then_some(()));
    let folder = TempDir::new().expect("a temporary folder");
    for (name, (certificate, server)) in ["one.db", "two.db"].into_iter().zip(&servers) {
        // Verified in full: whoever answers has the key of this name.
        let root = folder.path().join(name);
        std::fs::write(&root, certificate).expect("our own folder");
        let connection = format!(
            "host={name} hostaddr={} port={} user=postgres dbname=postgres sslmode=verify-full sslrootcert={} connect_timeout=10",
            address.ip(),
            address.port(),
            root.display()
        );
        let query = "select inet_server_port(), ssl from pg_stat_ssl where pid = pg_backend_pid()";
        let ended = run("psql", &["-X", "-A", "-t", "-c", query, &connection]);
        assert_eq!(ended.stdout.trim(), format!("{}|t", server.address().port()), "{}", ended.stderr);
    }
    // Without TLS there is no name: the default.
    let plain = format!(
        "host={} port={} user=postgres dbname=postgres sslmode=disable connect_timeout=10",
        address.ip(),
        address.port()
    );
    let ended = run("psql", &["-X", "-A", "-t", "-c", "select inet_server_port()", &plain]);
    assert_eq!(ended.stdout.trim(), servers[0].1.address().port().to_string(), "{}", ended.stderr);
}

#[test]
fn clients_that_do_not_go_on_do_not_pile_up() {
    let service = e2e::Service::start("one", e2e::Manners::Good);
    let mut config =
        BalancerConfig { dataplane: "preface_timeout = \"500ms\"\n".into(), ..BalancerConfig::default() };
    let address = e2e::loopback();
    config.further =
        format!("[[listener]]\nbind = \"tcp://{address}\"\npool = \"{}\"\n{TRUSTING}", e2e::POOL);
    let balancer = Balancer::start(config);
    let _agent = balancer.agent("one", service.address(), &[]);
    until("the resource is ready", || (balancer.ready_resources() == 1).then_some(()));
    let mut clients: Vec<TcpStream> = (0..200).map(|_| connect(address).expect("it listens")).collect();
    for client in &mut clients {
        client.write_all(b"PROXY TCP4").expect("it is taken");
        client.shutdown(std::net::Shutdown::Write).expect("it is open");
    }
    e2e::within(Duration::from_secs(20), "all are ended", || {
        let ended = balancer.metrics().sum("trimtab_flows_closed_total", &[("reason", "preface_timeout")]);
        (ended >= 200.0).then_some(())
    });
    assert!(balancer.metrics().sum("trimtab_buffers_in_use", &[]) < 1.0, "none of them holds a buffer");
    let mut client = connect(address).expect("it listens");
    client.write_all(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n").expect("it is taken");
    let mut name = [0; 4];
    client.read_exact(&mut name).expect("the service answers");
    assert_eq!(&name, b"one\n");
}
