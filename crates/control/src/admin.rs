//! `AdminService`: what an operator asks of a balancer.

use std::sync::Arc;

use allocation::ResourceId;
use api::v1;
use api::v1::admin_service_server::AdminService;
use registry::{Candidate, Explanation, PoolStatus, ResourceState, UnknownPool, UnknownResource};
use tonic::{Request, Response, Status};

use crate::parse;
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

    fn set_drained(&self, id: &ResourceId, drained: bool) -> Result<u32, Status> {
        let registry = &self.shared.registry;
        let set = if drained { registry.drain(id) } else { registry.ready(id) };
        let flows_open = set.map_err(|error: UnknownResource| Status::not_found(error.to_string()))?;
        self.shared.changed.notify_one();
        tracing::info!(resource = %id, drained, flows_open, "an operator changed whether it gets new flows");
        Ok(flows_open)
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
        let resources = statuses.iter().map(parse::resource_status).collect();
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

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let id = parse::resource_id(&request.into_inner().id).map_err(invalid)?;
        let flows_open = u64::from(self.set_drained(&id, true)?);
        Ok(Response::new(v1::DrainResponse { flows_open }))
    }

    async fn ready(&self, request: Request<v1::ReadyRequest>) -> Result<Response<v1::ReadyResponse>, Status> {
        let id = parse::resource_id(&request.into_inner().id).map_err(invalid)?;
        self.set_drained(&id, false)?;
        Ok(Response::new(v1::ReadyResponse {}))
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let pool = parse::pool_name(&request.into_inner().pool).map_err(invalid)?;
        let shared = &self.shared;
        let explanation = shared.registry.explain(&pool, shared.clock.now()).map_err(unknown_pool)?;
        Ok(Response::new(wire_explanation(&explanation)))
    }

    async fn set_capabilities(
        &self,
        _request: Request<v1::SetCapabilitiesRequest>,
    ) -> Result<Response<v1::SetCapabilitiesResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn list_capabilities(
        &self,
        _request: Request<v1::ListCapabilitiesRequest>,
    ) -> Result<Response<v1::ListCapabilitiesResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn list_versions(
        &self,
        _request: Request<v1::ListVersionsRequest>,
    ) -> Result<Response<v1::ListVersionsResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn set_version_share(
        &self,
        _request: Request<v1::SetVersionShareRequest>,
    ) -> Result<Response<v1::SetVersionShareResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }
}

fn unknown_pool(error: UnknownPool) -> Status {
    Status::not_found(error.to_string())
}

fn wire_pool(status: &PoolStatus, pools: &[Pool]) -> v1::PoolStatus {
    let listeners = pools.iter().find(|pool| pool.name == status.name).map(|pool| pool.listeners.clone());
    v1::PoolStatus {
        name: status.name.to_string(),
        policy: status.policy.to_string(),
        generation: status.generation,
        resources_ready: status.states.of(ResourceState::Ready),
        resources_draining: status.states.of(ResourceState::Draining),
        resources_not_ready: status.states.of(ResourceState::NotReady),
        resources_down: status.states.of(ResourceState::Down),
        flows_open: status.flows_open,
        guard: status.guard.map(|guard| guard.to_string()).unwrap_or_default(),
        listeners: listeners.unwrap_or_default(),
    }
}

fn wire_explanation(explanation: &Explanation) -> v1::ExplainResponse {
    v1::ExplainResponse {
        pool: explanation.pool.to_string(),
        policy: explanation.policy.to_string(),
        generation: explanation.generation,
        guard: explanation.guard.map(|guard| guard.to_string()).unwrap_or_default(),
        candidates: explanation
            .candidates
            .iter()
            .map(|candidate| wire_candidate(candidate, explanation.unit.name()))
            .collect(),
        ..v1::ExplainResponse::default()
    }
}

fn wire_candidate(candidate: &Candidate, rate_unit: &str) -> v1::Candidate {
    v1::Candidate {
        id: candidate.id.to_string(),
        address: candidate.address.to_string(),
        state: parse::state(candidate.standing.state).into(),
        left_out: candidate.left_out.map(|why| why.to_string()).unwrap_or_default(),
        weight: candidate.standing.weight,
        share: candidate.standing.share,
        flows_open: u64::from(candidate.standing.flows_open),
        cost: candidate.cost,
        utilization_ewma: candidate.utilization_ewma,
        rate_ewma: candidate.rate_ewma,
        rate_unit: rate_unit.to_owned(),
        report_age: candidate.report_age.map(parse::wire_duration),
        slow_start: candidate.slow_start,
        notes: candidate.notes.iter().map(ToString::to_string).collect(),
        utilization: parse::ratios(candidate.utilization.as_deref()),
        ..v1::Candidate::default()
    }
}
