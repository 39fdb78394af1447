//! `trimtab demo`: the whole thing on one machine, in one process tree, without root and without a network.
//!
//! Owns: what runs where, the load, the live lines, stopping it all. Everything that runs is this same executable with
//! the commands that anyone would use: `serve` with a file, and an `agent` beside each service. The services
//! ([`service`]) stand for machines of one core each.
//!
//! ```text
//! demo --load--> serve (balancer) --flows--> red, green, blue: demo-service at 127.0.0.11..13
//!   |                |       ^ register, report  | how busy its process is, in a file
//!   |     publishes  v       +-- agent x 3 <-----+
//!   +- pipes        DNS, zone demo.test -- where is it? --> agents
//! ```

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use discovery::TsigKey;
use tempfile::TempDir;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use agent::Transport;

use crate::admin::{Admin, ResourceView, StateView};
use crate::cli::DemoArgs;
use crate::config::{CONTROL_LISTEN_DEFAULT, HTTP_LISTEN_DEFAULT};
use crate::failure::Failure;
use crate::output::print;
use crate::signals::Signals;
use child::Process;
use load::{Load, Served};

mod child;
mod dns;
mod load;
pub mod service;

const POOL: &str = "demo";
const NAMES: [&str; 3] = ["red", "green", "blue"];
const LISTEN_PORT: u16 = 7000;
const SERVICE_PORT: u16 = 7101;
const DNS_PORT: u16 = 7053;
/// How far to look for a free port beyond the usual one.
const PORTS_TRIED: u16 = 100;
/// A child that is not up by then never will be.
const START_TIMEOUT: Duration = Duration::from_secs(15);
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// When `--stress` begins: long enough to see the even shares before.
const STRESS_AFTER: Duration = Duration::from_secs(5);

/// Where everything is.
#[derive(Debug)]
struct Plan {
    folder: TempDir,
    listen: SocketAddr,
    control: SocketAddr,
    http: SocketAddr,
    dns: SocketAddr,
    key: TsigKey,
    services: [SocketAddr; 3],
}

/// What runs.
#[derive(Debug)]
struct Fleet {
    services: Vec<Process>,
    agents: Vec<Process>,
    balancer: Process,
}

/// Runs the demo until Ctrl-C, or for `--seconds`.
///
/// # Errors
/// When something cannot be started, or the balancer ends.
pub fn run(args: &DemoArgs) -> Result<(), Failure> {
    let stop = Signals::install(false).and_then(Signals::into_future);
    let stop = stop.map_err(|error| Failure::start(format!("cannot listen for signals: {error}")))?;
    let plan = Plan::make()?;
    let mut fleet = Fleet::start(&plan)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::start(format!("cannot make an event loop: {error}")))?;
    let ended = runtime.block_on(async {
        tokio::select! {
            ended = show(args, &plan, &mut fleet) => ended,
            () = stop => print("\nstopping\n"),
        }
    });
    // The load ends first, so that nothing is refused while the rest leaves.
    drop(runtime);
    fleet.stop();
    ended
}

impl Plan {
    fn make() -> Result<Self, Failure> {
        let folder = tempfile::Builder::new().prefix("trimtab-demo-").tempdir();
        let folder =
            folder.map_err(|error| Failure::start(format!("cannot make a temporary folder: {error}")))?;
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let service = |host| free_address(IpAddr::V4(Ipv4Addr::new(127, 0, 0, host)), SERVICE_PORT);
        Ok(Self {
            folder,
            listen: free_address(loopback, LISTEN_PORT)?,
            control: free_address(loopback, CONTROL_LISTEN_DEFAULT.port())?,
            http: free_address(loopback, HTTP_LISTEN_DEFAULT.port())?,
            dns: free_address(loopback, DNS_PORT)?,
            key: new_key()?,
            services: [service(11)?, service(12)?, service(13)?],
        })
    }

