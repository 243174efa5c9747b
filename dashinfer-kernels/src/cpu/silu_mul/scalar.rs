//! The definition of the gated activation.

/// `out[i] = silu(gate[i]) · up[i]` with `silu(x) = x / (1 + exp(-x))`.
pub(super) fn row(out: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + (-gate).exp()) * up;
    }
}
