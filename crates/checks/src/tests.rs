//! Whole checks against scripted servers on loopback: what they say in order, how they leave, and what hangs.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::*;

const SOON: Duration = Duration::from_secs(10);

fn config(dialogue: Dialogue) -> CheckConfig {
    CheckConfig {
        dialogue,
        timing: Timing::default(),
        timeout: SOON,
        address: None,
        port: None,
        tls: None,
        proxy: None,
    }
}

fn subject(address: SocketAddr) -> Subject {
    Subject { resource: "r1".into(), pool: "sql".into(), address }
}

/// One turn of a scripted server.
enum Turn {
    Say(&'static [u8]),
    /// Waits until exactly this has come.
    Hear(Vec<u8>),
}
use Turn::{Hear, Say};

fn hear(bytes: &[u8]) -> Turn {
    Hear(bytes.to_vec())
}

async fn play(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), turns: Vec<Turn>) {
    for turn in turns {
        match turn {
            Say(text) => stream.write_all(text).await.unwrap(),
            Hear(expected) => {
                let mut heard = vec![0; expected.len()];
                stream.read_exact(&mut heard).await.unwrap();
                assert_eq!(String::from_utf8_lossy(&heard), String::from_utf8_lossy(&expected));
            }
        }
    }
}

/// A server that takes one connection, and gives what was left at its end: nothing, where the client ended in good order (a reset is
/// an error here).
async fn server(turns: Vec<Turn>) -> (SocketAddr, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        play(&mut stream, turns).await;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.expect("the client ends in good order");
        rest
    });
    (address, serving)
}

async fn ended(check: CheckConfig, address: SocketAddr) -> Outcome {
    match Check::new(check).unwrap().begin(&subject(address)).await {
        Begun::Ended(outcome) => outcome,
        Begun::Late(outcome, _) => panic!("late: {outcome:?}"),
    }
}

/// Runs a dialogue against a script that it must follow to the end; gives what came of it.
async fn follow(dialogue: Dialogue, turns: Vec<Turn>) -> Outcome {
    let (address, serving) = server(turns).await;
    let outcome = ended(config(dialogue), address).await;
    assert_eq!(String::from_utf8_lossy(&serving.await.unwrap()), "", "nothing behind the goodbye");
    outcome
}

#[tokio::test]
async fn dialogues_end_in_good_order() {
    let smtp = vec![
        Say(b"220-mail.example\r\n220 ESMTP\r\n"),
        hear(b"EHLO [127.0.0.1]\r\n"),
        Say(b"250-mail.example\r\n250 HELP\r\n"),
        hear(b"QUIT\r\n"),
        Say(b"221 Bye\r\n"),
    ];
    let outcome = follow(Dialogue::Smtp(Smtp::default()), smtp).await;
    assert_eq!((outcome.verdict(), outcome.said().as_str()), (Verdict::Passed, "220 mail.example"));

    let closed = vec![Say(b"421 Too many connections\r\n"), hear(b"QUIT\r\n")];
    let outcome = follow(Dialogue::Ftp, closed).await;
    assert_eq!(outcome.said(), "it says 421 Too many connections, not 220");
    assert_eq!(outcome.verdict(), Verdict::Failed);

    let redis = vec![
        hear(b"*1\r\n$4\r\nPING\r\n"),
        Say(b"+PONG\r\n"),
        hear(b"*1\r\n$4\r\nQUIT\r\n"),
        Say(b"+OK\r\n"),
    ];
    assert_eq!(follow(Dialogue::Redis, redis).await.said(), "PONG");

    let xmpp = Xmpp { domain: "a.example".into(), stream: StreamKind::Client };
    let opening = b"<?xml version='1.0'?><stream:stream to='a.example' version='1.0' xml:lang='en' \
        xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>";
    let stream = vec![
        hear(opening),
        Say(b"<?xml version='1.0'?><stream:stream><stream:features/>"),
        hear(b"</stream:stream>"),
        Say(b"</stream:stream>"),
    ];
    assert_eq!(follow(Dialogue::Xmpp(xmpp), stream).await.verdict(), Verdict::Passed);

    let texts = SendExpect { send: b"hi\n".to_vec(), expect: b"there".to_vec(), goodbye: b"bye\n".to_vec() };
    let turns = vec![hear(b"hi\n"), Say(b"who is "), Say(b"there?"), hear(b"bye\n")];
    assert_eq!(follow(Dialogue::SendExpect(texts), turns).await.said(), "who is there?");
}

