//! One execution of a utilization script: connect, ask, understand.
//!
//! Every execution ends within [`WITHIN`] and takes at most 64 KiB. It knows no registry: what it learned is a [`Harvest`].

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use api::orca::OrcaLoadReport;
use api::orca_service::OrcaLoadReportRequest;
use api::orca_service::open_rca_service_client::OpenRcaServiceClient;
use fetch::{FetchError, Take, Tls, Url};
use formats::agent_check::{LINE_BYTES_MAX, Line, LineError, Wish};
use formats::{Document, DocumentError, Mapping, PageError, Past};
use hyper_util::rt::TokioIo;
use registry::{Labels, RawUtilization};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::transport::{Endpoint, Uri};
use tonic::{Code, Status, Streaming};

use super::script::Kind;
use super::target::TargetError;

/// One execution, from connecting to the last byte.
pub(crate) const WITHIN: Duration = Duration::from_secs(2);
/// Largest message of an ORCA server.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Largest set of headers of its answer.
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// What it may send ahead of what we have read.
const WINDOW_BYTES: u32 = 64 * 1024;

/// What an execution learned.
#[derive(Debug)]
pub(crate) enum Harvest {
    /// How busy the resource is.
    Utilization {
        utilization: RawUtilization,
        /// Labels that stand above the registered ones.
        labels: Option<Labels>,
    },
    /// What an agent-check wants by all its lines so far. It says nothing of utilization: its weight is the wanted one.
    Wish(Wish),
}

