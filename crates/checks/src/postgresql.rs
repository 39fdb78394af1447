//! PostgreSQL (Frontend/Backend Protocol 3.0, "Message Flow" and "Message Formats" of its manual).
//!
//! With a user, a session begins and is ended by Terminate, so the server logs no failure. A server that asks for a password has
//! shown that it takes sessions: the connection ends there, which it does not log either (`psql` ends so when it asks people).
//! Without a user an SSLRequest is answered and nothing more: that shows that the server forks, not that it lets anybody in.

use std::net::IpAddr;

use crate::Failure;
use crate::text::{printable, shown};
use crate::tls::Tls;
use crate::wire::{Parsed, Wire};

/// Whom we say we are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PostgreSql {
    /// `None`: an SSLRequest alone.
    pub user: Option<String>,
    /// `None`: of the user's name, as the server has it.
    pub database: Option<String>,
}

/// The request code of an SSLRequest.
const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];
const TERMINATE: &[u8] = &[b'X', 0, 0, 0, 4];
/// 3.0.
const PROTOCOL: i32 = 196_608;
/// Longer messages do not come before a session is ready.
const MESSAGE_BYTES_MAX: usize = 16 * 1024;

pub(crate) async fn ask(
    of: &PostgreSql,
    wire: &mut Wire,
    tls: Option<&Tls>,
    target: IpAddr,
) -> Result<String, Failure> {
    if tls.is_some() || of.user.is_none() {
        wire.say(SSL_REQUEST).await?;
        let offers = wire.hear("PostgreSQL", ssl_answer).await?.map_err(Failure::Answer)?;
        match tls {
            Some(tls) if offers => wire.secure(tls, target, false).await?,
            Some(_) => return Err(Failure::Answer("it offers no TLS".to_owned())),
            None => {}
        }
    }
    let Some(user) = &of.user else { return Ok("it answers SSLRequest".to_owned()) };
    wire.say(&startup(user, of.database.as_deref())).await?;
    loop {
        match wire.hear("PostgreSQL", message).await?.judge()? {
            Next::More => {}
            Next::Ready => {
                wire.part_with(TERMINATE);
                return Ok("a session began".to_owned());
            }
            // A Terminate here would be taken for a wrong answer, and logged.
            Next::Asks => return Ok("it asks for a password".to_owned()),
        }
    }
}

fn startup(user: &str, database: Option<&str>) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend_from_slice(&PROTOCOL.to_be_bytes());
    let named = database.map(|database| ("database", database));
    for (name, value) in [("user", user)].into_iter().chain(named).chain([("application_name", "trimtab")]) {
        for text in [name, value] {
            message.extend_from_slice(text.as_bytes());
            message.push(0);
        }
    }
    message.push(0);
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_be_bytes());
    message
}

/// Whether TLS is offered. Instead, a server may send an error (as when it cannot fork).
fn ssl_answer(bytes: &[u8]) -> Parsed<Result<bool, String>> {
    Ok(match bytes.first() {
        None => None,
        Some(b'S') => Some((Ok(true), 1)),
        Some(b'N') => Some((Ok(false), 1)),
        Some(b'E') => message(bytes)?.map(|(message, used)| (Err(message.error()), used)),
        Some(_) => return Err(shown(bytes)),
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Message {
    kind: u8,
    body: Vec<u8>,
}

fn message(bytes: &[u8]) -> Parsed<Message> {
    let Some(kind) = bytes.first() else { return Ok(None) };
    if !kind.is_ascii_alphabetic() {
        return Err(shown(bytes));
    }
    let Some(length) = bytes.get(1..5).and_then(|length| length.try_into().ok()).map(u32::from_be_bytes)
    else {
        return Ok(None);
    };
    let length = length as usize;
    if !(4..=MESSAGE_BYTES_MAX).contains(&length) {
        return Err(format!("a message of {length} bytes"));
    }
    let body = bytes.get(5..length + 1);
    Ok(body.map(|body| (Message { kind: *kind, body: body.to_vec() }, length + 1)))
}

/// What a message means before a session has begun.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// There is more to come.
    More,
    Ready,
    /// For a password, a certificate, …
    Asks,
}

impl Message {
    fn judge(&self) -> Result<Next, Failure> {
        match self.kind {
            b'Z' => Ok(Next::Ready),
            b'E' => Err(Failure::Answer(self.error())),
            b'R' if self.body.get(..4) != Some(&[0; 4]) => Ok(Next::Asks),
            // AuthenticationOk, ParameterStatus, BackendKeyData, NegotiateProtocolVersion, notices.
            _ => Ok(Next::More),
        }
    }

    /// ErrorResponse: fields of a type, a text and a zero each.
    fn error(&self) -> String {
        let field = |kind: u8| {
            let field = self.body.split(|byte| *byte == 0).find(|field| field.first() == Some(&kind));
            field.map(|field| shown(&field[1..])).unwrap_or_default()
        };
        printable(&format!("{} {}: {}", field(b'S'), field(b'C'), field(b'M')))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_we_send() {
        let expected = b"\0\0\0\x3b\0\x03\0\0user\0check\0database\0app\0application_name\0trimtab\0\0";
        let mut expected = expected.to_vec();
        expected[3] = expected.len() as u8;
        assert_eq!(startup("check", Some("app")), expected);
        assert_eq!(startup("u", None).len(), 4 + 4 + 7 + 25 + 1);
        assert_eq!(SSL_REQUEST[4..], 80_877_103_i32.to_be_bytes());
    }

    #[test]
    fn messages_we_hear() {
        let judged = |bytes: &[u8]| {
            let (message, used) = message(bytes).unwrap().unwrap();
            assert_eq!(used, bytes.len());
            message.judge()
        };
        assert_eq!(judged(b"R\0\0\0\x08\0\0\0\0").unwrap(), Next::More);
        assert_eq!(judged(b"R\0\0\0\x08\0\0\0\x03").unwrap(), Next::Asks);
        assert_eq!(judged(b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0").unwrap(), Next::Asks);
        assert_eq!(judged(b"S\0\0\0\x0ca\0b\0cccc").unwrap(), Next::More);
        assert_eq!(judged(b"Z\0\0\0\x05I").unwrap(), Next::Ready);
        let fatal = b"E\0\0\0\x38SFATAL\0C57P03\0Mthe database system is starting up\0\0";
        let mut fatal = fatal.to_vec();
        fatal[4] = fatal.len() as u8 - 1;
        let failure = judged(&fatal).unwrap_err().to_string();
        assert_eq!(failure, "FATAL 57P03: the database system is starting up");
        assert_eq!(ssl_answer(&fatal), Ok(Some((Err(failure), fatal.len()))));
        assert_eq!((ssl_answer(b"N"), ssl_answer(b"S")), (Ok(Some((Ok(false), 1))), Ok(Some((Ok(true), 1)))));
        for length in 0..fatal.len() {
            assert_eq!(message(&fatal[..length]), Ok(None), "{length}");
        }
    }

    #[test]
    fn what_is_no_message() {
        assert!(message(b"\0").is_err());
        assert!(message(b"R\0\0\0\x03").is_err());
        assert!(message(b"R\x7f\xff\xff\xff").is_err());
        assert!(ssl_answer(b"HTTP/1.1").is_err());
    }
}
