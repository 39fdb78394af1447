//! Reading a spanned TOML tree while collecting every problem with its place.
//!
//! Owns: places, types of values, which keys were asked for (and so which ones are unknown).
//! Does not own: what the keys mean.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::problem::{Problem, nearest};

use super::ConfigError;

/// One pass over one file.
pub(super) struct Reader<'t> {
    text: &'t str,
    /// Byte offset and problem.
    found: Vec<(usize, Problem)>,
    /// Lines that do not parse: what else is wrong there follows from that, and is not reported.
    broken_lines: BTreeSet<usize>,
    /// Full names of all keys that were asked for.
    asked: BTreeSet<String>,
}

impl<'t> Reader<'t> {
    /// A reader of `text` that already found that it does not parse at these places.
    pub(super) fn new(text: &'t str, syntax_errors: &[toml::de::Error]) -> Self {
        let mut reader =
            Self { text, found: Vec::new(), broken_lines: BTreeSet::new(), asked: BTreeSet::new() };
        for error in syntax_errors {
            let at = error.span().map_or(0, |span| span.start);
            reader.found.push((at, Problem::new(error.message(), syntax_hint(error.message()))));
        }
        reader.broken_lines = reader.found.iter().map(|(at, _)| place(text, *at).0).collect();
        reader
    }

    /// The outermost table.
    pub(super) fn root<'r>(&'r mut self, table: &'t DeTable<'t>) -> Section<'r, 't> {
        Section { reader: self, path: String::new(), table: Some(table), at: 0, known: Vec::new() }
    }

    /// Notes a problem at a byte offset.
    pub(super) fn report(&mut self, at: usize, problem: Problem) {
        if !self.broken_lines.contains(&place(self.text, at).0) {
            self.found.push((at, problem));
        }
    }

    /// Line of a byte offset, counted from 1.
    pub(super) fn line(&self, at: usize) -> usize {
        place(self.text, at).0
    }

    /// Whether the file does not parse: then what seems to be missing may only be unreadable.
    pub(super) fn is_broken(&self) -> bool {
        !self.broken_lines.is_empty()
    }

    /// Full names of all keys that were asked for, as `control.listen`.
    #[cfg(test)]
    pub(super) fn asked(&self) -> &BTreeSet<String> {
        &self.asked
    }

    /// Everything found, by place.
    pub(super) fn into_errors(mut self) -> Vec<ConfigError> {
        self.found.sort_by_key(|(at, _)| *at);
        let errors = self.found.into_iter().map(|(at, problem)| {
            let (line, column) = place(self.text, at);
            ConfigError { line, column, message: problem.message, hint: problem.hint }
        });
        errors.collect()
    }
}

/// One table of the file, or one that the file leaves out.
pub(super) struct Section<'r, 't> {
    reader: &'r mut Reader<'t>,
    /// `control`, or empty for the root.
    path: String,
    table: Option<&'t DeTable<'t>>,
    /// Byte offset of its header.
    at: usize,
    /// Every key that was asked for.
    known: Vec<&'static str>,
}

