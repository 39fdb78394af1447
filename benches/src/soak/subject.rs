//! What is tested: `trimtab serve` with a few resources, and what can be seen of it from outside.

use std::fs;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use e2e::{Balancer, BalancerConfig, Metrics, Process, settled_descriptors, until};
use serde::Serialize;

use super::verdict::Report;
use crate::process;

/// How often an agent reports: utilization's history is memory that grows until it is full, and is no part of a soak.
const REPORT_INTERVAL: &str = "10s";

/// Between two looks whether all is over.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// A balancer and the agents of its resources.
pub(super) struct Subject {
    balancer: Balancer,
    http: SocketAddr,
    _agents: Vec<Process>,
}

/// What was seen at one moment.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Sample {
    pub(super) at_seconds: f64,
    pub(super) rss_bytes: u64,
    pub(super) pss_bytes: u64,
    /// Written to and not shared: what grows when something leaks.
    pub(super) private_bytes: u64,
    pub(super) sockets: usize,
    pub(super) pipes: usize,
    pub(super) other_descriptors: usize,
    pub(super) threads: usize,
    /// Kernel threads that io_uring made because something could not be done without waiting.
    pub(super) io_workers: usize,
    /// Processor time since the sample before, as a part of one processor.
    pub(super) busy: f64,
    pub(super) buffers: u64,
    pub(super) buffers_in_use: u64,
    pub(super) flows_open: u64,
    pub(super) completion_overflows: u64,
    /// What the history of utilization holds: bounded by its own retention.
    pub(super) history_bytes: u64,
}

/// What must be as at the start when all traffic has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rest {
    pub(super) sockets: usize,
    pub(super) pipes: usize,
    pub(super) others: usize,
}

impl Rest {
    /// No more of anything. At the start there may have been the end of a question that was asked before.
    fn is_within(self, start: Self) -> bool {
        self.sockets <= start.sockets && self.pipes <= start.pipes && self.others <= start.others
    }
}

impl Subject {
    /// Starts a balancer with these lines in `[dataplane]`, and an agent for each of `backends`.
    pub(super) fn start(config: BalancerConfig, backends: &[SocketAddr]) -> Self {
        let http = config.http;
        let balancer = Balancer::start(config);
        // Unchecked: a backend of a soak waits for an order, and a check gives none.
        let further = ["--no-check", "--report-interval", REPORT_INTERVAL];
        let agent = |(n, address): (usize, &SocketAddr)| balancer.agent(&format!("b{n}"), *address, &further);
        let agents = backends.iter().enumerate().map(agent).collect();
        until("all resources are ready", || (balancer.ready_resources() == backends.len()).then_some(()));
        Self { balancer, http, _agents: agents }
    }

    pub(super) fn listener(&self) -> SocketAddr {
        self.balancer.listener()
    }

    pub(super) fn pid(&mut self) -> u32 {
        self.balancer.process().id()
    }

    pub(super) fn metrics(&self) -> Metrics {
        Metrics::scrape(self.http)
    }

    /// What it has open while nothing happens.
    pub(super) fn rest(&mut self) -> Rest {
        let settled = settled_descriptors(self.pid());
        Rest { sockets: settled.sockets, pipes: settled.pipes, others: settled.others }
    }

    /// Waits until it holds what it held at the start and moves nothing, or for as long as is reasonable; judges that.
    pub(super) fn judge_rest(&mut self, report: &mut Report, at_start: Rest) -> Sample {
        self.judge_rest_within(e2e::PATIENCE, report, at_start)
    }

    /// As [`Self::judge_rest`], where others need so long to let go.
    pub(super) fn judge_rest_within(
        &mut self,
        patience: Duration,
        report: &mut Report,
        at_start: Rest,
    ) -> Sample {
        let deadline = Instant::now() + patience;
        let (rest, sample) = loop {
            let (rest, sample) = (self.rest(), self.sample());
            let quiet = sample.flows_open == 0 && sample.buffers_in_use == 0;
            if (rest.is_within(at_start) && quiet) || Instant::now() > deadline {
                break (rest, sample);
            }
            std::thread::sleep(LOOK_AGAIN);
        };
        for (what, found, before) in [
            ("sockets", rest.sockets, at_start.sockets),
            ("ends of pipes", rest.pipes, at_start.pipes),
            ("other descriptors", rest.others, at_start.others),
        ] {
            let wanted = format!("≤ {before}");
            report.check(&format!("{what} when all is over"), found, wanted, found <= before);
        }
        report.equal("buffers in use when all is over", sample.buffers_in_use, 0);
        report.equal("flows open when all is over", sample.flows_open, 0);
        let runs = self.balancer.process().is_running();
        report.equal("trimtab still runs", runs, true);
        sample
    }

