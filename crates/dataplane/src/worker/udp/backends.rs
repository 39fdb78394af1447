//! What comes back from backends: answers and refusals.

use std::sync::Arc;

use allocation::ConnectFailure;
use flow::udp::{Refusal, Train, source_cid};
use flow::{CloseReason, Side};
use rustix::net::SendFlags;
use uring::{Completion, EnterError, Op, Part, Token};

use super::clients::{NotPlaced, Placed};
use super::sends::Destination;
use super::{CIDS_PER_FLOW, Learned, TRAINS_AFTER, Unarmed, Worker, is_refusal, lock};
use crate::io::Io;
use crate::stats::Dropped;

impl<I: Io> Worker<I> {
    pub(in super::super) fn answers_came(&mut self, completion: &Completion) -> Result<(), EnterError> {
        let Token { slot: index, .. } = completion.token;
        let current = self.udp.flows.generation(index).is_some_and(|g| completion.token.is_of(g));
        let open = self.udp.flows.is_open(index);
        let Some(flow) = self.udp.flows.get_mut(index).filter(|_| current) else {
            debug_assert!(false, "a flow outlives its receive: {completion:?}");
            self.release_of(completion);
            return Ok(());
        };
        let trains = flow.receiving_trains;
        let flow_moved_on = flow.receiving_attempt != flow.attempt;
        if !completion.more {
            flow.receiving = false;
        }
        if !open {
            self.release_of(completion);
            if !completion.more {
                self.udp.flows.remove(index);
            }
            return Ok(());
        }
        if !completion.more {
            let generation = self.udp.flows.generation(index).unwrap_or_default();
            self.udp.unarmed.push(Unarmed::Flow(index, generation));
        }
        if completion.result >= 0 && flow_moved_on {
            self.release_of(completion);
            return Ok(());
        }
        if completion.result >= 0 {
            return self.answer(index, completion, trains);
        }
        self.release_of(completion);
        let errno = -completion.result;
        if !is_refusal(errno) {
            self.receive_failed(errno);
            return Ok(());
        }
        if flow_moved_on { Ok(()) } else { self.refused(index, None) }
    }

    fn answer(&mut self, index: u32, completion: &Completion, trains: bool) -> Result<(), EnterError> {
        let (train, part) = match (completion.buffer, trains) {
            // An empty datagram takes no buffer where nothing else is told with it.
            (None, _) => (Train::received(0, 0), None),
            (Some(buffer), false) => {
                let length = completion.result as u32;
                (Train::received(length, 0), Some(Part { buffer, start: 0, length }))
            }
            (Some(buffer), true) => match self.ring.datagrams(buffer, completion.result) {
                Some(came) => {
                    let part = Part { buffer, start: came.start, length: came.length };
                    (Train::received(came.length, came.segment), Some(part))
                }
                None => {
                    self.ring.release(buffer);
                    return Ok(());
                }
            },
        };
        let now = self.now;
        let Some(flow) = self.udp.flows.get_mut(index) else { return Ok(()) };
        let Some(udp) = &self.listeners[usize::from(flow.listener)].udp else { return Ok(()) };
        if !flow.answered {
            flow.answered = true;
            self.udp.kept_bytes -= flow.forget_kept();
            if let Some(open) = &flow.open {
                open.reached();
                open.answered();
                let took = now.micros.saturating_sub(flow.asked_micros);
                open.first_byte_took(took, now.timestamp());
                if let Some(noted) = &mut flow.noted {
                    noted.first_byte(took);
                }
            }
        }
        let wants_trains = flow.wants_trains(self.udp.batch, &train);
        if udp.quic
            && flow.cids_learned < CIDS_PER_FLOW
            && let Some(part) = part
        {
            let packet = self.ring.bytes(part.buffer, part.start, part.length);
            if let Some(cid) = source_cid(packet).filter(|cid| flow.cid != Some(*cid))
                && let Some(open) = &flow.open
            {
                flow.cids_learned += 1;
                let mut cids = lock(&udp.shared.cids);
                if let Some(before) = flow.cid.replace(cid) {
                    cids.forget(&before, flow.id);
                }
                let (live, target) = (Arc::clone(open.live()), flow.routed.target);
                cids.learn(cid, Learned { address: flow.address, live, target }, flow.id);
            }
        }
        let answer = self.udp.flows.answered(index, train.datagrams(), now.timestamp(), &udp.tuning);
        self.queue_datagrams(index, Side::Client, train, part);
        if answer.over {
            self.over(index, CloseReason::Ended);
        } else if wants_trains {
            // The receive that is in flight would not tell datagrams of a train apart: the next one will.
            let token = self.udp_token(Op::Answers, index);
            self.ring.cancel(token)?;
        }
        Ok(())
    }

    /// A send failed because the backend had refused an earlier one: it did not go out.
    pub(super) fn send_refused(&mut self, id: u32, to: Destination) -> Result<(), EnterError> {
        let (.., releases) = self.send_of(id);
        let current =
            self.udp.flows.generation(to.flow) == Some(to.generation) && self.udp.flows.is_open(to.flow);
        if !current {
            return self.give_up(id, Dropped::Refused);
        }
        let of_this_backend = self.udp.flows.get(to.flow).is_some_and(|flow| flow.attempt == to.attempt);
        if of_this_backend && releases {
            return self.refused(to.flow, Some((id, to)));
        }
        if of_this_backend {
            self.refused(to.flow, None)?;
        }
        let went_out = self.was_resent(id, to);
        if went_out {
            self.superseded(id);
            Ok(())
        } else if releases {
            self.requeue(id, to.flow);
            Ok(())
        } else {
            // Its bytes are in a buffer of another send, which gives it back before this one could go out again.
            self.give_up(id, Dropped::Refused)
        }
    }

