//! What `/metrics` shows, by the names of the design.
//!
//! Series whose labels are known at start (listeners, pools, reasons) live in a recorder of the `metrics` crates, of our
//! own and not the process's. Series of resources are written anew at each scrape from the registry, so they go when
//! the resource goes; so are the dataplane's histograms, whose buckets it counts itself.

mod provider;

use ::metrics::{Counter, counter, describe_counter, describe_gauge, gauge, with_local_recorder};
use allocation::telemetry::{EngineSnapshot, HistogramSnapshot, ListenerSnapshot, OptionsRefused};
pub(crate) use formats::Exposition as Text;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use registry::{PoolStatus, ResourceState, ResourceStatus, VersionStatus};

pub(crate) use self::provider::ProviderMetrics;
use crate::Shared;
use crate::security::Security;

/// What became of a report.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ReportResult {
    Accepted,
    /// It had a value that no report may have.
    Refused,
    /// It was of a resource or an incarnation that is not registered.
    Unknown,
}

/// Where a report was fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PullSource {
    Http,
    Orca,
    AgentCheck,
}

/// What became of the execution of a utilization script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PullResult {
    Accepted,
    /// There was an answer, and it is none that a report can be made of; or it may not be asked for.
    Refused,
    /// There was no whole answer.
    Failed,
}

impl PullResult {
    const ALL: [Self; 3] = [Self::Accepted, Self::Refused, Self::Failed];

    /// Its name in metrics and output.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// The metrics of one process.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    counters: Counters,
    version: String,
}

/// What control counts itself.
struct Counters {
    /// By [`ReportResult`].
    reports: [Counter; 3],
    /// By [`PullSource`] and [`PullResult`].
    pulls: [[Counter; 3]; 3],
    registrations: Counter,
    expirations: Counter,
    version_aborts: Counter,
    probes_sent: Counter,
    probes_answered: Counter,
    notices_taken: Counter,
    notices_failed: Counter,
    notices_posted: Counter,
    notice_posts_failed: Counter,
    decisions_logged: Counter,
    decisions_lost: Counter,
}

impl Counters {
    /// In the recorder that is the local one now.
    fn make() -> Self {
        Self {
            reports: ["accepted", "refused", "unknown"]
                .map(|result| counter!("trimtab_reports_total", "source" => "push", "result" => result)),
            pulls: ["http", "orca", "agent-check"].map(|source| {
                PullResult::ALL.map(
                    |result| counter!("trimtab_reports_total", "source" => source, "result" => result.name()),
                )
            }),
            registrations: counter!("trimtab_registrations_total"),
            expirations: counter!("trimtab_leases_expired_total"),
            version_aborts: counter!("trimtab_version_aborts_total"),
            probes_sent: counter!("trimtab_probes_total", "result" => "sent"),
            probes_answered: counter!("trimtab_probes_total", "result" => "answered"),
            notices_taken: counter!("trimtab_notices_total", "way" => "stream", "result" => "taken"),
            notices_failed: counter!("trimtab_notices_total", "way" => "stream", "result" => "failed"),
            notices_posted: counter!("trimtab_notices_total", "way" => "webhook", "result" => "taken"),
            notice_posts_failed: counter!("trimtab_notices_total", "way" => "webhook", "result" => "failed"),
            decisions_logged: counter!("trimtab_decisions_logged_total", "result" => "written"),
            decisions_lost: counter!("trimtab_decisions_logged_total", "result" => "lost"),
        }
    }
}

