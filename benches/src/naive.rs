//! The baselines of the kernels' benchmarks: each operator as a textbook writes it, a plain loop on one thread.

/// `out[t, n] = Σₖ x[t, k] · w[n, k]`. Weights are in f32 whatever the kernel's type: unpacking 16 bits one by one takes longer
/// than the products, and would make any kernel look good.
pub fn linear(out: &mut [f32], x: &[f32], w: &[f32], cols: usize) {
    for (out, x) in out.chunks_exact_mut(w.len() / cols).zip(x.chunks_exact(cols)) {
        for (out, w) in out.iter_mut().zip(w.chunks_exact(cols)) {
            *out = x.iter().zip(w).map(|(x, w)| x * w).sum();
        }
    }
}

/// `out = x · w / sqrt(mean(x²) + eps)` for each row.
pub fn rms_norm(out: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    for (out, x) in out.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
        let mean = x.iter().map(|x| x * x).sum::<f32>() / w.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
            *out = x * scale * w;
        }
    }
}

/// `out[t, i] = silu(x[t, i]) · x[t, F + i]`.
pub fn silu_mul(out: &mut [f32], x: &[f32], cols: usize) {
    for (out, x) in out.chunks_exact_mut(cols).zip(x.chunks_exact(2 * cols)) {
        let (gate, up) = x.split_at(cols);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + (-gate).exp()) * up;
        }
    }
}

/// Causal attention of the last rows of one head: `q` and `out`: `[T, D]`, `k` and `v`: `[context, D]`.
pub fn attention(out: &mut [f32], q: &[f32], k: &[f32], v: &[f32], head_dim: usize) {
    let (rows, context) = (q.len() / head_dim, k.len() / head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    for (row, (out, q)) in out.chunks_exact_mut(head_dim).zip(q.chunks_exact(head_dim)).enumerate() {
        let visible = context - rows + row + 1;
        let dot = |k: &[f32]| scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
        let mut weights: Vec<f32> = k.chunks_exact(head_dim).take(visible).map(dot).collect();
        let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|weight| *weight = (*weight - max).exp());
        let sum: f32 = weights.iter().sum();
        out.fill(0.0);
        for (weight, v) in weights.iter().zip(v.chunks_exact(head_dim)) {
            for (out, v) in out.iter_mut().zip(v) {
                *out += weight / sum * v;
            }
        }
    }
}

/// Rotates each head's halves by its row's position, in place.
pub fn rope(heads: &mut [f32], row_len: usize, inv_freq: &[f32]) {
    let half = inv_freq.len();
    for (position, row) in heads.chunks_exact_mut(row_len).enumerate() {
        for head in row.chunks_exact_mut(2 * half) {
            let (left, right) = head.split_at_mut(half);
            for ((a, b), freq) in left.iter_mut().zip(right).zip(inv_freq) {
                let (sin, cos) = (position as f32 * freq).sin_cos();
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// The place of the largest value.
#[must_use]
pub fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use dashinfer_kernels::cpu::{self, Isa, PackedMatrix, PoolConfig, ThreadPool, to_bytes};
    use dashinfer_kernels::{DType, MatrixView, to_f32};

    use super::*;

    fn noise(len: usize) -> Vec<f32> {
        (1..=len).map(|i| (i as f32 * 12.9898).sin()).collect()
    }

    fn assert_close(a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4), "{a:?} {b:?}");
    }

    #[test]
    fn the_baselines_compute_what_the_kernels_do() {
        let pool = ThreadPool::new(&PoolConfig::default()).unwrap();
        let (x, w) = (noise(3 * 20), to_bytes(&noise(7 * 20), DType::BF16));
        let view = MatrixView { bytes: &w, dtype: DType::BF16, rows: 7, cols: 20 };
        let packed = PackedMatrix::pack(&[view], None, &pool).unwrap();
        let (mut out, mut want) = (vec![0.0; 21], vec![0.0; 21]);
        linear(&mut out, &x, &to_f32(&w, DType::BF16), 20);
        cpu::linear(&mut want, &x, &packed, &pool, Isa::best()).unwrap();
        assert_close(&out, &want);

        let (mut out, mut want) = (vec![0.0; 60], vec![0.0; 60]);
        rms_norm(&mut out, &x, &noise(20), 1e-6);
        cpu::rms_norm(&mut want, &x, &noise(20), 1e-6, Isa::best()).unwrap();
        assert_close(&out, &want);

        let (mut out, mut want) = (vec![0.0; 30], vec![0.0; 30]);
        silu_mul(&mut out, &x, 10);
        cpu::silu_mul(&mut want, &x, 10, Isa::best()).unwrap();
        assert_close(&out, &want);
    }

    #[test]
    fn attention_over_equal_keys_is_the_mean_of_the_values() {
        let (values, mut out) = (&noise(5 * 4), vec![0.0; 2 * 4]);
        attention(&mut out, &noise(2 * 4), &[1.0; 5 * 4], values, 4);
        let mean =
            |rows: usize| (0..4).map(move |i| values.chunks(4).take(rows).map(|v| v[i]).sum::<f32>() / rows as f32);
        assert_close(&out, &mean(4).chain(mean(5)).collect::<Vec<_>>());
    }

    #[test]
    fn a_rotation_keeps_lengths_and_the_first_row() {
        let heads = noise(3 * 8);
        let mut rotated = heads.clone();
        rope(&mut rotated, 8, &[1.0, 0.1]);
        assert_eq!(rotated[..8], heads[..8]);
        let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
        let norms = |heads: &[f32]| heads.chunks(8).map(norm).collect::<Vec<_>>();
        assert_close(&norms(&rotated), &norms(&heads));
        assert_eq!(argmax(&[1.0, 3.0, 2.0]), 1);
    }
}
