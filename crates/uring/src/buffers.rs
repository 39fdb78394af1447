//! Receive buffers that are picked when bytes arrive: by the kernel from rings that it is shown
//! (`io_uring_register_buf_ring(3)`), by the kernel from what it was given one by one (`io_uring_prep_provide_buffers(3)`,
//! see [`crate::oneshot`]), or by an engine that receives with plain system calls.
//!
//! Owns: the buffers' memory, who has each of them, and the rings or lists of those that are free. Memory is reserved for the
//! most there can ever be and used as far as buffers are really needed: groups start small, [`BufferPool::grow`] when
//! receives find none, and give back what a peak alone needed ([`BufferPool::shrink`]).
//!
//! There are three groups. A multishot receive takes as many buffers as bytes have come, whatever the caller would like:
//! it draws from [`Group::Shared`], which is bounded as a whole. [`Group::First`] is for single receives, of which the caller
//! lets each socket have one buffer at most: large enough, it always has one for everybody. [`Group::Datagrams`] is for UDP:
//! its buffers are as large as a train of datagrams, and go out again in the turn after the one in which they came.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

/// Which receives draw from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Group {
    /// Multishot receives, and single ones beyond the first.
    Shared = 0,
    /// Single receives for those that hold nothing.
    First = 1,
    /// Receives of datagrams.
    Datagrams = 2,
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Shared, Self::First, Self::Datagrams];

    pub(crate) const fn id(self) -> u16 {
        self as u16
    }
}

/// Most buffers of a group: the kernel's bound on a buffer ring.
const BUFFERS_MAX: u32 = 1 << 15;
/// Most buffers for datagrams.
const DATAGRAMS_MAX: u32 = 1 << 13;

/// Added to the distance between two buffers. Without it all buffers start at the same set of the core's caches, and
/// small messages, which use the first line of each, evict each other.
const STAGGER: usize = 64;

/// The buffers of one ring, of all groups. Numbers are of the whole pool: those of [`Group::Shared`] come first.
#[derive(Debug)]
pub struct BufferPool {
    memory: Memory,
    groups: [Offers; 3],
}

/// The memory of a pool's buffers. Whoever has one keeps it mapped: an operation that is in flight does.
#[derive(Debug, Clone)]
pub struct Memory(Arc<Mapping>);

/// One group's buffers and those of them that are free.
#[derive(Debug)]
struct Offers {
    place: Place,
    /// The number of its first buffer.
    first: u16,
    /// Where in the pool's memory that one is.
    base: usize,
    /// Bytes of one.
    buffer_bytes: u32,
    /// Most buffers there can be.
    max: u32,
    /// Of each buffer that there ever was.
    states: Vec<State>,
    /// How many there are.
    there: u32,
    free: u32,
    /// Those from this place on are not offered again.
    keep: usize,
    /// Most that were held at once since somebody asked.
    most_held: u32,
}

/// Who has a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nobody: it has no memory.
    Absent,
    /// It waits for bytes. It is the kernel's, and nobody here may read it.
    Offered,
    /// Whoever its completion was given to.
    Held,
}

/// Where free buffers wait.
#[derive(Debug)]
enum Place {
    /// In a ring that the kernel takes them from.
    Ring { ring: Mapping, mask: u16, tail: u16 },
    /// In a list, the last given back on top: its memory is still in the core's cache.
    List(Vec<u16>),
}

impl BufferPool {
    /// Reserves as many as [`crate::Setup`] says there can be at most (rounded up to powers of two: 16,384 shared ones, 32,768
    /// first ones, 8,192 for datagrams). None exists yet.
    pub(crate) fn new(setup: &crate::Setup) -> io::Result<Self> {
        Self::with(setup, Place::ring)
    }

    /// As [`crate::Setup`] asks, with the shared ones that exist at the start, for engines that no kernel ring is shown to.
    ///
    /// # Errors
    /// The kernel reserves no memory.
    pub fn listed(setup: &crate::Setup) -> io::Result<Self> {
        let place = |_| Ok(Place::List(Vec::new()));
        let mut pool = Self::with(setup, place)?;
        pool.grow(Group::Shared, setup.shared);
        Ok(pool)
    }

