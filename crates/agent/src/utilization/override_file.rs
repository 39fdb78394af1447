//! What somebody else says about the utilization, in a file: it stands above what was measured.
//!
//! Its form is [`formats::Document`]; here is only how it is read.

use std::io::{self, Read};
use std::path::Path;

use formats::{DocumentError, TEXT_BYTES_MAX};

pub use formats::Document as Override;

/// Why the file is ignored. The operator, or whatever writes it, can mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverrideError {
    /// It is there and cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
    /// It is not as documented.
    #[error(transparent)]
    Document(#[from] DocumentError),
}

/// Reads the file; one that is not there overrides nothing.
///
/// # Errors
/// When it is there and is not as documented.
pub fn read_override(path: &Path) -> Result<Override, OverrideError> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Override::default()),
        Err(error) => return Err(error.into()),
    };
    let mut text = Vec::new();
    // One byte more than it may have: then it is too long.
    file.take(TEXT_BYTES_MAX as u64 + 1).read_to_end(&mut text)?;
    Ok(Override::parse(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_there_overrides_nothing_and_one_without_end_is_refused() {
        assert_eq!(read_override(Path::new("/nonexistent/utilization.json")).unwrap(), Override::default());
        let error = read_override(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.to_string(), "is longer than 65536 bytes");
        assert!(matches!(read_override(Path::new("/proc")), Err(OverrideError::Unreadable(_))));
    }
}
