//! A connection with what has come and is not yet understood, bounded.

use std::io;
use std::net::IpAddr;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};

use crate::Failure;
use crate::tls::Tls;

/// Most bytes that one dialogue takes of a server.
pub const TAKEN_BYTES_MAX: usize = 64 * 1024;

/// Both directions of something.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// What a codec makes of the bytes that have come: `None`, more are needed; else a value and how many bytes it took. An error
/// says why they can be no such thing.
pub(crate) type Parsed<T> = Result<Option<(T, usize)>, String>;

/// See the module.
pub(crate) struct Wire {
    /// `None` only while TLS is put on it.
    io: Option<Box<dyn Duplex>>,
    unread: Vec<u8>,
    /// Bytes taken in all.
    taken: usize,
    /// Said before leaving: set once the two are in step, as the protocol has it.
    last_words: Vec<u8>,
}

impl Wire {
    pub(crate) fn new(io: impl Duplex + 'static) -> Self {
        Self { io: Some(Box::new(io)), unread: Vec::new(), taken: 0, last_words: Vec::new() }
    }

    /// Puts TLS on it. What came in clear before must have been read: it would be believed to have come within (the injection of
    /// CVE-2021-23222; into servers, CVE-2011-0411).
    pub(crate) async fn secure(&mut self, tls: &Tls, target: IpAddr, h2: bool) -> Result<(), Failure> {
        if !self.unread.is_empty() {
            return Err(Failure::Answer("it said something in clear before TLS began".to_owned()));
        }
        let io = self.io.take().ok_or(Failure::HungUp)?;
        let secured = tls.connect(io, target, h2).await.map_err(Failure::Tls)?;
        self.io = Some(Box::new(secured));
        Ok(())
    }

    pub(crate) async fn say(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let io = self.io.as_mut().ok_or(Failure::HungUp)?;
        io.write_all(bytes).await.map_err(Failure::Broken)?;
        io.flush().await.map_err(Failure::Broken)
    }

    /// Waits for what `parse` understands. `what` is the name of the protocol, for people.
    pub(crate) async fn hear<T>(
        &mut self,
        what: &'static str,
        mut parse: impl FnMut(&[u8]) -> Parsed<T>,
    ) -> Result<T, Failure> {
        loop {
            match parse(&self.unread) {
                Ok(Some((value, used))) => {
                    self.unread.drain(..used);
                    return Ok(value);
                }
                Ok(None) => self.take().await?,
                Err(why) => return Err(Failure::Protocol(what, why)),
            }
        }
    }

    /// At least one more byte.
    async fn take(&mut self) -> Result<(), Failure> {
        let io = self.io.as_mut().ok_or(Failure::HungUp)?;
        if self.taken >= TAKEN_BYTES_MAX {
            return Err(Failure::TooLong);
        }
        let mut piece = [0; 4096];
        let room = piece.len().min(TAKEN_BYTES_MAX - self.taken);
        let length = io.read(&mut piece[..room]).await.map_err(Failure::Broken)?;
        if length == 0 {
            return Err(Failure::HungUp);
        }
        self.taken += length;
        self.unread.extend_from_slice(&piece[..length]);
        Ok(())
    }

    /// Says this before leaving, from now on.
    pub(crate) fn part_with(&mut self, last_words: &[u8]) {
        self.last_words = last_words.to_vec();
    }

    /// Says the last words, ends our direction, and takes what still comes until the other side ends its own: bytes that are left
    /// unread would make the kernel send a reset. The caller bounds the time.
    pub(crate) async fn leave(mut self) {
        let Some(mut io) = self.io.take() else { return };
        // Whoever is gone already needs no goodbye.
        if !self.last_words.is_empty() && io.write_all(&self.last_words).await.is_err() {
            return;
        }
        if io.shutdown().await.is_err() {
            return;
        }
        let mut piece = [0; 4096];
        while self.taken < TAKEN_BYTES_MAX {
            match io.read(&mut piece).await {
                Ok(0) | Err(_) => return,
                Ok(length) => self.taken += length,
            }
        }
    }

    /// For those who bring their own way of talking.
    pub(crate) fn into_bounded(self) -> Option<Bounded> {
        Some(Bounded { io: self.io?, left: TAKEN_BYTES_MAX.saturating_sub(self.taken) })
    }
}

/// A stream of which no more than [`TAKEN_BYTES_MAX`] bytes are taken.
pub(crate) struct Bounded {
    io: Box<dyn Duplex>,
    left: usize,
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        let this = &mut *self;
        if this.left == 0 {
            return std::task::Poll::Ready(Err(io::Error::other(Failure::TooLong)));
        }
        let mut scratch = [0; 4096];
        let room = scratch.len().min(this.left).min(buffer.remaining());
        let mut piece = ReadBuf::new(&mut scratch[..room]);
        let polled = std::pin::Pin::new(&mut this.io).poll_read(context, &mut piece);
        buffer.put_slice(piece.filled());
        this.left -= piece.filled().len();
        polled
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.io).poll_shutdown(context)
    }
}
