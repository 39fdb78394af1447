//! One message to a DNS server and its answer: by UDP, and by TCP where UDP does not do.
//!
//! Owns: sockets, time limits, matching an answer to its question, signing and verifying (RFC 8945). Does not own: what is
//! asked, and what an answer means.
//!
//! The library's own client is not used here: it sends a signed update again and again at once, and turns an error that
//! a server says in its signature (BADKEY, BADSIG, BADTIME) into one text for all.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::TSigVerifier;
use hickory_proto::rr::rdata::tsig::TsigError;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::UpdateError;
use crate::key::TsigKey;

/// What goes by UDP without asking first (RFC 1035, section 4.2.1).
const DATAGRAM_BYTES_MAX: usize = 512;
/// An update's answer is its question's head and a signature; more comes only to questions.
const RECEIVE_BYTES_MAX: usize = 4096;
/// A server in the same network answers in milliseconds, one across an ocean in 200 ms.
const UDP_PATIENCE: Duration = Duration::from_millis(500);
/// The second one is for a lost datagram.
const UDP_TRIES: u32 = 2;
/// Connecting, sending and hearing.
const TCP_PATIENCE: Duration = Duration::from_secs(3);

/// How to reach a server, as far as that was learned.
#[derive(Debug)]
pub(crate) struct Link {
    server: SocketAddr,
    /// UDP was not answered when TCP was: a firewall's usual fault.
    prefers_tcp: bool,
}

impl Link {
    pub(crate) fn new(server: SocketAddr) -> Self {
        Self { server, prefers_tcp: false }
    }

    pub(crate) fn server(&self) -> SocketAddr {
        self.server
    }

    /// Sends a message, signed where there is a key, and gives the answer, verified then.
    ///
    /// # Errors
    /// When there is no answer, or none to believe. A response code is no error here, but for those of signatures.
    pub(crate) async fn ask(
        &mut self,
        mut message: Message,
        key: Option<&TsigKey>,
    ) -> Result<Message, UpdateError> {
        let verifier = match key {
            // A clock before 1970 is one that the server will complain about.
            Some(key) => message.finalize(key.signer(), unix_s()).map_err(unencodable)?,
            None => None,
        };
        let question = Question { id: message.metadata.id, kind: message.metadata.op_code };
        let bytes = message.to_vec().map_err(unencodable)?;
        let answer = self.transfer(&bytes, question).await?;
        match (key, verifier) {
            (Some(key), Some(verifier)) => verified(answer, verifier, key),
            _ => Ok(answer.message),
        }
    }

    async fn transfer(&mut self, bytes: &[u8], question: Question) -> Result<Answer, UpdateError> {
        if bytes.len() > DATAGRAM_BYTES_MAX || self.prefers_tcp {
            let answer = self.by_tcp(bytes, question).await;
            // Whatever was learned may have changed.
            self.prefers_tcp &= answer.is_ok();
            return answer;
        }
        match self.by_udp(bytes, question).await {
            Ok(Some(answer)) if !answer.message.metadata.truncation => Ok(answer),
            Ok(Some(_truncated)) => self.by_tcp(bytes, question).await,
            Ok(None) | Err(_) => {
                let answer = self.by_tcp(bytes, question).await;
                self.prefers_tcp = answer.is_ok();
                answer
            }
        }
    }

    /// `None`: no answer in time.
    async fn by_udp(&self, bytes: &[u8], question: Question) -> io::Result<Option<Answer>> {
        let any: SocketAddr = match self.server {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any).await?;
        // From now on the kernel drops what others send, and says when nobody listens.
        socket.connect(self.server).await?;
        let mut buffer = [0; RECEIVE_BYTES_MAX];
        for _ in 0..UDP_TRIES {
            socket.send(bytes).await?;
            let deadline = Instant::now() + UDP_PATIENCE;
            while let Ok(received) = timeout_at(deadline, socket.recv(&mut buffer)).await {
                let length = received?;
                // A late answer to another question, or a guess: ours may still come.
                if let Some(answer) = question.answer(&buffer[..length]) {
                    return Ok(Some(answer));
                }
            }
        }
        Ok(None)
    }

    async fn by_tcp(&self, bytes: &[u8], question: Question) -> Result<Answer, UpdateError> {
        let server = self.server;
        match timeout(TCP_PATIENCE, exchange_by_tcp(server, bytes)).await {
            Ok(Ok(received)) => question.answer(&received).ok_or(UpdateError::Garbled { server }),
            Ok(Err(error)) => Err(UpdateError::Unreachable { server, why: error.to_string() }),
            Err(_) => Err(UpdateError::Silent { server }),
        }
    }
}

/// Each message has its length before it (RFC 1035, section 4.2.2), and both go in one segment.
async fn exchange_by_tcp(server: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&[&length.to_be_bytes()[..], bytes].concat()).await?;
    // 64 KiB at most: the length has 16 bits.
    let length = stream.read_u16().await?;
    let mut received = vec![0; usize::from(length)];
    stream.read_exact(&mut received).await?;
    Ok(received)
}

/// What an answer must match.
#[derive(Debug, Clone, Copy)]
struct Question {
    id: u16,
    kind: OpCode,
}

impl Question {
    fn answer(self, bytes: &[u8]) -> Option<Answer> {
        let message = Message::from_vec(bytes).ok()?;
        let head = &message.metadata;
        let is_ours =
            head.id == self.id && head.op_code == self.kind && head.message_type == MessageType::Response;
        is_ours.then(|| Answer { bytes: bytes.to_vec(), message })
    }
}

struct Answer {
    /// As they came: a signature is over these.
    bytes: Vec<u8>,
    message: Message,
}

