//! Binding, starting, draining and ending: the life of the dataplane as the binary sees it.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use allocation::PoolName;
use allocation::telemetry::DataplaneView;
use flow::Tuning;
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CpuSet, sched_getaffinity};
use uring::{Ring, SetupError};

use crate::access::{self, AccessLog, AccessLogTo};
use crate::clock::Clock;
use crate::config::{Config, Limits, ListenerConfig, Protocol, Target, Timeouts};
use crate::engine::{Engine, Epoll, ProbeError, TokioUring, choose, next_best};
use crate::io::Io;
use crate::listen;
use crate::pipes::PIPES_MAX;
use crate::stats::{ListenerNames, Stats, WorkerStats};
use crate::tcp::{ListenError, Refused};
use crate::towards::Towards;
use crate::worker::admit::Gate;
use crate::worker::udp::UdpShared;
use crate::worker::{self, ListenerSetup, Sorter, TargetSetup, Worker, WorkerSetup};

/// Descriptors kept back from flows for rings, listeners, control, files; and for each worker's pipes.
const DESCRIPTORS_RESERVED: u64 = 128;
const DESCRIPTORS_PER_WORKER: u64 = 2 * PIPES_MAX as u64 + 8;

/// Ports of all listeners of datagrams: flows are told apart by a number of 16 bits.
const UDP_PORTS_MAX: usize = 1 << 16;

/// Why the dataplane cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Somebody listens there already.
    #[error(
        "cannot listen on {protocol}://{address}: the port is in use; stop what listens there (`ss -ltunp`) or choose \
         another"
    )]
    AddressInUse {
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// Where.
        address: SocketAddr,
    },
    /// The address is not one of this host's, or the port needs a privilege.
    #[error("cannot listen on {protocol}://{address}: {source}")]
    Bind {
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// Where.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A listener cannot have one of its knobs.
    #[error("listener tcp://{address}: tcp.{refused}")]
    Listener {
        /// Which.
        address: SocketAddr,
        /// What.
        refused: Refused,
    },
    /// Backends of a pool cannot be connected to as they should.
    #[error("pool {pool}: {refused}")]
    Pool {
        /// Which.
        pool: PoolName,
        /// What.
        refused: Refused,
    },
    /// A source address is not one of this host's.
    #[error("cannot connect from {address} (source_addresses): {source}; is it an address of this host?")]
    Source {
        /// Which.
        address: IpAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The engine does not work here.
    #[error("the engine {engine} cannot run here: {source}{}", instead(*.engine))]
    Engine {
        /// Which.
        engine: Engine,
        /// Why.
        source: ProbeError,
    },
    /// A worker could not make its engine.
    #[error("worker {worker} could not start: {source}")]
    Ring {
        /// Which.
        worker: usize,
        /// Why.
        source: SetupError,
    },
    /// The process may not have enough descriptors for a single flow.
    #[error("the descriptor limit of {limit} is too low for any flow; raise it (`ulimit -n`, LimitNOFILE=)")]
    Descriptors {
        /// The limit.
        limit: u64,
    },
    /// More ports for datagrams than a worker tells apart.
    #[error("{ports} UDP ports; the listeners of a balancer take {} together", UDP_PORTS_MAX)]
    UdpPorts {
        /// How many they are.
        ports: usize,
    },
    /// The access log cannot be opened.
    #[error(
        "cannot write the access log ({to:?}): {source}; does its folder exist, and may this user write there?"
    )]
    AccessLog {
        /// Where it goes.
        to: AccessLogTo,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel would not give a thread, an eventfd, or a listening state.
    #[error("the dataplane could not start: {0}")]
    System(#[from] io::Error),
}

/// A worker ended before it was told to.
#[derive(Debug, thiserror::Error)]
#[error("worker {worker} failed: {reason}")]
pub struct WorkerFailed {
    /// Which.
    pub worker: usize,
    /// Why.
    pub reason: String,
}

/// Sockets are bound; nothing is accepted yet.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    workers: usize,
    pin: Vec<usize>,
    addresses: Vec<SocketAddr>,
    /// By listener, then by port, then by worker.
    sockets: Vec<Vec<Vec<OwnedFd>>>,
    /// One for each pool.
    towards: Vec<Arc<Towards>>,
    /// By listener.
    gates: Vec<Option<Arc<Gate>>>,
    stats: Arc<Stats>,
    clock: Clock,
}