impl Metrics {
    pub(crate) fn new(version: &str) -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let counters = with_local_recorder(&recorder, || {
            describe();
            Counters::make()
        });
        Self { recorder, handle, counters, version: version.to_owned() }
    }

    pub(crate) fn version_aborted(&self) {
        self.counters.version_aborts.increment(1);
    }

    pub(crate) fn probe_sent(&self) {
        self.counters.probes_sent.increment(1);
    }

    pub(crate) fn probe_answered(&self) {
        self.counters.probes_answered.increment(1);
    }

    pub(crate) fn notices_taken(&self, taken: u64, failed: u64) {
        self.counters.notices_taken.increment(taken);
        self.counters.notices_failed.increment(failed);
    }

    pub(crate) fn notice_posted(&self, taken: bool) {
        let Counters { notices_posted, notice_posts_failed, .. } = &self.counters;
        if taken { notices_posted } else { notice_posts_failed }.increment(1);
    }

    pub(crate) fn decisions_logged(&self, count: u64) {
        self.counters.decisions_logged.increment(count);
    }

    pub(crate) fn decisions_lost(&self, count: u64) {
        self.counters.decisions_lost.increment(count);
    }

    pub(crate) fn reported(&self, result: ReportResult) {
        self.counters.reports[result as usize].increment(1);
    }

    pub(crate) fn pulled(&self, source: PullSource, result: PullResult) {
        self.counters.pulls[source as usize][result as usize].increment(1);
    }

    pub(crate) fn registered(&self) {
        self.counters.registrations.increment(1);
    }

    /// Those of one provider.
    pub(crate) fn provider(&self, name: &str) -> ProviderMetrics {
        with_local_recorder(&self.recorder, || ProviderMetrics::make(name))
    }

    pub(crate) fn expired(&self) {
        self.counters.expirations.increment(1);
    }

    /// The page.
    pub(crate) fn render(&self, shared: &Shared) -> String {
        let now = shared.clock.now();
        let listeners = shared.dataplane.listeners();
        let pools = shared.registry.pools(now);
        let resources = shared.registry.resources(None, now).unwrap_or_default();
        with_local_recorder(&self.recorder, || {
            gauge!("trimtab_build_info", "version" => self.version.clone()).set(1.0);
            listeners.iter().for_each(observe_listener);
            pools.iter().for_each(observe_pool);
            observe_engine(&shared.dataplane.engine());
            shared.dataplane.options_refused().iter().for_each(observe_options_refused);
            let (bytes, refused) = shared.registry.history_usage();
            gauge!("trimtab_history_bytes").set(bytes as f64);
            counter!("trimtab_history_samples_dropped_total").absolute(refused);
            gauge!("trimtab_notices_not_taken").set(shared.notices.not_taken(shared) as f64);
            observe_security(&shared.security);
        });
        let mut text = Text::default();
        write_versions(&mut text, shared, now);
        write_histograms(&mut text, &listeners);
        write_resources(&mut text, &resources);
        shared.checker.write(&mut text, &shared.pools);
        crate::dns::write(&mut text, &shared.dns.now());
        if let Some(keeper) = &shared.keeper {
            write_store(&mut text, &keeper.stats());
        }
        write_process(&mut text);
        let mut page = self.handle.render();
        page.push_str(&text.into_string());
        page
    }
}

