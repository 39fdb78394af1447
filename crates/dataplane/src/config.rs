//! What the dataplane is told at its start. Values are parsed and checked by the binary; these are the checked ones.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use allocation::{PoolName, Publisher};
use flow::preface::Route;
use flow::preface::proxy::{Accepts, Version};
pub use flow::udp::{CONFIGS, Cipher, NONCE_MIN, PLAINTEXT_MAX, ServerIdForm, ServerIdKeys};
use ipnet::IpNet;

use crate::access::AccessLogConfig;
use crate::engine::Engine;
use crate::share::PoolShare;
use crate::tcp::{ListenerTcp, TcpOptions};

/// All of it.
#[derive(Debug, Clone)]
pub struct Config {
    /// Worker threads; 0: one for each core that the process may use, each pinned to its own.
    pub workers: usize,
    /// Where to accept, and from which pool flows are served.
    pub listeners: Vec<ListenerConfig>,
    /// Bounds.
    pub limits: Limits,
    /// Times.
    pub timeouts: Timeouts,
    /// Addresses to connect to backends from, in turn, for pools that name none ([`Connecting::sources`]); empty: as the
    /// kernel routes. Each brings some 28,000 ports for each backend.
    pub sources: Vec<IpAddr>,
    /// What moves the bytes; `None`: the best that works here.
    pub engine: Option<Engine>,
    /// The part of selections that the decision log gets, 0 to 1; 0: there is none.
    pub decision_sample: f64,
    /// A line for each flow; `None`: there is none, and it costs nothing.
    pub access_log: Option<AccessLogConfig>,
}

impl Config {
    /// These listeners, everything else by default.
    pub fn new(listeners: Vec<ListenerConfig>) -> Self {
        Self {
            workers: 0,
            listeners,
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            sources: Vec::new(),
            engine: None,
            decision_sample: 0.0,
            access_log: None,
        }
    }
}

/// One listener.
#[derive(Debug, Clone)]
pub struct ListenerConfig {
    /// Where to accept. Port 0: any free one.
    pub bind: SocketAddr,
    /// What is accepted there.
    pub protocol: Protocol,
    /// The last of the ports to accept at, where they are more than one.
    pub last_port: Option<u16>,
    /// Every connection begins with a PROXY header, or datagrams do ([`UdpConfig::proxy_header`]; of version 2, whatever is
    /// accepted).
    pub proxy: Option<ProxyProtocol>,
    /// Which flows go to another target than the first; the first route that a flow meets is taken. At most
    /// [`flow::preface::Routes::MAX`], with targets that there are.
    pub routes: Vec<Route>,
    /// Whom its flows are given to: the first is the default, and there is one at least.
    pub targets: Vec<Target>,
    /// How TCP behaves towards clients.
    pub tcp: ListenerTcp,
    /// How many flows it takes, and how fast.
    pub limits: ListenerLimits,
}

impl ListenerConfig {
    /// A listener of TCP whose flows go to one pool.
    pub fn new(bind: SocketAddr, pool: PoolName, table: Publisher) -> Self {
        let target = Target { pool, table, connecting: Connecting::default(), share: None };
        Self {
            bind,
            protocol: Protocol::Tcp,
            last_port: None,
            proxy: None,
            routes: Vec::new(),
            targets: vec![target],
            tcp: ListenerTcp::default(),
            limits: ListenerLimits::default(),
        }
    }

    /// The same for UDP.
    pub fn udp(bind: SocketAddr, pool: PoolName, table: Publisher, udp: UdpConfig) -> Self {
        Self { protocol: Protocol::Udp(udp), ..Self::new(bind, pool, table) }
    }
}

/// What a listener accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp(UdpConfig),
}

impl Protocol {
    /// `tcp` or `udp`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp(_) => "udp",
        }
    }
}

/// How a listener keeps flows of datagrams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpConfig {
    /// How long a flow may go without a datagram in either direction.
    pub idle_timeout: Duration,
    /// Datagrams with which a backend answers each of a client's; a flow of which all are answered is over. 0: nobody knows.
    pub responses: u32,
    /// Datagrams of a client in one flow; what it sends after them is a new flow. 0: any number.
    pub requests: u32,
    /// Flows of the listener that are open at once, over all workers; a datagram that would begin another one is dropped
    /// (`sheds{reason="flows"}`). 0: as many as the dataplane takes.
    pub flows_max: u32,
    /// Datagrams are QUIC: clients that change their address stay on their backend by the ID of their connection.
    pub quic: bool,
    /// How backends put their own id into IDs of connections, where they do.
    pub quic_server_id: Option<ServerIdForm>,
    /// What they encrypt it with; `None`: it is in clear text.
    pub quic_keys: Option<Arc<ServerIdKeys>>,
    /// Which datagrams have a PROXY header, where the listener speaks the protocol.
    pub proxy_header: ProxyHeader,
}