#[tokio::test]
async fn databases_see_a_session_begin_and_end() {
    let of = PostgreSql { user: Some("u".into()), database: None };
    let startup = b"\0\0\0\x29\0\x03\0\0user\0u\0application_name\0trimtab\0\0";
    let session = vec![
        hear(startup),
        Say(b"R\0\0\0\x08\0\0\0\0S\0\0\0\x08a\0b\0"),
        Say(b"K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I"),
        hear(b"X\0\0\0\x04"),
    ];
    assert_eq!(follow(Dialogue::PostgreSql(of.clone()), session).await.said(), "a session began");
    // It asks for a password: nothing more is said, which it does not log.
    let asks = vec![hear(startup), Say(b"R\0\0\0\x08\0\0\0\x03")];
    assert_eq!(follow(Dialogue::PostgreSql(of), asks).await.verdict(), Verdict::Passed);
    let request = vec![hear(b"\0\0\0\x08\x04\xd2\x16\x2f"), Say(b"N")];
    assert_eq!(follow(Dialogue::PostgreSql(PostgreSql::default()), request).await.verdict(), Verdict::Passed);

    let of = MySql { user: "u".into(), database: None };
    const GREETING: &[u8] =
        b"\x59\0\0\0\x0a5.5.5-10.11.6-MariaDB\0\x05\0\0\0@:~mZI&s\0\xfe\xf7\x2d\x02\0\xff\x81\x15\
        \0\0\0\0\0\0\x1d\0\0\0abcdefghijkl\0mysql_native_password\0";
    assert_eq!(usize::from(GREETING[0]), GREETING.len() - 4);
    let mut response = b"\x38\0\0\x01\x01\x82\x08\0\0\0\0\x01\x2d".to_vec();
    response.extend_from_slice(&[0; 23]);
    response.extend_from_slice(b"u\0\0mysql_native_password\0");
    response[0] = response.len() as u8 - 4;
    let switched = vec![
        Say(GREETING),
        Hear(response.clone()),
        Say(b"\x1e\0\0\x02\xfecaching_sha2_password\0abcdef\0"),
        hear(b"\x01\0\0\x03\0"),
        Say(b"\x07\0\0\x04\0\0\0\x02\0\0\0"),
        hear(b"\x01\0\0\0\x01"),
    ];
    assert_eq!(
        follow(Dialogue::MySql(of.clone()), switched).await.said(),
        "5.5.5-10.11.6-MariaDB: a session began"
    );
    let full = vec![Say(b"\x17\0\0\0\xff\x10\x04Too many connections")];
    assert_eq!(follow(Dialogue::MySql(of), full).await.said(), "error 1040: Too many connections");
}

