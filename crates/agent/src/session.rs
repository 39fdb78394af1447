//! One registration with a balancer: register, report, listen, until something ends it.
//!
//! ```text
//! connect -> Register -> Report stream: report, report, … -> Ended
//!                          ack, ack, report-now, notice <-
//! ```
//!
//! Owns: the timing of reports and what an answer means. Does not own: when to try again, and what is measured.

use std::error::Error;
use std::time::Duration;

use api::orca::OrcaLoadReport;
use api::v1::registration_service_client::RegistrationServiceClient;
use api::v1::report_response::Event;
use api::v1::{self, Ack, Labels, Readiness, ReportRequest, ReportResponse, ResourceState};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};
use tracing::{debug, info, warn};

use crate::agent::{AgentState, Common};
use crate::balancers::{Balancer, BalancerId};
use crate::meter::{Meter, WINDOW_MIN};
use crate::said::Said;
use crate::service::Service;
use crate::transport::{Connection, Transport, chain};
use crate::utilization::Override;

/// For connecting, and for each call but the stream of reports. A balancer that is there answers in milliseconds.
const CALL_PATIENCE: Duration = Duration::from_secs(2);
/// Least time without an ack after which the connection counts as dead; a lease lasts no less.
const SILENCE_MIN: Duration = Duration::from_secs(3);
/// Acks that may be missing in a row.
const SILENCE_INTERVALS: u32 = 3;
/// Reports that wait to be sent while the connection does not take any; more are not sent, the next one says it all.
const REPORTS_WAITING_MAX: usize = 4;
/// Largest message a balancer sends: an ack is some 50 bytes, a notice names a few alternatives.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// HTTP/2 pings notice a dead connection under long report intervals too.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_PATIENCE: Duration = Duration::from_secs(3);

/// A client as agents use it.
pub(crate) type Client = RegistrationServiceClient<Connection>;

/// Why a session ended. The agent goes on in each case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The balancer does not know us (any more): it restarted, or the lease expired.
    NotRegistered,
    /// The balancer answered and said no; an operator has to change something, there or here.
    Refused(String),
    /// The resource's version is another now, which only a registration says.
    Amended,
    /// The connection could not be made, or broke, or fell silent.
    Lost(String),
}

/// Connects anew.
pub(crate) async fn connect(transport: &Transport, balancer: &Balancer) -> Result<Client, Ended> {
    let alive = |endpoint: Endpoint| {
        endpoint
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_PATIENCE)
            .keep_alive_while_idle(true)
    };
    let connected = transport.connect_to(&balancer.uri, &balancer.addresses, CALL_PATIENCE, alive).await;
    let connection = connected.map_err(|error| Ended::Lost(error.to_string()))?;
    Ok(RegistrationServiceClient::new(connection).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// Registers, with the labels of this moment.
/// Gives the version that it was registered with.
pub(crate) async fn register(client: &mut Client, common: &Common) -> Result<String, Ended> {
    let config = &common.config;
    let mut resource = config.resource.clone();
    common.file.read();
    if let Some(labels) = common.file.labels().borrow().clone() {
        resource.labels = labels.entries;
    }
    let mut beneath = Vec::new();
    if let Some(supply) = &config.supply {
        let now = supply.borrow();
        resource.version.clone_from(&now.version);
        beneath.clone_from(&now.beneath);
    }
    let version = resource.version.clone();
    let request = v1::RegisterRequest {
        resource: Some(resource),
        incarnation: config.incarnation,
        report_interval: prost_types::Duration::try_from(config.report_interval).ok(),
        beneath,
    };
    let response = match timeout(CALL_PATIENCE, client.register(request)).await {
        Ok(response) => response.map_err(|status| match meaning(&status) {
            // No pool of that name: nothing to register again for.
            Ended::NotRegistered => Ended::Refused(said_by(&status)),
            ended => ended,
        })?,
        Err(_) => return Err(Ended::Lost(format!("no answer to the registration within {CALL_PATIENCE:?}"))),
    };
    let response = response.into_inner();
    let lease_s = response.lease.and_then(|lease| Duration::try_from(lease).ok()).map(|l| l.as_secs_f64());
    let (balancer, created) = (&response.balancer_id, response.created);
    info!(id = config.resource.id, pool = config.resource.pool, balancer, lease_s, created, "registered");
    if let Some(first) = response.first_pull.filter(|first| first.result != "accepted") {
        warn!(
            balancer,
            result = first.result,
            why = first.detail,
            "the utilization script gave no report yet"
        );
    }
    Ok(version)
}

/// Reports until the stream ends.
pub(crate) struct Session<'a> {
    common: &'a Common,
    /// Which of the agent's balancers hears it.
    balancer: BalancerId,
    meter: &'a mut Meter,
    /// As it was registered.
    version: String,
    service: &'a mut watch::Receiver<Service>,
    labels: watch::Receiver<Option<Labels>>,
    /// Of notices.
    outcomes: watch::Receiver<u64>,
    outgoing: mpsc::Sender<ReportRequest>,
    sequence: u64,
    reported_at: Instant,
    next_report: Instant,
    /// The last ack, or the start.
    heard_at: Instant,
    acks: u64,
    resource_state: ResourceState,
    refusals: Said,
}

