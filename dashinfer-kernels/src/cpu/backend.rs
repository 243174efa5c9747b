//! [`Backend`] on the CPU.

use std::collections::VecDeque;

use super::aligned::AlignedBuf;
use super::attention::{self, AttentionRange, CpuKvCache, LatentScratch, LatentWork, Work};
use super::experts::{self, CpuExpertScratch, CpuExperts};
use super::gate::{Gate, GateRows};
use super::input_sums;
use super::isa::Isa;
use super::linear::{self, PANEL, PackedMatrix, Product, SendPtr};
use super::linear_bf16::{self, Rounded};
use super::math::soft_cap;
use super::pool::{PoolConfig, ThreadPool};
use super::quantized::{self, Activations, QuantizedMatrix};
use super::rms_norm::{self, RmsNormRow};
use super::rope::RopeTable;
use crate::error::check;
use crate::sample::{SampleScratch, sample_row};
use crate::{
    Activation, AttentionParams, Backend, DType, Feature, InputSums, Issue, KernelError, KvCacheSpec, LatentHeads,
    LatentParams, MatrixView, PackedShape, PagedBatch, QkNorm, Rope, Routing, SampleRow, Sampled, Scheme, SharedBytes,
    StepRows, StoredMatrix, TensorUse, WeightReads,
};

/// Elementwise work of fewer values than this stays on one thread: a parallel loop costs a few microseconds.
const PARALLEL_FROM: usize = 1 << 14;

/// Of dense and of quantized matrices. Whoever changes what packing makes of some weights, be it one byte, or the order of
/// buffers in `export`, counts this up: files of older layouts are then packed anew. A test of `dashinfer-models` holds it
/// to the bytes.
const LAYOUT: &str = "cpu panels, version 1";

/// How the CPU backend runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuConfig {
    /// The threads.
    pub pool: PoolConfig,
    /// Use kernels of this instruction set at most; for comparing variants. Default: the best that the machine has.
    pub isa: Option<Isa>,
    /// [`DType::F32`], or [`DType::BF16`] to round activations to bf16 in products with bf16 weights, for AVX-512 BF16,
    /// AMX or Arm's bf16.
    /// Default: f32.
    pub compute: DType,
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self { pool: PoolConfig::default(), isa: None, compute: DType::F32 }
    }
}

/// Activations `[rows, cols]` in f32, with room for a fixed number of rows.
#[derive(Debug)]
pub struct CpuTensor {
    data: AlignedBuf<f32>,
    rows: usize,
    cols: usize,
}

impl CpuTensor {
    /// The rows in use, `[rows, cols]`.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.data[..self.rows * self.cols]
    }

    /// The rows in use, to be written.
    pub fn values_mut(&mut self) -> &mut [f32] {
        let len = self.rows * self.cols;
        &mut self.data[..len]
    }

    /// Rows in use.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Sets the rows in use; their values are what they were.
    ///
    /// # Errors
    /// [`KernelError::Shape`] if the tensor has no room for as many, or not these columns.
    pub fn resize(&mut self, op: &'static str, rows: usize, cols: usize) -> Result<(), KernelError> {
        check(op, "columns of the output", cols, self.cols)?;
        if rows * cols > self.data.len() {
            let found = self.data.len() / cols.max(1);
            return Err(KernelError::Shape { op, what: "room for rows in the output", wanted: rows, found });
        }
        self.rows = rows;
        Ok(())
    }
}

/// A weight matrix as it was stored, or quantized.
#[derive(Debug)]
#[non_exhaustive]
pub enum CpuLinear {
    /// Floating point.
    Dense(PackedMatrix),
    /// Of a [`Scheme`].
    Quantized(QuantizedMatrix),
}

impl CpuLinear {
    /// Output features, `N`.
    #[must_use]
    pub fn rows(&self) -> usize {
        match self {
            Self::Dense(matrix) => matrix.rows(),
            Self::Quantized(matrix) => matrix.rows(),
        }
    }

    /// Input features, `K`.
    #[must_use]
    pub fn cols(&self) -> usize {
        match self {
            Self::Dense(matrix) => matrix.cols(),
            Self::Quantized(matrix) => matrix.cols(),
        }
    }

    /// Bytes that a product reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(matrix) => matrix.bytes(),
            Self::Quantized(matrix) => matrix.bytes(),
        }
    }

    /// Row `row` as f32 into `out`, `[K]`: an embedding.
    ///
    /// # Panics
    /// If there is no such row, or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols(), "a row has as many values as there are columns");
        match self {
            Self::Dense(matrix) => matrix.read_row(row, out),
            Self::Quantized(matrix) => matrix.read_row(row, out),
        }
    }
}

