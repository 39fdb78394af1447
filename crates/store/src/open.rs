//! Opening the file: who may, whether it is ours, whether it is whole, and what is in it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::resources::Remembered;
use crate::schema::{self, APPLICATION_ID, VERSION};
use crate::{Labels, OpenError, StoreError, Tables, VersionSetting};

/// What every SQLite file begins with.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Up to this size all of a file is checked at start, which takes a second for some 500 MB; a larger one shows its damage where
/// it is read.
const CHECKED_MAX_BYTES: u64 = 256 << 20;
/// How long to wait for a shell or a backup that holds the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// What the log of changes may keep of the disk after it was written back.
const WAL_KEPT_BYTES: i64 = 64 << 20;
/// Statements kept prepared: there are fewer.
const STATEMENTS_MAX: usize = 64;
/// The file holds hashes of tokens: it is nobody else's to read.
const MODE: u32 = 0o600;

/// The open store, before its thread runs. While it is open, no other process can open it as a store.
#[derive(Debug)]
pub struct Store {
    pub(crate) connection: Connection,
    /// Held for as long as this lives; the kernel gives it back however the process ends.
    pub(crate) _lock: File,
    path: PathBuf,
}

/// All that is remembered.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Contents {
    /// Resources, by id.
    pub resources: Vec<Remembered>,
    /// What administrators entered, by resource.
    pub capabilities: BTreeMap<String, Labels>,
    /// Versions that were set or aborted.
    pub versions: Vec<VersionSetting>,
}

impl Store {
    /// Opens the file, or makes it where there is none; its folder must exist.
    ///
    /// # Errors
    /// See [`OpenError`]: each says what to do. Nothing has changed in a file that is refused.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let lock = lock(path)?;
        let unwritable = |source| OpenError::Unwritable { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(MODE).open(path);
        let mut file = file.map_err(unwritable)?;
        check_magic(path, &mut file)?;
        let size = file.metadata().map_err(unwritable)?.len();
        drop(file);

        let failed = |error: rusqlite::Error| refused(path, &error);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags).map_err(failed)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
        check_owner(path, &connection)?;
        if size <= CHECKED_MAX_BYTES {
            check_whole(path, &connection)?;
        }
        prepare(&mut connection).map_err(failed)?;
        Ok(Self { connection, _lock: lock, path: path.to_owned() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All that is remembered.
    ///
    /// # Errors
    /// [`OpenError::Corrupt`]: it cannot be read.
    pub fn load(&self) -> Result<Contents, OpenError> {
        self.read(|tables| {
            Ok(Contents {
                resources: tables.resources()?,
                capabilities: tables.capabilities()?,
                versions: tables.versions()?,
            })
        })
    }

    /// Reads something at start.
    ///
    /// # Errors
    /// [`OpenError::Corrupt`]: it cannot be read.
    pub fn read<T>(&self, read: impl FnOnce(&Tables<'_>) -> Result<T, StoreError>) -> Result<T, OpenError> {
        read(&Tables::of(&self.connection)).map_err(|error| match error {
            StoreError::Corrupt(detail) => OpenError::Corrupt { path: self.path.clone(), detail },
            other => OpenError::Failed { path: self.path.clone(), detail: other.to_string() },
        })
    }
}

/// A lock of its own beside the file: closing any descriptor of the file itself would take SQLite's locks from it.
fn lock(path: &Path) -> Result<File, OpenError> {
    let unwritable = |source| OpenError::Unwritable { path: path.to_owned(), source };
    if fs::metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
        return Err(unwritable(io::ErrorKind::IsADirectory.into()));
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(MODE).open(name).map_err(unwritable)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => Err(unwritable(source)),
    }
}

/// SQLite would take the first pages of anything for its own.
fn check_magic(path: &Path, file: &mut File) -> Result<(), OpenError> {
    let mut head = Vec::new();
    let read = file.take(MAGIC.len() as u64).read_to_end(&mut head);
    read.map_err(|source| OpenError::Unwritable { path: path.to_owned(), source })?;
    if head.is_empty() || head == MAGIC {
        return Ok(());
    }
    Err(OpenError::Foreign { path: path.to_owned(), what: "it is no SQLite file".into() })
}

fn check_owner(path: &Path, connection: &Connection) -> Result<(), OpenError> {
    let failed = |error: rusqlite::Error| refused(path, &error);
    let number =
        |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0)).map_err(failed);
    let tables = "SELECT count(*) FROM sqlite_schema";
    let tables: i64 = connection.query_row(tables, [], |row| row.get(0)).map_err(failed)?;
    let (owner, version) = (number("application_id")?, number("user_version")?);
    if owner != i64::from(APPLICATION_ID) && (tables > 0 || owner != 0) {
        let what = format!("it is a SQLite file of another program, with {tables} tables and indexes");
        return Err(OpenError::Foreign { path: path.to_owned(), what });
    }
    if version > VERSION {
        return Err(OpenError::Newer { path: path.to_owned(), found: version });
    }
    Ok(())
}

fn check_whole(path: &Path, connection: &Connection) -> Result<(), OpenError> {
    let check = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0));
    match check {
        Ok(said) if said == "ok" => Ok(()),
        Ok(said) => Err(OpenError::Corrupt { path: path.to_owned(), detail: said }),
        Err(error) => Err(refused(path, &error)),
    }
}

/// How it is written from now on. FULL: a commit is on the disk before it is answered, also if the power fails.
fn prepare(connection: &mut Connection) -> rusqlite::Result<()> {
    connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get::<_, String>(0))?;
    connection.pragma_update(None, "synchronous", "full")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection
        .pragma_update_and_check(None, "journal_size_limit", WAL_KEPT_BYTES, |row| row.get::<_, i64>(0))?;
    schema::migrate(connection)
}

fn refused(path: &Path, error: &rusqlite::Error) -> OpenError {
    let (path, detail) = (path.to_owned(), error.to_string());
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => OpenError::Corrupt { path, detail },
        Some(
            ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::DiskFull,
        ) => OpenError::Unwritable { path, source: io::Error::other(detail) },
        _ => OpenError::Failed { path, detail },
    }
}
