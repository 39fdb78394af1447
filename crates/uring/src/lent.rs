//! A descriptor for as long as an engine has operations on it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

/// A descriptor that an operation in flight uses after the borrow it was submitted with has ended.
///
/// As with [`crate::Ring`], its owner closes it through the engine and in no other way, and the engine lets go of what is
/// lent before it closes. Whoever breaks that makes system calls on a descriptor that is closed or somebody else's: the same
/// mistake as a submission on it.
#[derive(Debug)]
pub struct Lent(RawFd);

impl Lent {
    /// Keeps the descriptor's number.
    pub fn new(file: BorrowedFd<'_>) -> Self {
        Self(file.as_raw_fd())
    }
}

impl AsFd for Lent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open: it was borrowed when this was made, and its owner gives it to the engine to close,
        // which drops this first. It is not -1, for it was a `BorrowedFd`.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}
