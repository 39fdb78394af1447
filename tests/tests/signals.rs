//! Leaving: SIGTERM lets open flows end, until a deadline; a second one leaves now.

use std::io;
use std::net::TcpListener;
use std::thread::sleep;
use std::time::{Duration, Instant};

use e2e::{Balancer, BalancerConfig, Lab, PATIENCE, Psql, connect, is_reset, until};
use rustix::process::Signal;

fn config(drain_timeout: &str) -> BalancerConfig {
    BalancerConfig { dataplane: format!("drain_timeout = \"{drain_timeout}\""), ..Default::default() }
}

/// Waits until the balancer says that it drains.
fn wait_for_drain(balancer: &Balancer) {
    until("/readyz says 503", || balancer.probe("/readyz").filter(|answer| answer.status == 503));
}

#[test]
fn a_drain_lets_a_session_end() {
    let mut lab = Lab::start(1, config("30s"));
    let ready = lab.balancer.probe("/readyz").expect("an answer");
    assert_eq!((ready.status, ready.body.trim()), (200, "ready"));
    let mut session = Psql::open(lab.listener());
    assert_eq!(session.ask("1", "before"), "1");

    lab.balancer.process().signal(Signal::TERM);
    wait_for_drain(&lab.balancer);
    assert_eq!(lab.balancer.probe("/livez").map(|answer| answer.status), Some(200), "it is alive");
    let refused = until("nothing listens any more", || connect(lab.listener()).err());
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{refused}");
    // Its agent is told, and goes on.
    lab.members[0]
        .agent
        .wait_for_error_line(PATIENCE, |line| line.contains("BALANCER_LEAVING").then_some(()));

    for round in ["one", "two", "three"] {
        assert_eq!(session.ask("select count(*) from pgbench_accounts", round), "100000");
        sleep(Duration::from_millis(100));
    }
    assert!(lab.balancer.process().is_running(), "it waits for the session");
    assert_eq!(session.quit().code, Some(0));
    let (ended, took) = lab.balancer.process().wait(PATIENCE);
    println!("ended {took:?} after its last session");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(took < Duration::from_secs(5), "{took:?}");
    TcpListener::bind(lab.listener()).expect("its address is free");
}

#[test]
fn a_flow_that_never_ends_is_reset_at_the_deadline() {
    let mut lab = Lab::start(1, config("2s"));
    let mut session = e2e::SqlClient::connect(lab.listener()).expect("a session");
    session.query("select 1").expect("an answer");
    let start = Instant::now();
    lab.balancer.process().signal(Signal::TERM);
    wait_for_drain(&lab.balancer);
    session.query("select 1").expect("it goes on");
    let (ended, _) = lab.balancer.process().wait(PATIENCE);
    let took = start.elapsed();
    println!("ended {took:?} after SIGTERM with a drain_timeout of 2 s");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!((Duration::from_secs(2)..Duration::from_secs(4)).contains(&took), "{took:?}");
    let broken = session.query("select 1").expect_err("it was reset");
    println!("the session: {broken}");
}

#[test]
fn a_second_signal_leaves_now() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let mut lab = Lab::start(1, config("1h"));
        let mut client = connect(lab.listener()).expect("the balancer accepts");
        until("the flow is open", || {
            (lab.balancer.metrics().sum("trimtab_flows_open", &[]) == 1.0).then_some(())
        });
        lab.balancer.process().signal(signal);
        wait_for_drain(&lab.balancer);
        lab.balancer.process().signal(signal);
        let (ended, took) = lab.balancer.process().wait(PATIENCE);
        println!("ended {took:?} after the second {signal:?}");
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        assert!(took < Duration::from_secs(1), "{took:?}");
        let end = io::Read::read(&mut client, &mut [0]);
        assert!(matches!(end, Ok(0)) || is_reset(&end), "{end:?}");
    }
}

#[test]
fn an_agent_deregisters_when_it_is_told_to_leave() {
    let mut lab = Lab::start(2, BalancerConfig::default());
    let agent = &mut lab.members[0].agent;
    agent.signal(Signal::TERM);
    let (ended, took) = agent.wait(PATIENCE);
    println!("the agent ended {took:?} after SIGTERM");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    // At once, not at the end of a lease.
    let resources = lab.balancer.resources();
    assert_eq!(resources.keys().collect::<Vec<_>>(), ["pg2"]);
    assert_eq!(lab.balancer.metrics().sum("trimtab_leases_expired_total", &[]), 0.0);
}
