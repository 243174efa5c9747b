//! The definition of paged attention: softmax over the visible positions of a range, one query at a time.

use super::super::math::soft_cap;
use super::cache::Side;
use super::{Partial, Span};

/// Sets `partial` to what the positions of a range give each query.
pub(super) fn range(span: &Span<'_>, _scratch: &mut Vec<f32>, partial: &mut Partial<'_>) {
    let Span { work, unit, start, queries } = *span;
    let (width, value_width) = (work.cache.width(), work.cache.value_width());
    let (keys, values) = (work.cache.key_side(), Side::Values);
    partial.clear();
    for (query, q) in queries.chunks_exact(width).enumerate() {
        let seen = span.seen(unit.rows.start + query / unit.heads.len());
        let cached = |side, i, position| {
            let (block, offset) = work.place(unit, start + position);
            work.cache.value(work.layer, side, block, unit.kv_head, i, offset)
        };
        let score = |position| (0..work.params.head_dim).map(|i| q[i] * cached(keys, i, position)).sum::<f32>();
        let mut weights: Vec<f32> = seen.clone().map(score).collect();
        if let Some(cap) = work.soft_cap() {
            soft_cap(&mut weights, cap);
        }
        let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|weight| *weight = (*weight - max).exp2());
        partial.max[query] = max;
        partial.sum[query] = weights.iter().sum();
        let out = &mut partial.out[query * value_width..][..work.cache.value_dim()];
        for (weight, position) in weights.iter().zip(seen) {
            for (i, out) in out.iter_mut().enumerate() {
                *out += weight * cached(values, i, position);
            }
        }
    }
}
