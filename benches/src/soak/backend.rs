//! Backends that do what their clients order, and have moods: they refuse, crash, reset, vanish and come back.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use super::client::SMALL_BYTES;
use super::order::{
    Fault, Manner, Order, broken, receive, receive_end, receive_until_reset, reset, send, told,
};
use super::udp_flows;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 8_192;
/// Faults that are kept to be shown.
const FAULTS_MAX: usize = 20;

/// What a backend is up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mood {
    /// It serves.
    Serve,
    /// Nobody listens; what is open goes on.
    Refuse,
    /// Nobody listens, and all that was open is reset.
    Crash,
    /// Each new connection is reset before a byte.
    Reset,
    /// What is sent to it to begin a connection is lost.
    Vanish,
}

impl Mood {
    /// The bad ones.
    pub(super) const BAD: [Self; 4] = [Self::Refuse, Self::Crash, Self::Reset, Self::Vanish];
}

/// One backend, on the runtime it was started on. It echoes UDP at the same address, whatever its mood.
pub(super) struct Backend {
    address: SocketAddr,
    mood: watch::Sender<Mood>,
}

/// What clients and backends know of each other's connections, without asking over them.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    /// Connections whose order came, by id.
    served: HashSet<u64>,
    /// Connections that a mood ended.
    killed: HashSet<u64>,
    /// When a backend was last in a bad mood.
    disturbed_until: Option<Instant>,
    disturbed: bool,
    tally: Tally,
}

/// How connections went.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    /// By what they were: well, and excused by a backend's mood.
    pub(super) ended: HashMap<&'static str, (u64, u64)>,
    /// With a wrong, lost or additional byte.
    pub(super) corrupt: u64,
    /// With any other fault that nothing excuses.
    pub(super) failed: u64,
    /// The first of them.
    pub(super) faults: Vec<String>,
    /// Bytes that clients sent and received in connections that went well.
    pub(super) bytes: u64,
}

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says whether some backend is in a bad mood from now on.
    pub(super) fn disturb(&self, disturbed: bool) {
        let mut entries = self.entries();
        entries.disturbed = disturbed;
        entries.disturbed_until = Some(Instant::now());
    }

    /// How everything went so far.
    pub(super) fn tally(&self) -> Tally {
        self.entries().tally.clone()
    }

    /// A client's connection is over.
    pub(super) fn ended(
        &self,
        what: &'static str,
        order: &Order,
        began: Instant,
        outcome: Result<u64, Fault>,
    ) {
        let mut entries = self.entries();
        let served = entries.served.remove(&order.id);
        let killed = entries.killed.remove(&order.id);
        // A connection that no backend knows of may have been in the queue of one that is in a bad mood.
        let disturbed = entries.disturbed || entries.disturbed_until.is_some_and(|until| until >= began);
        let excused = killed || (!served && disturbed);
        let Entries { tally, .. } = &mut *entries;
        match outcome {
            Ok(bytes) => {
                tally.ended.entry(what).or_default().0 += 1;
                tally.bytes += bytes;
            }
            Err(fault) if excused && !fault.is_corruption() => tally.ended.entry(what).or_default().1 += 1,
            Err(fault) => tally.fault(what, order, &fault),
        }
    }

    /// A backend found a fault.
    fn found(&self, order: &Order, fault: &Fault) {
        self.entries().tally.fault("backend", order, fault);
    }
}

impl Tally {
    fn fault(&mut self, what: &str, order: &Order, fault: &Fault) {
        *(if fault.is_corruption() { &mut self.corrupt } else { &mut self.failed }) += 1;
        self.show(format!("{what}: {fault} ({order:?})"));
    }

    fn no_order(&mut self, bytes: &[u8]) {
        self.corrupt += 1;
        self.show(format!("a client's first bytes came changed: {bytes:?}"));
    }

    fn show(&mut self, fault: String) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(fault);
        }
    }
}

impl Backend {
    /// Starts one at an address of its own.
    pub(super) fn start(address: SocketAddr, ledger: Arc<Ledger>) -> Self {
        Self::start_with(Place { address, buffer_bytes: None }, ledger)
    }

    /// Starts one whose connections have kernel buffers as small as they get.
    pub(super) fn start_small(address: SocketAddr, ledger: Arc<Ledger>) -> Self {
        Self::start_with(Place { address, buffer_bytes: Some(SMALL_BYTES) }, ledger)
    }

    fn start_with(place: Place, ledger: Arc<Ledger>) -> Self {
        let (mood, moods) = watch::channel(Mood::Serve);
        // Before anybody can know of it.
        let listener = place.listen(BACKLOG);
        udp_flows::echo(place.address);
        tokio::spawn(live(place, listener, moods, ledger));
        Self { address: place.address, mood }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn set(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }
}

/// Where a backend listens, and how.
#[derive(Debug, Clone, Copy)]
struct Place {
    address: SocketAddr,
    /// Of its connections' kernel buffers.
    buffer_bytes: Option<u32>,
}

impl Place {
    /// Listens.
    ///
    /// # Panics
    /// When it cannot: the address is one that nobody else uses.
    fn listen(self, backlog: u32) -> TcpListener {
        let Self { address, buffer_bytes } = self;
        let listen = || {
            let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            socket.set_reuseaddr(true)?;
            if let Some(bytes) = buffer_bytes {
                socket.set_recv_buffer_size(bytes)?;
                socket.set_send_buffer_size(bytes)?;
            }
            socket.bind(address)?;
            socket.listen(backlog)
        };
        listen().unwrap_or_else(|error: io::Error| panic!("a backend at {address}: {error}"))
    }
}

/// Until nobody holds the backend any more.
async fn live(place: Place, first: TcpListener, mut moods: watch::Receiver<Mood>, ledger: Arc<Ledger>) {
    let mut listener = Some(first);
    loop {
        let mood = *moods.borrow_and_update();
        let changed = match mood {
            Mood::Serve | Mood::Reset => {
                let listener = listener.take().unwrap_or_else(|| place.listen(BACKLOG));
                accept(&listener, mood, &mut moods, &ledger).await
            }
            Mood::Refuse | Mood::Crash => moods.changed().await.is_ok(),
            Mood::Vanish => vanish(place, &mut moods).await,
        };
        if !changed {
            return;
        }
    }
}

/// Accepts for as long as it is in this mood; `false`: the soak is over.
async fn accept(
    listener: &TcpListener,
    mood: Mood,
    moods: &mut watch::Receiver<Mood>,
    ledger: &Arc<Ledger>,
) -> bool {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if mood == Mood::Reset => reset(stream),
                Ok((stream, _)) => {
                    tokio::spawn(attend(stream, moods.clone(), Arc::clone(ledger)));
                }
                // Reset while it waited.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => panic!("a backend cannot accept: {error}"),
            },
            changed = moods.changed() => return changed.is_ok(),
        }
    }
}

