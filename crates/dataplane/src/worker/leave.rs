//! Orders from outside: draining and stopping.

use std::os::fd::AsFd;

use flow::{CloseReason, Input};
use rustix::net::SocketFlags;
use uring::{EnterError, Op, Token};

use super::Worker;
use crate::io::Io;

impl<I: Io> Worker<I> {
    pub(super) fn arm_bell(&mut self) -> Result<(), EnterError> {
        self.ring.poll_readable(self.shared.bell(self.worker).as_fd(), Token::new(Op::Wake, 0, 0))
    }

    pub(super) fn rung(&mut self) -> Result<(), EnterError> {
        let mut count = [0; 8];
        // Nonblocking; nothing to read means that an earlier ring was answered already.
        let _ = rustix::io::read(self.shared.bell(self.worker), &mut count);
        self.room.here = true;
        let orders = self.shared.orders();
        let was_leaving = self.leaving();
        if self.orders.drain_within != orders.drain_within {
            self.drain_deadline = orders.drain_within.map(|within| self.now.timestamp() + within);
        }
        self.orders = orders;
        if self.leaving() && !was_leaving {
            self.stop_accepting()?;
        }
        if orders.stop {
            self.abort_all()?;
        }
        self.arm_bell()
    }

    pub(super) fn leaving(&self) -> bool {
        self.orders.stop || self.orders.drain_within.is_some()
    }

    pub(super) fn stop_accepting(&mut self) -> Result<(), EnterError> {
        self.accept_again = None;
        for index in 0..self.listeners.len() {
            if self.listeners[index].udp.is_some() {
                continue; // They are closed with their last flow.
            }
            if self.listeners[index].armed {
                // Its last completion closes the listener.
                self.ring.cancel(Token::new(Op::Accept, index as u32, 0))?;
            } else {
                self.close_listener(index)?;
            }
        }
        Ok(())
    }

    /// Serves the connections that the kernel has already accepted, then closes: closing first would reset them.
    pub(super) fn close_listener(&mut self, index: usize) -> Result<(), EnterError> {
        let Some(socket) = self.listeners[index].socket.take() else { return Ok(()) };
        if !self.orders.stop {
            while let Ok(client) = rustix::net::accept_with(&socket, SocketFlags::CLOEXEC) {
                self.open_flow(index, client)?;
            }
        }
        self.ring.close(socket)
    }

    pub(super) fn abort_all(&mut self) -> Result<(), EnterError> {
        for index in self.flows.indexes() {
            self.drive(index, Input::Abort(CloseReason::Drained))?;
        }
        self.end_all_udp(CloseReason::Drained);
        Ok(())
    }
}
