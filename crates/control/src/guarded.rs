//! Connections to control, bounded: in number, for each peer too, in how long a TLS handshake may take, and in how long
//! one may say nothing at its start.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::security::{Open, Peer, Reason, Refusal, Security, Tls, parse_certificate};

/// Pause after `accept` failed (out of descriptors, mostly): without it the loop would spin until one is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Longest TLS handshake; two round trips to the other side of the world take a second.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// After a handshake that failed, what the peer still sends is read for so long and so much, so that the alert that says
/// why reaches it: closing with unread bytes would send a reset that overtakes it.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 64 * 1024;

/// Accepts connections, at most so many at once. At the bound the next ones wait in the kernel's queue.
#[derive(Debug)]
pub(crate) struct Acceptor {
    listener: TcpListener,
    places: Arc<Semaphore>,
    silence_max: Duration,
}

impl Acceptor {
    pub(crate) fn new(listener: TcpListener, connections_max: usize, silence_max: Duration) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(connections_max)), silence_max }
    }

    /// The next connection, in clear text and of anybody.
    pub(crate) async fn accept(&self) -> Guarded {
        let (stream, address, place) = self.next().await;
        let peer = Peer { address, is_encrypted: false, is_crowd: false, known: None };
        Guarded::new(Stream::Clear(stream), peer, self.silence_max, (place, None))
    }

    /// The next connection of a peer that has not too many, before anything was said on it.
    pub(crate) async fn accept_peer(&self, security: &Arc<Security>) -> Accepted {
        loop {
            let (stream, address, place) = self.next().await;
            let Some((open, is_crowd)) = security.connected(address) else { continue };
            return Accepted {
                stream,
                address,
                is_crowd,
                counts: (place, Some(open)),
                security: Arc::clone(security),
                silence_max: self.silence_max,
            };
        }
    }

    async fn next(&self) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
                // Nobody closes the semaphore.
                std::future::pending().await
            };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    // A small answer must not wait for a delayed ack. Where it cannot be set, it is only slower.
                    let _ = stream.set_nodelay(true);
                    return (stream, address, place);
                }
                Err(error) => {
                    tracing::warn!(%error, "control cannot accept a connection; it tries again");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// What a connection is counted in, until it ends.
type Counts = (OwnedSemaphorePermit, Option<Open>);

/// A connection that nothing was said on.
pub(crate) struct Accepted {
    stream: TcpStream,
    address: SocketAddr,
    is_crowd: bool,
    counts: Counts,
    security: Arc<Security>,
    silence_max: Duration,
}

impl Accepted {
    /// With TLS, when its handshake is done; `None`: it failed, and both sides know why.
    pub(crate) async fn secured(self) -> Option<Guarded> {
        let Self { stream, address, is_crowd, counts, security, silence_max } = self;
        let (stream, known, is_encrypted) = match security.tls() {
            None => (Stream::Clear(stream), None, false),
            Some(tls) => match handshake(tls, stream).await {
                Ok(stream) => {
                    let first = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
                    let certificate = first.and_then(|der| parse_certificate(der));
                    let known = certificate.map(|certificate| Arc::new(security.know(certificate)));
                    (Stream::Tls(Box::new(stream)), known, true)
                }
                Err((refusal, stream)) => {
                    security.refuse_peer(address, &refusal);
                    if let Some(stream) = stream {
                        linger(stream).await;
                    }
                    return None;
                }
            },
        };
        let peer = Peer { address, is_encrypted, is_crowd, known };
        Some(Guarded::new(stream, peer, silence_max, counts))
    }
}

/// # Errors
/// Why there is none, and the connection, if it may still hear why.
async fn handshake(
    tls: &Tls,
    stream: TcpStream,
) -> Result<TlsStream<TcpStream>, (Refusal, Option<TcpStream>)> {
    match timeout(HANDSHAKE_MAX, tls.acceptor().accept(stream).into_fallible()).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err((error, stream))) => Err((failed(&error), Some(stream))),
        Err(_) => {
            let message = format!("no TLS handshake within {HANDSHAKE_MAX:?}");
            Err((Refusal::new(Reason::HandshakeTimeout, message), None))
        }
    }
}

fn failed(error: &io::Error) -> Refusal {
    use rustls::CertificateError::{Expired, ExpiredContext};
    use rustls::Error::{InvalidCertificate, NoCertificatesPresented};
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    let reason = match cause {
        Some(InvalidCertificate(Expired | ExpiredContext { .. })) => Reason::CertificateExpired,
        Some(InvalidCertificate(_)) => Reason::Certificate,
        Some(NoCertificatesPresented) => Reason::NoCredentials,
        _ => Reason::Handshake,
    };
    Refusal::new(reason, format!("the TLS handshake failed: {error}"))
}

async fn linger(mut stream: TcpStream) {
    let read = async {
        stream.shutdown().await?;
        let mut buffer = [0; 1024];
        let mut left = LINGER_BYTES_MAX;
        while left > 0 {
            match stream.read(&mut buffer).await? {
                0 => break,
                count => left = left.saturating_sub(count),
            }
        }
        io::Result::Ok(())
    };
    // However it ends, the connection is closed now.
    let _ = timeout(LINGER, read).await;
}

/// One connection. It fails if its peer sends nothing at all for too long.
pub(crate) struct Guarded {
    stream: Stream,
    peer: Peer,
    /// Until the first byte.
    silence: Option<Pin<Box<Sleep>>>,
    _counts: Counts,
}

impl Guarded {
    fn new(stream: Stream, peer: Peer, silence_max: Duration, counts: Counts) -> Self {
        Self { stream, peer, silence: Some(Box::pin(sleep(silence_max))), _counts: counts }
    }
}

enum Stream {
    Clear(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for Guarded {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = match &mut self.stream {
            Stream::Clear(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        };
        if read.is_ready() {
            self.silence = None;
        } else if let Some(silence) = &mut self.silence
            && silence.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Clear(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Clear(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Clear(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Clear(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Clear(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
