//! The floor: a proxy on a ring that does nothing but carry bytes. What trimtab takes more than this is what balancing costs; what
//! this takes itself, no proxy over `uring` can save.
//!
//! It takes turns between its backends and has no limits, no timeouts, no metrics, no backpressure and no second worker. It is for the
//! harness's loads, which never have more under way than fits into its buffers, and for nothing else.

use std::collections::{HashMap, VecDeque};
use std::net::{Shutdown, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, ensure};
use clap::Args;
use nix::errno::Errno;
use socket2::{Domain, SockRef, Socket, Type};
use uring::{Completion, Group, Op, Part, Ring, Setup, Token, Wait};

/// Buffers of each kind.
const BUFFERS: u32 = 4_096;
const BACKLOG: i32 = 4_096;
const DATAGRAM_BYTES: u32 = 2_048;
const RECEIVE_BUFFER: usize = 1 << 20;
/// Not paced, as trimtab's connections within the host are not (decision 60).
const CONGESTION: &[u8] = b"reno";

/// Where the floor listens and connects to.
#[derive(Debug, Args)]
pub struct FloorArguments {
    /// Where it listens
    #[arg(long)]
    pub listen: SocketAddr,
    /// Where it connects to
    #[arg(long, required = true)]
    pub to: Vec<SocketAddr>,
    /// Datagrams as well
    #[arg(long)]
    pub udp: bool,
}

/// Carries until it is killed.
///
/// # Errors
/// When there is no ring, or a socket cannot be made.
pub fn run(arguments: &FloorArguments) -> anyhow::Result<()> {
    let mut floor = Floor::new(arguments)?;
    let mut completions = Vec::new();
    loop {
        floor.ring.enter(Wait::Forever)?;
        floor.ring.completions(&mut completions);
        for completion in completions.drain(..) {
            floor.take(completion)?;
        }
        for token in std::mem::take(&mut floor.starved) {
            floor.receive_again(token)?;
        }
    }
}

struct Floor {
    ring: Ring,
    backends: Vec<SocketAddr>,
    turn: usize,
    listener: TcpListener,
    flows: Vec<Flow>,
    free: Vec<usize>,
    datagrams: Option<UdpSocket>,
    clients: HashMap<SocketAddr, usize>,
    answers: Vec<(Socket, SocketAddr)>,
    /// Receives that found no buffer.
    starved: Vec<Token>,
}

/// The client's is 0, the backend's 1.
type Side = usize;

#[derive(Default)]
struct Flow {
    sockets: [Option<OwnedFd>; 2],
    /// What is on its way to each side, the first of it being sent.
    out: [VecDeque<Part>; 2],
    ended: [bool; 2],
    broken: bool,
    in_flight: usize,
}

const RECEIVES: [Op; 2] = [Op::RecvClient, Op::RecvBackend];
const SENDS: [Op; 2] = [Op::SendClient, Op::SendBackend];
const ROOM: [Op; 2] = [Op::WritableClient, Op::WritableBackend];

fn token(op: Op, slot: usize) -> Token {
    Token::new(op, slot as u32, 0)
}

impl Floor {
    fn new(arguments: &FloorArguments) -> anyhow::Result<Self> {
        let mut ring = Ring::new(Setup {
            shared: BUFFERS,
            shared_max: BUFFERS,
            datagrams_max: BUFFERS,
            datagram_bytes: DATAGRAM_BYTES,
            ..Setup::default()
        })?;
        ring.pool_mut().grow(Group::Datagrams, BUFFERS);
        let listener = Socket::new(Domain::for_address(arguments.listen), Type::STREAM, None)?;
        listener.set_reuse_address(true)?;
        tune(&listener)?;
        listener.bind(&arguments.listen.into()).context("binding")?;
        listener.listen(BACKLOG)?;
        let listener = TcpListener::from(listener);
        ring.accept(listener.as_fd(), token(Op::Accept, 0))?;
        let datagrams = arguments.udp.then(|| bind_datagrams(arguments.listen)).transpose()?;
        if let Some(socket) = &datagrams {
            ring.recv_datagrams(socket.as_fd(), token(Op::Datagrams, 0))?;
        }
        Ok(Self {
            ring,
            backends: arguments.to.clone(),
            turn: 0,
            listener,
            flows: Vec::new(),
            free: Vec::new(),
            datagrams,
            clients: HashMap::new(),
            answers: Vec::new(),
            starved: Vec::new(),
        })
    }

