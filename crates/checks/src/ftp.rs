//! FTP (RFC 959): the greeting and QUIT. Nobody logs in, so nothing is counted against anybody.

use crate::Failure;
use crate::reply;
use crate::wire::Wire;

pub(crate) async fn ask(wire: &mut Wire) -> Result<String, Failure> {
    let greeting = reply::expect(wire, "FTP", 220).await?;
    Ok(format!("220 {}", greeting.text))
}
