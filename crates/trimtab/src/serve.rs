//! `trimtab serve`: dataplane and control, wired by the tables that one publishes and the other reads.
//!
//! ```text
//! parse -> bind all -> start workers -> Ready -> … SIGTERM -> Draining -> workers end -> Terminated -> control ends
//! ```

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use allocation::{AllocationTable, PoolName, Publisher};
use control::{Control, ControlConfig, Phase};
use dataplane::{Bound, PoolShare, Target};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use registry::{Limits, PoolConfig};
use store::Store;

use crate::cli::ServeArgs;
use crate::config::{Config, EndpointConfig, ListenerConfig};
use crate::failure::Failure;
use crate::units::ListenAddress;
use crate::upstream::Upstreams;
use crate::{check, host_name, life, publishing};

/// Threads of control. Cores belong to the dataplane; reports of thousands of resources need less than one.
const CONTROL_THREADS: usize = 2;
/// Threads that render metrics.
const BLOCKING_THREADS_MAX: usize = 2;
/// How long control may take to say goodbye when all flows have ended.
const CONTROL_END_TIMEOUT: Duration = Duration::from_secs(5);
/// Most resources in one pool: what the allocation table is measured with.
const RESOURCES_MAX: usize = 100_000;

/// Balances until it is told to stop.
///
/// # Errors
/// When the configuration is wrong, something cannot be bound, or a worker or control fails.
pub fn run(args: &ServeArgs) -> Result<(), Failure> {
    let config = check::load(&args.config)?;
    let mut signals = life::signals(args.with_parent)?;
    life::raise_descriptor_limit();
    let runtime = runtime()?;

    let store = open_store(&config)?;
    let pools = Pools::of(&config);
    let dns = discovery::Statuses::default();
    let (bound, mut control) = bind(&config, &pools, store, &runtime, &dns)?;
    let publications = publishing::publications(&config, &bound.addresses(), control.control_address())?;
    let lines = lines(&config, &bound, &control);
    let addresses: Vec<SocketAddr> = bound.addresses();
    let offers = control.offers();
    if config.store.is_none() {
        tracing::info!(
            "no store is configured ([store] path): a restart forgets resources until they register again"
        );
    }

    let (phase, seen) = watch::channel(Phase::Starting);
    let mut control = Some(runtime.spawn(control.run(seen)));
    let dataplane = bound.start().map_err(Failure::start)?;
    phase.send_replace(Phase::Ready);
    let mut upstreams = Upstreams::start(&config, &addresses, offers, runtime.handle())?;
    let publisher = publishing::start(&runtime, publications, &dns);
    life::announce(&lines);

    let drained = life::run(
        dataplane,
        &mut signals,
        config.dataplane.drain_timeout,
        || control_lives(&runtime, &mut control),
        || {
            phase.send_replace(Phase::Draining);
            upstreams.leave(runtime.handle());
            publisher.withdraw();
        },
    );
    phase.send_replace(Phase::Terminated);
    let ended = end_control(&runtime, control);
    // Began with the drain, and takes two seconds from then on at most. Who leaves at a second signal does not wait.
    if !matches!(drained, Err(Failure::SecondSignal(_))) {
        runtime.block_on(publisher.withdrawn());
    }
    runtime.shutdown_background();
    drained.and(ended)
}

/// Before anything is bound: a balancer that cannot remember must not begin to forget.
fn open_store(config: &Config) -> Result<Option<Store>, Failure> {
    let Some(path) = &config.store else { return Ok(None) };
    Store::open(path).map(Some).map_err(|error| Failure::start(error.to_string()))
}

/// Each pool's tables, by the pool's place in the configuration: one for its own requirement, and one for each that its
/// listeners have beyond it.
struct Pools(Vec<Vec<Publisher>>);

impl Pools {
    fn of(config: &Config) -> Self {
        let empty = |pool: &PoolConfig| Publisher::new(AllocationTable::empty(pool.policy));
        let tables = |pool: &PoolConfig| (0..=pool.tables.len()).map(|_| empty(pool)).collect();
        Self(config.pools.iter().map(tables).collect())
    }

    /// A pool that serves a listener, with its table for it.
    fn target(
        &self,
        config: &Config,
        pool: &PoolName,
        listener: &ListenerConfig,
        shares: &[Option<PoolShare>],
    ) -> Option<Target> {
        let place = config.pools.iter().position(|known| known.name == *pool)?;
        let table = self.0[place].get(config.table_of(pool, listener)).cloned()?;
        let connecting = config.connecting.get(place)?.clone();
        let share = shares.get(place).cloned().flatten();
        Some(Target { pool: pool.clone(), table, connecting, share })
    }
}

/// Binds everything, or says everything that cannot be bound.
fn bind(
    config: &Config,
    pools: &Pools,
    store: Option<Store>,
    runtime: &Runtime,
    dns: &discovery::Statuses,
) -> Result<(Bound, Control), Failure> {
    let bound = dataplane::bind(dataplane_config(config, pools)).map_err(|errors| {
        let mut reasons: Vec<String> = errors.iter().map(listener_reason).collect();
        reasons.extend(refused("control.listen", config.control));
        reasons.extend(refused("http.listen", config.http));
        Failure::Start(reasons)
    })?;
    let control = runtime.block_on(Control::bind(control_config(config, pools, store, &bound, dns)));
    let control = control.map_err(|error| {
        let mut reasons = vec![error.to_string()];
        if matches!(error, control::StartError::Bind { key: "control.listen", .. }) {
            reasons.extend(refused("http.listen", config.http));
        }
        Failure::Start(reasons)
    })?;
    if config.http.insecure && !config.http.listen.ip().is_loopback() {
        tracing::warn!(address = %config.http.listen, "http listens beyond loopback: anyone who reaches it can read metrics");
    }
    Ok((bound, control))
}

