//! A backend on which every tensor is two, and every matrix is quantized when it is first used.

use std::sync::{Mutex, PoisonError};

use dashinfer_kernels::{
    Activation, AttentionParams, Backend, DType, Feature, Issue, KernelError, KvCacheSpec, MatrixView, QkNorm, Rope,
    Routing, SampleRow, Sampled, Scheme, StepRows, TensorUse, compensate,
};

/// A tensor or a cache, with the weights as they are, and with those that were quantized.
#[derive(Debug)]
pub(crate) struct Twin<T> {
    exact: T,
    /// None before [`start_rounding`](TwinBackend::start_rounding), and none of logits: nobody asks for them.
    rounded: Option<T>,
}

/// A matrix of the backend that packed it, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MatrixId(usize);

/// See [`Twin`]. Before [`start_rounding`](Self::start_rounding) it computes with the weights as they are, and is otherwise the backend
/// below it. After that it is good for one step.
#[derive(Debug)]
pub(crate) struct TwinBackend<B: Backend> {
    inner: B,
    matrices: Mutex<Vec<Matrix<B::Linear>>>,
    is_rounding: bool,
}

#[derive(Debug)]
struct Matrix<L> {
    /// Until it is quantized.
    exact: Option<L>,
    rounded: Option<L>,
    shape: [usize; 2],
    bias: Option<Vec<f32>>,
    scheme: Option<Scheme>,
}

/// Whether a model that needs `feature` can be computed here.
pub(super) fn can(feature: Feature) -> bool {
    matches!(
        feature,
        Feature::EmbeddingScale
            | Feature::GeluTanh
            | Feature::AttentionSoftCap
            | Feature::AttentionSinks
            | Feature::LogitSoftCap
    )
}

impl<L> Matrix<L> {
    /// Quantizes it, weight by weight, if it is to be quantized and was not yet.
    fn round<B: Backend<Linear = L>>(&mut self, backend: &B) -> Result<&L, KernelError> {
        if self.rounded.is_none() {
            let exact = self.exact.take();
            self.rounded = match (self.scheme, exact) {
                (Some(scheme), Some(exact)) => {
                    let weights = backend.weights(&exact)?;
                    drop(exact);
                    Some(self.pack(backend, &weights, scheme)?)
                }
                (_, exact) => exact,
            };
        }
        self.rounded.as_ref().ok_or_else(|| no_matrix(backend))
    }

    fn pack<B: Backend<Linear = L>>(&self, backend: &B, weights: &[f32], scheme: Scheme) -> Result<L, KernelError> {
        let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        let [rows, cols] = self.shape;
        let view = MatrixView { bytes: &bytes, dtype: DType::F32, rows, cols };
        backend.pack(&[view], self.bias.as_deref(), Some(scheme))
    }

    /// Quantizes it for its inputs, `x`.
    fn compensate<B: Backend<Linear = L>>(&mut self, backend: &B, x: &Twin<B::Tensor>) -> Result<(), KernelError> {
        let (Some(scheme), Some(exact), Some(rounded)) = (self.scheme, &self.exact, &x.rounded) else {
            return Ok(());
        };
        let weights = backend.weights(exact)?;
        let sums = backend.input_sums(&x.exact, rounded)?;
        let found = compensate(&weights, sums, scheme, &|num_tasks, task| backend.for_each(num_tasks, task))?;
        self.rounded = Some(match found {
            Some(codes) => backend.pack_stored(&[&codes.matrix()?], self.bias.as_deref(), Some(scheme))?,
            None => self.pack(backend, &weights, scheme)?,
        });
        Ok(())
    }
}

fn no_matrix<B: Backend>(backend: &B) -> KernelError {
    let what = "a matrix that is used twice in a step".to_owned();
    KernelError::Unsupported { op: "compensate", what, backend: backend.name() }
}

