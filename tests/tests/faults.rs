//! What dies without a word: instances with their agents, and the balancer.

use std::time::{Duration, Instant};

use e2e::{Attempt, Balancer, BalancerConfig, Lab, Load, PATIENCE, until, within};
use rustix::process::Signal;

/// Reports come each second, so a lease is 3 s; and one look at the balancer may take a moment.
const LEASE: Duration = Duration::from_secs(3);
const LEASE_SLACK: Duration = Duration::from_secs(1);
/// From a balancer's start until agents are back and connections succeed.
const BACK_WITHIN: Duration = Duration::from_secs(5);
/// Killing some twenty processes takes a moment, and a busy machine may take its time to close their sockets.
const DEAD_AFTER: Duration = Duration::from_millis(50);

fn load(lab: &Lab) -> Load {
    Load::start(lab.listener(), 4, Duration::from_millis(5))
}

/// Waits until every instance served a connection that began after `since`.
fn all_serve(lab: &Lab, load: &Load, since: Instant) {
    until("all instances serve", || {
        let attempts = load.since(since);
        let serves = |ip: String| attempts.iter().any(|attempt| attempt.outcome.as_ref() == Ok(&ip));
        lab.members.iter().all(|member| serves(member.postgres.address().ip().to_string())).then_some(())
    });
}

/// How many connections there were that began at `since` or later; none of them may have failed.
#[track_caller]
fn none_failed(attempts: &[Attempt], since: Instant) -> usize {
    let new: Vec<&Attempt> = attempts.iter().filter(|attempt| attempt.began >= since).collect();
    let failed: Vec<_> = new.iter().filter(|attempt| attempt.outcome.is_err()).collect();
    assert!(
        failed.is_empty(),
        "{} of {} new connections failed: {:?}",
        failed.len(),
        new.len(),
        failed.first()
    );
    new.len()
}

#[test]
fn an_instance_and_its_agent_are_killed_under_load() {
    let mut lab = Lab::start(3, BalancerConfig::default());
    let load = load(&lab);
    all_serve(&lab, &load, Instant::now());

    let killing = Instant::now();
    let dead = &mut lab.members[1];
    dead.agent.kill();
    dead.postgres.kill();
    let killed = Instant::now();
    let name = dead.name.clone();
    let dead_ip = dead.postgres.address().ip().to_string();
    let ((), took) = within(LEASE + LEASE_SLACK, "its registration expires", || {
        (!lab.balancer.resources().contains_key(&name)).then_some(())
    });
    println!("its registration expired {took:?} after the kill");
    assert!(took + Duration::from_secs(1) >= LEASE, "a lease is not cut short");
    let so_far = load.so_far().len();
    until("100 more connections", || (load.so_far().len() >= so_far + 100).then_some(()));
    let attempts = load.stop();

    // What was open on it may break; each that begins from then on finds another.
    let broken = attempts.iter().filter(|attempt| attempt.outcome.is_err()).count();
    let first_failure = attempts.iter().find(|attempt| attempt.outcome.is_err());
    assert!(first_failure.is_none_or(|attempt| attempt.began + attempt.took >= killing), "{first_failure:?}");
    let new = none_failed(&attempts, killed + DEAD_AFTER);
    println!("{broken} open connections broke; 0 of {new} new ones failed");
    assert!(attempts.iter().all(|a| a.began < killed || a.outcome.as_ref() != Ok(&dead_ip)));
    let metrics = lab.balancer.metrics();
    let retries = metrics.sum("trimtab_connect_retries_total", &[]);
    println!("{retries} refused connects were tried on another instance");
    assert!(retries >= 1.0, "at least one connect was refused");
    assert_eq!(metrics.sum("trimtab_leases_expired_total", &[]), 1.0);
}

#[test]
fn an_instance_and_its_agent_freeze_under_load() {
    let mut lab = Lab::start(3, BalancerConfig::default());
    let load = load(&lab);
    all_serve(&lab, &load, Instant::now());

    // Frozen, the kernel still accepts for the instance: nothing but the lease tells that nobody is there.
    let frozen = &mut lab.members[1];
    frozen.postgres.freeze();
    frozen.agent.signal(Signal::STOP);
    let name = frozen.name.clone();
    let ((), took) = within(LEASE + LEASE_SLACK, "its registration expires", || {
        (!lab.balancer.resources().contains_key(&name)).then_some(())
    });
    println!("its registration expired {took:?} after it froze");
    let expired = Instant::now();
    // The threads of the first load wait for the frozen one.
    let second = Load::start(lab.listener(), 4, Duration::from_millis(5));
    until("200 more connections", || (second.so_far().len() >= 200).then_some(()));
    let new = none_failed(&second.stop(), expired);
    println!("0 of {new} connections failed after that");

    // It thaws, its agent finds that it is not registered any more, and it is back.
    let frozen = &mut lab.members[1];
    frozen.agent.signal(Signal::CONT);
    frozen.postgres.thaw();
    lab.wait_until_ready(3);
    all_serve(&lab, &load, Instant::now());
    none_failed(&load.stop(), expired);
}

#[test]
fn the_balancer_is_killed_and_restarted_under_load() {
    let mut lab = Lab::start(3, BalancerConfig::default());
    let load = load(&lab);
    all_serve(&lab, &load, Instant::now());

    // Two absences: one after which agents have tried once or twice, one in which they have backed off.
    for absence in [Duration::from_millis(300), Duration::from_secs(8)] {
        lab.balancer.process().kill();
        let killed = Instant::now();
        until("the absence is over", || (killed.elapsed() >= absence).then_some(()));
        let attempts = load.since(killed);
        assert!(attempts.iter().all(|attempt| attempt.outcome.is_err()), "nobody listens");

        let started = Instant::now();
        lab.balancer.start_again();
        let (first, _) = within(BACK_WITHIN, "connections succeed", || {
            load.since(started).into_iter().find(|attempt| attempt.outcome.is_ok())
        });
        let first = first.began + first.took - started;
        lab.balancer.wait_until_ready();
        within(BACK_WITHIN.saturating_sub(started.elapsed()), "all agents are back", || {
            (lab.balancer.ready_resources() == 3).then_some(())
        });
        let all = started.elapsed();
        println!(
            "away for {absence:?}: the first connection succeeded {first:?} after the start, \
             all agents were back after {all:?}"
        );
        all_serve(&lab, &load, Instant::now());
        let settled = Instant::now();
        until("100 more connections", || (load.since(settled).len() >= 100).then_some(()));
        none_failed(&load.since(settled), settled);
    }
    drop(load);
    lab.stop();
}

#[test]
fn agents_outlive_a_balancer_that_never_was() {
    let config = BalancerConfig::default();
    let mut lab = Lab::start(0, config.clone());
    lab.balancer.process().kill();
    let postgres = e2e::Postgres::start();
    lab.join(postgres, &[]);
    // It says once that nobody answers, and goes on trying.
    let agent = &mut lab.members[0].agent;
    let control = config.control.to_string();
    agent.wait_for_error_line(PATIENCE, |line| line.contains(&control).then_some(()));
    lab.balancer = Balancer::start(config);
    lab.wait_until_ready(1);
    lab.stop();
}
