//! Expressions over metrics: a small part of PromQL, for single numbers.
//!
//! ```text
//! expression = term (("+" | "-") term)*        term = factor (("*" | "/") factor)*
//! factor     = number | "(" expression ")" | "-" factor | vector | fold "(" vector ")"
//! fold       = sum | count | avg | min | max
//! vector     = (selector | "rate" "(" selector ")") [">" number]      only the series above it, as in PromQL
//! selector   = name ["{" label ("=" | "!=" | "=~" | "!~") "text", … "}"]
//! ```
//!
//! A vector on its own must be one series: with several, which one is meant is not for us to guess. `rate` is a counter's
//! growth a second since the last page; a counter that went backwards began anew at 0. Whatever a page does not have makes
//! the whole expression have no value (`None`), as does a division by 0; neither is an error.

use std::collections::HashMap;
use std::time::Duration;

use regex_lite::{Regex, RegexBuilder};

use crate::prometheus::{Sample, is_name, quoted};

/// How deep parentheses and signs may be nested.
const DEPTH_MAX: usize = 32;
/// Most matchers of one selector.
const MATCHERS_MAX: usize = 16;
/// Memory of one compiled pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 64 * 1024;

/// One expression.
#[derive(Debug, Clone)]
pub(crate) enum Expression {
    Number(f64),
    Vector(Fold, Vector),
    Binary(Operator, Box<Self>, Box<Self>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
}

/// What makes one number of a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fold {
    /// There must be one.
    Only,
    Sum,
    Count,
    Average,
    Least,
    Most,
}

/// Series, as they are or as they grow.
#[derive(Debug, Clone)]
pub(crate) struct Vector {
    pub(crate) name: String,
    matchers: Vec<Matcher>,
    is_rate: bool,
    /// Only the series above it.
    above: Option<f64>,
}

#[derive(Debug, Clone)]
struct Matcher {
    label: String,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Is(String),
    IsNot(String),
    Fits(Regex),
    FitsNot(Regex),
}

/// Counters of the last page, by series.
pub(crate) type Counters = HashMap<String, f64>;

/// What an expression is evaluated over.
pub(crate) struct Scene<'s> {
    pub(crate) samples: &'s [Sample<'s>],
    /// Of the last page; `None`: this is the first.
    pub(crate) before: Option<(&'s Counters, Duration)>,
    /// What `rate` needs to know of this page.
    pub(crate) counters: &'s mut Counters,
}

/// Several series where one is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ambiguous {
    pub(crate) name: String,
    pub(crate) count: usize,
}

impl Expression {
    /// Parses all of `text`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut parser = Parser { text, rest: text, depth: 0 };
        let expression = parser.expression()?;
        parser.skip_spaces();
        if parser.rest.is_empty() { Ok(expression) } else { Err(parser.expected("an operator or the end")) }
    }

    /// Its value; `None`: the page does not have it.
    pub(crate) fn value(&self, scene: &mut Scene<'_>) -> Result<Option<f64>, Ambiguous> {
        let value = match self {
            Self::Number(number) => Some(*number),
            Self::Vector(fold, vector) => fold.apply(&vector.name, vector.values(scene))?,
            Self::Binary(operator, left, right) => {
                // Both, always: each has counters to remember.
                let (left, right) = (left.value(scene)?, right.value(scene)?);
                left.zip(right).map(|(left, right)| operator.apply(left, right))
            }
        };
        Ok(value.filter(|value| value.is_finite()))
    }
}

impl Operator {
    fn apply(self, left: f64, right: f64) -> f64 {
        match self {
            Self::Add => left + right,
            Self::Subtract => left - right,
            Self::Multiply => left * right,
            Self::Divide => left / right,
        }
    }
}

impl Fold {
    fn apply(self, name: &str, values: Vec<f64>) -> Result<Option<f64>, Ambiguous> {
        let count = values.len();
        if count == 0 {
            return Ok(None);
        }
        let sum = values.iter().sum::<f64>();
        Ok(Some(match self {
            Self::Only if count > 1 => return Err(Ambiguous { name: name.to_owned(), count }),
            Self::Only | Self::Sum => sum,
            Self::Count => count as f64,
            Self::Average => sum / count as f64,
            Self::Least => values.into_iter().fold(f64::INFINITY, f64::min),
            Self::Most => values.into_iter().fold(f64::NEG_INFINITY, f64::max),
        }))
    }
}