#[tokio::test]
async fn a_request_of_http() {
    let http = Http {
        method: Method::Get,
        path: "/healthz".parse().unwrap(),
        host: Some("app.example".parse().unwrap()),
        statuses: Statuses::default(),
        expect: b"well".to_vec(),
    };
    let request = || {
        hear(
            concat!(
                "GET /healthz HTTP/1.1\r\nhost: app.example\r\nuser-agent: trimtab/",
                env!("CARGO_PKG_VERSION"),
                "\r\naccept-encoding: identity\r\nconnection: close\r\n\r\n"
            )
            .as_bytes(),
        )
    };
    let well = vec![request(), Say(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nwell")];
    assert_eq!(follow(Dialogue::Http(http.clone()), well).await.said(), "status 200 OK");
    let ill = vec![request(), Say(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")];
    let outcome = follow(Dialogue::Http(http.clone()), ill).await;
    assert_eq!(outcome.said(), "status 503 Service Unavailable, not 200-399");
    let other = vec![request(), Say(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nill")];
    assert_eq!(follow(Dialogue::Http(http.clone()), other).await.verdict(), Verdict::Failed);
    let no_http = vec![Say(b"220 mail.example\r\n")];
    let outcome = {
        let (address, _serving) = server(no_http).await;
        ended(config(Dialogue::Http(http)), address).await
    };
    assert_eq!(outcome.verdict(), Verdict::Failed, "{}", outcome.said());
}

#[tokio::test]
async fn who_says_too_much_or_nothing_fails() {
    let (address, serving) = server(vec![]).await;
    serving.abort();
    let _ = serving.await;
    let outcome = ended(config(Dialogue::Tcp), address).await;
    assert_eq!(outcome.verdict(), Verdict::Refused, "{}", outcome.said());

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let babbling = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let babble = [b'x'; 4096];
        while stream.write_all(&babble).await.is_ok() {}
    });
    let texts = SendExpect { expect: b"y".to_vec(), ..SendExpect::default() };
    let outcome = ended(config(Dialogue::SendExpect(texts)), address).await;
    assert!(outcome.said().starts_with("\"y\" is not in its answer: xxx"), "{}", outcome.said());
    babbling.await.unwrap();
    let hangs_up = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { drop(listener.accept().await.unwrap()) });
        ended(config(Dialogue::Ftp), address).await
    };
    assert_eq!(hangs_up.verdict(), Verdict::Failed, "{}", hangs_up.said());
}

#[tokio::test]
async fn a_late_answer_ends_the_dialogue_that_is_open() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let check = CheckConfig { timeout: Duration::from_millis(50), ..config(Dialogue::Ftp) };
    let check = Check::new(check).unwrap();
    // The kernel takes the connection; nobody accepts it.
    let Begun::Late(outcome, mut waiting) = check.begin(&subject(address)).await else {
        panic!("nobody answers")
    };
    assert_eq!(outcome.verdict(), Verdict::TimedOut);
    assert!(timeout(Duration::from_millis(20), waiting.ended()).await.is_err());
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"220 at last\r\n").await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.expect("no reset");
        said
    });
    timeout(SOON, waiting.ended()).await.expect("it goes on");
    assert_eq!(serving.await.unwrap(), "QUIT\r\n", "the same connection, in good order");
}

#[tokio::test]
async fn another_port_and_another_address() {
    let resource: SocketAddr = "10.0.0.1:5432".parse().unwrap();
    let of = |address: Option<&str>, port| {
        let address = address.map(|address| address.parse().unwrap());
        Check::new(CheckConfig { address, port, ..config(Dialogue::Tcp) })
            .unwrap()
            .target(resource)
            .to_string()
    };
    assert_eq!(of(None, None), "10.0.0.1:5432");
    assert_eq!(of(None, Some(8008)), "10.0.0.1:8008");
    assert_eq!(of(Some("[::1]:1"), None), "[::1]:1");
}

#[tokio::test]
async fn a_proxy_header_comes_first() {
    for (proxy, header) in [
        (ProxyHeader::V1, &b"PROXY UNKNOWN\r\n"[..]),
        (ProxyHeader::V2, &[13, 10, 13, 10, 0, 13, 10, 81, 85, 73, 84, 10, 0x20, 0, 0, 0][..]),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut said = vec![0; header.len()];
            stream.read_exact(&mut said).await.unwrap();
            stream.write_all(b"hello").await.unwrap();
            said
        });
        let texts = SendExpect { expect: b"hello".to_vec(), ..SendExpect::default() };
        let check = CheckConfig { proxy: Some(proxy), ..config(Dialogue::SendExpect(texts)) };
        assert_eq!(ended(check, address).await.said(), "hello");
        assert_eq!(server.await.unwrap(), header);
    }
}

/// Sends every datagram back.
async fn udp_echo() -> (SocketAddr, JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let echo = tokio::spawn(async move {
        let mut buffer = [0; 512];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            socket.send_to(&buffer[..length], from).await.unwrap();
        }
    });
    (address, echo)
}

#[tokio::test]
async fn a_proxy_header_comes_first_in_datagrams() {
    let (address, echo) = udp_echo().await;
    let before = |proxy, expect: Vec<u8>| {
        let udp = Dialogue::Udp(Udp { send: b"ping".to_vec(), expect: Some(expect) });
        ended(CheckConfig { proxy: Some(proxy), ..config(udp) }, address)
    };
    assert_eq!(before(ProxyHeader::V1, b"ping".to_vec()).await.said(), "ping", "it has none for datagrams");
    // Version 2, PROXY, UDP over IPv4, 12 bytes of addresses, of which only our port is not known before.
    let header = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c\x7f\0\0\x01\x7f\0\0\x01";
    assert!(before(ProxyHeader::V2, header.to_vec()).await.result.is_ok());
    let rest = [&address.port().to_be_bytes()[..], b"ping"].concat();
    assert!(before(ProxyHeader::V2, rest).await.result.is_ok());
    // IPv6, with the addresses and no other.
    let (one, two) = ("[2001:db8::1]:258".parse().unwrap(), "[2001:db8::2]:772".parse().unwrap());
    let bytes = ProxyHeader::V2.datagram_bytes(one, two);
    assert_eq!(bytes[12..18], [0x21, 0x22, 0, 36, 0x20, 0x01]);
    assert_eq!((bytes.len(), &bytes[48..]), (52, &[1, 2, 3, 4][..]));
    echo.abort();
}

