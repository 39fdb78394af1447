//! What is kept: when it is acknowledged, what happens where it cannot be.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api::orca::OrcaLoadReport;
use api::v1::{
    CreateTokenRequest, DeregisterRequest, DrainRequest, Labels, ListResourcesRequest, ListTokensRequest,
    Readiness, ReportRequest, RevokeTokenRequest, SetCapabilitiesRequest,
};
use store::Store;
use tonic::Code;

use crate::harness::{PATIENCE, Reporter, Running, register_request};

fn path(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("trimtab.db")
}

/// What another process would find in the file.
fn stored(path: &Path) -> store::Contents {
    Store::open(&copied(path).1).unwrap().load().unwrap()
}

/// A copy of the file as it is now, with the folder that it is in.
fn copied(path: &Path) -> (tempfile::TempDir, PathBuf) {
    let copied = tempfile::tempdir().unwrap();
    let copy = copied.path().join("trimtab.db");
    for ending in ["", "-wal"] {
        let from = format!("{}{ending}", path.display());
        if std::fs::exists(&from).unwrap() {
            std::fs::copy(from, format!("{}{ending}", copy.display())).unwrap();
        }
    }
    (copied, copy)
}

#[tokio::test]
async fn what_was_acknowledged_is_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    let running = Running::start_with(|config| config.store = Some(Store::open(&path).unwrap())).await;
    let mut client = running.registration().await;
    let mut admin = running.admin().await;
    client.register(register_request("pg1", 1)).await.unwrap();
    client.register(register_request("pg2", 1)).await.unwrap();
    admin.drain(DrainRequest { id: "pg1".into() }).await.unwrap();
    let labels = [("zone".to_owned(), "b".to_owned())].into();
    let entered = SetCapabilitiesRequest { id: "pg9".into(), labels, remove: Vec::new() };
    admin.set_capabilities(entered).await.unwrap();
    let contents = stored(&path);
    let ids: Vec<_> =
        contents.resources.iter().map(|kept| (kept.resource.id.as_str(), kept.drained)).collect();
    assert_eq!(ids, [("pg1", true), ("pg2", false)]);
    assert_eq!(contents.capabilities["pg9"]["zone"], "b");

    let (_, before) = running.get("/metrics").await;
    let changes = |page: &str| {
        let line =
            page.lines().find(|line| line.starts_with("trimtab_store_changes_total{result=\"written\"}"));
        line.unwrap().rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    for _ in 0..10 {
        assert!(!client.register(register_request("pg1", 1)).await.unwrap().into_inner().created);
    }
    let (_, after) = running.get("/metrics").await;
    assert_eq!(changes(&before), changes(&after), "a renewal that says nothing new writes nothing");
    assert!(after.contains("trimtab_store_failing 0"), "{after}");

    client.deregister(DeregisterRequest { id: "pg1".into(), incarnation: 1 }).await.unwrap();
    assert_eq!(stored(&path).resources.len(), 1);
}

#[tokio::test]
async fn what_is_reported_is_kept_within_a_second() {
    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    let running = Running::start_with(|config| config.store = Some(Store::open(&path).unwrap())).await;
    let mut client = running.registration().await;
    client.register(register_request("pg1", 1)).await.unwrap();
    let mut reporter = Reporter::open(&mut client, "pg1", 1).await;
    let labels = Labels { entries: [("role".to_owned(), "writer".to_owned())].into() };
    let report = ReportRequest {
        id: "pg1".into(),
        incarnation: 1,
        sequence: 1,
        readiness: Readiness::NotReady.into(),
        utilization: Some(OrcaLoadReport { cpu_utilization: 0.5, ..OrcaLoadReport::default() }),
        labels: Some(labels),
        ..ReportRequest::default()
    };
    reporter.send_raw(report).await;
    assert_eq!(reporter.ack().await.refused, "");
    let deadline = Instant::now() + PATIENCE;
    let kept = loop {
        let kept = stored(&path).resources.remove(0);
        if kept.estimates.is_some() {
            break kept;
        }
        assert!(Instant::now() < deadline, "{kept:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(kept.resource.labels["role"], "writer");
    assert!(!kept.ready && kept.history.len() == 1, "{kept:?}");
    assert_eq!(kept.estimates.unwrap().utilization, 0.5);
}

#[tokio::test]
async fn a_full_disk_refuses_registrations_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    let open = || {
        let store = Store::open(&path).unwrap();
        // SQLite's own bound answers as a full disk does.
        let pages = store.read(|tables| tables.limit_pages(None)).unwrap();
        store.read(|tables| tables.limit_pages(Some(pages + 1))).unwrap();
        store
    };
    let running = Running::start_with(|config| config.store = Some(open())).await;
    let mut client = running.registration().await;
    let mut refused = None;
    let mut acknowledged = Vec::new();
    for n in 0..90 {
        let id = format!("pg{n}");
        let mut request = register_request(&id, 1);
        let resource = request.resource.as_mut().unwrap();
        resource.labels = (0..20).map(|n| (format!("key{n}"), "x".repeat(200))).collect();
        match client.register(request).await {
            Ok(_) => acknowledged.push(id),
            Err(status) => {
                refused = Some(status);
                break;
            }
        }
    }
    let refused = refused.expect("the file is full");
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("the disk of the store is full: free some room"), "{refused}");

    // Who is there goes on: it reports, renews and may leave; who was refused is not there.
    let mut admin = running.admin().await;
    let listed = admin.list_resources(ListResourcesRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.resources.len(), acknowledged.len());
    let (_, page) = running.get("/metrics").await;
    assert!(page.contains("trimtab_store_failing 1"), "{page}");
    if let Some(first) = acknowledged.first() {
        let mut reporter = Reporter::open(&mut client, first, 1).await;
        reporter.send(0.5).await;
        assert_eq!(reporter.ack().await.refused, "");
    }
    let ids: Vec<_> = stored(&path).resources.into_iter().map(|kept| kept.resource.id).collect();
    for id in &acknowledged {
        assert!(ids.contains(id), "{id} was acknowledged");
    }
}