    /// Flows that ended for this reason so far.
    pub(super) fn closed(&self, reason: &str) -> f64 {
        self.metrics().sum("trimtab_flows_closed_total", &[("reason", reason)])
    }

    /// Looks at it every `interval` on a thread of its own.
    pub(super) fn watch(&mut self, interval: Duration) -> Watch {
        let (stop, stopped) = channel();
        let (pid, http) = (self.pid(), self.http);
        let thread = std::thread::spawn(move || watch(pid, http, interval, &stopped));
        Watch { stop, thread }
    }

    /// One look.
    pub(super) fn sample(&mut self) -> Sample {
        Looker::new(self.pid(), self.http).look()
    }
}

/// A configuration with this engine and so many workers.
pub(super) fn config(engine: &str, workers: u16, dataplane: &str) -> BalancerConfig {
    let dataplane = format!("engine = \"{engine}\"\nworkers = {workers}\n{dataplane}");
    BalancerConfig { dataplane, ..BalancerConfig::default() }
}

/// Samples that are being taken.
pub(super) struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<Vec<Sample>>,
}

impl Watch {
    /// Ends it; gives what was seen.
    pub(super) fn end(self) -> Vec<Sample> {
        // It may have ended with the process.
        let _ = self.stop.send(());
        self.thread.join().expect("a look does not panic")
    }
}

fn watch(pid: u32, http: SocketAddr, interval: Duration, stopped: &Receiver<()>) -> Vec<Sample> {
    let mut looker = Looker::new(pid, http);
    let mut samples = Vec::new();
    while matches!(stopped.recv_timeout(interval), Err(RecvTimeoutError::Timeout)) {
        samples.push(looker.look());
    }
    samples
}

/// What is needed to see how much was used since.
struct Looker {
    pid: u32,
    http: SocketAddr,
    began: Instant,
    before: (Instant, Duration),
}

impl Looker {
    fn new(pid: u32, http: SocketAddr) -> Self {
        let now = Instant::now();
        Self { pid, http, began: now, before: (now, cpu_time(pid)) }
    }

    fn look(&mut self) -> Sample {
        let memory = process::memory_of(self.pid as i32).unwrap_or_default();
        let opened = e2e::descriptors(self.pid);
        let names = thread_names(self.pid);
        let (now, used) = (Instant::now(), cpu_time(self.pid));
        let busy = used.saturating_sub(self.before.1).as_secs_f64() / (now - self.before.0).as_secs_f64();
        self.before = (now, used);
        let metrics = Metrics::scrape(self.http);
        let sum = |name: &str| metrics.sum(name, &[]) as u64;
        Sample {
            at_seconds: self.began.elapsed().as_secs_f64(),
            rss_bytes: memory.rss,
            pss_bytes: memory.pss,
            private_bytes: memory.private_dirty,
            sockets: opened.sockets,
            pipes: opened.pipes,
            other_descriptors: opened.others,
            threads: names.len(),
            io_workers: names.iter().filter(|name| name.starts_with("iou-wrk")).count(),
            busy,
            buffers: sum("trimtab_buffers"),
            buffers_in_use: sum("trimtab_buffers_in_use"),
            flows_open: sum("trimtab_flows_open"),
            completion_overflows: sum("trimtab_completion_overflows_total"),
            history_bytes: sum("trimtab_history_bytes"),
        }
    }
}

/// Processor time of a process so far; none of one that is gone.
pub(super) fn cpu_time(pid: u32) -> Duration {
    process::cpu_time_of(pid as i32).unwrap_or_default()
}

fn thread_names(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    // One that ended since it was listed is not there.
    tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok()).collect()
}