#[tokio::test]
async fn datagrams() {
    let (address, echo) = udp_echo().await;
    let udp = |expect: Option<&[u8]>| {
        Dialogue::Udp(Udp { send: b"ping".to_vec(), expect: expect.map(<[u8]>::to_vec) })
    };
    assert_eq!(ended(config(udp(Some(b"pin"))), address).await.said(), "ping");
    assert_eq!(ended(config(udp(Some(b"pong"))), address).await.verdict(), Verdict::Failed);
    // An echo is no answer to a query: nothing comes of it until the time is over.
    let query = DnsQuery {
        name: "a.example".parse().unwrap(),
        record: RecordType::A,
        rcode: Rcode::NoError,
        transport: Transport::Udp,
    };
    let short = |dialogue| CheckConfig { timeout: Duration::from_millis(50), ..config(dialogue) };
    assert_eq!(ended(short(Dialogue::Dns(query)), address).await.verdict(), Verdict::TimedOut);
    echo.abort();
    let _ = echo.await;
    assert_eq!(ended(config(udp(None)), address).await.verdict(), Verdict::Refused, "ICMP says so");
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    assert_eq!(ended(short(udp(None)), address).await.verdict(), Verdict::Passed);
    assert_eq!(ended(short(udp(Some(b"x"))), address).await.verdict(), Verdict::TimedOut);
}

#[tokio::test]
async fn programs() {
    let address: SocketAddr = "10.0.0.1:5432".parse().unwrap();
    let shell = |script: &str| {
        let arguments = ["-c", script, "sh", "{address}", "{port}"].map(str::to_owned).to_vec();
        Dialogue::Command(CommandLine { program: "/bin/sh".into(), arguments })
    };
    let says = shell("echo \"$1 $2 $TRIMTAB_RESOURCE $TRIMTAB_POOL\"");
    assert_eq!(ended(config(says), address).await.said(), "10.0.0.1 5432 r1 sql");
    let outcome = ended(config(shell("echo ill; exit 2")), address).await;
    assert_eq!((outcome.verdict(), outcome.said().as_str()), (Verdict::Failed, "exit status: 2: ill"));
    let babbles = ended(config(shell("head -c 1000000 /dev/zero | tr '\\0' x")), address).await;
    assert_eq!((babbles.verdict(), babbles.said().len()), (Verdict::Passed, ANSWER_CHARS_MAX));
    let missing = Dialogue::Command(CommandLine { program: "/nowhere".into(), arguments: Vec::new() });
    assert!(ended(config(missing), address).await.said().starts_with("/nowhere cannot be run"));

    let folder = std::env::temp_dir().join(format!("trimtab-checks-{}", std::process::id()));
    let script = format!("echo $$ > {}; sleep 100 & sleep 100", folder.display());
    let hangs = CheckConfig { timeout: Duration::from_millis(500), ..config(shell(&script)) };
    assert_eq!(ended(hangs, address).await.verdict(), Verdict::TimedOut);
    let group = std::fs::read_to_string(&folder).unwrap();
    std::fs::remove_file(&folder).unwrap();
    let group = rustix::process::Pid::from_raw(group.trim().parse().unwrap()).unwrap();
    let gone = async {
        while rustix::process::test_kill_process_group(group).is_ok() {
            // Orphans are waited for by another process.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = timeout(SOON, gone).await;
    let left = std::fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let after: Vec<_> = stat.rsplit_once(')').map_or("", |(_, after)| after).split_whitespace().collect();
        // State and process group; a zombie is dead.
        after.first() != Some(&"Z") && after.get(2) == Some(&group.as_raw_nonzero().to_string().as_str())
    });
    assert_eq!(left.count(), 0, "nothing of it goes on");
}

