//! The loops around register tiles: a range's scores, their softmax, and the sum of its values, several queries together.
//!
//! An instruction set brings two things, [`Tiles::product`] and [`Tiles::soften`]. All loops and all that depends on the
//! cache's layout is here.

use std::ops::Range;

use super::super::math::soft_cap;
use super::cache::{GROUP, Side};
use super::{Partial, RANGE, Span};
use crate::CacheType;

/// Element types of the right side of a product.
pub(super) const F32: u8 = 0;
pub(super) const F16: u8 = 1;
/// Two steps beside each other: element `j` of the first, then of the second.
pub(super) const BF16: u8 = 2;
pub(super) const INT8: u8 = 3;
/// Byte `j` of a group is element `j`, and `j + 8` in the upper four bits.
pub(super) const UINT4: u8 = 4;

/// Where step `k` of a group starts; two steps of bf16 share a place. For even `k`, also the bytes of `k` steps.
#[inline(always)]
pub(super) const fn step_bytes(element: u8, k: usize) -> usize {
    match element {
        F32 => k * GROUP * 4,
        F16 => k * GROUP * 2,
        BF16 => k / 2 * GROUP * 4,
        INT8 => k * GROUP,
        _ => k * GROUP / 2,
    }
}

/// Segments of a range's values.
const MOST_SEGMENTS: usize = RANGE / GROUP + 2;

/// Some steps of a product that are neighbours in the cache.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    /// The first and the second group of columns. Readable for `steps` steps each, the second only if it is used.
    pub(super) b: [*const u8; 2],
    pub(super) steps: usize,
    /// Whether it is the second of two steps that share their place, and nothing more.
    pub(super) second: bool,
    /// Where, counted from what is read, there is something that will be read soon.
    pub(super) ahead: isize,
}

/// `out[m, 0..16 · groups] (+)= Σ_k a[m, k] · b[k, ..]`, each sum in the order of `k`.
pub(super) struct Product<'a> {
    /// Rows of values, `a_stride` apart, as long as all segments together.
    pub(super) a: *const f32,
    pub(super) a_stride: usize,
    pub(super) segments: &'a [Segment],
    /// Rows of `16 · groups` values, `out_stride` apart.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
    /// Whether sums start with what is in `out`, or with zero.
    pub(super) add: bool,
}

/// `out[m, p] = Σ_g Σ_j a[m, 16 g + j] · b[g][p][j]` for neighbouring positions `p`: keys that are stored as values are. Each sum goes
/// through the groups in their order, and is the same in every tile.
pub(super) struct Dots {
    /// Rows of `16 · groups` values, `a_stride` apart.
    pub(super) a: *const f32,
    pub(super) a_stride: usize,
    /// The first group of the first position; those of the next position stand behind it.
    pub(super) b: *const u8,
    pub(super) groups: usize,
    /// Bytes between groups.
    pub(super) group_bytes: usize,
    /// Where, counted from what is read, there is something that will be read soon.
    pub(super) ahead: isize,
    /// Rows of [`Tiles::DOT_POSITIONS`] values, `out_stride` apart.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
}

/// A range's scales of keys and values; of a type without, the slices are empty.
#[derive(Clone, Copy)]
pub(super) struct Scales<'a> {
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) value_offsets: &'a [f32],
}

/// What the softmax of one query leaves beside its weights.
pub(super) struct Softened {
    pub(super) max: f32,
    pub(super) sum: f32,
    /// The sum of weight times the value's offset: a part of each feature's output.
    pub(super) offset: f32,
}

/// An instruction set's part.
pub(super) trait Tiles {
    /// Rows of the largest register tile.
    const MAX_ROWS: usize;
    /// Rows of the largest register tile of two groups.
    const MAX_ROWS_OF_TWO: usize;

