//! Who is turned away, who waits, who is kept where, and what is written down of it; over loopback with real sockets.
//!
//! Nothing here waits a fixed time for something to happen: conditions are polled until a deadline that is far longer than a
//! noisy machine needs.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use allocation::telemetry::{DataplaneView, ListenerSnapshot};
use allocation::{AllocationTable, Backend, LiveFacts, Members, Policy, Publisher};
use dataplane::{
    AccessLogConfig, AccessLogFormat, AccessLogTo, Config, Dataplane, ListenerConfig, ListenerLimits,
    PoolKnobs, PoolShare, QueueKnobs,
};
use socket2::{Domain, SockRef, Socket, Type};

const PATIENCE: Duration = Duration::from_secs(20);

struct Proxy {
    dataplane: Dataplane,
    view: Arc<dyn DataplaneView>,
    address: SocketAddr,
    publisher: Publisher,
}

/// Resources `r0`, `r1`, … with these addresses and the same limit.
fn table(generation: u64, backends: &[(&str, SocketAddr)], flows_max: u32) -> AllocationTable {
    let backend = |(id, address): &(&str, SocketAddr)| Backend {
        id: id.parse().unwrap(),
        address: *address,
        flows_max,
        live: Arc::new(LiveFacts::default()),
    };
    let members = Arc::new(Members::new(backends.iter().map(backend).collect()));
    AllocationTable::new(generation, Policy::RoundRobin, members, vec![1.0; backends.len()])
}

impl Proxy {
    fn start(table: AllocationTable, knobs: PoolKnobs, tune: impl FnOnce(&mut Config)) -> Self {
        let publisher = Publisher::new(table);
        let mut listener =
            ListenerConfig::new((Ipv4Addr::LOCALHOST, 0).into(), "test".parse().unwrap(), publisher.clone());
        listener.targets[0].share = PoolShare::new(knobs, 1);
        let mut config = Config::new(vec![listener]);
        config.workers = 1;
        tune(&mut config);
        let bound = dataplane::bind(config).unwrap();
        let address = bound.addresses()[0];
        let dataplane = bound.start().unwrap();
        Self { view: dataplane.view(), dataplane, address, publisher }
    }

    fn limited(limits: ListenerLimits) -> Self {
        let table = table(1, &[("r0", echo("r0"))], 0);
        Self::start(table, PoolKnobs::default(), |config| config.listeners[0].limits = limits)
    }

    fn client(&self) -> TcpStream {
        self.client_from([127, 0, 0, 1])
    }

    /// One from another address of loopback.
    fn client_from(&self, address: [u8; 4]) -> TcpStream {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((address, 0)).into()).unwrap();
        socket.connect(&self.address.into()).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn snapshot(&self) -> ListenerSnapshot {
        self.view.listeners().remove(0)
    }

    fn shed(&self, reason: &str) -> u64 {
        of(&self.snapshot().sheds, reason)
    }

    fn finish(self) {
        eventually("flows end", || self.snapshot().flows_open == 0);
        assert_eq!(self.snapshot().flows_waiting, 0);
        self.dataplane.drain(PATIENCE);
        eventually("workers end", || self.dataplane.is_finished());
        self.dataplane.join().unwrap();
    }
}