    fn with(setup: &crate::Setup, place: impl Fn(u32) -> io::Result<Place>) -> io::Result<Self> {
        // Two at their most would need more numbers than there are.
        let shared = setup.shared_max.clamp(8, BUFFERS_MAX / 2).next_power_of_two();
        let first = setup.first_max.clamp(8, BUFFERS_MAX).next_power_of_two();
        let datagrams = setup.datagrams_max.clamp(8, DATAGRAMS_MAX).next_power_of_two();
        let (mut number, mut bytes) = (0, 0);
        let mut offers = |max: u32, buffer_bytes: u32| -> io::Result<Offers> {
            let (first, base) = (number as u16, bytes);
            number += max;
            bytes += max as usize * stride(buffer_bytes);
            let (states, there, free, keep, most_held) = (Vec::new(), 0, 0, 0, 0);
            let place = place(max)?;
            Ok(Offers { place, first, base, buffer_bytes, max, states, there, free, keep, most_held })
        };
        let groups = [
            offers(shared, setup.buffer_bytes)?,
            offers(first, setup.buffer_bytes)?,
            offers(datagrams, setup.datagram_bytes)?,
        ];
        Ok(Self { memory: Memory(Arc::new(Mapping::new(bytes)?)), groups })
    }

    /// How many buffers of the group there can be.
    pub fn buffers_max(&self, group: Group) -> u32 {
        self.groups[group as usize].max
    }

    /// How many there are.
    pub fn buffers(&self, group: Group) -> u32 {
        self.groups[group as usize].there
    }

    /// How many of them hold bytes on their way.
    pub fn held(&self, group: Group) -> u32 {
        self.buffers(group) - self.free(group)
    }

    /// How many wait for bytes.
    pub fn free(&self, group: Group) -> u32 {
        self.groups[group as usize].free
    }

    /// Bytes of one buffer of the group.
    pub fn buffer_bytes(&self, group: Group) -> u32 {
        self.groups[group as usize].buffer_bytes
    }

    /// Makes up to `more` further buffers and offers them to the kernel; returns how many.
    pub fn grow(&mut self, group: Group, more: u32) -> u32 {
        let more = more.min(self.buffers_max(group) - self.buffers(group));
        let mut at = 0;
        for _ in 0..more {
            let offers = &mut self.groups[group as usize];
            while offers.states.get(at).is_some_and(|state| *state != State::Absent) {
                at += 1;
            }
            if at == offers.states.len() {
                offers.states.push(State::Absent);
            }
            offers.states[at] = State::Offered;
            offers.there += 1;
            let buffer = offers.first + at as u16;
            self.offer(group, buffer);
        }
        let offers = &mut self.groups[group as usize];
        offers.keep = offers.states.len();
        offers.publish();
        more
    }

    /// From now on the group is to have `keep` buffers, unless it grows again. Those beyond, which are the last ones, go as they
    /// are released, and at once where they wait in a list; their memory is the system's again. How many are still to go.
    pub fn shrink(&mut self, group: Group, keep: u32) -> u32 {
        let offers = &mut self.groups[group as usize];
        offers.keep = offers.keep.min(keep as usize);
        if let Place::List(list) = &mut offers.place {
            let (first, keep) = (offers.first, offers.keep);
            let spare: Vec<u16> =
                list.extract_if(.., |buffer| usize::from(*buffer - first) >= keep).collect();
            offers.free -= spare.len() as u32;
            for buffer in spare {
                self.discard(group, buffer);
            }
        }
        let offers = &self.groups[group as usize];
        offers.states.iter().skip(offers.keep).filter(|state| **state != State::Absent).count() as u32
    }

    /// Most buffers of the group that were held at once since the last call.
    pub fn most_held(&mut self, group: Group) -> u32 {
        let held = self.held(group);
        std::mem::replace(&mut self.groups[group as usize].most_held, held)
    }

    /// A buffer that nobody has is no more, and its memory is the system's.
    fn discard(&mut self, group: Group, buffer: u16) {
        let offers = &mut self.groups[group as usize];
        let at = usize::from(buffer - offers.first);
        offers.states[at] = State::Absent;
        offers.there -= 1;
        // Pages that it shares with a neighbour go with the one that goes last.
        let absent = |at: usize| offers.states.get(at).is_some_and(|state| *state == State::Absent);
        let page = page_bytes();
        let start = offers.base + at * stride(offers.buffer_bytes);
        let end = start + stride(offers.buffer_bytes);
        let first = if at > 0 && absent(at - 1) { start / page * page } else { start.next_multiple_of(page) };
        let last = if absent(at + 1) { end.next_multiple_of(page) } else { end / page * page };
        if first < last {
            self.memory.discard(first, last - first);
        }
    }

