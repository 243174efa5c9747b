//! The contract between a model and a device: some fused operators with one meaning everywhere.
//!
//! Shapes use one alphabet: `T` tokens in the step, `S` sequences, `H` query heads, `K` key/value heads, `D` head size,
//! `E` hidden size, `F` MLP size, `N` experts, `V` vocabulary, `B` tokens in a cache block. The CPU's scalar code defines each
//! operator; every other implementation is tested against it.

use std::fmt;
use std::time::Duration;

use crate::error::check;
use crate::{CacheType, DType, InputSums, KernelError, Routing, SampleRow, Sampled, Scheme, SharedBytes, StoredMatrix};

/// A weight matrix as a checkpoint stores it: rows `[rows, cols]` of `dtype`, little-endian, not necessarily aligned.
#[derive(Debug, Clone, Copy)]
pub struct MatrixView<'a> {
    /// `rows * cols * dtype.size_bytes()` bytes, row-major.
    pub bytes: &'a [u8],
    /// The stored type.
    pub dtype: DType,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

/// All that decides what the buffers of a packed matrix are, beside the layout of its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedShape {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The type of the weights that were packed.
    pub dtype: DType,
    /// How they were quantized on the way.
    pub scheme: Option<Scheme>,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether its input features stand in an order of their own; see [`StoredMatrix::order`].
    pub order: bool,
}

/// One sequence's share of a step: `num_rows` consecutive rows of the batch, the last of them at position
/// `context_len - 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceRows {
    /// First row of this sequence in the batch.
    pub first_row: usize,
    /// Rows of this sequence in the batch: 1 for a decode, more for a prefill chunk.
    pub num_rows: usize,
    /// Tokens in the cache when this step is done; row `i` has position `context_len - num_rows + i`.
    pub context_len: usize,
    /// Where this sequence's block table starts in [`PagedBatch::block_table`].
    pub first_block: usize,
    /// How many blocks it has there; at least `context_len` divided by the block size, rounded up.
    pub num_blocks: usize,
}

/// Where the rows of a step stand: positions, cache slots and block tables. Rows of a sequence are consecutive and in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PagedBatch {
    /// `[T]`: each row's position in its sequence.
    pub positions: Vec<u32>,
    /// `[T]`: the cache slot (`block * B + offset`) that takes each row's key and value.
    pub slots: Vec<u32>,
    /// `[S]`: the sequences, covering the rows without gap or overlap.
    pub sequences: Vec<SequenceRows>,
    /// The blocks of all sequences, one run after the other.
    pub block_table: Vec<u32>,
}

/// What a step computes: its rows, where they stand, and which of them get logits.
#[derive(Debug, Clone, Copy)]
pub struct StepRows<'a> {
    /// `[T]`: the token of each row. What it says of a [carried](Self::carried) row is not read.
    pub ids: &'a [u32],
    /// Rows whose token the host does not know yet, because the step before sampled it and was not waited for. Ascending.
    pub carried: &'a [CarriedId],
    /// Positions, cache slots and block tables.
    pub paged: &'a PagedBatch,
    /// The rows that get logits, ascending.
    pub logit_rows: &'a [u32],
    /// Whether nobody looks between the operators, so that they may be recorded and issued again by
    /// [`begin_step`](Backend::begin_step) of an equal step.
    pub may_record: bool,
}

/// A row whose token is one that the step before sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CarriedId {
    /// The row of this step.
    pub row: u32,
    /// Which of the rows that were given to the newest [`Backend::sample`] it is.
    pub sampled: u32,
}

/// What is to be done next for the step that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "operators must be issued as often as is asked for"]
pub enum Issue {
    /// Issue the operators of the step, then call [`end_step`](Backend::end_step).
    Operators,
    /// Nothing: they are on their way, or the backend has issued those of an equal step again, on the rows of this one.
    Nothing,
}

/// What a tensor is for, which decides the type of its elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorUse {
    /// Between operators: the type that the backend computes in.
    Activations,
    /// Logits: `f32`.
    Logits,
}

/// Rotary position embedding <https://arxiv.org/abs/2104.09864> with all scaling already in the frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// `[R / 2]`: the angle per position of each rotated pair; `R <= D` values of a head are rotated, the rest pass.
    pub inv_freq: Vec<f32>,
    /// Factor on cosine and sine (YaRN's attention factor; 1 otherwise).
    pub scale: f32,
    /// Which values make a pair.
    pub pairs: RopePairs,
}