impl Vector {
    fn values(&self, scene: &mut Scene<'_>) -> Vec<f64> {
        let mut values = Vec::new();
        for sample in scene.samples {
            if sample.name != self.name || !self.matchers.iter().all(|matcher| matcher.meets(sample)) {
                continue;
            }
            if !self.is_rate {
                self.keep(sample.value, &mut values);
                continue;
            }
            let series = series(sample);
            if let Some((before, elapsed)) = scene.before
                && let Some(was) = before.get(&series)
            {
                let grown = if sample.value < *was { sample.value } else { sample.value - was };
                self.keep(grown / elapsed.as_secs_f64(), &mut values);
            }
            scene.counters.insert(series, sample.value);
        }
        values
    }

    fn keep(&self, value: f64, values: &mut Vec<f64>) {
        if self.above.is_none_or(|above| value > above) {
            values.push(value);
        }
    }
}

impl Matcher {
    fn meets(&self, sample: &Sample<'_>) -> bool {
        let value = sample.label(&self.label);
        match &self.test {
            Test::Is(text) => value == text,
            Test::IsNot(text) => value != text,
            Test::Fits(pattern) => pattern.is_match(value),
            Test::FitsNot(pattern) => !pattern.is_match(value),
        }
    }
}

/// A name for a series that no other has, whatever the order of its labels.
fn series(sample: &Sample<'_>) -> String {
    let mut labels: Vec<_> = sample.labels.iter().map(|(key, value)| format!("{key}={value:?}")).collect();
    labels.sort_unstable();
    format!("{}{{{}}}", sample.name, labels.join(","))
}

struct Parser<'t> {
    text: &'t str,
    rest: &'t str,
    depth: usize,
}

impl<'t> Parser<'t> {
    fn expression(&mut self) -> Result<Expression, String> {
        let mut left = self.term()?;
        loop {
            let operator = match self.peek() {
                Some('+') => Operator::Add,
                Some('-') => Operator::Subtract,
                _ => return Ok(left),
            };
            self.rest = &self.rest[1..];
            left = Expression::Binary(operator, Box::new(left), Box::new(self.term()?));
        }
    }

    fn term(&mut self) -> Result<Expression, String> {
        let mut left = self.factor()?;
        loop {
            let operator = match self.peek() {
                Some('*') => Operator::Multiply,
                Some('/') => Operator::Divide,
                _ => return Ok(left),
            };
            self.rest = &self.rest[1..];
            left = Expression::Binary(operator, Box::new(left), Box::new(self.factor()?));
        }
    }