fn describe() {
    provider::describe();
    describe_gauge!("trimtab_build_info", "The version that runs; always 1.");
    describe_counter!(
        "trimtab_reports_total",
        "Reports of resources, by where they came from and what became of them."
    );
    describe_counter!(
        "trimtab_notices_total",
        "Notices that a resource was told and acted on, or could not act on, by the way it was told."
    );
    describe_gauge!(
        "trimtab_notices_not_taken",
        "Notices that hold and that a resource has not taken, over all registered resources that they are for."
    );
    describe_counter!("trimtab_registrations_total", "Registrations made; renewals are not counted.");
    describe_counter!("trimtab_leases_expired_total", "Registrations that ended because no report came.");
    describe_counter!(
        "trimtab_version_aborts_total",
        "Versions whose share was taken from them for being worse."
    );
    describe_counter!("trimtab_probes_total", "Probes of the policy prequal.");
    describe_counter!("trimtab_decisions_logged_total", "Sampled selections for the decision log.");
    describe_counter!(
        "trimtab_ejections_ignored_total",
        "Selections that ignored ejections because most resources were ejected."
    );
    describe_gauge!("trimtab_guard_active", "Whether a guard of a pool holds now, by guard.");
    describe_gauge!(
        "trimtab_pool_balancers",
        "Balancers that share a pool, by the reports of its resources."
    );
    describe_gauge!("trimtab_history_bytes", "Memory of the histories of all resources.");
    describe_counter!(
        "trimtab_history_samples_dropped_total",
        "Samples that no history was begun for, because the bound is reached."
    );
    describe_counter!("trimtab_refusals_total", "Peers and calls of control that were refused, by reason.");
    describe_counter!("trimtab_tls_loads_total", "Times that control's certificates were read.");
    describe_gauge!(
        "trimtab_tls_certificate_expiry_seconds",
        "When control's certificate expires, in seconds since 1970."
    );
    describe_counter!("trimtab_flows_opened_total", "Flows accepted from clients.");
    describe_gauge!("trimtab_flows_open", "Flows open now.");
    describe_counter!("trimtab_flows_closed_total", "Flows ended, by reason.");
    describe_counter!("trimtab_route_flows_total", "Flows that a listener with routes gave to a pool.");
    describe_counter!("trimtab_bytes_total", "Bytes delivered, by direction.");
    describe_counter!(
        "trimtab_connect_retries_total",
        "Connects that failed and were tried on another resource."
    );
    describe_counter!("trimtab_sheds_total", "Flows refused at a bound, by reason.");
    describe_counter!(
        "trimtab_affinity_total",
        "Selections for a client by affinity: kept where it was, moved from there, or new."
    );
    describe_counter!("trimtab_flows_queued_total", "Flows that waited for room in their pool.");
    describe_gauge!("trimtab_flows_waiting", "Flows that wait for room in their pool now.");
    describe_counter!("trimtab_access_log_lines_total", "Lines of flows written to the access log.");
    describe_counter!("trimtab_access_log_lost_total", "Lines of flows that the access log had no room for.");
    describe_gauge!("trimtab_resources", "Resources of a pool, by state.");
    describe_gauge!("trimtab_table_generation", "Generation of a pool's newest allocation table.");
    describe_gauge!("trimtab_weights_held", "1 while a guard holds a pool's weights where they are.");
    describe_gauge!("trimtab_engine_info", "The engine that moves the bytes and why it was taken; always 1.");
    describe_gauge!("trimtab_workers", "Worker threads of the dataplane.");
    describe_gauge!("trimtab_buffers", "Receive buffers that exist.");
    describe_gauge!("trimtab_buffers_in_use", "Receive buffers that hold bytes on their way.");
    describe_gauge!("trimtab_buffer_size_bytes", "Bytes of one receive buffer.");
    describe_counter!("trimtab_enters_total", "System calls made to submit and wait.");
    describe_counter!("trimtab_completions_total", "Completions handled.");
    describe_counter!(
        "trimtab_spliced_bytes_total",
        "Bytes moved in the kernel, without passing through a buffer."
    );
    describe_counter!(
        "trimtab_options_refused_total",
        "Options of [pool.tcp] that the kernel refused a connection to a resource, which went without."
    );
    describe_counter!("trimtab_buffer_waits_total", "Times that a receive found no buffer and had to wait.");
    describe_counter!(
        "trimtab_completion_overflows_total",
        "Completions that found the completion queue full."
    );
}

fn observe_security(security: &Security) {
    for (reason, count) in security.refusals().by_reason() {
        counter!("trimtab_refusals_total", "reason" => reason).absolute(count);
    }
    if let Some(tls) = security.tls() {
        let (loaded, failed) = tls.reloads();
        counter!("trimtab_tls_loads_total", "result" => "loaded").absolute(loaded);
        counter!("trimtab_tls_loads_total", "result" => "failed").absolute(failed);
        gauge!("trimtab_tls_certificate_expiry_seconds").set(tls.not_after() as f64);
    }
}

