//! A notice as JSON: what a command is told on its standard input, and the data of an event.

use std::time::SystemTime;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

/// A notice, for programs that are no agents. Keys that say nothing are left out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Notice<'a> {
    /// Unique for all time: who has seen it need not act again.
    pub id: &'a str,
    /// `balancer_leaving`, `balancer_unavailable`, `withdrawn`, `shut_down` or `shed_flows`.
    pub kind: &'a str,
    /// The resource that it is for.
    pub resource: &'a str,
    /// When it happens, in RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// How long an unavailability lasts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lasts_seconds: Option<f64>,
    /// Control addresses of the balancers that stand in.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub alternatives: &'a [String],
    /// Why, for people.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub reason: &'a str,
    /// How many flows are to be moved away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flows: Option<u32>,
    /// The notice that does not hold any more.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub withdraws: &'a str,
}

/// An event as CloudEvents 1.0 has it in structured JSON (`application/cloudevents+json`).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Event<'a> {
    specversion: &'static str,
    id: String,
    source: String,
    #[serde(rename = "type")]
    kind: String,
    subject: &'a str,
    time: String,
    datacontenttype: &'static str,
    data: Notice<'a>,
}

/// The media type of [`Event`].
pub const EVENT_TYPE: &str = "application/cloudevents+json; charset=utf-8";

impl<'a> Event<'a> {
    /// The event that a balancer tells a resource this. Told again, it has the same `source` and `id`.
    pub fn new(balancer: &str, notice: Notice<'a>, made: SystemTime) -> Self {
        Self {
            specversion: "1.0",
            id: format!("{}/{}", notice.id, notice.resource),
            source: format!("/trimtab/{balancer}"),
            kind: format!("trimtab.notice.{}.v1", notice.kind),
            subject: notice.resource,
            time: rfc3339(made),
            datacontenttype: "application/json",
            data: notice,
        }
    }

    /// As it is sent.
    pub fn to_json(&self) -> Vec<u8> {
        // Texts and finite numbers under names: there is nothing that JSON could not say.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl Notice<'_> {
    /// As it is told.
    pub fn to_json(&self) -> Vec<u8> {
        // As above.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// A time with its zone, in seconds.
pub fn rfc3339(time: SystemTime) -> String {
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn as_cloudevents_has_it() {
        let alternatives = ["http://10.0.0.8:7400".to_owned()];
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_798_135_200);
        let notice = Notice {
            id: "b/1/notice-1",
            kind: "balancer_unavailable",
            resource: "pg1",
            at: Some(rfc3339(at)),
            lasts_seconds: Some(600.0),
            alternatives: &alternatives,
            reason: "",
            flows: None,
            withdraws: "",
        };
        let event: serde_json::Value =
            serde_json::from_slice(&Event::new("b/1", notice, at).to_json()).unwrap();
        assert_eq!(
            event,
            serde_json::json!({
                "specversion": "1.0",
                "id": "b/1/notice-1/pg1",
                "source": "/trimtab/b/1",
                "type": "trimtab.notice.balancer_unavailable.v1",
                "subject": "pg1",
                "time": "2026-12-24T18:00:00Z",
                "datacontenttype": "application/json",
                "data": {
                    "id": "b/1/notice-1",
                    "kind": "balancer_unavailable",
                    "resource": "pg1",
                    "at": "2026-12-24T18:00:00Z",
                    "lasts_seconds": 600.0,
                    "alternatives": ["http://10.0.0.8:7400"],
                },
            })
        );
    }
}
