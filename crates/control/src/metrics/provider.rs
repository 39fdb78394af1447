//! What `/metrics` shows of providers: whether each is followed, what it has registered, what it said and what went wrong.

use ::metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};

use super::ReportResult;

/// What events are counted by; `listing`: everything anew, because something was missed.
const EVENTS: [&str; 5] = ["container", "network", "service", "node", "listing"];
/// What errors are counted by.
const REASONS: [&str; 8] =
    ["connect", "timeout", "connection", "status", "answer", "labels", "refused", "bound"];

/// The metrics of one provider.
pub(crate) struct ProviderMetrics {
    up: Gauge,
    resources: Gauge,
    events: [Counter; EVENTS.len()],
    errors: [Counter; REASONS.len()],
    /// By [`ReportResult`].
    reports: [Counter; 3],
}

impl ProviderMetrics {
    /// In the recorder that is the local one now.
    pub(super) fn make(name: &str) -> Self {
        let provider = || name.to_owned();
        Self {
            up: gauge!("trimtab_provider_up", "provider" => provider()),
            resources: gauge!("trimtab_provider_resources", "provider" => provider()),
            events: EVENTS
                .map(|kind| counter!("trimtab_provider_events_total", "provider" => provider(), "type" => kind)),
            errors: REASONS.map(
                |reason| counter!("trimtab_provider_errors_total", "provider" => provider(), "reason" => reason),
            ),
            reports: ["accepted", "refused", "unknown"]
                .map(|result| counter!("trimtab_reports_total", "source" => "provider", "result" => result)),
        }
    }

    pub(crate) fn up(&self, up: bool) {
        self.up.set(f64::from(u8::from(up)));
    }

    pub(crate) fn resources(&self, count: usize) {
        self.resources.set(count as f64);
    }

    /// Counts an event of one of [`EVENTS`].
    pub(crate) fn event(&self, kind: &'static str) {
        count(&EVENTS, &self.events, kind);
    }

    /// Counts an error of one of [`REASONS`].
    pub(crate) fn failed(&self, reason: &'static str) {
        count(&REASONS, &self.errors, reason);
    }

    pub(crate) fn reported(&self, result: ReportResult) {
        self.reports[result as usize].increment(1);
    }
}

fn count(names: &[&str], counters: &[Counter], name: &str) {
    let place = names.iter().position(|known| *known == name);
    debug_assert!(place.is_some(), "{name} is in none of the closed sets");
    if let Some(counter) = place.and_then(|place| counters.get(place)) {
        counter.increment(1);
    }
}

pub(super) fn describe() {
    describe_gauge!("trimtab_provider_up", "Whether a provider's orchestrator is followed now.");
    describe_gauge!("trimtab_provider_resources", "Resources that a provider has registered.");
    describe_counter!("trimtab_provider_events_total", "Events of a provider's orchestrator, by type.");
    describe_counter!(
        "trimtab_provider_errors_total",
        "What went wrong with a provider, by reason: labels and refused are a resource's, the others its orchestrator's."
    );
}
