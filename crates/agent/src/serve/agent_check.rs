//! HAProxy's agent-check: one line for each connection.
//!
//! The weight is the headroom of the busiest dimension, of what the server's configuration gives: `up ready 75%` where it is a
//! quarter busy. `drain` where an operator drains the resource at a balancer of ours, `down` where its service does not answer.
//! Each line says everything, for HAProxy keeps a state until another line changes it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use api::orca::OrcaLoadReport;
use formats::agent_check::{Admin, Health, Weight, Wish};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::Numbers;
use super::accept::{Acceptor, Placed};
use crate::agent::Common;
use crate::service::Service;

/// A connection ends after this time.
const WITHIN: Duration = Duration::from_secs(2);
/// Of what HAProxy sends (`agent-send`), so much is taken so that closing is no reset.
const SENT_BYTES_MAX: usize = 1024;
/// As the balancer sees memory and swap (`registry`): below these levels they say nothing about load.
const MEMORY_COUNTS_FROM: f64 = 0.9;
const SWAP_COUNTS_FROM: f64 = 0.5;
/// Dimensions whose level says how busy a resource is.
const BUSY: [&str; 4] = ["bandwidth", "pressure_cpu", "pressure_memory", "pressure_io"];

/// Serves for ever.
pub(super) async fn serve(listener: TcpListener, numbers: Numbers, common: &Arc<Common>) -> Infallible {
    let acceptor = Acceptor::new(listener);
    loop {
        let connection = acceptor.accept().await;
        let service = common.service.borrow().clone();
        let line =
            wish(numbers.borrow().as_ref(), &service, common.balancers.any_drains()).to_string() + "\n";
        // One that does not read gets no second chance: it asks again anyway.
        tokio::spawn(timeout(WITHIN, answer(connection, line)));
    }
}

async fn answer(mut connection: Placed, line: String) -> std::io::Result<()> {
    connection.write_all(line.as_bytes()).await?;
    connection.shutdown().await?;
    let mut sent = [0; SENT_BYTES_MAX];
    while connection.read(&mut sent).await? > 0 {}
    Ok(())
}

fn wish(report: Option<&OrcaLoadReport>, service: &Service, is_draining: bool) -> Wish {
    let (health, reason) = match service {
        Service::Answers => (Health::Up, String::new()),
        silent => (Health::Down, format!("the service {silent}")),
    };
    Wish {
        // Before anything was measured, HAProxy keeps what it has.
        weight: report.map(|report| Weight::Percent(headroom_percent(report))),
        maxconn: None,
        admin: if is_draining { Admin::Drain } else { Admin::Ready },
        health,
        reason,
    }
}

/// 1 to 100: a server with nothing left is still up, and 0 would mean that it takes nothing new at all.
fn headroom_percent(report: &OrcaLoadReport) -> u32 {
    // In 1 to 100: exact.
    ((1.0 - busy(report)) * 100.0).round().clamp(1.0, 100.0) as u32
}

/// As the balancer does it (`registry::Utilization::busy`).
fn busy(report: &OrcaLoadReport) -> f64 {
    if report.application_utilization > 0.0 {
        return report.application_utilization;
    }
    let level = |key: &str| report.utilization.get(key).copied().unwrap_or(0.0);
    let above = |value: f64, from: f64| ((value - from) / (1.0 - from)).max(0.0);
    let short = [above(report.mem_utilization, MEMORY_COUNTS_FROM), above(level("swap"), SWAP_COUNTS_FROM)];
    BUSY.into_iter().map(level).chain(short).fold(report.cpu_utilization, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_everything() {
        let mut report = OrcaLoadReport { cpu_utilization: 0.25, mem_utilization: 0.5, ..Default::default() };
        let line = |report: &OrcaLoadReport, service: &Service, draining: bool| {
            wish(Some(report), service, draining).to_string()
        };
        assert_eq!(line(&report, &Service::Answers, false), "up ready 75%");
        assert_eq!(line(&report, &Service::Answers, true), "up drain 75%");
        let silent = Service::Silent("Connection refused".into());
        let down = "down ready 75% #the service does not answer: Connection refused";
        assert_eq!(line(&report, &silent, false), down);
        assert_eq!(wish(None, &Service::Answers, false).to_string(), "up ready");
        report.utilization.insert("pressure_io".into(), 0.9);
        assert_eq!(line(&report, &Service::Answers, false), "up ready 10%");
        report.cpu_utilization = 3.0;
        assert_eq!(line(&report, &Service::Answers, false), "up ready 1%");
        report.application_utilization = 0.4;
        assert_eq!(line(&report, &Service::Answers, false), "up ready 60%");
        let full = OrcaLoadReport { mem_utilization: 0.95, ..Default::default() };
        assert_eq!(line(&full, &Service::Answers, false), "up ready 50%");
    }
}
