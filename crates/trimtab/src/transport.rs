//! The flags that say how control is reached, and by whom; the same for agents and administrators.

use std::path::PathBuf;

use agent::{Token, TokenSource, Transport};
use clap::Args;

/// A token in the environment; on the command line `ps` would show it to everybody.
const TOKEN_VARIABLE: &str = "TRIMTAB_TOKEN";

/// How to reach control with https://, and what to show there.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "TLS and tokens")]
pub struct TransportArgs {
    /// The CAs that the balancer's certificate may be of (PEM). [default: those of the system]
    #[arg(long, value_name = "FILE", env = "TRIMTAB_CA")]
    pub ca: Option<PathBuf>,
    /// The certificate to show (PEM).
    #[arg(long, value_name = "FILE", env = "TRIMTAB_CERT", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, value_name = "FILE", env = "TRIMTAB_KEY", requires = "cert")]
    pub key: Option<PathBuf>,
    /// The name that the balancer's certificate must have. [default: the host of the URL]
    #[arg(long, value_name = "NAME")]
    pub server_name: Option<String>,
    /// A file with the bearer token to show; it may also be in TRIMTAB_TOKEN. It is read anew for each connection, and
    /// never sent in clear text to another host.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

impl TransportArgs {
    /// What the flags and the environment say.
    pub fn transport(&self) -> Transport {
        let given = || std::env::var(TOKEN_VARIABLE).ok().filter(|token| !token.trim().is_empty());
        let token = match &self.token_file {
            Some(file) => TokenSource::File(file.clone()),
            None => given().map_or(TokenSource::None, |token| TokenSource::Given(Token::new(&token))),
        };
        let identity = self.cert.clone().zip(self.key.clone());
        Transport { ca: self.ca.clone(), identity, server_name: self.server_name.clone(), token }
    }
}
