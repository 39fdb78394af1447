//! The store on a real disk: what was answered is there again, whatever refuses it says what to do.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use store::{
    APPLICATION_ID, Chunk, EVENTS_MAX, Estimates, Event, EventKind, Hook, Kept, Notice, NoticeKind,
    NoticeOutcome, NoticeTarget, OpenError, QUEUE_MAX, Resource, Role, Script, ScriptKind, Store, StoreError,
    Token, VERSION, VersionSetting, Writer,
};
use tempfile::TempDir;

struct Lab {
    _folder: TempDir,
    path: PathBuf,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { path: folder.path().join("trimtab.db"), _folder: folder }
    }

    fn open(&self) -> Store {
        Store::open(&self.path).unwrap()
    }

    fn writer(&self) -> Writer {
        self.open().start().unwrap()
    }

    fn refused(&self) -> OpenError {
        Store::open(&self.path).unwrap_err()
    }

    /// As another program sees the file.
    fn other(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(&self.path).unwrap()
    }

    fn count(&self, table: &str) -> i64 {
        self.other().query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
    }
}

fn run<T: Send + 'static>(
    writer: &Writer,
    change: impl FnOnce(&store::Tables<'_>) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    writer.run(change).blocking_recv().unwrap()
}

fn resource(id: &str, incarnation: u64) -> Resource {
    Resource {
        id: id.into(),
        pool: "sql".into(),
        incarnation,
        version: "15.2".into(),
        flows_max: 100,
        weight: 2.5,
        report_interval_ms: 1000,
        address: "10.0.0.1:5432".into(),
        probe_address: Some("10.0.0.1:9".into()),
        labels: BTreeMap::from([("role".into(), "writer".into())]),
        scripts: vec![Script { kind: ScriptKind::Utilization, specification: b"http://10.0.0.1/".to_vec() }],
        registered_ms: 1_700_000_000_000,
        owner: Some("spiffe://example/sql/pg1".into()),
    }
}

fn kept(id: &str, incarnation: u64, start_ms: u64) -> Kept {
    Kept {
        id: id.into(),
        incarnation,
        ready: false,
        estimates: Estimates {
            reported_ms: start_ms,
            operations: None,
            flows_opened: 1.0,
            flows_open: 2.0,
            errors: 0.0,
            utilization: 0.5,
            log_weight: -0.25,
        },
        history: vec![Chunk { tier_ms: 1000, start_ms, buckets: vec![1, 2, 3] }],
    }
}

fn put(writer: &Writer, resource: Resource) {
    run(writer, move |tables| tables.put_resource(&resource)).unwrap();
}

#[test]
fn what_was_answered_is_there_again() {
    let lab = Lab::new();
    let writer = lab.writer();
    put(&writer, resource("pg1", u64::MAX));
    put(
        &writer,
        Resource { probe_address: None, labels: BTreeMap::new(), owner: None, ..resource("pg2", 1) },
    );
    assert!(writer.keep(vec![kept("pg1", u64::MAX, 50_000), kept("gone", 1, 1), kept("pg2", 7, 1)]));
    let setting = VersionSetting {
        pool: "sql".into(),
        version: "2.0".into(),
        configured: 0.1,
        share: 0.0,
        aborted: Some(("resets".into(), 0.2, 0.01)),
    };
    let labels = BTreeMap::from([("zone".into(), "b".into())]);
    let (put_setting, put_labels) = (setting.clone(), labels.clone());
    run(&writer, move |tables| {
        tables.put_version(&put_setting)?;
        tables.put_capabilities("not-here-yet", &put_labels)?;
        tables.set_drained("pg2", true)
    })
    .unwrap();
    drop(writer);

    let contents = lab.open().load().unwrap();
    assert_eq!(contents.capabilities, BTreeMap::from([("not-here-yet".into(), labels)]));
    assert_eq!(contents.versions, [setting]);
    let [pg1, pg2] = contents.resources.as_slice() else { panic!("two resources") };
    assert_eq!(pg1.resource, resource("pg1", u64::MAX));
    assert_eq!((pg1.ready, pg1.drained, &pg2.resource.owner), (false, false, &None));
    assert_eq!(pg1.estimates.as_ref(), Some(&kept("pg1", 1, 50_000).estimates));
    assert_eq!(pg1.history, kept("pg1", 1, 50_000).history);
    assert_eq!((pg2.ready, pg2.drained, pg2.estimates.clone()), (true, true, None), "of another incarnation");
}

