//! The backends: a process that serves slowly, queues, and says each second how it is.

use std::future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use api::orca::OrcaLoadReport;
use api::v1::registration_service_client::RegistrationServiceClient;
use api::v1::report_response::Event;
use api::v1::{RegisterRequest, ReportRequest, Resource};
use clap::Args;
use hdrhistogram::Histogram;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use super::link::{Account, Answer, Order};
use super::scenario::{BACKENDS, Scenario, Speeds};

/// How often a backend says how it is.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for a balancer's control.
const PATIENCE: Duration = Duration::from_secs(15);
/// Time constant of the averages behind agent weights: trimtab averages its reports over the same time.
const AVERAGED_OVER: f64 = 3.0;
/// Most that HAProxy takes: 256 % of an initial weight of 100.
const PERCENT_MAX: f64 = 256.0;
/// Below this utilization a rate for each unit of it would be noise.
const UTILIZATION_MIN: f64 = 0.01;

/// What the process of the backends is started with.
#[derive(Debug, Args)]
pub struct BackendsArguments {
    /// Where the load waits for us
    #[arg(long)]
    pub load: SocketAddr,
    /// The scenario as JSON
    #[arg(long)]
    pub scenario: String,
    /// The round's seed
    #[arg(long)]
    pub seed: u64,
}

/// Serves until the load hangs up.
///
/// # Errors
/// When the load cannot be reached or the balancer refuses the backends.
pub fn serve(arguments: &BackendsArguments) -> anyhow::Result<()> {
    let scenario: Scenario = serde_json::from_str(&arguments.scenario).context("the scenario")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(obey(arguments, &scenario))
}

async fn obey(arguments: &BackendsArguments, scenario: &Scenario) -> anyhow::Result<()> {
    let fleet = Arc::new(Fleet::new(scenario, arguments.seed));
    let mut link =
        BufReader::new(TcpStream::connect(arguments.load).await.context("connecting to the load")?);
    let (mut backends, mut agents) = (Vec::new(), Vec::new());
    for backend in 0..BACKENDS {
        let (service, agent) = (listen().await?, listen().await?);
        backends.push(service.local_addr()?);
        agents.push(agent.local_addr()?);
        tokio::spawn(accept_requests(Arc::clone(&fleet), backend, service));
        tokio::spawn(accept_checks(Arc::clone(&fleet), backend, agent));
    }
    say(&mut link, &Answer::Listening { backends: backends.clone(), agents }).await?;
    let mut line = String::new();
    while link.read_line(&mut line).await? > 0 {
        let answer = match serde_json::from_str(&line)? {
            Order::Join(control) => {
                join(&fleet, control, &backends).await?;
                Answer::Done
            }
            Order::Go => {
                fleet.start();
                Answer::Done
            }
            Order::Window => {
                fleet.begin_window();
                Answer::Done
            }
            Order::Finish => Answer::Account(fleet.account()),
        };
        say(&mut link, &answer).await?;
        line.clear();
    }
    Ok(())
}

async fn listen() -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await
}

async fn say(link: &mut BufReader<TcpStream>, answer: &Answer) -> anyhow::Result<()> {
    let line = serde_json::to_string(answer)? + "\n";
    Ok(link.get_mut().write_all(line.as_bytes()).await?)
}

/// All backends and what is counted of them.
struct Fleet {
    speeds: Speeds,
    slots: usize,
    /// Set when the warm-up begins; before it nobody is disturbed.
    started: OnceLock<Instant>,
    servers: Vec<Server>,
    /// How late requests ended, in microseconds.
    late: Mutex<Histogram<u64>>,
    reports_accepted: AtomicU64,
    reports_refused: AtomicU64,
    agent_checks: AtomicU64,
}

struct Server {
    /// First in, first out.
    queue: Semaphore,
    meter: Mutex<Meter>,
}

/// What is counted of one backend.
#[derive(Debug, Clone)]
struct Meter {
    busy: usize,
    /// Until when `busy_seconds` counts.
    at: Instant,
    /// Sum over all slots.
    busy_seconds: f64,
    served: u64,
    /// The same at the last report and at the start of the window.
    reported: (Instant, f64, u64),
    window: (Instant, f64, u64),
    /// Averages of what was reported: requests a second, utilization.
    average: Option<(f64, f64)>,
}

/// What one interval was like.
#[derive(Debug, Clone, Copy)]
struct Reading {
    rate: f64,
    utilization: f64,
}

