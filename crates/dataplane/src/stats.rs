//! Counters: plain ones for each worker, summed when somebody looks.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use allocation::telemetry::{
    CONNECT_SECONDS, Counter, DataplaneView, EngineSnapshot, FLOW_SECONDS, Histogram, ListenerSnapshot,
    OptionsRefused, TargetSnapshot,
};
use allocation::{Decision, Kept};
use flow::CloseReason;

use crate::access;
use crate::config::ListenerConfig;
use crate::decisions::Decisions;
use crate::engine::Chosen;
use crate::towards::Towards;

/// Why a flow was refused at a bound. A closed set: each is a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shed {
    /// As many flows are open as may be.
    Flows,
    /// The process has no descriptor left.
    Descriptors,
    /// No local port is left towards the backends that were tried.
    Ports,
    /// The kernel has no memory for sockets.
    Memory,
    /// Somebody is ready, but nobody who meets what the listener requires.
    Requirement,
    /// Backends cannot be connected to as the pool wants: from the client's address, or with its mark.
    Source,
    /// As many flows of the listener are open as may be.
    ListenerFlows,
    /// New flows of the listener come too fast.
    ListenerRate,
    /// As many flows of the client are open as may be.
    ClientFlows,
    /// New flows of the client come too fast.
    ClientRate,
    /// As many flows of the pool are open as may be.
    PoolFlows,
    /// No room, and as many flows wait for some as may.
    QueueFull,
    /// It waited for room as long as it may.
    QueueDeadline,
    /// It had gone before it could be asked who it is.
    ClientGone,
    /// The listener speaks the PROXY protocol, and whoever connects is not trusted with it.
    ProxyUntrusted,
    /// A client of PostgreSQL was promised TLS, and the backends do not have it.
    TlsDenied,
}

impl Shed {
    const ALL: [Self; 16] = [
        Self::Flows,
        Self::Descriptors,
        Self::Ports,
        Self::Memory,
        Self::Requirement,
        Self::Source,
        Self::ListenerFlows,
        Self::ListenerRate,
        Self::ClientFlows,
        Self::ClientRate,
        Self::PoolFlows,
        Self::QueueFull,
        Self::QueueDeadline,
        Self::ClientGone,
        Self::ProxyUntrusted,
        Self::TlsDenied,
    ];

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Flows => "flows",
            Self::Descriptors => "descriptors",
            Self::Ports => "ports",
            Self::Memory => "memory",
            Self::Requirement => "requirement",
            Self::Source => "source",
            Self::ListenerFlows => "listener_flows",
            Self::ListenerRate => "listener_rate",
            Self::ClientFlows => "client_flows",
            Self::ClientRate => "client_rate",
            Self::PoolFlows => "pool_flows",
            Self::QueueFull => "queue_full",
            Self::QueueDeadline => "queue_deadline",
            Self::ClientGone => "client_gone",
            Self::ProxyUntrusted => "proxy_untrusted",
            Self::TlsDenied => "tls_denied",
        }
    }
}

/// Why a datagram was not delivered. A closed set: each is a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dropped {
    /// The socket's send buffer is full: its receiver's network is slower than its sender.
    SendBuffer,
    /// It is longer than can be sent.
    TooLarge,
    /// The kernel cannot send it there.
    Unreachable,
    /// Its backend refused it, and no other took it.
    Refused,
    /// It was cut off, or has no sender to answer to.
    Malformed,
    /// It would begin a flow, and the balancer is leaving.
    Draining,
    /// The listener speaks the PROXY protocol, and whoever sent it is not trusted with it.
    ProxyUntrusted,
    /// It begins with a PROXY header that is wrong.
    ProxyInvalid,
    /// It begins with no PROXY header, and must.
    ProxyMissing,
}

impl Dropped {
    const ALL: [Self; 9] = [
        Self::SendBuffer,
        Self::TooLarge,
        Self::Unreachable,
        Self::Refused,
        Self::Malformed,
        Self::Draining,
        Self::ProxyUntrusted,
        Self::ProxyInvalid,
        Self::ProxyMissing,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::SendBuffer => "send_buffer",
            Self::TooLarge => "too_large",
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
            Self::Malformed => "malformed",
            Self::Draining => "draining",
            Self::ProxyUntrusted => "proxy_untrusted",
            Self::ProxyInvalid => "proxy_invalid",
            Self::ProxyMissing => "proxy_missing",
        }
    }
}