/// Bytes that a packed `[rows, cols]` matrix takes on the CPU, of `dtype` or quantized; saturating.
#[must_use]
pub fn packed_bytes(rows: usize, cols: usize, dtype: DType, scheme: Option<Scheme>) -> usize {
    match scheme {
        Some(scheme) => quantized::packed_bytes(scheme, rows, cols),
        None => linear::packed_bytes(rows, cols, dtype),
    }
}

/// Bytes that products with quantized weights, or in bf16, work in beside activations, for steps of `max_rows` rows and matrices of up to
/// `max_cols` columns.
#[must_use]
pub fn workspace_bytes(max_rows: usize, max_cols: usize) -> usize {
    Activations::max_bytes(max_rows, max_cols).max(Rounded::max_bytes(max_rows, max_cols))
}

/// The operators on the CPU: activations in f32, weights as stored, a pool of threads of its own.
///
/// A row's result never depends on the other rows of its batch.
#[derive(Debug)]
pub struct CpuBackend {
    pool: ThreadPool,
    product: Product,
    bf16_product: Option<linear_bf16::Product>,
    bf16_rows: Rounded,
    quantized_product: quantized::Product,
    quantized_rows: Activations,
    norm: RmsNormRow,
    gates: GateRows,
    attend: AttentionRange,
    batch: PagedBatch,
    ids: Vec<u32>,
    logit_rows: Vec<u32>,
    /// To see that no two rows of a step share a slot: threads write slots without locks.
    sorted_slots: Vec<u32>,
    /// One more than the last slot and the last block that `batch` names: looked for once a step, not in each layer.
    num_slots_named: usize,
    num_blocks_named: usize,
    ropes: Vec<RopeTable>,
    attention_scratch: attention::Scratch,
    latent_scratch: LatentScratch,
    sample_scratch: Vec<SampleScratch>,
    /// Not collected yet.
    sampled: VecDeque<Vec<Sampled>>,
    reads: WeightReads,
}

impl CpuBackend {
    /// Starts the threads and chooses the kernels.
    ///
    /// # Errors
    /// [`KernelError::Threads`]; [`KernelError::Unsupported`] if the machine lacks the instruction set asked for.
    pub fn new(config: &CpuConfig) -> Result<Self, KernelError> {
        let isa = config.isa.unwrap_or_else(Isa::best);
        if !isa.is_available() {
            let what = format!("the instruction set {isa:?} on this machine");
            return Err(KernelError::Unsupported { op: "CpuBackend::new", what, backend: "cpu" });
        }
        let bf16_product = match config.compute {
            DType::F32 => None,
            DType::BF16 if linear_bf16::best(isa).is_some() => linear_bf16::best(isa),
            other => {
                let what = match other {
                    DType::BF16 => "computing in bf16 without AVX-512 BF16, AMX or Arm's bf16".to_owned(),
                    other => format!("computing in {other}"),
                };
                return Err(KernelError::Unsupported { op: "CpuBackend::new", what, backend: "cpu" });
            }
        };
        Ok(Self {
            pool: ThreadPool::new(&config.pool)?,
            bf16_product,
            bf16_rows: Rounded::default(),
            product: linear::best(isa),
            quantized_product: quantized::best(isa),
            quantized_rows: Activations::default(),
            norm: rms_norm::best(isa),
            gates: GateRows::best(isa),
            attend: attention::best(isa),
            batch: PagedBatch::default(),
            ids: Vec::new(),
            logit_rows: Vec::new(),
            sorted_slots: Vec::new(),
            num_slots_named: 0,
            num_blocks_named: 0,
            ropes: Vec::new(),
            attention_scratch: attention::Scratch::default(),
            latent_scratch: LatentScratch::default(),
            sample_scratch: Vec::new(),
            sampled: VecDeque::new(),
            reads: WeightReads::default(),
        })
    }

    /// The threads, for other work on the same cores.
    #[must_use]
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// Calls `row(i)` for each of `rows` rows of `cols` values, in parallel if that pays.
    pub(super) fn for_rows(pool: &ThreadPool, rows: usize, cols: usize, row: &(dyn Fn(usize) + Sync)) {
        if rows * cols < PARALLEL_FROM {
            (0..rows).for_each(row);
            return;
        }
        let per_task = rows.div_ceil(pool.num_threads() * 4).max(1);
        pool.run(rows.div_ceil(per_task), &|task, _| {
            (task * per_task..rows.min((task + 1) * per_task)).for_each(row);
        });
    }