    fn next_backend(&mut self) -> SocketAddr {
        self.turn = (self.turn + 1) % self.backends.len();
        self.backends[self.turn]
    }

    fn take(&mut self, completion: Completion) -> anyhow::Result<()> {
        let slot = completion.token.slot as usize;
        match completion.token.op {
            Op::Accept => self.accepted(completion),
            Op::Connect => {
                self.flows[slot].in_flight -= 1;
                self.flows[slot].broken |= completion.result < 0;
                for side in [0, 1].into_iter().filter(|_| completion.result >= 0) {
                    self.receive(slot, side)?;
                }
                self.end_if_over(slot)
            }
            Op::RecvClient => self.received(slot, 0, &completion),
            Op::RecvBackend => self.received(slot, 1, &completion),
            Op::SendClient | Op::WritableClient => self.sent(slot, 0, &completion),
            Op::SendBackend | Op::WritableBackend => self.sent(slot, 1, &completion),
            Op::Datagrams => self.asked(&completion),
            Op::Answers => self.answered(slot, &completion),
            Op::SendDatagrams => {
                self.ring.pool_mut().release(slot as u16);
                Ok(())
            }
            other => anyhow::bail!("{other:?} was never submitted"),
        }
    }

    fn accepted(&mut self, completion: Completion) -> anyhow::Result<()> {
        if let Some(client) = completion.socket {
            let backend = self.next_backend();
            let socket = Socket::new(Domain::for_address(backend), Type::STREAM, None)?;
            tune(&socket)?;
            let slot = self.free.pop().unwrap_or_else(|| {
                self.flows.push(Flow::default());
                self.flows.len() - 1
            });
            self.ring.connect(socket.as_fd(), &backend, token(Op::Connect, slot))?;
            let sockets = [Some(client), Some(socket.into())];
            self.flows[slot] = Flow { sockets, in_flight: 1, ..Flow::default() };
        }
        if !completion.more {
            self.ring.accept(self.listener.as_fd(), token(Op::Accept, 0))?;
        }
        Ok(())
    }

    fn receive(&mut self, slot: usize, side: Side) -> anyhow::Result<()> {
        let flow = &mut self.flows[slot];
        let Some(socket) = &flow.sockets[side] else { return Ok(()) };
        flow.in_flight += 1;
        Ok(self.ring.recv_many(socket.as_fd(), token(RECEIVES[side], slot))?)
    }

    fn received(&mut self, slot: usize, side: Side, completion: &Completion) -> anyhow::Result<()> {
        let flow = &mut self.flows[slot];
        flow.in_flight -= usize::from(!completion.more);
        let starved = completion.result == -(Errno::ENOBUFS as i32);
        match (completion.buffer, u32::try_from(completion.result)) {
            (Some(buffer), _) if flow.broken => self.ring.pool_mut().release(buffer),
            (Some(buffer), Ok(length)) if length > 0 => {
                flow.out[1 - side].push_back(Part { buffer, start: 0, length });
                if flow.out[1 - side].len() == 1 {
                    self.send(slot, 1 - side)?;
                }
                if !completion.more {
                    self.receive(slot, side)?;
                }
            }
            _ if starved => self.starved.push(completion.token),
            (_, result) => {
                flow.ended[side] = true;
                flow.broken |= result.is_err();
                self.end_half_if_empty(slot, 1 - side);
            }
        }
        self.end_if_over(slot)
    }

