//! The fixtures themselves, without trimtab: a test that leans on one that does not work proves nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use e2e::{Attempt, Load, PgBench, Postgres, Psql, SqlClient, until};

#[test]
fn postgres_serves_and_leaves_nothing_behind() {
    let postgres = Postgres::start();
    let address = postgres.address();
    let mut client = SqlClient::connect(address).expect("a session");
    assert_eq!(client.server().expect("an answer"), address.ip().to_string());
    let refused = client.query("select 1 / 0").expect_err("an error");
    assert_eq!(refused.to_string(), "server: ERROR: division by zero");
    assert_eq!(client.query("select 7").expect("the session goes on"), "7");

    let mut psql = Psql::open(address);
    assert_eq!(psql.ask("6 * 7", "first"), "42");
    assert_eq!(psql.ask("2", "second"), "2");
    assert_eq!(psql.quit().code, Some(0));

    let sessions = postgres.sessions();
    let pgbench = PgBench::start(address, &["-c", "4", "-C", "-S", "-t", "10"]);
    assert_eq!(pgbench.succeed(Duration::from_secs(30)), 40);
    until("the server counted the sessions", || (postgres.sessions() >= sessions + 40).then_some(()));

    let process = format!("/proc/{}", postgres.id());
    assert!(Path::new(&process).exists());
    drop(postgres);
    assert!(!Path::new(&process).exists());
    client.query("select 1").expect_err("the server is gone");
}

#[test]
fn a_killed_server_refuses_at_once() {
    let mut postgres = Postgres::start();
    let load = Load::start(postgres.address(), 2, Duration::from_millis(1));
    until("connections succeed", || (load.so_far().len() > 20).then_some(()));
    let mut client = SqlClient::connect(postgres.address()).expect("a session");
    let killing = Instant::now();
    postgres.kill();
    let killed = Instant::now();
    client.query("select 1").expect_err("the session is gone");
    until("connections fail", || load.so_far().last().is_some_and(|last| last.began > killed).then_some(()));
    for Attempt { began, took, outcome } in load.stop() {
        assert!(outcome.is_ok() || began + took > killing, "failed before: {outcome:?}");
        assert!(outcome.is_err() || began < killed, "succeeded after: {outcome:?}");
    }
}
