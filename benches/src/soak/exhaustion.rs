//! `soak exhaustion`: no descriptor is left, then no local port; each time, what is open goes on, nothing spins, and soon after
//! there is something again, new flows are served.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Resource, Rlimit};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::time::{sleep, timeout};

use super::backend::{Backend, Ledger};
use super::client::{self, Behaviour};
use super::order::{Fault, Manner, Order, Pace, reset};
use super::ping::Pings;
use super::subject::{self, Subject};
use super::verdict::Report;
use super::{SoakArguments, namespace, ping, runtime};

/// Seconds without.
const LENGTH: u64 = 8;
/// Clients that come and stay: more than there is room for.
const HOLDERS: u64 = 600;
/// Room that is left when the limit of descriptors is lowered.
const DESCRIPTORS_LEFT: u64 = 200;
/// Local ports while they are scarce.
const PORTS: &str = "40000 40199";
/// As the kernel has it otherwise.
const PORTS_USUAL: &str = "32768 60999";
/// Where clients come from.
const CLIENT_ADDRESSES: u64 = 16;
const CLIENT_PORTS: std::ops::Range<u16> = 10_000..30_000;
/// Clients that come while nothing is left, one after the other.
const ATTEMPT_EVERY: Duration = Duration::from_millis(50);
/// Of a processor, while nothing is left: a loop that tried again and again would use all of it.
const BUSY_MAX: f64 = 15.0;
/// Until somebody new is served.
const RECOVERY: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);

/// What runs out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Descriptors,
    /// Holders end by a reset, or in good order.
    Ports {
        orderly: bool,
    },
}

impl Want {
    const ALL: [Self; 3] = [Self::Descriptors, Self::Ports { orderly: false }, Self::Ports { orderly: true }];

    fn name(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Ports { orderly: false } => "ports, reset",
            Self::Ports { orderly: true } => "ports, closed",
        }
    }

    /// As the sheds are labelled.
    fn reason(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Ports { .. } => "ports",
        }
    }
}

/// Runs it, in a network of its own.
pub(super) fn run(arguments: &SoakArguments, say: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let mut report = Report::new("exhaustion", arguments.engine.clone());
    let length = Duration::from_secs(arguments.seconds.unwrap_or(LENGTH));
    let began = Instant::now();
    for want in Want::ALL {
        exhaust(want, arguments, length, &mut report)?;
        say(&format!("{}: done after {:.0} s", want.name(), began.elapsed().as_secs_f64()));
    }
    report.took(began.elapsed().as_secs_f64());
    Ok(report)
}

fn exhaust(
    want: Want,
    arguments: &SoakArguments,
    length: Duration,
    report: &mut Report,
) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let ledger = Arc::new(Ledger::default());
    let _inside = runtime.enter();
    let backend = Backend::start(e2e::loopback(), Arc::clone(&ledger));
    let config = subject::config(&arguments.engine, arguments.workers, "");
    let mut subject = Subject::start(config, &[backend.address()]);
    let target = subject.listener();
    runtime.block_on(served(target, 1)).map_err(|fault| anyhow::anyhow!("before anything: {fault}"))?;
    let at_rest = subject.rest();
    let before = subject.metrics().sum("trimtab_sheds_total", &[("reason", want.reason())]);

    let pid = subject.pid();
    let outcome = without(&runtime, want, target, pid, length);
    // Also after a failure: what follows in this network needs ports.
    namespace::set("net.ipv4.ip_local_port_range", PORTS_USUAL)?;
    let Found { pings, busy, refused, recovery, held } = outcome?;

    let name = want.name();
    let sheds = subject.metrics().sum("trimtab_sheds_total", &[("reason", want.reason())]) - before;
    report.figure(format!("{name}: clients that came while there was something left"), held as f64);
    report.figure(format!("{name}: clients refused meanwhile"), refused as f64);
    report.check(
        &format!("{name}: flows refused for it, and counted"),
        sheds,
        "> 0",
        sheds > 0.0 || want == Want::Descriptors && refused > 0,
    );
    report.at_most(&format!("{name}: processor meanwhile"), busy * 100.0, BUSY_MAX, "%");
    report.figure(format!("{name}: p99 of pings meanwhile, ms"), pings.millis(0.99));
    report.equal(&format!("{name}: open flows that were hurt"), pings.faults.len(), 0);
    report.faults(pings.faults.iter().map(|fault| format!("{name}: ping: {fault}")));
    match recovery {
        Some(took) => report.at_most(
            &format!("{name}: until somebody new is served"),
            took.as_secs_f64(),
            RECOVERY.as_secs_f64(),
            "s",
        ),
        None => report.check(&format!("{name}: until somebody new is served"), "never", "served", false),
    }
    report.equal(&format!("{name}: wrong bytes"), ledger.tally().corrupt, 0);
    let ended = subject.judge_rest(report, at_rest);
    report.equal(&format!("{name}: iou-wrk threads"), ended.io_workers, 0);
    Ok(())
}

