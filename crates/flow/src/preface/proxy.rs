//! The PROXY protocol, versions 1 and 2: who the client of a proxy in front of us is.
//!
//! Owns: reading a header from the first bytes of a connection or datagram, and writing one. Section numbers are those of
//! "The PROXY protocol, versions 1 & 2" (HAProxy, `doc/proxy-protocol.txt`).
//! Does not own: whom to believe (only networks that an operator trusts), and taking the bytes off the connection.
//!
//! Invariant: what is said of some bytes is said of any more that follow them.

use std::fmt;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Progress;
use super::crc32c::Crc32c;

/// Most bytes of a version 1 header with its CRLF (§2.1).
pub const V1_MAX: usize = 107;
/// Most bytes after the 16 fixed ones of a version 2 header that is read. The format allows 65,535; addresses take 216 at
/// most, and the longest TLVs in use (a client's certificate name, a cloud's endpoint) some hundreds.
pub const V2_PAYLOAD_MAX: usize = 4_096;
/// Most bytes of a header of either version.
pub const HEADER_MAX: usize = V2_FIXED + V2_PAYLOAD_MAX;

/// What a version 2 header starts with (§2.2).
pub const V2_SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const V1_SIGNATURE: &[u8] = b"PROXY ";
/// Signature, version and command, family and transport, length.
const V2_FIXED: usize = 16;
/// Of an `AF_UNIX` address.
const UNIX_BYTES: usize = 108;
/// Most bytes of a unique id (§2.2.5).
const UNIQUE_ID_MAX: usize = 128;

/// Types of TLVs (§2.2.1 and following).
pub mod tlv {
    /// Which protocol was negotiated.
    pub const ALPN: u8 = 0x01;
    /// The host name that the client asked for.
    pub const AUTHORITY: u8 = 0x02;
    /// Checksum of the header.
    pub const CRC32C: u8 = 0x03;
    /// Padding.
    pub const NOOP: u8 = 0x04;
    /// The connection's id, the same in every log.
    pub const UNIQUE_ID: u8 = 0x05;
    /// What the sender knows of the client's TLS.
    pub const SSL: u8 = 0x20;
    /// The sender's network namespace.
    pub const NETNS: u8 = 0x30;
}

/// A version of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// One line of text.
    V1,
    /// Binary.
    V2,
}

/// Which versions are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Accepts {
    /// Version 1 alone.
    V1,
    /// Version 2 alone.
    V2,
    /// Both: the first byte tells which (§2.3).
    Any,
}

impl Accepts {
    const fn takes(self, version: Version) -> bool {
        matches!((self, version), (Self::Any, _) | (Self::V1, Version::V1) | (Self::V2, Version::V2))
    }
}

/// How the client reached the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Unknown.
    Unspecified,
    /// TCP, or a stream over a Unix socket.
    Stream,
    /// UDP, or datagrams over a Unix socket.
    Datagram,
}

/// Between whom the proxied connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addresses {
    /// `LOCAL`, `UNKNOWN` or `UNSPEC`: the proxy's connection is its own, its endpoints are the ones that count.
    Own,
    /// A client and whom it connected to, of one family.
    Inet {
        /// The client.
        source: SocketAddr,
        /// Where it connected to.
        destination: SocketAddr,
    },
    /// Paths of Unix sockets: the source's 108 bytes, then the destination's.
    Unix(Box<[u8; 2 * UNIX_BYTES]>),
}

impl Addresses {
    /// Of a connection, in one family: an IPv4 address mapped into IPv6 is written as IPv4 if both are, and an IPv4 address
    /// beside one of IPv6 is mapped.
    pub fn between(source: SocketAddr, destination: SocketAddr) -> Self {
        let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let (source, destination) = (canonical(source), canonical(destination));
        if source.is_ipv4() == destination.is_ipv4() {
            return Self::Inet { source, destination };
        }
        let mapped = |address: SocketAddr| match address.ip() {
            IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
            IpAddr::V6(_) => address,
        };
        Self::Inet { source: mapped(source), destination: mapped(destination) }
    }

    /// The client, if it has an address of the Internet.
    pub fn source(&self) -> Option<SocketAddr> {
        match self {
            Self::Inet { source, .. } => Some(*source),
            Self::Own | Self::Unix(_) => None,
        }
    }
}

