//! How many flows there may be and how fast, where they wait, where they are kept, and what is written down of them:
//! `[listener.limits]`, `[pool.queue]`, `affinity`, `[access_log]`.

use std::ops::RangeInclusive;
use std::time::Duration;

use dataplane::{AccessLogConfig, AccessLogFormat, AccessLogTo, ListenerLimits, PoolKnobs, QueueKnobs};
use toml::Spanned;

use super::or;
use super::pool::within;
use super::reader::{Section, integer, text};
use crate::problem::Problem;

/// Flows of one client that can be counted.
const FLOWS_PER_CLIENT_MAX: u64 = (1 << 24) - 1;
/// A longer queue is a way to have everybody wait for nothing.
const QUEUE_LENGTH_MAX: u64 = 1_000_000;
const QUEUE_LENGTH_DEFAULT: u32 = 1_000;
const QUEUE_DEADLINE_DEFAULT: Duration = Duration::from_secs(5);
const QUEUE_DEADLINES: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(3_600);
const AFFINITY_DEFAULT: Duration = Duration::from_secs(3_600);
const AFFINITIES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(30 * 24 * 3_600);

/// `[listener.limits]`.
pub(super) fn of_listener(mut section: Section<'_, '_>) -> ListenerLimits {
    let flows = || integer(0..=u64::from(u32::MAX));
    let rate = || integer(0..=u64::from(ListenerLimits::RATE_MAX));
    let limits = ListenerLimits {
        flows: or(section.value("flows", flows()), 0),
        flows_per_client: or(section.value("flows_per_client", integer(0..=FLOWS_PER_CLIENT_MAX)), 0),
        new_flows_per_second: or(section.value("new_flows_per_second", rate()), 0),
        new_flows_per_client_per_second: or(section.value("new_flows_per_client_per_second", rate()), 0),
    };
    section.finish(&[]);
    limits
}

/// What concerns the flows of a pool, in its `[[pool]]`.
pub(super) fn of_pool(section: &mut Section<'_, '_>) -> PoolKnobs {
    let flows_max = or(section.value("flows_max", integer(0..=u64::from(u32::MAX))), 0);
    let affinity = or(section.value("affinity", text(affinity)), false);
    let keeps = section.value("affinity_for", text(within(AFFINITIES)));
    let queue = queue(section.section("queue"));
    PoolKnobs { flows_max, queue, affinity: affinity.then_some(or(keeps, AFFINITY_DEFAULT)) }
}

fn queue(mut section: Section<'_, '_>) -> Option<QueueKnobs> {
    let is_there = section.is_there();
    let queue = QueueKnobs {
        length: or(section.value("length", integer(0..=QUEUE_LENGTH_MAX)), QUEUE_LENGTH_DEFAULT),
        deadline: or(section.value("deadline", text(within(QUEUE_DEADLINES))), QUEUE_DEADLINE_DEFAULT),
    };
    section.finish(&[]);
    // Where nobody may wait, there is no queue.
    (is_there && queue.length > 0).then_some(queue)
}

fn affinity(text: &str) -> Result<bool, Problem> {
    match text {
        "off" => Ok(false),
        "client" => Ok(true),
        _ => Err(Problem::new(format!("there is no affinity {text:?}"), "write \"off\" or \"client\"")),
    }
}

/// `[access_log]`.
pub(super) fn access_log(mut section: Section<'_, '_>) -> Option<AccessLogConfig> {
    let to = section.value("path", text(path)).and_then(Spanned::into_inner);
    let format = or(section.value("format", text(format)), AccessLogFormat::default());
    section.finish(&[]);
    to.map(|to| AccessLogConfig { to, format })
}

fn path(text: &str) -> Result<Option<AccessLogTo>, Problem> {
    Ok(match text {
        "" => None,
        "-" => Some(AccessLogTo::Stdout),
        path => Some(AccessLogTo::File(path.into())),
    })
}

fn format(text: &str) -> Result<AccessLogFormat, Problem> {
    match text {
        "json" => Ok(AccessLogFormat::Json),
        "line" => Ok(AccessLogFormat::Line),
        _ => Err(Problem::new(format!("there is no format {text:?}"), "write \"json\" or \"line\"")),
    }
}