impl<'t> Section<'_, 't> {
    /// Its name: `control`.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Whether the file has it.
    pub(super) fn is_there(&self) -> bool {
        self.table.is_some()
    }

    /// Whether the file has `key` in it, good or not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    /// Notes a problem of it as a whole.
    pub(super) fn report_here(&mut self, problem: Problem) {
        self.reader.report(self.at, problem);
    }

    /// The reader, to report what concerns more than one value.
    pub(super) fn reader(&mut self) -> &mut Reader<'t> {
        self.reader
    }

    /// Notes a problem of the whole table.
    pub(super) fn report(&mut self, problem: Problem) {
        self.reader.report(self.at, problem);
    }

    /// The value of `key`, or `None` when it is not there or is reported as wrong.
    pub(super) fn value<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&DeValue<'t>) -> Result<T, Problem>,
    ) -> Option<Spanned<T>> {
        let value = self.find(key)?;
        match parse(value.get_ref()) {
            Ok(parsed) => Some(Spanned::new(value.span(), parsed)),
            Err(mut problem) => {
                problem.message = format!("`{}`: {}", self.name_of(key), problem.message);
                self.reader.report(value.span().start, problem);
                None
            }
        }
    }

    /// The value of `key`, which must be there.
    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        example: &str,
        parse: impl FnOnce(&DeValue<'t>) -> Result<T, Problem>,
    ) -> Option<Spanned<T>> {
        if self.table.is_some_and(|table| !table.contains_key(key)) {
            let problem =
                Problem::new(format!("`{}` is missing", self.name_of(key)), format!("add {key} = {example}"));
            self.reader.report(self.at, problem);
        }
        self.value(key, parse)
    }

    /// The table `[key]`; one without values when the file leaves it out.
    pub(super) fn section(&mut self, key: &'static str) -> Section<'_, 't> {
        let found = self.find(key);
        let path = self.name_of(key);
        let (table, at) = match found.map(|value| (value.get_ref(), value.span().start)) {
            Some((DeValue::Table(table), at)) => (Some(table), at),
            Some((other, at)) => {
                let problem = Problem::new(
                    format!("`{path}` is {}, not a table", with_article(other)),
                    format!("write [{path}] on a line of its own, and its keys below it"),
                );
                self.reader.report(at, problem);
                (None, at)
            }
            None => (None, 0),
        };
        Section { reader: self.reader, path, table, at, known: Vec::new() }
    }

    /// Calls `each` for every `[[key]]`, in order. False when some could not be read.
    pub(super) fn list(&mut self, key: &'static str, mut each: impl FnMut(Section<'_, 't>)) -> bool {
        let Some(value) = self.find(key) else { return true };
        let path = self.name_of(key);
        let DeValue::Array(entries) = value.get_ref() else {
            let problem = Problem::new(
                format!("`{path}` is {}, not a list of tables", with_article(value.get_ref())),
                format!("write [[{path}]], with two brackets, for each"),
            );
            self.reader.report(value.span().start, problem);
            return false;
        };
        let mut all = true;
        for entry in entries {
            if let DeValue::Table(table) = entry.get_ref() {
                let at = entry.span().start;
                each(Section {
                    reader: self.reader,
                    path: path.clone(),
                    table: Some(table),
                    at,
                    known: Vec::new(),
                });
            } else {
                let problem = Problem::new(
                    format!("`{path}` is {}, not a table", with_article(entry.get_ref())),
                    format!("write [[{path}]] on a line of its own, and its keys below it"),
                );
                self.reader.report(entry.span().start, problem);
                all = false;
            }
        }
        all
    }

    /// Reports every key that nobody asked for. `later` are those that a later version has.
    pub(super) fn finish(self, later: &[&str]) {
        for (key, _) in self.table.into_iter().flatten() {
            let name = key.get_ref().as_ref();
            if self.known.contains(&name) {
                continue;
            }
            let full = if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) };
            let problem = if later.contains(&name) {
                Problem::new(
                    format!("`{full}` is not supported by this version"),
                    "remove it; it comes in a later release",
                )
            } else {
                let hint = match nearest(name, self.known.iter().copied()) {
                    Some(meant) => format!("did you mean `{meant}`?"),
                    None => format!("there are {}", self.known.join(", ")),
                };
                Problem::new(format!("there is no key `{full}`"), hint)
            };
            self.reader.report(key.span().start, problem);
        }
    }

    fn find(&mut self, key: &'static str) -> Option<&'t Spanned<DeValue<'t>>> {
        let full = self.name_of(key);
        self.known.push(key);
        self.reader.asked.insert(full);
        let value = self.table?.get(key)?;
        // The parser fills holes that it reported with empty places.
        let is_hole = value.span().is_empty();
        (!is_hole).then_some(value)
    }

    fn name_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