/// A header that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header<'a> {
    /// Which version it is of.
    pub version: Version,
    /// The proxy speaks for itself (`LOCAL`: a health check).
    pub local: bool,
    /// How the client reached the proxy.
    pub transport: Transport,
    /// Between whom.
    pub addresses: Addresses,
    /// Its bytes; what follows them is the client's.
    pub length: usize,
    /// Checked: they fill the header, and their checksum is right.
    tlvs: &'a [u8],
}

impl<'a> Header<'a> {
    /// Its TLVs, in order, with those that only matter between the proxy and us.
    pub fn tlvs(&self) -> Tlvs<'a> {
        Tlvs { rest: self.tlvs }
    }

    /// Its TLVs as they came.
    pub fn tlv_bytes(&self) -> &'a [u8] {
        self.tlvs
    }

    /// The first TLV of this type.
    pub fn tlv(&self, kind: u8) -> Option<&'a [u8]> {
        self.tlvs().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }
}

/// TLVs that were checked, as type and value.
#[derive(Debug, Clone)]
pub struct Tlvs<'a> {
    rest: &'a [u8],
}

impl<'a> Tlvs<'a> {
    /// Of bytes that [`Header::tlv_bytes`] gave; others end where they are no TLVs any more.
    pub const fn of(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }
}

impl<'a> Iterator for Tlvs<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&[kind, high, low], rest) = self.rest.split_first_chunk::<3>()?;
        let length = usize::from(u16::from_be_bytes([high, low]));
        let (value, rest) = rest.split_at_checked(length)?;
        self.rest = rest;
        Some((kind, value))
    }
}

/// Why bytes are not a header that we take. The proxy in front of us is to be mended, or our configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ProxyError {
    /// Something else than a PROXY header came first.
    #[error("the first bytes are not a PROXY header")]
    Missing,
    /// A header of the other version.
    #[error("a PROXY header of version {}, which is not taken here", if *.0 == Version::V1 { 1 } else { 2 })]
    WrongVersion(Version),
    /// A line that is longer than any of version 1 may be.
    #[error("no end of line within {V1_MAX} bytes")]
    EndlessLine,
    /// A line that is not as §2.1 says.
    #[error("the line is not PROXY TCP4|TCP6 SOURCE DESTINATION PORT PORT, or PROXY UNKNOWN")]
    BadLine,
    /// Not 2.
    #[error("the version is not 2")]
    BadVersion,
    /// Neither `LOCAL` nor `PROXY`.
    #[error("the command is neither LOCAL nor PROXY")]
    BadCommand,
    /// A family or transport that the protocol does not have.
    #[error("there is no such family or transport")]
    BadFamily,
    /// Longer than [`V2_PAYLOAD_MAX`].
    #[error("the header says it is longer than {V2_PAYLOAD_MAX} bytes")]
    TooLong,
    /// Shorter than its family's addresses.
    #[error("the header is shorter than its addresses")]
    ShortAddresses,
    /// A TLV reaches beyond the header, or the header has bytes after its last TLV.
    #[error("the TLVs do not fill the header")]
    BadTlvs,
    /// The checksum is wrong, or there are two.
    #[error("the CRC32C is wrong")]
    BadChecksum,
    /// A datagram ends within its header.
    #[error("the datagram ends within its PROXY header")]
    Truncated,
    /// A unique id of more bytes than the protocol allows.
    #[error("the unique id is longer than {UNIQUE_ID_MAX} bytes")]
    BadUniqueId,
}

/// Reads a header from the first bytes of a connection, or from a datagram.
///
/// # Errors
/// What is wrong with it, as soon as it can be told.
pub fn read(bytes: &[u8], accepts: Accepts) -> Result<Progress<Header<'_>>, ProxyError> {
    let version = match bytes.first() {
        None => return Ok(Progress::More(1)),
        Some(b'P') => Version::V1,
        Some(b'\r') => Version::V2,
        Some(_) => return Err(ProxyError::Missing),
    };
    let signature = if version == Version::V1 { V1_SIGNATURE } else { &V2_SIGNATURE };
    let seen = bytes.len().min(signature.len());
    if bytes[..seen] != signature[..seen] {
        return Err(ProxyError::Missing);
    }
    if !accepts.takes(version) {
        // Said only of a whole signature: an HTTP client that posts is not a proxy.
        let whole = seen == signature.len();
        return if whole {
            Err(ProxyError::WrongVersion(version))
        } else {
            Ok(Progress::More(signature.len()))
        };
    }
    match version {
        Version::V1 => read_v1(bytes),
        Version::V2 => read_v2(bytes),
    }
}

