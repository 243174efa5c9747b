//! What the inputs of a matrix are, summed over tokens, by the products that there are for dense weights.

use super::linear::{PackedMatrix, Product, run, to_bytes};
use super::pool::ThreadPool;
use crate::error::check;
use crate::{DType, InputSums, KernelError, MatrixView};

/// Tokens of one product: sums of more of them are added up in f32.
const TOKENS: usize = 1024;

/// Input features of one product.
const FEATURES: usize = 256;

/// Sums over the rows of `inputs` and `exact`, `[T, K]` each; see [`InputSums`].
pub(super) fn sums(
    exact: &[f32],
    inputs: &[f32],
    cols: usize,
    product: Product,
    pool: &ThreadPool,
) -> Result<InputSums, KernelError> {
    check("input_sums", "inputs as they should be", inputs.len(), exact.len())?;
    let mut sums = InputSums { cols, squares: zeros(cols)?, crossed: zeros(cols)? };
    let len = (TOKENS * cols).max(1);
    for (exact, inputs) in exact.chunks(len).zip(inputs.chunks(len)) {
        let tokens = inputs.len() / cols;
        let features = transposed(inputs, cols);
        let bytes = to_bytes(&features, DType::F32);
        let view = MatrixView { bytes: &bytes, dtype: DType::F32, rows: cols, cols: tokens };
        let packed = PackedMatrix::pack(&[view], None, pool)?;
        drop(bytes);
        add_products(&mut sums.squares, &features, &packed, product, pool)?;
        add_products(&mut sums.crossed, &transposed(exact, cols), &packed, product, pool)?;
    }
    Ok(sums)
}

fn zeros(cols: usize) -> Result<Vec<f32>, KernelError> {
    let len = cols.saturating_mul(cols);
    let mut zeros = Vec::new();
    let wanted_bytes = len.saturating_mul(size_of::<f32>());
    zeros.try_reserve_exact(len).map_err(|_| KernelError::OutOfMemory { what: "sums of inputs", wanted_bytes })?;
    zeros.resize(len, 0.0);
    Ok(zeros)
}

/// `sums[i, j] += Σ_t rows[i, t] · weight[j, t]`
fn add_products(
    sums: &mut [f32],
    rows: &[f32],
    weight: &PackedMatrix,
    product: Product,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    let (cols, tokens) = (weight.rows(), weight.cols());
    let mut out = vec![0.0; FEATURES.min(cols) * cols];
    for (sums, rows) in sums.chunks_mut(FEATURES * cols).zip(rows.chunks(FEATURES * tokens)) {
        let out = &mut out[..sums.len()];
        run(product, out, rows, weight, pool)?;
        sums.iter_mut().zip(out).for_each(|(sum, out)| *sum += *out);
    }
    Ok(())
}

/// From `[T, cols]` to `[cols, T]`.
fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    let tokens = values.len() / cols;
    let mut out = vec![0.0; values.len()];
    for (t, row) in values.chunks_exact(cols).enumerate() {
        for (k, value) in row.iter().enumerate() {
            out[k * tokens + t] = *value;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use crate::cpu::{CpuBackend, CpuConfig, to_bytes};
    use crate::random::noise;
    use crate::{Backend, DType, MatrixView, Scheme, TensorUse};

    #[test]
    fn sums_are_those_of_their_definition() {
        for (tokens, cols) in [(1, 1), (7, 33), (1030, 20), (20, 300)] {
            let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
            let (x, y) = (noise(tokens * cols, 1), noise(tokens * cols, 2));
            let tensor = |values: &[f32]| {
                let mut tensor = backend.tensor(tokens + 3, cols, TensorUse::Activations).unwrap();
                tensor.resize("test", tokens, cols).unwrap();
                tensor.values_mut().copy_from_slice(values);
                tensor
            };
            let found = backend.input_sums(&tensor(&y), &tensor(&x)).unwrap();
            for i in 0..cols {
                for j in 0..cols {
                    let sum = |a: &[f32]| -> f64 {
                        (0..tokens).map(|t| f64::from(a[t * cols + i]) * f64::from(x[t * cols + j])).sum()
                    };
                    for (found, wanted) in
                        [(found.squares[i * cols + j], sum(&x)), (found.crossed[i * cols + j], sum(&y))]
                    {
                        assert!((f64::from(found) - wanted).abs() < 1e-3, "{found} {wanted}");
                    }
                }
            }
        }
    }

    #[test]
    fn dense_weights_are_given_back_and_others_as_their_codes_say() {
        let backend = CpuBackend::new(&CpuConfig::default()).unwrap();
        let (rows, cols) = (37, 50);
        let values = noise(rows * cols, 3);
        let bytes = to_bytes(&values, DType::F32);
        let view = MatrixView { bytes: &bytes, dtype: DType::F32, rows, cols };
        let dense = backend.pack(&[view], None, None).unwrap();
        assert_eq!(backend.weights(&dense).unwrap(), values);
        let scheme: Scheme = "a16w8".parse().unwrap();
        let found = backend.weights(&backend.pack(&[view], None, Some(scheme)).unwrap()).unwrap();
        assert!(found.iter().zip(&values).all(|(a, b)| (a - b).abs() < 0.01));
    }
}
