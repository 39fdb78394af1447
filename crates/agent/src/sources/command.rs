//! A command that prints our JSON.

use std::time::Duration;

use formats::Document;

use crate::command::{self, Output};

/// Runs it once.
pub(super) async fn run(command: &str, within: Duration) -> Result<Document, String> {
    let said = command::run(command, b"", Output::Wanted, within).await?;
    Document::parse(&said).map_err(|error| format!("what the command printed {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITHIN: Duration = Duration::from_secs(20);

    async fn fails(command: &str, within: Duration) -> String {
        run(command, within).await.unwrap_err()
    }

    #[tokio::test]
    async fn what_it_prints_is_a_document() {
        let document = run(r#"echo '{"cpu": 0.5, "utilization": {"queue": 0.25}}'"#, WITHIN).await.unwrap();
        assert_eq!((document.cpu, document.utilization["queue"]), (Some(0.5), 0.25));
    }

    #[tokio::test]
    async fn why_it_failed_is_said() {
        assert_eq!(
            fails("echo no such queue >&2; exit 3", WITHIN).await,
            "the command ended with exit status: 3: no such queue"
        );
        assert!(
            fails("echo nonsense", WITHIN).await.starts_with("what the command printed is not as expected")
        );
        assert!(fails("yes", WITHIN).await.starts_with("the command printed more than 65536 bytes"));
        // Much on standard error alone does not block it for ever either.
        assert!(fails("yes >&2", WITHIN).await.starts_with("the command ended with "));
    }
}
