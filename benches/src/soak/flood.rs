//! `soak flood`: connections as fast as they come, from many addresses, and SYNs from addresses that nobody has; first without
//! limits for each client, then with them. Who works with the database through the same listener meanwhile must not fail.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use e2e::{BalancerConfig, PgBench, Postgres};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout, timeout_at};

use super::order::reset;
use super::subject::{self, Subject};
use super::syn::SynFlood;
use super::verdict::Report;
use super::{SoakArguments, runtime};

/// Seconds of each flood.
const LENGTH: u64 = 15;
/// Addresses of the flood, each with so many connections on the go.
const ADDRESSES: u32 = 12;
const ON_THE_GO: u32 = 10;
/// Connections that an address holds without a word, beside.
const SILENT: usize = 150;
const SYNS_PER_SECOND: u32 = 5_000;
/// A server whose queue of connections overflows forgets some that its clients have, and answers nothing to them: without this the
/// kernel asks for a quarter of an hour.
const FORGOTTEN: &str = "[pool.tcp]\nuser_timeout = \"30s\"\n";
/// A connection that is not accepted in time is given up.
const PATIENCE: Duration = Duration::from_secs(2);
/// Of the limits: enough for anyone who works, and all of the flood's addresses together leave PostgreSQL (200 connections) room.
const LIMITS: &str = "[listener.limits]\nflows_per_client = 8\nnew_flows_per_client_per_second = 20\n";
/// The flood's addresses at their bound, and who works.
const FLOWS_MAX: u64 = ADDRESSES as u64 * 8 + 8;
/// Work on connections that stay, and work with a new connection for each transaction, at a pace that leaves the processor to
/// the flood.
const STAYS: [&str; 6] = ["-S", "-c4", "-j1", "-R200", "--max-tries=1", "-T"];
const COMES_AGAIN: [&str; 7] = ["-S", "-C", "-c2", "-j1", "-R10", "--max-tries=1", "-T"];
/// With limits: PostgreSQL, which starts a process for each of those that were let through, needs some of it.
const RECOVERY: Duration = Duration::from_secs(2);
/// Without: it works off all that came, and nobody can help it.
const WORKED_OFF: Duration = Duration::from_secs(180);
/// A client's address that no flood comes from.
const WORKER: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// What the flood did.
#[derive(Debug, Default, Clone, Copy)]
struct Flooded {
    connections: u64,
    refused: u64,
    syns: u64,
}

/// Runs it, in a network of its own.
pub(super) fn run(arguments: &SoakArguments, say: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let mut report = Report::new("flood", arguments.engine.clone());
    let length = Duration::from_secs(arguments.seconds.unwrap_or(LENGTH));
    let began = Instant::now();
    let postgres = Postgres::start();
    for limits in [false, true] {
        flood(limits, &postgres, arguments, length, &mut report)?;
        let what = if limits { "with" } else { "without" };
        say(&format!("{what} limits: done after {:.0} s", began.elapsed().as_secs_f64()));
    }
    report.took(began.elapsed().as_secs_f64());
    Ok(report)
}

fn flood(
    limits: bool,
    postgres: &Postgres,
    arguments: &SoakArguments,
    length: Duration,
    report: &mut Report,
) -> anyhow::Result<()> {
    let name = if limits { "with limits" } else { "without limits" };
    let further = if limits { LIMITS.to_owned() } else { String::new() };
    let mut config = BalancerConfig { further, ..subject::config(&arguments.engine, arguments.workers, "") };
    config.pool += FORGOTTEN;
    let mut subject = Subject::start(config, &[postgres.address()]);
    let target = subject.listener();
    let at_rest = subject.rest();
    // A second before the flood and one after it.
    let seconds = (length + Duration::from_secs(2)).as_secs().to_string();
    let bench = |arguments: &[&str]| PgBench::start(target, &[arguments, &[&seconds]].concat());
    let stays = bench(&STAYS);
    // Without limits the flood may take every flow there is, and who comes then is refused like the flood.
    let comes_again = limits.then(|| bench(&COMES_AGAIN));
    std::thread::sleep(Duration::from_secs(1));

    let watch = subject.watch(Duration::from_secs(1));
    let syns = SynFlood::start(target, SYNS_PER_SECOND)?;
    let runtime = runtime()?;
    let mut flooded = runtime.block_on(pour(target, length));
    flooded.syns = syns.end()?;
    let served = runtime.block_on(until_served(target));
    let samples = watch.end();

    report.figure(format!("{name}: connections made"), flooded.connections as f64);
    report.figure(format!("{name}: connections not made, or reset at once"), flooded.refused as f64);
    report.figure(format!("{name}: SYNs without anybody"), flooded.syns as f64);
    let limit = length + e2e::PATIENCE;
    let mut judge = |what: &str, bench: PgBench| match bench.finish(limit) {
        Ok(transactions) => {
            report.check(
                &format!("{name}: {what}"),
                format!("{transactions} transactions, none failed"),
                "none fails",
                transactions > 0,
            );
        }
        Err(said) => {
            report.check(&format!("{name}: {what}"), "failed", "none fails", false);
            report.faults([format!("{name}: pgbench: {said}")]);
        }
    };
    judge("pgbench on connections that stay", stays);
    if let Some(bench) = comes_again {
        judge("pgbench with a new connection for each transaction", bench);
    }
    let sheds = subject.metrics().sum("trimtab_sheds_total", &[]);
    report.figure(format!("{name}: flows refused at a bound, by its own count"), sheds);
    if limits {
        report.check(&format!("{name}: the flood is refused"), sheds, "> 0", sheds > 0.0);
        let most = samples.iter().map(|sample| sample.flows_open).max().unwrap_or(0);
        let limit = format!("≤ {FLOWS_MAX}");
        report.check(&format!("{name}: flows open, most"), most, limit, most <= FLOWS_MAX);
    }
    match served {
        Some(took) if !limits => {
            report.figure(format!("{name}: until PostgreSQL answers somebody new, s"), took.as_secs_f64());
        }
        Some(took) => report.at_most(
            &format!("{name}: until somebody new is served, after the flood"),
            took.as_secs_f64(),
            RECOVERY.as_secs_f64(),
            "s",
        ),
        None => report.check(
            &format!("{name}: somebody new is served after the flood"),
            "nobody",
            "served",
            false,
        ),
    }
    let busy = samples.iter().map(|sample| sample.busy).sum::<f64>() / samples.len().max(1) as f64;
    report.figure(format!("{name}: trimtab, part of a processor"), busy);
    report.equal(
        &format!("{name}: most iou-wrk threads"),
        samples.iter().map(|sample| sample.io_workers).max().unwrap_or(0),
        0,
    );
    subject.judge_rest_within(WORKED_OFF, report, at_rest);
    report.samples(samples);
    Ok(())
}

