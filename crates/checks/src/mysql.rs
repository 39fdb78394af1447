//! MySQL and MariaDB (Client/Server Protocol, "Connection Phase").
//!
//! A server counts every client that takes the greeting and goes (`Aborted_connects`), and after `max_connect_errors` of them in a
//! row blocks its host (`Host is blocked because of many connection errors`): a balancer that checks by connecting takes all its
//! clients' access away. So a session begins, as a user without a password and without a privilege, and ends by COM_QUIT:
//!
//! ```sql
//! CREATE USER trimtab@'10.0.0.9';
//! ```

use std::net::IpAddr;

use crate::Failure;
use crate::text::{printable, shown};
use crate::tls::Tls;
use crate::wire::{Parsed, Wire};

/// Whom we say we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MySql {
    /// Without a password.
    pub user: String,
    /// `None`: none.
    pub database: Option<String>,
}

/// COM_QUIT, the first packet of its command.
const QUIT: &[u8] = &[1, 0, 0, 0, 1];
/// Longer packets do not come before a session is ready.
const PACKET_BYTES_MAX: usize = 16 * 1024;

const LONG_PASSWORD: u32 = 1;
const CONNECT_WITH_DB: u32 = 1 << 3;
const PROTOCOL_41: u32 = 1 << 9;
const SSL: u32 = 1 << 11;
const SECURE_CONNECTION: u32 = 1 << 15;
const PLUGIN_AUTH: u32 = 1 << 19;
/// Largest packet that we would take, as clients say it.
const MAX_PACKET: u32 = 1 << 24;
/// `utf8mb4_general_ci`, which every server has.
const CHARSET: u8 = 45;
const NATIVE: &[u8] = b"mysql_native_password";

pub(crate) async fn ask(
    of: &MySql,
    wire: &mut Wire,
    tls: Option<&Tls>,
    target: IpAddr,
) -> Result<String, Failure> {
    let (_, payload) = wire.hear("MySQL", packet).await?;
    let greeting = Greeting::parse(&payload).map_err(|wrong| match wrong {
        Wrong::Error(said) => Failure::Answer(said),
        Wrong::Else(why) => Failure::Protocol("MySQL", why),
    })?;
    let mut sequence = 1;
    if let Some(tls) = tls {
        if greeting.capabilities & SSL == 0 {
            // The handshake is gone through all the same: who leaves here is counted.
            finish(of, wire, sequence, 0).await?;
            return Err(Failure::Answer("it offers no TLS".to_owned()));
        }
        wire.say(&framed(sequence, &head(capabilities(of) | SSL))).await?;
        wire.secure(tls, target, false).await?;
        sequence += 1;
    }
    finish(of, wire, sequence, if tls.is_some() { SSL } else { 0 }).await?;
    Ok(format!("{}: a session began", greeting.version))
}

/// From our answer to the greeting until a session has begun.
async fn finish(of: &MySql, wire: &mut Wire, sequence: u8, further: u32) -> Result<(), Failure> {
    wire.say(&framed(sequence, &response(of, further))).await?;
    let (sequence, mut payload) = wire.hear("MySQL", packet).await?;
    if let Some(answer) = switched(&payload)? {
        wire.say(&framed(sequence.wrapping_add(1), answer)).await?;
        (_, payload) = wire.hear("MySQL", packet).await?;
        // caching_sha2_password says that all is well before it says OK.
        if payload == [1, 3] {
            (_, payload) = wire.hear("MySQL", packet).await?;
        }
    }
    match payload.first() {
        Some(0) => {
            wire.part_with(QUIT);
            Ok(())
        }
        Some(0xff) => Err(Failure::Answer(error(&payload))),
        _ => Err(Failure::Protocol("MySQL", shown(&payload))),
    }
}

fn framed(sequence: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = (payload.len() as u32).to_le_bytes().to_vec();
    packet[3] = sequence;
    packet.extend_from_slice(payload);
    packet
}

/// Number and payload.
fn packet(bytes: &[u8]) -> Parsed<(u8, Vec<u8>)> {
    let Some(head) = bytes.get(..4) else { return Ok(None) };
    let length = usize::from(head[0]) | usize::from(head[1]) << 8 | usize::from(head[2]) << 16;
    if length == 0 || length > PACKET_BYTES_MAX {
        return Err(shown(bytes));
    }
    Ok(bytes.get(4..4 + length).map(|payload| ((head[3], payload.to_vec()), 4 + length)))
}

