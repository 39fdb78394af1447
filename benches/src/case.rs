//! The cases: which load, what is measured of it, and what trimtab is to reach.

use serde::{Serialize, Serializer};

use crate::load::{After, Pace, Shape};

/// A load on a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Case {
    /// Small requests and responses on few connections: the cost of one wake-up and one small message.
    Ping64x64,
    /// The same at many connections: the cost of a message when many come at once.
    Ping512x64,
    /// Small requests, pages as responses.
    Ping32x16k,
    /// As the first, at a fixed rate that all can keep: the latency at half load.
    Ping64x64AtRate,
    /// A connection for each request, closed in good order.
    ConnectClose,
    /// A connection for each request, reset by the client.
    ConnectReset,
    /// Long responses.
    Download,
    /// Long requests.
    Upload,
    /// Flows that are open and silent: what each holds in memory.
    Idle,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Processor time of the proxy, all its threads, for one operation, in µs.
    CpuPerOperation,
    /// Processor time of the proxy for one megabyte (10^6 bytes) delivered, in µs.
    CpuPerMegabyte,
    /// Operations a second.
    OperationsPerSecond,
    /// Megabytes delivered a second.
    MegabytesPerSecond,
    /// Median latency in µs.
    LatencyP50,
    /// 99th percentile in µs.
    LatencyP99,
    /// 99.9th percentile in µs.
    LatencyP999,
    /// Growth of the proxy's resident memory for one idle flow, in kB (1,000 bytes).
    RssPerFlow,
    /// The same of its proportional set (shared pages divided).
    PssPerFlow,
    /// The same of pages it wrote to and does not share.
    PrivateDirtyPerFlow,
    /// Resident memory before the idle flows, in kB: not compared, what a flow's figure stands beside.
    RssBefore,
    /// How busy the proxy kept its processor, 0 to 1: at 1 it is the bottleneck.
    ProxyBusy,
    /// How busy clients and backends kept theirs, 0 to 1.
    LoadBusy,
    /// How busy others kept one of the two processors (the larger), 0 to 1: the noise.
    ForeignBusy,
    /// Operations that failed.
    Errors,
    /// Operations that were due and not done at the end (with a rate).
    Unfinished,
}

/// What trimtab is to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// At most so much of the best peer's figure.
    OfBestPeer(f64),
    /// At most so much.
    AtMost(f64),
}

impl Case {
    /// All, in the order they are run and reported.
    pub const ALL: [Self; 9] = [
        Self::Ping64x64,
        Self::Ping512x64,
        Self::Ping32x16k,
        Self::Ping64x64AtRate,
        Self::ConnectClose,
        Self::ConnectReset,
        Self::Download,
        Self::Upload,
        Self::Idle,
    ];