impl<'a> Session<'a> {
    /// Reports on a registration that was just made, until that ends. Also says whether there was any ack: then the
    /// next failure is a first one.
    pub(crate) async fn report(
        client: &mut Client,
        common: &'a Common,
        balancer: BalancerId,
        version: String,
        meter: &'a mut Meter,
        service: &'a mut watch::Receiver<Service>,
    ) -> (Ended, bool) {
        let (outgoing, reports) = mpsc::channel(REPORTS_WAITING_MAX);
        let now = Instant::now();
        let mut session = Self {
            common,
            balancer,
            meter,
            version,
            service,
            labels: common.file.labels(),
            outcomes: common.notices.changes(),
            outgoing,
            sequence: 0,
            reported_at: now,
            next_report: now,
            heard_at: now,
            acks: 0,
            resource_state: ResourceState::Unspecified,
            refusals: Said::default(),
        };
        // The first report waits in the queue when the stream opens: a server may answer the call only after it.
        session.send_report(now);
        let ended = match timeout(CALL_PATIENCE, client.report(ReceiverStream::new(reports))).await {
            Ok(Ok(response)) => session.converse(response.into_inner()).await,
            Ok(Err(status)) => meaning(&status),
            Err(_) => Ended::Lost(format!("no answer to the first report within {CALL_PATIENCE:?}")),
        };
        (ended, session.acks > 0)
    }

    async fn converse(&mut self, mut incoming: Streaming<ReportResponse>) -> Ended {
        let supply = self.common.config.supply.as_ref();
        let patience = (self.common.config.report_interval * SILENCE_INTERVALS).max(SILENCE_MIN);
        loop {
            if supply.is_some_and(|supply| supply.borrow().version != self.version) {
                return Ended::Amended;
            }
            tokio::select! {
                message = incoming.message() => match message {
                    Ok(Some(response)) => self.hear(response),
                    Ok(None) => return Ended::Lost("the balancer ended the stream".into()),
                    Err(status) => return meaning(&status),
                },
                () = sleep_until(self.next_report) => self.send_report(Instant::now()),
                () = changed(self.service) => self.report_soon(),
                () = changed(&mut self.labels) => self.report_soon(),
                () = changed(&mut self.outcomes) => self.report_soon(),
                () = sleep_until(self.heard_at + patience) => {
                    return Ended::Lost(format!("no ack for {patience:?}"));
                }
            }
        }
    }

    /// As it is told or measured; `None`: the balancer fetches it by the resource's script. And who is beneath it.
    fn utilization(&mut self, now: Instant, over: &Override) -> (Option<OrcaLoadReport>, Vec<String>) {
        let config = &self.common.config;
        if let Some(supply) = &config.supply {
            let now = supply.borrow();
            return (Some(now.utilization.clone()), now.beneath.clone());
        }
        let is_pulled = config.resource.utilization_script.is_some();
        ((!is_pulled).then(|| self.meter.report(now.into_std(), over)), Vec::new())
    }

    /// A report ahead of the interval, but never two within [`WINDOW_MIN`]: a balancer that asks without end must not
    /// keep a host busy.
    fn report_soon(&mut self) {
        self.next_report = self.next_report.min(self.reported_at + WINDOW_MIN);
    }

    fn send_report(&mut self, now: Instant) {
        let service = self.service.borrow_and_update().clone();
        let readiness = if service.answers() { Readiness::Ready } else { Readiness::NotReady };
        self.sequence += 1;
        // The labels are what this reading says: it comes first.
        let over = self.common.file.read();
        let (utilization, beneath) = self.utilization(now, &over);
        let taken = self.common.notices.take(self.balancer);
        let report = ReportRequest {
            id: self.common.config.resource.id.clone(),
            incarnation: self.common.config.incarnation,
            sequence: self.sequence,
            readiness: readiness.into(),
            utilization,
            balancers: self.common.balancers.counted(self.balancer),
            labels: self.labels.borrow_and_update().clone(),
            notices_taken: taken.clone(),
            beneath,
        };
        if self.outgoing.try_send(report).is_err() {
            self.common.notices.put_back(&taken);
            debug!(sequence = self.sequence, "the connection takes no report; this one is left out");
        }
        self.reported_at = now;
        self.next_report = now + self.common.config.report_interval;
    }

    fn hear(&mut self, response: ReportResponse) {
        match response.event {
            Some(Event::Ack(ack)) => self.hear_ack(&ack),
            Some(Event::ReportNow(_)) => self.report_soon(),
            Some(Event::Notice(notice)) => self.common.notices.hear(self.balancer, notice),
            // A newer balancer may say what this agent does not know.
            None => debug!("an event of an unknown kind"),
        }
    }

    fn hear_ack(&mut self, ack: &Ack) {
        self.heard_at = Instant::now();
        self.acks += 1;
        if self.acks == 1 {
            self.common.balancers.set_state(self.balancer, AgentState::Reporting { since: self.heard_at });
        }
        if ack.refused.is_empty() {
            self.refusals.forget();
        } else if self.refusals.is_new(&ack.refused) {
            warn!(sequence = ack.sequence, reason = ack.refused, "the balancer refused a report");
        }
        if self.resource_state != ack.state() {
            self.resource_state = ack.state();
            let drains = self.resource_state == ResourceState::Draining;
            self.common.balancers.set_drains(self.balancer, drains);
            let state = self.resource_state.as_str_name().trim_start_matches("RESOURCE_STATE_");
            info!(state, weight = ack.weight, share = ack.share, "the balancer's view of this resource");
        }
    }
}

/// Resolves when the service starts or stops answering, or labels change; never, where nobody looks.
async fn changed<T>(watched: &mut watch::Receiver<T>) {
    if watched.changed().await.is_err() {
        std::future::pending().await
    }
}

/// What a status says about our registration.
fn meaning(status: &Status) -> Ended {
    match status.code() {
        Code::NotFound => Ended::NotRegistered,
        Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::AlreadyExists
        | Code::OutOfRange
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented => Ended::Refused(said_by(status)),
        _ => Ended::Lost(said_by(status)),
    }
}

fn said_by(status: &Status) -> String {
    match status.source() {
        Some(source) => format!("{}: {}", status.message(), chain(source)),
        None => format!("{} ({:?})", status.message(), status.code()),
    }
}
