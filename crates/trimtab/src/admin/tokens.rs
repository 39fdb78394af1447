//! `trimtab token`: make, list and revoke bearer tokens.

use std::time::{Duration, SystemTime};

use api::v1::{CreateTokenRequest, CreateTokenResponse, ListTokensRequest, RevokeTokenRequest, TokenStatus};
use serde::Serialize;

use super::{Admin, ask, show};
use crate::cli::{AdminArgs, TokenArgs, TokenCommand, TokenCreateArgs, TokenRevokeArgs};
use crate::failure::Failure;
use crate::output::Table;
use crate::units::duration_text;

impl Admin {
    /// Makes a token.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn create_token(
        &mut self,
        request: CreateTokenRequest,
    ) -> Result<CreateTokenResponse, Failure> {
        let answer = self.client.create_token(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| self.failure(&status))
    }

    /// Every token that is kept.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn tokens(&mut self) -> Result<Vec<TokenView>, Failure> {
        let answer = self.client.list_tokens(ListTokensRequest {}).await;
        let tokens = answer.map_err(|status| self.failure(&status))?.into_inner().tokens;
        Ok(tokens.into_iter().map(TokenView::from).collect())
    }

    /// Takes a token back.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn revoke_token(&mut self, id: &str) -> Result<(), Failure> {
        let answer = self.client.revoke_token(RevokeTokenRequest { id: id.to_owned() }).await;
        answer.map(|_| ()).map_err(|status| self.failure(&status))
    }
}

/// A token, without its secret.
#[derive(Debug, Clone, Serialize)]
pub struct TokenView {
    /// What it is known by.
    pub id: String,
    /// `resource` or `admin`.
    pub role: String,
    /// `valid`, `expired`, `used up` or `revoked`.
    pub state: String,
    /// The pools that a resource may join by it.
    pub pools: Vec<String>,
    /// Addresses it may register besides its own.
    pub addresses: Vec<String>,
    /// Seconds until it expires; 0: it has.
    pub expires_in_s: u64,
    /// How many resources joined by it, where that is limited.
    pub uses: u32,
    /// How many may; 0: any number.
    pub uses_max: u32,
}

impl From<TokenStatus> for TokenView {
    fn from(status: TokenStatus) -> Self {
        let expires = status.expires.and_then(|expires| SystemTime::try_from(expires).ok());
        let left = expires.and_then(|expires| expires.duration_since(SystemTime::now()).ok());
        Self {
            id: status.id,
            role: status.role,
            state: status.state,
            pools: status.pools,
            addresses: status.addresses,
            expires_in_s: left.map_or(0, |left| left.as_secs()),
            uses: status.uses,
            uses_max: status.uses_max,
        }
    }
}

/// `trimtab token`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn run(args: &TokenArgs) -> Result<(), Failure> {
    match &args.command {
        TokenCommand::Create(args) => create(args),
        TokenCommand::List(args) => list(args),
        TokenCommand::Revoke(args) => revoke(args),
    }
}

fn create(args: &TokenCreateArgs) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Created {
        id: String,
        token: String,
        kept: bool,
    }
    let request = CreateTokenRequest {
        role: args.role.clone(),
        pools: args.pool.clone(),
        addresses: args.address.clone(),
        ttl: prost_types::Duration::try_from(args.ttl).ok(),
        uses: args.uses,
    };
    let made = ask(async { Admin::connect(&args.admin).await?.create_token(request).await })?;
    let created = Created { id: made.id, token: made.token, kept: made.kept };
    if !created.kept {
        // Beside the output, which is the token alone.
        eprintln!("this balancer has no [store]: the token is forgotten when it ends");
    }
    // The token alone, so that `> file` makes what --token-file reads.
    show(args.admin.output, &created, |created| format!("{}\n", created.token))
}

fn list(args: &AdminArgs) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Tokens {
        tokens: Vec<TokenView>,
    }
    let tokens = ask(async { Admin::connect(args).await?.tokens().await })?;
    show(args.output, &Tokens { tokens }, |all| table(&all.tokens))
}

fn table(tokens: &[TokenView]) -> String {
    let mut table = Table::new(&["TOKEN", "ROLE", "STATE", ">EXPIRES IN", ">USES", "POOLS", "ADDRESSES"]);
    for token in tokens {
        let uses = match token.uses_max {
            0 => "-".to_owned(),
            max => format!("{}/{max}", token.uses),
        };
        table.row([
            token.id.clone(),
            token.role.clone(),
            token.state.clone(),
            duration_text(Duration::from_secs(token.expires_in_s)),
            uses,
            token.pools.join(" "),
            token.addresses.join(" "),
        ]);
    }
    table.render()
}

fn revoke(args: &TokenRevokeArgs) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Revoked<'a> {
        id: &'a str,
        state: &'static str,
    }
    ask(async { Admin::connect(&args.admin).await?.revoke_token(&args.id).await })?;
    let revoked = Revoked { id: &args.id, state: "revoked" };
    show(args.admin.output, &revoked, |revoked| {
        format!("{} is revoked: what joined by it may not report any more\n", revoked.id)
    })
}
