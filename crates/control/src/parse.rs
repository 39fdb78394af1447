//! From the wire's types to the registry's, and back. Nothing else in control looks into a message.

use std::time::Duration;

use allocation::{IdError, PoolName, ResourceId};
use api::v1::{self, Readiness as WireReadiness};
use registry::{
    RawRegistration, RawUtilization, Readiness, Registration, RegistrationError, Report, ResourceState,
    ResourceStatus, Standing, Utilization, UtilizationError,
};

/// Why a message was refused before the registry saw it. Always the fault of whoever sent it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MessageError {
    #[error("resource is missing: say what registers")]
    NoResource,
    #[error("report_interval is negative")]
    NegativeInterval,
    #[error("id {0}")]
    Id(#[source] IdError),
    #[error("pool {0}")]
    Pool(#[source] IdError),
    #[error(transparent)]
    Registration(#[from] RegistrationError),
}

/// Why the payload of a report was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PayloadError {
    #[error("utilization is missing: a report carries the full state")]
    NoUtilization,
    #[error("readiness {0} is none that this version knows")]
    Readiness(i32),
    #[error(transparent)]
    Utilization(#[from] UtilizationError),
}

pub(crate) fn registration(request: v1::RegisterRequest) -> Result<Registration, MessageError> {
    let resource = request.resource.ok_or(MessageError::NoResource)?;
    let interval = request.report_interval.map(Duration::try_from).transpose();
    let raw = RawRegistration {
        id: resource.id,
        pool: resource.pool,
        address: resource.address,
        incarnation: request.incarnation,
        labels: resource.labels.into_iter().collect(),
        version: resource.version,
        flows_max: resource.flows_max,
        weight: resource.weight,
        report_interval: interval.map_err(|_| MessageError::NegativeInterval)?,
    };
    Ok(Registration::parse(raw)?)
}

pub(crate) fn resource_id(text: &str) -> Result<ResourceId, MessageError> {
    text.parse().map_err(MessageError::Id)
}

pub(crate) fn pool_name(text: &str) -> Result<PoolName, MessageError> {
    text.parse().map_err(MessageError::Pool)
}

/// The report of the resource that the stream is of.
pub(crate) fn report(id: &ResourceId, request: v1::ReportRequest) -> Result<Report, PayloadError> {
    let readiness = match WireReadiness::try_from(request.readiness) {
        Ok(WireReadiness::Unspecified | WireReadiness::Ready) => Readiness::Ready,
        Ok(WireReadiness::NotReady) => Readiness::NotReady,
        Err(_) => return Err(PayloadError::Readiness(request.readiness)),
    };
    let orca = request.utilization.ok_or(PayloadError::NoUtilization)?;
    #[expect(deprecated, reason = "older reporters fill the deprecated field only")]
    let whole_rate = orca.rps as f64;
    let raw = RawUtilization {
        cpu: orca.cpu_utilization,
        memory: orca.mem_utilization,
        application: orca.application_utilization,
        dimensions: orca.utilization.into_iter().collect(),
        rate: if orca.rps_fractional == 0.0 { whole_rate } else { orca.rps_fractional },
        errors: orca.eps,
        metrics: orca.named_metrics.into_iter().collect(),
    };
    let utilization = Utilization::parse(raw)?;
    Ok(Report { id: id.clone(), incarnation: request.incarnation, readiness, utilization })
}

pub(crate) fn state(state: ResourceState) -> v1::ResourceState {
    match state {
        ResourceState::Ready => v1::ResourceState::Ready,
        ResourceState::Draining => v1::ResourceState::Draining,
        ResourceState::NotReady => v1::ResourceState::NotReady,
        ResourceState::Down => v1::ResourceState::Down,
    }
}

pub(crate) fn ack(sequence: u64, standing: &Standing, refused: String) -> v1::Ack {
    v1::Ack {
        sequence,
        state: state(standing.state).into(),
        weight: standing.weight,
        share: standing.share,
        flows_open: u64::from(standing.flows_open),
        refused,
    }
}

/// A span of ours: never too long for the wire.
pub(crate) fn wire_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(duration).unwrap_or_default()
}

pub(crate) fn resource_status(status: &ResourceStatus) -> v1::ResourceStatus {
    v1::ResourceStatus {
        resource: Some(wire_resource(&status.registration)),
        incarnation: status.registration.incarnation(),
        state: state(status.standing.state).into(),
        weight: status.standing.weight,
        share: status.standing.share,
        flows_open: u64::from(status.standing.flows_open),
        flows_opened_total: status.flows_opened,
        connect_failures_total: status.connect_failures,
        report_age: status.report_age.map(wire_duration),
        utilization: ratios(status.utilization.as_deref()),
        lease_left: Some(wire_duration(status.lease_left)),
        reports_refused_total: status.reports_refused,
    }
}

fn wire_resource(registration: &Registration) -> v1::Resource {
    v1::Resource {
        id: registration.id().to_string(),
        pool: registration.pool().to_string(),
        address: registration.address().to_string(),
        labels: registration.labels().clone().into_iter().collect(),
        version: registration.version().to_owned(),
        flows_max: registration.flows_max(),
        weight: f64::from(registration.weight()),
        probe_address: String::new(),
    }
}

pub(crate) fn ratios(utilization: Option<&Utilization>) -> std::collections::HashMap<String, f64> {
    utilization.map(|u| u.ratios().into_iter().collect()).unwrap_or_default()
}
