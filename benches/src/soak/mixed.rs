//! `soak mixed`: everything at once, at a moderate rate, for as long as is asked; then nothing, and nothing may be left.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};

use super::backend::{Backend, Ledger, Mood, Tally};
use super::client::{self, Behaviour};
use super::order::{Manner, Order, Pace};
use super::subject::{self, Sample, Subject};
use super::trend::Trend;
use super::verdict::Report;
use super::{SoakArguments, runtime, udp_flows};
use crate::race::Random;

/// So that one in a bad mood, and the two that are tried after a connect failed, leave somebody.
const BACKENDS: usize = 4;
/// A backend's bad mood lasts so long, and comes so often.
const MOOD_LASTS: Duration = Duration::from_secs(3);
const MOOD_EVERY: Duration = Duration::from_secs(15);
/// Flows that are silent but for a byte now and then.
const IDLE_FLOWS: usize = 100;
/// Flows that may be open at once beside those; what would be more is not started, and counted.
const IN_FLIGHT_MAX: usize = 1_000;
/// Before memory is compared, of all the time.
const WARM_UP: f64 = 0.25;
/// Memory may grow so much in an hour, or in all of a run that is not [`LONG`].
const GROWTH_PER_HOUR: f64 = 0.02;
const GROWTH_BYTES: f64 = MEBI;
const LONG: Duration = Duration::from_secs(1_800);
const MEBI: f64 = 1_048_576.0;
/// How long flows may take to end when no new ones come.
const END_PATIENCE: Duration = Duration::from_secs(90);
/// Samples at most so far apart, and at least so many in a run.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);
const SAMPLES_MIN: u32 = 40;
/// A backend that vanishes costs a connect its time-out.
const DATAPLANE: &str = "connect_timeout = \"1s\"\n";

/// Runs it.
pub(super) fn run(arguments: &SoakArguments, say: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let mut report = Report::new("mixed", arguments.engine.clone());
    let length = Duration::from_secs(arguments.seconds.unwrap_or(300));
    let runtime = runtime()?;
    let ledger = Arc::new(Ledger::default());
    let _inside = runtime.enter();
    let start_backend = |_| Backend::start(e2e::loopback(), Arc::clone(&ledger));
    let backends: Vec<Backend> = (0..BACKENDS).map(start_backend).collect();
    let addresses: Vec<_> = backends.iter().map(Backend::address).collect();
    let mut config = subject::config(&arguments.engine, arguments.workers, DATAPLANE);
    let target_udp = udp_flows::listen(&mut config, "");
    let mut subject = Subject::start(config, &addresses);
    let at_rest = subject.rest();
    say(&format!("trimtab runs as process {} at {}", subject.pid(), subject.listener()));

    let interval = SAMPLE_EVERY.min(length / SAMPLES_MIN).max(Duration::from_secs(1));
    let watch = subject.watch(interval);
    let began = Instant::now();
    let own_cpu = subject::cpu_time(std::process::id());
    let traffic = Traffic::new(subject.listener(), target_udp, &ledger, arguments);
    let unfinished = runtime.block_on(traffic.run(&backends, length));
    let mut samples = watch.end();
    samples.retain(|sample| sample.at_seconds <= length.as_secs_f64());
    report.took(began.elapsed().as_secs_f64());
    let used = subject::cpu_time(std::process::id()).saturating_sub(own_cpu);
    report.figure("load generator, part of a processor", used.as_secs_f64() / began.elapsed().as_secs_f64());

    judge_traffic(&mut report, &ledger.tally(), &traffic, unfinished);
    let ended = subject.judge_rest(&mut report, at_rest);
    judge_memory(&mut report, length, &samples, &ended);
    samples.push(ended);
    report.samples(samples);
    Ok(report)
}

fn judge_traffic(report: &mut Report, tally: &Tally, traffic: &Traffic, unfinished: usize) {
    for (what, (well, excused)) in &tally.ended {
        report.figure(format!("{what}: ended well"), *well as f64);
        if *excused > 0 {
            report.figure(format!("{what}: ended by a backend's mood"), *excused as f64);
        }
    }
    let (well, excused) =
        tally.ended.values().fold((0, 0), |(well, excused), more| (well + more.0, excused + more.1));
    report.figure("connections", (well + excused + tally.failed + tally.corrupt) as f64);
    report.figure("MiB, both ways, each byte compared", tally.bytes as f64 / MEBI);
    report.figure("not started, as too many were open", traffic.skipped.load(Relaxed) as f64);
    report.equal("connections with a wrong, lost or additional byte", tally.corrupt, 0);
    report.equal("connections that failed though no backend's mood excuses it", tally.failed, 0);
    report.equal("connections not over at the end", unfinished, 0);
    // A mood is one backend's of four, for a fifth of the time; more would mean that retries do not help.
    report.at_most(
        "connections ended by a backend's mood",
        100.0 * excused as f64 / (well + excused).max(1) as f64,
        5.0,
        "%",
    );
    report.check("connections ended well", well, "> 0", well > 0);
    report.faults(tally.faults.clone());
}

