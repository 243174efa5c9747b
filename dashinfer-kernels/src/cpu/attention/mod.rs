//! Paged attention for prefill chunks and decodes in one call.
//!
//! Work is cut into units of one sequence, one key/value head and some neighbouring rows, whose queries share the keys and
//! values that a unit reads.

#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx2;
mod cache;
mod scalar;

use std::ops::Range;

pub use cache::CpuKvCache;

use super::isa::{Isa, Variant, choose};
pub(super) use super::linear::SendPtr;
use super::pool::ThreadPool;
use crate::{AttentionParams, PagedBatch};

/// Queries (rows times heads of a group) that a unit aims at: enough to reuse what it reads, few enough that their state
/// stays in the L2 cache.
const QUERIES_PER_UNIT: usize = 48;

/// Rows of one sequence and the query heads of one key/value head.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    sequence: usize,
    kv_head: usize,
    rows: Range<usize>,
}

/// One attention call.
pub(crate) struct Work<'a> {
    pub(crate) params: &'a AttentionParams,
    pub(crate) batch: &'a PagedBatch,
    pub(crate) cache: &'a CpuKvCache,
    pub(crate) layer: usize,
    /// `[T, (H + 2 K) · D]`
    pub(crate) qkv: &'a [f32],
    /// `[T, H · D]`
    pub(crate) out: SendPtr<f32>,
}

impl Work<'_> {
    fn heads_of(&self, kv_head: usize) -> Range<usize> {
        let group = self.params.num_heads / self.params.num_kv_heads;
        kv_head * group..(kv_head + 1) * group
    }

    fn query(&self, row: usize, head: usize) -> &[f32] {
        let d = self.params.head_dim;
        let stride = (self.params.num_heads + 2 * self.params.num_kv_heads) * d;
        &self.qkv[row * stride + head * d..][..d]
    }

    /// The positions that `row` of the unit's sequence sees.
    fn visible(&self, unit: &Unit, row: usize) -> Range<usize> {
        let sequence = &self.batch.sequences[unit.sequence];
        let end = sequence.context_len - sequence.num_rows + (row - sequence.first_row) + 1;
        self.params.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// The block of a position, and its place there.
    fn place(&self, unit: &Unit, position: usize) -> (usize, usize) {
        let block_size = self.cache.spec().block_size;
        let table = self.batch.sequences[unit.sequence].first_block;
        (self.batch.block_table[table + position / block_size] as usize, position % block_size)
    }

    /// Writes one head's output.
    ///
    /// # Safety
    /// Row and head exist, `value` is `[D]`, and no other thread writes this head of this row.
    unsafe fn store(&self, row: usize, head: usize, value: &[f32]) {
        let d = self.params.head_dim;
        // SAFETY: the place lies in `out`; the caller vouches for exclusive access.
        unsafe {
            let to = self.out.get().add((row * self.params.num_heads + head) * d);
            to.copy_from_nonoverlapping(value.as_ptr(), d);
        }
    }
}

/// `(work, unit, scratch)`.
pub(crate) type AttentionUnit = unsafe fn(&Work<'_>, &Unit, &mut Vec<f32>);

pub(crate) static VARIANTS: &[Variant<AttentionUnit>] = &[
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx2, run: avx2::unit },
    Variant { isa: Isa::Scalar, run: scalar::unit },
];

/// The best variant that needs no more than `limit`.
pub(crate) fn best(limit: Isa) -> AttentionUnit {
    choose(VARIANTS, limit)
}

/// Memory that an attention call works in, kept from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    units: Vec<Unit>,
    per_worker: Vec<Vec<f32>>,
}

