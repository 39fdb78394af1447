//! XMPP (RFC 6120): a stream is opened, its features are awaited, and it is closed (§4.4). With STARTTLS (§5) there are two: the first
//! goes over to TLS, if it is offered, and the second is opened and closed within.

use crate::Failure;
use crate::text::{find, shown};
use crate::tls::Later;
use crate::wire::{Parsed, Wire};

const CLOSING: &[u8] = b"</stream:stream>";
const STARTTLS: &[u8] = b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>";

/// What the stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StreamKind {
    /// `jabber:client`.
    #[default]
    Client,
    /// `jabber:server`.
    Server,
}

/// Whom we ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xmpp {
    /// The domain that the server serves.
    pub domain: String,
    /// By whom.
    pub stream: StreamKind,
}

pub(crate) async fn ask(
    xmpp: &Xmpp,
    wire: &mut Wire,
    starttls: Option<Later<'_>>,
) -> Result<String, Failure> {
    let offers = open(xmpp, wire).await?;
    if let Some(later) = starttls {
        if !offers.starttls {
            return Err(Failure::Answer("it offers no STARTTLS".to_owned()));
        }
        wire.say(STARTTLS).await?;
        if !wire.hear("XMPP stream", proceeds).await? {
            return Err(Failure::Answer("it offers STARTTLS, and refuses it".to_owned()));
        }
        later.begin(wire).await?;
        open(xmpp, wire).await?;
    }
    Ok("it offers a stream".to_owned())
}

async fn open(xmpp: &Xmpp, wire: &mut Wire) -> Result<Offers, Failure> {
    wire.say(&opening(xmpp)).await?;
    wire.part_with(CLOSING);
    let said = wire.hear("XMPP stream", features).await?;
    said.map_err(|error| Failure::Answer(format!("stream error: {error}")))
}

/// What is in the features of a stream.
#[derive(Debug, PartialEq, Eq)]
struct Offers {
    starttls: bool,
}

/// §4.7, §4.8.
fn opening(xmpp: &Xmpp) -> Vec<u8> {
    let namespace = match xmpp.stream {
        StreamKind::Client => "jabber:client",
        StreamKind::Server => "jabber:server",
    };
    let domain = xmpp.domain.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;");
    format!(
        "<?xml version='1.0'?><stream:stream to='{domain}' version='1.0' xml:lang='en' xmlns='{namespace}' \
         xmlns:stream='http://etherx.jabber.org/streams'>"
    )
    .into_bytes()
}

/// Up to the features, or to the error that came instead (§4.9.1). The prefix is `stream` by §4.8.5.
fn features(bytes: &[u8]) -> Parsed<Result<Offers, String>> {
    let start = &bytes[..bytes.len().min(1)];
    if !start.is_empty() && !start.starts_with(b"<") && !start[0].is_ascii_whitespace() {
        return Err(shown(bytes));
    }
    for end in [&b"</stream:features>"[..], b"<stream:features/>"] {
        if let Some(at) = find(bytes, end) {
            let starttls = find(&bytes[..at], b"urn:ietf:params:xml:ns:xmpp-tls").is_some();
            return Ok(Some((Ok(Offers { starttls }), at + end.len())));
        }
    }
    let end = b"</stream:error>";
    let (Some(from), Some(to)) = (find(bytes, b"<stream:error"), find(bytes, end)) else { return Ok(None) };
    let inside = bytes.get(from..to).unwrap_or_default();
    // The condition is the name of its first child (§4.9.3).
    let child = inside.iter().skip(1).position(|byte| *byte == b'<').map_or(inside, |at| &inside[at + 2..]);
    let name: Vec<u8> =
        child.iter().copied().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'-').collect();
    Ok(Some((Err(shown(&name)), to + end.len())))
}

/// Whether STARTTLS goes on (§5.4.2.3), or has failed (§5.4.2.2).
fn proceeds(bytes: &[u8]) -> Parsed<bool> {
    for (name, goes_on) in [("proceed", true), ("failure", false)] {
        let begin = format!("<{name}");
        if !bytes.starts_with(begin.as_bytes()) {
            continue;
        }
        let Some(close) = find(bytes, b">") else { return Ok(None) };
        if bytes[close - 1] == b'/' {
            return Ok(Some((goes_on, close + 1)));
        }
        let end = format!("</{name}>");
        return Ok(find(bytes, end.as_bytes()).map(|at| (goes_on, at + end.len())));
    }
    let may_become = [&b"<proceed"[..], b"<failure"].iter().any(|begin| begin.starts_with(bytes));
    if may_become { Ok(None) } else { Err(shown(bytes)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_the_specification() {
        let xmpp = Xmpp { domain: "im.example.com".into(), stream: StreamKind::Client };
        let text = String::from_utf8(opening(&xmpp)).unwrap();
        assert!(text.starts_with("<?xml version='1.0'?><stream:stream to='im.example.com' "), "{text}");
        assert!(text.ends_with("xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>"));
        // §4.2, shortened.
        let answer = b"<?xml version='1.0'?><stream:stream from='im.example.com' id='x'><stream:features>\
            <starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/></starttls></stream:features>";
        assert_eq!(features(answer), Ok(Some((Ok(Offers { starttls: true }), answer.len()))));
        let without = b"<stream:stream><stream:features><bind/></stream:features>";
        assert_eq!(features(without), Ok(Some((Ok(Offers { starttls: false }), without.len()))));
        for length in 0..answer.len() {
            assert_eq!(features(&answer[..length]), Ok(None), "{length}");
        }
        // §4.9.3.6.
        let error = b"<stream:stream id='x'><stream:error><host-unknown xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>\
            </stream:error></stream:stream>";
        assert!(matches!(features(error), Ok(Some((Err(name), _))) if name == "host-unknown"));
        assert!(features(b"220 mail.example.com").is_err());
        assert!(matches!(features(b"</stream:error><stream:error"), Ok(Some((Err(_), _)))));
    }

    #[test]
    fn what_follows_starttls() {
        let goes_on = b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>";
        assert_eq!(proceeds(goes_on), Ok(Some((true, goes_on.len()))));
        for length in 0..goes_on.len() {
            assert_eq!(proceeds(&goes_on[..length]), Ok(None), "{length}");
        }
        let long = b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'></proceed><injected/>";
        assert_eq!(proceeds(long), Ok(Some((true, long.len() - 11))));
        let failed = b"<failure xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:stream>";
        assert_eq!(proceeds(failed), Ok(Some((false, failed.len() - 16))));
        assert!(proceeds(b" <proceed/>").is_err(), "no white space (\u{a7}5.3.3)");
        assert!(proceeds(b"<success/>").is_err());
    }

    #[test]
    fn a_domain_stays_an_attribute() {
        let xmpp = Xmpp { domain: "a'/><x".into(), stream: StreamKind::Server };
        let text = String::from_utf8(opening(&xmpp)).unwrap();
        assert!(text.contains("to='a&apos;/>&lt;x'") && text.contains("jabber:server"), "{text}");
    }
}