    /// One register tile.
    ///
    /// # Safety
    /// The machine has the instruction set; `rows` is 1 to `MAX_ROWS`, or `MAX_ROWS_OF_TWO` if `groups` is 2, and the operands
    /// are those that [`Product`] says.
    unsafe fn product<const ELEMENT: u8>(rows: usize, groups: usize, product: &Product<'_>);

    /// Positions of a tile of dots, a divisor of 16.
    const DOT_POSITIONS: usize;
    /// Rows of the largest one.
    const MAX_DOT_ROWS: usize;

    /// One register tile of dots.
    ///
    /// # Safety
    /// The machine has the instruction set; `rows` is 1 to `MAX_DOT_ROWS`, and the operands are those that [`Dots`] says.
    unsafe fn dots<const ELEMENT: u8>(rows: usize, dots: &Dots);

    /// Turns the scores `seen` of a query into weights for its values. What else is in the vectors that hold them becomes zero.
    ///
    /// # Safety
    /// The machine has the instruction set; `seen` is not empty and lies within the range, and scales are as long as that.
    unsafe fn soften(scores: &mut [f32; RANGE], seen: Range<usize>, scales: &Scales<'_>) -> Softened;
}

/// Sets `partial` to what the positions of a range give each query.
///
/// # Safety
/// The machine has the instruction set of `T`; the span lies within its work; the partial is one of its queries.
#[inline(always)]
pub(super) unsafe fn range<T: Tiles>(span: &Span<'_>, scratch: &mut Vec<f32>, partial: &mut Partial<'_>) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match span.work.cache.spec().cache_type {
            CacheType::F32 => range_of::<T, F32, F32>(span, scratch, partial),
            CacheType::F16 => range_of::<T, F16, F16>(span, scratch, partial),
            CacheType::BF16 => range_of::<T, BF16, BF16>(span, scratch, partial),
            CacheType::Int8 => range_of::<T, INT8, INT8>(span, scratch, partial),
            CacheType::Uint4 => range_of::<T, INT8, UINT4>(span, scratch, partial),
        }
    }
}

/// # Safety
/// As for [`range`]; the elements are those of the cache.
unsafe fn range_of<T: Tiles, const KEY: u8, const VALUE: u8>(
    span: &Span<'_>,
    scratch: &mut Vec<f32>,
    partial: &mut Partial<'_>,
) {
    let rows = span.unit.rows.clone();
    let group = span.unit.heads.len();
    let queries = partial.num_queries();
    scratch.resize(queries * RANGE + 3 * RANGE, 0.0);
    let (scales, scores) = scratch.split_at_mut(3 * RANGE);
    let (scores, _) = scores.as_chunks_mut::<RANGE>();
    let scores = &mut scores[..queries];

    // Rows see ranges that only move up.
    let (first, last) = (span.seen(rows.start), span.seen(rows.end - 1));
    let any = first.start..last.end;
    let scales = read_scales(span, any.clone(), scales);
    // SAFETY: positions up to `any.end` have blocks; the scores are those of all queries.
    unsafe {
        match span.work.cache.key_side() {
            Side::Keys => score_keys::<T, KEY>(span, any, scores),
            Side::Values => score_values::<T, VALUE>(span, any, scores),
        }
    }
    let cap = span.work.soft_cap();
    let softened = if cap.is_some() { Scales { keys: &[], ..scales } } else { scales };
    for (query, scores) in scores.iter_mut().enumerate() {
        let seen = span.seen(rows.start + query / group);
        if seen.is_empty() {
            partial.max[query] = f32::NEG_INFINITY;
            continue;
        }
        if let Some(cap) = cap {
            // A cap is on whole scores, so the keys' scales come first.
            for (score, scale) in scores[seen.clone()].iter_mut().zip(scales.keys.get(seen.clone()).unwrap_or_default())
            {
                *score *= scale;
            }
            soft_cap(&mut scores[seen.clone()], cap);
        }
        // SAFETY: `seen` is not empty; the rest is the caller's promise.
        let Softened { max, sum, offset } = unsafe { T::soften(scores, seen, &softened) };
        (partial.max[query], partial.sum[query]) = (max, sum);
        let width = partial.width();
        partial.out[query * width..][..width].fill(offset);
    }

    // All rows see the positions of `common`; on the diagonal, and at a window's edge, some rows see a few more. Each row's
    // sum goes on where it was left, so it is in the order of positions however they are cut.
    let common = last.start..first.end;
    // SAFETY: in all calls: each row's positions have blocks, and the queries are those of the unit.
    unsafe {
        if common.is_empty() {
            for (i, row) in rows.enumerate() {
                add_values::<T, VALUE>(span, span.seen(row), i * group..(i + 1) * group, scores, partial);
            }
            return;
        }
        for (i, row) in rows.clone().enumerate() {
            let before = span.seen(row).start..common.start;
            add_values::<T, VALUE>(span, before, i * group..(i + 1) * group, scores, partial);
        }
        add_values::<T, VALUE>(span, common.clone(), 0..queries, scores, partial);
        for (i, row) in rows.enumerate() {
            let behind = common.end..span.seen(row).end;
            add_values::<T, VALUE>(span, behind, i * group..(i + 1) * group, scores, partial);
        }
    }
}

