//! `soak slow-readers`: thousands of flows that are written to as fast as they are let, and read at a few bytes a second.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::backend::{Backend, Ledger, Mood, fin};
use super::client::{self, Behaviour};
use super::order::{Fault, Manner, Order, Pace, receive, receive_end, reset_when_closed, send};
use super::subject::{self, Sample, Subject};
use super::verdict::Report;
use super::{SoakArguments, ping, runtime};

const FLOWS: u32 = 5_000;
/// A few bytes a second.
const SLOW: Pace = Pace { at_once: 4, pause_ms: 1_000 };
/// As whoever has so many of them should have it: what the kernel tunes grows to megabytes for each, and all sockets of a
/// machine share what `net.ipv4.tcp_mem` allows.
const BUFFERS: &str = "send_buffer = 65536\nreceive_buffer = 65536\n";
/// More than all buffers on the way hold, so that every writer is held back.
const BYTES: u64 = 64 << 20;
/// Flows that read what is on its way in the end: all of it must be right. Of so many flows, one.
const READ_OUT_OF: u64 = 50;
/// What those have on its way; less than the others, as it is read in the end.
const READ_OUT_BYTES: u64 = 4 << 20;
/// Opened at once.
const AT_ONCE: u64 = 100;
/// Alone, before there are slow readers.
const ALONE: Duration = Duration::from_secs(5);
const KIBI: f64 = 1_024.0;
const MEBI: f64 = 1_048_576.0;
/// What blocked flows may hold (docs/decisions/0002): so much for each worker, and a buffer for each half that is held back.
const SHARED_BYTES: f64 = 16.0 * MEBI;
const BUFFER_BYTES: f64 = 16.5 * KIBI;
/// Beside buffers, for each flow.
const FLOW_BYTES: f64 = 2.0 * KIBI;
/// The 99th percentile of others' pings may grow so many times, or up to this: a processor that 5,000 writers keep busy is not
/// as prompt as an idle one.
const PING_TIMES: f64 = 10.0;
const PING_MILLIS: f64 = 50.0;
const END_PATIENCE: Duration = Duration::from_secs(60);
/// Until all buffers on the way are full: then this much a second is what 5,000 readers take, with the windows they open.
const HELD_BACK_PATIENCE: Duration = Duration::from_secs(60);
const STILL_BYTES: f64 = 4.0 * MEBI;
/// When clients have reset their connections, or gone, their flows end within so long: bytes that came before a reset may take 2 s
/// to reach who reads slowly, and the rest is for a machine that has thousands to end at once.
const NOTICED: Duration = Duration::from_secs(10);

/// Buffers that a worker has always, and how long it may take to give the others back (512 every 5 s).
const FEW_BUFFERS: u64 = 3 * 64;
const GIVEN_BACK: Duration = Duration::from_secs(120);

