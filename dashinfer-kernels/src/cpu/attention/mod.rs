//! Paged attention for prefill chunks and decodes in one call.
//!
//! Positions are cut into ranges of [`RANGE`] at absolute places, and what the ranges give a query is added up in their order.
//! So the order of a row's sums depends on its position alone: not on the chunk or the batch that it came in, nor on the
//! threads. <https://arxiv.org/abs/2205.14135>
//!
//! Work is cut into units of one sequence, one key/value head and some neighbouring rows, whose queries share the keys and
//! values that a unit reads. When there are too few of them for the threads, as in the decode of a long context, each is cut
//! once more, into runs of ranges.

#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod amx;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx2;
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
mod avx512;
#[cfg(any(all(feature = "x86", target_arch = "x86_64"), all(feature = "arm", target_arch = "aarch64")))]
mod blocked;
mod cache;
mod int8;
mod latent;
#[cfg(all(feature = "arm", target_arch = "aarch64"))]
mod neon;
mod partial;
mod scalar;
mod uint4;

use std::ops::Range;

pub use cache::CpuKvCache;
pub use latent::latent_workspace_bytes;
pub(super) use latent::{LatentScratch, LatentWork, run_latent};
use partial::Partial;

use super::isa::{Isa, Variant, choose};
pub(super) use super::linear::SendPtr;
use super::pool::ThreadPool;
use crate::{AttentionParams, CacheLayout, CacheType, PagedBatch, SequenceRows};

/// Positions whose scores are computed, softened and multiplied with values before the next: few enough that their keys and
/// values stay in the L2 cache, many enough that the sums of a range stay in registers for long.
const RANGE: usize = 256;

/// Queries (rows times heads of a group) that a unit aims at: enough to reuse what it reads, few enough that their state
/// stays in the L2 cache.
const QUERIES_PER_UNIT: usize = 48;

/// Units are cut into runs of ranges when there are fewer than this for each thread, into about as many tasks as this.
const UNITS_PER_THREAD: usize = 4;
const TASKS_PER_THREAD: usize = 8;

/// Partials of fewer values than this are added up on one thread.
const PARALLEL_FROM: usize = 1 << 13;

/// The most heads of a unit over latent vectors, which all heads share.
const MOST_SHARING_HEADS: usize = 32;
/// The least, however many threads there are: what is read of the cache is to be used some times.
const LEAST_SHARING_HEADS: usize = 4;

/// Rows of one sequence and query heads of one key/value head.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    sequence: usize,
    kv_head: usize,
    /// All that share the key/value head; of latent vectors, some.
    heads: Range<usize>,
    rows: Range<usize>,
    /// The ranges that any of the rows sees, by number.
    ranges: Range<usize>,
}

/// Some ranges of a unit.
#[derive(Debug, Clone)]
struct Task {
    unit: usize,
    ranges: Range<usize>,
    /// Where what they give is kept among the partials of the call, one range after the other.
    partial: usize,
}

/// One attention call.
pub(crate) struct Work<'a> {
    pub(crate) params: &'a AttentionParams,
    pub(crate) batch: &'a PagedBatch,
    pub(crate) cache: &'a CpuKvCache,
    pub(crate) layer: usize,
    /// The rows of the batch that are computed, which are those of `queries` and `out`.
    pub(crate) rows: Range<usize>,
    /// Rows that start with `H · D` values, `query_stride` apart.
    pub(crate) queries: &'a [f32],
    pub(crate) query_stride: usize,
    /// `[H]`: the score of a position without a value that every row sees, if there is one.
    pub(crate) sinks: Option<&'a [f32]>,
    /// `[rows, H · D]`, with `D` as values have it
    pub(crate) out: SendPtr<f32>,
}

