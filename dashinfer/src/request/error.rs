//! What can be wrong with a request.

use super::{MAX_LOGPROBS, MAX_STOPS};

/// Why a request cannot be served. Nothing was computed for it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The prompt has no tokens.
    #[error("the prompt has no tokens; at least one is needed to go on from")]
    EmptyPrompt,
    /// The prompt leaves no room for a token.
    #[error("prompt of {len} tokens does not fit: a context of {context} has room for {} and one to generate", context.saturating_sub(1))]
    PromptTooLong {
        /// Tokens of the prompt.
        len: usize,
        /// The most tokens of prompt and continuation together.
        context: usize,
    },
    /// More tokens to compute the logits of than a sequence may have.
    #[error("{len} tokens to compute the logits of do not fit a context of {context}")]
    TooLongToScore {
        /// Tokens of the prompt.
        len: usize,
        /// The most tokens of a sequence.
        context: usize,
    },
    /// A token id that the model does not have.
    #[error("{place} names token {id}; the vocabulary has {vocab_size} tokens, numbered from 0")]
    UnknownToken {
        /// Which setting: `prompt`, `stop_token` or `logit_bias`.
        place: &'static str,
        /// The id.
        id: u32,
        /// The size of the model's vocabulary.
        vocab_size: usize,
    },
    /// A number outside the range that makes sense.
    #[error("{name} is {found}, wanted {wanted}")]
    OutOfRange {
        /// Which setting.
        name: &'static str,
        /// What it is.
        found: f32,
        /// What it may be.
        wanted: &'static str,
    },
    /// A bias that is no number, or infinitely strong.
    #[error("the logit_bias of token {id} is {found}, wanted a number or -inf")]
    LogitBias {
        /// The token.
        id: u32,
        /// Its bias.
        found: f32,
    },
    /// `max_tokens` is zero.
    #[error("max_tokens is 0, wanted at least 1")]
    NothingToGenerate,
    /// More tokens are demanded than allowed.
    #[error("min_tokens is {min}, more than the {max} tokens that may be generated")]
    MinTokens {
        /// The least number of tokens.
        min: usize,
        /// The most: `max_tokens`, or the room behind the prompt if that is less.
        max: usize,
    },
    /// A stop string without text would stop everything.
    #[error("stop string {index} is empty")]
    EmptyStop {
        /// Its place among the stop strings.
        index: usize,
    },
    /// Every stop string costs time with every token.
    #[error("{found} stop strings, wanted at most {MAX_STOPS}")]
    TooManyStops {
        /// How many there are.
        found: usize,
    },
    /// Every log-probability is sent to the caller.
    #[error("logprobs of {found} alternatives, wanted at most {MAX_LOGPROBS}")]
    TooManyLogprobs {
        /// How many were asked for.
        found: usize,
    },
    /// A chat without a message.
    #[error("the chat has no messages; at least one is needed")]
    NoMessages,
    /// A chat for a model that does not say how chats are written.
    #[error("a chat needs a chat template, and the checkpoint has none; send text or token ids")]
    NoChatTemplate,
    /// Text for a model that has no tokenizer.
    #[error("{needed_by} needs a tokenizer, and the model was loaded without one; send token ids")]
    NoTokenizer {
        /// What needs it.
        needed_by: &'static str,
    },
    /// Text for a model whose tokenizer is in a form that is not read, as those of ChatGLM, Baichuan and the first Qwen are.
    #[error(
        "{needed_by} needs a tokenizer, and the checkpoint has {found} in place of the tokenizer.json that is read; \
         take a converted checkpoint (for GLM-4 THUDM/glm-4-9b-chat-hf), or send token ids"
    )]
    UnreadTokenizer {
        /// What needs it.
        needed_by: &'static str,
        /// The file in the checkpoint.
        found: &'static str,
    },
}
