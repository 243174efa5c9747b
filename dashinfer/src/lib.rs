//! LLM inference that lives inside your program.
//!
//! ```
//! use dashinfer::{Engine, Request};
//! use futures::StreamExt;
//!
//! # fn main() -> Result<(), dashinfer::Error> { futures::executor::block_on(run()) }
//! # async fn run() -> Result<(), dashinfer::Error> {
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/ferris-7m");
//! let engine = Engine::load(folder).await?;
//! let mut tokens = engine.generate(Request::text("Returns the number of").max_tokens(20));
//! while let Some(chunk) = tokens.next().await {
//!     print!("{}", chunk?.text);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! [`Engine::load`] reads a Hugging Face folder and starts the engine's threads. [`Engine::generate`] takes a [`Request`] (text,
//! chat messages or token ids) and gives a [`TokenStream`]; requests are batched continuously, and dropping a stream cancels its
//! request. It runs on any async executor, or on none ([`Engine::blocking`]).

mod engine;
mod error;
mod output;
mod request;
mod scheduler;
mod text;

pub use engine::{
    Blocking, BlockingTokens, Device, Engine, EngineStats, Estimate, GenerateStream, KvCacheType, Load, LoadPhase,
    ModelInfo, Progress, PromptLogits, Source, Tagged, TokenStream, WeightType,
};
pub use error::Error;
pub use output::{Chunk, Completion, Finish, FinishReason, TokenLogprob, Usage};
pub(crate) use request::{GenerationDefaults, ModelFacts, Resolved};
pub use request::{MAX_LOGPROBS, MAX_STOPS, Prompt, Request, RequestError};
pub use text::{
    ChatOptions, ChatTemplate, Detokenizer, Message, SpecialTokens, StopMatcher, TemplateError, Tokenizer,
    TokenizerError,
};
