//! `[[upstream]]`: balancers that this one is a resource of.

use std::net::SocketAddr;
use std::str::FromStr as _;
use std::time::Duration;

use allocation::{PoolName, ResourceId};

use super::reader::{Section, text, texts};
use super::{ListenerConfig, or, pool_name, security};
use crate::cli::{parse_control, parse_id, parse_report_interval};
use crate::problem::Problem;
use crate::units::{ListenAddress, parse_address};

/// Entries of `[[upstream]]`: each makes an agent of its own for each of its listeners.
const UPSTREAMS_MAX: usize = 16;

/// One `[[upstream]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct UpstreamConfig {
    /// Control addresses; at least one.
    pub balancers: Vec<String>,
    /// How they are reached, and what they are shown.
    pub transport: agent::Transport,
    /// Which of our listeners is registered there; `None`: each of them.
    pub listener: Option<ListenAddress>,
    /// The pool to join there; `None`: of the same name as the listener's.
    pub pool: Option<PoolName>,
    /// Where the listener is reached from there; `None`: where it is bound.
    pub address: Option<SocketAddr>,
    /// `None`: made of the host's name and the address.
    pub id: Option<ResourceId>,
    /// How often to report.
    pub report_interval: Duration,
}

/// Reads all of them; `listeners` is `None` when they are not all known.
pub(super) fn read(root: &mut Section<'_, '_>, listeners: Option<&[ListenerConfig]>) -> Vec<UpstreamConfig> {
    let mut upstreams = Vec::new();
    root.list("upstream", |mut section| {
        let balancers = section.required("balancer", "[\"http://10.0.0.1:7400\"]", texts(parse_control));
        let listener = section.value("listener", text(ListenAddress::from_str));
        let pool = section.value("pool", text(pool_name));
        let address = section.value("address", text(parse_address));
        let id = section.value("id", text(parse_id));
        let report_interval =
            or(section.value("report_interval", text(parse_report_interval)), Duration::from_secs(1));
        let named = balancers.as_ref().map(|balancers| balancers.get_ref().as_slice());
        let transport = security::read_transport(section.section("tls"), named);
        if let Some(balancers) = &balancers
            && balancers.get_ref().is_empty()
        {
            let problem = Problem::new("`upstream.balancer` names none", "name at least one");
            let at = balancers.span().start;
            section.reader().report(at, problem);
        }
        let meant = listeners.map(|all| {
            let is = |known: &&ListenerConfig| listener.as_ref().is_none_or(|l| *l.get_ref() == known.bind);
            all.iter().filter(is).collect::<Vec<_>>()
        });
        if let (Some(listener), Some([])) = (&listener, meant.as_deref()) {
            let problem = Problem::new(
                format!("`upstream.listener`: no [[listener]] is bound to {}", listener.get_ref()),
                "write it as its `bind` has it",
            );
            section.reader().report(listener.span().start, problem);
        }
        for problem in
            meant.iter().flatten().filter_map(|l| unreachable(l, address.as_ref().map(|a| *a.get_ref())))
        {
            section.report(problem);
        }
        if let (Some(_), Some(all)) = (&id, &meant)
            && all.len() > 1
        {
            section.report(Problem::new(
                format!("`upstream.id`: {} listeners cannot share one id", all.len()),
                "name the listener: one [[upstream]] for each",
            ));
        }
        section.finish(&["discover", "dns"]);
        if let Some(balancers) = balancers {
            upstreams.push(UpstreamConfig {
                balancers: balancers.into_inner(),
                transport,
                listener: listener.map(toml::Spanned::into_inner),
                pool: pool.map(toml::Spanned::into_inner),
                address: address.map(toml::Spanned::into_inner),
                id: id.map(toml::Spanned::into_inner),
                report_interval,
            });
        }
    });
    if upstreams.len() > UPSTREAMS_MAX {
        let message = format!("there are {} entries of [[upstream]]", upstreams.len());
        root.reader().report(0, Problem::new(message, format!("keep it to {UPSTREAMS_MAX}")));
    }
    upstreams
}

/// Why a listener cannot be reached where it would be registered, if it cannot.
fn unreachable(listener: &ListenerConfig, address: Option<SocketAddr>) -> Option<Problem> {
    let hint = "add address = \"10.0.0.9:5432\", as the balancer above reaches it";
    match address {
        Some(address) if address.ip().is_unspecified() || address.port() == 0 => {
            Some(Problem::new(format!("`upstream.address`: nobody can connect to {address}"), hint))
        }
        None if listener.bind.address.ip().is_unspecified() => Some(Problem::new(
            format!(
                "`upstream.address` is missing: {} is every address of this host, not one",
                listener.bind
            ),
            hint,
        )),
        _ => None,
    }
}
