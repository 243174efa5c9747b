//! From text to token ids and back.
//!
//! A prompt goes down: [`Tokenizer::encode`], or [`Tokenizer::encode_chat`] by the checkpoint's [`ChatTemplate`].
//! Sampled tokens come up one by one: [`Detokenizer`] turns them into text that is never cut within a character,
//! [`StopMatcher`] holds back what may be the beginning of a stop string.

mod bounds;
mod chat;
mod config;
mod detokenizer;
mod gguf;
mod pieces;
mod python;
mod splits;
mod stop;
mod tokenizer;

pub use chat::{ChatOptions, ChatTemplate, Message, TemplateError};
pub use detokenizer::Detokenizer;
pub use stop::StopMatcher;
pub use tokenizer::{SpecialTokens, Tokenizer, TokenizerError};
