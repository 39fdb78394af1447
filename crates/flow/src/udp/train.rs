//! Which datagrams may go out as one (`UDP_SEGMENT`, `udp(7)`).
//!
//! The kernel cuts what it is given into datagrams of one size, of which the last may be shorter. Trains that were received
//! (`UDP_GRO`) are of this form already; single ones of the same flow that came together can be made into one.

/// Most datagrams that the kernel cuts one send into (`UDP_MAX_SEGMENTS`).
pub const SEGMENTS_MAX: u32 = 64;
/// Most bytes of one send: the payload of the largest IPv4 datagram.
pub const TRAIN_BYTES_MAX: u32 = 65_507;

/// The form of what goes out in one send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Train {
    /// Bytes of each datagram but the last.
    segment: u32,
    bytes: u32,
    datagrams: u32,
    /// The last datagram is shorter than the others: nothing may follow it.
    ended: bool,
}

impl Train {
    /// What was received at once: datagrams of `segment` bytes each, the last one shorter or not, `bytes` together. One alone
    /// has `segment` 0.
    pub fn received(bytes: u32, segment: u32) -> Self {
        let alone = segment == 0 || segment >= bytes;
        let segment = if alone { bytes } else { segment };
        Self {
            segment,
            bytes,
            datagrams: if alone { 1 } else { bytes.div_ceil(segment) },
            // An empty datagram cannot be cut from anything.
            ended: bytes == 0 || !bytes.is_multiple_of(segment),
        }
    }

    /// Adds what came after it, if that can go out in one send with it.
    pub fn join(&mut self, next: &Self) -> bool {
        let fits =
            self.datagrams + next.datagrams <= SEGMENTS_MAX && self.bytes + next.bytes <= TRAIN_BYTES_MAX;
        let same = next.segment == self.segment || (next.datagrams == 1 && next.bytes < self.segment);
        if self.ended || !fits || !same || next.bytes == 0 {
            return false;
        }
        self.ended = next.ended || next.segment != self.segment;
        self.bytes += next.bytes;
        self.datagrams += next.datagrams;
        true
    }

    /// As [`Self::join`], where each datagram goes out with so many bytes before it.
    pub fn join_headed(&mut self, next: &Self, header: u32) -> bool {
        self.bytes_headed(header).saturating_add(next.bytes_headed(header)) <= TRAIN_BYTES_MAX
            && self.join(next)
    }

    /// Bytes of all of them, each with so many before it.
    pub const fn bytes_headed(&self, header: u32) -> u32 {
        self.bytes.saturating_add(self.datagrams.saturating_mul(header))
    }

    /// How many datagrams it is.
    pub const fn datagrams(&self) -> u32 {
        self.datagrams
    }

    /// Bytes of all of them.
    pub const fn bytes(&self) -> u32 {
        self.bytes
    }

    /// What the kernel must be told to cut it by; 0 where it is one datagram.
    pub const fn segment(&self) -> u32 {
        if self.datagrams > 1 { self.segment } else { 0 }
    }

    /// The lengths of its datagrams, in order.
    pub fn lengths(&self) -> impl Iterator<Item = u32> + use<> {
        let Self { segment, bytes, datagrams, .. } = *self;
        (0..datagrams).map(move |n| segment.min(bytes - n * segment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_the_kernel_gave_is_taken_as_it_is() {
        let train = Train::received(3_000, 1_200);
        assert_eq!((train.datagrams(), train.segment()), (3, 1_200));
        assert_eq!(train.lengths().collect::<Vec<_>>(), [1_200, 1_200, 600]);
        for alone in [Train::received(64, 0), Train::received(64, 64), Train::received(64, 100)] {
            assert_eq!((alone.datagrams(), alone.segment(), alone.bytes()), (1, 0, 64));
        }
        assert_eq!(Train::received(0, 0).lengths().collect::<Vec<_>>(), [0], "an empty datagram is one");
    }

    #[test]
    fn headers_take_room_in_a_train() {
        let datagram = Train::received(1_200, 0);
        let joined = |header| {
            let mut train = datagram;
            while train.join_headed(&datagram, header) {}
            train
        };
        assert_eq!((joined(0).datagrams(), joined(100).datagrams()), (54, 50));
        assert!(joined(100).bytes_headed(100) <= TRAIN_BYTES_MAX);
        assert!(!Train::received(65_507, 0).join_headed(&Train::received(1, 0), u32::MAX));
    }

    proptest! {
        /// However datagrams are joined, those that the kernel cuts are those that came, in order.
        #[test]
        fn nothing_is_lost_or_merged(
            pieces in prop::collection::vec((0..3_000_u32, prop_oneof![Just(0), Just(100), Just(1_200), 1..2_000_u32]), 1..200),
        ) {
            let mut sent: Vec<Train> = Vec::new();
            let mut came = Vec::new();
            for (bytes, segment) in pieces {
                let piece = Train::received(bytes, segment);
                came.extend(piece.lengths());
                if !sent.last_mut().is_some_and(|last| last.join(&piece)) {
                    sent.push(piece);
                }
            }
            let cut: Vec<u32> = sent.iter().flat_map(Train::lengths).collect();
            prop_assert_eq!(cut, came);
            for train in &sent {
                prop_assert!(train.bytes() <= TRAIN_BYTES_MAX);
                // What came as one may be more (the kernel made it), what was joined may not.
                prop_assert_eq!(train.lengths().sum::<u32>(), train.bytes());
                prop_assert!(train.lengths().take(train.datagrams() as usize - 1).all(|n| n == train.segment()));
            }
        }
    }
}
