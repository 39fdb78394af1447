//! PROXY headers and TLS hellos: vectors typed from the specifications, every split of them, and other people's readers.

use std::net::{IpAddr, SocketAddr};

use flow::preface::hello::{self, Hello, HelloError};
use flow::preface::proxy::{
    self, Accepts, Addresses, Header, Outgoing, ProxyError, Transport, V1_MAX, V2_PAYLOAD_MAX, V2_SIGNATURE,
    Version, tlv,
};
use flow::preface::{Facts, NameError, Progress, Route, Routed, Routes, ServerName};
use proptest::prelude::*;

// --- PROXY protocol ---------------------------------------------------------------------------------------------------

fn done(bytes: &[u8]) -> Header<'_> {
    match proxy::read(bytes, Accepts::Any) {
        Ok(Progress::Done(header)) => header,
        other => panic!("{other:?} of {bytes:?}"),
    }
}

fn refused(bytes: &[u8]) -> ProxyError {
    proxy::read(bytes, Accepts::Any).expect_err("it is to be refused")
}

fn inet(source: &str, destination: &str) -> Addresses {
    Addresses::Inet { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
}

/// A version 2 header as §2.2 lays it out.
fn v2(command: u8, family: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = V2_SIGNATURE.to_vec();
    bytes.extend([0x20 | command, family]);
    bytes.extend((payload.len() as u16).to_be_bytes());
    bytes.extend(payload);
    bytes
}

const INET4: [u8; 12] = [192, 0, 2, 1, 198, 51, 100, 2, 0xDC, 0x04, 0x01, 0xBB];

fn with_tlvs(tlvs: &[u8]) -> Vec<u8> {
    v2(1, 0x11, &[&INET4[..], tlvs].concat())
}

#[test]
fn the_lines_of_section_2_1() {
    for (line, want) in [
        // The two examples and the three worst cases of the text.
        ("PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", inet("192.168.0.1:56324", "192.168.0.11:443")),
        (
            "PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
            inet("255.255.255.255:65535", "255.255.255.255:65535"),
        ),
        (
            "PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n",
            inet(
                "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
                "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
            ),
        ),
        ("PROXY UNKNOWN\r\n", Addresses::Own),
        (
            "PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n",
            Addresses::Own,
        ),
        ("PROXY TCP6 ::1 2001:db8::2 0 1\r\n", inet("[::1]:0", "[2001:db8::2]:1")),
        ("PROXY UNKNOWN \u{e9} whatever\r\n", Addresses::Own),
    ] {
        let whole = [line.as_bytes(), b"GET / HTTP/1.0\r\n"].concat();
        let header = done(&whole);
        assert_eq!((header.addresses.clone(), header.length), (want, line.len()), "{line:?}");
        assert_eq!((header.version, header.local), (Version::V1, false));
        assert!(line.len() <= V1_MAX);
    }
    let bytes = b"PROXY UNKNOWN \xFF\xFE\r\n";
    assert_eq!(done(bytes).addresses, Addresses::Own, "ignored, whatever it is");
}

#[test]
fn lines_that_are_not_those_of_section_2_1() {
    for line in [
        "PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n",
        "PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n",
        "PROXY TCP4 ::1 ::1 1 2\r\n",
        "PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n",
        "PROXY TCP5 192.0.2.1 192.0.2.2 1 2\r\n",
        "PROXY tcp4 192.0.2.1 192.0.2.2 1 2\r\n",
        "PROXY UNKNOWNS\r\n",
        "PROXY \r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n\r\n",
    ] {
        assert_eq!(refused(line.as_bytes()), ProxyError::BadLine, "{line:?}");
    }
    assert_eq!(refused(b"PROXY\r\n"), ProxyError::Missing);
    assert_eq!(refused(b"GET / HTTP/1.0\r\n"), ProxyError::Missing);
    let endless = ["PROXY UNKNOWN ", &"x".repeat(200)].concat();
    assert_eq!(refused(endless.as_bytes()), ProxyError::EndlessLine);
    let longest = format!("PROXY UNKNOWN {}\r\n", "x".repeat(V1_MAX - 16));
    assert_eq!(done(longest.as_bytes()).length, V1_MAX);
    let longer = format!("PROXY UNKNOWN {}\r\n", "x".repeat(V1_MAX - 15));
    assert_eq!(refused(longer.as_bytes()), ProxyError::EndlessLine);
}

#[test]
fn the_families_of_section_2_2() {
    let header = v2(1, 0x11, &INET4);
    assert_eq!(done(&header).addresses, inet("192.0.2.1:56324", "198.51.100.2:443"));
    assert_eq!(done(&header).transport, Transport::Stream);
    assert_eq!(done(&v2(1, 0x12, &INET4)).transport, Transport::Datagram);
    let mut six = [0; 36];
    (six[0], six[1], six[15]) = (0x20, 0x01, 1);
    (six[31], six[33], six[35]) = (2, 80, 81);
    assert_eq!(done(&v2(1, 0x21, &six)).addresses, inet("[2001::1]:80", "[::2]:81"));
    let mut paths = [0; 216];
    paths[..9].copy_from_slice(b"/run/sock");
    let unix = v2(1, 0x31, &paths);
    assert_eq!(done(&unix).addresses, Addresses::Unix(Box::new(paths)));
    assert_eq!(done(&unix).addresses.source(), None);
    // LOCAL: everything is ignored, whatever family it claims.
    for family in [0, 0x11, 0xFF] {
        let local = v2(0, family, b"any bytes at all");
        let header = done(&local);
        assert_eq!((header.local, &header.addresses, header.length), (true, &Addresses::Own, 32));
        assert_eq!(header.tlvs().count(), 0);
    }
    // Without a family, or with a transport that nobody knows: the connection's own addresses.
    assert_eq!(done(&v2(1, 0, &[])).addresses, Addresses::Own);
    assert_eq!(done(&v2(1, 0x10, &INET4)).addresses, Addresses::Own);
}

#[test]
fn what_section_2_2_wants_refused() {
    let mut header = v2(1, 0x11, &INET4);
    header[12] = 0x11;
    assert_eq!(refused(&header), ProxyError::BadVersion);
    assert_eq!(refused(&header[..13]), ProxyError::BadVersion, "as soon as it is seen");
    assert_eq!(refused(&v2(2, 0x11, &INET4)), ProxyError::BadCommand);
    assert_eq!(refused(&v2(1, 0x41, &INET4)), ProxyError::BadFamily);
    assert_eq!(refused(&v2(1, 0x13, &INET4)), ProxyError::BadFamily);
    assert_eq!(refused(&v2(1, 0x11, &INET4[..11])), ProxyError::ShortAddresses);
    assert_eq!(refused(&v2(1, 0x21, &INET4)), ProxyError::ShortAddresses);
    assert_eq!(refused(&v2(1, 0x00, &vec![0; V2_PAYLOAD_MAX + 1])), ProxyError::TooLong);
    assert_eq!(refused(b"\r\n\r\n\0\r\nQUIT\r"), ProxyError::Missing);
    let line = b"PROXY UNKNOWN\r\n";
    assert_eq!(proxy::read(line, Accepts::V2), Err(ProxyError::WrongVersion(Version::V1)));
    let header = v2(1, 0x11, &INET4);
    assert_eq!(proxy::read(&header, Accepts::V1), Err(ProxyError::WrongVersion(Version::V2)));
}

#[test]
fn tlvs_end_with_the_header() {
    // Four cases that HAProxy's regression tests have: a name; a TLV after the header's end, which is the client's; one
    // that is longer than the header; and bytes after the last one.
    let name = [&[tlv::AUTHORITY, 0, 11][..], b"example.com"].concat();
    let valid = with_tlvs(&name);
    assert_eq!(done(&valid).tlv(tlv::AUTHORITY), Some(&b"example.com"[..]));
    let after = [with_tlvs(&[]), name.clone()].concat();
    assert_eq!((done(&after).tlv(tlv::AUTHORITY), done(&after).length), (None, after.len() - name.len()));
    assert_eq!(refused(&with_tlvs(&name[..10])), ProxyError::BadTlvs);
    let short = [&name[..], &[tlv::NOOP, 0]].concat();
    assert_eq!(refused(&with_tlvs(&short)), ProxyError::BadTlvs);
    // Padding of no length, then something of ours and of a vendor.
    let mixed = [&[tlv::NOOP, 0, 0][..], &[tlv::SSL, 0, 5, 1, 0, 0, 0, 0], &[0xEA, 0, 1, 7]].concat();
    let mixed = with_tlvs(&mixed);
    let kinds: Vec<u8> = done(&mixed).tlvs().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, [tlv::NOOP, tlv::SSL, 0xEA]);
    let long_id = [&[tlv::UNIQUE_ID, 0, 129][..], &[1; 129]].concat();
    assert_eq!(refused(&with_tlvs(&long_id)), ProxyError::BadUniqueId);
}