    /// Whether all that a send carries was kept and went to the flow's newer backend.
    fn was_resent(&self, id: u32, to: Destination) -> bool {
        let (train, ..) = self.send_of(id);
        let resent_below = self.udp.flows.get(to.flow).map_or(0, |flow| flow.resent_below);
        to.number.saturating_add(train.datagrams()) <= resent_below
    }

    /// The flow's backend refused a datagram. Another one is tried once, with what is still there of what the client said.
    fn refused(&mut self, index: u32, unsent: Option<(u32, Destination)>) -> Result<(), EnterError> {
        let now = self.now;
        let Some(flow) = self.udp.flows.get_mut(index) else { return Ok(()) };
        let listener = usize::from(flow.listener);
        let Some(tuning) = self.listeners[listener].udp.as_ref().map(|udp| udp.tuning) else { return Ok(()) };
        if let Some(open) = flow.open.take() {
            let moved = std::mem::take(&mut flow.moved);
            open.moved_bytes(u64::from(moved.to_client), u64::from(moved.to_backend));
            if let Some(noted) = &mut flow.noted {
                noted.moved(moved);
            }
            open.connect_failed(ConnectFailure::Refused, now.timestamp());
            flow.tried.push(Arc::clone(open.live()));
        }
        self.stats.listeners[listener].connect_retries.add(1);
        if self.udp.flows.refused(index, &tuning) == Refusal::Over {
            return self.refused_for_good(index, unsent);
        }
        let Some(flow) = self.udp.flows.get_mut(index) else { return Ok(()) };
        let (client, mut tried, old) = (flow.client(), std::mem::take(&mut flow.tried), flow.socket.take());
        let routed = flow.routed;
        let mut noted = flow.noted.take();
        let receiving = flow.receiving;
        if receiving {
            let token = self.udp_token(Op::Answers, index);
            self.ring.cancel(token)?;
        }
        if let Some(old) = old {
            self.ring.close(old)?;
        }
        let placed = self.place((listener, routed), client, &mut tried, tuning.retries, None, &mut noted);
        let Some(flow) = self.udp.flows.get_mut(index) else { return Ok(()) };
        flow.noted = noted;
        flow.tried = tried;
        let Placed { open, address, socket, .. } = match placed {
            Ok(placed) => placed,
            Err(why) => {
                if let NotPlaced::Local(shed) = why {
                    self.stats.listeners[listener].shed(shed);
                }
                if let Some((id, _)) = unsent {
                    self.give_up(id, Dropped::Refused)?;
                }
                self.over(index, CloseReason::ConnectFailed);
                return Ok(());
            }
        };
        open.opened();
        flow.attempt = flow.attempt.wrapping_add(1);
        flow.trains = false;
        flow.asked_micros = now.micros;
        flow.address = address;
        for (_, datagram) in &flow.kept {
            if let Err(error) =
                rustix::net::send(&socket, datagram, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            {
                tracing::debug!(%address, %error, "could not send a refused datagram to another backend");
                self.stats.listeners[listener].dropped(Dropped::Refused, 1);
            }
        }
        flow.resent_below = flow.kept.last().map_or(0, |(number, _)| number + 1);
        self.udp.kept_bytes -= flow.forget_kept();
        flow.open = Some(open);
        flow.socket = Some(socket);
        self.udp.flows.placed(index, now.timestamp(), &tuning);
        match unsent {
            Some((id, to)) if self.was_resent(id, to) => self.superseded(id),
            Some((id, _)) => self.requeue(id, index),
            None => {}
        }
        if receiving { Ok(()) } else { self.arm_flow(index) }
    }

    /// The flow is over. What could not be sent of an exchange that went well begins a new one: the backend was just restarted,
    /// or has left.
    fn refused_for_good(&mut self, index: u32, unsent: Option<(u32, Destination)>) -> Result<(), EnterError> {
        let Some(flow) = self.udp.flows.get_mut(index) else { return Ok(()) };
        let (answered, listener) = (flow.answered, usize::from(flow.listener));
        let came = flow.came();
        self.over(index, if answered { CloseReason::BackendReset } else { CloseReason::ConnectFailed });
        let generation = self.udp.flows.generation(index);
        let Some((id, _)) = unsent else { return Ok(()) };
        let (train, part, _) = self.send_of(id);
        let part = part.filter(|_| answered);
        let next = match part {
            Some(part) => self.flow_of(&came, train, part)?,
            None => None,
        };
        debug_assert_eq!(self.udp.flows.generation(index), generation, "it ends with the batch");
        match next {
            Some(next) => {
                let Some(udp) = &self.listeners[listener].udp else { return Ok(()) };
                self.udp.flows.asked(next, train.datagrams(), self.now.timestamp(), &udp.tuning);
                self.requeue(id, next);
                Ok(())
            }
            None => self.give_up(id, Dropped::Refused),
        }
    }
}

impl super::UdpFlow {
    /// Counts answers of one batch. True once, when they are many.
    fn wants_trains(&mut self, batch: u32, train: &Train) -> bool {
        if self.trains_wanted || train.bytes() < 256 {
            return false;
        }
        if self.burst.0 != batch {
            self.burst = (batch, 0);
        }
        self.burst.1 += 1;
        self.trains_wanted = self.burst.1 >= TRAINS_AFTER;
        self.trains_wanted && !self.receiving_trains && self.receiving
    }
}