    /// Gives a buffer back, for the next bytes.
    ///
    /// # Panics
    /// If it is not held: giving it twice would let the kernel write over bytes that are still to be sent.
    pub fn release(&mut self, buffer: u16) {
        let group = self.group_of(buffer);
        let offers = &mut self.groups[group as usize];
        let at = usize::from(buffer - offers.first);
        assert!(offers.states[at] == State::Held, "buffer {buffer} is not held");
        if at >= offers.keep {
            return self.discard(group, buffer);
        }
        offers.states[at] = State::Offered;
        self.offer(group, buffer);
        self.groups[group as usize].publish();
    }

    /// The bytes of a held buffer.
    ///
    /// # Panics
    /// If it is not held, or they are not inside it.
    pub fn bytes(&self, buffer: u16, start: u32, length: u32) -> &[u8] {
        let address = self.held_bytes(buffer, start, length);
        // SAFETY: `held_bytes` checked that the range is inside the buffer and that the kernel does not have it, so
        // nobody writes it until `release`, which takes `&mut self` and so ends this borrow first. The kernel may read
        // it (a send in flight). It was zero-filled by mmap or written by the kernel: initialized either way.
        unsafe { std::slice::from_raw_parts(address, length as usize) }
    }

    /// What a receive of datagrams with this result left in a held buffer; see [`crate::Ring::recv_datagrams`]. `None`: the
    /// datagram did not fit, or does not come from an internet address.
    pub fn datagrams(&self, buffer: u16, result: i32) -> Option<crate::Datagrams> {
        crate::datagrams::parse(self.bytes(buffer, 0, u32::try_from(result).ok()?))
    }

    /// All of a held buffer, to receive into.
    ///
    /// # Panics
    /// If it is not held, or its pool is not [`BufferPool::listed`]: a kernel that was shown a ring might be sending it.
    pub fn bytes_mut(&mut self, buffer: u16) -> &mut [u8] {
        let listed = matches!(self.groups[self.group_of(buffer) as usize].place, Place::List(_));
        assert!(listed, "buffer {buffer} is the kernel's to write");
        let size = self.buffer_bytes(self.group_of(buffer));
        let address = self.held_bytes(buffer, 0, size).cast_mut();
        // SAFETY: the range is inside a held buffer's memory, which is mapped as long as the pool and initialized (see
        // `bytes`). It is borrowed once: from here through `&mut self`, and in no kernel's hands, for a buffer of a list is
        // the kernel's only when `next_provided` gave it away (then it is not held) or when `oneshot::send` was told of
        // it, whose caller keeps it held and does not receive into it until the completion.
        unsafe { std::slice::from_raw_parts_mut(address, size as usize) }
    }

    /// Takes a free buffer of a list; it is held from then on.
    pub fn take_free(&mut self, group: Group) -> Option<u16> {
        let offers = &mut self.groups[group as usize];
        let Place::List(list) = &mut offers.place else { return None };
        let buffer = list.pop()?;
        offers.hold(usize::from(buffer - offers.first));
        Some(buffer)
    }

    /// Takes a row of free buffers from a list to give them to a kernel, and says where they are. They count as free until
    /// [`BufferPool::take`].
    pub(crate) fn next_provided(&mut self, group: Group) -> Option<Provided> {
        let offers = &mut self.groups[group as usize];
        let Place::List(list) = &mut offers.place else { return None };
        let last = list.pop()?;
        let mut count = 1;
        while list.last().is_some_and(|next| *next + count == last) {
            list.pop();
            count += 1;
        }
        let first = last - (count - 1);
        Some(Provided {
            first,
            count,
            address: self.address(first),
            stride: stride(self.buffer_bytes(group)) as i32,
        })
    }

    /// A kernel did not take the buffers that [`BufferPool::next_provided`] gave it: they are in their list again.
    pub fn provide_failed(&mut self, first: u16, count: u16) {
        let group = self.group_of(first);
        if let Place::List(list) = &mut self.groups[group as usize].place {
            list.extend(first..first + count);
        }
    }

