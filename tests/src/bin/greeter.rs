//! A service for containers: says its host's name, and then each byte back, at every address. Ends when it is killed.
#![forbid(unsafe_code)]

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;

fn main() {
    let port = std::env::args().nth(1).expect("a port");
    let host = std::fs::read_to_string("/etc/hostname").expect("containers have a name");
    let listener = e2e::listen(format!("0.0.0.0:{port}").parse().expect("a port"));
    for stream in listener.incoming().flatten() {
        let name = host.clone();
        std::thread::spawn(move || serve(stream, &name));
    }
}

fn serve(mut stream: TcpStream, name: &str) -> io::Result<()> {
    stream.write_all(name.as_bytes())?;
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
    }
    Ok(())
}