#[test]
fn a_checksum_is_verified() {
    let mut out = Vec::new();
    let addresses = inet("192.0.2.1:56324", "198.51.100.2:443");
    let outgoing = Outgoing {
        addresses: &addresses,
        transport: Transport::Stream,
        passed_on: &[],
        authority: None,
        unique_id: None,
    };
    proxy::write_v2(&outgoing, &mut out);
    // Computed bit by bit over the header with four zeros, apart from the table that wrote it.
    let mut zeroed = out.clone();
    let at = zeroed.len() - 4;
    zeroed[at..].fill(0);
    let mut crc = u32::MAX;
    for byte in &zeroed {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
        }
    }
    assert_eq!(out[at..], (!crc).to_be_bytes());
    assert_eq!(done(&out).addresses, addresses);
    // All but the type, without which it is no checksum any more.
    for place in (16..out.len()).filter(|place| *place != at - 3) {
        let mut torn = out.clone();
        torn[place] ^= 1;
        assert!(proxy::read(&torn, Accepts::Any).is_err(), "byte {place}");
    }
    assert_eq!(refused(&with_tlvs(&[tlv::CRC32C, 0, 3, 1, 2, 3])), ProxyError::BadChecksum);
}

#[test]
fn a_datagram_has_its_header_whole_or_none() {
    let datagram = [&with_tlvs(&[0xE0, 0, 1, 7])[..], b"payload"].concat();
    let header = proxy::read_datagram(&datagram).unwrap().expect("a header");
    assert_eq!((&datagram[header.length..], header.tlv(0xE0)), (&b"payload"[..], Some(&[7][..])));
    assert_eq!(header.addresses, inet("192.0.2.1:56324", "198.51.100.2:443"));
    for end in V2_SIGNATURE.len()..header.length {
        assert_eq!(proxy::read_datagram(&datagram[..end]), Err(ProxyError::Truncated), "{end} bytes");
    }
    for none in [&datagram[1..], &datagram[..11], b"", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"] {
        assert_eq!(proxy::read_datagram(none), Ok(None));
    }
    assert_eq!(proxy::read_datagram(&v2(2, 0x12, &INET4)), Err(ProxyError::BadCommand));
}

