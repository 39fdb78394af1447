//! From the wire's types to the registry's, and back. Nothing else in control looks into a message.

use std::time::Duration;

use allocation::{IdError, PoolName, ResourceId};
use api::orca::OrcaLoadReport;
use api::v1::{self, Readiness as WireReadiness};
use registry::{
    Labels, LabelsError, RawRegistration, RawUtilization, Readiness, Registration, RegistrationError, Report,
    ResourceState, ResourceStatus, Standing, Utilization, UtilizationError, VersionStatus,
};

use crate::pull::{Script, ScriptError};

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
    #[error("client {0:?} is not an IP address")]
    Client(String),
    #[error(transparent)]
    Requirement(#[from] registry::RequirementError),
    #[error("labels {0}")]
    Labels(#[from] LabelsError),
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    #[error(transparent)]
    Script(#[from] ScriptError),
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
    #[error("labels {0}")]
    Labels(#[from] LabelsError),
}

/// What registers, and its utilization script with the message that it came as.
pub(crate) type Registering = (Registration, Option<(Script, v1::UtilizationScript)>);

pub(crate) fn registration(request: v1::RegisterRequest) -> Result<Registering, MessageError> {
    let resource = request.resource.ok_or(MessageError::NoResource)?;
    let now = chrono::Utc::now();
    let script = resource.utilization_script.map(|wire| {
        let wire = v1::UtilizationScript { status: None, ..wire };
        Script::parse(&wire, now).map(|script| (script, wire))
    });
    let script = script.transpose()?;
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
        probe_address: resource.probe_address,
        notify_url: resource.notify_url,
        pulled_every: script.as_ref().map(|(script, _)| script.when.every(now)),
    };
    Ok((Registration::parse(raw)?, script))
}

pub(crate) fn resource_id(text: &str) -> Result<ResourceId, MessageError> {
    text.parse().map_err(MessageError::Id)
}

pub(crate) fn pool_name(text: &str) -> Result<PoolName, MessageError> {
    text.parse().map_err(MessageError::Pool)
}

pub(crate) fn readiness(wire: i32) -> Result<Readiness, PayloadError> {
    match WireReadiness::try_from(wire) {
        Ok(WireReadiness::Unspecified | WireReadiness::Ready) => Ok(Readiness::Ready),
        Ok(WireReadiness::NotReady) => Ok(Readiness::NotReady),
        Err(_) => Err(PayloadError::Readiness(wire)),
    }
}

/// ORCA's message, unchecked yet.
pub(crate) fn raw_utilization(orca: OrcaLoadReport) -> RawUtilization {
    #[expect(deprecated, reason = "older reporters fill the deprecated field only")]
    let whole_rate = orca.rps as f64;
    RawUtilization {
        cpu: orca.cpu_utilization,
        memory: orca.mem_utilization,
        application: orca.application_utilization,
        dimensions: orca.utilization.into_iter().collect(),
        rate: if orca.rps_fractional == 0.0 { whole_rate } else { orca.rps_fractional },
        errors: orca.eps,
        metrics: orca.named_metrics.into_iter().collect(),
    }
}

pub(crate) fn reported_labels(labels: Option<v1::Labels>) -> Result<Option<Labels>, LabelsError> {
    labels.map(|labels| registry::parse_labels(labels.entries.into_iter().collect())).transpose()
}

/// The report of the resource that the stream is of.
pub(crate) fn report(id: &ResourceId, request: v1::ReportRequest) -> Result<Report, PayloadError> {
    let readiness = readiness(request.readiness)?;
    let orca = request.utilization.ok_or(PayloadError::NoUtilization)?;
    let utilization = Utilization::parse(raw_utilization(orca))?;
    Ok(Report {
        id: id.clone(),
        incarnation: request.incarnation,
        readiness,
        utilization,
        balancers: request.balancers,
        labels: reported_labels(request.labels)?,
    })
}

pub(crate) fn state(state: ResourceState) -> v1::ResourceState {
    match state {
        ResourceState::Ready => v1::ResourceState::Ready,
        ResourceState::Draining => v1::ResourceState::Draining,
        ResourceState::NotReady => v1::ResourceState::NotReady,
        ResourceState::Down => v1::ResourceState::Down,
        ResourceState::Remembered => v1::ResourceState::Remembered,
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
        resource: Some(wire_resource(&status.registration, &status.labels)),
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
        check: None,
    }
}

/// A version beside the others. Negative: nothing to tell from.
pub(crate) fn version_status(status: &VersionStatus) -> v1::VersionStatus {
    let known = |value: Option<f64>| value.unwrap_or(-1.0);
    let totals = &status.totals;
    v1::VersionStatus {
        version: status.version.clone(),
        baseline: status.baseline,
        share_wanted: status.share_wanted,
        share: status.share,
        aborted: status.aborted.clone().unwrap_or_default(),
        resources: status.resources,
        resources_ready: status.resources_ready,
        flows_open: totals.flows_open,
        flows_opened_total: totals.flows_opened,
        connect_failures_total: totals.connect_failures,
        resets_total: totals.resets,
        bytes_to_client_total: totals.bytes_to_client,
        bytes_to_backend_total: totals.bytes_to_backend,
        connect_failure_ratio: known(status.connect_failure_ratio),
        reset_ratio: known(status.reset_ratio),
        connect_seconds: known(status.connect_seconds),
        first_byte_seconds: known(status.first_byte_seconds),
        utilization: known(status.utilization),
        utilization_per_flow: known(status.utilization_per_flow),
        worse_for: status.worse_for.map(wire_duration),
        worse_by: status.worse_by.clone(),
    }
}

fn wire_resource(registration: &Registration, labels: &Labels) -> v1::Resource {
    v1::Resource {
        id: registration.id().to_string(),
        pool: registration.pool().to_string(),
        address: registration.address().to_string(),
        labels: labels.clone().into_iter().collect(),
        version: registration.version().to_owned(),
        flows_max: registration.flows_max(),
        weight: f64::from(registration.weight()),
        probe_address: registration.probe_address().map(|address| address.to_string()).unwrap_or_default(),
        notify_url: registration.notify_url().unwrap_or_default().to_owned(),
        utilization_script: None,
    }
}

pub(crate) fn ratios(utilization: Option<&Utilization>) -> std::collections::HashMap<String, f64> {
    utilization.map(|u| u.ratios().into_iter().collect()).unwrap_or_default()
}