/// The answer, if it is signed with our key, or says in the open why it is not done: nothing is done on an answer that
/// says no, so anyone may say it.
fn verified(answer: Answer, mut verifier: TSigVerifier, key: &TsigKey) -> Result<Message, UpdateError> {
    let Answer { bytes, message } = answer;
    let (name, code) = (key.name(), message.metadata.response_code);
    match message.signature().and_then(|record| record.data.error) {
        Some(TsigError::BadKey) => return Err(UpdateError::BadKey { key: name }),
        Some(TsigError::BadSig | TsigError::BadTrunc) => return Err(UpdateError::BadSignature { key: name }),
        Some(TsigError::BadTime) => return Err(UpdateError::BadTime),
        Some(TsigError::Unknown(code)) => {
            return Err(UpdateError::Other { code: format!("TSIG error {code}") });
        }
        None => {}
    }
    match verifier.verify(&bytes) {
        Ok(response) => Ok(response.into_message()),
        Err(_) if says_no(code) => Ok(message),
        Err(_) => Err(UpdateError::NotSigned { key: name }),
    }
}

/// Codes by which a server declines without looking at what is in the zone.
fn says_no(code: ResponseCode) -> bool {
    use ResponseCode::{FormErr, NotAuth, NotImp, NotZone, Refused, ServFail};
    matches!(code, FormErr | NotAuth | NotImp | NotZone | Refused | ServFail)
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Our own messages are far from any limit of the form.
fn unencodable(error: impl std::fmt::Display) -> UpdateError {
    UpdateError::Other { code: format!("a message that could not be written: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::TSigResponseContext;

    const NOW: u64 = 1_700_000_000;

    fn key(name: &str, secret: &[u8]) -> TsigKey {
        TsigKey::new(name, secret).unwrap()
    }

    /// What comes of an answer with this code, signed as `context` says, to a question signed with our key.
    fn heard(
        code: ResponseCode,
        context: impl FnOnce(u16, &[u8]) -> Option<TSigResponseContext>,
    ) -> Result<ResponseCode, UpdateError> {
        let ours = key("ours", b"secret");
        let mut question = Message::new(7, MessageType::Query, OpCode::Update);
        let verifier = question.finalize(ours.signer(), NOW).unwrap().expect("it is signed");
        let mac = question.signature().expect("it is signed").data.mac.clone();
        let mut answer = Message::new(7, MessageType::Response, OpCode::Update);
        answer.metadata.response_code = code;
        if let Some(context) = context(7, &mac) {
            let signature = context.sign(&answer.to_vec().unwrap()).unwrap();
            answer.set_signature(signature);
        }
        let question = Question { id: 7, kind: OpCode::Update };
        let answer = question.answer(&answer.to_vec().unwrap()).expect("it is ours");
        verified(answer, verifier, &ours).map(|message| message.metadata.response_code)
    }

    fn signed(
        key: TsigKey,
        time: u64,
        error: Option<TsigError>,
    ) -> impl FnOnce(u16, &[u8]) -> Option<TSigResponseContext> {
        move |id, mac| Some(TSigResponseContext::new(id, time, key.signer().clone(), mac.to_vec(), error))
    }

    #[test]
    fn an_answer_counts_when_it_is_signed_and_no_counts_anyway() {
        use ResponseCode::{NXRRSet, NoError, NotAuth, Refused, YXDomain};
        let ours = || key("ours", b"secret");
        for code in [NoError, YXDomain, NXRRSet, Refused] {
            assert_eq!(heard(code, signed(ours(), NOW, None)), Ok(code));
        }
        let not_signed = || Err(UpdateError::NotSigned { key: "ours".into() });
        for code in [NoError, YXDomain, NXRRSet] {
            assert_eq!(heard(code, |_, _| None), not_signed(), "{code}");
            assert_eq!(heard(code, signed(key("ours", b"another"), NOW, None)), not_signed());
            assert_eq!(heard(code, signed(key("another", b"secret"), NOW, None)), not_signed());
            // A good one, of another day: somebody plays it back.
            assert_eq!(heard(code, signed(ours(), NOW - 86_400, None)), not_signed());
        }
        assert_eq!(heard(Refused, |_, _| None), Ok(Refused));

        let bad_key = |id, _: &[u8]| {
            Some(TSigResponseContext::unknown_key(
                id,
                NOW,
                key("ours", b"secret").signer().signer_name().clone(),
            ))
        };
        assert_eq!(heard(NotAuth, bad_key), Err(UpdateError::BadKey { key: "ours".into() }));
        let bad_signature = |id, _: &[u8]| {
            Some(TSigResponseContext::bad_signature(id, NOW, key("ours", b"secret").signer().clone()))
        };
        assert_eq!(heard(NotAuth, bad_signature), Err(UpdateError::BadSignature { key: "ours".into() }));
        assert_eq!(heard(NotAuth, signed(ours(), NOW, Some(TsigError::BadTime))), Err(UpdateError::BadTime));
    }

    #[test]
    fn answers_to_other_questions_are_passed_over() {
        let question = Question { id: 7, kind: OpCode::Update };
        let bytes = |id, what, kind| Message::new(id, what, kind).to_vec().unwrap();
        assert!(question.answer(&bytes(7, MessageType::Response, OpCode::Update)).is_some());
        assert!(question.answer(&bytes(8, MessageType::Response, OpCode::Update)).is_none());
        assert!(question.answer(&bytes(7, MessageType::Response, OpCode::Query)).is_none());
        assert!(question.answer(&bytes(7, MessageType::Query, OpCode::Update)).is_none());
        assert!(question.answer(b"nonsense").is_none());
    }
}
