//! The one forward pass: every family's, on every backend.
//!
//! ```text
//! ids ─ embed ─▶ residual ─┬─ norm ─ qkv ─ rope, cache ─ attention ─ out ─┬─ add, norm ─ gate, up ─ silu · ─ down ─▶ (+)
//!                          └────────────────── L times ────────────────────────────────────────────────────────┘
//!                residual ─ norm ─ head ─▶ logits
//! ```

use dashinfer_kernels::{Activation, Backend, Issue, KernelError, QkNorm, Rope, SampleRow, Sampled, StepRows};

use crate::{
    Attention, Conversion, Experts, ForwardBatch, ForwardError, LoadError, LoadProgress, ModelSpec, Quantization,
    StepLimits, WeightCache, WeightSource, WeightsFrom,
    activations::{Activations, AttentionActivations, ExpertActivations, SharedActivations},
    loader::{self, Loaded},
    weights::{AttentionWeights, ExpertWeights, GatedWeights, LatentQueryWeights, LayerWeights, MlpWeights, Packed},
};

/// Why weights and activations are of the kind that the spec says.
const OF_ONE_SPEC: &str = "weights and activations are made for the spec";

/// Is shown hidden states, with their layer; see [`Decoder::forward_observed`].
type Observe<'a, B> = dyn FnMut(&B, usize, &<B as Backend>::Tensor) + 'a;

/// A loaded model. It holds no sequence: what was computed is in the cache, which the caller owns.
pub struct Decoder<B: Backend> {
    backend: B,
    spec: ModelSpec,
    ropes: Vec<Rope>,
    weights: Packed<B>,
    activations: Activations<B::Tensor, B::ExpertScratch>,
    limits: StepLimits,
    num_logit_rows: usize,
    weights_from: WeightsFrom,
    conversions: Vec<Conversion>,
}

impl<B: Backend> Decoder<B> {
    /// Loads the weights of `spec` from `source` onto `backend`, quantized as is asked for, with room for steps of `limits`.
    ///
    /// # Errors
    /// [`LoadError::Weights`] before anything is packed if `source` is not a checkpoint of `spec`, [`LoadError::Config`] for a
    /// spec that was changed into no model, [`LoadError::Kernel`] if the device has no room.
    pub fn load(
        backend: B,
        spec: ModelSpec,
        source: &mut dyn WeightSource,
        limits: StepLimits,
        quantization: Quantization,
        on_progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        Self::load_with_cache(backend, spec, source, limits, quantization, None, on_progress)
    }

    /// [`load`](Self::load), from `cache` if an earlier load of the same weights, quantized in the same way, has left them there,
    /// else into it for later ones. [`weights_from`](Self::weights_from) says what came of it. On a backend without a
    /// [`layout`](Backend::layout), or of a source without an [`identity`](WeightSource::identity), it has no effect.
    ///
    /// # Errors
    /// Those of [`load`](Self::load), and [`LoadError::WeightCache`] if there is nothing to be had from the cache and its folder
    /// cannot be written. A file in it that cannot be used is no error, and nor is a disk that fills up.
    pub fn load_with_cache(
        backend: B,
        spec: ModelSpec,
        source: &mut dyn WeightSource,
        limits: StepLimits,
        quantization: Quantization,
        cache: Option<&WeightCache>,
        on_progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        spec.check()?;
        if let Some(feature) = spec.features().into_iter().find(|feature| !backend.supports(*feature)) {
            let (what, backend) = (feature.to_string(), backend.name());
            return Err(KernelError::Unsupported { op: "load", what, backend }.into());
        }
        let (backend, loaded) = loader::load(backend, &spec, source, quantization, cache, on_progress)?;
        let Loaded { weights, weights_from, conversions } = loaded;
        Ok(Self { weights_from, conversions, ..Self::with_weights(backend, spec, weights, limits)? })
    }

    /// A decoder with weights that are packed.
    pub(crate) fn with_weights(
        mut backend: B,
        spec: ModelSpec,
        weights: Packed<B>,
        limits: StepLimits,
    ) -> Result<Self, KernelError> {
        if let Attention::Latent(attention) = &spec.attention {
            backend.expect_latent(&attention.params())?;
        }
        let activations = Activations::new(&backend, &spec, limits)?;
        let ropes = spec.ropes.iter().map(|rope| rope.rope(spec.max_positions)).collect();
        let (weights_from, conversions) = (WeightsFrom::Source, Vec::new());
        Ok(Self { backend, spec, ropes, weights, activations, limits, num_logit_rows: 0, weights_from, conversions })
    }

