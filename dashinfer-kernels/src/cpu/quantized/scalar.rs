//! The definition of a product with quantized weights: exact sums of integers, one multiply-add for each group.

use std::ops::Range;

use super::{Job, Output};
use crate::quant::PANEL;

/// `out[t, n] = bias[n] + Σ_g (scale_w[n, g] · scale_x[t, g]) · Σ_{k in g} (w[n, k] − zero[n, g]) · x[t, k]`, the outer sum one chain of
/// fused multiply-adds in the order of the groups.
///
/// # Safety
/// No other thread may write the columns of `panels` of these rows; the ranges lie within the job.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let cut = job.weight.cut();
    for panel in panels {
        for row in rows.clone() {
            let mut sums = job.weight.panel_bias(panel);
            for (group, scale_x) in job.x.scales(row)[..cut.groups()].iter().enumerate() {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    let params = job.weight.params(panel, lane, group);
                    let dot = (group * cut.group..(group + 1) * cut.group).fold(0, |dot: i32, k| {
                        let weight = i32::from(job.weight.code(panel, lane, k)) - i32::from(params.zero);
                        dot.wrapping_add(weight * job.x.code(row, k))
                    });
                    *sum = (dot as f32).mul_add(params.scale.to_f32() * scale_x, *sum);
                }
            }
            let sums: [f32; PANEL] = sums;
            // SAFETY: the caller gives this thread these columns of these rows.
            unsafe { out.store(row, panel, &sums) };
        }
    }
}
