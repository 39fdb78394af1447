//! The main job: PostgreSQL instances that no file names share the connections of one listener.

use std::time::Duration;

use e2e::{BalancerConfig, Lab, PATIENCE, PgBench, Postgres, Psql, until, within};

/// A resource that joins gets connections within this time of its agent's start.
const JOIN_WITHIN: Duration = Duration::from_secs(2);
/// From a drain's answer until the last worker selects from a table without the resource. Far more than a worker takes
/// from one completion to the next under load.
const DRAIN_WITHIN: Duration = Duration::from_millis(250);

#[test]
fn pgbench_over_three_registered_instances() {
    let config = BalancerConfig::default();
    let text = config.text();
    let lab = Lab::start(3, config);
    for member in &lab.members {
        let address = member.postgres.address();
        assert!(!text.contains(&address.to_string()), "nobody configures {address}:\n{text}");
    }
    let sessions: Vec<u64> = lab.members.iter().map(|member| member.postgres.sessions()).collect();

    let run = |what: &str, arguments: &[&str]| {
        let before = lab.opened();
        let transactions = PgBench::start(lab.listener(), arguments).succeed(2 * PATIENCE);
        let opened: Vec<u64> =
            lab.opened().iter().zip(before).map(|(after, before)| after - before).collect();
        println!("{what}: {transactions} transactions, 0 failed; connections by instance: {opened:?}");
        assert!(transactions > 0);
        assert!(opened.iter().all(|opened| *opened > 0), "{what}: {opened:?}");
    };
    run("a connection for each", &["-c", "30", "-j", "2", "-C", "-S", "-T", "5"]);
    run("30 connections", &["-c", "30", "-j", "2", "-S", "-T", "5"]);
    run("30 connections that write", &["-c", "30", "-j", "2", "-t", "20"]);

    for (member, before) in lab.members.iter().zip(sessions) {
        until(&format!("{} counted sessions itself", member.name), || {
            (member.postgres.sessions() > before + 10).then_some(())
        });
    }
    let metrics = lab.balancer.metrics();
    for reason in ["client_reset", "backend_reset", "no_backend", "connect_failed", "exhausted"] {
        assert_eq!(metrics.sum("trimtab_flows_closed_total", &[("reason", reason)]), 0.0, "{reason}");
    }
    assert_eq!(metrics.sum("trimtab_sheds_total", &[]), 0.0);
    lab.stop();
}

#[test]
fn an_instance_joins_is_drained_and_comes_back_under_load() {
    let mut lab = Lab::start(3, BalancerConfig::default());
    let load = PgBench::start(lab.listener(), &["-c", "4", "-C", "-S", "-T", "14"]);
    until("the load runs", || lab.opened().iter().all(|opened| *opened > 0).then_some(()));

    let postgres = Postgres::start();
    let pg4 = lab.join(postgres, &[]);
    let opened = |lab: &Lab| lab.balancer.metrics().opened(&pg4);
    let ((), took) =
        within(JOIN_WITHIN, "the fourth instance gets connections", || (opened(&lab) > 0).then_some(()));
    println!("joined: connections {took:?} after its agent's start");

    // One that is open stays open, whatever an operator does.
    let mut session = open_session_on(&lab, &pg4);
    assert_eq!(lab.balancer.resources()[&pg4]["state"], "ready");

    lab.balancer.admin(&["drain", &pg4]);
    let drained = std::time::Instant::now();
    let at_drain = opened(&lab);
    let last = until("the new table is used", || {
        let opened = opened(&lab);
        (drained.elapsed() >= DRAIN_WITHIN).then_some(opened)
    });
    println!("drained: {} connections after the answer, none from then on", last - at_drain);
    let others = lab.opened();
    until("the others got 100 connections each", || {
        lab.opened().iter().zip(&others).take(3).all(|(now, then)| *now >= then + 100).then_some(())
    });
    assert_eq!(opened(&lab), last, "a drained resource gets no connection");
    assert_eq!(lab.balancer.resources()[&pg4]["state"], "draining");
    assert_eq!(lab.balancer.resources()[&pg4]["flows_open"], 1);
    assert_eq!(session.ask("select count(*) from pgbench_branches", "while drained"), "1");
    assert_eq!(session.quit().code, Some(0));
    until("its last connection is gone", || {
        (lab.balancer.resources()[&pg4]["flows_open"] == 0).then_some(())
    });

    lab.balancer.admin(&["ready", &pg4]);
    let ((), took) = within(JOIN_WITHIN, "it gets connections again", || (opened(&lab) > last).then_some(()));
    println!("ready again: connections after {took:?}");
    let transactions = load.succeed(PATIENCE);
    println!("{transactions} transactions, each with a connection of its own, 0 failed");
    lab.stop();
}

/// Opens sessions until one is on that instance.
fn open_session_on(lab: &Lab, name: &str) -> Psql {
    until(&format!("a session is on {name}"), || {
        let mut session = Psql::open(lab.listener());
        let server = session.ask("host(inet_server_addr())", "server");
        if lab.name_of(&server) == name {
            return Some(session);
        }
        session.quit();
        None
    })
}
