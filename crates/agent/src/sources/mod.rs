//! The service's own numbers: a page of metrics, a command, an ORCA stream; so that a database's connections or a queue's
//! length become dimensions.
//!
//! * Each source is followed by itself: one that hangs delays no other, and no report.
//! * It stands above what is measured, for as long as it is fresh: what is older than [`AGE_INTERVALS`] intervals (and [`AGE_MIN`])
//!   is left out of reports, and that is said once. An old number is worse than none: it looks like a calm service.

mod command;
mod orca;
mod page;

use std::convert::Infallible;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fetch::Url;
use formats::{Document, Mapping};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::config::AgentConfig;
use crate::said::Said;

/// Intervals that a number may be old.
const AGE_INTERVALS: u32 = 3;
/// And at least this: a source that is asked each second may miss a few.
const AGE_MIN: Duration = Duration::from_secs(5);
/// Sources are asked no more often than this, however often is reported: each costs its service something.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Longest pause between tries.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Where numbers come from.
#[derive(Debug, Clone)]
pub enum NumberSource {
    /// An HTTP(S) page: our JSON document, or Prometheus text where there is a mapping.
    Page {
        /// Where.
        url: Url,
        /// What makes a document of it.
        mapping: Option<Mapping>,
    },
    /// A command of the shell that prints our JSON document.
    Command {
        /// As `sh -c` takes it.
        command: String,
        /// It is killed, with all that it started, when it takes longer.
        timeout: Duration,
    },
    /// The service's own ORCA stream (`OpenRcaService`), `host:port`.
    Orca {
        /// Where.
        address: String,
    },
}

impl NumberSource {
    /// Its name in logs and metrics.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Page { .. } => "prometheus",
            Self::Command { .. } => "command",
            Self::Orca { .. } => "orca",
        }
    }
}

/// What is known of all sources.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    all: Vec<Followed>,
}

#[derive(Debug)]
struct Followed {
    source: NumberSource,
    said: Mutex<Option<Fresh>>,
}

#[derive(Debug)]
struct Fresh {
    document: Document,
    at: Instant,
    until: Instant,
}

impl Sources {
    pub(crate) fn new(sources: &[NumberSource]) -> Self {
        let followed = |source: &NumberSource| Followed { source: source.clone(), said: Mutex::default() };
        Self { all: sources.iter().map(followed).collect() }
    }

    /// What they say, a later one above an earlier one.
    pub(crate) fn at(&self, now: Instant) -> Document {
        let mut all = Document::default();
        for followed in &self.all {
            if let Some(fresh) = followed.said().as_ref().filter(|fresh| now < fresh.until) {
                all.overlay(fresh.document.clone());
            }
        }
        all
    }

    /// Each source's name, and how old its numbers are while they are used.
    pub(crate) fn ages(&self, now: Instant) -> impl Iterator<Item = (&'static str, Option<Duration>)> {
        self.all.iter().map(move |followed| {
            let said = followed.said();
            let fresh = said.as_ref().filter(|fresh| now < fresh.until);
            (followed.source.name(), fresh.map(|fresh| now - fresh.at))
        })
    }

    /// Follows all of them for ever.
    pub(crate) async fn follow(&self, config: &AgentConfig) -> Infallible {
        let interval = config.report_interval.max(INTERVAL_MIN);
        let mut all: Vec<_> = self.all.iter().map(|followed| Box::pin(followed.follow(interval))).collect();
        // They never end; each is looked at whenever any has something to do.
        std::future::poll_fn(move |cx| {
            for one in &mut all {
                let _ = one.as_mut().poll(cx);
            }
            std::task::Poll::Pending
        })
        .await
    }
}

impl Followed {
    fn said(&self) -> MutexGuard<'_, Option<Fresh>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn follow(&self, interval: Duration) -> Infallible {
        let mut log = Log { source: self.source.name(), troubles: Said::default(), failing: false };
        let age_max = (interval * AGE_INTERVALS).max(AGE_MIN);
        let take = |document: Document, keeps: Duration| {
            let at = Instant::now();
            *self.said() = Some(Fresh { document, at, until: at + keeps });
        };
        let mut page = page::Page::new();
        let mut failures = 0;
        loop {
            let started = Instant::now();
            let took = match &self.source {
                NumberSource::Page { url, mapping } => {
                    page.ask(url, mapping.as_ref()).await.map(|document| take(document, age_max))
                }
                NumberSource::Command { command, timeout } => {
                    command::run(command, *timeout).await.map(|document| take(document, age_max))
                }
                NumberSource::Orca { address } => {
                    // Returns when the stream has ended; what came before is known already.
                    // While it is open, the server says how often there is news.
                    let patience = orca::SILENCE_MIN.max(age_max);
                    orca::follow(address, interval, patience, |document| {
                        failures = 0;
                        log.works();
                        take(document, patience);
                    })
                    .await
                }
            };
            match took {
                Ok(()) => {
                    failures = 0;
                    log.works();
                }
                Err(why) => {
                    failures += 1;
                    if let Some(fresh) = self.said().as_mut() {
                        fresh.until = fresh.until.min(Instant::now() + age_max);
                    }
                    log.fails(&why, age_max);
                }
            }
            let pause = interval.saturating_mul(1 << u32::min(failures, 8)).min(PAUSE_MAX).max(interval);
            let pause = if failures > 1 { pause } else { interval };
            sleep_until(started + pause).await;
        }
    }
}

/// Each trouble is said once until the source works again.
struct Log {
    source: &'static str,
    troubles: Said,
    failing: bool,
}

impl Log {
    fn works(&mut self) {
        if self.failing {
            info!(source = self.source, "the service's own numbers come again");
        }
        self.failing = false;
        self.troubles.forget();
    }

    fn fails(&mut self, why: &str, age_max: Duration) {
        self.failing = true;
        if self.troubles.is_new(why) {
            warn!(
                source = self.source,
                why, "no numbers from the service; reports go without them once the last are {age_max:?} old"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_source_stands_above_an_earlier_one_while_it_is_fresh() {
        let command = |text: &str| NumberSource::Command { command: text.into(), timeout: AGE_MIN };
        let sources = Sources::new(&[command("a"), command("b")]);
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let say = |index: usize, text: &str, seconds: u64| {
            let document = Document::parse(text.as_bytes()).unwrap();
            *sources.all[index].said() = Some(Fresh { document, at: start, until: after(seconds) });
        };
        assert!(sources.at(start).is_empty());
        say(0, r#"{"cpu": 0.1, "memory": 0.2}"#, 10);
        say(1, r#"{"cpu": 0.9}"#, 5);
        assert_eq!((sources.at(start).cpu, sources.at(start).memory), (Some(0.9), Some(0.2)));
        assert_eq!(sources.at(after(6)).cpu, Some(0.1));
        let ages: Vec<_> = sources.ages(after(6)).collect();
        assert_eq!(ages, [("command", Some(Duration::from_secs(6))), ("command", None)]);
        assert!(sources.at(after(12)).is_empty());
    }
}
