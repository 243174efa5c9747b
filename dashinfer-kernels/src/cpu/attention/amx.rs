//! AMX: tiles of eight queries by 16 positions, and by 16 features of values, for caches of bf16; other caches take AVX-512.
//!
//! Tiles multiply bf16, and queries and weights are f32. Each is two bf16 values, the nearest one and the nearest to what that leaves out,
//! in two rows of a tile whose sums are added: together they are off by 2^−17 of the value. So a tile of 16 rows is one of eight queries.
//!
//! The cache stands in rows of tiles, pairs of steps beside each other, and is multiplied where it is; only what ends within a tile is copied
//! first. Positions that a query does not see have the weight zero, which leaves sums as they are; so a sum goes through the pairs of
//! its range in their order, whatever else is in the unit.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::amx::{ROW_BYTES, ROWS, Step, multiply_four, with_four};
use super::super::math::{exp2_16, soft_cap};
use super::cache::{GROUP, Side};
use super::{Partial, RANGE, Span, avx512};
use crate::{CacheLayout, CacheType};

/// Queries of a tile.
const QUERIES: usize = ROWS / 2;
/// Features or positions of a step of a product: two for each row of a tile.
const STEP: usize = 2 * ROWS;
/// Bytes of a tile.
const TILE_BYTES: usize = ROWS * ROW_BYTES;
/// Groups of columns that are multiplied together.
const GROUPS: usize = 4;
/// Bytes of a query's weights, in one half.
const WEIGHT_BYTES: usize = RANGE * 2;

/// A tile's sums by some groups.
type Sums = [[[f32; GROUP]; ROWS]; GROUPS];

/// See [`AttentionRange`](super::AttentionRange).
///
/// # Safety
/// As there; the machine has AMX, and AVX-512 with BF16.
pub(super) unsafe fn range(span: &Span<'_>, scratch: &mut Vec<f32>, partial: &mut Partial<'_>) {
    let spec = span.work.cache.spec();
    // SAFETY: the caller's promise, passed on; who has AMX here has AVX-512.
    unsafe {
        if spec.cache_type == CacheType::BF16 && spec.layout == CacheLayout::KeysAndValues {
            let rows = 2 * partial.num_queries().min(QUERIES);
            with_four(rows, || range_of_tiles(span, scratch, partial));
        } else {
            avx512::range(span, scratch, partial);
        }
    }
}

/// Where things of a range stand in the memory that it works in; all but the scores are tiles, or rows of tiles.
struct Room<'a> {
    /// `[tiles][2 · queries of a tile][padded width]`: the larger halves of a tile's queries, then the smaller ones.
    queries: &'a mut [u8],
    /// `[Q][RANGE]`
    scores: &'a mut [[f32; RANGE]],
    /// `[tiles][2 · queries of a tile][RANGE]`, as the queries.
    weights: &'a mut [u8],
    /// `[GROUPS][steps over positions][16][64 bytes]`: copies of what is not in the cache as a tile.
    copies: &'a mut [u8],
}

impl<'a> Room<'a> {
    fn new(scratch: &'a mut Vec<f32>, queries: usize, width: usize) -> Self {
        let rows = queries.div_ceil(QUERIES) * ROWS;
        let bytes = [
            rows * width.div_ceil(STEP) * ROW_BYTES,
            queries * RANGE * size_of::<f32>(),
            rows * WEIGHT_BYTES,
            GROUPS * (RANGE / STEP) * TILE_BYTES,
        ];
        // Rows of tiles are cache lines.
        let len = bytes.iter().sum::<usize>() + ROW_BYTES;
        scratch.resize(scratch.len().max(len / size_of::<f32>()), 0.0);
        let memory: &mut [u8] = bytemuck::cast_slice_mut(scratch);
        let start = memory.as_ptr().align_offset(ROW_BYTES);
        let mut rest = &mut memory[start..];
        let mut next = |bytes| rest.split_off_mut(..bytes).expect("there is room for all of them");
        let [queries, scores, weights, copies] = bytes.map(&mut next);
        Self { queries, scores: bytemuck::cast_slice_mut(scores), weights, copies }
    }
}

