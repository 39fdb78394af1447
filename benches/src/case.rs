//! The cases: which load, what is measured of it, and what trimtab is to reach.

use serde::{Serialize, Serializer};

use crate::load::{After, Mix, Pace, Shape, Train, UdpShape};

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
    /// Small datagrams on few UDP flows.
    Udp64,
    /// The same on many.
    Udp1024,
    /// Datagrams as large as QUIC's, in trains, both ways.
    UdpBulk,
    /// Small requests, connections, long responses and datagrams at once, at rates that all can keep.
    Mixed,
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
    /// Processor time of the proxy for one datagram delivered, in µs.
    CpuPerDatagram,
    /// Processor time of the proxy in a second, in ms: where the load is given, so that all do the same.
    CpuPerSecond,
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
    /// 99th percentile of UDP operations beside TCP ones, in µs.
    UdpLatencyP99,
    /// The share of datagrams that did not arrive.
    Lost,
    /// Threads that the kernel started for io_uring operations that it cannot do at once, at the end of the window.
    IoWorkers,
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
    pub const ALL: [Self; 13] = [
        Self::Ping64x64,
        Self::Ping512x64,
        Self::Ping32x16k,
        Self::Ping64x64AtRate,
        Self::ConnectClose,
        Self::ConnectReset,
        Self::Download,
        Self::Upload,
        Self::Udp64,
        Self::Udp1024,
        Self::UdpBulk,
        Self::Mixed,
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
            Self::Udp64 => "udp64",
            Self::Udp1024 => "udp1024",
            Self::UdpBulk => "udp-bulk",
            Self::Mixed => "mixed",
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
            Self::Udp64 => "64 UDP flows, 64 B request and response, closed loop",
            Self::Udp1024 => "1,024 UDP flows, 64 B request and response, closed loop",
            Self::UdpBulk => {
                "8 UDP flows, 1,200 B datagrams in trains of 16: four send them, four are sent them, for 64 B each"
            }
            Self::Mixed => {
                "a second of 8,000 small exchanges on 64 connections, 1,000 connections with one, 100 responses of 1 MiB on \
                 4, 8,000 datagrams and answers on 64 UDP flows; latencies from when each was due, TCP's of small exchanges"
            }
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
    pub fn mix(self, rate: f64) -> Mix {
        const MIB: usize = 1 << 20;
        let shape = |connections, request_bytes, response_bytes, after| Shape {
            connections,
            request_bytes,
            response_bytes,
            after,
            pace: Pace::Closed,
        };
        let at = |rate, shape| Shape { pace: Pace::Rate(rate), ..shape };
        let small = |connections, after| shape(connections, 64, 64, after);
        let udp = |flows, request, response, pace| UdpShape { flows, request, response, pace };
        let (datagram, train) = (Train::single(64), Train::of(16));
        let echo = |flows, pace| udp(flows, datagram, datagram, pace);
        let datagrams = |udp| Mix { tcp: Vec::new(), udp };
        match self {
            Self::Ping64x64 => small(64, After::Again).into(),
            Self::Ping512x64 => small(512, After::Again).into(),
            Self::Ping32x16k => shape(32, 64, 16 << 10, After::Again).into(),
            Self::Ping64x64AtRate => at(rate, small(64, After::Again)).into(),
            Self::ConnectClose => small(32, After::Close).into(),
            Self::ConnectReset => small(32, After::Reset).into(),
            Self::Download => shape(4, 64, 16 * MIB, After::Again).into(),
            Self::Upload => shape(4, 16 * MIB, 64, After::Again).into(),
            Self::Udp64 => datagrams(vec![echo(64, Pace::Closed)]),
            Self::Udp1024 => datagrams(vec![echo(1024, Pace::Closed)]),
            Self::UdpBulk => {
                datagrams(vec![udp(4, train, datagram, Pace::Closed), udp(4, datagram, train, Pace::Closed)])
            }
            Self::Mixed => Mix {
                tcp: vec![
                    at(8_000.0, small(64, After::Again)),
                    at(1_000.0, small(32, After::Close)),
                    at(100.0, shape(4, 64, MIB, After::Again)),
                ],
                udp: vec![echo(64, Pace::Rate(8_000.0))],
            },
            Self::Idle => small(3000, After::Hold).into(),
        }
    }

    /// Whether datagrams are in it.
    pub fn has_udp(self) -> bool {
        matches!(self, Self::Udp64 | Self::Udp1024 | Self::UdpBulk | Self::Mixed)
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
            Self::Udp64 | Self::Udp1024 => {
                &[CpuPerOperation, OperationsPerSecond, LatencyP50, LatencyP99, LatencyP999, Lost]
            }
            Self::UdpBulk => &[CpuPerDatagram, CpuPerMegabyte, MegabytesPerSecond, LatencyP99, Lost],
            Self::Mixed => &[CpuPerSecond, LatencyP50, LatencyP99, LatencyP999, UdpLatencyP99, Lost],
            Self::Idle => &[RssPerFlow, PssPerFlow, PrivateDirtyPerFlow, RssBefore],
            // Its throughput is given.
            Self::Ping64x64AtRate => &[CpuPerOperation, LatencyP50, LatencyP99, LatencyP999],
            _ => &[CpuPerOperation, OperationsPerSecond, LatencyP50, LatencyP99, LatencyP999],
        }
    }

    /// What trimtab is to reach there.
    pub fn goal(self, metric: Metric) -> Option<Goal> {
        let best = |share| Some(Goal::OfBestPeer(share));
        match (self, metric) {
            (Self::Ping64x64 | Self::Ping32x16k, Metric::CpuPerOperation) => best(0.75),
            (Self::Ping512x64, Metric::CpuPerOperation) => best(0.6),
            (Self::ConnectClose | Self::ConnectReset, Metric::CpuPerOperation) => best(0.75),
            (Self::Download, Metric::CpuPerMegabyte) => best(0.45),
            (Self::Upload, Metric::CpuPerMegabyte) => best(0.6),
            (Self::Udp64, Metric::CpuPerOperation) => best(0.6),
            (Self::Udp1024, Metric::CpuPerOperation) => best(0.5),
            (Self::UdpBulk, Metric::CpuPerDatagram | Metric::CpuPerMegabyte) => best(0.35),
            (_, Metric::LatencyP99 | Metric::UdpLatencyP99) => best(1.0),
            (Self::Idle, Metric::RssPerFlow) => Some(Goal::AtMost(0.4)),
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
            Self::CpuPerDatagram => "cpu_us_per_datagram",
            Self::CpuPerSecond => "cpu_ms_per_second",
            Self::OperationsPerSecond => "operations_per_second",
            Self::MegabytesPerSecond => "megabytes_per_second",
            Self::LatencyP50 => "latency_p50_us",
            Self::LatencyP99 => "latency_p99_us",
            Self::LatencyP999 => "latency_p999_us",
            Self::UdpLatencyP99 => "udp_latency_p99_us",
            Self::Lost => "datagrams_lost_ratio",
            Self::IoWorkers => "iou_wrk_threads",
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
            Self::CpuPerDatagram => "proxy CPU, µs/datagram",
            Self::CpuPerSecond => "proxy CPU, ms/s",
            Self::OperationsPerSecond => "op/s",
            Self::MegabytesPerSecond => "MB/s",
            Self::LatencyP50 => "p50, µs",
            Self::LatencyP99 => "p99, µs",
            Self::LatencyP999 => "p99.9, µs",
            Self::UdpLatencyP99 => "UDP p99, µs",
            Self::Lost => "lost, share",
            Self::IoWorkers => "iou-wrk threads",
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
        assert_eq!(Case::named("udp"), Ok(vec![Case::UdpBulk]), "a part of a word is no beginning");
        assert!(Case::named("pong").unwrap_err().contains("there are ping64x64, "));
    }
}
