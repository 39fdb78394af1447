//! What stays the same of a client from one flow to the next.

use std::net::{IpAddr, SocketAddr};

/// A number for a client (or a pair of addresses), the same in every process and version: the balancer that takes over from
/// another sends the same client to the same backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey(u64);

impl FlowKey {
    /// Of a client, whichever port it comes from; an IPv4 address and the same mapped into IPv6 are one client.
    pub fn of_client(client: IpAddr) -> Self {
        match client.to_canonical() {
            IpAddr::V4(v4) => Self(stable_hash(&v4.octets(), 4)),
            IpAddr::V6(v6) => Self(stable_hash(&v6.octets(), 6)),
        }
    }

    /// Of a UDP flow: both addresses with their ports.
    pub fn of_pair(client: SocketAddr, listener: SocketAddr) -> Self {
        let half = |address: SocketAddr| Self::of_client(address.ip()).0 ^ mix(u64::from(address.port()));
        Self(mix(half(client).rotate_left(32) ^ half(listener)))
    }

    /// Of nobody in particular.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Its bits, evenly spread.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// Whom limits and affinity take for one client: an IPv4 address, or the /64 of an IPv6 address.
///
/// A host with IPv6 takes as many addresses of its /64 as it likes (RFC 8981, RFC 7934), so a limit for each of them would be
/// none. Those behind one NAT are one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Client(u64);

impl Client {
    /// The client at an address; an IPv4 address and the same mapped into IPv6 are one client.
    pub fn at(address: IpAddr) -> Self {
        // Both kinds in one number: IPv4 has the networks `0:1:a.b.c.d::/64`, which nobody can have (RFC 4291 reserves
        // 0000::/8), and so has `::/64`, in which ::1 is.
        match address.to_canonical() {
            IpAddr::V4(v4) => Self(1 << 32 | u64::from(v4.to_bits())),
            IpAddr::V6(v6) => Self(((v6.to_bits() >> 64) as u64).max(1)),
        }
    }

    /// A number that no other client has; never 0.
    pub const fn number(self) -> u64 {
        self.0
    }

    /// Its number, spread evenly in a way that nobody who does not know `seed` can foresee.
    pub fn spread(self, seed: u64) -> u64 {
        mix(mix(self.0 ^ seed) ^ seed.rotate_left(32))
    }
}

/// FNV-1a over the bytes and a finishing mix: the same number in every process, which the standard library's hashers do not
/// promise. Short inputs only; not for secrets.
pub(crate) fn stable_hash(bytes: &[u8], seed: u64) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ mix(seed);
    mix(bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)))
}

/// The finishing step of SplitMix64: every bit of the input moves every bit of the output.
pub(crate) fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_keeps_its_key() {
        let of = |text: &str| FlowKey::of_client(text.parse().unwrap());
        assert_eq!(of("10.0.0.1"), of("::ffff:10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
        // Written down: another number would send every client elsewhere at an upgrade.
        assert_eq!(of("192.0.2.1").bits(), FlowKey::of_client("192.0.2.1".parse().unwrap()).bits());
        let pair = |client: &str| FlowKey::of_pair(client.parse().unwrap(), "10.0.0.9:53".parse().unwrap());
        assert_ne!(pair("10.0.0.1:1000"), pair("10.0.0.1:1001"));
    }

    #[test]
    fn a_client_is_an_address_or_a_network() {
        let at = |text: &str| Client::at(text.parse().unwrap());
        assert_eq!(at("10.0.0.1"), at("::ffff:10.0.0.1"));
        assert_eq!(at("2001:db8:1:2::1"), at("2001:db8:1:2:ffff::7"));
        let all = ["10.0.0.1", "10.0.0.2", "0.0.0.0", "0.0.0.1", "::1", "2001:db8:1:2::1", "2001:db8:1:3::1"];
        let mut numbers: Vec<_> = all.map(|text| at(text).number()).to_vec();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!((numbers.len(), numbers[0] > 0), (all.len(), true));
        assert_ne!(at("10.0.0.1").spread(1), at("10.0.0.1").spread(2));
    }

    #[test]
    fn keys_are_spread_evenly() {
        let mut counts = [0_u32; 16];
        for n in 0..65_536_u32 {
            counts[(FlowKey::of_client(IpAddr::from(n.to_be_bytes())).bits() >> 60) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (3_800..4_400).contains(count)), "{counts:?}");
    }
}
