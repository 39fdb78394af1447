//! What moves the bytes: which engines there are, which of them work here, and which one is taken.

use std::fmt;

use uring::{Ring, Setup, SetupError};

pub(crate) use epoll::Epoll;
pub use probe::ProbeError;
pub(crate) use tokio_uring::TokioUring;

use crate::run::StartError;

mod aside;
#[cfg(test)]
mod contract;
mod epoll;
mod probe;
mod readiness;
mod tokio_uring;

/// What moves the bytes. One worker's code runs over each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Engine {
    /// Our own io_uring loop: multishot operations, buffer rings. Linux 6.1 or newer.
    Uring,
    /// io_uring by crate `tokio-uring`, one completion for each operation. Linux 5.11 or newer.
    TokioUring,
    /// `epoll(7)`, where io_uring is denied.
    Epoll,
}

impl Engine {
    /// All of them, the best first.
    pub const ALL: [Self; 3] = [Self::Uring, Self::TokioUring, Self::Epoll];

    /// Its name in configurations, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uring => "uring",
            Self::TokioUring => "tokio-uring",
            Self::Epoll => "epoll",
        }
    }

    /// Whether it works here, by a loopback round trip with all that flows need of it.
    ///
    /// # Errors
    /// Why not, and what would have to change.
    pub fn probe(self) -> Result<(), ProbeError> {
        // As many submissions as a worker has: what there is no memory for should show here.
        let submissions = crate::worker::SUBMISSIONS;
        let setup = Setup {
            submissions,
            shared: 8,
            shared_max: 8,
            first_max: 8,
            buffer_bytes: 4_096,
            datagrams_max: 8,
            datagram_bytes: 4_096,
        };
        match self {
            Self::Uring => probe::probe::<Ring>(setup),
            Self::TokioUring => probe::probe::<TokioUring>(setup),
            Self::Epoll => probe::probe::<Epoll>(setup),
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why an engine was taken. A closed set: each is a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It was named.
    Configured,
    /// It is the best, and works.
    Probed,
    /// A better one may not be used: a seccomp profile or a sysctl.
    UringForbidden,
    /// The kernel, or a sandbox, has no io_uring.
    UringMissing,
    /// The kernel's io_uring lacks what the better one needs.
    UringTooOld,
    /// There is no memory for the better one's ring.
    UringMemory,
    /// The better one is there, and does not do what it should.
    UringBroken,
    /// The better one cannot be made for some other reason, which the log has.
    UringFailed,
}

impl Reason {
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::Probed => "probed",
            Self::UringForbidden => "uring_forbidden",
            Self::UringMissing => "uring_missing",
            Self::UringTooOld => "uring_too_old",
            Self::UringMemory => "uring_memory",
            Self::UringBroken => "uring_broken",
            Self::UringFailed => "uring_failed",
        }
    }

    const fn not(better: &ProbeError) -> Self {
        match better {
            ProbeError::Setup(SetupError::Forbidden) => Self::UringForbidden,
            ProbeError::Setup(SetupError::Missing) => Self::UringMissing,
            ProbeError::Setup(SetupError::TooOld { .. }) => Self::UringTooOld,
            ProbeError::Setup(SetupError::Memory { .. }) => Self::UringMemory,
            ProbeError::Broken { .. } | ProbeError::Stuck { .. } => Self::UringBroken,
            _ => Self::UringFailed,
        }
    }
}

/// The engine that was taken, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) engine: Engine,
    pub(crate) reason: Reason,
}

/// Takes the engine that is named, or else the best that works here; says in the log which and why.
pub(crate) fn choose(named: Option<Engine>) -> Result<Chosen, StartError> {
    let chosen = match named {
        Some(engine) => {
            engine.probe().map_err(|source| StartError::Engine { engine, source })?;
            Chosen { engine, reason: Reason::Configured }
        }
        None => best()?,
    };
    tracing::info!(engine = chosen.engine.name(), reason = chosen.reason.label(), "engine chosen");
    Ok(chosen)
}

/// The best that works of those behind the one for which there is no memory; `None`: it was named, or is the last.
pub(crate) fn next_best(named: Option<Engine>, without_memory: Chosen) -> Option<Chosen> {
    let reason = match without_memory.reason {
        Reason::Probed => Reason::UringMemory,
        earlier => earlier,
    };
    let behind = Engine::ALL.into_iter().skip_while(|engine| *engine != without_memory.engine).skip(1);
    let next = behind.into_iter().find(|engine| engine.probe().is_ok());
    next.filter(|_| named.is_none()).map(|engine| Chosen { engine, reason })
}

fn best() -> Result<Chosen, StartError> {
    let mut reason = Reason::Probed;
    let mut last = None;
    for engine in Engine::ALL {
        match engine.probe() {
            Ok(()) => return Ok(Chosen { engine, reason }),
            Err(source) => {
                tracing::warn!(engine = engine.name(), why = %source, "this engine does not work here; trying the next");
                // What the best one lacks is what an operator can change.
                if last.is_none() {
                    reason = Reason::not(&source);
                }
                last = Some(StartError::Engine { engine, source });
            }
        }
    }
    Err(last.unwrap_or_else(|| std::io::Error::other("there is no engine").into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_engine_works_here() {
        for engine in Engine::ALL {
            engine.probe().unwrap_or_else(|error| panic!("{engine}: {error}"));
        }
        let best = best().unwrap();
        assert_eq!(best, Chosen { engine: Engine::Uring, reason: Reason::Probed });
        let second = next_best(None, best).unwrap();
        assert_eq!(second, Chosen { engine: Engine::TokioUring, reason: Reason::UringMemory });
        assert_eq!(next_best(None, second), Some(Chosen { engine: Engine::Epoll, ..second }));
        assert_eq!(next_best(None, Chosen { engine: Engine::Epoll, ..second }), None);
        assert_eq!(next_best(Some(Engine::Uring), best), None, "it was named");
    }
}
