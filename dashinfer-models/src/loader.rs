//! From named tensors to packed weights: first the proof that they are this model's, then packing, one matrix at a time.

use std::{borrow::Cow, collections::HashSet};

use dashinfer_kernels::{Backend, DType, LatentHeads, MatrixView, PackedShape, cpu::to_bytes, to_f32};

use crate::{
    CacheFault, LoadError, ModelSpec, Quantization, StoredType, WeightCache, WeightSource, WeightsError, WeightsFrom,
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

/// The weights, and where they came from.
type Loaded<B> = (Packed<B>, WeightsFrom);

/// Loads the weights of `spec`, from `cache` if they are there, else into it, and calls `on_progress` after each matrix or vector
/// that was packed.
///
/// Nothing is packed unless all of `source` fits: a wrong checkpoint fails at once, not after the last gigabyte. Memory
/// stays near the packed size: a tensor is given back to its source as soon as it is packed.
pub(crate) fn load<B: Backend>(
    backend: &B,
    spec: &ModelSpec,
    source: &mut dyn WeightSource,
    quantization: Quantization,
    cache: Option<&WeightCache>,
    on_progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded<B>, LoadError> {
    let plan = Plan::new(spec);
    let progress = prove(spec, &plan, source)?;
    let Some(file) = cache.and_then(|cache| cache.file(backend, &plan, source, quantization)) else {
        let mut loader = Loader { backend, source, quantization, writer: None, progress, on_progress };
        return Ok((plan.fill(&mut loader)?, WeightsFrom::Source));
    };
    let stored = StoredWeights::open(&file, backend);
    let replaced = match stored.and_then(|stored| stored.map(|s| take(&plan, s, source, quantization)).transpose()) {
        Ok(Some(weights)) => {
            let (tensors_done, bytes_done) = (progress.tensors_total, progress.bytes_total);
            on_progress(LoadProgress { tensors_done, bytes_done, ..progress });
            return Ok((weights, WeightsFrom::Cache));
        }
        Ok(None) => None,
        Err(fault) => Some(fault),
    };
    let writer = Some(file.writer()?);
    let mut loader = Loader { backend, source, quantization, writer, progress, on_progress };
    let weights = plan.fill(&mut loader)?;
    let weights_from = loader.writer.map_or(WeightsFrom::Source, |writer| writer.finish(replaced));
    Ok((weights, weights_from))
}

/// Takes all weights of a plan from a file.
fn take<B: Backend>(
    plan: &Plan,
    stored: StoredWeights<'_, B>,
    source: &dyn WeightSource,
    quantization: Quantization,
) -> Result<Packed<B>, CacheFault> {
    let mut taker = Taker { stored, source, quantization };
    let weights = plan.fill(&mut taker)?;
    taker.stored.finish()?;
    Ok(weights)
}

/// What a matrix of the plan is when it is packed.
fn packed_shape(source: &dyn WeightSource, plan: &LinearPlan, quantization: Quantization) -> PackedShape {
    let types = plan.parts.iter().filter_map(|part| match source.info(&part.weight())?.dtype {
        StoredType::Float(dtype) => Some(dtype),
        StoredType::Other(_) => None, // the proof has refused it
    });
    let (dtype, scheme) = (common_type(types), quantization.scheme(plan.role));
    PackedShape { rows: plan.rows(), cols: plan.cols, dtype, scheme, bias: plan.bias }
}

/// The proof: every parameter has a tensor of its shape and of a type that we read, and every tensor is used or may be
/// ignored. Returns what there is to load.
pub(crate) fn prove(spec: &ModelSpec, plan: &Plan, source: &dyn WeightSource) -> Result<LoadProgress, WeightsError> {
    let wanted = plan.tensors();
    let mut missing = Vec::new();
    let mut bytes_total = 0;
    for (name, shape) in &wanted {
        let Some(info) = source.info(name) else {
            missing.push((name, shape));
            continue;
        };
        if info.shape != *shape {
            return Err(WeightsError::Shape { name: name.clone(), wanted: shape.clone(), found: info.shape });
        }
        bytes_total += (shape.iter().product::<usize>() * float_type(name, info.dtype)?.size_bytes()) as u64;
    }
    match missing[..] {
        [] => {}
        [(name, _)] if plan.head_weight().as_ref() == Some(name) => return Err(WeightsError::MissingHead),
        [(name, shape), ref rest @ ..] => {
            return Err(WeightsError::Missing { name: name.clone(), shape: shape.clone(), more: rest.len() });
        }
    }
    let used: HashSet<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
    let left = source
        .names()
        .into_iter()
        .filter(|name| !used.contains(name) && !plan.ignores(&spec.names, name) && !spec.is_extra(name));
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

pub(crate) fn float_type(name: &str, stored: StoredType) -> Result<DType, WeightsError> {
    match stored {
        StoredType::Float(dtype) => Ok(dtype),
        StoredType::Other(found) => Err(WeightsError::DType { name: name.to_owned(), found }),
    }
}

/// Takes from a file what was packed before, in place of a source that was proven.
struct Taker<'a, B> {
    stored: StoredWeights<'a, B>,
    source: &'a dyn WeightSource,
    quantization: Quantization,
}

impl<B: Backend> Fill<B::Linear, B::Vector, B::Experts> for Taker<'_, B> {
    type Error = CacheFault;

    fn linear(&mut self, plan: &LinearPlan) -> Result<B::Linear, CacheFault> {
        self.stored.matrix(&packed_shape(self.source, plan, self.quantization))
    }

    fn vector(&mut self, plan: &VectorPlan) -> Result<B::Vector, CacheFault> {
        self.stored.vector(plan.len)
    }

    fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<B::Linear>, CacheFault> {
        Ok(LatentHeads { queries: self.linear(&plan.queries)?, values: self.linear(&plan.values)? })
    }

    fn experts(&mut self, gate_up: Vec<B::Linear>, down: Vec<B::Linear>) -> Result<B::Experts, CacheFault> {
        self.stored.experts(gate_up, down)
    }
}

/// Packs what a proven source holds.
struct Loader<'a, B> {
    backend: &'a B,
    source: &'a mut dyn WeightSource,
    quantization: Quantization,
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

impl<B> Loader<'_, B> {
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
    fn finish(&mut self, tensors: &[String], stored_bytes: usize) {
        for name in tensors {
            self.source.release(name);
        }
        self.progress.tensors_done += tensors.len();
        self.progress.bytes_done += stored_bytes as u64;
        (self.on_progress)(self.progress);
    }
}

