//! The SDK's error.

use crate::request::RequestError;
use crate::text::{TemplateError, TokenizerError};

/// Why the SDK could not do what it was asked.
///
/// Errors are cheap to clone: what stops an engine is told to each of its requests.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request cannot be served by this model, or says what makes no sense.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The tokenizer could not be loaded, or failed on a text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template gave no prompt.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// As many requests wait as may.
    #[error("the queue is full: {max} requests are waiting")]
    QueueFull {
        /// The most requests that may wait.
        max: usize,
    },
    /// The engine was shut down.
    #[error("the engine has shut down")]
    Closed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_can_be_sent_shared_and_cloned() {
        fn assert_handle<T: Clone + Send + Sync + 'static>() {}
        assert_handle::<Error>();
    }

    #[test]
    fn engine_errors_say_what_happened() {
        assert_eq!(Error::QueueFull { max: 8 }.to_string(), "the queue is full: 8 requests are waiting");
        assert_eq!(Error::Closed.to_string(), "the engine has shut down");
    }
}
