//! The same key, the same backend: consistent hashing in proportion to weights.

use crate::key::mix;

/// Slots of the look-up table for pools of up to [`SMALL`] backends, and for larger ones. Both prime. The paper takes the same
/// two sizes.
const SLOTS: usize = 65_537;
const SLOTS_LARGE: usize = 655_373;
/// So many backends have 100 slots each in the small table.
const SMALL: usize = 655;
/// Nobody has the slot.
const NOBODY: u32 = u32::MAX;

/// Maglev hashing (D. Eisenbud et al., NSDI'16) with weights as Envoy has them: each backend walks the slots in an order of its
/// own and takes the next free one in its turn; a lighter backend lets turns pass. When one leaves or its weight changes, few
/// other keys move. An index is found by one look-up.
///
/// Building takes a millisecond for a small pool and some 30 for 10,000 backends, so a table is kept for as long as its weights
/// (which are quantised for that) and its backends stay the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Maglev {
    slots: Box<[u32]>,
}

impl Maglev {
    /// For backends with these stable hashes of their ids and these weights; one whose weight is not above 0 gets no slot.
    /// The order of backends changes nothing but their indexes.
    ///
    /// # Panics
    /// If there are more or fewer hashes than weights.
    pub fn new(hashes: &[u64], weights: &[f32]) -> Self {
        assert_eq!(hashes.len(), weights.len(), "one hash for each weight");
        let mut walks: Vec<Walk> = (0_u32..)
            .zip(hashes.iter().zip(weights))
            .filter(|(_, (_, weight))| weight.is_finite() && **weight > 0.0)
            .map(|(index, (hash, weight))| {
                Walk::new(index, *hash, f64::from(*weight), slots_for(hashes.len()))
            })
            .collect();
        // By hash, so that who comes first in a turn does not hang on the order of registration.
        walks.sort_by_key(|walk| (walk.hash, walk.index));
        if walks.is_empty() {
            return Self { slots: Box::default() };
        }
        let mut slots = vec![NOBODY; slots_for(hashes.len())];
        let most = walks.iter().map(|walk| walk.weight).fold(0.0, f64::max);
        let mut free = slots.len();
        let mut round = 1.0_f64;
        loop {
            for walk in &mut walks {
                if round * walk.weight < walk.due {
                    continue;
                }
                walk.due += most;
                walk.take(&mut slots);
                free -= 1;
                if free == 0 {
                    return Self { slots: slots.into() };
                }
            }
            round += 1.0;
        }
    }

    /// Whether nobody has a slot.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The backend of a key: the `attempt`-th choice, from 0. Further choices are for backends that cannot be used now; they
    /// are the same each time.
    ///
    /// # Panics
    /// If nobody has a slot.
    pub fn index(&self, key: u64, attempt: u32) -> u32 {
        let hash = mix(key ^ u64::from(attempt).rotate_left(40));
        self.slots[((u128::from(hash) * self.slots.len() as u128) >> 64) as usize]
    }
}

fn slots_for(backends: usize) -> usize {
    if backends > SMALL { SLOTS_LARGE } else { SLOTS }
}

/// A backend's way over the slots.
struct Walk {
    index: u32,
    hash: u64,
    weight: f64,
    /// When its next turn is: at the round whose number times its weight reaches this.
    due: f64,
    next: usize,
    skip: usize,
}

impl Walk {
    fn new(index: u32, hash: u64, weight: f64, slots: usize) -> Self {
        let (a, b) = (mix(hash ^ 0x6d61_676c), mix(hash ^ 0x0065_765f));
        let next = (a % slots as u64) as usize;
        // Every step size from 1 visits all slots, because their number is prime.
        let skip = (b % (slots as u64 - 1)) as usize + 1;
        Self { index, hash, weight, due: 0.0, next, skip }
    }

    fn take(&mut self, slots: &mut [u32]) {
        loop {
            let slot = self.next;
            self.next += self.skip;
            if self.next >= slots.len() {
                self.next -= slots.len();
            }
            if slots[slot] == NOBODY {
                slots[slot] = self.index;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::stable_hash;

    fn hashes(count: usize) -> Vec<u64> {
        (0..count).map(|n| stable_hash(format!("pg{n}").as_bytes(), 0)).collect()
    }

    fn shares(maglev: &Maglev, count: usize) -> Vec<f64> {
        let mut shares = vec![0.0; count];
        maglev.slots.iter().for_each(|index| shares[*index as usize] += 1.0 / maglev.slots.len() as f64);
        shares
    }

    /// Part of the slots whose backend differs.
    fn moved(a: &Maglev, b: &Maglev, renamed: impl Fn(u32) -> u32) -> f64 {
        let moved = a.slots.iter().zip(&b.slots).filter(|(a, b)| renamed(**a) != **b).count();
        moved as f64 / a.slots.len() as f64
    }

    #[test]
    fn slots_are_in_proportion_to_weight() {
        for count in [3, 20, 200] {
            let weights: Vec<f32> = (0..count).map(|n| 1.0 + (n % 3) as f32).collect();
            let sum: f32 = weights.iter().sum();
            let got = shares(&Maglev::new(&hashes(count), &weights), count);
            for (got, weight) in got.iter().zip(&weights) {
                let want = f64::from(weight / sum);
                assert!((got / want - 1.0).abs() < 0.02, "{count}: {got} instead of {want}");
            }
        }
    }

    #[test]
    fn few_keys_move_when_one_leaves_or_its_weight_changes() {
        let all = Maglev::new(&hashes(20), &[1.0; 20]);
        let mut left = [1.0; 20];
        left[7] = 0.0;
        let without = Maglev::new(&hashes(20), &left);
        // A twentieth has to move.
        let got = moved(&all, &without, |index| index);
        assert!(got < 0.11, "{got} of all keys moved when a twentieth had to");
        let mut heavier = [1.0; 20];
        heavier[7] = 1.19;
        let got = moved(&all, &Maglev::new(&hashes(20), &heavier), |index| index);
        assert!(got < 0.15, "{got} of all keys moved when one of 20 got a fifth heavier");
    }

    #[test]
    fn the_order_of_backends_changes_nothing() {
        let forth = Maglev::new(&hashes(10), &[1.0; 10]);
        let mut back_hashes = hashes(10);
        back_hashes.reverse();
        let back = Maglev::new(&back_hashes, &[1.0; 10]);
        assert_eq!(moved(&forth, &back, |index| 9 - index), 0.0);
    }

    #[test]
    fn further_choices_reach_everyone() {
        let maglev = Maglev::new(&hashes(5), &[1.0; 5]);
        for key in 0..100 {
            let mut seen: Vec<u32> = (0..40).map(|attempt| maglev.index(key, attempt)).collect();
            assert_eq!(seen[0], maglev.index(key, 0));
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 5, "key {key}");
        }
        assert!(Maglev::new(&hashes(2), &[0.0, f32::NAN]).is_empty());
    }
}
