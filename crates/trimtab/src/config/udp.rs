//! `[listener.udp]`: how a listener of datagrams keeps its flows.

use std::sync::Arc;
use std::time::Duration;

use dataplane::{CONFIGS, NONCE_MIN, ProxyHeader, ServerIdForm, ServerIdKeys, UdpConfig};
use toml::Spanned;

use super::reader::{Section, boolean, integer, text};
use super::{above_zero, or};
use crate::problem::Problem;

/// What anybody could mean by answers to one datagram, or datagrams of one flow.
const COUNT_MAX: u64 = 1_000_000;
/// Octets of server id and nonce together at most, and of the longest server id (QUIC-LB).
const PLAINTEXT_MAX: u8 = dataplane::PLAINTEXT_MAX as u8;
const SERVER_ID_MAX: u8 = PLAINTEXT_MAX - NONCE_MIN;
/// Server ids and nonces of so many octets together are one block of the cipher, which is the least work.
const BLOCK: u8 = 16;

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
    let quic = section.value("quic", boolean).is_some_and(Spanned::into_inner);
    let server_id = section.value("quic_server_id", text(server_id));
    if let Some(form) = server_id.as_ref().filter(|form| form.get_ref().is_some() && !quic) {
        let problem =
            Problem::new("`listener.udp.quic_server_id` without quic = true", "add quic = true before it");
        section.reader().report(form.span().start, problem);
    }
    let form = server_id.and_then(Spanned::into_inner);
    let quic_keys = quic_keys(&mut section, form);
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
        quic_server_id: form,
        quic_keys,
        proxy_header: or(header, default.proxy_header),
    };
    section.finish(&[]);
    read
}

/// What server ids of that form are encrypted with.
fn quic_keys(section: &mut Section<'_, '_>, form: Option<ServerIdForm>) -> Option<Arc<ServerIdKeys>> {
    let nonce = section.value("quic_nonce", integer::<u8>(0..=u64::from(PLAINTEXT_MAX - 1)));
    let keys = section.value("quic_keys_file", text(keys_file))?;
    let at = keys.span().start;
    let keys = keys.into_inner()?;
    let octets = match form {
        Some(form) => form.octets() as u8,
        None => {
            let message = "`listener.udp.quic_keys_file` without quic_server_id";
            let hint = "say what the server ids are: add quic_server_id = \"ipv4\"";
            section.reader().report(at, Problem::new(message, hint));
            return None;
        }
    };
    let (at, nonce) = match nonce.map(|nonce| (nonce.span().start, nonce.into_inner())) {
        Some((at, nonce @ 1..)) => (at, nonce),
        _ => (at, BLOCK.saturating_sub(octets).max(NONCE_MIN)),
    };
    if nonce < NONCE_MIN || octets + nonce > PLAINTEXT_MAX {
        let message =
            format!("`listener.udp.quic_nonce`: {nonce} octets do not go with a server id of {octets}");
        let hint = match PLAINTEXT_MAX - octets {
            most @ NONCE_MIN.. => format!("write what the servers have, from {NONCE_MIN} to {most}"),
            _ => format!("use a server id of {} octets or fewer", PLAINTEXT_MAX - NONCE_MIN),
        };
        section.reader().report(at, Problem::new(message, hint));
        return None;
    }
    let mut all = ServerIdKeys::new(nonce);
    for (config, key) in keys {
        all.insert(config, key, dataplane::aes128(key));
    }
    Some(Arc::new(all))
}

/// Keys by the numbers of their configurations.
type Keys = Vec<(u8, [u8; 16])>;

/// Reads a file of keys: a line for each configuration, its number and its key.
fn keys_file(path: &str) -> Result<Option<Keys>, Problem> {
    if path.is_empty() {
        return Ok(None);
    }
    let hint = "a line is the number of a configuration, 0 to 6, and its key in 32 hexadecimal digits: \
                \"0 00112233445566778899aabbccddeeff\"";
    let wrong = |what: String| Problem::new(what, hint);
    let text =
        std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot read {path}: {error}")))?;
    let mut keys = Keys::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        // A key that is half right is still a secret: the line is not shown.
        let key =
            key(line).ok_or_else(|| wrong(format!("{path}, line {number}: no configuration and key")))?;
        if keys.iter().any(|(config, _)| *config == key.0) {
            return Err(wrong(format!("{path}, line {number}: configuration {} has a key already", key.0)));
        }
        keys.push(key);
    }
    if keys.is_empty() { Err(wrong(format!("there is no key in {path}"))) } else { Ok(Some(keys)) }
}

fn key(line: &str) -> Option<(u8, [u8; 16])> {
    let (config, key) = line.split_once(char::is_whitespace)?;
    let config = config.parse().ok().filter(|config| usize::from(*config) < CONFIGS)?;
    let key = key.trim_start();
    let digits = key.len() == 32 && key.bytes().all(|digit| digit.is_ascii_hexdigit());
    let key = digits.then(|| u128::from_str_radix(key, 16).ok())??;
    Some((config, key.to_be_bytes()))
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
