//! AVX2 and FMA: up to six rows by one panel of 16 columns in registers.
//!
//! Weights become f32 in registers, in the loop: that costs two shuffles or shifts beside `2 * rows` multiply-adds, less than
//! a second pass over memory would.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::pack::PANEL;
use super::{Job, Output};
use crate::DType;

/// Rows of a register tile: 6 × 2 accumulators, two weights and a broadcast fill 15 of the 16 registers.
const MAX_ROWS: usize = 6;
/// Steps of `k` for which a part of a panel stays in the L1 cache while all rows pass over it: 16 KiB of f32.
const K_BLOCK: usize = 256;
/// Rows of `x` that pass over a panel together, so that their `K_BLOCK` columns stay in the L2 cache.
const ROW_BLOCK: usize = 96;

/// See [`scalar::product`](super::scalar::product): the same sums in the same order, so the same bits.
///
/// # Safety
/// The machine has AVX2, FMA and F16C. No other thread may write these columns of these rows; the ranges lie within the
/// job.
pub(super) unsafe fn product(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        match job.weight.dtype() {
            DType::F32 => typed::<F32>(job, rows, panels, out),
            DType::F16 => typed::<F16>(job, rows, panels, out),
            DType::BF16 => typed::<BF16>(job, rows, panels, out),
        }
    }
}

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// From this many rows on, a part of a panel is brought to f32 once and multiplied from the L1 cache; below, weights are
/// converted in registers as they stream in.
const WIDEN_FROM: usize = 13;
/// How far ahead weights are fetched while they stream in: the hardware's own prefetching ends at each page, and the
/// loop alone keeps too few lines in flight.
const AHEAD_BYTES: usize = 8192;

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn typed<const TYPE: u8>(job: &Job<'_>, rows: Range<usize>, panels: Range<usize>, out: Output) {
    let cols = job.weight.cols();
    let group = PANEL * job.weight.dtype().size_bytes();
    let widen = TYPE != F32 && rows.len() >= WIDEN_FROM;
    let mut wide = Wide([const { MaybeUninit::uninit() }; K_BLOCK * PANEL]);
    let wide = wide.0.as_mut_ptr().cast::<f32>();
    let mut first = rows.start;
    while first < rows.end {
        let block = first..rows.end.min(first + ROW_BLOCK);
        for panel in panels.clone() {
            let weights = job.weight.panel(panel).as_ptr();
            if cols == 0 {
                // SAFETY: no step is read.
                unsafe { rows_of::<TYPE>(job, block.clone(), panel, 0..0, weights, weights, out) };
            }
            for k in (0..cols).step_by(K_BLOCK) {
                let ks = k..cols.min(k + K_BLOCK);
                // SAFETY: steps `ks` of the panel exist; `wide` holds `K_BLOCK` groups, at least as many; the caller's promise
                // is passed on.
                unsafe {
                    let weights = weights.add(k * group);
                    if widen {
                        for k in 0..ks.len() {
                            let [low, high] = load16::<TYPE>(weights.add(k * group));
                            _mm256_store_ps(wide.add(k * PANEL), low);
                            _mm256_store_ps(wide.add(k * PANEL + 8), high);
                        }
                        let next = weights.wrapping_add(K_BLOCK * group);
                        rows_of::<F32>(job, block.clone(), panel, ks, wide.cast(), next, out);
                    } else {
                        rows_of::<TYPE>(job, block.clone(), panel, ks, weights, weights.wrapping_add(AHEAD_BYTES), out);
                    }
                }
            }
        }
        first = block.end;
    }
}

/// A part of a panel in f32, its groups on cache lines of their own.
#[repr(align(64))]
struct Wide([MaybeUninit<f32>; K_BLOCK * PANEL]);