    fn factor(&mut self) -> Result<Expression, String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(format!("it is nested deeper than {DEPTH_MAX}"));
        }
        let factor = match self.peek() {
            Some('(') => {
                self.take('(')?;
                let inner = self.expression()?;
                self.take(')')?;
                inner
            }
            Some('-') => {
                self.take('-')?;
                let negative = Box::new(self.factor()?);
                Expression::Binary(Operator::Subtract, Box::new(Expression::Number(0.0)), negative)
            }
            Some(c) if c.is_ascii_digit() || c == '.' => self.number()?,
            Some(c) if is_name(c) => self.named()?,
            _ => return Err(self.expected("a number, a metric or a parenthesis")),
        };
        self.depth -= 1;
        Ok(factor)
    }

    fn number(&mut self) -> Result<Expression, String> {
        let plain = |c: char| c.is_ascii_digit() || matches!(c, '.' | '_');
        let mut end = self.rest.find(|c| !plain(c)).unwrap_or(self.rest.len());
        if self.rest[end..].starts_with(['e', 'E']) {
            let exponent = &self.rest[end + 1..];
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            let signs = exponent.len() - digits.len();
            end += 1 + signs + digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        }
        let (number, rest) = self.rest.split_at(end);
        let parsed: f64 = number.replace('_', "").parse().map_err(|_| self.expected("a number"))?;
        self.rest = rest;
        Ok(Expression::Number(parsed))
    }

    fn named(&mut self) -> Result<Expression, String> {
        let fold = match (self.name(), self.peek()) {
            ("sum", Some('(')) => Fold::Sum,
            ("count", Some('(')) => Fold::Count,
            ("avg", Some('(')) => Fold::Average,
            ("min", Some('(')) => Fold::Least,
            ("max", Some('(')) => Fold::Most,
            (name, _) => return Ok(Expression::Vector(Fold::Only, self.vector(name)?)),
        };
        self.take('(')?;
        let name = self.name();
        let vector = self.vector(name)?;
        self.take(')')?;
        Ok(Expression::Vector(fold, vector))
    }

    fn vector(&mut self, name: &str) -> Result<Vector, String> {
        if name == "rate" && self.peek() == Some('(') {
            self.take('(')?;
            let name = self.name();
            let selector = self.selector(name)?;
            self.take(')')?;
            return self.above(Vector { is_rate: true, ..selector });
        }
        let selector = self.selector(name)?;
        self.above(selector)
    }

    fn above(&mut self, vector: Vector) -> Result<Vector, String> {
        if self.peek() != Some('>') {
            return Ok(vector);
        }
        self.take('>')?;
        self.skip_spaces();
        match self.number()? {
            Expression::Number(number) => Ok(Vector { above: Some(number), ..vector }),
            _ => Err(self.expected("a number")),
        }
    }

    fn selector(&mut self, name: &str) -> Result<Vector, String> {
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(self.expected("the name of a metric"));
        }
        if self.peek() == Some('(') {
            return Err(format!("there is no {name}(); there are sum, count, avg, min, max and rate"));
        }
        let mut matchers = Vec::new();
        if self.peek() == Some('{') {
            self.take('{')?;
            while self.peek() != Some('}') {
                if matchers.len() == MATCHERS_MAX {
                    return Err(format!("{name} has more than {MATCHERS_MAX} matchers"));
                }
                matchers.push(self.matcher()?);
                if self.peek() == Some(',') {
                    self.take(',')?;
                }
            }
            self.take('}')?;
        }
        Ok(Vector { name: name.to_owned(), matchers, is_rate: false, above: None })
    }

    fn matcher(&mut self) -> Result<Matcher, String> {
        let label = self.name().to_owned();
        if label.is_empty() {
            return Err(self.expected("a label"));
        }
        self.skip_spaces();
        let Some(operator) = ["=~", "!~", "!=", "="].into_iter().find(|o| self.rest.starts_with(o)) else {
            return Err(self.expected("=, !=, =~ or !~"));
        };
        self.rest = &self.rest[operator.len()..];
        self.take('"')?;
        let (text, rest) = quoted(self.rest).ok_or_else(|| self.expected("a closing quote"))?;
        self.rest = rest;
        let test = match operator {
            "=" => Test::Is(text.into_owned()),
            "!=" => Test::IsNot(text.into_owned()),
            "=~" => Test::Fits(pattern(&text)?),
            _ => Test::FitsNot(pattern(&text)?),
        };
        Ok(Matcher { label, test })
    }

    fn name(&mut self) -> &'t str {
        self.skip_spaces();
        let end = self.rest.find(|c| !is_name(c)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        name
    }

    fn take(&mut self, wanted: char) -> Result<(), String> {
        self.skip_spaces();
        self.rest = self.rest.strip_prefix(wanted).ok_or_else(|| self.expected(&format!("{wanted:?}")))?;
        Ok(())
    }

    fn peek(&mut self) -> Option<char> {
        self.skip_spaces();
        self.rest.chars().next()
    }

    fn skip_spaces(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn expected(&self, what: &str) -> String {
        let at = self.text.len() - self.rest.len();
        let found = self.rest.trim_start().chars().next();
        match found {
            Some(found) => format!("at {}: {what} is expected, not {found:?}", at + 1),
            None => format!("at its end: {what} is expected"),
        }
    }
}

/// Fits the whole value, as in PromQL.
fn pattern(text: &str) -> Result<Regex, String> {
    let whole = RegexBuilder::new(&format!("^(?:{text})$")).size_limit(PATTERN_BYTES_MAX).build();
    whole.map_err(|error| format!("the pattern {text:?}: {error}"))
}