    /// The balancer's configuration. Who is in the pool is not in it; whoever wants to be finds it in DNS.
    fn config(&self) -> String {
        let (key_file, zone) = (self.key_file().display().to_string(), dns::ZONE);
        format!(
            "[control]\nlisten = \"{}\"\n[http]\nlisten = \"{}\"\n[dataplane]\nworkers = 1\ndrain_timeout = \"1s\"\n\
             [store]\npath = {:?}\n\
             [[pool]]\nname = \"{POOL}\"\n[[listener]]\nbind = \"tcp://{}\"\npool = \"{POOL}\"\n\
             [[dns]]\nzone = \"{zone}\"\nserver = \"{}\"\nkey_file = {key_file:?}\nname = \"lb1\"\nttl = \"2s\"\n",
            self.control,
            self.http,
            self.folder.path().join("trimtab.db"),
            self.listen,
            self.dns
        )
    }

    fn key_file(&self) -> std::path::PathBuf {
        self.folder.path().join("tsig.key")
    }

    fn utilization_file(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(format!("{name}.utilization.json"))
    }

    /// Says which usual ports were taken.
    fn taken(&self) -> String {
        let mut out = String::new();
        let usual = [
            ("listener", self.listen, LISTEN_PORT),
            ("control", self.control, CONTROL_LISTEN_DEFAULT.port()),
            ("http", self.http, HTTP_LISTEN_DEFAULT.port()),
            ("DNS", self.dns, DNS_PORT),
        ];
        for (what, address, usual) in usual {
            if address.port() != usual {
                let _ = writeln!(out, "port {usual} is taken; {what} is at {} instead", address.port());
            }
        }
        out
    }
}

impl Fleet {
    fn start(plan: &Plan) -> Result<Self, Failure> {
        let config = plan.folder.path().join("trimtab.toml");
        for (file, text) in [(plan.key_file(), plan.key.file_text()), (config.clone(), plan.config())] {
            std::fs::write(&file, text)
                .map_err(|error| Failure::start(format!("cannot write {}: {error}", file.display())))?;
        }
        dns::start(plan.dns, &plan.key)?;
        let mut balancer = start("balancer", ["serve", "-c"], [path(&config), "--with-parent".into()])?;
        let (mut services, mut agents) = (Vec::new(), Vec::new());
        for (name, address) in NAMES.into_iter().zip(plan.services) {
            let file = path(&plan.utilization_file(name));
            let address = OsString::from(address.to_string());
            let mut service = start(
                format!("{name}'s service"),
                ["demo-service", "--with-parent", "--utilization-file"],
                [file.clone(), name.into(), address.clone()],
            )?;
            // An agent would wait for a service that does not answer yet, and say so.
            service.wait_for_line("ready", START_TIMEOUT).map_err(Failure::start)?;
            services.push(service);
            agents.push(start(
                format!("{name}'s agent"),
                ["agent", "--with-parent", "--pool", POOL, "--id", name],
                [
                    "--discover".into(),
                    dns::ZONE.into(),
                    "--dns".into(),
                    plan.dns.to_string().into(),
                    "--address".into(),
                    address,
                    "--utilization-file".into(),
                    file,
                ],
            )?);
        }
        balancer.wait_for_line("ready", START_TIMEOUT).map_err(Failure::start)?;
        Ok(Self { services, agents, balancer })
    }

    /// Agents first, so that they deregister; then the balancer, which drains.
    fn stop(&mut self) {
        for process in self.agents.iter_mut().chain([&mut self.balancer]).chain(&mut self.services) {
            process.stop(STOP_TIMEOUT);
        }
    }

    /// Says who ended since this was asked last.
    fn newly_ended(&mut self) -> String {
        let mut out = String::new();
        for process in self.agents.iter_mut().chain(&mut self.services).chain([&mut self.balancer]) {
            if let Some(how) = process.newly_ended() {
                let _ = writeln!(out, "      -- {how}");
            }
        }
        out
    }
}

