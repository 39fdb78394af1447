//! `soak half-open`: clients that never say a word, and flows of which one side never ends. The idle timeout is what ends
//! them; whoever says anything now and then is left alone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt as _;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::backend::{Backend, Ledger, fin};
use super::client::{self, Behaviour};
use super::order::{Fault, Manner, Order, Pace, broken};
use super::subject::{self, Subject};
use super::verdict::Report;
use super::{SoakArguments, runtime};

/// `idle_timeout`.
const IDLE: Duration = Duration::from_secs(3);
/// Flows of each kind at once.
const FLOWS: u64 = 200;
/// How much later than the timeout a flow may end: the timer's steps, and a busy machine.
const LATE: Duration = Duration::from_secs(2);
/// Those that are not idle say something so often.
const TRICKLE: Duration = Duration::from_secs(1);
/// Of a processor: some 200 flows a second come and go, and nothing else happens.
const BUSY_MAX: f64 = 25.0;

/// What never ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The client says nothing.
    Silent,
    /// The client has sent FIN; the backend does not.
    ClientFin,
    /// The backend has sent FIN; the client does not.
    BackendFin,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Silent, Self::ClientFin, Self::BackendFin];

    fn name(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::ClientFin => "the client's FIN alone",
            Self::BackendFin => "the backend's FIN alone",
        }
    }
}

/// What became of the flows of a kind.
#[derive(Debug, Default)]
struct Ends {
    /// In milliseconds.
    lived: Vec<u64>,
    faults: Vec<String>,
}

/// Runs it.
pub(super) fn run(arguments: &SoakArguments, say: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let mut report = Report::new("half-open", arguments.engine.clone());
    let length = Duration::from_secs(arguments.seconds.unwrap_or(30));
    let runtime = runtime()?;
    let ledger = Arc::new(Ledger::default());
    let _inside = runtime.enter();
    let backend = Backend::start(e2e::loopback(), Arc::clone(&ledger));
    let dataplane = format!("idle_timeout = \"{}s\"\n", IDLE.as_secs());
    let config = subject::config(&arguments.engine, arguments.workers, &dataplane);
    let mut subject = Subject::start(config, &[backend.address()]);
    let (target, at_rest) = (subject.listener(), subject.rest());
    say(&format!("trimtab runs as process {}", subject.pid()));

    let watch = subject.watch((length / 20).max(Duration::from_secs(1)));
    let began = Instant::now();
    let (ends, trickled) = runtime.block_on(endless(target, length));
    let samples = watch.end();
    report.took(began.elapsed().as_secs_f64());

    let mut count = 0;
    for (kind, ends) in Kind::ALL.into_iter().zip(ends) {
        let name = kind.name();
        count += ends.lived.len();
        report.figure(format!("{name}: flows that were ended"), ends.lived.len() as f64);
        let seconds = |millis: Option<&u64>| millis.map_or(f64::NAN, |millis| *millis as f64 / 1e3);
        let (least, most) = (seconds(ends.lived.iter().min()), seconds(ends.lived.iter().max()));
        report.at_least(&format!("{name}: the first was ended after"), least, IDLE.as_secs_f64() - 0.1, "s");
        report.at_most(&format!("{name}: the last was ended after"), most, (IDLE + LATE).as_secs_f64(), "s");
        report.equal(&format!("{name}: flows that ended otherwise"), ends.faults.len(), 0);
        report.faults(ends.faults.into_iter().take(5).map(|fault| format!("{name}: {fault}")));
    }
    report.equal("ended for idleness, by its own count", subject.closed("idle"), count as f64);
    report.equal("flows ended though they said something", trickled.len(), 0);
    report.faults(trickled.iter().take(5).cloned());
    let limit = (Kind::ALL.len() as u64 + 1) * FLOWS;
    let most = samples.iter().map(|sample| sample.flows_open).max().unwrap_or(0);
    report.check("flows open, most", most, format!("≤ {limit}"), most <= limit);
    let busy = samples.iter().map(|sample| sample.busy).sum::<f64>() / samples.len().max(1) as f64;
    report.at_most("processor", busy * 100.0, BUSY_MAX, "%");
    report.equal("wrong bytes", ledger.tally().corrupt, 0);
    subject.judge_rest(&mut report, at_rest);
    report.samples(samples);
    Ok(report)
}

/// Each place has one flow after the other.
async fn endless(target: SocketAddr, length: Duration) -> (Vec<Ends>, Vec<String>) {
    let end = tokio::time::Instant::now() + length;
    let next_id = Arc::new(AtomicU64::new(1));
    let mut kinds: Vec<JoinSet<Ends>> = Vec::new();
    for kind in Kind::ALL {
        let mut places = JoinSet::new();
        for n in 0..FLOWS {
            let next_id = Arc::clone(&next_id);
            places.spawn(async move {
                let mut ends = Ends::default();
                sleep(IDLE.mul_f64(n as f64 / FLOWS as f64)).await;
                while tokio::time::Instant::now() < end {
                    match one(kind, target, next_id.fetch_add(1, Relaxed)).await {
                        Ok(lived) => ends.lived.push(lived.as_millis() as u64),
                        Err(fault) => ends.faults.push(fault.to_string()),
                    }
                }
                ends
            });
        }
        kinds.push(places);
    }
    let mut tricklers = JoinSet::new();
    for _ in 0..FLOWS {
        let id = next_id.fetch_add(1, Relaxed);
        let rounds = (length.as_secs() / TRICKLE.as_secs()).max(1) as u32;
        tricklers.spawn(async move {
            let order = Order { id, manner: Manner::Exchange, up: 1, down: 1, rounds, pace: Pace::FREE };
            let behaviour = Behaviour { pause: TRICKLE, patience: 3 * TRICKLE * rounds, ..Behaviour::PLAIN };
            client::run(target, &order, &behaviour).await.map_err(|fault| fault.to_string())
        });
    }
    let mut all = Vec::new();
    for places in kinds {
        let mut sum = Ends::default();
        for ends in places.join_all().await {
            sum.lived.extend(ends.lived);
            sum.faults.extend(ends.faults);
        }
        all.push(sum);
    }
    let trickled = tricklers.join_all().await.into_iter().filter_map(Result::err).collect();
    (all, trickled)
}

/// One flow; gives how long it was let live.
async fn one(kind: Kind, target: SocketAddr, id: u64) -> Result<Duration, Fault> {
    let began = Instant::now();
    let mut stream = client::connect(target).await?;
    let order = |manner, up| Order { id, manner, up, down: 0, rounds: 1, pace: Pace::FREE };
    match kind {
        Kind::Silent => {}
        Kind::ClientFin => {
            client::begin(&stream, &order(Manner::Hold, 0)).await?;
            fin(&stream, 0)?;
        }
        // The backend waits for a byte that never comes.
        Kind::BackendFin => client::begin(&stream, &order(Manner::FinFirst, 1)).await?,
    }
    let patience = IDLE + LATE + Duration::from_secs(5);
    let over = async {
        if kind == Kind::BackendFin {
            // The backend's FIN is the beginning, not the end; a break is the end.
            let _ = stream.read(&mut [0; 1]).await;
            return broken(&stream).await;
        }
        let _ = stream.read(&mut [0; 1]).await;
    };
    timeout(patience, over).await.map_err(|_| Fault::TooLong)?;
    Ok(began.elapsed())
}