/// # Safety
/// As for [`range`]; the cache is one of keys and values in bf16; this thread's tiles have the shapes that are set up there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn range_of_tiles(span: &Span<'_>, scratch: &mut Vec<f32>, partial: &mut Partial<'_>) {
    let (rows, group) = (span.unit.rows.clone(), span.unit.heads.len());
    let (queries, width) = (partial.num_queries(), partial.width());
    let mut room = Room::new(scratch, queries, width);
    let tiles = Tiles { queries, of_tile: queries.min(QUERIES) };
    // Rows see ranges that only move up.
    let any = span.seen(rows.start).start..span.seen(rows.end - 1).end;

    // SAFETY: in all calls: the room was made for these queries and this width, positions up to `any.end` have blocks, and the
    // tiles have the shapes that the caller set up.
    unsafe {
        split_queries(span.queries, &tiles, width, room.queries);
        score(span, any.clone(), &tiles, &mut room);
    }
    for (query, scores) in room.scores.iter_mut().enumerate() {
        let seen = span.seen(rows.start + query / group);
        let halves = tiles.rows(query).map(|row| row * WEIGHT_BYTES);
        if seen.is_empty() {
            partial.max[query] = f32::NEG_INFINITY;
            halves.into_iter().for_each(|at| room.weights[at..][..WEIGHT_BYTES].fill(0));
            continue;
        }
        if let Some(cap) = span.work.soft_cap() {
            soft_cap(&mut scores[seen.clone()], cap);
        }
        let weights = room.weights.as_mut_ptr();
        // SAFETY: two rows of weights, as long as a range.
        (partial.max[query], partial.sum[query]) =
            unsafe { soften(scores, seen, any.clone(), halves.map(|at| weights.add(at))) };
    }
    // SAFETY: as above.
    unsafe { add_values(span, any, &tiles, &mut room, partial) };
}

/// How queries are spread over tiles.
struct Tiles {
    queries: usize,
    of_tile: usize,
}

impl Tiles {
    fn count(&self) -> usize {
        self.queries.div_ceil(QUERIES)
    }

    /// The first row of a tile, counted through all tiles.
    fn first_row(&self, tile: usize) -> usize {
        tile * 2 * self.of_tile
    }

    /// The rows of a query's halves, counted through all tiles.
    fn rows(&self, query: usize) -> [usize; 2] {
        let first = self.first_row(query / QUERIES) + query % QUERIES;
        [first, first + self.of_tile]
    }

    /// For each tile, sets its sums by some groups to those of `steps`, whose rows of `x` are `x_stride` bytes long, and calls
    /// `store(query, group, sums)` for its queries and the first `groups` of these groups.
    ///
    /// # Safety
    /// This thread's tiles are set up for these queries, `x` holds the rows of all tiles, and the steps lie within them; their right sides
    /// can be read.
    #[inline(always)]
    unsafe fn multiply(
        &self,
        steps: &[Step],
        x: &[u8],
        x_stride: usize,
        groups: usize,
        mut store: impl FnMut(usize, usize, [f32; GROUP]),
    ) {
        let mut sums: Sums = [[[0.0; GROUP]; ROWS]; GROUPS];
        for tile in 0..self.count() {
            let x = x[self.first_row(tile) * x_stride..].as_ptr();
            // SAFETY: the caller's promise.
            unsafe { multiply_four(steps, x, x_stride, &mut sums) };
            let first = tile * QUERIES;
            for query in first..self.queries.min(first + QUERIES) {
                for (group, rows) in sums.iter().enumerate().take(groups) {
                    let (large, small) = (&rows[query - first], &rows[query - first + self.of_tile]);
                    store(query, group, std::array::from_fn(|i| large[i] + small[i]));
                }
            }
        }
    }
}

/// Writes queries, `[Q, width]`, as rows of tiles.
///
/// # Safety
/// The machine has AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn split_queries(queries: &[f32], tiles: &Tiles, width: usize, to: &mut [u8]) {
    let row_bytes = width.div_ceil(STEP) * ROW_BYTES;
    for (query, values) in queries.chunks_exact(width).enumerate() {
        let [large, small] = tiles.rows(query).map(|row| row * row_bytes);
        for (i, values) in values.chunks_exact(GROUP).enumerate() {
            // SAFETY: there are 16 values, and rows have room for as many as a query's, at `large` and `small`.
            unsafe {
                let halves = split(_mm512_loadu_ps(values.as_ptr()));
                for (at, half) in [large, small].into_iter().zip(halves) {
                    _mm256_storeu_si256(to[at + i * 2 * GROUP..][..2 * GROUP].as_mut_ptr().cast(), half);
                }
            }
        }
        if !width.is_multiple_of(STEP) {
            [large, small].into_iter().for_each(|at| to[at + width * 2..][..2 * GROUP].fill(0));
        }
    }
}

