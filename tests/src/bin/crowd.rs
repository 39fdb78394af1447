//! Clients in a network of their own: told on stdin what to do, one line each, and says on stdout what came of it.
//!
//! ```text
//! open NAME    connects to the next of the addresses and waits for the first byte: "NAME served", or "NAME" and the error
//! close NAME   resets the oldest that is served: "NAME closed"
//! ```
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, BufRead as _, Read as _};
use std::net::{SocketAddr, TcpStream};

fn main() {
    let addresses: Vec<SocketAddr> =
        std::env::args().skip(1).map(|text| text.parse().expect("an address")).collect();
    let mut turns = addresses.iter().cycle();
    let mut served = VecDeque::new();
    for line in io::stdin().lock().lines() {
        let line = line.expect("text");
        let (what, name) = line.split_once(' ').expect("a command and a name");
        let outcome = match what {
            "open" => match open(*turns.next().expect("an address")) {
                Ok(stream) => {
                    served.push_back(stream);
                    "served".to_owned()
                }
                Err(error) => format!("{:?}", error.kind()),
            },
            _ => {
                e2e::reset(served.pop_front().expect("one that is served"));
                "closed".to_owned()
            }
        };
        println!("{name} {outcome}");
    }
}

fn open(address: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = e2e::connect(address)?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}
