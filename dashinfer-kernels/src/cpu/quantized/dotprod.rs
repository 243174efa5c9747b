//! Arm's `dotprod`: up to four rows of bytes by one panel; one instruction adds four products to each of four sums.
//!
//! It wants both sides signed or neither, so that 8-bit codes are multiplied less 128, their zero. 16-bit activations are two rows
//! of bytes.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::blocked::{self, BYTES, CODES_4, CODES_8, PLANES, Tile, Tiles, WIDE, code_bytes};
use super::groups::{self, Dots, Group, num_x};
use super::{Job, Operand, Output};
use crate::Scheme;
use crate::quant::{ActivationBits, WeightBits};

/// Bytes: one or two for an activation.
pub(super) fn operand(scheme: Scheme) -> Operand {
    match scheme.activation_bits() {
        ActivationBits::Eight => Operand::Bytes,
        ActivationBits::Sixteen => Operand::Planes,
    }
}

/// See [`blocked::product`].
///
/// # Safety
/// As there; the machine has `dotprod`.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe { blocked::product::<DotProd>(job, rows, panels, out) }
}

/// Rows of bytes of a register tile: 16 registers of sums. Six rows would read less, but the compiler spills with 24.
const MAX_ROWS: usize = 4;

struct DotProd;

impl Tiles for DotProd {
    const LAYOUTS: [u8; 2] = [BYTES, PLANES];
    const MAX_ROWS: usize = MAX_ROWS;
    /// 8 KiB of bytes.
    const PART: usize = 512;
    /// Two tiles.
    const WIDEN_FROM: Option<usize> = Some(5);

    unsafe fn widen<const X: u8, const CODES: u8>(from: *const u8, len: usize, to: *mut u8) {
        // SAFETY: the caller's promise, passed on.
        unsafe { widen::<X, CODES>(from, len, to) }
    }

    unsafe fn tile<const X: u8, const CODES: u8, const FLAGS: u8>(rows: usize, tile: &Tile<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match rows {
                1 => tile_of::<X, CODES, FLAGS, 1>(tile),
                2 => tile_of::<X, CODES, FLAGS, 2>(tile),
                _ if const { X == PLANES } => unreachable!("a tile has half as many rows of planes"),
                3 => tile_of::<X, CODES, FLAGS, 3>(tile),
                _ => tile_of::<X, CODES, FLAGS, 4>(tile),
            }
        }
    }
}

/// The codes of eight input features of output features `4 · part` to `4 · part + 3`: those of the even quad and of the odd one.
///
/// # Safety
/// The codes of eight input features can be read at `codes`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn quads<const CODES: u8>(codes: *const u8, part: usize) -> [uint8x16_t; 2] {
    // SAFETY: a part of a quad of 64 bytes, the second one behind the first unless they share bytes.
    unsafe {
        let first = vld1q_u8(codes.add(part * 16));
        if CODES == CODES_4 {
            [vandq_u8(first, vdupq_n_u8(15)), vshrq_n_u8::<4>(first)]
        } else {
            [first, vld1q_u8(codes.add(64 + part * 16))]
        }
    }
}

/// [`quads`] as what is multiplied: 8-bit codes less 128.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn signed<const CODES: u8>(codes: *const u8, part: usize) -> [int8x16_t; 2] {
    // SAFETY: the caller's promise, passed on.
    let quads = unsafe { quads::<CODES>(codes, part) };
    // Less 128 is the other highest bit.
    let flip = vdupq_n_u8(if CODES == CODES_8 { 0x80 } else { 0 });
    [vreinterpretq_s8_u8(veorq_u8(quads[0], flip)), vreinterpretq_s8_u8(veorq_u8(quads[1], flip))]
}

/// See [`Tiles::widen`].
///
/// # Safety
/// As there.
#[target_feature(enable = "neon")]
unsafe fn widen<const X: u8, const CODES: u8>(from: *const u8, len: usize, to: *mut u8) {
    for k in (0..len).step_by(8) {
        for part in 0..4 {
            // SAFETY: eight input features from `k` on exist on both sides.
            unsafe {
                let [even, odd] = signed::<CODES>(from.add(code_bytes(X, CODES, k)), part);
                let to = to.add(code_bytes(X, WIDE, k) + part * 16).cast::<i8>();
                vst1q_s8(to, even);
                vst1q_s8(to.add(64), odd);
            }
        }
    }
}

