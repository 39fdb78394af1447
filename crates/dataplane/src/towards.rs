//! What holds for connections to the backends of a pool: their knobs, and the addresses they come from.
//!
//! Owns: the settings as all workers share them, trying them out at the start, counting what is refused later; which source
//! addresses have no port left for a backend. Does not own: selecting, connecting.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
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
        Self { pool, config, keepalive, ipv4, ipv6, refusals: Refusals::default(), system_paces }
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
pub(crate) struct Spent(Vec<(SocketAddr, IpAddr, Timestamp)>);

impl Spent {
    /// No port is left from here to there. Where the kernel chooses the source, `source` is the unspecified address.
    pub(crate) fn note(&mut self, backend: SocketAddr, source: IpAddr, now: Timestamp) {
        self.0.retain(|(_, _, until)| *until > now);
        if self.0.len() < SPENT_MAX {
            self.0.push((backend, source, now + PORTS_REST));
        }
    }

    /// Whether it was so a moment ago.
    pub(crate) fn rests(&self, backend: SocketAddr, source: IpAddr, now: Timestamp) -> bool {
        self.0.iter().any(|(b, s, until)| (*b, *s) == (backend, source) && *until > now)
    }
}

/// Stands for the source address that the kernel chooses.
pub(crate) const ANY_SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

#[cfg(test)]
mod tests {
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
        assert_eq!(spent.0.len(), SPENT_MAX);
        spent.note(one, source, now + 2 * PORTS_REST);
        assert_eq!(spent.0.len(), 1, "what is over is forgotten");
    }
}
