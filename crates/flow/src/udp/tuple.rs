//! What a flow is found by, and a hash of it that clients cannot steer.

use std::hash::{BuildHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};

/// Who a datagram is from and where it was sent: one flow's name.
///
/// Packed into five words, because a table of flows is looked into for every datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple([u64; 5]);

impl Tuple {
    /// Of a datagram from `client` to `door`, which is a port of a listener. `local` is the address it was sent to where the listener is bound to every
    /// address of the host: then the same client has a flow with each of them.
    pub fn new(door: u16, client: SocketAddr, local: Option<IpAddr>) -> Self {
        let [client_high, client_low] = words(client.ip());
        let [local_high, local_low] = local.map_or([0; 2], words);
        // A link-local address means something only together with its interface.
        let scope = if let SocketAddr::V6(v6) = client { v6.scope_id() } else { 0 };
        let numbers = u64::from(scope) << 32 | u64::from(client.port()) << 16 | u64::from(door);
        Self([client_high, client_low, numbers, local_high, local_low])
    }
}

/// One flow's name where a proxy in front says whose a datagram is: one socket of the proxy may bring those of many clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announced {
    proxy: Tuple,
    between: [u64; 5],
}

impl Announced {
    /// Of a datagram that the proxy sent, from `source` to `destination` as its header says.
    pub fn new(proxy: Tuple, source: SocketAddr, destination: SocketAddr) -> Self {
        let ([source_high, source_low], [high, low]) = (words(source.ip()), words(destination.ip()));
        let ports = u64::from(source.port()) << 16 | u64::from(destination.port());
        Self { proxy, between: [source_high, source_low, high, low, ports] }
    }
}

impl Hash for Announced {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.proxy.hash(state);
        self.between.iter().for_each(|word| state.write_u64(*word));
    }
}

impl Hash for Tuple {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.iter().for_each(|word| state.write_u64(*word));
    }
}

/// An IPv4 address is its mapped form (`::ffff:a.b.c.d`): no address of both families is the same.
fn words(ip: IpAddr) -> [u64; 2] {
    let bits = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    [(bits >> 64) as u64, bits as u64]
}

/// Makes hashers that are keyed: who does not know the seed cannot choose addresses that fall together. (Anyone can send
/// datagrams with any source address.)
#[derive(Debug, Clone, Copy)]
pub(super) struct Keyed([u64; 2]);

impl Keyed {
    pub(super) fn new(seed: u64) -> Self {
        let first = fold(seed ^ 0x9E37_79B9_7F4A_7C15, 0xD6E8_FEB8_6659_FD93);
        Self([first, fold(seed.rotate_left(32) ^ first, 0xA076_1D64_78BD_642F) | 1])
    }
}

impl BuildHasher for Keyed {
    type Hasher = Folded;

    fn build_hasher(&self) -> Folded {
        Folded { state: self.0[0], key: self.0[1] }
    }
}

/// Folded multiplication (wyhash, and what Rust's foldhash does): one multiplication for each word.
#[derive(Debug, Clone, Copy)]
pub(super) struct Folded {
    state: u64,
    key: u64,
}

impl Hasher for Folded {
    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.state = fold(self.state ^ word, self.key).wrapping_add(self.key);
    }

    fn finish(&self) -> u64 {
        fold(self.state, 0xE703_7ED1_A0B4_28DB)
    }
}

const fn fold(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(client: &str, local: Option<&str>) -> Tuple {
        Tuple::new(3, client.parse().unwrap(), local.map(|text| text.parse().unwrap()))
    }

    #[test]
    fn whatever_differs_makes_another_flow() {
        let one = tuple("192.0.2.1:5000", None);
        assert_eq!(one, tuple("192.0.2.1:5000", None));
        for other in [
            tuple("192.0.2.1:5001", None),
            tuple("192.0.2.2:5000", None),
            tuple("192.0.2.1:5000", Some("10.0.0.1")),
            tuple("[2001:db8::1]:5000", None),
            Tuple::new(4, "192.0.2.1:5000".parse().unwrap(), None),
        ] {
            assert_ne!(one, other);
        }
        assert_ne!(tuple("[fe80::1%1]:9", None), tuple("[fe80::1%2]:9", None));
    }

    #[test]
    fn a_proxy_s_socket_is_as_many_flows_as_it_says() {
        let at = |text: &str| text.parse().unwrap();
        let proxy = tuple("10.0.0.1:53", None);
        let one = Announced::new(proxy, at("192.0.2.1:5000"), at("198.51.100.1:53"));
        assert_eq!(one, Announced::new(proxy, at("192.0.2.1:5000"), at("198.51.100.1:53")));
        for (proxy, source, destination) in [
            (tuple("10.0.0.1:54", None), "192.0.2.1:5000", "198.51.100.1:53"),
            (proxy, "192.0.2.2:5000", "198.51.100.1:53"),
            (proxy, "192.0.2.1:5001", "198.51.100.1:53"),
            (proxy, "192.0.2.1:5000", "198.51.100.2:53"),
            (proxy, "192.0.2.1:5000", "198.51.100.1:54"),
            (proxy, "[2001:db8::1]:5000", "[2001:db8::2]:53"),
        ] {
            let other = Announced::new(proxy, at(source), at(destination));
            assert_ne!(one, other);
            assert_ne!(Keyed::new(1).hash_one(one), Keyed::new(1).hash_one(other));
        }
    }

    #[test]
    fn hashes_are_spread_and_keyed() {
        // One client and its ports, and one port of many clients: both fill the 256 places evenly.
        let (a, b) = (Keyed::new(1), Keyed::new(2));
        let mut counts = [[0_u32; 256]; 2];
        let mut same = 0;
        for n in 0..65_536_u32 {
            let [_, x, y, _] = n.to_be_bytes();
            for (kind, text) in
                [(0, format!("192.0.2.1:{n}")), (1, format!("10.7.{x}.{y}:{}", 40_000 + (n & 0xff)))]
            {
                let Ok(client) = text.parse() else { continue };
                let tuple = Tuple::new(0, client, None);
                counts[kind][(a.hash_one(tuple) >> 56) as usize] += 1;
                same += u32::from(a.hash_one(tuple) >> 56 == b.hash_one(tuple) >> 56);
            }
        }
        for count in counts.iter().flatten() {
            assert!((128..=420).contains(count), "{counts:?}");
        }
        assert!(same < 2_000, "{same} of 131,072 fall alike under two keys");
    }
}
