//! New flows.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use allocation::Timestamp;
use flow::Flow;
use flow::preface::Routed;
use uring::{Completion, EnterError, Op, Token};

use super::connect::local_failure;
use super::noted::Noted;
use super::preface::{Sorted, peer_address};
use super::slot::{Door, FlowSlot, Listener, Moved, Nodelay, Sources, Syn};
use super::{ACCEPT_REST, Worker};
use crate::io::Io;

/// Which door of which listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DoorAt {
    pub(super) listener: u16,
    pub(super) door: u16,
}

impl DoorAt {
    pub(super) const fn token(self) -> Token {
        self.token_for(Op::Accept)
    }

    pub(super) const fn token_for(self, op: Op) -> Token {
        Token::new(op, (self.door as u32) << 16 | self.listener as u32, 0)
    }

    pub(super) const fn of(token: Token) -> Self {
        Self { listener: token.slot as u16, door: (token.slot >> 16) as u16 }
    }
}

impl<I: Io> Worker<I> {
    pub(super) fn arm_accepts(&mut self) -> Result<(), EnterError> {
        self.accept_again = None;
        for at in self.doors() {
            self.arm_accept(at)?;
        }
        Ok(())
    }

    /// All where connections come in, open and closed.
    pub(super) fn doors(&self) -> Vec<DoorAt> {
        let doors = |(listener, of): (usize, &Listener)| {
            (0..of.doors.len()).map(move |door| DoorAt { listener: listener as u16, door: door as u16 })
        };
        self.listeners.iter().enumerate().filter(|(_, of)| of.udp.is_none()).flat_map(doors).collect()
    }

    pub(super) fn door(&mut self, at: DoorAt) -> &mut Door {
        &mut self.listeners[usize::from(at.listener)].doors[usize::from(at.door)]
    }

    pub(super) fn arm_accept(&mut self, at: DoorAt) -> Result<(), EnterError> {
        let door = &mut self.listeners[usize::from(at.listener)].doors[usize::from(at.door)];
        match &door.socket {
            Some(socket) if !door.armed => {
                door.armed = true;
                self.ring.accept(socket.as_fd(), at.token())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn accepted(&mut self, completion: Completion) -> Result<(), EnterError> {
        let at = DoorAt::of(completion.token);
        if let Some(socket) = completion.socket {
            self.accept_warned = false;
            self.open_flow(at, socket)?;
        }
        if completion.more {
            return Ok(());
        }
        self.door(at).armed = false;
        if self.leaving() {
            return self.close_door(at);
        }
        match local_failure(-completion.result) {
            Some(_) => {
                // The connections wait in the kernel's queue. Accepting at once would fail at once, for ever.
                self.accept_again = Some(self.now.timestamp() + ACCEPT_REST);
                if !std::mem::replace(&mut self.accept_warned, true) {
                    let error = io::Error::from_raw_os_error(-completion.result);
                    tracing::warn!(%error, "cannot accept; connections wait in the kernel until something is free");
                }
                Ok(())
            }
            None => self.arm_accept(at),
        }
    }

    pub(super) fn open_flow(&mut self, at: DoorAt, client: OwnedFd) -> Result<(), EnterError> {
        let listener = usize::from(at.listener);
        let sorted = match &self.listeners[listener].sorter {
            None => Sorted::To(Routed::DEFAULT),
            Some(sorter) => sorter.sort(&client, self.listeners[listener].doors[usize::from(at.door)].port),
        };
        let peer = || peer_address(client.as_fd());
        let admitted = match &sorted {
            Sorted::Not(shed) => Err(*shed),
            // Who the client is comes with its header.
            Sorted::Reading(preface) if preface.names_client() => self.admit_unknown(listener),
            _ => self.admit(listener, peer),
        };
        let admitted = match admitted {
            Ok(admitted) => admitted,
            Err(shed) => return self.turn_away(listener, client, shed),
        };
        let noted = self.access_log.as_ref().map(|_| Noted::new(peer()));
        let stats = &self.stats.listeners[listener];
        stats.opened.add(1);
        let now = self.now.timestamp();
        let mut outputs = std::mem::take(&mut self.outputs);
        let (routed, preface) = match sorted {
            Sorted::Reading(preface) => (Routed::DEFAULT, Some(preface)),
            Sorted::To(routed) => (routed, None),
            Sorted::Not(_) => (Routed::DEFAULT, None), // Turned away above.
        };
        if preface.is_none()
            && let Some(count) = stats.routed.get(usize::from(routed.target))
        {
            count.add(1);
        }
        let accept = if preface.is_some() { Flow::accepted_with_preface } else { Flow::accepted };
        let flow = accept(now, &self.tuning, &mut outputs);
        let index = self.flows.insert(FlowSlot {
            flow,
            listener: at.listener,
            target: routed.target,
            route: routed.route,
            in_flight: 0,
            awaits_room: [false; 2],
            said_all: [false; 2],
            answered: false,
            nodelay: Nodelay::NothingSent,
            settled: false,
            local_failure: None,
            shed: None,
            has_place: false,
            waits: false,
            waited_micros: 0,
            admitted,
            noted,
            client: Some(client),
            backend: None,
            pipes: None,
            open: None,
            sources: Sources::default(),
            syn: Syn::Plain,
            tried: Vec::new(),
            armed_for: Timestamp::NEVER,
            accepted_micros: self.now.micros,
            asked_micros: self.now.micros,
            moved: Moved::default(),
            preface,
        });
        for output in outputs.drain(..) {
            self.perform(index, output)?;
        }
        self.outputs = outputs;
        self.follow_deadline(index);
        match self.followups.pop_front() {
            Some(input) => self.drive(index, input),
            None => Ok(()),
        }
    }
}
