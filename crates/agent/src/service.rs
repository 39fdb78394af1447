//! Whether the resource's own service answers.
//!
//! One task for all balancers, one connection at a time, apart from reporting: a service that hangs delays no report.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
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

/// Checks at each interval for ever, publishes what changed, and says it.
pub(crate) async fn check(
    address: SocketAddr,
    patience: Duration,
    interval: Duration,
    found: watch::Sender<Service>,
) -> Infallible {
    let mut timeouts = 0;
    let mut troubles = Said::default();
    loop {
        let start = Instant::now();
        let service = match timeout(patience, TcpStream::connect(address)).await {
            // Dropped at once: closed in good order, with nothing sent.
            Ok(Ok(_connection)) => Some(Service::Answers),
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

    #[tokio::test]
    async fn a_service_that_comes_and_goes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, mut service) = watch::channel(Service::Unknown);
        let interval = Duration::from_millis(10);
        let task = tokio::spawn(check(address, Duration::from_secs(1), interval, sender));
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
