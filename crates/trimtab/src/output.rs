//! Text for people and for scripts.

use std::io::Write as _;

use crate::failure::Failure;

/// Writes to stdout and flushes, so that a reader at the other end of a pipe sees it at once.
///
/// # Errors
/// When stdout is closed or full.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// Columns aligned by what is in them; a column named with a `>` in front is aligned to the right.
#[derive(Debug)]
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns and no rows.
    pub fn new(columns: &[&str]) -> Self {
        let right = columns.iter().map(|name| name.starts_with('>')).collect();
        let names = columns.iter().map(|name| name.trim_start_matches('>').to_owned()).collect();
        Self { right, rows: vec![names] }
    }

    /// Adds a row; it has as many cells as the table has columns.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().map(|cell| printable(&cell)).collect();
        assert_eq!(cells.len(), self.right.len(), "one cell for each column");
        self.rows.push(cells);
    }

    /// The text, each line ended.
    pub fn render(&self) -> String {
        let widths: Vec<usize> = (0..self.right.len())
            .map(|column| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), right) in row.iter().zip(&widths).zip(&self.right) {
                let padding = " ".repeat(width - cell.chars().count());
                let (before, after) = if *right { (&*padding, "") } else { ("", &*padding) };
                line.push_str(before);
                line.push_str(cell);
                line.push_str(after);
                line.push_str("  ");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// Text of a peer, without what would steer the terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_not_padded() {
        let mut table = Table::new(&["NAME", ">COUNT", "NOTE"]);
        table.row(["a".into(), "1".into(), String::new()]);
        table.row(["müde".into(), "12345".into(), "x\u{1b}[31m".into()]);
        assert_eq!(table.render(), "NAME  COUNT  NOTE\na         1\nmüde  12345  x\u{fffd}[31m\n");
    }
}
