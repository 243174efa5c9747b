//! NEON: up to five rows by one panel, sums in 32 bits or, where codes are small enough, in 16.
//!
//! *Words.* Codes are brought to 16 bits, those of an input feature side by side, and multiplied with a lane of activations: four
//! products an instruction, added to 32-bit sums.
//!
//! *Bytes.* 4-bit codes are multiplied with 8-bit activations and added to 16-bit sums, eight products an instruction. A product is
//! at most 15 · 127, so 16 bits hold the sum of 17; each sum gets one from four input features.

use std::arch::aarch64::*;
use std::ops::Range;

use super::blocked::{self, BYTES, CODES_4, Tile, Tiles, WIDE, WORDS, code_bytes};
use super::dotprod::quads;
use super::groups::{self, Dots, Group};
use super::{Job, Operand, Output};
use crate::Scheme;
use crate::quant::{ActivationBits, WeightBits};

/// Bytes where 16 bits hold sums of their products.
pub(super) fn operand(scheme: Scheme) -> Operand {
    match (scheme.activation_bits(), scheme.weight_bits()) {
        (ActivationBits::Eight, WeightBits::Four) => Operand::Bytes,
        _ => Operand::Words,
    }
}

/// See [`blocked::product`].
///
/// # Safety
/// As there; the machine has NEON.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe { blocked::product::<Neon>(job, rows, panels, out) }
}

struct Neon;

impl Tiles for Neon {
    const LAYOUTS: [u8; 2] = [WORDS, BYTES];
    /// 20 registers of sums. Lanes of words can be taken from the lower 16 registers only: with six rows the compiler spills.
    const MAX_ROWS: usize = 5;
    /// 16 KiB of words.
    const PART: usize = 512;
    /// Two tiles.
    const WIDEN_FROM: Option<usize> = Some(6);

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
                3 => tile_of::<X, CODES, FLAGS, 3>(tile),
                4 => tile_of::<X, CODES, FLAGS, 4>(tile),
                _ => tile_of::<X, CODES, FLAGS, 5>(tile),
            }
        }
    }
}

/// The codes of a quad in 16 bits: of each of its input features, those of 16 output features. It is quad `quad` of two.
///
/// # Safety
/// The codes of eight input features can be read at `codes`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn words<const CODES: u8>(codes: *const u8, quad: usize) -> [[int16x8_t; 2]; 4] {
    // SAFETY: a quad is 64 bytes of codes; of words that are unpacked, 128.
    unsafe {
        if CODES == WIDE {
            let words = codes.cast::<i16>().add(quad * 64);
            return [0, 1, 2, 3].map(|k| [vld1q_s16(words.add(k * 16)), vld1q_s16(words.add(k * 16 + 8))]);
        }
        let codes = codes.add(if CODES == CODES_4 { 0 } else { quad * 64 });
        let uint8x16x4_t(a, b, c, d) = vld4q_u8(codes);
        [a, b, c, d].map(|codes| {
            let codes = match (CODES, quad) {
                (CODES_4, 0) => vandq_u8(codes, vdupq_n_u8(15)),
                (CODES_4, _) => vshrq_n_u8::<4>(codes),
                _ => codes,
            };
            [vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes))), vreinterpretq_s16_u16(vmovl_high_u8(codes))]
        })
    }
}

/// See [`Tiles::widen`].
///
/// # Safety
/// As there.
#[target_feature(enable = "neon")]
unsafe fn widen<const X: u8, const CODES: u8>(from: *const u8, len: usize, to: *mut u8) {
    for k in (0..len).step_by(8) {
        // SAFETY: eight input features from `k` on exist on both sides.
        unsafe {
            let (from, to) = (from.add(code_bytes(X, CODES, k)), to.add(code_bytes(X, WIDE, k)));
            if X == WORDS {
                for quad in 0..2 {
                    let words = words::<CODES>(from, quad);
                    for (i, words) in words.as_flattened().iter().enumerate() {
                        vst1q_s16(to.cast::<i16>().add(quad * 64 + i * 8), *words);
                    }
                }
            } else {
                for part in 0..4 {
                    let [even, odd] = quads::<CODES>(from, part);
                    vst1q_u8(to.add(part * 16), even);
                    vst1q_u8(to.add(64 + part * 16), odd);
                }
            }
        }
    }
}

/// See [`Tiles::tile`].
///
/// # Safety
/// As there.
#[inline(never)] // one for each number of rows, not all in one
#[target_feature(enable = "neon")]
unsafe fn tile_of<const X: u8, const CODES: u8, const FLAGS: u8, const ROWS: usize>(tile: &Tile<'_>) {
    let mut out = groups::start::<ROWS>(tile);
    for group in groups::groups::<X, CODES, FLAGS>(tile) {
        // SAFETY: the codes of a group exist, in the weights and in `ROWS` rows of `x`.
        let dots = unsafe {
            if X == WORDS {
                word_dots::<CODES, ROWS>(&group)
            } else {
                let halves = [byte_dots::<CODES, ROWS>(&group, 0), byte_dots::<CODES, ROWS>(&group, 1)];
                std::array::from_fn(|row| [halves[0][row][0], halves[0][row][1], halves[1][row][0], halves[1][row][1]])
            }
        };
        groups::add::<FLAGS, ROWS>(&mut out, tile, &group, &dots, false);
    }
    groups::store(tile, &out);
}

