//! What the conformance suites have in common: which engine is under test, and waiting.

use std::thread;
use std::time::{Duration, Instant};

use dataplane::Engine;

/// Far longer than a noisy machine needs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The engine that a suite's module is named as: `module_path!()` of it.
pub(crate) fn engine_of(module: &str) -> Engine {
    let name = module.rsplit("::").next().unwrap().replace('_', "-");
    Engine::ALL.into_iter().find(|engine| engine.name() == name).expect("a module named as an engine")
}

/// Waits until the condition holds.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "did not happen within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}
