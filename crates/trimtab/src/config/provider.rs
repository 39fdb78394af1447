//! `[[provider]]`: orchestration layers whose resources join by themselves.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use allocation::ResourceId;
use control::{DockerConfig, DockerEndpoint, ProviderConfig, ProviderKind};
use registry::PoolConfig;
use toml::Spanned;

use super::pool::within;
use super::reader::{Section, boolean, text, texts};
use super::{or, pool_name, unknown_pool};
use crate::problem::Problem;
use crate::units::parse_address;

/// Where Docker listens unless told otherwise.
const DOCKER_SOCKET: &str = "/var/run/docker.sock";
/// Each report costs the engine a call for each container.
const REPORT_INTERVAL_DEFAULT: Duration = Duration::from_secs(2);
const REPORT_INTERVAL: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(60);
/// An engine is restarted in seconds and upgraded in minutes; its containers may run on meanwhile.
const KEEP_DEFAULT: Duration = Duration::from_secs(600);
const KEEP_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// It begins every id, which has 128 bytes for the container's name, too.
const NAME_BYTES_MAX: usize = 32;

/// All of them. `pools` is `None` when they are not all known.
pub(super) fn read(root: &mut Section<'_, '_>, pools: Option<&[PoolConfig]>) -> Vec<ProviderConfig> {
    let mut providers = Vec::new();
    let mut lines: HashMap<String, usize> = HashMap::new();
    root.list("provider", |mut section| {
        section.required("kind", "\"docker\"", text(kind));
        let named = section.value("name", text(provider_name));
        let at = named.as_ref().map_or_else(|| section.start(), |name| name.span().start);
        let is_known = named.is_some() || !section.has("name");
        let name = or(named, "docker".to_owned());
        let line = section.reader().line(at);
        if is_known && let Some(first) = lines.insert(name.clone(), line) {
            let hint = format!("the first is in line {first}; give this one a name: name = \"{name}2\"");
            section
                .reader()
                .report(at, Problem::new(format!("there are two providers named {name:?}"), hint));
        }
        providers.push(read_one(&mut section, name, pools));
        section.finish(&[]);
    });
    providers
}

fn read_one(section: &mut Section<'_, '_>, name: String, pools: Option<&[PoolConfig]>) -> ProviderConfig {
    let allowed = section.value("pools", texts(pool_name));
    if let (Some(allowed), Some(pools)) = (&allowed, pools) {
        for problem in allowed.get_ref().iter().filter_map(|pool| unknown_pool("provider.pools", pool, pools))
        {
            section.reader().report(allowed.span().start, problem);
        }
    }
    let interval = section.value("report_interval", text(within(REPORT_INTERVAL)));
    let keep = section.value("keep", text(within(Duration::ZERO..=KEEP_MAX)));
    let endpoint = read_endpoint(section);
    let address = section.value("address", text(host_address)).and_then(Spanned::into_inner);
    ProviderConfig {
        name,
        pools: or(allowed, Vec::new()),
        report_interval: or(interval, REPORT_INTERVAL_DEFAULT),
        keep: or(keep, KEEP_DEFAULT),
        kind: ProviderKind::Docker(DockerConfig { endpoint, address }),
    }
}

/// Who reaches an engine's API has its host; who answers in its place says where flows go.
fn read_endpoint(section: &mut Section<'_, '_>) -> DockerEndpoint {
    let insecure = section.value("insecure", boolean).is_some_and(Spanned::into_inner);
    let endpoint = section.value("endpoint", text(endpoint));
    if let Some(endpoint) = &endpoint
        && let DockerEndpoint::Tcp(address) = endpoint.get_ref()
        && !address.ip().is_loopback()
        && !insecure
    {
        let message = format!("`provider.endpoint`: {address} is reached over the network in clear text");
        let hint =
            "use the Unix socket or a tunnel to loopback, or add insecure = true if the network is trusted";
        section.reader().report(endpoint.span().start, Problem::new(message, hint));
    }
    or(endpoint, DockerEndpoint::Unix(PathBuf::from(DOCKER_SOCKET)))
}

fn kind(text: &str) -> Result<(), Problem> {
    match text {
        "docker" => Ok(()),
        _ => Err(Problem::new(format!("there is no provider {text:?}"), "write \"docker\"")),
    }
}

/// It stands before the colon of its resources' ids.
fn provider_name(text: &str) -> Result<String, Problem> {
    let hint = "write a short name of A-Z a-z 0-9 . _ and -, as \"docker\"";
    if text.contains([':', '/']) || text.len() > NAME_BYTES_MAX {
        return Err(Problem::new(format!("{text:?} is no name of a provider"), hint));
    }
    match text.parse::<ResourceId>() {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(Problem::new(format!("{text:?} is not a name: it {error}"), hint)),
    }
}

fn endpoint(text: &str) -> Result<DockerEndpoint, Problem> {
    let hint = "write \"unix:///var/run/docker.sock\" or \"tcp://127.0.0.1:2375\"";
    if let Some(path) = text.strip_prefix("unix://") {
        return match path.starts_with('/') {
            true => Ok(DockerEndpoint::Unix(path.into())),
            false => Err(Problem::new(format!("{path:?} is not an absolute path"), hint)),
        };
    }
    match text.strip_prefix("tcp://") {
        Some(address) => parse_address(address).map(DockerEndpoint::Tcp),
        None => Err(Problem::new(format!("{text:?} is neither unix:// nor tcp://"), hint)),
    }
}

/// Empty: none.
fn host_address(text: &str) -> Result<Option<IpAddr>, Problem> {
    let hint = "write an address of the host without a port: \"10.0.0.9\"";
    match text.parse::<IpAddr>() {
        _ if text.is_empty() => Ok(None),
        Ok(address) if address.is_unspecified() => {
            Err(Problem::new(format!("{address} stands for any address, not for one"), hint))
        }
        Ok(address) => Ok(Some(address)),
        Err(_) => Err(Problem::new(format!("{text:?} is not an IP address"), hint)),
    }
}
