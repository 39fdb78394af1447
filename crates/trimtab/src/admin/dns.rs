//! `trimtab dns`: how publishing goes.

use std::collections::BTreeMap;

use api::v1::{DnsStatus, ListDnsRequest};
use serde::Serialize;

use super::{Admin, ask, show};
use crate::cli::AdminArgs;
use crate::failure::Failure;
use crate::output::Table;

/// One zone at one server.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DnsView {
    /// The zone.
    pub zone: String,
    /// Its primary.
    pub server: String,
    /// The balancer's host name there.
    pub name: String,
    /// `starting`, `published`, `failing` or `withdrawn`.
    pub state: String,
    /// How long ago the records were seen to be there; `None`: never.
    pub confirmed_age_s: Option<f64>,
    /// Why the last try failed; empty: it did not.
    pub last_error: String,
    /// Updates by their result.
    pub updates: BTreeMap<String, u64>,
}

impl From<DnsStatus> for DnsView {
    fn from(wire: DnsStatus) -> Self {
        let DnsStatus { zone, server, name, state, last_error, confirmed_age, updates } = wire;
        let age = |age: prost_types::Duration| age.seconds as f64 + f64::from(age.nanos) * 1e-9;
        let updates = updates.into_iter().collect();
        Self { zone, server, name, state, confirmed_age_s: confirmed_age.map(age), last_error, updates }
    }
}

impl Admin {
    /// How publishing in DNS goes.
    ///
    /// # Errors
    /// When the balancer refuses or does not answer.
    pub async fn dns(&mut self) -> Result<Vec<DnsView>, Failure> {
        let answer = self.client.list_dns(ListDnsRequest {}).await;
        let entries = answer.map_err(|status| self.failure(&status))?.into_inner().entries;
        Ok(entries.into_iter().map(DnsView::from).collect())
    }
}

/// `trimtab dns`.
///
/// # Errors
/// When the balancer refuses or does not answer.
pub fn run(args: &AdminArgs) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct All {
        dns: Vec<DnsView>,
    }
    let dns = ask(async { Admin::connect(args).await?.dns().await })?;
    show(args.output, &All { dns }, |all| table(&all.dns))
}

fn table(entries: &[DnsView]) -> String {
    if entries.is_empty() {
        return "nothing is published: the configuration has no [[dns]]\n".to_owned();
    }
    let mut table = Table::new(&["ZONE", "SERVER", "NAME", "STATE", ">CONFIRMED", "LAST ERROR"]);
    for entry in entries {
        let age = entry.confirmed_age_s.map_or_else(|| "never".to_owned(), |age| format!("{age:.1}s ago"));
        let error = if entry.last_error.is_empty() { "-".to_owned() } else { entry.last_error.clone() };
        let DnsView { zone, server, name, state, .. } = entry;
        table.row([zone.clone(), server.clone(), name.clone(), state.clone(), age, error]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_for_each() {
        let entry = DnsView {
            zone: "example.com".into(),
            server: "10.0.0.53:53".into(),
            name: "lb1.example.com".into(),
            state: "published".into(),
            confirmed_age_s: Some(1.26),
            last_error: String::new(),
            updates: BTreeMap::new(),
        };
        let failing = DnsView {
            state: "failing".into(),
            confirmed_age_s: None,
            last_error: "it\nsays no".into(),
            ..entry.clone()
        };
        assert_eq!(
            table(&[entry, failing]),
            "ZONE         SERVER        NAME             STATE      CONFIRMED  LAST ERROR\n\
             example.com  10.0.0.53:53  lb1.example.com  published   1.3s ago  -\n\
             example.com  10.0.0.53:53  lb1.example.com  failing        never  it\u{fffd}says no\n"
        );
        assert!(table(&[]).contains("[[dns]]"));
    }
}
