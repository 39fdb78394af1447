//! When a script is executed next.

use std::time::Duration;

use checks::Jitter;
use tokio::time::Instant;

use super::script::When;

/// Longest pause after failures, and longest sleep before the wall clock is looked at again.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// What failures of a script without an interval begin with.
const PAUSE_FIRST: Duration = Duration::from_secs(5);
/// Flows may come by the thousand: executions that they bring about are at least so far apart.
const BY_FLOWS_MIN: Duration = Duration::from_secs(1);

/// The next moments of one script.
#[derive(Debug)]
pub(crate) struct Timing {
    /// `None`: nothing but the schedule, flows or an administrator brings it about.
    due: Option<Instant>,
    /// Not before: it failed, or it was just executed.
    rests_until: Instant,
    failures: u32,
    flows_at: u64,
    jitter: Jitter,
}

impl Timing {
    /// Of a script that is executed at once.
    pub(crate) fn new(now: Instant, flows: u64, seed: u64) -> Self {
        Self { due: Some(now), rests_until: now, failures: 0, flows_at: flows, jitter: Jitter::new(seed) }
    }

    /// It gave a report.
    pub(crate) fn accepted(&mut self, when: &When, now: Instant, flows: u64) {
        self.failures = 0;
        self.flows_at = flows;
        self.due = when.interval.map(|interval| now + interval);
        self.rests_until = now + BY_FLOWS_MIN;
    }

    /// A stream is open: it is only looked at again if nothing comes for `patience`.
    pub(crate) fn streams(&mut self, now: Instant, patience: Duration) {
        self.due = Some(now + patience);
    }

    /// It gave none: the pause doubles with each time in a row.
    pub(crate) fn failed(&mut self, when: &When, now: Instant, flows: u64) {
        self.failures = self.failures.saturating_add(1);
        self.flows_at = flows;
        let pause = self.pause(when.interval.unwrap_or(PAUSE_FIRST));
        self.due = Some(now + pause);
        self.rests_until = now + pause;
    }

    /// With jitter: those that failed together do not come back together.
    fn pause(&mut self, first: Duration) -> Duration {
        let doubled = first.saturating_mul(1 << self.failures.min(16)).min(PAUSE_MAX).max(first);
        doubled.mul_f64(0.5 + self.jitter.part() / 2.0)
    }

    /// Executions in a row that gave nothing.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether the flows given to the resource bring an execution about.
    pub(crate) fn is_due_by_flows(&self, when: &When, now: Instant, flows: u64) -> bool {
        when.after_flows > 0
            && now >= self.rests_until
            && flows.saturating_sub(self.flows_at) >= when.after_flows
    }

    /// When to look again, and whether it is to be executed then. `scheduled`: from `now` to the schedule's next moment.
    pub(crate) fn next(&self, now: Instant, scheduled: Option<Duration>) -> (Instant, bool) {
        let scheduled = scheduled.map(|after| now + after);
        let mut look_again = now + PAUSE_MAX;
        let is_resting = scheduled.is_some_and(|at| at < self.rests_until);
        if is_resting {
            // That moment is passed over; which one is next is seen after the rest.
            look_again = look_again.min(self.rests_until);
        }
        let scheduled = scheduled.filter(|_| !is_resting);
        match [self.due, scheduled].into_iter().flatten().min() {
            Some(at) if at <= look_again => (at, true),
            _ => (look_again, false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn when(interval: Option<Duration>, after_flows: u64) -> When {
        When { interval, schedule: None, after_flows }
    }

    #[tokio::test]
    async fn at_once_then_at_the_interval_and_later_after_failures() {
        let now = Instant::now();
        let every = when(Some(SECOND), 0);
        let mut timing = Timing::new(now, 0, 7);
        assert_eq!(timing.next(now, None), (now, true));
        timing.accepted(&every, now, 0);
        assert_eq!(timing.next(now, None), (now + SECOND, true));
        let mut pauses = Vec::new();
        for _ in 0..10 {
            timing.failed(&every, now, 0);
            pauses.push(timing.next(now, None).0 - now);
        }
        assert!(pauses[0] >= SECOND && pauses[0] <= 2 * SECOND, "{pauses:?}");
        assert!(pauses[2] >= 4 * SECOND && pauses[2] <= 8 * SECOND, "{pauses:?}");
        assert!(pauses[9] >= 30 * SECOND && pauses[9] <= 60 * SECOND, "{pauses:?}");
        assert_eq!(timing.failures(), 10);
        timing.accepted(&every, now, 0);
        assert_eq!((timing.next(now, None), timing.failures()), ((now + SECOND, true), 0));
    }

    #[tokio::test]
    async fn by_schedule_alone() {
        let now = Instant::now();
        let mut timing = Timing::new(now, 0, 7);
        timing.accepted(&when(None, 0), now, 0);
        assert_eq!(timing.next(now, Some(5 * SECOND)), (now + 5 * SECOND, true));
        // A moment within the rest is passed over, not the ones after it.
        assert_eq!(timing.next(now, Some(SECOND / 2)), (now + SECOND, false));
        // A clock that is set meanwhile is noticed.
        assert_eq!(timing.next(now, Some(500 * SECOND)), (now + 60 * SECOND, false));
        timing.failed(&when(None, 0), now, 0);
        let (at, _) = timing.next(now, Some(SECOND));
        assert!(at > now + SECOND && at <= now + 10 * SECOND, "a failure rests, also from its schedule");
    }

    #[tokio::test]
    async fn by_flows() {
        let now = Instant::now();
        let by_flows = when(Some(60 * SECOND), 100);
        let mut timing = Timing::new(now, 5, 7);
        timing.accepted(&by_flows, now, 1_000);
        let later = now + SECOND;
        assert!(!timing.is_due_by_flows(&by_flows, later, 1_099));
        assert!(timing.is_due_by_flows(&by_flows, later, 1_100));
        assert!(!timing.is_due_by_flows(&by_flows, now, 9_999), "not twice within a second");
        timing.failed(&by_flows, later, 1_100);
        assert!(!timing.is_due_by_flows(&by_flows, later + SECOND, 9_999), "it rests");
        assert!(!timing.is_due_by_flows(&when(None, 0), later + 100 * SECOND, 9_999));
    }
}
