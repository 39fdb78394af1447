//! Some bytes, and what must come back: for protocols that have no dialogue of their own here.

use crate::text::{find, shown};
use crate::wire::{TAKEN_BYTES_MAX, Wire};
use crate::{Failure, text};

/// What is said and heard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SendExpect {
    /// Said first; empty: the server speaks first.
    pub send: Vec<u8>,
    /// Must be in what comes; empty: anything will do.
    pub expect: Vec<u8>,
    /// Said before leaving, so that the server sees a client that ends in good order.
    pub goodbye: Vec<u8>,
}

pub(crate) async fn ask(texts: &SendExpect, wire: &mut Wire) -> Result<String, Failure> {
    if !texts.send.is_empty() {
        wire.say(&texts.send).await?;
    }
    let mut heard = Vec::new();
    let found = wire.hear("expected answer", |bytes| {
        heard.clear();
        heard.extend_from_slice(&bytes[..bytes.len().min(TAKEN_BYTES_MAX)]);
        let found = find(bytes, &texts.expect).filter(|_| !bytes.is_empty());
        Ok(found.map(|_| (shown(bytes), bytes.len())))
    });
    match found.await {
        Err(Failure::HungUp | Failure::TooLong) if !heard.is_empty() => {
            let message = format!("{:?} is not in its answer: {}", shown(&texts.expect), shown(&heard));
            Err(Failure::Answer(text::printable(&message)))
        }
        Ok(found) => {
            wire.part_with(&texts.goodbye);
            Ok(found)
        }
        failed => failed,
    }
}
