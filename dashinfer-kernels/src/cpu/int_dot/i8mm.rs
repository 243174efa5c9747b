//! `i8mm`: one instruction multiplies eight steps of two columns with those of two rows, unsigned by signed.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::linear::PANEL;
use super::neon::{four_steps, load};
use super::{Bits, Group};

/// See [`scalar::dots`](super::scalar::dots).
///
/// # Safety
/// The machine has `i8mm`; `out` has the group's rows.
#[target_feature(enable = "neon,i8mm")]
pub(super) unsafe fn dots(group: &Group<'_>, out: &mut [[i32; PANEL]]) {
    match group.bits {
        Bits::Eight => typed::<8>(group, out),
        Bits::Four => typed::<4>(group, out),
    }
}

#[target_feature(enable = "neon,i8mm")]
fn typed<const BITS: usize>(group: &Group<'_>, out: &mut [[i32; PANEL]]) {
    // 16 accumulators at most. So more than four rows take half of the columns at a time.
    match out.len() {
        1 => row::<BITS>(group, &mut out[0]),
        2 => tile::<BITS, 1, 4>(group, 0, out),
        3 | 4 => tile::<BITS, 2, 4>(group, 0, out),
        5 | 6 => (0..2).for_each(|half| tile::<BITS, 3, 2>(group, half, out)),
        _ => (0..2).for_each(|half| tile::<BITS, 4, 2>(group, half, out)),
    }
}

/// The only row of a group: without a second one, half of each product of matrices would be lost.
#[target_feature(enable = "neon,i8mm")]
fn row<const BITS: usize>(group: &Group<'_>, out: &mut [i32; PANEL]) {
    let (weights, x) = (group.part(0), group.x[0].as_ptr());
    let step = |acc: &mut [int32x4_t; 4], quad: usize| {
        // SAFETY: only called for quads that exist; the row has four steps for each.
        let (w, x) = unsafe { (load::<BITS, 4>(weights.add(quad * PANEL * BITS / 2)), four_steps(x.add(quad * 4))) };
        for (acc, w) in acc.iter_mut().zip(w) {
            *acc = usdot(*acc, w, x);
        }
    };
    // Two sums for each column hide the latency of the instruction.
    let (mut even, mut odd) = ([vdupq_n_s32(0); 4], [vdupq_n_s32(0); 4]);
    let (quads, whole) = (group.quads(), group.quads() / 2 * 2);
    for quad in (0..whole).step_by(2) {
        step(&mut even, quad);
        step(&mut odd, quad + 1);
    }
    if whole < quads {
        step(&mut even, whole);
    }
    for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // SAFETY: `out` holds four values.
        unsafe { vst1q_s32(out.as_mut_ptr(), vaddq_s32(even[i], odd[i])) };
    }
}

/// All rows of a group, in pairs, by `4 · REGS` of its columns, part `part` of them. An odd row is paired with itself.
#[target_feature(enable = "neon,i8mm")]
fn tile<const BITS: usize, const PAIRS: usize, const REGS: usize>(
    group: &Group<'_>,
    part: usize,
    out: &mut [[i32; PANEL]],
) {
    let (weights, quads, last) = (group.part(part * REGS * 4), group.quads(), group.x.len() - 1);
    let pairs: [_; PAIRS] = std::array::from_fn(|i| [2 * i, 2 * i + 1].map(|row| group.x[row.min(last)].as_ptr()));
    // SAFETY: only called for quads that exist; the part's columns are among theirs.
    let load = |quad: usize| unsafe { load::<BITS, REGS>(weights.add(quad * PANEL * BITS / 2)) };
    // Of each four columns by a pair of rows: two columns, then the other two; in each of them `[column][row]`.
    let mut acc = [[[vdupq_n_s32(0); 2]; REGS]; PAIRS];
    let whole = quads / 2 * 2;
    for quad in (0..whole).step_by(2) {
        let x = pairs.map(|pair| {
            // SAFETY: rows have four steps for each quad, eight for these two.
            let [a, b] = pair.map(|row| unsafe { vld1_s8(row.add(quad * 4)) });
            vcombine_s8(a, b)
        });
        step(&mut acc, load(quad), load(quad + 1), &x);
    }
    if whole < quads {
        let x = pairs.map(|pair| {
            // SAFETY: as above.
            let [a, b] = pair.map(|row| vget_low_s8(unsafe { four_steps(row.add(whole * 4)) }));
            vcombine_s8(a, b)
        });
        // The row's four steps stand there twice; the second time they meet zeros.
        step(&mut acc, load(whole), [vdupq_n_u8(0); REGS], &x);
    }
    for (out, acc) in out.chunks_mut(2).zip(acc) {
        for (row, out) in out.iter_mut().enumerate() {
            let out = out[part * REGS * 4..].as_chunks_mut::<4>().0;
            for (out, [a, b]) in out.iter_mut().zip(acc) {
                let dots = if row == 0 { vuzp1q_s32(a, b) } else { vuzp2q_s32(a, b) };
                // SAFETY: `out` holds four values.
                unsafe { vst1q_s32(out.as_mut_ptr(), dots) };
            }
        }
    }
}

/// Eight steps of `k`, in two quads of weights, by a pair of rows in each of `x`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn step<const PAIRS: usize, const REGS: usize>(
    acc: &mut [[[int32x4_t; 2]; REGS]; PAIRS],
    first: [uint8x16_t; REGS],
    second: [uint8x16_t; REGS],
    x: &[int8x16_t; PAIRS],
) {
    for (i, (first, second)) in first.into_iter().zip(second).enumerate() {
        // Columns have four steps in each: to eight in a row.
        let [first, second] = [vreinterpretq_u32_u8(first), vreinterpretq_u32_u8(second)];
        let low = vreinterpretq_u8_u32(vzip1q_u32(first, second));
        let high = vreinterpretq_u8_u32(vzip2q_u32(first, second));
        for (acc, x) in acc.iter_mut().zip(x) {
            acc[i] = [usmmla(acc[i][0], low, *x), usmmla(acc[i][1], high, *x)];
        }
    }
}

/// `acc[i] + Σₖ a[4i + k] · b[4i + k]`. `vusdotq_s32` is not stable.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usdot(mut acc: int32x4_t, a: uint8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: `i8mm` is on in this function; the instruction only computes.
    unsafe {
        asm!("usdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// `acc[2i + j] + Σₖ a[8i + k] · b[8j + k]`. `vusmmlaq_s32` is not stable.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usmmla(mut acc: int32x4_t, a: uint8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: `i8mm` is on in this function; the instruction only computes.
    unsafe {
        asm!("usmmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    acc
}