impl Work<'_> {
    /// Query heads of a key/value head.
    fn group(&self) -> usize {
        self.params.num_heads / self.params.num_kv_heads
    }

    fn num_queries(&self, unit: &Unit) -> usize {
        unit.rows.len() * unit.heads.len()
    }

    fn query(&self, row: usize, head: usize) -> &[f32] {
        let d = self.params.head_dim;
        &self.queries[(row - self.rows.start) * self.query_stride + head * d..][..d]
    }

    /// The cap on scores in units of which they are exponents of two.
    fn soft_cap(&self) -> Option<f32> {
        self.params.soft_cap.map(|cap| cap * std::f32::consts::LOG2_E)
    }

    /// The positions that `row` of a sequence sees.
    fn visible(&self, sequence: usize, row: usize) -> Range<usize> {
        let sequence = &self.batch.sequences[sequence];
        let end = sequence.context_len - sequence.num_rows + (row - sequence.first_row) + 1;
        self.params.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// The block of a position, and its place there.
    fn place(&self, unit: &Unit, position: usize) -> (usize, usize) {
        let block_size = self.cache.spec().block_size;
        let table = self.batch.sequences[unit.sequence].first_block;
        (self.batch.block_table[table + position / block_size] as usize, position % block_size)
    }

    /// The queries of a unit, padded with zeros to `[Q, width]`, in units of which scores are exponents of two.
    fn scaled_queries(&self, unit: &Unit, to: &mut Vec<f32>) {
        let width = self.cache.width();
        let scale = self.params.scale * std::f32::consts::LOG2_E;
        to.clear();
        for row in unit.rows.clone() {
            for head in unit.heads.clone() {
                to.extend(self.query(row, head).iter().map(|x| x * scale));
                to.resize(to.len().next_multiple_of(width), 0.0);
            }
        }
    }

    /// Writes the outputs of some queries of a unit.
    ///
    /// # Safety
    /// The unit lies within the work, `sum` holds these queries, and no other thread writes their outputs.
    unsafe fn store(&self, unit: &Unit, queries: Range<usize>, sum: &mut Partial<'_>) {
        let (num_heads, d) = (unit.heads.len(), self.cache.value_dim());
        for (at, query) in queries.enumerate() {
            let (row, head) = (unit.rows.start + query / num_heads, unit.heads.start + query % num_heads);
            let sink = self.sinks.map(|sinks| sinks[head] * std::f32::consts::LOG2_E);
            let value = &mut sum.mean(at, sink)[..d];
            if self.cache.spec().cache_type == CacheType::Uint4 {
                uint4::rotate(value);
            }
            // SAFETY: the place lies in `out`; the caller vouches for exclusive access.
            unsafe {
                let to = self.out.get().add(((row - self.rows.start) * self.params.num_heads + head) * d);
                to.copy_from_nonoverlapping(value.as_ptr(), d);
            }
        }
    }
}

/// A range of positions for the queries of a unit.
pub(crate) struct Span<'a> {
    work: &'a Work<'a>,
    unit: &'a Unit,
    /// The first position, a multiple of [`RANGE`].
    start: usize,
    /// `[Q, width]`, scaled.
    queries: &'a [f32],
}

impl Span<'_> {
    /// The positions of the range that `row` sees, counted from its start.
    fn seen(&self, row: usize) -> Range<usize> {
        let visible = self.work.visible(self.unit.sequence, row);
        let inside = |position: usize| position.clamp(self.start, self.start + RANGE) - self.start;
        inside(visible.start)..inside(visible.end)
    }
}

/// `(span, scratch, partial)`: sets the partial to what the positions of the range give each query.
pub(crate) type AttentionRange = unsafe fn(&Span<'_>, &mut Vec<f32>, &mut Partial<'_>);

pub(crate) static VARIANTS: &[Variant<AttentionRange>] = &[
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Amx, run: amx::range },
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx512, run: avx512::range },
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    Variant { isa: Isa::Avx2, run: avx2::range },
    #[cfg(all(feature = "arm", target_arch = "aarch64"))]
    Variant { isa: Isa::Neon, run: neon::range },
    Variant { isa: Isa::Scalar, run: scalar::range },
];

/// The best variant that needs no more than `limit`.
pub(crate) fn best(limit: Isa) -> AttentionRange {
    choose(VARIANTS, limit)
}

/// Memory that an attention call works in, kept from call to call.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    units: Vec<Unit>,
    tasks: Vec<Task>,
    /// What the ranges of units give that were cut: next to what is read of the cache for it, little.
    partials: Vec<f32>,
    per_worker: Vec<WorkerScratch>,
}

#[derive(Debug, Default)]
struct WorkerScratch {
    queries: Vec<f32>,
    /// The sum of the ranges so far, then what the next one gives.
    partials: Vec<f32>,
    range: Vec<f32>,
}

