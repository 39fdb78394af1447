//! DNS (RFC 1035): a query over UDP or TCP, and the answer's code.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::schedule::Jitter;
use crate::wire::{Parsed, Wire};
use crate::{Failure, ProxyHeader, udp};

/// Longest datagram that is looked at; nothing longer is asked for (§2.3.4).
const DATAGRAM_BYTES_MAX: usize = 512;
const HEAD_BYTES: usize = 12;
/// §3.2.4.
const CLASS_IN: u16 = 1;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsQuery {
    /// For which name.
    pub name: DnsName,
    /// For which records.
    pub record: RecordType,
    /// What the answer's code must be.
    pub rcode: Rcode,
    /// By which way.
    pub transport: Transport,
}

/// By which way a query goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// A datagram, said again once if nothing comes.
    #[default]
    Udp,
    /// A connection.
    Tcp,
}

/// A name in its form on the wire, without the root's zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsName(Vec<u8>);

/// Why a text is no name: the operator's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no DNS name: labels have 1 to 63 characters without spaces, all of it at most 253")]
pub struct DnsNameError(
    /// What was written.
    pub String,
);

impl FromStr for DnsName {
    type Err = DnsNameError;

    fn from_str(text: &str) -> Result<Self, DnsNameError> {
        let wrong = || DnsNameError(text.to_owned());
        let bare = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() || bare.len() > 253 || !bare.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(wrong());
        }
        let mut wire = Vec::new();
        for label in bare.split('.').filter(|_| !bare.is_empty()) {
            if !(1..=63).contains(&label.len()) {
                return Err(wrong());
            }
            wire.push(label.len() as u8);
            wire.extend_from_slice(label.as_bytes());
        }
        Ok(Self(wire))
    }
}

macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident, $($variant:ident $number:literal $text:literal,)*) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $(#[doc = concat!("`", $text, "`.")] $variant,)*
        }

        impl $name {
            /// Every one.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its number on the wire.
            pub const fn number(self) -> u16 {
                match self { $(Self::$variant => $number,)* }
            }

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

numbers! {
    /// A type of records (IANA's registry).
    RecordType,
    A 1 "A",
    Ns 2 "NS",
    Cname 5 "CNAME",
    Soa 6 "SOA",
    Ptr 12 "PTR",
    Mx 15 "MX",
    Txt 16 "TXT",
    Aaaa 28 "AAAA",
    Srv 33 "SRV",
}

numbers! {
    /// An answer's code (§4.1.1).
    Rcode,
    NoError 0 "NOERROR",
    FormErr 1 "FORMERR",
    ServFail 2 "SERVFAIL",
    NxDomain 3 "NXDOMAIN",
    NotImp 4 "NOTIMP",
    Refused 5 "REFUSED",
}

impl DnsQuery {
    fn encode(&self, id: u16) -> Vec<u8> {
        let mut message = id.to_be_bytes().to_vec();
        // A query, recursion desired; one question.
        message.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        message.extend_from_slice(&self.question());
        message
    }

    fn question(&self) -> Vec<u8> {
        let mut question = self.name.0.clone();
        question.push(0);
        question.extend_from_slice(&self.record.number().to_be_bytes());
        question.extend_from_slice(&CLASS_IN.to_be_bytes());
        question
    }

    /// `None`: it is not an answer to this query.
    fn judge(&self, id: u16, message: &[u8]) -> Option<Result<String, Failure>> {
        let head = message.get(..HEAD_BYTES)?;
        let number = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let is_answer = head[2] & 0x80 != 0;
        // Some servers leave the question out of an error.
        let question = self.question();
        let asked = number(4) == 0
            || message
                .get(HEAD_BYTES..HEAD_BYTES + question.len())
                .is_some_and(|q| q.eq_ignore_ascii_case(&question));
        if number(0) != id || !is_answer || !asked {
            return None;
        }
        let rcode = u16::from(head[3] & 0x0f);
        let known = Rcode::ALL.iter().find(|known| known.number() == rcode);
        let name = known.map_or_else(|| format!("code {rcode}"), ToString::to_string);
        if rcode == self.rcode.number() {
            let records = number(6);
            return Some(Ok(format!("{name}, {records} records")));
        }
        Some(Err(Failure::Answer(format!("it answers {name}, not {}", self.rcode))))
    }
}

/// An id that cannot be guessed from outside.
fn id() -> u16 {
    let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0);
    Jitter::new(seed).draw() as u16
}

