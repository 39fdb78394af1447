//! `trimtab notify`: what resources are told, asked for and looked at.

use std::time::SystemTime;

use api::v1::notice::Kind;
use api::v1::{
    ListNoticesRequest, Notice, NoticeStatus, NotifyRequest, NotifyResponse, WithdrawNoticeRequest,
};
use serde::Serialize;

use super::{Admin, ask, show};
use crate::cli::notify::{NotifyArgs, NotifyCommand, ShedArgs, ShutdownArgs, UnavailableArgs};
use crate::cli::{AdminArgs, Output};
use crate::failure::Failure;
use crate::output::{Table, printable};

/// A notice that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MadeView {
    /// Its id.
    pub notice: String,
    /// Registered resources that it is for.
    pub resources: u32,
}

/// A notice, in `notify list`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NoticeView {
    /// Its id.
    pub notice: String,
    /// `balancer_unavailable`, `shut_down`, …
    pub kind: String,
    /// When it happens, in RFC 3339.
    pub at: String,
    /// How long, in seconds.
    pub lasts_seconds: Option<f64>,
    /// Of `shed_flows`.
    pub flows: u32,
    /// Balancers that stand in.
    pub alternatives: Vec<String>,
    /// Why.
    pub reason: String,
    /// The resource or the pool that it is for; `all`.
    pub to: String,
    /// Seconds since it was made.
    pub age_seconds: Option<f64>,
    /// Whether it was withdrawn.
    pub withdrawn: bool,
    /// Registered resources that it is for.
    pub resources: u32,
    /// Those of them that have taken it.
    pub taken: u32,
    /// Those that have not, and what is known of why; at most 100.
    pub not_taken: Vec<NotTakenView>,
}

/// A resource that has not taken a notice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NotTakenView {
    /// Which one.
    pub id: String,
    /// `not connected`, `told`, `failed: …`, `webhook: …`.
    pub state: String,
}

impl Admin {
    /// Tells resources something.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn notify(&mut self, request: NotifyRequest) -> Result<MadeView, Failure> {
        let answer = self.client.notify(request).await;
        let NotifyResponse { id, resources } = answer.map_err(|status| self.failure(&status))?.into_inner();
        Ok(MadeView { notice: id, resources })
    }

    /// Notices that are kept, the newest first.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn notices(&mut self) -> Result<Vec<NoticeView>, Failure> {
        let answer = self.client.list_notices(ListNoticesRequest {}).await;
        let notices = answer.map_err(|status| self.failure(&status))?.into_inner().notices;
        Ok(notices.into_iter().map(NoticeView::from).collect())
    }

    /// Withdraws a notice.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn withdraw(&mut self, id: &str) -> Result<(), Failure> {
        let answer = self.client.withdraw_notice(WithdrawNoticeRequest { id: id.to_owned() }).await;
        answer.map_err(|status| self.failure(&status)).map(|_| ())
    }
}

impl From<NoticeStatus> for NoticeView {
    fn from(status: NoticeStatus) -> Self {
        let notice = status.notice.unwrap_or_default();
        let to = match (status.resource, status.pool) {
            (resource, _) if !resource.is_empty() => resource,
            (_, pool) if !pool.is_empty() => format!("pool {pool}"),
            _ => "all".to_owned(),
        };
        Self {
            kind: notice.kind().as_str_name().trim_start_matches("KIND_").to_ascii_lowercase(),
            at: notice.at.and_then(|at| SystemTime::try_from(at).ok()).map(rfc3339).unwrap_or_default(),
            lasts_seconds: super::view::seconds(notice.lasts),
            notice: notice.id,
            flows: notice.flows,
            alternatives: notice.alternatives,
            reason: notice.reason,
            to,
            age_seconds: super::view::seconds(status.age),
            withdrawn: status.withdrawn,
            resources: status.resources,
            taken: status.taken,
            not_taken: status
                .not_taken
                .into_iter()
                .map(|not| NotTakenView { id: not.id, state: not.state })
                .collect(),
        }
    }
}

fn rfc3339(time: SystemTime) -> String {
    chrono::DateTime::<chrono::Utc>::from(time).to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}

