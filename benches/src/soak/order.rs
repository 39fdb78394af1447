//! The protocol between a soak's clients and backends: a client's first bytes say what both will do, and every byte after
//! them is known to both.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::ops::Range;
use std::time::Duration;

use e2e::{fill_block, first_wrong};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// What happens on a connection. The client writes it as its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Order {
    /// Of its own for each connection; names its streams.
    pub(super) id: u64,
    pub(super) manner: Manner,
    /// Bytes that the client sends after the order, for each round.
    pub(super) up: u64,
    /// Bytes that the backend sends, for each round.
    pub(super) down: u64,
    pub(super) rounds: u32,
    /// How the backend reads.
    pub(super) pace: Pace,
}

/// Who does what in which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// Rounds: the backend reads `up`, then sends `down`. Then the client's FIN, then the backend's.
    Exchange,
    /// Both send at once, and FIN when they have.
    Both,
    /// The client sends and FINs; only then the backend sends and FINs.
    AnswerAfterFin,
    /// The backend sends and FINs at once; the client sends when it has all of it.
    FinFirst,
    /// As `Both`, but the backend resets in place of its FIN.
    BackendResets,
    /// As `Both`, but the client resets somewhere. The backend must never see a FIN.
    ClientResets,
    /// The backend sends and reads as `Both`, and then holds its half open until the other side is gone.
    Hold,
}

/// How fast somebody reads: so many bytes at once, with a pause after each. No bytes: as fast as they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pace {
    pub(super) at_once: u32,
    pub(super) pause_ms: u32,
}

/// What went wrong with a connection.
#[derive(Debug)]
pub(super) enum Fault {
    /// The connection could not be made.
    Connect(io::Error),
    /// It broke while `at` bytes of the stream were through.
    Broke { at: u64, error: io::Error },
    /// A FIN before all bytes had come: a torn stream that looks like a whole one.
    Torn { at: u64 },
    /// This byte is not what was sent.
    Wrong { at: u64 },
    /// More came than was sent.
    TooMany,
    /// It did not come to its end in time.
    TooLong,
}

impl Pace {
    pub(super) const FREE: Self = Self { at_once: 0, pause_ms: 0 };

    /// Bytes of one receive.
    fn most(self) -> u64 {
        if self.at_once == 0 { BLOCK_BYTES as u64 } else { u64::from(self.at_once).min(BLOCK_BYTES as u64) }
    }

    async fn rest(self) {
        if self.pause_ms > 0 {
            tokio::time::sleep(Duration::from_millis(self.pause_ms.into())).await;
        }
    }
}

impl Fault {
    /// Whether bytes were lost, changed or invented: nothing excuses that.
    pub(super) fn is_corruption(&self) -> bool {
        matches!(self, Self::Torn { .. } | Self::Wrong { .. } | Self::TooMany)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "cannot connect: {error}"),
            Self::Broke { at, error } => write!(f, "broke after {at} bytes: {error}"),
            Self::Torn { at } => write!(f, "a FIN after {at} bytes, before the end"),
            Self::Wrong { at } => write!(f, "byte {at} is not what was sent"),
            Self::TooMany => f.write_str("more bytes than were sent"),
            Self::TooLong => f.write_str("not over in time"),
        }
    }
}

impl Manner {
    const ALL: [Self; 7] = [
        Self::Exchange,
        Self::Both,
        Self::AnswerAfterFin,
        Self::FinFirst,
        Self::BackendResets,
        Self::ClientResets,
        Self::Hold,
    ];
}

/// Tells an order from anything else that might come first.
const MAGIC: u32 = 0x5347_6f41;

impl Order {
    pub(super) const BYTES: usize = 44;

    /// The seed of what the client sends.
    pub(super) fn up_seed(&self) -> u64 {
        self.id * 2
    }

    /// The seed of what the backend sends.
    pub(super) fn down_seed(&self) -> u64 {
        self.id * 2 + 1
    }

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.manner as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.id.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.up.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.down.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.rounds.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.pace.at_once.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.pace.pause_ms.to_le_bytes());
        bytes
    }

    /// `None`: these bytes are no order.
    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(0) != MAGIC {
            return None;
        }
        Some(Self {
            manner: *Manner::ALL.get(u32_at(4) as usize)?,
            id: u64_at(8),
            up: u64_at(16),
            down: u64_at(24),
            rounds: u32_at(32),
            pace: Pace { at_once: u32_at(36), pause_ms: u32_at(40) },
        })
    }
}

/// Bytes made or looked at in one go. One block for all connections of a thread: what a blocked connection wants to send is
/// made again when it may.
const BLOCK_BYTES: usize = 64 * 1024;

thread_local! {
    static BLOCK: RefCell<Vec<u8>> = RefCell::new(vec![0; BLOCK_BYTES]);
}

