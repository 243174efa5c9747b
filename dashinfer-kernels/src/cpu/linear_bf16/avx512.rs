//! AVX-512 BF16: up to twelve rows by one panel, each row's sums in one register.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Job, Output};
use crate::cpu::linear::PANEL;

/// Rows of a register tile: enough chains to hide the latency of a dot product.
const MAX_ROWS: usize = 12;
/// Rows that pass over a panel together, so that their columns of a part stay in the L2 cache.
const ROW_BLOCK: usize = 96;
/// Input features of a part: 16 KiB of weights.
const PART: usize = 512;
/// How far ahead weights are fetched; as for other dense products.
const AHEAD_BYTES: usize = 8192;

/// See [`run`](super::run).
///
/// # Safety
/// The machine has AVX-512 BF16. No other thread may write the columns of `panels` of these rows; the ranges lie within the job.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    for first in rows.clone().step_by(ROW_BLOCK) {
        let block = first..rows.end.min(first + ROW_BLOCK);
        for panel in panels.clone() {
            for k in (0..job.padded.max(1)).step_by(PART) {
                let ks = k..job.padded.min(k + PART);
                let tiles = block.len().div_ceil(MAX_ROWS);
                let mut row = block.start;
                for tile in 0..tiles {
                    let next = block.start + block.len() * (tile + 1) / tiles;
                    // SAFETY: the caller's promise, passed on; the tile lies within the job.
                    unsafe { tile_of(job, row..next, panel, ks.clone(), out) };
                    row = next;
                }
            }
        }
    }
}

/// [`tile`] by its number of rows.
///
/// # Safety
/// As for [`product`]; there are 1 to 12 rows.
unsafe fn tile_of(job: &Job<'_>, rows: Range<usize>, panel: usize, ks: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match rows.len() {
            1 => tile::<1>(job, rows.start, panel, ks, out),
            2 => tile::<2>(job, rows.start, panel, ks, out),
            3 => tile::<3>(job, rows.start, panel, ks, out),
            4 => tile::<4>(job, rows.start, panel, ks, out),
            5 => tile::<5>(job, rows.start, panel, ks, out),
            6 => tile::<6>(job, rows.start, panel, ks, out),
            7 => tile::<7>(job, rows.start, panel, ks, out),
            8 => tile::<8>(job, rows.start, panel, ks, out),
            9 => tile::<9>(job, rows.start, panel, ks, out),
            10 => tile::<10>(job, rows.start, panel, ks, out),
            11 => tile::<11>(job, rows.start, panel, ks, out),
            _ => tile::<12>(job, rows.start, panel, ks, out),
        }
    }
}

/// `ROWS` rows from `row` on by one panel over the input features `ks`: sums start from the bias, or from where the part before ended.
///
/// # Safety
/// As for [`product`].
#[inline(never)] // one for each number of rows, not all in one
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile<const ROWS: usize>(job: &Job<'_>, row: usize, panel: usize, ks: Range<usize>, out: Output) {
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for (i, sums) in sums.iter_mut().enumerate() {
        let mut start = job.weight.panel_bias(panel);
        if ks.start > 0 {
            // SAFETY: this thread wrote these columns of this row in the part before.
            unsafe { out.load(row + i, panel, &mut start) };
        }
        // SAFETY: there are 16 values.
        *sums = unsafe { _mm512_loadu_ps(start.as_ptr()) };
    }
    let weights = job.weight.panel(panel)[ks.start * PANEL * 2..ks.end * PANEL * 2].as_ptr();
    let x = job.x[row * job.padded..(row + ROWS) * job.padded].as_ptr().wrapping_add(ks.start);
    for k in (0..ks.len()).step_by(2) {
        _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(k * PANEL * 2 + AHEAD_BYTES).cast());
        // SAFETY: `k` lies within the part, whose length is even, so the pair exists in the weights and in each row.
        unsafe {
            let pairs: __m512bh = std::mem::transmute(_mm512_loadu_si512(weights.add(k * PANEL * 2).cast()));
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(x.add(i * job.padded + k).cast::<i32>().read_unaligned());
                *sums = _mm512_dpbf16_ps(*sums, pairs, std::mem::transmute::<__m512i, __m512bh>(x));
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        let mut values = [0.0; PANEL];
        // SAFETY: `values` holds 16 values; the caller gives this thread these columns of these rows.
        unsafe {
            _mm512_storeu_ps(values.as_mut_ptr(), *sums);
            out.store(row + i, panel, &values);
        }
    }
}
