//! The tensors between operators: allocated once for the largest step, used again by every step.

use dashinfer_kernels::{Backend, DType, KernelError, TensorUse};

use crate::{Attention, Experts, GroupedAttention, LatentAttention, ModelSpec, SharedExpert};

/// The largest step that a decoder has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens in a step, `T`: the scheduler's token budget.
    pub max_tokens: usize,
    /// Rows of a step that get logits. One for each sequence is enough to sample; each row takes `V` values.
    pub max_logit_rows: usize,
}

/// Columns of the activations. What a backend needs for experts beside them is its own to say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Widths {
    hidden: usize,
    attention: AttentionWidths,
    heads: usize,
    /// Of layers without experts; 0 if there are none.
    mlp: usize,
    experts: Option<ExpertWidths>,
    vocab: usize,
    post_norms: bool,
}

/// Columns of what layers with experts have of their own. The logits are f32.
#[derive(Debug, Clone, Copy)]
struct ExpertWidths {
    num_experts: usize,
    shared: Option<SharedExpert>,
}

impl ExpertWidths {
    fn new(experts: &Experts) -> Self {
        Self { num_experts: experts.routing.num_experts, shared: experts.shared }
    }

    /// Columns of activations, and of logits.
    fn total(self, hidden: usize) -> [usize; 2] {
        match self.shared {
            None => [0, self.num_experts],
            Some(SharedExpert { size, gated }) => [3 * size + hidden, self.num_experts + usize::from(gated)],
        }
    }
}

/// Columns of what attention works in before its output.
#[derive(Debug, Clone, Copy)]
enum AttentionWidths {
    Grouped { qkv: usize },
    Latent { q: usize, compressed: Option<usize>, kv: usize },
}

impl AttentionWidths {
    fn total(self) -> usize {
        match self {
            Self::Grouped { qkv } => qkv,
            Self::Latent { q, compressed, kv } => q + 2 * compressed.unwrap_or(0) + kv,
        }
    }
}

impl Widths {
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let (attention, heads) = match &spec.attention {
            Attention::Grouped(GroupedAttention { num_heads, num_kv_heads, head_dim, .. }) => {
                let qkv = (num_heads + 2 * num_kv_heads) * head_dim;
                (AttentionWidths::Grouped { qkv }, num_heads * head_dim)
            }
            Attention::Latent(LatentAttention { num_heads, q_rank, kv_rank, nope_dim, rope_dim, v_dim, .. }) => {
                let (q, kv) = (num_heads * (nope_dim + rope_dim), kv_rank + rope_dim);
                (AttentionWidths::Latent { q, compressed: *q_rank, kv }, num_heads * v_dim)
            }
        };
        Self {
            hidden: spec.hidden_size,
            attention,
            heads,
            mlp: if spec.layers.iter().any(|layer| !layer.experts) { spec.mlp.size } else { 0 },
            experts: spec.experts.as_ref().map(ExpertWidths::new),
            vocab: spec.vocab_size,
            post_norms: spec.post_norms,
        }
    }

    /// Bytes of all activations of type `dtype`, and of logits, which are f32.
    pub(crate) fn bytes(&self, limits: StepLimits, dtype: DType) -> u64 {
        let [experts, router] = self.experts.map_or([0; 2], |experts| experts.total(self.hidden));
        let of_hidden = if self.post_norms { 4 } else { 3 };
        let token = of_hidden * self.hidden + self.attention.total() + self.heads + 3 * self.mlp + experts;
        let picked = self.hidden + self.heads;
        let times = |rows: usize, cols: usize, size: usize| {
            (rows as u64).saturating_mul(cols as u64).saturating_mul(size as u64)
        };
        times(limits.max_tokens, token, dtype.size_bytes())
            .saturating_add(times(limits.max_tokens, router, size_of::<f32>()))
            .saturating_add(times(limits.max_logit_rows, picked, dtype.size_bytes()))
            .saturating_add(times(limits.max_logit_rows, self.vocab, size_of::<f32>()))
    }
}

