//! The engine: handles that callers hold, and the threads behind them.
//!
//! ```text
//!   Engine ──Call──▶ front thread ──Command──▶ step loop ──Chunk──▶ TokenStream
//!   (handle)         (text → tokens)           (schedule, compute, hand out)
//! ```

mod batch;
mod blocking;
mod continuation;
mod device;
mod executor;
mod front;
mod hub;
mod load;
mod many;
mod memory;
mod step_loop;
mod stream;
mod target;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use dashinfer_models::{Conversion, WeightsFrom};
use tokio::sync::{oneshot, watch};

pub use blocking::{Blocking, BlockingTokens};
pub use device::{ComputeType, Device, KvCacheType, ParseSettingError, WeightType};
pub use hub::EngineStats;
pub use load::{Load, LoadPhase, Progress, Source};
pub use many::{GenerateStream, Tagged};
pub use memory::Estimate;
pub use stream::TokenStream;

use front::Call;
use hub::{Hub, QueuePlace};
use step_loop::Command;

use crate::{Error, Request, Tokenizer};

/// A request's name within its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RequestId(u64);

/// What was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelInfo {
    /// The `architectures` entry of the config.
    pub architecture: String,
    /// Parameters; tied ones once.
    pub num_parameters: u64,
    /// Rows of the logits.
    pub vocab_size: usize,
    /// The most tokens of a prompt and its continuation together.
    pub context: usize,
    /// Where it runs: `cpu` or `cuda`.
    pub device: &'static str,
    /// The type of activations; never [`ComputeType::Auto`].
    pub compute: ComputeType,
    /// Bytes of packed weights.
    pub weight_bytes: u64,
    /// Whether they were packed or found in the [`weight_cache`](Load::weight_cache), and whether it could be used.
    pub weights_from: WeightsFrom,
    /// What became of weights that were stored quantized; empty of other checkpoints.
    pub conversions: Vec<Conversion>,
    /// Bytes of the KV cache.
    pub kv_cache_bytes: u64,
    /// Tokens that the KV cache holds, of all sequences together.
    pub kv_cache_tokens: usize,
}

/// The logits of every position of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptLogits {
    values: Vec<f32>,
    vocab_size: usize,
}

impl PromptLogits {
    fn new(values: Vec<f32>, vocab_size: usize) -> Self {
        Self { values, vocab_size }
    }

    /// `[T, V]`, row-major.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The logits of each position, `[V]`: what the model expects to follow it.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.vocab_size)
    }

    /// The number of logits in a row, `V`.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

/// A loaded model that generates text for many requests at once.
///
/// A handle: cloning it is cheap, and all clones are the same engine. When the last one is dropped, requests in flight are
/// still served to their streams, then the threads end and the memory is given back; [`shutdown`](Self::shutdown) waits for that.
/// An idle engine uses no CPU.
///
/// Every method may be called on any thread and within any async runtime; none blocks.
#[derive(Debug, Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// What all handles of an engine share. Dropping it hangs up on the front thread, which ends the engine.
#[derive(Debug)]
struct Shared {
    calls: mpsc::Sender<Call>,
    commands: mpsc::Sender<Command>,
    hub: Arc<Hub>,
    next_request: AtomicU64,
    stream_buffer: usize,
    max_in_flight: usize,
    model: ModelInfo,
    tokenizer: Option<Arc<Tokenizer>>,
    /// Closed when the engine's thread has given everything back.
    ended: watch::Receiver<()>,
}