impl<B: Backend> TwinBackend<B> {
    pub(crate) fn new(inner: B) -> Self {
        Self { inner, matrices: Mutex::new(Vec::new()), is_rounding: false }
    }

    /// From now on tensors are two. Those that were made before are not to be used any more.
    pub(crate) fn start_rounding(&mut self) {
        self.is_rounding = true;
    }

    /// The backend below, and all matrices in the order in which they were packed. Those that no step has used are quantized weight by
    /// weight.
    pub(crate) fn finish(self) -> Result<(B, Vec<B::Linear>), KernelError> {
        let matrices = self.matrices.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut packed = Vec::with_capacity(matrices.len());
        for mut matrix in matrices {
            matrix.round(&self.inner)?;
            packed.extend(matrix.rounded);
        }
        Ok((self.inner, packed))
    }

    fn twin<T>(&self, make: impl Fn() -> Result<T, KernelError>) -> Result<Twin<T>, KernelError> {
        Ok(Twin { exact: make()?, rounded: self.is_rounding.then(make).transpose()? })
    }

    fn matrix(&mut self, id: MatrixId) -> (&mut B, Option<&mut Matrix<B::Linear>>) {
        let matrices = self.matrices.get_mut().unwrap_or_else(PoisonError::into_inner);
        (&mut self.inner, matrices.get_mut(id.0))
    }

    /// Calls `operator` for `x` with the weights as they are, then, when those are quantized, with what has become of them.
    fn product(
        &mut self,
        out: &mut Twin<B::Tensor>,
        x: &Twin<B::Tensor>,
        id: MatrixId,
        mut operator: impl FnMut(&mut B, &mut B::Tensor, &B::Tensor, &B::Linear, bool) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let (backend, matrix) = self.matrix(id);
        let Some(matrix) = matrix else { return Err(no_matrix(backend)) };
        let exact = matrix.exact.as_ref().ok_or_else(|| no_matrix(backend))?;
        operator(backend, &mut out.exact, &x.exact, exact, false)?;
        let (Some(out), Some(rounded_x)) = (&mut out.rounded, &x.rounded) else { return Ok(()) };
        matrix.compensate(backend, x)?;
        matrix.exact = if matrix.rounded.is_some() { None } else { matrix.exact.take() };
        let rounded = matrix.round(backend)?;
        operator(backend, out, rounded_x, rounded, true)
    }
}

impl<B: Backend> Backend for TwinBackend<B> {
    type Tensor = Twin<B::Tensor>;
    type Vector = B::Vector;
    type Linear = MatrixId;
    type KvCache = Twin<B::KvCache>;
    type Experts = B::Experts;
    type ExpertScratch = B::ExpertScratch;

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn supports(&self, feature: Feature) -> bool {
        can(feature) && self.inner.supports(feature)
    }

    fn tensor(&self, max_rows: usize, cols: usize, what_for: TensorUse) -> Result<Self::Tensor, KernelError> {
        match what_for {
            TensorUse::Logits if self.is_rounding => {
                Ok(Twin { exact: self.inner.tensor(0, cols, what_for)?, rounded: None })
            }
            _ => self.twin(|| self.inner.tensor(max_rows, cols, what_for)),
        }
    }

    fn vector(&self, values: &[f32]) -> Result<B::Vector, KernelError> {
        self.inner.vector(values)
    }

