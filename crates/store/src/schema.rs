//! The tables, and how a file of an older version gets them. `docs/store.md` describes them for people.
//!
//! A file says what it is by `application_id` and which layout it has by `user_version`. Each step from one layout to the
//! next is a function of its own, run once in a transaction of its own, and never changed after a release.

use rusqlite::{Connection, Transaction};

/// `application_id` of our files: "TrTb".
pub const APPLICATION_ID: i32 = 0x5472_5462;

type Migration = fn(&Transaction<'_>) -> rusqlite::Result<()>;

/// The step from layout `n` to `n + 1` is at place `n`.
const MIGRATIONS: [Migration; 3] = [resources_and_settings, notices, tokens];

/// The layout of this version.
pub const VERSION: i64 = MIGRATIONS.len() as i64;

/// Brings a file from its layout to [`VERSION`].
pub(crate) fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    migrate_to(connection, VERSION)
}

fn migrate_to(connection: &mut Connection, version: i64) -> rusqlite::Result<()> {
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    for (from, migration) in (0..version).zip(&MIGRATIONS).filter(|(from, _)| *from >= found) {
        let transaction = connection.transaction()?;
        migration(&transaction)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", from + 1)?;
        transaction.commit()?;
    }
    Ok(())
}

fn resources_and_settings(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute_batch(
        "
        CREATE TABLE resources (
            key                INTEGER PRIMARY KEY,
            id                 TEXT    NOT NULL UNIQUE,
            pool               TEXT    NOT NULL,
            incarnation        INTEGER NOT NULL,  -- 64 bits; above 2^63 it looks negative
            version            TEXT    NOT NULL,
            flows_max          INTEGER NOT NULL,
            weight             REAL    NOT NULL,
            report_interval_ms INTEGER NOT NULL,
            ready              INTEGER NOT NULL CHECK (ready IN (0, 1)),    -- by its newest report
            drained            INTEGER NOT NULL CHECK (drained IN (0, 1)),  -- by an operator
            registered_ms      INTEGER NOT NULL,
            owner              TEXT               -- whose it is; NULL: nobody's in particular
        ) STRICT;

        CREATE TABLE addresses (
            resource INTEGER NOT NULL REFERENCES resources (key) ON DELETE CASCADE,
            kind     TEXT    NOT NULL CHECK (kind IN ('service', 'probe')),
            address  TEXT    NOT NULL,
            PRIMARY KEY (resource, kind)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE labels (
            resource INTEGER NOT NULL REFERENCES resources (key) ON DELETE CASCADE,
            key      TEXT    NOT NULL,
            value    TEXT    NOT NULL,
            PRIMARY KEY (resource, key)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE scripts (
            resource      INTEGER NOT NULL REFERENCES resources (key) ON DELETE CASCADE,
            kind          TEXT    NOT NULL CHECK (kind IN ('utilization', 'notification')),
            specification BLOB    NOT NULL,  -- the message as it came, or a URL
            PRIMARY KEY (resource, kind)
        ) STRICT, WITHOUT ROWID;

        -- The averages that weights are made of, as of the newest report.
        CREATE TABLE estimates (
            resource      INTEGER PRIMARY KEY REFERENCES resources (key) ON DELETE CASCADE,
            reported_ms   INTEGER NOT NULL,
            operations    REAL,               -- NULL: it never reported any
            flows_opened  REAL    NOT NULL,
            flows_open    REAL    NOT NULL,
            errors        REAL    NOT NULL,
            utilization   REAL    NOT NULL,
            log_weight    REAL    NOT NULL
        ) STRICT;

        -- In this order of the key, what is written each second is side by side: a few pages, however many resources.
        CREATE TABLE history (
            tier_ms  INTEGER NOT NULL,
            start_ms INTEGER NOT NULL,
            resource INTEGER NOT NULL REFERENCES resources (key) ON DELETE CASCADE,
            buckets  BLOB    NOT NULL,
            PRIMARY KEY (tier_ms, start_ms, resource)
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX history_of_resource ON history (resource);

        -- By id and not by key: operators enter them before a resource joins.
        CREATE TABLE capabilities (
            id    TEXT NOT NULL,
            key   TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (id, key)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE version_settings (
            pool           TEXT NOT NULL,
            version        TEXT NOT NULL,
            configured     REAL NOT NULL,  -- its share in the file when this was set
            share          REAL NOT NULL,
            abort_measure  TEXT,           -- NULL: not aborted
            abort_value    REAL,
            abort_baseline REAL,
            PRIMARY KEY (pool, version)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE events (
            number   INTEGER PRIMARY KEY AUTOINCREMENT,
            at_ms    INTEGER NOT NULL,
            kind     TEXT    NOT NULL,
            resource TEXT,
            pool     TEXT,
            detail   TEXT    NOT NULL
        ) STRICT;
        ",
    )
}

fn notices(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute_batch(
        "
        CREATE TABLE notices (
            number       INTEGER PRIMARY KEY,  -- older ones have smaller ones
            id           TEXT    NOT NULL UNIQUE,
            kind         TEXT    NOT NULL
                         CHECK (kind IN ('balancer_unavailable', 'withdrawn', 'shut_down', 'shed_flows')),
            target       TEXT    NOT NULL CHECK (target IN ('all', 'pool', 'resource')),
            target_name  TEXT             CHECK ((target_name IS NULL) = (target = 'all')),
            at_ms        INTEGER NOT NULL,
            lasts_ms     INTEGER,          -- NULL: nobody knows
            flows        INTEGER NOT NULL,
            alternatives TEXT    NOT NULL, -- one a line
            reason       TEXT    NOT NULL,
            withdraws    TEXT,             -- the id of the notice that does not hold any more
            created_ms   INTEGER NOT NULL,
            withdrawn    INTEGER NOT NULL CHECK (withdrawn IN (0, 1))
        ) STRICT;

        -- By id and not by key: who has left and comes back is not told again what it has taken.
        CREATE TABLE notice_outcomes (
            notice       INTEGER NOT NULL REFERENCES notices (number) ON DELETE CASCADE,
            resource     TEXT    NOT NULL,
            told         INTEGER NOT NULL CHECK (told IN (0, 1)),
            taken        INTEGER NOT NULL CHECK (taken IN (0, 1)),
            failure      TEXT,             -- NULL: it did not say that it cannot
            hook         TEXT    NOT NULL CHECK (hook IN ('none', 'waiting', 'taken')),
            attempts     INTEGER NOT NULL, -- posts to its hook that failed
            hook_failure TEXT    NOT NULL,
            changed_ms   INTEGER NOT NULL,
            PRIMARY KEY (notice, resource)
        ) STRICT, WITHOUT ROWID;
        ",
    )
}

fn tokens(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute_batch(
        "
        CREATE TABLE tokens (
            id         TEXT    PRIMARY KEY,
            hash       BLOB    NOT NULL CHECK (length(hash) = 32),  -- SHA-256 of 256 random bits
            role       TEXT    NOT NULL CHECK (role IN ('resource', 'admin')),
            created_ms INTEGER NOT NULL,
            expires_ms INTEGER NOT NULL,
            uses_max   INTEGER CHECK (uses_max > 0),  -- NULL: any number
            revoked    INTEGER NOT NULL CHECK (revoked IN (0, 1))
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE token_pools (
            token TEXT NOT NULL REFERENCES tokens (id) ON DELETE CASCADE,
            pool  TEXT NOT NULL,
            PRIMARY KEY (token, pool)
        ) STRICT, WITHOUT ROWID;

        CREATE TABLE token_cidrs (
            token TEXT NOT NULL REFERENCES tokens (id) ON DELETE CASCADE,
            cidr  TEXT NOT NULL,
            PRIMARY KEY (token, cidr)
        ) STRICT, WITHOUT ROWID;

        -- By id and not by key: a resource that has left was a use all the same.
        CREATE TABLE token_uses (
            token    TEXT NOT NULL REFERENCES tokens (id) ON DELETE CASCADE,
            resource TEXT NOT NULL,
            PRIMARY KEY (token, resource)
        ) STRICT, WITHOUT ROWID;
        ",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(connection: &Connection) -> Vec<(String, String)> {
        let mut all = connection
            .prepare("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name")
            .unwrap();
        all.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn every_older_layout_becomes_the_newest_and_keeps_its_rows() {
        let mut fresh = Connection::open_in_memory().unwrap();
        migrate(&mut fresh).unwrap();
        for older in 0..=VERSION {
            let mut connection = Connection::open_in_memory().unwrap();
            migrate_to(&mut connection, older).unwrap();
            if older > 0 {
                let insert =
                    "INSERT INTO resources VALUES (7, 'pg1', 'sql', 1, '', 0, 1.0, 1000, 1, 0, 5, NULL)";
                connection.execute(insert, []).unwrap();
            }
            migrate(&mut connection).unwrap();
            migrate(&mut connection).unwrap();
            assert_eq!(layout(&connection), layout(&fresh), "from {older}");
            let number = |what: &str| -> i64 { connection.query_row(what, [], |row| row.get(0)).unwrap() };
            assert_eq!(number("SELECT count(*) FROM resources"), i64::from(older > 0));
            assert_eq!(number("PRAGMA user_version"), VERSION);
            assert_eq!(number("PRAGMA application_id"), i64::from(APPLICATION_ID));
        }
    }

    #[test]
    fn a_step_that_fails_leaves_nothing_behind() {
        let mut connection = Connection::open_in_memory().unwrap();
        connection.execute_batch("CREATE TABLE tokens (x)").unwrap();
        assert!(migrate(&mut connection).is_err());
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
        assert_eq!(version, 2, "the steps before it stand, its own does not");
        assert!(!layout(&connection).iter().any(|(name, _)| name == "token_cidrs"));
    }
}