/// `out[t, h] = Σ_p softmax_p(scale · q[t, h] · k[p, h / (H / K)]) · v[p, h / (H / K)]` over the positions `p` that row `t` sees:
/// those of its own sequence up to its own, and within the window if there is one; with soft caps and sinks as
/// [`Backend::attention`](crate::Backend::attention) says. Sums are in f32; variants agree to 1e-5
/// relative to the largest output, but for AMX over bf16, whose scores are off by up to 2^−17 of `scale · Σ_i |q_i · k_i|`.
///
/// The caller has checked shapes, slots and block tables.
pub(crate) fn run(variant: AttentionRange, work: &Work<'_>, scratch: &mut Scratch, pool: &ThreadPool) {
    let Scratch { units, tasks, partials, per_worker } = scratch;
    plan_units(work, units, pool.num_threads());
    per_worker.resize_with(pool.num_threads(), WorkerScratch::default);
    let per_worker = SendPtr(per_worker.as_mut_ptr());
    // SAFETY: no two tasks run as the same worker at once, and there is an element for each worker.
    let scratch_of = |worker: usize| unsafe { &mut *per_worker.get().add(worker) };
    let width = work.cache.value_width();
    let longest = units.iter().map(|unit| unit.ranges.len()).max().unwrap_or(0);
    if longest <= 1 || pool.num_threads() == 1 || units.len() >= UNITS_PER_THREAD * pool.num_threads() {
        let units = &*units;
        pool.run(units.len(), &|task, worker| {
            let (unit, scratch) = (&units[task], scratch_of(worker));
            let queries = work.num_queries(unit);
            work.scaled_queries(unit, &mut scratch.queries);
            scratch.partials.resize(2 * Partial::len(queries, width), 0.0);
            let (sum, range) = scratch.partials.split_at_mut(Partial::len(queries, width));
            let (mut sum, mut range) = (Partial::new(sum, queries), Partial::new(range, queries));
            sum.clear();
            for start in unit.ranges.clone().map(|number| number * RANGE) {
                let span = Span { work, unit, start, queries: &scratch.queries };
                // SAFETY: the variant was chosen for this machine; the partial is one of this unit's queries.
                unsafe { variant(&span, &mut scratch.range, &mut range) };
                sum.add(&range);
            }
            // SAFETY: units are disjoint in rows and heads.
            unsafe { work.store(unit, 0..queries, &mut sum) };
        });
        return;
    }

    let total: usize = units.iter().map(|unit| unit.ranges.len()).sum();
    let len = plan_tasks(work, units, total.div_ceil(TASKS_PER_THREAD * pool.num_threads()), tasks);
    partials.resize(len, 0.0);
    let start = SendPtr(partials.as_mut_ptr());
    let (units, tasks) = (&*units, &*tasks);
    pool.run(tasks.len(), &|task, worker| {
        let (task, scratch) = (&tasks[task], scratch_of(worker));
        let unit = &units[task.unit];
        let queries = work.num_queries(unit);
        let len = Partial::len(queries, width);
        work.scaled_queries(unit, &mut scratch.queries);
        for (i, number) in task.ranges.clone().enumerate() {
            let span = Span { work, unit, start: number * RANGE, queries: &scratch.queries };
            // SAFETY: the task's place among the partials was made for its ranges, and no other task has it.
            let range = unsafe { std::slice::from_raw_parts_mut(start.get().add(task.partial + i * len), len) };
            // SAFETY: the variant was chosen for this machine; the partial is one of this unit's queries.
            unsafe { variant(&span, &mut scratch.range, &mut Partial::new(range, queries)) };
        }
    });
    // The tasks of a unit follow each other, and so do their partials. Queries are added up apart from each other, so threads share them;
    // each adds in memory of its own, as what queries have in `partials` shares cache lines.
    let total: usize = units.iter().map(|unit| work.num_queries(unit)).sum();
    let per_task = if len < PARALLEL_FROM { total } else { total.div_ceil(2 * pool.num_threads()) };
    pool.run(total.div_ceil(per_task), &|task, worker| {
        let wanted = task * per_task..total.min((task + 1) * per_task);
        let memory = &mut scratch_of(worker).partials;
        let (mut first, mut partial) = (0, 0);
        for unit in units {
            let queries = work.num_queries(unit);
            let len = Partial::len(queries, width);
            let (from, to) = (wanted.start.max(first), wanted.end.min(first + queries));
            if from < to {
                let these = from - first..to - first;
                memory.resize(Partial::len(these.len(), width), 0.0);
                let mut sum = Partial::new(memory, these.len());
                sum.clear();
                // SAFETY: the partials of the unit's ranges were written by the tasks before, and no other thread has these queries.
                let part = |i: usize| unsafe {
                    Partial::of(start.get().add(partial + i * len), queries, width, these.clone())
                };
                (0..unit.ranges.len()).for_each(|i| part(i).fetch());
                (0..unit.ranges.len()).for_each(|i| sum.add(&part(i)));
                // SAFETY: no other thread has these queries.
                unsafe { work.store(unit, these, &mut sum) };
            }
            first += queries;
            partial += unit.ranges.len() * len;
        }
    });
}

