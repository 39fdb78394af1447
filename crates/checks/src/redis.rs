//! Redis and its kin (RESP): PING and QUIT.

use crate::text::{line, shown};
use crate::wire::{Parsed, Wire};
use crate::{Failure, text};

const PING: &[u8] = b"*1\r\n$4\r\nPING\r\n";
const QUIT: &[u8] = b"*1\r\n$4\r\nQUIT\r\n";

pub(crate) async fn ask(wire: &mut Wire) -> Result<String, Failure> {
    wire.say(PING).await?;
    let answer = wire.hear("Redis", answer).await?;
    wire.part_with(QUIT);
    judge(answer)
}

/// A simple string, or an error.
fn answer(bytes: &[u8]) -> Parsed<Result<String, String>> {
    match bytes.first() {
        None => return Ok(None),
        Some(b'+' | b'-') => {}
        Some(_) => return Err(shown(bytes)),
    }
    Ok(line(bytes).map(|(line, used)| {
        let said = shown(&line[1..]);
        (if line[0] == b'+' { Ok(said) } else { Err(said) }, used)
    }))
}

fn judge(answer: Result<String, String>) -> Result<String, Failure> {
    match answer {
        Ok(said) => Ok(said),
        // It would serve whoever has the password.
        Err(said) if said.starts_with("NOAUTH ") => Ok("it asks for a password".to_owned()),
        // LOADING, MASTERDOWN, BUSY, MISCONF: it does not serve.
        Err(said) => Err(Failure::Answer(text::printable(&format!("it answers PING with {said}")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        assert_eq!(answer(b"+PONG\r\n"), Ok(Some((Ok("PONG".into()), 7))));
        assert_eq!(answer(b"+PON"), Ok(None));
        assert!(answer(b"HTTP/1.1 400").is_err());
        let said = |text: &str| judge(answer(text.as_bytes()).unwrap().unwrap().0);
        assert_eq!(said("+PONG\r\n").unwrap(), "PONG");
        assert!(said("-NOAUTH Authentication required.\r\n").is_ok());
        let loading = said("-LOADING Redis is loading the dataset in memory\r\n").unwrap_err();
        assert!(loading.to_string().contains("LOADING"), "{loading}");
    }
}