/// A server's TLS as `db.example`, and its certificate in PEM.
fn tls_server() -> (TlsAcceptor, String) {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["db.example".to_owned()]).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    (TlsAcceptor::from(Arc::new(server)), cert.pem())
}

#[tokio::test]
async fn tls_is_believed_or_not_asked_about() {
    let (acceptor, cert) = tls_server();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = stream.write_all(b"220 secret\r\n").await;
                let mut said = Vec::new();
                let _ = stream.read_to_end(&mut said).await;
                assert!(said.is_empty() || said == b"QUIT\r\n");
            }
        }
    });
    let folder = std::env::temp_dir().join(format!("trimtab-checks-ca-{}", std::process::id()));
    std::fs::write(&folder, cert).unwrap();
    let of = |verify, server_name: Option<&str>, ca| TlsConfig {
        server_name: server_name.map(str::to_owned),
        verify,
        ca,
        starttls: false,
    };
    let ask = async |dialogue, tls| ended(CheckConfig { tls: Some(tls), ..config(dialogue) }, address).await;
    let said = ask(Dialogue::Ftp, of(true, Some("db.example"), Some(folder.clone()))).await.said();
    assert_eq!(said, "220 secret");
    assert_eq!(ask(Dialogue::Tls, of(false, None, None)).await.verdict(), Verdict::Passed);
    for wrong in [of(true, Some("db.example"), None), of(true, Some("other.example"), Some(folder.clone()))] {
        let outcome = ask(Dialogue::Tls, wrong).await;
        assert!(outcome.said().starts_with("no TLS: "), "{}", outcome.said());
    }
    std::fs::remove_file(&folder).unwrap();
    assert!(
        Check::new(CheckConfig { tls: Some(of(true, None, Some(folder))), ..config(Dialogue::Tls) }).is_err()
    );
}

/// Runs a dialogue that goes over to TLS against a server that says and hears this in clear, and then that within; or `None`: the
/// client must not begin TLS. Gives what came of it.
async fn go_over(dialogue: Dialogue, clear: Vec<Turn>, within: Option<Vec<Turn>>) -> Outcome {
    let (acceptor, _) = tls_server();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        play(&mut stream, clear).await;
        let mut rest = Vec::new();
        let Some(turns) = within else {
            stream.read_to_end(&mut rest).await.expect("the client ends in good order");
            return rest;
        };
        let mut stream = acceptor.accept(stream).await.expect("a handshake");
        play(&mut stream, turns).await;
        // An end without close_notify would be an error here.
        stream.read_to_end(&mut rest).await.expect("close_notify");
        rest
    });
    let tls = TlsConfig { verify: false, starttls: true, ..TlsConfig::default() };
    let outcome = ended(CheckConfig { tls: Some(tls), ..config(dialogue) }, address).await;
    assert_eq!(String::from_utf8_lossy(&serving.await.unwrap()), "", "nothing behind the goodbye");
    outcome
}

const EHLO: &[u8] = b"EHLO [127.0.0.1]\r\n";
const OFFERED: &[u8] = b"250-mail.example\r\n250-HELP\r\n250 StartTLS\r\n";
const STREAM: &[u8] = b"<?xml version='1.0'?><stream:stream to='a.example' version='1.0' xml:lang='en' \
    xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>";
const FEATURES: &[u8] = b"<?xml version='1.0'?><stream:stream><stream:features>\
    <starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:features>";
const START: &[u8] = b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>";

fn xmpp() -> Dialogue {
    Dialogue::Xmpp(Xmpp { domain: "a.example".into(), stream: StreamKind::Client })
}