    /// Checks that the step that was begun fits the cache and the shapes of an attention layer.
    fn check_attention(
        &self,
        op: &'static str,
        qkv: &CpuTensor,
        spec: &KvCacheSpec,
        layer: usize,
        params: &AttentionParams,
    ) -> Result<(), KernelError> {
        params.check(op, self.batch.positions.len(), [qkv.rows, qkv.cols], spec, layer)?;
        self.check_places(op, spec)
    }

    /// Rotary embedding `rope` of the step, which must leave no more than `size` values to rotate.
    fn rope_table(&self, op: &'static str, rope: usize, size: usize) -> Result<&RopeTable, KernelError> {
        let Some(table) = self.ropes.get(rope) else {
            let found = self.ropes.len();
            return Err(KernelError::Shape { op, what: "rotary embeddings of the step", wanted: rope + 1, found });
        };
        if table.rotated() > size {
            return Err(KernelError::Shape { op, what: "head size", wanted: table.rotated(), found: size });
        }
        Ok(table)
    }

    /// Checks that the slots and blocks of the step that was begun lie in a cache.
    fn check_places(&self, op: &'static str, spec: &KvCacheSpec) -> Result<(), KernelError> {
        let slots = spec.num_blocks * spec.block_size;
        let wanted = self.num_slots_named;
        if wanted > slots {
            return Err(KernelError::Shape { op, what: "slots of the cache", wanted, found: slots });
        }
        let wanted = self.num_blocks_named;
        if wanted > spec.num_blocks {
            return Err(KernelError::Shape { op, what: "blocks of the cache", wanted, found: spec.num_blocks });
        }
        for sequence in &self.batch.sequences {
            let wanted = sequence.context_len.div_ceil(spec.block_size);
            if sequence.num_blocks < wanted {
                let found = sequence.num_blocks;
                return Err(KernelError::Shape { op, what: "blocks of a sequence", wanted, found });
            }
        }
        Ok(())
    }
}

