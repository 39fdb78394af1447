//! `trimtab notify`: its flags.

use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};

use super::AdminArgs;
use crate::config::above_zero;
use crate::problem::Problem;
use crate::units::parse_duration;

/// `notify`.
#[derive(Debug, Args)]
pub struct NotifyArgs {
    /// What to say.
    #[command(subcommand)]
    pub what: NotifyCommand,
}

/// What to say.
#[derive(Debug, Subcommand)]
pub enum NotifyCommand {
    /// Warn resources that this balancer will be away; their agents register with the alternatives before.
    Unavailable(UnavailableArgs),
    /// Tell a resource to end: its agent runs --on-notice, deregisters at the time, and ends.
    Shutdown(ShutdownArgs),
    /// Tell a resource to move some of its connections away; its agent runs --on-notice.
    Shed(ShedArgs),
    /// List notices, and who has not taken them.
    List(AdminArgs),
    /// Withdraw a notice, by its id.
    Withdraw(WithdrawArgs),
}

/// `notify unavailable`.
#[derive(Debug, Args)]
pub struct UnavailableArgs {
    /// When it begins: +10m, or a time as 2026-12-24T18:00:00Z.
    #[arg(long, default_value = "+0s", value_name = "TIME", value_parser = parse_time)]
    pub at: SystemTime,
    /// How long it lasts. [default: until it is withdrawn]
    #[arg(long = "for", value_name = "TIME", value_parser = above_zero)]
    pub lasts: Option<Duration>,
    /// The control address of a balancer that stands in. Repeat it for more. [default: those of the configuration]
    #[arg(long, value_name = "URL")]
    pub alternative: Vec<String>,
    /// Only the resources of this pool.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub pool: String,
    /// Why, for people.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub reason: String,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `notify shutdown`.
#[derive(Debug, Args)]
pub struct ShutdownArgs {
    /// The resource, by its id.
    #[arg(required_unless_present = "pool", conflicts_with = "pool")]
    pub id: Option<String>,
    /// All resources of this pool.
    #[arg(long)]
    pub pool: Option<String>,
    /// When: +10m, or a time as 2026-12-24T18:00:00Z.
    #[arg(long, default_value = "+0s", value_name = "TIME", value_parser = parse_time)]
    pub at: SystemTime,
    /// Why, for people.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub reason: String,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `notify shed`.
#[derive(Debug, Args)]
pub struct ShedArgs {
    /// The resource, by its id.
    pub id: String,
    /// How many connections.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub flows: u32,
    /// Why, for people.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub reason: String,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `notify withdraw`.
#[derive(Debug, Args)]
pub struct WithdrawArgs {
    /// The notice, by its id.
    pub notice: String,
    /// Whom to ask and how to print.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `+10m` from now, or a time with its zone (RFC 3339).
fn parse_time(text: &str) -> Result<SystemTime, Problem> {
    if let Some(ahead) = text.strip_prefix('+') {
        return Ok(SystemTime::now() + parse_duration(ahead)?);
    }
    match chrono::DateTime::parse_from_rfc3339(text) {
        Ok(time) => Ok(time.into()),
        Err(error) => Err(Problem::new(
            format!("{text:?} is not a time ({error})"),
            "write +10m for ten minutes from now, or a time with its zone: 2026-12-24T18:00:00Z",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let at =
            |text: &str| parse_time(text).unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(at("2026-12-24T18:00:00Z"), 1_798_135_200);
        assert_eq!(at("2026-12-24T19:00:00+01:00"), 1_798_135_200);
        let ahead = parse_time("+10m").unwrap().duration_since(SystemTime::now()).unwrap();
        assert!((Duration::from_secs(599)..=Duration::from_secs(600)).contains(&ahead));
        for wrong in ["", "tomorrow", "2026-12-24", "2026-12-24T18:00:00", "+", "+10", "-10m"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
