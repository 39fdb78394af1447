//! What holds for connections to the backends of a pool: their knobs, and the addresses they come from.
//!
//! Owns: the settings as all workers share them, trying them out at the start, counting what is refused later; which source
//! addresses have no port left for a backend. Does not own: selecting, connecting.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use allocation::{PoolName, Timestamp};
use flow::preface::proxy::Version;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};
use socket2::SockRef;

use crate::config::Connecting;
use crate::tcp::{self, Keepalive, Knob, Reach, Refusals, Refused};

/// How long a source address that had no port left for a backend is not tried for it again: the kernel looks at every port
/// before it says so, which takes milliseconds.
const PORTS_REST: Duration = Duration::from_millis(100);
/// Pairs of a backend and a source address that are remembered so. Of more, some are tried in vain.
const SPENT_MAX: usize = 64;
/// Ports that are tried for a connection that takes one over.
const BINDS_MAX: usize = 16;
/// Reserved ports that are passed over for one that is not.
const RESERVED_PASSED_MAX: u16 = 1_024;

/// Towards the backends of one pool, for all workers.
#[derive(Debug)]
pub(crate) struct Towards {
    pool: PoolName,
    config: Connecting,
    pub(crate) keepalive: Option<Keepalive>,
    ipv4: Vec<IpAddr>,
    ipv6: Vec<IpAddr>,
    pub(crate) refusals: Refusals,
    /// The system's congestion control paces.
    system_paces: bool,
    ports_out_said: AtomicBool,
    /// What flows of datagrams may have of the host's ports; `None`: as the kernel gives them.
    datagram_ports: Option<RangeInclusive<u16>>,
}

impl Towards {
    /// `sources` and `keepalive` are those of pools that have none of their own.
    pub(crate) fn new(
        pool: PoolName,
        config: Connecting,
        sources: &[IpAddr],
        keepalive: Option<Duration>,
    ) -> Self {
        let sources = if config.sources.is_empty() { sources } else { &config.sources };
        let (ipv4, ipv6) = sources.iter().partition(|source| source.is_ipv4());
        let keepalive = config.options.keepalive.over(keepalive);
        let system_paces = tcp::system_paces();
        let datagram_ports = datagram_ports(&kernels("ip_local_port_range"));
        Self {
            pool,
            config,
            keepalive,
            ipv4,
            ipv6,
            refusals: Refusals::default(),
            system_paces,
            ports_out_said: AtomicBool::new(false),
            datagram_ports,
        }
    }

    pub(crate) fn pool(&self) -> &PoolName {
        &self.pool
    }

    /// Own addresses to connect to this backend from, in turn; none: as the kernel routes.
    pub(crate) fn sources(&self, backend: &SocketAddr) -> &[IpAddr] {
        match (self.config.transparent, backend) {
            (true, _) => &[],
            (false, SocketAddr::V4(_)) => &self.ipv4,
            (false, SocketAddr::V6(_)) => &self.ipv6,
        }
    }

    /// All of them.
    pub(crate) fn all_sources(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.iter().chain(&self.ipv6).copied()
    }

    /// Connections come from the client's address.
    pub(crate) fn is_transparent(&self) -> bool {
        self.config.transparent
    }

    /// The header that backends are sent first.
    pub(crate) fn proxy(&self) -> Option<Version> {
        self.config.proxy
    }

    /// The first bytes may go with the SYN.
    pub(crate) fn fast_open(&self) -> bool {
        self.config.fast_open
    }

    /// How long bytes may go unacknowledged once the connection is there; zero: as long as the kernel retransmits.
    pub(crate) fn user_timeout(&self) -> Duration {
        self.config.options.user_timeout.unwrap_or_default()
    }

    /// A socket with all that must be there before it connects to that backend. What it goes without is counted.
    pub(crate) fn socket(&self, backend: IpAddr) -> Result<OwnedFd, SocketError> {
        let opened = self.open(backend, |refused| self.note(&refused));
        opened.inspect_err(|error| {
            if let SocketError::Refused(refused) = error {
                self.note(refused);
            }
        })
    }