/// Which two of the `R` rotated values of a head make a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairs {
    /// `i` and `i + R / 2` (Llama as published on the hub, Qwen, Mistral).
    Halves,
    /// `2 i` and `2 i + 1` (GLM, GPT-J).
    Interleaved,
}

/// What a cache keeps of a token in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheLayout {
    /// The key and the value of each key/value head.
    KeysAndValues,
    /// One key, whose first values are the value as well: the latent vector of `rank` values, then what is rotated.
    /// [`Feature::LatentAttention`].
    Latent {
        /// Values of the latent vector, `C`.
        rank: usize,
    },
}

/// The paged cache of one model's keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvCacheSpec {
    /// Layers with a cache.
    pub num_layers: usize,
    /// Blocks in the pool, shared by all layers: block `b` has a place in each layer.
    pub num_blocks: usize,
    /// Tokens in a block, `B`: 16, 32, 64 or 128.
    pub block_size: usize,
    /// Key/value heads, `K`: 1 of latent vectors.
    pub num_kv_heads: usize,
    /// Head size, `D`: that of keys, `C + R`, of latent vectors.
    pub head_dim: usize,
    /// Type of the stored elements.
    pub cache_type: CacheType,
    /// What is stored.
    pub layout: CacheLayout,
}

impl KvCacheSpec {
    /// Bytes that one block takes over all layers, keys and values.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.num_layers * self.block_size * self.num_kv_heads * self.head_bytes()
    }

    /// Bytes of what is kept of one token for one head in one layer.
    #[must_use]
    pub const fn head_bytes(&self) -> usize {
        match self.layout {
            CacheLayout::KeysAndValues => self.cache_type.head_bytes(self.head_dim),
            CacheLayout::Latent { .. } => self.cache_type.latent_bytes(self.head_dim),
        }
    }
}

/// The facts that an attention layer needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionParams {
    /// Query heads, `H`, a multiple of `K`. Query head `h` reads key/value head `h / (H / K)`.
    pub num_heads: usize,
    /// Key/value heads, `K`.
    pub num_kv_heads: usize,
    /// Head size, `D`.
    pub head_dim: usize,
    /// Factor on `q · k`.
    pub scale: f32,
    /// With `Some(w)`, position `p` sees positions `p - w + 1 ..= p` only.
    pub window: Option<usize>,
    /// With `Some(c)`, scores `s` become `c · tanh(s / c)` (Gemma 2).
    pub soft_cap: Option<f32>,
}

impl AttentionParams {
    /// Whether `[rows, cols]` of q, k and v, and layer `layer` of a cache, are those of this attention in a step of `step_rows`.
    pub(crate) fn check(
        &self,
        op: &'static str,
        step_rows: usize,
        [rows, cols]: [usize; 2],
        cache: &KvCacheSpec,
        layer: usize,
    ) -> Result<(), KernelError> {
        check(op, "rows", step_rows, rows)?;
        check(op, "columns of qkv", (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, cols)?;
        if let CacheLayout::Latent { rank } = cache.layout {
            return Err(KernelError::Shape { op, what: "size of latent vectors in the cache", wanted: 0, found: rank });
        }
        check(op, "key/value heads of the cache", self.num_kv_heads, cache.num_kv_heads)?;
        check(op, "head size of the cache", self.head_dim, cache.head_dim)?;
        let groups = self.num_heads / self.num_kv_heads.max(1);
        check(op, "query heads", groups.max(1) * self.num_kv_heads, self.num_heads)?;
        if layer < cache.num_layers {
            return Ok(());
        }
        Err(KernelError::Shape { op, what: "layers of the cache", wanted: layer + 1, found: cache.num_layers })
    }
}

/// The facts that latent attention needs. <https://arxiv.org/abs/2405.04434>, section 2.1
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentParams {
    /// Heads, `H`.
    pub num_heads: usize,
    /// Values of the latent vector that keys and values of all heads are made of, `C`.
    pub rank: usize,
    /// Values of a head's query and key that are not rotated, `N`.
    pub nope_dim: usize,
    /// Values of a head's query that are rotated, and of the one rotated part of the key, which the heads share, `R`.
    pub rope_dim: usize,
    /// Values of a head's output.
    pub v_dim: usize,
    /// Factor on `q · k`.
    pub scale: f32,
}

impl LatentParams {
    /// Values of what the cache keeps of a token, `C + R`.
    #[must_use]
    pub const fn width(&self) -> usize {
        self.rank + self.rope_dim
    }