#[test]
fn what_came_is_passed_on_and_what_is_missing_added() {
    let came = [
        &[tlv::NOOP, 0, 2, 0, 0][..],
        &[tlv::UNIQUE_ID, 0, 2, b'i', b'd'],
        &[tlv::SSL, 0, 5, 1, 0, 0, 0, 0],
        &[0xE4, 0, 1, 9],
    ]
    .concat();
    let addresses = inet("[2001:db8::1]:1", "[2001:db8::2]:2");
    let mut out = b"before".to_vec();
    let outgoing = Outgoing {
        addresses: &addresses,
        transport: Transport::Datagram,
        passed_on: &came,
        authority: Some(b"db.example.com"),
        unique_id: Some(b"another"),
    };
    proxy::write_v2(&outgoing, &mut out);
    let header = done(&out[6..]);
    let kinds: Vec<u8> = header.tlvs().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, [tlv::UNIQUE_ID, tlv::SSL, 0xE4, tlv::AUTHORITY, tlv::CRC32C]);
    assert_eq!(header.tlv(tlv::UNIQUE_ID), Some(&b"id"[..]));
    assert_eq!((&header.addresses, header.transport), (&addresses, Transport::Datagram));
    let mut out = Vec::new();
    proxy::write_v2(&Outgoing { addresses: &Addresses::Own, ..outgoing }, &mut out);
    assert!(done(&out).local);
}