#[derive(Debug, PartialEq, Eq)]
struct Greeting {
    version: String,
    capabilities: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Wrong {
    /// It said an error instead, as when it blocks us or has too many connections.
    Error(String),
    /// It is no greeting.
    Else(String),
}

impl Greeting {
    /// Protocol::HandshakeV10.
    fn parse(payload: &[u8]) -> Result<Self, Wrong> {
        let no = || Wrong::Else(shown(payload));
        match payload.first() {
            Some(0xff) => return Err(Wrong::Error(error(payload))),
            Some(10) => {}
            _ => return Err(no()),
        }
        let end = payload.iter().position(|byte| *byte == 0).filter(|end| *end > 1).ok_or_else(no)?;
        // Thread id 4, scramble 8, a zero, capabilities 2, charset 1, status 2, capabilities 2.
        let low = payload.get(end + 14..end + 16).ok_or_else(no)?;
        let high = payload.get(end + 19..end + 21).unwrap_or(&[0, 0]);
        let capabilities = u32::from_le_bytes([low[0], low[1], high[0], high[1]]);
        if capabilities & PROTOCOL_41 == 0 {
            return Err(no());
        }
        Ok(Self { version: shown(&payload[1..end]), capabilities })
    }
}

fn capabilities(of: &MySql) -> u32 {
    let database = if of.database.is_some() { CONNECT_WITH_DB } else { 0 };
    LONG_PASSWORD | PROTOCOL_41 | SECURE_CONNECTION | PLUGIN_AUTH | database
}

/// Protocol::SSLRequest, and the beginning of Protocol::HandshakeResponse41.
fn head(capabilities: u32) -> Vec<u8> {
    let mut head = capabilities.to_le_bytes().to_vec();
    head.extend_from_slice(&MAX_PACKET.to_le_bytes());
    head.push(CHARSET);
    head.extend_from_slice(&[0; 23]);
    head
}

/// Protocol::HandshakeResponse41, with an empty password.
fn response(of: &MySql, further: u32) -> Vec<u8> {
    let mut response = head(capabilities(of) | further);
    response.extend_from_slice(of.user.as_bytes());
    // The end of the name, and an answer to the scramble of no bytes.
    response.extend_from_slice(&[0, 0]);
    if let Some(database) = &of.database {
        response.extend_from_slice(database.as_bytes());
        response.push(0);
    }
    response.extend_from_slice(NATIVE);
    response.push(0);
    response
}

/// What a Protocol::AuthSwitchRequest is answered with; `None`: it is none.
fn switched(payload: &[u8]) -> Result<Option<&'static [u8]>, Failure> {
    let Some((0xfe, rest)) = payload.split_first() else { return Ok(None) };
    match rest.split(|byte| *byte == 0).next().unwrap_or_default() {
        NATIVE => Ok(Some(b"")),
        // Of an empty password, the zero that ends it.
        b"caching_sha2_password" | b"sha256_password" => Ok(Some(b"\0")),
        other => {
            let message = format!("the user logs in by {}: make one without a password", shown(other));
            Err(Failure::Answer(printable(&message)))
        }
    }
}

/// Protocol::ERR_Packet. Before a session there is no SQL state in it.
fn error(payload: &[u8]) -> String {
    let code = payload.get(1..3).map_or(0, |code| u16::from_le_bytes([code[0], code[1]]));
    let text = payload.get(3..).unwrap_or_default();
    let text = if text.first() == Some(&b'#') { text.get(6..).unwrap_or_default() } else { text };
    printable(&format!("error {code}: {}", shown(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a MariaDB 10.11.
    const GREETING: &[u8] = b"\x0a5.5.5-10.11.6-MariaDB\0\x05\0\0\0@:~mZI&s\0\xfe\xf7\x2d\x02\0\xff\x81\x15\
        \0\0\0\0\0\0\x1d\0\0\0abcdefghijkl\0mysql_native_password\0";

    #[test]
    fn greetings() {
        let greeting = Greeting::parse(GREETING).unwrap();
        assert_eq!(greeting.version, "5.5.5-10.11.6-MariaDB");
        assert_eq!(greeting.capabilities, 0x81ff_f7fe);
        let blocked = b"\xff\x69\x04Host '10.0.0.9' is blocked because of many connection errors";
        let Err(Wrong::Error(said)) = Greeting::parse(blocked) else { panic!("an error") };
        assert!(said.starts_with("error 1129: Host '10.0.0.9' is blocked"), "{said}");
        assert!(matches!(Greeting::parse(b"\x0a5.5"), Err(Wrong::Else(_))));
        for length in 0..38 {
            assert!(Greeting::parse(&GREETING[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn our_answer() {
        let of = MySql { user: "trimtab".into(), database: None };
        let response = response(&of, 0);
        assert_eq!(response[..4], [0x01, 0x82, 0x08, 0x00]);
        assert_eq!(response[4..9], [0, 0, 0, 1, 45]);
        assert_eq!(response[9..32], [0; 23]);
        assert_eq!(&response[32..], b"trimtab\0\0mysql_native_password\0");
        let framed = framed(1, &response);
        assert_eq!(framed[..4], [response.len() as u8, 0, 0, 1]);
        assert_eq!(packet(&framed), Ok(Some(((1, response), framed.len()))));
        let with = MySql { database: Some("app".into()), ..of };
        assert!(super::response(&with, SSL).ends_with(b"trimtab\0\0app\0mysql_native_password\0"));
    }

    #[test]
    fn other_ways_to_log_in() {
        assert_eq!(switched(b"\0\0\0\x02\0\0\0").unwrap(), None);
        assert_eq!(switched(b"\xfemysql_native_password\0scramble\0").unwrap(), Some(&b""[..]));
        assert_eq!(switched(b"\xfecaching_sha2_password\0scramble\0").unwrap(), Some(&b"\0"[..]));
        assert!(switched(b"\xfeauth_socket\0").unwrap_err().to_string().contains("auth_socket"));
        let denied = b"\xff\x15\x04#28000Access denied for user 'x'@'y' (using password: NO)";
        assert_eq!(error(denied), "error 1045: Access denied for user 'x'@'y' (using password: NO)");
    }

    #[test]
    fn what_is_no_packet() {
        assert_eq!(packet(b"\x01\0\0"), Ok(None));
        assert!(packet(b"\0\0\0\0").is_err());
        assert!(packet(b"HTTP/1.1 400 Bad").is_err());
    }
}
