//! NEON: products of bytes to 16 bits, then added in pairs to 32.
//!
//! Weights are made signed: those of 8 bits less 128, which `128 · Σ x` makes good.

use std::arch::aarch64::*;

use super::super::linear::PANEL;
use super::{Bits, Group};

/// See [`scalar::dots`](super::scalar::dots).
///
/// # Safety
/// The machine has NEON; `out` has the group's rows.
#[target_feature(enable = "neon")]
pub(super) unsafe fn dots(group: &Group<'_>, out: &mut [[i32; PANEL]]) {
    match group.bits {
        Bits::Eight => typed::<8>(group, out),
        Bits::Four => typed::<4>(group, out),
    }
}

#[target_feature(enable = "neon")]
fn typed<const BITS: usize>(group: &Group<'_>, out: &mut [[i32; PANEL]]) {
    // 16 accumulators at most. So more than two rows take half of the columns at a time, and more than four are two tiles.
    for (x, out) in group.x.chunks(4).zip(out.chunks_mut(4)) {
        match x.len() {
            1 => tile::<BITS, 1, 4>(group, x, 0, out),
            2 => tile::<BITS, 2, 4>(group, x, 0, out),
            3 => (0..2).for_each(|half| tile::<BITS, 3, 2>(group, x, half, out)),
            _ => (0..2).for_each(|half| tile::<BITS, 4, 2>(group, x, half, out)),
        }
    }
}

/// The rows `x` of a group by `4 · REGS` of its columns, part `part` of them.
#[target_feature(enable = "neon")]
fn tile<const BITS: usize, const ROWS: usize, const REGS: usize>(
    group: &Group<'_>,
    x: &[&[i8]],
    part: usize,
    out: &mut [[i32; PANEL]],
) {
    const { assert!(BITS == 4 || BITS == 8) };
    let (weights, quads) = (group.part(part * REGS * 4), group.quads());
    let rows: [*const i8; ROWS] = std::array::from_fn(|i| x[i].as_ptr());
    // SAFETY: only called for quads that exist; the part's columns are among theirs.
    let load = |quad: usize| unsafe { load_signed::<BITS, REGS>(weights.add(quad * PANEL * BITS / 2)) };
    // SAFETY: rows have four steps for each quad.
    let x4 = |row: *const i8, quad: usize| unsafe { four_steps(row.add(quad * 4)) };
    // Two sums for each column: of its even pairs of steps and of its odd ones.
    let mut acc = [[[vdupq_n_s32(0); 2]; REGS]; ROWS];
    if BITS == 8 {
        // 16 bits hold one product: twice (−128)² would overflow.
        for quad in 0..quads {
            let w = load(quad);
            for (acc, row) in acc.iter_mut().zip(rows) {
                let x = x4(row, quad);
                for (acc, w) in acc.iter_mut().zip(w) {
                    acc[0] = vpadalq_s16(acc[0], vmull_s8(vget_low_s8(w), vget_low_s8(x)));
                    acc[1] = vpadalq_s16(acc[1], vmull_high_s8(w, x));
                }
            }
        }
    } else {
        // 16 bits hold the sum of 17 products, each at most 15 · 128.
        for start in (0..quads).step_by(16) {
            let mut sums = [[[vdupq_n_s16(0); 2]; REGS]; ROWS];
            for quad in start..quads.min(start + 16) {
                let w = load(quad);
                for (sums, row) in sums.iter_mut().zip(rows) {
                    let x = x4(row, quad);
                    for (sums, w) in sums.iter_mut().zip(w) {
                        sums[0] = vmlal_s8(sums[0], vget_low_s8(w), vget_low_s8(x));
                        sums[1] = vmlal_high_s8(sums[1], w, x);
                    }
                }
            }
            for (acc, sums) in acc.iter_mut().zip(sums) {
                for (acc, sums) in acc.iter_mut().zip(sums) {
                    *acc = [vpadalq_s16(acc[0], sums[0]), vpadalq_s16(acc[1], sums[1])];
                }
            }
        }
    }
    for (i, acc) in acc.iter().enumerate() {
        let sums = acc.map(|[low, high]| vpaddq_s32(low, high));
        store::<BITS, REGS>(sums, x[i], &mut out[i][part * REGS * 4..]);
    }
}

/// Writes the columns of a row, summed with weights by [`load_signed`].
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn store<const BITS: usize, const REGS: usize>(sums: [int32x4_t; REGS], x: &[i8], out: &mut [i32]) {
    let lacking = if BITS == 8 { 128 * sum(x) } else { 0 };
    for (out, sums) in out.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
        // SAFETY: `out` holds four values.
        unsafe { vst1q_s32(out.as_mut_ptr(), vaddq_s32(sums, vdupq_n_s32(lacking))) };
    }
}

#[inline(never)] // the compiler makes large loops of it
fn sum(x: &[i8]) -> i32 {
    x.iter().map(|x| i32::from(*x)).sum()
}

/// Four steps of a row, for each of four columns.
///
/// # Safety
/// Four values must be readable at `x`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn four_steps(x: *const i8) -> int8x16_t {
    // SAFETY: the caller's promise.
    vreinterpretq_s8_s32(vdupq_n_s32(unsafe { x.cast::<i32>().read_unaligned() }))
}

/// [`load`], less 128 if weights have 8 bits.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn load_signed<const BITS: usize, const REGS: usize>(weights: *const u8) -> [int8x16_t; REGS] {
    let flip = vdupq_n_u8(if BITS == 8 { 0x80 } else { 0 });
    // SAFETY: the caller's promise.
    unsafe { load::<BITS, REGS>(weights) }.map(|w| vreinterpretq_s8_u8(veorq_u8(w, flip)))
}

/// The weights of `4 · REGS` columns at four steps, each register `[4 columns][4 steps]`.
///
/// # Safety
/// As many must be readable.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn load<const BITS: usize, const REGS: usize>(weights: *const u8) -> [uint8x16_t; REGS] {
    let mut registers = [vdupq_n_u8(0); REGS];
    for (i, pair) in registers.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        // SAFETY: eight columns are 32 bytes, or 16 of 4-bit weights.
        unsafe {
            *pair = match BITS {
                8 => [vld1q_u8(weights.add(i * 32)), vld1q_u8(weights.add(i * 32 + 16))],
                _ => unpack(vld1q_u8(weights.add(i * 16))),
            };
        }
    }
    registers
}

/// Eight columns of 4-bit weights, `[8][2]` bytes, as bytes `[4][4]` and `[4][4]`.
#[inline]
#[target_feature(enable = "neon")]
fn unpack(nibbles: uint8x16_t) -> [uint8x16_t; 2] {
    let low = vreinterpretq_u16_u8(vandq_u8(nibbles, vdupq_n_u8(15)));
    let high = vreinterpretq_u16_u8(vshrq_n_u8::<4>(nibbles));
    [vreinterpretq_u8_u16(vzip1q_u16(low, high)), vreinterpretq_u8_u16(vzip2q_u16(low, high))]
}
