//! `AdminService`: what an operator asks of a balancer.

use std::sync::Arc;

use allocation::ResourceId;
use api::v1;
use api::v1::admin_service_server::AdminService;
use registry::{PoolStatus, ResourceState, ShareError, SplitBy, UnknownPool, UnknownResource};
use tonic::{Request, Response, Status};

use crate::explain;
use crate::keeper::Keeper;
use crate::notices::book::BookError;
use crate::notices::{NoticeError, stored};
use crate::parse::{self, MessageError};
use crate::pull::PullRefused;
use crate::registration::invalid;
use crate::{Pool, Shared};

/// The service.
pub(crate) struct Admin {
    shared: Arc<Shared>,
}

impl Admin {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    async fn set_drained(&self, id: &ResourceId, drained: bool) -> Result<u32, Status> {
        let set = self.shared.set_drained(id, drained).await?;
        let flows_open = set.map_err(|error: UnknownResource| Status::not_found(error.to_string()))?;
        tracing::info!(resource = %id, drained, flows_open, "an operator changed whether it gets new flows");
        Ok(flows_open)
    }

    /// A notice to somebody who is not there would be kept for nobody: most likely a slip of the keyboard.
    fn check_target(&self, resource: &str, pool: &str) -> Result<(), Status> {
        let registry = &self.shared.registry;
        if !resource.is_empty() {
            let id = parse::resource_id(resource).map_err(invalid)?;
            registry.pool_of(&id).ok_or_else(|| Status::not_found(UnknownResource(id).to_string()))?;
        }
        if !pool.is_empty() {
            let name = parse::pool_name(pool).map_err(invalid)?;
            let known = registry.pool_names();
            if !known.contains(&name) {
                return Err(unknown_pool(UnknownPool { pool: name, known }));
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn list_resources(
        &self,
        request: Request<v1::ListResourcesRequest>,
    ) -> Result<Response<v1::ListResourcesResponse>, Status> {
        let pool = request.into_inner().pool;
        let pool = if pool.is_empty() { None } else { Some(parse::pool_name(&pool).map_err(invalid)?) };
        let shared = &self.shared;
        let statuses = shared.registry.resources(pool.as_ref(), shared.clock.now()).map_err(unknown_pool)?;
        let mut resources: Vec<_> = statuses.iter().map(parse::resource_status).collect();
        for (wire, status) in resources.iter_mut().zip(&statuses) {
            wire.check = shared.checker.status(status.registration.id());
            if let Some(resource) = &mut wire.resource {
                resource.utilization_script = shared.puller.script(status.registration.id());
            }
        }
        Ok(Response::new(v1::ListResourcesResponse { resources }))
    }

    async fn list_pools(
        &self,
        request: Request<v1::ListPoolsRequest>,
    ) -> Result<Response<v1::ListPoolsResponse>, Status> {
        let v1::ListPoolsRequest {} = request.into_inner();
        let shared = &self.shared;
        let statuses = shared.registry.pools(shared.clock.now());
        let pools = statuses.iter().map(|status| wire_pool(status, &shared.pools)).collect();
        Ok(Response::new(v1::ListPoolsResponse { pools }))
    }

    async fn list_dns(
        &self,
        request: Request<v1::ListDnsRequest>,
    ) -> Result<Response<v1::ListDnsResponse>, Status> {
        let v1::ListDnsRequest {} = request.into_inner();
        Ok(Response::new(crate::dns::list(&self.shared.dns.now())))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let id = parse::resource_id(&request.into_inner().id).map_err(invalid)?;
        let flows_open = u64::from(self.set_drained(&id, true).await?);
        Ok(Response::new(v1::DrainResponse { flows_open }))
    }

    async fn ready(&self, request: Request<v1::ReadyRequest>) -> Result<Response<v1::ReadyResponse>, Status> {
        let id = parse::resource_id(&request.into_inner().id).map_err(invalid)?;
        self.set_drained(&id, false).await?;
        Ok(Response::new(v1::ReadyResponse {}))
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let question = explain::Question::parse(request.into_inner()).map_err(invalid)?;
        explain::answer(&self.shared, &question).map(Response::new)
    }

    async fn set_capabilities(
        &self,
        request: Request<v1::SetCapabilitiesRequest>,
    ) -> Result<Response<v1::SetCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        let id = parse::resource_id(&request.id).map_err(invalid)?;
        let labels = registry::parse_labels(request.labels.into_iter().collect())
            .map_err(|error| invalid(MessageError::Labels(error)))?;
        let set = self.shared.set_capabilities(&id, &labels, &request.remove).await?;
        let (labels, joined) = set.map_err(|error| Status::resource_exhausted(error.to_string()))?;
        tracing::info!(resource = %id, ?labels, joined, "an operator set capabilities");
        Ok(Response::new(v1::SetCapabilitiesResponse { labels: labels.into_iter().collect(), joined }))
    }

    async fn list_capabilities(
        &self,
        request: Request<v1::ListCapabilitiesRequest>,
    ) -> Result<Response<v1::ListCapabilitiesResponse>, Status> {
        let v1::ListCapabilitiesRequest {} = request.into_inner();
        let wire = |(id, labels, joined): (ResourceId, registry::Labels, bool)| v1::Capabilities {
            id: id.to_string(),
            labels: labels.into_iter().collect(),
            joined,
        };
        let capabilities = self.shared.registry.capabilities().into_iter().map(wire).collect();
        Ok(Response::new(v1::ListCapabilitiesResponse { capabilities }))
    }

    async fn list_versions(
        &self,
        request: Request<v1::ListVersionsRequest>,
    ) -> Result<Response<v1::ListVersionsResponse>, Status> {
        let name = parse::pool_name(&request.into_inner().pool).map_err(invalid)?;
        let shared = &self.shared;
        let versions = shared.registry.versions(&name, shared.clock.now()).map_err(unknown_pool)?;
        let split = shared.pools.iter().find(|pool| pool.config.name == name);
        let by = split.and_then(|pool| pool.config.split.as_ref()).map(|split| match split.by() {
            SplitBy::Share => "share",
            SplitBy::Client => "client",
        });
        Ok(Response::new(v1::ListVersionsResponse {
            pool: name.to_string(),
            by: by.unwrap_or_default().to_owned(),
            versions: versions.iter().map(parse::version_status).collect(),
        }))
    }

    async fn set_version_share(
        &self,
        request: Request<v1::SetVersionShareRequest>,
    ) -> Result<Response<v1::SetVersionShareResponse>, Status> {
        let v1::SetVersionShareRequest { pool, version, share } = request.into_inner();
        let name = parse::pool_name(&pool).map_err(invalid)?;
        let set = self.shared.set_version_share(&name, &version, share as f32).await?;
        set.map_err(|error| match error {
            ShareError::UnknownPool(error) => unknown_pool(error),
            ShareError::NotSplit => Status::failed_precondition(error.to_string()),
            ShareError::Split(_) => Status::invalid_argument(error.to_string()),
        })?;
        tracing::info!(pool = %name, version, share, "an operator set a version's share of new flows");
        Ok(Response::new(v1::SetVersionShareResponse {}))
    }

    async fn notify(
        &self,
        request: Request<v1::NotifyRequest>,
    ) -> Result<Response<v1::NotifyResponse>, Status> {
        let shared = &self.shared;
        let request = request.into_inner();
        self.check_target(&request.resource, &request.pool)?;
        let writer = shared.keeper.as_ref().map(Keeper::writer);
        let (id, target, writing) = shared.notices.ask(request, writer).map_err(notice_refused)?;
        stored::settled(shared, writing).await?;
        let resources = shared.registry.names();
        let meant = resources.iter().filter(|(id, pool)| target.is(id, pool)).count();
        Ok(Response::new(v1::NotifyResponse { id, resources: u32::try_from(meant).unwrap_or(u32::MAX) }))
    }

    async fn list_notices(
        &self,
        request: Request<v1::ListNoticesRequest>,
    ) -> Result<Response<v1::ListNoticesResponse>, Status> {
        let v1::ListNoticesRequest {} = request.into_inner();
        Ok(Response::new(v1::ListNoticesResponse { notices: self.shared.notices.list(&self.shared) }))
    }

    async fn withdraw_notice(
        &self,
        request: Request<v1::WithdrawNoticeRequest>,
    ) -> Result<Response<v1::WithdrawNoticeResponse>, Status> {
        let shared = &self.shared;
        let writer = shared.keeper.as_ref().map(Keeper::writer);
        let writing = shared.notices.withdraw(&request.into_inner().id, writer).map_err(book_refused)?;
        stored::settled(shared, writing).await?;
        Ok(Response::new(v1::WithdrawNoticeResponse {}))
    }

    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<v1::PullResponse>, Status> {
        let id = parse::resource_id(&request.into_inner().id).map_err(invalid)?;
        let shared = &self.shared;
        if shared.registry.registered(&id).is_none() {
            return Err(Status::not_found(UnknownResource(id).to_string()));
        }
        let status = shared.puller.ask(&id).await.map_err(|error| match error {
            PullRefused::NoScript => Status::failed_precondition(format!("resource {id}: {error}")),
            PullRefused::Busy => Status::resource_exhausted(format!("resource {id}: {error}")),
            PullRefused::Late => Status::deadline_exceeded(format!("resource {id}: {error}")),
        })?;
        let utilization = parse::ratios(shared.registry.utilization(&id).as_deref());
        Ok(Response::new(v1::PullResponse { status: Some(status), utilization }))
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        crate::token_calls::create(&self.shared, request.into_inner()).await.map(Response::new)
    }

    async fn list_tokens(
        &self,
        request: Request<v1::ListTokensRequest>,
    ) -> Result<Response<v1::ListTokensResponse>, Status> {
        let v1::ListTokensRequest {} = request.into_inner();
        Ok(Response::new(crate::token_calls::list(&self.shared)))
    }

    async fn revoke_token(
        &self,
        request: Request<v1::RevokeTokenRequest>,
    ) -> Result<Response<v1::RevokeTokenResponse>, Status> {
        crate::token_calls::revoke(&self.shared, &request.into_inner()).await.map(Response::new)
    }
}

pub(crate) fn unknown_pool(error: UnknownPool) -> Status {
    Status::not_found(error.to_string())
}

fn notice_refused(error: NoticeError) -> Status {
    match error {
        NoticeError::Book(error) => book_refused(error),
        error => Status::invalid_argument(error.to_string()),
    }
}

fn book_refused(error: BookError) -> Status {
    let message = error.to_string();
    match error {
        BookError::Full => Status::resource_exhausted(message),
        BookError::Unknown(_) => Status::not_found(message),
        BookError::Over(_) => Status::failed_precondition(message),
    }
}

fn wire_pool(status: &PoolStatus, pools: &[Pool]) -> v1::PoolStatus {
    let listeners =
        pools.iter().find(|pool| pool.config.name == status.name).map(|pool| pool.listeners.clone());
    v1::PoolStatus {
        name: status.name.to_string(),
        policy: status.policy.to_string(),
        generation: status.generation,
        resources_ready: status.states.of(ResourceState::Ready),
        resources_draining: status.states.of(ResourceState::Draining),
        resources_not_ready: status.states.of(ResourceState::NotReady),
        resources_down: status.states.of(ResourceState::Down),
        resources_remembered: status.states.of(ResourceState::Remembered),
        flows_open: status.flows_open,
        guard: status.guard.map(|guard| guard.to_string()).unwrap_or_default(),
        listeners: listeners.unwrap_or_default(),
    }
}
