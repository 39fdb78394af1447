//! What a client sends before a backend can be selected: a PROXY header, the name it asks for in its TLS hello.
//!
//! ```text
//!                   header read                                     hello read, or no TLS
//!   PROXY header ----------------> first bytes ---------------------------------------------> Done
//!     (where the                    |    ^  |                                           ^
//!      listener has it)  GSSENCRequest   |  SSLRequest: answer S      hello read        |
//!                                   +----+  +-----------------------> TLS hello --------+
//!                                 answer N, once                       (nothing else may come)
//! ```
//!
//! Owns: what is asked of the first bytes, and in which order. Does not own the bytes: they stay in the kernel, and
//! [`Preface::look`] is shown all of them each time; only a header or a request is taken off, in whole, when it says so. So
//! what follows is passed on untouched, and nothing has to be kept for a slow client.
//!
//! PostgreSQL's client asks for TLS in clear text and waits for an answer (`SSLRequest`). The name that selects the backend
//! comes only after that answer, so it is given here; the backend that is selected is then asked the same, and its answer
//! taken off ([`Look::Done`], `tls_asked`).

mod crc32c;
pub mod hello;
pub mod proxy;
mod routes;

pub use routes::{Facts, NameError, Route, Routed, Routes, ServerName};

use hello::{ClientHello, Hello, HelloError};
use proxy::{Accepts, Header, ProxyError};

/// Most bytes that are ever needed at once.
pub const PREFACE_MAX: usize = hello::WIRE_MAX;

/// PostgreSQL's request for TLS (protocol 3.x, "SSL Session Encryption").
pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x2F];
/// PostgreSQL's request for GSSAPI encryption.
pub const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xD2, 0x16, 0x30];
/// "Yes, go on" to either; and "no, I do not have it".
pub const GRANTED: u8 = b'S';
/// See [`GRANTED`].
pub const DENIED: u8 = b'N';

/// How far reading is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress<T> {
    /// It is not whole before so many bytes, counted from the first one, are there; that it is wrong may be told before.
    More(usize),
    /// Read.
    Done(T),
}

/// What a listener needs to see before it selects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wants {
    /// Every connection begins with a PROXY header of this kind.
    pub proxy: Option<Accepts>,
    /// The TLS hello.
    pub hello: bool,
}

impl Wants {
    /// Whether nothing is to be read at all.
    pub const fn nothing(self) -> bool {
        self.proxy.is_none() && !self.hello
    }
}

/// What to do after a look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look<'b> {
    /// Look again when so many bytes are there.
    More(usize),
    /// Take the header's bytes off, keep what it says, look again.
    Proxied(Header<'b>),
    /// Take so many bytes off, send the client this byte, look again.
    Answer {
        /// Bytes to take off.
        take: usize,
        /// [`GRANTED`] or [`DENIED`].
        answer: u8,
    },
    /// Select.
    Done {
        /// `None`: no TLS, or nobody asked.
        hello: Option<ClientHello<'b>>,
        /// The client asked for TLS with [`SSL_REQUEST`] and was told yes: so must the backend.
        tls_asked: bool,
    },
}

/// Why a client is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PrefaceError {
    /// The proxy's fault, or nobody's who may connect here.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// The client's fault.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// Clear text where TLS was agreed on: an accident, or somebody who adds bytes of his own (CVE-2021-23214).
    #[error("clear text after a request for TLS")]
    ClearText,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Proxy(Accepts),
    First {
        gss_denied: bool,
    },
    /// After an `SSLRequest`.
    Tls,
    Done,
}

/// Where the reading of one connection's preface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preface {
    stage: Stage,
    hello: bool,
}

impl Preface {
    /// Nothing was seen yet.
    pub const fn new(wants: Wants) -> Self {
        let stage = match wants.proxy {
            Some(accepts) => Stage::Proxy(accepts),
            None => Self::after_proxy(wants.hello),
        };
        Self { stage, hello: wants.hello }
    }

    const fn after_proxy(hello: bool) -> Stage {
        if hello { Stage::First { gss_denied: false } } else { Stage::Done }
    }

    /// Whether the next look needs no bytes.
    pub fn needs_nothing(&self) -> bool {
        self.stage == Stage::Done
    }

    /// Looks at all the bytes that are there: what was taken off before is not among them. [`PREFACE_MAX`] of them are enough.
    ///
    /// # Errors
    /// Why the client is to be refused.
    pub fn look<'b>(&mut self, bytes: &'b [u8], scratch: &'b mut Vec<u8>) -> Result<Look<'b>, PrefaceError> {
        match self.stage {
            Stage::Proxy(accepts) => Ok(match proxy::read(bytes, accepts)? {
                Progress::More(bytes) => Look::More(bytes),
                Progress::Done(header) => {
                    self.stage = Self::after_proxy(self.hello);
                    Look::Proxied(header)
                }
            }),
            Stage::First { gss_denied } => self.look_first(bytes, scratch, gss_denied),
            Stage::Tls => match hello::read(bytes, scratch)? {
                Progress::More(bytes) => Ok(Look::More(bytes)),
                Progress::Done(Hello::Other) => Err(PrefaceError::ClearText),
                Progress::Done(Hello::Tls(hello)) => {
                    self.stage = Stage::Done;
                    Ok(Look::Done { hello: Some(hello), tls_asked: true })
                }
            },
            Stage::Done => Ok(Look::Done { hello: None, tls_asked: false }),
        }
    }

    fn look_first<'b>(
        &mut self,
        bytes: &'b [u8],
        scratch: &'b mut Vec<u8>,
        gss_denied: bool,
    ) -> Result<Look<'b>, PrefaceError> {
        if let Some(request) = bytes.first_chunk::<8>() {
            if *request == SSL_REQUEST {
                // Whoever asks waits for the answer: more bytes were put in by somebody else, in clear text.
                if bytes.len() > SSL_REQUEST.len() {
                    return Err(PrefaceError::ClearText);
                }
                self.stage = Stage::Tls;
                return Ok(Look::Answer { take: SSL_REQUEST.len(), answer: GRANTED });
            }
            if *request == GSSENC_REQUEST && !gss_denied {
                if bytes.len() > GSSENC_REQUEST.len() {
                    return Err(PrefaceError::ClearText);
                }
                // There is no name in what would follow.
                self.stage = Stage::First { gss_denied: true };
                return Ok(Look::Answer { take: GSSENC_REQUEST.len(), answer: DENIED });
            }
        } else if SSL_REQUEST[..7].starts_with(&bytes[..bytes.len().min(7)]) {
            // So far either request, or nothing.
            let need = if bytes.is_empty() { 1 } else { SSL_REQUEST.len() };
            return Ok(Look::More(need));
        }
        Ok(match hello::read(bytes, scratch)? {
            Progress::More(bytes) => Look::More(bytes),
            Progress::Done(hello) => {
                self.stage = Stage::Done;
                let hello = match hello {
                    Hello::Other => None,
                    Hello::Tls(hello) => Some(hello),
                };
                Look::Done { hello, tls_asked: false }
            }
        })
    }
}

#[cfg(test)]
mod tests;
