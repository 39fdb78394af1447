//! A page over HTTP(S): our JSON, or Prometheus text with a mapping.

use std::time::{Duration, Instant};

use fetch::{Host, Take, Tls, Url};
use formats::{Document, Mapping, Past};

/// For looking its name up, and again for the answer.
const WITHIN: Duration = Duration::from_secs(2);

/// What is kept from one page to the next.
pub(super) struct Page {
    begun: Instant,
    past: Past,
    tls: Tls,
}

impl Page {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), past: Past::default(), tls: Tls::default() }
    }

    pub(super) async fn ask(&mut self, url: &Url, mapping: Option<&Mapping>) -> Result<Document, String> {
        let address = match url.host() {
            Host::Ip(ip) => (*ip, url.port()).into(),
            Host::Name(name) => {
                let found =
                    tokio::time::timeout(WITHIN, tokio::net::lookup_host((name.as_str(), url.port())));
                let found = found.await.map_err(|_| format!("no address of {name} within {WITHIN:?}"))?;
                let mut found = found.map_err(|error| format!("{name}: {error}"))?;
                found.next().ok_or_else(|| format!("{name} has no address"))?
            }
        };
        let said = |error: &dyn std::fmt::Display| format!("{url}: {error}");
        let Some(mapping) = mapping else {
            let text =
                fetch::get(url, address, &self.tls, Take::Whole, WITHIN).await.map_err(|e| said(&e))?;
            return Document::parse(&text).map_err(|error| format!("{url}: the answer {error}"));
        };
        let wanted = |line: &[u8]| mapping.wants(line);
        let page = fetch::get(url, address, &self.tls, Take::Lines(&wanted), WITHIN).await;
        let page = page.map_err(|error| said(&error))?;
        mapping.apply(&page, self.begun.elapsed(), &mut self.past).map_err(|error| said(&error))
    }
}
