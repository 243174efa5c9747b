//! Arm's `bf16`: up to four rows by one panel; one instruction multiplies four input features of two output features with those of two
//! rows.
//!
//! It adds the products of two pairs, one pair after the other, each sum rounded to odd and without denormals. So a sum is always made by
//! this one instruction, also of a row that has no second beside it, which is multiplied with itself: then it has the same bits however many
//! rows there are.

use std::arch::aarch64::*;
use std::arch::asm;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::{Job, Output};
use crate::cpu::linear::{PANEL, prefetch};

/// Rows of a register tile: 16 registers of sums.
const MAX_ROWS: usize = 4;
/// Rows that pass over a panel together, so that their columns of a part stay in the L2 cache.
const ROW_BLOCK: usize = 96;
/// Input features of a part: 16 KiB of weights.
const PART: usize = 512;
/// From this many rows on, a part is put into the order that it is multiplied in once for all of them: two tiles.
const ORDER_FROM: usize = 5;
/// How far ahead weights are fetched; as for other dense products.
const AHEAD_BYTES: usize = 8192;
/// Weights of four input features.
const STEP: usize = 4 * PANEL;

/// A part of a panel in the order that it is multiplied in.
#[repr(align(64))]
struct Ordered([MaybeUninit<u16>; PART * PANEL]);

/// Some rows by one panel over some input features.
#[derive(Clone)]
struct Tile<'a> {
    job: &'a Job<'a>,
    row: usize,
    panel: usize,
    /// A multiple of eight.
    ks: Range<usize>,
    /// The panel's weights of `ks`.
    weights: *const u16,
    /// What to fetch meanwhile; never read otherwise.
    ahead: *const u16,
    out: Output,
}

/// See [`run`](super::run).
///
/// # Safety
/// The machine has `bf16`. No other thread may write the columns of `panels` of these rows; the ranges lie within the job.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let order = rows.len() >= ORDER_FROM;
    let mut ordered = Ordered([const { MaybeUninit::uninit() }; PART * PANEL]);
    let ordered = ordered.0.as_mut_ptr().cast::<u16>();
    for first in rows.clone().step_by(ROW_BLOCK) {
        let block = first..rows.end.min(first + ROW_BLOCK);
        for panel in panels.clone() {
            for k in (0..job.padded.max(1)).step_by(PART) {
                let ks = k..job.padded.min(k + PART);
                let weights = job.weight.panel(panel)[ks.start * PANEL * 2..ks.end * PANEL * 2].as_ptr().cast::<u16>();
                let ahead = weights.wrapping_add(AHEAD_BYTES / 2);
                let mut tile = Tile { job, row: first, panel, ks, weights, ahead, out };
                let tiles = block.len().div_ceil(MAX_ROWS);
                if order {
                    // SAFETY: the weights of `ks` exist, and the buffer holds a part.
                    unsafe { order_part(weights, tile.ks.len(), ordered) };
                    tile.weights = ordered;
                }
                for index in 0..tiles {
                    let next = block.start + block.len() * (index + 1) / tiles;
                    // SAFETY: the caller's promise, passed on; the tile lies within the job.
                    unsafe {
                        match (next - tile.row, order) {
                            (1, false) => tile_of::<1, false>(&tile),
                            (2, false) => tile_of::<2, false>(&tile),
                            (3, false) => tile_of::<3, false>(&tile),
                            (_, false) => tile_of::<4, false>(&tile),
                            (1, true) => tile_of::<1, true>(&tile),
                            (2, true) => tile_of::<2, true>(&tile),
                            (3, true) => tile_of::<3, true>(&tile),
                            (_, true) => tile_of::<4, true>(&tile),
                        }
                    }
                    tile.row = next;
                }
            }
        }
    }
}

/// The weights of four input features of output features `4 · part` to `4 · part + 3`: of the first two, four in a row of each, and of the
/// other two.
///
/// # Safety
/// They can be read: pairs of input features as they are packed, or what [`order_part`] made of them.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn fours<const ORDERED: bool>(weights: *const u16, part: usize) -> [uint16x8_t; 2] {
    // SAFETY: the caller's promise; a pair of input features is 32 values.
    unsafe {
        if ORDERED {
            return [vld1q_u16(weights.add(part * 16)), vld1q_u16(weights.add(part * 16 + 8))];
        }
        let [first, second] = [0, 2 * PANEL].map(|pair| vld1q_u32(weights.add(pair + part * 8).cast()));
        [vzip1q_u32(first, second), vzip2q_u32(first, second)].map(|fours| vreinterpretq_u16_u32(fours))
    }
}