/// The scales of the positions `seen`, at their places in the range; zeros elsewhere. `memory`: `[3, RANGE]`.
fn read_scales<'a>(span: &Span<'_>, seen: Range<usize>, memory: &'a mut [f32]) -> Scales<'a> {
    let cache = span.work.cache;
    let cache_type = cache.spec().cache_type;
    if cache_type.scale_bytes() == 0 {
        return Scales { keys: &[], values: &[], value_offsets: &[] };
    }
    memory.fill(0.0);
    let (keys, rest) = memory.split_at_mut(RANGE);
    let (values, value_offsets) = rest.split_at_mut(RANGE);
    for_blocks(span, seen, |block, offset, positions| {
        let run = |side| cache.run(span.work.layer, side, block, span.unit.kv_head);
        run(Side::Keys).int8_scales(offset, &mut keys[positions.clone()]);
        if cache_type == CacheType::Uint4 {
            let offsets = &mut value_offsets[positions.clone()];
            run(Side::Values).uint4_scales(offset, &mut values[positions], offsets);
        } else {
            run(Side::Values).int8_scales(offset, &mut values[positions]);
        }
    });
    let value_offsets = if cache_type == CacheType::Uint4 { &*value_offsets } else { &[] };
    Scales { keys, values, value_offsets }
}

/// Calls `run(block, offset in the block, positions of the range)` for the blocks that hold `seen`.
fn for_blocks(span: &Span<'_>, seen: Range<usize>, mut run: impl FnMut(usize, usize, Range<usize>)) {
    let block_size = span.work.cache.spec().block_size;
    let mut at = seen.start;
    while at < seen.end {
        let (block, offset) = span.work.place(span.unit, span.start + at);
        let end = seen.end.min(at + block_size - offset);
        run(block, offset, at..end);
        at = end;
    }
}

