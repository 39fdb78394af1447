//! Why the store is refused at start, and why a change was not kept.

use std::io;
use std::path::PathBuf;

use rusqlite::ErrorCode;

/// Why the store cannot be used: the operator's to mend, before anything is served. Nothing in the file has changed then.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no way to write there.
    #[error(
        "store.path: cannot write {}: {source}. The folder must exist, and the user that runs trimtab must be able to write \
         the file and beside it (SQLite keeps -wal and -shm there)",
        path.display()
    )]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process has it.
    #[error(
        "store.path: {} belongs to another balancer that runs now. Two balancers cannot share a store: stop the other, or \
         give this one a path of its own",
        path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// It is something else.
    #[error(
        "store.path: {} is no store of trimtab, and is left as it is: {what}. Name a path that nothing else uses; the file is \
         made at the first start",
        path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        what: String,
    },
    /// A later version of trimtab wrote it.
    #[error(
        "store.path: {} is of a newer version of trimtab (its layout is {found}, this version knows {VERSION}), and is left as \
         it is. Run that version again, or restore the copy that was made before it, or move the file away to begin anew",
        path.display(), VERSION = crate::VERSION
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its layout.
        found: i64,
    },
    /// It is damaged.
    #[error(
        "store.path: {} is damaged, and is left as it is: {detail}. Restore a backup, or move it away with its -wal and -shm: \
         the balancer then begins anew and agents register again by themselves; what operators entered is lost. docs/store.md \
         says how to save what can be read",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What SQLite found.
        detail: String,
    },
    /// It could not be brought to this version's layout.
    #[error("store.path: {} could not be used: {detail}", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        detail: String,
    },
}

/// Why a change was not kept. It is undone as a whole; what was kept before stays.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No room on the disk: the operator's to mend.
    #[error("the disk of the store is full: free some room")]
    Full,
    /// The disk or the file system failed: the operator's to mend.
    #[error("the store cannot be written: {0}")]
    Disk(String),
    /// The file is damaged: the operator's to mend.
    #[error("the store is damaged: {0}")]
    Corrupt(String),
    /// Too many changes wait: the disk is slow, or there are more than it takes.
    #[error("{waiting} changes wait to be stored, as many as may: try again later")]
    QueueFull {
        /// How many.
        waiting: usize,
    },
    /// Another process holds the file, as a backup or a shell may.
    #[error("another process holds the store: {0}")]
    Held(String),
    /// What it belongs to is not there: the caller's to mend.
    #[error("the store has no {0}")]
    Missing(String),
    /// It is there already, or breaks a rule of the schema: the caller's to mend.
    #[error("the store refuses it: {0}")]
    Conflict(String),
    /// The thread that writes has ended: the process ends.
    #[error("the store is closed")]
    Closed,
    /// SQLite refuses what we ask: a fault of ours.
    #[error("the store cannot do it: {0}")]
    Fault(String),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        let said = error.to_string();
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full,
            Some(
                ErrorCode::SystemIoFailure
                | ErrorCode::CannotOpen
                | ErrorCode::ReadOnly
                | ErrorCode::PermissionDenied,
            ) => Self::Disk(said),
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Corrupt(said),
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Held(said),
            Some(ErrorCode::ConstraintViolation) => Self::Conflict(said),
            _ => Self::Fault(said),
        }
    }
}
