//! Requirements: what a resource must be or be able to do to get a flow.
//!
//! ```text
//! tls                 the label is there, and is not "false"
//! role=writer         it has this value
//! zone!=b             it has another value, or is not there
//! version>=16.2       it is there, and compares so; also <= > <
//! ```
//!
//! * `version` is the version of the registration, unless there is a label of that name.
//! * Order goes by the components between dots and dashes: as numbers where both are whole numbers, else as text, and
//!   0 where one side has no more of them (2 is 2.0, and 16.1-debian comes after 16.1). So 0.5 comes before 0.25, as
//!   in versions: write fractions with equally many digits.
//! * Everything is canonical: what displays equal is equal, so [`Requirements`] may key a map.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::labels::LABEL_BYTES_MAX;
use crate::{ENTRIES_MAX, KeyFault, is_key_character, key_fault};

/// The key that stands for the registration's version.
const VERSION: &str = "version";
/// How much of a wrong text an error repeats, in characters.
const QUOTED_MAX: usize = 64;

/// What a label must be. Values are never empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Test {
    /// There, and not `false`.
    Present,
    /// This value.
    Equal(Box<str>),
    /// Another value, or not there.
    NotEqual(Box<str>),
    /// There, and this or after it.
    AtLeast(Box<str>),
    /// There, and this or before it.
    AtMost(Box<str>),
    /// There, and after this.
    Above(Box<str>),
    /// There, and before this.
    Below(Box<str>),
}

/// One requirement. It can only be had by parsing, so its key is a name and its value is within its bounds.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requirement {
    key: Box<str>,
    test: Test,
}

/// Why a text is no requirement: the fault of whoever wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequirementError {
    /// Its key is no name.
    #[error(
        "the key of the requirement {text:?} {fault}; write for example tls, role=writer or version>=16.2"
    )]
    Key {
        /// The text, shortened.
        text: String,
        /// What is wrong with it.
        fault: KeyFault,
    },
    /// What follows the key is no comparison.
    #[error(
        "in the requirement {text:?} the key is followed by no comparison; write for example {key}=writer, with one of = != >= <= > <"
    )]
    Comparison {
        /// The text, shortened.
        text: String,
        /// Its key.
        key: String,
    },
    /// There is no value after the comparison.
    #[error("the requirement {text:?} has no value; write {key} if it only has to be there, or {key}=VALUE")]
    NoValue {
        /// The text, shortened.
        text: String,
        /// Its key.
        key: String,
    },
    /// The value is too long.
    #[error(
        "the value that is required of {key} is {length} bytes long; labels have at most {LABEL_BYTES_MAX}: write a shorter one"
    )]
    ValueLength {
        /// Its key.
        key: String,
        /// Its length in bytes.
        length: usize,
    },
    /// The value has a character that would be misread.
    #[error(
        "the value that is required of {key} has the character {found:?}; write it without commas, control characters and a leading =, and each requirement by itself"
    )]
    ValueCharacter {
        /// Its key.
        key: String,
        /// The first such character.
        found: char,
    },
    /// More requirements than [`ENTRIES_MAX`].
    #[error("{count} requirements are more than the {ENTRIES_MAX} there may be: require fewer")]
    Count {
        /// How many.
        count: usize,
    },
}

impl Requirement {
    /// The label's key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What the label must be.
    pub fn test(&self) -> &Test {
        &self.test
    }

    /// Whether a resource with these labels and this version of its registration (empty: it has none) meets it.
    pub fn met_by(&self, labels: &BTreeMap<String, String>, version: &str) -> bool {
        let own_version = (&*self.key == VERSION && !version.is_empty()).then_some(version);
        let found = labels.get(&*self.key).map(String::as_str).or(own_version);
        let ordered = |bound: &str, holds: fn(Ordering) -> bool| {
            found.is_some_and(|value| holds(compare_versions(value, bound)))
        };
        match &self.test {
            Test::Present => found.is_some_and(|value| value != "false"),
            Test::Equal(wanted) => found == Some(wanted),
            Test::NotEqual(unwanted) => found != Some(unwanted),
            Test::AtLeast(bound) => ordered(bound, Ordering::is_ge),
            Test::AtMost(bound) => ordered(bound, Ordering::is_le),
            Test::Above(bound) => ordered(bound, Ordering::is_gt),
            Test::Below(bound) => ordered(bound, Ordering::is_lt),
        }
    }
}