/// `T` rows each, the last three one row for each row of logits.
pub(crate) struct Activations<T, S> {
    /// `[T, E]`: the sum of all layers so far.
    pub(crate) residual: T,
    /// `[T, E]`: the residual, normed.
    pub(crate) normed: T,
    /// `[T, E]`: what attention or MLP adds to the residual.
    pub(crate) delta: T,
    /// `[T, E]`: `delta`, normed, where that is so.
    pub(crate) post: Option<T>,
    pub(crate) attention: AttentionActivations<T>,
    /// `[T, H · D]`
    pub(crate) heads: T,
    /// `[T, 2 F]`
    pub(crate) gate_up: T,
    /// `[T, F]`
    pub(crate) inner: T,
    pub(crate) experts: Option<ExpertActivations<T, S>>,
    /// `[R, E]`: rows of `residual`.
    pub(crate) picked_residual: T,
    /// `[R, H · D]`: rows of `heads`.
    pub(crate) picked_heads: T,
    /// `[R, V]`
    pub(crate) logits: T,
}

/// What layers with experts work in, with the backend's own scratch.
pub(crate) struct ExpertActivations<T, S> {
    /// `[T, N]`
    pub(crate) logits: T,
    pub(crate) scratch: S,
    pub(crate) shared: Option<SharedActivations<T>>,
}

/// What a shared expert works in.
pub(crate) struct SharedActivations<T> {
    /// `[T, 2 F]`
    pub(crate) gate_up: T,
    /// `[T, F]`
    pub(crate) inner: T,
    /// `[T, E]`
    pub(crate) out: T,
    /// `[T, 1]`
    pub(crate) gate: Option<T>,
}

/// What attention works in before its output.
pub(crate) enum AttentionActivations<T> {
    Grouped {
        /// `[T, (H + 2 K) · D]`
        qkv: T,
    },
    Latent {
        /// `[T, H · (N + R)]`
        q: T,
        /// `[T, Q]` twice, where queries are made of compressed vectors: those, and normed.
        compressed: Option<[T; 2]>,
        /// `[T, C + R]`
        kv: T,
    },
}

impl<T, S> Activations<T, S> {
    pub(crate) fn new<B: Backend<Tensor = T, ExpertScratch = S>>(
        backend: &B,
        spec: &ModelSpec,
        limits: StepLimits,
    ) -> Result<Self, KernelError> {
        let widths = Widths::new(spec);
        let of_tokens = |cols| backend.tensor(limits.max_tokens, cols, TensorUse::Activations);
        let of_logit_rows = |cols| backend.tensor(limits.max_logit_rows, cols, TensorUse::Activations);
        Ok(Self {
            residual: of_tokens(widths.hidden)?,
            normed: of_tokens(widths.hidden)?,
            delta: of_tokens(widths.hidden)?,
            post: widths.post_norms.then(|| of_tokens(widths.hidden)).transpose()?,
            attention: match widths.attention {
                AttentionWidths::Grouped { qkv } => AttentionActivations::Grouped { qkv: of_tokens(qkv)? },
                AttentionWidths::Latent { q, compressed, kv } => AttentionActivations::Latent {
                    q: of_tokens(q)?,
                    compressed: match compressed {
                        Some(rank) => Some([of_tokens(rank)?, of_tokens(rank)?]),
                        None => None,
                    },
                    kv: of_tokens(kv)?,
                },
            },
            heads: of_tokens(widths.heads)?,
            gate_up: of_tokens(2 * widths.mlp)?,
            inner: of_tokens(widths.mlp)?,
            experts: match &spec.experts {
                Some(experts) => Some(ExpertActivations::new(backend, experts, spec.hidden_size, limits)?),
                None => None,
            },
            picked_residual: of_logit_rows(widths.hidden)?,
            picked_heads: of_logit_rows(widths.heads)?,
            logits: backend.tensor(limits.max_logit_rows, widths.vocab, TensorUse::Logits)?,
        })
    }
}

impl<T, S> ExpertActivations<T, S> {
    fn new<B: Backend<Tensor = T, ExpertScratch = S>>(
        backend: &B,
        experts: &Experts,
        hidden: usize,
        limits: StepLimits,
    ) -> Result<Self, KernelError> {
        let widths = ExpertWidths::new(experts);
        let of_tokens = |cols, what_for| backend.tensor(limits.max_tokens, cols, what_for);
        Ok(Self {
            logits: of_tokens(widths.num_experts, TensorUse::Logits)?,
            scratch: backend.expert_scratch(limits.max_tokens, hidden, experts.size, &experts.routing)?,
            shared: match widths.shared {
                Some(SharedExpert { size, gated }) => Some(SharedActivations {
                    gate_up: of_tokens(2 * size, TensorUse::Activations)?,
                    inner: of_tokens(size, TensorUse::Activations)?,
                    out: of_tokens(hidden, TensorUse::Activations)?,
                    gate: gated.then(|| of_tokens(1, TensorUse::Logits)).transpose()?,
                }),
                None => None,
            },
        })
    }
}
