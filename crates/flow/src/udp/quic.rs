//! What of a QUIC packet is in clear text in every version: the connection IDs (RFC 8999).
//!
//! A packet with a long header (first bit 1) says how long its IDs are. One with a short header does not: only who chose the
//! ID knows, which is the server. So its first bytes are compared with IDs that servers were seen to use ([`super::Cids`]), or
//! read by the form that servers and balancer agreed on ([`ServerIds`], "QUIC-LB", draft-ietf-quic-load-balancers).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::quic_lb::ServerIdKeys;

/// Bytes of the longest connection ID of QUIC versions 1 and 2 (RFC 9000 section 17.2). RFC 8999 allows 255 in later ones;
/// those are not followed.
pub const CID_MAX: usize = 20;

/// A connection ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cid {
    length: u8,
    bytes: [u8; CID_MAX],
}

impl Cid {
    /// `None` where it is empty, or longer than [`CID_MAX`].
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut cid = Self { length: u8::try_from(bytes.len()).ok()?, bytes: [0; CID_MAX] };
        cid.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        (!bytes.is_empty()).then_some(cid)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// What a packet says of the connection it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header<'a> {
    /// It says whom it is for, and from whom.
    Long {
        /// 0: the packet is a version negotiation.
        version: u32,
        /// Chosen by the receiver, or at random by a client that does not know it yet.
        destination: &'a [u8],
        /// Chosen by the sender.
        source: &'a [u8],
    },
    /// The receiver's ID is at the beginning of this; how long it is only the receiver knows.
    Short(&'a [u8]),
}

impl<'a> Header<'a> {
    /// Reads what all versions have in common. `None` where it cannot be a QUIC packet.
    pub fn parse(packet: &'a [u8]) -> Option<Self> {
        let (first, rest) = packet.split_first()?;
        if first & 0x80 == 0 {
            return Some(Self::Short(rest));
        }
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (length, rest) = rest.split_first()?;
        let (destination, rest) = rest.split_at_checked(usize::from(*length))?;
        let (length, rest) = rest.split_first()?;
        let (source, _) = rest.split_at_checked(usize::from(*length))?;
        Some(Self::Long { version: u32::from_be_bytes(*version), destination, source })
    }
}

/// The ID that a server chose for itself, where this is a packet of a handshake from it.
///
/// In a version negotiation it repeats what the client chose: that is nobody's.
pub fn source_cid(packet: &[u8]) -> Option<Cid> {
    match Header::parse(packet)? {
        Header::Long { version: 1.., source, .. } => Cid::new(source),
        _ => None,
    }
}

/// What servers put into the connection IDs that they choose, behind the first octet, whose three highest bits are the number of
/// the configuration: in clear text, or encrypted ([`ServerIdKeys`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerIdForm {
    /// The backend's IPv4 address: 4 octets.
    Ipv4,
    /// The backend's IPv4 address and port: 6 octets.
    Ipv4Port,
    /// The resource's id, read as that many octets in hexadecimal digits.
    Id(u8),
}

/// Bits of the first octet that name the configuration; all ones says that the ID cannot be routed.
const UNROUTABLE: u8 = 0b111;

impl ServerIdForm {
    /// Octets of a server id.
    pub const fn octets(self) -> usize {
        match self {
            Self::Ipv4 => 4,
            Self::Ipv4Port => 6,
            Self::Id(octets) => octets as usize,
        }
    }

    /// The server id of a backend, where it has one.
    pub fn of(self, id: &str, address: SocketAddr) -> Option<Vec<u8>> {
        let v4 = match address.ip().to_canonical() {
            IpAddr::V4(v4) => Some(v4.octets()),
            IpAddr::V6(_) => None,
        };
        match self {
            Self::Ipv4 => Some(v4?.to_vec()),
            Self::Ipv4Port => Some([&v4?[..], &address.port().to_be_bytes()].concat()),
            Self::Id(octets) => {
                let digits = id.as_bytes();
                if digits.len() != 2 * usize::from(octets) || !digits.iter().all(u8::is_ascii_hexdigit) {
                    return None;
                }
                digits
                    .chunks(2)
                    .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
                    .collect()
            }
        }
    }
}

/// Which backend has which server id. `B` is how the caller names a backend.
#[derive(Debug, Clone)]
pub struct ServerIds<B> {
    form: ServerIdForm,
    keys: Option<Arc<ServerIdKeys>>,
    backends: HashMap<Box<[u8]>, B>,
}

impl<B: Copy> ServerIds<B> {
    /// Those of these backends (name, id, address) that have one. Without keys they are in clear text.
    pub fn new<'a>(
        form: ServerIdForm,
        keys: Option<Arc<ServerIdKeys>>,
        backends: impl IntoIterator<Item = (B, &'a str, SocketAddr)>,
    ) -> Self {
        let entry = |(name, id, address)| Some((form.of(id, address)?.into(), name));
        Self { form, keys, backends: backends.into_iter().filter_map(entry).collect() }
    }

    /// The backend that a client's packet names, where it names one.
    pub fn find(&self, packet: &[u8]) -> Option<B> {
        let cid = match Header::parse(packet)? {
            Header::Long { destination, .. } => destination,
            Header::Short(rest) => rest,
        };
        let (first, rest) = cid.split_first()?;
        let config = first >> 5;
        if config == UNROUTABLE {
            return None;
        }
        let octets = self.form.octets();
        match &self.keys {
            None => self.backends.get(rest.get(..octets)?),
            Some(keys) => self.backends.get(keys.open(config, rest, octets)?.get(..octets)?),
        }
        .copied()
    }
}

