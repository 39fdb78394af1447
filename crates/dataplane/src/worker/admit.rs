//! Whether a new flow is let in, before anything is kept of it.
//!
//! The client is asked about first, so that one that comes too often does not use up what the listener has for all. Whoever is
//! turned away costs the worker a few loads, one `setsockopt` and the close: no slot, no line in any log, one count.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use allocation::Client;
use flow::limits::{ClientPlace, Clients, Meter, Rate, Refusal};
use rustix::net::sockopt;
use uring::EnterError;

use super::Worker;
use crate::config::ListenerLimits;
use crate::io::Io;
use crate::stats::Shed;

/// A listener's limits, shared by all workers.
#[derive(Debug)]
pub(crate) struct Gate {
    meter: Meter,
    clients: Option<Clients>,
}

/// A place behind a gate.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Admitted {
    client: Option<ClientPlace>,
}

impl Gate {
    /// `None`: nothing is limited.
    pub(crate) fn new(limits: &ListenerLimits, seed: u64) -> Option<Arc<Self>> {
        let ListenerLimits {
            flows,
            flows_per_client,
            new_flows_per_second,
            new_flows_per_client_per_second: rate_per_client,
        } = *limits;
        if *limits == ListenerLimits::default() {
            return None;
        }
        let per_client = flows_per_client > 0 || rate_per_client > 0;
        Some(Arc::new(Self {
            meter: Meter::new(flows, Rate::per_second(new_flows_per_second)),
            clients: per_client
                .then(|| Clients::new(flows_per_client, Rate::per_second(rate_per_client), seed)),
        }))
    }

    /// Whether it matters who comes.
    fn asks_who(&self) -> bool {
        self.clients.is_some()
    }

    fn open(&self, client: Option<SocketAddr>, now_micros: u64) -> Result<Admitted, Shed> {
        let Some(clients) = &self.clients else {
            self.meter.open(now_micros).map_err(of_listener)?;
            return Ok(Admitted { client: None });
        };
        // Who has reset its connection already would otherwise pass every limit, and still have a backend connected to.
        let client = Client::at(client.ok_or(Shed::ClientGone)?.ip());
        let place = clients.open(client, now_micros).map_err(of_client)?;
        self.meter.open(now_micros).map_err(|refusal| {
            clients.take_back(place);
            of_listener(refusal)
        })?;
        Ok(Admitted { client: Some(place) })
    }

    /// Somebody whom a header will name.
    fn open_unknown(&self, now_micros: u64) -> Result<Admitted, Shed> {
        self.meter.open(now_micros).map_err(of_listener)?;
        Ok(Admitted { client: None })
    }

    /// The header has come. Of a client that is refused the place is still to be given back.
    pub(super) fn identify(
        &self,
        admitted: &mut Admitted,
        client: Option<SocketAddr>,
        now_micros: u64,
    ) -> Result<(), Shed> {
        let Some(clients) = &self.clients else { return Ok(()) };
        let client = Client::at(client.ok_or(Shed::ClientGone)?.ip());
        admitted.client = Some(clients.open(client, now_micros).map_err(of_client)?);
        Ok(())
    }

    pub(super) fn close(&self, admitted: Admitted) {
        if let (Some(clients), Some(place)) = (&self.clients, admitted.client) {
            clients.close(place);
        }
        self.meter.close();
    }
}

fn of_client(refusal: Refusal) -> Shed {
    match refusal {
        Refusal::Flows => Shed::ClientFlows,
        Refusal::Rate => Shed::ClientRate,
    }
}

fn of_listener(refusal: Refusal) -> Shed {
    match refusal {
        Refusal::Flows => Shed::ListenerFlows,
        Refusal::Rate => Shed::ListenerRate,
    }
}

impl<I: Io> Worker<I> {
    /// Lets a client in, or turns it away; `peer` is asked for its address only where that matters.
    pub(super) fn admit(
        &self,
        listener: usize,
        peer: impl FnOnce() -> Option<SocketAddr>,
    ) -> Result<Admitted, Shed> {
        self.admit_by(listener, |gate| {
            let peer = if gate.asks_who() { peer() } else { None };
            gate.open(peer, self.now.micros)
        })
    }

    /// As [`Self::admit`], of a client whom a header will name.
    pub(super) fn admit_unknown(&self, listener: usize) -> Result<Admitted, Shed> {
        self.admit_by(listener, |gate| gate.open_unknown(self.now.micros))
    }

    fn admit_by(
        &self,
        listener: usize,
        open: impl FnOnce(&Gate) -> Result<Admitted, Shed>,
    ) -> Result<Admitted, Shed> {
        let gate = self.listeners[listener].gate.as_ref();
        let admitted = gate.map_or_else(|| Ok(Admitted::default()), |gate| open(gate))?;
        if self.shared.flows_open.fetch_add(1, Relaxed) >= self.flows_max {
            self.shared.flows_open.fetch_sub(1, Relaxed);
            if let Some(gate) = gate {
                gate.close(admitted);
            }
            return Err(Shed::Flows);
        }
        Ok(admitted)
    }

    /// Gives a flow's place back.
    pub(super) fn dismiss(&self, listener: u16, admitted: Admitted) {
        self.shared.flows_open.fetch_sub(1, Relaxed);
        if let Some(gate) = &self.listeners[usize::from(listener)].gate {
            gate.close(admitted);
        }
    }

    /// Resets a client of whom nothing is kept.
    pub(super) fn turn_away(
        &mut self,
        listener: usize,
        client: OwnedFd,
        shed: Shed,
    ) -> Result<(), EnterError> {
        self.stats.listeners[listener].shed(shed);
        let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO));
        self.ring.close(client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_cannot_use_up_what_is_for_all() {
        let limits = ListenerLimits {
            flows: 10,
            flows_per_client: 5,
            new_flows_per_second: 8,
            new_flows_per_client_per_second: 3,
        };
        let gate = Gate::new(&limits, 1).unwrap();
        let from = |n: u8| Some(SocketAddr::from(([10, 0, 0, n], 1)));
        let mut open = Vec::new();
        for _ in 0..100 {
            open.extend(gate.open(from(1), 0));
        }
        assert_eq!(open.len(), 3);
        assert_eq!(gate.open(from(1), 0).unwrap_err(), Shed::ClientRate);
        open.extend((2..7).map(|n| gate.open(from(n), 0).unwrap()));
        assert_eq!(gate.open(from(9), 0).unwrap_err(), Shed::ListenerRate);
        open.extend([gate.open(from(1), 10_000_000).unwrap(), gate.open(from(1), 10_000_000).unwrap()]);
        assert_eq!(gate.open(from(1), 20_000_000).unwrap_err(), Shed::ClientFlows);
        assert_eq!(gate.open(from(9), 20_000_000).unwrap_err(), Shed::ListenerFlows);
        assert_eq!(gate.open(None, 20_000_000).unwrap_err(), Shed::ClientGone);
        open.into_iter().for_each(|admitted| gate.close(admitted));
        assert!(gate.open(from(9), 20_000_000).is_ok());
        assert!(Gate::new(&ListenerLimits::default(), 1).is_none());
    }
}
