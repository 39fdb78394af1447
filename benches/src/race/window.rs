//! One window: a fresh balancer before fresh backends, a warm-up, and what came of the requests of the window.

use std::env;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::balancer::{self, Balancer, Places};
use super::link::{Account, Answer, Link, Order};
use super::load::{self, Done, Outcome};
use super::scenario::{BACKENDS, Scenario};
use crate::measure::Folder;
use crate::peer::{self, Installed, Proxy};
use crate::process::{self, ProcessTree};
use crate::report::figure;
use crate::scrape::Page;

/// Programs and processors.
#[derive(Debug)]
pub struct Machine {
    pub(super) installed: Vec<Installed>,
    myself: PathBuf,
    pub(super) proxy_cpu: usize,
    pub(super) load_cpu: usize,
}

impl Machine {
    /// Looks for the programs of these balancers.
    ///
    /// # Errors
    /// When one is missing, or a processor may not be used.
    pub fn find(balancers: &[Balancer], proxy_cpu: usize, load_cpu: usize) -> anyhow::Result<Self> {
        let mut wanted: Vec<Proxy> = balancers.iter().map(|balancer| balancer.proxy()).collect();
        wanted.sort();
        wanted.dedup();
        for cpu in [proxy_cpu, load_cpu] {
            if !process::may_use(cpu)? {
                bail!("this process may not run on processor {cpu}: choose --proxy-cpu and --load-cpu");
            }
        }
        let installed: Result<_, _> = wanted.into_iter().map(Installed::find).collect();
        let myself = env::current_exe().context("finding this program")?;
        Ok(Self { installed: installed?, myself, proxy_cpu, load_cpu })
    }

    fn installed(&self, balancer: Balancer) -> anyhow::Result<&Installed> {
        let found = self.installed.iter().find(|installed| installed.proxy == balancer.proxy());
        found.with_context(|| format!("{balancer} was not looked for"))
    }
}

/// What came of one window. Latencies in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Window {
    pub(super) balancer: Balancer,
    pub(super) seed: u64,
    pub(super) requests: usize,
    pub(super) failed: usize,
    pub(super) timed_out: usize,
    /// Answers that came within the window, a second.
    pub(super) throughput: f64,
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    /// How late requests were sent.
    pub(super) send_late_p99: f64,
    /// How late backends ended requests.
    pub(super) serve_late_p99: f64,
    /// Part of the balancer's processor that it used.
    pub(super) balancer_busy: f64,
    /// The most that others used of either processor.
    pub(super) foreign_busy: f64,
    /// Part of its slots that each backend had busy.
    pub(super) backend_busy: Vec<f64>,
    /// Requests that each served.
    pub(super) backend_served: Vec<u64>,
    pub(super) reports_accepted: u64,
    pub(super) reports_refused: u64,
    pub(super) agent_checks: u64,
    /// trimtab's weights, averaged over the window, and the part of it in which it held them.
    pub(super) weights: Vec<f64>,
    pub(super) weights_held: f64,
    /// What agents would have answered at the end.
    pub(super) agent_percent: Vec<u32>,
    /// Sorted.
    #[serde(skip)]
    pub(super) latencies: Vec<f64>,
}

impl Window {
    /// How late the harness itself was, in milliseconds (99th percentile): the processors were busy with something else.
    pub(super) fn late(&self) -> f64 {
        self.send_late_p99.max(self.serve_late_p99)
    }

    /// In a line.
    pub fn brief(&self) -> String {
        let Self { requests, failed, timed_out, throughput, mean, p50, p99, p999, .. } = self;
        let (least, most) = self
            .backend_busy
            .iter()
            .fold((f64::INFINITY, 0.0_f64), |(least, most), busy| (least.min(*busy), most.max(*busy)));
        format!(
            "mean {} p50 {} p99 {} p99.9 {} ms · {}/s · {failed}+{timed_out} of {requests} failed · backends busy {:.0}–{:.0} % · balancer {:.1} % · late {:.1}/{:.1} ms · others {:.0} %",
            figure(*mean),
            figure(*p50),
            figure(*p99),
            figure(*p999),
            figure(*throughput),
            least * 100.0,
            most * 100.0,
            self.balancer_busy * 100.0,
            self.send_late_p99,
            self.serve_late_p99,
            self.foreign_busy * 100.0,
        )
    }
}

