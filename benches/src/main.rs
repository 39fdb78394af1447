//! `bench proxies`: trimtab beside its peers. `bench select`: the cost of a selection and of a new table.
//! `bench sim`: allocation policies in simulated fleets. `bench soak`: load that lasts or hurts.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use benches::case::Case;
use benches::floor;
use benches::measure::Conditions;
use benches::peer::{Installed, Proxy};
use benches::process;
use benches::race;
use benches::report::Report;
use benches::reports;
use benches::rounds::{self, Plan};
use benches::seconds;
use benches::select;
use benches::sim;
use benches::soak;
use benches::workers;
use clap::{Args, Parser, Subcommand};
use signal_hook::consts::{SIGINT, SIGTERM};

/// How fast trimtab is, and how fast its peers are, here.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// trimtab, HAProxy, nginx and Envoy as one-worker TCP proxies, interleaved round by round
    Proxies(ProxiesArguments),
    /// What a second worker adds, where every processor has a worker and a load
    Workers(workers::WorkersArguments),
    /// Nanoseconds for a selection and for a new allocation table
    Select(SelectArguments),
    /// Allocation policies, trimtab's and others', in simulated fleets
    Sim(SimArguments),
    /// How long clients wait behind trimtab and HAProxy where backends are unequal and disturbed
    Race(race::RaceArguments),
    /// What a report costs the balancer, and how soon selections follow it
    Reports(reports::ReportsArguments),
    /// Whether trimtab stays right, bounded and alive under load that lasts or hurts
    Soak(soak::SoakArguments),
    /// The backends of a race; it starts them itself
    #[command(hide = true)]
    RaceBackends(race::BackendsArguments),
    /// The proxy `floor`; it starts it itself
    #[command(hide = true)]
    Floor(floor::FloorArguments),
}

#[derive(Debug, Args)]
struct ProxiesArguments {
    /// Cases, by name or beginning (`connect` is both kinds of it); all without it
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Who takes part; those that are not installed are left out
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = Proxy::USUAL)]
    proxies: Vec<Proxy>,
    /// Rounds
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Length of a measurement
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    /// Length of the warm-up before each
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    warmup: f64,
    /// Operations a second for ping64x64@rate; half of what the slowest proxy manages without it
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Times that a measurement is repeated when other processes used more than a twentieth of either processor in it
    #[arg(long, default_value_t = 3)]
    retries: u16,
    /// Processor for the proxies
    #[arg(long, default_value_t = 1)]
    proxy_cpu: usize,
    /// Processor for clients and backends
    #[arg(long, default_value_t = 0)]
    load_cpu: usize,
    /// Write everything measured here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables here as well
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct SelectArguments {
    /// Write everything measured here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct SimArguments {
    /// Scenarios by name; all without it
    #[arg(long = "scenario", value_name = "NAME", value_delimiter = ',')]
    scenarios: Vec<String>,
    /// Policies by name; all without it
    #[arg(long = "policy", value_name = "NAME", value_delimiter = ',')]
    policies: Vec<String>,
    /// Seeds, from 1 on
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    seeds: u16,
    /// Seconds that are measured, where a scenario leaves it open
    #[arg(long, value_parser = seconds)]
    seconds: Option<f64>,
    /// Runs at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Write everything measured here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables here as well
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: What) -> anyhow::Result<()> {
    match command {
        What::Proxies(arguments) => proxies(&arguments),
        What::Workers(arguments) => two_workers(&arguments),
        What::Select(arguments) => {
            let micros = select::run();
            print!("{}", select::markdown(&micros));
            write(arguments.json.as_ref(), || Ok(serde_json::to_string_pretty(&micros)?))
        }
        What::Sim(arguments) => simulate(&arguments),
        What::Race(arguments) => {
            let report = race::run(&arguments, &mut |line| eprintln!("{line}"))?;
            print!("{}", report.markdown());
            write(arguments.markdown.as_ref(), || Ok(report.markdown()))?;
            write(arguments.json.as_ref(), || Ok(serde_json::to_string_pretty(&report)?))
        }
        What::Reports(arguments) => {
            let report = reports::run(&arguments, &mut |line| eprintln!("{line}"))?;
            print!("{}", report.markdown());
            write(arguments.json.as_ref(), || Ok(serde_json::to_string_pretty(&report)?))
        }
        What::Soak(arguments) => match soak::run(&arguments, &mut |line| eprintln!("{line}"))? {
            soak::Outcome::Elsewhere(held) => {
                ensure!(held, "not every check held");
                Ok(())
            }
            soak::Outcome::Report(report) => {
                print!("{}", report.markdown());
                write(arguments.json.as_ref(), || Ok(serde_json::to_string_pretty(&report)?))?;
                ensure!(report.failed() == 0, "{} checks failed", report.failed());
                Ok(())
            }
        },
        What::RaceBackends(arguments) => race::serve(&arguments),
        What::Floor(arguments) => floor::run(&arguments),
    }
}

