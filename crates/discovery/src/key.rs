//! TSIG keys, read from the file that `tsig-keygen` prints.
//!
//! ```text
//! key "trimtab" {
//!         algorithm hmac-sha256;
//!         secret "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=";
//! };
//! ```
//!
//! Owns: that syntax, which is BIND's, and the secret: it is in no message, no log and no `Debug`. Does not own: what is
//! signed with it.

use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use hickory_proto::rr::rdata::tsig::TsigAlgorithm;
use hickory_proto::rr::{Name, TSigner};
use tracing::warn;

/// How far the clocks may be apart (RFC 8945, section 10, recommends 300 s).
pub(crate) const FUDGE_S: u16 = 300;
/// A key file is a few lines; more is another file.
const FILE_BYTES_MAX: usize = 64 * 1024;

const EVERYBODY_READS: u32 = 0o004;

/// A name, an algorithm and a secret that we share with a DNS server (RFC 8945).
#[derive(Clone)]
pub struct TsigKey {
    signer: TSigner,
}

impl fmt::Debug for TsigKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let algorithm = self.signer.algorithm().to_string();
        f.debug_struct("TsigKey")
            .field("name", &self.name())
            .field("algorithm", &algorithm)
            .finish_non_exhaustive()
    }
}

/// As configurations are compared: the secret counts, and is not shown.
impl PartialEq for TsigKey {
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (&self.signer, &other.signer);
        a.signer_name() == b.signer_name() && a.algorithm() == b.algorithm() && a.key() == b.key()
    }
}

/// Why a key file is none. The operator's to mend. No message holds anything that stands where a secret might.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read the key file {}: {source}", file.display())]
    Unreadable {
        /// Which.
        file: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It is too large, or no text.
    #[error(
        "this is no key file: it is larger than 64 KiB or not UTF-8 text; write what `tsig-keygen NAME` prints"
    )]
    NoText,
    /// It is not in the form that `tsig-keygen` prints.
    #[error(
        "line {line} of the key file: {expected} is missing; \
         write it as `tsig-keygen NAME` prints it: key \"NAME\" {{ algorithm hmac-sha256; secret \"…\"; }};"
    )]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// What should stand there.
        expected: &'static str,
    },
    /// The name is no domain name.
    #[error("the key's name is no domain name; `tsig-keygen NAME` takes letters, digits, - and .")]
    Name,
    /// The algorithm is one that is not used any more, or none.
    #[error(
        "the key's algorithm is {found}; hmac-sha256, hmac-sha384 and hmac-sha512 are supported: \
         make a new key with `tsig-keygen -a hmac-sha256 NAME`, here and at the DNS server"
    )]
    Algorithm {
        /// Its name.
        found: String,
    },
    /// The secret is not in base 64, or empty.
    #[error("the key's secret is not in base 64, or empty; copy the whole line that `tsig-keygen` printed")]
    Secret,
    /// There is more than one key.
    #[error("the key file has more than one key; leave the one that the DNS server grants updates to")]
    Several,
}

impl TsigKey {
    /// Reads a key file.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn read(file: &Path) -> Result<Self, KeyError> {
        let bytes =
            std::fs::read(file).map_err(|source| KeyError::Unreadable { file: file.to_owned(), source })?;
        let mode = std::fs::metadata(file).map(|metadata| metadata.permissions().mode());
        if mode.is_ok_and(|mode| mode & EVERYBODY_READS != 0) {
            warn!(file = %file.display(), "everybody on this host can read the key: chmod 600, or 640 with trimtab's group");
        }
        Self::parse(&bytes)
    }

    /// Parses what `tsig-keygen` prints.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, KeyError> {
        if bytes.len() > FILE_BYTES_MAX {
            return Err(KeyError::NoText);
        }
        let text = std::str::from_utf8(bytes).map_err(|_| KeyError::NoText)?;
        let mut tokens = Tokens { rest: text, line: 1 };
        let key = tokens.key()?;
        tokens.end()?;
        Ok(key)
    }

    /// A new key of hmac-sha256.
    ///
    /// # Errors
    /// When the name is none, or the secret is empty.
    pub fn new(name: &str, secret: &[u8]) -> Result<Self, KeyError> {
        let name = Name::from_ascii(name).map_err(|_| KeyError::Name)?;
        Self::of(name, TsigAlgorithm::HmacSha256, secret.to_vec())
    }

    fn of(name: Name, algorithm: TsigAlgorithm, secret: Vec<u8>) -> Result<Self, KeyError> {
        if secret.is_empty() {
            return Err(KeyError::Secret);
        }
        let signer = TSigner::new(secret, algorithm, name, FUDGE_S).map_err(|_| KeyError::Secret)?;
        Ok(Self { signer })
    }

    /// With its secret, as `tsig-keygen` prints it: for a key file, and for nothing else.
    pub fn file_text(&self) -> String {
        let (algorithm, secret) = (self.signer.algorithm(), BASE64.encode(self.signer.key()));
        format!("key \"{}\" {{\n\talgorithm {algorithm};\n\tsecret \"{secret}\";\n}};\n", self.name())
    }

    /// The key's name, without the dot at its end.
    pub fn name(&self) -> String {
        crate::name::shown(self.signer.signer_name())
    }

    /// What signs with it, and verifies.
    pub fn signer(&self) -> &TSigner {
        &self.signer
    }
}