#[test]
fn addresses_of_two_families_become_one() {
    let line = |source: &str, destination: &str| {
        let mut out = Vec::new();
        let pair = Addresses::between(source.parse().unwrap(), destination.parse().unwrap());
        proxy::write_v1(&pair, &mut out);
        String::from_utf8(out).unwrap()
    };
    let both_mapped = line("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2");
    assert_eq!(both_mapped, "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n");
    assert_eq!(line("192.0.2.1:1", "[2001:db8::2]:2"), "PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 1 2\r\n");
    let mut unix = Vec::new();
    proxy::write_v1(&Addresses::Unix(Box::new([0; 216])), &mut unix);
    assert_eq!(unix, b"PROXY UNKNOWN\r\n");
}

/// Every prefix says that it needs more than it is, or what the whole says. An error may be told before that.
fn same_at_every_split<T: PartialEq + std::fmt::Debug, E: PartialEq + std::fmt::Debug>(
    bytes: &[u8],
    read: impl Fn(&[u8]) -> Result<Progress<T>, E>,
) {
    let whole = read(bytes);
    let mut needed = 0;
    let mut decided = false;
    for end in 0..=bytes.len() {
        match read(&bytes[..end]) {
            Ok(Progress::More(need)) => {
                assert!(!decided, "{end}: it was decided already");
                assert!(need > end, "{end}: needs {need}");
                assert!(need >= needed, "{end}: needed {needed}, now {need}");
                needed = need;
            }
            said => {
                let early = said.is_ok() && end < needed;
                assert!(!early, "{end} were enough, {needed} were asked for: {said:?}");
                assert_eq!(said, whole, "at {end}");
                decided = true;
            }
        }
    }
}

type Proxied = (Addresses, Transport, usize, Vec<u8>);

fn proxied(bytes: &[u8], accepts: Accepts) -> Result<Progress<Proxied>, ProxyError> {
    Ok(match proxy::read(bytes, accepts)? {
        Progress::More(bytes) => Progress::More(bytes),
        Progress::Done(Header { addresses, transport, length, .. }) => {
            Progress::Done((addresses, transport, length, bytes[..length].to_vec()))
        }
    })
}

fn addresses() -> impl Strategy<Value = Addresses> {
    let four =
        (any::<[u8; 4]>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(IpAddr::from(ip), port));
    let six =
        (any::<[u8; 16]>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(IpAddr::from(ip), port));
    let of = |(source, destination)| Addresses::Inet { source, destination };
    prop_oneof![(four.clone(), four).prop_map(of), (six.clone(), six).prop_map(of), Just(Addresses::Own)]
}

fn tlvs() -> impl Strategy<Value = Vec<u8>> {
    let one = (0x10_u8.., prop::collection::vec(any::<u8>(), 0..40))
        .prop_map(|(kind, value)| [&[kind][..], &(value.len() as u16).to_be_bytes(), &value].concat());
    prop::collection::vec(one, 0..6).prop_map(|all| all.concat())
}

