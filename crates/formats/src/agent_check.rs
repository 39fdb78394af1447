//! HAProxy's agent-check: one line of text that says how a server wants to be treated.
//!
//! Source: HAProxy's configuration manual (2.6), section 5.2, `agent-check`: words separated by spaces, tabs or commas, in
//! any order and any case, ended by the first CR or LF; the text after a `#` is a description. A state lasts until another
//! line changes it: `drain` and `maint` until `ready`, `down`, `fail` and `stopped` until `up`.
//!
//! One word that is none and the whole line is refused: half of what it says might mean something else.

use std::fmt;

/// Longest line that is looked at.
pub const LINE_BYTES_MAX: usize = 1024;
/// Longest description that is kept.
const REASON_CHARS_MAX: usize = 128;
/// A weight beyond it is a slip of the keyboard; HAProxy takes up to 256 and scales percents from them.
const PERCENT_MAX: u32 = 10_000;
/// HAProxy's largest weight.
const WEIGHT_MAX: u32 = 256;

/// What one line says. What it does not mention stays as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line {
    /// `75%` or `weight:75%`: of the registered weight. `weight:N`: instead of it.
    pub weight: Option<Weight>,
    /// `maxconn:N`.
    pub maxconn: Option<u32>,
    /// `ready`, `drain`, `maint`.
    pub admin: Option<Admin>,
    /// `up`, or `down`, `fail`, `stopped`.
    pub health: Option<Health>,
    /// The text after `#`.
    pub reason: String,
}

/// How much a server wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// Of its configured (here: registered) weight.
    Percent(u32),
    /// Instead of it, 0 to 256.
    Absolute(u32),
}

/// What the server's administrator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Admin {
    /// New flows.
    #[default]
    Ready,
    /// No new ones; open ones may end.
    Drain,
    /// No flows at all.
    Maint,
}

/// What the server says of its service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Health {
    /// It serves.
    #[default]
    Up,
    /// It does not.
    Down,
    /// A check of its own failed.
    Fail,
    /// Somebody stopped it.
    Stopped,
}

/// Why a line is none. Always the fault of whoever wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// There is no word in it.
    #[error("the line is empty; it takes words such as: up ready 75%")]
    Empty,
    /// It does not end.
    #[error("the line is longer than {LINE_BYTES_MAX} bytes")]
    TooLong,
    /// It has a word that means nothing.
    #[error("{word:?} is none of N%, weight:N, maxconn:N, ready, drain, maint, up, down, fail, stopped")]
    Word {
        /// The first such word, cut.
        word: String,
    },
}

impl Line {
    /// Reads what came, up to the first CR or LF.
    ///
    /// # Errors
    /// See [`LineError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, LineError> {
        let end = bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(bytes.len());
        if end > LINE_BYTES_MAX {
            return Err(LineError::TooLong);
        }
        let text = String::from_utf8_lossy(&bytes[..end]);
        let (words, reason) = text.split_once('#').unwrap_or((&text, ""));
        let printable = |c: &char| !c.is_control();
        let reason: String = reason.trim().chars().filter(printable).take(REASON_CHARS_MAX).collect();
        let mut line = Self { reason, ..Self::default() };
        let words = words.split([' ', '\t', ',']).filter(|word| !word.is_empty());
        let mut is_empty = true;
        for word in words {
            is_empty = false;
            line.take(word).ok_or_else(|| LineError::Word { word: word.chars().take(32).collect() })?;
        }
        if is_empty { Err(LineError::Empty) } else { Ok(line) }
    }

    fn take(&mut self, word: &str) -> Option<()> {
        let lower = word.to_ascii_lowercase();
        match lower.as_str() {
            "ready" => self.admin = Some(Admin::Ready),
            "drain" => self.admin = Some(Admin::Drain),
            "maint" => self.admin = Some(Admin::Maint),
            "up" => self.health = Some(Health::Up),
            "down" => self.health = Some(Health::Down),
            "fail" => self.health = Some(Health::Fail),
            "stopped" => self.health = Some(Health::Stopped),
            _ => {
                if let Some(count) = lower.strip_prefix("maxconn:") {
                    self.maxconn = Some(number(count, u32::MAX)?);
                } else {
                    self.weight = Some(weight(&lower)?);
                }
            }
        }
        Some(())
    }
}

fn weight(word: &str) -> Option<Weight> {
    let named = word.strip_prefix("weight:");
    match named.unwrap_or(word).strip_suffix('%') {
        Some(percent) => Some(Weight::Percent(number(percent, PERCENT_MAX)?)),
        None => Some(Weight::Absolute(number(named?, WEIGHT_MAX)?)),
    }
}

/// Digits alone: no sign, no space.
fn number(text: &str, most: u32) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten().filter(|number| *number <= most)
}

/// What a server wants by all its lines so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// Of the registered weight, or instead of it; `None`: the registered one.
    pub weight: Option<Weight>,
    /// Most connections; `None`: as registered.
    pub maxconn: Option<u32>,
    /// What its administrator wants.
    pub admin: Admin,
    /// What it says of its service.
    pub health: Health,
    /// The description of the last line.
    pub reason: String,
}

impl Wish {
    /// Takes in one more line.
    pub fn hear(&mut self, line: Line) {
        self.weight = line.weight.or(self.weight);
        self.maxconn = line.maxconn.or(self.maxconn);
        self.admin = line.admin.unwrap_or(self.admin);
        self.health = line.health.unwrap_or(self.health);
        self.reason = line.reason;
    }

