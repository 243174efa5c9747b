//! Rounding that makes up for its own errors: the codes of a matrix chosen together, so that its *products* are near, not its weights.
//!
//! With inputs `x` as they will come and inputs `y` as they would come if nothing had been rounded, the codes `Q` of a weight `W` should make
//! `Σ |W y − Q x|²` small. All there is to know of the inputs are two sums, `Σ x xᵀ` and `Σ y xᵀ` ([`InputSums`]), and each output feature
//! stands for itself. For each:
//!
//! 1. The weights that would be best if they need not be rounded: `T = W · (Σ y xᵀ + λ) · (Σ x xᵀ + λ)⁻¹`, which makes up for the rounding of what
//!    comes before the matrix (as in <https://arxiv.org/abs/2504.02692>).
//! 2. From the first input feature to the last, what rounding a weight has cost is spread over those behind it (GPTQ,
//!    <https://arxiv.org/abs/2210.17323>, in the form of <https://arxiv.org/abs/2307.13304>, which needs no inverse). A group's scale is
//!    chosen when it is reached.
//! 3. Twice over all groups: the best scale for the codes, then the best code for each weight, all others as they are
//!    (<https://arxiv.org/abs/2309.01885>).
//!
//! Output features are shared among threads, and nothing is summed in an order that depends on them; instruction sets agree to the bit.

mod factor;
mod panels;
mod rows;

use crate::error::check;
use crate::{CodeBits, CodeLayout, GroupedCodes, KernelError, Scheme};

use factor::factor;
use panels::{Panels, WIDTH};

use super::WeightBits;

/// Added to the squares of the inputs, as a part of their mean: what is not known of inputs that were never seen.
const DAMPING: f32 = 0.01;

/// As often is more damping tried, ten times as much each time, where inputs are too much alike.
const ATTEMPTS: usize = 4;

/// Passes over all groups after the first. More of them gain little.
const SWEEPS: usize = 2;

/// Output features that a task treats together, so that the sums of the inputs are read once for all of them.
const ROWS: usize = 16;

/// What the inputs of a matrix were, over all tokens that were looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct InputSums {
    /// Input features, `K`.
    pub cols: usize,
    /// `[K, K]`: the products of every two inputs as they come, summed.
    pub squares: Vec<f32>,
    /// `[K, K]`: the products of each input as it should be (rows) with each as it comes (columns), summed.
    pub crossed: Vec<f32>,
}

/// Codes that [`compensate`] has found.
#[derive(Debug, Clone, PartialEq)]
pub struct CompensatedCodes {
    shape: [usize; 2],
    layout: CodeLayout,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl CompensatedCodes {
    /// The codes, to be packed.
    ///
    /// # Errors
    /// None that can be helped: lengths and bits are what they must be.
    pub fn matrix(&self) -> Result<GroupedCodes<'_>, KernelError> {
        GroupedCodes::new(self.shape, self.layout, &self.codes, &self.scales, &self.zeros)
    }
}

/// Calls a task once for each number below the first argument, on as many threads as there are.
pub type ForEach<'a> = dyn Fn(usize, &(dyn Fn(usize) + Sync)) + 'a;

/// Whether [`compensate`] finds codes of `scheme`: those of 4 bits. With 8 bits there is next to nothing to make up for.
#[must_use]
pub fn can_compensate(scheme: Scheme) -> bool {
    scheme.weight_bits() == WeightBits::Four
}

/// The codes of `weights` `[rows, K]` by `scheme`, for inputs like those of `sums`. `None` if nothing can be learnt
/// from them, because all were zero, or they depend on each other too much: then weights are to be rounded one by one.
///
/// Beside the sums it takes 16 `K²` bytes, and some rows of weights for each thread.
///
/// # Errors
/// [`KernelError::Shape`] if lengths are off; [`KernelError::NotFinite`]; [`KernelError::Unsupported`] for a scheme without 4-bit codes.
pub fn compensate(
    weights: &[f32],
    sums: InputSums,
    scheme: Scheme,
    for_each: &ForEach<'_>,
) -> Result<Option<CompensatedCodes>, KernelError> {
    compensate_in(SWEEPS, weights, sums, scheme, for_each)
}