proptest! {
    #[test]
    fn any_split_of_a_line_says_the_same(addresses in addresses(), rest in prop::collection::vec(any::<u8>(), 0..20)) {
        let mut bytes = Vec::new();
        proxy::write_v1(&addresses, &mut bytes);
        let length = bytes.len();
        bytes.extend(rest);
        let header = done(&bytes);
        prop_assert_eq!((&header.addresses, header.length), (&addresses, length));
        same_at_every_split(&bytes, |bytes| proxied(bytes, Accepts::Any));
        same_at_every_split(&bytes, |bytes| proxied(bytes, Accepts::V2));
    }

    #[test]
    fn any_split_of_a_binary_header_says_the_same(
        addresses in addresses(),
        passed_on in tlvs(),
        rest in prop::collection::vec(any::<u8>(), 0..20),
        torn in (any::<prop::sample::Index>(), 0_u8..4),
    ) {
        let mut bytes = Vec::new();
        let outgoing = Outgoing {
            addresses: &addresses,
            transport: Transport::Stream,
            passed_on: &passed_on,
            authority: Some(b"a.example"),
            unique_id: Some(&[7; 16]),
        };
        proxy::write_v2(&outgoing, &mut bytes);
        let length = bytes.len();
        bytes.extend(rest);
        let header = done(&bytes);
        prop_assert_eq!((&header.addresses, header.length), (&addresses, length));
        same_at_every_split(&bytes, |bytes| proxied(bytes, Accepts::Any));
        let place = torn.0.index(bytes.len());
        bytes[place] ^= torn.1;
        same_at_every_split(&bytes, |bytes| proxied(bytes, Accepts::Any));
        same_at_every_split(&bytes, |bytes| proxied(bytes, Accepts::V1));
    }

    #[test]
    fn others_read_the_same_addresses(addresses in addresses(), passed_on in tlvs(), v1 in any::<bool>()) {
        let mut bytes = Vec::new();
        if v1 {
            proxy::write_v1(&addresses, &mut bytes);
        } else {
            let outgoing = Outgoing {
                addresses: &addresses,
                transport: Transport::Stream,
                passed_on: &passed_on,
                authority: None,
                unique_id: Some(b"id"),
            };
            proxy::write_v2(&outgoing, &mut bytes);
        }
        let length = bytes.len();
        bytes.extend(b"rest");
        let (source, used) = read_by_proxy_header(&bytes).expect("proxy-header reads it");
        prop_assert_eq!((source, used), (addresses.source(), length));
        prop_assert_eq!(read_by_ppp(&bytes).expect("ppp reads it"), addresses.source());
    }

    #[test]
    fn what_others_refuse_is_refused(
        mut bytes in prop_oneof![Just(with_tlvs(&[tlv::AUTHORITY, 0, 1, b'x'])), Just(b"PROXY TCP4 192.0.2.1 192.0.2.2 10 20\r\n".to_vec())],
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..3),
    ) {
        for (place, with) in flips {
            let place = place.index(bytes.len());
            bytes[place] = with;
        }
        if let Ok(Progress::Done(header)) = proxy::read(&bytes, Accepts::Any) {
            // Where both understand it, they understand the same. (They are laxer here and stricter there: neither skips a
            // LOCAL header's family, one takes `+1` for a port.)
            if let (Some((source, _)), Some(mine)) = (read_by_proxy_header(&bytes), header.addresses.source()) {
                prop_assert_eq!(source, Some(mine));
            }
            if let (Some(source), Some(mine)) = (read_by_ppp(&bytes), header.addresses.source()) {
                prop_assert_eq!(source, Some(mine));
            }
        }
    }

    #[test]
    fn no_bytes_at_all_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        same_at_every_split(&bytes, |bytes| proxied(bytes, Accepts::Any));
        let v2 = [&V2_SIGNATURE[..], &bytes].concat();
        same_at_every_split(&v2, |bytes| proxied(bytes, Accepts::Any));
    }
}

/// The source, and the header's bytes.
fn read_by_proxy_header(bytes: &[u8]) -> Option<(Option<SocketAddr>, usize)> {
    let (header, used) =
        proxy_header::ProxyHeader::parse(bytes, proxy_header::ParseConfig::default()).ok()?;
    Some((header.proxied_address().map(|address| address.source), used))
}

fn read_by_ppp(bytes: &[u8]) -> Option<Option<SocketAddr>> {
    match ppp::HeaderResult::parse(bytes) {
        ppp::HeaderResult::V1(Ok(header)) => Some(match header.addresses {
            ppp::v1::Addresses::Unknown => None,
            ppp::v1::Addresses::Tcp4(four) => Some((four.source_address, four.source_port).into()),
            ppp::v1::Addresses::Tcp6(six) => Some((six.source_address, six.source_port).into()),
        }),
        ppp::HeaderResult::V2(Ok(header)) => Some(match header.addresses {
            ppp::v2::Addresses::IPv4(four) => Some((four.source_address, four.source_port).into()),
            ppp::v2::Addresses::IPv6(six) => Some((six.source_address, six.source_port).into()),
            _ => None,
        }),
        _ => None,
    }
}

// --- TLS --------------------------------------------------------------------------------------------------------------

fn vector<const N: usize>(bytes: &[u8]) -> Vec<u8> {
    [&bytes.len().to_be_bytes()[8 - N..], bytes].concat()
}

fn extension(kind: u16, value: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &vector::<2>(value)].concat()
}

/// RFC 6066 §3.
fn sni(name: &[u8]) -> Vec<u8> {
    extension(0, &vector::<2>(&[&[0][..], &vector::<2>(name)].concat()))
}

/// RFC 7301 §3.1.
fn alpn(protocols: &[&[u8]]) -> Vec<u8> {
    let list: Vec<u8> = protocols.iter().flat_map(|protocol| vector::<1>(protocol)).collect();
    extension(16, &vector::<2>(&list))
}

