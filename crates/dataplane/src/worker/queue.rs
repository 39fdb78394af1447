//! Places in a pool, and flows that wait for one.
//!
//! Each worker has a queue for each of its targets, and in it the order of arrival; between workers, the heads of queues
//! compete. How many wait is bounded over all of them. A queue is looked at when room may have been made: a flow of this worker
//! ended or failed to connect, another worker rang (its flow ended), or a table was published. Between those nobody looks.

use std::collections::VecDeque;

use allocation::Timestamp;
use flow::{CloseReason, Input};
use uring::EnterError;

use super::Worker;
use crate::io::Io;
use crate::slots::Slots;
use crate::stats::Shed;

use super::slot::FlowSlot;

/// Entries of flows that have gone, beyond one for each that waits, before they are thrown out.
const GONE_MAX: usize = 64;

/// Where room may have been made since queues were last served.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Room {
    /// Queues of this worker are to be looked at.
    pub(super) here: bool,
    /// Other workers are to be told.
    pub(super) elsewhere: bool,
}

/// A target's flows that wait, oldest first: slot and generation. Those that have left are still in it, until they are met.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: VecDeque<(u32, u32)>,
    /// Of them, those that wait.
    waiting: usize,
}

impl Queue {
    fn push(&mut self, index: u32, flows: &Slots<FlowSlot>) {
        if self.entries.len() > 2 * self.waiting + GONE_MAX {
            self.entries.retain(|entry| waits(flows, *entry));
        }
        self.entries.push_back((index, flows.generation(index).unwrap_or_default()));
        self.waiting += 1;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting == 0
    }
}

fn waits(flows: &Slots<FlowSlot>, (index, generation): (u32, u32)) -> bool {
    flows.generation(index) == Some(generation) && flows.get(index).is_some_and(|slot| slot.waits)
}

impl<I: Io> Worker<I> {
    /// Takes a place in the flow's pool; where there is none, or others wait already, the flow waits or is shed, and it is
    /// `false`.
    pub(super) fn take_place(&mut self, index: u32) -> bool {
        let Some(slot) = self.flows.get_mut(index) else { return false };
        let target = &self.listeners[usize::from(slot.listener)].targets[usize::from(slot.target)];
        let Some(share) = &target.share else { return true };
        // One that waits and asks has its turn.
        let is_behind = !slot.waits && !target.queue.is_empty();
        if slot.has_place || (!is_behind && share.budget().open()) {
            slot.has_place = true;
            return true;
        }
        self.wait_for_room(index);
        false
    }

    /// Lets the flow wait for room, or sheds it where it may not. `false`: its pool has no queue, and the flow still has its
    /// place.
    pub(super) fn wait_for_room(&mut self, index: u32) -> bool {
        let Some(slot) = self.flows.get_mut(index) else { return false };
        let stats = &self.stats.listeners[usize::from(slot.listener)];
        let target = &mut self.listeners[usize::from(slot.listener)].targets[usize::from(slot.target)];
        let Some(share) = &target.share else { return false };
        let Some(queue) = share.queue() else {
            if slot.has_place {
                return false;
            }
            slot.shed = Some(Shed::PoolFlows);
            stats.shed(Shed::PoolFlows);
            self.followups.push_back(Input::Abort(CloseReason::Shed));
            return true;
        };
        if std::mem::take(&mut slot.has_place) {
            share.budget().close();
        }
        let until = Timestamp::from_millis(slot.accepted_micros / 1_000) + queue.deadline;
        if slot.waits {
            // It had its turn and somebody else was faster. It is still the first.
            self.followups.push_back(Input::Queued { until });
        } else if share.queued().open() {
            slot.waits = true;
            stats.queued.add(1);
            stats.waiting.set(stats.waiting.read() + 1);
            share.wait(self.worker);
            target.queue.push(index, &self.flows);
            self.room.here = true;
            self.followups.push_back(Input::Queued { until });
        } else {
            slot.shed = Some(Shed::QueueFull);
            stats.shed(Shed::QueueFull);
            self.followups.push_back(Input::Abort(CloseReason::Shed));
        }
        true
    }

    /// The flow waits no more, if it did: it has a backend, or has ended.
    pub(super) fn leave_queue(&mut self, index: u32) {
        let Some(slot) = self.flows.get_mut(index) else { return };
        if !std::mem::take(&mut slot.waits) {
            return;
        }
        slot.waited_micros = self.now.micros.saturating_sub(slot.accepted_micros);
        let stats = &self.stats.listeners[usize::from(slot.listener)];
        stats.waiting.set(stats.waiting.read().saturating_sub(1));
        let target = &mut self.listeners[usize::from(slot.listener)].targets[usize::from(slot.target)];
        target.queue.waiting -= 1;
        let Some(share) = target.share.clone() else { return };
        share.queued().close();
        let others = self.listeners.iter().flat_map(|listener| &listener.targets).any(|target| {
            !target.queue.is_empty() && target.share.as_ref().is_some_and(|s| s.is_same(&share))
        });
        if !others {
            share.wait_no_more(self.worker);
        }
    }

    /// The flow has ended: its place is free.
    pub(super) fn leave_pool(&mut self, index: u32) {
        self.leave_queue(index);
        let Some(slot) = self.flows.get_mut(index) else { return };
        let target = &self.listeners[usize::from(slot.listener)].targets[usize::from(slot.target)];
        let Some(share) = &target.share else { return };
        if std::mem::take(&mut slot.has_place) {
            share.budget().close();
        }
        self.made_room(index);
    }

    /// A flow has left its backend, or its pool.
    pub(super) fn made_room(&mut self, index: u32) {
        let Some(slot) = self.flows.get(index) else { return };
        let target = &self.listeners[usize::from(slot.listener)].targets[usize::from(slot.target)];
        if target.share.as_ref().is_some_and(|share| share.queue().is_some()) {
            self.room = Room { here: true, elsewhere: true };
        }
    }

    /// Gives those that wait their turn, where room may have been made.
    pub(super) fn serve_queues(&mut self) -> Result<(), EnterError> {
        // A turn may end in an error that makes room again; each takes a flow out of a queue.
        while std::mem::take(&mut self.room.here) {
            for listener in 0..self.listeners.len() {
                for target in 0..self.listeners[listener].targets.len() {
                    self.serve_queue(listener, target)?;
                }
            }
        }
        if std::mem::take(&mut self.room.elsewhere) {
            let targets = self.listeners.iter().flat_map(|listener| &listener.targets);
            for share in targets.filter_map(|target| target.share.as_ref()) {
                let others = |worker| {
                    if worker != self.worker {
                        self.shared.ring(worker);
                    }
                };
                share.room(others);
            }
        }
        Ok(())
    }

    fn serve_queue(&mut self, listener: usize, target: usize) -> Result<(), EnterError> {
        while let Some(&entry) = self.listeners[listener].targets[target].queue.entries.front() {
            if waits(&self.flows, entry) {
                self.drive(entry.0, Input::Room)?;
                if waits(&self.flows, entry) {
                    return Ok(());
                }
            }
            self.listeners[listener].targets[target].queue.entries.pop_front();
        }
        Ok(())
    }
}
