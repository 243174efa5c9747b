//! AVX2: streaming softmax over tiles of 64 positions, several queries of a key/value head together.
//!
//! Tiles lie at absolute positions (0..64, 64..128, ..), so the order of a row's sums depends on its position alone, not on the
//! chunk or the batch that it came in. <https://arxiv.org/abs/2205.14135>

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::math::{exp8, sum8};
use super::{Unit, Work};
use crate::DType;

/// Positions that are treated together. Block sizes divide it or are a multiple of it.
const TILE: usize = 64;

/// Queries of a register tile.
const MAX_QUERIES: usize = 6;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// See [`scalar::unit`](super::scalar::unit).
///
/// # Safety
/// The machine has AVX2, FMA and F16C; the unit lies within the work, and no other thread writes its rows and heads.
pub(super) unsafe fn unit(work: &Work<'_>, unit: &Unit, scratch: &mut Vec<f32>) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match work.cache.spec().dtype {
            DType::F32 => typed::<F32>(work, unit, scratch),
            DType::F16 => typed::<F16>(work, unit, scratch),
            DType::BF16 => typed::<BF16>(work, unit, scratch),
        }
    }
}

/// The state of the queries of a unit, in scratch memory. Rows of `q` and `out` are padded to whole vectors.
struct State<'a> {
    /// `[Q, D]`, scaled.
    q: &'a mut [f32],
    /// `[Q, TILE]`: scores, then weights.
    scores: &'a mut [f32],
    /// `[Q, padded D]`: the weighted sum of values.
    out: &'a mut [f32],
    /// `[Q]`: the largest score so far.
    max: &'a mut [f32],
    /// `[Q]`: the sum of weights so far.
    sum: &'a mut [f32],
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn typed<const TYPE: u8>(work: &Work<'_>, unit: &Unit, scratch: &mut Vec<f32>) {
    let d = work.params.head_dim;
    let width = d.next_multiple_of(16);
    let heads = work.heads_of(unit.kv_head);
    let group = heads.len();
    let queries = unit.rows.len() * group;
    scratch.clear();
    scratch.resize(queries * (d + TILE + width + 2), 0.0);
    let (q, rest) = scratch.split_at_mut(queries * d);
    let (scores, rest) = rest.split_at_mut(queries * TILE);
    let (out, rest) = rest.split_at_mut(queries * width);
    let (max, sum) = rest.split_at_mut(queries);
    let mut state = State { q, scores, out, max, sum };
    let state = &mut state;
    state.max.fill(f32::NEG_INFINITY);
    for (i, row) in unit.rows.clone().enumerate() {
        for (j, head) in heads.clone().enumerate() {
            for (to, from) in state.q[(i * group + j) * d..][..d].iter_mut().zip(work.query(row, head)) {
                *to = from * work.params.scale;
            }
        }
    }

    // Rows see ranges that only move up, so the first row's start and the last row's end bound them all.
    let begin = work.visible(unit, unit.rows.start).start;
    let end = work.visible(unit, unit.rows.end - 1).end;
    let mut tile = begin / TILE * TILE;
    while tile < end {
        let seen = |row: usize| {
            let visible = work.visible(unit, row);
            visible.start.clamp(tile, tile + TILE) - tile..visible.end.clamp(tile, tile + TILE) - tile
        };
        let (first, last) = (seen(unit.rows.start), seen(unit.rows.end - 1));
        let any = first.start..last.end;
        // SAFETY: the queries are those of the unit; positions of the tile up to `any.end` have blocks.
        unsafe {
            product_scores::<TYPE>(work, unit, tile, any, state, queries);
        }
        if first == last && !first.is_empty() {
            soft_weights(state, 0..queries, first.clone(), width);
            // SAFETY: as above.
            unsafe { add_values::<TYPE>(work, unit, tile, first, state, 0..queries, width) };
        } else {
            // On the diagonal and at a window's edge each row sees something else.
            for (i, row) in unit.rows.clone().enumerate() {
                let (seen, mine) = (seen(row), i * group..(i + 1) * group);
                if seen.is_empty() {
                    continue;
                }
                soft_weights(state, mine.clone(), seen.clone(), width);
                // SAFETY: as above.
                unsafe { add_values::<TYPE>(work, unit, tile, seen, state, mine, width) };
            }
        }
        tile += TILE;
    }

    for (i, row) in unit.rows.clone().enumerate() {
        for (j, head) in heads.clone().enumerate() {
            let query = i * group + j;
            let scale = 1.0 / state.sum[query];
            let out = &mut state.out[query * width..][..d];
            out.iter_mut().for_each(|x| *x *= scale);
            // SAFETY: the caller gives this thread these rows and heads.
            unsafe { work.store(row, head, out) };
        }
    }
}