/// Waits until all have registered, says what there is, and then a line a second.
async fn show(args: &DemoArgs, plan: &Plan, fleet: &mut Fleet) -> Result<(), Failure> {
    let control = format!("http://{}", plan.control);
    let mut admin = Admin::connect_to(&control, &Transport::default()).await?;
    wait_for_resources(&mut admin).await?;
    print(&introduction(args, plan, fleet))?;

    let load = Load::start(plan.listen);
    let start = Instant::now();
    let mut stress = Stress::new(args);
    let mut tick = interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.tick().await;
    for second in 1_u64.. {
        tick.tick().await;
        let resources = admin.resources(POOL).await.unwrap_or_default();
        print(&format!("{}{}", live_line(second, &load.take(), &resources), fleet.newly_ended()))?;
        if fleet.balancer.has_ended() {
            return Err(Failure::start("the demo's balancer ended; without it there is nothing to show"));
        }
        print(&stress.step(start.elapsed(), fleet))?;
        if args.seconds.is_some_and(|seconds| second >= seconds) {
            return print("done; stopping\n");
        }
    }
    Ok(())
}

async fn wait_for_resources(admin: &mut Admin) -> Result<(), Failure> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let resources = admin.resources(POOL).await?;
        let ready = resources.iter().filter(|resource| resource.state == StateView::Ready).count();
        if ready == NAMES.len() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Failure::start(format!(
                "only {ready} of the demo's {} services registered within {START_TIMEOUT:?}",
                NAMES.len()
            )));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

fn introduction(args: &DemoArgs, plan: &Plan, fleet: &Fleet) -> String {
    let Plan { listen, control, http, dns, .. } = plan;
    let mut out = plan.taken();
    let _ = writeln!(out, "balancer      tcp://{listen}   pid {}", fleet.balancer.pid());
    let _ = writeln!(
        out,
        "  control     http://{control}   where agents register and report, and admin commands ask"
    );
    let _ = writeln!(out, "  metrics     http://{http}/metrics");
    let _ = writeln!(out, "DNS           {dns}   zone {}: the balancer publishes itself there", dns::ZONE);
    for (index, name) in NAMES.iter().enumerate() {
        let (service, agent) = (fleet.services[index].pid(), fleet.agents[index].pid());
        let _ =
            writeln!(out, "{name:<13} tcp://{}  pid {service}, its agent pid {agent}", plan.services[index]);
    }
    let exe = std::env::args().next().unwrap_or_else(|| "trimtab".into());
    let _ = write!(
        out,
        "\nNo file names red, green or blue: their agents found the balancer in DNS and registered them. Each stands for a machine of one core, and\n\
         reports the CPU time of its service over that core. The load is 100 short connections a second and a few long.\n\
         \nTry, in another terminal:\n  \
           nc {} {}                      who answers? type a line; again\n  \
           curl http://{http}/metrics\n  \
           dig @{} -p {} SRV _trimtab._tcp.{}\n  \
           {exe} dns --control http://{control}\n  \
           {exe} resources --control http://{control}\n  \
           {exe} explain {POOL} --control http://{control}\n  \
           {exe} drain red --control http://{control}    and: {exe} ready red …\n  \
           kill {}                             stop red's service: its open connections are cut, new ones go elsewhere\n",
        listen.ip(),
        listen.port(),
        dns.ip(),
        dns.port(),
        dns::ZONE,
        fleet.services[0].pid(),
    );
    if args.stress.is_none() {
        let _ = writeln!(
            out,
            "  {exe} demo --stress green              one gets busy, and traffic moves away from it"
        );
    }
    let _ =
        writeln!(out, "Ctrl-C stops it all.\n\n   new connections in each second | share of the next ones");
    out
}

/// `  12s  red 34  green 33  blue 34 | share 33% 34% 33%`
fn live_line(second: u64, served: &Served, resources: &[ResourceView]) -> String {
    let mut line = format!("{second:>4}s ");
    for name in NAMES {
        let _ = write!(line, " {name} {:<3}", served.by_name.get(name).copied().unwrap_or(0));
    }
    line.push_str("| share");
    for name in NAMES {
        match resources.iter().find(|resource| resource.id == name) {
            Some(resource) => {
                let _ = write!(line, " {:>2.0}%", resource.share * 100.0);
            }
            None => line.push_str("   -"),
        }
    }
    if served.failed > 0 {
        let _ = write!(line, " | {} new ones failed", served.failed);
    }
    if served.cut > 0 {
        let _ = write!(line, " | {} open ones cut", served.cut);
    }
    line.push('\n');
    line
}

