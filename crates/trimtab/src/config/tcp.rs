//! `[listener.tcp]` and `[pool.tcp]`: how TCP behaves towards clients and towards resources; `source_addresses`,
//! `transparent`: from where resources are connected to.

use std::net::IpAddr;
use std::time::Duration;

use dataplane::{Connecting, KeepaliveOptions, ListenerTcp, TcpOptions};
use toml::Spanned;
use toml::de::DeValue;

use super::reader::{Section, boolean, integer, text, texts};
use super::{keepalive, or, parse_source_address};
use crate::problem::Problem;
use crate::units::{duration_text, parse_duration};

/// What `tcp(7)` takes: 1 to 32,767 seconds between probes and before them, 1 to 127 probes.
const KEEPALIVE_MAX: Duration = Duration::from_secs(32_767);
const PROBES_MAX: u64 = 127;
/// A connection that goes unanswered for longer is what keepalive and idle_timeout are for.
const USER_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);
/// The kernel counts in retransmissions, of which it makes so many at most (`tcp(7)`): some 200 s.
const DEFER_ACCEPT_MAX: Duration = Duration::from_secs(200);
/// Below a page nothing fits; above 1 GiB it is a slip of the keyboard.
const BUFFER_MIN: u64 = 4_096;
const BUFFER_MAX: u64 = 1 << 30;
/// Names of congestion controls (`TCP_CA_NAME_MAX` in Linux, with its final zero).
const CONGESTION_MAX: usize = 15;
/// Addresses of one pool, or of all: each is tried in turn when ports run out.
pub(super) const SOURCE_ADDRESSES_MAX: usize = 64;

/// Reads `[listener.tcp]`.
pub(super) fn read_listener(mut section: Section<'_, '_>) -> ListenerTcp {
    let default = ListenerTcp::default();
    let defer_accept = section.value("defer_accept", text(whole_seconds(DEFER_ACCEPT_MAX)));
    let tcp = ListenerTcp {
        options: read_options(&mut section),
        backlog: or(section.value("backlog", integer(1..=65_535)), default.backlog),
        // At most 200, as parsed.
        defer_accept_seconds: or(defer_accept, Duration::ZERO).as_secs() as u16,
        fast_open: or(section.value("fast_open", integer(0..=65_535)), default.fast_open),
    };
    section.finish(&[]);
    tcp
}

/// Reads `source_addresses`, `transparent` and `[pool.tcp]` of a `[[pool]]`.
pub(super) fn read_pool(section: &mut Section<'_, '_>) -> Connecting {
    let sources = source_addresses(section);
    let proxy = or(section.value("proxy_protocol", text(super::routing::outgoing)), None);
    let transparent = section.value("transparent", boolean);
    let mut tcp = section.section("tcp");
    let options = read_options(&mut tcp);
    let fast_open = tcp.value("fast_open", boolean);
    if let Some(fast_open) = &fast_open
        && *fast_open.get_ref()
        && options.mptcp
    {
        let message = "`pool.tcp.fast_open` does not go with `mptcp`";
        let at = fast_open.span().start;
        tcp.reader().report(at, Problem::new(message, "remove one of the two"));
    }
    tcp.finish(&[]);
    if let Some(transparent) = &transparent
        && *transparent.get_ref()
        && !sources.is_empty()
    {
        let message = "`pool.transparent` connects from the client's address, `source_addresses` from yours";
        let at = transparent.span().start;
        section.reader().report(at, Problem::new(message, "remove one of the two"));
    }
    let (fast_open, transparent) = (or(fast_open, false), or(transparent, false));
    Connecting { proxy, options, fast_open, sources, transparent }
}