/// What control would say of an address that it was not asked to bind because something else had failed already.
fn refused(key: &'static str, endpoint: EndpointConfig) -> Option<String> {
    let source = TcpListener::bind(endpoint.listen).err()?;
    Some(control::StartError::Bind { key, address: endpoint.listen, source }.to_string())
}

fn listener_reason(error: &dataplane::StartError) -> String {
    use dataplane::StartError::{AddressInUse, Bind, Engine};
    match error {
        AddressInUse { .. } | Bind { .. } => format!("listener.bind: {error}"),
        Engine { .. } => format!("dataplane.engine: {error}"),
        _ => error.to_string(),
    }
}

fn dataplane_config(config: &Config, pools: &Pools) -> dataplane::Config {
    // One for each pool, whichever listeners serve it.
    let shares: Vec<_> = config.pool_knobs.iter().map(|knobs| PoolShare::new(*knobs, random())).collect();
    let listeners = config.listeners.iter().filter_map(|listener| {
        // The configuration was refused if a listener names no pool, or a route one that there is not.
        let targets: Option<Vec<_>> =
            listener.pools().map(|pool| pools.target(config, pool, listener, &shares)).collect();
        Some(dataplane::ListenerConfig {
            bind: listener.bind.0,
            last_port: listener.last_port,
            proxy: listener.proxy_protocol.clone(),
            routes: listener.routes.clone(),
            targets: targets?,
            tcp: listener.tcp.clone(),
            limits: listener.limits,
        })
    });
    let mut made = dataplane::Config::new(listeners.collect());
    let told = &config.dataplane;
    made.workers = told.workers;
    made.limits.flows_max = told.flows_max;
    made.limits.buffers_max = told.buffers_max;
    made.limits.connect_retries = told.connect_retries;
    made.timeouts.connect = told.connect_timeout;
    made.timeouts.preface = told.preface_timeout;
    made.timeouts.idle = told.idle_timeout;
    made.timeouts.keepalive = told.keepalive;
    made.sources = told.source_addresses.clone();
    made.engine = told.engine.named();
    made.decision_sample = config.decisions.sample;
    made.access_log = config.access_log.clone();
    made
}

/// A number that nobody outside can foresee.
fn random() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::hash::RandomState::new().build_hasher().finish()
}

fn control_config(
    config: &Config,
    pools: &Pools,
    store: Option<Store>,
    bound: &Bound,
    dns: &discovery::Statuses,
) -> ControlConfig {
    let addresses: Vec<_> = config.listeners.iter().zip(bound.addresses()).collect();
    let checked = config.pools.iter().zip(&config.checks);
    let pools = checked.zip(&pools.0).map(|((pool, check), publishers)| control::Pool {
        config: pool.clone(),
        check: check.clone(),
        publishers: publishers.clone(),
        listeners: addresses
            .iter()
            .filter(|(listener, _)| listener.pools().any(|name| *name == pool.name))
            .map(|(_, address)| ListenAddress(*address).to_string())
            .collect(),
    });
    ControlConfig {
        listen: config.control.listen,
        http: config.http.listen,
        insecure: config.control.insecure,
        security: config.security.clone(),
        balancer_id: balancer_id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pools: pools.collect(),
        dataplane: bound.view(),
        origin: bound.origin(),
        limits: Limits { resources_max: RESOURCES_MAX, ..Limits::default() },
        alternatives: config.notices.alternatives.clone(),
        zones: publishing::zones(config),
        maintenance: config.notices.maintenance.clone(),
        decision_log: config.decisions.log.clone(),
        pull: config.pull.clone(),
        providers: config.providers.clone(),
        dns: dns.clone(),
        store,
    }
}

/// New with every start: the host, the moment and the process.
fn balancer_id() -> String {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}/{}-{}", host_name(), since_1970.as_millis(), std::process::id())
}

/// What scripts wait for: where everything listens, with the ports that were really bound.
fn lines(config: &Config, bound: &Bound, control: &Control) -> String {
    let listening = |(listener, address): (&ListenerConfig, SocketAddr)| {
        let range = listener.last_port.map(|last| format!("-{last}")).unwrap_or_default();
        format!("listening {}{range} pool={}\n", ListenAddress(address), listener.pool)
    };
    let listeners: String = config.listeners.iter().zip(bound.addresses()).map(listening).collect();
    format!(
        "{listeners}control {}://{}\nhttp http://{}\nready\n",
        control.control_scheme(),
        control.control_address(),
        control.http_address()
    )
}

fn runtime() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(|error| Failure::start(format!("cannot make an event loop: {error}")))
}

type Running = JoinHandle<Result<(), control::RunError>>;

/// Control ends only when it is told to: anything else is a fault.
fn control_lives(runtime: &Runtime, control: &mut Option<Running>) -> Result<(), Failure> {
    match control.take_if(|running| running.is_finished()) {
        None => Ok(()),
        Some(ended) => {
            joined(runtime.block_on(ended))?;
            Err(Failure::Fault(anyhow::anyhow!("control ended though nobody asked it to")))
        }
    }
}

fn end_control(runtime: &Runtime, control: Option<Running>) -> Result<(), Failure> {
    let Some(running) = control else { return Ok(()) };
    match runtime.block_on(async { tokio::time::timeout(CONTROL_END_TIMEOUT, running).await }) {
        Ok(ended) => joined(ended),
        Err(_) => {
            tracing::warn!("a peer kept its connection to control open; it is cut");
            Ok(())
        }
    }
}

fn joined(ended: Result<Result<(), control::RunError>, tokio::task::JoinError>) -> Result<(), Failure> {
    ended.map_err(|error| Failure::Fault(error.into()))?.map_err(|error| Failure::Fault(error.into()))
}
