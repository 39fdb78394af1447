//! `soak udp-flows`: a hundred thousand clients, each with a flow of its own, in and out of a table that is smaller; and UDP as
//! other scenarios need it.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use e2e::{BalancerConfig, POOL, fill_block, first_wrong};
use tokio::time::timeout;

use super::backend::{Backend, Ledger};
use super::order::{Fault, Order};
use super::subject::{self, Subject};
use super::verdict::Report;
use super::{SoakArguments, runtime};

/// Clients, each with an address and a port that no other has.
const CLIENTS: u32 = 100_000;
/// New ones a second.
const PER_SECOND: u32 = 4_000;
/// Begun together; then their answers are awaited.
const AT_ONCE: u32 = 400;
/// Sockets of clients that are kept open: an answer that comes late must find its client, not a closed port.
const KEPT: usize = 6_000;
/// Of the listener. So many clients are new within it that the table cannot hold them all.
const IDLE: Duration = Duration::from_secs(3);
const FLOWS_MAX: u64 = 8_000;
/// Flows that are there before and stay, and how often each says something.
const ESTABLISHED: u16 = 50;
const ESTABLISHED_EVERY: Duration = Duration::from_millis(500);
/// Of a datagram.
const BYTES: usize = 64;
/// How long an answer may take; longer for those that must not be lost.
const ANSWER: Duration = Duration::from_millis(60);
const PATIENCE: Duration = Duration::from_secs(2);
/// Datagrams may be lost where a receive buffer is full: of a thousand, so many.
const LOST_PER_MILLE: f64 = 2.0;

/// A listener for UDP beside the one for TCP, with these lines; gives its address.
pub(super) fn listen(config: &mut BalancerConfig, lines: &str) -> SocketAddr {
    let address = e2e::loopback();
    config.further += &format!(
        "[[listener]]\nbind = \"udp://{address}\"\npool = \"{POOL}\"\n[listener.udp]\nidle_timeout = \"{}s\"\n{lines}",
        IDLE.as_secs()
    );
    address
}

/// Sends every datagram back, for as long as the runtime lives.
///
/// # Panics
/// When the address is taken.
pub(super) fn echo(address: SocketAddr) {
    let bind = || {
        let socket = UdpSocket::bind(address)?;
        // As much as the system lets it have.
        socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20)?;
        socket.set_nonblocking(true)?;
        tokio::net::UdpSocket::from_std(socket)
    };
    let socket = bind().unwrap_or_else(|error: io::Error| panic!("a backend at udp://{address}: {error}"));
    tokio::spawn(async move {
        let mut datagram = vec![0; 65_536];
        loop {
            // An error is of a datagram that did not arrive: its sender is gone.
            if let Ok((bytes, from)) = socket.recv_from(&mut datagram).await {
                let _ = socket.send_to(&datagram[..bytes], from).await;
            }
        }
    });
}

/// A client's exchanges: each datagram comes back as it was, at the second try at the latest. Gives how many bytes went.
pub(super) async fn exchange(target: SocketAddr, order: &Order) -> Result<u64, Fault> {
    let socket = async {
        let socket = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        socket.connect(target).await?;
        Ok::<_, io::Error>(socket)
    };
    let socket = socket.await.map_err(Fault::Connect)?;
    let mut datagram = vec![0; order.up as usize];
    for round in 0..u64::from(order.rounds) {
        let at = round * order.up;
        fill_block(&mut datagram, order.up_seed(), at);
        let mut answered = false;
        for _ in 0..2 {
            let asked = async {
                socket.send(&datagram).await?;
                receive(&socket, order, at).await
            };
            match timeout(PATIENCE, asked).await {
                Ok(Ok(())) => answered = true,
                Ok(Err(error)) => return Err(Fault::Broke { at, error }),
                Err(_) => continue,
            }
            break;
        }
        if !answered {
            return Err(Fault::TooLong);
        }
    }
    Ok(u64::from(order.rounds) * order.up * 2)
}

