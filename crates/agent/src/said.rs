//! What was said already: a message is worth a line in the log once, not at each try.

use std::collections::HashSet;

/// Distinct messages that are remembered. A peer that invents a new one each time is logged this often, then no more.
const MESSAGES_MAX: usize = 16;

/// Messages that were said.
#[derive(Debug, Default)]
pub(crate) struct Said {
    messages: HashSet<String>,
}

impl Said {
    /// Whether `message` was not said yet; from now on it was.
    pub(crate) fn is_new(&mut self, message: &str) -> bool {
        self.messages.len() < MESSAGES_MAX && self.messages.insert(message.to_owned())
    }

    /// All is well again: whatever comes next is news.
    pub(crate) fn forget(&mut self) {
        self.messages.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_message_once_and_only_so_many() {
        let mut said = Said::default();
        assert!(said.is_new("a") && said.is_new("b") && !said.is_new("a"));
        let new = (0..100).filter(|n| said.is_new(&n.to_string())).count();
        assert_eq!(new, MESSAGES_MAX - 2);
        said.forget();
        assert!(said.is_new("a"));
    }
}
