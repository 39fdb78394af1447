//! Resources join, report and leave, over a real connection.

use std::collections::HashMap;

use crate::harness::{PATIENCE, Reporter, Running, register_request};
use api::v1::report_response::Event;
use api::v1::{DeregisterRequest, RegisterRequest, ReportRequest, Resource, ResourceState, notice};
use control::Phase;
use tonic::Code;

#[tokio::test]
async fn a_resource_joins_reports_and_leaves() {
    let running = Running::start().await;
    let mut client = running.registration().await;

    let response = client.register(register_request("pg1", 7)).await.unwrap().into_inner();
    assert!(response.created);
    assert_eq!((response.balancer_id.as_str(), response.lease.unwrap().seconds), ("b-1", 3));
    let again = client.register(register_request("pg1", 7)).await.unwrap().into_inner();
    assert!(!again.created, "the same incarnation renews");
    let table = running.table("pg1", |table| table.eligible().len() == 1).await;
    assert_eq!(table.members().backends()[0].address, "127.0.0.1:5433".parse().unwrap());

    let mut reporter = Reporter::open(&mut client, "pg1", 7).await;
    reporter.send(0.25).await;
    let ack = reporter.ack().await;
    assert_eq!((ack.sequence, ack.state(), ack.refused.as_str()), (1, ResourceState::Ready, ""));
    reporter.send(0.25).await;
    let ack = reporter.ack().await;
    assert_eq!((ack.sequence, ack.weight, ack.share), (2, 1.0, 1.0));

    let leave = DeregisterRequest { id: "pg1".into(), incarnation: 7 };
    assert!(client.deregister(leave.clone()).await.unwrap().into_inner().removed);
    assert!(!client.deregister(leave).await.unwrap().into_inner().removed, "idempotent");
    running.table("nobody", |table| table.members().backends().is_empty()).await;
    reporter.send(0.25).await;
    assert_eq!(reporter.event().await.unwrap_err().code(), Code::NotFound, "it has to register again");
}

#[tokio::test]
async fn a_lease_expires_without_reports_and_not_with_them() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    client.register(register_request("silent", 1)).await.unwrap();
    client.register(register_request("alive", 1)).await.unwrap();
    running.table("both", |table| table.eligible().len() == 2).await;
    let mut reporter = Reporter::open(&mut client, "alive", 1).await;
    let started = std::time::Instant::now();
    while running.publisher.current().members().backends().len() == 2 {
        assert!(started.elapsed() < PATIENCE, "the silent one's lease ends");
        reporter.send(0.1).await;
        assert_eq!(reporter.ack().await.refused, "");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    assert!(started.elapsed() >= std::time::Duration::from_millis(2_900), "not before its lease ends");
    let left: Vec<String> = running
        .publisher
        .current()
        .members()
        .backends()
        .iter()
        .map(|backend| backend.id.to_string())
        .collect();
    assert_eq!(left, ["alive"]);
}

#[tokio::test]
async fn a_newer_incarnation_replaces_and_an_older_is_refused() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    client.register(register_request("pg1", 5)).await.unwrap();
    let mut old = Reporter::open(&mut client, "pg1", 5).await;
    old.send(0.1).await;
    old.ack().await;

    assert!(client.register(register_request("pg1", 6)).await.unwrap().into_inner().created);
    let refused = client.register(register_request("pg1", 5)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    assert!(refused.message().contains("incarnation 6"), "{}", refused.message());
    old.send(0.1).await;
    assert_eq!(old.event().await.unwrap_err().code(), Code::Aborted, "it was replaced");
    let stay = client.deregister(DeregisterRequest { id: "pg1".into(), incarnation: 5 }).await.unwrap_err();
    assert_eq!(stay.code(), Code::Aborted);
}

#[tokio::test]
async fn a_wrong_report_is_refused_counted_and_hurts_nothing() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    client.register(register_request("pg1", 1)).await.unwrap();
    let mut reporter = Reporter::open(&mut client, "pg1", 1).await;
    reporter.send(0.5).await;
    assert_eq!(reporter.ack().await.refused, "");
    for wrong in [f64::NAN, f64::INFINITY, -0.1, 1e6] {
        reporter.send(wrong).await;
        let ack = reporter.ack().await;
        assert!(ack.refused.contains("cpu_utilization"), "{wrong}: {}", ack.refused);
    }
    let nothing = ReportRequest { id: "pg1".into(), incarnation: 1, sequence: 9, ..ReportRequest::default() };
    reporter.send_raw(nothing).await;
    assert!(reporter.ack().await.refused.contains("utilization is missing"));
    reporter.send(0.5).await;
    assert_eq!(reporter.ack().await.refused, "", "the stream goes on");
    let (_, page) = running.get("/metrics").await;
    assert!(page.contains("trimtab_reports_total{source=\"push\",result=\"accepted\"} 2"), "{page}");
    assert!(page.contains("trimtab_reports_total{source=\"push\",result=\"refused\"} 5"), "{page}");
    assert!(
        page.contains("trimtab_resource_reports_refused_total{pool=\"sql\",resource=\"pg1\"} 5"),
        "{page}"
    );
}

