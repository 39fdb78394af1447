//! The clients' part of an order.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use super::backend::fin;
use super::order::{
    Fault, Manner, Order, Pace, receive, receive_end, receive_until_reset, reset_when_closed, send, told,
};

/// How a client goes about an order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Behaviour {
    /// How it reads.
    pub(super) pace: Pace,
    /// Between rounds.
    pub(super) pause: Duration,
    /// Of [`Manner::ClientResets`]: after so many bytes each way.
    pub(super) reset_after: (u64, u64),
    /// Longest that all of it may take.
    pub(super) patience: Duration,
}

impl Behaviour {
    /// As fast as it goes.
    pub(super) const PLAIN: Self = Self {
        pace: Pace::FREE,
        pause: Duration::ZERO,
        reset_after: (0, 0),
        patience: Duration::from_secs(60),
    };
}

/// Connects and does its part; gives how many bytes went through, both ways.
pub(super) async fn run(target: SocketAddr, order: &Order, behaviour: &Behaviour) -> Result<u64, Fault> {
    let all = async {
        let stream = connect(target).await?;
        perform(stream, order, behaviour).await
    };
    timeout(behaviour.patience, all).await.unwrap_or(Err(Fault::TooLong))
}

/// Connects, without waiting for ACKs before small messages.
pub(super) async fn connect(target: SocketAddr) -> Result<TcpStream, Fault> {
    let stream = TcpStream::connect(target).await.map_err(Fault::Connect)?;
    stream.set_nodelay(true).map_err(Fault::Connect)?;
    Ok(stream)
}

/// As [`connect`], with kernel buffers as small as they get: what is in them is no memory of the proxy's.
pub(super) async fn connect_small(target: SocketAddr) -> Result<TcpStream, Fault> {
    let connecting = async {
        let socket = if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_recv_buffer_size(SMALL_BYTES)?;
        socket.set_send_buffer_size(SMALL_BYTES)?;
        socket.connect(target).await
    };
    connecting.await.map_err(Fault::Connect)
}

/// The kernel doubles it for its own accounts.
pub(super) const SMALL_BYTES: u32 = 4 * 1024;

/// Does the client's part on a new connection.
pub(super) async fn perform(stream: TcpStream, order: &Order, behaviour: &Behaviour) -> Result<u64, Fault> {
    begin(&stream, order).await?;
    let (up, down) = (order.up_seed(), order.down_seed());
    let bytes = u64::from(order.rounds.max(1)) * (order.up + order.down);
    let receive_all = async {
        receive(&stream, down, 0..order.down, behaviour.pace).await?;
        receive_end(&stream, down, order.down).await
    };
    let send_all = async {
        send(&stream, up, 0..order.up).await?;
        fin(&stream, order.up)
    };
    match order.manner {
        Manner::Exchange => {
            for round in 0..u64::from(order.rounds) {
                send(&stream, up, round * order.up..(round + 1) * order.up).await?;
                receive(&stream, down, round * order.down..(round + 1) * order.down, behaviour.pace).await?;
                sleep(behaviour.pause).await;
            }
            fin(&stream, order.up)?;
            receive_end(&stream, down, u64::from(order.rounds) * order.down).await?;
        }
        Manner::Both => {
            tokio::try_join!(send_all, receive_all)?;
        }
        Manner::AnswerAfterFin => {
            send_all.await?;
            receive_all.await?;
        }
        Manner::FinFirst => {
            receive_all.await?;
            send_all.await?;
        }
        Manner::BackendResets => {
            // The reset may find it sending.
            let sending = send(&stream, up, 0..order.up);
            let (received, sent) =
                tokio::join!(receive_until_reset(&stream, down, 0, behaviour.pace), sending);
            told(received, &sent)?;
        }
        Manner::ClientResets => {
            let (sent, received) = behaviour.reset_after;
            tokio::try_join!(
                send(&stream, up, 0..sent.min(order.up)),
                receive(&stream, down, 0..received.min(order.down), behaviour.pace)
            )?;
            reset_when_closed(&stream);
        }
        Manner::Hold => {
            receive(&stream, down, 0..order.down, behaviour.pace).await?;
        }
    }
    Ok(bytes)
}

/// Says what will happen.
pub(super) async fn begin(stream: &TcpStream, order: &Order) -> Result<(), Fault> {
    let bytes = order.encode();
    let mut sent = 0;
    while sent < bytes.len() {
        let writable = stream.writable().await;
        match writable.and_then(|()| stream.try_write(&bytes[sent..])) {
            Ok(more) => sent += more,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Fault::Broke { at: 0, error }),
        }
    }
    Ok(())
}
