//! The end of a flow.

use std::time::Duration;

use flow::CloseReason;
use rustix::net::sockopt;
use uring::EnterError;

use super::{FLOW_OPS, Worker, bit};
use crate::io::Io;
use crate::stats::Shed;

impl<I: Io> Worker<I> {
    pub(super) fn closed(
        &mut self,
        index: u32,
        reset_client: bool,
        reset_backend: bool,
        reason: CloseReason,
    ) -> Result<(), EnterError> {
        self.wheel.disarm(index);
        let now = self.now;
        let Some(slot) = self.flows.get_mut(index) else { return Ok(()) };
        let stats = &self.stats.listeners[usize::from(slot.listener)];
        if reason == CloseReason::ConnectFailed
            && let Some(shed) = slot.local_failure
        {
            stats.shed(shed);
        }
        stats.closed(reason);
        stats.flow_seconds.record(now.micros - slot.accepted_micros);
        slot.hand_over_moved();
        if let Some(open) = slot.open.take()
            && reason == CloseReason::BackendReset
        {
            if slot.answered { open.reset_after_answer() } else { open.reset_before_answer(now.timestamp()) }
        }
        slot.tried = Vec::new();
        // The flow ends one only that waited for too long.
        let shed = match (reason, slot.shed) {
            (CloseReason::Shed, None) => {
                stats.shed(Shed::QueueDeadline);
                Some(Shed::QueueDeadline)
            }
            (CloseReason::Shed, shed) => shed,
            (CloseReason::ConnectFailed | CloseReason::Exhausted, _) => slot.local_failure,
            _ => None,
        };
        for pipe in slot.pipes.take().into_iter().flat_map(|pipes| *pipes).flatten() {
            self.pipes.put(pipe);
        }
        self.leave_pool(index);
        self.log(index, reason, shed);
        let Some(slot) = self.flows.get_mut(index) else { return Ok(()) };
        let (listener, admitted) = (slot.listener, slot.admitted);
        let in_flight = slot.in_flight;
        let sockets = [(slot.client.take(), reset_client), (slot.backend.take(), reset_backend)];
        self.dismiss(listener, admitted);
        // What is in flight keeps its file open and would delay the FIN or RST. One by one, which the kernel finds at
        // once; to cancel all of a descriptor it would look at every flow's.
        for op in FLOW_OPS.into_iter().filter(|op| in_flight & bit(*op) != 0) {
            let token = self.token(op, index);
            self.ring.cancel(token)?;
        }
        for (socket, reset) in sockets {
            let Some(socket) = socket else { continue };
            if reset {
                // Without it close sends FIN, and the peer would take a torn stream for a whole one.
                let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
            }
            self.ring.close(socket)?;
        }
        Ok(())
    }
}
