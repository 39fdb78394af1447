//! Doing what a flow says.

use std::os::fd::{AsFd, BorrowedFd};

use allocation::Timestamp;
use flow::{Chunk, Input, Output, RecvEnd, Shot, Side};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{Shutdown, sockopt};
use uring::{EnterError, Group, Op, Token};

use super::slot::{FlowSlot, Nodelay};
use super::{BUFFERS_MORE, Worker, bit, readable_op, recv_op, send_op, watch_op, writable_op};
use crate::io::Io;
use crate::stats::ListenerStats;
use crate::tcp;

impl<I: Io> Worker<I> {
    pub(super) fn perform(&mut self, index: u32, output: Output) -> Result<(), EnterError> {
        match output {
            Output::Inspect => {
                self.inspect(index);
                Ok(())
            }
            Output::Connect => self.connect(index),
            Output::CancelConnect => {
                let asking = self.flows.get(index).is_some_and(FlowSlot::asks_for_tls);
                let token = self.token(if asking { Op::ReadableBackend } else { Op::Connect }, index);
                self.ring.cancel(token)
            }
            Output::Recv { from, shot } => self.recv(index, from, shot),
            Output::CancelRecv { from } => {
                if from == Side::Backend && self.take_waiting_recv(index).is_some() {
                    let why = RecvEnd::Cancelled;
                    self.followups.push_back(Input::RecvEnded { from, why });
                    return Ok(());
                }
                let token = self.token(recv_op(from), index);
                self.ring.cancel(token)
            }
            Output::AwaitBuffers { from } => {
                self.await_buffers(index, from);
                Ok(())
            }
            Output::Send { to, chunk: Chunk { buffer, start, length } } => {
                if to == Side::Backend {
                    self.before_send_to_backend(index);
                }
                self.submit(index, to, send_op(to), |ring, socket, token| {
                    ring.send(socket, buffer.0, start, length, token)
                })
            }
            Output::Splice { from } => {
                self.splice(index, from);
                Ok(())
            }
            Output::Unsplice { from } => {
                if let Some(pipe) = self.flows.get_mut(index).and_then(|slot| slot.pipe(from).take()) {
                    self.pipes.put(pipe);
                }
                Ok(())
            }
            Output::Fill { from } => {
                self.fill(index, from);
                Ok(())
            }
            Output::Flush { to } => {
                self.flush(index, to);
                Ok(())
            }
            Output::PollRead { from } => self.submit(index, from, readable_op(from), I::poll_readable),
            Output::PollWrite { to } => self.submit(index, to, writable_op(to), I::poll_writable),
            Output::Watch { from } => self.watch(index, from),
            Output::AskQuiet => {
                let since = self.quiet_since(index);
                self.followups.push_back(Input::Quiet { since });
                Ok(())
            }
            Output::Shutdown { to } => {
                self.shut_down(index, to);
                Ok(())
            }
            Output::Release(buffer) => {
                self.ring.release(buffer.0);
                Ok(())
            }
            Output::Closed { reset_client, reset_backend, reason } => {
                self.closed(index, reset_client, reset_backend, reason)
            }
        }
    }

    pub(super) fn recv(&mut self, index: u32, from: Side, shot: Shot) -> Result<(), EnterError> {
        if from == Side::Backend && self.recv_waits(index, shot) {
            return Ok(());
        }
        let group = match shot {
            Shot::Many => return self.submit(index, from, recv_op(from), I::recv_many),
            Shot::First => Group::First,
            Shot::Further => Group::Shared,
        };
        if self.ring.buffers_free(group) == 0 {
            self.ring.grow(group, BUFFERS_MORE);
        }
        self.submit(index, from, recv_op(from), |ring, socket, token| ring.recv_once(socket, group, token))
    }

    /// From the first time on that a side is not read, until the flow's end: a poll that waits for errors alone costs nothing while
    /// there is none, while to arm and to cancel it would cost twice for each buffer that a slow reader takes.
    fn watch(&mut self, index: u32, from: Side) -> Result<(), EnterError> {
        let is_watched = |slot: &FlowSlot| slot.in_flight & bit(watch_op(from)) != 0;
        if self.flows.get(index).is_none_or(|slot| is_watched(slot) || slot.said_all[from as usize]) {
            return Ok(());
        }
        self.submit(index, from, watch_op(from), I::poll_error)
    }

