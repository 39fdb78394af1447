//! `[control.pull]`: how utilization scripts are executed.

use std::path::PathBuf;
use std::str::FromStr as _;

use control::{Allowed, PullConfig};
use toml::Spanned;

use super::reader::{Section, integer, text, texts};
use crate::problem::Problem;

/// A connection and 64 KiB each.
const AT_ONCE_MAX: u64 = 1024;

pub(super) fn read(mut section: Section<'_, '_>) -> PullConfig {
    let default = PullConfig::default();
    let allow = section.value("allow", texts(allowed)).map_or(default.allow, Spanned::into_inner);
    let at_once = section.value("at_once", integer(1..=AT_ONCE_MAX));
    let at_once = at_once.map_or(default.at_once, Spanned::into_inner);
    let ca = section.value("ca", text(ca)).and_then(Spanned::into_inner);
    section.finish(&[]);
    PullConfig { allow, at_once, ca }
}

fn allowed(text: &str) -> Result<Allowed, Problem> {
    Allowed::from_str(text).map_err(|error| {
        Problem::new(
            error.to_string(),
            "write networks, addresses or host names: [\"10.0.0.0/8\", \"metrics.example\"]",
        )
    })
}

fn ca(text: &str) -> Result<Option<PathBuf>, Problem> {
    Ok((!text.is_empty()).then(|| PathBuf::from(text)))
}
