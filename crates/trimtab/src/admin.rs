//! The commands that ask a running balancer: `resources`, `pools`, `explain`, `drain`, `ready`, `pull`.
//!
//! Owns: the connection to control, its failures in words, tables and JSON.
//! Does not own: what the answers mean; control decides that.

use std::collections::BTreeMap;
use std::time::Duration;

use agent::Transport;
use agent::transport::{Connection, chain};
use api::v1::admin_service_client::AdminServiceClient;
use api::v1::{
    DrainRequest, ExplainRequest, ExplainResponse, ListCapabilitiesRequest, ListPoolsRequest,
    ListResourcesRequest, ListVersionsRequest, ReadyRequest, SetCapabilitiesRequest, SetCapabilitiesResponse,
    SetVersionShareRequest,
};
use serde::Serialize;
use tonic::transport::{Endpoint, Uri};
use tonic::{Code, Status};

use crate::cli::{
    AdminArgs, CapabilitiesArgs, ExplainArgs, Output, ResourceArgs, ResourcesArgs, VersionsArgs,
};
use crate::failure::Failure;
use crate::output::print;

pub mod dns;
pub mod notify;
mod pull;
pub mod tokens;
mod view;

pub use pull::{ScriptView, pull};

pub use view::{
    CandidateView, CapabilitiesView, DecisionView, ExplainView, GuardView, LeftOutView, LookView, PoolView,
    ResourceView, ScoreView, StateView, VersionView, VersionsView,
};

/// A balancer on the other side of the world answers a connect in a third of it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// No question here makes the balancer wait for anything.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// 10,000 resources with labels are a few megabytes.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// A balancer's control.
#[derive(Debug, Clone)]
pub struct Admin {
    control: String,
    client: AdminServiceClient<Connection>,
}

impl Admin {
    /// Connects as the command line says.
    ///
    /// # Errors
    /// [`Failure::Unreachable`] when nobody answers, or nobody whom TLS lets us trust.
    pub async fn connect(args: &AdminArgs) -> Result<Self, Failure> {
        Self::connect_to(&args.control, &args.transport.transport()).await
    }

    /// Connects to `https://host:port` or `http://host:port`.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_to(control: &str, transport: &Transport) -> Result<Self, Failure> {
        let connection = connection_to(control, transport).await?;
        let client = AdminServiceClient::new(connection).max_decoding_message_size(ANSWER_BYTES_MAX);
        Ok(Self { control: control.to_owned(), client })
    }

    /// The resources of a pool, or of all pools if it is empty.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn resources(&mut self, pool: &str) -> Result<Vec<ResourceView>, Failure> {
        let answer = self.client.list_resources(ListResourcesRequest { pool: pool.to_owned() }).await;
        let resources = answer.map_err(|status| self.failure(&status))?.into_inner().resources;
        Ok(resources.into_iter().map(ResourceView::from).collect())
    }

    /// The pools.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn pools(&mut self) -> Result<Vec<PoolView>, Failure> {
        let answer = self.client.list_pools(ListPoolsRequest {}).await;
        let pools = answer.map_err(|status| self.failure(&status))?.into_inner().pools;
        Ok(pools.into_iter().map(PoolView::from).collect())
    }

    /// Why the next flow of a pool would go where.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn explain(&mut self, question: ExplainRequest) -> Result<ExplainView, Failure> {
        let answer = self.client.explain(question).await;
        let explained: ExplainResponse = answer.map_err(|status| self.failure(&status))?.into_inner();
        Ok(explained.into())
    }

    /// The versions of a pool side by side.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn versions(&mut self, pool: &str) -> Result<VersionsView, Failure> {
        let answer = self.client.list_versions(ListVersionsRequest { pool: pool.to_owned() }).await;
        Ok(answer.map_err(|status| self.failure(&status))?.into_inner().into())
    }

    /// Sets a version's share, 0 to 1.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn set_version_share(&mut self, pool: &str, version: &str, share: f64) -> Result<(), Failure> {
        let request = SetVersionShareRequest { pool: pool.to_owned(), version: version.to_owned(), share };
        let answer = self.client.set_version_share(request).await;
        answer.map_err(|status| self.failure(&status)).map(|_| ())
    }

    /// Capabilities that operators entered.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn capabilities(&mut self) -> Result<Vec<CapabilitiesView>, Failure> {
        let answer = self.client.list_capabilities(ListCapabilitiesRequest {}).await;
        let all = answer.map_err(|status| self.failure(&status))?.into_inner().capabilities;
        Ok(all.into_iter().map(CapabilitiesView::from).collect())
    }

    /// Sets capabilities of a resource; gives all that are set.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn set_capabilities(
        &mut self,
        request: SetCapabilitiesRequest,
    ) -> Result<CapabilitiesView, Failure> {
        let id = request.id.clone();
        let answer = self.client.set_capabilities(request).await;
        let SetCapabilitiesResponse { labels, joined } =
            answer.map_err(|status| self.failure(&status))?.into_inner();
        Ok(CapabilitiesView { id, labels: labels.into_iter().collect(), joined })
    }

    /// Stops new flows to a resource; gives how many are open on it.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn drain(&mut self, id: &str) -> Result<u64, Failure> {
        let answer = self.client.drain(DrainRequest { id: id.to_owned() }).await;
        Ok(answer.map_err(|status| self.failure(&status))?.into_inner().flows_open)
    }

    /// Ends a drain.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn ready(&mut self, id: &str) -> Result<(), Failure> {
        let answer = self.client.ready(ReadyRequest { id: id.to_owned() }).await;
        answer.map_err(|status| self.failure(&status)).map(|_| ())
    }

    fn failure(&self, status: &Status) -> Failure {
        let control = self.control.clone();
        match status.code() {
            Code::Unimplemented => Failure::Unreachable {
                control,
                reason: "what answers there has no trimtab control (is it the http address?)".into(),
            },
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal => {
                Failure::Unreachable { control, reason: reason(status) }
            }
            _ => Failure::Refused { control, reason: status.message().to_owned() },
        }
    }
}

