//! What can go wrong between us and a DNS server, whose fault it is, and what to do.

use std::net::SocketAddr;

use hickory_proto::op::ResponseCode;

/// Why an update was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpdateError {
    /// The network, or nobody listens.
    #[error(
        "the DNS server {server} cannot be reached: {why}; is it running, and is dns.server its address and port?"
    )]
    Unreachable {
        /// Where.
        server: SocketAddr,
        /// What the kernel said.
        why: String,
    },
    /// Silence, by UDP and by TCP.
    #[error(
        "the DNS server {server} does not answer; is dns.server its address, and does a firewall let UDP and TCP pass?"
    )]
    Silent {
        /// Where.
        server: SocketAddr,
    },
    /// The server's, or the operator's who gave it no such key.
    #[error(
        "the DNS server does not know the key {key} (BADKEY): put the `key` clause of dns.key_file into its \
         configuration, by the same name and algorithm"
    )]
    BadKey {
        /// The key's name.
        key: String,
    },
    /// The operator's: one name, two secrets.
    #[error(
        "the DNS server has another secret for the key {key} (BADSIG): copy the key file again, from the server to here \
         or from here to the server"
    )]
    BadSignature {
        /// The key's name.
        key: String,
    },
    /// A clock's.
    #[error(
        "the clocks of this host and of the DNS server are more than 300 s apart (BADTIME): set both by NTP"
    )]
    BadTime,
    /// The server's operator's.
    #[error(
        "the DNS server refuses updates of {zone} by the key {key} (REFUSED): let the key update the zone (BIND: \
         `update-policy {{ grant {key} zonesub ANY; }};`, Knot: an acl with `action: update`, PowerDNS: \
         `dnsupdate=yes` and TSIG-ALLOW-DNSUPDATE); PowerDNS says so as well when it does not know the key, or by \
         another secret"
    )]
    Refused {
        /// The zone.
        zone: String,
        /// The key's name.
        key: String,
    },
    /// The operator's: the wrong server.
    #[error(
        "the DNS server is not the primary of {zone} (NOTAUTH): set dns.server to the primary, and dns.zone to the zone \
         as it has it"
    )]
    NotPrimary {
        /// The zone.
        zone: String,
    },
    /// The operator's: the wrong zone.
    #[error("a name is outside of {zone} (NOTZONE): set dns.zone to the zone as the DNS server has it")]
    NotInZone {
        /// The zone.
        zone: String,
    },
    /// The server's.
    #[error(
        "the DNS server failed (SERVFAIL): its log says why; often it may not write the folder of the zone of {zone}"
    )]
    ServerFailed {
        /// The zone.
        zone: String,
    },
    /// The server's: it is none that takes updates.
    #[error(
        "the DNS server takes no updates (NOTIMP): dns.server must be one that does RFC 2136, such as BIND, Knot or PowerDNS"
    )]
    NoUpdates,
    /// Whoever answered does not have the key: not the server, or one that does not sign.
    #[error(
        "the answer is not signed with the key {key}, so it is not believed: either something between us and the DNS \
         server answers in its place, or the server does not do TSIG (RFC 8945)"
    )]
    NotSigned {
        /// The key's name.
        key: String,
    },
    /// Two who want one name.
    #[error(
        "the name {name} belongs to {}, and is left alone: choose another dns.name, or remove its records if nobody \
         needs them",
        owner.as_deref().map_or_else(|| "somebody who did not mark it".to_owned(), |owner| format!("the balancer {owner}"))
    )]
    Owned {
        /// The name.
        name: String,
        /// Whom its TXT record names.
        owner: Option<String>,
    },
    /// Nothing to say of this host.
    #[error("this host has no address that others could use; bring its network up, or set dns.addresses")]
    NoAddress,
    /// Something that no server should say.
    #[error(
        "the DNS server answered {code}, which makes no sense here; please report this with the server's version"
    )]
    Other {
        /// In words.
        code: String,
    },
    /// What came is no message of DNS.
    #[error(
        "the DNS server {server} answered with what is no DNS message; is dns.server a DNS server's address and port?"
    )]
    Garbled {
        /// Where.
        server: SocketAddr,
    },
}

impl UpdateError {
    /// What a response code says about an update.
    pub(crate) fn of(code: ResponseCode, zone: &str, key: &str) -> Self {
        let (zone, key) = (zone.to_owned(), key.to_owned());
        match code {
            ResponseCode::Refused => Self::Refused { zone, key },
            ResponseCode::NotAuth => Self::NotPrimary { zone },
            ResponseCode::NotZone => Self::NotInZone { zone },
            ResponseCode::ServFail => Self::ServerFailed { zone },
            ResponseCode::NotImp => Self::NoUpdates,
            code => Self::Other { code: code.to_str().to_owned() },
        }
    }

    /// One word for metrics, of a closed set.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Silent { .. } => "timeout",
            Self::BadKey { .. } => "bad_key",
            Self::BadSignature { .. } => "bad_signature",
            Self::BadTime => "bad_time",
            Self::Refused { .. } => "refused",
            Self::NotPrimary { .. } => "not_auth",
            Self::NotInZone { .. } => "not_zone",
            Self::ServerFailed { .. } => "servfail",
            Self::NoUpdates => "not_implemented",
            Self::NotSigned { .. } => "not_signed",
            Self::Owned { .. } => "owned",
            Self::NoAddress => "no_address",
            Self::Other { .. } | Self::Garbled { .. } => "other",
        }
    }
}