/// Runs a window.
///
/// # Errors
/// When a process does not start or ends; not when requests fail.
pub(super) fn run(
    machine: &Machine,
    balancer: Balancer,
    scenario: &Scenario,
    seed: u64,
) -> anyhow::Result<Window> {
    let folder = Folder::new()?;
    let gate = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut command = Command::new(&machine.myself);
    command.args(["race-backends", "--load", &gate.local_addr()?.to_string()]);
    command.args(["--scenario", &serde_json::to_string(scenario)?, "--seed", &seed.to_string()]);
    let mut backends = ProcessTree::spawn(&mut command, &[machine.load_cpu], folder.0.join("backends.log"))?;
    let mut link = Link::accept(&gate, || backends.check()).context("the backends")?;
    let places = places(&mut link, scenario)?;
    let mut tree =
        balancer::start(balancer, machine.installed(balancer)?, &places, &folder.0, machine.proxy_cpu)?;
    let control = (balancer.proxy() == Proxy::Trimtab).then_some(places.control);
    if let Err(error) = link.order(&Order::Join(control)) {
        bail!("{error}; backends: {}; balancer: {}", backends.last_words(), tree.last_words());
    }
    let arrivals = scenario.arrivals(seed);
    let (done, seen) = std::thread::scope(|scope| {
        let (trees, link) = ((&tree, &backends), &mut link);
        let started = Instant::now();
        let order = link.order(&Order::Go);
        let http = control.map(|_| places.http);
        let watch = scope.spawn(move || watch(machine, trees, link, http, scenario, started));
        let done = order.map_err(anyhow::Error::from).and_then(|_| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(load::run(places.listen, &arrivals, started.into())))
        });
        (done, watch.join())
    });
    tree.check().context("the balancer")?;
    backends.check().context("the backends")?;
    let Ok(seen) = seen else { bail!("the watch panicked") };
    Ok(summary(balancer, seed, scenario, &done?, seen?))
}

fn places(link: &mut Link, scenario: &Scenario) -> anyhow::Result<Places> {
    let Answer::Listening { backends, agents } = link.answer()? else {
        bail!("the backends do not say where they are");
    };
    let [listen, control, http] = [peer::free_address()?, peer::free_address()?, peer::free_address()?];
    let speeds = (0..BACKENDS).map(|backend| scenario.speed(backend)).collect();
    Ok(Places { listen, control, http, backends, agents, speeds })
}

/// What was seen from beside.
struct Seen {
    told: Told,
    account: Account,
    balancer_busy: f64,
    foreign_busy: f64,
}

/// What trimtab says of itself, summed over pages.
#[derive(Default)]
struct Told {
    pages: f64,
    weights: Vec<f64>,
    held: f64,
}

impl Told {
    fn add(&mut self, page: &Page) {
        self.pages += 1.0;
        self.weights.resize(BACKENDS, 0.0);
        for (backend, weight) in self.weights.iter_mut().enumerate() {
            *weight += page.sum("trimtab_resource_weight", &format!("\"b{backend}\""));
        }
        self.held += page.sum("trimtab_weights_held", "");
    }
}

/// Processor time until a moment: of the balancer, of load and backends, and of both processors.
struct Used {
    balancer: Duration,
    ours: Duration,
    proxy_processor: Duration,
    load_processor: Duration,
    at: Instant,
}