/// Reads the header that a datagram begins with; `None`: it begins with none. Only version 2 has datagrams (§2.1). Whether the
/// header says that the client came over a stream is no matter: a proxy may have asked by datagram for a client of its TCP.
///
/// # Errors
/// What is wrong with the header.
pub fn read_datagram(datagram: &[u8]) -> Result<Option<Header<'_>>, ProxyError> {
    if !datagram.starts_with(&V2_SIGNATURE) {
        return Ok(None);
    }
    match read_v2(datagram)? {
        Progress::Done(header) => Ok(Some(header)),
        // The rest of a datagram does not come later.
        Progress::More(_) => Err(ProxyError::Truncated),
    }
}

fn read_v1(bytes: &[u8]) -> Result<Progress<Header<'_>>, ProxyError> {
    let window = &bytes[..bytes.len().min(V1_MAX)];
    let Some(end) = window.windows(2).position(|pair| pair == b"\r\n") else {
        let whole = window.len() == V1_MAX;
        return if whole { Err(ProxyError::EndlessLine) } else { Ok(Progress::More(bytes.len() + 1)) };
    };
    let addresses = read_line(&window[V1_SIGNATURE.len()..end.max(V1_SIGNATURE.len())])?;
    Ok(Progress::Done(Header {
        version: Version::V1,
        local: false,
        transport: if addresses == Addresses::Own { Transport::Unspecified } else { Transport::Stream },
        addresses,
        length: end + 2,
        tlvs: &[],
    }))
}

/// What follows `PROXY `, without its CRLF.
fn read_line(line: &[u8]) -> Result<Addresses, ProxyError> {
    let line = str::from_utf8(line).map_err(|_| {
        // §2.1: whatever follows UNKNOWN is to be ignored.
        if line.starts_with(b"UNKNOWN ") { None } else { Some(ProxyError::BadLine) }
    });
    let line = match line {
        Ok(line) => line,
        Err(None) => return Ok(Addresses::Own),
        Err(Some(error)) => return Err(error),
    };
    if line == "UNKNOWN" || line.starts_with("UNKNOWN ") {
        return Ok(Addresses::Own);
    }
    let mut words = line.split(' ');
    let mut word = || words.next().ok_or(ProxyError::BadLine);
    let family = word()?;
    let (source, destination) = (word()?, word()?);
    let (source_port, destination_port) = (port(word()?)?, port(word()?)?);
    if words.next().is_some() {
        return Err(ProxyError::BadLine);
    }
    let address = |text: &str| -> Result<IpAddr, ProxyError> {
        match family {
            "TCP4" => text.parse::<Ipv4Addr>().map(IpAddr::from).map_err(|_| ProxyError::BadLine),
            "TCP6" => text.parse::<Ipv6Addr>().map(IpAddr::from).map_err(|_| ProxyError::BadLine),
            _ => Err(ProxyError::BadLine),
        }
    };
    Ok(Addresses::Inet {
        source: SocketAddr::new(address(source)?, source_port),
        destination: SocketAddr::new(address(destination)?, destination_port),
    })
}

/// Digits alone, no leading zero, in 16 bits.
fn port(text: &str) -> Result<u16, ProxyError> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| plain).ok_or(ProxyError::BadLine)
}