/// `scores[q, j] = q · key[j]`, without the keys' scales, for at least the positions `seen` of the range.
///
/// # Safety
/// As for [`range_of`]; the positions have blocks.
unsafe fn score_keys<T: Tiles, const KEY: u8>(span: &Span<'_>, seen: Range<usize>, scores: &mut [[f32; RANGE]]) {
    let Span { work, unit, .. } = *span;
    let width = work.cache.width();
    let tile = |position: usize| {
        let (block, offset) = work.place(unit, span.start + position);
        let [keys, values] =
            [Side::Keys, Side::Values].map(|side| work.cache.run(work.layer, side, block, unit.kv_head).codes);
        // Values are read next. What is not as long as the keys has other things at the same place.
        let ahead = values.as_ptr().addr().wrapping_sub(keys.as_ptr().addr()).cast_signed();
        let ahead = if values.len() == keys.len() { ahead } else { 0 };
        // Groups of 16 positions never cross a block, whose size is a multiple of 16.
        (keys[offset / GROUP * step_bytes(KEY, width)..][..step_bytes(KEY, width)].as_ptr(), ahead)
    };
    let mut at = seen.start / GROUP * GROUP;
    while at < seen.end {
        let (keys, ahead) = tile(at);
        let mut segment = Segment { b: [keys, keys], steps: width, second: false, ahead };
        let two = at + GROUP < seen.end;
        if two {
            segment.b[1] = tile(at + GROUP).0;
        }
        let (q, out) = (span.queries.as_ptr(), scores.as_mut_ptr().cast::<f32>());
        for_tiles(0..scores.len(), T::MAX_ROWS, |query, rows| {
            // SAFETY: both groups hold `width` steps; the queries and their scores exist.
            unsafe {
                let product = |group: usize, segments: &[Segment], groups: usize| {
                    let a = q.add(query * width);
                    let out = out.add(query * RANGE + at + group * GROUP);
                    let product = Product { a, a_stride: width, segments, out, out_stride: RANGE, add: false };
                    T::product::<KEY>(rows, groups, &product);
                };
                if two && rows <= T::MAX_ROWS_OF_TWO {
                    product(0, &[segment], 2);
                } else {
                    product(0, &[segment], 1);
                    if two {
                        product(1, &[Segment { b: [segment.b[1]; 2], ..segment }], 1);
                    }
                }
            }
        });
        at += if two { 2 * GROUP } else { GROUP };
    }
}

/// [`score_keys`], where the keys are what is stored as values.
///
/// # Safety
/// As for [`score_keys`].
unsafe fn score_values<T: Tiles, const VALUE: u8>(span: &Span<'_>, seen: Range<usize>, scores: &mut [[f32; RANGE]]) {
    let Span { work, unit, .. } = *span;
    let (width, block_size) = (work.cache.width(), work.cache.spec().block_size);
    let run = |block| work.cache.run(work.layer, Side::Values, block, unit.kv_head).codes;
    let context_len = work.batch.sequences[unit.sequence].context_len;
    for_blocks(span, seen, |block, offset, positions| {
        let keys = run(block);
        let next = span.start + positions.end;
        let next = if next < context_len { run(work.place(unit, next).0) } else { keys };
        let ahead = next.as_ptr().addr().wrapping_sub(keys.as_ptr().addr()).cast_signed();
        // Tiles start at multiples of their positions, before what is seen if need be, and never cross a block.
        let before = offset % T::DOT_POSITIONS;
        for at in (0..before + positions.len()).step_by(T::DOT_POSITIONS) {
            let b = keys[step_bytes(VALUE, offset - before + at)..].as_ptr();
            for_tiles(0..scores.len(), T::MAX_DOT_ROWS, |query, rows| {
                // SAFETY: all groups of the positions lie in the block's run, the queries exist, and so do their scores: positions
                // of a range start at a multiple of 16, as those of a block do.
                unsafe {
                    let out = scores.as_mut_ptr().cast::<f32>().add(query * RANGE + positions.start - before + at);
                    let dots = Dots {
                        a: span.queries.as_ptr().add(query * width),
                        a_stride: width,
                        b,
                        groups: width / GROUP,
                        group_bytes: step_bytes(VALUE, block_size),
                        // The first rows fetch for all.
                        ahead: if query == 0 { ahead } else { 0 },
                        out,
                        out_stride: RANGE,
                    };
                    T::dots::<VALUE>(rows, &dots);
                }
            });
        }
    });
}

