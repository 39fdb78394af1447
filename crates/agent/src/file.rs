//! The utilization file as the lives of one agent share it.
//!
//! Owns: when it is read (at each report, at each registration, when probes are answered, and within
//! [`LOOK_INTERVAL`] of a change), what is said about a file that is wrong, and the labels that come of it. Does not
//! own: its form ([`Override`]).
//!
//! Labels: those of the configuration, overlaid by the file's. They are part of reports from when the file first has
//! any; a file that loses them takes back the overlay. One that cannot be used changes no label: a half-written file
//! must not demote a writer.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use api::v1::Labels;
use formats::{DocumentError, ENTRIES_MAX};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

use crate::config::AgentConfig;
use crate::sources::Sources;
use crate::utilization::{Override, OverrideError, read_override};

/// How often to look whether the file changed, apart from reports.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// A file that need not be there, or be named at all.
#[derive(Debug)]
pub(crate) struct UtilizationFile {
    path: Option<PathBuf>,
    /// The configuration's.
    labels: HashMap<String, String>,
    /// All labels, once the file had any.
    reported: watch::Sender<Option<Labels>>,
    /// What was last said about the file; forgotten when it can be read.
    said: Mutex<Option<String>>,
    /// What the service says of itself otherwise, below the file.
    sources: Arc<Sources>,
    /// Labels are told ([`Self::supply_labels`]), and nothing here adds to them.
    is_supplied: bool,
}

impl UtilizationFile {
    pub(crate) fn new(config: &AgentConfig, sources: Arc<Sources>) -> Self {
        Self {
            path: config.utilization_file.clone(),
            labels: config.resource.labels.clone(),
            reported: watch::Sender::new(None),
            said: Mutex::new(None),
            sources,
            is_supplied: config.supply.is_some(),
        }
    }

    /// What stands above what is measured now: the sources of the service's own numbers, and above them the file; of a file
    /// that is wrong or not there, nothing.
    pub(crate) fn read(&self) -> Override {
        if self.is_supplied {
            return Override::default();
        }
        let below = self.sources.at(tokio::time::Instant::now());
        let Some(path) = &self.path else {
            // Their own maps are within their bounds; with the configuration's labels they may be too many.
            self.say("the service's own numbers", self.note_labels(&below).err().as_ref());
            return below;
        };
        let read = read_override(path).and_then(|file| {
            let mut all = below.clone();
            all.overlay(file);
            self.note_labels(&all)?;
            Ok(all)
        });
        self.say(&path.display().to_string(), read.as_ref().err());
        read.unwrap_or(below)
    }

    /// Follows all the labels of the resource; `None` until the file had any. What changed was noticed by a
    /// [`UtilizationFile::read`] or within [`LOOK_INTERVAL`].
    pub(crate) fn labels(&self) -> watch::Receiver<Option<Labels>> {
        self.reported.subscribe()
    }

    /// Reads it whenever it changed, for ever: a change of labels should not wait for the next report.
    pub(crate) async fn watch(&self) -> Infallible {
        let Some(path) = &self.path else { return std::future::pending().await };
        let mut looks = interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was = Stamp::of(path);
        loop {
            looks.tick().await;
            let now = Stamp::of(path);
            // Rewritten in place at the same length within a tick of the file system's clock: the next report sees it.
            if was != now {
                was = now;
                self.read();
            }
        }
    }

    /// Labels that are told, in place of the configuration's and a file's.
    pub(crate) fn supply_labels(&self, labels: &HashMap<String, String>) {
        self.reported.send_if_modified(|reported| {
            let changed = reported.as_ref().is_none_or(|reported| reported.entries != *labels);
            if changed {
                *reported = Some(Labels { entries: labels.clone() });
            }
            changed
        });
    }

    fn note_labels(&self, read: &Override) -> Result<(), OverrideError> {
        let mut all = self.labels.clone();
        all.extend(read.labels.iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
        if all.len() > ENTRIES_MAX {
            let (key, count) = ("labels with those of the agent", all.len());
            return Err(DocumentError::TooMany { key, count }.into());
        }
        self.reported.send_if_modified(|reported| {
            let new = (read.labels.is_some() || reported.is_some()).then_some(Labels { entries: all });
            let changed = *reported != new;
            *reported = new;
            changed
        });
        Ok(())
    }

    /// Each error once until the file is right or wrong in another way.
    fn say(&self, path: &str, error: Option<&OverrideError>) {
        let error = error.map(ToString::to_string);
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(error) = error.as_ref().filter(|_| *said != error) {
            warn!(file = path, error, "the utilization file is ignored");
        }
        *said = error;
    }
}

/// What tells one state of a file from the next without reading it.
#[derive(Debug, PartialEq, Eq)]
struct Stamp(Option<(SystemTime, u64, u64)>);

impl Stamp {
    fn of(path: &Path) -> Self {
        use std::os::unix::fs::MetadataExt;
        let look = || {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
        };
        Self(look())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::v1::Resource;

    #[test]
    fn the_files_labels_overlay_those_of_the_configuration_once_there_are_any() {
        let labels = HashMap::from([("zone", "eu"), ("role", "reader")].map(|(k, v)| (k.into(), v.into())));
        let config = AgentConfig::new(Vec::new(), Resource { labels, ..Resource::default() });
        let file = UtilizationFile::new(&config, Arc::default());
        let labels = file.labels();
        let note = |text: &str| file.note_labels(&Override::parse(text.as_bytes()).unwrap());
        let now = || {
            let mut labels: Vec<String> =
                labels.borrow().iter().flat_map(|l| &l.entries).map(|(k, v)| format!("{k}={v}")).collect();
            labels.sort();
            labels.join(" ")
        };
        note("{}").unwrap();
        assert_eq!(*labels.borrow(), None);
        note(r#"{"labels": {"role": "writer", "fts": "true"}}"#).unwrap();
        assert_eq!(now(), "fts=true role=writer zone=eu");
        let many: Vec<String> = (0..63).map(|n| format!(r#""k{n}": """#)).collect();
        let error = note(&format!(r#"{{"labels": {{{}}}}}"#, many.join(","))).unwrap_err();
        assert_eq!(error.to_string(), "labels with those of the agent has 65 entries; it takes at most 64");
        assert_eq!(now(), "fts=true role=writer zone=eu");
        note("{}").unwrap();
        assert_eq!(now(), "role=reader zone=eu");
        note(r#"{"labels": {}}"#).unwrap();
        assert_eq!(now(), "role=reader zone=eu");
    }

    #[test]
    fn labels_that_are_told_stay_whatever_is_read() {
        let mut config = AgentConfig::new(Vec::new(), Resource::default());
        config.supply = Some(watch::channel(crate::Supplied::default()).1);
        let file = UtilizationFile::new(&config, Arc::default());
        file.supply_labels(&HashMap::from([("tls".to_owned(), "true".to_owned())]));
        file.read();
        assert_eq!(file.labels().borrow().as_ref().unwrap().entries.len(), 1);
    }
}