/// Connections as fast as they come.
async fn pour(target: SocketAddr, length: Duration) -> Flooded {
    let end = tokio::time::Instant::now() + length;
    let mut pouring = JoinSet::new();
    for address in 0..ADDRESSES {
        let source = IpAddr::V4(Ipv4Addr::new(127, 66, 0, address as u8 + 1));
        pouring.spawn(silent(source, target, end));
        for n in 0..ON_THE_GO {
            pouring.spawn(come_and_go(source, target, n % 2 == 0, end));
        }
    }
    let mut sum = Flooded::default();
    while let Some(one) = pouring.join_next().await {
        let one = one.expect("a client does not panic");
        sum.connections += one.connections;
        sum.refused += one.refused;
    }
    sum
}

/// Connects, and leaves at once: by FIN or by RST.
async fn come_and_go(source: IpAddr, target: SocketAddr, resets: bool, end: tokio::time::Instant) -> Flooded {
    let mut flooded = Flooded::default();
    while tokio::time::Instant::now() < end {
        match timeout(PATIENCE, connect(source, target)).await {
            Ok(Ok(stream)) => {
                flooded.connections += 1;
                if resets {
                    reset(stream);
                }
            }
            _ => {
                flooded.refused += 1;
                sleep(Duration::from_millis(1)).await;
            }
        }
    }
    flooded
}

/// Connects, and stays without a word; who is put out comes again.
async fn silent(source: IpAddr, target: SocketAddr, end: tokio::time::Instant) -> Flooded {
    let mut flooded = Flooded::default();
    let mut staying: Vec<TcpStream> = Vec::new();
    while tokio::time::Instant::now() < end {
        staying.retain(|stream| matches!(stream.try_read(&mut [0; 1]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock));
        if staying.len() >= SILENT {
            sleep(Duration::from_millis(100)).await;
            continue;
        }
        match timeout_at(end, connect(source, target)).await {
            Ok(Ok(stream)) => {
                flooded.connections += 1;
                staying.push(stream);
                sleep(Duration::from_millis(5)).await;
            }
            _ => {
                flooded.refused += 1;
                sleep(Duration::from_millis(5)).await;
            }
        }
    }
    flooded
}

async fn connect(source: IpAddr, target: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(source, 0))?;
    socket.connect(target).await
}

/// How long until PostgreSQL answers a new client; `None`: it does not in good time. What is asked is whether it speaks TLS,
/// which it answers with one byte.
async fn until_served(target: SocketAddr) -> Option<Duration> {
    let began = Instant::now();
    let trying = async {
        loop {
            let attempt = async {
                let mut stream = connect(IpAddr::V4(WORKER), target).await?;
                // SSLRequest: its length, then 80877103.
                tokio::io::AsyncWriteExt::write_all(&mut stream, &[0, 0, 0, 8, 4, 210, 22, 47]).await?;
                stream.read_exact(&mut [0; 1]).await
            };
            if matches!(timeout(Duration::from_millis(500), attempt).await, Ok(Ok(_))) {
                return began.elapsed();
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(WORKED_OFF, trying).await.ok()
}