    /// The memory of all buffers.
    pub(crate) fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Where the bytes of a held buffer are.
    pub(crate) fn held_bytes(&self, buffer: u16, start: u32, length: u32) -> *const u8 {
        let offers = &self.groups[self.group_of(buffer) as usize];
        let state = offers.states[usize::from(buffer - offers.first)];
        assert!(state == State::Held, "buffer {buffer} is not held");
        let end = start.checked_add(length).expect("a range of a buffer");
        assert!(end <= offers.buffer_bytes, "bytes {start}..{end} are not in a buffer");
        self.address(buffer).wrapping_add(start as usize)
    }

    /// The kernel handed this buffer over with a completion. False if it cannot have: such a completion is not ours.
    pub fn take(&mut self, buffer: u16) -> bool {
        let offers = &mut self.groups[self.group_of(buffer) as usize];
        let at = usize::from(buffer - offers.first);
        let is_ours = offers.states.get(at) == Some(&State::Offered);
        if is_ours {
            offers.hold(at);
        }
        is_ours
    }

    /// For `io_uring_register_buf_ring`: each group's ring address, number of entries and id.
    pub(crate) fn registrations(&self) -> impl Iterator<Item = (u64, u16, u16)> {
        Group::ALL.into_iter().filter_map(|group| match &self.groups[group as usize].place {
            Place::Ring { ring, mask, .. } => Some((ring.address.as_ptr() as u64, mask + 1, group.id())),
            Place::List(_) => None,
        })
    }

    fn group_of(&self, buffer: u16) -> Group {
        if buffer < self.groups[Group::First as usize].first {
            Group::Shared
        } else if buffer < self.groups[Group::Datagrams as usize].first {
            Group::First
        } else {
            Group::Datagrams
        }
    }

    fn address(&self, buffer: u16) -> *mut u8 {
        let Offers { first, base, buffer_bytes, .. } = &self.groups[self.group_of(buffer) as usize];
        let place = base + usize::from(buffer - first) * stride(*buffer_bytes);
        self.memory.0.address.as_ptr().wrapping_add(place)
    }

    fn offer(&mut self, group: Group, buffer: u16) {
        let (address, length) = (self.address(buffer) as u64, self.buffer_bytes(group));
        self.groups[group as usize].offer(buffer, address, length);
    }
}

/// A row of buffers with neighbouring numbers.
pub(crate) struct Provided {
    pub(crate) first: u16,
    pub(crate) count: u16,
    pub(crate) address: *mut u8,
    /// From one buffer to the next.
    pub(crate) stride: i32,
}

impl Offers {
    fn offer(&mut self, buffer: u16, address: u64, length: u32) {
        self.place.offer(buffer, address, length);
        self.free += 1;
    }

    /// A free one is held from now on.
    fn hold(&mut self, at: usize) {
        self.states[at] = State::Held;
        self.free -= 1;
        self.most_held = self.most_held.max(self.there - self.free);
    }

    fn publish(&self) {
        self.place.publish();
    }
}

impl Place {
    fn ring(entries: u32) -> io::Result<Self> {
        let ring = Mapping::new(entries as usize * size_of::<BufRingEntry>())?;
        Ok(Self::Ring { ring, mask: (entries - 1) as u16, tail: 0 })
    }

    fn offer(&mut self, buffer: u16, address: u64, length: u32) {
        let (ring, mask, tail) = match self {
            Self::List(list) => return list.push(buffer),
            Self::Ring { ring, mask, tail } => (ring, *mask, tail),
        };
        let entry = entry(ring, *tail & mask);
        // SAFETY: `entry` is inside the ring's mapping (the index is masked) and aligned (mmap aligns to pages, entries
        // are 16 bytes). The kernel reads entries only below the published tail, and this one is not: at most as many
        // buffers exist as the ring has entries and this one was not offered, so the ring is never full here.
        let entry = unsafe { &mut *entry };
        entry.set_addr(address);
        entry.set_len(length);
        entry.set_bid(buffer);
        *tail = tail.wrapping_add(1);
    }

