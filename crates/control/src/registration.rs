//! `RegistrationService`: resources join, report and leave.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use allocation::{ResourceId, Timestamp};
use api::v1;
use api::v1::registration_service_server::RegistrationService;
use api::v1::report_response::Event;
use registry::{DeregisterError, RegisterError, ReportError};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::beneath::BeneathError;
use crate::metrics::ReportResult;
use crate::parse::{self, MessageError};
use crate::pull::Puller;
use crate::security::{self, Caller, Reason, Refusal};
use crate::{Phase, Shared, reached};

/// Events to one resource that wait for it to read them. A resource that reads nothing is not read from either.
const EVENTS_MAX: usize = 4;
/// The first report of a stream must come within this time.
const FIRST_REPORT_WITHIN: Duration = Duration::from_secs(10);
/// How often a quiet stream is checked for a resource that is not registered any more.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// Reports a second that one stream may send for long; the shortest interval makes 10.
const RATE_MAX: u64 = 20;
/// Reports that it may send at once.
const BURST_MAX: u64 = 40;

/// The service.
pub(crate) struct Registrar {
    shared: Arc<Shared>,
}

impl Registrar {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

#[tonic::async_trait]
impl RegistrationService for Registrar {
    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let caller = security::caller(&request)?;
        let shared = &self.shared;
        shared.security.may_register_now(&caller).await?;
        let mut request = request.into_inner();
        let beneath = std::mem::take(&mut request.beneath);
        let (registration, script) = parse::registration(request).map_err(invalid)?;
        shared.reserved.refuse(registration.id())?;
        let joining = shared.security.may_register(&caller, &registration, &shared.registry)?;
        let registration = registration.owned_by(joining.owner());
        if let Some((script, _)) = &script {
            let judged = shared.puller.judge(&registration, script);
            judged.map_err(|error| Status::permission_denied(error.to_string()))?;
        }
        let followed = registration.clone();
        let (id, pool, address) =
            (registration.id().clone(), registration.pool().clone(), registration.address());
        shared.say_beneath(&id, beneath)?;
        shared.keep_use(&joining).await?;
        let refused = |error| register_refused(shared, &caller, error);
        let registered =
            shared.register(registration, script.as_ref().map(|(_, wire)| wire), refused).await?;
        joining.joined();
        if registered.created {
            shared.metrics.registered();
            tracing::info!(resource = %id, %pool, %address, "registered");
        }
        let first_pull = Puller::follow(shared, followed, script).await;
        Ok(Response::new(v1::RegisterResponse {
            balancer_id: shared.balancer_id.clone(),
            lease: Some(parse::wire_duration(registered.lease)),
            created: registered.created,
            first_pull,
        }))
    }

    type ReportStream = Pin<Box<dyn Stream<Item = Result<v1::ReportResponse, Status>> + Send>>;

