//! SMTP (RFC 5321): the greeting, EHLO, QUIT. A server that sees a client go without QUIT may log it, and many refuse to talk to
//! one that speaks before the greeting. With STARTTLS (RFC 3207), if it is offered, and all but the greeting again within TLS.

use std::net::IpAddr;

use crate::Failure;
use crate::reply::{self, Reply};
use crate::tls::Later;
use crate::wire::Wire;

/// How we introduce ourselves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Smtp {
    /// A host name; `None`: our address, as an address literal (§4.1.3).
    pub helo: Option<String>,
}

pub(crate) async fn ask(
    smtp: &Smtp,
    wire: &mut Wire,
    local: Option<IpAddr>,
    starttls: Option<Later<'_>>,
) -> Result<String, Failure> {
    let greeting = reply::expect(wire, "SMTP", 220).await?;
    let ehlo = ehlo(smtp, local);
    wire.say(&ehlo).await?;
    let extensions = reply::expect(wire, "SMTP", 250).await?;
    if let Some(later) = starttls {
        if !offers_starttls(&extensions) {
            return Err(Failure::Answer("it offers no STARTTLS".to_owned()));
        }
        wire.say(b"STARTTLS\r\n").await?;
        reply::expect(wire, "SMTP", 220).await?;
        later.begin(wire).await?;
        // What it said before is to be forgotten (§4.2).
        wire.say(&ehlo).await?;
        reply::expect(wire, "SMTP", 250).await?;
    }
    Ok(format!("220 {}", greeting.text))
}

/// RFC 5321 §4.1.1.1: a keyword for each line but the first.
fn offers_starttls(extensions: &Reply) -> bool {
    let keyword = |line: &String| line.get(4..).and_then(|rest| rest.split(' ').next().map(str::to_owned));
    extensions.further.iter().filter_map(keyword).any(|word| word.eq_ignore_ascii_case("STARTTLS"))
}

fn ehlo(smtp: &Smtp, local: Option<IpAddr>) -> Vec<u8> {
    let name = smtp.helo.clone().unwrap_or_else(|| match local.map(|ip| ip.to_canonical()) {
        Some(IpAddr::V6(ip)) => format!("[IPv6:{ip}]"),
        Some(IpAddr::V4(ip)) => format!("[{ip}]"),
        None => "localhost".to_owned(),
    });
    format!("EHLO {name}\r\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn introductions() {
        let own = Smtp::default();
        assert_eq!(ehlo(&own, Some([127, 0, 0, 1].into())), b"EHLO [127.0.0.1]\r\n");
        assert_eq!(ehlo(&own, "::1".parse().ok()), b"EHLO [IPv6:::1]\r\n");
        let named = Smtp { helo: Some("lb.example.com".into()) };
        assert_eq!(ehlo(&named, None), b"EHLO lb.example.com\r\n");
    }
}