#[tokio::test]
async fn a_stream_reports_for_one_resource_only() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    client.register(register_request("pg1", 1)).await.unwrap();
    client.register(register_request("pg2", 1)).await.unwrap();
    let mut reporter = Reporter::open(&mut client, "pg1", 1).await;
    reporter.send(0.5).await;
    reporter.ack().await;
    let other = ReportRequest { id: "pg2".into(), incarnation: 1, ..ReportRequest::default() };
    reporter.send_raw(other).await;
    assert_eq!(reporter.event().await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn who_floods_is_cut_off_and_who_is_unknown_is_told() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    let mut unknown = Reporter::open(&mut client, "nobody", 1).await;
    unknown.send(0.5).await;
    assert_eq!(unknown.event().await.unwrap_err().code(), Code::NotFound);

    client.register(register_request("pg1", 1)).await.unwrap();
    let mut flood = Reporter::open(&mut client, "pg1", 1).await;
    let mut acks = 0;
    let ended = loop {
        flood.send(0.5).await;
        match flood.event().await {
            Ok(_) => acks += 1,
            Err(status) => break status,
        }
        assert!(acks < 10_000, "a flood is cut off");
    };
    assert_eq!(ended.code(), Code::ResourceExhausted);
    assert!(acks >= 40, "a burst is fine: {acks}");
    client.register(register_request("pg1", 1)).await.expect("the connection is not cut with the stream");
}

#[tokio::test]
async fn what_is_refused_says_why() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    let with = |change: fn(&mut Resource)| {
        let mut request = register_request("pg1", 1);
        change(request.resource.as_mut().unwrap());
        request
    };
    let cases: [(RegisterRequest, Code, &str); 6] = [
        (with(|r| r.pool = "sq1".into()), Code::FailedPrecondition, "there are sql, xmpp"),
        (with(|r| r.address = "0.0.0.0:5432".into()), Code::InvalidArgument, "unspecified"),
        (with(|r| r.address = "10.0.0.1:0".into()), Code::InvalidArgument, "port 0"),
        (with(|r| r.id = "a\nb".into()), Code::InvalidArgument, "character"),
        (with(|r| r.weight = f64::NAN), Code::InvalidArgument, "weight"),
        (RegisterRequest::default(), Code::InvalidArgument, "missing"),
    ];
    for (request, code, text) in cases {
        let status = client.register(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{text}");
        assert!(status.message().contains(text), "{:?} does not say {text:?}", status.message());
    }
}

#[tokio::test]
async fn a_huge_message_is_refused_and_the_server_serves_on() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    let mut request = register_request("pg1", 1);
    let labels = HashMap::from([("k".to_owned(), "x".repeat(10 << 20))]);
    request.resource.as_mut().unwrap().labels = labels;
    let status = client.register(request).await.unwrap_err();
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status:?}");
    assert!(status.message().contains("65536"), "{}", status.message());

    client.register(register_request("pg1", 1)).await.expect("the same connection serves on");
    let mut reporter = Reporter::open(&mut client, "pg1", 1).await;
    let mut report = ReportRequest { id: "pg1".into(), incarnation: 1, ..ReportRequest::default() };
    let entries = (0..1_000_000).map(|n| (format!("dimension-{n}"), 0.5)).collect();
    report.utilization = Some(api::orca::OrcaLoadReport { utilization: entries, ..Default::default() });
    reporter.send_raw(report).await;
    let status = reporter.event().await.unwrap_err();
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status:?}");
    running.registration().await.register(register_request("pg2", 1)).await.expect("and another");
}

#[tokio::test]
async fn a_leaving_balancer_says_so_once() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    client.register(register_request("pg1", 1)).await.unwrap();
    let mut reporter = Reporter::open(&mut client, "pg1", 1).await;
    reporter.send(0.5).await;
    reporter.ack().await;
    running.phase.send(Phase::Draining).unwrap();
    match reporter.event().await.unwrap() {
        Some(Event::Notice(notice)) => {
            assert_eq!(notice.kind(), notice::Kind::BalancerLeaving);
            assert!(notice.at.is_some());
        }
        other => panic!("no notice but {other:?}"),
    }
    reporter.send(0.5).await;
    assert_eq!(reporter.ack().await.sequence, 2, "reports are taken until the end");
    running.phase.send(Phase::Terminated).unwrap();
    assert_eq!(reporter.event().await.unwrap_err().code(), Code::Unavailable);
    tokio::time::timeout(PATIENCE, running.serving).await.expect("it ends").unwrap().unwrap();
}
