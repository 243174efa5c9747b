//! NEON: four lanes, the tail through a padded copy, so that a value's result does not depend on where it stands.

use std::arch::aarch64::*;

use super::super::math::exp4;

/// See [`scalar::row`](super::scalar::row).
///
/// # Safety
/// The machine has NEON; the slices have one length.
#[target_feature(enable = "neon")]
pub(super) unsafe fn row(out: &mut [f32], gate: &[f32], up: &[f32]) {
    let (out, out_tail) = out.as_chunks_mut::<4>();
    let ((gate, gate_tail), (up, up_tail)) = (gate.as_chunks::<4>(), up.as_chunks::<4>());
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        four(out, gate, up);
    }
    let (mut last, mut last_gate, mut last_up) = ([0.0; 4], [0.0; 4], [0.0; 4]);
    last_gate[..gate_tail.len()].copy_from_slice(gate_tail);
    last_up[..up_tail.len()].copy_from_slice(up_tail);
    four(&mut last, &last_gate, &last_up);
    out_tail.copy_from_slice(&last[..out_tail.len()]);
}

#[inline]
#[target_feature(enable = "neon")]
fn four(out: &mut [f32; 4], gate: &[f32; 4], up: &[f32; 4]) {
    // SAFETY: each array holds four values.
    unsafe {
        let gate = vld1q_f32(gate.as_ptr());
        let divisor = vaddq_f32(vdupq_n_f32(1.0), exp4(vnegq_f32(gate)));
        let silu = vdivq_f32(gate, divisor);
        vst1q_f32(out.as_mut_ptr(), vmulq_f32(silu, vld1q_f32(up.as_ptr())));
    }
}