/// The workers run.
#[derive(Debug)]
pub struct Dataplane {
    threads: Vec<JoinHandle<Result<(), String>>>,
    access_log: Option<access::Running>,
    shared: Arc<Shared>,
    addresses: Vec<SocketAddr>,
    stats: Arc<Stats>,
}

/// What the workers are told while they run, and the one count they share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Flows open over all workers.
    pub(crate) flows_open: AtomicU32,
    orders: Mutex<Orders>,
    /// One for each worker, to wake it.
    bells: Vec<OwnedFd>,
}

/// What the workers should do. It only ever moves on: run, drain, stop.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Orders {
    /// Stop accepting; flows left after this long since the order are reset.
    pub(crate) drain_within: Option<Duration>,
    pub(crate) stop: bool,
}

impl Shared {
    pub(crate) fn orders(&self) -> Orders {
        *self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut self.orders.lock().unwrap_or_else(PoisonError::into_inner));
        (0..self.bells.len()).for_each(|worker| self.ring(worker));
    }

    /// Wakes a worker.
    pub(crate) fn ring(&self, worker: usize) {
        if let Some(bell) = self.bells.get(worker) {
            // Fails only when the counter is full, and then it rings already.
            let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
        }
    }

    pub(crate) fn bell(&self, worker: usize) -> &OwnedFd {
        &self.bells[worker]
    }
}

/// Chooses an engine that works and binds every listener. Nothing is accepted before [`Bound::start`]; on any error
/// nothing stays bound, and all errors are returned.
pub fn bind(config: Config) -> Result<Bound, Vec<StartError>> {
    let mut errors = Vec::new();
    let engine = choose(config.engine).map_err(|error| errors.push(error)).ok();
    let cores = allowed_cores();
    let workers = if config.workers == 0 { cores.len().max(1) } else { config.workers };
    let mut addresses = Vec::new();
    let mut sockets = Vec::new();
    for listener in &config.listeners {
        match listen_at_ports(listener, workers, &config.timeouts) {
            Ok((address, bound)) => {
                addresses.push(address);
                sockets.push(bound);
            }
            Err(error) => errors.push(error),
        }
    }
    let is_udp = |listener: &ListenerConfig| matches!(listener.protocol, Protocol::Udp(_));
    let udp_ports =
        config.listeners.iter().filter(|listener| is_udp(listener)).map(ports).map(Iterator::count).sum();
    if udp_ports > UDP_PORTS_MAX {
        errors.push(StartError::UdpPorts { ports: udp_ports });
    }
    let towards = towards(&config);
    errors.extend(try_out(&towards, &config.sources));
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    if descriptors_reserved(workers) + 2 > descriptors {
        errors.push(StartError::Descriptors { limit: descriptors });
    }
    let Some(engine) = engine.filter(|_| errors.is_empty()) else { return Err(errors) };
    let stats = Stats {
        listeners: addresses
            .iter()
            .zip(&config.listeners)
            .map(|(at, l)| ListenerNames::new(*at, l))
            .collect(),
        workers: (0..workers)
            .map(|_| Arc::new(WorkerStats::new(&config.listeners, config.decision_sample)))
            .collect(),
        engine: Mutex::new(engine),
        buffer_bytes: AtomicU64::new(0),
        towards: towards.clone(),
        access_log: Arc::default(),
    };
    // Pinning fewer workers than cores would only forbid the scheduler to keep them apart from other work.
    let pin = if workers == cores.len() { cores } else { Vec::new() };
    let gates = config.listeners.iter().map(|listener| Gate::new(&listener.limits, seed())).collect();
    Ok(Bound {
        gates,
        config,
        workers,
        pin,
        addresses,
        sockets,
        towards,
        stats: Arc::new(stats),
        clock: Clock::start(),
    })
}