    /// As in arguments and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ping64x64 => "ping64x64",
            Self::Ping512x64 => "ping512x64",
            Self::Ping32x16k => "ping32x16k",
            Self::Ping64x64AtRate => "ping64x64@rate",
            Self::ConnectClose => "connect-close",
            Self::ConnectReset => "connect-reset",
            Self::Download => "download",
            Self::Upload => "upload",
            Self::Idle => "idle",
        }
    }

    /// One line about it.
    pub fn about(self) -> &'static str {
        match self {
            Self::Ping64x64 => "64 connections, 64 B request and response, closed loop",
            Self::Ping512x64 => "512 connections, 64 B request and response, closed loop",
            Self::Ping32x16k => "32 connections, 64 B request, 16 KiB response, closed loop",
            Self::Ping64x64AtRate => {
                "64 connections, 64 B request and response at a fixed rate, latency from when each was due"
            }
            Self::ConnectClose => "connect, 64 B request and response, close; 32 at a time",
            Self::ConnectReset => "connect, 64 B request and response, reset by the client; 32 at a time",
            Self::Download => "4 connections, 64 B request, 16 MiB response, one after the other",
            Self::Upload => "4 connections, 16 MiB request, 64 B response, one after the other",
            Self::Idle => "3,000 connections that did one 64 B exchange each and are silent since",
        }
    }

    /// The cases that a name in an argument stands for: one, or those whose name goes on from it (`connect`).
    pub fn named(text: &str) -> Result<Vec<Self>, String> {
        let found: Vec<Self> = match Self::ALL.into_iter().find(|case| case.name() == text) {
            Some(case) => vec![case],
            None => {
                let start = format!("{text}-");
                Self::ALL.into_iter().filter(|case| case.name().starts_with(&start)).collect()
            }
        };
        if found.is_empty() {
            let names: Vec<&str> = Self::ALL.iter().map(|case| case.name()).collect();
            return Err(format!("there is no case {text:?}; there are {}", names.join(", ")));
        }
        Ok(found)
    }

    /// The load; `rate` (operations a second) is for [`Case::Ping64x64AtRate`].
    pub fn shape(self, rate: f64) -> Shape {
        const MIB_16: usize = 16 << 20;
        let shape = |connections, request_bytes, response_bytes, after| Shape {
            connections,
            request_bytes,
            response_bytes,
            after,
            pace: Pace::Closed,
        };
        match self {
            Self::Ping64x64 => shape(64, 64, 64, After::Again),
            Self::Ping512x64 => shape(512, 64, 64, After::Again),
            Self::Ping32x16k => shape(32, 64, 16 << 10, After::Again),
            Self::Ping64x64AtRate => Shape { pace: Pace::Rate(rate), ..shape(64, 64, 64, After::Again) },
            Self::ConnectClose => shape(32, 64, 64, After::Close),
            Self::ConnectReset => shape(32, 64, 64, After::Reset),
            Self::Download => shape(4, 64, MIB_16, After::Again),
            Self::Upload => shape(4, MIB_16, 64, After::Again),
            Self::Idle => shape(3000, 64, 64, After::Hold),
        }
    }

    /// Whether proxies are set up for long transfers.
    pub fn is_bulk(self) -> bool {
        matches!(self, Self::Download | Self::Upload)
    }

    /// What its table shows.
    pub fn metrics(self) -> &'static [Metric] {
        use Metric::*;
        match self {
            Self::Download | Self::Upload => &[CpuPerMegabyte, MegabytesPerSecond],
            Self::Idle => &[RssPerFlow, PssPerFlow, PrivateDirtyPerFlow, RssBefore],
            // Its throughput is given.
            Self::Ping64x64AtRate => &[CpuPerOperation, LatencyP50, LatencyP99, LatencyP999],
            _ => &[CpuPerOperation, OperationsPerSecond, LatencyP50, LatencyP99, LatencyP999],
        }
    }

    /// What trimtab is to reach there.
    pub fn goal(self, metric: Metric) -> Option<Goal> {
        match (self, metric) {
            (Self::Ping64x64, Metric::CpuPerOperation) => Some(Goal::OfBestPeer(0.85)),
            (Self::Ping512x64, Metric::CpuPerOperation) => Some(Goal::OfBestPeer(0.75)),
            (Self::ConnectClose | Self::ConnectReset, Metric::CpuPerOperation) => Some(Goal::OfBestPeer(0.9)),
            (_, Metric::LatencyP99) => Some(Goal::OfBestPeer(1.0)),
            (Self::Idle, Metric::RssPerFlow) => Some(Goal::AtMost(0.6)),
            _ => None,
        }
    }
}

impl Metric {
    /// As in JSON.
    pub fn key(self) -> &'static str {
        match self {
            Self::CpuPerOperation => "cpu_us_per_operation",
            Self::CpuPerMegabyte => "cpu_us_per_megabyte",
            Self::OperationsPerSecond => "operations_per_second",
            Self::MegabytesPerSecond => "megabytes_per_second",
            Self::LatencyP50 => "latency_p50_us",
            Self::LatencyP99 => "latency_p99_us",
            Self::LatencyP999 => "latency_p999_us",
            Self::RssPerFlow => "rss_kb_per_idle_flow",
            Self::PssPerFlow => "pss_kb_per_idle_flow",
            Self::PrivateDirtyPerFlow => "private_dirty_kb_per_idle_flow",
            Self::RssBefore => "rss_kb_before",
            Self::ProxyBusy => "proxy_busy_ratio",
            Self::LoadBusy => "load_busy_ratio",
            Self::ForeignBusy => "foreign_busy_ratio",
            Self::Errors => "errors",
            Self::Unfinished => "unfinished",
        }
    }

    /// As in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::CpuPerOperation => "proxy CPU, µs/op",
            Self::CpuPerMegabyte => "proxy CPU, µs/MB",
            Self::OperationsPerSecond => "op/s",
            Self::MegabytesPerSecond => "MB/s",
            Self::LatencyP50 => "p50, µs",
            Self::LatencyP99 => "p99, µs",
            Self::LatencyP999 => "p99.9, µs",
            Self::RssPerFlow => "RSS, kB/flow",
            Self::PssPerFlow => "PSS, kB/flow",
            Self::PrivateDirtyPerFlow => "private dirty, kB/flow",
            Self::RssBefore => "RSS before, kB",
            Self::ProxyBusy => "proxy's processor, proxy",
            Self::LoadBusy => "load's processor, load",
            Self::ForeignBusy => "processors, others",
            Self::Errors => "errors",
            Self::Unfinished => "unfinished",
        }
    }

    /// Whether less is better; for throughput it is not.
    pub fn less_is_better(self) -> bool {
        !matches!(self, Self::OperationsPerSecond | Self::MegabytesPerSecond)
    }
}

impl Serialize for Case {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.key())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_select_cases() {
        assert!(Case::ALL.into_iter().all(|case| Case::named(case.name()) == Ok(vec![case])));
        assert_eq!(Case::named("connect"), Ok(vec![Case::ConnectClose, Case::ConnectReset]));
        assert!(Case::named("pong").unwrap_err().contains("there are ping64x64, "));
    }
}