/// Waits for what belongs at `at`; an answer to an earlier try of an earlier datagram may come first.
async fn receive(socket: &tokio::net::UdpSocket, order: &Order, at: u64) -> io::Result<()> {
    let mut answer = vec![0; order.up as usize + 1];
    loop {
        let bytes = socket.recv(&mut answer).await?;
        if bytes as u64 == order.up && first_wrong(&answer[..bytes], order.up_seed(), at).is_none() {
            return Ok(());
        }
    }
}

/// What became of the clients.
#[derive(Debug, Default)]
struct Poured {
    answered: u64,
    unanswered: u64,
    wrong: u64,
}

impl Poured {
    fn count(&mut self, answer: Option<bool>) {
        match answer {
            Some(true) => self.answered += 1,
            Some(false) => self.wrong += 1,
            None => self.unanswered += 1,
        }
    }
}

/// Runs it.
pub(super) fn run(arguments: &SoakArguments, say: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let mut report = Report::new("udp-flows", arguments.engine.clone());
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let backend = Backend::start(e2e::loopback(), Arc::new(Ledger::default()));
    let mut config = subject::config(&arguments.engine, arguments.workers, "");
    let target = listen(&mut config, &format!("flows_max = {FLOWS_MAX}\n"));
    let mut subject = Subject::start(config, &[backend.address()]);
    let at_rest = subject.rest();
    let before = subject.sample();

    let dropped_before = kernel_drops();
    let began = Instant::now();
    let watch = subject.watch(Duration::from_secs(1));
    let established = Established::start(target)?;
    let poured = pour(target, CLIENTS)?;
    say(&format!("{CLIENTS} clients came after {:.0} s", began.elapsed().as_secs_f64()));
    let (asked, lost) = established.end();
    let samples = watch.end();
    report.took(began.elapsed().as_secs_f64());

    let sheds = subject.metrics().sum("trimtab_sheds_total", &[]);
    report.figure("clients answered", poured.answered as f64);
    report.figure("flows refused at the bound, by its own count", sheds);
    report.equal("answers that are wrong", poured.wrong, 0);
    let most = samples.iter().map(|sample| sample.flows_open).max().unwrap_or(0);
    report.check("flows open, most", most, format!("≤ {FLOWS_MAX}"), most <= FLOWS_MAX);
    report.check("the table was full", most, format!("≥ {}", FLOWS_MAX * 9 / 10), most >= FLOWS_MAX * 9 / 10);
    report.check("flows refused, and counted", sheds, "> 0", sheds > 0.0);
    let overflowed = kernel_drops() - dropped_before;
    report.figure("datagrams for which a socket had no room, all of this machine's", overflowed);
    report.figure(
        "datagrams that trimtab dropped, by its own count",
        subject.metrics().sum("trimtab_udp_dropped_total", &[]),
    );
    let unexplained = (poured.unanswered as f64 - sheds - overflowed).max(0.0);
    report.at_most(
        "clients neither answered, nor refused, nor dropped by the kernel",
        1_000.0 * unexplained / f64::from(CLIENTS),
        LOST_PER_MILLE,
        "‰",
    );
    report.figure("datagrams of established flows", asked as f64);
    report.at_most("of them, lost", 1_000.0 * lost as f64 / asked.max(1) as f64, LOST_PER_MILLE, "‰");
    let io_workers = samples.iter().map(|sample| sample.io_workers).max().unwrap_or(0);
    report.equal("most iou-wrk threads", io_workers, 0);
    let ended = subject.judge_rest(&mut report, at_rest);
    report.figure("memory before, MiB", before.private_bytes as f64 / 1_048_576.0);
    report.figure("memory after, MiB", ended.private_bytes as f64 / 1_048_576.0);
    let most = samples.iter().map(|sample| sample.private_bytes).max().unwrap_or(0);
    report.figure("memory, most, MiB", most as f64 / 1_048_576.0);
    report.samples(samples);
    Ok(report)
}