fn of(counts: &[(&'static str, u64)], label: &str) -> u64 {
    counts.iter().find(|(known, _)| *known == label).unwrap_or_else(|| panic!("{label} in {counts:?}")).1
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "did not happen within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A server that says its name, then sends back what it is sent.
fn echo(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut bytes = [0; 1024];
                let _ = stream.write_all(name.as_bytes());
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..read]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// The name that its server says: it is served.
fn served_by(stream: &mut TcpStream) -> String {
    let mut name = [0; 2];
    stream.read_exact(&mut name).unwrap();
    String::from_utf8(name.to_vec()).unwrap()
}

/// It is reset without having been served.
fn is_reset(mut stream: TcpStream) {
    let error = stream.read(&mut [0; 1]).expect_err("turned away with a reset, not an orderly end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

// --- Limits -------------------------------------------------------------------------------------------------------------

#[test]
fn a_listener_takes_so_many_flows_and_others_when_those_have_ended() {
    let proxy = Proxy::limited(ListenerLimits { flows: 2, ..ListenerLimits::default() });
    let mut held = [proxy.client(), proxy.client()];
    held.iter_mut().for_each(|client| assert_eq!(served_by(client), "r0"));
    is_reset(proxy.client());
    assert_eq!(proxy.shed("listener_flows"), 1);
    drop(held);
    eventually("flows end", || proxy.snapshot().flows_open == 0);
    assert_eq!(served_by(&mut proxy.client()), "r0");
    assert_eq!(proxy.snapshot().flows_opened, 3, "who is turned away is no flow");
    proxy.finish();
}

#[test]
fn a_client_takes_so_many_flows_and_others_are_served_all_the_same() {
    let limits =
        ListenerLimits { flows_per_client: 2, new_flows_per_client_per_second: 4, ..Default::default() };
    let proxy = Proxy::limited(limits);
    let mut held: Vec<_> = (0..2).map(|_| proxy.client_from([127, 0, 0, 2])).collect();
    held.iter_mut().for_each(|client| assert_eq!(served_by(client), "r0"));
    is_reset(proxy.client_from([127, 0, 0, 2]));
    assert_eq!(served_by(&mut proxy.client_from([127, 0, 0, 3])), "r0");
    held.clear();
    eventually("flows end", || proxy.snapshot().flows_open == 0);
    // Two of its four of this second are left; then it has to wait for the next.
    let mut turned_away = 0;
    let deadline = Instant::now() + PATIENCE;
    for served in 0..6 {
        loop {
            let mut client = proxy.client_from([127, 0, 0, 2]);
            match client.read(&mut [0; 2]) {
                Ok(2) => break,
                result => assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionReset),
            }
            turned_away += 1;
            assert!(Instant::now() < deadline, "{served} served in {PATIENCE:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }
    assert_eq!((proxy.shed("client_flows") + proxy.shed("client_rate")) as i32, 1 + turned_away);
    assert!(proxy.shed("client_rate") > 0, "six flows at four a second, with two left");
    proxy.finish();
}

#[test]
fn a_listener_takes_so_many_new_flows_a_second() {
    let limits = ListenerLimits { new_flows_per_second: 5, ..Default::default() };
    let proxy = Proxy::limited(limits);
    let begin = Instant::now();
    let served = (0..40).filter(|_| matches!(proxy.client().read(&mut [0; 2]), Ok(2))).count();
    let at_most = 5.0 + 5.0 * begin.elapsed().as_secs_f64() + 1.0;
    assert!(served >= 5 && served as f64 <= at_most, "{served} served in {:?}", begin.elapsed());
    assert_eq!(proxy.shed("listener_rate"), 40 - served as u64);
    eventually("there is a token again", || matches!(proxy.client().read(&mut [0; 2]), Ok(2)));
    proxy.finish();
}

#[test]
fn a_pool_has_a_budget_over_its_resources() {
    let backends = [("r0", echo("r0")), ("r1", echo("r1"))];
    let knobs = PoolKnobs { flows_max: 3, ..PoolKnobs::default() };
    let proxy = Proxy::start(table(1, &backends, 0), knobs, |config| config.workers = 2);
    let mut held: Vec<_> = (0..3).map(|_| proxy.client()).collect();
    held.iter_mut().for_each(|client| _ = served_by(client));
    is_reset(proxy.client());
    assert_eq!(proxy.shed("pool_flows"), 1);
    assert_eq!(of(&proxy.snapshot().flows_closed, "shed"), 1);
    held.pop();
    eventually("its place is free", || proxy.snapshot().flows_open == 2);
    assert_eq!(served_by(&mut proxy.client()).len(), 2);
    drop(held);
    proxy.finish();
}

// --- Queue --------------------------------------------------------------------------------------------------------------

fn queue(length: u32, deadline: Duration) -> PoolKnobs {
    PoolKnobs { queue: Some(QueueKnobs { length, deadline }), ..PoolKnobs::default() }
}

#[test]
fn flows_wait_for_room_in_their_order() {
    let proxy = Proxy::start(table(1, &[("r0", echo("r0"))], 1), queue(3, PATIENCE), |_| {});
    let mut first = proxy.client();
    assert_eq!(served_by(&mut first), "r0");
    let mut waiting = Vec::new();
    for n in 1..=3_u64 {
        let mut client = proxy.client();
        client.write_all(&[b'0' + n as u8]).unwrap();
        eventually("it waits", || proxy.snapshot().flows_waiting == n);
        waiting.push(client);
    }
    is_reset(proxy.client());
    assert_eq!(proxy.shed("queue_full"), 1);
    for n in 1..=3 {
        drop(std::mem::replace(&mut first, waiting.remove(0)));
        assert_eq!(served_by(&mut first), "r0");
        let mut byte = [0; 1];
        first.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [b'0' + n], "with what it said while it waited");
        assert_eq!(proxy.snapshot().flows_waiting, u64::from(3 - n), "one place, one flow");
    }
    assert_eq!(proxy.snapshot().flows_queued, 3);
    drop(first);
    proxy.finish();
}

#[test]
fn a_flow_waits_no_longer_than_it_may() {
    let knobs = queue(3, Duration::from_millis(100));
    let proxy = Proxy::start(table(1, &[("r0", echo("r0"))], 1), knobs, |_| {});
    let mut first = proxy.client();
    assert_eq!(served_by(&mut first), "r0");
    let begin = Instant::now();
    is_reset(proxy.client());
    assert!(begin.elapsed() >= Duration::from_millis(99), "after {:?}", begin.elapsed());
    assert_eq!((proxy.shed("queue_deadline"), proxy.snapshot().flows_waiting), (1, 0));
    drop(first);
    proxy.finish();
}

#[test]
fn whoever_leaves_makes_room_for_those_behind() {
    let proxy = Proxy::start(table(1, &[("r0", echo("r0"))], 1), queue(2, PATIENCE), |_| {});
    let mut first = proxy.client();
    assert_eq!(served_by(&mut first), "r0");
    let gone = proxy.client();
    eventually("it waits", || proxy.snapshot().flows_waiting == 1);
    let reset = proxy.client();
    eventually("it waits", || proxy.snapshot().flows_waiting == 2);
    // One says that it has nothing to say, the other resets.
    gone.shutdown(Shutdown::Write).unwrap();
    eventually("it has left", || proxy.snapshot().flows_waiting == 1);
    assert_eq!(of(&proxy.snapshot().flows_closed, "client_left"), 1);
    SockRef::from(&reset).set_linger(Some(Duration::ZERO)).unwrap();
    drop(reset);
    eventually("it has left", || proxy.snapshot().flows_waiting == 0);
    let mut next = proxy.client();
    eventually("it waits", || proxy.snapshot().flows_waiting == 1);
    drop(first);
    assert_eq!(served_by(&mut next), "r0");
    drop((next, gone));
    proxy.finish();
}

/// One that has said more than the flow takes is not read any more, and is known to have left all the same.
#[test]
fn whoever_waits_held_back_and_resets_makes_room_too() {
    let proxy = Proxy::start(table(1, &[("r0", echo("r0"))], 1), queue(1, PATIENCE), |config| {
        config.listeners[0].tcp.options.receive_buffer = Some(64 * 1024);
    });
    let mut first = proxy.client();
    assert_eq!(served_by(&mut first), "r0");
    let mut eager = proxy.client();
    eager.set_nonblocking(true).unwrap();
    let mut last_taken = Instant::now();
    while last_taken.elapsed() < Duration::from_millis(200) {
        if eager.write(&[7; 64 * 1024]).is_ok() {
            last_taken = Instant::now();
        }
    }
    assert_eq!(proxy.snapshot().flows_waiting, 1);
    SockRef::from(&eager).set_linger(Some(Duration::ZERO)).unwrap();
    drop(eager);
    eventually("it has left", || proxy.snapshot().flows_waiting == 0);
    assert_eq!(of(&proxy.snapshot().flows_closed, "client_reset"), 1);
    drop(first);
    proxy.finish();
}

#[test]
fn room_in_a_new_table_or_at_another_worker_is_found() {
    let (one, two) = (("r0", echo("r0")), ("r1", echo("r1")));
    let knobs = PoolKnobs { flows_max: 4, ..queue(100, PATIENCE) };
    let proxy = Proxy::start(table(1, &[one], 1), knobs, |config| config.workers = 2);
    let mut first = proxy.client();
    assert_eq!(served_by(&mut first), "r0");
    // Enough that each worker has some waiting.
    let mut waiting: Vec<_> = (0..20).map(|_| proxy.client()).collect();
    eventually("they wait", || proxy.snapshot().flows_waiting == 20);
    // Both sleep; the new table has room for one at each of the two, and its facts are new.
    proxy.publisher.publish(table(2, &[one, two], 1));
    eventually("two are served", || proxy.snapshot().flows_waiting == 18);
    drop(first);
    // Each that is served ends, whichever worker it is of, and makes room for one of those that wait.
    let deadline = Instant::now() + PATIENCE;
    while !waiting.is_empty() {
        assert!(Instant::now() < deadline, "{} are left", waiting.len());
        waiting.retain_mut(|client| {
            client.set_nonblocking(true).unwrap();
            client.read(&mut [0; 2]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        });
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(proxy.shed("queue_deadline") + proxy.shed("queue_full"), 0);
    proxy.finish();
}

#[test]
fn waiting_flows_end_with_a_drain() {
    let proxy = Proxy::start(table(1, &[("r0", echo("r0"))], 1), queue(2, PATIENCE), |_| {});
    let mut first = proxy.client();
    assert_eq!(served_by(&mut first), "r0");
    let waiting = proxy.client();
    eventually("it waits", || proxy.snapshot().flows_waiting == 1);
    proxy.dataplane.stop();
    is_reset(waiting);
    proxy.finish();
}

// --- Affinity -----------------------------------------------------------------------------------------------------------

#[test]
fn a_client_is_kept_through_tables_and_restarts() {
    let all = [("r0", echo("r0")), ("r1", echo("r1")), ("r2", echo("r2"))];
    let knobs = PoolKnobs { affinity: Some(Duration::from_secs(3_600)), ..PoolKnobs::default() };
    let proxy = Proxy::start(table(1, &all, 0), knobs, |config| config.workers = 2);
    let of_client = |n: u8| served_by(&mut proxy.client_from([127, 0, 0, n]));
    let first: Vec<_> = (10..20).map(of_client).collect();
    assert!(
        all.iter().all(|(id, _)| first.iter().any(|name| name == id)),
        "the policy spreads them: {first:?}"
    );
    assert_eq!((10..20).map(of_client).collect::<Vec<_>>(), first);
    // Registered anew: other facts, another place. And one restarts on another port.
    let again = [all[2], ("r1", echo("r1")), all[0]];
    proxy.publisher.publish(table(2, &again, 0));
    assert_eq!((10..20).map(of_client).collect::<Vec<_>>(), first);
    // One leaves: its clients move, the others stay. It comes back: nobody moves.
    proxy.publisher.publish(table(3, &again[..2], 0));
    let moved: Vec<_> = (10..20).map(of_client).collect();
    for (now, before) in moved.iter().zip(&first) {
        assert!(if before == "r0" { now != "r0" } else { now == before }, "{first:?} {moved:?}");
    }
    proxy.publisher.publish(table(4, &again, 0));
    assert_eq!((10..20).map(of_client).collect::<Vec<_>>(), moved);
    let counts = proxy.snapshot().affinity;
    let left = first.iter().filter(|name| *name == "r0").count() as u64;
    assert_eq!((of(&counts, "new"), of(&counts, "moved"), of(&counts, "kept")), (10, left, 40 - left));
    assert!(proxy.view.decisions(1)[0].kept, "explain can tell");
    proxy.finish();
}

// --- Access log ---------------------------------------------------------------------------------------------------------

/// A folder that is removed.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("trimtab-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn logged(path: &Path, format: AccessLogFormat) -> Proxy {
    let table = table(1, &[("r0", echo("r0"))], 0);
    Proxy::start(table, PoolKnobs::default(), |config| {
        config.access_log = Some(AccessLogConfig { to: AccessLogTo::File(path.into()), format });
    })
}

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap_or_default().lines().map(ToOwned::to_owned).collect()
}

#[test]
fn a_flow_has_a_line_at_its_end() {
    let folder = Folder::new("access");
    let path = folder.0.join("access.log");
    let proxy = logged(&path, AccessLogFormat::Json);
    let mut client = proxy.client();
    served_by(&mut client);
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    let address = client.local_addr().unwrap();
    drop(client);
    eventually("a line", || lines(&path).len() == 1);
    let line = lines(&path).remove(0);
    for part in [
        format!("\"client\":\"{address}\""),
        format!("\"listener\":\"tcp://{}\",\"pool\":\"test\",\"route\":0", proxy.address),
        "\"resource\":\"r0\"".to_owned(),
        "\"policy\":\"round-robin\",\"affinity\":null,\"generation\":1".to_owned(),
        "\"retries\":0,\"bytes_to_backend\":5,\"bytes_to_client\":7,\"queue_seconds\":0.000000".to_owned(),
        "\"end\":\"ended\",\"shed\":null".to_owned(),
    ] {
        assert!(line.contains(&part), "{part} in {line}");
    }
    // Renamed under it: the next line is in a new file of that name.
    fs::rename(&path, folder.0.join("access.log.1")).unwrap();
    eventually("a line in a new file", || {
        served_by(&mut proxy.client());
        !lines(&path).is_empty()
    });
    let (before, view) = (lines(&folder.0.join("access.log.1")).len(), Arc::clone(&proxy.view));
    proxy.finish();
    let all = before.max(lines(&folder.0.join("access.log.1")).len()) + lines(&path).len();
    assert_eq!((view.engine().access_log_lost, view.engine().access_log_written), (0, all as u64));
}

#[test]
fn a_reader_that_does_not_read_stops_no_flow() {
    let folder = Folder::new("fifo");
    let path = folder.0.join("access.fifo");
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    // Nobody has it open at all, and it starts.
    let proxy = logged(&path, AccessLogFormat::Line);
    served_by(&mut proxy.client());
    // Somebody has, and reads nothing.
    let mut reader = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut slowest = Duration::ZERO;
    while proxy.view.engine().access_log_lost < 10 {
        assert!(Instant::now() < deadline, "what has no room is lost: {:?}", proxy.view.engine());
        let begin = Instant::now();
        served_by(&mut proxy.client());
        slowest = slowest.max(begin.elapsed());
    }
    assert!(slowest < PATIENCE / 4, "a flow waited for the log: {slowest:?}");
    // It reads again: lines come again, none of them torn, and one says how many are missing.
    let text = thread::spawn(move || {
        let mut text = Vec::new();
        let mut bytes = [0; 65_536];
        while !text.windows(6).any(|part| part == b" lost=") {
            let read = reader.read(&mut bytes).unwrap();
            text.extend_from_slice(&bytes[..read]);
        }
        String::from_utf8(text).unwrap()
    });
    let deadline = Instant::now() + PATIENCE;
    while !text.is_finished() {
        assert!(Instant::now() < deadline, "the loss is said");
        served_by(&mut proxy.client());
    }
    let text = text.join().unwrap();
    let whole = |line: &str| line.contains(" lost=") || (line.contains(" tcp ") && line.contains(" end="));
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    assert!(complete.lines().all(whole), "{complete}");
    proxy.finish();
}

#[test]
fn a_log_that_cannot_be_opened_is_an_error_with_a_hint() {
    let table = table(1, &[], 0);
    let listener =
        ListenerConfig::new((Ipv4Addr::LOCALHOST, 0).into(), "test".parse().unwrap(), Publisher::new(table));
    let mut config = Config::new(vec![listener]);
    config.workers = 1;
    let to = AccessLogTo::File("/nowhere/access.log".into());
    config.access_log = Some(AccessLogConfig { to, format: AccessLogFormat::Json });
    let error = dataplane::bind(config).unwrap().start().unwrap_err().to_string();
    assert!(error.contains("/nowhere/access.log") && error.contains("does its folder exist"), "{error}");
}

/// `/dev/full` is a disk without room (full(4)).
#[test]
fn a_full_disk_stops_no_flow() {
    let proxy = logged(Path::new("/dev/full"), AccessLogFormat::Json);
    for _ in 0..200 {
        served_by(&mut proxy.client());
    }
    assert_eq!(proxy.view.engine().access_log_written, 0);
    let begin = Instant::now();
    proxy.finish();
    assert!(begin.elapsed() < PATIENCE / 2, "the end does not wait for the log");
}
