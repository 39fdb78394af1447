//! What is wrong with something a person wrote, and what to write instead: the one shape of such messages in
//! configuration files and on the command line.

use std::fmt;

/// One problem with one value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong, as one sentence without a full stop.
    pub message: String,
    /// What to write instead.
    pub hint: String,
}

impl Problem {
    /// A problem and its remedy.
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.hint)
    }
}

impl std::error::Error for Problem {}

/// The candidate that `text` most likely was meant to be, if any is near enough to be a slip of the keyboard.
pub fn nearest<'c>(text: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    // One slip in three characters; more and the suggestion is a guess.
    let slips_max = (text.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (edit_distance(text, candidate), candidate))
        .filter(|(distance, _)| *distance <= slips_max)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours between two texts.
fn edit_distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let width = b.len() + 1;
    let mut cost = vec![0; (a.len() + 1) * width];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            cost[i * width + j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = cost[(i - 1) * width + j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let mut least = replaced.min(cost[(i - 1) * width + j] + 1).min(cost[i * width + j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    least = least.min(cost[(i - 2) * width + j - 2] + 1);
                }
                least
            };
        }
    }
    cost[a.len() * width + b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_found_and_guesses_are_not() {
        let keys = ["listen", "insecure", "policy", "pool"];
        for (written, meant) in [
            ("listen", Some("listen")),
            ("listn", Some("listen")),
            ("liste_n", Some("listen")),
            ("pol", Some("pool")),
            ("ploicy", Some("policy")),
            ("port", None),
            ("x", None),
        ] {
            assert_eq!(nearest(written, keys), meant, "for {written:?}");
        }
    }
}
