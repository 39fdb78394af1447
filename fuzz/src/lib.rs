//! Targets: each takes any bytes, and panics where a promise is broken.
//!
//! `cargo xtask fuzz [TARGET] [--seconds N]` builds and runs them. What a run finds interesting and small is kept in
//! `corpus/TARGET`; what breaks something goes to `artifacts/TARGET`, and becomes a test of the crate at fault.
#![forbid(unsafe_code)]

use flow::preface::hello::{self, Hello};
use flow::preface::proxy::{self, Accepts, Outgoing, Transport};
use flow::preface::{Facts, GRANTED, Look, PREFACE_MAX, Preface, Progress, Route, Routes, Wants};

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
