//! Loading: the settings of an engine, and how its threads come to be.

use std::fmt;
use std::future::{Future, IntoFuture};
use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, mpsc};

use dashinfer_kernels::cpu::{CpuBackend, CpuConfig, Isa, PoolConfig};
#[cfg(feature = "cuda")]
use dashinfer_kernels::cuda::{CudaBackend, CudaConfig};
use dashinfer_kernels::{Backend, CacheType, DType};
use dashinfer_models::{
    Checkpoint, Decoder, GenerationConfig, Gguf, HfConfig, MemoryEstimate, ModelSpec, Quantization, RandomWeights,
    StepLimits, WeightCache, WeightSource, shapes,
};
use tokio::sync::{oneshot, watch};

use super::device::{ComputeType, Device, KvCacheType, WeightType};
use super::executor::LocalExecutor;
use super::front::Front;
use super::hub::Hub;
use super::memory::{CachePlan, CacheSize, Estimate};
use super::step_loop::{Command, StepLoop};
use super::target::Target;
use super::{Engine, ModelInfo, Shared};
use crate::scheduler::{Limits, Scheduler};
use crate::{Error, GenerationDefaults, Tokenizer, TokenizerError};

/// Rows of prompts whose every position wants logits that one step computes: a row of logits is as wide as the vocabulary.
const MAX_ALL_LOGITS: usize = 64;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// A folder with `config.json`, safetensors files and, for text, `tokenizer.json`.
    Folder(PathBuf),
    /// A GGUF file, or the first of several that are one model. What a path that ends in `.gguf` stands for.
    Gguf(PathBuf),
    /// A published shape (`qwen2.5-0.5b`) with random weights and no tokenizer, made in memory: for benchmarks.
    #[non_exhaustive]
    Random {
        /// Its name.
        shape: String,
        /// The same seed gives the same weights.
        seed: u64,
        /// The type of the weights.
        weights: WeightType,
        /// Whether all tokens get the same experts; see [`Source::tied_experts`].
        tied_experts: bool,
    },
}

impl Source {
    /// See [`Source::Random`]: seed 0, in bf16.
    pub fn random(shape: impl Into<String>) -> Self {
        Self::Random { shape: shape.into(), seed: 0, weights: WeightType::default(), tied_experts: false }
    }

    /// The type of random weights. Default: [`WeightType::BF16`]. Without effect on files, whose weights are what they are.
    #[must_use]
    pub fn weight_type(mut self, weight_type: WeightType) -> Self {
        if let Self::Random { weights, .. } = &mut self {
            *weights = weight_type;
        }
        self
    }

    /// With random weights of routers, tokens choose experts evenly; with this, all choose the same. Without effect on files.
    #[must_use]
    pub fn tied_experts(mut self, tied: bool) -> Self {
        if let Self::Random { tied_experts, .. } = &mut self {
            *tied_experts = tied;
        }
        self
    }
}

impl<P: AsRef<Path> + ?Sized> From<&P> for Source {
    fn from(path: &P) -> Self {
        path.as_ref().to_owned().into()
    }
}

impl From<PathBuf> for Source {
    fn from(path: PathBuf) -> Self {
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if is_gguf && !path.is_dir() { Self::Gguf(path) } else { Self::Folder(path) }
    }
}

impl From<String> for Source {
    fn from(path: String) -> Self {
        PathBuf::from(path).into()
    }
}

/// What a load is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LoadPhase {
    /// Reading and packing weights.
    Weights,
    /// All is there.
    Ready,
}

/// How far a load has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// What it is doing.
    pub phase: LoadPhase,
    /// Bytes of weights packed so far, as stored.
    pub bytes_done: u64,
    /// Bytes of all weights, as stored.
    pub bytes_total: u64,
}

type OnProgress = Box<dyn FnMut(Progress) + Send>;

/// The settings of an engine to be loaded; of [`Engine::load`]. Awaiting it loads.
///
/// Loading runs on the engine's own thread. Dropping the future does not interrupt it, but what was loaded is given back.
#[must_use = "a load does nothing unless awaited"]
pub struct Load {
    source: Source,
    settings: Settings,
    on_progress: Option<OnProgress>,
}