/// The sums of products over a group, in words.
///
/// # Safety
/// The group's codes can be read, and its activations in each of `ROWS` rows.
#[inline(always)] // so without features of its own: it takes those of the tile
unsafe fn word_dots<const CODES: u8, const ROWS: usize>(group: &Group) -> Dots<ROWS> {
    // SAFETY: the machine has NEON; the group's length is a multiple of eight.
    unsafe {
        let mut sums = [[vdupq_n_s32(0); 4]; ROWS];
        for k in (0..group.len).step_by(8) {
            group.fetch::<CODES>(k);
            let mut x = [vdupq_n_s16(0); ROWS];
            for (i, x) in x.iter_mut().enumerate() {
                *x = vld1q_s16(group.x(i).cast::<i16>().add(k));
            }
            let codes = group.weights.add(code_bytes(WORDS, CODES, k));
            // Words of activations stand in the order 0 2 1 3.
            let quad = words::<CODES>(codes, 0);
            feature::<0, ROWS>(&mut sums, &x, quad[0]);
            feature::<2, ROWS>(&mut sums, &x, quad[1]);
            feature::<1, ROWS>(&mut sums, &x, quad[2]);
            feature::<3, ROWS>(&mut sums, &x, quad[3]);
            let quad = words::<CODES>(codes, 1);
            feature::<4, ROWS>(&mut sums, &x, quad[0]);
            feature::<6, ROWS>(&mut sums, &x, quad[1]);
            feature::<5, ROWS>(&mut sums, &x, quad[2]);
            feature::<7, ROWS>(&mut sums, &x, quad[3]);
        }
        sums
    }
}

/// One input feature: lane `LANE` of each row's `x` by 16 weights.
#[inline]
#[target_feature(enable = "neon")]
fn feature<const LANE: i32, const ROWS: usize>(sums: &mut Dots<ROWS>, x: &[int16x8_t; ROWS], weights: [int16x8_t; 2]) {
    for (half, weights) in weights.into_iter().enumerate() {
        for (sums, x) in sums.iter_mut().zip(x) {
            sums[2 * half] = vmlal_laneq_s16::<LANE>(sums[2 * half], vget_low_s16(weights), *x);
            sums[2 * half + 1] = vmlal_high_laneq_s16::<LANE>(sums[2 * half + 1], weights, *x);
        }
    }
}

/// The sums of products over a group, in bytes, for half of a panel: so that the 16-bit sums of five rows fit the registers.
///
/// # Safety
/// As for [`word_dots`]; weights have 4 bits.
#[inline(always)]
unsafe fn byte_dots<const CODES: u8, const ROWS: usize>(group: &Group, half: usize) -> [[int32x4_t; 2]; ROWS] {
    // SAFETY: as in `word_dots`.
    unsafe {
        // Of each column two sums, of the products of pairs.
        let mut sums = [[vdupq_n_s32(0); 4]; ROWS];
        for first in (0..group.len).step_by(64) {
            // Of two columns: one sum for each of the four input features of a quad. At most 16 quads.
            let mut short = [[vdupq_n_s16(0); 4]; ROWS];
            for k in (first..group.len.min(first + 64)).step_by(8) {
                if half == 0 {
                    group.fetch::<CODES>(k);
                }
                let codes = group.weights.add(code_bytes(BYTES, CODES, k));
                let weights = [quads::<CODES>(codes, 2 * half), quads::<CODES>(codes, 2 * half + 1)];
                for quad in 0..2 {
                    for (i, short) in short.iter_mut().enumerate() {
                        let x = group.x(i).add(k + quad * 4).cast::<i32>().read_unaligned();
                        let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
                        for (part, weights) in weights.iter().enumerate() {
                            let weights = vreinterpretq_s8_u8(weights[quad]);
                            short[2 * part] = vmlal_s8(short[2 * part], vget_low_s8(weights), vget_low_s8(x));
                            short[2 * part + 1] = vmlal_high_s8(short[2 * part + 1], weights, x);
                        }
                    }
                }
            }
            for (sums, short) in sums.iter_mut().zip(short) {
                for (sums, short) in sums.iter_mut().zip(short) {
                    *sums = vpadalq_s16(*sums, short);
                }
            }
        }
        sums.map(|[a, b, c, d]| [vpaddq_s32(a, b), vpaddq_s32(c, d)])
    }
}