/// `trimtab notify …`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn run(args: &NotifyArgs) -> Result<(), Failure> {
    match &args.what {
        NotifyCommand::Unavailable(args) => make(&args.admin, unavailable(args)),
        NotifyCommand::Shutdown(args) => make(&args.admin, shutdown(args)),
        NotifyCommand::Shed(args) => make(&args.admin, shed(args)),
        NotifyCommand::List(args) => list(args),
        NotifyCommand::Withdraw(args) => {
            ask(async { Admin::connect(&args.admin).await?.withdraw(&args.notice).await })?;
            let done = serde_json::json!({"notice": args.notice, "withdrawn": true});
            show(args.admin.output, &done, |_| format!("{} is withdrawn\n", args.notice))
        }
    }
}

fn unavailable(args: &UnavailableArgs) -> NotifyRequest {
    let notice = Notice {
        kind: Kind::BalancerUnavailable.into(),
        at: Some(args.at.into()),
        lasts: args.lasts.and_then(|lasts| prost_types::Duration::try_from(lasts).ok()),
        alternatives: args.alternative.clone(),
        reason: args.reason.clone(),
        ..Notice::default()
    };
    NotifyRequest { notice: Some(notice), resource: String::new(), pool: args.pool.clone() }
}

fn shutdown(args: &ShutdownArgs) -> NotifyRequest {
    let notice = Notice {
        kind: Kind::ShutDown.into(),
        at: Some(args.at.into()),
        reason: args.reason.clone(),
        ..Notice::default()
    };
    let resource = args.id.clone().unwrap_or_default();
    NotifyRequest { notice: Some(notice), resource, pool: args.pool.clone().unwrap_or_default() }
}

fn shed(args: &ShedArgs) -> NotifyRequest {
    let notice = Notice {
        kind: Kind::ShedFlows.into(),
        flows: args.flows,
        reason: args.reason.clone(),
        ..Notice::default()
    };
    NotifyRequest { notice: Some(notice), resource: args.id.clone(), pool: String::new() }
}

fn make(admin: &AdminArgs, request: NotifyRequest) -> Result<(), Failure> {
    let made = ask(async { Admin::connect(admin).await?.notify(request).await })?;
    show(admin.output, &made, |made| {
        format!(
            "{}: for {} registered resources; `trimtab notify list` says who has taken it\n",
            made.notice, made.resources
        )
    })
}

fn list(args: &AdminArgs) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Notices {
        notices: Vec<NoticeView>,
    }
    let notices = ask(async { Admin::connect(args).await?.notices().await })?;
    match args.output {
        Output::Json => show(args.output, &Notices { notices }, |_| String::new()),
        Output::Table => show(args.output, &Notices { notices }, |all| notices_text(&all.notices)),
    }
}

fn notices_text(notices: &[NoticeView]) -> String {
    if notices.is_empty() {
        return "there are no notices\n".to_owned();
    }
    let mut table = Table::new(&["NOTICE", "KIND", "AT", "TO", "TAKEN", "NOTES"]);
    let mut not_taken = String::new();
    for notice in notices {
        let mut notes = Vec::new();
        if notice.withdrawn {
            notes.push("withdrawn".to_owned());
        }
        if !notice.alternatives.is_empty() {
            notes.push(format!("use {}", notice.alternatives.join(", ")));
        }
        if notice.flows > 0 {
            notes.push(format!("{} flows", notice.flows));
        }
        if !notice.reason.is_empty() {
            notes.push(notice.reason.clone());
        }
        table.row([
            notice.notice.clone(),
            notice.kind.clone(),
            notice.at.clone(),
            notice.to.clone(),
            format!("{}/{}", notice.taken, notice.resources),
            notes.join("; "),
        ]);
        for not in &notice.not_taken {
            not_taken
                .push_str(&printable(&format!("{}: not taken by {} ({})", notice.notice, not.id, not.state)));
            not_taken.push('\n');
        }
    }
    let mut text = table.render();
    if !not_taken.is_empty() && notices.iter().any(|notice| !notice.withdrawn) {
        text.push('\n');
        text.push_str(&not_taken);
    }
    text
}