fn read_v2(bytes: &[u8]) -> Result<Progress<Header<'_>>, ProxyError> {
    let Some(&[command, family, high, low]) = bytes.get(V2_SIGNATURE.len()..V2_FIXED) else {
        return match bytes.get(V2_SIGNATURE.len()) {
            Some(byte) if byte >> 4 != 2 => Err(ProxyError::BadVersion),
            _ => Ok(Progress::More(V2_FIXED)),
        };
    };
    if command >> 4 != 2 {
        return Err(ProxyError::BadVersion);
    }
    let local = match command & 0x0F {
        0 => true,
        1 => false,
        _ => return Err(ProxyError::BadCommand),
    };
    let payload = usize::from(u16::from_be_bytes([high, low]));
    if payload > V2_PAYLOAD_MAX {
        return Err(ProxyError::TooLong);
    }
    let length = V2_FIXED + payload;
    // §2.2: of LOCAL, everything is ignored, the family too.
    let (address_bytes, transport) =
        if local { (0, Transport::Unspecified) } else { (family_bytes(family)?, transport(family)?) };
    if address_bytes > payload {
        return Err(ProxyError::ShortAddresses);
    }
    let Some(header) = bytes.get(..length) else { return Ok(Progress::More(length)) };
    let (addresses, tlvs) = header[V2_FIXED..].split_at(address_bytes);
    let tlvs = if local { &[] } else { tlvs };
    check_tlvs(header, tlvs)?;
    let addresses = match address_bytes {
        _ if transport == Transport::Unspecified => Addresses::Own,
        12 => inet4(addresses),
        36 => inet6(addresses),
        216 => addresses.try_into().map_or(Addresses::Own, |both| Addresses::Unix(Box::new(both))),
        _ => Addresses::Own,
    };
    Ok(Progress::Done(Header { version: Version::V2, local, transport, addresses, length, tlvs }))
}

fn family_bytes(family: u8) -> Result<usize, ProxyError> {
    match family >> 4 {
        0 => Ok(0),
        1 => Ok(2 * 4 + 2 * 2),
        2 => Ok(2 * 16 + 2 * 2),
        3 => Ok(2 * UNIX_BYTES),
        _ => Err(ProxyError::BadFamily),
    }
}

fn transport(family: u8) -> Result<Transport, ProxyError> {
    match family & 0x0F {
        0 => Ok(Transport::Unspecified),
        1 => Ok(Transport::Stream),
        2 => Ok(Transport::Datagram),
        _ => Err(ProxyError::BadFamily),
    }
}

fn inet4(bytes: &[u8]) -> Addresses {
    let ip = |at: usize| {
        let octets: [u8; 4] = std::array::from_fn(|n| bytes[at + n]);
        IpAddr::from(octets)
    };
    inet(bytes, ip(0), ip(4), 8)
}

fn inet6(bytes: &[u8]) -> Addresses {
    let ip = |at: usize| {
        let octets: [u8; 16] = std::array::from_fn(|n| bytes[at + n]);
        IpAddr::from(octets)
    };
    inet(bytes, ip(0), ip(16), 32)
}

fn inet(bytes: &[u8], source: IpAddr, destination: IpAddr, ports_at: usize) -> Addresses {
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    Addresses::Inet {
        source: SocketAddr::new(source, port(ports_at)),
        destination: SocketAddr::new(destination, port(ports_at + 2)),
    }
}

/// Every TLV ends within the header, the last at its end; the checksum, if there is one, is right.
fn check_tlvs(header: &[u8], tlvs: &[u8]) -> Result<(), ProxyError> {
    let mut all = Tlvs::of(tlvs);
    let mut checksum = None;
    while let Some((kind, value)) = all.next() {
        match kind {
            tlv::CRC32C => {
                let value: [u8; 4] = value.try_into().map_err(|_| ProxyError::BadChecksum)?;
                // The offset from the header's start: all of them end where it does.
                let at = header.len() - all.rest.len() - value.len();
                if checksum.replace((at, u32::from_be_bytes(value))).is_some() {
                    return Err(ProxyError::BadChecksum);
                }
            }
            tlv::UNIQUE_ID if value.len() > UNIQUE_ID_MAX => return Err(ProxyError::BadUniqueId),
            _ => {}
        }
    }
    if !all.rest.is_empty() {
        return Err(ProxyError::BadTlvs);
    }
    match checksum {
        Some((at, said)) if checksum_of(header, at) != said => Err(ProxyError::BadChecksum),
        _ => Ok(()),
    }
}