#[derive(Debug, Clone)]
struct Settings {
    device: Device,
    compute: ComputeType,
    quantization: Quantization,
    weight_cache: Option<WeightCache>,
    deterministic: bool,
    kv_cache: KvCacheType,
    memory_limit: Option<u64>,
    kv_cache_bytes: Option<u64>,
    max_context: Option<usize>,
    max_batch: Option<usize>,
    max_step_tokens: Option<usize>,
    max_chunk: Option<usize>,
    max_queued: usize,
    block_size: usize,
    prefix_cache: bool,
    stream_buffer: usize,
    threads: Option<usize>,
    cores: Vec<usize>,
    isa: Option<Isa>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            device: Device::default(),
            compute: ComputeType::default(),
            quantization: Quantization::AS_STORED,
            weight_cache: None,
            deterministic: false,
            kv_cache: KvCacheType::default(),
            memory_limit: None,
            kv_cache_bytes: None,
            max_context: None,
            max_batch: None,
            max_step_tokens: None,
            max_chunk: None,
            max_queued: 1024,
            block_size: 32,
            prefix_cache: true,
            stream_buffer: 64,
            threads: None,
            cores: Vec::new(),
            isa: None,
        }
    }
}

impl Settings {
    /// Counts that size buffers have an upper bound too, far above what is of use, so that no later sum of them overflows.
    fn check(&self) -> Result<(), Error> {
        let counts = [
            ("max_batch", self.max_batch.unwrap_or(1), 1..=1 << 20, "1 to 1048576"),
            ("max_step_tokens", self.max_step_tokens.unwrap_or(1), 1..=1 << 20, "1 to 1048576"),
            ("max_chunk", self.max_chunk.unwrap_or(1), 1..=usize::MAX, "at least 1"),
            ("max_context", self.max_context.unwrap_or(1), 1..=usize::MAX, "at least 1"),
            ("stream_buffer", self.stream_buffer, 1..=1 << 20, "1 to 1048576"),
            ("threads", self.threads.unwrap_or(1), 1..=1024, "1 to 1024"),
        ];
        for (name, found, range, wanted) in counts {
            if !range.contains(&found) {
                return Err(Error::Setting { name, found, wanted });
            }
        }
        if ![16, 32, 64, 128].contains(&self.block_size) {
            return Err(Error::Setting { name: "block_size", found: self.block_size, wanted: "16, 32, 64 or 128" });
        }
        Ok(())
    }

    fn pool(&self) -> PoolConfig {
        PoolConfig { threads: self.threads.and_then(NonZeroUsize::new), cores: self.cores.clone() }
    }
}

impl Load {
    pub(super) fn new(source: Source) -> Self {
        Self { source, settings: Settings::default(), on_progress: None }
    }

    /// Where the model runs. Default: the best device there is.
    pub fn device(mut self, device: Device) -> Self {
        self.settings.device = device;
        self
    }

    /// The type in which the model is computed. Default: [`ComputeType::Auto`].
    pub fn compute(mut self, compute: ComputeType) -> Self {
        self.settings.compute = compute;
        self
    }

    /// Quantizes weights while they are loaded, by a [`Scheme`](crate::Scheme) or as a [`Quantization`] says in more detail. Default: weights
    /// as they are stored. Smaller weights are read faster, and change results: `docs/quantization.md` says by how much. CPU only.
    ///
    /// A checkpoint that was quantized before it was stored keeps its integers by default;
    /// [`ModelInfo::conversions`](crate::ModelInfo) says what became of them.
    pub fn quantize(mut self, quantization: impl Into<Quantization>) -> Self {
        self.settings.quantization = quantization.into();
        self
    }

