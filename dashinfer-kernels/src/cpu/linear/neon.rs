//! NEON: up to six rows by one panel of 16 columns in registers.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::blocked::{self, BF16, F16, F32, Tile, Tiles, group_bytes};
use super::pack::PANEL;
use super::{Job, Output};

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
    /// 6 × 4 accumulators, four steps of each row and a weight fill 31 of the 32 registers.
    const MAX_ROWS: usize = 6;
    /// 16 KiB of f32.
    const K_BLOCK: usize = 256;
    /// Three tiles: then converting once and storing is less than converting in each.
    const WIDEN_FROM: Option<usize> = Some(13);

    unsafe fn widen<const TYPE: u8>(from: *const u8, groups: usize, to: *mut f32) {
        // SAFETY: the caller's promise, passed on.
        unsafe { widen::<TYPE>(from, groups, to) }
    }

    unsafe fn tile<const TYPE: u8>(rows: usize, tile: &Tile<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe {
            match rows {
                1 => tile_of::<TYPE, 1>(tile),
                2 => tile_of::<TYPE, 2>(tile),
                3 => tile_of::<TYPE, 3>(tile),
                4 => tile_of::<TYPE, 4>(tile),
                5 => tile_of::<TYPE, 5>(tile),
                _ => tile_of::<TYPE, 6>(tile),
            }
        }
    }
}

/// See [`Tiles::widen`].
///
/// # Safety
/// As there.
#[target_feature(enable = "neon")]
pub(super) unsafe fn widen<const TYPE: u8>(from: *const u8, groups: usize, to: *mut f32) {
    for k in 0..groups {
        // SAFETY: group `k` exists on both sides.
        unsafe { store16(to.add(k * PANEL), load16::<TYPE>(from, k, k % 2 == 1)) };
    }
}

/// See [`Tiles::tile`].
///
/// # Safety
/// As there.
#[inline(never)] // a function of its own, as for AVX2
#[target_feature(enable = "neon")]
unsafe fn tile_of<const TYPE: u8, const ROWS: usize>(tile: &Tile<'_>) {
    let mut acc = [[vdupq_n_f32(0.0); 4]; ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: `start` gives 16 values, a group of f32.
        *acc = unsafe { load16::<F32>(tile.start(i).as_ptr().cast(), 0, false) };
    }
    let (x, cols, steps) = (tile.x(ROWS), tile.job.weight.cols(), tile.ks.len());
    let weights = |k: usize, odd: bool| {
        // SAFETY: `k < steps` wherever this is called, so group `k` can be read.
        unsafe { load16::<TYPE>(tile.weights, k, odd) }
    };
    let whole = steps / 4 * 4;
    for k in (0..whole).step_by(4) {
        prefetch(tile.ahead.wrapping_add(k * 32));
        prefetch(tile.ahead.wrapping_add(k * 32 + 64));
        // Four steps of a row in one load: a multiply-add takes its lane of them for nothing, where broadcasting each value
        // would cost some CPUs an instruction on the units that multiply.
        let mut x4 = [vdupq_n_f32(0.0); ROWS];
        for (i, x4) in x4.iter_mut().enumerate() {
            // SAFETY: `k + 3 < steps`, so values `ks.start + k` and the three behind it exist in each row.
            *x4 = unsafe { vld1q_f32(x.add(i * cols + k)) };
        }
        step::<0, ROWS>(&mut acc, &x4, weights(k, false));
        step::<1, ROWS>(&mut acc, &x4, weights(k + 1, true));
        step::<2, ROWS>(&mut acc, &x4, weights(k + 2, false));
        step::<3, ROWS>(&mut acc, &x4, weights(k + 3, true));
    }
    for k in whole..steps {
        let mut x1 = [vdupq_n_f32(0.0); ROWS];
        for (i, x1) in x1.iter_mut().enumerate() {
            // SAFETY: `k < steps`, so value `ks.start + k` of each row exists.
            *x1 = vdupq_n_f32(unsafe { *x.add(i * cols + k) });
        }
        step::<0, ROWS>(&mut acc, &x1, weights(k, k % 2 == 1));
    }
    for (i, acc) in acc.iter().enumerate() {
        let mut sums = [0.0; PANEL];
        // SAFETY: `sums` holds 16 values; the caller gives this thread these columns of these rows.
        unsafe {
            store16(sums.as_mut_ptr(), *acc);
            tile.out.store(tile.row + i, tile.panel, &sums);
        }
    }
}

/// One step of `k`: lane `LANE` of each row's `x` by 16 weights.
#[inline]
#[target_feature(enable = "neon")]
fn step<const LANE: i32, const ROWS: usize>(
    acc: &mut [[float32x4_t; 4]; ROWS],
    x: &[float32x4_t; ROWS],
    weights: [float32x4_t; 4],
) {
    for (part, weights) in weights.into_iter().enumerate() {
        for (acc, x) in acc.iter_mut().zip(x) {
            acc[part] = vfmaq_laneq_f32::<LANE>(acc[part], weights, *x);
        }
    }
}

/// The 16 weights of group `k` as f32, in the order of their columns; `odd` says whether `k` is.
///
/// # Safety
/// The group, and of bf16 the pair of groups that it belongs to, must be readable.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load16<const TYPE: u8>(weights: *const u8, k: usize, odd: bool) -> [float32x4_t; 4] {
    // SAFETY: the caller's promise; 16 values are 64 bytes of f32 and 32 bytes of the others.
    unsafe {
        let group = weights.add((if TYPE == BF16 { k & !1 } else { k }) * group_bytes(TYPE));
        match TYPE {
            F32 => {
                let group = group.cast::<f32>();
                [vld1q_f32(group), vld1q_f32(group.add(4)), vld1q_f32(group.add(8)), vld1q_f32(group.add(12))]
            }
            F16 => {
                let [a, b] = [vld1q_u16(group.cast()), vld1q_u16(group.cast::<u16>().add(8))];
                let [a, b] = [vreinterpretq_f16_u16(a), vreinterpretq_f16_u16(b)];
                [
                    vcvt_f32_f16(vget_low_f16(a)),
                    vcvt_high_f32_f16(a),
                    vcvt_f32_f16(vget_low_f16(b)),
                    vcvt_high_f32_f16(b),
                ]
            }
            _ => {
                let pairs = group.cast::<u32>();
                [0, 4, 8, 12].map(|column| bf16_of_pairs(vld1q_u32(pairs.add(column)), odd))
            }
        }
    }
}

/// The first or the second of four pairs of bf16, as f32.
#[inline]
#[target_feature(enable = "neon")]
fn bf16_of_pairs(pairs: uint32x4_t, second: bool) -> float32x4_t {
    let bits = if second { vandq_u32(pairs, vdupq_n_u32(0xffff_0000)) } else { vshlq_n_u32::<16>(pairs) };
    vreinterpretq_f32_u32(bits)
}

/// # Safety
/// 16 values must be writable at `to`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store16(to: *mut f32, values: [float32x4_t; 4]) {
    for (i, values) in values.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { vst1q_f32(to.add(i * 4), values) };
    }
}

/// Fetches the cache line at `address`, which may be any. `_prefetch` is not stable.
#[inline(always)]
#[expect(clippy::inline_always, reason = "one instruction")]
pub(crate) fn prefetch(address: *const u8) {
    // SAFETY: a hint, which reads nothing and never faults.
    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) address.addr(), options(nomem, nostack, preserves_flags)) };
}