#[test]
fn a_newer_process_starts_anew_and_leaving_takes_every_row() {
    let lab = Lab::new();
    let writer = lab.writer();
    put(&writer, resource("pg1", 1));
    writer.keep(vec![kept("pg1", 1, 50_000), kept("pg1", 1, 60_000)]);
    put(&writer, Resource { weight: 3.0, owner: None, ..resource("pg1", 1) });
    run(&writer, |tables| tables.set_drained("pg1", true)).unwrap();
    assert_eq!((lab.count("history"), lab.count("estimates")), (2, 1), "the same process keeps its history");
    assert_eq!(lab.count("resources WHERE owner IS NULL"), 1, "whose it is was amended");
    put(&writer, resource("pg1", 2));
    assert_eq!((lab.count("history"), lab.count("estimates"), lab.count("resources")), (0, 0, 1));
    writer.keep(vec![kept("pg1", 2, 70_000)]);
    // History is written after what was asked for before; the second transaction begins when the first is over.
    for _ in 0..2 {
        run(&writer, |_| Ok(())).unwrap();
    }
    let drained = lab.other().query_row("SELECT drained FROM resources", [], |row| row.get::<_, bool>(0));
    assert_eq!(drained, Ok(true), "an operator's drain outlives the process");
    for table in ["resources", "addresses", "labels", "scripts", "estimates", "history"] {
        assert!(lab.count(table) > 0, "{table}");
    }
    assert_eq!(run(&writer, |tables| tables.delete_resource("pg1")), Ok(true));
    for table in ["resources", "addresses", "labels", "scripts", "estimates", "history"] {
        assert_eq!(lab.count(table), 0, "{table}");
    }
    assert_eq!(run(&writer, |tables| tables.delete_resource("pg1")), Ok(false));
    assert!(matches!(run(&writer, |tables| tables.set_drained("pg1", true)), Err(StoreError::Missing(_))));
}

fn notice(id: &str) -> Notice {
    Notice {
        id: id.into(),
        kind: NoticeKind::Unavailable,
        target: NoticeTarget::All,
        at_ms: 1_000,
        lasts_ms: Some(500),
        flows: 0,
        alternatives: vec!["http://b2:7400".into(), "https://[::1]:7400".into()],
        reason: "a kernel".into(),
        withdraws: None,
        created_ms: 5,
        withdrawn: false,
    }
}

fn outcome(notice: &str, resource: &str) -> NoticeOutcome {
    NoticeOutcome {
        notice: notice.into(),
        resource: resource.into(),
        told: true,
        taken: false,
        failure: None,
        hook: Hook::None,
        attempts: 0,
        hook_failure: String::new(),
        changed_ms: 6,
    }
}