/// `scores[q, j] = q · key[tile + j]` for at least the positions `seen` of the tile.
///
/// # Safety
/// AVX2, FMA, F16C; the blocks of the tile up to `seen.end` exist.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product_scores<const TYPE: u8>(
    work: &Work<'_>,
    unit: &Unit,
    tile: usize,
    seen: Range<usize>,
    state: &mut State<'_>,
    queries: usize,
) {
    let d = work.params.head_dim;
    let block_size = work.cache.spec().block_size;
    let size = work.cache.spec().dtype.size_bytes();
    // 16 positions never cross a block, whose size is a multiple of 16.
    for group in (seen.start / 16 * 16..seen.end).step_by(16) {
        let (block, offset) = work.place(unit, tile + group);
        let keys = work.cache.keys(work.layer, block, unit.kv_head);
        let keys = keys[offset * size..].as_ptr();
        let (q, out) = (state.q.as_ptr(), state.scores.as_mut_ptr());
        for_tiles(0..queries, |query, count| {
            // SAFETY: row `i` of the keys, of `D`, holds 16 positions from `offset` on; the queries and their scores exist.
            unsafe {
                let q = q.add(query * d);
                let out = out.add(query * TILE + group);
                broadcast_product::<TYPE>(count, q, d, keys, block_size * size, d, out, TILE, false);
            }
        });
    }
}

/// `out[q, :] += Σ_j scores[q, j] · value[tile + j]` over the positions `seen` of the tile, in their order.
///
/// # Safety
/// AVX2, FMA, F16C; the blocks of the tile up to `seen.end` exist; rows of `out` are `width` long, a multiple of 16.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_values<const TYPE: u8>(
    work: &Work<'_>,
    unit: &Unit,
    tile: usize,
    seen: Range<usize>,
    state: &mut State<'_>,
    queries: Range<usize>,
    width: usize,
) {
    let d = work.params.head_dim;
    let block_size = work.cache.spec().block_size;
    let size = work.cache.spec().dtype.size_bytes();
    let (scores, out) = (state.scores.as_ptr(), state.out.as_mut_ptr());
    let mut at = seen.start;
    while at < seen.end {
        let (block, offset) = work.place(unit, tile + at);
        let count = (block_size - offset).min(seen.end - at);
        let values = &work.cache.values(work.layer, block, unit.kv_head)[offset * d * size..][..count * d * size];
        for column in (0..d).step_by(16) {
            // The last columns of a head whose size is no multiple of 16 are copied, to read nothing behind them.
            let whole = column + 16 <= d;
            let mut padded: [f32; 16 * TILE];
            let copy = if whole {
                std::ptr::null()
            } else {
                padded = [0.0; 16 * TILE];
                for j in 0..count {
                    for i in column..d {
                        padded[j * 16 + i - column] = crate::element(values, work.cache.spec().dtype, j * d + i);
                    }
                }
                padded.as_ptr().cast::<u8>()
            };
            for_tiles(queries.clone(), |query, tile_queries| {
                // SAFETY: `count` rows of values of 16 columns (or of the copy) and as many weights of each query exist;
                // `width` is at least `column + 16`.
                unsafe {
                    let weights = scores.add(query * TILE + at);
                    let out = out.add(query * width + column);
                    if whole {
                        let values = values.as_ptr().add(column * size);
                        broadcast_product::<TYPE>(
                            tile_queries,
                            weights,
                            TILE,
                            values,
                            d * size,
                            count,
                            out,
                            width,
                            true,
                        );
                    } else {
                        broadcast_product::<F32>(tile_queries, weights, TILE, copy, 64, count, out, width, true);
                    }
                }
            });
        }
        at += count;
    }
}

/// Splits queries into equal tiles of at most [`MAX_QUERIES`]: `(first, count)`. Seven are 4 + 3: a tile of one would wait
/// for its own sums.
#[inline(always)]
fn for_tiles(queries: Range<usize>, mut run: impl FnMut(usize, usize)) {
    let tiles = queries.len().div_ceil(MAX_QUERIES);
    let mut query = queries.start;
    for tile in 0..tiles {
        let next = queries.start + queries.len() * (tile + 1) / tiles;
        run(query, next - query);
        query = next;
    }
}