/// Which datagrams of a proxy begin with a PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProxyHeader {
    /// Every one. One that does not is dropped.
    #[default]
    Every,
    /// The first from each of the proxy's addresses and ports, and when another client is meant. Those without are of the client
    /// that was named last; a header alone is not passed on. What a client says after its first datagram is then believed to be a
    /// header if it looks like one.
    First,
}

impl Default for UdpConfig {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(60),
            responses: 0,
            requests: 0,
            flows_max: 0,
            quic: false,
            quic_server_id: None,
            quic_keys: None,
            proxy_header: ProxyHeader::Every,
        }
    }
}

/// AES-128 with this key, for [`ServerIdKeys::insert`].
pub fn aes128(key: [u8; 16]) -> Arc<dyn Cipher> {
    struct Aes(aes::Aes128);
    impl Cipher for Aes {
        fn encrypt(&self, block: &mut [u8; 16]) {
            self.0.encrypt_block(block.into());
        }

        fn decrypt(&self, block: &mut [u8; 16]) {
            self.0.decrypt_block(block.into());
        }
    }
    Arc::new(Aes(aes::Aes128::new(&key.into())))
}

/// A pool that serves flows of a listener.
#[derive(Debug, Clone)]
pub struct Target {
    /// For names and labels.
    pub pool: PoolName,
    /// Its table.
    pub table: Publisher,
    /// How its backends are connected to. Alike wherever the pool is a target.
    pub connecting: Connecting,
    /// What all targets of this pool share; `None`: it has neither a budget, nor a queue, nor affinity.
    pub share: Option<PoolShare>,
}

/// The PROXY protocol from whoever connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyProtocol {
    /// Which versions.
    pub accepts: Accepts,
    /// Who may connect: a header is believed, so anybody else is refused.
    pub trusted: Vec<IpNet>,
}

/// How the backends of a pool are connected to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Connecting {
    /// The PROXY header that they are sent before anything else; where they are sent datagrams, before each. Version 1 has none
    /// for those, and none is sent.
    pub proxy: Option<Version>,
    /// How TCP behaves.
    pub options: TcpOptions,
    /// Whether the client's first bytes may go with the SYN (RFC 7413), where they are there before a backend is connected
    /// to. Then a backend that cannot be reached resets the flow, for the bytes are gone; no other is tried.
    pub fast_open: bool,
    /// Own addresses to connect from, in turn; empty: [`Config::sources`].
    pub sources: Vec<IpAddr>,
    /// Connect from the client's address (`IP_TRANSPARENT`, `ip(7)`): needs `CAP_NET_RAW` or `CAP_NET_ADMIN`, and routes that bring the
    /// answers back here.
    pub transparent: bool,
}

/// Limits of one listener, over all workers; 0: none. A rate is also the most that may come at once. Who is turned away is
/// reset before anything is kept of it, and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ListenerLimits {
    /// Flows open at once (`sheds{reason="listener_flows"}`).
    pub flows: u32,
    /// Of one client: an IPv4 address, or an IPv6 /64 (`client_flows`).
    pub flows_per_client: u32,
    /// New flows a second (`listener_rate`).
    pub new_flows_per_second: u32,
    /// Of one client (`client_rate`).
    pub new_flows_per_client_per_second: u32,
}

impl ListenerLimits {
    /// The largest rate; a larger one means this one.
    pub const RATE_MAX: u32 = flow::limits::Rate::PER_SECOND_MAX;
}

/// Bounds. At each there is a defined outcome and a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Flows open at once, over all workers; a client beyond it is reset (`sheds{reason="flows"}`). 0: as many as the
    /// descriptors of the process (`RLIMIT_NOFILE`) allow, two each (a flow of datagrams needs one), with some kept back for
    /// control.
    pub flows_max: u32,
    /// Further backends that are tried when a connect fails; at most 7.
    pub connect_retries: u8,
    /// Receive buffers of 16 KiB for each worker, besides 1,024 that all flows share; they come into being as they are
    /// needed. 0: two for each flow, so that no half can starve another; at most 32,768.
    pub buffers_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { flows_max: 0, connect_retries: 2, buffers_max: 0 }
    }
}

/// Times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// How long one connect to a backend may take.
    pub connect: Duration,
    /// How long a flow may go without a byte in either direction; `None`: for ever.
    pub idle: Option<Duration>,
    /// How long a client may take for what it sends first, where that decides (PROXY header, TLS hello).
    pub preface: Duration,
    /// TCP keepalive: silence after which the kernel probes the peer, on both sides; `None`: it does not.
    pub keepalive: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            idle: Some(Duration::from_secs(3_600)),
            preface: Duration::from_secs(5),
            keepalive: Some(Duration::from_secs(60)),
        }
    }
}
