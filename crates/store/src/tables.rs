//! The tables within one transaction: what changes are made of. The functions are in the module of each table.

use rusqlite::{Connection, Params, Row};

use crate::StoreError;

/// Every table of the store, within a transaction that somebody else begins and commits.
#[derive(Debug)]
pub struct Tables<'a> {
    connection: &'a Connection,
}

impl<'a> Tables<'a> {
    pub(crate) fn of(connection: &'a Connection) -> Self {
        Self { connection }
    }

    /// How many rows it changed.
    pub(crate) fn execute(&self, sql: &str, parameters: impl Params) -> Result<usize, StoreError> {
        Ok(self.connection.prepare_cached(sql)?.execute(parameters)?)
    }

    /// The first row, if there is one.
    pub(crate) fn first<T>(
        &self,
        sql: &str,
        parameters: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>, StoreError> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let mut rows = statement.query(parameters)?;
        Ok(rows.next()?.map(read).transpose()?)
    }

    pub(crate) fn all<T>(
        &self,
        sql: &str,
        parameters: impl Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let rows = statement.query_map(parameters, read)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Bounds the file to so many pages, as a disk would that has no more room; gives how many there are. For tests of what is
    /// done then.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn limit_pages(&self, most: Option<u64>) -> Result<u64, StoreError> {
        if let Some(most) = most {
            self.connection.query_row(&format!("PRAGMA max_page_count({most})"), [], |_| Ok(()))?;
        }
        Ok(self.connection.pragma_query_value(None, "page_count", |row| row.get::<_, i64>(0))? as u64)
    }

    pub(crate) fn key_of(&self, id: &str) -> Result<Option<i64>, StoreError> {
        self.first("SELECT key FROM resources WHERE id = ?1", [id], |row| row.get(0))
    }
}