impl Bound {
    /// Where the listeners are, in configuration order, with the ports that were really bound.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.clone()
    }

    /// The counters.
    pub fn view(&self) -> Arc<dyn DataplaneView> {
        Arc::clone(&self.stats) as Arc<dyn DataplaneView>
    }

    /// The origin of the dataplane's [`allocation::Timestamp`]s, for whoever reads [`allocation::LiveFacts`] beside it.
    pub fn origin(&self) -> Instant {
        self.clock.origin()
    }

    /// Starts the workers. When it returns, every listener accepts.
    ///
    /// Where the engine was not named and there is no memory for one in each worker, the next one that works is taken.
    pub fn start(mut self) -> Result<Dataplane, StartError> {
        let sockets = std::mem::take(&mut self.sockets);
        loop {
            // Of duplicates: connections that wait in a socket outlive a start that fails.
            self.sockets = duplicates(&sockets)?;
            match self.start_workers() {
                Err(StartError::Ring { worker, source: source @ SetupError::Memory { .. } }) => {
                    let chosen = self.stats.chosen();
                    let Some(next) = next_best(self.config.engine, chosen) else {
                        return Err(StartError::Ring { worker, source });
                    };
                    tracing::warn!(
                        engine = chosen.engine.name(), worker, why = %source,
                        next = next.engine.name(), reason = next.reason.label(),
                        "not every worker gets this engine; all take the next"
                    );
                    *self.stats.engine.lock().unwrap_or_else(PoisonError::into_inner) = next;
                }
                result => return result,
            }
        }
    }

    fn start_workers(&mut self) -> Result<Dataplane, StartError> {
        let bells = (0..self.workers)
            .map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK))
            .collect::<Result<Vec<_>, _>>()
            .map_err(io::Error::from)?;
        let (mut logs, access_log) = self.access_log()?;
        let shared = Arc::new(Shared { flows_open: AtomicU32::new(0), orders: Mutex::default(), bells });
        let (ready, started) = mpsc::channel();
        let mut dataplane = Dataplane {
            threads: Vec::new(),
            access_log,
            shared: Arc::clone(&shared),
            addresses: self.addresses.clone(),
            stats: Arc::clone(&self.stats),
        };

        self.tell_of_tables(&shared);
        let (clock, engine) = (self.clock, self.stats.chosen().engine);
        let cids_max = flows_max(&self.config.limits, self.workers) as usize;
        let datagrams: Vec<_> =
            self.addresses.iter().map(|_| Arc::new(UdpShared::new(worker::seed(0), cids_max))).collect();
        for worker in 0..self.workers {
            let setup = self.worker_setup(worker, clock, &shared, logs.pop(), &datagrams);
            let ready = ready.clone();
            let shared = Arc::clone(&shared);
            let thread =
                std::thread::Builder::new().name(format!("worker-{worker}")).spawn(move || match engine {
                    Engine::Uring => work::<Ring>(setup, ready, &shared),
                    Engine::TokioUring => work::<TokioUring>(setup, ready, &shared),
                    Engine::Epoll => work::<Epoll>(setup, ready, &shared),
                });
            match thread {
                Ok(thread) => dataplane.threads.push(thread),
                Err(error) => return Err(dataplane.give_up(error.into())),
            }
        }
        drop(ready);
        for worker in 0..self.workers {
            match started.recv() {
                Ok(Ok(())) => {}
                Ok(Err(source)) => return Err(dataplane.give_up(StartError::Ring { worker, source })),
                Err(_) => {
                    return Err(dataplane.give_up(io::Error::other("a worker ended at its start").into()));
                }
            }
        }
        Ok(dataplane)
    }

    /// Opens the access log, if there is one: an end for each worker.
    fn access_log(&self) -> Result<(Vec<AccessLog>, Option<access::Running>), StartError> {
        let Some(config) = &self.config.access_log else { return Ok((Vec::new(), None)) };
        let names = self.addresses.iter().zip(&self.config.listeners).map(|(address, listener)| {
            let pools = listener.targets.iter().map(|target| target.pool.to_string());
            (format!("{}://{address}", listener.protocol.name()), pools.collect())
        });
        access::start(config, names.collect(), self.workers, self.clock, &self.stats.access_log)
            .map(|(logs, running)| (logs, Some(running)))
            .map_err(|source| StartError::AccessLog { to: config.to.clone(), source })
    }

    /// A new table may have room for flows that wait.
    fn tell_of_tables(&self, shared: &Arc<Shared>) {
        for target in self.config.listeners.iter().flat_map(|listener| &listener.targets) {
            let Some(share) = target.share.clone().filter(|share| share.queue().is_some()) else { continue };
            // Tables may be published after the workers' end.
            let shared = Arc::downgrade(shared);
            target.table.on_publish(move || {
                if let Some(shared) = shared.upgrade() {
                    share.room(|worker| shared.ring(worker));
                }
            });
        }
    }

    fn worker_setup(
        &mut self,
        worker: usize,
        clock: Clock,
        shared: &Arc<Shared>,
        access_log: Option<AccessLog>,
        datagrams: &[Arc<UdpShared>],
    ) -> WorkerSetup {
        let limits = self.config.limits;
        let flows_max = flows_max(&limits, self.workers);
        let listeners =
            self.sockets.iter_mut().zip(&self.addresses).zip(&self.config.listeners).zip(&self.gates);
        let towards = &self.towards;
        let target_setup = |target: &Target| {
            let towards = towards.iter().find(|towards| *towards.pool() == target.pool)?;
            Some(TargetSetup {
                reader: target.table.reader(),
                towards: Arc::clone(towards),
                share: target.share.clone(),
            })
        };
        WorkerSetup {
            worker,
            core: self.pin.get(worker).copied(),
            clock,
            shared: Arc::clone(shared),
            stats: Arc::clone(&self.stats.workers[worker]),
            buffer_bytes: Arc::clone(&self.stats),
            listeners: listeners
                .enumerate()
                .map(|(index, (((ports, address), listener), gate))| ListenerSetup {
                    sockets: (address.port()..)
                        .zip(ports.iter_mut().map(|workers| workers.remove(0)))
                        .collect(),
                    backlog: listener.tcp.backlog,
                    targets: listener.targets.iter().filter_map(target_setup).collect(),
                    gate: gate.clone(),
                    sorter: Sorter::new(listener),
                    udp: match &listener.protocol {
                        Protocol::Tcp => None,
                        Protocol::Udp(udp) => Some((udp.clone(), *address, Arc::clone(&datagrams[index]))),
                    },
                })
                .collect(),
            access_log,
            flows_max,
            buffers_max: if limits.buffers_max == 0 {
                flows_max.saturating_mul(2).max(256)
            } else {
                limits.buffers_max
            },
            tuning: Tuning {
                preface_timeout: self.config.timeouts.preface,
                connect_timeout: self.config.timeouts.connect,
                idle_timeout: self.config.timeouts.idle,
                connect_retries: limits.connect_retries.min(allocation::Excluded::MAX as u8 - 1),
                ..Tuning::default()
            },
        }
    }
}

