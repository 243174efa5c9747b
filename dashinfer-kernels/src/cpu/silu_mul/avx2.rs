//! AVX2: eight lanes, the tail through a padded copy, so that a value's result does not depend on where it stands.

use std::arch::x86_64::*;

use super::super::math::exp8;

/// See [`scalar::row`](super::scalar::row).
///
/// # Safety
/// The machine has AVX2 and FMA; the slices have one length.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn row(out: &mut [f32], gate: &[f32], up: &[f32]) {
    let (out, out_tail) = out.as_chunks_mut::<8>();
    let ((gate, gate_tail), (up, up_tail)) = (gate.as_chunks::<8>(), up.as_chunks::<8>());
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        eight(out, gate, up);
    }
    let (mut last, mut last_gate, mut last_up) = ([0.0; 8], [0.0; 8], [0.0; 8]);
    last_gate[..gate_tail.len()].copy_from_slice(gate_tail);
    last_up[..up_tail.len()].copy_from_slice(up_tail);
    eight(&mut last, &last_gate, &last_up);
    out_tail.copy_from_slice(&last[..out_tail.len()]);
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn eight(out: &mut [f32; 8], gate: &[f32; 8], up: &[f32; 8]) {
    // SAFETY: each array holds eight values.
    unsafe {
        let gate = _mm256_loadu_ps(gate.as_ptr());
        let one = _mm256_set1_ps(1.0);
        let divisor = _mm256_add_ps(one, exp8(_mm256_sub_ps(_mm256_setzero_ps(), gate)));
        let silu = _mm256_div_ps(gate, divisor);
        _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(silu, _mm256_loadu_ps(up.as_ptr())));
    }
}