/// What happened while there was nothing left, and after.
struct Found {
    pings: Pings,
    busy: f64,
    refused: usize,
    held: usize,
    /// `None`: nobody was served.
    recovery: Option<Duration>,
}

fn without(
    runtime: &Runtime,
    want: Want,
    target: SocketAddr,
    pid: u32,
    length: Duration,
) -> anyhow::Result<Found> {
    runtime.block_on(async {
        let pinging = tokio::spawn(ping::ping(target, length + Duration::from_secs(2)));
        sleep(Duration::from_secs(1)).await;
        match want {
            Want::Descriptors => lower_descriptors(pid)?,
            Want::Ports { .. } => namespace::set("net.ipv4.ip_local_port_range", PORTS)?,
        }
        let mut holders = Vec::new();
        for id in 0..HOLDERS {
            holders.extend(hold(target, id).await.ok());
        }
        // Those for whom nothing was left are reset by now, or wait in the kernel's queue.
        sleep(Duration::from_millis(200)).await;
        let held = holders.iter().filter(|holder| !is_over(holder)).count();
        let (used, from) = (subject::cpu_time(pid), Instant::now());
        let mut refused = 0;
        let mut id = HOLDERS;
        while from.elapsed() < length {
            id += 1;
            let attempt = timeout(ATTEMPT_EVERY, exchange(target, id)).await;
            refused += usize::from(!matches!(attempt, Ok(Ok(_))));
            sleep(ATTEMPT_EVERY).await;
        }
        let busy = subject::cpu_time(pid).saturating_sub(used).as_secs_f64() / from.elapsed().as_secs_f64();
        let freed = Instant::now();
        for holder in holders {
            match want {
                Want::Ports { orderly: true } => drop(holder),
                _ => reset(holder),
            }
        }
        let recovery = served(target, id + 1).await.ok().map(|()| freed.elapsed());
        let pings = pinging.await.context("pings")?;
        Ok(Found { pings, busy, refused, held, recovery })
    })
}

/// Leaves a running process room for a few more.
fn lower_descriptors(pid: u32) -> anyhow::Result<()> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).context("its descriptors")?.count() as u64;
    let pid = Pid::from_raw(pid as i32).context("a process id")?;
    let limit = Rlimit { current: Some(open + DESCRIPTORS_LEFT), maximum: Some(open + DESCRIPTORS_LEFT) };
    rustix::process::prlimit(Some(pid), Resource::Nofile, limit).context("lowering its RLIMIT_NOFILE")?;
    Ok(())
}

/// From ports that are none of those that get scarce.
async fn connect(target: SocketAddr, id: u64) -> Result<TcpStream, Fault> {
    let connecting = async {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        let host = (id % CLIENT_ADDRESSES) as u8 + 1;
        let port = CLIENT_PORTS.start + (id / CLIENT_ADDRESSES % CLIENT_PORTS.len() as u64) as u16;
        socket.bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 7, 0, host)), port))?;
        socket.connect(target).await
    };
    connecting.await.map_err(Fault::Connect)
}

/// A client that comes, says what it wants, and stays.
async fn hold(target: SocketAddr, id: u64) -> Result<TcpStream, Fault> {
    let stream = connect(target, id).await?;
    let order = Order { id, manner: Manner::AnswerAfterFin, up: 0, down: 0, rounds: 1, pace: Pace::FREE };
    client::begin(&stream, &order).await?;
    Ok(stream)
}

async fn exchange(target: SocketAddr, id: u64) -> Result<u64, Fault> {
    let stream = connect(target, id).await?;
    let order = Order { id, manner: Manner::Exchange, up: 64, down: 64, rounds: 1, pace: Pace::FREE };
    client::perform(stream, &order, &Behaviour::PLAIN).await
}

/// Tries until a whole exchange succeeds.
async fn served(target: SocketAddr, first_id: u64) -> Result<(), Fault> {
    let trying = async {
        for id in first_id.. {
            if let Ok(Ok(_)) = timeout(Duration::from_millis(500), exchange(target, id)).await {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, trying).await.map_err(|_| Fault::TooLong)
}

/// Whether the other side has ended it.
fn is_over(stream: &TcpStream) -> bool {
    !matches!(stream.try_read(&mut [0; 1]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}