fn algorithm(name: &str) -> Result<TsigAlgorithm, KeyError> {
    match name.to_ascii_lowercase().as_str() {
        "hmac-sha256" => Ok(TsigAlgorithm::HmacSha256),
        "hmac-sha384" => Ok(TsigAlgorithm::HmacSha384),
        "hmac-sha512" => Ok(TsigAlgorithm::HmacSha512),
        other => {
            // What stands there may be a secret that slipped: only what looks like an algorithm is repeated.
            let is_name = other.starts_with("hmac-") && other.len() <= 32;
            let found = if is_name { other.to_owned() } else { "not one of TSIG's".to_owned() };
            Err(KeyError::Algorithm { found })
        }
    }
}

/// Words, texts in quotes, and the signs `{`, `}` and `;`, with comments left out.
struct Tokens<'t> {
    rest: &'t str,
    line: usize,
}

impl<'t> Tokens<'t> {
    /// `key NAME { algorithm NAME; secret TEXT; };` with the two lines in any order.
    fn key(&mut self) -> Result<TsigKey, KeyError> {
        self.expect("key", "`key`")?;
        let name = self.value("the key's name")?;
        self.expect("{", "`{`")?;
        let (mut algorithm_name, mut secret) = (None, None);
        loop {
            match self.next() {
                Some("algorithm") if algorithm_name.is_none() => {
                    algorithm_name = Some(self.value("the algorithm's name")?);
                }
                Some("secret") if secret.is_none() => secret = Some(self.value("the secret")?),
                Some("}") => break,
                _ => return Err(self.missing("`algorithm`, `secret` or `}`")),
            }
            self.expect(";", "`;`")?;
        }
        self.expect(";", "`;` after `}`")?;
        let algorithm = algorithm(algorithm_name.ok_or_else(|| self.missing("`algorithm`"))?)?;
        let secret = secret.ok_or_else(|| self.missing("`secret`"))?;
        let secret = BASE64.decode(secret.as_bytes()).map_err(|_| KeyError::Secret)?;
        let name = Name::from_ascii(name).map_err(|_| KeyError::Name)?;
        TsigKey::of(name, algorithm, secret)
    }

    fn end(&mut self) -> Result<(), KeyError> {
        match self.next() {
            None => Ok(()),
            Some("key") => Err(KeyError::Several),
            Some(_) => Err(self.missing("the end of the file")),
        }
    }

    fn expect(&mut self, token: &str, expected: &'static str) -> Result<(), KeyError> {
        if self.next() == Some(token) { Ok(()) } else { Err(self.missing(expected)) }
    }

    /// A word, or a text in quotes.
    fn value(&mut self, expected: &'static str) -> Result<&'t str, KeyError> {
        match self.next() {
            Some(token) if !matches!(token, "{" | "}" | ";") => {
                let quoted = token.strip_prefix('"').and_then(|token| token.strip_suffix('"'));
                Ok(quoted.unwrap_or(token))
            }
            _ => Err(self.missing(expected)),
        }
    }

    fn missing(&self, expected: &'static str) -> KeyError {
        KeyError::Syntax { line: self.line, expected }
    }

    /// The next token, a text with its quotes. A quote that does not end stands alone, which nothing takes.
    fn next(&mut self) -> Option<&'t str> {
        self.skip_blanks();
        let first = self.rest.chars().next()?;
        let length = match first {
            '{' | '}' | ';' => 1,
            '"' => self.rest[1..].find(['"', '\n']).map_or(1, |end| end + 2),
            _ => {
                self.rest.find(|c: char| c.is_whitespace() || "{};\"".contains(c)).unwrap_or(self.rest.len())
            }
        };
        Some(self.take(length))
    }

