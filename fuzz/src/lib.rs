//! Targets: each takes any bytes, and panics where a promise is broken.
//!
//! `cargo xtask fuzz [TARGET] [--seconds N]` builds and runs them. What a run finds interesting and small is kept in
//! `corpus/TARGET`; what breaks something goes to `artifacts/TARGET`, and becomes a test of the crate at fault.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use allocation::Timestamp;
use flow::preface::hello::{self, Hello};
use flow::preface::proxy::{self, Accepts, Outgoing, Transport};
use flow::preface::{Facts, GRANTED, Look, PREFACE_MAX, Preface, Progress, Route, Routes, Wants};
use flow::udp::{
    Announced, CID_MAX, Cid, Cids, Cipher, Expiry, Flows, Header, NONCE_MIN, Refusal, ServerIdForm,
    ServerIdKeys, ServerIds, Tuning, Tuple, source_cid,
};

#[path = "../../crates/flow/tests/world/mod.rs"]
mod world;

/// The order in which everything around a TCP flow happens: the simulation's promises hold for any.
pub fn flow(bytes: &[u8]) {
    world::World::new(0, world::Entropy::of_bytes(bytes), false).run();
}

/// What is said of some bytes is said of any more; nothing is said before as many came as were asked for.
fn is_steady<T: PartialEq + std::fmt::Debug, E: PartialEq + std::fmt::Debug>(
    bytes: &[u8],
    read: impl Fn(&[u8]) -> Result<Progress<T>, E>,
) {
    let whole = read(bytes);
    // Every prefix of a short input; of a long one those around its powers of two.
    let ends = (0..bytes.len())
        .filter(|end| bytes.len() < 64 || (end + 1).is_power_of_two() || end.is_power_of_two());
    let mut needed = 0;
    for end in ends {
        match read(&bytes[..end]) {
            Ok(Progress::More(need)) => {
                assert!(need > end && need >= needed, "{need} bytes are needed, of {end}, after {needed}");
                needed = need;
            }
            said => {
                assert!(said.is_err() || end >= needed, "{needed} were needed, {end} were enough");
                assert_eq!(said, whole, "of {end} bytes");
                return;
            }
        }
    }
    if let Ok(Progress::More(need)) = whole {
        assert!(need > bytes.len() && need >= needed);
    }
}

/// PROXY headers, both versions; what is read is written and read again.
pub fn proxy(bytes: &[u8]) {
    let Some((&first, bytes)) = bytes.split_first() else { return };
    let accepts = [Accepts::V1, Accepts::V2, Accepts::Any][usize::from(first % 3)];
    is_steady(bytes, |bytes| {
        Ok::<_, proxy::ProxyError>(match proxy::read(bytes, accepts)? {
            Progress::More(need) => Progress::More(need),
            Progress::Done(header) => {
                Progress::Done((header.addresses.clone(), header.length, header.tlvs().count()))
            }
        })
    });
    // Of a datagram all is there: it has a header, has none, or is wrong.
    let whole = proxy::read(bytes, Accepts::V2);
    match proxy::read_datagram(bytes) {
        Ok(Some(header)) => assert_eq!(whole, Ok(Progress::Done(header))),
        Ok(None) => assert!(!bytes.starts_with(&proxy::V2_SIGNATURE)),
        Err(proxy::ProxyError::Truncated) => assert!(matches!(whole, Ok(Progress::More(_)))),
        Err(wrong) => assert_eq!(whole, Err(wrong)),
    }
    let Ok(Progress::Done(header)) = proxy::read(bytes, accepts) else { return };
    assert!(header.length <= proxy::HEADER_MAX && header.length <= bytes.len());
    let mut written = Vec::new();
    let outgoing = Outgoing {
        addresses: &header.addresses,
        transport: Transport::Stream,
        passed_on: header.tlv_bytes(),
        authority: Some(b"a.example"),
        unique_id: Some(b"id"),
    };
    proxy::write_v2(&outgoing, &mut written);
    // What came at the bound is longer once something is added.
    if let Ok(Progress::Done(again)) = proxy::read(&written, Accepts::V2) {
        assert_eq!((&again.addresses, again.length), (&header.addresses, written.len()));
    } else {
        assert!(written.len() > proxy::HEADER_MAX, "{written:?}");
    }
    written.clear();
    proxy::write_v1(&header.addresses, &mut written);
    let again = proxy::read(&written, Accepts::V1);
    assert!(
        matches!(again, Ok(Progress::Done(again)) if again.addresses.source() == header.addresses.source())
    );
}

