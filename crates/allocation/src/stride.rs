//! In turn, in proportion to weights.

/// Largest scaled weight: 16 bits.
const SCALE: u64 = 65_535;
/// Spreads the turns in which backends of like weight are left out.
const OFFSET: u64 = SCALE / 2;
/// No backend waits longer than this many rounds for its turn.
const RATIO_MIN: f64 = 0.01;

/// The static stride scheduler of gRPC (gRFC A58; it replaced a heap behind a lock there): round after round over all, in which
/// a backend of weight `w` is left out so often that it gets `w / greatest` of the rounds. Nothing changes in it: who picks
/// keeps a sequence number. Smoother than drawing at random: in any stretch of `k` turns a backend is off its share by about
/// one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stride {
    weights: Box<[u16]>,
}

impl Stride {
    /// For `weights` in order; weights that are not above 0 are never picked. A weight counts as at most ten times the mean,
    /// which bounds the turns a pick may skip, and as at least a hundredth of it.
    pub fn new(weights: &[f32]) -> Self {
        let usable = |weight: f32| if weight.is_finite() && weight > 0.0 { f64::from(weight) } else { 0.0 };
        let sum: f64 = weights.iter().map(|weight| usable(*weight)).sum();
        let count = weights.iter().filter(|weight| usable(**weight) > 0.0).count();
        if count == 0 {
            return Self::default();
        }
        let mean = sum / count as f64;
        let most = weights.iter().map(|weight| usable(*weight)).fold(0.0, f64::max);
        let most = most.min(mean * f64::from(crate::WEIGHT_RATIO_MAX));
        let least = mean * RATIO_MIN;
        let scaled = |weight: f32| match usable(weight) {
            0.0 => 0,
            weight => (weight.clamp(least.min(most), most) / most * SCALE as f64).round().max(1.0) as u16,
        };
        Self { weights: weights.iter().map(|weight| scaled(*weight)).collect() }
    }

    /// Whether nobody can be picked.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }

    /// The index whose turn it is, with `turn` moved past it.
    ///
    /// # Panics
    /// If nobody can be picked.
    pub fn pick(&self, turn: &mut u32) -> u32 {
        let count = self.weights.len() as u32;
        assert!(count > 0, "somebody has a weight");
        loop {
            let sequence = *turn;
            *turn = turn.wrapping_add(1);
            let (index, round) = (sequence % count, u64::from(sequence / count));
            let weight = u64::from(self.weights[index as usize]);
            let place = (weight * round + u64::from(index) * OFFSET) % SCALE;
            // One with the greatest weight is in every round; of weight 0, in none.
            if weight > 0 && place + weight >= SCALE {
                return index;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counts(weights: &[f32], picks: u32, from: u32) -> Vec<u32> {
        let stride = Stride::new(weights);
        let (mut turn, mut counts) = (from, vec![0; weights.len()]);
        (0..picks).for_each(|_| counts[stride.pick(&mut turn) as usize] += 1);
        counts
    }

    #[test]
    fn alike_weights_are_plain_turns() {
        let stride = Stride::new(&[2.0; 3]);
        let mut turn = 0;
        let picked: Vec<u32> = (0..6).map(|_| stride.pick(&mut turn)).collect();
        assert_eq!(picked, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn turns_are_in_proportion_and_smooth() {
        let got = counts(&[1.0, 2.0, 3.0, 0.0], 6_000, 7);
        for (got, want) in got.iter().zip([1_000, 2_000, 3_000, 0]) {
            assert!(got.abs_diff(want) <= 20, "{got} instead of {want}");
        }
        let short = counts(&[1.0, 2.0, 3.0], 60, 12_345);
        assert!(short.iter().zip([10_u32, 20, 30]).all(|(got, want)| got.abs_diff(want) <= 2), "{short:?}");
    }

    #[test]
    fn nobody_is_picked_from_nobody() {
        assert!(Stride::new(&[0.0, f32::NAN, -1.0]).is_empty());
    }

    proptest! {
        #[test]
        fn shares_follow_weights(weights in prop::collection::vec(0.2_f32..4.0, 1..40), from: u32) {
            let picks = 400 * weights.len() as u32;
            let got = counts(&weights, picks, from);
            let sum: f32 = weights.iter().sum();
            for (got, weight) in got.iter().zip(&weights) {
                let want = picks as f32 * weight / sum;
                prop_assert!((*got as f32 - want).abs() < 0.05 * want + 4.0, "{got} instead of {want}");
            }
        }
    }
}