    /// Keeps packed weights in `folder`, which need not be there yet, and maps what an earlier load of the same weights, quantized
    /// in the same way, has left there: a model is then ready as fast as its packed weights can be read and summed, and processes
    /// share the memory. [`ModelInfo::weights_from`](crate::ModelInfo) says what came of it. Changes no result. Default: none.
    ///
    /// Mapped weights are the system's to drop when memory is short, and to read again from the disk.
    ///
    /// The folder takes as many bytes as the packed weights for each model and quantization. It may be shared by any number of
    /// engines and processes. Its files may be deleted at any time, and are never deleted here; nobody may write to them. Weights
    /// are known again by the names, sizes and times of their files and by samples of what is in them, not by all that is in them.
    ///
    /// A file that cannot be used is packed anew and replaced. A folder that cannot be written is an error
    /// ([`Error::WeightCache`]), unless it has what is wanted. CPU only: a GPU keeps weights as they are stored, and takes no notice.
    pub fn weight_cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.settings.weight_cache = Some(WeightCache::new(folder));
        self
    }

    /// Whether a request's tokens and log-probabilities are the same to the bit whatever it is computed with, and whether its
    /// prefix is cached, computed in chunks, or computed again after a preemption. On the CPU they always are. On a GPU the
    /// fastest kernels depend on the size of the step, and with `true` others are used that do not: `docs/cuda.md` says what that
    /// costs. Default: false.
    pub fn deterministic(mut self, yes: bool) -> Self {
        self.settings.deterministic = yes;
        self
    }

    /// The type in which keys and values are kept. Default: [`KvCacheType::Auto`]. Smaller types hold more tokens in the same
    /// memory, and change results a little.
    pub fn kv_cache(mut self, kv_cache: KvCacheType) -> Self {
        self.settings.kv_cache = kv_cache;
        self
    }

    /// The most bytes for weights, activations and KV cache together, in the device's memory. Default: no limit on weights; for
    /// the cache, on the CPU 4 GiB or half of the memory that is left, whichever is less, and on a GPU nine tenths of what is left,
    /// if that many tokens can be of use.
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.settings.memory_limit = Some(bytes);
        self
    }

    /// The most bytes for the KV cache. More lets more sequences run at once, and keeps more prefixes.
    pub fn kv_cache_bytes(mut self, bytes: u64) -> Self {
        self.settings.kv_cache_bytes = Some(bytes);
        self
    }

    /// The most tokens of a prompt and its continuation together. Default: what the model was made for; if no limit was set
    /// either, no more than the default cache holds ([`ModelInfo::context`](crate::ModelInfo) says what came of it). The cache must
    /// hold one such sequence.
    ///
    /// Models with LongRoPE (Phi-3 and Phi-4-mini) have one set of rotary frequencies for contexts as long as they were first trained on,
    /// and one for longer ones; an engine has the one or the other, by its longest context. `max_context` of that length or less
    /// (`original_max_position_embeddings` in `config.json`) gives the answers of the reference to prompts that stay below it, and longer
    /// contexts those to prompts beyond it.
    pub fn max_context(mut self, tokens: usize) -> Self {
        self.settings.max_context = Some(tokens);
        self
    }

    /// The most sequences computed in one step. Default: 64 on the CPU, 256 on a GPU. More raises throughput under load, and the time of a step.
    pub fn max_batch(mut self, sequences: usize) -> Self {
        self.settings.max_batch = Some(sequences);
        self
    }

    /// The most tokens computed in one step. Default: 512 on the CPU, 8192 on a GPU. Fewer let running requests wait less for the prompts of others; more
    /// read prompts faster.
    pub fn max_step_tokens(mut self, tokens: usize) -> Self {
        self.settings.max_step_tokens = Some(tokens);
        self
    }

    /// The most tokens of one prompt computed in one step. Default: all that the step can take.
    pub fn max_chunk(mut self, tokens: usize) -> Self {
        self.settings.max_chunk = Some(tokens);
        self
    }

    /// The most requests that may wait before [`Engine::try_generate`] refuses. Default: 1024.
    pub fn max_queued(mut self, requests: usize) -> Self {
        self.settings.max_queued = requests;
        self
    }

    /// Tokens in a block of the KV cache: 16, 32, 64 or 128. Default: 32. Prefixes are found again in whole blocks; smaller
    /// ones waste less.
    pub fn block_size(mut self, tokens: usize) -> Self {
        self.settings.block_size = tokens;
        self
    }

    /// Whether blocks of earlier requests are kept and found again. Default: true. Changes no result.
    pub fn prefix_cache(mut self, yes: bool) -> Self {
        self.settings.prefix_cache = yes;
        self
    }

    /// Chunks that wait for a late reader before its request pauses. Default: 64.
    pub fn stream_buffer(mut self, chunks: usize) -> Self {
        self.settings.stream_buffer = chunks;
        self
    }

    /// Threads that compute. Default: one for each core that the process may use.
    pub fn threads(mut self, threads: usize) -> Self {
        self.settings.threads = Some(threads);
        self
    }

    /// Binds the computing threads to cores, in turn. Default: the system places them. Linux only.
    pub fn cores(mut self, cores: impl Into<Vec<usize>>) -> Self {
        self.settings.cores = cores.into();
        self
    }

    /// Computes with kernels of this instruction set at most: to compare them, or to get the bits of a lesser machine. Default:
    /// the best that the machine has; one that it lacks is refused.
    pub fn isa(mut self, isa: Isa) -> Self {
        self.settings.isa = Some(isa);
        self
    }

    /// Is called, on the engine's thread, as loading goes on.
    pub fn on_progress(mut self, on_progress: impl FnMut(Progress) + Send + 'static) -> Self {
        self.on_progress = Some(Box::new(on_progress));
        self
    }

    /// What the load would take, without taking it: from the config and the headers of the weights alone.
    ///
    /// # Errors
    /// Those of a load, as far as they show without reading weights.
    pub fn estimate(&self) -> Result<Estimate, Error> {
        let opened = Opened::new(&self.source)?;
        let target = Target::open(self.settings.device)?;
        Ok(self.plan(&opened, &target)?.estimate)
    }

    /// Loads, and waits for it on this thread.
    ///
    /// # Errors
    /// As for awaiting the load.
    pub fn blocking(self) -> Result<Engine, Error> {
        futures::executor::block_on(self.into_future())
    }

    fn plan(&self, opened: &Opened, target: &Target) -> Result<Plan, Error> {
        let set = &self.settings;
        set.check()?;
        let max_batch = set.max_batch.unwrap_or(target.default_batch());
        let max_tokens = set.max_step_tokens.unwrap_or(target.default_step_tokens());
        let limits = StepLimits { max_tokens, max_logit_rows: (max_batch + MAX_ALL_LOGITS).min(max_tokens) };
        let compute = target.compute_type(set.compute.dtype(), opened)?;
        let kv_cache = target.kv_cache_type(set.kv_cache.cache_type(), &opened.spec, compute)?;
        target.check_quantization(set.quantization)?;
        let packed_bytes = |rows, cols, stored, scheme| target.packed_bytes(rows, cols, stored, scheme, compute);
        let (spec, source) = (&opened.spec, opened.source.as_ref());
        let mut model = MemoryEstimate::new(
            spec,
            source,
            target.activation_type(compute),
            kv_cache,
            limits,
            target.quantization(set.quantization, compute),
            &packed_bytes,
        )?;
        model.activation_bytes += target.workspace_bytes(spec, limits, compute, set.quantization);
        let cache = CachePlan {
            block_size: set.block_size,
            context: opened.spec.max_positions,
            max_context: set.max_context,
            max_batch,
            kv_cache_bytes: set.kv_cache_bytes,
            memory_limit: set.memory_limit,
            spare: target.spare_bytes()?,
        };
        let CacheSize { num_blocks, context } = cache.size(&model)?;
        let kv_cache_tokens = num_blocks * set.block_size;
        let estimate = Estimate {
            weight_bytes: model.weight_bytes,
            activation_bytes: model.activation_bytes,
            kv_bytes_per_token: model.kv_bytes_per_token,
            kv_cache_tokens,
            kv_cache_bytes: kv_cache_tokens as u64 * model.kv_bytes_per_token,
            context,
        };
        Ok(Plan { estimate, num_blocks, limits, max_batch, compute, kv_cache })
    }
}

