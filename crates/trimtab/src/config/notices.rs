//! `[notices]` and `[[maintenance]]`: what resources are told when the balancer goes away, and when.

use std::time::Duration;

use control::{Maintenance, Schedule, is_control_address};

use super::above_zero;
use super::reader::{Section, text, texts};
use crate::problem::Problem;

/// As long before as a resource may need to be taken elsewhere, and an operator to see it.
const NOTICE_DEFAULT: Duration = Duration::from_secs(600);
/// Entries of `[[maintenance]]`.
const MAINTENANCE_MAX: usize = 32;
const ALTERNATIVES_MAX: usize = 16;

/// What resources are told.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NoticesConfig {
    /// Control addresses of the balancers that stand in for this one.
    pub alternatives: Vec<String>,
    /// When the balancer is away by schedule.
    pub maintenance: Vec<Maintenance>,
}

/// Reads both.
pub(super) fn read(root: &mut Section<'_, '_>) -> NoticesConfig {
    let mut section = root.section("notices");
    let alternatives = alternatives(&mut section);
    section.finish(&[]);
    let mut maintenance = Vec::new();
    root.list("maintenance", |mut section| {
        let schedule = section.required("schedule", "\"0 3 * * SUN\"", text(schedule));
        let lasts = section.required("lasts", "\"30m\"", text(above_zero));
        let notice = super::or(section.value("notice", text(above_zero)), NOTICE_DEFAULT);
        let reason = super::or(section.value("reason", text(reason)), String::new());
        let alternatives = self::alternatives(&mut section);
        section.finish(&[]);
        if let (Some(schedule), Some(lasts)) = (schedule, lasts) {
            maintenance.push(Maintenance {
                schedule: schedule.into_inner(),
                lasts: lasts.into_inner(),
                notice,
                alternatives,
                reason,
            });
        }
    });
    if maintenance.len() > MAINTENANCE_MAX {
        let message = format!("there are {} entries of [[maintenance]]", maintenance.len());
        root.reader().report(0, Problem::new(message, format!("keep it to {MAINTENANCE_MAX}")));
    }
    NoticesConfig { alternatives, maintenance }
}

fn alternatives(section: &mut Section<'_, '_>) -> Vec<String> {
    let read = section.value("alternatives", texts(alternative));
    if let Some(all) = &read
        && all.get_ref().len() > ALTERNATIVES_MAX
    {
        let problem = Problem::new(
            format!("`{}.alternatives`: {} are too many", section.path(), all.get_ref().len()),
            format!("name up to {ALTERNATIVES_MAX}"),
        );
        let at = all.span().start;
        section.reader().report(at, problem);
    }
    super::or(read, Vec::new())
}

fn alternative(text: &str) -> Result<String, Problem> {
    if is_control_address(text) {
        return Ok(text.to_owned());
    }
    let hint = "write the control address of another balancer: \"http://10.0.0.8:7400\"";
    Err(Problem::new(format!("{text:?} is not http://HOST:PORT or https://HOST:PORT"), hint))
}

fn schedule(text: &str) -> Result<Schedule, Problem> {
    text.parse().map_err(|error: control::ScheduleError| {
        let hint = "write minute, hour, day of the month, month and weekday, in UTC: \"0 3 * * SUN\"";
        Problem::new(error.to_string(), hint)
    })
}

fn reason(text: &str) -> Result<String, Problem> {
    if text.len() > 512 {
        return Err(Problem::new("the reason is too long", "keep it to 512 bytes"));
    }
    Ok(text.to_owned())
}