impl FromStr for Requirement {
    type Err = RequirementError;

    /// Blanks around the key and the value do not count.
    fn from_str(text: &str) -> Result<Self, RequirementError> {
        let trimmed = text.trim();
        let key_end = trimmed.find(|c| !is_key_character(c)).unwrap_or(trimmed.len());
        let (key, rest) = trimmed.split_at(key_end);
        let rest = rest.trim_start();
        if let Some(fault) = key_fault(key) {
            // A text that begins with something else is told of that character rather than of an empty key.
            let fault = match rest.chars().next() {
                Some(found) if key.is_empty() && !"=<>".contains(found) => KeyFault::Character { found },
                _ => fault,
            };
            return Err(RequirementError::Key { text: quoted(trimmed), fault });
        }
        if rest.is_empty() {
            return Ok(Self { key: key.into(), test: Test::Present });
        }
        let Some((test, value)) = comparison(rest) else {
            return Err(RequirementError::Comparison { text: quoted(trimmed), key: key.to_owned() });
        };
        let value = value.trim();
        if value.is_empty() {
            return Err(RequirementError::NoValue { text: quoted(trimmed), key: key.to_owned() });
        }
        check_value(key, value)?;
        Ok(Self { key: key.into(), test: test(value.into()) })
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        match &self.test {
            Test::Present => f.write_str(key),
            Test::Equal(value) => write!(f, "{key}={value}"),
            Test::NotEqual(value) => write!(f, "{key}!={value}"),
            Test::AtLeast(value) => write!(f, "{key}>={value}"),
            Test::AtMost(value) => write!(f, "{key}<={value}"),
            Test::Above(value) => write!(f, "{key}>{value}"),
            Test::Below(value) => write!(f, "{key}<{value}"),
        }
    }
}

/// A set of requirements, all of which must be met: sorted, each once. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requirements(Arc<[Requirement]>);

impl Default for Requirements {
    /// None: everyone meets it.
    fn default() -> Self {
        Self(Arc::new([]))
    }
}

impl Requirements {
    /// Parses each text.
    ///
    /// # Errors
    /// The first that is no requirement, or that there are more than [`ENTRIES_MAX`].
    pub fn from_texts<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> Result<Self, RequirementError> {
        let mut all = Vec::new();
        let mut count = 0;
        for text in texts {
            count += 1;
            if count <= ENTRIES_MAX {
                all.push(text.as_ref().parse()?);
            }
        }
        if count > ENTRIES_MAX {
            return Err(RequirementError::Count { count });
        }
        Ok(all.into_iter().collect())
    }

    /// Both sets. It may have more than [`ENTRIES_MAX`] entries, but no more than the two together.
    pub fn and(&self, other: &Self) -> Self {
        match (self.is_empty(), other.is_empty()) {
            (_, true) => self.clone(),
            (true, _) => other.clone(),
            _ => self.0.iter().chain(other.0.iter()).cloned().collect(),
        }
    }

    /// The first requirement that a resource with these labels and this version (empty: none) does not meet.
    pub fn unmet_by(&self, labels: &BTreeMap<String, String>, version: &str) -> Option<&Requirement> {
        self.0.iter().find(|requirement| !requirement.met_by(labels, version))
    }

    /// Whether a resource with these labels and this version (empty: none) meets all of them.
    pub fn met_by(&self, labels: &BTreeMap<String, String>, version: &str) -> bool {
        self.unmet_by(labels, version).is_none()
    }

