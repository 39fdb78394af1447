//! PostgreSQL clients: one that tells exactly what happened to each of its connections, and `psql`.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{Ended, PATIENCE, Process};

/// Longest message that a test's query is answered with.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Protocol 3.0.
const PROTOCOL: i32 = 196_608;

/// One connection, in clear text and without a password.
#[derive(Debug)]
pub struct SqlClient(TcpStream);

/// What a connection ended with.
#[derive(Debug)]
#[non_exhaustive]
pub enum SqlError {
    /// It could not be made.
    Connect(io::Error),
    /// It broke.
    Broken(io::Error),
    /// The server said no.
    Server(String),
}

impl std::fmt::Display for SqlError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "cannot connect: {error}"),
            Self::Broken(error) => write!(f, "connection broke: {error}"),
            Self::Server(message) => write!(f, "server: {message}"),
        }
    }
}

impl SqlClient {
    /// Connects and starts a session as `postgres`.
    ///
    /// # Errors
    /// When any step of it fails.
    pub fn connect(address: SocketAddr) -> Result<Self, SqlError> {
        Self::over(crate::connect(address).map_err(SqlError::Connect)?)
    }

    /// As [`Self::connect`], over a connection that is there.
    ///
    /// # Errors
    /// As that.
    pub fn over(stream: TcpStream) -> Result<Self, SqlError> {
        stream.set_nodelay(true).map_err(SqlError::Connect)?;
        let mut client = Self(stream);
        let mut start = PROTOCOL.to_be_bytes().to_vec();
        start.extend(b"user\0postgres\0database\0postgres\0\0");
        client.send(None, &start)?;
        client.answer()?;
        Ok(client)
    }

    /// Asks one thing; gives the first value of the last row.
    ///
    /// # Errors
    /// When the connection breaks or the server refuses.
    pub fn query(&mut self, sql: &str) -> Result<String, SqlError> {
        self.send(Some(b'Q'), format!("{sql}\0").as_bytes())?;
        self.answer()
    }

    /// Which server it is, by the address that the server sees itself connected at.
    ///
    /// # Errors
    /// As [`Self::query`].
    pub fn server(&mut self) -> Result<String, SqlError> {
        self.query("select host(inet_server_addr())")
    }

    /// Ends the session as a client should.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn end(mut self) -> Result<(), SqlError> {
        self.send(Some(b'X'), b"")
    }

    fn send(&mut self, kind: Option<u8>, body: &[u8]) -> Result<(), SqlError> {
        let length = i32::try_from(body.len() + 4).expect("a short message");
        let mut message: Vec<u8> = kind.into_iter().collect();
        message.extend(length.to_be_bytes());
        message.extend(body);
        self.0.write_all(&message).map_err(SqlError::Broken)
    }

    /// Reads until the server is ready for the next query.
    fn answer(&mut self) -> Result<String, SqlError> {
        let (mut value, mut refused) = (String::new(), None);
        loop {
            let (kind, body) = self.message().map_err(SqlError::Broken)?;
            match kind {
                b'D' => value = first_value(&body).ok_or_else(|| invalid("a row"))?,
                b'E' => refused = Some(error_message(&body)),
                b'R' if body != [0; 4] => return Err(SqlError::Server("asks for a password".into())),
                b'Z' => return refused.map_or(Ok(value), |message| Err(SqlError::Server(message))),
                _ => {}
            }
            // Before a session stands, an error is the last message.
            if kind == b'E' && matches!(&refused, Some(message) if message.starts_with("FATAL")) {
                return Err(SqlError::Server(refused.unwrap_or_default()));
            }
        }
    }

    fn message(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.0.read_exact(&mut head)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if !(4..=MESSAGE_BYTES_MAX).contains(&length) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message of impossible length"));
        }
        let mut body = vec![0; length - 4];
        self.0.read_exact(&mut body)?;
        Ok((head[0], body))
    }
}

