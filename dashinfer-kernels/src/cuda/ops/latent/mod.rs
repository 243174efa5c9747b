//! Latent attention of a step.
//!
//! | rows | 16-bit, compute capability 9.0 | 16-bit, 8.0 and newer | everything else |
//! |---|---|---|---|
//! | of prompts | keys and values are made of latent vectors, then `attention_prefill_sm90` | `latent_decode` | `latent_simple` |
//! | decodes | `latent_decode` | `latent_decode` | `latent_simple` |
//!
//! Decodes are computed in the space of latent vectors, so that what the cache holds is read once for 16 heads: queries go there by
//! a product for each head, means come back by another. A row of a prompt shares what it reads with the other rows, and arithmetic is what
//! counts: with keys and values of each head it takes less than a third (docs/decisions/0053-latent-attention-on-gpus.md).
//! When results must not depend on the step, rows of prompts are computed as decodes are.

use std::collections::HashMap;
use std::sync::Arc;

use super::attention_prefill_sm90::{AttentionPrefillSm90, CacheMaps, Operands, Shape, TILE_ROWS};
use super::attention_units::Partials;
use super::operand::Span;
use crate::cuda::device::Device;
use crate::cuda::memory::Buffer;
use crate::cuda::plan::{AttentionPlan, DecodeUnit, EXPANDED_BLOCK, PlanParams, Splitting};
use crate::{DType, KernelError, LatentHeads, LatentParams};

pub(crate) mod decode;
pub(crate) mod product;
pub(crate) mod rope;
pub(crate) mod simple;
mod units;

use decode::{LatentDecode, TILE_HEADS};
use product::{Expand, Expansion, Heads, Products};
use rope::{LatentRope, LatentRopeOperands};
use simple::LatentSimple;
use units::LatentOperands;

const OP: &str = "latent_attention";
/// Rows whose splits have room at once when each row is split by itself; more are computed in turns.
const ROWS_AT_ONCE: usize = 256;
/// What keys and values of a step may take, unless those of one head take more.
const EXPANDED_BYTES: usize = 256 << 20;

/// What a call works on.
#[derive(Debug)]
pub(crate) struct LatentAttentionOperands<'a> {
    /// `[num_rows, H * v_dim]`
    pub(crate) out: Span<'a>,
    /// `[num_rows, H * (N + R)]`
    pub(crate) q: Span<'a>,
    /// Of the layer: `[num_blocks, B, C + R]`.
    pub(crate) cache: Span<'a>,
    pub(crate) block_size: usize,
    /// Rows of the step, with padding.
    pub(crate) num_rows: usize,
    /// The plan's units, on the device, and for each chunk how many it has.
    pub(crate) units: Span<'a>,
    pub(crate) num_units: Span<'a>,
    /// The plan's tiles, and what they read.
    pub(crate) tiles: Span<'a>,
    pub(crate) expanded: Span<'a>,
    pub(crate) block_table: Span<'a>,
    /// Weights, see [`LatentHeads`].
    pub(crate) heads: LatentHeads<Span<'a>>,
}

#[derive(Debug)]
enum Units {
    Decode(LatentDecode),
    Simple,
}

#[derive(Debug)]
struct Prefill {
    expand: Expand,
    /// For so many heads at once. The maps are those of what is made, whose size steps decide.
    attention: HashMap<usize, AttentionPrefillSm90>,
    maps: HashMap<[u64; 3], CacheMaps>,
}

#[derive(Debug)]
struct Kernels {
    params: LatentParams,
    rope: LatentRope,
    units: Units,
    simple: Option<LatentSimple>,
    products: Option<Products>,
    prefill: Option<Prefill>,
}

/// The kernels of latent attention, and what they work in.
pub(crate) struct LatentAttention {
    device: Arc<Device>,
    dtype: DType,
    deterministic: bool,
    kernels: Option<Kernels>,
    /// Partial sums, their maxima and weights, and tickets.
    partials: [Buffer; 3],
    /// Queries and means of latent vectors, `[rows, H, C]`.
    between: [Buffer; 2],
    /// Keys and values that are made for a step, and the table of their blocks, which are in order.
    expanded: [Buffer; 2],
    in_order: Buffer,
    generation: u64,
}

