//! `trimtab proxy`: the dataplane alone, with a table that is published once.
//!
//! No control, no runtime: an idle process is its workers and one thread asleep in `poll`.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;

use allocation::{AllocationTable, Backend, LiveFacts, Members, Policy, PoolName, Publisher, ResourceId};

use crate::cli::ProxyArgs;
use crate::failure::Failure;
use crate::life;
use crate::problem::Problem;
use crate::units::Transport;

const POOL: &str = "proxy";

/// Balances until it is told to stop.
///
/// # Errors
/// When an address is given twice, something cannot be bound, or a worker fails.
pub fn run(args: &ProxyArgs) -> Result<(), Failure> {
    let mut signals = life::signals(args.with_parent)?;
    life::raise_descriptor_limit();
    let bound = dataplane::bind(configuration(args)?)
        .map_err(|errors| Failure::Start(errors.iter().map(ToString::to_string).collect()))?;
    let addresses = bound.addresses();
    let dataplane = bound.start().map_err(Failure::start)?;
    let lines: String = addresses
        .into_iter()
        .zip(&args.listen)
        .map(|(address, listen)| format!("listening {} pool={POOL}\n", listen.at(address)))
        .collect();
    life::announce(&(lines + "ready\n"));
    life::run(dataplane, &mut signals, args.drain_timeout, || Ok(()), || ())
}

fn configuration(args: &ProxyArgs) -> Result<dataplane::Config, Failure> {
    // Port 0 is another port each time.
    let fixed = args.listen.iter().filter(|listen| listen.address.port() != 0);
    let twice = twice(fixed).map(|twice| format!("--listen has {twice} twice"));
    if let Some(message) = twice.or_else(|| Some(format!("--to has {} twice", self::twice(&args.to)?))) {
        return Err(Failure::Usage(Problem::new(message, "remove one of the two")));
    }
    if let Policy::Criteria | Policy::Prequal = args.policy {
        let message = format!("--policy {} needs resources that report or answer probes", args.policy);
        return Err(Failure::Usage(Problem::new(message, "run `trimtab serve`, or take adaptive")));
    }
    let pool: PoolName = POOL.parse().map_err(|error: allocation::IdError| Failure::Fault(error.into()))?;
    let table = Publisher::new(table(args)?);
    let udp = dataplane::UdpConfig {
        idle_timeout: args.udp_idle_timeout,
        responses: args.udp_responses,
        ..dataplane::UdpConfig::default()
    };
    let listeners = args.listen.iter().map(|listen| match listen.transport {
        Transport::Tcp => dataplane::ListenerConfig::new(listen.address, pool.clone(), table.clone()),
        Transport::Udp => {
            dataplane::ListenerConfig::udp(listen.address, pool.clone(), table.clone(), udp.clone())
        }
    });
    let mut config = dataplane::Config::new(listeners.collect());
    config.workers = usize::from(args.workers);
    config.limits.flows_max = args.flows_max;
    config.timeouts.connect = args.connect_timeout;
    config.timeouts.idle = args.idle_timeout.0;
    config.engine = args.engine.named();
    Ok(config)
}

/// The first that is there for the second time.
fn twice<T: Eq + std::hash::Hash>(all: impl IntoIterator<Item = T>) -> Option<T> {
    let mut seen = HashSet::new();
    all.into_iter().find_map(|one| seen.replace(one))
}

/// All alike: a weight of 1 each.
fn table(args: &ProxyArgs) -> Result<AllocationTable, Failure> {
    let backend = |address: &SocketAddr| {
        // Names have no brackets, which an IPv6 address with a port is written in.
        let id: ResourceId = format!("{}:{}", address.ip(), address.port()).parse()?;
        Ok(Backend { id, address: *address, flows_max: 0, live: Arc::new(LiveFacts::default()) })
    };
    let backends: Result<Vec<_>, allocation::IdError> = args.to.iter().map(backend).collect();
    let members = Members::new(backends.map_err(|error| Failure::Fault(error.into()))?);
    let weights = vec![1.0; args.to.len()];
    Ok(AllocationTable::new(1, args.policy, Arc::new(members), weights))
}
