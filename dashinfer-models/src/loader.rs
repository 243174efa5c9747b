//! From named tensors to packed weights: first the proof that they are this model's, then packing, one matrix at a time.

use std::{borrow::Cow, collections::HashSet, vec};

use dashinfer_kernels::{
    Backend, DType, Feature, LatentHeads, MatrixView, PackedShape, StoredMatrix, cpu::to_bytes, to_f32,
};

use crate::{
    CacheFault, Conversion, LoadError, ModelSpec, Quantization, StoredQuantization, StoredType, WeightCache,
    WeightSource, WeightsError, WeightsFrom,
    compensation::{self, TwinBackend},
    formats::{self, HeadsForm, MatrixForm},
    receding::{RUN_BYTES, Receding},
    weight_cache::{StoredWeights, Writer},
    weights::{Fill, LinearPlan, Packed, Part, Plan, Stacked, StoredHeads, VectorPlan},
};

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadProgress {
    /// Tensors packed so far.
    pub tensors_done: usize,
    /// Tensors in all.
    pub tensors_total: usize,
    /// Their bytes, as stored.
    pub bytes_done: u64,
    /// The bytes of all tensors, as stored.
    pub bytes_total: u64,
}

/// The weights, where they came from, and what became of those that were stored quantized.
pub(crate) struct Loaded<B: Backend> {
    pub(crate) weights: Packed<B>,
    pub(crate) weights_from: WeightsFrom,
    pub(crate) conversions: Vec<Conversion>,
}

/// Loads the weights of `spec`, from `cache` if they are there, else into it, and calls `on_progress` after each matrix or vector
/// that was packed.
///
/// Nothing is packed unless all of `source` fits: a wrong checkpoint fails at once, not after the last gigabyte. Memory
/// stays near the packed size: a tensor is given back to its source as soon as it is packed, and one that is quantized on the way behind
/// those who read it, some megabytes at a time.
pub(crate) fn load<B: Backend>(
    backend: B,
    spec: &ModelSpec,
    source: &mut dyn WeightSource,
    quantization: Quantization,
    cache: Option<&WeightCache>,
    on_progress: &mut dyn FnMut(LoadProgress),
) -> Result<(B, Loaded<B>), LoadError> {
    let (plan, stored) = (Plan::new(spec), spec.stored_quantization.as_ref());
    let quantization = backend.dense_only().map_or(quantization, |dtype| quantization.dense_only(dtype));
    if quantization.is_compensated() {
        compensation::check(&backend, spec, quantization)?;
    }
    let progress = prove(spec, &plan, source)?;
    let all = LoadProgress { tensors_done: progress.tensors_total, bytes_done: progress.bytes_total, ..progress };
    let conversions = formats::conversions(&plan, source, stored, quantization)?;
    let (mut writer, mut replaced) = (None, None);
    if let Some(file) = cache.and_then(|cache| cache.file(&backend, &plan, source, stored, quantization)) {
        let kept = StoredWeights::open(&file, &backend);
        match kept.and_then(|kept| kept.map(|k| take(&plan, k, source, stored, quantization)).transpose()) {
            Ok(Some(weights)) => {
                on_progress(all);
                return Ok((backend, Loaded { weights, weights_from: WeightsFrom::Cache, conversions }));
            }
            Ok(None) => {}
            Err(fault) => replaced = Some(fault),
        }
        writer = Some(file.writer()?);
    }
    let (backend, ready) = if quantization.is_compensated() {
        compensate(backend, spec, &plan, source, quantization, progress, on_progress)?
    } else {
        (backend, Vec::new())
    };
    let mut silent = |_| ();
    let report = if ready.is_empty() { &mut *on_progress } else { &mut silent };
    let ready = ready.into_iter();
    let mut loader =
        Loader { backend: &backend, source, stored, quantization, ready, writer, progress, on_progress: report };
    let weights = plan.fill(&mut loader)?;
    let weights_from = loader.writer.map_or(WeightsFrom::Source, |writer| writer.finish(replaced));
    if quantization.is_compensated() {
        on_progress(all);
    }
    Ok((backend, Loaded { weights, weights_from, conversions }))
}

