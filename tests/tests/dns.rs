//! The balancer in DNS: published, kept there, withdrawn, at three real servers; and found there by agents.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use e2e::{
    Balancer, BalancerConfig, DnsKind, DnsServer, Namespace, PATIENCE, Process, Proxy, ZONE, binary,
    dns_section, until,
};
use rustix::process::Signal;

const SRV: &str = "_trimtab._tcp.example.test";

fn balancer(dns: &str) -> Balancer {
    Balancer::start(BalancerConfig { further: dns.to_owned(), ..Default::default() })
}

/// `10 100 PORT NAME.example.test.`
fn srv(balancer: &Balancer, name: &str) -> String {
    format!("10 100 {} {name}.example.test.", balancer.control().port())
}

fn wait_for(server: &DnsServer, name: &str, kind: &str, wanted: &[String]) {
    let mut wanted = wanted.to_vec();
    wanted.sort();
    until(&format!("{name} {kind} is {wanted:?}"), || (server.dig(name, kind) == wanted).then_some(()));
}

fn ends_well(balancer: &mut Balancer) {
    balancer.process().signal(Signal::TERM);
    let (ended, took) = balancer.process().wait(PATIENCE);
    println!("the balancer ended {took:?} after SIGTERM");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

fn publish_and_withdraw(kind: DnsKind) {
    let server = DnsServer::start(kind);
    let mut one = balancer(&server.section("lb1", ""));
    wait_for(&server, SRV, "SRV", &[srv(&one, "lb1")]);
    wait_for(&server, "lb1.example.test", "A", &[one.control().ip().to_string()]);
    let txt = server.dig("lb1.example.test", "TXT");
    assert!(txt[0].starts_with("\"heritage=trimtab,owner="), "{txt:?}");
    ends_well(&mut one);
    for (name, kind) in [(SRV, "SRV"), ("lb1.example.test", "A"), ("lb1.example.test", "TXT")] {
        assert_eq!(server.dig(name, kind), [""; 0], "{name} {kind} is withdrawn");
    }
}

#[test]
fn bind_publishes_and_withdraws() {
    publish_and_withdraw(DnsKind::Bind);
}

#[test]
fn knot_publishes_and_withdraws() {
    publish_and_withdraw(DnsKind::Knot);
}

#[test]
fn powerdns_publishes_and_withdraws() {
    publish_and_withdraw(DnsKind::PowerDns);
}

/// What `trimtab dns` says of the one entry there is.
fn status(balancer: &Balancer) -> serde_json::Value {
    balancer.ask(&["dns"])["dns"][0].clone()
}

/// What it says is wrong, once something is.
fn wait_for_failure(balancer: &Balancer) -> String {
    let failing = || Some(status(balancer)).filter(|status| status["state"] == "failing");
    until("it says that it fails", failing)["last_error"].as_str().expect("a text").to_owned()
}

fn published(balancer: &Balancer) -> bool {
    status(balancer)["state"] == "published"
}

#[test]
fn a_key_that_does_not_fit_is_refused_with_what_to_do() {
    for kind in DnsKind::ALL {
        let server = DnsServer::start(kind);
        let mut cases = [
            (
                server.key_file_with_another_secret(),
                "bad_signature",
                "another secret for the key trimtab-key",
            ),
            (server.key_file_of_another_name(), "bad_key", "does not know the key unknown-key"),
        ];
        if kind == DnsKind::PowerDns {
            // It does not tell these apart, and refuses both.
            cases[0] = (cases[0].0.clone(), "refused", "or by another secret");
            cases[1] = (cases[1].0.clone(), "refused", "when it does not know the key");
        }
        for (key, label, said) in cases {
            let mut balancer = balancer(&dns_section(server.address(), &key, "lb1", ""));
            let error = wait_for_failure(&balancer);
            println!("{kind:?}: {error}");
            assert!(error.contains(said), "{kind:?}: {error}");
            let labels = [("zone", ZONE), ("result", label)];
            assert!(balancer.metrics().sum("trimtab_dns_updates_total", &labels) > 0.0, "{kind:?} {label}");
            assert_eq!(balancer.metrics().sum("trimtab_dns_published", &[]), 0.0);
            assert_eq!(server.dig(SRV, "SRV"), [""; 0]);
            // The log has it, and neither has the secret.
            let log = balancer.process().stderr();
            let secret = std::fs::read_to_string(&key).expect("our key");
            let secret = secret.split('"').nth(3).expect("a secret");
            assert!(log.contains(said) && !log.contains(secret) && !error.contains(secret), "{log}");
            ends_well(&mut balancer);
        }
    }
}

#[test]
fn a_zone_or_a_name_that_is_not_ours_is_left_alone() {
    for kind in DnsKind::ALL {
        let server = DnsServer::start(kind);
        // Somebody's host, without our mark.
        let mut one = balancer(&server.section("taken", ""));
        let said = wait_for_failure(&one);
        println!("{kind:?}: {said}");
        assert!(said.contains("taken.example.test belongs to somebody who did not mark it"), "{said}");
        assert_eq!(server.dig("taken.example.test", "A"), ["192.0.2.7"]);
        assert_eq!(server.dig(SRV, "SRV"), [""; 0]);
        ends_well(&mut one);
        assert_eq!(server.dig("taken.example.test", "A"), ["192.0.2.7"]);

        // Another balancer's.
        let mut one = balancer(&server.section("lb1", "owner = \"one\""));
        wait_for(&server, SRV, "SRV", &[srv(&one, "lb1")]);
        let mut two = balancer(&server.section("lb1", "owner = \"two\""));
        let said = wait_for_failure(&two);
        assert!(said.contains("lb1.example.test belongs to the balancer one"), "{said}");
        assert_eq!(two.metrics().sum("trimtab_dns_updates_total", &[("result", "owned")]), 1.0);
        ends_well(&mut two);
        assert_eq!(server.dig("lb1.example.test", "A"), [one.control().ip().to_string()]);
        assert_eq!(server.dig(SRV, "SRV"), [srv(&one, "lb1")]);
        ends_well(&mut one);

        // A zone that the server does not have.
        let section = server.section("lb1", "").replace(ZONE, "example.org");
        let mut elsewhere = balancer(&section);
        let said = wait_for_failure(&elsewhere);
        println!("{kind:?}: {said}");
        assert!(said.contains("example.org (NOTAUTH)") || said.contains("example.org by the key"), "{said}");
        ends_well(&mut elsewhere);
    }
}

#[test]
fn two_balancers_at_once_keep_both_records() {
    for kind in DnsKind::ALL {
        let mut server = DnsServer::start(kind);
        // Both wait for it, and come at once when it is there.
        server.stop();
        let [mut one, mut two] =
            ["lb1", "lb2"].map(|name| balancer(&server.section(name, &format!("owner = \"{name}\""))));
        wait_for_failure(&one);
        wait_for_failure(&two);
        server.start_again();
        let both = [srv(&one, "lb1"), srv(&two, "lb2")];
        wait_for(&server, SRV, "SRV", &both);
        // Through some refreshes, too, which change nothing.
        until("both know", || (published(&one) && published(&two)).then_some(()));
        let serial = server.serial();
        let updates =
            |balancer: &Balancer| balancer.metrics().sum("trimtab_dns_updates_total", &[("result", "ok")]);
        let before = [updates(&one), updates(&two)];
        until("both refreshed twice", || {
            (updates(&one) >= before[0] + 2.0 && updates(&two) >= before[1] + 2.0).then_some(())
        });
        let mut sorted = both.to_vec();
        sorted.sort();
        assert_eq!(server.dig(SRV, "SRV"), sorted);
        assert_eq!(server.serial(), serial, "{kind:?}: a refresh that finds all in place changes nothing");
        ends_well(&mut one);
        wait_for(&server, SRV, "SRV", &both[1..]);
        assert_eq!(server.dig("lb2.example.test", "A"), [two.control().ip().to_string()]);
        ends_well(&mut two);
        wait_for(&server, SRV, "SRV", &[]);
    }
}

#[test]
fn a_server_that_is_down_delays_nothing_and_has_all_when_it_is_back() {
    for kind in DnsKind::ALL {
        let mut server = DnsServer::start(kind);
        server.stop();
        // It starts at once, and serves.
        let mut one = balancer(&server.section("lb1", ""));
        assert_eq!(one.probe("/readyz").map(|answer| answer.status), Some(200));
        let said = wait_for_failure(&one);
        assert!(said.contains("cannot be reached: Connection refused"), "{said}");
        let ready = one.probe("/readyz?verbose").expect("an answer");
        assert_eq!(ready.status, 200, "no DNS server makes it unready");
        assert!(ready.body.contains("dns example.test at ") && ready.body.contains(&said), "{}", ready.body);
        server.start_again();
        wait_for(&server, SRV, "SRV", &[srv(&one, "lb1")]);
        until("it knows", || published(&one).then_some(()));

        // It loses the zone, as with a restored backup.
        server.stop();
        wait_for_failure(&one);
        server.lose_zone();
        server.start_again();
        wait_for(&server, SRV, "SRV", &[srv(&one, "lb1")]);
        wait_for(&server, "lb1.example.test", "A", &[one.control().ip().to_string()]);

        // It is away when the balancer leaves, and holds nothing up.
        server.stop();
        one.process().signal(Signal::TERM);
        let (ended, took) = one.process().wait(PATIENCE);
        println!("{kind:?} away: the balancer ended {took:?} after SIGTERM");
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(ended.stderr.contains("not withdrawn from DNS"), "{}", ended.stderr);
        // What stayed behind is its own at the next start.
        server.start_again();
        until("the records stayed", || (!server.dig(SRV, "SRV").is_empty()).then_some(()));
        one.start_again();
        one.wait_until_ready();
        until("it took them again", || published(&one).then_some(()));
        ends_well(&mut one);
        wait_for(&server, SRV, "SRV", &[]);
    }
}

/// In front of a real server: TCP goes through to it, and UDP is treated badly.
struct Front {
    _proxy: Proxy,
    address: SocketAddr,
    /// With updates in them: the balancer also asks who else is there.
    datagrams: Arc<AtomicUsize>,
}

impl Front {
    /// `answer` is what a datagram gets.
    fn of(server: &DnsServer, answer: fn(&[u8]) -> Option<Vec<u8>>) -> Self {
        let proxy = Proxy::start(&[server.address()], &[]);
        let address = proxy.listener();
        let socket = UdpSocket::bind(address).expect("UDP at the same address is free");
        let datagrams = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&datagrams);
        // It ends with the test's process.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                seen.fetch_add(usize::from(is_update(&buffer[..length])), Relaxed);
                if let Some(answer) = answer(&buffer[..length]) {
                    drop(socket.send_to(&answer, from));
                }
            }
        });
        Self { _proxy: proxy, address, datagrams }
    }
}

