//! The speed harness: trimtab beside HAProxy, nginx and Envoy as one-worker TCP proxies on loopback, interleaved round
//! by round, and micro-benchmarks of what trimtab does for each new flow.
//!
//! ```text
//! rounds: case x proxy, in turn -> measure: start the proxy on its processor -> load: clients + backends on theirs
//!                                            schedstat, smaps_rollup <- process
//! report: medians, ranges, ratios within a round -> Markdown, JSON
//! ```
//!
//! It does not judge correctness (the end-to-end tests do) beyond this: as many bytes must arrive as were sent.
#![forbid(unsafe_code)]

pub mod case;
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