/// Packs all matrices of a plan with codes that make up for each other's errors; in the order in which a plan is filled. That takes
/// all weights as they are stored at once.
fn compensate<B: Backend>(
    backend: B,
    spec: &ModelSpec,
    plan: &Plan,
    source: &mut dyn WeightSource,
    quantization: Quantization,
    progress: LoadProgress,
    on_progress: &mut dyn FnMut(LoadProgress),
) -> Result<(B, Vec<B::Linear>), LoadError> {
    let twin = TwinBackend::new(backend);
    let (ready, stored, writer) = (Vec::new().into_iter(), None, None);
    let mut loader =
        Loader { backend: &twin, source, stored, quantization, ready, writer, progress, on_progress: &mut |_| () };
    let weights = plan.fill(&mut loader)?;
    compensation::quantize(twin, spec, weights, &mut |layer, num_layers| {
        let part = |all: u64| (u128::from(all) * layer as u128 / num_layers.max(1) as u128) as u64;
        let (tensors_done, bytes_done) = (part(progress.tensors_total as u64) as usize, part(progress.bytes_total));
        on_progress(LoadProgress { tensors_done, bytes_done, ..progress });
    })
}

/// Takes all weights of a plan from a file.
fn take<B: Backend>(
    plan: &Plan,
    kept: StoredWeights<'_, B>,
    source: &dyn WeightSource,
    stored: Option<&StoredQuantization>,
    quantization: Quantization,
) -> Result<Packed<B>, CacheFault> {
    let mut taker = Taker { kept, source, stored, quantization };
    let weights = plan.fill(&mut taker)?;
    taker.kept.finish()?;
    Ok(weights)
}

/// What a matrix of the plan is when it is packed.
fn packed_shape(plan: &LinearPlan, form: &MatrixForm) -> PackedShape {
    let &MatrixForm { dtype, scheme, order, .. } = form;
    PackedShape { rows: plan.rows(), cols: plan.cols, dtype, scheme, bias: plan.bias, order }
}

/// The proof: every parameter has a tensor of its shape and of a type that we read, and every tensor is used or may be
/// ignored. Returns what there is to load.
pub(crate) fn prove(spec: &ModelSpec, plan: &Plan, source: &dyn WeightSource) -> Result<LoadProgress, WeightsError> {
    let stored = spec.stored_quantization.as_ref();
    let wanted = formats::wanted(plan, source, stored)?;
    let mut missing = Vec::new();
    let mut bytes_total = 0;
    for tensor in &wanted {
        match tensor.check(source)? {
            Some(bytes) => bytes_total += bytes as u64,
            None => missing.push(tensor),
        }
    }
    match missing[..] {
        [] => {}
        [tensor] if plan.head_weight().as_ref() == Some(&tensor.name) => return Err(WeightsError::MissingHead),
        [tensor, ref rest @ ..] => {
            let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
            return Err(WeightsError::Missing { name, shape, more: rest.len() });
        }
    }
    let used: HashSet<&str> = wanted.iter().map(|tensor| tensor.name.as_str()).collect();
    let is_used = |name: &&str| used.contains(name) || plan.ignores(&spec.names, name) || spec.is_extra(name);
    let unused = source.names().into_iter().filter(|name| !is_used(name));
    let left = unused.filter(|name| !formats::ignores(stored, source, name));
    let mut left: Vec<&str> = left.collect();
    left.sort_unstable();
    if let [first, rest @ ..] = &left[..] {
        return Err(WeightsError::LeftOver { name: (*first).to_owned(), more: rest.len() });
    }
    Ok(LoadProgress { tensors_done: 0, tensors_total: wanted.len(), bytes_done: 0, bytes_total })
}

/// The type in which the parts of one matrix are packed: their own, or `f32` if they differ.
pub(crate) fn common_type(types: impl IntoIterator<Item = DType>) -> DType {
    let mut types = types.into_iter();
    let first = types.next().unwrap_or(DType::F32);
    if types.all(|other| other == first) { first } else { DType::F32 }
}

fn float_type(name: &str, stored: StoredType) -> Result<DType, WeightsError> {
    match stored {
        StoredType::Float(dtype) => Ok(dtype),
        other => {
            let (name, wanted) = (name.to_owned(), formats::Types::Float.to_string());
            Err(WeightsError::DType { name, found: other.to_string(), wanted })
        }
    }
}

/// Takes from a file what was packed before, in place of a source that was proven.
struct Taker<'a, B> {
    kept: StoredWeights<'a, B>,
    source: &'a dyn WeightSource,
    stored: Option<&'a StoredQuantization>,
    quantization: Quantization,
}