    /// Whether it wants new flows: up, neither drained nor in maintenance, and of a weight above 0.
    pub fn is_ready(&self) -> bool {
        let wants_none = matches!(self.weight, Some(Weight::Percent(0) | Weight::Absolute(0)));
        self.admin == Admin::Ready && self.health == Health::Up && !wants_none
    }

    /// The weight it wants, where `registered` is what it has; at least a thousandth, for [`Wish::is_ready`] says no at 0.
    pub fn weight_of(&self, registered: f32) -> f32 {
        let wanted = match self.weight {
            None => registered,
            // Both are far below 2^24: exact.
            Some(Weight::Percent(percent)) => registered * percent as f32 / 100.0,
            Some(Weight::Absolute(weight)) => weight as f32,
        };
        wanted.clamp(0.001, 1000.0)
    }
}

impl fmt::Display for Wish {
    /// In HAProxy's words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let health = match self.health {
            Health::Up => "up",
            Health::Down => "down",
            Health::Fail => "fail",
            Health::Stopped => "stopped",
        };
        let admin = match self.admin {
            Admin::Ready => "ready",
            Admin::Drain => "drain",
            Admin::Maint => "maint",
        };
        write!(f, "{health} {admin}")?;
        match self.weight {
            Some(Weight::Percent(percent)) => write!(f, " {percent}%")?,
            Some(Weight::Absolute(weight)) => write!(f, " weight:{weight}")?,
            None => {}
        }
        if let Some(maxconn) = self.maxconn {
            write!(f, " maxconn:{maxconn}")?;
        }
        if !self.reason.is_empty() {
            write!(f, " #{}", self.reason)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_word_and_every_separator() {
        let line = Line::parse(b"UP,Ready\t75%  maxconn:30\r\nmaint").unwrap();
        assert_eq!(line.weight, Some(Weight::Percent(75)));
        assert_eq!((line.maxconn, line.admin, line.health), (Some(30), Some(Admin::Ready), Some(Health::Up)));
        let weight = |text: &str| Line::parse(text.as_bytes()).unwrap().weight;
        assert_eq!(weight("weight:12"), Some(Weight::Absolute(12)));
        assert_eq!(weight("weight:12%"), Some(Weight::Percent(12)));
        for (word, admin) in [("drain", Admin::Drain), ("maint", Admin::Maint)] {
            assert_eq!(Line::parse(word.as_bytes()).unwrap().admin, Some(admin));
        }
        for (word, health) in [("down", Health::Down), ("fail", Health::Fail), ("stopped", Health::Stopped)] {
            let line = Line::parse(format!("{word} #disk is full, sorry\nup").as_bytes()).unwrap();
            assert_eq!((line.health, line.reason.as_str()), (Some(health), "disk is full, sorry"));
        }
    }

    #[test]
    fn what_is_no_line_is_said() {
        let said = |text: &[u8]| Line::parse(text).unwrap_err().to_string();
        assert!(said(b"").starts_with("the line is empty"));
        assert!(said(b"\nup").starts_with("the line is empty"));
        assert!(said(b" #only a reason").starts_with("the line is empty"));
        for wrong in
            ["75", "-5%", "+5%", "7 5 %", "%", "maxconn:", "maxconn:-1", "weight:257", "HTTP/1.1", "upp"]
        {
            assert!(said(wrong.as_bytes()).contains("is none of N%"), "{wrong}");
        }
        assert_eq!(said(&[b'u'; LINE_BYTES_MAX + 1]), "the line is longer than 1024 bytes");
        assert!(said(&[0xff, 0xfe]).contains("is none of"));
    }

    #[test]
    fn states_last_until_another_line_changes_them() {
        let mut wish = Wish::default();
        let mut hear = |text: &str| {
            wish.hear(Line::parse(text.as_bytes()).unwrap());
            (wish.is_ready(), wish.weight_of(2.0), wish.maxconn, wish.to_string())
        };
        assert_eq!(hear("up 50% maxconn:7"), (true, 1.0, Some(7), "up ready 50% maxconn:7".into()));
        assert_eq!(hear("drain"), (false, 1.0, Some(7), "up drain 50% maxconn:7".into()));
        assert!(!hear("up").0, "up does not end a drain");
        assert!(hear("ready").0);
        assert_eq!(hear("down #disk").3, "down ready 50% maxconn:7 #disk");
        assert!(!hear("ready").0, "ready does not heal");
        assert!(hear("up").0);
        assert!(!hear("maint").0 && hear("ready").0);
        assert!(!hear("0%").0, "a weight of 0 takes nothing new");
        assert_eq!(hear("weight:100"), (true, 100.0, Some(7), "up ready weight:100 maxconn:7".into()));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(percent in 0_u32..=10_000, maxconn in proptest::option::of(any::<u32>()), bits in 0_u8..12) {
            let admin = [Admin::Ready, Admin::Drain, Admin::Maint][usize::from(bits % 3)];
            let health = [Health::Up, Health::Down, Health::Fail, Health::Stopped][usize::from(bits / 3)];
            let wish = Wish { weight: Some(Weight::Percent(percent)), maxconn, admin, health, reason: "why".into() };
            let mut read = Wish::default();
            read.hear(Line::parse(wish.to_string().as_bytes()).unwrap());
            prop_assert_eq!(read, wish);
        }

        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Line::parse(&bytes);
        }
    }
}
