//! The definition: both operands in bf16, products exact, sums one chain in f32.

use std::ops::Range;

use super::{Job, Output, value};
use crate::cpu::linear::place;
use crate::{DType, element};

/// Columns of `panels` for the rows of `rows`.
///
/// # Safety
/// No other thread may write these columns of these rows; the ranges lie within the job.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    for panel in panels {
        let weights = job.weight.panel(panel);
        for row in rows.clone() {
            let mut sums = job.weight.panel_bias(panel);
            for (k, x) in job.x[row * job.padded..][..job.padded].iter().enumerate() {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum = value(*x).mul_add(element(weights, DType::BF16, place(lane, k, DType::BF16)), *sum);
                }
            }
            // SAFETY: the caller gives this thread these columns of these rows.
            unsafe { out.store(row, panel, &sums) };
        }
    }
}