/// All of `rows` by the steps `ks` of a panel, whose weights for them start at `weights`, in equal tiles: seven rows are
/// 4 + 3, not 6 + 1.
///
/// # Safety
/// As for [`product`]; `ks.len()` groups of `TYPE` can be read at `weights`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_of<const TYPE: u8>(
    job: &Job<'_>,
    rows: Range<usize>,
    panel: usize,
    ks: Range<usize>,
    weights: *const u8,
    mut ahead: *const u8,
    out: Output,
) {
    let tiles = rows.len().div_ceil(MAX_ROWS);
    let (ks_len, group, mut fetched) = (ks.len(), PANEL * job.weight.dtype().size_bytes(), 0);
    let mut row = rows.start;
    for tile in 0..tiles {
        let next = rows.start + rows.len() * (tile + 1) / tiles;
        let ks = ks.clone();
        // SAFETY: the tile lies within `rows`, and the caller's promise is passed on.
        unsafe {
            match next - row {
                1 => tile_of::<TYPE, 1>(job, row, panel, ks, weights, ahead, out),
                2 => tile_of::<TYPE, 2>(job, row, panel, ks, weights, ahead, out),
                3 => tile_of::<TYPE, 3>(job, row, panel, ks, weights, ahead, out),
                4 => tile_of::<TYPE, 4>(job, row, panel, ks, weights, ahead, out),
                5 => tile_of::<TYPE, 5>(job, row, panel, ks, weights, ahead, out),
                _ => tile_of::<TYPE, 6>(job, row, panel, ks, weights, ahead, out),
            }
        }
        row = next;
        // A tile fetches two lines every four steps, so the first few tiles fetch all of the next part.
        fetched += ks_len * 32;
        ahead = if fetched < ks_len * group { ahead.wrapping_add(ks_len * 32) } else { weights };
    }
}

/// `ROWS` rows of `x` by panel `panel`, over the steps `ks`; sums start from the bias, or from where the steps before ended.
///
/// # Safety
/// As for [`product`]; `row + ROWS` lies within the job's rows and `ks` within its columns; `ks.len()` groups of `TYPE` can
/// be read at `weights`.
#[inline(never)] // a function of its own: inlined several times into one, accumulators are spilled
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_of<const TYPE: u8, const ROWS: usize>(
    job: &Job<'_>,
    row: usize,
    panel: usize,
    ks: Range<usize>,
    weights: *const u8,
    ahead: *const u8,
    out: Output,
) {
    let cols = job.weight.cols();
    let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        let mut start = [0.0; PANEL];
        if ks.start == 0 {
            start = job.weight.panel_bias(panel);
        } else {
            // SAFETY: this thread wrote these columns of this row in the steps before.
            unsafe { out.load(row + i, panel, &mut start) };
        }
        // SAFETY: `start` holds 16 values.
        *acc = unsafe { [_mm256_loadu_ps(start.as_ptr()), _mm256_loadu_ps(start.as_ptr().add(8))] };
    }
    let x = job.x[row * cols..(row + ROWS) * cols].as_ptr().wrapping_add(ks.start);
    let group = match TYPE {
        F32 => PANEL * 4,
        _ => PANEL * 2,
    };
    let step = |k: usize, acc: &mut [[__m256; 2]; ROWS]| {
        // SAFETY: `k < ks.len()`, so group `k` can be read, and value `ks.start + k` of each row exists.
        unsafe {
            let [low, high] = load16::<TYPE>(weights.add(k * group));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_broadcast_ss(&*x.add(i * cols + k));
                acc[0] = _mm256_fmadd_ps(x, low, acc[0]);
                acc[1] = _mm256_fmadd_ps(x, high, acc[1]);
            }
        }
    };
    let whole = ks.len() / 4 * 4;
    for k in (0..whole).step_by(4) {
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(k * 32).cast());
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(k * 32 + 64).cast());
        step(k, &mut acc);
        step(k + 1, &mut acc);
        step(k + 2, &mut acc);
        step(k + 3, &mut acc);
    }
    for k in whole..ks.len() {
        step(k, &mut acc);
    }
    for (i, acc) in acc.iter().enumerate() {
        let mut sums = [0.0; PANEL];
        // SAFETY: `sums` holds 16 values; the caller gives this thread these columns of these rows.
        unsafe {
            _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[1]);
            out.store(row + i, panel, &sums);
        }
    }
}

/// The 16 weights of a group as f32, the first eight columns and the other eight.
///
/// # Safety
/// A whole group must be readable at `group`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load16<const TYPE: u8>(group: *const u8) -> [__m256; 2] {
    // SAFETY: the caller's promise; 16 values are 64 bytes of f32 and 32 bytes of the others.
    unsafe {
        match TYPE {
            F32 => [_mm256_loadu_ps(group.cast()), _mm256_loadu_ps(group.cast::<f32>().add(8))],
            F16 => [
                _mm256_cvtph_ps(_mm_loadu_si128(group.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(group.cast::<__m128i>().add(1))),
            ],
            _ => {
                let pairs = _mm256_loadu_si256(group.cast());
                let low = _mm256_slli_epi32::<16>(pairs);
                let high = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
                [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
            }
        }
    }
}
