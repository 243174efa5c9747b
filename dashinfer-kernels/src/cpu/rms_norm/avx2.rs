//! AVX2: four accumulators of eight lanes.

use std::arch::x86_64::*;

use super::super::math::sum8;

/// See [`scalar::row`](super::scalar::row).
///
/// # Safety
/// The machine has AVX2 and FMA; the slices have one length.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn row(out: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let mut acc = [_mm256_setzero_ps(); 4];
    let (blocks, tail) = x.as_chunks::<32>();
    for block in blocks {
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: eight values from `8 i` on lie within a block of 32.
            let x = unsafe { _mm256_loadu_ps(block.as_ptr().add(i * 8)) };
            *acc = _mm256_fmadd_ps(x, x, *acc);
        }
    }
    let mut sum = sum8(_mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3])));
    for x in tail {
        sum = x.mul_add(*x, sum);
    }
    let scale = 1.0 / (sum / x.len() as f32 + eps).sqrt();
    // Compiled with AVX2 here: the compiler makes vectors of it.
    for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
        *out = x * scale * w;
    }
}
