//! `[control.tls]`, `[[control.peer]]`, `[control.limits]` and `control.addresses`: who may join; and `[upstream.tls]`:
//! what this balancer shows where it joins itself.

use std::fmt::Display;
use std::path::PathBuf;

use agent::{TokenSource, Transport};
use allocation::PoolName;
use control::{IdPattern, PeerLimits, PeerRule, Role, SanPattern, SecurityConfig, TlsConfig};
use ipnet::IpNet;
use toml::Spanned;

use super::reader::{Section, boolean, integer, text, texts};
use super::{or, pool_name};
use crate::problem::Problem;

/// Higher limits than these limit nothing: a second has no more registrations, and a process no more descriptors.
const LIMIT_MAX: u64 = 1_000_000;

/// The pools that peers may join, each with its place, for a look whether there are such pools.
pub(super) type NamedPools = Vec<(usize, PoolName)>;

/// What `[control]` has of it.
pub(super) struct Read {
    pub(super) config: SecurityConfig,
    /// Whether it is to speak TLS, right or wrong.
    pub(super) has_tls: bool,
    pub(super) named: NamedPools,
}

/// Reads it; the section's other keys are for others.
pub(super) fn read(control: &mut Section<'_, '_>) -> Read {
    let addresses = or(control.value("addresses", texts(network)), Vec::new());
    let tls = read_tls(control.section("tls"));
    let limits = read_limits(control.section("limits"));
    let mut peers = Vec::new();
    let mut named = NamedPools::new();
    let mut first = None;
    control.list("peer", |mut section| {
        first.get_or_insert_with(|| section.start());
        peers.extend(read_peer(&mut section, &mut named));
        section.finish(&[]);
    });
    if let (Some(at), None) = (first, &tls) {
        let hint =
            "add [control.tls] with cert, key and client_ca, or remove it: in clear text nobody has a name";
        control.reader().report(at, Problem::new("`control.peer` does nothing without `control.tls`", hint));
    }
    let has_tls = tls.is_some();
    Read { config: SecurityConfig { tls: tls.flatten(), peers, addresses, limits }, has_tls, named }
}

/// `None`: it is not there; `Some(None)`: it is, and wrong.
fn read_tls(mut section: Section<'_, '_>) -> Option<Option<TlsConfig>> {
    let is_there = section.is_there();
    let cert = section.required("cert", "\"balancer.pem\"", text(file)).map(Spanned::into_inner);
    let key = section.required("key", "\"balancer.key\"", text(file)).map(Spanned::into_inner);
    let client_ca =
        section.required("client_ca", "\"resources-ca.pem\"", text(file)).map(Spanned::into_inner);
    let require_certificate = or(section.value("require_certificate", boolean), false);
    let config = match (cert, key, client_ca) {
        (Some(cert), Some(key), Some(client_ca)) => {
            Some(TlsConfig { cert, key, client_ca, require_certificate })
        }
        _ => None,
    };
    section.finish(&[]);
    is_there.then_some(config)
}

fn read_limits(mut section: Section<'_, '_>) -> PeerLimits {
    let default = PeerLimits::default();
    let limits = PeerLimits {
        registrations_per_second: or(
            section.value("registrations_per_second", integer(1..=LIMIT_MAX)),
            default.registrations_per_second,
        ),
        streams: or(section.value("streams", integer(1..=LIMIT_MAX)), default.streams),
        connections: or(section.value("connections", integer(1..=LIMIT_MAX)), default.connections),
    };
    section.finish(&[]);
    limits
}

