//! A flow in a simulated world, for many seeds.
//!
//! `SIM_SEED=17 cargo test -p trimtab-flow --test simulation` runs one seed and prints its steps.

mod world;

use flow::CloseReason;
use world::{Entropy, World};

const SEEDS: u64 = 2_000;

#[test]
fn every_order_of_completions_keeps_the_promises() {
    if let Some(seed) = std::env::var("SIM_SEED").ok().and_then(|s| s.parse().ok()) {
        println!("ended: {:?}", World::new(seed, Entropy::of_seed(seed), true).run());
        return;
    }
    let mut seen = std::collections::BTreeMap::new();
    let (mut spliced, mut told) = (0, 0);
    for seed in 0..SEEDS {
        let (reason, spliced_bytes, resets_told) = World::new(seed, Entropy::of_seed(seed), false).run();
        *seen.entry(reason).or_insert(0) += 1;
        spliced += u64::from(spliced_bytes > 0);
        told += u64::from(resets_told > 0);
    }
    assert!(spliced > SEEDS / 20, "{spliced} of {SEEDS} flows were spliced");
    assert!(told > SEEDS / 50, "in {told} of {SEEDS} flows a reset was told by a watch");
    // The sweep is worth something only if it gets everywhere a flow can end by itself.
    for reason in CloseReason::ALL {
        let reachable = reason != CloseReason::Exhausted;
        assert!(!reachable || seen.get(&reason).is_some_and(|n| *n >= 5), "{reason:?}: {seen:?}");
    }
}
