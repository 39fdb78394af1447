//! What a completion is about: the typed form of `user_data`.

/// The operation a completion belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Multishot accept.
    Accept = 1,
    /// Connect to a backend.
    Connect,
    /// Multishot receive from the client.
    RecvClient,
    /// Multishot receive from the backend.
    RecvBackend,
    /// Send to the client.
    SendClient,
    /// Send to the backend.
    SendBackend,
    /// Poll for bytes from the client.
    ReadableClient,
    /// Poll for bytes from the backend.
    ReadableBackend,
    /// Poll for room towards the client.
    WritableClient,
    /// Poll for room towards the backend.
    WritableBackend,
    /// Poll for an error of the client's connection.
    WatchClient,
    /// Poll for an error of the backend's connection.
    WatchBackend,
    /// A cancel that failed; successful ones complete silently.
    Cancel,
    /// A close that failed; successful ones complete silently.
    Close,
    /// The doorbell: a poll of an eventfd.
    Wake,
    /// Multishot receive of datagrams from clients.
    Datagrams,
    /// Multishot receive of datagrams from the backend of a flow.
    Answers,
    /// Send of a datagram or a train.
    SendDatagrams,
    /// A read that takes a free buffer out of the kernel's ring; [`crate::Ring`] has its completions.
    Withdraw,
}

impl Op {
    const ALL: [Self; 19] = [
        Self::Accept,
        Self::Connect,
        Self::RecvClient,
        Self::RecvBackend,
        Self::SendClient,
        Self::SendBackend,
        Self::ReadableClient,
        Self::ReadableBackend,
        Self::WritableClient,
        Self::WritableBackend,
        Self::WatchClient,
        Self::WatchBackend,
        Self::Cancel,
        Self::Close,
        Self::Wake,
        Self::Datagrams,
        Self::Answers,
        Self::SendDatagrams,
        Self::Withdraw,
    ];
}

/// Which operation of which slot: 8 bits of operation, 24 bits of generation, 32 bits of slot.
///
/// A slot is not used again before its last completion is in, so the generation is a check, not a need; 24 bits of it
/// make a stale completion show up instead of hitting another flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token {
    /// The operation.
    pub op: Op,
    /// Counts the uses of the slot; only the low 24 bits are kept.
    pub generation: u32,
    /// The flow's slot, the listener's number, or 0.
    pub slot: u32,
}

const GENERATION_BITS: u32 = 24;
const GENERATION_MASK: u32 = (1 << GENERATION_BITS) - 1;

impl Token {
    /// The token; of `generation` the low 24 bits are kept.
    pub const fn new(op: Op, slot: u32, generation: u32) -> Self {
        Self { op, generation: generation & GENERATION_MASK, slot }
    }

    /// Whether it is of this use of its slot.
    pub const fn is_of(self, generation: u32) -> bool {
        self.generation == generation & GENERATION_MASK
    }

    pub(crate) const fn encode(self) -> u64 {
        (self.op as u64) << 56 | (self.generation as u64) << 32 | self.slot as u64
    }

    pub(crate) fn decode(user_data: u64) -> Option<Self> {
        let op = *Op::ALL.get(usize::try_from(user_data >> 56).ok()?.checked_sub(1)?)?;
        Some(Self { op, generation: (user_data >> 32) as u32 & GENERATION_MASK, slot: user_data as u32 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for op in Op::ALL {
            let token = Token::new(op, u32::MAX - 1, 0xFF12_3456);
            let back = Token::decode(token.encode()).unwrap();
            assert_eq!(back, token);
            assert!(back.is_of(0xFF12_3456) && back.is_of(0x0012_3456) && !back.is_of(1));
        }
        assert_eq!(Token::decode(0), None);
        assert_eq!(Token::decode(u64::MAX), None);
    }
}
