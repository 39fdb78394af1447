//! Out of descriptors. A test binary of its own: it takes every descriptor of its process, which others would miss.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use allocation::{AllocationTable, Backend, LiveFacts, Members, Policy, Publisher};
use dataplane::{Config, Engine, ListenerConfig};
use socket2::{Domain, Socket, Type};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn it_waits_without_spinning_and_recovers() {
    Engine::ALL.into_iter().for_each(waits_and_recovers);
}

fn waits_and_recovers(engine: Engine) {
    let backend = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = backend.local_addr().unwrap();
    thread::spawn(move || {
        // One flow after the other: each sends a byte and gets it back.
        for mut stream in backend.incoming().map_while(Result::ok) {
            let mut byte = [0; 1];
            while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
        }
    });
    let live = Arc::new(LiveFacts::default());
    let members = Members::new(vec![Backend { id: "b".parse().unwrap(), address, flows_max: 0, live }]);
    let table = AllocationTable::new(1, Policy::Adaptive, Arc::new(members), vec![1.0]);
    let bind = (Ipv4Addr::LOCALHOST, 0).into();
    let listener = ListenerConfig::new(bind, "test".parse().unwrap(), Publisher::new(table));
    let mut config = Config::new(vec![listener]);
    config.workers = 1;
    config.engine = Some(engine);
    let proxy = dataplane::bind(config).unwrap().start().unwrap();
    let front = proxy.addresses()[0];
    let exchange = |mut stream: TcpStream| {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0; 1]).unwrap();
    };
    exchange(TcpStream::connect(front).unwrap());

    // The client's socket is made before the shortage and connects in it: the kernel accepts, the worker cannot.
    let waiting = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let mut hoard = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        hoard.push(file);
        assert!(hoard.len() < 2_000_000, "there is no descriptor limit: the test shows nothing");
    }
    waiting.connect(&front.into()).unwrap();
    let view = proxy.view();
    let before = view.engine().enters;
    // A measured time, not one to wait for something: how often the loop turns in it.
    thread::sleep(Duration::from_millis(500));
    let turns = view.engine().enters - before;
    assert!(turns <= 50, "{engine}: {turns} turns of the loop in half a second: it spins");
    drop(hoard);
    exchange(waiting.into());
    proxy.stop();
    proxy.join().unwrap();
}
