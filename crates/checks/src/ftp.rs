//! FTP (RFC 959): the greeting and QUIT. Nobody logs in, so nothing is counted against anybody. With AUTH TLS (RFC 4217) between
//! them.

use crate::Failure;
use crate::reply;
use crate::tls::Later;
use crate::wire::Wire;

/// The same as after every reply.
const QUIT: &[u8] = b"QUIT\r\n";

pub(crate) async fn ask(wire: &mut Wire, starttls: Option<Later<'_>>) -> Result<String, Failure> {
    let greeting = reply::expect(wire, "FTP", 220).await?;
    if let Some(later) = starttls {
        wire.say(b"AUTH TLS\r\n").await?;
        reply::expect(wire, "FTP", 234).await?;
        later.begin(wire).await?;
        wire.part_with(QUIT);
    }
    Ok(format!("220 {}", greeting.text))
}
