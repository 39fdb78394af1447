//! How publishing in DNS goes, as metrics and as an answer. What it does is `discovery`'s.

use std::time::Duration;

use api::v1;
use discovery::{PublishState, Status};

use crate::metrics::Text;

/// The families of DNS; none where nothing is published.
pub(crate) fn write(text: &mut Text, statuses: &[Status]) {
    if statuses.is_empty() {
        return;
    }
    let name = "trimtab_dns_published";
    text.family(name, "gauge", "Whether the balancer's records were in the zone when it was looked last.");
    for status in statuses {
        let server = status.server.to_string();
        let labels = [("zone", status.zone.as_str()), ("server", &server)];
        text.sample(name, &labels, f64::from(u8::from(status.state == PublishState::Published)));
    }
    let name = "trimtab_dns_updates_total";
    text.family(name, "counter", "Rounds of dynamic updates of a zone at a server, by their result.");
    for status in statuses {
        let server = status.server.to_string();
        // `ok` from the start, so that a rate of it is one.
        let ok = status.updates.get("ok").copied().unwrap_or(0);
        let others = status.updates.iter().filter(|(result, _)| **result != "ok");
        for (result, count) in std::iter::once((&"ok", &ok)).chain(others) {
            let labels = [("zone", status.zone.as_str()), ("server", &server), ("result", result)];
            text.sample(name, &labels, *count as f64);
        }
    }
}

/// A line for each, as `/readyz?verbose` has them.
pub(crate) fn lines(statuses: &[Status]) -> String {
    let line = |status: &Status| {
        let Status { zone, server, state, last_error, .. } = status;
        let error = if last_error.is_empty() { String::new() } else { format!(": {last_error}") };
        format!("dns {zone} at {server}: {}{error}\n", state.name())
    };
    statuses.iter().map(line).collect()
}

/// The answer to `ListDns`.
pub(crate) fn list(statuses: &[Status]) -> v1::ListDnsResponse {
    let wire = |status: &Status| v1::DnsStatus {
        zone: status.zone.clone(),
        server: status.server.to_string(),
        name: status.name.clone(),
        state: status.state.name().to_owned(),
        last_error: status.last_error.clone(),
        confirmed_age: status.confirmed.and_then(|at| wire_age(at.elapsed())),
        updates: status.updates.iter().map(|(result, count)| ((*result).to_owned(), *count)).collect(),
    };
    v1::ListDnsResponse { entries: statuses.iter().map(wire).collect() }
}

fn wire_age(age: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(age).ok()
}