/// `proxy` comes before the question.
pub(crate) async fn ask_udp(
    query: &DnsQuery,
    proxy: Option<ProxyHeader>,
    target: SocketAddr,
    limit: Duration,
) -> Result<String, Failure> {
    let socket = udp::connect(target).await.map_err(|why| Failure::Connect(target, why))?;
    let id = id();
    let message = udp::headed(&socket, proxy, &query.encode(id));
    let message = message.map_err(|why| Failure::Connect(target, why))?;
    socket.send(&message).await.map_err(|why| Failure::Connect(target, why))?;
    // A datagram may be lost; more than one more would be insistence.
    let again = Instant::now() + limit / 2;
    let mut said_again = false;
    let mut buffer = [0; DATAGRAM_BYTES_MAX];
    loop {
        tokio::select! {
            received = udp::receive(&socket, &mut buffer) => {
                let length = received.map_err(|why| Failure::Connect(target, why))?;
                if let Some(judged) = query.judge(id, &buffer[..length]) {
                    return judged;
                }
            }
            () = sleep_until(again), if !said_again => {
                said_again = true;
                socket.send(&message).await.map_err(|why| Failure::Connect(target, why))?;
            }
        }
    }
}

/// §4.2.2: each message behind its length.
pub(crate) async fn ask_tcp(query: &DnsQuery, wire: &mut Wire) -> Result<String, Failure> {
    let id = id();
    let message = query.encode(id);
    let mut framed = (message.len() as u16).to_be_bytes().to_vec();
    framed.extend_from_slice(&message);
    wire.say(&framed).await?;
    loop {
        let message = wire.hear("DNS", framed_message).await?;
        if let Some(judged) = query.judge(id, &message) {
            return judged;
        }
    }
}

fn framed_message(bytes: &[u8]) -> Parsed<Vec<u8>> {
    let Some(head) = bytes.get(..2) else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([head[0], head[1]]));
    Ok(bytes.get(2..2 + length).map(|message| (message.to_vec(), 2 + length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query() -> DnsQuery {
        DnsQuery {
            name: "F.ISI.arpa".parse().unwrap(),
            record: RecordType::A,
            rcode: Rcode::NoError,
            transport: Transport::Udp,
        }
    }

    #[test]
    fn queries() {
        let expected = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01F\x03ISI\x04arpa\0\0\x01\0\x01";
        assert_eq!(query().encode(0x1234), expected);
        let root = DnsQuery { name: ".".parse().unwrap(), record: RecordType::Ns, ..query() };
        assert_eq!(root.encode(1)[12..], [0, 0, 2, 0, 1]);
        for wrong in ["", "a..b", "a b", &"x".repeat(64), &"abc.".repeat(70)] {
            assert!(wrong.parse::<DnsName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn answers() {
        let query = query();
        let mut answer = query.encode(0x1234);
        (answer[2], answer[3], answer[7]) = (0x81, 0x80, 1);
        assert_eq!(query.judge(0x1234, &answer).unwrap().unwrap(), "NOERROR, 1 records");
        assert!(query.judge(0x1235, &answer).is_none(), "another's");
        answer[13] = b'f';
        assert!(query.judge(0x1234, &answer).is_some(), "names have no case");
        answer[13] = b'g';
        assert!(query.judge(0x1234, &answer).is_none(), "of another question");
        answer[13] = b'F';
        answer[3] = 0x82;
        let failure = query.judge(0x1234, &answer).unwrap().unwrap_err().to_string();
        assert_eq!(failure, "it answers SERVFAIL, not NOERROR");
        answer[2] = 1;
        assert!(query.judge(0x1234, &answer).is_none(), "a query is no answer");
        for length in 0..HEAD_BYTES {
            assert!(query.judge(0x1234, &answer[..length]).is_none());
        }
        assert_eq!(framed_message(b"\0\x02ab"), Ok(Some((b"ab".to_vec(), 4))));
        assert_eq!(framed_message(b"\0\x02a"), Ok(None));
    }
}
