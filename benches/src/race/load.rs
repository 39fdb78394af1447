//! Clients: an open load, one connection for each request.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::scenario::Arrival;

/// A request that has no answer by then has failed.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Answered,
    TimedOut,
    Failed,
}

/// A request that is over. All in seconds after the start of the warm-up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    pub(super) due: f64,
    pub(super) sent: f64,
    pub(super) ended: f64,
    pub(super) outcome: Outcome,
}

impl Done {
    /// From when it was due; failures count as the whole time-out.
    pub(super) fn latency(&self) -> f64 {
        if self.outcome == Outcome::Answered { self.ended - self.due } else { TIMEOUT.as_secs_f64() }
    }
}

/// Sends everything when it is due, and waits until everything is over.
pub(super) async fn run(target: SocketAddr, arrivals: &[Arrival], started: Instant) -> Vec<Done> {
    let mut open = JoinSet::new();
    let mut done = Vec::with_capacity(arrivals.len());
    for arrival in arrivals {
        let due = started + Duration::from_secs_f64(arrival.due);
        // The timer wakes a millisecond late at most, in every window alike, and that counts as latency.
        sleep_until(due).await;
        let sent = Instant::now();
        let line = format!("{:.0}\n", arrival.work * 1e6);
        open.spawn(async move {
            let outcome = match timeout_at(due + TIMEOUT, request(target, line.as_bytes())).await {
                Ok(Ok(())) => Outcome::Answered,
                Ok(Err(_)) => Outcome::Failed,
                Err(_) => Outcome::TimedOut,
            };
            let after = |at: Instant| at.saturating_duration_since(started).as_secs_f64();
            Done { due: after(due), sent: after(sent), ended: after(Instant::now()), outcome }
        });
        while let Some(Ok(one)) = open.try_join_next() {
            done.push(one);
        }
    }
    while let Some(Ok(one)) = open.join_next().await {
        done.push(one);
    }
    done
}

async fn request(target: SocketAddr, line: &[u8]) -> io::Result<()> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    stream.write_all(line).await?;
    let mut answer = [0; 16];
    let mut have = 0;
    while !answer[..have].contains(&b'\n') {
        match stream.read(&mut answer[have..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => have += more,
        }
    }
    if &answer[..have] == b"done\n" { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