    fn receive_again(&mut self, starved: Token) -> anyhow::Result<()> {
        let slot = starved.slot as usize;
        match (starved.op, &self.datagrams) {
            (Op::Datagrams, Some(socket)) => Ok(self.ring.recv_datagrams(socket.as_fd(), starved)?),
            (Op::Answers, _) => Ok(self.ring.recv_connected(self.answers[slot].0.as_fd(), starved)?),
            (op, _) => self.receive(slot, usize::from(op == RECEIVES[1])),
        }
    }

    fn send(&mut self, slot: usize, side: Side) -> anyhow::Result<()> {
        let flow = &mut self.flows[slot];
        let (Some(socket), Some(part)) = (&flow.sockets[side], flow.out[side].front()) else { return Ok(()) };
        flow.in_flight += 1;
        let token = token(SENDS[side], slot);
        Ok(self.ring.send(socket.as_fd(), part.buffer, part.start, part.length, token)?)
    }

    /// A send is done, or there is room for one again.
    fn sent(&mut self, slot: usize, side: Side, completion: &Completion) -> anyhow::Result<()> {
        let flow = &mut self.flows[slot];
        flow.in_flight -= 1;
        let polled = completion.token.op == ROOM[side];
        if completion.result == -(Errno::EAGAIN as i32)
            && let Some(socket) = &flow.sockets[side]
        {
            flow.in_flight += 1;
            return Ok(self.ring.poll_writable(socket.as_fd(), token(ROOM[side], slot))?);
        }
        flow.broken |= completion.result < 0;
        let sent = if polled || flow.broken { 0 } else { completion.result as u32 };
        if let Some(part) = flow.out[side].front_mut().filter(|_| !flow.broken) {
            (part.start, part.length) = (part.start + sent, part.length - sent);
            if part.length == 0
                && let Some(part) = flow.out[side].pop_front()
            {
                self.ring.pool_mut().release(part.buffer);
            }
        }
        if !self.flows[slot].broken {
            self.send(slot, side)?;
            self.end_half_if_empty(slot, side);
        }
        self.end_if_over(slot)
    }

    /// Passes a FIN on to this side, once all that came before it is sent.
    fn end_half_if_empty(&mut self, slot: usize, side: Side) {
        let flow = &mut self.flows[slot];
        if flow.ended[1 - side]
            && flow.out[side].is_empty()
            && let Some(socket) = &flow.sockets[side]
        {
            // An error of the connection comes with its receive.
            let _ = SockRef::from(socket).shutdown(Shutdown::Write);
        }
    }

    fn end_if_over(&mut self, slot: usize) -> anyhow::Result<()> {
        let flow = &mut self.flows[slot];
        if flow.broken {
            for socket in flow.sockets.iter().flatten() {
                // Ends the receives; the connection may be gone already.
                let _ = SockRef::from(socket).shutdown(Shutdown::Both);
            }
        }
        if flow.in_flight > 0 || !(flow.broken || flow.ended == [true, true]) || flow.sockets[0].is_none() {
            return Ok(());
        }
        let flow = std::mem::take(flow);
        flow.out.into_iter().flatten().for_each(|part| self.ring.pool_mut().release(part.buffer));
        for socket in flow.sockets.into_iter().flatten() {
            self.ring.close(socket)?;
        }
        self.free.push(slot);
        Ok(())
    }

    fn asked(&mut self, completion: &Completion) -> anyhow::Result<()> {
        if let Some(buffer) = completion.buffer {
            let got = self.ring.datagrams(buffer, completion.result).context("a datagram from nowhere")?;
            let flow = match self.clients.get(&got.from) {
                Some(flow) => *flow,
                None => self.new_client(got.from)?,
            };
            let part = Part { buffer, start: got.start, length: got.length };
            let token = token(Op::SendDatagrams, usize::from(buffer));
            self.ring.send_datagrams(self.answers[flow].0.as_fd(), (None, None), &[part], 0, token)?;
        }
        if !completion.more {
            self.starved.push(completion.token);
        }
        Ok(())
    }