fn observe_listener(listener: &ListenerSnapshot) {
    let name = || listener.name.clone();
    counter!("trimtab_flows_opened_total", "listener" => name(), "protocol" => listener.protocol)
        .absolute(listener.flows_opened);
    gauge!("trimtab_flows_open", "listener" => name()).set(listener.flows_open as f64);
    for (direction, bytes) in
        [("to_backend", listener.bytes_to_backend), ("to_client", listener.bytes_to_client)]
    {
        counter!("trimtab_bytes_total", "listener" => name(), "direction" => direction).absolute(bytes);
    }
    counter!("trimtab_connect_retries_total", "listener" => name()).absolute(listener.connect_retries);
    for (reason, count) in &listener.flows_closed {
        counter!("trimtab_flows_closed_total", "listener" => name(), "reason" => *reason).absolute(*count);
    }
    if listener.has_routes {
        for target in &listener.targets {
            counter!("trimtab_route_flows_total", "listener" => name(), "pool" => target.pool.clone())
                .absolute(target.flows);
        }
    }
    for (reason, count) in &listener.sheds {
        counter!("trimtab_sheds_total", "listener" => name(), "reason" => *reason).absolute(*count);
    }
    for (result, count) in &listener.affinity {
        counter!("trimtab_affinity_total", "listener" => name(), "result" => *result).absolute(*count);
    }
    counter!("trimtab_flows_queued_total", "listener" => name()).absolute(listener.flows_queued);
    gauge!("trimtab_flows_waiting", "listener" => name()).set(listener.flows_waiting as f64);
}

/// Those that were never refused have no series: they are many, and few are ever asked for.
fn observe_options_refused(refused: &OptionsRefused) {
    for (option, count) in refused.counts.iter().filter(|(_, count)| *count > 0) {
        let pool = refused.pool.clone();
        counter!("trimtab_options_refused_total", "pool" => pool, "option" => *option).absolute(*count);
    }
}

fn observe_pool(pool: &PoolStatus) {
    let name = || pool.name.to_string();
    for state in ResourceState::ALL {
        let count = f64::from(pool.states.of(state));
        gauge!("trimtab_resources", "pool" => name(), "state" => state.name()).set(count);
    }
    gauge!("trimtab_table_generation", "pool" => name()).set(pool.generation as f64);
    gauge!("trimtab_weights_held", "pool" => name()).set(f64::from(u8::from(pool.guard.is_some())));
    gauge!("trimtab_pool_balancers", "pool" => name()).set(pool.balancers);
    for guard in &pool.guards {
        let holds = f64::from(u8::from(guard.holds));
        gauge!("trimtab_guard_active", "pool" => name(), "guard" => guard.name).set(holds);
    }
}

fn observe_engine(engine: &EngineSnapshot) {
    gauge!("trimtab_engine_info", "engine" => engine.engine, "reason" => engine.reason).set(1.0);
    gauge!("trimtab_workers").set(engine.workers as f64);
    gauge!("trimtab_buffers").set(engine.buffers as f64);
    gauge!("trimtab_buffers_in_use").set(engine.buffers_in_use as f64);
    gauge!("trimtab_buffer_size_bytes").set(engine.buffer_bytes as f64);
    counter!("trimtab_enters_total").absolute(engine.enters);
    counter!("trimtab_completions_total").absolute(engine.completions);
    counter!("trimtab_buffer_waits_total").absolute(engine.buffer_waits);
    counter!("trimtab_spliced_bytes_total").absolute(engine.spliced_bytes);
    counter!("trimtab_completion_overflows_total").absolute(engine.completion_overflows);
    counter!("trimtab_ejections_ignored_total").absolute(engine.ejections_ignored);
    counter!("trimtab_access_log_lines_total").absolute(engine.access_log_written);
    counter!("trimtab_access_log_lost_total").absolute(engine.access_log_lost);
}

/// A family with one series for each version of a split pool.
struct VersionFamily {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(&VersionStatus) -> f64,
}

