//! What `/metrics` of trimtab says.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest wait for a page.
const PATIENCE: Duration = Duration::from_secs(5);

/// A page of metrics.
#[derive(Debug)]
pub(crate) struct Page(String);

impl Page {
    /// Asks for one.
    pub(crate) fn get(http: SocketAddr) -> io::Result<Self> {
        let mut stream = TcpStream::connect_timeout(&http, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        Ok(Self(page))
    }

    /// The sum of all samples of this name that have this label.
    pub(crate) fn sum(&self, name: &str, label: &str) -> f64 {
        let named = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let lines = self.0.lines().filter(named).filter(|line| line.contains(label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_whole_names_and_labels() {
        let page = Page("# HELP a b\na{x=\"1\"} 2\na{x=\"2\"} 3\nab{x=\"1\"} 5\nc 7.5\n".to_owned());
        assert_eq!(page.sum("a", ""), 5.0);
        assert_eq!(page.sum("a", "x=\"2\""), 3.0);
        assert_eq!(page.sum("c", ""), 7.5);
        assert_eq!(page.sum("d", ""), 0.0);
    }
}
