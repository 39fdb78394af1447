//! How TCP behaves on the sockets of listeners and towards backends: the knobs, and setting them.
//!
//! Owns: which option of which call each knob is, when it is set, and what to do when the kernel says no. Does not own:
//! sockets, addresses, who is connected to. Invariants:
//!
//! * a knob that is not given costs no system call (docs/decisions/0003-socket-options-late.md);
//! * what a listener cannot have is an error before anything is accepted; what a connection to a backend cannot have is
//!   counted and said once, and the flow goes without, except for [`Knob::Mark`]: where it goes depends on that one.
//!
//! docs/tcp.md has the table for users.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// Connections that may wait to be accepted, unless told otherwise; the kernel takes at most `net.core.somaxconn`.
const BACKLOG_DEFAULT: u16 = 4_096;
/// Instead of a congestion control that paces, within the host; see docs/decisions/0060-no-pacing-within-the-host.md. Every
/// kernel has this one, and lets everybody use it (`tcp(7)`).
const UNPACED: &str = "reno";

/// Knobs of sockets on either side. What is not given is as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TcpOptions {
    /// When the kernel probes a silent peer.
    pub keepalive: KeepaliveOptions,
    /// How long sent bytes may go without being acknowledged before the connection fails (`TCP_USER_TIMEOUT`, `tcp(7)`,
    /// in milliseconds; RFC 5482).
    pub user_timeout: Option<Duration>,
    /// Bytes of the receive buffer (`SO_RCVBUF`, `socket(7)`; the kernel doubles it for its own needs). Fixed: the kernel
    /// no longer tunes it.
    pub receive_buffer: Option<u32>,
    /// Bytes of the send buffer (`SO_SNDBUF`), alike.
    pub send_buffer: Option<u32>,
    /// The mark that routing rules and filters see (`SO_MARK`); needs `CAP_NET_RAW` (`CAP_NET_ADMIN` before Linux 5.17).
    pub mark: Option<u32>,
    /// The congestion control's name (`TCP_CONGESTION`); `None`: the system's, but none that paces (bbr) where both ends are
    /// loopback addresses.
    pub congestion: Option<String>,
    /// The class of its packets, 0 to 63 (RFC 2474; `IP_TOS`, `IPV6_TCLASS`).
    pub dscp: Option<u8>,
    /// Multipath TCP (`IPPROTO_MPTCP`, RFC 8684): with peers that speak it; others get TCP.
    pub mptcp: bool,
}

/// TCP keepalive: what differs from [`crate::Timeouts::keepalive`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeepaliveOptions {
    /// Silence before the first probe (`TCP_KEEPIDLE`); zero: no probes; `None`: [`crate::Timeouts::keepalive`].
    pub time: Option<Duration>,
    /// Between probes (`TCP_KEEPINTVL`); `None`: a tenth of the silence, a second at least.
    pub interval: Option<Duration>,
    /// Unanswered probes after which the peer is gone (`TCP_KEEPCNT`); `None`: `net.ipv4.tcp_keepalive_probes`.
    pub probes: Option<u8>,
}

/// Knobs of a listener. Connections inherit them from it, for no system call each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenerTcp {
    /// Those that both sides have.
    pub options: TcpOptions,
    /// Connections that may wait to be accepted (`listen(2)`), 1 or more.
    pub backlog: u16,
    /// Accept when the first bytes are there, or after so many seconds (`TCP_DEFER_ACCEPT`); 0: at once.
    pub defer_accept_seconds: u16,
    /// Connections that may wait with bytes that came with their SYN (`TCP_FASTOPEN`); 0: such bytes are not taken.
    pub fast_open: u16,
}

impl Default for ListenerTcp {
    fn default() -> Self {
        let options = TcpOptions::default();
        Self { options, backlog: BACKLOG_DEFAULT, defer_accept_seconds: 0, fast_open: 0 }
    }
}

/// Keepalive as it is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Keepalive {
    time: Duration,
    interval: Duration,
    probes: Option<u8>,
}

impl KeepaliveOptions {
    /// With what holds where nothing else is said; `None`: the peer is not probed.
    pub(crate) fn over(self, default: Option<Duration>) -> Option<Keepalive> {
        let time = self.time.or(default).filter(|time| !time.is_zero())?;
        let interval = self.interval.unwrap_or_else(|| (time / 10).max(Duration::from_secs(1)));
        Some(Keepalive { time, interval, probes: self.probes })
    }
}