impl<B: Backend> Fill<B::Linear, B::Vector, B::Experts> for Taker<'_, B> {
    type Error = CacheFault;

    fn linear(&mut self, plan: &LinearPlan) -> Result<B::Linear, CacheFault> {
        let form = MatrixForm::new(plan, self.source, self.stored, self.quantization);
        // The proof has had all forms.
        let form = form.map_err(|error| CacheFault::Header(error.to_string()))?;
        self.kept.matrix(&packed_shape(plan, &form))
    }

    fn vector(&mut self, plan: &VectorPlan) -> Result<B::Vector, CacheFault> {
        self.kept.vector(plan.len)
    }

    fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<B::Linear>, CacheFault> {
        let form = HeadsForm::new(plan, self.source, self.stored, self.quantization);
        let form = form.map_err(|error| CacheFault::Header(error.to_string()))?; // the proof has had it
        let mut take = |plan| self.kept.matrix(&form.packed_shape(plan));
        Ok(LatentHeads { queries: take(&plan.queries)?, values: take(&plan.values)? })
    }

    fn experts(&mut self, gate_up: Vec<B::Linear>, down: Vec<B::Linear>) -> Result<B::Experts, CacheFault> {
        self.kept.experts(gate_up, down)
    }
}

/// Packs what a proven source holds.
struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: &'a mut dyn WeightSource,
    stored: Option<&'a StoredQuantization>,
    quantization: Quantization,
    /// Matrices that are packed already, the next ones of the plan.
    ready: vec::IntoIter<B::Linear>,
    /// Stores what was packed.
    writer: Option<Writer>,
    progress: LoadProgress,
    on_progress: &'a mut dyn FnMut(LoadProgress),
}

/// A tensor in memory.
struct Tensor<'a> {
    bytes: Cow<'a, [u8]>,
    dtype: DType,
}

impl Tensor<'_> {
    fn to_f32(&self) -> Vec<f32> {
        to_f32(&self.bytes, self.dtype)
    }

    /// What is a part's of it, which `take` takes out where others are in it too.
    fn part(self, part: &Part, take: impl FnOnce(&Stacked, &[u8], usize) -> Vec<u8>) -> Self {
        let Some(stacked) = &part.stacked else { return self };
        let bytes = take(stacked, &self.bytes, self.dtype.size_bytes());
        Self { bytes: Cow::Owned(bytes), ..self }
    }

    fn into_type(self, dtype: DType) -> Self {
        if self.dtype == dtype {
            return self;
        }
        debug_assert_eq!(dtype, DType::F32, "types are only widened");
        let bytes = self.to_f32().into_iter().flat_map(f32::to_le_bytes).collect();
        Self { bytes: Cow::Owned(bytes), dtype }
    }

    /// Rows of `cols` values, each divided by its length and rounded to the type again, as the reference does. A row of zeros stays
    /// what it is: the bound on its length is that of the reference.
    fn with_unit_rows(self, cols: usize) -> Self {
        const SHORTEST: f64 = 1e-12;
        let mut values = self.to_f32();
        for row in values.chunks_exact_mut(cols) {
            let length = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt().max(SHORTEST);
            row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
        }
        Self { bytes: Cow::Owned(to_bytes(&values, self.dtype)), dtype: self.dtype }
    }
}

impl<B: Backend> Loader<'_, B> {
    /// The proof has found each tensor with the shape that is asked for here.
    fn read(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, WeightsError> {
        let missing = || WeightsError::Missing { name: name.to_owned(), shape: shape.to_vec(), more: 0 };
        let dtype = float_type(name, self.source.info(name).ok_or_else(missing)?.dtype)?;
        Ok(Tensor { bytes: self.source.read(name).ok_or_else(missing)?, dtype })
    }

    /// A part, a matrix of `cols` columns.
    fn part(&self, part: &Part, cols: usize) -> Result<Tensor<'_>, WeightsError> {
        let tensor = self.read(&part.weight(), &part.weight_shape(cols))?;
        Ok(tensor.part(part, |stacked, bytes, size| stacked.rows(bytes, [part.rows, cols], size)))
    }

    /// The bias of a part.
    fn bias_of(&self, part: &Part) -> Result<Tensor<'_>, WeightsError> {
        let tensor = self.read(&part.bias(), &part.bias_shape())?;
        Ok(tensor.part(part, |stacked, bytes, size| stacked.values(bytes, part.rows, size)))
    }

    /// Gives `tensors` back and counts them.
    fn finish(&mut self, tensors: &[String]) {
        for name in tensors {
            self.source.release(name);
            self.progress.bytes_done += self.source.info(name).map_or(0, |info| formats::stored_bytes(&info) as u64);
        }
        self.progress.tensors_done += tensors.len();
        (self.on_progress)(self.progress);
    }
}

