//! A balancer and its resources: what most scenarios begin with.

use rustix::process::Signal;
use std::net::SocketAddr;

use crate::{Balancer, BalancerConfig, PATIENCE, Postgres, Process, trimtab, until};

/// The pool of every configuration here.
pub const POOL: &str = "sql";

/// A PostgreSQL instance and its agent.
#[derive(Debug)]
pub struct Member {
    /// What it registers as.
    pub name: String,
    // The agent before the instance: what is dropped first should know first.
    /// Its agent.
    pub agent: Process,
    /// The instance.
    pub postgres: Postgres,
}

/// A balancer whose configuration names a pool and a listener and nothing else, and instances that joined it.
#[derive(Debug)]
pub struct Lab {
    /// The instances: `pg1`, `pg2`, …
    pub members: Vec<Member>,
    /// The balancer.
    pub balancer: Balancer,
}

impl Lab {
    /// Starts a balancer and `members` instances with agents, and waits until all have registered.
    ///
    /// # Panics
    /// When something does not start or does not register.
    #[track_caller]
    pub fn start(members: usize, config: BalancerConfig) -> Self {
        let mut lab = Self { members: Vec::new(), balancer: Balancer::start(config) };
        for _ in 0..members {
            lab.join(Postgres::start(), &[]);
        }
        lab.wait_until_ready(members);
        lab
    }

    /// Starts an agent for an instance; gives its name. Does not wait.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn join(&mut self, postgres: Postgres, further: &[&str]) -> String {
        let name = format!("pg{}", self.members.len() + 1);
        let agent = self.balancer.agent(&name, postgres.address(), further);
        self.members.push(Member { name: name.clone(), agent, postgres });
        name
    }

    /// Waits until so many resources get new flows.
    ///
    /// # Panics
    /// When they do not.
    #[track_caller]
    pub fn wait_until_ready(&self, count: usize) {
        until(&format!("{count} resources are ready"), || {
            (self.balancer.ready_resources() == count).then_some(())
        });
    }

    /// Where clients connect.
    pub fn listener(&self) -> SocketAddr {
        self.balancer.listener()
    }

    /// The names, in order.
    pub fn names(&self) -> Vec<String> {
        self.members.iter().map(|member| member.name.clone()).collect()
    }

    /// Flows that each was given so far.
    ///
    /// # Panics
    /// When the balancer does not answer.
    #[track_caller]
    pub fn opened(&self) -> Vec<u64> {
        let metrics = self.balancer.metrics();
        self.members.iter().map(|member| metrics.opened(&member.name)).collect()
    }

    /// The name of the member whose instance serves at this IP address.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn name_of(&self, ip: &str) -> &str {
        let member = self.members.iter().find(|member| member.postgres.address().ip().to_string() == ip);
        &member.unwrap_or_else(|| panic!("no instance is at {ip}")).name
    }

    /// Ends everything as an operator does, and checks that it ends well: agents, balancer, instances.
    ///
    /// # Panics
    /// When something ends otherwise.
    #[track_caller]
    pub fn stop(mut self) {
        for Member { name, agent, .. } in &mut self.members {
            agent.signal(Signal::TERM);
            let (ended, _) = agent.wait(PATIENCE);
            assert_eq!(ended.code, Some(0), "agent of {name}: {}", ended.stderr);
        }
        let process = self.balancer.process();
        process.signal(Signal::TERM);
        let (ended, _) = process.wait(PATIENCE);
        assert_eq!(ended.code, Some(0), "balancer: {}", ended.stderr);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let control = format!("http://{}", self.balancer.control());
            let explained = trimtab(&["explain", POOL, "--control", &control]);
            eprintln!("{}{}", explained.stdout, explained.stderr);
        }
    }
}