    /// Blanks, and comments of the three kinds that BIND knows.
    fn skip_blanks(&mut self) {
        loop {
            let blanks = self.rest.len() - self.rest.trim_start().len();
            self.take(blanks);
            let comment = if self.rest.starts_with('#') || self.rest.starts_with("//") {
                self.rest.find('\n')
            } else if self.rest.starts_with("/*") {
                self.rest.find("*/").map(|end| end + 2)
            } else {
                return;
            };
            self.take(comment.unwrap_or(self.rest.len()));
        }
    }

    fn take(&mut self, length: usize) -> &'t str {
        let (taken, rest) = self.rest.split_at(length);
        self.line += taken.matches('\n').count();
        self.rest = rest;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PRINTED: &str =
        "key \"trimtab\" {\n\talgorithm hmac-sha256;\n\tsecret \"c2VjcmV0LXNlY3JldA==\";\n};\n";

    #[test]
    fn what_tsig_keygen_prints() {
        for algorithm in ["hmac-sha256", "hmac-sha384", "hmac-sha512"] {
            let key = TsigKey::parse(PRINTED.replace("hmac-sha256", algorithm).as_bytes()).unwrap();
            assert_eq!(key.name(), "trimtab");
            assert_eq!(key.signer.key(), b"secret-secret");
            assert_eq!(key.signer.algorithm().to_string(), algorithm);
            assert_eq!(key.file_text(), PRINTED.replace("hmac-sha256", algorithm));
        }
        let new = TsigKey::new("trimtab", b"secret-secret").unwrap();
        assert_eq!(new.file_text(), PRINTED);
        let other = "# made by hand\nkey lb.example.com. { // one\n /* two\n */ secret c2VjcmV0LXNlY3JldA==; algorithm HMAC-SHA512; };";
        let key = TsigKey::parse(other.as_bytes()).unwrap();
        assert_eq!((key.name().as_str(), key.signer.key()), ("lb.example.com", &b"secret-secret"[..]));
    }

    #[test]
    fn its_secret_is_not_shown() {
        let key = TsigKey::parse(PRINTED.as_bytes()).unwrap();
        let shown = format!("{key:?}");
        assert_eq!(shown, "TsigKey { name: \"trimtab\", algorithm: \"hmac-sha256\", .. }");
        // Nor by an error: here the secret stands where other things should.
        for wrong in [
            "key \"trimtab\" { secret hmac-sha256; algorithm c2VjcmV0; };",
            "key { \"c2VjcmV0\" };",
            "key \"trimtab\" { algorithm hmac-sha256; secret \"c2VjcmV0\n\"; };",
            "key \"c2VjcmV0\" { algorithm hmac-md5; };",
        ] {
            let error = TsigKey::parse(wrong.as_bytes()).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("c2VjcmV0"), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let said = |text: &str| TsigKey::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(said("").starts_with("line 1 of the key file: `key` is missing"), "{}", said(""));
        let md5 = said(&PRINTED.replace("hmac-sha256", "hmac-md5"));
        assert!(
            md5.starts_with("the key's algorithm is hmac-md5; ") && md5.contains("tsig-keygen -a"),
            "{md5}"
        );
        assert!(said(&PRINTED.replace("};", "")).contains("`algorithm`, `secret` or `}`"));
        assert!(said(&PRINTED.replace("==\"", "\"")).contains("not in base 64"));
        assert!(said(&PRINTED.replace("c2VjcmV0LXNlY3JldA==", "")).contains("or empty"));
        assert!(said(&PRINTED.repeat(2)).contains("more than one key"));
        assert!(said(&PRINTED.replace("\talgorithm hmac-sha256;\n", "")).starts_with("line 3"));
        assert!(said(&"#".repeat(FILE_BYTES_MAX + 1)).contains("larger than 64 KiB"));
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "(key|algorithm|secret|hmac-sha256|[a-z{};\"/*# \n=])*") {
            drop(TsigKey::parse(text.as_bytes()));
        }
    }
}