/// Why an execution gave nothing: always the fault of the resource's side, or of its network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the answer {0}")]
    Document(#[from] DocumentError),
    #[error(transparent)]
    Page(#[from] PageError),
    #[error("agent-check: {0}")]
    Line(#[from] LineError),
    #[error("agent-check: cannot talk to {0}: {1}")]
    Talk(SocketAddr, std::io::Error),
    #[error("no whole answer within {WITHIN:?}")]
    Late,
    #[error("cannot connect to {0}: {1}")]
    Connect(SocketAddr, String),
    #[error("OpenRcaService at {0}: {1}")]
    Orca(SocketAddr, String),
    #[error("OpenRcaService at {0} ended its stream")]
    OrcaEnded(SocketAddr),
    #[error(transparent)]
    Utilization(#[from] registry::UtilizationError),
    #[error("labels {0}")]
    Labels(#[from] registry::LabelsError),
}

impl PullError {
    /// Whether there was an answer that is none, or may not be asked for; else there was none.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Fetch(error) => error.is_refusal(),
            Self::Target(TargetError::Unresolved(..)) => false,
            Self::Target(_) | Self::Document(_) | Self::Page(_) | Self::Line(_) => true,
            Self::Utilization(_) | Self::Labels(_) => true,
            Self::Talk(..) | Self::Late | Self::Connect(..) => false,
            Self::Orca(..) | Self::OrcaEnded(_) => false,
        }
    }
}

/// What is kept from one execution of a script to the next.
pub(crate) struct Executor {
    begun: Instant,
    past: Past,
    wish: Wish,
    orca: Option<Streaming<OrcaLoadReport>>,
}

impl Executor {
    pub(crate) fn new() -> Self {
        Self { begun: Instant::now(), past: Past::default(), wish: Wish::default(), orca: None }
    }

    /// Executes the script at `address`, which may be asked.
    pub(crate) async fn execute(
        &mut self,
        kind: &Kind,
        address: SocketAddr,
        interval: Duration,
        tls: &Tls,
    ) -> Result<Harvest, PullError> {
        match kind {
            Kind::Http { url, mapping } => self.http(url, mapping.as_ref(), address, tls).await,
            Kind::AgentCheck { send, .. } => self.agent_check(address, send).await,
            Kind::Orca { .. } => self.open_stream(address, interval).await,
        }
    }

    async fn http(
        &mut self,
        url: &Url,
        mapping: Option<&Mapping>,
        address: SocketAddr,
        tls: &Tls,
    ) -> Result<Harvest, PullError> {
        let document = match mapping {
            None => Document::parse(&fetch::get(url, address, tls, Take::Whole, WITHIN).await?)?,
            Some(mapping) => {
                let wanted = |line: &[u8]| mapping.wants(line);
                let page = fetch::get(url, address, tls, Take::Lines(&wanted), WITHIN).await?;
                mapping.apply(&page, self.begun.elapsed(), &mut self.past)?
            }
        };
        Ok(of_document(document))
    }

    async fn agent_check(&mut self, address: SocketAddr, send: &str) -> Result<Harvest, PullError> {
        let talk = |error| PullError::Talk(address, error);
        let said = timeout(WITHIN, async {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(send.as_bytes()).await?;
            read_line(&mut stream).await
        });
        let said = said.await.map_err(|_| PullError::Late)?.map_err(talk)?;
        self.wish.hear(Line::parse(&said)?);
        Ok(Harvest::Wish(self.wish.clone()))
    }

    /// A new stream, with its first report: servers send one at once.
    async fn open_stream(&mut self, address: SocketAddr, interval: Duration) -> Result<Harvest, PullError> {
        self.orca = None;
        let opened = timeout(WITHIN, async {
            let mut stream = stream_core_metrics(address, interval).await?;
            let first = stream.message().await.map_err(|status| orca_said(address, &status))?;
            Ok::<_, PullError>((first.ok_or(PullError::OrcaEnded(address))?, stream))
        });
        let (first, stream) = opened.await.map_err(|_| PullError::Late)??;
        self.orca = Some(stream);
        Ok(of_orca(first))
    }

    /// The next report of the stream that is open; for ever, where none is.
    pub(crate) async fn next_of_stream(&mut self, address: Option<SocketAddr>) -> Result<Harvest, PullError> {
        let (Some(stream), Some(address)) = (&mut self.orca, address) else {
            return std::future::pending().await;
        };
        let ended = match stream.message().await {
            Ok(Some(report)) => return Ok(of_orca(report)),
            Ok(None) => PullError::OrcaEnded(address),
            Err(status) => orca_said(address, &status),
        };
        self.orca = None;
        Err(ended)
    }

    /// Ends the stream that is open.
    pub(crate) fn close_stream(&mut self) {
        self.orca = None;
    }

    pub(crate) fn has_stream(&self) -> bool {
        self.orca.is_some()
    }
}

/// Up to CR or LF, the end, or one byte more than a line may have.
async fn read_line(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut said = Vec::new();
    let mut piece = [0; 256];
    while said.len() <= LINE_BYTES_MAX && !said.iter().any(|byte| matches!(byte, b'\r' | b'\n')) {
        let length = stream.read(&mut piece).await?;
        if length == 0 {
            break;
        }
        said.extend_from_slice(&piece[..length]);
    }
    Ok(said)
}

async fn stream_core_metrics(
    address: SocketAddr,
    interval: Duration,
) -> Result<Streaming<OrcaLoadReport>, PullError> {
    // The connector goes to the address that was judged, whatever the endpoint's name.
    let connector =
        tower::service_fn(move |_: Uri| async move { TcpStream::connect(address).await.map(TokioIo::new) });
    let uri = Uri::builder().scheme("http").authority(address.to_string()).path_and_query("/").build();
    let endpoint = Endpoint::from(uri.unwrap_or_default())
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10));
    let channel = endpoint.connect_with_connector(connector).await;
    let channel = channel.map_err(|error| PullError::Connect(address, chain(&error)))?;
    let mut client = OpenRcaServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let request = OrcaLoadReportRequest {
        report_interval: prost_types::Duration::try_from(interval).ok(),
        request_cost_names: Vec::new(),
    };
    let stream = client.stream_core_metrics(request).await;
    Ok(stream.map_err(|status| orca_said(address, &status))?.into_inner())
}

fn orca_said(address: SocketAddr, status: &Status) -> PullError {
    let why = match status.code() {
        Code::Unimplemented => "it has no such service".to_owned(),
        code => format!("{} ({code:?})", status.message()),
    };
    PullError::Orca(address, why)
}

/// An error with its last cause: transport errors say little without.
fn chain(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    last.to_string()
}

fn of_document(document: Document) -> Harvest {
    let utilization = RawUtilization {
        cpu: document.cpu.unwrap_or_default(),
        memory: document.memory.unwrap_or_default(),
        application: document.application.unwrap_or_default(),
        dimensions: document.utilization.into_iter().collect(),
        rate: document.operations_per_second.unwrap_or_default(),
        errors: document.errors_per_second.unwrap_or_default(),
        metrics: document.named_metrics.into_iter().collect(),
    };
    Harvest::Utilization { utilization, labels: document.labels }
}

fn of_orca(report: OrcaLoadReport) -> Harvest {
    Harvest::Utilization { utilization: crate::parse::raw_utilization(report), labels: None }
}
