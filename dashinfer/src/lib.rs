//! The SDK.

mod error;
mod output;
mod request;
mod scheduler;
mod text;

pub use error::Error;
pub use output::{Chunk, Completion, Finish, FinishReason, TokenLogprob, Usage};
pub use request::{GenerationDefaults, MAX_LOGPROBS, MAX_STOPS, ModelFacts, Prompt, Request, RequestError, Resolved};
pub use text::{
    ChatOptions, ChatTemplate, Detokenizer, Message, SpecialTokens, StopMatcher, TemplateError, Tokenizer,
    TokenizerError,
};
