//! The SDK's error.

use std::path::PathBuf;
use std::sync::Arc;

use dashinfer_kernels::KernelError;
use dashinfer_models::{CheckpointError, ConfigError, ForwardError, LoadError, WeightsError};

use crate::request::RequestError;
use crate::scheduler::SchedulerError;
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
    /// There is no such folder.
    #[error("there is no model folder {path}{hint}")]
    NoSuchModel {
        /// Where it was looked for.
        path: PathBuf,
        /// What may have been meant.
        hint: &'static str,
    },
    /// The config describes no model that can be run.
    #[error(transparent)]
    Config(Arc<ConfigError>),
    /// The files of weights cannot be read.
    #[error(transparent)]
    Checkpoint(Arc<CheckpointError>),
    /// The weights are not those that the config describes.
    #[error(transparent)]
    Weights(Arc<WeightsError>),
    /// Packed weights were to be kept in a folder, and it cannot be written.
    #[error("cannot write to the weight cache {}", path.display())]
    WeightCache {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// The memory limit leaves no room for one sequence.
    #[error(
        "a memory limit of {limit} bytes is too small: {needed} are needed, {fixed} for weights and activations and the rest \
         for one sequence of {context} tokens (a smaller context needs less)"
    )]
    MemoryLimit {
        /// What may be taken.
        limit: u64,
        /// The least that must be taken.
        needed: u64,
        /// The part of it that does not depend on the context.
        fixed: u64,
        /// The most tokens of a sequence.
        context: usize,
    },
    /// The KV cache has no room for one sequence.
    #[error(
        "a KV cache of {found} bytes is too small: one sequence of {context} tokens takes {needed} (a smaller context needs \
         less)"
    )]
    KvCacheTooSmall {
        /// What it may take.
        found: u64,
        /// The least that it must take.
        needed: u64,
        /// The most tokens of a sequence.
        context: usize,
    },
    /// A setting under which nothing could run.
    #[error("setting `{name}` is {found}, wanted {wanted}")]
    Setting {
        /// The builder's method.
        name: &'static str,
        /// What it was given.
        found: usize,
        /// What it takes.
        wanted: &'static str,
    },
    /// The device refused: no memory, no such thread or core.
    #[error(transparent)]
    Device(#[from] KernelError),
    /// A fault of the engine itself, not of the request.
    #[error("internal error: {message}")]
    Internal {
        /// What was found.
        message: Arc<str>,
    },
}

impl Error {
    pub(crate) fn internal(message: &str) -> Self {
        Self::Internal { message: message.into() }
    }
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        Self::Config(Arc::new(error))
    }
}

impl From<CheckpointError> for Error {
    fn from(error: CheckpointError) -> Self {
        Self::Checkpoint(Arc::new(error))
    }
}

impl From<WeightsError> for Error {
    fn from(error: WeightsError) -> Self {
        Self::Weights(Arc::new(error))
    }
}

impl From<LoadError> for Error {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Config(error) => error.into(),
            LoadError::Weights(error) => error.into(),
            LoadError::Kernel(error) => error.into(),
            LoadError::WeightCache { path, source } => Self::WeightCache { path, source: Arc::new(source) },
            other => Self::internal(&other.to_string()),
        }
    }
}

impl From<ForwardError> for Error {
    fn from(error: ForwardError) -> Self {
        match error {
            ForwardError::Kernel(error) => error.into(),
            other => Self::internal(&other.to_string()),
        }
    }
}

impl From<SchedulerError> for Error {
    fn from(error: SchedulerError) -> Self {
        // Requests and settings were checked before the scheduler saw them.
        Self::internal(&error.to_string())
    }
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
