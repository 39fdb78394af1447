//! What completions mean to a flow.

use std::sync::Arc;

use allocation::ConnectFailure;
use flow::{BufferId, Chunk, Input, RecvEnd, Side};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::sockopt;
use uring::{Completion, EnterError, Group};

use super::connect::local_failure;
use super::slot::Syn;
use super::{MOVED_AT_MOST, Worker, bit, send_op, writable_op};
use crate::io::Io;
use crate::stats::Shed;

impl<I: Io> Worker<I> {
    pub(super) fn recv_input(&mut self, index: u32, from: Side, completion: &Completion) -> Option<Input> {
        if completion.result > 0
            && let Some(buffer) = completion.buffer
        {
            if from == Side::Backend {
                self.first_answer(index);
            }
            let chunk = Chunk { buffer: BufferId(buffer), start: 0, length: completion.result as u32 };
            return Some(Input::Received { from, chunk, armed: completion.more });
        }
        if let Some(buffer) = completion.buffer {
            self.ring.release(buffer);
        }
        let why = match -completion.result {
            0 if self.is_reset_at_eof(index, from) => RecvEnd::Reset,
            0 => RecvEnd::Eof,
            e if e == Errno::NOBUFS.raw_os_error() => {
                self.stats.buffer_waits.add(1);
                if self.shortages.found_none(self.ring.buffers_free(Group::Shared)) {
                    let double = self.ring.buffers(Group::Shared);
                    self.ring.grow(Group::Shared, double);
                }
                RecvEnd::NoBuffers
            }
            e if e == Errno::CANCELED.raw_os_error() => RecvEnd::Cancelled,
            // ECONNRESET, and what amounts to it: ETIMEDOUT (keepalive), EHOSTUNREACH, EPIPE.
            _ => RecvEnd::Reset,
        };
        Some(Input::RecvEnded { from, why })
    }

    /// Whether what looks like the end of a stream is a reset.
    ///
    /// A socket says its error once. If a send meets the peer's reset first, and its completion is still to be looked at, a
    /// receive or a splice finds nothing left and no error. A connection that was reset has no peer any more, while one whose peer
    /// has sent FIN has (`getpeername(2)`, ENOTCONN); and where we have sent FIN ourselves, no send is in flight.
    pub(super) fn is_reset_at_eof(&self, index: u32, from: Side) -> bool {
        let Some(slot) = self.flows.get(index) else { return false };
        slot.in_flight & bit(send_op(from)) != 0
            && self
                .socket(index, from)
                .is_some_and(|socket| rustix::net::getpeername(socket).err() == Some(Errno::NOTCONN))
    }

    pub(super) fn first_answer(&mut self, index: u32) {
        if let Some(slot) = self.flows.get_mut(index)
            && !slot.answered
        {
            slot.answered = true;
            if slot.syn == Syn::Sent {
                slot.syn = Syn::Plain;
                let target = &self.listeners[usize::from(slot.listener)].targets[usize::from(slot.target)];
                target.connected_early(slot.backend.as_ref());
            }
            if let Some(open) = &slot.open {
                open.answered();
                let took = self.now.micros.saturating_sub(slot.asked_micros);
                open.first_byte_took(took, self.now.timestamp());
                if let Some(noted) = &mut slot.noted {
                    noted.first_byte(took);
                }
            }
        }
    }

    pub(super) fn send_input(
        &mut self,
        index: u32,
        to: Side,
        result: i32,
    ) -> Result<Option<Input>, EnterError> {
        if result == -Errno::AGAIN.raw_os_error() && self.await_room(index, to)? {
            return Ok(None);
        }
        if result <= 0 {
            return Ok(Some(Input::SendFailed { to }));
        }
        self.count_bytes(index, to, result as u64);
        Ok(Some(Input::Sent { to, bytes: result as u32 }))
    }

    /// Waits for room for what is being sent; the flow need not know. `false`: it is closed, and nothing is waited for.
    fn await_room(&mut self, index: u32, to: Side) -> Result<bool, EnterError> {
        let Some(slot) = self.flows.get_mut(index).filter(|slot| !slot.flow.is_closed()) else {
            return Ok(false);
        };
        slot.awaits_room[to as usize] = true;
        if slot.in_flight & bit(writable_op(to)) == 0 {
            self.submit(index, to, writable_op(to), I::poll_writable)?;
        }
        Ok(true)
    }

    pub(super) fn writable_input(
        &mut self,
        index: u32,
        to: Side,
        completion: &Completion,
    ) -> Result<Option<Input>, EnterError> {
        let Some(slot) = self.flows.get_mut(index) else { return Ok(None) };
        let closed = slot.flow.is_closed();
        if !closed && is_fin_alone(completion.result) {
            if !completion.more {
                self.submit(index, to, writable_op(to), I::poll_room)?;
            }
            return Ok(None);
        }
        if completion.more {
            if !closed {
                // Its last completion says it, and nothing is left in flight then.
                let token = self.token(writable_op(to), index);
                self.ring.cancel(token)?;
            }
            return Ok(None);
        }
        let sends = std::mem::take(&mut slot.awaits_room[to as usize]);
        // Where the kernel has no memory to wait with, asking again would go on and on.
        let failed = completion.result < 0 && completion.result != -Errno::CANCELED.raw_os_error();
        // However it ended else, what follows finds out what is the matter: the rest is sent again, or spliced.
        Ok(Some(match (sends, failed) {
            (true, false) => Input::Sent { to, bytes: 0 },
            (true, true) => Input::SendFailed { to },
            (false, false) => Input::Writable { to },
            (false, true) => Input::Flushed { to, bytes: 0, failed: true },
        }))
    }