const VERSION_FAMILIES: [VersionFamily; 6] = [
    VersionFamily {
        name: "trimtab_version_share_ratio",
        kind: "gauge",
        help: "A version's share of its pool's new flows.",
        value: |version| version.share,
    },
    VersionFamily {
        name: "trimtab_version_aborted",
        kind: "gauge",
        help: "Whether a version's share was taken from it for being worse.",
        value: |version| f64::from(u8::from(version.aborted.is_some())),
    },
    VersionFamily {
        name: "trimtab_version_flows_opened_total",
        kind: "counter",
        help: "Flows opened to a version.",
        value: |version| version.totals.flows_opened as f64,
    },
    VersionFamily {
        name: "trimtab_version_connect_failures_total",
        kind: "counter",
        help: "Connects to a version that failed.",
        value: |version| version.totals.connect_failures as f64,
    },
    VersionFamily {
        name: "trimtab_version_resets_total",
        kind: "counter",
        help: "Flows that a version reset.",
        value: |version| version.totals.resets as f64,
    },
    VersionFamily {
        name: "trimtab_version_first_byte_seconds_total",
        kind: "counter",
        help: "Sum of the times to the first byte of a version's flows.",
        value: |version| version.totals.first_byte_micros as f64 * 1e-6,
    },
];

fn write_versions(text: &mut Text, shared: &Shared, now: allocation::Timestamp) {
    let split = shared.pools.iter().filter(|pool| pool.config.split.is_some());
    let versions: Vec<_> = split
        .map(|pool| (pool.config.name.as_str(), shared.registry.versions(&pool.config.name, now)))
        .collect();
    if versions.is_empty() {
        return;
    }
    for family in &VERSION_FAMILIES {
        text.family(family.name, family.kind, family.help);
        for (pool, versions) in &versions {
            for version in versions.iter().flatten() {
                let labels = [("pool", *pool), ("version", version.version.as_str())];
                text.sample(family.name, &labels, (family.value)(version));
            }
        }
    }
}

fn write_store(text: &mut Text, stats: &store::Stats) {
    let families: [(&str, &str, &str, f64); 5] = [
        (
            "trimtab_store_commits_total",
            "counter",
            "Transactions that are on the disk.",
            stats.commits as f64,
        ),
        (
            "trimtab_store_commit_seconds_total",
            "counter",
            "Time that transactions took, those that failed included.",
            stats.commit_micros as f64 * 1e-6,
        ),
        (
            "trimtab_store_history_dropped_total",
            "counter",
            "Batches of history that were not kept, because the disk is slow, full or broken.",
            stats.history_dropped as f64,
        ),
        ("trimtab_store_waiting", "gauge", "Changes that wait to be written.", stats.waiting as f64),
        (
            "trimtab_store_failing",
            "gauge",
            "Whether the newest transaction failed: registrations are refused.",
            f64::from(u8::from(stats.failing)),
        ),
    ];
    for (name, kind, help, value) in families {
        text.family(name, kind, help);
        text.sample(name, &[], value);
    }
    let changes = "trimtab_store_changes_total";
    text.family(changes, "counter", "Changes that were asked of the store, by what became of them.");
    for (result, count) in
        [("written", stats.changes), ("failed", stats.changes_failed), ("refused", stats.changes_refused)]
    {
        text.sample(changes, &[("result", result)], count as f64);
    }
}

fn write_histograms(text: &mut Text, listeners: &[ListenerSnapshot]) {
    type Of = fn(&ListenerSnapshot) -> &HistogramSnapshot;
    let families: [(&str, &str, Of); 2] = [
        (
            "trimtab_connect_seconds",
            "Time from the selection of a resource to the established connection.",
            |listener| &listener.connect_seconds,
        ),
        ("trimtab_flow_seconds", "Time from accept to close.", |listener| &listener.flow_seconds),
    ];
    for (name, help, of) in families {
        text.family(name, "histogram", help);
        for listener in listeners {
            let histogram = of(listener);
            let counted = (histogram.bounds, histogram.counts.as_slice(), histogram.sum_seconds);
            text.histogram(name, &[("listener", &listener.name)], counted);
        }
    }
}