    /// Values of a head's query, `N + R`.
    #[must_use]
    pub const fn q_dim(&self) -> usize {
        self.nope_dim + self.rope_dim
    }

    /// Whether layer `layer` of a cache is one of this attention.
    pub(crate) fn check(&self, op: &'static str, cache: &KvCacheSpec, layer: usize) -> Result<(), KernelError> {
        let rank = match cache.layout {
            CacheLayout::KeysAndValues => 0,
            CacheLayout::Latent { rank } => rank,
        };
        check(op, "size of latent vectors in the cache", self.rank, rank)?;
        check(op, "values of a token in the cache", self.width(), cache.head_dim)?;
        if layer < cache.num_layers {
            return Ok(());
        }
        Err(KernelError::Shape { op, what: "layers of the cache", wanted: layer + 1, found: cache.num_layers })
    }
}

/// The matrices between the heads of a layer and its latent vectors. Those of the heads are stacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatentHeads<L> {
    /// `[H · C, N]`, `[C, N]` for each head: from the part of its query that is not rotated to a query of latent vectors.
    pub queries: L,
    /// `[H · v_dim, C]`, `[v_dim, C]` for each head: from a mean of latent vectors to its output.
    pub values: L,
}

/// The function on the gate of a gated feed-forward layer: `out = f(gate) · up`. <https://arxiv.org/abs/2002.05202>
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Activation {
    /// `x / (1 + exp(-x))`
    #[default]
    Silu,
    /// `x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))` (Gemma). <https://arxiv.org/abs/1606.08415>
    GeluTanh,
    /// With `g = min(gate, limit)` and `u = clamp(up, -limit, limit)`: `out = g / (1 + exp(-alpha · g)) · (u + 1)` (gpt-oss).
    ClampedSwiglu {
        /// Factor on the gate within the sigmoid.
        alpha: f32,
        /// The largest gate, and the largest size of up; above 0.
        limit: f32,
    },
}

impl Activation {
    /// What a backend needs to have it; `None`: every backend does.
    #[must_use]
    pub const fn feature(self) -> Option<Feature> {
        match self {
            Self::Silu => None,
            Self::GeluTanh => Some(Feature::GeluTanh),
            Self::ClampedSwiglu { .. } => Some(Feature::ClampedSwiglu),
        }
    }
}

/// What some models need beyond Llama. A backend says which of it it has, so that a model is refused before it is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Feature {
    /// A factor on the embedding.
    EmbeddingScale,
    /// [`Activation::GeluTanh`].
    GeluTanh,
    /// Caps on the scores of attention.
    AttentionSoftCap,
    /// Sinks of attention.
    AttentionSinks,
    /// Caps on logits.
    LogitSoftCap,
    /// [`Activation::ClampedSwiglu`].
    ClampedSwiglu,
    /// Mixtures of experts.
    Experts,
    /// Latent attention, and its caches.
    LatentAttention,
    /// [`Backend::pack_stored`].
    StoredQuantization,
}

impl Feature {
    /// Whether there is what it takes on GPUs, be it on some kinds of them: `CudaBackend` has no other. For those who have no GPU
    /// to ask, such as documents. Weights that were stored quantized are [converted](Backend::dense_only).
    #[must_use]
    pub const fn on_gpus(self) -> bool {
        match self {
            Self::EmbeddingScale
            | Self::GeluTanh
            | Self::AttentionSoftCap
            | Self::AttentionSinks
            | Self::LogitSoftCap
            | Self::ClampedSwiglu
            | Self::Experts
            | Self::LatentAttention
            | Self::StoredQuantization => true,
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EmbeddingScale => "a factor on the embedding",
            Self::GeluTanh => "the activation gelu",
            Self::AttentionSoftCap => "soft caps on attention",
            Self::AttentionSinks => "attention sinks",
            Self::LogitSoftCap => "soft caps on logits",
            Self::ClampedSwiglu => "the clamped activation swiglu",
            Self::Experts => "mixtures of experts",
            Self::LatentAttention => "latent attention",
            Self::StoredQuantization => "weights that were stored quantized",
        })
    }
}

