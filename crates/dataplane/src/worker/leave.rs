//! Orders from outside: draining and stopping.

use std::os::fd::AsFd;

use flow::{CloseReason, Input};
use rustix::net::SocketFlags;
use uring::{EnterError, Op, Token};

use super::Worker;
use super::accept::DoorAt;
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
        for at in self.doors() {
            if self.door(at).armed {
                // Its last completion closes it.
                self.ring.cancel(at.token())?;
            } else {
                self.close_door(at)?;
            }
        }
        Ok(())
    }

    /// Serves the connections that the kernel has already accepted, then closes: closing first would reset them.
    pub(super) fn close_door(&mut self, at: DoorAt) -> Result<(), EnterError> {
        let Some(socket) = self.door(at).socket.take() else { return Ok(()) };
        if !self.orders.stop {
            while let Ok(client) = rustix::net::accept_with(&socket, SocketFlags::CLOEXEC) {
                self.open_flow(at, client)?;
            }
        }
        self.ring.close(socket)
    }

    pub(super) fn abort_all(&mut self) -> Result<(), EnterError> {
        for index in self.flows.indexes() {
            self.drive(index, Input::Abort(CloseReason::Drained))?;
        }
        Ok(())
    }
}
