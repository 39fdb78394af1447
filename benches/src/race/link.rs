//! What the process of the load and that of the backends tell each other: JSON lines over a connection, whose end is
//! also the end of the backends.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Longest wait for any answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// From the load.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Register at a balancer and report there; without one, answer agent checks alone.
    Join(Option<SocketAddr>),
    /// The warm-up begins now.
    Go,
    /// The window begins: forget what was counted.
    Window,
    /// Say what was counted.
    Finish,
}

/// From the backends.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// Where they serve, and where each answers agent checks.
    Listening { backends: Vec<SocketAddr>, agents: Vec<SocketAddr> },
    /// Done.
    Done,
    /// What was counted in the window.
    Account(Account),
}

/// What the backends counted.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Account {
    pub(super) served: Vec<u64>,
    /// The part of its slots that each had busy.
    pub(super) busy: Vec<f64>,
    /// How much later than it should a request ended because the process did not get to it, in seconds.
    pub(super) late_p99: f64,
    pub(super) reports_accepted: u64,
    pub(super) reports_refused: u64,
    pub(super) agent_checks: u64,
    /// The weight of each in percent that the last agent check got, or would have got.
    pub(super) agent_percent: Vec<u32>,
}

/// The load's end.
#[derive(Debug)]
pub(super) struct Link {
    stream: BufReader<TcpStream>,
}

impl Link {
    /// Waits for the backends to connect, for as long as they live.
    pub(super) fn accept(
        listener: &TcpListener,
        mut lives: impl FnMut() -> io::Result<()>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(PATIENCE))?;
                    return Ok(Self { stream: BufReader::new(stream) });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                    lives()?;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) fn order(&mut self, order: &Order) -> io::Result<Answer> {
        let line = serde_json::to_string(order)? + "\n";
        self.stream.get_mut().write_all(line.as_bytes())?;
        self.answer()
    }

    pub(super) fn answer(&mut self) -> io::Result<Answer> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the backends ended"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}