impl<B: Backend> Fill<B::Linear, B::Vector, B::Experts> for Loader<'_, B> {
    type Error = LoadError;

    fn linear(&mut self, plan: &LinearPlan) -> Result<B::Linear, LoadError> {
        let form = MatrixForm::new(plan, &*self.source, self.stored, self.quantization)?;
        let (mut names, bias) = (Vec::new(), self.bias(plan)?);
        let packed = if let Some(packed) = self.ready.next() {
            names.extend(plan.parts.iter().map(Part::weight));
            packed
        } else if form.is_stored() || self.recedes(plan, &form) {
            self.pack_stored(plan, &form, bias.as_deref(), &mut names)?
        } else {
            self.pack(plan, &form, bias.as_deref(), &mut names)?
        };
        if plan.bias {
            names.extend(plan.last_parts().map(Part::bias));
        }
        if let Some(writer) = &mut self.writer {
            writer.matrix(self.backend, &packed_shape(plan, &form), &packed);
        }
        self.finish(&names);
        Ok(packed)
    }

    fn vector(&mut self, plan: &VectorPlan) -> Result<B::Vector, LoadError> {
        let tensor = self.read(&plan.name, &[plan.len])?;
        let mut values = tensor.to_f32();
        drop(tensor);
        values.iter_mut().for_each(|value| *value += plan.offset);
        let vector = self.backend.vector(&values)?;
        if let Some(writer) = &mut self.writer {
            writer.vector(self.backend, &values);
        }
        self.finish(std::slice::from_ref(&plan.name));
        Ok(vector)
    }

    fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<B::Linear>, LoadError> {
        let heads = StoredHeads::new(plan);
        let form = HeadsForm::new(plan, self.source, self.stored, self.quantization)?;
        let dtype = form.dtype;
        let (names, [queries, values]) = match &form.stored {
            Some(module) => {
                let [rows, cols] = heads.shape();
                let mut all = vec![0.0; rows * cols];
                module.open(self.source)?.values(0..rows, 0..cols, &mut all);
                let names: Vec<String> = module.names().map(str::to_owned).collect();
                (names, split_heads(&heads, &to_bytes(&all, dtype), dtype.size_bytes()))
            }
            None => {
                let name = heads.part.weight();
                let tensor = self.read(&name, &heads.shape())?;
                let split = split_heads(&heads, &tensor.bytes, dtype.size_bytes());
                drop(tensor);
                (vec![name], split)
            }
        };
        let pack = |loader: &mut Self, plan: &LinearPlan, bytes: Vec<u8>| -> Result<B::Linear, LoadError> {
            let view = MatrixView { bytes: &bytes, dtype, rows: plan.rows(), cols: plan.cols };
            let packed = loader.backend.pack(&[view], None, None)?;
            if let Some(writer) = &mut loader.writer {
                writer.matrix(loader.backend, &form.packed_shape(plan), &packed);
            }
            Ok(packed)
        };
        let heads =
            LatentHeads { queries: pack(self, &plan.queries, queries)?, values: pack(self, &plan.values, values)? };
        self.finish(&names);
        Ok(heads)
    }

    fn experts(&mut self, gate_up: Vec<B::Linear>, down: Vec<B::Linear>) -> Result<B::Experts, LoadError> {
        Ok(self.backend.pack_experts(gate_up, down)?)
    }
}

/// The rows of all heads that make keys, each head's transposed, and those that make values. `bytes`: the stored tensor, of elements
/// of `size` bytes.
fn split_heads(stored: &StoredHeads<'_>, bytes: &[u8], size: usize) -> [Vec<u8>; 2] {
    let &StoredHeads { num_heads, rank, nope_dim, v_dim, .. } = stored;
    let row_bytes = rank * size;
    let mut keys = vec![0; num_heads * nope_dim * row_bytes];
    let mut values = Vec::with_capacity(num_heads * v_dim * row_bytes);
    let heads = bytes.chunks_exact((nope_dim + v_dim) * row_bytes).zip(keys.chunks_exact_mut(nope_dim * row_bytes));
    for (head, keys) in heads {
        let (to_keys, to_values) = head.split_at(nope_dim * row_bytes);
        for (i, row) in to_keys.chunks_exact(row_bytes).enumerate() {
            for (column, element) in keys.chunks_exact_mut(nope_dim * size).zip(row.chunks_exact(size)) {
                column[i * size..(i + 1) * size].copy_from_slice(element);
            }
        }
        values.extend_from_slice(to_values);
    }
    [keys, values]
}