    /// Lets the kernel see what was offered.
    fn publish(&self) {
        let Self::Ring { ring, tail: ours, .. } = self else { return };
        // SAFETY: `entry(ring, 0)` is the base of the ring, which is what `tail` asks for; the mapping outlives the call.
        let tail = unsafe { BufRingEntry::tail(entry(ring, 0)) };
        // SAFETY: the tail is a field inside the ring's mapping, aligned, shared with the kernel, which only reads it:
        // an atomic is how both may use it at once.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        // Release: the entries above must be visible before the tail that covers them.
        tail.store(*ours, Ordering::Release);
    }
}

/// An entry of a buffer ring, by its masked index.
fn entry(ring: &Mapping, index: u16) -> *mut BufRingEntry {
    ring.address.as_ptr().cast::<BufRingEntry>().wrapping_add(usize::from(index))
}

const fn stride(buffer_bytes: u32) -> usize {
    buffer_bytes as usize + STAGGER
}

/// Bytes of a page.
fn page_bytes() -> usize {
    // SAFETY: sysconf(3) reads a number; it touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4_096)
}

/// Anonymous memory, zero-filled, paid for page by page as it is touched.
#[derive(Debug)]
struct Mapping {
    address: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping is plain memory with one owner; nothing about it is bound to a thread.
unsafe impl Send for Mapping {}

// SAFETY: a shared mapping lets nobody reach its memory but by `BufferPool`, which has one owner and is not shared.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(length: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(address.cast())
            .map(|address| Self { address, length })
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }
}

