//! Sending: datagrams that came together go out together.

use std::os::fd::AsFd;
use std::sync::Arc;

use flow::Side;
use flow::udp::{TRAIN_BYTES_MAX, Train};
use rustix::io::Errno;
use uring::{Completion, EnterError, Op, Part, Token};

use super::super::MOVED_AT_MOST;
use super::{Worker, is_refusal};
use crate::io::Io;
use crate::stats::Dropped;

/// No send.
pub(super) const NONE: u32 = u32::MAX;

/// Sends that are put together or on their way.
#[derive(Debug, Default)]
pub(super) struct Sends {
    /// Kept with their memory when they are done.
    all: Vec<SendSlot>,
    free: Vec<u32>,
    /// In the order in which they are to go out at the end of the batch.
    queued: Vec<u32>,
    /// This kernel, or the device, cuts no trains (`EIO`).
    no_trains: bool,
}

#[derive(Debug)]
struct SendSlot {
    to: Destination,
    train: Train,
    parts: Vec<Part>,
    /// What goes before each of its datagrams.
    header: Option<Arc<[u8]>>,
    /// Its buffers are given back with it. Of several sends out of the same buffers only the last one does.
    releases: bool,
    /// Buffers of sends before it, which are given back with it.
    also: Vec<u16>,
}

/// Whose a send is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Destination {
    pub(super) flow: u32,
    pub(super) generation: u32,
    pub(super) listener: u16,
    pub(super) attempt: u8,
    pub(super) side: Side,
    /// The number of its first datagram among those of the flow's client.
    pub(super) number: u32,
}

impl Sends {
    pub(super) fn is_empty(&self) -> bool {
        self.all.len() == self.free.len()
    }

    fn begin(&mut self, to: Destination, train: Train, part: Option<Part>, releases: bool) -> u32 {
        let id = self.free.pop().unwrap_or_else(|| {
            let (parts, also) = (Vec::new(), Vec::new());
            self.all.push(SendSlot { to, train, parts, header: None, releases, also });
            (self.all.len() - 1) as u32
        });
        let send = &mut self.all[id as usize];
        (send.to, send.train, send.releases) = (to, train, releases);
        send.parts.clear();
        send.parts.extend(part);
        id
    }

    /// Adds to a send that is not on its way, if it can go out with it.
    fn join(&mut self, id: u32, train: &Train, part: Part, header: Option<&Arc<[u8]>>) -> bool {
        let send = &mut self.all[id as usize];
        let joins = !self.no_trains
            && match (&send.header, header) {
                (None, None) => send.train.join(train),
                (Some(before), Some(header)) => {
                    Arc::ptr_eq(before, header) && send.train.join_headed(train, header.len() as u32)
                }
                _ => false,
            };
        if joins {
            send.parts.push(part);
        }
        joins
    }
}

impl<I: Io> Worker<I> {
    /// Puts what was received into the next send of the flow to that side.
    pub(super) fn queue_datagrams(&mut self, index: u32, side: Side, train: Train, part: Option<Part>) {
        let generation = self.udp.flows.generation(index).unwrap_or_default();
        let number = self.udp.flows.requests(index).wrapping_sub(train.datagrams());
        let Some(flow) = self.udp.flows.get_mut(index) else { return };
        let building = flow.building[side as usize];
        let header = flow.heading.as_ref().filter(|_| side == Side::Backend).map(|heading| &heading.bytes);
        if let Some(part) = part
            && building != NONE
            && !flow.no_trains[side as usize]
            && self.udp.sends.join(building, &train, part, header)
        {
            return;
        }
        let (listener, attempt) = (flow.listener, flow.attempt);
        let to = Destination { flow: index, generation, listener, attempt, side, number };
        let id = self.udp.sends.begin(to, train, part, true);
        self.udp.sends.all[id as usize].header = header.cloned();
        flow.building[side as usize] = id;
        self.udp.sends.queued.push(id);
    }

    /// Sends what the batch put together.
    pub(super) fn send_queued(&mut self) -> Result<(), EnterError> {
        if self.udp.sends.queued.is_empty() {
            return Ok(());
        }
        let mut queued = std::mem::take(&mut self.udp.sends.queued);
        for id in queued.drain(..) {
            self.send_one(id)?;
        }
        self.udp.sends.queued = queued;
        Ok(())
    }