/// RMSNorm on each head of q and of k (Qwen3).
#[derive(Debug)]
pub struct QkNorm<'a, V> {
    /// `[D]`
    pub q: &'a V,
    /// `[D]`
    pub k: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

/// Bytes of weights that products have read, each product of a matrix with any number of rows counted once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightReads {
    /// Of all matrices but those of experts.
    pub matrices: u64,
    /// Of the panels of experts' matrices that the threads have gone through.
    pub experts: u64,
    /// Of the matrices of the experts that some row of a step chose, each once: what must be read of experts.
    pub chosen_experts: u64,
}

/// A device's operators. All work of an instance happens in the order of the calls.
///
/// Outputs are resized to the rows they get. Operators check shapes and return [`KernelError::Shape`]; they never panic on
/// bad operands. On a backend that says so, a row's result does not depend on the other rows of the batch.
pub trait Backend: Send + 'static {
    /// Activations `[rows, cols]` in device memory.
    type Tensor: Send;
    /// A small vector of parameters (norm weights), kept in `f32`.
    type Vector: Send + Sync;
    /// A weight matrix `[N, K]` in the layout that the kernels eat, with its bias.
    type Linear: Send + Sync;
    /// Keys and values of all layers.
    type KvCache: Send;
    /// The matrices of all experts of a layer.
    type Experts: Send + Sync;
    /// What [`experts`](Self::experts) works in; the layers of a model share one.
    type ExpertScratch: Send;

    /// The backend's name in messages: `cpu`, `cuda`.
    fn name(&self) -> &'static str;

    /// How many steps may be under way before the results of the first are waited for, one aside. 0: a step is done when
    /// its call returns.
    fn depth(&self) -> usize {
        0
    }

    /// What of weights was read since the backend was made; `None` where nobody counts.
    fn weight_reads(&self) -> Option<WeightReads> {
        None
    }

    /// How long the device has had nothing to do, if it is done with all that it was given.
    fn idle(&self) -> Option<Duration> {
        None
    }

    /// Whether the operators of this backend have `feature`.
    fn supports(&self, feature: Feature) -> bool;

    /// An empty tensor of `cols` columns with room for `max_rows` rows.
    fn tensor(&self, max_rows: usize, cols: usize, what_for: TensorUse) -> Result<Self::Tensor, KernelError>;

    /// Uploads a vector.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector, KernelError>;

    /// Packs `parts`, stacked along the output features (q, k and v; gate and up), into one matrix. All parts have the same
    /// number of columns and the same type. `bias`: `[sum of rows]`. With a scheme, they are quantized on the way.
    fn pack(
        &self,
        parts: &[MatrixView<'_>],
        bias: Option<&[f32]>,
        scheme: Option<Scheme>,
    ) -> Result<Self::Linear, KernelError>;

    /// [`pack`](Self::pack), of parts that were quantized before they were stored; [`Feature::StoredQuantization`]. With a scheme that can hold the codes of all parts
    /// ([`Scheme::holding`]) they are packed as they are, in the order that the parts have in common; with another, their values are
    /// quantized anew. `None`: not quantized any more, as f32 or what is [computed in](Self::dense_only).
    ///
    /// # Errors
    /// Those of [`pack`](Self::pack); [`KernelError::Unsupported`] from a backend that has no kernels for them.
    fn pack_stored(
        &self,
        _parts: &[&dyn StoredMatrix],
        _bias: Option<&[f32]>,
        _scheme: Option<Scheme>,
    ) -> Result<Self::Linear, KernelError> {
        let what = Feature::StoredQuantization.to_string();
        Err(KernelError::Unsupported { op: "pack", what, backend: self.name() })
    }

    /// The type that all weights are packed in by a backend without kernels for quantized ones; `None`: it has some.
    fn dense_only(&self) -> Option<DType> {
        None
    }

    /// The weights of a packed matrix, `[rows, cols]`, in the order of its input features.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] from a backend that cannot give them back.
    fn weights(&self, _matrix: &Self::Linear) -> Result<Vec<f32>, KernelError> {
        let what = "reading packed weights".to_owned();
        Err(KernelError::Unsupported { op: "weights", what, backend: self.name() })
    }

    /// What the rows of `inputs` are, beside those of `exact`, which they should be; both `[T, K]`.
    ///
    /// # Errors
    /// [`KernelError::Shape`]; [`KernelError::Unsupported`] from a backend that has no use for them.
    fn input_sums(&self, _exact: &Self::Tensor, _inputs: &Self::Tensor) -> Result<InputSums, KernelError> {
        let what = "sums of the inputs of a matrix".to_owned();
        Err(KernelError::Unsupported { op: "input_sums", what, backend: self.name() })
    }

    /// Bytes of device memory that a packed `[rows, cols]` matrix takes, of `dtype` or quantized.
    fn packed_bytes(&self, rows: usize, cols: usize, dtype: DType, scheme: Option<Scheme>) -> usize;

    /// The name of the layout of packed matrices, its version in it, if they can be stored and had again: under one name, the
    /// same weights make the same bytes on every machine. `None`: they cannot.
    fn layout(&self) -> Option<&'static str> {
        None
    }

    /// The buffers of a packed matrix, in the order that [`import`](Self::import) takes them; none without a
    /// [`layout`](Self::layout).
    fn export<'a>(&self, _matrix: &'a Self::Linear) -> Vec<&'a [u8]> {
        Vec::new()
    }

    /// The matrix whose buffers these are, used where they stand if the device can: what [`pack`](Self::pack) once gave, in this
    /// process or another. Each starts on a cache line (64 bytes).
    ///
    /// # Errors
    /// [`KernelError::Shape`] if they are not as many, or not as long, as those of a matrix of `shape`;
    /// [`KernelError::Unsupported`] without a [`layout`](Self::layout).
    fn import(&self, _shape: &PackedShape, _buffers: &[SharedBytes]) -> Result<Self::Linear, KernelError> {
        let what = "taking packed weights from a file".to_owned();
        Err(KernelError::Unsupported { op: "import", what, backend: self.name() })
    }

    /// Puts the experts of a layer together, packed one by one. `gate_up`: `N` matrices `[2 F, E]`, gate then up; `down`: as many
    /// `[E, F]`; each all of one type or scheme. Biases are allowed. [`Feature::Experts`].
    ///
    /// # Errors
    /// [`KernelError::Shape`] if they do not fit each other.
    fn pack_experts(&self, gate_up: Vec<Self::Linear>, down: Vec<Self::Linear>) -> Result<Self::Experts, KernelError>;

    /// What [`experts`](Self::experts) works in, for steps of up to `max_rows` rows: experts of `inner` = `F` between `hidden` = `E`
    /// features.
    fn expert_scratch(
        &self,
        max_rows: usize,
        hidden: usize,
        inner: usize,
        routing: &Routing,
    ) -> Result<Self::ExpertScratch, KernelError>;

    /// Calls `task(i)` once for each `i` in `0..num_tasks`, in no order, on the threads of the host that this backend has: for work
    /// on weights while nothing is computed.
    fn for_each(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..num_tasks).for_each(task);
    }

    /// An empty cache.
    fn kv_cache(&self, spec: &KvCacheSpec) -> Result<Self::KvCache, KernelError>;

    /// Announces that the layers of a model have latent attention of these sizes, before the first step: what a backend makes for them is made
    /// now. [`Feature::LatentAttention`].
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] for sizes that it has no kernels for.
    fn expect_latent(&mut self, _params: &LatentParams) -> Result<(), KernelError> {
        if self.supports(Feature::LatentAttention) {
            return Ok(());
        }
        let what = Feature::LatentAttention.to_string();
        Err(KernelError::Unsupported { op: "expect_latent", what, backend: self.name() })
    }

    /// Announces the step whose operators follow, all of them on `cache`: its rows, and the rotary embeddings that its layers
    /// name by index.
    fn begin_step(
        &mut self,
        step: &StepRows<'_>,
        ropes: &[Rope],
        cache: &mut Self::KvCache,
    ) -> Result<Issue, KernelError>;

    /// Ends the operators of a step, or hears why they could not all be issued. A backend that took them down, to issue them as
    /// a whole, and failed at that, asks for them once more.
    ///
    /// # Errors
    /// The error in `issued`, or one of the backend.
    fn end_step(&mut self, issued: Result<(), KernelError>) -> Result<Issue, KernelError> {
        issued.map(|()| Issue::Nothing)
    }

    /// `out[t, :] = scale · table[ids[t], :]` of the step's ids. `table`: `[V, E]`; `out`: `[T, E]`. A scale other than 1 is
    /// [`Feature::EmbeddingScale`].
    fn embed(&mut self, out: &mut Self::Tensor, table: &Self::Linear, scale: f32) -> Result<(), KernelError>;

    /// `out[t, i] = x[t, i] · w[i] / sqrt(mean_j(x[t, j]²) + eps)`. <https://arxiv.org/abs/1910.07467>
    fn rms_norm(
        &mut self,
        out: &mut Self::Tensor,
        x: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
    ) -> Result<(), KernelError>;

    /// `residual += x`, then [`rms_norm`](Self::rms_norm) of `residual` into `out`.
    fn add_rms_norm(
        &mut self,
        out: &mut Self::Tensor,
        residual: &mut Self::Tensor,
        x: &Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
    ) -> Result<(), KernelError>;

    /// `out = x · weightᵀ + bias`. `x`: `[T, K]`; `weight`: `[N, K]`; `out`: `[T, N]`.
    fn linear(&mut self, out: &mut Self::Tensor, x: &Self::Tensor, weight: &Self::Linear) -> Result<(), KernelError>;

    /// [`gate`](Self::gate) of `y` = [`linear`](Self::linear)`(x, weight)`. `weight`: `[2 F, K]`, gate then up; `out`: `[T, F]`;
    /// `scratch`: room for `[T, 2 F]`, left undefined.
    fn gated_linear(
        &mut self,
        out: &mut Self::Tensor,
        scratch: &mut Self::Tensor,
        x: &Self::Tensor,
        weight: &Self::Linear,
        activation: Activation,
    ) -> Result<(), KernelError> {
        self.linear(scratch, x, weight)?;
        self.gate(out, scratch, activation)
    }

    /// Norms (optional) and rotates q and k in place, and puts k and v into the cache at each row's slot.
    /// `qkv`: `[T, (H + 2 K) · D]`, q then k then v. `rope`: index into the ropes of [`begin_step`](Self::begin_step).
    ///
    /// Attention of the same layer follows, or the end of the step: what is left in `qkv` is for it alone, and a backend may
    /// put all of this off until then. The operands stay where they are until the step ends.
    fn rope_and_cache(
        &mut self,
        qkv: &mut Self::Tensor,
        cache: &mut Self::KvCache,
        layer: usize,
        params: &AttentionParams,
        rope: usize,
        qk_norm: Option<QkNorm<'_, Self::Vector>>,
    ) -> Result<(), KernelError>;

    /// Causal attention of each row over its sequence's cached positions. `qkv` as [`rope_and_cache`](Self::rope_and_cache)
    /// left it; `out`: `[T, H · D]`. Prefill chunks and decodes share one call.
    ///
    /// `sinks`: `[H]`, for each head the score of a position that every row sees and whose value is zero (gpt-oss), not scaled
    /// and not capped; [`Feature::AttentionSinks`].
    fn attention(
        &mut self,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        cache: &Self::KvCache,
        layer: usize,
        params: &AttentionParams,
        sinks: Option<&Self::Vector>,
    ) -> Result<(), KernelError>;

    /// Norms the latent vectors, rotates the last `R` values of each head's query and those behind each latent vector, in place, and puts
    /// latent vectors with what was rotated behind them into the cache at each row's slot. `q`: `[T, H · (N + R)]`; `kv`: `[T, C + R]`;
    /// `norm`: `[C]`, with `eps` added to the mean square. `rope`: index into the ropes of [`begin_step`](Self::begin_step).
    ///
    /// [`latent_attention`](Self::latent_attention) of the same layer follows, or the end of the step, as for
    /// [`rope_and_cache`](Self::rope_and_cache). [`Feature::LatentAttention`].
    #[expect(clippy::too_many_arguments, reason = "operands of one operator")]
    fn latent_rope_and_cache(
        &mut self,
        _q: &mut Self::Tensor,
        _kv: &mut Self::Tensor,
        _cache: &mut Self::KvCache,
        _layer: usize,
        _params: &LatentParams,
        _rope: usize,
        _norm: (&Self::Vector, f32),
    ) -> Result<(), KernelError> {
        let what = Feature::LatentAttention.to_string();
        Err(KernelError::Unsupported { op: "latent_rope_and_cache", what, backend: self.name() })
    }

    /// Causal attention of each row over its sequence's cached latent vectors `c[p]`, rotated parts `r[p]` behind them. With the
    /// query of head `h` as `n` (`N` values) and `r'` (`R` values), `s = softmax_p(scale · (queries[h] · n · c[p] + r' · r[p]))`,
    /// `out[t, h] = values[h] · Σ_p s[p] · c[p]`.
    ///
    /// So neither keys nor values of heads are ever made: `queries[h] · n` is the same product with the latent vector as `n` with the key
    /// that would be made of it. `q` as [`latent_rope_and_cache`](Self::latent_rope_and_cache) left it; `out`: `[T, H · v_dim]`.
    /// [`Feature::LatentAttention`].
    fn latent_attention(
        &mut self,
        _out: &mut Self::Tensor,
        _q: &Self::Tensor,
        _cache: &Self::KvCache,
        _layer: usize,
        _params: &LatentParams,
        _heads: &LatentHeads<Self::Linear>,
    ) -> Result<(), KernelError> {
        let what = Feature::LatentAttention.to_string();
        Err(KernelError::Unsupported { op: "latent_attention", what, backend: self.name() })
    }

    /// `out[t, i] = f(x[t, i]) · x[t, F + i]` with the activation `f`. `x`: `[T, 2 F]`, gate then up; `out`: `[T, F]`.
    fn gate(&mut self, out: &mut Self::Tensor, x: &Self::Tensor, activation: Activation) -> Result<(), KernelError>;

    /// `out[t] = Σ weight · (downₑ · h + bias)` over the chosen experts `e` of row `t` in ascending order, `h` being
    /// [`gate`](Self::gate) of `gate_upₑ · x[t] + bias`. Who is chosen, and the weights: [`route`](crate::route).
    ///
    /// `out`, `x`: `[T, E]`; `logits`: `[T, N]` of [`TensorUse::Logits`]; `correction`: `[N]`. What no row chose is not read. Not even here does a
    /// row's result depend on the other rows, where the backend says so.
    #[expect(clippy::too_many_arguments, reason = "what an expert layer is: operands, facts, and a place to work in")]
    fn experts(
        &mut self,
        out: &mut Self::Tensor,
        x: &Self::Tensor,
        logits: &Self::Tensor,
        correction: Option<&Self::Vector>,
        experts: &Self::Experts,
        routing: &Routing,
        activation: Activation,
        scratch: &mut Self::ExpertScratch,
    ) -> Result<(), KernelError>;

    /// `out[t] += sigmoid(gate[t]) · x[t]`, or `out += x` without a gate: the part of a shared expert. `out`, `x`: `[T, E]`;
    /// `gate`: `[T, 1]` of [`TensorUse::Logits`]. [`Feature::Experts`].
    fn add_gated(
        &mut self,
        out: &mut Self::Tensor,
        x: &Self::Tensor,
        gate: Option<&Self::Tensor>,
    ) -> Result<(), KernelError>;

    /// `logits[r, i] = cap · tanh(logits[r, i] / cap)` (Gemma 2), in place; [`Feature::LogitSoftCap`].
    fn soft_cap(&mut self, _logits: &mut Self::Tensor, _cap: f32) -> Result<(), KernelError> {
        Err(KernelError::Unsupported { op: "soft_cap", what: Feature::LogitSoftCap.to_string(), backend: self.name() })
    }

    /// `out[i, :] = x[logit_rows[i], :]` of the step's rows with logits.
    fn gather_logit_rows(&mut self, out: &mut Self::Tensor, x: &Self::Tensor) -> Result<(), KernelError>;

    /// Starts to pick a token for `logits[row.logits_row]` of each row, in order. Rows of `logits` may be overwritten.
    fn sample(&mut self, logits: &mut Self::Tensor, rows: &[SampleRow<'_>]) -> Result<(), KernelError>;

    /// Waits for the tokens of the oldest [`sample`](Self::sample) that was not collected.
    ///
    /// # Errors
    /// [`KernelError::NothingToCollect`], and what went wrong on the device.
    fn collect_sampled(&mut self) -> Result<Vec<Sampled>, KernelError>;

    /// Copies row `row` of a tensor to the host.
    fn read_row(&self, x: &Self::Tensor, row: usize) -> Result<Vec<f32>, KernelError>;
}