/// ClientHellos; as they come, and wrapped as a message in records, so that a fuzzer does not have to find lengths.
pub fn hello(bytes: &[u8]) {
    check_hello(bytes);
    let Some((&fragment, body)) = bytes.split_first() else { return };
    let length = (body.len() as u32).to_be_bytes();
    let message = [&[1, length[1], length[2], length[3]], body].concat();
    let mut wire = Vec::new();
    for fragment in message.chunks(usize::from(fragment).max(1) * 16) {
        wire.extend_from_slice(&[22, 3, 1]);
        wire.extend_from_slice(&(fragment.len() as u16).to_be_bytes());
        wire.extend_from_slice(fragment);
    }
    check_hello(&wire);
}

fn check_hello(bytes: &[u8]) {
    is_steady(bytes, |bytes| {
        let mut scratch = Vec::new();
        Ok::<_, hello::HelloError>(match hello::read(bytes, &mut scratch)? {
            Progress::More(need) => Progress::More(need),
            Progress::Done(Hello::Other) => Progress::Done(None),
            Progress::Done(Hello::Tls(hello)) => {
                let name = hello.server_name.map(str::to_owned);
                assert!(name.as_ref().is_none_or(|name| (1..=255).contains(&name.len()) && name.is_ascii()));
                assert!(hello.protocols().all(|protocol| !protocol.is_empty()));
                Progress::Done(Some((name, hello.protocols().count())))
            }
        })
    });
}

/// A whole preface as a worker reads it: shown in pieces, with what is for us taken off.
pub fn preface(bytes: &[u8]) {
    let [flags, step, bytes @ ..] = bytes else { return };
    let proxy = [None, Some(Accepts::V1), Some(Accepts::V2), Some(Accepts::Any)][usize::from(flags & 3)];
    let wants = Wants { proxy, hello: flags & 4 != 0 };
    let routes = Routes::new(vec![Route {
        names: vec!["*.example".parse().expect("a name")],
        target: 1,
        ..Route::default()
    }]);
    let mut preface = Preface::new(wants);
    let mut scratch = Vec::new();
    let (mut taken, mut there) = (0, 0);
    // PROXY, GSS, SSL, hello; and a look more for each time that something came.
    for _ in 0..bytes.len() + 6 {
        let shown = &bytes[taken..there.min(taken + PREFACE_MAX).max(taken)];
        match preface.look(shown, &mut scratch) {
            Ok(Look::More(need)) => {
                assert!(
                    need > shown.len() && need <= PREFACE_MAX.max(proxy::HEADER_MAX),
                    "{need} of {}",
                    shown.len()
                );
                if there == bytes.len() {
                    return;
                }
                there = (there + 1 + usize::from(*step)).min(bytes.len());
            }
            Ok(Look::Proxied(header)) => {
                assert!(header.length <= shown.len());
                taken += header.length;
            }
            Ok(Look::Answer { take, answer }) => {
                assert!(take == shown.len() && (answer == GRANTED || answer == b'N'));
                taken += take;
            }
            Ok(Look::Done { hello, .. }) => {
                assert!(wants.hello || hello.is_none());
                routes.select(&Facts { client: None, port: 1, hello: hello.as_ref() });
                return;
            }
            Err(_) => return,
        }
    }
    panic!("it looks for ever");
}

/// QUIC packets of a client and of a server, and the IDs that are learned from them.
pub fn quic(bytes: &[u8]) {
    let Some((&first, packet)) = bytes.split_first() else { return };
    let header = Header::parse(packet);
    if let Some(Header::Long { destination, source, .. }) = &header {
        assert!(destination.len() + source.len() + 7 <= packet.len(), "IDs are in the packet");
    }
    let own = source_cid(packet);
    if let Some(cid) = own {
        assert!((1..=CID_MAX).contains(&cid.as_bytes().len()));
        assert!(
            matches!(header, Some(Header::Long { version: 1.., source, .. }) if source == cid.as_bytes())
        );
    }
    let backends =
        [(1, "0a0b0c", "10.0.0.1:443"), (2, "0d0e0f", "10.0.0.2:443"), (3, "000102", "[2001:db8::1]:443")];
    let mut keys = ServerIdKeys::new(NONCE_MIN + first / 16);
    // Any function of a block does: which one it is makes no difference to what is read where.
    struct Turned(u8);
    impl Cipher for Turned {
        fn encrypt(&self, block: &mut [u8; 16]) {
            block.iter_mut().for_each(|octet| *octet = octet.rotate_left(3) ^ self.0);
        }

        fn decrypt(&self, block: &mut [u8; 16]) {
            block.iter_mut().for_each(|octet| *octet = (*octet ^ self.0).rotate_right(3));
        }
    }
    keys.insert(first % 8, [first; 16], Arc::new(Turned(first)));
    let keys = (first >= 128).then(|| Arc::new(keys));
    for form in [ServerIdForm::Ipv4, ServerIdForm::Ipv4Port, ServerIdForm::Id(1 + first % 15)] {
        let backends = backends.iter().map(|(name, id, at)| (*name, *id, at.parse().expect("an address")));
        let found: Option<i32> = ServerIds::new(form, keys.clone(), backends).find(packet);
        assert!(found.is_none_or(|name| (1..=3).contains(&name)) && (found.is_none() || header.is_some()));
    }
    // A bounded memory: what is learned last is found, and forgotten is forgotten.
    let mut cids = Cids::new(u64::from(first), 4);
    for (id, piece) in (0..).zip(packet.chunks(1 + usize::from(first) % CID_MAX).take(32)) {
        let Some(cid) = Cid::new(piece) else { continue };
        if cids.learn(cid, id, id) {
            let short = [&[0x40], piece].concat();
            assert!(cids.find(&short).is_some(), "{piece:?} was learned just now");
        }
        assert!(cids.len() <= 4);
    }
    let _ = cids.find(packet);
    if let Some(cid) = own {
        cids.learn(cid, 99, 99);
        cids.forget(&cid, 99);
    }
}

