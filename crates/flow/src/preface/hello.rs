//! The ClientHello of a TLS connection, read without ending TLS: which name the client asks for, which protocols it offers.
//!
//! Owns: putting a message together from records, and finding two extensions in it (RFC 8446 §4.1.2, §5.1; RFC 6066 §3; RFC
//! 7301 §3.1). Does not own: what TLS it is. With Encrypted ClientHello the name is that of the outer hello, which is the
//! name that routing is meant to see.
//!
//! Invariant: what is said of some bytes is said of any more that follow them. The bytes themselves are passed on as they came.

use super::Progress;

/// Most bytes of a ClientHello. Those in use, post-quantum key shares included, have 0.5 to 4 KiB; a record can carry 16 KiB.
pub const MESSAGE_MAX: usize = 16_384;
/// Most bytes that it may take with the headers of its records.
pub const WIRE_MAX: usize = 2 * MESSAGE_MAX;

const RECORD_HEADER: usize = 5;
const RECORD_MAX: usize = 16_384;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
const HOST_NAME: u8 = 0;

/// What a connection begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hello<'a> {
    /// Something else than TLS.
    Other,
    /// TLS.
    Tls(ClientHello<'a>),
}

/// What routing needs of a ClientHello.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientHello<'a> {
    /// The name the client asks for, as it wrote it, without a dot at its end: 1 to 255 bytes of ASCII.
    pub server_name: Option<&'a str>,
    /// The protocols it offers, checked, as they came.
    alpn: &'a [u8],
}

impl<'a> ClientHello<'a> {
    /// The protocols it offers, in its order.
    pub fn protocols(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut rest = self.alpn;
        std::iter::from_fn(move || {
            let (&length, after) = rest.split_first()?;
            let (name, after) = after.split_at_checked(usize::from(length))?;
            rest = after;
            Some(name)
        })
    }
}

/// Why TLS cannot be read. The client's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum HelloError {
    /// A record that is no handshake, has another version than 3.x, or is empty or too long.
    #[error("a record is not as TLS has them")]
    BadRecord,
    /// Another handshake message comes first.
    #[error("the first message is not a ClientHello")]
    NotHello,
    /// Longer than [`MESSAGE_MAX`], or in too many records.
    #[error("the ClientHello is longer than {MESSAGE_MAX} bytes, or {WIRE_MAX} with its records")]
    TooLong,
    /// A length in it does not fit.
    #[error("the ClientHello's lengths do not fit together")]
    BadLength,
    /// The server name is empty, given twice, or not ASCII.
    #[error("the server name is not one")]
    BadServerName,
    /// The list of protocols is empty or given twice, or has an empty name.
    #[error("the list of protocols is not one")]
    BadAlpn,
}

/// Reads the first bytes of a connection. `scratch` is used where the hello is in more than one record.
///
/// # Errors
/// What is wrong with it, as soon as it can be told.
pub fn read<'b>(wire: &'b [u8], scratch: &'b mut Vec<u8>) -> Result<Progress<Hello<'b>>, HelloError> {
    match wire {
        [] => return Ok(Progress::More(1)),
        [first, ..] if *first != HANDSHAKE => return Ok(Progress::Done(Hello::Other)),
        [_] => return Ok(Progress::More(2)),
        [_, major, ..] if *major != 3 => return Ok(Progress::Done(Hello::Other)),
        _ => {}
    }
    match message(wire, scratch)? {
        Progress::More(bytes) => Ok(Progress::More(bytes)),
        Progress::Done(message) => parse(&message[4..]).map(|hello| Progress::Done(Hello::Tls(hello))),
    }
}