impl Engine {
    /// Loads the model of `source`: a folder with a Hugging Face checkpoint.
    ///
    /// The result is a builder; awaiting it loads.
    ///
    /// ```no_run
    /// # async fn load() -> Result<(), dashinfer::Error> {
    /// use dashinfer::Engine;
    ///
    /// let engine = Engine::load("models/qwen2.5-0.5b").memory_limit(4 << 30).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn load(source: impl Into<Source>) -> Load {
        Load::new(source.into())
    }

    /// What loading `source` with the default settings would take, without taking it: from the config and the headers of the
    /// weights alone. [`Load::estimate`] does the same for other settings.
    ///
    /// # Errors
    /// Those of a load, as far as they show without reading weights.
    pub fn estimate(source: impl Into<Source>) -> Result<Estimate, Error> {
        Self::load(source).estimate()
    }

    /// Goes on from a prompt. Returns at once; the request waits in the queue, however long that is.
    ///
    /// A request that cannot be served gives its error as the stream's first item.
    pub fn generate(&self, request: impl Into<Request>) -> TokenStream {
        self.submit(request.into(), self.shared.hub.enqueue())
    }

    /// [`generate`](Self::generate), unless as many requests wait as [`Load::max_queued`] allows.
    ///
    /// # Errors
    /// [`Error::QueueFull`].
    pub fn try_generate(&self, request: impl Into<Request>) -> Result<TokenStream, Error> {
        let hub = &self.shared.hub;
        let place = hub.enqueue_if_room().ok_or(Error::QueueFull { max: hub.max_queued() })?;
        Ok(self.submit(request.into(), place))
    }

    /// Serves a stream of requests and gives one stream of their chunks, each with the number of its request, counted from 0.
    ///
    /// A new request is taken from `requests` only while fewer are in flight than the engine computes at once, and a few more
    /// that wait: that is the backpressure. Dropping the stream cancels what is in flight.
    pub fn generate_stream<S>(&self, requests: S) -> GenerateStream<S>
    where
        S: futures::Stream<Item = Request> + Unpin,
    {
        GenerateStream::new(self.clone(), requests, self.shared.max_in_flight)
    }

    /// The logits of every position of `tokens`, through the same steps as everything else: for scoring, perplexity, and for
    /// comparing with another implementation. The prefix cache is not read for it.
    ///
    /// Takes `T · V · 4` bytes. Dropping the future cancels the work.
    ///
    /// # Errors
    /// [`Error::Request`] for no tokens, too many, or unknown ones; [`Error::Closed`] without an engine.
    pub async fn prompt_logits(&self, tokens: impl Into<Vec<u32>>) -> Result<PromptLogits, Error> {
        let (answer, result) = oneshot::channel();
        let call = Call::PromptLogits { tokens: tokens.into(), answer };
        self.shared.calls.send(call).map_err(|_| Error::Closed)?;
        result.await.map_err(|_| Error::Closed)?
    }

    /// The same for code without an async runtime.
    #[must_use]
    pub fn blocking(&self) -> Blocking {
        Blocking::new(self.clone())
    }

    /// What was loaded.
    #[must_use]
    pub fn model(&self) -> &ModelInfo {
        &self.shared.model
    }

    /// The checkpoint's tokenizer, if it has one.
    #[must_use]
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.shared.tokenizer.as_deref()
    }

    /// What the engine is busy with, as of its last step.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.shared.hub.stats()
    }

    /// Takes no more requests, serves those in flight, and waits until the threads have ended and the memory is given back.
    ///
    /// Requests that come later, from this or another handle, get [`Error::Closed`]. Cancel-safe: dropping the future leaves the
    /// engine closing.
    pub async fn shutdown(&self) {
        // A front thread that has gone has closed the engine already.
        let _ = self.shared.calls.send(Call::Close);
        let mut ended = self.shared.ended.clone();
        // Nothing is ever sent; the wait ends when the sender is dropped.
        while ended.changed().await.is_ok() {}
    }

    fn submit(&self, request: Request, place: QueuePlace) -> TokenStream {
        let shared = &*self.shared;
        let id = RequestId(shared.next_request.fetch_add(1, Ordering::Relaxed));
        let (stream, writer) = TokenStream::new(id, shared.stream_buffer, shared.commands.clone(), place);
        let call = Call::Generate { request: Box::new(request), writer, arrived: Instant::now() };
        if let Err(mpsc::SendError(Call::Generate { writer, .. })) = shared.calls.send(call) {
            writer.fail(Error::Closed);
        }
        stream
    }
}
