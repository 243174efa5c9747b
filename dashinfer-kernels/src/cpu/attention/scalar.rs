//! The definition of paged attention: softmax over the visible positions, one query at a time.

use super::{Unit, Work};

/// Computes the outputs of one unit.
///
/// # Safety
/// The unit lies within the work, and no other thread writes its rows and heads.
pub(super) unsafe fn unit(work: &Work<'_>, unit: &Unit, _scratch: &mut Vec<f32>) {
    let params = work.params;
    let d = params.head_dim;
    for row in unit.rows.clone() {
        for head in work.heads_of(unit.kv_head) {
            let q = work.query(row, head);
            let mut scores: Vec<f32> = Vec::new();
            let visible = work.visible(unit, row);
            for position in visible.clone() {
                let (block, offset) = work.place(unit, position);
                let key = |i| work.cache.key(work.layer, block, unit.kv_head, i, offset);
                scores.push((0..d).map(|i| q[i] * params.scale * key(i)).sum());
            }
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.iter_mut().for_each(|s| *s = (*s - max).exp());
            let sum: f32 = scores.iter().sum();
            let mut out = vec![0.0; d];
            for (score, position) in scores.iter().zip(visible) {
                let (block, offset) = work.place(unit, position);
                for (i, out) in out.iter_mut().enumerate() {
                    *out += score / sum * work.cache.value(work.layer, block, unit.kv_head, i, offset);
                }
            }
            // SAFETY: the caller gives this thread these rows and heads.
            unsafe { work.store(row, head, &out) };
        }
    }
}
