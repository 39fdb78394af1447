//! Sampling in proportion to weights, in constant time.

use std::hint::select_unpredictable;

/// Walker's alias table (A. J. Walker, 1977): draws an index in proportion to its weight with one random number and one
/// look-up. Built in one sweep over light and heavy indexes (L. Hübschle-Schneider and P. Sanders, 2019) rather than
/// with M. D. Vose's two stacks: the same linear time, but nothing in it that a processor mispredicts, and a pool's
/// table is made anew with every batch of reports.
///
/// Columns are 8 bytes: a 32-bit fixed-point threshold and the alias. At 10,000 entries the table is 80 kB and stays
/// in a core's second-level cache.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AliasTable {
    columns: Box<[Column]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Column {
    /// Below it (in 1/2^32) the column's own index is drawn, else the alias.
    threshold: u32,
    alias: u32,
}

/// A weight as a whole number of parts of a column, and whose it is. Whole numbers, because a processor selects them
/// without a branch, and because what one column gives is exactly what another gets.
#[derive(Debug, Clone, Copy, Default)]
struct Part {
    size: u32,
    index: u32,
}

impl AliasTable {
    /// Builds the table for `weights`; negative, infinite and NaN weights count as 0. With no weight above 0 the table
    /// is empty.
    ///
    /// # Panics
    /// With more than `u32::MAX` weights.
    pub fn new(weights: &[f32]) -> Self {
        let count = u32::try_from(weights.len()).expect("a pool has fewer than 2^32 backends");
        let (sum, most) = sum_and_most(weights);
        if sum <= 0.0 {
            return Self::default();
        }
        let mean_one = f64::from(count) / sum;
        // As many parts to a column as let the greatest weight fit 31 bits.
        let bits = 30 - (f64::from(most) * mean_one).max(1.0).log2().ceil().min(29.0) as u32;
        let full = 1_u32 << bits;
        let scale = mean_one * f64::from(full);
        // Weights that are all alike are full but for rounding.
        let heavy_from = full - 1 - (full >> 20);
        // One buffer from both ends: light parts from the left, heavy ones from the right. Each part is written at both
        // and kept at one, which takes no branch.
        let mut parts = vec![Part::default(); weights.len()];
        let (mut lights, mut heavies) = (0, 0);
        for (index, weight) in (0..count).zip(weights) {
            let part = Part { size: (f64::from(usable(*weight)) * scale) as u32, index };
            let heavy_place = parts.len() - 1 - heavies;
            parts[lights] = part;
            parts[heavy_place] = part;
            lights += usize::from(part.size < heavy_from);
            heavies += usize::from(part.size >= heavy_from);
        }
        let mut columns = vec![Column { threshold: u32::MAX, alias: 0 }; weights.len()];
        fill(&mut columns, &parts[..lights], &parts[lights..], bits);
        Self { columns: columns.into() }
    }

    /// Whether nothing can be drawn.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// Draws an index with 64 random bits.
    ///
    /// # Panics
    /// If the table is empty.
    pub fn draw(&self, random: u64) -> u32 {
        let column_bits = random >> 32;
        let index = ((column_bits * self.columns.len() as u64) >> 32) as usize;
        let column = self.columns[index];
        // As random as can be: a branch here would be mispredicted every other time.
        select_unpredictable((random as u32) < column.threshold, index as u32, column.alias)
    }
}

/// What counts of a weight.
fn usable(weight: f32) -> f32 {
    // Two selects; as one condition it would become branches. `max` makes 0 of NaN.
    let weight = weight.max(0.0);
    if weight < f32::INFINITY { weight } else { 0.0 }
}

/// The sum and the greatest, in four lanes: one long chain of additions would take as long as all the rest.
fn sum_and_most(weights: &[f32]) -> (f64, f32) {
    let (mut sums, mut mosts) = ([0.0_f64; 4], [0.0_f32; 4]);
    let (fours, rest) = weights.as_chunks::<4>();
    for four in fours {
        for ((sum, most), weight) in sums.iter_mut().zip(&mut mosts).zip(four) {
            let weight = usable(*weight);
            *sum += f64::from(weight);
            *most = if weight > *most { weight } else { *most };
        }
    }
    let rest = || rest.iter().map(|weight| usable(*weight));
    (sums.iter().sum::<f64>() + rest().map(f64::from).sum::<f64>(), rest().chain(mosts).fold(0.0, f32::max))
}