#[cfg(test)]
mod tests {
    use super::super::quic_lb::tests::aes;
    use super::*;
    use proptest::prelude::*;

    fn long(version: u32, destination: &[u8], source: &[u8]) -> Vec<u8> {
        let mut packet = vec![0xc3];
        packet.extend(version.to_be_bytes());
        packet.push(destination.len() as u8);
        packet.extend(destination);
        packet.push(source.len() as u8);
        packet.extend(source);
        packet.extend([7; 30]);
        packet
    }

    #[test]
    fn a_long_header_names_both() {
        let packet = long(1, &[1, 2, 3], &[4, 5, 6, 7]);
        let header = Header::Long { version: 1, destination: &[1, 2, 3], source: &[4, 5, 6, 7] };
        assert_eq!(Header::parse(&packet), Some(header));
        assert_eq!(source_cid(&packet).unwrap().as_bytes(), [4, 5, 6, 7]);
        assert_eq!(source_cid(&long(0, &[1, 2, 3], &[4, 5])), None, "a version negotiation");
        assert_eq!(source_cid(&long(1, &[1], &[])), None, "the server wants none");
        assert_eq!(source_cid(&long(1, &[1], &[9; 21])), None, "longer than any of today");
        for cut in 0..14 {
            assert_eq!(Header::parse(&packet[..cut]), None, "{cut} bytes of it");
        }
    }

    #[test]
    fn the_example_of_rfc_9001_is_read() {
        // Appendix A.3: the server's Initial, with an empty destination ID.
        let packet =
            [0xcf, 0x00, 0x00, 0x00, 0x01, 0x00, 0x08, 0xf0, 0x67, 0xa5, 0x50, 0x2a, 0x42, 0x62, 0xb5, 0x00];
        let cid = source_cid(&packet).unwrap();
        assert_eq!(cid.as_bytes(), [0xf0, 0x67, 0xa5, 0x50, 0x2a, 0x42, 0x62, 0xb5]);
    }

    #[test]
    fn server_ids_are_read_where_they_were_agreed_to_be() {
        let backends = || {
            [
                (1, "0a0B0c", "10.0.0.1:443".parse().unwrap()),
                (2, "pg2", "10.0.0.2:443".parse().unwrap()),
                (3, "000102", "[2001:db8::1]:443".parse().unwrap()),
            ]
        };
        let short = |cid: &[u8]| [&[0x41], cid, &[9; 20]].concat();
        let by = |form| ServerIds::new(form, None, backends());
        assert_eq!(by(ServerIdForm::Ipv4).find(&short(&[0x07, 10, 0, 0, 2, 99])), Some(2));
        assert_eq!(by(ServerIdForm::Ipv4).find(&short(&[0x07, 10, 0, 0, 3, 99])), None);
        assert_eq!(by(ServerIdForm::Ipv4).find(&long(1, &[0x67, 10, 0, 0, 1, 5], &[])), Some(1));
        assert_eq!(by(ServerIdForm::Ipv4Port).find(&short(&[0x27, 10, 0, 0, 1, 0x01, 0xbb])), Some(1));
        assert_eq!(by(ServerIdForm::Ipv4Port).find(&short(&[0x27, 10, 0, 0, 1, 0x01, 0xbc])), None);
        assert_eq!(by(ServerIdForm::Id(3)).find(&short(&[0x47, 0x0a, 0x0b, 0x0c])), Some(1));
        assert_eq!(by(ServerIdForm::Id(3)).find(&short(&[0x47, 0, 1, 2])), Some(3));
        assert_eq!(by(ServerIdForm::Id(3)).find(&short(&[0xe7, 0, 1, 2])), None, "said to be unroutable");
        assert_eq!(by(ServerIdForm::Id(3)).find(&[0x41, 0x47, 0x0a]), None, "too short");
    }

    #[test]
    fn encrypted_server_ids_are_read_with_the_key_of_their_configuration() {
        // Two of the draft's vectors (appendix B.2), as resources whose ids are three octets.
        let backends = [(1, "ed793a", "10.0.0.1:443".parse().unwrap())];
        let mut keys = ServerIdKeys::new(4);
        let key = 0x8f95_f092_4576_5f80_2569_34e5_0c66_207f_u128.to_be_bytes();
        assert!(keys.insert(0, key, aes(key)) && keys.insert(1, [7; 16], aes([7; 16])));
        let ids = ServerIds::new(ServerIdForm::Id(3), Some(Arc::new(keys)), backends);
        let cid = [0x07, 0x20, 0xb1, 0xd0, 0x7b, 0x35, 0x9d, 0x3c];
        let short = |first: u8| [&[0x41, first], &cid[1..], &[9; 20]].concat();
        assert_eq!(ids.find(&short(0x07)), Some(1));
        assert_eq!(ids.find(&long(1, &cid, &[])), Some(1));
        assert_eq!(ids.find(&short(0x27)), None, "another key");
        assert_eq!(ids.find(&short(0x47)), None, "a configuration without one");
        assert_eq!(ids.find(&short(0xe7)), None, "said to be unroutable");
        assert_eq!(ids.find(&long(1, &cid[..7], &[])), None, "too short");
    }

    proptest! {
        #[test]
        fn nothing_panics(packet in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = (Header::parse(&packet), source_cid(&packet));
            let ids = ServerIds::new(ServerIdForm::Ipv4Port, None, [((), "x", "10.0.0.1:443".parse().unwrap())]);
            let _ = ids.find(&packet);
        }
    }
}