/// See [`Tiles::tile`].
///
/// # Safety
/// As there.
#[inline(never)] // one for each number of rows, not all in one
#[target_feature(enable = "neon,dotprod")]
unsafe fn tile_of<const X: u8, const CODES: u8, const FLAGS: u8, const ROWS: usize>(tile: &Tile<'_>) {
    let centred = tile.job.weight.scheme().weight_bits() == WeightBits::Eight;
    let mut out = groups::start::<ROWS>(tile);
    for group in groups::groups::<X, CODES, FLAGS>(tile) {
        // SAFETY: the codes of a group exist, in the weights and in `ROWS` rows of `x`.
        let dots = unsafe { dots::<X, CODES, ROWS>(&group) };
        groups::add::<FLAGS, ROWS>(&mut out, tile, &group, &dots, centred);
    }
    groups::store(tile, &out);
}

/// The sums of products over a group.
///
/// # Safety
/// `dotprod`. The group's codes can be read, and its activations in each of `ROWS` rows.
#[inline(always)] // so without features of its own: it takes those of the tile
unsafe fn dots<const X: u8, const CODES: u8, const ROWS: usize>(group: &Group) -> Dots<ROWS> {
    let num_x = num_x(X, ROWS);
    // SAFETY: the machine has NEON and `dotprod`; the group's length is a multiple of 16.
    unsafe {
        let mut sums = [[vdupq_n_s32(0); 4]; MAX_ROWS];
        for k in (0..group.len).step_by(16) {
            group.fetch::<CODES>(k);
            group.fetch::<CODES>(k + 8);
            let mut x = [vdupq_n_s8(0); MAX_ROWS];
            for (i, x) in x.iter_mut().enumerate().take(num_x) {
                *x = vld1q_s8(group.x(i).add(k).cast());
            }
            eight::<X, CODES, ROWS, 0, 1>(&mut sums, group.weights.add(code_bytes(X, CODES, k)), &x);
            eight::<X, CODES, ROWS, 2, 3>(&mut sums, group.weights.add(code_bytes(X, CODES, k + 8)), &x);
        }
        let mut dots = [[vdupq_n_s32(0); 4]; ROWS];
        for (i, dots) in dots.iter_mut().enumerate() {
            for (part, dots) in dots.iter_mut().enumerate() {
                *dots = if X == PLANES {
                    vaddq_s32(vshlq_n_s32::<8>(sums[2 * i][part]), sums[2 * i + 1][part])
                } else {
                    sums[i][part]
                };
            }
        }
        dots
    }
}

/// Eight input features: those in lanes `EVEN` and `ODD` of each `x` by their weights.
///
/// # Safety
/// `dotprod`. The codes of eight input features can be read at `codes`.
#[inline(always)]
unsafe fn eight<const X: u8, const CODES: u8, const ROWS: usize, const EVEN: usize, const ODD: usize>(
    sums: &mut [[int32x4_t; 4]; MAX_ROWS],
    codes: *const u8,
    x: &[int8x16_t; MAX_ROWS],
) {
    let num_x = num_x(X, ROWS);
    for part in 0..4 {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            let [even, odd] = signed::<CODES>(codes, part);
            for (sums, x) in sums.iter_mut().zip(x).take(num_x) {
                sums[part] = sdot::<EVEN>(sums[part], even, *x);
            }
            for (sums, x) in sums.iter_mut().zip(x).take(num_x) {
                sums[part] = sdot::<ODD>(sums[part], odd, *x);
            }
        }
    }
}

/// `sum[i] + Σₖ a[4i + k] · b[4 LANE + k]`. `vdotq_laneq_s32` needs Rust 1.98.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const LANE: usize>(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: `dotprod` is on in this function; the instruction only computes.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]",
             sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b, lane = const LANE,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}