/// Runs it.
pub(super) fn run(arguments: &SoakArguments, say: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let mut report = Report::new("slow-readers", arguments.engine.clone());
    let length = Duration::from_secs(arguments.seconds.unwrap_or(60));
    let flows = u64::from(arguments.flows.unwrap_or(FLOWS));
    let runtime = runtime()?;
    let ledger = Arc::new(Ledger::default());
    let _inside = runtime.enter();
    let backend = Backend::start_small(e2e::loopback(), Arc::clone(&ledger));
    let mut config = subject::config(&arguments.engine, arguments.workers, "");
    config.pool += &format!("[pool.tcp]\n{BUFFERS}");
    config.further += &format!("[listener.tcp]\n{BUFFERS}");
    let mut subject = Subject::start(config, &[backend.address()]);
    let target = subject.listener();

    let alone = runtime.block_on(ping::ping(target, ALONE));
    let (at_rest, before) = (subject.rest(), subject.sample());
    let kernel_before = kernel_bytes();
    let began = Instant::now();
    let watch = subject.watch((length / 30).max(Duration::from_secs(1)));
    let mut slow = JoinSet::new();
    let (over, is_over) = watch::channel(false);
    let opened = runtime.block_on(open(&mut slow, target, flows, &is_over));
    say(&format!("{opened} flows are open after {:.1} s", began.elapsed().as_secs_f64()));
    let held_back = until_held_back(&subject);
    say(&format!("their writers are held back after {:.1} s", began.elapsed().as_secs_f64()));
    let beside = runtime.block_on(ping::ping(target, length));
    let (during, kernel) = (subject.sample(), kernel_bytes());
    over.send_replace(true);
    let faults = runtime.block_on(finish(&mut slow));
    let samples = watch.end();
    // Half of them were writers that nobody had read from for long, and their readers go on as slowly as before.
    let noticed = until_noticed(&mut subject);
    backend.set(Mood::Crash);
    report.took(began.elapsed().as_secs_f64());

    let most = samples.iter().map(|sample| sample.pss_bytes).max().unwrap_or(0) as f64;
    let limit = before.pss_bytes as f64
        + f64::from(arguments.workers) * SHARED_BYTES
        + flows as f64 * (BUFFER_BYTES + FLOW_BYTES);
    report.equal("writers are held back", held_back, true);
    report.at_most("until all clients' ends were noticed", noticed.as_secs_f64(), NOTICED.as_secs_f64(), "s");
    report.at_least("flows open at once", during.flows_open as f64, flows as f64, "");
    report.at_most("memory, most (PSS)", most / MEBI, limit / MEBI, "MiB");
    report.figure("memory before, MiB", before.pss_bytes as f64 / MEBI);
    report.figure("memory for each slow flow, KiB", (most - before.pss_bytes as f64) / flows as f64 / KIBI);
    report.figure("kernel's memory for sockets, all of this machine's, MiB", (kernel - kernel_before) / MEBI);
    for (when, pings) in [("alone", &alone), ("beside", &beside)] {
        report.figure(format!("ping {when}: p50, ms"), pings.millis(0.5));
        report.figure(format!("ping {when}: p99, ms"), pings.millis(0.99));
        report.figure(format!("ping {when}: most, ms"), pings.millis(1.0));
        report.equal(&format!("pings {when} that failed"), pings.faults.len(), 0);
        report.faults(pings.faults.iter().map(|fault| format!("ping {when}: {fault}")));
    }
    let most_millis = (alone.millis(0.99) * PING_TIMES).max(PING_MILLIS);
    report.at_most("p99 of pings beside them", beside.millis(0.99), most_millis, "ms");
    let busy = samples.iter().map(|sample| sample.busy).sum::<f64>() / samples.len().max(1) as f64;
    report.figure("trimtab, part of a processor", busy);
    let io_workers = samples.iter().map(|sample| sample.io_workers).max().unwrap_or(0);
    report.equal("most iou-wrk threads", io_workers, 0);
    report.equal("flows with a fault", faults.len(), 0);
    report.faults(faults.iter().take(20).cloned());
    let tally = ledger.tally();
    report.equal("streams that backends found wrong", tally.corrupt, 0);
    report.faults(tally.faults);
    subject.judge_rest(&mut report, at_rest);
    let left = until_given_back(&mut subject);
    report.figure("memory at the end, MiB", left.pss_bytes as f64 / MEBI);
    // What tokio-uring gave to the kernel comes back as bytes come, and none come any more.
    if arguments.engine == "tokio-uring" {
        report.figure("buffers at the end", left.buffers as f64);
    } else {
        let few = FEW_BUFFERS * u64::from(arguments.workers);
        report.at_most("buffers at the end", left.buffers as f64, few as f64, "");
    }
    report.samples(samples);
    Ok(report)
}

/// Opens the flows; gives how many came to be. They go on by themselves.
async fn open(
    slow: &mut JoinSet<Result<(), String>>,
    target: std::net::SocketAddr,
    flows: u64,
    is_over: &watch::Receiver<bool>,
) -> usize {
    let mut opened = 0;
    for first in (0..flows).step_by(AT_ONCE as usize) {
        let mut connecting = JoinSet::new();
        for id in first..(first + AT_ONCE).min(flows) {
            connecting.spawn(async move { (id, begin(target, id).await) });
        }
        while let Some(connected) = connecting.join_next().await {
            match connected.expect("a client does not panic") {
                (id, Ok((stream, order))) => {
                    opened += 1;
                    let is_over = is_over.clone();
                    slow.spawn(async move {
                        crawl(stream, &order, is_over).await.map_err(|fault| format!("flow {id}: {fault}"))
                    });
                }
                (id, Err(fault)) => {
                    slow.spawn(async move { Err(format!("flow {id}: {fault}")) });
                }
            }
        }
    }
    opened
}

