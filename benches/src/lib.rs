//! The speed harness: trimtab beside HAProxy, nginx and Envoy as one-worker TCP proxies on loopback, interleaved round
//! by round, micro-benchmarks of what trimtab does for each new flow, and a simulator of allocation policies ([`sim`]).
//!
//! ```text
//! rounds: case x proxy, in turn -> measure: start the proxy on its processor -> load: clients + backends on theirs
//!                                            schedstat, smaps_rollup <- process
//! report: medians, ranges, ratios within a round -> Markdown, JSON
//! ```
//!
//! It does not judge correctness (the end-to-end tests do) beyond this: as many bytes must arrive as were sent. What must hold
//! under load that lasts or hurts is another matter: [`soak`].
#![forbid(unsafe_code)]

pub mod case;
pub mod floor;
pub mod load;
pub mod measure;
pub mod peer;
pub mod process;
pub mod race;
pub mod report;
pub mod reports;
pub mod rounds;
mod scrape;
pub mod select;
pub mod sim;
pub mod soak;
pub mod workers;

/// A length of time in an argument.
pub fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.1..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("it takes 0.1 to 600".to_owned()),
    }
}
