//! Receive buffers that the kernel picks from when bytes arrive (`io_uring_register_buf_ring(3)`).
//!
//! Owns: the buffers' memory, the rings of those that are offered to the kernel, and for each buffer who has it. Memory is
//! reserved for the most there can ever be and used as far as buffers are really needed: groups start small and
//! [`BufferPool::grow`] when receives find none.
//!
//! There are two groups. A multishot receive takes as many buffers as bytes have come, whatever the caller would like:
//! it draws from [`Group::Shared`], which is bounded as a whole. [`Group::First`] is for single receives, of which the caller
//! lets each socket have one buffer at most: large enough, it always has one for everybody.

use std::io;
use std::ptr::NonNull;
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
}

impl Group {
    const ALL: [Self; 2] = [Self::Shared, Self::First];

    pub(crate) const fn id(self) -> u16 {
        self as u16
    }
}

/// Most buffers of a group: the kernel's bound on a buffer ring.
const BUFFERS_MAX: u32 = 1 << 15;

/// Added to the distance between two buffers. Without it all buffers start at the same set of the core's caches, and
/// small messages, which use the first line of each, evict each other.
const STAGGER: usize = 64;

/// The buffers of one ring, of both groups. Numbers are of the whole pool: those of [`Group::Shared`] come first.
#[derive(Debug)]
pub struct BufferPool {
    memory: Mapping,
    buffer_bytes: u32,
    groups: [Offers; 2],
}

/// One group's buffers and the ring of those that the kernel may take.
#[derive(Debug)]
struct Offers {
    ring: Mapping,
    /// The number of its first buffer.
    first: u16,
    mask: u16,
    tail: u16,
    /// For each buffer that exists: whether the kernel has it.
    with_kernel: Vec<bool>,
    offered: u32,
}

impl BufferPool {
    /// Reserves up to `shared` and `first` buffers (rounded up to powers of two, at most 32,768 each, and together fewer
    /// than 65,536) of `buffer_bytes` each. None exists yet.
    pub(crate) fn new(shared: u32, first: u32, buffer_bytes: u32) -> io::Result<Self> {
        // Both at their most would need one number more than there are.
        let shared = shared.clamp(8, BUFFERS_MAX / 2).next_power_of_two();
        let first = first.clamp(8, BUFFERS_MAX).next_power_of_two();
        let memory = Mapping::new((shared + first) as usize * stride(buffer_bytes))?;
        let groups = [Offers::new(0, shared)?, Offers::new(shared as u16, first)?];
        Ok(Self { memory, buffer_bytes, groups })
    }

    /// How many buffers of the group there can be.
    pub fn buffers_max(&self, group: Group) -> u32 {
        u32::from(self.groups[group as usize].mask) + 1
    }

    /// How many there are.
    pub fn buffers(&self, group: Group) -> u32 {
        self.groups[group as usize].with_kernel.len() as u32
    }

    /// How many of them hold bytes on their way.
    pub fn held(&self, group: Group) -> u32 {
        self.buffers(group) - self.groups[group as usize].offered
    }

    /// How many wait for bytes.
    pub fn free(&self, group: Group) -> u32 {
        self.groups[group as usize].offered
    }

    /// Bytes of one buffer.
    pub fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// Makes up to `more` further buffers and offers them to the kernel; returns how many.
    pub fn grow(&mut self, group: Group, more: u32) -> u32 {
        let more = more.min(self.buffers_max(group) - self.buffers(group));
        for _ in 0..more {
            let offers = &mut self.groups[group as usize];
            let buffer = offers.first + offers.with_kernel.len() as u16;
            offers.with_kernel.push(true);
            self.offer(group, buffer);
        }
        self.groups[group as usize].publish();
        more
    }

