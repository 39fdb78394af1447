//! Connection IDs that QUIC servers were seen to choose, and whose they are.
//!
//! A client that comes from another address (its NAT forgot it, it left its wireless network) keeps the ID of its connection:
//! its backend is found by that. Clients that change the ID as they move can be followed only by [`super::ServerIds`].

use std::collections::HashMap;

use super::quic::{CID_MAX, Cid, Header};
use super::tuple::Keyed;

/// Learned IDs of one listener, at most so many. `B` is how the caller names a backend.
#[derive(Debug)]
pub struct Cids<B> {
    known: HashMap<Cid, Entry<B>, Keyed>,
    /// How many of each length are known: which ones a short header is compared with.
    lengths: [u32; CID_MAX + 1],
    cids_max: usize,
}

#[derive(Debug)]
struct Entry<B> {
    backend: B,
    /// The flow that learned it, or took it over.
    owner: u64,
}

impl<B: Clone> Cids<B> {
    /// None yet; `seed` keys their hash.
    pub fn new(seed: u64, cids_max: usize) -> Self {
        Self { known: HashMap::with_hasher(Keyed::new(seed)), lengths: [0; CID_MAX + 1], cids_max }
    }

    /// How many are known.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// `cid` belongs to a connection with `backend`, carried by the flow `owner`. False at the bound: it is not kept.
    pub fn learn(&mut self, cid: Cid, backend: B, owner: u64) -> bool {
        if let Some(entry) = self.known.get_mut(&cid) {
            *entry = Entry { backend, owner };
            return true;
        }
        if self.known.len() >= self.cids_max {
            return false;
        }
        self.lengths[cid.as_bytes().len()] += 1;
        self.known.insert(cid, Entry { backend, owner });
        true
    }

    /// The flow `owner` is over. The ID stays if another flow has taken it over.
    pub fn forget(&mut self, cid: &Cid, owner: u64) {
        if self.known.get(cid).is_some_and(|entry| entry.owner == owner) {
            self.known.remove(cid);
            self.lengths[cid.as_bytes().len()] -= 1;
        }
    }

    /// The connection that a client's packet belongs to, where it is known: its ID and its backend.
    pub fn find(&self, packet: &[u8]) -> Option<(Cid, B)> {
        let look = |bytes: &[u8]| {
            let cid = Cid::new(bytes)?;
            self.known.get(&cid).map(|entry| (cid, entry.backend.clone()))
        };
        match Header::parse(packet)? {
            Header::Long { destination, .. } => look(destination),
            // Longest first: a shorter one may be the beginning of it.
            Header::Short(rest) => (1..=CID_MAX.min(rest.len()))
                .rev()
                .filter(|length| self.lengths[*length] > 0)
                .find_map(|length| look(&rest[..length])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cid(bytes: &[u8]) -> Cid {
        Cid::new(bytes).unwrap()
    }

    fn short(cid: &[u8]) -> Vec<u8> {
        [&[0x40], cid, &[3; 25]].concat()
    }

    #[test]
    fn a_moved_client_is_found_until_its_flows_are_over() {
        let mut cids = Cids::new(7, 10);
        assert!(cids.learn(cid(&[1; 8]), "a", 1));
        assert!(cids.learn(cid(&[2; 5]), "b", 2));
        assert_eq!(cids.find(&short(&[1; 8])), Some((cid(&[1; 8]), "a")));
        assert_eq!(cids.find(&short(&[2; 5])), Some((cid(&[2; 5]), "b")));
        assert_eq!(cids.find(&short(&[1; 7])), None, "an ID is known whole");
        // The client moves: its new flow takes the ID over, and the end of the old one does not end it.
        assert!(cids.learn(cid(&[1; 8]), "a", 3));
        cids.forget(&cid(&[1; 8]), 1);
        assert!(cids.find(&short(&[1; 8])).is_some());
        cids.forget(&cid(&[1; 8]), 3);
        assert_eq!((cids.find(&short(&[1; 8])), cids.len()), (None, 1));
    }

    #[test]
    fn they_are_bounded() {
        let mut cids = Cids::new(7, 2);
        assert!(cids.learn(cid(&[1]), 1, 1) && cids.learn(cid(&[2]), 2, 2));
        assert!(!cids.learn(cid(&[3]), 3, 3));
        assert!(cids.learn(cid(&[2]), 9, 4), "a known one may change its owner");
        cids.forget(&cid(&[1]), 1);
        assert!(cids.learn(cid(&[3]), 3, 3));
        assert!(!cids.is_empty());
    }
}