    /// What [`with_weights`](Self::with_weights) took.
    pub(crate) fn into_parts(self) -> (B, Packed<B>) {
        (self.backend, self.weights)
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Where the weights came from.
    pub fn weights_from(&self) -> &WeightsFrom {
        &self.weights_from
    }

    /// What became of the weights that were stored quantized.
    pub fn conversions(&self) -> &[Conversion] {
        &self.conversions
    }

    /// The largest step there is room for.
    pub fn limits(&self) -> StepLimits {
        self.limits
    }

    /// The backend, to make a cache with.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The backend, for work between steps.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Computes one step: appends the keys and values of every row to `cache`, and gives logits for
    /// [`logit_rows`](ForwardBatch::logit_rows). Allocates nothing itself.
    ///
    /// The batch must have passed [`ForwardBatch::check`] for this cache. Here only what belongs to the decoder is checked
    /// again; a contradiction with the cache is the backend's to report.
    ///
    /// # Errors
    /// [`ForwardError`]. The cache may then hold some of the step's rows; computing them again puts them right.
    pub fn forward(&mut self, batch: &ForwardBatch, cache: &mut B::KvCache) -> Result<Logits<'_, B>, ForwardError> {
        self.step(batch, cache, None)
    }

    /// [`forward`](Self::forward), and shows the hidden states: `observe(backend, l, x)` gets the input of layer `l`,
    /// `[T, E]`, and at last, with `l = L`, the final norm of the rows that get logits. To find where two
    /// implementations part.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_observed(
        &mut self,
        batch: &ForwardBatch,
        cache: &mut B::KvCache,
        observe: &mut Observe<'_, B>,
    ) -> Result<Logits<'_, B>, ForwardError> {
        self.step(batch, cache, Some(observe))
    }

    fn step(
        &mut self,
        batch: &ForwardBatch,
        cache: &mut B::KvCache,
        observe: Option<&mut Observe<'_, B>>,
    ) -> Result<Logits<'_, B>, ForwardError> {
        self.num_logit_rows = 0;
        batch.check_limits(&self.spec, self.limits)?;
        let step = StepRows {
            ids: &batch.ids,
            carried: &batch.carried,
            paged: &batch.paged,
            logit_rows: &batch.logit_rows,
            may_record: observe.is_none(),
        };
        let mut nobody = |_: &B, _: usize, _: &B::Tensor| ();
        let observe = observe.unwrap_or(&mut nobody);
        let mut next = self.backend.begin_step(&step, &self.ropes, cache)?;
        while next == Issue::Operators {
            let issued = self.issue(batch, cache, &mut *observe);
            next = self.backend.end_step(issued)?;
        }
        self.num_logit_rows = batch.logit_rows.len();
        Ok(self.logits())
    }

    /// The operators of a step.
    fn issue(
        &mut self,
        batch: &ForwardBatch,
        cache: &mut B::KvCache,
        observe: &mut Observe<'_, B>,
    ) -> Result<(), KernelError> {
        self.backend.embed(&mut self.activations.residual, &self.weights.embed, self.spec.embedding_scale)?;
        let last = self.spec.num_layers() - 1;
        for layer in 0..last {
            self.project(layer, cache, observe)?;
            self.attend(layer, cache)?;
            self.finish_layer(layer, false)?;
        }
        // The last layer's keys and values are needed of every row; all that follows, of those with logits alone.
        self.project(last, cache, observe)?;
        if !batch.logit_rows.is_empty() {
            self.attend(last, cache)?;
            let picked = self.pick(batch)?;
            self.finish_layer(last, picked)?;
            self.head(picked, observe)?;
        }
        Ok(())
    }

    /// Waits for the tokens of the oldest [`Logits::sample`] that was not collected.
    ///
    /// # Errors
    /// Those of [`Backend::collect_sampled`].
    pub fn collect_sampled(&mut self) -> Result<Vec<Sampled>, KernelError> {
        self.backend.collect_sampled()
    }

    /// The logits of the last step. It has none if it asked for none or failed.
    pub fn logits(&mut self) -> Logits<'_, B> {
        Logits { backend: &mut self.backend, tensor: &mut self.activations.logits, num_rows: self.num_logit_rows }
    }

    /// Adds what the layer below left in `delta` to the residual, norms it, projects it to q, k and v, and caches k and v.
    fn project(
        &mut self,
        layer: usize,
        cache: &mut B::KvCache,
        observe: &mut Observe<'_, B>,
    ) -> Result<(), KernelError> {
        let Self { backend, spec, weights, activations: x, .. } = self;
        let (facts, layer_weights) = (&spec.layers[layer], &weights.layers[layer]);
        let norm = &layer_weights.attention_norm;
        if layer == 0 {
            backend.rms_norm(&mut x.normed, &x.residual, norm, spec.norm_eps)?;
        } else {
            backend.add_rms_norm(&mut x.normed, &mut x.residual, &x.delta, norm, spec.norm_eps)?;
        }
        observe(backend, layer, &x.residual);
        match (&spec.attention, &layer_weights.attention, &mut x.attention) {
            (Attention::Grouped(attention), AttentionWeights::Grouped(w), AttentionActivations::Grouped { qkv }) => {
                backend.linear(qkv, &x.normed, &w.qkv)?;
                let qk_norm = w.qk_norm.as_ref();
                let qk_norm = qk_norm.map(|norms| QkNorm { q: &norms.q, k: &norms.k, eps: spec.norm_eps });
                backend.rope_and_cache(qkv, cache, layer, &attention.params(facts), facts.rope, qk_norm)
            }
            (
                Attention::Latent(attention),
                AttentionWeights::Latent(w),
                AttentionActivations::Latent { q, compressed, kv },
            ) => {
                match (&w.queries, compressed) {
                    (LatentQueryWeights::Compressed { down, norm, up }, Some([compressed, normed])) => {
                        backend.linear(compressed, &x.normed, down)?;
                        backend.rms_norm(normed, compressed, norm, attention.norm_eps)?;
                        backend.linear(q, normed, up)?;
                    }
                    (LatentQueryWeights::Direct(weight), None) => backend.linear(q, &x.normed, weight)?,
                    _ => unreachable!("{OF_ONE_SPEC}"),
                }
                backend.linear(kv, &x.normed, &w.kv)?;
                let norm = (&w.kv_norm, attention.norm_eps);
                backend.latent_rope_and_cache(q, kv, cache, layer, &attention.params(), facts.rope, norm)
            }
            _ => unreachable!("{OF_ONE_SPEC}"),
        }
    }

    fn attend(&mut self, layer: usize, cache: &B::KvCache) -> Result<(), KernelError> {
        let Self { backend, spec, weights, activations: x, .. } = self;
        match (&spec.attention, &weights.layers[layer].attention, &x.attention) {
            (Attention::Grouped(attention), AttentionWeights::Grouped(w), AttentionActivations::Grouped { qkv }) => {
                let params = attention.params(&spec.layers[layer]);
                backend.attention(&mut x.heads, qkv, cache, layer, &params, w.sinks.as_ref())
            }
            (Attention::Latent(attention), AttentionWeights::Latent(w), AttentionActivations::Latent { q, .. }) => {
                backend.latent_attention(&mut x.heads, q, cache, layer, &attention.params(), &w.heads)
            }
            _ => unreachable!("{OF_ONE_SPEC}"),
        }
    }

    /// Gathers the rows that get logits, unless all do (a step of decodes). Returns whether it did.
    fn pick(&mut self, batch: &ForwardBatch) -> Result<bool, KernelError> {
        let Self { backend, activations: x, .. } = self;
        let rows = &batch.logit_rows;
        if rows.len() == batch.num_rows() {
            return Ok(false); // ascending and as many: the very rows
        }
        backend.gather_logit_rows(&mut x.picked_heads, &x.heads)?;
        backend.gather_logit_rows(&mut x.picked_residual, &x.residual)?;
        Ok(true)
    }

    /// What follows attention in a layer: its output projection, and the MLP, whose result is left in `delta`.
    fn finish_layer(&mut self, layer: usize, picked: bool) -> Result<(), KernelError> {
        let Self { backend, spec, weights, activations: x, .. } = self;
        let LayerWeights { attention_out, post_attention_norm, mlp_norm, mlp, post_mlp_norm, .. } =
            &weights.layers[layer];
        let (heads, residual) =
            if picked { (&x.picked_heads, &mut x.picked_residual) } else { (&x.heads, &mut x.residual) };
        backend.linear(&mut x.delta, heads, attention_out)?;
        post_norm(backend, &mut x.delta, &mut x.post, post_attention_norm.as_ref(), spec.norm_eps)?;
        backend.add_rms_norm(&mut x.normed, residual, &x.delta, mlp_norm, spec.norm_eps)?;
        match mlp {
            MlpWeights::Dense(mlp) => {
                let to = [&mut x.gate_up, &mut x.inner, &mut x.delta];
                feed_forward(backend, to, &x.normed, mlp, spec.mlp.activation)?;
            }
            MlpWeights::Experts(experts) => mix(backend, spec.experts.as_ref(), x, experts)?,
        }
        post_norm(backend, &mut x.delta, &mut x.post, post_mlp_norm.as_ref(), spec.norm_eps)
    }

    fn head(&mut self, picked: bool, observe: &mut Observe<'_, B>) -> Result<(), KernelError> {
        let Self { backend, spec, weights, activations: x, .. } = self;
        let residual = if picked { &mut x.picked_residual } else { &mut x.residual };
        backend.add_rms_norm(&mut x.normed, residual, &x.delta, &weights.norm, spec.norm_eps)?;
        observe(backend, spec.num_layers(), &x.normed);
        backend.linear(&mut x.logits, &x.normed, weights.head.as_ref().unwrap_or(&weights.embed))?;
        match spec.logit_soft_cap {
            Some(cap) => backend.soft_cap(&mut x.logits, cap),
            None => Ok(()),
        }
    }
}