#[tokio::test]
async fn a_full_disk_makes_no_tokens_and_counts_no_uses() {
    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    let store = Store::open(&path).unwrap();
    let pages = store.read(|tables| tables.limit_pages(None)).unwrap();
    store.read(|tables| tables.limit_pages(Some(pages + 1))).unwrap();
    let running = Running::start_with(|config| config.store = Some(store)).await;
    let mut admin = running.admin().await;
    let new = CreateTokenRequest {
        pools: vec!["sql".into()],
        addresses: (0..60).map(|n| format!("fd00:1234:5678:{n:x}::/64")).collect(),
        ttl: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        uses: 1,
        ..CreateTokenRequest::default()
    };
    let mut made = Vec::new();
    let refused = loop {
        match admin.create_token(new.clone()).await {
            Ok(token) => made.push(token.into_inner()),
            Err(status) => break status,
        }
        assert!(made.len() < 90, "the file is full");
    };
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(
        refused.message().contains("cannot remember the token: the disk of the store is full"),
        "{refused}"
    );
    let in_file = Store::open(&copied(&path).1).unwrap().read(|tables| tables.tokens()).unwrap();
    let listed = admin.list_tokens(ListTokensRequest {}).await.unwrap().into_inner().tokens;
    let ids = |ids: &mut dyn Iterator<Item = String>| ids.collect::<std::collections::BTreeSet<_>>();
    let shown = ids(&mut made.iter().map(|token| token.id.clone()));
    assert!(made.iter().all(|token| token.kept) && !made.is_empty());
    assert_eq!(ids(&mut in_file.into_iter().map(|token| token.id)), shown);
    assert_eq!(ids(&mut listed.into_iter().map(|token| token.id)), shown);

    let mut request = register_request("pg1", 1);
    let resource = request.resource.as_mut().unwrap();
    resource.labels = (0..20).map(|n| (format!("key{n}"), "x".repeat(250))).collect();
    let mut request = tonic::Request::new(request);
    let shown = format!("Bearer {}", made[0].token).parse().unwrap();
    request.metadata_mut().insert("authorization", shown);
    let refused = running.registration().await.register(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    let listed = admin.list_tokens(ListTokensRequest {}).await.unwrap().into_inner().tokens;
    assert!(listed.iter().all(|token| token.uses == 0 && token.state == "valid"), "{listed:?}");
    // Taking one back is in force at once, and whoever did it is told that it is nowhere else, or that it is.
    let revoked = admin.revoke_token(RevokeTokenRequest { id: made[0].id.clone() }).await;
    let listed = admin.list_tokens(ListTokensRequest {}).await.unwrap().into_inner().tokens;
    assert!(listed.iter().any(|token| token.id == made[0].id && token.state == "revoked"));
    match revoked {
        Ok(_) => {
            let in_file = Store::open(&copied(&path).1).unwrap().read(|tables| tables.tokens()).unwrap();
            assert!(in_file.iter().any(|token| token.id == made[0].id && token.revoked));
        }
        Err(status) => assert!(status.message().contains("a restart would forget it"), "{status}"),
    }
}