/// Half of the flows are read slowly by the client, half by the backend.
async fn begin(target: std::net::SocketAddr, id: u64) -> Result<(TcpStream, Order), Fault> {
    let bytes = if id.is_multiple_of(READ_OUT_OF) { READ_OUT_BYTES } else { BYTES };
    let towards_client = id.is_multiple_of(2);
    let order = Order {
        id,
        manner: match (towards_client, bytes) {
            (false, _) => Manner::ClientResets,
            (true, READ_OUT_BYTES) => Manner::Both,
            (true, _) => Manner::Hold,
        },
        up: if towards_client { 0 } else { BYTES },
        down: if towards_client { bytes } else { 0 },
        rounds: 1,
        pace: SLOW,
    };
    let beginning = async {
        let stream = client::connect_small(target).await?;
        client::begin(&stream, &order).await?;
        Ok::<_, Fault>((stream, order))
    };
    timeout(Behaviour::PLAIN.patience, beginning).await.unwrap_or(Err(Fault::TooLong))
}

/// Whether nothing but what readers take moves any more.
fn until_held_back(subject: &Subject) -> bool {
    let deadline = Instant::now() + HELD_BACK_PATIENCE;
    let mut before = f64::NEG_INFINITY;
    loop {
        let moved = subject.metrics().sum("trimtab_bytes_total", &[]);
        if moved - before < STILL_BYTES {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        before = moved;
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// What it is when its buffers are few, or after as long as that may take.
fn until_given_back(subject: &mut Subject) -> Sample {
    let began = Instant::now();
    loop {
        let sample = subject.sample();
        if sample.buffers <= FEW_BUFFERS || began.elapsed() > GIVEN_BACK {
            return sample;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// How long it takes until no flow is open any more though their backends stay; no longer than it may, and a little.
fn until_noticed(subject: &mut Subject) -> Duration {
    let began = Instant::now();
    while subject.sample().flows_open > 0 && began.elapsed() < 2 * NOTICED {
        std::thread::sleep(Duration::from_millis(100));
    }
    began.elapsed()
}

/// Reads slowly, or writes without being read, until it is over; then a few read all that is left, and the others go as clients
/// do that have had enough.
async fn crawl(stream: TcpStream, order: &Order, mut is_over: watch::Receiver<bool>) -> Result<(), Fault> {
    if order.down == 0 {
        return tokio::select! {
            // Nobody reads that much in the time.
            outcome = send(&stream, order.up_seed(), 0..order.up) => outcome,
            _ = is_over.wait_for(|over| *over) => {
                reset_when_closed(&stream);
                Ok(())
            }
        };
    }
    fin(&stream, 0)?;
    let mut at = 0;
    while !*is_over.borrow() {
        let bytes = u64::from(SLOW.at_once);
        receive(&stream, order.down_seed(), at..at + bytes, Pace::FREE).await?;
        at += bytes;
        sleep(Duration::from_millis(SLOW.pause_ms.into())).await;
    }
    if order.down == READ_OUT_BYTES {
        receive(&stream, order.down_seed(), at..order.down, Pace::FREE).await?;
        return receive_end(&stream, order.down_seed(), order.down).await;
    }
    Ok(())
}

/// Waits until all have ended; gives what went wrong.
async fn finish(slow: &mut JoinSet<Result<(), String>>) -> Vec<String> {
    let mut faults = Vec::new();
    let all_over = async {
        while let Some(ended) = slow.join_next().await {
            faults.extend(ended.expect("a client does not panic").err());
        }
    };
    let in_time = timeout(END_PATIENCE, all_over).await.is_ok();
    if !in_time {
        faults.push(format!("{} flows did not end in time", slow.len()));
    }
    faults
}

/// What the kernel holds for TCP sockets, in bytes.
fn kernel_bytes() -> f64 {
    let text = std::fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("TCP:")).unwrap_or_default();
    let pages = line.split(' ').skip_while(|word| *word != "mem").nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0.0) * rustix::param::page_size() as f64
}