/// A gated feed-forward layer: the last of the three tensors gets what it computes of `x`.
fn feed_forward<B: Backend>(
    backend: &mut B,
    [gate_up, inner, out]: [&mut B::Tensor; 3],
    x: &B::Tensor,
    weights: &GatedWeights<B::Linear>,
    activation: Activation,
) -> Result<(), KernelError> {
    backend.gated_linear(inner, gate_up, x, &weights.gate_up, activation)?;
    backend.linear(out, inner, &weights.down)
}

/// A mixture of experts: `delta` gets what the chosen ones, and the shared one, compute of `normed`.
fn mix<B: Backend>(
    backend: &mut B,
    facts: Option<&Experts>,
    x: &mut Activations<B::Tensor, B::ExpertScratch>,
    weights: &ExpertWeights<B::Linear, B::Vector, B::Experts>,
) -> Result<(), KernelError> {
    let (Some(facts), Some(own)) = (facts, &mut x.experts) else { unreachable!("{OF_ONE_SPEC}") };
    let ExpertActivations { logits, scratch, shared } = own;
    let (routing, activation) = (&facts.routing, facts.activation);
    backend.linear(logits, &x.normed, &weights.router)?;
    let correction = weights.correction.as_ref();
    backend.experts(&mut x.delta, &x.normed, logits, correction, &weights.experts, routing, activation, scratch)?;
    let (Some(weights), Some(SharedActivations { gate_up, inner, out, gate })) = (&weights.shared, shared) else {
        return Ok(());
    };
    feed_forward(backend, [gate_up, inner, out], &x.normed, &weights.mlp, activation)?;
    if let (Some(weight), Some(gate)) = (&weights.gate, &mut *gate) {
        backend.linear(gate, &x.normed, weight)?;
    }
    backend.add_gated(&mut x.delta, out, gate.as_ref())
}