/// Its queue of connections to accept has one place, and that is taken: the kernel drops every SYN.
async fn vanish(place: Place, moods: &mut watch::Receiver<Mood>) -> bool {
    let Place { address, .. } = place;
    let _listener = place.listen(0);
    let _parked = TcpStream::connect(address).await;
    moods.changed().await.is_ok()
}

/// Serves a connection, or resets it when the backend crashes.
async fn attend(mut stream: TcpStream, mut moods: watch::Receiver<Mood>, ledger: Arc<Ledger>) {
    // Small answers must not wait for the other side's ACK.
    let _ = stream.set_nodelay(true);
    let order = tokio::select! {
        order = read_order(&mut stream, &ledger) => order,
        () = crashed(&mut moods) => return reset(stream),
    };
    let Some(order) = order else { return };
    ledger.entries().served.insert(order.id);
    tokio::select! {
        outcome = serve(&stream, &order) => match outcome {
            Ok(()) if order.manner == Manner::BackendResets => reset(stream),
            Ok(()) => {}
            Err(fault) => ledger.found(&order, &fault),
        },
        () = crashed(&mut moods) => {
            ledger.entries().killed.insert(order.id);
            reset(stream);
        }
    }
}

async fn crashed(moods: &mut watch::Receiver<Mood>) {
    // When nobody holds the backend any more, nothing changes; what is open ends by itself.
    if moods.wait_for(|mood| *mood == Mood::Crash).await.is_err() {
        std::future::pending().await
    }
}

/// `None`: the client said nothing, or was gone before it had said all.
async fn read_order(stream: &mut TcpStream, ledger: &Ledger) -> Option<Order> {
    let mut bytes = [0; Order::BYTES];
    stream.read_exact(&mut bytes).await.ok()?;
    let order = Order::decode(&bytes);
    if order.is_none() {
        ledger.entries().tally.no_order(&bytes);
    }
    order
}

/// The backend's part of an order.
async fn serve(stream: &TcpStream, order: &Order) -> Result<(), Fault> {
    let (up, down) = (order.up_seed(), order.down_seed());
    let receive_all = receive(stream, up, 0..order.up, order.pace);
    match order.manner {
        Manner::Exchange => {
            for round in 0..u64::from(order.rounds) {
                receive(stream, up, round * order.up..(round + 1) * order.up, order.pace).await?;
                send(stream, down, round * order.down..(round + 1) * order.down).await?;
            }
            receive_end(stream, up, u64::from(order.rounds) * order.up).await
        }
        Manner::Both => {
            let sending = async {
                send(stream, down, 0..order.down).await?;
                fin(stream, order.down)
            };
            let receiving = async {
                receive_all.await?;
                receive_end(stream, up, order.up).await
            };
            tokio::try_join!(sending, receiving).map(|_| ())
        }
        Manner::AnswerAfterFin => {
            receive_all.await?;
            receive_end(stream, up, order.up).await?;
            send(stream, down, 0..order.down).await
        }
        Manner::FinFirst => {
            send(stream, down, 0..order.down).await?;
            fin(stream, order.down)?;
            receive_all.await?;
            receive_end(stream, up, order.up).await
        }
        Manner::BackendResets => tokio::try_join!(send(stream, down, 0..order.down), receive_all).map(|_| ()),
        Manner::ClientResets => {
            // The reset may find it sending as well as receiving.
            let sending = send(stream, down, 0..order.down);
            let (torn, sent) = tokio::join!(receive_until_reset(stream, up, 0, order.pace), sending);
            told(torn, &sent).map(|_| ())
        }
        Manner::Hold => {
            let sending = async {
                // Whoever is slow to the end is cut off in the end.
                let _ = send(stream, down, 0..order.down).await;
            };
            let (received, ()) = tokio::join!(receive_all, sending);
            if matches!(&received, Err(Fault::Wrong { .. })) {
                return received;
            }
            // However it ends: this side does not end it, and a FIN is no end.
            if receive_until_reset(stream, up, order.up, order.pace).await.is_err() {
                broken(stream).await;
            }
            Ok(())
        }
    }
}

/// Sends FIN. Shutting down is no matter of waiting: the socket does it at once.
pub(super) fn fin(stream: &TcpStream, at: u64) -> Result<(), Fault> {
    rustix::net::shutdown(stream, rustix::net::Shutdown::Write)
        .map_err(|error| Fault::Broke { at, error: error.into() })
}