impl Meter {
    fn new(now: Instant) -> Self {
        let (reported, window) = ((now, 0.0, 0), (now, 0.0, 0));
        Self { busy: 0, at: now, busy_seconds: 0.0, served: 0, reported, window, average: None }
    }

    fn advance(&mut self, now: Instant) {
        self.busy_seconds += self.busy as f64 * now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
    }

    fn since(&self, before: (Instant, f64, u64), slots: usize) -> Reading {
        let seconds = self.at.saturating_duration_since(before.0).as_secs_f64().max(1e-3);
        Reading {
            rate: (self.served - before.2) as f64 / seconds,
            utilization: (self.busy_seconds - before.1) / seconds / slots as f64,
        }
    }

    /// The interval since the last report, which ends now.
    fn report(&mut self, now: Instant, slots: usize) -> Reading {
        self.advance(now);
        let reading = self.since(self.reported, slots);
        let elapsed = now.saturating_duration_since(self.reported.0).as_secs_f64();
        let part = -(-elapsed / AVERAGED_OVER).exp_m1();
        let (rate, utilization) = self.average.unwrap_or((reading.rate, reading.utilization));
        self.average = Some((
            rate + part * (reading.rate - rate),
            utilization + part * (reading.utilization - utilization),
        ));
        self.reported = (now, self.busy_seconds, self.served);
        reading
    }
}

impl Fleet {
    fn new(scenario: &Scenario, seed: u64) -> Self {
        let now = Instant::now();
        let server = |_| Server { queue: Semaphore::new(scenario.slots), meter: Mutex::new(Meter::new(now)) };
        Self {
            speeds: scenario.speeds(seed),
            slots: scenario.slots,
            started: OnceLock::new(),
            servers: (0..BACKENDS).map(server).collect(),
            late: Mutex::new(micros_histogram()),
            reports_accepted: AtomicU64::new(0),
            reports_refused: AtomicU64::new(0),
            agent_checks: AtomicU64::new(0),
        }
    }

    fn start(&self) {
        // The load says it once.
        let _ = self.started.set(Instant::now());
    }

    fn meter(&self, backend: usize) -> MutexGuard<'_, Meter> {
        self.servers[backend].meter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn late(&self) -> MutexGuard<'_, Histogram<u64>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_window(&self) {
        let now = Instant::now();
        for backend in 0..BACKENDS {
            let mut meter = self.meter(backend);
            meter.advance(now);
            meter.window = (now, meter.busy_seconds, meter.served);
        }
        self.late().reset();
    }

    /// One request: wait for a slot, be served.
    async fn work(&self, backend: usize, work: f64) {
        let server = &self.servers[backend];
        // It is never closed.
        let Ok(_slot) = server.queue.acquire().await else { return };
        let begun = Instant::now();
        self.change(backend, begun, |meter| meter.busy += 1);
        let started = self.started.get().copied().unwrap_or(begun);
        let begin = begun.saturating_duration_since(started).as_secs_f64();
        let finish = started + Duration::from_secs_f64(self.speeds.finish(backend, begin, work));
        sleep_until(finish).await;
        let now = Instant::now();
        self.change(backend, now, |meter| {
            meter.busy -= 1;
            meter.served += 1;
        });
        self.late().saturating_record(now.saturating_duration_since(finish).as_micros() as u64);
    }

    fn change(&self, backend: usize, now: Instant, change: impl FnOnce(&mut Meter)) {
        let mut meter = self.meter(backend);
        meter.advance(now);
        change(&mut meter);
    }

    /// The weight of each in percent: its requests a second for each unit of utilization (both averaged), over the mean
    /// of that. That is gRFC A58's weight; it is what a backend could do, if utilization grows with requests.
    fn agent_percent(&self) -> Vec<u32> {
        let average = |backend| self.meter(backend).average;
        percents(&(0..BACKENDS).map(average).collect::<Vec<_>>())
    }

    fn account(&self) -> Account {
        let now = Instant::now();
        let (mut served, mut busy) = (Vec::new(), Vec::new());
        for backend in 0..BACKENDS {
            let mut meter = self.meter(backend);
            meter.advance(now);
            served.push(meter.served - meter.window.2);
            busy.push(meter.since(meter.window, self.slots).utilization);
        }
        Account {
            served,
            busy,
            late_p99: self.late().value_at_quantile(0.99) as f64 / 1e6,
            reports_accepted: self.reports_accepted.load(Relaxed),
            reports_refused: self.reports_refused.load(Relaxed),
            agent_checks: self.agent_checks.load(Relaxed),
            agent_percent: self.agent_percent(),
        }
    }
}