    fn open(&self, backend: IpAddr, mut without: impl FnMut(Refused)) -> Result<OwnedFd, SocketError> {
        let options = &self.config.options;
        let ipv6 = backend.is_ipv6();
        let reach = Reach { ipv6, unpaced: self.system_paces && backend.is_loopback() };
        let family = if ipv6 { AddressFamily::INET6 } else { AddressFamily::INET };
        let make =
            |protocol| rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, protocol);
        let socket = match options.mptcp.then(|| make(Some(ipproto::MPTCP))) {
            None => make(None)?,
            Some(Ok(socket)) => socket,
            Some(Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))) => {
                return Err(error.into());
            }
            Some(Err(error)) => {
                without(Refused::new(Knob::Mptcp, true, error));
                make(None)?
            }
        };
        tcp::set_early(&socket, reach, options, without)?;
        if self.config.transparent {
            transparent(&socket, ipv6)?;
        }
        Ok(socket)
    }

    /// Counts what a connection goes without, or fails for, and says it the first time.
    pub(crate) fn note(&self, refused: &Refused) {
        self.refusals.note(self.pool.as_str(), refused);
    }

    /// What flows of datagrams may have of the host's ports.
    pub(crate) fn datagram_ports(&self) -> Option<RangeInclusive<u16>> {
        self.datagram_ports.clone()
    }

    /// Says the first time that ports ran out.
    pub(crate) fn note_ports_out(&self, backend: SocketAddr) {
        if !self.ports_out_said.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                pool = self.pool.as_str(),
                %backend,
                "no local port is free towards this resource; those that rest from connections that are over (TIME_WAIT) are taken \
                 over. More source_addresses bring 28,000 each, net.ipv4.tcp_tw_reuse=1 lets the kernel take them over by itself"
            );
        }
    }

    /// Asks the kernel for everything once, before there are flows. What they could go without is said, and what they could
    /// not is an error.
    pub(crate) fn try_out(&self) -> Result<(), Refused> {
        let say = |refused: Refused| self.refusals.say(self.pool.as_str(), &refused);
        let socket = match self.open(Ipv4Addr::UNSPECIFIED.into(), say) {
            Ok(socket) => socket,
            Err(SocketError::Refused(refused)) => return Err(refused),
            // Nothing of the pool's; it is met again where it matters.
            Err(SocketError::Io(_)) => return Ok(()),
        };
        tcp::buffers_were_taken(&socket, &self.config.options).unwrap_or_else(say);
        if self.config.fast_open {
            self.set_fast_open(&socket).unwrap_or_else(say);
        }
        Ok(())
    }

    /// Lets the first bytes go with the SYN.
    pub(crate) fn set_fast_open(&self, socket: &OwnedFd) -> Result<(), Refused> {
        uring::fast_open_connect(socket.as_fd()).map_err(|error| Refused::new(Knob::FastOpen, true, error))
    }
}

/// Why there is no socket towards a backend.
#[derive(Debug)]
pub(crate) enum SocketError {
    /// A knob that a flow cannot go without.
    Refused(Refused),
    /// The kernel has no socket for us.
    Io(Errno),
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno)
    }
}

impl From<Refused> for SocketError {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

/// Lets a socket be bound to an address that is not ours (`IP_TRANSPARENT`, `ip(7)`; `IPV6_TRANSPARENT`).
fn transparent(socket: &OwnedFd, ipv6: bool) -> Result<(), Refused> {
    let socket = SockRef::from(socket);
    let set = if ipv6 { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) };
    set.map_err(|error| Refused::new(Knob::Transparent, true, error))
}

/// Source addresses without a port left for a backend, until they are tried again. Empty unless ports run out.
#[derive(Debug, Default)]
pub(crate) struct Spent {
    pairs: Vec<(SocketAddr, IpAddr, Timestamp)>,
    /// As they were when the last of these was noted.
    ports: Ports,
    random: RandomState,
    draws: u64,
}

impl Spent {
    /// No port is left from here to there. Where the kernel chooses the source, `source` is the unspecified address.
    pub(crate) fn note(&mut self, backend: SocketAddr, source: IpAddr, now: Timestamp) {
        self.pairs.retain(|(_, _, until)| *until > now);
        if self.pairs.len() < SPENT_MAX {
            self.pairs.push((backend, source, now + PORTS_REST));
            self.ports = Ports::of_the_kernel();
        }
    }

    /// Whether it was so a moment ago.
    pub(crate) fn rests(&self, backend: SocketAddr, source: IpAddr, now: Timestamp) -> bool {
        self.pairs.iter().any(|(b, s, until)| (*b, *s) == (backend, source) && *until > now)
    }