/// Of the header with the checksum's own four bytes zero (§2.2.4).
fn checksum_of(header: &[u8], at: usize) -> u32 {
    Crc32c::new().add(&header[..at]).add(&[0; 4]).add(&header[at + 4..]).finish()
}

/// What is written in front of a connection or datagram.
#[derive(Debug, Clone)]
pub struct Outgoing<'a> {
    /// Between whom; of [`Addresses::Own`] the receiver takes the connection's.
    pub addresses: &'a Addresses,
    /// How the client reached us.
    pub transport: Transport,
    /// TLVs of the header that came in: all are passed on but padding and the checksum, which is made anew.
    pub passed_on: &'a [u8],
    /// The host name that the client asked for, unless one is passed on.
    pub authority: Option<&'a [u8]>,
    /// The connection's id, unless one is passed on; 128 bytes at most.
    pub unique_id: Option<&'a [u8]>,
}

/// Appends a version 1 header. What it has no words for is `UNKNOWN`.
pub fn write_v1(addresses: &Addresses, out: &mut Vec<u8>) {
    let written = match addresses {
        Addresses::Inet { source, destination } if source.is_ipv4() == destination.is_ipv4() => {
            let family = if source.is_ipv4() { 4 } else { 6 };
            write!(
                out,
                "PROXY TCP{family} {} {} {} {}\r\n",
                source.ip(),
                destination.ip(),
                source.port(),
                destination.port()
            )
        }
        _ => write!(out, "PROXY UNKNOWN\r\n"),
    };
    debug_assert!(written.is_ok(), "writing to a Vec cannot fail");
}

/// Appends a version 2 header with a checksum. [`HEADER_MAX`] and some 500 bytes at most, if what is passed on was read here.
pub fn write_v2(header: &Outgoing<'_>, out: &mut Vec<u8>) {
    let start = out.len();
    let transport = match header.transport {
        Transport::Unspecified => 0,
        Transport::Stream => 1,
        Transport::Datagram => 2,
    };
    let family = match header.addresses {
        Addresses::Own => 0,
        Addresses::Inet { source, .. } if source.is_ipv4() => 0x10 | transport,
        Addresses::Inet { .. } => 0x20 | transport,
        Addresses::Unix(_) => 0x30 | transport,
    };
    let command = if matches!(header.addresses, Addresses::Own) { 0x20 } else { 0x21 };
    out.extend_from_slice(&V2_SIGNATURE);
    out.extend_from_slice(&[command, family, 0, 0]);
    match header.addresses {
        Addresses::Own => {}
        Addresses::Inet { source, destination } => {
            for ip in [source.ip(), destination.ip()] {
                match ip {
                    IpAddr::V4(v4) => out.extend_from_slice(&v4.octets()),
                    IpAddr::V6(v6) => out.extend_from_slice(&v6.octets()),
                }
            }
            out.extend_from_slice(&source.port().to_be_bytes());
            out.extend_from_slice(&destination.port().to_be_bytes());
        }
        Addresses::Unix(both) => out.extend_from_slice(&both[..]),
    }
    let mut passed = [false; 2];
    for (kind, value) in Tlvs::of(header.passed_on) {
        passed[0] |= kind == tlv::AUTHORITY;
        passed[1] |= kind == tlv::UNIQUE_ID;
        if kind != tlv::CRC32C && kind != tlv::NOOP {
            push_tlv(kind, value, out);
        }
    }
    let ours = [(tlv::AUTHORITY, header.authority), (tlv::UNIQUE_ID, header.unique_id)];
    for ((kind, value), passed) in ours.into_iter().zip(passed) {
        if let Some(value) = value.filter(|_| !passed) {
            push_tlv(kind, value, out);
        }
    }
    push_tlv(tlv::CRC32C, &[0; 4], out);
    let length = out.len() - start - V2_FIXED;
    out[start + 14..start + V2_FIXED]
        .copy_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    let at = out.len() - start - 4;
    let checksum = checksum_of(&out[start..], at);
    out[start + at..].copy_from_slice(&checksum.to_be_bytes());
}

fn push_tlv(kind: u8, value: &[u8], out: &mut Vec<u8>) {
    // Values come from headers that were read, or are names and ids of ours: all below 64 KiB.
    let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
    out.push(kind);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&value[..usize::from(length)]);
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}