/// The nearest bf16 of each value, and the nearest of what it leaves out.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn split(x: __m512) -> [__m256i; 2] {
    // SAFETY: both are 256 bits without any meaning.
    let bits = |half: __m256bh| unsafe { std::mem::transmute::<__m256bh, __m256i>(half) };
    let large = _mm512_cvtneps_pbh(x);
    let small = _mm512_cvtneps_pbh(_mm512_sub_ps(x, _mm512_cvtpbh_ps(large)));
    [bits(large), bits(small)]
}

/// `scores[q, j] = q · key[j]` for at least the positions `seen` of the range.
///
/// # Safety
/// As for [`range_of_tiles`]; the room is that of these queries, and the positions have blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn score(span: &Span<'_>, seen: Range<usize>, tiles: &Tiles, room: &mut Room<'_>) {
    let Span { work, unit, .. } = *span;
    let width = work.cache.width();
    let x_stride = width.div_ceil(STEP) * ROW_BYTES;
    let groups = seen.start / GROUP..seen.end.div_ceil(GROUP);
    let mut steps = Vec::new();
    for first in groups.clone().step_by(GROUPS) {
        // Where there are fewer, the last one stands for more.
        let group = |i: usize| (first + i).min(groups.end - 1);
        let run = |side, group: usize| {
            // Groups of 16 positions never cross a block, whose size is a multiple of 16.
            let (block, offset) = work.place(unit, span.start + group * GROUP);
            &work.cache.run(work.layer, side, block, unit.kv_head).codes[offset * width * 2..][..GROUP * width * 2]
        };
        let keys: [&[u8]; GROUPS] = std::array::from_fn(|i| run(Side::Keys, group(i)));
        // The next keys come next, and behind them the values.
        let next = first + GROUPS;
        let next = if next < groups.end { run(Side::Keys, next) } else { run(Side::Values, groups.start) };
        let ahead = distance(keys[0], next);
        steps.clear();
        let whole = width / STEP;
        steps.extend((0..whole).map(|step| Step {
            x: step * ROW_BYTES,
            right: keys.map(|keys| keys[step * TILE_BYTES..].as_ptr()),
            ahead,
        }));
        if !width.is_multiple_of(STEP) {
            let copies = room.copies.as_chunks_mut::<TILE_BYTES>().0;
            for (to, keys) in copies.iter_mut().zip(keys) {
                let rest = &keys[whole * TILE_BYTES..];
                to[..rest.len()].copy_from_slice(rest);
                to[rest.len()..].fill(0);
            }
            let right = std::array::from_fn(|i| copies[i].as_ptr());
            steps.push(Step { x: whole * ROW_BYTES, right, ahead: 0 });
        }
        let (scores, queries) = (&mut room.scores, &*room.queries);
        // SAFETY: the tiles were set up for these queries; whole tiles of the right side are in the cache, or copied.
        unsafe {
            tiles.multiply(&steps, queries, x_stride, groups.end - first, |query, group, sums| {
                scores[query][(first + group) * GROUP..][..GROUP].copy_from_slice(&sums);
            });
        }
    }
}

/// How far `next` is from `from`.
fn distance(from: &[u8], next: &[u8]) -> isize {
    next.as_ptr().addr().wrapping_sub(from.as_ptr().addr()).cast_signed()
}

/// Turns the scores `seen` of a query into weights, in halves at `large` and `small`, zero where `any` query sees a position and this one does
/// not. Returns the largest score and the sum of the weights.
///
/// # Safety
/// The machine has AVX-512 with BF16. `seen` is not empty and lies within `any`, and that within the range; `large` and `small` have room for
/// the weights of a range.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn soften(
    scores: &mut [f32; RANGE],
    seen: Range<usize>,
    any: Range<usize>,
    [large, small]: [*mut u8; 2],
) -> (f32, f32) {
    let used = seen.start / GROUP * GROUP..seen.end.next_multiple_of(GROUP);
    let read = any.start / STEP * STEP..any.end.next_multiple_of(STEP);
    // What is not seen has the weight 2^−∞.
    scores[used.start..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..used.end].fill(f32::NEG_INFINITY);
    // SAFETY: in all loops: 16 scores and as many weights from `at` on lie in the range, whose length is a multiple of 32.
    unsafe {
        let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
        for at in used.clone().step_by(GROUP) {
            max = _mm512_max_ps(max, _mm512_loadu_ps(scores.as_ptr().add(at)));
        }
        let max = _mm512_reduce_max_ps(max);
        let mut sum = _mm512_setzero_ps();
        for at in used.clone().step_by(GROUP) {
            let weight = exp2_16(_mm512_sub_ps(_mm512_loadu_ps(scores.as_ptr().add(at)), _mm512_set1_ps(max)));
            sum = _mm512_add_ps(sum, weight);
            let [high, low] = split(weight);
            _mm256_storeu_si256(large.add(2 * at).cast(), high);
            _mm256_storeu_si256(small.add(2 * at).cast(), low);
        }
        for at in (read.start..used.start).chain(used.end..read.end).step_by(GROUP) {
            _mm256_storeu_si256(large.add(2 * at).cast(), _mm256_setzero_si256());
            _mm256_storeu_si256(small.add(2 * at).cast(), _mm256_setzero_si256());
        }
        (max, _mm512_reduce_add_ps(sum))
    }
}