/// What can be refused. A closed set: each is a metric label, and a key of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Knob {
    /// `mptcp`.
    Mptcp,
    /// `keepalive`, `keepalive_interval`, `keepalive_probes`.
    Keepalive,
    /// `user_timeout`.
    UserTimeout,
    /// `receive_buffer`.
    ReceiveBuffer,
    /// `send_buffer`.
    SendBuffer,
    /// `mark`.
    Mark,
    /// `congestion`.
    Congestion,
    /// `dscp`.
    Dscp,
    /// `fast_open`.
    FastOpen,
    /// `defer_accept`.
    DeferAccept,
    /// `backlog`.
    Backlog,
    /// `transparent`.
    Transparent,
}

impl Knob {
    /// All of them, in metric order.
    pub(crate) const ALL: [Self; 12] = [
        Self::Mptcp,
        Self::Keepalive,
        Self::UserTimeout,
        Self::ReceiveBuffer,
        Self::SendBuffer,
        Self::Mark,
        Self::Congestion,
        Self::Dscp,
        Self::FastOpen,
        Self::DeferAccept,
        Self::Backlog,
        Self::Transparent,
    ];

    /// Its key in the configuration, and its label.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Mptcp => "mptcp",
            Self::Keepalive => "keepalive",
            Self::UserTimeout => "user_timeout",
            Self::ReceiveBuffer => "receive_buffer",
            Self::SendBuffer => "send_buffer",
            Self::Mark => "mark",
            Self::Congestion => "congestion",
            Self::Dscp => "dscp",
            Self::FastOpen => "fast_open",
            Self::DeferAccept => "defer_accept",
            Self::Backlog => "backlog",
            Self::Transparent => "transparent",
        }
    }
}

/// A knob that the kernel did not take. Says what would have to change for it to be taken.
#[derive(Debug)]
pub struct Refused {
    /// Which.
    pub knob: Knob,
    /// The kernel's answer.
    pub source: io::Error,
    /// The value that was asked for.
    value: String,
}

impl Refused {
    pub(crate) fn new(knob: Knob, value: impl fmt::Display, source: impl Into<io::Error>) -> Self {
        Self { knob, source: source.into(), value: value.to_string() }
    }
}

impl std::error::Error for Refused {}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { knob, source, value } = self;
        let errno = source.raw_os_error().map(Errno::from_raw_os_error);
        let forbidden = matches!(errno, Some(Errno::PERM | Errno::ACCESS));
        write!(f, "{} = {value}: ", knob.key())?;
        match knob {
            Knob::Mark | Knob::Transparent if forbidden => f.write_str(
                "this needs CAP_NET_RAW or CAP_NET_ADMIN: grant one (systemd: AmbientCapabilities=CAP_NET_RAW; a container: \
                 --cap-add NET_RAW; a binary: setcap cap_net_raw+ep), or remove the key",
            ),
            Knob::Congestion if forbidden => write!(
                f,
                "only a process with CAP_NET_ADMIN may choose it: grant that, or add it to the sysctl \
                 net.ipv4.tcp_allowed_congestion_control ({})",
                sysctl("net/ipv4/tcp_allowed_congestion_control")
            ),
            Knob::Congestion => write!(
                f,
                "this kernel does not have it ({source}); it has {}; write one of them, or load the module (modprobe tcp_NAME)",
                sysctl("net/ipv4/tcp_available_congestion_control")
            ),
            Knob::Mptcp => write!(
                f,
                "this kernel does not do it here ({source}); it needs CONFIG_MPTCP and the sysctl net.mptcp.enabled = 1 (it is {}); \
                 change that, or remove the key",
                sysctl("net/mptcp/enabled")
            ),
            Knob::FastOpen => write!(
                f,
                "fast open is off ({source}): the sysctl net.ipv4.tcp_fastopen is {}; it needs 1 towards resources, 2 for \
                 listeners, 3 for both; set it, or remove the key",
                sysctl("net/ipv4/tcp_fastopen")
            ),
            Knob::ReceiveBuffer => limited(f, "rmem_max", source),
            Knob::SendBuffer => limited(f, "wmem_max", source),
            Knob::Backlog => limited(f, "somaxconn", source),
            _ => write!(f, "the kernel refuses it ({source}); remove the key"),
        }
    }
}