/// Norms `delta` if its layer says so. The two tensors change places, twice in a layer: a recorded step finds them where they were.
fn post_norm<B: Backend>(
    backend: &mut B,
    delta: &mut B::Tensor,
    post: &mut Option<B::Tensor>,
    norm: Option<&B::Vector>,
    eps: f32,
) -> Result<(), KernelError> {
    if let (Some(post), Some(norm)) = (post, norm) {
        backend.rms_norm(post, delta, norm, eps)?;
        std::mem::swap(post, delta);
    }
    Ok(())
}

impl<B: Backend> std::fmt::Debug for Decoder<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (backend, spec, limits) = (self.backend.name(), &self.spec, &self.limits);
        f.debug_struct("Decoder").field("backend", &backend).field("spec", spec).field("limits", limits).finish()
    }
}

/// The logits of a step, still on the device, with the backend that can read them and sample from them.
pub struct Logits<'a, B: Backend> {
    backend: &'a mut B,
    tensor: &'a mut B::Tensor,
    num_rows: usize,
}

impl<B: Backend> Logits<'_, B> {
    /// Rows: as many as the batch had [`logit_rows`](ForwardBatch::logit_rows).
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Starts to pick a token for each of `rows`; [`Decoder::collect_sampled`] waits for them. Logits may be overwritten.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if a row has no logits, and what the backend reports.
    pub fn sample(&mut self, rows: &[SampleRow<'_>]) -> Result<(), KernelError> {
        for row in rows {
            self.check_row("sample", row.logits_row)?;
        }
        self.backend.sample(self.tensor, rows)
    }

    /// Copies one row to the host.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the row has no logits, and what the backend reports.
    pub fn read_row(&self, row: usize) -> Result<Vec<f32>, KernelError> {
        self.check_row("read_row", row)?;
        self.backend.read_row(self.tensor, row)
    }

    fn check_row(&self, op: &'static str, row: usize) -> Result<(), KernelError> {
        if row < self.num_rows {
            return Ok(());
        }
        Err(KernelError::Shape { op, what: "rows of logits", wanted: row + 1, found: self.num_rows })
    }
}

impl<B: Backend> std::fmt::Debug for Logits<'_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Logits").field("num_rows", &self.num_rows).finish_non_exhaustive()
    }
}
