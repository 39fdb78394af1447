//! The stream of events: lines, parsed, in a queue of bounded length.
//!
//! A reader of its own takes them in as they come, because an engine throws away what a slow reader has not taken. When
//! the queue is full or a line cannot be read, it says so once: a full listing then stands for what was lost.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

use super::client::{Answer, Client, DockerError};
use super::wire::Event;

/// Events that wait. A burst of some hundred containers that start is a few thousand.
const QUEUE_MAX: usize = 4_096;
/// Longest event: the attributes hold a container's labels.
const LINE_BYTES_MAX: usize = 256 << 10;

const TYPES: [&str; 4] = ["container", "network", "service", "node"];
/// Health checks make exec events without end: only what may change something is asked for.
const ACTIONS: [&str; 15] = [
    "start",
    "kill",
    "die",
    "destroy",
    "pause",
    "unpause",
    "health_status",
    "rename",
    "update",
    "connect",
    "disconnect",
    "create",
    "remove",
    "stop",
    "restart",
];

/// Events as they come.
pub(super) struct Events {
    queue: mpsc::Receiver<Event>,
    lost: Arc<Notify>,
    reader: JoinSet<DockerError>,
}

/// What comes next.
pub(super) enum Next {
    Event(Event),
    /// Some were lost.
    Lost,
    /// No more will come.
    Ended(DockerError),
}

impl Events {
    /// Subscribes.
    ///
    /// # Errors
    /// When the engine does not answer so.
    pub(super) async fn subscribe(client: &Client) -> Result<Self, DockerError> {
        let answer = client.events(&TYPES, &ACTIONS).await?;
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        let lost = Arc::new(Notify::new());
        let mut reader = JoinSet::new();
        reader.spawn(read(answer, sender, Arc::clone(&lost)));
        Ok(Self { queue, lost, reader })
    }

    /// The next one; may be dropped half-way.
    pub(super) async fn next(&mut self) -> Next {
        tokio::select! {
            biased;
            () = self.lost.notified() => Next::Lost,
            event = self.queue.recv() => match event {
                Some(event) => Next::Event(event),
                None => {
                    let ended = self.reader.join_next().await.and_then(Result::ok);
                    Next::Ended(ended.unwrap_or(DockerError::EventsEnded))
                }
            }
        }
    }
}

async fn read(mut answer: Answer, queue: mpsc::Sender<Event>, lost: Arc<Notify>) -> DockerError {
    let mut lines = Lines::default();
    loop {
        match answer.piece().await {
            Some(Ok(piece)) => lines.feed(&piece, |line| {
                let taken = line.and_then(|line| serde_json::from_slice(line).ok());
                if taken.is_none_or(|event| queue.try_send(event).is_err()) {
                    lost.notify_one();
                }
            }),
            Some(Err(source)) => return DockerError::Http { path: "/events".to_owned(), source },
            None => return DockerError::EventsEnded,
        }
    }
}

/// Lines out of pieces.
#[derive(Default)]
struct Lines {
    begun: Vec<u8>,
    /// The line that was begun is too long: nothing is kept of it.
    too_long: bool,
}

impl Lines {
    /// Calls `each` with every line that ends in this piece; `None`: it was too long.
    fn feed(&mut self, mut piece: &[u8], mut each: impl FnMut(Option<&[u8]>)) {
        while let Some(end) = piece.iter().position(|byte| *byte == b'\n') {
            self.add(&piece[..end]);
            piece = &piece[end + 1..];
            let blank = self.begun.iter().all(u8::is_ascii_whitespace);
            if self.too_long {
                each(None);
            } else if !blank {
                each(Some(&self.begun));
            }
            self.begun.clear();
            self.too_long = false;
        }
        self.add(piece);
    }

    fn add(&mut self, part: &[u8]) {
        if self.too_long || self.begun.len() + part.len() > LINE_BYTES_MAX {
            self.too_long = true;
            self.begun.clear();
        } else {
            self.begun.extend_from_slice(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<Option<String>> {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        for piece in pieces {
            lines.feed(piece, |line| found.push(line.map(|line| String::from_utf8_lossy(line).into_owned())));
        }
        found
    }

    #[test]
    fn lines_come_out_however_they_are_cut() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(lines(&[b"{1}\n{2}\n"]), [some("{1}"), some("{2}")]);
        assert_eq!(lines(&[b"{", b"1", b"}\n\r\n\n{2", b"}"]), [some("{1}")], "the last has not ended");
    }

    #[test]
    fn a_line_that_is_too_long_is_told_and_nothing_is_kept_of_it() {
        let long = vec![b'x'; LINE_BYTES_MAX];
        assert_eq!(lines(&[&long, b"y", &long, b"\n{2}\n"]), [None, Some("{2}".to_owned())]);
    }

    #[test]
    fn an_event_of_the_engine_is_read() {
        let line =
            br#"{"status":"kill","id":"ab","from":"i","Type":"container","Action":"kill","Actor":{"ID":"ab",
            "Attributes":{"image":"i","name":"web","signal":"15"}},"scope":"local","time":1,"timeNano":1}"#;
        let event: Event = serde_json::from_slice(line).unwrap();
        assert_eq!((event.kind.as_str(), event.action.as_str()), ("container", "kill"));
        assert_eq!(event.actor.attributes["signal"], "15");
        let bare: Event = serde_json::from_slice(br#"{"Type":"node","Actor":null}"#).unwrap();
        assert!(bare.actor.id.is_empty());
    }
}
