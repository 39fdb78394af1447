//! `--script` and what belongs to it: how a balancer is to fetch a resource's utilization.

use std::path::{Path, PathBuf};
use std::time::Duration;

use api::v1::http_script::Mapping;
use api::v1::utilization_script::Kind;
use api::v1::{AgentCheckScript, HttpScript, OrcaScript, UtilizationScript};
use clap::Args;

use crate::failure::Failure;
use crate::problem::Problem;
use crate::units::parse_duration;

const HEADING: &str = "Utilization script";

/// `--script …`.
#[derive(Debug, Args)]
pub struct ScriptArgs {
    /// Have the balancer fetch the utilization: http(s)://HOST:PORT/PATH, orca://HOST:PORT or agent-check://HOST:PORT.
    ///
    /// http(s) returns JSON as --utilization-file has it, or Prometheus text with --script-recipe or --script-mapping; orca is
    /// ORCA's OpenRcaService (out of band); agent-check is HAProxy's. HOST must be the resource's own, unless the balancer's
    /// configuration allows others.
    #[arg(long, value_name = "URL", help_heading = HEADING)]
    pub script: Option<String>,
    /// What the page of metrics is made dimensions by: node_exporter, postgres_exporter or mysqld_exporter.
    #[arg(long, value_name = "NAME", requires = "script", conflicts_with = "script_mapping", help_heading = HEADING)]
    pub script_recipe: Option<String>,
    /// The same, with lines of one's own: `memory = 1 - free_bytes / total_bytes`.
    #[arg(long, value_name = "FILE", requires = "script", help_heading = HEADING)]
    pub script_mapping: Option<PathBuf>,
    /// What to send to an agent-check first.
    #[arg(long, value_name = "TEXT", requires = "script", help_heading = HEADING)]
    pub script_send: Option<String>,
    /// Fetch so often; 1s to 1h. [default: 10s, where there is no schedule]
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "script", help_heading = HEADING)]
    pub script_interval: Option<Duration>,
    /// Fetch at these times, in UTC, as cron has them: "*/5 * * * *", or with seconds first.
    #[arg(long, value_name = "CRON", requires = "script", help_heading = HEADING)]
    pub script_schedule: Option<String>,
    /// Fetch whenever the resource was given so many connections; 0: not so.
    #[arg(long, default_value_t = 0, value_name = "N", requires = "script", help_heading = HEADING)]
    pub script_after_flows: u64,
}

impl ScriptArgs {
    /// What to register; `None`: no script.
    ///
    /// # Errors
    /// When the URL is none of these, options do not go together, or the mapping cannot be read.
    pub fn to_wire(&self) -> Result<Option<UtilizationScript>, Failure> {
        let Some(script) = &self.script else { return Ok(None) };
        let hint = "write http://HOST:PORT/PATH, https://…, orca://HOST:PORT or agent-check://HOST:PORT";
        let usage = |message: String, hint: &str| Failure::Usage(Problem::new(message, hint));
        let mapped = self.script_recipe.is_some() || self.script_mapping.is_some();
        let kind = match script.split_once("://") {
            Some(("http" | "https", _)) => {
                Kind::Http(HttpScript { url: script.clone(), mapping: self.mapping()? })
            }
            Some(("orca" | "agent-check", _)) if mapped => {
                let message = "--script-recipe and --script-mapping are for http and https".to_owned();
                return Err(usage(message, "leave them out"));
            }
            Some(("orca", address)) => Kind::Orca(OrcaScript { address: address.to_owned() }),
            Some(("agent-check", address)) => {
                let send = self.script_send.clone().map(|text| text + "\n").unwrap_or_default();
                Kind::AgentCheck(AgentCheckScript { address: address.to_owned(), send })
            }
            _ => return Err(usage(format!("{script:?} is no utilization script"), hint)),
        };
        if self.script_send.is_some() && !matches!(kind, Kind::AgentCheck(_)) {
            return Err(usage("--script-send is for agent-check".to_owned(), "leave it out"));
        }
        Ok(Some(UtilizationScript {
            kind: Some(kind),
            interval: self
                .script_interval
                .and_then(|interval| prost_types::Duration::try_from(interval).ok()),
            schedule: self.script_schedule.clone().unwrap_or_default(),
            after_flows: self.script_after_flows,
            status: None,
        }))
    }

    fn mapping(&self) -> Result<Option<Mapping>, Failure> {
        if let Some(recipe) = &self.script_recipe {
            return Ok(Some(Mapping::Recipe(recipe.clone())));
        }
        self.script_mapping.as_deref().map(read_mapping).transpose().map(|lines| lines.map(Mapping::Lines))
    }
}

/// A file of lines `key = expression` that are in order.
///
/// # Errors
/// When it cannot be read, or a line is wrong.
pub fn read_mapping(path: &Path) -> Result<String, Failure> {
    let read = std::fs::read_to_string(path);
    let text = read.map_err(|error| Failure::start(format!("{}: {error}", path.display())))?;
    let parsed = formats::Mapping::parse(&text);
    let wrong = |error| {
        Failure::Usage(Problem::new(
            format!("{}: {error}", path.display()),
            "a line is key = expression, as memory = 1 - free_bytes / total_bytes",
        ))
    };
    parsed.map_err(wrong)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        script: ScriptArgs,
    }

    fn parsed(flags: &[&str]) -> Result<Option<UtilizationScript>, Failure> {
        let line = Line::try_parse_from([&["x"], flags].concat());
        line.unwrap_or_else(|error| panic!("{error}")).script.to_wire()
    }

    #[test]
    fn what_is_written_is_what_is_registered() {
        assert!(parsed(&[]).unwrap().is_none());
        let http = parsed(&["--script", "https://a/m", "--script-recipe", "node_exporter"]).unwrap().unwrap();
        let Some(Kind::Http(http)) = http.kind else { panic!("{http:?}") };
        assert_eq!(http.mapping, Some(Mapping::Recipe("node_exporter".into())));
        let flags = ["--script", "agent-check://[::1]:9", "--script-send", "hi", "--script-interval", "2s"];
        let check =
            parsed(&[&flags[..], &["--script-schedule", "* * * * *", "--script-after-flows", "5"]].concat());
        let check = check.unwrap().unwrap();
        assert_eq!((check.after_flows, check.schedule.as_str()), (5, "* * * * *"));
        assert_eq!(check.interval.map(|interval| interval.seconds), Some(2));
        let Some(Kind::AgentCheck(check)) = check.kind else { panic!("{check:?}") };
        assert_eq!((check.address.as_str(), check.send.as_str()), ("[::1]:9", "hi\n"));
        let orca = parsed(&["--script", "orca://a:1"]).unwrap().unwrap();
        assert_eq!(orca.kind, Some(Kind::Orca(OrcaScript { address: "a:1".into() })));
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for wrong in [
            &["--script", "ftp://a"][..],
            &["--script", "10.0.0.1:9100"],
            &["--script", "orca://a:1", "--script-recipe", "node_exporter"],
            &["--script", "http://a/", "--script-send", "x"],
        ] {
            assert_eq!(parsed(wrong).unwrap_err().code(), 64, "{wrong:?}");
        }
        let unread = parsed(&["--script", "http://a/", "--script-mapping", "/nonexistent"]).unwrap_err();
        assert_eq!(unread.code(), 71);
        for alone in ["--script-recipe", "--script-interval"] {
            assert!(Line::try_parse_from(["x", alone, "1s"]).is_err(), "{alone}");
        }
    }
}