impl Memory {
    /// Gives pages back; they are zeroes when they are next touched. Nobody may have buffers in them.
    fn discard(&self, start: usize, length: usize) {
        assert!(start + length <= self.0.length, "bytes of the mapping");
        let address = self.0.address.as_ptr().wrapping_add(start);
        // SAFETY: the range is inside our own anonymous mapping, and covers only buffers that are absent: no reference into
        // them is left (`BufferPool::bytes` wants them held), and the kernel has them neither to receive into, for they
        // are in no ring or list of free ones, nor to send, for whoever held them released them. A failure leaves the pages.
        let _ = unsafe { libc::madvise(address.cast(), length, libc::MADV_DONTNEED) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length and is unmapped once. No reference into it is left: all
        // borrow the pool that owns it. The kernel does not use it any more: `Ring` drops its pool after its ring, and
        // leaks it if operations were still in flight; operations of `oneshot` have a `Memory` each until they end.
        let _ = unsafe { libc::munmap(self.address.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup(shared_max: u32, first_max: u32) -> crate::Setup {
        let datagram_bytes = 70_000;
        crate::Setup { shared_max, first_max, buffer_bytes: 4_096, datagram_bytes, ..crate::Setup::default() }
    }

    #[test]
    fn a_pool_knows_who_has_a_buffer() {
        let mut pool = BufferPool::new(&setup(100, 20)).unwrap();
        assert_eq!((pool.buffers_max(Group::Shared), pool.buffers_max(Group::First)), (128, 32));
        assert_eq!(pool.grow(Group::Shared, 100), 100);
        assert_eq!(pool.grow(Group::Shared, 100), 28, "the bound");
        assert!(!pool.take(128), "of the other group, and not there yet");
        assert_eq!(pool.grow(Group::First, 1), 1);
        assert!(pool.take(127) && !pool.take(127));
        assert!(pool.take(128) && !pool.take(129));
        assert_eq!((pool.held(Group::Shared), pool.held(Group::First), pool.free(Group::First)), (1, 1, 0));
        assert_eq!(pool.bytes(127, 4_000, 96), [0; 96]);
        pool.release(127);
        pool.release(128);
        assert_eq!((pool.held(Group::Shared), pool.held(Group::First)), (0, 0));
        assert_eq!(pool.grow(Group::Datagrams, 9), 8);
        assert!(pool.take(160) && !pool.take(168));
        assert_eq!(pool.bytes(160, 69_999, 1), [0]);
    }

    #[test]
    fn a_listed_pool_gives_the_warmest_buffer_and_rows_of_neighbours() {
        let mut pool = BufferPool::listed(&crate::Setup { shared: 8, ..setup(8, 8) }).unwrap();
        assert_eq!(pool.registrations().count(), 0);
        let buffer = pool.take_free(Group::Shared).unwrap();
        pool.bytes_mut(buffer)[..4].copy_from_slice(b"trim");
        assert_eq!(pool.bytes(buffer, 0, 4), b"trim");
        assert_eq!((pool.free(Group::Shared), pool.held(Group::Shared)), (7, 1));
        pool.release(buffer);
        assert_eq!(pool.take_free(Group::Shared), Some(buffer));
        let row = pool.next_provided(Group::Shared).unwrap();
        assert_eq!((row.first, row.count), (0, 7), "all but the held one");
        assert!(pool.next_provided(Group::Shared).is_none());
        assert_eq!(pool.free(Group::Shared), 7, "they still wait for bytes");
        assert!(pool.take(3) && !pool.take(3));
        pool.release(3);
        assert_eq!(pool.next_provided(Group::Shared).unwrap().count, 1);
        pool.provide_failed(0, 3);
        assert_eq!(pool.take_free(Group::Shared), Some(2));
        assert_eq!(pool.take_free(Group::First), None);
    }

    #[test]
    fn what_a_peak_needed_is_given_back() {
        let mut pool = BufferPool::listed(&crate::Setup { shared: 64, ..setup(64, 8) }).unwrap();
        let held: Vec<u16> = (0..64).map(|_| pool.take_free(Group::Shared).unwrap()).collect();
        for buffer in &held {
            pool.bytes_mut(*buffer).fill(7);
        }
        assert_eq!(pool.most_held(Group::Shared), 64);
        for buffer in held.iter().filter(|buffer| **buffer % 2 == 0) {
            pool.release(*buffer);
        }
        assert_eq!(pool.shrink(Group::Shared, 8), 28, "the held ones: every second of 56");
        assert_eq!((pool.buffers(Group::Shared), pool.free(Group::Shared)), (36, 4));
        for buffer in held.iter().filter(|buffer| **buffer % 2 == 1) {
            pool.release(*buffer);
        }
        assert_eq!((pool.buffers(Group::Shared), pool.free(Group::Shared)), (8, 8));
        assert_eq!((pool.most_held(Group::Shared), pool.most_held(Group::Shared)), (64, 0));
        assert_eq!(pool.grow(Group::Shared, 100), 56);
        let mut again: Vec<u16> = (0..64).map(|_| pool.take_free(Group::Shared).unwrap()).collect();
        assert_eq!(pool.take_free(Group::Shared), None);
        again.sort_unstable();
        assert_eq!(again, (0..64).collect::<Vec<_>>(), "each once");
        assert!(pool.bytes(7, 0, 4_096).iter().all(|byte| *byte == 7), "those that stayed have their bytes");
        assert!(
            (9..63).all(|buffer| pool.bytes(buffer, 0, 4_096) == [0; 4_096]),
            "the others have new memory"
        );
    }

    #[test]
    fn a_ring_s_buffers_go_as_they_are_released() {
        let mut pool = BufferPool::new(&setup(16, 8)).unwrap();
        pool.grow(Group::Shared, 16);
        assert_eq!(pool.shrink(Group::Shared, 4), 12);
        assert_eq!(pool.buffers(Group::Shared), 16, "the kernel has them");
        (0..16).for_each(|buffer| assert!(pool.take(buffer)));
        (0..16).for_each(|buffer| pool.release(buffer));
        assert_eq!((pool.buffers(Group::Shared), pool.free(Group::Shared)), (4, 4));
        assert!(!pool.take(4), "it is not there");
    }

    #[test]
    #[should_panic(expected = "is the kernel's to write")]
    fn a_ring_s_buffer_is_not_ours_to_write() {
        let mut pool = BufferPool::new(&setup(8, 8)).unwrap();
        pool.grow(Group::Shared, 8);
        assert!(pool.take(0));
        pool.bytes_mut(0);
    }

    #[test]
    #[should_panic(expected = "buffer 3 is not held")]
    fn a_buffer_is_not_given_twice() {
        let mut pool = BufferPool::new(&setup(8, 8)).unwrap();
        pool.grow(Group::Shared, 8);
        pool.release(3);
    }

    #[test]
    #[should_panic(expected = "are not in a buffer")]
    fn bytes_are_inside_their_buffer() {
        let mut pool = BufferPool::new(&setup(8, 8)).unwrap();
        pool.grow(Group::Shared, 8);
        assert!(pool.take(0));
        pool.bytes(0, 4_000, 97);
    }
}