/// A parser of texts.
pub(super) fn text<T, E: Into<Problem>>(
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> impl FnOnce(&DeValue<'_>) -> Result<T, Problem> {
    move |value| match value {
        DeValue::String(text) => parse(text).map_err(Into::into),
        DeValue::Integer(number) => {
            // Quotes alone may not do: a duration needs its unit, too.
            let quoted: Option<Problem> = parse(number.as_str()).err().map(Into::into);
            let hint = quoted.map_or_else(|| format!("write it in quotes: \"{number}\""), |wrong| wrong.hint);
            Err(Problem::new("this is an integer, not a text", hint))
        }
        other => Err(Problem::new(
            format!("this is {}, not a text", with_article(other)),
            "write a text in quotes: \"…\"",
        )),
    }
}

/// A parser of lists of texts.
pub(super) fn texts<T>(
    parse: impl Fn(&str) -> Result<T, Problem>,
) -> impl FnOnce(&DeValue<'_>) -> Result<Vec<T>, Problem> {
    move |value| match value {
        DeValue::Array(values) => values.iter().map(|value| text(&parse)(value.get_ref())).collect(),
        other => Err(Problem::new(
            format!("this is {}, not a list", with_article(other)),
            "write a list of texts: [\"…\", \"…\"]",
        )),
    }
}

/// A parser of whole numbers in a range.
pub(super) fn integer<T: TryFrom<u64>>(
    range: RangeInclusive<u64>,
) -> impl FnOnce(&DeValue<'_>) -> Result<T, Problem> {
    move |value| {
        let hint =
            || format!("write a whole number from {} to {}, without quotes", range.start(), range.end());
        let DeValue::Integer(number) = value else {
            return Err(Problem::new(format!("this is {}, not an integer", with_article(value)), hint()));
        };
        u64::from_str_radix(number.as_str(), number.radix())
            .ok()
            .filter(|number| range.contains(number))
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| Problem::new(format!("{number} is out of range"), hint()))
    }
}

/// A parser of numbers in a range, with or without a point.
pub(super) fn decimal(range: RangeInclusive<f64>) -> impl FnOnce(&DeValue<'_>) -> Result<f64, Problem> {
    move |value| {
        let hint = || format!("write a number from {} to {}, without quotes", range.start(), range.end());
        let (shown, parsed) = match value {
            DeValue::Integer(number) => {
                let whole = i64::from_str_radix(number.as_str(), number.radix());
                (number.to_string(), whole.ok().map(|whole| whole as f64))
            }
            DeValue::Float(number) => (number.to_string(), number.as_str().parse::<f64>().ok()),
            _ => return Err(Problem::new(format!("this is {}, not a number", with_article(value)), hint())),
        };
        let in_range = parsed.filter(|number| range.contains(number));
        in_range.ok_or_else(|| Problem::new(format!("{shown} is out of range"), hint()))
    }
}

/// A parser of `true` and `false`.
pub(super) fn boolean(value: &DeValue<'_>) -> Result<bool, Problem> {
    value.as_bool().ok_or_else(|| {
        Problem::new(
            format!("this is {}, not true or false", with_article(value)),
            "write true or false, without quotes",
        )
    })
}

fn with_article(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a decimal number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// What to do about a message of the TOML parser.
fn syntax_hint(message: &str) -> &'static str {
    if message.contains("duplicate key") {
        "remove one of the two; each entry of a list needs its own [[…]] line"
    } else if message.contains("unquoted key") {
        "a key is of A-Z a-z 0-9 _ and -"
    } else if message.contains("string") || message.contains("quot") {
        "a text stands in quotes, on one line: key = \"text\""
    } else {
        "a line is [table], [[entry of a list]] or key = value; a value is \"text\", 12, true or false"
    }
}

/// Line and column of a byte offset, counted from 1, columns in characters.
pub(super) fn place(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}
