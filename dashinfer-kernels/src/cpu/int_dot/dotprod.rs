//! `dotprod`: one instruction adds four products for each of four columns.
//!
//! It wants both sides signed or neither, so weights are made signed as for NEON.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::linear::PANEL;
use super::neon::{four_steps, load_signed, store};
use super::{Bits, Group};

/// See [`scalar::dots`](super::scalar::dots).
///
/// # Safety
/// The machine has `dotprod`; `out` has the group's rows.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn dots(group: &Group<'_>, out: &mut [[i32; PANEL]]) {
    match group.bits {
        Bits::Eight => typed::<8>(group, out),
        Bits::Four => typed::<4>(group, out),
    }
}

#[target_feature(enable = "neon,dotprod")]
fn typed<const BITS: usize>(group: &Group<'_>, out: &mut [[i32; PANEL]]) {
    // 16 accumulators at most. So more than four rows take half of the columns at a time.
    match out.len() {
        1 => tile::<BITS, 1, 4>(group, 0, out),
        2 => tile::<BITS, 2, 4>(group, 0, out),
        3 => tile::<BITS, 3, 4>(group, 0, out),
        4 => tile::<BITS, 4, 4>(group, 0, out),
        5 => (0..2).for_each(|half| tile::<BITS, 5, 2>(group, half, out)),
        6 => (0..2).for_each(|half| tile::<BITS, 6, 2>(group, half, out)),
        7 => (0..2).for_each(|half| tile::<BITS, 7, 2>(group, half, out)),
        _ => (0..2).for_each(|half| tile::<BITS, 8, 2>(group, half, out)),
    }
}

/// All rows of a group by `4 · REGS` of its columns, part `part` of them.
#[target_feature(enable = "neon,dotprod")]
fn tile<const BITS: usize, const ROWS: usize, const REGS: usize>(
    group: &Group<'_>,
    part: usize,
    out: &mut [[i32; PANEL]],
) {
    let (weights, quads) = (group.part(part * REGS * 4), group.quads());
    let rows: [*const i8; ROWS] = std::array::from_fn(|i| group.x[i].as_ptr());
    // SAFETY: only called for quads that exist; the part's columns are among theirs.
    let load = |quad: usize| unsafe { load_signed::<BITS, REGS>(weights.add(quad * PANEL * BITS / 2)) };
    let mut acc = [[vdupq_n_s32(0); REGS]; ROWS];
    let whole = quads / 4 * 4;
    for quad in (0..whole).step_by(4) {
        // SAFETY: rows have four steps for each quad, 16 for these four.
        let x = rows.map(|row| unsafe { vld1q_s8(row.add(quad * 4)) });
        step::<0, ROWS, REGS>(&mut acc, load(quad), &x);
        step::<1, ROWS, REGS>(&mut acc, load(quad + 1), &x);
        step::<2, ROWS, REGS>(&mut acc, load(quad + 2), &x);
        step::<3, ROWS, REGS>(&mut acc, load(quad + 3), &x);
    }
    for quad in whole..quads {
        // SAFETY: as above.
        let x = rows.map(|row| unsafe { four_steps(row.add(quad * 4)) });
        step::<0, ROWS, REGS>(&mut acc, load(quad), &x);
    }
    for (i, acc) in acc.into_iter().enumerate() {
        store::<BITS, REGS>(acc, group.x[i], &mut out[i][part * REGS * 4..]);
    }
}

/// Four steps of `k`: those in lane `LANE` of each row's `x` by the weights.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn step<const LANE: usize, const ROWS: usize, const REGS: usize>(
    acc: &mut [[int32x4_t; REGS]; ROWS],
    weights: [int8x16_t; REGS],
    x: &[int8x16_t; ROWS],
) {
    for (acc, x) in acc.iter_mut().zip(x) {
        for (acc, weights) in acc.iter_mut().zip(weights) {
            *acc = sdot::<LANE>(*acc, weights, *x);
        }
    }
}

/// `acc[i] + Σₖ a[4i + k] · b[4 LANE + k]`. `vdotq_laneq_s32` needs Rust 1.98.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const LANE: usize>(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: `dotprod` is on in this function; the instruction only computes.
    unsafe {
        asm!("sdot {acc:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]",
             acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b, lane = const LANE,
             options(pure, nomem, nostack, preserves_flags));
    }
    acc
}