impl fmt::Debug for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Load").field("source", &self.source).field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl IntoFuture for Load {
    type Output = Result<Engine, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let (report, loaded) = oneshot::channel();
            let thread = std::thread::Builder::new().name("dashinfer-engine".to_owned());
            let thread = thread.spawn(move || serve(self, report));
            thread.map_err(|error| dashinfer_kernels::KernelError::Threads(format!("the engine's thread: {error}")))?;
            // The thread reports before it ends, unless it panics.
            loaded.await.unwrap_or_else(|_| Err(Error::internal("loading panicked")))
        })
    }
}

/// What a load has decided.
struct Plan {
    estimate: Estimate,
    num_blocks: usize,
    limits: StepLimits,
    max_batch: usize,
    compute: DType,
    kv_cache: CacheType,
}

/// A source whose config and headers were read.
pub(super) struct Opened {
    pub(super) spec: ModelSpec,
    pub(super) source: Box<dyn WeightSource>,
    defaults: GenerationDefaults,
    tokenizer: Option<TokenizerPath>,
    /// A file with a tokenizer in a form that is not read, where there is none that is.
    unread_tokenizer: Option<&'static str>,
}

/// Where a tokenizer is read from.
enum TokenizerPath {
    Folder(PathBuf),
    Gguf(PathBuf),
}

impl TokenizerPath {
    fn read(self) -> Result<Tokenizer, TokenizerError> {
        match self {
            Self::Folder(folder) => Tokenizer::from_folder(folder),
            Self::Gguf(path) => Tokenizer::from_gguf(path),
        }
    }
}

