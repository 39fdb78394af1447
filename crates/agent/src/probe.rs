//! Answers a balancer's probes (`proto/trimtab/control/v1/probe.proto`): one UDP datagram there, one back.
//!
//! What an answer says, and how good it is:
//!
//! - `in_flight`: the TCP connections that are established to the service's address at this moment (see
//!   [`Connections`]), from whomever they come; or the utilization file's `in_flight`. A connection that idles in a
//!   client's pool counts as much as one that works: an application that knows better says so in the file. It has to
//!   where the kernel's count is not of the service: it speaks UDP, or runs in another network namespace, or behind
//!   an address translation. Where neither is known, probes are not answered: a 0 would draw load.
//! - `latency_micros`: the utilization file's `latency_ms`; or how long the agent's own check takes to connect to the
//!   service, smoothed over some ten checks. The kernel completes a connection before the service takes it, so this
//!   says that a host is overloaded or a backlog full, and little about queries. 0 without a check.
//! - `ready`: the service answers, as far as the last check knows.
//!
//! A reading serves for [`FRESH`], and for 20 times as long as it took: with very many connections it gets older and
//! never costs more than a twentieth of a CPU. The work is bounded: one socket, [`DATAGRAMS_PER_WINDOW`], no
//! allocation for a datagram; what comes faster waits in the socket's buffer, where the kernel drops what is too much.
//! Nobody is asked who he is: whoever reaches the port learns these three numbers. No answer is longer than its
//! request, so a forged sender gains nothing.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api::v1::{ProbeRequest, ProbeResponse};
use prost::Message;
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

use crate::agent::Common;
use crate::connections::Connections;
use crate::said::Said;

/// How long one reading serves. Between two readings come the connections of 20 ms, which a probe's answer is behind
/// anyway by the time that its balancer acts on it.
const FRESH: Duration = Duration::from_millis(20);
/// A reading serves for so many times as long as it took.
const FRESH_PER_COST: u32 = 20;
/// 50,000 datagrams a second, in portions that keep reports waiting for a few milliseconds at most.
const WINDOW: Duration = Duration::from_millis(10);
const DATAGRAMS_PER_WINDOW: u32 = 500;
/// A request is 48 bytes long; more is for those that a later balancer may send. Longer ones are cut and not understood.
const REQUEST_BYTES_MAX: usize = 512;
/// An answer is at most this long.
const RESPONSE_BYTES_MAX: usize = 48;
/// After the socket failed: never a loop without a breath.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// Answers probes at `socket` for ever.
pub(crate) async fn answer(socket: UdpSocket, service: SocketAddr, common: Arc<Common>) -> Infallible {
    let mut gauge = Gauge::new(service, common);
    let mut pace = Pace { end: Instant::now(), left: 0 };
    let mut troubles = Said::default();
    let mut datagram = [0; REQUEST_BYTES_MAX];
    let mut request = ProbeRequest::default();
    let mut response = Vec::with_capacity(RESPONSE_BYTES_MAX);
    loop {
        pace.turn().await;
        let (length, from) = match socket.recv_from(&mut datagram).await {
            Ok(received) => received,
            Err(error) => {
                if troubles.is_new(&error.to_string()) {
                    warn!(%error, "probes cannot be received; trying on");
                }
                sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        request.clear();
        if length == 0 || request.merge(&datagram[..length]).is_err() {
            continue;
        }
        let Some(answer) = gauge.answer(request.nonce) else { continue };
        response.clear();
        if answer.encoded_len() > length || answer.encode(&mut response).is_err() {
            continue;
        }
        match socket.try_send_to(&response, from) {
            Ok(_) => {}
            // The balancer takes a lost answer for one that is late.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => debug!(%from, %error, "a probe's answer was not sent"),
        }
    }
}

/// How many datagrams are taken, by time.
struct Pace {
    /// Of the window.
    end: Instant,
    left: u32,
}

impl Pace {
    /// Returns when one more may be taken.
    async fn turn(&mut self) {
        if self.left == 0 {
            sleep_until(self.end).await;
        }
        let now = Instant::now();
        if now >= self.end {
            *self = Self { end: now + WINDOW, left: DATAGRAMS_PER_WINDOW };
        }
        self.left -= 1;
    }
}

/// What is answered, as of not long ago.
struct Gauge {
    common: Arc<Common>,
    connections: Connections,
    in_flight: Option<u32>,
    latency_micros: u32,
    fresh_until: Option<Instant>,
    /// What was last said about a count that cannot be had.
    said: Option<String>,
}

impl Gauge {
    fn new(service: SocketAddr, common: Arc<Common>) -> Self {
        let connections = Connections::of(service);
        Self { common, connections, in_flight: None, latency_micros: 0, fresh_until: None, said: None }
    }

    /// `None`: what is in flight is not known.
    fn answer(&mut self, nonce: u64) -> Option<ProbeResponse> {
        let now = Instant::now();
        if self.fresh_until.is_none_or(|until| now >= until) {
            self.read();
            let done = Instant::now();
            self.fresh_until = Some(done + FRESH.max((done - now) * FRESH_PER_COST));
        }
        Some(ProbeResponse {
            nonce,
            in_flight: self.in_flight?,
            latency_micros: self.latency_micros,
            ready: self.common.service.borrow().answers(),
        })
    }

    fn read(&mut self) {
        let file = self.common.file.read();
        let in_flight = match file.in_flight {
            Some(count) => Ok(count),
            None => self.connections.count(&self.common.config.roots.proc),
        };
        let error = in_flight.as_ref().err().cloned();
        if error != self.said {
            match &error {
                Some(why) => warn!(why, "connections cannot be counted: probes are not answered"),
                None => info!("connections can be counted again: probes are answered"),
            }
            self.said = error;
        }
        self.in_flight = in_flight.ok();
        // Too long for the answer's field is more than an hour.
        let stated = file.latency_ms.map(|ms| (ms * 1000.0).round() as u32);
        self.latency_micros = stated.unwrap_or_else(|| self.common.connect_time.micros());
    }
}