    fn send_one(&mut self, id: u32) -> Result<(), EnterError> {
        let SendSlot { to, train, header, .. } = &self.udp.sends.all[id as usize];
        let (to, train, header) = (*to, *train, header.clone());
        let current = self.udp.flows.generation(to.flow) == Some(to.generation);
        let Some(flow) = self.udp.flows.get_mut(to.flow).filter(|_| current) else {
            return self.give_up(id, Dropped::Refused);
        };
        flow.building[to.side as usize] = NONE;
        if train.datagrams() > 1 && (self.udp.sends.no_trains || flow.no_trains[to.side as usize]) {
            return self.send_singly(id);
        }
        if let Some(header) = header {
            return self.send_headed(id, to, train, &header);
        }
        let (socket, route) = match to.side {
            Side::Backend => (flow.socket.as_ref(), (None, None)),
            Side::Client => (
                self.listeners[usize::from(to.listener)].doors[usize::from(flow.door)].socket.as_ref(),
                (Some(&flow.peer), flow.local),
            ),
        };
        let Some(socket) = socket else { return self.give_up(id, Dropped::Refused) };
        let parts = &self.udp.sends.all[id as usize].parts;
        let token = Token::new(Op::SendDatagrams, id, 0);
        self.ring.send_datagrams(socket.as_fd(), route, parts, train.segment(), token)
    }

    /// Sends it to the flow's backend with a header before each datagram.
    fn send_headed(
        &mut self,
        id: u32,
        to: Destination,
        train: Train,
        header: &[u8],
    ) -> Result<(), EnterError> {
        if train.datagrams() > 1 && train.bytes_headed(header.len() as u32) > TRAIN_BYTES_MAX {
            return self.send_singly(id);
        }
        let socket = self.udp.flows.get(to.flow).and_then(|flow| flow.socket.as_ref());
        let Some(socket) = socket else { return self.give_up(id, Dropped::Refused) };
        let parts = &self.udp.sends.all[id as usize].parts;
        let token = Token::new(Op::SendDatagrams, id, 0);
        self.ring.send_headed(socket.as_fd(), header, parts, train.segment(), token)
    }

    /// Sends the datagrams of a train one by one: nobody cuts it for us. They go out in order, so the last one to complete has
    /// the buffers.
    fn send_singly(&mut self, id: u32) -> Result<(), EnterError> {
        let send = &mut self.udp.sends.all[id as usize];
        let (to, train, releases) = (send.to, send.train, send.releases);
        let (parts, header) = (std::mem::take(&mut send.parts), send.header.clone());
        let pieces: Vec<Part> = uring::cut(&parts, train.segment()).collect();
        let Some((last, before)) = pieces.split_last() else { return self.give_up(id, Dropped::Refused) };
        for (number, piece) in (to.number..).zip(before) {
            let to = Destination { number, ..to };
            let single = self.udp.sends.begin(to, Train::received(piece.length, 0), Some(*piece), false);
            self.udp.sends.all[single as usize].header.clone_from(&header);
            self.send_one(single)?;
        }
        let to = Destination { number: to.number + before.len() as u32, ..to };
        let single = self.udp.sends.begin(to, Train::received(last.length, 0), Some(*last), releases);
        let others = parts.iter().map(|part| part.buffer).filter(|buffer| releases && *buffer != last.buffer);
        self.udp.sends.all[single as usize].also.extend(others);
        self.udp.sends.all[single as usize].header = header;
        self.free_send(id);
        self.send_one(single)
    }