/// Heads of a unit: those of a key/value head; of latent vectors, fewer where there would be too few units, even cut, for the threads.
fn heads_per_unit(work: &Work<'_>, num_threads: usize) -> usize {
    let group = work.group();
    if work.cache.spec().layout == CacheLayout::KeysAndValues {
        return group;
    }
    let ranges = |sequence: &SequenceRows| sequence.num_rows * sequence.context_len.div_ceil(RANGE);
    let ranges: usize = work.batch.sequences.iter().map(ranges).sum();
    let parts = (UNITS_PER_THREAD * num_threads).div_ceil(ranges.max(1)).min(group.div_ceil(LEAST_SHARING_HEADS));
    group.div_ceil(parts.max(group.div_ceil(MOST_SHARING_HEADS)))
}

fn plan_units(work: &Work<'_>, units: &mut Vec<Unit>, num_threads: usize) {
    let (group, heads_per_unit) = (work.group(), heads_per_unit(work, num_threads));
    let rows_per_unit = (QUERIES_PER_UNIT / heads_per_unit).max(1);
    units.clear();
    for (index, sequence) in work.batch.sequences.iter().enumerate() {
        let start = sequence.first_row.max(work.rows.start);
        let end = (sequence.first_row + sequence.num_rows).min(work.rows.end);
        for first in (start..end).step_by(rows_per_unit) {
            let rows = first..end.min(first + rows_per_unit);
            // Rows see positions that only move up, so the first row's start and the last row's end bound them all.
            let (start, end) = (work.visible(index, first).start, work.visible(index, rows.end - 1).end);
            for kv_head in 0..work.params.num_kv_heads {
                let heads = kv_head * group..(kv_head + 1) * group;
                units.extend(heads.clone().step_by(heads_per_unit).map(|first| Unit {
                    sequence: index,
                    kv_head,
                    heads: first..heads.end.min(first + heads_per_unit),
                    rows: rows.clone(),
                    ranges: start / RANGE..end.div_ceil(RANGE),
                }));
            }
        }
    }
}

