//! The definition of a dense product over panels: one chain of fused multiply-adds for each output.

use std::ops::Range;

use super::pack::place;
use super::{Job, Output};
use crate::element;

/// Columns of `panels` for the rows of `rows`.
///
/// # Safety
/// No other thread may write these columns of these rows; the ranges lie within the job.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let (k, dtype) = (job.weight.cols(), job.weight.dtype());
    for panel in panels {
        let (weights, bias) = (job.weight.panel(panel), job.weight.panel_bias(panel));
        for row in rows.clone() {
            let x = &job.x[row * k..][..k];
            let mut sums = bias;
            for (k, x) in x.iter().enumerate() {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum = x.mul_add(element(weights, dtype, place(lane, k, dtype)), *sum);
                }
            }
            // SAFETY: the caller gives this thread these columns of these rows.
            unsafe { out.store(row, panel, &sums) };
        }
    }
}
