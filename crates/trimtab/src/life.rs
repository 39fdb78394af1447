//! The life of a process that balances: it runs, it is asked to stop, it drains, it ends.
//!
//! Owns: what the signals mean, and that a worker that fails takes the process down. Does not own: the workers, and
//! how control tells others about the phases.

use std::time::{Duration, Instant};

use dataplane::Dataplane;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::failure::Failure;
use crate::output::print;
use crate::signals::{Asked, Signals};

/// How often it is seen whether a worker or control has failed. Nothing waits for it but the operator.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How soon the end of a drain is seen.
const WATCH_DRAIN_EVERY: Duration = Duration::from_millis(10);
/// What a drain may take beyond its deadline before it counts as stuck: flows are reset by then, at once.
const DRAIN_SLACK: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT, then drains: `draining` is told first. A second signal leaves at once.
///
/// `watch` is asked now and then whether something else has failed.
///
/// # Errors
/// When a worker, or what `watch` looks at, fails; and [`Failure::SecondSignal`].
pub fn run(
    dataplane: Dataplane,
    signals: &mut Signals,
    drain_timeout: Duration,
    mut watch: impl FnMut() -> Result<(), Failure>,
    draining: impl FnOnce(),
) -> Result<(), Failure> {
    loop {
        if wait_for_stop(signals, WATCH_EVERY)?.is_some() {
            break;
        }
        watch()?;
        if dataplane.is_finished() {
            dataplane.join().map_err(|error| Failure::Fault(error.into()))?;
            return Err(Failure::Fault(anyhow::anyhow!("the dataplane ended though nobody asked it to")));
        }
    }
    tracing::info!(?drain_timeout, "stopping: nothing new is accepted, open flows may end");
    draining();
    dataplane.drain(drain_timeout);
    let deadline = Instant::now() + drain_timeout + DRAIN_SLACK;
    while !dataplane.is_finished() {
        if let Some(signal) = wait_for_stop(signals, WATCH_DRAIN_EVERY)? {
            return Err(Failure::SecondSignal(signal));
        }
        if Instant::now() >= deadline {
            return Err(Failure::Fault(anyhow::anyhow!("the dataplane did not end after its drain")));
        }
    }
    dataplane.join().map_err(|error| Failure::Fault(error.into()))
}

/// The signal that asked to stop, if one did.
fn wait_for_stop(signals: &mut Signals, at_most: Duration) -> Result<Option<i32>, Failure> {
    match signals.wait(at_most).map_err(|error| Failure::Fault(error.into()))? {
        Asked::Stop(signal) => return Ok(Some(signal)),
        Asked::Reload => {
            tracing::warn!("SIGHUP: reloading is not supported by this version; restart instead")
        }
        Asked::Nothing => {}
    }
    Ok(None)
}

/// Prints what scripts wait for. Flows are served all the same if nobody reads it.
pub fn announce(lines: &str) {
    if let Err(error) = print(lines) {
        tracing::warn!("{error}; it would say:\n{lines}");
    }
}

/// Takes the signals of this process.
///
/// # Errors
/// When the kernel refuses.
pub fn signals(with_parent: bool) -> Result<Signals, Failure> {
    Signals::install(with_parent)
        .map_err(|error| Failure::start(format!("cannot listen for signals: {error}")))
}

/// Raises the soft limit of descriptors to the hard one: each flow takes two, and the soft one is low for the sake of
/// programs that use `select(2)`.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!("cannot raise the descriptor limit: {error}");
        }
    }
}