    /// A send is done, one way or another.
    pub(in super::super) fn sent(&mut self, completion: &Completion) -> Result<(), EnterError> {
        let id = completion.token.slot;
        let SendSlot { to, train, .. } = &self.udp.sends.all[id as usize];
        let (to, train) = (*to, *train);
        if completion.result >= 0 {
            self.count_sent(to, train);
            self.release_send(id);
            return Ok(());
        }
        let errno = -completion.result;
        let is = |error: Errno| error.raw_os_error() == errno;
        if is_refusal(errno) && to.side == Side::Backend {
            return self.send_refused(id, to);
        }
        if train.datagrams() > 1 && (is(Errno::INVAL) || is(Errno::MSGSIZE) || is(Errno::IO)) {
            // EINVAL: its datagrams are longer than the path takes in one piece. EIO: nobody computes checksums for it.
            if is(Errno::IO) {
                self.udp.sends.no_trains = true;
                tracing::warn!(
                    "the network device cuts no trains of datagrams (EIO); they go out one by one"
                );
            } else if self.udp.flows.generation(to.flow) == Some(to.generation)
                && let Some(flow) = self.udp.flows.get_mut(to.flow)
            {
                flow.no_trains[to.side as usize] = true;
            }
            return if self.udp.flows.generation(to.flow) == Some(to.generation) {
                self.send_singly(id)
            } else {
                self.give_up(id, Dropped::Refused)
            };
        }
        let why = match () {
            () if is(Errno::AGAIN) || is(Errno::NOBUFS) || is(Errno::NOMEM) => Dropped::SendBuffer,
            () if is(Errno::MSGSIZE) => Dropped::TooLarge,
            () => Dropped::Unreachable,
        };
        self.give_up(id, why)
    }

    /// A send comes to another flow or attempt, and goes out again at the end of the batch.
    pub(super) fn requeue(&mut self, id: u32, index: u32) {
        let generation = self.udp.flows.generation(index).unwrap_or_default();
        let Some(flow) = self.udp.flows.get(index) else { return };
        let send = &mut self.udp.sends.all[id as usize];
        if send.to.flow != index || send.to.generation != generation {
            send.header = flow.heading.as_ref().map(|heading| Arc::clone(&heading.bytes));
        }
        send.to = Destination { flow: index, generation, attempt: flow.attempt, ..send.to };
        self.udp.sends.queued.push(id);
    }

    /// What it carries, its first part, and whether its buffers are its own.
    pub(super) fn send_of(&self, id: u32) -> (Train, Option<Part>, bool) {
        let send = &self.udp.sends.all[id as usize];
        (send.train, send.parts.first().copied(), send.releases)
    }

    /// Its datagrams went out otherwise.
    pub(super) fn superseded(&mut self, id: u32) {
        self.release_send(id);
    }

    /// It does not go out.
    pub(super) fn give_up(&mut self, id: u32, why: Dropped) -> Result<(), EnterError> {
        let SendSlot { to, train, .. } = &self.udp.sends.all[id as usize];
        self.dropped(usize::from(to.listener), why, train.datagrams());
        self.release_send(id);
        Ok(())
    }

    fn release_send(&mut self, id: u32) {
        let send = &self.udp.sends.all[id as usize];
        if send.releases {
            let own = send.parts.iter().map(|part| part.buffer);
            own.chain(send.also.iter().copied()).for_each(|buffer| self.ring.release(buffer));
        }
        self.free_send(id);
    }

    fn free_send(&mut self, id: u32) {
        let send = &mut self.udp.sends.all[id as usize];
        send.parts.clear();
        send.also.clear();
        send.header = None;
        self.udp.sends.free.push(id);
    }

    fn count_sent(&mut self, to: Destination, train: Train) {
        let stats = &self.stats.listeners[usize::from(to.listener)];
        let (bytes, datagrams) = (u64::from(train.bytes()), u64::from(train.datagrams()));
        match to.side {
            Side::Client => {
                stats.bytes_to_client.add(bytes);
                stats.datagrams_to_client.add(datagrams);
            }
            Side::Backend => {
                stats.bytes_to_backend.add(bytes);
                stats.datagrams_to_backend.add(datagrams);
            }
        }
        if self.udp.flows.generation(to.flow) != Some(to.generation) {
            return;
        }
        let Some(flow) = self.udp.flows.get_mut(to.flow) else { return };
        let moved = match to.side {
            Side::Client => &mut flow.moved.to_client,
            Side::Backend => &mut flow.moved.to_backend,
        };
        *moved = moved.saturating_add(train.bytes());
        if *moved >= MOVED_AT_MOST {
            flow.hand_over_moved();
        }
    }
}
