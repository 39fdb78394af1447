//! Connections by key: an index and a generation, so that an event for a closed connection is never taken for one of
//! the connection that got its place.

/// A dense map that hands out its own keys.
#[derive(Debug)]
pub(super) struct Slots<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

/// Generations wrap here: the bits above are the caller's, for a tag.
const GENERATION_MASK: u32 = (1 << 24) - 1;

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// Keeps `value`; its key fits 56 bits.
    pub(super) fn insert(&mut self, value: T) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry { generation: 0, value: None });
            (self.entries.len() - 1) as u32
        });
        let entry = &mut self.entries[index as usize];
        entry.value = Some(value);
        key(entry.generation, index)
    }

    /// The value under `key`, if it is still there.
    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let (generation, index) = parts(key);
        self.entries.get_mut(index as usize).filter(|e| e.generation == generation)?.value.as_mut()
    }

    /// Takes the value out; its key is dead from now on.
    pub(super) fn remove(&mut self, key: u64) -> Option<T> {
        let (generation, index) = parts(key);
        let entry = self.entries.get_mut(index as usize).filter(|e| e.generation == generation)?;
        let value = entry.value.take()?;
        entry.generation = (entry.generation + 1) & GENERATION_MASK;
        self.free.push(index);
        Some(value)
    }

    /// All of them.
    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().filter_map(|e| e.value.as_ref())
    }
}

fn key(generation: u32, index: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index)
}

fn parts(key: u64) -> (u32, u32) {
    ((key >> 32) as u32 & GENERATION_MASK, key as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_does_not_reach_the_new_tenant() {
        let mut slots = Slots::default();
        let first = slots.insert('a');
        assert_eq!(slots.remove(first), Some('a'));
        let second = slots.insert('b');
        assert_ne!(first, second);
        assert_eq!(slots.get_mut(first), None);
        assert_eq!(slots.remove(first), None);
        assert_eq!(slots.get_mut(second), Some(&mut 'b'));
        assert_eq!(slots.values().count(), 1);
    }
}
