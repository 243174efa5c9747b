//! The definition of RMSNorm.

/// One row: `out[i] = x[i] · w[i] / sqrt(mean_j(x[j]²) + eps)`.
pub(super) fn row(out: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    let sum: f32 = x.iter().map(|x| x * x).sum();
    let scale = 1.0 / (sum / x.len() as f32 + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
        *out = x * scale * w;
    }
}