    fn pack(
        &self,
        parts: &[MatrixView<'_>],
        bias: Option<&[f32]>,
        scheme: Option<Scheme>,
    ) -> Result<MatrixId, KernelError> {
        let exact = Some(self.inner.pack(parts, bias, None)?);
        let shape = [parts.iter().map(|part| part.rows).sum(), parts.first().map_or(0, |part| part.cols)];
        let mut matrices = self.matrices.lock().unwrap_or_else(PoisonError::into_inner);
        matrices.push(Matrix { exact, rounded: None, shape, bias: bias.map(<[f32]>::to_vec), scheme });
        Ok(MatrixId(matrices.len() - 1))
    }

    fn packed_bytes(&self, rows: usize, cols: usize, dtype: DType, scheme: Option<Scheme>) -> usize {
        self.inner.packed_bytes(rows, cols, dtype, scheme)
    }

    fn pack_experts(&self, _: Vec<MatrixId>, _: Vec<MatrixId>) -> Result<B::Experts, KernelError> {
        Err(self.no_experts())
    }

    fn expert_scratch(&self, _: usize, _: usize, _: usize, _: &Routing) -> Result<B::ExpertScratch, KernelError> {
        Err(self.no_experts())
    }

    fn for_each(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.inner.for_each(num_tasks, task);
    }

    fn kv_cache(&self, spec: &KvCacheSpec) -> Result<Self::KvCache, KernelError> {
        self.twin(|| self.inner.kv_cache(spec))
    }

    fn begin_step(
        &mut self,
        step: &StepRows<'_>,
        ropes: &[Rope],
        cache: &mut Self::KvCache,
    ) -> Result<Issue, KernelError> {
        self.inner.begin_step(&StepRows { may_record: false, ..*step }, ropes, &mut cache.exact)
    }

    fn end_step(&mut self, issued: Result<(), KernelError>) -> Result<Issue, KernelError> {
        self.inner.end_step(issued)
    }

    fn embed(&mut self, out: &mut Self::Tensor, table: &MatrixId, scale: f32) -> Result<(), KernelError> {
        let (backend, matrix) = self.matrix(*table);
        let Some(matrix) = matrix else { return Err(no_matrix(backend)) };
        let exact = matrix.exact.as_ref().ok_or_else(|| no_matrix(backend))?;
        backend.embed(&mut out.exact, exact, scale)?;
        match &mut out.rounded {
            Some(out) => {
                let rounded = matrix.round(backend)?;
                backend.embed(out, rounded, scale)
            }
            None => Ok(()),
        }
    }

    fn rms_norm(
        &mut self,
        out: &mut Self::Tensor,
        x: &Self::Tensor,
        weight: &B::Vector,
        eps: f32,
    ) -> Result<(), KernelError> {
        self.inner.rms_norm(&mut out.exact, &x.exact, weight, eps)?;
        match (&mut out.rounded, &x.rounded) {
            (Some(out), Some(x)) => self.inner.rms_norm(out, x, weight, eps),
            _ => Ok(()),
        }
    }

    fn add_rms_norm(
        &mut self,
        out: &mut Self::Tensor,
        residual: &mut Self::Tensor,
        x: &Self::Tensor,
        weight: &B::Vector,
        eps: f32,
    ) -> Result<(), KernelError> {
        self.inner.add_rms_norm(&mut out.exact, &mut residual.exact, &x.exact, weight, eps)?;
        match (&mut out.rounded, &mut residual.rounded, &x.rounded) {
            (Some(out), Some(residual), Some(x)) => self.inner.add_rms_norm(out, residual, x, weight, eps),
            _ => Ok(()),
        }
    }

    fn linear(&mut self, out: &mut Self::Tensor, x: &Self::Tensor, weight: &MatrixId) -> Result<(), KernelError> {
        if self.is_rounding && out.rounded.is_none() {
            return Ok(()); // logits
        }
        self.product(out, x, *weight, |backend, out, x, weight, _| backend.linear(out, x, weight))
    }

    fn gated_linear(
        &mut self,
        out: &mut Self::Tensor,
        scratch: &mut Self::Tensor,
        x: &Self::Tensor,
        weight: &MatrixId,
        activation: Activation,
    ) -> Result<(), KernelError> {
        self.product(out, x, *weight, |backend, out, x, weight, is_rounded| {
            let scratch = match &mut scratch.rounded {
                Some(rounded) if is_rounded => rounded,
                _ => &mut scratch.exact,
            };
            backend.gated_linear(out, scratch, x, weight, activation)
        })
    }

    fn rope_and_cache(
        &mut self,
        qkv: &mut Self::Tensor,
        cache: &mut Self::KvCache,
        layer: usize,
        params: &AttentionParams,
        rope: usize,
        qk_norm: Option<QkNorm<'_, B::Vector>>,
    ) -> Result<(), KernelError> {
        let again = qk_norm.as_ref().map(|norm| QkNorm { q: norm.q, k: norm.k, eps: norm.eps });
        self.inner.rope_and_cache(&mut qkv.exact, &mut cache.exact, layer, params, rope, qk_norm)?;
        match (&mut qkv.rounded, &mut cache.rounded) {
            (Some(qkv), Some(cache)) => self.inner.rope_and_cache(qkv, cache, layer, params, rope, again),
            _ => Ok(()),
        }
    }

    fn attention(
        &mut self,
        out: &mut Self::Tensor,
        qkv: &Self::Tensor,
        cache: &Self::KvCache,
        layer: usize,
        params: &AttentionParams,
        sinks: Option<&B::Vector>,
    ) -> Result<(), KernelError> {
        self.inner.attention(&mut out.exact, &qkv.exact, &cache.exact, layer, params, sinks)?;
        match (&mut out.rounded, &qkv.rounded, &cache.rounded) {
            (Some(out), Some(qkv), Some(cache)) => self.inner.attention(out, qkv, cache, layer, params, sinks),
            _ => Ok(()),
        }
    }

    fn gate(&mut self, out: &mut Self::Tensor, x: &Self::Tensor, activation: Activation) -> Result<(), KernelError> {
        self.inner.gate(&mut out.exact, &x.exact, activation)?;
        match (&mut out.rounded, &x.rounded) {
            (Some(out), Some(x)) => self.inner.gate(out, x, activation),
            _ => Ok(()),
        }
    }

    fn experts(
        &mut self,
        _: &mut Self::Tensor,
        _: &Self::Tensor,
        _: &Self::Tensor,
        _: Option<&B::Vector>,
        _: &B::Experts,
        _: &Routing,
        _: Activation,
        _: &mut B::ExpertScratch,
    ) -> Result<(), KernelError> {
        Err(self.no_experts())
    }

    fn add_gated(
        &mut self,
        _: &mut Self::Tensor,
        _: &Self::Tensor,
        _: Option<&Self::Tensor>,
    ) -> Result<(), KernelError> {
        Err(self.no_experts())
    }

    fn soft_cap(&mut self, logits: &mut Self::Tensor, cap: f32) -> Result<(), KernelError> {
        if self.is_rounding { Ok(()) } else { self.inner.soft_cap(&mut logits.exact, cap) }
    }

    fn gather_logit_rows(&mut self, out: &mut Self::Tensor, x: &Self::Tensor) -> Result<(), KernelError> {
        self.inner.gather_logit_rows(&mut out.exact, &x.exact)?;
        match (&mut out.rounded, &x.rounded) {
            (Some(out), Some(x)) => self.inner.gather_logit_rows(out, x),
            _ => Ok(()),
        }
    }

    fn sample(&mut self, logits: &mut Self::Tensor, rows: &[SampleRow<'_>]) -> Result<(), KernelError> {
        self.inner.sample(&mut logits.exact, rows)
    }

    fn collect_sampled(&mut self) -> Result<Vec<Sampled>, KernelError> {
        self.inner.collect_sampled()
    }

    fn read_row(&self, x: &Self::Tensor, row: usize) -> Result<Vec<f32>, KernelError> {
        self.inner.read_row(&x.exact, row)
    }
}

impl<B: Backend> TwinBackend<B> {
    fn no_experts(&self) -> KernelError {
        let what = format!("errors of models with {}", Feature::Experts);
        KernelError::Unsupported { op: "compensate", what, backend: self.name() }
    }
}
