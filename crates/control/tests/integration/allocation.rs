//! Requirements, versions, balancers and probes, as messages say them.

use std::collections::HashMap;

use crate::harness::{Reporter, Running, register_request};
use allocation::{AllocationTable, Policy, Publisher};
use api::orca::OrcaLoadReport;
use api::v1::{
    Capabilities, ExplainRequest, Labels, ListCapabilitiesRequest, ListResourcesRequest, ListVersionsRequest,
    ReportRequest, Resource, SetCapabilitiesRequest, SetVersionShareRequest,
};
use registry::{AbortConfig, Requirements, SplitBy, SplitConfig};
use tonic::Code;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

fn labels(entries: &[(&str, &str)]) -> HashMap<String, String> {
    entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn numbered(count: usize) -> HashMap<String, String> {
    (0..count).map(|n| (format!("k{n}"), String::new())).collect()
}

fn set(id: &str, entries: HashMap<String, String>, remove: &[&str]) -> SetCapabilitiesRequest {
    let remove = remove.iter().map(|key| (*key).to_owned()).collect();
    SetCapabilitiesRequest { id: id.into(), labels: entries, remove }
}

/// A pool `sql` whose one listener requires a writer.
async fn with_a_writer_listener() -> Running {
    Running::start_with(|config| {
        let pool = &mut config.pools[0];
        pool.config.tables = vec![Requirements::from_texts(["role=writer", "tls"]).unwrap()];
        pool.publishers.push(Publisher::new(AllocationTable::empty(Policy::Adaptive)));
    })
    .await
}

#[tokio::test]
async fn capabilities_are_set_before_a_resource_joins_and_after() {
    let running = Running::start().await;
    let mut admin = running.admin().await;
    let none = admin.list_capabilities(ListCapabilitiesRequest {}).await.unwrap().into_inner();
    assert!(none.capabilities.is_empty());

    let entered = set("pg1", labels(&[("role", "writer"), ("tls", "")]), &[]);
    let answer = admin.set_capabilities(entered).await.unwrap().into_inner();
    assert_eq!((answer.joined, answer.labels), (false, labels(&[("role", "writer"), ("tls", "")])));
    admin.set_capabilities(set("a", labels(&[("zone", "b")]), &[])).await.unwrap();

    let mut client = running.registration().await;
    let mut request = register_request("pg1", 1);
    request.resource.as_mut().unwrap().labels = labels(&[("role", "reader"), ("own", "1")]);
    client.register(request).await.unwrap();
    // What is set is added to what was; what is both set and removed stays.
    let changed = set("pg1", labels(&[("role", "primary"), ("new", "1")]), &["tls", "never", "new"]);
    let answer = admin.set_capabilities(changed).await.unwrap().into_inner();
    let in_force = labels(&[("role", "primary"), ("new", "1")]);
    assert_eq!((answer.joined, &answer.labels), (true, &in_force));
    let same = admin.set_capabilities(set("pg1", HashMap::new(), &[])).await.unwrap().into_inner();
    assert_eq!(same.labels, in_force, "nothing set and nothing removed changes nothing");
    let listed = admin.list_capabilities(ListCapabilitiesRequest {}).await.unwrap().into_inner();
    let expected = [
        Capabilities { id: "a".into(), labels: labels(&[("zone", "b")]), joined: false },
        Capabilities { id: "pg1".into(), labels: in_force, joined: true },
    ];
    assert_eq!(listed.capabilities, expected, "by id");
    let list = ListResourcesRequest { pool: "sql".into() };
    let resources = admin.list_resources(list).await.unwrap().into_inner().resources;
    let shown = &resources[0].resource.as_ref().unwrap().labels;
    assert_eq!(*shown, labels(&[("role", "primary"), ("new", "1"), ("own", "1")]));

    let emptied = admin.set_capabilities(set("a", HashMap::new(), &["zone"])).await.unwrap().into_inner();
    assert!(emptied.labels.is_empty());
    let left = admin.list_capabilities(ListCapabilitiesRequest {}).await.unwrap().into_inner();
    assert_eq!(left.capabilities.len(), 1, "who has none is not kept");
}

#[tokio::test]
async fn capabilities_have_bounds() {
    let running = Running::start_with(|config| config.limits.capabilities_max = 2).await;
    let mut admin = running.admin().await;
    let cases = [
        (set("a b", HashMap::new(), &[]), Code::InvalidArgument, "id has the character ' '"),
        (set("", HashMap::new(), &[]), Code::InvalidArgument, "id "),
        (set("a", numbered(65), &[]), Code::InvalidArgument, "labels has 65 entries"),
        (set("a", labels(&[("a b", "")]), &[]), Code::InvalidArgument, "labels has a key that"),
        (set("a", labels(&[("", "x")]), &[]), Code::InvalidArgument, "labels has a key that"),
        (set("a", labels(&[("k", &"x".repeat(257))]), &[]), Code::InvalidArgument, "257 bytes"),
    ];
    for (request, code, text) in cases {
        let refused = admin.set_capabilities(request).await.unwrap_err();
        assert!(refused.code() == code && refused.message().contains(text), "{refused:?} for {text}");
    }
    admin.set_capabilities(set("a", numbered(64), &[])).await.expect("64 fit");
    let more = admin.set_capabilities(set("a", labels(&[("one", "more")]), &[])).await.unwrap_err();
    assert_eq!(more.code(), Code::ResourceExhausted);
    assert!(more.message().contains("would have 65 labels"), "{}", more.message());
    admin.set_capabilities(set("a", labels(&[("one", "more")]), &["k0"])).await.expect("one for another");
    admin.set_capabilities(set("b", labels(&[("k", "")]), &[])).await.unwrap();
    let many = admin.set_capabilities(set("c", labels(&[("k", "")]), &[])).await.unwrap_err();
    assert_eq!(many.code(), Code::ResourceExhausted);
    assert!(many.message().contains("for 2 resources"), "{}", many.message());
    admin.set_capabilities(set("c", HashMap::new(), &["k"])).await.expect("nothing is kept of it");
    let all = admin.list_capabilities(ListCapabilitiesRequest {}).await.unwrap().into_inner().capabilities;
    assert_eq!(
        all.iter().map(|c| (c.id.as_str(), c.labels.len())).collect::<Vec<_>>(),
        [("a", 64), ("b", 1)]
    );
}

#[tokio::test]
async fn a_pool_without_a_split_has_no_versions() {
    let running = Running::start().await;
    let mut admin = running.admin().await;
    let versions =
        admin.list_versions(ListVersionsRequest { pool: "sql".into() }).await.unwrap().into_inner();
    assert_eq!((versions.pool.as_str(), versions.by.as_str(), versions.versions.len()), ("sql", "", 0));
    let unknown = admin.list_versions(ListVersionsRequest { pool: "sqlx".into() }).await.unwrap_err();
    assert_eq!(unknown.message(), "there is no pool sqlx; there are sql, xmpp");
    let bad = admin.list_versions(ListVersionsRequest { pool: "a b".into() }).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    let share = |pool: &str| SetVersionShareRequest { pool: pool.into(), version: "2".into(), share: 0.1 };
    let unsplit = admin.set_version_share(share("sql")).await.unwrap_err();
    assert_eq!(unsplit.code(), Code::FailedPrecondition, "{unsplit:?}");
    let unknown = admin.set_version_share(share("sqlx")).await.unwrap_err();
    assert_eq!(
        (unknown.code(), unknown.message()),
        (Code::NotFound, "there is no pool sqlx; there are sql, xmpp")
    );
}

#[tokio::test]
async fn shares_of_versions_are_set_within_their_bounds() {
    let running = Running::start_with(|config| {
        let texts = ["1.9", "2.0=10%", "3=50%"];
        let split = SplitConfig::parse(&texts, SplitBy::Client, AbortConfig::default());
        config.pools[0].config.split = Some(split.unwrap());
    })
    .await;
    let mut admin = running.admin().await;
    for (version, share, text) in [
        ("2", 0.1, "\"2\" is not in the split; there are 1.9, 2.0, 3"),
        ("", 0.1, "there are 1.9, 2.0, 3"),
        ("1.9", 0.1, "baseline"),
        ("2.0", 1.5, "0% to 100%"),
        ("2.0", -0.1, "0% to 100%"),
        ("2.0", f64::NAN, "0% to 100%"),
        ("2.0", 0.6, "110% together"),
    ] {
        let request = SetVersionShareRequest { pool: "sql".into(), version: version.into(), share };
        let refused = admin.set_version_share(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{version} {share}");
        assert!(refused.message().contains(text), "{:?} does not say {text:?}", refused.message());
    }
    let list = ListVersionsRequest { pool: "sql".into() };
    let shares = |versions: &api::v1::ListVersionsResponse| -> Vec<_> {
        let version = |v: &api::v1::VersionStatus| (v.version.clone(), v.baseline, (v.share * 1e3).round());
        versions.versions.iter().map(version).collect()
    };
    let before = admin.list_versions(list.clone()).await.unwrap().into_inner();
    assert_eq!(before.by, "client");
    let expected = [("1.9".into(), true, 400.0), ("2.0".into(), false, 100.0), ("3".into(), false, 500.0)];
    assert_eq!(shares(&before), expected, "what was refused changed nothing");
    assert!(before.versions[1].reset_ratio < 0.0, "nothing to tell from is negative");
    let request = SetVersionShareRequest { pool: "sql".into(), version: "2.0".into(), share: 0.5 };
    admin.set_version_share(request).await.unwrap();
    let after = admin.list_versions(list).await.unwrap().into_inner();
    let expected = [("1.9".into(), true, 0.0), ("2.0".into(), false, 500.0), ("3".into(), false, 500.0)];
    assert_eq!(shares(&after), expected);
    let (_, page) = running.get("/metrics").await;
    assert!(page.contains("trimtab_version_share_ratio{pool=\"sql\",version=\"2.0\"} 0.5\n"), "{page}");
    assert!(page.contains("trimtab_version_aborted{pool=\"sql\",version=\"3\"} 0\n"), "{page}");
}

#[tokio::test]
async fn an_explanation_is_of_what_some_listener_requires() {
    let running = with_a_writer_listener().await;
    let mut admin = running.admin().await;
    let mut client = running.registration().await;
    for (id, own) in
        [("pg1", labels(&[("role", "writer"), ("tls", "true")])), ("pg2", labels(&[("tls", "")]))]
    {
        let mut request = register_request(id, 1);
        request.resource.as_mut().unwrap().labels = own;
        client.register(request).await.unwrap();
    }
    running.table("both", |table| table.eligible().len() == 2).await;
    let question = |requires: &[&str], client: &str| ExplainRequest {
        pool: "sql".into(),
        client: client.into(),
        requires: requires.iter().map(|text| (*text).to_owned()).collect(),
        // More than are ever given.
        last: u32::MAX,
    };
    let writers = admin.explain(question(&["tls", " role = writer"], "10.0.0.1")).await.unwrap().into_inner();
    assert_eq!(writers.requires, ["role=writer", "tls"]);
    assert_eq!((writers.next.as_str(), writers.no_backend.as_str()), ("pg1", ""));
    let left_out: Vec<_> = writers.candidates.iter().map(|c| (c.id.as_str(), c.left_out.as_str())).collect();
    assert_eq!(left_out, [("pg1", ""), ("pg2", "it does not meet role=writer")]);
    assert_eq!(writers.tables, ["none", "role=writer, tls"]);
    let all = admin.explain(question(&[], "::ffff:10.0.0.1")).await.unwrap().into_inner();
    assert!(all.requires.is_empty() && all.candidates.iter().all(|c| c.left_out.is_empty()));
    let guards: Vec<_> = all.guards.iter().map(|guard| guard.name.as_str()).collect();
    assert_eq!(guards, registry::GuardStatus::NAMES);

    let many: Vec<String> = (0..65).map(|n| format!("k{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for (request, code, text) in [
        (
            question(&["role=writer"], ""),
            Code::NotFound,
            "no listener of pool sql requires role=writer: role=writer, tls",
        ),
        (question(&["role writer"], ""), Code::InvalidArgument, "no comparison"),
        (question(&["="], ""), Code::InvalidArgument, "key"),
        (question(&many, ""), Code::InvalidArgument, "65 requirements"),
        (question(&[], "localhost"), Code::InvalidArgument, "client \"localhost\" is not an IP address"),
        (question(&[], "10.0.0.1:5432"), Code::InvalidArgument, "is not an IP address"),
    ] {
        let refused = admin.explain(request).await.unwrap_err();
        assert!(refused.code() == code && refused.message().contains(text), "{refused:?} for {text}");
    }
    let mut elsewhere = question(&["tls"], "");
    elsewhere.pool = "xmpp".into();
    let refused = admin.explain(elsewhere).await.unwrap_err();
    assert!(refused.message().ends_with("none requires anything"), "{}", refused.message());
}

#[tokio::test]
async fn a_report_says_labels_and_balancers() {
    let running = with_a_writer_listener().await;
    let mut admin = running.admin().await;
    let mut client = running.registration().await;
    let mut request = register_request("pg1", 1);
    request.resource.as_mut().unwrap().labels = labels(&[("role", "reader"), ("tls", "true")]);
    client.register(request).await.unwrap();
    let mut reporter = Reporter::open(&mut client, "pg1", 1).await;
    let report = |entries: Option<HashMap<String, String>>, balancers| ReportRequest {
        id: "pg1".into(),
        incarnation: 1,
        utilization: Some(OrcaLoadReport { cpu_utilization: 0.5, ..OrcaLoadReport::default() }),
        balancers,
        labels: entries.map(|entries| Labels { entries }),
        ..ReportRequest::default()
    };
    let mut explain = async || {
        let requires = vec!["role=writer".into(), "tls".into()];
        let request = ExplainRequest { pool: "sql".into(), requires, ..ExplainRequest::default() };
        admin.explain(request).await.unwrap().into_inner()
    };
    let promoted = labels(&[("role", "writer"), ("tls", "true")]);
    reporter.send_raw(report(Some(promoted.clone()), 2)).await;
    assert_eq!(reporter.ack().await.refused, "");
    running.table("two balancers", |table| table.balancers() == 2.0).await;
    let explained = explain().await;
    let candidate = &explained.candidates[0];
    assert_eq!((explained.balancers, candidate.balancers, explained.next.as_str()), (2.0, 2, "pg1"));
    assert_eq!((&candidate.labels, candidate.left_out.as_str()), (&promoted, ""));

    // None said: as they were. 0 balancers: one. More than there can be: bounded.
    for (said, counts) in [(0, 1.0), (3, 3.0), (u32::MAX, 64.0)] {
        reporter.send_raw(report(None, said)).await;
        assert_eq!(reporter.ack().await.refused, "");
        running.table("another count", |table| table.balancers() == counts).await;
    }
    let (_, page) = running.get("/metrics").await;
    assert!(page.contains("trimtab_pool_balancers{pool=\"sql\"} 64\n"), "{page}");
    assert_eq!(explain().await.candidates[0].labels, promoted);

    for (wrong, text) in [
        (numbered(65), "labels has 65 entries"),
        (labels(&[("a b", "")]), "labels has a key"),
        (labels(&[("k", &"x".repeat(257))]), "257 bytes"),
    ] {
        reporter.send_raw(report(Some(wrong), 1)).await;
        let ack = reporter.ack().await;
        assert!(ack.refused.contains(text), "{:?} does not say {text:?}", ack.refused);
    }
    let unchanged = explain().await;
    assert_eq!(
        (&unchanged.candidates[0].labels, unchanged.balancers),
        (&promoted, 64.0),
        "a wrong report changes nothing"
    );

    reporter.send_raw(report(Some(HashMap::new()), 1)).await;
    assert_eq!(reporter.ack().await.refused, "");
    running.table("one balancer", |table| table.balancers() == 1.0).await;
    let demoted = explain().await;
    assert_eq!(demoted.candidates[0].left_out, "it does not meet role=writer");
    assert_eq!(demoted.no_backend, "no ready resource of the pool meets the requirement");
}

#[tokio::test]
async fn a_resource_has_nobody_else_probed() {
    let running = Running::start().await;
    let mut client = running.registration().await;
    let with = |probe: &str| {
        let mut request = register_request("pg1", 1);
        let resource: &mut Resource = request.resource.as_mut().unwrap();
        resource.probe_address = probe.into();
        request
    };
    for (probe, text) in [
        ("127.0.0.2:7402", "of another host"),
        ("[::1]:7402", "of another host"),
        ("127.0.0.1", "is not an ip:port"),
        ("localhost:7402", "is not an ip:port"),
        ("127.0.0.1:0", "probe_address"),
    ] {
        let refused = client.register(with(probe)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{probe}");
        assert!(refused.message().contains(text), "{:?} does not say {text:?}", refused.message());
    }
    client.register(with("127.0.0.1:7402")).await.unwrap();
    let list = ListResourcesRequest::default();
    let resources = running.admin().await.list_resources(list).await.unwrap().into_inner().resources;
    assert_eq!(resources[0].resource.as_ref().unwrap().probe_address, "127.0.0.1:7402");
}

#[tokio::test]
async fn reflection_knows_every_call() {
    let running = Running::start().await;
    let mut client = ServerReflectionClient::new(running.channel().await);
    let calls = [
        "ListResources",
        "ListPools",
        "Drain",
        "Ready",
        "Explain",
        "SetCapabilities",
        "ListCapabilities",
        "ListVersions",
        "SetVersionShare",
    ];
    for call in calls {
        let symbol = format!("trimtab.control.v1.AdminService.{call}");
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::FileContainingSymbol(symbol)),
        };
        let answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap();
        let answer = answers.into_inner().message().await.unwrap().unwrap();
        let file = answer.message_response;
        assert!(matches!(file, Some(MessageResponse::FileDescriptorResponse(_))), "{call}: {file:?}");
    }
}