    /// When TCP last sent a byte to either side.
    fn quiet_since(&self, index: u32) -> Timestamp {
        let sockets = Side::BOTH.into_iter().filter_map(|side| self.socket(index, side));
        // Where it cannot be asked, the flow knows best.
        let quiet = sockets.filter_map(|socket| uring::sent_nothing_for(socket).ok()).min();
        let quiet = quiet.map_or(u64::MAX, |quiet| u64::try_from(quiet.as_millis()).unwrap_or(u64::MAX));
        Timestamp::from_millis(self.now.timestamp().as_millis().saturating_sub(quiet))
    }

    fn shut_down(&mut self, index: u32, to: Side) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        let Some(socket) = slot.socket(to) else { return };
        // After our FIN, the error no longer tells whether a reset came after theirs (`Worker::watch_input`). Who is received from
        // says by itself that it has ended.
        let said_all = slot.in_flight & bit(recv_op(to)) == 0 && fin_waits(socket);
        if to == Side::Backend {
            // Who sends FIN first keeps the port until all that was on its way is gone (`TIME_WAIT`, RFC 9293 3.6.1). Another
            // connection of ours may take it over (`Spent::bind_to_resting`).
            let _ = sockopt::set_socket_reuseaddr(socket, true);
        }
        // Fails when the peer has reset the connection, which its receive will say.
        let _ = rustix::net::shutdown(socket, Shutdown::Write);
        slot.said_all[to as usize] |= said_all;
    }

    /// A first segment is never held back; from the second on, Nagle's algorithm must be off. A flow of one request is
    /// spared the system call. (Client sockets inherit the option.)
    pub(super) fn before_send_to_backend(&mut self, index: u32) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        slot.nodelay = match (slot.nodelay, &slot.backend) {
            (Nodelay::NothingSent, _) => {
                slot.asked_micros = self.now.micros;
                Nodelay::SentOnce
            }
            (Nodelay::SentOnce, Some(socket)) => {
                // If it fails, the flow is slower and still right.
                let _ = sockopt::set_tcp_nodelay(socket, true);
                Nodelay::Set
            }
            (state, _) => state,
        };
    }

    /// The flow has lived for longer than a short one does: from now on a dead backend host must be noticed.
    /// (Client sockets inherit keepalive.)
    pub(super) fn settle(&mut self, index: u32) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        let towards = &self.listeners[usize::from(slot.listener)].targets[usize::from(slot.target)].towards;
        if let (Some(keepalive), Some(socket), false, true) =
            (towards.keepalive, &slot.backend, slot.settled, slot.flow.is_open())
        {
            slot.settled = true;
            // If it fails, a dead host is noticed late, by the idle timeout.
            tcp::set_keepalive(socket, keepalive).unwrap_or_else(|refused| towards.note(&refused));
        }
    }

    pub(super) fn submit(
        &mut self,
        index: u32,
        side: Side,
        op: Op,
        queue: impl FnOnce(&mut I, BorrowedFd<'_>, Token) -> Result<(), EnterError>,
    ) -> Result<(), EnterError> {
        let token = self.token(op, index);
        let Some(slot) = self.flows.get_mut(index) else { return Ok(()) };
        let socket = match side {
            Side::Client => &slot.client,
            Side::Backend => &slot.backend,
        };
        let Some(socket) = socket else { return Ok(()) };
        debug_assert_eq!(slot.in_flight & bit(op), 0, "one {op:?} at a time");
        slot.in_flight |= bit(op);
        queue(&mut self.ring, socket.as_fd(), token)
    }

    pub(super) fn socket(&self, index: u32, side: Side) -> Option<BorrowedFd<'_>> {
        self.flows.get(index)?.socket(side)
    }

    pub(super) fn token(&self, op: Op, index: u32) -> Token {
        Token::new(op, index, self.flows.generation(index).unwrap_or_default())
    }

    pub(super) fn listener_stats(&self, index: u32) -> Option<&ListenerStats> {
        let slot = self.flows.get(index)?;
        Some(&self.stats.listeners[usize::from(slot.listener)])
    }
}

/// Whether FIN has come, and no error: whatever is read from there until the end is all that was said.
fn fin_waits(socket: BorrowedFd<'_>) -> bool {
    let mut look = [PollFd::new(&socket, PollFlags::RDHUP)];
    let looked = rustix::event::poll(&mut look, Some(&Timespec::default()));
    let events = look[0].revents();
    looked.is_ok() && events.contains(PollFlags::RDHUP) && !events.contains(PollFlags::ERR)
}