impl Dataplane {
    /// The counters.
    pub fn view(&self) -> Arc<dyn DataplaneView> {
        Arc::clone(&self.stats) as Arc<dyn DataplaneView>
    }

    /// Where the listeners are, in configuration order.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.clone()
    }

    /// Stops accepting and lets flows end by themselves; those left after `within` are reset. Connections that were
    /// already waiting to be accepted are still served. Returns at once.
    pub fn drain(&self, within: Duration) {
        self.shared.order(|orders| orders.drain_within = Some(within));
    }

    /// Resets every flow and ends. Returns at once.
    pub fn stop(&self) {
        self.shared.order(|orders| orders.stop = true);
    }

    /// Whether all workers have ended: drained, stopped, or one failed.
    pub fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits for the workers to end; says which failed first, and why.
    pub fn join(self) -> Result<(), WorkerFailed> {
        let mut first = Ok(());
        for (worker, thread) in self.threads.into_iter().enumerate() {
            let reason = match thread.join() {
                Ok(Ok(())) => continue,
                Ok(Err(reason)) => reason,
                Err(_) => "it panicked, which is a bug in trimtab; please report it".to_owned(),
            };
            if first.is_ok() {
                first = Err(WorkerFailed { worker, reason });
            }
        }
        // The workers have handed over what they had to say.
        if let Some(access_log) = self.access_log {
            access_log.end();
        }
        first
    }

    /// Ends what was started of a start that failed.
    fn give_up(self, error: StartError) -> StartError {
        self.stop();
        // Each ends with the same error, or as told: this one is the one to report.
        let _ = self.join();
        error
    }
}

fn duplicates(listeners: &[Vec<Vec<OwnedFd>>]) -> io::Result<Vec<Vec<Vec<OwnedFd>>>> {
    let of_port = |workers: &Vec<OwnedFd>| workers.iter().map(OwnedFd::try_clone).collect();
    listeners.iter().map(|ports| ports.iter().map(of_port).collect()).collect()
}

/// A worker's thread: starts it, says how that went, and works until it is told to end.
fn work<I: Io>(
    setup: WorkerSetup,
    ready: mpsc::Sender<Result<(), SetupError>>,
    shared: &Shared,
) -> Result<(), String> {
    let result = Worker::<I>::start(setup);
    let error = result.as_ref().err().map(ToString::to_string);
    let (worker, outcome) = match result {
        Ok(worker) => (Some(worker), Ok(())),
        Err(error) => (None, Err(error)),
    };
    // The starter is waiting; if it has given up, the orders say so.
    let _ = ready.send(outcome);
    drop(ready);
    let end = match worker {
        Some(worker) => worker.run().map_err(|error| error.to_string()),
        None => Err(error.unwrap_or_default()),
    };
    if end.is_err() {
        // One worker's listening sockets are gone: the others must not go on as if nothing happened.
        shared.order(|orders| orders.stop = true);
    }
    end
}