/// Bytes that latent attention works in, at most, for steps of up to `max_rows` rows.
pub(crate) fn workspace_bytes(device: &Device, dtype: DType, params: &LatentParams, max_rows: usize) -> usize {
    let slots = plan_params(params, device.num_sms as usize * 4, 1, Splitting::Balanced).max_slots;
    let by_context = plan_params(params, 1, 1, Splitting::ByContext).max_slots;
    let partials = Partials::bytes(slots.max(by_context), params.num_heads, params.rank).into_iter().sum::<usize>();
    let of_row = params.num_heads.saturating_mul(params.rank).saturating_mul(2 * dtype.size_bytes());
    partials.saturating_add(max_rows.saturating_mul(of_row)).saturating_add(EXPANDED_BYTES)
}

fn plan_params(params: &LatentParams, grid: usize, min_split: usize, splitting: Splitting) -> PlanParams {
    // A unit is the work of as many blocks as there are tiles of heads.
    let num_kv_heads = params.num_heads.div_ceil(TILE_HEADS);
    let (window, prefill_rows, expand, max_slots) = (None, None, false, 0);
    let params = PlanParams { grid, num_kv_heads, window, splitting, min_split, prefill_rows, expand, max_slots };
    PlanParams { max_slots: params.slots_for(ROWS_AT_ONCE), ..params }
}

impl LatentAttention {
    pub(crate) fn new(device: &Arc<Device>, dtype: DType, deterministic: bool) -> Result<Self, KernelError> {
        let none = || device.alloc("latent attention", 0);
        Ok(Self {
            device: Arc::clone(device),
            dtype,
            deterministic,
            kernels: None,
            partials: [none()?, none()?, none()?],
            between: [none()?, none()?],
            expanded: [none()?, none()?],
            in_order: none()?,
            generation: 0,
        })
    }

    /// Grows whenever addresses change that a recorded step may name.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Makes the kernels for a model's layers.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] if there are none, and what compiling may say.
    pub(crate) fn expect(&mut self, params: &LatentParams) -> Result<(), KernelError> {
        if self.kernels.as_ref().is_some_and(|kernels| kernels.params == *params) {
            return Ok(());
        }
        let (device, dtype, arch) = (&self.device, self.dtype, self.device.arch);
        let products = if Products::supports(arch, dtype, params) { Some(Products::new(device, dtype)?) } else { None };
        let units = if LatentDecode::supports(arch, dtype, params) {
            Units::Decode(LatentDecode::new(device, dtype)?)
        } else {
            Units::Simple
        };
        let needs_simple = products.is_none() || matches!(units, Units::Simple);
        let simple = if needs_simple { Some(LatentSimple::new(device, dtype, params)?) } else { None };
        let whole = shape(dtype, params, params.num_heads);
        let in_tiles = !self.deterministic
            && Expand::supports(arch, dtype, params)
            && AttentionPrefillSm90::supports(device, &whole);
        let prefill = if in_tiles {
            let attention = HashMap::from([(params.num_heads, AttentionPrefillSm90::new(device, whole)?)]);
            Some(Prefill { expand: Expand::new(device, dtype)?, attention, maps: HashMap::new() })
        } else {
            None
        };
        let rope = LatentRope::new(device, dtype)?;
        self.kernels = Some(Kernels { params: *params, rope, units, simple, products, prefill });
        self.generation += 1;
        Ok(())
    }

    /// What a plan is made for.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] unless a model's layers were [expected](Self::expect).
    pub(crate) fn plan_params(&self) -> Result<PlanParams, KernelError> {
        let kernels = self.kernels()?;
        let (grid, min_split) = match (&kernels.units, &kernels.simple) {
            (Units::Decode(kernel), _) => (kernel.grid(), kernel.min_split()),
            (Units::Simple, Some(kernel)) => (kernel.grid(), kernel.min_split()),
            (Units::Simple, None) => (1, 1),
        };
        let splitting = if self.deterministic { Splitting::ByContext } else { Splitting::Balanced };
        let prefill_rows = kernels.prefill.as_ref().map(|_| TILE_ROWS as usize);
        let params = plan_params(&kernels.params, grid, min_split, splitting);
        Ok(PlanParams { prefill_rows, expand: prefill_rows.is_some(), ..params })
    }

    fn kernels(&self) -> Result<&Kernels, KernelError> {
        self.kernels.as_ref().ok_or_else(not_expected)
    }