/// Weights in percent from averaged (requests a second, utilization); 100 for who has none.
fn percents(averages: &[Option<(f64, f64)>]) -> Vec<u32> {
    let weight = |average: &Option<(f64, f64)>| {
        average.filter(|(rate, _)| *rate > 0.0).map(|(rate, busy)| rate / busy.max(UTILIZATION_MIN))
    };
    let weights: Vec<Option<f64>> = averages.iter().map(weight).collect();
    let known: Vec<f64> = weights.iter().copied().flatten().collect();
    let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
    let percent = |weight: Option<f64>| match weight {
        Some(weight) => (weight / mean * 100.0).round().clamp(1.0, PERCENT_MAX) as u32,
        None => 100,
    };
    weights.into_iter().map(percent).collect()
}

/// Microseconds up to ten minutes.
fn micros_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).expect("bounds that are bounds")
}

async fn accept_requests(fleet: Arc<Fleet>, backend: usize, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(answer_request(Arc::clone(&fleet), backend, stream));
            }
            // Descriptors may come back.
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

/// A line with the work in microseconds; a line back when it is done. Who says nothing (a health check) gets nothing.
async fn answer_request(fleet: Arc<Fleet>, backend: usize, stream: TcpStream) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    // Whoever hangs up half-way is not told that it is an error.
    if stream.read_line(&mut line).await.is_err() {
        return;
    }
    let Ok(micros) = line.trim().parse::<f64>() else { return };
    fleet.work(backend, micros / 1e6).await;
    let _ = stream.get_mut().write_all(b"done\n").await;
}

async fn accept_checks(fleet: Arc<Fleet>, backend: usize, listener: TcpListener) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { continue };
        fleet.agent_checks.fetch_add(1, Relaxed);
        let line = format!("{}%\n", fleet.agent_percent()[backend]);
        tokio::spawn(async move {
            let _ = stream.write_all(line.as_bytes()).await;
            // HAProxy closes once it has read a line; closing first would be as good.
            let _ = stream.read(&mut [0; 16]).await;
        });
    }
}

/// Starts the reports of all backends; returns when a balancer, if there is one, has accepted one of each.
async fn join(
    fleet: &Arc<Fleet>,
    control: Option<SocketAddr>,
    backends: &[SocketAddr],
) -> anyhow::Result<()> {
    let (accepted, mut wait) = mpsc::channel(BACKENDS);
    for (backend, address) in backends.iter().enumerate() {
        let stream = match control {
            Some(control) => Some(Reporter::register(control, backend, *address).await?),
            None => None,
        };
        tokio::spawn(report(Arc::clone(fleet), backend, stream, accepted.clone()));
    }
    for _ in 0..BACKENDS {
        let refused = tokio::time::timeout(PATIENCE, wait.recv()).await.context("no report was accepted")?;
        ensure!(refused.is_some(), "a report stream ended");
    }
    Ok(())
}

/// Takes the meter each interval, for whoever asks; says so to the balancer, if there is one. Backends do so one after
/// the other within the interval, as backends do that were not started together.
async fn report(fleet: Arc<Fleet>, backend: usize, mut stream: Option<Reporter>, accepted: mpsc::Sender<()>) {
    let mut first = true;
    let mut ticks = interval_at(
        Instant::now() + REPORT_INTERVAL.mul_f64(backend as f64 / BACKENDS as f64),
        REPORT_INTERVAL,
    );
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let reading = fleet.meter(backend).report(Instant::now(), fleet.slots);
        if let Some(reporter) = &mut stream {
            if !reporter.send(reading).await {
                fleet.reports_refused.fetch_add(1, Relaxed);
                eprintln!("backend {backend}: the balancer does not take its reports");
                return future::pending().await;
            }
            fleet.reports_accepted.fetch_add(1, Relaxed);
        }
        if std::mem::take(&mut first) {
            // Nobody waits any more once all have one.
            let _ = accepted.send(()).await;
        }
    }
}

/// A registered backend's report stream.
struct Reporter {
    id: String,
    sequence: u64,
    requests: mpsc::Sender<ReportRequest>,
    answers: tonic::Streaming<api::v1::ReportResponse>,
}

