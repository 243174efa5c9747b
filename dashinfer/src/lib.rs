//! LLM inference that lives inside your program.
//!
//! ```
//! use dashinfer::{Engine, Message, Request};
//! use futures::StreamExt;
//!
//! # fn main() -> Result<(), dashinfer::Error> { futures::executor::block_on(run()) }
//! # async fn run() -> Result<(), dashinfer::Error> {
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/ferris-7m");
//! let engine = Engine::load(folder).await?;
//! let question = Message::user("Explain error E0382.");
//! let mut tokens = engine.generate(Request::chat([question]).max_tokens(40));
//! while let Some(chunk) = tokens.next().await {
//!     let chunk = chunk?;
//!     print!("{}", chunk.text);
//!     if let Some(finish) = chunk.finish {
//!         println!("\n{} tokens, ended by {:?}", finish.usage.generated_tokens, finish.reason);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! [`Engine::load`] reads a Hugging Face folder (`config.json`, safetensors, `tokenizer.json`) or a GGUF file, and starts the engine's threads.
//! [`Engine::generate`] takes a [`Request`] (text, chat messages or token ids) and gives a [`TokenStream`]; dropping it cancels the
//! request. It runs on any async executor, or on none ([`Engine::blocking`]): nothing is computed on the caller's threads.
//!
//! # Many requests
//!
//! Requests are batched continuously: those that decode and those whose prompts are being read share steps. Clone the
//! [`Engine`], a handle, into as many tasks as there are, or give it a stream of requests:
//!
//! ```
//! # use dashinfer::{Engine, Request};
//! # use futures::{StreamExt, stream};
//! # fn main() -> Result<(), dashinfer::Error> { futures::executor::block_on(run()) }
//! # async fn run() -> Result<(), dashinfer::Error> {
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/ferris-7m");
//! # let engine = Engine::load(folder).await?;
//! let requests = (1..=9).map(|i| Request::text(format!("Example {i} of")).max_tokens(8));
//! let mut texts = vec![String::new(); 9];
//! let mut chunks = engine.generate_stream(stream::iter(requests));
//! while let Some(tagged) = chunks.next().await {
//!     texts[tagged.index].push_str(&tagged.chunk?.text);
//! }
//! # assert!(texts.iter().all(|text| !text.is_empty()));
//! # Ok(())
//! # }
//! ```
//!
//! [`Engine::generate`] queues without bound, [`Engine::try_generate`] refuses when the queue is full, and
//! [`Engine::generate_stream`] takes a request when there is room for it. A reader that is late pauses its own request and slows
//! nobody else.
//!
//! # What holds
//!
//! - A request's tokens do not depend on what it is batched with, on the prefix cache, on preemption or on the number of threads: on
//!   the CPU always, on a GPU with [`Load::deterministic`].
//! - [`Load::memory_limit`] bounds weights, activations and KV cache together. [`Load::estimate`] says what they would take.
//! - When the KV cache is full, sequences wait or are computed again later; none fails.
//! - Several engines live in one process and share nothing. An idle one uses no CPU.
//! - What a checkpoint asks for and is not implemented is refused by name when it is loaded.
//!
//! # What runs
//!
//! Models of the families of Llama, Mistral, Qwen, Gemma, GLM, Phi, Baichuan and DeepSeek, with weights in f32, f16 or bf16. On the CPU: with kernels for
//! x86-64 with AVX2, AVX-512 and AMX and for 64-bit Arm, else with plain code that is much slower; weights can be quantized to 8 and 4
//! bits while they are loaded ([`Load::quantize`]). On an NVIDIA GPU of compute capability 7.0 or newer, with the feature `cuda`.
//!
//! # Features
//!
//! `x86` and `arm`, both on by default, compile kernels for these architectures, each on its own only; instruction sets are
//! chosen at run time. Without them the plain code runs.
//!
//! `cuda` computes on an NVIDIA GPU where there is one ([`Device`]). It builds anywhere: driver and libraries are opened at run time.

mod engine;
mod error;
mod output;
mod request;
mod scheduler;
mod text;

pub use dashinfer_kernels::cpu::Isa;
pub use dashinfer_kernels::{Group, Scheme, UnknownScheme};
pub use dashinfer_models::{CacheFault, Conversion, Quantization, WeightsFrom};
pub use engine::{
    Blocking, BlockingTokens, ComputeType, Device, Engine, EngineStats, Estimate, GenerateStream, KvCacheType, Load,
    LoadPhase, ModelInfo, ParseSettingError, Progress, PromptLogits, Source, Tagged, TokenStream, WeightType,
};
pub use error::Error;
pub use output::{Chunk, Completion, Finish, FinishReason, TokenLogprob, Usage};
pub(crate) use request::{GenerationDefaults, ModelFacts, Resolved};
pub use request::{MAX_LOGPROBS, MAX_STOPS, Prompt, Request, RequestError};
pub use text::{
    ChatOptions, ChatTemplate, Detokenizer, Message, SpecialTokens, StopMatcher, TemplateError, Tokenizer,
    TokenizerError,
};