fn simulate(arguments: &SimArguments) -> anyhow::Result<()> {
    let options = sim::Options {
        scenarios: arguments.scenarios.clone(),
        policies: arguments.policies.clone(),
        seeds: arguments.seeds.into(),
        seconds: arguments.seconds,
        jobs: arguments.jobs,
    };
    let began = Instant::now();
    let mut progress = |scenario: &str| eprintln!("{:6.1} s  {scenario}", began.elapsed().as_secs_f64());
    let report = sim::run(&options, &mut progress).map_err(anyhow::Error::msg)?;
    let tables = report.markdown();
    println!("{tables}");
    write(arguments.markdown.as_ref(), || Ok(tables.clone()))?;
    write(arguments.json.as_ref(), || Ok(serde_json::to_string_pretty(&report)?))?;
    if report.missed() > 0 {
        eprintln!("{} bounds missed", report.missed());
    }
    Ok(())
}

fn proxies(arguments: &ProxiesArguments) -> anyhow::Result<()> {
    let plan = plan(arguments)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("handling signals")?;
    }
    process::kill_all_on_panic();
    process::raise_descriptor_limit().context("raising the limit of open files")?;
    let ProxiesArguments { proxy_cpu, load_cpu, .. } = *arguments;
    process::pin_to(load_cpu).with_context(|| format!("running on processor {load_cpu} (--load-cpu)"))?;
    let conditions = Conditions {
        warmup: Duration::from_secs_f64(arguments.warmup),
        window: Duration::from_secs_f64(arguments.seconds),
        proxy_cpu,
        load_cpu,
        rate: 0.0,
        interrupted,
    };
    let outcome = rounds::run(&plan, &conditions, &mut |line| eprintln!("{line}"));
    let report = Report::new(&plan, &conditions, &outcome);
    let tables = report.markdown();
    println!("{tables}");
    write(arguments.markdown.as_ref(), || Ok(tables.clone()))?;
    write(arguments.json.as_ref(), || Ok(serde_json::to_string_pretty(&report)?))?;
    ensure!(!outcome.interrupted, "interrupted: what is above is what there was");
    ensure!(outcome.failures.is_empty(), "{} measurements failed", outcome.failures.len());
    Ok(())
}

fn two_workers(arguments: &workers::WorkersArguments) -> anyhow::Result<()> {
    process::kill_all_on_panic();
    process::kill_all_on_signal().context("handling signals")?;
    process::raise_descriptor_limit().context("raising the limit of open files")?;
    for cpu in &arguments.cpus {
        ensure!(process::may_use(*cpu)?, "this process may not run on processor {cpu}: choose --cpus");
    }
    let conditions = Conditions {
        warmup: Duration::from_secs(1),
        window: Duration::from_secs_f64(arguments.seconds),
        proxy_cpu: arguments.cpus[0],
        load_cpu: arguments.cpus[0],
        rate: 0.0,
        interrupted: Arc::default(),
    };
    let report = workers::run(arguments, &conditions, &mut |line| eprintln!("{line}"))?;
    print!("{}", report.markdown());
    write(arguments.json.as_ref(), || Ok(serde_json::to_string_pretty(&report)?))
}

/// Parses what arguments cannot check by themselves, and looks who is there.
fn plan(arguments: &ProxiesArguments) -> anyhow::Result<Plan> {
    let mut cases: Vec<Case> = Vec::new();
    for text in &arguments.cases {
        cases.extend(Case::named(text).map_err(anyhow::Error::msg)?);
    }
    if cases.is_empty() {
        cases = Case::ALL.to_vec();
    }
    cases.sort();
    cases.dedup();
    ensure!(
        arguments.proxy_cpu != arguments.load_cpu,
        "the load must not run on the processor of what it measures: --proxy-cpu and --load-cpu are both {}",
        arguments.load_cpu
    );
    for cpu in [arguments.proxy_cpu, arguments.load_cpu] {
        ensure!(
            process::may_use(cpu)?,
            "this process may not run on processor {cpu}: choose --proxy-cpu and --load-cpu"
        );
    }
    let mut wanted = arguments.proxies.clone();
    wanted.sort();
    wanted.dedup();
    let mut proxies = Vec::new();
    for proxy in wanted {
        match Installed::find(proxy) {
            Ok(installed) => proxies.push(installed),
            Err(missing) => eprintln!("{missing}"),
        }
    }
    if proxies.is_empty() {
        bail!("there is nobody to measure");
    }
    let (rounds, retries) = (arguments.rounds.into(), arguments.retries.into());
    Ok(Plan { cases, proxies, rounds, retries, rate: arguments.rate })
}

fn write(file: Option<&PathBuf>, text: impl FnOnce() -> anyhow::Result<String>) -> anyhow::Result<()> {
    let Some(file) = file else { return Ok(()) };
    fs::write(file, text()? + "\n").with_context(|| format!("writing {}", file.display()))
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (1.0..=10_000_000.0).contains(&rate) => Ok(rate),
        _ => Err("it takes 1 to 10000000".to_owned()),
    }
}
