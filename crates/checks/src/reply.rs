//! Replies of SMTP (RFC 5321 §4.2) and FTP (RFC 959 §4.2): three digits and a text, over one line or several.

use crate::text::{line, shown};
use crate::wire::{Parsed, Wire};
use crate::{Failure, text};

/// The same in both.
const QUIT: &[u8] = b"QUIT\r\n";

/// One reply, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) code: u16,
    /// Of its first line.
    pub(crate) text: String,
    /// Of its other lines, whole.
    pub(crate) further: Vec<String>,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Parsed<Self> {
        let Some((first, mut used)) = line(bytes) else {
            // Who says nothing like it need not be listened to until a line ends.
            let digits = bytes.iter().take(3).all(u8::is_ascii_digit);
            return if digits { Ok(None) } else { Err(shown(bytes)) };
        };
        let wrong = || shown(first);
        let code = first.get(..3).filter(|code| code.iter().all(u8::is_ascii_digit)).ok_or_else(wrong)?;
        let number = code.iter().fold(0, |number, digit| number * 10 + u16::from(digit - b'0'));
        let text = shown(first.get(4..).unwrap_or_default());
        let mut further = Vec::new();
        match first.get(3) {
            None | Some(b' ') => {}
            // Lines between may be anything in FTP; in SMTP each has the code and a hyphen.
            Some(b'-') => loop {
                let Some((next, length)) = line(&bytes[used..]) else { return Ok(None) };
                used += length;
                further.push(shown(next));
                if next.starts_with(code) && matches!(next.get(3), None | Some(b' ')) {
                    break;
                }
            },
            Some(_) => return Err(wrong()),
        }
        Ok(Some((Self { code: number, text, further }, used)))
    }
}

/// The next reply, which must have this code.
pub(crate) async fn expect(wire: &mut Wire, what: &'static str, code: u16) -> Result<Reply, Failure> {
    let reply = wire.hear(what, Reply::parse).await?;
    // Also to one that says it is not well (RFC 5321 §3.1).
    wire.part_with(QUIT);
    if reply.code == code {
        return Ok(reply);
    }
    Err(Failure::Answer(text::printable(&format!("it says {} {}, not {code}", reply.code, reply.text))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(code: u16, text: &str, further: &[&str]) -> Reply {
        Reply {
            code,
            text: text.to_owned(),
            further: further.iter().map(|line| (*line).to_owned()).collect(),
        }
    }

    #[test]
    fn replies_of_the_specifications() {
        // RFC 5321 §4.2, RFC 959 §4.2.
        let smtp = b"250-foo.com greets bar.com\r\n250-8BITMIME\r\n250 HELP\r\nmore";
        let greets = reply(250, "foo.com greets bar.com", &["250-8BITMIME", "250 HELP"]);
        assert_eq!(Reply::parse(smtp), Ok(Some((greets, smtp.len() - 4))));
        let ftp =
            b"123-First line\r\nSecond line\r\n  234 A line beginning with numbers\r\n123 The last line\r\n";
        let lines = ["Second line", "  234 A line beginning with numbers", "123 The last line"];
        assert_eq!(Reply::parse(ftp), Ok(Some((reply(123, "First line", &lines), ftp.len()))));
        assert_eq!(Reply::parse(b"220\r\n"), Ok(Some((reply(220, "", &[]), 5))));
        for length in 0..ftp.len() {
            assert_eq!(Reply::parse(&ftp[..length]), Ok(None), "{length}");
        }
    }

    #[test]
    fn what_is_no_reply() {
        for wrong in ["SSH-2.0-OpenSSH\r\n", "22x\r\n", "220!\r\n", "hello", "\r\n"] {
            assert!(Reply::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
