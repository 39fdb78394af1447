//! The order in which a preface is read. What its parts are made of is tested in `tests/preface.rs`.

use super::*;

fn looks(wants: Wants, steps: &[&[u8]]) -> Vec<String> {
    let mut preface = Preface::new(wants);
    let mut scratch = Vec::new();
    let mut said = Vec::new();
    for bytes in steps {
        said.push(match preface.look(bytes, &mut scratch) {
            Ok(Look::More(bytes)) => format!("more {bytes}"),
            Ok(Look::Proxied(header)) => format!("proxied {:?}", header.addresses.source()),
            Ok(Look::Answer { take, answer }) => format!("take {take} answer {}", char::from(answer)),
            Ok(Look::Done { hello, tls_asked }) => {
                format!("done {:?} {tls_asked}", hello.and_then(|hello| hello.server_name))
            }
            Err(error) => error.to_string(),
        });
    }
    said
}

const HELLO: Wants = Wants { proxy: None, hello: true };
const NOT_TLS: &[u8] = b"\0\0\0\x20\0\x03\0\0user\0x\0";

#[test]
fn a_client_of_postgresql_is_answered_before_its_hello() {
    let said = looks(HELLO, &[b"", &SSL_REQUEST[..3], &SSL_REQUEST, b"", b"\x16"]);
    assert_eq!(said, ["more 1", "more 8", "take 8 answer S", "more 1", "more 2"]);
    let said = looks(HELLO, &[&GSSENC_REQUEST, &SSL_REQUEST, NOT_TLS]);
    assert_eq!(said, ["take 8 answer N", "take 8 answer S", "clear text after a request for TLS"]);
    let said = looks(HELLO, &[&GSSENC_REQUEST, NOT_TLS]);
    assert_eq!(said, ["take 8 answer N", "done None false"], "sslmode=disable");
    // Denied once; asked again, it is the backend's to deal with.
    let said = looks(HELLO, &[&GSSENC_REQUEST, &GSSENC_REQUEST]);
    assert_eq!(said, ["take 8 answer N", "done None false"]);
}

#[test]
fn bytes_that_somebody_put_behind_a_request_are_refused() {
    for request in [SSL_REQUEST, GSSENC_REQUEST] {
        let both = [&request[..], b"x"].concat();
        assert_eq!(looks(HELLO, &[&both]), ["clear text after a request for TLS"]);
    }
}

#[test]
fn what_is_no_tls_is_not_waited_for() {
    assert_eq!(looks(HELLO, &[b"S"]), ["done None false"]);
    assert_eq!(looks(HELLO, &[NOT_TLS]), ["done None false"]);
    assert_eq!(looks(HELLO, &[&NOT_TLS[..4]]), ["done None false"], "another length");
}

#[test]
fn a_proxy_comes_first() {
    let wants = Wants { proxy: Some(Accepts::Any), hello: true };
    let line = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET /";
    let said = looks(wants, &[&line[..9], line, b"GET /"]);
    assert_eq!(said, ["more 10", "proxied Some(192.0.2.1:1)", "done None false"]);
    let alone = Wants { hello: false, ..wants };
    let said = looks(alone, &[line, b""]);
    assert_eq!(said, ["proxied Some(192.0.2.1:1)", "done None false"], "and the client may say nothing");
    assert_eq!(looks(alone, &[b"GET /"]), ["the first bytes are not a PROXY header"]);
}
