//! What resources are told, and that it shows who has not taken it.

use api::v1::notice::Kind;
use api::v1::report_response::Event;
use api::v1::{
    ListNoticesRequest, Notice, NoticeStatus, NoticeTaken, NotifyRequest, ReportRequest,
    WithdrawNoticeRequest,
};
use tonic::Code;

use crate::harness::{Reporter, Running, register_request};

fn unavailable() -> NotifyRequest {
    let notice = Notice {
        kind: Kind::BalancerUnavailable.into(),
        lasts: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        ..Notice::default()
    };
    NotifyRequest { notice: Some(notice), ..NotifyRequest::default() }
}

fn to(kind: Kind, resource: &str) -> NotifyRequest {
    let notice = Notice { kind: kind.into(), flows: 3, ..Notice::default() };
    NotifyRequest { notice: Some(notice), resource: resource.into(), pool: String::new() }
}

/// The next notice, whatever acks come before it.
async fn notice(reporter: &mut Reporter) -> Notice {
    loop {
        match reporter.event().await {
            Ok(Some(Event::Notice(notice))) => return notice,
            Ok(Some(Event::Ack(_))) => {}
            other => panic!("no notice but {other:?}"),
        }
    }
}

async fn took(reporter: &mut Reporter, id: &str, notice: &str, failure: &str) {
    let taken = NoticeTaken { id: notice.into(), failure: failure.into() };
    let report = ReportRequest {
        id: id.into(),
        incarnation: 1,
        utilization: Some(Default::default()),
        notices_taken: vec![taken],
        ..ReportRequest::default()
    };
    reporter.send_raw(report).await;
    reporter.ack().await;
}

async fn listed(running: &Running) -> Vec<NoticeStatus> {
    running.admin().await.list_notices(ListNoticesRequest {}).await.unwrap().into_inner().notices
}

fn states(status: &NoticeStatus) -> (u32, u32, Vec<String>) {
    let not_taken = status.not_taken.iter().map(|not| format!("{} {}", not.id, not.state)).collect();
    (status.resources, status.taken, not_taken)
}

#[tokio::test]
async fn a_notice_is_told_until_it_was_taken_and_shows_who_has_not() {
    let running =
        Running::start_with(|config| config.alternatives = vec!["http://10.0.0.8:7400".into()]).await;
    let mut client = running.registration().await;
    for id in ["pg1", "pg2"] {
        client.register(register_request(id, 1)).await.unwrap();
    }
    let mut pg1 = Reporter::open(&mut client, "pg1", 1).await;
    pg1.send(0.1).await;
    pg1.ack().await;
    let made = running.admin().await.notify(unavailable()).await.unwrap().into_inner();
    assert_eq!(made.resources, 2);

    let told = notice(&mut pg1).await;
    assert_eq!(
        (told.id.as_str(), told.alternatives),
        (made.id.as_str(), vec!["http://10.0.0.8:7400".to_owned()])
    );
    let all = listed(&running).await;
    assert_eq!(states(&all[0]), (2, 0, vec!["pg1 told".to_owned(), "pg2 not connected".to_owned()]));
    took(&mut pg1, "pg1", &made.id, "exit status: 1").await;
    assert_eq!(states(&listed(&running).await[0]).2[0], "pg1 failed: exit status: 1");
    let (_, metrics) = running.get("/metrics").await;
    assert!(metrics.contains("\ntrimtab_notices_not_taken 2\n"), "{metrics}");

    // On another stream it is told again, for it was not taken; on the next it is not.
    drop(pg1);
    let mut pg1 = Reporter::open(&mut client, "pg1", 1).await;
    pg1.send(0.1).await;
    assert_eq!(notice(&mut pg1).await.id, made.id);
    took(&mut pg1, "pg1", &made.id, "").await;
    assert_eq!(states(&listed(&running).await[0]), (2, 1, vec!["pg2 not connected".to_owned()]));
    drop(pg1);
    let mut pg1 = Reporter::open(&mut client, "pg1", 1).await;
    pg1.send(0.1).await;
    pg1.ack().await;

    // Withdrawn: who was told of it is told, who was not hears of neither.
    let withdraw = WithdrawNoticeRequest { id: made.id.clone() };
    running.admin().await.withdraw_notice(withdraw.clone()).await.unwrap();
    let withdrawn = notice(&mut pg1).await;
    assert_eq!((withdrawn.kind(), &withdrawn.withdraws), (Kind::Withdrawn, &made.id));
    let mut pg2 = Reporter::open(&mut client, "pg2", 1).await;
    pg2.send(0.1).await;
    pg2.ack().await;
    running.admin().await.notify(to(Kind::ShedFlows, "pg2")).await.unwrap();
    let shed = notice(&mut pg2).await;
    assert_eq!((shed.kind(), shed.flows), (Kind::ShedFlows, 3));
    let again = running.admin().await.withdraw_notice(withdraw).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn what_an_operator_may_not_ask_for() {
    let running = Running::start().await;
    running.registration().await.register(register_request("pg1", 1)).await.unwrap();
    let mut admin = running.admin().await;
    for (request, code) in [
        (NotifyRequest::default(), Code::InvalidArgument),
        (to(Kind::BalancerLeaving, "pg1"), Code::InvalidArgument),
        (to(Kind::ShutDown, ""), Code::InvalidArgument),
        (to(Kind::ShutDown, "pg9"), Code::NotFound),
        (NotifyRequest { pool: "ldap".into(), ..unavailable() }, Code::NotFound),
    ] {
        assert_eq!(admin.notify(request.clone()).await.unwrap_err().code(), code, "{request:?}");
    }
    let unknown = admin.withdraw_notice(WithdrawNoticeRequest { id: "x".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(listed(&running).await.is_empty());
}

#[tokio::test]
async fn a_schedule_is_announced_in_its_time() {
    let running = Running::start_with(|config| {
        config.maintenance = vec![control::Maintenance {
            schedule: "0 0 1 1 *".parse().unwrap(),
            lasts: std::time::Duration::from_secs(60),
            // It is always less than so long until the next new year.
            notice: std::time::Duration::from_secs(366 * 24 * 3600),
            alternatives: vec!["http://10.0.0.7:7400".into()],
            reason: "new year".into(),
        }];
    })
    .await;
    let mut client = running.registration().await;
    client.register(register_request("pg1", 1)).await.unwrap();
    let mut pg1 = Reporter::open(&mut client, "pg1", 1).await;
    pg1.send(0.1).await;
    let told = notice(&mut pg1).await;
    assert_eq!((told.kind(), told.reason.as_str()), (Kind::BalancerUnavailable, "new year"));
    assert_eq!(told.alternatives, ["http://10.0.0.7:7400"]);
}