/// One worker's counts of one listener. The worker writes, anyone reads.
#[derive(Debug)]
pub(crate) struct ListenerStats {
    pub(crate) opened: Counter,
    pub(crate) bytes_to_backend: Counter,
    pub(crate) bytes_to_client: Counter,
    pub(crate) datagrams_to_backend: Counter,
    pub(crate) datagrams_to_client: Counter,
    pub(crate) connect_retries: Counter,
    /// Flows that were given to each target, where the listener has routes.
    pub(crate) routed: Box<[Counter]>,
    closed: [Counter; CloseReason::ALL.len()],
    sheds: [Counter; Shed::ALL.len()],
    /// By [`Kept`].
    kept: [Counter; Kept::ALL.len()],
    /// Flows that waited for room, and those that do now.
    pub(crate) queued: Counter,
    pub(crate) waiting: Counter,
    dropped: [Counter; Dropped::ALL.len()],
    pub(crate) connect_seconds: Histogram,
    pub(crate) flow_seconds: Histogram,
}

impl ListenerStats {
    fn new(config: &ListenerConfig) -> Self {
        let targets = if config.routes.is_empty() { 0 } else { config.targets.len() };
        Self {
            routed: (0..targets).map(|_| Counter::default()).collect(),
            opened: Counter::default(),
            bytes_to_backend: Counter::default(),
            bytes_to_client: Counter::default(),
            datagrams_to_backend: Counter::default(),
            datagrams_to_client: Counter::default(),
            connect_retries: Counter::default(),
            closed: Default::default(),
            sheds: Default::default(),
            kept: Default::default(),
            queued: Counter::default(),
            waiting: Counter::default(),
            dropped: Default::default(),
            connect_seconds: Histogram::new(&CONNECT_SECONDS),
            flow_seconds: Histogram::new(&FLOW_SECONDS),
        }
    }

    pub(crate) fn closed(&self, reason: CloseReason) {
        self.closed[reason as usize].add(1);
    }

    pub(crate) fn shed(&self, reason: Shed) {
        self.sheds[reason as usize].add(1);
    }

    pub(crate) fn kept(&self, kept: Kept) {
        self.kept[kept as usize].add(1);
    }

    pub(crate) fn dropped(&self, why: Dropped, datagrams: u32) {
        self.dropped[why as usize].add(u64::from(datagrams));
    }

    fn open(&self) -> u64 {
        self.opened.read().saturating_sub(self.closed.iter().map(Counter::read).sum())
    }
}

/// One worker's counts, on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct WorkerStats {
    pub(crate) listeners: Box<[ListenerStats]>,
    pub(crate) buffers: Counter,
    pub(crate) buffers_in_use: Counter,
    pub(crate) enters: Counter,
    pub(crate) completions: Counter,
    pub(crate) buffer_waits: Counter,
    pub(crate) spliced_bytes: Counter,
    pub(crate) completion_overflows: Counter,
    pub(crate) ejections_ignored: Counter,
    pub(crate) decisions: Decisions,
}

impl WorkerStats {
    pub(crate) fn new(listeners: &[ListenerConfig], decision_sample: f64) -> Self {
        Self {
            ejections_ignored: Counter::default(),
            decisions: Decisions::new(decision_sample),
            listeners: listeners.iter().map(ListenerStats::new).collect(),
            buffers: Counter::default(),
            buffers_in_use: Counter::default(),
            enters: Counter::default(),
            completions: Counter::default(),
            buffer_waits: Counter::default(),
            spliced_bytes: Counter::default(),
            completion_overflows: Counter::default(),
        }
    }
}

/// What a listener and its targets are called.
#[derive(Debug)]
pub(crate) struct ListenerNames {
    /// `tcp://127.0.0.1:5432`, with the port that was really bound; `tcp://0.0.0.0:5000-5010`.
    name: String,
    protocol: &'static str,
    /// The first is the default.
    pools: Vec<String>,
    has_routes: bool,
}

impl ListenerNames {
    pub(crate) fn new(address: SocketAddr, config: &ListenerConfig) -> Self {
        let range = config.last_port.map(|last| format!("-{last}")).unwrap_or_default();
        Self {
            name: format!("{}://{address}{range}", config.protocol.name()),
            protocol: config.protocol.name(),
            pools: config.targets.iter().map(|target| target.pool.to_string()).collect(),
            has_routes: !config.routes.is_empty(),
        }
    }
}

/// All workers' counts, for control.
#[derive(Debug)]
pub(crate) struct Stats {
    pub(crate) listeners: Vec<ListenerNames>,
    pub(crate) workers: Vec<Arc<WorkerStats>>,
    /// It changes only while workers are being started.
    pub(crate) engine: Mutex<Chosen>,
    /// Bytes of one receive buffer, once the workers run.
    pub(crate) buffer_bytes: AtomicU64,
    /// One for each pool.
    pub(crate) towards: Vec<Arc<Towards>>,
    pub(crate) access_log: Arc<access::State>,
}