/// By its opcode (RFC 2136, 2.2).
fn is_update(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags >> 3 & 0xf == 5)
}

/// An answer to its question: nothing but "it does not fit here".
fn truncated(question: &[u8]) -> Option<Vec<u8>> {
    let mut answer = question.get(..12)?.to_vec();
    // QR and TC; no records.
    answer[2] |= 0x82;
    answer[4..].fill(0);
    Some(answer)
}

/// A wrong server on the way, or an attacker that sees the question: all is well, and nothing is signed.
fn forged(question: &[u8]) -> Option<Vec<u8>> {
    let mut answer = question.get(..12)?.to_vec();
    answer[2] |= 0x80;
    answer[4..].fill(0);
    Some(answer)
}

#[test]
fn tcp_takes_over_where_udp_does_not_do() {
    let server = DnsServer::start(DnsKind::Bind);
    let many: Vec<String> = (1..=16).map(|host| format!("\"2001:db8::{host}\"")).collect();
    let many = format!("addresses = [{}]", many.join(", "));
    for (answer, further, by_udp) in [
        // A firewall that drops it.
        ((|_| None) as fn(&[u8]) -> Option<Vec<u8>>, "", true),
        (truncated, "", true),
        // Larger than what a datagram may hold without asking first.
        (truncated, &many, false),
    ] {
        let front = Front::of(&server, answer);
        let mut balancer = balancer(&dns_section(front.address, &server.key_file(), "lb1", further));
        wait_for(&server, SRV, "SRV", &[srv(&balancer, "lb1")]);
        assert_eq!(front.datagrams.load(Relaxed) > 0, by_udp);
        until("it knows", || published(&balancer).then_some(()));
        let addresses = ["A", "AAAA"].map(|kind| server.dig("lb1.example.test", kind).len());
        assert_eq!(addresses, if by_udp { [1, 0] } else { [0, 16] });
        ends_well(&mut balancer);
        wait_for(&server, SRV, "SRV", &[]);
    }
}