    async fn report(
        &self,
        request: Request<Streaming<v1::ReportRequest>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let caller = security::caller(&request)?;
        let open = self.shared.security.stream(&caller)?;
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let shared = Arc::clone(&self.shared);
        // A task of its own, so that a report is taken in when it comes and not when its ack is asked for. It ends with
        // the stream, in either direction, and with the process.
        tokio::spawn(async move {
            let _counted_until_it_ends = open;
            let requests = request.into_inner();
            let stream = Reports { shared: &shared, caller: &caller, requests, events: events.clone() };
            let ended = tokio::select! {
                ended = stream.run() => ended,
                () = events.closed() => Ok(()),
                () = reached(shared.phase.clone(), Phase::Terminated) => {
                    Err(Status::unavailable("the balancer has ended"))
                }
            };
            if let Err(status) = ended {
                // No room: the peer does not read, and learns of the end by the connection's.
                let _ = events.try_send(Err(status));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn deregister(
        &self,
        request: Request<v1::DeregisterRequest>,
    ) -> Result<Response<v1::DeregisterResponse>, Status> {
        let caller = security::caller(&request)?;
        let request = request.into_inner();
        let id = parse::resource_id(&request.id).map_err(invalid)?;
        self.shared.reserved.refuse(&id)?;
        let shared = &self.shared;
        let owner = caller.ends(&id, &shared.registry);
        let refused = |error| match error {
            DeregisterError::OlderIncarnation { .. } => Status::aborted(error.to_string()),
            DeregisterError::OtherOwner { .. } => {
                shared.security.refuse(&caller, &Refusal::new(Reason::Id, error.to_string()))
            }
        };
        let removed = shared.deregister(owner.as_ref(), &id, request.incarnation, refused).await?;
        if removed {
            self.shared.puller.forget(&self.shared.registry, &id);
            tracing::info!(resource = %id, "deregistered");
        }
        Ok(Response::new(v1::DeregisterResponse { removed }))
    }
}

/// One report stream.
struct Reports<'a> {
    shared: &'a Shared,
    caller: &'a Caller,
    requests: Streaming<v1::ReportRequest>,
    events: mpsc::Sender<Result<v1::ReportResponse, Status>>,
}

impl Reports<'_> {
    /// Takes reports until the peer ends the stream.
    ///
    /// # Errors
    /// What the stream is to be ended with.
    async fn run(mut self) -> Result<(), Status> {
        let late = |_| Status::deadline_exceeded("no report came on this stream");
        let Some(first) = timeout(FIRST_REPORT_WITHIN, self.requests.message()).await.map_err(late)?? else {
            return Ok(());
        };
        let id = parse::resource_id(&first.id).map_err(invalid)?;
        self.shared.reserved.refuse(&id)?;
        let incarnation = first.incarnation;
        self.shared.security.may_report(self.caller, &id, &self.shared.registry)?;
        let mut rate = Rate::new(self.shared.clock.now());
        let mut notices = self.shared.notices.changes();
        // What holds already is told as well, once the resource is known to be registered.
        notices.mark_changed();
        let mut said = HashSet::new();
        let mut next = Some(first);
        loop {
            if let Some(request) = next.take() {
                self.may_go_on(&id, &mut rate)?;
                let ack = self.take_report(&id, incarnation, request)?;
                self.send(Event::Ack(ack)).await?;
            }
            tokio::select! {
                // `message` may be dropped half-way: what has come stays in the stream.
                message = self.requests.message() => match message? {
                    Some(request) => next = Some(request),
                    None => return Ok(()),
                },
                changed = notices.changed() => {
                    changed.map_err(|_| Status::unavailable("the balancer has ended"))?;
                    self.tell(&id, &mut said).await?;
                }
                () = tokio::time::sleep(CHECK_EVERY) => {
                    self.shared.security.still_holds(self.caller)?;
                    self.shared.registry.standing(&id, incarnation, self.shared.clock.now()).map_err(report_refused)?;
                }
            }
        }
    }

    /// Tells the resource what it has not been told on this stream.
    async fn tell(&self, id: &ResourceId, said: &mut HashSet<String>) -> Result<(), Status> {
        let Some(pool) = self.shared.registry.pool_of(id) else { return Ok(()) };
        for notice in self.shared.notices.tell(id, &pool, said) {
            self.send(Event::Notice(notice)).await?;
        }
        Ok(())
    }

    /// Whether the peer may make one more report. In clear text, nobody's rights change meanwhile.
    fn may_go_on(&self, id: &ResourceId, rate: &mut Rate) -> Result<(), Status> {
        let Shared { security, registry, clock, .. } = self.shared;
        rate.take(clock.now()).map_err(|refusal| security.refuse(self.caller, &refusal))?;
        if self.caller.is_known() {
            security.still_holds(self.caller)?;
            security.may_report(self.caller, id, registry)?;
        }
        Ok(())
    }

    /// One report's ack.
    ///
    /// # Errors
    /// What the stream is to be ended with. A report that is only wrong does not end it.
    fn take_report(
        &self,
        id: &ResourceId,
        incarnation: u64,
        mut request: v1::ReportRequest,
    ) -> Result<v1::Ack, Status> {
        let Shared { registry, metrics, clock, changed, .. } = self.shared;
        if request.id != id.as_str() || request.incarnation != incarnation {
            metrics.reported(ReportResult::Unknown);
            return Err(Status::invalid_argument(format!(
                "this stream reports for {id} with incarnation {incarnation}: open another for another"
            )));
        }
        let sequence = request.sequence;
        let beneath = std::mem::take(&mut request.beneath);
        if !(beneath.is_empty() && self.shared.beneath.is_empty()) {
            self.shared.say_beneath(id, beneath).inspect_err(|_| {
                // It would get flows for as long as its lease lasts.
                self.shared.remove(id, incarnation, "a balancer beneath it is above us");
            })?;
        }
        if !request.notices_taken.is_empty() {
            let (taken, failed) = self.shared.notices.took(id, std::mem::take(&mut request.notices_taken));
            metrics.notices_taken(taken, failed);
        }
        if request.utilization.is_none()
            && let Some(standing) = self.take_renewal(id, &request)?
        {
            return Ok(parse::ack(sequence, &standing, String::new()));
        }
        match parse::report(id, request) {
            Ok(report) => {
                let standing = registry.report(report, clock.now()).map_err(|error| {
                    metrics.reported(ReportResult::Unknown);
                    report_refused(error)
                })?;
                metrics.reported(ReportResult::Accepted);
                changed.notify_one();
                Ok(parse::ack(sequence, &standing, String::new()))
            }
            Err(error) => {
                metrics.reported(ReportResult::Refused);
                let standing =
                    registry.report_refused(id, incarnation, clock.now()).map_err(report_refused)?;
                tracing::debug!(resource = %id, %error, "report refused");
                Ok(parse::ack(sequence, &standing, error.to_string()))
            }
        }
    }

    /// A report without utilization, of a resource whose utilization is pulled; `None`: it is no such one, or it is wrong.
    fn take_renewal(
        &self,
        id: &ResourceId,
        request: &v1::ReportRequest,
    ) -> Result<Option<registry::Standing>, Status> {
        let Shared { registry, metrics, clock, changed, puller, .. } = self.shared;
        let (Ok(readiness), Ok(labels)) =
            (parse::readiness(request.readiness), parse::reported_labels(request.labels.clone()))
        else {
            return Ok(None);
        };
        let Some(renewal) = puller.renewal(id, request.incarnation, readiness, labels) else {
            return Ok(None);
        };
        let standing = registry.renew(renewal, clock.now()).map_err(|error| {
            metrics.reported(ReportResult::Unknown);
            report_refused(error)
        })?;
        metrics.reported(ReportResult::Accepted);
        changed.notify_one();
        Ok(Some(standing))
    }

    async fn send(&self, event: Event) -> Result<(), Status> {
        let response = v1::ReportResponse { event: Some(event) };
        self.events.send(Ok(response)).await.map_err(|_| Status::cancelled("the resource hung up"))
    }
}

/// A bucket of reports that fills with time.
struct Rate {
    /// In thousandths of a report: what one millisecond at one a second brings.
    left: u64,
    at: Timestamp,
}

impl Rate {
    fn new(now: Timestamp) -> Self {
        Self { left: BURST_MAX * 1_000, at: now }
    }

    fn take(&mut self, now: Timestamp) -> Result<(), Refusal> {
        let elapsed = now.as_millis().saturating_sub(self.at.as_millis());
        self.left = self.left.saturating_add(elapsed.saturating_mul(RATE_MAX)).min(BURST_MAX * 1_000);
        self.at = now;
        let Some(left) = self.left.checked_sub(1_000) else {
            let message = format!(
                "more than {RATE_MAX} reports a second on one stream: report at the registered interval"
            );
            return Err(Refusal::new(Reason::ReportRate, message));
        };
        self.left = left;
        Ok(())
    }
}

impl Shared {
    fn say_beneath(&self, id: &ResourceId, beneath: Vec<String>) -> Result<(), Status> {
        let said = self.beneath.say(id, beneath, &self.balancer_id);
        said.map_err(|error| match error {
            BeneathError::Circle(_) => Status::failed_precondition(error.to_string()),
            BeneathError::TooMany => Status::invalid_argument(error.to_string()),
        })
    }
}

pub(crate) fn invalid(error: MessageError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn register_refused(shared: &Shared, caller: &Caller, error: RegisterError) -> Status {
    let message = error.to_string();
    match error {
        RegisterError::UnknownPool { .. } => Status::failed_precondition(message),
        RegisterError::OlderIncarnation { .. } => Status::aborted(message),
        RegisterError::PoolFull { .. } => Status::resource_exhausted(message),
        RegisterError::OtherOwner { .. } => {
            shared.security.refuse(caller, &Refusal::new(Reason::Id, message))
        }
    }
}

fn report_refused(error: ReportError) -> Status {
    let message = error.to_string();
    match error {
        ReportError::NotRegistered { .. } => Status::not_found(message),
        // Replaced by a newer process: this one must not push it out again by registering anew.
        ReportError::OtherIncarnation { registered, given, .. } if given < registered => {
            Status::aborted(message)
        }
        ReportError::OtherIncarnation { .. } => Status::not_found(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_may_burst_but_not_flood() {
        let at = Timestamp::from_millis;
        let mut rate = Rate::new(at(0));
        for n in 0..BURST_MAX {
            assert!(rate.take(at(0)).is_ok(), "report {n}");
        }
        assert!(rate.take(at(0)).is_err());
        assert!(rate.take(at(49)).is_err());
        assert!(rate.take(at(50)).is_ok(), "20 a second is one in 50 ms");
        assert!(rate.take(at(50)).is_err());
        for n in 1..1_000 {
            assert!(rate.take(at(50 + n * 100)).is_ok(), "the shortest interval is always fine");
        }
    }
}