    fn new_client(&mut self, client: SocketAddr) -> anyhow::Result<usize> {
        let backend = self.next_backend();
        let socket = Socket::new(Domain::for_address(backend), Type::DGRAM, None)?;
        socket.connect(&backend.into())?;
        let flow = self.answers.len();
        self.ring.recv_connected(socket.as_fd(), token(Op::Answers, flow))?;
        self.answers.push((socket, client));
        self.clients.insert(client, flow);
        Ok(flow)
    }

    fn answered(&mut self, flow: usize, completion: &Completion) -> anyhow::Result<()> {
        let socket = self.datagrams.as_ref().context("an answer without a listener")?;
        if let (Some(buffer), Ok(length)) = (completion.buffer, u32::try_from(completion.result)) {
            let part = Part { buffer, start: 0, length };
            let client = self.answers[flow].1;
            let token = token(Op::SendDatagrams, usize::from(buffer));
            self.ring.send_datagrams(socket.as_fd(), (Some(&client), None), &[part], 0, token)?;
        }
        if !completion.more {
            self.starved.push(completion.token);
        }
        Ok(())
    }
}

fn bind_datagrams(listen: SocketAddr) -> anyhow::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(listen), Type::DGRAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.bind(&listen.into()).context("binding for datagrams")?;
    Ok(socket.into())
}

fn tune(socket: &Socket) -> anyhow::Result<()> {
    socket.set_tcp_nodelay(true)?;
    ensure!(socket.set_tcp_congestion(CONGESTION).is_ok(), "this kernel has no reno");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::{Duration, Instant};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn ports(udp: bool) -> (TcpListener, Option<UdpSocket>, SocketAddr) {
        let (backend, listen) = (e2e::loopback(), e2e::loopback());
        let datagrams = udp.then(|| UdpSocket::bind(backend).unwrap());
        let backend = TcpListener::bind(backend).unwrap();
        let arguments = FloorArguments { listen, to: vec![backend.local_addr().unwrap()], udp };
        // It carries until the process ends.
        std::thread::spawn(move || panic!("{:?}", run(&arguments).err()));
        (backend, datagrams, listen)
    }

    fn connect(to: SocketAddr) -> TcpStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect(to) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn it_carries_connections_both_ways_and_ends_them_as_they_end() {
        let (backend, _, listen) = ports(false);
        for bytes in [64, 1 << 20] {
            let mut client = connect(listen);
            let (mut served, _) = backend.accept().unwrap();
            let echo = std::thread::spawn(move || {
                let mut all = Vec::new();
                served.read_to_end(&mut all).unwrap();
                served.write_all(&all).unwrap();
            });
            let sent: Vec<u8> = (0..bytes).map(|place: u32| (place % 251) as u8).collect();
            client.write_all(&sent).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut back = Vec::new();
            client.read_to_end(&mut back).unwrap();
            assert!(back == sent, "{} of {} bytes came back", back.len(), sent.len());
            echo.join().unwrap();
        }
        // A reset is passed on.
        let client = connect(listen);
        let (mut served, _) = backend.accept().unwrap();
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        served.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(!matches!(served.read(&mut [0; 8]), Ok(1..)), "nothing was sent");
    }

    #[test]
    fn it_carries_datagrams_and_tells_clients_apart() {
        let (_backend, datagrams, listen) = ports(true);
        drop(connect(listen));
        let (datagrams, mut buffer) = (datagrams.unwrap(), [0; 64]);
        datagrams.set_read_timeout(Some(PATIENCE)).unwrap();
        let clients: [_; 3] = std::array::from_fn(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        for round in 0..3_u8 {
            for (client, number) in clients.iter().zip(0..) {
                client.send_to(&[round, number], listen).unwrap();
                let (length, from) = datagrams.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], [round, number]);
                datagrams.send_to(&buffer[..length], from).unwrap();
            }
            for (client, number) in clients.iter().zip(0..) {
                client.set_read_timeout(Some(PATIENCE)).unwrap();
                let (length, from) = client.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from), (&[round, number][..], listen));
            }
        }
    }
}