/// RFC 8446 §4.1.2 with these extensions; `None`: none at all, as before TLS 1.2.
fn message(extensions: Option<&[Vec<u8>]>) -> Vec<u8> {
    let mut body = [&[3, 3][..], &[9; 32], &vector::<1>(&[7; 32])].concat();
    // The first cipher suite is a reserved one (RFC 8701).
    body.extend(vector::<2>(&[0x0A, 0x0A, 0x13, 0x01, 0x13, 0x02]));
    body.extend(vector::<1>(&[0]));
    if let Some(extensions) = extensions {
        body.extend(vector::<2>(&extensions.concat()));
    }
    [&[1][..], &vector::<3>(&body)].concat()
}

fn records(message: &[u8], fragments: &[usize]) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut rest = message;
    for length in fragments.iter().copied().chain(std::iter::repeat(16_384)) {
        if rest.is_empty() {
            return wire;
        }
        let (fragment, after) = rest.split_at(length.min(rest.len()));
        wire.extend([22, 3, 1]);
        wire.extend(vector::<2>(fragment));
        rest = after;
    }
    wire
}

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Other,
    Tls { name: Option<String>, protocols: Vec<Vec<u8>> },
}

fn seen(wire: &[u8]) -> Result<Progress<Seen>, HelloError> {
    let mut scratch = Vec::new();
    Ok(match hello::read(wire, &mut scratch)? {
        Progress::More(bytes) => Progress::More(bytes),
        Progress::Done(Hello::Other) => Progress::Done(Seen::Other),
        Progress::Done(Hello::Tls(hello)) => Progress::Done(Seen::Tls {
            name: hello.server_name.map(str::to_owned),
            protocols: hello.protocols().map(<[u8]>::to_vec).collect(),
        }),
    })
}

fn tls(name: Option<&str>, protocols: &[&[u8]]) -> Result<Progress<Seen>, HelloError> {
    Ok(Progress::Done(Seen::Tls {
        name: name.map(str::to_owned),
        protocols: protocols.iter().map(|protocol| protocol.to_vec()).collect(),
    }))
}

/// A reserved extension (RFC 8701), an encrypted inner hello (RFC 9849), and versions.
fn usual() -> Vec<Vec<u8>> {
    vec![extension(0x1A1A, &[]), extension(0xFE0D, &[0, 0, 1, 0, 3, 9]), extension(43, &[4, 3, 4, 3, 3])]
}

#[test]
fn a_hello_says_its_name_and_protocols() {
    let extensions = [usual(), vec![sni(b"Outer.Example.com"), alpn(&[b"h2", b"http/1.1"])]].concat();
    let hello = message(Some(&extensions));
    let wire = records(&hello, &[]);
    let want = tls(Some("Outer.Example.com"), &[b"h2", b"http/1.1"]);
    assert_eq!(seen(&wire), want);
    // Bytes behind it are none of ours.
    assert_eq!(seen(&[&wire[..], b"\x14\x03\x03\0\x01\x01"].concat()), want);
    same_at_every_split(&wire, seen);
    for fragments in [&[1][..], &[3, 1, 70, 2], &[1, 1, 1, 1, 1], &[hello.len() - 1]] {
        let wire = records(&hello, fragments);
        assert_eq!(seen(&wire), want, "{fragments:?}");
        same_at_every_split(&wire, seen);
    }
    let bytewise = records(&hello, &vec![1; hello.len()]);
    assert_eq!(seen(&bytewise), want);
    same_at_every_split(&bytewise, seen);
}

#[test]
fn a_hello_may_say_neither() {
    assert_eq!(seen(&records(&message(None), &[])), tls(None, &[]));
    assert_eq!(seen(&records(&message(Some(&[])), &[])), tls(None, &[]));
    assert_eq!(seen(&records(&message(Some(&usual())), &[])), tls(None, &[]));
    let dotted = message(Some(&[sni(b"example.com.")]));
    assert_eq!(seen(&records(&dotted, &[])), tls(Some("example.com"), &[]));
}

#[test]
fn what_is_no_tls_is_said_at_once() {
    for bytes in [&b"G"[..], b"\x00\x00\x00\x08", b"\x16\x02", b"\x80\x2e\x01\x03\x01"] {
        assert_eq!(seen(bytes), Ok(Progress::Done(Seen::Other)), "{bytes:?}");
    }
}