/// The table of UDP flows under any order of what can happen to it.
pub fn datagrams(bytes: &[u8]) {
    const FLOWS_MAX: usize = 5;
    let [idle, counts, bytes @ ..] = bytes else { return };
    let tuning = Tuning {
        idle_timeout: Duration::from_millis(1 + 40 * u64::from(*idle)),
        responses: u32::from(counts & 3),
        requests: u32::from(counts >> 2 & 3),
        retries: counts >> 4 & 1,
    };
    let mut flows = Flows::new(Timestamp::ZERO, 7, FLOWS_MAX);
    let (mut now, mut open, mut ended) = (0, BTreeSet::new(), BTreeSet::new());
    let mut expired = Vec::new();
    for step in bytes.chunks_exact(2) {
        let (what, which) = (step[0] % 8, step[1]);
        let at = Timestamp::from_millis(now);
        let client = SocketAddr::from(([10, 0, 0, which % 16], 1_000));
        let tuple = Tuple::new(0, client, None);
        // Some are clients of one proxy, with one socket for all of them.
        let announced = (which % 16 >= 12).then(|| {
            let proxy = SocketAddr::from(([10, 0, 1, 1], 1_000));
            Announced::new(Tuple::new(0, proxy, None), client, proxy)
        });
        let any = open.iter().copied().nth(usize::from(which) % open.len().max(1));
        match (what, any) {
            (0 | 1, _) => match announced.map_or_else(|| flows.find(&tuple), |a| flows.find_announced(&a)) {
                Some(index) => {
                    assert!(open.contains(&index), "a tuple names a flow that is open");
                    flows.asked(index, 1 + u32::from(which >> 6), at, &tuning);
                }
                None => match match announced {
                    Some(announced) => flows.open_announced(announced, which, at, &tuning),
                    None => flows.open(tuple, which, at, &tuning),
                } {
                    Ok(index) => {
                        assert!(open.len() < FLOWS_MAX && open.insert(index) && !ended.contains(&index));
                        flows.asked(index, 1, at, &tuning);
                    }
                    Err(_) => assert_eq!(open.len(), FLOWS_MAX),
                },
            },
            (2, Some(index)) => {
                if flows.answered(index, 1, at, &tuning).over {
                    assert!(tuning.responses > 0 && flows.end(index));
                    open.remove(&index);
                    ended.insert(index);
                }
            }
            (3, Some(index)) => match flows.refused(index, &tuning) {
                Refusal::Elsewhere => flows.placed(index, at, &tuning),
                Refusal::Over => {
                    assert!(flows.end(index) && !flows.end(index), "it ends once");
                    open.remove(&index);
                    ended.insert(index);
                }
            },
            (4, Some(index)) => flows.unname(index),
            (5, _) => {
                if let Some(index) = ended.pop_first() {
                    let generation = flows.generation(index);
                    assert!(flows.remove(index).is_some() && flows.generation(index) != generation);
                }
            }
            _ => {
                now += 7 * u64::from(which);
                let at = Timestamp::from_millis(now);
                flows.expire(at, |_| &tuning, &mut expired);
                for (index, why) in expired.drain(..) {
                    assert!(open.contains(&index), "what expires is open");
                    if why == Expiry::Idle {
                        assert!(flows.end(index));
                        open.remove(&index);
                        ended.insert(index);
                    }
                }
            }
        }
        assert_eq!((flows.open_count(), flows.len()), (open.len(), open.len() + ended.len()));
    }
    // Time alone ends all of them.
    now += 60_000 + tuning.idle_timeout.as_millis() as u64;
    flows.expire(Timestamp::from_millis(now), |_| &tuning, &mut expired);
    let idle: BTreeSet<u32> =
        expired.iter().filter(|(_, why)| *why == Expiry::Idle).map(|(index, _)| *index).collect();
    assert_eq!(idle, open, "each of them is idle by now");
}