#[tokio::test]
async fn dialogues_go_over_to_tls_and_end_in_good_order() {
    let clear = vec![
        Say(b"220 mail.example\r\n"),
        hear(EHLO),
        Say(OFFERED),
        hear(b"STARTTLS\r\n"),
        Say(b"220 go ahead\r\n"),
    ];
    let within = vec![hear(EHLO), Say(b"250 mail.example\r\n"), hear(b"QUIT\r\n"), Say(b"221 Bye\r\n")];
    let outcome = go_over(Dialogue::Smtp(Smtp::default()), clear, Some(within)).await;
    assert_eq!((outcome.verdict(), outcome.said().as_str()), (Verdict::Passed, "220 mail.example"));

    let clear = vec![Say(b"220 files\r\n"), hear(b"AUTH TLS\r\n"), Say(b"234 go ahead\r\n")];
    let within = vec![hear(b"QUIT\r\n"), Say(b"221 Bye\r\n")];
    assert_eq!(go_over(Dialogue::Ftp, clear, Some(within)).await.said(), "220 files");

    let clear = vec![hear(STREAM), Say(FEATURES), hear(START), Say(b"<proceed xmlns='x'/>")];
    let within = vec![
        hear(STREAM),
        Say(b"<stream:stream><stream:features/>"),
        hear(b"</stream:stream>"),
        Say(b"</stream:stream>"),
    ];
    assert_eq!(go_over(xmpp(), clear, Some(within)).await.verdict(), Verdict::Passed);
    // Who takes TLS and then says that he is not well.
    let clear = vec![hear(STREAM), Say(FEATURES), hear(START), Say(b"<proceed xmlns='x'/>")];
    let error = b"<stream:stream><stream:error><host-unknown/></stream:error>";
    let within = vec![hear(STREAM), Say(error), hear(b"</stream:stream>")];
    assert_eq!(go_over(xmpp(), clear, Some(within)).await.said(), "stream error: host-unknown");
}

/// Somebody between who adds to what is said in clear is believed in nothing: neither in what he adds behind the word that begins TLS,
/// nor in that there is none.
#[tokio::test]
async fn nothing_said_in_clear_is_taken_for_what_is_said_within_tls() {
    const INJECTED: &str = "it said something in clear before TLS began";
    let smtp = |last: &'static [u8]| {
        vec![Say(b"220 mail.example\r\n"), hear(EHLO), Say(OFFERED), hear(b"STARTTLS\r\n"), Say(last)]
    };
    let last = b"220 go ahead\r\n250 all is well\r\n";
    let outcome = go_over(Dialogue::Smtp(Smtp::default()), smtp(last), None).await;
    assert_eq!((outcome.verdict(), outcome.said().as_str()), (Verdict::Failed, INJECTED));
    let ftp = vec![Say(b"220 files\r\n"), hear(b"AUTH TLS\r\n"), Say(b"234 go ahead\r\n221 all is well\r\n")];
    assert_eq!(go_over(Dialogue::Ftp, ftp, None).await.said(), INJECTED);
    let stream = b"<proceed xmlns='x'/><stream:stream><stream:features/>";
    let turns = vec![hear(STREAM), Say(FEATURES), hear(START), Say(stream)];
    assert_eq!(go_over(xmpp(), turns, None).await.said(), INJECTED);

    // Nor do checks do without: they leave in the words of the protocol.
    let silent = vec![
        Say(b"220 mail.example\r\n"),
        hear(EHLO),
        Say(b"250-mail.example\r\n250 HELP\r\n"),
        hear(b"QUIT\r\n"),
    ];
    let outcome = go_over(Dialogue::Smtp(Smtp::default()), silent, None).await;
    assert_eq!((outcome.verdict(), outcome.said().as_str()), (Verdict::Failed, "it offers no STARTTLS"));
    let mut busy = smtp(b"454 not now\r\n");
    busy.push(hear(b"QUIT\r\n"));
    assert_eq!(
        go_over(Dialogue::Smtp(Smtp::default()), busy, None).await.said(),
        "it says 454 not now, not 220"
    );
    let ftp = vec![Say(b"220 files\r\n"), hear(b"AUTH TLS\r\n"), Say(b"500 what?\r\n"), hear(b"QUIT\r\n")];
    assert_eq!(go_over(Dialogue::Ftp, ftp, None).await.said(), "it says 500 what?, not 234");
    let features = b"<stream:stream><stream:features/>";
    let turns = vec![hear(STREAM), Say(features), hear(b"</stream:stream>")];
    assert_eq!(go_over(xmpp(), turns, None).await.said(), "it offers no STARTTLS");
    let failure = b"<failure xmlns='x'/></stream:stream>";
    let turns = vec![hear(STREAM), Say(FEATURES), hear(START), Say(failure), hear(b"</stream:stream>")];
    assert_eq!(go_over(xmpp(), turns, None).await.said(), "it offers STARTTLS, and refuses it");
}