    /// Binds to a port that may rest from a connection that is over (`TIME_WAIT`): the kernel gives it to who asks for it by number
    /// (decision 64). False: none was found.
    pub(crate) fn bind_to_resting(&mut self, socket: &OwnedFd, source: IpAddr) -> Result<bool, Errno> {
        rustix::net::sockopt::set_socket_reuseaddr(socket, true)?;
        for _ in 0..BINDS_MAX {
            self.draws = self.draws.wrapping_add(1);
            let Some(port) = self.ports.pick(self.random.hash_one(self.draws)) else { return Ok(false) };
            match rustix::net::bind(socket, &SocketAddr::new(source, port)) {
                Ok(()) => return Ok(true),
                // A connection that is not over has it, or one whose end was not ours to say, or a listener.
                Err(Errno::ADDRINUSE) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

/// Ports that the kernel gives out by itself (`ip_local_port_range` and `ip_local_reserved_ports`, `ip(7)`), the upper half of them.
///
/// Where a port was bound to by number, the kernel does not give it out by itself, to nobody, until nothing uses it any more. The
/// lower half is left for the others of this host.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ports {
    first: u16,
    count: u16,
    reserved: Vec<RangeInclusive<u16>>,
}

impl Ports {
    fn of_the_kernel() -> Self {
        let [range, reserved] = ["ip_local_port_range", "ip_local_reserved_ports"].map(kernels);
        Self::parse(&range, &reserved).unwrap_or_default()
    }

    /// `32768 60999`, and `8080,9000-9100`.
    fn parse(range: &str, reserved: &str) -> Option<Self> {
        let (first, last) = parse_range(range)?;
        let count = last.checked_sub(first)? / 2;
        let one = |text: &str| {
            let (from, to) = text.split_once('-').unwrap_or((text, text));
            Some(from.parse().ok()?..=to.parse().ok()?)
        };
        let reserved = reserved.trim().split(',').filter(|text| !text.is_empty());
        Some(Self { first: last - count, count, reserved: reserved.map(one).collect::<Option<_>>()? })
    }

    fn pick(&self, random: u64) -> Option<u16> {
        let place = random.checked_rem(self.count.into())? as u16;
        let port = |n: u16| self.first + (u32::from(place + n) % u32::from(self.count)) as u16;
        (0..self.count.min(RESERVED_PASSED_MAX)).map(port).find(|port| !self.is_reserved(*port))
    }

    fn is_reserved(&self, port: u16) -> bool {
        self.reserved.iter().any(|ports| ports.contains(&port))
    }
}

/// Stands for the source address that the kernel chooses.
pub(crate) const ANY_SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// What the kernel has set under this name; empty where it does not say.
fn kernels(name: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default()
}

fn parse_range(range: &str) -> Option<(u16, u16)> {
    let mut ends = range.split_ascii_whitespace().map(str::parse);
    Some((ends.next()?.ok()?, ends.next()?.ok()?))
}

/// All ports of the range but its last eighth.
///
/// A connected UDP socket has its port alone, whatever it is connected to (`udp_lib_get_port` in net/ipv4/udp.c), and anybody who sends
/// datagrams makes us open them: without something left, this host could not even look a name up.
fn datagram_ports(range: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = parse_range(range)?;
    let left = last.checked_sub(first)? / 8;
    (left > 0).then(|| first..=last - left)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_has_no_ports_rests_for_that_backend_alone_and_in_bounds() {
        let (one, other): (SocketAddr, SocketAddr) =
            ("10.0.0.1:1".parse().unwrap(), "10.0.0.2:1".parse().unwrap());
        let source = IpAddr::from([10, 0, 0, 9]);
        let now = Timestamp::from_millis(1_000);
        let mut spent = Spent::default();
        spent.note(one, source, now);
        assert!(spent.rests(one, source, now));
        assert!(!spent.rests(other, source, now) && !spent.rests(one, ANY_SOURCE, now));
        assert!(!spent.rests(one, source, now + PORTS_REST), "it is tried again");
        for port in 0..1_000 {
            spent.note(SocketAddr::new(source, port), source, now);
        }
        assert_eq!(spent.pairs.len(), SPENT_MAX);
        spent.note(one, source, now + 2 * PORTS_REST);
        assert_eq!(spent.pairs.len(), 1, "what is over is forgotten");
    }

    #[test]
    fn half_of_the_ports_may_be_taken_over_but_no_reserved_one() {
        let ports = Ports::parse("32768\t60999\n", "\n").unwrap();
        assert_eq!((ports.first, ports.count), (46_884, 14_115));
        let picked = |ports: &Ports| (0..100_000).filter_map(|n| ports.pick(n)).collect::<BTreeSet<u16>>();
        let all = picked(&ports);
        assert_eq!((all.len(), all.first(), all.last()), (14_115, Some(&46_884), Some(&60_998)));
        let some = Ports::parse("20000 20019", "20010,20012-20014,1").unwrap();
        assert_eq!(picked(&some).into_iter().collect::<Vec<_>>(), [20_011, 20_015, 20_016, 20_017, 20_018]);
        for (range, reserved) in [("20000 20019", "20000-20019"), ("20000 20001", ""), ("20000 20000", "")] {
            assert!(picked(&Ports::parse(range, reserved).unwrap()).is_empty(), "{range}, {reserved}");
        }
        assert_eq!(Ports::parse("20000", ""), None);
        assert_eq!(Ports::parse("20001 20000", ""), None);
        assert_eq!(Ports::parse("1 2", "x"), None);
        assert!(Ports::of_the_kernel().count > 0);
        assert_eq!(datagram_ports("32768\t60999\n"), Some(32_768..=57_471));
        assert_eq!((datagram_ports("1 7"), datagram_ports("7 1"), datagram_ports("")), (None, None, None));
    }
}
