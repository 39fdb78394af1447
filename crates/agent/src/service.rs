//! Whether the resource's own service answers.
//!
//! One task for all balancers, one connection at a time, apart from reporting: a service that hangs delays no report.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

use crate::said::Said;

/// Timeouts in a row that count as silence. A lost SYN is sent again after a second, which is as long as a check takes
/// by default: one alone says more about the network than about the service.
const TIMEOUTS_MAX: u32 = 2;

/// What the last check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Service {
    /// There was no check yet.
    Unknown,
    /// It accepts connections.
    Answers,
    /// It does not, for this reason.
    Silent(String),
}

impl Service {
    pub(crate) fn answers(&self) -> bool {
        *self == Self::Answers
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("was not checked yet"),
            Self::Answers => f.write_str("answers"),
            Self::Silent(why) => write!(f, "does not answer: {why}"),
        }
    }
}

/// How long connecting to the service takes lately: each check moves it by an eighth, as TCP does with its round trips
/// (RFC 6298).
#[derive(Debug, Default)]
pub(crate) struct ConnectTime {
    /// In eighths of a microsecond; 0: not known. Only the check writes it.
    eighths: AtomicU64,
}

impl ConnectTime {
    fn took(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX / 8).clamp(1, u64::MAX / 8);
        let was = self.eighths.load(Ordering::Relaxed);
        let now = if was == 0 { micros * 8 } else { was - was / 8 + micros };
        self.eighths.store(now, Ordering::Relaxed);
    }

    /// In microseconds; 0: not known.
    pub(crate) fn micros(&self) -> u32 {
        u32::try_from(self.eighths.load(Ordering::Relaxed).div_ceil(8)).unwrap_or(u32::MAX)
    }
}

/// Checks at each interval for ever, publishes what changed, and says it.
pub(crate) async fn check(
    address: SocketAddr,
    patience: Duration,
    interval: Duration,
    found: watch::Sender<Service>,
    connect_time: &ConnectTime,
) -> Infallible {
    let mut timeouts = 0;
    let mut troubles = Said::default();
    loop {
        let start = Instant::now();
        let service = match timeout(patience, TcpStream::connect(address)).await {
            // Dropped at once: closed in good order, with nothing sent.
            Ok(Ok(_connection)) => {
                connect_time.took(start.elapsed());
                Some(Service::Answers)
            }
            Ok(Err(error)) => Some(Service::Silent(error.to_string())),
            Err(_) if timeouts + 1 < TIMEOUTS_MAX && found.borrow().answers() => None,
            Err(_) => Some(Service::Silent(format!("no connection within {patience:?}"))),
        };
        timeouts = if matches!(service, Some(Service::Answers)) { 0 } else { timeouts + 1 };
        if let Some(service) = service {
            found.send_if_modified(|was| {
                let changed = *was != service;
                if changed {
                    say(address, &service, &mut troubles);
                }
                *was = service;
                changed
            });
        }
        sleep_until(start + interval).await;
    }
}

/// Each trouble once until the service answers.
fn say(address: SocketAddr, service: &Service, troubles: &mut Said) {
    match service {
        Service::Unknown => {}
        Service::Answers => {
            troubles.forget();
            info!(%address, "the service answers");
        }
        Service::Silent(why) => {
            if troubles.is_new(why) {
                warn!(%address, why, "the service does not answer: until it does it is not registered, or not ready");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn a_connect_time_follows_slowly() {
        let time = ConnectTime::default();
        assert_eq!(time.micros(), 0);
        time.took(Duration::from_nanos(10));
        assert_eq!(time.micros(), 1);
        let time = ConnectTime::default();
        time.took(Duration::from_millis(8));
        assert_eq!(time.micros(), 8000);
        time.took(Duration::from_millis(16));
        assert_eq!(time.micros(), 9000);
        for _ in 0..100 {
            time.took(Duration::MAX);
        }
        assert_eq!(time.micros(), u32::MAX);
    }

    #[tokio::test]
    async fn a_service_that_comes_and_goes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, mut service) = watch::channel(Service::Unknown);
        let interval = Duration::from_millis(10);
        let task = tokio::spawn(async move {
            check(address, Duration::from_secs(1), interval, sender, &ConnectTime::default()).await
        });
        let deadline = Duration::from_secs(10);

        timeout(deadline, service.wait_for(Service::answers)).await.unwrap().unwrap();
        drop(listener);
        let silent = timeout(deadline, service.wait_for(|s| !s.answers())).await.unwrap().unwrap().clone();
        assert!(silent.to_string().starts_with("does not answer: Connection refused"), "{silent}");
        let _again = TcpListener::bind(address).await.unwrap();
        timeout(deadline, service.wait_for(Service::answers)).await.unwrap().unwrap();
        task.abort();
    }
}