fn read_peer(section: &mut Section<'_, '_>, named: &mut NamedPools) -> Option<PeerRule> {
    let san = section.required("san", "\"spiffe://example/sql/*\"", text(san));
    let role = section.value("role", text(role));
    let pools = section.value("pools", texts(pool_name));
    let addresses = or(section.value("addresses", texts(network)), Vec::new());
    let ids = or(section.value("ids", texts(id)), Vec::new());
    if let Some(pools) = &pools {
        named.extend(pools.get_ref().iter().map(|pool| (pools.span().start, pool.clone())));
    }
    let role = or(role, Role::Resource);
    let no_pools = pools.as_ref().is_none_or(|pools| pools.get_ref().is_empty());
    let joins = !no_pools || !addresses.is_empty() || !ids.is_empty();
    let problem = match role {
        Role::Resource if no_pools => {
            Some(("names no pool that it may join", "add pools = [\"sql\"], or role = \"admin\""))
        }
        Role::Admin if joins => Some((
            "is an administrator's, who joins nothing",
            "remove pools, addresses and ids, or add a second [[control.peer]] for them",
        )),
        _ => None,
    };
    if let Some((message, hint)) = problem {
        let at = section.start();
        section.reader().report(at, Problem::new(format!("`control.peer` {message}"), hint));
    }
    Some(PeerRule { san: san?.into_inner(), role, pools: or(pools, Vec::new()), addresses, ids })
}

/// `[upstream.tls]`: how balancers above are reached, and what they are shown.
pub(super) fn read_transport(mut section: Section<'_, '_>, balancers: Option<&[String]>) -> Transport {
    let ca = section.value("ca", text(file)).map(Spanned::into_inner);
    let cert = section.value("cert", text(file)).map(Spanned::into_inner);
    let key = section.value("key", text(file)).map(Spanned::into_inner);
    let server_name = section.value("server_name", text(server_name)).map(Spanned::into_inner);
    let token_file = section.value("token_file", text(file)).map(Spanned::into_inner);
    if cert.is_some() != key.is_some() {
        let hint = "add the other one";
        section.report(Problem::new("`upstream.tls` has one of cert and key; they go together", hint));
    }
    let token = token_file.map_or(TokenSource::None, TokenSource::File);
    let transport = Transport { ca, identity: cert.zip(key), server_name, token };
    let clear = balancers.into_iter().flatten().find(|balancer| !balancer.starts_with("https://"));
    if let Some(clear) = clear.filter(|_| transport.wants_tls()) {
        let message =
            format!("`upstream.balancer`: {clear} is clear text, and `upstream.tls` has certificates");
        section.report(Problem::new(message, "write https://HOST:PORT"));
    }
    section.finish(&[]);
    transport
}

fn server_name(text: &str) -> Result<String, Problem> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Problem::new(format!("{text:?} is not a name"), "write \"balancer.example.com\""));
    }
    Ok(text.to_owned())
}

fn file(text: &str) -> Result<PathBuf, Problem> {
    if text.is_empty() {
        return Err(Problem::new("this names no file", "write the path of a file in PEM"));
    }
    Ok(text.into())
}

fn network(text: &str) -> Result<IpNet, Problem> {
    control::parse_network(text).ok_or_else(|| {
        Problem::new(format!("{text:?} is not a network"), "write \"10.0.0.0/8\" or \"10.0.0.1\"")
    })
}

fn san(text: &str) -> Result<SanPattern, Problem> {
    let hint = "write \"pg1.example.com\", \"*.example.com\", \"spiffe://example/sql/pg1\" or \"spiffe://example/sql/*\"";
    text.parse().map_err(|error| wrong(text, error, hint))
}

fn role(text: &str) -> Result<Role, Problem> {
    let hint = "write \"resource\" or \"admin\"";
    text.parse().map_err(|_| Problem::new(format!("there is no role {text:?}"), hint))
}

fn id(text: &str) -> Result<IdPattern, Problem> {
    text.parse().map_err(|error| wrong(text, error, "write an id, as \"pg1\", or how ids begin, as \"pg-*\""))
}

fn wrong(text: &str, error: impl Display, hint: &str) -> Problem {
    Problem::new(format!("{text:?} {error}"), hint)
}