    /// Each requirement, sorted.
    pub fn iter(&self) -> impl Iterator<Item = &Requirement> {
        self.0.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether everyone meets it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Requirement> for Requirements {
    fn from_iter<I: IntoIterator<Item = Requirement>>(requirements: I) -> Self {
        let mut all: Vec<_> = requirements.into_iter().collect();
        all.sort_unstable();
        all.dedup();
        Self(all.into())
    }
}

impl fmt::Display for Requirements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        for (n, requirement) in self.0.iter().enumerate() {
            write!(f, "{}{requirement}", if n > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

/// Makes a test of its value.
type MakeTest = fn(Box<str>) -> Test;

/// The comparison a text begins with, and what follows it.
fn comparison(text: &str) -> Option<(MakeTest, &str)> {
    // The longer first: `>` begins `>=` too.
    let all: [(&str, MakeTest); 6] = [
        ("!=", Test::NotEqual),
        (">=", Test::AtLeast),
        ("<=", Test::AtMost),
        ("=", Test::Equal),
        (">", Test::Above),
        ("<", Test::Below),
    ];
    all.into_iter().find_map(|(sign, test)| Some((test, text.strip_prefix(sign)?)))
}

fn check_value(key: &str, value: &str) -> Result<(), RequirementError> {
    if value.len() > LABEL_BYTES_MAX {
        return Err(RequirementError::ValueLength { key: key.to_owned(), length: value.len() });
    }
    // `a=>1` and `a==1` are slips; a comma would end the requirement where several are shown.
    let leading = value.chars().next().filter(|c| matches!(c, '=' | '<' | '>'));
    match leading.or_else(|| value.chars().find(|c| *c == ',' || c.is_control())) {
        Some(found) => Err(RequirementError::ValueCharacter { key: key.to_owned(), found }),
        None => Ok(()),
    }
}

fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Order of versions; see the module's head.
pub(crate) fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.split(['.', '-']), b.split(['.', '-']));
    loop {
        let (x, y) = match (a.next(), b.next()) {
            (None, None) => return Ordering::Equal,
            (x, y) => (x.unwrap_or("0"), y.unwrap_or("0")),
        };
        let order = compare_components(x, y);
        if order.is_ne() {
            return order;
        }
    }
}

fn compare_components(a: &str, b: &str) -> Ordering {
    let numeric = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if numeric(a) && numeric(b) {
        // However many digits: without leading zeros the longer number is the larger one.
        let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
        return a.len().cmp(&b.len()).then_with(|| a.cmp(b));
    }
    a.cmp(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn labels(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
        entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn met(requirement: &str, entries: &[(&str, &str)], version: &str) -> bool {
        requirement.parse::<Requirement>().unwrap().met_by(&labels(entries), version)
    }

    #[test]
    fn each_comparison_means_what_it_says() {
        let own = [("role", "writer"), ("tls", "true"), ("ftp", "false"), ("cores", "16"), ("bare", "")];
        for (text, expected) in [
            ("tls", true),
            ("bare", true),
            ("ftp", false),
            ("absent", false),
            ("role=writer", true),
            ("role=write", false),
            ("absent=x", false),
            ("role!=reader", true),
            ("role!=writer", false),
            ("absent!=x", true),
            ("cores>=16", true),
            ("cores>=9", true),
            ("cores>16", false),
            ("cores<100", true),
            ("cores<=15", false),
            ("absent<100", false),
            ("absent>=0", false),
        ] {
            assert_eq!(met(text, &own, ""), expected, "{text}");
        }
    }

    #[test]
    fn version_is_the_registrations_unless_a_label_says_otherwise() {
        assert!(met("version>=16.2", &[], "16.10"));
        assert!(met("version", &[], "16.10"));
        assert!(!met("version>=16.2", &[], ""), "no version meets no order");
        assert!(!met("version", &[], ""));
        assert!(met("version!=2", &[], ""));
        assert!(!met("version>=16.2", &[("version", "15")], "16.10"));
    }

    #[test]
    fn versions_compare_by_their_components() {
        use Ordering::{Equal, Greater, Less};
        for (a, b, expected) in [
            ("1.9", "1.10", Less),
            ("2", "2.0", Equal),
            ("2.0.1", "2", Greater),
            ("1.9-3", "1.9-12", Less),
            ("16.1-debian", "16.1", Greater),
            ("1.a", "1.b", Less),
            ("007", "7", Equal),
            ("99999999999999999999999999", "100000000000000000000000000", Less),
            ("", "0", Less),
        ] {
            assert_eq!(compare_versions(a, b), expected, "{a} {b}");
            assert_eq!(compare_versions(b, a), expected.reverse(), "{b} {a}");
        }
    }

    #[test]
    fn errors_say_what_to_write() {
        let error = |text: &str| text.parse::<Requirement>().unwrap_err().to_string();
        assert_eq!(
            error("tls yes"),
            "in the requirement \"tls yes\" the key is followed by no comparison; write for example tls=writer, \
             with one of = != >= <= > <"
        );
        assert_eq!(
            error("role="),
            "the requirement \"role=\" has no value; write role if it only has to be there, or role=VALUE"
        );
        assert!(error("").contains("is empty"));
        assert!(error("=x").contains("is empty"));
        assert!(error("~tls").contains("'~'"));
        assert!(error("a==b").contains("'='"));
        assert!(error("a=>1").contains("'>'"));
        assert!(error("a=b,c").contains("','"));
        assert!(error(&format!("{}=1", "k".repeat(65))).contains("65 bytes"));
        assert!(error(&format!("k={}", "v".repeat(257))).contains("257 bytes"));
        let many = (0..65).map(|n| format!("k{n}"));
        assert_eq!(Requirements::from_texts(many), Err(RequirementError::Count { count: 65 }));
    }

    #[test]
    fn a_set_is_sorted_and_has_each_once() {
        let set = Requirements::from_texts([" tls ", "role = writer", "tls"]).unwrap();
        assert_eq!(set.to_string(), "role=writer, tls");
        assert_eq!(set, Requirements::from_texts(["tls", "role=writer"]).unwrap());
        assert_eq!(Requirements::default().to_string(), "none");
        assert!(Requirements::default().met_by(&BTreeMap::new(), ""));
        let both = set.and(&Requirements::from_texts(["a", "tls"]).unwrap());
        assert_eq!(both.to_string(), "a, role=writer, tls");
        assert_eq!((both.len(), set.and(&Requirements::default())), (3, set.clone()));
        let unmet = set.unmet_by(&labels(&[("role", "writer")]), "").unwrap();
        assert_eq!(unmet.to_string(), "tls");
    }

    /// Texts that are mostly requirements.
    fn text() -> impl Strategy<Value = String> {
        prop_oneof!["[a-c./:_-]{1,4}( ?(=|!=|>=|<=|<|>) ?[a-c0-9.!=-]{1,4})?", "\\PC{0,12}"]
    }

    proptest! {
        #[test]
        fn what_parses_displays_as_what_parses_the_same(text in text()) {
            match text.parse::<Requirement>() {
                Ok(parsed) => prop_assert_eq!(parsed.to_string().parse::<Requirement>(), Ok(parsed)),
                Err(error) => prop_assert!(error.to_string().len() < 600),
            }
        }

        #[test]
        fn both_sets_are_met_where_each_is(
            a in prop::collection::vec("[a-c](=[xy]|!=[xy]|>[0-2])?", 0..4),
            b in prop::collection::vec("[a-c](=[xy]|!=[xy]|>[0-2])?", 0..4),
            own in prop::collection::btree_map("[a-c]", "[xy012]", 0..4),
        ) {
            let (a, b) = (Requirements::from_texts(&a).unwrap(), Requirements::from_texts(&b).unwrap());
            prop_assert_eq!(a.and(&b), b.and(&a));
            prop_assert_eq!(a.and(&b).met_by(&own, ""), a.met_by(&own, "") && b.met_by(&own, ""));
        }

        #[test]
        fn order_is_antisymmetric(a in "[0-9a-b.-]{0,6}", b in "[0-9a-b.-]{0,6}") {
            prop_assert_eq!(compare_versions(&a, &b), compare_versions(&b, &a).reverse());
        }
    }
}
