//! AMX: up to 32 rows by two panels in eight tiles, however few the rows: a tile's sums have an order of their own, so all rows must
//! have it.

use std::ops::Range;

use super::{Job, Output};
use crate::cpu::amx::{Block, BlockSums, Place, ROWS, for_blocks, multiply_bf16};
use crate::cpu::linear::PANEL;

/// Input features of a part; as for bytes, with half as many in as much memory.
const PART: usize = 1024;

/// See [`run`](super::run).
///
/// # Safety
/// The machine has AMX for bf16. No other thread may write the columns of `panels` of these rows; the ranges lie within the job.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let mut sums = BlockSums([[[[0.0; PANEL]; ROWS]; 2]; 2]);
    // SAFETY: the machine has AMX; the tiles have the shapes of each place, which lies within the job; the caller's promise is passed on.
    unsafe { for_blocks(rows, panels, job.padded, PART, |place| block(job, &place, &mut sums, out)) };
}

/// One block: sums start from the bias, or from where the part before ended.
///
/// # Safety
/// As for [`product`], for `place`; this thread's tiles have its shapes.
unsafe fn block(job: &Job<'_>, place: &Place, sums: &mut BlockSums<f32>, out: Output) {
    let Place { rows, panels, ks } = place;
    for (side, panel) in panels.clone().enumerate() {
        let bias = job.weight.panel_bias(panel);
        for (i, row) in rows.clone().enumerate() {
            let sums = &mut sums.0[i / ROWS][side][i % ROWS];
            if ks.start == 0 {
                *sums = bias;
            } else {
                // SAFETY: this thread wrote these columns of this row in the part before.
                unsafe { out.load(row, panel, sums) };
            }
        }
    }
    let weights = place.panels().map(|panel| job.weight.panel(panel)[ks.start * PANEL * 2..].as_ptr());
    let x = place.first_rows().map(|row| job.x[row * job.padded + ks.start..].as_ptr().cast());
    let block = Block { x, x_stride: job.padded * 2, weights, steps: ks.len() / 32 };
    // SAFETY: the tiles have the shapes of this block, whose rows, panels and input features exist.
    unsafe { multiply_bf16(&block, sums) };
    for (side, panel) in panels.clone().enumerate() {
        for (i, row) in rows.clone().enumerate() {
            // SAFETY: the caller gives this thread these columns of these rows.
            unsafe { out.store(row, panel, &sums.0[i / ROWS][side][i % ROWS]) };
        }
    }
}