/// Calls `run(copy of values, values)`. Up to `SHORT` values, the copy takes no allocation.
fn with_copy<const SHORT: usize>(values: &mut [f32], run: impl FnOnce(&[f32], &mut [f32])) {
    let mut short = [0.0; SHORT];
    if let Some(copy) = short.get_mut(..values.len()) {
        copy.copy_from_slice(values);
        run(copy, values);
    } else {
        let copy = values.to_vec();
        run(&copy, values);
    }
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Vector = Vec<f32>;
    type Linear = CpuLinear;
    type KvCache = CpuKvCache;
    type Experts = CpuExperts;
    type ExpertScratch = CpuExpertScratch;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn supports(&self, feature: Feature) -> bool {
        match feature {
            Feature::EmbeddingScale
            | Feature::GeluTanh
            | Feature::AttentionSoftCap
            | Feature::AttentionSinks
            | Feature::LogitSoftCap
            | Feature::ClampedSwiglu
            | Feature::Experts
            | Feature::LatentAttention
            | Feature::StoredQuantization => true,
        }
    }

    fn tensor(&self, max_rows: usize, cols: usize, _: TensorUse) -> Result<CpuTensor, KernelError> {
        let data = AlignedBuf::zeroed("activations", max_rows.saturating_mul(cols))?;
        Ok(CpuTensor { data, rows: 0, cols })
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>, KernelError> {
        Ok(values.to_vec())
    }

    fn pack(
        &self,
        parts: &[MatrixView<'_>],
        bias: Option<&[f32]>,
        scheme: Option<Scheme>,
    ) -> Result<CpuLinear, KernelError> {
        Ok(match scheme {
            None => CpuLinear::Dense(PackedMatrix::pack(parts, bias, &self.pool)?),
            Some(scheme) => CpuLinear::Quantized(QuantizedMatrix::pack(parts, bias, scheme, &self.pool)?),
        })
    }

    fn pack_stored(
        &self,
        parts: &[&dyn StoredMatrix],
        bias: Option<&[f32]>,
        scheme: Option<Scheme>,
    ) -> Result<CpuLinear, KernelError> {
        Ok(match scheme {
            None => CpuLinear::Dense(PackedMatrix::pack_stored(parts, bias, &self.pool)?),
            Some(scheme) => CpuLinear::Quantized(QuantizedMatrix::pack_stored(parts, bias, scheme, &self.pool)?),
        })
    }

    fn weights(&self, matrix: &CpuLinear) -> Result<Vec<f32>, KernelError> {
        let (cols, mut weights) = (matrix.cols(), vec![0.0; matrix.rows() * matrix.cols()]);
        let to = SendPtr(weights.as_mut_ptr());
        Self::for_rows(&self.pool, matrix.rows(), cols, &|row| {
            // SAFETY: there are as many rows of `cols` values, and each is written by one task.
            matrix.read_row(row, unsafe { std::slice::from_raw_parts_mut(to.get().add(row * cols), cols) });
        });
        Ok(weights)
    }

    fn input_sums(&self, exact: &CpuTensor, inputs: &CpuTensor) -> Result<InputSums, KernelError> {
        input_sums::sums(exact.values(), inputs.values(), inputs.cols, self.product, &self.pool)
    }

    fn packed_bytes(&self, rows: usize, cols: usize, dtype: DType, scheme: Option<Scheme>) -> usize {
        packed_bytes(rows, cols, dtype, scheme)
    }

    fn layout(&self) -> Option<&'static str> {
        Some(LAYOUT)
    }

    fn export<'a>(&self, matrix: &'a CpuLinear) -> Vec<&'a [u8]> {
        match matrix {
            CpuLinear::Dense(matrix) => matrix.buffers().to_vec(),
            CpuLinear::Quantized(matrix) => matrix.buffers(),
        }
    }

    fn import(&self, shape: &PackedShape, buffers: &[SharedBytes]) -> Result<CpuLinear, KernelError> {
        Ok(match shape.scheme {
            None => CpuLinear::Dense(PackedMatrix::from_buffers(shape, buffers)?),
            Some(scheme) => CpuLinear::Quantized(QuantizedMatrix::from_buffers(shape, scheme, buffers)?),
        })
    }

    fn for_each(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.run(num_tasks, &|i, _| task(i));
    }

    fn kv_cache(&self, spec: &KvCacheSpec) -> Result<CpuKvCache, KernelError> {
        CpuKvCache::new(spec)
    }

    fn begin_step(
        &mut self,
        step: &StepRows<'_>,
        ropes: &[Rope],
        _cache: &mut CpuKvCache,
    ) -> Result<Issue, KernelError> {
        const OP: &str = "begin_step";
        let batch = step.paged;
        if !step.carried.is_empty() {
            let what = "a token that is not known yet".to_owned();
            return Err(KernelError::Unsupported { op: OP, what, backend: "cpu" });
        }
        check(OP, "ids", batch.positions.len(), step.ids.len())?;
        if let Some(&row) = step.logit_rows.iter().find(|&&row| row as usize >= step.ids.len()) {
            let (wanted, found) = (row as usize + 1, step.ids.len());
            return Err(KernelError::Shape { op: OP, what: "rows", wanted, found });
        }
        check(OP, "slots", batch.positions.len(), batch.slots.len())?;
        let mut row = 0;
        for sequence in &batch.sequences {
            check(OP, "first row of a sequence", row, sequence.first_row)?;
            row += sequence.num_rows;
            if sequence.context_len < sequence.num_rows {
                let (wanted, found) = (sequence.num_rows, sequence.context_len);
                return Err(KernelError::Shape { op: OP, what: "context of a sequence", wanted, found });
            }
            let end = sequence.first_block.saturating_add(sequence.num_blocks);
            if end > batch.block_table.len() {
                let found = batch.block_table.len();
                return Err(KernelError::Shape { op: OP, what: "length of the block table", wanted: end, found });
            }
        }
        check(OP, "rows of the sequences", batch.positions.len(), row)?;
        self.sorted_slots.clone_from(&batch.slots);
        self.sorted_slots.sort_unstable();
        self.sorted_slots.dedup();
        check(OP, "different slots", batch.slots.len(), self.sorted_slots.len())?;
        // Set together with the batch, and only if all of it is good.
        self.num_slots_named = self.sorted_slots.last().map_or(0, |&slot| slot as usize + 1);
        self.num_blocks_named = batch.block_table.iter().max().map_or(0, |&block| block as usize + 1);
        self.batch.clone_from(batch);
        self.ids.clear();
        self.ids.extend_from_slice(step.ids);
        self.logit_rows.clear();
        self.logit_rows.extend_from_slice(step.logit_rows);
        self.ropes.resize_with(ropes.len(), RopeTable::default);
        for (table, rope) in self.ropes.iter_mut().zip(ropes) {
            table.fill(rope, &batch.positions);
        }
        Ok(Issue::Operators)
    }

    fn embed(&mut self, out: &mut CpuTensor, table: &CpuLinear, scale: f32) -> Result<(), KernelError> {
        let ids = &self.ids;
        out.resize("embed", ids.len(), table.cols())?;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= table.rows()) {
            let (wanted, found) = (id as usize + 1, table.rows());
            return Err(KernelError::Shape { op: "embed", what: "rows of the table", wanted, found });
        }
        let (cols, to) = (table.cols(), SendPtr(out.data.as_mut_ptr()));
        Self::for_rows(&self.pool, ids.len(), cols, &|row| {
            // SAFETY: `out` has a row for each id, and each is written by one task.
            let out = unsafe { std::slice::from_raw_parts_mut(to.get().add(row * cols), cols) };
            table.read_row(ids[row] as usize, out);
            if scale != 1.0 {
                out.iter_mut().for_each(|x| *x *= scale);
            }
        });
        Ok(())
    }

    fn rms_norm(&mut self, out: &mut CpuTensor, x: &CpuTensor, weight: &Vec<f32>, eps: f32) -> Result<(), KernelError> {
        out.resize("rms_norm", x.rows, x.cols)?;
        check("rms_norm", "length of the weight", x.cols, weight.len())?;
        let (cols, to, norm) = (x.cols, SendPtr(out.data.as_mut_ptr()), self.norm);
        Self::for_rows(&self.pool, x.rows, cols, &|row| {
            // SAFETY: `out` has as many rows and columns as `x`, and each row is written by one task.
            let out = unsafe { std::slice::from_raw_parts_mut(to.get().add(row * cols), cols) };
            // SAFETY: lengths were checked above; the variant was chosen for this machine.
            unsafe { norm(out, &x.data[row * cols..][..cols], weight, eps) };
        });
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        out: &mut CpuTensor,
        residual: &mut CpuTensor,
        x: &CpuTensor,
        weight: &Vec<f32>,
        eps: f32,
    ) -> Result<(), KernelError> {
        const OP: &str = "add_rms_norm";
        out.resize(OP, x.rows, x.cols)?;
        check(OP, "rows of the residual", x.rows, residual.rows)?;
        check(OP, "columns of the residual", x.cols, residual.cols)?;
        check(OP, "length of the weight", x.cols, weight.len())?;
        let (cols, norm) = (x.cols, self.norm);
        let (to, sum) = (SendPtr(out.data.as_mut_ptr()), SendPtr(residual.data.as_mut_ptr()));
        Self::for_rows(&self.pool, x.rows, cols, &|row| {
            // SAFETY: all three have the same shape, and each row is written by one task.
            let (out, sum) = unsafe {
                (
                    std::slice::from_raw_parts_mut(to.get().add(row * cols), cols),
                    std::slice::from_raw_parts_mut(sum.get().add(row * cols), cols),
                )
            };
            for (sum, x) in sum.iter_mut().zip(&x.data[row * cols..][..cols]) {
                *sum += x;
            }
            // SAFETY: lengths were checked above; the variant was chosen for this machine.
            unsafe { norm(out, sum, weight, eps) };
        });
        Ok(())
    }

    fn weight_reads(&self) -> Option<WeightReads> {
        Some(self.reads)
    }

    fn linear(&mut self, out: &mut CpuTensor, x: &CpuTensor, weight: &CpuLinear) -> Result<(), KernelError> {
        check("linear", "columns of x", weight.cols(), x.cols)?;
        out.resize("linear", x.rows, weight.rows())?;
        self.reads.matrices += weight.bytes() as u64;
        match weight {
            CpuLinear::Dense(weight) => match self.bf16_product {
                Some(product) if weight.dtype() == DType::BF16 => {
                    linear_bf16::run(product, out.values_mut(), x.values(), weight, &mut self.bf16_rows, &self.pool)
                }
                _ => linear::run(self.product, out.values_mut(), x.values(), weight, &self.pool),
            },
            CpuLinear::Quantized(weight) => {
                let (product, scratch) = (self.quantized_product, &mut self.quantized_rows);
                quantized::run(product, out.values_mut(), x.values(), weight, scratch, &self.pool)
            }
        }
    }

    fn gated_linear(
        &mut self,
        out: &mut CpuTensor,
        scratch: &mut CpuTensor,
        x: &CpuTensor,
        weight: &CpuLinear,
        activation: Activation,
    ) -> Result<(), KernelError> {
        const OP: &str = "gated_linear";
        if !weight.rows().is_multiple_of(2 * PANEL) {
            self.linear(scratch, x, weight)?;
            return self.gate(out, scratch, activation);
        }
        check(OP, "columns of x", weight.cols(), x.cols)?;
        out.resize(OP, x.rows, weight.rows() / 2)?;
        self.reads.matrices += weight.bytes() as u64;
        let (activation, pool, x, out) = (Gate::new(activation, self.gates), &self.pool, x.values(), out.values_mut());
        match weight {
            CpuLinear::Dense(weight) => match self.bf16_product {
                Some(product) if weight.dtype() == DType::BF16 => {
                    linear_bf16::run_gated(product, out, x, weight, activation, &mut self.bf16_rows, pool)
                }
                _ => linear::run_gated(self.product, out, x, weight, activation, pool),
            },
            CpuLinear::Quantized(weight) => {
                let (product, scratch) = (self.quantized_product, &mut self.quantized_rows);
                quantized::run_gated(product, out, x, weight, activation, scratch, pool)
            }
        }
    }

    fn rope_and_cache(
        &mut self,
        qkv: &mut CpuTensor,
        cache: &mut CpuKvCache,
        layer: usize,
        params: &AttentionParams,
        rope: usize,
        qk_norm: Option<QkNorm<'_, Vec<f32>>>,
    ) -> Result<(), KernelError> {
        const OP: &str = "rope_and_cache";
        self.check_attention(OP, qkv, cache.spec(), layer, params)?;
        let d = params.head_dim;
        let table = self.rope_table(OP, rope, d)?;
        if let Some(norm) = &qk_norm {
            check(OP, "length of the q norm", d, norm.q.len())?;
            check(OP, "length of the k norm", d, norm.k.len())?;
        }
        let (heads, kv_heads, cols) = (params.num_heads, params.num_kv_heads, qkv.cols);
        let (rows, norm, slots) = (qkv.rows, self.norm, &self.batch.slots);
        let start = SendPtr(qkv.data.as_mut_ptr());
        let writer = cache.writer();
        Self::for_rows(&self.pool, rows, cols, &|row| {
            // SAFETY: the row lies in `qkv`, and each row is written by one task.
            let qkv = unsafe { std::slice::from_raw_parts_mut(start.get().add(row * cols), cols) };
            let (q, kv) = qkv.split_at_mut(heads * d);
            let (k, v) = kv.split_at_mut(kv_heads * d);
            for (side, heads) in [&mut *q, &mut *k].into_iter().enumerate() {
                for head in heads.chunks_exact_mut(d) {
                    if let Some(qk) = &qk_norm {
                        let weight = if side == 0 { qk.q } else { qk.k };
                        // SAFETY: all are `d` long; the variant was chosen for this machine.
                        with_copy::<256>(head, |source, head| unsafe { norm(head, source, weight, qk.eps) });
                    }
                    table.rotate(row, head);
                }
            }
            for (head, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
                // SAFETY: slot, layer and head were checked above; `begin_step` saw that no two rows share a slot.
                unsafe { writer.store(layer, slots[row] as usize, head, k, v) };
            }
        });
        Ok(())
    }

    fn attention(
        &mut self,
        out: &mut CpuTensor,
        qkv: &CpuTensor,
        cache: &CpuKvCache,
        layer: usize,
        params: &AttentionParams,
        sinks: Option<&Vec<f32>>,
    ) -> Result<(), KernelError> {
        self.check_attention("attention", qkv, cache.spec(), layer, params)?;
        out.resize("attention", qkv.rows, params.num_heads * params.head_dim)?;
        if let Some(sinks) = sinks {
            check("attention", "number of sinks", params.num_heads, sinks.len())?;
        }
        let out = SendPtr(out.data.as_mut_ptr());
        let sinks = sinks.map(Vec::as_slice);
        let rows = 0..qkv.rows;
        let (queries, query_stride, batch) = (qkv.values(), qkv.cols, &self.batch);
        let work = Work { params, batch, cache, layer, rows, queries, query_stride, sinks, out };
        attention::run(self.attend, &work, &mut self.attention_scratch, &self.pool);
        Ok(())
    }

    fn latent_rope_and_cache(
        &mut self,
        q: &mut CpuTensor,
        kv: &mut CpuTensor,
        cache: &mut CpuKvCache,
        layer: usize,
        params: &LatentParams,
        rope: usize,
        (weight, eps): (&Vec<f32>, f32),
    ) -> Result<(), KernelError> {
        const OP: &str = "latent_rope_and_cache";
        let step_rows = self.batch.positions.len();
        check(OP, "rows of q", step_rows, q.rows)?;
        check(OP, "rows of kv", step_rows, kv.rows)?;
        check(OP, "columns of q", params.num_heads * params.q_dim(), q.cols)?;
        check(OP, "columns of kv", params.width(), kv.cols)?;
        check(OP, "length of the norm", params.rank, weight.len())?;
        params.check(OP, cache.spec(), layer)?;
        self.check_places(OP, cache.spec())?;
        let table = self.rope_table(OP, rope, params.rope_dim)?;
        let (norm, slots, q_cols, kv_cols) = (self.norm, &self.batch.slots, q.cols, kv.cols);
        let [q, kv] = [q, kv].map(|tensor| SendPtr(tensor.data.as_mut_ptr()));
        let writer = cache.writer();
        Self::for_rows(&self.pool, step_rows, q_cols + kv_cols, &|row| {
            // SAFETY: the row lies in both, and each row is written by one task.
            let (q, kv) = unsafe {
                (
                    std::slice::from_raw_parts_mut(q.get().add(row * q_cols), q_cols),
                    std::slice::from_raw_parts_mut(kv.get().add(row * kv_cols), kv_cols),
                )
            };
            for head in q.chunks_exact_mut(params.q_dim()) {
                table.rotate(row, &mut head[params.nope_dim..]);
            }
            let (latent, rotated) = kv.split_at_mut(params.rank);
            table.rotate(row, rotated);
            // SAFETY: all are `[C]`; the variant was chosen for this machine.
            with_copy::<512>(latent, |source, latent| unsafe { norm(latent, source, weight, eps) });
            // SAFETY: slot and layer were checked above; `begin_step` saw that no two rows share a slot.
            unsafe { writer.store_latent(layer, slots[row] as usize, kv) };
        });
        Ok(())
    }

    fn latent_attention(
        &mut self,
        out: &mut CpuTensor,
        q: &CpuTensor,
        cache: &CpuKvCache,
        layer: usize,
        params: &LatentParams,
        heads: &LatentHeads<CpuLinear>,
    ) -> Result<(), KernelError> {
        const OP: &str = "latent_attention";
        check(OP, "rows of q", self.batch.positions.len(), q.rows)?;
        check(OP, "columns of q", params.num_heads * params.q_dim(), q.cols)?;
        params.check(OP, cache.spec(), layer)?;
        self.check_places(OP, cache.spec())?;
        let (CpuLinear::Dense(queries), CpuLinear::Dense(values)) = (&heads.queries, &heads.values) else {
            let what = "a quantized matrix between heads and latent vectors".to_owned();
            return Err(KernelError::Unsupported { op: OP, what, backend: "cpu" });
        };
        check(OP, "output features to queries", params.num_heads * params.rank, queries.rows())?;
        check(OP, "input features to queries", params.nope_dim, queries.cols())?;
        check(OP, "output features to values", params.num_heads * params.v_dim, values.rows())?;
        check(OP, "input features to values", params.rank, values.cols())?;
        out.resize(OP, q.rows, params.num_heads * params.v_dim)?;
        self.reads.matrices += (queries.bytes() + values.bytes()) as u64;
        let heads = LatentHeads { queries, values };
        let out = SendPtr(out.data.as_mut_ptr());
        let work = LatentWork { params, batch: &self.batch, cache, layer, heads, q: q.values(), out };
        attention::run_latent(self.attend, self.product, &work, &mut self.latent_scratch, &self.pool);
        Ok(())
    }

    fn gate(&mut self, out: &mut CpuTensor, x: &CpuTensor, activation: Activation) -> Result<(), KernelError> {
        let cols = x.cols / 2;
        check("gate", "columns of x", 2 * cols, x.cols)?;
        out.resize("gate", x.rows, cols)?;
        let gate = Gate::new(activation, self.gates);
        let to = SendPtr(out.data.as_mut_ptr());
        // A row is cut into parts of whole vectors, so that a decode's one row is shared too.
        const PART: usize = 2048;
        let parts = cols.div_ceil(PART);
        Self::for_rows(&self.pool, x.rows * parts, PART.min(cols), &|task| {
            let (row, first) = (task / parts, task % parts * PART);
            let width = PART.min(cols - first);
            let (g, u) = x.data[row * 2 * cols..][..2 * cols].split_at(cols);
            // SAFETY: the part lies in row `row` of `out`, and each part is written by one task.
            let out = unsafe { std::slice::from_raw_parts_mut(to.get().add(row * cols + first), width) };
            // SAFETY: all are `width` long; the variant was chosen for this machine.
            unsafe { gate.row(out, &g[first..][..width], &u[first..][..width]) };
        });
        Ok(())
    }

    fn pack_experts(&self, gate_up: Vec<CpuLinear>, down: Vec<CpuLinear>) -> Result<CpuExperts, KernelError> {
        CpuExperts::new(gate_up, down)
    }

    fn expert_scratch(
        &self,
        max_rows: usize,
        hidden: usize,
        inner: usize,
        routing: &Routing,
    ) -> Result<CpuExpertScratch, KernelError> {
        CpuExpertScratch::new(max_rows, hidden, inner, routing)
    }

    fn experts(
        &mut self,
        out: &mut CpuTensor,
        x: &CpuTensor,
        logits: &CpuTensor,
        correction: Option<&Vec<f32>>,
        experts: &CpuExperts,
        routing: &Routing,
        activation: Activation,
        scratch: &mut CpuExpertScratch,
    ) -> Result<(), KernelError> {
        let machine = experts::Machine {
            pool: &self.pool,
            product: self.product,
            bf16_product: self.bf16_product,
            quantized_product: self.quantized_product,
            gate: Gate::new(activation, self.gates),
        };
        let layer = experts::Layer { x, logits, correction: correction.map(Vec::as_slice), experts, routing };
        let reads = experts::run(out, &layer, scratch, &machine)?;
        self.reads.experts += reads.visited;
        self.reads.chosen_experts += reads.chosen;
        Ok(())
    }

    fn add_gated(&mut self, out: &mut CpuTensor, x: &CpuTensor, gate: Option<&CpuTensor>) -> Result<(), KernelError> {
        experts::add_gated(out, x, gate, &self.pool)
    }

    fn soft_cap(&mut self, logits: &mut CpuTensor, cap: f32) -> Result<(), KernelError> {
        let (rows, cols, at) = (logits.rows, logits.cols, SendPtr(logits.data.as_mut_ptr()));
        Self::for_rows(&self.pool, rows, cols, &|row| {
            // SAFETY: the row lies in `logits`, and each row is written by one task.
            let row = unsafe { std::slice::from_raw_parts_mut(at.get().add(row * cols), cols) };
            soft_cap(row, cap);
        });
        Ok(())
    }

    fn gather_logit_rows(&mut self, out: &mut CpuTensor, x: &CpuTensor) -> Result<(), KernelError> {
        let rows = &self.logit_rows;
        out.resize("gather_logit_rows", rows.len(), x.cols)?;
        if let Some(&row) = rows.iter().find(|&&row| row as usize >= x.rows) {
            let (wanted, found) = (row as usize + 1, x.rows);
            return Err(KernelError::Shape { op: "gather_logit_rows", what: "rows of x", wanted, found });
        }
        for (out, &row) in out.values_mut().chunks_exact_mut(x.cols.max(1)).zip(rows) {
            out.copy_from_slice(&x.data[row as usize * x.cols..][..x.cols]);
        }
        Ok(())
    }

    fn sample(&mut self, logits: &mut CpuTensor, rows: &[SampleRow<'_>]) -> Result<(), KernelError> {
        if let Some(row) = rows.iter().find(|row| row.logits_row >= logits.rows) {
            let (wanted, found) = (row.logits_row + 1, logits.rows);
            return Err(KernelError::Shape { op: "sample", what: "rows of the logits", wanted, found });
        }
        let cols = logits.cols;
        self.sample_scratch.resize_with(self.pool.num_threads(), SampleScratch::default);
        let mut sampled = vec![Sampled::default(); rows.len()];
        // Two requests may ask for the same row, so each works on a copy unless the rows are in strictly rising order.
        let rising = rows.windows(2).all(|pair| pair[0].logits_row < pair[1].logits_row);
        let (values, out) = (SendPtr(logits.data.as_mut_ptr()), SendPtr(sampled.as_mut_ptr()));
        let scratch = SendPtr(self.sample_scratch.as_mut_ptr());
        let sample = |task: usize, worker: usize| {
            // SAFETY: the row exists; it is changed only if no other task has the same one, else only read.
            let (scratch, to) = unsafe { (&mut *scratch.get().add(worker), &mut *out.get().add(task)) };
            let row = &rows[task];
            // SAFETY: the row was checked to exist.
            let start = unsafe { values.get().add(row.logits_row * cols) };
            *to = if rising {
                // SAFETY: rows differ, so this task has its row to itself.
                sample_row(unsafe { std::slice::from_raw_parts_mut(start, cols) }, row, scratch)
            } else {
                // SAFETY: nothing writes to the logits on this path.
                let mut copy = unsafe { std::slice::from_raw_parts(start, cols) }.to_vec();
                sample_row(&mut copy, row, scratch)
            };
        };
        if rows.len() * cols < PARALLEL_FROM {
            (0..rows.len()).for_each(|task| sample(task, 0));
        } else {
            self.pool.run(rows.len(), &sample);
        }
        self.sampled.push_back(sampled);
        Ok(())
    }

    fn collect_sampled(&mut self) -> Result<Vec<Sampled>, KernelError> {
        self.sampled.pop_front().ok_or(KernelError::NothingToCollect)
    }

    fn read_row(&self, x: &CpuTensor, row: usize) -> Result<Vec<f32>, KernelError> {
        if row >= x.rows {
            return Err(KernelError::Shape { op: "read_row", what: "rows", wanted: row + 1, found: x.rows });
        }
        Ok(x.data[row * x.cols..][..x.cols].to_vec())
    }
}