impl Stats {
    /// The engine that the workers have.
    pub(crate) fn chosen(&self) -> Chosen {
        *self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sum(&self, read: impl Fn(&WorkerStats) -> u64) -> u64 {
        self.workers.iter().map(|worker| read(worker)).sum()
    }
}

impl DataplaneView for Stats {
    fn listeners(&self) -> Vec<ListenerSnapshot> {
        let snapshot = |(index, names): (usize, &ListenerNames)| {
            let target = |pool: &String| TargetSnapshot { pool: pool.clone(), flows: 0 };
            let mut all = ListenerSnapshot {
                name: names.name.clone(),
                protocol: names.protocol,
                targets: names.pools.iter().map(target).collect(),
                has_routes: names.has_routes,
                flows_opened: 0,
                flows_open: 0,
                bytes_to_backend: 0,
                bytes_to_client: 0,
                datagrams_to_backend: 0,
                datagrams_to_client: 0,
                datagrams_dropped: Dropped::ALL.map(|reason| (reason.label(), 0)).to_vec(),
                connect_retries: 0,
                flows_closed: CloseReason::ALL.map(|reason| (reason.label(), 0)).to_vec(),
                sheds: Shed::ALL.map(|reason| (reason.label(), 0)).to_vec(),
                affinity: Kept::ALL.map(|kept| (kept.label(), 0)).to_vec(),
                flows_queued: 0,
                flows_waiting: 0,
                connect_seconds: Histogram::new(&CONNECT_SECONDS).snapshot(),
                flow_seconds: Histogram::new(&FLOW_SECONDS).snapshot(),
            };
            for stats in self.workers.iter().map(|worker| &worker.listeners[index]) {
                // Open before opened: a flow that comes in between is then counted as opened, never as open alone.
                all.flows_open += stats.open();
                all.flows_opened += stats.opened.read();
                all.bytes_to_backend += stats.bytes_to_backend.read();
                all.bytes_to_client += stats.bytes_to_client.read();
                all.datagrams_to_backend += stats.datagrams_to_backend.read();
                all.datagrams_to_client += stats.datagrams_to_client.read();
                all.datagrams_dropped.iter_mut().zip(&stats.dropped).for_each(|(sum, n)| sum.1 += n.read());
                all.connect_retries += stats.connect_retries.read();
                all.targets.iter_mut().zip(&stats.routed).for_each(|(sum, n)| sum.flows += n.read());
                all.flows_closed.iter_mut().zip(&stats.closed).for_each(|(sum, n)| sum.1 += n.read());
                all.sheds.iter_mut().zip(&stats.sheds).for_each(|(sum, n)| sum.1 += n.read());
                all.affinity.iter_mut().zip(&stats.kept).for_each(|(sum, n)| sum.1 += n.read());
                all.flows_queued += stats.queued.read();
                all.flows_waiting += stats.waiting.read();
                all.connect_seconds.merge(&stats.connect_seconds.snapshot());
                all.flow_seconds.merge(&stats.flow_seconds.snapshot());
            }
            all
        };
        self.listeners.iter().enumerate().map(snapshot).collect()
    }

    fn engine(&self) -> EngineSnapshot {
        let chosen = self.chosen();
        EngineSnapshot {
            engine: chosen.engine.name(),
            reason: chosen.reason.label(),
            workers: self.workers.len(),
            buffers: self.sum(|w| w.buffers.read()),
            buffers_in_use: self.sum(|w| w.buffers_in_use.read()),
            buffer_bytes: self.buffer_bytes.load(Relaxed),
            enters: self.sum(|w| w.enters.read()),
            completions: self.sum(|w| w.completions.read()),
            buffer_waits: self.sum(|w| w.buffer_waits.read()),
            spliced_bytes: self.sum(|w| w.spliced_bytes.read()),
            completion_overflows: self.sum(|w| w.completion_overflows.read()),
            ejections_ignored: self.sum(|w| w.ejections_ignored.read()),
            access_log_written: self.access_log.written(),
            access_log_lost: self.access_log.lost(),
        }
    }

    fn options_refused(&self) -> Vec<OptionsRefused> {
        let of = |towards: &Arc<Towards>| OptionsRefused {
            pool: towards.pool().to_string(),
            counts: towards.refusals.counts().collect(),
        };
        self.towards.iter().map(of).collect()
    }

    fn decisions(&self, last: usize) -> Vec<Decision> {
        let mut all: Vec<Decision> =
            self.workers.iter().flat_map(|worker| worker.decisions.newest()).collect();
        all.sort_by_key(|decision| std::cmp::Reverse(decision.at));
        all.truncate(last);
        all
    }

    fn take_sampled_decisions(&self) -> (Vec<Decision>, u64) {
        let mut all = (Vec::new(), 0);
        for worker in &self.workers {
            let (decisions, lost) = worker.decisions.take_sampled();
            all.0.extend(decisions);
            all.1 += lost;
        }
        all.0.sort_by_key(|decision| decision.at);
        all
    }
}