/// A connection as the command line says.
pub(crate) async fn connection(args: &AdminArgs) -> Result<Connection, Failure> {
    connection_to(&args.control, &args.transport.transport()).await
}

async fn connection_to(control: &str, transport: &Transport) -> Result<Connection, Failure> {
    let unreachable = |reason| Failure::Unreachable { control: control.to_owned(), reason };
    let uri = control.parse::<Uri>().map_err(|error| unreachable(error.to_string()))?;
    let patient = |endpoint: Endpoint| endpoint.timeout(ANSWER_TIMEOUT);
    let connection = transport.connect(&uri, CONNECT_TIMEOUT, patient).await;
    connection.map_err(|error| unreachable(error.to_string()))
}

/// Why nobody answered, with what is beneath it.
pub(crate) fn reason(status: &Status) -> String {
    let cause = std::error::Error::source(status);
    cause.map_or_else(|| status.message().to_owned(), chain)
}

/// Runs one question to its end on this thread.
pub(crate) fn ask<T>(question: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::start(format!("cannot make an event loop: {error}")))?;
    runtime.block_on(question)
}

pub(crate) fn show<T: Serialize>(
    output: Output,
    value: &T,
    table: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    match output {
        Output::Table => print(&table(value)),
        Output::Json => {
            let json = serde_json::to_string_pretty(value).map_err(|error| Failure::Fault(error.into()))?;
            print(&(json + "\n"))
        }
    }
}

/// `trimtab resources`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn resources(args: &ResourcesArgs) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Resources {
        resources: Vec<ResourceView>,
    }
    let resources = ask(async { Admin::connect(&args.admin).await?.resources(&args.pool).await })?;
    show(args.admin.output, &Resources { resources }, |all| view::resources_table(&all.resources))
}

/// `trimtab pools`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn pools(args: &AdminArgs) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Pools {
        pools: Vec<PoolView>,
    }
    let pools = ask(async { Admin::connect(args).await?.pools().await })?;
    show(args.output, &Pools { pools }, |all| view::pools_table(&all.pools))
}

/// `trimtab explain POOL`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn explain(args: &ExplainArgs) -> Result<(), Failure> {
    let question = ExplainRequest {
        pool: args.pool.clone(),
        client: args.client.map(|client| client.to_string()).unwrap_or_default(),
        requires: args.requires.clone(),
        last: args.last,
    };
    let explained = ask(async { Admin::connect(&args.admin).await?.explain(question).await })?;
    show(args.admin.output, &explained, view::explain_text)
}

/// `trimtab versions POOL`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn versions(args: &VersionsArgs) -> Result<(), Failure> {
    let versions = ask(async {
        let mut admin = Admin::connect(&args.admin).await?;
        if let Some((version, share)) = &args.set {
            admin.set_version_share(&args.pool, version, *share).await?;
        }
        admin.versions(&args.pool).await
    })?;
    show(args.admin.output, &versions, view::versions_table)
}

/// `trimtab capabilities [ID [LABEL…]]`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn capabilities(args: &CapabilitiesArgs) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct All {
        capabilities: Vec<CapabilitiesView>,
    }
    let capabilities = ask(async {
        let mut admin = Admin::connect(&args.admin).await?;
        match &args.id {
            None => admin.capabilities().await,
            Some(id) => {
                let labels = args.labels.iter().cloned().collect();
                let request = SetCapabilitiesRequest { id: id.clone(), labels, remove: args.remove.clone() };
                Ok(vec![admin.set_capabilities(request).await?])
            }
        }
    })?;
    show(args.admin.output, &All { capabilities }, |all| view::capabilities_table(&all.capabilities))
}

/// `trimtab drain ID`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn drain(args: &ResourceArgs) -> Result<(), Failure> {
    let flows_open = ask(async { Admin::connect(&args.admin).await?.drain(&args.id).await })?;
    let done = BTreeMap::from([
        ("id", serde_json::Value::from(args.id.as_str())),
        ("state", "draining".into()),
        ("flows_open", flows_open.into()),
    ]);
    show(args.admin.output, &done, |_| {
        format!("{} is draining; {flows_open} flows are still open on it\n", args.id)
    })
}

/// `trimtab ready ID`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn ready(args: &ResourceArgs) -> Result<(), Failure> {
    ask(async { Admin::connect(&args.admin).await?.ready(&args.id).await })?;
    let done = BTreeMap::from([("id", args.id.as_str()), ("state", "ready")]);
    show(args.admin.output, &done, |_| format!("{} gets new flows again\n", args.id))
}