impl<B: Backend> Loader<'_, B> {
    fn bias(&self, plan: &LinearPlan) -> Result<Option<Vec<f32>>, WeightsError> {
        let mut bias = Vec::new();
        if plan.bias {
            for part in &plan.parts {
                bias.extend(self.bias_of(part)?.to_f32());
            }
        }
        Ok(plan.bias.then_some(bias))
    }

    /// Packs weights that are stored in floating point; adds the names of their tensors to `names`.
    fn pack(
        &self,
        plan: &LinearPlan,
        form: &MatrixForm,
        bias: Option<&[f32]>,
        names: &mut Vec<String>,
    ) -> Result<B::Linear, LoadError> {
        let tensors = plan.parts.iter().map(|part| self.part(part, plan.cols));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let dtype = form.dtype;
        let tensors = tensors.into_iter().map(|tensor| tensor.into_type(dtype));
        let tensors: Vec<_> = if plan.unit_rows {
            tensors.map(|tensor| tensor.with_unit_rows(plan.cols)).collect()
        } else {
            tensors.collect()
        };
        let views: Vec<_> = plan
            .parts
            .iter()
            .zip(&tensors)
            .map(|(part, tensor)| MatrixView { bytes: &tensor.bytes, dtype, rows: part.rows, cols: plan.cols })
            .collect();
        names.extend(plan.last_parts().map(Part::weight));
        Ok(self.backend.pack(&views, bias, form.scheme)?)
    }

    /// Whether weights that are stored in floating point are quantized a few rows at a time, and given back behind: all but those of which a copy
    /// is made first. The packed bytes are the same.
    fn recedes(&self, plan: &LinearPlan, form: &MatrixForm) -> bool {
        form.scheme.is_some()
            && !plan.unit_rows
            && plan.parts.iter().all(|part| part.stacked.is_none())
            && self.backend.supports(Feature::StoredQuantization)
    }

    /// Packs weights of which some, or all, are stored quantized, or [recede](Self::recedes); adds the names of their tensors to `names`.
    fn pack_stored(
        &self,
        plan: &LinearPlan,
        form: &MatrixForm,
        bias: Option<&[f32]>,
        names: &mut Vec<String>,
    ) -> Result<B::Linear, LoadError> {
        let mut dense = Vec::new();
        for (part, stored) in plan.parts.iter().zip(&form.parts) {
            match stored {
                Some(module) if part.is_last() => names.extend(module.names().map(str::to_owned)),
                Some(_) => {}
                None => {
                    names.extend(part.is_last().then(|| part.weight()));
                    dense.push((part, self.part(part, plan.cols)?));
                }
            }
        }
        let mut dense_parts: Vec<Box<dyn StoredMatrix + '_>> = Vec::with_capacity(dense.len());
        for (part, tensor) in &dense {
            let view = MatrixView { bytes: &tensor.bytes, dtype: tensor.dtype, rows: part.rows, cols: plan.cols };
            dense_parts.push(match &tensor.bytes {
                Cow::Borrowed(_) => Box::new(Receding::new(view, &*self.source, part.weight(), RUN_BYTES)),
                // A copy goes as a whole.
                Cow::Owned(_) => Box::new(view),
            });
        }
        let opened = form.parts.iter().flatten().map(|module| module.open(&*self.source));
        let opened = opened.collect::<Result<Vec<_>, _>>()?;
        let (mut opened_parts, mut dense_parts) = (opened.iter(), dense_parts.iter());
        let parts: Vec<&dyn StoredMatrix> = form
            .parts
            .iter()
            .filter_map(|part| match part {
                Some(_) => opened_parts.next().map(|part| &**part),
                None => dense_parts.next().map(|part| &**part),
            })
            .collect();
        Ok(self.backend.pack_stored(&parts, bias, form.scheme)?)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use dashinfer_kernels::{
        CacheType,
        cpu::{CpuBackend, CpuConfig, CpuLinear, packed_bytes},
    };

    use super::*;
    use crate::{Checkpoint, MemoryEstimate, StepLimits};

    #[test]
    fn heads_are_split_and_their_keys_transposed() {
        let part = Part::whole("kv_b".to_owned(), 2);
        let stored = StoredHeads { part: &part, num_heads: 2, rank: 3, nope_dim: 2, v_dim: 1 };
        assert_eq!(stored.shape(), [6, 3]);
        let elements = |list: &[u16]| -> Vec<u8> { list.iter().flat_map(|element| element.to_le_bytes()).collect() };
        let bytes = elements(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19]);
        let [queries, values] = split_heads(&stored, &bytes, 2);
        assert_eq!(queries, elements(&[1, 4, 2, 5, 3, 6, 11, 14, 12, 15, 13, 16]));
        assert_eq!(values, elements(&[7, 8, 9, 17, 18, 19]));
    }

    /// The two matrices of `plan`, and how many tensors and bytes were counted.
    pub(crate) fn pack_heads(
        source: &mut dyn WeightSource,
        stored: Option<&StoredQuantization>,
        quantization: Quantization,
        plan: &LatentHeads<LinearPlan>,
    ) -> (LatentHeads<CpuLinear>, usize, u64) {
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        let (backend, on_progress) = (&backend, &mut |_| ());
        let progress = LoadProgress { tensors_done: 0, tensors_total: 0, bytes_done: 0, bytes_total: 0 };
        let (ready, writer) = (Vec::new().into_iter(), None);
        let mut loader = Loader { backend, source, stored, quantization, ready, writer, progress, on_progress };
        let heads = loader.heads(plan).unwrap();
        (heads, loader.progress.tensors_done, loader.progress.bytes_done)
    }

    /// Packs one thing after the other and adds up what they take.
    struct Sum<'a>(Loader<'a, CpuBackend>, u64);

    impl Sum<'_> {
        fn add(&mut self, matrix: &CpuLinear, bias: bool) {
            self.1 += (matrix.bytes() + if bias { 4 * matrix.rows() } else { 0 }) as u64;
        }
    }

    impl Fill<(), (), ()> for Sum<'_> {
        type Error = LoadError;

        fn linear(&mut self, plan: &LinearPlan) -> Result<(), LoadError> {
            let packed = self.0.linear(plan)?;
            self.add(&packed, plan.bias);
            Ok(())
        }

        fn vector(&mut self, plan: &VectorPlan) -> Result<(), LoadError> {
            self.1 += 4 * self.0.vector(plan)?.len() as u64;
            Ok(())
        }

        fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<()>, LoadError> {
            let LatentHeads { queries, values } = self.0.heads(plan)?;
            self.add(&queries, false);
            self.add(&values, false);
            Ok(LatentHeads { queries: (), values: () })
        }

        fn experts(&mut self, _: Vec<()>, _: Vec<()>) -> Result<(), LoadError> {
            Ok(())
        }
    }

    #[test]
    fn an_estimate_is_the_sum_of_what_is_packed() {
        let goldens = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens");
        let folders = std::fs::read_dir(goldens).unwrap().map(|entry| entry.unwrap().path());
        let quantizations = ["stored", "none", "a16w4-g32", "a8w8"].map(|name| name.parse::<Quantization>().unwrap());
        for folder in folders.filter(|path| path.is_dir()) {
            let spec = ModelSpec::read(&folder).unwrap();
            let (plan, stored) = (Plan::new(&spec), spec.stored_quantization.as_ref());
            for quantization in quantizations {
                let mut source = Checkpoint::open(&folder).unwrap();
                let limits = StepLimits { max_tokens: 1, max_logit_rows: 1 };
                let f32 = DType::F32;
                let estimate =
                    MemoryEstimate::new(&spec, &source, f32, CacheType::F32, limits, quantization, &packed_bytes);
                let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
                let progress = prove(&spec, &plan, &source).unwrap();
                let mut last = progress;
                let mut on_progress = |progress| last = progress;
                let loader = Loader {
                    backend: &backend,
                    source: &mut source,
                    stored,
                    quantization,
                    ready: Vec::new().into_iter(),
                    writer: None,
                    progress,
                    on_progress: &mut on_progress,
                };
                let mut sum = Sum(loader, 0);
                plan.fill(&mut sum).unwrap();
                assert_eq!(estimate.unwrap().weight_bytes, sum.1, "{folder:?} {quantization:?}");
                let wanted = (last.tensors_total, last.bytes_total);
                assert_eq!((last.tensors_done, last.bytes_done), wanted, "{folder:?} {quantization:?}");
            }
        }
    }
}
