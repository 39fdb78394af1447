//! Timers, and receives that wait for buffers.

use allocation::Timestamp;
use flow::{Input, Side};
use uring::{EnterError, Group};

use super::{BUFFERS_MORE, Worker};
use crate::io::Io;

impl<I: Io> Worker<I> {
    pub(super) fn expire(&mut self) -> Result<(), EnterError> {
        let now = self.now.timestamp();
        let mut expired = std::mem::take(&mut self.expired);
        self.wheel.advance(now, &mut expired);
        for index in expired.drain(..) {
            if let Some(slot) = self.flows.get_mut(index) {
                slot.armed_for = Timestamp::NEVER;
                self.settle(index);
                self.drive(index, Input::Deadline)?;
            }
        }
        self.expired = expired;
        if self.accept_again.is_some_and(|at| at <= now) {
            self.arm_accepts()?;
        }
        self.expire_udp()?;
        if self.drain_deadline.is_some_and(|at| at <= now) {
            self.drain_deadline = None;
            self.abort_all()?;
            self.finish_datagrams()?;
        }
        Ok(())
    }

    pub(super) fn await_buffers(&mut self, index: u32, from: Side) {
        let flows = &self.flows;
        // Flows that ended while they waited leave their entry behind; there are two for each flow at most that are not.
        if self.buffer_waits.len() > 2 * flows.len() + 64 {
            self.buffer_waits.retain(|(index, generation, _)| flows.generation(*index) == Some(*generation));
        }
        let generation = flows.generation(index).unwrap_or_default();
        self.buffer_waits.push_back((index, generation, from));
    }

    /// Lets receives that found no buffer try again: with new buffers while there may be more, else as buffers return.
    pub(super) fn serve_buffer_waits(&mut self) -> Result<(), EnterError> {
        if self.buffer_waits.is_empty() {
            return Ok(());
        }
        let mut may_try = self.ring.buffers_free(Group::First) as usize;
        if may_try < self.buffer_waits.len() {
            may_try += self.ring.grow(Group::First, BUFFERS_MORE) as usize;
        }
        for _ in 0..may_try.min(self.buffer_waits.len()) {
            let Some((index, generation, from)) = self.buffer_waits.pop_front() else { break };
            if self.flows.generation(index) == Some(generation) {
                self.drive(index, Input::BuffersBack { from })?;
            }
        }
        Ok(())
    }
}