/// Turns the scores of `queries` at the positions `seen` into weights `exp(score − max)`, brings their sums and outputs to the
/// new maximum, and adds the weights to the sums.
#[target_feature(enable = "avx2,fma")]
fn soft_weights(state: &mut State<'_>, queries: Range<usize>, seen: Range<usize>, width: usize) {
    let State { scores, out, max, sum, .. } = state;
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let (start, end) = (_mm256_set1_epi32(seen.start as i32 - 1), _mm256_set1_epi32(seen.end as i32));
    for query in queries {
        let row: &mut [f32; TILE] =
            (&mut scores[query * TILE..][..TILE]).try_into().expect("a row of scores is a tile long");
        let (groups, _) = row.as_chunks_mut::<8>();
        let inside = |group: usize| {
            let position = _mm256_add_epi32(lanes, _mm256_set1_epi32(group as i32 * 8));
            let inside = _mm256_and_si256(_mm256_cmpgt_epi32(position, start), _mm256_cmpgt_epi32(end, position));
            _mm256_castsi256_ps(inside)
        };
        let used = seen.start / 8..seen.end.div_ceil(8);
        let mut largest = _mm256_set1_ps(f32::NEG_INFINITY);
        for group in used.clone() {
            // SAFETY: a group holds eight values.
            let score = unsafe { _mm256_loadu_ps(groups[group].as_ptr()) };
            let score = _mm256_blendv_ps(_mm256_set1_ps(f32::NEG_INFINITY), score, inside(group));
            largest = _mm256_max_ps(largest, score);
        }
        let half = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps::<1>(largest));
        let pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
        let tile_max = _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps::<1>(pair, pair)));
        let new_max = max[query].max(tile_max);
        let mut weights = _mm256_setzero_ps();
        for group in used {
            // SAFETY: a group holds eight values.
            unsafe {
                let score = _mm256_loadu_ps(groups[group].as_ptr());
                let weight = exp8(_mm256_sub_ps(score, _mm256_set1_ps(new_max)));
                let weight = _mm256_and_ps(weight, inside(group));
                weights = _mm256_add_ps(weights, weight);
                _mm256_storeu_ps(groups[group].as_mut_ptr(), weight);
            }
        }
        if new_max > max[query] {
            let correction = (max[query] - new_max).exp();
            sum[query] *= correction;
            for x in &mut out[query * width..][..width] {
                *x *= correction;
            }
            max[query] = new_max;
        }
        sum[query] += sum8(weights);
    }
}

/// `out[m, 0..16] (+)= Σ_k a[m, k] · b[k, 0..16]` for `count` rows, each sum in the order of `k`.
///
/// # Safety
/// AVX2, FMA, F16C. `a` holds `count` rows of `steps` values, `a_stride` apart; `b` holds `steps` groups of 16 elements of
/// `TYPE`, `b_stride` bytes apart; `out` takes 16 values in each of `count` rows, `out_stride` apart.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
#[expect(clippy::too_many_arguments, reason = "three strided operands; a struct would be built at each call")]
unsafe fn broadcast_product<const TYPE: u8>(
    count: usize,
    a: *const f32,
    a_stride: usize,
    b: *const u8,
    b_stride: usize,
    steps: usize,
    out: *mut f32,
    out_stride: usize,
    add: bool,
) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match count {
            1 => tile_of::<TYPE, 1>(a, a_stride, b, b_stride, steps, out, out_stride, add),
            2 => tile_of::<TYPE, 2>(a, a_stride, b, b_stride, steps, out, out_stride, add),
            3 => tile_of::<TYPE, 3>(a, a_stride, b, b_stride, steps, out, out_stride, add),
            4 => tile_of::<TYPE, 4>(a, a_stride, b, b_stride, steps, out, out_stride, add),
            5 => tile_of::<TYPE, 5>(a, a_stride, b, b_stride, steps, out, out_stride, add),
            _ => tile_of::<TYPE, 6>(a, a_stride, b, b_stride, steps, out, out_stride, add),
        }
    }
}

/// [`broadcast_product`] for `ROWS` rows.
///
/// # Safety
/// As there.
#[inline(never)] // as for dense products: a function of its own keeps its accumulators in registers
#[target_feature(enable = "avx2,fma,f16c")]
#[expect(clippy::too_many_arguments, reason = "as for its caller")]
unsafe fn tile_of<const TYPE: u8, const ROWS: usize>(
    a: *const f32,
    a_stride: usize,
    b: *const u8,
    b_stride: usize,
    steps: usize,
    out: *mut f32,
    out_stride: usize,
    add: bool,
) {
    // SAFETY: the caller's promise: row `i < ROWS`, step `k < steps` and 16 columns exist.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
        if add {
            for (i, acc) in acc.iter_mut().enumerate() {
                let from = out.add(i * out_stride);
                *acc = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))];
            }
        }
        for k in 0..steps {
            let [low, high] = load16::<TYPE>(b.add(k * b_stride));
            for (i, acc) in acc.iter_mut().enumerate() {
                let a = _mm256_broadcast_ss(&*a.add(i * a_stride + k));
                acc[0] = _mm256_fmadd_ps(a, low, acc[0]);
                acc[1] = _mm256_fmadd_ps(a, high, acc[1]);
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            let to = out.add(i * out_stride);
            _mm256_storeu_ps(to, acc[0]);
            _mm256_storeu_ps(to.add(8), acc[1]);
        }
    }
}

/// 16 neighbouring elements as f32.
///
/// # Safety
/// They must be readable.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load16<const TYPE: u8>(from: *const u8) -> [__m256; 2] {
    // SAFETY: the caller's promise; 16 elements are 64 bytes of f32 and 32 bytes of the others.
    unsafe {
        if TYPE == F32 {
            return [_mm256_loadu_ps(from.cast()), _mm256_loadu_ps(from.cast::<f32>().add(8))];
        }
        let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.cast::<__m128i>().add(1)));
        if TYPE == F16 {
            return [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)];
        }
        [low, high].map(|half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))))
    }
}
