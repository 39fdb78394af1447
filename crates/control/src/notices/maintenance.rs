//! Unavailability by schedule: resources are told of each one before it begins.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use croner::Cron;

use crate::{Phase, Shared, reached};

/// A clock that was set, or a machine that slept, is noticed within this time.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// When maintenance begins: a schedule as cron has it, in UTC (`minute hour day month weekday`).
#[derive(Debug, Clone)]
pub struct Schedule {
    text: String,
    cron: Cron,
}

/// No schedule: the operator's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a schedule ({why})")]
pub struct ScheduleError {
    text: String,
    why: String,
}

impl FromStr for Schedule {
    type Err = ScheduleError;

    fn from_str(text: &str) -> Result<Self, ScheduleError> {
        let error = |why: String| ScheduleError { text: text.to_owned(), why };
        let cron = Cron::from_str(text).map_err(|why| error(why.to_string()))?;
        let schedule = Self { text: text.to_owned(), cron };
        // The thirtieth of February parses.
        match schedule.next_after(SystemTime::UNIX_EPOCH) {
            Some(_) => Ok(schedule),
            None => Err(error("it never comes".to_owned())),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Schedule {
    /// The first moment after `time`; `None`: there is none.
    pub fn next_after(&self, time: SystemTime) -> Option<SystemTime> {
        let next = self.cron.find_next_occurrence(&DateTime::<Utc>::from(time), false).ok()?;
        Some(next.into())
    }
}

/// One recurring unavailability.
#[derive(Debug, Clone, PartialEq)]
pub struct Maintenance {
    /// When it begins.
    pub schedule: Schedule,
    /// How long it lasts.
    pub lasts: Duration,
    /// How long before it begins resources are told.
    pub notice: Duration,
    /// Control addresses of the balancers that stand in; empty: the general ones.
    pub alternatives: Vec<String>,
    /// Why, for people.
    pub reason: String,
}

/// What is next of one [`Maintenance`].
struct Next {
    begins: SystemTime,
}

impl Next {
    /// What begins after `time`.
    fn after(maintenance: &Maintenance, time: SystemTime) -> Option<Self> {
        maintenance.schedule.next_after(time).map(|begins| Self { begins })
    }

    /// Whether it is time to tell of it. True once.
    fn is_due(&mut self, maintenance: &Maintenance, now: SystemTime) -> Option<SystemTime> {
        let told_at = self.begins.checked_sub(maintenance.notice)?;
        if now < told_at {
            return None;
        }
        let begins = self.begins;
        // After a long sleep the one that was missed is told of while it lasts, and those in between are not.
        self.begins = maintenance.schedule.next_after(begins.max(now))?;
        (now < begins + maintenance.lasts).then_some(begins)
    }
}

/// Tells of each in its time, until the process drains.
pub(crate) async fn run(shared: Arc<Shared>, all: Vec<Maintenance>) {
    let start = SystemTime::now();
    let mut next: Vec<(Maintenance, Next)> = all
        .into_iter()
        .filter_map(|maintenance| {
            // One that goes on while the balancer starts is over for it.
            let next = Next::after(&maintenance, start)?;
            Some((maintenance, next))
        })
        .collect();
    if next.is_empty() {
        return;
    }
    loop {
        let now = SystemTime::now();
        for (maintenance, next) in &mut next {
            let Some(begins) = next.is_due(maintenance, now) else { continue };
            let Maintenance { lasts, alternatives, reason, .. } = &*maintenance;
            if let Err(error) = shared.notices.announce(begins, *lasts, alternatives, reason) {
                tracing::warn!(%error, schedule = %maintenance.schedule, "resources are not told of maintenance");
            }
        }
        let wait = |(maintenance, next): &(Maintenance, Next)| {
            let told_at = next.begins.checked_sub(maintenance.notice)?;
            Some(told_at.duration_since(now).unwrap_or_default())
        };
        let pause = next.iter().filter_map(wait).min().unwrap_or(LOOK_EVERY).min(LOOK_EVERY);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = reached(shared.phase.clone(), Phase::Draining) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SystemTime {
        DateTime::parse_from_rfc3339(text).unwrap().into()
    }

    fn weekly() -> Maintenance {
        Maintenance {
            schedule: "0 3 * * SUN".parse().unwrap(),
            lasts: Duration::from_secs(1800),
            notice: Duration::from_secs(3600),
            alternatives: Vec::new(),
            reason: String::new(),
        }
    }

    #[test]
    fn each_is_told_of_once_and_in_time() {
        let weekly = weekly();
        let mut next = Next::after(&weekly, at("2026-11-25T12:00:00Z")).unwrap();
        assert_eq!(next.is_due(&weekly, at("2026-11-29T01:59:59Z")), None);
        assert_eq!(next.is_due(&weekly, at("2026-11-29T02:00:00Z")), Some(at("2026-11-29T03:00:00Z")));
        assert_eq!(next.is_due(&weekly, at("2026-11-29T02:00:01Z")), None);
        assert_eq!(next.is_due(&weekly, at("2026-12-06T02:30:00Z")), Some(at("2026-12-06T03:00:00Z")));
    }

    #[test]
    fn what_was_slept_through_is_not_told_of() {
        let weekly = weekly();
        let mut next = Next::after(&weekly, at("2026-11-25T12:00:00Z")).unwrap();
        assert_eq!(next.is_due(&weekly, at("2026-12-20T12:00:00Z")), None);
        assert_eq!(next.begins, at("2026-12-27T03:00:00Z"));
        // Half-way through it is.
        assert_eq!(next.is_due(&weekly, at("2026-12-27T03:10:00Z")), Some(at("2026-12-27T03:00:00Z")));
    }

    #[test]
    fn what_is_no_schedule() {
        for wrong in ["", "daily at three", "61 * * * *", "0 0 30 2 *"] {
            assert!(wrong.parse::<Schedule>().is_err(), "{wrong}");
        }
    }
}