/// What to do where an engine that was named does not work.
const fn instead(engine: Engine) -> &'static str {
    match engine {
        Engine::Uring | Engine::TokioUring => "; or write engine = \"auto\", which takes the best that works",
        Engine::Epoll => "",
    }
}

/// A number that nobody outside can foresee.
fn seed() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::hash::RandomState::new().build_hasher().finish()
}

fn ports(listener: &ListenerConfig) -> RangeInclusive<u16> {
    let first = listener.bind.port();
    first..=listener.last_port.unwrap_or(first)
}

/// A listener's first address, and its sockets by port and worker.
fn listen_at_ports(
    listener: &ListenerConfig,
    workers: usize,
    timeouts: &Timeouts,
) -> Result<(SocketAddr, Vec<Vec<OwnedFd>>), StartError> {
    let mut address = listener.bind;
    let mut sockets = Vec::new();
    for port in ports(listener) {
        let at = SocketAddr::new(listener.bind.ip(), port);
        let bound = match &listener.protocol {
            Protocol::Tcp => listen::listen(at, workers, &listener.tcp, timeouts.keepalive),
            Protocol::Udp(udp) => {
                // Where each flow takes so many datagrams, or each has a header, trains of them would have to be cut.
                let trains = udp.requests == 0 && listener.proxy.is_none();
                listen::listen_udp(at, workers, trains).map_err(ListenError::Io)
            }
        };
        let (bound, of_port) = bound.map_err(|error| listen_error(listener.protocol.name(), at, error))?;
        if sockets.is_empty() {
            address = bound;
        }
        sockets.push(of_port);
    }
    Ok((address, sockets))
}

fn listen_error(protocol: &'static str, address: SocketAddr, error: ListenError) -> StartError {
    match error {
        ListenError::Refused(refused) => StartError::Listener { address, refused },
        ListenError::Io(source) if source.kind() == io::ErrorKind::AddrInUse => {
            StartError::AddressInUse { protocol, address }
        }
        ListenError::Io(source) => StartError::Bind { protocol, address, source },
    }
}

/// What holds towards each pool that is a target.
fn towards(config: &Config) -> Vec<Arc<Towards>> {
    let mut all: Vec<Arc<Towards>> = Vec::new();
    for target in config.listeners.iter().flat_map(|listener| &listener.targets) {
        if !all.iter().any(|towards| *towards.pool() == target.pool) {
            let (pool, connecting) = (target.pool.clone(), target.connecting.clone());
            let towards = Towards::new(pool, connecting, &config.sources, config.timeouts.keepalive);
            all.push(Arc::new(towards));
        }
    }
    all
}

/// What no backend could be connected with.
fn try_out(towards: &[Arc<Towards>], sources: &[IpAddr]) -> Vec<StartError> {
    let refused = |towards: &Arc<Towards>| {
        let refused = towards.try_out().err()?;
        Some(StartError::Pool { pool: towards.pool().clone(), refused })
    };
    let mut errors: Vec<_> = towards.iter().filter_map(refused).collect();
    let sources: BTreeSet<IpAddr> =
        sources.iter().copied().chain(towards.iter().flat_map(|towards| towards.all_sources())).collect();
    errors.extend(sources.into_iter().filter_map(|address| {
        let source = TcpListener::bind((address, 0)).err()?;
        Some(StartError::Source { address, source })
    }));
    errors
}

fn descriptors_reserved(workers: usize) -> u64 {
    DESCRIPTORS_RESERVED + workers as u64 * DESCRIPTORS_PER_WORKER
}

fn flows_max(limits: &Limits, workers: usize) -> u32 {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let for_flows = descriptors.saturating_sub(descriptors_reserved(workers));
    let possible = u32::try_from(for_flows / 2).unwrap_or(u32::MAX);
    if limits.flows_max == 0 {
        // Nobody means a million flows by leaving a limit out; memory for their buffers would be reserved.
        return possible.min(1_000_000);
    }
    if limits.flows_max > possible {
        tracing::warn!(
            flows_max = limits.flows_max,
            possible,
            "the descriptor limit (RLIMIT_NOFILE) allows fewer flows than flows_max; raise it"
        );
    }
    limits.flows_max.min(possible)
}

fn allowed_cores() -> Vec<usize> {
    sched_getaffinity(None)
        .map_or_else(|_| vec![0], |set| (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect())
}