/// Cuts units into tasks of `ranges_per_task` ranges, and returns how long their partials are together.
fn plan_tasks(work: &Work<'_>, units: &[Unit], ranges_per_task: usize, tasks: &mut Vec<Task>) -> usize {
    let mut partial = 0;
    tasks.clear();
    for (index, unit) in units.iter().enumerate() {
        let len = Partial::len(work.num_queries(unit), work.cache.value_width());
        for first in unit.ranges.clone().step_by(ranges_per_task) {
            let ranges = first..unit.ranges.end.min(first + ranges_per_task);
            let used = ranges.len() * len;
            tasks.push(Task { unit: index, ranges, partial });
            partial += used;
        }
    }
    partial
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvCacheSpec;
    use crate::cpu::isa::supported;
    use crate::cpu::math::tests::noise;
    use crate::cpu::pool::PoolConfig;
    use proptest::prelude::*;
    use std::num::NonZeroUsize;

    struct Case {
        params: AttentionParams,
        batch: PagedBatch,
        cache: CpuKvCache,
        qkv: Vec<f32>,
        sinks: Option<Vec<f32>>,
    }

    impl Case {
        /// Sequences `(context_len, num_rows)` over blocks in a shuffled order, with a cache full of noise.
        fn new(
            params: AttentionParams,
            block_size: usize,
            cache_type: CacheType,
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
                cache_type,
                layout: CacheLayout::KeysAndValues,
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
            Self { params, batch, cache, qkv, sinks: None }
        }

        fn run(&self, variant: AttentionRange, pool: &ThreadPool) -> Vec<f32> {
            self.run_batch(&self.batch, &self.qkv, variant, pool)
        }

        /// Runs other rows over the same cache.
        fn run_batch(&self, batch: &PagedBatch, qkv: &[f32], variant: AttentionRange, pool: &ThreadPool) -> Vec<f32> {
            let mut out = vec![f32::NAN; batch.positions.len() * self.params.num_heads * self.params.head_dim];
            let (sinks, out_ptr) = (self.sinks.as_deref(), SendPtr(out.as_mut_ptr()));
            let work = Work {
                params: &self.params,
                batch,
                cache: &self.cache,
                layer: 1,
                rows: 0..batch.positions.len(),
                queries: qkv,
                query_stride: (self.params.num_heads + 2 * self.params.num_kv_heads) * self.params.head_dim,
                sinks,
                out: out_ptr,
            };
            run(variant, &work, &mut Scratch::default(), pool);
            out
        }
    }

    fn params(num_kv_heads: usize, group: usize, head_dim: usize, window: Option<usize>) -> AttentionParams {
        let scale = (head_dim as f32).powf(-0.5) * 3.0;
        AttentionParams { num_heads: num_kv_heads * group, num_kv_heads, head_dim, scale, window, soft_cap: None }
    }

    proptest! {
        #![proptest_config(crate::random::cases(32))]

        #[test]
        fn every_variant_agrees_with_scalar(
            kv_heads in 1usize..3, group in 1usize..9, head_dim in 1usize..70,
            window in prop_oneof![Just(0usize), 1usize..60, 200usize..400],
            cap in prop_oneof![Just(None), (0.5f32..20.0).prop_map(Some)], sinks: bool,
            sequences in prop::collection::vec((prop_oneof![1usize..150, 200usize..500], 1usize..12), 1..4), block in 0usize..4, which in 0usize..5,
            seed: u64,
        ) {
            let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
            let sequences: Vec<_> = sequences.iter().map(|&(context, rows)| (context, rows.min(context))).collect();
            let params = AttentionParams { soft_cap: cap, ..params(kv_heads, group, head_dim, (window > 0).then_some(window)) };
            let cache_type = CacheType::ALL[which];
            let mut case = Case::new(params, [16, 32, 64, 128][block], cache_type, &sequences, seed);
            case.sinks = sinks.then(|| noise(params.num_heads, seed ^ 3));
            let want = case.run(scalar::range, &pool);
            for v in supported(VARIANTS) {
                for (i, (out, want)) in case.run(v.run, &pool).iter().zip(&want).enumerate() {
                    prop_assert!((out - want).abs() <= 1e-5, "{:?} at {i}: {out}, {want}", v.isa);
                }
            }
        }
    }

    /// A position with a key of zero has the score 0, and one with a value of zero adds nothing: what a sink of 0 is.
    #[test]
    fn a_sink_takes_its_share() {
        let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
        let mut case = Case::new(params(1, 2, 16, None), 16, CacheType::F32, &[(40, 3)], 11);
        let plain = case.run(best(Isa::best()), &pool);
        case.sinks = Some(vec![0.0, f32::NEG_INFINITY]);
        let found = case.run(best(Isa::best()), &pool);
        for (row, (found, plain)) in found.chunks_exact(32).zip(plain.chunks_exact(32)).enumerate() {
            assert_eq!(found[16..], plain[16..], "the second head's sink is far below");
            // All values shrink by one factor, the share of what is seen.
            let share = found[0] / plain[0];
            assert!(share > 0.5 && share < 0.999, "{share}");
            for (found, plain) in found[..16].iter().zip(plain) {
                assert!((found - share * plain).abs() < 1e-5, "row {row}: {found}, {plain}");
            }
        }
        case.sinks = Some(vec![1e4; 2]);
        assert!(case.run(best(Isa::best()), &pool).iter().all(|x| *x == 0.0), "a sink far above takes all");
    }

    #[test]
    fn published_head_sizes_agree_with_scalar() {
        let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
        let sizes = [(64, 7), (80, 1), (96, 4), (128, 6), (192, 2), (256, 16)];
        for ((head_dim, group), cache_type) in
            sizes.into_iter().flat_map(|size| [(size, CacheType::F32), (size, CacheType::BF16)])
        {
            let case = Case::new(params(1, group, head_dim, None), 32, cache_type, &[(130, 3), (65, 1)], 7);
            let want = case.run(scalar::range, &pool);
            for v in supported(VARIANTS) {
                for (out, want) in case.run(v.run, &pool).iter().zip(&want) {
                    assert!((out - want).abs() <= 1e-5, "{:?} head size {head_dim}: {out}, {want}", v.isa);
                }
            }
        }
    }

    /// Decodes and chunks of one sequence, with and without units cut for more threads: a row is the same.
    #[test]
    fn a_row_has_the_same_bits_alone_and_in_a_chunk() {
        const LEN: usize = 600;
        let one = ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(1), cores: Vec::new() }).unwrap();
        let three = ThreadPool::new(&PoolConfig { threads: NonZeroUsize::new(3), cores: Vec::new() }).unwrap();
        // The second: tiles in place, half a tile of features, and a last tile of queries that is not full.
        for ((params_of, block_size), cache_type) in CacheType::ALL
            .into_iter()
            .flat_map(|cache_type| [(((2, 2, 12), 16), cache_type), (((1, 3, 40), 64), cache_type)])
        {
            for window in [None, Some(50), Some(300)] {
                let (kv_heads, group, head_dim) = params_of;
                let params = params(kv_heads, group, head_dim, window);
                let whole = Case::new(params, block_size, cache_type, &[(LEN, LEN)], 5);
                // The definition computes each query by itself, whatever is stored, and takes its time.
                let one_is_enough = |isa| isa == Isa::Scalar && cache_type != CacheType::F32;
                for v in supported(VARIANTS).into_iter().filter(|v| !one_is_enough(v.isa)) {
                    let want = whole.run(v.run, &one);
                    for (position, rows) in [(0, 1), (1, 1), (63, 1), (255, 1), (256, 2), (300, 40), (511, 2), (599, 1)]
                    {
                        let stride = whole.qkv.len() / LEN;
                        let mut batch =
                            PagedBatch { block_table: whole.batch.block_table.clone(), ..PagedBatch::default() };
                        let rows = rows.min(LEN - position);
                        batch.positions = (position..position + rows).map(|position| position as u32).collect();
                        batch.sequences = vec![SequenceRows {
                            first_row: 0,
                            num_rows: rows,
                            context_len: position + rows,
                            first_block: 0,
                            num_blocks: LEN.div_ceil(block_size),
                        }];
                        let qkv = &whole.qkv[position * stride..][..rows * stride];
                        for pool in [&one, &three] {
                            let found = whole.run_batch(&batch, qkv, v.run, pool);
                            let want = &want[position * found.len() / rows..][..found.len()];
                            assert_eq!(found, want, "{:?}, {cache_type}, {rows} from {position}", v.isa);
                        }
                    }
                }
            }
        }
    }

    /// What a request left in a block, or has not yet written there, is nothing to another.
    #[test]
    fn what_no_row_sees_may_be_anything() {
        let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
        // (context, rows, window): an odd end, and an odd first position.
        for (context, rows, window) in [(37, 1, None), (301, 3, None), (300, 1, Some(77)), (290, 2, Some(20))] {
            let types = [CacheType::F32, CacheType::F16, CacheType::BF16];
            let shapes = [(24, 32_usize), (40, 16)];
            for (cache_type, (head_dim, block_size)) in types.into_iter().flat_map(|t| shapes.map(|shape| (t, shape))) {
                let params = params(1, 3, head_dim, window);
                let mut case = Case::new(params, block_size, cache_type, &[(context, rows)], 13);
                let want: Vec<_> = supported(VARIANTS).iter().map(|v| case.run(v.run, &pool)).collect();
                let first = window.map_or(0, |window| context + 1 - rows - window);
                let writer = case.cache.writer();
                let nan = vec![f32::NAN; head_dim];
                for position in (0..first).chain(context..context.next_multiple_of(block_size)) {
                    let block = case.batch.block_table[position / block_size] as usize;
                    // SAFETY: one thread; slot and head exist.
                    unsafe { writer.store(1, block * block_size + position % block_size, 0, &nan, &nan) };
                }
                for (v, want) in supported(VARIANTS).iter().zip(&want) {
                    assert_eq!(
                        &case.run(v.run, &pool),
                        want,
                        "{:?}, {cache_type}, {context}, {window:?}, {head_dim}",
                        v.isa
                    );
                }
            }
        }
    }

    /// Fast variants agree with the scalar one on what is stored; this is what that is off by.
    #[test]
    fn a_smaller_cache_is_off_by_little() {
        let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
        let run = |cache_type| {
            let case = Case::new(params(2, 7, 64, None), 32, cache_type, &[(700, 30)], 3);
            case.run(best(Isa::best()), &pool)
        };
        let exact = run(CacheType::F32);
        // Keys and values lie within 1, so a rounding of theirs is at most half a step: 2^-12, 2^-9, 1/254, and 1/15 of a
        // value's length of 5 for uint4. Means of many are off by much less, weights by the steps of keys times |q| of 14.
        for (cache_type, bound) in
            [(CacheType::F16, 0.0005), (CacheType::BF16, 0.004), (CacheType::Int8, 0.004), (CacheType::Uint4, 0.1)]
        {
            let worst = run(cache_type).iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= bound && worst > 0.0, "{cache_type}: off by {worst}");
        }
    }
}
