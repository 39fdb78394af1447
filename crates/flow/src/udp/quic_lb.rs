//! Server ids that are encrypted in connection IDs (draft-ietf-quic-load-balancers-21, sections 5.4 and 5.5): whoever sees two
//! IDs of one connection cannot tell that they are of one server.
//!
//! Behind the first octet of an ID are server id and nonce, encrypted together: as one block of AES-128 where they are 16 octets, else
//! by a Feistel network of four rounds with AES-128 in them.

use std::fmt;
use std::sync::Arc;

/// Octets of the shortest nonce.
pub const NONCE_MIN: u8 = 4;
/// Octets of the longest server id and nonce together: the rest of a connection ID of QUIC version 1.
pub const PLAINTEXT_MAX: usize = 19;
/// Configurations that there can be: their number is in three bits, of which all ones says that the ID is in none.
pub const CONFIGS: usize = 7;

const BLOCK: usize = 16;
/// Octets of half a plaintext, at most.
const HALF_MAX: usize = PLAINTEXT_MAX.div_ceil(2);

/// AES-128 with a key (FIPS 197). Whoever uses this crate brings it.
pub trait Cipher: Send + Sync {
    /// Encrypts a block.
    fn encrypt(&self, block: &mut [u8; BLOCK]);

    /// Decrypts a block.
    fn decrypt(&self, block: &mut [u8; BLOCK]);
}

/// The keys of the configurations that are in use, with the length of their nonces.
#[derive(Clone)]
pub struct ServerIdKeys {
    nonce: u8,
    keys: [Option<Key>; CONFIGS],
}

#[derive(Clone)]
struct Key {
    /// To compare it.
    key: [u8; BLOCK],
    cipher: Arc<dyn Cipher>,
}

impl ServerIdKeys {
    /// No key yet. `nonce` octets are behind each server id, [`NONCE_MIN`] at least.
    pub fn new(nonce: u8) -> Self {
        Self { nonce, keys: [const { None }; CONFIGS] }
    }

    /// With this key for the configuration, and the cipher that has it; false: there is one already, or no such configuration.
    pub fn insert(&mut self, config: u8, key: [u8; BLOCK], cipher: Arc<dyn Cipher>) -> bool {
        match self.keys.get_mut(usize::from(config)) {
            Some(place @ None) => {
                *place = Some(Key { key, cipher });
                true
            }
            _ => false,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.keys.iter().all(Option::is_none)
    }

    /// The server id of so many octets, and what follows it, in an ID of that configuration whose octets behind the first
    /// are these. `None`: it has no key, or the ID is too short.
    pub(super) fn open(&self, config: u8, octets: &[u8], server_id: usize) -> Option<[u8; PLAINTEXT_MAX]> {
        let Key { cipher, .. } = self.keys.get(usize::from(config))?.as_ref()?;
        let octets = octets.get(..server_id + usize::from(self.nonce))?;
        let mut plain = [0; PLAINTEXT_MAX];
        plain.get_mut(..octets.len())?.copy_from_slice(octets);
        match plain.first_chunk_mut::<BLOCK>() {
            Some(block) if octets.len() == BLOCK => cipher.decrypt(block),
            _ => Halves::split(octets).opened(&**cipher, server_id).join(&mut plain),
        }
        Some(plain)
    }
}

impl PartialEq for ServerIdKeys {
    fn eq(&self, other: &Self) -> bool {
        let keys = |of: &Self| of.keys.each_ref().map(|key| key.as_ref().map(|key| key.key));
        (self.nonce, keys(self)) == (other.nonce, keys(other))
    }
}

impl Eq for ServerIdKeys {}

impl fmt::Debug for ServerIdKeys {
    /// Without the keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let configs = (0..CONFIGS).filter(|config| self.keys[*config].is_some());
        f.debug_struct("ServerIdKeys")
            .field("nonce", &self.nonce)
            .field("configs", &configs.collect::<Vec<_>>())
            .finish()
    }
}

/// The two halves of a text, of as many octets each. Where the text is odd, the octet in the middle is in both: its high bits on
/// the left, its low bits on the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Halves {
    /// Octets of the whole text.
    length: usize,
    left: [u8; HALF_MAX],
    right: [u8; HALF_MAX],
}

impl Halves {
    fn split(text: &[u8]) -> Self {
        let (length, half) = (text.len(), text.len().div_ceil(2));
        let (mut left, mut right) = ([0; HALF_MAX], [0; HALF_MAX]);
        left[..half].copy_from_slice(&text[..half]);
        right[..half].copy_from_slice(&text[length - half..]);
        let mut halves = Self { length, left, right };
        halves.clear();
        halves
    }

    fn join(&self, into: &mut [u8]) {
        let half = self.length.div_ceil(2);
        into[..self.length - half].copy_from_slice(&self.left[..self.length - half]);
        into[self.length - half..self.length].copy_from_slice(&self.right[..half]);
        if self.length % 2 == 1 {
            into[half - 1] |= self.left[half - 1];
        }
    }

