//! The tensors between operators: allocated once for the largest step, used again by every step.

use dashinfer_kernels::{Backend, DType, KernelError, TensorUse};

use crate::ModelSpec;

/// The largest step that a decoder has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens in a step, `T`: the scheduler's token budget.
    pub max_tokens: usize,
    /// Rows of a step that get logits. One for each sequence is enough to sample; each row takes `V` values.
    pub max_logit_rows: usize,
}

/// Columns of the activations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Widths {
    hidden: usize,
    qkv: usize,
    heads: usize,
    mlp: usize,
    vocab: usize,
    post_norms: bool,
}

impl Widths {
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let attention = spec.attention;
        Self {
            hidden: spec.hidden_size,
            qkv: (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim,
            heads: attention.num_heads * attention.head_dim,
            mlp: spec.mlp.size,
            vocab: spec.vocab_size,
            post_norms: spec.post_norms,
        }
    }

    /// Bytes of all activations of type `dtype`, and of logits, which are f32.
    pub(crate) fn bytes(&self, limits: StepLimits, dtype: DType) -> u64 {
        let token = if self.post_norms { 4 } else { 3 } * self.hidden + self.qkv + self.heads + 3 * self.mlp;
        let picked = self.hidden + self.heads;
        let times = |rows: usize, cols: usize, size: usize| {
            (rows as u64).saturating_mul(cols as u64).saturating_mul(size as u64)
        };
        times(limits.max_tokens, token, dtype.size_bytes())
            .saturating_add(times(limits.max_logit_rows, picked, dtype.size_bytes()))
            .saturating_add(times(limits.max_logit_rows, self.vocab, size_of::<f32>()))
    }
}

/// `T` rows each, the last three one row for each row of logits.
pub(crate) struct Activations<T> {
    /// `[T, E]`: the sum of all layers so far.
    pub(crate) residual: T,
    /// `[T, E]`: the residual, normed.
    pub(crate) normed: T,
    /// `[T, E]`: what attention or MLP adds to the residual.
    pub(crate) delta: T,
    /// `[T, E]`: `delta`, normed, where that is so.
    pub(crate) post: Option<T>,
    /// `[T, (H + 2 K) · D]`
    pub(crate) qkv: T,
    /// `[T, H · D]`
    pub(crate) heads: T,
    /// `[T, 2 F]`
    pub(crate) gate_up: T,
    /// `[T, F]`
    pub(crate) inner: T,
    /// `[R, E]`: rows of `residual`.
    pub(crate) picked_residual: T,
    /// `[R, H · D]`: rows of `heads`.
    pub(crate) picked_heads: T,
    /// `[R, V]`
    pub(crate) logits: T,
}

impl<T> Activations<T> {
    pub(crate) fn new<B: Backend<Tensor = T>>(
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
            qkv: of_tokens(widths.qkv)?,
            heads: of_tokens(widths.heads)?,
            gate_up: of_tokens(2 * widths.mlp)?,
            inner: of_tokens(widths.mlp)?,
            picked_residual: of_logit_rows(widths.hidden)?,
            picked_heads: of_logit_rows(widths.heads)?,
            logits: backend.tensor(limits.max_logit_rows, widths.vocab, TensorUse::Logits)?,
        })
    }
}
