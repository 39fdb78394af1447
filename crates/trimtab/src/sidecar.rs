//! `trimtab agent`: flags become an [`agent::AgentConfig`]; signals become its leave.

use std::net::SocketAddr;

use agent::{AgentConfig, AgentError, ServiceCheck, Source};
use api::v1::Resource;
use tonic::transport::Uri;

use crate::cli::AgentArgs;
use crate::failure::Failure;
use crate::problem::Problem;
use crate::{host_name, life};

/// Registers and reports until it is told to stop, then deregisters.
///
/// # Errors
/// When what the flags say makes no sense here.
pub fn run(args: AgentArgs) -> Result<(), Failure> {
    let stop = life::signals(args.with_parent)?
        .into_future()
        .map_err(|error| Failure::start(format!("cannot start a thread: {error}")))?;
    let config = configuration(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::start(format!("cannot make an event loop: {error}")))?;
    let ended = runtime.block_on(agent::run(config, stop));
    // A look at a file that hangs must not keep the process.
    runtime.shutdown_background();
    ended.map_err(|error| match error {
        AgentError::ServeBind { .. } => {
            Failure::start(format!("{error}\n  name an address of this host and a port that is free"))
        }
        AgentError::ProbeBind { .. } => Failure::start(format!(
            "{error}\n  --probe takes an address of this host and a port that is free"
        )),
        _ => Failure::Usage(Problem::new(error.to_string(), "see `trimtab agent --help`")),
    })
}

fn configuration(args: AgentArgs) -> Result<AgentConfig, Failure> {
    let usage = |what: &str, error: &dyn std::fmt::Display| {
        Failure::Usage(Problem::new(format!("{what}: {error}"), "see `trimtab agent --help`"))
    };
    let pool: allocation::PoolName = args.pool.parse().map_err(|error| usage("--pool", &error))?;
    let mut balancers = Vec::new();
    for balancer in &args.balancer {
        let balancer: Uri = balancer.parse().map_err(|error| usage("--balancer", &error))?;
        balancers.push(balancer);
    }
    let discover = match &args.discover {
        Some(domain) => {
            let finder = discovery::Finder::new(&discovery::ServiceName::control(), domain, args.dns);
            Some(finder.map_err(|error| usage("--discover", &error))?)
        }
        None => None,
    };
    let id = match args.id {
        Some(id) => id.to_string(),
        None => default_id(&host_name(), args.address),
    };
    let mut labels = std::collections::HashMap::new();
    for (key, value) in args.label {
        if labels.insert(key.clone(), value).is_some() {
            return Err(usage("--label", &format!("{key:?} is given twice")));
        }
    }
    let resource = Resource {
        id,
        pool: pool.to_string(),
        address: args.address.to_string(),
        labels,
        version: args.version_of_service,
        flows_max: args.flows_max,
        weight: args.weight,
        notify_url: args.notify_url,
        utilization_script: args.script.to_wire()?,
        ..Resource::default()
    };
    let mut config = AgentConfig::new(balancers, resource);
    config.discover = discover;
    config.transport = args.transport.transport();
    config.report_interval = args.report_interval;
    config.source = args.cgroup.map_or(Source::Host, Source::Cgroup);
    config.utilization_file = args.utilization_file;
    config.bandwidth_capacity_bps = args.bandwidth;
    config.bandwidth_cost = args.bandwidth_cost;
    config.probe = args.probe;
    config.on_notice = args.on_notice;
    config.sources = args.numbers.sources()?;
    config.serve = args.numbers.serve();
    if args.no_check {
        config.check = ServiceCheck::None;
    }
    Ok(config)
}

/// `host/ip:port`, with what names may not have replaced, and of a length they may have.
pub(crate) fn default_id(host: &str, address: SocketAddr) -> String {
    let address = format!("{}:{}", address.ip(), address.port());
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    // The longest IPv6 address with its port is 45 characters, the longest name 128.
    let host: String = host.chars().take(64).map(plain).collect();
    let address: String = address.chars().map(|c| if c == '%' { '-' } else { c }).collect();
    format!("{host}/{address}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use allocation::ResourceId;
    use clap::Parser as _;

    fn configured(flags: &[&str]) -> Result<AgentConfig, Failure> {
        let line = ["trimtab", "agent", "--pool", "sql", "--address", "10.0.0.1:5432"];
        let Ok(Cli { command: Command::Agent(args), .. }) = Cli::try_parse_from(line.iter().chain(flags))
        else {
            panic!("{flags:?}")
        };
        configuration(*args)
    }

    #[test]
    fn flags_become_a_configuration() {
        let flags = ["--balancer", "b1:7400", "--balancer", "b2:7400", "--probe", "10.0.0.1:7500"];
        let config =
            configured(&[&flags[..], &["--label", "fts", "--label", "role=reader"]].concat()).unwrap();
        assert_eq!(config.balancers, ["http://b1:7400", "http://b2:7400"]);
        assert_eq!(config.probe, Some(([10, 0, 0, 1], 7500).into()));
        let labels = [("fts", "true"), ("role", "reader")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(config.resource.labels, labels.into());

        let found = configured(&["--discover", "example.com", "--dns", "10.0.0.53:53"]).unwrap();
        assert!(found.balancers.is_empty(), "nobody is at the default address");
        assert_eq!(found.discover.unwrap().name(), "_trimtab._tcp.example.com");
        let both = configured(&["--discover", "example.com", "--balancer", "b1:7400"]).unwrap();
        assert_eq!((both.balancers.len(), both.discover.is_some()), (1, true));

        let twice = configured(&["--label", "fts", "--label", "fts=false"]).unwrap_err();
        assert_eq!(twice.code(), 64);
        let twice = configured(&["--balancer", "b1:7400", "--balancer", "http://B1:7400"]).unwrap();
        let twice = agent::Agent::new(twice).unwrap_err();
        assert_eq!(twice.to_string(), "the balancer http://B1:7400/ is named twice");
    }

    #[test]
    fn default_ids_are_names() {
        for (host, address, id) in [
            ("pg-1.example", "10.0.0.1:5432", "pg-1.example/10.0.0.1:5432"),
            ("a b/ü", "[::1]:5432", "a-b--/::1:5432"),
        ] {
            assert_eq!(default_id(host, address.parse().unwrap()), id);
        }
        let longest =
            default_id(&"x".repeat(300), "[fe80:1111:1111:1111:1111:1111:1111:1111]:65535".parse().unwrap());
        for id in
            [longest.as_str(), "a-b--/::1:5432", &default_id(&host_name(), "1.2.3.4:5".parse().unwrap())]
        {
            id.parse::<ResourceId>().expect("a name");
        }
    }
}
