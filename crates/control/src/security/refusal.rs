//! Why a peer was refused: for the peer as a status, for the operator as a count and a line in the log.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tonic::{Code, Status};

/// Why, as `trimtab_refusals_total` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Reason {
    /// The TLS handshake failed, by no certificate's fault: clear text to a TLS port, no common version, the peer
    /// refused our certificate.
    Handshake,
    /// It was not done in time.
    HandshakeTimeout,
    /// The peer's certificate is of another CA, or otherwise none.
    Certificate,
    /// The peer's certificate has expired.
    CertificateExpired,
    /// Neither a certificate nor a token.
    NoCredentials,
    /// A good certificate of somebody whom the configuration does not name.
    UnknownIdentity,
    /// No such token.
    Token,
    /// Its time is over.
    TokenExpired,
    /// As many joined by it as may.
    TokenUsedUp,
    /// An administrator took it back.
    TokenRevoked,
    /// Another role is needed.
    Role,
    /// Another pool.
    Pool,
    /// An id that it may not have, or that is somebody else's.
    Id,
    /// An address that is not its own.
    Address,
    /// Too many registrations a second.
    RegistrationRate,
    /// Too many reports a second on one stream.
    ReportRate,
    /// Too many streams of reports.
    Streams,
    /// Too many connections.
    Connections,
}

impl Reason {
    /// All of them, in the order of their discriminants.
    pub(crate) const ALL: [Self; 18] = [
        Self::Handshake,
        Self::HandshakeTimeout,
        Self::Certificate,
        Self::CertificateExpired,
        Self::NoCredentials,
        Self::UnknownIdentity,
        Self::Token,
        Self::TokenExpired,
        Self::TokenUsedUp,
        Self::TokenRevoked,
        Self::Role,
        Self::Pool,
        Self::Id,
        Self::Address,
        Self::RegistrationRate,
        Self::ReportRate,
        Self::Streams,
        Self::Connections,
    ];

    /// Its label.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::Certificate => "certificate",
            Self::CertificateExpired => "certificate_expired",
            Self::NoCredentials => "no_credentials",
            Self::UnknownIdentity => "unknown_identity",
            Self::Token => "token",
            Self::TokenExpired => "token_expired",
            Self::TokenUsedUp => "token_used_up",
            Self::TokenRevoked => "token_revoked",
            Self::Role => "role",
            Self::Pool => "pool",
            Self::Id => "id",
            Self::Address => "address",
            Self::RegistrationRate => "registration_rate",
            Self::ReportRate => "report_rate",
            Self::Streams => "streams",
            Self::Connections => "connections",
        }
    }

    /// Who they are is in doubt, what they may do, or how much: an agent tries the last again by itself soon.
    const fn code(self) -> Code {
        match self {
            Self::Handshake
            | Self::HandshakeTimeout
            | Self::Certificate
            | Self::CertificateExpired
            | Self::NoCredentials
            | Self::Token
            | Self::TokenExpired
            | Self::TokenRevoked => Code::Unauthenticated,
            Self::UnknownIdentity
            | Self::TokenUsedUp
            | Self::Role
            | Self::Pool
            | Self::Id
            | Self::Address => Code::PermissionDenied,
            Self::RegistrationRate | Self::ReportRate | Self::Streams | Self::Connections => {
                Code::ResourceExhausted
            }
        }
    }
}

/// A refusal, with what the peer is told. Never a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    pub(crate) fn status(&self) -> Status {
        Status::new(self.reason.code(), self.message.clone())
    }
}

/// How many of each.
#[derive(Debug, Default)]
pub(crate) struct Refusals([AtomicU64; Reason::ALL.len()]);

impl Refusals {
    pub(crate) fn count(&self, reason: Reason) {
        self.0[reason as usize].fetch_add(1, Relaxed);
    }

    pub(crate) fn by_reason(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Reason::ALL.into_iter().map(|reason| (reason.name(), self.0[reason as usize].load(Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_counter_and_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for (place, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
        }
        let refusals = Refusals::default();
        refusals.count(Reason::Connections);
        let counted: Vec<_> = refusals.by_reason().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [("connections", 1)]);
    }
}
