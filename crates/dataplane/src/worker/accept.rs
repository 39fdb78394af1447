//! New flows.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use allocation::Timestamp;
use flow::Flow;
use uring::{Completion, EnterError, Op, Token};

use super::connect::{client_address, local_failure};
use super::noted::Noted;
use super::slot::{FlowSlot, Moved, Nodelay, Sources, Syn};
use super::{ACCEPT_REST, Worker};
use crate::io::Io;

impl<I: Io> Worker<I> {
    pub(super) fn arm_accepts(&mut self) -> Result<(), EnterError> {
        self.accept_again = None;
        for index in 0..self.listeners.len() {
            self.arm_accept(index)?;
        }
        Ok(())
    }

    pub(super) fn arm_accept(&mut self, index: usize) -> Result<(), EnterError> {
        let listener = &mut self.listeners[index];
        match &listener.socket {
            Some(socket) if !listener.armed && listener.udp.is_none() => {
                listener.armed = true;
                self.ring.accept(socket.as_fd(), Token::new(Op::Accept, index as u32, 0))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn accepted(&mut self, completion: Completion) -> Result<(), EnterError> {
        let index = completion.token.slot as usize;
        if let Some(socket) = completion.socket {
            self.accept_warned = false;
            self.open_flow(index, socket)?;
        }
        if completion.more {
            return Ok(());
        }
        self.listeners[index].armed = false;
        if self.leaving() {
            return self.close_listener(index);
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
            None => self.arm_accept(index),
        }
    }

    pub(super) fn open_flow(&mut self, listener: usize, client: OwnedFd) -> Result<(), EnterError> {
        let admitted = match self.admit(listener, || client_address(Some(&client))) {
            Ok(admitted) => admitted,
            Err(shed) => return self.turn_away(listener, client, shed),
        };
        let noted = self.access_log.as_ref().map(|_| Noted::new(client_address(Some(&client))));
        let stats = &self.stats.listeners[listener];
        stats.opened.add(1);
        let now = self.now.timestamp();
        let mut outputs = std::mem::take(&mut self.outputs);
        let flow = Flow::accepted(now, &self.tuning, &mut outputs);
        let index = self.flows.insert(FlowSlot {
            flow,
            listener: listener as u16,
            target: 0,
            in_flight: 0,
            awaits_room: [false; 2],
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