/// SentencePiece models, and tables of `tiktoken`.
const UNREAD_TOKENIZERS: &[&str] = &["tokenizer.model", "qwen.tiktoken", "ice_text.model"];

impl Opened {
    fn new(source: &Source) -> Result<Self, Error> {
        match source {
            Source::Folder(folder) => {
                if !folder.is_dir() {
                    return Err(Error::NoSuchModel { path: folder.clone(), hint: hint(folder) });
                }
                let config = HfConfig::read(folder)?;
                let spec = config.to_spec()?;
                let defaults = generation_defaults(&GenerationConfig::read(folder, &config)?);
                let source = Box::new(Checkpoint::open(folder)?);
                let tokenizer = folder.join("tokenizer.json").is_file().then(|| TokenizerPath::Folder(folder.clone()));
                let unread_tokenizer = match tokenizer {
                    Some(_) => None,
                    None => UNREAD_TOKENIZERS.iter().copied().find(|name| folder.join(name).is_file()),
                };
                Ok(Self { spec, source, defaults, tokenizer, unread_tokenizer })
            }
            Source::Gguf(path) => {
                let file = Gguf::open(path)?;
                let (spec, facts) = (file.spec()?, file.tokenizer()?);
                let defaults = facts.as_ref().map_or_else(GenerationDefaults::default, |facts| GenerationDefaults {
                    eos_token_ids: facts.end_tokens(),
                    bos_token_id: facts.bos,
                    ..GenerationDefaults::default()
                });
                let tokenizer = facts.is_some().then(|| TokenizerPath::Gguf(path.clone()));
                let source = Box::new(file.into_weights(&spec));
                Ok(Self { spec, source, defaults, tokenizer, unread_tokenizer: None })
            }
            Source::Random { shape, seed, weights, tied_experts } => {
                let Some(spec) = shapes::named(shape) else {
                    let hint = " among the published shapes (see `dashinfer_models::shapes`)";
                    return Err(Error::NoSuchModel { path: shape.into(), hint });
                };
                let source = RandomWeights::new(&spec, *seed).dtype(weights.dtype());
                let source = Box::new(if *tied_experts { source.tied_experts(&spec) } else { source });
                let defaults = GenerationDefaults::default();
                Ok(Self { spec, source, defaults, tokenizer: None, unread_tokenizer: None })
            }
        }
    }
}

fn hint(folder: &Path) -> &'static str {
    let parts = folder.components().count();
    if folder.is_file() {
        "; it is a file, and a folder with config.json and safetensors, or a .gguf file, is wanted"
    } else if folder.is_relative() && parts == 2 && !folder.starts_with(".") && !folder.starts_with("..") {
        "; to run a model of a hub, download it and give its folder"
    } else {
        ""
    }
}

fn generation_defaults(config: &GenerationConfig) -> GenerationDefaults {
    GenerationDefaults {
        sample: config.do_sample.unwrap_or(false),
        temperature: config.temperature,
        top_p: config.top_p,
        top_k: config.top_k.map(std::num::NonZeroU32::get),
        min_p: config.min_p,
        repetition_penalty: config.repetition_penalty,
        eos_token_ids: config.eos_token_ids.clone(),
        bos_token_id: config.bos_token_id,
    }
}

/// The life of the engine's thread: loads, reports, serves.
fn serve(mut load: Load, report: oneshot::Sender<Result<Engine, Error>>) {
    // Dropped last, when the model and its cache have gone.
    let (_ended, ended) = watch::channel(());
    match start(&mut load, ended) {
        Ok((engine, run)) => {
            // Whoever waited for the engine has gone: then the handle is dropped here, and the loop ends at once.
            drop(report.send(Ok(engine)));
            run();
        }
        Err(error) => drop(report.send(Err(error))),
    }
}

/// The rest of the life of the engine's thread.
type Run = Box<dyn FnOnce()>;

fn start(load: &mut Load, ended: watch::Receiver<()>) -> Result<(Engine, Run), Error> {
    let opened = Opened::new(&load.source)?;
    let target = Target::open(load.settings.device)?;
    let plan = load.plan(&opened, &target)?;
    match target {
        Target::Cpu => {
            let config = CpuConfig { pool: load.settings.pool(), isa: load.settings.isa, compute: plan.compute };
            start_on(CpuBackend::new(&config)?, load, opened, plan, ended)
        }
        #[cfg(not(feature = "cuda"))]
        Target::Cuda(device) => match device {},
        #[cfg(feature = "cuda")]
        Target::Cuda(device) => {
            let config = CudaConfig { dtype: plan.compute, deterministic: load.settings.deterministic };
            start_on(CudaBackend::new(&device, &config)?, load, opened, plan, ended)
        }
    }
}

