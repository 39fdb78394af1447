//! `trimtab register` and `trimtab deregister`: resources without an agent, whose utilization the balancer fetches.

use std::collections::HashMap;
use std::time::Duration;

use agent::transport::Connection;
use api::v1::registration_service_client::RegistrationServiceClient;
use api::v1::{DeregisterRequest, PullStatus, RegisterRequest, Resource};
use serde::Serialize;
use tonic::{Code, Status};

use crate::admin::{ask, connection, reason, show};
use crate::cli::{AdminArgs, RegisterArgs, ResourceArgs};
use crate::failure::Failure;
use crate::problem::Problem;
use crate::{host_name, sidecar};

/// What `register` registers with: the same again renews, and an agent's (its start's time) replaces it.
const INCARNATION: u64 = 1;

/// What a balancer answered.
#[derive(Debug, Serialize)]
struct Registered {
    id: String,
    created: bool,
    lease_seconds: f64,
    first_pull: Option<PullView>,
}

/// What came of a utilization script, for people and scripts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PullView {
    /// `accepted`, `refused`, `failed`; empty: not executed yet.
    pub result: String,
    /// Why not, or what was noticed.
    pub detail: String,
    /// Since then.
    pub age_seconds: Option<f64>,
    /// Executions in a row that gave no report.
    pub failures_in_a_row: u32,
    /// All of them.
    pub executions_total: u64,
}

impl From<PullStatus> for PullView {
    fn from(status: PullStatus) -> Self {
        let age = status.age.and_then(|age| Duration::try_from(age).ok());
        Self {
            result: status.result,
            detail: status.detail,
            age_seconds: age.map(|age| age.as_secs_f64()),
            failures_in_a_row: status.failures_in_a_row,
            executions_total: status.executions_total,
        }
    }
}

impl PullView {
    /// One line.
    pub fn in_words(&self) -> String {
        let result = if self.result.is_empty() { "not executed yet" } else { &self.result };
        let separator = if self.detail.is_empty() { "" } else { ": " };
        crate::output::printable(&format!("{result}{separator}{}", self.detail))
    }
}

/// `trimtab register`.
///
/// # Errors
/// When what the flags say makes no sense, or the balancer refuses or does not answer.
pub fn register(args: &RegisterArgs) -> Result<(), Failure> {
    let script = args.script.to_wire()?.ok_or_else(|| {
        Failure::Usage(Problem::new(
            "--script is missing: without an agent somebody has to say how busy the resource is",
            "add --script URL, or run `trimtab agent` beside the resource",
        ))
    })?;
    let id =
        args.id.as_ref().map_or_else(|| sidecar::default_id(&host_name(), args.address), ToString::to_string);
    let resource = Resource {
        id: id.clone(),
        pool: args.pool.clone(),
        address: args.address.to_string(),
        labels: args.label.iter().cloned().collect::<HashMap<_, _>>(),
        version: args.version_of_service.clone(),
        flows_max: args.flows_max,
        weight: args.weight,
        probe_address: String::new(),
        utilization_script: Some(script),
        notify_url: args.notify_url.clone(),
    };
    let request =
        RegisterRequest { resource: Some(resource), incarnation: INCARNATION, ..RegisterRequest::default() };
    let control = &args.admin.control;
    let answer = ask(async {
        let answer = connect(&args.admin).await?.register(request).await;
        answer.map_err(|status| failure(control, &status)).map(tonic::Response::into_inner)
    })?;
    let lease = answer.lease.and_then(|lease| Duration::try_from(lease).ok()).unwrap_or_default();
    let registered = Registered {
        id,
        created: answer.created,
        lease_seconds: lease.as_secs_f64(),
        first_pull: answer.first_pull.map(PullView::from),
    };
    show(args.admin.output, &registered, |registered| {
        let done = if registered.created { "registered" } else { "was registered already" };
        let first = registered.first_pull.as_ref();
        let first =
            first.map(|first| format!("utilization script: {}\n", first.in_words())).unwrap_or_default();
        format!("{} {done}; its lease is {lease:?}\n{first}", registered.id)
    })
}

/// `trimtab deregister ID`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn deregister(args: &ResourceArgs) -> Result<(), Failure> {
    let control = &args.admin.control;
    // Whoever registered it, and however late: an operator means it.
    let request = DeregisterRequest { id: args.id.clone(), incarnation: u64::MAX };
    let removed = ask(async {
        let answer = connect(&args.admin).await?.deregister(request).await;
        Ok(answer.map_err(|status| failure(control, &status))?.into_inner().removed)
    })?;
    if !removed {
        let reason = format!("there is no resource {}", args.id);
        return Err(Failure::Refused { control: control.clone(), reason });
    }
    let done = std::collections::BTreeMap::from([("id", args.id.as_str()), ("state", "deregistered")]);
    show(args.admin.output, &done, |_| format!("{} is deregistered\n", args.id))
}

async fn connect(args: &AdminArgs) -> Result<RegistrationServiceClient<Connection>, Failure> {
    connection(args).await.map(RegistrationServiceClient::new)
}

fn failure(control: &str, status: &Status) -> Failure {
    let control = control.to_owned();
    match status.code() {
        Code::Unimplemented | Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Internal => {
            let reason = reason(status);
            Failure::Unreachable { control, reason }
        }
        _ => Failure::Refused { control, reason: status.message().to_owned() },
    }
}
