//! Connections to what the agent serves, bounded in number.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;
use tonic::transport::server::Connected;

/// Most connections at once, of each server. A balancer has one, or makes one now and then.
const CONNECTIONS_MAX: usize = 64;
/// Pause after `accept` failed: without it the loop would spin until a descriptor is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections; at the bound the next ones wait in the kernel's queue.
#[derive(Debug)]
pub(super) struct Acceptor {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Acceptor {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(CONNECTIONS_MAX)) }
    }

    /// The next connection.
    pub(super) async fn accept(&self) -> Placed {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
                // Nobody closes the semaphore.
                std::future::pending().await
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    // Where it cannot be set, a small answer is only slower.
                    let _ = stream.set_nodelay(true);
                    return Placed { stream, _place: place };
                }
                Err(error) => {
                    tracing::debug!(%error, "a connection cannot be accepted; trying again");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// A connection that gives its place back when it ends.
#[derive(Debug)]
pub(super) struct Placed {
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
}

impl Connected for Placed {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Placed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Placed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