/// So many clients, at a steady rate, each from an address and port of its own.
fn pour(target: SocketAddr, clients: u32) -> anyhow::Result<Poured> {
    let mut poured = Poured::default();
    let mut kept: VecDeque<(u32, UdpSocket, bool)> = VecDeque::new();
    let late = |kept: &mut VecDeque<(u32, UdpSocket, bool)>, most: usize, poured: &mut Poured| {
        for (n, socket, answered) in kept.drain(..kept.len().saturating_sub(most)) {
            if !answered {
                poured.count(answer(&socket, n.into()));
            }
        }
    };
    let (rest, mut due) = (Duration::from_secs(1) * AT_ONCE / PER_SECOND, Instant::now());
    for first in (0..clients).step_by(AT_ONCE as usize) {
        let numbers = first..(first + AT_ONCE).min(clients);
        let mut waiting = Vec::with_capacity(AT_ONCE as usize);
        for n in numbers {
            let [_, a, b, c] = n.to_be_bytes();
            let source = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 80 + a, b, c)), 0);
            let socket = UdpSocket::bind(source).context("a client's socket")?;
            socket.connect(target)?;
            socket.set_nonblocking(true)?;
            socket.send(&datagram(n.into()))?;
            waiting.push((n, socket));
        }
        std::thread::sleep(ANSWER);
        for (n, socket) in waiting {
            let answer = answer(&socket, n.into());
            if answer.is_some() {
                poured.count(answer);
            }
            kept.push_back((n, socket, answer.is_some()));
        }
        late(&mut kept, KEPT, &mut poured);
        due += rest;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    std::thread::sleep(PATIENCE);
    late(&mut kept, 0, &mut poured);
    Ok(poured)
}

/// Flows that say something now and then, on a thread of their own.
struct Established {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, u64)>,
}

impl Established {
    fn start(target: SocketAddr) -> io::Result<Self> {
        let open = |_| {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            socket.connect(target)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok::<_, io::Error>(socket)
        };
        let sockets = (0..ESTABLISHED).map(open).collect::<io::Result<Vec<_>>>()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Ok(Self { stop, thread: std::thread::spawn(move || talk(&sockets, &stopped)) })
    }

    /// Ends them; gives how many datagrams were sent, and how many of them were not answered.
    fn end(self) -> (u64, u64) {
        self.stop.store(true, Relaxed);
        self.thread.join().expect("they do not panic")
    }
}

fn talk(sockets: &[UdpSocket], stopped: &AtomicBool) -> (u64, u64) {
    let (mut asked, mut lost) = (0, 0);
    while !stopped.load(Relaxed) {
        let next = Instant::now() + ESTABLISHED_EVERY;
        for socket in sockets {
            asked += 1;
            let sent = socket.send(&datagram(asked));
            lost += u64::from(sent.is_err() || answer(socket, asked) != Some(true));
        }
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    (asked, lost)
}

/// Datagrams that the kernel dropped because a receive buffer was full (`RcvbufErrors` of /proc/net/snmp).
fn kernel_drops() -> f64 {
    let text = std::fs::read_to_string("/proc/net/snmp").unwrap_or_default();
    let mut rows = text.lines().filter(|line| line.starts_with("Udp:"));
    let (Some(names), Some(values)) = (rows.next(), rows.next()) else { return 0.0 };
    let place = names.split(' ').position(|name| name == "RcvbufErrors");
    place.and_then(|place| values.split(' ').nth(place)?.parse().ok()).unwrap_or(0.0)
}

fn datagram(n: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    fill_block(&mut bytes, n, 0);
    bytes
}

/// Whether the answer is right; `None`: there is none.
fn answer(socket: &UdpSocket, n: u64) -> Option<bool> {
    let mut bytes = [0; BYTES + 1];
    let received = socket.recv(&mut bytes).ok()?;
    Some(received == BYTES && first_wrong(&bytes[..BYTES], n, 0).is_none())
}
