//! `[listener.udp]`: how a listener of datagrams keeps its flows.

use std::time::Duration;

use dataplane::{ProxyHeader, ServerIdForm, UdpConfig};

use super::reader::{Section, boolean, integer, text};
use super::{above_zero, or};
use crate::problem::Problem;

/// What anybody could mean by answers to one datagram, or datagrams of one flow.
const COUNT_MAX: u64 = 1_000_000;
/// Octets of the longest server id (QUIC-LB).
const SERVER_ID_MAX: u8 = 15;

/// Reads it; `is_udp` says whether the listener's `bind` makes sense of it, where that is known; `proxy`, whether the listener
/// has a `proxy_protocol`.
pub(super) fn read(mut section: Section<'_, '_>, is_udp: Option<bool>, proxy: bool) -> UdpConfig {
    let default = UdpConfig::default();
    if section.is_there() && is_udp == Some(false) {
        section.report(Problem::new(
            "`listener.udp` is for listeners of datagrams",
            "write bind = \"udp://…\", or remove [listener.udp]",
        ));
    }
    let quic = section.value("quic", boolean).is_some_and(toml::Spanned::into_inner);
    let server_id = section.value("quic_server_id", text(server_id));
    if let Some(form) = server_id.as_ref().filter(|form| form.get_ref().is_some() && !quic) {
        let problem =
            Problem::new("`listener.udp.quic_server_id` without quic = true", "add quic = true before it");
        section.reader().report(form.span().start, problem);
    }
    let header = section.value("proxy_header", text(proxy_header));
    if let Some(header) = header.as_ref().filter(|header| *header.get_ref() == ProxyHeader::First && !proxy) {
        let problem = Problem::new(
            "`listener.udp.proxy_header`: no datagram has a PROXY header here",
            "add proxy_protocol = \"v2\" and trusted to the listener, or remove it",
        );
        section.reader().report(header.span().start, problem);
    }
    let read = UdpConfig {
        idle_timeout: or(section.value("idle_timeout", text(idle_timeout)), default.idle_timeout),
        responses: or(section.value("responses", integer(0..=COUNT_MAX)), default.responses),
        requests: or(section.value("requests", integer(0..=COUNT_MAX)), default.requests),
        flows_max: or(section.value("flows_max", integer(0..=u64::from(u32::MAX))), default.flows_max),
        quic,
        quic_server_id: server_id.and_then(toml::Spanned::into_inner),
        proxy_header: or(header, default.proxy_header),
    };
    section.finish(&[]);
    read
}

/// Reports what a listener of datagrams has no use for, rather than leave it without effect.
pub(super) fn refuse_what_is_of_tcp(section: &mut Section<'_, '_>) {
    if section.has("tcp") {
        section.report(Problem::new(
            "`listener.tcp` is for listeners of connections",
            "remove it, or write bind = \"tcp://…\"",
        ));
    }
}

fn proxy_header(text: &str) -> Result<ProxyHeader, Problem> {
    match text {
        "every" => Ok(ProxyHeader::Every),
        "first" => Ok(ProxyHeader::First),
        _ => Err(Problem::new(
            format!("{text:?} does not say which datagrams have a header"),
            "write \"every\", or \"first\" for proxies that say once for whom they speak",
        )),
    }
}

/// Nothing else ends a flow of datagrams for certain: never would be a leak.
fn idle_timeout(text: &str) -> Result<Duration, Problem> {
    above_zero(text).map_err(|mut problem| {
        if text.trim_start().starts_with('0') {
            problem.hint = "a flow of datagrams has no other end: write at least \"1ms\"".into();
        }
        problem
    })
}

fn server_id(text: &str) -> Result<Option<ServerIdForm>, Problem> {
    let octets =
        |digits: &str| digits.parse::<u8>().ok().filter(|octets| (1..=SERVER_ID_MAX).contains(octets));
    Ok(match text {
        "" => None,
        "ipv4" => Some(ServerIdForm::Ipv4),
        "ipv4-port" => Some(ServerIdForm::Ipv4Port),
        _ => match text.strip_prefix("id:").and_then(octets) {
            Some(octets) => Some(ServerIdForm::Id(octets)),
            None => {
                return Err(Problem::new(
                    format!("{text:?} is no form of a server id"),
                    "write \"ipv4\", \"ipv4-port\", or \"id:4\" for resources whose ids are 4 octets in hexadecimal",
                ));
            }
        },
    })
}
