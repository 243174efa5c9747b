//! AMX: tiles of eight queries by 16 positions, and by 16 features of values, for caches of bf16; other caches take AVX-512.
//!
//! Tiles multiply bf16, and queries and weights are f32. Each is two bf16 values, the nearest one and the nearest to what that leaves out,
//! in two rows of a tile whose sums are added: together they are off by 2^−17 of the value. So a tile of 16 rows is one of eight queries.
//!
//! The cache stands in rows of tiles, pairs of steps beside each other, and is multiplied where it is; only what ends within a tile is copied
//! first. Positions that a query does not see have the weight zero, which leaves sums as they are, as long as values are finite; so a sum goes
//! through the pairs of its range in their order, whatever else is in the unit.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::amx::{FourSums, ROW_BYTES, ROWS, Step, multiply_four, with_four};
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

/// See [`blocked::range`](super::blocked::range).
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
    /// `[steps over positions][GROUPS][16][64 bytes]`: copies of what is not in the cache as a tile.
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
    let tiles = QueryTiles { queries, of_tile: queries.min(QUERIES) };
    let mut steps = Vec::with_capacity(width.div_ceil(STEP).max(RANGE / STEP));
    // Rows see ranges that only move up.
    let any = span.seen(rows.start).start..span.seen(rows.end - 1).end;

    // SAFETY: in all calls: the room was made for these queries and this width, positions up to `any.end` have blocks, and the
    // tiles have the shapes that the caller set up.
    unsafe {
        split_queries(span.queries, &tiles, width, room.queries);
        score(span, &any, &tiles, &mut room, &mut steps);
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
    unsafe { add_values(span, &any, &tiles, &mut room, &mut steps, partial) };
}

/// How queries are spread over tiles.
struct QueryTiles {
    queries: usize,
    of_tile: usize,
}