    /// Leaves of the octet in the middle what is each half's.
    fn clear(&mut self) {
        if self.length % 2 == 1 {
            self.left[self.length / 2] &= 0xf0;
            self.right[0] &= 0x0f;
        }
    }

    /// One half, altered by the other.
    fn round(&mut self, cipher: &dyn Cipher, pass: u8) {
        let (from, to) = match pass % 2 {
            1 => (&self.left, &mut self.right),
            _ => (&self.right, &mut self.left),
        };
        let half = self.length.div_ceil(2);
        let mut block = [0; BLOCK];
        block[..half].copy_from_slice(&from[..half]);
        (block[14], block[15]) = (self.length as u8, pass);
        cipher.encrypt(&mut block);
        to[..half].iter_mut().zip(block).for_each(|(octet, with)| *octet ^= with);
        self.clear();
    }

    /// Decrypted, as far as the first `wanted` octets go.
    fn opened(mut self, cipher: &dyn Cipher, wanted: usize) -> Self {
        for pass in [4, 3, 2] {
            self.round(cipher, pass);
        }
        if wanted > self.length / 2 {
            self.round(cipher, 1);
        }
        self
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
    use proptest::prelude::*;

    struct Aes(aes::Aes128);

    impl Cipher for Aes {
        fn encrypt(&self, block: &mut [u8; BLOCK]) {
            self.0.encrypt_block(block.into());
        }

        fn decrypt(&self, block: &mut [u8; BLOCK]) {
            self.0.decrypt_block(block.into());
        }
    }

    pub(in super::super) fn aes(key: [u8; BLOCK]) -> Arc<dyn Cipher> {
        Arc::new(Aes(aes::Aes128::new(&key.into())))
    }

    fn hex(digits: &str) -> Vec<u8> {
        digits
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    fn keys(config: u8, key: &str, nonce: usize) -> ServerIdKeys {
        let mut keys = ServerIdKeys::new(nonce as u8);
        let key = hex(key).try_into().unwrap();
        assert!(keys.insert(config, key, aes(key)));
        keys
    }

    /// Appendix B.2 of the draft, and the example of section 5.4.2.
    #[test]
    fn the_draft_s_vectors_are_opened() {
        let key = "8f95f09245765f80256934e50c66207f";
        for (config, key, sid, nonce, cid) in [
            (0, key, "ed793a", "ee080dbf", "0720b1d07b359d3c"),
            (1, key, "ed793a51d49b8f5fab65", "ee080dbf48", "2fcc381bc74cb4fbad2823a3d1f8fed2"),
            (2, key, "ed793a51d49b8f5f", "ee080dbf48c0d1e5", "504dd2d05a7b0de9b2b9907afb5ecf8cc3"),
            (3, key, "ed793a51d49b8f5fab", "ee080dbf48c0d1e55d", "125779c9cc86beb3a3a4a3ca96fce4bfe0cdbc"),
            (0, "fdf726a9893ec05c0632d3956680baf0", "31441a", "9c69c275", "0767947d29be054a"),
        ] {
            let (sid, cid) = (hex(sid), hex(cid));
            let keys = keys(config, key, hex(nonce).len());
            let opened = keys.open(config, &cid[1..], sid.len()).unwrap();
            assert_eq!(opened[..sid.len()], sid, "{config}");
            assert_eq!(keys.open(config, &cid[1..cid.len() - 1], sid.len()), None, "too short");
            assert_eq!(keys.open(config + 1, &cid[1..], sid.len()), None, "another configuration");
        }
    }

    #[test]
    fn a_configuration_has_one_key_which_nobody_sees() {
        let mut keys = keys(2, "8f95f09245765f80256934e50c66207f", 8);
        assert!(!keys.insert(2, [0; 16], aes([0; 16])) && !keys.insert(7, [0; 16], aes([0; 16])));
        assert!(!keys.is_empty() && ServerIdKeys::new(8).is_empty());
        assert_eq!(format!("{keys:?}"), "ServerIdKeys { nonce: 8, configs: [2] }");
        let other = self::keys(2, "8f95f09245765f80256934e50c662070", 8);
        assert!(keys == keys.clone() && keys != other);
    }

    proptest! {
        #[test]
        fn what_was_closed_is_opened(text in prop::collection::vec(any::<u8>(), 5..=19), key in any::<[u8; 16]>()) {
            let cipher = aes(key);
            let mut closed = Halves::split(&text);
            (1..=4).for_each(|pass| closed.round(&*cipher, pass));
            let mut opened = [0; PLAINTEXT_MAX];
            closed.opened(&*cipher, text.len()).join(&mut opened);
            prop_assert_eq!(&opened[..text.len()], &text[..]);
        }
    }
}