/// Sends a part of a stream.
pub(super) async fn send(stream: &TcpStream, seed: u64, part: Range<u64>) -> Result<(), Fault> {
    let mut at = part.start;
    while at < part.end {
        let sent = match stream.writable().await {
            Ok(()) => BLOCK.with_borrow_mut(|block| {
                let block = &mut block[..(part.end - at).min(BLOCK_BYTES as u64) as usize];
                fill_block(block, seed, at);
                stream.try_write(block)
            }),
            Err(error) => Err(error),
        };
        match sent {
            Ok(sent) => at += sent as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Fault::Broke { at, error }),
        }
    }
    Ok(())
}

/// Receives a part of a stream, and compares each byte.
pub(super) async fn receive(
    stream: &TcpStream,
    seed: u64,
    part: Range<u64>,
    pace: Pace,
) -> Result<(), Fault> {
    let mut at = part.start;
    while at < part.end {
        match look(stream, seed, at, (part.end - at).min(pace.most())).await? {
            0 => return Err(Fault::Torn { at }),
            received => at += received,
        }
        pace.rest().await;
    }
    Ok(())
}

/// Nothing but a FIN may come.
pub(super) async fn receive_end(stream: &TcpStream, seed: u64, at: u64) -> Result<(), Fault> {
    match look(stream, seed, at, 1).await? {
        0 => Ok(()),
        _ => Err(Fault::TooMany),
    }
}

/// Receives until the connection breaks, and gives how many bytes were through. A FIN is a fault.
pub(super) async fn receive_until_reset(
    stream: &TcpStream,
    seed: u64,
    from: u64,
    pace: Pace,
) -> Result<u64, Fault> {
    let mut at = from;
    loop {
        match look(stream, seed, at, pace.most()).await {
            Ok(0) => return Err(Fault::Torn { at }),
            Ok(received) => at += received,
            Err(Fault::Broke { .. }) => return Ok(at),
            Err(fault) => return Err(fault),
        }
        pace.rest().await;
    }
}

/// What a side that receives until a reset has found, where it sends as well: a socket says its error once, and if the send was
/// told of the reset, there is nothing left to receive and no error. After a FIN the kernel would have said EPIPE (`tcp_reset()`).
pub(super) fn told<T>(received: Result<u64, Fault>, sent: &Result<T, Fault>) -> Result<u64, Fault> {
    match (received, sent) {
        (Err(Fault::Torn { at }), Err(Fault::Broke { error, .. }))
            if error.kind() == io::ErrorKind::ConnectionReset =>
        {
            Ok(at)
        }
        (received, _) => received,
    }
}

/// One receive: how many bytes came, each of them right; 0: a FIN.
async fn look(stream: &TcpStream, seed: u64, at: u64, most: u64) -> Result<u64, Fault> {
    loop {
        let received: io::Result<_> = match stream.readable().await {
            Ok(()) => BLOCK.with_borrow_mut(|block| {
                let received = stream.try_read(&mut block[..most as usize])?;
                Ok((received as u64, first_wrong(&block[..received], seed, at)))
            }),
            Err(error) => Err(error),
        };
        match received {
            Ok((_, Some(wrong))) => return Err(Fault::Wrong { at: wrong }),
            Ok((received, None)) => return Ok(received),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Fault::Broke { at, error }),
        }
    }
}

/// Waits until the other side has reset the connection. After its FIN nothing more can be read: the socket's state shows it.
pub(super) async fn broken(stream: &TcpStream) {
    while !matches!(stream.ready(Interest::ERROR).await, Ok(ready) if ready.is_error()) {}
}

/// Closes with RST instead of FIN.
pub(super) fn reset(stream: TcpStream) {
    reset_when_closed(&stream);
}

/// Its end will be RST instead of FIN.
pub(super) fn reset_when_closed(stream: &TcpStream) {
    // A connection that is gone already needs no reset.
    let _ = stream.set_zero_linger();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_that_a_send_was_told_of_is_no_fin() {
        let sent = |kind: io::ErrorKind| Err::<(), _>(Fault::Broke { at: 3, error: kind.into() });
        let torn = || Err(Fault::Torn { at: 7 });
        assert!(matches!(told(torn(), &sent(io::ErrorKind::ConnectionReset)), Ok(7)));
        assert!(matches!(told(torn(), &sent(io::ErrorKind::BrokenPipe)), Err(Fault::Torn { at: 7 })));
        assert!(matches!(told(torn(), &Ok(())), Err(Fault::Torn { at: 7 })));
        assert!(matches!(told(Ok(9), &Ok(())), Ok(9)));
    }

    #[test]
    fn an_order_comes_out_as_it_went_in() {
        for manner in Manner::ALL {
            let pace = Pace { at_once: 7, pause_ms: 9 };
            let order = Order { id: 1 << 40, manner, up: u64::MAX, down: 3, rounds: 5, pace };
            assert_eq!(Order::decode(&order.encode()), Some(order));
        }
        assert_eq!(Order::decode(&[0; Order::BYTES]), None);
        let order = Order { id: 0, manner: Manner::Hold, up: 0, down: 0, rounds: 0, pace: Pace::FREE };
        let mut unknown = order.encode();
        unknown[4] = Manner::ALL.len() as u8;
        assert_eq!(Order::decode(&unknown), None);
    }
}