#[test]
fn an_answer_that_is_not_signed_is_not_believed() {
    let server = DnsServer::start(DnsKind::Bind);
    let front = Front::of(&server, forged);
    let mut balancer = balancer(&dns_section(front.address, &server.key_file(), "lb1", ""));
    let error = wait_for_failure(&balancer);
    assert!(error.contains("the answer is not signed with the key trimtab-key"), "{error}");
    balancer.process().signal(Signal::TERM);
    assert_eq!(balancer.process().wait(PATIENCE).0.code, Some(0));
}

#[test]
fn a_server_that_says_nothing_holds_nothing_up() {
    // Datagrams and connections go there, and nobody takes them.
    let hole = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = hole.local_addr().expect("a bound socket has an address");
    let _silent = UdpSocket::bind(address).expect("UDP at the same address is free");
    let key = DnsServer::start(DnsKind::Bind);
    let mut balancer = balancer(&dns_section(address, &key.key_file(), "lb1", ""));
    assert_eq!(balancer.probe("/readyz").map(|answer| answer.status), Some(200));
    let error = wait_for_failure(&balancer);
    assert!(error.contains("does not answer; is dns.server its address"), "{error}");
    balancer.process().signal(Signal::TERM);
    let (ended, took) = balancer.process().wait(PATIENCE);
    println!("ended {took:?} after SIGTERM beside a silent server");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[test]
fn addresses_are_followed_as_they_come_and_go() {
    let namespace = Arc::new(Namespace::new());
    for address in ["10.9.0.53/24", "10.9.0.1/24", "fd00:9::1/64"] {
        namespace.ip(&["addr", "add", address, "dev", "lo"]);
    }
    let server = "10.9.0.53:53".parse().expect("an address");
    let server = DnsServer::start_in(DnsKind::Bind, server, Arc::clone(&namespace));
    // Nobody tells it an address: it listens at all of them.
    let config = format!(
        "[control]\nlisten = \"[::]:7400\"\ninsecure = true\n[http]\nlisten = \"127.0.0.1:7480\"\n\
         [dataplane]\nworkers = 1\n[[pool]]\nname = \"sql\"\n\
         [[listener]]\nbind = \"tcp://0.0.0.0:5432\"\npool = \"sql\"\n{}\
         [[dns.service]]\nname = \"_postgresql._tcp\"\nlistener = \"tcp://0.0.0.0:5432\"\n",
        server.section("lb1", "")
    );
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("trimtab.toml");
    std::fs::write(&file, config).expect("a file in our own folder");
    let mut command = namespace.command(binary().to_str().expect("a plain path"));
    let mut process = Process::start("balancer", command.arg("serve").arg("-c").arg(&file));

    let lines = |wanted: &[&str]| wanted.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    wait_for(&server, "lb1.example.test", "A", &lines(&["10.9.0.1", "10.9.0.53"]));
    wait_for(&server, "lb1.example.test", "AAAA", &lines(&["fd00:9::1"]));
    // The listener has no IPv6, so its service has a host name of its own.
    wait_for(
        &server,
        "_postgresql._tcp.example.test",
        "SRV",
        &lines(&["10 100 5432 postgresql.lb1.example.test."]),
    );
    wait_for(&server, "postgresql.lb1.example.test", "A", &lines(&["10.9.0.1", "10.9.0.53"]));
    assert_eq!(server.dig("postgresql.lb1.example.test", "AAAA"), [""; 0]);

    namespace.ip(&["addr", "add", "10.9.0.2/24", "dev", "lo"]);
    wait_for(&server, "lb1.example.test", "A", &lines(&["10.9.0.1", "10.9.0.2", "10.9.0.53"]));
    namespace.ip(&["addr", "del", "10.9.0.1/24", "dev", "lo"]);
    namespace.ip(&["addr", "del", "fd00:9::1/64", "dev", "lo"]);
    wait_for(&server, "lb1.example.test", "AAAA", &[]);
    until("one is gone", || {
        (!server.dig("lb1.example.test", "A").contains(&"10.9.0.1".into())).then_some(())
    });
    wait_for(&server, SRV, "SRV", &lines(&["10 100 7400 lb1.example.test."]));

    process.signal(Signal::TERM);
    assert_eq!(process.wait(PATIENCE).0.code, Some(0));
    for (name, kind) in [(SRV, "SRV"), ("lb1.example.test", "A"), ("postgresql.lb1.example.test", "A")] {
        assert_eq!(server.dig(name, kind), [""; 0], "{name} {kind} is withdrawn");
    }
}

#[test]
fn what_changed_while_it_was_away_leaves_nothing_old() {
    for kind in DnsKind::ALL {
        let server = DnsServer::start(kind);
        let mut before = balancer(&server.section("lb1", "owner = \"me\""));
        wait_for(&server, SRV, "SRV", &[srv(&before, "lb1")]);
        before.process().signal(Signal::KILL);
        before.process().wait(PATIENCE);
        // Another port and another priority, and other addresses.
        let mut after =
            balancer(&server.section("lb1", "owner = \"me\"\npriority = 20\naddresses = [\"192.0.2.9\"]"));
        wait_for(&server, SRV, "SRV", &[srv(&after, "lb1").replace("10 100", "20 100")]);
        wait_for(&server, "lb1.example.test", "A", &["192.0.2.9".to_owned()]);
        ends_well(&mut after);
        wait_for(&server, SRV, "SRV", &[]);
    }
}