#[test]
fn hellos_that_lie_are_refused() {
    let of = |extensions: &[Vec<u8>]| seen(&records(&message(Some(extensions)), &[]));
    assert_eq!(of(&[sni(b"")]), Err(HelloError::BadServerName));
    assert_eq!(of(&[sni(b".")]), Err(HelloError::BadServerName));
    assert_eq!(of(&[sni(b"a\0b")]), Err(HelloError::BadServerName));
    assert_eq!(of(&[sni(&[0xC3, 0xA9])]), Err(HelloError::BadServerName));
    assert_eq!(of(&[sni(&[b'a'; 300])]), Err(HelloError::BadServerName));
    assert_eq!(
        of(&[sni(b"a"), sni(b"b")]),
        Err(HelloError::BadServerName),
        "the server could take the other"
    );
    assert_eq!(of(&[alpn(&[])]), Err(HelloError::BadAlpn));
    assert_eq!(of(&[alpn(&[b""])]), Err(HelloError::BadAlpn));
    assert_eq!(of(&[alpn(&[b"h2"]), alpn(&[b"h3"])]), Err(HelloError::BadAlpn));
    assert_eq!(of(&[vec![0, 0, 0, 9, 1]]), Err(HelloError::BadLength));
    let mut longer = message(Some(&usual()));
    longer[3] += 1;
    longer.push(0);
    assert_eq!(seen(&records(&longer, &[])), Err(HelloError::BadLength));
    assert_eq!(seen(b"\x16\x03\x01\0\0"), Err(HelloError::BadRecord), "RFC 8446 §5.1: no empty fragments");
    assert_eq!(seen(b"\x16\x03\x01\x40\x01"), Err(HelloError::BadRecord));
    assert_eq!(seen(b"\x16\x03\x01\0\x01\x02"), Err(HelloError::NotHello));
    assert_eq!(seen(b"\x16\x03\x01\0\x02\x01\0\x15"), Err(HelloError::BadRecord), "an alert in between");
}

#[test]
fn a_hello_is_bounded() {
    let of = |bytes: usize| {
        let rest = message(Some(&[extension(21, &[])])).len();
        message(Some(&[extension(21, &vec![0; bytes - rest])]))
    };
    assert_eq!(seen(&records(&of(hello::MESSAGE_MAX), &[])), tls(None, &[]));
    let larger = records(&of(hello::MESSAGE_MAX + 1), &[]);
    assert_eq!(seen(&larger), Err(HelloError::TooLong));
    assert_eq!(seen(&larger[..9]), Err(HelloError::TooLong), "as soon as it is said");
    // In records of a byte each its headers alone are five times as much.
    let crumbs = records(&of(hello::MESSAGE_MAX), &vec![1; hello::MESSAGE_MAX]);
    assert_eq!(seen(&crumbs), Err(HelloError::TooLong));
    for end in [100, 10_000, 19_660, 19_670, 40_000] {
        let early = seen(&crumbs[..end]);
        assert!(matches!(early, Ok(Progress::More(need)) if need > end) || early == Err(HelloError::TooLong));
    }
}

proptest! {
    #[test]
    fn any_records_and_any_split_say_the_same(
        name in prop::option::of("[a-zA-Z0-9.-]{1,40}[a-z]"),
        protocols in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..10), 0..4),
        padding in 0_usize..400,
        fragments in prop::collection::vec(1_usize..200, 0..8),
        torn in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
    ) {
        let mut extensions = usual();
        extensions.extend(name.as_ref().map(|name| sni(name.as_bytes())));
        extensions.push(extension(21, &vec![0; padding]));
        let borrowed: Vec<&[u8]> = protocols.iter().map(Vec::as_slice).collect();
        extensions.extend((!protocols.is_empty()).then(|| alpn(&borrowed)));
        let mut wire = records(&message(Some(&extensions)), &fragments);
        prop_assert_eq!(seen(&wire), tls(name.as_deref(), &borrowed));
        same_at_every_split(&wire, seen);
        if let Some((place, with)) = torn {
            let place = place.index(wire.len());
            wire[place] = with;
            same_at_every_split(&wire, seen);
        }
    }

    #[test]
    fn no_bytes_at_all_panic_as_tls(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        same_at_every_split(&bytes, seen);
        let wire = records(&[&[1][..], &vector::<3>(&bytes)].concat(), &[]);
        same_at_every_split(&wire, seen);
    }
}