/// When the named service's machine is busy.
#[derive(Debug)]
struct Stress {
    /// Index in [`NAMES`].
    who: Option<usize>,
    begin: Duration,
    end: Duration,
    on: bool,
}

impl Stress {
    fn new(args: &DemoArgs) -> Self {
        let who = args.stress.as_deref().and_then(|name| NAMES.iter().position(|known| *known == name));
        let end = STRESS_AFTER + Duration::from_secs(args.stress_seconds);
        Self { who, begin: STRESS_AFTER, end, on: false }
    }

    /// Begins or ends it when its time has come, and says so.
    fn step(&mut self, now: Duration, fleet: &mut Fleet) -> String {
        let Some(who) = self.who else { return String::new() };
        let wanted = (self.begin..self.end).contains(&now);
        if wanted == self.on {
            return String::new();
        }
        self.on = wanted;
        fleet.services[who].tell(if wanted { "busy" } else { "calm" });
        let name = NAMES[who];
        if wanted {
            let seconds = (self.end - self.begin).as_secs();
            format!(
                "      -- {name} gets busy: for {seconds} s a thread of its process really burns its core\n"
            )
        } else {
            format!("      -- {name} is calm again; its share comes back as its reports say so\n")
        }
    }
}

fn start<const A: usize, const B: usize>(
    name: impl Into<String>,
    first: [&str; A],
    then: [OsString; B],
) -> Result<Process, Failure> {
    let name = name.into();
    let args: Vec<OsString> = first.into_iter().map(OsString::from).chain(then).collect();
    Process::start(&name, &args).map_err(|error| Failure::start(format!("cannot start {name}: {error}")))
}

/// A key that nobody else has.
fn new_key() -> Result<TsigKey, Failure> {
    let mut secret = [0; 32];
    let mut random =
        std::fs::File::open("/dev/urandom").map_err(|error| Failure::start(error.to_string()))?;
    random.read_exact(&mut secret).map_err(|error| Failure::start(error.to_string()))?;
    TsigKey::new("demo", &secret).map_err(|error| Failure::start(error.to_string()))
}

fn path(path: &Path) -> OsString {
    path.as_os_str().to_owned()
}

/// The usual port, or the next free one. Somebody may take it before its owner binds it; then that one says so.
fn free_address(ip: IpAddr, usual: u16) -> Result<SocketAddr, Failure> {
    let mut refused = None;
    for port in usual..usual + PORTS_TRIED {
        let address = SocketAddr::new(ip, port);
        match TcpListener::bind(address) {
            Ok(_) => return Ok(address),
            Err(error) => refused = Some(error),
        }
    }
    let why = refused.map_or_else(String::new, |error| format!(": {error}"));
    Err(Failure::start(format!("no port of {ip} from {usual} to {} is free{why}", usual + PORTS_TRIED - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn live_lines() {
        let served =
            Served { by_name: BTreeMap::from([("red".into(), 34), ("blue".into(), 5)]), failed: 2, cut: 1 };
        assert_eq!(
            live_line(12, &served, &[]),
            "  12s  red 34  green 0   blue 5  | share   -   -   - | 2 new ones failed | 1 open ones cut\n"
        );
    }

    #[test]
    fn a_taken_port_is_passed_over() {
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let taken = TcpListener::bind((ip, 0)).expect("a free port");
        let port = taken.local_addr().expect("its address").port();
        if port < u16::MAX - PORTS_TRIED {
            assert_ne!(free_address(ip, port).expect("another port").port(), port);
        }
    }

    #[test]
    fn its_configuration_is_one() {
        let plan = Plan::make().expect("free ports");
        std::fs::write(plan.key_file(), plan.key.file_text()).expect("our own folder");
        crate::config::Config::parse(plan.config().as_bytes()).expect("a good file");
    }
}