fn invalid(what: &str) -> SqlError {
    SqlError::Broken(io::Error::new(io::ErrorKind::InvalidData, format!("{what} is not as expected")))
}

/// Number of columns, then length and bytes of each.
fn first_value(row: &[u8]) -> Option<String> {
    let length = u32::from_be_bytes(row.get(2..6)?.try_into().ok()?);
    let end = 6_usize.checked_add(usize::try_from(length).ok()?)?;
    Some(String::from_utf8_lossy(row.get(6..end)?).into_owned())
}

/// `FATAL: …`, from fields that are a letter and a text with a NUL at its end.
fn error_message(body: &[u8]) -> String {
    let field = |letter: u8| {
        let field = body.split(|byte| *byte == 0).find(|field| field.first() == Some(&letter));
        String::from_utf8_lossy(field.map_or(&[], |field| &field[1..])).into_owned()
    };
    format!("{}: {}", field(b'V'), field(b'M'))
}

/// One connection of a [`Load`]: connect, ask, end.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// When it began to connect.
    pub began: Instant,
    /// How long all of it took.
    pub took: Duration,
    /// The server's address, or what went wrong.
    pub outcome: Result<String, String>,
}

/// Short connections, one after the other, on several threads, until it is stopped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    attempts: Arc<Mutex<Vec<Attempt>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts `threads`, each of which rests for `pause` after each connection.
    pub fn start(address: SocketAddr, threads: usize, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let attempts: Arc<Mutex<Vec<Attempt>>> = Arc::default();
        let one = || {
            let (stop, attempts) = (stop.clone(), attempts.clone());
            std::thread::spawn(move || {
                while !stop.load(Relaxed) {
                    let began = Instant::now();
                    let outcome = attempt(address).map_err(|error| error.to_string());
                    let attempt = Attempt { began, took: began.elapsed(), outcome };
                    attempts.lock().expect("no holder panics").push(attempt);
                    std::thread::sleep(pause);
                }
            })
        };
        let threads = (0..threads).map(|_| one()).collect();
        Self { stop, attempts, threads }
    }

    /// What happened so far.
    pub fn so_far(&self) -> Vec<Attempt> {
        self.attempts.lock().expect("no holder panics").clone()
    }

    /// Connections that began at `since` or later, and have ended.
    pub fn since(&self, since: Instant) -> Vec<Attempt> {
        let attempts = self.attempts.lock().expect("no holder panics");
        attempts.iter().filter(|attempt| attempt.began >= since).cloned().collect()
    }

    /// Ends it, and gives everything that happened.
    pub fn stop(mut self) -> Vec<Attempt> {
        self.join();
        self.so_far()
    }

    fn join(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("an attempt does not panic");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn attempt(address: SocketAddr) -> Result<String, SqlError> {
    let mut client = SqlClient::connect(address)?;
    let server = client.server()?;
    client.end()?;
    Ok(server)
}

/// An interactive `psql`, as a person at a terminal has it open.
#[derive(Debug)]
pub struct Psql(Process);

impl Psql {
    /// Connects.
    ///
    /// # Panics
    /// When psql is not installed.
    #[track_caller]
    pub fn open(address: SocketAddr) -> Self {
        let mut command = Command::new("psql");
        command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "postgres"]);
        command.args(["-h", &address.ip().to_string(), "-p", &address.port().to_string()]);
        Self(Process::start("psql", &mut command))
    }

    /// Asks one thing that is answered with one line, which no answer before was.
    ///
    /// # Panics
    /// When it is not answered.
    #[track_caller]
    pub fn ask(&mut self, expression: &str, tag: &str) -> String {
        self.0.write(&format!("select '{tag} ' || ({expression});\n"));
        let tag = format!("{tag} ");
        self.0.wait_for_line(PATIENCE, |line| line.strip_prefix(&tag).map(str::to_owned))
    }

    /// `\q`.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn quit(mut self) -> Ended {
        self.0.write("\\q\n");
        self.0.wait(PATIENCE).0
    }
}