/// `out[q, :] += Σ_j scores[q, j] · value[j]`, without the values' scales, over the positions `seen` of the range, in their order.
///
/// # Safety
/// As for [`range_of`]; the positions have blocks; the queries exist.
unsafe fn add_values<T: Tiles, const VALUE: u8>(
    span: &Span<'_>,
    seen: Range<usize>,
    queries: Range<usize>,
    scores: &[[f32; RANGE]],
    partial: &mut Partial<'_>,
) {
    if seen.is_empty() {
        return;
    }
    let Span { work, unit, .. } = *span;
    let (width, block_size) = (work.cache.value_width(), work.cache.spec().block_size);
    let group_bytes = step_bytes(VALUE, block_size);
    let nothing = Segment { b: [std::ptr::null(); 2], steps: 0, second: false, ahead: 0 };
    // A block has at least 16 positions; the first and the last may be seen in part, and the first from the second of two steps on.
    let (mut segments, mut num_segments) = ([nothing; MOST_SEGMENTS], 0);
    for_blocks(span, seen.clone(), |block, offset, positions| {
        let values = work.cache.run(work.layer, Side::Values, block, unit.kv_head).codes;
        let ahead = ahead(span, positions.start, values);
        let mut add = |from: usize, steps, second| {
            let start = values[step_bytes(VALUE, from)..].as_ptr();
            segments[num_segments] = Segment { b: [start; 2], steps, second, ahead };
            num_segments += 1;
        };
        let (mut from, mut steps) = (offset, positions.len());
        if VALUE == BF16 && from % 2 == 1 {
            add(from, 1, true);
            (from, steps) = (from + 1, steps - 1);
        }
        if steps > 0 {
            add(from, steps, false);
        }
    });
    let segments = &mut segments[..num_segments];
    let mut column = 0;
    while column < width {
        let two = column + GROUP < width;
        for segment in &mut *segments {
            segment.b[1] = segment.b[0].wrapping_add(group_bytes);
        }
        for_tiles(queries.clone(), T::MAX_ROWS, |query, rows| {
            // SAFETY: group `column / 16` of each block's values holds the steps of its segment, and so does the next one if
            // there are as many columns; the queries' weights and outputs exist.
            unsafe {
                let a = scores.as_ptr().cast::<f32>().add(query * RANGE + seen.start);
                let out = partial.out.as_mut_ptr().add(query * width + column);
                let mut product =
                    Product { a, a_stride: RANGE, segments: &*segments, out, out_stride: width, add: true };
                if two && rows <= T::MAX_ROWS_OF_TWO {
                    T::product::<VALUE>(rows, 2, &product);
                } else {
                    T::product::<VALUE>(rows, 1, &product);
                    if two {
                        let mut second = [nothing; MOST_SEGMENTS];
                        for (second, segment) in second.iter_mut().zip(&*segments) {
                            *second = Segment { b: [segment.b[1]; 2], ..*segment };
                        }
                        product.segments = &second[..segments.len()];
                        product.out = out.add(GROUP);
                        T::product::<VALUE>(rows, 1, &product);
                    }
                }
            }
        });
        let groups = if two { 2 } else { 1 };
        for segment in &mut *segments {
            segment.b[0] = segment.b[0].wrapping_add(groups * group_bytes);
        }
        column += groups * GROUP;
    }
}

/// How far the keys of the next range are from the values of this one at the same place.
fn ahead(span: &Span<'_>, position: usize, values: &[u8]) -> isize {
    let Span { work, unit, .. } = *span;
    let next = span.start + RANGE + position;
    if next >= work.batch.sequences[unit.sequence].context_len {
        return 0;
    }
    let (block, _) = work.place(unit, next);
    let keys = work.cache.run(work.layer, work.cache.key_side(), block, unit.kv_head).codes;
    keys.as_ptr().addr().wrapping_sub(values.as_ptr().addr()).cast_signed()
}

/// Splits queries into tiles of at most `max_rows`: `(first, count)`. As many as possible are full, but none is of one query, which
/// would wait for its own sums, if there are others: seven are 5 + 2 of at most six.
#[inline(always)]
fn for_tiles(queries: Range<usize>, max_rows: usize, mut run: impl FnMut(usize, usize)) {
    let mut query = queries.start;
    while query < queries.end {
        let left = queries.end - query;
        let rows = if left == max_rows + 1 { max_rows - 1 } else { left.min(max_rows) };
        run(query, rows);
        query += rows;
    }
}