#[test]
fn notices_are_kept_with_what_became_of_them() {
    let lab = Lab::new();
    let writer = lab.writer();
    let shut_down = Notice {
        kind: NoticeKind::ShutDown,
        target: NoticeTarget::Resource("pg1".into()),
        lasts_ms: None,
        alternatives: Vec::new(),
        ..notice("b/notice-10")
    };
    let shed = Notice {
        kind: NoticeKind::ShedFlows,
        target: NoticeTarget::Pool("sql".into()),
        flows: u32::MAX,
        ..notice("b/notice-9")
    };
    let back = Notice {
        kind: NoticeKind::Withdrawn,
        withdraws: Some("b/notice-10".into()),
        ..notice("b/notice-11")
    };
    let all = [notice("b/notice-2"), shed, shut_down, back];
    let put = all.clone();
    let put = move |tables: &store::Tables<'_>| put.iter().try_for_each(|notice| tables.put_notice(notice));
    run(&writer, put).unwrap();
    assert_eq!(run(&writer, |tables| tables.notices()), Ok(all.to_vec()), "in their order");

    // Nobody has to be kept as a resource to have been told something.
    let waiting = NoticeOutcome {
        failure: Some("no unit".into()),
        hook: Hook::Waiting,
        attempts: 4,
        hook_failure: "503".into(),
        ..outcome("b/notice-2", "pg2")
    };
    let taken =
        NoticeOutcome { taken: true, hook: Hook::Taken, changed_ms: 9, ..outcome("b/notice-2", "pg1") };
    for row in [outcome("b/notice-2", "pg1"), waiting.clone(), taken.clone(), outcome("b/notice-9", "pg1")] {
        assert_eq!(run(&writer, move |tables| tables.put_notice_outcome(&row)), Ok(true));
    }
    let unknown = outcome("b/notice-1", "pg1");
    assert_eq!(run(&writer, move |tables| tables.put_notice_outcome(&unknown)), Ok(false));
    let known = run(&writer, |tables| tables.notice_outcomes()).unwrap();
    assert_eq!(known, [taken, waiting, outcome("b/notice-9", "pg1")]);

    let withdrawn = Notice { withdrawn: true, ..notice("b/notice-2") };
    let again = withdrawn.clone();
    run(&writer, move |tables| tables.put_notice(&again)).unwrap();
    assert_eq!(run(&writer, |tables| tables.notices()).unwrap()[0], withdrawn);
    assert_eq!(lab.count("notice_outcomes"), 3, "what became of it stays");
    assert_eq!(run(&writer, |tables| tables.delete_notice("b/notice-2")), Ok(true));
    assert_eq!(run(&writer, |tables| tables.delete_notice("b/notice-2")), Ok(false));
    assert_eq!((lab.count("notices"), lab.count("notice_outcomes")), (3, 1));
}

#[test]
fn tokens_with_their_uses_come_back_and_are_never_printed() {
    let lab = Lab::new();
    let writer = lab.writer();
    let token = Token {
        id: "0123456789ab".into(),
        hash: [0xCD; 32],
        role: Role::Resource,
        pools: vec!["sql".into(), "web".into()],
        cidrs: vec!["10.0.0.0/8".into(), "fd00::/8".into()],
        created_ms: 1,
        expires_ms: 9,
        uses_max: Some(2),
        used_by: BTreeSet::new(),
        revoked: false,
    };
    let said = format!("{token:?}");
    assert!(!said.contains("205") && !said.contains("hash") && said.contains("0123456789ab"), "{said}");
    let put = |token: &Token| {
        let token = token.clone();
        run(&writer, move |tables| tables.put_token(&token))
    };
    let admin = Token {
        id: "ba9876543210".into(),
        role: Role::Admin,
        pools: vec![],
        cidrs: vec![],
        uses_max: None,
        ..token.clone()
    };
    put(&token).unwrap();
    put(&admin).unwrap();
    let used =
        |resource: &'static str| run(&writer, move |tables| tables.use_token("0123456789ab", resource));
    assert_eq!([used("pg1"), used("pg2"), used("pg1")], [Ok(()), Ok(()), Ok(())]);
    let unknown = run(&writer, |tables| tables.use_token("ffffffffffff", "pg1"));
    assert!(matches!(unknown, Err(StoreError::Conflict(_))), "{unknown:?}");
    run(&writer, |tables| tables.unuse_token("0123456789ab", "pg2")).unwrap();
    // What is known better amends it, and its uses stay.
    let revoked = Token { revoked: true, pools: vec!["sql".into(), "sql".into()], ..token };
    put(&revoked).unwrap();
    drop(writer);

    let used_by = BTreeSet::from(["pg1".to_owned()]);
    let revoked = Token { used_by, pools: vec!["sql".into()], ..revoked };
    let store = lab.open();
    assert_eq!(store.read(|tables| tables.tokens()).unwrap(), [revoked, admin]);
    let writer = store.start().unwrap();
    assert_eq!(run(&writer, |tables| tables.delete_token("0123456789ab")), Ok(true));
    for (table, rows) in [("tokens", 1), ("token_pools", 0), ("token_cidrs", 0), ("token_uses", 0)] {
        assert_eq!(lab.count(table), rows, "{table}");
    }
}