    /// See [`Backend::latent_rope_and_cache`](crate::Backend::latent_rope_and_cache).
    ///
    /// # Errors
    /// [`KernelError::Shape`] if an operand is too small, [`KernelError::Unsupported`] for layers that were not expected.
    pub(crate) fn rope(&self, operands: &LatentRopeOperands<'_>, params: &LatentParams) -> Result<(), KernelError> {
        let kernels = self.kernels()?;
        same(&kernels.params, params)?;
        kernels.rope.run(&self.device, operands, params)
    }

    /// Attention of the rows of `plan`, whose lists are on the device.
    ///
    /// # Errors
    /// As for [`rope`](Self::rope).
    pub(crate) fn run(
        &mut self,
        operands: &LatentAttentionOperands<'_>,
        params: &LatentParams,
        plan: &AttentionPlan,
        max_slots: usize,
    ) -> Result<(), KernelError> {
        same(&self.kernels()?.params, params)?;
        if !plan.tiles.is_empty() {
            self.run_tiles(operands, params, plan)?;
        }
        if !plan.units.is_empty() {
            self.run_units(operands, params, plan, max_slots)?;
        }
        Ok(())
    }

    fn run_tiles(
        &mut self,
        operands: &LatentAttentionOperands<'_>,
        params: &LatentParams,
        plan: &AttentionPlan,
    ) -> Result<(), KernelError> {
        let (device, dtype, size) = (Arc::clone(&self.device), self.dtype, self.dtype.size_bytes());
        let (rows, num_blocks) = (plan.expanded_rows, plan.expanded_rows / EXPANDED_BLOCK);
        self.reserve_order(num_blocks)?;
        // Heads of a turn.
        let of_head = Expand::sizes(params, rows, 1).into_iter().sum::<usize>() * size;
        let at_once = (EXPANDED_BYTES / of_head.max(1)).clamp(1, params.num_heads);
        let sizes = Expand::sizes(params, rows, at_once);
        for (buffer, values) in self.expanded.iter_mut().zip(sizes) {
            if buffer.bytes() < values * size {
                // A step of tiles is never recorded.
                *buffer = device.alloc("keys and values of latent vectors", values * size)?;
            }
        }
        let Some(prefill) = self.kernels.as_mut().and_then(|kernels| kernels.prefill.as_mut()) else {
            return Err(KernelError::Unsupported { op: OP, what: "tiles of prompts".to_owned(), backend: "cuda" });
        };
        let [k, v] = self.expanded.each_ref().map(Span::from);
        let q_row = params.num_heads * params.q_dim();
        let out_row = params.num_heads * params.v_dim;
        let q = operands.q.holding(OP, "values of q", operands.num_rows * q_row, size)?;
        let out = operands.out.holding(OP, "values of the output", operands.num_rows * out_row, size)?;
        for first_head in (0..params.num_heads).step_by(at_once) {
            let num_heads = at_once.min(params.num_heads - first_head);
            let from = Expansion {
                cache: operands.cache,
                block_size: operands.block_size,
                block_table: operands.block_table,
                tiles: operands.expanded,
                num_tiles: plan.expanded.len(),
                num_rows: rows,
                first_head,
                num_heads,
            };
            let weights = [operands.heads.queries, operands.heads.values];
            prefill.expand.run(&device, [k, v], weights, &from, params)?;

            let attention = match prefill.attention.get(&num_heads) {
                Some(known) => known,
                None => {
                    let made = AttentionPrefillSm90::new(&device, shape(dtype, params, num_heads))?;
                    prefill.attention.entry(num_heads).or_insert(made)
                }
            };
            let [k_at, v_at] = [k.holding(OP, "keys", 1, size)?, v.holding(OP, "values", 1, size)?];
            let key = [k_at, v_at, (num_blocks as u64) << 32 | num_heads as u64];
            if prefill.maps.len() > 256 {
                prefill.maps.clear();
            }
            let cache = match prefill.maps.get(&key) {
                Some(known) => *known,
                None => *prefill.maps.entry(key).or_insert(attention.cache_maps(k_at, v_at, num_blocks)?),
            };
            let at = |base: u64, dim: usize| base + (first_head * dim * size) as u64;
            let launch = Operands {
                out: (at(out, params.v_dim), out_row as u32),
                q: (at(q, params.q_dim()), q_row as u32),
                cache: &cache,
                tiles: operands.tiles.holding(OP, "tiles", plan.tiles.len(), 16)?,
                num_tiles: plan.tiles.len() as u32,
                block_table: Span::from(&self.in_order).holding(OP, "blocks", num_blocks, 4)?,
                window: 0,
                scale: params.scale,
                soft_cap: 0.0,
                sinks: 0,
            };
            // SAFETY: sizes were checked just now, the table names blocks in order, and tiles are a plan's.
            unsafe { attention.launch(&launch)? };
        }
        Ok(())
    }