    /// Gives a buffer back to the kernel.
    ///
    /// # Panics
    /// If it is not held: giving it twice would let the kernel write over bytes that are still to be sent.
    pub fn release(&mut self, buffer: u16) {
        let group = self.group_of(buffer);
        let offers = &mut self.groups[group as usize];
        let with_kernel = &mut offers.with_kernel[usize::from(buffer - offers.first)];
        assert!(!*with_kernel, "buffer {buffer} is not held");
        *with_kernel = true;
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

    /// Where the bytes of a held buffer are.
    pub(crate) fn held_bytes(&self, buffer: u16, start: u32, length: u32) -> *const u8 {
        let offers = &self.groups[self.group_of(buffer) as usize];
        assert!(!offers.with_kernel[usize::from(buffer - offers.first)], "buffer {buffer} is not held");
        let end = start.checked_add(length).expect("a range of a buffer");
        assert!(end <= self.buffer_bytes, "bytes {start}..{end} are not in a buffer");
        self.address(buffer).wrapping_add(start as usize)
    }

    /// The kernel handed this buffer over with a completion. False if it cannot have: such a completion is not ours.
    pub(crate) fn take(&mut self, buffer: u16) -> bool {
        let offers = &mut self.groups[self.group_of(buffer) as usize];
        match offers.with_kernel.get_mut(usize::from(buffer - offers.first)) {
            Some(with_kernel) if *with_kernel => {
                *with_kernel = false;
                offers.offered -= 1;
                true
            }
            _ => false,
        }
    }

    /// For `io_uring_register_buf_ring`: each group's ring address, number of entries and id.
    pub(crate) fn registrations(&self) -> [(u64, u16, u16); 2] {
        Group::ALL.map(|group| {
            let offers = &self.groups[group as usize];
            (offers.ring.address.as_ptr() as u64, offers.mask + 1, group.id())
        })
    }

    fn group_of(&self, buffer: u16) -> Group {
        if buffer < self.groups[Group::First as usize].first { Group::Shared } else { Group::First }
    }

    fn address(&self, buffer: u16) -> *mut u8 {
        self.memory.address.as_ptr().wrapping_add(usize::from(buffer) * stride(self.buffer_bytes))
    }

    fn offer(&mut self, group: Group, buffer: u16) {
        let (address, length) = (self.address(buffer) as u64, self.buffer_bytes);
        self.groups[group as usize].offer(buffer, address, length);
    }
}

impl Offers {
    fn new(first: u16, entries: u32) -> io::Result<Self> {
        let ring = Mapping::new(entries as usize * size_of::<BufRingEntry>())?;
        Ok(Self { ring, first, mask: (entries - 1) as u16, tail: 0, with_kernel: Vec::new(), offered: 0 })
    }

    fn entry(&self, index: u16) -> *mut BufRingEntry {
        self.ring.address.as_ptr().cast::<BufRingEntry>().wrapping_add(usize::from(index & self.mask))
    }

    fn offer(&mut self, buffer: u16, address: u64, length: u32) {
        let entry = self.entry(self.tail);
        // SAFETY: `entry` is inside the ring's mapping (the index is masked) and aligned (mmap aligns to pages, entries
        // are 16 bytes). The kernel reads entries only below the published tail, and this one is not: at most as many
        // buffers exist as the ring has entries and this one was not offered, so the ring is never full here.
        let entry = unsafe { &mut *entry };
        entry.set_addr(address);
        entry.set_len(length);
        entry.set_bid(buffer);
        self.tail = self.tail.wrapping_add(1);
        self.offered += 1;
    }

    /// Lets the kernel see what was offered.
    fn publish(&self) {
        // SAFETY: `entry(0)` is the base of the ring, which is what `tail` asks for; the mapping outlives the call.
        let tail = unsafe { BufRingEntry::tail(self.entry(0)) };
        // SAFETY: the tail is a field inside the ring's mapping, aligned, shared with the kernel, which only reads it:
        // an atomic is how both may use it at once.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        // Release: the entries above must be visible before the tail that covers them.
        tail.store(self.tail, Ordering::Release);
    }
}

const fn stride(buffer_bytes: u32) -> usize {
    buffer_bytes as usize + STAGGER
}

/// Anonymous memory, zero-filled, paid for page by page as it is touched.
#[derive(Debug)]
struct Mapping {
    address: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping is plain memory with one owner; nothing about it is bound to a thread.
unsafe impl Send for Mapping {}

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

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length and is unmapped once. No reference into it is left: all
        // borrow the pool that owns it. The kernel does not use it any more: `Ring` drops its pool after its ring, and
        // leaks it if operations were still in flight.
        let _ = unsafe { libc::munmap(self.address.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_knows_who_has_a_buffer() {
        let mut pool = BufferPool::new(100, 20, 4_096).unwrap();
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
    }

    #[test]
    #[should_panic(expected = "buffer 3 is not held")]
    fn a_buffer_is_not_given_twice() {
        let mut pool = BufferPool::new(8, 8, 4_096).unwrap();
        pool.grow(Group::Shared, 8);
        pool.release(3);
    }

    #[test]
    #[should_panic(expected = "are not in a buffer")]
    fn bytes_are_inside_their_buffer() {
        let mut pool = BufferPool::new(8, 8, 4_096).unwrap();
        pool.grow(Group::Shared, 8);
        assert!(pool.take(0));
        pool.bytes(0, 4_000, 97);
    }
}
