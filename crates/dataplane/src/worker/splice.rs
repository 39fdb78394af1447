//! Halves whose bytes stay in the kernel.

use flow::{FillEnd, Input, Side};

use super::Worker;
use crate::io::Io;

impl<I: Io> Worker<I> {
    pub(super) fn splice(&mut self, index: u32, from: Side) {
        // splice(2) waits on a blocking socket whatever its flags say.
        let nonblocking = Side::BOTH.into_iter().all(|side| {
            self.socket(index, side).is_some_and(|socket| rustix::io::ioctl_fionbio(socket, true).is_ok())
        });
        let pipe = if nonblocking { self.pipes.take() } else { None };
        match (self.flows.get_mut(index), pipe) {
            (Some(slot), Some(pipe)) => *slot.pipe(from) = Some(pipe),
            _ => self.followups.push_back(Input::SpliceRefused { from }),
        }
    }

    pub(super) fn fill(&mut self, index: u32, from: Side) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        let (socket, pipe) = slot.socket_and_pipe(from, from);
        // No pipe: it was refused a moment ago, and the flow is told so next.
        if let (Some(socket), Some(pipe)) = (socket, pipe) {
            let (bytes, mut end) = pipe.fill(socket);
            if end == FillEnd::Eof && self.is_reset_at_eof(index, from) {
                end = FillEnd::Reset;
            }
            self.followups.push_back(Input::Filled { from, bytes, end });
            if from == Side::Backend && bytes > 0 {
                self.first_answer(index);
            }
        }
    }

    pub(super) fn flush(&mut self, index: u32, to: Side) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        let (socket, pipe) = slot.socket_and_pipe(to, to.opposite());
        if let (Some(socket), Some(pipe)) = (socket, pipe) {
            let (bytes, failed) = pipe.flush(socket);
            self.followups.push_back(Input::Flushed { to, bytes, failed });
            self.stats.spliced_bytes.add(u64::from(bytes));
            self.count_bytes(index, to, u64::from(bytes));
        }
    }
}
