//! NEON: eight accumulators of four lanes.

use std::arch::aarch64::*;

/// See [`scalar::row`](super::scalar::row).
///
/// # Safety
/// The machine has NEON; the slices have one length.
#[target_feature(enable = "neon")]
pub(super) unsafe fn row(out: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let mut acc = [vdupq_n_f32(0.0); 8];
    let (blocks, tail) = x.as_chunks::<32>();
    for block in blocks {
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: four values from `4 i` on lie within a block of 32.
            let x = unsafe { vld1q_f32(block.as_ptr().add(i * 4)) };
            *acc = vfmaq_f32(*acc, x, x);
        }
    }
    let [a, b, c, d] = [0, 2, 4, 6].map(|i| vaddq_f32(acc[i], acc[i + 1]));
    let mut sum = vaddvq_f32(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d)));
    for x in tail {
        sum = x.mul_add(*x, sum);
    }
    let scale = 1.0 / (sum / x.len() as f32 + eps).sqrt();
    // The compiler makes vectors of it.
    for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
        *out = x * scale * w;
    }
}