fn start_on<B: Backend>(
    backend: B,
    load: &mut Load,
    mut opened: Opened,
    plan: Plan,
    ended: watch::Receiver<()>,
) -> Result<(Engine, Run), Error> {
    let settings = load.settings.clone();
    // What depends on the longest context, such as the factors of LongRoPE, is decided by that of this engine.
    opened.spec.limit_context(plan.estimate.context);
    let tokenizer = match opened.tokenizer.take() {
        // A large vocabulary takes as long to read as weights do, so it is read beside them.
        Some(path) => Some(
            std::thread::Builder::new()
                .name("dashinfer-text".to_owned())
                .spawn(move || path.read())
                .map_err(|error| Error::internal(&format!("no thread for the tokenizer: {error}")))?,
        ),
        None => None,
    };

    let device = backend.name();
    let mut no_progress: OnProgress = Box::new(|_| ());
    let on_progress = load.on_progress.as_mut().unwrap_or(&mut no_progress);
    let mut bytes = 0;
    let (source, quantization) = (opened.source.as_mut(), settings.quantization);
    let cache = settings.weight_cache.as_ref();
    let decoder =
        Decoder::load_with_cache(backend, opened.spec, source, plan.limits, quantization, cache, &mut |progress| {
            bytes = progress.bytes_total;
            let (bytes_done, bytes_total) = (progress.bytes_done, progress.bytes_total);
            on_progress(Progress { phase: LoadPhase::Weights, bytes_done, bytes_total });
        })?;
    let spec = decoder.spec();
    let cache_spec = spec.kv_cache(settings.block_size, plan.num_blocks, plan.kv_cache);
    let cache = decoder.backend().kv_cache(&cache_spec)?;
    let model = ModelInfo {
        architecture: spec.architecture.clone(),
        num_parameters: spec.num_parameters(),
        vocab_size: spec.vocab_size,
        context: plan.estimate.context,
        device,
        compute: plan.compute.into(),
        weight_bytes: plan.estimate.weight_bytes,
        weights_from: decoder.weights_from().clone(),
        conversions: decoder.conversions().to_vec(),
        kv_cache_bytes: plan.estimate.kv_cache_bytes,
        kv_cache_tokens: plan.estimate.kv_cache_tokens,
    };
    let scheduler = Scheduler::new(Limits {
        token_budget: plan.limits.max_tokens,
        max_running: plan.max_batch.min(plan.limits.max_logit_rows),
        max_chunk: settings.max_chunk,
        max_all_logits: plan.limits.max_logit_rows.saturating_sub(plan.max_batch).max(1),
        num_blocks: plan.num_blocks,
        block_size: settings.block_size,
        prefix_cache: settings.prefix_cache,
        hash_seed: RandomState::new().hash_one(0),
    })?;
    let tokenizer = match tokenizer {
        Some(thread) => Some(Arc::new(thread.join().map_err(|_| Error::internal("reading the tokenizer panicked"))??)),
        None => None,
    };

    let hub = Hub::new(settings.max_queued);
    let (calls, incoming) = mpsc::channel();
    let (commands, obeyed) = mpsc::channel::<Command>();
    let front = Front {
        tokenizer: tokenizer.clone(),
        defaults: opened.defaults,
        model: model.clone(),
        unread_tokenizer: opened.unread_tokenizer,
    };
    let to_steps = commands.clone();
    std::thread::Builder::new()
        .name("dashinfer-front".to_owned())
        .spawn(move || front.run(&incoming, &to_steps))
        .map_err(|error| Error::internal(&format!("no thread for requests: {error}")))?;
    on_progress(Progress { phase: LoadPhase::Ready, bytes_done: bytes, bytes_total: bytes });

    let executor = LocalExecutor::new(decoder, cache);
    let (vocab_size, block_size) = (model.vocab_size, settings.block_size);
    let steps = StepLoop::new(executor, scheduler, obeyed, Arc::clone(&hub), vocab_size, block_size);
    let shared = Shared {
        calls,
        commands,
        hub,
        next_request: AtomicU64::new(0),
        stream_buffer: settings.stream_buffer,
        max_in_flight: plan.max_batch.saturating_mul(2),
        model,
        tokenizer,
        ended,
    };
    Ok((Engine { shared: Arc::new(shared) }, Box::new(move || steps.run())))
}