fn compensate_in(
    sweeps: usize,
    weights: &[f32],
    sums: InputSums,
    scheme: Scheme,
    for_each: &ForEach<'_>,
) -> Result<Option<CompensatedCodes>, KernelError> {
    const OP: &str = "compensate";
    let InputSums { cols, squares, crossed } = sums;
    let Some(group) = scheme.group().filter(|_| can_compensate(scheme)) else {
        return Err(KernelError::Unsupported { op: OP, what: format!("codes of {scheme}"), backend: "cpu" });
    };
    let rows = weights.len() / cols.max(1);
    check(OP, "weights", rows * cols, weights.len())?;
    check(OP, "squares of the inputs", cols.saturating_mul(cols), squares.len())?;
    check(OP, "crossed products of the inputs", cols.saturating_mul(cols), crossed.len())?;
    let is_finite = |values: &[f32]| values.iter().map(|value| value * 0.0).sum::<f32>() == 0.0;
    for (what, values) in [("a weight", weights), ("an input", &squares), ("an input", &crossed)] {
        if !is_finite(values) {
            return Err(KernelError::NotFinite { op: OP, what });
        }
    }
    let mean = (0..cols).map(|i| squares[i * cols + i]).sum::<f32>() / cols.max(1) as f32;
    if rows == 0 || mean <= 0.0 {
        return Ok(None);
    }
    let mut shift = Panels::new(cols, |i, j| crossed[i * cols + j] - squares[i * cols + j]);
    drop(crossed);
    let mut damping = DAMPING * mean;
    for _ in 0..ATTEMPTS {
        let damped = Panels::new(cols, |i, j| squares[i * cols + j] + if i == j { damping } else { 0.0 });
        if let Some(factor) = factor(&damped, for_each) {
            shift.clear_padding();
            let problem = rows::Problem::new(scheme, group.size(), &damped, &factor, &shift, sweeps);
            return Ok(Some(solve(&problem, weights, [rows, cols], for_each)));
        }
        damping *= 10.0;
    }
    Ok(None)
}

/// All rows, some to a task.
fn solve(
    problem: &rows::Problem<'_>,
    weights: &[f32],
    [rows, cols]: [usize; 2],
    for_each: &ForEach<'_>,
) -> CompensatedCodes {
    let zero_points = problem.scheme.has_zero_points();
    let layout = CodeLayout { bits: CodeBits::Four, group: Some(problem.group), zero_points };
    let groups = layout.groups(cols);
    let mut found: Vec<rows::Codes> = Vec::new();
    found.resize_with(rows.div_ceil(ROWS), rows::Codes::default);
    for_chunks(for_each, &mut found, 1, &|task, found| {
        let weights = &weights[task * ROWS * cols..][..ROWS.min(rows - task * ROWS) * cols];
        found[0] = problem.solve(weights, cols);
    });
    let mut codes = Vec::with_capacity(rows * cols);
    let (mut scales, mut zeros) = (Vec::with_capacity(rows * groups), Vec::new());
    for found in found {
        codes.extend(found.codes);
        scales.extend(found.scales);
        if zero_points {
            zeros.extend(found.zeros);
        }
    }
    CompensatedCodes { shape: [rows, cols], layout, codes, scales, zeros }
}

/// Calls `task` with each run of `len` of `items` and its number.
fn for_chunks<T: Send>(for_each: &ForEach<'_>, items: &mut [T], len: usize, task: &(dyn Fn(usize, &mut [T]) + Sync)) {
    use std::sync::{Mutex, PoisonError};
    let chunks: Vec<_> = items.chunks_mut(len).map(Mutex::new).collect();
    for_each(chunks.len(), &|i| task(i, &mut chunks[i].lock().unwrap_or_else(PoisonError::into_inner)));
}

#[cfg(test)]
mod tests;