/// `out[t, h] = Σ_p softmax_p(scale · q[t, h] · k[p, h / (H / K)]) · v[p, h / (H / K)]` over the positions `p` that row `t` sees:
/// those of its own sequence up to its own, and within the window if there is one. Sums are in f32; variants agree to 1e-5
/// relative to the largest output.
///
/// The caller has checked shapes, slots and block tables.
pub(crate) fn run(variant: AttentionUnit, work: &Work<'_>, scratch: &mut Scratch, pool: &ThreadPool) {
    let group = work.params.num_heads / work.params.num_kv_heads;
    let rows_per_unit = (QUERIES_PER_UNIT / group).max(1);
    scratch.units.clear();
    for (index, sequence) in work.batch.sequences.iter().enumerate() {
        let end = sequence.first_row + sequence.num_rows;
        for first in (sequence.first_row..end).step_by(rows_per_unit) {
            let rows = first..end.min(first + rows_per_unit);
            scratch.units.extend((0..work.params.num_kv_heads).map(|kv_head| Unit {
                sequence: index,
                kv_head,
                rows: rows.clone(),
            }));
        }
    }
    scratch.per_worker.resize_with(pool.num_threads(), Vec::new);
    let per_worker = SendPtr(scratch.per_worker.as_mut_ptr());
    let units = &scratch.units;
    pool.run(units.len(), &|task, worker| {
        // SAFETY: no two tasks run as the same worker at once, and there is an element for each worker.
        let scratch = unsafe { &mut *per_worker.get().add(worker) };
        // SAFETY: the variant was chosen for this machine; units are disjoint in rows and heads.
        unsafe { variant(work, &units[task], scratch) };
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::supported;
    use crate::cpu::math::tests::noise;
    use crate::cpu::pool::PoolConfig;
    use crate::{DType, KvCacheSpec, SequenceRows};
    use proptest::prelude::*;

    struct Case {
        params: AttentionParams,
        batch: PagedBatch,
        cache: CpuKvCache,
        qkv: Vec<f32>,
    }

    impl Case {
        /// Sequences `(context_len, num_rows)` over blocks in a shuffled order, with a cache full of noise.
        fn new(
            params: AttentionParams,
            block_size: usize,
            dtype: DType,
            sequences: &[(usize, usize)],
            seed: u64,
        ) -> Self {
            let mut batch = PagedBatch::default();
            let total: usize = sequences.iter().map(|(context, _)| context.div_ceil(block_size)).sum();
            let mut blocks: Vec<u32> = (0..total as u32).collect();
            for (i, pick) in noise(total, seed).iter().enumerate() {
                blocks.swap(i, ((pick + 1.0) * 0.5 * total as f32) as usize % total);
            }
            for &(context_len, num_rows) in sequences {
                batch.sequences.push(SequenceRows {
                    first_row: batch.positions.len(),
                    num_rows,
                    context_len,
                    first_block: batch.block_table.len(),
                    num_blocks: context_len.div_ceil(block_size),
                });
                batch.block_table.extend(blocks.drain(..context_len.div_ceil(block_size)));
                batch.positions.extend((context_len - num_rows..context_len).map(|p| p as u32));
            }
            let spec = KvCacheSpec {
                num_layers: 2,
                num_blocks: total,
                block_size,
                num_kv_heads: params.num_kv_heads,
                head_dim: params.head_dim,
                dtype,
            };
            let mut cache = CpuKvCache::new(&spec).unwrap();
            let d = params.head_dim;
            let values = noise(2 * total * block_size * params.num_kv_heads * d, seed ^ 1);
            let writer = cache.writer();
            for (i, pair) in values.chunks_exact(2 * d).enumerate() {
                let (slot, head) = (i / params.num_kv_heads, i % params.num_kv_heads);
                // SAFETY: one thread; slot and head exist.
                unsafe { writer.store(1, slot, head, &pair[..d], &pair[d..]) };
            }
            let stride = (params.num_heads + 2 * params.num_kv_heads) * d;
            let qkv = noise(batch.positions.len() * stride, seed ^ 2);
            Self { params, batch, cache, qkv }
        }

        fn run(&self, variant: AttentionUnit, pool: &ThreadPool) -> Vec<f32> {
            let mut out = vec![f32::NAN; self.batch.positions.len() * self.params.num_heads * self.params.head_dim];
            let work = Work {
                params: &self.params,
                batch: &self.batch,
                cache: &self.cache,
                layer: 1,
                qkv: &self.qkv,
                out: SendPtr(out.as_mut_ptr()),
            };
            run(variant, &work, &mut Scratch::default(), pool);
            out
        }
    }

    fn params(num_kv_heads: usize, group: usize, head_dim: usize, window: Option<usize>) -> AttentionParams {
        let scale = (head_dim as f32).powf(-0.5) * 3.0;
        AttentionParams { num_heads: num_kv_heads * group, num_kv_heads, head_dim, scale, window }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn every_variant_agrees_with_scalar(
            kv_heads in 1usize..3, group in 1usize..9, head_dim in 1usize..70, window in 0usize..60,
            sequences in prop::collection::vec((1usize..150, 1usize..40), 1..4), block in 0usize..4, which in 0usize..3,
            seed: u64,
        ) {
            let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
            let sequences: Vec<_> = sequences.iter().map(|&(context, rows)| (context, rows.min(context))).collect();
            let params = params(kv_heads, group, head_dim, (window > 0).then_some(window));
            let dtype = [DType::F32, DType::F16, DType::BF16][which];
            let case = Case::new(params, [16, 32, 64, 128][block], dtype, &sequences, seed);
            let want = case.run(scalar::unit, &pool);
            for v in supported(VARIANTS) {
                for (i, (out, want)) in case.run(v.run, &pool).iter().zip(&want).enumerate() {
                    prop_assert!((out - want).abs() <= 1e-5, "{:?} at {i}: {out}, {want}", v.isa);
                }
            }
        }
    }

    #[test]
    fn published_head_sizes_agree_with_scalar() {
        let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
        for (head_dim, group) in [(64, 7), (80, 1), (96, 4), (128, 6), (192, 2), (256, 16)] {
            let case = Case::new(params(1, group, head_dim, None), 32, DType::F32, &[(130, 3), (65, 1)], 7);
            let want = case.run(scalar::unit, &pool);
            for v in supported(VARIANTS) {
                for (out, want) in case.run(v.run, &pool).iter().zip(&want) {
                    assert!((out - want).abs() <= 1e-5, "{:?} head size {head_dim}: {out}, {want}", v.isa);
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_a_chunk() {
        let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
        for window in [None, Some(50)] {
            let whole = Case::new(params(2, 3, 20, window), 16, DType::F32, &[(150, 150)], 5);
            for v in supported(VARIANTS) {
                let want = whole.run(v.run, &pool);
                for position in [0, 1, 15, 63, 64, 100, 149] {
                    let stride = whole.qkv.len() / 150;
                    let batch = PagedBatch {
                        positions: vec![position as u32],
                        slots: Vec::new(),
                        sequences: vec![SequenceRows {
                            first_row: 0,
                            num_rows: 1,
                            context_len: position + 1,
                            first_block: 0,
                            num_blocks: 10,
                        }],
                        block_table: whole.batch.block_table.clone(),
                    };
                    let qkv = whole.qkv[position * stride..][..stride].to_vec();
                    let cache = Case::new(params(2, 3, 20, window), 16, DType::F32, &[(150, 150)], 5).cache;
                    let alone = Case { params: whole.params, batch, cache, qkv }.run(v.run, &pool);
                    assert_eq!(alone, want[position * alone.len()..][..alone.len()], "{:?} {position}", v.isa);
                }
            }
        }
    }
}