    /// A table of blocks in order.
    fn reserve_order(&mut self, num_blocks: usize) -> Result<(), KernelError> {
        if self.in_order.bytes() < num_blocks * size_of::<u32>() {
            let blocks: Vec<u32> = (0..num_blocks.next_power_of_two() as u32).collect();
            let bytes: &[u8] = bytemuck::cast_slice(&blocks);
            self.in_order = self.device.alloc("a table of blocks", bytes.len())?;
            self.in_order.upload(0, bytes)?;
        }
        Ok(())
    }

    fn run_units(
        &mut self,
        operands: &LatentAttentionOperands<'_>,
        params: &LatentParams,
        plan: &AttentionPlan,
        max_slots: usize,
    ) -> Result<(), KernelError> {
        let (size, num_heads) = (self.dtype.size_bytes(), params.num_heads);
        let rows = plan.units.iter().map(|unit| unit.row as usize);
        let first_row = rows.clone().min().unwrap_or(0);
        let num_rows = rows.max().map_or(0, |last| last + 1 - first_row);
        let between = num_rows * num_heads * params.rank * size;
        let wanted = Partials::bytes(max_slots, num_heads, params.rank);
        for (buffer, wanted) in self.partials.iter_mut().zip(wanted) {
            if buffer.bytes() < wanted {
                *buffer = self.device.alloc("partial attention", wanted)?;
                buffer.fill(0, wanted, 0)?; // the tickets
                self.generation += 1;
            }
        }
        for buffer in &mut self.between {
            if buffer.bytes() < between {
                *buffer = self.device.alloc("queries and means of latent vectors", between)?;
                self.generation += 1;
            }
        }
        let [queries, means] = self.between.each_ref().map(Span::from);
        let [out, ml, tickets] = self.partials.each_ref().map(Span::from);
        let partials = Partials { num_slots: max_slots, out, ml, tickets };
        let (device, kernels) = (&self.device, self.kernels()?);

        let product = |operands: [Span<'_>; 3], heads: &Heads| match (&kernels.products, &kernels.simple) {
            (Some(products), _) => products.heads(device, operands, heads),
            (None, Some(simple)) => simple.product(device, operands, heads),
            (None, None) => Err(not_expected()),
        };
        let q = operands.q.rest(first_row * num_heads * params.q_dim() * size)?;
        let (num_n, num_k) = (params.rank, params.nope_dim);
        let to_latent = Heads { num_rows, num_heads, num_n, num_k, x_head: params.q_dim() };
        product([queries, q, operands.heads.queries], &to_latent)?;
        for (index, chunk) in plan.chunks.iter().enumerate() {
            let of_chunk = LatentOperands {
                means,
                queries,
                q: operands.q,
                first_row,
                num_rows,
                cache: operands.cache,
                block_size: operands.block_size,
                units: operands.units.rest(chunk.start * size_of::<DecodeUnit>())?,
                num_units: operands.num_units.rest(index * size_of::<u32>())?,
                block_table: operands.block_table,
                partials,
            };
            match (&kernels.units, &kernels.simple) {
                (Units::Decode(kernel), _) => kernel.run(device, &of_chunk, params)?,
                (Units::Simple, Some(kernel)) => kernel.run(device, &of_chunk, params)?,
                (Units::Simple, None) => return Err(not_expected()),
            }
        }
        let out = operands.out.rest(first_row * num_heads * params.v_dim * size)?;
        let (num_n, num_k) = (params.v_dim, params.rank);
        let from_latent = Heads { num_rows, num_heads, num_n, num_k, x_head: params.rank };
        product([out, means, operands.heads.values], &from_latent)
    }
}