#[test]
fn events_are_bounded() {
    let lab = Lab::new();
    let writer = lab.writer();
    run(&writer, |tables| {
        for at_ms in 0..EVENTS_MAX + 5 {
            let event = Event {
                at_ms,
                kind: EventKind::Registered,
                resource: None,
                pool: None,
                detail: String::new(),
            };
            tables.add_event(&event)?;
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(lab.count("events"), EVENTS_MAX as i64);
    let newest = run(&writer, |tables| tables.newest_events(1)).unwrap();
    assert_eq!((newest.len(), newest[0].at_ms, newest[0].kind), (1, EVENTS_MAX + 4, EventKind::Registered));
}

#[test]
fn history_is_pruned_by_tier() {
    let lab = Lab::new();
    let writer = lab.writer();
    put(&writer, resource("pg1", 1));
    writer.keep(vec![kept("pg1", 1, 50_000), kept("pg1", 1, 60_000)]);
    assert_eq!(run(&writer, |tables| tables.prune_history(60_000, 70_000)), Ok(0));
    // History waits for everything else, so it may be written only now.
    drop(writer);
    let writer = lab.writer();
    assert_eq!(run(&writer, |tables| tables.prune_history(1_000, 60_000)), Ok(1));
    assert_eq!(lab.count("history"), 1);
}

#[test]
fn one_change_that_fails_is_undone_alone() {
    let lab = Lab::new();
    let writer = lab.writer();
    let answers: Vec<_> = (0..100)
        .map(|n| {
            writer.run(move |tables| {
                tables.put_resource(&resource(&format!("r{n}"), 1))?;
                if n % 10 == 0 { Err(StoreError::Missing("reason".into())) } else { Ok(n) }
            })
        })
        .collect();
    let outcomes: Vec<_> = answers.into_iter().map(|answer| answer.blocking_recv().unwrap()).collect();
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 90);
    assert_eq!(lab.count("resources"), 90);
    let stats = writer.stats();
    assert_eq!((stats.changes, stats.changes_failed, stats.failing), (90, 10, false));
    assert!(stats.commits < 100, "changes that come together are committed together: {stats:?}");
}

#[test]
fn a_disk_that_stands_still_refuses_what_is_too_much() {
    let lab = Lab::new();
    let writer = lab.writer();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (say, begun) = std::sync::mpsc::channel();
    let held = writer.run(move |_| {
        say.send(()).unwrap();
        let _ = wait.recv();
        Ok(())
    });
    begun.recv().unwrap();
    let answers: Vec<_> = (0..QUEUE_MAX + 10).map(|_| writer.run(|_| Ok(()))).collect();
    let batches = (0..200).filter(|_| writer.keep(Vec::new())).count();
    assert_eq!(batches, 128);
    drop(go);
    let refused =
        answers.into_iter().filter_map(|answer| answer.blocking_recv().unwrap().err()).collect::<Vec<_>>();
    assert_eq!(refused.len(), 10);
    assert!(matches!(refused[0], StoreError::QueueFull { waiting: QUEUE_MAX }), "{:?}", refused[0]);
    assert_eq!(held.blocking_recv().unwrap(), Ok(()));
    let stats = writer.stats();
    assert_eq!((stats.changes_refused, stats.history_dropped), (10, 72));
}

#[test]
fn a_file_at_its_largest_refuses_changes_and_goes_on_when_there_is_room() {
    let lab = Lab::new();
    let writer = lab.writer();
    put(&writer, resource("pg1", 1));
    // SQLite's own bound answers SQLITE_FULL, as a full disk does.
    let pages = run(&writer, |tables| tables.limit_pages(None)).unwrap();
    run(&writer, move |tables| tables.limit_pages(Some(pages + 2))).unwrap();
    let big = |n: u64| Kept {
        history: vec![Chunk { tier_ms: 1000, start_ms: n, buckets: vec![7; 8_000] }],
        ..kept("pg1", 1, n)
    };
    let full = (0..10).find_map(|n| run(&writer, move |tables| tables.keep(&big(n))).err());
    assert_eq!(full, Some(StoreError::Full));
    assert!(writer.stats().failing);
    assert!(run(&writer, |tables| tables.resources()).is_ok(), "what is there can be read");
    run(&writer, move |tables| tables.limit_pages(Some(pages + 1_000))).unwrap();
    assert_eq!(run(&writer, move |tables| tables.keep(&big(99))), Ok(()));
    assert!(!writer.stats().failing);
}

#[test]
fn two_balancers_never_share_a_file() {
    let lab = Lab::new();
    let first = lab.writer();
    let error = lab.refused();
    assert!(matches!(error, OpenError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("belongs to another balancer that runs now"), "{error}");
    drop(first);
    lab.open();
}

#[test]
fn files_that_are_not_ours_are_refused_and_left_alone() {
    let lab = Lab::new();
    fs::write(&lab.path, "[control]\nlisten = \"127.0.0.1:7400\"\n").unwrap();
    let error = lab.refused();
    assert!(matches!(error, OpenError::Foreign { .. }), "{error}");
    assert_eq!(fs::read(&lab.path).unwrap(), b"[control]\nlisten = \"127.0.0.1:7400\"\n");

    fs::remove_file(&lab.path).unwrap();
    lab.other().execute_batch("CREATE TABLE accounts (x)").unwrap();
    let before = fs::read(&lab.path).unwrap();
    let error = lab.refused();
    assert!(error.to_string().contains("another program, with 1 tables"), "{error}");
    assert_eq!(fs::read(&lab.path).unwrap(), before);
}

#[test]
fn a_newer_file_is_refused_with_both_versions() {
    let lab = Lab::new();
    drop(lab.writer());
    lab.other().pragma_update(None, "user_version", VERSION + 1).unwrap();
    let before = fs::read(&lab.path).unwrap();
    let error = lab.refused();
    assert!(matches!(error, OpenError::Newer { found, .. } if found == VERSION + 1), "{error}");
    assert!(
        error.to_string().contains(&format!("its layout is {}, this version knows {VERSION}", VERSION + 1))
    );
    assert_eq!(fs::read(&lab.path).unwrap(), before);
}

#[test]
fn a_damaged_file_is_refused_wherever_the_damage_is() {
    let lab = Lab::new();
    let writer = lab.writer();
    for n in 0..200 {
        put(&writer, resource(&format!("r{n}"), 1));
    }
    drop(writer);
    let whole = fs::read(&lab.path).unwrap();
    let pages = whole.len() / 4096;
    assert!(pages > 20, "{pages}");
    // Its header is whole, a page is not; and a file cut short.
    for page in [1, 2, pages / 2] {
        let mut damaged = whole.clone();
        damaged[page * 4096..(page + 1) * 4096].fill(0x5A);
        fs::write(&lab.path, &damaged).unwrap();
        let error = lab.refused();
        assert!(matches!(error, OpenError::Corrupt { .. }), "page {page}: {error}");
        assert!(error.to_string().contains("is damaged, and is left as it is"), "{error}");
    }
    fs::write(&lab.path, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(lab.refused(), OpenError::Corrupt { .. }));
    fs::write(&lab.path, &whole).unwrap();
    assert_eq!(lab.open().load().unwrap().resources.len(), 200);
}

#[test]
fn places_that_cannot_be_written_are_named() {
    let lab = Lab::new();
    let folder = lab.path.parent().unwrap();
    for path in [folder.join("no/such/folder/trimtab.db"), folder.to_owned()] {
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(error, OpenError::Unwritable { .. }), "{error}");
        assert!(error.to_string().contains("must be able to write"), "{error}");
    }
}

#[test]
fn the_file_is_marked_as_ours_and_read_by_nobody_else() {
    let lab = Lab::new();
    drop(lab.writer());
    let id: i32 = lab.other().pragma_query_value(None, "application_id", |row| row.get(0)).unwrap();
    assert_eq!(id, APPLICATION_ID);
    assert_eq!(fs::metadata(&lab.path).unwrap().permissions().mode() & 0o777, 0o600);
}
