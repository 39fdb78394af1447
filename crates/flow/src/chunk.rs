//! Which received bytes wait in which order: queues of buffers without a queue's memory.
//!
//! Owns: the links between buffers, and what part of each is still to be sent. Does not own the bytes: a buffer is a
//! number here. An idle half costs six bytes; memory is one link for each *buffer*, however many flows there are.

/// A receive buffer, by its number in the worker's buffer ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u16);

/// Bytes on their way: a part of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// The buffer they are in.
    pub buffer: BufferId,
    /// Where in it they start, in bytes.
    pub start: u32,
    /// How many they are; never 0.
    pub length: u32,
}

const NONE: u16 = u16::MAX;

/// The links of all of a worker's buffers.
#[derive(Debug)]
pub struct Chunks {
    links: Vec<Link>,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    next: u16,
    start: u32,
    length: u32,
}

impl Chunks {
    /// Links for buffers numbered 0 to `buffers` - 1, which are made as they are first used.
    pub fn new(buffers: u16) -> Self {
        Self { links: Vec::with_capacity(usize::from(buffers)) }
    }

    fn link(&mut self, chunk: Chunk) {
        let index = usize::from(chunk.buffer.0);
        if index >= self.links.len() {
            self.links.resize(index + 1, Link { next: NONE, start: 0, length: 0 });
        }
        self.links[index] = Link { next: NONE, start: chunk.start, length: chunk.length };
    }
}

/// The chunks of one half, oldest first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChunkQueue {
    head: u16,
    tail: u16,
    count: u16,
}

impl ChunkQueue {
    pub(crate) const EMPTY: Self = Self { head: NONE, tail: NONE, count: 0 };

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn count(&self) -> u16 {
        self.count
    }

    pub(crate) fn push(&mut self, chunks: &mut Chunks, chunk: Chunk) {
        chunks.link(chunk);
        if self.is_empty() {
            self.head = chunk.buffer.0;
        } else {
            chunks.links[usize::from(self.tail)].next = chunk.buffer.0;
        }
        self.tail = chunk.buffer.0;
        self.count += 1;
    }

    /// The oldest chunk.
    pub(crate) fn front(&self, chunks: &Chunks) -> Option<Chunk> {
        if self.is_empty() {
            return None;
        }
        let Link { start, length, .. } = chunks.links[usize::from(self.head)];
        Some(Chunk { buffer: BufferId(self.head), start, length })
    }

    /// Takes `bytes` off the oldest chunk; returns its buffer when nothing of it is left.
    pub(crate) fn consume(&mut self, chunks: &mut Chunks, bytes: u32) -> Option<BufferId> {
        debug_assert!(!self.is_empty(), "bytes were sent, so a chunk was there");
        let link = &mut chunks.links[usize::from(self.head)];
        debug_assert!(bytes <= link.length, "no more is sent than was there");
        let bytes = bytes.min(link.length);
        link.start += bytes;
        link.length -= bytes;
        if link.length > 0 { None } else { self.pop(chunks) }
    }

    /// Removes the oldest chunk.
    pub(crate) fn pop(&mut self, chunks: &Chunks) -> Option<BufferId> {
        if self.is_empty() {
            return None;
        }
        let buffer = BufferId(self.head);
        self.head = chunks.links[usize::from(self.head)].next;
        self.count -= 1;
        if self.count == 0 {
            *self = Self::EMPTY;
        }
        Some(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_share_one_arena_and_keep_order() {
        let mut chunks = Chunks::new(8);
        let (mut a, mut b) = (ChunkQueue::EMPTY, ChunkQueue::EMPTY);
        let chunk = |buffer| Chunk { buffer: BufferId(buffer), start: 0, length: 10 };
        a.push(&mut chunks, chunk(3));
        b.push(&mut chunks, chunk(1));
        a.push(&mut chunks, chunk(7));
        assert_eq!(a.consume(&mut chunks, 4), None);
        assert_eq!(a.front(&chunks), Some(Chunk { buffer: BufferId(3), start: 4, length: 6 }));
        assert_eq!(a.consume(&mut chunks, 6), Some(BufferId(3)));
        assert_eq!(a.pop(&chunks), Some(BufferId(7)));
        assert_eq!((a.pop(&chunks), a.front(&chunks), a.count()), (None, None, 0));
        assert_eq!(b.front(&chunks).map(|c| c.buffer), Some(BufferId(1)));
    }
}
