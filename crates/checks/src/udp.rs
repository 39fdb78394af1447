//! A datagram, and what comes back.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::timeout;

use crate::dns::connect_udp;
use crate::text::{find, printable, shown};
use crate::Failure;

/// Longest datagram that is looked at.
const DATAGRAM_BYTES_MAX: usize = 2048;

/// What is said and heard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Udp {
    /// The datagram.
    pub send: Vec<u8>,
    /// Must be in the answer. `None`: no answer is needed, and only a refusal of the kernel over there (ICMP) fails: all that a
    /// protocol can tell whose servers do not answer.
    pub expect: Option<Vec<u8>>,
}

/// Keeps to `limit` itself: where no answer is needed, silence until then passes.
pub(crate) async fn ask(udp: &Udp, target: SocketAddr, limit: Duration) -> Result<String, Failure> {
    let exchange = async {
        let socket = connect_udp(target).await?;
        socket.send(&udp.send).await?;
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        let length = socket.recv(&mut buffer).await?;
        Ok::<_, std::io::Error>(buffer[..length].to_vec())
    };
    match (timeout(limit, exchange).await, &udp.expect) {
        (Ok(Ok(heard)), expect) => judge(&heard, expect.as_deref().unwrap_or_default()),
        (Ok(Err(why)), _) => Err(Failure::Connect(target, why)),
        (Err(_), None) => Ok("nothing refused the datagram".to_owned()),
        (Err(_), Some(_)) => Err(Failure::Late(target, limit)),
    }
}

fn judge(heard: &[u8], expect: &[u8]) -> Result<String, Failure> {
    if find(heard, expect).is_some() {
        return Ok(shown(heard));
    }
    let message = format!("{:?} is not in its answer: {}", shown(expect), shown(heard));
    Err(Failure::Answer(printable(&message)))
}