/// Any number does: each backend process has a balancer process of its own.
const INCARNATION: u64 = 1;
/// The pool's name in the balancer's configuration.
pub(super) const POOL: &str = "race";

impl Reporter {
    async fn register(control: SocketAddr, backend: usize, address: SocketAddr) -> anyhow::Result<Self> {
        let channel: Channel = Endpoint::from_shared(format!("http://{control}"))?.connect().await?;
        let mut client = RegistrationServiceClient::new(channel);
        let id = format!("b{backend}");
        let resource = Resource {
            id: id.clone(),
            pool: POOL.to_owned(),
            address: address.to_string(),
            ..Resource::default()
        };
        let report_interval = REPORT_INTERVAL.try_into().ok();
        client
            .register(RegisterRequest {
                resource: Some(resource),
                incarnation: INCARNATION,
                report_interval,
                ..RegisterRequest::default()
            })
            .await?;
        let (requests, receiver) = mpsc::channel(4);
        let answers = client.report(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { id, sequence: 0, requests, answers })
    }

    /// Whether it was accepted.
    async fn send(&mut self, reading: Reading) -> bool {
        self.sequence += 1;
        let utilization = OrcaLoadReport {
            cpu_utilization: reading.utilization,
            application_utilization: reading.utilization,
            rps_fractional: reading.rate,
            ..OrcaLoadReport::default()
        };
        let request = ReportRequest {
            id: self.id.clone(),
            incarnation: INCARNATION,
            sequence: self.sequence,
            utilization: Some(utilization),
            ..ReportRequest::default()
        };
        if self.requests.send(request).await.is_err() {
            return false;
        }
        loop {
            match self.answers.message().await {
                Ok(Some(answer)) => match answer.event {
                    Some(Event::Ack(ack)) if ack.sequence == self.sequence => return ack.refused.is_empty(),
                    _ => {}
                },
                _ => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_follow_requests_for_each_unit_of_utilization() {
        let percents = percents(&[Some((100.0, 0.5)), Some((50.0, 0.5)), Some((50.0, 0.25)), None]);
        assert_eq!(percents, [120, 60, 120, 100]);
    }

    #[test]
    fn weights_stay_within_what_haproxy_takes() {
        let mut averages = vec![Some((1.0, 1.0)); 9];
        averages.push(Some((1e6, 0.5)));
        assert_eq!(percents(&averages)[0], 1);
        assert_eq!(percents(&averages)[9], 256);
        assert_eq!(percents(&[None, Some((0.0, 0.0))]), [100, 100]);
    }

    #[test]
    fn a_meter_counts_slots_over_time() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs_f64(seconds);
        let mut meter = Meter::new(start);
        meter.advance(after(0.5));
        meter.busy = 2;
        meter.advance(after(1.0));
        meter.served = 3;
        let reading = meter.report(after(2.0), 4);
        assert!((reading.utilization - 3.0 / 8.0).abs() < 1e-9, "{reading:?}");
        assert!((reading.rate - 1.5).abs() < 1e-9, "{reading:?}");
        assert!((meter.report(after(3.0), 4).utilization - 0.5).abs() < 1e-9);
    }

    #[test]
    fn requests_wait_for_a_slot_and_are_counted() {
        let scenario = Scenario {
            slots: 1,
            mean_work: 0.02,
            shape: super::super::WorkShape::Exponential,
            slow: 0.5,
            antagonist: false,
            holds: (1.0, 2.0),
            load: 0.5,
            warmup: 1.0,
            window: 1.0,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fleet = Arc::new(Fleet::new(&scenario, 1));
            let listener = listen().await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::spawn(accept_requests(Arc::clone(&fleet), 5, listener));
            fleet.start();
            fleet.begin_window();
            let begun = Instant::now();
            let request = || async move {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.write_all(b"20000\n").await.unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).await.unwrap();
                assert_eq!(answer, "done\n");
                begun.elapsed().as_secs_f64()
            };
            // Who hangs up without a word, as a health check does, takes no slot.
            drop(TcpStream::connect(address).await.unwrap());
            let (one, other) = tokio::join!(request(), request());
            // 20 ms of work at half speed, one after the other.
            assert!(one.min(other) >= 0.04 && one.max(other) >= 0.08, "{one} {other}");
            let account = fleet.account();
            assert_eq!(account.served[5], 2);
            assert!(account.busy[5] > 0.5 && account.busy[4] == 0.0, "{account:?}");
        });
    }
}