/// `source_addresses`, of `[dataplane]` or a pool.
pub(super) fn source_addresses(section: &mut Section<'_, '_>) -> Vec<IpAddr> {
    let Some(read) = section.value("source_addresses", texts(parse_source_address)) else {
        return Vec::new();
    };
    let (at, addresses) = (read.span().start, read.into_inner());
    let name = format!("{}.source_addresses", section.path());
    if addresses.len() > SOURCE_ADDRESSES_MAX {
        let message = format!("`{name}` has {} addresses", addresses.len());
        let hint = format!(
            "keep it to {SOURCE_ADDRESSES_MAX}: each brings some 28,000 connections to each resource"
        );
        section.reader().report(at, Problem::new(message, hint));
    }
    let twice = addresses.iter().enumerate().find(|(n, address)| addresses[..*n].contains(address));
    if let Some((_, twice)) = twice {
        let message = format!("`{name}` has {twice} twice");
        section.reader().report(at, Problem::new(message, "remove one of the two"));
    }
    addresses
}

fn read_options(section: &mut Section<'_, '_>) -> TcpOptions {
    let time = section.value("keepalive", text(keepalive));
    let interval = section.value("keepalive_interval", text(whole_seconds(KEEPALIVE_MAX)));
    let probes = section.value("keepalive_probes", integer(0..=PROBES_MAX));
    let user_timeout = section.value("user_timeout", text(user_timeout));
    let given = |number: u32| (number != 0).then_some(number);
    TcpOptions {
        keepalive: KeepaliveOptions {
            // "0s" is none, which stands for off here.
            time: time.map(|time| time.into_inner().unwrap_or_default()),
            interval: interval.map(Spanned::into_inner).filter(|interval| !interval.is_zero()),
            probes: probes.map(Spanned::into_inner).filter(|probes| *probes != 0),
        },
        user_timeout: or(user_timeout, None),
        receive_buffer: given(or(section.value("receive_buffer", buffer), 0)),
        send_buffer: given(or(section.value("send_buffer", buffer), 0)),
        mark: given(or(section.value("mark", integer(0..=u64::from(u32::MAX))), 0)),
        congestion: or(section.value("congestion", text(congestion)), None),
        dscp: section.value("dscp", integer(0..=63)).map(Spanned::into_inner).filter(|dscp| *dscp != 0),
        mptcp: or(section.value("mptcp", boolean), false),
    }
}

fn whole_seconds(max: Duration) -> impl FnOnce(&str) -> Result<Duration, Problem> {
    move |text| {
        let duration = parse_duration(text)?;
        if duration.subsec_millis() != 0 {
            return Err(Problem::new(format!("{text:?} is not in whole seconds"), "write \"5s\""));
        }
        if duration > max {
            let hint = format!("write at most \"{}\"", duration_text(max));
            return Err(Problem::new(format!("{text:?} is out of range"), hint));
        }
        Ok(duration)
    }
}

fn user_timeout(text: &str) -> Result<Option<Duration>, Problem> {
    let limit = parse_duration(text)?;
    if limit > USER_TIMEOUT_MAX {
        let hint =
            format!("write at most \"{}\"; \"0s\" leaves it to the kernel", duration_text(USER_TIMEOUT_MAX));
        return Err(Problem::new(format!("{text:?} is out of range"), hint));
    }
    Ok((!limit.is_zero()).then_some(limit))
}

/// Bytes; 0: as the kernel tunes it.
fn buffer(value: &DeValue<'_>) -> Result<u32, Problem> {
    match integer(0..=BUFFER_MAX)(value)? {
        0 => Ok(0),
        bytes if u64::from(bytes) >= BUFFER_MIN => Ok(bytes),
        bytes => Err(Problem::new(
            format!("{bytes} bytes hold no segment"),
            format!("write {BUFFER_MIN} or more, or 0 for what the kernel tunes by itself"),
        )),
    }
}

/// A name as the kernel has them; which there are is seen at the start.
fn congestion(text: &str) -> Result<Option<String>, Problem> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if text.len() > CONGESTION_MAX || !text.chars().all(is_name) {
        let hint =
            "write \"cubic\", \"bbr\" or another of `sysctl net.ipv4.tcp_available_congestion_control`";
        return Err(Problem::new(format!("{text:?} is no congestion control"), hint));
    }
    Ok((!text.is_empty()).then(|| text.to_owned()))
}
