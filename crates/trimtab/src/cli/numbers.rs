//! Where an agent's numbers come from beside the host, and whom they are served to.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use agent::{NumberSource, ServeConfig};
use clap::Args;
use fetch::{Host, Url};
use formats::{Mapping, RECIPES, recipe};

use super::script::read_mapping;
use crate::config::above_zero;
use crate::failure::Failure;
use crate::problem::{Problem, nearest};
use crate::units::parse_address;

const FROM: &str = "The service's own numbers";
const SERVE: &str = "Serving the numbers to others";

/// `--from-…` and `--serve-…`.
#[derive(Debug, Args)]
pub struct NumbersArgs {
    /// Take numbers from this page at each report interval (1s at least): Prometheus text by --recipe or --mapping, or JSON as
    /// --utilization-file has it. They stand above what is measured.
    #[arg(long, value_name = "URL", value_parser = parse_url, help_heading = FROM)]
    pub from_prometheus: Option<Url>,
    /// What the page is made dimensions by: node_exporter, postgres_exporter or mysqld_exporter.
    #[arg(long, value_name = "NAME", value_parser = parse_recipe, requires = "from_prometheus", conflicts_with = "mapping", help_heading = FROM)]
    pub recipe: Option<Mapping>,
    /// The same, with lines of one's own: `memory = 1 - free_bytes / total_bytes`.
    #[arg(long, value_name = "FILE", requires = "from_prometheus", help_heading = FROM)]
    pub mapping: Option<PathBuf>,
    /// Take numbers from the service's own ORCA stream.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_host_and_port, help_heading = FROM)]
    pub from_orca: Option<String>,
    /// Take numbers from what this shell command prints: JSON as --utilization-file has it.
    #[arg(long, value_name = "COMMAND", help_heading = FROM)]
    pub from_command: Option<String>,
    /// How long the command may take; then it is killed.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = above_zero, help_heading = FROM)]
    pub from_command_timeout: Duration,
    /// Serve ORCA (OpenRcaService) here, for gRPC clients and Envoy.
    #[arg(long, value_name = "IP:PORT", value_parser = parse_listen, help_heading = SERVE)]
    pub serve_orca: Option<SocketAddr>,
    /// Serve HAProxy's agent-check here.
    #[arg(long, value_name = "IP:PORT", value_parser = parse_listen, help_heading = SERVE)]
    pub serve_agent_check: Option<SocketAddr>,
    /// Serve /metrics here, in Prometheus text.
    #[arg(long, value_name = "IP:PORT", value_parser = parse_listen, help_heading = SERVE)]
    pub metrics: Option<SocketAddr>,
}

impl NumbersArgs {
    /// The sources, each above the one before it.
    ///
    /// # Errors
    /// When the mapping cannot be read.
    pub fn sources(&self) -> Result<Vec<NumberSource>, Failure> {
        let mut sources = Vec::new();
        if let Some(url) = &self.from_prometheus {
            let own = self.mapping.as_deref().map(read_mapping).transpose()?;
            // It was parsed when it was read.
            let own = own.and_then(|text| Mapping::parse(&text).ok());
            sources
                .push(NumberSource::Page { url: url.clone(), mapping: own.or_else(|| self.recipe.clone()) });
        }
        if let Some(address) = &self.from_orca {
            sources.push(NumberSource::Orca { address: address.clone() });
        }
        if let Some(command) = &self.from_command {
            let timeout = self.from_command_timeout;
            sources.push(NumberSource::Command { command: command.clone(), timeout });
        }
        Ok(sources)
    }

    /// Where they are served.
    pub fn serve(&self) -> ServeConfig {
        ServeConfig { orca: self.serve_orca, agent_check: self.serve_agent_check, metrics: self.metrics }
    }
}

fn parse_url(text: &str) -> Result<Url, Problem> {
    text.parse().map_err(|error: fetch::UrlError| {
        Problem::new(error.to_string(), "write http://HOST:PORT/PATH, as http://127.0.0.1:9187/metrics")
    })
}

fn parse_recipe(text: &str) -> Result<Mapping, Problem> {
    recipe(text).ok_or_else(|| {
        let names = RECIPES.map(|(name, _)| name);
        let hint = match nearest(text, names) {
            Some(meant) => format!("did you mean {meant}?"),
            None => format!("there are {}; or write a --mapping", names.join(", ")),
        };
        Problem::new(format!("there is no recipe {text:?}"), hint)
    })
}

fn parse_host_and_port(text: &str) -> Result<String, Problem> {
    let parts = text.rsplit_once(':').filter(|(host, _)| Host::parse(host).is_some());
    let port = parts.and_then(|(_, port)| port.parse::<u16>().ok()).filter(|port| *port != 0);
    let wrong = || Problem::new(format!("{text:?} is not HOST:PORT"), "write it as 127.0.0.1:9000");
    port.map(|_| text.to_owned()).ok_or_else(wrong)
}

fn parse_listen(text: &str) -> Result<SocketAddr, Problem> {
    let address = parse_address(text)?;
    if address.port() == 0 {
        let message = format!("{text:?}: nobody would find a port that is any");
        return Err(Problem::new(message, "write the port that others are told"));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        numbers: NumbersArgs,
    }

    fn parsed(flags: &[&str]) -> Result<NumbersArgs, clap::Error> {
        Line::try_parse_from([&["x"], flags].concat()).map(|line| line.numbers)
    }

    #[test]
    fn sources_in_their_order_and_what_is_served() {
        let flags = ["--from-command", "true", "--from-orca", "a:1", "--from-prometheus", "http://a/"];
        let sources =
            parsed(&[&flags[..], &["--recipe", "postgres_exporter"]].concat()).unwrap().sources().unwrap();
        let [
            NumberSource::Page { mapping: Some(_), .. },
            NumberSource::Orca { .. },
            NumberSource::Command { timeout, .. },
        ] = &sources[..]
        else {
            panic!("{sources:?}")
        };
        assert_eq!(*timeout, Duration::from_secs(2));
        assert!(parsed(&[]).unwrap().sources().unwrap().is_empty());
        let serve = parsed(&["--serve-orca", "127.0.0.1:1", "--metrics", "[::]:2"]).unwrap().serve();
        assert_eq!((serve.orca, serve.agent_check), (Some(([127, 0, 0, 1], 1).into()), None));
    }

    #[test]
    fn what_is_no_source_is_refused() {
        for wrong in [
            &["--from-prometheus", "a"][..],
            &["--from-prometheus", "http://a/", "--recipe", "postgres"],
            &["--recipe", "node_exporter"],
            &["--from-orca", "a"],
            &["--from-orca", "a b:1"],
            &["--serve-orca", "127.0.0.1:0"],
            &["--metrics", "9100"],
            &["--from-command-timeout", "0s"],
        ] {
            assert!(parsed(wrong).is_err(), "{wrong:?}");
        }
    }
}