/// A family with one series for each resource.
struct ResourceFamily {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    /// `None`: this resource has no such series.
    value: fn(&ResourceStatus) -> Option<f64>,
}

const RESOURCE_FAMILIES: [ResourceFamily; 6] = [
    ResourceFamily {
        name: "trimtab_resource_flows_open",
        kind: "gauge",
        help: "Flows open to a resource.",
        value: |status| Some(f64::from(status.standing.flows_open)),
    },
    ResourceFamily {
        name: "trimtab_resource_flows_opened_total",
        kind: "counter",
        help: "Flows opened to a resource since its registration.",
        value: |status| Some(status.flows_opened as f64),
    },
    ResourceFamily {
        name: "trimtab_resource_connect_failures_total",
        kind: "counter",
        help: "Connects to a resource that failed since its registration.",
        value: |status| Some(status.connect_failures as f64),
    },
    ResourceFamily {
        name: "trimtab_resource_reports_refused_total",
        kind: "counter",
        help: "Reports of a resource that were refused since its registration.",
        value: |status| Some(status.reports_refused as f64),
    },
    ResourceFamily {
        name: "trimtab_resource_weight",
        kind: "gauge",
        help: "Weight of a resource; the mean of its pool is 1, and 0 gets no new flows.",
        value: |status| Some(status.standing.weight),
    },
    ResourceFamily {
        name: "trimtab_resource_report_age_seconds",
        kind: "gauge",
        help: "Age of a resource's newest accepted report.",
        value: |status| status.report_age.map(|age| age.as_secs_f64()),
    },
];

fn write_resources(text: &mut Text, resources: &[ResourceStatus]) {
    let labels = |status: &ResourceStatus| {
        (status.registration.pool().as_str().to_owned(), status.registration.id().as_str().to_owned())
    };
    for family in &RESOURCE_FAMILIES {
        text.family(family.name, family.kind, family.help);
        for status in resources {
            let (pool, resource) = labels(status);
            if let Some(value) = (family.value)(status) {
                text.sample(family.name, &[("pool", &pool), ("resource", &resource)], value);
            }
        }
    }
    let name = "trimtab_resource_utilization_ratio";
    text.family(name, "gauge", "How busy a resource said it is in its newest accepted report, by dimension.");
    for status in resources {
        let (pool, resource) = labels(status);
        for (dimension, value) in status.utilization.iter().flat_map(|utilization| utilization.ratios()) {
            text.sample(name, &[("pool", &pool), ("resource", &resource), ("dimension", &dimension)], value);
        }
    }
}

/// What every Prometheus client library shows of its process. Where the kernel does not say, nothing is shown.
fn write_process(text: &mut Text) {
    if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
        text.family("process_open_fds", "gauge", "Descriptors open, the one that counts them among them.");
        text.sample("process_open_fds", &[], entries.count() as f64);
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if let Some(limit) = limit.current {
        text.family("process_max_fds", "gauge", "Most descriptors that may be open.");
        text.sample("process_max_fds", &[], limit as f64);
    }
    if let Some(pages) = resident_pages() {
        text.family("process_resident_memory_bytes", "gauge", "Memory in use.");
        text.sample("process_resident_memory_bytes", &[], pages as f64 * rustix::param::page_size() as f64);
    }
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    text.family("process_cpu_seconds_total", "counter", "Processor time used, by user and system.");
    text.sample("process_cpu_seconds_total", &[], cpu.tv_sec as f64 + cpu.tv_nsec as f64 * 1e-9);
}

fn resident_pages() -> Option<u64> {
    std::fs::read_to_string("/proc/self/statm").ok()?.split_whitespace().nth(1)?.parse().ok()
}
