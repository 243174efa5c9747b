//! Arm's `i8mm`: up to four rows of bytes by one panel; one instruction multiplies eight input features of two output features with
//! those of two rows, unsigned by signed.
//!
//! Of 16-bit activations the two rows are the high and the low bytes of one, so that none is lacking when there is only one.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::blocked::{self, BYTES, PLANES, Tile, Tiles, WIDE, code_bytes};
use super::dotprod::quads;
use super::groups::{self, Dots, Group, num_x};
use super::{Job, Output};

/// See [`blocked::product`].
///
/// # Safety
/// As there; the machine has `i8mm`.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe { blocked::product::<I8mm>(job, rows, panels, out) }
}

/// Rows of bytes of a register tile: 16 registers of sums. With 24 the compiler moves more registers than it multiplies.
const MAX_ROWS: usize = 4;

struct I8mm;

impl Tiles for I8mm {
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

/// The codes of eight input features of output features `4 · part` to `4 · part + 3`: of the first two, eight in a row of each, and
/// of the other two.
///
/// # Safety
/// The codes of eight input features can be read at `codes`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn pairs<const CODES: u8>(codes: *const u8, part: usize) -> [uint8x16_t; 2] {
    // SAFETY: the caller's promise, passed on; of codes that are unpacked, 32 bytes a part.
    unsafe {
        if CODES == WIDE {
            return [vld1q_u8(codes.add(part * 32)), vld1q_u8(codes.add(part * 32 + 16))];
        }
        let [even, odd] = quads::<CODES>(codes, part).map(|quad| vreinterpretq_u32_u8(quad));
        [vreinterpretq_u8_u32(vzip1q_u32(even, odd)), vreinterpretq_u8_u32(vzip2q_u32(even, odd))]
    }
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
                let [first, second] = pairs::<CODES>(from.add(code_bytes(X, CODES, k)), part);
                let to = to.add(code_bytes(X, WIDE, k) + part * 32);
                vst1q_u8(to, first);
                vst1q_u8(to.add(16), second);
            }
        }
    }
}

/// See [`Tiles::tile`].
///
/// # Safety
/// As there.
#[inline(never)] // one for each number of rows, not all in one
#[target_feature(enable = "neon,i8mm")]
unsafe fn tile_of<const X: u8, const CODES: u8, const FLAGS: u8, const ROWS: usize>(tile: &Tile<'_>) {
    let mut out = groups::start::<ROWS>(tile);
    for group in groups::groups::<X, CODES, FLAGS>(tile) {
        // SAFETY: the codes of a group exist, in the weights and in `ROWS` rows of `x`.
        let dots = unsafe {
            if X == BYTES && ROWS == 1 && CODES != WIDE {
                [row::<CODES>(&group); ROWS]
            } else {
                dots::<X, CODES, ROWS>(&group)
            }
        };
        groups::add::<FLAGS, ROWS>(&mut out, tile, &group, &dots, false);
    }
    groups::store(tile, &out);
}

/// The sums of products over a group. Rows are multiplied in pairs, an odd one with itself.
///
/// # Safety
/// `i8mm`. The group's codes can be read, and its activations in each of `ROWS` rows.
#[inline(always)] // so without features of its own: it takes those of the tile
unsafe fn dots<const X: u8, const CODES: u8, const ROWS: usize>(group: &Group) -> Dots<ROWS> {
    let num_x = num_x(X, ROWS);
    let num_pairs = num_x.div_ceil(2);
    // SAFETY: the machine has NEON and `i8mm`; the group's length is a multiple of eight.
    unsafe {
        // Of each pair: of two output features, `[feature][row]`.
        let mut sums = [[vdupq_n_s32(0); 8]; MAX_ROWS / 2];
        for k in (0..group.len).step_by(8) {
            group.fetch::<CODES>(k);
            let mut x = [vdupq_n_s8(0); MAX_ROWS / 2];
            for (i, x) in x.iter_mut().enumerate().take(num_pairs) {
                let (a, b) = (group.x(2 * i), group.x(if 2 * i + 1 < num_x { 2 * i + 1 } else { 2 * i }));
                *x = vcombine_s8(vld1_s8(a.add(k).cast()), vld1_s8(b.add(k).cast()));
            }
            for part in 0..4 {
                let [first, second] = pairs::<CODES>(group.weights.add(code_bytes(X, CODES, k)), part);
                for (sums, x) in sums.iter_mut().zip(&x).take(num_pairs) {
                    sums[2 * part] = usmmla(sums[2 * part], first, *x);
                    sums[2 * part + 1] = usmmla(sums[2 * part + 1], second, *x);
                }
            }
        }
        let mut dots = [[vdupq_n_s32(0); 4]; ROWS];
        for (i, dots) in dots.iter_mut().enumerate() {
            for (part, dots) in dots.iter_mut().enumerate() {
                let pair = &sums[if X == PLANES { i } else { i / 2 }];
                let (first, second) = (pair[2 * part], pair[2 * part + 1]);
                let rows = [vuzp1q_s32(first, second), vuzp2q_s32(first, second)];
                *dots = if X == PLANES { vaddq_s32(vshlq_n_s32::<8>(rows[0]), rows[1]) } else { rows[i % 2] };
            }
        }
        dots
    }
}

/// The sums of products of one row of bytes: without a second one, half of each product of matrices would be lost, and codes be moved
/// for nothing.
///
/// # Safety
/// `i8mm`. The group's codes, as they are stored, and the activations of its first row can be read.
#[inline(always)]
unsafe fn row<const CODES: u8>(group: &Group) -> [int32x4_t; 4] {
    // SAFETY: as in `dots`.
    unsafe {
        // Two sums for each column hide the latency of the instruction.
        let mut sums = [[vdupq_n_s32(0); 2]; 4];
        for k in (0..group.len).step_by(8) {
            group.fetch::<CODES>(k);
            let x = vld1_s8(group.x(0).add(k).cast());
            for (part, sums) in sums.iter_mut().enumerate() {
                let [even, odd] = quads::<CODES>(group.weights.add(code_bytes(BYTES, CODES, k)), part);
                *sums = [usdot::<0>(sums[0], even, x), usdot::<1>(sums[1], odd, x)];
            }
        }
        sums.map(|[even, odd]| vaddq_s32(even, odd))
    }
}

/// `sum[i] + Σₖ a[4i + k] · b[4 LANE + k]`. `vusdotq_lane_s32` is not stable.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usdot<const LANE: usize>(mut sum: int32x4_t, a: uint8x16_t, b: int8x8_t) -> int32x4_t {
    // SAFETY: `i8mm` is on in this function; the instruction only computes.
    unsafe {
        asm!("usdot {sum:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]",
             sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b, lane = const LANE,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// `sum[2i + j] + Σₖ a[8i + k] · b[8j + k]`. `vusmmlaq_s32` is not stable.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn usmmla(mut sum: int32x4_t, a: uint8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: `i8mm` is on in this function; the instruction only computes.
    unsafe {
        asm!("usmmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}