/// Tells the backends when the window begins and ends, and looks at processor time then.
fn watch(
    machine: &Machine,
    trees: (&ProcessTree, &ProcessTree),
    link: &mut Link,
    http: Option<SocketAddr>,
    scenario: &Scenario,
    started: Instant,
) -> anyhow::Result<Seen> {
    let sleep_until = |seconds: f64| {
        let until = started + Duration::from_secs_f64(seconds);
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    };
    sleep_until(scenario.warmup);
    link.order(&Order::Window)?;
    let before = used(machine, trees)?;
    let mut told = Told::default();
    while let Some(http) =
        http.filter(|_| started.elapsed().as_secs_f64() + 1.5 < scenario.warmup + scenario.window)
    {
        std::thread::sleep(Duration::from_secs(1));
        told.add(&Page::get(http)?);
    }
    sleep_until(scenario.warmup + scenario.window);
    let after = used(machine, trees)?;
    let Answer::Account(account) = link.order(&Order::Finish)? else {
        bail!("the backends give no account");
    };
    let wall = (after.at - before.at).as_secs_f64();
    let part = |after: Duration, before: Duration| after.saturating_sub(before).as_secs_f64() / wall;
    let (balancer, ours) = (part(after.balancer, before.balancer), part(after.ours, before.ours));
    let foreign = [
        part(after.proxy_processor, before.proxy_processor) - balancer,
        part(after.load_processor, before.load_processor) - ours,
    ];
    Ok(Seen { told, account, balancer_busy: balancer, foreign_busy: foreign[0].max(foreign[1]).max(0.0) })
}

fn used(machine: &Machine, (balancer, backends): (&ProcessTree, &ProcessTree)) -> anyhow::Result<Used> {
    let mine = clock_gettime(ClockId::ProcessCPUTime);
    let softirqs = process::softirq_thread_time;
    Ok(Used {
        balancer: balancer.cpu_time()? + softirqs(machine.proxy_cpu)?,
        ours: Duration::new(mine.tv_sec as u64, mine.tv_nsec as u32)
            + backends.cpu_time()?
            + softirqs(machine.load_cpu)?,
        proxy_processor: process::processor_busy(machine.proxy_cpu)?,
        load_processor: process::processor_busy(machine.load_cpu)?,
        at: Instant::now(),
    })
}

fn summary(balancer: Balancer, seed: u64, scenario: &Scenario, done: &[Done], seen: Seen) -> Window {
    let (from, until) = (scenario.warmup, scenario.warmup + scenario.window);
    let counted: Vec<&Done> = done.iter().filter(|one| one.due >= from).collect();
    let count = |outcome| counted.iter().filter(|one| one.outcome == outcome).count();
    let answered =
        done.iter().filter(|one| one.outcome == Outcome::Answered && (from..until).contains(&one.ended));
    let sorted_millis = |value: &dyn Fn(&Done) -> f64| {
        let mut millis: Vec<f64> = counted.iter().map(|one| value(one) * 1e3).collect();
        millis.sort_by(f64::total_cmp);
        millis
    };
    let latencies = sorted_millis(&Done::latency);
    let late = sorted_millis(&|one| one.sent - one.due);
    let Account { served, busy, late_p99, .. } = seen.account;
    Window {
        balancer,
        seed,
        requests: counted.len(),
        failed: count(Outcome::Failed),
        timed_out: count(Outcome::TimedOut),
        throughput: answered.count() as f64 / scenario.window,
        mean: latencies.iter().sum::<f64>() / latencies.len().max(1) as f64,
        p50: at_quantile(&latencies, 0.5),
        p99: at_quantile(&latencies, 0.99),
        p999: at_quantile(&latencies, 0.999),
        send_late_p99: at_quantile(&late, 0.99),
        serve_late_p99: late_p99 * 1e3,
        balancer_busy: seen.balancer_busy,
        foreign_busy: seen.foreign_busy,
        backend_busy: busy,
        backend_served: served,
        reports_accepted: seen.account.reports_accepted,
        reports_refused: seen.account.reports_refused,
        agent_checks: seen.account.agent_checks,
        weights: seen.told.weights.iter().map(|sum| sum / seen.told.pages.max(1.0)).collect(),
        weights_held: seen.told.held / seen.told.pages.max(1.0),
        agent_percent: seen.account.agent_percent,
        latencies,
    }
}

/// The least value that at least this part of all is not above; 0 where there are none.
pub(crate) fn at_quantile(sorted: &[f64], quantile: f64) -> f64 {
    let place = (sorted.len() as f64 * quantile).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=1000).map(f64::from).collect();
        let at = |quantile| at_quantile(&values, quantile);
        assert_eq!((at(0.5), at(0.99), at(0.999), at(1.0)), (500.0, 990.0, 999.0, 1000.0));
        assert_eq!(at_quantile(&[], 0.5), 0.0);
    }
}