// --- Routes -----------------------------------------------------------------------------------------------------------

fn route(
    target: u16,
    names: &[&str],
    protocols: &[&str],
    networks: &[&str],
    ports: Option<(u16, u16)>,
) -> Route {
    Route {
        names: names.iter().map(|name| name.parse().unwrap()).collect(),
        protocols: protocols.iter().map(|protocol| protocol.as_bytes().into()).collect(),
        networks: networks.iter().map(|network| network.parse().unwrap()).collect(),
        ports: ports.map(|(first, last)| first..=last),
        target,
    }
}

fn target(routes: &Routes, name: Option<&str>, protocols: &[&[u8]], client: &str, port: u16) -> u16 {
    let mut extensions: Vec<Vec<u8>> = name.iter().map(|name| sni(name.as_bytes())).collect();
    extensions.extend((!protocols.is_empty()).then(|| alpn(protocols)));
    let wire = records(&message(Some(&extensions)), &[]);
    let mut scratch = Vec::new();
    let Ok(Progress::Done(Hello::Tls(hello))) = hello::read(&wire, &mut scratch) else { panic!("a hello") };
    routes.select(&Facts { client: Some(client.parse().unwrap()), port, hello: Some(&hello) }).target
}

#[test]
fn the_first_route_whose_every_condition_is_met_is_taken() {
    let routes = Routes::new(vec![
        route(1, &["db.example.com"], &[], &["10.0.0.0/8"], None),
        route(2, &["*.example.com", "other.test"], &[], &[], None),
        route(3, &[], &["h2"], &[], None),
        route(4, &[], &[], &["10.0.0.0/8", "2001:db8::/32"], None),
        route(5, &["db.example.com"], &[], &[], None),
        route(6, &[], &[], &[], Some((5_000, 5_004))),
    ]);
    assert!(routes.want_hello() && routes.want_client());
    let to = |name, protocols: &[&[u8]], client, port| target(&routes, name, protocols, client, port);
    assert_eq!(to(Some("DB.example.COM"), &[], "10.1.2.3", 1), 1);
    assert_eq!(to(Some("DB.example.COM"), &[], "192.0.2.1", 1), 2, "the wildcard comes before the name");
    assert_eq!(to(Some("other.test"), &[], "10.1.2.3", 1), 2);
    assert_eq!(to(Some("a.b.example.com"), &[], "192.0.2.1", 1), 0, "one label alone");
    assert_eq!(to(Some("example.com"), &[], "192.0.2.1", 1), 0);
    assert_eq!(to(Some("example.com"), &[b"http/1.1", b"h2"], "192.0.2.1", 1), 3);
    assert_eq!(to(None, &[], "::ffff:10.0.0.1", 1), 4, "a mapped address is the address");
    assert_eq!(to(None, &[b"h3"], "2001:db8::5", 5_000), 4);
    assert_eq!(to(None, &[], "192.0.2.1", 5_004), 6);
    assert_eq!(to(None, &[], "192.0.2.1", 5_005), 0);
    // Without a hello there is no name to look for.
    let nameless = routes.select(&Facts { client: None, port: 5_001, hello: None });
    assert_eq!(nameless, Routed { route: 6, target: 6 });
    assert_eq!(Routes::default().select(&Facts::default()), Routed::DEFAULT);
}

#[test]
fn names_are_checked() {
    let parse = |text: &str| text.parse::<ServerName>();
    assert_eq!(parse("Example.COM."), parse("example.com"));
    assert_ne!(parse("*.example.com"), parse("example.com"));
    assert_eq!(parse(""), Err(NameError::Length));
    assert_eq!(parse("*."), Err(NameError::Wildcard));
    assert_eq!(parse("*"), Err(NameError::Wildcard));
    assert_eq!(parse("a.*.com"), Err(NameError::Wildcard));
    assert_eq!(parse("*a.com"), Err(NameError::Wildcard));
    assert_eq!(parse("a..com"), Err(NameError::Label));
    assert_eq!(parse("a b"), Err(NameError::Label));
    assert_eq!(parse("192.0.2.1"), Err(NameError::Address));
    assert!(parse(&"a.".repeat(127)).is_ok());
    assert_eq!(parse(&"a.".repeat(128)), Err(NameError::Length));
}
