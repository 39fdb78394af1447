//! What administrators do with bearer tokens, between the wire and the book ([`crate::tokens`]).

use std::time::{Duration, SystemTime};

use api::v1;
use ring::rand::{SecureRandom as _, SystemRandom};
use tonic::Status;

use crate::Shared;
use crate::keeper::not_kept;
use crate::parse;
use crate::registration::invalid;
use crate::security::{Role, UnknownRole};
use crate::tokens::{CreateError, NewToken, SEED_BYTES, TokenId, TokenRecord};

pub(crate) async fn create(
    shared: &Shared,
    request: v1::CreateTokenRequest,
) -> Result<v1::CreateTokenResponse, Status> {
    let new = parse(shared, request)?;
    let mut seed = [0; SEED_BYTES];
    let drawn = SystemRandom::new().fill(&mut seed);
    drawn.map_err(|_| Status::internal("the system gives no random bytes"))?;
    let (role, pools, ttl, uses_max) = (new.role, new.pools.clone(), new.ttl, new.uses_max);
    let (id, secret, writing) = {
        let mut book = shared.security.tokens();
        let made = book.create(new, &seed, SystemTime::now());
        let (id, secret) = made.map_err(|error| match error {
            CreateError::Full => Status::resource_exhausted(error.to_string()),
            CreateError::Collision => Status::unavailable(error.to_string()),
            _ => Status::invalid_argument(error.to_string()),
        })?;
        let change = book.take_token(&id);
        let writing = shared.write_tokens(&mut book, change);
        (id, secret, writing)
    };
    let kept = writing.is_some();
    if let Some(writing) = writing
        && let Err(error) = writing.written().await
    {
        // Nobody has it.
        shared.security.tokens().forget(&id);
        return Err(Status::unavailable(format!("the balancer cannot remember the token: {error}")));
    }
    tracing::info!(token = %id, role = role.name(), ?pools, ?ttl, ?uses_max, "an operator made a token");
    Ok(v1::CreateTokenResponse { id: id.to_string(), token: secret.reveal().to_owned(), kept })
}

fn parse(shared: &Shared, request: v1::CreateTokenRequest) -> Result<NewToken, Status> {
    let role = match request.role.as_str() {
        "" => Role::Resource,
        text => text.parse().map_err(|error: UnknownRole| Status::invalid_argument(error.to_string()))?,
    };
    let pools: Result<Vec<_>, _> = request.pools.iter().map(|pool| parse::pool_name(pool)).collect();
    let pools = pools.map_err(invalid)?;
    let known = shared.registry.pool_names();
    if let Some(unknown) = pools.iter().find(|pool| !known.contains(pool)) {
        return Err(Status::invalid_argument(format!("there is no pool {unknown}")));
    }
    let network = |text: &String| {
        let wrong =
            || Status::invalid_argument(format!("{text:?} is not a network: write 10.0.0.0/8 or an address"));
        crate::security::parse_network(text).ok_or_else(wrong)
    };
    let addresses: Result<Vec<_>, _> = request.addresses.iter().map(network).collect();
    let ttl = request.ttl.map(Duration::try_from).transpose();
    let ttl = ttl.map_err(|_| Status::invalid_argument("ttl is negative"))?.unwrap_or_default();
    let uses_max = (request.uses > 0).then_some(request.uses);
    Ok(NewToken { role, pools, addresses: addresses?, ttl, uses_max })
}

pub(crate) fn list(shared: &Shared) -> v1::ListTokensResponse {
    let now = SystemTime::now();
    let status = |record: &TokenRecord| v1::TokenStatus {
        id: record.id.to_string(),
        role: record.role.name().to_owned(),
        pools: record.pools.iter().map(ToString::to_string).collect(),
        addresses: record.addresses.iter().map(ToString::to_string).collect(),
        created: Some(record.created.into()),
        expires: Some(record.expires.into()),
        uses_max: record.uses_max.unwrap_or(0),
        uses: u32::try_from(record.used_by.len()).unwrap_or(u32::MAX),
        state: record.state(now).to_owned(),
    };
    let records = shared.security.tokens().list();
    v1::ListTokensResponse { tokens: records.iter().map(|record| status(record)).collect() }
}

pub(crate) async fn revoke(
    shared: &Shared,
    request: &v1::RevokeTokenRequest,
) -> Result<v1::RevokeTokenResponse, Status> {
    let unknown = || Status::not_found(format!("there is no token {:?}", request.id));
    let id = TokenId::parse(&request.id).ok_or_else(unknown)?;
    let writing = {
        let mut book = shared.security.tokens();
        if !book.revoke(&id) {
            return Err(unknown());
        }
        let change = book.take_token(&id);
        shared.write_tokens(&mut book, change)
    };
    tracing::info!(token = %id, "an operator revoked a token");
    end_silent(shared, &id);
    if let Some(writing) = writing {
        writing.written().await.map_err(|error| not_kept(&error))?;
    }
    Ok(v1::RevokeTokenResponse {})
}

/// What reports has no report taken any more, and its lease ends. What is only remembered would stay while it answers, and what
/// is asked by a script while that does.
fn end_silent(shared: &Shared, token: &TokenId) {
    let why = "its token was revoked";
    let owner = token.owner();
    for of in shared.registry.unconfirmed() {
        if shared.registry.owner(&of.id).flatten().as_ref() == Some(&owner) {
            shared.remove(&of.id, of.incarnation, why);
        }
    }
    let owned = shared.registry.owned_by(&owner);
    for pulled in owned.iter().filter(|registration| registration.pulled_every().is_some()) {
        shared.remove(pulled.id(), pulled.incarnation(), why);
        shared.puller.forget(&shared.registry, pulled.id());
    }
}