impl<B: Backend> Fill<B::Linear, B::Vector, B::Experts> for Loader<'_, B> {
    type Error = LoadError;

    fn linear(&mut self, plan: &LinearPlan) -> Result<B::Linear, LoadError> {
        // A tensor that holds several parts is done with the last of them.
        let last = || plan.parts.iter().filter(|part| part.is_last());
        let mut names: Vec<String> = last().map(Part::weight).collect();
        let tensors = plan.parts.iter().map(|part| self.part(part, plan.cols));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let mut stored_bytes: usize = tensors.iter().map(|tensor| tensor.bytes.len()).sum();

        let mut bias = Vec::new();
        if plan.bias {
            for part in &plan.parts {
                let tensor = self.bias_of(part)?;
                stored_bytes += tensor.bytes.len();
                bias.extend(tensor.to_f32());
            }
            names.extend(last().map(Part::bias));
        }
        let dtype = common_type(tensors.iter().map(|tensor| tensor.dtype));
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
        let packed = self.backend.pack(&views, plan.bias.then_some(&bias[..]), self.quantization.scheme(plan.role))?;
        drop(views);
        drop(tensors);
        if let Some(writer) = &mut self.writer {
            writer.matrix(self.backend, &packed_shape(self.source, plan, self.quantization), &packed);
        }
        self.finish(&names, stored_bytes);
        Ok(packed)
    }

    fn vector(&mut self, plan: &VectorPlan) -> Result<B::Vector, LoadError> {
        let tensor = self.read(&plan.name, &[plan.len])?;
        let stored_bytes = tensor.bytes.len();
        let mut values = tensor.to_f32();
        drop(tensor);
        values.iter_mut().for_each(|value| *value += plan.offset);
        let vector = self.backend.vector(&values)?;
        if let Some(writer) = &mut self.writer {
            writer.vector(self.backend, &values);
        }
        self.finish(std::slice::from_ref(&plan.name), stored_bytes);
        Ok(vector)
    }

    fn heads(&mut self, plan: &LatentHeads<LinearPlan>) -> Result<LatentHeads<B::Linear>, LoadError> {
        let stored = StoredHeads::new(plan);
        let name = stored.part.weight();
        let tensor = self.read(&name, &stored.shape())?;
        let (dtype, stored_bytes) = (tensor.dtype, tensor.bytes.len());
        let [queries, values] = split_heads(&stored, &tensor.bytes, dtype.size_bytes());
        drop(tensor);
        let pack = |loader: &mut Self, plan: &LinearPlan, bytes: Vec<u8>| -> Result<B::Linear, LoadError> {
            let view = MatrixView { bytes: &bytes, dtype, rows: plan.rows(), cols: plan.cols };
            let packed = loader.backend.pack(&[view], None, loader.quantization.scheme(plan.role))?;
            if let Some(writer) = &mut loader.writer {
                writer.matrix(loader.backend, &packed_shape(loader.source, plan, loader.quantization), &packed);
            }
            Ok(packed)
        };
        let heads =
            LatentHeads { queries: pack(self, &plan.queries, queries)?, values: pack(self, &plan.values, values)? };
        self.finish(&[name], stored_bytes);
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
