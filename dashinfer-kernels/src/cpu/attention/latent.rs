//! Attention over latent vectors, which are the keys and the values of all heads.
//!
//! The matrices that would make a head's keys and values of them are applied to its queries and its outputs instead. Between the two stands
//! [`run`] with one key/value head that all heads share. A step's rows pass in chunks, so that the queries and means of all heads, which
//! are many times as long as a row, take a fixed amount of memory.

use std::ops::Range;

use super::{AttentionRange, CpuKvCache, Scratch, SendPtr, Work, run};
use crate::cpu::backend::CpuBackend;
use crate::cpu::linear::{self, Output, PANEL, PackedMatrix};
use crate::cpu::pool::ThreadPool;
use crate::{AttentionParams, LatentHeads, LatentParams, PagedBatch};

/// Values of the queries and means of a chunk: 16 MiB; in tests few, so that some steps take several chunks.
const CHUNK_VALUES: usize = if cfg!(test) { 1 << 14 } else { 4 << 20 };
/// Panels of a head that a task computes at most.
const PANELS_PER_TASK: usize = 16;

/// One call.
pub(crate) struct LatentWork<'a> {
    pub(crate) params: &'a LatentParams,
    pub(crate) batch: &'a PagedBatch,
    pub(crate) cache: &'a CpuKvCache,
    pub(crate) layer: usize,
    pub(crate) heads: LatentHeads<&'a PackedMatrix>,
    /// `[T, H · (N + R)]`
    pub(crate) q: &'a [f32],
    /// `[T, H · v_dim]`
    pub(crate) out: SendPtr<f32>,
}

/// Memory that a call works in, kept from call to call.
#[derive(Debug, Default)]
pub(crate) struct LatentScratch {
    /// `[rows, H · (C + R)]`
    queries: Vec<f32>,
    /// `[rows, H · C]`
    means: Vec<f32>,
    per_worker: Vec<WorkerScratch>,
    attention: Scratch,
}

#[derive(Debug, Default)]
struct WorkerScratch {
    x: Vec<f32>,
    out: Vec<f32>,
}

/// Bytes that latent attention works in beside activations: queries and means of latent vectors, of a chunk of rows.
#[must_use]
pub fn latent_workspace_bytes(params: &LatentParams) -> usize {
    CHUNK_VALUES.max(row_values(params)).saturating_mul(size_of::<f32>())
}

fn row_values(params: &LatentParams) -> usize {
    params.num_heads.saturating_mul(params.width().saturating_add(params.rank))
}

/// See [`Backend::latent_attention`](crate::Backend::latent_attention). The caller has checked shapes, slots and block tables.
pub(crate) fn run_latent(
    attend: AttentionRange,
    product: linear::Product,
    work: &LatentWork<'_>,
    scratch: &mut LatentScratch,
    pool: &ThreadPool,
) {
    let params = work.params;
    let num_rows = work.batch.positions.len();
    let rows_per_chunk = (CHUNK_VALUES / row_values(params).max(1)).clamp(1, num_rows.max(1));
    let LatentScratch { queries, means, per_worker, attention } = scratch;
    queries.resize(rows_per_chunk * params.num_heads * params.width(), 0.0);
    means.resize(rows_per_chunk * params.num_heads * params.rank, 0.0);
    per_worker.resize_with(pool.num_threads(), WorkerScratch::default);
    let shared = AttentionParams {
        num_heads: params.num_heads,
        num_kv_heads: 1,
        head_dim: params.width(),
        scale: params.scale,
        window: None,
        soft_cap: None,
    };
    for first in (0..num_rows).step_by(rows_per_chunk) {
        let rows = first..num_rows.min(first + rows_per_chunk);
        let (q_dim, width) = (params.q_dim(), params.width());
        let q = |row: usize, head: usize| &work.q[(row * params.num_heads + head) * q_dim..][..q_dim];

        let to = SendPtr(queries.as_mut_ptr());
        let from = |row: usize, head: usize| &q(first + row, head)[..params.nope_dim];
        let place = |row: usize, head: usize| (row * params.num_heads + head) * width;
        // SAFETY: `queries` has a place for each head of each row, `C + R` apart; the variant was chosen for this machine.
        unsafe {
            for_heads(product, work.heads.queries, params.num_heads, rows.len(), &from, to, &place, per_worker, pool)
        };
        CpuBackend::for_rows(pool, rows.len(), params.num_heads * params.rope_dim, &|row| {
            for head in 0..params.num_heads {
                let rotated = &q(first + row, head)[params.nope_dim..];
                // SAFETY: `R` values behind the `C` of a query are its own, and rows have different tasks.
                unsafe {
                    let to = to.get().add(place(row, head) + params.rank);
                    to.copy_from_nonoverlapping(rotated.as_ptr(), rotated.len());
                }
            }
        });

        let attended = Work {
            params: &shared,
            batch: work.batch,
            cache: work.cache,
            layer: work.layer,
            rows: rows.clone(),
            queries: &queries[..],
            query_stride: params.num_heads * width,
            sinks: None,
            out: SendPtr(means.as_mut_ptr()),
        };
        run(attend, &attended, attention, pool);

        let from = |row: usize, head: usize| &means[(row * params.num_heads + head) * params.rank..][..params.rank];
        let place = |row: usize, head: usize| ((first + row) * params.num_heads + head) * params.v_dim;
        // SAFETY: `out` has `v_dim` values for each head of each row; the variant was chosen for this machine.
        unsafe {
            for_heads(
                product,
                work.heads.values,
                params.num_heads,
                rows.len(),
                &from,
                work.out,
                &place,
                per_worker,
                pool,
            )
        };
    }
}

