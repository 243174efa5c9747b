//! The engine for code without an async runtime.

use futures::StreamExt;
use futures::executor::block_on;

use super::{Engine, PromptLogits, TokenStream};
use crate::{Chunk, Completion, Error, Request};

/// [`Engine`] with calls that wait. Not to be used on a thread of an async runtime, whose other tasks would wait too.
#[derive(Debug, Clone)]
pub struct Blocking {
    engine: Engine,
}

impl Blocking {
    pub(super) fn new(engine: Engine) -> Self {
        Self { engine }
    }

    /// Goes on from a prompt: an iterator over chunks, each waited for.
    pub fn generate(&self, request: impl Into<Request>) -> BlockingTokens {
        BlockingTokens { stream: self.engine.generate(request) }
    }

    /// The same, unless too many requests wait.
    ///
    /// # Errors
    /// [`Error::QueueFull`].
    pub fn try_generate(&self, request: impl Into<Request>) -> Result<BlockingTokens, Error> {
        Ok(BlockingTokens { stream: self.engine.try_generate(request)? })
    }

    /// Waits for a whole continuation.
    ///
    /// # Errors
    /// Those of [`TokenStream::complete`].
    pub fn complete(&self, request: impl Into<Request>) -> Result<Completion, Error> {
        block_on(self.engine.generate(request).complete())
    }

    /// See [`Engine::prompt_logits`].
    ///
    /// # Errors
    /// Those of [`Engine::prompt_logits`].
    pub fn prompt_logits(&self, tokens: impl Into<Vec<u32>>) -> Result<PromptLogits, Error> {
        block_on(self.engine.prompt_logits(tokens))
    }

    /// See [`Engine::shutdown`].
    pub fn shutdown(&self) {
        block_on(self.engine.shutdown());
    }
}

/// The tokens of one request, waited for one by one. Dropping it cancels the request.
#[must_use = "dropping a `BlockingTokens` cancels its request"]
#[derive(Debug)]
pub struct BlockingTokens {
    stream: TokenStream,
}

impl Iterator for BlockingTokens {
    type Item = Result<Chunk, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        block_on(self.stream.next())
    }
}