    /// What a poll for errors says of the side. A FIN is no reason to end anything, nor are two (`POLLHUP`): bytes may still wait
    /// before them.
    ///
    /// Nor is a reset after FIN. That says only that the side takes no more, which a send finds out; what it had said is all here, and
    /// may be on its way to a slow reader for long. It comes without anybody's doing wrong: who has closed is forgotten by its
    /// kernel after a minute (`tcp_fin_timeout`), and our next keepalive is answered by RST.
    pub(super) fn watch_input(&self, index: u32, from: Side, result: i32) -> Option<Input> {
        let events = PollFlags::from_bits_retain(u16::try_from(result).ok()?);
        if !events.contains(PollFlags::ERR) || self.flows.get(index)?.said_all[from as usize] {
            return None;
        }
        // It is taken from the receive that would be told. What follows on `Input::Reset` needs no receive to say so again, and after
        // FIN the kernel tells receives of that alone (`SOCK_DONE` in tcp_recvmsg_locked).
        match sockopt::socket_error(self.socket(index, from)?) {
            // RST after FIN: tcp_reset in net/ipv4/tcp_input.c.
            Ok(Err(Errno::PIPE)) => None,
            // A receive or a send was told before, and says so itself.
            Ok(Ok(())) => None,
            Ok(Err(_)) | Err(_) => Some(Input::Reset { from }),
        }
    }

    pub(super) fn count_bytes(&mut self, index: u32, to: Side, bytes: u64) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        let stats = &self.stats.listeners[usize::from(slot.listener)];
        // No completion and no splice is of 4 GiB.
        let moved = u32::try_from(bytes).unwrap_or(u32::MAX);
        match to {
            Side::Client => {
                stats.bytes_to_client.add(bytes);
                slot.moved.to_client = slot.moved.to_client.saturating_add(moved);
            }
            Side::Backend => {
                stats.bytes_to_backend.add(bytes);
                slot.moved.to_backend = slot.moved.to_backend.saturating_add(moved);
            }
        }
        if slot.moved.to_client.max(slot.moved.to_backend) >= MOVED_AT_MOST {
            slot.hand_over_moved();
        }
    }

    /// `None`: nothing to tell the flow yet, or ever.
    pub(super) fn connect_input(&mut self, index: u32, result: i32) -> Result<Option<Input>, EnterError> {
        let now = self.now;
        let Some(slot) = self.flows.get_mut(index).filter(|slot| !slot.flow.is_closed()) else {
            return Ok(None);
        };
        if result == 0 {
            let stats = &self.stats.listeners[usize::from(slot.listener)];
            let took = now.micros - slot.asked_micros;
            stats.connect_seconds.record(took);
            if let Some(open) = &slot.open {
                open.connected();
                open.connect_took(took);
            }
            if let Some(noted) = &mut slot.noted {
                noted.connected(took);
            }
            slot.asked_micros = now.micros;
            slot.local_failure = None;
            return self.greet(index);
        }
        let shed = local_failure(-result);
        if shed == Some(Shed::Ports) && self.connect_from_another(index)? {
            // Where that failed at once.
            return Ok(self.followups.pop_front());
        }
        self.count_failed_connect(index, shed.ok_or_else(|| failure_of(result)));
        Ok(Some(Input::ConnectFailed))
    }

    /// The backend takes the client's bytes.
    pub(super) fn connected(&mut self, index: u32) -> Option<Input> {
        self.flows.get_mut(index)?.tried = Vec::new();
        Some(Input::Connected)
    }

    /// A connect failed for want of something of ours, or through the backend.
    pub(super) fn count_failed_connect(&mut self, index: u32, why: Result<Shed, ConnectFailure>) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        self.stats.listeners[usize::from(slot.listener)].connect_retries.add(1);
        slot.local_failure = why.ok();
        if let Some(open) = slot.open.take() {
            if let Err(failure) = why {
                open.connect_failed(failure, self.now.timestamp());
            }
            slot.tried.push(Arc::clone(open.live()));
            self.made_room(index);
        }
    }
}

/// Whether a poll for room found none, and ended because the peer's FIN has come.
fn is_fin_alone(result: i32) -> bool {
    let Ok(events) = u16::try_from(result) else { return false };
    let events = PollFlags::from_bits_retain(events);
    events.contains(PollFlags::RDHUP) && !events.intersects(PollFlags::OUT | PollFlags::ERR | PollFlags::HUP)
}

/// Why a connect failed, by its negated errno.
pub(super) fn failure_of(result: i32) -> ConnectFailure {
    // Our time is over, or the kernel's (its retries, TCP_USER_TIMEOUT).
    let timed_out = [Errno::CANCELED, Errno::TIMEDOUT].map(|e| e.raw_os_error()).contains(&-result);
    if timed_out { ConnectFailure::TimedOut } else { ConnectFailure::Refused }
}
