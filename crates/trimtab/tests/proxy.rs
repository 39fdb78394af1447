//! `trimtab proxy` from its start to its end.

use std::net::{TcpListener, TcpStream};

use rustix::process::Signal;
use support::{Running, echo_service, echoes, eventually, listening};

mod support;

#[test]
fn it_drains_at_sigterm_and_exits_0() {
    let service = echo_service().to_string();
    let mut proxy = Running::start(&[
        "proxy",
        "--listen",
        "tcp://127.0.0.1:0",
        "--listen",
        "tcp://[::1]:0",
        "--to",
        &service,
    ]);
    let lines = proxy.until_ready();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines.iter().all(|line| line.ends_with(" pool=proxy")), "{lines:?}");

    let open: Vec<_> =
        lines.iter().map(|line| TcpStream::connect(listening(line)).expect("it listens")).collect();
    assert!(open.iter().all(echoes));
    proxy.signal(Signal::HUP);
    proxy.signal(Signal::TERM);
    let address = listening(&lines[0]);
    eventually("nothing new is accepted", || TcpStream::connect(address).is_err());
    assert!(open.iter().all(echoes), "open flows go on");
    assert!(!proxy.has_ended());
    drop(open);
    assert_eq!(proxy.wait(), 0);
    assert!(proxy.stderr().contains("SIGHUP"));
}

#[test]
fn a_second_signal_leaves_at_once() {
    let service = echo_service().to_string();
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let mut proxy = Running::start(&["proxy", "--listen", "tcp://127.0.0.1:0", "--to", &service]);
        let address = listening(&proxy.until_ready()[0]);
        let open = TcpStream::connect(address).expect("it listens");
        assert!(echoes(&open));
        proxy.signal(Signal::TERM);
        eventually("it drains", || TcpStream::connect(address).is_err());
        proxy.signal(signal);
        assert_eq!(proxy.wait(), code);
    }
}

#[test]
fn a_drain_has_an_end() {
    let service = echo_service().to_string();
    let mut proxy = Running::start(&[
        "proxy",
        "--listen",
        "tcp://127.0.0.1:0",
        "--to",
        &service,
        "--drain-timeout",
        "200ms",
    ]);
    let open = TcpStream::connect(listening(&proxy.until_ready()[0])).expect("it listens");
    assert!(echoes(&open));
    proxy.signal(Signal::INT);
    assert_eq!(proxy.wait(), 0);
    assert!(!echoes(&open), "what is left at the deadline is reset");
}

#[test]
fn every_port_in_use_is_named_at_once_and_exits_71() {
    let taken: Vec<_> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    let taken: Vec<_> =
        taken.iter().map(|listener| (listener, listener.local_addr().expect("its address"))).collect();
    let listen: Vec<_> = taken.iter().map(|(_, address)| format!("tcp://{address}")).collect();
    let mut proxy =
        Running::start(&["proxy", "--to", "127.0.0.1:1", "--listen", &listen[0], "--listen", &listen[1]]);
    assert_eq!(proxy.wait(), 71);
    let said = proxy.stderr();
    assert!(listen.iter().all(|listen| said.contains(listen.as_str())), "{said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("trimtab: error")).count(), 2, "{said}");
}

#[test]
fn an_address_given_twice_exits_64() {
    let mut proxy = Running::start(&[
        "proxy",
        "--listen",
        "tcp://127.0.0.1:0",
        "--to",
        "127.0.0.1:1",
        "--to",
        "127.0.0.1:1",
    ]);
    assert_eq!(proxy.wait(), 64);
    assert_eq!(proxy.stderr(), "trimtab: error: --to has 127.0.0.1:1 twice\n  hint: remove one of the two\n");
}
