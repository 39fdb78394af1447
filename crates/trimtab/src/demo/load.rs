//! The demo's gentle load: many short connections, a few long ones. Who served each, the service itself says.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// One new short connection each.
const SHORT_EVERY: Duration = Duration::from_millis(10);
/// A short connection is a few lines with a thought between them: some 20 are open at once, as in a pool that is in
/// use.
const SHORT_LINES: usize = 3;
const SHORT_PAUSE: Duration = Duration::from_millis(60);
/// If services get so slow that more are open, the rest is not opened: the load stays gentle.
const SHORT_OPEN_MAX: usize = 100;
/// A connection that takes longer has failed.
const SHORT_TIMEOUT: Duration = Duration::from_secs(5);
const LONG_FLOWS: usize = 6;
const LONG_LINES: usize = 20;
const LONG_PAUSE: Duration = Duration::from_secs(1);

/// What was done since the last look.
#[derive(Debug, Clone, Default)]
pub(super) struct Served {
    /// New connections, by the name that the service gave.
    pub(super) by_name: BTreeMap<String, u64>,
    /// New connections that nobody answered.
    pub(super) failed: u64,
    /// Connections that ended in the middle: who served them left.
    pub(super) cut: u64,
}

/// The load's counts, shared with its tasks.
#[derive(Debug, Clone, Default)]
pub(super) struct Load {
    served: Arc<Mutex<Served>>,
}

impl Load {
    /// Starts connecting to `address`, on the runtime of the caller, for as long as it runs.
    pub(super) fn start(address: SocketAddr) -> Self {
        let load = Self::default();
        tokio::spawn(load.clone().short_flows(address));
        for _ in 0..LONG_FLOWS {
            tokio::spawn(load.clone().long_flows(address));
        }
        load
    }

    /// What was done since this was asked last.
    pub(super) fn take(&self) -> Served {
        std::mem::take(&mut *self.served.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn short_flows(self, address: SocketAddr) {
        let open = Arc::new(Semaphore::new(SHORT_OPEN_MAX));
        let mut tick = interval(SHORT_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tick.tick().await;
            let Ok(permit) = Arc::clone(&open).try_acquire_owned() else { continue };
            let load = self.clone();
            tokio::spawn(async move {
                let done = timeout(SHORT_TIMEOUT, load.flow(address, SHORT_LINES, SHORT_PAUSE)).await;
                if done.is_err() {
                    load.count(|served| served.cut += 1);
                }
                drop(permit);
            });
        }
    }

    async fn long_flows(self, address: SocketAddr) {
        loop {
            self.flow(address, LONG_LINES, LONG_PAUSE).await;
            sleep(LONG_PAUSE).await;
        }
    }

    fn count(&self, change: impl FnOnce(&mut Served)) {
        change(&mut self.served.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Connects, hears who is there, has each line echoed, and counts how that went.
    async fn flow(&self, address: SocketAddr, lines: usize, pause: Duration) {
        let (mut stream, name) = match hear_name(address).await {
            Ok(heard) => heard,
            Err(error) => {
                tracing::debug!("a new connection failed: {error}");
                return self.count(|served| served.failed += 1);
            }
        };
        self.count(|served| *served.by_name.entry(name).or_default() += 1);
        for _ in 0..lines {
            let mut echo = [0; 5];
            let answered = match stream.write_all(b"ping\n").await {
                Ok(()) => stream.read_exact(&mut echo).await,
                Err(error) => Err(error),
            };
            if answered.is_err() {
                return self.count(|served| served.cut += 1);
            }
            sleep(pause).await;
        }
    }
}

async fn hear_name(address: SocketAddr) -> io::Result<(BufReader<TcpStream>, String)> {
    let mut stream = BufReader::new(TcpStream::connect(address).await?);
    let mut hello = String::new();
    // What answers is not ours if a user put something else there: take no more than a line can be.
    (&mut stream).take(128).read_line(&mut hello).await?;
    let name = hello.trim_end().strip_prefix("hello from ");
    let name = name.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?.to_owned();
    Ok((stream, name))
}
