//! What a ring's polls cannot wait for, where they complete once: an epoll instance beside the ring, which is polled by it.
//!
//! io_uring wakes every poll when the peer's FIN comes, and a FIN that has come stays: a poll for room, or for an error alone,
//! is over as soon as it is submitted. `epoll(7)` can leave `EPOLLRDHUP` out.
//!
//! Owns: the instance, and who waits for which descriptor. Does not own the descriptors: who waits is cancelled before one is
//! closed. Each is registered edge-triggered while somebody waits for it, so that what stays as it is wakes nobody twice.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasherDefault;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use uring::{Lent, Token};

use super::readiness::Mix;

/// Events that are taken at once; what is left is there at the next look.
const EVENTS: usize = 64;

/// The instance, and who waits.
pub(super) struct Aside {
    epoll: OwnedFd,
    waits: HashMap<RawFd, Waits, BuildHasherDefault<Mix>>,
    files: HashMap<Token, RawFd, BuildHasherDefault<Mix>>,
    events: Vec<epoll::Event>,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    /// Room to write, or an error, or that both sides have sent FIN.
    Room,
    /// An error.
    Error,
}

/// Who waits for a descriptor.
#[derive(Debug)]
struct Waits {
    file: Lent,
    room: Option<Token>,
    error: Option<Token>,
}

impl Waits {
    fn place(&mut self, what: For) -> &mut Option<Token> {
        match what {
            For::Room => &mut self.room,
            For::Error => &mut self.error,
        }
    }

    /// Hang-ups and errors are always told.
    fn interest(&self) -> EventFlags {
        if self.room.is_some() { EventFlags::OUT | EventFlags::ET } else { EventFlags::ET }
    }

    fn data(&self) -> EventData {
        EventData::new_u64(self.file.as_fd().as_raw_fd() as u64)
    }
}

impl Aside {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            waits: HashMap::default(),
            files: HashMap::default(),
            events: Vec::with_capacity(EVENTS),
        })
    }

    /// It can be read when there is something to look at.
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Waits, from how it is now.
    pub(super) fn wait(&mut self, file: BorrowedFd<'_>, what: For, token: Token) -> Result<(), Errno> {
        let fd = file.as_raw_fd();
        match self.waits.entry(fd) {
            Entry::Occupied(mut there) => {
                let waits = there.get_mut();
                *waits.place(what) = Some(token);
                if let Err(error) = epoll::modify(&self.epoll, file, waits.data(), waits.interest()) {
                    *waits.place(what) = None;
                    return Err(error);
                }
            }
            Entry::Vacant(place) => {
                let mut waits = Waits { file: Lent::new(file), room: None, error: None };
                *waits.place(what) = Some(token);
                epoll::add(&self.epoll, file, waits.data(), waits.interest())?;
                place.insert(waits);
            }
        }
        self.files.insert(token, fd);
        Ok(())
    }

    /// Whether it waited: it does not any more.
    pub(super) fn cancel(&mut self, token: Token) -> bool {
        let Some(fd) = self.files.remove(&token) else { return false };
        if let Some(waits) = self.waits.get_mut(&fd) {
            waits.room.take_if(|there| *there == token);
            waits.error.take_if(|there| *there == token);
            self.follow(fd);
        }
        true
    }

    /// Who need not wait any more, and what there is.
    pub(super) fn look(&mut self, mut tell: impl FnMut(Token, i32)) {
        let mut events = std::mem::take(&mut self.events);
        let room = rustix::buffer::spare_capacity(&mut events);
        // It fails on a signal alone, and then the poll that brought us here says so again.
        let _ = epoll::wait(&self.epoll, room, Some(&Timespec::default()));
        for event in events.drain(..) {
            let fd = event.data.u64() as RawFd;
            let Some(waits) = self.waits.get_mut(&fd) else { continue };
            let flags = event.flags;
            let result = i32::try_from(flags.bits() & 0xffff).unwrap_or_default();
            let has_room = flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR);
            let room = waits.room.take_if(|_| has_room);
            let error = waits.error.take_if(|_| flags.contains(EventFlags::ERR));
            if room.is_none() && error.is_none() {
                continue;
            }
            for token in room.into_iter().chain(error) {
                self.files.remove(&token);
                tell(token, result);
            }
            self.follow(fd);
        }
        self.events = events;
    }

    /// Somebody waits no more.
    fn follow(&mut self, fd: RawFd) {
        let Some(waits) = self.waits.get(&fd) else { return };
        if waits.room.is_none() && waits.error.is_none() {
            // Neither fails on what is registered; if it did, an event that nobody waits for is passed over.
            let _ = epoll::delete(&self.epoll, &waits.file);
            self.waits.remove(&fd);
        } else {
            let _ = epoll::modify(&self.epoll, &waits.file, waits.data(), waits.interest());
        }
    }
}