/// Sets the partial's sums to `Σ_j weight[q, j] · value[j]` over the positions `seen` of the range, in steps from its start.
///
/// # Safety
/// As for [`score`]; the partial is one of these queries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn add_values(
    span: &Span<'_>,
    seen: Range<usize>,
    tiles: &Tiles,
    room: &mut Room<'_>,
    partial: &mut Partial<'_>,
) {
    let Span { work, unit, .. } = *span;
    let (width, block_size) = (work.cache.width(), work.cache.spec().block_size);
    let groups = width / GROUP;
    // The values of a position's block from it on, and from the step before if that shares its place; a group is this far from the next.
    let values = |position: usize| {
        let (block, offset) = work.place(unit, span.start + position);
        let values = work.cache.run(work.layer, Side::Values, block, unit.kv_head).codes;
        &values[offset / 2 * ROW_BYTES..]
    };
    let group_bytes = block_size * GROUP * 2;
    // The next groups are read next, and behind them the keys of the next range.
    let ahead = |first: usize, step: usize| {
        let next = span.start + RANGE + step * STEP;
        if first + GROUPS < groups {
            (GROUPS * group_bytes).cast_signed()
        } else if next < work.batch.sequences[unit.sequence].context_len {
            let run =
                |side, position| work.cache.run(work.layer, side, work.place(unit, position).0, unit.kv_head).codes;
            distance(run(Side::Values, next - RANGE), run(Side::Keys, next))
        } else {
            0
        }
    };
    let mut steps = Vec::new();
    for first in (0..groups).step_by(GROUPS) {
        // Where there are fewer, the last one stands for more.
        let group = |i: usize| (first + i).min(groups - 1);
        steps.clear();
        for step in seen.start / STEP..seen.end.div_ceil(STEP) {
            let positions = step * STEP..(step + 1) * STEP;
            let right = if positions.start >= seen.start && positions.end <= seen.end && block_size >= STEP {
                let values = values(positions.start);
                std::array::from_fn(|i| values[group(i) * group_bytes..].as_ptr())
            } else {
                let copies = &mut room.copies[step * GROUPS * TILE_BYTES..][..GROUPS * TILE_BYTES];
                copies.fill(0);
                let inside = positions.start.max(seen.start) / 2..positions.end.min(seen.end).div_ceil(2);
                for pair in inside {
                    let values = values((2 * pair).max(seen.start));
                    for i in 0..GROUPS {
                        let to = &mut copies[i * TILE_BYTES + pair % ROWS * ROW_BYTES..][..ROW_BYTES];
                        to.copy_from_slice(&values[group(i) * group_bytes..][..ROW_BYTES]);
                        // What nobody sees may be anything, and is not to be multiplied even by zero.
                        if 2 * pair < seen.start {
                            to.chunks_exact_mut(4).for_each(|pair| pair[..2].fill(0));
                        }
                        if 2 * pair + 1 >= seen.end {
                            to.chunks_exact_mut(4).for_each(|pair| pair[2..].fill(0));
                        }
                    }
                }
                std::array::from_fn(|i| copies[i * TILE_BYTES..].as_ptr())
            };
            steps.push(Step { x: step * ROW_BYTES, right, ahead: ahead(first, step) });
        }
        let out = &mut *partial.out;
        // SAFETY: the tiles were set up for these queries; whole tiles of the right side are in the cache, or copied.
        unsafe {
            tiles.multiply(&steps, room.weights, WEIGHT_BYTES, groups - first, |query, group, sums| {
                out[query * width + (first + group) * GROUP..][..GROUP].copy_from_slice(&sums);
            });
        }
    }
}