impl QueryTiles {
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
        let mut sums = FourSums([[[0.0; GROUP]; ROWS]; GROUPS]);
        for tile in 0..self.count() {
            let x = x[self.first_row(tile) * x_stride..].as_ptr();
            // SAFETY: the caller's promise.
            unsafe { multiply_four(steps, x, x_stride, &mut sums) };
            let first = tile * QUERIES;
            for query in first..self.queries.min(first + QUERIES) {
                for (group, rows) in sums.0.iter().enumerate().take(groups) {
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
unsafe fn split_queries(queries: &[f32], tiles: &QueryTiles, width: usize, to: &mut [u8]) {
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

/// The keys of four groups of positions, from the range's group `first` on, as far as there are any before `end`; the last one stands for more. Each starts
/// with its whole tiles.
fn keys_at<'a>(span: &Span<'a>, first: usize, end: usize) -> [&'a [u8]; GROUPS] {
    let Span { work, unit, .. } = *span;
    let bytes = GROUP * work.cache.width() * 2;
    std::array::from_fn(|i| {
        // Groups of 16 positions never cross a block, whose size is a multiple of 16.
        let (block, offset) = work.place(unit, span.start + (first + i).min(end - 1) * GROUP);
        &work.cache.run(work.layer, Side::Keys, block, unit.kv_head).codes[offset / GROUP * bytes..][..bytes]
    })
}

/// The tiles of four groups of values, from `first` on, at step `step` of the range, if they are whole and seen. The last group stands for more.
fn values_at(span: &Span<'_>, seen: &Range<usize>, step: usize, first: usize) -> Option<[*const u8; GROUPS]> {
    let Span { work, unit, .. } = *span;
    let (block_size, groups) = (work.cache.spec().block_size, work.cache.width() / GROUP);
    let positions = step * STEP..(step + 1) * STEP;
    if positions.start < seen.start || positions.end > seen.end || !block_size.is_multiple_of(STEP) {
        return None;
    }
    let (block, offset) = work.place(unit, span.start + positions.start);
    let values = work.cache.run(work.layer, Side::Values, block, unit.kv_head).codes;
    let at = |group: usize| (group * block_size + offset) * GROUP * 2;
    Some(std::array::from_fn(|i| values[at((first + i).min(groups - 1))..][..TILE_BYTES].as_ptr()))
}

/// `scores[q, j] = q · key[j]` for at least the positions `seen` of the range. `steps` is memory to work in.
///
/// # Safety
/// As for [`range_of_tiles`]; the room is that of these queries, and the positions have blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn score(span: &Span<'_>, seen: &Range<usize>, tiles: &QueryTiles, room: &mut Room<'_>, steps: &mut Vec<Step>) {
    let width = span.work.cache.width();
    let (whole, x_stride) = (width / STEP, width.div_ceil(STEP) * ROW_BYTES);
    let groups = seen.start / GROUP..seen.end.div_ceil(GROUP);
    let mut next = keys_at(span, groups.start, groups.end);
    for first in groups.clone().step_by(GROUPS) {
        let (keys, behind) = (next, first + GROUPS);
        if behind < groups.end {
            next = keys_at(span, behind, groups.end);
        }
        steps.clear();
        steps.extend((0..whole).map(|step| {
            let tiles = |keys: [&[u8]; GROUPS]| keys.map(|keys| keys[step * TILE_BYTES..].as_ptr());
            // The next keys come next, and behind them the values.
            let values = || values_at(span, seen, seen.start / STEP + step, 0).unwrap_or_else(|| tiles(keys));
            let ahead = if behind < groups.end { tiles(next) } else { values() };
            Step { x: step * ROW_BYTES, right: tiles(keys), ahead }
        }));
        if !width.is_multiple_of(STEP) {
            let copies = room.copies.as_chunks_mut::<TILE_BYTES>().0;
            let mut right = [std::ptr::null(); GROUPS];
            for ((right, copy), keys) in right.iter_mut().zip(copies).zip(keys) {
                let rest = &keys[whole * TILE_BYTES..];
                copy[..rest.len()].copy_from_slice(rest);
                copy[rest.len()..].fill(0);
                *right = copy.as_ptr();
            }
            steps.push(Step { x: whole * ROW_BYTES, right, ahead: right });
        }
        let (scores, queries) = (&mut room.scores, &*room.queries);
        // SAFETY: the tiles were set up for these queries; whole tiles of the right side are in the cache, or copied.
        unsafe {
            tiles.multiply(steps, queries, x_stride, groups.end - first, |query, group, sums| {
                scores[query][(first + group) * GROUP..][..GROUP].copy_from_slice(&sums);
            });
        }
    }
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

/// Sets the partial's sums to `Σ_j weight[q, j] · value[j]` over the positions `seen` of the range, in steps from its start. `steps` is memory
/// to work in.
///
/// # Safety
/// As for [`score`]; the partial is one of these queries.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn add_values(
    span: &Span<'_>,
    seen: &Range<usize>,
    tiles: &QueryTiles,
    room: &mut Room<'_>,
    steps: &mut Vec<Step>,
    partial: &mut Partial<'_>,
) {
    let (width, context_len) = (span.work.cache.width(), span.work.batch.sequences[span.unit.sequence].context_len);
    let (groups, whole) = (width / GROUP, (width / STEP).max(1));
    let next = Span { start: span.start + RANGE, ..*span };
    for first in (0..groups).step_by(GROUPS) {
        steps.clear();
        let copies = room.copies.chunks_exact_mut(GROUPS * TILE_BYTES);
        for (at, (step, copies)) in (seen.start / STEP..seen.end.div_ceil(STEP)).zip(copies).enumerate() {
            let right =
                values_at(span, seen, step, first).unwrap_or_else(|| copy_values(span, seen, step, first, copies));
            // The next groups are read next, and behind them the keys of the next range.
            let keys = at / whole * GROUPS;
            let ahead = if first + GROUPS < groups {
                values_at(span, seen, step, first + GROUPS)
            } else if next.start + keys * GROUP < context_len {
                let keys = keys_at(&next, keys, (context_len - next.start).div_ceil(GROUP));
                Some(keys.map(|keys| keys[at % whole * TILE_BYTES..].as_ptr()))
            } else {
                None
            };
            steps.push(Step { x: step * ROW_BYTES, right, ahead: ahead.unwrap_or(right) });
        }
        let out = &mut *partial.out;
        // SAFETY: the tiles were set up for these queries; whole tiles of the right side are in the cache, or copied.
        unsafe {
            tiles.multiply(steps, room.weights, WEIGHT_BYTES, groups - first, |query, group, sums| {
                out[query * width + (first + group) * GROUP..][..GROUP].copy_from_slice(&sums);
            });
        }
    }
}

/// Copies what is seen of the values of four groups, from `first` on, at a step of the range, with zeros for what is not. The last group stands
/// for more.
fn copy_values(
    span: &Span<'_>,
    seen: &Range<usize>,
    step: usize,
    first: usize,
    copies: &mut [u8],
) -> [*const u8; GROUPS] {
    let Span { work, unit, .. } = *span;
    let (block_size, groups) = (work.cache.spec().block_size, work.cache.width() / GROUP);
    copies.fill(0);
    for pair in (step * STEP).max(seen.start) / 2..((step + 1) * STEP).min(seen.end).div_ceil(2) {
        // Both positions of a pair are in one block, which starts at an even one.
        let (block, offset) = work.place(unit, span.start + 2 * pair);
        let values = work.cache.run(work.layer, Side::Values, block, unit.kv_head).codes;
        for (i, copy) in copies.chunks_exact_mut(TILE_BYTES).enumerate() {
            let row = &mut copy[pair % ROWS * ROW_BYTES..][..ROW_BYTES];
            let group = (first + i).min(groups - 1);
            row.copy_from_slice(&values[(group * block_size + offset) * GROUP * 2..][..ROW_BYTES]);
            // What nobody sees may be anything, and is not to be multiplied even by zero.
            if 2 * pair < seen.start {
                row.chunks_exact_mut(4).for_each(|pair| pair[..2].fill(0));
            }
            if 2 * pair + 1 >= seen.end {
                row.chunks_exact_mut(4).for_each(|pair| pair[2..].fill(0));
            }
        }
    }
    let copies = copies.as_ptr();
    std::array::from_fn(|i| copies.wrapping_add(i * TILE_BYTES))
}
