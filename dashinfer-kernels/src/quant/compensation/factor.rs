//! `H = L D Lᵀ` with `L` upper triangular, ones on its diagonal, and `D` diagonal: a Cholesky factorization from the last column to the first.

use super::{ForEach, Panels, WIDTH, for_chunks};
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
use crate::cpu::Isa;

/// `L` and `D`.
#[derive(Debug)]
pub(super) struct Factor {
    /// What is below the diagonal is not read.
    pub(super) unit: Panels,
    pub(super) diagonal: Vec<f32>,
}

/// Factors a symmetric matrix; `None` if it is not positive definite in f32.
pub(super) fn factor(matrix: &Panels, for_each: &ForEach<'_>) -> Option<Factor> {
    const ROWS: usize = 8;
    let len = matrix.padded();
    // Row by row, each row from its diagonal on, as updates need them.
    let mut left = vec![0.0f32; len * len];
    for_chunks(for_each, &mut left, len, &|i, row| {
        for (panel, to) in row.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
            *to = matrix.panel(panel * WIDTH)[i];
        }
    });
    let mut unit = matrix.clone();
    let mut diagonal = vec![0.0f32; len];
    for first in (0..len).step_by(WIDTH).rev() {
        let panel = &mut unit.panel_mut(first)[..first + WIDTH];
        for (i, row) in panel.iter_mut().enumerate() {
            row.copy_from_slice(&left[i * len + first..][..WIDTH]);
        }
        let (above, square) = panel.split_at_mut(first);
        let mut own = [[0.0; WIDTH]; WIDTH];
        own.copy_from_slice(square);
        let pivots = factor_square(&mut own)?;
        square.copy_from_slice(&own);
        for_chunks(for_each, above, 64, &|_, rows| rows.iter_mut().for_each(|row| solve_row(row, &own, &pivots)));
        for (i, pivot) in pivots.iter().enumerate() {
            diagonal[first + i] = pivot * pivot;
        }
        let transposed: Vec<f32> = (0..WIDTH).flat_map(|k| above.iter().map(move |row| row[k])).collect();
        for_chunks(for_each, &mut left[..first * len], ROWS * len, &|chunk, rows| {
            for (i, row) in (chunk * ROWS..).zip(rows.chunks_exact_mut(len)) {
                let from = i / WIDTH * WIDTH;
                subtract_outer(&mut row[from..first], &above[i], &transposed, from, first);
            }
        });
        // Of R, L is what is left when each column is divided by its diagonal.
        for row in &mut *panel {
            for (value, pivot) in row.iter_mut().zip(&pivots) {
                *value /= pivot;
            }
        }
    }
    Some(Factor { unit, diagonal })
}

/// Factors a square on the diagonal in place; its pivots.
fn factor_square(square: &mut [[f32; WIDTH]; WIDTH]) -> Option<[f32; WIDTH]> {
    let mut pivots = [0.0; WIDTH];
    for k in (0..WIDTH).rev() {
        let was = square[k][k];
        let pivot = was - square[k][k + 1..].iter().map(|value| value * value).sum::<f32>();
        // Below that, it is what rounding has left.
        if !(pivot.is_finite() && pivot > 0.0) {
            return None;
        }
        pivots[k] = pivot.sqrt();
        square[k][k] = pivots[k];
        let row = square[k];
        for above in &mut square[..k] {
            let sum: f32 = above[k + 1..].iter().zip(&row[k + 1..]).map(|(a, b)| a * b).sum();
            above[k] = (above[k] - sum) / pivots[k];
        }
    }
    Some(pivots)
}

/// A row above the square: from what is left of `H` to `R`.
fn solve_row(row: &mut [f32; WIDTH], square: &[[f32; WIDTH]; WIDTH], pivots: &[f32; WIDTH]) {
    for k in (0..WIDTH).rev() {
        let sum: f32 = row[k + 1..].iter().zip(&square[k][k + 1..]).map(|(a, b)| a * b).sum();
        row[k] = (row[k] - sum) / pivots[k];
    }
}

/// `row[j] −= Σ_k factors[k] · columns[k][from + j]`, with `stride` values between the columns.
fn subtract_outer(row: &mut [f32], factors: &[f32; WIDTH], columns: &[f32], from: usize, stride: usize) {
    #[cfg(all(feature = "x86", target_arch = "x86_64"))]
    if Isa::Avx2.is_available() {
        // SAFETY: the machine has AVX2.
        unsafe { subtract_outer_avx2(row, factors, columns, from, stride) };
        return;
    }
    subtract_outer_plain(row, factors, columns, from, stride);
}

/// # Safety
/// The machine has AVX2.
#[cfg(all(feature = "x86", target_arch = "x86_64"))]
#[target_feature(enable = "avx2")]
unsafe fn subtract_outer_avx2(row: &mut [f32], factors: &[f32; WIDTH], columns: &[f32], from: usize, stride: usize) {
    subtract_outer_plain(row, factors, columns, from, stride);
}

#[inline(always)]
fn subtract_outer_plain(row: &mut [f32], factors: &[f32; WIDTH], columns: &[f32], from: usize, stride: usize) {
    for (part, row) in row.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
        let mut own = *row;
        for (k, factor) in factors.iter().enumerate() {
            let column = &columns[k * stride + from + part * WIDTH..][..WIDTH];
            for i in 0..WIDTH {
                own[i] -= factor * column[i];
            }
        }
        *row = own;
    }
}