/// Attention of some heads over keys and values that are made for a step.
fn shape(dtype: DType, params: &LatentParams, num_heads: usize) -> Shape {
    Shape {
        dtype,
        num_heads: num_heads as u32,
        num_kv_heads: num_heads as u32,
        head_dim: params.q_dim() as u32,
        value_dim: params.v_dim as u32,
        block_size: EXPANDED_BLOCK as u32,
        is_capped: false,
    }
}

fn not_expected() -> KernelError {
    let what = "layers that were not announced".to_owned();
    KernelError::Unsupported { op: OP, what, backend: "cuda" }
}

fn same(known: &LatentParams, params: &LatentParams) -> Result<(), KernelError> {
    // Layers of a model differ in nothing.
    if known == params { Ok(()) } else { Err(not_expected()) }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::super::testing::{random, rounded, step, test_device, time};
    use super::*;
    use crate::cpu::{CpuBackend, CpuConfig, CpuTensor, PoolConfig, to_bytes};
    use crate::cuda::{CudaBackend, CudaConfig, CudaDevice, CudaTensor};
    use crate::{
        Backend, CacheLayout, Issue, KvCacheSpec, MatrixView, PagedBatch, Rope, RopePairs, SequenceRows, StepRows,
        TensorUse,
    };

    const LAYER: usize = 1;
    const EPS: f32 = 1e-6;

    /// Weights of a layer, and what the rows of some sequences bring.
    struct Case {
        params: LatentParams,
        dtype: DType,
        block_size: usize,
        pairs: RopePairs,
        deterministic: bool,
    }

    /// Rows and context of each sequence of a step; the sequences of all steps are the same.
    type Step<'a> = &'a [(usize, usize)];

    /// Fills a tensor of so many rows.
    type Fill<'a, B> = dyn Fn(&mut <B as Backend>::Tensor, &[f32], usize) + 'a;

    impl Case {
        fn new(dtype: DType, [num_heads, rank, nope_dim, rope_dim, v_dim]: [usize; 5]) -> Self {
            // Scores of a few units: a few positions decide.
            let scale = 4.0 / ((rank * nope_dim) as f32 / 27.0 + rope_dim as f32 / 9.0).sqrt();
            Self {
                params: LatentParams { num_heads, rank, nope_dim, rope_dim, v_dim, scale },
                dtype,
                block_size: 32,
                pairs: RopePairs::Interleaved,
                deterministic: false,
            }
        }

        fn what(&self) -> String {
            format!("{:?} in {}, blocks of {}, {:?}", self.params, self.dtype, self.block_size, self.pairs)
        }

        fn values(&self, count: usize, seed: u64) -> Vec<f32> {
            random(count, seed).into_iter().map(|x| rounded(x, self.dtype)).collect()
        }

        /// What a row of a sequence brings: `[H, N + R]` and `[C + R]`.
        fn row(&self, sequence: usize, position: usize) -> [Vec<f32>; 2] {
            let p = &self.params;
            let seed = (sequence as u64) << 32 | position as u64;
            [self.values(p.num_heads * p.q_dim(), seed), self.values(p.width(), seed ^ 0x5555_0000_0000)]
        }

        /// The outputs of all rows of all steps.
        fn run<B: Backend>(
            &self,
            backend: &mut B,
            cache_type: DType,
            steps: &[Step<'_>],
            fill: &Fill<'_, B>,
        ) -> Vec<f32> {
            let p = self.params;
            let pack = |rows: usize, cols: usize, seed| {
                let values = self.values(rows * cols, seed);
                let bytes = to_bytes(&values, self.dtype);
                backend.pack(&[MatrixView { bytes: &bytes, dtype: self.dtype, rows, cols }], None, None).unwrap()
            };
            let heads = LatentHeads {
                queries: pack(p.num_heads * p.rank, p.nope_dim, 11),
                values: pack(p.num_heads * p.v_dim, p.rank, 12),
            };
            let norm: Vec<f32> = random(p.rank, 13).iter().map(|x| 1.0 + 0.2 * x).collect();
            let norm = backend.vector(&norm).unwrap();
            let frequencies = (0..p.rope_dim / 2).map(|pair| 0.7f32.powi(pair as i32)).collect();
            let rope = Rope { inv_freq: frequencies, scale: 1.1, pairs: self.pairs };
            let longest = |i: usize| steps.iter().filter_map(|step| step.get(i)).map(|of| of.1).max().unwrap_or(0);
            let num_sequences = steps.iter().map(|step| step.len()).max().unwrap_or(0);
            let num_blocks: usize = (0..num_sequences).map(|i| longest(i).div_ceil(self.block_size)).sum();
            let spec = KvCacheSpec {
                num_layers: 2,
                num_blocks,
                block_size: self.block_size,
                num_kv_heads: 1,
                head_dim: p.width(),
                cache_type: cache_type.into(),
                layout: CacheLayout::Latent { rank: p.rank },
            };
            let mut cache = backend.kv_cache(&spec).unwrap();
            backend.expect_latent(&p).unwrap();
            let mut found = Vec::new();
            for step in steps {
                let mut batch = PagedBatch::default();
                let [mut q, mut kv] = [Vec::new(), Vec::new()];
                // Blocks in descending order, so that neighbours in a sequence are none in the cache.
                let mut next_block = num_blocks;
                for (sequence, &(num_rows, context_len)) in step.iter().enumerate() {
                    let of_all = longest(sequence).div_ceil(self.block_size);
                    let blocks: Vec<u32> = (0..of_all).map(|i| (next_block - 1 - i) as u32).collect();
                    next_block -= of_all;
                    if num_rows == 0 {
                        continue;
                    }
                    let num_blocks = context_len.div_ceil(self.block_size);
                    batch.sequences.push(SequenceRows {
                        first_row: batch.positions.len(),
                        num_rows,
                        context_len,
                        first_block: batch.block_table.len(),
                        num_blocks,
                    });
                    for position in context_len - num_rows..context_len {
                        let [of_q, of_kv] = self.row(sequence, position);
                        q.extend(of_q);
                        kv.extend(of_kv);
                        batch.positions.push(position as u32);
                        let block = blocks[position / self.block_size] as usize;
                        batch.slots.push((block * self.block_size + position % self.block_size) as u32);
                    }
                    batch.block_table.extend(&blocks[..num_blocks]);
                }
                let rows = batch.positions.len();
                let tensor = |cols| backend.tensor(rows, cols, TensorUse::Activations).unwrap();
                let [mut q_tensor, mut kv_tensor] = [tensor(p.num_heads * p.q_dim()), tensor(p.width())];
                let mut out = tensor(p.num_heads * p.v_dim);
                fill(&mut q_tensor, &q, rows);
                fill(&mut kv_tensor, &kv, rows);
                let ids = vec![0; rows];
                let announced = StepRows { ids: &ids, carried: &[], paged: &batch, logit_rows: &[], may_record: false };
                let issue = backend.begin_step(&announced, std::slice::from_ref(&rope), &mut cache).unwrap();
                assert_eq!(issue, Issue::Operators);
                backend
                    .latent_rope_and_cache(&mut q_tensor, &mut kv_tensor, &mut cache, LAYER, &p, 0, (&norm, EPS))
                    .unwrap();
                backend.latent_attention(&mut out, &q_tensor, &cache, LAYER, &p, &heads).unwrap();
                let _ = backend.end_step(Ok(())).unwrap();
                (0..rows).for_each(|row| found.extend(backend.read_row(&out, row).unwrap()));
            }
            found
        }

        fn on_cpu(&self, steps: &[Step<'_>]) -> Vec<f32> {
            let pool = PoolConfig { threads: NonZeroUsize::new(8), cores: Vec::new() };
            let mut backend = CpuBackend::new(&CpuConfig { pool, ..CpuConfig::default() }).unwrap();
            self.run(&mut backend, self.dtype, steps, &|tensor: &mut CpuTensor, values, rows| {
                tensor.resize("test", rows, values.len() / rows).unwrap();
                tensor.values_mut().copy_from_slice(values);
            })
        }

        fn on_gpu(&self, device: &Arc<Device>, steps: &[Step<'_>]) -> Vec<f32> {
            let config = CudaConfig { dtype: self.dtype, deterministic: self.deterministic };
            let mut backend = CudaBackend::new(&CudaDevice(Arc::clone(device)), &config).unwrap();
            self.run(&mut backend, self.dtype, steps, &|tensor: &mut CudaTensor, values, rows| {
                tensor.rows = rows;
                tensor.buffer.upload(0, &to_bytes(values, tensor.dtype)).unwrap();
            })
        }

        #[track_caller]
        fn check(&self, device: &Arc<Device>, steps: &[Step<'_>]) {
            let (found, wanted) = (self.on_gpu(device, steps), self.on_cpu(steps));
            assert_eq!(found.len(), wanted.len());
            let largest = wanted.iter().fold(0f32, |most, x| most.max(x.abs()));
            // Queries, weights, means and outputs are rounded to T; means of large vectors are smaller than those.
            let bound = f64::from(largest) * 4.0 * step(self.dtype) + 1e-6;
            let mut squares = 0.0;
            for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                let off = (f64::from(*found) - f64::from(*wanted)).abs();
                assert!(off <= bound, "{}: value {i} is {found}, should be {wanted}, of {largest}", self.what());
                squares += off * off;
            }
            let deviation = (squares / found.len() as f64).sqrt();
            assert!(deviation <= bound / 6.0, "{}: deviation {deviation}, bound {bound}", self.what());
        }
    }

    const PUBLISHED: [usize; 5] = [16, 512, 128, 64, 128];
    const MIXED: [Step<'static>; 3] =
        [&[(70, 70), (1, 1), (300, 300)], &[(1, 71), (1, 2), (40, 340)], &[(1, 72), (1, 3), (1, 341)]];

    #[test]
    fn latent_published_sizes() {
        let Some(device) = test_device() else { return };
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            Case::new(dtype, PUBLISHED).check(&device, &MIXED);
        }
    }

    #[test]
    fn latent_heads_that_are_no_whole_tiles() {
        let Some(device) = test_device() else { return };
        for num_heads in [1, 3, 20, 128] {
            let [_, rank, nope, rope, v] = PUBLISHED;
            Case::new(DType::BF16, [num_heads, rank, nope, rope, v]).check(&device, &MIXED);
        }
    }

    #[test]
    fn latent_block_sizes_and_pairs() {
        let Some(device) = test_device() else { return };
        for (block_size, pairs) in [(16, RopePairs::Halves), (64, RopePairs::Interleaved), (128, RopePairs::Halves)] {
            Case { block_size, pairs, ..Case::new(DType::F16, PUBLISHED) }.check(&device, &MIXED);
        }
    }

    #[test]
    fn latent_other_sizes() {
        let Some(device) = test_device() else { return };
        for sizes in [[4, 32, 16, 8, 16], [5, 20, 12, 6, 10], [2, 512, 24, 64, 40], [3, 256, 128, 32, 128]] {
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                Case::new(dtype, sizes).check(&device, &MIXED);
            }
        }
    }

    /// Rows in one unit, in several, and as prompts.
    #[test]
    fn latent_long_contexts() {
        let Some(device) = test_device() else { return };
        let steps: [Step<'_>; 2] = [&[(3000, 3000), (700, 700)], &[(1, 3001), (1, 701)]];
        Case::new(DType::BF16, PUBLISHED).check(&device, &steps);
        let [_, rank, nope, rope, v] = PUBLISHED;
        Case::new(DType::F16, [4, rank, nope, rope, v]).check(&device, &steps);
    }

    #[test]
    fn latent_a_row_is_the_same_in_any_batch() {
        let Some(device) = test_device() else { return };
        for sizes in [PUBLISHED, [4, 32, 16, 8, 16]] {
            let case = Case { deterministic: true, ..Case::new(DType::BF16, sizes) };
            let cols = sizes[0] * sizes[4];
            let one: [Step<'_>; 1] = [&[(700, 700)]];
            let whole = case.on_gpu(&device, &one);
            let parts: [Step<'_>; 3] = [&[(600, 600), (40, 40)], &[(99, 699), (1, 41)], &[(1, 700), (20, 61)]];
            let found = case.on_gpu(&device, &parts);
            assert!(whole[..600 * cols] == found[..600 * cols], "the first chunk");
            assert!(whole[600 * cols..699 * cols] == found[640 * cols..739 * cols], "the second chunk");
            assert!(whole[699 * cols..] == found[740 * cols..741 * cols], "the decode");
        }
    }

    /// `cargo test --release -- --ignored --nocapture latent_speed`
    #[test]
    #[ignore = "measures"]
    fn latent_speed() {
        let Some(device) = test_device() else { return };
        for (rows, context, num_heads) in [
            (1, 4096, 16),
            (8, 4096, 16),
            (64, 4096, 16),
            (64, 512, 16),
            (256, 256, 16),
            (256, 2048, 16),
            (64, 4096, 128),
        ] {
            let [_, rank, nope, rope, v] = PUBLISHED;
            let params = Case::new(DType::BF16, [num_heads, rank, nope, rope, v]).params;
            let mut attention = LatentAttention::new(&device, DType::BF16, false).unwrap();
            attention.expect(&params).unwrap();
            let (block_size, of_each) = (32, usize::div_ceil(context, 32));
            let num_blocks = rows * of_each;
            let mut batch = PagedBatch::default();
            for row in 0..rows {
                let first_block = row * of_each;
                batch.sequences.push(SequenceRows {
                    first_row: row,
                    num_rows: 1,
                    context_len: context,
                    first_block,
                    num_blocks: of_each,
                });
                batch.block_table.extend((first_block..first_block + of_each).map(|block| block as u32));
            }
            let plan_params = attention.plan_params().unwrap();
            let mut plan = AttentionPlan::default();
            plan.make(&batch, &plan_params, None);
            let noise = |count: usize, seed| {
                super::super::testing::upload(
                    &device,
                    &to_bytes(&random(count.min(1 << 22), seed), DType::BF16).repeat(count.div_ceil(1 << 22)),
                )
            };
            let cache = noise(num_blocks * block_size * params.width(), 1);
            let q = noise(rows * num_heads * params.q_dim(), 2);
            let weights = [noise(num_heads * rank * nope, 3), noise(num_heads * rank * v, 4)];
            let out = device.alloc("bench", rows * num_heads * v * 2).unwrap();
            let bytes = |bytes: &[u8]| super::super::testing::upload(&device, bytes);
            let units = bytes(bytemuck::cast_slice(&plan.units));
            let counts: Vec<u32> = plan.chunks.iter().map(|chunk| chunk.len() as u32).collect();
            let (counts, table) =
                (bytes(bytemuck::cast_slice(&counts)), bytes(bytemuck::cast_slice(&batch.block_table)));
            let operands = LatentAttentionOperands {
                out: (&out).into(),
                q: (&q).into(),
                cache: (&cache).into(),
                block_size,
                num_rows: rows,
                units: (&units).into(),
                num_units: (&counts).into(),
                tiles: (&units).into(),
                expanded: (&units).into(),
                block_table: (&table).into(),
                heads: LatentHeads { queries: (&weights[0]).into(), values: (&weights[1]).into() },
            };
            let all = time(&device, || attention.run(&operands, &params, &plan, plan_params.max_slots));
            let read = (rows * context * params.width() * 2) as f64;
            eprintln!(
                "latent_attention/bf16/{rows}x{context} heads {num_heads}: {:8.1} us with products, {:5.0} GB/s of cache, {} units",
                all.as_secs_f64() * 1e6,
                read / all.as_secs_f64() / 1e9,
                plan.units.len(),
            );
            let LatentAttention { kernels, between, partials, .. } = &attention;
            let Some(Kernels { units: Units::Decode(kernel), products: Some(products), .. }) = kernels else { return };
            let [queries, means] = between.each_ref().map(Span::from);
            let [out_parts, ml, tickets] = partials.each_ref().map(Span::from);
            let of_chunk = LatentOperands {
                means,
                queries,
                q: operands.q,
                first_row: 0,
                num_rows: rows,
                cache: operands.cache,
                block_size,
                units: operands.units,
                num_units: operands.num_units,
                block_table: operands.block_table,
                partials: Partials { num_slots: plan_params.max_slots, out: out_parts, ml, tickets },
            };
            let alone = time(&device, || kernel.run(&device, &of_chunk, &params));
            let heads = Heads { num_rows: rows, num_heads, num_n: rank, num_k: nope, x_head: params.q_dim() };
            let to = time(&device, || products.heads(&device, [queries, operands.q, (&weights[0]).into()], &heads));
            let heads = Heads { num_rows: rows, num_heads, num_n: v, num_k: rank, x_head: rank };
            let from = time(&device, || products.heads(&device, [operands.out, means, (&weights[1]).into()], &heads));
            eprintln!(
                "    alone {:8.1} us, {:5.0} GB/s; products {:6.1} and {:6.1} us",
                alone.as_secs_f64() * 1e6,
                read / alone.as_secs_f64() / 1e9,
                to.as_secs_f64() * 1e6,
                from.as_secs_f64() * 1e6,
            );
        }
    }
}