/// Brings `len` input features into the order that they are multiplied in.
///
/// # Safety
/// `from` and `to` hold as many, a multiple of four, of a panel.
#[target_feature(enable = "neon")]
unsafe fn order_part(from: *const u16, len: usize, to: *mut u16) {
    for k in (0..len).step_by(4) {
        for part in 0..4 {
            // SAFETY: four input features from `k` on exist on both sides.
            unsafe {
                let [first, second] = fours::<false>(from.add(k * PANEL), part);
                let to = to.add(k * PANEL + part * 16);
                vst1q_u16(to, first);
                vst1q_u16(to.add(8), second);
            }
        }
    }
}

/// `ROWS` rows: sums start from the bias, or from where the part before ended.
///
/// # Safety
/// As for [`product`]; the tile lies within the job, and its weights can be read.
#[inline(never)] // one for each number of rows, not all in one
#[target_feature(enable = "neon,bf16")]
unsafe fn tile_of<const ROWS: usize, const ORDERED: bool>(tile: &Tile<'_>) {
    let num_pairs = ROWS.div_ceil(2);
    // The rows of a pair; an odd one is its own second.
    let rows = |pair: usize| [2 * pair, (2 * pair + 1).min(ROWS - 1)];
    // Of each pair of rows: of two output features, `[feature][row]`.
    let mut sums = [[vdupq_n_f32(0.0); 8]; MAX_ROWS / 2];
    for (pair, sums) in sums.iter_mut().enumerate().take(num_pairs) {
        let [a, b] = rows(pair).map(|i| {
            let mut start = tile.job.weight.panel_bias(tile.panel);
            if tile.ks.start > 0 {
                // SAFETY: this thread wrote these columns of this row in the part before.
                unsafe { tile.out.load(tile.row + i, tile.panel, &mut start) };
            }
            start
        });
        for part in 0..4 {
            // SAFETY: four values from `4 · part` on are among 16.
            let [a, b] = unsafe { [vld1q_f32(a.as_ptr().add(part * 4)), vld1q_f32(b.as_ptr().add(part * 4))] };
            (sums[2 * part], sums[2 * part + 1]) = (vzip1q_f32(a, b), vzip2q_f32(a, b));
        }
    }
    let padded = tile.job.padded;
    let x = tile.job.x[tile.row * padded..(tile.row + ROWS) * padded].as_ptr().wrapping_add(tile.ks.start);
    for k in (0..tile.ks.len()).step_by(8) {
        // With many rows, later tiles find what the first fetched; a row at a time, four lines are what is read here.
        for line in 0..if ORDERED { 1 } else { 4 } {
            prefetch(tile.ahead.wrapping_add(k * PANEL + line * 32).cast());
        }
        // Four input features of both rows of a pair, and the four behind them.
        let mut x8 = [[vdupq_n_u16(0); 2]; MAX_ROWS / 2];
        for (pair, x8) in x8.iter_mut().enumerate().take(num_pairs) {
            // SAFETY: the length of a part is a multiple of eight, so eight values from `k` on exist in each row.
            let [a, b] = rows(pair).map(|i| unsafe { vreinterpretq_u64_u16(vld1q_u16(x.add(i * padded + k))) });
            *x8 = [vzip1q_u64(a, b), vzip2q_u64(a, b)].map(|x| vreinterpretq_u16_u64(x));
        }
        for step in 0..2 {
            for part in 0..4 {
                // SAFETY: the weights of eight input features from `k` on exist.
                let [first, second] = unsafe { fours::<ORDERED>(tile.weights.add(k * PANEL + step * STEP), part) };
                for (sums, x8) in sums.iter_mut().zip(&x8).take(num_pairs) {
                    sums[2 * part] = bfmmla(sums[2 * part], first, x8[step]);
                    sums[2 * part + 1] = bfmmla(sums[2 * part + 1], second, x8[step]);
                }
            }
        }
    }
    for i in 0..ROWS {
        let mut values = [0.0; PANEL];
        for part in 0..4 {
            let [first, second] = [sums[i / 2][2 * part], sums[i / 2][2 * part + 1]];
            let row = if i % 2 == 0 { vuzp1q_f32(first, second) } else { vuzp2q_f32(first, second) };
            // SAFETY: four values from `4 · part` on are among 16.
            unsafe { vst1q_f32(values.as_mut_ptr().add(part * 4), row) };
        }
        // SAFETY: the caller gives this thread these columns of these rows.
        unsafe { tile.out.store(tile.row + i, tile.panel, &values) };
    }
}

/// `sum[2i + j] + Σₖ a[4i + k] · b[4j + k]`, the first two products, then the other two. There is no intrinsic in stable Rust.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn bfmmla(mut sum: float32x4_t, a: uint16x8_t, b: uint16x8_t) -> float32x4_t {
    // SAFETY: `bf16` is on in this function; the instruction only computes.
    unsafe {
        asm!("bfmmla {0:v}.4s, {1:v}.8h, {2:v}.8h", inout(vreg) sum, in(vreg) a, in(vreg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}