fn limited(f: &mut fmt::Formatter<'_>, name: &str, source: &io::Error) -> fmt::Result {
    let now = sysctl(&format!("net/core/{name}"));
    write!(f, "{source}: the sysctl net.core.{name} is {now}; raise it, or write less")
}

/// The value of a sysctl, for messages.
fn sysctl(path: &str) -> String {
    let value = std::fs::read_to_string(format!("/proc/sys/{path}"));
    value.map_or_else(|_| "not there".to_owned(), |value| value.trim().to_owned())
}

/// Whether bit 2 of `net.ipv4.tcp_fastopen` is on. One that cannot be read is taken to be: the kernel knows better.
fn takes_fast_open() -> bool {
    sysctl("net/ipv4/tcp_fastopen").parse().map_or(true, |flags: u32| flags & 2 != 0)
}

/// How often each knob was refused towards the backends of a pool.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    counts: [AtomicU64; Knob::ALL.len()],
    said: [AtomicBool; Knob::ALL.len()],
}

impl Refusals {
    /// Counts it, and says it the first time.
    pub(crate) fn note(&self, pool: &str, refused: &Refused) {
        self.counts[refused.knob as usize].fetch_add(1, Relaxed);
        self.say(pool, refused);
    }

    /// Says it, once.
    pub(crate) fn say(&self, pool: &str, refused: &Refused) {
        if self.said[refused.knob as usize].swap(true, Relaxed) {
            return;
        }
        match refused.knob {
            Knob::Mark | Knob::Transparent => tracing::error!(pool, "cannot connect to resources: {refused}"),
            _ => tracing::warn!(pool, "connections to resources go without: {refused}"),
        }
    }

    /// By key.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Knob::ALL.into_iter().zip(&self.counts).map(|(knob, count)| (knob.key(), count.load(Relaxed)))
    }
}

fn ask(
    knob: Knob,
    value: impl fmt::Display,
    answer: Result<(), impl Into<io::Error>>,
) -> Result<(), Refused> {
    answer.map_err(|source| Refused::new(knob, value, source))
}

/// What a socket's addresses mean to its options.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reach {
    /// Of which family it is.
    pub(crate) ipv6: bool,
    /// Its connections stay within the host, where pacing is for nobody.
    pub(crate) unpaced: bool,
}

/// Whether the system's congestion control sends by the clock (bbr): a timer for each connection that has much to send.
pub(crate) fn system_paces() -> bool {
    sysctl("net/ipv4/tcp_congestion_control").starts_with("bbr")
}

/// Sets what must be there before `connect(2)` or `listen(2)` (buffers: the window's scale is fixed by the handshake,
/// `tcp(7)`). Goes on after a refusal, except of the mark: says each to `refused`, and whether it was the mark.
pub(crate) fn set_early(
    socket: &impl AsFd,
    reach: Reach,
    options: &TcpOptions,
    mut refused: impl FnMut(Refused),
) -> Result<(), Refused> {
    let Reach { ipv6, unpaced } = reach;
    let TcpOptions {
        keepalive: _,
        user_timeout,
        receive_buffer,
        send_buffer,
        mark,
        congestion,
        dscp,
        mptcp: _,
    } = options;
    if let Some(mark) = mark {
        ask(Knob::Mark, mark, SockRef::from(socket).set_mark(*mark))?;
    }
    let mut tell = |answer: Result<(), Refused>| answer.unwrap_or_else(&mut refused);
    if let Some(bytes) = receive_buffer {
        let set = sockopt::set_socket_recv_buffer_size(socket, *bytes as usize);
        tell(ask(Knob::ReceiveBuffer, bytes, set));
    }
    if let Some(bytes) = send_buffer {
        let set = sockopt::set_socket_send_buffer_size(socket, *bytes as usize);
        tell(ask(Knob::SendBuffer, bytes, set));
    }
    if let Some(name) = congestion {
        tell(ask(Knob::Congestion, format!("{name:?}"), sockopt::set_tcp_congestion(socket, name)));
    } else if unpaced {
        // Nobody asked for it, so nobody need hear if it is refused: the connection costs more, and works.
        let _ = sockopt::set_tcp_congestion(socket, UNPACED);
    }
    if let Some(dscp) = dscp {
        let class = dscp << 2;
        let set = match ipv6 {
            true => sockopt::set_ipv6_tclass(socket, class.into()),
            false => sockopt::set_ip_tos(socket, class),
        };
        tell(ask(Knob::Dscp, dscp, set));
    }
    if let Some(limit) = user_timeout {
        tell(set_user_timeout(socket, *limit));
    }
    Ok(())
}