/// Fills up every light column from the heavy one at hand; a heavy one that gave so much that it is light itself is
/// filled up from the next. `heavies` is in reverse; a full column has 2^`bits` parts.
fn fill(columns: &mut [Column], lights: &[Part], heavies: &[Part], bits: u32) {
    let Some((last, _)) = heavies.split_first() else { return };
    let full = 1_u32 << bits;
    // Of a column that is `size` full of its own index, and not quite full.
    let threshold = |size: u32| size << (32 - bits);
    let mut left = heavies[heavies.len() - 1].size;
    let (mut light, mut heavy) = (0, heavies.len() - 1);
    while light < lights.len() && heavy > 0 {
        let (poor, rich, next) = (lights[light], heavies[heavy], heavies[heavy - 1]);
        // Selects, not branches: which way it goes is as random as the weights.
        let gives = left >= full;
        let index = select_unpredictable(gives, poor.index, rich.index);
        let size = select_unpredictable(gives, poor.size, left);
        let alias = select_unpredictable(gives, rich.index, next.index);
        let from = select_unpredictable(gives, left, next.size);
        columns[index as usize] = Column { threshold: threshold(size), alias };
        left = from.saturating_sub(full - size);
        light += usize::from(gives);
        heavy -= usize::from(!gives);
    }
    // No light one is left: the heavy ones fill up each other, until all are full.
    while heavy > 0 {
        let (rich, next) = (heavies[heavy], heavies[heavy - 1]);
        if left < full {
            columns[rich.index as usize] = Column { threshold: threshold(left), alias: next.index };
        }
        left = (next.size + left).saturating_sub(full);
        heavy -= 1;
    }
    // The last heavy one fills up all that are light still, and is full itself, but for rounding.
    for poor in &lights[light..] {
        columns[poor.index as usize] = Column { threshold: threshold(poor.size), alias: last.index };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::Random;
    use proptest::prelude::*;

    fn shares(weights: &[f32], draws: u32) -> Vec<f64> {
        let table = AliasTable::new(weights);
        let mut random = Random::new(7);
        let mut counts = vec![0_u32; weights.len()];
        for _ in 0..draws {
            counts[table.draw(random.next()) as usize] += 1;
        }
        counts.iter().map(|c| f64::from(*c) / f64::from(draws)).collect()
    }

    #[test]
    fn draws_in_proportion() {
        let got = shares(&[1.0, 2.0, 0.0, 5.0], 400_000);
        for (got, want) in got.iter().zip([0.125, 0.25, 0.0, 0.625]) {
            assert!((got - want).abs() < 0.005, "share {got} instead of {want}");
        }
    }

    #[test]
    fn draws_in_proportion_from_many() {
        // Alike but for rounding, and everything between a hundredth and ten times the mean.
        let alike = vec![1.0 / 3.0; 10_000];
        let spread: Vec<f32> = (0..1_000).map(|n| 0.01 * 1.007_f32.powi(n)).collect();
        let one_of_many: Vec<f32> = (0..10_000).map(|n| f32::from(u8::from(n == 77))).collect();
        let full_and_none: Vec<f32> = (0..100).map(|n| (n % 2) as f32).collect();
        for weights in
            [alike, spread, one_of_many, full_and_none, vec![3.0], vec![1e-30, 1e-30], vec![1e30, 3e30]]
        {
            assert_exact(&weights);
        }
    }

    /// Adds up from the columns what a draw gives to each index.
    fn assert_exact(weights: &[f32]) {
        let table = AliasTable::new(weights);
        let sum: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let mut got = vec![0.0_f64; weights.len()];
        for (index, column) in table.columns.iter().enumerate() {
            let own = f64::from(column.threshold) / 4_294_967_296.0;
            got[index] += own;
            got[column.alias as usize] += 1.0 - own;
        }
        for (index, (got, weight)) in got.iter().zip(weights).enumerate() {
            let want = f64::from(*weight) * weights.len() as f64 / sum;
            assert!((got - want).abs() < 1e-3 * want.max(0.1), "{index}: {got} instead of {want}");
        }
    }

    #[test]
    fn nothing_to_draw() {
        assert!(AliasTable::new(&[]).is_empty());
        assert!(AliasTable::new(&[0.0, f32::NAN, -1.0, f32::INFINITY]).is_empty());
    }

    proptest! {
        #[test]
        fn every_index_gets_what_it_weighs(weights in prop::collection::vec(
            prop_oneof![Just(0.0_f32), Just(1.0_f32), 0.001_f32..1000.0], 1..300))
        {
            prop_assume!(weights.iter().any(|weight| *weight > 0.0));
            assert_exact(&weights);
        }

        #[test]
        fn a_weight_of_zero_is_never_drawn(weights in prop::collection::vec(prop_oneof![Just(0.0_f32), 0.001_f32..1000.0], 1..200), seed: u64) {
            let table = AliasTable::new(&weights);
            prop_assume!(!table.is_empty());
            let mut random = Random::new(seed);
            for _ in 0..500 {
                prop_assert!(weights[table.draw(random.next()) as usize] > 0.0);
            }
        }
    }
}