fn judge_memory(report: &mut Report, length: Duration, samples: &[Sample], ended: &Sample) {
    let warm_up = (samples.len() as f64 * WARM_UP) as usize;
    // What the history of utilization holds grows until its retention, whatever the traffic.
    let bytes = |sample: &Sample| sample.private_bytes.saturating_sub(sample.history_bytes) as f64;
    let series: Vec<(f64, f64)> =
        samples[warm_up..].iter().map(|sample| (sample.at_seconds, bytes(sample))).collect();
    if let Some(trend) = Trend::of(&series) {
        let level = median(series.iter().map(|(_, bytes)| *bytes).collect());
        // A short run is not a part of an hour: what is touched once is touched at its beginning.
        let hours = if length < LONG { length.as_secs_f64() / 3_600.0 } else { 1.0 };
        let limit = (GROWTH_PER_HOUR * level).max(GROWTH_BYTES) / hours;
        report.check(
            "memory's slope after a quarter of the time (Theil-Sen, 95 % interval)",
            format!(
                "{:+.2} MiB/h ({:+.2} to {:+.2})",
                trend.per_hour / MEBI,
                trend.low / MEBI,
                trend.high / MEBI
            ),
            format!("≤ {:.2} MiB/h, or none within the interval", limit / MEBI),
            trend.is_flat(limit),
        );
    }
    if let Some(warm) = samples.get(warm_up) {
        let limit = bytes(warm) + (GROWTH_PER_HOUR * bytes(warm)).max(GROWTH_BYTES);
        report.at_most("memory when all is over", bytes(ended) / MEBI, limit / MEBI, "MiB");
    }
    let most = |of: fn(&Sample) -> f64| samples.iter().map(of).fold(0.0, f64::max);
    report.figure("RSS, most, MiB", most(|sample| sample.rss_bytes as f64) / MEBI);
    report.figure("trimtab, most, part of a processor", most(|sample| sample.busy));
    let busy: f64 = samples.iter().map(|sample| sample.busy).sum();
    report.figure("trimtab, part of a processor", busy / samples.len().max(1) as f64);
    report.equal("most iou-wrk threads", most(|sample| sample.io_workers as f64), 0.0);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// What clients do.
struct Traffic {
    target: SocketAddr,
    target_udp: SocketAddr,
    ledger: Arc<Ledger>,
    rate: f64,
    seed: u64,
    next_id: AtomicU64,
    in_flight: Arc<AtomicUsize>,
    skipped: AtomicU64,
}

impl Traffic {
    fn new(
        target: SocketAddr,
        target_udp: SocketAddr,
        ledger: &Arc<Ledger>,
        arguments: &SoakArguments,
    ) -> Self {
        Self {
            target,
            target_udp,
            ledger: Arc::clone(ledger),
            rate: arguments.rate,
            seed: arguments.seed,
            next_id: AtomicU64::new(1),
            in_flight: Arc::default(),
            skipped: AtomicU64::new(0),
        }
    }

    /// Traffic for so long; then waits until all of it is over, and gives how many connections are not.
    async fn run(&self, backends: &[Backend], length: Duration) -> usize {
        let end = tokio::time::Instant::now() + length;
        let mut clients = JoinSet::new();
        tokio::join!(self.start_clients(&mut clients, end), self.moods(backends, end));
        let all_over = async { while clients.join_next().await.is_some() {} };
        // Those that are left are counted, and end with the runtime.
        let _ = tokio::time::timeout(END_PATIENCE, all_over).await;
        clients.len()
    }

    /// Starts a client whenever one is due.
    async fn start_clients(&self, clients: &mut JoinSet<()>, end: tokio::time::Instant) {
        let mut random = Random::new(self.seed, 0);
        for n in 0..IDLE_FLOWS {
            let random = Random::new(self.seed, 1 + n as u64);
            clients.spawn(self.idle(random, end));
        }
        let mut due = tokio::time::Instant::now();
        loop {
            due += Duration::from_secs_f64(random.exponential() / self.rate);
            if due >= end {
                return;
            }
            sleep_until(due).await;
            while clients.try_join_next().is_some() {}
            if self.in_flight.load(Relaxed) >= IN_FLIGHT_MAX {
                self.skipped.fetch_add(1, Relaxed);
                continue;
            }
            let (what, order, behaviour) = draw(&mut random, self.next_id.fetch_add(1, Relaxed));
            clients.spawn(self.client(what, order, behaviour));
        }
    }

    fn client(
        &self,
        what: &'static str,
        order: Order,
        behaviour: Behaviour,
    ) -> impl Future<Output = ()> + use<> {
        let (target, ledger, in_flight) =
            (self.target, Arc::clone(&self.ledger), Arc::clone(&self.in_flight));
        in_flight.fetch_add(1, Relaxed);
        let target_udp = self.target_udp;
        async move {
            let began = Instant::now();
            let outcome = match what {
                UDP => udp_flows::exchange(target_udp, &order).await,
                SILENT => client::connect(target).await.map(|_| 0),
                _ => client::run(target, &order, &behaviour).await,
            };
            ledger.ended(what, &order, began, outcome);
            in_flight.fetch_sub(1, Relaxed);
        }
    }

    /// One flow after the other, each nearly silent for a while.
    fn idle(&self, mut random: Random, end: tokio::time::Instant) -> impl Future<Output = ()> + use<> {
        let (target, ledger) = (self.target, Arc::clone(&self.ledger));
        let first_id = self.next_id.fetch_add(1 << 20, Relaxed) + (1 << 40);
        async move {
            for id in first_id.. {
                let left = end.saturating_duration_since(tokio::time::Instant::now());
                if left.is_zero() {
                    return;
                }
                let rounds = 1 + random.below(6) as u32;
                let pause = Duration::from_secs_f64(random.between(1.0, 20.0)).min(left / rounds);
                let order = Order { id, manner: Manner::Exchange, up: 1, down: 1, rounds, pace: Pace::FREE };
                let patience = pause * rounds + Behaviour::PLAIN.patience;
                let behaviour = Behaviour { pause, patience, ..Behaviour::PLAIN };
                let began = Instant::now();
                let outcome = client::run(target, &order, &behaviour).await;
                ledger.ended("idle", &order, began, outcome);
                sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// One backend after the other has each of the moods.
    async fn moods(&self, backends: &[Backend], end: tokio::time::Instant) {
        let mut random = Random::new(self.seed, u64::MAX);
        let rest = MOOD_EVERY - MOOD_LASTS;
        while tokio::time::Instant::now() + MOOD_EVERY < end {
            sleep(rest).await;
            let backend = &backends[random.below(backends.len())];
            self.ledger.disturb(true);
            backend.set(Mood::BAD[random.below(Mood::BAD.len())]);
            sleep(MOOD_LASTS).await;
            backend.set(Mood::Serve);
            self.ledger.disturb(false);
        }
    }
}

/// A connection without a byte.
const SILENT: &str = "connect and close";
/// Datagrams, one after the other, each answered by itself.
const UDP: &str = "exchange over UDP";

/// What the next client does: mostly small exchanges, now and then each of the hard things.
fn draw(random: &mut Random, id: u64) -> (&'static str, Order, Behaviour) {
    let mut behaviour = Behaviour::PLAIN;
    let mut order = Order { id, manner: Manner::Exchange, up: 64, down: 64, rounds: 1, pace: Pace::FREE };
    let mut bytes = |least: f64, most: f64| {
        // Small ones as often as large ones, by magnitude.
        random.between(least.ln(), most.ln()).exp() as u64
    };
    // Above one buffer, and so far that a half is spliced; the odd sizes are what a fixed one would hide.
    let (short, long, bulk) =
        ((bytes(1.0, 4e3), bytes(1.0, 16e3)), (bytes(2e4, 1e6), bytes(2e4, 1e6)), bytes(1e6, 3e7));
    let what = match random.below(1_000) {
        0..50 => {
            (order.up, order.down, order.rounds) = (short.0.min(1_400), 0, 1 + random.below(20) as u32);
            UDP
        }
        50..400 => {
            (order.up, order.down, order.rounds) = (short.0, short.1, 1 + random.below(20) as u32);
            "exchange, small"
        }
        400..500 => {
            (order.up, order.down, order.rounds) =
                (long.0 / 8 + 1, long.1 / 8 + 1, 1 + random.below(4) as u32);
            "exchange, large"
        }
        500..700 => "connect, request, close",
        700..740 => SILENT,
        740..820 => {
            (order.manner, order.up, order.down) = (Manner::ClientResets, long.0, long.1);
            behaviour.reset_after =
                ((long.0 as f64 * random.unit()) as u64, (long.1 as f64 * random.unit()) as u64);
            "client resets"
        }
        820..880 => {
            (order.manner, order.up, order.down) = (Manner::BackendResets, short.0, long.1);
            "backend resets"
        }
        880..930 => {
            (order.manner, order.up, order.down) = (Manner::AnswerAfterFin, long.0, long.1);
            "half-close by the client"
        }
        930..970 => {
            (order.manner, order.up, order.down) = (Manner::FinFirst, long.0, long.1);
            "half-close by the backend"
        }
        970..980 => {
            (order.manner, order.up, order.down) = (Manner::Both, short.0, long.1 + 500_000);
            behaviour.pace = Pace { at_once: 16_384, pause_ms: 100 };
            "client reads slowly"
        }
        980..990 => {
            (order.manner, order.up, order.down) = (Manner::Both, long.0 + 500_000, short.1);
            order.pace = Pace { at_once: 16_384, pause_ms: 100 };
            "backend reads slowly"
        }
        _ => {
            (order.manner, order.up, order.down) = (Manner::Both, bulk, bulk / 2 + long.1);
            "bulk, both ways"
        }
    };
    (what, order, behaviour)
}

#[cfg(test)]
mod tests {
    use super::super::order::Fault;
    use super::*;

    #[test]
    fn every_kind_is_drawn() {
        let mut random = Random::new(1, 0);
        let mut seen = std::collections::BTreeMap::new();
        for id in 0..5_000 {
            let (what, order, behaviour) = draw(&mut random, id);
            *seen.entry(what).or_insert(0) += 1;
            let (sent, received) = behaviour.reset_after;
            assert!(sent <= order.up && received <= order.down && order.rounds > 0, "{order:?}");
        }
        assert_eq!(seen.len(), 12, "{seen:?}");
    }

    /// Whoever is asked directly does as is ordered, in each manner: what the soak finds is then the proxy's.
    #[test]
    fn clients_and_backends_agree() {
        let runtime = runtime().unwrap();
        runtime.block_on(async {
            let ledger = Arc::new(Ledger::default());
            let backend = Backend::start(e2e::loopback(), Arc::clone(&ledger));
            let mut random = Random::new(2, 0);
            let mut done = std::collections::BTreeSet::new();
            let deadline = Instant::now() + e2e::PATIENCE;
            for id in 1.. {
                let (what, order, behaviour) = draw(&mut random, id);
                if what == SILENT || !done.insert(what) {
                    continue;
                }
                while tokio::net::TcpStream::connect(backend.address()).await.is_err() {
                    assert!(Instant::now() < deadline, "the backend never listened");
                    sleep(Duration::from_millis(5)).await;
                }
                let outcome = match what {
                    UDP => udp_flows::exchange(backend.address(), &order).await,
                    _ => client::run(backend.address(), &order, &behaviour).await,
                };
                assert!(outcome.is_ok(), "{what}: {outcome:?}");
                ledger.ended(what, &order, Instant::now(), outcome);
                if done.len() == 11 {
                    break;
                }
            }
            let tally = ledger.tally();
            assert_eq!((tally.corrupt, tally.failed), (0, 0), "{:?}", tally.faults);
        });
    }

    #[test]
    fn a_mood_excuses_a_break_and_nothing_else() {
        let ledger = Ledger::default();
        let order = Order { id: 1, manner: Manner::Both, up: 1, down: 1, rounds: 1, pace: Pace::FREE };
        let began = Instant::now();
        ledger.ended("x", &order, began, Err(Fault::TooLong));
        assert_eq!(ledger.tally().failed, 1);
        ledger.disturb(true);
        ledger.ended("x", &order, began, Err(Fault::TooLong));
        ledger.ended("x", &order, began, Err(Fault::Torn { at: 0 }));
        let tally = ledger.tally();
        assert_eq!((tally.failed, tally.corrupt, tally.ended["x"]), (1, 1, (0, 1)));
    }
}