/// The ClientHello with its four bytes of type and length, put together from its records.
fn message<'b>(wire: &'b [u8], scratch: &'b mut Vec<u8>) -> Result<Progress<&'b [u8]>, HelloError> {
    scratch.clear();
    let mut at = 0;
    loop {
        let have = scratch.len();
        // Of the message as far as its length is known; of its own header at first.
        let left = |total: Option<usize>| total.unwrap_or(4).saturating_sub(have);
        let header = &wire[at.min(wire.len())..];
        check_record_header(header)?;
        let Some(&[_, _, _, high, low]) = header.first_chunk::<RECORD_HEADER>() else {
            return within_bound(at + RECORD_HEADER + left(total(scratch)?));
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        let fragment = &header[RECORD_HEADER..];
        let fragment = &fragment[..fragment.len().min(length)];
        // In one record, as nearly always: nothing is copied.
        if at == 0
            && let Some(whole) = total(fragment)?.and_then(|total| fragment.get(..total))
        {
            return Ok(Progress::Done(whole));
        }
        scratch.extend_from_slice(fragment);
        let total = total(scratch)?;
        let left = left(total);
        // What this record does not have is in at least one more.
        let further = if left > length { RECORD_HEADER } else { 0 };
        let need = within_bound(at + RECORD_HEADER + left + further)?;
        match total {
            Some(total) if left <= fragment.len() => return Ok(Progress::Done(&scratch[..total])),
            _ if fragment.len() < length => return Ok(need),
            _ => at += RECORD_HEADER + length,
        }
    }
}

/// That so many bytes are needed, if they may be.
fn within_bound<T>(bytes: usize) -> Result<Progress<T>, HelloError> {
    if bytes > WIRE_MAX { Err(HelloError::TooLong) } else { Ok(Progress::More(bytes)) }
}

/// As much of a record's header as is there.
fn check_record_header(header: &[u8]) -> Result<(), HelloError> {
    let bad = match *header {
        [] => false,
        [kind] => kind != HANDSHAKE,
        [kind, major] | [kind, major, _] | [kind, major, _, _] => kind != HANDSHAKE || major != 3,
        [kind, major, _, high, low, ..] => {
            let length = usize::from(u16::from_be_bytes([high, low]));
            kind != HANDSHAKE || major != 3 || length == 0 || length > RECORD_MAX
        }
    };
    if bad { Err(HelloError::BadRecord) } else { Ok(()) }
}

/// The message's bytes in all, once its header is there.
fn total(message: &[u8]) -> Result<Option<usize>, HelloError> {
    match *message {
        [kind, ..] if kind != CLIENT_HELLO => Err(HelloError::NotHello),
        [_, high, middle, low, ..] => {
            let total = 4 + u32::from_be_bytes([0, high, middle, low]) as usize;
            if total > MESSAGE_MAX { Err(HelloError::TooLong) } else { Ok(Some(total)) }
        }
        _ => Ok(None),
    }
}

/// A ClientHello's body.
fn parse(body: &[u8]) -> Result<ClientHello<'_>, HelloError> {
    let mut rest = body;
    take(&mut rest, 2 + 32)?; // legacy_version, random
    let session_id = take_vector::<1>(&mut rest)?;
    let cipher_suites = take_vector::<2>(&mut rest)?;
    let compressions = take_vector::<1>(&mut rest)?;
    let odd = cipher_suites.len() % 2 == 1;
    if session_id.len() > 32 || cipher_suites.is_empty() || odd || compressions.is_empty() {
        return Err(HelloError::BadLength);
    }
    let mut hello = ClientHello::default();
    // Before TLS 1.3 a hello may end here.
    if rest.is_empty() {
        return Ok(hello);
    }
    let mut extensions = take_vector::<2>(&mut rest)?;
    if !rest.is_empty() {
        return Err(HelloError::BadLength);
    }
    while !extensions.is_empty() {
        let kind = take(&mut extensions, 2)?;
        let value = take_vector::<2>(&mut extensions)?;
        // Others, reserved ones (GREASE, RFC 8701) among them, do not matter here. One that comes twice does: the server
        // could take the other one.
        match u16::from_be_bytes([kind[0], kind[1]]) {
            SERVER_NAME if hello.server_name.is_some() => return Err(HelloError::BadServerName),
            SERVER_NAME => hello.server_name = Some(server_name(value)?),
            ALPN if !hello.alpn.is_empty() => return Err(HelloError::BadAlpn),
            ALPN => hello.alpn = protocols(value)?,
            _ => {}
        }
    }
    Ok(hello)
}

fn server_name(mut value: &[u8]) -> Result<&str, HelloError> {
    let mut list = take_vector::<2>(&mut value)?;
    let kind = take(&mut list, 1)?;
    let name = take_vector::<2>(&mut list)?;
    // RFC 6066: one name of each type, and there is one type.
    if kind[0] != HOST_NAME || !list.is_empty() || !value.is_empty() {
        return Err(HelloError::BadServerName);
    }
    let text = str::from_utf8(name).ok().filter(|text| text.is_ascii() && !text.contains('\0'));
    let text = text.map(|text| text.strip_suffix('.').unwrap_or(text));
    text.filter(|text| (1..=255).contains(&text.len())).ok_or(HelloError::BadServerName)
}

fn protocols(mut value: &[u8]) -> Result<&[u8], HelloError> {
    let list = take_vector::<2>(&mut value)?;
    if list.is_empty() || !value.is_empty() {
        return Err(HelloError::BadAlpn);
    }
    let mut rest = list;
    while !rest.is_empty() {
        if take_vector::<1>(&mut rest)?.is_empty() {
            return Err(HelloError::BadAlpn);
        }
    }
    Ok(list)
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], HelloError> {
    let (taken, left) = rest.split_at_checked(count).ok_or(HelloError::BadLength)?;
    *rest = left;
    Ok(taken)
}

/// A vector whose length is in its first `N` bytes.
fn take_vector<'a, const N: usize>(rest: &mut &'a [u8]) -> Result<&'a [u8], HelloError> {
    let length = take(rest, N)?.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
    take(rest, length)
}
