//! The thread in front of the engine's: it renders chats, tokenizes and checks requests, so that neither the caller's executor
//! nor the step loop waits for a long text.

use std::sync::{Arc, mpsc};
use std::time::Instant;

use super::step_loop::{Command, NewRequest};
use super::stream::Writer;
use super::{ModelInfo, PromptLogits};
use crate::{Error, GenerationDefaults, ModelFacts, Prompt, Request, RequestError, Resolved, SpecialTokens, Tokenizer};
use tokio::sync::oneshot;

/// What handles send.
#[derive(Debug)]
pub(super) enum Call {
    /// Generate; answers go to the writer.
    Generate { request: Box<Request>, writer: Writer, arrived: Instant },
    /// Compute the logits of every position of these tokens.
    PromptLogits { tokens: Vec<u32>, answer: oneshot::Sender<Result<PromptLogits, Error>> },
    /// Take no more calls.
    Close,
}

/// What requests are checked against.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    /// See [`RequestError::UnreadTokenizer`].
    pub(super) unread_tokenizer: Option<&'static str>,
    pub(super) defaults: GenerationDefaults,
    pub(super) model: ModelInfo,
}

struct CloseOnDrop<'a>(&'a mpsc::Sender<Command>);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        // Without an engine there is nothing to close.
        let _ = self.0.send(Command::Close);
    }
}

impl Front {
    /// The life of the thread: until all handles are gone or one of them closes the engine.
    pub(super) fn run(&self, calls: &mpsc::Receiver<Call>, steps: &mpsc::Sender<Command>) {
        // Also when this thread panics: the step loop must not wait for requests that cannot come.
        let _close = CloseOnDrop(steps);
        for call in calls {
            match call {
                Call::Close => break,
                Call::Generate { writer, .. } if writer.is_closed() => {}
                Call::Generate { request, writer, arrived } => match self.resolve(&request) {
                    Ok(resolved) => {
                        let detokenizer = self.tokenizer.as_ref().map(|tokenizer| {
                            let mut detokenizer = tokenizer.detokenizer(SpecialTokens::Without);
                            // A chat's answer is a text of its own; anything else goes on from the prompt's.
                            if !matches!(request.prompt, Prompt::Chat(_)) {
                                detokenizer.skip(&resolved.prompt);
                            }
                            detokenizer
                        });
                        let new = NewRequest { resolved, writer, arrived, detokenizer };
                        if let Err(mpsc::SendError(Command::Generate(new))) =
                            steps.send(Command::Generate(Box::new(new)))
                        {
                            new.writer.fail(Error::Closed);
                        }
                    }
                    Err(error) => writer.fail(error),
                },
                Call::PromptLogits { tokens, answer } => match self.check_tokens(&tokens) {
                    // Without an engine the answer is dropped, which tells the caller.
                    Ok(()) => drop(steps.send(Command::PromptLogits { tokens, answer })),
                    Err(error) => drop(answer.send(Err(error))),
                },
            }
        }
    }

    fn resolve(&self, request: &Request) -> Result<Resolved, Error> {
        let resolved = request.resolve(&ModelFacts {
            tokenizer: self.tokenizer.as_deref(),
            defaults: &self.defaults,
            vocab_size: self.model.vocab_size,
            context: self.model.context,
        });
        resolved.map_err(|error| match (error, self.unread_tokenizer) {
            (Error::Request(RequestError::NoTokenizer { needed_by }), Some(found)) => {
                RequestError::UnreadTokenizer { needed_by, found }.into()
            }
            (error, _) => error,
        })
    }

    /// The checks of a prompt whose every position fits the context, with no token to follow.
    fn check_tokens(&self, tokens: &[u32]) -> Result<(), Error> {
        let ModelInfo { vocab_size, context, .. } = self.model;
        if tokens.is_empty() {
            return Err(RequestError::EmptyPrompt.into());
        }
        if tokens.len() > context {
            return Err(RequestError::TooLongToScore { len: tokens.len(), context }.into());
        }
        match tokens.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(RequestError::UnknownToken { place: "prompt", id, vocab_size }.into()),
            None => Ok(()),
        }
    }
}