/// How long bytes may go without being acknowledged; zero: as long as the kernel retransmits.
pub(crate) fn set_user_timeout(socket: &impl AsFd, limit: Duration) -> Result<(), Refused> {
    let millis = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
    ask(Knob::UserTimeout, format!("\"{millis}ms\""), sockopt::set_tcp_user_timeout(socket, millis))
}

/// What must be there before a peer is silent for long.
pub(crate) fn set_keepalive(socket: &impl AsFd, keepalive: Keepalive) -> Result<(), Refused> {
    let Keepalive { time, interval, probes } = keepalive;
    let set = || {
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, time)?;
        sockopt::set_tcp_keepintvl(socket, interval)?;
        probes.map_or(Ok(()), |probes| sockopt::set_tcp_keepcnt(socket, probes.into()))
    };
    ask(Knob::Keepalive, format!("\"{}s\"", time.as_secs()), set())
}

/// A socket for listening, with all that its connections inherit.
pub(crate) fn listening_socket(
    bind: SocketAddr,
    tcp: &ListenerTcp,
    keepalive: Option<Duration>,
) -> Result<Socket, ListenError> {
    let socket = stream(Domain::for_address(bind), tcp.options.mptcp)?;
    let mut first = None;
    let reach = Reach { ipv6: bind.is_ipv6(), unpaced: bind.ip().is_loopback() && system_paces() };
    set_early(&socket, reach, &tcp.options, |refused| {
        first.get_or_insert(refused);
    })?;
    if let Some(refused) = first {
        return Err(refused.into());
    }
    buffers_were_taken(&socket, &tcp.options)?;
    if let Some(keepalive) = tcp.options.keepalive.over(keepalive) {
        set_keepalive(&socket, keepalive)?;
    }
    if tcp.defer_accept_seconds != 0 {
        let seconds = tcp.defer_accept_seconds;
        ask(Knob::DeferAccept, seconds, uring::defer_accept(socket.as_fd(), seconds))?;
    }
    if tcp.fast_open != 0 {
        let off = || Err(io::Error::from(Errno::OPNOTSUPP));
        let set = if takes_fast_open() { uring::fast_open(socket.as_fd(), tcp.fast_open) } else { off() };
        ask(Knob::FastOpen, tcp.fast_open, set)?;
    }
    // The default is the kernel's to cut; a number that someone wrote is not.
    let longest = sysctl("net/core/somaxconn").parse().unwrap_or(u16::MAX);
    if tcp.backlog > longest && tcp.backlog != BACKLOG_DEFAULT {
        ask(Knob::Backlog, tcp.backlog, Err(io::Error::other("it would be cut")))?;
    }
    Ok(socket)
}

/// Why a listening socket could not be made.
#[derive(Debug)]
pub(crate) enum ListenError {
    /// One of its knobs.
    Refused(Refused),
    /// Anything else.
    Io(io::Error),
}

impl From<Refused> for ListenError {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

impl From<io::Error> for ListenError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn stream(domain: Domain, mptcp: bool) -> Result<Socket, ListenError> {
    if !mptcp {
        return Ok(Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?);
    }
    let made = Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP));
    Ok(made.map_err(|source| Refused::new(Knob::Mptcp, true, source))?)
}

/// Whether buffers are as large as asked for: the kernel cuts them to its limit without a word.
pub(crate) fn buffers_were_taken(socket: &impl AsFd, options: &TcpOptions) -> Result<(), Refused> {
    let socket = SockRef::from(socket);
    // What the kernel says is twice what it took; one that says nothing took it.
    let taken = |doubled: io::Result<usize>| doubled.map_or(usize::MAX, |doubled| doubled / 2);
    let check = |knob, asked: Option<u32>, taken: usize| match asked {
        Some(asked) if taken < asked as usize => {
            ask(knob, asked, Err(io::Error::other(format!("it was cut to {taken}"))))
        }
        _ => Ok(()),
    };
    check(Knob::ReceiveBuffer, options.receive_buffer, taken(socket.recv_buffer_size()))?;
    check(Knob::SendBuffer, options.send_buffer, taken(socket.send_buffer_size()))
}
