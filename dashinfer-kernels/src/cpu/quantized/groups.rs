//! What Arm's tiles share: the walk over the groups of a part, and what becomes of the sums of each.

use std::arch::aarch64::*;

use super::blocked::{CARRY, CODES_8, PLANES, Tile, WORDS, ZEROS, ahead_bytes, code_bytes};
use crate::cpu::linear::prefetch;
use crate::quant::PANEL;

/// Rows of bytes or words that `rows` rows of activations are.
pub(super) const fn num_x(x: u8, rows: usize) -> usize {
    if x == PLANES { 2 * rows } else { rows }
}

/// Sums of products over a group, and a panel's columns of the product: four vectors for each row.
pub(super) type Dots<const ROWS: usize> = [[int32x4_t; 4]; ROWS];
pub(super) type Values<const ROWS: usize> = [[float32x4_t; 4]; ROWS];

/// The input features of a tile that share scales.
pub(super) struct Group {
    /// Where its scales stand among those of a row.
    index: usize,
    /// The first of its input features.
    k: usize,
    /// How many there are: a multiple of 32, and of 64 if more than that.
    pub(super) len: usize,
    /// Codes of as many.
    pub(super) weights: *const u8,
    /// As many activations of the first row.
    x: *const u8,
    /// Bytes from a row to the next; of planes, from a plane to the next.
    stride: usize,
    ahead: *const u8,
}

impl Group {
    /// Activations of row `i`; of planes, the high ones of row `i / 2` if `i` is even, else the low ones.
    #[inline(always)]
    pub(super) fn x(&self, i: usize) -> *const u8 {
        self.x.wrapping_add(i * self.stride)
    }

    /// Fetches what is to follow, while eight input features from `k` on are multiplied.
    #[inline(always)]
    pub(super) fn fetch<const CODES: u8>(&self, k: usize) {
        let ahead = self.ahead.wrapping_add(ahead_bytes(CODES, k));
        prefetch(ahead);
        if CODES == CODES_8 {
            prefetch(ahead.wrapping_add(64));
        }
    }
}

/// The groups of a tile; all of it, if one spans the row.
#[inline(always)]
pub(super) fn groups<const X: u8, const CODES: u8, const FLAGS: u8>(tile: &Tile<'_>) -> impl Iterator<Item = Group> {
    let (ks, padded) = (tile.ks.clone(), tile.job.weight.cut().padded);
    let group = tile.job.weight.cut().group;
    let (len, first) = if FLAGS & CARRY != 0 { (ks.len(), 0) } else { (group, ks.start / group.max(1)) };
    let size = if X == WORDS { 2 } else { 1 };
    let x = tile.job.x.codes(tile.row).as_ptr();
    let (weights, ahead) = (tile.weights, tile.ahead);
    ks.clone().step_by(len.max(1)).enumerate().map(move |(index, k)| Group {
        index: first + index,
        k,
        len,
        weights: weights.wrapping_add(code_bytes(X, CODES, k - ks.start)),
        x: x.wrapping_add(k * size),
        stride: padded * size,
        ahead: ahead.wrapping_add(ahead_bytes(CODES, k - ks.start)),
    })
}

/// What the tile starts from.
#[inline(always)]
pub(super) fn start<const ROWS: usize>(tile: &Tile<'_>) -> Values<ROWS> {
    let mut out = [[0.0; PANEL]; ROWS];
    for (i, out) in out.iter_mut().enumerate() {
        *out = tile.start(i);
    }
    out.map(|row| load(&row))
}

/// Adds the sums of a group to the product; see [`scalar::product`](super::scalar::product). `centred` says that codes were
/// multiplied less their zero, which the corrections would make good otherwise.
#[inline(always)]
pub(super) fn add<const FLAGS: u8, const ROWS: usize>(
    out: &mut Values<ROWS>,
    tile: &Tile<'_>,
    group: &Group,
    dots: &Dots<ROWS>,
    centred: bool,
) {
    let (weight, x) = (tile.job.weight, tile.job.x);
    let (carry, zeros) = (FLAGS & CARRY != 0, FLAGS & ZEROS != 0);
    // One for each row and group.
    let (groups, scales, corrections) = (weight.cut().groups(), x.scales(tile.row), x.corrections(tile.row));
    let (scales, corrections) = (&scales[..groups * ROWS], &corrections[..groups * ROWS]);
    let weight_scales = widen_f16(weight.scales(tile.panel, group.index));
    let zero_points = if zeros { widen_u8(weight.zeros(tile.panel, group.index)) } else { widen_u8(&[1; PANEL]) };
    for (i, (out, dots)) in out.iter_mut().zip(dots).enumerate() {
        let at = i * groups + group.index;
        let (scale, correction) = (scales[at], if centred { 0 } else { corrections[at] });
        for (part, (out, dot)) in out.iter_mut().zip(dots).enumerate() {
            // SAFETY: NEON is part of every 64-bit Arm machine that this is compiled for; nothing is read or written.
            unsafe {
                let dot = if carry && group.k > 0 {
                    // What the parts before have summed stands in the output.
                    vaddq_s32(*dot, vreinterpretq_s32_f32(*out))
                } else {
                    vmlaq_n_s32(*dot, zero_points[part], correction)
                };
                *out = if carry && !tile.is_last() {
                    vreinterpretq_f32_s32(dot)
                } else {
                    let start = if carry { load(&weight.panel_bias(tile.panel))[part] } else { *out };
                    vfmaq_f32(start, vcvtq_f32_s32(dot), vmulq_n_f32(weight_scales[part], scale))
                };
            }
        }
    }
}

/// Writes the tile's columns of its rows.
#[inline(always)]
pub(super) fn store<const ROWS: usize>(tile: &Tile<'_>, out: &Values<ROWS>) {
    for (i, out) in out.iter().enumerate() {
        let mut values = [0.0; PANEL];
        for (part, out) in out.iter().enumerate() {
            // SAFETY: NEON is there, as in `add`; `values` holds four vectors.
            unsafe { vst1q_f32(values.as_mut_ptr().add(part * 4), *out) };
        }
        // SAFETY: the tile gives this thread these columns of these rows.
        unsafe { tile.out.store(tile.row + i, tile.panel, &values) };
    }
}

#[inline(always)]
fn load(values: &[f32; PANEL]) -> [float32x4_t; 4] {
    // SAFETY: NEON is there, as in `add`; there are four vectors of values.
    unsafe { [0, 4, 8, 12].map(|at| vld1q_f32(values.as_ptr().add(at))) }
}

#[inline(always)]
fn widen_f16(bits: &[u16; PANEL]) -> [float32x4_t; 4] {
    // SAFETY: as in `load`.
    unsafe { [0, 4, 8, 12].map(|at| vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(bits.as_ptr().add(at))))) }
}

#[inline(always)]
fn widen_u8(bytes: &[u8; PANEL]) -> [int32x4_t; 4] {
    // SAFETY: as in `load`; 16 bytes are one vector.
    unsafe {
        let bytes = vld1q_u8(bytes.as_ptr());
        let [low, high] = [vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)];
        [vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)]
            .map(|vector| vreinterpretq_s32_u32(vector))
    }
}