/// For each row and head, the product of `from(row, head)` with the head's rows of `weight`, written from `place(row, head)` of `out` on.
/// `weight`: `[H · N, K]`.
///
/// # Safety
/// `product` is one of this machine. `from` gives `K` values for each row and head, and `out` has room for `N` at each place, which
/// nobody else accesses.
#[expect(clippy::too_many_arguments, reason = "two calls, which say all there is to say")]
unsafe fn for_heads<'a>(
    product: linear::Product,
    weight: &PackedMatrix,
    num_heads: usize,
    num_rows: usize,
    from: &(dyn Fn(usize, usize) -> &'a [f32] + Sync),
    out: SendPtr<f32>,
    place: &(dyn Fn(usize, usize) -> usize + Sync),
    per_worker: &mut [WorkerScratch],
    pool: &ThreadPool,
) {
    let head_rows = weight.rows() / num_heads;
    // A head need not start with a panel: it takes its columns of those that it shares with its neighbours.
    let panels = |head: usize| head * head_rows / PANEL..((head + 1) * head_rows).div_ceil(PANEL);
    let parts = (head_rows.div_ceil(PANEL) + 1).div_ceil(PANELS_PER_TASK);
    let scratch = SendPtr(per_worker.as_mut_ptr());
    pool.run(num_heads * parts, &|task, worker| {
        let (head, part) = (task / parts, task % parts);
        let all = panels(head);
        let start = all.end.min(all.start + part * PANELS_PER_TASK);
        let panels = start..all.end.min(start + PANELS_PER_TASK);
        if panels.is_empty() {
            return;
        }
        // SAFETY: no two tasks run as the same worker at once, and there is an element for each worker.
        let scratch = unsafe { &mut *scratch.get().add(worker) };
        let width = panels.len() * PANEL;
        scratch.x.clear();
        (0..num_rows).for_each(|row| scratch.x.extend_from_slice(from(row, head)));
        scratch.out.resize(num_rows * width, 0.0);
        let job = linear::Job::new(&scratch.x, weight);
        let window = Output::window(scratch.out.as_mut_ptr(), width, 0, panels.clone());
        // SAFETY: the caller vouches for the variant; the rows are those of `x`, the panels exist, and the window is this worker's.
        unsafe { product(&job, 0..num_rows, panels.clone(), window) };
        let Range { start, end } = panels;
        let columns = (start * PANEL).max(head * head_rows)..(end * PANEL).min((head + 1) * head_rows);
        for (row, values) in scratch.out.chunks_exact(width).enumerate() {
            let values = &values[columns.start - start * PANEL..columns.end - start * PANEL];
            let at = place(row, head) + columns.start - head * head_rows;
            // SAFETY: the caller says that these columns of the head have their place in `out`; tasks have different ones.
            unsafe { out.get().add(at).copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        }
    });
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use proptest::prelude::*;

    use super::*;
    use crate::cpu::attention::cache::Side;
    use crate::cpu::math::tests::noise;
    use crate::cpu::{CpuConfig, CpuLinear, CpuTensor, Isa, PoolConfig, to_bytes};
    use crate::{
        Backend, CacheLayout, CacheType, DType, Issue, KernelError, KvCacheSpec, MatrixView, Rope, RopePairs,
        SequenceRows, StepRows, TensorUse,
    };

    const EPS: f32 = 1e-6;
    const LAYER: usize = 1;

    /// Weights and inputs of one layer, for some tokens of some sequences.
    struct Case {
        params: LatentParams,
        rope: Rope,
        norm: Vec<f32>,
        /// `[H, C, N]` and `[H, v_dim, C]`.
        heads: [Vec<f32>; 2],
        dtype: DType,
        /// What each row brings: `[H · (N + R)]` and `[C + R]`.
        rows: Vec<[Vec<f32>; 2]>,
    }

    impl Case {
        fn new(params: LatentParams, dtype: DType, num_rows: usize, seed: u64) -> Self {
            let LatentParams { num_heads, rank, nope_dim, rope_dim, v_dim, .. } = params;
            let rows = (0..num_rows as u64).map(|row| {
                [num_heads * params.q_dim(), params.width()].map(|len| noise(len, seed ^ (row << 8) ^ len as u64))
            });
            let round = |values: Vec<f32>| crate::to_f32(&to_bytes(&values, dtype), dtype);
            Self {
                params,
                rope: Rope {
                    inv_freq: (0..rope_dim / 2).map(|pair| 0.5f32.powi(pair as i32)).collect(),
                    scale: 1.1,
                    pairs: RopePairs::Interleaved,
                },
                norm: noise(rank, seed ^ 1).iter().map(|x| 1.0 + 0.2 * x).collect(),
                heads: [
                    round(noise(num_heads * rank * nope_dim, seed ^ 2)),
                    round(noise(num_heads * v_dim * rank, seed ^ 3)),
                ],
                dtype,
                rows: rows.collect(),
            }
        }

        fn pack(&self, backend: &CpuBackend) -> LatentHeads<CpuLinear> {
            let LatentParams { num_heads, rank, nope_dim, v_dim, .. } = self.params;
            let pack = |values: &[f32], rows: usize, cols: usize| {
                let bytes = to_bytes(values, self.dtype);
                backend.pack(&[MatrixView { bytes: &bytes, dtype: self.dtype, rows, cols }], None, None).unwrap()
            };
            LatentHeads {
                queries: pack(&self.heads[0], num_heads * rank, nope_dim),
                values: pack(&self.heads[1], num_heads * v_dim, rank),
            }
        }

        fn cache(&self, backend: &CpuBackend, blocks: usize, block_size: usize, cache_type: CacheType) -> CpuKvCache {
            let spec = KvCacheSpec {
                num_layers: 2,
                num_blocks: blocks,
                block_size,
                num_kv_heads: 1,
                head_dim: self.params.width(),
                cache_type,
                layout: CacheLayout::Latent { rank: self.params.rank },
            };
            backend.kv_cache(&spec).unwrap()
        }

        /// One step of `(first row of the case, rows, position of the first, first block)`: sequences whose blocks follow each other.
        fn step(
            &self,
            backend: &mut CpuBackend,
            cache: &mut CpuKvCache,
            heads: &LatentHeads<CpuLinear>,
            sequences: &[(usize, usize, usize, usize)],
        ) -> Vec<f32> {
            let block_size = cache.spec().block_size;
            let mut batch = PagedBatch::default();
            let [mut q, mut kv] = [Vec::new(), Vec::new()];
            for &(from, num_rows, position, first_block) in sequences {
                let context_len = position + num_rows;
                let num_blocks = context_len.div_ceil(block_size);
                batch.sequences.push(SequenceRows {
                    first_row: batch.positions.len(),
                    num_rows,
                    context_len,
                    first_block: batch.block_table.len(),
                    num_blocks,
                });
                // In descending order, so that neighbours in a sequence are none in the cache.
                let blocks: Vec<u32> =
                    (0..num_blocks).map(|i| (cache.spec().num_blocks - 1 - first_block - i) as u32).collect();
                for position in position..context_len {
                    batch.positions.push(position as u32);
                    batch
                        .slots
                        .push(blocks[position / block_size] * block_size as u32 + (position % block_size) as u32);
                }
                batch.block_table.extend(blocks);
                for row in &self.rows[from..from + num_rows] {
                    q.extend_from_slice(&row[0]);
                    kv.extend_from_slice(&row[1]);
                }
            }
            let num_rows = batch.positions.len();
            let ids = vec![0; num_rows];
            let step = StepRows { ids: &ids, carried: &[], paged: &batch, logit_rows: &[], may_record: false };
            assert_eq!(backend.begin_step(&step, std::slice::from_ref(&self.rope), cache).unwrap(), Issue::Operators);
            let filled = |backend: &CpuBackend, values: &[f32]| {
                let cols = values.len() / num_rows;
                let mut tensor: CpuTensor = backend.tensor(num_rows, cols, TensorUse::Activations).unwrap();
                tensor.resize("test", num_rows, cols).unwrap();
                tensor.values_mut().copy_from_slice(values);
                tensor
            };
            let (mut q, mut kv) = (filled(backend, &q), filled(backend, &kv));
            let out_cols = self.params.num_heads * self.params.v_dim;
            let mut out = backend.tensor(num_rows, out_cols, TensorUse::Activations).unwrap();
            backend.latent_rope_and_cache(&mut q, &mut kv, cache, LAYER, &self.params, 0, (&self.norm, EPS)).unwrap();
            backend.latent_attention(&mut out, &q, cache, LAYER, &self.params, heads).unwrap();
            out.values().to_vec()
        }

        /// Row `from + position` by the definition: keys and values of each head are made of what the cache holds, in f64.
        fn define(&self, cache: &CpuKvCache, from: usize, position: usize, first_block: usize) -> Vec<f64> {
            let LatentParams { num_heads, rank, nope_dim, rope_dim, v_dim, scale } = self.params;
            let block_size = cache.spec().block_size;
            let token = |p: usize| -> Vec<f64> {
                let block = cache.spec().num_blocks - 1 - first_block - p / block_size;
                let value = |i| f64::from(cache.value(LAYER, Side::Values, block, 0, i, p % block_size));
                (0..rank + rope_dim).map(value).collect()
            };
            let tokens: Vec<Vec<f64>> = (0..=position).map(token).collect();
            let dot = |a: &[f32], b: &[f64]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum::<f64>();
            let mut out = Vec::new();
            for head in 0..num_heads {
                let q = &self.rows[from + position][0][head * self.params.q_dim()..][..self.params.q_dim()];
                let (plain, rotated) = q.split_at(nope_dim);
                let mut turned = Vec::new();
                for (pair, freq) in rotated.chunks_exact(2).zip(&self.rope.inv_freq) {
                    let (sin, cos) = f64::from(position as f32 * freq).sin_cos();
                    let [a, b] = [pair[0], pair[1]].map(f64::from);
                    turned.extend(
                        [a * cos - b * sin, b * cos + a * sin].map(|x| (x * f64::from(self.rope.scale)) as f32),
                    );
                }
                let up = |i: usize, c: usize| f64::from(self.heads[0][(head * rank + c) * nope_dim + i]);
                let score = |token: &Vec<f64>| {
                    let key: Vec<f64> = (0..nope_dim).map(|i| (0..rank).map(|c| up(i, c) * token[c]).sum()).collect();
                    f64::from(scale) * (dot(plain, &key) + dot(&turned, &token[rank..]))
                };
                let scores: Vec<f64> = tokens.iter().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                for v in 0..v_dim {
                    let row = &self.heads[1][(head * v_dim + v) * rank..][..rank];
                    let values = tokens.iter().zip(&weights).map(|(token, weight)| weight * dot(row, token));
                    out.push(values.sum::<f64>() / total);
                }
            }
            out
        }
    }

    fn params(num_heads: usize, rank: usize, nope_dim: usize, rope_dim: usize, v_dim: usize) -> LatentParams {
        // Scores of a few units: their sums are of `C · N + R` products.
        let scale = 2.0 / ((rank * nope_dim) as f32 / 9.0 + rope_dim as f32).sqrt();
        LatentParams { num_heads, rank, nope_dim, rope_dim, v_dim, scale }
    }

    fn backend(isa: Isa, threads: usize) -> CpuBackend {
        let pool = PoolConfig { threads: NonZeroUsize::new(threads), cores: Vec::new() };
        CpuBackend::new(&CpuConfig { pool, isa: Some(isa), ..CpuConfig::default() }).unwrap()
    }

    fn isas() -> impl Iterator<Item = Isa> {
        [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx, Isa::Neon].into_iter().filter(|isa| isa.is_available())
    }

    /// A prompt and a decode in one step, against the definition.
    #[track_caller]
    fn check_definition(params: LatentParams, dtype: DType, cache_type: CacheType, rows: usize, seed: u64) {
        let case = Case::new(params, dtype, rows, seed);
        for isa in isas() {
            let mut backend = backend(isa, 2);
            let heads = case.pack(&backend);
            let blocks = rows.div_ceil(16);
            let mut cache = case.cache(&backend, 2 * blocks, 16, cache_type);
            let before = rows.saturating_sub(1);
            if before > 0 {
                case.step(&mut backend, &mut cache, &heads, &[(0, before, 0, blocks)]);
            }
            let found = case.step(&mut backend, &mut cache, &heads, &[(0, rows, 0, 0), (before, 1, before, blocks)]);
            let cols = params.num_heads * params.v_dim;
            let largest = found.iter().fold(0.0f64, |largest, x| largest.max(f64::from(x.abs())));
            for (row, found) in found.chunks_exact(cols).enumerate() {
                let (position, first_block) = if row < rows { (row, 0) } else { (before, blocks) };
                let wanted = case.define(&cache, 0, position, first_block);
                for (found, wanted) in found.iter().zip(&wanted) {
                    let off = (f64::from(*found) - wanted).abs();
                    assert!(off <= 2e-5 * largest.max(1.0), "{isa:?}, {params:?}, row {row}: {found}, {wanted}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(crate::random::cases(32))]

        #[test]
        fn it_is_attention_with_the_keys_and_values_of_every_head(
            num_heads in 1usize..7, rank in 1usize..40, nope_dim in 1usize..20, pairs in 1usize..6, v_dim in 1usize..20,
            rows in 1usize..40, which in 0usize..3, bf16: bool, seed: u64,
        ) {
            let dtype = if bf16 { DType::BF16 } else { DType::F32 };
            check_definition(params(num_heads, rank, nope_dim, 2 * pairs, v_dim), dtype, CacheType::ALL[which], rows, seed);
        }
    }

    #[test]
    fn published_sizes_are_those_of_the_definition() {
        for (cache_type, num_heads) in [(CacheType::F32, 3), (CacheType::BF16, 16), (CacheType::F16, 37)] {
            check_definition(params(num_heads, 512, 128, 64, 128), DType::BF16, cache_type, 5, 9);
        }
    }

    /// Over several ranges and blocks, decodes and chunks of one sequence beside another, on several threads: a row is the same.
    #[test]
    fn a_row_has_the_same_bits_alone_and_in_a_chunk() {
        const LEN: usize = 530;
        for isa in isas() {
            let cases = [(params(5, 20, 12, 6, 10), CacheType::F32), (params(34, 32, 8, 4, 16), CacheType::BF16)];
            // The definition takes its time.
            let cases = &cases[..if isa == Isa::Scalar { 1 } else { 2 }];
            for &(params, cache_type) in cases {
                let case = Case::new(params, DType::BF16, LEN, 4);
                let mut one = backend(isa, 1);
                let heads = case.pack(&one);
                let blocks = LEN.div_ceil(32);
                let mut cache = case.cache(&one, 2 * blocks, 32, cache_type);
                let whole = case.step(&mut one, &mut cache, &heads, &[(0, LEN, 0, 0)]);
                let cols = params.num_heads * params.v_dim;
                for threads in [1, 3] {
                    let mut backend = backend(isa, threads);
                    for (position, rows) in [(0, 1), (1, 1), (31, 3), (255, 2), (256, 1), (300, 40), (511, 2), (529, 1)]
                    {
                        let alone = case.step(&mut backend, &mut cache, &heads, &[(position, rows, position, 0)]);
                        assert_eq!(alone, whole[position * cols..][..rows * cols], "{isa:?}, {rows} from {position}");
                    }
                    let mixed = [(256, 1, 256, 0), (0, 100, 0, blocks), (100, 1, 100, blocks)];
                    for step in [&mixed[..2], &mixed[2..]] {
                        let found = case.step(&mut backend, &mut cache, &heads, step);
                        let wanted: Vec<f32> = step
                            .iter()
                            .flat_map(|&(from, rows, ..)| whole[from * cols..][..rows * cols].iter().copied())
                            .collect();
                        assert_eq!(found, wanted, "{isa:?}, {threads} threads");
                    }
                }
            }
        }
    }

    #[test]
    fn a_cache_of_latent_vectors_keeps_one_vector_for_each_token() {
        let backend = backend(Isa::best(), 1);
        let case = Case::new(params(2, 512, 4, 64, 4), DType::F32, 1, 1);
        let spec = *case.cache(&backend, 3, 32, CacheType::BF16).spec();
        assert_eq!(spec.block_bytes(), 2 * 32 * 576 * 2);
        let refused = |change: &dyn Fn(&mut KvCacheSpec)| {
            let mut spec = spec;
            change(&mut spec);
            backend.kv_cache(&spec).unwrap_err()
        };
        for cache_type in [CacheType::Int8, CacheType::Uint4] {
            let error = refused(&|spec| spec.cache_type = cache_type);
            assert!(matches!(error, KernelError::Unsupported { op: "kv_cache", .. }), "{error}");
        }
        assert!(matches!(refused(&|spec| spec.num_kv_heads = 2), KernelError::Shape { .. }));
        assert!(matches!(refused(&|spec| spec.head_dim = 511), KernelError::Shape { .. }));
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let mut backend = backend(Isa::best(), 1);
        let case = Case::new(params(2, 20, 6, 4, 5), DType::F32, 1, 1);
        let heads = case.pack(&backend);
        let mut cache = case.cache(&backend, 1, 16, CacheType::F32);
        case.step(&mut backend, &mut cache, &heads, &[(0, 1, 0, 0)]);
        let tensor = |cols| {
            let mut tensor: CpuTensor = backend.tensor(1, cols, TensorUse::Activations).unwrap();
            tensor.resize("test", 1, cols).unwrap();
            tensor
        };
        let [mut q, mut kv, mut out, mut wrong] = [20, 24, 10, 7].map(tensor);
        let norm = (&case.norm, EPS);
        let mut other = Case::new(params(2, 21, 6, 4, 5), DType::F32, 1, 1).cache(&backend, 1, 16, CacheType::F32);
        let grouped = KvCacheSpec { layout: CacheLayout::KeysAndValues, ..*cache.spec() };
        let mut grouped = backend.kv_cache(&grouped).unwrap();
        let p = &case.params;
        let shape =
            |result: Result<(), KernelError>| assert!(matches!(result, Err(KernelError::Shape { .. })), "{result:?}");
        shape(backend.latent_rope_and_cache(&mut wrong, &mut kv, &mut cache, LAYER, p, 0, norm));
        shape(backend.latent_rope_and_cache(&mut q, &mut wrong, &mut cache, LAYER, p, 0, norm));
        shape(backend.latent_rope_and_cache(&mut q, &mut kv, &mut other, LAYER, p, 0, norm));
        shape(backend.latent_rope_and_cache(&mut q, &mut kv, &mut grouped, LAYER, p, 0, norm));
        shape(backend.latent_rope_and_cache(&mut q, &mut kv, &mut cache, 2, p, 0, norm));
        shape(backend.latent_rope_and_cache(&mut q, &mut kv, &mut cache, LAYER, p, 1, norm));
        shape(backend.latent_rope_and_cache(&mut q, &mut kv, &mut cache, LAYER, p, 0, (&vec![1.0; 19], EPS)));
        shape(backend.latent_attention(&mut out, &wrong, &cache, LAYER, p, &heads));
        shape(backend.latent_attention(&mut wrong, &q, &cache, LAYER, p, &heads));
        shape(backend.latent_attention(&mut out, &q, &grouped, LAYER, p, &heads));
        let LatentHeads { queries, values } = heads;
        let swapped = LatentHeads { queries: values, values: queries };
        shape(backend.latent_attention(&mut out, &q, &cache, LAYER, p, &swapped));
        let LatentHeads { queries, values } = swapped;
        let grouped_params =
            AttentionParams { num_heads: 1, num_kv_heads: 1, head_dim: 24, scale: 1.0, window: None, soft_cap: None };
        let mut qkv = backend.tensor(1, 72, TensorUse::Activations).unwrap();
        qkv.resize("test", 1, 72).unwrap();
        shape(backend.rope_and_cache(&mut qkv, &mut cache, LAYER, &grouped_params, 0, None));
        let heads = LatentHeads { queries: values, values: queries };
        assert!(backend.latent_attention(&mut out, &q, &cache, LAYER, p, &heads).is_ok());
    }
}
