//! Texts of the configuration that stand for bytes, and bytes of servers that become texts.

use crate::ANSWER_CHARS_MAX;

/// Why a text stands for no bytes: the operator's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no escape {0:?}: write \\r, \\n, \\t, \\0, \\\\ or \\xNN")]
pub struct EscapeError(
    /// What was written.
    pub String,
);

/// The bytes that a text stands for: its UTF-8, with `\r`, `\n`, `\t`, `\0`, `\\` and `\xNN` (two hexadecimal digits, any byte).
///
/// # Errors
/// When a backslash is followed by something else.
pub fn unescape(text: &str) -> Result<Vec<u8>, EscapeError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        bytes.extend_from_slice(before.as_bytes());
        let (byte, used) = escape(after).ok_or_else(|| {
            let shown: String = after.chars().take(3).collect();
            EscapeError(format!("\\{shown}"))
        })?;
        bytes.push(byte);
        rest = &after[used..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    Ok(bytes)
}

/// The byte of what follows a backslash, and how much of it that is.
fn escape(after: &str) -> Option<(u8, usize)> {
    Some(match after.as_bytes().first()? {
        b'r' => (b'\r', 1),
        b'n' => (b'\n', 1),
        b't' => (b'\t', 1),
        b'0' => (0, 1),
        b'\\' => (b'\\', 1),
        b'x' => {
            let digits = after.get(1..3).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
            (u8::from_str_radix(digits, 16).ok()?, 3)
        }
        _ => return None,
    })
}

/// What a server said, as one line for people: a peer's own bytes never reach a terminal or a log as they are.
pub(crate) fn printable(text: &str) -> String {
    let line = text.trim_end().chars().map(|c| if c.is_control() { ' ' } else { c });
    line.take(ANSWER_CHARS_MAX).collect()
}

/// The same of bytes.
pub(crate) fn shown(bytes: &[u8]) -> String {
    let most = bytes.len().min(ANSWER_CHARS_MAX * 4);
    printable(&String::from_utf8_lossy(&bytes[..most]))
}

/// Where `needle` is.
pub(crate) fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Up to LF, which is taken too, as is a CR before it; `None`: it is not there yet.
pub(crate) fn line(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let line = &bytes[..end];
    Some((line.strip_suffix(b"\r").unwrap_or(line), end + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_stand_for_bytes() {
        assert_eq!(unescape("PING\\r\\n").unwrap(), b"PING\r\n");
        assert_eq!(unescape("\\x00\\xfF\\\\x\\t\\0é").unwrap(), b"\x00\xff\\x\t\0\xc3\xa9");
        for wrong in ["\\", "\\q", "\\x1", "\\x1g", "a\\x", "\\xé"] {
            assert!(unescape(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_a_server_says_is_one_line() {
        assert_eq!(printable("a\x1b[31m\r\nb\r\n"), "a [31m  b");
        assert_eq!(printable(&"x".repeat(500)).len(), ANSWER_CHARS_MAX);
        assert_eq!(shown(b"\xff\x00ok"), "\u{fffd} ok");
        assert_eq!(line(b"one\r\ntwo"), Some((&b"one"[..], 5)));
        assert_eq!(line(b"one"), None);
    }
}
